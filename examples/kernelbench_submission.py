"""ConvTranspose2d -> BatchNorm2d -> Tanh -> MaxPool2d -> GroupNorm, KernelBench level 2 problem 11, on CUDA C kernels.

CuPy compiles the kernels (NVRTC: neither nvcc nor a C++ compiler is needed) and starts them on the memory of PyTorch's
tensors, in torch's current stream. All operators are fused, forward and backward. The convolution's precision is the
one that torch.backends.cudnn.allow_tf32 chooses. For contiguous float32 tensors on GPUs of compute capability 8.0 or
newer, and the shapes that tensor-core kernels take: stride 1, channels in multiples of 16 up to 512, kernels up to 7x7,
images up to 70x70, before and behind the convolution. Others are refused.

The first call of a kind records which kernels it starts on what (`call`). Later calls only allocate and start them.

Written by `python3 -m tools.submission`: change the package, not this file.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import itertools
import math
import re
import struct
import sys
import tempfile
from collections.abc import Iterable
from functools import cache as until_overridden
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import torch
from torch import nn

# ----------------------------------------------------------------------------------------------------------------------
# cupy_kernels/driver.py
#
# Launches that overlap the kernel before them, by the CUDA driver's cuLaunchKernelEx, which CuPy does not have.

_OVERLAPPING = 6  # CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
_LEAST_VERSION = 12030  # CUDA 12.3, from which on CUDA graphs can have such launches
_WAITING = 90  # what a kernel is compiled for, at least, if wait_for_earlier_kernels() of common.cuh is to do something


class _Attribute(ctypes.Structure):
    """CUlaunchAttribute."""

    _fields_ = [("id", ctypes.c_int), ("pad", ctypes.c_int), ("value", ctypes.c_int * 16)]


class Config(ctypes.Structure):
    """CUlaunchConfig of a launch that may start while the kernel before it ends."""

    _fields_ = [
        ("grid", ctypes.c_uint * 3),
        ("block", ctypes.c_uint * 3),
        ("shared_bytes", ctypes.c_uint),
        ("stream", ctypes.c_size_t),
        ("attributes", ctypes.POINTER(_Attribute)),
        ("count", ctypes.c_uint),
    ]

    def __init__(self, grid, block, shared_bytes: int):
        overlapping = ctypes.pointer(_Attribute(_OVERLAPPING, 0, (1,)))
        super().__init__(tuple(grid), tuple(block), shared_bytes, 0, overlapping, 1)
        self._address, self._launch = ctypes.addressof(self), launcher()

    def start(self, kernel: int, arguments: int, stream: int) -> int:
        """Starts the kernel of this handle in a stream. Returns an error number, or 0.

        arguments: the address of an array of the addresses of the arguments' values.
        """
        if self.stream != stream:
            self.stream = stream
        return self._launch(self._address, kernel, arguments, None)


def config(step, function) -> Config | None:
    """The `Config` of a `launch.Step`, if it may start while the kernel before it ends. function: CuPy's, compiled."""
    overlapping = step.overlapping and overlaps() and function.ptx_version >= _WAITING
    return Config(step.grid, step.block, step.shared_bytes) if overlapping else None


@functools.cache
def overlaps() -> bool:
    """Whether the driver has launches that overlap."""
    version = ctypes.c_int()
    return _driver().cuDriverGetVersion(ctypes.byref(version)) == 0 and version.value >= _LEAST_VERSION


@functools.cache
def launcher():
    """cuLaunchKernelEx(address of a Config, kernel, address of its arguments, None), which returns an error number."""
    function = _driver().cuLaunchKernelEx
    function.argtypes = [ctypes.c_void_p] * 4
    return function


@functools.cache
def _driver():
    return ctypes.CDLL("libcuda.so.1")


# ----------------------------------------------------------------------------------------------------------------------
# cupy_kernels/errors.py
#
# Exceptions of this package, besides ValueError and TypeError.

class UnsupportedError(ValueError):
    """These kernels do not support a call, but others may. The message gives the reason."""


# ----------------------------------------------------------------------------------------------------------------------
# cupy_kernels/parsing.py
#
# Parses kernel sources: where kernels are in the text, and their parameters.

# Comments and strings are tokens of their own, so that braces in them do not count.
_BRACES = re.compile(r'//[^\n]*|/\*.*?\*/|"(?:\\.|[^"\\])*"|[{}]', re.DOTALL)
_PARENTHESES = r"\((?:[^()]|\((?:[^()]|\([^()]*\))*\))*\)"
_ATTRIBUTES = rf"(?:(?:static|inline|__(?:launch_bounds|maxnreg|attribute|cluster_dims)__\s*{_PARENTHESES})\s*)*"
_KERNEL = re.compile(  # it begins where blanks begin, not at each of them
    rf'(?<![ \t])[ \t]*(extern\s+"C"\s+)?{_ATTRIBUTES}__global__\s+{_ATTRIBUTES}void\s+{_ATTRIBUTES}'
    rf"(\w+)\s*({_PARENTHESES})\s*(?=\{{)"
)
_NO_TYPE = ("*", "const", "volatile", "INOUT", "__restrict__", "__restrict", "__grid_constant__", "struct")
_C_BLOCK = re.compile(r'\bextern\s+"C"\s*\{')
SYNONYMS = {
    "long long": "i64",
    "long long int": "i64",
    "signed": "int",
    "unsigned int": "unsigned",
    "unsigned char": "u8",
}


def span(text, name) -> tuple[int, int] | None:
    """(start, end) of the definition of the kernel `name` in `text`; None if it is not there."""
    match = definitions(text).get(name)
    return match and (match.start(), _end(text, match) or len(text))


@functools.lru_cache(64)
def definitions(text: str) -> dict[str, re.Match]:
    """{name: match of the declaration} of the kernels that `text` defines, extern "C" or inside such a block."""
    code = _without_comments(text)
    blocks = [range(block.end(), _end(code, block, 1) or len(code)) for block in _C_BLOCK.finditer(code)]
    found = [m for m in _KERNEL.finditer(code) if m[1] or any(m.start(2) in block for block in blocks)]
    return {match[2]: match for match in found}


def _without_comments(text):
    return _BRACES.sub(lambda token: re.sub(r"[^\n]", " ", token[0]) if token[0][0] == "/" else token[0], text)


def _end(text, declaration, depth=0) -> int | None:
    for token in _BRACES.finditer(text, declaration.end()):
        depth += {"{": 1, "}": -1}.get(token[0], 0)
        if token[0] == "}" and depth == 0:
            return token.end()
    return None


def declarations(text: str) -> dict[str, list[tuple[str, str]]]:
    """{kernel: [(type, name) of each parameter]} of the kernels in `text`; types as "const scalar_t*"."""
    return {
        name: [_split(p) for p in match[3][1:-1].split(",") if p.strip() not in ("", "void")]
        for name, match in definitions(text).items()
    }


def _split(declaration: str) -> tuple[str, str]:
    found = re.fullmatch(r"(.*?)(\w+)\s*((?:\[[^]]*\])?)", declaration.strip(), re.DOTALL)
    if (
        not found
        or not found[1]
        or re.search(r"[^\w\s*]", found[1])
        or (found[1] + found[3]).count("*") + bool(found[3]) > 1
    ):
        raise ValueError(
            f"a kernel's parameter is an array, as in const float* x, or a number, as in int size; received "
            f"{declaration.strip()!r}. Pass several arrays one by one, and what belongs together as numbers"
        )
    words = found[1].replace("*", " * ").split()
    kind = " ".join(w for w in words if w not in _NO_TYPE)
    pointee = words[: words.index("*")] if "*" in words else words  # behind it, const is the pointer's
    marks = [w for w in ("INOUT", "const") if w in pointee]
    pointer = "*" if found[3] or "*" in words else ""
    return " ".join([*marks, SYNONYMS.get(kind, kind)]) + pointer, found[2]


# ----------------------------------------------------------------------------------------------------------------------
# cupy_kernels/source.py
#
# Kernel sources: text of .cu files with includes expanded, signatures of kernels, and a digest of all sources.

# Scalar types of the kernels, and the NumPy dtype of an array that holds them. NumPy has no bfloat16: its arrays travel
# as int16.
source_DTYPES = {
    "float": np.dtype(np.float32),
    "double": np.dtype(np.float64),
    "half_t": np.dtype(np.float16),
    "bf16_t": np.dtype(np.int16),
    "u8": np.dtype(np.uint8),
    "int": np.dtype(np.int32),
    "i64": np.dtype(np.int64),
    "bool": np.dtype(np.bool_),
    "signed char": np.dtype(np.int8),
    "unsigned": np.dtype(np.uint32),
    "unsigned long long": np.dtype(np.uint64),
}
SCALARS = {dtype: name for name, dtype in source_DTYPES.items()}


class Variant(NamedTuple):
    """A .cu file and the macros it is compiled with: one compilation, which gives all kernels of the file.

    architecture: the only one for which it compiles and on which it runs ("sm_90a"); None if there is no such limit.
    """

    file: str
    defines: tuple[tuple[str, str | int], ...] = ()
    architecture: str | None = None

    def __str__(self):
        return " ".join([self.file, *(f"-D{k}={v}" for k, v in self.defines)])

    def kernel(self, name: str) -> "Kernel":
        """One of its kernels."""
        return Kernel(self.file, name, self.defines, self.architecture)


class Kernel(NamedTuple):
    """One kernel of a `Variant`."""

    file: str
    name: str
    defines: tuple[tuple[str, str | int], ...] = ()
    architecture: str | None = None

    def __str__(self):
        return f"{self.name} [{self.variant}]"

    @property
    def variant(self) -> Variant:
        return Variant(self.file, self.defines, self.architecture)


class Parameter(NamedTuple):
    """One parameter of a kernel. `dtype` is None if the text does not determine it."""

    name: str
    dtype: np.dtype | None
    pointer: bool
    const: bool
    inout: bool


def no_kernel(where: str, name: str, found: Iterable[str]) -> ValueError:
    """The error for a text that lacks a kernel, and has those that were found."""
    return ValueError(
        f"{where} has no kernel {name!r}; it has {', '.join(found) or 'none'}. "
        'Kernels are written: extern "C" __global__ void name(...)'
    )


@until_overridden
def signature(kernel: Kernel) -> tuple[Parameter, ...]:
    """Parameters of `kernel` as its text declares them.

    Raises ValueError if the file has no such kernel, or if a scalar parameter has a type that is not in DTYPES.
    """
    found = declarations(expanded(kernel.file))
    if kernel.name not in found:
        raise no_kernel(kernel.file, kernel.name, found)
    return tuple(_parameter(kernel, *p) for p in found[kernel.name])


@until_overridden
def overlapping(kernel: Kernel) -> bool:
    """Whether the kernel's first statement is wait_for_earlier_kernels(), so that it may start while those end."""
    return re.match(r"[^{]*{\s*wait_for_earlier_kernels\s*\(\s*\)\s*;", _code(kernel)) is not None


def _code(kernel):
    """The kernel's text without comments."""
    text = expanded(kernel.file)
    return re.sub(r"//[^\n]*|/\*.*?\*/", "", text[slice(*span(text, kernel.name))], flags=re.DOTALL)


def _parameter(kernel: Kernel, kind: str, name: str) -> Parameter:
    marks = [word for word in kind.split() if word in ("INOUT", "const")]
    base = " ".join(kind.split()[len(marks) :])  # "unsigned int" is not "int"
    base, stars = base.rstrip("*"), base.count("*")
    kind = str(dict(kernel.defines).get(base, base))
    dtype = None if stars > 1 else source_DTYPES.get(SYNONYMS.get(kind, kind))
    if dtype is None and not stars:
        raise ValueError(
            f"{kernel}: {name} is a {base}; scalar parameters are {', '.join(source_DTYPES)}, or a macro of these"
        )
    return Parameter(name, dtype, stars > 0, "const" in marks, "INOUT" in marks)


# ----------------------------------------------------------------------------------------------------------------------
# cupy_kernels/nvrtc.py
#
# NVRTC through ctypes: finds the library in NVIDIA's pip wheels, and compiles without a GPU and without CuPy.

STANDARD = "-std=c++17"
WGMMA_MAJOR = 12  # the first version that compiles for sm_90a


def _wheel_libraries(package: str, pattern: str) -> list[Path]:
    spec = importlib.util.find_spec("nvidia")
    roots = spec.submodule_search_locations if spec else ()
    return sorted(p for root in roots for p in Path(root, package, "lib").glob(pattern))


@functools.cache
def preload_wheels() -> tuple[str, ...]:
    """Loads CUDA 11's runtime and NVRTC from their pip wheels, if installed, and returns the names of what it loaded.

    CuPy then finds the loaded library by its name. CuPy 14 (CUDA 12 and newer) finds its wheels itself.
    """
    paths = (
        _wheel_libraries("cuda_runtime", "libcudart.so.11*")
        + _wheel_libraries("cuda_nvrtc", "libnvrtc-builtins.so.11*")
        + _wheel_libraries("cuda_nvrtc", "libnvrtc.so.11*")
    )
    for path in paths:
        ctypes.CDLL(str(path), ctypes.RTLD_GLOBAL)
    return tuple(str(p) for p in paths)


def ptx_architecture(capability: str, known: Iterable[int]) -> str | None:
    """The architecture of PTX ("compute_90") for a GPU ("120") that is newer than the `known` ones, else None.

    For such a GPU, CuPy would request a cubin of the newest architecture that CuPy knows. That fails, because the GPU's
    major version differs or because NVRTC does not know it. The driver knows the GPU, and can compile older PTX.
    """
    older = [number for number in known if number <= int(capability)]
    newest = max(older, default=int(capability))
    return None if newest == int(capability) else f"compute_{newest}"


# ----------------------------------------------------------------------------------------------------------------------
# cupy_kernels/launch.py
#
# The only place that starts kernels, on CuPy arrays (GPU) or NumPy arrays (emulator).

NULL = np.uint64(0)  # a null pointer
# The least numbers that a type rounds to infinity. A float64 holds all floats.
_TOO_LARGE = {np.dtype(np.float16): 65520.0, np.dtype(np.float32): 2.0**128 - 2.0**103}


class Step(NamedTuple):
    """A launch that was checked but not started. args: arrays, NULL, and numbers of the declared types."""

    requested: Kernel
    kernel: Kernel  # in force
    parameters: tuple[Parameter, ...]
    grid: tuple[int, int, int]
    block: tuple[int, int, int]
    args: list
    shared_bytes: int
    cooperative: bool
    overlapping: bool


class Packed:
    """A launch as a backend starts it. numbers: the kernel's handle, grid, block, bytes of shared memory.

    config: what the backend's `config` gives for the step.
    parameters: the address of `pointers`, an array of the addresses of the arguments' values.
    """

    __slots__ = ("config", "numbers", "parameters", "pointers", "step")

    def __init__(self, step: Step, backend: Backend, pointers: np.ndarray):
        handle, self.config = backend.handle(step.kernel, step.shared_bytes), backend.config(step)
        self.step, self.numbers = step, (handle, *step.grid, *step.block, step.shared_bytes)
        self.pointers, self.parameters = pointers, pointers.ctypes.data

    @property
    def words(self) -> np.ndarray:
        """The current arguments, 8 bytes each."""
        return np.array([ctypes.c_uint64.from_address(int(place)).value for place in self.pointers], np.uint64)


class Batch:
    """Launches that are started together. Their arguments are in one array of 8-byte words.

    First come the addresses of `count` arguments of a call, addresses inside them, and the varying numbers; these are
    written at each start. Then come the other numbers and, for each launch, the addresses of its arguments' values.

    launches: (step, arguments). Each argument is its bytes, a stand-in (`plan.Slot`), or a `Varying`.
    """

    def __init__(self, backend: Backend, launches: list[tuple[Step, list]], count: int = 0):
        places, varying = {(index, 0): index for index in range(count)}, {}  # {(argument, dtype): parameter}
        for arg, parameter in (pair for step, args in launches for pair in zip(args, step.parameters)):
            if isinstance(arg, Varying):
                varying[arg.index, parameter.dtype] = parameter
            elif not isinstance(arg, np.generic):
                places.setdefault((arg.index, arg.offset), len(places))
        self.backend, self.launches = backend, []
        self.varying = [(index, parameter) for (index, _), parameter in varying.items()]
        self.inside = list(places)[count:]
        places.update(zip(varying, itertools.count(len(places))))
        end = len(places)
        self.pack = struct.Struct(f"={end}Q").pack_into
        self.words = words = np.zeros(end + 2 * sum(len(args) for _, args in launches), np.uint64)
        for step, args in launches:
            pointers = []
            for arg, parameter in zip(args, step.parameters):
                place = end
                if isinstance(arg, np.generic):
                    words[end : end + 1].view(np.uint8)[: arg.itemsize] = np.frombuffer(arg.tobytes(), np.uint8)
                else:
                    place = places[arg.index, parameter.dtype if isinstance(arg, Varying) else arg.offset]
                end += place == end
                pointers.append(words.ctypes.data + 8 * place)
            words[end : end + len(pointers)] = pointers
            self.launches.append(Packed(step, backend, words[end : end + len(pointers)]))
            end += len(pointers)

    def start(self, pointers: list[int], values: list, stream: int | None) -> None:
        """Starts the launches in a stream of the current GPU. pointers, values: of the call's arguments, by index."""
        inside = [pointers[index] + offset for index, offset in self.inside]
        varying = [word(values[index], parameter) for index, parameter in self.varying]
        self.pack(self.words, 0, *pointers, *inside, *varying)
        self.backend.start(self.launches, stream)


def word(number: float, parameter: Parameter) -> int:
    """The word of a `Batch` that holds the number for a parameter."""
    return int.from_bytes(struct.pack(parameter.dtype.char, held(number, parameter)), sys.byteorder)


def held(number: float, parameter: Parameter) -> float:
    """The number. Raises ValueError if it is finite and would be infinite in the parameter's type."""
    if math.inf > abs(number) >= _TOO_LARGE.get(parameter.dtype, math.inf):
        raise _does_not_fit(parameter, number)
    return number


def _does_not_fit(parameter, number) -> ValueError:
    dtype = parameter.dtype
    limits = (np.finfo if dtype.kind == "f" else np.iinfo)(dtype)
    return ValueError(f"{parameter.name}={number} does not fit {dtype}, which holds {limits.min} to {limits.max}")


class Varying(float):
    """A number in a recorded call that may differ in other calls. index: of the argument."""

    index: int


# ----------------------------------------------------------------------------------------------------------------------
# cupy_kernels/plan.py
#
# A call as a plan: its launches are recorded once, and started with the arguments of every call of the same kind.

ALIGNMENT = 256  # bytes, of arrays that share memory


