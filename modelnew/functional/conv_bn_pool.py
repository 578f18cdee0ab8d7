"""All five operators of ModelNew in three main kernels forward, with the pooling in the convolution's epilogue."""

import functools

import torch
from torch.autograd.function import once_differentiable

from cupy_kernels import conv_bn_pool as ops
from cupy_kernels.conv_transpose import Geometry, output_shape

from ..interop import (
    Layout,
    Workspace,
    aligned,
    compile_together,
    dense,
    one_device,
    pair,
    run,
)
from ..numerics import check_numerics, resolve, tensor_core_plan
from .batch_norm import check_batch_norm, check_batch_norm_call, run_updating
from .conv_transpose import conv_gradients, gradient_plans

_checked = set()  # what calls passed `_check`


class _Fused(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, *args):
        *parameters, running_mean, running_var, geometry, numerics, keep, options = args
        x, w, conv_bias, weight, bias, group_weight, group_bias = tensors = (aligned(x), *map(dense, parameters))
        plan, groups = options["plan"], options["groups"]
        layout = _prepare(plan, x.shape, groups, options["training"], keep, x.device)
        workspace = Workspace.empty(layout, x.device)
        height, width = output_shape(x.shape, w.shape, geometry)[2:]
        out = x.new_empty((x.shape[0], w.shape[1], height // 2, width // 2))

        def update(running_mean, running_var):
            affine = (weight, bias, group_weight, group_bias)
            arguments = (x, w, conv_bias, running_mean, running_var, *affine, out, workspace)
            run(ops.conv_bn_pool_forward, *arguments, **options)

        run_updating(update, running_mean, running_var, options["training"])
        if keep:
            ctx.save_for_backward(*tensors, workspace.memory)
            ctx.layout, ctx.options, ctx.geometry, ctx.numerics = layout, options, geometry, numerics
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, dout):
        x, w, conv_bias, weight, bias, group_weight, group_bias, memory = ctx.saved_tensors
        need_x, need_w, *need = ctx.needs_input_grad[:7]
        parameters = (conv_bias, weight, bias, group_weight, group_bias)
        gradients = [torch.empty_like(t) if needed else None for t, needed in zip(parameters, need)]
        plan, groups, training = (ctx.options[name] for name in ("plan", "groups", "training"))
        dgrad, wgrad = gradient_plans(x, w, ctx.geometry, ctx.numerics, need_x, need_w)
        dx = dw = dy = None
        if (dgrad is None, wgrad is None) != (not need_x, not need_w):
            dgrad = wgrad = None
            dy = x.new_empty(output_shape(x.shape, w.shape, ctx.geometry))
        dgrad, made, output, of_wgrad, of_dgrad = _prepare_backward(
            plan, x.shape, groups, training, dgrad, wgrad, x.device
        )
        # Large arrays are made as late, and given back as early, as can be: the step's peak of memory is here.
        kept, output = Workspace(memory, ctx.layout), Workspace.empty(output, x.device)
        tensors = (dense(dout), weight, bias, group_weight, *gradients, dy)
        options = {"plan": plan, "groups": groups, "training": training}
        run(ops.conv_bn_pool_backward, *tensors, Workspace.empty(made, x.device), kept, output, **options)
        if wgrad:  # first: the room of its workspaces is dx's then
            dw = torch.empty_like(w)
            run(ops.weight_gradient, wgrad, output, kept, x, dw, Workspace.empty(of_wgrad, x.device))
        if dgrad:
            dx = torch.empty_like(x)
            run(ops.input_gradient, dgrad, output, w, dx, Workspace.empty(of_dgrad, x.device))
        if dy is not None:
            dx, dw = conv_gradients(x, w, dy, ctx.geometry, ctx.numerics, need_x, need_w)
        return dx, dw, *gradients, *[None] * 6


@functools.lru_cache(maxsize=1024)
def _prepare(plan, x_shape, groups, training, keep, device) -> Layout:
    """Layout of the workspace. Compiles the forward's kernels at the same time, where launches would one by one."""
    compile_together(ops.kernels(plan, groups, training, keep), device)
    return Layout(ops.buffers(plan, x_shape, groups, training, keep))


@functools.lru_cache(maxsize=1024)
def _prepare_backward(plan, x_shape, groups, training, dgrad, wgrad, device):
    """dgrad's plan for cells, and layouts of what the backward, wgrad and dgrad write. Compiles as `_prepare` does."""
    cells = bool(dgrad or wgrad)
    dgrad = dgrad and dgrad.of_cells()
    compile_together(ops.gradient_kernels(plan, groups, x_shape, training, dgrad, wgrad), device)
    buffers = (
        ops.gradient_buffers(plan, x_shape[0]),
        ops.output_gradient_buffers(plan, x_shape[0], cells),
        ops.weight_gradient_buffers(wgrad, x_shape, training) if wgrad else {},
        ops.input_gradient_buffers(dgrad) if dgrad else {},
    )
    return dgrad, *map(Layout, buffers)


def fused_plan(x, conv_weight, padding, num_groups, numerics, others=()):
    """(plan, None) if the fused kernels take the model on x, else (None, the reason). others: the other parameters."""
    if torch.is_autocast_enabled(x.device.type):
        return None, "autocast gives the operators different dtypes"
    if any(t is not None and t.dtype != x.dtype for t in (conv_weight, *others)):
        return None, "input and parameters have different dtypes"
    plan, reason = tensor_core_plan(x, conv_weight.shape, _geometry(padding), numerics)
    reason = reason or ops.obstacle(plan, num_groups)
    return (None, reason) if reason else (plan, None)


def _geometry(padding):
    return Geometry((1, 1), pair(padding, "padding"), (0, 0), (1, 1), 1)


def conv_bn_tanh_max_pool_group_norm(
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
    num_groups: int,
    group_weight: torch.Tensor | None = None,
    group_bias: torch.Tensor | None = None,
    group_eps: float = 1e-5,
    numerics: str = "auto",
    plan=None,
) -> torch.Tensor:
    """group_norm(max_pool2d(tanh(batch_norm(conv_transpose2d(input, conv_weight, conv_bias, padding=padding))), 2)).

    input: [N, Cin, H, W]; conv_weight: [Cin, Cout, KH, KW]; all others per channel (Cout,), or None as in batch_norm
    and group_norm. One dtype for all: float32, float16 or bfloat16. For shapes that the tensor-core kernels take
    (`modelnew.explain` tells); ValueError with the reason for others, and batch_norm's errors.
    plan: that of `fused_plan` for these arguments, from a caller who has it.
    Returns [N, Cout, OH/2, OW/2], rounded down.
    """
    check_numerics(numerics)
    others = (conv_bias, running_mean, running_var, weight, bias, group_weight, group_bias)
    check_batch_norm_call(running_mean, running_var, training, momentum, eps)
    geometry = _geometry(padding)
    key = (training, num_groups, geometry, *map(_facts, (input, conv_weight, *others)))
    if key not in _checked:
        _check(input, conv_weight, others, geometry, training, momentum, eps, num_groups)
        if len(_checked) == 1000:
            _checked.clear()
        _checked.add(key)
    if plan is None:
        plan, reason = fused_plan(input, conv_weight, padding, num_groups, numerics, others)
        if reason:
            raise ValueError(f"the fused kernels do not take this: {reason}")
    options = {
        "plan": plan,
        "training": bool(training),
        "momentum": momentum,
        "eps": eps,
        "groups": num_groups,
        "group_eps": group_eps,
    }
    tensors = (input, conv_weight, conv_bias, weight, bias, group_weight, group_bias)
    keep = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
    rest = (running_mean, running_var, geometry, resolve(numerics, input), keep, options)
    return _Fused.apply(*tensors, *rest)


def _facts(tensor):
    return None if tensor is None else (tensor.shape, tensor.dtype, tensor.device)


def _check(input, conv_weight, others, geometry, training, momentum, eps, num_groups):
    """All errors that shapes, dtypes and devices can be the reason of."""
    conv_bias, running_mean, running_var, weight, bias, group_weight, group_bias = others
    one_device((input, conv_weight, *others))
    shape = output_shape(input.shape, conv_weight.shape, geometry)
    check_batch_norm(input.new_empty(1).expand(shape), running_mean, running_var, weight, bias, training, momentum, eps)
    for name, tensor in (("conv_bias", conv_bias), ("group_weight", group_weight), ("group_bias", group_bias)):
        if tensor is not None and tensor.shape != (shape[1],):
            raise ValueError(f"{name} must have shape ({shape[1]},), received {tuple(tensor.shape)}")
    if num_groups < 1 or shape[1] % num_groups:
        raise ValueError(f"num_groups must divide the {shape[1]} channels, received {num_groups}")
