"""`python -m modelnew training`: what it compares, how it judges, what it writes."""

import json
import re

import pytest
import torch
from click.testing import CliRunner

from cupy_kernels import source
from modelnew import __main__ as cli
from modelnew import environment, training
from modelnew.training import RUNS, Result, Run, Settings

CPU = torch.device("cpu")
pytestmark = pytest.mark.usefixtures("one_thread")


def invoke(*arguments):
    result = CliRunner().invoke(training.training_command, [str(a) for a in arguments])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.exit_code, re.sub(r"\s+", " ", result.output)


def results(**changed):
    """Model with TF32 ends 1e-3 from Model in float32; `changed`: what is added to a quantity of a ModelNew in tf32."""
    found = {}
    for run in RUNS:
        ends = {what: torch.ones(30, dtype=torch.float64) for what in Result._fields}
        for what, end in ends.items():
            end += 1e-3 * (run.cls == "tf32") + (changed.get(what, 0) if run == Run("ModelNew", "tf32", "nchw") else 0)
        found[run] = Result(**ends)
    return found


def test_command(tmp_path):
    pytest.importorskip("matplotlib")
    steps = 22
    code, text = invoke("--device", "cpu", "--steps", steps, "--channels", 4, "--seeds", 2, "--output", tmp_path)
    assert code == 0, text
    assert "FAIL" not in text
    assert "On the CPU: TF32 by rounding" in text
    assert sorted(p.name for p in tmp_path.iterdir()) == ["training_cpu.json", "training_cpu.png"]
    assert (tmp_path / "training_cpu.png").read_bytes().startswith(b"\x89PNG")
    record = json.loads((tmp_path / "training_cpu.json").read_text())
    assert record["command"].startswith("python3 -m modelnew")
    assert record["digest"] == source.digest()
    assert record["versions"]["torch"] == torch.__version__
    assert (record["steps"], record["batch"], record["factor"], record["seeds"]) == (steps, 4, training.FACTOR, 2)
    assert [(r["who"], r["class"], r["layout"]) for r in record["rows"]] == RUNS
    for row in record["rows"]:
        assert len(row["losses"]) == steps
        assert row["loss_last"] < row["losses"][0] / 2
        assert row["losses"][0] == pytest.approx(record["rows"][0]["losses"][0], rel=1e-2)
    found = {(c["what"], c["class"]): c for c in record["comparisons"]}
    assert set(found) == {(what, cls) for what in Result._fields for cls in ("tf32", "fp32")}
    for (_, cls), c in found.items():
        assert c["ok"]
        assert c["distance"] <= training.FACTOR * c["classes"]
        assert len(c["ratios"]) == 2
        if cls == "fp32":
            assert 0 < c["distance"] < c["classes"] / 10


def test_kernels_on_tensor_cores_train(launched):
    settings = Settings(steps=2, batch=2, channels=16, size=6, lr=0.3, momentum=0.9, seed=0)
    found = dict(training.train(settings, CPU, lambda run: None))
    assert {"conv_bn_pool", "conv_wgrad_mma"} <= {kernel.name for kernel in launched}
    assert [r.cls for r in training.compare([found]) if not r.ok] == []


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_ends_where_pytorch_ends(tmp_path):
    """300 steps of the mission's model, from 5 seeds. 64 images: for fewer cuDNN uses no TF32."""
    code, text = invoke("--device", "cuda", "--steps", 300, "--batch", 64, "--output", tmp_path)
    assert code == 0, text
    record = json.loads((tmp_path / f"training_{environment.slug()}.json").read_text())
    assert all(row["loss_last"] < row["losses"][0] / 2 for row in record["rows"])


def test_a_wrong_gradient_fails():
    slope = source.text("tanh.cuh").replace("(acc_t)1 - y * y", "(acc_t)1.02f - y * y")
    with source.override({"tanh.cuh": slope}):
        code, text = invoke("--device", "cpu", "--steps", 4, "--channels", 4, "--size", 4)
    assert code == 1
    assert re.search(r"loss fp32 \S+ \S+ \S+ \S+ \S+ to \S+ FAIL", text)


@pytest.mark.parametrize("what", Result._fields)
def test_rule(what):
    right = {**dict.fromkeys(Result._fields, 0), what: 1.9e-3}
    assert all(row.ok for row in training.compare([results(**right)]))
    wrong = {(row.what, row.cls) for row in training.compare([results(**{what: 2.2e-3})]) if not row.ok}
    assert wrong == {(what, "tf32")}


def test_limit_is_the_larger_of_both_layouts():
    found = results(loss=5e-3)
    assert not all(row.ok for row in training.compare([found]))
    found[Run("Model", "tf32", "nhwc")].loss.add_(2e-3)
    assert all(row.ok for row in training.compare([found]))


def test_median_over_seeds():
    right, wrong = results(), results(loss=5e-3)
    rows = training.compare([right, wrong, right])
    assert all(row.ok for row in rows)
    assert rows[0].ratios == pytest.approx([0, 5, 0], rel=1e-2)
    assert not all(row.ok for row in training.compare([wrong, right, wrong]))
    right[RUNS[-1]].loss[-1] = float("nan")  # one seed that diverges is enough
    assert [(r.what, r.cls) for r in training.compare([results(), right, results()]) if not r.ok] == [("loss", "fp32")]


def test_what_gives_no_measure():
    found = results()
    found[RUNS[-1]].loss[-1] = float("nan")
    assert [(r.what, r.cls) for r in training.compare([found]) if not r.ok] == [("loss", "fp32")]
    found[RUNS[0]].loss[-1] = float("inf")
    with pytest.raises(ValueError, match="diverged"):
        training.compare([found])
    alike = {run: Result(*[torch.ones(3)] * 3) for run in RUNS}
    with pytest.raises(ValueError, match="fewer than 64 images"):
        training.compare([alike])


def test_all_runs_begin_alike():
    settings = Settings(steps=1, batch=2, channels=4, size=4, lr=0.1, momentum=0, seed=3)
    first, second = (dict(training.train(settings, CPU, lambda run: None)) for _ in range(2))
    for run in RUNS:
        assert torch.equal(first[run].loss, second[run].loss)
        torch.testing.assert_close(first[run].loss, first[RUNS[0]].loss, rtol=1e-2, atol=0)


def test_help_explains_every_option():
    text = re.sub(r"\s+", " ", CliRunner().invoke(cli.main, ["training", "--help"]).output)
    for parameter in training.training_command.params:
        assert max(parameter.opts, key=len) in text
        assert parameter.help.split("  ")[0] in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--channels", "6"], "must be a multiple of 4, received 6"),
        (["--lr", "0"], "0.0 is not in the range"),
        (["--momentum", "1"], "1.0 is not in the range"),
        (["--seeds", "0"], "0 is not in the range"),
        (["--device", "xpu"], "received xpu"),
    ],
)
def test_bad_options(arguments, message):
    code, text = invoke(*arguments)
    assert code == 2
    assert message in text
