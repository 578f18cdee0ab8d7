import copy

import pytest
import torch
from faults import planted

from modelnew import Model, ModelNew, parity
from modelnew.parity import CLASSES, Error, Row, compare_models, error, within_policy

SMALL = (4, 8, 3, 1, 1, 1, 2)


def test_error_is_relative_to_the_truth():
    truth = torch.tensor([3.0, -4.0, 0.0, 5.0], dtype=torch.float64)
    found = error(truth + torch.tensor([0.0, 0.0, 0.1, 0.0]), truth)
    rms = (50 / 4) ** 0.5
    assert found.rms == pytest.approx(0.05 / rms)
    assert found.max == pytest.approx(0.1 / rms)
    assert error(truth + 1, truth, scale=10.0) == pytest.approx(Error(0.1, 0.1))
    assert error(torch.full((3,), 0.5), torch.zeros(3)) == Error(0.5, 0.5)
    assert error(torch.empty(0), torch.empty(0)) == Error(0.0, 0.0)
    with pytest.raises(ValueError, match=r"\(2,\), truth \(3,\)"):
        error(torch.ones(2), torch.ones(3))


def test_error_of_special_values():
    nan, inf = float("nan"), float("inf")
    truth = torch.tensor([1.0, nan, inf, -inf])
    assert error(truth.clone(), truth) == Error(0.0, 0.0)
    for wrong in ([1.0, 0.0, inf, -inf], [1.0, nan, -inf, -inf], [nan, nan, inf, -inf], [1.0, nan, inf, 3e38]):
        assert error(torch.tensor(wrong), truth) == Error(inf, inf)


def test_policy():
    truth = torch.randn(100_000, dtype=torch.float64)
    theirs = Error(1e-3, 5e-3)
    assert within_policy(truth.float(), truth, theirs, theirs)
    assert within_policy(truth.float(), truth, Error(1.09e-3, 5.4e-3), theirs)
    assert not within_policy(truth.float(), truth, Error(1.2e-3, 5e-3), theirs)
    assert not within_policy(truth.float(), truth, Error(1e-3, 6.5e-3), theirs)
    exact = Error(0.0, 0.0)
    assert not within_policy(truth.float(), truth, Error(7e-7, 1e-6), exact)
    assert within_policy(truth.float(), truth, Error(7e-7, 1e-6), exact, terms=1000)
    assert within_policy(truth.float(), truth, Error(1e-7, 1e-6), exact)
    assert not within_policy(truth.float(), truth, Error(2e-7, 1e-6), exact)
    assert not within_policy(truth.float(), truth, Error(0.0, 2.5e-6), exact)
    nothing = truth[:0]
    assert within_policy(nothing, nothing, error(nothing, nothing), error(nothing, nothing))


def test_an_infinite_error_allows_nothing():
    """Where PyTorch's result is not finite, ours is judged all the same; so it is where no value of the truth is."""
    truth = torch.randn(1000, dtype=torch.float64)
    infinite = Error(float("inf"), float("inf"))
    assert within_policy(truth.float(), truth, error(truth.float(), truth), infinite)
    assert not within_policy(truth.float(), truth, Error(1e-3, 1e-3), infinite)
    assert not within_policy(truth.float(), truth, infinite, infinite)
    nan = torch.full((3,), float("nan"))
    assert within_policy(nan, nan, error(nan, nan), infinite)
    assert not within_policy(torch.zeros(3), nan, error(torch.zeros(3), nan), infinite)


def test_a_truth_too_large_for_the_dtype_is_an_infinity():
    truth = torch.tensor([1e5, -1e5, 2.0], dtype=torch.float64)
    right = error(truth.half(), truth)
    assert right == Error(0.0, 0.0)
    assert within_policy(truth.half(), truth, right, right)
    wrong = truth.clamp(-65504, 65504).half()
    assert not within_policy(wrong, truth, error(wrong, truth), error(wrong, truth))


def test_policy_lets_equals_pass():
    """Of two samples of the same errors one has the larger maximum by chance; errors 1.3 times as large are refused."""
    truth = torch.zeros(20_000, dtype=torch.float64)
    truth[0] = 1e-30  # nothing is allowed for rounding
    passed, worse = 0, 0
    for _ in range(100):
        samples = [error(truth + 1e-3 * torch.randn_like(truth), truth) for _ in range(2)]
        passed += within_policy(truth.double(), truth, *samples)
        worse += within_policy(truth.double(), truth, Error(*(1.3 * v for v in samples[0])), samples[1])
    assert passed > 95
    assert worse == 0


def test_row():
    row = Row("output", "fp32", Error(1e-6, 4e-6), Error(2e-6, 5e-6), close=True, ok=True)
    assert row.ratio == 0.5
    exact = Error(0.0, 0.0)
    assert row._replace(torch=exact).ratio == float("inf")
    assert row._replace(ours=exact, torch=exact).ratio == 0
    assert row.record() == {
        "what": "output",
        "class": "fp32",
        "rms": 1e-6,
        "max": 4e-6,
        "torch_rms": 2e-6,
        "torch_max": 5e-6,
    }


@pytest.mark.parametrize("cls", CLASSES)
def test_rows_of_a_model_with_itself(device, cls):
    model, model_new = Model(*SMALL, device=device), ModelNew(*SMALL, replace=(), device=device)
    before = copy.deepcopy((model.state_dict(), model_new.state_dict()))
    allowed = torch.backends.cudnn.allow_tf32
    rows = compare_models(model, model_new, torch.randn(2, 4, 6, 6, device=device), cls)
    assert [row.what for row in rows] == [
        "output",
        "grad x",
        *(f"grad {name}" for name, _ in model.named_parameters()),
        "batch_norm.running_mean",
        "batch_norm.running_var",
    ]
    for row in rows:
        assert row.ok, row
        if row.what != "grad conv_transpose.bias":  # 0 but for noise
            assert row.ours == row.torch or (cls == "tf32" and row.ours.rms < row.torch.rms)  # PyTorch in float32
        assert row.cls == cls
    assert torch.backends.cudnn.allow_tf32 == allowed
    for m, state in zip((model, model_new), before):
        for key, value in m.state_dict().items():
            assert torch.equal(value, state[key])


