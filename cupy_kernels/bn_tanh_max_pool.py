"""Max pooling of the tanh of a batch norm, or of tanh alone, reading the input once each way.

All arrays are contiguous: inputs [N, C, H, W] or, without batch norm, any [..., H, W]; outputs [..., OH, OW]. `mean`
and `invstd`, (C,), are as in `batch_norm`. They and weight and bias have the accumulator's dtype, see
`common.accumulator_dtype`. Without batch norm, all four are None. Workspace and sums are float64. argmax and pool are
as in `max_pool`.
"""

import math

from .batch_norm import batch_norm_backward_combine
from .common import THREADS, ceil_div, check_per_channel
from .launch import launch
from .pool import (
    MAX_BLOCKS_Y,
    Pool,
    launch_pixels,
    launch_windows,
    pool_geometry,
    pool_kernel,
    pool_period,
    pool_variants,
)

_FILE = "bn_tanh_max_pool.cu"
_CHUNK = 8192  # about so many windows per partial sum; a constant, so that sums depend on shapes alone


def bn_tanh_max_pool_forward(x, mean, invstd, weight, bias, y, argmax, pool: Pool) -> None:
    """Writes y = max pooling of tanh((x - mean) invstd weight + bias), and argmax.

    weight, bias and argmax may be None.
    """
    kernel = pool_kernel(_FILE, "bn_tanh_max_pool_forward", (x,), (y,), argmax, pool, _macros(mean))
    channels = _channels(x, mean, invstd=invstd, weight=weight, bias=bias)
    launch_windows(kernel, (x, mean, invstd, weight, bias, y, argmax, channels), x, y, pool, channels)


def bn_tanh_max_pool_workspace(shape) -> int:
    """Elements of the workspace for the backward's sums, for an output y of this shape."""
    return 2 * shape[1] * math.prod(_chunks(shape))


def bn_tanh_max_pool_backward_reduce(
    dy, y, argmax, x, mean, invstd, sums, dweight, dbias, workspace, pool: Pool
) -> None:
    """Writes sums[0] = sum of g and sums[1] = sum of g xhat per channel, over all windows that contain a pixel.

    g = dy (1 - y^2) and xhat = (x - mean) invstd, at the window's argmax.
    sums: (2, C), float64, written.
    dweight, dbias: sums[1] and sums[0], of one dtype, x's or float32; written where not None.
    workspace: `bn_tanh_max_pool_workspace(y.shape)` elements, float64, written.
    """
    kernel = pool_kernel(_FILE, "bn_tanh_max_pool_backward_partials", (x,), (dy, y), argmax, pool, _macros(mean))
    channels = _channels(x, mean, invstd=invstd, dweight=dweight, dbias=dbias)
    groups, splits = _chunks(y.shape)
    partials = workspace.reshape((2, channels, groups * splits))
    images = x.shape[0]
    period = pool_period(kernel, images)
    args = (dy, y, argmax, x, mean, invstd, partials, channels, images, period, ceil_div(period, groups))
    launch(kernel, (channels * groups, splits, 1), (THREADS, 1, 1), (*args, *pool_geometry(x, y, pool)))
    batch_norm_backward_combine(partials, mean, sums, dweight, dbias)


def bn_tanh_max_pool_backward(dy, y, argmax, x, mean, invstd, weight, sums, dx, pool: Pool) -> None:
    """Writes dx from the sums of `bn_tanh_max_pool_backward_reduce`.

    sums: None if statistics do not depend on x, or without batch norm; x may then be None.
    """
    if sums is not None and x is None:
        raise ValueError("the gradient through the batch's statistics needs x")
    x = None if sums is None else x
    pixels = [a for a in (dx, x) if a is not None]
    kernel = pool_kernel(_FILE, "bn_tanh_max_pool_backward", pixels, (dy, y), argmax, pool, _macros(mean))
    channels = _channels(dx, mean, invstd=invstd, weight=weight)
    if sums is not None and sums.shape != (2, channels):
        raise ValueError(f"sums must have shape {(2, channels)}, received {sums.shape}")
    inverse_count = channels / max(1, dx.size)
    args = (dy, y, argmax, x, mean, invstd, weight, sums, dx, inverse_count, channels)
    launch_pixels(kernel, args, dx, dy, pool, channels)


def variants():
    """Every variant that this module launches."""
    for has_bn in (0, 1):
        yield from pool_variants(_FILE, (("HAS_BN", has_bn),))


def _macros(mean):
    return (("HAS_BN", int(mean is not None)),)


def _channels(x, mean, **arrays):
    if mean is None:
        return 1
    if x.ndim != 4:
        raise ValueError(f"batch norm and max pooling take [N, C, H, W], received shape {x.shape}")
    check_per_channel(x.shape[1], mean=mean, **arrays)
    return x.shape[1]


def _chunks(shape):
    """Partial sums of a channel: (number of groups of images, number of blocks that share a group)."""
    windows = shape[0] * math.prod(shape[-2:])
    groups = max(1, min(shape[0], windows // _CHUNK))
    return groups, min(max(1, ceil_div(windows, groups * 2 * _CHUNK)), MAX_BLOCKS_Y)
