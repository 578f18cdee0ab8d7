"""Plots of records, with matplotlib.

`bench`: times beside the peers' and a roofline. `bench --layers`: ratios of every layer. `training`: loss curves.
"""

from pathlib import Path

from . import layer_bench
from .records import by_batch, comparisons
from .workloads import COMPILED, GENERAL, GRAPHS, LAYOUTS, WORKLOADS, Shape, floor_ms, work

_COLOURS = {
    "modelnew": "#c0392b",
    "modelnew-graph": "#c0392b",
    "eager": "#95a5a6",
    "compile": "#2980b9",
    "compile-reduce-overhead": "#8e44ad",
    "compile-max-autotune": "#16a085",
}
_DASHES = {"tf32": "-", "fp32": "--", "fp16": "-", "bf16": "--"}
_MARKERS = "os^vD<>Pph*X8dH"


def draw(record: dict, path: Path) -> None:
    """Draws the record as a PNG. Raises ValueError if there is nothing to draw, and ImportError without matplotlib."""
    from matplotlib.figure import Figure

    versions = record["versions"]
    figure = Figure(layout="constrained")
    figure.suptitle(f"{versions['gpu'] or 'CPU (emulator)'}, torch {versions['torch']}, NVRTC {versions['nvrtc']}")
    kind = _curves if "steps" in record else _times if "shape" in record else _ratios
    kind(figure, record)
    figure.savefig(path, format="png", dpi=110)


def _ratios(figure, record):
    """PyTorch's time over ours of each row of `bench --layers`: a panel for each layer, a column for each setting."""
    found = layer_bench.groups(record)
    if not found:
        raise ValueError("no row has a time beside PyTorch's, so there is nothing to draw")
    operators = list(dict.fromkeys(key[0] for key in found))
    figure.set_size_inches(14, 2.6 * len(operators))
    axes = figure.subplots(len(operators), 1, squeeze=False)[:, 0]
    for operator, panel in zip(operators, axes):
        columns = [key for key in found if key[0] == operator]
        for place, key in enumerate(columns):
            ratios = sorted(map(layer_bench.ratio, found[key]))
            shifts = [place + 0.5 * (i / max(len(ratios) - 1, 1) - 0.5) for i in range(len(ratios))]
            colours = [_COLOURS["modelnew" if ratio < 1 else "compile"] for ratio in ratios]
            panel.scatter(shifts, ratios, s=14, c=colours)
            mean, _ = layer_bench.mean_and_worst(found[key])
            panel.plot([place - 0.35, place + 0.35], [mean, mean], color="black", lw=1.5)
            panel.annotate(f"{mean:.2f}", (place + 0.36, mean), fontsize=7, va="center")
        panel.axhline(1, color="grey", lw=0.8)
        panel.set_yscale("log", base=2)
        panel.yaxis.set_major_formatter(lambda value, _: f"{value:g}x")
        panel.set_xticks(range(len(columns)), ["\n".join(key[1:]) for key in columns], fontsize=7)
        panel.set_title(operator, fontsize=10, loc="left")
    axes[0].set_title(
        "PyTorch's time over ours, a dot a shape; red: slower than PyTorch; line: geometric mean",
        fontsize=9,
        loc="right",
    )


def _times(figure, record):
    """A panel of bars for each class at the first and the smallest N, how times depend on N, and the roofline."""
    rows = _timed(record)
    if not rows:
        raise ValueError("no row has a time, so there is nothing to draw")
    batches = dict.fromkeys(row["n"] for row in rows)
    panels = [
        (cls, n)
        for n in dict.fromkeys((*list(batches)[:1], min(batches)))
        for cls in dict.fromkeys(row["class"] for row in rows)
    ]
    heights = [3] * len(panels) + [3] * (len(batches) > 2) + [4.5]
    figure.set_size_inches(14, 1.07 * sum(heights))
    axes = figure.subplots(len(heights), 1, squeeze=False, height_ratios=heights)[:, 0]
    for (cls, n), panel in zip(panels, axes):
        _bars(panel, [row for row in rows if (row["class"], row["n"]) == (cls, n)], f"class {cls}, N={n}")
    if len(batches) > 2:
        _by_batch(axes[-2], record)
    roofline(axes[-1], record)


