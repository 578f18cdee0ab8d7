"""The part of `conv_bn_pool` after the convolution, over its pooled sums: macros and variants, see pooled_tail.cuh."""

import itertools
import re

from . import conv_wgmma
from .common import THREADS, accumulator, ceil_div
from .conv_transpose_mma import Plan
from .fp16_tiles import chunk_channels, packing_macros
from .source import Variant, text, until_overridden

# Warps of a block: few, each with more values, where registers hold these (RESIDENT of pooled_tail.cuh).
_FEW_WARPS, _MOST_WARPS, _RESIDENT = 8, 16, 24
_PART = 320  # values of a warp at most: 10 a lane
# Channels, groups, image size, type, split, whether pooled sums have 16 bits, and whether tensors are channels_last:
# the reference shape, groups that registers do not hold, odd sizes.
_SAMPLES = (
    (128, 8, 34, "float", 1, False, False),
    (128, 8, 34, "float", 2, False, False),
    *(
        (128, 8, 34, dtype, 1, True, last)
        for dtype, last in itertools.product(("float", "half_t", "bf16_t"), (False, True))
    ),
    (80, 1, 67, "float", 1, False, False),
    (80, 1, 66, "half_t", 1, True, True),
    (48, 3, 71, "float", 2, False, False),
)
SHAPE_MACROS = ("X_CHANNELS", "X_WIDTH")  # see `cupy_kernels.variants`


@until_overridden
def activations() -> dict[str, str]:
    """The functions of activation.cuh, and the structs that they are there: leaky_relu, LeakyReLU."""
    structs = re.findall(r"^struct (\w+)", text("activation.cuh"), re.MULTILINE)
    return {re.sub(r"(?<=[a-z])(?=[A-Z][a-z])", "_", struct).lower(): struct for struct in structs}


def struct_of(activation: str) -> str:
    """The activation's struct. Raises ValueError if there is none."""
    if activation not in tuple(activations()):
        raise ValueError(f"activation must be one of {', '.join(map(repr, activations()))}; received {activation!r}")
    return activations()[activation]


def saved_shift(p: Plan) -> int:
    """SAVED_SHIFT. Both operands are below 2^15, and the sum of this many products must stay below 2^15."""
    macros = dict(p.macros)
    terms = macros["IN_CHANNELS"] * macros["KERNEL_H"] * macros["KERNEL_W"]
    return 15 + (terms - 1).bit_length()


def types_of(macros) -> dict:
    """param_t and pooled_t. For a plan that is not `typed`, these are x's type and float."""
    return {"param_t": macros.get("param_t", macros["scalar_t"]), "pooled_t": macros.get("pooled_t", "float")}


def saved_type(split: int) -> str:
    return "half_t" if split == 1 else "float"


def forward_macros(plan: Plan, groups: int, activation: str, training: bool):
    return *tail_macros(plan, groups, activation), ("STATISTICS", int(training))


def tail_macros(plan: Plan, groups: int, activation: str):
    return tail_defines(dict(plan.macros), groups, activation, plan.planes, saved_shift(plan))


def tail_defines(macros, groups, activation, planes, shift):
    types, name = types_of(macros), types_of(macros)["param_t"]
    types = (("scalar_t", name), ("acc_t", accumulator(name)), *types.items())
    types += (("ACTIVATION", struct_of(activation)), ("CHANNELS_LAST", macros["CHANNELS_LAST"]), ("SAVED_SHIFT", shift))
    types += (("AS_IT_IS", macros.get("AS_IT_IS", 0)),)
    sizes = tuple((size, macros[size]) for size in ("OUT_CHANNELS", "OUT_H", "OUT_W"))
    parts = parts_of_plane(macros)
    jobs, plane = macros["OUT_CHANNELS"] // groups * parts, (macros["OUT_H"] // 2) * (macros["OUT_W"] // 2)
    resident = ceil_div(jobs, _FEW_WARPS) * ceil_div(plane, parts * 32) <= _RESIDENT
    warps = min(jobs, _FEW_WARPS if resident else _MOST_WARPS)
    blocks = (("GROUPS", groups), ("PARTS", parts), ("WARPS", warps), ("THREADS", THREADS))
    return (*types, *sizes, *planes, *blocks)


def parts_of_plane(macros) -> int:
    """The number of parts of a pooled plane. A warp takes one part at a time."""
    return ceil_div((macros["OUT_H"] // 2) * (macros["OUT_W"] // 2), _PART)


def tail_threads(macros):
    return 32 * dict(macros)["WARPS"]


def backward_defines(macros):
    split = macros["SPLIT"]
    saved = ("saved_t", saved_type(split))
    convolution = ((name, macros[name]) for name in ("KERNEL_H", "KERNEL_W", "PAD_H", "PAD_W"))
    # Of conv_output_gradient_packed: a thread has 8 channels of a window; 128 threads sum up a channel's borders.
    blocks = {
        "TILE": THREADS * 8 // chunk_channels(split),
        "BORDER_BLOCKS": macros["OUT_CHANNELS"] * 128 // THREADS,
        # channels_last: it does not pack x, and needs no variants for x's type.
        "x_t": types_of(macros)["param_t"] if macros["CHANNELS_LAST"] else macros["scalar_t"],
        "X_CHANNELS": macros["IN_CHANNELS"],
        "X_WIDTH": 1 if macros["IN_H"] * macros["IN_W"] % 4 else 4,
    }
    return (saved, *packing_macros(split).items(), *convolution, *blocks.items())


def windows_of(macros) -> int:
    """The number of 2x2 windows of the convolution's output, including those that an odd edge cuts."""
    return ceil_div(macros["OUT_H"], 2) * ceil_div(macros["OUT_W"], 2)


def variants():
    """Every variant of the tail's kernels, for sample shapes."""
    for channels, groups, size, dtype, split, half, last in _SAMPLES:
        sample = {"scalar_t": dtype, "SPLIT": split, "OUT_CHANNELS": channels, "OUT_H": size, "OUT_W": size}
        sample.update(KERNEL_H=5, KERNEL_W=5, PAD_H=1, PAD_W=1, CHANNELS_LAST=int(last))
        sample.update(IN_CHANNELS=64, IN_H=size - 2, IN_W=size - 2)
        sample.update(param_t=dtype, pooled_t="half_t" if half else "float")
        pitch = ceil_div(size, 2)
        for wgmma in (0, 1):
            sample["AS_IT_IS"] = int(wgmma and last and dtype == "half_t")
            unit = 8 * pitch if wgmma else 64
            units, stride = ceil_div(pitch**2, unit), ceil_div(unit, 16) * 16
            rest = ceil_div(pitch**2 - (units - 1) * unit, 16) * 16
            planes = conv_wgmma.planes(wgmma, pitch, units, unit, stride, (units - 1) * stride + rest)
            for activation in activations():
                tail = tail_defines(sample, groups, activation, planes.items(), 26)
                if (dtype, split) != ("float", 2):
                    for statistics in (1, 0):
                        yield Variant("pooled_tail.cu", (*tail, ("STATISTICS", statistics)))
                for x_t in ("float", "half_t", "bf16_t") if (dtype, half, last) == ("float", True, False) else (dtype,):
                    sizes = {**sample, "scalar_t": x_t}
                    yield Variant("pooled_tail_backward.cu", (*tail, *backward_defines(sizes)))
