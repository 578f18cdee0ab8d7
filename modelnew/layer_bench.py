"""`python -m modelnew bench --layers`: every layer of ours beside PyTorch's, at shapes of well-known networks.

Ours and PyTorch's are timed in turns, trial by trial. Before each call the L2 cache is overwritten several times, so
that the host is ahead and the GPU's time is measured. A time counts only if the results were right: output and
gradients by `parity.within_policy` against a float64 run; a pooling's output must equal PyTorch's bit for bit.
"""

import collections
import copy
import functools
import gc
import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from rich import box
from rich.console import Console
from rich.table import Table
from torch import nn

from . import layers
from .explanation import planned_kernels
from .formats import CHANNELS_LAST, dense_in
from .interop import compile_together
from .parity import error, round_operands, tf32, within_policy
from .timing import Clock, Contender, current, free, measure_together
from .workloads import DTYPES

LONG_US = 30  # PyTorch's time from which on a ratio counts as the worst
LEAST_MB = 1  # below, the allocator's rounding decides
_SHOWN = 30  # rows of the table
_EVALUATION = ", eval"  # ends the name of a batch norm's shape


class Entry(NamedTuple):
    """A layer at a shape. make(kind): the module, from `modelnew.layers` or torch.nn. training: of a batch norm."""

    operator: str
    name: str
    make: Callable
    shape: tuple[int, ...]
    training: bool = True
    huge: bool = False  # more than 2^31 elements: one 16-bit dtype, NCHW

    def settings(self, classes) -> Iterator[tuple[str, str]]:
        """(class, layout) of everything that is measured."""
        if self.huge:
            yield from [("fp16", "nchw")] if "fp16" in classes else []
            return
        for cls in classes:
            if cls != "tf32" or self.operator == "ConvTranspose2d":
                yield cls, "nchw"
                if len(self.shape) in CHANNELS_LAST:
                    yield cls, "nhwc"


def _conv(name, shape, out, kernel, stride=1, padding=0, **options):
    def make(kind):
        return kind.ConvTranspose2d(shape[1], out, kernel, stride, padding, **options)

    return Entry("ConvTranspose2d", name, make, shape)


def _batch_norms(name, *shape):
    layer = {2: "BatchNorm1d", 3: "BatchNorm1d", 4: "BatchNorm2d", 5: "BatchNorm3d"}[len(shape)]
    for training in (True, False):
        what = name if training else name + _EVALUATION
        yield Entry("BatchNorm", what, lambda kind: getattr(kind, layer)(shape[1]), shape, training)


def _group(name, groups, *shape):
    return Entry("GroupNorm", name, lambda kind: kind.GroupNorm(groups, shape[1]), shape)


def _pool(name, shape, kernel, stride=None, padding=0, huge=False):
    return Entry("MaxPool2d", name, lambda kind: kind.MaxPool2d(kernel, stride, padding), shape, huge=huge)


def _activations(name, *shape):
    yield Entry("Tanh", name, lambda kind: kind.Tanh(), shape)
    yield Entry("LeakyReLU", name, lambda kind: kind.LeakyReLU(0.2), shape)


