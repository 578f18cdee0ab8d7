"""`python -m modelnew training`: `Model` and `ModelNew` trained side by side, and how far apart they end.

All start from the same parameters and take the same batches. The task: to put out what a `Model` with other random
parameters, the teacher, puts out; mean squared error, SGD. A training run amplifies rounding: computations that round
differently do not end alike, PyTorch's own neither. The measure is therefore PyTorch's: ModelNew must end as close to
`Model` of its numeric class as `Model` with TF32 and `Model` in float32 end to each other, within a small factor.

- What is compared: the losses of the last 20 steps, and batch norm's running mean and variance after the last.
  Distance: root mean square of the differences, relative to that of the values; the median over several seeds, as
  one seed's says little (benchmarks/NOTES.md, "Training").
- The limit: FACTOR times the distance of `Model` with TF32 from `Model` in float32, both in NCHW or both in
  channels_last, whichever is larger. cuDNN uses TF32 for the weight gradient in channels_last only, ModelNew always.
- FACTOR is 2. Two runs with TF32's errors, independent of each other, are sqrt(2) times as far from each other as each
  is from a run without. The rest is for chance.
- Shown beside it, not judged: how far `Model` in channels_last ends from `Model` in NCHW, both of the same class.

A CPU has no TF32. There the convolution's operands in `Model` are rounded to it, and ModelNew runs in the emulator:
that shows that the kernels train; how a GPU rounds only a GPU shows.
"""

import contextlib
import itertools
import math
import statistics
import sys
from collections.abc import Callable, Iterator
from typing import NamedTuple

import click
import torch
import torch.nn.functional as F
from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from torch import nn

from cupy_kernels import compiler

from . import commands
from .model import CHANNELS, HEIGHT, Model, ModelNew, get_init_inputs
from .parity import CLASSES, error, tf32, tf32_rounded
from .timing import current, free
from .workloads import LAYOUTS

FACTOR = 2
LAST = 20  # steps whose losses are compared
_BATCHES = 16  # different ones, used in turns
_STATISTICS = ("running_mean", "running_var")

out = Console(width=None if sys.stdout.isatty() else 120)


class Run(NamedTuple):
    """Who is trained, in which numeric class and memory layout."""

    who: str
    cls: str
    layout: str


class Settings(NamedTuple):
    """What all runs share."""

    steps: int
    batch: int
    channels: int
    size: int
    lr: float
    momentum: float
    seed: int

    @property
    def init(self) -> list[int]:
        """Arguments of Model and ModelNew."""
        return [self.channels, 2 * self.channels, *get_init_inputs()[2:]]


class Result(NamedTuple):
    """Losses of all steps, and batch norm's running statistics after the last, float64 on the CPU."""

    loss: torch.Tensor
    running_mean: torch.Tensor
    running_var: torch.Tensor


class Comparison(NamedTuple):
    """Distance of ModelNew from Model in a class, and those that it is measured by: medians over seeds.

    ratios: distance / classes of each seed, for its reader to see how far seeds scatter; not judged.
    """

    what: str
    cls: str
    distance: float
    layouts: float
    classes: float
    ratios: list[float]

    @property
    def ok(self) -> bool:
        return self.distance <= FACTOR * self.classes


RUNS = [Run("Model", cls, layout) for cls in reversed(CLASSES) for layout in LAYOUTS]
RUNS += [Run("ModelNew", cls, "nchw") for cls in reversed(CLASSES)]


def train(settings: Settings, device: torch.device, describe: Callable[[Run], None]) -> Iterator[tuple[Run, Result]]:
    """Trains each of RUNS. describe(run): a step of this run comes next."""
    start, teacher = (_initial(settings, settings.seed + i, device) for i in range(2))
    generator = torch.Generator().manual_seed(settings.seed)
    shape = (settings.batch, settings.channels, settings.size, settings.size)
    batches = [torch.rand(shape, generator=generator).to(device) for _ in range(min(_BATCHES, settings.steps))]
    with tf32(False), torch.no_grad():
        batches = [(x, teacher(x)) for x in batches]
    for run in RUNS:
        model = _build(run, settings, device)
        model.load_state_dict(start.state_dict())
        model.to(memory_format=LAYOUTS[run.layout])
        optimizer = torch.optim.SGD(model.parameters(), lr=settings.lr, momentum=settings.momentum)
        losses = []
        with tf32(run.cls == "tf32"):
            for step in range(settings.steps):
                describe(run)
                x, target = batches[step % len(batches)]
                loss = F.mse_loss(model(x.to(memory_format=LAYOUTS[run.layout])), target)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                losses.append(loss.detach())
        norm = model.batch_norm
        yield run, Result(*(t.double().cpu() for t in (torch.stack(losses), norm.running_mean, norm.running_var)))
        free()


