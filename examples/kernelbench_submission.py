"""ConvTranspose2d -> BatchNorm2d -> Tanh -> MaxPool2d -> GroupNorm, KernelBench level 2 problem 11, on CUDA C kernels.

CuPy compiles the kernels (NVRTC: neither nvcc nor a C++ compiler is needed) and calls them on PyTorch's tensors, by
DLPack views, in torch's current stream. All operators are fused, forward and backward. The convolution's precision is
the one that torch.backends.cudnn.allow_tf32 chooses. For GPUs of compute capability 8.0 or newer, and the shapes that
tensor-core kernels take: stride 1, channels in multiples of 16 up to 512, kernels up to 7x7, images up to 64x64. Others
are refused.

Written by `python -m modelnew submission`: change the package, not this file.
"""

import contextlib
import ctypes
import functools
import importlib.util
import itertools
import math
import re
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import nn
from torch.autograd.function import once_differentiable
from torch.utils.dlpack import to_dlpack

# ----------------------------------------------------------------------------------------------------------------------
# cupy_kernels/source.py
#
# Kernel sources: text of a .cu file with its includes expanded, kernel signatures, and the digest of all sources.

_INCLUDE = re.compile(r'^\s*#\s*include\s*"([^"]+)"')
_KERNEL = re.compile(r'extern "C" __global__ void (?:__launch_bounds__\([^)]*\)\s*)?(\w+)\s*\(([^)]*)\)')
# Scalar types of the kernels, and the NumPy dtype of an array that holds them. NumPy has no bfloat16: its arrays travel
# as int16.
DTYPES = {
    "float": np.dtype(np.float32),
    "double": np.dtype(np.float64),
    "half_t": np.dtype(np.float16),
    "bf16_t": np.dtype(np.int16),
    "u8": np.dtype(np.uint8),
    "int": np.dtype(np.int32),
    "i64": np.dtype(np.int64),
}
SCALARS = {dtype: name for name, dtype in DTYPES.items()}
# Macros of the tensor-core convolution that depend on the tensors' shapes and on the GPU's shared memory.
SHAPE_MACROS = frozenset(
    ("IN_CHANNELS", "OUT_CHANNELS", "IN_H", "IN_W", "OUT_H", "OUT_W", "KERNEL_H", "KERNEL_W", "TAPS", "PAD_H", "PAD_W")
    + ("WARPS_M", "WARPS_N", "TILE_M", "UNIT_PASSES", "BAND_ROWS", "RESIDENT", "STAGES", "SAVED_SHIFT")
)


class Variant(NamedTuple):
    """A .cu file and the macros it is compiled with: one compilation, which gives all kernels of the file."""

    file: str
    defines: tuple[tuple[str, str | int], ...] = ()

    def __str__(self):
        return " ".join([self.file, *(f"-D{k}={v}" for k, v in self.defines)])

    @property
    def family(self) -> "Variant":
        """The variant without the macros that specialise it for a shape, whose values nobody can enumerate."""
        return Variant(self.file, tuple((k, v) for k, v in self.defines if k not in SHAPE_MACROS))


class Kernel(NamedTuple):
    """A .cu file, one of its kernels, and the macros it is compiled with."""

    file: str
    name: str
    defines: tuple[tuple[str, str | int], ...] = ()

    def __str__(self):
        return f"{self.name} [{self.variant}]"

    @property
    def variant(self) -> Variant:
        return Variant(self.file, self.defines)


class Parameter(NamedTuple):
    """One parameter of a kernel. `dtype` is None where the text does not tell it."""

    name: str
    dtype: np.dtype | None
    pointer: bool
    const: bool
    inout: bool


@functools.cache
def expanded(file: str) -> str:
    """Text of `file` with every `#include "..."` replaced by the included text, each file once.

    CuPy's disk cache hashes this text alone, and NVRTC needs no include path for it. `#line` directives keep compiler
    messages pointing at the original file and line.
    """
    return _expand(file, set())


def _expand(file: str, seen: set[str]) -> str:
    seen.add(file)
    lines = [f'#line 1 "{file}"']
    for number, line in enumerate(text(file).splitlines(), 1):
        include = _INCLUDE.match(line)
        if not include:
            lines.append(line)
        elif include[1] not in seen:
            lines += [_expand(include[1], seen), f'#line {number + 1} "{file}"']
        else:
            lines.append("")
    return "\n".join(lines)


@functools.cache
def kernel_names(file: str) -> tuple[str, ...]:
    """Names of the kernels that `file` defines."""
    return tuple(match[1] for match in _KERNEL.finditer(expanded(file)))


@functools.cache
def signature(kernel: Kernel) -> tuple[Parameter, ...]:
    """Parameters of `kernel` as its text declares them.

    ValueError if the file has no such kernel, or if it has a scalar parameter of a type that is not in DTYPES.
    """
    for match in _KERNEL.finditer(expanded(kernel.file)):
        if match[1] == kernel.name:
            return tuple(_parameter(kernel, p) for p in re.sub(r"//.*", "", match[2]).split(",") if p.strip())
    raise ValueError(f"{kernel.file} has no kernel {kernel.name!r}; it has {', '.join(kernel_names(kernel.file))}")


def _parameter(kernel: Kernel, declaration: str) -> Parameter:
    words = declaration.replace("*", " * ").split()
    name, words = words[-1], words[:-1]
    kind = " ".join(w for w in words if w not in ("*", "const", "INOUT", "__restrict__"))
    dtype = DTYPES.get(str(dict(kernel.defines).get(kind, kind)))
    if dtype is None and "*" not in words:
        raise ValueError(
            f"{kernel}: {name} is a {kind}; scalar parameters are {', '.join(DTYPES)}, or a macro of these"
        )
    return Parameter(name, dtype, "*" in words, "const" in words, "INOUT" in words)


# ----------------------------------------------------------------------------------------------------------------------
# cupy_kernels/nvrtc.py
#
# NVRTC by ctypes: finds the library in NVIDIA's pip wheels, and compiles without a GPU and without CuPy.
#
# CuPy compiles what runs. This module preloads the wheels' libraries for it (CuPy 13 looks for NVRTC by plain dlopen and
# knows no wheels), and lets a machine without a GPU compile every variant to a cubin and read its registers and spills.

STANDARD = "-std=c++17"


def _wheel_libraries(package: str, pattern: str) -> list[Path]:
    spec = importlib.util.find_spec("nvidia")
    roots = spec.submodule_search_locations if spec else ()
    return sorted(p for root in roots for p in Path(root, package, "lib").glob(pattern))


@functools.cache
def preload_wheels() -> tuple[str, ...]:
    """Loads CUDA 11's runtime and NVRTC from their pip wheels, where installed, and returns what it loaded.

    A library that is loaded already satisfies CuPy's later dlopen by name. CuPy 14 (CUDA 12 and newer) finds its wheels
    by itself.
    """
    paths = (
        _wheel_libraries("cuda_runtime", "libcudart.so.11*")
        + _wheel_libraries("cuda_nvrtc", "libnvrtc-builtins.so.11*")
        + _wheel_libraries("cuda_nvrtc", "libnvrtc.so.11*")
    )
    for path in paths:
        ctypes.CDLL(str(path), ctypes.RTLD_GLOBAL)
    return tuple(str(p) for p in paths)


# ----------------------------------------------------------------------------------------------------------------------
# cupy_kernels/common.py
#
# What the operators' host sides share: macros for a dtype, launch sizes, and checks whose errors say what to do.

FLOATS = ("float", "double", "half_t", "bf16_t")
THREADS = 256


def scalar(array) -> str:
    """The kernels' name for an array's type. TypeError unless it is float32, float64, float16 or int16 (bfloat16)."""
    name = SCALARS.get(array.dtype)
    if name not in FLOATS:
        raise TypeError(
            f"arrays must be float32, float64, float16, or int16 that holds bfloat16; received {array.dtype}"
        )
    return name


def accumulator(name: str) -> str:
    """The type of the arithmetic for tensors of type `name`."""
    return "double" if name == "double" else "float"


def accumulator_dtype(array) -> np.dtype:
    """dtype of statistics and partial sums for tensors like `array`: float32, or float64 for float64."""
    return np.dtype(np.float64 if scalar(array) == "double" else np.float32)


def type_macros(array) -> tuple:
    """Macros scalar_t and acc_t for `array`."""
    return scalar_macros(scalar(array))


def scalar_macros(name: str) -> tuple:
    """Macros scalar_t and acc_t for arrays of the type `name`."""
    return (("scalar_t", name), ("acc_t", accumulator(name)))


def row_width(length: int, *arrays) -> int:
    """Elements of the widest access, at most 16 bytes, that divides rows of `length` elements in all arrays."""
    width = 16 // arrays[0].itemsize
    while length % width or any(address(a) % (width * a.itemsize) for a in arrays):
        width //= 2
    return width


def address(array) -> int:
    """Address of an array's first element."""
    return array.ctypes.data if isinstance(array, np.ndarray) else array.data.ptr


