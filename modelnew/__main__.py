"""The command line: the parity check of ModelNew against Model, `env`, and the commands of other modules."""

import contextlib
import json
import shutil
import textwrap
import time

import click
import torch
from rich.console import Console

from cupy_kernels import emulator
from cupy_kernels.backend import on_compile

from . import Model, ModelNew, __version__, commands, environment, get_init_inputs, get_inputs
from . import __all__ as in_python
from .bench import bench_command
from .fuzz import fuzz_command
from .host import host_command
from .model import BATCH, OPERATORS
from .numerics import NUMERICS
from .parity import RATIO, compare_models, is_close, tf32
from .scaling import scaling_command
from .timing import measure
from .training import training_command

EMULATED_BATCH = 2
BIT_EXACT = ("tanh", "max_pool")
_ENV_WIDTH = 100  # columns, if the terminal has as many
_WIDE = 80  # columns in which the table of errors has room for maxima
_CLASSES = {
    "tf32": "the convolution's operands have 10 mantissa bits",
    "fp32": "every operator has float32's precision",
}
_MEANINGS = {  # of lines that `env` prints
    "versions.torch_cuda": "the CUDA that torch was built for",
    "versions.nvrtc": "NVIDIA's compiler of kernels for a GPU",
    "versions.nvrtc_wgmma": "the one for kernels with wgmma instructions, which H100 and H200 have",
    "emulator": "its C++ compiler; a GPU needs none",
    "kernels": "the first 12 characters of a hash of their text",
}

out = commands.console()
progress = Console(stderr=True)


@commands.command("parity", short_help="The default: compare ModelNew with Model.")
@click.option(
    "--batch",
    type=click.IntRange(min=1),
    help=f"Images in the batch, 64x32x32 each.  [default: {BATCH}; {EMULATED_BATCH} on the CPU]",
)
@commands.seed_option("parameters, batch and incoming gradient")
@click.option(
    "--replace",
    default="all",
    show_default=True,
    callback=lambda *given: given[-1] if given[-1] == "all" else commands.listed(OPERATORS)(*given),
    help=f"What ModelNew replaces in the comparison: all, or names separated by commas, of {', '.join(OPERATORS)}.",
)
@click.option(
    "--numerics",
    type=click.Choice(NUMERICS),
    default="auto",
    show_default=True,
    help="Class of the convolution: tf32 (operands with 10 mantissa bits, PyTorch's default on a GPU), fp32, or auto, "
    "which checks both on a GPU and fp32 on a CPU. For tf32 on a CPU, PyTorch is given rounded operands.",
)
@commands.device_option()
@click.option("--times/--no-times", default=True, show_default=True, help="Time both models (on a GPU only).")
@commands.trials_option(20)
@click.version_option(__version__, prog_name="modelnew")
@click.pass_context
def parity_command(context, batch, seed, replace, numerics, device, times, trials):
    """Compare ModelNew, on our kernels, with Model, on PyTorch's.

    First, with tanh and max_pool replaced: are the outputs equal? Then, with all operators replaced: errors of the
    output and of every gradient against a float64 run, beside PyTorch's own errors. On a GPU, also times. The exit code
    is 0 only if parity holds.
    """
    device = _device(device)
    batch = batch or (BATCH if device.type == "cuda" else EMULATED_BATCH)
    with _progress() as what:
        what("running both models")
        holds = _literal(batch, seed, device)
        torch.manual_seed(seed)
        model = Model(*get_init_inputs(), device=device)
        model_new = ModelNew(*get_init_inputs(), replace=replace, numerics=numerics, device=device)
        inputs = get_inputs(batch, seed=seed, device=device)
        both = ("fp32",) if device.type == "cpu" else ("tf32", "fp32")
        for cls in both if numerics == "auto" else (numerics,):
            what(f"running both models and a float64 run, class {cls}")
            holds = _errors(model, model_new, *inputs, cls, seed) and holds
            if times and device.type == "cuda":
                what(f"timing both models, class {cls}")
                _times(model, model_new, *inputs, cls, trials)
    out.print("\n[bold green]Parity holds." if holds else "\n[bold red]Parity does not hold: see the rows marked FAIL.")
    context.exit(0 if holds else 1)


