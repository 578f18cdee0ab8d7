"""A convolution, a batch norm, an activation, a max pooling and a group norm in three main kernels forward, with the
pooling in the convolution's epilogue.
"""

import dataclasses
import functools
import math

import torch
from torch.autograd import forward_ad

from cupy_kernels import conv_bn_pool as ops
from cupy_kernels.conv_transpose import Geometry, output_shape
from cupy_kernels.conv_transpose_mma import Plan, UnsupportedError
from cupy_kernels.conv_wgrad_mma import Plan as WgradPlan

from ..calls import remember, run
from ..interop import (
    Layout,
    Workspace,
    aligned,
    compile_together,
    dense,
    integer,
    number,
    one_device,
    pair,
)
from ..numerics import Choice, check_numerics, choose, tensor_core_plan
from .batch_norm import applied_statistics, batch_norm, check_batch_norm, check_batch_norm_call, note_update
from .bn_tanh_max_pool import bn_tanh_max_pool2d
from .conv_transpose import conv_gradients, conv_transpose2d_as, gradient_plans
from .gradients import gradients_of
from .group_norm import group_norm
from .leaky_relu import leaky_relu
from .max_pool import max_pool2d

_calls, _backward_calls = {}, {}  # {what distinguishes calls: _Call or _BackwardCall}


@dataclasses.dataclass(eq=False)  # each is one of its own, which makes it a quick key
class _Call:
    """What follows from the kinds of a call's arguments."""

    plan: Plan
    choice: Choice
    geometry: Geometry
    layout: Layout  # of the workspace
    shape: tuple  # of the output
    training: bool
    keep: bool
    groups: int
    activation: str


@dataclasses.dataclass(eq=False)
class _BackwardCall:
    """What follows from a forward's _Call and from which gradients are needed."""

    dgrad: Plan | None  # of packed tiles
    wgrad: WgradPlan | None
    dy_shape: tuple | None  # where the general kernels take the convolution's gradients
    layouts: tuple[Layout, ...]  # of what the backward makes, gives to wgrad and dgrad, and of what these two write


class _Fused(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, *args):
        *parameters, (call, running_mean, running_var, batches, momentum, eps, group_eps, parameter) = args
        w, conv_bias, weight, bias, group_weight, group_bias = parameters
        workspace = Workspace.empty(call.layout, x.device)
        out = x.new_empty(call.shape)

        updated = dense(running_mean), dense(running_var)
        arguments = (x, w, conv_bias, *updated, batches, weight, bias, group_weight, group_bias, out, workspace)
        options = {"plan": call.plan, "training": call.training, "momentum": momentum, "eps": eps}
        options.update(groups=call.groups, group_eps=group_eps, activation=call.activation, parameter=parameter)
        run(ops.conv_bn_pool_forward, *arguments, key=(call, momentum, eps, group_eps), **options)
        if call.training:
            note_update(running_mean, running_var, batches, (*updated, batches))
        if call.keep:
            running = applied_statistics(running_mean, running_var, call.training)
            ctx.save_for_backward(x, *parameters, workspace.memory, *running)
            ctx.call, ctx.eps, ctx.group_eps, ctx.parameter = call, eps, group_eps, parameter
        return out

    @staticmethod
    def backward(ctx, dout):
        *tensors, memory, running_mean, running_var = ctx.saved_tensors
        if torch.is_grad_enabled():
            return *_differentiable_gradients(ctx, running_mean, running_var, tensors, dout), None
        x, w, conv_bias, weight, bias, group_weight, group_bias = tensors
        need_x, need_w, *need = ctx.needs_input_grad[:7]
        parameters = (conv_bias, weight, bias, group_weight, group_bias)
        gradients = [torch.empty_like(t) if needed else None for t, needed in zip(parameters, need)]
        call = ctx.call
        key = (call, need_x, need_w)
        prepared = _known(_backward_calls, key, lambda: _backward_call(*key, x, w))
        made, output, of_wgrad, of_dgrad = prepared.layouts
        dx = dw = None
        dy = None if prepared.dy_shape is None else x.new_empty(prepared.dy_shape)
        # Large arrays are made as late, and given back as early, as can be: the step's peak of memory is here.
        kept, output = Workspace(memory, call.layout), Workspace.empty(output, x.device)
        tensors = (dense(dout), weight, bias, group_weight, *gradients, dy)
        options = {"key": prepared, "plan": call.plan, "groups": call.groups, "training": call.training}
        options.update(activation=call.activation, parameter=ctx.parameter)
        run(ops.conv_bn_pool_backward, *tensors, Workspace.empty(made, x.device), kept, output, **options)
        if prepared.wgrad:  # first: the room of its workspaces is dx's then
            dw = torch.empty_like(w)
            options = {"key": prepared, "plan": prepared.wgrad}
            run(ops.weight_gradient, output, kept, x, dw, Workspace.empty(of_wgrad, x.device), **options)
        if prepared.dgrad:
            dx = torch.empty_like(x)
            options = {"key": prepared, "plan": prepared.dgrad}
            run(ops.input_gradient, output, w, dx, Workspace.empty(of_dgrad, x.device), **options)
        if dy is not None:
            options = (x.shape, w.shape, call.geometry, call.choice, (need_x, need_w, False))
            dx, dw, _ = conv_gradients(x, w, dy, *options)
        return dx, dw, *gradients, None


