"""conv_transpose2d, with the signature of torch.nn.functional.conv_transpose2d."""

import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from cupy_kernels import channel_sum as bias_ops
from cupy_kernels import common, depthwise, fp16_tiles, thin
from cupy_kernels import conv_transpose as ops
from cupy_kernels import conv_transpose_mma as mma
from cupy_kernels import conv_wgrad_mma as wgrad_mma
from cupy_kernels.gather_gemm import logical

from .. import autocast
from ..calls import call, dense_after
from ..cases import Case
from ..formats import channels_last, restored, stored
from ..interop import NUMPY, aligned, check_floating, dense, integer, one_device, pair
from ..numerics import check_numerics, choose, gather_gemm_split, tensor_core_plan, wgrad_plan, without_tensor_cores
from ..untraced import untraced
from . import gather_gemm
from .affine import tensors_of
from .gradients import Function, apply, differentiable, will_need_grad

__all__ = ["ConvTranspose2d", "conv_transpose2d"]


def kernels_of(dtype, x_shape, w_shape, geometry, choice, formats=(False, False)):
    """The rule that picks a forward's kernels: (what kernels, what they need to know).

    ("depthwise", None). ("thin", None): few output channels, contiguous float32. ("resident bands", their plan):
    `conv_transpose_mma`, of stride 1 and contiguous tensors. ("implicit GEMM", split): `gather_gemm`, of nearly all
    else. ("general", why not the one before).
    dtype: NumPy's. formats: of x and w, whether they are channels_last.
    """
    if depthwise.takes(w_shape, geometry):
        return "depthwise", None
    if not any(formats):
        if thin.takes(x_shape, w_shape, geometry, dtype):
            return "thin", None
        plan, _ = tensor_core_plan(x_shape, dtype, w_shape, geometry, choice)
        if plan:
            return "resident bands", plan
    split, reason = gather_gemm_split(dtype, tuple(x_shape), tuple(w_shape), geometry, choice)
    return ("implicit GEMM", split) if split else ("general", reason)


def _forward(new, x, w, bias, geometry, choice, formats=(False, False)):
    """formats: of x and w, whether they are channels_last; the arrays are then [N, H, W, C]."""
    shapes = tuple(logical(t.shape, last) for t, last in zip((x, w), formats))
    kernels, detail = kernels_of(x.dtype, *shapes, geometry, choice, formats)
    if kernels == "implicit GEMM":
        return gather_gemm.forward(new, x, w, bias, geometry, detail, choice.wgmma, *formats)
    y = new(gather_gemm.physical(ops.output_shape(*shapes, geometry), formats[0]), x.dtype)
    if kernels == "depthwise":
        depthwise.gather(x, w, bias, y, geometry, formats[0])
    elif kernels == "thin":
        thin.forward(x, w, bias, y, geometry)
    elif kernels == "resident bands":
        mma.conv_transpose_mma(detail, x, w, bias, y, *_mma_workspaces(new, detail))
    else:
        ops.conv_transpose_forward(x, w, bias, y, _packed(new, w), geometry)
    return y


class _ConvTranspose2d(Function):
    @staticmethod
    def forward(ctx, x, w, bias, geometry, choice, formats, check):
        y = _call_forward(x, w, bias, geometry, choice, formats, check)
        ctx.save_for_backward(x, w)
        ctx.options = geometry, choice
        return y

    @staticmethod
    def backward(ctx, dy):
        x, w = ctx.saved_tensors
        need_x, need_w, need_bias = needed = ctx.needs_input_grad[:3]
        if not torch.is_grad_enabled():
            return *conv_gradients(x, w, dy, x.shape, w.shape, *ctx.options, needed), *[None] * 4
        dx = _InputGradient.apply(dy, w, x.shape, *ctx.options) if need_x else None
        dw = _WeightGradient.apply(x, dy, w.shape, *ctx.options) if need_w else None
        return dx, dw, dy.sum((0, 2, 3)) if need_bias else None, *[None] * 4


# A transposed convolution y = T(x, w), its dx = D(dy, w) and its dw = W(x, dy) are linear in either argument, and each
# one's gradients are the other two: of T they are D and W, of D they are T and W, of W they are D and T.


class _InputGradient(Function):
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
        ddy = conv_transpose2d_as(v, w, None, *ctx.options) if need_dy else None
        dw = differentiable(_WeightGradient, v, dy, w.shape, *ctx.options) if need_w else None
        return ddy, dw, None, None, None


class _WeightGradient(Function):
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
        ddy = conv_transpose2d_as(x, v, None, *ctx.options) if need_dy else None
        return dx, ddy, None, None, None


