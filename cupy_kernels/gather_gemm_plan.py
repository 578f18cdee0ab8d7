"""How blocks share the implicit GEMMs of `gather_gemm`: tiles, and splits of the sum. A model of time chooses them."""

import functools
import itertools
import math
from typing import NamedTuple

from .common import MULTIPROCESSORS, ceil_div
from .conv_transpose import Geometry, output_shape
from .fp16_tiles import LINE_BYTES, packing_macros

OPERANDS = {"float": "half_t", "half_t": "half_t", "bf16_t": "bf16_t"}
_MOST_MERGED = 128  # phases
_LONGEST_CHAIN = 2**15  # pixels that a split of wgrad sums: tensor cores truncate when they add
_MOST_SPLITS = 32
_ROW_BYTES, _COLUMN_BYTES, _PIXEL_BYTES = 16, 8, 12  # of the kernels' tables in shared memory


class Gpu(NamedTuple):
    """What a plan depends on besides the convolution."""

    wgmma: bool = False  # whether GPU and NVRTC have it; plans use it where it is faster
    sm75: bool = False  # whether kernels are to do with the instructions of sm_75
    multiprocessors: int = MULTIPROCESSORS


class Tile(NamedTuple):
    """A block's tile of the product."""

    m: int
    n: int
    warps_m: int
    warps_n: int
    stages: int
    blocks: int  # that share a multiprocessor
    cost: float  # of a step, in units of the time that a full multiprocessor takes for 128 x 128
    wgmma: bool = False
    sm75: bool = False

    @property
    def threads(self) -> int:
        return 32 * self.warps_m * self.warps_n

    def __str__(self):
        return f"{self.m}x{self.n}"

    def macros(self, dtype: str, split: int, k_major: bool) -> tuple:
        """Macros of gather_gemm.cuh. dtype: the kernels' name of the tensors' type."""
        lines = sum(tile if k_major else max(tile, 64) for tile in (self.m, self.n))
        shared_bytes = self.stages * lines * LINE_BYTES
        if k_major:
            epilogue = 4 * max(self.n * (self.m + 4), self.m * (self.n + 8))
            shared_bytes = max(shared_bytes, epilogue) + self.m * _ROW_BYTES + self.n * _COLUMN_BYTES
        else:
            shared_bytes += 2 * 64 // split * _PIXEL_BYTES
        types = {"scalar_t": dtype, "acc_t": "float", "operand_t": OPERANDS[dtype]}
        sizes = {"TILE_M": self.m, "TILE_N": self.n, "WARPS_M": self.warps_m, "WARPS_N": self.warps_n}
        sizes |= {"STAGES": self.stages, "MIN_BLOCKS": self.blocks, "THREADS": self.threads, "WGMMA": int(self.wgmma)}
        sizes |= {
            "SM75": int(self.sm75),
            "K_MAJOR": int(k_major),
            "SHARED_BYTES": shared_bytes,
            **packing_macros(split),
        }
        return (*types.items(), *sizes.items())


GATHER = {
    1: (
        Tile(128, 128, 2, 2, 3, 2, 1.0),
        Tile(128, 64, 2, 2, 3, 3, 0.6),
        Tile(64, 64, 2, 2, 4, 3, 0.42),
        Tile(128, 32, 4, 1, 4, 2, 0.5),
        Tile(128, 16, 4, 1, 4, 3, 0.4),
    ),
    2: (
        Tile(128, 64, 2, 2, 3, 2, 0.75),
        Tile(64, 64, 2, 2, 4, 3, 0.40),
        Tile(128, 32, 4, 1, 4, 2, 0.42),
        Tile(128, 16, 4, 1, 4, 2, 0.30),
    ),
}
WGRAD = {
    1: (Tile(128, 128, 2, 2, 3, 2, 1.0), Tile(64, 128, 2, 2, 3, 3, 0.65), Tile(64, 64, 2, 2, 4, 3, 0.42)),
    2: (Tile(128, 64, 2, 2, 3, 2, 0.75), Tile(64, 64, 2, 2, 4, 3, 0.40)),
}
WGMMA = {
    1: (Tile(128, 256, 8, 1, 4, 1, 1.4, wgmma=True), Tile(128, 128, 8, 1, 3, 2, 0.8, wgmma=True)),
    2: (Tile(128, 128, 8, 1, 4, 1, 1.1, wgmma=True),),
}
# For GPUs of compute capability 7.5: a block has at most 64 KB of shared memory, and copies do not run behind the
# products. Their costs are guesses.
GATHER_SM75 = (
    Tile(128, 64, 4, 2, 2, 1, 0.65, sm75=True),
    Tile(64, 64, 2, 2, 2, 1, 0.45, sm75=True),
    Tile(128, 32, 4, 2, 2, 1, 0.45, sm75=True),
    Tile(128, 16, 4, 1, 2, 1, 0.35, sm75=True),
)
WGRAD_SM75 = (Tile(64, 128, 2, 4, 2, 1, 0.7, sm75=True), Tile(64, 64, 2, 2, 2, 1, 0.45, sm75=True))
_OVERHEAD = 6  # steps' time that a block takes before and after its sum
_ALONE = {
    1: 1.0,
    2: 0.6,
    3: 0.45,
}  # time of a block alone on a multiprocessor that fits so many, in that of all of them


