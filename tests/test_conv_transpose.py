import pytest
import torch
import torch.nn.functional as F
from strided import IN_EVERY_LAYOUT
from tolerance import check_gradients
from torch.nn.modules.utils import _pair as pair

from modelnew.functional import conv_transpose2d

DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]

# (input shape, Cout per group, kernel, stride, padding, output_padding, groups, dilation)
LAYERS = [
    ({"in_channels": 4, "out_channels": 6, "kernel_size": 3}, (2, 4, 5, 4)),
    (
        {
            "in_channels": 4,
            "out_channels": 6,
            "kernel_size": (3, 2),
            "stride": (2, 1),
            "padding": (1, 0),
            "output_padding": (1, 0),
        },
        (2, 4, 5, 4),
    ),
    (
        {
            "in_channels": 4,
            "out_channels": 6,
            "kernel_size": [2, 3],
            "stride": 3,
            "groups": 2,
            "bias": False,
            "dilation": 2,
        },
        (2, 4, 5, 4),
    ),
    ({"in_channels": 4, "out_channels": 6, "kernel_size": 1, "dtype": torch.float64}, (2, 4, 5, 4)),
]
CASES = {
    "reference": ((2, 6, 5, 7), 8, (5, 5), 1, 1, 0, 1, 1),
    "one_pixel": ((1, 1, 1, 1), 1, (1, 1), 1, 0, 0, 1, 1),
    "stride": ((2, 5, 4, 3), 3, (3, 4), (2, 3), (1, 0), (1, 2), 1, 1),
    "stride_over_kernel": ((2, 3, 3, 4), 2, (2, 1), 3, 0, 1, 1, 1),
    "dilation": ((1, 4, 6, 5), 5, (3, 2), 1, (2, 1), 0, 1, (2, 3)),
    "stride_and_dilation": ((2, 2, 4, 5), 3, (3, 3), (4, 2), (1, 2), (3, 1), 1, (2, 3)),
    "groups": ((3, 6, 4, 4), 2, (3, 3), 2, 1, 1, 3, 1),
    "depthwise": ((2, 7, 5, 3), 1, (3, 2), 1, 1, 0, 7, 1),
    "depthwise_stride_and_dilation": ((2, 7, 4, 5), 1, (3, 2), (2, 3), (1, 2), (1, 0), 7, (3, 2)),
    "wide_row": ((1, 9, 1, 40), 35, (1, 7), 1, (0, 3), 0, 1, 1),
    "wide_column": ((1, 33, 17, 1), 4, (5, 1), 1, (2, 0), 0, 1, 1),
    "padding_over_kernel": ((1, 2, 8, 9), 2, (2, 3), 1, (3, 4), 0, 1, 1),
    "empty_batch": ((0, 3, 4, 4), 2, (3, 3), 1, 1, 0, 1, 1),
}


def tensors(case, device, dtype, bias=True):
    shape, out, kernel, *_, groups, _ = case
    x = torch.randn(shape, device=device).to(dtype).requires_grad_()
    w = torch.randn((shape[1], out, *kernel), device=device).to(dtype).requires_grad_()
    b = torch.randn(out * groups, device=device).to(dtype).requires_grad_() if bias else None
    return x, w, b


