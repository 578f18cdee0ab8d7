"""Shared code of the commands: options, the device, and the records that they write."""

import contextlib
import shlex
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import click
import torch
from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from cupy_kernels import source
from cupy_kernels.backend import on_compile
from cupy_kernels.errors import BackendError, EmulatorError, KernelCompileError

from . import environment, plots, records

SETTINGS = {"help_option_names": ["-h", "--help"]}  # context_settings of all commands
_MOST_OF_SEEDS = 2**31 - 1


class Command(click.Command):
    """A command that ends with a message, and exit code 1, where kernels cannot run."""

    def invoke(self, context):
        try:
            return super().invoke(context)
        except (BackendError, EmulatorError, KernelCompileError, torch.OutOfMemoryError) as error:
            raise click.ClickException(str(error)) from error


def command(name: str | None = None, **options):
    """click.command, of this kind."""
    return click.command(name, cls=Command, context_settings=SETTINGS, **options)


def device_option(cpu: str = "or cpu, which means the emulator"):
    """The option --device. cpu: what its help says of the CPU."""
    return click.option("--device", help=f"cuda, cuda:1, ... {cpu}.  [default: the GPU, if one is usable]")


def output_option(*kinds: str, drawn: bool = False):
    """The option --output of a command that writes records of these kinds. drawn: it also writes plots."""
    names = " or ".join(f"{kind}_<gpu>.json" for kind in kinds)
    return click.option(
        "--output",
        type=click.Path(file_okay=False, path_type=Path),
        callback=lambda context, _, folder: folder if context.resilient_parsing else folder and _writable(folder),
        help=f"Folder for {names}{' and the .png' if drawn else ''}.  [default: benchmarks/results in the "
        "repository's root, the current directory elsewhere; on the CPU nothing is written]",
    )


def _writable(folder: Path) -> Path:
    """The folder, made if it is missing. A record that cannot be written is to be known before it is measured."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise click.BadParameter(f"no file can be written there: {error}") from error
    return folder


def seed_option(of: str):
    """The option --seed. of: what it is the seed of."""
    limits = click.IntRange(0, _MOST_OF_SEEDS)
    return click.option("--seed", type=limits, default=0, show_default=True, help=f"Seed of {of}.")


def listed(choices: Iterable[str] | None = None):
    """The callback of an option that takes names of choices, or whole numbers, separated by commas."""

    def parse(_, parameter, value):
        if value is None:
            return None
        names = [name.strip() for name in value.split(",")]
        if choices is None:
            if not all(name.isdecimal() and int(name) for name in names):
                raise click.BadParameter(f"whole numbers from 1 on, with commas between; received {value!r}")
            return tuple(map(int, names))
        if unknown := [name for name in names if name not in choices]:
            raise click.BadParameter(f"{', '.join(map(repr, unknown))}: not among {', '.join(choices)}")
        return tuple(names)

    return parse


def trials_option(default: int):
    """The option --trials of a command that times."""
    return click.option(
        "--trials", type=click.IntRange(min=1), default=default, show_default=True, help="Trials of each time."
    )


def console(width: int = 120) -> Console:
    """Where results are printed: so wide where that is no terminal."""
    return Console(width=None if sys.stdout.isatty() else width)


def table(left: tuple[str, ...], right: tuple[str, ...]) -> Table:
    """A table with these columns, of which the last ones are aligned to the right."""
    found = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    for name in left:
        found.add_column(name, overflow="fold")
    for name in right:
        found.add_column(name, justify="right")
    return found


@contextlib.contextmanager
def progress(total: int, completed: int = 0) -> Iterator[Callable]:
    """A bar, which also tells which kernel is being compiled; gives what updates it: update(advance=, description=).

    Where stderr is no terminal, it gets the lines of `doing`, and one for each tenth of the total.
    """
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    console, tenth = Console(stderr=True), 0
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("", total=total, completed=completed)
        with doing(lambda text: bar.update(task, description=text)) as what:

            def update(description=None, **changes):
                nonlocal tenth
                if description is not None:
                    what(description)
                bar.update(task, **changes)
                done = bar.tasks[task].completed
                if 10 * done // total > tenth and not console.is_terminal:
                    tenth = 10 * done // total
                    console.print(f"{done:g} of {total}", highlight=False)

            yield update


@contextlib.contextmanager
def doing(show: Callable[[str], None]) -> Iterator[Callable[[str], None]]:
    """A context that calls show(text) with what is being done; gives what sets that.

    While kernels are compiled, or loaded, the text names one of them. Where stderr is no terminal, on which nothing can
    be shown and taken back, each text is printed there as well: a kernel once, and what comes after it.
    """
    compiling, now = {}, ""
    console, printed, of_kernel = Console(stderr=True), set(), False

    def refresh():
        nonlocal of_kernel
        names = list(compiling.values())
        text = f"compiling or loading {names[-1]}" if names else now
        show(text)
        if text and not console.is_terminal and (text not in printed or (of_kernel and not names)):
            printed.add(text)
            of_kernel = bool(names)
            console.print(text, markup=False, highlight=False, soft_wrap=True)

    def begin(kernel):
        key = object()
        compiling[key] = kernel.name
        refresh()

        def end():
            del compiling[key]
            refresh()

        return end

    def what(text):
        nonlocal now
        now = text
        refresh()

    stop = on_compile(begin)
    try:
        yield what
    finally:
        stop()


def usable_device(name: str | None) -> torch.device:
    """`environment.device`, with its ValueError as click's."""
    try:
        return environment.device(name)
    except ValueError as error:
        raise click.BadParameter(str(error), param_hint="--device") from error


