"""Writes the parts of README.md and benchmarks/README.md that committed records decide."""

import itertools
import json
import math
import os
import re
from collections.abc import Iterator
from pathlib import Path

import click

from cupy_kernels import source
from modelnew import commands, layer_bench
from modelnew.parity import RATIO
from modelnew.records import GPU, GRAPH, HOST, bound, by_batch, comparisons, megabytes, trials
from modelnew.workloads import CHAINS, COMPILED, FEW_IMAGES, FLOAT16, MODELS, MODES, OF_COMPILED

from . import headline
from .generated import ROOT, check_option, settle
from .wording import CLASSES, is_eager, ms, ratio, where

FILES = (ROOT / "README.md", ROOT / "benchmarks" / "README.md")
MARKERS = "<!-- {}: written by `python3 -m tools.readme` -->", "<!-- end of {} -->"
_SHOWN = MODELS | FLOAT16 | CHAINS
_AMP = ": under autocast, with a GradScaler"
_NO_TIMES = "No record of times is committed yet; `python3 -m modelnew bench` on a GPU writes one."
_NO_TRAINING = "No record of training is committed yet; `make training` on a GPU writes one."
_NO_LAYERS = "No record of layers is committed yet; `python3 -m modelnew bench --layers` on a GPU writes one."
_NO_SUITE = "No record says yet that the test suite passed on a GPU; `make record` on one writes it."
_NO_KERNELBENCH = (
    "No record of KernelBench's evaluation is committed yet; `python3 -m tools.kernelbench_eval` writes one."
)
_NO_SCALING = "No record of several GPUs is committed yet; `python3 -m modelnew scaling` on two GPUs writes one."
_WAYS = {
    "apart": "each for itself",
    "ddp": "DistributedDataParallel",
    "ddp, own buffers": "with `broadcast_buffers=False, gradient_as_bucket_view=True`",
    "ddp, synchronised": "the same, batch norm synchronised",
}
_NEEDED = {
    "bench": ("command", "rows", "trials"),
    "layers": ("command", "rows", "trials"),
    "training": ("command", "rows", "steps", "batch", "seeds", "judged", "judgements", "last"),
    "parity": ("passed", "failed", "skipped"),
    "scaling": ("command", "rows", "trials", "steps"),
    "fuzz": ("command", "cases", "failed"),
    "host": ("command", "rows", "trials"),
    "kernelbench": ("command", "commit", "rows", "trials", "gradient_errors", "static_errors"),
}


def rendered(text: str, results: Path, folder: Path) -> str:
    """The text with its generated parts as the records in `results` have them. folder: where the text's file lies.

    A part stands between the lines that `MARKERS` has for its name; the text has any of `PARTS`, each once.
    ValueError if the text has none, or one without an end or twice, or if a record is none.
    """
    found = re.findall(MARKERS[0].format("(.+)"), text)
    if not found or len({*found}) < len(found) or not PARTS.keys() >= {*found}:
        raise ValueError(f"the text must have parts out of {', '.join(PARTS)}, each once; received {found}")
    for name in found:
        begin, end = (marker.format(name) for marker in MARKERS)
        pattern = re.compile(f"{re.escape(begin)}.*?{re.escape(end)}", re.DOTALL)
        if not pattern.search(text):
            raise ValueError(f"the part that begins with the line {begin} must end with {end}")
        content = PARTS[name](results, folder)
        text = pattern.sub(lambda _, content=content: f"{begin}\n\n{content}\n\n{end}", text)  # noqa: B023
    return text


