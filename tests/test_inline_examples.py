"""Five operators as a user would write them, each beside PyTorch's against float64, with gradients."""

import math

import pytest
import torch
import torch.nn.functional as F
from tolerance import check_gradients

from cupy_kernels import nvrtc
from cupy_kernels.errors import BackendError
from modelnew.inline import operator

DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]
INDEX = "i64 i = (i64)blockIdx.x * blockDim.x + threadIdx.x;\n    if (i >= size) return;"

GELU = f"""#include "common.cuh"
extern "C" __global__ void gelu(const scalar_t* x, scalar_t* y, i64 size) {{
    {INDEX}
    acc_t v = to_acc(x[i]);
    y[i] = from_acc<scalar_t>(v / 2 * erfc(-v * (acc_t)0.70710678118654752));
}}
extern "C" __global__ void gelu_backward(const scalar_t* dy, const scalar_t* x, scalar_t* dx, i64 size) {{
    {INDEX}
    acc_t v = to_acc(x[i]), density = exp(-v * v / 2) * (acc_t)0.39894228040143268;
    dx[i] = from_acc<scalar_t>(to_acc(dy[i]) * (erfc(-v * (acc_t)0.70710678118654752) / 2 + v * density));
}}"""

# A block a row; the weight's gradient in two kernels: sums of CHUNK rows, then the sum of these.
RMS_NORM = """#include "common.cuh"
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
extern "C" __global__ void rms_norm_partial(
    const scalar_t* dy, const scalar_t* x, const acc_t* rstd, acc_t* partial, i64 rows, i64 columns) {
    i64 j = (i64)blockIdx.x * blockDim.x + threadIdx.x;
    if (j >= columns) return;
    acc_t sum = 0;
    for (i64 i = blockIdx.y * CHUNK; i < rows && i < (blockIdx.y + 1) * CHUNK; i++)
        sum += to_acc(dy[i * columns + j]) * to_acc(x[i * columns + j]) * rstd[i];
    partial[blockIdx.y * columns + j] = sum;
}
extern "C" __global__ void rms_norm_dweight(const acc_t* partial, scalar_t* dweight, i64 chunks, i64 columns) {
    i64 j = (i64)blockIdx.x * blockDim.x + threadIdx.x;
    if (j >= columns) return;
    acc_t sum = 0;
    for (i64 i = 0; i < chunks; i++) sum += partial[i * columns + j];
    dweight[j] = from_acc<scalar_t>(sum);
}"""
CHUNK = 16

# Shared memory: a tree over the block for the maximum, another for the sum.
SOFTMAX = """#include "common.cuh"
template <class Combine> __device__ acc_t over_block(acc_t v, acc_t* shared, Combine combine) {
    shared[threadIdx.x] = v;
    __syncthreads();
    for (int half = BLOCK / 2; half > 0; half /= 2) {
        if (threadIdx.x < half) shared[threadIdx.x] = combine(shared[threadIdx.x], shared[threadIdx.x + half]);
        __syncthreads();
    }
    acc_t result = shared[0];
    __syncthreads();
    return result;
}
struct Max { __device__ acc_t operator()(acc_t a, acc_t b) const { return max(a, b); } };
struct Sum { __device__ acc_t operator()(acc_t a, acc_t b) const { return a + b; } };

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
extern "C" __global__ void softmax_backward(const scalar_t* dy, const scalar_t* y, scalar_t* dx, i64 columns) {
    __shared__ acc_t shared[BLOCK];
    i64 first = blockIdx.x * columns;
    acc_t dot = 0;
    for (i64 j = threadIdx.x; j < columns; j += BLOCK) dot += to_acc(dy[first + j]) * to_acc(y[first + j]);
    dot = over_block(dot, shared, Sum());
    for (i64 j = threadIdx.x; j < columns; j += BLOCK)
        dx[first + j] = from_acc<scalar_t>(to_acc(y[first + j]) * (to_acc(dy[first + j]) - dot));
}"""
BLOCK = 64

# The mask says what was inside, for the backward.
CLAMP = f"""#include "common.cuh"
extern "C" __global__ void clamp_(INOUT scalar_t* x, acc_t low, acc_t high, bool* inside, i64 size) {{
    {INDEX}
    acc_t v = to_acc(x[i]);
    inside[i] = v >= low && v <= high;
    if (!inside[i]) x[i] = from_acc<scalar_t>(v < low ? low : high);
}}
extern "C" __global__ void clamp_backward(INOUT scalar_t* dx, const bool* inside, i64 size) {{
    {INDEX}
    if (!inside[i]) dx[i] = from_acc<scalar_t>((acc_t)0);
}}"""

# No input: a mask from a counter, by the finaliser of splitmix64.
MASK = f"""#include "common.cuh"
extern "C" __global__ void random_mask(i64 rows, i64 columns, i64 seed, float keep, bool* mask, i64 size) {{
    {INDEX}
    unsigned long long v = (unsigned long long)seed * 0x9E3779B97F4A7C15ull + (unsigned long long)i;
    v = (v ^ v >> 30) * 0xBF58476D1CE4E5B9ull;
    v = (v ^ v >> 27) * 0x94D049BB133111EBull;
    v ^= v >> 31;
    mask[i] = (float)(v >> 40) / 16777216.0f < keep;
}}"""

