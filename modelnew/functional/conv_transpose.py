"""conv_transpose2d, with the signature of torch.nn.functional.conv_transpose2d, and its layer."""

import torch
import torch.nn.functional as F
from torch import nn

from cupy_kernels import conv_transpose as ops
from cupy_kernels import depthwise, thin

from .. import autocast
from ..calls import call, dense_after
from ..cases import Case
from ..formats import channels_last, restored, stored
from ..interop import NUMPY, aligned, check_floating, integer, one_device, pair
from ..numerics import check_numerics, choose, gather_gemm_split, without_tensor_cores
from ..untraced import untraced
from . import conv_transpose_kernels as kernels
from .affine import weight_and_bias
from .gradients import Function, apply, differentiable, will_need_grad

__all__ = ["ConvTranspose2d", "conv_transpose2d"]


class _ConvTranspose2d(Function):
    @staticmethod
    def forward(ctx, x, w, bias, geometry, choice, formats, check):
        y = _call_forward(x, w, bias, geometry, choice, formats, check)
        ctx.save_for_backward(x, w)
        ctx.options = geometry, choice
        return y

    @staticmethod
    def backward(ctx, dy):
        needed = ctx.needs_input_grad[:3]
        return *differentiable(_Gradients, dy, *ctx.saved_tensors, *ctx.options, needed), *[None] * 4


class _Gradients(Function):
    """(dx, dw, dbias), None where not needed.

    A transposed convolution y = T(x, w), its dx = D(dy, w) and its dw = W(x, dy) are linear in either argument, and
    each one's gradients are the other two: of D they are T and W, of W they are D and T. So one Function has all.
    """

    @staticmethod
    def forward(dy, x, w, geometry, choice, needed):
        return conv_gradients(x, w, dy, x.shape, w.shape, geometry, choice, needed)

    @staticmethod
    def setup_context(ctx, inputs, output):
        *tensors, geometry, choice, _ = inputs
        ctx.save_for_backward(*tensors)
        ctx.options = geometry, choice
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx, vx, vw, vbias):
        dy, x, w = ctx.saved_tensors
        need_dy, need_x, need_w = ctx.needs_input_grad[:3]
        vx, vw = (v if v is None else aligned(v) for v in (vx, vw))
        ddy = dx = dw = None
        if need_dy:
            ddy = second_gradient_of_dy(dy, x, w, vx, vw, vbias, lambda *args: conv_transpose2d_as(*args, *ctx.options))
        if need_x and vw is not None:
            dx, _, _ = differentiable(_Gradients, dy, x, vw, *ctx.options, (True, False, False))
        if need_w and vx is not None:
            _, dw, _ = differentiable(_Gradients, dy, vx, w, *ctx.options, (False, True, False))
        return ddy, dx, dw, None, None, None


def second_gradient_of_dy(dy, x, w, vx, vw, vbias, convolution):
    """The gradient of dy for incoming gradients of dx, dw and dbias; None without any. convolution(x, w, bias)."""
    found = None if vx is None else convolution(vx, w, vbias)  # with the bias: one rounding fewer in 16 bits
    vbias = vbias if vx is None else None
    if vw is not None:
        more = convolution(x, vw, vbias)
        return more if found is None else found + more
    return found if vbias is None else vbias.view(-1, 1, 1).expand_as(dy)


def conv_gradients(x, w, dy, x_shape, w_shape, geometry, choice, needed):
    """(dx, dw, gradient of the bias), None where not needed. x may be None if dw is not needed, w if dx is not.

    dx has x's memory format, or dy's if x is None. dw has w's, or is contiguous if w is None.
    """
    like = dy if x is None else x
    formats = x_last, w_last = _formats(like, w, x_shape, w_shape, geometry, choice)
    arrays = (None if t is None else _array(t, last) for t, last in ((x, x_last), (w, w_last), (dy, x_last)))
    dx, dw, dbias = call(kernels.gradients, *arrays, x_shape, w_shape, geometry, choice, needed, formats)
    return _in_format(restored(dx, x_last), like), _in_format(restored(dw, w_last), w), dbias


def _in_format(result, like):
    """A result that is None, contiguous or channels_last, in the memory format of `like`."""
    if result is None or like is None or not channels_last(like):
        return result
    return result.contiguous(memory_format=torch.channels_last)


def _array(tensor, last):
    """The tensor as kernels take it, in a memory format. Copies it if it has another format or is not aligned."""
    return aligned(stored(tensor, last))


def conv_transpose2d_as(x, w, bias, geometry: ops.Geometry, choice, check=lambda: None) -> torch.Tensor:
    """The convolution of a batch in the numeric class of `choice`, a `numerics.Choice`. check: as in `calls.call`."""
    formats = _formats(x, w, x.shape, w.shape, geometry, choice)
    if will_need_grad(x, w, bias):
        y = apply(_ConvTranspose2d, x, w, bias, geometry, choice, formats, check)
    else:
        y = _call_forward(x, w, bias, geometry, choice, formats, check)
    return _in_format(y, x)


