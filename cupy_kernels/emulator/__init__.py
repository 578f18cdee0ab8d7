"""Runs the kernels' text on the CPU: cuda.h stands in for CUDA, a host C++ compiler builds a shared library.

It checks what it can: barriers that diverge, writes outside an array, reads far from all, outputs that are not written,
cp.async read too early. It proves logic, not memory ordering, speed or last-bit rounding.

Environment: CUPY_KERNELS_CXX chooses the compiler; CUPY_KERNELS_CACHE_DIR the folder of compiled kernels (default
~/.cache/cupy_kernels); CUPY_KERNELS_SEED the order in which threads run (0, the default: ascending).
"""

import ctypes
import functools
import hashlib
import importlib.util
import mmap
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from importlib import resources
from pathlib import Path

import numpy as np

from .. import cache, forks
from ..backend import Backend
from ..errors import BackendError, EmulatorError
from ..source import MACROS, Kernel, compile_error, declarations, unit

GUARD_BYTES = 4096
ALIGNMENT = 256  # of arrays, as cudaMalloc has it
POISON = 0xFF
INTEGER_POISON = 0x99
FLAGS = ("-std=c++17", "-O2", "-march=native", "-fPIC", "-shared", "-fno-exceptions", "-fno-rtti", "-w")
FLAGS += ("-fvisibility=hidden",)  # or a kernel named like a function of libc would call that one
ZIG_FLAGS = ("-nostdlib++", "-fno-sanitize=undefined")
STACKS_BYTES = 1024 * (128 << 10)  # MAX_THREADS * STACK_BYTES of cuda.h

# What g++ and clang++ say of a line of the text, and the assembler of one of its own; not of a file they cannot write.
_ERROR_OF_TEXT = re.compile(r":\d+(:\d+)?: (fatal )?[Ee]rror: (?!error (writing|closing) )")

_one_at_a_time = forks.lock()  # the state of a running block is static in its library


@functools.cache
def compiler() -> tuple[str, ...]:
    """Command of the C++ compiler: $CUPY_KERNELS_CXX, the system's, or the ziglang wheel's. BackendError if none."""
    command = os.environ.get("CUPY_KERNELS_CXX", "")
    try:
        chosen = shlex.split(command)
    except ValueError as error:
        raise BackendError(f"CUPY_KERNELS_CXX={command!r} is not a command: {error}") from error
    if chosen:
        if not shutil.which(chosen[0]):
            raise BackendError(
                f"CUPY_KERNELS_CXX={shlex.join(chosen)!r} is not a command: name a C++ compiler, or unset it"
            )
        zig = any("zig" in Path(word).name for word in chosen)
        return (*chosen, *ZIG_FLAGS) if zig else tuple(chosen)
    for name in ("c++", "g++", "clang++"):
        if shutil.which(name):
            return (name,)
    if importlib.util.find_spec("ziglang"):
        return (sys.executable, "-m", "ziglang", "c++", *ZIG_FLAGS)
    raise BackendError(
        "the CPU emulator needs a C++ compiler and found none (c++, g++, clang++, the ziglang wheel): "
        "pip install 'modelnew[emulator]'"
    )


class Emulator(Backend):
    """The CPU."""

    def handle(self, kernel, shared_bytes):
        return getattr(self.compiled(kernel), f"emulator_{kernel.name}")

    def start(self, launches, stream=None):
        for packed in launches:
            _run(packed)

    def _compile(self, kernel, place):
        """The library of all kernels of the file, or of an edited one alone, for the kernel's macros."""
        text, command = _translation_unit(kernel), [*compiler(), *FLAGS]
        key = hashlib.sha256("\0".join([text, *command, *_machine()]).encode()).hexdigest()
        path = cache.entry(f"{Path(kernel.file).stem}_{key[:24]}.so", lambda: _build(kernel, text, command))
        try:
            library = ctypes.CDLL(str(path))
        except OSError as error:
            if "undefined symbol" in str(error):  # the linker lets pass a function that is declared and nobody has
                raise compile_error(kernel, str(error)) from error
            raise cache.unusable(path.parent, f"{error} (made by {shlex.join(compiler())})") from error
        for name in declarations(unit(kernel)):
            getattr(library, f"emulator_{name}").restype = ctypes.c_char_p
        return library


backend = Emulator()


def _run(packed) -> None:
    """Runs a launch, on copies of its arrays between guard zones.

    An array that the kernel declares neither `const` nor `INOUT` is an output: it is poisoned first, and must be
    written in full. Outputs are copied back only if nothing failed.
    Raises EmulatorError for an error that the kernel made.
    """
    function, *_ = packed.numbers
    step, count = packed.step, len(packed.step.parameters)
    words = packed.words[:count].copy()
    arrays = []
    for i, (parameter, arg) in enumerate(zip(step.parameters, step.args)):
        if parameter.pointer and words[i]:
            memory = np.frombuffer((ctypes.c_uint8 * (arg.size * arg.itemsize)).from_address(int(words[i])), arg.dtype)
            buffer = _guarded(memory, parameter)
            words[i] = buffer.ctypes.data + GUARD_BYTES
            arrays.append((parameter, memory, buffer))
    pointers = (ctypes.c_void_p * count)(*(words.ctypes.data + 8 * i for i in range(count)))
    unsigned3 = ctypes.c_uint * 3
    with _one_at_a_time:
        failure = function(
            pointers,
            unsigned3(*step.grid),
            unsigned3(*step.block),
            ctypes.c_size_t(step.shared_bytes),
            ctypes.c_ulonglong(_seed()),
            ctypes.byref(_stacks()),
        )
    for parameter, _, buffer in arrays:
        _check_guards(step.kernel, parameter, buffer)
    if failure:
        raise EmulatorError(f"{step.kernel}: {failure.decode()}")
    for parameter, memory, buffer in arrays:
        if not parameter.const:
            result = buffer[GUARD_BYTES:-GUARD_BYTES].view(memory.dtype)
            if not parameter.inout:
                _check_written(step.kernel, parameter, result)
            memory[...] = result


