"""Records of `python -m modelnew bench`: JSON on disk, and a table."""

import collections
import json
import os
from collections.abc import Iterator
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table

from .workloads import FEW_IMAGES, GRAPHED, GRAPHS, MODELS, WORKLOADS, Shape, floor_ms, work

_WIDE = 115  # columns
_ONLY_WIDE = ("range", "MB", "floor", "TFLOP/s")
GPU, HOST, GRAPH = "GPU-bound", "host-bound", "in a CUDA graph"
_TIMED = {
    GPU: "the GPU's time for a call, while the host runs ahead",
    HOST: f"time by the host's clock of calls with up to {FEW_IMAGES} images, and of a process's first call",
    GRAPH: f"time by the host's clock of calls with up to {FEW_IMAGES} images",
}


def write(record: dict, path: Path) -> None:
    """Writes the record, one line for each row, if it has "rows". If that fails, the old file stays."""
    text = json.dumps({key: value for key, value in record.items() if key != "rows"}, indent=1)
    if "rows" in record:
        rows = ",\n  ".join(map(json.dumps, record["rows"]))
        text = text.removesuffix("\n}") + f',\n "rows": [\n  {rows}\n ]\n}}'
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(path.name + ".part")
    unfinished.write_text(text + "\n", encoding="utf-8")
    os.replace(unfinished, path)


def comparisons(record: dict) -> Iterator[tuple[dict, dict | None]]:
    """(our row, the fastest peer's or None), by workload, class and n.

    If there is also a row of ModelNew in a CUDA graph, the row without graph is compared with calls without, of which
    torch.compile in the mode "reduce-overhead" is one: it captures graphs of its own.
    """
    cells = collections.defaultdict(list)
    for row in record["rows"]:
        cells[row["what"], row["class"], row["n"]].append(row)
    whats, classes = (list(dict.fromkeys(cell[i] for cell in cells)) for i in (0, 1))
    for cell in sorted(cells, key=lambda cell: (whats.index(cell[0]), classes.index(cell[1]), cell[2])):
        ours = [row for row in cells[cell] if row["who"].startswith("modelnew")]
        theirs = [row for row in cells[cell] if row not in ours and row["ms"] is not None]
        plain = [row for row in theirs if row["who"] not in GRAPHED]
        for row in ours:
            peers = plain if len(ours) > 1 and row["who"] not in GRAPHED else theirs
            yield row, min(peers, key=lambda peer: peer["ms"], default=None)


def bound(row: dict) -> str:
    """What the row's time depends on: GPU, HOST or GRAPH. The start of a process is the host's."""
    if row["n"] > FEW_IMAGES and row["what"] in WORKLOADS:
        return GPU
    return GRAPH if row["who"] in GRAPHS else HOST


def trials(record: dict) -> str:
    """The number of trials in words."""
    text = f"{record['trials']} trial{'s'[: record['trials'] != 1]}"
    few = any(row["n"] <= FEW_IMAGES for row in record["rows"])
    calls = [row["calls"] for row in record["rows"] if "calls" in row] or [record.get("calls_of_few", 1)]  # of old ones
    number = f"{min(calls)} to {max(calls)}" if len({*calls}) > 1 else f"{calls[0]}"
    return text + (f" (up to {FEW_IMAGES} images: of {number} calls each)" if few and max(calls) > 1 else "")


def by_batch(record: dict) -> dict[tuple[str, str], dict[int, tuple[dict, dict | None]]]:
    """{(workload, class): {n: (our row, the fastest peer's or None)}} of forward and step, without CUDA graphs."""
    found = {}
    for row, peer in comparisons(record):
        if row["what"] in ("forward_train", "step") and row["ms"] is not None and row["who"] not in GRAPHS:
            found.setdefault((row["what"], row["class"]), {})[row["n"]] = row, peer
    return found


def show(record: dict, out: Console) -> None:
    """Prints our times beside the fastest peer's, host-bound rows apart, and why some are missing."""
    text = f"\n[bold]Milliseconds, median and range of {trials(record)}[/]. "
    if any(row["peak_mb"] for row in record["rows"]):
        text += "MB: peak memory over inputs and parameters. "
    text += "Fastest peer: PyTorch, eager or compiled; nhwc means channels_last. Ratio: its time over ours."
    if record["ceilings"]:
        text += " Floor: the least time that memory and tensor cores (fp16 products) allow, over ours."
    out.print(text, highlight=False)
    if out.width < _WIDE:
        out.print(f"A terminal of {_WIDE} columns shows more: {', '.join(_ONLY_WIDE)}.", highlight=False)
    pairs = list(comparisons(record))
    for name, timed in _TIMED.items():
        if chosen := [pair for pair in pairs if bound(pair[0]) == name]:
            out.print(f"\n[bold]{name[0].upper()}{name[1:]}[/]: {timed}", highlight=False)
            out.print(_table(record, chosen, out.width >= _WIDE))
    for what in dict.fromkeys(row["what"] for row in record["rows"]):
        if what in WORKLOADS:
            out.print(f"{what}: {WORKLOADS[what]}.", markup=False, highlight=False)
    reasons = collections.defaultdict(list)
    for row in record["rows"]:
        if row["ms"] is None:
            reasons[row["reason"]].append("{what} {class} N={n} {who} {layout}".format(**row))
    for reason, rows in reasons.items():
        out.print(f"No time, because of {reason}: {'; '.join(rows)}", markup=False, highlight=False)


def _table(record, pairs, wide) -> Table:
    limits, shape = record["ceilings"], Shape(**record["shape"])
    names = ("what", "class", "N", "ours", "range", "MB", "fastest peer", "ms", "MB", "ratio", "floor", "TFLOP/s")
    lines = []
    for row, peer in pairs:
        what, cls, n, ms = row["what"], row["class"], row["n"], row["ms"]
        cells = [what, cls, str(n)]
        if ms is None:
            cells += ["[red]FAIL[/]" if row["failed"] else "-", "", ""]
        else:
            cells += [_short(ms), f"{_short(row['ms_min'])}-{_short(row['ms_max'])}", megabytes(row)]
        name = f"{peer['who'].removeprefix('compile-')} {peer['layout']}" if peer else ""
        cells += [name, _short(peer["ms"]), megabytes(peer)] if peer else [name, "", ""]
        cells.append(f"{peer['ms'] / ms:.2f}x" if peer and ms else "")
        timed = ms and what in WORKLOADS
        cells.append(f"{floor_ms(what, cls, n, shape, limits) / ms:.0%}" if timed and limits else "")
        flop = sum(stage[0] for stage in work(what, cls, n, shape)) if timed and what not in MODELS else 0
        cells.append(f"{flop / ms / 1e9:.3g}" if flop else "")
        lines.append(cells)
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    columns = [(name, cells) for name, cells in zip(names, zip(*lines)) if any(cells)]
    columns = [(name, cells) for name, cells in columns if wide or name not in _ONLY_WIDE]
    for name, _ in columns:
        left = name in ("what", "class", "fastest peer")
        table.add_column(name, justify="left" if left else "right", no_wrap=name != "fastest peer")
    for cells in zip(*(cells for _, cells in columns)):
        table.add_row(*cells)
    return table


def _short(ms):
    return f"{ms:.0f}" if ms >= 100 else f"{ms:.3g}"


def megabytes(row: dict) -> str:
    """Its peak memory; empty if that is unknown."""
    return "" if row["peak_mb"] is None else f"{row['peak_mb']:.0f}"
