"""Max pooling of an activation of a batch norm. It pools first, and reads the input once each way."""

import functools
import importlib
import inspect
import math

import numpy as np
import torch
import torch.nn.functional as F

from cupy_kernels.batch_norm import (
    batch_norm_apply,
    batch_norm_backward_sums,
    batch_norm_eval,
    batch_norm_workspace,
)
from cupy_kernels.bn_pool import bn_pool_backward, bn_pool_forward, bn_pool_statistics, takes_pool
from cupy_kernels.errors import UnsupportedError
from cupy_kernels.leaky_relu import leaky_relu_backward, leaky_relu_forward

from ..calls import call, prepared
from ..cases import Case, sums_of
from ..formats import channels_last, dense_in, restored, stored
from ..interop import number
from .batch_norm import batch_norm, norm_inputs, of_tensors, rows, torch_norm
from .batch_norm_arguments import Norm
from .bn_tanh_max_pool import clear_winners
from .gradients import Function, apply, gradients_of, will_need_grad
from .max_pool import OVERLAPPING, max_pool2d, new_argmax, pool_of, pooled_shape

_ACTIVATIONS = ("tanh", "leaky_relu")


def _forward(
    new,
    x,
    gamma,
    weight,
    bias,
    running_mean,
    running_var,
    batches,
    *,
    training,
    momentum,
    eps,
    pool,
    activation,
    parameter,
    last,
    keep,
):
    """Returns the result and, with `keep`, what a backward needs. gamma: weight in float32."""
    made = new if keep else new.scratch
    y = new(pooled_shape(x.shape, pool, False, last), x.dtype)
    pooled, moments = made(y.shape, x.dtype), made((2, _channels(x, last)), np.float32)
    argmax = new_argmax(new, y, pool) if keep else None
    partials = bn_pool_forward(x, gamma, pooled, argmax, pool, last, new.scratch if training else None)
    tanh = activation == "tanh"  # which batch norm's kernels apply themselves
    normed = y if tanh else new.scratch(y.shape, y.dtype)
    values, out, (mean, invstd) = rows(pooled, last), rows(normed, last), (moments[0], moments[1])
    if training:
        bn_pool_statistics(x, partials, running_mean, running_var, batches, mean, invstd, momentum, eps)
        batch_norm_apply(values, mean, invstd, weight, bias, out, tanh)
    else:
        batch_norm_eval(values, running_mean, running_var, weight, bias, out, mean, invstd, eps, tanh)
    if not tanh:
        leaky_relu_forward(normed, y, parameter)
    return (y, pooled, argmax, moments) if keep else (y, None, None, None)


def _backward(
    new, dy, x, gamma, weight, bias, y, pooled, argmax, moments, *, training, needed, pool, activation, parameter, last
):
    need_x, need_weight, need_bias = needed
    channels, (mean, invstd) = _channels(x, last), (moments[0], moments[1])
    dx, dweight, dbias = (new.like(t if needed else None) for t, needed in zip((x, weight, bias), needed))
    tanh, sums = activation == "tanh", None
    if training or need_weight or need_bias:
        dz, result = dy, y
        if not tanh:
            dz, result = new.scratch(dy.shape, dy.dtype), None
            leaky_relu_backward(dy, y, dz, parameter)  # y is positive where what it is of is
        dz, values, result = (rows(t, last) for t in (dz, pooled, result))
        workspace = new.scratch(batch_norm_workspace(dz), np.float64)
        sums = workspace[: 2 * channels].reshape((2, channels))
        batch_norm_backward_sums(dz, values, mean, invstd, weight, sums, dweight, dbias, workspace, result)
    if need_x:
        how = pool, last, None if tanh else parameter
        bn_pool_backward(dy, y, argmax, x, mean, invstd, gamma, sums if training else None, dx, *how)
    return dx, dweight, dbias


def _channels(x, last):
    return x.shape[-1 if last else 1]


class _BnActivationMaxPool2d(Function):
    @staticmethod
    def forward(ctx, x, weight, bias, shift, norm, running, check, options):
        y, *kept = _call(x, weight, bias, running, check, options, keep=True)
        ctx.save_for_backward(x, weight, bias, shift, y, *kept, *norm.applied())
        ctx.options = options
        return y

    @staticmethod
    def backward(ctx, dy):
        x, weight, bias, shift, *kept, running_mean, running_var = ctx.saved_tensors
        *needed, need_shift = ctx.needs_input_grad[:4]
        found = gradients(dy, x, weight, bias, kept, (running_mean, running_var), tuple(needed), ctx.options)
        return *found, torch.zeros_like(shift) if need_shift else None, *[None] * 4


