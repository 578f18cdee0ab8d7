"""ops.conv_bn_activation_max_pool_group_norm."""

import functools

import torch
from torch.compiler import is_exporting

from cupy_kernels import conv_bn_pool as kernels
from cupy_kernels.conv_transpose import output_shape
from cupy_kernels.conv_transpose_mma import MANY_IMAGES
from cupy_kernels.errors import UnsupportedError
from cupy_kernels.plan import ALIGNMENT, room
from cupy_kernels.pooled_tail import struct_of

from ... import autocast
from ...formats import dense_in, empty_in, restored, stored
from ...interop import NUMPY, aligned, check_floating, dense, flag, integer, number, pair
from ...numerics import NUMERICS, check_numerics, settled, settled_choice, settled_in_graph
from ...registration import composite, fake_gradients, gradients_of_op, in_place_of, ops, register, results_of, traced
from .. import resident_conv_bn_pool as eager
from ..batch_norm_arguments import Norm
from ..bn_pool import activation_of
from ..conv_bn_pool import check_three, is_plain, tanh_of, window_of
from ..gradients import gradients_of
from . import batch_norm
from .conv_transpose import convolution, flops
from .max_pool import WINDOW


@in_place_of
def conv_bn_activation_max_pool_group_norm(*args, **options):
    return conv_bn_activation_max_pool_group_norm_or_parts(*args, parts="refused", **options)


def conv_bn_activation_max_pool_group_norm_or_parts(
    input,
    running_mean,
    running_var,
    weight=None,
    bias=None,
    training=False,
    momentum=0.1,
    eps=1e-5,
    *,
    conv_weight,
    conv_bias=None,
    stride=1,
    padding=0,
    output_padding=0,
    dilation=1,
    groups=1,
    activation="tanh",
    negative_slope=0.01,
    pool_size=2,
    pool_stride=None,
    pool_padding=0,
    num_groups,
    group_weight=None,
    group_bias=None,
    group_eps=1e-5,
    num_batches_tracked=None,
    numerics="auto",
    parts,
):
    """The same. parts: what runs if no kernels support the whole call.

    "refused": nothing. "apart": the operators one by one. "together": batch norm, tanh and pooling fused, the others
    one by one.
    """
    check_numerics(numerics)
    numerics = settled_in_graph(eager._class(numerics, input), input.device)
    momentum, eps = number(momentum, "momentum"), number(eps, "eps")
    arguments = running_mean, running_var, weight, bias, flag(training, "training"), momentum, eps
    conv = conv_weight, conv_bias, pair(padding, "padding"), activation, number(negative_slope, "negative_slope")
    group = integer(num_groups, "num_groups"), group_weight, group_bias, number(group_eps, "group_eps")
    more = pair(stride, "stride"), pair(output_padding, "output_padding"), pair(dilation, "dilation")
    more += integer(groups, "groups"), *window_of(pool_size, pool_stride, pool_padding), parts
    packet = ops.conv_bn_activation_max_pool_group_norm_or_parts
    op = batch_norm.overload(packet, running_mean, training, num_batches_tracked)
    return op(input, *arguments, num_batches_tracked, *conv, *group, numerics, *more)


in_place_of(tanh_of(conv_bn_activation_max_pool_group_norm))


ARGUMENTS = (
    f"{batch_norm.ARGUMENTS}, Tensor conv_weight, Tensor? conv_bias, int[2] padding, str activation, "
    "float negative_slope, int num_groups, Tensor? group_weight, Tensor? group_bias, float group_eps, str numerics"
)


def _settle(input, *options):
    *others, numerics = options
    if numerics in NUMERICS:
        numerics = settled(eager._class(numerics, input), input.device)
    how = numerics + autocast.enabled(input) * _AUTOCAST
    _check_supported(input, *others, how)  # here, so that no mode sees an operator that is refused
    return input, *others, how


_AUTOCAST = " under autocast"


def _setting(x, padding, groups, numerics) -> eager.Setting:
    """autocast_on: whether it was on when numerics were settled."""
    choice = settled_choice(numerics.partition(_AUTOCAST)[0], x.device)
    return eager.Setting(tuple(padding), groups, choice, eager.last_of(x), _AUTOCAST in numerics)


def _check_supported(input, *options):
    """UnsupportedError for calls that the kernels do not take."""
    norm = Norm(*options[:8])
    conv_weight, conv_bias, padding, activation, slope, groups, group_weight, group_bias, _, numerics = options[8:]
    struct_of(activation)
    eager.check_slope(slope)
    setting = _setting(input, padding, groups, numerics)
    eager.check_mixture(
        setting.autocast_on, input, norm.batches, *norm[:4], conv_weight, conv_bias, group_weight, group_bias
    )
    check_floating(input=input)
    if input.dim() == conv_weight.dim() == 4:
        images = 1 if input.shape[0] else 0  # of more, the number does not matter
        shapes = (images, *map(int, input.shape[1:])), NUMPY[input.dtype], tuple(map(int, conv_weight.shape))
        _plan(*shapes, NUMPY[conv_weight.dtype], setting)


_plan = functools.lru_cache(maxsize=1024)(eager.plan_of_shapes)  # each call checks


def _run(input, *options):
    *others, numerics, keep = options
    arguments, others = others[:8], others[8:]
    conv_weight, _, padding, _, _, groups, *_ = others
    setting = _setting(input, padding, groups, numerics)
    how = setting.choice, setting.autocast_on
    if not keep:
        return results_of(input, eager.fused(input, arguments, *others, *how), None)
    return eager.fused(input, arguments, *others, *how, kept_bytes(input, conv_weight, setting))