def gpu(name: str | None, measured: str) -> torch.device:
    """`usable_device`, if it is a GPU; else click.ClickException. measured: what a GPU is needed for."""
    device = usable_device(name)
    if device.type == "cpu":
        why = environment.why_no_gpu()
        advice = f"{why}. `python3 -m modelnew env` says what a GPU needs" if why else "--device cpu was given"
        raise click.ClickException(f"{measured} needs a GPU: {advice}")
    return device


def head(device: torch.device) -> dict:
    """The first entries of a record. `device` is the current one."""
    versions = environment.versions()
    if device.type == "cpu":
        versions["gpu"] = None
    command = shlex.join(["python3", "-m", "modelnew", *sys.argv[1:]])
    return {"command": command, "versions": versions, "digest": source.digest()}


def save(record: dict, kind: str, device: torch.device, output: Path | None, out: Console, more: str = "") -> Path:
    """Writes <kind>_<gpu><more>.json to the folder of `output_option`. `device` is the current one."""
    path = record_path(kind, device, output, more)
    try:
        records.write(record, path)
    except OSError as error:
        raise click.ClickException(f"the record cannot be written: {error}") from error
    out.print(f"recorded: {path}", highlight=False)
    return path


def publish(record: dict, kind: str, device: torch.device, output: Path | None, out: Console, more: str = "") -> None:
    """Calls `save` and draws the record's plot. For the CPU nothing is written unless `output` is given."""
    if not output and device.type == "cpu":
        return
    path = save(record, kind, device, output, out, more)
    try:
        out.print(f"drawn: {draw(record, path)}", highlight=False)
    except click.ClickException as error:
        out.print(error.message, highlight=False, markup=False)


def record_path(kind: str, device: torch.device, output: Path | None, more: str = "") -> Path:
    """The path of a record of this kind, as `output_option` describes it. more: stands behind the GPU's name."""
    folder = output or environment.results() or Path()
    return folder / f"{kind}_{environment.slug() if device.type == 'cuda' else 'cpu'}{more}.json"


def draw(record: dict, path: Path) -> Path:
    """Draws the PNG beside the record `path`. Raises click.ClickException, with the reason, if it cannot."""
    picture = path.with_suffix(".png")
    try:
        plots.draw(record, picture)
    except ImportError as error:
        raise click.ClickException("plots need matplotlib: python3 -m pip install matplotlib") from error
    except (ValueError, OSError) as error:
        raise click.ClickException(str(error)) from error
    return picture