def _differentiable_gradients(ctx, running_mean, running_var, tensors, dout):
    """The gradients of `tensors` by operators that can be differentiated twice."""

    def unfused(x, w, conv_bias, weight, bias, group_weight, group_bias):
        y = conv_transpose2d_as(x, w, conv_bias, ctx.call.geometry, ctx.call.choice)
        norm = (y, running_mean, running_var, weight, bias, ctx.call.training)
        if ctx.call.activation == "tanh":
            y = bn_tanh_max_pool2d(*norm, eps=ctx.eps)
        else:
            y = max_pool2d(_UNFUSED[ctx.call.activation](batch_norm(*norm, eps=ctx.eps), ctx.parameter), 2)
        return group_norm(y, ctx.call.groups, group_weight, group_bias, ctx.group_eps)

    with torch.autocast(dout.device.type, enabled=False):  # as in the forward, whatever holds around the backward
        return gradients_of(unfused, tensors, dout)


# Activations as operators of their own; tanh has one with batch norm and pooling.
_UNFUSED = {"leaky_relu": leaky_relu}

_apply = super(torch.autograd.Function, _Fused).apply  # without what its `apply` does for functorch and setup_context


def _known(known, key, make):
    """known[key], which make() makes where it is missing."""
    found = known.get(key)
    if found is None:
        found = make()
        remember(known, key, found)
    return found


def _call(training, keep, padding, num_groups, activation, numerics, batches, input, conv_weight, *others):
    """Plans and checks a call, and compiles its kernels at the same time, where launches would one by one.

    Where the fused kernels do not take it, the reason.
    """
    reason = _mixture(input, batches, conv_weight, *others)
    if reason:
        return reason
    shape = _checked_shape(input, conv_weight, others, padding, training, num_groups)
    choice = choose(numerics, input)
    plan, reason = _plan(input, conv_weight, padding, num_groups, choice)
    if reason:
        return reason
    compile_together(ops.kernels(plan, num_groups, activation, training, keep), input.device)
    layout = Layout(ops.buffers(plan, input.shape, num_groups, training, keep))
    return _Call(plan, choice, _geometry(padding), layout, shape, training, keep, num_groups, activation)


def _backward_call(call, need_x, need_w, x, w):
    """Plans a backward, and compiles as `_call` does."""
    dgrad, wgrad = gradient_plans(x, x.shape, w.shape, call.geometry, call.choice, need_x, need_w)
    dy_shape = None
    if (dgrad is None, wgrad is None) != (not need_x, not need_w):
        dgrad = wgrad = None
        dy_shape = output_shape(x.shape, w.shape, call.geometry)
    dgrad = dgrad and dgrad.of_packed()
    tail = (call.plan, call.groups, call.activation)
    compile_together(ops.gradient_kernels(*tail, x.shape, call.training, dgrad, wgrad), x.device)
    buffers = (
        ops.gradient_buffers(call.plan, x.shape[0]),
        ops.output_gradient_buffers(call.plan, x.shape[0], bool(dgrad or wgrad), bool(wgrad and call.training)),
        ops.weight_gradient_buffers(wgrad, x.shape, call.training) if wgrad else {},
        ops.input_gradient_buffers(dgrad) if dgrad else {},
    )
    return _BackwardCall(dgrad, wgrad, dy_shape, tuple(map(Layout, buffers)))


def fused_plan(x, conv_weight, padding, num_groups, numerics, batches=None, others=(), negative_slope=0):
    """(plan, None) if the fused kernels take the layers on x, else (None, the reason).

    batches: num_batches_tracked. others: the other parameters. negative_slope: the activation's, if it has one.
    """
    reason = _decreases(negative_slope) or _mixture(x, batches, conv_weight, *others)
    return (None, reason) if reason else _plan(x, conv_weight, padding, num_groups, choose(numerics, x))


def _plan(x, conv_weight, padding, num_groups, choice):
    plan, reason = tensor_core_plan(x, conv_weight.shape, _geometry(padding), choice)
    reason = reason or ops.unsupported_reason(plan, num_groups)
    return (None, reason) if reason else (plan, None)


