"""Weight gradient of the 2D transposed convolution on tensor cores, for what `conv_transpose_mma` supports."""

import functools
import itertools
from typing import NamedTuple

from .common import MULTIPROCESSORS, THREADS, ceil_div
from .conv_transpose import Geometry, output_shape
from .conv_transpose_mma import check_supported, shape_macros
from .conv_wgmma import architecture
from .errors import UnsupportedError
from .fp16_tiles import LINE_BYTES, chunk_channels, packing_macros
from .launch import launch
from .source import Kernel

_MOST_TAPS = 5  # neighbouring taps in a block: a thread has no registers for more
_MOST_STAGES, _MOST_STAGES_WGMMA = 6, 9
_MOST_TILES_N = 8  # tiles of sums in a warpgroup: a thread has no registers for more
_TILE_IC = 64  # input channels of a block of the kernel for wgmma
_BAND_ROWS = 16
_RESERVED = 2 * 1024  # shared memory for the kernel's own small arrays and the driver's


class Plan(NamedTuple):
    """How blocks share a weight gradient. `macros` specialise the kernels."""

    macros: tuple
    output_shape: tuple
    split: int  # of the packed tiles, see `fp16_tiles`
    tiles: int
    splits: int
    bands_per_split: int  # the last split may have fewer
    threads: int
    shared_bytes: int
    partial_size: int  # elements of the workspace, float32


