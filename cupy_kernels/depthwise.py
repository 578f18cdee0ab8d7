"""2D transposed convolution with one channel per group: forward, dgrad and wgrad, limited by memory bandwidth.

channels_last: whether tensors are [N, H, W, C] arrays, in and out, instead of [N, C, H, W].
"""

import math

from .common import FLOATS, MULTIPROCESSORS, THREADS, ceil_div, row_width, scalar, scalar_macros
from .conv_transpose import Geometry, logical
from .launch import launch
from .source import DTYPES, Kernel, Variant

_MOST_PHASES = 64
_TAPS = 16  # of a block of wgrad
_WIDTH = 4  # channels of a thread of channels_last tensors


def takes(w_shape, geometry: Geometry) -> bool:
    """Whether the convolution is depthwise, with a stride that the kernels support."""
    return w_shape[0] == geometry.groups and w_shape[1] == 1 and max(geometry.stride) <= _MOST_PHASES


def gather(source, w, bias, out, geometry: Geometry, channels_last: bool, dgrad: bool = False) -> None:
    """Writes `out`: the output of conv_transpose2d, or with dgrad dx from dy. w: [C, 1, KH, KW]; bias may be None."""
    axes = geometry.stride, geometry.padding, geometry.dilation
    if dgrad:
        stride, padding, dilation = axes
        phases, offset, step, in_step = (1, 1), [-p for p in padding], [-d for d in dilation], stride
    else:
        (phases, offset, step), in_step = axes, (1, 1)
    (images, channels, *size), out_size = logical(source.shape, channels_last), logical(out.shape, channels_last)[2:]
    width = min(_WIDTH, row_width(channels, source, out)) if channels_last else 1
    blocks = ceil_div(channels * math.prod(out_size), THREADS * width)
    launch(
        Kernel("depthwise_conv_transpose.cu", "depthwise_gather", _macros(scalar(source), channels_last, width)),
        (blocks * images, 1, 1),
        (THREADS, 1, 1),
        (source, w, bias, out, channels, *size, *out_size, *w.shape[2:], *phases, *offset, *step, *in_step, blocks),
    )


def wgrad_workspace_size(x_shape, w_shape) -> int:
    """Elements of wgrad's workspace `partial`, of the accumulator's dtype. x_shape: [N, C, H, W]."""
    return _splits(x_shape, w_shape)[0] * math.prod(w_shape)


def wgrad(x, dy, dw, partial, geometry: Geometry, channels_last: bool) -> None:
    """Writes dw, the gradient of w [C, 1, KH, KW], and the workspace `partial`."""
    shape = images, channels, *size = logical(x.shape, channels_last)
    splits, split_pixels = _splits(shape, dw.shape)
    kernel, macros = dw.shape[2:], _macros(scalar(x), channels_last, 1)
    launch(
        Kernel("depthwise_conv_transpose.cu", "depthwise_wgrad", macros),
        (ceil_div(channels, 32 if channels_last else 1), ceil_div(math.prod(kernel), _TAPS), splits),
        (THREADS, 1, 1),
        (x, dy, partial, images, channels, *size, *logical(dy.shape, channels_last)[2:], *kernel)
        + (*geometry.stride, *geometry.padding, *geometry.dilation, split_pixels),
    )
    kernel = Kernel("depthwise_conv_transpose.cu", "depthwise_wgrad_reduce", macros)
    launch(kernel, (ceil_div(dw.size, THREADS), 1, 1), (THREADS, 1, 1), (partial, dw, dw.size, splits))


def variants():
    """Every variant that this module launches."""
    for name in FLOATS:
        widths = [w for w in (1, 2, _WIDTH) if w * DTYPES[name].itemsize <= 16]
        for channels_last, width in ((False, 1), *((True, w) for w in widths)):
            yield Variant("depthwise_conv_transpose.cu", _macros(name, channels_last, width))


def _macros(name, channels_last, width):
    return (*scalar_macros(name), ("CHANNELS_LAST", int(channels_last)), ("WIDTH", width))


def _splits(x_shape, w_shape):
    """(number of splits of the sum over pixels, pixels of a split)"""
    pixels = x_shape[0] * math.prod(x_shape[2:])
    blocks = ceil_div(w_shape[0], 8) * ceil_div(math.prod(w_shape[2:]), _TAPS)
    split_pixels = max(1024, ceil_div(pixels, max(1, 32 * MULTIPROCESSORS // blocks)))
    return max(1, ceil_div(pixels, split_pixels)), split_pixels
