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
# A string of CUDA C becomes a PyTorch operator with autograd, for every float type. Its first call compiles it, in a
# second or so, without a C++ compiler. Without a GPU the same text runs in the CPU emulator. That needs a C++ compiler,
# and also looks for bugs: races, accesses out of bounds, outputs that are not written. `help(operator)` has all the
# rules.

# %%
import torch
import torch.nn.functional as F

from cupy_kernels.errors import KernelCompileError
from modelnew import environment
from modelnew.inline import operator

device = environment.device()  # the GPU if one is usable, else the CPU: the emulator
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
# `gradcheck` compares the backward with finite differences of the forward. Now we compare with PyTorch's own operator,
# with the tolerances that PyTorch has for each type:

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
# This operator has more than one input, a number with a default, and a sum over each row. Its second output, `rstd`, is
# only for the backward. One block takes one row. The gradient of `weight`, a sum over rows, has a kernel of its own,
# with a thread for each column. `grid`, `sizes` and `shapes` are functions of the operator's arguments.
#
# A kernel checks no bounds, so an input must have the first one's shape, unless `shapes` says what it has.

# %%
BLOCK = 128

rms_norm = operator(
    """
#include "common.cuh"

extern "C" __global__ void rms_norm(
    const scalar_t* x, const scalar_t* weight, acc_t eps, scalar_t* y, acc_t* rstd, i64 columns) {
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
    defaults={"eps": 1e-5},
)

x = torch.randn(3, 4, 7, dtype=torch.float64, device=device, requires_grad=True)
weight = torch.rand(7, dtype=torch.float64, device=device, requires_grad=True)
assert torch.autograd.gradcheck(rms_norm, (x, weight))

x, weight = torch.randn(20, 300, device=device), torch.rand(300, device=device)
torch.testing.assert_close(rms_norm(x, weight), F.rms_norm(x, (300,), weight, 1e-5))
print(rms_norm, "gradcheck in float64: passed; like torch.nn.functional.rms_norm")

# %% [markdown]
# ## Shared memory: softmax
#
# The largest value of a row, and the sum of the exponentials, are each found by a tree in shared memory. Half of the
# threads combine two values each, then a quarter, and so on, with a barrier after each step. The backward needs only
# the result.

# %%
softmax = operator(
    """
#include "common.cuh"

struct Max { __device__ acc_t operator()(acc_t a, acc_t b) const { return max(a, b); } };
struct Sum { __device__ acc_t operator()(acc_t a, acc_t b) const { return a + b; } };

template <class Combine> __device__ acc_t over_block(acc_t v, acc_t* shared, Combine combine) {
    shared[threadIdx.x] = v;
    __syncthreads();
    for (int half = BLOCK / 2; half > 0; half /= 2) {
        if (threadIdx.x < half) shared[threadIdx.x] = combine(shared[threadIdx.x], shared[threadIdx.x + half]);
        __syncthreads();
    }
    acc_t result = shared[0];
    __syncthreads();  // before someone writes to it again
    return result;
}

extern "C" __global__ void softmax(const scalar_t* x, scalar_t* y, i64 columns) {
    __shared__ acc_t shared[BLOCK];
    const scalar_t* row = x + blockIdx.x * columns;
    acc_t largest = to_acc(row[0]), sum = 0;
    for (i64 j = threadIdx.x; j < columns; j += BLOCK) largest = max(largest, to_acc(row[j]));
    largest = over_block(largest, shared, Max());
    for (i64 j = threadIdx.x; j < columns; j += BLOCK) sum += exp(to_acc(row[j]) - largest);
    sum = over_block(sum, shared, Sum());
    for (i64 j = threadIdx.x; j < columns; j += BLOCK)
        y[blockIdx.x * columns + j] = from_acc<scalar_t>(exp(to_acc(row[j]) - largest) / sum);
}

// dx = y (dy - sum(dy y))
extern "C" __global__ void softmax_backward(const scalar_t* dy, const scalar_t* y, scalar_t* dx, i64 columns) {
    __shared__ acc_t shared[BLOCK];
    i64 first = blockIdx.x * columns;
    acc_t dot = 0;
    for (i64 j = threadIdx.x; j < columns; j += BLOCK) dot += to_acc(dy[first + j]) * to_acc(y[first + j]);
    dot = over_block(dot, shared, Sum());
    for (i64 j = threadIdx.x; j < columns; j += BLOCK)
        dx[first + j] = from_acc<scalar_t>(to_acc(y[first + j]) * (to_acc(dy[first + j]) - dot));
}
""",
    "softmax",
    "softmax_backward",
    sizes={"columns": lambda x: x.shape[-1]},
    grid=lambda x: x.shape[:-1].numel(),
    block=BLOCK,
    defines={"BLOCK": BLOCK},
)

x = torch.randn(3, 9, dtype=torch.float64, device=device, requires_grad=True)
assert torch.autograd.gradcheck(softmax, x)
x = torch.randn(20, 1000, device=device)
torch.testing.assert_close(softmax(x), F.softmax(x, -1))
print(softmax, "gradcheck in float64: passed; like torch.nn.functional.softmax")

# %% [markdown]
# ## Several kernels, in order
#
# In a mean over few rows most of a GPU is idle if one block takes one row. So here many blocks take a row. Each writes
# the sum of its part into a `workspace`, which is memory for this call alone. A second kernel sums the parts.

# %%
mean = operator(
    """
#include "common.cuh"

extern "C" __global__ void part_sums(const scalar_t* x, acc_t* parts, i64 columns) {
    __shared__ acc_t scratch[32];
    acc_t sum = 0;
    for (i64 j = (i64)blockIdx.x * blockDim.x + threadIdx.x; j < columns; j += (i64)gridDim.x * blockDim.x)
        sum += to_acc(x[blockIdx.y * columns + j]);
    sum = block_sum(sum, scratch);
    if (threadIdx.x == 0) parts[blockIdx.y * gridDim.x + blockIdx.x] = sum;
}

extern "C" __global__ void mean(const acc_t* parts, scalar_t* y, i64 columns, i64 size) {
    i64 i = (i64)blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= size) return;
    acc_t sum = 0;
    for (int part = 0; part < PARTS; part++) sum += parts[i * PARTS + part];
    y[i] = from_acc<scalar_t>(sum / columns);
}
""",
    ("part_sums", "mean"),
    output=lambda x: x.shape[:1],
    sizes={"columns": lambda x: x.shape[1]},
    workspace={"parts": lambda x: (x.shape[0], 16)},
    grid={"part_sums": lambda x: (16, x.shape[0])},
    defines={"PARTS": 16},
)

x = torch.randn(3, 10000, device=device)
torch.testing.assert_close(mean(x), x.mean(1))
print(mean, "like torch.mean")

# %% [markdown]
# ## In place
#
# `INOUT` says that a kernel changes an argument. Autograd knows about it. It refuses a leaf that requires grad, and a
# backward that needs what was there before. In the backward, `INOUT dx` is first the gradient of the result. The kernel
# turns it into that of the argument.

# %%
clamp_ = operator(
    """