def compare(results: list[dict[Run, Result]]) -> list[Comparison]:
    """How far ModelNew ends from Model, of each seed's runs. ValueError if Model's give no measure for it."""
    rows = []
    for what, cls in itertools.product(Result._fields, ("tf32", "fp32")):
        seeds = [_distances(what, cls, {run: getattr(each[run], what) for run in RUNS}) for each in results]
        ratios = [distance / classes for distance, _, classes in seeds]
        rows.append(Comparison(what, cls, *map(_median, zip(*seeds)), ratios))
    return rows


def _median(distances):
    """NaN if one of them is no number: a ModelNew that diverges is never left out."""
    return statistics.median(distances) if all(map(math.isfinite, distances)) else math.nan


def _distances(what, cls, ends):
    """Distance, layouts and classes of `Comparison` for one seed."""
    if what == "loss":
        ends = {run: losses[-LAST:] for run, losses in ends.items()}
    if not all(end.isfinite().all() for run, end in ends.items() if run.who == "Model"):
        raise ValueError("Model's own training diverged: take a smaller learning rate")
    classes = max(error(*(ends[Run("Model", c, layout)] for c in ("tf32", "fp32"))).rms for layout in LAYOUTS)
    if not classes:
        raise ValueError(
            f"{what} of Model is the same with TF32 and without, so there is no measure: for fewer than 64 images "
            "cuDNN computes in float32 either way"
        )
    theirs = ends[Run("Model", cls, "nchw")]
    others = ends[Run("ModelNew", cls, "nchw")], ends[Run("Model", cls, "nhwc")]
    return *(error(other, theirs).rms for other in others), classes


class _Rounded(torch.autograd.Function):
    """TF32 of the operand; gradients pass as they are."""

    @staticmethod
    def forward(ctx, tensor):
        return tf32_rounded(tensor)

    @staticmethod
    def backward(ctx, gradient):
        return gradient


class _RoundedConvTranspose2d(nn.ConvTranspose2d):
    def forward(self, x):
        return F.conv_transpose2d(_Rounded.apply(x), _Rounded.apply(self.weight), self.bias, self.stride, self.padding)


def _initial(settings, seed, device):
    torch.manual_seed(seed)
    return Model(*settings.init, device=device)


def _build(run, settings, device):
    if run.who == "ModelNew":
        return ModelNew(*settings.init, numerics=run.cls, device=device)
    model = Model(*settings.init, device=device)
    if run.cls == "tf32" and device.type == "cpu":
        model.conv_transpose.__class__ = _RoundedConvTranspose2d
    return model


def _record(settings, seeds, device, results, comparisons):
    rows = [
        {
            **dict(zip(("who", "class", "layout"), run)),
            "loss_last": float(f"{result.loss[-LAST:].mean():.6g}"),
            "losses": [float(f"{loss:.9g}") for loss in result.loss],
        }
        for run, result in results.items()
    ]
    found = [
        {
            "what": c.what,
            "class": c.cls,
            **{name: float(f"{getattr(c, name):.4g}") for name in ("distance", "layouts", "classes")},
            "ratios": [float(f"{ratio:.3g}") for ratio in c.ratios],
            "ok": c.ok,
        }
        for c in comparisons
    ]
    rule = {"factor": FACTOR, "last": LAST, "comparisons": found}
    return {**commands.head(device), **settings._asdict(), "seeds": seeds, **rule, "rows": rows}


def _show(settings, seeds, results, comparisons):
    last = min(LAST, settings.steps)
    title = f"Loss over {settings.steps} steps of SGD[/], batches of {settings.batch}, seed {settings.seed}"
    out.print(f"\n[bold]{title}", highlight=False)
    table = Table("", "class", "layout", box=box.SIMPLE_HEAD)
    for name in ("first step", "last step", f"mean of the last {last}"):
        table.add_column(name, justify="right")
    for run, result in results.items():
        losses = (result.loss[0], result.loss[-1], result.loss[-last:].mean())
        table.add_row(*run, *(f"{loss:.6f}" for loss in losses))
    out.print(table)
    medians = f", medians over {seeds} seeds" if seeds > 1 else ""
    out.print(f"[bold]How far runs end from each other[/]{medians}", highlight=False)
    table = Table("", "class", box=box.SIMPLE_HEAD)
    for name in ("ModelNew to Model", "Model nhwc to nchw", "Model tf32 to fp32", "ratio", "of each seed", ""):
        table.add_column(name, justify="right")
    for c in comparisons:
        distances = (f"{d:.2e}" for d in (c.distance, c.layouts, c.classes))
        verdict = "[green]ok[/]" if c.ok else "[red]FAIL[/]"
        ratios = f"{min(c.ratios):.2f} to {max(c.ratios):.2f}"
        table.add_row(c.what, c.cls, *distances, f"{c.distance / c.classes:.2f}", ratios, verdict)
    out.print(table)
    out.print(
        f"loss: of the last {last} steps. ratio: of the first to the third. ok: ModelNew ends at most {FACTOR} times "
        "as far from Model in its class as Model with TF32 from Model in float32.",
        highlight=False,
    )