def ceil_div(a: int, b: int) -> int:
    """The smallest integer that is at least a / b."""
    return -(-a // b)


def check_per_channel(channels, **arrays) -> None:
    """ValueError unless every named array (None left out) has one element for each channel."""
    for name, array in arrays.items():
        if array is not None and array.size != channels:
            raise ValueError(f"{name} should contain {channels} elements, one for each channel, not {array.size}")


def multiprocessors(array) -> int:
    """How many multiprocessors the array's GPU has; 1 for the emulator."""
    return 1 if isinstance(array, np.ndarray) else array.device.attributes["MultiProcessorCount"]


# ----------------------------------------------------------------------------------------------------------------------
# cupy_kernels/conv_transpose.py
#
# 2D transposed convolution: general kernels, for any hyper-parameters, on ordinary FMA units.
#
# Shapes: x [N, G*Ci, H, W], w [G*Ci, Co, KH, KW], bias [G*Co], y [N, G*Co, OH, OW], with G groups, Ci and Co channels per
# group and OH = (H-1)*stride - 2*padding + dilation*(KH-1) + output_padding + 1.

_INT_MAX = 2**31 - 1
_WGRAD_BLOCKS = (
    2048  # enough for several waves on today's largest GPUs; a constant, so that sums depend on shapes alone
)
_TILE_K = 8  # simt_gemm.cuh


class Geometry(NamedTuple):
    """Hyper-parameters of a transposed convolution, pairs in the order (height, width)."""

    stride: tuple[int, int]
    padding: tuple[int, int]
    output_padding: tuple[int, int]
    dilation: tuple[int, int]
    groups: int


def output_shape(x_shape, w_shape, geometry: Geometry) -> tuple[int, int, int, int]:
    """Shape of y. ValueError for ranks, channels, hyper-parameters or sizes that no transposed convolution has."""
    if len(x_shape) != 4 or len(w_shape) != 4:
        raise ValueError(
            f"input and weight must have 4 dimensions, received shapes {tuple(x_shape)} and {tuple(w_shape)}"
        )
    g = geometry
    for name, values, least in (("stride", g.stride, 1), ("dilation", g.dilation, 1), ("groups", (g.groups,), 1)):
        if min(values) < least:
            raise ValueError(f"{name} must be at least {least}, received {values}")
    for name, values in (("padding", g.padding), ("output_padding", g.output_padding)):
        if min(values) < 0:
            raise ValueError(f"{name} must not be negative, received {values}")
    if any(o >= max(s, d) for o, s, d in zip(g.output_padding, g.stride, g.dilation)):
        raise ValueError(
            f"output_padding must be smaller than stride or dilation, received output_padding {g.output_padding}, "
            f"stride {g.stride}, dilation {g.dilation}"
        )
    if x_shape[1] != w_shape[0] or w_shape[0] % g.groups:
        raise ValueError(
            f"input has {x_shape[1]} channels, weight {tuple(w_shape)} takes {w_shape[0]}, "
            f"which groups={g.groups} must divide"
        )
    if 0 in x_shape[1:] or 0 in w_shape:
        raise ValueError(f"only the batch may be empty, received shapes {tuple(x_shape)} and {tuple(w_shape)}")
    size = tuple(
        (n - 1) * s - 2 * p + d * (k - 1) + o + 1
        for n, k, s, p, o, d in zip(x_shape[2:], w_shape[2:], g.stride, g.padding, g.output_padding, g.dilation)
    )
    if min(size) < 1:
        raise ValueError(f"output size would be {size}: padding {g.padding} is too large for input {tuple(x_shape)}")
    shape = (x_shape[0], w_shape[1] * g.groups, *size)
    for name, s in (("input", x_shape), ("output", shape), ("weight", (1, *w_shape))):
        if np.prod(s[1:], dtype=object) > _INT_MAX:
            raise ValueError(f"one image of the {name} has more than {_INT_MAX} elements: shape {tuple(s)}")
    for name, s in (("input", x_shape), ("output", shape)):
        if s[0] * s[2] * s[3] > _INT_MAX - 1024:  # room for a tile
            raise ValueError(f"the {name} of shape {tuple(s)} has more pixels than {_INT_MAX - 1024}: split the batch")
    return shape


def packed_weight_size(w_shape) -> int:
    """Elements of the workspace `packed`, of the accumulator's dtype, that forward and dgrad take."""
    return int(np.prod(w_shape))


def conv_transpose_dgrad(dy, w, dx, packed, geometry: Geometry) -> None:
    """dx, the gradient of x, from dy, that of y: dy convolved with w. dx and the workspace `packed` are written."""
    _gather(dy, w, None, dx, packed, geometry, dgrad=True)


def _gather(source, w, bias, out, packed, geometry, dgrad):
    x, y = (out, source) if dgrad else (source, out)
    _check(x, w, y, geometry)
    groups, taps = geometry.groups, w.shape[2] * w.shape[3]
    channels_in, channels_out = w.shape[0] // groups, w.shape[1]
    macros = (*type_macros(x), ("DGRAD", int(dgrad)))
    rows, pixels = (channels_in if dgrad else channels_out), out.shape[0] * out.shape[2] * out.shape[3]
    tile = _tile(source, rows, pixels)
    macros += tile.macros()
    launch(
        Kernel("conv_transpose.cu", "pack_weight", macros),
        (ceil_div(w.size, THREADS), 1, 1),
        (THREADS, 1, 1),
        (w, packed, groups, channels_in, channels_out, taps),
    )
    phases = (1, 1) if dgrad else geometry.stride
    largest_phase = out.shape[0] * ceil_div(out.shape[2], phases[0]) * ceil_div(out.shape[3], phases[1])
    tiles_per_phase = ceil_div(largest_phase, tile.n)
    launch(
        Kernel("conv_transpose.cu", "conv_gather", macros),
        (phases[0] * phases[1] * tiles_per_phase, ceil_div(rows, tile.m), groups),
        (tile.threads, 1, 1),
        (source, packed, bias, out, out.shape[0], groups, source.shape[1] // groups, rows)
        + (*source.shape[2:], *out.shape[2:], *w.shape[2:])
        + (*geometry.stride, *geometry.padding, *geometry.dilation, tiles_per_phase),
    )


def wgrad_workspace_size(x_shape, w_shape, geometry: Geometry, double: bool) -> int:
    """Elements of the workspace `partial` that wgrad takes, of the accumulator's dtype (`double`: it is float64)."""
    return _wgrad_plan(x_shape, w_shape, geometry, double)[1] * int(np.prod(w_shape))


def conv_transpose_wgrad(x, dy, dw, partial, geometry: Geometry) -> None:
    """dw, the gradient of w. dw and the workspace `partial` are written."""
    _check(x, dw, dy, geometry)
    groups, taps = geometry.groups, dw.shape[2] * dw.shape[3]
    channels_in, channels_out = dw.shape[0] // groups, dw.shape[1]
    tile, splits, split_pixels = _wgrad_plan(x.shape, dw.shape, geometry, double=accumulator_dtype(x) == np.float64)
    macros = type_macros(x) + tile.macros()
    launch(
        Kernel("conv_transpose_wgrad.cu", "wgrad_partial", macros),
        (taps * ceil_div(channels_in, tile.m) * ceil_div(channels_out, tile.n), splits, groups),
        (tile.threads, 1, 1),
        (x, dy, partial, x.shape[0], groups, channels_in, channels_out)
        + (*x.shape[2:], *dy.shape[2:], *dw.shape[2:])
        + (*geometry.stride, *geometry.padding, *geometry.dilation, split_pixels),
    )
    launch(
        Kernel("conv_transpose_wgrad.cu", "wgrad_reduce", macros),
        (ceil_div(dw.size, THREADS), 1, 1),
        (THREADS, 1, 1),
        (partial, dw, groups, taps, channels_in, channels_out, splits),
    )


class _Tile(NamedTuple):
    m: int
    n: int
    per_thread: int

    @property
    def threads(self) -> int:
        return self.m * self.n // self.per_thread**2

    def macros(self) -> tuple:
        return (("TILE_M", self.m), ("TILE_N", self.n), ("PER_THREAD", self.per_thread))


_LARGE, _SMALL = _Tile(64, 128, 8), _Tile(32, 32, 4)
_DOUBLE = _Tile(64, 64, 4)


def _tile(array, rows: int, columns: int) -> _Tile:
    """The tile for a product of rows x columns: large where the matrix fills it, small where most would be padding."""
    if rows <= 32 or columns < 4096:
        return _SMALL
    if accumulator_dtype(array) == np.float64:
        return _DOUBLE
    return _LARGE


def _wgrad_plan(x_shape, w_shape, geometry, double):
    """(tile, splits, pixels of a split)."""
    channels_in, channels_out = w_shape[0] // geometry.groups, w_shape[1]
    pixels = x_shape[0] * x_shape[2] * x_shape[3]
    if channels_in <= 32 or channels_out <= 32:
        tile = _SMALL
    else:
        tile = _DOUBLE if double else _LARGE
    matrices = w_shape[2] * w_shape[3] * geometry.groups
    blocks = matrices * ceil_div(channels_in, tile.m) * ceil_div(channels_out, tile.n)
    splits = max(1, min(_WGRAD_BLOCKS // blocks, pixels // 512, 65535))
    split_pixels = ceil_div(ceil_div(pixels, splits), _TILE_K) * _TILE_K
    return tile, max(1, ceil_div(pixels, split_pixels) if split_pixels else 1), split_pixels


def _check(x, w, y, geometry):
    expected = output_shape(x.shape, w.shape, geometry)
    if y.shape != expected:
        raise ValueError(f"output must have shape {expected}, received {y.shape}")


# ----------------------------------------------------------------------------------------------------------------------
# cupy_kernels/conv_transpose_mma.py
#
# 2D transposed convolution on tensor cores: stride 1, dilation 1, one group, channels in multiples of 16.
#
# Shapes as in `conv_transpose`. Operands are fp16 under power-of-two scales: split 1 has TF32's precision, split 2
# float32's.

MANY_IMAGES = 64  # from which on a block takes as many passes of an image as fit
_CELL_BYTES = 128
_MAX_IMAGE = 70  # of x and of dy, which for images up to 64 x 64 and 7 x 7 kernels is up to 70 x 70
_STAGES = (4, 2)  # preferred first
_RESERVED = 5 * 1024  # shared memory for the kernels' own small arrays and an epilogue


class Plan(NamedTuple):
    """How a convolution is laid out over blocks; `macros` specialise the kernels."""

    macros: tuple
    pack_macros: tuple
    units: int
    rows: int  # of the output's channels, padded to full tiles
    tile_m: int
    threads: int
    shared_bytes: int
    packed_size: int  # elements of the workspace `packed`, float16


class UnsupportedError(ValueError):
    """These kernels do not take a convolution; the message says why."""


@functools.lru_cache(maxsize=1024)
def plan(x_shape, w_shape, geometry: Geometry, split: int, dgrad: bool, dtype: str, shared_limit: int) -> Plan:
    """The layout for a convolution of x [N, K, H, W], or of dy for dgrad.

    w_shape, geometry: of the forward. dtype: the kernels' name of the type. shared_limit: bytes of shared memory that a
    block may use. Raises UnsupportedError for what the kernels do not take.
    """
    _check_supported(x_shape, w_shape, geometry, dtype)
    padding = geometry.padding
    channels_in, channels_out = w_shape[:2] if not dgrad else w_shape[1::-1]
    kernel = w_shape[2:]
    pad = tuple(k - 1 - p for k, p in zip(kernel, padding)) if dgrad else padding
    size = x_shape[2:]
    out = tuple(n + k - 1 - 2 * p for n, k, p in zip(size, kernel, pad))
    warps_m, most_warps_n = (1, 8) if channels_out <= 64 else (2, 4)
    chunks = ceil_div(channels_in, 64 // split)
    windows_w = ceil_div(out[1], 2)
    windows = windows_w * ceil_div(out[0], 2)
    gap = max(0, kernel[1] - 1 - pad[1])
    pitch = (size[1] + gap + 3) // 8 * 8 + 4

    def layout(warps_n, passes, resident, stages):
        """(units, rows of the largest band, bytes of shared memory)"""
        unit_windows = passes * warps_n * 16 // split
        rows = 0
        for first in range(0, windows, unit_windows):
            last = min(first + unit_windows, windows) - 1
            low = max(0, first // windows_w * 2 + pad[0] - (kernel[0] - 1))
            high = min(size[0], last // windows_w * 2 + 1 + pad[0] + 1)
            rows = max(rows, high - low)
        band = (gap + (rows + 1) * pitch) * _CELL_BYTES * (chunks if resident else 1)
        return ceil_div(windows, unit_windows), rows, band + stages * warps_m * 64 * _CELL_BYTES

    # Few images: one turn a unit, to spread over the GPU; else as many as fit, to load x less often. N alone decides,
    # so results do not depend on the GPU's size. GPUs with little shared memory get smaller passes.
    most_passes = ceil_div(windows, most_warps_n * 16 // split) if x_shape[0] >= MANY_IMAGES else 1
    choices = [(most_warps_n, passes, 1) for passes in range(most_passes, 0, -1)]
    choices += [(most_warps_n, 1, 0), (most_warps_n // 2, 1, 1), (most_warps_n // 2, 1, 0)]
    limit = shared_limit - _RESERVED
    for (warps_n, passes, resident), stages in itertools.product(choices, _STAGES):
        units, rows, shared_bytes = layout(warps_n, passes, resident, stages)
        if shared_bytes <= limit:
            break
    else:
        raise UnsupportedError(f"it needs {shared_bytes} bytes of shared memory, the GPU has {limit}")
    macros = {
        "scalar_t": dtype,
        "acc_t": "float",
        "IN_CHANNELS": channels_in,
        "OUT_CHANNELS": channels_out,
        "IN_H": size[0],
        "IN_W": size[1],
        "OUT_H": out[0],
        "OUT_W": out[1],
        "KERNEL_H": kernel[0],
        "KERNEL_W": kernel[1],
        "PAD_H": pad[0],
        "PAD_W": pad[1],
        "SPLIT": split,
        "WARPS_M": warps_m,
        "WARPS_N": warps_n,
        "UNIT_PASSES": passes,
        "BAND_ROWS": rows,
        "RESIDENT": resident,
        "STAGES": stages,
    }
    pack_macros = {name: macros[name] for name in ("scalar_t", "acc_t", "IN_CHANNELS", "OUT_CHANNELS", "SPLIT")}
    tile_m, taps = 64 * warps_m, kernel[0] * kernel[1]
    pack_macros.update(TAPS=taps, TILE_M=tile_m, FLIP=int(dgrad))
    padded = ceil_div(channels_out, tile_m) * tile_m
    packed_size = padded * chunks * taps * _CELL_BYTES // 2
    return Plan(
        tuple(macros.items()),
        tuple(pack_macros.items()),
        units,
        padded,
        tile_m,
        32 * warps_m * warps_n,
        shared_bytes,
        packed_size,
    )


def conv_transpose_mma(p: Plan, x, w, bias, y, packed, exponents) -> None:
    """y = conv_transpose2d(x, w) + bias, or with a plan for dgrad y = dx from x = dy; bias may be None.

    y and the workspaces packed (plan.packed_size, float16) and exponents (plan.rows, int32) are written.
    """
    pack_weight(p, w, packed, exponents)
    kernel = Kernel("conv_transpose_mma.cu", "conv_transpose_mma", p.macros)
    launch_units(p, kernel, x, (x, packed, exponents, bias, y))


def pack_weight(p: Plan, w, packed, exponents) -> None:
    """Writes the workspaces `packed` and `exponents` that the plan's kernel reads."""
    kernel = Kernel("pack_weight_fp16.cu", "pack_weight_fp16", p.pack_macros)
    launch(kernel, (p.rows, 1, 1), (THREADS, 1, 1), (w, packed, exponents))


def launch_units(p: Plan, kernel: Kernel, x, args, shared_bytes: int = 0) -> None:
    """Launches a kernel built on conv_mma.cuh over all units of x. shared_bytes: what its epilogue needs.

    ValueError unless x starts at a multiple of 16 bytes.
    """
    if address(x) % 16:
        raise ValueError(f"x must start at a multiple of 16 bytes, received address {address(x):#x}; copy it")
    grid = (x.shape[0] * p.units, p.rows // p.tile_m, 1)
    launch(kernel, grid, (p.threads, 1, 1), (*args, multiprocessors(x)), p.shared_bytes + shared_bytes)


def _check_supported(x_shape, w_shape, geometry, dtype):
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


# ----------------------------------------------------------------------------------------------------------------------
# cupy_kernels/conv_bn_pool.py
#
# ConvTranspose2d -> BatchNorm2d -> Tanh -> MaxPool2d(2, 2) -> GroupNorm, pooled in the convolution's epilogue.
#
# Shapes: x [N, K, H, W], w [K, M, KH, KW], the convolution's output [N, M, OH, OW], pooled and out [N, M, OH/2, OW/2].
# The convolution is one that `conv_transpose_mma.plan` takes. All tensors have one type: float32,
# float16, or int16 that holds bfloat16; statistics and what is saved have the types that `buffers` says.

conv_bn_pool_DTYPES = (np.float32, np.float16, np.int32, np.uint8)  # of `buffers`
_GROUP_BYTES = 96 * 1024  # of shared memory, for pooled_backward, which needs twice what pooled_forward does


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
    *written,
    names: tuple[str, ...],
    plan: Plan,
    training: bool,
    momentum: float,
    eps: float,
    groups: int,
    group_eps: float,
) -> None:
    """out = group_norm(max_pool2d(tanh(batch_norm(conv_transpose2d(x, w, conv_bias))), 2)).

    conv_bias, weight, bias, group_weight, group_bias: may be None. running_mean, running_var: updated in training,
    where they may be None. written: arrays for `names`, as `buffers` describes them.
    """
    b = dict(zip(names, written, strict=True))
    pack_weight(plan, w, b["packed"], b["exponents"])
    name = scalar(x)
    macros = _pool_macros(plan, training, "saved" in b)
    launch_units(
        plan,
        Kernel("conv_bn_pool.cu", "conv_bn_pool", macros),
        x,
        (x, b["packed"], b["exponents"], weight, b["pooled"], b.get("partials"))
        + (b.get("taps"), b.get("saved"), b.get("unit_exponents")),
        shared_bytes=plan.threads * 16 if training else 0,
    )
    images, channels = out.shape[:2]
    tail = _tail_macros(plan, name)
    launch(
        Kernel("pooled_tail.cu", "conv_bn_statistics", tail),
        (channels, 1, 1),
        (THREADS, 1, 1),
        (b.get("partials"), conv_bias, running_mean, running_var, b["mean"], b["invstd"])
        + (momentum, eps, channels, images * plan.units, training),
    )
    members, plane = channels // groups, math.prod(out.shape[2:])
    launch(
        Kernel("pooled_tail.cu", "pooled_forward", tail),
        (images * groups, 1, 1),
        (THREADS, 1, 1),
        (b["pooled"], b["mean"], b["invstd"], weight, bias, group_weight, group_bias, out)
        + (b["group_mean"], b["group_invstd"], channels, groups, plane, group_eps),
        members * plane * 4,
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


# ----------------------------------------------------------------------------------------------------------------------
# cupy_kernels/batch_norm.py
#
# Batch norm over [N, C, *]: statistics, normalisation with an optional tanh behind it, and the gradients.
#
# All arrays are contiguous. `mean` and `invstd`, (C,), and workspaces have the accumulator's dtype: see
# `common.accumulator_dtype`. weight, bias and their gradients share one dtype, and running_mean and running_var share
# one: x's, or float32.

ITEMS = 32  # values per thread


def batch_norm_backward_combine(partials, sums, dweight, dbias, macros=None) -> None:
    """The second stage of `batch_norm_backward_reduce`: its results, from partial sums.

    partials: (2, C, chunks), accumulator dtype. macros: of the module to take the kernel from, if the caller has one.
    """
    _, channels, chunks = partials.shape
    if sums.shape != (2, channels):
        raise ValueError(f"sums must have shape {(2, channels)}, received {sums.shape}")
    check_per_channel(channels, dweight=dweight, dbias=dbias)
    if macros is None:
        macros = _macros(1, (partials,), dweight if dweight is not None else dbias)
    launch(
        Kernel("batch_norm.cu", "batch_norm_backward_sums", macros),
        (channels, 1, 1),
        (THREADS, 1, 1),
        (partials, sums, dweight, dbias, channels, chunks),
    )


def _widths(name):
    """Elements per access, the widest first: 16 bytes, half of that for 16-bit types, one element."""
    widest = 16 // DTYPES[name].itemsize
    return (8, 4, 1) if widest == 8 else (widest, 1)


def _macros(plane, tensors, parameter):
    """`parameter`: an array of the type of the per-channel parameters, or None: then no kernel reads or writes one."""
    tensors = [a for a in tensors if a is not None]
    param = accumulator_dtype(tensors[0]) if parameter is None else parameter.dtype
    name, aligned = scalar(tensors[0]), row_width(plane, *tensors)
    return _defines(name, SCALARS[param], next(w for w in _widths(name) if w <= aligned))


def _defines(name, param, width):
    return (*scalar_macros(name), ("param_t", param), ("WIDTH", width), ("ITEMS", ITEMS))


# ----------------------------------------------------------------------------------------------------------------------
# modelnew/interop.py
#
# The border between torch and the kernels: DLPack views of tensors, on the tensors' device and torch's stream.

# What kernels compute with, and their name for it.
interop_FLOATS = {torch.float32: "float", torch.float64: "double", torch.float16: "half_t", torch.bfloat16: "bf16_t"}


class _Capsule:
    """A tensor as DLPack's protocol wants it, without the stream synchronisation of torch's own `__dlpack__`.

    The view is used on the stream that the tensor belongs to, so there is nothing to wait for; and waiting would break
    the capture of a CUDA graph and costs 14 us a tensor.
    """

    def __init__(self, tensor):
        self.tensor = tensor

    def __dlpack__(self, **_):
        return to_dlpack(self.tensor)

    def __dlpack_device__(self):
        return (2, self.tensor.device.index)  # kDLCUDA


def view(tensor: torch.Tensor):
    """A CuPy (GPU) or NumPy (CPU) array that shares the tensor's memory. bfloat16 travels as int16."""
    tensor = tensor.detach()
    if tensor.dtype == torch.bfloat16:
        tensor = tensor.view(torch.int16)
    if tensor.is_cuda:
        return cupy().from_dlpack(_Capsule(tensor))
    return tensor.numpy()  # NumPy's from_dlpack returns a read-only array


def run(operation, *args, **options):
    """operation(*args, **options) with every tensor among `args` replaced by its view.

    Kernels go to the tensors' device and to torch's current stream there, CPU tensors to the emulator. RuntimeError if
    the tensors are not on one device, or on one that is neither a CUDA GPU nor the CPU.
    """
    with _launching_on(one_device(args)):
        return operation(*(view(a) if isinstance(a, torch.Tensor) else a for a in args), **options)


def one_device(args) -> torch.device:
    """The device of all tensors in `args`; RuntimeError if they are on several, or on one that no kernel runs on."""
    devices = {a.device for a in args if isinstance(a, torch.Tensor)}
    if len(devices) > 1:
        raise RuntimeError(
            f"tensors must be on one device, received {', '.join(sorted(map(str, devices)))}; use .to(...)"
        )
    (device,) = devices
    if device.type not in ("cuda", "cpu"):
        raise RuntimeError(f"kernels run on CUDA GPUs, or on the CPU by emulation; received tensors on {device}")
    return device


@contextlib.contextmanager
def _launching_on(device):
    if device.type == "cpu":
        yield
        return
    cuda = cupy().cuda
    with cuda.Device(device.index), cuda.ExternalStream(torch.cuda.current_stream(device).cuda_stream, device.index):
        yield


def dense(tensor: torch.Tensor | None) -> torch.Tensor | None:
    """The tensor as kernels read it: contiguous in its logical order, without lazy negation. Copies only if it must."""
    return None if tensor is None else tensor.detach().resolve_neg().contiguous()


def aligned(tensor: torch.Tensor) -> torch.Tensor:
    """`dense`, at an address that is a multiple of 16, which kernels that read 16 bytes at a time insist on."""
    tensor = dense(tensor)
    return tensor.clone() if tensor.data_ptr() % 16 else tensor


def check_floating(**tensors: torch.Tensor | None) -> None:
    """TypeError unless every named tensor (None left out) has a dtype that kernels compute with."""
    for name, tensor in tensors.items():
        if tensor is not None and tensor.dtype not in interop_FLOATS:
            raise TypeError(f"{name} must be float32, float64, float16 or bfloat16, received {tensor.dtype}")


def check_parameters(input: torch.Tensor, **parameters: torch.Tensor | None) -> None:
    """TypeError unless the tensors (None left out) share one dtype: input's, or float32 where that has 16 bits."""
    check_floating(input=input, **parameters)
    allowed = {input.dtype, interop_accumulator_dtype(input)}
    dtypes = {name: tensor.dtype for name, tensor in parameters.items() if tensor is not None}
    if len(set(dtypes.values())) > 1 or not allowed.issuperset(dtypes.values()):
        received = ", ".join(f"{name} {dtype}" for name, dtype in dtypes.items())
        choice = " or all ".join(sorted(map(str, allowed)))
        raise TypeError(f"with input {input.dtype}, {' and '.join(dtypes)} must be all {choice}; received {received}")


def interop_accumulator_dtype(tensor: torch.Tensor) -> torch.dtype:
    """dtype of statistics, partial sums and workspaces for a tensor: float64 for float64, else float32."""
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def pair(value, name: str) -> tuple[int, int]:
    """(value, value) for an int, (a, b) for two of them. TypeError or ValueError for anything else."""
    values = (value, value) if isinstance(value, int) else tuple(value)
    if len(values) == 1:
        values *= 2
    if len(values) != 2 or not all(isinstance(v, int) for v in values):
        raise ValueError(f"{name} must be an int or a pair of ints, received {value!r}")
    return values


# ----------------------------------------------------------------------------------------------------------------------
# modelnew/numerics.py
#
# How the transposed convolution multiplies: numeric classes, and the one rule that picks tensor cores or not.
#
# "tf32": operands of 10 mantissa bits, summed in float32. "fp32": float32's precision. "auto": as PyTorch would, which is
# torch.backends.cudnn.allow_tf32 on a GPU and float32 on the CPU. 16-bit tensors are exact in either.

NUMERICS = ("auto", "tf32", "fp32")
_EMULATED_SHARED_BYTES = 227 * 1024  # an H100's


def check_numerics(numerics: str) -> None:
    """ValueError unless `numerics` is one of NUMERICS."""
    if numerics not in NUMERICS:
        raise ValueError(f"numerics must be one of {', '.join(NUMERICS)}, received {numerics!r}")


def resolve(numerics: str, x: torch.Tensor) -> str:
    """Either "tf32" or "fp32", for a convolution of x."""
    if numerics != "auto":
        return numerics
    return "tf32" if x.is_cuda and torch.backends.cudnn.allow_tf32 else "fp32"


def tensor_core_plan(x: torch.Tensor, w_shape, geometry: Geometry, numerics: str, dgrad: bool = False):
    """(plan, None) if the tensor-core kernels take the convolution of x, else (None, the reason).

    dgrad: x is the incoming gradient, and the convolution its input gradient.
    """
    return plan_or_reason(plan, x, w_shape, geometry, numerics, dgrad=dgrad)


def required_plan(make, x, w_shape, geometry, numerics, **options):
    """What `make`, such as conv_transpose_mma.plan, plans for x on its device. UnsupportedError if there is no plan."""
    if x.is_cuda and torch.cuda.get_device_capability(x.device) < (8, 0):
        major, minor = torch.cuda.get_device_capability(x.device)
        raise UnsupportedError(f"the GPU is sm_{major}{minor}, tensor-core kernels need sm_80")
    if not x.shape[0]:
        raise UnsupportedError("the batch is empty")
    split = 2 if x.dtype == torch.float32 and resolve(numerics, x) == "fp32" else 1
    options["dtype"] = interop_FLOATS[x.dtype]
    options["shared_limit"] = _shared_bytes(x.device.index) if x.is_cuda else _EMULATED_SHARED_BYTES
    return make(tuple(x.shape), tuple(w_shape), geometry, split, **options)


@functools.cache
def _shared_bytes(device_index: int) -> int:
    return torch.cuda.get_device_properties(device_index).shared_memory_per_block_optin


# ----------------------------------------------------------------------------------------------------------------------
# modelnew/functional/batch_norm.py
#
# batch_norm, with the signature of torch.nn.functional.batch_norm, and batch_norm_tanh, which applies tanh as well.

def run_updating(update, running_mean, running_var, training) -> None:
    """update(running_mean, running_var), with contiguous tensors that it may change in training; autograd is told."""
    updated = dense(running_mean), dense(running_var)
    update(*updated)
    for buffer, new in zip((running_mean, running_var), updated):
        if buffer is None or not training:
            continue
        if new.data_ptr() == buffer.data_ptr():
            torch.autograd.graph.increment_version(buffer)
        else:  # the buffer is not contiguous: the kernel updated a copy
            buffer.copy_(new)


def check_batch_norm(input, running_mean, running_var, weight, bias, training, momentum, eps) -> None:
    """Refuses what torch.nn.functional.batch_norm refuses, before anything is written."""
    if input.dim() < 2:
        raise RuntimeError(f"batch_norm takes input [N, C, *], received shape {tuple(input.shape)}")
    channels, count = input.shape[1], input.numel() // (input.shape[1] or 1)
    if training and count == 1:
        raise ValueError(f"Expected more than 1 value per channel when training, got input size {input.shape}")
    if training and not eps > 0:
        raise ValueError(f"batch_norm eps must be positive during training, but got {eps}")
    if not eps >= 0:
        raise ValueError(f"batch_norm eps must be non-negative, but got {eps}")
    if not isinstance(momentum, (int, float)):
        raise TypeError(f"batch_norm momentum must be a number, received {momentum!r}")
    if (running_mean is None) != (running_var is None):
        raise ValueError("running_mean and running_var must either both be None or neither be None")
    if running_mean is None and not training:
        raise RuntimeError("running_mean and running_var must be defined in evaluation mode")
    parameters = {"running_mean": running_mean, "running_var": running_var, "weight": weight, "bias": bias}
    for name, tensor in parameters.items():
        if tensor is not None and tensor.numel() != channels:
            raise RuntimeError(f"{name} should contain {channels} elements not {tensor.numel()}")
        if tensor is not None and name.startswith("running") and tensor.requires_grad and torch.is_grad_enabled():
            raise RuntimeError(f"batch_norm is not differentiable with respect to {name}, which requires grad")
    one_device((input, *parameters.values()))
    check_parameters(input, running_mean=running_mean, running_var=running_var)
    check_parameters(input, weight=weight, bias=bias)


# ----------------------------------------------------------------------------------------------------------------------
# modelnew/functional/conv_transpose.py
#
# conv_transpose2d, with the signature of torch.nn.functional.conv_transpose2d.

def conv_gradients(x, w, dy, geometry, numerics, need_x, need_w):
    """(dx, dw), None where not needed."""
    dx = dw = None
    if need_x:
        dx = torch.empty_like(x)
        plan, _ = tensor_core_plan(dy, w.shape, geometry, numerics, dgrad=True)
        if plan:
            run(conv_transpose_mma, plan, aligned(dy), w, None, dx, *mma_workspaces(plan, w))
        else:
            run(conv_transpose_dgrad, dy, w, dx, _packed(w), geometry)
    if need_w:
        dw = torch.empty_like(w)
        dtype = interop_accumulator_dtype(w)
        size = wgrad_workspace_size(x.shape, w.shape, geometry, dtype == torch.float64)
        run(conv_transpose_wgrad, x, dy, dw, w.new_empty(size, dtype=dtype), geometry)
    return dx, dw


def mma_workspaces(plan, w):
    """(packed weights, exponents of their scales), to be written."""
    return w.new_empty(plan.packed_size, dtype=torch.float16), w.new_empty(plan.rows, dtype=torch.int32)


def _packed(w):
    return w.new_empty(packed_weight_size(w.shape), dtype=interop_accumulator_dtype(w))


# ----------------------------------------------------------------------------------------------------------------------
# modelnew/functional/conv_bn_pool.py
#
# All five operators of ModelNew in three main kernels forward, with the pooling in the convolution's epilogue.

_DTYPES = {dtype: getattr(torch, dtype.__name__) for dtype in conv_bn_pool_DTYPES}


class _Fused(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, w, conv_bias, weight, bias, group_weight, group_bias, running_mean, running_var, options, keep):
        tensors = [dense(t) for t in (x, w, conv_bias, weight, bias, group_weight, group_bias)]
        x, w, conv_bias, weight, bias, group_weight, group_bias = tensors
        x = aligned(x)
        plan, geometry, groups = options["plan"], options["geometry"], options["groups"]
        sizes = buffers(plan, x.shape, groups, options["training"], keep)
        written = {name: x.new_empty(shape, dtype=_DTYPES[dtype]) for name, (shape, dtype) in sizes.items()}
        out = x.new_empty(sizes["pooled"][0])
        settings = {name: options[name] for name in ("plan", "training", "momentum", "eps", "groups", "group_eps")}

        def update(running_mean, running_var):
            tensors = (x, w, conv_bias, running_mean, running_var, weight, bias, group_weight, group_bias, out)
            run(conv_bn_pool_forward, *tensors, *written.values(), names=tuple(written), **settings)

        run_updating(update, running_mean, running_var, options["training"])
        if keep:
            kept = [written[name] for name in _KEPT]
            ctx.save_for_backward(x, w, conv_bias, weight, bias, group_weight, group_bias, *kept)
            ctx.options, ctx.geometry, ctx.numerics = settings, geometry, resolve(options["numerics"], x)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, dout):
        x, w, conv_bias, weight, bias, group_weight, group_bias, *kept = ctx.saved_tensors
        kept = dict(zip(_KEPT, kept, strict=True))
        need = ctx.needs_input_grad
        pooled, mean, invstd = kept["pooled"], kept["mean"], kept["invstd"]
        g = torch.empty_like(pooled)
        batch_partials, group_partials = (mean.new_empty((2, mean.numel(), x.shape[0])) for _ in range(2))
        groups = (kept["group_mean"], kept["group_invstd"])
        tensors = (dense(dout), pooled, mean, invstd, weight, bias, group_weight, *groups)
        run(pooled_gradients, *tensors, g, batch_partials, group_partials)
        sums, dweight, dbias = _combine(batch_partials, weight, bias, need[3], need[4])
        dgroup_weight = dgroup_bias = None
        if need[5] or need[6]:
            _, dgroup_weight, dgroup_bias = _combine(group_partials, group_weight, group_bias, need[5], need[6])
        dx = dw = dconv_bias = None
        training = ctx.options["training"]
        if need[2]:
            # Batch norm takes the bias out of its own batch, so there it has no influence at all.
            dconv_bias = torch.zeros_like(conv_bias) if training else (sums[0] * invstd).to(conv_bias.dtype)
            if not training and weight is not None:
                dconv_bias *= weight
        if need[0] or need[1]:
            dy = x.new_empty(output_shape(x.shape, w.shape, ctx.geometry))
            tensors = (
                g,
                *(kept[name] for name in ("taps", "saved", "exponents", "unit_exponents")),
                mean,
                invstd,
                weight,
            )
            run(conv_output_gradient, *tensors, sums if training else None, dy, plan=ctx.options["plan"])
            dx, dw = conv_gradients(x, w, dy, ctx.geometry, ctx.numerics, *need[:2])
        return dx, dw, dconv_bias, dweight, dbias, dgroup_weight, dgroup_bias, *[None] * 4


_KEPT = ("pooled", "taps", "saved", "exponents", "unit_exponents", "mean", "invstd", "group_mean", "group_invstd")


def _combine(partials, weight, bias, need_weight, need_bias):
    """(sums over the batch, dweight, dbias), the gradients None where not needed."""
    sums = partials.new_empty(partials.shape[:2])
    dweight = torch.empty_like(weight) if need_weight else None
    dbias = torch.empty_like(bias) if need_bias else None
    run(batch_norm_backward_combine, partials, sums, dweight, dbias)
    return sums, dweight, dbias


def fused_plan(x, conv_weight, padding, num_groups, numerics, others=()):
    """(plan, None) if the fused kernels take the model on x, else (None, the reason). others: the other parameters."""
    if torch.is_autocast_enabled(x.device.type):
        return None, "autocast gives the operators different dtypes"
    if {t.dtype for t in (x, conv_weight, *others) if t is not None} != {x.dtype}:
        return None, "input and parameters have different dtypes"
    plan, reason = tensor_core_plan(x, conv_weight.shape, _geometry(padding), numerics)
    reason = reason or obstacle(plan, num_groups)
    return (None, reason) if reason else (plan, None)


def _geometry(padding):
    return Geometry((1, 1), pair(padding, "padding"), (0, 0), (1, 1), 1)


def conv_bn_tanh_max_pool_group_norm(
    input: torch.Tensor,
    running_mean: torch.Tensor | None,
    running_var: torch.Tensor | None,
    weight: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    *,
    conv_weight: torch.Tensor,
    conv_bias: torch.Tensor | None = None,
    padding: int | tuple[int, int] = 0,
    num_groups: int,
    group_weight: torch.Tensor | None = None,
    group_bias: torch.Tensor | None = None,
    group_eps: float = 1e-5,
    numerics: str = "auto",
) -> torch.Tensor:
    """group_norm(max_pool2d(tanh(batch_norm(conv_transpose2d(input, conv_weight, conv_bias, padding=padding))), 2)).

    input: [N, Cin, H, W]; conv_weight: [Cin, Cout, KH, KW]; all others per channel (Cout,), or None as in batch_norm
    and group_norm. One dtype for all: float32, float16 or bfloat16. For shapes that the tensor-core kernels take
    (`modelnew.explain` tells); ValueError with the reason for others, and batch_norm's errors.
    Returns [N, Cout, OH/2, OW/2], rounded down.
    """
    check_numerics(numerics)
    others = (conv_bias, running_mean, running_var, weight, bias, group_weight, group_bias)
    one_device((input, conv_weight, *others))
    geometry = _geometry(padding)
    shape = output_shape(input.shape, conv_weight.shape, geometry)
    check_batch_norm(input.new_empty(1).expand(shape), running_mean, running_var, weight, bias, training, momentum, eps)
    for name, tensor in (("conv_bias", conv_bias), ("group_weight", group_weight), ("group_bias", group_bias)):
        if tensor is not None and tensor.shape != (shape[1],):
            raise ValueError(f"{name} must have shape ({shape[1]},), received {tuple(tensor.shape)}")
    if num_groups < 1 or shape[1] % num_groups:
        raise ValueError(f"num_groups must divide the {shape[1]} channels, received {num_groups}")
    plan, reason = fused_plan(input, conv_weight, padding, num_groups, numerics, others)
    if not plan:
        raise ValueError(f"the fused kernels do not take this: {reason}")
    options = {
        "plan": plan,
        "geometry": geometry,
        "training": bool(training),
        "momentum": momentum,
        "eps": eps,
        "groups": num_groups,
        "group_eps": group_eps,
        "numerics": numerics,
    }
    tensors = (input, conv_weight, conv_bias, weight, bias, group_weight, group_bias)
    keep = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
    return _Fused.apply(*tensors, running_mean, running_var, options, keep)


# ----------------------------------------------------------------------------------------------------------------------
# modelnew/layers.py
#
# The five operators as drop-in torch.nn modules: same arguments, parameters, buffers, state dicts and initialisation.
#
# They derive from torch.nn.Module itself, so what torch does for its own layer classes passes them over: above all
# torch.nn.SyncBatchNorm.convert_sync_batchnorm, which leaves this BatchNorm2d as it is, synchronising nothing.

class ConvTranspose2d(nn.Module):
    """See torch.nn.ConvTranspose2d and `modelnew.functional.conv_transpose2d`. numerics: see `modelnew.numerics`."""

    extra_repr = nn.ConvTranspose2d.extra_repr

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        stride: int | tuple[int, int] = 1,
        padding: int | tuple[int, int] = 0,
        output_padding: int | tuple[int, int] = 0,
        groups: int = 1,
        bias: bool = True,
        dilation: int | tuple[int, int] = 1,
        padding_mode: str = "zeros",
        device=None,
        dtype=None,
        *,
        numerics: str = "auto",
    ):
        super().__init__()
        check_numerics(numerics)
        if padding_mode != "zeros":
            raise ValueError(f"ConvTranspose2d pads with zeros only, received padding_mode={padding_mode!r}")
        if groups <= 0 or in_channels % groups or out_channels % groups:
            raise ValueError(
                f"groups must be positive and divide in_channels and out_channels, received groups={groups}, "
                f"in_channels={in_channels}, out_channels={out_channels}"
            )
        self.in_channels = in_channels
        self.out_channels = out_channels
        self.kernel_size = pair(kernel_size, "kernel_size")
        self.stride = pair(stride, "stride")
        self.padding = pair(padding, "padding")
        self.dilation = pair(dilation, "dilation")
        self.output_padding = pair(output_padding, "output_padding")
        self.groups = groups
        self.padding_mode = padding_mode
        self.numerics = numerics
        shape = (in_channels, out_channels // groups, *self.kernel_size)
        self.weight = nn.Parameter(torch.empty(shape, device=device, dtype=dtype))
        if bias:
            self.bias = nn.Parameter(torch.empty(out_channels, device=device, dtype=dtype))
        else:
            self.register_parameter("bias", None)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draws weight, then bias, from torch's distributions, in torch's order."""
        nn.init.kaiming_uniform_(self.weight, a=math.sqrt(5))
        fan_in = math.prod(self.weight.shape[1:])
        if self.bias is not None:
            bound = 1 / math.sqrt(fan_in) if fan_in else 0
            nn.init.uniform_(self.bias, -bound, bound)


class BatchNorm2d(nn.Module):
    """See torch.nn.BatchNorm2d and `modelnew.functional.batch_norm`. A refused call leaves the buffers as they were."""

    _version = 2  # of the state dict: 2 has num_batches_tracked
    extra_repr = nn.BatchNorm2d.extra_repr

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        device=None,
        dtype=None,
        *,
        bias: bool = True,
    ):
        super().__init__()
        self.num_features = num_features
        self.eps = eps
        self.momentum = momentum
        self.affine = affine
        self.track_running_stats = track_running_stats
        _register_affine(self, num_features, affine, bias, device, dtype)
        mean = var = count = None
        if track_running_stats:
            mean = torch.empty(num_features, device=device, dtype=dtype)
            var = torch.empty(num_features, device=device, dtype=dtype)
            count = torch.tensor(0, device=device, dtype=torch.long)
        self.register_buffer("running_mean", mean)
        self.register_buffer("running_var", var)
        self.register_buffer("num_batches_tracked", count)
        self.reset_parameters()

    def reset_running_stats(self) -> None:
        """Forgets what training has seen: mean 0, variance 1, no batches."""
        if self.track_running_stats:
            self.running_mean.zero_()
            self.running_var.fill_(1)
            self.num_batches_tracked.zero_()

    def reset_parameters(self) -> None:
        """Weight 1, bias 0, and `reset_running_stats`."""
        self.reset_running_stats()
        _reset_affine(self)

    def apply_with(self, operation, input: torch.Tensor, **options) -> torch.Tensor:
        """operation(input, running_mean, running_var, weight, bias, training, momentum, eps, **options), as this layer
        calls `functional.batch_norm`: for operations that fuse a batch norm with what follows it.

        Counts the batch once the operation has succeeded.
        """
        if input.dim() != 4:
            raise ValueError(f"expected 4D input (got {input.dim()}D input of shape {tuple(input.shape)})")
        updating = self.training and self.track_running_stats
        counting = updating and self.num_batches_tracked is not None
        momentum = self.momentum
        if momentum is None:  # the average over all batches
            momentum = 1 / (float(self.num_batches_tracked) + 1) if counting else 0.0
        use_buffers = updating or not self.training
        training = self.training or (self.running_mean is None and self.running_var is None)
        output = operation(
            input,
            self.running_mean if use_buffers else None,
            self.running_var if use_buffers else None,
            self.weight,
            self.bias,
            training,
            momentum,
            self.eps,
            **options,
        )
        if counting:
            self.num_batches_tracked.add_(1)
        return output


class GroupNorm(nn.Module):
    """See torch.nn.GroupNorm and `modelnew.functional.group_norm`."""

    extra_repr = nn.GroupNorm.extra_repr

    def __init__(
        self,
        num_groups: int,
        num_channels: int,
        eps: float = 1e-5,
        affine: bool = True,
        device=None,
        dtype=None,
        *,
        bias: bool = True,
    ):
        super().__init__()
        if num_groups <= 0 or num_channels % num_groups:
            raise ValueError(
                f"num_groups must be positive and divide num_channels, received {num_groups} and {num_channels}"
            )
        self.num_groups = num_groups
        self.num_channels = num_channels
        self.eps = eps
        self.affine = affine
        _register_affine(self, num_channels, affine, bias, device, dtype)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Weight 1, bias 0."""
        _reset_affine(self)


def _register_affine(module, channels, affine, bias, device, dtype):
    for name, wanted in (("weight", affine), ("bias", affine and bias)):
        parameter = nn.Parameter(torch.empty(channels, device=device, dtype=dtype)) if wanted else None
        module.register_parameter(name, parameter)


def _reset_affine(module):
    if module.weight is not None:
        nn.init.ones_(module.weight)
    if module.bias is not None:
        nn.init.zeros_(module.bias)


# ----------------------------------------------------------------------------------------------------------------------
# modelnew/kernelbench.py

KERNELS: dict[str, str] = {
    "async_copy.cuh": r"""// Copies from global to shared memory that run behind the arithmetic: cp.async on sm_80 and newer, plain copies before.
//
// A thread issues copies, closes a group of them by cp_async_commit(), and sees its own copies after cp_async_wait<N>(), which leaves
// at most the N youngest groups in flight; the other threads of the block see them after a __syncthreads() that follows.
#pragma once

// 16 bytes, both addresses multiples of 16. Not valid: writes zeros, and `global` is not read.
__device__ inline void cp_async_16(void* shared, const void* global, bool valid) {
#ifdef CUPY_KERNELS_EMULATOR
    emulator::copy_async(shared, global, 16, valid);
#elif __CUDA_ARCH__ >= 800
    unsigned to = (unsigned)__cvta_generic_to_shared(shared);
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(global), "r"(valid ? 16 : 0) : "memory");
#else
    *(uint4*)shared = valid ? *(const uint4*)global : make_uint4(0, 0, 0, 0);
#endif
}

__device__ inline void cp_async_commit() {
#ifdef CUPY_KERNELS_EMULATOR
    emulator::copy_commit();
#elif __CUDA_ARCH__ >= 800
    asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}

template <int PENDING_GROUPS> __device__ inline void cp_async_wait() {
#ifdef CUPY_KERNELS_EMULATOR
    emulator::copy_wait(PENDING_GROUPS);
#elif __CUDA_ARCH__ >= 800
    asm volatile("cp.async.wait_group %0;" ::"n"(PENDING_GROUPS) : "memory");
#endif
}
""",
    "batch_norm.cu": r"""// Batch norm over x [images, channels, plane]: statistics per channel, y = (x - mean) invstd weight + bias or tanh of that, and
// the gradients.
//
// Thread mapping: a channel's images * plane values are cut into chunks of blockDim.x * ITEMS; block chunk * channels + c takes one
// chunk of channel c, in packs of WIDTH neighbours, so that neighbouring blocks read neighbouring planes. Reductions have two stages:
// each block writes two partial results to partials [2][channels][chunks]; then one block a channel combines them. Order and chunks
// depend on the shape alone.
//
// Saved for the backward: mean and invstd = 1/sqrt(variance + eps), both acc_t [channels], x, and y with tanh.
// dx = weight invstd (g - sum(g)/count - xhat sum(g xhat)/count), where xhat = (x - mean) invstd, g = dy, or dy (1 - y^2) with tanh;
// with given (running) statistics dx = weight invstd g.
//
// Macros: scalar_t, acc_t, param_t (weight, bias and their gradients; running statistics), WIDTH (a divisor of plane; pointers are
// aligned to a pack), ITEMS (values per thread, a multiple of WIDTH). Whether there is a tanh is a run-time argument: its branch
// is uniform and the kernels wait for memory, so that it costs less than twice as many variants would.
#include "batch_norm.cuh"
#include "tanh.cuh"

typedef Packed<scalar_t, WIDTH> Pack;
enum { PACKS = ITEMS / WIDTH };
enum { BATCH = sizeof(Pack) <= 4 ? 8 : 4 };  // packs in flight per thread; half of it per tensor where several are read

// Walks over one thread's packs of the block's chunk, without a division per pack.
struct ChannelWalk {
    i64 channel, chunk;
    int size;    // values in the chunk
    i64 offset;  // of the current pack in the tensor
    i64 jump, skip;
    int left, plane, jump_within;  // left: values to the end of the plane

    __device__ ChannelWalk(i64 channels, i64 plane_size, i64 count) {
        const int far = 1 << 30;  // a chunk is smaller, so distances beyond make no difference
        unsigned stride = blockDim.x * WIDTH;
        chunk = blockIdx.x / (unsigned)channels;
        channel = blockIdx.x - chunk * channels;
        i64 first = chunk * blockDim.x * ITEMS, index = first + threadIdx.x * WIDTH;
        size = (int)min((i64)blockDim.x * ITEMS, count - first);
        plane = (int)min(plane_size, (i64)far);
        unsigned jump_images = stride / plane;
        jump_within = stride - jump_images * plane;
        skip = (channels - 1) * plane_size;
        jump = stride + jump_images * skip;
        i64 image = index / plane_size, within = index - image * plane_size;
        left = (int)min(plane_size - within, (i64)far);
        offset = (image * channels + channel) * plane_size + within;
    }
    __device__ bool inside(int pack) const { return (int)((pack * blockDim.x + threadIdx.x) * WIDTH) < size; }
    __device__ void advance() {
        offset += jump;
        left -= jump_within;
        if (left <= 0) {
            left += plane;
            offset += skip;
        }
    }
};

// Number of values in a chunk.
__device__ inline i64 chunk_count(i64 count, i64 chunk, i64 chunk_size) { return min(chunk_size, count - chunk * chunk_size); }

// Means are kept relative to the channel's first value: the rounding error of a large mean must not enter the variance.
__device__ inline acc_t origin_of(const scalar_t* x, i64 channel, i64 plane) { return finite_or_zero(to_acc(x[channel * plane])); }

// partials: mean - origin, and sum of (x - mean)^2, of each chunk.
//
// A thread takes a batch's mean first and its squares relative to that, both from registers, then joins batches as Chan et al.
// do: nothing cancels, whatever the mean is and wherever outliers are.
extern "C" __global__ void __launch_bounds__(256, 3) batch_norm_partials(
    const scalar_t* __restrict__ x, acc_t* __restrict__ partials, i64 channels, i64 plane, i64 count, i64 chunks) {
    __shared__ acc_t scratch[32];
    ChannelWalk walk(channels, plane, count);
    acc_t origin = origin_of(x, walk.channel, plane);
    acc_t n = 0, sum = 0, m2 = 0;  // of the thread's values - origin
    #pragma unroll 1
    for (int first = 0; first < PACKS && walk.inside(first); first += BATCH) {
        Pack in[BATCH];
        bool inside[BATCH];
        #pragma unroll
        for (int b = 0; b < BATCH; b++) {
            inside[b] = walk.inside(first + b);
            if (inside[b]) in[b] = *(const Pack*)(x + walk.offset);
            walk.advance();
        }
        acc_t k = 0, total = 0, rest = 0, squares = 0;
        #pragma unroll
        for (int b = 0; b < BATCH; b++) {
            if (!inside[b]) continue;
            k += WIDTH;
            #pragma unroll
            for (int i = 0; i < WIDTH; i++) total += to_acc(in[b].v[i]);
        }
        acc_t inverse = 1 / k, shift = finite_or_zero(total * inverse);
        #pragma unroll
        for (int b = 0; b < BATCH; b++) {
            if (!inside[b]) continue;
            #pragma unroll
            for (int i = 0; i < WIDTH; i++) {
                acc_t d = to_acc(in[b].v[i]) - shift;
                rest += d;
                squares += d * d;
            }
        }
        acc_t distance = shift - origin + rest * inverse, step = n > 0 ? distance - sum / n : (acc_t)0;
        m2 += squares - rest * rest * inverse + step * step * (n * k / (n + k));
        sum += k * distance;
        n += k;
    }
    acc_t mean = n > 0 ? sum / n : (acc_t)0;
    acc_t chunk_mean = block_sum(sum, scratch) / walk.size;
    acc_t distance = mean - chunk_mean;
    acc_t chunk_m2 = block_sum(m2 + n * distance * distance, scratch);
    if (threadIdx.x == 0) {
        partials[walk.channel * chunks + walk.chunk] = chunk_mean;
        partials[(channels + walk.channel) * chunks + walk.chunk] = chunk_m2;
    }
}

// One block a channel: combines the chunks; updates the running statistics where they are not null.
extern "C" __global__ void __launch_bounds__(256) batch_norm_statistics(
    const scalar_t* __restrict__ x, const acc_t* __restrict__ partials, INOUT param_t* running_mean, INOUT param_t* running_var,
    acc_t* __restrict__ mean, acc_t* __restrict__ invstd, acc_t momentum, acc_t eps, i64 channels, i64 plane, i64 count, i64 chunks) {
    __shared__ acc_t scratch[32];
    i64 channel = blockIdx.x;
    const acc_t* means = partials + channel * chunks;
    const acc_t* m2s = partials + (channels + channel) * chunks;
    if (count == 0) {  // nothing to learn from an empty batch, and nothing will be normalised
        if (threadIdx.x == 0) mean[channel] = invstd[channel] = 0;
        return;
    }
    acc_t sum = 0, m2 = 0;
    for (i64 k = threadIdx.x; k < chunks; k += blockDim.x) sum += chunk_count(count, k, (i64)blockDim.x * ITEMS) * means[k];
    acc_t total_mean = block_sum(sum, scratch) / count;
    for (i64 k = threadIdx.x; k < chunks; k += blockDim.x) {
        acc_t distance = means[k] - total_mean;
        m2 += m2s[k] + chunk_count(count, k, (i64)blockDim.x * ITEMS) * distance * distance;
    }
    m2 = block_sum(m2, scratch);
    if (threadIdx.x) return;
    total_mean += origin_of(x, channel, plane);
    mean[channel] = total_mean;
    invstd[channel] = 1 / sqrt(m2 / count + eps);
    if (running_mean) {
        running_mean[channel] = from_acc<param_t>((1 - momentum) * to_acc(running_mean[channel]) + momentum * total_mean);
        running_var[channel] = from_acc<param_t>((1 - momentum) * to_acc(running_var[channel]) + momentum * (m2 / (count - 1)));
    }
}

// One thread a channel: mean and invstd from the running statistics.
extern "C" __global__ void __launch_bounds__(256) batch_norm_eval_statistics(
    const param_t* __restrict__ running_mean, const param_t* __restrict__ running_var, acc_t* __restrict__ mean,
    acc_t* __restrict__ invstd, acc_t eps, i64 channels) {
    i64 channel = (i64)blockIdx.x * blockDim.x + threadIdx.x;
    if (channel >= channels) return;
    mean[channel] = to_acc(running_mean[channel]);
    invstd[channel] = 1 / sqrt(to_acc(running_var[channel]) + eps);
}

extern "C" __global__ void __launch_bounds__(256) batch_norm_apply(
    const scalar_t* __restrict__ x, const acc_t* __restrict__ mean, const acc_t* __restrict__ invstd, const param_t* __restrict__ weight,
    const param_t* __restrict__ bias, scalar_t* __restrict__ y, int with_tanh, i64 channels, i64 plane, i64 count) {
    ChannelWalk walk(channels, plane, count);
    i64 channel = walk.channel;
    acc_t m = mean[channel], s = invstd[channel], w = bn_weight(weight, channel), b = bn_bias(bias, channel);
    #pragma unroll 1
    for (int first = 0; first < PACKS; first += BATCH) {
        Pack in[BATCH];
        i64 offsets[BATCH];
        #pragma unroll
        for (int j = 0; j < BATCH; j++) {
            offsets[j] = walk.inside(first + j) ? walk.offset : -1;
            if (offsets[j] >= 0) in[j] = *(const Pack*)(x + offsets[j]);
            walk.advance();
        }
        #pragma unroll
        for (int j = 0; j < BATCH; j++) {
            if (offsets[j] < 0) continue;
            Pack out;
            #pragma unroll
            for (int i = 0; i < WIDTH; i++) {
                acc_t v = bn_affine(bn_normalise(to_acc(in[j].v[i]), m, s), w, b);
                out.v[i] = from_acc<scalar_t>(with_tanh ? tanh_of(v) : v);
            }
            *(Pack*)(y + offsets[j]) = out;
        }
    }
}

// Gradient at batch norm's output.
__device__ inline acc_t gradient_of(scalar_t dy, scalar_t y, bool with_tanh) {
    return with_tanh ? to_acc(dy) * tanh_slope(to_acc(y)) : to_acc(dy);
}

// partials: sum of g, and sum of g xhat, of each chunk. y is null without tanh.
extern "C" __global__ void __launch_bounds__(256, 3) batch_norm_backward_partials(
    const scalar_t* __restrict__ dy, const scalar_t* __restrict__ x, const scalar_t* __restrict__ y, const acc_t* __restrict__ mean,
    const acc_t* __restrict__ invstd, acc_t* __restrict__ partials, i64 channels, i64 plane, i64 count, i64 chunks) {
    __shared__ acc_t scratch[32];
    ChannelWalk walk(channels, plane, count);
    i64 channel = walk.channel;
    acc_t m = mean[channel], s = invstd[channel], sum = 0, dot = 0;
    #pragma unroll 1
    for (int first = 0; first < PACKS; first += BATCH / 2) {
        Pack gradient[BATCH / 2], in[BATCH / 2], out[BATCH / 2];
        bool inside[BATCH / 2];
        #pragma unroll
        for (int j = 0; j < BATCH / 2; j++) {
            inside[j] = walk.inside(first + j);
            if (inside[j]) {
                gradient[j] = *(const Pack*)(dy + walk.offset);
                in[j] = *(const Pack*)(x + walk.offset);
                if (y) out[j] = *(const Pack*)(y + walk.offset);
            }
            walk.advance();
        }
        #pragma unroll
        for (int j = 0; j < BATCH / 2; j++) {
            if (!inside[j]) continue;
            #pragma unroll
            for (int i = 0; i < WIDTH; i++) {
                acc_t g = gradient_of(gradient[j].v[i], out[j].v[i], y);
                sum += g;
                dot += g * bn_normalise(to_acc(in[j].v[i]), m, s);
            }
        }
    }
    sum = block_sum(sum, scratch);
    dot = block_sum(dot, scratch);
    if (threadIdx.x == 0) {
        partials[walk.channel * chunks + walk.chunk] = sum;
        partials[(channels + walk.channel) * chunks + walk.chunk] = dot;
    }
}

// One block a channel: sums [2][channels] over the chunks, which are also the gradients of bias and weight, where not null.
extern "C" __global__ void __launch_bounds__(256) batch_norm_backward_sums(
    const acc_t* __restrict__ partials, acc_t* __restrict__ sums, param_t* __restrict__ dweight, param_t* __restrict__ dbias, i64 channels,
    i64 chunks) {
    __shared__ acc_t scratch[32];
    i64 channel = blockIdx.x;
    acc_t sum = 0, dot = 0;
    for (i64 k = threadIdx.x; k < chunks; k += blockDim.x) {
        sum += partials[channel * chunks + k];
        dot += partials[(channels + channel) * chunks + k];
    }
    sum = block_sum(sum, scratch);
    dot = block_sum(dot, scratch);
    if (threadIdx.x) return;
    sums[channel] = sum;
    sums[channels + channel] = dot;
    if (dbias) dbias[channel] = from_acc<param_t>(sum);
    if (dweight) dweight[channel] = from_acc<param_t>(dot);
}

// sums: of the batch where its own statistics were applied, null where given ones were: then x is not read.
extern "C" __global__ void __launch_bounds__(256) batch_norm_backward_apply(
    const scalar_t* __restrict__ dy, const scalar_t* __restrict__ x, const scalar_t* __restrict__ y, const acc_t* __restrict__ mean,
    const acc_t* __restrict__ invstd, const param_t* __restrict__ weight, const acc_t* __restrict__ sums, scalar_t* __restrict__ dx,
    i64 channels, i64 plane, i64 count) {
    ChannelWalk walk(channels, plane, count);
    i64 channel = walk.channel;
    acc_t m = mean[channel], s = invstd[channel], scale = bn_weight(weight, channel) * s;
    acc_t mean_g = sums ? sums[channel] / count : (acc_t)0, mean_dot = sums ? sums[channels + channel] / count : (acc_t)0;
    #pragma unroll 1
    for (int first = 0; first < PACKS; first += BATCH / 2) {
        Pack gradient[BATCH / 2], in[BATCH / 2], out[BATCH / 2];
        i64 offsets[BATCH / 2];
        #pragma unroll
        for (int j = 0; j < BATCH / 2; j++) {
            offsets[j] = walk.inside(first + j) ? walk.offset : -1;
            if (offsets[j] >= 0) {
                gradient[j] = *(const Pack*)(dy + offsets[j]);
                if (sums) in[j] = *(const Pack*)(x + offsets[j]);
                if (y) out[j] = *(const Pack*)(y + offsets[j]);
            }
            walk.advance();
        }
        #pragma unroll
        for (int j = 0; j < BATCH / 2; j++) {
            if (offsets[j] < 0) continue;
            Pack result;
            #pragma unroll
            for (int i = 0; i < WIDTH; i++) {
                acc_t g = gradient_of(gradient[j].v[i], out[j].v[i], y);
                if (sums) g -= mean_g + bn_normalise(to_acc(in[j].v[i]), m, s) * mean_dot;
                result.v[i] = from_acc<scalar_t>(g * scale);
            }
            *(Pack*)(dx + offsets[j]) = result;
        }
    }
}
""",
    "batch_norm.cuh": r"""// Batch norm's arithmetic on one value, as every kernel that applies it computes it: y = (x - mean) invstd weight + bias.
#pragma once
#include "common.cuh"

__device__ inline acc_t bn_normalise(acc_t x, acc_t mean, acc_t invstd) { return (x - mean) * invstd; }
__device__ inline acc_t bn_affine(acc_t xhat, acc_t weight, acc_t bias) { return xhat * weight + bias; }

// Weight and bias of channel c; null pointers stand for 1 and 0.
template <class P> __device__ inline acc_t bn_weight(const P* weight, i64 c) { return weight ? (acc_t)to_acc(weight[c]) : (acc_t)1; }
template <class P> __device__ inline acc_t bn_bias(const P* bias, i64 c) { return bias ? (acc_t)to_acc(bias[c]) : (acc_t)0; }

// What sums are taken relative to, so that the rounding error of a large mean stays out of a small variance.
__device__ inline acc_t finite_or_zero(acc_t v) { return v - v == 0 ? v : (acc_t)0; }
""",
    "common.cuh": r"""// Types, conversions and reductions that the kernels share. Includes nothing of a CUDA toolkit: pip wheels have no headers.
//
// scalar_t: type of the tensors in memory (float, double, half_t, bf16_t). acc_t: type of the arithmetic (float; double for double).
// A pointer parameter that is neither const nor INOUT is an output that the kernel writes in full.
#pragma once

typedef long long i64;
typedef unsigned char u8;
#define INOUT

struct half_t { unsigned short bits; };
struct bf16_t { unsigned short bits; };

// W neighbouring elements, read and written in one access.
template <class U, int W> struct __align__(W * sizeof(U)) Packed { U v[W]; };

#ifndef CUPY_KERNELS_EMULATOR
#define DYNAMIC_SHARED(U, name) \
    extern __shared__ __align__(128) char dynamic_shared_bytes[]; \
    U* name = (U*)dynamic_shared_bytes
#endif

__device__ inline float to_acc(float v) { return v; }
__device__ inline double to_acc(double v) { return v; }
__device__ inline float to_acc(bf16_t v) { return __uint_as_float((unsigned)v.bits << 16); }
#ifdef CUPY_KERNELS_EMULATOR
static inline float to_acc(half_t v) {
    unsigned magnitude = v.bits & 0x7FFF, sign = (unsigned)(v.bits & 0x8000) << 16;
    if (magnitude >= 0x7C00) return __uint_as_float(sign | 0x7F800000 | (magnitude & 0x3FF) << 13);
    float scaled = __uint_as_float(magnitude << 13) * 0x1p112f;  // exact, denormals too
    return __uint_as_float(sign | __float_as_uint(scaled));
}
#else
__device__ inline float to_acc(half_t v) {
    float f;
    asm("cvt.f32.f16 %0, %1;" : "=f"(f) : "h"(v.bits));
    return f;
}
#endif

template <class U> __device__ inline U from_acc(float v);
template <class U> __device__ inline U from_acc(double v);
template <> __device__ inline float from_acc<float>(float v) { return v; }
template <> __device__ inline float from_acc<float>(double v) { return (float)v; }
template <> __device__ inline double from_acc<double>(double v) { return v; }
// Round to nearest even; NaN stays NaN.
template <> __device__ inline bf16_t from_acc<bf16_t>(float v) {
    unsigned u = __float_as_uint(v);
    bf16_t r;
    r.bits = (u & 0x7FFFFFFF) > 0x7F800000 ? (u >> 16 & 0x8000) | 0x7FC0 : (u + 0x7FFF + (u >> 16 & 1)) >> 16;
    return r;
}
#ifdef CUPY_KERNELS_EMULATOR
template <> inline half_t from_acc<half_t>(float v) {
    unsigned u = __float_as_uint(v), sign = u >> 16 & 0x8000, magnitude = u & 0x7FFFFFFF;
    half_t r;
    if (magnitude > 0x7F800000) r.bits = sign | 0x7E00;
    else if (magnitude >= 0x477FF000) r.bits = sign | 0x7C00;  // 65520 and more round to infinity
    else if (magnitude < 0x38800000)                          // below 2^-14: the float addition rounds to 2^-24 steps
        r.bits = sign | (__float_as_uint(__uint_as_float(magnitude) + 0.5f) - 0x3F000000);
    else r.bits = sign | ((magnitude + 0xFFF + (magnitude >> 13 & 1)) >> 13) - (112 << 10);
    return r;
}
#else
template <> __device__ inline half_t from_acc<half_t>(float v) {
    half_t r;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(r.bits) : "f"(v));
    return r;
}
#endif

// CuPy compiles with -ftz=true, which flushes denormals in comparisons too; PTX's own comparison flushes nothing. greater is
// IEEE's a > b: false where either is NaN.
template <class A> __device__ inline bool is_nan(A v) { return v != v; }
#ifdef CUPY_KERNELS_EMULATOR
static inline bool greater(float a, float b) { return a > b; }
#else
__device__ inline bool greater(float a, float b) {
    int r;
    asm("{\n .reg .pred p;\n setp.gt.f32 p, %1, %2;\n selp.b32 %0, 1, 0, p;\n}" : "=r"(r) : "f"(a), "f"(b));
    return r;
}
#endif
__device__ inline bool greater(double a, double b) { return a > b; }

// Division of numbers below 2^31 by one that all threads share: the first quotient is right or one too small.
struct Divisor {
    unsigned d, reciprocal;
    __device__ explicit Divisor(unsigned d) : d(d), reciprocal(0xFFFFFFFFu / d) {}
    __device__ unsigned divide(unsigned n, unsigned& remainder) const {
        unsigned q = (unsigned long long)n * reciprocal >> 32;
        remainder = n - q * d;
        if (remainder >= d) remainder -= d, q++;
        return q;
    }
};

// Sum over a block of a multiple of 32 threads in a fixed order; every thread gets it. `scratch` holds 32 values and is
// free again after the next __syncthreads().
template <class A> __device__ inline A block_sum(A v, A* scratch) {
    for (int lanes = 16; lanes > 0; lanes >>= 1) v += __shfl_xor_sync(0xFFFFFFFFu, v, lanes);
    if (threadIdx.x % 32 == 0) scratch[threadIdx.x / 32] = v;
    __syncthreads();
    A total = 0;
    for (unsigned w = 0; w < blockDim.x / 32; w++) total += scratch[w];
    __syncthreads();
    return total;
}
""",
    "conv_bn_pool.cu": r"""// Transposed convolution on tensor cores (conv_mma.cuh), and what batch norm, tanh and 2x2 max pooling need of it.
//
// Batch norm and tanh are monotone in each channel, so max pooling can come first: of each 2x2 window it takes the largest sum where
// gamma, batch norm's weight, is positive, the smallest where it is negative, and the first where it is zero.
//
// All values are without the convolution's bias, which batch norm's mean takes out again:
//     pooled [N, M, OUT_H / 2, OUT_W / 2]     the chosen sums
//     STATISTICS: partials [3][M][N * UNITS]  count, mean and sum of squared distances of each unit's sums
//     SAVE, for the backward:
//         taps, like pooled                   the chosen corner
//         saved [N, M, WINDOWS, 4]            all sums. SPLIT 1: half_t, times 2^-SAVED_SHIFT as the tensor cores deliver them, so that
//                                             a sum is saved * 2^(SAVED_SHIFT - exponents[m] - unit_exponents[unit]);
//                                             SAVED_SHIFT bounds the sum of all products: nothing overflows. SPLIT 2: float
//         unit_exponents [N * UNITS]
// Macros: those of conv_mma.cuh, param_t (gamma's type), saved_t (half_t, float), STATISTICS, SAVE, SAVED_SHIFT.
#include "conv_mma.cuh"
#include "batch_norm.cuh"

#define POOLED_W (OUT_W / 2)
#define POOLED (OUT_H / 2 * POOLED_W)

// Chan's rule: how the moments of two sets of pixels combine.
struct Merge {
    float share, weight, count;  // of the second set: n2 / n, n1 n2 / n; n
    __device__ Merge(float first, float second) : count(first + second) {
        share = count > 0 ? second / count : 0;
        weight = first * share;
    }
    // x: mean, y: sum of squared distances from it
    __device__ float2 operator()(float2 a, float2 b) const {
        float distance = b.x - a.x;
        return make_float2(a.x + distance * share, a.y + b.y + distance * distance * weight);
    }
};

__device__ inline float quad_sum(float v) {
    v += __shfl_xor_sync(0xFFFFFFFFu, v, 1);
    return v + __shfl_xor_sync(0xFFFFFFFFu, v, 2);
}

enum { OWN = WARP_TILES / 2 };  // windows of a lane
enum { ROWS = 4 };              // channels handled together: 8 would need more registers than there are

__device__ inline float max_or_nan(float a, float b) {
#ifdef CUPY_KERNELS_EMULATOR
    return a > b || is_nan(a) ? a : b;
#elif __CUDA_ARCH__ >= 800
    float larger;
    asm("max.NaN.f32 %0, %1, %2;" : "=f"(larger) : "f"(a), "f"(b));
    return larger;
#endif
}

// For ROWS channels of a lane: mean, and sum of squared distances from it, of the valid values of four lanes. The channels take
// each step together, so that none waits for its own last step.
template <bool FULL>
__device__ inline void moments_of(const float (&v)[ROWS][OWN][4], unsigned valid, float per_count, float (&mean)[ROWS], float (&squares)[ROWS]) {
    #pragma unroll
    for (int i = 0; i < ROWS; i++) mean[i] = squares[i] = 0;
    #pragma unroll
    for (int at = 0; at < OWN * 4; at++)
        #pragma unroll
        for (int i = 0; i < ROWS; i++) mean[i] += FULL || valid >> at & 1 ? v[i][at / 4][at % 4] : 0;
    #pragma unroll
    for (int i = 0; i < ROWS; i++) mean[i] = quad_sum(mean[i]) * per_count;
    #pragma unroll
    for (int at = 0; at < OWN * 4; at++)
        #pragma unroll
        for (int i = 0; i < ROWS; i++) {
            float distance = FULL || valid >> at & 1 ? v[i][at / 4][at % 4] - mean[i] : 0;
            squares[i] += distance * distance;
        }
    #pragma unroll
    for (int i = 0; i < ROWS; i++) squares[i] = quad_sum(squares[i]);
}

struct Pool {
    const param_t* gamma;
    float *pooled, *partials;
    u8* taps;
    saved_t* saved;
    int* unit_exponents;
    const int* exponents;
    float2* moments;  // [WARPS_N][TILE_M] in shared memory: mean and squares of the `seen` pixels of each warp
    int* counts;      // [WARPS_N] in shared memory
    int seen;

    __device__ void turn(const Sums& sums, i64 image, int first_m, int first_window, int end_window, int exponent) {
        bool full = OUT_H % 2 == 0 && OUT_W % 2 == 0 && first_window + OWN * 4 == end_window;
        if (full) windows<true>(sums, image, first_m, first_window, end_window, exponent);
        else windows<false>(sums, image, first_m, first_window, end_window, exponent);
    }

    // FULL: all pixels of the warp exist, which is the usual case and needs no masks.
    template <bool FULL>
    __device__ void windows(const Sums& sums, i64 image, int first_m, int first_window, int end_window, int exponent) {
        // A lane's accumulators are the upper or the lower row of windows. It trades half of them with its neighbour, and then owns
        // OWN whole windows of each channel: those of the n8-tiles 2 t + lane % 2.
        int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
        bool odd = lane % 2;
        i64 plane = image * OUT_CHANNELS + first_m;
        int own_window = first_window + odd * 2 + lane % 4 / 2;  // its t-th window is own_window + 4 t
        float* pooled_rows = pooled + plane * POOLED;
        u8* tap_rows = taps + plane * POOLED;
        Packed<saved_t, 4>* saved_rows = (Packed<saved_t, 4>*)saved + plane * WINDOWS + own_window;
        int targets[OWN];    // position in the pooled plane, or -1
        unsigned valid = 0;  // bit t * 4 + corner
        #pragma unroll
        for (int t = 0; t < OWN; t++) {
            int window = own_window + 4 * t, row = window / WINDOWS_W, column = window % WINDOWS_W;
            bool mine = window < end_window;
            targets[t] = FULL ? window : mine && row < OUT_H / 2 && column < POOLED_W ? row * POOLED_W + column : -1;
            #pragma unroll
            for (int corner = 0; corner < 4; corner++) valid |= (unsigned)(mine && Pixel(window, corner).valid()) << (t * 4 + corner);
        }
        float count = FULL ? OWN * 16 : quad_sum((float)__popc(valid)), per_count = count > 0 ? 1 / count : 0;
        Merge merge(seen, count);
        #pragma unroll
        for (int first = 0; first < 8; first += ROWS) {
            float v[ROWS][OWN][4];
            #pragma unroll
            for (int i = 0; i < ROWS; i++)
                #pragma unroll
                for (int t = 0; t < OWN; t++)
                    #pragma unroll
                    for (int j = 0; j < 2; j++) {
                        float even_tile = sums[(first + i) / 2][2 * t][(first + i) % 2 * 2 + j], odd_tile = sums[(first + i) / 2][2 * t + 1][(first + i) % 2 * 2 + j];
                        float received = __shfl_xor_sync(0xFFFFFFFFu, odd ? even_tile : odd_tile, 1);
                        v[i][t][j] = odd ? received : even_tile;
                        v[i][t][2 + j] = odd ? odd_tile : received;
                    }
            float mean[ROWS], squares[ROWS];
            if (STATISTICS) moments_of<FULL>(v, valid, per_count, mean, squares);
            #pragma unroll
            for (int i = 0; i < ROWS; i++) {
                int m = first_m + (first + i) * 8;
                bool real = OUT_CHANNELS % TILE_M == 0 || m < OUT_CHANNELS;  // the same in all lanes
                ScaleBack scale(real ? exponent + exponents[m] : 0);
                if (STATISTICS && lane % 4 == 0) {
                    float2* place = moments + warp / WARPS_M * TILE_M + warp % WARPS_M * 64 + (first + i) * 8 + lane / 4;
                    *place = merge(seen ? *place : make_float2(0, 0), make_float2(scale(mean[i]), scale(scale(squares[i]))));
                }
                if (!real) continue;
                float weight = bn_weight(gamma, m), sign = weight > 0 ? 1 : weight < 0 ? -1 : 0;
                #pragma unroll
                for (int t = 0; t < OWN; t++) {
                    if (SAVE && (FULL || own_window + 4 * t < end_window)) saved_rows[4 * t + (first + i) * 8 * WINDOWS] = save(v[i][t], scale);
                    if (!FULL && targets[t] < 0) continue;
                    float best = v[i][t][0] * sign;
                    #pragma unroll
                    for (int corner = 1; corner < 4; corner++) best = max_or_nan(best, v[i][t][corner] * sign);
                    int tap = 3;
                    #pragma unroll
                    for (int corner = 2; corner >= 0; corner--) tap = v[i][t][corner] * sign == best ? corner : tap;
                    pooled_rows[targets[t] + (first + i) * 8 * POOLED] = scale(sign == 0 ? v[i][t][0] : best * sign);
                    if (SAVE) tap_rows[targets[t] + (first + i) * 8 * POOLED] = tap;
                }
            }
        }
        seen += (int)count;
    }

    // Corners outside the image are read by nobody.
    __device__ static Packed<half_t, 4> save(const float (&v)[4], const ScaleBack&, half_t*) {
        float shrink = power_of_two(-SAVED_SHIFT);
        uint2 kept = {pack_halves(v[0] * shrink, v[1] * shrink), pack_halves(v[2] * shrink, v[3] * shrink)};
        return *(Packed<half_t, 4>*)&kept;
    }
    __device__ static Packed<float, 4> save(const float (&v)[4], const ScaleBack& scale, float*) {
        return {{scale(v[0]), scale(v[1]), scale(v[2]), scale(v[3])}};
    }
    __device__ static Packed<saved_t, 4> save(const float (&v)[4], const ScaleBack& scale) { return save(v, scale, (saved_t*)0); }

    // Adds up what the warps of a block have seen of each channel, in their order.
    __device__ void finish(int exponent) {
        if (SAVE && threadIdx.x == 0 && blockIdx.y == 0) unit_exponents[blockIdx.x] = exponent;
        if (!STATISTICS) return;
        if (threadIdx.x % (32 * WARPS_M) == 0) counts[threadIdx.x / (32 * WARPS_M)] = seen;
        __syncthreads();
        int m = blockIdx.y * TILE_M + threadIdx.x;
        if (threadIdx.x >= TILE_M || m >= OUT_CHANNELS) return;
        float2 all = moments[threadIdx.x];
        float count = counts[0];
        for (int w = 1; w < WARPS_N; w++) {
            Merge merge(count, counts[w]);
            all = merge(all, moments[w * TILE_M + threadIdx.x]);
            count = merge.count;
        }
        float* to = partials + (i64)m * gridDim.x + blockIdx.x;
        i64 part = (i64)OUT_CHANNELS * gridDim.x;
        to[0] = count, to[part] = all.x, to[2 * part] = all.y;
    }
};

extern "C" __global__ void __launch_bounds__(THREADS, 1) conv_bn_pool(
    const scalar_t* __restrict__ x, const half_t* __restrict__ packed, const int* __restrict__ exponents,
    const param_t* __restrict__ gamma, float* __restrict__ pooled, float* __restrict__ partials, u8* __restrict__ taps,
    saved_t* __restrict__ saved, int* __restrict__ unit_exponents, int ahead) {
    __shared__ unsigned scratch[32];
    __shared__ int counts[WARPS_N];
    DYNAMIC_SHARED(u8, shared);
    Pool epilogue = {gamma, pooled, partials, taps, saved, unit_exponents, exponents, (float2*)(shared + EPILOGUE_OFFSET), counts, 0};
    convolve(x, packed, ahead, shared, scratch, epilogue);
}
""",
    "conv_mma.cuh": r"""// Transposed convolution with stride 1, dilation 1 and one group on tensor cores (sm_80 and newer): loads and main loop.
//
//     sums[n, m, oh, ow] = sum_{k, kh, kw} x[n, k, oh + PAD_H - kh, ow + PAD_W - kw] * w[k, m, kh, kw]
//
// dgrad is the same sum over dy with PAD' = KERNEL - 1 - PAD and flipped, transposed weights (pack_weight_fp16.cu).
//
// Implicit GEMM: channels m are rows, pixels are columns, the sum runs over chunks of input channels and taps. A block owns one
// unit: TILE_M channels and UNIT_PASSES passes of TILE_N pixels of one image. The rows of x that it needs (the band) lie in shared
// memory as fp16 cells [row][column][64 halves]; every tap reads them shifted, by ldmatrix. Weights stream through a ring of STAGES
// (an even number) cp.async stages, one tap of one chunk each. Pixels are ordered by 2x2 windows, so that four neighbouring accumulator columns
// are a pooling window. Each warp owns 64 channels x 8 WARP_TILES pixels. An Epilogue (conv_epilogue.cuh) takes the sums of each turn.
//
// Cells: a zero row comes first, rows outside the image read it; GAP zero cells between rows serve as left and right border.
// PITCH = 4 mod 8 makes the cells of two window rows fall into different banks.
//
// Macros: scalar_t (float, half_t, bf16_t), IN_CHANNELS, OUT_CHANNELS (multiples of 16), IN_H, IN_W, OUT_H, OUT_W, KERNEL_H,
// KERNEL_W, PAD_H, PAD_W, SPLIT (fp16_cells.cuh), WARPS_M, WARPS_N, UNIT_PASSES, BAND_ROWS (rows of x that a unit needs at most),
// RESIDENT (1: all chunks of the band stay in shared memory, 0: each turn loads one after the other), STAGES.
#pragma once
#include "common.cuh"
#include "async_copy.cuh"

#define TAPS (KERNEL_H * KERNEL_W)
#define THREADS (32 * WARPS_M * WARPS_N)
#define TILE_M (64 * WARPS_M)
#define WARP_TILES (8 / SPLIT)  // n8-tiles of a warp; SPLIT 2 needs registers for the second fp16 values
#define TILE_N (8 * WARP_TILES * WARPS_N)
#define GAP (KERNEL_W - 1 > PAD_W ? KERNEL_W - 1 - PAD_W : 0)
#define PITCH ((IN_W + GAP + 3) / 8 * 8 + 4)
#define BAND_CELLS (GAP + (BAND_ROWS + 1) * PITCH)
#define WINDOWS_W ((OUT_W + 1) / 2)
#define WINDOWS ((OUT_H + 1) / 2 * WINDOWS_W)
#define PASS_WINDOWS (TILE_N / 4)
#define UNIT_WINDOWS (UNIT_PASSES * PASS_WINDOWS)
// Pairs of n8-tiles a warp that an image's last windows need; units of one turn do not care.
#define LAST_PAIRS (UNIT_PASSES == 1 ? WARP_TILES / 2 : ((WINDOWS - 1) % PASS_WINDOWS + WARPS_N * 4) / (WARPS_N * 4))
#define UNITS ((WINDOWS + UNIT_WINDOWS - 1) / UNIT_WINDOWS)

#include "fp16_cells.cuh"
#include "mma.cuh"

#define SLICES (CHUNKS > 1 || SPLIT == 2 ? CHUNK_CHANNELS / 16 : IN_CHANNELS / 16)  // of 16 channels; those past IN_CHANNELS are zero
#define SLICES_AT_ONCE (SPLIT == 1 && RESIDENT && THREADS == 256 ? 4 : 1)  // else ptxas hoists the loads of more until registers spill
enum { RING_OFFSET = (RESIDENT ? CHUNKS : 1) * BAND_CELLS * CELL_BYTES };
enum { EPILOGUE_OFFSET = RING_OFFSET + STAGES * STAGE_BYTES };  // in dynamic shared memory

struct Fragments { unsigned a[4][SPLIT][4], b[SPLIT][WARP_TILES / 2][4]; };  // of one slice, as mma.cuh has them
typedef float Sums[4][WARP_TILES][4];  // [16 channels][8 pixels][fragment c of mma.cuh]

// The pixel of a corner of a 2x2 window. Windows past the last one, and the missing half of windows at an odd edge, are not valid.
struct Pixel {
    int oh, ow;
    __device__ Pixel(int window, int corner) {
        oh = window / WINDOWS_W * 2 + corner / 2;
        ow = window % WINDOWS_W * 2 + corner % 2;
    }
    __device__ bool valid() const { return oh < OUT_H && ow < OUT_W; }
};

// What a block works on.
struct Unit {
    i64 image;
    int first_window, passes, first_row, last_row;  // rows [first_row, last_row) of x

    __device__ explicit Unit(i64 block) {
        image = block / UNITS;
        first_window = block % UNITS * UNIT_WINDOWS;
        int last_window = min(first_window + UNIT_WINDOWS, WINDOWS) - 1;
        passes = (last_window - first_window) / PASS_WINDOWS + 1;
        first_row = max(0, first_window / WINDOWS_W * 2 + PAD_H - (KERNEL_H - 1));
        last_row = min(IN_H, last_window / WINDOWS_W * 2 + 1 + PAD_H + 1);
    }
};

// Exponent of the scale for a unit's rows, all channels. `source`: channel 0 of row first_row.
__device__ inline int band_exponent(const scalar_t* source, const Unit& unit, unsigned* scratch) {
    enum { WIDTH = IN_W * sizeof(scalar_t) % 16 ? 1 : 16 / sizeof(scalar_t), BATCH = 16 };
    typedef Packed<scalar_t, WIDTH> Pack;
    int count = (unit.last_row - unit.first_row) * IN_W / WIDTH;
    unsigned largest = 0;
    for (int k = threadIdx.x / 32; k < IN_CHANNELS; k += THREADS / 32) {
        const Pack* row = (const Pack*)(source + k * IN_H * IN_W);
        for (int first = threadIdx.x % 32; first < count; first += 32 * BATCH) {
            Pack in[BATCH];
            #pragma unroll
            for (int i = 0; i < BATCH; i++) in[i] = row[min(first + i * 32, count - 1)];
            #pragma unroll
            for (int i = 0; i < BATCH * WIDTH; i++) largest = max(largest, finite_magnitude(to_acc(in[i / WIDTH].v[i % WIDTH])));
        }
    }
    return scale_exponent(block_max(largest, scratch));
}

// Asks for a unit's rows to be brought into the L2 cache.
__device__ inline void prefetch_band(const scalar_t* x, const Unit& unit) {
#ifndef CUPY_KERNELS_EMULATOR
    const char* source = (const char*)(x + (unit.image * IN_CHANNELS * IN_H + unit.first_row) * IN_W);
    int lines = ((unit.last_row - unit.first_row) * IN_W * (int)sizeof(scalar_t) + 127) / 128;
    for (int i = threadIdx.x; i < IN_CHANNELS * lines; i += THREADS)
        asm volatile("prefetch.global.L2 [%0];" ::"l"(source + ((i64)(i / lines) * IN_H * IN_W * sizeof(scalar_t) + i % lines * 128)));
#endif
}

// Brings chunk `chunk` of a unit's rows into cells, scaled.
__device__ inline void load_band(const scalar_t* source, const Unit& unit, u8* cells, int chunk, float scale) {
    enum { BATCH = RESIDENT ? 8 : 1, GROUPS = CHUNK_CHANNELS / 8 };  // not resident, the sums already hold the registers
    for (int first = threadIdx.x; first < BAND_CELLS * GROUPS; first += THREADS * BATCH) {
        float v[BATCH][8];
        #pragma unroll
        for (int b = 0; b < BATCH; b++) {
            int i = first + b * THREADS, cell = i % BAND_CELLS, k = chunk * CHUNK_CHANNELS + i / BAND_CELLS * 8;
            int row = (cell - GAP + PITCH) / PITCH - 2, column = cell - GAP - (row + 1) * PITCH;  // cell row 0 is the zero row
            bool inside = row >= 0 && column < IN_W && unit.first_row + row < unit.last_row && k < IN_CHANNELS && i < BAND_CELLS * GROUPS;
            const scalar_t* from = source + (k * IN_H + row) * IN_W + column;
            #pragma unroll
            for (int j = 0; j < 8; j++) v[b][j] = inside ? multiply_unflushed(to_acc(from[j * IN_H * IN_W]), scale) : 0;
        }
        #pragma unroll
        for (int b = 0; b < BATCH; b++) {
            int i = first + b * THREADS;
            if (i < BAND_CELLS * GROUPS) store_cell(cells, i % BAND_CELLS, i / BAND_CELLS, v[b]);
        }
    }
}

// sums += a b for 16 channels and `pairs` pairs of n8-tiles. Tensor cores truncate when they add to an accumulator, which costs float32's last bits
// in a long sum: with SPLIT 2 they add three products only, the small ones first, and an ordinary addition adds those.
__device__ __forceinline__ void multiply(
    float (&sums)[WARP_TILES][4], const unsigned (&a)[SPLIT][4], const unsigned (&b)[SPLIT][WARP_TILES / 2][4], const int pairs) {
#if SPLIT == 1
    #pragma unroll
    for (int n = 0; n < WARP_TILES; n++)
        if (n < 2 * pairs) mma_m16n8k16(sums[n], a[0], b[0][n / 2][n % 2 * 2], b[0][n / 2][n % 2 * 2 + 1]);
#else
    float partial[WARP_TILES][4] = {};
    #pragma unroll
    for (int product = 0; product < 3; product++)  // rest * value, value * rest, value * value
        #pragma unroll
        for (int n = 0; n < WARP_TILES; n++) {
            if (n >= 2 * pairs) continue;
            const unsigned(&right)[4] = b[product == 1][n / 2];
            mma_m16n8k16(partial[n], a[product == 0], right[n % 2 * 2], right[n % 2 * 2 + 1]);
        }
    #pragma unroll
    for (int i = 0; i < WARP_TILES * 4; i++) sums[i / 4][i % 4] += partial[i / 4][i % 4];
#endif
}

// The convolution of one unit. `ahead`: how many units run at a time, so whose rows to prefetch; results do not depend on it.
template <class Epilogue>
__device__ inline void convolve(const scalar_t* x, const half_t* packed, int ahead, u8* shared, unsigned* scratch, Epilogue& epilogue) {
    u8 *cells = shared, *ring = shared + RING_OFFSET;
    int lane = threadIdx.x % 32, warp_m = threadIdx.x / 32 % WARPS_M, warp_n = threadIdx.x / 32 / WARPS_M;
    Unit unit(blockIdx.x);
    int steps = unit.passes * CHUNKS * TAPS;
    const scalar_t* source = x + (unit.image * IN_CHANNELS * IN_H + unit.first_row) * IN_W;
    const u8* weights = (const u8*)packed + (i64)blockIdx.y * CHUNKS * TAPS * STAGE_BYTES;

    // The ring has two halves: one is multiplied, the other loaded. One barrier for each half.
    enum { HALF = STAGES / 2 };
    auto fetch_half = [&](int first_step) {
        #pragma unroll
        for (int step = first_step; step < first_step + HALF; step++) {
            if (step >= steps) break;
            const u8* from = weights + (i64)(step % (CHUNKS * TAPS)) * STAGE_BYTES;
            u8* to = ring + step % STAGES * STAGE_BYTES;
            #pragma unroll
            for (int i = 0; i < STAGE_BYTES / 16 / THREADS; i++) {
                int at = (i * THREADS + threadIdx.x) * 16;
                cp_async_16(to + at, from + at, true);
            }
        }
        cp_async_commit();
    };
    fetch_half(0);

    int exponent = band_exponent(source, unit, scratch);
    float scale = power_of_two(exponent);
    if (RESIDENT)
        for (int chunk = 0; chunk < CHUNKS; chunk++) load_band(source, unit, cells + chunk * BAND_CELLS * CELL_BYTES, chunk, scale);
    if (blockIdx.x + ahead < gridDim.x) prefetch_band(x, Unit(blockIdx.x + ahead));

    int step = 0;
    // One turn over `pairs` pairs of n8-tiles a warp: a constant at each call, so that a copy is made for it.
    auto run_pass = [&](const int pairs, int turn) __attribute__((always_inline)) {
        // This lane's rows of ldmatrix: pixel lane % 8 of the n8-tiles 2 j + lane / 16; lanes 8 to 15 and 24 to 31 turn channels + 8.
        int row_of[WARP_TILES / 2], column_of[WARP_TILES / 2];
        int first_window = unit.first_window + turn * PASS_WINDOWS + warp_n * (pairs * 4);
        #pragma unroll
        for (int j = 0; j < WARP_TILES / 2; j++) {
            Pixel pixel(first_window + (2 * j + lane / 16) * 2 + lane % 8 / 4, lane % 4);
            row_of[j] = pixel.oh + PAD_H;
            column_of[j] = GAP + min(pixel.ow, OUT_W - 1) + PAD_W;
        }
        Sums sums = {};
        for (int chunk = 0; chunk < CHUNKS; chunk++) {
            if (!RESIDENT) {
                __syncthreads();
                load_band(source, unit, cells, chunk, scale);
                __syncthreads();
            }
            const u8 *chunk_cells = cells + (RESIDENT ? chunk : 0) * BAND_CELLS * CELL_BYTES, *a_row, *b_row[WARP_TILES / 2];
            auto turn_to = [&](int tap) {
                if (step % HALF == 0) {
                    cp_async_wait<0>();
                    __syncthreads();
                    fetch_half(step + HALF);
                }
                a_row = ring + step % STAGES * STAGE_BYTES + cell_offset(warp_m * 64 + lane % 16, lane / 16);
                int kh = tap / KERNEL_W, kw = tap % KERNEL_W;
                #pragma unroll
                for (int j = 0; j < WARP_TILES / 2; j++) {
                    int ih = row_of[j] - kh;
                    int row_cell = ih >= 0 && ih < unit.last_row ? (ih - unit.first_row + 1) * PITCH : 0;
                    b_row[j] = chunk_cells + cell_offset(row_cell + column_of[j] - kw, lane / 8 % 2);
                }
                step++;
            };
            auto load = [&](Fragments& f, int slice) {
                #pragma unroll
                for (int part = 0; part < SPLIT; part++) {
                    int parts = part * (CHUNK_CHANNELS / 8) + slice * 2;
                    #pragma unroll
                    for (int j = 0; j < WARP_TILES / 2; j++)
                        if (j < pairs) ldmatrix_x4(f.b[part][j], other_part(b_row[j], parts));
                    #pragma unroll
                    for (int i = 0; i < 4; i++) ldmatrix_x4(f.a[i][part], other_part(a_row + i * 16 * CELL_BYTES, parts));
                }
            };
            for (int tap = 0; tap < TAPS; tap++) {
                turn_to(tap);
                #pragma unroll SLICES_AT_ONCE
                for (int slice = 0; slice < SLICES; slice++) {
                    Fragments fragments;
                    load(fragments, slice);
                    #pragma unroll
                    for (int i = 0; i < 4; i++) multiply(sums[i], fragments.a[i], fragments.b, pairs);
                }
            }
        }
        int end_window = min(first_window + pairs * 4, WINDOWS);
        epilogue.turn(sums, unit.image, blockIdx.y * TILE_M + warp_m * 64 + lane / 4, first_window, end_window, exponent);
    };
    for (int turn = 0; turn < unit.passes; turn++) {
        if (LAST_PAIRS == WARP_TILES / 2 || unit.first_window + (turn + 1) * PASS_WINDOWS < WINDOWS) run_pass(WARP_TILES / 2, turn);
        else run_pass(LAST_PAIRS, turn);
    }
    epilogue.finish(exponent);
}
""",
    "conv_transpose.cu": r"""// Transposed convolution and its input gradient as one implicit GEMM on ordinary FMA units, for any hyper-parameters.
//
//     forward  y [n, oc, oh, ow] = bias[oc] + sum_{ic, kh, kw} x [n, ic, ih, iw] * w[ic, oc, kh, kw],  oh = ih s - p + kh d
//     dgrad    dx[n, ic, ih, iw] =            sum_{oc, kh, kw} dy[n, oc, oh, ow] * w[ic, oc, kh, kw]
//
// Both gather: out[m, pixel] = sum over taps and k of a[tap, k, m] * in[k, pixel's source for this tap]. Rows m are the output's
// channels of one group, columns are pixels, the sum runs over the input's channels, tap by tap. In the forward with
// stride s only every s-th tap meets a given pixel; pixels are ordered by their phase (oh mod s, ow mod s), so that a block
// has one phase and skips the other taps whole.
//
// pack_weight writes w as [group][tap][k][m] in acc_t, so that blocks read it coalesced. Grid of conv_gather: x = phases times
// pixel tiles, y = channel tiles, z = groups. Macros: scalar_t, acc_t, DGRAD (0, 1), TILE_M, TILE_N, PER_THREAD. Pixels of
// the batch and offsets inside one image are 32-bit (the host checks), all other offsets 64-bit.
#include "common.cuh"
#include "simt_gemm.cuh"

extern "C" __global__ void pack_weight(const scalar_t* __restrict__ w, acc_t* __restrict__ packed, int groups, int in_channels,
                                       int out_channels, int taps) {
    // in_channels, out_channels: of the convolution, per group
    i64 size = (i64)groups * taps * in_channels * out_channels;
    i64 i = (i64)blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= size) return;
#if DGRAD
    int ic = i % in_channels, oc = i / in_channels % out_channels;
#else
    int oc = i % out_channels, ic = i / out_channels % in_channels;
#endif
    i64 block = i / ((i64)in_channels * out_channels);
    int tap = block % taps, group = block / taps;
    packed[i] = to_acc(w[(((i64)group * in_channels + ic) * out_channels + oc) * taps + tap]);
}

struct Window {  // one spatial dimension
    int phase, pad, dilation, stride;

    // Whether tap k meets pixels of this phase.
    __device__ bool meets(int k) const {
#if DGRAD
        return true;
#else
        return (phase + pad - k * dilation) % stride == 0;
#endif
    }
    // Source of pixel r (counted within its phase) for tap k.
    __device__ int source(int r, int k) const {
#if DGRAD
        return r * stride - pad + k * dilation;
#else
        return r + (phase + pad - k * dilation) / stride;
#endif
    }
};

extern "C" __global__ void __launch_bounds__(THREADS, MIN_BLOCKS) conv_gather(
    const scalar_t* __restrict__ in, const acc_t* __restrict__ packed, const scalar_t* __restrict__ bias, scalar_t* __restrict__ out,
    int images, int groups, int channels_in, int channels_out,  // channels per group, of `in` and `out`
    int in_h, int in_w, int out_h, int out_w, int kernel_h, int kernel_w,
    int stride_h, int stride_w, int pad_h, int pad_w, int dilation_h, int dilation_w, int tiles_per_phase) {
    __shared__ Tiles tiles;
    int phase = blockIdx.x / tiles_per_phase, group = blockIdx.z;
    int steps_w = DGRAD ? 1 : stride_w, steps_h = DGRAD ? 1 : stride_h;  // pixels of a phase are this far apart
    Window rows = {phase / steps_w, pad_h, dilation_h, stride_h}, columns = {phase % steps_w, pad_w, dilation_w, stride_w};
    int phase_h = max(0, (out_h - rows.phase + steps_h - 1) / steps_h), phase_w = max(0, (out_w - columns.phase + steps_w - 1) / steps_w);
    int phase_pixels = phase_h * phase_w, in_pixels = in_h * in_w;
    int pixels = images * phase_pixels, tile_start = blockIdx.x % tiles_per_phase * TILE_N;
    if (tile_start >= pixels) return;
    int m_start = blockIdx.y * TILE_M;

    // The pixel whose inputs this thread loads.
    int load_pixel = tile_start + threadIdx.x % TILE_N;
    bool in_range = load_pixel < pixels;
    int image = in_range ? load_pixel / phase_pixels : 0, within = load_pixel % phase_pixels;
    int r = within / phase_w, c = within % phase_w;
    const scalar_t* source = in + ((i64)image * groups + group) * channels_in * in_pixels;
    const acc_t* weights = packed + (i64)group * kernel_h * kernel_w * channels_in * channels_out;

    Accumulators acc = {};
    acc_t next_a[LOADS_M], next_b[LOADS_N];
    int kh = 0, kw = -1, k = channels_in, buffer = 0, offset = 0;  // "the end of the tap before the first"
    bool inside = false;
    int sums = 0;  // multiplied steps
    bool primed = false;
    for (;;) {
        bool more = true;
        if (k >= channels_in) {  // next tap that meets this phase
            do {
                if (++kw == kernel_w) kw = 0, kh++;
            } while (kh < kernel_h && !(rows.meets(kh) && columns.meets(kw)));
            more = kh < kernel_h;
            k = 0;
            int h = rows.source(r, kh), w = columns.source(c, kw);
            inside = in_range && h >= 0 && h < in_h && w >= 0 && w < in_w;
            offset = h * in_w + w;
        }
        if (more) {
            const acc_t* a = weights + ((i64)(kh * kernel_w + kw) * channels_in + k) * channels_out;
            #pragma unroll
            for (int i = 0; i < LOADS_M; i++) {
                int index = threadIdx.x + i * THREADS, row = index / TILE_M, m = m_start + index % TILE_M;
                next_a[i] = k + row < channels_in && m < channels_out ? a[row * channels_out + m] : 0;
            }
            #pragma unroll
            for (int i = 0; i < LOADS_N; i++) {
                int row = k + (threadIdx.x + i * THREADS) / TILE_N;
                next_b[i] = inside && row < channels_in ? to_acc(source[row * in_pixels + offset]) : 0;
            }
        }
        if (primed) {
            multiply_tiles(acc, tiles.a[buffer], tiles.b[buffer]);
            if (++sums % STEPS_PER_SUM == 0) store_sum(acc, tiles, sums == STEPS_PER_SUM);
        }
        if (!more) break;
        buffer ^= 1;
        #pragma unroll
        for (int i = 0; i < LOADS_M; i++) {
            int index = threadIdx.x + i * THREADS;
            tiles.a[buffer][index / TILE_M * ROW_M + index % TILE_M] = next_a[i];
        }
        #pragma unroll
        for (int i = 0; i < LOADS_N; i++) {
            int index = threadIdx.x + i * THREADS;
            tiles.b[buffer][index / TILE_N * ROW_N + index % TILE_N] = next_b[i];
        }
        __syncthreads();
        primed = true;
        k += TILE_K;
    }
    finish_sum(acc, tiles, sums >= STEPS_PER_SUM);

    int thread_m = threadIdx.x / THREADS_N, thread_n = threadIdx.x % THREADS_N;
    #pragma unroll
    for (int j = 0; j < PER_THREAD; j++) {
        int pixel = tile_start + tile_column(thread_n, j);
        if (pixel >= pixels) continue;
        int n = pixel / phase_pixels, position = pixel % phase_pixels;
        int h = position / phase_w * steps_h + rows.phase, w = position % phase_w * steps_w + columns.phase;
        scalar_t* to = out + ((i64)n * groups + group) * channels_out * out_h * out_w + h * out_w + w;
        #pragma unroll
        for (int i = 0; i < PER_THREAD; i++) {
            int m = m_start + tile_row(thread_m, i);
            if (m >= channels_out) continue;
            acc_t value = acc[i][j];
            if (bias) value += to_acc(bias[group * channels_out + m]);
            to[(i64)m * out_h * out_w] = from_acc<scalar_t>(value);
        }
    }
}
""",
    "conv_transpose_mma.cu": r"""// Transposed convolution and its input gradient on tensor cores (conv_mma.cuh): y[n, m, oh, ow] = sums + bias[m].
#include "conv_mma.cuh"

struct Store {
    const scalar_t* bias;
    scalar_t* y;
    const int* exponents;

    __device__ void turn(const Sums& sums, i64 image, int first_m, int first_window, int end_window, int exponent) const {
        struct __align__(2 * sizeof(scalar_t)) Pair { scalar_t v[2]; };
        int lane = threadIdx.x % 32;
        #pragma unroll
        for (int i = 0; i < 8; i++) {
            int m = first_m + i * 8;
            if (m >= OUT_CHANNELS) continue;
            float shift = bias ? to_acc(bias[m]) : 0;
            ScaleBack scale(exponent + exponents[m]);
            scalar_t* plane = y + (image * OUT_CHANNELS + m) * OUT_H * OUT_W;
            #pragma unroll
            for (int n = 0; n < WARP_TILES; n++) {
                int window = first_window + n * 2 + lane % 4 / 2;
                Pixel pixel(window, lane % 2 * 2);
                if (window >= end_window || !pixel.valid()) continue;
                Pair pair;
                #pragma unroll
                for (int j = 0; j < 2; j++) pair.v[j] = from_acc<scalar_t>(scale(sums[i / 2][n][i % 2 * 2 + j]) + shift);
                scalar_t* to = plane + pixel.oh * OUT_W + pixel.ow;
                if (OUT_W % 2 == 0) *(Pair*)to = pair;
                else {
                    to[0] = pair.v[0];
                    if (pixel.ow + 1 < OUT_W) to[1] = pair.v[1];
                }
            }
        }
    }
    __device__ void finish(int) const {}
};

extern "C" __global__ void __launch_bounds__(THREADS, 1) conv_transpose_mma(
    const scalar_t* __restrict__ x, const half_t* __restrict__ packed, const int* __restrict__ exponents,
    const scalar_t* __restrict__ bias, scalar_t* __restrict__ y, int ahead) {
    __shared__ unsigned scratch[32];
    DYNAMIC_SHARED(u8, shared);
    Store epilogue = {bias, y, exponents};
    convolve(x, packed, ahead, shared, scratch, epilogue);
}
""",
    "conv_transpose_wgrad.cu": r"""// Weight gradient of the transposed convolution, an implicit GEMM on ordinary FMA units, for any hyper-parameters.
//
//     dw[ic, oc, kh, kw] = sum_{n, ih, iw} x[n, ic, ih, iw] * dy[n, oc, ih s - p + kh d, iw s - p + kw d]
//
// wgrad_partial: rows are ic, columns oc, the sum runs over the pixels of x, for one tap. It is split over blocks (split-K):
// each writes its own partial sums [split][group][tap][ic][oc] in acc_t. wgrad_reduce adds the splits in ascending order, so
// the result depends on shapes alone. Grid of wgrad_partial: x = taps times channel tiles, y = splits, z = groups.
// Macros: scalar_t, acc_t, TILE_M, TILE_N, PER_THREAD. Pixels of the batch and offsets inside one image are 32-bit (the
// host checks).
#include "common.cuh"
#include "simt_gemm.cuh"

extern "C" __global__ void __launch_bounds__(THREADS, MIN_BLOCKS) wgrad_partial(
    const scalar_t* __restrict__ x, const scalar_t* __restrict__ dy, acc_t* __restrict__ partial, int images, int groups,
    int in_channels, int out_channels,  // per group
    int in_h, int in_w, int out_h, int out_w, int kernel_h, int kernel_w,
    int stride_h, int stride_w, int pad_h, int pad_w, int dilation_h, int dilation_w, int split_pixels) {
    __shared__ Tiles tiles;
    int tiles_n = (out_channels + TILE_N - 1) / TILE_N, tiles_m = (in_channels + TILE_M - 1) / TILE_M;
    int tap = blockIdx.x / (tiles_m * tiles_n), tile = blockIdx.x % (tiles_m * tiles_n);
    int m_start = tile / tiles_n * TILE_M, n_start = tile % tiles_n * TILE_N, group = blockIdx.z;
    int in_pixels = in_h * in_w, out_pixels = out_h * out_w;
    int shift_h = tap / kernel_w * dilation_h - pad_h, shift_w = tap % kernel_w * dilation_w - pad_w;

    // This thread loads pixel threadIdx.x % TILE_K of every step, for several channels.
    int pixel = blockIdx.y * split_pixels + threadIdx.x % TILE_K;
    int steps_end = min((i64)(blockIdx.y + 1) * split_pixels, (i64)images * in_pixels);
    int image = pixel / in_pixels, h = pixel % in_pixels / in_w, w = pixel % in_pixels % in_w;

    Accumulators acc = {};
    acc_t next_a[LOADS_M], next_b[LOADS_N];
    int buffer = 0;
    int sums = 0;  // multiplied steps
    bool primed = false;
    for (int start = blockIdx.y * split_pixels;; start += TILE_K) {
        bool more = start < steps_end;
        if (more) {
            int oh = h * stride_h + shift_h, ow = w * stride_w + shift_w;
            bool valid = pixel < steps_end, inside = valid && oh >= 0 && oh < out_h && ow >= 0 && ow < out_w;
            i64 place = (i64)image * groups + group;
            const scalar_t* a = x + place * in_channels * in_pixels + h * in_w + w;
            const scalar_t* b = dy + place * out_channels * out_pixels + oh * out_w + ow;
            #pragma unroll
            for (int i = 0; i < LOADS_M; i++) {
                int m = m_start + (threadIdx.x + i * THREADS) / TILE_K;
                next_a[i] = valid && m < in_channels ? to_acc(a[m * in_pixels]) : 0;
            }
            #pragma unroll
            for (int i = 0; i < LOADS_N; i++) {
                int n = n_start + (threadIdx.x + i * THREADS) / TILE_K;
                next_b[i] = inside && n < out_channels ? to_acc(b[n * out_pixels]) : 0;
            }
            pixel += TILE_K;
            for (w += TILE_K; w >= in_w; w -= in_w) h++;
            for (; h >= in_h; h -= in_h) image++;
        }
        if (primed) {
            multiply_tiles(acc, tiles.a[buffer], tiles.b[buffer]);
            if (++sums % STEPS_PER_SUM == 0) store_sum(acc, tiles, sums == STEPS_PER_SUM);
        }
        if (!more) break;
        buffer ^= 1;
        #pragma unroll
        for (int i = 0; i < LOADS_M; i++) {
            int index = threadIdx.x + i * THREADS;
            tiles.a[buffer][index % TILE_K * ROW_M + index / TILE_K] = next_a[i];
        }
        #pragma unroll
        for (int i = 0; i < LOADS_N; i++) {
            int index = threadIdx.x + i * THREADS;
            tiles.b[buffer][index % TILE_K * ROW_N + index / TILE_K] = next_b[i];
        }
        __syncthreads();
        primed = true;
    }
    finish_sum(acc, tiles, sums >= STEPS_PER_SUM);

    int thread_m = threadIdx.x / THREADS_N, thread_n = threadIdx.x % THREADS_N;
    i64 matrix = ((i64)blockIdx.y * groups + group) * kernel_h * kernel_w + tap;
    acc_t* to = partial + matrix * in_channels * out_channels;
    #pragma unroll
    for (int i = 0; i < PER_THREAD; i++) {
        int m = m_start + tile_row(thread_m, i);
        #pragma unroll
        for (int j = 0; j < PER_THREAD; j++) {
            int n = n_start + tile_column(thread_n, j);
            if (m < in_channels && n < out_channels) to[(i64)m * out_channels + n] = acc[i][j];
        }
    }
}

extern "C" __global__ void wgrad_reduce(const acc_t* __restrict__ partial, scalar_t* __restrict__ dw, int groups, int taps,
                                        int in_channels, int out_channels, int splits) {
    i64 size = (i64)groups * taps * in_channels * out_channels;
    i64 i = (i64)blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= size) return;
    acc_t sum = 0;
    for (int s = 0; s < splits; s++) sum += partial[s * size + i];
    int oc = i % out_channels, ic = i / out_channels % in_channels;
    i64 block = i / ((i64)in_channels * out_channels);
    int tap = block % taps, group = block / taps;
    dw[(((i64)group * in_channels + ic) * out_channels + oc) * taps + tap] = from_acc<scalar_t>(sum);
}
""",
    "fp16_cells.cuh": r"""// fp16 operands of the tensor-core convolution: cells of 64 halves in shared memory.
//
// fp16, like TF32, keeps 10 mantissa bits, and fp16_scale.cuh brings values into its normal range. SPLIT 1 rounds to fp16 (TF32's precision). SPLIT 2 keeps a second fp16 value with the rest (nearly float32's precision):
// a cell then holds 32 channels twice. Macros: SPLIT, IN_CHANNELS.
#pragma once
#include "fp16_scale.cuh"

#define CHUNK_CHANNELS (64 / SPLIT)
#define CHUNKS ((IN_CHANNELS + CHUNK_CHANNELS - 1) / CHUNK_CHANNELS)
#define CELL_BYTES 128
#define STAGE_BYTES (TILE_M * CELL_BYTES)

// Where part `part` (16 bytes, 0 to 7) of a cell lies. The XOR spreads the same part of neighbouring cells over all banks.
__device__ inline int cell_offset(int cell, int part) { return cell * CELL_BYTES + ((part ^ (cell & 7)) << 4); }

// The part that lies `parts` parts on from the one at `row`, where `parts` sets only bits that are 0 in that one's number.
__device__ inline const u8* other_part(const u8* row, int parts) { return (const u8*)((size_t)row ^ (size_t)(parts * 16)); }

__device__ inline unsigned pack_halves(float low, float high) {
#if defined(CUPY_KERNELS_EMULATOR) || __CUDA_ARCH__ < 800
    return from_acc<half_t>(low).bits | (unsigned)from_acc<half_t>(high).bits << 16;
#else
    unsigned both;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(high), "f"(low));
    return both;
#endif
}

// Writes eight channels, `group` of its chunk, to a cell: part `group`, and with SPLIT 2 what rounding left of them, 4 parts on.
__device__ inline void store_cell(u8* cells, int cell, int group, float (&v)[8]) {
    #pragma unroll
    for (int part = 0; part < SPLIT; part++) {
        *(uint4*)(cells + cell_offset(cell, part * (CHUNK_CHANNELS / 8) + group)) =
            make_uint4(pack_halves(v[0], v[1]), pack_halves(v[2], v[3]), pack_halves(v[4], v[5]), pack_halves(v[6], v[7]));
        #pragma unroll
        for (int j = 0; j < 8; j++) {
            float rest = v[j] - to_acc(from_acc<half_t>(v[j]));
            v[j] = rest == rest ? rest : 0;  // nothing is left of an infinity or NaN
        }
    }
}
""",
    "fp16_scale.cuh": r"""// Power-of-two scales, measured from the data, that bring float32 values into fp16's normal range without loss.
#pragma once
#include "common.cuh"

// Bits of |v| if v is finite, else 0: their order as integers is the order of the values, denormals included.
__device__ inline unsigned finite_magnitude(float v) {
    unsigned bits = __float_as_uint(v) & 0x7FFFFFFF;
    return bits < 0x7F800000 ? bits : 0;
}

// Exponent e such that the largest magnitude times 2^e lies in [2^14, 2^15): nothing finite overflows fp16.
__device__ inline int scale_exponent(unsigned largest_magnitude) {
    return largest_magnitude ? min(126, 14 + 127 - (int)(largest_magnitude >> 23)) : 0;
}

// 2^e for -126 <= e <= 127.
__device__ inline float power_of_two(int e) { return __uint_as_float((unsigned)(e + 127) << 23); }

// a * b without -ftz=true, which CuPy compiles with: scales lift denormals into range, and results may be denormal.
__device__ inline float multiply_unflushed(float a, float b) {
#ifdef CUPY_KERNELS_EMULATOR
    return a * b;
#else
    float product;
    asm("mul.rn.f32 %0, %1, %2;" : "=f"(product) : "f"(a), "f"(b));
    return product;
#endif
}

// v -> v * 2^-e for |e| <= 252; two factors keep every intermediate value in range where the result is.
struct ScaleBack {
    float first, second;
    __device__ explicit ScaleBack(int e) : first(power_of_two(-e / 2)), second(power_of_two(-e - -e / 2)) {}
    __device__ float operator()(float v) const { return multiply_unflushed(multiply_unflushed(v, first), second); }
};

__device__ inline unsigned block_max(unsigned v, unsigned* scratch) {
    for (int lanes = 16; lanes > 0; lanes >>= 1) v = max(v, __shfl_xor_sync(0xFFFFFFFFu, v, lanes));
    if (threadIdx.x % 32 == 0) scratch[threadIdx.x / 32] = v;
    __syncthreads();
    for (unsigned w = 0; w < blockDim.x / 32; w++) v = max(v, scratch[w]);
    __syncthreads();
    return v;
}
""",
    "mma.cuh": r"""// Tensor-core building blocks of sm_80 and newer: ldmatrix and mma.sync m16n8k16, fp16 operands, float32 accumulation.
//
// Fragments as PTX defines them, for lane l of a warp (two halves in one unsigned, the lower column first):
//     a[4]: rows l/4, l/4+8, columns 2(l%4)+{0,1} | the same rows, columns + 8
//     b[2]: rows 2(l%4)+{0,1} | rows + 8, column l/4
//     c[4]: row l/4, columns 2(l%4)+{0,1} | row l/4+8, the same columns
#pragma once

// Four 8x8 matrices of halves: lane l passes the address of row l%8 (16 bytes) of matrix l/8, and gets in r[i] the values of
// matrix i at row l/4, columns 2(l%4)+{0,1}.
__device__ inline void ldmatrix_x4(unsigned (&r)[4], const void* row) {
#ifdef CUPY_KERNELS_EMULATOR
    auto rows = emulator::exchange_in_warp(0xFFFFFFFFu, row, EMULATOR_PLACE);
    int lane = emulator::current % 32;
    for (int i = 0; i < 4; i++) r[i] = ((const unsigned*)rows[8 * i + lane / 4])[lane % 4];
#elif __CUDA_ARCH__ >= 750
    unsigned address = (unsigned)__cvta_generic_to_shared(row);
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(address) : "memory");
#endif
}

// c += a b
__device__ inline void mma_m16n8k16(float (&c)[4], const unsigned (&a)[4], const unsigned b0, const unsigned b1) {
#ifdef CUPY_KERNELS_EMULATOR
    struct Fragments { float a[8], b[4]; } mine;
    for (int i = 0; i < 8; i++) mine.a[i] = to_acc(half_t{(unsigned short)(a[i / 2] >> i % 2 * 16)});
    for (int i = 0; i < 4; i++) mine.b[i] = to_acc(half_t{(unsigned short)((i < 2 ? b0 : b1) >> i % 2 * 16)});
    auto all = emulator::exchange_in_warp(0xFFFFFFFFu, mine, EMULATOR_PLACE);
    int lane = emulator::current % 32;
    for (int i = 0; i < 4; i++)
        for (int k = 0; k < 16; k++) {
            const Fragments &left = all[lane / 4 * 4 + k % 8 / 2], &right = all[(lane % 4 * 2 + i % 2) * 4 + k % 8 / 2];
            c[i] += left.a[k / 8 * 4 + i / 2 * 2 + k % 2] * right.b[k / 8 * 2 + k % 2];
        }
#elif __CUDA_ARCH__ >= 800
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3]) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
#endif
}
""",
    "pack_weight_fp16.cu": r"""// Weights of a transposed convolution as conv_mma.cuh reads them: fp16 under a power-of-two scale for each output channel m.
//
// w: [IN_CHANNELS, OUT_CHANNELS, TAPS], with FLIP (for dgrad) [OUT_CHANNELS, IN_CHANNELS, TAPS] and the taps in reverse order.
// packed: [m tile][chunk][tap][TILE_M rows of 64 halves, parts in cell_offset's order]; exponents[m]: of m's scale. Rows past
// OUT_CHANNELS are zero. One block per row of the padded matrix. Macros: scalar_t, IN_CHANNELS, OUT_CHANNELS, TAPS, TILE_M, SPLIT, FLIP.
#include "common.cuh"
#include "fp16_cells.cuh"

extern "C" __global__ void pack_weight_fp16(const scalar_t* __restrict__ w, half_t* __restrict__ packed, int* __restrict__ exponents) {
    __shared__ unsigned scratch[32];
    int m = blockIdx.x;
    unsigned largest = 0;
    if (m < OUT_CHANNELS)
        for (int i = threadIdx.x; i < IN_CHANNELS * TAPS; i += blockDim.x) {
            int k = i / TAPS, tap = i % TAPS;
            largest = max(largest, finite_magnitude(to_acc(w[FLIP ? (m * IN_CHANNELS + k) * TAPS + tap : (k * OUT_CHANNELS + m) * TAPS + tap])));
        }
    largest = block_max(largest, scratch);
    int exponent = scale_exponent(largest);
    float scale = power_of_two(exponent);
    if (threadIdx.x == 0) exponents[m] = exponent;
    for (int i = threadIdx.x; i < CHUNKS * TAPS * CHUNK_CHANNELS / 8; i += blockDim.x) {
        int group = i % (CHUNK_CHANNELS / 8), tap = i / (CHUNK_CHANNELS / 8) % TAPS, chunk = i / (CHUNK_CHANNELS / 8) / TAPS;
        float v[8];
        #pragma unroll
        for (int j = 0; j < 8; j++) {
            int k = chunk * CHUNK_CHANNELS + group * 8 + j;
            int from = FLIP ? (m * IN_CHANNELS + k) * TAPS + TAPS - 1 - tap : (k * OUT_CHANNELS + m) * TAPS + tap;
            v[j] = m < OUT_CHANNELS && k < IN_CHANNELS ? multiply_unflushed(to_acc(w[from]), scale) : 0;
        }
        u8* stage = (u8*)packed + (((i64)(m / TILE_M) * CHUNKS + chunk) * TAPS + tap) * STAGE_BYTES;
        store_cell(stage, m % TILE_M, group, v);
    }
}
""",
    "pooled_tail.cu": r"""// What follows conv_bn_pool: statistics of batch norm, then batch norm, tanh and group norm over the pooled sums, and the gradients.
//
//     z = (pooled - mean) invstd weight + bias,  p = tanh(z),  out = (p - group_mean) group_invstd group_weight + group_bias
//
// `pooled`, `mean` and all sums are without the convolution's bias. conv_bn_statistics: one block a channel. pooled_forward and
// pooled_backward: one block a group of one image, whose values stay in shared memory; a warp takes whole channels. Partial sums
// [2][channels][images] are added up over the images by batch_norm_backward_sums (batch_norm.cu). sums_gradient: one thread a 2x2
// window. Saved for the backward: pooled, taps, saved sums (conv_bn_pool.cu), mean, invstd, group_mean, group_invstd.
//
// Macros: scalar_t, acc_t (float), param_t (all weights and biases, running statistics), saved_t (half_t, float).
#include "batch_norm.cuh"
#include "fp16_scale.cuh"
#include "tanh.cuh"

// partials [3][channels][units]: count, mean and sum of squared distances of each unit. With training 0 the running statistics
// stand for the batch's, else they are updated where not null.
extern "C" __global__ void __launch_bounds__(256) conv_bn_statistics(
    const float* __restrict__ partials, const param_t* __restrict__ conv_bias, INOUT param_t* running_mean, INOUT param_t* running_var,
    float* __restrict__ mean, float* __restrict__ invstd, float momentum, float eps, int channels, i64 units, int training) {
    __shared__ float scratch[32];
    int c = blockIdx.x;
    float shift = bn_bias(conv_bias, c);
    if (!training) {
        if (threadIdx.x == 0) {
            mean[c] = to_acc(running_mean[c]) - shift;
            invstd[c] = 1 / sqrt(to_acc(running_var[c]) + eps);
        }
        return;
    }
    const float *counts = partials + c * units, *means = counts + channels * units, *squares = means + channels * units;
    float origin = means[0] - means[0] == 0 ? means[0] : 0;  // rounding errors of a large mean must not enter the variance
    float count = 0, sum = 0, m2 = 0;
    for (i64 i = threadIdx.x; i < units; i += blockDim.x) count += counts[i], sum += counts[i] * (means[i] - origin);
    count = block_sum(count, scratch);
    float total = block_sum(sum, scratch) / count;
    for (i64 i = threadIdx.x; i < units; i += blockDim.x) {
        float distance = means[i] - origin - total;
        m2 += squares[i] + counts[i] * distance * distance;
    }
    m2 = block_sum(m2, scratch);
    if (threadIdx.x) return;
    total += origin;
    mean[c] = total;
    invstd[c] = 1 / sqrt(m2 / count + eps);
    if (running_mean) {
        running_mean[c] = from_acc<param_t>((1 - momentum) * to_acc(running_mean[c]) + momentum * (total + shift));
        running_var[c] = from_acc<param_t>((1 - momentum) * to_acc(running_var[c]) + momentum * (m2 / (count - 1)));
    }
}

__device__ inline float warp_sum(float v) {
    for (int lanes = 16; lanes > 0; lanes >>= 1) v += __shfl_xor_sync(0xFFFFFFFFu, v, lanes);
    return v;
}

// Batch norm of one channel.
struct Norm {
    float mean, invstd, weight, bias;
    __device__ Norm(const float* means, const float* invstds, const param_t* weights, const param_t* biases, int c)
        : mean(means[c]), invstd(invstds[c]), weight(bn_weight(weights, c)), bias(bn_bias(biases, c)) {}
    __device__ float normalise(float v) const { return bn_normalise(v, mean, invstd); }
    __device__ float tanh(float v) const { return tanh_of(bn_affine(normalise(v), weight, bias)); }
};

extern "C" __global__ void __launch_bounds__(256) pooled_forward(
    const float* __restrict__ pooled, const float* __restrict__ mean, const float* __restrict__ invstd, const param_t* __restrict__ weight,
    const param_t* __restrict__ bias, const param_t* __restrict__ group_weight, const param_t* __restrict__ group_bias,
    scalar_t* __restrict__ out, float* __restrict__ group_mean, float* __restrict__ group_invstd, int channels, int groups, int plane,
    float eps) {
    DYNAMIC_SHARED(float, values);
    __shared__ float scratch[32];
    int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
    int members = channels / groups, first = blockIdx.x % groups * members, size = members * plane;
    const float* source = pooled + (i64)blockIdx.x * size;
    float sum = 0, squares = 0;
    for (int c = warp; c < members; c += warps) {
        Norm norm(mean, invstd, weight, bias, first + c);
        #pragma unroll 4
        for (int i = lane; i < plane; i += 32) sum += values[c * plane + i] = norm.tanh(source[c * plane + i]);
    }
    float m = block_sum(sum, scratch) / size;
    for (int i = threadIdx.x; i < size; i += blockDim.x) squares += (values[i] - m) * (values[i] - m);
    float s = 1 / sqrt(block_sum(squares, scratch) / size + eps);
    if (threadIdx.x == 0) group_mean[blockIdx.x] = m, group_invstd[blockIdx.x] = s;
    for (int c = warp; c < members; c += warps) {
        float w = bn_weight(group_weight, first + c), b = bn_bias(group_bias, first + c);
        scalar_t* to = out + (i64)blockIdx.x * size + c * plane;
        for (int i = lane; i < plane; i += 32) to[i] = from_acc<scalar_t>(bn_affine(bn_normalise(values[c * plane + i], m, s), w, b));
    }
}

// g = gradient at batch norm's output, of the pooled values. Partial sums over each image: of batch norm's g and g xhat, and of group
// norm's dout and dout phat, where xhat and phat are the normalised inputs.
extern "C" __global__ void __launch_bounds__(256) pooled_backward(
    const scalar_t* __restrict__ dout, const float* __restrict__ pooled, const float* __restrict__ mean, const float* __restrict__ invstd,
    const param_t* __restrict__ weight, const param_t* __restrict__ bias, const param_t* __restrict__ group_weight,
    const float* __restrict__ group_mean, const float* __restrict__ group_invstd, float* __restrict__ g, float* __restrict__ batch_partials,
    float* __restrict__ group_partials, int channels, int groups, int plane, i64 images) {
    DYNAMIC_SHARED(float, values);
    __shared__ float scratch[32];
    int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
    int members = channels / groups, first = blockIdx.x % groups * members, size = members * plane;
    i64 image = blockIdx.x / groups, start = (i64)blockIdx.x * size, part = channels * images;
    float m = group_mean[blockIdx.x], s = group_invstd[blockIdx.x], sum = 0, dot = 0;
    float* gradients = values + size;
    for (int c = warp; c < members; c += warps) {
        Norm norm(mean, invstd, weight, bias, first + c);
        float channel_sum = 0, channel_dot = 0, w = bn_weight(group_weight, first + c);
        #pragma unroll 4
        for (int i = lane; i < plane; i += 32) {
            float p = norm.tanh(pooled[start + c * plane + i]), d = to_acc(dout[start + c * plane + i]);
            values[c * plane + i] = p;
            gradients[c * plane + i] = d;
            channel_sum += d;
            channel_dot += d * bn_normalise(p, m, s);
        }
        channel_sum = warp_sum(channel_sum);
        channel_dot = warp_sum(channel_dot);
        if (lane) continue;
        group_partials[(first + c) * images + image] = channel_sum;
        group_partials[part + (first + c) * images + image] = channel_dot;
        sum += w * channel_sum;
        dot += w * channel_dot;
    }
    float mean_d = block_sum(sum, scratch) / size, mean_dot = block_sum(dot, scratch) / size;
    for (int c = warp; c < members; c += warps) {
        Norm norm(mean, invstd, weight, bias, first + c);
        float channel_sum = 0, channel_dot = 0, w = bn_weight(group_weight, first + c);
        #pragma unroll 4
        for (int i = lane; i < plane; i += 32) {
            float p = values[c * plane + i];
            float v = s * (w * gradients[c * plane + i] - (mean_d + bn_normalise(p, m, s) * mean_dot)) * tanh_slope(p);
            g[start + c * plane + i] = v;
            channel_sum += v;
            channel_dot += v * norm.normalise(pooled[start + c * plane + i]);
        }
        channel_sum = warp_sum(channel_sum);
        channel_dot = warp_sum(channel_dot);
        if (lane) continue;
        batch_partials[(first + c) * images + image] = channel_sum;
        batch_partials[part + (first + c) * images + image] = channel_dot;
    }
}

// dy = gradient of the convolution's output: weight invstd (g at the chosen corner - mean_g - xhat mean_dot), with mean_g and mean_dot the
// means of g and g xhat over all pixels (`sums` over `count`; null where the statistics do not depend on the sums).
extern "C" __global__ void __launch_bounds__(256) sums_gradient(
    const float* __restrict__ g, const u8* __restrict__ taps, const saved_t* __restrict__ saved, const int* __restrict__ exponents,
    const int* __restrict__ unit_exponents, const float* __restrict__ mean, const float* __restrict__ invstd,
    const param_t* __restrict__ weight, const float* __restrict__ sums, scalar_t* __restrict__ dy, i64 images, int channels, int height,
    int width, int unit_windows, int shift, float count) {
    int windows_w = (width + 1) / 2, windows = (height + 1) / 2 * windows_w, units = (windows + unit_windows - 1) / unit_windows;
    int window = blockIdx.y * blockDim.x + threadIdx.x, c = blockIdx.x % channels;
    i64 image = blockIdx.x / channels;
    if (window >= windows) return;
    int row = window / windows_w, column = window % windows_w, pooled_w = width / 2;
    float scale = bn_weight(weight, c) * invstd[c], mean_g = sums ? sums[c] / count : 0, mean_dot = sums ? sums[channels + c] / count : 0;
    float chosen = 0;
    int tap = -1;
    if (row < height / 2 && column < pooled_w) {
        i64 at = ((i64)blockIdx.x * (height / 2) + row) * pooled_w + column;
        chosen = g[at];
        tap = taps[at];
    }
    ScaleBack restore(sizeof(saved_t) == 4 ? 0 : exponents[c] + unit_exponents[image * units + window / unit_windows] - shift);
    Packed<saved_t, 4> kept = *(const Packed<saved_t, 4>*)(saved + ((i64)blockIdx.x * windows + window) * 4);
    #pragma unroll
    for (int corner = 0; corner < 4; corner++) {
        int h = row * 2 + corner / 2, w = column * 2 + corner % 2;
        if (h >= height || w >= width) continue;
        float xhat = bn_normalise(restore(to_acc(kept.v[corner])), mean[c], invstd[c]);
        float v = (corner == tap ? chosen : 0) - (sums ? mean_g + xhat * mean_dot : 0);
        dy[((i64)blockIdx.x * height + h) * width + w] = from_acc<scalar_t>(v * scale);
    }
}
""",
    "simt_gemm.cuh": r"""// Register-tiled matrix product of one block, on ordinary FMA units: acc[m][n] += sum_k a[k][m] * b[k][n].
//
// Macros: acc_t, TILE_M, TILE_N (the block's tile), PER_THREAD (4 or 8: a thread owns PER_THREAD x PER_THREAD values, in
// groups of 4 neighbours so that shared memory is read 16 bytes at a time). TILE_K columns of a and b sit in shared memory,
// twice: while one copy is multiplied, the next is loaded through registers, with one barrier a step.
//
// Float sums have two levels: after every STEPS_PER_SUM steps a thread adds its values to running totals of its own in shared
// memory. A chain of n additions loses about sqrt(n) units; 64 terms and then the partial sums lose as much as cuDNN's
// kernels do, a single chain of thousands several times more.
#pragma once

#define TILE_K 8
#define THREADS_N (TILE_N / PER_THREAD)
#define THREADS (TILE_M * TILE_N / (PER_THREAD * PER_THREAD))
#define STEPS_PER_SUM 8
#define MIN_BLOCKS (PER_THREAD == 8 ? 3 : 512 / THREADS)  // per SM: leaves the registers that a thread's values need
#define GROUPS_OF_4 (PER_THREAD / 4)
#define ROW_M (TILE_M + 4)  // padding keeps transposing stores (wgrad) free of bank conflicts
#define ROW_N (TILE_N + 4)
#define LOADS_M (TILE_M * TILE_K / THREADS)
#define LOADS_N (TILE_N * TILE_K / THREADS)

struct __align__(16) Quad { acc_t v[4]; };
#define TOTALS (sizeof(acc_t) == 4 ? PER_THREAD * GROUPS_OF_4 : 1)  // double needs no second level
struct Tiles { acc_t a[2][TILE_K * ROW_M], b[2][TILE_K * ROW_N]; Quad totals[TOTALS][THREADS]; };
typedef acc_t Accumulators[PER_THREAD][PER_THREAD];

// Row (or column) of the tile that this thread's i-th value belongs to; `thread` counts along that dimension.
__device__ inline int tile_row(int thread, int i) { return i / 4 * (TILE_M / GROUPS_OF_4) + thread * 4 + i % 4; }
__device__ inline int tile_column(int thread, int i) { return i / 4 * (TILE_N / GROUPS_OF_4) + thread * 4 + i % 4; }

__device__ inline void multiply_tiles(Accumulators& acc, const acc_t* a, const acc_t* b) {
    int thread_m = threadIdx.x / THREADS_N, thread_n = threadIdx.x % THREADS_N;
    #pragma unroll
    for (int k = 0; k < TILE_K; k++) {
        acc_t row[PER_THREAD], column[PER_THREAD];
        #pragma unroll
        for (int i = 0; i < PER_THREAD; i += 4) {
            *(Quad*)(row + i) = *(const Quad*)(a + k * ROW_M + tile_row(thread_m, i));
            *(Quad*)(column + i) = *(const Quad*)(b + k * ROW_N + tile_column(thread_n, i));
        }
        #pragma unroll
        for (int i = 0; i < PER_THREAD; i++)
            #pragma unroll
            for (int j = 0; j < PER_THREAD; j++) acc[i][j] += row[i] * column[j];
    }
}

// Moves what a thread has summed into its totals (`first`: sets them). finish_sum brings the totals back.
__device__ inline void store_sum(Accumulators& acc, Tiles& tiles, bool first) {
    if (sizeof(acc_t) != 4) return;
    #pragma unroll
    for (int i = 0; i < TOTALS; i++) {
        Quad total = {}, *place = &tiles.totals[i][threadIdx.x];
        if (!first) total = *place;
        #pragma unroll
        for (int j = 0; j < 4; j++) {
            acc_t& value = acc[i / GROUPS_OF_4][i % GROUPS_OF_4 * 4 + j];
            total.v[j] += value;
            value = 0;
        }
        *place = total;
    }
}

__device__ inline void finish_sum(Accumulators& acc, const Tiles& tiles, bool any) {
    if (sizeof(acc_t) != 4 || !any) return;
    #pragma unroll
    for (int i = 0; i < TOTALS; i++)
        #pragma unroll
        for (int j = 0; j < 4; j++) acc[i / GROUPS_OF_4][i % GROUPS_OF_4 * 4 + j] += tiles.totals[i][threadIdx.x].v[j];
}
""",
    "tanh.cuh": r"""// tanh and its derivative, as every kernel that applies it computes them.
#pragma once

// tanhf under -ftz=true flushes denormals; there tanh(v) = v to the last bit, and a select moves the bits unharmed.
__device__ inline acc_t tanh_of(acc_t v) { return fabs(v) < (acc_t)1.17549435e-38f ? v : tanh(v); }

// d tanh(v) / dv, from y = tanh(v).
__device__ inline acc_t tanh_slope(acc_t y) { return (acc_t)1 - y * y; }
""",
}  # file name: text


def text(file: str) -> str:
    """Text of one of KERNELS."""
    return KERNELS[file]


@functools.cache
def cupy():
    """CuPy, with CUDA 11's libraries loaded first where they are installed as wheels."""
    preload_wheels()
    import cupy

    return cupy


@functools.cache
def module(file: str, defines, device: int):
    """The compiled text of a file, kept on disk by CuPy."""
    options = (STANDARD, *(f"-D{name}={value}" for name, value in defines))
    return cupy().RawModule(code=expanded(file), options=options)


@functools.cache
def function(kernel: Kernel, device: int, shared_bytes: int):
    """A compiled kernel on one device that may have this much shared memory."""
    found = module(kernel.file, kernel.defines, device).get_function(kernel.name)
    if shared_bytes > 48 * 1024:
        found.max_dynamic_shared_size_bytes = shared_bytes
    return found


def launch(kernel: Kernel, grid, block, args, shared_bytes: int = 0) -> None:
    """Starts a kernel on the current device, in CuPy's current stream. Numbers get the types that it declares."""
    pairs = zip(signature(kernel), args, strict=True)
    cast = [np.uint64(0) if arg is None else arg if p.pointer else p.dtype.type(arg) for p, arg in pairs]
    function(kernel, cupy().cuda.runtime.getDevice(), shared_bytes)(grid, block, cast, shared_mem=shared_bytes)


def plan_or_reason(*convolution, **options):
    """(plan, None); raises an error that says why if tensor cores do not take this convolution."""
    return required_plan(*convolution, **options), None


class ModelNew(nn.Module):
    """The reference's arguments, parameters and buffers, drawn and named as there. `groups` is unused, as there."""

    def __init__(self, in_channels, out_channels, kernel_size, stride, padding, groups, num_groups):
        super().__init__()
        if stride != 1:
            raise ValueError(f"the kernels in this file take stride 1, received {stride}")
        self.conv_transpose = ConvTranspose2d(in_channels, out_channels, kernel_size, stride, padding)
        self.batch_norm = BatchNorm2d(out_channels)
        self.group_norm = GroupNorm(num_groups, out_channels)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        conv, group = self.conv_transpose, self.group_norm
        return self.batch_norm.apply_with(
            conv_bn_tanh_max_pool_group_norm,
            x,
            conv_weight=conv.weight,
            conv_bias=conv.bias,
            padding=conv.padding,
            num_groups=group.num_groups,
            group_weight=group.weight,
            group_bias=group.bias,
            group_eps=group.eps,
        )


batch_size = 512
in_channels = 64
out_channels = 128
height = width = 32
kernel_size = 5
stride = 1
padding = 1
groups = 8
num_groups = 8


def get_inputs():
    return [torch.rand(batch_size, in_channels, height, width)]


def get_init_inputs():
    return [in_channels, out_channels, kernel_size, stride, padding, groups, num_groups]
