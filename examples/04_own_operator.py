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
# # Write your own operator
#
# A string of CUDA C becomes a PyTorch operator with autograd: compiled in a second at its first call, without a C++
# compiler, for every float type. Without a GPU the same text runs on the CPU emulator.

# %%
import torch
import torch.nn.functional as F

from cupy_kernels.errors import KernelCompileError
from modelnew import environment
from modelnew.inline import operator

device = "cuda" if torch.cuda.is_available() else "cpu"
print(environment.backend()["why"])

# %% [markdown]
# ## Elementwise: SiLU, y = x sigmoid(x)
#
# Parameters are matched by name: `x` is the argument, `y` the result, `dy` and `dx` their gradients, `size` the
# number of elements. `scalar_t` is the type of the tensors, `acc_t` that of the arithmetic (`double` for `double`,
# else `float`).

# %%
silu = operator(
    """
#include "common.cuh"

extern "C" __global__ void silu(const scalar_t* x, scalar_t* y, i64 size) {
    i64 i = (i64)blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= size) return;
    acc_t v = to_acc(x[i]);
    y[i] = from_acc<scalar_t>(v / (1 + exp(-v)));
}

extern "C" __global__ void silu_backward(const scalar_t* dy, const scalar_t* x, scalar_t* dx, i64 size) {
    i64 i = (i64)blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= size) return;
    acc_t v = to_acc(x[i]), s = 1 / (1 + exp(-v));
    dx[i] = from_acc<scalar_t>(to_acc(dy[i]) * s * (1 + v * (1 - s)));
}
""",
    "silu",
    "silu_backward",
)

x = torch.randn(4, 5, dtype=torch.float64, device=device, requires_grad=True)
assert torch.autograd.gradcheck(silu, x)
print(silu, "gradcheck in float64: passed")

# %% [markdown]
# `gradcheck` compares the backward with finite differences of the forward. Against PyTorch's own operator, with the
# tolerances that PyTorch has for each type:

# %%
for dtype in (torch.float32, torch.float64, torch.float16, torch.bfloat16):
    x = torch.randn(1000, device=device).to(dtype).requires_grad_()
    dy = torch.randn_like(x)
    y, expected = silu(x), F.silu(x)
    (dx,), (expected_dx,) = torch.autograd.grad(y, x, dy), torch.autograd.grad(expected, x, dy)
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(dx, expected_dx)
    print(
        f"{dtype}: largest difference {(y - expected).abs().max():.1e}, gradient {(dx - expected_dx).abs().max():.1e}"
    )

# %% [markdown]
# ## Rows: RMS norm, y = x / sqrt(mean(x²) + eps) · weight
#
# More than one input, a number, a reduction over each row, and a second output, `rstd`, that only the backward uses.
# One block takes one row; the gradient of `weight`, a sum over rows, has a kernel of its own, with a thread for each
# column. `grid` and `sizes` are functions of the operator's arguments.

# %%
BLOCK = 128

