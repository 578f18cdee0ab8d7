"""Batch norm over [N, C, *]: statistics, normalisation with an optional tanh behind it, and the gradients.

All arrays are contiguous. `mean` and `invstd`, (C,), have the accumulator's dtype: see `common.accumulator_dtype`.
Workspaces and the backward's sums are float64: float32 sums may overflow. weight, bias and their gradients share one
dtype, and running_mean and running_var share one: x's, or float32.
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
    row_width,
    same_shape,
    scalar,
    scalar_macros,
)
from .launch import launch
from .source import DTYPES, SCALARS, Kernel, Variant

ITEMS = 32  # values per thread


def batch_norm_workspace(shape) -> int:
    """Elements of the workspace that the statistics and the backward's sums of an x of this shape need."""
    _, channels, plane = _sizes(shape)
    return 2 * channels * _chunks(shape[0] * plane)


def batch_norm_statistics(x, running_mean, running_var, batches, mean, invstd, workspace, momentum, eps) -> None:
    """mean = x's mean per channel, invstd = 1/sqrt(biased variance + eps); both are written.

    running_mean, running_var: updated in place, running = (1 - momentum) running + momentum batch, with the unbiased
    variance; both may be None. An empty x leaves them as they are.
    batches: one int64, which grows by 1, or None.
    workspace: `batch_norm_workspace(x.shape)` elements, written.
    """
    images, channels, plane = _sizes(x.shape)
    count = images * plane
    chunks = _chunks(count)
    check_per_channel(channels, mean=mean, invstd=invstd, running_mean=running_mean, running_var=running_var)
    _check_workspace(workspace, x.shape)
    macros = _macros(plane, (x,), running_mean)
    launch(
        Kernel("batch_norm.cu", "batch_norm_partials", macros),
        (channels * chunks, 1, 1),
        (THREADS, 1, 1),
        (x, workspace, channels, plane, count, chunks),
    )
    launch(
        Kernel("batch_norm.cu", "batch_norm_statistics", macros),
        (channels, 1, 1),
        (THREADS, 1, 1),
        (x, workspace, running_mean, running_var, batches, mean, invstd, momentum, eps, channels, plane, count, chunks),
    )


def batch_norm_eval_statistics(running_mean, running_var, mean, invstd, eps) -> None:
    """mean = running_mean, invstd = 1/sqrt(running_var + eps); both are written."""
    channels = mean.size
    check_per_channel(channels, mean=mean, invstd=invstd, running_mean=running_mean, running_var=running_var)
    launch(
        Kernel("batch_norm.cu", "batch_norm_eval_statistics", _macros(1, (running_mean,), running_mean)),
        (ceil_div(channels, THREADS), 1, 1),
        (THREADS, 1, 1),
        (running_mean, running_var, mean, invstd, eps, channels),
    )


def batch_norm_apply(x, mean, invstd, weight, bias, y, tanh=False) -> None:
    """y = (x - mean) invstd weight + bias, or tanh of that. weight and bias may be None. y is written."""
    same_shape(x=x, y=y)
    images, channels, plane = _sizes(x.shape)
    check_per_channel(channels, mean=mean, invstd=invstd, weight=weight, bias=bias)
    macros = _macros(plane, (x, y), weight if weight is not None else bias)
    count = images * plane
    launch(
        Kernel("batch_norm.cu", "batch_norm_apply", macros),
        (channels * _chunks(count), 1, 1),
        (THREADS, 1, 1),
        (x, mean, invstd, weight, bias, y, tanh, channels, plane, count),
    )


def batch_norm_backward_reduce(dy, x, mean, invstd, sums, dweight, dbias, workspace, y=None) -> None:
    """sums[0] = sum of g, sums[1] = sum of g xhat per channel, where xhat = (x - mean) invstd.

    g = dy; if `y` is given, the forward's result with tanh, g = dy (1 - y^2).
    sums: (2, C), float64, written. dweight = sums[1] and dbias = sums[0], in weight's dtype, are written
    where not None. workspace: `batch_norm_workspace(x.shape)` elements, written.
    """
    same_shape(dy=dy, x=x, y=y)
    images, channels, plane = _sizes(x.shape)
    count = images * plane
    chunks = _chunks(count)
    check_per_channel(channels, mean=mean, invstd=invstd, dweight=dweight, dbias=dbias)
    _check_workspace(workspace, x.shape)
    macros = _macros(plane, (dy, x, y), dweight if dweight is not None else dbias)
    launch(
        Kernel("batch_norm.cu", "batch_norm_backward_partials", macros),
        (channels * chunks, 1, 1),
        (THREADS, 1, 1),
        (dy, x, y, mean, invstd, workspace, channels, plane, count, chunks),
    )
    batch_norm_backward_combine(workspace.reshape((2, channels, chunks)), mean, sums, dweight, dbias, macros)