DROPOUT = f"""#include "common.cuh"
extern "C" __global__ void masked(const scalar_t* x, const bool* mask, acc_t scale, scalar_t* y, i64 size) {{
    {INDEX}
    y[i] = from_acc<scalar_t>(mask[i] ? to_acc(x[i]) * scale : (acc_t)0);
}}
extern "C" __global__ void masked_backward(const scalar_t* dy, const bool* mask, acc_t scale, scalar_t* dx, i64 size) {{
    {INDEX}
    dx[i] = from_acc<scalar_t>(mask[i] ? to_acc(dy[i]) * scale : (acc_t)0);
}}"""


def rows(x, *_):
    return x.shape[:-1].numel()


def columns(x, *_):
    return x.shape[-1]


def chunks(x, *_):
    return -(-rows(x) // CHUNK)


gelu = operator(GELU, "gelu", "gelu_backward")
rms_norm = operator(
    RMS_NORM,
    "rms_norm",
    ("rms_norm_dx", "rms_norm_partial", "rms_norm_dweight"),
    shapes={"weight": lambda x, weight, eps: x.shape[-1:]},
    output=lambda x, weight, eps: {"y": x.shape, "rstd": x.shape[:-1]},
    sizes={"rows": rows, "columns": columns, "chunks": chunks},
    workspace={"partial": lambda x, weight, eps: (chunks(x), columns(x))},
    defaults={"eps": 1e-5},
    grid={
        "rms_norm": rows,
        "rms_norm_dx": rows,
        "rms_norm_partial": lambda x, weight, eps: (-(-columns(x) // 128), chunks(x)),
    },
    block=128,
    saved="rstd",
    defines={"CHUNK": CHUNK},
)
softmax = operator(
    SOFTMAX, "softmax", "softmax_backward", sizes={"columns": columns}, grid=rows, block=BLOCK, defines={"BLOCK": BLOCK}
)
clamp_ = operator(CLAMP, "clamp_", "clamp_backward", saved="inside", defaults={"low": -1.0, "high": 1.0})
random_mask = operator(MASK, "random_mask", output=lambda rows, columns, seed, keep: (rows, columns))
masked = operator(DROPOUT, "masked", "masked_backward")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gelu(device, dtype):
    x = (3 * torch.randn(5, 77, device=device)).to(dtype).requires_grad_()
    check_gradients(gelu, F.gelu, [x])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rms_norm(device, dtype):
    x, weight = torch.randn(3, 11, 70, device=device), torch.randn(70, device=device)
    inputs = [tensor.to(dtype).requires_grad_() for tensor in (x, weight)]
    check_gradients(rms_norm, lambda x, w: F.rms_norm(x, w.shape, w, 1e-5), inputs, terms=(70, 70, 33))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_softmax(device, dtype):
    x = (5 * torch.randn(7, 150, device=device)).to(dtype).requires_grad_()
    check_gradients(softmax, lambda x: F.softmax(x, -1), [x], terms=(150, 150))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_clamp_in_place(device, dtype):
    x = torch.randn(5, 40, device=device).to(dtype).requires_grad_()
    check_gradients(lambda x: clamp_(x * 2), lambda x: (x * 2).clamp_(-1.0, 1.0), [x])
    check_gradients(
        lambda x: clamp_((x * 1)[1:, ::2], 0.25, high=0.5) * 3, lambda x: x[1:, ::2].clamp(0.25, 0.5) * 3, [x]
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dropout(device, dtype):
    mask = random_mask(40, 50, 7, 0.75, device=device)
    assert mask.dtype == torch.bool
    assert mask.shape == (40, 50)
    kept = mask.double().mean().item()
    assert abs(kept - 0.75) < 5 * math.sqrt(0.75 * 0.25 / mask.numel())
    assert not torch.equal(mask, random_mask(40, 50, 8, 0.75, device=device))
    x = torch.randn(40, 50, device=device).to(dtype).requires_grad_()
    check_gradients(lambda x: masked(x, mask, 1 / 0.75), lambda x: torch.where(mask, x * (1 / 0.75), 0), [x])


@pytest.mark.parametrize("function", [gelu, softmax, rms_norm, clamp_, random_mask, masked], ids=repr)
def test_nvrtc_compiles_it(function):
    try:
        nvrtc.shared_library()
    except BackendError:
        pytest.skip("no NVRTC")
    assert all(row.registers and not row.local_bytes for row in function.attributes("sm_80"))


@pytest.mark.parametrize("function", [gelu, softmax, rms_norm, clamp_], ids=repr)
def test_gradcheck(device, function):
    x = torch.randn(2, 9, dtype=torch.float64, device=device, requires_grad=True)
    weight = torch.randn(9, dtype=torch.float64, device=device, requires_grad=True)
    inputs = (x, weight) if function is rms_norm else (x,)
    assert torch.autograd.gradcheck(lambda x, *more: function(x * 1, *more), inputs)


def test_compiled_whole(device):
    """One graph, forward and backward, with a change in place and with memory of the call alone."""

    def network(x, weight):
        return softmax(clamp_(rms_norm(gelu(x), weight))) * x

    x = torch.randn(4, 33, device=device, requires_grad=True)
    weight = torch.rand(33, device=device, requires_grad=True)
    compiled = torch.compile(network, backend="aot_eager", fullgraph=True)
    results = []
    for function in (network, compiled):
        y = function(x, weight)
        results.append((y, *torch.autograd.grad(y.square().sum(), (x, weight))))
    assert all(map(torch.equal, *results))