@functools.lru_cache(maxsize=1024)
def plan(
    x_shape,
    w_shape,
    geometry: Geometry,
    split: int,
    dtype: str,
    shared_limit: int,
    wgmma: bool = False,
    channels_last: bool = False,
    multiprocessors: int = MULTIPROCESSORS,
) -> Plan:
    """The plan for the gradient of w [K, M, KH, KW] in the convolution of x [N, K, H, W], N at least 1.

    split: of the packed tiles of x and dy.
    dtype: the kernels' name of w's type.
    shared_limit: bytes of shared memory that a block may use.
    wgmma: whether GPU and NVRTC support it. The plan uses it where possible.
    channels_last: x is float16 [N, H, W, C] instead of tiles, with split 1.
    multiprocessors: the number that the GPU has. The sum is split over them.

    Raises UnsupportedError for what the kernels do not support.
    """
    check_supported(x_shape, w_shape, geometry, dtype)
    channels_in, channels_out, *kernel = w_shape
    height, width = x_shape[2:]
    output = output_shape(x_shape, w_shape, geometry)
    out = output[2:]
    taps = ceil_div(kernel[1], ceil_div(kernel[1], _MOST_TAPS))
    sizes = split, (channels_in, channels_out), taps, shared_limit
    found = (_wgmma_layout(width, *sizes) if wgmma else None) or _layout(*sizes)
    tiles = kernel[0] * ceil_div(kernel[1], taps) * found.channel_tiles
    bands = ceil_div(x_shape[0] * height, _BAND_ROWS)
    bands_per_split = ceil_div(bands, max(1, multiprocessors * found.blocks // tiles))
    splits = ceil_div(bands, bands_per_split)
    macros = {
        **shape_macros(dtype, (channels_in, channels_out), (height, width), out, kernel, geometry.padding),
        **packing_macros(split),
        "TAPS_W": taps,
        "CHANNELS_LAST": int(channels_last),
        "BAND_ROWS": _BAND_ROWS,
        "TILES": tiles,
        **found.macros,
    }
    size = channels_in * channels_out * kernel[0] * kernel[1]
    sizes = (tiles, splits, bands_per_split, macros["THREADS"], macros["SHARED_BYTES"], splits * size)
    return Plan(tuple(macros.items()), output, split, *sizes)


class _Layout(NamedTuple):
    """The differences between the two main loops."""

    macros: dict
    channel_tiles: int
    blocks: int  # that share a multiprocessor


def _layout(split, channels, taps, limit) -> _Layout:
    """The layout for conv_wgrad_mma.cuh. Raises UnsupportedError if there is not enough shared memory."""
    columns = ceil_div(4, taps) * taps  # in a stage: at least 4, and a multiple of taps
    chunk = chunk_channels(split)

    def layout(warps):
        """(stages, bytes of a stage)"""
        stage_bytes = (1 + 16 * warps // chunk) * columns * _BAND_ROWS * LINE_BYTES
        blocks = 8 // warps
        return min(_MOST_STAGES, (limit - _RESERVED) // blocks // stage_bytes), stage_bytes

    choices = [(warps, *layout(warps)) for warps in (8, 4) if warps == 4 or channels[1] > 64]
    warps, stages, stage_bytes = next((c for c in choices if c[1] > 1), choices[-1])
    if stages < 2:
        # Then only one block fits a multiprocessor. Only GPUs with little shared memory need this.
        stages = min(_MOST_STAGES, (limit - _RESERVED) // stage_bytes)
    if stages < 2:
        raise UnsupportedError(f"it needs {2 * stage_bytes + _RESERVED} bytes of shared memory, the GPU has {limit}")
    tiles = ceil_div(channels[1], 16 * warps) * ceil_div(channels[0], chunk)
    macros = {"WGMMA": 0, "THREADS": 32 * warps, "TILE_OC": 16 * warps, "TILE_IC": chunk, "COLUMNS": columns}
    return _Layout({**macros, "STAGES": stages, "SHARED_BYTES": stages * stage_bytes}, tiles, 8 // warps)


def _wgmma_layout(width, split, channels, taps, limit) -> _Layout | None:
    """The layout for conv_wgrad_wgmma.cuh. None if there is not enough shared memory."""
    tiles_n = _MOST_TILES_N if channels[1] > 64 else channels[1] // 16
    columns = 4 if split == 1 else 1 if width % 2 else 2

    stage_bytes = columns * split * (1 + ceil_div(16 * tiles_n, 64)) * _BAND_ROWS * LINE_BYTES
    stages = min(_MOST_STAGES_WGMMA, (limit - _RESERVED) // stage_bytes)
    if stages < 5 + ceil_div(taps - 1, columns):
        return None
    tiles = ceil_div(channels[1], 16 * tiles_n) * ceil_div(channels[0], _TILE_IC)
    macros = {"WGMMA": 1, "THREADS": 384, "TILE_OC": 16 * tiles_n, "TILE_IC": _TILE_IC, "COLUMNS": columns}
    return _Layout({**macros, "STAGES": stages, "SHARED_BYTES": stages * (stage_bytes + 16) + 16}, tiles, 1)


def conv_wgrad_mma(p: Plan, x_packed, x_exponents, x_sums, dy_packed, dy_exponents, borders, partial, dw) -> None:
    """Writes dw, the gradient of w, from x and the gradient of the output as packed tiles.

    x_exponents, dy_exponents: int32, at least one each; the smallest is the exponent of the tiles' scale. x_exponents
        may be None, for an x without a scale.
    x_sums, borders: both are given for an x whose means were subtracted, or both are None. With them, the sum of dy
        over all pixels must be 0 in each channel. x_sums: as given to `fp16_tiles.pack_fp16`. borders: float32 [parts,
        KH * KW, M]. Their sum over the parts is, for each tap, the sum of dy, under its tiles' scale, over the pixels
        that have no partner in x.
    partial: workspace, float32, written; its size is in the plan.

    Raises ValueError if only one of x_sums and borders is None.
    """
    if (x_sums is None) != (borders is None):
        given = "borders" if x_sums is None else "x_sums"
        raise ValueError(f"x_sums and borders go together, received {given} alone; give both, or None for both")
    launch(
        wgrad_kernel(p),
        (p.tiles * p.splits, 1, 1),
        (p.threads, 1, 1),
        (x_packed, dy_packed, partial, p.output_shape[0], p.bands_per_split),
        p.shared_bytes,
    )
    launch(
        wgrad_kernel(p)._replace(name="conv_wgrad_reduce"),
        (ceil_div(dw.size, THREADS), 1, 1),
        (THREADS, 1, 1),
        (partial, x_exponents, dy_exponents, x_sums, borders, dw, 0 if x_exponents is None else x_exponents.size)
        + (dy_exponents.size, p.splits)
        + (0 if borders is None else borders.shape[0],),
    )


def wgrad_kernel(p: Plan) -> Kernel:
    """The kernel that `conv_wgrad_mma` launches first. `conv_wgrad_reduce` is compiled with it."""
    return Kernel("conv_wgrad_mma.cu", "conv_wgrad_mma", p.macros, architecture(p.macros))


def variants():
    """Variants for shapes that reach every branch: the reference shape, kernels of 1 and 7, many, few, odd channels."""
    unit = Geometry((1, 1), (1, 1), (0, 0), (1, 1), 1)
    much, little = 227 * 1024, 99 * 1024
    plans = []
    for split, wgmma in itertools.product((1, 2), (False, True)):
        options = split, "float", much, wgmma
        plans.append(plan((512, 64, 32, 32), (64, 128, 5, 5), unit, *options))
        plans.append(plan((1, 48, 64, 64), (48, 80, 7, 7), unit._replace(padding=(3, 3)), *options))
        plans.append(plan((64, 144, 16, 15), (144, 16, 1, 1), unit._replace(padding=(0, 0)), *options))
        if not wgmma:
            plans.append(plan((512, 64, 32, 32), (64, 128, 5, 5), unit, split, "float", little))
    for dtype, wgmma, last in itertools.product(("float", "half_t", "bf16_t"), (False, True), (False, True)):
        if last or dtype != "float":
            point = (512, 64, 32, 32), (64, 128, 1, 1), unit._replace(padding=(0, 0))
            plans.append(plan(*point, 1, dtype, much, wgmma, last))
    yield from (wgrad_kernel(p).variant for p in plans)