def _usable_tiles(usual, sm75, split: int, gpu: Gpu) -> tuple[Tile, ...]:
    """Tiles to choose from."""
    return sm75 if gpu.sm75 else usual[split] + gpu.wgmma * WGMMA[split]


class Plan(NamedTuple):
    """How blocks share the product of the forward or of dgrad."""

    time: float  # that a model of the GPU predicts, in units of `Tile.cost`
    tile: Tile
    grid: tuple[int, int, int]  # without splits
    splits: int
    split_steps: int
    columns: int  # of the product, in all groups, padded to full tiles
    packed_octets: int  # of the weights of a group, without their residuals
    packed_size: int  # elements of the workspace for weights, of the operands' type
    partial_size: int  # elements of the workspace for split sums, float32; 0 without splits
    macros: tuple
    pack_macros: tuple
    args: tuple
    pack_args: tuple
    dgrad: bool
    phased: bool  # blocks store pixels that are not neighbours


class WgradPlan(NamedTuple):
    """How blocks share the product of a weight gradient."""

    time: float
    tile: Tile
    grid: tuple[int, int, int]
    split_steps: int
    partial_size: int
    macros: tuple
    args: tuple
    reduce_args: tuple
    channels: tuple[int, int]  # in and out, per group

    @property
    def splits(self) -> int:
        """Of the sum over pixels."""
        return self.grid[1]


def octets(channels: int) -> int:
    """The number of packs of 8 channels in a group."""
    return ceil_div(channels, 8)


def pack_macros(name, split, width):
    macros = {"scalar_t": name, "operand_t": OPERANDS[name], "WIDTH": width}
    return (*macros.items(), *packing_macros(split).items())


