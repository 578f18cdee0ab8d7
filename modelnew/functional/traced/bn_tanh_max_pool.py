"""ops.tanh_max_pool2d and ops.bn_tanh_max_pool2d."""

import torch

from ...calls import call
from ...formats import empty_in
from ...interop import check_floating, dense, flag, number
from ...registration import fake_gradients, gradients_of_op, in_place_of, ops, register, results_of
from .. import bn_tanh_max_pool as eager
from ..batch_norm_arguments import Norm
from ..max_pool import pool_of, pooled_shape
from . import batch_norm
from .max_pool import WINDOW, as_pool, empty_argmax


@in_place_of
def tanh_max_pool2d(input, kernel_size, stride=None, padding=0, dilation=1, ceil_mode=False):
    return ops.tanh_max_pool2d(input, *pool_of(kernel_size, stride, padding, dilation), flag(ceil_mode, "ceil_mode"))[0]


def _run(input, *options):
    *window, ceil_mode, keep = options
    check_floating(input=input)
    return results_of(input, *call(eager._forward, dense(input), as_pool(*window), ceil_mode, keep))


def _fake(input, *options):
    *window, ceil_mode, keep = options
    check_floating(input=input)
    return _empty_results(input, as_pool(*window), ceil_mode, keep)


def _empty_results(input, pool, ceil_mode, keep):
    y = empty_in(input, pooled_shape(input.shape, pool, ceil_mode), False)
    return results_of(input, y, empty_argmax(y, pool, False) if keep else None)


def _first(ctx, dy):
    x, y, argmax = ctx.saved_tensors
    window = ctx.args[1:5]
    if torch.is_grad_enabled():
        return (ops.max_pool2d_backward(ops.tanh_backward(dy, y), argmax, *window, x.shape, False),)
    return (ops.tanh_max_pool2d_backward(dy, y, argmax, *window, x.shape),)


register(
    f"tanh_max_pool2d(Tensor input, {WINDOW}, bool ceil_mode, bool keep=False) -> (Tensor, Tensor)",
    _run,
    _fake,
    lambda args, results: (args[0], *results),
    _first,
)


def _gradient(dy, y, argmax, *options):
    *window, shape = options
    return call(eager._backward, dense(dy), y, argmax, as_pool(*window), torch.Size(shape))


register(
    f"tanh_max_pool2d_backward(Tensor dy, Tensor y, Tensor argmax, {WINDOW}, SymInt[] shape) -> Tensor",
    _gradient,
    lambda dy, y, argmax, *options: dy.new_empty(options[-1]),
)


@in_place_of
def bn_tanh_max_pool2d(
    input,
    running_mean,
    running_var,
    weight=None,
    bias=None,
    training=False,
    momentum=0.1,
    eps=1e-5,
    kernel_size=2,
    stride=None,
    padding=0,
    dilation=1,
    ceil_mode=False,
    *,
    num_batches_tracked=None,
):
    momentum, eps = number(momentum, "momentum"), number(eps, "eps")
    arguments = running_mean, running_var, weight, bias, flag(training, "training"), momentum, eps
    window = pool_of(kernel_size, stride, padding, dilation)
    op = batch_norm.overload(ops.bn_tanh_max_pool2d, running_mean, training, num_batches_tracked)
    return op(input, *arguments, num_batches_tracked, *window, flag(ceil_mode, "ceil_mode"))[0]


def _run_normed(input, *options):
    *arguments, kernel_size, stride, padding, dilation, ceil_mode, keep = options
    pool = as_pool(kernel_size, stride, padding, dilation)
    found = eager._bn_tanh_max_pool2d(input, arguments, pool, ceil_mode, keep)
    return found if keep else results_of(input, found, None, None)


def _fake_normed(input, *options):
    *arguments, kernel_size, stride, padding, dilation, ceil_mode, keep = options
    eager.check_input(input)
    Norm.checked(*arguments).check(input)
    y, argmax = _empty_results(input, as_pool(kernel_size, stride, padding, dilation), ceil_mode, keep)
    return results_of(input, y, batch_norm.empty_moments(input) if keep else None, argmax)


def _save_normed(args, results):
    x, _, _, weight, bias, *_ = args
    y, moments, argmax = results
    return x, weight, bias, moments, y, argmax, *batch_norm.applied(args)


def _first_normed(ctx, dy):
    x, weight, bias, moments, y, argmax, _, _ = ctx.saved_tensors
    training, eps, window = ctx.args[5], ctx.args[7], ctx.args[9:13]
    needed = ctx.needs_input_grad[0], *ctx.needs_input_grad[3:5]
    if torch.is_grad_enabled():
        dz = ops.max_pool2d_backward(ops.tanh_backward(dy, y), argmax, *window, x.shape, False)
        found = ops.batch_norm_backward(dz, x, weight, bias, moments, None, training, eps, needed)
    else:
        found = ops.bn_tanh_max_pool2d_backward(dy, x, weight, bias, moments, y, argmax, training, *window, needed)
    dx, dweight, dbias = gradients_of_op(found, needed)
    return dx, None, None, dweight, dbias


register(
    f"bn_tanh_max_pool2d({batch_norm.ARGUMENTS}, {WINDOW}, bool ceil_mode, bool keep=False)"
    " -> (Tensor, Tensor, Tensor)",
    _run_normed,
    _fake_normed,
    _save_normed,
    _first_normed,
)


def _gradient_normed(dy, x, weight, bias, moments, y, argmax, training, *options):
    *window, needed = options
    x, weight, bias = map(dense, (x, weight, bias))
    wide_weight, _ = eager._wide(y, weight, None)
    arguments = dense(dy), x, weight, wide_weight, bias, moments, y, argmax
    options = {"training": training, "needed": tuple(needed), "pool": as_pool(*window), "shape": x.shape}
    return results_of(dy, *call(eager._normed_backward, *arguments, **options))


def _fake_gradient_normed(dy, x, weight, bias, *options):
    return fake_gradients(dy, (empty_in(x, x.shape, False), weight, bias), options[-1])


register(
    "bn_tanh_max_pool2d_backward(Tensor dy, Tensor x, Tensor? weight, Tensor? bias, Tensor moments, Tensor y, "
    f"Tensor argmax, bool training, {WINDOW}, bool[3] needed) -> (Tensor, Tensor, Tensor)",
    _gradient_normed,
    _fake_gradient_normed,
)
