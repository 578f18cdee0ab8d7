"""Random calls of every function beside PyTorch's: `modelnew.fuzz`, with cases that hypothesis draws, and shrinks."""

import json
from functools import partial

import invoked
import pytest
import torch
from faults import planted
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from modelnew import __main__ as cli
from modelnew import fuzz, fuzz_judge
from modelnew.fuzz_cases import OPERATORS

pytestmark = pytest.mark.usefixtures("one_thread")

# Cases of the emulator. On tensor cores one takes half a second.
FEW = {
    "conv_transpose2d": 12,
    **dict.fromkeys(("conv_bn_tanh_max_pool_group_norm", "conv_bn_activation_max_pool_group_norm"), 4),
}


@pytest.mark.parametrize("operator", OPERATORS)
def test_as_torch(device, operator):
    @settings(
        max_examples=FEW.get(operator, 30),
        derandomize=True,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(st.randoms(use_true_random=False), st.integers(0, 2**31 - 1))
    def run(draw, seed):
        case = OPERATORS[operator](draw)
        assert not fuzz_judge.faults(case, seed, torch.device(device)), fuzz_judge.describe(case)

    run()


def test_planned_cases_launch_nothing(device, launched):
    """Planned results are zeros: argmax of none of these windows, from which a second derivative would read."""
    case, seed = fuzz_judge.draw("bn_tanh_max_pool2d", 0, 34)
    assert case.order == 2
    assert "padding=1" in case.text
    found = fuzz_judge.launched(case, seed, torch.device(device))
    assert "max_pool_select" in {kernel.name for kernel in found.values()}
    assert not launched


# (operator, file, old, new): kernels with a fault.
FAULTS = (
    ("tanh", "tanh.cuh", "(acc_t)1 - y * y", "(acc_t)1.00001f - y * y"),
    ("leaky_relu", "leaky_relu.cu", "leaky(gradient.v[i], in.v[i]", "leaky(gradient.v[i], gradient.v[i]"),
    ("max_pool2d", "pool_window.cuh", "greater(v, value) |", "(v >= value) |"),
    *(
        (operator, "pool_window.cuh", "greater(v, value) | is_nan(v)", "greater(v, value)")
        for operator in ("max_pool2d", "tanh_max_pool2d", "bn_tanh_max_pool2d")
    ),
    ("batch_norm", "batch_norm.cuh", "return xhat * weight + bias;", "return xhat * weight * (acc_t)1.0001f + bias;"),
    # The batch norm that walks along channels, and the others.
    ("batch_norm", "channel_values.cuh", "* invstd[i / PER_SLOT];", "* invstd[i / PER_SLOT] * (acc_t)1.0001f;"),
    ("bn_tanh_max_pool2d", "batch_norm.cuh", "- mean) * invstd;", "- mean) * invstd * (acc_t)1.0001f;"),
    ("group_norm", "batch_norm.cuh", "- mean) * invstd;", "- mean) * invstd * (acc_t)1.0001f;"),
    ("group_norm", "group_norm.cu", "moments.squares / size", "moments.squares / (size - 1)"),
    ("tanh_max_pool2d", "pool_window.cuh", "min(position / stride, windows - 1)", "position / stride"),
    ("conv_transpose2d", "conv_transpose.cu", "int r = within / phase_w,", "int r = min(within / phase_w, 9),"),
)


@pytest.mark.parametrize(("operator", "file", "old", "new"), FAULTS)
def test_a_planted_fault_is_found(operator, file, old, new):
    with planted(file, (old, new)):
        assert any(fuzz_judge.run(operator, 0, number, torch.device("cpu")) for number in range(60))


def test_a_redrawn_case_may_be_chance_and_a_gross_error_not():
    case, _ = fuzz_judge.draw("tanh", 0, 0)
    x = torch.randn(100).double()

    def draws(*sizes):
        return [
            {"output": ((x + s * 1e-6 * torch.randn(100)).float(), x, (x + 1e-6 * torch.randn(100)).float())}
            for s in sizes
        ]

    assert fuzz_judge._wrong(case, draws(2))
    assert fuzz_judge._wrong(case, draws(*[1.5] * 32))
    assert not fuzz_judge._wrong(case, draws(1))
    assert not fuzz_judge._wrong(case, draws(*[1] * 30, 4, 4))
    assert fuzz_judge._wrong(case, draws(*[1] * 31, 1000))


invoke = partial(invoked.invoke, cli.main, "fuzz", "--device", "cpu", spaces=" +")


def test_command(tmp_path):
    code, text = invoke("--cases", 3, "--operator", "tanh", "--operator", "max_pool2d", "--output", tmp_path)
    assert code == 0, text
    assert "6 cases, 0 wrong" in text
    record = json.loads((tmp_path / "fuzz_cpu.json").read_text())
    assert record["cases"] == {"tanh": 3, "max_pool2d": 3}
    assert record["failed"] == 0
    assert {"command", "versions", "digest"} < set(record)
    code, text = invoke("--operator", "tanh", "--budget", 0, "--output", tmp_path)
    assert code == 1
    assert "no case was judged in 0 s" in text
    assert json.loads((tmp_path / "fuzz_cpu.json").read_text()) == record


def test_several_processes_share_the_cases():
    operators, reports = ["tanh", "leaky_relu"], []

    def report(operator, lines):
        reports.append((operator, len(lines)))

    found = fuzz.fuzz(operators, fuzz.BATCH + 10, 0, torch.device("cpu"), 600, report, processes=2)
    assert found == (dict.fromkeys(operators, fuzz.BATCH + 10), 0)
    assert reports == [(operator, count) for count in (fuzz.BATCH, 10) for operator in operators]


def test_no_case_is_wrong_because_nothing_can_run(monkeypatch):
    monkeypatch.setenv("CUPY_KERNELS_TIMEOUT", "soon")
    code, text = invoke("--cases", 1, "--operator", "tanh")
    assert code == 1
    assert "CUPY_KERNELS_TIMEOUT='soon' is not a positive number" in text
    assert "wrong" not in text


def test_command_names_a_wrong_case(tmp_path):
    with planted("tanh.cuh", ("(acc_t)1 - y * y", "(acc_t)1.001f - y * y")):
        code, text = invoke("--cases", 20, "--operator", "tanh", "--output", tmp_path)
        assert code == 1
        lines = [line for line in text.splitlines() if line.startswith("python3 -m modelnew fuzz")]
        assert json.loads((tmp_path / "fuzz_cpu.json").read_text())["failed"] == len(lines)
        options = lines[0].partition(":")[0].split()[4:]
        assert invoke(*options)[0] == 1
    assert invoke(*options)[0] == 0
