"""Errors against a float64 run of the reference, and the tolerance policy.

A result is right if its error is at most 1.1 times PyTorch's error in the same class, plus allowances for arithmetic
and chance (`within_policy`). Classes: "fp32" (TF32 off) and "tf32" (PyTorch may round a convolution's operands to 10
mantissa bits).
"""

import contextlib
import copy
import math
import types
from typing import NamedTuple

import torch
import torch.nn.functional as F

from .interop import accumulator_dtype
from .model import Model, ModelNew

RATIO = 1.1
CLASSES = ("fp32", "tf32")
# Largest difference, after tanh, of two values that the class's rounding may order either way: several times the
# largest error in a 512x64x32x32 batch.
NEAR_TIE = {"fp32": 1e-4, "tf32": 1e-2}
# Error allowed to a gradient that is zero in mathematics, relative to its neighbour's.
_NOISE = 1e-5


class Error(NamedTuple):
    """Error of a result against the truth, relative to the root mean square of the truth."""

    rms: float
    max: float


class Row(NamedTuple):
    """One compared tensor. close: whether torch.testing.assert_close accepts ours for PyTorch's, None if unchecked."""

    what: str
    cls: str
    ours: Error
    torch: Error
    close: bool | None
    ok: bool

    @property
    def ratio(self) -> float:
        """Our rms error over PyTorch's; 0 if both are 0."""
        return self.ours.rms / self.torch.rms if self.torch.rms else float(self.ours.rms and "inf")

    def record(self) -> dict:
        """The row as in benchmarks/results/parity_*.json."""
        names = ("rms", "max", "torch_rms", "torch_max")
        return {"what": self.what, "class": self.cls, **dict(zip(names, (*self.ours, *self.torch)))}


def error(actual: torch.Tensor, truth: torch.Tensor, scale: float | None = None) -> Error:
    """rms and maximum of |actual - truth| over `scale`, by default the rms of the truth (1 if the truth is all zero).

    NaN must be where the truth has NaN, and infinities must equal the truth's; otherwise the error is infinite. A truth
    that is too large for the result's dtype counts as infinity.
    """
    if actual.shape != truth.shape:
        raise ValueError(f"result has shape {tuple(actual.shape)}, truth {tuple(truth.shape)}")
    actual, truth = actual.detach().double(), _held(truth, actual.dtype)
    finite = truth.isfinite()
    if not torch.equal(actual.isfinite(), finite):
        return Error(float("inf"), float("inf"))
    if not finite.all():  # picking elements takes a GPU longer than all the rest
        if not torch.allclose(actual[~finite], truth[~finite], rtol=0, atol=0, equal_nan=True):
            return Error(float("inf"), float("inf"))
        actual, truth = actual[finite], truth[finite]
    if not truth.numel():
        return Error(0.0, 0.0)
    scale = scale or _rms(truth) or 1.0
    difference = (actual - truth).abs()
    return Error(_rms(difference) / scale, difference.max().item() / scale)


def within_policy(actual: torch.Tensor, truth: torch.Tensor, ours: Error, theirs: Error, terms: int = 0) -> bool:
    """Whether error `ours` of `actual` is within 1.1 times PyTorch's `theirs`, in rms and maximum, plus allowances.

    The dtype: no result can be closer than the truth rounded to its dtype. In 16 bits this is nearly all of a right
    result's error; truncation has twice as much.

    Arithmetic: PyTorch may compute in float64 what we compute in float32. Each operation in the accumulator's dtype may
        be off by half a unit in the last place, which is eps / sqrt(12) in rms. Two dozen operations are allowed, and
        the additions of `terms` values one after another. Their partial sums grow like sqrt(k), which gives terms / 2
        times that variance. `terms` belongs to this result alone. The largest error may have twice as much, relative to
        the truth's largest value.

    float64: the truth is a float64 run as well, and so is PyTorch's result. Their errors are unknown, and depend on the
        order in which a CPU adds. Four times the allowance for arithmetic covers both.

    Chance: the rms of two samples of n errors from one distribution differs by about 1 / sqrt(n); three times this is
        allowed. The largest of n normal errors scatters by pi / sqrt(6) / (2 log n) of itself (extreme value
        statistics), and the difference of two samples by sqrt(2) times that. Twice this is allowed, or 6 / sqrt(n) for
        few errors, where that is more.
    """
    truth = _held(truth, actual.dtype)
    finite = truth.isfinite()
    if not finite.all():
        truth = truth[finite]
    n = truth.numel()
    if not n:
        return ours == Error(0.0, 0.0)
    rounded = error(truth.to(actual.dtype), truth)
    # An infinite error of PyTorch's is no yardstick.
    rms, largest = (max(e for e in (*pair, 0.0) if math.isfinite(e)) for pair in zip(theirs, rounded))
    size = _rms(truth)  # 0 also of what float64 squares to 0
    peak = truth.abs().max().item() / size if size else 1.0
    chance = 3 / n**0.5
    chance_of_max = max(2 * chance, 2 * 2**0.5 * math.pi / 6**0.5 / (2 * math.log(max(n, 2))))
    arithmetic = torch.finfo(accumulator_dtype(actual)).eps * (2 + terms / 24) ** 0.5
    if actual.dtype == torch.float64:
        arithmetic *= 4
    return ours.rms <= (1 + chance) * (RATIO * rms + arithmetic) and ours.max <= (1 + chance_of_max) * (
        RATIO * largest + 2 * arithmetic * peak
    )


