"""The weight gradient on tensor cores and the packed fp16 tiles that it reads; all shapes here are ones it takes."""

import pytest
import tolerance
import torch
import torch.nn.functional as F
from faults import planted
from strided import IN_EVERY_LAYOUT

from cupy_kernels import conv_wgrad_mma, fp16_tiles
from cupy_kernels.conv_transpose import Geometry
from modelnew import numerics
from modelnew.calls import call, run
from modelnew.functional import conv_transpose2d
from modelnew.functional.conv_transpose import conv_gradients
from modelnew.functional.conv_transpose_kernels import gradient_plans
from modelnew.interop import NUMPY
from modelnew.parity import tf32_rounded

KERNELS = ["largest_magnitude", "pack_fp16"] * 2 + ["conv_wgrad_mma", "conv_wgrad_reduce"]

# (input shape, Cout, kernel, padding)
CASES = {
    "three": ((2, 16, 6, 7), 16, (3, 3), (1, 1)),
    "five": ((3, 48, 9, 16), 80, (5, 5), (1, 1)),
    "seven": ((1, 16, 3, 5), 16, (7, 7), (3, 3)),
    "point": ((3, 16, 4, 4), 16, (1, 1), (0, 0)),
    "no_padding": ((1, 32, 5, 4), 48, (2, 3), (0, 0)),
    "over_padding": ((1, 16, 9, 8), 16, (2, 3), (3, 4)),
    "two_groups_of_taps": ((1, 16, 2, 18), 16, (1, 6), (0, 2)),
    "tiles_of_channels": ((1, 80, 5, 9), 144, (2, 4), (1, 0)),
}
CLASSES = pytest.mark.parametrize("cls", ["tf32", "fp32"])


def tensors(case, device, dtype=torch.float32):
    """x, w, dy"""
    shape, out, kernel, padding = case
    size = [n + k - 1 - 2 * p for n, k, p in zip(shape[2:], kernel, padding)]
    shapes = shape, (shape[1], out, *kernel), (shape[0], out, *size)
    return [torch.randn(s, device=device).to(dtype) for s in shapes]


def geometry(padding):
    return Geometry((1, 1), padding, (0, 0), (1, 1), 1)


def gradient(x, w, dy, padding, cls):
    options = (x.shape, w.shape, geometry(padding), numerics.choose(cls, x.device), (False, True, False))
    return conv_gradients(x, None, dy, *options)[1]


def packed_of(tensor, split, exponents=None, centred=False):
    """(packed, exponents, sums)"""
    sums = tensor[:1].sum((0, 2, 3)) if centred else None
    exponents = call(_exponents, tensor) if exponents is None else exponents
    return call(_packed, tensor, exponents, sums, split), exponents, sums


def _exponents(new, tensor):
    exponents = new((fp16_tiles.exponents_size(tensor.shape, tensor.itemsize),), "int32")
    fp16_tiles.largest_magnitude(tensor, exponents)
    return exponents


def _packed(new, tensor, exponents, sums, split):
    packed = new(fp16_tiles.packed_shape(tensor.shape, split), "float16")
    fp16_tiles.pack_fp16(tensor, exponents, sums, packed, split)
    return packed


def wgrad_of_packed(plan, x_packed, w, packed, exponents, alone=None):
    dw, partial = torch.empty_like(w), w.new_empty(plan.partial_size, dtype=torch.float32)
    run(conv_wgrad_mma.conv_wgrad_mma, plan, *x_packed, packed, exponents, alone, partial, dw)
    return dw


def truth(x, w, dy, padding):
    """The definition, in float64: nothing is multiplied by a padding's zero."""
    x, dy, dw = x.double(), dy.double(), torch.empty_like(w, dtype=torch.float64)
    for kh in range(w.shape[2]):
        for kw in range(w.shape[3]):
            parts = [], []
            for n, o, k, p in zip(x.shape[2:], dy.shape[2:], (kh, kw), padding):
                first, end = max(0, p - k), min(n, o + p - k)
                parts[0].append(slice(first, max(first, end)))
                parts[1].append(slice(first - p + k, max(first, end) - p + k))
            operands = x[(..., *parts[0])], dy[(..., *parts[1])]
            dw[:, :, kh, kw] = operands[0].movedim(1, 0).flatten(1) @ operands[1].movedim(1, 0).flatten(1).T
    return dw


