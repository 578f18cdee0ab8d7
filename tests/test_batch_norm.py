import functools
import itertools

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from norms import FORMATS, PAIRS, PARAMETER_DTYPES, check_pair, parameters, statistics
from strided import IN_EVERY_LAYOUT
from tolerance import check

from cupy_kernels.batch_norm import batch_norm_apply, batch_norm_backward, batch_norm_statistics
from modelnew import functional
from modelnew.functional import batch_norm, batch_norm_tanh, tanh

LAYERS = {
    "BatchNorm1d": [({"num_features": 3}, (8, 3)), ({"num_features": 3, "momentum": None}, (4, 3, 5))],
    "BatchNorm2d": [
        ({"num_features": 3}, (4, 3, 2, 3)),
        ({"num_features": 3, "eps": 0.001, "momentum": None}, (4, 3, 2, 3)),
        ({"num_features": 3, "momentum": 0.7, "affine": False}, (4, 3, 2, 3)),
        ({"num_features": 3, "track_running_stats": False, "dtype": torch.float64}, (4, 3, 2, 3)),
    ],
    "BatchNorm3d": [({"num_features": 3}, (2, 3, 2, 3, 2))],
}
NAN = float("nan")


@pytest.mark.parametrize("pair", PAIRS)
@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
@pytest.mark.parametrize(
    "shape",
    [(5, 3, 4, 6), (3, 4, 7, 5), (5, 8, 1, 1), (1, 8, 3, 1), (7, 3), (4, 2, 5), (2, 2, 3, 2, 4), (300, 1, 1, 7)],
    ids=str,
)
def test_output_and_gradients(device, pair, training, shape):
    x = (2 * torch.randn(shape, device=device) + 1).requires_grad_()
    check_pair(pair, x, statistics(shape[1], device), *parameters(shape[1], device), training=training)


@pytest.mark.parametrize("pair", PAIRS)
@pytest.mark.parametrize(("training", "tracked"), [(True, True), (True, False), (False, True)])
@pytest.mark.parametrize("affine", ["weight", "bias", ""])
def test_without_weight_bias_or_statistics(device, pair, training, tracked, affine):
    x = torch.randn(3, 4, 5, 4, device=device, requires_grad=True)
    weight, bias = (p if name in affine else None for name, p in zip(("weight", "bias"), parameters(4, device)))
    check_pair(pair, x, statistics(4, device) if tracked else (), weight, bias, training=training, eps=0.1)


@pytest.mark.parametrize(("dtype", "parameter_dtype"), PARAMETER_DTYPES, ids=str)
@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
@pytest.mark.parametrize("shape", [(3, 12, 4, 4), (3, 12, 6, 2), (3, 12, 3, 5)], ids=str)
def test_dtypes(device, dtype, parameter_dtype, training, shape):
    x = torch.randn(shape, device=device).to(dtype).requires_grad_()
    running = statistics(12, device, parameter_dtype)
    check_pair((batch_norm, F.batch_norm), x, running, *parameters(12, device, parameter_dtype), training=training)


@pytest.mark.parametrize(("dtype", "parameter_dtype"), PARAMETER_DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(3, 12, 4, 4), (3, 12, 3, 5)], ids=str)
def test_dtypes_with_tanh(device, dtype, parameter_dtype, shape):
    x = torch.randn(shape, device=device).to(dtype).requires_grad_()
    check_pair(PAIRS[1].values[0], x, (), *parameters(12, device, parameter_dtype), training=True)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_weight_and_statistics_of_different_dtypes(device, dtype):
    x = torch.randn(3, 2, 4, 4, device=device).to(dtype)
    mean, var = statistics(2, device)
    weight, bias = parameters(2, device, dtype)
    y = batch_norm(x, mean, var, weight, bias)
    expected = F.batch_norm(*(t.double() for t in (x, mean, var, weight, bias)))
    check(y, expected, expected.to(dtype))


@pytest.mark.parametrize("momentum", [0.1, 0.0, 1.0, 0.37, 1])
@pytest.mark.parametrize(("dtype", "buffer_dtype"), PARAMETER_DTYPES, ids=str)
def test_running_statistics(device, momentum, dtype, buffer_dtype):
    x = (3 * torch.randn(4, 3, 5, 4, device=device) - 2).to(dtype)
    before = statistics(3, device, buffer_dtype)
    ours, theirs = ([r.clone() for r in before] for _ in range(2))
    truth = [r.double() for r in before]
    for function, x_, running in ((batch_norm, x, ours), (F.batch_norm, x, theirs), (F.batch_norm, x.double(), truth)):
        function(x_, *running, training=True, momentum=momentum)
    for name, a, b, t in zip(("mean", "variance"), ours, theirs, truth):
        check(a, t, b, name, terms=80)  # PyTorch on a CPU sums in float64


