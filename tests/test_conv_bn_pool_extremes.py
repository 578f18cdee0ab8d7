"""The fused model on values that are large, small, far from 0, or not finite."""

import copy

import pytest
import tolerance
import torch
from fused_models import CASES, CLASSES, models

from modelnew import Model, ModelNew, parity
from modelnew.functional import conv_transpose2d


@pytest.mark.parametrize("cls", CLASSES)
def test_statistics_of_a_large_mean(device, cls):
    """|mean| 1e4 times the standard deviation, from one constant input channel; truth: statistics of the same sums."""
    _, ours, x = models(CASES["even"], cls, device)
    with torch.no_grad():
        x[:, 0] = 1
        ours.conv_transpose.weight[0] = 0
        ours.conv_transpose.weight[0, :, 1, 1] = 2**17
        ours.conv_transpose.bias.zero_()
        ours.batch_norm.momentum = 1.0
        y = conv_transpose2d(x, ours.conv_transpose.weight, padding=1, numerics=cls).double()
        ours(x)
    mean, var = y.mean((0, 2, 3)), y.var((0, 2, 3))
    ratio = (mean / var.sqrt()).min().item()
    assert ratio > 1e4
    unit = torch.finfo(torch.float32).eps
    assert parity.error(ours.batch_norm.running_mean, mean).max < 2 * unit
    # A float32 mean is half a unit off, and Welford's method as much as that in standard deviations; squares of values
    # would be off by unit * ratio^2.
    assert parity.error(ours.batch_norm.running_var, var).max < unit * ratio / 2


def test_nan_and_inf(device):
    model, ours, x = models(CASES["even"], "tf32", device)
    model.eval(), ours.eval()
    for special in (float("nan"), float("inf")):
        x[0, 2, 3, 3] = special
        assert torch.equal(ours(x).isnan(), model(x).isnan())


@pytest.mark.parametrize("cls", ["fp32", "tf32"])
def test_an_infinite_mean(device, cls, wgmma):
    """Where the convolution's results are infinite with one sign, so is their mean."""
    arguments = (16, 16, 3, 1, 1, 1, 4)
    model, ours = Model(*arguments, device=device), ModelNew(*arguments, numerics=cls, device=device)
    x = torch.randn(2, 16, 8, 8, device=device)
    x[0, 3, 0, 2] = x[0, 3, 5, 4] = x[1, 3, 4, 4] = float("inf")
    with torch.no_grad():
        model.conv_transpose.weight[3].abs_().clamp_(min=0.01)[:8].neg_()
        ours.load_state_dict(model.state_dict())
        model(x), ours(x)
    assert model.batch_norm.running_mean.isinf().all()
    assert torch.equal(ours.batch_norm.running_mean, model.batch_norm.running_mean)


EXTREMES = {
    "1e-20": lambda x: x.mul_(1e-20),
    "outlier_image": lambda x: x[1].mul_(1e6),
    "outlier_pixel": lambda x: x[1, 2, 3, 3].mul_(1e6),
    "nan": lambda x: x[1, 2, 3, 3].fill_(float("nan")),
    "inf": lambda x: x[1, 2, 3, 3].fill_(float("inf")),
    "mean_1e4": lambda x: x.mul_(1e-4).add_(1),
}


@pytest.mark.parametrize("name", EXTREMES)
@pytest.mark.parametrize("cls", ["fp32", "tf32"])
def test_extreme_inputs_to_the_whole_model(device, cls, name):
    """As close to float64 as PyTorch, in the tf32 class with operands rounded to TF32; not finite where it is not."""
    arguments = (16, 16, 3, 1, 1, 1, 4)
    model, ours = Model(*arguments, device=device), ModelNew(*arguments, numerics=cls, device=device)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) / 2)
        if name == "1e-20":  # float64 too would lose the values beside a bias, and with them the pool's choice
            model.conv_transpose.bias.zero_()
            model.batch_norm.bias.zero_()
    ours.load_state_dict(model.state_dict())
    x = torch.randn(4, 16, 6, 8, device=device)
    EXTREMES[name](x)
    runs = {"truth": (copy.deepcopy(model).double(), x.double()), "ours": (ours, x)}
    runs["torch"] = (copy.deepcopy(model) if cls == "fp32" else parity.tf32_rounding(model), x)
    dout, found = torch.randn(4, 16, 3, 4, device=device), {}
    for who, (m, leaf) in runs.items():
        leaf = leaf.clone().requires_grad_()
        y = m(leaf)
        y.backward(dout.to(y.dtype))
        found[who] = {"output": y.detach(), "x": leaf.grad, **{k: p.grad for k, p in m.named_parameters()}}
        found[who].update((k, b) for k, b in m.named_buffers() if b.is_floating_point())
    for what, truth in found["truth"].items():
        actual, theirs = found["ours"][what], found["torch"][what]
        assert torch.equal(actual.isfinite(), theirs.isfinite()), what
        if what == "conv_transpose.bias":  # zero in mathematics
            assert torch.equal(actual.isnan(), truth.isnan())
            assert not actual.nan_to_num().any()
        else:
            right = theirs.isfinite() | ~truth.isfinite()  # elsewhere ours overflows as PyTorch's does
            tolerance.check(actual[right], truth[right], theirs[right], what)


@pytest.mark.parametrize("wgmma", [False, True], indirect=True)
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("exponent", [62, 66, 108])  # beyond, gradients are denormals, which a GPU takes for 0
@pytest.mark.parametrize("cls", ["fp32", "tf32"])
def test_large_inputs_are_as_right_as_small_ones(device, cls, exponent, training, wgmma):
    """Squares of the convolution's results overflow float32, where PyTorch's own results are zeros and NaN.

    Batch norm takes the factor out again, so that the results are those of x but for eps.
    """
    arguments = (16, 16, 3, 1, 1, 1, 4)
    model, ours = Model(*arguments, device=device), ModelNew(*arguments, numerics=cls, device=device)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) / 2)
        model.conv_transpose.bias.zero_()
    model.train(training), ours.train(training)
    x, dout, errors = torch.randn(4, 16, 6, 9, device=device), torch.randn(4, 16, 3, 4, device=device), []
    for factor in (1, 2.0**exponent):
        ours.load_state_dict(model.state_dict())
        found = []
        for m in (ours, copy.deepcopy(model).double()):
            leaf = (x * factor).to(next(m.parameters()).dtype).requires_grad_()
            y = m(leaf)
            y.backward(dout.to(y.dtype))
            found.append([y.detach(), leaf.grad, *(p.grad for p in m.parameters()), *m.buffers()])
            m.zero_grad()
        names = ["output", "x", *dict(ours.named_parameters()), *dict(ours.named_buffers())]
        of = {n: parity.error(a, t.to(a.dtype)).rms for n, a, t in zip(names, *found) if n != "conv_transpose.bias"}
        errors.append(of)
    for name, large in errors[1].items():
        assert large <= 1.5 * errors[0][name] + 1e-6, name