class Slot:
    """Stands for a contiguous array that begins `offset` bytes into argument `index` of a call.

    alignment: the argument's address modulo 16. A launch may depend on this, but not on the address itself.
    """

    flags = SimpleNamespace(c_contiguous=True)

    def __init__(self, index: int, shape, dtype, alignment: int = 0, offset: int = 0):
        self.index, self.shape, self.dtype = index, tuple(shape), np.dtype(dtype)
        self.alignment, self.offset = alignment, offset
        self.size, self.ndim, self.itemsize = math.prod(self.shape), len(self.shape), self.dtype.itemsize
        self.nbytes = self.size * self.itemsize

    @property
    def address(self) -> int:
        """An address with the alignment of the array."""
        return self.alignment + self.offset

    def reshape(self, shape) -> "Slot":
        """The same elements in another shape."""
        return Slot(self.index, shape, self.dtype, self.alignment, self.offset)

    def view(self, dtype) -> "Slot":
        """The same bytes as a one-dimensional array of another type."""
        return Slot(self.index, (self.nbytes // np.dtype(dtype).itemsize,), dtype, self.alignment, self.offset)

    def __getitem__(self, rows: int | slice) -> "Slot":
        """One row, or consecutive rows."""
        row, picked = self.shape[1:], range(self.shape[0])[rows]
        first, shape = (picked, row) if isinstance(rows, int) else (picked.start, (len(picked), *row))
        offset = self.offset + first * math.prod(row) * self.itemsize
        return Slot(self.index, shape, self.dtype, self.alignment, offset)


def room(arrays: dict[str, tuple[tuple[int, ...], type]]) -> int:
    """Size in bytes of the memory for `parts`."""
    return sum(map(_rounded, arrays.values()))


def parts(memory, arrays: dict[str, tuple[tuple[int, ...], type]]) -> dict:
    """{name: array}, cut out of `memory`, an array of `room(arrays)` bytes. arrays: {name: (shape, dtype)}."""
    found, start = {}, 0
    for name, (shape, dtype) in arrays.items():
        end = start + math.prod(shape) * np.dtype(dtype).itemsize
        found[name] = memory[start:end].view(dtype).reshape(shape)
        start += _rounded((shape, dtype))
    return found


def _rounded(array):
    shape, dtype = array
    return -(-math.prod(shape) * np.dtype(dtype).itemsize // ALIGNMENT) * ALIGNMENT


# ----------------------------------------------------------------------------------------------------------------------
# cupy_kernels/common.py
#
# Shared code of the operators' host modules: macros for dtypes, launch sizes, and checks.

FLOATS = ("float", "double", "half_t", "bf16_t")
THREADS = 256
# An H100's. Plans that would sum in another order with another number take this one, so that results depend on shapes
# alone. Those of tensor cores take the GPU's own, which is worth more there.
MULTIPROCESSORS = 132


def scalar(array) -> str:
    """The kernels' name of an array's type. TypeError unless it is float32, float64, float16 or int16 (bfloat16)."""
    name = SCALARS.get(array.dtype)
    if name not in FLOATS:
        raise TypeError(
            f"arrays must be float32, float64, float16, or int16 that holds bfloat16; received {array.dtype}"
        )
    return name


def accumulator(name: str) -> str:
    """The accumulator type for tensors of type `name`."""
    return "double" if name == "double" else "float"


def scalar_macros(name: str) -> tuple:
    """Macros scalar_t and acc_t for arrays of the type `name`."""
    return (("scalar_t", name), ("acc_t", accumulator(name)))


def row_width(length: int, *arrays) -> int:
    """Elements of the widest access, at most 16 bytes, that divides rows of `length` elements in all arrays."""
    width = 16 // max(a.itemsize for a in arrays)
    while length % width or any(address(a) % (width * a.itemsize) for a in arrays):
        width //= 2
    return width


def address(array) -> int:
    """Address of an array's first element."""
    if isinstance(array, Slot):
        return array.address
    return array.ctypes.data if isinstance(array, np.ndarray) else array.data.ptr


def ceil_div(a: int, b: int) -> int:
    """The smallest integer that is at least a / b."""
    return -(-a // b)


# ----------------------------------------------------------------------------------------------------------------------
# cupy_kernels/fp16_tiles.py
#
# Tensors [N, C, H, W] as packed fp16 tiles [N, chunks, H * W, 64] under one power-of-two scale, see fp16_tiles.cu.

_BATCH = 8  # accesses of at most 16 bytes that a thread of largest_magnitude has in flight
LINE_BYTES = 128


def chunk_channels(split: int) -> int:
    """The number of channels in a line."""
    return LINE_BYTES // 2 // split


def packing_macros(split: int) -> dict:
    """Macros of fp16_tiles.cuh, without IN_CHANNELS."""
    return {"SPLIT": split, "CHUNK_CHANNELS": chunk_channels(split), "LINE_BYTES": LINE_BYTES}


def packed_shape(shape, split: int) -> tuple[int, int, int, int]:
    """[N, chunks, pixels, 64], the shape of the packed float16 tiles of a tensor of this shape."""
    return shape[0], ceil_div(shape[1], chunk_channels(split)), math.prod(shape[2:]), LINE_BYTES // 2


def scale_fp16(source, exponents, scaled) -> None:
    """Writes `scaled`, float16 of the shape of `source`, under the scale of the smallest of `exponents`."""
    width = access_width(source, source.size)
    kernel = Kernel("fp16_tiles.cu", "scale_fp16", _macros(scalar(source), 1, width))
    blocks = ceil_div(source.size, THREADS * width)
    launch(kernel, (blocks, 1, 1), (THREADS, 1, 1), (source, exponents, scaled, exponents.size, source.size))


def _macros(name, split, width):
    sizes = {"WIDTH": width, "THREADS": THREADS, "BATCH": _BATCH}
    return (*scalar_macros(name), *packing_macros(split).items(), *sizes.items())


def tile_pixels(split: int, width: int) -> int:
    """Pixels that a block packs. A thread has 8 channels of `width` of them."""
    return THREADS * 8 // chunk_channels(split) * width


def access_width(source, length: int) -> int:
    """Elements of an access to rows of this length: four, or one where these do not divide."""
    return 4 if row_width(length, source) >= 4 else 1


# ----------------------------------------------------------------------------------------------------------------------
# cupy_kernels/conv_wgmma.py
#
# How blocks share a convolution in conv_wgmma.cuh, the tensor-core convolution of sm_90a.

# {(split, dgrad): most tiles of 8 pixels and 64 channels whose sums fit a warpgroup's registers}; a tile has two sums,
# with split 2 three.
_MOST_TILES = {(1, False): 16, (1, True): 18, (2, False): 15, (2, True): 15}
_STAGES = (6, 5, 4)  # preferred first
_STEP_CHANNELS = 32
_FEW_WINDOWS = 64  # the most of a block, for few images


class Layout(NamedTuple):
    """How blocks share a tensor-core convolution."""

    macros: dict  # of the kernel's file
    planes: dict  # of pooled_planes.cuh


class _Unit(NamedTuple):
    """A block's part of an image."""

    rows: int  # of windows
    windows: int  # from the first to the last one
    along: int  # bytes from 8 channels to the next 8; an odd multiple of 16, to use different banks
    held: int  # chunks of channels in shared memory at once
    stages: int
    shared_bytes: int


def architecture(macros) -> str | None:
    """The only architecture for which a kernel with these macros compiles; None if there is no such limit."""
    return "sm_90a" if ("WGMMA", 1) in macros else None


def layout(
    split: int,
    dgrad: bool,
    packed: bool,
    images: int | None,
    channels,
    size,
    out,
    kernel,
    pad,
    limit: int,
    multiprocessors: int,
) -> Layout | None:
    """The layout, or None if there is not enough shared memory.

    packed: whether x is packed tiles. Not all its channels need be in shared memory at once.
    images: the number of images if they are few. A block then takes a small part of an image, so that the blocks fill
        the GPU. None: a block takes as much of an image as fits.
    channels: (of x, of the output).
    size, out, kernel, pad: (height, width).
    limit: bytes of shared memory.
    """
    warpgroups_m = 1 if channels[1] <= 64 else 2
    warpgroups_n = 2 // warpgroups_m
    tiles_m = ceil_div(channels[1], 64 * warpgroups_m)
    steps = ceil_div(channels[0], _STEP_CHANNELS)
    step_bytes = warpgroups_m * 64 * _STEP_CHANNELS * 2 * split
    chunks = ceil_div(channels[0], chunk_channels(split))
    gap = max(0, kernel[1] - 1 - pad[1])
    pitch = ceil_div(max(size[1] + gap, out[1]), 2) * 2
    window_pitch, windows_w, windows_h = pitch // 2, ceil_div(out[1], 2), ceil_div(out[0], 2)
    granule = 1 if dgrad else 4  # tiles that stay together: four in conv_bn_pool
    last_granule = granule if warpgroups_n > 1 else 1
    pixelwise = dgrad and out[1] % 2  # rows of odd length are stored pixel by pixel, which takes registers
    most = _MOST_TILES[split, dgrad] - (4 if pixelwise else 0)

    def unit(rows):
        """A block's part of an image, `rows` rows of windows; None if it does not fit."""
        band_lines = gap + (2 * rows + kernel[0] - 1) * pitch
        along = ceil_div(band_lines * 16 - 16, 128) * 128 + 16
        windows = (rows - 1) * window_pitch + windows_w
        one_pass = ceil_div(windows, 4 * warpgroups_n) <= most // last_granule * last_granule
        for held in (chunks, 2) if packed and one_pass and chunks > 2 else (chunks,):
            parts = min(steps * split * _STEP_CHANNELS // 8, held * LINE_BYTES // 16)
            band_bytes = ceil_div(parts * along, 128) * 128
            stages = next((n for n in _STAGES if band_bytes + n * step_bytes <= limit), None)
            if stages:
                return _Unit(rows, windows, along, held, stages, band_bytes + stages * step_bytes)
        return None

    rows = sorted({ceil_div(windows_h, units) for units in range(1, windows_h + 1)}, reverse=True)
    choices = list(filter(None, map(unit, rows)))
    if not choices:
        return None
    if images:
        choices = [u for u in choices if u.windows <= _FEW_WINDOWS] or choices[-1:]
        at_once = [u for u in choices if images * ceil_div(windows_h, u.rows) * tiles_m <= multiprocessors]
        choices = at_once[-1:] or choices
    rows, _, along, held, stages, shared_bytes = choices[0]
    images_units = [min(rows, windows_h - first) for first in range(0, windows_h, rows)]
    needed = [ceil_div((n - 1) * window_pitch + windows_w, 4 * warpgroups_n) for n in images_units]
    tiles, last = _tiles(needed, granule, last_granule, most, images is None)
    macros = {
        "WARPS_N": warpgroups_n,
        "UNIT_ROWS": rows,
        "TILES": tiles,
        "LAST_TILES": last,
        "STAGES": stages,
        "GAP": gap,
        "ALONG": along,
        "CHUNKS_HELD": held,
        "TILE_M": 64 * warpgroups_m,
        "THREADS": 128 * (warpgroups_m * warpgroups_n + 1),  # a warpgroup copies
        "PACKED_WIDTH": steps * _STEP_CHANNELS * split,
        "SHARED_BYTES": shared_bytes,
    }
    units, (stride, rest) = len(images_units), (ceil_div(n * window_pitch, 16) * 16 for n in (rows, images_units[-1]))
    return Layout(macros, planes(1, window_pitch, units, rows * window_pitch, stride, (units - 1) * stride + rest))


def _tiles(needed, granule: int, last_granule: int, most: int, many: bool) -> tuple[int, int]:
    """(TILES, LAST_TILES) with which units take the least time.

    needed: the number of tiles of each unit.
    many: whether a block has many units, so that it pays to compile another turn for the smallest ones.
    """
    if max(needed) <= most // last_granule * last_granule:
        tiles, smallest = (ceil_div(n, last_granule) * last_granule for n in (max(needed), min(needed)))
        return tiles, smallest if many else tiles

    def cost(choice):
        """Relative time of all units: few tiles wait for shared memory, and each turn has a start and an end."""
        tiles, last = choice
        passes = [max(1, ceil_div(n - max(0, last - tiles), tiles)) for n in needed]
        rests = [n - (p - 1) * tiles for n, p in zip(needed, passes)]
        lasts = [last if (n <= last if last < tiles else n > tiles) else tiles for n in rests]
        taken = lasts + [tiles] * (sum(passes) - len(needed))
        return sum(max(2 * t, t + 8) + 4 for t in taken)

    choices = itertools.product(range(granule, most + 1, granule), range(last_granule, most + 1, last_granule))
    return min(choices, key=cost)


def planes(wgmma: int, window_pitch: int, units: int, unit_windows: int, unit_stride: int, plane_stride: int) -> dict:
    """Macros of pooled_planes.cuh."""
    return {
        "WGMMA": wgmma,
        "WINDOW_PITCH": window_pitch,
        "UNITS": units,
        "UNIT_WINDOWS": unit_windows,
        "UNIT_STRIDE": unit_stride,
        "PLANE_STRIDE": plane_stride,
    }


# ----------------------------------------------------------------------------------------------------------------------
# cupy_kernels/conv_transpose.py
#
# 2D transposed convolution: general kernels for all hyper-parameters, without tensor cores.

_INT_MAX = 2**31 - 1


class Geometry(NamedTuple):
    """Hyper-parameters of a transposed convolution: pairs (height, width), and groups."""

    stride: tuple[int, int]
    padding: tuple[int, int]
    output_padding: tuple[int, int]
    dilation: tuple[int, int]
    groups: int


@functools.lru_cache(maxsize=1024)
def output_shape(x_shape, w_shape, geometry: Geometry) -> tuple[int, int, int, int]:
    """Shape of y. Raises ValueError for dimensions, channels, hyper-parameters or sizes that are not valid."""
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
            f"input has {x_shape[1]} channels, weight {tuple(w_shape)} takes {w_shape[0]}; "
            f"groups={g.groups} must divide this number"
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
        if math.prod(s[1:]) > _INT_MAX:
            raise ValueError(f"one image of the {name} has more than {_INT_MAX} elements: shape {tuple(s)}")
    for name, s in (("input", x_shape), ("output", shape)):
        if s[0] * s[2] * s[3] > _INT_MAX - 1024:  # room for a tile
            raise ValueError(f"the {name} of shape {tuple(s)} has more pixels than {_INT_MAX - 1024}: split the batch")
    return shape


def logical(shape, channels_last) -> tuple[int, ...]:
    """[N, C, H, W], from the shape of an array of either format."""
    return (shape[0], shape[3], *shape[1:3]) if channels_last else tuple(shape)


# ----------------------------------------------------------------------------------------------------------------------
# cupy_kernels/conv_transpose_mma.py
#
# 2D transposed convolution on tensor cores: stride 1, dilation 1, one group, channels in multiples of 16.

MANY_IMAGES = 96  # from so many on, a block takes as much of an image as fits, to load x less often
_MANY_FOR_FP32_DGRAD = 64  # the same for dgrad with split 2. If x is not packed, it is faster by mma.sync then.
_MAX_IMAGE = 70  # height or width of x or dy: with a 7 x 7 kernel, dy of a 64 x 64 image is 70 x 70
_TILES = 4  # of four windows, that a warp has in a turn: a thread has no registers for more
conv_transpose_mma_STAGES = (4, 2)  # preferred first
_RESERVED = 6 * 1024  # shared memory for the kernels' own small arrays and an epilogue
_PACK_THREADS = 512  # a block, of which there are few: that of a row reads it in few rounds
_BLOCK_RESERVED = 1024  # shared memory that each block takes on top of its own


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
def conv_transpose_mma_plan(
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
    found = layout(split, dgrad, packed, *sizes, multiprocessors) if wgmma and not by_mma else None
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


def _layout(split, images, channels, size, out, kernel, pad, limit) -> Layout:
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

    # Few images: one turn a unit, to spread over the GPU; else as many as fit. N alone decides,
    # so that results of this kernel do not depend on the GPU's size. GPUs with little shared memory get smaller passes.
    def choices_with(warps_n):
        most_passes = ceil_div(windows, 4 * _TILES * warps_n) if images is None else 1
        return [(warps_n, passes, 1) for passes in range(most_passes, 0, -1)] + [(warps_n, 1, 0)]

    choices = choices_with(most_warps_n) + [(most_warps_n // 2, 1, 1), (most_warps_n // 2, 1, 0)]
    layouts = [(*choice, stages, limit) for choice, stages in itertools.product(choices, conv_transpose_mma_STAGES)]
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
    last = (windows - 1) % pass_windows + 1  # windows that are left for an image's last turn
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
    return Layout(macros, planes(0, windows_w, units, unit_windows, unit_windows, plane_stride))


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
    return Kernel("conv_transpose_mma.cu", "conv_transpose_mma", p.macros, architecture(p.macros))


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


# ----------------------------------------------------------------------------------------------------------------------
# cupy_kernels/pooled_tail.py
#
# The part of `conv_bn_pool` after the convolution, over its pooled sums: macros and variants, see pooled_tail.cuh.

# Warps of a block: few, each with more values, where registers hold these (RESIDENT of pooled_tail.cuh).
_FEW_WARPS, _MOST_WARPS, _RESIDENT = 8, 16, 24
_PART = 320  # values of a warp at most: 10 a lane


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


# ----------------------------------------------------------------------------------------------------------------------
# cupy_kernels/conv_bn_pool.py
#
# ConvTranspose2d -> BatchNorm2d -> activation -> MaxPool2d(2, 2) -> GroupNorm, pooled in the convolution's epilogue.

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


def conv_bn_pool_check_supported(p: Plan, groups: int) -> None:
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
    return Kernel("conv_bn_pool.cu", "conv_bn_pool", tuple(macros.items()), architecture(p.macros))


# ----------------------------------------------------------------------------------------------------------------------
# cupy_kernels/conv_wgrad_mma.py
#
# Weight gradient of the 2D transposed convolution on tensor cores, for what `conv_transpose_mma` supports.

_MOST_TAPS = 5  # neighbouring taps in a block: a thread has no registers for more
_MOST_STAGES, _MOST_STAGES_WGMMA = 6, 9
_MOST_TILES_N = 8  # tiles of sums in a warpgroup: a thread has no registers for more
_TILE_IC = 64  # input channels of a block of the kernel for wgmma
_BAND_ROWS = 16
conv_wgrad_mma_RESERVED = 2 * 1024  # shared memory for the kernel's own small arrays and the driver's


class conv_wgrad_mma_Plan(NamedTuple):
    """How blocks share a weight gradient. `macros` specialise the kernels."""

    macros: tuple
    output_shape: tuple
    split: int  # of the packed tiles, see `fp16_tiles`
    tiles: int
    splits: int
    bands_per_split: int  # the last split may have fewer
    threads: int
    shared_bytes: int
    partial_size: int  # elements of the workspace, float32


@functools.lru_cache(maxsize=1024)
def plan(
    x_shape,
    w_shape,
    geometry: Geometry,
    split: int,
    dtype: str,
    shared_limit: int,
    wgmma: bool = False,
    channels_last: bool = False,
    multiprocessors: int = MULTIPROCESSORS,
) -> conv_wgrad_mma_Plan:
    """The plan for the gradient of w [K, M, KH, KW] in the convolution of x [N, K, H, W], N at least 1.

    split: of the packed tiles of x and dy.
    dtype: the kernels' name of w's type.
    shared_limit: bytes of shared memory that a block may use.
    wgmma: whether GPU and NVRTC support it. The plan uses it where possible.
    channels_last: x is float16 [N, H, W, C] instead of tiles, with split 1.
    multiprocessors: the number that the GPU has. The sum is split over them.

    Raises UnsupportedError for what the kernels do not support.
    """
    check_supported(x_shape, w_shape, geometry, dtype)
    channels_in, channels_out, *kernel = w_shape
    height, width = x_shape[2:]
    output = output_shape(x_shape, w_shape, geometry)
    out = output[2:]
    taps = ceil_div(kernel[1], ceil_div(kernel[1], _MOST_TAPS))
    sizes = split, (channels_in, channels_out), taps, shared_limit
    found = (_wgmma_layout(width, *sizes) if wgmma else None) or conv_wgrad_mma_layout(*sizes)
    tiles = kernel[0] * ceil_div(kernel[1], taps) * found.channel_tiles
    bands = ceil_div(x_shape[0] * height, _BAND_ROWS)
    bands_per_split = ceil_div(bands, max(1, multiprocessors * found.blocks // tiles))
    splits = ceil_div(bands, bands_per_split)
    macros = {
        **shape_macros(dtype, (channels_in, channels_out), (height, width), out, kernel, geometry.padding),
        **packing_macros(split),
        "TAPS_W": taps,
        "CHANNELS_LAST": int(channels_last),
        "BAND_ROWS": _BAND_ROWS,
        "TILES": tiles,
        **found.macros,
    }
    size = channels_in * channels_out * kernel[0] * kernel[1]
    sizes = (tiles, splits, bands_per_split, macros["THREADS"], macros["SHARED_BYTES"], splits * size)
    return conv_wgrad_mma_Plan(tuple(macros.items()), output, split, *sizes)


class _Layout(NamedTuple):
    """The differences between the two main loops."""

    macros: dict
    channel_tiles: int
    blocks: int  # that share a multiprocessor


def conv_wgrad_mma_layout(split, channels, taps, limit) -> _Layout:
    """The layout for conv_wgrad_mma.cuh. Raises UnsupportedError if there is not enough shared memory."""
    columns = ceil_div(4, taps) * taps  # in a stage: at least 4, and a multiple of taps
    chunk = chunk_channels(split)

    def layout(warps):
        """(stages, bytes of a stage)"""
        stage_bytes = (1 + 16 * warps // chunk) * columns * _BAND_ROWS * LINE_BYTES
        blocks = 8 // warps
        return min(_MOST_STAGES, (limit - conv_wgrad_mma_RESERVED) // blocks // stage_bytes), stage_bytes

    choices = [(warps, *layout(warps)) for warps in (8, 4) if warps == 4 or channels[1] > 64]
    warps, stages, stage_bytes = next((c for c in choices if c[1] > 1), choices[-1])
    if stages < 2:
        # Then only one block fits a multiprocessor. Only GPUs with little shared memory need this.
        stages = min(_MOST_STAGES, (limit - conv_wgrad_mma_RESERVED) // stage_bytes)
    if stages < 2:
        raise UnsupportedError(f"it needs {2 * stage_bytes + conv_wgrad_mma_RESERVED} bytes of shared memory, the GPU has {limit}")
    tiles = ceil_div(channels[1], 16 * warps) * ceil_div(channels[0], chunk)
    macros = {"WGMMA": 0, "THREADS": 32 * warps, "TILE_OC": 16 * warps, "TILE_IC": chunk, "COLUMNS": columns}
    return _Layout({**macros, "STAGES": stages, "SHARED_BYTES": stages * stage_bytes}, tiles, 8 // warps)


def _wgmma_layout(width, split, channels, taps, limit) -> _Layout | None:
    """The layout for conv_wgrad_wgmma.cuh. None if there is not enough shared memory."""
    tiles_n = _MOST_TILES_N if channels[1] > 64 else channels[1] // 16
    columns = 4 if split == 1 else 1 if width % 2 else 2

    stage_bytes = columns * split * (1 + ceil_div(16 * tiles_n, 64)) * _BAND_ROWS * LINE_BYTES
    stages = min(_MOST_STAGES_WGMMA, (limit - conv_wgrad_mma_RESERVED) // stage_bytes)
    if stages < 5 + ceil_div(taps - 1, columns):
        return None
    tiles = ceil_div(channels[1], 16 * tiles_n) * ceil_div(channels[0], _TILE_IC)
    macros = {"WGMMA": 1, "THREADS": 384, "TILE_OC": 16 * tiles_n, "TILE_IC": _TILE_IC, "COLUMNS": columns}
    return _Layout({**macros, "STAGES": stages, "SHARED_BYTES": stages * (stage_bytes + 16) + 16}, tiles, 1)


def conv_wgrad_mma(p: conv_wgrad_mma_Plan, x_packed, x_exponents, x_sums, dy_packed, dy_exponents, borders, partial, dw) -> None:
    """Writes dw, the gradient of w, from x and the gradient of the output as packed tiles.

    x_exponents, dy_exponents: int32, at least one each; the smallest is the exponent of the tiles' scale. x_exponents
        may be None, for an x without a scale.
    x_sums, borders: both are given for an x whose means were subtracted, or both are None. With them, the sum of dy
        over all pixels must be 0 in each channel. x_sums: as given to `fp16_tiles.pack_fp16`. borders: float32 [parts,
        KH * KW, M]. Their sum over the parts is, for each tap, the sum of dy, under its tiles' scale, over the pixels
        that have no partner in x.
    partial: workspace, float32, written; its size is in the plan.

    Raises ValueError if only one of x_sums and borders is None.
    """
    if (x_sums is None) != (borders is None):
        given = "borders" if x_sums is None else "x_sums"
        raise ValueError(f"x_sums and borders go together, received {given} alone; give both, or None for both")
    launch(
        wgrad_kernel(p),
        (p.tiles * p.splits, 1, 1),
        (p.threads, 1, 1),
        (x_packed, dy_packed, partial, p.output_shape[0], p.bands_per_split),
        p.shared_bytes,
    )
    launch(
        wgrad_kernel(p)._replace(name="conv_wgrad_reduce"),
        (ceil_div(dw.size, THREADS), 1, 1),
        (THREADS, 1, 1),
        (partial, x_exponents, dy_exponents, x_sums, borders, dw, 0 if x_exponents is None else x_exponents.size)
        + (dy_exponents.size, p.splits)
        + (0 if borders is None else borders.shape[0],),
    )


def wgrad_kernel(p: conv_wgrad_mma_Plan) -> Kernel:
    """The kernel that `conv_wgrad_mma` launches first. `conv_wgrad_reduce` is compiled with it."""
    return Kernel("conv_wgrad_mma.cu", "conv_wgrad_mma", p.macros, architecture(p.macros))


# ----------------------------------------------------------------------------------------------------------------------
# cupy_kernels/conv_bn_pool_backward.py
#
# The backward of `conv_bn_pool`. Names and shapes are the same.

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


def weight_gradient(scratch, x, kept, made, dw, *, plan: conv_wgrad_mma_Plan) -> None:
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


# ----------------------------------------------------------------------------------------------------------------------
# modelnew/interop.py
#
# The border between torch and the kernels: DLPack views of tensors, on the tensors' device and torch's stream.

# What the kernels' host code takes for a tensor's dtype. bfloat16 travels as int16.
NUMPY = {
    torch.float32: np.dtype(np.float32),
    torch.float64: np.dtype(np.float64),
    torch.float16: np.dtype(np.float16),
    torch.bfloat16: np.dtype(np.int16),
    torch.bool: np.dtype(np.bool_),
    torch.int8: np.dtype(np.int8),
    torch.uint8: np.dtype(np.uint8),
    torch.uint32: np.dtype(np.uint32),
    torch.uint64: np.dtype(np.uint64),
    torch.int32: np.dtype(np.int32),
    torch.int64: np.dtype(np.int64),
}
TORCH = {array: tensor for tensor, array in NUMPY.items()}


# ----------------------------------------------------------------------------------------------------------------------
# cupy_kernels/gather_gemm_plan.py
#
# How blocks share the implicit GEMMs of `gather_gemm`: tiles, and splits of the sum. A model of time chooses them.

class Gpu(NamedTuple):
    """What a plan depends on besides the convolution."""

    wgmma: bool = False  # whether GPU and NVRTC have it; plans use it where it is faster
    sm75: bool = False  # whether kernels are to do with the instructions of sm_75
    multiprocessors: int = MULTIPROCESSORS


# ----------------------------------------------------------------------------------------------------------------------
# modelnew/numerics.py
#
# The precision of the transposed convolution: numeric classes, and the rule for using tensor cores.

class Choice(NamedTuple):
    """How the convolutions of a call multiply. A backward uses its forward's choice, even if settings changed since."""

    cls: str  # "tf32" or "fp32"
    wgmma: bool
    shared_bytes: int  # that a block may use
    multiprocessors: int
    sm75: bool  # whether the tensor-core kernels are those of sm_75
    without: str | None  # why there are no tensor cores

    @property
    def gpu(self) -> Gpu:
        """What implicit GEMMs are planned for."""
        return Gpu(self.wgmma, self.sm75, self.multiprocessors)


def tensor_core_plan(x_shape, dtype, w_shape, geometry: Geometry, choice: Choice, dgrad: bool = False, **options):
    """(plan, None) if the tensor-core kernels support the convolution of x, else (None, the reason).

    dtype: of x, NumPy's.
    dgrad: x is the incoming gradient, and the result is the gradient of the input.
    options: `channels_last` and `packed` of `conv_transpose_mma.plan`.
    """
    return plan_or_reason(conv_transpose_mma_plan, x_shape, dtype, w_shape, geometry, choice, dgrad=dgrad, **options)


def wgrad_plan(x_shape, dtype, w_shape, geometry: Geometry, choice: Choice, **options):
    """(plan, None) if the tensor-core kernels support the weight gradient of the convolution of x, else (None, reason).

    dtype: of w, NumPy's.
    options: `channels_last` of `conv_wgrad_mma.plan`.
    """
    return plan_or_reason(plan, x_shape, dtype, w_shape, geometry, choice, **options)


def required_plan(make, x_shape, dtype, w_shape, geometry, choice, **options):
    """The plan that `make` returns, for instance conv_transpose_mma.plan. Raises UnsupportedError if there is none."""
    if choice.without:
        raise UnsupportedError(choice.without)
    if choice.sm75:
        raise UnsupportedError("on sm_75 a block has too little shared memory")
    if not x_shape[0]:
        raise UnsupportedError("the batch is empty")
    options.update(dtype=SCALARS[dtype], wgmma=choice.wgmma, shared_limit=choice.shared_bytes)
    options.update(multiprocessors=choice.multiprocessors)
    return make(tuple(x_shape), tuple(w_shape), geometry, numerics_split(dtype, choice), **options)


def numerics_split(dtype, choice) -> int:
    return 2 if dtype == np.float32 and choice.cls == "fp32" else 1


# ----------------------------------------------------------------------------------------------------------------------
# modelnew/functional/gather_gemm.py
#
# conv_transpose2d's forward and gradients as implicit GEMMs, in either memory format: operations of `calls.call`.

def physical(shape, channels_last) -> tuple[int, ...]:
    """The shape of the array that stores a tensor of shape [N, C, H, W]."""
    return (shape[0], *shape[2:], shape[1]) if channels_last else tuple(shape)


# ----------------------------------------------------------------------------------------------------------------------
# modelnew/functional/resident_conv_bn_pool.py
#
# The chain of `conv_bn_pool` as one operator: four kernels forward. The convolution's epilogue pools.

class Setting(NamedTuple):
    """What a plan of the convolution depends on besides its tensors."""

    padding: tuple[int, int]
    groups: int  # of the group norm
    choice: Choice
    last: bool  # whether x and the output are channels_last: arrays [N, H, W, C]
    autocast_on: bool


def _forward(new, x, w, *others, setting, keep, kept_bytes=None, **options):
    """others: tensors as `conv_bn_pool_forward` takes them. kept_bytes: at least that many are returned with `keep`."""
    plan = plan_for(x, w, setting)
    out = new_output(new, x, w, setting)
    arrays = kept_arrays(plan, x.shape, setting.groups, keep)
    memory = (new if keep else new.scratch)((max(room(arrays), kept_bytes or 0),), "uint8")
    how = {"plan": plan, "groups": setting.groups, **options}
    conv_bn_pool_forward(new.scratch, x, w, *others, out, parts(memory, arrays), **how)
    return out, memory if keep else None


def _backward(
    new, dout, x, w, conv_bias, weight, bias, group_weight, group_bias, memory, *, setting, needed, parameter, **how
):
    """how: training and activation."""
    parameters = (conv_bias, weight, bias, group_weight, group_bias)
    found = [new.like(t if needed else None) for t, needed in zip(parameters, needed[2:])]

    def tail(plan, kept, made):
        of_tail = {"plan": plan, "groups": setting.groups, "parameter": parameter, **how}
        tail_gradients(dout, weight, bias, group_weight, *found, kept, made, **of_tail)

    tensors = (x, w, weight, memory)
    return *convolution_gradients(new, tail, None, {}, *tensors, setting=setting, needed=needed[:2], **how), *found


def convolution_gradients(new, before, after, given, x, w, weight, memory, *, setting, needed, training, activation):
    """(dx, dw) of the fused operator.

    before: before(plan, kept, made) writes what `back.output_gradient` reads.
    after: after(kept, made), if not None, changes what that wrote.
    given: those arrays of `back.gradient_arrays` that exist already.
    """
    need_x, need_w = needed
    x_shape, groups, geometry = logical(x.shape, setting.last), setting.groups, geometry_of(setting.padding)
    plan = plan_for(x, w, setting)
    kept = parts(memory, kept_arrays(plan, x.shape, groups, True))
    (dgrad, _), (wgrad, _) = _gradient_plans(x_shape, x.dtype, w.shape, w.dtype, setting)
    general = (need_x and dgrad is None) or (need_w and wgrad is None)
    dy = new.scratch(output_shape(x_shape, w.shape, geometry), x.dtype) if general else None
    packed = not general and (need_x or need_w)
    packs_x = packed and need_w and not setting.last
    centred = packs_x and training and x.dtype == np.float32
    arrays = gradient_arrays(plan, x.shape[0], packed, x.shape if packs_x else None, centred)
    made = {**{name: new.scratch(*array) for name, array in arrays.items() if name not in given}, **given}
    before(plan, kept, made)
    how = {"plan": plan, "groups": groups, "training": training, "activation": activation}
    output_gradient(new.scratch, x, weight, dy, kept, made, **how)
    if after is not None:
        after(kept, made)
    if general:
        dx, dw, _ = gradients(new, x, w, dy, x.shape, w.shape, geometry, setting.choice, (need_x, need_w, False))
        return dx, dw
    dw, dx = new.like(w if need_w else None), new.like(x if need_x else None)
    if need_w:  # first: the room of its workspaces is dx's then
        weight_gradient(new.scratch, x, kept, made, dw, plan=wgrad)
    if need_x:
        input_gradient(new.scratch, w, made, dx, plan=dgrad.of_weights(SCALARS[w.dtype]))
    return dx, dw


def plan_for(x, w, setting: Setting):
    """The plan of the convolution for arrays."""
    return plan_of_shapes(logical(x.shape, setting.last), x.dtype, w.shape, w.dtype, setting)


def new_output(new, x, w, setting: Setting):
    """Memory of the fused operator's output."""
    *outer, height, width = output_shape(logical(x.shape, setting.last), w.shape, geometry_of(setting.padding))
    return new(physical((*outer, height // 2, width // 2), setting.last), w.dtype)


def plan_of_shapes(x_shape, dtype, w_shape, w_dtype, setting: Setting):
    """`plan_for` tensors of these shapes and NumPy's dtypes. UnsupportedError where the kernels do not take them."""
    options = {"dgrad": False, "channels_last": setting.last}
    how = w_shape, geometry_of(setting.padding), setting.choice
    plan = required_plan(conv_transpose_mma_plan, x_shape, dtype, *how, **options)
    conv_bn_pool_check_supported(plan, setting.groups)
    if setting.last or w_dtype != dtype:  # which the general kernels for gradients do not take
        for found, reason in _gradient_plans(x_shape, dtype, w_shape, w_dtype, setting):
            if not found:
                raise UnsupportedError(f"of a gradient, {reason}")
    return typed(plan, SCALARS[w_dtype], half=setting.autocast_on or dtype.itemsize == 2)


def _gradient_plans(x_shape, dtype, w_shape, w_dtype, setting):
    """(plan or None, the reason), of dx and of dw."""
    geometry, last = geometry_of(setting.padding), setting.last
    dy_shape, how = output_shape(x_shape, w_shape, geometry), (w_shape, geometry, setting.choice)
    dgrad = tensor_core_plan(dy_shape, dtype, *how, dgrad=True, channels_last=last, packed=True)
    return dgrad, wgrad_plan(x_shape, w_dtype, *how, channels_last=last)


def geometry_of(padding):
    return Geometry((1, 1), padding, (0, 0), (1, 1), 1)


# ----------------------------------------------------------------------------------------------------------------------
# tools/kernelbench.py

KERNELS: dict[str, str] = {
    "activation.cuh": r"""#pragma once
#include "tanh.cuh"
#include "tanh_branchless.cuh"

struct Tanh {
    __device__ explicit Tanh(float) {}
    __device__ float of(float v) const { return sizeof(pooled_t) == 2 ? tanh_coarse(v) : tanh_branchless(v); }
    __device__ float slope(float y) const { return tanh_slope(y); }
};

struct LeakyReLU {
    float negative_slope;

    __device__ explicit LeakyReLU(float negative_slope) : negative_slope(negative_slope) {}
    __device__ float of(float v) const { return v > 0 ? v : v * negative_slope; }
    __device__ float slope(float y) const { return y > 0 ? 1 : negative_slope; }
};

typedef ACTIVATION Activation;
""",
    "async_copy.cuh": r"""#pragma once

__device__ inline void cp_async_16(void* shared, const void* global, bool valid) {
    unsigned to = (unsigned)__cvta_generic_to_shared(shared);
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(global), "r"(valid ? 16 : 0)
        : "memory");
}

__device__ inline void cp_async_4(void* shared, const void* global, bool valid) {
    unsigned to = (unsigned)__cvta_generic_to_shared(shared);
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(to), "l"(global), "r"(valid ? 4 : 0) : "memory");
}

__device__ inline void cp_async_commit() {
    asm volatile("cp.async.commit_group;" ::: "memory");
}

template <int PENDING_GROUPS> __device__ inline void cp_async_wait() {
    asm volatile("cp.async.wait_group %0;" ::"n"(PENDING_GROUPS) : "memory");
}
""",
    "batch_norm.cuh": r"""#pragma once
#include "common.cuh"

__device__ constexpr acc_t OTHER_UNIT() { return 0x1p-96f; }
__device__ inline bool again(acc_t sum, acc_t other, acc_t& unit) {
    if (sizeof(acc_t) != 4 || unit != 1 || (is_finite(sum) && is_finite(other))) return false;
    unit = OTHER_UNIT();
    return true;
}
__device__ inline bool again(acc_t sum, acc_t& unit) { return again(sum, 0, unit); }
__device__ inline acc_t inverse_of(acc_t unit) { return unit == 1 ? 1 : 1 / OTHER_UNIT(); }

struct Normaliser {
    acc_t unit, mean, invstd;
    __device__ static acc_t LARGE_UNIT() { return 0x1p-32f; }
    __device__ Normaliser(acc_t mean, acc_t invstd) {
        bool large = sizeof(acc_t) == 4 && (invstd < 0x1p-64f || fabs(mean) > 0x1p64f);
        unit = large ? LARGE_UNIT() : 1;
        this->mean = mean * unit;
        this->invstd = multiply_unflushed(invstd, (acc_t)(large ? 0x1p32f : 1));
    }
    __device__ acc_t operator()(acc_t x) const { return (x * unit - mean) * invstd; }
};
__device__ inline acc_t bn_affine(acc_t xhat, acc_t weight, acc_t bias) { return xhat * weight + bias; }

template <class P> __device__ inline acc_t bn_weight(const P* weight, i64 c) {
    return weight ? (acc_t)to_acc(weight[c]) : (acc_t)1;
}
template <class P> __device__ inline acc_t bn_bias(const P* bias, i64 c) {
    return bias ? (acc_t)to_acc(bias[c]) : (acc_t)0;
}

__device__ inline acc_t finite_or_zero(acc_t v) { return is_finite(v) ? v : (acc_t)0; }

__device__ inline acc_t invstd_of(acc_t variance, acc_t unit, acc_t eps) {
    acc_t lift = unit == 1 ? 1 : 0x1p32f, fall = unit == 1 ? 1 : 0x1p-32f;
    return multiply_unflushed(lift * unit / sqrt(variance + eps * unit * unit), fall);
}

struct Moments { acc_t mean, squares; };

__device__ inline acc_t without_unit(Moments& moments, acc_t unit) {
    acc_t back = inverse_of(unit);
    Moments plain = {moments.mean * back, moments.squares * back * back};
    if (!is_finite(plain.mean) || !is_finite(plain.squares)) return unit;
    moments = plain;
    return 1;
}

struct ChunkCounts {
    const double* given;
    i64 count, chunk;
    __device__ double operator()(i64 k) const { return given ? given[k] : (double)min(chunk, count - k * chunk); }
};

__device__ inline acc_t moments_of_channel(
    Moments& moments, const double* __restrict__ means, const double* __restrict__ m2s, const ChunkCounts& counts,
    i64 chunks, double* scratch) {
    double sum = 0, m2 = 0;
    for (i64 k = threadIdx.x; k < chunks; k += blockDim.x) sum += counts(k) * means[k];
    double mean = block_sum(sum, scratch) / counts.count;
    for (i64 k = threadIdx.x; k < chunks; k += blockDim.x) {
        double distance = means[k] - mean;
        m2 += m2s[k] + counts(k) * distance * distance;
    }
    m2 = block_sum(m2, scratch);
    acc_t unit = sizeof(acc_t) == 8 || is_finite((acc_t)m2) ? (acc_t)1 : OTHER_UNIT();
    moments = {(acc_t)(mean * unit), (acc_t)(m2 * unit * unit)};
    return unit;
}

template <class N, class P> __device__ inline void store_statistics(
    Moments moments, acc_t unit, N count, acc_t eps, acc_t* mean, acc_t* invstd, P* running_mean, P* running_var,
    acc_t momentum, acc_t shift) {
    acc_t back = inverse_of(unit), batch_mean = moments.mean * back, batch_var = moments.squares / (count - 1) * back;
    *mean = batch_mean;
    *invstd = invstd_of(moments.squares / count, unit, eps);
    if (!running_mean) return;
    *running_mean = from_acc<P>((1 - momentum) * to_acc(*running_mean) + momentum * (batch_mean + shift));
    *running_var = from_acc<P>((1 - momentum) * to_acc(*running_var) + momentum * back * batch_var);
}
""",
    "common.cuh": r"""#pragma once

typedef long long i64;
typedef unsigned char u8;
#define INOUT

struct half_t { unsigned short bits; };
struct bf16_t { unsigned short bits; };

template <class U, int W> struct __align__(W * sizeof(U)) Packed { U v[W]; };

#if !defined(SHARED_ALIGNMENT)
#define SHARED_ALIGNMENT 128
#endif
#define UNCHECKED
#define DYNAMIC_SHARED(U, name) \
    extern __shared__ __align__(SHARED_ALIGNMENT) \
    char dynamic_shared_bytes[]; \
    U* name = (U*)dynamic_shared_bytes

__device__ inline float to_acc(float v) { return v; }
__device__ inline double to_acc(double v) { return v; }
__device__ inline float to_acc(bf16_t v) { return __uint_as_float((unsigned)v.bits << 16); }
__device__ inline float to_acc(half_t v) {
    float f;
    asm("cvt.f32.f16 %0, %1;" : "=f"(f) : "h"(v.bits));
    return f;
}

template <class U> __device__ inline U from_acc(float v);
template <class U> __device__ inline U from_acc(double v);
template <> __device__ inline float from_acc<float>(float v) { return v; }
template <> __device__ inline float from_acc<float>(double v) { return (float)v; }
template <> __device__ inline double from_acc<double>(double v) { return v; }
template <> __device__ inline bf16_t from_acc<bf16_t>(float v) {
    bf16_t r;
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(r.bits) : "f"(v));
    return r;
}
template <> __device__ inline half_t from_acc<half_t>(float v) {
    half_t r;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(r.bits) : "f"(v));
    return r;
}

template <class A> __device__ inline bool is_nan(A v) { return v != v; }
template <class A> __device__ inline bool is_finite(A v) { return v - v == 0; }
__device__ inline bool greater(float a, float b) {
    int r;
    asm("{\n .reg .pred p;\n setp.gt.f32 p, %1, %2;\n selp.b32 %0, 1, 0, p;\n}" : "=r"(r) : "f"(a), "f"(b));
    return r;
}
__device__ inline bool greater(double a, double b) { return a > b; }

__device__ inline float multiply_unflushed(float a, float b) {
    float product;
    asm("mul.rn.f32 %0, %1, %2;" : "=f"(product) : "f"(a), "f"(b));
    return product;
}
__device__ inline double multiply_unflushed(double a, double b) { return a * b; }

__device__ inline float add_unflushed(float a, float b) {
    float sum;
    asm("add.rn.f32 %0, %1, %2;" : "=f"(sum) : "f"(a), "f"(b));
    return sum;
}

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

template <class A> __device__ inline A warp_sum(A v) {
    for (int lanes = 16; lanes > 0; lanes >>= 1) v += __shfl_xor_sync(0xFFFFFFFFu, v, lanes);
    return v;
}
template <class A> __device__ inline A warp_max(A v) {
    for (int lanes = 16; lanes > 0; lanes >>= 1) v = max(v, __shfl_xor_sync(0xFFFFFFFFu, v, lanes));
    return v;
}

template <class A> __device__ inline A block_sum(A v, A* scratch) {
    v = warp_sum(v);
    if (threadIdx.x % 32 == 0) scratch[threadIdx.x / 32] = v;
    __syncthreads();
    A total = 0;
    for (unsigned w = 0; w < blockDim.x / 32; w++) total += scratch[w];
    __syncthreads();
    return total;
}

__device__ inline void grid_barrier() {
    __syncthreads();
    if (threadIdx.x == 0) {
        unsigned* counter;
        asm("mov.b64 %0, {%%envreg2, %%envreg1};" : "=l"(counter));
        counter++;
        __threadfence();
        unsigned before = atomicAdd(counter, blockIdx.x == 0 ? 0x80000000u - (gridDim.x - 1) : 1u);
        while (!((before ^ *(volatile unsigned*)counter) >> 31)) {}
        __threadfence();
    }
    __syncthreads();
}

__device__ inline void wait_for_earlier_kernels() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

__device__ inline void make_opaque(int& v) {
    asm volatile("" : "+r"(v));
}

template <class T, int W> __device__ inline void store_at_once(T* to, const Packed<T, W>& v) {
    if constexpr (sizeof(v) > 16) {
        store_at_once(to, *(const Packed<T, W / 2>*)&v);
        store_at_once(to + W / 2, *(const Packed<T, W / 2>*)(v.v + W / 2));
    } else if constexpr (sizeof(v) == 16) {
        uint4 bits = *(const uint4*)&v;
        asm volatile(
            "st.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(to), "r"(bits.x), "r"(bits.y), "r"(bits.z), "r"(bits.w));
    } else if constexpr (sizeof(v) == 8) {
        uint2 bits = *(const uint2*)&v;
        asm volatile("st.global.v2.b32 [%0], {%1, %2};" ::"l"(to), "r"(bits.x), "r"(bits.y));
    } else if constexpr (sizeof(v) == 4) *(unsigned*)to = *(const unsigned*)&v;
    else *(Packed<T, W>*)to = v;
}
""",
    "conv_bn_pool.cu": r"""#define ADJACENT (!WGMMA)
#include "batch_norm.cuh"
#include "implicit_gemm.cuh"
enum { ONE_PASS = UNIT_WINDOWS - (WINDOW_PITCH - WINDOWS_W) <= 4 * MOST_TILES * WARPS_N };
static_assert(
    (TILES % 4 == 0 || (ONE_PASS && WARPS_N == 1)) && (LAST_TILES % 4 == 0 || !WGMMA || WARPS_N == 1),
    "16 windows are kept together");
static_assert(
    EPILOGUE_OFFSET + (STATISTICS ? WARPS_N * TILE_M * sizeof(float2) : 0) == SHARED_BYTES,
    "the epilogue's moments come last");

struct Merge {
    float share, weight, count;
    __device__ Merge(float first, float second) : count(first + second) {
        share = count > 0 ? second / count : 0;
        weight = first * share;
    }
    __device__ float2 operator()(float2 a, float2 b) const {
        float distance = b.x - a.x;
        float mean = is_finite(distance) ? a.x + distance * share : a.x + b.x;
        return make_float2(mean, a.y + b.y + distance * (distance * weight));
    }
};

__device__ inline float quad_sum(float v) {
    v += __shfl_xor_sync(0xFFFFFFFFu, v, 1);
    return v + __shfl_xor_sync(0xFFFFFFFFu, v, 2);
}

enum { SHIFT = AS_IT_IS ? 0 : SAVED_SHIFT };
enum { ROWS = LANE_ROWS < 4 ? LANE_ROWS : 4 };

__device__ inline float max_or_nan(float a, float b) {
    float larger;
    asm("max.NaN.f32 %0, %1, %2;" : "=f"(larger) : "f"(a), "f"(b));
    return larger;
}

typedef unsigned Valid[4];
__device__ inline bool is_valid(const Valid& valid, int t, int corner) {
    return valid[OUT_H % 2 || OUT_W % 2 ? corner : 0] >> t & 1;
}

template <bool FULL>
__device__ __forceinline__ void moments_of(
    const Sums& sums, int first, const Valid& valid, float per_count, float (&mean)[ROWS], float (&squares)[ROWS]) {
    #pragma unroll
    for (int i = 0; i < ROWS; i++) mean[i] = squares[i] = 0;
    #pragma unroll
    for (int at = 0; at < LANE_WINDOWS * 4; at++)
        #pragma unroll
        for (int i = 0; i < ROWS; i++)
            if (FULL || is_valid(valid, at / 4, at % 4)) mean[i] += sum_of(sums, first + i, at / 4, at % 4);
    #pragma unroll
    for (int i = 0; i < ROWS; i++) mean[i] = quad_sum(mean[i]) * per_count;
    #pragma unroll
    for (int at = 0; at < LANE_WINDOWS * 4; at++)
        #pragma unroll
        for (int i = 0; i < ROWS; i++) {
            float distance = sum_of(sums, first + i, at / 4, at % 4) - mean[i];
            if (FULL || is_valid(valid, at / 4, at % 4)) squares[i] += distance * distance;
        }
    #pragma unroll
    for (int i = 0; i < ROWS; i++) squares[i] = quad_sum(squares[i]);
}

struct PoolEpilogue {
    pooled_t* pooled;
    float* partials;
    u8* argmax;
    saved_t* saved;
    int* unit_exponents;
    const int* exponents;
    const float* signs;
    float2* moments;
    int* counts;
    i64 units;
    int seen;

    __device__ __forceinline__ void turn(const Sums& sums, Place place, int exponent) {
        make_opaque(place.first_window);
        if (place.full()) windows<true>(sums, place, exponent);
        else windows<false>(sums, place, exponent);
    }

    template <bool FULL> __device__ __forceinline__ void windows(const Sums& sums, const Place& place, int exponent) {
        int lane = threadIdx.x % 32, part = threadIdx.x / (CONSUMERS / WARPS_N);
        i64 plane = (place.image * OUT_CHANNELS + blockIdx.y * TILE_M + place.channel) * PLANE_STRIDE;
        Valid valid = {};
        #pragma unroll
        for (int t = 0; t < LANE_WINDOWS; t++)
            #pragma unroll
            for (int corner = 0; corner < 4; corner++)
                valid[corner] |= (unsigned)(place.exists(t) && place.inside(t, corner)) << t;
        float count =
            FULL ? LANE_WINDOWS * 16
                 : quad_sum((float)(__popc(valid[0]) + __popc(valid[1]) + __popc(valid[2]) + __popc(valid[3])));
        float per_count = count > 0 ? 1 / count : 0;
        Merge merge(seen, count);
        #pragma unroll
        for (int first = 0; first < LANE_ROWS; first += ROWS) {
            float mean[ROWS], squares[ROWS];
            if (STATISTICS) moments_of<FULL>(sums, first, valid, per_count, mean, squares);
            #pragma unroll
            for (int i = 0; i < ROWS; i++) {
                int channel = place.channel + (first + i) * 8;
                bool any = signs[channel] != 0;
                float sign = any ? signs[channel] : 1;
                if (STATISTICS && lane % 4 == 0) {
                    float2* at = moments + part * TILE_M + channel;
                    *at = merge(seen ? *at : make_float2(0, 0), make_float2(mean[i] * sign, squares[i]));
                }
                ScaleBack scale(exponent + exponents[channel]);
                if (OUT_CHANNELS % TILE_M && blockIdx.y * TILE_M + channel >= OUT_CHANNELS) continue;
                i64 row = plane + (first + i) * 8 * PLANE_STRIDE;
                #pragma unroll
                for (int t = 0; t < LANE_WINDOWS; t += 4) {
                    Packed<pooled_t, 4> best;
                    u8 taps = 0;
                    Packed<saved_t, 16> all;
                    #pragma unroll
                    for (int j = 0; j < 4; j++) {
                        float v[4], largest;
                        #pragma unroll
                        for (int corner = 0; corner < 4; corner++) v[corner] = sum_of(sums, first + i, t + j, corner);
                        largest = max_or_nan(max_or_nan(v[0], v[1]), max_or_nan(v[2], v[3]));
                        best.v[j] = kept<pooled_t>(any ? largest : v[0], sign, scale);
                        taps |= (!any || v[0] == largest ? 0 : v[1] == largest ? 1 : v[2] == largest ? 2 : 3) << j * 2;
                        #pragma unroll
                        for (int corner = 0; SAVE && corner < 4; corner++)
                            all.v[j * 4 + corner] = kept<saved_t>(v[corner], sign, scale);
                    }
                    store<FULL>(place, row, t, best, taps, all);
                }
            }
        }
        seen += (int)count;
    }

    template <bool FULL> __device__ __forceinline__ void store(
        const Place& place, i64 row, int t, const Packed<pooled_t, 4>& best, u8 taps, const Packed<saved_t, 16>& all) {
        if constexpr (WGMMA) {
            int sixteen = place.first_window + t * 4 + place.unit * (UNIT_STRIDE - UNIT_WINDOWS);
            if (t >= place.tiles || sixteen >= min((place.unit + 1) * UNIT_STRIDE, PLANE_STRIDE)) return;
            i64 at = row + sixteen + threadIdx.x % 4 * TOGETHER_POOLED;
            store_at_once(pooled + at, best);
            if (SAVE) argmax[(row >> 2) + (at - row >> 2)] = taps;
            enum { TOGETHER = together_saved<saved_t>() };
            #pragma unroll
            for (int j = 0; SAVE && j < 4; j += TOGETHER) {
                i64 window = row + sixteen + j * 4 + threadIdx.x % 4 * TOGETHER;
                store_at_once(saved + window * 4, *(const Packed<saved_t, TOGETHER * 4>*)(all.v + j * 4));
            }
            return;
        }
        i64 at = row + place.window(0);
        if (SAVE) {
            int lane = threadIdx.x % 4;
            unsigned four = taps;
            if (!FULL) {
                four = (taps & ((1 << place.tiles * 2) - 1)) << lane * place.tiles * 2;
                four |= __shfl_xor_sync(0xFFFFFFFFu, four, 1);
                four |= __shfl_xor_sync(0xFFFFFFFFu, four, 2);
                four >>= lane * 8;
            }
            if (FULL || (lane < place.tiles && place.first_window + lane * 4 < place.end_window))
                argmax[(row >> 2) + (place.first_window >> 2) + lane] = four;
        }
        if (FULL) {
            store_at_once(pooled + at, best);
            if (SAVE) store_at_once(saved + at * 4, all);
        }
        #pragma unroll
        for (int j = 0; j < 4; j++) {
            if (FULL || !place.exists(j)) continue;
            pooled[at + j] = best.v[j];
            if (SAVE) store_at_once(saved + (at + j) * 4, *(const Packed<saved_t, 4>*)(all.v + j * 4));
        }
    }

    template <class T> __device__ static T kept(float v, float sign, const ScaleBack& scale) {
        return from_acc<T>(sizeof(T) == 2 ? v * (power_of_two(-SHIFT) * sign) : scale(v * sign));
    }

    __device__ void restart() { seen = 0; }

    __device__ void finish(int exponent, i64 unit) {
        int of_channel = exponent + (STATISTICS && threadIdx.x < TILE_M ? exponents[threadIdx.x] : 0);
        enum { SCALED = SAVE || sizeof(pooled_t) == 2 };
        if (SCALED && threadIdx.x == 0 && blockIdx.y == 0) unit_exponents[unit] = exponent + SAVED_SHIFT - SHIFT;
        if (!STATISTICS) return;
        if (threadIdx.x % (CONSUMERS / WARPS_N) == 0) counts[threadIdx.x / (CONSUMERS / WARPS_N)] = seen;
        sync_consumers();
        int m = blockIdx.y * TILE_M + threadIdx.x;
        if (threadIdx.x >= TILE_M || m >= OUT_CHANNELS) return;
        float2 all = moments[threadIdx.x];
        float count = counts[0];
        for (int part = 1; part < WARPS_N; part++) {
            Merge merge(count, counts[part]);
            all = merge(all, moments[part * TILE_M + threadIdx.x]);
            count = merge.count;
        }
        float* to = partials + m * units + unit;
        i64 kind = OUT_CHANNELS * units;
        ScaleBack scale(of_channel);
        float squares = scale(scale(all.y));
        if (!is_finite(squares)) squares = -scale(scale(all.y * 0x1p-80f) * 0x1p-80f);
        to[0] = count, to[kind] = scale(all.x), to[2 * kind] = squares;
    }
};

extern "C" __global__ void __launch_bounds__(THREADS, 1) conv_bn_pool(
    const scalar_t* __restrict__ x, const half_t* __restrict__ packed, const int* __restrict__ exponents,
    const float* __restrict__ gamma, INOUT pooled_t* __restrict__ pooled, float* __restrict__ partials,
    INOUT u8* __restrict__ argmax, INOUT saved_t* __restrict__ saved, int* __restrict__ unit_exponents, i64 units) {
    wait_for_earlier_kernels();
    __shared__ Scratch scratch;
    __shared__ int counts[WARPS_N], channel_exponents[TILE_M];
    __shared__ float signs[TILE_M];
    for (int i = threadIdx.x; i < TILE_M; i += THREADS) {
        int m = blockIdx.y * TILE_M + i;
        float weight = m < OUT_CHANNELS ? bn_weight(gamma, m) : 0;
        signs[i] = weight > 0 ? 1 : weight < 0 ? -1 : 0;
        channel_exponents[i] = m < OUT_CHANNELS ? exponents[m] : 0;
    }
    DYNAMIC_SHARED(u8, shared);
    PoolEpilogue epilogue = {pooled, partials, argmax, saved, unit_exponents, channel_exponents, signs,
        (float2*)(shared + EPILOGUE_OFFSET), counts, units, 0};
    convolve(x, (const int*)0, 0, packed, units, shared, scratch, epilogue);
}
""",
    "conv_mma.cuh": r"""#pragma once

#define PITCH (IN_W + GAP)
#define BAND_LINES (GAP + (BAND_ROWS + 1) * PITCH)
#define SLICES_AT_ONCE (THREADS == 256 ? 4 : 1)
#define SLICES (CHUNKS > 1 || SPLIT == 2 ? CHUNK_CHANNELS / 16 : IN_CHANNELS / 16)
enum { RING_OFFSET = (RESIDENT ? CHUNKS : 1) * BAND_LINES * LINE_BYTES };
enum { EPILOGUE_OFFSET = RING_OFFSET + STAGES * STAGE_BYTES };
static_assert(TILES == 4 && LAST_TILES <= TILES && UNIT_WINDOWS == UNIT_PASSES * PASS_WINDOWS, "a unit is its passes");
static_assert(PACKED_WIDTH == CHUNKS * LINE_BYTES / 2, "weights are packed in lines");

__device__ constexpr bool bands_fit() {
    for (int first = 0; first < WINDOWS; first += UNIT_WINDOWS) {
        int last = first + UNIT_WINDOWS < WINDOWS ? first + UNIT_WINDOWS - 1 : WINDOWS - 1;
        int low = first_row_of(first) > 0 ? first_row_of(first) : 0,
            high = end_row_of(last) < IN_H ? end_row_of(last) : IN_H;
        if (high - low > BAND_ROWS) return false;
    }
    return true;
}
static_assert(bands_fit(), "a band has the rows of x that a unit needs");

typedef unsigned Row;
__device__ inline Row row_at(const u8* p) { return (unsigned)__cvta_generic_to_shared(p); }
__device__ inline Row other_part(Row row, int parts) { return row ^ parts * 16; }

typedef float Sums[4][2 * TILES][4];
#define LANE_ROWS 8
#define LANE_WINDOWS TILES

__device__ __forceinline__ float sum_of(const Sums& sums, int row, int t, int corner) {
    return sums[row / 2][2 * t + corner / 2][row % 2 * 2 + corner % 2];
}

__device__ inline int band_key(int row, int column) {
    unsigned place = row * WINDOWS_W + column;
    return ADJACENT ? place / (2 * TILES) % 4 * 2 + place % 2 : place % 8;
}

__device__ inline u8* band_of(u8* shared, int chunk) {
    return shared + (RESIDENT ? chunk : 0) * BAND_LINES * LINE_BYTES;
}

__device__ inline void clear_border(u8* lines) {
    enum { ZERO_ROW = PITCH + GAP, COUNT = (ZERO_ROW + BAND_ROWS * GAP) * 8, BORDER = GAP ? GAP : 1 };
    for (int i = threadIdx.x; i < COUNT; i += THREADS) {
        int at = i / 8, right = at - ZERO_ROW;
        int line = right < 0 ? at : (right / BORDER + 1) * PITCH + GAP + IN_W + right % BORDER;
        *(uint4*)(lines + line_offset(line, i % 8)) = make_uint4(0, 0, 0, 0);
    }
}

template <bool> struct Band;

template <> struct Band<true> {
    const half_t* source;
    const Unit& unit;
    u8* shared;
    const int* exponents;
    int exponent_count, exponent;

    __device__ Band(const half_t* x, const int* exponents, int exponent_count, const Unit& unit, u8* shared)
        : source(x + (unit.image * CHUNKS * IN_H + unit.first_row) * IN_W * (LINE_BYTES / 2)), unit(unit),
          shared(shared), exponents(exponents), exponent_count(exponent_count) {
        for (int chunk = 0; chunk < (RESIDENT ? CHUNKS : 1); chunk++) clear_border(band_of(shared, chunk));
        if (RESIDENT)
            for (int chunk = 0; chunk < CHUNKS; chunk++) load(chunk);
    }
    __device__ void load(int chunk) {
        u8* lines = band_of(shared, chunk);
        const half_t* from = source + (i64)chunk * IN_H * IN_W * (LINE_BYTES / 2);
        for (int i = threadIdx.x; i < (unit.end_row - unit.first_row) * IN_W * 8; i += THREADS) {
            int row = i / 8 / IN_W, column = i / 8 % IN_W + GAP;
            cp_async_16(
                lines + line_offset((row + 1) * PITCH + column, i % 8, band_key(unit.first_row + row, column)),
                from + i * 8, true);
        }
        cp_async_commit();
    }
    __device__ void begin(unsigned* scratch) { exponent = smallest_exponent(exponents, exponent_count, scratch); }
};

template <> struct Band<false> {
    const scalar_t* source;
    const Unit& unit;
    u8* shared;
    int exponent = GUESS;
    unsigned largest = 0;

    __device__ Band(const scalar_t* x, const int*, int, const Unit& unit, u8* shared)
        : source(
              x + (CHANNELS_LAST ? (unit.image * IN_H + unit.first_row) * IN_W * IN_CHANNELS
                                 : (unit.image * IN_CHANNELS * IN_H + unit.first_row) * IN_W)),
          unit(unit), shared(shared) {
        for (int chunk = 0; chunk < (RESIDENT ? CHUNKS : 1); chunk++) clear_border(band_of(shared, chunk));
    }
    __device__ void begin(unsigned* scratch) {
        if (!RESIDENT) exponent = measured(scratch);
        for (bool again = RESIDENT; again;) {
            for (int chunk = 0; chunk < CHUNKS; chunk++) load(chunk);
            int right = scale_exponent(block_max(largest, scratch));
            again = exponent == GUESS && (right < GUESS || right > GUESS + SLACK);
            if (again) exponent = right;
        }
    }
    __device__ int measured(unsigned* scratch) const {
        enum { WIDTH = !CHANNELS_LAST && IN_W * sizeof(scalar_t) % 16 ? 1 : 16 / sizeof(scalar_t) };
        typedef Packed<scalar_t, WIDTH> Pack;
        int count = (unit.end_row - unit.first_row) * IN_W / WIDTH;
        unsigned largest = 0;
        if constexpr (CHANNELS_LAST) {
            largest = largest_of<16>((const Pack*)source, (int)threadIdx.x, THREADS, count * IN_CHANNELS);
            return scale_exponent(block_max(largest, scratch));
        }
        for (int k = threadIdx.x / 32; k < IN_CHANNELS; k += THREADS / 32)
            largest =
                max(largest, largest_of<16>((const Pack*)(source + k * IN_H * IN_W), (int)threadIdx.x % 32, 32, count));
        return scale_exponent(block_max(largest, scratch));
    }

    __device__ static int pixel_of(int i) { return CHANNELS_LAST ? i / (CHUNK_CHANNELS / 8) : i % (BAND_ROWS * IN_W); }
    __device__ static int octet_of(int i) { return CHANNELS_LAST ? i % (CHUNK_CHANNELS / 8) : i / (BAND_ROWS * IN_W); }

    __device__ void load(int chunk) {
        u8* lines = band_of(shared, chunk);
        float scale = power_of_two(exponent);
        enum { BATCH = RESIDENT ? 8 : SPLIT == 2 ? 4 : 1, COUNT = BAND_ROWS * IN_W * (CHUNK_CHANNELS / 8) };
        int lane = threadIdx.x % 32, spread = lane;
        if (ADJACENT && !CHANNELS_LAST) spread = lane % 2 + lane / 2 % 4 * (2 * TILES) + lane / 8 % TILES * 2;
        for (int first = threadIdx.x - lane + spread; first < COUNT; first += THREADS * BATCH) {
            float v[BATCH][8];
            #pragma unroll
            for (int b = 0; b < BATCH; b++) {
                int i = first + b * THREADS, pixel = pixel_of(i);
                int k = chunk * CHUNK_CHANNELS + octet_of(i) * 8;
                bool inside = unit.first_row + pixel / IN_W < unit.end_row && k < IN_CHANNELS && i < COUNT;
                if constexpr (CHANNELS_LAST) {
                    typedef Packed<scalar_t, 8> Channels;
                    Channels in = {};
                    if (inside) in = *(const Channels*)(source + pixel * IN_CHANNELS + k);
                    #pragma unroll
                    for (int j = 0; j < 8; j++) v[b][j] = to_acc(in.v[j]);
                    continue;
                }
                const scalar_t* from = source + k * IN_H * IN_W + pixel;
                #pragma unroll
                for (int j = 0; j < 8; j++) v[b][j] = inside ? to_acc(from[j * IN_H * IN_W]) : 0;
            }
            #pragma unroll
            for (int b = 0; b < BATCH; b++) {
                int i = first + b * THREADS, pixel = pixel_of(i);
                int row = pixel / IN_W, column = pixel % IN_W + GAP;
                #pragma unroll
                for (int j = 0; j < 8; j++) {
                    largest = max(largest, finite_magnitude(v[b][j]));
                    v[b][j] = multiply_unflushed(v[b][j], scale);
                }
                int key = band_key(unit.first_row + row, column);
                if (i < COUNT) store_line(lines, (row + 1) * PITCH + column, octet_of(i), v[b], key);
            }
        }
    }
};

template <int> struct Multiply;

template <> struct Multiply<1> {
    template <class Tap> __device__ static __forceinline__ void taps(Tap tap) {
        for (int kw = 0; kw < KERNEL_W; kw++) tap(kw);
    }
    template <int COUNT> __device__ static __forceinline__ void add(Sums& sums, Row a_row, const Row (&b_row)[COUNT]) {
        #pragma unroll SLICES_AT_ONCE
        for (int slice = 0; slice < SLICES; slice++) {
            unsigned a[4][4], b[4];
            #pragma unroll
            for (int i = 0; i < 4; i++) ldmatrix_x4(a[i], other_part(a_row + i * 16 * LINE_BYTES, slice * 2));
            #pragma unroll
            for (int t = 0; t < COUNT; t++) {
                ldmatrix_x4(b, other_part(b_row[t], slice * 2));
                #pragma unroll
                for (int i = 0; i < 4; i++)
                    #pragma unroll
                    for (int n = 0; n < 2; n++) mma_m16n8k16(sums[i][2 * t + n], a[i], b[2 * n], b[2 * n + 1]);
            }
        }
    }
};

template <> struct Multiply<2> {
    template <class Tap> __device__ static __forceinline__ void taps(Tap tap) {
        #pragma unroll 1
        for (int kw = 0; kw < KERNEL_W; kw++) tap(kw);
    }
    typedef unsigned Parts[SLICES][2][4];

    __device__ static __forceinline__ void load(Parts& parts, Row row) {
        #pragma unroll
        for (int slice = 0; slice < SLICES; slice++)
            #pragma unroll
            for (int part = 0; part < 2; part++)
                ldmatrix_x4(parts[slice][part], other_part(row, part * (CHUNK_CHANNELS / 8) + slice * 2));
    }
    template <int COUNT> __device__ static __forceinline__ void add(Sums& sums, Row a_row, const Row (&b_row)[COUNT]) {
        Parts a[4], b;
        #pragma unroll
        for (int i = 0; i < 4; i++) load(a[i], a_row + i * 16 * LINE_BYTES);
        #pragma unroll
        for (int t = 0; t < COUNT; t++) {
            load(b, b_row[t]);
            #pragma unroll
            for (int i = 0; i < 4; i++) {
                float partial[2][4] = {};
                #pragma unroll
                for (int product = 0; product < 3; product++)
                    #pragma unroll
                    for (int slice = 0; slice < SLICES; slice++)
                        #pragma unroll
                        for (int n = 0; n < 2; n++) {
                            const unsigned (&right)[4] = b[slice][product == 1];
                            mma_m16n8k16(partial[n], a[i][slice][product == 0], right[2 * n], right[2 * n + 1]);
                        }
                #pragma unroll
                for (int j = 0; j < 8; j++) sums[i][2 * t + j / 4][j % 4] += partial[j / 4][j % 4];
            }
        }
    }
};

typedef Band<X_PACKED> Rows;

struct MainLoop {
    const Unit& unit;
    Rows& band;
    u8* shared;
    WeightRing<STAGE_BYTES, CHUNKS * TAPS> weights;
    int stage = 0, lane = threadIdx.x % 32, warp_m = threadIdx.x / 32 % WARPS_M, warp_n = threadIdx.x / 32 / WARPS_M;

    __device__ MainLoop(const Unit& unit, Rows& band, const half_t* packed, u8* shared)
        : unit(unit), band(band), shared(shared), weights(shared + RING_OFFSET, packed) {
        for (int i = 0; i < STAGES - 1; i++) weights.fetch(i * STAGE_BYTES);
    }
    __device__ int channel() const { return warp_m * 64 + lane / 4; }

    template <int COUNT> __device__ __forceinline__ void turn(Sums& sums, int, int first_window) {
        int row_of[COUNT], column_of[COUNT];
        #pragma unroll
        for (int t = 0; t < COUNT; t++) {
            Pixel pixel(first_window + lane_window(lane % 8 / 2, t, COUNT), lane / 16 * 2 + lane % 2);
            row_of[t] = pixel.oh + PAD_H;
            column_of[t] = GAP + min(pixel.ow, OUT_W - 1) + PAD_W;
        }
        for (int chunk = 0; chunk < CHUNKS; chunk++) {
            if (!RESIDENT) {
                __syncthreads();
                band.load(chunk);
                if (X_PACKED) cp_async_wait<0>();
                __syncthreads();
            }
            Row chunk_lines = row_at(band_of(shared, chunk)), a_row, b_row[COUNT];
            auto turn_to = [&](int kh, int kw) __attribute__((always_inline)) {
                cp_async_wait<STAGES - 2>();
                __syncthreads();
                weights.fetch(weights.previous(stage));
                a_row = row_at(weights.ring) + stage + line_offset(warp_m * 64 + lane % 16, lane / 16);
                stage = weights.next(stage);
                #pragma unroll
                for (int t = 0; t < COUNT; t++) {
                    int ih = row_of[t] - kh, column = column_of[t] - kw;
                    int row_line = ih >= 0 && ih < unit.end_row ? (ih - unit.first_row + 1) * PITCH : 0;
                    b_row[t] = chunk_lines + line_offset(row_line + column, lane / 8 % 2, band_key(ih, column));
                }
            };
            for (int kh = 0; kh < KERNEL_H; kh++)
                Multiply<SPLIT>::taps([&](int kw) __attribute__((always_inline)) {
                    turn_to(kh, kw);
                    Multiply<SPLIT>::add(sums, a_row, b_row);
                });
        }
    }
};
""",
    "conv_output_gradient.cuh": r"""#pragma once
#include "pooled_tail.cuh"

struct OutputGradient {
    float mean, invstd, slope, offset, scale, enlarge;
    int exponent;

    __device__ OutputGradient(
        const float* means, const float* invstds, const param_t* weights, const float* sums, int c)
        : slope(sums ? sums[OUT_CHANNELS + c] : 0), offset(sums ? sums[c] : 0), enlarge(1) {
        Normaliser normalise(sums ? means[c] : 0, invstds[c]);
        mean = normalise.mean, invstd = normalise.invstd, exponent = normalise.unit == 1 ? 0 : 32;
        scale = multiply_unflushed(bn_weight(weights, c), invstds[c]);
    }
    __device__ void finish(float count, int e) {
        enlarge = power_of_two(e);
        slope = -of_chosen(slope / count);
        offset = -of_chosen(offset / count);
    }
    __device__ float of(float kept, float restore) const { return (kept * restore - mean) * invstd * slope + offset; }
    __device__ float of_chosen(float g) const { return multiply_unflushed(multiply_unflushed(g, enlarge), scale); }
};

struct Window {
    int row, column, argmax, saved, pooled;

    __device__ explicit Window(int window) : row(window / WINDOWS_W), column(window % WINDOWS_W) {
        argmax = place_of_window<TOGETHER_POOLED>(row, column);
        saved = place_of_window<together_saved<saved_t>()>(row, column);
        pooled = row < OUT_H / 2 && column < POOLED_W ? row * POOLED_W + column : -1;
    }
    __device__ int chosen(int four) const { return four >> argmax % 4 * 2 & 3; }
};

template <int> struct KeptOf { typedef uint2 type; };
template <> struct KeptOf<2> { typedef float4 type; };
typedef KeptOf<SPLIT>::type Kept;
__device__ inline void unpack(uint2 kept, float (&v)[4]) {
    #pragma unroll
    for (int i = 0; i < 4; i++) v[i] = to_acc(half_t{(unsigned short)((i < 2 ? kept.x : kept.y) >> i % 2 * 16)});
}
__device__ inline void unpack(float4 kept, float (&v)[4]) {
    v[0] = kept.x, v[1] = kept.y, v[2] = kept.z, v[3] = kept.w;
}
__device__ inline int kept_exponent(const int* unit_exponents, i64 image, const Window& window) {
    if (SPLIT == 2) return 0;
    return unit_exponents[image * UNITS + unit_of_window(window.row, window.column)] - SAVED_SHIFT;
}
__device__ inline void gradients_of(
    const OutputGradient& gradient, const float* g, const u8* argmax, const saved_t* saved, i64 plane,
    const Window& window, float restore, float (&dy)[4]) {
    float add = window.pooled < 0 ? 0 : gradient.of_chosen(g[plane * PLANE + window.pooled]);
    int tap = window.chosen(argmax[(plane * PLANE_STRIDE + window.argmax) / 4]);
    unpack(saved ? ((const Kept*)saved)[plane * PLANE_STRIDE + window.saved] : Kept(), dy);
    #pragma unroll
    for (int corner = 0; corner < 4; corner++)
        dy[corner] = gradient.of(dy[corner], restore) + (corner == tap ? add : 0);
}

#define IN_H (OUT_H - KERNEL_H + 1 + 2 * PAD_H)
#define IN_W (OUT_W - KERNEL_W + 1 + 2 * PAD_W)
#define TAPS (KERNEL_H * KERNEL_W)
template <int LENGTH, int MOST> struct Edges {
    enum { FIRST = MOST < 0 ? 0 : MOST < LENGTH ? MOST : LENGTH, LAST = LENGTH - MOST > FIRST ? LENGTH - MOST : FIRST };
    enum { INSIDE = LAST - FIRST, COUNT = LENGTH - INSIDE };
    enum { FIRST_WINDOWS = (FIRST + 1) / 2, LAST_WINDOW = LAST / 2 < FIRST_WINDOWS ? FIRST_WINDOWS : LAST / 2 };
    __device__ static bool has(int place) { return place < FIRST || place >= LAST; }
    __device__ static int number(int place) { return place < FIRST ? place : place - INSIDE; }
    __device__ static int place(int number) { return number < FIRST ? number : number + INSIDE; }
};
typedef Edges<OUT_H, KERNEL_H - 1 - PAD_H> EdgeRows;
typedef Edges<OUT_W, KERNEL_W - 1 - PAD_W> EdgeColumns;
enum {
    INNER_ROWS = EdgeRows::LAST_WINDOW - EdgeRows::FIRST_WINDOWS,
    FULL_ROWS = WINDOWS_H - INNER_ROWS,
    SIDES = WINDOWS_W - (EdgeColumns::LAST_WINDOW - EdgeColumns::FIRST_WINDOWS),
    EDGE_WINDOWS = FULL_ROWS * WINDOWS_W + INNER_ROWS * SIDES
};

__device__ inline int edge_window(int i) {
    enum { TOP = EdgeRows::FIRST_WINDOWS, LEFT = EdgeColumns::FIRST_WINDOWS };
    if (i < FULL_ROWS * WINDOWS_W) return i < TOP * WINDOWS_W ? i : i + INNER_ROWS * WINDOWS_W;
    i -= FULL_ROWS * WINDOWS_W;
    int side = i % (SIDES ? SIDES : 1);
    return (TOP + i / (SIDES ? SIDES : 1)) * WINDOWS_W + (side < LEFT ? side : side + WINDOWS_W - SIDES);
}

struct BorderSums {
    float rows[EdgeRows::COUNT + 1][OUT_W];
    float columns[EdgeColumns::COUNT + 1][EdgeRows::INSIDE + 1];
    float of_rows[EdgeRows::COUNT + 1], of_columns[EdgeColumns::COUNT + 1];
};

__device__ inline void sum_borders(
    const float* g, const u8* argmax, const saved_t* saved, const int* exponents, const int* unit_exponents,
    OutputGradient gradient, int c, i64 first, i64 end, BorderSums& sums, float* borders) {
    int lane = threadIdx.x % 32, exponent = gradient.exponent + (SPLIT == 1 ? exponents[c] : 0);
    for (int i = threadIdx.x % 128; i < EDGE_WINDOWS; i += 128) {
        Window window(edge_window(i));
        float sum[4] = {};
        #pragma unroll 4
        for (i64 image = first; image < end; image++) {
            float restore = restoring(exponent + kept_exponent(unit_exponents, image, window)), v[4];
            gradients_of(gradient, g, argmax, saved, image * OUT_CHANNELS + c, window, restore, v);
            #pragma unroll
            for (int corner = 0; corner < 4; corner++) sum[corner] += v[corner];
        }
        #pragma unroll
        for (int corner = 0; corner < 4; corner++) {
            int h = window.row * 2 + corner / 2, w = window.column * 2 + corner % 2;
            if (h >= OUT_H || w >= OUT_W) continue;
            if (EdgeRows::has(h)) sums.rows[EdgeRows::number(h)][w] = sum[corner];
            else if (EdgeColumns::has(w)) sums.columns[EdgeColumns::number(w)][h - EdgeRows::FIRST] = sum[corner];
        }
    }
    __syncthreads();
    for (int line = threadIdx.x % 128 / 32; line < EdgeRows::COUNT + EdgeColumns::COUNT; line += 4) {
        bool is_row = line < EdgeRows::COUNT;
        int column = is_row ? 0 : line - EdgeRows::COUNT, length = is_row ? OUT_W : EdgeRows::INSIDE;
        const float* from = is_row ? sums.rows[line] : sums.columns[column];
        float sum = 0;
        for (int i = lane; i < length; i += 32) sum += from[i];
        sum = warp_sum(sum);
        if (lane == 0) (is_row ? sums.of_rows[line] : sums.of_columns[column]) = sum;
    }
    __syncthreads();
    for (int tap = threadIdx.x % 128; tap < TAPS; tap += 128) {
        auto row_alone = [&](int h) { return (unsigned)(h + PAD_H - tap / KERNEL_W) >= IN_H; };
        auto column_alone = [&](int w) { return (unsigned)(w + PAD_W - tap % KERNEL_W) >= IN_W; };
        float sum = 0;
        for (int row = 0; row < EdgeRows::COUNT; row++) {
            if (row_alone(EdgeRows::place(row))) sum += sums.of_rows[row];
            else
                for (int column = 0; column < EdgeColumns::COUNT; column++) {
                    int w = EdgeColumns::place(column);
                    if (column_alone(w)) sum += sums.rows[row][w];
                }
        }
        for (int column = 0; column < EdgeColumns::COUNT; column++)
            if (column_alone(EdgeColumns::place(column))) sum += sums.of_columns[column];
        borders[tap * OUT_CHANNELS + c] = sum;
    }
}
""",
    "conv_transpose_mma.cu": r"""#define ADJACENT 0
#include "implicit_gemm.cuh"
static_assert(EPILOGUE_OFFSET == SHARED_BYTES, "the epilogue needs none of the shared memory");

struct Spot {
    scalar_t* to[2];
    bool exists[2], last_column[2], together;

    __device__ __forceinline__ Spot(const Place& place, int first, int lower, scalar_t* plane) {
        int row = (place.first_window + first) / WINDOW_PITCH, column = (place.first_window + first) % WINDOW_PITCH,
            at[2];
        #pragma unroll
        for (int j = 0; j < 2; j++) {
            int oh = row * 2 + lower;
            exists[j] =
                first + j >= 0 && first + j < place.count() && column < WINDOWS_W && (OUT_H % 2 == 0 || oh < OUT_H);
            last_column[j] = OUT_W % 2 && column == WINDOWS_W - 1;
            at[j] = oh * OUT_W + column * 2;
            to[j] = plane + at[j];
            if (++column == WINDOW_PITCH) row++, column = 0;
        }
        together =
            OUT_W % 2 == 0 && OUT_H * OUT_W % 4 == 0 && exists[0] && exists[1] && at[0] % 4 == 0 && at[1] == at[0] + 2;
    }

    __device__ __forceinline__ void store(int planes_on, const Packed<scalar_t, 4>& line) const {
        if (together) return store_at_once(to[0] + planes_on * (OUT_H * OUT_W), line);
        #pragma unroll
        for (int j = 0; j < 2; j++) {
            scalar_t* at = to[j] + planes_on * (OUT_H * OUT_W);
            if (!exists[j]) continue;
            if (OUT_W % 2 == 0) store_at_once(at, Packed<scalar_t, 2>{{line.v[j * 2], line.v[j * 2 + 1]}});
            else {
                at[0] = line.v[j * 2];
                if (!last_column[j]) at[1] = line.v[j * 2 + 1];
            }
        }
    }
};

struct Finish {
    ScaleBack scale = ScaleBack(0);
    float shift = 0;
    __device__ scalar_t operator()(float sum) const { return from_acc<scalar_t>(scale(sum, shift)); }
};

struct StoreEpilogue {
    const scalar_t* bias;
    scalar_t* y;
    const int* exponents;

#if CHANNELS_LAST
    __device__ __forceinline__ void turn(const Sums& sums, const Place& place, int exponent) const {
        int first_m = blockIdx.y * TILE_M + place.channel, lane = threadIdx.x % 32, odd = lane % 2;
        Finish finish[LANE_ROWS];
        #pragma unroll
        for (int row = 0; row < LANE_ROWS; row++) {
            int m = first_m + row * 8;
            if (m < OUT_CHANNELS) finish[row] = {ScaleBack(exponent + exponents[m]), bias ? to_acc(bias[m]) : 0};
        }
        int first_turned = first_m - lane / 4 + odd * 8 + lane / 2 % 2 * 4;
        #pragma unroll
        for (int t = 0; t < MOST_TILES; t++) {
            int window = place.first_window + t * 4 + lane / 8;
            bool exists = t * 4 + lane / 8 < place.count() && window % WINDOW_PITCH < WINDOWS_W;
            #pragma unroll
            for (int lower = 0; lower < 2; lower++) {
                Pixel pixel(window, lower * 2 + lane / 4 % 2);
                scalar_t* to = y + ((place.image * OUT_H + pixel.oh) * OUT_W + pixel.ow) * OUT_CHANNELS + first_turned;
                #pragma unroll
                for (int row = 0; row < LANE_ROWS; row += 2) {
                    unsigned turned[2];
                    #pragma unroll
                    for (int i = 0; i < 2; i++) {
                        scalar_t left = finish[row + i](sum_of(sums, row + i, t, lower * 2)),
                                 right = finish[row + i](sum_of(sums, row + i, t, lower * 2 + 1));
                        turned[i] = movmatrix(left.bits | (unsigned)right.bits << 16);
                    }
                    unsigned other = __shfl_xor_sync(0xFFFFFFFFu, odd ? turned[0] : turned[1], 1);
                    uint2 four = make_uint2(odd ? other : turned[0], odd ? turned[1] : other);
                    if (exists && pixel.valid() && first_turned + row * 8 < OUT_CHANNELS)
                        store_at_once(to + row * 8, *(const Packed<scalar_t, 4>*)&four);
                }
            }
        }
    }
#else
    __device__ __forceinline__ void turn(const Sums& sums, const Place& place, int exponent) const {
        int first_m = blockIdx.y * TILE_M + place.channel;
        scalar_t* plane = y + (place.image * OUT_CHANNELS + first_m) * (OUT_H * OUT_W);
        Finish finish[LANE_ROWS];
        #pragma unroll
        for (int row = 0; row < LANE_ROWS; row++) {
            int m = first_m + row * 8;
            if (m < OUT_CHANNELS) finish[row] = {ScaleBack(exponent + exponents[m]), bias ? to_acc(bias[m]) : 0};
        }
        #pragma unroll
        for (int lower = 0; lower < 2; lower++) {
            const int odd = lower && OUT_W % 4 == 2;
            int quad = threadIdx.x % 4, turned = (quad - odd) & 3, later = turned % 2,
                first = later * 4 + turned / 2 * 2 + odd;
            #pragma unroll
            for (int t = 0; t < LANE_WINDOWS; t += 4) {
                Spot spots[2] = {
                    Spot(place, t * 4 + first, lower, plane), Spot(place, t * 4 + 8 + first, lower, plane)};
                #pragma unroll
                for (int row = 0; row < LANE_ROWS; row++) {
                    if (OUT_CHANNELS % TILE_M && first_m + row * 8 >= OUT_CHANNELS) continue;
                    auto pixel = [&](int t, int right) {
                        return t < LANE_WINDOWS ? sum_of(sums, row, t, lower * 2 + right) : 0;
                    };
                    Packed<scalar_t, 4> lines[2];
                    #pragma unroll
                    for (int i = 0; i < 4; i++) {
                        int at = t + i / 2 * 2, right = i % 2;
                        float v = pixel(at, right), next = pixel(at + 1, right), after = pixel(at + 2, right);
                        if (odd && quad == 0) v = next, next = after;
                        float other = __shfl_xor_sync(0xFFFFFFFFu, later ? v : next, odd ? 3 : 1);
                        lines[i / 2].v[right] = finish[row](later ? other : v);
                        lines[i / 2].v[2 + right] = finish[row](later ? next : other);
                    }
                    #pragma unroll
                    for (int i = 0; i < 2; i++)
                        if (t + 2 * i < MOST_TILES) spots[i].store(row * 8, lines[i]);
                    if (odd && t == 0 && quad == 0)
                        Spot(place, -1, lower, plane)
                            .store(
                                row * 8,
                                {{scalar_t(), scalar_t(), finish[row](pixel(0, 0)), finish[row](pixel(0, 1))}});
                }
            }
        }
    }

#endif

    __device__ void restart() const {}
    __device__ void finish(int, i64) const {}
};

extern "C" __global__ void __launch_bounds__(THREADS, 1) conv_transpose_mma(
    const input_t* __restrict__ x, const int* __restrict__ x_exponents, const half_t* __restrict__ packed,
    const int* __restrict__ exponents, const scalar_t* __restrict__ bias, scalar_t* __restrict__ y,
    int x_exponent_count, i64 units) {
    wait_for_earlier_kernels();
    __shared__ Scratch scratch;
    DYNAMIC_SHARED(u8, shared);
    StoreEpilogue epilogue = {bias, y, exponents};
    convolve(x, x_exponents, x_exponent_count, packed, units, shared, scratch, epilogue);
}
""",
    "conv_wgmma.cuh": r"""#pragma once
#include "wgmma.cuh"
#include "mbarrier.cuh"

#define STEPS_K ((IN_CHANNELS + 31) / 32)
#define GROUPS_K (STEPS_K * 4)
#define CHUNK_STEPS (CHUNK_CHANNELS / 32)
#define GROUPS_CHUNK (CHUNK_STEPS * 4)
#define PARTS_HELD (GROUPS_K * SPLIT < CHUNKS_HELD * 8 ? GROUPS_K * SPLIT : CHUNKS_HELD * 8)
#define HALF_STEP (TILE_M * 64)
#define STEP_BYTES (HALF_STEP * SPLIT)
#define PITCH (2 * WINDOW_PITCH)
enum { OWN_PACE = SPLIT == 2 && WARPS_N == 1 };
enum { PRODUCER_REGISTERS = 72, CONSUMER_REGISTERS = 216 };

enum { LOW = PAD_H - (KERNEL_H - 1), HIGH = 2 * UNIT_ROWS - 1 + PAD_H };
__device__ constexpr int first_of(int parity) { return (LOW - parity + 1) >> 1; }
__device__ constexpr int rows_of(int parity) { return ((HIGH - parity) >> 1) - first_of(parity) + 1; }
__device__ constexpr int band_row(int row) { return (row >> 1) - first_of(row & 1) + (row & 1) * rows_of(0); }
enum { BAND_ROWS = rows_of(0) + rows_of(1), BAND_PIXELS = GAP + BAND_ROWS * PITCH };
enum { RING_OFFSET = (PARTS_HELD * ALONG + 127) / 128 * 128 };
enum { EPILOGUE_OFFSET = RING_OFFSET + STAGES * STEP_BYTES };
static_assert(UNIT_WINDOWS == UNIT_ROWS * WINDOW_PITCH, "a unit is rows of windows");
static_assert(!OWN_PACE || CONSUMERS == 2 * TILE_M, "a warpgroup copies two rows of 8 channels at a time");
static_assert(PITCH >= IN_W + GAP && PITCH >= OUT_W, "a pitch has room for rows of x and of y");
static_assert(
    ALONG >= BAND_PIXELS * 16 && ALONG % 128 == 16, "eight times 8 channels have the same pixel in different banks");
static_assert(PACKED_WIDTH == STEPS_K * 32 * SPLIT, "weights are packed in steps");

#define LANE_ROWS 2
#define LANE_WINDOWS ((MOST_TILES + 3) / 4 * 4)
typedef float Sums[2][LANE_WINDOWS][4];

__device__ __forceinline__ float sum_of(const Sums& sums, int row, int t, int corner) {
    return sums[corner / 2][t][row * 2 + corner % 2];
}

__device__ inline int origin_of(const Unit& unit) { return unit.number * (2 * UNIT_ROWS); }
__device__ constexpr int band_offset(int row, int column) { return (GAP + band_row(row) * PITCH + column) * 16; }
__device__ constexpr int rows_start(int turn) { return first_row_of(turn * PASS_WINDOWS); }
__device__ constexpr int rows_end(int count, int passes) {
    int end = count ? end_row_of(count * PASS_WINDOWS - 1) : LOW;
    return count < passes && end < HIGH + 1 ? end : HIGH + 1;
}

__device__ inline void sync_consumers() { sync_warpgroups<CONSUMERS / 128>(0); }

enum { MOST_PASSES = passes_of(UNIT_WINDOWS - (WINDOW_PITCH - WINDOWS_W)) };
struct Barriers {
    MBarrier ready[MOST_PASSES][CHUNKS], done[MOST_PASSES][CHUNKS];
    MBarrier all;

    __device__ void init() {
        mbarrier_init(all, THREADS);
        for (int turn = 0; turn < MOST_PASSES; turn++)
            for (int chunk = 0; chunk < CHUNKS; chunk++) {
                mbarrier_init(ready[turn][chunk], PRODUCERS);
                mbarrier_init(done[turn][chunk], CONSUMERS);
            }
    }
};

static_assert(
    CHUNKS_HELD == CHUNKS || (CHUNKS_HELD < CHUNKS && MOST_PASSES == 1 && X_PACKED),
    "rows of one turn can be brought chunk by chunk");

#include "conv_wgmma_band.cuh"

template <int FROM, int MOST> __device__ __forceinline__ float (&tiles_from(float (&d)[MOST][4]))
    [MOST - FROM][4] { return *(float (*)[MOST - FROM][4])(d + FROM); }

template <int> struct Multiply;

template <> struct Multiply<1> {
    template <int COUNT, int FROM, int> __device__ __forceinline__ void add(
        Sums& sums, const WgmmaOperand& a_stages, const WgmmaOperand& pixels, const int (&at)[1],
        const int (&rows)[1][2]) {
        wgmma_fence();
        #pragma unroll
        for (int k = 0; k < 2; k++)
            #pragma unroll
            for (int lower = 0; lower < 2; lower++)
                wgmma<COUNT>(
                    tiles_from<FROM>(sums[lower]), a_stages.moved(at[0] + k * TILE_M * 32),
                    pixels.moved(rows[0][lower] + k * 2 * ALONG));
        wgmma_commit();
        wgmma_wait<1>();
    }
};

template <> struct Multiply<2> {
    float partial[MOST_TILES][4];

    template <int COUNT, int FROM, int STEPS> __device__ __forceinline__ void add(
        Sums& sums, const WgmmaOperand& a_stages, const WgmmaOperand& pixels, const int (&at)[STEPS],
        const int (&rows)[STEPS][2]) {
        #pragma unroll
        for (int lower = 0; lower < 2; lower++) {
            wgmma_fence();
            #pragma unroll
            for (int product = 0; product < 3; product++)
                #pragma unroll
                for (int k = 0; k < STEPS * 2; k++) {
                    WgmmaOperand left = a_stages.moved(at[k / 2] + (product == 0) * HALF_STEP + k % 2 * TILE_M * 32);
                    WgmmaOperand right = pixels.moved(rows[k / 2][lower] + ((product == 1) * 4 + k % 2 * 2) * ALONG);
                    if (product + k == 0) wgmma<COUNT, false>(partial, left, right);
                    else wgmma<COUNT>(partial, left, right);
                }
            wgmma_commit();
            wgmma_wait<0>();
            wgmma_arrived<COUNT>(partial);
            #pragma unroll
            for (int i = 0; i < COUNT * 4; i++) sums[lower][FROM + i / 4][i % 4] += partial[i / 4][i % 4];
            wgmma_arrived<COUNT>(tiles_from<FROM>(sums[lower]));
        }
    }
};

enum {
    SEVERAL = WARPS_N == 1 && MOST_PASSES > 1,
    TOP_KH = 2 + PAD_H,
    TOP_TILES = SEVERAL && SPLIT == 2 && TOP_KH < KERNEL_H && WINDOW_PITCH / 4 < TILES ? WINDOW_PITCH / 4 : 0,
    BOTTOM_KH = 2 * (WINDOWS_H - 1) + PAD_H - IN_H + 1,
    BOTTOM_ROWS = WINDOWS_H - (UNITS - 1) * UNIT_ROWS,
    BOTTOM_PASS = passes_of(BOTTOM_ROWS * WINDOW_PITCH - (WINDOW_PITCH - WINDOWS_W)) - 1,
    BOTTOM_WINDOWS = (BOTTOM_ROWS - 1) * WINDOW_PITCH - BOTTOM_PASS * PASS_WINDOWS,
    BOTTOM_COUNT = has_last_tiles(BOTTOM_WINDOWS + WINDOWS_W, true) ? LAST_TILES : TILES,
    BOTTOM_FULL = BOTTOM_WINDOWS > 0 ? (BOTTOM_WINDOWS + 3) / 4 : 0,
    BOTTOM_TILES = SEVERAL && BOTTOM_KH > 0 && BOTTOM_FULL < BOTTOM_COUNT ? BOTTOM_FULL : 0
};

struct MainLoop {
    const Unit& unit;
    Rows& band;
    WeightRing<STEP_BYTES, TAPS * STEPS_K> weights;
    int stage = 0, to = 0, warpgroup = same_in_warp(threadIdx.x / 128);
    int warp_m = warpgroup % WARPS_M, warp_n = warpgroup / WARPS_M;
    WgmmaOperand pixels, a_stages;

    __device__ MainLoop(const Unit& unit, Rows& band, const half_t* packed, u8* shared)
        : unit(unit), band(band), weights(shared + RING_OFFSET, packed), pixels(shared, ALONG, 128),
          a_stages(shared + RING_OFFSET + warp_m * 1024, TILE_M * 16, 128) {
        for (int i = 0; i < STAGES - 2; i++) fetch();
    }
    __device__ static int first_weights() {
        if (!OWN_PACE) return threadIdx.x * 16;
        return threadIdx.x % 128 / 64 * (TILE_M * 16) + threadIdx.x / 128 * 1024 + threadIdx.x % 64 * 16;
    }
    __device__ void fetch() {
        weights.fetch(to, first_weights());
        to = weights.next(to);
    }
    __device__ __forceinline__ void meet(bool all) {
        cp_async_wait<STAGES - 3>();
        fence_async_proxy();
        if (all) sync_consumers();
        else sync_warpgroups(warp_m);
    }
    __device__ __forceinline__ int next_step() {
        meet(!OWN_PACE);
        fetch();
        int at = stage;
        stage = weights.next(stage);
        return at;
    }
    __device__ int channel() const { return warp_m * 64 + threadIdx.x / 32 % 4 * 16 + threadIdx.x % 32 / 4; }

    template <int COUNT> __device__ __forceinline__ void turn(Sums& sums, int turn, int first_window) {
        if constexpr (TOP_TILES && COUNT == TILES)
            if (agreed(unit.number == 0 && turn == 0))
                return pass_of<COUNT, 0, COUNT - TOP_TILES, TOP_TILES>(sums, turn, first_window, TOP_KH);
        if constexpr (BOTTOM_TILES && COUNT == BOTTOM_COUNT)
            if (agreed(unit.number == UNITS - 1 && turn == BOTTOM_PASS))
                return pass_of<BOTTOM_TILES, 0, COUNT, 0>(sums, turn, first_window, BOTTOM_KH);
        pass_of<0, 0, COUNT, 0>(sums, turn, first_window, 0);
    }
    template <int COUNT, int FROM, int OTHER_COUNT, int OTHER_FROM>
    __device__ __forceinline__ void pass_of(Sums& sums, int turn, int first_window, int kh) {
        Multiply<SPLIT> multiply;
        int column = 2 * (first_window - unit.first_window) + PAD_W;
        for (int chunk = 0; chunk < CHUNKS; chunk++) {
            band.wait(turn, chunk);
            if constexpr (COUNT > 0) taps<COUNT, FROM>(multiply, sums, column, chunk, 0, kh);
            taps<OTHER_COUNT, OTHER_FROM>(multiply, sums, column, chunk, kh, KERNEL_H);
            band.release(turn, chunk);
        }
    }

    template <int COUNT, int FROM> __device__ __forceinline__ void taps(
        Multiply<SPLIT>& multiply, Sums& sums, int column, int chunk, int first_kh, int end_kh) {
        int steps = min((int)CHUNK_STEPS, STEPS_K - chunk * CHUNK_STEPS), first_part = chunk % CHUNKS_HELD * 8;
        column += FROM * 8;
        if constexpr (SPLIT == 2) {
            int tap = first_kh * KERNEL_W, end = end_kh * KERNEL_W;
            #pragma unroll 1
            for (; tap + 1 < end; tap += 2) multiply_taps<COUNT, FROM, 2>(multiply, sums, column, first_part, tap);
            if (tap < end) multiply_taps<COUNT, FROM, 1>(multiply, sums, column, first_part, tap);
        } else
            for (int kh = first_kh; kh < end_kh; kh++) {
                int upper = band_offset(PAD_H - kh, column), lower = band_offset(1 + PAD_H - kh, column);
                #pragma unroll 1
                for (int kw = 0; kw < KERNEL_W; kw++)
                    for (int step = 0; step < steps; step++) {
                        int shift = (first_part + step * 4) * ALONG - kw * 16;
                        multiply.template add<COUNT, FROM, 1>(
                            sums, a_stages, pixels, {next_step()}, {{upper + shift, lower + shift}});
                    }
            }
        wgmma_wait<0>();
    }
    template <int COUNT, int FROM, int STEPS> __device__ __forceinline__ void multiply_taps(
        Multiply<SPLIT>& multiply, Sums& sums, int column, int first_part, int first_tap) {
        int at[STEPS], rows[STEPS][2];
        #pragma unroll
        for (int i = 0; i < STEPS; i++) {
            int tap = same_in_warp(first_tap + i), kh = tap / KERNEL_W, kw = tap % KERNEL_W;
            at[i] = next_step();
            #pragma unroll
            for (int lower = 0; lower < 2; lower++)
                rows[i][lower] = first_part * ALONG + band_offset(lower + PAD_H - kh, column - kw);
        }
        multiply.template add<COUNT, FROM, STEPS>(sums, a_stages, pixels, at, rows);
    }
};

template <bool PRODUCES, class Loop, class Epilogue> __device__ __forceinline__ void run(
    Unit& unit, Rows& band, Loop& loop, unsigned* scratch, Epilogue& epilogue) {
    for (;;) {
        for (bool again = true; again;) {
            band.begin<PRODUCES>(scratch);
            if constexpr (PRODUCES) band.produce(threadIdx.x - CONSUMERS);
            else {
                multiply_passes(unit, loop, band.exponent, epilogue);
                for (int turn = unit.passes; turn < MOST_PASSES; turn++)
                    for (int chunk = 0; chunk < CHUNKS; chunk++) band.release(turn, chunk);
            }
            again = !band.fits(scratch);
            if (again && !PRODUCES) epilogue.restart();
        }
        if (!PRODUCES) epilogue.finish(band.exponent, unit.of_all());
        if (band.last()) return;
        unit = band.following();
        band.next();
        if (!PRODUCES) sync_consumers(), epilogue.restart();
    }
}
""",
    "conv_wgmma_band.cuh": r"""#pragma once

__device__ inline void clear_border(u8* shared) {
    for (int i = threadIdx.x; i < BAND_PIXELS; i += THREADS) {
        if (i >= GAP && (i - GAP) % PITCH < IN_W) continue;
        #pragma unroll
        for (int part = 0; part < PARTS_HELD; part++)
            *(uint4*)(shared + part * ALONG + i * 16) = make_uint4(0, 0, 0, 0);
    }
}

struct BandBase {
    const Unit& unit;
    u8* shared;
    Barriers& barriers;
    i64 end;
    int exponent = GUESS, round = 0, passes_before = 0;
    int meetings = 0;

    __device__ void meet() {
        mbarrier_arrive(barriers.all);
        mbarrier_wait(barriers.all, meetings++ & 1);
    }
    __device__ bool last() const { return unit.of_all() + 1 == end; }
    __device__ Unit following() const { return Unit(unit.of_all() + 1); }
    __device__ static constexpr int last_reader(int end_row, int passes) {
        int turn = 0;
        while (turn < passes - 1 && rows_start(turn + 1) < end_row) turn++;
        return turn;
    }
    __device__ void wait_empty(int turn, int chunk) const {
        int reader = last_reader(rows_end(turn + 1, unit.passes), passes_before),
            before = chunk + (CHUNKS - 1 - chunk) / CHUNKS_HELD * CHUNKS_HELD;
        if (chunk >= CHUNKS_HELD) mbarrier_wait(barriers.done[turn][chunk - CHUNKS_HELD], round & 1);
        else if (round) mbarrier_wait(barriers.done[reader][before], (round - 1) & 1);
    }
    __device__ void end_round() {
        round++;
        passes_before = unit.passes;
    }
    __device__ void wait(int turn, int chunk) const { mbarrier_wait(barriers.ready[turn][chunk], round & 1); }
    __device__ void release(int turn, int chunk) const { mbarrier_arrive(barriers.done[turn][chunk]); }
};

template <bool> struct Band;

template <> struct Band<true> : BandBase {
    enum {
        PIXEL = AS_IT_IS ? IN_CHANNELS : LINE_BYTES / 2,
        CHUNK = AS_IT_IS ? CHUNK_CHANNELS : IN_H * IN_W * PIXEL,
        IMAGE = IN_H * IN_W * (AS_IT_IS ? IN_CHANNELS : CHUNKS * PIXEL),
        LEISURELY = MOST_PASSES > 3 || CHUNKS_HELD < CHUNKS
    };
    const half_t* x;
    const int* exponents;
    int exponent_count;

    __device__ Band(
        const half_t* x, const int* exponents, int exponent_count, const Unit& unit, i64 end, u8* shared,
        Barriers& barriers)
        : BandBase{unit, shared, barriers, end}, x(x), exponents(exponents), exponent_count(exponent_count) {}
    __device__ __forceinline__ void copy(int turn, int chunk, int thread, int threads) const {
        int first_row = rows_end(turn, unit.passes), pixels = (rows_end(turn + 1, unit.passes) - first_row) * IN_W;
        const half_t* from = x + unit.image * IMAGE + chunk * CHUNK;
        for (int i = thread; i < (pixels + 7) / 8 * 64; i += threads) {
            int pixel = i / 64 * 8 + i % 8, part = i / 8 % 8, row = first_row + pixel / IN_W, column = pixel % IN_W;
            int group = chunk * GROUPS_CHUNK + part % GROUPS_CHUNK, ih = origin_of(unit) + row;
            bool exists = ih >= 0 && ih < IN_H && (!AS_IT_IS || group * 8 < IN_CHANNELS);
            if (pixel < pixels && group < GROUPS_K)
                cp_async_16(
                    shared + band_offset(row, column) + (chunk % CHUNKS_HELD * 8 + part) * ALONG,
                    from + (exists ? (ih * IN_W + column) * PIXEL + part * 8 : 0), exists);
            if (LEISURELY && threads == PRODUCERS) cp_async_commit(), cp_async_wait<2>();
        }
        cp_async_commit();
    }
    __device__ void produce(int thread) const {
        for (int turn = 0; turn < MOST_PASSES; turn++) {
            for (int chunk = 0; chunk < CHUNKS; chunk++) {
                wait_empty(turn, chunk);
                if (round + turn + chunk) copy(turn, chunk, thread, PRODUCERS);
                cp_async_wait<0>();
                fence_async_proxy();
                mbarrier_arrive(barriers.ready[turn][chunk]);
            }
        }
    }
    template <bool> __device__ __forceinline__ void begin(unsigned* scratch) {
        if (round) return;
        copy(0, 0, threadIdx.x, THREADS);
        exponent = AS_IT_IS ? 0 : smallest_exponent(exponents, exponent_count, scratch, [&] { meet(); });
        cp_async_wait<0>();
        fence_async_proxy();
        meet();
    }
    __device__ bool fits(unsigned*) {
        end_round();
        return true;
    }
    __device__ void next() {}
};

template <> struct Band<false> : BandBase {
    enum {
        ROOM = 3,
        NEEDED_ROWS = 2 * ((PASS_WINDOWS - 1) / WINDOW_PITCH) + 1 + KERNEL_H,
        GROUPS = GROUPS_K < GROUPS_CHUNK ? GROUPS_K : GROUPS_CHUNK,
        FIRST_OCTETS = (NEEDED_ROWS * IN_W * GROUPS + CONSUMERS - 1) / CONSUMERS,
        FIRST_ROUNDS = (FIRST_OCTETS + 9) / 10,
        FIRST_BATCH = (FIRST_OCTETS + FIRST_ROUNDS - 1) / FIRST_ROUNDS,
        BATCH = SPLIT == 1 ? 4 : 2,
        EARLY = CHUNKS > 1 || last_reader(rows_end(1, MOST_PASSES), MOST_PASSES) < MOST_PASSES - 1
    };
    const scalar_t* x;
    bool fresh = true, come = false;
    unsigned largest, largest_next = 0;
    int right = 0;

    __device__ Band(const scalar_t* x, const int*, int, const Unit& unit, i64 end, u8* shared, Barriers& barriers)
        : BandBase{unit, shared, barriers, end}, x(x) {}
    struct Octet {
        int group, pixel;
        bool exists;
        __device__ Octet(int i, int count, int chunk)
            : group(chunk * GROUPS_CHUNK + (CHANNELS_LAST ? i % GROUPS : i / count)),
              pixel(CHANNELS_LAST ? i / GROUPS : i % count), exists(i < count * GROUPS && group < GROUPS_K) {}
    };
    __device__ static __forceinline__ void load(
        const scalar_t* source, int group, int pixel, bool real, float (&v)[8]) {
        if constexpr (CHANNELS_LAST) {
            typedef Packed<scalar_t, 8> Channels;
            Channels in = {};
            if (real && group * 8 < IN_CHANNELS) in = *(const Channels*)(source + pixel * IN_CHANNELS + group * 8);
            #pragma unroll
            for (int j = 0; j < 8; j++) v[j] = to_acc(in.v[j]);
            return;
        }
        #pragma unroll
        for (int j = 0; j < 8; j++)
            v[j] = real && group * 8 < IN_CHANNELS ? to_acc(source[(group * 8 + j) * IN_H * IN_W + pixel]) : 0;
    }
    template <int AT_ONCE> __device__ __forceinline__ unsigned convert(
        const Unit& of, int turn, int chunk, int thread, int threads, int exponent) const {
        unsigned largest = 0;
        int start = rows_end(turn, of.passes), count = (rows_end(turn + 1, of.passes) - start) * IN_W;
        int before = (origin_of(of) + start) * IN_W;
        const scalar_t* source = x + of.image * (IN_CHANNELS * IN_H * IN_W);
        for (int at = thread; at < count * GROUPS; at += threads * AT_ONCE) {
            float v[AT_ONCE][8];
            #pragma unroll
            for (int b = 0; b < AT_ONCE; b++) {
                Octet octet(at + b * threads, count, chunk);
                int pixel = before + octet.pixel;
                load(source, octet.group, pixel, octet.exists && pixel >= 0 && pixel < IN_H * IN_W, v[b]);
            }
            #pragma unroll
            for (int b = 0; b < AT_ONCE; b++) {
                Octet octet(at + b * threads, count, chunk);
                if (!octet.exists) continue;
                #pragma unroll
                for (int j = 0; j < 8; j++) {
                    largest = max(largest, finite_magnitude(v[b][j]));
                    v[b][j] = multiply_unflushed(v[b][j], power_of_two(exponent));
                }
                int part = octet.group / GROUPS_CHUNK * 8 + octet.group % GROUPS_CHUNK;
                u8* to = shared + part * ALONG + band_offset(start + octet.pixel / IN_W, octet.pixel % IN_W);
                #pragma unroll
                for (int i = 0; i < SPLIT; i++) *(uint4*)(to + i * GROUPS_CHUNK * ALONG) = take_halves(v[b], i);
            }
        }
        fence_async_proxy();
        return largest;
    }
    template <bool PRODUCES> __device__ __forceinline__ void begin(unsigned* scratch) {
        bool later = CHUNKS > 1 || unit.passes > 1;
        if (fresh) exponent = GUESS;
        largest = come ? largest_next : 0;
        for (;; come = false) {
            if (!come) {
                if (!PRODUCES) largest = convert<FIRST_BATCH>(unit, 0, 0, threadIdx.x, CONSUMERS, exponent);
                right = scale_exponent(block_max(largest, scratch, [&] { meet(); }));
            }
            bool good = agreed(!fresh || (right >= GUESS + later && right <= GUESS + SLACK));
            fresh = false;
            if (good) return;
            exponent = right - later * ROOM;
        }
    }
    __device__ void produce(int thread) {
        enum { ALL = MOST_PASSES * CHUNKS };
        bool more = EARLY && !last();
        for (int i = 1; i < ALL + more; i++) {
            bool next = i == ALL;
            int turn = next ? 0 : i / CHUNKS, chunk = next ? 0 : i % CHUNKS;
            Unit of = next ? following() : unit;
            if (next) mbarrier_wait(barriers.done[last_reader(rows_end(1, of.passes), unit.passes)][0], round & 1);
            else wait_empty(turn, chunk);
            unsigned most = convert<BATCH>(of, turn, chunk, thread, PRODUCERS, next ? (int)GUESS : exponent);
            if (next) largest_next = most;
            else largest = max(largest, most), mbarrier_arrive(barriers.ready[turn][chunk]);
        }
    }
    __device__ void wait(int turn, int chunk) const {
        if (turn + chunk) BandBase::wait(turn, chunk);
    }
    __device__ bool fits(unsigned* scratch) {
        end_round();
        unsigned both[] = {largest, largest_next};
        block_max(both, scratch, [&] { meet(); });
        int of_unit = scale_exponent(both[0]);
        right = scale_exponent(both[1]);
        bool fit = agreed(exponent <= of_unit && of_unit <= exponent + SLACK);
        come = fit && EARLY;
        if (!fit) exponent = of_unit;
        return fit;
    }
    __device__ void next() { fresh = true; }
};

typedef Band<X_PACKED || AS_IT_IS> Rows;
""",
    "conv_wgrad_mma.cu": r"""#define SHARED_ALIGNMENT 1024
#include "common.cuh"
#include "async_copy.cuh"
#include "fp16_tiles.cuh"
#include "mma.cuh"

#define X_CHUNKS CHUNKS
#define DY_CHUNKS ((OUT_CHANNELS + CHUNK_CHANNELS - 1) / CHUNK_CHANNELS)
#define X_STEP (CHANNELS_LAST ? IN_CHANNELS * sizeof(half_t) : LINE_BYTES)
#define TAPS (KERNEL_H * KERNEL_W)
#define TAP_GROUPS ((KERNEL_W + TAPS_W - 1) / TAPS_W)
#define OC_TILES ((OUT_CHANNELS + TILE_OC - 1) / TILE_OC)
#define IC_TILES ((IN_CHANNELS + TILE_IC - 1) / TILE_IC)
#define LEAD (WGMMA ? (TAPS_W - 1 + COLUMNS - 1) / COLUMNS * COLUMNS : TAPS_W - 1)
#define BAND_STAGES ((LEAD + IN_W + COLUMNS - 1) / COLUMNS)
#define CHAIN (SPLIT == 1 ? 2048 : WGMMA ? 256 : 128)
#define CHAIN_BANDS (CHAIN > IN_W ? CHAIN / IN_W : 1)
static_assert(BAND_ROWS == 16, "one instruction multiplies a column of a band");
static_assert(TILES == KERNEL_H * TAP_GROUPS * OC_TILES * IC_TILES, "tiles make dw");

struct Tile {
    int split, kh, kw, first_tap, oc_tile, ic_tile, rows, first_band, stages, inner_first, inner_end;

    __device__ Tile(int images, int bands_per_split) {
        int tile = blockIdx.x % TILES, group = tile / KERNEL_H % TAP_GROUPS;
        split = blockIdx.x / TILES;
        kh = tile % KERNEL_H;
        kw = min(group * TAPS_W, KERNEL_W - TAPS_W);
        first_tap = group * TAPS_W - kw;
        oc_tile = tile / (KERNEL_H * TAP_GROUPS) % OC_TILES;
        ic_tile = tile / (KERNEL_H * TAP_GROUPS * OC_TILES);
        rows = images * IN_H;
        first_band = split * bands_per_split;
        stages = min(bands_per_split, (rows + BAND_ROWS - 1) / BAND_ROWS - first_band) * BAND_STAGES;
        inner_first = max(0, PAD_W - kw);
        inner_end = min(IN_W, OUT_W + PAD_W - kw - (TAPS_W - 1));
    }
    __device__ static int column_of(int stage) { return stage % BAND_STAGES * COLUMNS - LEAD; }
    __device__ int partner(int column, int t) const { return column - PAD_W + kw + t; }
    __device__ bool has_partner(int column, int t) const {
        int ow = partner(column, t);
        return column >= 0 && column < IN_W && ow >= 0 && ow < OUT_W;
    }
    __device__ bool inner(int column, int count = 1) const {
        return column >= inner_first && column + count <= inner_end;
    }
    __device__ bool ends_chain(int stage) const {
        return (stage + 1) % (BAND_STAGES * CHAIN_BANDS) == 0 || stage + 1 == stages;
    }
    __device__ i64 tap(int t) const { return (i64)split * TAPS + kh * KERNEL_W + kw + t; }
};

struct Copies {
    int row = threadIdx.x / 8 % BAND_ROWS, part = threadIdx.x % 8, loader = threadIdx.x / 128;
    int image, ih, oh;
    bool valid;

    __device__ Copies(const Tile& tile, int stage) {
        int of_all = (tile.first_band + stage / BAND_STAGES) * BAND_ROWS + row;
        image = of_all / IN_H, ih = of_all % IN_H, oh = ih - PAD_H + tile.kh;
        valid = of_all < tile.rows && oh >= 0 && oh < OUT_H;
    }
    __device__ const u8* x(const half_t* packed, int chunk, int column) const {
        if (CHANNELS_LAST)
            return (const u8*)packed + (((i64)image * IN_H + ih) * IN_W + column) * X_STEP + chunk * LINE_BYTES;
        return (const u8*)packed + ((((i64)image * X_CHUNKS + chunk) * IN_H + ih) * IN_W + column) * LINE_BYTES;
    }
    __device__ bool has_channels(int chunk) const {
        return !CHANNELS_LAST || chunk * CHUNK_CHANNELS + part * 8 < IN_CHANNELS;
    }
    __device__ const u8* dy(const half_t* packed, int chunk, int column) const {
        return (const u8*)packed + ((((i64)image * DY_CHUNKS + chunk) * OUT_H + oh) * OUT_W + column) * LINE_BYTES;
    }
};

template <int TILES_OF_8, class Place, class Exists>
__device__ inline void store_chain(float (&sums)[TILES_OF_8][4], bool first, Place place, Exists exists) {
    Packed<float, 2> totals[2 * TILES_OF_8] = {};
    if (!first)
        #pragma unroll
        for (int i = 0; i < 2 * TILES_OF_8; i++)
            if (exists(i)) totals[i] = *place(i);
    #pragma unroll
    for (int i = 0; i < 2 * TILES_OF_8; i++) {
        #pragma unroll
        for (int j = 0; j < 2; j++) {
            float& sum = sums[i / 2][i % 2 * 2 + j];
            totals[i].v[j] += sum;
            sum = 0;
        }
        if (exists(i)) *place(i) = totals[i];
    }
}

#if WGMMA
#include "conv_wgrad_wgmma.cuh"
#else
#include "conv_wgrad_mma.cuh"
#endif

extern "C" __global__ void __launch_bounds__(THREADS, 1) conv_wgrad_mma(
    const half_t* __restrict__ x, const half_t* __restrict__ dy, float* __restrict__ partial, int images,
    int bands_per_split) {
    wait_for_earlier_kernels();
    DYNAMIC_SHARED(u8, shared);
    sum_pixels(x, dy, partial, Tile(images, bands_per_split), shared);
}

extern "C" __global__ void conv_wgrad_reduce(
    const float* __restrict__ partial, const int* __restrict__ x_exponents, const int* __restrict__ dy_exponents,
    const scalar_t* __restrict__ x_sums, const float* __restrict__ borders, scalar_t* __restrict__ dw, int x_count,
    int dy_count, int splits, int border_parts) {
    wait_for_earlier_kernels();
    __shared__ unsigned scratch[32];
    enum { SIZE = TAPS * OUT_CHANNELS * IN_CHANNELS };
    int x_exponent = x_exponents ? centred_exponent(x_sums, smallest_exponent(x_exponents, x_count, scratch)) : 0;
    int dy_exponent = smallest_exponent(dy_exponents, dy_count, scratch);
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= SIZE) return;
    float sum = 0;
    #pragma unroll 8
    for (int s = 0; s < splits; s++) sum += partial[(i64)s * SIZE + i];
    int tap = i / (IN_CHANNELS * OUT_CHANNELS);
    int ic = WGMMA ? i / OUT_CHANNELS % IN_CHANNELS : i % IN_CHANNELS,
        oc = WGMMA ? i % OUT_CHANNELS : i / IN_CHANNELS % OUT_CHANNELS;
    float total = ScaleBack(x_exponent + dy_exponent)(sum);
    if (x_sums) {
        float alone = 0;
        #pragma unroll 8
        for (int part = 0; part < border_parts; part++) alone += borders[(part * TAPS + tap) * OUT_CHANNELS + oc];
        total = add_unflushed(total, centre(x_sums, ic, IN_H * IN_W) * -ScaleBack(dy_exponent)(alone));
    }
    dw[((i64)ic * OUT_CHANNELS + oc) * TAPS + tap] = from_acc<scalar_t>(total);
}
""",
    "conv_wgrad_mma.cuh": r"""#pragma once

#define WARPS (THREADS / 32)
#define TILE_CHUNKS (TILE_OC / CHUNK_CHANNELS)
#define PAIRS ((IN_CHANNELS < CHUNK_CHANNELS ? IN_CHANNELS : CHUNK_CHANNELS) / 16)
#define COLUMN_BYTES (BAND_ROWS * LINE_BYTES)
#define SLOT_BYTES ((1 + TILE_CHUNKS) * COLUMNS * COLUMN_BYTES)
#define BUFFERS (SPLIT == 1 ? 2 : 1)
static_assert(WARPS % 4 == 0 && TILE_OC == 16 * WARPS && TILE_IC == CHUNK_CHANNELS, "a warp has 16 output channels");
static_assert(COLUMNS % TAPS_W == 0, "a stage is a multiple of the window");
static_assert(STAGES >= 2 && STAGES * SLOT_BYTES == SHARED_BYTES, "the ring is all of the shared memory");

typedef float Sums[2 * PAIRS][4];

template <int> struct Multiply;

template <> struct Multiply<1> {
    __device__ static __forceinline__ void add(
        Sums& sums, const unsigned (&a)[1][4], const unsigned (&b)[1][PAIRS][4]) {
        #pragma unroll
        for (int n = 0; n < 2 * PAIRS; n++)
            mma_m16n8k16(sums[n], a[0], b[0][n / 2][n % 2 * 2], b[0][n / 2][n % 2 * 2 + 1]);
    }
};

template <> struct Multiply<2> {
    __device__ static __forceinline__ void add(
        Sums& sums, const unsigned (&a)[2][4], const unsigned (&b)[2][PAIRS][4]) {
        Sums partial = {};
        #pragma unroll
        for (int product = 0; product < 3; product++)
            #pragma unroll
            for (int n = 0; n < 2 * PAIRS; n++) {
                const unsigned (&right)[4] = b[product == 1][n / 2];
                mma_m16n8k16(partial[n], a[product == 0], right[n % 2 * 2], right[n % 2 * 2 + 1]);
            }
        #pragma unroll
        for (int i = 0; i < 8 * PAIRS; i++) sums[i / 4][i % 4] += partial[i / 4][i % 4];
    }
};

__device__ inline void sum_pixels(const half_t* x, const half_t* dy, float* partial, const Tile& tile, u8* ring) {
    int lane = threadIdx.x % 32, oc_in_tile = threadIdx.x / 32 * 16, first_oc = tile.oc_tile * TILE_OC + oc_in_tile;
    bool active = OUT_CHANNELS % TILE_OC == 0 || first_oc < OUT_CHANNELS;

    auto fetch = [&](int stage) {
        if (stage < tile.stages) {
            Copies copies(tile, stage);
            int iw = tile.column_of(stage), ow = tile.partner(iw, TAPS_W - 1);
            u8* to = ring + stage % STAGES * SLOT_BYTES + line_offset(copies.row, copies.part);
            const u8* from = copies.x(x, tile.ic_tile, iw) + copies.part * 16;
            #pragma unroll
            for (int i = 0; i < (COLUMNS + WARPS / 4 - 1) / (WARPS / 4); i++) {
                int c = i * (WARPS / 4) + copies.loader;
                bool valid = copies.valid && copies.has_channels(tile.ic_tile) && iw + c >= 0 && iw + c < IN_W;
                if (c < COLUMNS) cp_async_16(to + c * COLUMN_BYTES, from + c * (int)X_STEP, valid);
            }
            #pragma unroll 1
            for (int i = 0; i < TILE_CHUNKS / (WARPS / 4); i++) {
                int q = i * (WARPS / 4) + copies.loader, chunk = tile.oc_tile * TILE_CHUNKS + q;
                const u8* from = copies.dy(dy, chunk, ow) + copies.part * 16;
                #pragma unroll
                for (int c = 0; c < COLUMNS; c++) {
                    bool valid = copies.valid && chunk < DY_CHUNKS && ow + c >= 0 && ow + c < OUT_W;
                    cp_async_16(to + ((1 + q) * COLUMNS + c) * COLUMN_BYTES, from + c * LINE_BYTES, valid);
                }
            }
        }
        cp_async_commit();
    };

    int dy_row = (1 + oc_in_tile / CHUNK_CHANNELS) * COLUMNS * COLUMN_BYTES +
                 line_offset(lane % 8 + lane / 16 * 8, oc_in_tile % CHUNK_CHANNELS / 8 + lane / 8 % 2);
    int x_row = line_offset(lane % 8 + lane / 8 % 2 * 8, lane / 16);

    Sums sums[TAPS_W] = {};
    unsigned window[TAPS_W][SPLIT][4];

    auto multiply_stage = [&](int stage) __attribute__((always_inline)) {
        const u8* slot = ring + stage % STAGES * SLOT_BYTES;
        unsigned b[BUFFERS][SPLIT][PAIRS][4];
        auto load = [&](int c) __attribute__((always_inline)) {
            #pragma unroll
            for (int part = 0; part < SPLIT; part++) {
                ldmatrix_x4_transposed(
                    window[c % TAPS_W][part], other_part(slot + dy_row, part * 4) + c * COLUMN_BYTES);
                #pragma unroll
                for (int j = 0; j < PAIRS; j++)
                    ldmatrix_x4_transposed(
                        b[c % BUFFERS][part][j], other_part(slot + x_row, part * 4 + j * 2) + c * COLUMN_BYTES);
            }
        };
        load(0);
        #pragma unroll
        for (int c = 0; c < COLUMNS; c++) {
            int column = tile.column_of(stage) + c;
            auto multiply_column = [&](const bool inner) __attribute__((always_inline)) {
                #pragma unroll
                for (int t = 0; t < TAPS_W; t++) {
                    if (inner || tile.has_partner(column, t))
                        Multiply<SPLIT>::add(sums[t], window[(c + 1 + t) % TAPS_W], b[c % BUFFERS]);
                    if (t == (BUFFERS == 2 ? 0 : TAPS_W - 1) && c + 1 < COLUMNS) load(c + 1);
                }
            };
            if (tile.inner(column)) multiply_column(true);
            else multiply_column(false);
            if (c == 0) fetch(stage + STAGES - 1);
        }
    };

    auto store_sums = [&](bool first) {
        #pragma unroll
        for (int t = 0; t < TAPS_W; t++) {
            if (!active || t < tile.first_tap) continue;
            i64 row = tile.tap(t) * OUT_CHANNELS + first_oc + lane / 4;
            float* to = partial + row * IN_CHANNELS + tile.ic_tile * TILE_IC + lane % 4 * 2;
            auto place = [&](int i) { return (Packed<float, 2>*)(to + i % 2 * 8 * IN_CHANNELS + i / 2 * 8); };
            auto exists = [&](int i) { return tile.ic_tile * TILE_IC + i / 2 * 8 < IN_CHANNELS; };
            store_chain(sums[t], first, place, exists);
        }
    };

    for (int stage = 0; stage < STAGES - 1; stage++) fetch(stage);
    bool first = true;
    for (int stage = 0; stage < tile.stages; stage++) {
        cp_async_wait<STAGES - 2>();
        __syncthreads();
        if (active) multiply_stage(stage);
        else fetch(stage + STAGES - 1);
        if (tile.ends_chain(stage)) store_sums(first), first = false;
    }
}
""",
    "conv_wgrad_wgmma.cuh": r"""#pragma once
#include "wgmma.cuh"
#include "mbarrier.cuh"

#define TILES_N (TILE_OC / 16)
#define GROUPS_OC ((TILE_OC + 63) / 64)
#define BLOCK_BYTES (BAND_ROWS * LINE_BYTES)
#define POSITION_BYTES ((1 + GROUPS_OC) * SPLIT * BLOCK_BYTES)
#define BACK ((TAPS_W - 1 + COLUMNS - 1) / COLUMNS)
#define PRODUCERS 128
#define CONSUMERS 256
enum { IN_FLIGHT = 2 };
enum { ZEROS_OFFSET = STAGES * COLUMNS * POSITION_BYTES, BARRIERS_OFFSET = ZEROS_OFFSET + 16 };
static_assert(
    THREADS == PRODUCERS + CONSUMERS && TILE_IC == 64, "two warpgroups, each with all input channels of the block");
static_assert(TILE_OC == 16 * TILES_N, "a warpgroup has half of the output channels");
static_assert(
    SPLIT == 1 ? COLUMNS % 2 == 0 : COLUMNS <= 2 && IN_W % COLUMNS == 0,
    "two columns of registers, and no stage ends beyond x");
static_assert(STAGES >= BACK + 3 + IN_FLIGHT, "stages that are multiplied, and those that are copied meanwhile");
template <int> struct Multiply {};
static_assert(
    BARRIERS_OFFSET + 2 * STAGES * sizeof(MBarrier) == SHARED_BYTES,
    "the ring, the zeros and the barriers are all of the shared memory");

struct MainLoop {
    const half_t *x, *dy;
    float* partial;
    const Tile& tile;
    u8* ring;
    MBarrier *full, *empty;
    int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warpgroup = __shfl_sync(0xFFFFFFFFu, warp / 4, 0);
    int first_ic = tile.ic_tile * TILE_IC + warp % 4 * 16,
        first_oc = tile.oc_tile * TILE_OC + warpgroup * (TILE_OC / 2);
    bool active = OUT_CHANNELS % TILE_OC == 0 || first_oc < OUT_CHANNELS, first = true;
    const u8* x_row = ring + line_offset(lane % 8 + lane / 16 * 8, warp % 4 * 2 + lane / 8 % 2);
    WgmmaLines dy_lines = {
        ring + (GROUPS_OC == 1 ? 1 : 1 + warpgroup) * SPLIT * BLOCK_BYTES, GROUPS_OC == 1 ? warpgroup * TILES_N : 0};
    float sums[TAPS_W][TILES_N][4] = {};

    __device__ __forceinline__ void fetch(int stage) const {
        Copies copies(tile, stage);
        enum { PARTS = 8 / SPLIT };
        int iw = tile.column_of(stage), ow = tile.partner(iw, TAPS_W - 1);
        int first_chunk = copies.part / PARTS, offset = copies.part % PARTS * 16;
        u8* to = ring + stage % STAGES * COLUMNS * POSITION_BYTES + line_offset(copies.row, copies.part);
        auto copy = [&](int block, const u8* from, bool valid, int width, int column, int step) {
            #pragma unroll
            for (int i = 0; i < COLUMNS * SPLIT; i++) {
                int c = i / SPLIT, residual = i % SPLIT;
                cp_async_16(
                    to + c * POSITION_BYTES + (block * SPLIT + residual) * BLOCK_BYTES,
                    from + offset + c * step + residual * PARTS * 16, valid && column + c >= 0 && column + c < width);
            }
        };
        int chunk = tile.ic_tile * SPLIT + first_chunk;
        bool real = copies.valid && chunk < X_CHUNKS && copies.has_channels(chunk);
        copy(0, copies.x(x, chunk, iw), real, IN_W, iw, X_STEP);
        #pragma unroll 1
        for (int group = 0; group < GROUPS_OC; group++) {
            int chunk = (tile.oc_tile * GROUPS_OC + group) * SPLIT + first_chunk;
            copy(1 + group, copies.dy(dy, chunk, ow), copies.valid && chunk < DY_CHUNKS, OUT_W, ow, LINE_BYTES);
        }
    }
    __device__ static int lap(int stage) { return stage / STAGES & 1; }
    __device__ __forceinline__ void produce() const {
        for (int stage = 0; stage < tile.stages + IN_FLIGHT; stage++) {
            if (stage < tile.stages) {
                mbarrier_wait(empty[stage % STAGES], lap(stage) ^ 1);
                fetch(stage);
            }
            cp_async_commit();
            if (stage < IN_FLIGHT) continue;
            cp_async_wait<IN_FLIGHT>();
            fence_async_proxy();
            mbarrier_arrive(full[(stage - IN_FLIGHT) % STAGES]);
        }
    }
    __device__ __forceinline__ void wait(int stage) const { mbarrier_wait(full[stage % STAGES], lap(stage)); }
    __device__ __forceinline__ void release(int stage) const {
        if (stage >= 0) mbarrier_arrive(empty[stage % STAGES]);
    }
    __device__ __forceinline__ WgmmaLines dy_column(int slot, int c) const {
        int position = slot * COLUMNS + c;
        return dy_lines.moved((c < 0 && position < 0 ? position + STAGES * COLUMNS : position) * POSITION_BYTES);
    }
    __device__ __forceinline__ void store_sums() {
        #pragma unroll
        for (int t = 0; t < TAPS_W; t++) {
            wgmma_arrived<TILES_N>(sums[t]);
            if (!active || t < tile.first_tap) continue;
            float* to =
                partial + (tile.tap(t) * IN_CHANNELS + first_ic + lane / 4) * OUT_CHANNELS + first_oc + lane % 4 * 2;
            auto place = [&](int i) { return (Packed<float, 2>*)(to + i % 2 * 8 * OUT_CHANNELS + i / 2 * 8); };
            auto exists = [&](int i) { return first_ic < IN_CHANNELS && first_oc + i / 2 * 8 < OUT_CHANNELS; };
            store_chain(sums[t], first, place, exists);
        }
        first = false;
    }

    __device__ __forceinline__ void run(Multiply<1>) {
        unsigned fragments[2][4];
        for (int stage = 0; stage < tile.stages; stage++) {
            wait(stage);
            int slot = stage % STAGES;
            #pragma unroll
            for (int c = 0; c < COLUMNS; c++) {
                int column = tile.column_of(stage) + c;
                unsigned (&a)[4] = fragments[c % 2];
                auto multiply_column = [&](const bool inner) __attribute__((always_inline)) {
                    wgmma_fence();
                    #pragma unroll
                    for (int t = 0; t < TAPS_W; t++)
                        if (inner || tile.has_partner(column, t))
                            wgmma<TILES_N>(sums[t], a, dy_column(slot, c + t - (TAPS_W - 1)));
                    wgmma_commit();
                };
                if (active && column >= 0 && column < IN_W) {
                    if (IN_W % 2 && column == 0) wgmma_wait<0>();
                    else wgmma_wait<1>();
                    ldmatrix_x4_transposed(a, x_row + (slot * COLUMNS + c) * POSITION_BYTES);
                    if (tile.inner(column)) multiply_column(true);
                    else multiply_column(false);
                }
                if (c == 1) release(stage - BACK - 2);
            }
            if (IN_W % COLUMNS && tile.column_of(stage) + COLUMNS > IN_W) wgmma_wait<0>();
            if (tile.ends_chain(stage)) wgmma_wait<0>(), store_sums();
        }
    }

    __device__ __forceinline__ void run(Multiply<2>) {
        u8* zeros = ring + ZEROS_OFFSET;
        unsigned fragments[COLUMNS][2][4];
        auto load = [&](int stage, int t) __attribute__((always_inline)) {
            #pragma unroll
            for (int c = 0; c < COLUMNS; c++) {
                bool has = tile.has_partner(tile.column_of(stage) + c, t);
                const u8* row = x_row + (stage % STAGES * COLUMNS + c) * POSITION_BYTES;
                #pragma unroll
                for (int part = 0; part < 2; part++)
                    ldmatrix_x4_transposed(fragments[c][part], has ? row + part * BLOCK_BYTES : zeros);
            }
        };
        float products[TILES_N][4] = {};
        wait(0);
        load(0, 0);
        for (int stage = 0; stage < tile.stages; stage++) {
            int slot = stage % STAGES, column = tile.column_of(stage);
            bool inner = tile.inner(column, COLUMNS);
            if (active && column >= 0) {
                #pragma unroll
                for (int t = 0; t < TAPS_W; t++) {
                    wgmma_fence();
                    #pragma unroll
                    for (int product = 0; product < 3; product++)
                        #pragma unroll
                        for (int c = 0; c < COLUMNS; c++) {
                            WgmmaLines right =
                                dy_column(slot, c + t - (TAPS_W - 1)).moved(product == 1 ? BLOCK_BYTES : 0);
                            wgmma<TILES_N>(products, fragments[c][product == 0], right, product + c > 0);
                        }
                    wgmma_commit();
                    if (t == TAPS_W - 1 && stage + 1 < tile.stages) wait(stage + 1);
                    wgmma_wait<0>();
                    wgmma_arrived<TILES_N>(products);
                    if (t == TAPS_W - 1) load(stage + 1, 0);
                    else if (!inner) {
                        bool changes = false;
                        #pragma unroll
                        for (int c = 0; c < COLUMNS; c++)
                            changes |= tile.has_partner(column + c, t) != tile.has_partner(column + c, t + 1);
                        if (changes) load(stage, t + 1);
                    }
                    #pragma unroll
                    for (int i = 0; i < TILES_N * 4; i++) sums[t][i / 4][i % 4] += products[i / 4][i % 4];
                    wgmma_arrived<TILES_N>(sums[t]);
                }
            } else {
                if (stage + 1 < tile.stages) wait(stage + 1);
                load(stage + 1, 0);
            }
            release(stage - BACK);
            if (tile.ends_chain(stage)) store_sums();
        }
    }
};

__device__ inline void sum_pixels(const half_t* x, const half_t* dy, float* partial, const Tile& tile, u8* ring) {
    MBarrier *full = (MBarrier*)(ring + BARRIERS_OFFSET), *empty = full + STAGES;
    if (threadIdx.x == 0) {
        for (int i = 0; i < STAGES; i++) mbarrier_init(full[i], PRODUCERS), mbarrier_init(empty[i], CONSUMERS);
        *(uint4*)(ring + ZEROS_OFFSET) = make_uint4(0, 0, 0, 0);
    }
    fence_async_proxy();
    __syncthreads();
    MainLoop loop = {x, dy, partial, tile, ring, full, empty};
    if (loop.warpgroup == CONSUMERS / 128) {
        fewer_registers<40>();
        loop.produce();
    } else {
        more_registers<232>();
        loop.run(Multiply<SPLIT>());
    }
}
""",
    "fp16_scale.cuh": r"""#pragma once
#include "common.cuh"

__device__ inline unsigned finite_magnitude(float v) {
    unsigned bits = __float_as_uint(v) & 0x7FFFFFFF;
    return bits < 0x7F800000 ? bits : 0;
}

template <int AT_ONCE, class T, int W, class I>
__device__ inline unsigned largest_of(const Packed<T, W>* from, I first, I step, I count) {
    unsigned largest = 0;
    for (; first < count; first += step * AT_ONCE) {
        Packed<T, W> in[AT_ONCE];
        #pragma unroll
        for (int i = 0; i < AT_ONCE; i++) in[i] = from[min(first + i * step, count - 1)];
        #pragma unroll
        for (int i = 0; i < AT_ONCE * W; i++) largest = max(largest, finite_magnitude(to_acc(in[i / W].v[i % W])));
    }
    return largest;
}

__device__ inline int scale_exponent(unsigned largest_magnitude) {
    return min(126, 14 + 127 - (int)(largest_magnitude >> 23));
}

__device__ inline float power_of_two(int e) { return __uint_as_float((unsigned)(e + 127) << 23); }

struct ScaleBack {
    float first, second;
    __device__ explicit ScaleBack(int e) : first(power_of_two(-e / 2)), second(power_of_two(-e - -e / 2)) {}
    __device__ float operator()(float v) const { return multiply_unflushed(multiply_unflushed(v, first), second); }
    __device__ float operator()(float v, float shift) const {
        v = multiply_unflushed(v, first);
        float sum;
        asm("fma.rn.f32 %0, %1, %2, %3;" : "=f"(sum) : "f"(v), "f"(second), "f"(shift));
        return sum;
    }
};

template <int COUNT, class Meet>
__device__ inline void block_max(unsigned (&v)[COUNT], unsigned* scratch, Meet meet) {
    #pragma unroll
    for (int i = 0; i < COUNT; i++) {
        v[i] = warp_max(v[i]);
        if (threadIdx.x % 32 == 0) scratch[threadIdx.x / 32 * COUNT + i] = v[i];
    }
    meet();
    for (unsigned w = 0; w < blockDim.x / 32; w++)
        #pragma unroll
        for (int i = 0; i < COUNT; i++) v[i] = max(v[i], scratch[w * COUNT + i]);
    meet();
}
template <class Meet> __device__ inline unsigned block_max(unsigned v, unsigned* scratch, Meet meet) {
    unsigned alone[1] = {v};
    block_max(alone, scratch, meet);
    return alone[0];
}
struct SyncThreads {
    __device__ void operator()() const { __syncthreads(); }
};
__device__ inline unsigned block_max(unsigned v, unsigned* scratch) { return block_max(v, scratch, SyncThreads()); }

template <class Meet = SyncThreads>
__device__ inline int smallest_exponent(const int* exponents, int count, unsigned* scratch, Meet meet = Meet()) {
    unsigned largest = 0;
    for (int i = threadIdx.x; i < count; i += blockDim.x) largest = max(largest, (unsigned)(126 - exponents[i]));
    return 126 - (int)block_max(largest, scratch, meet);
}
""",
    "fp16_tiles.cu": r"""#include "common.cuh"
#include "pack_tile.cuh"

typedef Packed<scalar_t, WIDTH> Pack;

extern "C" __global__ void __launch_bounds__(THREADS)
    largest_magnitude(const scalar_t* __restrict__ source, int* __restrict__ exponents, i64 size) {
    wait_for_earlier_kernels();
    __shared__ unsigned scratch[32];
    i64 packs = size / WIDTH, step = (i64)gridDim.x * THREADS;
    i64 first = (i64)blockIdx.x * THREADS + threadIdx.x;
    unsigned largest = block_max(largest_of<BATCH>((const Pack*)source, first, step, packs), scratch);
    if (threadIdx.x == 0) exponents[blockIdx.x] = scale_exponent(largest);
}

extern "C" __global__ void __launch_bounds__(THREADS) pack_fp16(
    const scalar_t* __restrict__ source, const int* __restrict__ exponents, const scalar_t* __restrict__ sums,
    half_t* __restrict__ packed, int exponent_count, int images, int channels, int pixels) {
    wait_for_earlier_kernels();
    typedef ToPack<scalar_t, WIDTH> Tensor;
    __shared__ uint4 tile[Tensor::TILE_PIXELS * 8];
    __shared__ unsigned scratch[32];
    Tensor tensor = {source, exponents, sums, packed, exponent_count, channels, pixels};
    tensor.pack((i64)blockIdx.x * Tensor::TILE_PIXELS, images * pixels, blockIdx.y, tile, scratch);
}

extern "C" __global__ void __launch_bounds__(THREADS) scale_fp16(
    const scalar_t* __restrict__ source, const int* __restrict__ exponents, half_t* __restrict__ scaled,
    int exponent_count, i64 size) {
    wait_for_earlier_kernels();
    __shared__ unsigned scratch[32];
    float scale = power_of_two(smallest_exponent(exponents, exponent_count, scratch));
    i64 i = (i64)blockIdx.x * THREADS + threadIdx.x;
    if (i >= size / WIDTH) return;
    Pack in = ((const Pack*)source)[i];
    Packed<half_t, WIDTH> out;
    #pragma unroll
    for (int j = 0; j < WIDTH; j++) out.v[j] = from_acc<half_t>(multiply_unflushed(to_acc(in.v[j]), scale));
    ((Packed<half_t, WIDTH>*)scaled)[i] = out;
}
""",
    "fp16_tiles.cuh": r"""#pragma once
#include "fp16_scale.cuh"

#define CHUNKS ((IN_CHANNELS + CHUNK_CHANNELS - 1) / CHUNK_CHANNELS)
#define STAGE_BYTES (TILE_M * LINE_BYTES)
static_assert(
    LINE_BYTES == 8 * 16 && LINE_BYTES == SPLIT * CHUNK_CHANNELS * sizeof(half_t), "a line is eight parts of 16 bytes");

__device__ inline int line_offset(int line, int part, int key) { return line * LINE_BYTES + ((part ^ key) << 4); }
__device__ inline int line_offset(int line, int part) { return line_offset(line, part, line & 7); }

__device__ inline const u8* other_part(const u8* row, int parts) {
    return (const u8*)((size_t)row ^ (size_t)(parts * 16));
}

__device__ inline unsigned pack_halves(float low, float high) {
    unsigned both;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(high), "f"(low));
    return both;
}

template <class V> __device__ inline float centre(const V* sums, int c, int count) {
    float mean = sums ? to_acc(sums[c]) / count : 0;
    return mean - mean == 0 ? mean : 0;
}
__device__ inline int centred_exponent(const void* sums, int exponent) { return sums ? exponent - 1 : exponent; }

__device__ inline uint4 take_halves(float (&v)[8], int part) {
    float residual[8];
    #pragma unroll
    for (int j = 0; j < 8; j++) {
        residual[j] = v[j];
        if (part + 1 < SPLIT && v[j] - v[j] != 0) v[j] = 0;
        residual[j] -= to_acc(from_acc<half_t>(v[j]));
    }
    uint4 halves =
        make_uint4(pack_halves(v[0], v[1]), pack_halves(v[2], v[3]), pack_halves(v[4], v[5]), pack_halves(v[6], v[7]));
    #pragma unroll
    for (int j = 0; j < 8; j++) v[j] = residual[j];
    return halves;
}

__device__ inline void store_line(u8* lines, int line, int group, float (&v)[8], int key) {
    #pragma unroll
    for (int part = 0; part < SPLIT; part++)
        *(uint4*)(lines + line_offset(line, part * (CHUNK_CHANNELS / 8) + group, key)) = take_halves(v, part);
}
""",
    "gradient_bound.cuh": r"""#pragma once
#include "batch_norm.cuh"
#include "fp16_scale.cuh"

struct GradientBound {
    float bound, means;

    __device__ explicit GradientBound(float largest) : bound(largest), means(0) {}
    __device__ GradientBound(float largest, float mean_g, float mean_dot, float count, float mean, float invstd)
        : GradientBound(largest) {
        Normaliser normalise(mean, invstd);
        means = fabsf(mean_g) + fabsf(mean_dot) + fabsf(normalise.mean);
        bound += fabsf(mean_g) + (sqrtf(count) + fabsf(normalise.mean * normalise.invstd)) * fabsf(mean_dot);
    }
    __device__ int exponent(float scale) const {
        if (!(bound > 0) || !is_finite(scale) || !is_finite(means)) return 126;
        const unsigned largest = 0x7F7FFFFF;
        unsigned v = finite_magnitude(bound), dy = finite_magnitude(multiply_unflushed(bound, fabsf(scale)));
        int e = min(126, 112 + scale_exponent(v ? v : largest));
        return scale != 0 ? min(e, scale_exponent(dy ? dy : largest)) : e;
    }
};
""",
    "implicit_gemm.cuh": r"""#pragma once
#include "common.cuh"
#include "async_copy.cuh"
#include "fp16_tiles.cuh"
#include "mma.cuh"
#include "pooled_planes.cuh"

#define TAPS (KERNEL_H * KERNEL_W)
#define PRODUCERS (WGMMA ? 128 : 0)
#define CONSUMERS (THREADS - PRODUCERS)
#define WARPS_M (TILE_M / 64)
#define PASS_WINDOWS (4 * TILES * WARPS_N)
#define MOST_TILES (TILES > LAST_TILES ? TILES : LAST_TILES)
static_assert(
    TILE_M == 64 * WARPS_M && CONSUMERS == (WGMMA ? 128 : 32) * WARPS_M * WARPS_N,
    "a warp or warpgroup has 64 channels");
static_assert(GAP >= 0 && GAP >= KERNEL_W - 1 - PAD_W, "a tap left or right of the image reads the gap");

enum { GUESS = 10, SLACK = 6 };

__device__ constexpr int first_row_of(int window) { return window / WINDOW_PITCH * 2 + PAD_H - (KERNEL_H - 1); }
__device__ constexpr int end_row_of(int window) { return window / WINDOW_PITCH * 2 + 1 + PAD_H + 1; }

__device__ constexpr int passes_of(int windows) {
    enum { LARGER = (MOST_TILES - TILES) * 4 * WARPS_N };
    return LARGER >= windows ? 1 : (windows - LARGER + PASS_WINDOWS - 1) / PASS_WINDOWS;
}

__device__ constexpr bool has_last_tiles(int left, bool last) {
    return LAST_TILES < TILES ? left <= 4 * LAST_TILES * WARPS_N : LAST_TILES > TILES && last && left > PASS_WINDOWS;
}

struct Unit {
    i64 image;
    int number, first_window, end_window, passes, first_row, end_row;

    __device__ explicit Unit(i64 block) {
        image = block / UNITS;
        number = block % UNITS;
        first_window = number * UNIT_WINDOWS;
        end_window = min(first_window + UNIT_WINDOWS, WINDOWS_H * WINDOW_PITCH) - (WINDOW_PITCH - WINDOWS_W);
        passes = passes_of(end_window - first_window);
        first_row = max(0, first_row_of(first_window));
        end_row = min(IN_H, end_row_of(end_window - 1));
    }
    __device__ i64 of_all() const { return image * UNITS + number; }
};

__device__ inline int lane_window(int quad, int t, int tiles) { return ADJACENT ? quad * tiles + t : t * 4 + quad; }

struct Pixel {
    int oh, ow;
    __device__ Pixel(int window, int corner)
        : oh(window / WINDOW_PITCH * 2 + corner / 2), ow(window % WINDOW_PITCH * 2 + corner % 2) {}
    __device__ bool valid() const { return (OUT_H % 2 == 0 || oh < OUT_H) && (OUT_W % 2 == 0 || ow < OUT_W); }
};

struct Place {
    i64 image;
    int channel, first_window, end_window, tiles, unit;

    __device__ int window(int t) const { return first_window + lane_window(threadIdx.x % 4, t, tiles); }
    __device__ bool exists(int t) const {
        return t < tiles && window(t) < end_window &&
               (WINDOW_PITCH == WINDOWS_W || window(t) % WINDOW_PITCH < WINDOWS_W);
    }
    __device__ bool inside(int t, int corner) const { return Pixel(window(t), corner).valid(); }
    __device__ bool full() const {
        return !WGMMA && OUT_H % 2 == 0 && OUT_W % 2 == 0 && tiles == TILES && first_window + TILES * 4 <= end_window;
    }
    __device__ int count() const { return min(tiles * 4, end_window - first_window); }
};

template <int STEP_BYTES, int STEPS> struct WeightRing {
    u8* ring;
    const u8* weights;
    int from = 0;

    __device__ WeightRing(u8* ring, const half_t* packed)
        : ring(ring), weights((const u8*)packed + (i64)blockIdx.y * STEPS * STEP_BYTES) {}
    __device__ static int next(int stage) { return stage + STEP_BYTES == STAGES * STEP_BYTES ? 0 : stage + STEP_BYTES; }
    __device__ static int previous(int stage) { return stage ? stage - STEP_BYTES : (STAGES - 1) * STEP_BYTES; }

    __device__ __forceinline__ void fetch(int stage, int first = threadIdx.x * 16) {
        u8* to = ring + stage + first;
        const u8* mine = weights + (from + first);
        #pragma unroll
        for (int at = 0; at < STEP_BYTES; at += CONSUMERS * 16)
            if (STEP_BYTES % (CONSUMERS * 16) == 0 || at + first < STEP_BYTES) cp_async_16(to + at, mine + at, true);
        from = from + STEP_BYTES == STEPS * STEP_BYTES ? 0 : from + STEP_BYTES;
        cp_async_commit();
    }
};

__device__ inline bool agreed(bool condition) { return __all_sync(0xFFFFFFFFu, condition); }
__device__ inline int same_in_warp(int v) { return __shfl_sync(0xFFFFFFFFu, v, 0); }

#if WGMMA
#include "conv_wgmma.cuh"
#else
#include "conv_mma.cuh"
struct Barriers {};
__device__ inline void sync_consumers() { __syncthreads(); }
#endif

struct Scratch {
    unsigned warps[32];
    Barriers barriers;
};

template <class Epilogue>
__device__ __forceinline__ void multiply_passes(const Unit& unit, MainLoop& loop, int exponent, Epilogue& epilogue) {
    for (int turn = 0; agreed(turn < unit.passes); turn++) {
        int start = unit.first_window + turn * PASS_WINDOWS, left = unit.end_window - start;
        bool last = has_last_tiles(left, turn == unit.passes - 1);
        int tiles = last ? LAST_TILES : TILES, first_window = start + loop.warp_n * (tiles * 4);
        Sums sums = {};
        if (last) loop.turn<LAST_TILES>(sums, turn, first_window);
        else loop.turn<TILES>(sums, turn, first_window);
        Place place = {unit.image, loop.channel(), first_window, unit.end_window, tiles, unit.number};
        epilogue.turn(sums, place, exponent);
    }
}

template <class Epilogue>
__device__ inline void convolve(
    const input_t* x, const int* x_exponents, int x_exponent_count, const half_t* packed, i64 units, u8* shared,
    Scratch& scratch, Epilogue& epilogue) {
#if WGMMA
    clear_border(shared);
    if (threadIdx.x == 0) scratch.barriers.init();
    fence_async_proxy();
    __syncthreads();
    Unit unit(units * blockIdx.x / gridDim.x);
    Rows band(x, x_exponents, x_exponent_count, unit, units * (blockIdx.x + 1) / gridDim.x, shared, scratch.barriers);
    if (threadIdx.x >= CONSUMERS) {
        fewer_registers<PRODUCER_REGISTERS>();
        return run<true>(unit, band, band, scratch.warps, epilogue);
    }
    more_registers<CONSUMER_REGISTERS>();
    MainLoop loop(unit, band, packed, shared);
    run<false>(unit, band, loop, scratch.warps, epilogue);
#else
    Unit unit(blockIdx.x);
    Rows band(x, x_exponents, x_exponent_count, unit, shared);
    MainLoop loop(unit, band, packed, shared);
    band.begin(scratch.warps);
    multiply_passes(unit, loop, band.exponent, epilogue);
    epilogue.finish(band.exponent, blockIdx.x);
#endif
}
""",
    "mbarrier.cuh": r"""#pragma once

struct MBarrier { unsigned long long state; };

__device__ inline void mbarrier_init(MBarrier& barrier, int arrivals) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
    unsigned at = (unsigned)__cvta_generic_to_shared(&barrier);
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(at), "r"(arrivals) : "memory");
#endif
}

__device__ inline void mbarrier_arrive(MBarrier& barrier, int bytes = 0) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
    unsigned at = (unsigned)__cvta_generic_to_shared(&barrier);
    if (bytes) asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(at), "r"(bytes) : "memory");
    else asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(at) : "memory");
#endif
}

__device__ inline void mbarrier_wait(MBarrier& barrier, int parity) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
    unsigned at = (unsigned)__cvta_generic_to_shared(&barrier);
    asm volatile(
        "{.reg .pred ended; again: mbarrier.try_wait.parity.shared::cta.b64 ended, [%0], %1; @!ended bra again;}" ::"r"(
            at),
        "r"(parity)
        : "memory");
#endif
}

__device__ inline void bulk_copy(void* shared, const void* global, int bytes, MBarrier& barrier) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
    unsigned to = (unsigned)__cvta_generic_to_shared(shared), at = (unsigned)__cvta_generic_to_shared(&barrier);
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(to),
        "l"(global), "r"(bytes), "r"(at)
        : "memory");
#endif
}

template <int REGISTERS> __device__ __forceinline__ void fewer_registers() {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(REGISTERS));
#endif
}
template <int REGISTERS> __device__ __forceinline__ void more_registers() {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(REGISTERS));
#endif
}
""",
    "mma.cuh": r"""#pragma once

__device__ inline void ldmatrix_x4(unsigned (&r)[4], unsigned address) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
        : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
        : "r"(address)
        : "memory");
}

UNCHECKED __device__ inline void ldmatrix_x4(unsigned (&r)[4], const void* row) {
    ldmatrix_x4(r, (unsigned)__cvta_generic_to_shared(row));
}

UNCHECKED __device__ inline void ldmatrix_x4_transposed(unsigned (&r)[4], const void* row) {
    unsigned address = (unsigned)__cvta_generic_to_shared(row);
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
        : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
        : "r"(address)
        : "memory");
}

UNCHECKED __device__ inline unsigned movmatrix(unsigned row) {
    unsigned column = 0;
    asm("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(column) : "r"(row));
    return column;
}

template <class T> struct IsBf16 {
    enum { VALUE = 0 };
};
template <> struct IsBf16<bf16_t> {
    enum { VALUE = 1 };
};
#define MMA_M16N8K16(type) \
    asm("mma.sync.aligned.m16n8k16.row.col.f32." type "." type \
        ".f32 " \
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};" \
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3]) \
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1))
template <class T = half_t> UNCHECKED __device__ __forceinline__ void mma_m16n8k16(
    float (&c)[4], const unsigned (&a)[4], const unsigned b0, const unsigned b1) {
    if constexpr (IsBf16<T>::VALUE) MMA_M16N8K16("bf16");
    else MMA_M16N8K16("f16");
}
""",
    "pack_tile.cuh": r"""#pragma once
#include "fp16_tiles.cuh"

template <class T, int W> struct ToPack {
    enum { GROUPS_OF_LINE = CHUNK_CHANNELS / 8, TILE_PIXELS = THREADS / GROUPS_OF_LINE * W };

    const T* source;
    const int* exponents;
    const T* sums;
    half_t* packed;
    int exponent_count, channels, pixels;

    __device__ void pack(i64 first, int end, int chunk, uint4 (&tile)[TILE_PIXELS * 8], unsigned* scratch) const {
        typedef Packed<T, W> Pack;
        Divisor by_image(pixels);
        int group = threadIdx.x / (THREADS / GROUPS_OF_LINE), place = threadIdx.x % (THREADS / GROUPS_OF_LINE),
            first_channel = chunk * CHUNK_CHANNELS + group * 8,
            chunks = (channels + CHUNK_CHANNELS - 1) / CHUNK_CHANNELS;
        Pack in[8] = {};
        if (first + place * W < end && first_channel < channels) {
            unsigned pixel, image = by_image.divide((unsigned)(first + place * W), pixel);
            const T* from = source + ((i64)image * channels + first_channel) * pixels + pixel;
            #pragma unroll
            for (int j = 0; j < 8; j++) in[j] = *(const Pack*)(from + (i64)j * pixels);
        }
        float scale = power_of_two(centred_exponent(sums, smallest_exponent(exponents, exponent_count, scratch))),
              centres[8];
        #pragma unroll
        for (int j = 0; j < 8; j++) centres[j] = first_channel < channels ? centre(sums, first_channel + j, pixels) : 0;
        #pragma unroll
        for (int k = 0; k < W; k++) {
            float v[8];
            #pragma unroll
            for (int j = 0; j < 8; j++)
                v[j] = multiply_unflushed(add_unflushed(to_acc(in[j].v[k]), -centres[j]), scale);
            #pragma unroll
            for (int part = 0; part < SPLIT; part++)
                tile[(place * W + k) * 8 + ((part * GROUPS_OF_LINE + group) ^ (place & 7))] = take_halves(v, part);
        }
        __syncthreads();
        #pragma unroll
        for (int i = threadIdx.x; i < TILE_PIXELS * 8; i += THREADS) {
            int line = i / 8, part = i % 8;
            if (first + line >= end) break;
            unsigned pixel, image = by_image.divide((unsigned)(first + line), pixel);
            ((uint4*)packed)[(((i64)image * chunks + chunk) * pixels + pixel) * 8 + part] =
                tile[line * 8 + (part ^ (line / W & 7))];
        }
    }
};
""",
    "pack_weight_fp16.cu": r"""#include "common.cuh"
#include "fp16_tiles.cuh"

extern "C" __global__ void pack_weight_fp16(
    const scalar_t* __restrict__ w, const scalar_t* __restrict__ signs, half_t* __restrict__ packed,
    int* __restrict__ exponents, float* __restrict__ copied_signs) {
    wait_for_earlier_kernels();
    __shared__ unsigned scratch[32];
    int m = blockIdx.x;
    unsigned largest = 0;
    if (m < OUT_CHANNELS && !AS_IT_IS)
        for (int i = threadIdx.x; i < IN_CHANNELS * TAPS; i += blockDim.x) {
            int k = i / TAPS, tap = i % TAPS;
            largest =
                max(largest, finite_magnitude(to_acc(
                                 w[FLIP ? (m * IN_CHANNELS + k) * TAPS + tap : (k * OUT_CHANNELS + m) * TAPS + tap])));
        }
    largest = block_max(largest, scratch);
    int exponent = AS_IT_IS ? 0 : scale_exponent(largest);
    float scale = power_of_two(exponent) * (signs && m < OUT_CHANNELS && to_acc(signs[m]) < 0 ? -1 : 1);
    if (threadIdx.x == 0) {
        exponents[m] = exponent;
        if (copied_signs) copied_signs[m] = m < OUT_CHANNELS ? to_acc(signs[m]) : 0;
    }
    enum { GROUPS_K = PACKED_WIDTH / SPLIT / 8 };
    static_assert(
        GROUPS_K * 8 * SPLIT == PACKED_WIDTH && GROUPS_K * 8 >= IN_CHANNELS &&
            GROUPS_K % (WGMMA ? 4 : CHUNK_CHANNELS / 8) == 0,
        "a packed row holds all channels");
    for (int i = threadIdx.x; i < GROUPS_K * TAPS; i += blockDim.x) {
        int group = i % GROUPS_K, tap = i / GROUPS_K;
        float v[8];
        #pragma unroll
        for (int j = 0; j < 8; j++) {
            int k = group * 8 + j;
            int from = FLIP ? (m * IN_CHANNELS + k) * TAPS + TAPS - 1 - tap : (k * OUT_CHANNELS + m) * TAPS + tap;
            v[j] = m < OUT_CHANNELS && k < IN_CHANNELS ? multiply_unflushed(to_acc(w[from]), scale) : 0;
        }
        enum { OCTETS = CHUNK_CHANNELS / 8 };
        int chunk = group / OCTETS;
        if (WGMMA) {
            int steps = min((int)OCTETS, GROUPS_K - chunk * OCTETS) / 4;
            i64 step = ((i64)(m / TILE_M) * GROUPS_K + chunk * OCTETS) / 4 * TAPS + tap * steps + group % OCTETS / 4;
            #pragma unroll
            for (int part = 0; part < SPLIT; part++)
                ((uint4*)packed)[((step * SPLIT + part) * 4 + group % 4) * TILE_M + m % TILE_M] = take_halves(v, part);
            continue;
        }
        u8* stage = (u8*)packed + (((i64)(m / TILE_M) * CHUNKS + chunk) * TAPS + tap) * STAGE_BYTES;
        store_line(stage, m % TILE_M, group % OCTETS, v, m & 7);
    }
}
""",
    "pooled_planes.cuh": r"""#pragma once

#define WINDOWS_H ((OUT_H + 1) / 2)
#define WINDOWS_W ((OUT_W + 1) / 2)
#define WINDOWS (WINDOWS_H * WINDOWS_W)
static_assert(
    WGMMA ? WINDOW_PITCH >= WINDOWS_W && UNIT_WINDOWS % WINDOW_PITCH == 0 : WINDOW_PITCH == WINDOWS_W,
    "rows of windows");
static_assert(
    (UNITS - 1) * UNIT_WINDOWS < WINDOWS_H * WINDOW_PITCH && WINDOWS_H * WINDOW_PITCH <= UNITS * UNIT_WINDOWS,
    "units make a plane");
static_assert(!WGMMA || (UNIT_STRIDE >= UNIT_WINDOWS && UNIT_STRIDE % 16 == 0), "windows change places 16 at a time");
static_assert(
    PLANE_STRIDE % (WGMMA ? 16 : 4) == 0 &&
        PLANE_STRIDE >= WINDOWS_H * WINDOW_PITCH + (UNITS - 1) * (WGMMA ? UNIT_STRIDE - UNIT_WINDOWS : 0),
    "a plane has room for its windows");

__device__ inline int unit_of_window(int row, int column) {
    if (UNITS == 1) return 0;
    return WGMMA ? row / (UNIT_WINDOWS / WINDOW_PITCH) : (row * WINDOW_PITCH + column) / UNIT_WINDOWS;
}

template <int TOGETHER> __device__ inline int place_of_window(int row, int column) {
    if (!WGMMA) return row * WINDOW_PITCH + column;
    int unit = unit_of_window(row, column), window = row * WINDOW_PITCH + column - unit * UNIT_WINDOWS;
    int lane = window & 3, tile = window >> 2 & 3;
    return unit * UNIT_STRIDE + (window & ~15) + tile / TOGETHER * (4 * TOGETHER) + lane * TOGETHER + tile % TOGETHER;
}

enum { TOGETHER_POOLED = 4 };
template <class T> __device__ constexpr int together_saved() { return 4 / sizeof(T); }
""",
    "pooled_tail.cu": r"""#include "pooled_tail.cuh"

extern "C" __global__ void __launch_bounds__(THREADS) conv_bn_statistics(
    const float* __restrict__ partials, const param_t* __restrict__ conv_bias, INOUT param_t* running_mean,
    INOUT param_t* running_var, INOUT i64* batches, float* __restrict__ mean, float* __restrict__ invstd,
    float momentum, float eps, int channels, i64 units) {
    wait_for_earlier_kernels();
    __shared__ float scratch[32];
    int c = blockIdx.x;
    const float *counts = partials + c * units, *means = counts + channels * units, *squares = means + channels * units;
    float unit = 1, origin, count, total, m2;
    do {
        origin = finite_or_zero(means[0]) * unit;
        count = total = m2 = 0;
        for (i64 i = threadIdx.x; i < units; i += blockDim.x)
            count += counts[i], total += counts[i] * (means[i] * unit - origin);
        count = block_sum(count, scratch);
        total = block_sum(total, scratch) / count;
        for (i64 i = threadIdx.x; i < units; i += blockDim.x) {
            float distance = means[i] * unit - origin - total;
            double square = squares[i] < 0 ? squares[i] * -0x1p160 : squares[i];
            m2 += (float)(square * unit * unit) + counts[i] * distance * distance;
        }
        m2 = block_sum(m2, scratch);
    } while (again(m2, unit));
    if (threadIdx.x) return;
    if (batches && c == 0) ++*batches;
    if (running_mean) running_mean += c, running_var += c;
    store_statistics(
        {total + origin, m2}, unit, count, eps, mean + c, invstd + c, running_mean, running_var, momentum,
        bn_bias(conv_bias, c));
}

extern "C" __global__ void __launch_bounds__(32 * WARPS) pooled_forward(
    const pooled_t* __restrict__ pooled, const int* __restrict__ exponents, const int* __restrict__ unit_exponents,
    INOUT float* __restrict__ mean, INOUT float* __restrict__ invstd, const param_t* __restrict__ conv_bias,
    const param_t* __restrict__ running_mean, const param_t* __restrict__ running_var,
    const param_t* __restrict__ weight, const param_t* __restrict__ bias, const param_t* __restrict__ group_weight,
    const param_t* __restrict__ group_bias, scalar_t* __restrict__ out, float* __restrict__ group_mean,
    float* __restrict__ group_invstd, float eps, float group_eps, float parameter) {
    wait_for_earlier_kernels();
    __shared__ float means[JOBS], squares[JOBS];
    __shared__ float running[2][STATISTICS ? 1 : MEMBERS];
    __shared__ __align__(16) scalar_t turned[TURNED ? PLANE * TURN_PITCH : 1];
    Activation activation(parameter);
    int lane = threadIdx.x % 32, channel = blockIdx.x % GROUPS * MEMBERS;
    scalar_t* to = out + start_of_block(channel);
    __shared__ Pooled::Places places;
    Pooled source(pooled, exponents, unit_exponents, channel, places);
    float values[UNROLLED][ITEMS];
    const float *channel_mean = STATISTICS ? mean + channel : running[0],
                *channel_invstd = STATISTICS ? invstd + channel : running[1];
    if (RESIDENT)
        #pragma unroll
        for (int round = 0; round < UNROLLED; round++) {
            Job job(round);
            if (job.exists()) source.load(job, values[round]);
        }
    if (!STATISTICS) {
        for (int m = threadIdx.x; m < MEMBERS; m += blockDim.x) {
            int c = channel + m;
            running[0][m] = to_acc(running_mean[c]) - bn_bias(conv_bias, c);
            running[1][m] = 1 / sqrt(to_acc(running_var[c]) + eps);
            if (blockIdx.x < GROUPS) mean[c] = running[0][m], invstd[c] = running[1][m];
        }
        __syncthreads();
    }
    auto activate = [&](const Job& job, float (&v)[ITEMS]) {
        Norm norm(channel_mean[job.member], channel_invstd[job.member], weight, bias, channel + job.member);
        if (!RESIDENT) source.load(job, v);
        #pragma unroll
        for (int i = 0; i < ITEMS; i++) v[i] = activation.of(norm(v[i]));
    };
    #pragma unroll UNROLLED
    for (int round = 0; round < ROUNDS; round++) {
        Job job(round);
        if (!job.exists()) continue;
        float (&v)[ITEMS] = values[RESIDENT ? round : 0];
        activate(job, v);
        float m = 0, s = 0;
        #pragma unroll
        for (int i = 0; i < ITEMS; i++) m += job.inside(i) ? v[i] : 0;
        m = warp_sum(m) / values_in(job.number);
        #pragma unroll
        for (int i = 0; i < ITEMS; i++) s += job.inside(i) ? (v[i] - m) * (v[i] - m) : 0;
        s = warp_sum(s);
        if (lane == 0) means[job.number] = m, squares[job.number] = s;
    }
    __syncthreads();
    float m = 0, s = 0;
    for (int j = lane; j < JOBS; j += 32) m += means[j] * values_in(j);
    m = warp_sum(m) / SIZE;
    for (int j = lane; j < JOBS; j += 32) s += squares[j] + (means[j] - m) * (means[j] - m) * values_in(j);
    s = 1 / sqrt(warp_sum(s) / SIZE + group_eps);
    if (threadIdx.x == 0) group_mean[blockIdx.x] = m, group_invstd[blockIdx.x] = s;
    #pragma unroll UNROLLED
    for (int round = 0; round < ROUNDS; round++) {
        Job job(round);
        if (!job.exists()) continue;
        float (&v)[ITEMS] = values[RESIDENT ? round : 0];
        if (!RESIDENT) activate(job, v);
        float w = bn_weight(group_weight, channel + job.member), b = bn_bias(group_bias, channel + job.member);
        #pragma unroll
        for (int i = 0; i < ITEMS; i++) v[i] = bn_affine((v[i] - m) * s, w, b);
        job.store(TURNED ? turned : to, v);
    }
    if (TURNED) {
        __syncthreads();
        enum { AT_ONCE = TURNED_TOGETHER == 2 && MEMBERS % 8 == 0 && OUT_CHANNELS % 8 == 0 ? 8 : TURNED_TOGETHER };
        for_turned<AT_ONCE>([&](int at, int outside) {
            Packed<Together, AT_ONCE / TURNED_TOGETHER> together;
            #pragma unroll
            for (int i = 0; i < AT_ONCE / TURNED_TOGETHER; i++)
                together.v[i] = *(const Together*)(turned + at + i * TURNED_TOGETHER);
            store_at_once(to + outside, *(const Packed<scalar_t, AT_ONCE>*)&together);
        });
    }
}
""",
    "pooled_tail.cuh": r"""#pragma once
#include "activation.cuh"
#include "batch_norm.cuh"
#include "fp16_scale.cuh"
#include "pooled_planes.cuh"

#define POOLED_W (OUT_W / 2)
#define PLANE (OUT_H / 2 * POOLED_W)
#define MEMBERS (OUT_CHANNELS / GROUPS)
#define ITEMS ((PLANE + PARTS * 32 - 1) / (PARTS * 32))
static_assert(ITEMS <= 10, "a lane has registers for 10 values of each tensor");
#define JOBS (MEMBERS * PARTS)
#define ROUNDS ((JOBS + WARPS - 1) / WARPS)
#define RESIDENT (ROUNDS * ITEMS <= 24)
#define UNROLLED (RESIDENT ? ROUNDS : 1)
#define SIZE (MEMBERS * PLANE)
#define TURN_PITCH (sizeof(scalar_t) == 2 ? ((MEMBERS + 1) / 2 | 1) * 2 : MEMBERS | 1)
#define TURNED (CHANNELS_LAST && RESIDENT && PLANE * TURN_PITCH * sizeof(scalar_t) <= 40 * 1024)
#define TURNED_TOGETHER (sizeof(scalar_t) == 2 && MEMBERS % 2 == 0 ? 2 : 1)
#define STEP (TURNED ? TURN_PITCH : CHANNELS_LAST ? OUT_CHANNELS : 1)

struct Job {
    int number, member, at, first;

    __device__ explicit Job(int round) {
        number = round * WARPS + threadIdx.x / 32;
        member = number / PARTS;
        at = number % PARTS * (ITEMS * 32) + threadIdx.x % 32;
        first = member * PLANE + at;
    }
    __device__ bool exists() const { return JOBS % WARPS == 0 || number < JOBS; }
    __device__ bool inside(int i) const { return (PARTS == 1 && (i + 1) * 32 <= PLANE) || at + i * 32 < PLANE; }

    __device__ void load(const scalar_t* source, float (&v)[ITEMS]) const {
        source += TURNED ? at * TURN_PITCH + member : CHANNELS_LAST ? at * OUT_CHANNELS + member : first;
        #pragma unroll
        for (int i = 0; i < ITEMS; i++) v[i] = inside(i) ? to_acc(source[i * 32 * STEP]) : 0;
    }
    __device__ void store(scalar_t* to, const float (&v)[ITEMS]) const {
        to += TURNED ? at * TURN_PITCH + member : CHANNELS_LAST ? at * OUT_CHANNELS + member : first;
        #pragma unroll
        for (int i = 0; i < ITEMS; i++)
            if (inside(i)) to[i * 32 * STEP] = from_acc<scalar_t>(v[i]);
    }
};

__device__ inline i64 start_of_block(int channel) {
    return CHANNELS_LAST ? (i64)(blockIdx.x / GROUPS) * PLANE * OUT_CHANNELS + channel : (i64)blockIdx.x * SIZE;
}

template <int AT_ONCE, class F> __device__ inline void for_turned(F visit) {
    for (int i = threadIdx.x; i < SIZE / AT_ONCE; i += 32 * WARPS) {
        int p = i / (MEMBERS / AT_ONCE), member = i % (MEMBERS / AT_ONCE) * AT_ONCE;
        visit(p * TURN_PITCH + member, p * OUT_CHANNELS + member);
    }
}
typedef Packed<scalar_t, TURNED_TOGETHER> Together;

__device__ inline float restoring(int exponent) { return power_of_two(max(-126, min(127, -exponent))); }

struct Pooled {
    typedef unsigned short Places[RESIDENT ? PLANE : 1];
    const pooled_t* source;
    const int *exponents, *unit_exponents;
    const Places& places;

    __device__ Pooled(
        const pooled_t* pooled, const int* exponents, const int* unit_exponents, int channel, Places& places)
        : source(pooled + (i64)blockIdx.x * MEMBERS * PLANE_STRIDE), exponents(exponents + channel),
          unit_exponents(unit_exponents + (i64)(blockIdx.x / GROUPS) * UNITS), places(places) {
        if (!RESIDENT) return;
        for (int p = threadIdx.x; p < PLANE; p += 32 * WARPS) places[p] = place_of(p);
        __syncthreads();
    }
    __device__ static int place_of(int p) { return place_of_window<TOGETHER_POOLED>(p / POOLED_W, p % POOLED_W); }
    __device__ void load(const Job& job, float (&v)[ITEMS]) const {
        enum { SCALED = sizeof(pooled_t) == 2 && !AS_IT_IS };
        const pooled_t* from = source + job.member * PLANE_STRIDE;
        int exponent = SCALED ? exponents[job.member] - SAVED_SHIFT : 0, at = job.at;
        if (SCALED && !RESIDENT) make_opaque(at);
        #pragma unroll
        for (int i = 0; i < ITEMS; i++) {
            int p = at + i * 32;
            v[i] = job.inside(i) ? to_acc(from[RESIDENT ? places[p] : place_of(p)]) : 0;
            if (SCALED && job.inside(i))
                v[i] = multiply_unflushed(
                    v[i], restoring(exponent + unit_exponents[unit_of_window(p / POOLED_W, p % POOLED_W)]));
        }
    }
};

__device__ inline int values_in(int job) { return min(ITEMS * 32, PLANE - job % PARTS * (ITEMS * 32)); }

__device__ inline float warp_sums(float a, float b) {
    bool upper = threadIdx.x & 16;
    float v = (upper ? b : a) + __shfl_xor_sync(0xFFFFFFFFu, upper ? a : b, 16);
    for (int lanes = 8; lanes > 0; lanes >>= 1) v += __shfl_xor_sync(0xFFFFFFFFu, v, lanes);
    return v;
}

struct Norm {
    Normaliser normalise;
    float weight, bias;
    __device__ Norm(float mean, float invstd, const param_t* weights, const param_t* biases, int c)
        : normalise(mean, invstd), weight(bn_weight(weights, c)), bias(bn_bias(biases, c)) {}
    __device__ float operator()(float v) const { return bn_affine(normalise(v), weight, bias); }
};
""",
    "pooled_tail_backward.cu": r"""#define IN_CHANNELS OUT_CHANNELS
#include "conv_output_gradient.cuh"
#include "gradient_bound.cuh"
#include "pack_tile.cuh"

#define PACKING_BLOCKS (OUT_CHANNELS % CHUNK_CHANNELS ? 1 : SPLIT == 1 ? 4 : 3)

enum { SUMS = 5, LARGEST = 4 };

extern "C" __global__ void __launch_bounds__(32 * WARPS) pooled_backward(
    const scalar_t* __restrict__ dout, const pooled_t* __restrict__ pooled, const int* __restrict__ exponents,
    const int* __restrict__ unit_exponents, const float* __restrict__ mean, const float* __restrict__ invstd,
    const param_t* __restrict__ weight, const param_t* __restrict__ bias, const param_t* __restrict__ group_weight,
    const float* __restrict__ group_mean, const float* __restrict__ group_invstd, float* __restrict__ g,
    float* __restrict__ partials, i64 images, float parameter) {
    wait_for_earlier_kernels();
    __shared__ float totals[SUMS][JOBS], weights[JOBS];
    __shared__ __align__(16) scalar_t turned[TURNED ? PLANE * TURN_PITCH : 1];
    Activation activation(parameter);
    int lane = threadIdx.x % 32, channel = blockIdx.x % GROUPS * MEMBERS;
    i64 start = (i64)blockIdx.x * SIZE;
    dout += start_of_block(channel);
    if (TURNED) {
        for_turned<TURNED_TOGETHER>(
            [&](int at, int outside) { *(Together*)(turned + at) = *(const Together*)(dout + outside); });
        __syncthreads();
    }
    float m = group_mean[blockIdx.x], s = group_invstd[blockIdx.x];
    float pools[UNROLLED][ITEMS], gradients[UNROLLED][ITEMS], activated[UNROLLED][ITEMS];
    __shared__ Pooled::Places places;
    Pooled source(pooled, exponents, unit_exponents, channel, places);
    auto load = [&](const Job& job, float (&v)[ITEMS], float (&d)[ITEMS]) {
        source.load(job, v);
        job.load(TURNED ? turned : dout, d);
    };
    if (RESIDENT)
        #pragma unroll
        for (int round = 0; round < UNROLLED; round++) {
            Job job(round);
            if (job.exists()) load(job, pools[round], gradients[round]);
        }
    #pragma unroll UNROLLED
    for (int round = 0; round < ROUNDS; round++) {
        Job job(round);
        if (!job.exists()) continue;
        float (&v)[ITEMS] = pools[RESIDENT ? round : 0], (&d)[ITEMS] = gradients[RESIDENT ? round : 0];
        float (&p)[ITEMS] = activated[RESIDENT ? round : 0];
        if (!RESIDENT) load(job, v, d);
        int c = channel + job.member;
        Norm norm(mean[c], invstd[c], weight, bias, c);
        float sum = 0, dot = 0, w = bn_weight(group_weight, c);
        #pragma unroll
        for (int i = 0; i < ITEMS; i++) {
            p[i] = activation.of(norm(v[i]));
            sum += d[i];
            dot += d[i] * ((p[i] - m) * s);
        }
        sum = warp_sums(sum, dot);
        if (lane % 16 == 0) totals[lane / 16][job.number] = sum;
        if (lane == 0) weights[job.number] = w;
    }
    __syncthreads();
    float mean_d = 0, mean_dot = 0;
    for (int j = lane; j < JOBS; j += 32) mean_d += weights[j] * totals[0][j], mean_dot += weights[j] * totals[1][j];
    float both = warp_sums(mean_d, mean_dot) / SIZE;
    mean_d = __shfl_sync(0xFFFFFFFFu, both, 0);
    mean_dot = __shfl_sync(0xFFFFFFFFu, both, 16);
    #pragma unroll UNROLLED
    for (int round = 0; round < ROUNDS; round++) {
        Job job(round);
        if (!job.exists()) continue;
        float (&v)[ITEMS] = pools[RESIDENT ? round : 0], (&d)[ITEMS] = gradients[RESIDENT ? round : 0];
        float (&p)[ITEMS] = activated[RESIDENT ? round : 0];
        int c = channel + job.member;
        Norm norm(mean[c], invstd[c], weight, bias, c);
        if (!RESIDENT) {
            load(job, v, d);
            #pragma unroll
            for (int i = 0; i < ITEMS; i++) p[i] = activation.of(norm(v[i]));
        }
        float sum = 0, dot = 0, largest = 0, w = weights[job.number], *to = g + start + job.first;
        #pragma unroll
        for (int i = 0; i < ITEMS; i++) {
            if (!job.inside(i)) continue;
            d[i] = s * (w * d[i] - (mean_d + (p[i] - m) * s * mean_dot)) * activation.slope(p[i]);
            to[i * 32] = d[i];
            sum += d[i];
            dot += d[i] * norm.normalise(v[i]);
            largest = fmaxf(largest, fabsf(d[i]));
        }
        sum = warp_sums(sum, dot);
        largest = warp_max(largest);
        if (largest - largest != 0) {
            largest = 0;
            #pragma unroll
            for (int i = 0; i < ITEMS; i++) largest = fmaxf(largest, job.inside(i) ? fabsf(finite_or_zero(d[i])) : 0);
            largest = warp_max(largest);
        }
        if (lane % 16 == 0) totals[2 + lane / 16][job.number] = sum;
        if (lane == 0) totals[LARGEST][job.number] = largest;
    }
    __syncthreads();
    i64 image = blockIdx.x / GROUPS;
    for (int i = threadIdx.x; i < SUMS * MEMBERS; i += 32 * WARPS) {
        int what = i / MEMBERS, member = i % MEMBERS;
        float total = totals[what][member * PARTS];
        for (int part = 1; part < PARTS; part++) {
            float other = totals[what][member * PARTS + part];
            total = what == LARGEST ? fmaxf(total, other) : total + other;
        }
        partials[(what * images + image) * OUT_CHANNELS + channel + member] = total;
    }
}

extern "C" __global__ void __launch_bounds__(THREADS) pooled_parameter_gradients(
    const float* __restrict__ partials, const float* __restrict__ mean, const float* __restrict__ invstd,
    const param_t* __restrict__ weight, float* __restrict__ sums, int* __restrict__ dy_exponents,
    param_t* __restrict__ dweight, param_t* __restrict__ dbias, param_t* __restrict__ dgroup_weight,
    param_t* __restrict__ dgroup_bias, param_t* __restrict__ dconv_bias, i64 images, float count, int training) {
    wait_for_earlier_kernels();
    __shared__ float warps[SUMS][THREADS / 32];
    int c = blockIdx.x;
    float total[SUMS] = {};
    for (i64 image = threadIdx.x; image < images; image += THREADS)
        #pragma unroll
        for (int i = 0; i < SUMS; i++) {
            float v = partials[(i * images + image) * OUT_CHANNELS + c];
            total[i] = i == LARGEST ? fmaxf(total[i], v) : total[i] + v;
        }
    #pragma unroll
    for (int i = 0; i < SUMS; i++) {
        float v = i == LARGEST ? warp_max(total[i]) : warp_sum(total[i]);
        if (threadIdx.x % 32 == 0) warps[i][threadIdx.x / 32] = v;
    }
    __syncthreads();
    if (threadIdx.x) return;
    #pragma unroll
    for (int i = 0; i < SUMS; i++) {
        total[i] = 0;
        for (int w = 0; w < 8; w++) total[i] = i == LARGEST ? fmaxf(total[i], warps[i][w]) : total[i] + warps[i][w];
    }
    float scale = multiply_unflushed(bn_weight(weight, c), invstd[c]);
    sums[c] = total[2], sums[OUT_CHANNELS + c] = total[3];
    if (dgroup_bias) dgroup_bias[c] = from_acc<param_t>(total[0]);
    if (dgroup_weight) dgroup_weight[c] = from_acc<param_t>(total[1]);
    if (dbias) dbias[c] = from_acc<param_t>(total[2]);
    if (dweight) dweight[c] = from_acc<param_t>(total[3]);
    GradientBound bound(total[LARGEST]);
    if (training) bound = {total[LARGEST], total[2] / count, total[3] / count, count, mean[c], invstd[c]};
    if (dconv_bias)
        dconv_bias[c] = from_acc<param_t>(training ? bound.means - bound.means : multiply_unflushed(scale, total[2]));
    dy_exponents[c] = bound.exponent(scale);
}

extern "C" __global__ void __launch_bounds__(THREADS, PACKING_BLOCKS) conv_output_gradient_packed(
    const float* __restrict__ g, const u8* __restrict__ argmax, const saved_t* __restrict__ saved,
    const int* __restrict__ exponents, const int* __restrict__ unit_exponents, const float* __restrict__ mean,
    const float* __restrict__ invstd, const param_t* __restrict__ weight, const float* __restrict__ sums,
    const int* __restrict__ dy_exponents, half_t* __restrict__ packed, float* __restrict__ borders,
    const x_t* __restrict__ x, const x_t* __restrict__ x_sums, half_t* __restrict__ x_packed, int x_exponent_count,
    float count, i64 images, int together) {
    wait_for_earlier_kernels();
    typedef ToPack<x_t, X_WIDTH> X;
    enum { OCTETS = CHUNK_CHANNELS / 8, X_PIXELS = IN_H * IN_W };
    static_assert(TILE * OCTETS == THREADS, "a thread computes eight channels of a window");
    static_assert(BORDER_BLOCKS * (THREADS / 128) == OUT_CHANNELS, "128 threads sum up a channel's borders");
    struct __align__(16) Channel {
        OutputGradient gradient;
        int exponent;
    };
    __shared__ __align__(16) u8 corners[4][TILE * LINE_BYTES];
    __shared__ __align__(16) u8 channels[CHUNK_CHANNELS * sizeof(Channel)];
    static_assert(sizeof(corners) >= THREADS / 128 * sizeof(BorderSums), "each block needs only one of them");
    static_assert(sizeof(corners) >= sizeof(uint4[X::TILE_PIXELS * 8]), "each block needs only one of them");
    int tiles = (together * WINDOWS + TILE - 1) / TILE, of_borders = borders ? BORDER_BLOCKS : 0,
        of_dy = of_borders + tiles * CHUNKS, x_tiles = (together * X_PIXELS + X::TILE_PIXELS - 1) / X::TILE_PIXELS,
        of_x = x ? x_tiles * ((X_CHANNELS + CHUNK_CHANNELS - 1) / CHUNK_CHANNELS) : 0,
        share = blockIdx.x / (of_x + of_dy), block = blockIdx.x % (of_x + of_dy), pairs = min(of_x, of_dy),
        lane = threadIdx.x % 32;
    i64 first = (i64)share * together, end = min(first + together, images);
    bool packs = block < 2 * pairs ? block % 2 == 0 : of_x > of_dy;
    block = block < 2 * pairs ? block / 2 : block - pairs;
    if (packs) {
        X to_pack = {x, unit_exponents, x_sums, x_packed, x_exponent_count, X_CHANNELS, X_PIXELS};
        i64 from = first * X_PIXELS + block % x_tiles * X::TILE_PIXELS;
        auto& tile = *(uint4(*)[X::TILE_PIXELS * 8]) corners;
        to_pack.pack(from, (int)end * X_PIXELS, block / x_tiles, tile, (unsigned*)channels);
        return;
    }
    block -= of_borders;
    auto least_exponent = [&] {
        int least = 126;
        #pragma unroll
        for (int i = 0; i < OUT_CHANNELS; i += 32) least = min(least, dy_exponents[min(i + lane, OUT_CHANNELS - 1)]);
        return -warp_max(-least);
    };
    if (block < 0) {
        int c = (block + of_borders) * 2 + threadIdx.x / 128;
        OutputGradient gradient(mean, invstd, weight, sums, c);
        gradient.finish(count, least_exponent());
        BorderSums& sums_of_borders = ((BorderSums*)corners)[threadIdx.x / 128];
        float* to = borders + (i64)share * TAPS * OUT_CHANNELS;
        sum_borders(g, argmax, saved, exponents, unit_exponents, gradient, c, first, end, sums_of_borders, to);
        return;
    }
    int start = block % tiles * TILE, windows = (int)(end - first) * WINDOWS, chunk = block / tiles;
    if (start >= windows) return;
    int warp = threadIdx.x / 32, place = warp / OCTETS * 32 + lane, octet = warp % OCTETS,
        c = chunk * CHUNK_CHANNELS + octet * 8;
    int at = min(start + place, windows - 1);
    i64 image = first + at / WINDOWS;
    bool real = OUT_CHANNELS % CHUNK_CHANNELS == 0 || c < OUT_CHANNELS;

    Kept kept[8] = {};
    float chosen[8] = {};
    Window window(at % WINDOWS);
    int taps[8], exponent = kept_exponent(unit_exponents, image, window);
    if (real) {
        i64 plane = image * OUT_CHANNELS + c;
        const Kept* from = (const Kept*)saved + plane * PLANE_STRIDE + window.saved;
        if (sums)
            #pragma unroll
            for (int j = 0; j < 8; j++) kept[j] = from[j * PLANE_STRIDE];
        const float* g_from = g + plane * PLANE + window.pooled;
        const u8* argmax_from = argmax + (plane * PLANE_STRIDE + window.argmax) / 4;
        if (window.pooled >= 0)
            #pragma unroll
            for (int j = 0; j < 8; j++) chosen[j] = g_from[j * PLANE];
        #pragma unroll
        for (int j = 0; j < 8; j++) taps[j] = argmax_from[j * (PLANE_STRIDE / 4)];
    }
    int own = min(chunk * CHUNK_CHANNELS + (int)threadIdx.x % CHUNK_CHANNELS, OUT_CHANNELS - 1);
    Channel channel = {OutputGradient(mean, invstd, weight, sums, own), SPLIT == 1 ? exponents[own] : 0};
    channel.exponent += channel.gradient.exponent;
    int least = least_exponent();
    if (threadIdx.x < CHUNK_CHANNELS) {
        channel.gradient.finish(count, least);
        ((Channel*)channels)[threadIdx.x] = channel;
    }
    __syncthreads();

    float v[4][8] = {};
    if (real)
        #pragma unroll
        for (int j = 0; j < 8; j++) {
            channel = ((const Channel*)channels)[octet * 8 + j];
            float restore = restoring(channel.exponent + exponent), add = channel.gradient.of_chosen(chosen[j]), y[4];
            unpack(kept[j], y);
            #pragma unroll
            for (int corner = 0; corner < 4; corner++)
                v[corner][j] = channel.gradient.of(y[corner], restore) + (corner == window.chosen(taps[j]) ? add : 0);
        }
    #pragma unroll
    for (int corner = 0; corner < 4; corner++) store_line(corners[corner], place, octet, v[corner], place & 7);
    __syncthreads();

    int right = threadIdx.x / 8 % 2;
    #pragma unroll
    for (int i = 0; i < TILE; i += 16) {
        int w = i + threadIdx.x / 16, at = start + w;
        Window window(at % WINDOWS);
        int column = window.column * 2 + right;
        uint4* to = (uint4*)packed + ((first + at / WINDOWS) * CHUNKS + chunk) * (OUT_H * OUT_W * 8) + threadIdx.x % 8;
        #pragma unroll
        for (int lower = 0; lower < 2; lower++) {
            int h = window.row * 2 + lower;
            if (at < windows && h < OUT_H && column < OUT_W)
                to[(h * OUT_W + column) * 8] =
                    *(const uint4*)(corners[lower * 2 + right] + line_offset(w, threadIdx.x % 8));
        }
    }
}

extern "C" __global__ void __launch_bounds__(THREADS) conv_output_gradient(
    const float* __restrict__ g, const u8* __restrict__ argmax, const saved_t* __restrict__ saved,
    const int* __restrict__ exponents, const int* __restrict__ unit_exponents, const float* __restrict__ mean,
    const float* __restrict__ invstd, const param_t* __restrict__ weight, const float* __restrict__ sums,
    scalar_t* __restrict__ dy, float count) {
    wait_for_earlier_kernels();
    int at = blockIdx.y * blockDim.x + threadIdx.x, c = blockIdx.x % OUT_CHANNELS;
    i64 plane = blockIdx.x;
    if (at >= WINDOWS) return;
    Window window(at);
    OutputGradient gradient(mean, invstd, weight, sums, c);
    gradient.finish(count, 0);
    float restore = restoring(
              gradient.exponent + (SPLIT == 1 ? exponents[c] : 0) +
              kept_exponent(unit_exponents, plane / OUT_CHANNELS, window)),
          v[4];
    gradients_of(gradient, g, argmax, sums ? saved : 0, plane, window, restore, v);
    #pragma unroll
    for (int corner = 0; corner < 4; corner++) {
        int h = window.row * 2 + corner / 2, w = window.column * 2 + corner % 2;
        if (h < OUT_H && w < OUT_W) dy[(plane * OUT_H + h) * OUT_W + w] = from_acc<scalar_t>(v[corner]);
    }
}
""",
    "tanh.cuh": r"""#pragma once
#include "tanh_branchless.cuh"

__device__ inline acc_t tanh_of(acc_t v) {
    acc_t t = sizeof(scalar_t) == 2 ? (acc_t)tanh_branchless((float)v) : tanh(v);
    return fabs(v) < (acc_t)1.17549435e-38f ? v : t;
}

__device__ inline acc_t tanh_slope(acc_t y) { return (acc_t)1 - y * y; }
""",
    "tanh_branchless.cuh": r"""#pragma once
#include "common.cuh"

__device__ inline float exp2_approximate(float v) {
    float r;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(v));
    return r;
}
__device__ inline float reciprocal_approximate(float v) {
    float r;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(v));
    return r;
}

__device__ inline float tanh_branchless(float v) {
    float size = fabsf(v), square = v * v;
    float large = fmaf(-2, reciprocal_approximate(exp2_approximate(size * 2.88539f) + 1), 1);
    float series = ((0.015739683f * square - 0.052303962f) * square + 0.13315298f) * square - 0.33332768f;
    float small = series * square * v + v;
    unsigned sign = __float_as_uint(v) & 0x80000000;
    return size >= 0.6f ? __uint_as_float(__float_as_uint(large) | sign) : small;
}

__device__ inline float tanh_coarse(float v) {
    return fmaf(-2, reciprocal_approximate(exp2_approximate(v * 2.88539f) + 1), 1);
}
""",
    "wgmma.cuh": r"""#pragma once

struct WgmmaOperand {
    unsigned start, stride;
    __device__ WgmmaOperand(const u8* from, int along, int across)
        : start((unsigned)__cvta_generic_to_shared(from) / 16 | along / 16 << 16), stride(across / 16) {}
    __device__ unsigned long long bits() const { return (unsigned long long)stride << 32 | start; }
    __device__ WgmmaOperand moved(int bytes) const {
        WgmmaOperand other = *this;
        other.start += bytes >> 4;
        return other;
    }
};

struct WgmmaLines {
    unsigned start;
    __device__ WgmmaLines(const u8* from, int first_part)
        : start((unsigned)__cvta_generic_to_shared(from) / 16 + first_part) {}
    __device__ unsigned long long bits() const { return (1ull << 30 | 1024 / 16) << 32 | start; }
    __device__ WgmmaLines moved(int bytes) const {
        WgmmaLines other = *this;
        other.start += bytes >> 4;
        return other;
    }
};

#define WGMMA_REGISTERS_1 "%2, %3, %4, %5"
#define WGMMA_REGISTERS_2 WGMMA_REGISTERS_1 ", %6, %7, %8, %9"
#define WGMMA_REGISTERS_3 WGMMA_REGISTERS_2 ", %10, %11, %12, %13"
#define WGMMA_REGISTERS_4 WGMMA_REGISTERS_3 ", %14, %15, %16, %17"
#define WGMMA_REGISTERS_5 WGMMA_REGISTERS_4 ", %18, %19, %20, %21"
#define WGMMA_REGISTERS_6 WGMMA_REGISTERS_5 ", %22, %23, %24, %25"
#define WGMMA_REGISTERS_7 WGMMA_REGISTERS_6 ", %26, %27, %28, %29"
#define WGMMA_REGISTERS_8 WGMMA_REGISTERS_7 ", %30, %31, %32, %33"
#define WGMMA_REGISTERS_9 WGMMA_REGISTERS_8 ", %34, %35, %36, %37"
#define WGMMA_REGISTERS_10 WGMMA_REGISTERS_9 ", %38, %39, %40, %41"
#define WGMMA_REGISTERS_11 WGMMA_REGISTERS_10 ", %42, %43, %44, %45"
#define WGMMA_REGISTERS_12 WGMMA_REGISTERS_11 ", %46, %47, %48, %49"
#define WGMMA_REGISTERS_13 WGMMA_REGISTERS_12 ", %50, %51, %52, %53"
#define WGMMA_REGISTERS_14 WGMMA_REGISTERS_13 ", %54, %55, %56, %57"
#define WGMMA_REGISTERS_15 WGMMA_REGISTERS_14 ", %58, %59, %60, %61"
#define WGMMA_REGISTERS_16 WGMMA_REGISTERS_15 ", %62, %63, %64, %65"
#define WGMMA_REGISTERS_17 WGMMA_REGISTERS_16 ", %66, %67, %68, %69"
#define WGMMA_REGISTERS_18 WGMMA_REGISTERS_17 ", %70, %71, %72, %73"
#define WGMMA_TILE(use, i) use(d[i][0]), use(d[i][1]), use(d[i][2]), use(d[i][3])
#define WGMMA_TILES_1(use) WGMMA_TILE(use, 0)
#define WGMMA_TILES_2(use) WGMMA_TILES_1(use), WGMMA_TILE(use, 1)
#define WGMMA_TILES_3(use) WGMMA_TILES_2(use), WGMMA_TILE(use, 2)
#define WGMMA_TILES_4(use) WGMMA_TILES_3(use), WGMMA_TILE(use, 3)
#define WGMMA_TILES_5(use) WGMMA_TILES_4(use), WGMMA_TILE(use, 4)
#define WGMMA_TILES_6(use) WGMMA_TILES_5(use), WGMMA_TILE(use, 5)
#define WGMMA_TILES_7(use) WGMMA_TILES_6(use), WGMMA_TILE(use, 6)
#define WGMMA_TILES_8(use) WGMMA_TILES_7(use), WGMMA_TILE(use, 7)
#define WGMMA_TILES_9(use) WGMMA_TILES_8(use), WGMMA_TILE(use, 8)
#define WGMMA_TILES_10(use) WGMMA_TILES_9(use), WGMMA_TILE(use, 9)
#define WGMMA_TILES_11(use) WGMMA_TILES_10(use), WGMMA_TILE(use, 10)
#define WGMMA_TILES_12(use) WGMMA_TILES_11(use), WGMMA_TILE(use, 11)
#define WGMMA_TILES_13(use) WGMMA_TILES_12(use), WGMMA_TILE(use, 12)
#define WGMMA_TILES_14(use) WGMMA_TILES_13(use), WGMMA_TILE(use, 13)
#define WGMMA_TILES_15(use) WGMMA_TILES_14(use), WGMMA_TILE(use, 14)
#define WGMMA_TILES_16(use) WGMMA_TILES_15(use), WGMMA_TILE(use, 15)
#define WGMMA_TILES_17(use) WGMMA_TILES_16(use), WGMMA_TILE(use, 16)
#define WGMMA_TILES_18(use) WGMMA_TILES_17(use), WGMMA_TILE(use, 17)
#define WGMMA_ISSUE(tiles, n, equal, use) \
    asm volatile("{.reg .pred accumulate; setp." equal ".u32 accumulate, 0, 0; wgmma.mma_async.sync.aligned.m64n" #n \
                 "k16.f32.f16.f16 {" WGMMA_REGISTERS_##tiles "}, %0, %1, accumulate, 1, 1, 0, 0;}" \
        : "+l"(a_bits), "+l"(b_bits), WGMMA_TILES_##tiles(use));
#define WGMMA_CASE(tiles, n) \
    if constexpr (COUNT == tiles && ACCUMULATE) WGMMA_ISSUE(tiles, n, "eq", "+f") \
    if constexpr (COUNT == tiles && !ACCUMULATE) WGMMA_ISSUE(tiles, n, "ne", "=f")

template <int COUNT, bool ACCUMULATE = true, int MOST> UNCHECKED __device__ __forceinline__ void wgmma(
    float (&d)[MOST][4], const WgmmaOperand& a, const WgmmaOperand& b) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
    unsigned long long a_bits = a.bits(), b_bits = b.bits();
    WGMMA_CASE(1, 8)
    WGMMA_CASE(2, 16)
    WGMMA_CASE(3, 24)
    WGMMA_CASE(4, 32)
    WGMMA_CASE(5, 40)
    WGMMA_CASE(6, 48)
    WGMMA_CASE(7, 56)
    WGMMA_CASE(8, 64)
    WGMMA_CASE(9, 72)
    WGMMA_CASE(10, 80)
    WGMMA_CASE(11, 88)
    WGMMA_CASE(12, 96)
    WGMMA_CASE(13, 104)
    WGMMA_CASE(14, 112)
    WGMMA_CASE(15, 120)
    WGMMA_CASE(16, 128)
    WGMMA_CASE(17, 136)
    WGMMA_CASE(18, 144)
#endif
}

#define WGMMA_ISSUE_FRAGMENT(tiles, n, a0, a1, a2, a3, use) \
    asm volatile("{.reg .pred accumulate; setp.ne.u32 accumulate, %1, 0; wgmma.mma_async.sync.aligned.m64n" #n \
                 "k16.f32.f16.f16 {" WGMMA_REGISTERS_##tiles "}, {%" #a0 ", %" #a1 ", %" #a2 ", %" #a3 \
                                                             "}, %0, accumulate, 1, 1, 1;}" \
        : "+l"(b_bits), "+r"(accumulate), WGMMA_TILES_##tiles(use) \
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]));
#define WGMMA_CASE_FRAGMENT(tiles, n, a0, a1, a2, a3) \
    if constexpr (COUNT == tiles) WGMMA_ISSUE_FRAGMENT(tiles, n, a0, a1, a2, a3, "+f")

template <int COUNT, int MOST>
UNCHECKED __device__ __forceinline__ void wgmma(
    float (&d)[MOST][4], const unsigned (&a)[4], const WgmmaLines& b, int accumulate = 1) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
    unsigned long long b_bits = b.bits();
    WGMMA_CASE_FRAGMENT(1, 8, 6, 7, 8, 9)
    WGMMA_CASE_FRAGMENT(2, 16, 10, 11, 12, 13)
    WGMMA_CASE_FRAGMENT(3, 24, 14, 15, 16, 17)
    WGMMA_CASE_FRAGMENT(4, 32, 18, 19, 20, 21)
    WGMMA_CASE_FRAGMENT(5, 40, 22, 23, 24, 25)
    WGMMA_CASE_FRAGMENT(6, 48, 26, 27, 28, 29)
    WGMMA_CASE_FRAGMENT(7, 56, 30, 31, 32, 33)
    WGMMA_CASE_FRAGMENT(8, 64, 34, 35, 36, 37)
#endif
}

__device__ inline void wgmma_fence() {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
    asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#endif
}

__device__ inline void wgmma_commit() {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
    asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
#endif
}

template <int PENDING_GROUPS> __device__ inline void wgmma_wait() {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(PENDING_GROUPS) : "memory");
#endif
}

template <int COUNT, int MOST> __device__ __forceinline__ void wgmma_arrived(float (&d)[MOST][4]) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
    #pragma unroll
    for (int t = 0; t < COUNT; t++) asm volatile("" : WGMMA_TILE("+f", t)::"memory");
#endif
}

template <int COUNT = 1> __device__ inline void sync_warpgroups(int first) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
    asm volatile("barrier.sync %0, %1;" ::"r"(COUNT == 1 ? 1 + first : 9 + first / 2), "n"(128 * COUNT) : "memory");
#endif
}

__device__ inline void fence_async_proxy() {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
#endif
}
""",
}  # file name: text
IMAGE_SUMS = """
extern "C" __global__ void __launch_bounds__(32) image_sums(const float* x, float* sums, int pixels) {
    double sum = 0;
    for (int i = threadIdx.x; i < pixels; i += 32) sum += x[(size_t)blockIdx.x * pixels + i];
    for (int lanes = 16; lanes; lanes /= 2) sum += __shfl_down_sync(0xFFFFFFFFu, sum, lanes);
    if (threadIdx.x == 0) sums[blockIdx.x] = (float)sum;
}
"""


@functools.cache
def expanded(file: str) -> str:
    """Text of one of KERNELS with every `#include "..."` replaced by that file's text, each file once."""
    files, seen = {**KERNELS, "image_sums.cu": IMAGE_SUMS}, set()

    def included(name):
        known = name[1] in seen
        seen.add(name[1])
        return "" if known else re.sub(r'^#include "(.+)"$', included, files[name[1]], flags=re.MULTILINE)

    return included((None, file))


@functools.cache
def cupy():
    """CuPy, with CUDA 11's libraries loaded first where they are installed as wheels."""
    preload_wheels()
    import cupy

    return cupy


@functools.cache
def module(variant: Variant, device: int):
    """The compiled text of a file, kept on disk by CuPy, unless it is for what CuPy does not compile for."""
    options, nvrtc = (STANDARD, *(f"-D{name}={value}" for name, value in variant.defines)), cupy().cuda.nvrtc
    text = expanded(variant.file)
    capability = cupy().cuda.Device(device).compute_capability
    architecture = variant.architecture or ptx_architecture(capability, nvrtc.getSupportedArchs())
    if not architecture:
        return cupy().RawModule(code=text, options=options)
    program = nvrtc.createProgram(text, variant.file, (), ())
    nvrtc.compileProgram(program, (*options, "-ftz=true", f"-arch={architecture}"))
    with tempfile.NamedTemporaryFile() as code:
        code.write(nvrtc.getPTX(program) if architecture.startswith("compute_") else nvrtc.getCUBIN(program))
        code.flush()
        found = cupy().RawModule(path=code.name)
        found.compile()
    return found


@functools.cache
def function(kernel: Kernel, device: int, shared_bytes: int):
    """A compiled kernel on one device that may have this much shared memory, as CuPy's."""
    found = module(kernel.variant, device).get_function(kernel.name)
    if shared_bytes + found.shared_size_bytes > 48 * 1024:
        found.max_dynamic_shared_size_bytes = shared_bytes
    return found


class Backend:
    """Starts kernels on one GPU, for `Batch`."""

    def __init__(self, device: int | None):
        self.device, self.launch = device, cupy().cuda.driver.launchKernel

    def handle(self, kernel: Kernel, shared_bytes: int) -> int:
        """The compiled kernel."""
        return function(kernel, self.device, shared_bytes).kernel.ptr

    def config(self, step: Step):
        """What starts a kernel that may start while the one before it ends; None for a plain launch."""
        return config(step, function(step.kernel, self.device, step.shared_bytes))

    def start(self, launches, stream: int) -> None:
        """Starts `Packed` launches in a stream."""
        for packed in launches:
            if packed.config is None:
                self.launch(*packed.numbers, stream, packed.parameters, 0)
                continue
            error = packed.config.start(packed.numbers[0], packed.parameters, stream)
            if error:
                raise cupy().cuda.driver.CUDADriverError(error)


def current_stream(device: torch.device) -> int:
    """torch's stream on a GPU. torch.cuda.current_stream takes many times as long."""
    return torch._C._cuda_getCurrentRawStream(device.index)


class Recorded(NamedTuple):
    """What a call of one kind does."""

    made: list[tuple]  # (shape, dtype) of the workspaces' common memory, then of results
    batch: Batch  # the launches
    returned: list[int | None]  # indexes of the results in `made`


class New:
    """Makes stand-ins for the memory of a call: `new(shape, dtype)` for a result, `new.scratch` for a workspace."""

    def __init__(self, first: int):
        self.first, self.scratch_bytes, self.slots = first, 0, []

    def __call__(self, shape, dtype) -> Slot:
        """A result."""
        self.slots.append(Slot(self.first + 1 + len(self.slots), shape, dtype))
        return self.slots[-1]

    def scratch(self, shape, dtype) -> Slot:
        """A part of the memory for workspaces. shape: ints, or one int."""
        slot = Slot(self.first, (shape,) if isinstance(shape, int) else shape, dtype, offset=self.scratch_bytes)
        self.scratch_bytes += -(-slot.nbytes // ALIGNMENT) * ALIGNMENT
        return slot

    def like(self, array: Slot | None) -> Slot | None:
        """A result of another array's shape and dtype; None for None."""
        return None if array is None else self(array.shape, array.dtype)


DTYPES = torch.float32, torch.int64, torch.uint8  # also of num_batches_tracked, and of what a forward keeps
recorded: dict[tuple, Recorded] = {}
launched = []  # in the call that is being recorded


def launch(kernel: Kernel, grid, block, args, shared_bytes: int = 0) -> None:
    """Records a launch. Numbers get the types that the kernel declares."""
    parameters = signature(kernel)
    pairs = zip(parameters, args, strict=True)
    cast = [NULL if arg is None else arg if p.pointer else p.dtype.type(arg) for p, arg in pairs]
    launched.append(Step(kernel, kernel, parameters, grid, block, cast, shared_bytes, False, overlapping(kernel)))


def call(operation, options: tuple, *tensors) -> list:
    """operation(new, *tensors, **dict(options)), with Slots for the tensors, and tensors for the Slots it returns."""
    device = tensors[0].device
    if device.type == "cuda" and device.index != torch._C._cuda_getDevice():
        with torch.cuda.device(device):
            return call(operation, options, *tensors)
    at = [0 if t is None else t.data_ptr() for t in tensors]
    kinds = [t if t is None else (t.shape, t.dtype, t.get_device(), t.is_contiguous()) for t in tensors]
    key = operation, options, *kinds, *[place % 16 for place in at]
    found = recorded.get(key)
    if found is None:
        found = recorded[key] = record(operation, options, tensors, at)
    new = [torch.empty(shape, dtype=dtype, device=device) for shape, dtype in found.made]
    at += [t.data_ptr() for t in new]
    found.batch.start(at, (), current_stream(device))
    return [None if index is None else new[index] for index in found.returned]


def record(operation, options, tensors, at) -> Recorded:
    """What a call does. at: addresses of the tensors. Raises ValueError for tensors that the kernels do not take."""
    device = tensors[0].device
    for tensor in filter(lambda t: t is not None, tensors):
        known = (torch.float32,) if tensor is tensors[0] else DTYPES
        if tensor.device != device or not tensor.is_contiguous() or tensor.dtype not in known:
            raise ValueError(
                f"input, parameters and buffers must be contiguous, float32 and on one device, {device}; received "
                f"{tensor.dtype} on {tensor.device} with shape {tuple(tensor.shape)} and strides {tensor.stride()}"
            )
    launched.clear()
    first, new = len(tensors), New(len(tensors))
    slots = [t if t is None else Slot(i, t.shape, NUMPY[t.dtype], at[i] % 16) for i, t in enumerate(tensors)]
    returned = [slot and slot.index - first for slot in operation(new, *slots, **dict(options))]
    made = [((new.scratch_bytes,), torch.uint8), *((slot.shape, TORCH[slot.dtype]) for slot in new.slots)]
    batch = Batch(Backend(device.index), [(step, step.args) for step in launched], first + len(made))
    return Recorded(made, batch, returned)


def gradients(*_):
    """Refuses shapes whose gradients need other kernels than this file has."""
    raise ValueError("this file has no kernels for the gradients of these shapes on this GPU: use the package")


@functools.cache
def choose(device: torch.device, tf32: bool) -> Choice:
    """How the convolutions of a call multiply. tf32: with TF32's precision, not float32's."""
    gpu = torch.cuda.get_device_properties(device)
    wgmma = (gpu.major, gpu.minor) == (9, 0) and cupy().cuda.nvrtc.getVersion()[0] >= WGMMA_MAJOR
    without = None if gpu.major >= 8 else f"the GPU is sm_{gpu.major}{gpu.minor}, the kernels in this file need sm_80"
    sizes = gpu.shared_memory_per_block_optin, gpu.multi_processor_count
    return Choice("tf32" if tf32 else "fp32", wgmma, *sizes, False, without)


def channel_sum_workspace_size(_) -> int:
    """Of what `channel_sum` needs besides its arguments."""
    return 0


def channel_sum(x: Slot, sums: Slot, _) -> None:
    """Sums of one image [1, C, H, W] over its pixels. The package's kernels for this take any batch."""
    pixels = x.shape[2] * x.shape[3]
    launch(Kernel("image_sums.cu", "image_sums"), (x.shape[1], 1, 1), (32, 1, 1), (x, sums, pixels))


def struct_of(activation: str) -> str:
    """The activation's struct in activation.cuh."""
    return {"tanh": "Tanh"}[activation]


def plan_or_reason(*convolution, **options):
    """(plan, None); raises an error that says why if tensor cores do not take this convolution."""
    return required_plan(*convolution, **options), None


class Fused(torch.autograd.Function):
    """The gradients of all five layers. options: of the forward.

    The forward keeps nothing for the backward, which runs it once more, as activation checkpointing does. So a forward
    launches the same kernels in grad mode as under no_grad. It launches them before autograd's work begins, which then
    takes no time of the GPU: `result` holds its output.
    """

    @staticmethod
    def forward(ctx, x, w, conv_bias, weight, bias, group_weight, group_bias, running, options, result):
        training = dict(options)["training"]  # then the statistics are the batch's, and counted once
        affine = weight, bias, group_weight, group_bias
        ctx.save_for_backward(x, w, conv_bias, *affine, *((None,) * 3 if training else running))
        ctx.options = options
        return result[0]

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dout):
        x, w, conv_bias, weight, bias, group_weight, group_bias, *running = ctx.saved_tensors
        affine = weight, bias, group_weight, group_bias
        _, memory = call(_forward, (*ctx.options, ("keep", True)), x, w, conv_bias, *running, *affine)
        options = [pair for pair in ctx.options if pair[0] in ("setting", "training", "activation", "parameter")]
        options += [("needed", ctx.needs_input_grad[:7])]
        return *call(_backward, tuple(options), dout.contiguous(), x, w, conv_bias, *affine, memory), None, None, None


class Affine(nn.Module):
    """Weight and bias of a norm."""

    def __init__(self, channels: int):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(channels)), nn.Parameter(torch.zeros(channels))


class BatchNorm(Affine):
    """The state of the batch norm."""

    def __init__(self, channels: int):
        super().__init__(channels)
        self.register_buffer("running_mean", torch.zeros(channels))
        self.register_buffer("running_var", torch.ones(channels))
        self.register_buffer("num_batches_tracked", torch.tensor(0))


class ConvTranspose(nn.Module):
    """Weight and bias of the convolution, drawn as the reference draws them."""

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(in_channels, out_channels, kernel_size, kernel_size))
        nn.init.kaiming_uniform_(self.weight, a=math.sqrt(5))
        bound = 1 / math.sqrt(out_channels * kernel_size**2)
        self.bias = nn.Parameter(torch.empty(out_channels).uniform_(-bound, bound))


class ModelNew(nn.Module):
    """The reference's arguments, parameters and buffers, drawn and named as there. `groups` is unused, as there."""

    def __init__(self, in_channels, out_channels, kernel_size, stride, padding, groups, num_groups):
        super().__init__()
        if stride != 1:
            raise ValueError(f"the kernels in this file take stride 1, received {stride}")
        if out_channels % num_groups:
            raise ValueError(f"num_groups must divide the {out_channels} channels, received {num_groups}")
        self.padding, self.num_groups = (padding, padding), num_groups
        self.conv_transpose = ConvTranspose(in_channels, out_channels, kernel_size)
        self.batch_norm = BatchNorm(out_channels)
        self.group_norm = Affine(out_channels)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        # As dicts, because nn.Module takes five times as long to look up an attribute.
        conv, norm, group = self._modules.values()
        w, conv_bias, *affine = *conv._parameters.values(), *norm._parameters.values(), *group._parameters.values()
        x, running = x.contiguous(), tuple(norm._buffers.values())
        choice = choose(x.device, torch.backends.cudnn.allow_tf32)
        options = options_of(self.training, Setting(self.padding, self.num_groups, choice, False, False))
        result = call(_forward, (*options, ("keep", False)), x, w, conv_bias, *running, *affine)
        out = result[0]
        if torch.is_grad_enabled() and any(t.requires_grad for t in (x, w, conv_bias, *affine)):
            out = Fused.apply(x, w, conv_bias, *affine, running, options, result)
        if self.training:
            torch.autograd.graph.increment_version(running)
        return out


@functools.cache
def options_of(training: bool, setting: Setting) -> tuple:
    """Options of `_forward`."""
    return tuple(
        {
            "training": training,
            "setting": setting,
            "momentum": 0.1,
            "eps": 1e-5,
            "group_eps": 1e-5,
            "activation": "tanh",
            "parameter": 0.0,
        }.items()
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
    """[x] of the reference's shape, uniform in [0, 1)."""
    return [torch.rand(batch_size, in_channels, height, width)]


def get_init_inputs():
    """Arguments of ModelNew."""
    return [in_channels, out_channels, kernel_size, stride, padding, groups, num_groups]