def test_running_statistics_of_any_layout(device):
    x = torch.randn(3, 4, 5, 2, device=device)
    mean, var = statistics(8, device)
    strided, dense = (mean[::2], var[::2]), (mean[::2].clone(), var[::2].clone())
    others = mean[1::2].clone(), var[1::2].clone()
    versions = [t._version for t in (*strided, *dense)]
    batch_norm(x, *strided, training=True)
    batch_norm(x, *dense, training=True)
    for a, b in zip((*strided, mean[1::2], var[1::2]), (*dense, *others)):
        assert torch.equal(a, b)
    assert all(t._version > v for t, v in zip((*strided, *dense), versions))


def test_eval_leaves_the_running_statistics(device):
    running = statistics(3, device)
    before = [r.clone() for r in running]
    batch_norm(torch.randn(2, 3, 4, 4, device=device), *running)
    assert all(map(torch.equal, running, before))


@pytest.mark.parametrize(
    "shape", [(0, 3, 4, 5), (2, 3, 0, 5), (0, 3), (2, 0, 4, 5), (2, 0), (1, 0, 0), (0, 0), (0,)], ids=str
)
@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
@pytest.mark.parametrize("function", [batch_norm, batch_norm_tanh])
def test_empty_input(device, shape, training, function):
    x = torch.randn(shape, device=device, requires_grad=True)
    channels = shape[1] if len(shape) > 1 else 3
    running, (weight, bias) = statistics(channels, device), parameters(channels, device)
    before = [r.clone() for r in running]
    y = function(x, *running, weight, bias, training=training)
    assert y.shape == shape
    assert all(map(torch.equal, running, before))
    dx, dweight, dbias = torch.autograd.grad(y.sum(), (x, weight, bias))
    assert dx.shape == shape
    assert torch.equal(dweight, torch.zeros_like(weight))
    assert torch.equal(dbias, torch.zeros_like(bias))


@IN_EVERY_LAYOUT
@pytest.mark.parametrize("pair", PAIRS)
def test_layouts(device, make, pair):
    x = make(torch.randn(3, 4, 6, 8, device=device)).requires_grad_()
    weight, bias = (make(p.view(1, 4, 1, 1).expand(3, 4, 6, 8))[0, :, 0, 0] for p in parameters(4, device))
    y, expected = (f(x, None, None, weight, bias, training=True) for f in pair)
    torch.testing.assert_close(y, expected)
    assert y.stride() == expected.stride()
    dy = torch.randn(y.shape[::-1], device=device).permute(3, 2, 1, 0)
    torch.testing.assert_close(torch.autograd.grad(y, x, dy)[0], torch.autograd.grad(expected, x, dy)[0])


@pytest.mark.parametrize("pair", PAIRS)
@pytest.mark.parametrize(("dtype", "parameter_dtype"), PARAMETER_DTYPES, ids=str)
@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
@pytest.mark.parametrize(
    "shape", [(3, 16, 5, 7), (2, 3, 4, 5), (2, 12, 3, 2, 4), (5, 8, 1, 1), (3, 2, 4, 5), (1, 264, 5, 5)], ids=str
)
def test_channels_last(device, pair, dtype, parameter_dtype, training, shape):
    x = torch.randn(shape, device=device).to(dtype).contiguous(memory_format=FORMATS[len(shape)]).requires_grad_()
    running = statistics(shape[1], device, parameter_dtype)
    weight, bias = parameters(shape[1], device, parameter_dtype)
    check_pair(pair, x, running, weight, bias, training=training)
    y, expected = (f(x, *(r.clone() for r in running), weight, bias, training) for f in pair)
    dy = torch.randn_like(expected)
    ours, theirs = (torch.autograd.grad(result, x, dy)[0] for result in (y, expected))
    assert y.stride() == ours.stride() == x.stride()
    if device == "cpu":  # on a GPU torch's results in evaluation are contiguous
        assert (y.stride(), ours.stride()) == (expected.stride(), theirs.stride())


@pytest.mark.parametrize("function", [batch_norm, batch_norm_tanh])
@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
@pytest.mark.parametrize("affine", [True, False], ids=["affine", "plain"])
def test_gradcheck(device, function, training, affine):
    x = torch.randn(3, 2, 2, 3, dtype=torch.float64, device=device, requires_grad=True)
    weight, bias = parameters(2, device, torch.float64) if affine else (None, None)
    running = statistics(2, device, torch.float64)

    def run(x, weight, bias):
        return function(x, *(r.clone() for r in running), weight, bias, training)

    assert torch.autograd.gradcheck(run, (x, weight, bias))


