"""NVRTC through ctypes: finds the library in NVIDIA's pip wheels, and compiles without a GPU and without CuPy.

CuPy compiles the kernels that run. This module preloads the wheels' libraries for CuPy 13, which looks for NVRTC with a
plain dlopen. On a machine without a GPU, it compiles every variant to a cubin and reads registers and spills.
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
from .compile_errors import compile_error
from .errors import BackendError
from .parsing import declarations
from .source import Kernel, Variant, unit, unit_of_file

STANDARD = "-std=c++17"
CHECK_ARCHITECTURE = "compute_80"
WGMMA_MAJOR = 12  # the first version that compiles for sm_90a
ERROR_COMPILATION = 6  # NVRTC's status for a wrong text; others concern NVRTC, its options, or the machine


class Resources(NamedTuple):
    """What ptxas reports for a kernel, per thread or block. max_threads: from __launch_bounds__, if there is one."""

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


@functools.cache
def shared_library(least_major: int = 11) -> ctypes.CDLL:
    """The NVRTC library, from a wheel or the system: that of the installed CuPy's CUDA version, else any.

    least_major: the lowest major version to use.

    Raises BackendError if there is no such library.
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
        f"no NVRTC library of CUDA {least_major} or newer found: python3 -m pip install "
        f"nvidia-cuda-nvrtc-cu{least_major}, or install a CUDA toolkit"
    )


def _cupy_major() -> int | None:
    """Major version of the installed CuPy's CUDA."""
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
    """The architectures that `shared_library(least_major)` supports, such as "sm_80"."""
    lib, count = shared_library(least_major), ctypes.c_int()
    lib.nvrtcGetNumSupportedArchs(ctypes.byref(count))
    found = (ctypes.c_int * count.value)()
    lib.nvrtcGetSupportedArchs(found)
    return [f"sm_{number}" for number in found]


def ptx_architecture(capability: str, known: Iterable[int]) -> str | None:
    """The architecture of PTX ("compute_90") for a GPU ("120") that is newer than the `known` ones, else None.

    For such a GPU, CuPy would request a cubin of the newest architecture that CuPy knows. That fails, because the GPU's
    major version differs or because NVRTC does not know it. The driver knows the GPU, and can compile older PTX.
    """
    older = [number for number in known if number <= int(capability)]
    newest = max(older, default=int(capability))
    return None if newest == int(capability) else f"compute_{newest}"


def of_wgmma() -> str | None:
    """Version of the NVRTC that compiles wgmma instructions: CuPy's, else one that another package, such as torch, has.

    None without one.
    """
    try:
        return version(WGMMA_MAJOR)
    except BackendError:
        return None


def compile_variant(what: Variant | Kernel, arch: str, least_major: int = 11) -> tuple[bytes, dict[str, Resources]]:
    """Compiles for `arch` ("sm_80") as CuPy would. Returns the cubin and {kernel: `Resources`}.

    what: a variant, with all its kernels, or one kernel, see `source.unit`. A variant with an architecture of its own
        is compiled for that one.
    least_major: the lowest major version of NVRTC to use.

    Raises KernelCompileError, with NVRTC's log, if the text does not compile, and BackendError without NVRTC.
    """
    cubin, ptx, log = _compile(what, arch, "--ptxas-options=-v", least_major=least_major)
    return cubin, {name: _resources(name, log.decode(), ptx.decode()) for name in declarations(unit(what))}


def compile_ptx(what: Variant | Kernel, arch: str) -> str:
    """The PTX of `compile_variant`'s cubin. For "compute_80", PTX without a cubin."""
    return _compile(what, arch)[1].decode()


def check(kernel: Kernel) -> str | None:
    """Version of the NVRTC that accepts the text of `kernel`; None without NVRTC. KernelCompileError if it refuses.

    It is for texts that run in the emulator and shall run on a GPU: those of `unit_of_file`. Results are cached on
    disk. A function that is declared and has no definition is refused, as by the linker for a GPU.
    """
    try:
        found = version(WGMMA_MAJOR if kernel.architecture else 11)
    except BackendError:
        return None
    text = unit_of_file(kernel)
    key = hashlib.sha256(repr((found, text, kernel.variant)).encode()).hexdigest()

    def checked():
        _, ptx, _ = _compile(kernel, CHECK_ARCHITECTURE, text=text)
        if missing := re.search(r"^\.extern \.func[^;{]*?\b(_Z\w+)", ptx.decode(), re.MULTILINE):
            raise compile_error(kernel, f"Unresolved extern function '{missing[1]}'")
        return b""

    cache.entry(f"{key}.checked", checked)
    return found


def cubin(kernel: Kernel) -> bytes:
    """The cubin of a kernel whose variant has an architecture of its own, for that one."""
    return _compile(kernel, kernel.variant.architecture)[0]


def _compile(what, arch, *more, least_major=11, text=None):
    """(cubin, PTX, log). text: by default `unit`."""
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
    text = (text or unit(what)).encode()
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
    """A context that restores the thread's locale: NVRTC 11.8 leaves the C locale, in which open() reads only ASCII."""
    uselocale = ctypes.CDLL(None).uselocale
    uselocale.argtypes, uselocale.restype = (ctypes.c_void_p,), ctypes.c_void_p
    before = uselocale(None)
    try:
        yield
    finally:
        uselocale(before)


def failure(what: Variant | Kernel, status: int, log: str) -> Exception:
    """The error for a compilation that ended with this status: KernelCompileError if the text is the cause."""
    if status == ERROR_COMPILATION:
        return compile_error(what, log)
    return BackendError(f"NVRTC cannot compile {what}, whatever its text: status {status}. {log}")


def _resources(name: str, log: str, ptx: str) -> Resources:
    bound = re.search(rf"\.entry {name}\([^)]*\)\s*\.maxntid (\d+)", ptx)
    part = log[log.index(f"Compiling entry function '{name}'") :]  # warnings before it name the kernel, too

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
