"""2D transposed convolution to few output channels, as at the end of a decoder: forward, dgrad and wgrad in float32.

Arrays are float32, x [N, Cin, H, W], w [Cin, Cout, KH, KW], y [N, Cout, OH, OW]; one group. Each kernel size, stride,
padding and number of output channels is a variant of its own.
"""

import itertools
import math

import numpy as np

from .common import MULTIPROCESSORS, ceil_div
from .conv_transpose import Geometry
from .launch import launch
from .source import Kernel, Variant

_FILE = "thin_conv_transpose.cu"
_MOST_CHANNELS, _MOST_TAPS = 4, 96  # of the output; of all output channels, which a thread has in registers
_MOST_STRIDE = 4
_SHARED_BYTES = 48 * 1024  # that a block has without asking, for all weights
_FEWEST_PIXELS = 2**15  # below, there are too few threads
_THREADS = _WGRAD_THREADS = 128
_SEGMENT, _PIECE = 32, 12
SHAPE_MACROS = ("OUT_CHANNELS", "KERNEL_H", "KERNEL_W", "STRIDE_H", "STRIDE_W", "PAD_H", "PAD_W")
SHAPE_MACROS += ("PIXELS_FORWARD", "PIXELS_DGRAD", "LANE_CHANNELS")


def takes(x_shape, w_shape, geometry: Geometry, dtype) -> bool:
    """Whether the kernels take the convolution of x [N, Cin, H, W], and are quicker than tensor cores."""
    _, out_channels, *kernel = w_shape
    taps, stride = out_channels * math.prod(kernel), geometry.stride
    return (
        dtype == np.float32
        and geometry.groups == 1
        and geometry.dilation == (1, 1)
        and out_channels <= _MOST_CHANNELS
        and taps <= _MOST_TAPS
        and max(stride) <= _MOST_STRIDE
        and out_channels * math.prod(stride) <= 16  # sums of a thread
        and all(p < k for p, k in zip(geometry.padding, kernel))
        and w_shape[0] * _pitch(taps) * 4 <= _SHARED_BYTES
        and x_shape[0] * math.prod(x_shape[2:]) >= _FEWEST_PIXELS
    )


def forward(x, w, bias, y, geometry: Geometry) -> None:
    """Writes y, the convolution's output. bias may be None."""
    macros, rows, columns = _macros(w.shape, geometry), *map(ceil_div, y.shape[2:], geometry.stride)
    blocks = ceil_div(x.shape[0] * ceil_div(rows, dict(macros)["PIXELS_FORWARD"]) * columns, _THREADS)
    args = x, w, bias, y, *_sizes(x.shape, y.shape)
    launch(Kernel(_FILE, "thin_forward", macros), (blocks, 1, 1), (_THREADS, 1, 1), args, _weight_bytes(w.shape))


def dgrad(dy, w, dx, geometry: Geometry) -> None:
    """Writes dx from dy."""
    macros, (images, _, height, width) = _macros(w.shape, geometry), dx.shape
    blocks = ceil_div(images * height * ceil_div(width, dict(macros)["PIXELS_DGRAD"]), _THREADS)
    args = dy, w, dx, *_sizes(dx.shape, dy.shape)
    launch(Kernel(_FILE, "thin_dgrad", macros), (blocks, 1, 1), (_THREADS, 1, 1), args, _weight_bytes(w.shape))


def wgrad_workspace_size(x_shape, w_shape) -> int:
    """Elements of wgrad's workspace `partial`, float32."""
    return _wgrad_grid(x_shape, w_shape)[0] * math.prod(w_shape)


def wgrad(x, dy, dw, partial, geometry: Geometry) -> None:
    """Writes dw, the gradient of w, and the workspace `partial`."""
    macros, grid = _macros(dw.shape, geometry), _wgrad_grid(x.shape, dw.shape)
    args = x, dy, partial, *_sizes(x.shape, dy.shape)
    shared_bytes = _wgrad_bytes(dict(macros))
    launch(Kernel(_FILE, "thin_wgrad", macros), (*grid, 1), (_WGRAD_THREADS, 1, 1), args, shared_bytes)
    kernel = Kernel(_FILE, "thin_wgrad_reduce", macros)
    launch(kernel, (ceil_div(dw.size, 32), 1, 1), (256, 1, 1), (partial, dw, dw.size, grid[0]))


def variants():
    """What well-known networks launch; every other geometry that `takes` allows has a variant of its own, too."""
    for channels, (kernel, stride, padding) in itertools.product((1, 3), ((4, 2, 1), (3, 1, 1), (9, 4, 4), (2, 2, 0))):
        if channels * stride**2 <= 16 and channels * kernel**2 <= _MOST_TAPS:
            pairs = [(n, n) for n in (stride, padding, 0, 1)]
            yield Variant(_FILE, _macros((1, channels, kernel, kernel), Geometry(*pairs, 1)))


def _sizes(x_shape, y_shape):
    return x_shape[0], x_shape[1], *x_shape[2:], *y_shape[2:]


def _pitch(taps):
    return 4 * ceil_div(taps, 4)


def _weight_bytes(w_shape):
    return 4 * w_shape[0] * _pitch(math.prod(w_shape[1:]))


def _lane_channels(taps):
    """Channels of a lane of wgrad: two where their sums fit the registers."""
    return 2 if taps <= 27 else 1


def _wgrad_grid(x_shape, w_shape):
    channel_blocks = ceil_div(x_shape[1], 32 * _lane_channels(math.prod(w_shape[1:])))
    segments = x_shape[0] * x_shape[2] * ceil_div(x_shape[3], _SEGMENT)
    return min(segments, max(1, 4 * MULTIPROCESSORS // channel_blocks)), channel_blocks


def _wgrad_bytes(macros):
    """The tiles of x and dy; later what warps add up."""
    window = 4 * ceil_div(macros["KERNEL_W"] + 3 * macros["STRIDE_W"], 4)
    dy = macros["OUT_CHANNELS"] * macros["KERNEL_H"] * ((_SEGMENT - 4) * macros["STRIDE_W"] + window)
    channels = 32 * macros["LANE_CHANNELS"]
    return 4 * max(channels * (_SEGMENT + 4) + dy, _WGRAD_THREADS // 32 * channels * _PIECE)


def _macros(w_shape, geometry):
    _, out_channels, kernel_h, kernel_w = w_shape
    (stride_h, stride_w), (pad_h, pad_w) = geometry.stride, geometry.padding
    taps = out_channels * kernel_h * kernel_w
    sums = out_channels * stride_h * stride_w
    sizes = {
        "OUT_CHANNELS": out_channels,
        "KERNEL_H": kernel_h,
        "KERNEL_W": kernel_w,
        "STRIDE_H": stride_h,
        "STRIDE_W": stride_w,
        "PAD_H": pad_h,
        "PAD_W": pad_w,
        "PIXELS_FORWARD": 4 if sums <= 6 else 2 if sums <= 12 else 1,
        "PIXELS_DGRAD": 2 if out_channels * kernel_h * (kernel_w + stride_w) <= 80 else 1,
        "LANE_CHANNELS": _lane_channels(taps),
        "SEGMENT": _SEGMENT,
        "PIECE": _PIECE,
        "THREADS": _THREADS,
        "WGRAD_THREADS": _WGRAD_THREADS,
    }
    return tuple(sizes.items())
