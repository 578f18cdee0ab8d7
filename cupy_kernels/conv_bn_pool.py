"""ConvTranspose2d -> BatchNorm2d -> activation -> MaxPool2d(2, 2) -> GroupNorm, pooled in the convolution's epilogue.

Shapes: x [N, K, H, W], w [K, M, KH, KW], the convolution's output [N, M, OH, OW], pooled and out [N, M, OH/2, OW/2].
The convolution is one that `conv_transpose_mma.plan` takes. All tensors have one type: float32,
float16, or int16 that holds bfloat16; statistics and what is saved have the types that `kept_arrays` says. With
`typed`, x may have 16 bits where all others are float32. With a plan for channels_last, x, out, dout and dx are
[N, H, W, C].

activation, parameter: one of activation.cuh's, such as "leaky_relu", and the number that it takes, if it takes one.
"""

import functools
import itertools
import re

import numpy as np

from . import conv_wgmma
from .channel_sum import channel_sum, channel_sum_workspace_size
from .common import THREADS, accumulator, ceil_div
from .conv_transpose_mma import Plan, conv_transpose_mma, launch_units, pack_weight, sample_plans
from .conv_wgrad_mma import Plan as WgradPlan
from .conv_wgrad_mma import conv_wgrad_mma
from .errors import UnsupportedError
from .fp16_tiles import chunk_channels, pack_fp16, packed_shape, packing_macros, scale_fp16
from .launch import launch
from .source import Kernel, Variant, text, until_overridden

# Warps of the tail's blocks: few, each with more values, where registers hold these (RESIDENT of pooled_tail.cuh).
_FEW_WARPS, _MOST_WARPS, _RESIDENT = 8, 16, 24
_PART = 320  # values of a warp at most: 10 a lane
# Images whose dy is summed up at its borders together, at least: the L2 cache holds what they read. Most such shares.
_BORDER_IMAGES, _MOST_BORDER_SHARES = 8, 64
_MOST_JOBS = 2048  # of pooled_tail.cuh, for which pooled_backward has 24 bytes of static shared memory each
# Channels, groups, image size, type, split, whether pooled sums have 16 bits, and whether tensors are channels_last:
# the reference shape, groups that registers do not hold, odd sizes.
_TAIL_SAMPLES = (
    (128, 8, 34, "float", 1, False, False),
    (128, 8, 34, "float", 2, False, False),
    *(
        (128, 8, 34, dtype, 1, True, last)
        for dtype, last in itertools.product(("float", "half_t", "bf16_t"), (False, True))
    ),
    (80, 1, 66, "float", 1, False, False),
    (80, 1, 66, "half_t", 1, True, True),
    (48, 3, 71, "float", 2, False, False),
)


def typed(p: Plan, parameters: str, half: bool) -> Plan:
    """The plan for weights, biases, running statistics and `out` of another type than x's: the kernels' name of it.

    half: whether the pooled sums are kept as float16 under scales, with split 1: as exact as PyTorch's convolution of
    16-bit tensors or under autocast, and half the memory.
    """
    types = ("param_t", parameters), ("pooled_t", "half_t" if half else "float")
    return p.of_weights(parameters)._replace(macros=(*p.macros, *types))