def check(dw, x, w, dy, padding, cls):
    """dw beside the definition's of operands as the class has them."""
    theirs = tolerance.torch_result(lambda x, dy: truth(x, w, dy, padding), cls, x, dy)
    tolerance.check(dw, truth(x, w, dy, padding), theirs.to(dw.dtype), cls, x[:, 0].numel())


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_tf32_class(device, wgmma, case, launched):
    x, w, dy = tensors(case, device)
    y = conv_transpose2d(x, w.requires_grad_(), padding=case[3], numerics="tf32")
    launched.clear()
    (dw,) = torch.autograd.grad(y, w, dy)
    assert [k.name for k in launched] == KERNELS
    assert dict(launched[-1].defines)["WGMMA"] == wgmma
    check(dw, x, w, dy, case[3], "tf32")


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_fp32_class(device, wgmma, case, launched):
    x, w, dy = tensors(case, device)
    dw = gradient(x, w, dy, case[3], "fp32")
    assert [k.name for k in launched] == KERNELS
    assert dict(launched[-1].defines)["WGMMA"] == wgmma
    check(dw, x, w, dy, case[3], "fp32")


@pytest.mark.parametrize(("multiprocessors", "blocks"), [(132, 130), (108, 105), (82, 80)])
def test_the_sum_is_split_by_the_gpu_s_size(multiprocessors, blocks):
    """All blocks run at once: on an H100, an A100 and an RTX 3090."""
    found = conv_wgrad_mma.plan(
        (512, 64, 32, 32),
        (64, 128, 5, 5),
        geometry((1, 1)),
        1,
        "float",
        227 * 1024,
        True,
        multiprocessors=multiprocessors,
    )
    assert found.tiles * found.splits == blocks


@CLASSES
@pytest.mark.usefixtures("one_multiprocessor")
def test_long_sums(device, wgmma, cls):
    """Many bands a block, whose sums go to memory between chains."""
    case = ((3, 16, 30, 5), 16, (3, 2), (1, 1))
    x, w, dy = tensors(case, device)
    assert (
        numerics.wgrad_plan(x.shape, NUMPY[x.dtype], w.shape, geometry(case[3]), numerics.choose(cls, x.device))[
            0
        ].splits
        == 1
    )
    with planted("conv_wgrad_mma.cu", ("#define CHAIN (SPLIT", "#define CHAIN (10 + 0 * SPLIT")):
        dw = gradient(x, w, dy, case[3], cls)
    check(dw, x, w, dy, case[3], cls)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_16_bit_types_are_exact_in_fp16_operands(device, wgmma, dtype):
    x, w, dy = tensors(CASES["three"], device, dtype)
    dw = gradient(x, w, dy, (1, 1), "fp32")
    check(dw, x, w, dy, (1, 1), "exact")


@CLASSES
@pytest.mark.parametrize(
    ("x_scale", "dy_scale"), [(1.0, 1e-20), (1.0, 1e20), (1e-30, 1e25), (1e-35, 1e-3), (1e30, 1e-35)], ids=str
)
def test_scales_far_from_fp16(device, wgmma, cls, x_scale, dy_scale):
    x, w, dy = tensors(CASES["three"], device)
    x, dy = x * x_scale, dy * dy_scale
    check(gradient(x, w, dy, (1, 1), cls), x, w, dy, (1, 1), cls)


def test_parts_of_zeros_leave_the_scale_to_the_others(device):
    tensor = torch.zeros(4, 16, 8, 8, device=device)  # a block reads 1024 elements
    tensor[2] = torch.linspace(-3e-20, 2e-20, 1024).view(16, 8, 8)
    exponents = torch.empty(4, dtype=torch.int32, device=device)
    run(fp16_tiles.largest_magnitude, tensor, exponents)
    assert exponents.tolist() == [126, 126, 79, 126]
    packed = packed_of(tensor, 1, exponents)[0].float()
    assert 2**14 <= packed.abs().max() < 2**15


@CLASSES
def test_outliers_do_not_flush_the_rest(device, wgmma, cls):
    """One value a million times the rest: channels that it does not reach are as exact as ever.

    In the float32 class they are what packed tiles can hold: those end at 2^-24, and have 1e6 as 1e6 / 2^5.
    """
    x, w, dy = tensors(CASES["three"], device)
    x[0, 3, 2, 2] = dy[1, 5, 3, 3] = 1e6
    rest = [c for c in range(16) if c not in (3, 5)]
    expected, dw = (t[rest][:, rest] for t in (truth(x, w, dy, (1, 1)), gradient(x, w, dy, (1, 1), cls)))
    operands = (tf32_rounded(t) if cls == "tf32" else (t.double() * 2**19).round() / 2**19 for t in (x, dy))
    theirs = truth(next(operands), w, next(operands), (1, 1))[rest][:, rest].float()
    tolerance.check(dw, expected, theirs, cls, x[:, 0].numel())


