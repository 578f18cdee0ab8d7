"""torch.func, and the functions of torch.autograd that transform: right, or refused by name."""

import copy

import pytest
import torch
import torch.nn.functional as F
from test_registration import ELEMENTWISE, FUSED
from torch import nn
from torch.autograd import forward_ad
from torch.autograd import functional as autograd
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, stack_module_state, vjp, vmap

from modelnew import Model, ModelNew, Sequential, functional, layers

CONV = torch.randn(4, 2, 3, 3, dtype=torch.float64)
WEIGHT, BIAS = torch.rand(4, dtype=torch.float64) + 0.5, torch.randn(4, dtype=torch.float64)
STATISTICS = torch.randn(4, dtype=torch.float64), torch.rand(4, dtype=torch.float64) + 0.5
# {function: (ours, torch's)}
FUNCTIONS = {
    **{name: (getattr(functional, name), getattr(F, name)) for name in ELEMENTWISE},
    "leaky_relu": (functional.leaky_relu, F.leaky_relu),
    "max_pool2d": (lambda x: functional.max_pool2d(x, 3, 2, 1), lambda x: F.max_pool2d(x, 3, 2, 1)),
    "group_norm": (lambda x: functional.group_norm(x, 2, WEIGHT, BIAS), lambda x: F.group_norm(x, 2, WEIGHT, BIAS)),
    "batch_norm": (
        lambda x: functional.batch_norm(x, None, None, WEIGHT, BIAS, training=True),
        lambda x: F.batch_norm(x, None, None, WEIGHT, BIAS, training=True),
    ),
    "batch_norm_tanh": (
        lambda x: functional.batch_norm_tanh(x, *STATISTICS, WEIGHT, BIAS),
        lambda x: F.batch_norm(x, *STATISTICS, WEIGHT, BIAS).tanh(),
    ),
    "tanh_max_pool2d": (lambda x: functional.tanh_max_pool2d(x, 2), lambda x: F.max_pool2d(x.tanh(), 2)),
    "bn_tanh_max_pool2d": (
        lambda x: functional.bn_tanh_max_pool2d(x, None, None, WEIGHT, BIAS, training=True),
        lambda x: F.max_pool2d(F.batch_norm(x, None, None, WEIGHT, BIAS, training=True).tanh(), 2),
    ),
    "conv_transpose2d": (
        lambda x: functional.conv_transpose2d(x, CONV, stride=2),
        lambda x: F.conv_transpose2d(x, CONV, stride=2),
    ),
}


def loss(function):
    return lambda x: function(x).square().sum()


def second(function):
    """The gradient of a norm of the gradient."""
    return grad(lambda x: grad(loss(function))(x).square().sum())


TRANSFORMS = {
    "grad": lambda f, x: grad(loss(f))(x),
    "vjp": lambda f, x: vjp(f, x)[1](f(x)),
    "grad of grad": lambda f, x: second(f)(x),
    "vjp of grad": lambda f, x: vjp(grad(loss(f)), x)[1](x.cos()),
    "grad of vjp": lambda f, x: grad(lambda x: vjp(f, x)[1](f(x))[0].square().sum())(x),
    "vmap": lambda f, x: vmap(f, in_dims=1, out_dims=2)(torch.stack([x, 2 * x, -x], 1)),
    "vmap of grad": lambda f, x: vmap(grad(loss(f)))(torch.stack([x, 2 * x])),
    "vmap of vjp": lambda f, x: vmap(lambda x: vjp(f, x)[1](f(x)))(torch.stack([x, 2 * x])),
    "vmap of vjp of grad": lambda f, x: vmap(lambda x: vjp(grad(loss(f)), x)[1](x.cos()))(torch.stack([x, 2 * x])),
    "vmap of vmap": lambda f, x: vmap(vmap(f))(torch.stack([torch.stack([x, 2 * x])] * 2)),
    "jacrev": lambda f, x: jacrev(lambda x: f(x).flatten()[:3])(x),
    "hvp": lambda f, x: autograd.hvp(loss(f), x, x.cos())[1],
    "vhp": lambda f, x: autograd.vhp(loss(f), x, x.cos())[1],
    "jvp by two vjps": lambda f, x: autograd.jvp(f, x, x.cos())[1],
    "jacobian": lambda f, x: autograd.jacobian(lambda x: f(x).flatten()[:3], x),
}


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_transform(name, transform):
    x = torch.randn(2, 4, 5, 4, dtype=torch.float64)
    ours, expected = (TRANSFORMS[transform](function, x) for function in FUNCTIONS[name])
    torch.testing.assert_close(ours, expected)


