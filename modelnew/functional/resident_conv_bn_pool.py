"""The chain of `conv_bn_pool` as one operator: four kernels forward. The convolution's epilogue pools."""

from typing import NamedTuple

import numpy as np
import torch

from cupy_kernels import conv_bn_pool as ops
from cupy_kernels import conv_bn_pool_backward as back
from cupy_kernels.conv_transpose import Geometry, logical, output_shape
from cupy_kernels.conv_transpose_mma import plan as convolution_plan
from cupy_kernels.errors import UnsupportedError
from cupy_kernels.plan import parts, room
from cupy_kernels.pooled_tail import struct_of
from cupy_kernels.source import SCALARS

from .. import autocast
from ..calls import call, dense_after
from ..formats import channels_last, dense_in, restored, stored
from ..interop import NUMPY, aligned, dense, integer, number, one_device, pair
from ..numerics import Choice, choose, required_plan, tensor_core_plan, wgrad_plan
from .batch_norm import batch_norm
from .batch_norm_arguments import Norm
from .bn_pool import activation_of
from .conv_transpose import conv_transpose2d_as
from .conv_transpose_kernels import gradients
from .gather_gemm import physical
from .gradients import Function, apply, gradients_of, will_need_grad
from .group_norm import group_norm
from .max_pool import max_pool2d

_MOST = torch.finfo(torch.float32).max


class Setting(NamedTuple):
    """What a plan of the convolution depends on besides its tensors."""

    padding: tuple[int, int]
    groups: int  # of the group norm
    choice: Choice
    last: bool  # whether x and the output are channels_last: arrays [N, H, W, C]
    autocast_on: bool


def _forward(new, x, w, *others, setting, keep, kept_bytes=None, **options):
    """others: tensors as `conv_bn_pool_forward` takes them. kept_bytes: at least that many are returned with `keep`."""
    plan = plan_for(x, w, setting)
    out = new_output(new, x, w, setting)
    arrays = ops.kept_arrays(plan, x.shape, setting.groups, keep)
    memory = (new if keep else new.scratch)((max(room(arrays), kept_bytes or 0),), "uint8")
    how = {"plan": plan, "groups": setting.groups, **options}
    ops.conv_bn_pool_forward(new.scratch, x, w, *others, out, parts(memory, arrays), **how)
    return out, memory if keep else None


def _backward(
    new, dout, x, w, conv_bias, weight, bias, group_weight, group_bias, memory, *, setting, needed, parameter, **how
):
    """how: training and activation."""
    parameters = (conv_bias, weight, bias, group_weight, group_bias)
    found = [new.like(t if needed else None) for t, needed in zip(parameters, needed[2:])]

    def tail(plan, kept, made):
        of_tail = {"plan": plan, "groups": setting.groups, "parameter": parameter, **how}
        back.tail_gradients(dout, weight, bias, group_weight, *found, kept, made, **of_tail)

    tensors = (x, w, weight, memory)
    return *convolution_gradients(new, tail, None, {}, *tensors, setting=setting, needed=needed[:2], **how), *found


def convolution_gradients(new, before, after, given, x, w, weight, memory, *, setting, needed, training, activation):
    """(dx, dw) of the fused operator.

    before: before(plan, kept, made) writes what `back.output_gradient` reads.
    after: after(kept, made), if not None, changes what that wrote.
    given: those arrays of `back.gradient_arrays` that exist already.
    """
    need_x, need_w = needed
    x_shape, groups, geometry = logical(x.shape, setting.last), setting.groups, geometry_of(setting.padding)
    plan = plan_for(x, w, setting)
    kept = parts(memory, ops.kept_arrays(plan, x.shape, groups, True))
    (dgrad, _), (wgrad, _) = _gradient_plans(x_shape, x.dtype, w.shape, w.dtype, setting)
    general = (need_x and dgrad is None) or (need_w and wgrad is None)
    dy = new.scratch(output_shape(x_shape, w.shape, geometry), x.dtype) if general else None
    packed = not general and (need_x or need_w)
    packs_x = packed and need_w and not setting.last
    centred = packs_x and training and x.dtype == np.float32
    arrays = back.gradient_arrays(plan, x.shape[0], packed, x.shape if packs_x else None, centred)
    made = {**{name: new.scratch(*array) for name, array in arrays.items() if name not in given}, **given}
    before(plan, kept, made)
    how = {"plan": plan, "groups": groups, "training": training, "activation": activation}
    back.output_gradient(new.scratch, x, weight, dy, kept, made, **how)
    if after is not None:
        after(kept, made)
    if general:
        dx, dw, _ = gradients(new, x, w, dy, x.shape, w.shape, geometry, setting.choice, (need_x, need_w, False))
        return dx, dw
    dw, dx = new.like(w if need_w else None), new.like(x if need_x else None)
    if need_w:  # first: the room of its workspaces is dx's then
        back.weight_gradient(new.scratch, x, kept, made, dw, plan=wgrad)
    if need_x:
        back.input_gradient(new.scratch, w, made, dx, plan=dgrad.of_weights(SCALARS[w.dtype]))
    return dx, dw


