"""A convolution, a batch norm, an activation, a max pooling and a group norm in three main kernels forward, with the
pooling in the convolution's epilogue.
"""

import functools
import inspect
import math

import torch

from cupy_kernels import conv_bn_pool as ops
from cupy_kernels.conv_transpose import Geometry, output_shape
from cupy_kernels.conv_transpose_mma import plan as convolution_plan
from cupy_kernels.errors import UnsupportedError
from cupy_kernels.plan import parts, room

from .. import autocast
from ..calls import call, dense_after
from ..interop import NUMPY, aligned, dense, integer, number, one_device, pair
from ..numerics import check_numerics, choose, required_plan
from .batch_norm import applied_statistics, batch_norm, check_batch_norm, check_batch_norm_call, note_update
from .conv_transpose import conv_transpose2d_as, gradient_plans, gradients
from .gradients import Function, apply, gradients_of, will_need_grad
from .group_norm import group_norm
from .max_pool import max_pool2d


def _forward(
    new,
    x,
    w,
    conv_bias,
    running_mean,
    running_var,
    batches,
    weight,
    bias,
    group_weight,
    group_bias,
    *,
    padding,
    choice,
    keep,
    autocast_on,
    kept_bytes=None,
    **options,
):
    """kept_bytes: at least that many are returned with `keep`."""
    plan = _plan(x.shape, x.dtype, w.shape, padding, options["groups"], choice)
    out = new(_pooled_shape(x.shape, w.shape, padding), x.dtype)
    arrays = ops.kept_arrays(plan, x.shape, options["groups"], keep)
    memory = (new if keep else new.scratch)((max(room(arrays), kept_bytes or 0),), "uint8")
    tensors = (x, w, conv_bias, running_mean, running_var, batches, weight, bias, group_weight, group_bias)
    ops.conv_bn_pool_forward(new.scratch, *tensors, out, parts(memory, arrays), plan=plan, **options)
    return out, memory if keep else None


def _backward(
    new, dout, x, w, conv_bias, weight, bias, group_weight, group_bias, memory, *, padding, choice, needed, **options
):
    need_x, need_w, *need = needed
    plan = _plan(x.shape, x.dtype, w.shape, padding, options["groups"], choice)
    kept = parts(memory, ops.kept_arrays(plan, x.shape, options["groups"], True))
    dgrad, wgrad = gradient_plans(x.dtype, x.shape, w.shape, _geometry(padding), choice, need_x, need_w)
    general = (dgrad is None, wgrad is None) != (not need_x, not need_w)
    dy = new.scratch(output_shape(x.shape, w.shape, _geometry(padding)), x.dtype) if general else None
    packed, centred = not general and (need_x or need_w), options["training"]
    arrays = ops.gradient_arrays(plan, x.shape[0], packed, packed and need_w and centred)
    made = {name: new.scratch(*array) for name, array in arrays.items()}
    parameters = (conv_bias, weight, bias, group_weight, group_bias)
    found = [new.like(t if needed else None) for t, needed in zip(parameters, need)]
    ops.conv_bn_pool_backward(dout, weight, bias, group_weight, *found, dy, kept, made, plan=plan, **options)
    if general:
        dx, dw, _ = gradients(new, x, w, dy, x.shape, w.shape, _geometry(padding), choice, (need_x, need_w, False))
        return dx, dw, *found
    dw, dx = new.like(w if need_w else None), new.like(x if need_x else None)
    if need_w:  # first: the room of its workspaces is dx's then
        ops.weight_gradient(new.scratch, x, kept, made, dw, plan=wgrad, centred=centred)
    if need_x:
        ops.input_gradient(new.scratch, w, made, dx, plan=dgrad.of_packed())
    return dx, dw, *found


class _Fused(Function):
    @staticmethod
    def forward(ctx, x, w, conv_bias, weight, bias, group_weight, group_bias, running, applied, check, options):
        tensors = (x, w, conv_bias, *running, weight, bias, group_weight, group_bias)
        out, memory = call(_forward, *tensors, check=check, keep=True, **options)
        ctx.save_for_backward(x, w, conv_bias, weight, bias, group_weight, group_bias, memory, *applied)
        ctx.options = options
        return out

    @staticmethod
    def backward(ctx, dout):
        *tensors, memory, running_mean, running_var = ctx.saved_tensors
        if torch.is_grad_enabled():
            found = _differentiable_gradients(ctx.options, running_mean, running_var, tensors, dout)
        else:
            names = ("padding", "choice", "groups", "training", "activation", "parameter")
            options = {name: ctx.options[name] for name in names}
            found = call(_backward, dense(dout), *tensors, memory, needed=ctx.needs_input_grad[:7], **options)
        return *found, *[None] * 4


