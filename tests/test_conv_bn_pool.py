"""The fused model: output, gradients and statistics in every class and mode."""

import copy
import itertools
import math

import pytest
import tolerance
import torch
from fused_models import CASES, CLASSES, models, well_separated

from modelnew import ModelNew, explain, numerics, parity
from modelnew.model import OPERATORS

# LeakyReLU(0) is ReLU: many values of a window are equal after it.
ACTIVATIONS = {"tanh": None, "leaky_relu": torch.nn.LeakyReLU(0.2), "relu": torch.nn.LeakyReLU(0)}
OTHERS = [c for n in range(5) for c in itertools.combinations(OPERATORS[1:], n)]


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("cls", CLASSES)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
@pytest.mark.parametrize("activation", ACTIVATIONS.values(), ids=ACTIVATIONS)
def test_output_gradients_and_buffers(device, case, cls, training, launched, activation):
    model, ours, x = models(case, cls, device, activation=activation)
    if not training:  # statistics that fit the data: where tanh is 1 but for rounding, so is its gradient nothing else
        model.batch_norm.momentum = None
        with torch.no_grad():
            model(x)
        ours.load_state_dict(model.state_dict())
    model.train(training), ours.train(training)
    assert explain(ours, x).startswith("fused")
    mask = well_separated(model, x, parity.NEAR_TIE[cls])
    dy = torch.randn(mask.shape, device=device, dtype=torch.float64) * mask
    double, found = copy.deepcopy(model).double(), {}
    theirs = model if cls == "fp32" else parity.tf32_rounding(model)
    for name, m in (("truth", double), ("torch", theirs), ("ours", ours)):
        leaf = x.to(next(m.parameters()).dtype, copy=True).requires_grad_()
        launched.clear()
        y = m(leaf)
        y.backward(dy.to(y.dtype))
        found[name] = {"output": y, "x": leaf.grad, **{k: p.grad for k, p in m.named_parameters()}}
        found[name].update((k, b) for k, b in m.named_buffers() if b.is_floating_point())
    assert {k.name for k in launched} >= {"conv_bn_pool", "pooled_forward", "pooled_backward"}
    assert (
        ("conv_bn_statistics" in {k.name for k in launched}) == training == ("conv_bn_statistics" in explain(ours, x))
    )
    for name, truth in found["truth"].items():
        actual = found["ours"][name]
        if training and name == "conv_transpose.bias":
            assert not actual.any()  # zero in mathematics
        else:
            tolerance.check(actual, truth, found["torch"][name], name)


@pytest.mark.parametrize("cls", CLASSES)
def test_units_of_several_passes(device, cls, many_passes, launched):
    """90 windows an image: a pass of 64 (several of 32 in the fp32 class), and one that is trimmed to what is left."""
    with numerics.wgmma(False):
        test_output_gradients_and_buffers(device, (16, 80, 3, 1, 2, 2, 18, 20), cls, True, launched, None)
    pool = next(k for k in launched if k.name == "conv_bn_pool")
    assert dict(pool.defines)["UNIT_PASSES"] > 1


@pytest.mark.parametrize("wgmma", [True], indirect=True)
@pytest.mark.parametrize("cls", CLASSES)
@pytest.mark.parametrize("case", ["odd", "odd_width", "partial_chunk", "many_units", "64_channels", "two_rows"])
def test_wgmma(device, case, cls, wgmma, launched):
    sizes = {**CASES, "64_channels": (64, 32, 3, 1, 4, 1, 4, 7), "two_rows": (16, 32, 3, 1, 2, 8, 33, 5)}
    test_output_gradients_and_buffers(device, sizes[case], cls, True, launched, None)
    convolutions = [dict(k.defines) for k in launched if k.name in ("conv_bn_pool", "conv_transpose_mma")]
    assert [(m["WGMMA"], m["X_PACKED"]) for m in convolutions] == [(1, 0), (1, 1)]
    assert {m["UNIT_ROWS"] for m in convolutions} == {2 if case == "two_rows" else 1}
    assert {dict(k.defines)["WGMMA"] for k in launched if k.name == "conv_wgrad_mma"} == {1}


@pytest.mark.parametrize("wgmma", [True], indirect=True)
def test_wgmma_passes_of_two_sizes(device, wgmma, many_passes, launched):
    """98 windows an image from one unit to the next: one pass of some tiles and a last one of more."""
    test_output_gradients_and_buffers(device, (16, 80, 3, 1, 2, 2, 18, 20), "fp32", True, launched, None)
    pool = dict(next(k for k in launched if k.name == "conv_bn_pool").defines)
    assert pool["LAST_TILES"] > pool["TILES"]


@pytest.mark.parametrize("cls", CLASSES)
def test_without_a_backward_nothing_is_kept(device, cls, launched):
    model, ours, x = models(CASES["even"], cls, device)
    with torch.no_grad():
        y = ours(x)
    pool = next(k for k in launched if k.name == "conv_bn_pool")
    assert dict(pool.defines)["SAVE"] == 0
    ours.load_state_dict(model.state_dict())
    assert torch.equal(y, ours(x))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_16_bit_types(device, dtype):
    """Output and gradients, of windows whose winner is the same in PyTorch's 16 bits."""
    model, ours, x = models((16, 16, 3, 1, 4, 4, 12, 14), "auto", device, dtype)
    assert explain(ours, x).startswith("fused")
    mask = well_separated(model, x, 16 * torch.finfo(dtype).eps)
    assert mask.double().mean() > 0.2
    dy, found = (torch.randn(mask.shape, device=device) * mask).to(dtype), {}
    for name, m in (("truth", copy.deepcopy(model).double()), ("torch", model), ("ours", ours)):
        leaf = x.to(next(m.parameters()).dtype, copy=True).requires_grad_()
        y = m(leaf)
        y.backward(dy.to(y.dtype))
        found[name] = {"output": y, "x": leaf.grad, **{k: p.grad for k, p in m.named_parameters()}}
    assert not found["ours"].pop("conv_transpose.bias").any()  # zero in mathematics
    for name, actual in found["ours"].items():
        tolerance.check(actual, found["truth"][name], found["torch"][name], name)


