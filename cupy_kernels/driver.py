"""Launches with an attribute, by the CUDA driver's cuLaunchKernelEx, which CuPy does not have."""

import ctypes
import functools
from collections.abc import Callable

COOPERATIVE, OVERLAPPING = 2, 6  # CU_LAUNCH_ATTRIBUTE_COOPERATIVE, ..._PROGRAMMATIC_STREAM_SERIALIZATION


class _Attribute(ctypes.Structure):
    """CUlaunchAttribute."""

    _fields_ = [("id", ctypes.c_int), ("pad", ctypes.c_int), ("value", ctypes.c_int * 16)]


class Config(ctypes.Structure):
    """CUlaunchConfig of a launch with one attribute, set to 1."""

    _fields_ = [
        ("grid", ctypes.c_uint * 3),
        ("block", ctypes.c_uint * 3),
        ("shared_bytes", ctypes.c_uint),
        ("stream", ctypes.c_size_t),
        ("attributes", ctypes.POINTER(_Attribute)),
        ("count", ctypes.c_uint),
    ]

    def __init__(self, grid, block, shared_bytes: int, attribute: int):
        set_to = ctypes.pointer(_Attribute(attribute, 0, (1,)))
        super().__init__(tuple(grid), tuple(block), shared_bytes, 0, set_to, 1)
        self.address = ctypes.addressof(self)


@functools.cache
def launch_with() -> Callable[[int, int, int, None], int] | None:
    """cuLaunchKernelEx(address of a Config, kernel, address of its arguments, None), which returns an error's number.

    None if the driver is older than CUDA 11.8.
    """
    function = getattr(ctypes.CDLL("libcuda.so.1"), "cuLaunchKernelEx", None)
    if function:
        function.argtypes = [ctypes.c_void_p] * 4
    return function
