"""NVRTC by ctypes: finds the library in NVIDIA's pip wheels, and compiles without a GPU and without CuPy.

CuPy compiles what runs. This module preloads the wheels' libraries for it (CuPy 13 looks for NVRTC by plain dlopen and
knows no wheels), and lets a machine without a GPU compile every variant to a cubin and read its registers and spills.
"""

import contextlib
import ctypes
import functools
import hashlib
import importlib.util
import re
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

from . import cache
from .errors import BackendError
from .parsing import declarations
from .source import Kernel, Variant, compile_error, unit

STANDARD = "-std=c++17"
CHECK_ARCHITECTURE = "compute_80"
WGMMA_MAJOR = 12  # the first version that compiles for sm_90a
ERROR_COMPILATION = 6  # NVRTC's status for a wrong text; others concern NVRTC, its options, or the machine


class Resources(NamedTuple):
    """What ptxas reports of one kernel, per thread or block. max_threads: what __launch_bounds__ says, if anything."""

    registers: int
    stack_bytes: int
    spill_bytes: int
    shared_bytes: int
    max_threads: int | None = None


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


@functools.cache
def shared_library(least_major: int = 11) -> ctypes.CDLL:
    """The NVRTC library, from a wheel or from the system: that of the installed CuPy's CUDA if there is one, else any.

    least_major: the lowest major version to use. BackendError if there is no such library.
    """
    preload_wheels()
    candidates = [str(p) for p in _wheel_libraries("cuda_nvrtc", "libnvrtc.so.*")]
    candidates += [str(p) for p in _wheel_libraries("cu13", "libnvrtc.so.*")]
    candidates += ["libnvrtc.so.11.2", "libnvrtc.so.12", "libnvrtc.so.13", "libnvrtc.so"]
    of_cupy = f"libnvrtc.so.{_cupy_major()}"
    for name in sorted(candidates, key=lambda name: of_cupy not in name):
        try:
            found = ctypes.CDLL(name)
        except OSError:
            continue
        if _version(found)[0] >= least_major:
            return found
    raise BackendError(
        f"no NVRTC library of CUDA {least_major} or newer found: pip install nvidia-cuda-nvrtc-cu{least_major}, "
        "or install a CUDA toolkit"
    )


def _cupy_major() -> int | None:
    """Major version of the CUDA that the installed CuPy is for."""
    installed = (major for major in (11, 12, 13) if _is_installed(f"cupy-cuda{major}x"))
    return next(installed, None)


def _is_installed(package):
    try:
        metadata.version(package)
    except metadata.PackageNotFoundError:
        return False
    return True


def _version(lib):
    major, minor = ctypes.c_int(), ctypes.c_int()
    lib.nvrtcVersion(ctypes.byref(major), ctypes.byref(minor))
    return major.value, minor.value


def version(least_major: int = 11) -> str:
    """Version of `shared_library(least_major)`, such as "11.8"."""
    return ".".join(map(str, _version(shared_library(least_major))))


def architectures(least_major: int = 11) -> list[str]:
    """What `shared_library(least_major)` compiles for, such as "sm_80"."""
    lib, count = shared_library(least_major), ctypes.c_int()
    lib.nvrtcGetNumSupportedArchs(ctypes.byref(count))
    found = (ctypes.c_int * count.value)()
    lib.nvrtcGetSupportedArchs(found)
    return [f"sm_{number}" for number in found]


def ptx_architecture(capability: str, known: Iterable[int]) -> str | None:
    """What to compile PTX for ("compute_90") if a GPU ("120") is newer than the `known` architectures, else None.

    For such a GPU CuPy would ask for a cubin of the newest architecture that CuPy knows. Either the GPU cannot load it,
    as its major version is another, or NVRTC does not know it. The driver knows the GPU, and can compile older PTX.
    """
    older = [number for number in known if number <= int(capability)]
    newest = max(older, default=int(capability))
    return None if newest == int(capability) else f"compute_{newest}"


def knows_wgmma() -> bool:
    """Whether `shared_library()`, which is CuPy's, compiles for sm_90a."""
    return _version(shared_library())[0] >= WGMMA_MAJOR


