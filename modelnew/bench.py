"""`python -m modelnew bench`: times of ModelNew's kernels and of PyTorch on one GPU, and their record.

All contenders for the same work are timed in turns, trial by trial, in one process, so that ratios hold although clocks
drift. Between trials, other data overwrites the L2 cache. Our results are checked before they are timed. `Clock` says
whose time that is: the GPU's, and with few images the host's.
"""

import contextlib
import gc
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import click
import torch

from . import commands, layer_bench, records
from .entrants import PRECISE, Case, build, check, numerics
from .model import HEIGHT, get_init_inputs
from .numerics import wgmma
from .timing import Clock, Contender, Times, current, free, measure_together, rounded
from .workloads import (
    COMPILED,
    DTYPES,
    FEW_IMAGES,
    FLOAT16,
    KERNELS,
    MODELS,
    MODES,
    PEERS,
    WORKLOADS,
    Shape,
    ceilings,
    contenders,
)

_COMPILE_SHARE = 0.8  # of the time budget; the rest is for what needs no torch.compile
_STARTUPS = 2
_TRIAL_MS_OF_FEW = 10  # so long that an interruption of the host is a small part
_QUICK = (
    "forward_train",
    "forward_train_grad",
    "forward_eval",
    "step",
    "step_no_input_grad",
    *FLOAT16,
    "conv_forward",
    "dgrad",
    "wgrad",
    *KERNELS,
)

_NEEDS = (
    f"latency_... needs at most {FEW_IMAGES} images, float16_... the class fp16, ..._kernel the class tf32 or fp32, "
    "compiled_... the peers compile or all"
)

# argv: class, init arguments, shape of x, device. Prints seconds: of making the CUDA context, and of the rest.
_FIRST_CALL = """
import json, sys, time
import torch
who, init, shape, device = json.loads(sys.argv[1])
def now():
    if device != "cpu":
        torch.cuda.synchronize(device)
    return time.perf_counter()
start = time.perf_counter()
x = torch.rand(shape, device=device)
context = now()
import modelnew
model = getattr(modelnew, who)(*init, device=device)
with torch.no_grad():
    model(x)
print(context - start, now() - context)
"""

out = commands.console(140)


class Plan(NamedTuple):
    """What to measure."""

    batches: tuple[int, ...]
    classes: tuple[str, ...]
    what: tuple[str, ...]
    peers: str
    trials: int
    trial_ms_of_few: float  # how long a trial with few images lasts at least
    size: int
    seed: int
    budget: float
    startup: bool

    def cells(self, device) -> list[tuple[int, str, str]]:
        """(n, what, class) of each group that is measured together; parts of the model only at the first n."""
        cells = ((n, what, cls) for n in self.batches for what in self.what for cls in self.classes)
        cells = (cell for cell in cells if cell[1] in MODELS | COMPILED or cell[0] == self.batches[0])
        cells = (cell for cell in cells if cell[1] not in FLOAT16 or cell[2] == "fp16")
        # Under autocast they are tf32's.
        cells = (cell for cell in cells if cell[1] not in KERNELS or cell[2] in PRECISE)
        return [cell for cell in cells if contenders(cell[1], cell[0], self.peers, device)]


def run(plan: Plan, device: torch.device, describe: Callable[[str], None]) -> Iterator[list[dict]]:
    """Rows of the first calls, if wanted, then rows of each cell. describe(text): called with what is being done."""
    gc.freeze()  # each row collects garbage, and need not look through all modules
    refused = _refusing(plan.budget, _COMPILE_SHARE)
    if plan.startup:
        describe("first call in a new process")
        yield first_calls(plan, device)
    case = None
    for n, what, cls in plan.cells(device):
        if case is None or case.n != n:
            case = None  # frees its memory before the next takes some
            free()
            case = Case(n, plan.size, device, plan.seed)
        entrants = [_entrant(case, what, cls, *who) for who in contenders(what, n, plan.peers, device)]
        with current(device), numerics(cls, device, what):
            if what in COMPILED or any(entrant.who in MODES for entrant in entrants):
                torch.compiler.reset()  # code compiled, or a graph recorded, for one class would serve the next
            trial_ms = plan.trial_ms_of_few if n <= FEW_IMAGES else None
            clock = Clock(device, trial_ms, latency=what.startswith("latency"))
            measure_together(entrants, clock, plan.trials, refused, lambda who: describe(f"{what} {cls} N={n} {who}"))  # noqa: B023
        yield [entrant.row(what=what, **{"class": cls}, n=n) for entrant in entrants]


def _refusing(budget: float, compile_share: float = 1.0) -> Callable[[Contender], str | None]:
    """refused(entrant): why it may not begin, so long after now. compile_share: of the budget, for torch.compile."""
    start = time.monotonic()

    def refused(entrant):
        share = compile_share if entrant.who in MODES else 1
        return f"time budget of {budget:g} s spent" if time.monotonic() - start > share * budget else None

    return refused


