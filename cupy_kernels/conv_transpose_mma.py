"""2D transposed convolution on tensor cores: stride 1, dilation 1, one group, channels in multiples of 16.

Shapes are as in `conv_transpose`. Operands are fp16, scaled by powers of two. split 1 has TF32's precision, split 2
float32's.
"""

import functools
import itertools
from typing import NamedTuple

from . import conv_wgmma
from .common import MULTIPROCESSORS, address, ceil_div
from .conv_transpose import Geometry
from .errors import UnsupportedError
from .fp16_tiles import LINE_BYTES, chunk_channels, packing_macros
from .launch import launch
from .source import Kernel

MANY_IMAGES = 96  # from so many on, a block takes as much of an image as fits, to load x less often
_MANY_FOR_FP32_DGRAD = 64  # the same for dgrad with split 2. If x is not packed, it is faster by mma.sync then.
_MAX_IMAGE = 70  # height or width of x or dy: with a 7 x 7 kernel, dy of a 64 x 64 image is 70 x 70
_TILES = 4  # of four windows, that a warp has in a pass: a thread has no registers for more
_STAGES = (4, 2)  # preferred first
_RESERVED = 6 * 1024  # shared memory for the kernels' own small arrays and an epilogue
_PACK_THREADS = 512  # a block, of which there are few: that of a row reads it in few rounds
_BLOCK_RESERVED = 1024  # shared memory that each block takes on top of its own

# Macros of the tensor-core convolution, and of what follows it, that depend on the tensors' shapes and on the GPU's
# shared memory; see `variants`.
SHAPE_MACROS = (
    ("IN_CHANNELS", "OUT_CHANNELS", "IN_H", "IN_W", "OUT_H", "OUT_W", "KERNEL_H", "KERNEL_W", "TAPS", "PAD_H", "PAD_W")
    + ("WARPS_N", "TILE_M", "UNIT_PASSES", "BAND_ROWS", "RESIDENT", "STAGES", "SAVED_SHIFT")
    + ("GROUPS", "WARPS", "UNIT_WINDOWS", "WINDOW_PITCH", "UNIT_STRIDE", "PLANE_STRIDE", "TAPS_W")
    + ("UNIT_ROWS", "TILES", "LAST_TILES", "TILE_OC", "TILE_IC", "PARTS")
    + ("THREADS", "UNITS", "SHARED_BYTES", "PACKED_WIDTH", "GAP", "ALONG", "CHUNKS_HELD", "COLUMNS", "BORDER_BLOCKS")
)


class Plan(NamedTuple):
    """How blocks share a convolution. `macros` specialise the kernels."""

    macros: tuple
    pack_macros: tuple
    rows: int  # of the output's channels, padded to full tiles
    packed_size: int  # elements of the workspace `packed`, float16
    units: int
    tile_m: int
    threads: int
    shared_bytes: int
    planes: tuple
    multiprocessors: int

    def of_weights(self, dtype: str) -> "Plan":
        """The same plan for weights of another type than x's."""
        macros, pack_macros = dict(self.macros), {**dict(self.pack_macros), "scalar_t": dtype}
        if dtype != macros["scalar_t"]:
            macros["AS_IT_IS"] = pack_macros["AS_IT_IS"] = 0
        return self._replace(macros=tuple(macros.items()), pack_macros=tuple(pack_macros.items()))


