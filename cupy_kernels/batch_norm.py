"""Batch norm over [N, C, *]: statistics, normalisation with an optional tanh, and gradients.

All arrays are contiguous. A channels_last tensor is passed as rows of channels, [N * H * W, C]. `mean` and `invstd`,
(C,), have the accumulator's dtype, see `common.accumulator_dtype`. Workspaces are float64, because float32 sums may
overflow. weight, bias and their gradients share one dtype, and running_mean and running_var share one: x's, or float32.
"""

import itertools

from .backend import Room
from .batch_norm_resident import most_chunks, resident, resident_variants
from .channel_walk import (
    KEPT,
    Walk,
    chunks_of,
    launch_combining,
    over_chunks,
    pack_width,
    row_tile,
    sizes_of,
    whole_warps,
    widths,
)
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
)
from .launch import launch
from .source import Kernel, Variant

_FILE = "batch_norm.cu"
_WHOLE_TILE_BYTES = (128, 64, 32)  # of a row that a block of whole channels reads
_SM_THREADS = 1024  # that an SM runs at once, as many registers as they have
_L2_BYTES = 27 * 10**6  # that stay in the L2 cache until they are read again
_SM_BYTES_US = {0: 20 * 10**3, 1: 45 * 10**3}  # bytes a microsecond that a block gets from memory, by PLANES
_BYTES_US = 2.8 * 10**6  # that all get, on an H100
_LAUNCHES_US = 9  # what two more launches, and partial results, cost


def batch_norm_workspace(x, room: Room | None = None) -> int:
    """Elements of the workspace for the statistics and the gradients of x, or of a tensor of its shape and dtype.

    room: the same as for `batch_norm_forward` or `batch_norm_backward`.
    """
    return 2 * x.shape[1] * (1 + max(chunks_of(x)[1], most_chunks(x, room)))


def batch_norm_forward(
    x,
    running_mean,
    running_var,
    batches,
    weight,
    bias,
    y,
    mean,
    invstd,
    workspace,
    momentum,
    eps,
    tanh=False,
    room: Room | None = None,
) -> None:
    """y = (x - mean) invstd weight + bias, or tanh of that. Writes y, and x's own statistics mean and invstd.

    Does the same as `batch_norm_statistics` and `batch_norm_apply`. It is one kernel if a block can have a whole
    channel, or if blocks may wait for each other.

    room: a `Room`, if blocks may wait for each other.
    """
    same_shape(x=x, y=y)
    parameters = {"running_mean": running_mean, "running_var": running_var, "weight": weight, "bias": bias}
    _check_channels(x, mean=mean, invstd=invstd, **parameters)
    args = (x, running_mean, running_var, batches, weight, bias, y, mean, invstd)
    found = _resident((x, y), 1, room, running_mean, weight, bias)
    if found:
        partials = _partials(workspace, x, found.walk.chunks)
        found.launch("batch_norm_resident_forward", (*args, partials, momentum, eps, tanh))
    elif not _one_dtype(running_mean, weight, bias) or not _whole(*args, momentum, eps, tanh):
        batch_norm_statistics(x, running_mean, running_var, batches, mean, invstd, workspace, momentum, eps)
        batch_norm_apply(x, mean, invstd, weight, bias, y, tanh)


def batch_norm_statistics(x, running_mean, running_var, batches, mean, invstd, workspace, momentum, eps) -> None:
    """Writes mean, x's mean per channel, and invstd = 1/sqrt(biased variance + eps).

    running_mean, running_var: updated in place, running = (1 - momentum) running + momentum batch, with the unbiased
        variance. Both may be None. An empty x leaves them unchanged.
    batches: one int64, incremented by 1, or None.
    workspace: `batch_norm_workspace(x)` elements, written.
    """
    partials = _partials(workspace, x, chunks_of(x)[1])
    if _whole(x, running_mean, running_var, batches, None, None, None, mean, invstd, momentum, eps, False):
        return
    channels = _check_channels(x, mean=mean, invstd=invstd, running_mean=running_mean, running_var=running_var)
    walk = _walk((x,), running_mean)
    walk.launch(_FILE, "batch_norm_partials", (x, partials, *walk.sizes, walk.chunks, walk.tile))
    _, _, *counts = walk.sizes
    running = (running_mean, running_var, batches)
    args = (partials, None, *running, mean, invstd, momentum, eps, channels, *counts, walk.chunks)
    launch_combining(Kernel(_FILE, "batch_norm_statistics", walk.macros), channels, walk.chunks, args)


