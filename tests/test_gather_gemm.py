"""The implicit GEMMs: transposed convolutions of any hyper-parameters on tensor cores, in both memory formats."""

import itertools
import random
from collections import Counter

import pytest
import tolerance
import torch
import torch.nn.functional as F

from cupy_kernels import gather_gemm_plan
from cupy_kernels.conv_transpose import Geometry, output_shape
from modelnew import calls, explain, layers, numerics
from modelnew.functional import conv_transpose2d, conv_transpose_kernels, gather_gemm
from modelnew.interop import NUMPY

# (input shape, Cout per group, kernel, stride, padding, output_padding, groups, dilation)
CASES = {
    "point": ((2, 8, 5, 7), 16, (1, 1), (1, 1), (0, 0), (0, 0), 1, (1, 1)),
    "one_pixel": ((1, 100, 1, 1), 24, (4, 4), (1, 1), (0, 0), (0, 0), 1, (1, 1)),
    "phases": ((2, 16, 5, 4), 72, (4, 4), (2, 2), (1, 1), (0, 0), 1, (1, 1)),
    "unequal_phases": ((1, 16, 5, 4), 72, (3, 5), (2, 3), (1, 0), (1, 2), 1, (1, 1)),
    "phases_without_taps": ((1, 16, 3, 4), 72, (2, 1), (3, 3), (0, 0), (1, 0), 1, (1, 1)),
    "merged_exactly": ((2, 16, 6, 5), 40, (2, 2), (2, 2), (0, 0), (0, 0), 1, (1, 1)),
    "merged": ((2, 24, 6, 5), 3, (4, 4), (2, 2), (1, 1), (0, 0), 1, (1, 1)),
    "merged_and_cut": ((1, 16, 4, 5), 1, (9, 9), (4, 4), (4, 3), (3, 2), 1, (1, 1)),
    "merged_by_three": ((1, 21, 4, 3), 2, (5, 4), (3, 3), (2, 1), (1, 0), 1, (1, 1)),
    "merged_columns": ((1, 16, 3, 4), 5, (20, 18), (12, 12), (4, 3), (0, 0), 1, (1, 1)),
    "too_many_to_merge": ((1, 16, 3, 2), 2, (11, 10), (11, 10), (0, 1), (0, 0), 1, (1, 1)),
    "dilation": ((1, 24, 6, 5), 17, (3, 2), (1, 1), (2, 1), (0, 0), 1, (2, 3)),
    "stride_and_dilation": ((2, 9, 4, 5), 12, (3, 3), (4, 2), (1, 2), (3, 1), 1, (2, 3)),
    "dilation_of_the_stride": ((1, 8, 4, 5), 12, (3, 2), (2, 2), (1, 0), (1, 0), 1, (2, 4)),
    "groups": ((2, 24, 4, 5), 12, (3, 3), (2, 2), (1, 1), (1, 1), 3, (1, 1)),
    "over_padding": ((1, 8, 9, 8), 16, (2, 3), (1, 1), (3, 4), (0, 0), 1, (1, 1)),
    "many_channels": ((1, 320, 2, 3), 136, (3, 3), (2, 2), (1, 1), (0, 0), 1, (1, 1)),
    "many_pixels": ((3, 8, 17, 19), 8, (3, 3), (1, 1), (1, 1), (0, 0), 1, (1, 1)),
}
TYPES = [(torch.float32, "fp32"), (torch.float32, "tf32"), (torch.float16, "tf32"), (torch.bfloat16, "tf32")]
FORMATS = [torch.contiguous_format, torch.channels_last]
IN_EVERY_TYPE = pytest.mark.parametrize(("dtype", "cls"), TYPES, ids=["fp32", "tf32", "float16", "bfloat16"])
IN_EVERY_FORMAT = pytest.mark.parametrize("memory_format", FORMATS, ids=["contiguous", "channels_last"])


@pytest.fixture(autouse=True)
def implicit(monkeypatch, fresh_plans):
    """The implicit GEMMs take small convolutions, too, and those that resident bands take."""
    monkeypatch.setattr(numerics, "SMALL", 0)
    monkeypatch.setattr(conv_transpose_kernels, "tensor_core_plan", lambda *_, **options: (None, "a test"))
    numerics.gather_gemm_split.cache_clear()
    yield
    numerics.gather_gemm_split.cache_clear()


