"""Batch norm of values and gradients that are large, small, constant, or not finite."""

import pytest
import torch
import torch.nn.functional as F
from norms import LARGE, PAIRS, check_pair, parameters, statistics
from tolerance import check

from modelnew.functional import batch_norm
from modelnew.parity import error

INF, NAN = float("inf"), float("nan")


@pytest.mark.parametrize("outlier", [0.0, 1e3], ids=["none", "first_value"])
@pytest.mark.parametrize("shape", [(4, 2, 5, 8), (9, 2, 32, 32)], ids=str)
def test_large_mean_and_small_variance(device, outlier, shape):
    x = 1e4 + torch.randn(shape, device=device)
    x[0, :, 0, 0] += outlier
    mean, var = torch.zeros(2, device=device), torch.zeros(2, device=device)
    y = batch_norm(x, mean, var, training=True, momentum=1.0)
    columns = x.double().transpose(0, 1).flatten(1)
    for statistic, truth in ((var, columns.var(1)), (mean, columns.mean(1))):
        check(statistic, truth, truth.float())
    expected = F.batch_norm(x.double(), None, None, training=True)
    # In float32 the mean alone is half a unit of 1e4 off.
    rounded = F.batch_norm(x.double(), columns.mean(1) + torch.finfo(x.dtype).eps * 2**13 / 2, columns.var(1, False))
    check(y, expected, rounded.float())


@pytest.mark.parametrize("value", [1e4 / 3, -3e38, 3.4e38])
def test_constant_channel(device, value):
    x = torch.full((3, 2, 4, 5), value, device=device, requires_grad=True)
    weight, bias = parameters(2, device)
    y = batch_norm(x, None, None, weight, bias, training=True)
    assert torch.equal(y, bias.view(2, 1, 1).expand(3, 2, 4, 5))
    if value == 1e4 / 3:  # 120 times the others is not a float64 times 120: PyTorch finds a variance there
        check_pair(PAIRS[0].values[0], x, (), weight, bias, training=True)


@pytest.mark.parametrize("values", [[NAN], [INF], [-INF], [INF, INF], [INF, -INF], [NAN, INF]], ids=str)
@pytest.mark.parametrize("place", [0, 7, 38])
@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
@pytest.mark.parametrize("layout", ["nchw", "nhwc", "rows"])
def test_nan_and_inf(device, values, place, training, layout):
    channels = torch.randn(8, 40)
    channels[1, place : place + len(values)] = torch.tensor(values)
    x, running = channels.view(8, 2, 4, 5).transpose(0, 1).contiguous(), statistics(8, "cpu")
    x = {"nchw": x, "nhwc": x.contiguous(memory_format=torch.channels_last), "rows": channels.t().contiguous()}[layout]
    ours = [r.to(device, copy=True) for r in running]
    y = batch_norm(x.to(device), *ours, training=training)
    expected = F.batch_norm(
        x, *running, training=training
    )  # on the CPU: a mean with an infinity in it is infinite there
    for a, b in zip((y, *ours), (expected, *running)):
        torch.testing.assert_close(a.cpu(), b, equal_nan=True)


@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
def test_nan_in_the_gradient(device, training):
    x, dy = torch.randn(2, 3, 4, 5, device=device, requires_grad=True), torch.randn(2, 3, 4, 5, device=device)
    dy[1, 2, 3, 1] = NAN
    running, weight = statistics(3, device), torch.randn(3, device=device, requires_grad=True)
    ours, theirs = (
        torch.autograd.grad(f(x, *(r.clone() for r in running), weight, training=training), (x, weight), dy)
        for f in (batch_norm, F.batch_norm)
    )
    for a, b in zip(ours, theirs):
        torch.testing.assert_close(a, b, equal_nan=True)


LARGE_VALUES = {
    **LARGE,
    "one_chunk": lambda shape: (
        torch.randn(shape).clamp(-3, 3) * torch.tensor([1e38] + [1.0] * (shape[0] - 1)).view(-1, 1, 1, 1)
    ),
}


def results(function, cast, x, weight, bias, dy, training=True):
    """Output, gradients and running statistics."""
    leaves = [cast(t.detach()).requires_grad_() for t in (x, weight, bias)]
    running = cast(torch.zeros_like(weight)), cast(torch.ones_like(weight))
    y = function(leaves[0], *running, *leaves[1:], training=training)
    return [y, *torch.autograd.grad(y, leaves, cast(dy)), *running]


@pytest.mark.parametrize("pair", PAIRS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(5, 3, 4, 5), (9, 2, 32, 32)], ids=str)
@pytest.mark.parametrize("name", LARGE_VALUES)
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
def test_large_values_are_as_right_as_small_ones(device, name, shape, dtype, pair, memory_format):
    """PyTorch's own results are zeros and NaN there."""
    x, dy = (t.to(device, dtype, memory_format=memory_format) for t in (LARGE_VALUES[name](shape), torch.randn(shape)))
    weight, bias = parameters(shape[1], device, dtype)
    ours = results(pair[0], torch.Tensor.clone, x, weight, bias, dy)
    truth = results(pair[1], torch.Tensor.double, x, weight, bias, dy)
    for actual, expected in zip(ours, truth):
        scale = x.abs().max().item() if expected is truth[4] else None  # of running_mean: rounding is that of values
        assert error(actual, expected.to(dtype), scale).rms < 16 * torch.finfo(dtype).eps


def test_large_values_outside_training(device):
    """Sums overflow in both directions on the way to gradients that are infinite, too."""
    x, dy = LARGE["1e38"]((4, 3, 8, 8)).to(device), torch.randn(4, 3, 8, 8, device=device)
    weight, bias = parameters(3, device)
    ours = results(batch_norm, torch.Tensor.clone, x, weight, bias, dy, training=False)
    truth = results(F.batch_norm, torch.Tensor.double, x, weight, bias, dy, training=False)
    for actual, expected in zip(ours, truth):
        assert error(actual, expected.float()).rms < 1e-6


@pytest.mark.parametrize("shape", [(5, 3, 4, 5), (9, 2, 32, 32)], ids=str)
def test_large_incoming_gradients(device, shape):
    """Their sums overflow, and so do the gradients of weight and bias, but not that of x."""
    x, dy = 1e20 * torch.randn(shape, device=device), 1e37 * (torch.rand(shape, device=device) + 0.5)
    weight, bias = parameters(shape[1], device)
    ours = results(batch_norm, torch.Tensor.clone, x, weight, bias, dy)
    truth = results(F.batch_norm, torch.Tensor.double, x, weight, bias, dy)
    assert truth[3].float().isinf().all()
    for actual, expected in zip(ours[:4], truth[:4]):
        scale = dy.double().sum().item() if expected is truth[2] else None  # of weight's gradient, a sum that cancels
        assert error(actual, expected.float(), scale).rms < 1e-6


def test_denormals(device):
    x = torch.randn(2, 3, 4, 5, device=device) * 1e-39
    running = torch.full((3,), 1e-39, device=device), torch.full((3,), 1e-39, device=device)
    for training in (True, False):
        y, expected = (f(x, *(r.clone() for r in running), training=training) for f in (batch_norm, F.batch_norm))
        torch.testing.assert_close(y, expected, rtol=0, atol=4e-36)  # -ftz=true flushes below 1.2e-38, times 316
