"""Transposed convolutions to few output channels, in float32."""

import itertools
import random

import numpy as np
import pytest
import torch
from test_gather_gemm import FORMATS, IN_EVERY_FORMAT, check, names, tensors

from cupy_kernels import thin
from cupy_kernels.conv_transpose import Geometry
from modelnew import explain, layers
from modelnew.functional import conv_transpose2d

# (input shape, Cout, kernel, stride, padding, output_padding, groups, dilation)
CASES = {
    "pix2pix": ((2, 9, 7, 9), 3, (4, 4), (2, 2), (1, 1), (0, 0), 1, (1, 1)),
    "stride_1": ((1, 33, 9, 70), 3, (3, 3), (1, 1), (1, 1), (0, 0), 1, (1, 1)),
    "super_resolution": ((1, 5, 6, 35), 1, (9, 9), (4, 4), (4, 4), (3, 3), 1, (1, 1)),
    "unequal": ((2, 70, 4, 5), 2, (2, 3), (1, 2), (0, 1), (0, 0), 1, (1, 1)),
    "stride_3": ((1, 4, 5, 6), 1, (5, 4), (3, 3), (2, 0), (1, 2), 1, (1, 1)),
    "phases_without_taps": ((2, 3, 4, 5), 4, (1, 2), (2, 2), (0, 0), (1, 1), 1, (1, 1)),
    "one_pixel": ((1, 40, 1, 1), 4, (4, 4), (1, 1), (0, 0), (0, 0), 1, (1, 1)),
}


@pytest.fixture(autouse=True)
def small(monkeypatch, fresh_plans):
    """The kernels take small images, too."""
    monkeypatch.setattr(thin, "_FEWEST_PIXELS", 0)


def random_case(seed):
    draw = random.Random(seed)
    while True:
        out, kernel, stride = draw.randint(1, 4), [draw.randint(1, 7) for _ in "hw"], [draw.randint(1, 4) for _ in "hw"]
        padding = [draw.randrange(k) for k in kernel]
        shape = (draw.randint(1, 2), draw.randint(1, 70), draw.randint(2, 7), draw.randint(2, 40))
        geometry = [tuple(stride), tuple(padding), tuple(draw.randrange(s) for s in stride)]
        positive = all((n - 1) * s - 2 * p + k > 0 for n, s, p, k in zip(shape[2:], stride, padding, kernel))
        case = (shape, out, tuple(kernel), *geometry, 1, (1, 1))
        if positive and thin.takes(shape, (shape[1], out, *kernel), Geometry(*geometry, (1, 1), 1), np.float32):
            return case


@pytest.mark.parametrize("cls", ["fp32", "tf32"])
@IN_EVERY_FORMAT
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_parity(device, case, memory_format, cls, launched):
    check(case, cls, *tensors(case, device, torch.float32, memory_format))
    kernels = {"thin_forward", "thin_dgrad", "thin_wgrad", "thin_wgrad_reduce"}
    assert names(launched) == kernels | {"channel_sum_partials", "channel_sum_combine"}


@IN_EVERY_FORMAT
@pytest.mark.parametrize("seed", range(4))
def test_random_shapes(device, seed, memory_format):
    case = random_case(seed)
    check(case, "fp32", *tensors(case, device, torch.float32, memory_format))


def test_formats_of_x_w_and_dy_differ(device, launched):
    case = CASES["pix2pix"]
    for formats in itertools.product(FORMATS, repeat=3):
        x, w, b, dy = tensors(case, device, torch.float32)
        x, w, dy = (t.to(memory_format=f) for t, f in zip((x, w, dy), formats))
        y, dx, dw, _ = check(case, "fp32", x, w, b, dy)
        for t, memory_format in ((y, formats[0]), (dx, formats[0]), (dw, formats[1])):
            assert t.is_contiguous(memory_format=memory_format)
    assert not any("gather" in name for name in names(launched))


def test_two_runs_are_equal(device):
    tensors_of_case = tensors(CASES["stride_1"], device, torch.float32)
    one, two = (check(CASES["stride_1"], "fp32", *tensors_of_case) for _ in range(2))
    assert all(map(torch.equal, one, two))


def test_what_they_leave_to_others(device, launched):
    """Other dtypes, dilations and many channels."""
    case = CASES["pix2pix"]
    x, w, b, _ = tensors(case, device, torch.float32)
    conv_transpose2d(x.half(), w.half(), b.half(), 2, 1)
    conv_transpose2d(x, w, b, 2, 1, dilation=2)
    conv_transpose2d(x, w.repeat(1, 2, 1, 1), b.repeat(2), 2, 1)
    assert launched
    assert not any("thin" in name for name in names(launched))


def test_explain_names_them(device):
    layer = layers.ConvTranspose2d(9, 3, 4, 2, 1, device=device)
    text = str(explain(layer, torch.randn(1, 9, 8, 8, device=device)))
    assert "thin kernels" in text
