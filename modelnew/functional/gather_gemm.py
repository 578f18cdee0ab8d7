"""conv_transpose2d's forward and gradients as implicit GEMMs, in either memory format: operations of `calls.call`.

Arrays are [N, C, H, W], or [N, H, W, C] with channels_last. Weights are [Cin, Cout/groups, KH, KW], or [Cin, KH, KW,
Cout/groups] with w_channels_last. These are the physical shapes of channels_last tensors. Each gradient has the format
of its tensor.
"""

import numpy as np

from cupy_kernels import conv_transpose as ops
from cupy_kernels import fp16_tiles, gather_gemm, gather_gemm_plan
from cupy_kernels.common import scalar


def physical(shape, channels_last) -> tuple[int, ...]:
    """The shape of the array that stores a tensor of shape [N, C, H, W]."""
    return (shape[0], *shape[2:], shape[1]) if channels_last else tuple(shape)


def forward(new, x, w, bias, geometry, split, gpu, channels_last, w_channels_last):
    """y of conv_transpose2d. gpu: `Choice.gpu`."""
    x_shape, w_shape = ops.logical(x.shape, channels_last), ops.logical(w.shape, w_channels_last)
    plan = gather_gemm_plan.plan(x_shape, w_shape, geometry, split, scalar(x), gpu)
    y = new(physical(ops.output_shape(x_shape, w_shape, geometry), channels_last), x.dtype)
    _gather(
        new, plan, _packed(new, x, geometry.groups, split, channels_last), w, bias, y, channels_last, w_channels_last
    )
    return y


def gradients(new, x, w, dy, x_shape, w_shape, geometry, split, gpu, channels_last, w_channels_last, need_x, need_w):
    """(dx, dw), None where not needed. x may be None if dw is not needed, w if dx is not. Shapes are logical."""
    dy_packed = _packed(new, dy, geometry.groups, split, channels_last)
    dx = dw = None
    if need_x:
        plan = gather_gemm_plan.plan(x_shape, w_shape, geometry, split, scalar(dy), gpu, dgrad=True)
        dx = new(physical(x_shape, channels_last), dy.dtype)
        _gather(new, plan, dy_packed, w, None, dx, channels_last, w_channels_last)
    if need_w:
        plan = gather_gemm_plan.wgrad_plan(x_shape, w_shape, geometry, split, scalar(dy), gpu)
        dw = new(physical(w_shape, w_channels_last), dy.dtype)
        partial = new.scratch(plan.partial_size, np.float32)
        x_packed = _packed(new, x, geometry.groups, split, channels_last)
        gather_gemm.wgrad(plan, *x_packed, *dy_packed, dw, partial, w_channels_last)
    return dx, dw


def _packed(new, tensor, groups, split, channels_last):
    """(the tensor packed, exponents of its scale)"""
    name, shape = scalar(tensor), ops.logical(tensor.shape, channels_last)
    if gather_gemm.is_packed(shape, groups, name, channels_last):
        return tensor, None
    exponents = None
    if name == "float":
        exponents = new.scratch(fp16_tiles.exponents_size(shape, tensor.itemsize), np.int32)
    packed = new.scratch(gather_gemm.packed_size(shape, groups, split), gather_gemm.operand_dtype(name))
    gather_gemm.pack_pixels(tensor, exponents, packed, split, groups, channels_last)
    return packed, exponents


def _gather(new, plan, source, w, bias, out, channels_last, w_channels_last):
    weights = new.scratch(plan.packed_size, gather_gemm.operand_dtype(scalar(w)))
    exponents = new.scratch(plan.columns, np.int32) if scalar(w) == "float" else None
    partial = new.scratch(plan.partial_size, np.float32) if plan.partial_size else None
    turn = plan.phased and not channels_last
    to = new.scratch(physical(out.shape, True), out.dtype) if turn else out
    workspaces = weights, exponents, partial
    gather_gemm.gather(plan, *source, w, bias, to, *workspaces, channels_last or turn, w_channels_last)
    if turn:
        gather_gemm.turn_rows(to, out)