def kept_arrays(p: Plan, x_shape, groups: int, keep: bool) -> dict[str, tuple[tuple, type]]:
    """Shape and dtype of the arrays that the forward writes besides `out`. keep: whether a backward follows.

    Then `saved`, the largest, is among them: the convolution's output, as float16 under scales with split 1, as float32
    with split 2. `pooled` is float16 under scales, too, where `typed` says so.
    """
    macros = dict(p.macros)
    images, channels = x_shape[0], macros["OUT_CHANNELS"]
    pooled = (images, channels, dict(p.planes)["PLANE_STRIDE"])
    half = _types(macros)["pooled_t"] == "half_t"
    arrays = {
        "exponents": ((p.rows,), np.int32),
        "pooled": (pooled, np.float16 if half else np.float32),
        "mean": ((channels,), np.float32),
        "invstd": ((channels,), np.float32),
        "group_mean": ((images * groups,), np.float32),
        "group_invstd": ((images * groups,), np.float32),
    }
    if keep:
        arrays["argmax"] = (pooled, np.uint8)
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

    scratch(shape, dtype): makes a workspace. conv_bias, weight, bias, group_weight, group_bias: may be None.
    running_mean, running_var: updated in training, where they may be None. num_batches_tracked: one int64, which grows
    by 1 in training, or None. kept: {name: array} of `kept_arrays`, written.
    """
    moments, running, affine = (kept["mean"], kept["invstd"]), (running_mean, running_var), (weight, bias)
    tail = {"plan": plan, "groups": groups, "activation": activation, "training": training}
    partials = pooled_sums(scratch, x, w, weight, kept, plan=plan, training=training)
    if training:
        batch_statistics(partials, conv_bias, *running, num_batches_tracked, *moments, momentum, eps, **tail)
    given = (conv_bias, *running, *affine, group_weight, group_bias, out, kept, eps)
    pooled_output(*given, **tail, group_eps=group_eps, parameter=parameter)


def pooled_sums(scratch, x, w, weight, kept, *, plan: Plan, training: bool):
    """The convolution and the pooling, into `kept`. Returns, in training, (3, C, units): counts, means and squares."""
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
    """mean, without the convolution's bias, and invstd, both written, from what `pooled_sums` returns.

    The running statistics, updated, and num_batches_tracked may be None. tail: plan, groups, activation, training.
    """
    channels, units = partials.shape[1:]
    args = (partials, conv_bias, running_mean, running_var, num_batches_tracked, mean, invstd, momentum, eps)
    kernel = Kernel("pooled_tail.cu", "conv_bn_statistics", _forward_macros(**tail))
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
    """out, and what `kept` has of group norm, from the pooled sums and statistics. tail: as in `batch_statistics`."""
    macros = _forward_macros(**tail)
    launch(
        Kernel("pooled_tail.cu", "pooled_forward", macros),
        (kept["group_mean"].size, 1, 1),
        (_tail_threads(macros), 1, 1),
        (kept["pooled"], kept["exponents"], kept.get("unit_exponents"), kept["mean"], kept["invstd"], conv_bias)
        + (running_mean, running_var, weight, bias, group_weight, group_bias, out)
        + (kept["group_mean"], kept["group_invstd"], eps, group_eps, parameter),
    )


def gradient_arrays(p: Plan, images: int, packed: bool, borders: bool) -> dict[str, tuple[tuple, type]]:
    """Shape and dtype of the arrays that `tail_gradients` and `output_gradient` write, for `weight_gradient` and dgrad.

    packed: whether dy is to be among them. borders: whether what `weight_gradient` needs with a centred x is.
    """
    macros = dict(p.macros)
    channels = macros["OUT_CHANNELS"]
    arrays = {
        "g": ((images, channels, macros["OUT_H"] // 2, macros["OUT_W"] // 2), np.float32),
        "partials": ((5, images, channels), np.float32),
        "sums": ((2, channels), np.float32),
        "dy_exponents": ((channels,), np.int32),
    }
    if packed:
        arrays["dy_packed"] = (packed_output_shape(p, images), np.float16)
    if borders:
        shares = ceil_div(images, _images_together(images))
        arrays["borders"] = ((shares, macros["KERNEL_H"] * macros["KERNEL_W"], channels), np.float32)
    return arrays


def tail_gradients(
    dout,
    weight,
    bias,
    group_weight,
    dconv_bias,
    dweight,
    dbias,
    dgroup_weight,
    dgroup_bias,
    kept,
    made,
    *,
    plan: Plan,
    groups: int,
    training: bool,
    activation: str,
    parameter: float,
) -> None:
    """Gradients of all parameters but the convolution's weight, written where not None; what `output_gradient` reads.

    kept: the forward's. made: {name: array} of `gradient_arrays`, written.
    """
    pooled, mean, invstd = kept["pooled"], kept["mean"], kept["invstd"]
    scales = kept["exponents"], kept["unit_exponents"]
    g, partials, sums, dy_exponents = made["g"], made["partials"], made["sums"], made["dy_exponents"]
    statistics = (kept["group_mean"], kept["group_invstd"])
    options = {"plan": plan, "groups": groups, "activation": activation}
    values = (dout, pooled, *scales, mean, invstd, weight, bias, group_weight, *statistics, g, partials)
    pooled_gradients(*values, **options, parameter=parameter)
    gradients = (dweight, dbias, dgroup_weight, dgroup_bias, dconv_bias)
    parameter_gradients(partials, mean, invstd, weight, sums, dy_exponents, *gradients, **options, training=training)


def output_gradient(weight, dy, kept, made, *, training: bool, **options) -> None:
    """dy, the gradient of the convolution's output, from what `tail_gradients` has made.

    As packed tiles where `made` has them; and to dy, [N, M, OH, OW], where not None, for the general convolution
    kernels. options: plan, groups, activation.
    """
    given = (made["g"], *map(kept.get, ("argmax", "saved", "exponents", "unit_exponents", "mean", "invstd")), weight)
    given += (made["sums"] if training else None,)
    if "dy_packed" in made:
        conv_output_gradient_packed(*given, made["dy_exponents"], made["dy_packed"], made.get("borders"), **options)
    if dy is not None:
        conv_output_gradient(*given, dy, **options)


def weight_gradient(scratch, x, kept, made, dw, *, plan: WgradPlan, centred: bool) -> None:
    """dw, the gradient of w, from x and dy. scratch, kept, made: as in the forward and in `tail_gradients`.

    centred: x, float32, less its first image's means. With statistics of the batch dy sums to 0, so that this changes
    nothing but the error (benchmarks/NOTES.md says why).
    """
    unit_exponents, sums = kept["unit_exponents"], None
    partial = scratch(plan.partial_size, np.float32)
    if ("CHANNELS_LAST", 1) in plan.macros:
        x_packed, x_exponents = x, None
        if x.dtype != np.float16:
            x_packed, x_exponents = scratch(x.shape, np.float16), unit_exponents
            scale_fp16(x, x_exponents, x_packed)
        conv_wgrad_mma(plan, x_packed, x_exponents, None, made["dy_packed"], made["dy_exponents"], None, partial, dw)
        return
    if centred:
        sums = scratch((x.shape[1],), x.dtype)
        channel_sum(x[:1], sums, scratch(channel_sum_workspace_size(x[:1]), np.float64))
    x_packed = scratch(packed_shape(x.shape, plan.split), np.float16)
    pack_fp16(x, unit_exponents, sums, x_packed, plan.split)
    dy = made["dy_packed"], made["dy_exponents"], made.get("borders")
    conv_wgrad_mma(plan, x_packed, unit_exponents, sums, *dy, partial, dw)


def input_gradient(scratch, w, made, dx, *, plan: Plan) -> None:
    """dx, the gradient of x, from dy. plan: one for dgrad, of packed tiles. The rest as in `weight_gradient`."""
    workspaces = scratch(plan.packed_size, np.float16), scratch(plan.rows, np.int32)
    conv_transpose_mma(plan, made["dy_packed"], w, None, dx, *workspaces, made["dy_exponents"])


def pooled_gradients(
    dout,
    pooled,
    exponents,
    unit_exponents,
    mean,
    invstd,
    weight,
    bias,
    group_weight,
    group_mean,
    group_invstd,
    g,
    partials,
    *,
    parameter,
    **tail,
) -> None:
    """g, the gradient at batch norm's output of the pooled values, and partial sums for `parameter_gradients`.

    dout: like out. group_mean, group_invstd: [N * groups]. g, partials: as `gradient_arrays` has them, written.
    tail: plan, groups, activation; the same in the functions that follow.
    """
    images, macros = pooled.shape[0], _backward_macros(**tail)
    launch(
        Kernel("pooled_tail_backward.cu", "pooled_backward", macros),
        (group_mean.size, 1, 1),
        (_tail_threads(macros), 1, 1),
        (dout, pooled, exponents, unit_exponents, mean, invstd, weight, bias, group_weight)
        + (group_mean, group_invstd, g, partials, images, parameter),
    )


def parameter_gradients(
    partials, mean, invstd, weight, sums, dy_exponents, *gradients, plan: Plan, training: bool, **tail
) -> None:
    """Gradients of all parameters but the convolution's weight, and what the gradient of its output is made of.

    sums, dy_exponents: as `gradient_arrays` has them, written. gradients: of weight, bias, group_weight,
    group_bias and conv_bias, written where not None. training: whether the batch's own statistics were applied.
    """
    images, channels = partials.shape[1:]
    launch(
        Kernel("pooled_tail_backward.cu", "pooled_parameter_gradients", _backward_macros(plan, **tail)),
        (channels, 1, 1),
        (THREADS, 1, 1),
        (partials, mean, invstd, weight, sums, dy_exponents, *gradients, images, _count(plan, images), training),
    )


def conv_output_gradient(
    g, argmax, saved, exponents, unit_exponents, mean, invstd, weight, sums, dy, *, plan: Plan, **tail
) -> None:
    """dy, the gradient of the convolution's output [N, M, OH, OW], for the general convolution kernels.

    sums: those of `parameter_gradients`; None where the statistics were running ones. dy is written.
    """
    images, channels = g.shape[:2]
    launch(
        Kernel("pooled_tail_backward.cu", "conv_output_gradient", _backward_macros(plan, **tail)),
        (images * channels, ceil_div(_windows(dict(plan.macros)), THREADS), 1),
        (THREADS, 1, 1),
        (g, argmax, saved, exponents, unit_exponents, mean, invstd, weight, sums, dy) + (_count(plan, images),),
    )


def conv_output_gradient_packed(
    g, argmax, saved, exponents, unit_exponents, mean, invstd, weight, sums, dy_exponents, dy, borders, *, plan, **tail
) -> None:
    """The same as packed fp16 tiles, for the tensor-core kernels: dy times 2^e, where e is the least of dy_exponents.

    dy_exponents: those of `parameter_gradients`. dy: float16, of `packed_output_shape`, written.
    borders: None, or as `gradient_arrays` has it, written: sums of dy times 2^e over the pixels that have no
    partner in x for a tap, for shares of the images, as `conv_wgrad_mma` takes them.
    """
    images = g.shape[0]
    together = _images_together(images)
    macros = _backward_macros(plan, **tail)
    sizes = dict(macros)
    blocks = together * dy.shape[1] * sizes["TILES"]
    blocks += 0 if borders is None else sizes["BORDER_BLOCKS"]
    launch(
        Kernel("pooled_tail_backward.cu", "conv_output_gradient_packed", macros),
        (ceil_div(images, together) * blocks, 1, 1),
        (THREADS, 1, 1),
        (g, argmax, saved, exponents, unit_exponents, mean, invstd, weight, sums, dy_exponents, dy, borders)
        + (_count(plan, images), images, together),
    )


def packed_output_shape(p: Plan, images: int) -> tuple[int, int, int, int]:
    """Of the packed tiles of the convolution's output, see `fp16_tiles`."""
    macros = dict(p.macros)
    return packed_shape((images, macros["OUT_CHANNELS"], macros["OUT_H"], macros["OUT_W"]), macros["SPLIT"])