class _Axis(NamedTuple):
    """One axis of the product, see gather_gemm.cu. base: of packed taps, see gather_gemm_pack.cu."""

    kernel: int
    taps: int
    phases: int = 1
    offset: int = 0
    step: int = 1
    in_step: int = 1
    merged: int = 1
    base: int = 0

    @property
    def phase_taps(self) -> int:
        """The largest number of taps of a phase."""
        return ceil_div(self.taps, self.phases // math.gcd(self.phases, self.step))

    @property
    def mean_taps(self) -> float:
        """The average number of taps of a phase."""
        return self.taps / self.phases


def _merged(kernel, stride, pad) -> _Axis:
    """The axis with all phases in the columns. Its taps are the shifts of all phases."""
    shifts = [
        (pad - k + phase) // stride for k in range(kernel) for phase in range(stride) if (pad - k + phase) % stride == 0
    ]
    first, count = max(shifts), max(shifts) - min(shifts) + 1
    return _Axis(kernel, count, offset=first, merged=stride, base=pad - stride * first)


@functools.lru_cache(maxsize=1024)
def plan(x_shape, w_shape, geometry: Geometry, split: int, dtype: str, gpu: Gpu, dgrad: bool = False) -> Plan:
    """The plan of the forward for x [N, C, H, W], N at least 1, or of dgrad. dtype: the kernels' name of x's type."""
    y_shape, channels = output_shape(x_shape, w_shape, geometry), (w_shape[0] // geometry.groups, w_shape[1])
    kernel, (stride, padding, _, dilation, groups) = w_shape[2:], geometry
    of_axes = zip(kernel, stride, padding, dilation)
    if dgrad:
        axes = [_Axis(k, k, offset=-p, step=-d, in_step=s) for k, s, p, d in of_axes]
        return _plan(y_shape, x_shape, axes, groups, *channels, split, dtype, dgrad, gpu)
    most_merged = min(_MOST_MERGED, max(tile.n for tile in _usable_tiles(GATHER, GATHER_SM75, split, gpu)))
    choices = [[_Axis(k, k, s, p, d), *[_merged(k, s, p)] * (s > 1 and d == 1)] for k, s, p, d in of_axes]
    return min(
        _plan(x_shape, y_shape, axes, groups, *channels[::-1], split, dtype, dgrad, gpu)
        for axes in itertools.product(*choices)
        if math.prod(a.merged for a in axes) <= most_merged and (axes[0].merged == 1 or axes[1].phases == 1)
    )


def _plan(source, out, axes, groups, channels, sum_channels, split, dtype, dgrad, gpu) -> Plan:
    """channels, sum_channels: of `out` and of `source`, per group."""
    merged, phases, sum_octets = (
        math.prod(a.merged for a in axes),
        math.prod(a.phases for a in axes),
        octets(sum_channels),
    )
    pixels = out[0] * math.prod(ceil_div(n, a.phases * a.merged) for n, a in zip(out[2:], axes))
    steps = math.prod(a.mean_taps for a in axes) * sum_octets * split / 8
    most_steps = ceil_div(math.prod(a.phase_taps for a in axes) * sum_octets * split, 8)

    def tiles(tile):
        """Of channels, of pixels."""
        return ceil_div(channels, tile.n // merged), ceil_div(pixels, tile.m)

    usable = _usable_tiles(GATHER, GATHER_SM75, split, gpu)
    blocks_of = {t: math.prod(tiles(t)) * phases * groups for t in usable if t.n >= merged}
    choices = [(*_best_splits(t, blocks, steps, most_steps, gpu), t) for t, blocks in blocks_of.items()]
    time, splits, tile = min(choices)
    channel_tiles, pixel_tiles = tiles(tile)
    split_steps = max(1, ceil_div(most_steps, splits))
    splits = max(1, ceil_div(most_steps, split_steps))
    grid = channel_tiles * phases * pixel_tiles, groups, 1
    columns, taps, merged = groups * channel_tiles * tile.n, [a.taps for a in axes], [a.merged for a in axes]
    args = [out[0], groups, channels, sum_octets, *source[2:], *out[2:], *taps]
    for field in ("phases", "offset", "step", "in_step", "merged"):
        args += [getattr(a, field) for a in axes]
    kernel, base = [a.kernel for a in axes], [a.base for a in axes]
    return Plan(
        time,
        tile,
        grid,
        splits,
        split_steps,
        columns,
        packed_octets=columns // groups * math.prod(taps) * sum_octets,
        packed_size=columns * split * math.prod(taps) * sum_octets * 8,
        partial_size=splits * math.prod(grid) * tile.m * tile.n if splits > 1 else 0,
        macros=tile.macros(dtype, split, k_major=True),
        pack_macros=pack_macros(dtype, split, 1),
        args=(*args, channel_tiles),
        pack_args=(tile.n, channels, sum_channels, sum_octets, *kernel, *taps, *merged, *base),
        dgrad=dgrad,
        phased=axes[1].phases > 1,
    )


def _best_splits(tile, blocks, steps, most_steps, gpu) -> tuple[float, int]:
    """(time, number of splits of the sum) that take the least time."""

    def time(splits):
        waves, rest = divmod(ceil_div(blocks * splits, gpu.multiprocessors), tile.blocks)
        waves += max(rest / tile.blocks, _ALONE[tile.blocks]) if rest else 0
        reduction = 0 if splits == 1 else 6 + blocks * splits * tile.m * tile.n / 3e5
        return waves * tile.blocks * tile.cost * (steps / splits + _OVERHEAD) + reduction

    return min((time(s), s) for s in range(1, _MOST_SPLITS + 1) if s == 1 or most_steps >= 4 * s)


@functools.lru_cache(maxsize=1024)
def wgrad_plan(x_shape, w_shape, geometry: Geometry, split: int, dtype: str, gpu: Gpu) -> WgradPlan:
    """The plan of the gradient of w in the convolution of x [N, C, H, W], N at least 1. dtype: of w."""
    y_shape, groups = output_shape(x_shape, w_shape, geometry), geometry.groups
    channels_in, channels_out, taps = w_shape[0] // groups, w_shape[1], math.prod(w_shape[2:])
    pixels, columns = x_shape[0] * math.prod(x_shape[2:]), taps * octets(channels_out) * 8
    all_steps = ceil_div(pixels, 64 // split)

    def tiles(tile):
        return ceil_div(channels_in, tile.m), ceil_div(columns, tile.n)

    usable = _usable_tiles(WGRAD, WGRAD_SM75, split, gpu)
    blocks_of = {t: math.prod(tiles(t)) * groups for t in usable}
    choices = [(*_best_splits(t, blocks, all_steps, all_steps, gpu), t) for t, blocks in blocks_of.items()]
    time, splits, tile = min(choices)
    splits = max(splits, ceil_div(pixels, _LONGEST_CHAIN))
    split_steps = ceil_div(all_steps, splits)
    splits = ceil_div(all_steps, split_steps)
    geometry_args = *x_shape[2:], *y_shape[2:], *w_shape[2:], *geometry.stride, *geometry.padding, *geometry.dilation
    return WgradPlan(
        time,
        tile,
        (math.prod(tiles(tile)), splits, groups),
        split_steps,
        partial_size=splits * groups * channels_in * columns,
        macros=tile.macros(dtype, split, k_major=False),
        args=(
            x_shape[0],
            groups,
            channels_in,
            octets(channels_in),
            octets(channels_out),
            *geometry_args,
            tiles(tile)[0],
            split_steps,
        ),
        reduce_args=(channels_in, channels_out, octets(channels_out), taps),
        channels=(channels_in, channels_out),
    )
