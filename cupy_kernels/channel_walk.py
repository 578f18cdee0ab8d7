"""What the launches of the kernels that use channel_walk.cuh share."""

from math import lcm

from .common import ceil_div
from .source import DTYPES

PACK_BYTES = 16  # of the widest access
KEPT = 6  # values of a channel, or column


def widths(name: str) -> tuple[int, ...]:
    """Elements per access, the widest first: 16 bytes, half of that for 16-bit types, one element."""
    widest = PACK_BYTES // DTYPES[name].itemsize
    return (8, 4, 1) if widest == 8 else (widest, 1)


def row_tile(row: int, plane: int, width: int, wanted: int) -> int:
    """Packs of `width` elements that a block takes of a row: whole planes, about `wanted` packs, and shared evenly."""
    unit, packs = lcm(width, plane) // width, row // width
    tile = unit * max(1, wanted // unit)
    tiles = max(1, ceil_div(packs, tile))
    return unit * max(1, ceil_div(ceil_div(packs, tiles), unit))


def whole_warps(threads: int) -> int:
    """The number of threads, rounded up to whole warps."""
    return 32 * ceil_div(threads, 32)


def shared_bytes(macros, tile: int, threads: int, sums: bool = True) -> int:
    """Shared memory of a block: what it keeps of its channels, and room for sums, see channel_walk.cuh."""
    known = dict(macros)
    columns, scratch = (1, 32) if known["PLANES"] else (tile * known["WIDTH"], 3 * known["WIDTH"] * threads)
    return (KEPT * columns + (max(32, scratch) if sums else 0)) * DTYPES[known["acc_t"]].itemsize