class _Fused(Function):
    @staticmethod
    def forward(ctx, x, w, conv_bias, weight, bias, group_weight, group_bias, norm, running, check, options):
        last = options["setting"].last
        tensors = (stored(x, last), w, conv_bias, *running, weight, bias, group_weight, group_bias)
        out, memory = call(_forward, *tensors, check=check, keep=True, **options)
        ctx.save_for_backward(x, w, conv_bias, weight, bias, group_weight, group_bias, memory, *norm.applied())
        ctx.options = options
        return restored(out, last)

    @staticmethod
    def backward(ctx, dout):
        *tensors, memory, running_mean, running_var = ctx.saved_tensors
        needed = ctx.needs_input_grad[:7]
        if torch.is_grad_enabled():
            found = _differentiable_gradients(ctx.options, running_mean, running_var, tensors, needed, dout)
        else:
            options = {name: ctx.options[name] for name in ("setting", "training", "activation", "parameter")}
            x, *others = tensors
            last = options["setting"].last
            dout = stored(dense_in(dout, True), True) if last else dense(dout)
            dx, *others = call(_backward, dout, stored(x, last), *others, memory, needed=needed, **options)
            found = restored(dx, last), *others
        return *found, *[None] * 4


def _differentiable_gradients(options, running_mean, running_var, tensors, needed, dout):
    """The gradients of `tensors` by operators that can be differentiated twice."""
    activate, setting = activation_of(options["activation"], options["parameter"]), options["setting"]

    def unfused(x, w, conv_bias, weight, bias, group_weight, group_bias):
        y = conv_transpose2d_as(x.to(w.dtype), w, conv_bias, geometry_of(setting.padding), setting.choice)
        y = batch_norm(y, running_mean, running_var, weight, bias, options["training"], eps=options["eps"])
        y = max_pool2d(activate(y), 2)
        return group_norm(y, setting.groups, group_weight, group_bias, options["group_eps"])

    with torch.autocast(dout.device.type, enabled=False):  # as in the forward, whatever holds around the backward
        return gradients_of(unfused, tensors, needed, dout)


def fused_plan(x, conv_weight, padding, num_groups, numerics, batches=None, others=(), negative_slope=0):
    """(plan, None) if the fused kernels support the layers on x, else (None, the reason).

    batches: num_batches_tracked.
    others: the other parameters.
    negative_slope: of the activation, if it has one.
    """
    try:
        check_slope(negative_slope)
        autocast_on = autocast.enabled(x)
        check_mixture(autocast_on, x, batches, conv_weight, *others)
        choice = choose(_class(numerics, x), x.device)
        setting = Setting(pair(padding, "padding"), num_groups, choice, last_of(x), autocast_on)
        return plan_of_shapes(x.shape, NUMPY[x.dtype], conv_weight.shape, NUMPY[conv_weight.dtype], setting), None
    except UnsupportedError as error:
        return None, str(error)


def plan_for(x, w, setting: Setting):
    """The plan of the convolution for arrays."""
    return plan_of_shapes(logical(x.shape, setting.last), x.dtype, w.shape, w.dtype, setting)