@pytest.fixture
def plan_anew(monkeypatch):
    """plan_anew() forgets plans, for a test that changes tables of tiles; so does the end of the test."""

    def forget():
        gather_gemm_plan.plan.cache_clear()
        gather_gemm_plan.wgrad_plan.cache_clear()
        plans = calls.Caches()
        monkeypatch.setattr("modelnew.calls.caches", lambda: plans)

    yield forget
    forget()


def random_case(seed):
    draw = random.Random(seed)

    def pair(low, high):
        return draw.randint(low, high), draw.randint(low, high)

    while True:
        groups, kernel, stride, dilation = draw.choice((1, 1, 2, 3)), pair(1, 5), pair(1, 4), pair(1, 3)
        shape = (draw.randint(1, 3), groups * draw.randint(4, 40), *pair(1, 9))
        out, padding = draw.randint(4, 40), pair(0, 3)
        extra = tuple(draw.randint(0, max(s, d) - 1) for s, d in zip(stride, dilation))
        try:
            output_shape(shape, (shape[1], out, *kernel), Geometry(stride, padding, extra, dilation, groups))
        except ValueError:
            continue
        return shape, out, kernel, stride, padding, extra, groups, dilation


def tensors(case, device, dtype, memory_format=torch.contiguous_format):
    """x, w, bias, and a gradient of the output."""
    shape, out, kernel, *options = case
    x, w = torch.randn(shape, device=device), torch.randn((shape[1], out, *kernel), device=device) / 8
    b = torch.randn(out * options[-2], device=device)
    dy = torch.randn(F.conv_transpose2d(x, w, b, *options).shape, device=device)
    return [
        t.to(dtype).to(memory_format=memory_format if t.dim() == 4 else torch.preserve_format) for t in (x, w, b, dy)
    ]


def results(function, x, w, b, dy):
    leaves = [t.detach().clone().requires_grad_() for t in (x, w, b)]
    y = function(*leaves)
    return [y.detach(), *torch.autograd.grad(y, leaves, dy)]


def check(case, cls, x, w, b, dy):
    """Ours in a class beside torch's; returns ours."""
    options, groups = case[3:], case[-2]
    before = [t.clone() for t in (x, w, b, dy)]
    ours = results(lambda *t: conv_transpose2d(*t, *options, numerics=cls), x, w, b, dy)
    assert all(map(torch.equal, before, (x, w, b, dy))), "an input was changed"

    def reference(*t):
        return torch.cat([r.flatten() for r in results(lambda *t: F.conv_transpose2d(*t, *options), *t)])

    truth = reference(*(t.double() for t in (x, w, b, dy)))
    theirs = tolerance.torch_result(reference, cls if x.dtype == torch.float32 else "exact", x, w, b, dy)
    sizes = [r.numel() for r in ours]
    taps, pixels = w[0, 0].numel(), x.shape[0] * x[0, 0].numel()
    terms = x.shape[1] // groups * taps, w.shape[1] * taps, pixels, pixels * taps
    parts = zip(("output", "dx", "dw", "dbias"), ours, truth.split(sizes), theirs.split(sizes), terms)
    for what, a, t, p, count in parts:
        tolerance.check(a, t.view(a.shape), p.view(a.shape), f"{what}, {cls}, {a.dtype}", count)
    return ours


def names(launched):
    return {kernel.name for kernel in launched}


@IN_EVERY_TYPE
@IN_EVERY_FORMAT
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_forward_and_gradients(device, case, memory_format, dtype, cls, launched):
    check(case, cls, *tensors(case, device, dtype, memory_format))
    assert {"gather_gemm", "wgrad_gemm", "wgrad_gemm_reduce"} <= names(launched)