def batch_norm_backward_combine(partials, mean, sums, dweight, dbias, macros=None) -> None:
    """The second stage of `batch_norm_backward_reduce`: its results, from partial sums.

    partials: (2, C, chunks), float64. macros: of the module to take the kernel from, if the caller has one.
    """
    _, channels, chunks = partials.shape
    if sums.shape != (2, channels):
        raise ValueError(f"sums must have shape {(2, channels)}, received {sums.shape}")
    check_per_channel(channels, dweight=dweight, dbias=dbias)
    if macros is None:
        macros = _macros(1, (mean,), dweight if dweight is not None else dbias)
    launch(
        Kernel("batch_norm.cu", "batch_norm_backward_sums", macros),
        (channels, 1, 1),
        (THREADS, 1, 1),
        (partials, sums, dweight, dbias, channels, chunks),
    )


def batch_norm_backward_apply(dy, x, mean, invstd, weight, sums, dx, y=None) -> None:
    """dx from `batch_norm_backward_reduce`'s sums; with sums None (statistics that do not depend on x), x may be None.

    weight may be None. y: as in the reduction. dx is written.
    """
    if sums is not None and x is None:
        raise ValueError("the gradient through the batch's statistics needs x")
    x = None if sums is None else x
    same_shape(dy=dy, x=x, y=y, dx=dx)
    images, channels, plane = _sizes(dy.shape)
    check_per_channel(channels, mean=mean, invstd=invstd, weight=weight)
    if sums is not None and sums.shape != (2, channels):
        raise ValueError(f"sums must have shape {(2, channels)}, received {sums.shape}")
    count = images * plane
    macros = _macros(plane, (dy, x, y, dx), weight)
    launch(
        Kernel("batch_norm.cu", "batch_norm_backward_apply", macros),
        (channels * _chunks(count), 1, 1),
        (THREADS, 1, 1),
        (dy, x, y, mean, invstd, weight, sums, dx, channels, plane, count),
    )


def variants():
    """Every variant that this module launches."""
    for name in FLOATS:
        for param, width in itertools.product(sorted({accumulator(name), name}), _widths(name)):
            yield Variant("batch_norm.cu", _defines(name, param, width))
    for param in ("half_t", "bf16_t"):  # the second stage of a reduction that another module began in float
        yield Variant("batch_norm.cu", _defines("float", param, 1))


def _widths(name):
    """Elements per access, the widest first: 16 bytes, half of that for 16-bit types, one element."""
    widest = 16 // DTYPES[name].itemsize
    return (8, 4, 1) if widest == 8 else (widest, 1)


def _sizes(shape):
    """Images, channels and values per plane of [N, C, *]."""
    if len(shape) < 2:
        raise ValueError(f"batch norm takes arrays of 2 dimensions or more, [N, C, *]; received shape {tuple(shape)}")
    return shape[0], shape[1], prod(shape[2:])


def _chunks(count):
    return ceil_div(count, THREADS * ITEMS)


def _macros(plane, tensors, parameter):
    """`parameter`: an array of the type of the per-channel parameters, or None: then no kernel reads or writes one."""
    tensors = [a for a in tensors if a is not None]
    param = accumulator_dtype(tensors[0]) if parameter is None else parameter.dtype
    name, aligned = scalar(tensors[0]), row_width(plane, *tensors)
    return _defines(name, SCALARS[param], next(w for w in _widths(name) if w <= aligned))


def _defines(name, param, width):
    return (*scalar_macros(name), ("param_t", param), ("WIDTH", width), ("ITEMS", ITEMS), ("THREADS", THREADS))


def _check_workspace(workspace, shape):
    needed = batch_norm_workspace(shape)
    if workspace.size != needed:
        raise ValueError(f"the workspace for shape {shape} must have {needed} elements, received {workspace.size}")