def check_supported(p: Plan, groups: int) -> None:
    """UnsupportedError if these kernels do not take what follows the convolution."""
    macros = dict(p.macros)
    if min(macros["OUT_H"], macros["OUT_W"]) < 2:
        raise UnsupportedError("nothing is left after pooling")
    if macros["OUT_CHANNELS"] // groups * _parts(macros) > _MOST_JOBS:
        raise UnsupportedError(
            f"a group has {macros['OUT_CHANNELS'] // groups} channels of {macros['OUT_H']} x {macros['OUT_W']}"
        )


@until_overridden
def activations() -> tuple[str, ...]:
    """The structs of activation.cuh."""
    return tuple(re.findall(r"^struct (\w+)", text("activation.cuh"), re.MULTILINE))


def struct_of(activation: str) -> str:
    """The activation's struct. ValueError if it has none."""
    found = {name.lower(): name for name in activations()}.get(activation.replace("_", "").lower())
    if found is None:
        raise ValueError(
            f"activation must be one of those in activation.cuh, {', '.join(activations())}; received {activation!r}"
        )
    return found


def saved_shift(p: Plan) -> int:
    """SAVED_SHIFT: both operands are below 2^15, and so many products must stay below 2^15 in sum."""
    macros = dict(p.macros)
    terms = macros["IN_CHANNELS"] * macros["KERNEL_H"] * macros["KERNEL_W"]
    return 15 + (terms - 1).bit_length()