@CLASSES
@pytest.mark.parametrize("place", [(0, 3, 2, 4), (1, 0, 0, 0), (1, 15, 5, 6)], ids=["inside", "first", "last"])
@pytest.mark.parametrize("special", [float("inf"), -float("inf"), float("nan")])
def test_inf_and_nan_reach_what_the_definition_says(device, wgmma, cls, place, special):
    x, w, dy = tensors(CASES["three"], device)
    for operand in (x, dy):
        before = operand[place].item()
        operand[place] = special
        check(gradient(x, w, dy, (1, 1), cls), x, w, dy, (1, 1), cls)
        operand[place] = before


@CLASSES
@pytest.mark.parametrize("place", [(0, 3, 1, 0), (1, 15, 2, 7), (0, 0, 0, 6)], ids=["first", "last", "before_last"])
def test_nan_in_an_even_number_of_columns(device, wgmma, cls, place):
    """wgmma takes two columns at a time in the float32 class, and each of the four taps leaves out other ones."""
    case = ((2, 16, 3, 8), 16, (1, 4), (0, 1))
    x, w, dy = tensors(case, device)
    for operand in (x, dy):
        before = operand[place].item()
        operand[place] = float("nan")
        check(gradient(x, w, dy, case[3], cls), x, w, dy, case[3], cls)
        operand[place] = before


def test_two_runs_are_bit_equal(device, wgmma):
    x, w, dy = tensors(CASES["five"], device)
    assert torch.equal(*(gradient(x, w, dy, (1, 1), "fp32") for _ in range(2)))


def borders(x, w, dy, padding, exponents):
    """[2, KH KW, M], whose sum is what all of dy, which sums to 0, lacks of the pixels with a partner in x."""
    partnered = truth(torch.ones_like(x[:, :1]), w[:1], dy, padding)[0].flatten(1)
    alone = -partnered * torch.exp2(exponents.min().double())
    return torch.stack((alone.T * 0.25, alone.T * 0.75)).float()


@CLASSES
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_centred(device, wgmma, case, cls):
    """x far from 0, and a dy that sums to 0 in each channel, as batch norm's backward makes it."""
    x, w, dy = tensors(case, device)
    x, dy = x + torch.arange(x.shape[1], device=device)[:, None, None], dy - dy.mean((0, 2, 3), keepdim=True)
    _, plan = gradient_plans(
        NUMPY[x.dtype], x.shape, w.shape, geometry(case[3]), numerics.choose(cls, x.device), False, True
    )
    packed, exponents, _ = packed_of(dy, plan.split)
    alone = borders(x, w, dy, case[3], exponents)
    dw = wgrad_of_packed(plan, packed_of(x, plan.split, centred=True), w, packed, exponents, alone)
    check(dw, x, w, dy, case[3], cls)


def test_centred_needs_borders(device):
    x, w, dy = tensors(CASES["three"], device)
    _, plan = gradient_plans(
        NUMPY[x.dtype], x.shape, w.shape, geometry((1, 1)), numerics.choose("fp32", x.device), False, True
    )
    packed, exponents, _ = packed_of(dy, plan.split)
    for centred in (True, False):
        alone = None if centred else borders(x, w, dy, (1, 1), exponents)
        with pytest.raises(ValueError, match="x_sums and borders go together"):
            wgrad_of_packed(plan, packed_of(x, plan.split, centred=centred), w, packed, exponents, alone)


def test_centring_makes_errors_smaller(device, wgmma):
    """The rounding of what nine tenths of dy have in common adds up where x is far from 0."""
    shape, w = (2, 16, 32, 32), torch.empty(16, 16, 3, 3, device=device)
    x = torch.randn(shape, device=device) + 10
    dy = (torch.rand(shape, device=device) > 0.9) * (1 + torch.rand(shape, device=device))
    dy -= dy.mean((0, 2, 3), keepdim=True)
    _, plan = gradient_plans(
        NUMPY[x.dtype], x.shape, w.shape, geometry((1, 1)), numerics.choose("tf32", x.device), False, True
    )
    expected, errors, (packed, exponents, _) = truth(x, w, dy, (1, 1)), [], packed_of(dy, 1)
    for centred in (True, False):
        alone = borders(x, w, dy, (1, 1), exponents) if centred else None
        dw = wgrad_of_packed(plan, packed_of(x, 1, centred=centred), w, packed, exponents, alone)
        errors.append((dw.double() - expected).square().mean().sqrt())
    assert errors[0] < errors[1] / 3


