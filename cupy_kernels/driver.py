"""Launches that overlap the kernel before them, by the CUDA driver's cuLaunchKernelEx, which CuPy does not have."""

import ctypes
import functools

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
