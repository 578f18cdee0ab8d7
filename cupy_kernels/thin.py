"""2D transposed convolution to few output channels, as at the end of a decoder: forward, dgrad and wgrad in float32.

Arrays are float32: x [N, Cin, H, W], w [Cin, Cout, KH, KW], y [N, Cout, OH, OW]; one group. With `last`, x and y have
their channels last; with `w_last`, w has. There is a variant for each kernel size, stride, padding and number of output
channels.
"""

import itertools
import math

import numpy as np

from .common import MULTIPROCESSORS, ceil_div
from .conv_transpose import Geometry, logical
from .launch import launch
from .source import Kernel, Variant

_FORWARD, _GRADIENTS = "thin_forward.cu", "thin_gradients.cu"
_MOST_CHANNELS, _MOST_TAPS = 4, 96  # of the output; of all output channels, which a thread has in registers
_MOST_STRIDE, _MOST_KERNEL = 4, 16
_MOST_WEIGHTS = 12 * 1024
_FEWEST_PIXELS = 2**15  # below, there are too few threads
SHAPE_MACROS = ("OUT_CHANNELS", "KERNEL_H", "KERNEL_W", "STRIDE_H", "STRIDE_W", "PAD_H", "PAD_W")
SHAPE_MACROS += ("PIXELS", "TILE_COLUMNS", "CHUNK", "LANE_CHANNELS", "MIN_BLOCKS", "DGRAD_BYTES", "WGRAD_BYTES")
_THREADS = 128
_SHARED_BYTES = 48 * 1024  # that a block has without asking
_SEGMENT, _PIECE = 32, 12


def takes(x_shape, w_shape, geometry: Geometry, dtype) -> bool:
    """Whether the kernels support the convolution of x [N, Cin, H, W], and are faster than tensor cores."""
    _, out_channels, *kernel = w_shape
    taps, stride = out_channels * math.prod(kernel), geometry.stride
    return (
        dtype == np.float32
        and geometry.groups == 1
        and geometry.dilation == (1, 1)
        and out_channels <= _MOST_CHANNELS
        and taps <= _MOST_TAPS
        and max(stride) <= _MOST_STRIDE
        and max(kernel) <= _MOST_KERNEL
        and out_channels * math.prod(stride) <= 16  # sums of a thread
        and all(p < k for p, k in zip(geometry.padding, kernel))
        and w_shape[0] * taps <= _MOST_WEIGHTS
        and x_shape[0] * math.prod(x_shape[2:]) >= _FEWEST_PIXELS
    )


def forward(x, w, bias, y, geometry: Geometry, last: bool, w_last: bool) -> None:
    """Writes y, the convolution's output. bias may be None."""
    x_shape, w_shape, y_shape = logical(x.shape, last), logical(w.shape, w_last), logical(y.shape, last)
    rows, columns = map(ceil_div, y_shape[2:], geometry.stride)
    macros = _forward_macros(w_shape, geometry, last, columns)
    sizes = dict(macros)
    tile_rows = _THREADS // sizes["TILE_COLUMNS"] * sizes["PIXELS"]
    blocks = x_shape[0] * ceil_div(rows, tile_rows) * ceil_div(columns, sizes["TILE_COLUMNS"])
    args = x, w, bias, y, *x_shape, *y_shape[2:], int(w_last)
    launch(Kernel(_FORWARD, "thin_forward", macros), (blocks, 1, 1), (_THREADS, 1, 1), args, sizes["SHARED_BYTES"])


def dgrad(dy, w, dx, geometry: Geometry, last: bool, w_last: bool) -> None:
    """Writes dx from dy."""
    x_shape, w_shape = logical(dx.shape, last), logical(w.shape, w_last)
    macros = _gradient_macros(w_shape, geometry, last)
    args = dy, w, dx, *x_shape, *logical(dy.shape, last)[2:], int(w_last)
    grid = *_grid(x_shape, w_shape), 1
    launch(Kernel(_GRADIENTS, "thin_dgrad", macros), grid, (_THREADS, 1, 1), args, dict(macros)["DGRAD_BYTES"])


def wgrad_workspace_size(x_shape, w_shape) -> int:
    """Elements of wgrad's workspace `partial`, float32. Shapes are [N, Cin, H, W] and [Cin, Cout, KH, KW]."""
    return _grid(x_shape, w_shape)[0] * math.prod(w_shape)


