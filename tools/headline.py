"""The README's first number and its picture, from a record of times."""

from html import escape

from modelnew.model import BATCH
from modelnew.records import by_batch

from .wording import CLASSES, is_eager, ms, ratio

_COLOURS = {"ModelNew": "#c0392b", "PyTorch": "#95a5a6", "torch.compile": "#2980b9"}
_NAMES = {"forward_train": "forward", "step": "training step"}
_WIDTH, _MARGIN, _LEFT, _RIGHT = 820, 16, 130, 140  # left and right: where the text beside the bars is
_LINE, _BAR = 26, 18


def _found(record) -> dict[str, dict[str, dict]]:
    """{what is timed: {who: row}} of the forward and the step, each in the first class that has a peer's time.

    torch.compile's row is the fastest of its modes and memory formats.
    """
    found = {}
    for (what, cls), rows in by_batch(record).items():
        n = max(rows, key=lambda n: n == BATCH)
        timed = [row for row in record["rows"] if (row["what"], row["class"], row["n"]) == (what, cls, n) and row["ms"]]
        compiled = [row for row in timed if row["who"].startswith("compile")]
        peers = {
            "PyTorch": next((row for row in timed if is_eager(row, what, cls, n)), None),
            "torch.compile": min(compiled, key=lambda row: row["ms"], default=None),
        }
        peers = {who: row for who, row in peers.items() if row}
        if peers:
            name = f"{_NAMES[what].capitalize()}, {n} image{'s'[: n != 1]}, {CLASSES[cls]}"
            found.setdefault(what, (name, {"ModelNew": rows[n][0], **peers}))
    return dict(found[what] for what in _NAMES if what in found)


def sentence(record) -> str | None:
    """How many times as fast as its peers ModelNew is: in the step, if it is timed. None if nothing is."""
    found = _found(record)
    if not found:
        return None
    name, rows = list(found.items())[-1]
    ours, *peers = rows.items()
    faster = " and ".join(f"{row['ms'] / ours[1]['ms']:.1f} times as fast as {who}" for who, row in peers)
    return f"**{ours[0]} is {faster}:** {name[0].lower()}{name[1:]}, on one {record['versions']['gpu'] or 'CPU'}."


def channels_last(record) -> str:
    """PyTorch's time in channels_last, if it is timed there, for the work of `sentence`."""
    _, rows = list(_found(record).items())[-1]
    ours = rows["ModelNew"]
    for row in record["rows"]:
        work = all(row[key] == ours[key] for key in ("what", "class", "n"))
        if work and (row["who"], row["layout"]) == ("eager", "nhwc") and row["ms"]:
            return f" (in channels_last {row['ms'] / ours['ms']:.1f} times ModelNew's time)"
    return ""


def compiled_how(record) -> str:
    """The modes and memory formats of which the fastest is torch.compile's time."""
    times = [rows["torch.compile"] for rows in _found(record).values() if "torch.compile" in rows]
    kinds = {(row["what"], row["class"], row["n"]) for row in times}
    timed = [row for row in record["rows"] if (row["what"], row["class"], row["n"]) in kinds and row["ms"]]
    modes = dict.fromkeys(
        row["who"].removeprefix("compile").strip("-") or "default" for row in timed if row["who"].startswith("compile")
    )
    return f"mode {' or '.join(map(repr, modes))}, in the faster memory format" if modes else "not timed"


def without_wgmma(record) -> str:
    """The times of a record that was measured without wgmma instructions."""
    times = "; ".join(
        f"{name[0].lower()}{name[1:]}: {ms(rows['ModelNew'])} ms" for name, rows in _found(record).items()
    )
    return (
        f"\n\n<sub>With NVRTC {record['versions']['nvrtc']} alone, which does not compile `wgmma`, the fast matrix "
        f"instructions of H100 and H200: {times}.</sub>"
    )


def svg(record) -> str:
    """The times as bars, on one scale that begins at 0."""
    groups = _found(record)
    longest = max(row["ms"] for rows in groups.values() for row in rows.values())
    at, left, drawn = _MARGIN + _BAR, _MARGIN + _LEFT, []

    def write(x, text, more=""):
        drawn.append(f'<text x="{x}" y="{at - 4}"{more}>{escape(text)}</text>')

    where = record["versions"]["gpu"] or "CPU"
    write(_MARGIN, f"Milliseconds on one {where}. Shorter is better. 2x: twice ModelNew's time.", ' fill="#555"')
    for name, rows in groups.items():
        at += _LINE + _BAR
        write(_MARGIN, name, ' font-weight="bold"')
        for who, row in rows.items():
            at += _LINE
            write(left - 8, who, ' text-anchor="end"')
            width = round((_WIDTH - 2 * _MARGIN - _LEFT - _RIGHT) * row["ms"] / longest)
            drawn.append(f'<rect x="{left}" y="{at - _BAR}" width="{width}" height="{_BAR}" fill="{_COLOURS[who]}"/>')
            more = "" if who == "ModelNew" else f", {ratio(row, rows['ModelNew'])}"
            write(left + width + 8, f"{ms(row)} ms{more}")
    height = at + _MARGIN
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {height}" width="{_WIDTH}" height="{height}"'
    style = ' font-family="Helvetica, Arial, sans-serif" font-size="15" fill="#222">'
    return "\n".join((head + style, '<rect width="100%" height="100%" rx="6" fill="white"/>', *drawn, "</svg>\n"))
