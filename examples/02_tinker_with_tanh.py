# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Tinker with one kernel: tanh
#
# Change a kernel's text in a cell, run the cell, and read in one table whether it is still right and whether it is
# faster. Here `tanh` goes from the naive version to the one that the package has, which reads 16 bytes at a time.
#
# On a GPU the shapes are real, and times are measured. Without one the same text runs in the CPU emulator. It tells
# right from wrong all the same, but says nothing about times.

# %%
import torch

import cupy_kernels
from modelnew import ModelNew, environment

# %load_ext modelnew
print(environment.backend()["why"])

# %% [markdown]
# ## What is there
#
# Each kernel is in a `.cu` file. It is compiled once for each set of macros that the host asks for. Such a set is a
# *variant*. `scalar_t` is the tensors' type, `acc_t` that of the arithmetic. `WIDTH` is how many neighbouring elements
# a thread takes. `cupy_kernels.kernels()` without a name lists everything that can be changed.

# %%
cupy_kernels.kernels("tanh")

# %%
cupy_kernels.show("tanh_forward")

# %% [markdown]
# To begin an edit, `%cu_text tanh_forward` puts this text into a new cell. `cupy_kernels.text("tanh_forward")` is the
# same as a string.

# %% [markdown]
# ## Naive: each thread walks over its elements
#
# `%%cu tanh_forward` replaces the definition of that one kernel. The parameters must stay as they are, as the host
# passes them. The rest is free. The host starts one thread for `WIDTH` elements.
#
# Neighbouring threads are `WIDTH` elements apart here: each time, the 32 loads of a warp touch `WIDTH` times the memory
# that they use.

# %% tags=["active-ipynb"]
# %%cu tanh_forward
# extern "C" __global__ void tanh_forward(const scalar_t* x, scalar_t* y, i64 size) {
#     i64 start = ((i64)blockIdx.x * blockDim.x + threadIdx.x) * WIDTH;
#     for (i64 i = start; i < start + WIDTH && i < size; i++) y[i] = from_acc<scalar_t>(tanh_of(to_acc(x[i])));
# }

# %% [markdown]
# In the table, the reference of an error is PyTorch's own error against float64. The reference of a time is the
# package's kernel. Below the table stands what there was no time to check. `--all` checks that as well. The cell was
# right, so it is in force: everything in this process runs it now. `cupy_kernels.kernels()` marks what is edited.

# %%
cupy_kernels.edited()

# %%
cupy_kernels.attributes("tanh_forward", scalar_t="float")

# %% [markdown]
# ## Coalesced: neighbouring threads, neighbouring elements
#
# A block takes the same elements, in another order.

# %% tags=["active-ipynb"]
# %%cu tanh_forward
# extern "C" __global__ void tanh_forward(const scalar_t* x, scalar_t* y, i64 size) {
#     i64 first = (i64)blockIdx.x * blockDim.x * WIDTH + threadIdx.x;
#     #pragma unroll
#     for (int k = 0; k < WIDTH; k++) {
#         i64 i = first + (i64)k * blockDim.x;
#         if (i < size) y[i] = from_acc<scalar_t>(tanh_of(to_acc(x[i])));
#     }
# }

# %%
cupy_kernels.attributes("tanh_forward", scalar_t="float")

# %% [markdown]
# ## Vectorised: one access of 16 bytes
#
# This takes fewer and wider instructions for the same bytes. `Pack`, defined in `tanh.cu` above the kernels, is `WIDTH`
# elements that are aligned to their size. The host chooses `WIDTH` 1 where a tensor does not start at a multiple of 16
# bytes.

# %% tags=["active-ipynb"]
# %%cu tanh_forward
# extern "C" __global__ void tanh_forward(const scalar_t* x, scalar_t* y, i64 size) {
#     i64 start = ((i64)blockIdx.x * blockDim.x + threadIdx.x) * WIDTH;
#     if (start + WIDTH <= size) {
#         Pack in = *(const Pack*)(x + start), out;
#         #pragma unroll
#         for (int i = 0; i < WIDTH; i++) out.v[i] = from_acc<scalar_t>(tanh_of(to_acc(in.v[i])));
#         *(Pack*)(y + start) = out;
#     } else {
#         for (; start < size; start++) y[start] = from_acc<scalar_t>(tanh_of(to_acc(x[start])));
#     }
# }

# %% [markdown]
# The compiler's output shows the wide accesses:

# %%
code = cupy_kernels.ptx("tanh_forward", scalar_t="float", WIDTH=4)
print("\n".join(line.strip() for line in code.splitlines() if ".v4." in line))

# %% [markdown]
# ## What does not hold is refused
#
# This formula has fewer instructions. But near 0, `1 - 2 / (exp(2v) + 1)` subtracts two numbers that are almost equal,
# and digits are lost. The check sees it, and the kernel from before stays in force.

# %% tags=["active-ipynb", "raises-exception"]
# %%cu tanh_forward
# extern "C" __global__ void tanh_forward(const scalar_t* x, scalar_t* y, i64 size) {
#     i64 first = (i64)blockIdx.x * blockDim.x * WIDTH + threadIdx.x;
#     for (int k = 0; k < WIDTH; k++) {
#         i64 i = first + (i64)k * blockDim.x;
#         if (i < size) y[i] = from_acc<scalar_t>(1 - 2 / (exp(2 * to_acc(x[i])) + 1));
#     }
# }

# %% [markdown]
# A text that does not compile is refused, too. The error names the line of the cell:

# %% tags=["active-ipynb", "raises-exception"]
# %%cu tanh_forward
# extern "C" __global__ void tanh_forward(const scalar_t* x, scalar_t* y, i64 size) {
#     i64 i = (i64)blockIdx.x * blockDim.x + threadIdx.x;
#     if (i < size) y[i] = from_acc<scalar_t>(tahn_of(to_acc(x[i])));
# }

# %% [markdown]
# A GPU does not notice that a kernel reads or writes one element too far. The CPU emulator does, on every machine with
# a C++ compiler. It also finds races, and barriers that not all threads reach:

# %% tags=["active-ipynb", "raises-exception"]
# %%cu tanh_forward --device cpu
# extern "C" __global__ void tanh_forward(const scalar_t* x, scalar_t* y, i64 size) {
#     i64 first = (i64)blockIdx.x * blockDim.x * WIDTH + threadIdx.x;
#     for (int k = 0; k < WIDTH; k++) {
#         i64 i = first + (i64)k * blockDim.x;
#         if (i <= size) y[i] = from_acc<scalar_t>(tanh_of(to_acc(x[i])));
#     }
# }

# %% [markdown]
# ## From Python
#
# `override` does the same for one block. It takes macros, too: here one kernel computes in double precision.
# `ModelNew`, and everything else that launches the kernel, uses it at once. What was compiled before is not compiled
# again afterwards.

# %%
model = ModelNew(16, 16, 3, 1, 1, 1, 4, replace={"tanh"})
x = torch.rand(2, 16, 8, 8, device=next(model.parameters()).device)

with torch.no_grad():
    y = model(x)
    with cupy_kernels.override({"tanh_forward": {"acc_t": "double"}}):
        y_double = model(x)
        registers = cupy_kernels.attributes("tanh_forward", scalar_t="float", WIDTH=4)
print(f"largest difference: {(y - y_double).abs().max():.1e}")
print(registers)

# %%
# %cu_reset
with torch.no_grad():
    assert torch.allclose(model(x), y)
