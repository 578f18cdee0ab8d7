"""Plots of records, with matplotlib, as wide as a README shows them: a font of 8 points there is one of 11 pixels.

`bench`: times beside the peers' and, if the GPU's ceilings are known, a roofline. `bench --layers`: ratios of every
layer. `training`: loss curves.
"""

import itertools
import math
from pathlib import Path

from . import layer_bench
from .records import by_batch, comparisons
from .workloads import (
    COMPILED,
    FEW_IMAGES,
    FLOAT16,
    GENERAL,
    GRAPHS,
    LAYOUTS,
    MODELS,
    OF_FLOAT16,
    WORKLOADS,
    Shape,
    work,
)

_WIDTH, _DPI = 8.3, 200
_SMALL = 8
_COLUMNS = 3  # of a legend
_COLOURS = {
    "modelnew": "#c0392b",
    "modelnew-graph": "#c0392b",
    "eager": "#95a5a6",
    "eager-graph": "#566573",
    "compile": "#2980b9",
    "compile-reduce-overhead": "#8e44ad",
    "compile-max-autotune": "#16a085",
}
_WHO = {
    "modelnew": "ModelNew",
    "modelnew-graph": "ModelNew in a CUDA graph",
    "eager": "PyTorch",
    "eager-graph": "PyTorch in a CUDA graph",
    "compile": "torch.compile",
    "compile-reduce-overhead": "torch.compile, reduce-overhead",
    "compile-max-autotune": "torch.compile, max-autotune",
}
_LAYOUTS = {"nchw": "NCHW", "nhwc": "channels_last"}
_CLASSES = {
    "tf32": "float32, TF32 allowed",
    "fp32": "float32",
    "fp16": "float16 by autocast",
    "bf16": "bfloat16 by autocast",
}
_DASHES = {"tf32": "-", "fp32": "--", "fp16": "-", "bf16": "--"}
_NESTED = (("#ccd1d1", 8), ("#2980b9", 5), ("#c0392b", 2.5), ("black", 1))  # colours and widths, the lowest first
_FILLS = ("full", "none", "left", "bottom")
_MARKERS = "os^vD<>Pph*X8dH"
_WINDOW = 10  # steps of which the curves of differences show the largest


def draw(record: dict, path: Path) -> None:
    """Draws the record as a PNG. Raises ValueError if there is nothing to draw, and ImportError without matplotlib."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    versions = record["versions"]
    with rc_context({"font.size": _SMALL, "axes.titlesize": 10, "axes.axisbelow": True}):
        figure = Figure(layout="constrained")
        kind = _curves if "steps" in record else _times if "shape" in record else _ratios
        message = kind(figure, record)
        where = f"{versions['gpu'] or 'CPU (emulator)'}, torch {versions['torch']}, NVRTC {versions['nvrtc']}"
        where += ", without wgmma" * ("--no-wgmma" in record.get("command", ""))
        figure.suptitle(f"{message}\n{where}", fontsize=10)
        figure.savefig(path, format="png", dpi=_DPI)


def _ratios(figure, record):
    """PyTorch's time over ours of each row of `bench --layers`: a panel for each layer, a column for each setting."""
    found = layer_bench.groups(record)
    if not found:
        raise ValueError("no row has a time beside PyTorch's, so there is nothing to draw")
    operators = list(dict.fromkeys(key[0] for key in found))
    figure.set_size_inches(_WIDTH, 2.3 * len(operators))
    axes = figure.subplots(len(operators), 1, squeeze=False)[:, 0]
    for operator, panel in zip(operators, axes):
        columns = [key for key in found if key[0] == operator]
        for place, key in enumerate(columns):
            ratios = sorted(map(layer_bench.ratio, found[key]))
            shifts = [place + 0.6 * (i / max(len(ratios) - 1, 1) - 0.5) for i in range(len(ratios))]
            colours = [_COLOURS["modelnew" if ratio < 1 else "compile"] for ratio in ratios]
            panel.scatter(shifts, ratios, s=7, c=colours)
            mean, _ = layer_bench.mean_and_worst(found[key])
            panel.plot([place - 0.4, place + 0.4], [mean, mean], color="black", lw=1.5)
            above = ("data", "axes fraction")
            panel.annotate(f"{mean:.2f}x", (place, 1.03), xycoords=above, ha="center", annotation_clip=False)
        panel.axhline(1, color="grey", lw=0.8)
        panel.set_xlim(-0.6, len(columns) - 0.4)
        panel.set_yscale("log", base=2)
        bottom, top = panel.get_ylim()
        panel.set_ylim(min(bottom, 0.5), max(top, 2))  # so that an axis has more than one number
        panel.yaxis.set_major_formatter(lambda value, _: f"{value:g}x")
        panel.set_ylabel("PyTorch's time / ours")
        panel.set_xticks(range(len(columns)), ["\n".join(key[1:]) for key in columns])
        panel.set_title(operator, loc="left", pad=16)
    figure.supxlabel(
        "A dot is a shape; red: slower than PyTorch. Line, and number above: geometric mean. nhwc: channels_last",
        fontsize=_SMALL,
    )
    return "Layers: how many times as fast as PyTorch's"