@functools.lru_cache(maxsize=1024)
def plan(
    x_shape,
    w_shape,
    geometry: Geometry,
    split: int,
    dgrad: bool,
    dtype: str,
    shared_limit: int,
    wgmma: bool = False,
    channels_last: bool = False,
    multiprocessors: int = MULTIPROCESSORS,
    packed: bool = False,
) -> Plan:
    """The plan for a convolution of x [N, K, H, W]; for dgrad, x_shape is dy's.

    w_shape, geometry: of the forward.
    dtype: the kernels' name of the type.
    shared_limit: bytes of shared memory that a block may use.
    wgmma: whether GPU and NVRTC support it, see `conv_wgmma`. The plan uses it where it is possible and faster.
    channels_last: x and y, of 16-bit types, are [N, H, W, C].
    multiprocessors: the number that the GPU has. Few images are spread over them.
    packed: whether x is packed already, see `fp16_tiles`.

    Raises UnsupportedError for what the kernels do not support.
    """
    check_supported(x_shape, w_shape, geometry, dtype)
    channels_in, channels_out = w_shape[:2] if not dgrad else w_shape[1::-1]
    kernel, size = w_shape[2:], x_shape[2:]
    pad = tuple(k - 1 - p for k, p in zip(kernel, geometry.padding)) if dgrad else geometry.padding
    out = tuple(n + k - 1 - 2 * p for n, k, p in zip(size, kernel, pad))
    many_for_dgrad = split == 2 and dgrad and x_shape[0] >= _MANY_FOR_FP32_DGRAD
    few = None if many_for_dgrad or x_shape[0] >= MANY_IMAGES else x_shape[0]
    sizes = few, (channels_in, channels_out), size, out, kernel, pad, shared_limit - _RESERVED
    by_mma = many_for_dgrad and not packed
    found = conv_wgmma.layout(split, dgrad, packed, *sizes, multiprocessors) if wgmma and not by_mma else None
    found = found or _layout(split, *sizes)
    as_it_is = dtype == "half_t" and channels_last and not dgrad and found.planes["WGMMA"]
    macros = {
        "input_t": "half_t" if packed else dtype,
        "X_PACKED": int(packed),
        "CHANNELS_LAST": int(channels_last),
        "AS_IT_IS": int(as_it_is),
        **shape_macros(dtype, (channels_in, channels_out), size, out, kernel, pad),
        **packing_macros(split),
        **found.planes,
        **found.macros,
    }
    both = ("scalar_t", "acc_t", "IN_CHANNELS", "OUT_CHANNELS", "WGMMA", "TILE_M", "PACKED_WIDTH", "AS_IT_IS")
    taps, tile_m = kernel[0] * kernel[1], macros["TILE_M"]
    pack_macros = {**{name: macros[name] for name in both}, **packing_macros(split), "TAPS": taps, "FLIP": int(dgrad)}
    rows = ceil_div(channels_out, tile_m) * tile_m
    return Plan(
        tuple(macros.items()),
        tuple(pack_macros.items()),
        rows=rows,
        packed_size=rows * taps * macros["PACKED_WIDTH"],
        units=macros["UNITS"],
        tile_m=tile_m,
        threads=macros["THREADS"],
        shared_bytes=macros["SHARED_BYTES"],
        planes=tuple(found.planes.items()),
        multiprocessors=multiprocessors,
    )


