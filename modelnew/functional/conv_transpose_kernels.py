"""conv_transpose2d's forward and gradients as operations of `calls.call`. `kernels_of` picks the kernels."""

import math

import numpy as np

from cupy_kernels import channel_sum as bias_ops
from cupy_kernels import common, depthwise, fp16_tiles, thin
from cupy_kernels import conv_transpose as ops
from cupy_kernels import conv_transpose_mma as mma
from cupy_kernels import conv_wgrad_mma as wgrad_mma
from cupy_kernels.conv_transpose import logical

from ..numerics import gather_gemm_split, tensor_core_plan, wgrad_plan
from . import gather_gemm


def kernels_of(dtype, x_shape, w_shape, geometry, choice, formats=(False, False)):
    """The rule that picks the kernels of a forward: (name, what these kernels need).

    - ("depthwise", None).
    - ("thin", None): few output channels, float32.
    - ("resident bands", plan): `conv_transpose_mma`, for stride 1 and contiguous tensors.
    - ("implicit GEMM", split): `gather_gemm`, for nearly everything else.
    - ("general", reason): the general kernels, and why tensor cores do not run.

    dtype: NumPy's.
    formats: of x and w, whether they are channels_last.
    """
    if depthwise.takes(w_shape, geometry):
        return "depthwise", None
    if thin.takes(x_shape, w_shape, geometry, dtype):
        return "thin", None
    if not any(formats):
        plan, _ = tensor_core_plan(x_shape, dtype, w_shape, geometry, choice)
        if plan:
            return "resident bands", plan
    split, reason = gather_gemm_split(dtype, tuple(x_shape), tuple(w_shape), geometry, choice)
    return ("implicit GEMM", split) if split else ("general", reason)


def forward(new, x, w, bias, geometry, choice, formats=(False, False)):
    """Computes y. formats: whether x, and w, are channels_last; the arrays are then [N, H, W, C]."""
    shapes = tuple(logical(t.shape, last) for t, last in zip((x, w), formats))
    kernels, detail = kernels_of(x.dtype, *shapes, geometry, choice, formats)
    if kernels == "implicit GEMM":
        return gather_gemm.forward(new, x, w, bias, geometry, detail, choice.gpu, *formats)
    y = new(gather_gemm.physical(ops.output_shape(*shapes, geometry), formats[0]), x.dtype)
    if kernels == "depthwise":
        depthwise.gather(x, w, bias, y, geometry, formats[0])
    elif kernels == "thin":
        thin.forward(x, w, bias, y, geometry, *formats)
    elif kernels == "resident bands":
        mma.conv_transpose_mma(detail, x, w, bias, y, *_mma_workspaces(new, detail))
    else:
        ops.conv_transpose_forward(x, w, bias, y, _packed(new, w), geometry)
    return y


def gradients(new, x, w, dy, x_shape, w_shape, geometry, choice, needed, formats=(False, False)):
    """Computes `conv_gradients`. formats: as in `forward`, of x and dy, and of w."""
    need_x, need_w, need_bias = needed
    dx = dw = None
    if need_x or need_w:
        dx, dw = _of_operands(new, x, w, dy, x_shape, w_shape, geometry, choice, need_x, need_w, formats)
    return dx, dw, _channel_sums(new, dy, formats[0]) if need_bias else None


