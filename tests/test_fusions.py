"""`modelnew.Sequential`, and the chain with LeakyReLU. The chain's parity in every mode: tests/test_conv_bn_pool.py."""

import copy
import functools
import inspect
import re
from collections import OrderedDict

import numpy as np
import pytest
import tolerance
import torch
import torch.nn.functional as F
from faults import planted
from torch import nn

import modelnew
from cupy_kernels.errors import UnsupportedError
from modelnew import functional, fusions, layers, onnx
from modelnew.functional.traced.conv_bn_pool import conv_bn_activation_max_pool_group_norm_or_parts

FUSED = {"conv_bn_pool", "pooled_forward"}


def chain(module, activation, channels=16):
    """Layers of torch.nn or of ours. activation: a layer's name, or LeakyReLU's slope."""
    return [
        module.ConvTranspose2d(16, channels, 3, 1, 1),
        module.BatchNorm2d(channels),
        getattr(module, activation)() if isinstance(activation, str) else module.LeakyReLU(activation),
        module.MaxPool2d(2),
        module.GroupNorm(4, channels),
    ]


def pair(device, *activations, batch=2):
    """Chains one after the other, a module between, as torch.nn.Sequential and as ours; a batch."""
    found = []
    for module, sequential in ((nn, nn.Sequential), (layers, modelnew.Sequential)):
        parts = [layer for a in activations for layer in (*chain(module, a), nn.Softsign())]
        found.append(sequential(*parts).to(device))
    theirs, ours = found
    with torch.no_grad():
        for p in theirs.parameters():
            p.add_(torch.randn_like(p) / 2)
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours, torch.randn(batch, 16, 8, 8, device=device)


def gradients(model, x):
    """Output, gradients of x and of all parameters, and running statistics."""
    x = x.to(next(model.parameters()).dtype).requires_grad_()
    y = model(x)
    names = ["x", *(name for name, _ in model.named_parameters())]
    found = torch.autograd.grad(y.square().sum(), [x, *model.parameters()])
    statistics = {name: b for name, b in model.named_buffers() if b.is_floating_point()}
    return {"output": y.detach(), **dict(zip(names, found)), **statistics}


def check(found, truth, reference, names):
    for name in names:
        tolerance.check(found[name], truth[name], reference[name], name)


@pytest.mark.parametrize("row", fusions.CHAINS, ids=lambda row: row.activation)
def test_every_chain_runs_as_one_operator(device, launched, row):
    theirs, ours, x = pair(device, row.kinds[2].__name__)
    truth = gradients(copy.deepcopy(theirs).double(), x)
    reference = gradients(theirs, x)
    launched.clear()
    check(gradients(ours, x), truth, reference, truth.keys() - {"0.bias"})
    assert FUSED.issubset(k.name for k in launched)


def test_chains_one_after_the_other(device, launched):
    theirs, ours, x = pair(device, 0.2, "Tanh")
    truth = gradients(copy.deepcopy(theirs).double(), x)
    reference = gradients(theirs, x)
    launched.clear()
    found = gradients(ours, x)
    names = [k.name for k in launched]
    assert [names.count(name) for name in ("conv_bn_pool", "pooled_forward", "pooled_backward")] == [2, 2, 2]
    assert {"batch_norm_apply", "group_norm_forward"}.isdisjoint(names)
    structs = [dict(k.defines)["ACTIVATION"] for k in launched if k.name == "pooled_forward"]
    assert structs == ["LeakyReLU", "Tanh"]
    zero = {"0.bias", "6.bias"}  # in mathematics
    assert not any(found[name].any() for name in zero)
    check(found, truth, reference, truth.keys() - zero)
    assert list(ours.state_dict()) == list(theirs.state_dict())


def test_what_is_no_chain_runs_layer_by_layer(device, launched):
    theirs, ours, x = pair(device, 0.2)
    ours.eval(), theirs.eval()
    seen = []
    for change in (
        lambda m: m[1].register_forward_hook(lambda *_: seen.append(1)),
        lambda m: m.insert(2, nn.Identity()),
        lambda m: setattr(m[2], "negative_slope", -0.5),
        lambda m: setattr(m[2], "negative_slope", float("nan")),
        lambda m: setattr(m[3], "stride", 1),
    ):
        changed, reference = copy.deepcopy(ours), copy.deepcopy(theirs)
        change(changed), change(reference)
        launched.clear()
        torch.testing.assert_close(changed(x), reference(x), equal_nan=True)
        assert FUSED.isdisjoint(k.name for k in launched)
    assert seen == [1, 1]
    assert isinstance(ours[:5], modelnew.Sequential)
    launched.clear()
    named = modelnew.Sequential(OrderedDict(zip("abcde", ours[:5])))
    torch.testing.assert_close(named(x), theirs[:5](x))
    assert FUSED.issubset(k.name for k in launched)


def test_a_slope_is_an_argument_not_a_variant(device, launched):
    theirs, ours, x = pair(device, 0.5)
    for slope in (0.5, 0.0, 2.0, 1):
        theirs[2].negative_slope = ours[2].negative_slope = slope
        truth = gradients(copy.deepcopy(theirs).double(), x)
        reference, found = gradients(copy.deepcopy(theirs), x), gradients(copy.deepcopy(ours), x)
        check(found, truth, reference, ("output", "x", "0.weight", "1.weight", "1.bias", "4.weight"))
    for name in ("pooled_forward", "pooled_backward"):
        assert len({k.variant for k in launched if k.name == name}) == 1


