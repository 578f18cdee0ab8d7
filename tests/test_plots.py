"""Plots of the committed records, as readers see them: widths, fonts, units, and legends beside what is drawn."""

import json
from pathlib import Path

import pytest

from modelnew import plots, workloads

figures = pytest.importorskip("matplotlib.figure")
text = pytest.importorskip("matplotlib.text")
backend_agg = pytest.importorskip("matplotlib.backends.backend_agg")

RESULTS = Path(__file__).resolve().parents[1] / "benchmarks" / "results"
RECORDS = [path for kind in ("bench", "layers", "training") for path in sorted(RESULTS.glob(f"{kind}_*.json"))]


def drawn(record, monkeypatch, tmp_path):
    found, save = [], figures.Figure.savefig

    def saved(figure, *arguments, **options):
        found.append(figure)
        save(figure, *arguments, **options)

    monkeypatch.setattr(figures.Figure, "savefig", saved)
    plots.draw(record, tmp_path / "plot.png")
    return found[0]


def variants(path):
    record = json.loads(path.read_text(encoding="utf-8"))
    yield record
    if "shape" in record:  # with a roofline, and with curves over N
        more = [{**row, "n": n} for n in (1, 64) for row in record["rows"]]
        yield {**record, "ceilings": workloads.ceilings("H100"), "rows": record["rows"] + more}


@pytest.mark.parametrize("path", RECORDS, ids=[path.stem for path in RECORDS])
def test_a_plot_is_readable_where_it_is_shown(path, monkeypatch, tmp_path):
    for record in variants(path):
        figure = drawn(record, monkeypatch, tmp_path)
        assert figure.get_size_inches()[0] == 8.3  # 830 pixels: a point is 1.4 of them
        smallest = min(found.get_fontsize() for found in figure.findobj(text.Text) if found.get_text())
        assert smallest >= 7
        backend_agg.FigureCanvasAgg(figure).draw()
        for panel in figure.axes:
            assert panel.get_ylabel()
        panels, texts = figure.axes, [found for found in figure.findobj(text.Text) if found.get_text().strip()]
        for legend in filter(None, (panel.get_legend() for panel in panels)):
            box, own = legend.get_window_extent(), legend.findobj(text.Text)
            assert not any(panel.bbox.overlaps(box) for panel in panels)
            assert not any(found.get_window_extent().overlaps(box) for found in texts if found not in own)
            assert figure.bbox.x0 <= box.x0
            assert box.x1 <= figure.bbox.x1
        bars = [panel for panel in panels if panel.get_ylabel() == "milliseconds"]
        assert [panel.get_legend() is not None for panel in bars] == [panel is bars[0] for panel in bars]


def test_ceilings_are_named_by_what_they_are(monkeypatch, tmp_path):
    """The tensor cores multiply fp16, whatever the class."""
    (path,) = [path for path in RECORDS if path.stem.startswith("bench")][:1]
    record = {**json.loads(path.read_text(encoding="utf-8")), "ceilings": workloads.ceilings("H100")}
    record["rows"] = [row for row in record["rows"] if row["class"] in ("tf32", "fp32")]
    texts = {found.get_text() for found in drawn(record, monkeypatch, tmp_path).findobj(text.Text)}
    assert {found for found in texts if "TFLOP/s: " in found} == {
        "793 TFLOP/s: fp16 products (tf32)",
        "264 TFLOP/s: three fp16 products for one (fp32)",
    }
