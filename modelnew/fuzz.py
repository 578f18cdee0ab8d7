"""`python -m modelnew fuzz`: random calls of every function, compared with PyTorch's, see `fuzz_judge`.

On a GPU, several processes share the work. First each kernel is compiled by one of them. Then they judge cases, a few
of one operator at a time.
"""

import contextlib
import multiprocessing
import os
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor

import click
import torch

from cupy_kernels.errors import KernelCompileError
from cupy_kernels.source import Kernel, Variant

from . import commands, interop, parity
from .fuzz_cases import OPERATORS
from .fuzz_judge import draw, launched, run
from .timing import current

CASES, FEW = 10_000, 20
PROCESSES = 16  # more would wait for the GPU
BATCH = 50  # cases that a process judges at a time
# Cases of each operator, from whose kernels one knows nearly all that the others need.
TYPICAL = 300

out = commands.console()


def fuzz(
    operators,
    cases: int,
    seed: int,
    device: torch.device,
    seconds: float,
    report: Callable[[str, list[str | None]], None],
    processes: int = 1,
) -> tuple[dict[str, int], int]:
    """({operator: number of cases judged}, number of wrong cases). A time limit ends all operators alike.

    report: report(operator, lines) is called after some cases. lines: the results of `fuzz_judge.run`.
    """
    end = time.monotonic() + seconds
    batch = BATCH if processes > 1 else 1
    turns = [(op, range(i, min(i + batch, cases))) for i in range(0, cases, batch) for op in operators]
    counts, failed = dict.fromkeys(operators, 0), 0
    with _mapped(processes) as mapped:
        if processes > 1:
            _compile_all(mapped, operators, min(cases, TYPICAL), seed, device)
        found = mapped(_judged, *zip(*((op, seed, numbers, device, end) for op, numbers in turns)))
        for (operator, _), lines in zip(turns, found):
            counts[operator] += len(lines)
            failed += sum(map(bool, lines))
            report(operator, lines)
    return counts, failed


@contextlib.contextmanager
def _mapped(processes):
    """A context that gives `map` over this number of processes."""
    if processes == 1:
        yield map
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(processes, context, torch.set_num_threads, (1,)) as executor:
        yield executor.map


def _compile_all(mapped, operators, cases, seed, device) -> None:
    """Compiles what the first cases launch, so that other processes find it on disk."""
    turns = [(op, seed, range(i, min(i + BATCH, cases)), device) for op in operators for i in range(0, cases, BATCH)]
    found: dict[Variant, Kernel] = {}
    for kernels in mapped(_launched, *zip(*turns)):
        found |= kernels
    list(mapped(_compile, found.values(), [device] * len(found)))


def _launched(operator, seed, numbers, device):
    with _settings(device):
        found = {}
        for number in numbers:
            found |= launched(*draw(operator, seed, number), device)
        return found


def _compile(kernel, device):
    with current(device), contextlib.suppress(KernelCompileError):  # which the case that launches it will name
        interop.backend(device).prepare([kernel])


def _judged(operator: str, seed: int, numbers: Iterable[int], device: torch.device, end: float) -> list[str | None]:
    """The results of `run` for these cases, as far as time allows."""
    with _settings(device):
        found = []
        for number in numbers:
            if time.monotonic() > end:
                break
            found.append(run(operator, seed, number, device))
        return found


@contextlib.contextmanager
def _settings(device) -> Iterator[None]:
    """A context without TF32, in which torch.empty returns NaN."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    fill = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        with current(device), parity.tf32(False), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        torch.utils.deterministic.fill_uninitialized_memory = fill


@commands.command("fuzz", short_help="Compare random calls of every function with PyTorch's.")
@click.option(
    "--cases", type=click.IntRange(min=1), help=f"Cases of each operator.  [default: {CASES}; {FEW} on the CPU]"
)
@commands.seed_option("the cases")
@click.option(
    "--operator",
    "operators",
    multiple=True,
    type=click.Choice(list(OPERATORS)),
    metavar="FUNCTION",
    help=f"A function of modelnew.functional: {', '.join(OPERATORS)}. May be given several times.  [default: all]",
)
@click.option("--case", "number", type=click.IntRange(min=0), help="Judge only the case with this number.")
@click.option("--budget", type=click.FloatRange(min=0), default=540, show_default=True, help="Time limit in seconds.")
@click.option(
    "--processes",
    type=click.IntRange(min=1),
    help=f"Processes that share the work.  [default: one for each CPU, at most {PROCESSES}; 1 on the emulator]",
)
@commands.device_option()
@commands.output_option("fuzz")
def fuzz_command(device, output, cases, seed, operators, number, budget, processes):
    """Compare random calls of every function of modelnew.functional with PyTorch's.

    Shapes, memory layouts, dtypes, hyper-parameters and values are random. Values include NaN, infinities and values
    near the limits of a type. Output, gradients and second derivatives are judged by their errors against a float64
    run, beside PyTorch's errors. A wrong case prints a line that reproduces it. Writes a record (JSON). The exit code
    is 1 if a case is wrong.
    """
    device = commands.usable_device(device)
    operators = operators or list(OPERATORS)
    if number is not None:
        with _settings(device):
            found = [run(operator, seed, number, device) for operator in operators]
        for operator, line in zip(operators, found):
            out.print(line or f"{operator}: right", markup=False, highlight=False, soft_wrap=True)
        raise click.exceptions.Exit(int(any(found)))
    cases = cases or (FEW if device.type == "cpu" else CASES)
    processes = processes or (1 if device.type == "cpu" else min(PROCESSES, len(os.sched_getaffinity(0))))
    with commands.progress(cases * len(operators)) as update:
        update(description="compiling and running")

        def report(operator, lines):
            update(advance=len(lines), description=operator)
            for line in filter(None, lines):
                out.print(line, markup=False, highlight=False, soft_wrap=True)

        counts, failed = fuzz(operators, cases, seed, device, budget, report, processes)
    if not any(counts.values()):
        raise click.ClickException(f"no case was judged in {budget:g} s: --budget allows more")
    if output or device.type == "cuda":
        with current(device):
            commands.save({**commands.head(device), "cases": counts, "failed": failed}, "fuzz", device, output, out)
    out.print(", ".join(f"{operator}: {count}" for operator, count in counts.items()), highlight=False)
    out.print(f"{sum(counts.values())} cases, {failed} wrong", highlight=False)
    if failed:
        raise click.exceptions.Exit(1)
