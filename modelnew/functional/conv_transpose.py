"""conv_transpose2d, with the signature of torch.nn.functional.conv_transpose2d."""

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from cupy_kernels import channel_sum as bias_ops
from cupy_kernels import common, fp16_tiles
from cupy_kernels import conv_transpose as ops
from cupy_kernels import conv_transpose_mma as mma
from cupy_kernels import conv_wgrad_mma as wgrad_mma

from .. import autocast
from ..calls import call, dense_after
from ..cases import Case
from ..interop import aligned, check_floating, dense, integer, one_device, pair
from ..numerics import check_numerics, choose, tensor_core_plan, wgrad_plan, without_tensor_cores
from ..untraced import untraced
from .gradients import apply, differentiable, will_need_grad


def _forward(new, x, w, bias, geometry, choice):
    y = new(ops.output_shape(x.shape, w.shape, geometry), x.dtype)
    plan, _ = tensor_core_plan(x.shape, x.dtype, w.shape, geometry, choice)
    if plan:
        mma.conv_transpose_mma(plan, x, w, bias, y, *_mma_workspaces(new, plan))
    else:
        ops.conv_transpose_forward(x, w, bias, y, _packed(new, w), geometry)
    return y


class _ConvTranspose2d(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, w, bias, geometry, choice, check):
        y = call(_forward, x, w, bias, geometry, choice, check=check)
        ctx.save_for_backward(x, w)
        ctx.options = geometry, choice
        return y

    @staticmethod
    def backward(ctx, dy):
        x, w = ctx.saved_tensors
        need_x, need_w, need_bias = needed = ctx.needs_input_grad[:3]
        if not torch.is_grad_enabled():
            return *conv_gradients(x, w, dy, x.shape, w.shape, *ctx.options, needed), None, None, None
        dx = _InputGradient.apply(dy, w, x.shape, *ctx.options) if need_x else None
        dw = _WeightGradient.apply(x, dy, w.shape, *ctx.options) if need_w else None
        return dx, dw, dy.sum((0, 2, 3)) if need_bias else None, None, None, None


# A transposed convolution y = T(x, w), its dx = D(dy, w) and its dw = W(x, dy) are linear in either argument, and each
# one's gradients are the other two: of T they are D and W, of D they are T and W, of W they are D and T.


class _InputGradient(torch.autograd.Function):
    @staticmethod
    def forward(dy, w, x_shape, geometry, choice):
        return conv_gradients(None, w, dy, x_shape, w.shape, geometry, choice, (True, False, False))[0]

    @staticmethod
    def setup_context(ctx, inputs, output):
        dy, w, _, *ctx.options = inputs
        ctx.save_for_backward(dy, w)

    @staticmethod
    def backward(ctx, v):
        dy, w = ctx.saved_tensors
        need_dy, need_w = ctx.needs_input_grad[:2]
        v = aligned(v)
        ddy = _ConvTranspose2d.apply(v, w, None, *ctx.options, None) if need_dy else None
        dw = differentiable(_WeightGradient, v, dy, w.shape, *ctx.options) if need_w else None
        return ddy, dw, None, None, None


class _WeightGradient(torch.autograd.Function):
    @staticmethod
    def forward(x, dy, w_shape, geometry, choice):
        return conv_gradients(x, None, dy, x.shape, w_shape, geometry, choice, (False, True, False))[1]

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, dy, _, *ctx.options = inputs
        ctx.save_for_backward(x, dy)

    @staticmethod
    def backward(ctx, v):
        x, dy = ctx.saved_tensors
        need_x, need_dy = ctx.needs_input_grad[:2]
        v = dense(v)
        dx = differentiable(_InputGradient, dy, v, x.shape, *ctx.options) if need_x else None
        ddy = _ConvTranspose2d.apply(x, v, None, *ctx.options, None) if need_dy else None
        return dx, ddy, None, None, None


def conv_gradients(x, w, dy, x_shape, w_shape, geometry, choice, needed):
    """(dx, dw, gradient of the bias), None where not needed. x is for dw alone, w for dx: the other may be None."""
    x = None if x is None else aligned(x)
    return call(gradients, x, w, aligned(dy), x_shape, w_shape, geometry, choice, needed)


