"""Second derivatives: each operator against numerical ones, the model in every subset against PyTorch's."""

import contextlib
import copy
import itertools

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from tolerance import check
from torch.autograd import grad, gradcheck, gradgradcheck

from modelnew import Model, ModelNew, functional, layers, numerics
from modelnew.inline import operator
from modelnew.model import OPERATORS

pytestmark = pytest.mark.usefixtures("one_thread")

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def random(*shape, device):
    return torch.randn(shape, dtype=torch.float64, device=device, requires_grad=True)


def apart(*shape, device):
    """Values so far from each other that no small step changes which one is the largest."""
    size = torch.Size(shape).numel()
    return (torch.randperm(size, device=device).reshape(shape).double() / size * 3 - 1.5).requires_grad_()


def norm(function, training, channels=3, affine=True, **options):
    """`function`, with batch_norm's arguments, of x, weight and bias."""

    def call(x, weight=None, bias=None):
        mean = torch.linspace(-1, 1, channels, dtype=x.dtype, device=x.device)
        running = (None, None) if training else (mean, mean.square() + 0.5)
        return function(x, *running, weight, bias, training, **options)

    return call


def cases():
    def affine(device):
        return random(3, device=device), random(3, device=device)

    yield "tanh", functional.tanh, lambda d: (random(3, 4, device=d),)
    yield "tanh, strided", lambda x: functional.tanh(x.T), lambda d: (random(3, 4, device=d),)
    for window in ((2,), (3, 2, 1), (2, 1, 0, 2)):  # kernel_size, stride, padding, dilation

        def pool(x, window=window):
            return functional.max_pool2d(x, *window)

        yield f"max_pool2d {window}", pool, lambda d: (apart(2, 2, 5, 6, device=d),)
    for training in (True, False):
        for name in ("batch_norm", "batch_norm_tanh", "bn_tanh_max_pool2d"):
            call = norm(getattr(functional, name), training)
            yield f"{name}, training={training}", call, lambda d: (apart(2, 3, 4, 2, device=d), *affine(d))
            yield f"{name}, training={training}, no weight", call, lambda d: (apart(2, 3, 4, 2, device=d),)
    yield "tanh_max_pool2d", lambda x: functional.tanh_max_pool2d(x, 2), lambda d: (apart(2, 2, 5, 6, device=d),)
    yield (
        "group_norm",
        lambda *t: functional.group_norm(t[0], 1, *t[1:]),
        lambda d: (random(2, 3, 4, device=d), *affine(d)),
    )
    yield "group_norm, no weight", lambda x: functional.group_norm(x, 3), lambda d: (random(2, 3, 4, device=d),)
    conv = {"stride": (2, 1), "padding": 1, "output_padding": (1, 0), "groups": 2, "dilation": (1, 2)}
    yield (
        "conv_transpose2d",
        lambda x, w, b: functional.conv_transpose2d(x, w, b, **conv),
        lambda d: (random(2, 4, 3, 2, device=d), random(4, 1, 3, 2, device=d), random(2, device=d)),
    )


CASES = {name: (function, inputs) for name, function, inputs in cases()}


@pytest.mark.parametrize("name", CASES)
def test_gradgradcheck(device, name):
    function, inputs = CASES[name]
    assert gradgradcheck(function, inputs(device))


@pytest.mark.parametrize("name", CASES)
def test_third_order(device, name):
    function, inputs = CASES[name]

    def gradients(*tensors):
        return grad(function(*tensors).pow(3).sum(), tensors, create_graph=True)

    assert gradgradcheck(gradients, inputs(device), fast_mode=True)


@pytest.mark.parametrize("name", CASES)
def test_some_inputs_alone(device, name):
    """One input after the other, while the others need no gradient."""
    function, inputs = CASES[name]
    for i, _ in enumerate(tensors := inputs(device)):
        for t in tensors:
            t.requires_grad_(t is tensors[i])
        (g,) = grad(function(*tensors).pow(3).sum(), tensors[i], create_graph=True)
        assert g.requires_grad
        assert gradgradcheck(function, tensors, fast_mode=True)


def test_one_tensor_in_two_places(device):
    x = torch.randn(2, 2, 2, 2, dtype=torch.float64, device=device, requires_grad=True)
    assert gradgradcheck(lambda x: functional.conv_transpose2d(x, x, padding=1), x)
    w = torch.randn(2, dtype=torch.float64, device=device, requires_grad=True)
    assert gradgradcheck(lambda x, w: functional.group_norm(x, 1, w, w), (x, w))


