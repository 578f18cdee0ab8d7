"""Runs the kernels' text on the CPU: cuda.h replaces CUDA, and a host C++ compiler builds a shared library.

The emulator looks for bugs; tests/planted_bugs has an example of each: accesses out of bounds or misaligned, races,
barriers and warp operations that not all threads reach, outputs that are not written, reads of uninitialised memory or
of a copy in flight, wgmma without its waits and fences, mbarriers at which too few or too many arrive, and int
overflow. runtime.cpp explains how. It checks logic, not speed or last-bit rounding. It accepts what NVRTC accepts, see
tests/test_dialect.py. Where NVRTC is installed, it compiles edited texts and inline operators as well.

Environment variables:
- CUPY_KERNELS_CXX: the C++ compiler.
- CUPY_KERNELS_CACHE_DIR: the folder of compiled kernels (default ~/.cache/cupy_kernels).
- CUPY_KERNELS_SEED: the order in which threads run (default 0: ascending).
- CUPY_KERNELS_TIMEOUT: seconds that a launch may take (default: no limit). Ctrl-C stops a launch at any time.
"""

import contextlib
import ctypes
import functools
import hashlib
import importlib.util
import json
import math
import os
import platform
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import warnings
from concurrent.futures import ThreadPoolExecutor
from importlib import resources
from pathlib import Path

from .. import cache, forks, nvrtc, source
from ..backend import MAX_SHARED_BYTES, Backend, Room
from ..compile_errors import MACROS, compile_error, excerpt, lines_of
from ..errors import BackendError, EmulatorError, KernelCompileError
from ..parsing import EXTERN_SHARED, bounds, declarations, dynamic_shared
from ..source import Kernel, is_packaged, unit_of_file
from . import elf, lines, messages, variables

FLAGS = ("-std=c++17", "-O2", "-march=native", "-fPIC", "-fno-exceptions", "-fno-rtti")
FLAGS += ("-fvisibility=hidden",)  # or a kernel named like a function of libc would call that one
# A large local array meets the guard page, and does not step over it; one that overflows is seen at the function's end.
FLAGS += ("-fstack-clash-protection", "-fstack-protector-strong")
# What makes the compiler call the runtime: before each access to memory, and where a value is wrong. clang does not for
# accesses of more than 16 bytes, which vectorised loops have. A loop without an end stays one.
CHECKS = ("-fsanitize=thread", "-fsanitize=alignment,bounds,signed-integer-overflow,integer-divide-by-zero")
CHECKS += ("-fsanitize=shift-exponent,return,unreachable,float-cast-overflow",)
CHECKS += ("-fno-tree-vectorize", "-fno-tree-slp-vectorize")
LINES = ("-g", "-gdwarf-4")  # what lines.py and variables.py read
CHECKS += ("-fno-finite-loops", *LINES)
CHECKS += ("-pedantic-errors", "-Wno-narrowing")  # NVRTC knows few of the extensions that host compilers have
# Reads and writes of an array by a pointer that has left it. The package's own kernels do without: it takes time.
CHECKS_OF_EDITS = ("-fsanitize=object-size", "-Wuninitialized")
GCC_CHECKS_OF_EDITS = ("-Wmaybe-uninitialized",)  # clang has -Wconditional-uninitialized in its place
GCC_CHECKS_OF_EDITS += ("--param=tsan-distinguish-volatile=1",)  # __tsan_volatile_read4() and the like
CLANG_CHECKS_OF_EDITS = ("-mllvm", "-tsan-distinguish-volatile=1")
# g++ checks no struct that is passed by value from memory to a function that it does not inline.
GCC_CHECKS_OF_EDITS += tuple(f"--param=max-inline-insns-{kind}=1000" for kind in ("auto", "single", "small"))
CODE = (".text", ".rodata")  # sections of a library
WARNINGS = "cu_warnings"  # the section of a library that has what the compiler warned of
MOST_STATIC_SHARED_BYTES = 48 << 10  # of a kernel, on every GPU
NOT_ON_A_GPU = "a GPU does not run that"  # though NVRTC takes some of it, with a warning
GCC_CHECKS = ("-fno-tree-tail-merge", "-fno-crossjumping")  # what two branches have in common stays two operations
_COUNTER = "-Wno-c2y-extensions"  # __COUNTER__ is one to clang 22
# y[i] += 1 reads, too. What is wrong must not end the process; of pointers into arrays the runtime knows more.
CLANG_CHECKS = ("-mllvm", "-tsan-instrument-read-before-write=1", "-fno-sanitize-trap=all")
CLANG_CHECKS += ("-fno-sanitize=local-bounds", "-Wconditional-uninitialized", "-Wno-format-pedantic")
CLANG_CHECKS += ("-Wno-gnu-inline-cpp-without-extern", _COUNTER)
for _option in ("simplifycfg-hoist-common", "simplifycfg-sink-common", "enable-tail-merge"):
    CLANG_CHECKS += ("-mllvm", f"-{_option}=false")  # as GCC_CHECKS