def first_calls(plan: Plan, device: torch.device) -> list[dict]:
    """Rows startup_cold and startup_warm: without and with compiled kernels on disk.

    They time a new process, from after the import of torch to the result of its first forward, in training mode under
    no_grad. "context_ms" is the part that creates the CUDA context.
    """
    seconds = {}
    whos = [("startup_cold", "modelnew"), ("startup_warm", "modelnew")]
    whos += [("startup_warm", "eager")] if plan.peers != "none" else []
    for _ in range(_STARTUPS):
        with tempfile.TemporaryDirectory() as folder:
            for what, who in whos:
                seconds.setdefault((what, who), []).append(_first_call(who, plan, device, folder))
    rows = []
    for (what, who), found in seconds.items():
        entrant = Contender(who, "nchw", build=None)
        errors = [each for each in found if isinstance(each, str)]
        if errors:
            entrant.refuse(errors[0], failed=who == "modelnew")
        else:
            ms = [1e3 * sum(each) for each in found]
            entrant.times = Times(statistics.median(ms), min(ms), max(ms))
        row = entrant.row(what=what, **{"class": "fp32" if device.type == "cpu" else "tf32"}, n=plan.batches[0])
        context = None if errors else rounded(1e3 * statistics.median(each[0] for each in found))
        rows.append({**row, "context_ms": context})
    return rows


def _entrant(case, what, cls, who, layout):
    return Contender(
        who,
        layout,
        lambda: build(case, what, cls, who, layout),
        (lambda: check(case, what, cls, who)) if who.startswith("modelnew") else None,
    )


def _first_call(who, plan, device, folder):
    """(seconds to create the CUDA context, seconds of the rest), or an error message."""
    init = get_init_inputs()
    arguments = ["ModelNew" if who == "modelnew" else "Model", init, [plan.batches[0], init[0], plan.size, plan.size]]
    variables = {
        **os.environ,
        "CUPY_CACHE_DIR": folder,
        "CUPY_KERNELS_CACHE_DIR": folder,
        "CUDA_CACHE_PATH": folder,  # where NVRTC of CUDA 12.9 and newer keeps what it compiled
        "PYTHONPATH": os.pathsep.join(sys.path),  # the modelnew that runs here
    }
    command = [sys.executable, "-c", _FIRST_CALL, json.dumps([*arguments, str(device)])]
    done = subprocess.run(command, env=variables, capture_output=True, text=True, check=False)
    if done.returncode:
        return done.stderr.strip().rpartition("\n")[2] or f"exit code {done.returncode}"
    return tuple(map(float, done.stdout.split()))