def batch_norm_combine(
    count: int, partials, counts, running_mean, running_var, batches, mean, invstd, momentum, eps
) -> None:
    """`batch_norm_statistics` from the statistics of chunks of x. count: the number of values of a channel.

    partials: (2, C, chunks), means and sums of squared distances from them, float64.
    counts: (chunks,), the number of values of each chunk, float64.
    """
    _, channels, chunks = partials.shape
    check_per_channel(channels, mean=mean, invstd=invstd, running_mean=running_mean, running_var=running_var)
    kernel = Kernel(_FILE, "batch_norm_statistics", _macros(scalar(mean), parameter_type(mean, running_mean), 1, 1))
    args = (partials, counts, running_mean, running_var, batches, mean, invstd, momentum, eps, channels, count, 1)
    launch_combining(kernel, channels, chunks, (*args, chunks))


def batch_norm_eval_statistics(running_mean, running_var, mean, invstd, eps) -> None:
    """Writes mean = running_mean and invstd = 1/sqrt(running_var + eps)."""
    channels = mean.size
    check_per_channel(channels, mean=mean, invstd=invstd, running_mean=running_mean, running_var=running_var)
    macros = _macros(scalar(running_mean), scalar(running_mean), 1, 1)
    launch(
        Kernel(_FILE, "batch_norm_eval_statistics", macros),
        (ceil_div(channels, THREADS), 1, 1),
        (THREADS, 1, 1),
        (running_mean, running_var, mean, invstd, eps, channels),
    )


def batch_norm_eval(x, running_mean, running_var, weight, bias, y, mean, invstd, eps, tanh=False) -> None:
    """`batch_norm_forward` with the running statistics, as `batch_norm_eval_statistics` and `batch_norm_apply`."""
    same_shape(x=x, y=y)
    parameters = {"running_mean": running_mean, "running_var": running_var, "weight": weight, "bias": bias}
    _check_channels(x, mean=mean, invstd=invstd, **parameters)
    if not x.size or not _one_dtype(*parameters.values()):
        batch_norm_eval_statistics(running_mean, running_var, mean, invstd, eps)
        batch_norm_apply(x, mean, invstd, weight, bias, y, tanh)
        return
    walk = _walk((x, y), running_mean)
    args = (x, running_mean, running_var, weight, bias, y, mean, invstd, eps, tanh)
    walk.launch(_FILE, "batch_norm_eval", (*args, *walk.sizes, walk.tile), sums=False)


def batch_norm_apply(x, mean, invstd, weight, bias, y, tanh=False) -> None:
    """Writes y = (x - mean) invstd weight + bias, or tanh of that. weight and bias may be None."""
    same_shape(x=x, y=y)
    _check_channels(x, mean=mean, invstd=invstd, weight=weight, bias=bias)
    walk = _walk((x, y), weight, bias)
    args = (x, mean, invstd, weight, bias, y, tanh, *walk.sizes, walk.tile)
    walk.launch(_FILE, "batch_norm_apply", args, sums=False)


