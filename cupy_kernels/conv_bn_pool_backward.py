"""The backward of `conv_bn_pool`. Names and shapes are the same."""

import functools
import math

import numpy as np

from .channel_sum import channel_sum, channel_sum_workspace_size
from .common import THREADS, ceil_div
from .conv_transpose_mma import Plan, conv_transpose_mma
from .conv_wgrad_mma import Plan as WgradPlan
from .conv_wgrad_mma import conv_wgrad_mma
from .fp16_tiles import access_width, packed_shape, scale_fp16, tile_pixels
from .launch import launch
from .pooled_tail import backward_defines, tail_macros, tail_threads, windows_of
from .source import Kernel

# Images whose dy is summed up at its borders together, at least: the L2 cache holds what they read. Most such shares.
_BORDER_IMAGES, _MOST_BORDER_SHARES = 8, 64


def gradient_arrays(
    p: Plan, images: int, packed: bool = False, x_shape=None, centred: bool = False
) -> dict[str, tuple[tuple, type]]:
    """Shape and dtype of the arrays that `tail_gradients` and `output_gradient` write, for `weight_gradient` and dgrad.

    packed: whether dy is one of them.
    x_shape: None, or [N, K, H, W], if packed tiles of x are.
    centred: whether these tiles are of x less its first image's means, for a gradient of float32. With statistics of
        the batch, dy sums to 0. Then this changes only the rounding error (see benchmarks/NOTES.md).
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
    if centred:
        shares = ceil_div(images, _images_together(images))
        arrays["borders"] = ((shares, macros["KERNEL_H"] * macros["KERNEL_W"], channels), np.float32)
        arrays["x_sums"] = ((macros["IN_CHANNELS"],), np.float32)
    if x_shape is not None:
        arrays["x_packed"] = (packed_shape(x_shape, macros["SPLIT"]), np.float16)
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
    """Writes gradients of all parameters but the convolution's weight, where not None, and input of `output_gradient`.

    kept: from the forward.
    made: {name: array} of `gradient_arrays`, written.
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


def output_gradient(scratch, x, weight, dy, kept, made, *, training: bool, **options) -> None:
    """Computes dy, the gradient of the convolution's output, from what `tail_gradients` has written.

    It is written as packed tiles if `made` has them, and to dy, [N, M, OH, OW], if that is not None, for the general
    convolution kernels. x, the convolution's input, is packed, too, if `made` has its tiles.
    scratch: makes workspaces, as for the forward.
    options: plan, groups, activation.
    """
    given = (made["g"], *map(kept.get, ("argmax", "saved", "exponents", "unit_exponents", "mean", "invstd")), weight)
    given += (made["sums"] if training else None,)
    if "x_sums" in made:
        channel_sum(x[:1], made["x_sums"], scratch(channel_sum_workspace_size(x[:1]), np.float64))
    if "dy_packed" in made:
        packed = made["dy_exponents"], made["dy_packed"], made.get("borders")
        of_x = (x, made.get("x_sums"), made["x_packed"]) if "x_packed" in made else ()
        conv_output_gradient_packed(*given, *packed, *of_x, **options)
    if dy is not None:
        conv_output_gradient(*given, dy, **options)


def weight_gradient(scratch, x, kept, made, dw, *, plan: WgradPlan) -> None:
    """Writes dw, the gradient of w, from x and dy. scratch, kept, made: as for `output_gradient`, which comes first."""
    x_packed, x_exponents = made.get("x_packed", x), kept["unit_exponents"]
    if "x_packed" not in made:  # channels_last
        if x.dtype == np.float16:
            x_exponents = None
        else:
            x_packed = scratch(x.shape, np.float16)
            scale_fp16(x, x_exponents, x_packed)
    dy = made["dy_packed"], made["dy_exponents"], made.get("borders")
    partial = scratch(plan.partial_size, np.float32)
    conv_wgrad_mma(plan, x_packed, x_exponents, made.get("x_sums"), *dy, partial, dw)


