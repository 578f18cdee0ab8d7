"""Judges one random call of ours and of PyTorch's by the policy of `parity`.

The truth is PyTorch's float64 result on the CPU. A case is right if the output, other results and all gradients are
within the policy, if no argument is changed, and if what PyTorch refuses is refused.
"""

import contextlib
import math
import random

import torch

from cupy_kernels.errors import BackendError, EmulatorError, KernelCompileError
from cupy_kernels.source import Kernel, Variant

from . import calls, parity
from .cases import first
from .fuzz_cases import OPERATORS
from .fuzz_values import FuzzCase

# How often a case that fails is drawn again. Errors of few values, or of one statistic that many share, are chance: all
# draws are then judged as one.
REDRAWS = 31
GROSS = 8  # times as large an error as the policy allows is no chance
ULPS = 4  # by which float64 tensors are moved, to see what a result is off
REFUSALS = (ValueError, TypeError, RuntimeError)  # the classes of a refusal; OverflowError and the like are none


def draw(operator: str, seed: int, number: int) -> tuple[FuzzCase, int]:
    """The case of this number, and the seed of its values."""
    source = random.Random(f"{operator} {seed} {number}")
    return OPERATORS[operator](source), source.getrandbits(31)


def run(operator: str, seed: int, number: int, device: torch.device) -> str | None:
    """Judges one case. Returns None if it is right, else a line that says what is wrong and how to reproduce it."""
    case, values = draw(operator, seed, number)
    try:
        found = faults(case, values, device)
    except BackendError:
        raise
    except Exception as error:  # whatever a call raises besides refusals is a fault of its, too
        found = [f"{type(error).__name__}: {error}"]
    if not found:
        return None
    again = f"python3 -m modelnew fuzz --operator {operator} --seed {seed} --case {number}"
    return f"{again}: {'; '.join(found)} [{describe(case)}]"


def faults(case: FuzzCase, seed: int, device: torch.device) -> list[str]:
    """What is wrong with our results, one line each; an empty list if all are right."""
    found = _compare(case, seed, device)
    if isinstance(found, str):
        return [found] if found else []
    if not _wrong(case, [found]):
        return []
    draws = [found, *(_compare(case, seed + i, device) for i in range(1, REDRAWS + 1))]
    return next(([d] for d in draws if isinstance(d, str)), None) or _wrong(case, draws)


def launched(case: FuzzCase, seed: int, device: torch.device) -> dict[Variant, Kernel]:
    """The kernels that our call would launch, one for each variant. Nothing is launched."""
    with calls.planned() as plans, contextlib.suppress(*REFUSALS):
        bases = {name: base.to(device) for name, base in _bases(case, torch.Generator().manual_seed(seed)).items()}
        y = _results(case, case.ours, bases, None, seed)["output"]
        _results(case, case.ours, bases, torch.zeros_like(y), seed)
    return {kernel.variant: kernel for plan in plans for kernel in plan.kernels}


def describe(case: FuzzCase) -> str:
    """The call in one line."""
    tensors = [f"{name}={tuple(values)}" for name, values in case.tensors.items()]
    dtype = str(case.dtype).removeprefix("torch.")
    return f"{case.text}, {dtype}, dy {case.dy_layout}, order {case.order}; {'; '.join(tensors)}"


def _wrong(case, draws) -> list[str]:
    """The results that the policy refuses, over all draws together.

    The policy's allowance for chance assumes normal errors. Errors of a norm of few values are not normal: some draws
    are far worse than all others, ours as often as PyTorch's. So ours must be worse in more draws than PyTorch's, or
    grossly wrong.

    Where PyTorch's result overflows, though the truth is finite, ours may have any finite error.
    """
    lines = []
    for name in draws[0]:
        ours, truth, theirs = (torch.cat([d[name][i].flatten() for d in draws]) for i in range(3))
        errors, terms = (parity.error(ours, truth), parity.error(theirs, truth)), case.terms.get(name, 0)
        overflows = all(map(math.isfinite, errors[0])) and not math.isfinite(errors[1].max)
        if overflows or parity.within_policy(ours, truth, *errors, terms):
            continue
        gross = not parity.within_policy(ours, truth, parity.Error(*(e / GROSS for e in errors[0])), errors[1], terms)
        if len(draws) == 1 or gross or _are_worse([d[name] for d in draws]):
            lines.append(f"{name}: error {errors[0]}, PyTorch's {errors[1]}")
    return lines


def _are_worse(draws) -> bool:
    """Whether ours is worse in more draws than chance explains, compared with those in which PyTorch's is worse."""
    pairs = [(parity.error(ours, truth), parity.error(theirs, truth)) for ours, truth, theirs in draws]
    for ours, theirs in zip(*(zip(*column) for column in zip(*pairs))):
        worse, better = (sum(a > parity.RATIO * b for a, b in zip(*both)) for both in ((ours, theirs), (theirs, ours)))
        if worse - better > 3 * (worse + better) ** 0.5:
            return True
    return False