def _speed(results, folder) -> str:
    """What the first record of times has on top, with its picture, and the times of those without wgmma."""
    found = [*_records(results, "bench")]
    for path, record in found[:1]:
        if sentence := headline.sentence(record):
            picture = os.path.relpath(path.with_suffix(".svg"), folder)
            return (
                f"{sentence}\n\n![Times of ModelNew, PyTorch and torch.compile]({picture})\n\n"
                "<sub>Medians of trials. The contenders take turns in one process, the L2 cache is flushed before each "
                f"call, and results are checked first. PyTorch: eager, NCHW{headline.channels_last(record)}. "
                f"torch.compile: {headline.compiled_how(record)}. {where(record)}, `{record['command']}`.</sub>"
                + "".join(headline.without_wgmma(other) for _, other in found[1:] if "--no-wgmma" in other["command"])
            )
    return _NO_TIMES


def _gains(results, _) -> str:
    """The range of each layer's means, from the first record of layers."""
    for _, record in itertools.islice(_records(results, "layers"), 1):
        means, worst = {}, []
        for (operator, dtype, _, what), rows in layer_bench.groups(record).items():
            mean, smallest = layer_bench.mean_and_worst(rows)
            means.setdefault(operator, {}).setdefault((dtype, what), []).append(mean)
            worst.append(smallest)
        least = min(filter(None, worst), default=math.inf)
        lines = [
            "| PyTorch's time over ours | forward, float32 | step, float32 | forward, float16 | step, float16 |",
            "|---|--:|--:|--:|--:|",
        ]
        for operator, found in means.items():
            dtypes = "tf32" if ("tf32", "step") in found else "fp32", "fp16"
            cells = [_range(found.get((dtype, what))) for dtype in dtypes for what in ("forward", "step")]
            lines.append(f"| {operator} | {' | '.join(cells)} |")
        compiled = ", or torch.compile if faster" * any("compile_ms" in row for row in record["rows"])
        small = (
            f"<sub>{where(record)}, `{record['command']}`. PyTorch: eager{compiled}, in the same memory format. "
            "Geometric means over shapes of well-known networks; a range is that of both memory formats. float32 "
            f"convolutions may use TF32. Single shapes, in all dtypes: from {least:.2f}x; "
            "[NOTES](benchmarks/NOTES.md#layers) names the slow ones."
        )
        if untimed := sorted({row["operator"] for row in record["rows"]} - {name.split(",")[0] for name in means}):
            small += f" Not timed: {', '.join(untimed)}."
        small += "</sub>"
        return "\n".join([*lines, "", small])
    return _NO_LAYERS


def _range(means) -> str:
    return " to ".join(dict.fromkeys(f"{mean:.2f}x" for mean in (min(means), max(means)))) if means else ""


def _times(results, folder) -> str:
    parts = []
    for path, record in _records(results, "bench"):
        batches = [row["n"] for row in record["rows"] if row["ms"] is not None and row["what"] in MODELS]
        if not batches:
            continue
        shown = (batches[0], min(batches))
        lines = [
            f"{where(record)}, `{record['command']}`. Milliseconds, median of {trials(record)}, all in one process "
            "and in turns, L2 flushed, results checked first. MB: peak memory beyond inputs and parameters. PyTorch: "
            "eager, in NCHW. Fastest peer: of PyTorch and torch.compile, each in NCHW (nchw) and in channels_last "
            "(nhwc), of those that were timed: the record says which were not, and why. 2x: the peer takes twice as "
            "long as ModelNew. tf32, fp32: float32 tensors with TF32 on, and off; fp16, bf16: autocast.",
        ]
        if min(batches) <= FEW_IMAGES:
            lines[0] += (
                f" Up to {FEW_IMAGES} images, a call takes the host longer than the GPU, except in a CUDA graph. There "
                "the host's clock times calls one after another; the fastest and the slowest trial stand in brackets. "
                "Tables of calls with and without CUDA graphs are apart. In a CUDA graph, ModelNew stands beside the "
                "fastest of all peers, PyTorch in a CUDA graph too." + _untimed(record)
            )
        for n, limit in itertools.product(dict.fromkeys(shown), (GPU, HOST, GRAPH)):
            if rows := _table(record, n, limit):
                lines += ["", f"{n} image{'s'[: n != 1]}{'' if limit == GPU else f', {limit}'}:", "", *rows]
        used = {row["what"]: None for row in record["rows"] if row["n"] in shown and row["what"] in _SHOWN}
        lines += ["", "; ".join(f"`{what}`: {_SHOWN[what]}" for what in used) + "."]
        if len(set(batches)) > 2:
            lines += [
                "",
                "By images in a batch, and how many times as long the fastest peer of those timed there takes. Up to "
                f"{FEW_IMAGES} images it is the host's time, of more it is the GPU's.",
                "",
                *_by_batch(record),
            ]
        lines += [*_startup(record), *_compiled(record)]
        picture = os.path.relpath(path.with_suffix(".png"), folder)
        parts.append("\n".join([*lines, "", f"![Times beside PyTorch's]({picture})"]))
    return "\n\n".join(parts) or _NO_TIMES