def _mixture(x, batches, *others):
    """What does not go together in the tensors' dtypes, or with the counter of batches, or None."""
    if torch.is_autocast_enabled(x.device.type):
        return "autocast gives the operators different dtypes"
    if any(t is not None and t.dtype != x.dtype for t in others):
        return "input and parameters have different dtypes"
    if batches is not None and (batches.dtype, batches.numel(), batches.device) != (torch.int64, 1, x.device):
        return (
            f"num_batches_tracked must be one {torch.int64} on {x.device}, received shape {tuple(batches.shape)}, "
            f"{batches.dtype} on {batches.device}"
        )
    return None


def _geometry(padding):
    return Geometry((1, 1), pair(padding, "padding"), (0, 0), (1, 1), 1)


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
    required: bool = True,
) -> torch.Tensor | None:
    """group_norm(max_pool2d(act(batch_norm(conv_transpose2d(input, conv_weight, conv_bias, padding=padding))), 2)).

    input: [N, Cin, H, W]; conv_weight: [Cin, Cout, KH, KW]; all others per channel (Cout,), or None as in batch_norm
    and group_norm. One dtype for all: float32, float16 or bfloat16.
    activation: act, "tanh" or "leaky_relu". negative_slope: of leaky_relu, finite and not negative.
    num_batches_tracked: one int64, which grows by 1 in training, in place; or None.
    For shapes that the tensor-core kernels take (`modelnew.explain` tells); for others UnsupportedError, a ValueError,
    with the reason, or None if not `required`. Besides, batch_norm's errors.
    Returns [N, Cout, OH/2, OW/2], rounded down.
    """
    check_numerics(numerics)
    parameter = _parameter(activation, negative_slope)
    momentum, eps = check_batch_norm_call(running_mean, running_var, training, momentum, eps)
    tensors = (input, conv_weight, conv_bias, weight, bias, group_weight, group_bias)
    arguments = (num_batches_tracked, input, conv_weight, conv_bias, running_mean, running_var)
    arguments += (weight, bias, group_weight, group_bias)
    group_eps, num_groups = number(group_eps, "group_eps"), integer(num_groups, "num_groups")
    training, padding, device = bool(training), pair(padding, "padding"), "cuda" if input.is_cuda else "cpu"
    facts = choose(numerics, input), torch.is_autocast_enabled(device)
    keep = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
    kind = (training, keep, padding, num_groups, activation)
    key = (*kind, facts, *[None if t is None else (t.shape, t.dtype, t.device) for t in arguments])
    call = _decreases(parameter) or _known(_calls, key, lambda: _call(*kind, numerics, *arguments))
    if isinstance(call, str):
        if required:
            raise UnsupportedError(f"the fused kernels do not take this: {call}")
        return None
    tensors = (aligned(input), *map(dense, tensors[1:]))
    rest = (call, running_mean, running_var, num_batches_tracked, momentum, eps, group_eps, parameter)
    if forward_ad._current_level >= 0 or torch._C._are_functorch_transforms_active():
        return _Fused.apply(*tensors, rest)
    if keep:
        return _apply(*tensors, rest)
    return _Fused.forward(None, *tensors, rest)  # autograd, with nothing to keep or to refuse, would only take time


@functools.wraps(conv_bn_activation_max_pool_group_norm, assigned=())  # for its signature
def conv_bn_tanh_max_pool_group_norm(*args, **options):
    """`conv_bn_activation_max_pool_group_norm` with the activation tanh."""
    return conv_bn_activation_max_pool_group_norm(*args, activation="tanh", **options)


def _parameter(activation, negative_slope):
    """The number that the kernels get for the activation."""
    if activation not in ops.ACTIVATIONS:
        raise ValueError(f"activation must be one of {', '.join(ops.ACTIVATIONS)}, received {activation!r}")
    return 0 if activation == "tanh" else number(negative_slope, "negative_slope")


def _decreases(parameter):
    """Why an activation with this number cannot follow the pooling, or None."""
    if 0 <= parameter < math.inf:
        return None
    return f"pooling before the activation needs a finite negative_slope of at least 0, received {parameter}"


def _checked_shape(input, conv_weight, others, padding, training, num_groups):
    """The output's shape. Raises all errors that shapes, dtypes and devices can be the reason of."""
    conv_bias, running_mean, running_var, weight, bias, group_weight, group_bias = others
    one_device((input, conv_weight, *others))
    images, channels, height, width = shape = output_shape(input.shape, conv_weight.shape, _geometry(padding))
    check_batch_norm(input.new_empty(1).expand(shape), running_mean, running_var, weight, bias, training)
    for name, tensor in (("conv_bias", conv_bias), ("group_weight", group_weight), ("group_bias", group_bias)):
        if tensor is not None and tensor.shape != (channels,):
            raise ValueError(f"{name} must have shape ({channels},), received {tuple(tensor.shape)}")
    if num_groups < 1 or channels % num_groups:
        raise ValueError(f"num_groups must divide the {channels} channels, received {num_groups}")
    return images, channels, height // 2, width // 2