#include "common.cuh"

extern "C" __global__ void clamp_(INOUT scalar_t* x, acc_t low, acc_t high, bool* inside, i64 size) {
    i64 i = (i64)blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= size) return;
    acc_t v = to_acc(x[i]);
    inside[i] = v >= low && v <= high;
    if (!inside[i]) x[i] = from_acc<scalar_t>(v < low ? low : high);
}

extern "C" __global__ void clamp_backward(INOUT scalar_t* dx, const bool* inside, i64 size) {
    i64 i = (i64)blockIdx.x * blockDim.x + threadIdx.x;
    if (i < size && !inside[i]) dx[i] = from_acc<scalar_t>((acc_t)0);
}
""",
    "clamp_",
    "clamp_backward",
    saved="inside",
    defaults={"low": -1.0, "high": 1.0},
)

x = torch.randn(1000, device=device)
expected = x.clamp(-1, 1)
assert clamp_(x) is x
assert torch.equal(x, expected)
print(clamp_)

# %% [markdown]
# ## What it is compiled to
#
# With an architecture given, `attributes`, `ptx` and `sass` need no GPU.

# %%
softmax.attributes("sm_80")

# %%
print(softmax.ptx(arch="sm_80").count("bar.sync"), "barriers, with the loops over BLOCK unrolled")

# %% [markdown]
# ## In a network
#
# Such an operator is like any other, in a module or in a training step:


# %%
class Block(torch.nn.Module):
    def __init__(self, width):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(width))
        self.linear = torch.nn.Linear(width, width)

    def forward(self, x):
        return x + silu(self.linear(rms_norm(x, self.weight)))


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
# Under `torch.compile` and `torch.export` an operator is one node of the graph:

# %%
compiled = torch.compile(block, backend="aot_eager", fullgraph=True)
torch.testing.assert_close(compiled(x), block(x))
print("compiled without a graph break")

# %% [markdown]
# ## Mistakes
#
# A text is compiled at the first call, and an error names its line. Mistakes that show without compiling are reported
# when the operator is made.

# %%
try:
    operator('extern "C" __global__ void cube(const float* x, float* y, i64 n) {}', "cube", "cube_backward")
except ValueError as error:
    print(error)

try:
    rms_norm(torch.ones(3, 8, device=device), torch.ones(5, device=device))
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