def _by_batch(panel, record):
    """Images a second over N, of ModelNew and of its fastest peer."""
    curves = {}
    for (what, cls), pairs in by_batch(record).items():
        for n, pair in pairs.items():
            for row, who in zip(pair, ("modelnew", "eager")):
                if row:
                    curves.setdefault((what, cls, who), {})[n] = 1e3 * n / row["ms"]
    for (what, cls, who), points in curves.items():
        marker, colour = {"forward_train": "o", "step": "s"}[what], _COLOURS[who]
        label = f"{what} {cls} {'modelnew' if who == 'modelnew' else 'fastest peer'}"
        panel.plot(*zip(*sorted(points.items())), _DASHES.get(cls, ":"), marker=marker, color=colour, label=label)
    panel.set_title("by N", fontsize=10)
    panel.set(xlabel="images in a batch", ylabel="images a second", xscale="log", yscale="log")
    _legend_beside(panel, 7)


def _curves(figure, record):
    """The loss of each run, and how far losses are apart."""
    figure.set_size_inches(14, 5)
    losses, apart = figure.subplots(1, 2)
    curves = {(row["who"], row["class"], row["layout"]): row["losses"] for row in record["rows"]}
    steps = range(1, record["steps"] + 1)
    for (who, cls, layout), curve in curves.items():
        if layout == "nchw":
            style = {"color": _COLOURS["modelnew" if who == "ModelNew" else "eager"], "ls": _DASHES[cls]}
            losses.plot(steps, curve, lw=1.5 if who == "Model" else 0.9, label=f"{who} {cls}", **style)

    def difference(a, b, **style):
        values = [abs(x - y) / abs(y) if y else 0 for x, y in zip(curves[a], curves[b])]
        apart.plot(steps, values, lw=0.8, **style)

    model = {cls: (who, cls, layout) for who, cls, layout in curves if (who, layout) == ("Model", "nchw")}
    first, second = model
    difference(model[first], model[second], color="black", label=f"Model {first} to Model {second}")
    for cls in model:
        dashes = _DASHES[cls]
        colours = _COLOURS["eager"], _COLOURS["modelnew"]
        for name, layout, colour in zip(("Model", "ModelNew"), ("nhwc", "nchw"), colours):
            label = f"{name} {cls}{' channels_last' if name == 'Model' else ''} to Model {cls}"
            difference((name, cls, layout), model[cls], color=colour, ls=dashes, label=label)
    losses.set(title=f"loss, batches of {record['batch']}", xlabel="step", yscale="log")
    apart.set(title="how far losses are apart, relative", xlabel="step", yscale="log")
    for panel in (losses, apart):
        panel.legend(fontsize=7)


def _timed(record):
    return [row for row in record["rows"] if row["ms"] is not None and row["what"] in WORKLOADS.keys() - COMPILED]


def _bars(panel, rows, title):
    groups = [what for what in WORKLOADS if any(row["what"] == what for row in rows)]
    present = {(row["who"], row["layout"]) for row in rows}
    bars = [(who, layout) for who in _COLOURS for layout in LAYOUTS if (who, layout) in present]
    width = 0.85 / max(len(bars), 1)
    for i, (who, layout) in enumerate(bars):
        own = [row for row in rows if (row["who"], row["layout"]) == (who, layout)]
        at = [groups.index(row["what"]) + (i - (len(bars) - 1) / 2) * width for row in own]
        ms = [row["ms"] for row in own]
        spread = [[row["ms"] - row["ms_min"] for row in own], [row["ms_max"] - row["ms"] for row in own]]
        style = {"color": _COLOURS[who], "hatch": "///" if layout == "nhwc" else "..." if who in GRAPHS else None}
        drawn = panel.bar(at, ms, width, label=f"{who} {layout}", yerr=spread, error_kw={"lw": 0.6}, **style)
        panel.bar_label(drawn, [f"{value:.3g}" for value in ms], fontsize=6, rotation=90, padding=3)
    panel.set_yscale("log")
    panel.set_ylim(top=panel.get_ylim()[1] * 2)  # room for labels
    panel.set_ylabel("ms")
    panel.set_xticks(range(len(groups)), [group.replace("_", "\n") for group in groups], fontsize=8)
    panel.set_title(title, fontsize=10)
    _legend_beside(panel, 7)


def _legend_beside(panel, fontsize):
    panel.legend(fontsize=fontsize, loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)


