"""Max pooling of tanh, and of tanh of a batch norm, fused in one kernel each way."""

import functools

import numpy as np
import torch
import torch.nn.functional as F

from cupy_kernels.bn_tanh_max_pool import (
    bn_tanh_max_pool_backward,
    bn_tanh_max_pool_backward_reduce,
    bn_tanh_max_pool_forward,
    bn_tanh_max_pool_workspace,
)

from ..calls import call, dense_after
from ..cases import Case, first, odd_planes, sums_of
from ..interop import accumulator_dtype, check_floating, dense, flag
from ..untraced import untraced
from .batch_norm import batch_norm_gradients, norm_inputs, of_tensors, statistics, torch_norm
from .batch_norm_arguments import Norm
from .gradients import Function, apply, will_need_grad
from .max_pool import OVERLAPPING, max_pool_gradient, new_argmax, pool_of, pooled_shape
from .tanh import tanh_gradient

__all__ = ["bn_tanh_max_pool2d", "tanh_max_pool2d"]


def _forward(new, x, pool, ceil_mode, keep):
    y = new(pooled_shape(x.shape, pool, ceil_mode), x.dtype)
    argmax = new_argmax(new, y, pool) if keep else None
    bn_tanh_max_pool_forward(x, None, None, None, None, y, argmax, pool)
    return y, argmax


def _backward(new, dy, y, argmax, pool, shape):
    dx = new(shape, dy.dtype)
    bn_tanh_max_pool_backward(dy, y, argmax, None, None, None, None, None, dx, pool)
    return dx


class _TanhMaxPool2d(Function):
    @staticmethod
    def forward(ctx, x, pool, ceil_mode):
        y, argmax = call(_forward, x, pool, ceil_mode, True)
        ctx.save_for_backward(y, argmax)
        ctx.pool, ctx.shape = pool, x.shape
        return y

    @staticmethod
    def backward(ctx, dy):
        y, argmax = ctx.saved_tensors
        if torch.is_grad_enabled():
            return max_pool_gradient(tanh_gradient(dy, y), argmax, ctx.pool, ctx.shape), None, None
        return call(_backward, dense(dy), y, argmax, ctx.pool, ctx.shape), None, None


def _normed_forward(new, x, weight, bias, mean, var, batches, *, training, momentum, eps, pool, ceil_mode, keep):
    moments = statistics(new, x, mean, var, batches, training, momentum, eps)
    y = new(pooled_shape(x.shape, pool, ceil_mode), x.dtype)
    argmax = new_argmax(new, y, pool) if keep else None
    bn_tanh_max_pool_forward(x, moments[0], moments[1], weight, bias, y, argmax, pool)
    return y, moments, argmax


def _normed_backward(new, dy, x, weight, wide_weight, bias, moments, y, argmax, *, training, needed, pool, shape):
    need_x, need_weight, need_bias = needed
    dx = new(shape, dy.dtype) if need_x else None
    dweight, dbias = new.like(weight if need_weight else None), new.like(bias if need_bias else None)
    mean, invstd = moments[0], moments[1]
    sums = None
    if training or need_weight or need_bias:
        sums = new.scratch((2, *mean.shape), np.float64)
        partial = new.scratch(bn_tanh_max_pool_workspace(y.shape), np.float64)
        bn_tanh_max_pool_backward_reduce(dy, y, argmax, x, mean, invstd, sums, dweight, dbias, partial, pool)
    if need_x:
        sums = sums if training else None
        bn_tanh_max_pool_backward(dy, y, argmax, x, mean, invstd, wide_weight, sums, dx, pool)
    return dx, dweight, dbias


class _BnTanhMaxPool2d(Function):
    @staticmethod
    def forward(ctx, x, weight, bias, norm, running, check, options):
        training, pool = options["training"], options["pool"]
        wide = _wide(x, weight, bias)
        y, moments, argmax = call(_normed_forward, x, *wide, *running, check=check, keep=True, **options)
        need_x = training or any(ctx.needs_input_grad[1:3])
        saved = (x if need_x else None, weight, bias, moments, y, argmax)
        ctx.save_for_backward(*saved, *norm.applied())
        ctx.pool, ctx.shape, ctx.training, ctx.eps = pool, x.shape, training, options["eps"]
        return y

    @staticmethod
    def backward(ctx, dy):
        x, weight, bias, moments, y, argmax, _, _ = ctx.saved_tensors
        needed = ctx.needs_input_grad[:3]
        if torch.is_grad_enabled():
            dz = max_pool_gradient(tanh_gradient(dy, y), argmax, ctx.pool, ctx.shape)
            gradients = batch_norm_gradients(dz, x, weight, bias, moments, None, needed, ctx.training, ctx.eps)
        else:
            options = {"training": ctx.training, "needed": needed, "pool": ctx.pool, "shape": ctx.shape}
            wide_weight, _ = _wide(y, weight, None)
            gradients = call(_normed_backward, dense(dy), x, weight, wide_weight, bias, moments, y, argmax, **options)
        return *gradients, *[None] * 4


def _wide(x, *parameters):
    """The parameters in the accumulator's dtype, which the kernels take."""
    return [None if parameter is None else parameter.to(accumulator_dtype(x)) for parameter in parameters]