def _of_operands(new, x, w, dy, x_shape, w_shape, geometry, choice, need_x, need_w, formats):
    """(dx, dw) of `gradients`."""
    if depthwise.takes(w_shape, geometry):
        return _depthwise_gradients(new, x, w, dy, x_shape, w_shape, geometry, (need_x, need_w), formats[0])
    if thin.takes(x_shape, w_shape, geometry, dy.dtype):
        return _thin_gradients(new, x, w, dy, x_shape, w_shape, geometry, need_x, need_w, formats)
    split, _ = gather_gemm_split(dy.dtype, tuple(x_shape), tuple(w_shape), geometry, choice)
    dgrad, wgrad = gradient_plans(dy.dtype, x_shape, w_shape, geometry, choice, need_x, need_w)
    if split and (any(formats) or (need_x and not dgrad) or (need_w and not wgrad)):
        how = geometry, split, choice.gpu, *formats, need_x, need_w
        return gather_gemm.gradients(new, x, w, dy, x_shape, w_shape, *how)
    dx, dw = new(x_shape, dy.dtype) if need_x else None, new(w_shape, dy.dtype) if need_w else None
    packed, exponents = _packed_fp16(new, dy, wgrad.split) if wgrad else (None, None)
    if need_w and wgrad:  # first: its workspaces are free again before dx is made
        partial = new.scratch(wgrad.partial_size, np.float32)
        x_packed = _packed_fp16(new, x, wgrad.split)
        wgrad_mma.conv_wgrad_mma(wgrad, *x_packed, None, packed, exponents, None, partial, dw)
    elif need_w:
        dtype = common.accumulator_dtype(dy)
        size = ops.wgrad_workspace_size(x_shape, w_shape, geometry, dtype == np.float64)
        ops.conv_transpose_wgrad(x, dy, dw, new.scratch(size, dtype), geometry)
    if need_x and dgrad:
        source = packed if wgrad else dy
        mma.conv_transpose_mma(dgrad, source, w, None, dx, *_mma_workspaces(new, dgrad), exponents)
    elif need_x:
        ops.conv_transpose_dgrad(dy, w, dx, _packed(new, w), geometry)
    return dx, dw


def _depthwise_gradients(new, x, w, dy, x_shape, w_shape, geometry, needed, channels_last):
    dx = dw = None
    if needed[0]:
        dx = new(gather_gemm.physical(x_shape, channels_last), dy.dtype)
        depthwise.gather(dy, w, None, dx, geometry, channels_last, dgrad=True)
    if needed[1]:
        dw = new(w_shape, dy.dtype)
        size = depthwise.wgrad_workspace_size(x_shape, w_shape)
        depthwise.wgrad(x, dy, dw, new.scratch(size, common.accumulator_dtype(dy)), geometry, channels_last)
    return dx, dw


def _thin_gradients(new, x, w, dy, x_shape, w_shape, geometry, need_x, need_w, formats):
    dx = dw = None
    if need_x:
        dx = new(gather_gemm.physical(x_shape, formats[0]), dy.dtype)
        thin.dgrad(dy, w, dx, geometry, *formats)
    if need_w:
        dw = new(gather_gemm.physical(w_shape, formats[1]), dy.dtype)
        partial = new.scratch(thin.wgrad_workspace_size(x_shape, w_shape), np.float32)
        thin.wgrad(x, dy, dw, partial, geometry, *formats)
    return dx, dw


def gradient_plans(dtype, x_shape, w_shape, geometry, choice, need_x, need_w):
    """The tensor-core kernels' plans for dx and for dw; None where not needed or not supported. dtype: NumPy's.

    If there is one for dw, dy is packed for both.
    """
    dgrad = wgrad = None
    if need_w:
        wgrad, _ = wgrad_plan(x_shape, dtype, w_shape, geometry, choice)
    if need_x:
        dy_shape, packed = ops.output_shape(x_shape, w_shape, geometry), wgrad is not None
        dgrad, _ = tensor_core_plan(dy_shape, dtype, w_shape, geometry, choice, dgrad=True, packed=packed)
    return dgrad, wgrad


def _packed_fp16(new, tensor, split):
    """(the tensor as fp16 tiles, exponents of the scales of its parts), see `cupy_kernels.fp16_tiles`."""
    exponents = new.scratch(fp16_tiles.exponents_size(tensor.shape, tensor.itemsize), np.int32)
    fp16_tiles.largest_magnitude(tensor, exponents)
    packed = new.scratch(fp16_tiles.packed_shape(tensor.shape, split), np.float16)
    fp16_tiles.pack_fp16(tensor, exponents, None, packed, split=split)
    return packed, exponents


def _channel_sums(new, tensor, channels_last):
    if channels_last:
        tensor = tensor.reshape((math.prod(tensor.shape[:-1]), tensor.shape[-1]))
    sums = new((tensor.shape[1],), tensor.dtype)
    partial = new.scratch(bias_ops.channel_sum_workspace_size(tensor), np.float64)
    bias_ops.channel_sum(tensor, sums, partial)
    return sums


def _mma_workspaces(new, plan):
    """Memory for (packed weights, exponents of their scales)."""
    return new.scratch(plan.packed_size, np.float16), new.scratch(plan.rows, np.int32)


def _packed(new, w):
    return new.scratch(ops.packed_weight_size(w.shape), common.accumulator_dtype(w))
