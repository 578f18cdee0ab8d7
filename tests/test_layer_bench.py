import math

import pytest
import torch
from faults import planted
from rich.console import Console

from modelnew import layer_bench, plots

CPU = torch.device("cpu")
SMALL = (
    layer_bench._conv("convolution", (2, 16, 4, 4), 16, 3, 1, 1),
    layer_bench._group("group norm", 2, 2, 8, 5, 5),
    layer_bench._pool("pool", (2, 4, 6, 6), 2),
    *layer_bench._activations("activation", 3, 5),
)


def measured(monkeypatch, entries=SMALL, classes=("fp32",), peers=("eager",), refused=lambda entrant: None):
    monkeypatch.setattr(layer_bench, "ENTRIES", entries)
    rows = layer_bench.measure(classes, peers, 2, CPU, refused, lambda text: None)
    return [row for found in rows for row in found]


def record_of(rows):
    return {"versions": {"gpu": None, "torch": torch.__version__, "nvrtc": None}, "rows": rows}


def test_every_layer_has_shapes_and_every_setting():
    assert len(layer_bench.ENTRIES) >= 60
    operators = {entry.operator for entry in layer_bench.ENTRIES}
    assert operators == {"ConvTranspose2d", "BatchNorm", "GroupNorm", "MaxPool2d", "Tanh", "LeakyReLU"}
    assert {len(entry.shape) for entry in layer_bench.ENTRIES if entry.operator == "BatchNorm"} == {2, 3, 4, 5}
    assert max(math.prod(entry.shape) for entry in layer_bench.ENTRIES) > 2**31
    settings = list(SMALL[0].settings(layer_bench.DTYPES))
    assert settings == [(cls, layout) for cls in layer_bench.DTYPES for layout in ("nchw", "nhwc")]
    assert list(SMALL[-1].settings(layer_bench.DTYPES)) == [("fp32", "nchw"), ("fp16", "nchw"), ("bf16", "nchw")]


def test_rows_table_and_picture(monkeypatch, tmp_path):
    rows = measured(monkeypatch)
    assert len(rows) == 2 * (3 * 2 + 2)  # forward and step; in two layouts where there are four dimensions
    for row in rows:
        assert row["ms"] > 0
        assert row["eager_ms"] > 0
        assert 0 <= row["error_ratio"] < 3
        assert row["error_of"] in ("output", "x", "weight", "bias", "running_mean", "running_var")
        assert "reasons" not in row
    console = Console(width=160, record=True)
    layer_bench.show(record_of(rows), console)
    text = console.export_text()
    for row in rows:
        assert row["case"] in text
    plots.draw(record_of(rows), tmp_path / "layers.png")
    assert (tmp_path / "layers.png").stat().st_size > 1000


def test_most_memory():
    def row(case, ours, theirs):
        return {"case": case, "peak_mb": ours, "eager_peak_mb": theirs}

    rows = [row("a", 20.0, 10.0), row("b", 30.0, 10.0), row("small", 1.0, 0.1), row("cpu", None, None), {}]
    assert layer_bench.most_memory({"rows": rows}) == (3, rows[1])
    assert layer_bench.most_memory({"rows": rows[2:]}) is None


def test_a_wrong_result_has_no_time(monkeypatch):
    with planted("tanh.cuh", (": tanh(v)", ": 1.01f * tanh(v)")):
        rows = measured(monkeypatch, SMALL[-2:-1])
    assert [(row["ms"], row["failed"]) for row in rows] == [(None, True), (None, True)]
    assert rows[0]["reasons"]["modelnew"].startswith("parity fails: output")
    console = Console(width=160, record=True)
    layer_bench.show(record_of(rows), console)
    assert "No time of modelnew, because of parity fails" in console.export_text()


def test_rows_of_the_tf32_class_may_round_operands(monkeypatch):
    rows = measured(monkeypatch, SMALL[:1], ("tf32",))
    assert all(row["error_ratio"] <= 1.1 for row in rows)


@pytest.mark.parametrize("peers", [(), ("eager",)])
def test_a_budget_that_is_spent(monkeypatch, peers):
    rows = measured(monkeypatch, SMALL[-1:], peers=peers, refused=lambda entrant: "spent")
    assert [row["reasons"]["modelnew"] for row in rows] == ["spent"] * 2
    assert not any(map(layer_bench.ratio, rows))