def conv_gradients(x, w, dy, x_shape, w_shape, geometry, choice, needed):
    """(dx, dw, gradient of the bias), None where not needed. x is for dw alone, w for dx: the other may be None.

    dx is of x's memory format, and dw of w's; of dy's, and contiguous, where they are None.
    """
    formats = x_last, w_last = _formats(dy if x is None else x, w, x_shape, w_shape, geometry, choice)
    arrays = (None if t is None else _array(t, last) for t, last in ((x, x_last), (w, w_last), (dy, x_last)))
    dx, dw, dbias = call(gradients, *arrays, x_shape, w_shape, geometry, choice, needed, formats)
    return restored(dx, x_last), restored(dw, w_last), dbias


def gradients(new, x, w, dy, x_shape, w_shape, geometry, choice, needed, formats=(False, False)):
    """The operation of `conv_gradients`, see `calls.call`. formats: as in `_forward`, of x and dy, and of w."""
    need_x, need_w, need_bias = needed
    dx = dw = None
    if need_x or need_w:
        dx, dw = _of_operands(new, x, w, dy, x_shape, w_shape, geometry, choice, need_x, need_w, formats)
    return dx, dw, _channel_sums(new, dy, formats[0]) if need_bias else None


def _of_operands(new, x, w, dy, x_shape, w_shape, geometry, choice, need_x, need_w, formats):
    """(dx, dw) of `gradients`."""
    if depthwise.takes(w_shape, geometry):
        return _depthwise_gradients(new, x, w, dy, x_shape, w_shape, geometry, (need_x, need_w), formats[0])
    if not any(formats) and thin.takes(x_shape, w_shape, geometry, dy.dtype):
        return _thin_gradients(new, x, w, dy, x_shape, w_shape, geometry, need_x, need_w)
    split, _ = gather_gemm_split(dy.dtype, tuple(x_shape), tuple(w_shape), geometry, choice)
    dgrad, wgrad = gradient_plans(dy.dtype, x_shape, w_shape, geometry, choice, need_x, need_w)
    if split and (any(formats) or (need_x and not dgrad) or (need_w and not wgrad)):
        how = geometry, split, choice.wgmma, *formats, need_x, need_w
        return gather_gemm.gradients(new, x, w, dy, x_shape, w_shape, *how)
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


def _thin_gradients(new, x, w, dy, x_shape, w_shape, geometry, need_x, need_w):
    dx, dw = new(x_shape, dy.dtype) if need_x else None, new(w_shape, dy.dtype) if need_w else None
    if need_x:
        thin.dgrad(dy, w, dx, geometry)
    if need_w:
        thin.wgrad(x, dy, dw, new.scratch(thin.wgrad_workspace_size(x_shape, w_shape), np.float32), geometry)
    return dx, dw


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


def _channel_sums(allocate, tensor, channels_last=False):
    if channels_last:
        tensor = tensor.reshape((math.prod(tensor.shape[:-1]), tensor.shape[-1]))
    sums = allocate((tensor.shape[1],), tensor.dtype)
    partial = allocate((bias_ops.channel_sum_workspace_size(tensor),), np.float64)
    bias_ops.channel_sum(tensor, sums, partial)
    return sums


def _mma_workspaces(new, plan):
    """(packed weights, exponents of their scales), to be written."""
    return new.scratch(plan.packed_size, np.float16), new.scratch(plan.rows, np.int32)


def _array(tensor, last):
    """The tensor as kernels take it, in a memory format; a copy where it has another or is not aligned."""
    return aligned(stored(tensor, last))


def _packed(new, w):
    return new.scratch(ops.packed_weight_size(w.shape), common.accumulator_dtype(w))


def conv_transpose2d_as(x, w, bias, geometry: ops.Geometry, choice, check=lambda: None) -> torch.Tensor:
    """The convolution of a batch, multiplied as `choice`, a `numerics.Choice`, says. check: as in `calls.call`."""
    formats = _formats(x, w, x.shape, w.shape, geometry, choice)
    copy = not x.is_contiguous() and not formats[0] and channels_last(x)
    tensors = [t if last else dense_after(check, t)[0] for t, last in zip((x, w, bias), (*formats, False))]
    if will_need_grad(*tensors):
        y = apply(_ConvTranspose2d, *tensors, geometry, choice, formats, check)
    else:
        y = _call_forward(*tensors, geometry, choice, formats, check)
    return y.contiguous(memory_format=torch.channels_last) if copy else y


def _call_forward(x, w, bias, geometry, choice, formats, check):
    arrays = (_array(t, last) for t, last in zip((x, w), formats))
    return restored(call(_forward, *arrays, bias, geometry, choice, formats, check=check), formats[0])


