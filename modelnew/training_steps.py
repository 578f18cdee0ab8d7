"""Judges training steps of `ModelNew` for `training`, and computes loss curves beside `Model`'s.

The task is to reproduce the outputs of a teacher, a `Model` with other random parameters, with mean squared error and
SGD.

What is judged: the output, the parameters and batch norm's running statistics after each of the first JUDGED steps, in
both numeric classes, from every seed. The truth is a run of `Model` in float64. ModelNew must be as close to it as
`Model` in the same class, by the policy of `parity.within_policy`: 1.1 times, and an allowance for chance that shrinks
with the number of elements. Such a narrow limit holds because three things keep rounding errors from growing:

- Before each step, all runs take the truth's parameters and statistics. Otherwise a few directions of the first steps
  multiply rounding errors, and the errors of two equally good runs differ by a half. Each run keeps its own optimizer
  momentum, which carries the errors of all steps so far.
- No gradient goes to pooling windows whose two largest values are nearly equal, because rounding decides which of them
  gets it (`_gradient`).
- The loss is not compared, because the errors of all elements cancel in it by chance. The output is compared instead.

Under autocast (--amp) the classes are "fp16" and "bf16", and every run has a GradScaler.

In the TF32 class, Model's error is PyTorch's, or that of operands rounded to TF32 (`parity.tf32_rounding`) if it is
larger. cuDNN does not use TF32 for few images or for the weight gradient in NCHW, and a CPU never does.

What is not judged:

- The convolution's bias. Its gradient is zero in exact arithmetic, because batch norm subtracts the bias again. What is
  left is rounding noise, which the parity check limits.
- The distance between runs after many steps. Training amplifies rounding, so every different rounding, PyTorch's own
  too, leads to a different end. The loss curves show it. They must only fall where Model's does.
"""

import copy
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F

from .entrants import numerics
from .model import Model, ModelNew, get_init_inputs
from .parity import CLASSES, NEAR_TIE, Error, Row, error, tf32, tf32_rounding, within_policy
from .timing import free
from .workloads import LAYOUTS

JUDGED = 5  # steps
LAST = 20  # steps over whose losses curves are averaged
_BATCHES = 16  # different ones, used in turns


class Run(NamedTuple):
    """Who is trained, in which numeric class and memory layout."""

    who: str
    cls: str
    layout: str


class Settings(NamedTuple):
    """The settings that all runs share."""

    steps: int
    batch: int
    channels: int
    size: int
    lr: float
    momentum: float
    seed: int
    amp: bool = False

    @property
    def runs(self) -> list[Run]:
        """The runs that have a loss curve."""
        return AMP_RUNS if self.amp else RUNS

    @property
    def init(self) -> list[int]:
        """Arguments of Model and ModelNew."""
        return [self.channels, 2 * self.channels, *get_init_inputs()[2:]]


class Judgement(NamedTuple):
    """One tensor of ModelNew beside Model's after a step, counted from 1."""

    seed: int
    step: int
    row: Row


def _runs(classes):
    runs = [Run("Model", cls, layout) for cls in classes for layout in LAYOUTS]
    return runs + [Run("ModelNew", cls, "nchw") for cls in classes]


RUNS, AMP_RUNS = _runs(CLASSES[::-1]), _runs(("fp16", "bf16"))
_ROUNDED = Run("Model, rounded operands", "tf32", "nchw")
# As NEAR_TIE; of autocast's classes, whose tanh has few bits.
_NEAR_TIES = {False: max(NEAR_TIE.values()), True: 0.1}
_SCALE = 2.0**16  # of a GradScaler at first; its default


def judged(settings):
    return [run for run in settings.runs if run.layout == "nchw"] + ([] if settings.amp else [_ROUNDED])