def input_gradient(scratch, w, made, dx, *, plan: Plan) -> None:
    """Writes dx, the gradient of x, from dy. plan: for dgrad of packed tiles. The rest is as in `weight_gradient`."""
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
    """Writes g, the gradient of batch norm's output at the pooled values, and partial sums for `parameter_gradients`.

    dout: of out's shape.
    group_mean, group_invstd: [N * groups].
    g, partials: as in `gradient_arrays`, written.
    tail: plan, groups, activation; also in the functions that follow.
    """
    images, macros = pooled.shape[0], _backward_macros(**tail)
    launch(
        Kernel("pooled_tail_backward.cu", "pooled_backward", macros),
        (group_mean.size, 1, 1),
        (tail_threads(macros), 1, 1),
        (dout, pooled, exponents, unit_exponents, mean, invstd, weight, bias, group_weight)
        + (group_mean, group_invstd, g, partials, images, parameter),
    )


def parameter_gradients(
    partials, mean, invstd, weight, sums, dy_exponents, *gradients, plan: Plan, training: bool, **tail
) -> None:
    """Writes gradients of all parameters but the convolution's weight, and the values for its output's gradient.

    sums, dy_exponents: as in `gradient_arrays`, written.
    gradients: of weight, bias, group_weight, group_bias and conv_bias, written where not None.
    training: whether the batch's own statistics were applied.
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
    """Writes dy, the gradient of the convolution's output [N, M, OH, OW], for the general convolution kernels.

    sums: from `parameter_gradients`; None if running statistics were applied.
    """
    images, channels = g.shape[:2]
    launch(
        Kernel("pooled_tail_backward.cu", "conv_output_gradient", _backward_macros(plan, **tail)),
        (images * channels, ceil_div(windows_of(dict(plan.macros)), THREADS), 1),
        (THREADS, 1, 1),
        (g, argmax, saved, exponents, unit_exponents, mean, invstd, weight, sums, dy) + (_count(plan, images),),
    )


def conv_output_gradient_packed(
    g,
    argmax,
    saved,
    exponents,
    unit_exponents,
    mean,
    invstd,
    weight,
    sums,
    dy_exponents,
    dy,
    borders=None,
    x=None,
    x_sums=None,
    x_packed=None,
    *,
    plan,
    **tail,
) -> None:
    """The same as packed fp16 tiles, for tensor cores: dy times 2^e, where e is the smallest of dy_exponents.

    dy_exponents: from `parameter_gradients`.
    dy: float16, of `packed_output_shape`, written.
    borders: None, or as in `gradient_arrays`, written: sums of dy times 2^e over the pixels that have no partner in x
        for a tap, for parts of the images, as `conv_wgrad_mma` takes them.
    x, x_sums, x_packed: None, or the convolution's input and what `fp16_tiles.pack_fp16` takes, under the scale of
        unit_exponents. The same launch packs it, because dy alone does not keep the memory busy.
    """
    images = g.shape[0]
    together = _images_together(images)
    sizes = dict(_backward_macros(plan, **tail))
    blocks = dy.shape[1] * ceil_div(together * windows_of(sizes), sizes["TILE"])
    blocks += 0 if borders is None else sizes["BORDER_BLOCKS"]
    if x is not None:
        pixels = math.prod(x.shape[2:])
        sizes["X_WIDTH"] = access_width(x, pixels)
        blocks += x_packed.shape[1] * ceil_div(together * pixels, tile_pixels(sizes["SPLIT"], sizes["X_WIDTH"]))
    launch(
        Kernel("pooled_tail_backward.cu", "conv_output_gradient_packed", tuple(sizes.items())),
        (ceil_div(images, together) * blocks, 1, 1),
        (THREADS, 1, 1),
        (g, argmax, saved, exponents, unit_exponents, mean, invstd, weight, sums, dy_exponents, dy, borders)
        + (x, x_sums, x_packed, unit_exponents.size)
        + (_count(plan, images), images, together),
    )


def packed_output_shape(p: Plan, images: int) -> tuple[int, int, int, int]:
    """Shape of the packed tiles of the convolution's output, see `fp16_tiles`."""
    macros = dict(p.macros)
    return packed_shape((images, macros["OUT_CHANNELS"], macros["OUT_H"], macros["OUT_W"]), macros["SPLIT"])


@functools.lru_cache(maxsize=1024)
def _backward_macros(plan: Plan, groups: int, activation: str):
    return *tail_macros(plan, groups, activation), *backward_defines(dict(plan.macros))


def _images_together(images: int) -> int:
    return min(images, max(_BORDER_IMAGES, ceil_div(images, _MOST_BORDER_SHARES)))


def _count(p: Plan, images: int) -> float:
    macros = dict(p.macros)
    return float(images * macros["OUT_H"] * macros["OUT_W"])