def variants():
    """Every mode for the first forward of each type of `sample_plans`; training with a backward for the others."""
    found = set()
    for sample in sample_plans():
        if dict(sample.pack_macros)["FLIP"]:
            continue
        dtype, split = (dict(sample.macros)[name] for name in ("scalar_t", "SPLIT"))
        for half in sorted({dtype != "float", split == 1}):
            p = typed(sample, dtype, half)
            macros = dict(p.macros)
            kind = (*(macros[name] for name in ("scalar_t", "pooled_t", "SPLIT", "WGMMA", "CHANNELS_LAST")),)
            modes = ((True, True), (True, False), (False, False), (False, True))
            for mode in modes[:1] if kind in found else modes:
                yield _pool_kernel(p, *mode).variant
            found.add(kind)
    for channels, groups, size, dtype, split, half, last in _TAIL_SAMPLES:
        sample = {"scalar_t": dtype, "SPLIT": split, "OUT_CHANNELS": channels, "OUT_H": size, "OUT_W": size}
        sample.update(KERNEL_H=5, KERNEL_W=5, PAD_H=1, PAD_W=1, CHANNELS_LAST=int(last))
        sample.update(param_t=dtype, pooled_t="half_t" if half else "float")
        pitch = ceil_div(size, 2)
        for wgmma in (0, 1):
            sample["AS_IT_IS"] = int(wgmma and last and dtype == "half_t")
            unit = 8 * pitch if wgmma else 64
            units, stride = ceil_div(pitch**2, unit), ceil_div(unit, 16) * 16
            planes = conv_wgmma.planes(wgmma, pitch, units, unit, stride, units * stride)
            for activation in activations():
                tail = _tail_defines(sample, groups, activation, planes.items(), 26)
                if (dtype, split) != ("float", 2):
                    for statistics in (1, 0):
                        yield Variant("pooled_tail.cu", (*tail, ("STATISTICS", statistics)))
                yield Variant("pooled_tail_backward.cu", (*tail, *_backward_defines(sample)))