def _formats(x, w, x_shape, w_shape, geometry, choice) -> tuple[bool, bool]:
    """Whether kernels take x, and w, as channels_last, without a copy. Those that are None are not."""
    formats = x is not None and channels_last(x), w is not None and channels_last(w)
    if not any(formats):
        return formats
    if depthwise.takes(w_shape, geometry):
        return formats[0], False
    dtype = NUMPY.get((w if x is None else x).dtype)
    if not gather_gemm_split(dtype, tuple(x_shape), tuple(w_shape), geometry, choice)[0]:
        return False, False
    return formats


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
    Returns [N, Cout, OH, OW] (or [Cout, OH, OW]), OH = (H-1) s - 2p + d (KH-1) + output_padding + 1, in the input's
        memory format: channels_last or else contiguous. Gradients are in that of what they belong to.
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
    check_tensors(x, weight, bias)
    if x.dim() != 4:
        raise ValueError(f"input must be [N, C, H, W] or [C, H, W], received shape {tuple(x.shape)}")
    ops.output_shape(x.shape, weight.shape, geometry)
    channels = weight.shape[1] * geometry.groups
    if bias is not None and bias.shape != (channels,):
        raise ValueError(f"bias must have shape ({channels},), received {tuple(bias.shape)}")


def check_tensors(x, weight, bias):
    """Refuses tensors of dtypes or devices that do not go together."""
    check_floating(input=x, weight=weight, bias=bias)
    dtypes = {t.dtype for t in (x, weight, bias) if t is not None}
    if len(dtypes) > 1:
        raise TypeError(f"input, weight and bias must have one dtype, received {', '.join(sorted(map(str, dtypes)))}")
    one_device((x, weight, bias))


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
            *tensors_of(self, "weight", "bias"),
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


def _strided_inputs(images):
    shapes = ((images, 256, 16, 16), (256, 128, 4, 4)) if images else ((2, 512, 4, 4), (512, 64, 4, 4))
    return {"x": torch.rand(shapes[0]), "w": torch.randn(shapes[1]) / 40, "bias": torch.randn(shapes[1][1])}


def _strided_terms(images):
    n, k, m, pixels = (images, 256, 128, 256) if images else (2, 512, 64, 16)
    sums = {"gradient of w": n * pixels, "gradient of bias": n * pixels * 4}
    return {"output": k * 4, "gradient of x": m * 16, **sums}


def _strided(numerics, memory_format):
    return lambda x, w, bias: conv_transpose2d(x.to(memory_format=memory_format), w, bias, 2, 1, numerics=numerics)


def _depthwise_inputs(images):
    channels = 64 if images else 5
    return {"x": torch.rand(images or 2, channels, 16, 15), "w": torch.randn(channels, 1, 4, 4)}


_GENERAL = ("conv_transpose.cu", "conv_transpose_wgrad.cu", "channel_sum.cu")
_MMA = ("conv_transpose_mma.cu", "pack_weight_fp16.cu", "conv_wgrad_mma.cu", "fp16_tiles.cu")
_GATHER_GEMM = ("gather_gemm.cu", "gather_gemm_pack.cu", "gather_gemm_wgrad.cu", "fp16_tiles.cu")
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
    *(
        Case(
            f"conv_transpose2d with a stride, {numerics}",
            _GATHER_GEMM,
            _strided(numerics, memory_format),
            lambda x, w, bias: F.conv_transpose2d(x, w, bias, 2, 1),
            _strided_inputs,
            _strided_terms,
            rounded=numerics == "tf32",
        )
        for numerics, memory_format in (("tf32", torch.contiguous_format), ("fp32", torch.channels_last))
    ),
    Case(
        "conv_transpose2d to one channel",
        ("thin_conv_transpose.cu", "channel_sum.cu"),
        lambda x, w, bias: conv_transpose2d(x, w, bias, 1, 1),
        lambda x, w, bias: F.conv_transpose2d(x, w, bias, 1, 1),
        lambda images: {
            "x": torch.rand(images or 2, 3, 128, 128),
            "w": torch.randn(3, 1, 3, 3),
            "bias": torch.randn(1),
        },
        lambda images: dict.fromkeys(("gradient of w", "gradient of bias"), (images or 2) * 128**2),
    ),
    Case(
        "conv_transpose2d, depthwise",
        ("depthwise_conv_transpose.cu",),
        lambda x, w: conv_transpose2d(x, w, None, 2, 1, groups=len(w)),
        lambda x, w: F.conv_transpose2d(x, w, None, 2, 1, groups=len(w)),
        _depthwise_inputs,
        lambda images: {"gradient of w": (images or 2) * 16 * 15},
    ),
)