def _call_forward(x, w, bias, geometry, choice, formats, check):
    x, w, bias = dense_after(check, stored(x, formats[0]), stored(w, formats[1]), bias)
    return restored(
        call(kernels.forward, aligned(x), aligned(w), bias, geometry, choice, formats, check=check), formats[0]
    )


def _formats(x, w, x_shape, w_shape, geometry, choice) -> tuple[bool, bool]:
    """Whether kernels take x, and w, as channels_last without a copy. False for one that is None."""
    formats = x is not None and channels_last(x), w is not None and channels_last(w)
    if not any(formats):
        return formats
    if depthwise.takes(w_shape, geometry):
        return formats[0], False
    dtype = NUMPY.get((w if x is None else x).dtype)
    if thin.takes(x_shape, w_shape, geometry, dtype):
        return formats
    return formats if gather_gemm_split(dtype, tuple(x_shape), tuple(w_shape), geometry, choice)[0] else (False, False)


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

    Here s is the stride, p the padding and d the dilation; ow is defined in the same way. See
    torch.nn.functional.conv_transpose2d.

    input: [N, Cin, H, W] or [Cin, H, W]; float32, float64, float16 or bfloat16.
    weight: [Cin, Cout/groups, KH, KW].
    bias: [Cout] or None.
    stride, padding, output_padding, dilation: ints, or pairs (H, W).
    numerics: "tf32", "fp32" or "auto", see `modelnew.numerics`. It matters for float32 tensors where tensor cores run.

    All three tensors have one dtype and device. Under torch.autocast they are cast to its dtype. Sums are in float32,
    for float64 in float64.

    Returns [N, Cout, OH, OW] or [Cout, OH, OW] with OH = (H-1) s - 2p + d (KH-1) + output_padding + 1: channels_last if
    input is, else contiguous. Each gradient has the memory format of its tensor.

    Raises TypeError for other or mixed dtypes, ValueError for shapes and hyper-parameters that do not fit, and
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
        x, weight, bias, geometry, choose(numerics, x.device), check=lambda: _check(x, weight, bias, geometry)
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
    """Raises TypeError or RuntimeError for tensors of mixed dtypes or devices."""
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
        """output_size: [.., OH, OW], one of the sizes that the stride allows. It replaces `output_padding`."""
        extra = self.output_padding
        if output_size is not None:
            window = (self.stride, self.padding, self.kernel_size)
            extra = self._output_padding(input, list(output_size), *window, 2, self.dilation)
        return conv_transpose2d(
            input,
            *weight_and_bias(self),
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


def _general_inputs(images):
    """The small ones have channels that fill no tile."""
    if images:
        return conv_inputs(images)
    return {"x": torch.rand(2, 13, 9, 11), "w": torch.randn(13, 15, 3, 3) / 40, "bias": torch.randn(15)}


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
    channels = 64 if images else 36  # with channels_last, blocks of wgrad have 32
    return {"x": torch.rand(images or 2, channels, 16, 15), "w": torch.randn(channels, 1, 4, 4)}


_FORMATS = ("", torch.contiguous_format), (", channels_last", torch.channels_last)
_GENERAL = ("conv_transpose.cu", "conv_transpose_wgrad.cu", "channel_sum.cu")
_MMA = ("conv_transpose_mma.cu", "pack_weight_fp16.cu", "conv_wgrad_mma.cu", "fp16_tiles.cu")
_GATHER_GEMM = ("gather_gemm.cu", "gather_gemm_pack.cu", "gather_gemm_wgrad.cu", "fp16_tiles.cu")
CASES = (
    Case(
        "conv_transpose2d, general",
        _GENERAL,
        _conv("fp32"),
        torch_conv,
        _general_inputs,
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
    *(
        Case(
            f"conv_transpose2d to one channel{what}",
            ("thin_forward.cu", "thin_gradients.cu", "channel_sum.cu"),
            lambda x, w, bias, format=format: conv_transpose2d(x.to(memory_format=format), w, bias, 1, 1),
            lambda x, w, bias: F.conv_transpose2d(x, w, bias, 1, 1),
            lambda images: {
                "x": torch.rand(images or 2, 3, 128, 128),
                "w": torch.randn(3, 1, 3, 3),
                "bias": torch.randn(1),
            },
            lambda images: dict.fromkeys(("gradient of w", "gradient of bias"), (images or 2) * 128**2),
        )
        for what, format in _FORMATS
    ),
    *(
        Case(
            f"conv_transpose2d, depthwise{what}",
            ("depthwise_conv_transpose.cu",),
            lambda x, w, format=format: conv_transpose2d(x.to(memory_format=format), w, None, 2, 1, groups=len(w)),
            lambda x, w: F.conv_transpose2d(x, w, None, 2, 1, groups=len(w)),
            _depthwise_inputs,
            lambda images: {"gradient of w": (images or 2) * 16 * 15},
        )
        for what, format in _FORMATS
    ),
)