def _types(macros) -> dict:
    """param_t and pooled_t; of a plan that is not `typed`, x's type and float."""
    return {"param_t": macros.get("param_t", macros["scalar_t"]), "pooled_t": macros.get("pooled_t", "float")}


def _pool_kernel(p: Plan, training, keep):
    macros = dict(p.macros)
    if training:  # for each part's channels a mean and a sum of squares, behind what the convolution needs
        macros["SHARED_BYTES"] += macros["WARPS_N"] * macros["TILE_M"] * 8
    macros.update(pooled_t=_types(macros)["pooled_t"], saved_t=_saved_type(macros["SPLIT"]))
    macros.pop("param_t", None)
    macros.update(STATISTICS=int(training), SAVE=int(keep), SAVED_SHIFT=saved_shift(p))
    return Kernel("conv_bn_pool.cu", "conv_bn_pool", tuple(macros.items()), conv_wgmma.architecture(p.macros))


def _saved_type(split: int) -> str:
    return "half_t" if split == 1 else "float"


@functools.lru_cache(maxsize=1024)
def _backward_macros(plan: Plan, groups: int, activation: str):
    return *_tail_macros(plan, groups, activation), *_backward_defines(dict(plan.macros))


def _forward_macros(plan: Plan, groups: int, activation: str, training: bool):
    return *_tail_macros(plan, groups, activation), ("STATISTICS", int(training))


