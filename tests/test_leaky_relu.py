import re

import pytest
import torch
import torch.nn.functional as F
from strided import IN_EVERY_LAYOUT

from modelnew.functional import leaky_relu
from modelnew.layers import LeakyReLU

DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]
LAYERS = [({}, (2, 3, 4)), ({"negative_slope": 0.3}, (5,)), ({"negative_slope": -2}, (2, 3, 1, 2))]


def both(make_input, dy=None, **options):
    """[output, gradient] of ours and of torch's."""
    found = []
    for function in (leaky_relu, F.leaky_relu):
        x = make_input().detach().requires_grad_()
        y = function(x, **options)
        found.append([y, *torch.autograd.grad(y, x, torch.ones_like(y) if dy is None else dy)])
    return found


def assert_same_bits(ours, theirs):
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)
        numbers = ~b.isnan()
        assert torch.equal(torch.signbit(a[numbers]), torch.signbit(b[numbers]))


@pytest.mark.parametrize("slope", [0.01, 0, 1.5, -0.3])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(), (1,), (7, 1, 3), (2, 3, 17, 5), (0, 4)], ids=str)
def test_equals_torch(device, dtype, shape, slope):
    x, dy = torch.randn(2, *shape, device=device).to(dtype)
    before = x.clone()
    assert_same_bits(*both(lambda: x, dy, negative_slope=slope))
    assert torch.equal(x, before)


@pytest.mark.parametrize("slope", [0.01, 0, -0.3])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_special_values(device, dtype, slope):
    """Signed zeros, infinities, NaN, denormals and the largest values: as inputs, and as gradients of each other."""
    limits = torch.finfo(dtype)
    least = limits.smallest_normal * limits.eps
    positive = [0.0, least, 3 * least, limits.smallest_normal, 1.0, limits.max, float("inf"), float("nan")]
    values = torch.tensor([*positive, *(-v for v in positive)], dtype=torch.float64).to(device, dtype)
    x, dy = torch.cartesian_prod(values, values).T.contiguous()
    assert_same_bits(*both(lambda: x, dy, negative_slope=slope))


@IN_EVERY_LAYOUT
def test_layouts(device, make):
    x = torch.randn(3, 4, 6, 5, device=device)
    ours, theirs = both(lambda: make(x))
    assert_same_bits(ours, theirs)
    assert [t.stride() for t in ours] == [t.stride() for t in theirs]


def test_derivatives(device):
    x = torch.randn(3, 5, dtype=torch.float64, device=device, requires_grad=True)
    assert torch.autograd.gradcheck(leaky_relu, x)
    assert torch.autograd.gradgradcheck(leaky_relu, x)
    (g,) = torch.autograd.grad(leaky_relu(x).sum(), x, create_graph=True)
    assert torch.equal(*torch.autograd.grad(g.sum(), x), torch.zeros_like(x))  # 0, as torch's, and not unused


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradient_penalty_equals_torchs(device, dtype):
    x = torch.randn(4, 9, device=device).to(dtype)
    found = []
    for function in (leaky_relu, F.leaky_relu):
        leaf = x.clone().requires_grad_()
        (g,) = torch.autograd.grad((function(leaf, 0.3) ** 2).sum(), leaf, create_graph=True)
        found.append([g, *torch.autograd.grad((g * g).sum(), leaf)])
    assert_same_bits(*found)


def test_slopes_that_change_from_call_to_call(device):
    x = torch.tensor([-1.0, 2.0], device=device)
    for slope in (0.5, 0.25, torch.tensor(0.125), 2):
        assert leaky_relu(x, slope).tolist() == [-slope, 2]


def test_bad_arguments_are_refused(device):
    x = torch.ones(3, device=device)
    with pytest.raises(TypeError, match=r"float32.*received torch.int64"):
        leaky_relu(torch.arange(3, device=device))
    with pytest.raises(TypeError, match=r"negative_slope must be a number, received 'a'"):
        leaky_relu(x, "a")
    for slope in (1e300, -1e39):
        with pytest.raises(RuntimeError):
            F.leaky_relu(x, slope)
        with pytest.raises(ValueError, match=rf"slope={re.escape(str(slope))} does not fit float32, which holds -3.4"):
            leaky_relu(x, slope)
        leaky_relu(x, 0.5)  # the plan of this call takes any slope
        assert torch.equal(leaky_relu(-x.double(), slope), F.leaky_relu(-x.double(), slope))
    for call in (lambda: leaky_relu(x, inplace=True), lambda: LeakyReLU(0.1, True)):
        with pytest.raises(ValueError, match=r"received inplace=True; .* pass inplace=False"):
            call()
