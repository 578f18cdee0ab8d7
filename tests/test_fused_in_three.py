"""The chain where one operator does not take it: the convolution, `functional.bn_pool`, and group norm."""

import collections
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
from cupy_kernels.errors import EmulatorError, UnsupportedError
from modelnew import explain, functional, layers, numerics, parity
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
    x = torch.randn(images, theirs[0].in_channels, height, width)
    with torch.no_grad():  # what tanh has in evaluation is not far from what it has in training
        variance, mean = torch.var_mean(theirs[0](x), (0, 2, 3))
        theirs[1].running_mean.copy_(mean), theirs[1].running_var.copy_(variance * 1.2)
    ours.load_state_dict(theirs.state_dict())
    x = x.to(device, dtype)
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
    terms = mask.numel() // mask.shape[1]  # at least: of a parameter's gradient
    for name, right in truth.items():
        if theirs.training and name == "0.bias":
            assert not found[name].any()  # zero in mathematics
        else:
            summed = name.endswith(("weight", "bias"))
            tolerance.check(found[name], right, reference[name], name, terms if summed else 0)
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


def options(device, **changed):
    """Arguments of the function, of a convolution that passes its input on, so that its windows can be looked at."""
    found = {
        "input": torch.randn(2, 2, 6, 6, device=device),
        "running_mean": torch.zeros(2, device=device),
        "running_var": torch.ones(2, device=device),
        "conv_weight": torch.eye(2, device=device).view(2, 2, 1, 1),
        "num_groups": 1,
        "numerics": "fp32",
        "pool_size": 3,
        "pool_stride": 2,
    }
    return {**found, **changed}


@pytest.mark.parametrize("last", [False, True], ids=["nchw", "channels_last"])
@pytest.mark.parametrize("sign", [1.0, -1.0, 0.0])
@pytest.mark.parametrize("window", POOLS.values(), ids=POOLS)
def test_which_value_wins(device, window, sign, last):
    """Ties, NaN, infinities and denormals of one window, in every place."""
    specials = [1.0, 1.0, NAN, 2.0, INF, -INF, 1e-40, 2e-40, -1e-40, 0.0, -0.0, 1.0, NAN, 3.0]
    values = torch.tensor([v for n in range(8) for v in (specials[n:] + specials[:n])[:9]] * 8).view(1, 8, 8, 9)
    x = torch.cat([values, torch.full_like(values, -INF), torch.randint(-1, 2, values.shape).float()])[:, :, :8, :8]
    x = x.to(device).contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)
    mean, var, gamma = (torch.full((8,), v, device=device) for v in (0.0, 1.0, sign))
    dy = None
    found = []
    for f in (
        lambda x: bn_activation_max_pool2d(
            x, (mean, var, gamma, None, False, 0.1, 0.0, None), None, "leaky_relu", 1.0, pool_of(*window, 1)
        ),
        lambda x: F.max_pool2d((x * sign).contiguous(), *window),  # PyTorch's for channels_last loses -inf on a GPU
    ):
        leaf = x.detach().requires_grad_()
        y = f(leaf)
        dy = torch.rand_like(y) + 1 if dy is None else dy
        found += [y, torch.autograd.grad(y, leaf, dy)[0]]
    y, dx, expected, right = found
    assert torch.equal(y.isnan(), expected.isnan())
    torch.testing.assert_close(y, expected, equal_nan=True, atol=1e-38, rtol=0)
    if sign:
        torch.testing.assert_close(dx, right, equal_nan=True, rtol=1e-6, atol=0)


@pytest.mark.parametrize("offset", [0.0, 1e4])
@pytest.mark.parametrize("scale", [1.0, 1e25])
def test_statistics_of_large_values(device, scale, offset):
    """Squares beyond float32, and means far from 0."""
    x = ((torch.randn(4, 2, 33, 30, dtype=torch.float64) + offset) * scale).float().to(device)
    mean, var = torch.zeros(2, device=device), torch.ones(2, device=device)
    arguments = mean, var, None, None, True, 1.0, 1e-5, None
    y = bn_activation_max_pool2d(x, arguments, None, "tanh", 0.0, pool_of(2, 2, 0, 1))
    double = x.double()
    right = F.max_pool2d(F.batch_norm(double / scale, None, None, training=True).tanh(), 2)
    torch.testing.assert_close(y.double(), right, rtol=1e-5, atol=1e-3 if offset else 1e-6)
    torch.testing.assert_close(mean.double(), double.mean((0, 2, 3)), rtol=1e-6, atol=1e-6 * scale)
    if scale == 1:
        torch.testing.assert_close(var.double(), double.var((0, 2, 3)), rtol=1e-5, atol=0)