def _layout(split, images, channels, size, out, kernel, pad, limit) -> conv_wgmma.Layout:
    """The layout for conv_mma.cuh."""
    warps_m, most_warps_n = (1, 8) if channels[1] <= 64 else (2, 4)
    chunks = ceil_div(channels[0], chunk_channels(split))
    windows_w = ceil_div(out[1], 2)
    windows = windows_w * ceil_div(out[0], 2)
    gap = max(0, kernel[1] - 1 - pad[1])
    pitch = size[1] + gap

    def layout(warps_n, passes, resident, stages):
        """(units, rows of the largest band, bytes of shared memory)"""
        unit_windows = 4 * _TILES * warps_n * passes
        rows = 0
        for first in range(0, windows, unit_windows):
            last = min(first + unit_windows, windows) - 1
            low = max(0, first // windows_w * 2 + pad[0] - (kernel[0] - 1))
            high = min(size[0], last // windows_w * 2 + 1 + pad[0] + 1)
            rows = max(rows, high - low)
        band = (gap + (rows + 1) * pitch) * LINE_BYTES * (chunks if resident else 1)
        return ceil_div(windows, unit_windows), rows, band + stages * warps_m * 64 * LINE_BYTES

    # Few images: one pass a unit, to spread over the GPU; else as many as fit. N alone decides,
    # so that results of this kernel do not depend on the GPU's size. GPUs with little shared memory get smaller passes.
    def choices_with(warps_n):
        most_passes = ceil_div(windows, 4 * _TILES * warps_n) if images is None else 1
        return [(warps_n, passes, 1) for passes in range(most_passes, 0, -1)] + [(warps_n, 1, 0)]

    choices = choices_with(most_warps_n) + [(most_warps_n // 2, 1, 1), (most_warps_n // 2, 1, 0)]
    layouts = [(*choice, stages, limit) for choice, stages in itertools.product(choices, _STAGES)]
    if split == 2:
        # Two smaller blocks an SM where both fit: one multiplies while the other loads, stores, or waits at a barrier.
        half = (limit + _RESERVED - _BLOCK_RESERVED) // 2 - _RESERVED
        small = [(*choice, stages, half) for choice in choices_with(most_warps_n // 2) for stages in (4, 3, 2)]
        layouts = small + layouts
    for warps_n, passes, resident, stages, most in layouts:
        units, rows, shared_bytes = layout(warps_n, passes, resident, stages)
        if shared_bytes <= most:
            break
    else:
        raise UnsupportedError(f"it needs {shared_bytes} bytes of shared memory, the GPU has {limit}")
    pass_windows = 4 * _TILES * warps_n
    last = (windows - 1) % pass_windows + 1  # windows that are left for an image's last pass
    last_tiles = _TILES if passes == 1 and split == 1 else ceil_div(last, 4 * warps_n)
    macros = {
        "WARPS_N": warps_n,
        "TILES": _TILES,
        "LAST_TILES": last_tiles,
        "UNIT_PASSES": passes,
        "BAND_ROWS": rows,
        "RESIDENT": resident,
        "STAGES": stages,
        "GAP": gap,
        "TILE_M": 64 * warps_m,
        "THREADS": 32 * warps_m * warps_n,
        "PACKED_WIDTH": chunks * LINE_BYTES // 2,
        "SHARED_BYTES": shared_bytes,
    }
    unit_windows, plane_stride = pass_windows * passes, ceil_div(windows, 4) * 4
    return conv_wgmma.Layout(macros, conv_wgmma.planes(0, windows_w, units, unit_windows, unit_windows, plane_stride))


def conv_transpose_mma(p: Plan, x, w, bias, y, packed, exponents, x_exponents=None) -> None:
    """Writes y = conv_transpose2d(x, w) + bias. With a plan for dgrad: y = dx from x = dy. bias may be None.

    x_exponents: the exponents of x, if it is packed.
    packed, exponents: workspaces, written: plan.packed_size elements of float16, and plan.rows of int32.
    """
    pack_weight(p, w, packed, exponents)
    kernel = convolution_kernel(p)
    count = 0 if x_exponents is None else x_exponents.size
    launch_units(p, kernel, x, y.shape[0], (x, x_exponents, packed, exponents, bias, y, count))


def pack_weight(p: Plan, w, packed, exponents, signs=None, copied_signs=None) -> None:
    """Writes the workspaces `packed` and `exponents`, which the plan's kernel reads.

    signs: one value for each channel. If it is negative, the channel's weights change sign.
    copied_signs: None, or float32 of plan.rows elements, to which these values are written.
    """
    launch(pack_kernel(p), (p.rows, 1, 1), (_PACK_THREADS, 1, 1), (w, signs, packed, exponents, copied_signs))


def convolution_kernel(p: Plan) -> Kernel:
    """The kernel that `conv_transpose_mma` launches after `pack_weight`."""
    return Kernel("conv_transpose_mma.cu", "conv_transpose_mma", p.macros, conv_wgmma.architecture(p.macros))


def pack_kernel(p: Plan) -> Kernel:
    """The kernel that `pack_weight` launches."""
    return Kernel("pack_weight_fp16.cu", "pack_weight_fp16", p.pack_macros)


def launch_units(p: Plan, kernel: Kernel, x, images: int, args) -> None:
    """Launches a kernel that uses conv_mma.cuh or conv_wgmma.cuh over all units of x. Its last argument: how many.

    Raises ValueError unless x starts at a multiple of 16 bytes.
    """
    if address(x) % 16:
        raise ValueError(f"x must start at a multiple of 16 bytes, received address {address(x):#x}; copy it")
    units, tiles, defines = images * p.units, p.rows // p.tile_m, dict(kernel.defines)
    blocks = max(1, p.multiprocessors // tiles) if defines["WGMMA"] else units
    launch(kernel, (min(units, blocks), tiles, 1), (p.threads, 1, 1), (*args, units), defines["SHARED_BYTES"])


def variants():
    """Variants for shapes that reach every branch: the reference shape, kernels of 1 and 7, many, few, odd channels."""
    packs, convolutions = set(), set()
    for p in sample_plans():
        packs.add(pack_kernel(p).variant)
        convolutions.add(convolution_kernel(p).variant)
    yield from sorted(packs, key=str)
    yield from sorted(convolutions, key=str)


def sample_plans():
    """Plans for the shapes of `variants`, on GPUs with much and with little shared memory."""
    unit = Geometry((1, 1), (1, 1), (0, 0), (1, 1), 1)
    much, little = 227 * 1024, 99 * 1024
    for wgmma, split in itertools.product((False, True), (1, 2)):
        yield plan((512, 64, 32, 32), (64, 128, 5, 5), unit, split, False, "float", much, wgmma)
        for images, packed in itertools.product((512, 1) if wgmma else (512,), (False, True)):
            yield plan((images, 128, 34, 34), (64, 128, 5, 5), unit, split, True, "float", much, wgmma, packed=packed)
        seven = unit._replace(padding=(3, 3))
        yield plan((1, 48, 64, 64), (48, 80, 7, 7), seven, split, False, "float", much, wgmma)
        if not wgmma:
            yield plan((64, 64, 32, 32), (64, 128, 5, 5), unit, split, False, "float", little)
    for dtype, wgmma, last in itertools.product(("half_t", "bf16_t"), (False, True), (False, True)):
        point = unit._replace(padding=(0, 0))
        for images in (512, 1) if wgmma and last else (512,):
            yield plan((images, 64, 32, 32), (64, 128, 5, 5), unit, 1, False, dtype, much, wgmma, last)
        for packed in (False, True):
            yield plan((64, 16, 16, 15), (512, 16, 1, 1), point, 1, True, dtype, much, wgmma, last, packed=packed)


def shape_macros(dtype: str, channels, size, out, kernel, pad) -> dict:
    """Macros of types and sizes. channels: (of x, of the output). size, out, kernel, pad: (height, width)."""
    macros = {"scalar_t": dtype, "acc_t": "float", "IN_CHANNELS": channels[0], "OUT_CHANNELS": channels[1]}
    pairs = {"IN": size, "OUT": out, "KERNEL": kernel, "PAD": pad}
    return macros | {f"{name}_{axis}": n for name, pair in pairs.items() for axis, n in zip("HW", pair)}


def check_supported(x_shape, w_shape, geometry: Geometry, dtype: str) -> None:
    """Raises UnsupportedError, with the reason, unless the tensor-core kernels support this convolution of x."""
    kernel = tuple(w_shape[2:])
    checks = {
        f"the dtype is {dtype}": dtype == "double",
        f"the stride is {geometry.stride}, not 1": geometry.stride != (1, 1),
        f"the dilation is {geometry.dilation}, not 1": geometry.dilation != (1, 1),
        f"it has {geometry.groups} groups": geometry.groups != 1,
        f"its channels, {w_shape[0]} and {w_shape[1]}, are not multiples of 16 up to 512": any(
            c % 16 or c > 512 for c in w_shape[:2]
        ),
        f"the kernel size {kernel} is over 7": max(kernel) > 7,
        f"the image size {tuple(x_shape[2:])} is over {_MAX_IMAGE}": max(x_shape[2:]) > _MAX_IMAGE,
    }
    for reason, applies in checks.items():
        if applies:
            raise UnsupportedError(reason)
