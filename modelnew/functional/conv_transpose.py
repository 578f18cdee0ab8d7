"""conv_transpose2d, with the signature of torch.nn.functional.conv_transpose2d."""

from typing import NamedTuple

import torch
from torch.autograd.function import once_differentiable

from cupy_kernels import channel_sum as bias_ops
from cupy_kernels import conv_transpose as ops
from cupy_kernels import conv_transpose_mma as mma
from cupy_kernels import conv_wgrad_mma as wgrad_mma
from cupy_kernels import fp16_cells

from .. import autocast
from ..interop import accumulator_dtype, aligned, check_floating, dense, one_device, pair, run
from ..numerics import check_numerics, resolve, tensor_core_plan, wgrad_plan


class _ConvTranspose2d(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, w, bias, geometry, numerics):
        x, w, bias = dense(x), dense(w), dense(bias)
        y = x.new_empty(ops.output_shape(x.shape, w.shape, geometry))
        plan, _ = tensor_core_plan(x, w.shape, geometry, numerics)
        if plan:
            run(mma.conv_transpose_mma, plan, aligned(x), w, bias, y, *mma_workspaces(plan, w))
        else:
            run(ops.conv_transpose_forward, x, w, bias, y, _packed(w), geometry)
        ctx.save_for_backward(x, w)
        ctx.geometry, ctx.numerics = geometry, resolve(numerics, x)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        x, w = ctx.saved_tensors
        dy, db = dense(dy), None
        if ctx.needs_input_grad[2]:
            db = _channel_sums(dy)
        dx, dw = conv_gradients(x, w, dy, ctx.geometry, ctx.numerics, *ctx.needs_input_grad[:2])
        return dx, dw, db, None, None


class Cells(NamedTuple):
    """A tensor as fp16 cells, and what goes with them, see `cupy_kernels.fp16_cells`."""

    cells: torch.Tensor
    exponents: torch.Tensor
    sums: torch.Tensor | None = None


def conv_gradients(x, w, dy, geometry, numerics, need_x, need_w):
    """(dx, dw), None where not needed."""
    dgrad, wgrad = gradient_plans(x, w, geometry, numerics, need_x, need_w)
    dx = dw = None
    cells = to_cells(dy, wgrad.split) if wgrad else None
    if need_x:
        if cells and dgrad:
            dx = dgrad_of_cells(dgrad, x, w, cells)
        else:
            dx = torch.empty_like(x)
            if dgrad:
                run(mma.conv_transpose_mma, dgrad, aligned(dy), w, None, dx, *mma_workspaces(dgrad, w))
            else:
                run(ops.conv_transpose_dgrad, dy, w, dx, _packed(w), geometry)
    if need_w:
        if wgrad:
            dw = wgrad_of_cells(wgrad, to_cells(x, wgrad.split), w, cells)
        else:
            dw = torch.empty_like(w)
            dtype = accumulator_dtype(w)
            size = ops.wgrad_workspace_size(x.shape, w.shape, geometry, dtype == torch.float64)
            run(ops.conv_transpose_wgrad, x, dy, dw, w.new_empty(size, dtype=dtype), geometry)
    return dx, dw


def gradient_plans(x, w, geometry, numerics, need_x, need_w):
    """The tensor-core kernels' plans for dx and for dw, None where not needed or not taken."""
    dgrad = wgrad = None
    if need_x:
        dy = x.new_empty(()).expand(ops.output_shape(x.shape, w.shape, geometry))
        dgrad, _ = tensor_core_plan(dy, w.shape, geometry, numerics, dgrad=True)
    if need_w:
        wgrad, _ = wgrad_plan(x, w.shape, geometry, numerics)
    return dgrad, wgrad


def dgrad_of_cells(plan, x, w, dy: Cells):
    """dx; plan: that of a tensor dy."""
    dx = torch.empty_like(x)
    workspaces = mma_workspaces(plan, w)
    run(mma.conv_transpose_mma, plan.of_cells(), dy.cells, w, None, dx, *workspaces, dy.exponents)
    return dx


