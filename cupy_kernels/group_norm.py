"""Group norm over [N, C, *]: forward and gradients.

All arrays are contiguous. `mean` and `rstd`, N * num_groups elements, and the workspace have the accumulator's dtype:
see `common.accumulator_dtype`. weight, bias and their gradients share one dtype: x's, or float32.
"""

import itertools
from math import prod

from .common import (
    FLOATS,
    THREADS,
    accumulator,
    accumulator_dtype,
    ceil_div,
    check_per_channel,
    same_shape,
    scalar,
    scalar_macros,
    vector_width,
)
from .launch import launch
from .source import DTYPES, SCALARS, Variant

_CACHE_BYTES = 47 * 1024  # of the 48 KiB that every GPU has; the kernels' fixed arrays take the rest
_COLUMNS = 8  # channels of a block of group_norm_backward_parameters


def group_norm_forward(x, num_groups, weight, bias, y, mean, rstd, eps) -> None:
    """y = (x - mean) rstd weight + bias with mean and rstd = 1/sqrt(biased variance + eps) of each image's groups.

    weight and bias may be None. y, mean and rstd are written; for an empty x nothing is.
    """
    same_shape(x=x, y=y)
    blocks, group_channels, plane = _sizes(x.shape, num_groups)
    _check_statistics(blocks, mean, rstd)
    check_per_channel(x.shape[1], weight=weight, bias=bias)
    if not x.size:
        return
    variant, packs = _variant(group_channels * plane, (x, y), 1, weight, bias)
    args = (x, weight, bias, y, mean, rstd, eps, num_groups, group_channels, plane)
    _launch(variant, "group_norm_forward", blocks, packs, packs, args)


def group_norm_workspace(shape) -> int:
    """Elements of the workspace that the gradients of weight and bias need, for an x of this shape."""
    return 2 * shape[0] * shape[1]


def group_norm_backward(dy, x, num_groups, mean, rstd, weight, dx, dweight, dbias, workspace) -> None:
    """The gradients from the forward's mean and rstd. dx, dweight and dbias are written; any may be None.

    weight: the forward's, or None. workspace: `group_norm_workspace(x.shape)` elements, written; None if dweight and
        dbias are None.
    """
    same_shape(dy=dy, x=x, dx=dx)
    blocks, group_channels, plane = _sizes(x.shape, num_groups)
    images, channels = x.shape[:2]
    _check_statistics(blocks, mean, rstd)
    check_per_channel(channels, weight=weight, dweight=dweight, dbias=dbias)
    has_parameters = dweight is not None or dbias is not None
    needed = group_norm_workspace(x.shape) if has_parameters else None
    received = None if workspace is None else workspace.size
    if received != needed:
        raise ValueError(f"the workspace for shape {x.shape} must have {needed} elements, received {received}")
    variant, packs = _variant(group_channels * plane, (dy, x, dx), 2, weight, dweight, dbias)
    if x.size:
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