CLANG_CHECKS += ("-mllvm", "-inline-threshold=1000")  # a header's function that is called has not the caller's line
PRINTED_ALREADY = ("-Dprintf=emulator_printed_already",)
# With these, a second library of an edited text finds accesses before and behind local variables: see locals.cpp.
LOCALS = ("-fsanitize=kernel-address", "-fsanitize-address-use-after-scope", *CHECKS[1:], *PRINTED_ALREADY)
GCC_LOCALS = ("-fasan-shadow-offset=0x1800000000", "-fno-aggressive-loop-optimizations")
GCC_LOCALS += ("--param=asan-instrumentation-with-call-threshold=0", "--param=asan-stack=1", "--param=asan-globals=0")
CLANG_LOCALS = "-asan-mapping-offset=0x1800000000 -asan-instrumentation-with-call-threshold=0 -asan-stack=1"
CLANG_LOCALS = tuple(word for option in (CLANG_LOCALS + " -asan-globals=0").split() for word in ("-mllvm", option))
CLANG_LOCALS += ("-fno-sanitize-trap=all", "-fno-sanitize=bounds")  # for it leaves out accesses by a wrong index
CLANG_LOCALS += (_COUNTER,)
_LOCALS = re.compile(rb"\d+(?: \d+ \d+ \d+ [^ \0]+)+\0")  # what such a library says of a function's local variables
_PATH = re.compile("<([0-9a-f]+,[0-9a-f,]*)>")  # see path_of() of threads.cpp
# What local variables are that nobody sets: a third library of an edited text has others, and memory.cpp compares
# outputs. gcc 12 and clang 16 know these options.
UNSET = "-ftrivial-auto-var-init=pattern"
ZEROS = ("-ftrivial-auto-var-init=zero", *PRINTED_ALREADY)
ZIG_FLAGS = ("-nostdlib++", "-fno-sanitize=undefined")

# What g++ and clang++ say of a line of the text, and the assembler of one of its own; not of a file they cannot write.
_ERROR_OF_TEXT = re.compile(r":\d+(:\d+)?: (fatal )?[Ee]rror: (?!error (writing|closing) )")

_STATIC_SHARED = re.compile(r"\bstatic\s+(?=__shared__\b)|(?<=__shared__)\s+static\b")  # __shared__ stands for static
_ALIGNED_SHARED = re.compile(r"\b__shared__\s+(alignas\([^)]*\))")  # alignas comes first in C++
# What NVRTC does not know, and host compilers take even with -pedantic-errors.
_UNKNOWN = "__int128 _Float16 thread_local throw new __typeof__ __typeof __asm__ __asm _Complex"
_BUILTIN = re.compile(r"\b__(?:builtin|atomic|sync)_\w+")
_KNOWN = {f"__builtin_{name}" for name in ("align__", "assume", "assume_aligned", "expect", "unreachable")}
_KNOWN |= {"__builtin_is_constant_evaluated"}
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
        "python3 -m pip install ziglang"
    )


class _Parameter(ctypes.Structure):
    _fields_ = (("name", ctypes.c_char_p), ("bytes", ctypes.c_uint64), ("item", ctypes.c_uint), ("kind", ctypes.c_int))


class _Variable(ctypes.Structure):
    _fields_ = (
        ("name", ctypes.c_char_p),
        ("address", ctypes.c_uint64),
        ("bytes", ctypes.c_uint64),
        ("shared", ctypes.c_int),
        ("constant", ctypes.c_int),
    )


_Same = ctypes.CFUNCTYPE(ctypes.c_bool, ctypes.c_char_p, ctypes.c_char_p)