def wgrad_of_cells(plan, x: Cells, w, dy: Cells, borders=None):
    """dw. x may be centred if dy sums to 0 in each channel; borders: see `conv_wgrad_mma`."""
    dw, partial = torch.empty_like(w), w.new_empty(plan.partial_size, dtype=torch.float32)
    run(wgrad_mma.conv_wgrad_mma, plan, *x, dy.cells, dy.exponents, borders, partial, dw)
    return dw


def _channel_sums(tensor):
    sums = tensor.new_empty(tensor.shape[1])
    partial = tensor.new_empty(bias_ops.channel_sum_workspace_size(tensor.shape), dtype=accumulator_dtype(tensor))
    run(bias_ops.channel_sum, tensor, sums, partial)
    return sums


def to_cells(tensor, split, exponents=None, centred=False) -> Cells:
    """`tensor` as Cells; exponents: of scales of its parts, where they are known already.

    centred: less the means of the first image's channels.
    """
    tensor = aligned(tensor)
    sums = _channel_sums(tensor[:1]) if centred else None
    if exponents is None:
        size = fp16_cells.exponents_size(tensor.shape, tensor.element_size())
        exponents = tensor.new_empty(size, dtype=torch.int32)
        run(fp16_cells.largest_magnitude, tensor, exponents)
    cells = tensor.new_empty(fp16_cells.cells_shape(tensor.shape, split), dtype=torch.float16)
    run(fp16_cells.to_cells, tensor, exponents, sums, cells, split=split)
    return Cells(cells, exponents, sums)


def mma_workspaces(plan, w):
    """(packed weights, exponents of their scales), to be written."""
    return w.new_empty(plan.packed_size, dtype=torch.float16), w.new_empty(plan.rows, dtype=torch.int32)


def _packed(w):
    return w.new_empty(ops.packed_weight_size(w.shape), dtype=accumulator_dtype(w))


def conv_transpose2d(
    input: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    stride: int | tuple[int, int] = 1,
    padding: int | tuple[int, int] = 0,
    output_padding: int | tuple[int, int] = 0,
    groups: int = 1,
    dilation: int | tuple[int, int] = 1,
    *,
    numerics: str = "auto",
) -> torch.Tensor:
    """y[n, oc, oh, ow] = bias[oc] + sum over ic, kh, kw of x[n, ic, ih, iw] w[ic, oc, kh, kw], oh = ih s - p + kh d.

    See torch.nn.functional.conv_transpose2d.

    input: [N, Cin, H, W] or [Cin, H, W]; float32, float64, float16, bfloat16, summed in float32 (float64 for float64).
    weight: [Cin, Cout/groups, KH, KW]; bias: [Cout] or None; both of the input's dtype and on its device.
    Under torch.autocast all three are cast to its dtype.
    Returns [N, Cout, OH, OW] (or [Cout, OH, OW]), contiguous, OH = (H-1) s - 2p + d (KH-1) + output_padding + 1.
    numerics: "tf32", "fp32" or "auto", see `modelnew.numerics`; "tf32" matters where tensor cores take the convolution.
    Raises TypeError for other or differing dtypes, ValueError for shapes and hyper-parameters that do not fit,
    RuntimeError for tensors on several devices.
    """
    check_floating(input=input, weight=weight, bias=bias)
    input, weight, bias = autocast.lower(input, weight, bias)
    dtypes = {t.dtype for t in (input, weight, bias) if t is not None}
    if len(dtypes) > 1:
        raise TypeError(f"input, weight and bias must have one dtype, received {', '.join(sorted(map(str, dtypes)))}")
    one_device((input, weight, bias))
    check_numerics(numerics)
    if input.dim() not in (3, 4):
        raise ValueError(f"input must be [N, C, H, W] or [C, H, W], received shape {tuple(input.shape)}")
    geometry = ops.Geometry(
        pair(stride, "stride"),
        pair(padding, "padding"),
        pair(output_padding, "output_padding"),
        pair(dilation, "dilation"),
        groups,
    )
    x = input if input.dim() == 4 else input.unsqueeze(0)
    ops.output_shape(x.shape, weight.shape, geometry)
    if bias is not None and bias.shape != (weight.shape[1] * groups,):
        raise ValueError(f"bias must have shape ({weight.shape[1] * groups},), received {tuple(bias.shape)}")
    y = _ConvTranspose2d.apply(x, weight, bias, geometry, numerics)
    return y if input.dim() == 4 else y.squeeze(0)