def _times(figure, record):
    """A panel of bars for each class at the first N, how times depend on N, and the roofline."""
    rows = _timed(record)
    if not rows:
        raise ValueError("no row has a time, so there is nothing to draw")
    models = [row for row in rows if row["what"] in MODELS | FLOAT16] or rows  # what users call, if it was measured
    batches = list(dict.fromkeys(row["n"] for row in rows))
    models = [row for row in models if row["n"] == batches[0]]
    classes = dict.fromkeys(row["class"] for row in models)
    heights = [2.4] * len(classes) + [3.4] * (len(batches) > 2) + [4] * bool(record["ceilings"])
    figure.set_size_inches(_WIDTH, sum(heights) + 1.5)
    axes = figure.subplots(len(heights), 1, squeeze=False, height_ratios=heights)[:, 0]
    bars = {}
    for cls, panel in zip(classes, axes):
        bars |= _bars(panel, [row for row in models if row["class"] == cls], _CLASSES[cls])
    _legend_above(axes[0], bars)
    if len(batches) > 2:
        _by_batch(axes[len(classes)], record)
    if record["ceilings"]:
        roofline(axes[-1], record)
    images = f"{batches[0]} image{'s'[: batches[0] != 1]}" + ", host-bound" * (batches[0] <= FEW_IMAGES)
    return (
        f"Time of a call with {images}; lower is faster\n"
        f"Bar: median; whisker: fastest to slowest of {record['trials']} trials"
    )


def _by_batch(panel, record):
    """Images a second over N, of ModelNew and of its fastest peer, in the record's first class."""
    found = by_batch(record)
    first = next(cls for _, cls in found)
    for (what, cls), pairs in found.items():
        for who, index in (("modelnew", 0), ("eager", 1)):
            points = sorted((n, 1e3 * n / pair[index]["ms"]) for n, pair in pairs.items() if pair[index])
            if cls != first or not points:
                continue
            marker, dashes = {"forward_train": ("o", "-"), "step": ("s", "--")}[what]
            label = f"{'ModelNew' if who == 'modelnew' else 'fastest peer'}, {what.replace('_', ' ')}"
            panel.plot(*zip(*points), dashes, marker=marker, color=_COLOURS[who], label=label)
    title = f"{_CLASSES[first]}: how speed depends on the batch (up to {FEW_IMAGES} images: host-bound)"
    panel.set_title(title, loc="left")
    panel.set(xlabel="images in a batch", ylabel="images a second", xscale="log", yscale="log")
    panel.xaxis.set_major_formatter("{x:g}")
    _legend_below(panel, -0.2, columns=2)


def _curves(figure, record):
    """The loss of each run, and how far losses are apart."""
    figure.set_size_inches(_WIDTH, 7.6)
    losses, apart = figure.subplots(2, 1, height_ratios=[2, 3])
    curves = {(row["who"], row["class"], row["layout"]): row["losses"] for row in record["rows"]}
    steps = range(1, record["steps"] + 1)
    shown = [key for key in curves if key[2] == "nchw"]
    for key, (colour, width) in zip(shown, _NESTED):  # they lie on each other
        losses.plot(steps, curves[key], color=colour, lw=width, ls=_DASHES[key[1]], label=" ".join(key[:2]))

    def difference(a, b, **style):
        values = [abs(x - y) / abs(y) if y else 0 for x, y in zip(curves[a], curves[b])]
        values = [max(values[i : i + _WINDOW]) for i in range(0, len(values), _WINDOW)]
        apart.plot(steps[::_WINDOW], values, drawstyle="steps-post", **style)

    model = {cls: (who, cls, layout) for who, cls, layout in curves if (who, layout) == ("Model", "nchw")}
    first, second = model
    for name, layout, colour in (("Model", "nhwc", _COLOURS["compile"]), ("ModelNew", "nchw", _COLOURS["modelnew"])):
        for cls in model:
            label = f"{name} {cls}{' channels_last' if name == 'Model' else ''} to Model {cls}"
            difference((name, cls, layout), model[cls], color=colour, lw=1.3, ls=_DASHES[cls], label=label)
    wide = {"color": "#d5d8dc", "lw": 5, "zorder": 1}  # below the others, which it may coincide with
    difference(model[first], model[second], label=f"Model {first} to Model {second}", **wide)
    losses.set_title(f"Loss, batches of {record['batch']}", loc="left")
    losses.set(ylabel="mean squared error", yscale="log")
    losses.yaxis.set_major_formatter("{x:g}")
    losses.yaxis.set_minor_formatter("{x:g}")
    apart.set_title(f"How far losses are apart, the largest of each {_WINDOW} steps", loc="left")
    apart.set(xlabel="step", ylabel="difference of two losses / loss", yscale="log")
    for panel, columns in ((losses, 2), (apart, _COLUMNS)):
        panel.grid(axis="y", lw=0.3)
        _legend_below(panel, -0.12, columns)
    return "Training: ModelNew's loss falls as Model's does"


def _timed(record):
    return [row for row in record["rows"] if row["ms"] is not None and row["what"] in WORKLOADS.keys() - COMPILED]


