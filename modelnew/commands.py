"""Shared code of the commands that measure: the device, and the records that they write."""

import shlex
import sys
from pathlib import Path

import click
import torch
from rich.console import Console

from cupy_kernels import source
from cupy_kernels.errors import BackendError

from . import environment, plots, records

device_option = click.option(
    "--device", help="cuda, cuda:1, ... or cpu, which means the emulator.  [default: the GPU, if one is usable]"
)


def output_option(kind: str, drawn: bool = False):
    """The option --output of a command that writes records of this kind. drawn: it also writes plots."""
    return click.option(
        "--output",
        type=click.Path(file_okay=False, path_type=Path),
        help=f"Folder for {kind}_<gpu>.json{' and .png' if drawn else ''}.  [default: benchmarks/results in the "
        "repository's root, the current directory elsewhere; on the CPU nothing is written]",
    )


def usable_device(name: str | None) -> torch.device:
    """`environment.device`, with its errors as click's."""
    try:
        return environment.device(name)
    except ValueError as error:
        raise click.BadParameter(str(error), param_hint="--device") from error
    except BackendError as error:
        raise click.ClickException(str(error)) from error


def head(device: torch.device) -> dict:
    """The first entries of a record. `device` is the current one."""
    versions = environment.versions()
    if device.type == "cpu":
        versions["gpu"] = None
    command = shlex.join(["python3", "-m", "modelnew", *sys.argv[1:]])
    return {"command": command, "versions": versions, "digest": source.digest()}


def publish(record: dict, kind: str, device: torch.device, output: Path | None, out: Console) -> None:
    """Writes <kind>_<gpu>.json and its plot to the folder of `output_option`. `device` is the current one."""
    if not output and device.type == "cpu":
        return
    path = record_path(kind, device, output)
    records.write(record, path)
    out.print(f"recorded: {path}", highlight=False)
    try:
        out.print(f"drawn: {draw(record, path)}", highlight=False)
    except click.ClickException as error:
        out.print(error.message, highlight=False, markup=False)


def record_path(kind: str, device: torch.device, output: Path | None) -> Path:
    """The path of a record of this kind, as `output_option` describes it."""
    folder = output or environment.results() or Path()
    return folder / f"{kind}_{environment.slug() if device.type == 'cuda' else 'cpu'}.json"


def draw(record: dict, path: Path) -> Path:
    """Draws the PNG beside the record `path`. Raises click.ClickException, with the reason, if it cannot."""
    picture = path.with_suffix(".png")
    try:
        plots.draw(record, picture)
    except ImportError as error:
        raise click.ClickException("plots need matplotlib: pip install 'modelnew[bench]'") from error
    except ValueError as error:
        raise click.ClickException(str(error)) from error
    return picture
