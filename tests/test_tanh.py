import numpy as np
import pytest
import torch
from strided import LAYOUTS
from tolerance import check, check_gradients

from cupy_kernels import source
from cupy_kernels.launch import launch
from cupy_kernels.source import Kernel
from modelnew.calls import run
from modelnew.functional import tanh

DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]
LAYERS = [({}, (2, 3, 4))]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(), (1,), (7, 1, 3), (2, 3, 17, 5), (0, 4)], ids=str)
def test_forward_and_gradient(device, dtype, shape):
    scale = 1 if dtype == torch.float64 else 3  # from 3 on, 1 - y * y is what the truth's own tanh rounds to
    x = (scale * torch.randn(shape, device=device)).to(dtype).requires_grad_()
    check_gradients(tanh, torch.tanh, [x])


def test_special_values(device):
    tiny = torch.finfo(torch.float32).tiny
    x = torch.tensor(
        [0.0, -0.0, float("inf"), -float("inf"), float("nan"), tiny / 4, -tiny / 8, 1e-20, 30.0], device=device
    )
    check(tanh(x), torch.tanh(x.double()), torch.tanh(x))
    assert torch.equal(torch.signbit(tanh(x)), torch.signbit(x))


@pytest.mark.parametrize(
    "make",
    [
        *LAYOUTS.values(),
        lambda x: x[..., None].expand(3, 4, 6, 5, 2),
        lambda x: x[:, :1, :1, :1].to(memory_format=torch.channels_last),
    ],
    ids=[*LAYOUTS, "expanded", "single"],
)
def test_layouts(device, make):
    x = make(torch.randn(3, 4, 6, 5, device=device))
    y = tanh(x.requires_grad_())
    assert torch.equal(y, tanh(x.detach().contiguous()))
    expected = torch.tanh(x)
    assert y.stride() == expected.stride()
    for dy in (torch.ones_like(y), torch.ones(y.shape[::-1], device=device).permute(*range(y.dim())[::-1])):
        (dx,) = torch.autograd.grad(y, x, dy, retain_graph=True)
        torch.testing.assert_close(dx, 1 - expected**2)
    ours, theirs = (torch.autograd.grad(t, x, torch.ones_like(t))[0] for t in (y, expected))
    assert ours.stride() == theirs.stride()


def test_gradcheck(device):
    assert torch.autograd.gradcheck(tanh, torch.randn(3, 5, dtype=torch.float64, device=device, requires_grad=True))


def test_integer_input_is_refused(device):
    with pytest.raises(TypeError, match=r"float32.*received torch.int64"):
        tanh(torch.arange(3, device=device))


TANH = """#include "tanh_branchless.cuh"
extern "C" __global__ void tanhs(const float* x, float* y, int n) {
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i < n) y[i] = tanh_branchless(x[i]);
}"""


def test_tanh_is_within_two_units_in_the_last_place(device):
    """All exponents of normal floats, 0, infinity and NaN; CUDA's own tanhf is as far off."""
    mantissas = np.linspace(0, 2**23 - 1, 200, dtype=np.uint32)
    bits = (np.arange(1, 255, dtype=np.uint32)[:, None] << 23 | mantissas).ravel()
    dense = np.linspace(np.float32(0.01), np.float32(10), 50000, dtype=np.float32)
    x = np.concatenate([bits.view(np.float32), dense, np.float32([0, np.inf])])
    x = torch.from_numpy(np.concatenate([x, -x, np.float32([np.nan])])).to(device)
    y = torch.empty_like(x)
    with source.override({"tanhs.cu": TANH}):
        run(
            lambda *a: launch(Kernel("tanhs.cu", "tanhs"), (-(-x.numel() // 256), 1, 1), (256, 1, 1), a),
            x,
            y,
            x.numel(),
        )
    assert y[-1].isnan()
    x, y = x[:-1].double().cpu(), y[:-1].cpu()
    truth = x.tanh()
    unit = torch.from_numpy(np.spacing(np.abs(truth.float().numpy()))).double()
    assert ((y.double() - truth).abs() / unit).max() <= 2