def gradients(new, x, w, dy, x_shape, w_shape, geometry, choice, needed):
    """The operation of `conv_gradients`, see `calls.call`."""
    need_x, need_w, need_bias = needed
    dgrad, wgrad = gradient_plans(dy.dtype, x_shape, w_shape, geometry, choice, need_x, need_w)
    dx, dw = new(x_shape, dy.dtype) if need_x else None, new(w_shape, dy.dtype) if need_w else None
    packed, exponents, _ = pack_fp16(new.scratch, dy, wgrad.split) if wgrad else (None, None, None)
    if need_x and dgrad:
        source = (dgrad.of_packed(), packed) if wgrad else (dgrad, dy)
        mma.conv_transpose_mma(*source, w, None, dx, *_mma_workspaces(new, dgrad), *([exponents] if wgrad else ()))
    elif need_x:
        ops.conv_transpose_dgrad(dy, w, dx, _packed(new, w), geometry)
    if need_w and wgrad:
        partial = new.scratch(wgrad.partial_size, np.float32)
        x_packed = pack_fp16(new.scratch, x, wgrad.split)
        wgrad_mma.conv_wgrad_mma(wgrad, *x_packed, packed, exponents, None, partial, dw)
    elif need_w:
        dtype = common.accumulator_dtype(dy)
        size = ops.wgrad_workspace_size(x_shape, w_shape, geometry, dtype == np.float64)
        ops.conv_transpose_wgrad(x, dy, dw, new.scratch(size, dtype), geometry)
    return dx, dw, _channel_sums(new, dy) if need_bias else None


def gradient_plans(dtype, x_shape, w_shape, geometry, choice, need_x, need_w):
    """The tensor-core kernels' plans for dx and for dw, None where not needed or not taken. dtype: NumPy's."""
    dgrad = wgrad = None
    if need_x:
        dy_shape = ops.output_shape(x_shape, w_shape, geometry)
        dgrad, _ = tensor_core_plan(dy_shape, dtype, w_shape, geometry, choice, dgrad=True)
    if need_w:
        wgrad, _ = wgrad_plan(x_shape, dtype, w_shape, geometry, choice)
    return dgrad, wgrad


def pack_fp16(allocate, tensor, split, exponents=None, centred=False):
    """(packed, exponents, sums) of a tensor, see `cupy_kernels.fp16_tiles`.

    allocate: a `calls.New`, or its `scratch`. exponents: of scales of the tensor's parts, where they are known already.
    centred: less the means of the first image's channels, whose sums are else None.
    """
    sums = _channel_sums(allocate, tensor[:1]) if centred else None
    if exponents is None:
        exponents = allocate((fp16_tiles.exponents_size(tensor.shape, tensor.itemsize),), np.int32)
        fp16_tiles.largest_magnitude(tensor, exponents)
    packed = allocate(fp16_tiles.packed_shape(tensor.shape, split), np.float16)
    fp16_tiles.pack_fp16(tensor, exponents, sums, packed, split=split)
    return packed, exponents, sums


def _channel_sums(allocate, tensor):
    sums = allocate((tensor.shape[1],), tensor.dtype)
    partial = allocate((bias_ops.channel_sum_workspace_size(tensor.shape),), common.accumulator_dtype(tensor))
    bias_ops.channel_sum(tensor, sums, partial)
    return sums


def _mma_workspaces(new, plan):
    """(packed weights, exponents of their scales), to be written."""
    return new.scratch(plan.packed_size, np.float16), new.scratch(plan.rows, np.int32)


def _packed(new, w):
    return new.scratch(ops.packed_weight_size(w.shape), common.accumulator_dtype(w))


def conv_transpose2d_as(x, w, bias, geometry: ops.Geometry, choice, check=lambda: None) -> torch.Tensor:
    """The convolution of a batch, multiplied as `choice`, a `numerics.Choice`, says. check: as in `calls.call`."""
    x, w, bias = dense_after(check, x, w, bias)
    tensors = aligned(x), w, bias
    if will_need_grad(*tensors):
        return apply(_ConvTranspose2d, *tensors, geometry, choice, check)
    return call(_forward, *tensors, geometry, choice, check=check)