def _tail_macros(plan: Plan, groups: int, activation: str):
    return _tail_defines(dict(plan.macros), groups, activation, plan.planes, saved_shift(plan))


def _tail_defines(macros, groups, activation, planes, shift):
    types, name = _types(macros), _types(macros)["param_t"]
    types = (("scalar_t", name), ("acc_t", accumulator(name)), *types.items())
    types += (("ACTIVATION", struct_of(activation)), ("CHANNELS_LAST", macros["CHANNELS_LAST"]), ("SAVED_SHIFT", shift))
    types += (("AS_IT_IS", macros.get("AS_IT_IS", 0)),)
    sizes = tuple((size, macros[size]) for size in ("OUT_CHANNELS", "OUT_H", "OUT_W"))
    parts = _parts(macros)
    jobs, plane = macros["OUT_CHANNELS"] // groups * parts, (macros["OUT_H"] // 2) * (macros["OUT_W"] // 2)
    resident = ceil_div(jobs, _FEW_WARPS) * ceil_div(plane, parts * 32) <= _RESIDENT
    warps = min(jobs, _FEW_WARPS if resident else _MOST_WARPS)
    blocks = (("GROUPS", groups), ("PARTS", parts), ("WARPS", warps), ("THREADS", THREADS))
    return (*types, *sizes, *planes, *blocks)


def _backward_defines(macros):
    split = macros["SPLIT"]
    saved = ("saved_t", _saved_type(split))
    convolution = ((name, macros[name]) for name in ("KERNEL_H", "KERNEL_W", "PAD_H", "PAD_W"))
    # Of conv_output_gradient_packed: a thread has 8 channels of a window; 128 threads sum up a channel's borders.
    tile = THREADS * 8 // chunk_channels(split)
    blocks = {
        "TILE": tile,
        "TILES": ceil_div(_windows(macros), tile),
        "BORDER_BLOCKS": macros["OUT_CHANNELS"] * 128 // THREADS,
    }
    return (saved, *packing_macros(split).items(), *convolution, *blocks.items())


def _parts(macros) -> int:
    """Into how many parts a pooled plane is cut; a warp takes one at a time."""
    return ceil_div((macros["OUT_H"] // 2) * (macros["OUT_W"] // 2), _PART)


def _tail_threads(macros):
    return 32 * dict(macros)["WARPS"]


def pooled_places(p: Plan) -> np.ndarray:
    """Where in a plane of `pooled` the values [OH/2, OW/2] lie, see pooled_planes.cuh; the others are of no use."""
    macros = dict(p.macros)
    row, column = np.mgrid[: macros["OUT_H"] // 2, : macros["OUT_W"] // 2]
    unit, at = np.divmod(row * macros["WINDOW_PITCH"] + column, macros["UNIT_WINDOWS"])
    if macros["WGMMA"]:
        at = at // 16 * 16 + at % 4 * 4 + at // 4 % 4
    return unit * macros["UNIT_STRIDE"] + at


def _windows(macros) -> int:
    """2x2 windows of the convolution's output, those that an odd edge cuts too."""
    return ceil_div(macros["OUT_H"], 2) * ceil_div(macros["OUT_W"], 2)


def _images_together(images: int) -> int:
    return min(images, max(_BORDER_IMAGES, ceil_div(images, _MOST_BORDER_SHARES)))


def _count(p: Plan, images: int) -> float:
    macros = dict(p.macros)
    return float(images * macros["OUT_H"] * macros["OUT_W"])
