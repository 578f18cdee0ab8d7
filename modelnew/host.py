"""`python -m modelnew host`: the host's time per call in microseconds, beside PyTorch's.

The tensors are so small that the GPU finishes before the host does. A loop makes calls without synchronisation between
them; the median of several loops is reported. "same": every call gets the same tensors. "new": inputs and results have
new addresses at every call, as in a network with varying memory use.
"""

import collections
import itertools
import statistics
import time
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from rich.console import Console
from torch import nn

from cupy_kernels import compiler

from . import commands, layers
from .model import Model, ModelNew, get_init_inputs
from .timing import current

TRIALS = 15
_TRIAL_SECONDS = 0.02
_FEWEST_CALLS = 5
_SHAPE = (2, 8, 8, 8)
_CHANNELS = _SHAPE[1]

progress = Console(stderr=True)
out = commands.console()


class _Block(nn.Module):
    """ResNet's basic block."""

    def __init__(self, norm, channels_in, channels, stride):
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(channels_in, channels, 3, stride, 1, bias=False),
            norm(channels),
            nn.ReLU(),
            nn.Conv2d(channels, channels, 3, 1, 1, bias=False),
            norm(channels),
        )
        self.shortcut = nn.Identity()
        if stride != 1 or channels_in != channels:
            self.shortcut = nn.Sequential(nn.Conv2d(channels_in, channels, 1, stride, bias=False), norm(channels))

    def forward(self, x):
        return F.relu(self.body(x) + self.shortcut(x))


def resnet18(kind) -> nn.Module:
    """ResNet18 whose BatchNorm2d and MaxPool2d are those of `kind`, modelnew.layers or torch.nn."""
    norm, widths = kind.BatchNorm2d, (64, 128, 256, 512)
    stem = [nn.Conv2d(3, 64, 7, 2, 3, bias=False), norm(64), nn.ReLU(), kind.MaxPool2d(3, 2, 1)]
    blocks = [
        _Block(norm, before if first else width, width, 2 if first and width > 64 else 1)
        for before, width in zip((64, *widths), widths)
        for first in (True, False)
    ]
    return nn.Sequential(*stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(512, 10))


def _operators() -> Iterator[tuple[str, Callable, tuple]]:
    """(name, function of a kind, modelnew.layers or torch.nn, that makes the module, shape of its input)"""
    yield "BatchNorm2d", lambda kind: kind.BatchNorm2d(_CHANNELS), _SHAPE
    yield "Tanh", lambda kind: kind.Tanh(), _SHAPE
    yield "MaxPool2d", lambda kind: kind.MaxPool2d(2), _SHAPE
    yield "GroupNorm", lambda kind: kind.GroupNorm(2, _CHANNELS), _SHAPE
    yield "ConvTranspose2d", lambda kind: kind.ConvTranspose2d(_CHANNELS, _CHANNELS, 3, padding=1), _SHAPE
    models = {layers: ModelNew, nn: Model}
    yield "ModelNew N=1", lambda kind: models[kind](*get_init_inputs()), (1, 64, 32, 32)
    yield "ResNet18 N=2", resnet18, (2, 3, 64, 64)


def measure(device: torch.device, trials: int) -> Iterator[dict]:
    """The rows of the record: microseconds per call, ours and PyTorch's in turns."""
    for name, make, shape in _operators():
        modules = [make(kind).to(device) for kind in (layers, nn)]
        for what, addresses in itertools.product(("forward", "step"), ("same", "new")):
            loops = [_loop(module, what, addresses, shape, device) for module in modules]
            for loop in loops * 3:  # the first calls compile
                loop(_FEWEST_CALLS)
            slowest = max(loop(_FEWEST_CALLS) for loop in loops)
            calls = max(_FEWEST_CALLS, round(_TRIAL_SECONDS / slowest * 1e6))
            times = [[loop(calls) for loop in loops] for _ in range(trials)]
            ours, eager = (statistics.median(column) for column in zip(*times))
            least, least_eager = map(min, zip(*times))
            yield {
                "operator": name,
                "what": what,
                "addresses": addresses,
                "us": round(ours, 2),
                "eager_us": round(eager, 2),
                "us_min": round(least, 2),
                "eager_us_min": round(least_eager, 2),
            }


