"""2D transposed convolution: general kernels for all hyper-parameters, without tensor cores.

Shapes: x [N, G*Ci, H, W], w [G*Ci, Co, KH, KW], bias [G*Co], y [N, G*Co, OH, OW], with G groups, Ci and Co channels per
    group and OH = (H-1)*stride - 2*padding + dilation*(KH-1) + output_padding + 1.
"""

import functools
import math
from typing import NamedTuple

import numpy as np

from .common import FLOATS, THREADS, accumulator_dtype, ceil_div, scalar_macros, type_macros
from .launch import launch
from .source import Kernel, Variant

_INT_MAX = 2**31 - 1
_WGRAD_BLOCKS = (
    2048  # enough for several waves on today's largest GPUs; a constant, so that sums depend on shapes alone
)
_TILE_K = 8  # channels or pixels in one step of the sum


class Geometry(NamedTuple):
    """Hyper-parameters of a transposed convolution: pairs (height, width), and groups."""

    stride: tuple[int, int]
    padding: tuple[int, int]
    output_padding: tuple[int, int]
    dilation: tuple[int, int]
    groups: int


@functools.lru_cache(maxsize=1024)
def output_shape(x_shape, w_shape, geometry: Geometry) -> tuple[int, int, int, int]:
    """Shape of y. Raises ValueError for dimensions, channels, hyper-parameters or sizes that are not valid."""
    if len(x_shape) != 4 or len(w_shape) != 4:
        raise ValueError(
            f"input and weight must have 4 dimensions, received shapes {tuple(x_shape)} and {tuple(w_shape)}"
        )
    g = geometry
    for name, values, least in (("stride", g.stride, 1), ("dilation", g.dilation, 1), ("groups", (g.groups,), 1)):
        if min(values) < least:
            raise ValueError(f"{name} must be at least {least}, received {values}")
    for name, values in (("padding", g.padding), ("output_padding", g.output_padding)):
        if min(values) < 0:
            raise ValueError(f"{name} must not be negative, received {values}")
    if any(o >= max(s, d) for o, s, d in zip(g.output_padding, g.stride, g.dilation)):
        raise ValueError(
            f"output_padding must be smaller than stride or dilation, received output_padding {g.output_padding}, "
            f"stride {g.stride}, dilation {g.dilation}"
        )
    if x_shape[1] != w_shape[0] or w_shape[0] % g.groups:
        raise ValueError(
            f"input has {x_shape[1]} channels, weight {tuple(w_shape)} takes {w_shape[0]}; "
            f"groups={g.groups} must divide this number"
        )
    if 0 in x_shape[1:] or 0 in w_shape:
        raise ValueError(f"only the batch may be empty, received shapes {tuple(x_shape)} and {tuple(w_shape)}")
    size = tuple(
        (n - 1) * s - 2 * p + d * (k - 1) + o + 1
        for n, k, s, p, o, d in zip(x_shape[2:], w_shape[2:], g.stride, g.padding, g.output_padding, g.dilation)
    )
    if min(size) < 1:
        raise ValueError(f"output size would be {size}: padding {g.padding} is too large for input {tuple(x_shape)}")
    shape = (x_shape[0], w_shape[1] * g.groups, *size)
    for name, s in (("input", x_shape), ("output", shape), ("weight", (1, *w_shape))):
        if math.prod(s[1:]) > _INT_MAX:
            raise ValueError(f"one image of the {name} has more than {_INT_MAX} elements: shape {tuple(s)}")
    for name, s in (("input", x_shape), ("output", shape)):
        if s[0] * s[2] * s[3] > _INT_MAX - 1024:  # room for a tile
            raise ValueError(f"the {name} of shape {tuple(s)} has more pixels than {_INT_MAX - 1024}: split the batch")
    return shape


def logical(shape, channels_last) -> tuple[int, ...]:
    """[N, C, H, W], from the shape of an array of either format."""
    return (shape[0], shape[3], *shape[1:3]) if channels_last else tuple(shape)


def packed_weight_size(w_shape) -> int:
    """Elements of the workspace `packed` of forward and dgrad, of the accumulator's dtype."""
    return math.prod(w_shape)


def conv_transpose_forward(x, w, bias, y, packed, geometry: Geometry) -> None:
    """Writes y = conv_transpose2d(x, w) + bias, and the workspace `packed`. bias may be None."""
    _gather(x, w, bias, y, packed, geometry, dgrad=False)


def conv_transpose_dgrad(dy, w, dx, packed, geometry: Geometry) -> None:
    """Writes dx, the gradient of x: dy, the gradient of y, convolved with w. Writes the workspace `packed`."""
    _gather(dy, w, None, dx, packed, geometry, dgrad=True)