def broken(rows):
    return {row.what for row in rows if not row.ok}


def test_a_wrong_result_is_found(device):
    model, model_new = Model(*SMALL, device=device), ModelNew(*SMALL, replace=(), device=device)
    x = torch.randn(2, 4, 6, 6, device=device)
    model_new.group_norm.eps = 1.1e-5
    assert "output" in broken(compare_models(model, model_new, x))
    model_new.group_norm.eps = 1e-5
    model_new.batch_norm.momentum = 0.1001
    assert broken(compare_models(model, model_new, x)) == {"batch_norm.running_mean", "batch_norm.running_var"}


def test_a_wrong_gradient_is_found(device):
    model, model_new = Model(*SMALL, device=device), ModelNew(*SMALL, replace="tanh", device=device)
    x = torch.randn(2, 4, 6, 6, device=device)
    assert not broken(compare_models(model, model_new, x))
    with planted("tanh.cuh", ("(acc_t)1 - y * y", "(acc_t)1.00001f - y * y")):
        found = broken(compare_models(model, model_new, x))
    assert "grad x" in found
    assert "output" not in found


def test_what_rounding_to_tf32_costs(device):
    """A model that rounds operands to bfloat16 is found, one that rounds as TF32 does is not."""
    arguments = (16, 16, 3, 1, 1, 1, 4)
    model, x = Model(*arguments, device=device), torch.randn(8, 16, 6, 6, device=device)
    rounding = parity.tf32_rounding(model)
    assert not broken(compare_models(model, rounding, x, "tf32"))
    rounding.conv_transpose.register_forward_pre_hook(lambda _, inputs: (inputs[0].bfloat16().float(),))
    assert {"output", "grad conv_transpose.weight"} <= broken(compare_models(model, rounding, x, "tf32"))


def test_rounding_to_tf32():
    """10 mantissa bits, ties to even; the truth by float64 arithmetic."""
    x = torch.cat([torch.randn(4096) * 10.0 ** torch.randint(-30, 30, (4096,)), 1 + torch.arange(64) / 2**12])
    mantissa, exponent = torch.frexp(x.double())
    expected = torch.ldexp((mantissa * 2**11).round(), exponent - 11)
    assert torch.equal(parity.tf32_rounded(x).double(), expected)


@pytest.mark.parametrize("kink", [False, True])
def test_nothing_flows_into_windows_that_rounding_decides(kink):
    torch.manual_seed(1)
    model = Model(*SMALL, device="cpu").double()
    torch.nn.init.uniform_(model.group_norm.weight, 0.5, 2)
    hidden = torch.rand(3, 8, 6, 7, dtype=torch.float64) - 0.7 * kink
    pooled = model.max_pool(hidden).requires_grad_()
    near_tie = 0.05
    norm = model.group_norm
    dy = parity.incoming_gradient(
        hidden, pooled.detach(), norm.num_groups, norm.weight.detach(), near_tie, seed=0, kink=kink
    )
    (back,) = torch.autograd.grad(norm(pooled), pooled, dy)
    first, second = hidden.unfold(2, 2, 2).unfold(3, 2, 2).flatten(4).topk(2).values.unbind(-1)
    tied = first - second <= near_tie
    if kink:
        assert 0.02 < ((first.abs() <= near_tie) & ~tied).double().mean() < 0.2
        tied |= first.abs() <= near_tie
    assert 0.1 < tied.double().mean() < 0.5
    # eps of the group norm keeps the orthogonality from being exact
    assert back[tied].abs().max() < 1e-3 * back[~tied].square().mean().sqrt()


@pytest.mark.parametrize("activation", [torch.nn.Tanh(), torch.nn.LeakyReLU()])
def test_models_with_a_kink_are_compared_away_from_it(activation, monkeypatch):
    calls, real = [], parity.incoming_gradient
    monkeypatch.setattr(parity, "incoming_gradient", lambda *arguments: calls.append(arguments) or real(*arguments))
    model, same = (Model(*SMALL, device="cpu") for _ in range(2))
    model.tanh = same.tanh = activation
    assert all(row.ok for row in compare_models(model, same, torch.rand(3, 4, 6, 7)))
    assert calls[0][-1] == isinstance(activation, torch.nn.LeakyReLU)


def test_where_pytorch_itself_is_not_close():
    """Ours may then differ from PyTorch's, but not lie far from the truth more often."""
    truth = torch.linspace(1, 2, 1000, dtype=torch.float64)

    def row(ours, theirs):
        """ours, theirs: how many elements are too far off for assert_close."""
        found, expected = (truth.float() + off * (torch.arange(1000) < n) for off, n in ((2e-5, ours), (-2e-5, theirs)))
        return parity._row("output", "fp32", found, {"output": truth}, expected)

    assert row(0, 0).close
    assert not row(100, 100).close
    assert row(100, 100).ok
    assert row(0, 100).ok
    assert not row(1, 0).ok
    assert parity.within_chance(130, 100)
    assert not parity.within_chance(150, 100)


def test_unknown_class():
    with pytest.raises(ValueError, match="fp32, tf32, received 'fp16'"):
        compare_models(Model(*SMALL), ModelNew(*SMALL), torch.zeros(1, 4, 6, 6), "fp16")
