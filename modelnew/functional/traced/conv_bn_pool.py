"""ops.conv_bn_activation_max_pool_group_norm."""

import functools

import torch

from cupy_kernels import conv_bn_pool as kernels
from cupy_kernels.conv_transpose_mma import MANY_IMAGES
from cupy_kernels.errors import UnsupportedError
from cupy_kernels.plan import ALIGNMENT, room

from ... import autocast
from ...formats import empty_in
from ...interop import NUMPY, aligned, check_floating, dense, integer, number, pair
from ...numerics import check_numerics, settled, settled_choice
from ...registration import composite, fake_gradients, gradients_of_op, in_place_of, ops, register, results_of, traced
from .. import conv_bn_pool as eager
from ..gradients import gradients_of
from . import batch_norm
from .conv_transpose import flops


@in_place_of
def conv_bn_activation_max_pool_group_norm(*args, **options):
    return autocast.result_of_norm(_overload(ops.conv_bn_activation_max_pool_group_norm, *args, **options)[0])


def conv_bn_activation_max_pool_group_norm_or_parts(*args, together, **options):
    """The same; where its kernels do not take the call, the operators one by one, or some together, see `fusions`."""
    return _overload(ops.conv_bn_activation_max_pool_group_norm_or_parts, *args, together, **options)


def _overload(
    packet,
    input,
    running_mean,
    running_var,
    weight=None,
    bias=None,
    training=False,
    momentum=0.1,
    eps=1e-5,
    *more,
    conv_weight,
    conv_bias=None,
    padding=0,
    activation="tanh",
    negative_slope=0.01,
    num_groups,
    group_weight=None,
    group_bias=None,
    group_eps=1e-5,
    num_batches_tracked=None,
    numerics="auto",
):
    """Calls one of a packet's overloads. more: what it takes besides."""
    check_numerics(numerics)
    momentum, eps = number(momentum, "momentum"), number(eps, "eps")
    arguments = running_mean, running_var, weight, bias, bool(training), momentum, eps
    conv = conv_weight, conv_bias, pair(padding, "padding"), activation, number(negative_slope, "negative_slope")
    group = integer(num_groups, "num_groups"), group_weight, group_bias, number(group_eps, "group_eps")
    op = batch_norm.overload(packet, running_mean, training, num_batches_tracked)
    return op(input, *arguments, num_batches_tracked, *conv, *group, numerics, *more)


@in_place_of
def conv_bn_tanh_max_pool_group_norm(*args, **options):
    return conv_bn_activation_max_pool_group_norm(*args, activation="tanh", **options)


ARGUMENTS = (
    f"{batch_norm.ARGUMENTS}, Tensor conv_weight, Tensor? conv_bias, int[2] padding, str activation, "
    "float negative_slope, int num_groups, Tensor? group_weight, Tensor? group_bias, float group_eps, str numerics"
)


def _settle(input, *options):
    *others, numerics = options
    choice = settled(eager._class(numerics, input), input)
    _check_supported(input, *others, choice)  # here, so that no mode sees an operator that is refused
    return input, *others, choice


def _check_supported(input, running_mean, running_var, weight, bias, training, momentum, eps, batches, *options):
    """UnsupportedError for calls that the kernels do not take."""
    conv_weight, conv_bias, padding, activation, slope, groups, group_weight, group_bias, _, numerics = options
    kernels.struct_of(activation)
    eager._check_slope(slope)
    others = conv_weight, conv_bias, running_mean, running_var, weight, bias, group_weight, group_bias
    eager._check_mixture(input, batches, *others)
    check_floating(input=input)
    if input.dim() == conv_weight.dim() == 4:
        images = 1 if input.shape[0] else 0  # of more, the number does not matter
        shapes = (images, *map(int, input.shape[1:])), NUMPY[input.dtype], tuple(map(int, conv_weight.shape))
        eager._plan(*shapes, tuple(padding), groups, settled_choice(numerics, input))


def _run(input, *options):
    *others, numerics, keep = options
    choice = settled_choice(numerics, input)
    if not keep:
        return results_of(input, eager.fused(input, *others, choice), None)
    conv_weight, _, padding = others[8:11]
    groups = others[13]
    return eager.fused(input, *others, choice, kept_bytes(input, conv_weight, padding, groups, choice))


def _fake(input, *options):
    *others, keep = options
    running_mean, running_var, weight, bias, training, momentum, eps, _, *rest = others
    conv_weight, conv_bias, padding, _, _, groups, group_weight, group_bias, _, numerics = rest
    _check_supported(input, *others)
    eager.check_batch_norm_call(running_mean, running_var, training, momentum, eps)
    one, w = (t.new_empty(tuple(map(int, t.shape))) for t in (input[:1], conv_weight))
    tensors = one, w, conv_bias, running_mean, running_var, weight, bias, group_weight, group_bias
    eager._check_shapes(*tensors, tuple(padding), training, groups)
    out = empty_in(input, (input.shape[0], *eager._pooled_shape(one.shape, w.shape, tuple(padding))[1:]), False)
    if not keep:
        return results_of(input, out, None)
    size = kept_bytes(input, conv_weight, padding, groups, settled_choice(numerics, input))
    return out, input.new_empty(size, dtype=torch.uint8)


def kept_bytes(x, conv_weight, padding, groups, choice):
    """Bytes to keep for the backward: at least what the plan needs, by one formula for all numbers of images."""
    shape, w_shape = tuple(map(int, x.shape[1:])), tuple(map(int, conv_weight.shape))
    per_image, few, fixed = _kept_bytes(shape, NUMPY[x.dtype], w_shape, tuple(padding), groups, choice)
    images = x.shape[0]
    return fixed + images * per_image + torch.sym_min(images, MANY_IMAGES) * few