class _Launch(ctypes.Structure):
    _fields_ = (
        ("parameters", ctypes.POINTER(_Parameter)),
        ("words", ctypes.c_void_p),
        ("count", ctypes.c_uint),
        ("grid", ctypes.c_uint * 3),
        ("block", ctypes.c_uint * 3),
        ("shared_bytes", ctypes.c_uint64),
        ("seed", ctypes.c_uint64),
        ("variables", ctypes.POINTER(_Variable)),
        ("variable_count", ctypes.c_uint),
        ("cooperative", ctypes.c_bool),
        ("only_locals", ctypes.c_bool),
        ("zeros", ctypes.c_bool),
        ("same", _Same),
    )


class Emulator(Backend):
    """The CPU."""

    unit = staticmethod(unit_of_file)

    def room(self, device):
        return Room(multiprocessors=3, shared_bytes=160 << 10)  # small, so that tensors of a test may be too large

    def handle(self, kernel, shared_bytes):
        return getattr(self.compiled(kernel), f"emulator_{kernel.name}")

    def start(self, launches, stream=None):
        for packed in launches:
            _run(packed)

    def _compile(self, kernel, place):
        """The library of all kernels of the file, or of an edited one alone, for the kernel's macros."""
        _runtime()  # whose functions the library calls
        edited, stem, text = not is_packaged(kernel), Path(kernel.file).stem, _translation_unit(kernel)
        checks = CHECKS + CHECKS_OF_EDITS * edited + (UNSET,) * _fills_locals()
        own, of_edits = (CLANG_CHECKS, CLANG_CHECKS_OF_EDITS) if _is_clang() else (GCC_CHECKS, GCC_CHECKS_OF_EDITS)
        checks += own + of_edits * edited
        locals_checks = LOCALS + (CLANG_LOCALS if _is_clang() else GCC_LOCALS)
        kinds = {"zeros": (*checks, *ZEROS)} if edited and _fills_locals() else {}
        kinds |= {"locals": locals_checks} if edited else {}
        with ThreadPoolExecutor(2) as beside:
            others = {kind: beside.submit(_library, stem, text, kinds[kind], kernel, kind) for kind in kinds}
            try:
                library = _library(stem, text, checks, kernel)
            except KernelCompileError as error:
                raise _refused(kernel, error) from None
        if edited:
            try:
                nvrtc.check(kernel)
            except KernelCompileError as error:
                raise KernelCompileError(f"NVRTC {nvrtc.version()}, which compiles for GPUs: {error}") from None
        built, entries = Path(library._name).read_bytes(), declarations(unit_of_file(kernel))
        found = _entries(library, built, entries)
        for kind, other in others.items():
            other_built = Path(other.result()._name).read_bytes()
            if kind == "locals":
                differs = _LOCALS.search(elf.section(other_built, ".rodata"))
            else:
                differs = any(elf.section(built, name) != elf.section(other_built, name) for name in CODE)
            if differs:
                _entries(other.result(), other_built, entries, kind)
                for name in entries:
                    whole = getattr(library, f"emulator_{name}")
                    whole.runs = (getattr(other.result(), f"emulator_{name}"), *whole.runs)
        shared = [v.bytes for v in found if v.shared]
        needed = sum(shared) if len(entries) == 1 else max(shared, default=0)
        for name in entries:
            getattr(library, f"emulator_{name}").shared_bytes = needed
        if needed > MOST_STATIC_SHARED_BYTES:
            raise KernelCompileError(
                f"{kernel}: its __shared__ variables have {needed} bytes; a GPU takes {MOST_STATIC_SHARED_BYTES} bytes "
                "at most: use smaller ones"
            )
        for said in elf.section(built, WARNINGS).decode().split("\0")[:-1]:
            file, line, what = said.split(":")
            warnings.warn_explicit(what, UserWarning, file, int(line))
        return library


backend = Emulator()


def _entries(library, built, names, kind="so") -> list[elf.Variable]:
    """Tells the functions of a library, whose bytes are `built`, what they return and which variables there are."""
    found = elf.variables(built)
    table = (_Variable * len(found))(*((v.name.encode(), *v[1:]) for v in found))
    same = _Same(lambda path, other: _operation(built, path.decode()) == _operation(built, other.decode()))
    for name in names:
        entry = getattr(library, f"emulator_{name}")
        entry.restype, entry.variables, entry.built = ctypes.c_char_p, table, built
        entry.same, entry.runs, entry.kind = same, (entry,), kind
        entry.bound = getattr(library, f"emulator_bound_{name}", None)
    return found


