"""ops.batch_norm, for batch_norm and batch_norm_tanh."""

import functools

import torch

from ...formats import channels_last, dense_in, empty_in
from ...interop import accumulator_dtype, dense, flag, number
from ...registration import fake_gradients, gradients_of_op, in_place_of, ops, register, results_of
from .. import batch_norm as eager
from ..batch_norm_arguments import Norm
from ..gradients import second_gradients

# What every batch norm takes before its other options, and how a call that mutates its buffers is told.
ARGUMENTS = (
    "Tensor input, Tensor(a!)? running_mean, Tensor(b!)? running_var, Tensor? weight, Tensor? bias, bool training, "
    "float momentum, float eps, Tensor(c!)? num_batches_tracked"
)


def overload(packet, running_mean, training: bool, batches):
    """The overload that such a call needs."""
    return packet.updating if training and (running_mean is not None or batches is not None) else packet.default


@in_place_of
def batch_norm(*args, **options):
    return _batch_norm(*args, tanh=False, **options)


@in_place_of
def batch_norm_tanh(*args, **options):
    return _batch_norm(*args, tanh=True, **options)


def _batch_norm(
    input,
    running_mean,
    running_var,
    weight=None,
    bias=None,
    training=False,
    momentum=0.1,
    eps=1e-5,
    *,
    num_batches_tracked=None,
    tanh,
):
    momentum, eps = number(momentum, "momentum"), number(eps, "eps")
    arguments = running_mean, running_var, weight, bias, flag(training, "training"), momentum, eps
    op = overload(ops.batch_norm, running_mean, training, num_batches_tracked)
    return op(input, *arguments, num_batches_tracked, tanh)[0]


def _run(input, *options):
    *arguments, tanh, keep = options
    found = eager._batch_norm(input, arguments, tanh, keep)
    return found if keep else results_of(input, found, None)


def empty_moments(x: torch.Tensor) -> torch.Tensor:
    """Memory for mean and 1 / standard deviation of each channel."""
    return x.new_empty((2, x.shape[1]), dtype=accumulator_dtype(x))


def _fake(input, *options):
    *arguments, _, keep = options
    if input.dim() == 1 and not input.numel():
        return input.new_empty(input.shape), input.new_empty(0)
    Norm.checked(*arguments).check(input)
    y = empty_in(input, input.shape, channels_last(input))
    return results_of(input, y, empty_moments(input) if keep else None)


def applied(args) -> tuple:
    """`Norm.applied` of the arguments of an operator."""
    return Norm(*args[1:9]).applied()


def _save(args, results):
    x, _, _, weight, bias, *_, tanh, _ = args
    y, moments = results
    return x, weight, bias, moments, y if tanh else None, *applied(args)


def _first(ctx, dy):
    *tensors, y, _, _ = ctx.saved_tensors
    if y is not None and torch.is_grad_enabled():
        dy, y = ops.tanh_backward(dy, y), None
    needed = ctx.needs_input_grad[0], *ctx.needs_input_grad[3:5]
    found = ops.batch_norm_backward(dy, *tensors, y, ctx.args[5], ctx.args[7], needed)
    dx, dweight, dbias = gradients_of_op(found, needed)
    return dx, None, None, dweight, dbias


register(f"batch_norm({ARGUMENTS}, bool tanh, bool keep=False) -> (Tensor, Tensor)", _run, _fake, _save, _first)


def _gradient(dy, x, weight, bias, moments, y, training, eps, needed):
    last = channels_last(x)
    x, weight, bias = dense_in(x, last), dense(weight), dense(bias)
    found = eager.batch_norm_gradients(dy, x, weight, bias, moments, y, tuple(needed), training, eps, last)
    return results_of(dy, *found)


def _fake_gradient(dy, x, weight, bias, moments, y, training, eps, needed):
    return fake_gradients(dy, (empty_in(x, x.shape, channels_last(x)), weight, bias), needed)


def _second(ctx, *gradients):
    *tensors, moments, y = ctx.saved_tensors
    if y is not None:
        raise RuntimeError("ops.batch_norm_backward has a derivative only without y: apply ops.tanh_backward before it")
    definition = functools.partial(eager._definition, moments, *ctx.args[6:8])
    return second_gradients(definition, tensors, ctx.needs_input_grad[:4], *gradients)


register(
    "batch_norm_backward(Tensor dy, Tensor x, Tensor? weight, Tensor? bias, Tensor moments, Tensor? y, bool training, "
    "float eps, bool[3] needed) -> (Tensor, Tensor, Tensor)",
    _gradient,
    _fake_gradient,
    lambda args, results: args[:6],
    _second,
    outputs=3,
)
