"""half_t and bf16_t of common.cuh against NumPy and torch."""

import numpy as np
import torch

from cupy_kernels import source
from cupy_kernels.launch import launch
from cupy_kernels.source import Kernel
from modelnew.calls import run

CONVERT = """#include "common.cuh"
extern "C" __global__ void convert(const from_t* x, to_t* y, int size) {
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i < size) y[i] = CONVERSION(x[i]);
}"""


def convert(x, kind, result_dtype):
    """`x` as `result_dtype`, by to_acc (kind "to_acc") or from_acc."""
    names = {torch.float32: "float", torch.float16: "half_t", torch.bfloat16: "bf16_t"}
    to = names[result_dtype]
    conversion = kind if kind == "to_acc" else f"from_acc<{to}>"
    kernel = Kernel("convert.cu", "convert", (("from_t", names[x.dtype]), ("to_t", to), ("CONVERSION", conversion)))
    y = torch.empty(x.shape, dtype=result_dtype, device=x.device)
    grid = ((x.numel() + 255) // 256, 1, 1)
    with source.override({"convert.cu": CONVERT}):
        run(lambda a, b: launch(kernel, grid, (256, 1, 1), (a, b, a.size)), x, y)
    return y


def all_16_bit_values(dtype, device):
    return torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype).to(device)


def floats(device):
    """float32 values around everything that rounding can get wrong in float16 and bfloat16."""
    steps = torch.arange(-3, 4)
    exponents = 2.0 ** torch.arange(-149, 128, dtype=torch.float64)
    near_powers = (exponents.float().view(torch.int32)[:, None] + steps).flatten().clamp(min=0).view(torch.float32)
    halves = all_16_bit_values(torch.float16, "cpu").float()
    halves = halves[halves.isfinite()].sort().values
    half_ties = (halves[1:] + halves[:-1]) / 2  # exact in float32
    brains = all_16_bit_values(torch.bfloat16, "cpu").float()
    brains = brains[brains.isfinite()]
    brain_ties = (brains.view(torch.int32) + 0x8000).view(torch.float32)
    ties = torch.cat([half_ties, brain_ties])
    around_ties = (ties.view(torch.int32)[:, None] + steps).flatten().view(torch.float32)
    special = torch.tensor([0.0, 65504.0, 65519.99, 65520.0, 3.3895e38, 3.4e38, float("inf"), float("nan")])
    return torch.cat([near_powers, -near_powers, around_ties, special, -special, 100 * torch.randn(4096)]).to(device)


def check_same(actual, expected):
    """Equal bits; of a NaN neither sign nor payload counts."""
    actual, bits = actual.cpu().numpy(), f"i{expected.itemsize}"
    number = ~np.isnan(expected)
    assert np.array_equal(~np.isnan(actual), number)
    assert np.array_equal(actual[number].view(bits), expected[number].view(bits))


def test_every_half_value(device):
    x = all_16_bit_values(torch.float16, device)
    check_same(convert(x, "to_acc", torch.float32), x.cpu().numpy().astype(np.float32))


def test_every_bfloat16_value(device):
    x = all_16_bit_values(torch.bfloat16, device)
    expected = (x.view(torch.int16).cpu().numpy().astype(np.int32) << 16).view(np.float32)
    check_same(convert(x, "to_acc", torch.float32), expected)


def test_float_to_half(device):
    x = floats(device)
    with np.errstate(over="ignore"):
        expected = x.cpu().numpy().astype(np.float16)
    check_same(convert(x, "from_acc", torch.float16), expected)


def test_float_to_bfloat16(device):
    x = floats(device)
    check_same(convert(x, "from_acc", torch.bfloat16).float(), x.cpu().bfloat16().float().numpy())