def judge(settings: Settings, device: torch.device, describe: Callable[[Run], None]) -> Iterator[Judgement]:
    """Judges the first steps of both classes. describe(run) is called before a step of the run.

    Raises ValueError if the float64 run diverges.
    """
    start, batches = _task(settings, device)
    state, truth = start.state_dict(), copy.deepcopy(start).double()
    pools = []
    truth.max_pool.register_forward_hook(lambda _, inputs, output: pools.append((*inputs, output)))
    optimizer = _optimizer(truth, settings)
    models = {run: _build(run, start, settings) for run in judged(settings)}
    trained = {run: (m, _optimizer(m, settings), _scaler(settings, device)) for run, m in models.items()}
    none = _scaler(settings._replace(amp=False), device)
    for step in range(JUDGED):
        x, target = batches[step % len(batches)]
        truth.load_state_dict(state)
        y = truth(x.double())
        given = y.detach(), target, *(t.detach() for t in pools.pop())
        dy = _gradient(*given, truth.group_norm, _NEAR_TIES[settings.amp]).float()
        expected = _step(truth, optimizer, none, y, dy)
        if not all(t.isfinite().all() for t in expected.values()):
            raise ValueError("Model's own training diverged: take a smaller learning rate")
        found = {}
        for run, (model, own, scaler) in trained.items():
            describe(run)
            model.load_state_dict(state)
            with numerics("fp32" if run == _ROUNDED else run.cls, device):
                y = model(x)
            with tf32(run.cls == "tf32" and run != _ROUNDED):
                found[run] = _step(model, own, scaler, y, dy)
        for cls in dict.fromkeys(run.cls for run in trained):
            for row in _rows(cls, found, expected):
                yield Judgement(settings.seed, step + 1, row)
        state = {name: value.clone() for name, value in truth.float().state_dict().items()}
        truth.double()
        del y, dy, expected, found
        free()


def _task(settings, device):
    """The model from which all runs start, and batches with the teacher's outputs."""
    start, teacher = (_initial(settings, settings.seed + i, device) for i in range(2))
    for norm in (teacher.batch_norm, teacher.group_norm):  # or the biases would have nothing to learn
        torch.nn.init.normal_(norm.weight, 1, 0.2)
        torch.nn.init.normal_(norm.bias, 0, 0.2)
    generator = torch.Generator().manual_seed(settings.seed)
    shape = (settings.batch, settings.channels, settings.size, settings.size)
    batches = [torch.rand(shape, generator=generator).to(device) for _ in range(_BATCHES)]
    with tf32(False), torch.no_grad():
        return start, [(x, teacher(x)) for x in batches]


def _initial(settings, seed, device):
    torch.manual_seed(seed)
    return Model(*settings.init, device=device)


def _build(run, start, settings):
    """The model of a run, with the parameters of `start`. On a CPU, which has no TF32, operands are rounded to it."""
    device = start.conv_transpose.weight.device
    if run.who == "ModelNew":
        model = ModelNew(*settings.init, numerics=run.cls if run.cls in CLASSES else "auto", device=device)
        model.load_state_dict(start.state_dict())
    elif run == _ROUNDED or (run.cls == "tf32" and device.type == "cpu"):
        model = tf32_rounding(start)
    else:
        model = copy.deepcopy(start)
    return model.to(memory_format=LAYOUTS[run.layout])


def _optimizer(model, settings):
    return torch.optim.SGD(model.parameters(), lr=settings.lr, momentum=settings.momentum)


def _scaler(settings, device):
    return torch.amp.GradScaler(device.type, _SCALE, enabled=settings.amp)


