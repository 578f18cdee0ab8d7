"""The chain where one operator does not take it: the convolution, `functional.bn_pool`, and group norm."""

import copy
import itertools
import math

import pytest
import tolerance
import torch
import torch.nn.functional as F
from faults import planted
from torch import nn

import modelnew
from cupy_kernels.errors import UnsupportedError
from modelnew import explain, functional, fusions, layers, parity
from modelnew.functional.bn_pool import bn_activation_max_pool2d
from modelnew.functional.max_pool import pool_of

NAN, INF = float("nan"), float("inf")
POOLS = {"2x2": (2, 2, 0), "3x3": (3, 2, 0), "padded": (3, 2, 1)}
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
IN_THREE = {"bn_pool_forward", "bn_pool_backward"}

# (in, out, kernel, stride, padding, output padding, dilation, groups), groups of group norm, pooling, N, H, W
CASES = {
    "k3s2": ((16, 16, 3, 2, 1, 1, 1, 1), 4, "2x2", 2, 5, 6),
    "k4s2, 3 channels": ((8, 3, 4, 2, 1, 0, 1, 1), 1, "3x3", 2, 4, 5),
    "k5s1, padded windows": ((16, 16, 5, 1, 2, 0, 1, 1), 4, "padded", 1, 9, 8),
    "k7s1, 21 channels": ((4, 21, 7, 1, 3, 0, 1, 1), 3, "padded", 2, 9, 7),
    "dilation and groups": ((8, 20, 3, (2, 1), 1, (1, 0), (1, 2), 2), 5, "2x2", 2, 5, 7),
    "depthwise": ((8, 8, 4, 2, 1, 0, 1, 8), 2, "3x3", 2, 4, 4),
    "100 channels": ((20, 100, 3, 2, 1, 1, 1, 1), 10, "2x2", 1, 4, 4),
}


def chain(module, case, activation=None):
    convolution, groups, pool, *_ = CASES[case]
    *window, output_padding, dilation, conv_groups = convolution
    channels = convolution[1]
    return [
        module.ConvTranspose2d(*window, output_padding, conv_groups, True, dilation),
        module.BatchNorm2d(channels),
        module.Tanh() if activation is None else module.LeakyReLU(activation),
        module.MaxPool2d(*POOLS[pool]),
        module.GroupNorm(groups, channels),
    ]


def pair(case, device, dtype=torch.float32, activation=None, last=False):
    """The chain in torch.nn and in ours, of one state, and a batch."""
    theirs = nn.Sequential(*chain(nn, case, activation))
    ours = modelnew.Sequential(*chain(layers, case, activation))
    with torch.no_grad():
        for p in theirs.parameters():
            p.add_(torch.randn_like(p) / 2)
        theirs[1].weight[1::3].neg_()
        theirs[1].weight[0] = 0
    *_, images, height, width = CASES[case]
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(images, theirs[0].in_channels, height, width).to(device, dtype)
    x = x.contiguous(memory_format=torch.channels_last) if last else x
    ours[0].numerics = "fp32"
    return theirs.to(device, dtype), ours.to(device, dtype), x


def well_separated(model, x, gap):
    """Where no other value of a window comes near the largest, so that rounding cannot move a gradient."""
    double = copy.deepcopy(model).double()
    size, stride, padding = (getattr(model[3], name) for name in ("kernel_size", "stride", "padding"))
    with torch.no_grad():
        y = F.pad(double[:3](x.double()), [padding] * 4, value=-9)
    values = y.unfold(2, size, stride).unfold(3, size, stride).flatten(4).sort(-1).values
    return (values[..., -1] - values[..., -2] > gap) | (values[..., -1] == values[..., 0])


def gradients(model, x, dy):
    leaf = x.detach().to(next(model.parameters()).dtype, copy=True).requires_grad_()
    y = model(leaf)
    y.backward(dy.to(y.dtype))
    found = {"output": y.detach(), "x": leaf.grad, **{name: p.grad for name, p in model.named_parameters()}}
    return {**found, **{name: b.clone() for name, b in model.named_buffers() if b.is_floating_point()}}


def judge(theirs, ours, x, gap):
    """Checks everything that a step computes, and the memory formats."""
    mask = well_separated(theirs, x, gap)
    dy = (torch.randn(mask.shape, device=x.device, dtype=torch.float64) * mask).to(x.dtype)
    truth = gradients(copy.deepcopy(theirs).double(), x, dy)
    reference, found = gradients(theirs, x, dy), gradients(ours, x, dy)
    for name, right in truth.items():
        if theirs.training and name == "0.bias":
            assert not found[name].any()  # zero in mathematics
        else:
            tolerance.check(found[name], right, reference[name], name)
    return found


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("last", [False, True], ids=["nchw", "channels_last"])
@pytest.mark.parametrize("case", CASES)
def test_output_gradients_and_buffers(device, case, last, training, launched):
    theirs, ours, x = pair(case, device, last=last)
    theirs.train(training), ours.train(training)
    found = judge(theirs, ours, x, parity.NEAR_TIE["fp32"])
    assert {k.name for k in launched} >= IN_THREE
    memory_format = torch.channels_last if last else torch.contiguous_format
    assert all(found[name].is_contiguous(memory_format=memory_format) for name in ("output", "x"))


@pytest.mark.parametrize("activation", [0.2, 0.0])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("last", [False, True], ids=["nchw", "channels_last"])
def test_dtypes_and_leaky_relu(device, dtype, last, activation):
    theirs, ours, x = pair("k5s1, padded windows", device, dtype, activation, last)
    judge(theirs, ours, x, 0.1 if dtype != torch.float32 else parity.NEAR_TIE["fp32"])


def windows(device):
    """Arguments of `bn_activation_max_pool2d` but for x and the windows."""
    return dict(zip(("mean", "var", "weight", "bias"), (torch.zeros(2), torch.ones(2), torch.tensor([1.0, -1]), None)))