@pytest.mark.parametrize("function", [batch_norm, batch_norm_tanh])
@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
def test_no_work_for_gradients_that_nobody_wants(device, function, training, launched):
    x, dy = (torch.randn(3, 2, 4, 5, device=device) for _ in range(2))
    weight, bias = (p.detach() for p in parameters(2, device))
    running = statistics(2, device)

    def gradients(wanted):
        leaves = [t.clone().requires_grad_(w) for t, w in zip((x, weight, bias), wanted)]
        y = function(leaves[0], *(r.clone() for r in running), *leaves[1:], training)
        launched.clear()
        found = iter(torch.autograd.grad(y, [leaf for leaf in leaves if leaf.requires_grad], dy))
        return [next(found) if w else None for w in wanted], {k.name for k in launched}

    everything, _ = gradients((True, True, True))
    for wanted in itertools.product((True, False), repeat=3):
        if not any(wanted):
            continue
        found, kernels = gradients(wanted)
        assert all(torch.equal(a, b) for a, b in zip(found, everything) if a is not None)
        if training:
            assert kernels == {"batch_norm_backward"}
        elif any(wanted[1:]):
            assert kernels == {"batch_norm_backward_partials", "batch_norm_backward_sums"}
        else:
            assert kernels == {"batch_norm_backward_apply"}


def test_nothing_is_saved_that_the_gradients_do_not_need(device):
    x = torch.randn(3, 2, 4, 5, device=device, requires_grad=True)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.shape) or t, lambda t: t):
        batch_norm(x, *statistics(2, device))
    assert x.shape not in saved


def test_fused_tanh_is_tanh_of_batch_norm(device):
    x, (weight, bias) = torch.randn(3, 2, 4, 5, device=device), parameters(2, device)
    fused, separate = batch_norm_tanh(x, None, None, weight, bias, True), batch_norm(x, None, None, weight, bias, True)
    assert torch.equal(fused, tanh(separate))


def test_two_runs_are_equal_bit_for_bit(device):
    x, dy = torch.randn(9, 2, 32, 32, device=device, requires_grad=True), torch.randn(9, 2, 32, 32, device=device)
    weight, bias = parameters(2, device)
    runs = []
    for _ in range(2):
        running = torch.zeros(2, device=device), torch.ones(2, device=device)
        y = batch_norm_tanh(x, *running, weight, bias, training=True)
        runs.append((y, *running, *torch.autograd.grad(y, (x, weight, bias), dy)))
    assert all(map(torch.equal, *runs))


X = (3, 2, 4, 5)


@pytest.mark.parametrize(
    ("arguments", "exception", "message"),
    [
        ({"input": torch.ones(1, 2, 1, 1)}, ValueError, "Expected more than 1 value per channel when training"),
        ({"input": torch.ones(1, 2)}, ValueError, "Expected more than 1 value per channel when training"),
        ({"input": torch.ones(2)}, RuntimeError, r"\[N, C, \*\], received shape \(2,\)"),
        ({"input": torch.ones(X, dtype=torch.int64)}, TypeError, "input must be .*received torch.int64"),
        (
            {"input": torch.ones(X, dtype=torch.float64)},
            TypeError,
            "running_mean.*float64.*received running_mean torch.float32",
        ),
        ({"input": torch.ones(X, dtype=torch.float64), "running_mean": None, "running_var": None}, TypeError, "weight"),
        ({"running_mean": torch.zeros(3)}, RuntimeError, "running_mean should contain 2 elements not 3"),
        ({"running_var": torch.zeros(1)}, RuntimeError, "running_var should contain 2 elements not 1"),
        ({"weight": torch.zeros(3)}, RuntimeError, "weight should contain 2 elements not 3"),
        ({"bias": torch.zeros(0)}, RuntimeError, "bias should contain 2 elements not 0"),
        (
            {"running_mean": torch.zeros(2, dtype=torch.float16)},
            TypeError,
            "running_mean torch.float16, running_var torch.float32",
        ),
        ({"bias": torch.zeros(2, dtype=torch.float64)}, TypeError, "received weight torch.float32, bias torch.float64"),
        ({"weight": torch.ones(2, dtype=torch.float16), "bias": None}, TypeError, "received weight torch.float16"),
        ({"running_mean": None}, ValueError, "either both be None or neither"),
        ({"running_var": None}, ValueError, "either both be None or neither"),
        (
            {"running_mean": None, "running_var": None, "training": False},
            RuntimeError,
            "must be defined in evaluation mode",
        ),
        (
            {"running_mean": torch.zeros(2, requires_grad=True)},
            RuntimeError,
            "not differentiable with respect to running_mean",
        ),
        ({"momentum": None}, TypeError, "momentum must be a number, received None"),
        ({"training": "False"}, TypeError, "training must be True or False, received 'False'"),
        ({"eps": 0.0}, ValueError, "eps must be positive during training, but got 0.0"),
        ({"eps": -1.0, "training": False}, ValueError, "eps must be non-negative, but got -1.0"),
        ({"eps": NAN}, ValueError, "eps must be positive during training, but got nan"),
        ({"weight": torch.ones(2, device="meta")}, RuntimeError, "one device"),
    ],
)
@pytest.mark.parametrize("function", [batch_norm, batch_norm_tanh])
def test_refused_calls_change_nothing(device, function, arguments, exception, message):
    valid = {
        "input": torch.ones(X),
        "running_mean": torch.zeros(2),
        "running_var": torch.ones(2),
        "weight": torch.ones(2),
        "bias": torch.zeros(2),
        "training": True,
    }
    call = {
        k: v.to(device) if isinstance(v, torch.Tensor) and not v.is_meta else v
        for k, v in {**valid, **arguments}.items()
    }
    call = {
        k: v.detach().requires_grad_(v.requires_grad) if isinstance(v, torch.Tensor) else v for k, v in call.items()
    }
    before = {k: v.detach().clone() for k, v in call.items() if k.startswith("running") and v is not None}
    with pytest.raises(exception, match=message):
        function(**call)
    assert all(torch.equal(v, call[k].detach()) for k, v in before.items())