def arguments(device, **options):
    return {
        "input": torch.randn(2, 16, 8, 8, device=device),
        "running_mean": torch.zeros(16, device=device),
        "running_var": torch.ones(16, device=device),
        "conv_weight": torch.randn(16, 16, 3, 3, device=device) / 12,
        "num_groups": 4,
        **options,
    }


def test_errors(device):
    function = functional.conv_bn_activation_max_pool_group_norm
    with pytest.raises(TypeError, match=r"negative_slope must be a number, received '0.1'"):
        function(**arguments(device, activation="leaky_relu", negative_slope="0.1"))
    for slope in (-0.1, float("inf"), float("nan"), 1e300):
        options = arguments(device, activation="leaky_relu", negative_slope=slope)
        with pytest.raises(UnsupportedError, match=r"negative_slope from 0 to 3\.4e\+38, received"):
            function(**options)
    options = arguments(device)
    assert torch.equal(function(**options), functional.conv_bn_tanh_max_pool_group_norm(**options))
    for name, value in (("activation", "leaky_relu"), ("negative_slope", 0.1)):
        assert name not in inspect.signature(functional.conv_bn_tanh_max_pool_group_norm).parameters
        with pytest.raises(TypeError, match=name):
            functional.conv_bn_tanh_max_pool_group_norm(**options, **{name: value})
    with pytest.raises(TypeError, match=r"^conv_bn_tanh_max_pool_group_norm: input must be a dense tensor"):
        functional.conv_bn_tanh_max_pool_group_norm(**{**options, "input": [1.0]})


@pytest.mark.parametrize("value", [torch.tensor([2, 2]), np.array([2, 2]), np.array([1]), "2"], ids=repr)
@pytest.mark.parametrize(
    "name", ["stride", "padding", "output_padding", "dilation", "groups", "pool_size", "pool_stride", "pool_padding"]
)
def test_what_is_no_hyper_parameter(name, value):
    function = functional.conv_bn_activation_max_pool_group_norm
    message = rf"^{name} must be an int.*, received {re.escape(repr(value))}"
    for device in ("cpu", "meta"):
        with pytest.raises((TypeError, ValueError), match=message):
            function(**arguments(device, **{name: value}))


@pytest.mark.parametrize("activation", ["gelu", "LeakyReLU", "leakyrelu", "leaky_re_lu", "Tanh"])
@pytest.mark.parametrize("stride", [1, 2])
def test_an_activation_is_its_functions_name(device, activation, stride):
    traced = functools.partial(conv_bn_activation_max_pool_group_norm_or_parts, parts="apart")
    for function in (
        functional.conv_bn_activation_max_pool_group_norm,
        onnx.conv_bn_activation_max_pool_group_norm,
        traced,
    ):
        options = arguments(device, activation=activation, stride=stride, training=True)
        with pytest.raises(ValueError, match=f"must be one of 'tanh', 'leaky_relu'; received '{activation}'"):
            function(**options)
        assert torch.equal(options["running_mean"], torch.zeros_like(options["running_mean"]))


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("slope", [0.25, 0.0])
def test_ties(device, slope, sign):
    """All values of a window are equal, or with slope 0 are after the activation: the first gets the gradient."""
    x = torch.randn(2, 16, 4, 4, device=device).repeat_interleave(2, 2).repeat_interleave(2, 3)
    options = arguments(device, input=x, conv_weight=torch.randn(16, 16, 1, 1, device=device), num_groups=1)
    weight, dy = torch.full((16,), float(sign), device=device), torch.randn(2, 16, 4, 4, device=device)

    def reference(x, w):
        y = F.batch_norm(F.conv_transpose2d(x, w), torch.zeros_like(weight), torch.ones_like(weight), weight)
        return F.group_norm(F.max_pool2d(F.leaky_relu(y, slope), 2), 1)

    def ours(x, w):
        chosen = {**options, "input": x, "conv_weight": w, "weight": weight}
        return functional.conv_bn_activation_max_pool_group_norm(
            **chosen, activation="leaky_relu", negative_slope=slope, numerics="fp32"
        )

    leaves = [t.requires_grad_() for t in (x, options["conv_weight"])]
    found, expected = (torch.autograd.grad(f(*leaves), leaves, dy) for f in (ours, reference))
    for actual, right in zip(found, expected):
        torch.testing.assert_close(actual, right, rtol=1e-4, atol=1e-5)
    assert not found[0][:, :, 1::2].any()


@pytest.mark.parametrize("row", fusions.CHAINS[1:], ids=lambda row: row.activation)  # of tanh: test_double_backward.py
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_second_derivatives(device, training, row):
    theirs, ours, x = pair(device, row.kinds[2].__name__)
    tolerance.check_gradient_penalty(theirs.train(training), ours.train(training), x)


@pytest.mark.parametrize(
    ("old", "new"), [("v > 0 ? v : v *", "v > 0 ? v : 1.01f * v *"), ("y > 0 ? 1 :", "y > 0 ? 1.001f :")]
)
def test_a_fault_in_the_activation_is_found(old, new):
    theirs, ours, x = pair("cpu", 0.2)
    truth, reference = gradients(copy.deepcopy(theirs).double(), x), gradients(theirs, x)
    with planted("activation.cuh", (old, new)):
        found = gradients(ours, x)
    with pytest.raises(AssertionError, match="received"):
        check(found, truth, reference, ("output", "x"))