def first_launch(device: torch.device, trials: int) -> dict:
    """The record's row for the time from ModelNew's call on one image until its first kernel is launched."""
    name, make, shape = next(found for found in _operators() if found[0].startswith("ModelNew"))
    module, x, started = make(layers).to(device), torch.randn(shape, device=device), []
    start, found = compiler.backend.start, []

    def noting(launches, stream):
        start(launches[:1], stream)
        started.append(time.perf_counter())
        start(launches[1:], stream)

    with torch.no_grad():
        for _ in range(_FEWEST_CALLS):  # the first calls compile
            module(x)
        compiler.backend.start = noting
        try:
            for _ in range(20 * trials):
                torch.cuda.synchronize(device)
                started.clear()
                begun = time.perf_counter()
                module(x)
                found.append(1e6 * (started[0] - begun))
        finally:
            del compiler.backend.start  # which hides the method
    us, least = round(statistics.median(found), 2), round(min(found), 2)
    return {"operator": name, "what": "to the first launch", "addresses": "same", "us": us, "us_min": least}


def _loop(module, what, addresses, shape, device) -> Callable[[int], float]:
    """A function that times this number of calls, in microseconds each."""
    step = what == "step"
    inputs = [torch.randn(shape, device=device, requires_grad=step) for _ in range(16 if addresses == "new" else 1)]
    with torch.no_grad():
        gradient = torch.randn_like(module(inputs[0]))
    parameters = list(module.parameters())

    def loop(calls):
        # Results that stay alive push those of the next calls to other addresses.
        kept = collections.deque(maxlen=32 if addresses == "new" else 0)
        for x in inputs:
            x.grad = None
        for parameter in parameters:
            parameter.grad = None
        torch.cuda.synchronize(device)
        start = time.perf_counter()
        with torch.set_grad_enabled(step):
            for i in range(calls):
                x = inputs[i % len(inputs)]
                y = module(x)
                if step:
                    found = torch.autograd.grad(y, [x, *parameters], gradient)
                kept.append((y, found) if step else y)
        us = (time.perf_counter() - start) / calls * 1e6
        torch.cuda.synchronize(device)
        return us

    return loop


def show(record: dict) -> None:
    """Prints the rows, and their ratios to PyTorch's."""
    table = commands.table(("", "", "addresses"), ("ours", "PyTorch", "ratio"))
    for row in record["rows"]:
        times = [f"{row['us']:.1f}"]
        if "eager_us" in row:
            times += [f"{row['eager_us']:.1f}", f"{row['us'] / row['eager_us']:.2f}x"]
        table.add_row(row["operator"], row["what"], row["addresses"], *times)
    out.print("\n[bold]Microseconds of the host a call[/], median", highlight=False)
    out.print(table)


@commands.command("host", short_help="Time the host's part of a call beside PyTorch's.")
@commands.trials_option(TRIALS)
@commands.device_option("(a GPU is needed)")
@commands.output_option("host")
def host_command(device, output, trials):
    """Time the host's part of a call on tiny tensors: each layer, ModelNew on one image, and a ResNet18.

    Measures the forward under no_grad, and a step (forward and all gradients). Each runs with the same tensors again
    and again, and with tensors at new addresses at each call. Prints a table and writes a record (JSON). Needs a GPU.
    """
    device = commands.gpu(device, "timing the host's part of a launch")
    with current(device):
        rows = []
        for row in measure(device, trials):
            rows.append(row)
            progress.print("{operator}, {what}, {addresses} addresses".format(**row), highlight=False)
        rows.append(first_launch(device, trials))
        record = {**commands.head(device), "trials": trials, "rows": rows}
        show(record)
        commands.save(record, "host", device, output, out)
