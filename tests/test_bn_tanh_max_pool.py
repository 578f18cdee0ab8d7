import itertools

import pytest
import torch
import torch.nn.functional as F
from strided import IN_EVERY_LAYOUT
from tolerance import check, check_gradients

from modelnew.functional import (
    batch_norm_tanh,
    bn_tanh_max_pool2d,
    max_pool2d,
    tanh,
    tanh_max_pool2d,
)
from modelnew.parity import error

DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]
INF, NAN = float("inf"), float("nan")
WINDOWS = [
    {"kernel_size": 2},
    {"kernel_size": 2, "ceil_mode": True},
    {"kernel_size": 3, "stride": 2, "padding": 1},
    {"kernel_size": (2, 3), "stride": (3, 1), "padding": (1, 0), "ceil_mode": True},
    {"kernel_size": (3, 2), "stride": (1, 2), "padding": (1, 1), "dilation": (2, 3)},
]
TWO_BY_TWO, OVERLAPPING = WINDOWS[0], WINDOWS[2]


def separated(*shape, device):
    """Values in (-1.5, 1.5) of which no two of a plane are close, so that rounding moves no maximum."""
    n = shape[-2] * shape[-1]
    planes = [torch.randperm(n) for _ in range(max(1, torch.Size(shape[:-2]).numel()))]
    x = torch.stack(planes).double().add(0.5).div(n / 1.8).sub(0.9).atanh()
    return x[: torch.Size(shape[:-2]).numel()].reshape(shape).to(device)