def batch_norm_backward(
    dy, x, mean, invstd, weight, dx, dweight, dbias, workspace, through_statistics, y=None, room=None
) -> None:
    """Writes dx, dweight and dbias, where not None. xhat = (x - mean) invstd.

    Per channel, dbias = sum of g and dweight = sum of g xhat. Here g = dy; or, if `y` is given, the result of the
    forward with tanh, g = dy (1 - y^2). dx = weight invstd g. With through_statistics, where mean and invstd are those
    of x itself, dx = weight invstd (g - mean of g - xhat mean of g xhat).

    x: may be None if neither the statistics nor the parameters need a gradient.
    weight: may be None.
    workspace: `batch_norm_workspace(dy, room)` elements, written; None if x is None.
    room: as in `batch_norm_forward`.
    """
    sums_needed = through_statistics or dweight is not None or dbias is not None
    if sums_needed and x is None:
        raise ValueError("the gradients of weight and bias, and the one through the batch's statistics, need x")
    same_shape(dy=dy, x=x, y=y, dx=dx)
    channels = _check_channels(dy, mean=mean, invstd=invstd, weight=weight, dweight=dweight, dbias=dbias)
    tensors = [a for a in (dy, x if sums_needed else None, y, dx) if a is not None]
    parameters = (weight, dweight, dbias)
    found = _resident(tensors, 2 + (y is not None), room, *parameters) if through_statistics else None
    if found:
        partials = _partials(workspace, dy, found.walk.chunks)
        args = (dy, x, y, mean, invstd, weight, dx, dweight, dbias, partials)
        found.launch("batch_norm_resident_backward", args)
        return
    whole = _whole_walk(tensors, 2 + (y is not None), *parameters) if through_statistics else None
    if whole is not None:
        args = (dy, x, y, mean, invstd, weight, dx, dweight, dbias, *whole.sizes, whole.tile)
        whole.launch(_FILE, "batch_norm_backward", args)
        return
    sums = None
    if sums_needed:
        sums = workspace[: 2 * channels].reshape((2, channels))
        given = None if through_statistics else dx
        batch_norm_backward_sums(dy, x, mean, invstd, weight, sums, dweight, dbias, workspace, y, given)
    if dx is not None and (through_statistics or not sums_needed):
        batch_norm_backward_apply(dy, x, mean, invstd, weight, sums, dx, y)


def batch_norm_backward_sums(dy, x, mean, invstd, weight, sums, dweight, dbias, workspace, y=None, dx=None) -> None:
    """Writes sums, (2, C) float64: of g and of g xhat per channel. Writes dweight and dbias where not None.

    dx: None, or weight invstd g, written.

    The rest is as in `batch_norm_backward`.
    """
    walk = _walk([a for a in (dy, x, y, dx) if a is not None], weight, dweight, dbias)
    partials = _partials(workspace, dy, walk.chunks)
    args = (dy, x, y, mean, invstd, weight, partials, dx, *walk.sizes, walk.chunks, walk.tile)
    walk.launch(_FILE, "batch_norm_backward_partials", args)
    partials = partials.reshape((2, mean.size, walk.chunks))
    batch_norm_backward_combine(partials, mean, sums, dweight, dbias, walk.macros)


def batch_norm_backward_apply(dy, x, mean, invstd, weight, sums, dx, y=None) -> None:
    """Writes dx = weight invstd (g - sums[0] / count - xhat sums[1] / count). count: values of a channel of dy.

    sums: from `batch_norm_backward_sums`. If None, dx = weight invstd g, and x may be None.
    """
    walk = _walk([a for a in (dy, None if sums is None else x, y, dx) if a is not None], weight)
    args = (dy, x, y, mean, invstd, weight, sums, dx, *walk.sizes, walk.tile)
    walk.launch(_FILE, "batch_norm_backward_apply", args, sums=False)


def batch_norm_backward_combine(partials, mean, sums, dweight, dbias, macros=None) -> None:
    """Writes the gradients of weight and bias from partial sums, and both sums in float64.

    partials: (2, C, chunks), float64.
    sums: (2, C), float64.
    macros: of the variant from which to take the kernel; by default one for these arrays.
    """
    _, channels, chunks = partials.shape
    if sums.shape != (2, channels):
        raise ValueError(f"sums must have shape {(2, channels)}, received {sums.shape}")
    check_per_channel(channels, dweight=dweight, dbias=dbias)
    if macros is None:
        macros = _macros(scalar(mean), parameter_type(mean, dweight, dbias), 1, 1)
    args = (partials, sums, dweight, dbias, channels, chunks)
    launch_combining(Kernel(_FILE, "batch_norm_backward_sums", macros), channels, chunks, args)


def variants():
    """Every variant that this module launches."""
    for name in FLOATS:
        for param, width, planes in itertools.product(sorted({accumulator(name), name}), widths(name), (1, 0)):
            yield Variant(_FILE, _macros(name, param, width, planes))
    yield from resident_variants()
    for param in ("half_t", "bf16_t"):  # the second stage of a reduction that another module began in float
        yield Variant(_FILE, _macros("float", param, 1, 1))