@functools.lru_cache(maxsize=256)
def _kept_bytes(shape, dtype, w_shape, padding, groups, choice):
    """(of each image, more of each image while they are few, of all)"""

    def needed(images, counted):
        plan = eager._plan((images, *shape), dtype, w_shape, padding, groups, choice)
        return room(kernels.kept_arrays(plan, (counted, *shape), groups, True))

    def per_image(images):
        return (needed(images, 2 * ALIGNMENT) - needed(images, ALIGNMENT)) // ALIGNMENT

    many = per_image(MANY_IMAGES)
    few = max(map(per_image, range(1, MANY_IMAGES)))
    fixed = max(needed(images, 0) for images in range(1, MANY_IMAGES + 1))
    return many, max(0, few - many), fixed + 16 * ALIGNMENT  # parts start at multiples of it


def _save(args, results):
    x, _, _, weight, bias = args[:5]
    conv_weight, conv_bias = args[9:11]
    group_weight, group_bias = args[15:17]
    parameters = conv_weight, conv_bias, weight, bias, group_weight, group_bias
    return x, *parameters, results[1], *batch_norm.applied(args)


# Where the tensors that have a gradient stand among the arguments: x, those of the convolution, and of both norms.
_PLACES = (0, 9, 10, 3, 4, 15, 16)


def _first(ctx, dout):
    *tensors, memory, running_mean, running_var = ctx.saved_tensors
    training, eps, padding, activation, slope = ctx.args[5], ctx.args[7], *ctx.args[11:14]
    groups, group_eps, numerics = ctx.args[14], *ctx.args[17:19]
    needed = [ctx.needs_input_grad[place] for place in _PLACES]
    if torch.is_grad_enabled():

        def unfused(x, w, conv_bias, weight, bias, group_weight, group_bias):
            y = ops.conv_transpose2d(x, w, conv_bias, *eager._geometry(padding), numerics)
            arguments = running_mean, running_var, weight, bias, training, 0.0, eps, None, False
            y = eager._operator(activation, slope)(ops.batch_norm.default(y, *arguments)[0])
            y, *_ = ops.max_pool2d(y, 2, 2, 0, 1, False, False)
            return ops.group_norm(y, groups, group_weight, group_bias, group_eps)[0]

        with torch.autocast(dout.device.type, enabled=False):
            found = gradients_of(unfused, tensors, dout)
    else:
        options = padding, activation, slope, groups, training, numerics, needed
        op = ops.conv_bn_activation_max_pool_group_norm_backward
        found = gradients_of_op(op(dout, *tensors, memory, *options), needed)
    gradients = [None] * (1 + max(_PLACES))
    for place, gradient in zip(_PLACES, found):
        gradients[place] = gradient
    return tuple(gradients)


register(
    f"conv_bn_activation_max_pool_group_norm({ARGUMENTS}, bool keep=False) -> (Tensor, Tensor)",
    _run,
    _fake,
    _save,
    _first,
    settle=_settle,
    flops=lambda *args: flops(args[0], args[9]),
)


def _gradient(dout, x, *options):
    *parameters, memory, padding, activation, slope, groups, training, numerics, needed = options
    how = {
        "padding": tuple(padding),
        "choice": settled_choice(numerics, x),
        "groups": groups,
        "training": training,
        "activation": activation,
        "parameter": slope,
    }
    tensors = aligned(x), *map(dense, parameters)
    found = eager.call(eager._backward, dense(dout), *tensors, memory, needed=tuple(needed), **how)
    return results_of(dout, *found)


def _fake_gradient(dout, *options):
    tensors, needed = options[:7], options[-1]
    contiguous = [None if t is None else empty_in(t, t.shape, False) for t in tensors]
    return fake_gradients(dout, contiguous, needed)


register(
    "conv_bn_activation_max_pool_group_norm_backward(Tensor dout, Tensor x, Tensor conv_weight, Tensor? conv_bias, "
    "Tensor? weight, Tensor? bias, Tensor? group_weight, Tensor? group_bias, Tensor memory, int[2] padding, "
    "str activation, float negative_slope, int num_groups, bool training, str numerics, bool[7] needed)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _gradient,
    _fake_gradient,
    flops=lambda dout, x, w, *options: flops(x, w) * sum(options[-1][:2]),
)


def _or_parts(input, *options):
    *arguments, together = options
    running_mean, running_var, weight, bias, training, momentum, eps, batches, *rest = arguments
    conv_weight, conv_bias, padding, activation, slope, groups, group_weight, group_bias, group_eps, numerics = rest
    try:
        op = batch_norm.overload(ops.conv_bn_activation_max_pool_group_norm, running_mean, training, batches)
        return autocast.result_of_norm(op(input, *arguments)[0])
    except UnsupportedError:
        pass
    y = traced["conv_transpose2d"](input, conv_weight, conv_bias, padding=padding, numerics=numerics)
    normed = running_mean, running_var, weight, bias, training, momentum, eps
    if together:
        y = traced["bn_tanh_max_pool2d"](y, *normed, num_batches_tracked=batches)
    else:
        y = traced["batch_norm"](y, *normed, num_batches_tracked=batches)
        y = traced["max_pool2d"](eager._operator(activation, slope)(y), 2)
    return traced["group_norm"](y, groups, group_weight, group_bias, group_eps)


composite(f"conv_bn_activation_max_pool_group_norm_or_parts({ARGUMENTS}, bool together) -> Tensor", _or_parts)
