"""The one place that starts a kernel, on CuPy arrays (GPU) or NumPy arrays (emulator)."""

import numpy as np

from . import compiler, emulator
from .source import Kernel, signature

GRID_LIMITS = (2**31 - 1, 65535, 65535)
MAX_THREADS = 1024


def launch(kernel: Kernel, grid, block, args, shared_bytes: int = 0) -> None:
    """Starts `kernel` on the arrays' device, in CuPy's current stream; NumPy arrays run on the emulator before it returns.

    kernel: the variant, see `source.Kernel`.
    grid, block: 3 ints each. A grid with a 0 in it starts nothing.
    args: as the kernel declares them: an array or None (null) for a pointer, a number for a scalar. Numbers are cast to
        the declared type. Outputs are arrays of the caller; nothing is allocated here.
    shared_bytes: dynamic shared memory per block.
    Raises ValueError for a wrong number of arguments, a non-contiguous array or limits that CUDA does not allow;
    TypeError for an array of another dtype, or on another device, than the kernel and its neighbours have.
    """
    parameters = signature(kernel)
    if len(args) != len(parameters):
        raise ValueError(f"{kernel} takes {len(parameters)} arguments, received {len(args)}")
    if 0 in grid:
        return
    if any(g > limit for g, limit in zip(grid, GRID_LIMITS)) or block[0] * block[1] * block[2] > MAX_THREADS:
        raise ValueError(f"{kernel}: grid {grid} and block {block} exceed CUDA's {GRID_LIMITS} and {MAX_THREADS} threads")
    cast = [_check(kernel, p, arg) if p.pointer else p.dtype.type(arg) for p, arg in zip(parameters, args)]
    kinds = {type(arg) for p, arg in zip(parameters, cast) if p.pointer and arg is not None}
    if kinds == {np.ndarray}:
        emulator.run(kernel, parameters, grid, block, cast, shared_bytes)
    elif len(kinds) == 1:
        null = np.uint64(0)
        compiler.function(kernel, shared_bytes)(
            grid, block, [null if arg is None else arg for arg in cast], shared_mem=shared_bytes
        )
    else:
        raise TypeError(f"{kernel} takes arrays of one kind, received {', '.join(sorted(t.__name__ for t in kinds))}")


def _check(kernel, parameter, array):
    if array is None:
        return None
    if not array.flags.c_contiguous:
        raise ValueError(f"{kernel}: {parameter.name} is not contiguous (shape {array.shape}, strides {array.strides})")
    if parameter.dtype is not None and array.dtype != parameter.dtype:
        raise TypeError(f"{kernel}: {parameter.name} is {array.dtype}, the kernel takes {parameter.dtype}")
    return array