def _gather(source, w, bias, out, packed, geometry, dgrad):
    x, y = (out, source) if dgrad else (source, out)
    _check(x, w, y, geometry)
    groups, taps = geometry.groups, w.shape[2] * w.shape[3]
    channels_in, channels_out = w.shape[0] // groups, w.shape[1]
    macros = (*type_macros(x), ("DGRAD", int(dgrad)))
    rows, pixels = (channels_in if dgrad else channels_out), out.shape[0] * out.shape[2] * out.shape[3]
    tile = _tile(source, rows, pixels)
    macros += tile.macros()
    launch(
        Kernel("conv_transpose.cu", "pack_weight", macros),
        (ceil_div(w.size, THREADS), 1, 1),
        (THREADS, 1, 1),
        (w, packed, groups, channels_in, channels_out, taps),
    )
    phases = (1, 1) if dgrad else geometry.stride
    largest_phase = out.shape[0] * ceil_div(out.shape[2], phases[0]) * ceil_div(out.shape[3], phases[1])
    tiles_per_phase = ceil_div(largest_phase, tile.n)
    launch(
        Kernel("conv_transpose.cu", "conv_gather", macros),
        (phases[0] * phases[1] * tiles_per_phase, ceil_div(rows, tile.m), groups),
        (tile.threads, 1, 1),
        (source, packed, bias, out, out.shape[0], groups, source.shape[1] // groups, rows)
        + (*source.shape[2:], *out.shape[2:], *w.shape[2:])
        + (*geometry.stride, *geometry.padding, *geometry.dilation, tiles_per_phase),
    )


def wgrad_workspace_size(x_shape, w_shape, geometry: Geometry, double: bool) -> int:
    """Elements of wgrad's workspace `partial`, of the accumulator's dtype. double: whether that is float64."""
    return _wgrad_plan(x_shape, w_shape, geometry, double)[1] * math.prod(w_shape)


def conv_transpose_wgrad(x, dy, dw, partial, geometry: Geometry) -> None:
    """Writes dw, the gradient of w, and the workspace `partial`."""
    _check(x, dw, dy, geometry)
    groups, taps = geometry.groups, dw.shape[2] * dw.shape[3]
    channels_in, channels_out = dw.shape[0] // groups, dw.shape[1]
    tile, splits, split_pixels = _wgrad_plan(x.shape, dw.shape, geometry, double=accumulator_dtype(x) == np.float64)
    macros = type_macros(x) + tile.macros()
    launch(
        Kernel("conv_transpose_wgrad.cu", "wgrad_partial", macros),
        (taps * ceil_div(channels_in, tile.m) * ceil_div(channels_out, tile.n), splits, groups),
        (tile.threads, 1, 1),
        (x, dy, partial, x.shape[0], groups, channels_in, channels_out)
        + (*x.shape[2:], *dy.shape[2:], *dw.shape[2:])
        + (*geometry.stride, *geometry.padding, *geometry.dilation, split_pixels),
    )
    launch(
        Kernel("conv_transpose_wgrad.cu", "wgrad_reduce", macros),
        (ceil_div(dw.size, THREADS), 1, 1),
        (THREADS, 1, 1),
        (partial, dw, groups, taps, channels_in, channels_out, splits),
    )


def variants():
    """Every variant that this module launches."""
    for scalar in FLOATS:
        for tile in (_SMALL, _DOUBLE if scalar == "double" else _LARGE):
            macros = scalar_macros(scalar)
            yield Variant("conv_transpose_wgrad.cu", (*macros, *tile.macros()))
            for dgrad in (0, 1):
                yield Variant("conv_transpose.cu", (*macros, ("DGRAD", dgrad), *tile.macros()))


class _Tile(NamedTuple):
    m: int
    n: int
    per_thread: int

    @property
    def threads(self) -> int:
        return self.m * self.n // self.per_thread**2

    def macros(self) -> tuple:
        sizes = {"TILE_M": self.m, "TILE_N": self.n, "TILE_K": _TILE_K, "PER_THREAD": self.per_thread}
        return (*sizes.items(), ("THREADS", self.threads))


_LARGE, _SMALL = _Tile(64, 128, 8), _Tile(32, 32, 4)
_DOUBLE = _Tile(64, 64, 4)


def _tile(array, rows: int, columns: int) -> _Tile:
    """The tile for a product of rows x columns: large if it fills the tile, small if most of that would be padding."""
    if rows <= 32 or columns < 4096:
        return _SMALL
    if accumulator_dtype(array) == np.float64:
        return _DOUBLE
    return _LARGE


def _wgrad_plan(x_shape, w_shape, geometry, double):
    """(tile, number of splits of the sum over pixels, pixels of a split)"""
    channels_in, channels_out = w_shape[0] // geometry.groups, w_shape[1]
    pixels = x_shape[0] * x_shape[2] * x_shape[3]
    if channels_in <= 32 or channels_out <= 32:
        tile = _SMALL
    else:
        tile = _DOUBLE if double else _LARGE
    matrices = w_shape[2] * w_shape[3] * geometry.groups
    blocks = matrices * ceil_div(channels_in, tile.m) * ceil_div(channels_out, tile.n)
    splits = max(1, min(_WGRAD_BLOCKS // blocks, pixels // 512, 65535))
    split_pixels = ceil_div(ceil_div(pixels, splits), _TILE_K) * _TILE_K
    return tile, max(1, ceil_div(pixels, split_pixels) if split_pixels else 1), split_pixels


def _check(x, w, y, geometry):
    expected = output_shape(x.shape, w.shape, geometry)
    if y.shape != expected:
        raise ValueError(f"output must have shape {expected}, received {y.shape}")