def _bars(panel, rows, title):
    """Draws the bars. Returns {(who, layout): what stands for it in a legend}."""
    groups = [what for what in WORKLOADS if any(row["what"] == what for row in rows)]
    present = {(row["who"], row["layout"]) for row in rows}
    bars = [(who, layout) for who in _COLOURS for layout in LAYOUTS if (who, layout) in present]
    width, found = 0.85 / max(len(bars), 1), {}
    measured, places = {(row["what"], row["who"], row["layout"]) for row in rows}, {}
    for i, what in enumerate(groups):
        own = [bar for bar in bars if (what, *bar) in measured]
        places |= {(what, *bar): i + (j - (len(own) - 1) / 2) * width for j, bar in enumerate(own)}
    for who, layout in bars:
        own = [row for row in rows if (row["who"], row["layout"]) == (who, layout)]
        at = [places[row["what"], who, layout] for row in own]
        ms = [row["ms"] for row in own]
        spread = [[row["ms"] - row["ms_min"] for row in own], [row["ms_max"] - row["ms"] for row in own]]
        hatch = "///" if layout == "nhwc" else "..." if who in GRAPHS else None
        style = {"color": _COLOURS[who], "hatch": hatch, "edgecolor": "white", "lw": 0}
        found[who, layout] = drawn = panel.bar(at, ms, width, yerr=spread, error_kw={"lw": 0.8}, **style)
        panel.bar_label(drawn, [f"{value:.3g}" for value in ms], fontsize=7, rotation=90, padding=2)
    panel.margins(y=0.3)  # room for labels
    panel.set_ylim(bottom=0)
    panel.set_ylabel("milliseconds")
    names = [group.replace(OF_FLOAT16, "without autocast_").replace("_", "\n", 1).replace("_", " ") for group in groups]
    panel.set_xticks(range(len(groups)), names)
    panel.set_title(title, loc="left")
    return found


def _legend_above(panel, bars):
    """Puts a legend of what `_bars` returned between the panel and its title."""
    bars = {key: bars[key] for key in itertools.product(_COLOURS, LAYOUTS) if key in bars}
    names = [f"{_WHO[who]}, {_LAYOUTS[layout]}" for who, layout in bars]
    place = {"loc": "lower left", "bbox_to_anchor": (0, 1.01), "borderaxespad": 0}
    narrow = {"ncols": _COLUMNS, "columnspacing": 0.7, "handlelength": 1.1, "handletextpad": 0.5}
    legend = panel.legend(bars.values(), names, frameon=False, **narrow, **place)
    legend.set_in_layout(False)  # a wide one would make the panels narrow; the title keeps room for it
    panel.set_title(panel.get_title("left"), loc="left", pad=8 + 1.6 * _SMALL * math.ceil(len(bars) / _COLUMNS))


def _legend_below(panel, below, columns=_COLUMNS):
    panel.legend(loc="upper center", bbox_to_anchor=(0.5, below), ncols=columns, frameon=False)


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
        style = {"color": colour, "fillstyle": _FILLS[classes.index(cls)], "markerfacecoloralt": "white"}
        panel.plot(x, y, _MARKERS[whats.index(what)], markersize=8, **style)
    if limits:
        along = [30, *sorted(limits["flop_per_s"][cls] / limits["bytes_per_s"] for cls in classes), 3000]
        for rate in sorted({limits["flop_per_s"][cls] for cls in classes}):
            rates = [min(x * limits["bytes_per_s"], rate) / 1e12 for x in along]
            panel.plot(along, rates, color="black", lw=1)
            below = [cls for cls in classes if limits["flop_per_s"][cls] == rate]
            products = "three fp16 products for one" if below == ["fp32"] else "fp16 products"
            text = f"{rates[-1]:.0f} TFLOP/s: {products} ({', '.join(below)})"
            panel.annotate(text, (along[-1], rates[-1]), ha="right", va="bottom")
        start = (along[0], along[0] * limits["bytes_per_s"] / 1e12)
        text = f"memory, {limits['bytes_per_s'] / 1e12:.2f} TB/s"
        panel.annotate(text, start, (12, 0), textcoords="offset points")
    for what, marker in zip(whats, _MARKERS):
        panel.plot([], [], marker, color="black", label=what)
    for name, colour in (("ModelNew", _COLOURS["modelnew"]), ("fastest peer", _COLOURS["eager"])):
        panel.plot([], [], "s", color=colour, label=name)
    for cls, fill in zip(classes, _FILLS):
        panel.plot([], [], "s", color="black", fillstyle=fill, markerfacecoloralt="white", label=_CLASSES[cls])
    panel.set_xscale("log")
    panel.set_yscale("log")
    for axis in (panel.xaxis, panel.yaxis):
        axis.set_major_formatter("{x:g}")
    panel.yaxis.set_minor_formatter("{x:g}")
    panel.set_xlabel("FLOP per byte, each input read once and each result written once")
    panel.set_ylabel("TFLOP/s (dense count)")
    panel.set_title(f"What memory and tensor cores allow, {_first(record)[0][0]['n']} images", loc="left")
    _legend_below(panel, -0.16)


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