def test_two_runs_are_equal_and_change_no_argument(device):
    _, ours, x = pair("k5s1, padded windows", device)
    dy = torch.randn_like(ours(x))
    kept = x.clone(), [p.detach().clone() for p in ours.parameters()]
    first, second = (gradients(copy.deepcopy(ours), x, dy) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert torch.equal(x, kept[0])
    assert all(map(torch.equal, ours.parameters(), kept[1]))


@pytest.mark.parametrize("change", ["momentum", "no statistics", "no parameters", "frozen"])
def test_kinds_of_batch_norm(device, change):
    theirs, ours, x = pair("k3s2", device)
    for model in (theirs, ours):
        norm = model[1]
        if change == "momentum":
            norm.momentum = None
        elif change == "no statistics":
            norm.track_running_stats, norm.running_mean, norm.running_var = False, None, None
            norm.num_batches_tracked = None
        elif change == "no parameters":
            norm.weight = norm.bias = model[4].weight = model[4].bias = model[0].bias = None
        else:
            for p in (norm.weight, norm.bias, model[0].bias):
                p.requires_grad_(False)
    mask = well_separated(theirs, x, parity.NEAR_TIE["fp32"])
    dy = torch.randn(mask.shape, device=device) * mask
    for _ in range(2):
        truth = gradients(copy.deepcopy(theirs).double(), x, dy)
        reference, found = gradients(theirs, x, dy), gradients(ours, x, dy)
    for name, right in truth.items():
        if right is None:
            assert found[name] is None
        elif name != "0.bias":
            tolerance.check(found[name], right, reference[name], name)
    assert theirs[1].num_batches_tracked == ours[1].num_batches_tracked


def test_refused_calls_say_why_and_change_nothing(device):
    function = functional.conv_bn_activation_max_pool_group_norm
    batches = torch.tensor(0, device=device)
    for changed, error, message in (
        ({"pool_stride": 1}, UnsupportedError, "two apart"),
        ({"pool_size": (2, 3)}, UnsupportedError, "2x2 windows, or 3x3"),
        ({"input": torch.randn(0, 2, 6, 6, device=device)}, UnsupportedError, "with elements"),
        ({"weight": torch.ones(2, dtype=torch.float64, device=device)}, UnsupportedError, "different dtypes"),
        ({"negative_slope": -1.0, "activation": "leaky_relu"}, UnsupportedError, "negative_slope from 0 to"),
        ({"activation": "gelu"}, ValueError, "received 'gelu'"),
        ({"num_groups": 3}, ValueError, "num_groups must divide the 2 channels"),
        ({"group_weight": torch.ones(3, device=device)}, ValueError, "group_weight must have shape"),
        ({"conv_weight": torch.ones(3, 2, 1, 1, device=device)}, ValueError, "channels"),
        ({"eps": 0.0}, ValueError, "eps must be positive"),
    ):
        arguments = options(device, training=True, num_batches_tracked=batches, **changed)
        with pytest.raises(error, match=message):
            function(**arguments)
        assert not arguments["running_mean"].any()
        assert not batches
    double = {k: v.double() if isinstance(v, torch.Tensor) else v for k, v in options(device).items()}
    with pytest.raises(UnsupportedError, match="float64"):
        function(**double)
    with pytest.raises(UnsupportedError, match="synchronised"):
        function(**options(device), peers=lambda *_: None)


def test_what_three_operators_do_not_take_runs_layer_by_layer(device, launched):
    for change in (
        lambda m: setattr(m[3], "ceil_mode", True),
        lambda m: setattr(m[3], "stride", 1),
        lambda m: setattr(m[3], "kernel_size", 4),
        lambda m: m.double(),
    ):
        theirs, ours, x = pair("k3s2", device)
        change(theirs), change(ours)
        launched.clear()
        x = x.to(ours[0].weight.dtype)
        torch.testing.assert_close(ours(x), theirs(x), rtol=1e-3, atol=1e-4)
        assert launched
        assert IN_THREE.isdisjoint(k.name for k in launched)


def test_explain(device):
    model = modelnew.ModelNew(16, 16, 3, 2, 1, 1, 4, device=device)
    lines = explain(model, torch.randn(1, 16, 4, 4, device=device)).splitlines()
    assert lines[0].startswith("fused into three operators, not one: the convolution has a stride")
    assert lines[1].startswith("conv_transpose: ")
    assert "bn_pool_forward" in lines[2]
    assert "bn_pool_backward" in lines[3]
    model.max_pool.ceil_mode = True
    assert explain(model, torch.randn(1, 16, 4, 4, device=device)).startswith("not fused: the pooling has ceil_mode")


def test_on_sm75(device, launched, monkeypatch):
    """Where a block has too little shared memory for a band of the image."""
    monkeypatch.setattr(numerics, "SMALL", 0)
    numerics.gather_gemm_split.cache_clear()
    theirs = modelnew.Model(16, 32, 3, 1, 1, 1, 4).to(device)
    ours = modelnew.ModelNew(16, 32, 3, 1, 1, 1, 4, numerics="fp32", device=device)
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(2, 16, 6, 6, device=device)
    with numerics.as_sm75():
        y = ours(x)
        assert explain(ours, x).startswith("fused into three operators, not one: on sm_75")
    numerics.gather_gemm_split.cache_clear()
    torch.testing.assert_close(y, theirs(x), rtol=1e-4, atol=1e-5)
    assert {"gather_gemm", "bn_pool_forward"} <= {kernel.name for kernel in launched}


@pytest.mark.parametrize("last", [False, True], ids=["nchw", "channels_last"])
def test_autocast(device, last, launched):
    """Squared errors of many small batches together: those of one are chance."""
    squares = collections.Counter()
    for _ in range(16):
        theirs, ours, x = pair("k4s2, 3 channels", device, last=last)
        mask = well_separated(theirs, x, 0.1)
        dy = torch.randn(mask.shape, device=device) * mask
        truth = gradients(copy.deepcopy(theirs).double(), x, dy)
        launched.clear()
        with torch.autocast(torch.device(device).type, torch.bfloat16):
            reference, found = gradients(theirs, x, dy), gradients(ours, x, dy)
        assert {k.name for k in launched} >= IN_THREE
        for name, right in truth.items():
            assert found[name].dtype == reference[name].dtype
            for who, result in (("ours", found), ("theirs", reference)):
                squares[who, name] += float((result[name].double() - right).square().sum())
            squares["truth", name] += float(right.square().sum())
    for name in truth:
        if name != "0.bias":
            ours, theirs, truth_norm = (math.sqrt(squares[who, name]) for who in ("ours", "theirs", "truth"))
            assert ours < 1.25 * theirs + 1e-5 * truth_norm, (name, ours, theirs, truth_norm)  # some are float32


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_second_derivatives(device, training):
    theirs, ours, x = pair("k3s2", device)
    tolerance.check_gradient_penalty(theirs.train(training), ours.train(training), x)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("last", [False, True], ids=["nchw", "channels_last"])
def test_torch_compile(last, one_thread):
    torch._dynamo.reset()
    _, ours, x = pair("k5s1, padded windows", "cpu", last=last)
    other = copy.deepcopy(ours)
    call = torch.compile(other, backend="aot_eager", fullgraph=True)
    for training, images in itertools.product((True, False), (1, 2)):
        batch = torch.cat([x] * images)
        ours.train(training), other.train(training)
        found = [step(m, batch) for m in (ours, call)]
        assert all(map(torch.equal, *found))
        assert found[0][0].stride() == found[1][0].stride()
        assert all(map(torch.equal, ours.buffers(), other.buffers()))
    torch._dynamo.reset()


def step(model, x):
    leaf = x.detach().requires_grad_()
    y = model(leaf)
    parameters = list(getattr(model, "_orig_mod", model).parameters())
    return y, *torch.autograd.grad(y.square().sum(), [leaf, *parameters])


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("? at : tap; }", "&& at ? at : tap; }"),  # leaves some taps unset, which the emulator sees
        ("squares += other.squares + distance", "squares += other.squares + 0 * distance"),
        ("xhat * mean_dot[s]", "0.9f * xhat * mean_dot[s]"),
        ("2 * (BESIDE - i)", "2 * (BESIDE - i) + (i == 1)"),
    ],
)
def test_a_fault_is_found(old, new):
    theirs, ours, x = pair("k5s1, padded windows", "cpu")
    with planted("bn_pool.cu", (old, new)), pytest.raises((AssertionError, EmulatorError)):
        judge(theirs, ours, x, parity.NEAR_TIE["fp32"])