def check_case(case, inputs):
    (images, channels, *size), out, kernel, *options = case
    taps, groups = kernel[0] * kernel[1], options[-2]
    pixels = images * size[0] * size[1]  # of x, for a tap of the weight's gradient; the bias's are about as many a tap
    check_gradients(
        lambda *t: conv_transpose2d(*t, *options),
        lambda *t: F.conv_transpose2d(*t, *options),
        inputs,
        terms=(channels // groups * taps, out * taps, pixels, pixels * taps),
    )


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no_bias"])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_forward_and_gradients(device, case, bias):
    check_case(case, tensors(case, device, torch.float32, bias))


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@pytest.mark.parametrize("name", ["reference", "stride_and_dilation", "groups"])
def test_dtypes(device, dtype, name):
    check_case(CASES[name], tensors(CASES[name], device, dtype))


@pytest.mark.parametrize("channels", [(40, 130), (130, 40)], ids=["more_out", "more_in"])
def test_large_tiles(device, channels):
    """More than 32 channels and 4096 pixels take the tiles that real shapes take; edges are partial everywhere."""
    x = torch.randn(2, channels[0], 47, 45, device=device, requires_grad=True)
    w = torch.randn(channels[0], channels[1], 2, 1, device=device, requires_grad=True)
    check_gradients(conv_transpose2d, F.conv_transpose2d, [x, w], terms=(2 * channels[0], 2 * channels[1], 2 * 47 * 45))


def test_large_tiles_double(device):
    """Of whole numbers, so that every sum is exact in whatever order it is added."""
    x, w, dy = (
        torch.randint(-(2**20), 2**20, shape, device=device).double()
        for shape in ((1, 33, 65, 64), (33, 34, 1, 2), (1, 34, 65, 65))
    )
    results = []
    for function in (conv_transpose2d, F.conv_transpose2d):
        leaves = [x.clone().requires_grad_(), w.clone().requires_grad_()]
        y = function(*leaves)
        results.append([y, *torch.autograd.grad(y, leaves, dy)])
    assert all(map(torch.equal, *results))


def test_unbatched(device):
    x, w, b = tensors(CASES["reference"], device, torch.float32)
    torch.testing.assert_close(conv_transpose2d(x[0], w, b, 2), F.conv_transpose2d(x[0], w, b, 2))


@IN_EVERY_LAYOUT
def test_layouts(device, make):
    x, w, b = (t.detach() for t in tensors(CASES["reference"], device, torch.float32))
    x, w = make(x).requires_grad_(), make(w).requires_grad_()
    y, expected = conv_transpose2d(x, w, b, 1, 1), F.conv_transpose2d(x, w, b, 1, 1)
    torch.testing.assert_close(y, expected)
    dy = make(torch.randn_like(y))
    for ours, theirs in zip(torch.autograd.grad(y, (x, w), dy), torch.autograd.grad(expected, (x, w), dy), strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize(
    "wanted", [(True, False, False), (False, True, False), (False, False, True)], ids=["x", "w", "bias"]
)
def test_only_the_gradients_asked_for(device, wanted, launched):
    x, w, b = (t.detach().requires_grad_(g) for t, g in zip(tensors(CASES["reference"], device, torch.float32), wanted))
    y = conv_transpose2d(x, w, b)
    launched.clear()
    y.backward(torch.ones_like(y))
    kernels = {k.name for k in launched}
    expected = [
        {"pack_weight", "conv_gather"},
        {"wgrad_partial", "wgrad_reduce"},
        {"channel_sum_partials", "channel_sum_combine"},
    ]
    assert kernels == expected[wanted.index(True)]


def test_nan_and_inf_spread_as_in_torch(device):
    x, w, b = (t.detach() for t in tensors(CASES["stride"], device, torch.float32))
    x[0, 1, 2, 1], x[1, 0, 0, 0] = float("nan"), float("inf")
    options = CASES["stride"][3:]
    ours, theirs = conv_transpose2d(x, w, b, *options), F.conv_transpose2d(x, w, b, *options)
    torch.testing.assert_close(ours, theirs, equal_nan=True)


@pytest.mark.parametrize("special", [float("inf"), float("nan")])
@pytest.mark.parametrize("case", ["stride", "dilation", "padding_over_kernel"])
def test_pixels_without_a_partner_add_nothing_to_dw(device, case, special):
    """Nor do infinite ones, times a zero that stands for dy outside the image; some of PyTorch's kernels do."""
    x, w, b = (t.detach() for t in tensors(CASES[case], device, torch.float32))
    stride, padding, _, _, dilation = options = CASES[case][3:]
    x[:, :, 0], x[:, :, -1], x[..., 0], x[..., -1] = [special] * 4
    y = conv_transpose2d(x, w.requires_grad_(), b, *options)
    (dw,) = torch.autograd.grad(y, w, torch.ones_like(y))
    inside = []  # [size, kernel]: whether a row or column of x meets dy under a tap
    for size, out, k, s, p, d in zip(x.shape[2:], y.shape[2:], w.shape[2:], *map(pair, (stride, padding, dilation))):
        at = torch.arange(size).view(-1, 1) * s - p + torch.arange(k) * d
        inside.append((at >= 0) & (at < out))
    meets = inside[0].view(-1, 1, w.shape[2], 1) & inside[1].view(1, -1, 1, w.shape[3])
    met = torch.where(meets, x.cpu()[:, :, :, :, None, None], 0).sum((0, 2, 3))
    expected = met.unsqueeze(1).expand(w.shape)
    torch.testing.assert_close(dw.cpu(), expected, equal_nan=True, rtol=1e-5, atol=1e-5)


def test_gradcheck(device):
    x, w, b = tensors(((2, 4, 3, 2), 1, (2, 3)) + CASES["groups"][3:6] + (2, 1), device, torch.float64)
    assert torch.autograd.gradcheck(lambda *t: conv_transpose2d(*t, 2, 1, 1, 2, (1, 2)), (x, w, b))


def test_two_runs_are_bit_equal(device):
    x, w, b = tensors(((5, 6, 13, 11), 7, (3, 3), 1, 1, 0, 1, 1), device, torch.float32)
    runs = []
    for _ in range(2):
        y = conv_transpose2d(x, w, b, 1, 1)
        runs.append([y, *torch.autograd.grad(y, (x, w, b), torch.ones_like(y) / 3)])
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"input": torch.zeros(2, 6, 5, 7, dtype=torch.int32)}, TypeError, "input must be float32.*int32"),
        ({"weight": torch.zeros(6, 8, 3, 3, dtype=torch.float64)}, TypeError, "one dtype"),
        ({"weight": torch.zeros(5, 8, 3, 3)}, ValueError, "input has 6 channels.*takes 5"),
        ({"input": torch.zeros(6, 7)}, ValueError, r"\[N, C, H, W\].*\(6, 7\)"),
        ({"bias": torch.zeros(7)}, ValueError, r"bias must have shape \(8,\)"),
        ({"stride": 0}, ValueError, "stride must be at least 1"),
        ({"stride": (1, 2, 3)}, ValueError, "stride must be an int or a pair"),
        ({"padding": -1}, ValueError, "padding must not be negative"),
        ({"padding": 9}, ValueError, "output size"),
        ({"output_padding": 1}, ValueError, "output_padding must be smaller"),
        ({"groups": 4}, ValueError, "groups=4 must divide this number"),
        ({"dilation": 0}, ValueError, "dilation must be at least 1"),
        ({"input": torch.zeros(1, 1, 1, 1).expand(1, 6, 70000, 70000)}, ValueError, "more than 2147483647 elements"),
    ],
)
def test_errors(change, error, message):
    arguments = {"input": torch.zeros(2, 6, 5, 7), "weight": torch.zeros(6, 8, 3, 3), "bias": torch.zeros(8), **change}
    with pytest.raises(error, match=message):
        conv_transpose2d(**arguments)
