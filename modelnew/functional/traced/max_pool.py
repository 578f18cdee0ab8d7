"""ops.max_pool2d."""

import torch
from torch._C._functorch import is_batchedtensor

from ...calls import call
from ...formats import channels_last, dense_in, empty_in, restored, stored
from ...interop import check_floating, flag
from ...registration import in_place_of, ops, register, results_of
from .. import max_pool as eager
from ..max_pool import Pool, pool_of, pooled_shape

WINDOW = "int[2] kernel_size, int[2] stride, int[2] padding, int[2] dilation"


@in_place_of
def max_pool2d(input, kernel_size, stride=None, padding=0, dilation=1, ceil_mode=False, return_indices=False):
    window = pool_of(kernel_size, stride, padding, dilation)
    y, indices, _ = ops.max_pool2d(input, *window, flag(ceil_mode, "ceil_mode"), flag(return_indices, "return_indices"))
    return (y, indices) if return_indices else y


def as_pool(*window) -> Pool:
    """The `Pool` for the arguments named in WINDOW."""
    return Pool(*map(tuple, window))


def empty_argmax(y: torch.Tensor, pool: Pool, last: bool) -> torch.Tensor:
    """See `max_pool.new_argmax`."""
    return y.new_empty(stored(y, last).shape, dtype=torch.int32 if pool.wide_argmax else torch.uint8)


def _run(input, *options):
    *window, ceil_mode, return_indices, keep = options
    check_floating(input=input)
    last = channels_last(input)
    x = stored(dense_in(input, last), last)
    y, indices, argmax = call(eager._forward, x, as_pool(*window), ceil_mode, return_indices, keep, last)
    return results_of(input, restored(y, last), restored(indices, last), argmax)


def _fake(input, *options):
    *window, ceil_mode, return_indices, keep = options
    check_floating(input=input)
    pool, last = as_pool(*window), channels_last(input)
    y = empty_in(input, pooled_shape(input.shape, pool, ceil_mode), last)
    indices = torch.empty_like(y, dtype=torch.int64) if return_indices else None
    return results_of(input, y, indices, empty_argmax(y, pool, last) if keep else None)


def _is_last(x):
    """channels_last(x) of a saved tensor. Of an element of a batch in torch.func.vmap, torch tells only the strides."""
    return channels_last(torch.empty_strided(x.shape, x.stride(), device="meta") if is_batchedtensor(x) else x)


def _first(ctx, dy):
    x, argmax = ctx.saved_tensors
    last = _is_last(x)
    return (ops.max_pool2d_backward(dy, argmax, *ctx.args[1:5], stored(x, last).shape, last),)


register(
    f"max_pool2d(Tensor input, {WINDOW}, bool ceil_mode, bool return_indices, bool keep=False)"
    " -> (Tensor, Tensor, Tensor)",
    _run,
    _fake,
    lambda args, results: (args[0], results[2]),
    _first,
)


def _gradient(dy, argmax, *options):
    *window, shape, last = options
    return eager.max_pool_gradient(dy, argmax, as_pool(*window), tuple(shape), last)


def _fake_gradient(dy, argmax, *options):
    *_, shape, last = options
    return restored(dy.new_empty(shape), last)


register(
    f"max_pool2d_backward(Tensor dy, Tensor argmax, {WINDOW}, SymInt[] shape, bool last) -> Tensor",
    _gradient,
    _fake_gradient,
    lambda args, dx: args[1:2],
    lambda ctx, v: (ops.max_pool2d_select(v, *ctx.saved_tensors, *ctx.args[2:6], ctx.args[7]),),
)


def _select(x, argmax, *options):
    *window, last = options
    return eager._Select.forward(x, argmax, as_pool(*window), last)


def _second(ctx, v):
    x, argmax = ctx.saved_tensors
    last = ctx.args[6]
    return (ops.max_pool2d_backward(v, argmax, *ctx.args[2:6], stored(x, last).shape, last),)


register(
    f"max_pool2d_select(Tensor x, Tensor argmax, {WINDOW}, bool last) -> Tensor",
    _select,
    lambda x, argmax, *options: restored(x.new_empty(argmax.shape), options[-1]),
    lambda args, y: args[:2],
    _second,
)