def _untimed(record) -> str:
    """For which rows of few images torch.compile was timed, if not for all."""
    rows = [row for row in record["rows"] if row["n"] <= FEW_IMAGES and row["who"] in MODES and row["what"] in _SHOWN]
    timed = list(dict.fromkeys(f"`{row['what']}` {row['class']}" for row in rows if row["ms"] is not None))
    if all(row["ms"] is not None for row in rows):
        return ""
    where_timed = f"only for {', '.join(timed)}" if timed else "for no row"
    return f" Of up to {FEW_IMAGES} images, torch.compile was timed {where_timed}."


def _table(record, n, limit) -> list[str]:
    """The rows of `n` images whose time depends on `limit`, empty if there are none."""
    lines = []
    for row, peer in comparisons(record):
        what, cls = row["what"], row["class"]
        if (row["n"], bound(row)) != (n, limit) or what not in _SHOWN or row["ms"] is None:
            continue
        who = "eager-graph" if limit == GRAPH else "eager"
        eager = next((r for r in record["rows"] if is_eager(r, what, cls, n, who)), None)
        if limit == GRAPH and not eager:
            peer = None  # others take the host's time, which is another matter
        extent = _extent if limit == HOST else lambda _: ""
        cells = [f"`{what}`", cls, f"**{ms(row)}**{extent(row)}", megabytes(row)]
        cells += [f"{ms(eager)}{extent(eager)}", ratio(eager, row)] if eager else [""] * 2
        cells += (
            [f"{ms(peer)}{extent(peer)}", f"{peer['who']}, {peer['layout']}", megabytes(peer), ratio(peer, row)]
            if peer
            else [""] * 4
        )
        lines.append(f"| {' | '.join(cells)} |")
    head = ["", "class", "ModelNew, ms", "MB", "PyTorch, ms", "ratio", "fastest peer, ms", "", "MB", "ratio"]
    rule = f"|{'|'.join(['---', '---', *['--:'] * (len(head) - 2)])}|"
    return [f"| {' | '.join(head)} |", rule, *lines] if lines else []


def _extent(row) -> str:
    """From the fastest to the slowest trial."""
    return f" ({row['ms_min']:.3g} to {row['ms_max']:.3g})"


def _by_batch(record) -> list[str]:
    """A row for each workload and class, a column for each n: our time, the fastest peer's in terms of it, and who."""
    found = by_batch(record)
    sizes = sorted({n for rows in found.values() for n in rows})
    lines = [f"| | class | {' | '.join(map(str, sizes))} |", f"|---|---|{'--:|' * len(sizes)}"]
    for (what, cls), rows in found.items():
        cells = [f"{ms(rows[n][0])} ms{_faster(*rows[n])}" if n in rows else "" for n in sizes]
        lines.append(f"| `{what}` | {cls} | {' | '.join(cells)} |")
    return lines


def _faster(row, peer) -> str:
    return f", {ratio(peer, row)} {peer['who']}" if peer else ""


