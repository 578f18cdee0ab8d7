"""Records of times: pairs that are compared, the table, the file and its plots."""

import json
import re
import sys
from functools import partial

import invoked
import pytest
from rich.console import Console

from modelnew import bench, plots, records, workloads
from modelnew.workloads import Shape

invoke = partial(invoked.invoke, bench.bench_command)


def row(who="modelnew", ms=1.0, **options):
    found = {"what": "forward_train", "class": "tf32", "n": 1, "who": who, "layout": "nchw"}
    return {**found, "ms": ms, "ms_min": ms, "ms_max": ms, "peak_mb": None, **options}


def record(*rows):
    return {
        "versions": {"gpu": "a GPU", "torch": "2", "nvrtc": "11.8"},
        "trials": 20,
        "shape": Shape(64, 128, 5, 1, 1, 32)._asdict(),
        "ceilings": workloads.ceilings("NVIDIA H100 80GB HBM3"),
        "rows": list(rows),
    }


def test_graphs_are_compared_with_all():
    rows = [row(), row("modelnew-graph", 0.5), row("compile", 2.0), row("compile-reduce-overhead", 0.7)]
    pairs = [(ours["who"], peer["who"]) for ours, peer in records.comparisons(record(*rows))]
    assert pairs == [("modelnew", "compile-reduce-overhead"), ("modelnew-graph", "compile-reduce-overhead")]
    pairs = records.comparisons(record(*rows, row("eager-graph", 0.6)))
    assert [peer["who"] for _, peer in pairs] == ["compile-reduce-overhead", "eager-graph"]
    del rows[1]
    ((_, peer),) = records.comparisons(record(*rows))
    assert peer["who"] == "compile-reduce-overhead"
    rows[2]["ms"] = None
    ((_, peer),) = records.comparisons(record(*rows))
    assert peer["who"] == "compile"
    assert list(records.comparisons(record(row()))) == [(row(), None)]


def test_table(capsys):
    rows = [
        row(n=512, ms=0.758, what="conv_forward", peak_mb=303.4),
        row("eager", 1.31, n=512, what="conv_forward", peak_mb=800.0),
    ]
    records.show(record(*rows, row(what="startup_cold", ms=2500.0)), Console(width=140))
    text = re.sub(r"\s+", " ", capsys.readouterr().out)
    assert "conv_forward tf32 512 0.758 0.758-0.758 303 eager nchw 1.31 800 1.73x 40% 320" in text
    assert "startup_cold tf32 1 2500" in text
    records.show(record(*rows, row(what="startup_cold", ms=2500.0)), Console(width=80))
    text = capsys.readouterr().out
    assert "conv_forward tf32 512 0.758 eager nchw 1.31 1.73x" in re.sub(r"\s+", " ", text)
    assert "shows more: range, MB, floor, TFLOP/s" in text
    assert "…" not in text


def test_host_bound_rows_stand_apart(capsys):
    rows = [row(who, ms, what="step", n=n) for n in (1, 8, 9) for who, ms in (("modelnew", n), ("eager", 2 * n))]
    rows += [row("modelnew-graph", 0.5, what="step", n=8), row("eager-graph", 0.75, what="step", n=8)]
    rows += [row(n=512, what="startup_cold", ms=2500.0)]
    records.show(record(*rows), Console(width=140))
    text, found = capsys.readouterr().out, {}
    for line in text.splitlines():
        heading, words = line.partition(":")[0], line.split()
        if heading in ("GPU-bound", "Host-bound", "In a CUDA graph"):
            lines = found.setdefault(heading, [])
        elif words[1:2] == ["tf32"]:
            lines.append(" ".join(words[2:4]))
    assert found == {"GPU-bound": ["9 9"], "Host-bound": ["1 1", "8 8", "512 2500"], "In a CUDA graph": ["8 0.5"]}
    assert "8 0.5 0.5-0.5 eager-graph nchw 0.75 1.50x" in re.sub(" +", " ", text)


def test_trials_in_words():
    assert records.trials({"trials": 1, "rows": [row(n=9)]}) == "1 trial"
    assert records.trials({"trials": 20, "calls_of_few": 50, "rows": [row(n=9)]}) == "20 trials"
    words = "20 trials (up to 8 images: of 50 calls each)"
    assert records.trials({"trials": 20, "calls_of_few": 50, "rows": [row(n=8)]}) == words
    rows = [{**row(n=n), "calls": calls} for n, calls in ((8, 40), (1, 200))] + [row(n=9)]
    assert records.trials({"trials": 2, "rows": rows}) == "2 trials (up to 8 images: of 40 to 200 calls each)"


def test_writing_leaves_the_old_record_if_it_fails(tmp_path):
    path = tmp_path / "deep" / "bench_x.json"
    content = record(row(), row("eager"))
    records.write(content, path)
    assert json.loads(path.read_text()) == content
    assert len([line for line in path.read_text().splitlines() if '"who"' in line]) == 2
    with pytest.raises(TypeError):
        records.write({**content, "rows": [object()]}, path)
    assert json.loads(path.read_text()) == content
    assert [p.name for p in path.parent.iterdir()] == [path.name]
    records.write(record(), path)
    assert json.loads(path.read_text())["rows"] == []
    records.write({"cases": {"tanh": 1}}, path)
    assert json.loads(path.read_text()) == {"cases": {"tanh": 1}}


def test_plot_only(tmp_path, monkeypatch):
    path = tmp_path / "bench_x.json"
    whos = [row(who, n=n, what=what) for who in plots._COLOURS for n in (1, 512) for what in workloads.WORKLOADS]
    for content in (record(*whos), {**record(*whos[:3]), "ceilings": None}, record(row("eager"), row(what="startup"))):
        path.write_text(json.dumps(content))
        code, text = invoke("--plot-only", str(path))
        assert code == 0
        assert "drawn" in text
        assert path.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    for content in (b"{}", b"[]", b"?", b"\xff"):
        path.write_bytes(content)
        code, text = invoke("--plot-only", str(path))
        assert code == 2
        assert "no record" in text
    path.write_text(json.dumps(record(row())))
    path.with_suffix(".png").unlink()
    path.with_suffix(".png").mkdir()
    code, text = invoke("--plot-only", str(path))
    assert code == 1
    assert "Is a directory" in text
    path.write_text(json.dumps(record()))
    assert "nothing to draw" in invoke("--plot-only", str(path))[1]
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    code, text = invoke("--plot-only", str(path))
    assert code == 1
    assert "python3 -m pip install matplotlib" in text
