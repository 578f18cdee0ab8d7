"""`python -m modelnew training`: what it judges, that it refuses what is wrong, what it writes."""

import json
import re
from functools import partial

import invoked
import pytest
import torch

from cupy_kernels import source
from modelnew import __main__ as cli
from modelnew import environment, training, training_steps
from modelnew.model import Model
from modelnew.parity import CLASSES, NEAR_TIE, RATIO, Error, Row
from modelnew.training_steps import JUDGED, RUNS, Judgement, Run, Settings

CPU = torch.device("cpu")
SMALL = Settings(steps=2, batch=4, channels=16, size=6, lr=0.3, momentum=0.9, seed=0)
PARAMETERS = [name for name, _ in Model(4, 8, 5, 1, 1, 8, 8).named_parameters() if name != "conv_transpose.bias"]
COMPARED = {"output", *PARAMETERS, "batch_norm.running_mean", "batch_norm.running_var"}
pytestmark = pytest.mark.usefixtures("one_thread")


invoke = partial(invoked.invoke, training.training_command)


def judged(settings=SMALL):
    return list(training_steps.judge(settings, CPU, lambda run: None))


@pytest.fixture
def plant(monkeypatch):
    """A function that lets `change(model)` be done to every ModelNew before it is trained."""

    def planted(change):
        def build(run, *arguments):
            model = right(run, *arguments)
            if run.who == "ModelNew":
                change(model)
            return model

        monkeypatch.setattr(training_steps, "_build", build)

    right = training_steps._build
    return planted


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
    assert (record["steps"], record["batch"], record["judged"], record["seeds"]) == (steps, 4, JUDGED, 2)
    assert [(r["who"], r["class"], r["layout"]) for r in record["rows"]] == RUNS
    for row in record["rows"]:
        assert len(row["losses"]) == steps
        assert row["loss_last"] < row["losses"][0] / 2
        assert row["losses"][0] == pytest.approx(record["rows"][0]["losses"][0], rel=1e-2)
    found = {(j["what"], j["class"]): j for j in record["judgements"]}
    assert set(found) == {(what, cls) for what in COMPARED for cls in CLASSES}
    assert all(j["ok"] and j["seed"] in (0, 2) and j["step"] in range(1, JUDGED + 1) for j in found.values())
    assert 0 < found["output", "fp32"]["rms"] < 1e-6 < 1e-5 < found["output", "tf32"]["torch_rms"]


def test_under_autocast(tmp_path, launched, monkeypatch):
    """The fused kernels, with a GradScaler; judged and drawn as without."""
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(training_steps, "JUDGED", 2)
    code, text = invoke("--device", "cpu", "--amp", "--steps", 3, "--output", tmp_path)
    assert code == 0, text
    assert "TF32" not in text
    assert {"conv_bn_pool", "conv_wgrad_mma"} <= {kernel.name for kernel in launched}
    assert (tmp_path / "training_amp_cpu.png").read_bytes().startswith(b"\x89PNG")
    record = json.loads((tmp_path / "training_amp_cpu.json").read_text())
    assert record["amp"]
    assert [(r["who"], r["class"], r["layout"]) for r in record["rows"]] == training_steps.AMP_RUNS
    assert all(row["losses"][-1] < row["losses"][0] for row in record["rows"])
    found = {(j["what"], j["class"]): j for j in record["judgements"]}
    assert set(found) == {(what, cls) for what in COMPARED for cls in ("fp16", "bf16")}
    assert found["output", "fp16"]["torch_rms"] < found["output", "bf16"]["torch_rms"]  # by how much, the CPU decides


def test_a_fault_under_autocast_is_refused(plant, monkeypatch):
    monkeypatch.setattr(training_steps, "JUDGED", 1)
    plant(lambda model: model.get_parameter("conv_transpose.weight").register_hook(lambda g: 1.03 * g))
    refused = {(j.row.what, j.row.cls) for j in judged(SMALL._replace(amp=True, batch=12)) if not j.row.ok}
    assert ("conv_transpose.weight", "fp16") in refused


def test_every_step_and_seed_is_judged(launched):
    """On tensor cores, as a GPU runs it."""
    found = [judgement for seed in (0, 2) for judgement in judged(SMALL._replace(seed=seed))]
    assert {"conv_bn_pool", "conv_wgrad_mma"} <= {kernel.name for kernel in launched}
    assert sorted((j.seed, j.step, j.row.cls, j.row.what) for j in found) == sorted(
        (seed, step, cls, what)
        for seed in (0, 2)
        for step in range(1, JUDGED + 1)
        for cls in CLASSES
        for what in COMPARED
    )
    assert [j for j in found if not j.row.ok] == []


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_on_a_gpu(tmp_path):
    """The reference model, from 5 seeds. 64 images: for fewer cuDNN uses no TF32."""
    code, text = invoke("--device", "cuda", "--steps", 300, "--batch", 64, "--output", tmp_path)
    assert code == 0, text
    record = json.loads((tmp_path / f"training_{environment.slug()}.json").read_text())
    assert all(row["loss_last"] < row["losses"][0] / 2 for row in record["rows"])


def tf32_quality(model):
    model.conv_transpose.numerics = "tf32"


def wrong_eps(model):
    model.batch_norm.eps = 1.5e-5


def a_thousandth_more(name):
    def change(model):
        model.get_parameter(name).register_hook(lambda gradient: 1.001 * gradient)

    return pytest.param(change, {name}, id=name)


