"""The GPU backend: compiles kernel text to a function on the current device with cupy.RawModule."""

import functools
import hashlib
import threading
from pathlib import Path

from . import cache, driver, nvrtc
from .backend import Backend, Room
from .errors import BackendError
from .source import Kernel, unit

DEFAULT_SHARED_BYTES = 48 * 1024


@functools.cache
def cupy():
    """CuPy, after loading CUDA 11's wheels. Raises BackendError if it is not installed or finds no GPU."""
    nvrtc.preload_wheels()
    try:
        import cupy
    except ImportError as error:
        raise BackendError(
            "CuPy is not installed, and tensors on a GPU need it: `python3 -m modelnew env` names the command that "
            "installs the one that fits your GPU and driver"
        ) from error
    try:
        devices = cupy.cuda.runtime.getDeviceCount()
    except cupy.cuda.runtime.CUDARuntimeError as error:
        raise BackendError(f"CuPy {cupy.__version__} finds no usable GPU: {error}") from error
    if not devices:
        raise BackendError(f"CuPy {cupy.__version__} finds no GPU")
    return cupy


class Gpu(Backend):
    """The current GPU. Cubins, or PTX if the GPU is newer than NVRTC, are cached on disk."""

    def __init__(self):
        super().__init__()
        self._functions, self._shared_bytes, self._lock = {}, {}, threading.Lock()

    def room(self, device):
        cuda = cupy().cuda.runtime
        names = ("CooperativeLaunch", "MultiProcessorCount", "MaxSharedMemoryPerBlockOptin")
        able, *room = (cuda.deviceGetAttribute(getattr(cuda, f"cudaDevAttr{name}"), device) for name in names)
        return Room(*room) if able else None

    def function(self, kernel: Kernel, shared_bytes: int = 0):
        """The compiled kernel on the current device, as a CuPy function.

        shared_bytes: dynamic shared memory of a launch. More than 48 KiB, together with the text's own arrays, must be
            requested from the driver, which happens here.

        Raises KernelCompileError if the text does not compile, and BackendError if NVRTC or the cache's folder cannot
        be used.
        """
        module = self.compiled(kernel)
        key = module, kernel.name
        found = cache.once(self._functions, key, lambda: module.get_function(kernel.name))
        with self._lock:  # else, of two threads, the one that needs less might write last
            if shared_bytes > self._shared_bytes.get(key, DEFAULT_SHARED_BYTES - found.shared_size_bytes):
                found.max_dynamic_shared_size_bytes = self._shared_bytes[key] = shared_bytes
        return found

    def handle(self, kernel, shared_bytes):
        return self.function(kernel, shared_bytes).kernel.ptr

    def config(self, step):
        return driver.config(step, self.function(step.kernel, step.shared_bytes))

    def start(self, launches, stream):
        cuda = cupy().cuda
        if not cuda.driver.ctxGetCurrent():  # a thread that has not used the GPU
            cuda.runtime.free(0)
        start, packed = cuda.driver.launchKernel, None
        try:
            for packed in launches:
                if packed.config is not None:
                    error = packed.config.start(packed.numbers[0], packed.parameters, stream)
                    if error:
                        raise cuda.driver.CUDADriverError(error)
                elif packed.step.cooperative:
                    cuda.driver.launchCooperativeKernel(*packed.numbers, stream, packed.parameters)
                else:
                    start(*packed.numbers, stream, packed.parameters, 0)
        except cuda.driver.CUDADriverError as error:
            raise RuntimeError(
                f"CUDA does not start {packed.step.kernel}: {error}. This may be the error of an earlier kernel, of "
                "any library, as they run asynchronously: CUDA_LAUNCH_BLOCKING=1 shows which. After an illegal access "
                "or a lost device only a new process can use the GPU"
            ) from error

    def forget(self):
        super().forget()
        self._functions.clear()

    def _place(self):
        return cupy().cuda.runtime.getDevice()

    def _compile(self, kernel, place):
        cuda = cupy().cuda
        capability, known = cuda.Device(place).compute_capability, cuda.nvrtc.getSupportedArchs()
        architecture = kernel.architecture or nvrtc.ptx_architecture(capability, known)
        if architecture:
            module = cupy().RawModule(path=str(_code(kernel, architecture)))
        else:
            options = (nvrtc.STANDARD, *(f"-D{k}={v}" for k, v in kernel.defines))
            module = cupy().RawModule(code=unit(kernel), options=options)
        try:
            with cuda.Device(place), nvrtc.locale_kept():  # each thread has its own current device
                module.compile()
        except cuda.compiler.CompileException as error:
            status = getattr(error.__context__, "status", nvrtc.ERROR_COMPILATION)
            raise nvrtc.failure(kernel, status, str(error)) from error
        except OSError as error:
            raise BackendError(
                f"CuPy cannot write what it compiles: {error}. It keeps kernels in the folder that CUPY_CACHE_DIR "
                "chooses (default ~/.cupy/kernel_cache), and temporary files in that of TMPDIR"
            ) from error
        return module


def _code(kernel: Kernel, architecture: str) -> Path:
    """The cubin that contains the kernel, or PTX for an architecture for which CuPy does not compile."""
    ptx = architecture.startswith("compute_")
    version = nvrtc.version() if ptx else nvrtc.version(nvrtc.WGMMA_MAJOR)
    key = repr((version, unit(kernel), kernel.variant, architecture))
    return cache.entry(
        f"{hashlib.sha256(key.encode()).hexdigest()}.{'ptx' if ptx else 'cubin'}",
        lambda: nvrtc.compile_ptx(kernel, architecture).encode() if ptx else nvrtc.cubin(kernel),
    )


backend = Gpu()
