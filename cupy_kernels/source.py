"""Kernel sources: text of a .cu file with its includes expanded, kernel signatures, and the digest of all sources."""

import contextlib
import functools
import hashlib
import re
from importlib import resources
from typing import NamedTuple

import numpy as np

from .errors import KernelCompileError

_FOLDER = resources.files(__package__) / "cu"
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

_overrides: dict[str, str] = {}
_added: dict[str, str] = {}


# Macros of the tensor-core convolution, and of what follows it, that depend on the tensors' shapes and on the GPU's
# shared memory.
SHAPE_MACROS = frozenset(
    ("IN_CHANNELS", "OUT_CHANNELS", "IN_H", "IN_W", "OUT_H", "OUT_W", "KERNEL_H", "KERNEL_W", "TAPS", "PAD_H", "PAD_W")
    + ("WARPS_M", "WARPS_N", "TILE_M", "UNIT_PASSES", "BAND_ROWS", "RESIDENT", "STAGES", "SAVED_SHIFT")
    + ("GROUPS", "WARPS", "UNIT_WINDOWS", "TAPS_W")
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


@contextlib.contextmanager
def override(texts: dict[str, str]):
    """Within the block, `texts` ({file name: text}) stand in place of packaged files of these names, or beside them.

    An edited kernel, or an edited header under all kernels that include it, runs without touching the package, on the
    GPU and in the emulator, in every thread of the process. Compiled kernels are kept by their text, so that entering
    and leaving compiles nothing twice. Blocks nest. `names` and `digest` speak of the packaged files alone.
    """
    before = dict(_overrides)
    _set_overrides({**before, **texts})
    try:
        yield
    finally:
        _set_overrides(before)


def overridden() -> frozenset[str]:
    """Names of the files that `override` has in force."""
    return frozenset(_overrides)


def add(stem: str, text: str) -> str:
    """Adds `text` to the sources for the life of the process, and returns its file name: `stem` and a digest of `text`.

    Texts that differ never share a name, and adding a text again changes nothing. `names` and `digest` speak of the
    packaged files alone.
    """
    file = f"{stem}_{hashlib.sha256(text.encode()).hexdigest()[:8]}.cu"
    _added[file] = text
    return file


def _set_overrides(texts):
    _overrides.clear()
    _overrides.update(texts)
    for cached in (expanded, kernel_names, signature):
        cached.cache_clear()


def names() -> list[str]:
    """File names of the packaged kernel sources, .cu and .cuh, sorted."""
    return sorted(f.name for f in _FOLDER.iterdir() if f.name.endswith((".cu", ".cuh")))


def text(file: str) -> str:
    """Text of one source file as it stands. ValueError if there is no such file."""
    for texts in (_overrides, _added):
        if file in texts:
            return texts[file]
    return _packaged(file)


def _packaged(file):
    if file not in names():
        raise ValueError(f"no kernel source {file!r}; there are {', '.join(names())}")
    return (_FOLDER / file).read_text(encoding="utf-8")


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


@functools.cache
def digest() -> str:
    """SHA-256 over names and texts of all kernel sources: says which code a committed result belongs to."""
    sha = hashlib.sha256()
    for file in names():
        sha.update(f"{file}\0{_packaged(file)}\0".encode())
    return sha.hexdigest()


def compile_error(what: Kernel | Variant, log: str) -> KernelCompileError:
    """The error for a compiler's log: the first message that names a line of a kernel source comes first."""
    for match in re.finditer(r"^([\w.]+)[(:](\d+)\)?[^\n]*error[^\n]*", log, re.MULTILINE):
        file, number = match[1], int(match[2])
        lines = text(file).splitlines() if file in (*_overrides, *_added, *names()) else []
        if number <= len(lines):
            place = f"{match[0]}\n    {number} | {lines[number - 1]}"
            return KernelCompileError(f"{what} does not compile:\n{place}\n\nCompiler log:\n{log}")
    return KernelCompileError(f"{what} does not compile:\n{log}")