def _refused(kernel, error) -> KernelCompileError:
    """The error of a text that the emulator's compiler refuses, with what NVRTC says of it."""
    try:
        version = nvrtc.check(kernel)
    except KernelCompileError as of_nvrtc:
        return compile_error(kernel, error.log, f"NVRTC {nvrtc.version()}", of_nvrtc.log)
    takes = f"\nNVRTC {version} takes this text: it can run on a GPU, and not on the emulator"
    return KernelCompileError(f"{error}{takes * bool(version and NOT_ON_A_GPU not in error.log)}")


def _run(packed) -> None:
    """Runs a launch, on copies of its arrays.

    An array that the kernel declares neither `const` nor `INOUT` is an output, and must be written in full, if it is no
    workspace. Outputs are copied back only if nothing failed. Raises EmulatorError for an error that the kernel made,
    KeyboardInterrupt.
    """
    step, limit = packed.step, _limit()
    parameters = (_Parameter * len(step.parameters))()
    for given, parameter, arg in zip(parameters, step.parameters, step.args):
        given.name = parameter.name.encode()
        if parameter.pointer:
            given.bytes, given.item = arg.size * arg.itemsize, arg.itemsize
            given.kind = 1 if parameter.const else 2 if parameter.inout else 3
            given.kind += given.kind == 3 and parameter.name in source.workspaces(step.kernel.file)
    words = packed.words  # made by this, and alive until the kernel ends
    launch = _Launch(parameters, words.ctypes.data, len(parameters), step.grid, step.block, step.shared_bytes)
    launch.seed, launch.cooperative = _seed(), step.cooperative
    whole = packed.numbers[0]
    if refused := _too_large(step, whole):
        raise EmulatorError(f"{step.kernel}: {refused}")
    with _one_at_a_time, _time_limit(limit):
        _runtime().emulator_begin()
        for entry in whole.runs:
            launch.variables, launch.variable_count = entry.variables, len(entry.variables)
            launch.only_locals, launch.zeros, launch.same = entry.kind == "locals", entry.kind == "zeros", entry.same
            if failure := entry(ctypes.byref(launch)):
                break
    if not failure:
        return
    message = f"{step.kernel}: {_readable(failure.decode(), entry.built, step.kernel)}"
    message += messages.of_view(message, {p.name: int(word) for p, word in zip(step.parameters, words) if p.pointer})
    message += messages.of_output(message, [p.name for p, given in zip(step.parameters, parameters) if given.kind == 3])
    if not re.match(rb"(<\w+>: )?interrupted", failure):
        raise EmulatorError("\n".join([message, *_excerpts(message)]))
    with contextlib.suppress(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)
    raise KeyboardInterrupt(f"{message}. CUPY_KERNELS_TIMEOUT=5 in the environment stops launches after 5 seconds")


def _excerpts(message) -> list[str]:
    """The lines of the text that a message names."""
    places = dict.fromkeys(re.findall(r"\b([\w.]+):(\d+)\b", message))
    return list(filter(None, (excerpt(int(number), lines_of(file)) for file, number in places)))


def _too_large(step, entry) -> str:
    """What a launch has more of than a GPU takes; "" if there is nothing."""
    if entry.bound and math.prod(step.block) > entry.bound():
        return f"block {tuple(step.block)} has more threads than its __launch_bounds__({entry.bound()})"
    if step.shared_bytes and entry.shared_bytes + step.shared_bytes > MAX_SHARED_BYTES:
        return (
            f"__shared__ variables of {entry.shared_bytes} bytes and {step.shared_bytes} bytes of dynamic shared "
            f"memory are more than the {MAX_SHARED_BYTES} bytes that a block can have"
        )
    return ""


@contextlib.contextmanager
def _time_limit(seconds):
    """Ends the launch in this block after that many seconds; again and again, as it may not have begun by then."""
    over, stop = threading.Event(), _runtime().emulator_stop

    def watch():
        wait = seconds
        while not over.wait(wait):
            stop()
            wait = 0.05

    watcher = threading.Thread(target=watch, daemon=True)
    if seconds:
        watcher.start()
    try:
        yield
    finally:
        over.set()
        if seconds:
            watcher.join()