ENTRIES = (
    _conv("pix2pix 512-256, 4x4", (64, 512, 4, 4), 256, 4, 2, 1),
    _conv("pix2pix 512-256, 16x16", (32, 512, 16, 16), 256, 4, 2, 1),
    _conv("pix2pix 256-128, 32x32", (16, 256, 32, 32), 128, 4, 2, 1),
    _conv("pix2pix 128-3, 128x128", (16, 128, 128, 128), 3, 4, 2, 1),
    _conv("U-Net 1024-512", (8, 1024, 28, 28), 512, 2, 2),
    _conv("U-Net 512-256", (8, 512, 56, 56), 256, 2, 2),
    _conv("U-Net 128-64", (4, 128, 224, 224), 64, 2, 2),
    _conv("DCGAN 100-512, 1x1", (128, 100, 1, 1), 512, 4),
    _conv("DCGAN 1024-512, 4x4", (128, 1024, 4, 4), 512, 4, 2, 1),
    _conv("DCGAN 128-64, 16x16", (128, 128, 16, 16), 64, 4, 2, 1),
    _conv("DCGAN 64-3, 32x32", (128, 64, 32, 32), 3, 4, 2, 1),
    _conv("VAE 128-64", (64, 128, 32, 32), 64, 3, 2, 1, output_padding=1),
    _conv("VAE 64-3, stride 1", (64, 64, 64, 64), 3, 3, 1, 1),
    _conv("FSRCNN 56-1, 9x9", (4, 56, 128, 128), 1, 9, 4, 4, output_padding=3),
    _conv("segmentation 21-21, 4x4", (8, 21, 40, 40), 21, 4, 2, 1),
    _conv("segmentation 21-21, 16x16", (8, 21, 40, 40), 21, 16, 8, 4),
    _conv("FCN-32s 21-21, 64x64", (4, 21, 16, 16), 21, 64, 32, 16),
    _conv("decoder 256-256, 5x5", (64, 256, 32, 32), 256, 5, 1, 2),
    _conv("one image 512-256", (1, 512, 32, 32), 256, 4, 2, 1),
    _conv("dilated 64-64", (16, 64, 64, 64), 64, 3, 1, 2, dilation=2),
    _conv("8 groups 256-256", (32, 256, 32, 32), 256, 4, 2, 1, groups=8),
    _conv("depthwise 256", (16, 256, 32, 32), 256, 4, 2, 1, groups=256),
    _conv("reference shape 64-128", (512, 64, 32, 32), 128, 5, 1, 1),
    *_batch_norms("ResNet 64, 112x112", 64, 64, 112, 112),
    *_batch_norms("ResNet 256, 56x56", 64, 256, 56, 56),
    *_batch_norms("ResNet 512, 28x28", 64, 512, 28, 28),
    *_batch_norms("ResNet 1024, 14x14", 64, 1024, 14, 14),
    *_batch_norms("ResNet 2048, 7x7", 64, 2048, 7, 7),
    *_batch_norms("MobileNet 96, 56x56", 64, 96, 56, 56),
    *_batch_norms("MobileNet 960, 7x7", 128, 960, 7, 7),
    *_batch_norms("EfficientNet 672, 14x14", 32, 672, 14, 14),
    *_batch_norms("RegNet 784, 14x14", 32, 784, 14, 14),
    *_batch_norms("DenseNet 128, 28x28", 64, 128, 28, 28),
    *_batch_norms("pix2pix 64, 256x256", 4, 64, 256, 256),
    *_batch_norms("two images 64, 56x56", 2, 64, 56, 56),
    *_batch_norms("[8192, 1024]", 8192, 1024),
    *_batch_norms("[64, 512, 1000]", 64, 512, 1000),
    *_batch_norms("reference shape 128, 34x34", 512, 128, 34, 34),
    *_batch_norms("video 64, 16x56x56", 2, 64, 16, 56, 56),
    _group("text-to-image 320, 64x64", 32, 16, 320, 64, 64),
    _group("text-to-image 640, 32x32", 32, 16, 640, 32, 32),
    _group("text-to-image 1280, 16x16", 32, 16, 1280, 16, 16),
    _group("VAE decoder 128, 256x256", 32, 2, 128, 256, 256),
    _group("one group 64, 56x56", 1, 64, 64, 56, 56),
    _group("group a channel 64, 28x28", 64, 64, 64, 28, 28),
    _group("detection 256, 56x56", 32, 64, 256, 56, 56),
    _group("volume 64, 8x32x32", 8, 2, 64, 8, 32, 32),
    _group("[64, 512, 1000]", 32, 64, 512, 1000),
    _group("reference shape 128, 17x17", 8, 512, 128, 17, 17),
    _pool("ResNet stem", (64, 64, 112, 112), 3, 2, 1),
    _pool("VGG 64, 224x224", (16, 64, 224, 224), 2),
    _pool("VGG 512, 14x14", (32, 512, 14, 14), 2),
    _pool("AlexNet 192", (64, 192, 27, 27), 3, 2),
    _pool("Inception 192, stride 1", (64, 192, 35, 35), 3, 1, 1),
    _pool("U-Net 128, 256x256", (4, 128, 256, 256), 2),
    _pool("SPP 5x5", (16, 512, 20, 20), 5, 1, 2),
    _pool("SPP 9x9", (16, 512, 20, 20), 9, 1, 4),
    _pool("SPP 13x13", (16, 512, 20, 20), 13, 1, 6),
    _pool("reference shape 128, 34x34", (512, 128, 34, 34), 2),
    _pool("more than 2^31 elements", (80, 64, 648, 656), 2, huge=True),
    *_activations("DCGAN 64, 112x112", 64, 64, 112, 112),
    *_activations("decoder 3, 256x256", 16, 3, 256, 256),
    *_activations("[8192, 1024]", 8192, 1024),
    *_activations("reference shape 128, 34x34", 512, 128, 34, 34),
)