rms_norm = operator(
    """
#include "common.cuh"

extern "C" __global__ void rms_norm(
    const scalar_t* x, const scalar_t* weight, float eps, scalar_t* y, acc_t* rstd, i64 columns) {
    __shared__ acc_t scratch[32];
    const scalar_t* row = x + blockIdx.x * columns;
    acc_t sum = 0;
    for (i64 j = threadIdx.x; j < columns; j += blockDim.x) sum += to_acc(row[j]) * to_acc(row[j]);
    acc_t r = 1 / sqrt(block_sum(sum, scratch) / columns + eps);
    if (threadIdx.x == 0) rstd[blockIdx.x] = r;
    for (i64 j = threadIdx.x; j < columns; j += blockDim.x)
        y[blockIdx.x * columns + j] = from_acc<scalar_t>(to_acc(row[j]) * r * to_acc(weight[j]));
}

// dx = rstd (g - xhat mean(g xhat)), with g = dy weight and xhat = x rstd.
extern "C" __global__ void rms_norm_dx(
    const scalar_t* dy, const scalar_t* x, const scalar_t* weight, const acc_t* rstd, scalar_t* dx, i64 columns) {
    __shared__ acc_t scratch[32];
    i64 first = blockIdx.x * columns;
    acc_t r = rstd[blockIdx.x], dot = 0;
    for (i64 j = threadIdx.x; j < columns; j += blockDim.x)
        dot += to_acc(dy[first + j]) * to_acc(weight[j]) * to_acc(x[first + j]) * r;
    dot = block_sum(dot, scratch) / columns;
    for (i64 j = threadIdx.x; j < columns; j += blockDim.x) {
        acc_t g = to_acc(dy[first + j]) * to_acc(weight[j]), xhat = to_acc(x[first + j]) * r;
        dx[first + j] = from_acc<scalar_t>(r * (g - xhat * dot));
    }
}

extern "C" __global__ void rms_norm_dweight(
    const scalar_t* dy, const scalar_t* x, const acc_t* rstd, scalar_t* dweight, i64 rows, i64 columns) {
    i64 j = (i64)blockIdx.x * blockDim.x + threadIdx.x;
    if (j >= columns) return;
    acc_t sum = 0;
    for (i64 i = 0; i < rows; i++) sum += to_acc(dy[i * columns + j]) * to_acc(x[i * columns + j]) * rstd[i];
    dweight[j] = from_acc<scalar_t>(sum);
}
""",
    "rms_norm",
    ("rms_norm_dx", "rms_norm_dweight"),
    output=lambda x, weight, eps: {"y": x.shape, "rstd": x.shape[:-1]},
    shapes={"weight": lambda x, weight, eps: x.shape[-1:]},
    sizes={
        "rows": lambda x, weight, eps: x.shape[:-1].numel(),
        "columns": lambda x, weight, eps: x.shape[-1],
    },
    grid={
        "rms_norm": lambda x, weight, eps: x.shape[:-1].numel(),
        "rms_norm_dx": lambda x, weight, eps: x.shape[:-1].numel(),
    },
    block=BLOCK,
    saved="rstd",
)

x = torch.randn(3, 4, 7, dtype=torch.float64, device=device, requires_grad=True)
weight = torch.rand(7, dtype=torch.float64, device=device, requires_grad=True)
assert torch.autograd.gradcheck(lambda x, weight: rms_norm(x, weight, 1e-5), (x, weight))

x, weight = torch.randn(20, 300, device=device), torch.rand(300, device=device)
torch.testing.assert_close(rms_norm(x, weight, 1e-5), F.rms_norm(x, (300,), weight, 1e-5))
print(rms_norm, "gradcheck in float64: passed; like torch.nn.functional.rms_norm")

# %% [markdown]
# It is an operator like any other, in a module or in a training step:


# %%
class Block(torch.nn.Module):
    def __init__(self, width):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(width))
        self.linear = torch.nn.Linear(width, width)

    def forward(self, x):
        return x + silu(self.linear(rms_norm(x, self.weight, 1e-5)))


torch.manual_seed(0)
block = Block(16).to(device)
optimizer = torch.optim.Adam(block.parameters(), lr=1e-2)
x = torch.randn(64, 16, device=device)
target = x.flip(-1)
for step in range(21):
    optimizer.zero_grad()
    loss = F.mse_loss(block(x), target)
    loss.backward()
    optimizer.step()
    if step % 10 == 0:
        print(f"step {step:2}: loss {loss.item():.4f}")

# %% [markdown]
# ## Mistakes
#
# A text is compiled at the first call, and an error names its line. What can be told before that is told when the
# operator is made.

# %%
try:
    operator('extern "C" __global__ void cube(const float* x, float* y, i64 n) {}', "cube", "cube_backward")
except ValueError as error:
    print(error)

wrong = """#include "common.cuh"
extern "C" __global__ void cube(const scalar_t* x, scalar_t* y, i64 size) {
    i64 i = (i64)blockIdx.x * blockDim.x + threadIdx.x;
    if (i < size) y[i] = from_acc<scalar_t>(v * v * v);
}
"""
try:
    operator(wrong, "cube")(torch.ones(3, device=device))
except KernelCompileError as error:
    print("\n".join(str(error).splitlines()[:3]))