def _differentiable_gradients(options, running_mean, running_var, tensors, dout):
    """The gradients of `tensors` by operators that can be differentiated twice."""
    activate = _operator(options["activation"], options["parameter"])

    def unfused(x, w, conv_bias, weight, bias, group_weight, group_bias):
        y = conv_transpose2d_as(x, w, conv_bias, _geometry(options["padding"]), options["choice"])
        y = batch_norm(y, running_mean, running_var, weight, bias, options["training"], eps=options["eps"])
        y = max_pool2d(activate(y), 2)
        return group_norm(y, options["groups"], group_weight, group_bias, options["group_eps"])

    with torch.autocast(dout.device.type, enabled=False):  # as in the forward, whatever holds around the backward
        return gradients_of(unfused, tensors, dout)


def _operator(activation, parameter):
    """The activation as an operator of its own."""
    from . import operators  # which imports this module

    function = getattr(operators, activation)
    takes_one = "negative_slope" in inspect.signature(function).parameters
    return functools.partial(function, negative_slope=parameter) if takes_one else function


def fused_plan(x, conv_weight, padding, num_groups, numerics, batches=None, others=(), negative_slope=0):
    """(plan, None) if the fused kernels take the layers on x, else (None, the reason).

    batches: num_batches_tracked. others: the other parameters. negative_slope: the activation's, if it has one.
    """
    try:
        _check_slope(negative_slope)
        _check_mixture(x, batches, conv_weight, *others)
        shapes = x.shape, NUMPY[x.dtype], conv_weight.shape
        return _plan(*shapes, pair(padding, "padding"), num_groups, choose(_class(numerics, x), x)), None
    except UnsupportedError as error:
        return None, str(error)


def _plan(x_shape, dtype, w_shape, padding, groups, choice):
    plan = required_plan(convolution_plan, x_shape, dtype, w_shape, _geometry(padding), choice, dgrad=False)
    ops.check_supported(plan, groups)
    return plan


def _check_slope(negative_slope) -> None:
    if not 0 <= negative_slope < math.inf:
        raise UnsupportedError(
            f"pooling before the activation needs a finite negative_slope of at least 0, received {negative_slope}"
        )


def _check_mixture(x, batches, *others) -> None:
    """UnsupportedError for dtypes or a counter of batches that do not go together."""
    if autocast.enabled(x) and x.dtype != torch.float32:
        raise UnsupportedError(f"under autocast the input must be float32, received {x.dtype}")
    if any(t is not None and t.dtype != x.dtype for t in others):
        raise UnsupportedError("input and parameters have different dtypes")
    if batches is not None and (batches.dtype, batches.numel(), batches.device) != (torch.int64, 1, x.device):
        raise UnsupportedError(
            f"num_batches_tracked must be one {torch.int64} on {x.device}, received shape {tuple(batches.shape)}, "
            f"{batches.dtype} on {batches.device}"
        )


def _class(numerics, x) -> str:
    """Under autocast the convolution's operands have 10 mantissa bits at most in PyTorch, too."""
    return "tf32" if autocast.enabled(x) else numerics


def _geometry(padding):
    return Geometry((1, 1), padding, (0, 0), (1, 1), 1)


def conv_bn_activation_max_pool_group_norm(
    input: torch.Tensor,
    running_mean: torch.Tensor | None,
    running_var: torch.Tensor | None,
    weight: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    *,
    conv_weight: torch.Tensor,
    conv_bias: torch.Tensor | None = None,
    padding: int | tuple[int, int] = 0,
    activation: str = "tanh",
    negative_slope: float = 0.01,
    num_groups: int,
    group_weight: torch.Tensor | None = None,
    group_bias: torch.Tensor | None = None,
    group_eps: float = 1e-5,
    num_batches_tracked: torch.Tensor | None = None,
    numerics: str = "auto",
) -> torch.Tensor:
    """group_norm(max_pool2d(act(batch_norm(conv_transpose2d(input, conv_weight, conv_bias, padding=padding))), 2)).

    input: [N, Cin, H, W]; conv_weight: [Cin, Cout, KH, KW]; all others per channel (Cout,), or None as in batch_norm
    and group_norm. One dtype for all: float32, float16 or bfloat16.
    activation: act, the name of an operator that activation.cuh has, "tanh" or "leaky_relu". negative_slope: of
        leaky_relu, finite and not negative.
    num_batches_tracked: one int64, which grows by 1 in training, in place; or None.
    For shapes that the tensor-core kernels take (`modelnew.explain` tells); for others UnsupportedError, a ValueError
    with the reason. Besides, batch_norm's errors.
    Returns [N, Cout, OH/2, OW/2], rounded down.
    Under torch.autocast, of float32 tensors: as without it, in the class "tf32", whose errors are smaller than those of
    casts between the operators. The result has the dtype that autocast gives group_norm's.
    """
    check_numerics(numerics)
    batch_norm = (running_mean, running_var, weight, bias, training, momentum, eps, num_batches_tracked)
    conv, group = (conv_weight, conv_bias, padding), (num_groups, group_weight, group_bias, group_eps)
    choice = choose(_class(numerics, input), input)
    out = fused(input, *batch_norm, *conv, activation, negative_slope, *group, choice)
    return autocast.result_of_norm(out)


