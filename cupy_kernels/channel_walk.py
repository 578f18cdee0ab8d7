"""How blocks share a tensor [N, C, *]: shared code for the launches of kernels that use channel_walk.cuh."""

from collections.abc import Callable
from math import lcm, prod
from typing import NamedTuple

from .common import MULTIPROCESSORS, THREADS, ceil_div, row_width, scalar
from .launch import launch
from .source import DTYPES, Kernel

PACK_BYTES = 16  # of the widest access
KEPT = 6  # values of a channel, or column
_PLANES_CHUNK_BYTES = 2**15
_ROWS_CHUNK_BYTES = (2**14, 2**16)  # least and most: fewer partial results if there are enough blocks
_BLOCKS = 4 * MULTIPROCESSORS  # enough of them
_TILE_BYTES = 512  # of a row that a block reads
_ROWS_OF_PLANES = 16  # the fewest images that are worth a walk over rows


def widths(name: str) -> tuple[int, ...]:
    """Elements per access, the widest first: 16 bytes, for 16-bit types also 8 bytes, and one element."""
    widest = PACK_BYTES // DTYPES[name].itemsize
    return (8, 4, 1) if widest == 8 else (widest, 1)


def row_tile(row: int, plane: int, width: int, wanted: int) -> int:
    """Packs of `width` elements of a row for each block: whole planes, about `wanted` packs, divided evenly."""
    unit, packs = lcm(width, plane) // width, row // width
    tile = unit * max(1, wanted // unit)
    tiles = max(1, ceil_div(packs, tile))
    return unit * max(1, ceil_div(ceil_div(packs, tiles), unit))


def whole_warps(threads: int) -> int:
    """The number of threads, rounded up to whole warps."""
    return 32 * ceil_div(threads, 32)


def shared_bytes(macros, tile: int, threads: int, sums: bool = True) -> int:
    """Shared memory of a block, in bytes: what it keeps of its channels, and space for sums, see channel_walk.cuh."""
    known = dict(macros)
    together = 1 if known["PLANES"] or 32 % tile else 32 // tile  # rows of threads, of which a warp has one sum
    columns, scratch = (1, 32) if known["PLANES"] else (tile * known["WIDTH"], 3 * known["WIDTH"] * threads // together)
    return (KEPT * columns + (max(32, scratch) if sums else 0)) * DTYPES[known["acc_t"]].itemsize


def sizes_of(shape):
    """Images, channels and values per plane of [N, C, *]."""
    if len(shape) < 2:
        raise ValueError(f"the kernels take arrays of 2 dimensions or more, [N, C, *]; received shape {tuple(shape)}")
    return shape[0], shape[1], prod(shape[2:])


def pack_width(length, tensors):
    """The widest access with a variant that divides rows of this length and all addresses."""
    aligned = row_width(length, *tensors)
    return next(w for w in widths(scalar(tensors[0])) if w <= aligned)


def chunks_of(x):
    """(whether blocks walk over rows, chunks per channel, values per chunk), from the shape and dtype of x alone."""
    images, channels, plane = sizes_of(x.shape)
    widest, row = PACK_BYTES // x.itemsize, channels * plane
    narrow = plane * x.itemsize % 8 or plane % min(4, widest)  # then a pack of a plane is one value
    few = plane <= THREADS and narrow and images >= _ROWS_OF_PLANES and row % widest == 0
    if row >= 2**31 or not (plane == 1 or few):
        chunk = _PLANES_CHUNK_BYTES // x.itemsize
        return False, ceil_div(images * plane, chunk), chunk
    least, most = _ROWS_CHUNK_BYTES
    width = widest if row % widest == 0 else 1
    tile = row_tile(row, plane, width, _TILE_BYTES // (width * x.itemsize))
    tile_bytes = images * tile * width * x.itemsize  # of all rows
    chunks = max(1, _BLOCKS // max(1, ceil_div(row // width, tile)))
    chunks = max(ceil_div(tile_bytes, most), min(ceil_div(tile_bytes, least), chunks))
    rows = max(1, ceil_div(images, max(1, chunks)))
    return True, ceil_div(images, rows), rows * plane


class Walk(NamedTuple):
    """How blocks share [images, channels, plane], see channel_walk.cuh."""

    macros: tuple
    across: int  # blocks that share a chunk's rows, or channels
    sizes: tuple[int, int, int, int]  # channels, plane, values of a channel, of a chunk of it
    chunks: int
    tile: int  # packs of a row that a block takes
    threads: int

    def launch(self, file, name, args, sums=True):
        blocks, block = self.across * self.chunks if self.sizes[2] else 0, (self.threads, 1, 1)
        kernel = Kernel(file, name, self.macros)
        launch(kernel, (blocks, 1, 1), block, args, shared_bytes(self.macros, self.tile, self.threads, sums))


def over_chunks(tensors, macros: Callable) -> Walk:
    """The walk over chunks of tensors of the same shape. macros(width, planes): macros of the variant."""
    x = tensors[0]
    images, channels, plane = sizes_of(x.shape)
    by_rows, chunks, chunk = chunks_of(x)
    width = pack_width(channels * plane if by_rows else plane, tensors)
    tile, threads = 0, THREADS
    if by_rows:
        tile = row_tile(channels * plane, plane, width, _TILE_BYTES // (width * x.itemsize))
        threads = whole_warps(tile * max(1, THREADS // tile))
    across = ceil_div(channels * plane // width, tile) if by_rows else channels
    sizes = channels, plane, images * plane, chunk
    return Walk(macros(width, int(not by_rows)), across, sizes, chunks, tile, threads)


def launch_combining(kernel, channels, chunks, args):
    """Launches one block for each channel, with no more threads than there are chunks."""
    launch(kernel, (channels, 1, 1), (min(THREADS, whole_warps(max(1, chunks))), 1, 1), args)