@untraced
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
    check_numerics(numerics)
    input, weight, bias = autocast.lower(input, weight, bias)
    geometry = ops.Geometry(
        pair(stride, "stride"),
        pair(padding, "padding"),
        pair(output_padding, "output_padding"),
        pair(dilation, "dilation"),
        integer(groups, "groups"),
    )
    x = input if input.dim() != 3 else input.unsqueeze(0)
    y = conv_transpose2d_as(
        x, weight, bias, geometry, choose(numerics, x), check=lambda: _check(x, weight, bias, geometry)
    )
    return y if x is input else y.squeeze(0)


def _check(x, weight, bias, geometry):
    check_floating(input=x, weight=weight, bias=bias)
    dtypes = {t.dtype for t in (x, weight, bias) if t is not None}
    if len(dtypes) > 1:
        raise TypeError(f"input, weight and bias must have one dtype, received {', '.join(sorted(map(str, dtypes)))}")
    one_device((x, weight, bias))
    if x.dim() != 4:
        raise ValueError(f"input must be [N, C, H, W] or [C, H, W], received shape {tuple(x.shape)}")
    ops.output_shape(x.shape, weight.shape, geometry)
    channels = weight.shape[1] * geometry.groups
    if bias is not None and bias.shape != (channels,):
        raise ValueError(f"bias must have shape ({channels},), received {tuple(bias.shape)}")


class ConvTranspose2d(nn.ConvTranspose2d):
    """See torch.nn.ConvTranspose2d and `modelnew.functional.conv_transpose2d`. numerics: see `modelnew.numerics`."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        stride: int | tuple[int, int] = 1,
        padding: int | tuple[int, int] = 0,
        output_padding: int | tuple[int, int] = 0,
        groups: int = 1,
        bias: bool = True,
        dilation: int | tuple[int, int] = 1,
        padding_mode: str = "zeros",
        device=None,
        dtype=None,
        *,
        numerics: str = "auto",
    ):
        check_numerics(numerics)
        window = (kernel_size, stride, padding, output_padding)
        super().__init__(in_channels, out_channels, *window, groups, bias, dilation, padding_mode, device, dtype)
        self.numerics = numerics

    def forward(self, input: torch.Tensor, output_size=None) -> torch.Tensor:
        """output_size: [.., OH, OW] picks among the sizes that stride leaves open, instead of `output_padding`."""
        extra = self.output_padding
        if output_size is not None:
            window = (self.stride, self.padding, self.kernel_size)
            extra = self._output_padding(input, list(output_size), *window, 2, self.dilation)
        return conv_transpose2d(
            input,
            self.weight,
            self.bias,
            self.stride,
            self.padding,
            extra,
            self.groups,
            self.dilation,
            numerics=self.numerics,
        )


def conv_inputs(images):
    """x, w and bias."""
    # The small one is such that forward and dgrad are one variant on tensor cores: that takes seconds to compile.
    shapes = ((images, 64, 32, 32), (64, 128, 5, 5)) if images else ((2, 16, 9, 11), (16, 16, 3, 3))
    return {"x": torch.rand(shapes[0]), "w": torch.randn(shapes[1]) / 40, "bias": torch.randn(shapes[1][1])}


def conv_terms(images):
    """`Case.terms` for `conv_inputs`."""
    n, k, m, taps, pixels = (images, 64, 128, 25, 34 * 34) if images else (2, 16, 16, 9, 99)
    sums = {"gradient of w": n * pixels, "gradient of bias": n * pixels}
    return {"output": k * taps, "gradient of x": m * taps, **sums}


def _conv(numerics):
    return lambda x, w, bias: conv_transpose2d(x, w, bias, padding=1, numerics=numerics)


def torch_conv(x, w, bias):
    """The convolution of the cases by PyTorch."""
    return F.conv_transpose2d(x, w, bias, padding=1)


_GENERAL = ("conv_transpose.cu", "conv_transpose_wgrad.cu", "channel_sum.cu")
_MMA = ("conv_transpose_mma.cu", "pack_weight_fp16.cu", "conv_wgrad_mma.cu", "fp16_tiles.cu")
CASES = (
    Case(
        "conv_transpose2d, general",
        _GENERAL,
        _conv("fp32"),
        torch_conv,
        conv_inputs,
        conv_terms,
        within=without_tensor_cores,
    ),
    Case("conv_transpose2d, tf32", _MMA, _conv("tf32"), torch_conv, conv_inputs, conv_terms, rounded=True),
    Case("conv_transpose2d, fp32", _MMA, _conv("fp32"), torch_conv, conv_inputs, conv_terms),
)