def wgrad(x, dy, dw, partial, geometry: Geometry, last: bool, w_last: bool) -> None:
    """Writes dw, the gradient of w, and the workspace `partial`."""
    x_shape, w_shape = logical(x.shape, last), logical(dw.shape, w_last)
    macros, grid = _gradient_macros(w_shape, geometry, last), _grid(x_shape, w_shape)
    args = x, dy, partial, *x_shape, *logical(dy.shape, last)[2:]
    launch(Kernel(_GRADIENTS, "thin_wgrad", macros), (*grid, 1), (_THREADS, 1, 1), args, dict(macros)["WGRAD_BYTES"])
    kernel = Kernel(_GRADIENTS, "thin_wgrad_reduce", macros)
    launch(kernel, (ceil_div(dw.size, 32), 1, 1), (256, 1, 1), (partial, dw, dw.size, grid[0], int(w_last)))


def variants():
    """The variants that well-known networks launch. Every other geometry that `takes` allows has its own variant."""
    geometries = ((4, 2, 1), (3, 1, 1), (9, 4, 4), (2, 2, 0))
    for channels, (kernel, stride, padding), last in itertools.product((1, 3), geometries, (False, True)):
        if channels * stride**2 <= 16 and channels * kernel**2 <= _MOST_TAPS:
            pairs = [(n, n) for n in (stride, padding, 0, 1)]
            convolution = (1, channels, kernel, kernel), Geometry(*pairs, 1), last
            yield Variant(_FORWARD, _forward_macros(*convolution, columns=128))
            yield Variant(_GRADIENTS, _gradient_macros(*convolution))


def _lane_channels(taps):
    """Channels of a lane of the gradients: two if the registers suffice."""
    return 2 if taps <= 48 else 1


def _min_blocks(taps):
    """Blocks of the gradients that share a multiprocessor."""
    return 4 if taps * _lane_channels(taps) <= 64 else 3


def _grid(x_shape, w_shape):
    """Blocks of the gradients, all of which run at once."""
    taps = math.prod(w_shape[1:])
    channel_blocks = ceil_div(x_shape[1], 32 * _lane_channels(taps))
    segments = x_shape[0] * x_shape[2] * ceil_div(x_shape[3], _SEGMENT)
    return min(segments, max(1, _min_blocks(taps) * MULTIPROCESSORS // channel_blocks)), channel_blocks


def _macros(w_shape, geometry, last):
    """Those of thin.cuh."""
    sizes = {"CHANNELS_LAST": int(last), "OUT_CHANNELS": w_shape[1], "THREADS": _THREADS}
    for name, pair in (("KERNEL", w_shape[2:]), ("STRIDE", geometry.stride), ("PAD", geometry.padding)):
        sizes |= {f"{name}_H": pair[0], f"{name}_W": pair[1]}
    return sizes


def _forward_macros(w_shape, geometry, last, columns):
    """columns: of the grid, see thin_forward.cu."""
    sums, taps = w_shape[1] * math.prod(geometry.stride), math.prod(w_shape[1:])
    pixels = 4 if sums <= 6 else 2 if sums <= 12 else 1
    tile_columns = min((32, 16, 8), key=lambda n: ceil_div(columns, n) * n)
    shifts_h, shifts_w = (
        (s - 1 + p) // s + (k - 1 - p) // s + 1 for k, s, p in zip(w_shape[2:], geometry.stride, geometry.padding)
    )
    band = (_THREADS // tile_columns * pixels + shifts_h - 1) * (tile_columns + shifts_w - 1)
    stage_bytes = 4 * (32 * ceil_div(band - 4, 32) + 4 + 4 * ceil_div(taps, 4))  # of a channel
    chunk = 8 if 2 * 8 * stage_bytes + 4 * band <= _SHARED_BYTES else 4
    sizes = {"PIXELS": pixels, "TILE_COLUMNS": tile_columns, "CHUNK": chunk}
    sizes["SHARED_BYTES"] = 2 * chunk * stage_bytes + 4 * band
    return tuple((_macros(w_shape, geometry, last) | sizes).items())


def _gradient_macros(w_shape, geometry, last):
    taps, stride = math.prod(w_shape[1:]), geometry.stride[1]
    lane_channels = _lane_channels(taps)
    channels, warps = 32 * lane_channels, _THREADS // 32
    window = 4 * ceil_div(w_shape[3] + 3 * stride, 4)
    dy = w_shape[1] * w_shape[2] * ((_SEGMENT - 4) * stride + window)
    x = channels * (_SEGMENT if last else _SEGMENT + 4)
    sizes = {"LANE_CHANNELS": lane_channels, "MIN_BLOCKS": _min_blocks(taps), "SEGMENT": _SEGMENT, "PIECE": _PIECE}
    sizes["DGRAD_BYTES"] = 4 * max(2 * dy + x, channels * (taps | 1))
    sizes["WGRAD_BYTES"] = 4 * max(2 * (dy + x), warps * channels * _PIECE)
    return tuple((_macros(w_shape, geometry, last) | sizes).items())