class _ParityByDefault(click.Group):
    """A group of commands in which `parity` is the default."""

    def parse_args(self, context, args):
        if not args or (args[0].startswith("-") and args[0] not in context.help_option_names):
            args = [parity_command.name, *args]
        return super().parse_args(context, args)

    def resolve_command(self, context, args):
        try:
            return super().resolve_command(context, args)
        except click.UsageError as error:
            if args[0] in in_python:
                error.message += f" It is for Python: see help(modelnew.{args[0]})."
            error.message += f" Commands: {', '.join(self.list_commands(context))}."
            raise

    def format_options(self, context, formatter):
        parity_command.format_options(context, formatter)
        self.format_commands(context, formatter)


main = _ParityByDefault(
    "modelnew",
    [parity_command, bench_command, fuzz_command, host_command, scaling_command, training_command],
    help=parity_command.help,
    subcommand_metavar="[COMMAND] [ARGS]...",
    context_settings=commands.SETTINGS,
)


@main.command("env", short_help="Print versions, which backend runs, and what to install.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def env(as_json):
    """Print versions, GPUs, which backend is used and why, and what to install on this machine.

    In the root of a clone, also print which of the committed records belong to its kernels.
    """
    found = environment.describe()
    if as_json:
        click.echo(json.dumps(found, indent=2))
        return
    records, install, digest = map(found.pop, ("records", "install", "digest"))
    lines = {**dict(_flat(found)), "kernels": digest[:12]}
    column = max(map(len, lines)) + 2
    for key, value in lines.items():
        meaning = f"  ({_MEANINGS[key]})" if key in _MEANINGS else ""
        _echo(f"{key:{column}}{value}{meaning}", indent=column)
    extra = f" (the extra [{install['extra']}])" if install["extra"] else ""
    best = install["command"] or "nothing to install"
    click.echo(f"\nBest for this machine{extra}: {best}")  # unbroken, to be copied
    _echo(f"Why: {install['why']}")
    for what, matches in (("these", True), ("other", False)):
        files = [record["file"] for record in records if record["matches"] == matches]
        if files:
            click.echo()
            _echo(f"Records in benchmarks/results, of {what} kernels: {', '.join(files)}")


def _echo(text, indent=0):
    """Prints the text in lines that fit, all but the first indented."""
    width = shutil.get_terminal_size((_ENV_WIDTH, 0)).columns
    fitting = {"break_long_words": False, "break_on_hyphens": False, "subsequent_indent": " " * indent}
    click.echo(textwrap.fill(text, min(width, _ENV_WIDTH), **fitting))


def _literal(batch, seed, device) -> bool:
    torch.manual_seed(seed)
    model = Model(*get_init_inputs(), device=device)
    model_new = ModelNew(*get_init_inputs(), replace=BIT_EXACT, device=device)
    model_new.load_state_dict(model.state_dict())
    y = model(*get_inputs(batch, seed=seed, device=device))
    y_new = model_new(*get_inputs(batch, seed=seed, device=device))
    cuda = device.type == "cuda"
    found = {"torch.testing.assert_close(y_new, y)": is_close(y_new, y)}
    if cuda:
        found |= {"torch.allclose(y, y_new)": torch.allclose(y, y_new), "torch.equal(y, y_new)": torch.equal(y, y_new)}
    out.print(f"\n[bold]Output of ModelNew with {' and '.join(BIT_EXACT)} replaced")
    for assertion, holds in found.items():
        out.print(f"{assertion} {'[green]holds[/]' if holds else '[red]FAILs[/]'}", highlight=False)
    if not cuda:
        out.print(
            "Not judged on a CPU: torch.allclose(y, y_new) and torch.equal(y, y_new), which hold on a GPU. PyTorch's "
            "tanh on a CPU and the C library's, which the emulator calls, differ in the last bit.",
            highlight=False,
        )
    return all(found.values())


def _errors(model, model_new, x, cls, seed) -> bool:
    rows = compare_models(model, model_new, x, cls, seed)
    if cls == "tf32" and x.device.type == "cpu":
        out.print("PyTorch has no TF32 on a CPU: what it is compared with is PyTorch's, of operands rounded to TF32.")
    out.print(f"\n[bold]Errors against a float64 run, class {cls}[/]: {_CLASSES[cls]}", highlight=False)
    out.print(f"Replaced {', '.join(model_new.replace)}.", highlight=False)
    wide = out.width >= _WIDE
    largest = ("ours\nmax", "PyTorch\nmax") if wide else ()
    table = commands.table(("result",), ("ours\nrms", "PyTorch\nrms", "ratio", *largest, ""))
    for row in rows:
        cells = [f"{row.ours.rms:.1e}", f"{row.torch.rms:.1e}", f"{row.ratio:.2f}"]
        cells += [f"{row.ours.max:.1e}", f"{row.torch.max:.1e}"] if wide else []
        worse = any(ours > RATIO * theirs for ours, theirs in zip(row.ours, row.torch))
        table.add_row(row.what, *cells, f"[green]ok{'*' * worse}[/]" if row.ok else "[red]FAIL[/]")
    out.print(table)
    close = {
        text: ", ".join(row.what for row in rows if row.close is passes)
        for text, passes in (("passes", True), ("fails", False))
    }
    for text, names in close.items():
        if names:
            out.print(f"torch.testing.assert_close {text} for {names}.", highlight=False)
    out.print(
        ("It does not judge gradients: small values of long sums differ more. " if any(close.values()) else "")
        + "Errors are relative to the result's rms. The gradient of conv_transpose.bias is 0 but for rounding: its "
        "errors are relative to the rms of conv_transpose.weight's. "
        f"ok: at most {RATIO} times PyTorch's error, in rms and maximum. ok*: more, as chance and rounding explain. "
        + ("" if wide else f"A terminal of {_WIDE} columns shows the maxima. ")
        + "Pooling windows with two almost equal maxima get gradient 0, because rounding picks the winner.",
        highlight=False,
    )
    return all(row.ok for row in rows)


def _times(model, model_new, x, cls, trials):
    out.print(f"\n[bold]Milliseconds, median (min to max) of {trials} trials: class {cls}")
    table = commands.table(("",), ("PyTorch eager", "ModelNew", "speed-up"))
    x = x.detach().requires_grad_()
    with torch.no_grad():
        dy = torch.ones_like(model(x))

    def forward(m):
        with torch.no_grad():
            m(x)

    def step(m):
        torch.autograd.grad(m(x), [x, *m.parameters()], dy)

    with tf32(cls == "tf32"):
        for name, function in (("forward", forward), ("forward + backward", step)):
            theirs, ours = (measure(lambda f=function, m=m: f(m), x.device, trials) for m in (model, model_new))
            cells = (f"{t.median:.2f} ({t.min:.2f} to {t.max:.2f})" for t in (theirs, ours))
            table.add_row(name, *cells, f"{theirs.median / ours.median:.2f}x")
    out.print(table)


def _device(name) -> torch.device:
    """The device asked for, or the default one. Prints what will run. BackendError if kernels cannot run there."""
    device = commands.usable_device(name)
    if device.type == "cuda":
        out.print(f"GPU: {torch.cuda.get_device_name(device)}", highlight=False)
        return device
    command = " ".join(emulator.compiler())
    out.print(
        f"[bold]The kernels run on the CPU, in an emulator[/], on a small batch (C++ compiler: {command}). "
        "This shows that their logic is right. It says nothing about speed.",
        highlight=False,
    )
    if why := environment.why_no_gpu():
        out.print(f"Why not on a GPU: {why}.", highlight=False)
    return device


@contextlib.contextmanager
def _progress():
    """A context that shows what is being done, and at the end how long all took; gives what sets that."""
    count, start = 0, time.perf_counter()

    def counted(_):
        nonlocal count
        count += 1

    stop = on_compile(counted)
    try:
        with progress.status("running") as status, commands.doing(status.update) as what:
            yield what
    finally:
        stop()
    took = f"{time.perf_counter() - start:.0f} s. Kernels were compiled or loaded {count} times."
    progress.print(took, highlight=False)


def _flat(value, prefix=""):
    """("a.b", text) for each value inside nested dicts and lists."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else None
    if items is None:
        yield prefix, "none" if value is None else str(value)
        return
    for key, inner in items:
        yield from _flat(inner, f"{prefix}.{key}" if prefix else str(key))


if __name__ == "__main__":
    main()