def roofline(panel, record: dict) -> None:
    """Draws on a matplotlib Axes what ModelNew and its fastest peer reach, at the record's first N, of what FLOP per
    byte of `work` allows.
    """
    limits, shape = record["ceilings"], Shape(**record["shape"])
    shown = {}
    for ours, peer in _first(record):
        for row in filter(None, (ours, peer)):
            flop, size = map(sum, zip(*work(row["what"], row["class"], row["n"], shape)))
            if flop:
                shown[row["what"], row["class"], row is ours] = (flop / size, flop / row["ms"] / 1e9)
    if not shown:
        panel.set_axis_off()
        return
    whats, classes = (list(dict.fromkeys(key[i] for key in shown)) for i in (0, 1))
    for (what, cls, ours), (x, y) in shown.items():
        colour = _COLOURS["modelnew" if ours else "eager"]
        fill = colour if cls == classes[0] else "white"
        panel.plot(x, y, _MARKERS[whats.index(what)], color=colour, markerfacecolor=fill, markersize=9)
    if limits:
        along = [30, *sorted(limits["flop_per_s"][cls] / limits["bytes_per_s"] for cls in classes), 3000]
        for cls in classes:
            rates = [min(x * limits["bytes_per_s"], limits["flop_per_s"][cls]) / 1e12 for x in along]
            panel.plot(along, rates, color="black", lw=1)
            panel.annotate(
                f"{cls}: {rates[-1]:.0f} TFLOP/s", (along[-1], rates[-1]), fontsize=8, ha="right", va="bottom"
            )
        start = (along[0], along[0] * limits["bytes_per_s"] / 1e12)
        text = f"{limits['bytes_per_s'] / 1e12:.2f} TB/s"
        panel.annotate(text, start, (12, 0), textcoords="offset points", fontsize=8)
    for what, marker in zip(whats, _MARKERS):
        panel.plot([], [], marker, color="black", label=what)
    for name, colour in (("modelnew", _COLOURS["modelnew"]), ("fastest peer", _COLOURS["eager"])):
        panel.plot([], [], "s", color=colour, label=name)
    for cls in classes:
        panel.plot([], [], "s", color="black", markerfacecolor="black" if cls == classes[0] else "white", label=cls)
    panel.set_xscale("log")
    panel.set_yscale("log")
    for axis in (panel.xaxis, panel.yaxis):
        axis.set_major_formatter("{x:g}")
    panel.yaxis.set_minor_formatter("{x:g}")
    panel.set_xlabel("FLOP per byte, each input read once and each result written once")
    panel.set_ylabel("TFLOP/s (dense count)")
    panel.set_title(f"roofline, N={_first(record)[0][0]['n']}", fontsize=10)
    _legend_beside(panel, 8)


def floors(panel, record: dict) -> None:
    """Draws on a matplotlib Axes how much of each time at the record's first N is the floor, of ModelNew and its
    fastest peer.
    """
    pairs, limits, shape = _first(record), record["ceilings"], Shape(**record["shape"])
    if not pairs or not limits:
        panel.set_axis_off()
        return
    for place, (ours, peer) in enumerate(pairs):
        floor = floor_ms(ours["what"], ours["class"], ours["n"], shape, limits)
        for row, colour, at in ((ours, "modelnew", -0.2), (peer, "eager", 0.2)):
            if row:
                bar = panel.barh(place + at, floor / row["ms"], 0.4, color=_COLOURS[colour])
                panel.bar_label(bar, [f"{floor / row['ms']:.0%}"], fontsize=8, padding=2)
    for name, colour in (("modelnew", "modelnew"), ("fastest peer", "eager")):
        panel.barh(0, 0, color=_COLOURS[colour], label=name)
    panel.set_yticks(range(len(pairs)), [f"{ours['what']}, {ours['class']}" for ours, _ in pairs], fontsize=8)
    panel.set_xlim(0, 1)
    panel.xaxis.set_major_formatter(lambda share, _: f"{share:.0%}")
    panel.set_xlabel("floor (memory and tensor cores at their peak) over time")
    panel.invert_yaxis()
    panel.legend(fontsize=8, loc="lower right")


def _first(record):
    """(our row, the fastest peer's or None) at the first N: throughput on tensor cores, without CUDA graphs."""
    rows = _timed(record)
    first = next((row["n"] for row in rows), None)
    return [
        pair
        for pair in comparisons({**record, "rows": rows})
        if pair[0]["n"] == first
        and pair[0]["who"] not in GRAPHS
        and not pair[0]["what"].startswith("latency")
        and not pair[0]["what"].endswith(GENERAL)
    ]