def _compare(case, seed, device) -> dict[str, tuple[torch.Tensor, ...]] | str:
    """{result: (ours, truth, PyTorch's), on the CPU}, or what is wrong with a refusal; "" if that is right."""
    generator = torch.Generator().manual_seed(seed)
    bases = _bases(case, generator)
    double, here = {name: base.double() for name, base in bases.items()}, {}
    truth = dy = refusal = None
    try:
        with torch.no_grad():
            y = first(case.theirs(**_dense(case, double)))
        dy = torch.randn(y.shape, generator=generator)
        if case.gradient:
            dy = case.gradient(case.dtype, dy.double(), **_dense(case, double))
        dy = dy.to(case.dtype)
        truth = _results(case, case.truth or case.theirs, double, dy.double(), seed)
    except REFUSALS as error:
        refusal = error
    here = {name: base.to(device, copy=True) for name, base in bases.items()}
    try:
        ours = _results(case, case.ours, here, dy if dy is None else dy.to(device), seed)
    except (BackendError, EmulatorError, KernelCompileError):
        raise
    except REFUSALS as error:
        checked = math.prod(case.tensors["x"].shape)  # PyTorch looks at little of a call with an empty batch
        return "" if refusal or not checked else f"refused: {type(error).__name__}: {error}"
    if refusal:
        return f"PyTorch refuses this: {type(refusal).__name__}: {refusal}"
    for name, base in bases.items():
        if not torch.equal(base.flatten().view(torch.uint8), here[name].cpu().flatten().view(torch.uint8)):
            return f"{name} was changed"
    theirs = _theirs(case, bases, dy, truth, seed, device)
    for name, right in truth.items():
        kind, expected = (ours[name].dtype, ours[name].shape), (_dtype(case, name, right), right.shape)
        if kind != expected:
            return f"{name}: {kind}, should be {expected}"
    return {name: (ours[name].cpu(), right, theirs[name].cpu()) for name, right in truth.items()}


def _bases(case, generator) -> dict[str, torch.Tensor]:
    """The memory of the case's tensors, on the CPU."""
    bases = {name: values.base(generator) for name, values in case.tensors.items()}
    return {name: base.to(case.tensors[name].dtype or case.dtype) for name, base in bases.items()}


def _dtype(case, name, right):
    """The expected dtype of a result: that of its tensor, or of the case. Indices stay integers."""
    values = case.tensors.get(name.rpartition(" ")[2])
    statistics = case.tensors.get("_mean") if name in ("result 2", "result 3") else None
    wide = (values or statistics) and (values or statistics).dtype
    return (wide or case.dtype) if right.is_floating_point() else right.dtype


def _theirs(case, bases, dy, truth, seed, device) -> dict[str, torch.Tensor]:
    """Results as far from the truth as PyTorch's in the case's numeric class."""
    if case.rounded:
        bases = {
            name: (parity.tf32_rounded(t) if len(case.tensors[name].shape) > 1 else t).double()
            for name, t in bases.items()
        }
        return _results(case, case.theirs, bases, parity.tf32_rounded(dy).double(), seed)
    if case.dtype == torch.float64 and not case.truth:
        # Truth and PyTorch's result are one: what it is off is what a few units in the last places of all tensors do.
        moved = _results(case, case.theirs, {name: _moved(base) for name, base in bases.items()}, _moved(dy), seed)
        return {name: t + (moved[name] - t).nan_to_num(0, 0, 0) for name, t in truth.items()}
    try:
        return _run_theirs(case, bases, dy, seed, device)
    except RuntimeError:  # it has no kernel for the mixture of dtypes
        return _run_theirs(case, {name: base.to(case.dtype) for name, base in bases.items()}, dy, seed, device)


def _moved(tensor):
    """The tensor, slightly changed. Equal values stay equal."""
    return tensor * (1 + ULPS * torch.finfo(tensor.dtype).eps * torch.sin(tensor * 1e4))


def _run_theirs(case, bases, dy, seed, device):
    return _results(case, case.theirs, {name: base.to(device) for name, base in bases.items()}, dy.to(device), seed)


def _dense(case, bases):
    """The tensors, made contiguous, because PyTorch's gradients are wrong for some mixtures of layouts."""
    return {
        name: case.tensors[name].view(base).clone(memory_format=torch.contiguous_format) for name, base in bases.items()
    }


def _results(case, function, bases, dy, seed) -> dict[str, torch.Tensor]:
    """Every result of a function of the case's tensors. Without dy, no gradients."""
    if function is case.ours:
        leaves = {name: case.tensors[name].view(base).detach() for name, base in bases.items()}
        layout = case.dy_layout
    else:
        leaves, layout = _dense(case, bases), "contiguous"
    wanted = {name: t for name, t in leaves.items() if case.differentiated and not name.startswith("_")}
    for leaf in wanted.values():
        leaf.requires_grad_()
    result = function(**leaves)
    y, others = first(result), result[1:] if isinstance(result, tuple) else ()
    found = {"output": y.detach(), **{f"result {i}": t.detach() for i, t in enumerate(others, 2)}}
    if dy is None or not wanted:
        return found
    again, dy = case.order == 2, _laid_out(dy, layout)
    if again and not case.gradient:
        dy.requires_grad_()
    gradients = torch.autograd.grad(y, list(wanted.values()), dy, create_graph=again)
    found |= {f"gradient of {name}": g.detach() for name, g in zip(wanted, gradients)}
    if again:
        generator, total = torch.Generator().manual_seed(seed), 0
        for g in gradients:
            v = parity.tf32_rounded(torch.randn(g.shape, generator=generator))  # which every class holds
            total = total + (v.to(g) * g).sum(dtype=torch.float64)
        if dy.requires_grad:
            wanted["dy"] = dy
        seconds = torch.autograd.grad(total, list(wanted.values()), allow_unused=True, materialize_grads=True)
        found |= {f"second gradient of {name}": g for name, g in zip(wanted, seconds)}
    return found


def _laid_out(dy, layout):
    if layout == "channels_last":
        return dy.contiguous(memory_format=torch.channels_last)
    order = tuple(reversed(range(dy.dim())))
    return dy.permute(order).contiguous().permute(order) if layout == "reversed" else dy