@CLASSES
def test_tiles_and_exponents_that_are_there_already(device, cls, launched):
    x, w, dy = tensors(CASES["three"], device)
    split = 1 if cls == "tf32" else 2
    expected = gradient(x, w, dy, (1, 1), cls)
    (packed, exponents, _), (_, x_exponents, _) = packed_of(dy, split), packed_of(x, split)
    more = torch.cat([x_exponents + 3, x_exponents, x_exponents + 1])
    launched.clear()
    _, plan = gradient_plans(
        NUMPY[x.dtype], x.shape, w.shape, geometry((1, 1)), numerics.choose(cls, x.device), False, True
    )
    dw = wgrad_of_packed(plan, packed_of(x, split, more), w, packed, exponents)
    assert [k.name for k in launched] == ["pack_fp16", "conv_wgrad_mma", "conv_wgrad_reduce"]
    assert torch.equal(dw, expected)


@pytest.mark.parametrize(
    ("shape", "dtype", "split"),
    [
        ((2, 16, 3, 5), torch.float32, 1),
        ((3, 80, 6, 6), torch.float32, 1),
        ((3, 80, 6, 6), torch.float32, 2),
        ((2, 48, 5, 7), torch.float32, 2),
        ((2, 80, 6, 6), torch.float16, 1),
        ((2, 32, 3, 3), torch.bfloat16, 1),
    ],
    ids=str,
)
def test_cells(device, shape, dtype, split):
    """[N][chunk][pixel][64 halves]: values, with split 2 of 32 channels, then all that they leave, infinities too."""
    tensor = torch.randn(shape, device=device).to(dtype) * 100
    tensor[0, 1, 0, 0], tensor[0, 2, 0, 0], tensor[0, 3, 0, 0] = float("inf"), float("nan"), 0
    packed, exponents, _ = packed_of(tensor, split)
    finite = tensor[tensor.isfinite()].abs().max()
    scale = 2.0 ** exponents.min().item()
    assert 2**14 <= finite * scale < 2**15
    chunk = 64 // split
    padded = torch.zeros(shape[0], -(-shape[1] // chunk) * chunk, *shape[2:], device=device)
    padded[:, : shape[1]] = tensor.float() * scale
    values = padded.where(padded.isfinite(), 0).half() if split == 2 else padded.half()
    rests = (padded - values.float()).half()
    expected = [part.view(shape[0], -1, chunk, shape[2] * shape[3]) for part in (values, rests)[:split]]
    expected = torch.cat(expected, dim=2).transpose(2, 3)
    torch.testing.assert_close(packed.view(expected.shape), expected, rtol=0, atol=0, equal_nan=True)


@IN_EVERY_LAYOUT
def test_layouts(device, wgmma, make):
    x, w, dy = map(make, tensors(((2, 16, 4, 8), 16, (3, 3), (1, 1)), device))
    w.requires_grad_()
    ours, theirs = (
        torch.autograd.grad(f(x, w, padding=1), w, dy)[0]
        for f in (lambda *t, **o: conv_transpose2d(*t, numerics="fp32", **o), F.conv_transpose2d)
    )
    torch.testing.assert_close(ours, theirs)


@CLASSES
def test_little_shared_memory(device, wgmma, monkeypatch, cls):
    monkeypatch.setattr(numerics, "_shared_bytes", lambda _: 99 * 1024)
    monkeypatch.setattr(numerics, "_EMULATED_SHARED_BYTES", 99 * 1024)
    case = ((1, 16, 3, 17), 80, (2, 5), (1, 1))
    x, w, dy = tensors(case, device)
    check(gradient(x, w, dy, (1, 1), cls), x, w, dy, (1, 1), cls)


@pytest.mark.parametrize(
    ("split", "limit", "wgmma"), [(1, 227, 1), (2, 227, 1), (1, 170, 1), (1, 99, 0), (2, 99, 0)], ids=str
)
def test_wgmma_where_shared_memory_is_enough(split, limit, wgmma):
    shapes = (64, 64, 32, 32), (64, 128, 5, 5)
    found = conv_wgrad_mma.plan(*shapes, geometry((1, 1)), split, "float", limit * 1024, True)
    assert dict(found.macros)["WGMMA"] == wgmma


def test_too_little_shared_memory():
    unit = geometry((1, 1))
    with pytest.raises(conv_wgrad_mma.UnsupportedError, match="needs 63488 bytes of shared memory, the GPU has 48000"):
        conv_wgrad_mma.plan((1, 16, 4, 4), (16, 16, 5, 5), unit, 2, "float", 48000)