def gradients(dy, x, weight, bias, kept, applied, needed, options):
    """(dx, dweight, dbias), None for those that are not needed. kept: y, and what the forward kept for the backward."""
    if torch.is_grad_enabled():

        def parts(x, weight, bias):
            z = batch_norm(x, *applied, weight, bias, options["training"], eps=options["eps"])
            return max_pool2d(activation_of(options["activation"], options["parameter"])(z), *options["pool"])

        with torch.autocast(dy.device.type, enabled=False):
            return gradients_of(parts, (x, weight, bias), needed, dy)
    last = options["last"]
    names = ("training", "pool", "activation", "parameter", "last")
    dy, x, y, pooled, argmax = (stored(t, last) for t in (dense_in(dy, last), x, *kept[:3]))
    arguments = (dy, x, _wide(weight), weight, bias, y, pooled, argmax, kept[3])
    dx, *others = call(_backward, *arguments, needed=needed, **{name: options[name] for name in names})
    return restored(dx, last), *others


def _call(x, weight, bias, running, check, options, keep):
    last = options["last"]
    tensors = stored(x, last), _wide(weight), weight, bias
    *results, moments = call(_forward, *tensors, *running, check=check, keep=keep, **options)
    return *(restored(t, last) for t in results), moments


def _wide(weight):
    return None if weight is None else weight.float()


def activation_of(activation, parameter):
    """The activation as a function of one tensor."""
    function = getattr(importlib.import_module(f".{activation}", __package__), activation)
    takes_one = "negative_slope" in inspect.signature(function).parameters
    return functools.partial(function, negative_slope=parameter) if takes_one else function


def bn_activation_max_pool2d(input, arguments, shift, activation, negative_slope, pool, keep=False):
    """max_pool2d(act(batch_norm(input)), *pool). With `keep`, for calls without autograd, also what a backward needs.

    arguments: those of batch_norm, see `Norm`.
    shift: None, or in training the bias that was added to each channel of input. The statistics subtract it again, so
        its gradient is 0.
    pool: a `Pool`.

    The other arguments are those of `conv_bn_activation_max_pool_group_norm`. The result has the memory format of
    input. Raises UnsupportedError for float64 and for windows that `takes_pool` refuses, and the errors of batch_norm.
    """
    norm = Norm.checked(*arguments)

    def check():
        check_supported(input, activation, pool)
        norm.check(input)
        pooled_shape(input.shape, pool, False)

    last = channels_last(input)
    x, weight, bias = prepared(check, last, input, norm.weight, norm.bias)
    running = norm.buffers()
    options = {
        "training": norm.training,
        "momentum": norm.momentum,
        "eps": norm.eps,
        "pool": pool,
        "activation": activation,
        "parameter": number(negative_slope, "negative_slope"),
        "last": last,
    }
    if not keep and will_need_grad(x, weight, bias, shift):
        results = apply(_BnActivationMaxPool2d, x, weight, bias, shift, norm, running, check, options)
    else:
        results = _call(x, weight, bias, running, check, options, keep)
        results = results if keep else results[0]
    norm.note_update(running)
    return results


def check_supported(input, activation, pool) -> None:
    """Raises UnsupportedError for what the kernels do not support."""
    if activation not in _ACTIVATIONS:
        raise UnsupportedError(f"the activation is {activation!r}, not one of {', '.join(_ACTIVATIONS)}")
    if input.dtype == torch.float64:
        raise UnsupportedError("the input is float64")
    if input.dim() != 4 or not math.prod(input.shape):
        raise UnsupportedError(f"the input must be [N, C, H, W], with elements, received shape {tuple(input.shape)}")
    if not takes_pool(pool):
        raise UnsupportedError(
            f"the pooling is not over 2x2 windows, or 3x3 ones with padding 0 or 1, two apart: received {pool}"
        )


def _case(activation, training, window):
    pool, act = pool_of(**{"stride": 2, "padding": 0, "dilation": 1, **window}), getattr(F, activation)

    def ours(x, *arguments):
        return bn_activation_max_pool2d(x, (*arguments, 0.1, 1e-5, None), None, activation, 0.01, pool)

    return Case(
        f"batch norm, {activation} and pooling by {pool.kernel_size}, {'training' if training else 'eval'}",
        ("bn_pool.cu", "batch_norm.cu"),
        of_tensors(ours, training),
        torch_norm(lambda y: F.max_pool2d(act(y), **window), training),
        norm_inputs,
        sums_of(norm_inputs),
        gradient=clear_winners(torch_norm(act, training), **window),
    )


CASES = (
    _case("tanh", True, {"kernel_size": 2}),
    _case("leaky_relu", True, OVERLAPPING),
    _case("tanh", False, OVERLAPPING),
)
