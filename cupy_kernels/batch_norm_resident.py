"""Batch norm of rows of channels in one launch each way, whose blocks wait for each other: batch_norm_resident.cu.

It is for tensors that fit into a GPU's shared memory, wholly or to a good part. `resident` decides.
"""

from typing import NamedTuple

from .backend import Room
from .channel_walk import KEPT, PACK_BYTES, Walk, pack_width, shared_bytes, sizes_of, whole_warps
from .common import ceil_div, scalar, scalar_macros
from .launch import launch
from .source import DTYPES, Kernel, Variant

FILE = "batch_norm_resident.cu"
_THREADS = 512  # the most of a block
_AHEAD = 3  # batches on their way
_BATCH = 4  # packs in flight, of all tensors that are kept whole
_READING = {8: 1, 4: 1.25}  # packs of a row that a block may take, and what a byte of them then costs


class Resident(NamedTuple):
    """How blocks share the rows, and the ring buffers in which they keep what they read last."""

    walk: Walk
    ring_at: int  # byte of shared memory
    ring_batches: int
    shared_bytes: int

    def launch(self, name: str, args) -> None:
        walk = self.walk
        sizes = (*walk.sizes, walk.chunks, walk.tile, self.ring_at, self.ring_batches)
        grid, block = (walk.across * walk.chunks, 1, 1), (walk.threads, 1, 1)
        launch(Kernel(FILE, name, walk.macros), grid, block, (*args, *sizes), self.shared_bytes)


def resident(tensors, kept: int, room: Room | None, param: str) -> Resident | None:
    """How to keep what fits of the first `kept` tensors, all of one shape; None if it is not faster or not possible.

    param: the kernels' name of the per-channel parameters' type.
    """
    x = tensors[0]
    rows, channels, _ = sizes_of(x.shape)
    name, width = scalar(x), PACK_BYTES // x.itemsize
    if not _may_be(x, room) or pack_width(channels, tensors) < width:
        return None
    tile, tiles, chunk = _shares(rows, channels // width, width, room)
    if tiles > room.multiprocessors:
        return None
    threads = max(min(_THREADS, whole_warps(chunk * tile)), whole_warps(tile * width))
    macros = resident_macros(name, param)
    ring_at = PACK_BYTES * ceil_div(shared_bytes(macros, tile, threads), PACK_BYTES)
    packs = _BATCH if kept == 1 else _BATCH // 2
    batch_bytes = threads * packs * PACK_BYTES * kept
    needed = max(_AHEAD + 1, ceil_div(ceil_div(chunk, threads // tile), packs))
    batches = min(needed, (room.shared_bytes - ring_at) // batch_bytes)
    if batches <= _AHEAD:
        return None
    walk = Walk(macros, tiles, (channels, 1, rows, chunk), ceil_div(rows, chunk), tile, threads)
    return Resident(walk, ring_at, batches, ring_at + batches * batch_bytes)


def most_chunks(x, room: Room | None) -> int:
    """The largest number of chunks of a channel, if `resident` supports x."""
    rows, channels, _ = sizes_of(x.shape)
    width = PACK_BYTES // x.itemsize
    return ceil_div(rows, _shares(rows, channels // width, width, room)[2]) if _may_be(x, room) else 0


def resident_macros(name: str, param: str) -> tuple:
    """Macros for tensors of type `name` with parameters of type `param`."""
    sizes = {"WIDTH": PACK_BYTES // DTYPES[name].itemsize, "PLANES": 0, "KEPT": KEPT, "RESIDENT_THREADS": _THREADS}
    return (*scalar_macros(name), ("param_t", param), *sizes.items(), ("AHEAD", _AHEAD))


def resident_variants():
    """Every variant that `resident` may choose."""
    for name in ("float", "half_t", "bf16_t"):
        for param in sorted({"float", name}):
            yield Variant(FILE, resident_macros(name, param))


def _may_be(x, room):
    """Whether there is a variant for x, at any address."""
    _, channels, plane = sizes_of(x.shape)
    return room is not None and x.size and plane == 1 and x.itemsize < 8 and channels % (PACK_BYTES // x.itemsize) == 0


def _shares(rows, packs, width, room):
    """(packs of a row for each block, blocks that share a row, rows of a block), such that a block reads the least."""

    def cost(shares):
        tile, tiles, chunk = shares
        partial_bytes = 16 * tile * width * ceil_div(rows, chunk)
        return tiles > room.multiprocessors, chunk * tile * PACK_BYTES * _READING[tile] + partial_bytes

    choices = []
    for tile in _READING:
        tiles = ceil_div(packs, tile)
        most = max(1, room.multiprocessors // tiles)  # blocks that share the rows
        choices += [(tile, tiles, ceil_div(rows, blocks)) for blocks in range(1, most + 1)]
    return min(choices, key=cost)
