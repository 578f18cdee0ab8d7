"""ConvTranspose2d -> BatchNorm2d -> Tanh -> MaxPool2d(2, 2) -> GroupNorm, pooled in the convolution's epilogue.

Shapes: x [N, K, H, W], w [K, M, KH, KW], the convolution's output [N, M, OH, OW], pooled and out [N, M, OH/2, OW/2].
The convolution is one that `conv_transpose_mma.plan` takes. All tensors have one type: float32,
float16, or int16 that holds bfloat16; statistics and what is saved have the types that `buffers` says.
"""

import functools
import math

import numpy as np

from .common import THREADS, accumulator, ceil_div, scalar
from .conv_transpose_mma import Plan, launch_units, pack_kernel, pack_weight, sample_plans
from .launch import launch
from .source import Kernel, Variant

DTYPES = (np.float32, np.float16, np.int32, np.uint8)  # of `buffers`

_GROUP_BYTES = 96 * 1024  # of shared memory, for pooled_backward, which needs twice what pooled_forward does


@functools.lru_cache(maxsize=1024)
def buffers(p: Plan, x_shape, groups: int, training: bool, keep: bool) -> dict[str, tuple[tuple, type]]:
    """Shape and dtype of the arrays that the forward writes besides `out`; absent ones are None.

    keep: whether a backward follows. Then `saved`, the largest, is needed: the convolution's output, as float16 under
    scales with split 1, as float32 with split 2.
    """
    macros = dict(p.macros)
    images, channels = x_shape[0], macros["OUT_CHANNELS"]
    windows = ceil_div(macros["OUT_H"], 2) * ceil_div(macros["OUT_W"], 2)
    pooled = (images, channels, macros["OUT_H"] // 2, macros["OUT_W"] // 2)
    units = images * p.units
    sizes = {
        "packed": ((p.packed_size,), np.float16),
        "exponents": ((p.rows,), np.int32),
        "pooled": (pooled, np.float32),
        "mean": ((channels,), np.float32),
        "invstd": ((channels,), np.float32),
        "group_mean": ((images * groups,), np.float32),
        "group_invstd": ((images * groups,), np.float32),
    }
    if training:
        sizes["partials"] = ((3, channels, units), np.float32)
    if keep:
        sizes["taps"] = (pooled, np.uint8)
        sizes["saved"] = ((images, channels, windows, 4), np.float16 if macros["SPLIT"] == 1 else np.float32)
        sizes["unit_exponents"] = ((units,), np.int32)
    return sizes


def conv_bn_pool_forward(
    x,
    w,
    conv_bias,
    running_mean,
    running_var,
    weight,
    bias,
    group_weight,
    group_bias,
    out,
    written,
    *,
    plan: Plan,
    training: bool,
    momentum: float,
    eps: float,
    groups: int,
    group_eps: float,
) -> None:
    """out = group_norm(max_pool2d(tanh(batch_norm(conv_transpose2d(x, w, conv_bias))), 2)).

    conv_bias, weight, bias, group_weight, group_bias: may be None. running_mean, running_var: updated in training,
    where they may be None. written: {name: array} as `buffers` describes
    them.
    """
    _, pool, statistics, tail = kernels(plan, training, "saved" in written)
    pack_weight(plan, w, written["packed"], written["exponents"])
    launch_units(
        plan,
        pool,
        x,
        (x, written["packed"], written["exponents"], weight, written["pooled"], written.get("partials"))
        + (written.get("taps"), written.get("saved"), written.get("unit_exponents")),
        shared_bytes=plan.threads * 16 if training else 0,
    )
    images, channels = out.shape[:2]
    launch(
        statistics,
        (channels, 1, 1),
        (THREADS, 1, 1),
        (written.get("partials"), conv_bias, running_mean, running_var, written["mean"], written["invstd"])
        + (momentum, eps, channels, images * plan.units, training),
    )
    members, plane = channels // groups, math.prod(out.shape[2:])
    launch(
        tail,
        (images * groups, 1, 1),
        (THREADS, 1, 1),
        (written["pooled"], written["mean"], written["invstd"], weight, bias, group_weight, group_bias, out)
        + (written["group_mean"], written["group_invstd"], channels, groups, plane, group_eps),
        members * plane * 4,
    )


@functools.lru_cache(maxsize=1024)
def kernels(p: Plan, training: bool, keep: bool) -> tuple[Kernel, Kernel, Kernel, Kernel]:
    """What `conv_bn_pool_forward` launches, in order."""
    tail = _tail_macros(p, dict(p.macros)["scalar_t"])
    return (
        pack_kernel(p),
        Kernel("conv_bn_pool.cu", "conv_bn_pool", _pool_macros(p, training, keep)),
        Kernel("pooled_tail.cu", "conv_bn_statistics", tail),
        Kernel("pooled_tail.cu", "pooled_forward", tail),
    )


def pooled_gradients(
    dout, pooled, mean, invstd, weight, bias, group_weight, group_mean, group_invstd, g, batch_partials, group_partials
) -> None:
    """g, the gradient at batch norm's output of the pooled values, and partial sums for all parameters.

    dout: like pooled. group_mean, group_invstd: [N * groups]. g: like pooled, float32. batch_partials, group_partials:
    [2, M, N] float32, for `batch_norm.batch_norm_backward_combine`. g and the partial sums are written.
    """
    images, channels = pooled.shape[:2]
    groups, plane = group_mean.size // images, math.prod(pooled.shape[2:])
    name = scalar(dout)
    launch(
        Kernel("pooled_tail.cu", "pooled_backward", _tail_defines(name, "half_t")),
        (images * groups, 1, 1),
        (THREADS, 1, 1),
        (dout, pooled, mean, invstd, weight, bias, group_weight, group_mean, group_invstd, g)
        + (batch_partials, group_partials, channels, groups, plane, images),
        channels // groups * plane * 8,
    )


def conv_output_gradient(
    g, taps, saved, exponents, unit_exponents, mean, invstd, weight, sums, dy, *, plan: Plan
) -> None:
    """dy, the gradient of the convolution's output [N, M, OH, OW].

    sums: [2, M], of g and g xhat over the batch; None where the statistics were running ones. dy is written.
    """
    images, channels, height, width = dy.shape
    macros = dict(plan.macros)
    windows = ceil_div(height, 2) * ceil_div(width, 2)
    unit_windows = macros["UNIT_PASSES"] * macros["WARPS_N"] * 16 // macros["SPLIT"]
    launch(
        Kernel("pooled_tail.cu", "sums_gradient", _tail_macros(plan, scalar(dy))),
        (images * channels, ceil_div(windows, THREADS), 1),
        (THREADS, 1, 1),
        (g, taps, saved, exponents, unit_exponents, mean, invstd, weight, sums, dy, images, channels, height, width)
        + (unit_windows, saved_shift(plan), float(images * height * width)),
    )


@functools.lru_cache(maxsize=1024)
def obstacle(p: Plan, groups: int) -> str | None:
    """Why these kernels do not take what follows the convolution, or None if they do."""
    macros = dict(p.macros)
    plane = (macros["OUT_H"] // 2) * (macros["OUT_W"] // 2)
    values = macros["OUT_CHANNELS"] // groups * plane
    if not plane:
        return "nothing is left after pooling"
    if values * 8 > _GROUP_BYTES:
        return f"a group has {values} pooled values, over {_GROUP_BYTES // 8}, which shared memory holds"
    return None


def saved_shift(p: Plan) -> int:
    """SAVED_SHIFT: both operands are below 2^15, and so many products must stay below 2^15 in sum."""
    macros = dict(p.macros)
    terms = macros["IN_CHANNELS"] * macros["KERNEL_H"] * macros["KERNEL_W"]
    return 15 + (terms - 1).bit_length()


def variants():
    """Every mode for the first forward of each type of `sample_plans`; training with a backward for the others."""
    found = set()
    for p in sample_plans():
        macros = dict(p.macros)
        if dict(p.pack_macros)["FLIP"]:
            continue
        modes = ((True, True), (True, False), (False, False), (False, True))
        for mode in modes[:1] if (macros["scalar_t"], macros["SPLIT"]) in found else modes:
            yield Variant("conv_bn_pool.cu", _pool_macros(p, *mode))
        found.add((macros["scalar_t"], macros["SPLIT"]))
    for name, saved in (("float", "half_t"), ("float", "float"), ("half_t", "half_t"), ("bf16_t", "half_t")):
        yield Variant("pooled_tail.cu", _tail_defines(name, saved))


def _pool_macros(p: Plan, training, keep):
    return (
        *p.macros,
        ("param_t", dict(p.macros)["scalar_t"]),
        ("saved_t", _saved_type(p)),
        ("STATISTICS", int(training)),
        ("SAVE", int(keep)),
        ("SAVED_SHIFT", saved_shift(p)),
    )


def _saved_type(p: Plan) -> str:
    return "half_t" if dict(p.macros)["SPLIT"] == 1 else "float"


def _tail_macros(p: Plan, name):
    return _tail_defines(name, _saved_type(p))


def _tail_defines(name, saved):
    return (("scalar_t", name), ("acc_t", accumulator(name)), ("param_t", name), ("saved_t", saved))