def _readable(message, library, kernel):
    """The message with "file:line" in place of <byte of the library>, and with the elements that variables.py names."""
    dynamic = dynamic_shared(unit_of_file(kernel), {kernel.name})
    message = variables.named(message, library, dynamic.pop() if len(dynamic) == 1 else None)
    paths = [_path(library, path) for path in _PATH.findall(message)]
    ways = (_lines, " called at ".join)  # the shortest that tells them apart
    for name in (_line, *ways) if len(paths) > 1 else ways:
        named = [name(path) for path in paths]
        if len(set(named)) == len(named):
            break
    else:
        named = [_lines(path) for path in paths]
        named[-1] += " in another instance of a template"
    message = _PATH.sub(lambda match: named.pop(0), message)
    return re.sub("<([0-9a-f]+)>", lambda match: _line(_path(library, match[1])), message)


def _path(library, path) -> list[str]:
    """Places in the text: the one that came to the first of these bytes of the library, then calls that led there."""
    found = (place for byte in path.split(",") if byte for place in lines.places(library, int(byte, 16) - 1))
    return [place for place in found if not messages.is_internal(place)]


def _operation(library, path):
    """What tells an operation from others: its places, and the functions that it and the calls are in."""
    addresses = [int(byte, 16) - 1 for byte in path.split(",") if byte]
    return _path(library, path), [lines.functions(library, address) for address in addresses]


def _line(path) -> str:
    """The line of the text that a path leads to: the caller's, where it is in a header of the package."""
    return _lines(path).partition(" called at ")[0]


def _lines(path) -> str:
    edited = source.overridden_texts()
    own = [place for place in path if not place.split(":")[0].endswith(".cuh") or place.split(":")[0] in edited]
    return " called at ".join(place.rpartition(":")[0] for place in own or path) or "the kernel"


def _seed() -> int:
    chosen = os.environ.get("CUPY_KERNELS_SEED") or "0"
    if not re.fullmatch("[0-9]+", chosen) or int(chosen) >= 2**64:
        raise BackendError(
            f"CUPY_KERNELS_SEED={chosen!r} is not an integer from 0 to 2**64 - 1: set one, or unset it, which is 0"
        )
    return int(chosen)


def _limit() -> float | None:
    chosen = os.environ.get("CUPY_KERNELS_TIMEOUT") or "inf"
    try:
        limit = float(chosen)
    except ValueError:
        limit = 0
    if not limit > 0:
        raise BackendError(
            f"CUPY_KERNELS_TIMEOUT={chosen!r} is not a positive number of seconds: set one, or unset it for no limit"
        )
    return None if limit == math.inf else limit


@functools.cache
def _runtime() -> ctypes.CDLL:
    return _library("runtime", _text("runtime.cpp"), (), None)


def _library(stem: str, text: str, checks: tuple[str, ...], kernel: Kernel | None, kind: str = "so") -> ctypes.CDLL:
    command = [*compiler(), *FLAGS, *checks]
    key = hashlib.sha256("\0".join([text, *command, *_machine()]).encode()).hexdigest()
    path = cache.entry(f"{stem}_{key[:24]}.{kind}", lambda: _build(kernel, text, command))
    try:
        return ctypes.CDLL(str(path), ctypes.RTLD_GLOBAL if kernel is None else ctypes.RTLD_LOCAL)
    except OSError as error:
        missing = re.search(r"undefined symbol: (\w+)", str(error))
        if kernel and missing:  # the linker lets pass what is declared and nobody has
            raise compile_error(kernel, f"'{elf.demangled(missing[1])}' is declared, and defined nowhere") from error
        raise cache.unusable(path.parent, f"{error} (made by {shlex.join(compiler())})") from error


def _is_clang() -> bool:
    program = Path(shutil.which(compiler()[0]) or "").resolve().name
    return any(name in word for word in (program, *compiler()) for name in ("clang", "zig"))