def measure(
    classes, peers: tuple[str, ...], trials: int, device, refused: Callable, describe: Callable[[str], None]
) -> Iterator[list[dict]]:
    """Rows of each entry. refused(contender): why it may not begin, or None. describe(text): what is being done."""
    describe("compiling")
    with current(device):
        compile_together(_kernels(classes, device), device)
    free()
    gc.freeze()  # each row collects garbage, which took half of the time with all modules and plans in it
    for entry in ENTRIES:
        rows = []
        for cls, layout in entry.settings(classes):
            with current(device), tf32(cls == "tf32"):
                clock = Clock(device)
                rows += _Setting(entry, cls, layout, device).rows(clock, peers, trials, refused, describe)
            free()
        yield rows


def _kernels(classes, device) -> set:
    """All kernels that the entries launch, to compile them together. One by one takes longer than all measurements."""
    found = set()
    for entry in ENTRIES:
        for cls, layout in entry.settings(classes):
            if not entry.huge:
                with tf32(cls == "tf32"):
                    setting = _Setting(entry, cls, layout, device)
                    for kernels in planned_kernels(setting.modules["modelnew"], setting.x):
                        found.update(kernels)
    return found


class _Setting:
    """An entry in one class and layout: modules with the same parameters, an input and an incoming gradient."""

    def __init__(self, entry, cls, layout, device):
        self.entry, self.cls, self.layout = entry, cls, layout
        dtype = DTYPES[cls]
        torch.manual_seed(0)
        self.modules = {"modelnew": entry.make(layers), "eager": entry.make(nn)}
        self.modules["modelnew"].load_state_dict(self.modules["eager"].state_dict())
        for module in self.modules.values():
            module.to(device).train(entry.training)
            if entry.operator != "BatchNorm":  # whose parameters stay float32, as in mixed precision
                module.to(dtype)
        self.x = dense_in(torch.randn(entry.shape, device=device, dtype=dtype), layout == "nhwc")
        self.error_ratio = self.error_of = None  # our largest rms error over PyTorch's, and of which result

    @functools.cached_property
    def dy(self) -> torch.Tensor:
        """The gradient of the output."""
        with torch.no_grad():
            return torch.randn_like(copy.deepcopy(self.modules["eager"])(self.x))

    def rows(self, clock, peers, trials, refused, describe):
        for what in ("forward", "step"):
            entrants = [
                Contender(
                    who,
                    self.layout,
                    lambda who=who, what=what: self.build(who, what),
                    (lambda: self.wrong) if who == "modelnew" else None,
                )
                for who in ("modelnew", *peers)
            ]
            name = f"{self.entry.operator} {self.entry.name} {self.cls} {self.layout} {what}"
            measure_together(entrants, clock, trials, refused, lambda who, name=name: describe(f"{name} {who}"))
            found = {entrant.who: entrant for entrant in entrants}
            row = {"operator": self.entry.operator, "case": self.entry.name, "dtype": self.cls, "layout": self.layout}
            row["what"] = what
            for who, entrant in found.items():
                ms = None if entrant.reason else entrant.times.median
                prefix = "" if who == "modelnew" else f"{who}_"
                row[f"{prefix}ms"] = ms and float(f"{ms:.4g}")
                row[f"{prefix}peak_mb"] = None if entrant.reason else entrant.peak_mb
            row |= {"error_ratio": self.error_ratio, "error_of": self.error_of}
            reasons = {who: entrant.reason for who, entrant in found.items() if entrant.reason}
            yield {**row, "reasons": reasons, "failed": found["modelnew"].failed} if reasons else row

    def build(self, who, what):
        """The function that is timed."""
        module = self.modules["modelnew" if who == "modelnew" else "eager"]
        if who == "compile":
            torch.compiler.reset()
            module = torch.compile(module)
        x = self.x
        if what == "forward":

            def call():
                with torch.no_grad():
                    return module(x)

            return call
        leaf = x.detach().requires_grad_()
        wanted = [leaf, *module.parameters()]
        dy = torch.empty_like(module(leaf)).copy_(self.dy)  # of the result's own format, as the next layer's would be
        return lambda: torch.autograd.grad(module(leaf), wanted, dy)

    @functools.cached_property
    def wrong(self) -> str | None:
        """What is wrong with our results, or None. Sets `error_ratio` and `error_of`."""
        ours, theirs = (self.results(self.modules[who], self.x.dtype) for who in ("modelnew", "eager"))
        if self.entry.operator == "MaxPool2d" and not torch.equal(ours["output"], theirs["output"]):
            return "the output is not PyTorch's"
        truth = self.results(self.modules["eager"], torch.float64)
        references = [theirs]
        if self.cls == "tf32":  # cuDNN may have multiplied in float32
            rounding = copy.deepcopy(self.modules["eager"])
            round_operands(rounding)
            with tf32(False):
                references.append(self.results(rounding, self.x.dtype))
        terms = dict.fromkeys(("weight", "bias", "running_mean"), self.x.numel() // self.x.shape[1])
        bad, ratios = [], []
        for name, exact in truth.items():
            mine = error(ours[name], exact)
            other = max((error(found[name], exact) for found in references), key=lambda found: found.rms)
            ratios.append((mine.rms / other.rms if other.rms else 1.0, name))
            if not within_policy(ours[name], exact, mine, other, terms.get(name, 0)):
                bad.append(f"{name} (rms error {mine.rms:.1e}, PyTorch's {other.rms:.1e})")
        largest, self.error_of = max(ratios)
        self.error_ratio = float(f"{largest:.3g}")
        return f"parity fails: {', '.join(bad)}" if bad else None

    def results(self, module, dtype) -> dict[str, torch.Tensor]:
        """{name: output, gradient of x and of each parameter, running statistics}, by a copy of the module."""
        module = copy.deepcopy(module)
        if dtype == torch.float64:
            module.double()
        x = self.x.to(dtype).requires_grad_()
        y = module(x)
        names, parameters = zip(*module.named_parameters()) if any(True for _ in module.parameters()) else ((), ())
        gradients = torch.autograd.grad(y, [x, *parameters], self.dy.to(dtype))
        found = {"output": y.detach(), **dict(zip(("x", *names), gradients))}
        return {**found, **{name: b for name, b in module.named_buffers() if b.is_floating_point()}}


def ratio(row: dict) -> float | None:
    """The fastest peer's time over ours."""
    peers = [row[name] for name in ("eager_ms", "compile_ms") if row.get(name)]
    return min(peers) / row["ms"] if peers and row["ms"] else None


def groups(record: dict) -> dict[tuple, list[dict]]:
    """{(operator, dtype, layout, what): rows with a ratio}. A batch norm in evaluation is an operator of its own."""
    found = collections.defaultdict(list)
    for row in record["rows"]:
        if ratio(row):
            evaluation = ", evaluation" if row["case"].endswith(_EVALUATION) else ""
            found[row["operator"] + evaluation, row["dtype"], row["layout"], row["what"]].append(row)
    return found


def mean_and_worst(rows: list[dict]) -> tuple[float, float | None]:
    """(geometric mean of the ratios, the smallest ratio where PyTorch takes over `LONG_US`, or None)."""
    ratios = list(map(ratio, rows))
    mean = math.exp(sum(map(math.log, ratios)) / len(ratios))
    long = [found for row, found in zip(rows, ratios) if 1e3 * row["ms"] * found > LONG_US]
    return mean, min(long, default=None)


def most_memory(record: dict) -> tuple[float, dict] | None:
    """(largest ratio of our peak memory to eager PyTorch's, its row), both over `LEAST_MB`; None without such rows."""
    pairs = [(row.get("peak_mb"), row.get("eager_peak_mb"), row) for row in record["rows"]]
    found = [(ours / theirs, row) for ours, theirs, row in pairs if ours and theirs and min(ours, theirs) > LEAST_MB]
    return max(found, key=lambda pair: pair[0], default=None)


def show(record: dict, out: Console) -> None:
    """Prints the worst ratios, geometric means, the largest memory beside PyTorch's, and what was wrong."""
    style = {"box": box.SIMPLE_HEAD, "title_justify": "left", "padding": (0, 1, 0, 0), "pad_edge": False}
    table = Table(title="Slowest beside PyTorch; error: our largest rms error over PyTorch's", **style)
    for name in ("layer", "shape", "dtype", "layout", ""):
        table.add_column(name, overflow="fold", no_wrap=name == "")
    for name in ("ours\nus", "PyTorch\nus", "ratio", "error"):
        table.add_column(name, justify="right", no_wrap=True)
    timed = sorted(filter(ratio, record["rows"]), key=ratio)
    for row in timed[:_SHOWN]:
        times = [f"{1e3 * row['ms']:.1f}", f"{1e3 * row['ms'] * ratio(row):.1f}", f"{ratio(row):.2f}x"]
        names = [row[name] for name in ("operator", "case", "dtype", "layout", "what")]
        table.add_row(*names, *times, f"{row['error_ratio']:.2f}x")
    out.print(table)
    table = Table(title=f"PyTorch's time over ours: geometric mean (worst of those over {LONG_US} us)", **style)
    for name in ("layer", "dtype", "layout", "forward", "step"):
        table.add_column(name)
    cells = collections.defaultdict(dict)
    for (*key, what), rows in groups(record).items():
        mean, worst = mean_and_worst(rows)
        cells[tuple(key)][what] = f"{mean:.2f}x" + (f" ({worst:.2f}x)" if worst else "")
    for key, found in cells.items():
        table.add_row(*key, found.get("forward", ""), found.get("step", ""))
    out.print(table)
    if found := most_memory(record):
        times, row = found
        out.print(
            "Peak memory of a call is at most {:.2f} times PyTorch's: {operator} {case} {dtype} {layout} {what}".format(
                times, **row
            )
        )
    reasons = collections.defaultdict(list)
    for row in record["rows"]:
        for who, reason in row.get("reasons", {}).items():
            reasons[who, reason].append("{operator} {case} {dtype} {layout} {what}".format(**row))
    for (who, reason), rows in reasons.items():
        out.print(f"No time of {who}, because of {reason}: {'; '.join(rows)}", markup=False, highlight=False)