def test_vmap_of_vjp_of_max_pooling_in_channels_last():
    x = torch.randn(3, 2, 5, 4, 4, dtype=torch.float64).movedim(-1, 2)
    ours, expected = (vmap(lambda x, f=f: vjp(f, x)[1](f(x)))(x) for f in FUNCTIONS["max_pool2d"])
    torch.testing.assert_close(ours, expected)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_vmap_over_no_elements(name):
    ours, theirs = FUNCTIONS[name]
    x = torch.randn(2, 0, 4, 5, 4, dtype=torch.float64)
    found = vmap(ours, in_dims=1)(x)
    assert found.shape == (0, *theirs(x.new_ones(2, 4, 5, 4)).shape)
    assert found.dtype == x.dtype


def pair():
    model, model_new = Model(*FUSED, device="cpu").eval(), ModelNew(*FUSED, numerics="fp32", device="cpu").eval()
    model_new.load_state_dict(model.state_dict())
    return model, model_new


def test_gradients_of_the_fused_model_by_image():
    """Beside those of one image after the other, by autograd."""
    _, model_new = pair()
    parameters, buffers = dict(model_new.named_parameters()), dict(model_new.named_buffers())
    x = torch.randn(3, 16, 6, 6)

    def objective(parameters, image):
        return functional_call(model_new, (parameters, buffers), (image[None],)).square().sum()

    found = vmap(grad(objective), in_dims=(None, 0))(parameters, x)
    for index, image in enumerate(x):
        expected = torch.autograd.grad(model_new(image[None]).square().sum(), list(parameters.values()))
        for gradient, name in zip(expected, parameters):
            torch.testing.assert_close(found[name][index], gradient, rtol=1e-4, atol=1e-4, msg=name)


@pytest.mark.filterwarnings("error")  # torch's own way round a missing rule warns, and refuses to train
@pytest.mark.parametrize("training", [True, False])
def test_an_ensemble_of_fused_models(training):
    models = [pair()[1].train(training) for _ in range(2)]
    parameters, buffers = stack_module_state(models)
    base, x = copy.deepcopy(models[0]).to("meta"), torch.randn(3, 16, 6, 6)
    found = vmap(lambda *state: functional_call(base, state, (x,)))(parameters, buffers)
    torch.testing.assert_close(found, torch.stack([model(x) for model in models]))
    for name, buffer in buffers.items():
        torch.testing.assert_close(buffer, torch.stack([model.state_dict()[name] for model in models]))


def test_training_under_grad():
    """The statistics of the batch are taken up, once, as in a call without a transform."""
    model_new = pair()[1].train()
    expected = pair()[1].train()
    expected.load_state_dict(model_new.state_dict())
    x = torch.randn(3, 16, 6, 6)
    found = grad(lambda p: functional_call(model_new, p, (x,)).square().sum())(dict(model_new.named_parameters()))
    gradients = torch.autograd.grad(expected(x).square().sum(), list(expected.parameters()))
    for gradient, name in zip(gradients, found):
        torch.testing.assert_close(found[name], gradient, rtol=1e-3, atol=1e-3, msg=name)
    assert model_new.batch_norm.num_batches_tracked == 1
    assert all(map(torch.equal, model_new.buffers(), expected.buffers()))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("stride", [1, 2])  # with 2, the five layers run as three operators
def test_vjp_and_jacrev_of_fused_layers(stride, training):
    """torch.func runs these backwards after its transform has ended."""
    ours, theirs = (
        kind(
            of.ConvTranspose2d(16, 16, 3, stride, 1),
            of.BatchNorm2d(16),
            of.Tanh(),
            of.MaxPool2d(2),
            of.GroupNorm(4, 16),
        ).train(training)
        for kind, of in ((Sequential, layers), (nn.Sequential, nn))
    )
    ours.load_state_dict(theirs.state_dict())
    buffers, x = dict(theirs.named_buffers()), torch.randn(2, 16, 6, 6)
    found, expected = [], []
    for network, gradients in ((ours, found), (theirs, expected)):
        parameters = {name: p.detach() for name, p in network.named_parameters()}

        def call(parameters, x, network=network):
            return functional_call(network, (parameters, {k: v.clone() for k, v in buffers.items()}), (x,))

        y, pull_back = vjp(call, parameters, x)
        gradients += pull_back(y.cos()), jacrev(lambda x: call(parameters, x)[0, 0, 0, :2])(x)  # noqa: B023
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)
    assert not any(gradient.requires_grad for gradient in (*found[0][0].values(), found[0][1], found[1]))