def new_output(new, x, w, setting: Setting):
    """Memory of the fused operator's output."""
    *outer, height, width = output_shape(logical(x.shape, setting.last), w.shape, geometry_of(setting.padding))
    return new(physical((*outer, height // 2, width // 2), setting.last), w.dtype)


def plan_of_shapes(x_shape, dtype, w_shape, w_dtype, setting: Setting):
    """`plan_for` tensors of these shapes and NumPy's dtypes. UnsupportedError where the kernels do not take them."""
    options = {"dgrad": False, "channels_last": setting.last}
    how = w_shape, geometry_of(setting.padding), setting.choice
    plan = required_plan(convolution_plan, x_shape, dtype, *how, **options)
    ops.check_supported(plan, setting.groups)
    if setting.last or w_dtype != dtype:  # which the general kernels for gradients do not take
        for found, reason in _gradient_plans(x_shape, dtype, w_shape, w_dtype, setting):
            if not found:
                raise UnsupportedError(f"of a gradient, {reason}")
    return ops.typed(plan, SCALARS[w_dtype], half=setting.autocast_on or dtype.itemsize == 2)


def _gradient_plans(x_shape, dtype, w_shape, w_dtype, setting):
    """(plan or None, the reason), of dx and of dw."""
    geometry, last = geometry_of(setting.padding), setting.last
    dy_shape, how = output_shape(x_shape, w_shape, geometry), (w_shape, geometry, setting.choice)
    dgrad = tensor_core_plan(dy_shape, dtype, *how, dgrad=True, channels_last=last, packed=True)
    return dgrad, wgrad_plan(x_shape, w_dtype, *how, channels_last=last)


def last_of(x) -> bool:
    """Whether the kernels take x, and give the output, as channels_last: of 16 bits."""
    return x.dtype is not torch.float32 and channels_last(x)


def check_slope(negative_slope) -> None:
    if not 0 <= negative_slope <= _MOST:
        raise UnsupportedError(
            f"pooling before the activation needs a negative_slope from 0 to {_MOST:.2g}, received {negative_slope}"
        )


def check_mixture(autocast_on, x, batches, *others) -> None:
    """Raises UnsupportedError for a mixture of dtypes, or a counter of batches, that the kernels do not support."""
    if autocast_on:
        if x.dtype == torch.float64 or any(t is not None and t.dtype != torch.float32 for t in others):
            raise UnsupportedError("under autocast parameters must be float32, and the input not float64")
    elif any(t is not None and t.dtype != x.dtype for t in others):
        raise UnsupportedError("input and parameters have different dtypes")
    if batches is not None and (batches.dtype, batches.numel(), batches.device) != (torch.int64, 1, x.device):
        raise UnsupportedError(
            f"num_batches_tracked must be one {torch.int64} on {x.device}, received shape {tuple(batches.shape)}, "
            f"{batches.dtype} on {batches.device}"
        )


def _class(numerics, x) -> str:
    """The class of the convolution: "tf32" under autocast, whose operands have no more mantissa bits in PyTorch."""
    return "tf32" if autocast.enabled(x) else numerics


def geometry_of(padding):
    return Geometry((1, 1), padding, (0, 0), (1, 1), 1)


def run(input, arguments, *others):
    """The chain's result. Its arguments: those of `fused` but for two, and behind them numerics and peers."""
    *others, numerics, peers = others
    how = choose(_class(numerics, input), input.device), autocast.enabled(input)
    return autocast.result_of_norm(fused(input, arguments, *others, *how, peers=peers))


def fused(
    input,
    arguments,
    conv_weight,
    conv_bias,
    padding,
    activation,
    negative_slope,
    num_groups,
    group_weight,
    group_bias,
    group_eps,
    choice,
    autocast_on,
    kept_bytes=None,
    peers=None,
):
    """The result before autocast's cast; with `kept_bytes`, for calls without autograd, and what a backward needs.

    arguments: those of batch_norm, see `Norm`.
    """
    struct_of(activation)
    parameter = number(negative_slope, "negative_slope")
    norm, padding = Norm.checked(*arguments), pair(padding, "padding")
    group_eps, num_groups = number(group_eps, "group_eps"), integer(num_groups, "num_groups")
    others = (conv_weight, conv_bias, group_weight, group_bias)
    setting = Setting(padding, num_groups, choice, last_of(input), autocast_on)
    last = setting.last

    def check():
        check_mixture(autocast_on, input, norm.batches, *norm[:4], *others)
        if peers is not None and not input.shape[0]:
            raise UnsupportedError("the batch is empty, and other processes' batches count, too")
        check_shapes(input, norm, *others, padding, num_groups, alone=peers is None)
        plan_of_shapes(input.shape, NUMPY[input.dtype], conv_weight.shape, NUMPY[conv_weight.dtype], setting)

    check_slope(parameter)
    affine = (norm.weight, norm.bias, group_weight, group_bias)
    tensors = dense_after(check, stored(input, last), conv_weight, conv_bias, *affine)
    x = aligned(tensors[0])
    x, w, conv_bias, *affine = tensors = (x.movedim(-1, 1) if last else x, *tensors[1:])
    running = dense(norm.running_mean), dense(norm.running_var), norm.batches  # the counter, as check() looks at it
    options = {
        "setting": setting,
        "training": norm.training,
        "momentum": norm.momentum,
        "eps": norm.eps,
        "group_eps": group_eps,
        "activation": activation,
        "parameter": parameter,
    }
    keep, memory = kept_bytes is not None, None
    if peers is not None:
        out = peers(tensors, running, check, options)
    elif not keep and will_need_grad(*tensors):
        out = apply(_Fused, *tensors, norm, running, check, options)
    else:
        x, options["kept_bytes"] = stored(x, last), kept_bytes
        out, memory = call(_forward, x, w, conv_bias, *running, *affine, check=check, keep=keep, **options)
        out = restored(out, last)
    norm.note_update(running)
    return (out, memory) if keep else out


def check_shapes(
    input, norm, conv_weight, conv_bias, group_weight, group_bias, padding, num_groups, alone=True
) -> None:
    """Raises all errors that shapes, dtypes and devices can be the reason of. alone: as in `Norm.check`."""
    one_device((input, conv_weight, conv_bias, *norm[:4], group_weight, group_bias))
    shape = output_shape(input.shape, conv_weight.shape, geometry_of(padding))
    norm.check(input, shape, alone)
    check_group(shape[1], num_groups, conv_bias, group_weight, group_bias)


def check_group(channels, num_groups, conv_bias, group_weight, group_bias) -> None:
    """Raises the errors of the groups, and of the per-channel parameters that are not batch norm's."""
    for name, tensor in (("conv_bias", conv_bias), ("group_weight", group_weight), ("group_bias", group_bias)):
        if tensor is not None and tensor.shape != (channels,):
            raise ValueError(f"{name} must have shape ({channels},), received {tuple(tensor.shape)}")
    if num_groups < 1 or channels % num_groups:
        raise ValueError(f"num_groups must divide the {channels} channels, received {num_groups}")