@commands.command("bench", short_help="Measure times and memory beside PyTorch's.")
@click.option(
    "--quick",
    is_flag=True,
    help=f"A short selection: 512 images and 1, without startup, only {', '.join(_QUICK)}. Other options override it.",
)
@click.option(
    "--layers",
    is_flag=True,
    help="Measure every layer instead, at shapes of well-known networks, forward and step, in NCHW and channels_last. "
    "Needs a GPU. Uses only --classes (fp16 and bf16 mean tensors of that type), --peers, --trials and --budget.",
)
@click.option(
    "--batches",
    callback=commands.listed(),
    help="Images in a batch: numbers separated by commas, measured in this order. Parts of the model are measured "
    "with the first number only.  [default: 512,1,4096,64,8; 1 on the CPU]",
)
@click.option(
    "--what",
    callback=commands.listed(WORKLOADS),
    help="What to measure: names separated by commas. "
    + " ".join(f"{name}: {text}." for name, text in WORKLOADS.items())
    + "  [default: all]",
)
@click.option(
    "--classes",
    callback=commands.listed(DTYPES),
    help="Numeric classes: tf32 (PyTorch's default on a GPU), fp32 (TF32 off), fp16, bf16 (autocast; for "
    "convolutions alone, tensors of that type).  [default: tf32,fp32; fp32 on the CPU]",
)
@click.option(
    "--peers",
    type=click.Choice(list(PEERS)),
    help="Peers, in NCHW and in channels_last. none: no peers. eager: PyTorch, for at most 8 images on a GPU also in a "
    'CUDA graph. compile: also torch.compile, for at most 8 images also in the mode "reduce-overhead". all: also in '
    'the mode "max-autotune", which is slow.  [default: compile; eager on the CPU]',
)
@click.option(
    "--trials",
    type=click.IntRange(min=1),
    help=f"Trials of each contender: one call each, with at most {FEW_IMAGES} images calls for "
    f"{_TRIAL_MS_OF_FEW} ms.  [default: 20; 1 on the CPU, of one call]",
)
@click.option(
    "--size", type=click.IntRange(min=1), help=f"Height and width of an image.  [default: {HEIGHT}; 4 on the CPU]"
)
@commands.seed_option("parameters, batch and incoming gradient")
@click.option(
    "--budget",
    type=click.FloatRange(min=0),
    default=240,
    show_default=True,
    help="Time limit in seconds. Later measurements are skipped, those of torch.compile after 80% of it; rows say so.",
)
@click.option(
    "--startup/--no-startup",
    default=None,
    help="Also time the first forward of new processes.  [default: yes, except with --quick and on the CPU]",
)
@click.option(
    "--no-wgmma",
    is_flag=True,
    help="Measure without wgmma instructions, as with NVRTC 11 alone and without --startup. The record's name ends in "
    "CuPy's NVRTC, such as _nvrtc11.8.",
)
@commands.device_option()
@commands.output_option("bench", "layers", drawn=True)
@click.option(
    "--plot-only",
    metavar="RECORD",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="Measure nothing; draw the PNG of this record, of bench or training, beside it.",
)
def bench_command(device, output, plot_only, layers, no_wgmma, **options):
    """Measure times and peak memory of ModelNew and its peers, after a check of parity.

    Prints a table and writes a record (JSON). With matplotlib installed, it also draws plots (PNG).
    With at most 8 images a call waits for the host: such rows stand apart, and a call in a CUDA graph has PyTorch in a
    CUDA graph beside it. Floor: the least time that memory and tensor cores (fp16 products) allow, known for the H100.
    The exit code is 1 if a result of ours is wrong.
    """
    if plot_only:
        try:
            picture = commands.draw(json.loads(plot_only.read_text(encoding="utf-8")), plot_only)
        except (KeyError, TypeError, ValueError) as error:
            raise click.BadParameter(f"{plot_only} is no record of this command", param_hint="--plot-only") from error
        out.print(f"drawn: {picture}", highlight=False)
        return
    device = commands.gpu(device, "--layers") if layers else commands.usable_device(device)
    if layers:
        _bench_layers(device, output, **options)
        return
    plan = _plan(device, **options)
    if unmeasured := set(options["what"] or ()) - {what for _, what, _ in plan.cells(device)}:
        raise click.BadParameter(
            f"{', '.join(sorted(unmeasured))}: not measured with these --batches, --classes and --peers. {_NEEDS}",
            param_hint="--what",
        )
    if no_wgmma:
        plan = plan._replace(startup=False)
    with current(device):
        record = _head(plan, device)
    with wgmma(False) if no_wgmma else contextlib.nullcontext():
        _collect(record, len(plan.cells(device)) + plan.startup, lambda describe: run(plan, device, describe))
    records.show(record, out)
    if device.type == "cpu":
        out.print("Times of the emulator on a CPU say nothing about speed. A record is written only with --output.")
    _publish(record, "bench", device, output, f"_nvrtc{record['versions']['nvrtc']}" if no_wgmma else "")


def _collect(record, total, rows_of) -> None:
    """Fills the record with the rows of rows_of(describe), which yields lists of them, and shows a progress bar."""
    with commands.progress(total) as update:
        for rows in rows_of(lambda text: update(description=text)):
            record["rows"] += rows
            update(advance=1)


def _publish(record, kind, device, output, more="") -> None:
    """Writes and draws the record, and ends the command with exit code 1 if a result of ours is wrong."""
    with current(device):
        commands.publish(record, kind, device, output, out, more)
    if any(row.get("failed") for row in record["rows"]):
        raise click.exceptions.Exit(1)


def _bench_layers(device, output, classes, peers, trials, budget, **_):
    if peers == "all":
        raise click.BadParameter("with --layers: none, eager or compile", param_hint="--peers")
    refused, peers = _refusing(budget), PEERS[peers or "eager"]
    trials, classes = trials or 20, classes or tuple(DTYPES)
    with current(device):
        record = {**commands.head(device), "trials": trials, "rows": []}
    measured = lambda describe: layer_bench.measure(classes, peers, trials, device, refused, describe)  # noqa: E731
    _collect(record, len(layer_bench.ENTRIES), measured)
    layer_bench.show(record, out)
    _publish(record, "layers", device, output)


def _plan(device, quick, batches, what, classes, peers, trials, size, seed, budget, startup):
    cpu = device.type == "cpu"
    if cpu and "tf32" in (classes or ()):
        raise click.BadParameter("a CPU has no tf32", param_hint="--classes")
    return Plan(
        batches or ((1,) if cpu else (512, 1) if quick else (512, 1, 4096, 64, 8)),
        classes or (("fp32",) if cpu else ("tf32", "fp32")),
        what or (_QUICK if quick else tuple(WORKLOADS)),
        peers or ("eager" if cpu else "compile"),
        trials or (1 if cpu else 20),
        0 if cpu else _TRIAL_MS_OF_FEW,
        size or (4 if cpu else HEIGHT),
        seed,
        budget,
        not (quick or cpu) if startup is None else startup,
    )


def _head(plan, device):
    """A record without rows."""
    begun = commands.head(device)
    return {
        **begun,
        "trials": plan.trials,
        "shape": Shape(*get_init_inputs()[:5], plan.size)._asdict(),
        "ceilings": ceilings(begun["versions"]["gpu"]),
        "rows": [],
    }
