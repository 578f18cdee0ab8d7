"""Group norm over [N, C, *]: forward and gradients.

All arrays are contiguous. `mean` and `rstd`, N * num_groups elements, and the workspace have the accumulator's dtype:
see `common.accumulator_dtype`. weight, bias and their gradients share one dtype: x's, or float32.
"""

import itertools
from math import prod

from .channel_walk import KEPT, row_tile, shared_bytes, whole_warps, widths
from .common import (
    FLOATS,
    MULTIPROCESSORS,
    THREADS,
    accumulator,
    accumulator_dtype,
    ceil_div,
    check_per_channel,
    row_width,
    same_shape,
    scalar,
    scalar_macros,
    vector_width,
)
from .launch import launch
from .source import DTYPES, SCALARS, Variant

_CACHE_BYTES = 47 * 1024  # of the 48 KiB that every GPU has; the kernels' fixed arrays take the rest
_CHANNELS_LAST_FILE = "group_norm_channels_last.cu"
_TILE_BYTES = (512, 256, 128, 64, 32, 16)  # of a row that a block reads
_ROW_THREADS = MAX_ROW_CHANNELS = 256  # the most threads of a block, of which each has a channel at least
_COLUMNS = 8  # channels of a block of group_norm_backward_parameters


def group_norm_forward(x, num_groups, weight, bias, y, mean, rstd, eps, channels_last: bool = False) -> None:
    """y = (x - mean) rstd weight + bias with mean and rstd = 1/sqrt(biased variance + eps) of each image's groups.

    weight and bias may be None. y, mean and rstd are written; for an empty x nothing is. channels_last: x and y are
    [N, *, C].
    """
    same_shape(x=x, y=y)
    shape = _shape(x, channels_last)
    blocks, group_channels, plane = _sizes(shape, num_groups)
    _check_statistics(blocks, mean, rstd)
    check_per_channel(shape[1], weight=weight, bias=bias)
    if not x.size:
        return
    if channels_last:
        args = (x, weight, bias, y, mean, rstd, eps)
        _launch_rows("group_norm_forward_channels_last", args, shape, num_groups, (x, y), weight, bias)
        return
    variant, packs = _variant(group_channels * plane, (x, y), 1, weight, bias)
    args = (x, weight, bias, y, mean, rstd, eps, num_groups, group_channels, plane)
    _launch(variant, "group_norm_forward", blocks, packs, packs, args)


def group_norm_workspace(shape) -> int:
    """Elements of the workspace that the gradients of weight and bias need, for an x of this shape."""
    return 2 * shape[0] * shape[1]


def group_norm_backward(
    dy, x, num_groups, mean, rstd, weight, dx, dweight, dbias, workspace, channels_last: bool = False
) -> None:
    """The gradients from the forward's mean and rstd. dx, dweight and dbias are written; any may be None.

    weight: the forward's, or None. workspace: `group_norm_workspace(x.shape)` elements, written; None if dweight and
        dbias are None.
    channels_last: dy, x and dx are [N, *, C].
    """
    same_shape(dy=dy, x=x, dx=dx)
    shape = _shape(x, channels_last)
    blocks, group_channels, plane = _sizes(shape, num_groups)
    images, channels = shape[:2]
    _check_statistics(blocks, mean, rstd)
    check_per_channel(channels, weight=weight, dweight=dweight, dbias=dbias)
    has_parameters = dweight is not None or dbias is not None
    needed = group_norm_workspace(shape) if has_parameters else None
    received = None if workspace is None else workspace.size
    if received != needed:
        raise ValueError(f"the workspace for shape {shape} must have {needed} elements, received {received}")
    variant, packs = _variant(group_channels * plane, (dy, x, dx), 2, weight, dweight, dbias)
    if x.size and channels_last:
        args, tensors = (dy, x, mean, rstd, weight, dx, workspace), [a for a in (dy, x, dx) if a is not None]
        parameters = (weight, dweight, dbias)
        _launch_rows("group_norm_backward_channels_last", args, shape, num_groups, tensors, *parameters)
    elif x.size:
        args = (dy, x, mean, rstd, weight, dx, workspace, num_groups, group_channels, plane)
        _launch(variant, "group_norm_backward", blocks, packs, 2 * packs, args)
    if has_parameters:
        launch(
            variant.kernel("group_norm_backward_parameters"),
            (ceil_div(channels, _COLUMNS), 1, 1),
            (THREADS, 1, 1),
            (workspace, dweight, dbias, images if x.size else 0, channels),
        )