def compare_models(model: Model, model_new: ModelNew, x: torch.Tensor, cls: str = "fp32", seed: int = 0) -> list[Row]:
    """Rows of both models in training mode on the float32 batch `x`, forward and backward, compared with float64.

    The rows are the output, the gradients of x and of every parameter, and the running statistics. `model_new` gets the
    state of `model`; the arguments are not changed.

    cls: "fp32" or "tf32": whether PyTorch may use TF32, and what "auto" means. If PyTorch may but does not use TF32, as
        for few images, `tf32_rounding` replaces it.
    seed: of the incoming gradient.

    The incoming gradient is random, but nothing flows back into pooling windows where rounding decides about the
    gradient: their two largest values are too close, or the largest is too close to the kink of LeakyReLU, at 0. One
    different decision changes every gradient by a thousand times its rounding error, in PyTorch's float32 run as much
    as in ours.

    Raises ValueError for another cls.
    """
    if cls not in CLASSES:
        raise ValueError(f"cls must be one of {', '.join(CLASSES)}, received {cls!r}")
    precise, ours, theirs = (copy.deepcopy(m).train() for m in (model, model_new, model))
    ours.load_state_dict(model.state_dict())
    with tf32(cls == "tf32"):
        pools = []
        with precise.max_pool.register_forward_hook(lambda _, inputs, output: pools.append((*inputs, output))):
            run = _forward(precise.double(), x.double())
        unpooled, pooled = (p.detach() for p in pools.pop())
        norm, kink = precise.group_norm, isinstance(precise.tanh, torch.nn.LeakyReLU)
        weight = norm.weight.detach()
        dy = incoming_gradient(unpooled, pooled, norm.num_groups, weight, NEAR_TIE[cls], seed, kink).float()
        truth = _backward(precise, *run, dy.double())
        del run
        theirs = _backward(theirs, *_forward(theirs, x), dy)
        if cls == "tf32":
            rounding = tf32_rounding(model).train()
            with tf32(False):
                rounding = _backward(rounding, *_forward(rounding, x), dy)
            if not multiplied_in_tf32(*(error(t["output"], truth["output"]) for t in (theirs, rounding))):
                theirs = rounding
        ours = _backward(ours, *_forward(ours, x), dy)
    return [_row(what, cls, ours[what], truth, theirs[what]) for what in truth]


def tf32_rounded(tensor: torch.Tensor) -> torch.Tensor:
    """A float32 tensor rounded to TF32, 10 mantissa bits, ties to even. NaN stays NaN."""
    bits = tensor.float().view(torch.int32)
    rounded = ((bits + 0xFFF + (bits >> 13 & 1)) & ~0x1FFF).view(torch.float32)
    return torch.where(tensor.isnan(), tensor.float(), rounded)


def tf32_rounding(model: Model) -> Model:
    """A copy of a float32 model whose convolution rounds its operands to TF32, forward and in both gradients.

    It shows the error of TF32 on any device. Run it with TF32 off.
    """
    model = copy.deepcopy(model)
    round_operands(model.conv_transpose)
    return model


def round_operands(conv: torch.nn.ConvTranspose2d) -> None:
    """Makes the convolution round its operands to TF32, as in `tf32_rounding`."""
    conv.forward = types.MethodType(_rounding_forward, conv)  # which deepcopy rebinds


def _rounding_forward(conv, x):
    options = (conv.stride, conv.padding, conv.output_padding, conv.groups, conv.dilation)
    y = _RoundingConvolution.apply(x, conv.weight, options)
    return y if conv.bias is None else y + conv.bias.view(-1, 1, 1)


class _RoundingConvolution(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, w, options):
        x, w = tf32_rounded(x), tf32_rounded(w)
        ctx.save_for_backward(x, w)
        ctx.options = options
        return F.conv_transpose2d(x, w, None, *options)

    @staticmethod
    def backward(ctx, dy):
        x, w = (t.detach().requires_grad_() for t in ctx.saved_tensors)
        with torch.enable_grad():
            y = F.conv_transpose2d(x, w, None, *ctx.options)
        return *torch.autograd.grad(y, (x, w), tf32_rounded(dy)), None


