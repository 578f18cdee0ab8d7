"""Launches that overlap the kernel before them, by the CUDA driver's cuLaunchKernelEx, which CuPy does not have."""

import ctypes
import functools

_OVERLAPPING = 6  # CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
_LEAST_VERSION = 12030  # CUDA 12.3, from which on CUDA graphs can have such launches


class _Attribute(ctypes.Structure):
    """CUlaunchAttribute."""

    _fields_ = [("id", ctypes.c_int), ("pad", ctypes.c_int), ("value", ctypes.c_int * 16)]


class Config(ctypes.Structure):
    """CUlaunchConfig of a launch that may start while the kernel before it ends. `stream` is set before each start."""

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
        self.address = ctypes.addressof(self)


@functools.cache
def overlaps() -> bool:
    """Whether the driver has launches that overlap."""
    version = ctypes.c_int()
    return _driver().cuDriverGetVersion(ctypes.byref(version)) == 0 and version.value >= _LEAST_VERSION


@functools.cache
def launch_with():
    """cuLaunchKernelEx(address of a Config, kernel, address of its arguments, None), which returns an error number."""
    function = _driver().cuLaunchKernelEx
    function.argtypes = [ctypes.c_void_p] * 4
    return function


@functools.cache
def _driver():
    return ctypes.CDLL("libcuda.so.1")