PAIRS = {
    "tanh": (functional.tanh, torch.tanh),
    "batch_norm": (norm(functional.batch_norm, True), norm(F.batch_norm, True)),
    "group_norm": (lambda x: functional.group_norm(x, 1), lambda x: F.group_norm(x, 1)),
    "max_pool2d": (lambda x: functional.max_pool2d(x, 3, 2), lambda x: F.max_pool2d(x, 3, 2)),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", PAIRS)
def test_as_exact_as_torch(device, name, dtype):
    """Gradients of a gradient penalty beside PyTorch's, in every type."""
    ours, theirs = PAIRS[name]
    x = torch.randn(4, 3, 9, 9, device=device).to(dtype)
    results = []
    for function, leaf in ((ours, x), (theirs, x), (theirs, x.double())):
        leaf = leaf.clone().requires_grad_()
        weights = torch.linspace(-1, 2, 81, device=device).view(9, 9).to(leaf.dtype)
        (g,) = grad((function(leaf) ** 3).sum(), leaf, create_graph=True)
        results.append(grad((g * g * weights).sum() / 64, leaf)[0])  # PyTorch's sums stay finite in float16
    check(results[0], results[2], results[1], name, terms=81 * 12)


def _gradient_penalty(critic, real, fake, alpha):
    """The step of Gulrajani et al., "Improved training of Wasserstein GANs": the critic's loss."""
    mixed = (alpha * real + (1 - alpha) * fake).requires_grad_()
    (g,) = grad(critic(mixed).sum(), mixed, create_graph=True)
    return critic(fake).mean() - critic(real).mean() + 10 * ((g.flatten(1).norm(dim=1) - 1) ** 2).mean()


def _score(y):
    """A number an image. (Of a group norm's output alone, sums of squares hardly change.)"""
    return (
        (y * torch.linspace(-1, 1, y[0].numel(), dtype=y.dtype, device=y.device).cos().view(y.shape[1:]))
        .flatten(1)
        .sum(1)
    )


def _gradients(model, wrap, dtype, device):
    model = copy.deepcopy(model).to(dtype)
    generator = torch.Generator().manual_seed(3)
    real, fake, alpha = (
        torch.rand(shape, generator=generator, dtype=torch.float64).to(device, dtype)
        for shape in ((4, 16, 6, 6), (4, 16, 6, 6), (4, 1, 1, 1))
    )
    wrap(model, real, fake, alpha).backward()
    return {name: p.grad for name, p in model.named_parameters() if name not in _ZERO}


# Gradients that are 0 in mathematics: the score is linear in the last bias, and batch norm takes out the first.
_ZERO = ("conv_transpose.bias", "group_norm.bias")
ARGUMENTS = (16, 16, 3, 1, 1, 1, 4)


def _models(device, **options):
    torch.manual_seed(1)
    model, model_new = Model(*ARGUMENTS, device=device), ModelNew(*ARGUMENTS, numerics="fp32", device=device, **options)
    model_new.load_state_dict(model.state_dict())
    return model, model_new


def _relative(ours, truth):
    return {name: float((ours[name].double() - truth[name]).norm() / truth[name].norm()) for name in truth}


@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
def test_gradient_penalty_of_the_fused_model(device, training):
    """Where a backward recomputes what the fused kernels did not keep."""

    def loss(model, *args):
        return _gradient_penalty(lambda x: _score(model.train(training)(x)), *args)

    model, model_new = _models(device)
    truth = _gradients(model, loss, torch.float64, device)
    ours = _relative(_gradients(model_new, loss, torch.float32, device), truth)
    theirs = _relative(_gradients(model, loss, torch.float32, device), truth)
    assert all(ours[name] <= 2 * theirs[name] + 1e-6 for name in truth), (ours, theirs)


@pytest.mark.parametrize("replace", [s for n in range(6) for s in itertools.combinations(OPERATORS, n)], ids="-".join)
def test_gradient_penalty_of_every_subset(device, replace):
    """In float64 both models round so little that the winners are the same."""

    def loss(model, *args):
        return _gradient_penalty(lambda x: _score(model(x)), *args)

    model, model_new = _models(device, replace=replace)
    expected = _gradients(model, loss, torch.float64, device)
    for name, gradient in _gradients(model_new, loss, torch.float64, device).items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("replace", ["all", "tanh"])
def test_hessian_vector_product(device, replace):
    model, model_new = (m.double() for m in _models(device, replace=replace))
    x = torch.rand(2, 16, 4, 4, dtype=torch.float64, device=device)
    v = torch.randn_like(x)
    results = [torch.autograd.functional.hvp(lambda x, m=m: m(x).pow(3).sum(), x, v)[1] for m in (model, model_new)]
    assert results[0].abs().max() > 1e-3
    torch.testing.assert_close(results[1], results[0], rtol=1e-8, atol=1e-10)


def test_hessian(device):
    x = torch.randn(5, dtype=torch.float64, device=device)
    found = torch.autograd.functional.hessian(lambda x: functional.tanh(x).sum(), x)
    torch.testing.assert_close(found, torch.autograd.functional.hessian(lambda x: x.tanh().sum(), x))


@pytest.mark.parametrize(
    "layer",
    [
        layers.ConvTranspose2d(3, 4, 3, 2),
        layers.BatchNorm2d(3),
        layers.Tanh(),
        layers.MaxPool2d(2),
        layers.GroupNorm(1, 3),
    ],
    ids=lambda layer: type(layer).__name__,
)
def test_layers(device, layer):
    layer = copy.deepcopy(layer).double().to(device)
    assert gradgradcheck(layer, apart(2, 3, 4, 4, device=device), fast_mode=True)


def test_a_first_gradient_has_the_same_bits_with_and_without_a_graph(device):
    for function in (functional.tanh, lambda x: functional.group_norm(x, 1), lambda x: functional.max_pool2d(x, 2)):
        x = torch.randn(2, 3, 6, 6, device=device, requires_grad=True)
        y = function(x)
        dy = torch.randn_like(y)
        (first,) = grad(y, x, dy, retain_graph=True)
        (again,) = grad(y, x, dy, create_graph=True)
        assert torch.equal(first, again)
        assert not first.requires_grad


def test_the_backward_takes_the_forwards_numerics(device, launched, wgmma):
    """Whatever is switched between a forward and its backward."""
    model = ModelNew(*ARGUMENTS, numerics="tf32", device=device)
    x = torch.rand(2, 16, 6, 6, device=device, requires_grad=True)
    conv = functional.conv_transpose2d

    def gradients(switched):
        torch.manual_seed(0)
        results = []
        for y in (model(x), conv(x, model.conv_transpose.weight, padding=1, numerics="tf32")):
            launched.clear()
            with switched():
                results.append(grad(y, x, torch.randn(y.shape).to(device))[0])
            results.append([str(kernel) for kernel in launched])
        return results

    expected = gradients(contextlib.nullcontext)
    for switched in (numerics.without_tensor_cores, lambda: numerics.wgmma(not wgmma), lambda: torch.autocast(device)):
        for a, b in zip(expected, gradients(switched), strict=True):
            assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


@pytest.mark.parametrize(
    "function",
    [lambda x: functional.batch_norm(x, None, None, training=True), lambda x: functional.group_norm(x, 1)],
    ids=["batch_norm", "group_norm"],
)
def test_hooks_of_saved_tensors(device, function):
    """They stay on in the second backward, too."""

    def second(x):
        (gradient,) = grad(function(x).sin().sum(), x, create_graph=True)
        return grad(gradient.square().sum(), x)[0]

    x = random(2, 3, 4, 5, device=device)
    with torch.autograd.graph.save_on_cpu():
        found = second(x)
    assert torch.equal(found, second(x))


def test_running_statistics_changed_before_a_backward_in_evaluation(device):
    """torch refuses that, too."""
    x = torch.randn(2, 16, 6, 6, device=device, requires_grad=True)
    for module in (layers.BatchNorm2d(16).to(device), ModelNew(*ARGUMENTS, device=device)):
        y = module.eval()(x)
        with torch.no_grad():
            (module if isinstance(module, layers.BatchNorm2d) else module.batch_norm).running_mean.add_(1)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            y.sum().backward()


CUBE = """
#include "common.cuh"
extern "C" __global__ void cube(const scalar_t* x, scalar_t* y, i64 size) {
    i64 i = (i64)blockIdx.x * blockDim.x + threadIdx.x;
    if (i < size) y[i] = from_acc<scalar_t>(to_acc(x[i]) * to_acc(x[i]) * to_acc(x[i]));
}
extern "C" __global__ void cube_backward(const scalar_t* dy, const scalar_t* x, scalar_t* dx, i64 size) {
    i64 i = (i64)blockIdx.x * blockDim.x + threadIdx.x;
    if (i < size) dx[i] = from_acc<scalar_t>(3 * to_acc(dy[i]) * to_acc(x[i]) * to_acc(x[i]));
}
extern "C" __global__ void cube_second(
    const scalar_t* ddx, const scalar_t* dy, const scalar_t* x, scalar_t* ddy, scalar_t* dx, i64 size) {
    i64 i = (i64)blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= size) return;
    acc_t v = to_acc(x[i]), g = to_acc(ddx[i]);
    ddy[i] = from_acc<scalar_t>(3 * g * v * v);
    dx[i] = from_acc<scalar_t>(6 * g * to_acc(dy[i]) * v);
}"""


def test_inline_operators_refuse_second_derivatives(device):
    cube = operator(CUBE, "cube", "cube_backward")
    x = torch.randn(4, dtype=torch.float64, device=device, requires_grad=True)
    assert gradcheck(cube, x)
    for y in (cube(x).sum(), (cube(x) * x).sum()):  # the gradient coming in: one that needs none, one that does
        (g,) = grad(y, x, create_graph=True)
        with pytest.raises(RuntimeError, match="the gradient of cube is computed by a kernel"):
            grad(g.sum(), x)
    with pytest.raises(RuntimeError, match="operator with a backward of its own"):
        torch.autograd.functional.hessian(lambda x: cube(x).sum(), x)


def test_inline_operators_with_a_second_backward(device):
    gradient = operator(CUBE, "cube_backward", "cube_second")
    cube = operator(CUBE, "cube", gradient)
    x = torch.randn(4, dtype=torch.float64, device=device, requires_grad=True)
    assert gradcheck(cube, x)
    assert gradgradcheck(cube, x)
    (g,) = grad(cube(x).sum(), x, create_graph=True)
    (h,) = grad(g.sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="the gradient of cube_backward is computed by a kernel"):
        grad(h.sum(), x)


def test_inline_operators_name_what_does_not_fit():
    other = CUBE.replace("void cube(const scalar_t* x", "void cube(const scalar_t* z")
    with pytest.raises(ValueError, match=r"const pointer x matches nothing of cube"):
        operator(other, "cube", operator(CUBE, "cube_backward"))
    with pytest.raises(TypeError, match="a name or an operator"):
        operator(CUBE, "cube", 3)


@pytest.mark.parametrize("scale", [1e-4, 1.0, 1e14, 3e19])
@pytest.mark.parametrize("name", ["batch_norm", "group_norm"])
def test_values_far_from_one(device, name, scale):
    """Powers of 1 / std, of which second derivatives are made, leave float32's range."""
    ours, theirs = PAIRS[name]
    results = []
    for function, dtype in ((ours, torch.float32), (theirs, torch.float64)):
        values = torch.randn(4, 3, 5, 5, generator=torch.Generator().manual_seed(1)) * scale
        leaf = values.to(device, dtype).requires_grad_()
        (g,) = grad((function(leaf) ** 3).sum(), leaf, create_graph=True)
        results.append(grad((g * scale).square().sum(), leaf)[0].double() * scale)
    expected = results[1]
    assert (results[0] - expected).norm() < 1e-4 * expected.norm()


def test_an_empty_batch(device):
    for function in (norm(functional.batch_norm, True, 4), lambda x: functional.group_norm(x, 2)):
        x = torch.randn(0, 4, 3, 3, device=device, requires_grad=True)
        y = function(x)
        (g,) = grad(y.square().sum(), x, create_graph=True)
        (y.sum() + g.square().sum()).backward()
        assert x.grad.shape == x.shape


@pytest.mark.parametrize("name", PAIRS)
def test_forward_mode_is_refused(device, name):
    """A tangent that is dropped would be a derivative of 0."""
    x = torch.randn(2, 3, 9, 9, device=device)
    with torch.autograd.forward_ad.dual_level(), pytest.raises(RuntimeError, match="jvp"):
        PAIRS[name][0](torch.autograd.forward_ad.make_dual(x, x))


def test_numbers_that_are_equal_and_differ(device):
    """0.0 == -0.0, and a macro 2 == 2.0."""
    text = """#include "common.cuh"
    extern "C" __global__ void sign_of(const scalar_t* x, scalar_t* y, float slope, i64 size) {
        i64 i = (i64)blockIdx.x * blockDim.x + threadIdx.x;
        if (i < size) y[i] = from_acc<scalar_t>(copysign(to_acc(x[i]) * (1 / K), slope));
    }"""
    x = torch.ones(3, device=device)
    whole, real = (operator(text, "sign_of", defines={"K": k}) for k in (2, 2.0))
    one = operator(text, "sign_of", defines={"K": 1})
    assert whole(x, 1.0).tolist() == [0] * 3
    assert real(x, 1.0).tolist() == [0.5] * 3
    for slope in (0, np.float32(-0.0), 0.0, -0.0, np.float64(-0.0), 0):
        assert one(x, slope).tolist() == [float(np.copysign(1, slope))] * 3


def test_frozen_norm_without_parameters_of_channels_last_input(device):
    """Its dx does not depend on x, which is not kept; dy has the other memory format."""
    x = torch.randn(2, 3, 4, 5, device=device).contiguous(memory_format=torch.channels_last).requires_grad_()
    dy = torch.randn(2, 3, 4, 5, device=device, requires_grad=True)
    mean, var, v = torch.randn(3, device=device), torch.rand(3, device=device) + 0.5, torch.randn_like(dy)
    (g,) = grad(functional.batch_norm(x, mean, var), x, dy, create_graph=True)
    factor = (var + 1e-5).rsqrt().view(3, 1, 1)
    torch.testing.assert_close(g, dy * factor)
    torch.testing.assert_close(grad((g * v).sum(), dy)[0], v * factor)
