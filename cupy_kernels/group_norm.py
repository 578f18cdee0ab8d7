"""Group norm over [N, C, *]: forward and gradients.

All arrays are contiguous. `mean` and `rstd`, N * num_groups elements, have the accumulator's dtype, see
`common.accumulator_dtype`. Workspaces are float64. weight, bias and their gradients share one dtype, x's or float32. y
and dy have x's dtype or float32; if they are float32, so are the parameters.
"""

import itertools
from math import prod
from typing import NamedTuple

from .channel_walk import KEPT, pack_width, row_tile, shared_bytes, whole_warps, widths
from .common import (
    FLOATS,
    MULTIPROCESSORS,
    THREADS,
    accumulator,
    ceil_div,
    check_per_channel,
    parameter_type,
    same_shape,
    scalar,
    scalar_macros,
    vector_width,
)
from .launch import launch
from .source import DTYPES, Variant

_CACHE_BYTES = 47 * 1024  # of the 48 KiB that every GPU has; the kernels' fixed arrays take the rest
_CHANNELS_LAST_FILE = "group_norm_channels_last.cu"
_TILE_BYTES = (512, 256, 128, 64)  # of a row that a block reads
_BLOCKS = 2 * MULTIPROCESSORS  # enough of them, where an image is in chunks
_CHUNK_BYTES = 2**14  # the least of a chunk that a block reads
_ROW_THREADS = MAX_ROW_CHANNELS = 256  # the most threads of a block, of which each has a channel at least
_COLUMNS = 8  # channels of a block of group_norm_backward_parameters


def group_norm_forward_workspace(x, num_groups, channels_last: bool = False) -> int:
    """Elements of the forward's workspace."""
    chunks = _chunks(x, num_groups)[0] if channels_last else 1
    return 2 * x.shape[0] * num_groups * chunks if chunks > 1 else 0


def group_norm_forward(
    x, num_groups, weight, bias, y, mean, rstd, eps, workspace=None, channels_last: bool = False
) -> None:
    """y = (x - mean) rstd weight + bias with mean and rstd = 1/sqrt(biased variance + eps) of each image's groups.

    Writes y, mean and rstd; for an empty x nothing. weight and bias may be None.
    workspace: `group_norm_forward_workspace(x, num_groups, channels_last)` elements, written; None for 0.
    channels_last: x and y are [N, *, C].
    """
    same_shape(x=x, y=y)
    shape = _shape(x, channels_last)
    blocks, group_channels, plane = _sizes(shape, num_groups)
    _check_statistics(blocks, mean, rstd)
    check_per_channel(shape[1], weight=weight, bias=bias)
    _check_workspace(workspace, group_norm_forward_workspace(x, num_groups, channels_last), shape)
    if not x.size:
        return
    if channels_last:
        rows = _rows(x, num_groups, (x, y), y, weight, bias)
        if workspace is None:
            rows.launch("group_norm_forward_channels_last", (x, weight, bias, y, mean, rstd, eps))
        else:
            rows.launch("group_norm_partials_channels_last", (x, workspace))
            counts = group_channels * plane, group_channels * rows.chunk, rows.chunks
            args = (workspace, mean, rstd, eps, *counts)
            rows.combine("group_norm_statistics_channels_last", blocks, rows.chunks, args)
            rows.launch("group_norm_apply_channels_last", (x, mean, rstd, weight, bias, y))
        return
    args = (x, weight, bias, y, mean, rstd, eps, num_groups, group_channels, plane)
    _launch("group_norm_forward", blocks, *_variant(group_channels * plane, (x, y), y, (x,), weight, bias), args)


def group_norm_backward_workspace(x, num_groups, parameters: bool, channels_last: bool = False) -> int:
    """Elements of the backward's workspace. parameters: whether weight or bias need a gradient."""
    chunks = _chunks(x, num_groups)[0] if channels_last else 1
    if chunks == 1 and not parameters:
        return 0
    return 2 * x.shape[0] * (chunks * _shape(x, channels_last)[1] + (num_groups if chunks > 1 else 0))