def parameters(channels, device, dtype=torch.float32):
    """weight, bias, running_mean, running_var. One weight is negative, and none small."""
    weight, bias, mean, var = torch.rand(4, channels, dtype=torch.float64, device=device).to(dtype)
    weight = weight / 2 + 0.5
    weight[channels // 2] *= -1
    return weight, bias - 0.5, mean / 5, var + 0.5


def reference(x, running_mean, running_var, weight, bias, training, window, momentum=0.1, eps=1e-5):
    if weight is None and bias is not None:  # torch's own gradient fails there on a GPU
        weight = torch.ones_like(bias)
    y = F.batch_norm(x, running_mean, running_var, weight, bias, training, momentum, eps)
    return F.max_pool2d(torch.tanh(y), **window)


def bn_tanh_max_pool(x, running_mean, running_var, weight, bias, training, window, momentum=0.1, eps=1e-5):
    return bn_tanh_max_pool2d(x, running_mean, running_var, weight, bias, training, momentum, eps, **window)


# tanh and max pooling


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("window", WINDOWS, ids=str)
@pytest.mark.parametrize("shape", [(2, 3, 8, 10), (3, 7, 6), (0, 2, 4, 4)], ids=str)
def test_tanh_max_pool(device, dtype, window, shape):
    x = separated(*shape, device=device).to(dtype).requires_grad_()
    check_gradients(
        lambda x: tanh_max_pool2d(x, **window),
        lambda x: F.max_pool2d(torch.tanh(x), **window),
        [x],
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("window", WINDOWS, ids=str)
def test_tanh_max_pool_is_bit_equal_to_its_parts(device, dtype, window):
    x = (4 * torch.randn(5, 3, 9, 10, device=device)).to(dtype).requires_grad_()  # where tanh has ties
    fused, parts = tanh_max_pool2d(x, **window), max_pool2d(tanh(x), **window)
    assert torch.equal(fused, parts)
    dy = torch.ones_like(fused)
    (dx,), (expected,) = (torch.autograd.grad(y, x, dy) for y in (fused, parts))
    assert torch.equal(dx != 0, expected != 0)
    if window in (TWO_BY_TWO, WINDOWS[1]):  # nothing is summed
        assert torch.equal(dx, expected)


def test_bit_equal_to_torch(device):
    if device == "cpu":
        pytest.skip("the emulator's tanh is not torch's to the last bit")
    x = (3 * torch.randn(4, 3, 34, 34, device=device)).requires_grad_()
    y, expected = tanh_max_pool2d(x, 2), F.max_pool2d(torch.tanh(x), 2)
    assert torch.equal(y, expected)
    dy = torch.randn_like(y)
    assert torch.equal(*(torch.autograd.grad(z, x, dy)[0] != 0 for z in (y, expected)))


def test_ties_that_tanh_makes_go_to_the_first(device):
    x = torch.full((1, 1, 2, 4), 3.0, device=device)
    x[0, 0, 1, 1] = x[0, 0, 0, 3] = torch.nextafter(x[0, 0, 0, 0], x.new_tensor(INF))
    assert torch.equal(tanh(x), tanh(torch.full_like(x, 3.0)))
    x.requires_grad_()
    for y in (
        tanh_max_pool2d(x, 2),
        bn_tanh_max_pool(x, x.new_zeros(1), x.new_ones(1), None, None, False, TWO_BY_TWO, eps=0),
    ):
        (dx,) = torch.autograd.grad(y.sum(), x)
        assert dx.nonzero()[:, 2:].tolist() == [[0, 0], [0, 2]]


SPECIAL = [
    [1.0, NAN, 3.0, 2.0],
    [NAN, 1.0, NAN, 2.0],
    [INF, 30.0, 40.0, INF],
    [-INF, -INF, -INF, -INF],
    [-INF, -50.0, -60.0, -1.0],
    [1e-40, 2e-40, -1e-40, 3e-40],
    [-0.0, 0.0, -1e-45, 0.0],
]


@pytest.mark.parametrize("values", SPECIAL, ids=str)
@pytest.mark.parametrize("window", [TWO_BY_TWO, {"kernel_size": 2, "stride": 1, "padding": 1}], ids=["2x2", "padded"])
def test_special_values(device, values, window):
    x = torch.tensor(values, device=device).reshape(1, 1, 2, 2).requires_grad_()
    y, expected = tanh_max_pool2d(x, **window), F.max_pool2d(torch.tanh(x), **window)
    double = x.detach().double().requires_grad_()
    truth = F.max_pool2d(torch.tanh(double), **window)
    check(y, truth, expected)
    assert torch.equal(y.signbit() & ~y.isnan(), expected.signbit() & ~y.isnan())
    dy = torch.ones_like(y)
    (dx,), (expected,) = (torch.autograd.grad(z, x, dy) for z in (y, expected))
    wins = F.max_pool2d(torch.tanh(x), **window, return_indices=True)[1].unique()
    (truth,) = torch.autograd.grad(truth, double, dy.double())
    check(*(t.flatten()[wins] for t in (dx, truth, expected)))
    assert dx.flatten().nonzero().flatten().tolist() == [i for i in wins.tolist() if dx.flatten()[i] != 0]


def test_windows_of_more_than_254_elements(device):
    x = torch.randn(2, 2, 18, 20, device=device, requires_grad=True)
    window = {"kernel_size": (16, 17), "stride": 2, "padding": (3, 8)}
    check_gradients(lambda x: tanh_max_pool2d(x, **window), lambda x: F.max_pool2d(torch.tanh(x), **window), [x])


def test_dilated_windows_without_any_element(device):
    x = torch.full((1, 1, 1, 1), 0.5, device=device, requires_grad=True)
    window = {"kernel_size": 2, "stride": 1, "padding": 1, "dilation": 2}
    y = tanh_max_pool2d(x, **window)
    assert y.item() == -INF
    mean, var = x.new_zeros(1), x.new_ones(1)
    bias = x.new_zeros(1).requires_grad_()
    normed = bn_tanh_max_pool(x, mean, var, None, bias, False, window)
    assert normed.item() == -INF
    for gradient in (*torch.autograd.grad(y.sum(), x), *torch.autograd.grad(normed.sum(), [x, bias])):
        assert gradient.item() == 0


# batch norm before them


@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("window", WINDOWS, ids=str)
def test_bn_tanh_max_pool(device, training, dtype, window):
    x = separated(3, 4, 7, 8, device=device).to(dtype).requires_grad_()
    weight, bias, mean, var = parameters(4, device, dtype)
    check_gradients(
        lambda *t: bn_tanh_max_pool(t[0], mean.clone(), var.clone(), *t[1:], training, window),
        lambda *t: reference(t[0], mean.to(t[1].dtype), var.to(t[1].dtype), *t[1:], training, window),
        [x, weight.requires_grad_(), bias.requires_grad_()],
        terms=(0, 0, *[x.numel() // 4] * 2),
    )


@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
@pytest.mark.parametrize("shape", [(6, 3, 34, 34), (2, 1, 2, 1), (1, 2, 1, 6), (9, 2, 4, 6), (1, 2, 130, 130)], ids=str)
def test_shapes(device, training, shape):
    x = torch.randn(shape).to(device).requires_grad_()
    weight, bias, mean, var = parameters(shape[1], device)
    window = {"kernel_size": 2, "ceil_mode": True}
    check_gradients(
        lambda *t: bn_tanh_max_pool(t[0], mean.clone(), var.clone(), *t[1:], training, window),
        lambda *t: reference(t[0], mean.to(t[0].dtype), var.to(t[0].dtype), *t[1:], training, window),
        [x, weight.requires_grad_(), bias.requires_grad_()],
        terms=(0, 0, *[x.numel() // shape[1]] * 2),
    )


@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("window", [TWO_BY_TWO, OVERLAPPING], ids=str)
def test_bit_equal_to_its_parts(device, training, dtype, window):
    x = (2 * torch.randn(5, 3, 8, 10, device=device)).to(dtype)
    weight, bias, mean, var = parameters(3, device, dtype)
    means, variances = [mean.clone(), mean.clone()], [var.clone(), var.clone()]
    fused = bn_tanh_max_pool(x, means[0], variances[0], weight, bias, training, window)
    parts = max_pool2d(batch_norm_tanh(x, means[1], variances[1], weight, bias, training), **window)
    assert torch.equal(fused, parts)
    assert torch.equal(*means)
    assert torch.equal(*variances)
    assert torch.equal(means[0], mean) == (not training)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
def test_16_bit_input_with_float32_parameters(device, dtype, training):
    x = separated(3, 4, 6, 8, device=device).to(dtype).requires_grad_()
    weight, bias, mean, var = parameters(4, device)
    check_gradients(
        lambda *t: bn_tanh_max_pool(t[0], mean.clone(), var.clone(), *t[1:], training, TWO_BY_TWO),
        lambda *t: reference(t[0], mean.to(t[1].dtype), var.to(t[1].dtype), *t[1:], training, TWO_BY_TWO),
        [x, weight.requires_grad_(), bias.requires_grad_()],
        terms=(0, 0, *[x.numel() // 4] * 2),
    )


@pytest.mark.parametrize("affine", [(True, False), (False, True), (False, False)], ids=["weight", "bias", "neither"])
@pytest.mark.parametrize("stats", [True, False], ids=["running", "none"])
def test_optional_parameters(device, affine, stats):
    x = torch.randn(3, 2, 6, 7, device=device, requires_grad=True)
    weight, bias, mean, var = parameters(2, device)
    weight, bias = (t.requires_grad_() if given else None for t, given in zip((weight, bias), affine))
    mean, var = (mean, var) if stats else (None, None)
    check_gradients(
        lambda *t: bn_tanh_max_pool(t[0], mean, var, *t[1:], True, OVERLAPPING),
        lambda *t: reference(t[0], None, None, *t[1:], True, OVERLAPPING),
        [x, weight, bias],
        terms=(0, 0, *[x.numel() // 2] * 2),
    )


def test_running_statistics(device):
    x = torch.randn(4, 3, 5, 6, device=device)
    weight, bias, mean, var = parameters(3, device)
    expected_mean, expected_var = mean.clone(), var.clone()
    bn_tanh_max_pool(x, mean, var, weight, bias, True, TWO_BY_TWO, momentum=0.3)
    reference(x, expected_mean, expected_var, weight, bias, True, TWO_BY_TWO, momentum=0.3)
    torch.testing.assert_close(mean, expected_mean)
    torch.testing.assert_close(var, expected_var)


@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
def test_empty_batch(device, training):
    x = torch.zeros(0, 3, 4, 4, device=device, requires_grad=True)
    weight, bias, mean, var = parameters(3, device)
    wanted = [x, weight.requires_grad_(), bias.requires_grad_()]
    y = bn_tanh_max_pool(x, mean.clone(), var.clone(), weight, bias, training, TWO_BY_TWO)
    assert y.shape == (0, 3, 2, 2)
    dx, dweight, dbias = torch.autograd.grad(y.sum(), wanted)
    assert dx.shape == x.shape
    assert not dweight.any()
    assert not dbias.any()


def test_nan_and_inf_reach_their_channel_only(device):
    x = torch.randn(2, 3, 4, 4, device=device)
    x[0, 0, 1, 1], x[1, 1, 2, 2] = NAN, INF
    mean, var = x.new_zeros(3), x.new_ones(3)
    for training in (True, False):
        y = bn_tanh_max_pool(x, mean.clone(), var.clone(), None, None, training, TWO_BY_TWO)
        expected = reference(x, mean.clone(), var.clone(), None, None, training, TWO_BY_TWO)
        torch.testing.assert_close(y, expected, equal_nan=True)
        assert y[:, 2].isfinite().all()


@pytest.mark.parametrize("norm", [True, False], ids=["batch norm", "tanh alone"])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
def test_nan_in_windows_that_reach_over_the_edge(device, norm, memory_format):
    """A row that the plane does not have wins nothing, whatever a kernel reads in its place."""
    x = torch.randn(3, 4, 5, 6, device=device)
    x[:, ::2, -1, ::2] = x[:, 1, -1, 1::2] = NAN  # one of a window: see docs/limits.md
    x = x.contiguous(memory_format=memory_format).requires_grad_()
    window = {"kernel_size": 2, "ceil_mode": True}
    arguments = x.new_zeros(4), x.new_ones(4), None, None, False, window
    results = [
        bn_tanh_max_pool(x, *arguments) if norm else tanh_max_pool2d(x, **window),
        # torch's kernel for channels_last on a GPU takes other elements where none is the largest.
        reference(x.contiguous(), *arguments) if norm else F.max_pool2d(torch.tanh(x.contiguous()), **window),
    ]
    torch.testing.assert_close(*results, equal_nan=True)
    dy = torch.randn(results[0].shape, device=device)
    torch.testing.assert_close(*(torch.autograd.grad(y, x, dy)[0] for y in results), equal_nan=True)


def test_large_mean_and_small_variance(device):
    x = (1000 + torch.randn(4, 2, 8, 8, device=device)).requires_grad_()
    function = lambda x: bn_tanh_max_pool(x, None, None, None, None, True, TWO_BY_TWO)  # noqa: E731
    check_gradients(function, lambda x: reference(x, None, None, None, None, True, TWO_BY_TWO), [x])


@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
@pytest.mark.parametrize("wanted", list(itertools.product([False, True], repeat=3)), ids=str)
def test_work_is_done_for_wanted_gradients_only(device, launched, training, wanted):
    x = torch.randn(2, 3, 4, 6, device=device)
    weight, bias, mean, var = parameters(3, device)
    tensors = [t.requires_grad_(want) for t, want in zip((x, weight, bias), wanted)]
    y = bn_tanh_max_pool(x, mean, var, weight, bias, training, TWO_BY_TWO)
    assert y.requires_grad == any(wanted)
    if not any(wanted):
        return
    launched.clear()
    y.sum().backward()
    assert [t.grad is not None for t in tensors] == list(wanted)
    names = [kernel.name for kernel in launched]
    reduced = training or wanted[1] or wanted[2]
    assert ("bn_tanh_max_pool_backward_partials" in names) == reduced
    assert ("bn_tanh_max_pool_backward" in names) == wanted[0]
    assert len(names) == 2 * reduced + wanted[0]


@IN_EVERY_LAYOUT
def test_layouts(device, make):
    x = make(torch.randn(3, 4, 6, 8, device=device)).requires_grad_()
    weight, bias, mean, var = parameters(4, device)
    for y, expected in (
        (tanh_max_pool2d(x, 2), F.max_pool2d(torch.tanh(x), 2)),
        (
            bn_tanh_max_pool(x, mean.clone(), var.clone(), weight, bias, True, TWO_BY_TWO),
            reference(x, mean.clone(), var.clone(), weight, bias, True, TWO_BY_TWO),
        ),
    ):
        assert y.is_contiguous()
        torch.testing.assert_close(y, expected)
        dy = torch.randn(y.shape[::-1], device=device).permute(3, 2, 1, 0)
        torch.testing.assert_close(torch.autograd.grad(y, x, dy)[0], torch.autograd.grad(expected, x, dy)[0])


@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
@pytest.mark.parametrize("window", [TWO_BY_TWO, OVERLAPPING], ids=str)
def test_gradcheck(device, training, window):
    x = separated(2, 2, 5, 6, device=device).requires_grad_()
    weight, bias, mean, var = (t.requires_grad_(i < 2) for i, t in enumerate(parameters(2, device, torch.float64)))
    assert torch.autograd.gradcheck(
        lambda x, w, b: bn_tanh_max_pool(x, mean.clone(), var.clone(), w, b, training, window), [x, weight, bias]
    )
    assert torch.autograd.gradcheck(lambda x: tanh_max_pool2d(x, **window), x)


def test_two_runs_are_bit_equal(device):
    x = torch.randn(5, 3, 20, 22, device=device, requires_grad=True)
    weight, bias, mean, var = parameters(3, device)
    wanted = [x, weight.requires_grad_(), bias.requires_grad_()]
    dy = torch.randn(5, 3, 10, 11, device=device)
    runs = [bn_tanh_max_pool(x, mean.clone(), var.clone(), weight, bias, True, OVERLAPPING) for _ in range(2)]
    for first, second in zip(*(torch.autograd.grad(y, wanted, dy) for y in runs)):
        assert torch.equal(first, second)


def test_the_vector_path_and_the_general_one_agree(device, launched):
    values = torch.randn(1 + 3 * 2 * 8 * 6, device=device)
    aligned, unaligned = values[1:].clone().view(3, 2, 8, 6), values[1:].view(3, 2, 8, 6)
    ys = [bn_tanh_max_pool(x, None, None, None, None, True, TWO_BY_TWO) for x in (aligned, unaligned)]
    paths = [dict(k.defines)["WINDOW_2X2"] for k in launched if k.name == "bn_tanh_max_pool_forward"]
    assert paths == [1, 0]
    torch.testing.assert_close(*ys)


@pytest.mark.parametrize(
    ("shape", "options", "error", "message"),
    [
        ((2, 3, 4, 4), {"kernel_size": 5}, RuntimeError, "larger than the padded planes"),
        ((2, 3, 4, 4), {"padding": 2}, RuntimeError, "at most half of kernel_size"),
        ((2, 3, 4, 4), {"kernel_size": (2, 2, 2)}, ValueError, "an int or a pair"),
        ((1, 3, 1, 1), {"kernel_size": 1}, ValueError, "more than 1 value per channel"),
        ((2, 3, 4, 4), {"eps": 0.0}, ValueError, "eps must be positive"),
        ((2, 4, 4, 4), {}, RuntimeError, "should contain 4 elements not 3"),
        ((3, 3, 4), {}, RuntimeError, r"received shape \(3, 3, 4\)"),
    ],
)
def test_a_refused_call_changes_nothing(device, shape, options, error, message):
    mean, var = torch.zeros(3, device=device), torch.ones(3, device=device)
    with pytest.raises(error, match=message):
        bn_tanh_max_pool2d(torch.randn(shape, device=device), mean, var, training=True, **options)
    assert not mean.any()
    assert (var == 1).all()


def test_other_refusals(device):
    x = torch.zeros(2, 3, 4, 4, device=device)
    with pytest.raises(TypeError, match=r"float32.*received torch\.int64"):
        tanh_max_pool2d(x.long(), 2)
    with pytest.raises(RuntimeError, match="larger than the padded planes"):
        tanh_max_pool2d(x, 5)
    with pytest.raises(TypeError, match="must be all"):
        bn_tanh_max_pool2d(x, None, None, x.new_zeros(3, dtype=torch.float64), training=True)
    with pytest.raises(RuntimeError, match="must be defined in evaluation mode"):
        bn_tanh_max_pool2d(x, None, None)


def test_partial_sums_of_a_large_plane(device):
    """Of whole numbers with a mean of 0: the statistics of so many are exact in whatever order they are added."""
    x = torch.randint(1, 9, (1, 1, 300, 130), device=device).double()
    x = torch.cat([x, -x]).requires_grad_()
    y, expected = (f(x, None, None, None, None, True, {"kernel_size": 1}) for f in (bn_tanh_max_pool, reference))
    dy = torch.randn_like(y)
    (dx,), (expected,) = (torch.autograd.grad(z, x, dy) for z in (y, expected))
    check(dx, expected, expected)


@pytest.mark.parametrize(
    "scale", [(1e20, 1), (1e38, 1), (1, 2e37)], ids=["values_1e20", "values_1e38", "gradients_2e37"]
)
@pytest.mark.parametrize("window", [TWO_BY_TWO, OVERLAPPING], ids=str)
def test_large_values_are_as_right_as_small_ones(device, window, scale):
    """Squares and sums overflow float32; PyTorch's own results are zeros and NaN there."""
    x = separated(2, 3, 24, 26, device=device).float() * scale[0]
    weight, bias, _, _ = parameters(3, device)
    found = []
    for function, cast in ((bn_tanh_max_pool, torch.Tensor.clone), (reference, torch.Tensor.double)):
        leaves = [cast(t).requires_grad_() for t in (x, weight, bias)]
        y = function(leaves[0], None, None, *leaves[1:], True, window)
        found.append([y, *torch.autograd.grad(y, leaves, torch.full_like(y, scale[1]))])
    for ours, truth in zip(*found):
        assert error(ours, truth.float()).rms < 2e-6