@IN_EVERY_TYPE
@IN_EVERY_FORMAT
@pytest.mark.parametrize("out", [8, 72])
def test_a_large_batch_is_computed_in_parts(device, monkeypatch, launched, out, memory_format, dtype, cls):
    """The gradient of w has a scale of its own in each part; its memory is larger than dx's, or smaller."""
    monkeypatch.setattr(gather_gemm, "_PART_BYTES", 2000)
    case = ((5, 24, 5, 4), out, (2, 3), (2, 2), (1, 1), (0, 0), 1, (1, 1))
    x, w, b, dy = tensors(case, device, dtype, memory_format)
    x[0] *= 64
    dy[-1] *= 64
    check(case, cls, x, w, b, dy)
    counts = Counter(kernel.name for kernel in launched)
    packed = dtype == torch.float32 or memory_format != torch.channels_last
    of_gradients = counts["wgrad_gemm"]
    assert (of_gradients > 1, counts["gather_gemm"] - of_gradients > 1) == (packed, packed)
    assert counts["wgrad_gemm_reduce"] == 1


@pytest.mark.parametrize("seed", range(24))
def test_random_hyper_parameters(device, seed):
    draw = random.Random(seed)
    dtype, cls = draw.choice(TYPES)
    case = random_case(seed)
    check(case, cls, *tensors(case, device, dtype, draw.choice(FORMATS)))


@IN_EVERY_TYPE
@pytest.mark.parametrize("table", ["GATHER", "WGRAD", "WGMMA"])
def test_every_tile(device, monkeypatch, launched, plan_anew, table, dtype, cls):
    """With two splits of the sum, and channels and pixels that do not fill the last tiles."""
    wgmma = table == "WGMMA"
    if device == "cuda" and wgmma and not numerics.has_wgmma(torch.cuda.current_device()):
        pytest.skip("needs an sm_90 GPU and NVRTC 12")
    case = ((2, 72, 9, 9), 136, (2, 2), (1, 1), (0, 0), (0, 0), 1, (1, 1))
    split = 1 + (cls == "fp32")
    tables = {name: getattr(gather_gemm_plan, name) for name in ("GATHER", "WGRAD", "WGMMA")}
    monkeypatch.setattr(gather_gemm_plan, "_best_splits", lambda *_: (0, 2))
    for tile in tables[table][split]:
        for name in tables:  # this tile alone, for its kernels; those of the other table have theirs
            if name == table or wgmma:
                monkeypatch.setitem(tables[name], split, (tile,) if name == table else ())
        plan_anew()
        with numerics.wgmma(wgmma):
            check(case, cls, *tensors(case, device, dtype))
        kernel = "wgrad_gemm" if table == "WGRAD" else "gather_gemm"
        assert (
            dict([k for k in launched if k.name == kernel][-1].defines).items()
            >= {"TILE_M": tile.m, "TILE_N": tile.n, "WGMMA": int(wgmma)}.items()
        )
    assert "gather_gemm_reduce" in names(launched)


@IN_EVERY_FORMAT
@pytest.mark.parametrize("name", ["phases", "one_pixel", "merged", "groups"])
def test_results_keep_the_memory_format(device, name, memory_format):
    """Of the input, and gradients that of what they belong to; nothing is copied to another format."""
    case = CASES[name]
    x, w, b, dy = tensors(case, device, torch.float32, memory_format)
    y, dx, dw, _ = results(lambda *t: conv_transpose2d(*t, *case[3:]), x, w, b, dy)
    assert [t.stride() for t in (y, dx, dw)] == [t.stride() for t in (dy, x, w)]


def test_formats_of_x_w_and_dy_differ(device):
    case = CASES["phases"]
    for formats in itertools.product(FORMATS, repeat=3):
        x, w, b, dy = tensors(case, device, torch.float32)
        x, w, dy = (t.to(memory_format=f) for t, f in zip((x, w, dy), formats))
        y, dx, dw, _ = check(case, "fp32", x, w, b, dy)
        assert y.is_contiguous(memory_format=formats[0])
        assert dx.is_contiguous(memory_format=formats[0])
        assert dw.is_contiguous(memory_format=formats[1])


@pytest.mark.parametrize("name", CASES)
def test_sm75(device, launched, name):
    dtype, cls = TYPES[[*CASES].index(name) % 3]
    case = CASES[name]
    with numerics.as_sm75():
        check(case, cls, *tensors(case, device, dtype, FORMATS[case[1] % 2]))
    gemms = [dict(kernel.defines) for kernel in launched if kernel.name in ("gather_gemm", "wgrad_gemm")]
    assert len(gemms) == 3
    assert all(macros["SM75"] and macros["SHARED_BYTES"] <= 64 * 1024 for macros in gemms)