def group_norm_backward(
    dy, x, num_groups, mean, rstd, weight, dx, dweight, dbias, workspace, channels_last: bool = False
) -> None:
    """Writes dx, dweight and dbias, where not None, from the forward's mean and rstd.

    weight: the forward's, or None.
    workspace: `group_norm_backward_workspace(x, ...)` elements, written; None for 0.
    channels_last: dy, x and dx are [N, *, C].
    """
    same_shape(dy=dy, x=x, dx=dx)
    shape = _shape(x, channels_last)
    blocks, group_channels, plane = _sizes(shape, num_groups)
    channels = shape[1]
    _check_statistics(blocks, mean, rstd)
    check_per_channel(channels, weight=weight, dweight=dweight, dbias=dbias)
    has_parameters = dweight is not None or dbias is not None
    _check_workspace(workspace, group_norm_backward_workspace(x, num_groups, has_parameters, channels_last), shape)
    tensors, parameters = [a for a in (x, dy, dx) if a is not None], (weight, dweight, dbias)
    variant, *sizes = _variant(group_channels * plane, tensors, dy, (dy, x), *parameters)
    if x.size and channels_last:
        rows, args = _rows(x, num_groups, tensors, dy, *parameters), (dy, x, mean, rstd, weight)
        if rows.chunks == 1:
            rows.launch("group_norm_backward_channels_last", (*args, dx, workspace))
        else:
            workspace, means = workspace[: -2 * blocks], workspace[-2 * blocks :]
            rows.launch("group_norm_backward_partials_channels_last", (*args, workspace))
            if dx is not None:
                sums = (workspace, weight, means, rows.chunks, channels, group_channels, plane)
                terms = rows.chunks * group_channels
                rows.combine("group_norm_backward_means_channels_last", blocks, terms, sums)
                rows.launch("group_norm_backward_apply_channels_last", (*args, means, dx))
    elif x.size:
        args = (dy, x, mean, rstd, weight, dx, workspace, num_groups, group_channels, plane)
        _launch("group_norm_backward", blocks, variant, *sizes, args)
    if has_parameters:
        launch(
            variant.kernel("group_norm_backward_parameters"),
            (ceil_div(channels, _COLUMNS), 1, 1),
            (THREADS, 1, 1),
            (workspace, dweight, dbias, workspace.size // (2 * channels) if x.size else 0, channels),
        )


def variants():
    """Every variant that this module launches."""
    for name in FLOATS:
        wide = accumulator(name)
        for out, param in sorted({(name, name), (name, wide), (wide, wide)}):
            widest = 16 // DTYPES[out].itemsize
            for width, cached in itertools.product((widest, 1), (0, 1)):
                yield Variant("group_norm.cu", _defines(name, out, param, width, cached))
            for width in widths(name):
                if width <= widest:
                    yield Variant(_CHANNELS_LAST_FILE, _row_defines(name, out, param, width))


class _Rows(NamedTuple):
    """How blocks share [N, *, C] tensors, see group_norm_channels_last.cu."""

    defines: tuple
    blocks: int
    threads: int
    sizes: tuple[int, ...]  # a kernel's last arguments

    @property
    def chunks(self):
        return self.sizes[1]

    @property
    def chunk(self):
        return self.sizes[5]

    def launch(self, name, args):
        shared = shared_bytes(self.defines, self.sizes[-1], self.threads)
        launch(self._kernel(name), (self.blocks, 1, 1), (self.threads, 1, 1), (*args, *self.sizes), shared)

    def combine(self, name, blocks, terms, args):
        """Launches a block for each result, with no more threads than a result has terms."""
        launch(self._kernel(name), (blocks, 1, 1), (min(_ROW_THREADS, whole_warps(terms)), 1, 1), args)

    def _kernel(self, name):
        return Variant(_CHANNELS_LAST_FILE, self.defines).kernel(name)


def _rows(x, num_groups, tensors, out, *parameters) -> _Rows:
    """How blocks share the tensors. parameters: one of the type of the per-channel parameters, or None."""
    images, channels, plane = x.shape[0], x.shape[-1], prod(x.shape[1:-1])
    group_channels = channels // num_groups
    if group_channels > MAX_ROW_CHANNELS:
        raise ValueError(
            f"groups of channels_last arrays have at most {MAX_ROW_CHANNELS} channels, received {channels} channels in "
            f"{num_groups} groups; pass contiguous arrays"
        )
    width = pack_width(channels, tensors)
    chunks, chunk = _chunks(x, num_groups)
    for tile_bytes in _TILE_BYTES:  # the widest of which there are enough blocks
        tile = row_tile(channels, group_channels, width, tile_bytes // (width * x.itemsize))
        tiles = ceil_div(channels // width, tile)
        if chunks > 1 or images * tiles >= MULTIPROCESSORS:
            break
    rows = max(1, min(_ROW_THREADS, ceil_div(tile * chunk, 4)) // tile)  # some packs for each thread
    sizes = (tiles, chunks, channels, group_channels, plane, chunk, tile)
    defines = _row_defines(*_types(x, out, parameters), width)
    return _Rows(defines, images * chunks * tiles, whole_warps(tile * rows), sizes)


def _chunks(x, num_groups):
    """(chunks of an image, rows of a chunk) of [N, *, C], from shape and dtype alone.

    It is one chunk if there are enough blocks with whole groups.
    """
    images, plane, row_bytes = x.shape[0], prod(x.shape[1:-1]), x.shape[-1] * x.itemsize
    group_bytes = row_bytes // num_groups
    if not x.size or images * (row_bytes // max(_TILE_BYTES[-1], group_bytes)) >= MULTIPROCESSORS:
        return 1, plane
    tiles = ceil_div(row_bytes, max(_TILE_BYTES[0], group_bytes))
    most = max(1, plane * row_bytes // (tiles * _CHUNK_BYTES))
    chunk = ceil_div(plane, min(ceil_div(_BLOCKS, images * tiles), most))
    return ceil_div(plane, chunk), chunk


def _types(x, out, parameters):
    """The kernels' names of the types of x, out and the parameters."""
    return scalar(x), scalar(out), parameter_type(x, *parameters)


def _row_defines(name, out, param, width):
    return (
        *scalar_macros(name),
        ("out_t", out),
        ("param_t", param),
        ("WIDTH", width),
        ("PLANES", 0),
        ("KEPT", KEPT),
        ("THREADS", _ROW_THREADS),
    )


def _shape(x, channels_last):
    """[N, C, *] of an array, which is [N, *, C] if channels_last."""
    return (x.shape[0], x.shape[-1], *x.shape[1:-1]) if channels_last else x.shape


def _defines(name, out, param, width, cached):
    sizes = {"WIDTH": width, "CACHED": cached, "THREADS": THREADS, "COLUMNS": _COLUMNS}
    return (*scalar_macros(name), ("out_t", out), ("param_t", param), *sizes.items())


def _variant(size, tensors, out, kept, *parameters):
    """(variant, packs in a group, bytes that a block keeps). size: values in a group. tensors: x first.

    kept: the tensors whose groups a block keeps in shared memory if they fit.
    """
    width = vector_width(*tensors)
    width = 1 if size % width else width
    kept_bytes = size * sum(a.itemsize for a in kept)
    kept_bytes = kept_bytes if kept_bytes <= _CACHE_BYTES else 0
    defines = _defines(*_types(tensors[0], out, parameters), width, int(kept_bytes > 0))
    return Variant("group_norm.cu", defines), size // width, kept_bytes


def _launch(name, blocks, variant, packs, kept_bytes, args):
    threads = 32
    while threads < 1024 and 5 * threads < packs:  # about five packs in flight per thread
        threads *= 2
    launch(variant.kernel(name), (blocks, 1, 1), (threads, 1, 1), args, kept_bytes)


def _sizes(shape, num_groups):
    """(groups of all images, channels of a group, values of a plane) of [N, C, *]."""
    if len(shape) < 2:
        raise ValueError(f"group norm takes arrays of 2 dimensions or more, [N, C, *]; received shape {tuple(shape)}")
    if num_groups < 1 or shape[1] % num_groups:
        raise ValueError(f"num_groups must divide the {shape[1]} channels, received {num_groups}")
    group_channels, plane = shape[1] // num_groups, prod(shape[2:])
    if group_channels * plane >= 2**31:
        raise ValueError(f"a group must have fewer than 2^31 values, received shape {shape} with {num_groups} groups")
    return shape[0] * num_groups, group_channels, plane


def _check_workspace(workspace, needed, shape):
    received = None if workspace is None else workspace.size
    if received != (needed or None):
        raise ValueError(f"the workspace for shape {shape} must have {needed} elements, received {received}")


def _check_statistics(blocks, mean, rstd):
    if mean.size != blocks or rstd.size != blocks:
        raise ValueError(f"mean and rstd must have {blocks} elements, received {mean.size} and {rstd.size}")