def test_vjp_for_the_input_depends_on_the_parameters():
    """Those require gradients outside of the transform."""
    results = []
    for model in pair():
        x = torch.randn(2, 16, 6, 6, generator=torch.Generator().manual_seed(3))
        y, pull_back = vjp(model, x)
        results.append(torch.autograd.grad(pull_back(y.detach().cos())[0].square().sum(), model.conv_transpose.weight))
    torch.testing.assert_close(*results, rtol=1e-3, atol=1e-3)


def test_second_derivative_of_the_fused_model():
    model, model_new = (m.double() for m in pair())
    x = torch.randn(2, 16, 6, 6)
    torch.testing.assert_close(second(model_new.float())(x).double(), second(model)(x.double()), rtol=1e-3, atol=1e-3)


def test_vmap_over_statistics_of_a_batch():
    layer, x = layers.BatchNorm2d(4), torch.randn(3, 2, 4, 5, 5)
    with pytest.raises(RuntimeError, match=r"vmap: each element.*running_mean of modelnew\.batch_norm"):
        vmap(layer)(x)
    means, variances = torch.zeros(3, 4), torch.ones(3, 4)
    vmap(lambda x, mean, var: functional.batch_norm(x, mean, var, training=True))(x, means, variances)
    for image, mean, var in zip(x, means, variances):
        expected = torch.zeros(4), torch.ones(4)
        F.batch_norm(image, *expected, training=True)
        torch.testing.assert_close((mean, var), expected)


def in_dual_level(function, x):
    with forward_ad.dual_level():
        return function(forward_ad.make_dual(x, x))


FORWARD = {
    "jvp": lambda f, x: jvp(f, (x,), (x,)),
    "jacfwd": lambda f, x: jacfwd(f)(x),
    "hessian": lambda f, x: hessian(loss(f))(x),
    "jvp of grad": lambda f, x: jvp(grad(loss(f)), (x,), (x,)),
    "grad of jvp": lambda f, x: grad(lambda x: jvp(f, (x,), (x,))[1].sum())(x),
    "jacobian, forward": lambda f, x: autograd.jacobian(f, x, vectorize=True, strategy="forward-mode"),
    "dual tensors": in_dual_level,
}


@pytest.mark.parametrize("transform", FORWARD)
@pytest.mark.parametrize("name", ["tanh", "batch_norm", "conv_transpose2d"])
def test_forward_mode_is_refused(name, transform):
    with pytest.raises(RuntimeError, match=f"{name}.*has no forward-mode derivative.*use reverse mode"):
        FORWARD[transform](FUNCTIONS[name][0], torch.randn(2, 4, 3, 3, dtype=torch.float64))


def test_a_dual_level_without_tangents():
    x = torch.randn(2, 4, 5, 5, requires_grad=True)
    with forward_ad.dual_level():
        y = functional.tanh(x)
        assert torch.equal(torch.autograd.grad(y.sum(), x)[0], torch.autograd.grad(functional.tanh(x).sum(), x)[0])
    assert torch.equal(y, functional.tanh(x))


@pytest.mark.parametrize("name", FUNCTIONS)
def test_batches_of_gradients_are_refused(name):
    x, function = torch.randn(2, 4, 5, 4, dtype=torch.float64), FUNCTIONS[name][0]
    with pytest.raises(RuntimeError, match=r"the backward of \w+ takes one gradient.*use torch\.func\.jacrev"):
        autograd.jacobian(lambda x: function(x).flatten()[:3], x, vectorize=True)
    with pytest.raises(RuntimeError, match=r"the backward of \w+ takes one gradient.*use torch\.func\.jacrev"):
        autograd.hessian(loss(function), x, vectorize=True)
