"""ops.bn_activation_max_pool2d."""

import torch

from ...formats import channels_last, dense_in, empty_in
from ...interop import dense
from ...registration import fake_gradients, gradients_of_op, ops, register, results_of
from .. import bn_pool as eager
from ..batch_norm_arguments import Norm
from ..gradients import gradients_of
from ..max_pool import pooled_shape
from . import batch_norm
from .max_pool import WINDOW, as_pool


def _run(input, *options):
    *arguments, shift, activation, slope, size, stride, padding, dilation, keep = options
    pool = as_pool(size, stride, padding, dilation)
    found = eager.bn_activation_max_pool2d(input, arguments, shift, activation, slope, pool, keep)
    return found if keep else results_of(input, found, None, None, None)


def _fake(input, *options):
    *arguments, _, activation, _, size, stride, padding, dilation, keep = options
    pool = as_pool(size, stride, padding, dilation)
    eager.check_supported(input, activation, pool)
    Norm.checked(*arguments).check(input)
    y = empty_in(input, pooled_shape(input.shape, pool, False), channels_last(input))
    if not keep:
        return results_of(input, y, None, None, None)
    return y, torch.empty_like(y), torch.empty_like(y, dtype=torch.uint8), batch_norm.empty_moments(input)


def _save(args, results):
    x, _, _, weight, bias, *_ = args
    return x, weight, bias, args[9], *results, *batch_norm.applied(args)


def _first(ctx, dy):
    x, weight, bias, shift, *kept, running_mean, running_var = ctx.saved_tensors
    training, eps, activation, slope, *window = ctx.args[5], ctx.args[7], *ctx.args[10:16]
    needed = ctx.needs_input_grad[0], *ctx.needs_input_grad[3:5]
    if torch.is_grad_enabled():

        def parts(x, weight, bias):
            arguments = running_mean, running_var, weight, bias, training, 0.0, eps, None, False
            y = eager.activation_of(activation, slope)(ops.batch_norm.default(x, *arguments)[0])
            return ops.max_pool2d(y, *window, False, False)[0]

        found = gradients_of(parts, (x, weight, bias), needed, dy)
    else:
        options = training, activation, slope, *window, needed
        found = ops.bn_activation_max_pool2d_backward(dy, x, weight, bias, *kept, *options)
    dx, dweight, dbias = gradients_of_op(found, needed)
    dshift = torch.zeros_like(shift) if ctx.needs_input_grad[9] else None
    return dx, None, None, dweight, dbias, *[None] * 4, dshift


register(
    f"bn_activation_max_pool2d({batch_norm.ARGUMENTS}, Tensor? shift, str activation, float negative_slope, {WINDOW}, "
    "bool keep=False) -> (Tensor, Tensor, Tensor, Tensor)",
    _run,
    _fake,
    _save,
    _first,
)


def _gradient(dy, x, weight, bias, y, pooled, argmax, moments, training, activation, slope, *options):
    *window, needed = options
    last = channels_last(x)
    kept = (*(dense_in(t, last) for t in (y, pooled, argmax)), moments)
    options = {
        "training": training,
        "pool": as_pool(*window),
        "activation": activation,
        "parameter": slope,
        "last": last,
    }
    tensors = dense_in(x, last), dense(weight), dense(bias)
    return results_of(dy, *eager.gradients(dy, *tensors, kept, None, tuple(needed), options))


def _fake_gradient(dy, x, weight, bias, *options):
    return fake_gradients(dy, (empty_in(x, x.shape, channels_last(x)), weight, bias), options[-1])


register(
    "bn_activation_max_pool2d_backward(Tensor dy, Tensor x, Tensor? weight, Tensor? bias, Tensor y, Tensor pooled, "
    f"Tensor argmax, Tensor moments, bool training, str activation, float negative_slope, {WINDOW}, bool[3] needed)"
    " -> (Tensor, Tensor, Tensor)",
    _gradient,
    _fake_gradient,
)
