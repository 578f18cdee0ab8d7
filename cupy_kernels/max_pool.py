"""Max pooling over two dimensions of arrays [..., H, W], or [N, H, W, C] with channels_last."""

import itertools
import math

import numpy as np

from .common import FLOATS, THREADS, accumulator_dtype, ceil_div, row_width, same_shape, scalar, scalar_macros
from .launch import launch
from .pool import (
    Pool,
    argmax_type,
    check_pool_shapes,
    launch_pixels,
    launch_windows,
    pool_kernel,
    pool_variants,
)
from .source import DTYPES, Kernel, Variant

_FILE, _CHANNELS_LAST_FILE, _SEPARABLE_FILE = "max_pool.cu", "max_pool_channels_last.cu", "max_pool_separable.cu"
_SEPARABLE_TAPS = 25  # the fewest of windows that are taken row by row
_SEPARABLE_TILE = 32  # the most outputs of a block in both directions
_SHARED_BYTES = 48 * 2**10  # that every GPU has


def max_pool_forward(x, y, argmax, indices, pool: Pool, channels_last: bool = False) -> None:
    """Writes y, the maximum of each window of x. Of equal elements the first wins; a NaN wins, of several the last.

    argmax: the maximum's place in the window, kh * kernel_w + kw; uint8, or int32 for windows of more than 254
        elements. indices: its place in the plane, h * W + w; int64. Both have y's shape, are written, and may be None.
    pool: the windows; `pool_output_size` gives the output's size.
    channels_last: all arrays are [N, H, W, C].
    """
    if channels_last:
        _launch("max_pool_forward_channels_last", (x, y, argmax, indices), x, y, y, pool)
        return
    tile = _separable(x, y, pool)
    if tile is None:
        windows = [a for a in (y, indices) if a is not None]
        kernel = pool_kernel(_FILE, "max_pool_forward", (x,), windows, argmax, pool, three_by_three=True)
        launch_windows(kernel, (x, y, argmax, indices), x, y, pool)
        return
    _launch_separable("max_pool_forward_separable", (x, y, argmax, indices), x, y, y, tile, pool, argmax, indices)


def max_pool_backward(dy, argmax, dx, pool: Pool, channels_last: bool = False) -> None:
    """Writes dx, for each pixel the sum of dy over the windows whose argmax it is. argmax: from the forward."""
    if channels_last:
        _launch("max_pool_backward_channels_last", (dy, argmax, dx), dx, dy, dx, pool)
        return
    tile = _separable(dx, dx, pool)
    if tile is not None:
        _launch_separable("max_pool_backward_separable", (dy, argmax, dx), dx, dy, dx, tile, pool, argmax)
        return
    kernel = pool_kernel(_FILE, "max_pool_backward", (dx,), (dy,), argmax, pool, three_by_three=True)
    launch_pixels(kernel, (dy, argmax, dx), dx, dy, pool)


def max_pool_select(x, argmax, y, pool: Pool, channels_last: bool = False) -> None:
    """Writes y, the element of x at each window's argmax, or 0 for a window without elements.

    argmax: from a forward.
    """
    if channels_last:
        _launch("max_pool_select_channels_last", (x, argmax, y), x, y, y, pool)
        return
    kernel = pool_kernel(_FILE, "max_pool_select", (x,), (y,), argmax, pool, three_by_three=True)
    launch_windows(kernel, (x, argmax, y), x, y, pool)


def variants():
    """Every variant that this module launches."""
    yield from pool_variants(_FILE, three_by_three=True)
    for name, wide_argmax in itertools.product(FLOATS, (False, True)):
        yield Variant(_SEPARABLE_FILE, _separable_macros(name, wide_argmax))
        for width in (16 // DTYPES[name].itemsize, 1):
            yield Variant(_CHANNELS_LAST_FILE, _macros(name, wide_argmax, width))


def _separable(x, places, pool):
    """The tile of a block that pools rows first; None if that is not faster, or if it takes too much memory."""
    if pool.stride != (1, 1) or pool.dilation != (1, 1) or math.prod(pool.kernel_size) < _SEPARABLE_TAPS:
        return None
    tile = tuple(min(n, _SEPARABLE_TILE) for n in places.shape[-2:])
    return tile if _separable_bytes(tile, pool.kernel_size, x) <= _SHARED_BYTES else None


def _separable_bytes(tile, kernel_size, x):
    """Shared memory that is enough in both directions. The tile's shape decides which direction needs more."""
    rows, columns = (t + k - 1 for t, k in zip(tile, kernel_size))
    value = accumulator_dtype(x).itemsize
    forward = value * rows * columns + (value + 4) * rows * tile[1]
    return max(forward, (value + 4) * columns * (rows + tile[0]))


def _launch_separable(name, args, x, y, places, tile, pool, *like_y):
    """Starts a kernel on tiles of the places of one of the arrays x and y, the input and the output."""
    same_shape(**{f"array {i} like the output": a for i, a in enumerate(like_y)}, y=y)
    check_pool_shapes(x.shape, y.shape, pool)
    kernel = Kernel(_SEPARABLE_FILE, name, _separable_macros(scalar(x), pool.wide_argmax))
    blocks = math.prod(x.shape[:-2]) * math.prod(ceil_div(n, t) for n, t in zip(places.shape[-2:], tile))
    sizes = (*x.shape[-2:], *y.shape[-2:], *pool.kernel_size, *pool.padding, *tile)
    launch(kernel, (blocks, 1, 1), (THREADS, 1, 1), (*args, *sizes), _separable_bytes(tile, pool.kernel_size, x))


def _separable_macros(name, wide_argmax):
    return (*scalar_macros(name), ("argmax_t", argmax_type(wide_argmax)), ("THREADS", THREADS))


def _launch(name, args, x, y, places, pool):
    """Starts a kernel on [N, H, W, C]. x, y: of the input's and output's shape. places: the array that it writes."""
    same_shape(**{f"array {i} like the output": a for i, a in enumerate(args) if a is not x}, y=y)
    (images, height, width, channels), output = x.shape, y.shape
    check_pool_shapes((images, channels, height, width), (output[0], output[3], *output[1:3]), pool)
    wide = 16 // x.itemsize
    if row_width(channels, x, *(a for a in args if a is not None and a.dtype != np.int64)) < wide:
        wide = 1
    blocks = images * ceil_div(math.prod(places.shape[1:3]) * channels // wide, THREADS)
    kernel = Kernel(_CHANNELS_LAST_FILE, name, _macros(scalar(x), pool.wide_argmax, wide))
    sizes = (height, width, *output[1:3], *itertools.chain(*pool))
    launch(kernel, (blocks, 1, 1), (THREADS, 1, 1), (*args, channels, *sizes))


def _macros(name, wide_argmax, width):
    return (*scalar_macros(name), ("argmax_t", argmax_type(wide_argmax)), ("WIDTH", width), ("THREADS", THREADS))