def _startup(record) -> list[str]:
    found = {row["what"]: row["ms"] for row in record["rows"] if row["who"] == "modelnew" and row["ms"] is not None}
    texts = {"startup_cold": "nothing compiled before", "startup_warm": "kernels compiled on disk"}
    parts = [f"{found[what] / 1e3:.1f} s with {text}" for what, text in texts.items() if what in found]
    return ["", f"The first forward of a process takes {', '.join(parts)}."] if parts else []


def _compiled(record) -> list[str]:
    """ModelNew under torch.compile: a row for each workload and class, a column for each number of images and mode."""
    found = {(row["what"], row["class"], row["n"], row["who"]): row["ms"] for row in record["rows"] if row["ms"]}
    kinds = dict.fromkeys(key[:2] for key in found if key[0] in COMPILED)
    sizes = dict.fromkeys(key[2] for key in found if key[0] in COMPILED)
    columns = [
        (n, who)
        for n, who in itertools.product(sizes, MODES)
        if any((*kind, n, who) in found and (*kind, n, "modelnew") in found for kind in kinds)
    ]
    if not columns:
        return []
    heads = [f"{n} image{'s'[: n != 1]}, {MODES[who]}" for n, who in columns]
    lines = [f"| | class | {' | '.join(heads)} |", f"|---|---|{'--:|' * len(columns)}"]
    for what, cls in kinds:
        times = [(found.get((what, cls, n, who)), found.get((what, cls, n, "modelnew"))) for n, who in columns]
        cells = [f"{compiled / eager:.2f}x" if compiled and eager else "" for compiled, eager in times]
        lines.append(f"| `{what.removeprefix(OF_COMPILED)}` | {cls} | {' | '.join(cells)} |")
    text = (
        "ModelNew under `torch.compile`, by its modes: its time over the time without. Both were measured in turns, "
        f"apart from the rows above: up to {FEW_IMAGES} images, the host's speed differs from one to the other."
    )
    return ["", text, "", *lines]


def _scaling(results, _) -> str:
    parts = []
    for _, record in _records(results, "scaling"):
        gpus = max(row["gpus"] for row in record["rows"])
        lines = [
            f"{where(record)}, `{record['command']}`. A training step of {record['rows'][0]['n']} images on each of "
            f"{gpus} GPUs, without the gradient of x, beside one GPU alone: median of "
            f"{record['trials']} trials of {record['steps']} steps, in turns. Weak scaling: the time alone "
            "over the time.",
            "",
            "| | | ms alone | ms | added | weak scaling |",
            "|---|---|--:|--:|--:|--:|",
        ]
        alone = {row["who"]: row["ms"] for row in record["rows"] if row["what"] == "alone"}
        for row in record["rows"]:
            if row["what"] in _WAYS:
                name = {"modelnew": "ModelNew", "model": "Model"}[row["who"]]
                cells = (
                    f"{alone[row['who']]:.3g}",
                    f"{row['ms']:.3g}",
                    f"{row['added_ms']:+.2f}",
                    f"{row['scaling']:.2f}",
                )
                lines.append(f"| {name} | {_WAYS[row['what']]} | {' | '.join(cells)} |")
        parts.append("\n".join(lines))
    return "\n\n".join(parts) or _NO_SCALING


def _kernelbench(results, _) -> str:
    parts = []
    for _, record in _records(results, "kernelbench"):
        rows, errors = record["rows"], record["gradient_errors"].values()
        times = ", ".join(f"{row['speedup']:.2f} ({ms(row)} ms)" for row in rows)
        parts.append(
            f"{where(record)}, `{record['command']}`. KernelBench's own evaluation (commit {record['commit'][:7]}) of "
            f"`examples/kernelbench_submission.py`, each in a new process: {sum(row['correct'] for row in rows)} of "
            f"{len(rows)} find it right. It is as many times as fast as PyTorch: {times}, means of {record['trials']} "
            "forwards. Gradients, which KernelBench does not compare, are at most "
            f"{max(ours / theirs for ours, theirs in errors):.2f} times as far from float64's as PyTorch's. What "
            f"its static checks report as an error: {'; '.join(record['static_errors']) or 'nothing'}."
        )
    return "\n\n".join(parts) or _NO_KERNELBENCH