@pytest.mark.parametrize(("dtype", "cls"), TYPES[:3], ids=["fp32", "tf32", "float16"])
@pytest.mark.parametrize("table", ["GATHER_SM75", "WGRAD_SM75"])
def test_every_tile_of_sm75(device, monkeypatch, launched, plan_anew, table, dtype, cls):
    case = ((2, 72, 9, 9), 136, (2, 2), (1, 1), (0, 0), (0, 0), 1, (1, 1))
    monkeypatch.setattr(gather_gemm_plan, "_best_splits", lambda *_: (0, 2))
    for tile in getattr(gather_gemm_plan, table):
        monkeypatch.setattr(gather_gemm_plan, table, (tile,))
        plan_anew()
        with numerics.as_sm75():
            check(case, cls, *tensors(case, device, dtype))
        kernel = "gather_gemm" if table == "GATHER_SM75" else "wgrad_gemm"
        macros = dict([k for k in launched if k.name == kernel][-1].defines)
        assert (macros["TILE_M"], macros["TILE_N"], macros["SM75"]) == (tile.m, tile.n, 1)


def test_sm75_does_not_multiply_bfloat16(device):
    layer = layers.ConvTranspose2d(64, 32, 3, device=device)
    x = torch.randn(1, 64, 20, 20, device=device)
    with numerics.as_sm75():
        assert "by implicit GEMM" in explain(layer, x)
        assert "sm_75 does not multiply bfloat16" in explain(layer.bfloat16(), x.bfloat16())


def test_plans_follow_the_gpu_s_size(device, multiprocessors, launched):
    """Few blocks with large tiles fill a small GPU; a large one gets small tiles and split sums."""
    case = ((4, 136, 8, 8), 72, (3, 3), (1, 1), (1, 1), (0, 0), 1, (1, 1))
    shapes = case[0], (136, 72, 3, 3), Geometry((1, 1), (1, 1), (0, 0), (1, 1), 1)
    found = []
    for count in (1, 16, 132):
        multiprocessors(count)
        x, w, b, dy = tensors(case, device, torch.float32)
        found.append(gather_gemm_plan.plan(*shapes, 1, "float", gather_gemm_plan.Gpu(multiprocessors=count)))
        launched.clear()
        with numerics.wgmma(False):
            check(case, "tf32", x, w, b, dy)
        forward = next(kernel for kernel in launched if kernel.name == "gather_gemm")
        assert dict(forward.defines).items() >= dict(found[-1].macros).items()
    assert [(str(p.tile), p.splits) for p in found] == [("128x128", 1), ("128x16", 1), ("128x16", 5)]


def test_a_general_convolution_keeps_the_format(device, monkeypatch, launched):
    case = CASES["phases"]
    x, w, b, dy = tensors(case, device, torch.float64, torch.channels_last)
    ours, theirs = (
        results(lambda *t, f=f: f(*t, *case[3:]), x, w, b, dy) for f in (conv_transpose2d, F.conv_transpose2d)
    )
    assert "gather_gemm" not in names(launched)
    for a, b in zip(ours, theirs):
        assert a.dim() != 4 or a.is_contiguous(memory_format=torch.channels_last)
        torch.testing.assert_close(a, b)


@IN_EVERY_FORMAT
def test_unaligned_and_sliced_inputs(device, memory_format):
    case = CASES["phases"]
    x, w, b, dy = tensors(case, device, torch.float32, memory_format)
    wide = torch.randn(2, 17, 6, 5, device=device).to(memory_format=memory_format)
    check(case, "fp32", wide[:, 1:, 1:, 1:], w, b, dy)
    moved = torch.cat([x.flatten(), x.flatten()])[1 : 1 + x.numel()].view(x.shape)
    check(case, "fp32", moved, w, b, dy)


@pytest.mark.parametrize("cls", ["tf32", "fp32"])
@pytest.mark.parametrize(
    ("x_scale", "w_scale"),
    [(1e-20, 1.0), (1e20, 1e-3), (1e-30, 1e25), (1e-35, 1e-3), (1.0, 1e-20), (1e30, 1e-35)],
    ids=str,
)
def test_scales_far_from_fp16(device, cls, x_scale, w_scale):
    case = CASES["phases"]
    x, w, b, dy = tensors(case, device, torch.float32)
    check(case, cls, x * x_scale, w * w_scale, b * x_scale * w_scale, dy)


