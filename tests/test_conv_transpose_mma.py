"""The tensor-core convolution, forward and dgrad, in both numeric classes; all shapes here are ones it takes."""

import itertools

import numpy as np
import pytest
import tolerance
import torch
import torch.nn.functional as F
from strided import IN_EVERY_LAYOUT
from test_conv_wgrad_mma import packed_of

from cupy_kernels import conv_transpose_mma
from cupy_kernels.conv_transpose import Geometry
from modelnew import numerics
from modelnew.calls import run
from modelnew.functional import conv_transpose2d
from modelnew.interop import NUMPY
from modelnew.numerics import tensor_core_plan

# (input shape, Cout, kernel, padding)
CASES = {
    "one_unit": ((1, 16, 6, 7), 16, (3, 3), (1, 1)),
    "two_images": ((2, 32, 9, 8), 16, (5, 5), (1, 1)),
    "no_padding": ((1, 16, 5, 4), 48, (2, 3), (0, 0)),
    "over_padding": ((1, 16, 9, 8), 16, (2, 3), (3, 4)),
    "point": ((3, 16, 4, 4), 16, (1, 1), (0, 0)),
    "seven": ((1, 16, 3, 5), 16, (7, 7), (3, 3)),
    "partial_chunk": ((1, 80, 5, 6), 144, (3, 2), (2, 0)),
    "many_units": ((1, 16, 20, 19), 144, (3, 3), (0, 1)),
    "two_rows": ((8, 16, 33, 4), 16, (3, 3), (1, 1)),  # of windows a block of wgmma
}
MANY_PASSES = {
    "one_tile_of_channels": ((2, 16, 24, 25), 16, (2, 2), (0, 1)),  # 156 windows: a pass of 128, then one of 28
    "two_tiles_of_channels": ((1, 32, 17, 20), 144, (3, 3), (1, 1)),  # 90 windows: 64, then 26
    "rows_outside_x": ((1, 32, 17, 20), 80, (5, 3), (0, 1)),  # for the first and the last row of windows
}
IN_EVERY_CLASS = pytest.mark.parametrize(
    ("cls", "wgmma"), list(itertools.product(("tf32", "fp32"), (False, True))), indirect=["wgmma"]
)


def tensors(case, device, dtype=torch.float32):
    shape, out, kernel, _ = case
    x = torch.randn(shape, device=device)
    w = torch.randn((shape[1], out, *kernel), device=device) / 8
    b = torch.randn(out, device=device)
    return [t.to(dtype).requires_grad_() for t in (x, w, b)]


def torch_dgrad(x, w, dy, padding):
    x = x.detach().requires_grad_()
    return torch.autograd.grad(F.conv_transpose2d(x, w, padding=padding), x, dy)[0]


def check(actual, cls, function, terms, *tensors, at=...):
    """Our result in a class, or what is `at` a place of it, beside torch's `function` of the same tensors."""
    truth = function(*(t.detach().double() for t in tensors))
    theirs = tolerance.torch_result(function, cls, *(t.detach() for t in tensors))
    tolerance.check(actual[at], truth[at], theirs[at], f"{cls}, {actual.dtype}", terms)


def check_forward(y, cls, padding, *tensors, at=...):
    """tensors: x, w and perhaps a bias."""
    terms = tensors[1][:, 0].numel()
    check(y.detach(), cls, lambda *t: F.conv_transpose2d(*t, padding=padding), terms, *tensors, at=at)


def check_dgrad(dx, cls, padding, x, w, dy):
    check(dx, cls, lambda *t: torch_dgrad(*t, padding), w[0].numel(), x, w, dy)


def check_both(cls, case, leaves, launched, wgmma):
    """Output and gradient of x, and the kernels that they are from."""
    x, w, b = (leaves[0], *(t.detach() for t in leaves[1:]))
    y = conv_transpose2d(x, w, b, padding=case[3], numerics=cls)
    dy = torch.randn_like(y)
    (dx,) = torch.autograd.grad(y, x, dy)
    assert [k.name for k in launched] == ["pack_weight_fp16", "conv_transpose_mma"] * 2
    assert uses_wgmma(launched) == wgmma
    check_forward(y, cls, case[3], x, w, b)
    check_dgrad(dx, cls, case[3], x, w, dy)


