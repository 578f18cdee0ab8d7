"""Kernel text -> function on the current GPU, through cupy.RawModule."""

import functools
import hashlib
import threading
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from . import cache, nvrtc
from .errors import BackendError
from .source import Kernel, in_force, unit

_functions = {}
_shared_bytes = {}
_modules = {}
_listeners = []
_shared_bytes_lock = threading.Lock()

DEFAULT_SHARED_BYTES = 48 * 1024


@functools.cache
def cupy():
    """CuPy, with CUDA 11's wheels loaded first. BackendError if it is not installed or finds no GPU."""
    nvrtc.preload_wheels()
    try:
        import cupy
    except ImportError as error:
        raise BackendError(
            "CuPy is not installed, and tensors on a GPU need it: pip install 'modelnew[cuda11]' "
            "(or cuda12, cuda13: the one that fits your driver)"
        ) from error
    try:
        devices = cupy.cuda.runtime.getDeviceCount()
    except cupy.cuda.runtime.CUDARuntimeError as error:
        raise BackendError(f"CuPy {cupy.__version__} finds no usable GPU: {error}") from error
    if not devices:
        raise BackendError(f"CuPy {cupy.__version__} finds no GPU")
    return cupy


def on_compile(listener):
    """Calls listener(kernel) before each variant that this process compiles or loads from a disk cache, on any backend.

    Kernels of one file with the same macros are compiled together, except edited ones: the listener gets the first that
    is launched. It is called in the thread that compiles.
    Returns a function that removes the listener.
    """
    _listeners.append(listener)
    return lambda: _listeners.remove(listener)


def announce(kernel: Kernel) -> None:
    """Tells the listeners of `on_compile`."""
    for listener in _listeners:
        listener(kernel)


def function(kernel: Kernel, shared_bytes: int = 0):
    """The compiled kernel on the current device, loaded at the first call of a process.

    There is one module for a file and its macros, and one for each edited kernel. Its cubin, or its PTX if the GPU is
    newer than NVRTC, is kept on disk for the next process.
    shared_bytes: dynamic shared memory of a launch. A kernel must be told of more than 48 KiB, which happens here.
    KernelCompileError if the text does not compile, BackendError if NVRTC or a folder cannot be used.
    """
    device = cupy().cuda.runtime.getDevice()
    key = (kernel, unit(kernel), device)
    found = cache.once(_functions, key, lambda: _module(kernel, device).get_function(kernel.name))
    if shared_bytes > _shared_bytes.get(key, DEFAULT_SHARED_BYTES):
        with _shared_bytes_lock:  # else, of two threads, the one that needs less might write last
            if shared_bytes > _shared_bytes.get(key, DEFAULT_SHARED_BYTES):
                found.max_dynamic_shared_size_bytes = _shared_bytes[key] = shared_bytes
    return found


def prepare(kernels: Iterable[Kernel]) -> None:
    """Compiles those of `kernels` that are not compiled yet for the current device, in parallel.

    For a caller that knows what it will launch: the launches would compile one after the other. NVRTC of CUDA 12 and
    newer compiles in several threads at once, that of 11.8 in one at a time. Errors are raised once all are done.
    """
    device = cupy().cuda.runtime.getDevice()
    kernels = map(in_force, kernels)
    missing = {(unit(k), k.defines): k for k in kernels if _module_key(k, device) not in _modules}
    if len(missing) < 2:
        return  # the launch compiles it
    with ThreadPoolExecutor(len(missing)) as threads:
        for compiled in [threads.submit(_module, kernel, device) for kernel in missing.values()]:
            compiled.result()


def _module(kernel: Kernel, device: int):
    return cache.once(_modules, _module_key(kernel, device), lambda: _compiled(kernel, device))


def _compiled(kernel, device):
    backend = cupy()
    announce(kernel)
    capability, known = backend.cuda.Device(device).compute_capability, backend.cuda.nvrtc.getSupportedArchs()
    architecture = kernel.variant.architecture or nvrtc.ptx_architecture(capability, known)
    if architecture:
        module = backend.RawModule(path=str(_code(kernel, architecture)))
    else:
        options = (nvrtc.STANDARD, *(f"-D{k}={v}" for k, v in kernel.defines))
        module = backend.RawModule(code=unit(kernel), options=options)
    try:
        with backend.cuda.Device(device):  # each thread has its own current device
            module.compile()
    except backend.cuda.compiler.CompileException as error:
        status = getattr(error.__context__, "status", nvrtc.ERROR_COMPILATION)
        raise nvrtc.failure(kernel, status, str(error)) from error
    except OSError as error:
        raise BackendError(
            f"CuPy cannot write what it compiles: {error}. It keeps kernels in the folder that CUPY_CACHE_DIR chooses "
            "(default ~/.cupy/kernel_cache), and temporary files in that of TMPDIR"
        ) from error
    return module


def _code(kernel: Kernel, architecture: str) -> Path:
    """The cubin that the kernel is in, or PTX, for an architecture that CuPy does not compile for."""
    ptx = architecture.startswith("compute_")
    version = nvrtc.version() if ptx else nvrtc.version(nvrtc.WGMMA_MAJOR)
    key = repr((version, unit(kernel), kernel.variant, architecture))
    return cache.entry(
        f"{hashlib.sha256(key.encode()).hexdigest()}.{'ptx' if ptx else 'cubin'}",
        lambda: nvrtc.compile_ptx(kernel, architecture).encode() if ptx else nvrtc.cubin(kernel),
    )


def _module_key(kernel, device):
    return unit(kernel), kernel.defines, device
