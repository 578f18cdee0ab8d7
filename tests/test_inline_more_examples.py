"""Five more operators as a user would write them: gathers, scans, halos, several kernels and types in one call."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from tolerance import check_gradients

from modelnew.inline import operator

THREAD = "i64 i = (i64)blockIdx.x * blockDim.x + threadIdx.x;"
SLOPE = "cdf(v) + v * exp(-v * v / 2) * (acc_t)0.39894228040143268"

# The bias's gradient is a sum over rows, a thread a column.
BIAS_GELU = f"""#include "common.cuh"
__device__ acc_t cdf(acc_t v) {{ return erfc(-v * (acc_t)0.70710678118654752) / 2; }}
extern "C" __global__ void bias_gelu(const scalar_t* x, const scalar_t* bias, scalar_t* y, i64 columns, i64 size) {{
    {THREAD}
    if (i >= size) return;
    acc_t v = to_acc(x[i]) + to_acc(bias[i % columns]);
    y[i] = from_acc<scalar_t>(v * cdf(v));
}}
extern "C" __global__ void bias_gelu_dx(
    const scalar_t* dy, const scalar_t* x, const scalar_t* bias, scalar_t* dx, i64 columns, i64 size) {{
    {THREAD}
    if (i >= size) return;
    acc_t v = to_acc(x[i]) + to_acc(bias[i % columns]);
    dx[i] = from_acc<scalar_t>(to_acc(dy[i]) * ({SLOPE}));
}}
extern "C" __global__ void bias_gelu_dbias(
    const scalar_t* dy, const scalar_t* x, const scalar_t* bias, scalar_t* dbias, i64 rows, i64 columns) {{
    {THREAD}
    if (i >= columns) return;
    acc_t sum = 0;
    for (i64 row = 0; row < rows; row++) {{
        acc_t v = to_acc(x[row * columns + i]) + to_acc(bias[i]);
        sum += to_acc(dy[row * columns + i]) * ({SLOPE});
    }}
    dbias[i] = from_acc<scalar_t>(sum);
}}"""

# Sums of rows of a table; integers beside floats, and an input of another length.
BAG = """#include "common.cuh"
__device__ i64 end_of(const i64* starts, i64 b, i64 bags, i64 count) { return b + 1 < bags ? starts[b + 1] : count; }
extern "C" __global__ void bag(
    const scalar_t* table, const i64* indices, const i64* starts, scalar_t* y, i64 columns, i64 count, i64 bags) {
    for (i64 j = threadIdx.x; j < columns; j += blockDim.x) {
        acc_t sum = 0;
        for (i64 k = starts[blockIdx.x]; k < end_of(starts, blockIdx.x, bags, count); k++)
            sum += to_acc(table[indices[k] * columns + j]);
        y[blockIdx.x * columns + j] = from_acc<scalar_t>(sum);
    }
}
extern "C" __global__ void bag_dtable(
    const scalar_t* dy, const i64* indices, const i64* starts, scalar_t* dtable, i64 columns, i64 count, i64 bags) {
    for (i64 j = threadIdx.x; j < columns; j += blockDim.x) {
        acc_t sum = 0;
        for (i64 b = 0; b < bags; b++)
            for (i64 k = starts[b]; k < end_of(starts, b, bags, count); k++)
                if (indices[k] == blockIdx.x) sum += to_acc(dy[b * columns + j]);
        dtable[blockIdx.x * columns + j] = from_acc<scalar_t>(sum);
    }
}"""

# Sums of 64 neighbours in shared memory, a scan over these, and each block adds what came before it.
SCAN = f"""#include "common.cuh"
extern "C" __global__ void scan_parts(const scalar_t* x, acc_t* partial, acc_t* totals, i64 columns) {{
    __shared__ acc_t s[64];
    i64 j = (i64)blockIdx.x * 64 + threadIdx.x;
    s[threadIdx.x] = j < columns ? to_acc(x[blockIdx.y * columns + j]) : 0;
    __syncthreads();
    for (int step = 1; step < 64; step *= 2) {{
        acc_t before = threadIdx.x >= step ? s[threadIdx.x - step] : 0;
        __syncthreads();
        s[threadIdx.x] += before;
        __syncthreads();
    }}
    if (j < columns) partial[blockIdx.y * columns + j] = s[threadIdx.x];
    if (threadIdx.x == 63) totals[blockIdx.y * gridDim.x + blockIdx.x] = s[63];
}}
extern "C" __global__ void scan_totals(INOUT acc_t* totals, i64 parts, i64 rows) {{
    {THREAD}
    if (i >= rows) return;
    acc_t sum = 0;
    for (i64 part = i * parts; part < (i + 1) * parts; part++) {{
        acc_t own = totals[part];
        totals[part] = sum;
        sum += own;
    }}
}}
extern "C" __global__ void scan(
    const acc_t* partial, const acc_t* totals, scalar_t* y, i64 columns, i64 parts, i64 size) {{
    {THREAD}
    if (i < size) y[i] = from_acc<scalar_t>(partial[i] + totals[i / columns * parts + i % columns / 64]);
}}"""

# A tile with a border of one in shared memory, in a grid of three dimensions; the gradient is the operator itself.
BLUR = """#include "common.cuh"
extern "C" __global__ void NAME(const scalar_t* IN, scalar_t* OUT, i64 height, i64 width) {
    __shared__ acc_t tile[18][18];
    i64 first = blockIdx.z * height * width, top = blockIdx.y * 16, left = blockIdx.x * 16;
    for (int k = threadIdx.x; k < 18 * 18; k += blockDim.x) {
        i64 r = top + k / 18 - 1, c = left + k % 18 - 1;
        bool inside = r >= 0 && r < height && c >= 0 && c < width;
        tile[k / 18][k % 18] = inside ? to_acc(IN[first + r * width + c]) : 0;
    }
    __syncthreads();
    int r = threadIdx.x / 16, c = threadIdx.x % 16;
    if (top + r >= height || left + c >= width) return;
    acc_t sum = 0;
    for (int k = 0; k < 9; k++) sum += tile[r + k / 3][c + k % 3];
    OUT[first + (top + r) * width + left + c] = from_acc<scalar_t>(sum / 9);
}"""

# Two kernels, and two outputs of different types, of which one has no gradient.
ARGMAX = f"""#include "common.cuh"
extern "C" __global__ void argmax_parts(const scalar_t* x, acc_t* best, i64* where, i64 columns) {{
    if (threadIdx.x) return;
    i64 at = blockIdx.x * 100, last = min(columns, at + 100);
    for (i64 j = at + 1; j < last; j++)
        if (to_acc(x[blockIdx.y * columns + j]) > to_acc(x[blockIdx.y * columns + at])) at = j;
    best[blockIdx.y * gridDim.x + blockIdx.x] = to_acc(x[blockIdx.y * columns + at]);
    where[blockIdx.y * gridDim.x + blockIdx.x] = at;
}}
extern "C" __global__ void argmax(
    const acc_t* best, const i64* where, scalar_t* value, i64* index, i64 parts, i64 size) {{
    {THREAD}
    if (i >= size) return;
    i64 at = i * parts;
    for (i64 part = at + 1; part < (i + 1) * parts; part++)
        if (best[part] > best[at]) at = part;
    value[i] = from_acc<scalar_t>(best[at]);
    index[i] = where[at];
}}"""


def rows(x, *_):
    return x.shape[:-1].numel()


def columns(x, *_):
    return x.shape[-1]


def parts(length):
    return lambda x: -(-x.shape[-1] // length)


def blur(name, given, result, backward=()):
    text = BLUR.replace("NAME", name).replace("IN[", f"{given}[").replace("* IN,", f"* {given},")
    text = text.replace("OUT[", f"{result}[").replace("* OUT,", f"* {result},")
    return operator(
        text,
        name,
        backward,
        sizes={"height": lambda x: x.shape[-2], "width": columns},
        grid=lambda x: (-(-x.shape[-1] // 16), -(-x.shape[-2] // 16), x.shape[:-2].numel()),
    )


bias_gelu = operator(
    BIAS_GELU,
    "bias_gelu",
    ("bias_gelu_dx", "bias_gelu_dbias"),
    shapes={"bias": lambda x, bias: x.shape[-1:]},
    sizes={"rows": rows, "columns": columns},
)
bag = operator(
    BAG,
    "bag",
    "bag_dtable",
    output=lambda table, indices, starts: (starts.numel(), table.shape[1]),
    shapes={"indices": lambda *_: (None,), "starts": lambda *_: (None,)},
    sizes={
        "columns": columns,
        "count": lambda t, indices, s: indices.numel(),
        "bags": lambda t, i, starts: len(starts),
    },
    grid={"bag": lambda t, i, starts: len(starts), "bag_dtable": lambda table, i, s: len(table)},
    block=32,
)
scan = operator(
    SCAN,
    ("scan_parts", "scan_totals", "scan"),
    workspace={"partial": lambda x: x.shape, "totals": lambda x: (len(x), parts(64)(x))},
    sizes={"columns": columns, "parts": parts(64), "rows": rows},
    grid={"scan_parts": lambda x: (parts(64)(x), len(x))},
    block=64,
)
box_blur = blur("box_blur", "x", "y", blur("box_blur_backward", "dy", "dx"))
argmax = operator(
    ARGMAX,
    ("argmax_parts", "argmax"),
    output=lambda x: x.shape[:-1],
    workspace=dict.fromkeys(("best", "where"), lambda x: (len(x), parts(100)(x))),
    sizes={"columns": columns, "parts": parts(100)},
    grid={"argmax_parts": lambda x: (parts(100)(x), len(x))},
    block=32,
)
STARTS = [0, 4, 4, 6]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16], ids=str)
def test_gradients(device, dtype):
    x, bias = torch.randn(3, 5, 70, device=device).to(dtype), torch.randn(70, device=device).to(dtype)
    inputs = [x.requires_grad_(), bias.requires_grad_()]
    check_gradients(bias_gelu, lambda x, bias: F.gelu(x + bias), inputs, terms=(1, 1, 15))
    table = torch.randn(11, 9, device=device).to(dtype).requires_grad_()
    indices, starts = torch.tensor([1, 2, 4, 5, 4, 3, 2, 10], device=device), torch.tensor(STARTS, device=device)
    reference = partial(F.embedding_bag, indices, offsets=starts, mode="sum")
    check_gradients(lambda table: bag(table, indices, starts), reference, [table], terms=(4, 4))
    images = torch.randn(2, 3, 37, 21, device=device).to(dtype).requires_grad_()
    check_gradients(box_blur, lambda x: F.avg_pool2d(x, 3, 1, 1), [images], terms=(9, 9))


@pytest.mark.parametrize("length", [0, 1, 63, 64, 65, 1000])
def test_scan(device, length):
    x = torch.randn(3, length, device=device)
    torch.testing.assert_close(scan(x), x.double().cumsum(1).float())
    x.requires_grad_()
    with pytest.raises(RuntimeError, match="scan has no gradient dx"):
        scan(x).sum().backward()


def test_argmax(device):
    x = torch.randint(50, (7, 950), device=device).float()  # with ties: the first counts
    value, index = argmax(x)
    assert torch.equal(value, x.amax(1))
    assert torch.equal(index, x.argmax(1))
    value, index = argmax(x.requires_grad_())
    assert value.requires_grad
    assert not index.requires_grad


def test_compiled(device):
    x, bias = torch.randn(4, 5, 70, device=device), torch.randn(70, device=device)
    table, images = torch.randn(11, 9, device=device), torch.randn(1, 1, 20, 20, device=device)
    indices, starts = torch.tensor([1, 2, 4, 5, 4, 3, 2, 10], device=device), torch.tensor(STARTS, device=device)
    for function, *inputs in (
        (bias_gelu, x, bias),
        (bag, table, indices, starts),
        (scan, x[0]),
        (box_blur, images),
        (lambda x: torch.stack([result.float() for result in argmax(x)]), x[0]),
    ):
        compiled = torch.compile(function, backend="aot_eager", fullgraph=True)
        assert torch.equal(compiled(*inputs), function(*inputs))


def test_an_index_that_the_table_does_not_have():
    with pytest.raises(RuntimeError, match=r"reads out of bounds: table\[99\], which has 99 elements"):
        bag(torch.randn(11, 9), torch.tensor([11]), torch.tensor([0]))