@pytest.mark.parametrize(
    "name", ["batch_norm", "batch_norm_tanh", "bn_tanh_max_pool2d", "conv_bn_tanh_max_pool_group_norm"]
)
def test_one_tensor_for_both_running_statistics(device, name):
    """Training refuses it, after calls with two that left a replay, too; evaluation only reads it."""
    function = getattr(functional, name)
    if name.startswith("conv"):
        weight = torch.randn(16, 16, 3, 3, device=device)
        function = functools.partial(function, conv_weight=weight, padding=1, num_groups=4)
    x, one, two = torch.randn(2, 16, 4, 4, device=device), *torch.ones(2, 16, device=device).clone().unbind()
    for _ in range(3):
        function(x, one.clone(), two.clone(), training=True)
    with pytest.raises(ValueError, match="running_mean and running_var are one tensor"):
        function(x, one, one, training=True)
    assert torch.equal(one, two)
    assert torch.equal(function(x, one, one), function(x, one, two))


@pytest.mark.parametrize(
    "shape",
    [
        (1, 2, 1, 1),
        (1, 2),
        (1, 2, 1),
        (2, 2),
        (1, 2, 2),
        (1, 2, 1, 2),
        (0, 2, 1, 1),
        (0,),
        (1,),
        (1, 0),
        (1, 0, 1),
        (2, 0),
    ],
    ids=str,
)
def test_one_value_per_channel_is_refused_when_torch_refuses_it(device, shape):
    def refused(function):
        try:
            function(torch.randn(shape, device=device), None, None, training=True)
        except ValueError as refusal:
            return str(refusal)

    assert refused(batch_norm) == refused(F.batch_norm)


def test_one_value_per_channel_outside_training(device):
    x, running = torch.randn(1, 3, 1, 1, device=device), statistics(3, device)
    torch.testing.assert_close(batch_norm(x, *running), F.batch_norm(x, *running))


def test_host_functions_refuse_arrays_that_do_not_fit():
    x, c = np.zeros((2, 3, 4, 4), np.float32), np.zeros(3, np.float32)
    with pytest.raises(ValueError, match=r"workspace for shape .* must have 12 elements, received 5"):
        batch_norm_statistics(x, None, None, None, c, c, np.zeros(5, np.float32), 0.1, 1e-5)
    with pytest.raises(ValueError, match="weight should contain 3 elements"):
        batch_norm_apply(x, c, c, np.zeros(2, np.float32), None, x.copy())
    with pytest.raises(ValueError, match="one shape"):
        batch_norm_apply(x, c, c, None, None, x[:1].copy())
    with pytest.raises(ValueError, match=r"\[N, C, \*\]"):
        batch_norm_apply(c, c, c, None, None, c.copy())
    with pytest.raises(ValueError, match="need x"):
        batch_norm_backward(x, None, c, c, None, x.copy(), None, None, np.zeros(12), True)
    with pytest.raises(ValueError, match=r"workspace for shape .* must have 12 elements, received 6"):
        batch_norm_backward(x, x, c, c, None, None, c.copy(), None, np.zeros(6), False)