def uses_wgmma(launched):
    """Of the convolutions launched, whether by wgmma; fails if some are and some are not."""
    (used,) = {dict(k.defines)["WGMMA"] for k in launched if k.name == "conv_transpose_mma"}
    return bool(used)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_tf32_class(device, case, wgmma, launched):
    check_both("tf32", case, tensors(case, device), launched, wgmma)


@pytest.mark.parametrize(
    ("case", "dtype"),
    [("over_padding", torch.float32), ("partial_chunk", torch.float32), ("many_units", torch.bfloat16)],
)
def test_dgrad_of_packed(device, case, dtype, wgmma, launched):
    x, w, _ = tensors(CASES[case], device, dtype)
    padding = CASES[case][3]
    dy = torch.randn_like(F.conv_transpose2d(x, w, padding=padding)).detach()
    choice = numerics.choose("tf32", x.device)
    geometry = Geometry((1, 1), padding, (0, 0), (1, 1), 1)
    plan, _ = tensor_core_plan(dy.shape, NUMPY[x.dtype], w.shape, geometry, choice, dgrad=True, packed=True)
    dx = dgrad_of_packed(plan, 1, x, w, dy)
    assert uses_wgmma(launched) == wgmma
    check_dgrad(dx, "tf32" if dtype == torch.float32 else "bf16", padding, x, w, dy)


def dgrad_of_packed(plan, split, x, w, dy):
    dy_packed, exponents, _ = packed_of(dy, split)
    dx, packed = torch.empty_like(x), w.new_empty(plan.packed_size, dtype=torch.float16)
    workspaces = packed, w.new_empty(plan.rows, dtype=torch.int32)
    run(conv_transpose_mma.conv_transpose_mma, plan, dy_packed, w, None, dx, *workspaces, exponents)
    return dx


@pytest.mark.parametrize("wgmma", [True], indirect=True)
@pytest.mark.parametrize(("channels", "split"), [(160, 1), (80, 2), (128, 2)], ids=str)
def test_packed_rows_that_come_chunk_by_chunk(device, channels, split, wgmma, many_passes):
    """One block takes all units, one after another, and each chunk but two comes in the place of another one."""
    x, w, _ = tensors(((2, 16, 13, 11), channels, (3, 4), (1, 2)), device)
    dy = torch.randn_like(F.conv_transpose2d(x, w, padding=(1, 2))).detach()
    options = w.shape, Geometry((1, 1), (1, 2), (0, 0), (1, 1), 1), split, True, "float"
    plans = (
        conv_transpose_mma.plan(dy.shape, *options, kilobytes * 1024, True, multiprocessors=1, packed=True)
        for kilobytes in range(227, 0, -1)
    )
    plan = next(p for p in plans if dict(p.macros).get("CHUNKS_HELD") == 2)
    dx = dgrad_of_packed(plan, split, x, w, dy)
    check_dgrad(dx, "tf32" if split == 1 else "fp32", (1, 2), x, w, dy)


@pytest.mark.parametrize(
    ("case", "wgmma"),
    [
        *((case, False) for case in CASES),
        *((case, True) for case in ("over_padding", "seven", "partial_chunk", "many_units")),
    ],
    indirect=["wgmma"],
)
def test_fp32_class(device, case, wgmma, launched):
    check_both("fp32", CASES[case], tensors(CASES[case], device), launched, wgmma)


@pytest.mark.parametrize("case", MANY_PASSES.values(), ids=MANY_PASSES)
@IN_EVERY_CLASS
def test_units_of_several_passes(device, case, cls, wgmma, many_passes, launched):
    x, w, b = (t.detach() for t in tensors(case, device))
    y = conv_transpose2d(x, w, b, padding=case[3], numerics=cls)
    macros = [dict(k.defines) for k in launched if k.name == "conv_transpose_mma"]
    if wgmma:
        assert all(m["UNIT_ROWS"] * m["WINDOW_PITCH"] > 4 * m["TILES"] * m["WARPS_N"] for m in macros)
        assert all(m["LAST_TILES"] != m["TILES"] for m in macros)
    else:
        assert all(m["UNIT_PASSES"] > 1 for m in macros)
    check_forward(y, cls, case[3], x, w, b)


