"""How blocks share a convolution in conv_wgmma.cuh, the tensor-core convolution of sm_90a."""

import itertools
from typing import NamedTuple

from .common import ceil_div
from .fp16_tiles import LINE_BYTES, chunk_channels

# {(split, dgrad): most tiles of 8 pixels and 64 channels whose sums fit a warpgroup's registers}; a tile has two sums,
# with split 2 three.
_MOST_TILES = {(1, False): 16, (1, True): 18, (2, False): 15, (2, True): 15}
_STAGES = (6, 5, 4)  # preferred first
_STEP_CHANNELS = 32
_FEW_WINDOWS = 64  # the most of a block, for few images


class Layout(NamedTuple):
    """How blocks share a tensor-core convolution."""

    macros: dict  # of the kernel's file
    planes: dict  # of pooled_planes.cuh


class _Unit(NamedTuple):
    """A block's part of an image."""

    rows: int  # of windows
    windows: int  # from the first to the last one
    along: int  # bytes from 8 channels to the next 8; an odd multiple of 16, to use different banks
    held: int  # chunks of channels in shared memory at once
    stages: int
    shared_bytes: int


def architecture(macros) -> str | None:
    """The only architecture for which a kernel with these macros compiles; None if there is no such limit."""
    return "sm_90a" if ("WGMMA", 1) in macros else None


def layout(
    split: int,
    dgrad: bool,
    packed: bool,
    images: int | None,
    channels,
    size,
    out,
    kernel,
    pad,
    limit: int,
    multiprocessors: int,
) -> Layout | None:
    """The layout, or None if there is not enough shared memory.

    packed: whether x is packed tiles. Not all its channels need be in shared memory at once.
    images: the number of images if they are few. A block then takes a small part of an image, so that the blocks fill
        the GPU. None: a block takes as much of an image as fits.
    channels: (of x, of the output).
    size, out, kernel, pad: (height, width).
    limit: bytes of shared memory.
    """
    warpgroups_m = 1 if channels[1] <= 64 else 2
    warpgroups_n = 2 // warpgroups_m
    tiles_m = ceil_div(channels[1], 64 * warpgroups_m)
    steps = ceil_div(channels[0], _STEP_CHANNELS)
    step_bytes = warpgroups_m * 64 * _STEP_CHANNELS * 2 * split
    chunks = ceil_div(channels[0], chunk_channels(split))
    gap = max(0, kernel[1] - 1 - pad[1])
    pitch = ceil_div(max(size[1] + gap, out[1]), 2) * 2
    window_pitch, windows_w, windows_h = pitch // 2, ceil_div(out[1], 2), ceil_div(out[0], 2)
    granule = 1 if dgrad else 4  # tiles that stay together: four in conv_bn_pool
    last_granule = granule if warpgroups_n > 1 else 1
    pixelwise = dgrad and out[1] % 2  # rows of odd length are stored pixel by pixel, which takes registers
    most = _MOST_TILES[split, dgrad] - (4 if pixelwise else 0)

    def unit(rows):
        """A block's part of an image, `rows` rows of windows; None if it does not fit."""
        band_lines = gap + (2 * rows + kernel[0] - 1) * pitch
        along = ceil_div(band_lines * 16 - 16, 128) * 128 + 16
        windows = (rows - 1) * window_pitch + windows_w
        one_pass = ceil_div(windows, 4 * warpgroups_n) <= most // last_granule * last_granule
        for held in (chunks, 2) if packed and one_pass and chunks > 2 else (chunks,):
            parts = min(steps * split * _STEP_CHANNELS // 8, held * LINE_BYTES // 16)
            band_bytes = ceil_div(parts * along, 128) * 128
            stages = next((n for n in _STAGES if band_bytes + n * step_bytes <= limit), None)
            if stages:
                return _Unit(rows, windows, along, held, stages, band_bytes + stages * step_bytes)
        return None

    rows = sorted({ceil_div(windows_h, units) for units in range(1, windows_h + 1)}, reverse=True)
    choices = list(filter(None, map(unit, rows)))
    if not choices:
        return None
    if images:
        choices = [u for u in choices if u.windows <= _FEW_WINDOWS] or choices[-1:]
        at_once = [u for u in choices if images * ceil_div(windows_h, u.rows) * tiles_m <= multiprocessors]
        choices = at_once[-1:] or choices
    rows, _, along, held, stages, shared_bytes = choices[0]
    images_units = [min(rows, windows_h - first) for first in range(0, windows_h, rows)]
    needed = [ceil_div((n - 1) * window_pitch + windows_w, 4 * warpgroups_n) for n in images_units]
    tiles, last = _tiles(needed, granule, last_granule, most, images is None)
    macros = {
        "WARPS_N": warpgroups_n,
        "UNIT_ROWS": rows,
        "TILES": tiles,
        "LAST_TILES": last,
        "STAGES": stages,
        "GAP": gap,
        "ALONG": along,
        "CHUNKS_HELD": held,
        "TILE_M": 64 * warpgroups_m,
        "THREADS": 128 * (warpgroups_m * warpgroups_n + 1),  # a warpgroup copies
        "PACKED_WIDTH": steps * _STEP_CHANNELS * split,
        "SHARED_BYTES": shared_bytes,
    }
    units, (stride, rest) = len(images_units), (ceil_div(n * window_pitch, 16) * 16 for n in (rows, images_units[-1]))
    return Layout(macros, planes(1, window_pitch, units, rows * window_pitch, stride, (units - 1) * stride + rest))


def _tiles(needed, granule: int, last_granule: int, most: int, many: bool) -> tuple[int, int]:
    """(TILES, LAST_TILES) with which units take the least time.

    needed: the number of tiles of each unit.
    many: whether a block has many units, so that it pays to compile another pass for the smallest ones.
    """
    if max(needed) <= most // last_granule * last_granule:
        tiles, smallest = (ceil_div(n, last_granule) * last_granule for n in (max(needed), min(needed)))
        return tiles, smallest if many else tiles

    def cost(choice):
        """Relative time of all units: few tiles wait for shared memory, and each pass has a start and an end."""
        tiles, last = choice
        passes = [max(1, ceil_div(n - max(0, last - tiles), tiles)) for n in needed]
        rests = [n - (p - 1) * tiles for n, p in zip(needed, passes)]
        lasts = [last if (n <= last if last < tiles else n > tiles) else tiles for n in rests]
        taken = lasts + [tiles] * (sum(passes) - len(needed))
        return sum(max(2 * t, t + 8) + 4 for t in taken)

    choices = itertools.product(range(granule, most + 1, granule), range(last_granule, most + 1, last_granule))
    return min(choices, key=cost)


def planes(wgmma: int, window_pitch: int, units: int, unit_windows: int, unit_stride: int, plane_stride: int) -> dict:
    """Macros of pooled_planes.cuh."""
    return {
        "WGMMA": wgmma,
        "WINDOW_PITCH": window_pitch,
        "UNITS": units,
        "UNIT_WINDOWS": unit_windows,
        "UNIT_STRIDE": unit_stride,
        "PLANE_STRIDE": plane_stride,
    }