def _layers(results, folder) -> str:
    parts = []
    for path, record in _records(results, "layers"):
        found = layer_bench.groups(record)
        shapes = len({(row["operator"], row["case"]) for row in record["rows"]})
        missing = sum(layer_bench.ratio(row) is None for row in record["rows"])
        lines = [
            f"{where(record)}, `{record['command']}`. Layers of ours beside PyTorch's at {shapes} shapes of "
            f"well-known networks, median of {record['trials']} trials in turns, L2 flushed, results checked first. "
            "PyTorch's time over ours: geometric mean of all, and in brackets the least of those for which PyTorch "
            f"takes over {layer_bench.LONG_US} us. Above 1x ours is faster."
            + (f" {missing} of {len(record['rows'])} rows have no time; the record says why." if missing else ""),
            "",
            "| | | forward, NCHW | step, NCHW | forward, channels_last | step, channels_last |",
            "|---|---|--:|--:|--:|--:|",
        ]
        for operator, dtype in dict.fromkeys(key[:2] for key in found):
            cells = []
            for layout in ("nchw", "nhwc"):
                for what in ("forward", "step"):
                    rows = found.get((operator, dtype, layout, what))
                    mean, worst = layer_bench.mean_and_worst(rows) if rows else (None, None)
                    cells.append(f"{mean:.2f}x" + (f" ({worst:.2f}x)" if worst else "") if rows else "")
            lines.append(f"| {operator} | {dtype} | {' | '.join(cells)} |")
        if memory := layer_bench.most_memory(record):
            case = "{operator}, {case}, {dtype}, {layout}, {what}".format(**memory[1])
            lines += ["", f"Peak memory is at most {memory[0]:.2f} times PyTorch's ({case})."]
        picture = os.path.relpath(path.with_suffix(".png"), folder)
        parts.append("\n".join([*lines, "", f"![PyTorch's time over ours, a dot a shape]({picture})"]))
    return "\n\n".join(parts) or _NO_LAYERS


def _training(results, folder) -> str:
    parts = []
    for path, record in _records(results, "training"):
        ends = {(row["who"], row["class"]): row["loss_last"] for row in record["rows"] if row["layout"] == "nchw"}
        classes = {cls: CLASSES[cls] for cls in dict.fromkeys(cls for _, cls in ends)}
        losses = [
            f"{who} " + " and ".join(f"{ends[who, cls]:.6f} {text}" for cls, text in classes.items())
            for who in ("Model", "ModelNew")
        ]
        judgements = record["judgements"]
        of_output, of_weight = (
            " and ".join(
                f"{j['rms'] / j['torch_rms']:.2f} {text}"
                for cls, text in classes.items()
                for j in judgements
                if (j["what"], j["class"]) == (what, cls)
            )
            for what in ("output", "conv_transpose.weight")
        )
        worst = max((j for j in judgements if j["torch_rms"]), key=lambda j: j["rms"] / j["torch_rms"])
        picture = os.path.relpath(path.with_suffix(".png"), folder)
        parts.append(
            f"{where(record)}, `{record['command']}`{_AMP if record.get('amp') else ''}. "
            f"After each of the first {record['judged']} steps of SGD, from "
            f"{record['seeds']} seeds, output, parameters and running statistics of ModelNew are compared with a "
            f"float64 run, and with how far Model of the same class is from it: {sum(j['ok'] for j in judgements)} of "
            f"{len(judgements)} comparisons pass: ours is at most {RATIO} times as far as Model, or farther by no more "
            f"than rounding and chance explain. At worst the output is {of_output} times as far as Model's, the "
            f"convolution's weight {of_weight}, and {worst['what']} {worst['rms'] / worst['torch_rms']:.2f} "
            f"{CLASSES[worst['class']]}, the most of all."
            f"\n\nThen a demonstration: {record['steps']} steps on the same batches of {record['batch']}; "
            f"mean loss of the last {record['last']}: {', '.join(losses)}. Rounding is amplified in so many steps, "
            f"PyTorch's own too, so the ends are not compared.\n\n![Loss curves]({picture})"
        )
    return "\n\n".join(parts) or _NO_TRAINING