@IN_EVERY_LAYOUT
def test_layouts(device, make):
    x, w, b = (t.detach() for t in tensors(((2, 16, 4, 8), 16, (3, 3), (1, 1)), device))
    x, w = make(x).requires_grad_(), make(w)
    y, expected = (
        f(x, w, b, padding=1) for f in (lambda *t, **o: conv_transpose2d(*t, numerics="fp32", **o), F.conv_transpose2d)
    )
    torch.testing.assert_close(y, expected)
    dy = make(torch.randn_like(y))
    torch.testing.assert_close(*(torch.autograd.grad(z, x, dy)[0] for z in (y, expected)))


def test_unaligned_arrays_are_refused():
    p = conv_transpose_mma.plan(
        (1, 16, 4, 4), (16, 16, 3, 3), Geometry((1, 1), (1, 1), (0, 0), (1, 1), 1), 1, False, "float", 10**6
    )
    x = np.zeros(257, np.float32)[1:].reshape(1, 16, 4, 4)
    workspaces = np.empty(p.packed_size, np.float16), np.empty(p.rows, np.int32)
    with pytest.raises(ValueError, match="multiple of 16 bytes"):
        conv_transpose_mma.conv_transpose_mma(
            p, x, np.zeros((16, 16, 3, 3), np.float32), None, np.empty_like(x), *workspaces
        )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_16_bit_types_are_exact_in_fp16_operands(device, dtype, wgmma):
    leaves = tensors(CASES["two_images"], device, dtype)
    check_forward(conv_transpose2d(*leaves, padding=1), "exact", 1, *leaves)


@IN_EVERY_CLASS
@pytest.mark.parametrize(
    ("x_scale", "w_scale"),
    [(1e-20, 1.0), (1e20, 1e-3), (1e-30, 1e25), (1e-35, 1e-3), (1.0, 1e-20), (1e30, 1e-35)],
    ids=str,
)
def test_scales_far_from_fp16(device, cls, wgmma, x_scale, w_scale):
    x, w, _ = (t.detach() for t in tensors(CASES["one_unit"], device))
    x, w = x * x_scale, w * w_scale
    check_forward(conv_transpose2d(x, w, padding=1, numerics=cls), cls, 1, x, w)


@IN_EVERY_CLASS
def test_outliers_do_not_flush_the_rest(device, cls, wgmma):
    """One value a million times the rest: pixels that it does not reach are as exact as ever."""
    x, w, _ = (t.detach() for t in tensors(CASES["one_unit"], device))
    x[0, 3, 0, 0] = 1e6
    y = conv_transpose2d(x, w, padding=1, numerics=cls)
    check_forward(y, cls, 1, x, w, at=(..., slice(3, None), slice(3, None)))


@IN_EVERY_CLASS
@pytest.mark.parametrize("special", [float("inf"), -float("inf"), float("nan")])
def test_inf_and_nan_reach_the_pixels_that_they_reach_in_torch(device, cls, wgmma, special):
    x, w, _ = (t.detach() for t in tensors(CASES["one_unit"], device))
    x[0, 3, 2, 4] = special
    ours, theirs = conv_transpose2d(x, w, padding=1, numerics=cls), F.conv_transpose2d(x, w, padding=1)
    assert torch.equal(ours.isnan(), theirs.isnan())
    assert torch.equal(ours.isposinf(), theirs.isposinf())
    assert torch.equal(ours.isneginf(), theirs.isneginf())


def test_zero_weight_and_zero_input(device, wgmma):
    x, w, b = (t.detach() for t in tensors(CASES["one_unit"], device))
    assert torch.equal(conv_transpose2d(x, 0 * w, b, 1, 1, numerics="tf32"), b[:, None, None].expand(1, 16, 6, 7))
    assert torch.equal(conv_transpose2d(0 * x, w, b, 1, 1, numerics="fp32"), b[:, None, None].expand(1, 16, 6, 7))


