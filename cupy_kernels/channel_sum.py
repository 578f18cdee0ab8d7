"""Sum of a tensor [N, C, *] over everything but its channels: the bias gradient of a convolution."""

from .common import FLOATS, THREADS, ceil_div, scalar_macros, type_macros
from .launch import launch
from .source import Kernel, Variant

_CHUNKS = 64  # a constant, so that sums depend on shapes alone


def channel_sum_workspace_size(shape) -> int:
    """Elements of the workspace `partial`, of the accumulator's dtype."""
    return shape[1] * _plan(shape)[1]


def channel_sum(x, sums, partial) -> None:
    """sums[c] = sum over n and positions of x[n, c, ...]. sums [C] and the workspace `partial` are written."""
    if sums.shape != (x.shape[1],):
        raise ValueError(f"sums must have shape ({x.shape[1]},), received {sums.shape}")
    macros = type_macros(x)
    chunk_images, chunks = _plan(x.shape)
    plane = x.size // max(1, x.shape[0] * x.shape[1])
    launch(
        Kernel("channel_sum.cu", "channel_sum_partial", macros),
        (x.shape[1], chunks, 1),
        (THREADS, 1, 1),
        (x, partial, x.shape[0], x.shape[1], plane, chunk_images),
    )
    launch(
        Kernel("channel_sum.cu", "channel_sum_reduce", macros),
        (ceil_div(x.shape[1], THREADS), 1, 1),
        (THREADS, 1, 1),
        (partial, sums, x.shape[1], chunks),
    )


def variants():
    """Every variant that this module launches."""
    return (Variant("channel_sum.cu", scalar_macros(scalar)) for scalar in FLOATS)


def _plan(shape) -> tuple[int, int]:
    """(images in a chunk, number of chunks)"""
    chunk_images = max(1, ceil_div(shape[0], _CHUNKS))
    return chunk_images, max(1, ceil_div(shape[0], chunk_images))