@pytest.mark.parametrize("cls", ["tf32", "fp32"])
@pytest.mark.parametrize("special", [float("inf"), -float("inf"), float("nan")])
@pytest.mark.parametrize("name", ["phases", "merged_exactly", "groups"])
def test_inf_and_nan_reach_the_pixels_that_they_reach_in_torch(device, name, cls, special):
    case = CASES[name]
    x, w, b, _ = tensors(case, device, torch.float32)
    x[0, 3, 2, 3] = special
    ours, theirs = conv_transpose2d(x, w, b, *case[3:], numerics=cls), F.conv_transpose2d(x, w, b, *case[3:])
    assert torch.equal(ours.isnan(), theirs.isnan())
    assert torch.equal(ours.isposinf(), theirs.isposinf())
    assert torch.equal(ours.isneginf(), theirs.isneginf())


@IN_EVERY_FORMAT
def test_two_runs_are_bit_equal(device, memory_format):
    case = CASES["many_channels"]
    inputs = tensors(case, device, torch.float32, memory_format)
    runs = [results(lambda *t: conv_transpose2d(*t, *case[3:], numerics="tf32"), *inputs) for _ in range(2)]
    assert all(map(torch.equal, *runs))


@IN_EVERY_FORMAT
def test_second_derivatives(device, memory_format):
    case = CASES["phases"]
    x, w, _, dy = tensors(case, device, torch.float32, memory_format)
    found = []
    for function in (lambda *t: conv_transpose2d(*t, numerics="fp32"), F.conv_transpose2d):
        leaves = [t.clone().requires_grad_() for t in (x, w)]
        y = function(*leaves, None, *case[3:])
        gradients = torch.autograd.grad(y, leaves, dy, create_graph=True)
        found.append(torch.autograd.grad(sum(g.square().sum() for g in gradients), leaves))
    for ours, theirs in zip(*found):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4 * theirs.abs().max().item())


def test_only_the_gradients_asked_for(device, launched):
    case = CASES["phases"]
    x, w, b, dy = tensors(case, device, torch.float16, torch.channels_last)
    of_x, of_w = {"pack_taps", "gather_gemm", "gather_gemm_reduce"}, {"wgrad_gemm", "wgrad_gemm_reduce"}
    for wanted, kernels in ((x, of_x), (w, of_w)):
        wanted.requires_grad_()
        y = conv_transpose2d(x, w, b, *case[3:])
        launched.clear()
        y.backward(dy)
        assert names(launched) <= kernels
        wanted.requires_grad_(False)


def test_a_16_bit_channels_last_tensor_is_not_packed(device, launched):
    x, w, b, _ = tensors(CASES["phases"], device, torch.float16, torch.channels_last)
    conv_transpose2d(x, w, b, *CASES["phases"][3:])
    assert [kernel.name for kernel in launched] == ["pack_taps", "gather_gemm"]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"dtype": torch.float64}, "float64"),
        ({"groups": 8}, "2 channels"),
        ({"shape": (0, 16, 6, 6)}, "fewer than 1"),
        ({"small": 2**20}, "fewer than 1048576"),
    ],
    ids=str,
)
def test_what_is_not_taken(monkeypatch, change, reason):
    monkeypatch.setattr(numerics, "SMALL", change.get("small", 1))
    numerics.gather_gemm_split.cache_clear()
    x = torch.zeros(change.get("shape", (1, 16, 6, 6)), dtype=change.get("dtype", torch.float32))
    geometry = Geometry((2, 2), (1, 1), (0, 0), (1, 1), change.get("groups", 1))
    choice = numerics.choose("tf32", x.device)
    shapes = tuple(x.shape), (16, 16 // geometry.groups, 4, 4)
    split, why = numerics.gather_gemm_split(NUMPY[x.dtype], *shapes, geometry, choice)
    assert split is None
    assert reason in why


def test_explanation():
    conv = layers.ConvTranspose2d(16, 8, 4, 2, 1, numerics="tf32")
    assert "implicit GEMM" in explain(conv, torch.zeros(1, 16, 6, 6))