def test_two_runs_are_bit_equal(device, wgmma):
    x, w, b = (t.detach() for t in tensors(CASES["many_units"], device))
    assert torch.equal(*(conv_transpose2d(x, w, b, numerics="tf32") for _ in range(2)))


def test_little_shared_memory(device, monkeypatch):
    """GPUs with 99 KiB a block load chunks one after the other, or take smaller passes."""
    monkeypatch.setattr(numerics, "_shared_bytes", lambda _: 99 * 1024)
    monkeypatch.setattr(numerics, "_EMULATED_SHARED_BYTES", 99 * 1024)
    for shape, out in (((1, 144, 20, 40), 80), ((1, 16, 32, 60), 80)):
        x, w, b = (t.detach() for t in tensors((shape, out, (3, 3), (1, 1)), device))
        check_forward(conv_transpose2d(x, w, b, padding=1, numerics="tf32"), "tf32", 1, x, w, b)
    geometry = Geometry((1, 1), (1, 1), (0, 0), (1, 1), 1)
    plans = [
        dict(conv_transpose_mma.plan(s, (s[1], 80, 3, 3), geometry, 1, False, "float", 99 * 1024).macros)
        for s in ((1, 144, 20, 40), (1, 16, 32, 60))
    ]
    assert not plans[0]["RESIDENT"]


@pytest.mark.parametrize("wgmma", [True], indirect=True)
def test_units_of_wgmma(device, wgmma, many_passes, monkeypatch, launched):
    """With little shared memory an image is several units, the last of fewer rows."""
    monkeypatch.setattr(numerics, "_shared_bytes", lambda _: 48 * 1024)
    monkeypatch.setattr(numerics, "_EMULATED_SHARED_BYTES", 48 * 1024)
    case = (1, 16, 24, 25), 16, (2, 3), (0, 1)
    x, w, b = (t.detach() for t in tensors(case, device))
    check_forward(conv_transpose2d(x, w, b, padding=case[3], numerics="tf32"), "tf32", case[3], x, w, b)
    assert uses_wgmma(launched)
    assert dict(launched[-1].defines)["UNIT_ROWS"] == 7  # of 13


@pytest.mark.usefixtures("many_passes", "one_multiprocessor")
@pytest.mark.parametrize("wgmma", [True], indirect=True)
@pytest.mark.parametrize("grows", [False, True], ids=["even", "grows"])
@pytest.mark.parametrize(
    ("cls", "kilobytes", "parts"), [("tf32", 227, False), ("tf32", 40, True), ("fp32", 227, False), ("fp32", 80, True)]
)
def test_a_block_takes_unit_after_unit(device, cls, wgmma, grows, kilobytes, parts, monkeypatch, launched):
    """Rows of the next unit come where no later pass reads this one's, under a first guess of their scale.

    grows: the scale that the first rows ask for is wrong, so a unit begins again when those of the next one have come.
    """
    monkeypatch.setattr(numerics, "_shared_bytes", lambda _: kilobytes * 1024)
    monkeypatch.setattr(numerics, "_EMULATED_SHARED_BYTES", kilobytes * 1024)
    x, w, b = (t.detach() for t in tensors(((4, 16, 40, 12), 80, (3, 3), (0, 0)), device))
    x *= torch.tensor([1, 1e4, 1e-3, 1], device=device).view(4, 1, 1, 1)
    if grows:
        x[:, :, 24:] *= 100
    x.requires_grad_()
    y = conv_transpose2d(x, w, b, numerics=cls)
    dy = torch.randn_like(y)
    (dx,) = torch.autograd.grad(y, x, dy)
    assert uses_wgmma(launched)
    units = [dict(k.defines)["UNITS"] for k in launched if k.name == "conv_transpose_mma"]
    assert (units[0] > 1) == parts
    for i in range(4):
        check_forward(y[i : i + 1], cls, (0, 0), x[i : i + 1].detach(), w, b)
    check_dgrad(dx, cls, (0, 0), x, w, dy)