def _fake(input, *options):
    *others, keep = options
    conv_weight, conv_bias, padding, _, _, groups, group_weight, group_bias, _, numerics = others[8:]
    _check_supported(input, *others)
    norm = Norm.checked(*others[:8])
    one, w = (t.new_empty(tuple(map(int, t.shape))) for t in (input[:1], conv_weight))
    eager.check_shapes(one, norm, w, conv_bias, group_weight, group_bias, tuple(padding), groups)
    _, channels, height, width = output_shape(one.shape, w.shape, eager.geometry_of(tuple(padding)))
    out = empty_in(conv_weight, (input.shape[0], channels, height // 2, width // 2), eager.last_of(input))
    if not keep:
        return results_of(input, out, None)
    size = kept_bytes(input, conv_weight, _setting(input, padding, groups, numerics))
    return out, input.new_empty(size, dtype=torch.uint8)


def kept_bytes(x, conv_weight, setting):
    """Bytes to keep for the backward: at least what the plan needs, by one formula for all numbers of images."""
    shape, w_shape = tuple(map(int, x.shape[1:])), tuple(map(int, conv_weight.shape))
    per_image, few, fixed = _kept_bytes(shape, w_shape, NUMPY[x.dtype], NUMPY[conv_weight.dtype], setting)
    images = x.shape[0]
    return fixed + images * per_image + torch.sym_min(images, MANY_IMAGES) * few


@functools.lru_cache(maxsize=256)
def _kept_bytes(shape, w_shape, dtype, w_dtype, setting):
    """(of each image, more of each image while they are few, of all)"""

    def needed(images, counted):
        plan = eager.plan_of_shapes((images, *shape), dtype, w_shape, w_dtype, setting)
        return room(kernels.kept_arrays(plan, (counted, *shape), setting.groups, True))

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
            choice, _, _ = numerics.partition(_AUTOCAST)
            y = ops.conv_transpose2d(x.to(w.dtype), w, conv_bias, *eager.geometry_of(padding), choice)
            arguments = running_mean, running_var, weight, bias, training, 0.0, eps, None, False
            y = activation_of(activation, slope)(ops.batch_norm.default(y, *arguments)[0])
            y, *_ = ops.max_pool2d(y, 2, 2, 0, 1, False, False)
            return ops.group_norm(y, groups, group_weight, group_bias, group_eps)[0]

        with torch.autocast(dout.device.type, enabled=False):
            found = gradients_of(unfused, tensors, needed, dout)
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
    setting = _setting(x, padding, groups, numerics)
    last = setting.last
    how = {"setting": setting, "needed": tuple(needed), "training": training, "activation": activation}
    x, dout = stored(dense_in(x, last), last), stored(dense_in(dout, last), last)
    tensors = dout, aligned(x), *map(dense, parameters), memory
    dx, *found = eager.call(eager._backward, *tensors, parameter=slope, **how)
    return results_of(dout, restored(dx, last), *found)


def _fake_gradient(dout, *options):
    tensors, needed = options[:7], options[-1]
    x, *others = tensors
    like = [empty_in(x, x.shape, eager.last_of(x))]
    like += [None if t is None else empty_in(t, t.shape, False) for t in others]
    return fake_gradients(dout, like, needed)


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
    *arguments, stride, output_padding, dilation, conv_groups, size, pool_stride, pool_padding, _, parts = options
    running_mean, running_var, weight, bias, training, momentum, eps, batches, *rest = arguments
    conv_weight, conv_bias, padding, activation, slope, groups, group_weight, group_bias, group_eps, numerics = rest
    plain = is_plain(*map(tuple, (stride, output_padding, dilation)), conv_groups, size, pool_stride, pool_padding)
    # The fused plan needs sizes. An exported program decides here again when it runs, with numbers.
    symbolic = is_exporting() and any(isinstance(n, torch.SymInt) for n in input.shape[1:])
    if plain and not symbolic:
        try:
            op = batch_norm.overload(ops.conv_bn_activation_max_pool_group_norm, running_mean, training, batches)
            return autocast.result_of_norm(op(input, *arguments)[0])
        except UnsupportedError:
            pass
    pool = window_of(size, pool_stride, pool_padding)
    others = conv_weight, conv_bias, running_mean, running_var, weight, bias, group_weight, group_bias
    try:
        check_three(input, pool, batches, others, activation, slope)
        parts = "three"
    except UnsupportedError:
        if parts == "refused":
            raise
    conv = stride, padding, output_padding, conv_groups, dilation
    shift = conv_bias if parts == "three" and training else None
    added = conv_bias if shift is None else shift.detach()
    y = convolution(input, conv_weight, added, *conv, numerics)
    normed = running_mean, running_var, weight, bias, training, momentum, eps
    if parts == "three":
        op = batch_norm.overload(ops.bn_activation_max_pool2d, running_mean, training, batches)
        y = op(y, *normed, batches, shift, activation, slope, *pool)[0]
    elif parts == "together":
        y = traced["bn_tanh_max_pool2d"](y, *normed, *pool, num_batches_tracked=batches)
    else:
        y = traced["batch_norm"](y, *normed, num_batches_tracked=batches)
        y = traced["max_pool2d"](activation_of(activation, slope)(y), *pool)
    return traced["group_norm"](y, groups, group_weight, group_bias, group_eps)


composite(
    f"conv_bn_activation_max_pool_group_norm_or_parts({ARGUMENTS}, int[2] stride, int[2] output_padding, "
    f"int[2] dilation, int groups, {WINDOW.replace('int[2] ', 'int[2] pool_')}, str parts) -> Tensor",
    _or_parts,
)
