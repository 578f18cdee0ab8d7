"""All five operators of ModelNew in three main kernels forward, with the pooling in the convolution's epilogue."""

import functools

import torch
from torch.autograd.function import once_differentiable

from cupy_kernels import conv_bn_pool as ops
from cupy_kernels.conv_transpose import Geometry, output_shape

from ..interop import Layout, Part, Workspace, aligned, compile_together, dense, one_device, pair, run
from ..numerics import check_numerics, resolve, tensor_core_plan
from .batch_norm import check_batch_norm, check_batch_norm_call, run_updating
from .conv_transpose import Cells, conv_gradients, dgrad_of_cells, gradient_plans, to_cells, wgrad_of_cells

_DTYPES = {dtype: getattr(torch, dtype.__name__) for dtype in ops.DTYPES}
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
        kept = {name: Part(memory, *place) for name, place in ctx.layout.places.items()}
        need = ctx.needs_input_grad
        pooled, mean, invstd = kept["pooled"], kept["mean"], kept["invstd"]
        options = {"plan": ctx.options["plan"], "groups": ctx.options["groups"]}
        training = ctx.options["training"]
        sizes = ops.gradient_buffers(options["plan"], x.shape[0])
        g, partials, sums, dy_exponents = (x.new_empty(s, dtype=_DTYPES[dtype]) for s, dtype in sizes.values())
        groups = (kept["group_mean"], kept["group_invstd"])
        tensors = (dense(dout), pooled, mean, invstd, weight, bias, group_weight, *groups)
        run(ops.pooled_gradients, *tensors, g, partials, plan=options["plan"])
        wanted = (
            (weight, need[3]),
            (bias, need[4]),
            (group_weight, need[5]),
            (group_bias, need[6]),
            (conv_bias, need[2]),
        )
        gradients = [torch.empty_like(t) if needed else None for t, needed in wanted]
        tensors = (partials, mean, invstd, weight, sums, dy_exponents)
        run(ops.parameter_gradients, *tensors, *gradients, **options, training=training)
        dweight, dbias, dgroup_weight, dgroup_bias, dconv_bias = gradients
        dx = dw = None
        if need[0] or need[1]:
            packed = (kept[name] for name in ("taps", "saved", "exponents", "unit_exponents"))
            tensors = (g, *packed, mean, invstd, weight, sums if training else None)
            dgrad, wgrad = gradient_plans(x, w, ctx.geometry, ctx.numerics, *need[:2])
            if bool(dgrad) == need[0] and bool(wgrad) == need[1]:
                cells = x.new_empty(ops.output_cells_shape(options["plan"], x.shape[0]), dtype=torch.float16)
                run(ops.conv_output_gradient_cells, *tensors, dy_exponents, cells, **options)
                del g, tensors  # 76 MB of a large batch, which the next steps can have
                dy = Cells(cells, dy_exponents)
                if wgrad:  # first: the room of its workspaces is dx's then
                    # With statistics of the batch dy sums to 0, so x may be centred (benchmarks/NOTES.md says why).
                    x_cells = to_cells(x, wgrad.split, kept["unit_exponents"], centred=training)
                    dw = wgrad_of_cells(wgrad, x_cells, w, dy)
                    del x_cells
                if dgrad:
                    dx = dgrad_of_cells(dgrad, x, w, dy)
            else:
                dy = x.new_empty(output_shape(x.shape, w.shape, ctx.geometry))
                run(ops.conv_output_gradient, *tensors, dy, **options)
                del g, tensors
                dx, dw = conv_gradients(x, w, dy, ctx.geometry, ctx.numerics, *need[:2])
        return dx, dw, dconv_bias, dweight, dbias, dgroup_weight, dgroup_bias, *[None] * 6


@functools.lru_cache(maxsize=1024)
def _prepare(plan, x_shape, groups, training, keep, device) -> Layout:
    """Layout of the workspace. Compiles the forward's kernels at the same time, where launches would one by one."""
    compile_together(ops.kernels(plan, groups, training, keep), device)
    return Layout(ops.buffers(plan, x_shape, groups, training, keep))


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
) -> torch.Tensor:
    """group_norm(max_pool2d(tanh(batch_norm(conv_transpose2d(input, conv_weight, conv_bias, padding=padding))), 2)).

    input: [N, Cin, H, W]; conv_weight: [Cin, Cout, KH, KW]; all others per channel (Cout,), or None as in batch_norm
    and group_norm. One dtype for all: float32, float16 or bfloat16. For shapes that the tensor-core kernels take
    (`modelnew.explain` tells); ValueError with the reason for others, and batch_norm's errors.
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
    plan, reason = fused_plan(input, conv_weight, padding, num_groups, numerics, others)
    if not plan:
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
