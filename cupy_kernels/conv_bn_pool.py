"""ConvTranspose2d -> BatchNorm2d -> activation -> MaxPool2d(2, 2) -> GroupNorm, pooled in the convolution's epilogue.

Shapes: x [N, K, H, W], w [K, M, KH, KW], the convolution's output [N, M, OH, OW], pooled and out [N, M, OH/2, OW/2].
    `conv_transpose_mma.plan` must support the convolution. All tensors have one type: float32, float16, or int16 that
    holds bfloat16. Statistics and saved arrays have the types in `kept_arrays`. With `typed`, x may have 16 bits and
    all others be float32. With a plan for channels_last, x, out, dout and dx are [N, H, W, C].

activation, parameter: one of activation.cuh's, such as "leaky_relu", and its parameter, if it has one.
"""

import numpy as np

from . import conv_wgmma
from .common import THREADS
from .conv_transpose_mma import Plan, launch_units, pack_weight, sample_plans
from .errors import UnsupportedError
from .launch import launch
from .pooled_tail import forward_macros, parts_of_plane, saved_shift, saved_type, tail_threads, types_of
from .source import Kernel

_MOST_JOBS = 2048  # of pooled_tail.cuh, for which pooled_backward has 24 bytes of static shared memory each


def typed(p: Plan, parameters: str, half: bool) -> Plan:
    """The plan for weights, biases, running statistics and `out` of another type than x's, given by the kernels' name.

    half: whether the pooled sums are kept as scaled float16, with split 1. This is as exact as PyTorch's convolution of
        16-bit tensors or under autocast, and takes half the memory.
    """
    types = ("param_t", parameters), ("pooled_t", "half_t" if half else "float")
    found = p.of_weights(parameters)
    return found._replace(macros=(*found.macros, *types))