@functools.cache
def _fills_locals() -> bool:
    """Whether the compiler can give a pattern, and zeros, to local variables that nobody sets."""
    with tempfile.TemporaryDirectory() as scratch:
        text, built = Path(scratch, "empty.cpp"), Path(scratch, "empty.o")
        text.touch()
        command = [*compiler(), UNSET, ZEROS[0], "-c", str(text), "-o", str(built)]
        return subprocess.run(command, capture_output=True).returncode == 0


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
    macros = "\n".join(f"#define {k} {v}" for k, v in kernel.defines)  # after the header: -D would reach libc's headers
    pointer = r"emulator::Dynamic<\1\2\4>"
    text = EXTERN_SHARED.sub(rf"{pointer} \3 = ({pointer})emulator::dynamic_shared;", unit_of_file(kernel))
    text = _ALIGNED_SHARED.sub(r"\1 __shared__", _STATIC_SHARED.sub("", text)).replace("#pragma once", "")
    unknown = " ".join(sorted({*_UNKNOWN.split(), *_BUILTIN.findall(text)} - _KNOWN))
    entries = "\n".join(_entry(name, parameters) for name, parameters in declarations(unit_of_file(kernel)).items())
    entries += "" if is_packaged(kernel) else "".join(map(_bound, bounds(unit_of_file(kernel)).items()))
    return (
        f'#line 1 "cuda.h"\n{_text("cuda.h")}\n#pragma GCC poison {unknown}\n#line 1 "{MACROS}"\n{macros}\n{text}\n'
        f'#line 1 "emulator_entries"\n{entries}\n'
    )


@functools.cache
def _text(name: str) -> str:
    """A file of the emulator, with those that it includes."""
    text = resources.files(__package__).joinpath(name).read_text(encoding="utf-8")
    return re.sub(r'^#include "(.+)"$', lambda include: _text(include[1]), text, flags=re.MULTILINE)


def _entry(name, parameters) -> str:
    arguments = (f"emulator::Argument{{arguments[{i}]}}" for i in range(len(parameters)))
    return f"EMULATOR_ENTRY({name}, {', '.join(arguments)})"


def _bound(kernel) -> str:
    """A function that returns the kernel's __launch_bounds__, which may depend on macros and constants of the text."""
    name, threads = kernel
    visible = 'extern "C" UNCHECKED __attribute__((visibility("default")))'
    return f"\n{visible} unsigned emulator_bound_{name}() {{ return {threads}; }}"


def _call(command):
    # Messages in English, which _build reads.
    done = subprocess.run(command, capture_output=True, check=True, env={**os.environ, "LC_ALL": "C"})
    return done.stderr.decode(errors="replace")


def _build(kernel: Kernel, text: str, command: list[str]) -> bytes:
    """The shared library. KernelCompileError if the text does not compile, BackendError for any other failure."""
    try:
        with tempfile.TemporaryDirectory() as scratch:
            whole, assembly, built = (Path(scratch, f"kernel.{kind}") for kind in ("cpp", "s", "so"))
            whole.write_text(text, encoding="utf-8")
            log = _call([*command, "-S", str(whole), "-o", str(assembly)])
            said = "".join(f"\t.asciz {json.dumps(what)}\n" for what in messages.unset(log))
            made = assembly.read_text(encoding="latin-1")  # clang writes any byte of a text as it is
            if kernel and "'retain' attribute" in log and (lost := elf.lost(made)):  # warned of: it knows none
                told = "this g++ cannot tell whether it is __shared__. Declare it in a function that is no template"
                raise compile_error(kernel, f"error: {lost!r}: {told}, or use g++ 12 or clang: see CUPY_KERNELS_CXX")
            assembly.write_text(f'{elf.with_gaps(made)}\t.section {WARNINGS},"",@progbits\n{said}', encoding="latin-1")
            # -fsanitize would bring a runtime
            _call([*compiler(), *LINES, "-shared", str(assembly), "-o", str(built), "-lm"])
            library = built.read_bytes()
            if kernel and library.startswith(b"\x7fELF") and (computed := elf.computed(library)):
                raise compile_error(kernel, f"error: {computed}: {NOT_ON_A_GPU}. Set it in the kernel")
            return library
    except (OSError, subprocess.CalledProcessError) as error:
        log = (getattr(error, "stderr", None) or b"").decode(errors="replace")
        if kernel and _ERROR_OF_TEXT.search(log):
            raise compile_error(kernel, messages.of_text(log)) from None
        raise BackendError(
            f"the C++ compiler {shlex.join(compiler())} failed, for no error in {kernel or 'a kernel'}: {error}\n{log}"
            "CUPY_KERNELS_CXX chooses another compiler, TMPDIR the folder that it works in"
        ) from error