def _gradient(y, target, unpooled, pooled, norm, near_tie):
    """The mean squared error's gradient of y, changed so that none reaches pooling windows with a near tie.

    In a near tie, the two largest values of a 2x2 window differ by less than `near_tie`. The gradient that flows back
    through a group norm is the part of gradient * weight that is orthogonal, within each group, to 1 and to the pooled
    values. The result's part is zero at near ties and still orthogonal to both.
    """
    windows = unpooled.unfold(2, 2, 2).unfold(3, 2, 2).flatten(4)
    first, second = windows.topk(2).values.unbind(-1)
    weight = norm.weight.detach().view(-1, 1, 1)

    def grouped(t):
        return t.reshape(t.shape[0], norm.num_groups, -1)

    def split(v, others):
        """The multiple of `others` in v, and the rest."""
        tiny = torch.finfo(v.dtype).tiny
        along = others * ((v * others).sum(2, keepdim=True) / others.square().sum(2, keepdim=True).clamp_min(tiny))
        return along, v - along

    keep = grouped(first - second > near_tie).to(y.dtype)
    values = grouped(pooled)
    _, values = split(values, torch.ones_like(values))
    mean, v = split(grouped(2 / y.numel() * (y - target) * weight), torch.ones_like(values))
    slope, v = split(v, values)
    _, v = split(v * keep, keep)
    _, v = split(v, split(values * keep, keep)[1])
    return (mean + slope + v).reshape(y.shape) / weight


def _step(model, optimizer, scaler, y, dy):
    """The tensors that are compared after a step of the optimizer, given the output and its gradient."""
    optimizer.zero_grad()
    y.backward(scaler.scale(dy).to(y))
    scaler.step(optimizer)
    scaler.update()
    statistics = {f"batch_norm.{name}": getattr(model.batch_norm, name) for name in ("running_mean", "running_var")}
    parameters = {name: p for name, p in model.named_parameters() if name != "conv_transpose.bias"}
    tensors = {"output": y, **parameters, **statistics}
    return {name: tensor.detach().clone() for name, tensor in tensors.items()}


def _rows(cls, found, expected):
    """A row for each tensor of a class. found: {run: {tensor's name: tensor}}."""
    runs = [run for run in found if run.cls == cls and run.who != "ModelNew"]
    for what, truth in expected.items():
        ours = found[Run("ModelNew", cls, "nchw")][what]
        errors = error(ours, truth), Error(*map(max, zip(*(error(found[run][what], truth) for run in runs))))
        yield Row(what, cls, *errors, close=None, ok=within_policy(ours, truth, *errors))


def worst(judgements: list[Judgement]) -> list[Judgement]:
    """For each tensor and class, the worst judgement beside Model's. Wrong ones count as worse than right ones."""
    cells = {}
    for judgement in judgements:
        cells.setdefault((judgement.row.cls, judgement.row.what), []).append(judgement)
    return [max(cell, key=lambda judgement: (not judgement.row.ok, judgement.row.ratio)) for cell in cells.values()]


def train(
    settings: Settings, device: torch.device, describe: Callable[[Run], None]
) -> Iterator[tuple[Run, torch.Tensor]]:
    """Trains each run, and yields it with the losses of all steps, float64 on the CPU."""
    start, batches = _task(settings, device)
    for run in settings.runs:
        model = _build(run, start, settings)
        optimizer, scaler = _optimizer(model, settings), _scaler(settings, device)
        losses = []
        with tf32(run.cls == "tf32"):
            for step in range(settings.steps):
                describe(run)
                x, target = batches[step % len(batches)]
                with numerics(run.cls, device):
                    y = model(x.to(memory_format=LAYOUTS[run.layout]))
                loss = F.mse_loss(y.float(), target)
                optimizer.zero_grad()
                scaler.scale(loss).backward()
                scaler.step(optimizer)
                scaler.update()
                losses.append(loss.detach())
        yield run, torch.stack(losses).double().cpu()
        free()


def falls(losses: torch.Tensor) -> bool:
    """Whether the mean of the last losses is less than the first loss; False for NaN."""
    return bool(losses[-LAST:].mean() < losses[0])


def rises(curves: dict[Run, torch.Tensor]) -> list[str]:
    """The classes in which Model's loss falls and ModelNew's does not."""
    return [
        cls
        for cls in dict.fromkeys(run.cls for run in curves)
        if falls(curves[Run("Model", cls, "nchw")]) and not falls(curves[Run("ModelNew", cls, "nchw")])
    ]