def multiplied_in_tf32(theirs: Error, rounding: Error) -> bool:
    """Whether PyTorch, if allowed to use TF32, did: compares its error with that of operands rounded to TF32."""
    return theirs.rms > rounding.rms / 2


def _row(what, cls, actual, truths, torch_result) -> Row:
    truth, scale = truths[what], None
    if what == "grad conv_transpose.bias":
        # Zero in mathematics, as batch norm removes what the bias adds. Compared with its neighbour, a sum as long.
        scale = max(_rms(truth), _rms(truths["grad conv_transpose.weight"]))
    ours, theirs = error(actual, truth, scale), error(torch_result, truth, scale)
    ok = within_policy(actual, truth, ours, theirs) or (scale is not None and ours.max <= _NOISE)
    close = None
    if cls == "fp32" and not what.startswith("grad"):
        close = is_close(actual, torch_result)
        # Where PyTorch's own result is further from the truth than assert_close allows, ours cannot be close to both.
        ok = ok and (close or within_chance(_far(actual, truth), _far(torch_result, truth)))
    return Row(what, cls, ours, theirs, close, ok)


def within_chance(ours: int, theirs: int) -> bool:
    """Whether no more than 1.1 times as many, and what chance explains, and some of theirs at all."""
    return theirs > 0 and ours <= RATIO * theirs + 3 * theirs**0.5


def _far(actual, truth) -> int:
    """The number of elements that torch.testing.assert_close would report."""
    expected = truth.to(actual.dtype)
    return int((~torch.isclose(actual, expected, rtol=1.3e-6, atol=1e-5, equal_nan=False)).sum())


def is_close(actual: torch.Tensor, expected: torch.Tensor) -> bool:
    """Whether torch.testing.assert_close passes with its defaults for the dtype."""
    try:
        torch.testing.assert_close(actual, expected)
    except AssertionError:
        return False
    return True


def _forward(model, x):
    x = x.detach().clone().requires_grad_()
    return x, model(x)


def _backward(model, x, y, dy) -> dict[str, torch.Tensor]:
    names, parameters = zip(*model.named_parameters())
    results = {"output": y.detach()}
    grads = torch.autograd.grad(y, [x, *parameters], dy)
    results.update(zip((f"grad {name}" for name in ("x", *names)), grads))
    results["batch_norm.running_mean"] = model.batch_norm.running_mean
    results["batch_norm.running_var"] = model.batch_norm.running_var
    return results


def incoming_gradient(unpooled, pooled, num_groups, weight, near_tie, seed, kink=False) -> torch.Tensor:
    """A gradient of the group norm's output that gives nothing to pooling windows (2x2, stride 2) with a near tie.

    kink: also nothing to windows whose maximum is as near to 0, where LeakyReLU's derivative jumps.

    The gradient that flows back through a group norm is the part of dy * weight that is orthogonal, within each group,
    to 1 and to the pooled values. So that part is drawn first, with zeros at these windows. Any multiples of those two
    are then added.
    """
    windows = unpooled.unfold(2, 2, 2).unfold(3, 2, 2).flatten(4)
    first, second = windows.topk(2).values.unbind(-1)

    def grouped(t):
        return t.reshape(t.shape[0], num_groups, -1)

    decided = first - second > near_tie
    if kink:
        decided &= first.abs() > near_tie
    keep = grouped(decided.to(pooled.dtype))
    kept = keep.sum(2, keepdim=True)
    generator = torch.Generator().manual_seed(seed)

    def normal(shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(pooled.device)

    values = grouped(pooled)
    values = values - (values * keep).sum(2, keepdim=True) / kept
    inside = values * keep
    v = normal(values.shape) * keep
    v = v - keep * v.sum(2, keepdim=True) / kept
    v = v - inside * (v * inside).sum(2, keepdim=True) / inside.square().sum(2, keepdim=True)
    v = v + normal(kept.shape) + normal(kept.shape) * values
    return v.reshape(pooled.shape) / weight.view(-1, 1, 1)


@contextlib.contextmanager
def tf32(allowed: bool):
    """A context in which PyTorch's convolutions, and numerics="auto", may (or may not) use TF32."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = allowed
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = before


def _held(truth: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The truth in float64, with infinities where it is too large for a dtype."""
    truth = truth.detach().double()
    held = truth.to(dtype)
    return torch.where(held.isinf(), held.double(), truth) if held.isinf().any() else truth


def _rms(t: torch.Tensor) -> float:
    return t.square().mean().sqrt().item()