def test_two_runs_are_bit_equal(device):
    model, ours, x = models(CASES["many_units"], "tf32", device)
    runs = []
    for _ in range(2):
        ours.load_state_dict(model.state_dict())
        ours.zero_grad()
        y = ours(x)
        y.square().sum().backward()
        runs.append([y, *(p.grad.clone() for p in ours.parameters())])
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_autocast(device, dtype, training, launched):
    """The dtypes are PyTorch's, the errors at most its errors, and a scaled loss neither overflows nor vanishes."""
    model, ours, x = models(CASES["even"], "fp32", device)
    truth = copy.deepcopy(model).double()
    found, errors = {}, {}
    for scale in (1.0, 2.0 ** (20 if device == "cuda" else 10)):  # on a CPU y, and with it dy, has 16 bits
        for name, module, data in (("truth", truth, x.double()), ("torch", model, x), ("ours", ours, x)):
            module.train(training)
            leaf = data.clone().requires_grad_()
            with torch.autocast(device, dtype, enabled=name != "truth"):
                y = module(leaf)
            dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(y)
            gradients = torch.autograd.grad(y, [leaf, *module.parameters()], dy * scale)
            found[name] = {"output": y, **dict(zip(["x", *dict(module.named_parameters())], gradients))}
        assert {k.name for k in launched} >= {"conv_bn_pool", "pooled_backward"}
        for what, result in found["ours"].items():
            assert result.dtype == found["torch"][what].dtype
            if not (training and what == "conv_transpose.bias"):  # which is 0
                exact = found["truth"][what]
                ours_, theirs = (parity.error(found[who][what], exact) for who in ("ours", "torch"))
                unscaled = errors.setdefault(what, (ours_, theirs))
                if math.isfinite(theirs.rms):
                    assert parity.within_policy(result, exact, ours_, theirs), (what, ours_, theirs)
                else:  # PyTorch's gradients overflow; ours are as exact as without the scale
                    assert ours_.rms <= 1.01 * unscaled[0].rms


def test_batches_are_counted(device):
    _, ours, x = models(CASES["even"], "fp32", device)
    counter = ours.batch_norm.num_batches_tracked
    for expected in (1, 2):
        version = counter._version
        ours(x)
        assert (counter, counter._version) == (expected, version + 1)
    with torch.no_grad():
        ours(x)
    ours.eval()(x)
    assert (counter, counter._version) == (3, version + 2)
    assert explain(ours, x).startswith("fused")


@pytest.mark.parametrize("counter", [torch.tensor(7, dtype=torch.int32), torch.full((2,), 7)], ids=["int32", "two"])
def test_other_counters_of_batches_are_counted_unfused(device, counter):
    model, ours, x = models(CASES["even"], "fp32", device)
    model.batch_norm.num_batches_tracked = ours.batch_norm.num_batches_tracked = counter.to(device, copy=True)
    assert "num_batches_tracked must be one torch.int64" in explain(ours, x)
    truth = copy.deepcopy(model).double()(x.double())
    tolerance.check(ours(x), truth, model(x), "output")
    assert ours.batch_norm.num_batches_tracked.tolist() == (counter + 2).tolist()  # the two models share it


@pytest.mark.parametrize("others", OTHERS, ids="+".join)
def test_every_subset_with_the_convolution_is_on_tensor_cores(device, others, launched):
    model, _, x = models((16, 16, 3, 1, 4, 2, 6, 8), "fp32", device)
    ours = ModelNew(16, 16, 3, 1, 1, 1, 4, replace={"conv_transpose", *others}, numerics="fp32", device=device)
    for row in parity.compare_models(model, ours, x):
        assert row.ok, row
    names = {k.name for k in launched}
    assert names >= {"conv_transpose_mma", "conv_wgrad_mma"}
    assert ("conv_bn_pool" in names) == (len(others) == 4)
    assert not names & {"conv_gather", "wgrad_partial"}


def test_running_statistics_of_any_kind(device):
    """momentum None is the average of all batches; without running statistics those of the batch serve evaluation."""
    for change in ({"momentum": None}, {"momentum": 0.3, "eps": 0.5}, {"running_mean": None, "running_var": None}):
        model, ours, x = models(CASES["even"], "fp32", device)
        double = copy.deepcopy(model).double()
        for m in (model, ours, double):
            for name, value in change.items():
                setattr(m.batch_norm, name, value)
            m.batch_norm.track_running_stats = m.batch_norm.running_mean is not None
        for batch in (x, 2 * x):
            model(batch), ours(batch), double(batch.double())
        for m in (model, ours, double):
            m.eval()
        assert explain(ours, x).startswith("fused")
        tolerance.check(ours(x).detach(), double(x.double()).detach(), model(x).detach(), f"output, {change}")
        for name, buffer in double.batch_norm.named_buffers():
            if buffer.is_floating_point():
                found = (dict(m.batch_norm.named_buffers())[name] for m in (ours, model))
                actual, theirs = found
                tolerance.check(actual, buffer, theirs, f"{name}, {change}")
            else:
                assert buffer == dict(ours.batch_norm.named_buffers())[name]