@contextlib.contextmanager
def _progress(steps):
    """A function that takes the Run of the next step, for a bar that also tells which kernel is being compiled."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("", total=steps, completed=-1)
        stop = compiler.on_compile(lambda kernel: progress.update(task, description=f"compiling {kernel.name}"))
        try:
            yield lambda run: progress.update(task, advance=1, description=" ".join(run))
        finally:
            stop()


@click.command(
    "training",
    short_help="Train beside PyTorch's Model, and compare.",
    context_settings={"help_option_names": ["-h", "--help"]},
)
@click.option("--steps", type=click.IntRange(min=1), help="Steps of each run.  [default: 300; 10 on the CPU]")
@click.option(
    "--batch",
    type=click.IntRange(min=1),
    help="Images in a step. For fewer than 64, cuDNN uses no TF32.  [default: 128; 4 on the CPU]",
)
@click.option(
    "--channels",
    type=click.IntRange(min=4),
    help="Channels of the images, a multiple of 4; the model puts out twice as many. Tensor cores take multiples of "
    f"16.  [default: {CHANNELS}; 16 on the CPU]",
)
@click.option(
    "--size", type=click.IntRange(min=1), help=f"Height and width of an image.  [default: {HEIGHT}; 6 on the CPU]"
)
@click.option(
    "--lr",
    type=click.FloatRange(min=0, min_open=True),
    default=0.3,
    show_default=True,
    help="Learning rate.",
)
@click.option("--momentum", type=click.FloatRange(0, 1, max_open=True), default=0.9, show_default=True, help="Of SGD.")
@click.option("--seed", default=0, show_default=True, help="Seed of batches and parameters; the teacher's is one more.")
@click.option(
    "--seeds",
    type=click.IntRange(min=1),
    help="How many times to train all of them, each time from seeds that are 2 larger.  [default: 5; 1 on the CPU]",
)
@commands.device_option
@commands.output_option("training")
def training_command(device, output, steps, batch, channels, size, lr, momentum, seed, seeds):
    """Train Model and ModelNew side by side, and compare where they end.

    Both learn what another Model puts out, from the same parameters and batches, with TF32 and in float32. ModelNew
    must end as close to Model as Model with TF32 ends to Model in float32: losses of the last 20 steps, running mean
    and variance; at most twice as far, to leave room for chance. Distances are medians over several seeds, losses
    those of the first one. On the CPU, which has no TF32, Model's operands are
    rounded to it, and ModelNew runs in the emulator. Prints tables, writes a record (JSON) and, with matplotlib
    installed (the extra "bench"), loss curves (PNG). Exit code 1 if ModelNew ends too far away.
    """
    if channels and channels % 4:
        raise click.BadParameter(f"must be a multiple of 4, received {channels}", param_hint="--channels")
    device = commands.usable_device(device)
    cpu = device.type == "cpu"
    shape = (channels or (16 if cpu else CHANNELS), size or (6 if cpu else HEIGHT))
    settings = Settings(steps or (10 if cpu else 300), batch or (4 if cpu else 128), *shape, lr, momentum, seed)
    seeds = seeds or (1 if cpu else 5)
    with current(device), _progress(seeds * len(RUNS) * settings.steps) as describe:
        results = [dict(train(settings._replace(seed=seed + 2 * i), device, describe)) for i in range(seeds)]
    try:
        comparisons = compare(results)
    except ValueError as error:
        raise click.ClickException(str(error)) from error
    _show(settings, seeds, results[0], comparisons)
    if cpu:
        out.print("On the CPU: TF32 by rounding Model's operands; ModelNew in the emulator.")
    with current(device):
        commands.publish(_record(settings, seeds, device, results[0], comparisons), "training", device, output, out)
    if not all(c.ok for c in comparisons):
        raise click.exceptions.Exit(1)