@pytest.mark.parametrize(
    ("change", "refused"),
    [
        (tf32_quality, {"output", "conv_transpose.weight", "batch_norm.running_mean"}),
        (wrong_eps, {"output", "conv_transpose.weight"}),
        *map(a_thousandth_more, PARAMETERS),
    ],
)
def test_a_planted_fault_is_refused(plant, change, refused, monkeypatch):
    """In the float32 class, by orders of magnitude, after the first two steps already."""
    monkeypatch.setattr(training_steps, "JUDGED", 2)
    plant(change)
    found = {j.row.what: j.row for j in training_steps.worst(judged()) if j.row.cls == "fp32"}
    for what in refused:
        assert not found[what].ok
        assert found[what].ratio > 20, found[what]
    if change not in (tf32_quality, wrong_eps):
        assert {what for what, row in found.items() if not row.ok} == refused


def test_a_weight_from_before_the_step_is_refused(plant):
    def forget(model):
        old = model.conv_transpose.weight.detach().clone()

        def restore(conv, inputs):
            conv.weight.data.copy_(old)

        model.conv_transpose.register_forward_pre_hook(restore)

    plant(forget)
    outputs = [(j.step, j.row.ok) for j in judged() if j.row.what == "output"]
    assert sorted(outputs) == sorted((step, step == 1) for step in range(1, JUDGED + 1) for _ in CLASSES)


def test_a_wrong_kernel_fails_the_command():
    slope = source.text("tanh.cuh").replace("(acc_t)1 - y * y", "(acc_t)1.001f - y * y")
    assert slope != source.text("tanh.cuh")
    with source.override({"tanh.cuh": slope}):
        code, text = invoke("--device", "cpu", "--steps", 1)
    assert code == 1
    for cls in CLASSES:
        assert re.search(rf"conv_transpose.weight {cls} \S+ \S+ \S+ 0 \d FAIL", text)


def test_worst_puts_what_is_wrong_first():
    def judgement(step, ours, ok):
        return Judgement(0, step, Row("output", "fp32", Error(ours, ours), Error(1.0, 1.0), None, ok))

    found = [judgement(1, 2.0, True), judgement(2, 1.5, False), judgement(3, 1.2, False)]
    assert training_steps.worst(found) == [found[1]]
    assert training_steps.worst(found[:1]) == found[:1]


@pytest.mark.parametrize("cls", CLASSES)
def test_limit(cls):
    """PyTorch's error; in the TF32 class that of rounded operands, where it is larger."""
    truth = torch.ones(10000, dtype=torch.float64)
    errors = dict.fromkeys(training_steps.judged(SMALL), 1e-3)

    def row():
        found = {run: {"output": (truth + error).float()} for run, error in errors.items()}
        (row,) = training_steps._rows(cls, found, {"output": truth})
        return row

    assert row().ok
    errors[Run("ModelNew", cls, "nchw")] *= 1.2 * RATIO
    assert not row().ok
    errors[training_steps._ROUNDED] = 3e-3
    assert row().ok == (cls == "tf32")


def test_no_gradient_where_rounding_decides():
    model = Model(4, 8, 5, 1, 1, 8, 8).double()
    with torch.no_grad():
        model.group_norm.weight.uniform_(0.5, 2)
    unpooled = model.tanh(model.batch_norm(model.conv_transpose(torch.rand(4, 4, 12, 12).double())))
    unpooled = unpooled.detach().requires_grad_()
    pooled = model.max_pool(unpooled)
    y = model.group_norm(pooled)
    target = torch.randn_like(y)
    dy = training_steps._gradient(
        y.detach(), target, unpooled.detach(), pooled.detach(), model.group_norm, NEAR_TIE["tf32"]
    )
    received, plain = (
        torch.autograd.grad(y, unpooled, g, retain_graph=True)[0].unfold(2, 2, 2).unfold(3, 2, 2).flatten(4)
        for g in (dy, 2 / y.numel() * (y - target).detach())
    )
    first, second = unpooled.detach().unfold(2, 2, 2).unfold(3, 2, 2).flatten(4).topk(2).values.unbind(-1)
    tie = first - second <= NEAR_TIE["tf32"]
    assert 0 < tie.sum() < tie.numel() / 10
    assert received[tie].abs().max() < 1e-3 * received.abs().max() < plain[tie].abs().max() / 10  # but for norm's eps
    torch.testing.assert_close((received * plain).sum(), received.square().sum())  # a projection: downhill
    assert received.square().sum() > 0.8 * plain.square().sum()


def test_loss_must_fall_where_models_does():
    falling, rising = torch.linspace(2, 1, 30), torch.linspace(1, 2, 30)
    right = dict.fromkeys(RUNS, falling)
    assert training_steps.rises(right) == []
    for wrong in (rising, falling * float("nan")):
        assert training_steps.rises({**right, Run("ModelNew", "fp32", "nchw"): wrong}) == ["fp32"]
    assert training_steps.rises({**dict.fromkeys(RUNS, rising), Run("ModelNew", "fp32", "nchw"): rising}) == []


def test_divergence_is_no_measure():
    code, text = invoke("--device", "cpu", "--lr", 1e38, "--channels", 4, "--steps", 1)
    assert code == 1
    assert "training diverged: take a smaller learning rate" in text


def test_all_curves_begin_alike():
    settings = Settings(steps=1, batch=2, channels=4, size=4, lr=0.1, momentum=0, seed=3)
    first, second = (dict(training_steps.train(settings, CPU, lambda run: None)) for _ in range(2))
    for run in RUNS:
        assert torch.equal(first[run], second[run])
        torch.testing.assert_close(first[run], first[RUNS[0]], rtol=1e-2, atol=0)


def test_help_explains_every_option():
    text = invoked.invoke(cli.main, "training", "--help")[1]
    assert f"first {JUDGED} steps" in text
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
