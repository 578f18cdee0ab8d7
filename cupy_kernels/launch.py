"""The one place that starts a kernel, on CuPy arrays (GPU) or NumPy arrays (emulator)."""

import contextlib

import numpy as np

from . import compiler, emulator
from .source import Kernel, in_force, signature

GRID_LIMITS = (2**31 - 1, 65535, 65535)
BLOCK_LIMITS = (1024, 1024, 64)
MAX_THREADS = 1024

_NULL = np.uint64(0)  # what CuPy passes as a null pointer
_NUMPY = {np.ndarray}
_observers = []


def launch(kernel: Kernel, grid, block, args, shared_bytes: int = 0) -> None:
    """Starts `kernel` on the current device, in CuPy's current stream; on NumPy arrays, runs it on the emulator.

    kernel: the variant, see `source.Kernel`.
    grid, block: 3 ints each. A grid with a 0 in it starts nothing.
    args: as the kernel declares them: an array or None (null) for a pointer, a number for a scalar. Numbers are cast to
        the declared type. Outputs are arrays of the caller; nothing is allocated here.
    shared_bytes: dynamic shared memory per block.
    Raises ValueError for a wrong number of arguments, a non-contiguous array, a number that its type cannot hold, or
    limits that CUDA does not allow; TypeError for an array of another kind or dtype than the kernel and its neighbours
    have; RuntimeError for an array that is not on the current device.
    """
    for observe in _observers:
        observe(kernel, grid, block, args, shared_bytes)
    kernel = in_force(kernel)
    parameters = signature(kernel)
    if len(args) != len(parameters):
        raise ValueError(f"{kernel} takes {len(parameters)} arguments, received {len(args)}")
    if 0 in grid:
        return
    _check_limits(kernel, grid, block)
    arrays = [arg for parameter, arg in zip(parameters, args) if parameter.pointer and arg is not None]
    on_gpu = _on_gpu(kernel, arrays)
    null = _NULL if on_gpu else None
    cast = []
    for parameter, arg in zip(parameters, args):
        if not parameter.pointer:
            arg = _number(kernel, parameter, arg)
        elif arg is None:
            arg = null
        elif not arg.flags.c_contiguous or (parameter.dtype is not None and arg.dtype != parameter.dtype):
            _refuse(kernel, parameter, arg)
        cast.append(arg)
    if on_gpu:
        function = compiler.function(kernel, shared_bytes)
        _check_device(kernel, arrays)
        function(grid, block, cast, shared_mem=shared_bytes)
    else:
        emulator.run(kernel, parameters, grid, block, cast, shared_bytes)


@contextlib.contextmanager
def observed(observer):
    """Within the block, calls observer(kernel, grid, block, args, shared_bytes) before each launch."""
    _observers.append(observer)
    try:
        yield
    finally:
        _observers.remove(observer)


def _check_limits(kernel, grid, block):
    if grid[0] > GRID_LIMITS[0] or grid[1] > GRID_LIMITS[1] or grid[2] > GRID_LIMITS[2]:
        raise ValueError(f"{kernel}: grid {tuple(grid)} exceeds CUDA's limits {GRID_LIMITS}")
    if not 0 < block[0] * block[1] * block[2] <= MAX_THREADS or block[2] > BLOCK_LIMITS[2]:
        raise ValueError(
            f"{kernel}: block {tuple(block)} exceeds CUDA's limits {BLOCK_LIMITS} and {MAX_THREADS} threads in all"
        )


def _on_gpu(kernel, arrays) -> bool:
    """Whether the arrays are CuPy's (else NumPy's)."""
    kinds = set(map(type, arrays))
    if kinds == _NUMPY:
        return False
    if len(kinds) != 1 or not next(iter(kinds)).__module__.startswith("cupy"):
        received = ", ".join(sorted(f"{t.__module__}.{t.__qualname__}" for t in kinds))
        raise TypeError(f"{kernel} takes arrays of one kind, CuPy's or NumPy's; received {received or 'no array'}")
    return True


def _check_device(kernel, arrays):
    current = compiler.cupy().cuda.runtime.getDevice()
    for array in arrays:
        if array.data.device_id != current:
            devices = sorted({a.data.device_id for a in arrays})
            raise RuntimeError(f"{kernel} starts on the current device {current}; its arrays are on {devices}")


def _refuse(kernel, parameter, array):
    if not array.flags.c_contiguous:
        raise ValueError(f"{kernel}: {parameter.name} is not contiguous (shape {array.shape}, strides {array.strides})")
    raise TypeError(f"{kernel}: {parameter.name} is {array.dtype}, the kernel takes {parameter.dtype}")


def _number(kernel, parameter, value):
    try:
        return parameter.dtype.type(value)
    except OverflowError as error:
        raise ValueError(f"{kernel}: {parameter.name}={value} does not fit {parameter.dtype}") from error