def kept_arrays(p: Plan, x_shape, groups: int, keep: bool) -> dict[str, tuple[tuple, type]]:
    """Shape and dtype of the arrays that the forward writes besides `out`. keep: whether a backward follows.

    With `keep` there is `saved`, the largest one: the convolution's output, as scaled float16 with split 1, as float32
    with split 2. `pooled` is scaled float16 as well if `typed` says so.
    """
    macros = dict(p.macros)
    images, channels = x_shape[0], macros["OUT_CHANNELS"]
    pooled = (images, channels, dict(p.planes)["PLANE_STRIDE"])
    half = types_of(macros)["pooled_t"] == "half_t"
    arrays = {
        "exponents": ((p.rows,), np.int32),
        "pooled": (pooled, np.float16 if half else np.float32),
        "mean": ((channels,), np.float32),
        "invstd": ((channels,), np.float32),
        "group_mean": ((images * groups,), np.float32),
        "group_invstd": ((images * groups,), np.float32),
    }
    if keep:
        arrays["argmax"] = ((images, channels, pooled[2] // 4), np.uint8)  # two bits for each window
        arrays["saved"] = ((*pooled, 4), np.float16 if macros["SPLIT"] == 1 else np.float32)
    if keep or half:
        arrays["unit_exponents"] = ((images * p.units,), np.int32)
    return arrays


def conv_bn_pool_forward(
    scratch,
    x,
    w,
    conv_bias,
    running_mean,
    running_var,
    num_batches_tracked,
    weight,
    bias,
    group_weight,
    group_bias,
    out,
    kept,
    *,
    plan: Plan,
    training: bool,
    momentum: float,
    eps: float,
    groups: int,
    group_eps: float,
    activation: str,
    parameter: float,
) -> None:
    """out = group_norm(max_pool2d(activation(batch_norm(conv_transpose2d(x, w, conv_bias))), 2)).

    scratch: scratch(shape, dtype) makes a workspace.
    conv_bias, weight, bias, group_weight, group_bias: may be None.
    running_mean, running_var: updated in training, where they may be None.
    num_batches_tracked: one int64, incremented by 1 in training, or None.
    kept: {name: array} of `kept_arrays`, written.
    """
    moments, running, affine = (kept["mean"], kept["invstd"]), (running_mean, running_var), (weight, bias)
    tail = {"plan": plan, "groups": groups, "activation": activation, "training": training}
    partials = pooled_sums(scratch, x, w, weight, kept, plan=plan, training=training)
    if training:
        batch_statistics(partials, conv_bias, *running, num_batches_tracked, *moments, momentum, eps, **tail)
    given = (conv_bias, *running, *affine, group_weight, group_bias, out, kept, eps)
    pooled_output(*given, **tail, group_eps=group_eps, parameter=parameter)


def pooled_sums(scratch, x, w, weight, kept, *, plan: Plan, training: bool):
    """The convolution and the pooling: writes `kept`. In training, returns (3, C, units): counts, means, squares."""
    images, channels = x.shape[0], dict(plan.macros)["OUT_CHANNELS"]
    packed = scratch(plan.packed_size, np.float16)
    partials = scratch((3, channels, images * plan.units), np.float32) if training else None
    signs = weight
    if weight is not None and weight.dtype != np.float32:
        signs = scratch(plan.rows, np.float32)
    pack_weight(plan, w, packed, kept["exponents"], weight, None if signs is weight else signs)
    launch_units(
        plan,
        _pool_kernel(plan, training, "saved" in kept),
        x,
        images,
        (x, packed, kept["exponents"], signs, kept["pooled"], partials)
        + (kept.get("argmax"), kept.get("saved"), kept.get("unit_exponents")),
    )
    return partials


def batch_statistics(
    partials, conv_bias, running_mean, running_var, num_batches_tracked, mean, invstd, momentum, eps, **tail
) -> None:
    """Writes mean, without the convolution's bias, and invstd, from the result of `pooled_sums`.

    running_mean, running_var, num_batches_tracked: updated; may be None.
    tail: plan, groups, activation, training.
    """
    channels, units = partials.shape[1:]
    args = (partials, conv_bias, running_mean, running_var, num_batches_tracked, mean, invstd, momentum, eps)
    kernel = Kernel("pooled_tail.cu", "conv_bn_statistics", forward_macros(**tail))
    launch(kernel, (channels, 1, 1), (THREADS, 1, 1), (*args, channels, units))


def pooled_output(
    conv_bias,
    running_mean,
    running_var,
    weight,
    bias,
    group_weight,
    group_bias,
    out,
    kept,
    eps,
    *,
    group_eps,
    parameter,
    **tail,
) -> None:
    """Writes out, and group norm's part of `kept`, from pooled sums and statistics. tail: as in `batch_statistics`."""
    macros = forward_macros(**tail)
    launch(
        Kernel("pooled_tail.cu", "pooled_forward", macros),
        (kept["group_mean"].size, 1, 1),
        (tail_threads(macros), 1, 1),
        (kept["pooled"], kept["exponents"], kept.get("unit_exponents"), kept["mean"], kept["invstd"], conv_bias)
        + (running_mean, running_var, weight, bias, group_weight, group_bias, out)
        + (kept["group_mean"], kept["group_invstd"], eps, group_eps, parameter),
    )


def check_supported(p: Plan, groups: int) -> None:
    """Raises UnsupportedError if these kernels do not support what follows the convolution."""
    macros = dict(p.macros)
    if min(macros["OUT_H"], macros["OUT_W"]) < 2:
        raise UnsupportedError("nothing is left after pooling")
    if macros["OUT_CHANNELS"] // groups * parts_of_plane(macros) > _MOST_JOBS:
        raise UnsupportedError(
            f"a group has {macros['OUT_CHANNELS'] // groups} channels of {macros['OUT_H']} x {macros['OUT_W']}"
        )


def _pool_kernel(p: Plan, training, keep):
    macros = dict(p.macros)
    if training:  # for each part's channels a mean and a sum of squares, behind what the convolution needs
        macros["SHARED_BYTES"] += macros["WARPS_N"] * macros["TILE_M"] * 8
    macros.update(pooled_t=types_of(macros)["pooled_t"], saved_t=saved_type(macros["SPLIT"]))
    macros.pop("param_t", None)
    macros.update(STATISTICS=int(training), SAVE=int(keep), SAVED_SHIFT=saved_shift(p))
    return Kernel("conv_bn_pool.cu", "conv_bn_pool", tuple(macros.items()), conv_wgmma.architecture(p.macros))


def pooled_places(p: Plan) -> np.ndarray:
    """The places in a plane of `pooled` of the values [OH/2, OW/2], see pooled_planes.cuh. Other places are unused."""
    macros = dict(p.macros)
    row, column = np.mgrid[: macros["OUT_H"] // 2, : macros["OUT_W"] // 2]
    unit, at = np.divmod(row * macros["WINDOW_PITCH"] + column, macros["UNIT_WINDOWS"])
    if macros["WGMMA"]:
        at = at // 16 * 16 + at % 4 * 4 + at // 4 % 4
    return unit * macros["UNIT_STRIDE"] + at


def variants():
    """Every mode for the first forward of each type of `sample_plans`; training with a backward for the others."""
    kinds, found = set(), {}
    for sample in sample_plans():
        if dict(sample.pack_macros)["FLIP"]:
            continue
        dtype, split = (dict(sample.macros)[name] for name in ("scalar_t", "SPLIT"))
        # Parameters of x's type; under autocast float32 ones, and pooled sums of 16 bits.
        for parameters, half in sorted({(dtype, dtype != "float"), ("float", split == 1)}):
            p = typed(sample, parameters, half)
            macros = dict(p.macros)
            names = ("scalar_t", "pooled_t", "SPLIT", "WGMMA", "CHANNELS_LAST", "AS_IT_IS")
            kind = (*(macros[name] for name in names),)
            modes = ((True, True), (True, False), (False, False), (False, True))
            for mode in modes[:1] if kind in kinds else modes:
                found[_pool_kernel(p, *mode).variant] = None
            kinds.add(kind)
    yield from found