def _seed() -> int:
    chosen = os.environ.get("CUPY_KERNELS_SEED") or "0"
    if not re.fullmatch("[0-9]+", chosen) or int(chosen) >= 2**64:
        raise BackendError(
            f"CUPY_KERNELS_SEED={chosen!r} is not an integer from 0 to 2**64 - 1: set one, or unset it, which is 0"
        )
    return int(chosen)


def _guarded(array, parameter) -> np.ndarray:
    memory = np.full(array.nbytes + 2 * GUARD_BYTES + ALIGNMENT, POISON, np.uint8)
    start = -memory.ctypes.data % ALIGNMENT
    buffer = memory[start : start + array.nbytes + 2 * GUARD_BYTES]
    inside = buffer[GUARD_BYTES : GUARD_BYTES + array.nbytes]
    inside[...] = array.view(np.uint8) if parameter.const or parameter.inout else _poison(array.dtype)
    return buffer


def _poison(dtype) -> int:
    """What each byte of an output of this type holds before a kernel runs. Integers may well be -1: exponents are."""
    return INTEGER_POISON if dtype in (np.int32, np.int64) else POISON


def _check_guards(kernel, parameter, buffer) -> None:
    for side, guard in (("before", buffer[:GUARD_BYTES]), ("after", buffer[-GUARD_BYTES:])):
        if (guard != POISON).any():
            raise EmulatorError(f"{kernel} writes out of bounds, {side} the array {parameter.name}")


def _check_written(kernel, parameter, result) -> None:
    elements = result.view(np.uint8).reshape(-1, result.itemsize)
    missing = np.flatnonzero((elements == _poison(result.dtype)).all(1))
    if len(missing):
        raise EmulatorError(
            f"{kernel} leaves {len(missing)} of {len(elements)} elements of its output {parameter.name} unwritten, or "
            f"copies memory there that nobody wrote; the first at flat index {missing[0]}"
        )


@functools.cache
def _stacks() -> ctypes.c_char:
    private = mmap.mmap(-1, STACKS_BYTES, mmap.MAP_PRIVATE)  # not shared with the children that a process forks
    return ctypes.c_char.from_buffer(private)


@functools.cache
def _machine() -> tuple[str, ...]:
    """What a library depends on besides its text: a shared home directory serves several kinds of machine."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    cpu = next((line for line in lines if line.startswith(("flags", "Features"))), "")  # -march=native
    return cpu, *platform.libc_ver()


def _translation_unit(kernel: Kernel) -> str:
    header = resources.files(__package__).joinpath("cuda.h").read_text(encoding="utf-8")
    macros = "\n".join(f"#define {k} {v}" for k, v in kernel.defines)  # after the header: -D would reach libc's headers
    entries = "\n".join(_entry(name, parameters) for name, parameters in declarations(unit(kernel)).items())
    return f'{header}\n#line 1 "{MACROS}"\n{macros}\n{unit(kernel)}\n#line 1 "emulator_entries"\n{entries}\n'


def _entry(name, parameters) -> str:
    arguments = (f"emulator::Argument{{arguments[{i}]}}" for i in range(len(parameters)))
    return f"EMULATOR_ENTRY({name}, {', '.join(arguments)})"


def _build(kernel: Kernel, text: str, command: list[str]) -> bytes:
    """The shared library. KernelCompileError if the text does not compile, BackendError for any other failure."""
    try:
        with tempfile.TemporaryDirectory() as scratch:
            source, built = Path(scratch, "kernel.cpp"), Path(scratch, "kernel.so")
            source.write_text(text, encoding="utf-8")
            subprocess.run(
                [*command, str(source), "-o", str(built), "-lm"],
                capture_output=True,
                check=True,
                env={**os.environ, "LC_ALL": "C"},  # messages in English, which are read below
            )
            return built.read_bytes()
    except (OSError, subprocess.CalledProcessError) as error:
        log = (getattr(error, "stderr", None) or b"").decode(errors="replace")
        if _ERROR_OF_TEXT.search(log):
            raise compile_error(kernel, log) from None
        raise BackendError(
            f"the C++ compiler {shlex.join(compiler())} failed, for no error in {kernel}: {error}\n{log}"
            "CUPY_KERNELS_CXX chooses another compiler, TMPDIR the folder that it works in"
        ) from error