def variants():
    """Every variant that this module launches."""
    for name in FLOATS:
        params = sorted({accumulator(name), name})
        for param, width, cached in itertools.product(params, (16 // DTYPES[name].itemsize, 1), (0, 1)):
            yield Variant("group_norm.cu", _defines(name, param, width, cached))
        for param, width in itertools.product(params, widths(name)):
            yield Variant(_CHANNELS_LAST_FILE, _row_defines(name, param, width))


def _launch_rows(name, args, shape, num_groups, tensors, *parameters):
    """Starts a kernel on [N, *, C] tensors. shape: [N, C, *]. parameters: of the per-channel ones' type, or None."""
    x, images, channels, plane = tensors[0], shape[0], shape[1], prod(shape[2:])
    if channels // num_groups > MAX_ROW_CHANNELS:
        raise ValueError(
            f"groups of channels_last arrays have at most {MAX_ROW_CHANNELS} channels, received {shape[1]} channels in "
            f"{num_groups} groups; pass contiguous arrays"
        )
    param = next((a.dtype for a in parameters if a is not None), accumulator_dtype(x))
    aligned = row_width(channels, *tensors)
    width = next(w for w in widths(scalar(x)) if w <= aligned)
    for tile_bytes in _TILE_BYTES:  # the widest of which there are enough blocks
        tile = row_tile(channels, channels // num_groups, width, tile_bytes // (width * x.itemsize))
        tiles = ceil_div(channels // width, tile)
        if images * tiles >= MULTIPROCESSORS:
            break
    rows = max(1, min(_ROW_THREADS, ceil_div(tile * plane, 4)) // tile)  # some packs for each thread
    threads, defines = whole_warps(tile * rows), _row_defines(scalar(x), SCALARS[param], width)
    sizes = (tiles, channels, channels // num_groups, plane, tile)
    kernel = Variant(_CHANNELS_LAST_FILE, defines).kernel(name)
    launch(kernel, (images * tiles, 1, 1), (threads, 1, 1), (*args, *sizes), shared_bytes(defines, tile, threads))


def _row_defines(name, param, width):
    return (
        *scalar_macros(name),
        ("param_t", param),
        ("WIDTH", width),
        ("PLANES", 0),
        ("KEPT", KEPT),
        ("THREADS", _ROW_THREADS),
    )


def _shape(x, channels_last):
    """[N, C, *] of an array, [N, *, C] if channels_last."""
    return (x.shape[0], x.shape[-1], *x.shape[1:-1]) if channels_last else x.shape


def _variant(size, tensors, copies, *parameters):
    """(variant, packs in a group). size: values in a group. copies: how many tensors' groups a block would cache."""
    tensors = [a for a in tensors if a is not None]
    name, width = scalar(tensors[0]), vector_width(*tensors)
    width = 1 if size % width else width
    param = next((a.dtype for a in parameters if a is not None), accumulator_dtype(tensors[0]))
    cached = int(copies * size * tensors[0].itemsize <= _CACHE_BYTES)
    return Variant("group_norm.cu", _defines(name, SCALARS[param], width, cached)), size // width


def _defines(name, param, width, cached):
    sizes = {"WIDTH": width, "CACHED": cached, "THREADS": THREADS, "COLUMNS": _COLUMNS}
    return (*scalar_macros(name), ("param_t", param), *sizes.items())


def _launch(variant, name, blocks, packs, cached_packs, args):
    macros = dict(variant.defines)
    shared_bytes = cached_packs * macros["WIDTH"] * DTYPES[macros["scalar_t"]].itemsize if macros["CACHED"] else 0
    threads = 32
    while threads < 1024 and 5 * threads < packs:  # about five packs in flight per thread
        threads *= 2
    launch(variant.kernel(name), (blocks, 1, 1), (threads, 1, 1), args, shared_bytes)


def _sizes(shape, num_groups):
    """Groups of all images, channels of a group, and values of a plane, of [N, C, *]."""
    if len(shape) < 2:
        raise ValueError(f"group norm takes arrays of 2 dimensions or more, [N, C, *]; received shape {tuple(shape)}")
    if num_groups < 1 or shape[1] % num_groups:
        raise ValueError(f"num_groups must divide the {shape[1]} channels, received {num_groups}")
    group_channels, plane = shape[1] // num_groups, prod(shape[2:])
    if group_channels * plane >= 2**31:
        raise ValueError(f"a group must have fewer than 2^31 values, received shape {shape} with {num_groups} groups")
    return shape[0] * num_groups, group_channels, plane


def _check_statistics(blocks, mean, rstd):
    if mean.size != blocks or rstd.size != blocks:
        raise ValueError(f"mean and rstd must have {blocks} elements, received {mean.size} and {rstd.size}")
