"""Max pooling before a batch norm and an activation that never decreases, and its gradient.

Arrays are [N, C, H, W], or [N, H, W, C] with channels_last. x and dx have the input's size; pooled, argmax, y and dy
have the output's. gamma, mean and invstd, (C,), are float32.
"""

import itertools

import numpy as np

from .batch_norm import batch_norm_combine
from .channel_walk import KEPT, row_tile, whole_warps
from .common import MULTIPROCESSORS, THREADS, ceil_div, check_per_channel, row_width, same_shape, scalar, scalar_macros
from .conv_transpose import logical
from .launch import launch
from .pool import Pool, pool_output_size
from .source import DTYPES, Kernel, Variant

_FILE = "bn_pool.cu"
_WINDOWS = ((2, 0), (3, 0), (3, 1))  # kernel size and padding
_FLOATS = ("float", "half_t", "bf16_t")
_TILE_BYTES = 512  # of a row that a block reads, in channels_last
_CHANNELS = 4  # of a thread, in channels_last: for 8 of 16 bits there are no registers
_MOST_ITEMS = 8  # of a thread
_BLOCKS = 4 * MULTIPROCESSORS  # enough of them


def takes_pool(pool: Pool) -> bool:
    """Whether there are kernels for these windows: 2x2, or 3x3 with or without padding, with stride 2."""
    (height, width), padding = pool.kernel_size, pool.padding[0]
    same = height == width and pool.padding == (padding, padding)
    return same and (height, padding) in _WINDOWS and pool.stride == (2, 2) and pool.dilation == (1, 1)


def bn_pool_forward(x, gamma, pooled, argmax, pool: Pool, channels_last: bool, scratch=None):
    """Writes pooled, for each window the value that is the maximum after the batch norm, and argmax, its tap.

    gamma: the batch norm's weight, or None.
    argmax: may be None.
    scratch: scratch(shape, dtype) makes workspaces. Without it, no statistics follow.

    Returns the partial statistics for `bn_pool_statistics`, or None.
    """
    launching = _Launch(x, pooled, pool, channels_last, x)
    check_per_channel(launching.channels, gamma=gamma)
    same_shape(pooled=pooled, argmax=argmax)
    partials = counts = None
    if scratch is not None:
        partials = scratch((2, launching.channels, launching.chunks), np.float64)
        counts = scratch((launching.chunks,), np.float64)
    launching.start("bn_pool_forward", (x, gamma, pooled, argmax, partials, counts), (launching.chunks,))
    return partials, counts


def bn_pool_statistics(x, partials, running_mean, running_var, batches, mean, invstd, momentum, eps) -> None:
    """Writes mean, invstd and the running statistics as `batch_norm_statistics` does. partials: from the forward."""
    batch_norm_combine(x.size // mean.size, *partials, running_mean, running_var, batches, mean, invstd, momentum, eps)


def bn_pool_backward(
    dy, y, argmax, x, mean, invstd, gamma, sums, dx, pool: Pool, channels_last: bool, negative_slope: float | None
) -> None:
    """Writes dx from y, the activation of the batch norm of the pooled values, and its gradient dy.

    negative_slope: of leaky ReLU; None for tanh.
    sums: (2, C), float64, of g, the gradient before the activation, and of g xhat. None if statistics do not depend on
        x; x may then be None.
    """
    launching = _Launch(dx, dy, pool, channels_last, *(dx, x) if sums is not None else (dx,))
    same_shape(dy=dy, y=y, argmax=argmax)
    check_per_channel(launching.channels, gamma=gamma, mean=mean, invstd=invstd)
    args = (dy, y, argmax, x if sums is not None else None, mean, invstd, gamma, sums, dx, negative_slope is None)
    slope, count = 0.0 if negative_slope is None else negative_slope, float(dx.size // launching.channels)
    launching.start("bn_pool_backward", (*args, slope, count), ())


def variants():
    """Every variant that this module launches."""
    for name, window in itertools.product(_FLOATS, _WINDOWS):
        for planes, width in ((1, 16 // DTYPES[name].itemsize), (1, 2), (1, 1), (0, _CHANNELS), (0, 1)):
            yield Variant(_FILE, _macros(name, planes, width, *window))


class _Launch:
    """How blocks share x, see bn_pool.cu. tensors: those that are read or written in whole packs."""

    def __init__(self, x, pooled, pool, channels_last, *tensors):
        shape, output = logical(x.shape, channels_last), logical(pooled.shape, channels_last)
        if output != (*shape[:2], *pool_output_size(shape[2:], pool)):
            raise ValueError(f"{pool} makes no {output} of {shape}")
        same_shape(**{f"array {i} like the input": a for i, a in enumerate(tensors)})
        images, self.channels, height, width = shape
        name, tile, cells = scalar(x), 1, 1
        if channels_last:
            access = _CHANNELS if row_width(self.channels, *tensors, pooled) >= _CHANNELS else 1
            packs = self.channels // access
            tile = row_tile(self.channels, 1, access, _TILE_BYTES // (access * x.itemsize))
        else:
            access = row_width(width, *tensors)
            access = access if access == 16 // x.itemsize else min(access, 2)
            cells, packs = max(1, access // 2), self.channels
        self.threads = whole_warps(tile * max(1, THREADS // tile)) if tile > 1 else THREADS
        tiles, rows = ceil_div(packs, tile), self.threads // tile
        items = images * ceil_div(height, 2) * ceil_div(width, 2 * cells)
        if items >= 2**31:
            raise ValueError(f"images must have fewer than 2^31 pixels together, received shape {shape}")
        chunk = rows * max(1, min(_MOST_ITEMS, items * tiles // (rows * _BLOCKS)))
        self.chunks = ceil_div(items, chunk)
        self.blocks = self.chunks * tiles
        self.kernel = _macros(name, int(not channels_last), access, pool.kernel_size[0], pool.padding[0])
        self.sizes, self.tile = (self.channels, height, width, *output[2:], items, chunk), tile

    def start(self, name, args, more):
        kernel = Kernel(_FILE, name, self.kernel)
        launch(kernel, (self.blocks, 1, 1), (self.threads, 1, 1), (*args, *self.sizes, *more, self.tile))


def _macros(name, planes, width, kernel, padding):
    sizes = {"PLANES": planes, "WIDTH": width, "KEPT": KEPT, "KERNEL": kernel, "PADDING": padding, "THREADS": THREADS}
    return (*scalar_macros(name), *sizes.items())
