"""Shared code of the operators' host modules: macros for dtypes, launch sizes, and checks."""

import numbers

import numpy as np

from .plan import Slot
from .source import SCALARS

FLOATS = ("float", "double", "half_t", "bf16_t")
THREADS = 256
# An H100's. Plans that would sum in another order with another number take this one, so that results depend on shapes
# alone. Those of tensor cores take the GPU's own, which is worth more there.
MULTIPROCESSORS = 132


def scalar(array) -> str:
    """The kernels' name of an array's type. TypeError unless it is float32, float64, float16 or int16 (bfloat16)."""
    name = SCALARS.get(array.dtype)
    if name not in FLOATS:
        raise TypeError(
            f"arrays must be float32, float64, float16, or int16 that holds bfloat16; received {array.dtype}"
        )
    return name


def accumulator(name: str) -> str:
    """The accumulator type for tensors of type `name`."""
    return "double" if name == "double" else "float"


def accumulator_dtype(array) -> np.dtype:
    """dtype of statistics and partial sums for tensors like `array`: float32, or float64 for float64."""
    return np.dtype(np.float64 if scalar(array) == "double" else np.float32)


def type_macros(array) -> tuple:
    """Macros scalar_t and acc_t for `array`."""
    return scalar_macros(scalar(array))


def scalar_macros(name: str) -> tuple:
    """Macros scalar_t and acc_t for arrays of the type `name`."""
    return (("scalar_t", name), ("acc_t", accumulator(name)))


def parameter_type(array, *parameters) -> str:
    """The kernels' name for the type of per-channel parameters (None left out); the accumulator's if there are none."""
    return SCALARS[next((p.dtype for p in parameters if p is not None), accumulator_dtype(array))]


def vector_width(*arrays) -> int:
    """The number of elements in 16 bytes of the largest type if every array is aligned to 16 bytes, else 1."""
    return 1 if any(address(a) % 16 for a in arrays) else 16 // max(a.itemsize for a in arrays)


def row_width(length: int, *arrays) -> int:
    """Elements of the widest access, at most 16 bytes, that divides rows of `length` elements in all arrays."""
    width = 16 // max(a.itemsize for a in arrays)
    while length % width or any(address(a) % (width * a.itemsize) for a in arrays):
        width //= 2
    return width


def address(array) -> int:
    """Address of an array's first element."""
    if isinstance(array, Slot):
        return array.address
    return array.ctypes.data if isinstance(array, np.ndarray) else array.data.ptr


def ceil_div(a: int, b: int) -> int:
    """The smallest integer that is at least a / b."""
    return -(-a // b)


def same_shape(**arrays) -> None:
    """Raises ValueError unless all named arrays (None is allowed) have the same shape."""
    shapes = {name: a.shape for name, a in arrays.items() if a is not None}
    if len(set(shapes.values())) > 1:
        raise ValueError(f"these arrays must have one shape: {shapes}")


def check_within(name: str, value, least: int, most: int, unit: str) -> None:
    """Raises TypeError unless the value is an int, and ValueError unless it is within these limits."""
    if not isinstance(value, numbers.Integral) or isinstance(value, bool):
        raise TypeError(f"{name} must be an int, received {value!r}")
    if not least <= value <= most:
        raise ValueError(f"{name} must be {least} to {most} {unit}, received {value}")


def check_per_channel(channels, **arrays) -> None:
    """Raises ValueError unless every named array (None is allowed) has one element for each channel."""
    for name, array in arrays.items():
        if array is not None and array.size != channels:
            raise ValueError(f"{name} should contain {channels} elements, one for each channel, not {array.size}")
