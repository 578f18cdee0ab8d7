"""Max pooling of tanh, and of tanh of a batch norm, in one kernel each way."""

import torch

from cupy_kernels.bn_tanh_max_pool import (
    bn_tanh_max_pool_backward,
    bn_tanh_max_pool_backward_reduce,
    bn_tanh_max_pool_forward,
    bn_tanh_max_pool_workspace,
)

from ..interop import check_floating, dense, run
from .batch_norm import applied_statistics, batch_norm_gradients, batch_norm_mean_invstd, check_batch_norm
from .max_pool import max_pool_gradient, new_taps, pool_of, pooled_shape, will_need_grad
from .tanh import tanh_gradient


class _TanhMaxPool2d(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, pool, ceil_mode, need_taps):
        x = dense(x)
        y = x.new_empty(pooled_shape(x.shape, pool, ceil_mode))
        taps = new_taps(y, pool) if need_taps else None
        run(bn_tanh_max_pool_forward, x, None, None, None, None, y, taps, *pool)
        ctx.save_for_backward(y, taps)
        ctx.pool, ctx.shape = pool, x.shape
        return y

    @staticmethod
    def backward(ctx, dy):
        y, taps = ctx.saved_tensors
        if torch.is_grad_enabled():
            return max_pool_gradient(tanh_gradient(dy, y), taps, ctx.pool, ctx.shape), None, None, None
        dx = y.new_empty(ctx.shape)
        run(bn_tanh_max_pool_backward, dense(dy), y, taps, None, None, None, None, None, dx, *ctx.pool)
        return dx, None, None, None


class _BnTanhMaxPool2d(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, mean, invstd, running, training, eps, pool, ceil_mode, need_taps):
        y = x.new_empty(pooled_shape(x.shape, pool, ceil_mode))
        taps = new_taps(y, pool) if need_taps else None
        run(bn_tanh_max_pool_forward, x, mean, invstd, _cast(weight, mean), _cast(bias, mean), y, taps, *pool)
        need_x = training or any(ctx.needs_input_grad[1:3])
        ctx.save_for_backward(x if need_x else None, weight, bias, mean, invstd, y, taps, *running)
        ctx.pool, ctx.shape, ctx.training, ctx.eps = pool, x.shape, training, eps
        return y

    @staticmethod
    def backward(ctx, dy):
        x, weight, bias, mean, invstd, y, taps, _, _ = ctx.saved_tensors
        need_dx, need_dweight, need_dbias = needed = ctx.needs_input_grad[:3]
        if torch.is_grad_enabled():
            dz = max_pool_gradient(tanh_gradient(dy, y), taps, ctx.pool, ctx.shape)
            gradients = batch_norm_gradients(dz, x, weight, bias, mean, invstd, None, needed, ctx.training, ctx.eps)
            return *gradients, *[None] * 8
        dy = dense(dy)
        dx = y.new_empty(ctx.shape) if need_dx else None
        dweight = torch.empty_like(weight) if need_dweight else None
        dbias = torch.empty_like(bias) if need_dbias else None
        sums = None
        if ctx.training or need_dweight or need_dbias:
            sums = mean.new_empty((2, *mean.shape), dtype=torch.float64)
            partial = sums.new_empty(bn_tanh_max_pool_workspace(y.shape))
            run(
                bn_tanh_max_pool_backward_reduce, dy, y, taps, x, mean, invstd, sums, dweight, dbias, partial, *ctx.pool
            )
        if need_dx:
            sums = sums if ctx.training else None
            run(bn_tanh_max_pool_backward, dy, y, taps, x, mean, invstd, _cast(weight, mean), sums, dx, *ctx.pool)
        return dx, dweight, dbias, *[None] * 8


def _cast(parameter, mean):
    return None if parameter is None else parameter.to(mean.dtype)


def tanh_max_pool2d(
    input: torch.Tensor,
    kernel_size: int | tuple[int, int],
    stride: int | tuple[int, int] | None = None,
    padding: int | tuple[int, int] = 0,
    dilation: int | tuple[int, int] = 1,
    ceil_mode: bool = False,
) -> torch.Tensor:
    """y = max_pool2d(tanh(x)) in one pass over x each way; arguments and errors are those of `max_pool2d`.

    The result, and which element of a window gets its gradient, equal bit for bit those of `max_pool2d(tanh(x))`: tanh
    makes ties of elements that differ, and the first of them wins. An element that wins no window gets gradient 0, even
    where it is NaN (tanh's own gradient would be NaN there).
    """
    check_floating(input=input)
    pool = pool_of(kernel_size, stride, padding, dilation)
    pooled_shape(input.shape, pool, ceil_mode)
    return _TanhMaxPool2d.apply(input, pool, bool(ceil_mode), will_need_grad(input))


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
    """y = max_pool2d(tanh(batch_norm(x))), x [N, C, H, W]; arguments and errors of `batch_norm` and of `max_pool2d`.

    The statistics take one pass over x, everything else one more; the gradient takes two. The result equals bit for
    bit `max_pool2d(batch_norm_tanh(x))`; as in `tanh_max_pool2d`, elements that win no window get nothing of its
    gradient. A refused call changes nothing.
    """
    check_batch_norm(input, running_mean, running_var, weight, bias, training, momentum, eps)
    if input.dim() != 4:
        raise RuntimeError(f"bn_tanh_max_pool2d takes input [N, C, H, W], received shape {tuple(input.shape)}")
    pool = pool_of(kernel_size, stride, padding, dilation)
    pooled_shape(input.shape, pool, ceil_mode)
    need_taps, training = will_need_grad(input, weight, bias), bool(training)
    x, weight, bias = dense(input), dense(weight), dense(bias)
    moments = batch_norm_mean_invstd(x, running_mean, running_var, training, momentum, eps, num_batches_tracked)
    running = applied_statistics(running_mean, running_var, training)
    options = (training, eps, pool, bool(ceil_mode), need_taps)
    return _BnTanhMaxPool2d.apply(x, weight, bias, *moments, running, *options)