def fused(
    input,
    running_mean,
    running_var,
    weight,
    bias,
    training,
    momentum,
    eps,
    num_batches_tracked,
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
    kept_bytes=None,
):
    """The result before autocast's cast; with `kept_bytes`, for calls without autograd, and what a backward needs."""
    ops.struct_of(activation)
    parameter = number(negative_slope, "negative_slope")
    momentum, eps = check_batch_norm_call(running_mean, running_var, training, momentum, eps)
    training, padding = bool(training), pair(padding, "padding")
    group_eps, num_groups = number(group_eps, "group_eps"), integer(num_groups, "num_groups")
    others = (conv_weight, conv_bias, running_mean, running_var, weight, bias, group_weight, group_bias)

    def check():
        _check_mixture(input, num_batches_tracked, *others)
        _check_shapes(input, *others, padding, training, num_groups)
        _plan(input.shape, NUMPY[input.dtype], conv_weight.shape, padding, num_groups, choice)

    _check_slope(parameter)
    tensors = dense_after(check, input, conv_weight, conv_bias, weight, bias, group_weight, group_bias)
    x, w, conv_bias, *affine = tensors = (aligned(tensors[0]), *tensors[1:])
    updated = dense(running_mean), dense(running_var), num_batches_tracked
    options = {
        "padding": padding,
        "choice": choice,
        "groups": num_groups,
        "training": training,
        "momentum": momentum,
        "eps": eps,
        "group_eps": group_eps,
        "activation": activation,
        "parameter": parameter,
        "autocast_on": autocast.enabled(input),  # as check() looks at it
    }
    keep, memory = kept_bytes is not None, None
    if not keep and will_need_grad(*tensors):
        applied = applied_statistics(running_mean, running_var, training)
        out = apply(_Fused, *tensors, updated, applied, check, options)
    else:
        options["kept_bytes"] = kept_bytes
        out, memory = call(_forward, x, w, conv_bias, *updated, *affine, check=check, keep=keep, **options)
    if training:
        note_update(running_mean, running_var, num_batches_tracked, updated)
    return (out, memory) if keep else out


@functools.wraps(conv_bn_activation_max_pool_group_norm, assigned=())  # for its signature
def conv_bn_tanh_max_pool_group_norm(*args, **options):
    """`conv_bn_activation_max_pool_group_norm` with the activation tanh."""
    return conv_bn_activation_max_pool_group_norm(*args, activation="tanh", **options)


def _check_shapes(
    input,
    conv_weight,
    conv_bias,
    running_mean,
    running_var,
    weight,
    bias,
    group_weight,
    group_bias,
    padding,
    training,
    num_groups,
) -> None:
    """Raises all errors that shapes, dtypes and devices can be the reason of."""
    affine = (conv_bias, running_mean, running_var, weight, bias, group_weight, group_bias)
    one_device((input, conv_weight, *affine))
    shape = output_shape(input.shape, conv_weight.shape, _geometry(padding))
    check_batch_norm(input, running_mean, running_var, weight, bias, training, shape)
    for name, tensor in (("conv_bias", conv_bias), ("group_weight", group_weight), ("group_bias", group_bias)):
        if tensor is not None and tensor.shape != (shape[1],):
            raise ValueError(f"{name} must have shape ({shape[1]},), received {tuple(tensor.shape)}")
    if num_groups < 1 or shape[1] % num_groups:
        raise ValueError(f"num_groups must divide the {shape[1]} channels, received {num_groups}")


def _pooled_shape(x_shape, w_shape, padding):
    *outer, height, width = output_shape(x_shape, w_shape, _geometry(padding))
    return *outer, height // 2, width // 2
