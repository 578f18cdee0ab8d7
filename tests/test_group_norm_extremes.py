"""Group norm of values and gradients that are large, small, constant, or not finite."""

import pytest
import torch
import torch.nn.functional as F
from norms import LARGE, parameters
from tolerance import check

from modelnew.functional import group_norm
from modelnew.parity import error

INF, NAN = float("inf"), float("nan")


@pytest.mark.parametrize("outlier", [0.0, 1e3], ids=["none", "first_value"])
@pytest.mark.parametrize("shape", [(3, 4, 5, 8), (1, 2, 90, 90)], ids=str)
def test_large_mean_and_small_variance(device, outlier, shape):
    x = 1e4 + torch.randn(shape, device=device)
    x[:, 0, 0, 0] += outlier
    y = group_norm(x, 2, eps=0)
    check(y, F.group_norm(x.double(), 2, eps=0), F.group_norm(x, 2, eps=0))


@pytest.mark.parametrize("value", [1e4 / 3, -3e38, 3.4e38])
def test_constant_group(device, value):
    x, (weight, bias) = torch.full((3, 2, 4, 5), value, device=device), parameters(2, device)
    assert torch.equal(group_norm(x, 1, weight, bias), bias.view(2, 1, 1).expand_as(x))


@pytest.mark.parametrize("values", [[NAN], [INF], [-INF], [INF, INF], [INF, -INF], [NAN, INF]], ids=str)
@pytest.mark.parametrize("place", [0, 7, 38])
@pytest.mark.parametrize("shape", [(2, 4, 4, 5), (2, 4, 50, 40)], ids=["whole", "chunks"])
def test_nan_and_inf(device, values, place, shape):
    x = torch.randn(shape, device=device)
    x[1, :2].view(-1)[place : place + len(values)] = torch.tensor(values, device=device)
    for memory_format in (torch.contiguous_format, torch.channels_last):
        y = group_norm(x.contiguous(memory_format=memory_format), 2)
        torch.testing.assert_close(y, F.group_norm(x, 2), equal_nan=True)


def test_nan_in_the_gradient(device):
    x, dy = torch.randn(2, 4, 4, 5, device=device, requires_grad=True), torch.randn(2, 4, 4, 5, device=device)
    dy[1, 2, 3, 1] = NAN
    weight, bias = parameters(4, device)
    ours, theirs = (
        torch.autograd.grad(f(x, 2, weight, bias), (x, weight, bias), dy) for f in (group_norm, F.group_norm)
    )
    for a, b in zip(ours, theirs):
        torch.testing.assert_close(a, b, equal_nan=True)


def results(function, cast, x, weight, bias, dy):
    """Output and gradients."""
    leaves = [cast(t.detach()).requires_grad_() for t in (x, weight, bias)]
    y = function(leaves[0], 2, *leaves[1:])
    return [y, *torch.autograd.grad(y, leaves, cast(dy))]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(3, 4, 5, 8), (1, 4, 90, 91)], ids=str)
@pytest.mark.parametrize("name", LARGE)
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
def test_large_values_are_as_right_as_small_ones(device, name, shape, dtype, memory_format):
    """PyTorch's own results are zeros and NaN there."""
    x, dy = (t.to(device, dtype, memory_format=memory_format) for t in (LARGE[name](shape), torch.randn(shape)))
    weight, bias = parameters(4, device, dtype)
    ours = results(group_norm, torch.Tensor.clone, x, weight, bias, dy)
    truth = results(F.group_norm, torch.Tensor.double, x, weight, bias, dy)
    for actual, expected in zip(ours, truth):
        assert error(actual, expected.to(dtype)).rms < 16 * torch.finfo(dtype).eps


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize(("shape", "bound"), [((3, 4, 5, 8), 1e-6), ((3, 4, 50, 48), 1e-5)], ids=["whole", "chunks"])
def test_large_incoming_gradients(device, shape, bound, memory_format):
    """Their sum over a group overflows; the gradient of x does not. bound: longer sums cancel more."""
    x, dy = 1e20 * torch.randn(shape, device=device), 5e36 * (torch.rand(shape, device=device) + 0.5)
    x, dy = (t.contiguous(memory_format=memory_format) for t in (x, dy))
    weight, bias = (p.detach().abs().requires_grad_() for p in parameters(4, device))
    ours = results(group_norm, torch.Tensor.clone, x, weight, bias, dy)
    truth = results(F.group_norm, torch.Tensor.double, x, weight, bias, dy)
    assert (dy.double() * weight.view(1, 4, 1, 1)).reshape(3, 2, -1).sum(2).float().isinf().any()
    for actual, expected in zip(ours, truth):
        assert error(actual, expected.float()).rms < bound


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("size", [20, 60], ids=["whole", "chunks"])
def test_sums_over_planes_that_overflow_and_cancel(device, size, memory_format):
    """The gradient of the bias is 1e38, the sum over a plane 8e38 and more."""
    x = torch.randn(2, 4, size, size, device=device).contiguous(memory_format=memory_format)
    dy = torch.full_like(x, 2e36)
    dy[1] *= 1e38 / (size * size * 2e36) - 1
    weight, bias = parameters(4, device)
    (dbias,) = torch.autograd.grad(group_norm(x, 2, weight, bias), bias, dy)
    torch.testing.assert_close(dbias, torch.full_like(bias, 1e38), rtol=1e-4, atol=0)


def test_denormals(device):
    x = torch.randn(2, 4, 4, 5, device=device) * 1e-39
    torch.testing.assert_close(group_norm(x, 2), F.group_norm(x, 2), rtol=0, atol=1e-36)  # -ftz=true flushes them