def _suite(results, folder) -> str:
    lines = [
        f"| {where(record)} | {record['passed']} | {record['failed']} | {record['skipped']} |"
        for _, record in _records(results, "parity")
    ]
    head = ["The test suite on GPUs:", "", "| | passed | failed | skipped |", "|---|--:|--:|--:|"]
    return "\n".join([*(head if lines else [_NO_SUITE]), *lines, *_fuzz(results), *_older(results)])


def _older(results) -> list[str]:
    """Names the records of other kernels than the present ones."""
    records = [(path, record) for kind in _NEEDED for path, record in _records(results, kind)]
    names = sorted(path.name for path, record in records if record["digest"] != source.digest())
    return (
        ["", f"Of older kernels than the present ones, `{source.digest()[:12]}`: {', '.join(names)}."] if names else []
    )


def _fuzz(results) -> list[str]:
    lines = []
    for _, record in _records(results, "fuzz"):
        counts = record["cases"].values()
        lines += [
            "",
            f"{where(record)}, `{record['command']}`: {sum(counts)} random calls, at least {min(counts)} of each of "
            f"{len(counts)} functions, compared with PyTorch's; {record['failed']} were wrong.",
        ]
    return lines


PARTS = {
    "speed": _speed,
    "gains": _gains,
    "times": _times,
    "kernelbench": _kernelbench,
    "scaling": _scaling,
    "layers": _layers,
    "training": _training,
    "suite": _suite,
}


def _records(results, kind) -> Iterator[tuple[Path, dict]]:
    for path in sorted(results.glob(f"{kind}_*.json")):
        try:
            record = json.loads(path.read_text(encoding="utf-8"))
            if missing := {"versions", "digest", *_NEEDED[kind]} - set(record):
                raise KeyError(", ".join(sorted(missing)))
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise ValueError(f"{path} is no record: {error}") from error
        yield path, record


@commands.command()
@click.option(
    "--file",
    "files",
    multiple=True,
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    default=FILES,
    show_default="README.md and benchmarks/README.md of the repository",
    help="Text with the markers between which to write; may be given several times.",
)
@click.option(
    "--results",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    default=ROOT / "benchmarks" / "results",
    show_default="benchmarks/results of the repository",
    help="Folder with records.",
)
@check_option
def command(files, results, check):
    """Write what the READMEs say of times, training and tests from committed records, and draw the plots."""
    try:
        texts = {file: rendered(file.read_text(encoding="utf-8"), results, file.parent) for file in files}
        drawn = [(path, record) for kind in ("bench", "layers", "training") for path, record in _records(results, kind)]
        shown = "".join(texts.values())
        drawn = [(path, record) for path, record in drawn if path.with_suffix(".png").name in shown]
        svgs = {path.with_suffix(".svg"): record for path, record in _records(results, "bench")}
        svgs = {path: headline.svg(record) for path, record in svgs.items() if path.name in shown}
    except ValueError as error:
        raise click.ClickException(str(error)) from error
    for file, text in (texts | svgs).items():
        settle(file, text, check)
    for path, record in drawn:
        if check and not path.with_suffix(".png").exists():
            raise click.ClickException(f"there is no {path.with_suffix('.png')}: run the command without --check")
        if not check:
            click.echo(f"drawn: {commands.draw(record, path)}")


if __name__ == "__main__":
    command()