def _whole(x, running_mean, running_var, batches, weight, bias, y, mean, invstd, momentum, eps, tanh) -> bool:
    """`batch_norm_forward` by blocks with whole channels; without y if that is None. False if chunks are faster."""
    walk = _whole_walk([a for a in (x, y) if a is not None], 1, running_mean, weight, bias)
    if walk is None:
        return False
    running = {"running_mean": running_mean, "running_var": running_var}
    _check_channels(x, mean=mean, invstd=invstd, weight=weight, bias=bias, **running)
    args = (x, running_mean, running_var, batches, weight, bias, y, mean, invstd, momentum, eps, tanh)
    walk.launch(_FILE, "batch_norm_forward", (*args, *walk.sizes, walk.tile))
    return True


def _walk(tensors, *parameters) -> Walk:
    """The walk over chunks of tensors of one shape. parameters: arrays of the type of the per-channel parameters."""
    param = parameter_type(tensors[0], *parameters)
    return over_chunks(tensors, lambda width, planes: _macros(scalar(tensors[0]), param, width, planes))


def _whole_walk(tensors, read: int, *parameters) -> Walk | None:
    """The walk of blocks with whole channels; None if that is not faster, or if no variant has the parameters' type.

    read: number of tensors that are read twice.
    """
    x = tensors[0]
    images, channels, plane = sizes_of(x.shape)
    by_rows, count = chunks_of(x)[0], images * plane
    if not x.size or not _one_dtype(*parameters):
        return None
    width = pack_width(channels * plane if by_rows else plane, tensors)
    tile, across, packs = 0, channels, count // width
    for tile_bytes in _WHOLE_TILE_BYTES if by_rows else ():  # the widest of which there are enough blocks
        tile = row_tile(channels * plane, plane, width, tile_bytes // (width * x.itemsize))
        across, packs = ceil_div(channels * plane // width, tile), tile * images
        if across >= MULTIPROCESSORS:
            break
    block_bytes = packs * width * x.itemsize * read
    total = across * block_bytes
    for most in _whole_threads(scalar(x), not by_rows):  # the fewest that keep the memory busy: the more blocks overlap
        resident = min(across, MULTIPROCESSORS * (_SM_THREADS // most))
        if resident * most >= MULTIPROCESSORS * _SM_THREADS // 2 and resident * block_bytes <= _L2_BYTES:
            break
    whole_us = max(2 * block_bytes / _SM_BYTES_US[not by_rows], (total + total / read) / _BYTES_US)
    chunks_us = (2 * total + total / read) / _BYTES_US + _LAUNCHES_US
    if resident * block_bytes > _L2_BYTES or whole_us > chunks_us:
        return None
    threads = min(ceil_div(packs, 8 if by_rows else 2), most)  # slots take time, however few packs there are
    threads = whole_warps(tile * max(1, threads // tile) if by_rows else threads)
    chunk = count if by_rows else threads * width * ceil_div(count, threads * width)
    macros = _macros(scalar(x), parameter_type(x, *parameters), width, int(not by_rows))
    return Walk(macros, across, (channels, plane, count, chunk), 1, tile, threads)


def _resident(tensors, kept, room, *parameters):
    return resident(tensors, kept, room, parameter_type(tensors[0], *parameters)) if _one_dtype(*parameters) else None


def _partials(workspace, x, chunks):
    """The part of the workspace for partial results. The part before it holds sums."""
    sums = 2 * x.shape[1]
    needed = sums * (1 + chunks)
    if workspace.size < needed:
        raise ValueError(f"the workspace for shape {x.shape} must have {needed} elements, received {workspace.size}")
    return workspace[sums:needed]


def _check_channels(x, **arrays):
    """The number of channels. Raises ValueError if an array (None is allowed) has another number of elements."""
    channels = sizes_of(x.shape)[1]
    check_per_channel(channels, **arrays)
    return channels


def _one_dtype(*parameters):
    return len({a.dtype for a in parameters if a is not None}) < 2


def _whole_threads(name, planes):
    """Threads of a block with whole channels: as many as the registers allow."""
    if not planes:
        return 128, 256
    return (128, 256) if name == "double" else (128, 256, 512, 640)


def _macros(name, param, width, planes):
    sizes = {
        "WIDTH": width,
        "PLANES": planes,
        "KEPT": KEPT,
        "THREADS": THREADS,
        # By planes kernels get the registers with which an SM runs _SM_THREADS, in several blocks. Of bfloat16 they
        # would spill.
        "WHOLE_THREADS": _SM_THREADS if planes and name in ("float", "half_t") else _whole_threads(name, planes)[-1],
    }
    return (*scalar_macros(name), ("param_t", param), *sizes.items())