def compile_variant(what: Variant | Kernel, arch: str, least_major: int = 11) -> tuple[bytes, dict[str, Resources]]:
    """Compiles for `arch` ("sm_80") to a cubin, as CuPy would; KernelCompileError with NVRTC's log.

    A variant that has an architecture of its own is compiled for that one, a kernel as `source.unit` says.
    least_major: the lowest major version of NVRTC to use. Returns the cubin and the resources of each kernel in it.
    """
    cubin, ptx, log = _compile(what, arch, "--ptxas-options=-v", least_major=least_major)
    return cubin, {name: _resources(name, log.decode(), ptx.decode()) for name in declarations(unit(what))}


def compile_ptx(what: Variant | Kernel, arch: str) -> str:
    """The PTX behind `compile_variant`'s cubin; for "compute_80", the same without a cubin."""
    return _compile(what, arch)[1].decode()


def check(kernel: Kernel) -> str | None:
    """Version of the NVRTC that takes the text of `kernel`; None if none is there. KernelCompileError if it refuses.

    For a text that runs on the emulator, and is to run on a GPU. What was found is kept on disk.
    """
    try:
        found = version(WGMMA_MAJOR if kernel.architecture else 11)
    except BackendError:
        return None
    key = hashlib.sha256(repr((found, unit(kernel), kernel.variant)).encode()).hexdigest()
    cache.entry(f"{key}.checked", lambda: compile_ptx(kernel, CHECK_ARCHITECTURE)[:0].encode())
    return found


def cubin(kernel: Kernel) -> bytes:
    """The cubin of a kernel whose variant has an architecture of its own, for that one."""
    return _compile(kernel, kernel.variant.architecture)[0]


def _compile(what, arch, *more, least_major=11):
    """(cubin, PTX, log)"""
    variant = what.variant if isinstance(what, Kernel) else what
    lib, program = shared_library(WGMMA_MAJOR if variant.architecture else least_major), ctypes.c_void_p()
    # -ftz=true: CuPy appends it to every compilation
    options = [
        STANDARD,
        "-ftz=true",
        f"-arch={variant.architecture or arch}",
        *more,
        *(f"-D{k}={v}" for k, v in variant.defines),
    ]
    raw = (ctypes.c_char_p * len(options))(*(o.encode() for o in options))
    text = unit(what).encode()
    lib.nvrtcCreateProgram(ctypes.byref(program), text, variant.file.encode(), 0, None, None)

    def read(what):
        size = ctypes.c_size_t()
        getattr(lib, f"nvrtcGet{what}Size")(program, ctypes.byref(size))
        content = ctypes.create_string_buffer(size.value)
        getattr(lib, f"nvrtcGet{what}")(program, content)
        return content

    try:
        with locale_kept():
            status = lib.nvrtcCompileProgram(program, len(options), raw)
        log = read("ProgramLog").value
        if status:
            raise failure(what, status, log.decode())
        return read("CUBIN").raw, read("PTX").value, log
    finally:
        lib.nvrtcDestroyProgram(ctypes.byref(program))


@contextlib.contextmanager
def locale_kept():
    """NVRTC 11.8 leaves its thread in the C locale, in which open() would read ASCII and no more. This puts it back."""
    uselocale = ctypes.CDLL(None).uselocale
    uselocale.argtypes, uselocale.restype = (ctypes.c_void_p,), ctypes.c_void_p
    before = uselocale(None)
    try:
        yield
    finally:
        uselocale(before)


def failure(what: Variant | Kernel, status: int, log: str) -> Exception:
    """The error for a compilation that ended with this status: KernelCompileError if the text is to blame."""
    if status == ERROR_COMPILATION:
        return compile_error(what, log)
    return BackendError(f"NVRTC cannot compile {what}, whatever its text: status {status}. {log}")


def _resources(name: str, log: str, ptx: str) -> Resources:
    bound = re.search(rf"\.entry {name}\([^)]*\)\s*\.maxntid (\d+)", ptx)
    part = log[log.index(f"'{name}'") :]

    def number(pattern):
        match = re.search(pattern, part)
        return int(match[1]) if match else 0

    end = part.find("Compiling entry function", 1)
    part = part if end < 0 else part[:end]
    return Resources(
        number(r"Used (\d+) registers"),
        number(r"(\d+) bytes stack frame"),
        number(r"(\d+) bytes spill stores") + number(r"(\d+) bytes spill loads"),
        number(r"(\d+) bytes smem"),
        int(bound[1]) if bound else None,
    )