@untraced
def tanh_max_pool2d(
    input: torch.Tensor,
    kernel_size: int | tuple[int, int],
    stride: int | tuple[int, int] | None = None,
    padding: int | tuple[int, int] = 0,
    dilation: int | tuple[int, int] = 1,
    ceil_mode: bool = False,
) -> torch.Tensor:
    """y = max_pool2d(tanh(x)), reading x once each way. Arguments and errors are those of `max_pool2d`.

    The result, and the element of a window that gets its gradient, are bit for bit those of `max_pool2d(tanh(x))`. If
    tanh maps different elements to the same value, the first of them is the maximum. An element that is the maximum of
    no window gets gradient 0, even if it is NaN. In PyTorch, tanh's own gradient is NaN there.
    """
    check_floating(input=input)
    pool, x, ceil_mode = pool_of(kernel_size, stride, padding, dilation), dense(input), flag(ceil_mode, "ceil_mode")
    if will_need_grad(x):
        return apply(_TanhMaxPool2d, x, pool, ceil_mode)
    return call(_forward, x, pool, ceil_mode, False)[0]


@untraced
def bn_tanh_max_pool2d(
    input: torch.Tensor,
    running_mean: torch.Tensor | None,
    running_var: torch.Tensor | None,
    weight: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    kernel_size: int | tuple[int, int] = 2,
    stride: int | tuple[int, int] | None = None,
    padding: int | tuple[int, int] = 0,
    dilation: int | tuple[int, int] = 1,
    ceil_mode: bool = False,
    *,
    num_batches_tracked: torch.Tensor | None = None,
) -> torch.Tensor:
    """y = max_pool2d(tanh(batch_norm(x))), x [N, C, H, W]. Arguments and errors: of `batch_norm` and `max_pool2d`.

    The statistics read x once, and the rest reads it once more; the gradient reads it twice. The result is bit for bit
    that of `max_pool2d(batch_norm_tanh(x))`. As in `tanh_max_pool2d`, an element that is the maximum of no window gets
    none of its gradient. A refused call changes nothing.
    """
    arguments = (running_mean, running_var, weight, bias, training, momentum, eps, num_batches_tracked)
    return _bn_tanh_max_pool2d(
        input, arguments, pool_of(kernel_size, stride, padding, dilation), flag(ceil_mode, "ceil_mode")
    )


def _bn_tanh_max_pool2d(input, arguments, pool, ceil_mode, keep=False):
    """The result. With `keep`, for calls without autograd, also the statistics that were applied, and argmax."""
    norm = Norm.checked(*arguments)
    options = {"training": norm.training, "momentum": norm.momentum, "eps": norm.eps}
    options.update(pool=pool, ceil_mode=ceil_mode)

    def check():
        norm.check(input)
        check_input(input)
        pooled_shape(input.shape, pool, ceil_mode)

    x, weight, bias = dense_after(check, input, norm.weight, norm.bias)
    running = norm.buffers()
    if not keep and will_need_grad(x, weight, bias):
        y = apply(_BnTanhMaxPool2d, x, weight, bias, norm, running, check, options)
    else:
        wide = _wide(x, weight, bias)
        y, moments, argmax = call(_normed_forward, x, *wide, *running, check=check, keep=keep, **options)
    norm.note_update(running)
    return (y, moments, argmax) if keep else y


def check_input(input) -> None:
    """Raises RuntimeError for an input that is not a batch of images."""
    if input.dim() != 4:
        raise RuntimeError(f"bn_tanh_max_pool2d takes input [N, C, H, W], received shape {tuple(input.shape)}")


def _x(images):
    return {"x": torch.randn(odd_planes(images))}


def clear_winners(before_pooling, kernel_size=2, stride=2, padding=0):
    """A gradient that is 0 where rounding may decide which element of a window is the maximum."""

    def gradient(dtype, **tensors):
        with torch.no_grad():
            y = F.pad(first(before_pooling(*tensors.values())), [padding] * 4, value=-float("inf"))
        largest, second = (
            y.unfold(2, kernel_size, stride).unfold(3, kernel_size, stride).flatten(4).topk(2).values.unbind(-1)
        )
        return torch.randn_like(largest) * (largest - second > min(64 * torch.finfo(dtype).eps, 0.1))

    return gradient


_norm_inputs = functools.partial(norm_inputs, shape=odd_planes)
_FILES = ("bn_tanh_max_pool.cu",)
CASES = (
    *(
        Case(
            f"bn_tanh_max_pool2d, {'training' if training else 'eval'}",
            (*_FILES, "batch_norm.cu"),
            of_tensors(bn_tanh_max_pool2d, training),
            torch_norm(lambda y: F.max_pool2d(y.tanh(), 2), training),
            _norm_inputs,
            sums_of(_norm_inputs),
            gradient=clear_winners(torch_norm(torch.tanh, training)),
        )
        for training in (True, False)
    ),
    Case(
        "tanh_max_pool2d",
        _FILES,
        lambda x: tanh_max_pool2d(x, 2),
        lambda x: F.max_pool2d(x.tanh(), 2),
        _x,
        gradient=clear_winners(torch.tanh),
    ),
    Case(
        "tanh_max_pool2d, overlapping",
        _FILES,
        lambda x: tanh_max_pool2d(x, **OVERLAPPING),
        lambda x: F.max_pool2d(x.tanh(), **OVERLAPPING),
        _x,
        gradient=clear_winners(torch.tanh, **OVERLAPPING),
    ),
)