@pytest.mark.parametrize(
    ("images", "rows"), [(1, 1), (7, 1), (8, 2), (14, 2), (15, 3), (95, 3), (96, 17), (512, 17)], ids=str
)
def test_few_images_fill_the_gpu(images, rows):
    """Rows of windows, 17 an image, that a block of wgmma takes."""
    geometry = Geometry((1, 1), (1, 1), (0, 0), (1, 1), 1)
    options = (64, 128, 5, 5), geometry, 1, False, "float", 227 * 1024, True
    assert dict(conv_transpose_mma.plan((images, 64, 32, 32), *options).macros)["UNIT_ROWS"] == rows


@pytest.mark.parametrize(
    ("images", "split", "dgrad", "packed", "expected"),
    [
        (63, 2, True, False, 1),
        (64, 2, True, False, 0),
        (512, 2, True, False, 0),
        (64, 2, True, True, 1),
        (512, 2, True, True, 1),
        (512, 1, True, False, 1),
        (512, 2, False, False, 1),
    ],
    ids=str,
)
def test_float32_dgrad_of_many_images_that_are_not_packed_is_by_mma(images, split, dgrad, packed, expected):
    geometry = Geometry((1, 1), (1, 1), (0, 0), (1, 1), 1)
    shape = (images, 128, 34, 34) if dgrad else (images, 64, 32, 32)
    options = (64, 128, 5, 5), geometry, split, dgrad, "float", 227 * 1024, True
    assert dict(conv_transpose_mma.plan(shape, *options, packed=packed).macros)["WGMMA"] == expected


@pytest.mark.parametrize("wgmma", [True], indirect=True)
def test_dgrad_of_an_image_wider_than_a_block(device, wgmma, launched):
    """Padding cuts y to a size that is taken; a row of dx is 75 windows, more than blocks of few images have."""
    x, w, _ = tensors(((1, 16, 4, 150), 16, (3, 3), None), device)
    y = conv_transpose2d(x, w, padding=(1, 41), numerics="tf32")
    dy = torch.randn_like(y)
    launched.clear()
    dx = torch.autograd.grad(y, x, dy)[0]
    assert uses_wgmma(launched)
    assert [dict(k.defines)["UNIT_ROWS"] for k in launched if k.name == "conv_transpose_mma"] == [1]
    check_dgrad(dx, "tf32", (1, 41), x, w, dy)


def test_wgmma_leaves_what_does_not_fit_to_mma():
    geometry = Geometry((1, 1), (3, 3), (0, 0), (1, 1), 1)
    options = geometry, 1, False, "float", 227 * 1024, True
    assert dict(conv_transpose_mma.plan((1, 64, 70, 70), (64, 512, 7, 7), *options).macros)["WGMMA"] == 1
    assert dict(conv_transpose_mma.plan((1, 512, 70, 70), (512, 512, 7, 7), *options).macros)["WGMMA"] == 0


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"stride": 2}, "stride"),
        ({"dilation": 2}, "dilation"),
        ({"groups": 2}, "groups"),
        ({"x": (1, 24, 6, 6)}, "multiples of 16"),
        ({"x": (1, 16, 71, 6)}, "image size"),
        ({"x": (0, 16, 6, 6)}, "empty"),
        ({"kernel": 8}, "kernel size"),
        ({"dtype": torch.float64}, "dtype"),
    ],
)
def test_what_is_not_taken(change, reason):
    shape = change.get("x", (1, 16, 6, 6))
    x = torch.zeros(shape, dtype=change.get("dtype", torch.float32))
    kernel = change.get("kernel", 3)
    pairs = [
        (change.get(name, default),) * 2
        for name, default in (("stride", 1), ("padding", 1), ("out", 0), ("dilation", 1))
    ]
    geometry = Geometry(*pairs, change.get("groups", 1))
    shapes = shape, NUMPY[x.dtype], (shape[1], 16, kernel, kernel)
    plan, why = numerics.tensor_core_plan(*shapes, geometry, numerics.choose("tf32", x.device))
    assert plan is None
    assert reason in why


def test_unknown_numerics():
    with pytest.raises(ValueError, match="numerics must be one of auto, tf32, fp32, received 'fp8'"):
        conv_transpose2d(torch.zeros(1, 16, 4, 4), torch.zeros(16, 16, 3, 3), numerics="fp8")
