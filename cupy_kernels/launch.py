"""The only place that starts kernels, on CuPy arrays (GPU) or NumPy arrays (emulator)."""

import contextlib
import ctypes
import itertools
import math
import struct
import sys
import threading
from typing import NamedTuple

import numpy as np

from . import compiler, emulator, source
from .backend import Backend
from .source import Kernel, Parameter

GRID_LIMITS = (2**31 - 1, 65535, 65535)
BLOCK_LIMITS = (1024, 1024, 64)
MAX_THREADS = 1024

NULL = np.uint64(0)  # a null pointer
# The least numbers that a type rounds to infinity. A float64 holds all floats.
_TOO_LARGE = {np.dtype(np.float16): 65520.0, np.dtype(np.float32): 2.0**128 - 2.0**103}
_observers = []
_thread = threading.local()


class _Prepared(NamedTuple):
    """What launches of a kernel have in common."""

    kernel: Kernel  # in force
    parameters: tuple[Parameter, ...]
    scalars: list[tuple[int, type]]  # (place, type to cast to)
    pointers: list[tuple[int, np.dtype | None]]  # (place, dtype)
    cooperative: bool  # whether all blocks start at once
    overlapping: bool  # whether it may start while the kernel before it ends


class Step(NamedTuple):
    """A launch that was checked but not started. args: arrays, NULL, and numbers of the declared types."""

    requested: Kernel
    kernel: Kernel  # in force
    parameters: tuple[Parameter, ...]
    grid: tuple[int, int, int]
    block: tuple[int, int, int]
    args: list
    shared_bytes: int
    cooperative: bool
    overlapping: bool


@source.until_overridden
def _prepared(kernel: Kernel) -> _Prepared:
    kernel = source.in_force(kernel)
    parameters = source.signature(kernel)
    scalars = [(i, parameter.dtype.type) for i, parameter in enumerate(parameters) if not parameter.pointer]
    pointers = [(i, parameter.dtype) for i, parameter in enumerate(parameters) if parameter.pointer]
    how = source.cooperative(kernel), source.overlapping(kernel)
    return _Prepared(kernel, parameters, scalars, pointers, *how)


def launch(kernel: Kernel, grid, block, args, shared_bytes: int = 0) -> None:
    """Starts `kernel` on the current device in CuPy's current stream; for NumPy arrays, runs it in the emulator.

    kernel: the kernel of a variant, see `source.Kernel`.
    grid, block: 3 ints each. A grid with a 0 in it starts nothing.
    args: in the order of the kernel's declaration: an array or None (null) for a pointer, a number for a scalar.
        Numbers are cast to the declared type. Outputs are arrays of the caller; nothing is allocated here.
    shared_bytes: dynamic shared memory per block.

    A kernel that calls grid_barrier() of common.cuh is launched cooperatively: all its blocks run at once. CUDA refuses
    more blocks than fit. One whose first statement is wait_for_earlier_kernels() may start while the kernel before it
    ends.

    Raises ValueError for a wrong number of arguments, a non-contiguous array, a number that its type cannot hold, and
    sizes that CUDA does not allow; TypeError for an array of another dtype than the kernel declares, and for arrays of
    different kinds; RuntimeError for an array that is not on the current device.
    """
    steps, requested = getattr(_thread, "steps", None), kernel
    if steps is None:
        notify(kernel, grid, block, args, shared_bytes)
    kernel, parameters, scalars, pointers, *how = _prepared(kernel)
    if len(args) != len(parameters):
        raise ValueError(f"{kernel} takes {len(parameters)} arguments, received {len(args)}")
    if 0 in grid:
        return
    _check_limits(kernel, grid, block)
    cast, kind = list(args), None
    for i, dtype in pointers:
        array = args[i]
        if array is None:
            cast[i] = NULL
            continue
        if kind is None:
            kind = type(array)
            on_gpu = kind.__module__.partition(".")[0] == "cupy"
            device = compiler.cupy().cuda.runtime.getDevice() if on_gpu else None
        if type(array) is not kind or not (on_gpu or kind is np.ndarray or steps is not None):
            _refuse_kinds(kernel, pointers, args)
        if not array.flags.c_contiguous or (dtype is not None and array.dtype != dtype):
            _refuse(kernel, parameters[i], array)
        if on_gpu and array.data.device_id != device:
            _refuse_device(kernel, device, pointers, args)
    if kind is None:
        _refuse_kinds(kernel, pointers, args)
    try:
        for i, to_type in scalars:
            number = held(args[i], parameters[i])
            cast[i] = number if type(number) is Varying else to_type(number)
    except OverflowError:
        raise _does_not_fit(parameters[i], args[i]) from None
    step = Step(requested, kernel, parameters, grid, block, cast, shared_bytes, *how)
    if steps is not None:
        steps.append(step)
    elif on_gpu:
        values = [arg if isinstance(arg, np.generic) else np.uint64(arg.data.ptr) for arg in cast]
        stream = compiler.cupy().cuda.get_current_stream().ptr
        Batch(compiler.backend, [(step, values)]).start([], [], stream)
    else:
        values = [arg if isinstance(arg, np.generic) else np.uint64(arg.ctypes.data) for arg in cast]
        Batch(emulator.backend, [(step, values)]).start([], [], None)


class Packed:
    """A launch as a backend starts it. numbers: the kernel's handle, grid, block, bytes of shared memory.

    config: what the backend's `config` gives for the step.
    parameters: the address of `pointers`, an array of the addresses of the arguments' values.
    """

    __slots__ = ("config", "numbers", "parameters", "pointers", "step")

    def __init__(self, step: Step, backend: Backend, pointers: np.ndarray):
        handle, self.config = backend.handle(step.kernel, step.shared_bytes), backend.config(step)
        self.step, self.numbers = step, (handle, *step.grid, *step.block, step.shared_bytes)
        self.pointers, self.parameters = pointers, pointers.ctypes.data

    @property
    def words(self) -> np.ndarray:
        """The current arguments, 8 bytes each."""
        return np.array([ctypes.c_uint64.from_address(int(place)).value for place in self.pointers], np.uint64)


class Batch:
    """Launches that are started together. Their arguments are in one array of 8-byte words.

    First come the addresses of `count` arguments of a call, addresses inside them, and the varying numbers; these are
    written at each start. Then come the other numbers and, for each launch, the addresses of its arguments' values.

    launches: (step, arguments). Each argument is its bytes, a stand-in (`plan.Slot`), or a `Varying`.
    """

    def __init__(self, backend: Backend, launches: list[tuple[Step, list]], count: int = 0):
        places, varying = {(index, 0): index for index in range(count)}, {}  # {(argument, dtype): parameter}
        for arg, parameter in (pair for step, args in launches for pair in zip(args, step.parameters)):
            if isinstance(arg, Varying):
                varying[arg.index, parameter.dtype] = parameter
            elif not isinstance(arg, np.generic):
                places.setdefault((arg.index, arg.offset), len(places))
        self.backend, self.launches = backend, []
        self.varying = [(index, parameter) for (index, _), parameter in varying.items()]
        self.inside = list(places)[count:]
        places.update(zip(varying, itertools.count(len(places))))
        end = len(places)
        self.pack = struct.Struct(f"={end}Q").pack_into
        self.words = words = np.zeros(end + 2 * sum(len(args) for _, args in launches), np.uint64)
        for step, args in launches:
            pointers = []
            for arg, parameter in zip(args, step.parameters):
                place = end
                if isinstance(arg, np.generic):
                    words[end : end + 1].view(np.uint8)[: arg.itemsize] = np.frombuffer(arg.tobytes(), np.uint8)
                else:
                    place = places[arg.index, parameter.dtype if isinstance(arg, Varying) else arg.offset]
                end += place == end
                pointers.append(words.ctypes.data + 8 * place)
            words[end : end + len(pointers)] = pointers
            self.launches.append(Packed(step, backend, words[end : end + len(pointers)]))
            end += len(pointers)

    def start(self, pointers: list[int], values: list, stream: int | None) -> None:
        """Starts the launches in a stream of the current GPU. pointers, values: of the call's arguments, by index."""
        inside = [pointers[index] + offset for index, offset in self.inside]
        varying = [word(values[index], parameter) for index, parameter in self.varying]
        self.pack(self.words, 0, *pointers, *inside, *varying)
        self.backend.start(self.launches, stream)


def word(number: float, parameter: Parameter) -> int:
    """The word of a `Batch` that holds the number for a parameter."""
    return int.from_bytes(struct.pack(parameter.dtype.char, held(number, parameter)), sys.byteorder)


def held(number: float, parameter: Parameter) -> float:
    """The number. Raises ValueError if it is finite and would be infinite in the parameter's type."""
    if math.inf > abs(number) >= _TOO_LARGE.get(parameter.dtype, math.inf):
        raise _does_not_fit(parameter, number)
    return number


def _does_not_fit(parameter, number) -> ValueError:
    dtype = parameter.dtype
    limits = (np.finfo if dtype.kind == "f" else np.iinfo)(dtype)
    return ValueError(f"{parameter.name}={number} does not fit {dtype}, which holds {limits.min} to {limits.max}")


class Varying(float):
    """A number in a recorded call that may differ in other calls. index: of the argument."""

    index: int


@contextlib.contextmanager
def recorded():
    """A context in which this thread's launches are checked and appended to a list, which it yields, but not started.

    Arrays may be stand-ins, see `plan.Slot`.
    """
    before, _thread.steps = getattr(_thread, "steps", None), []
    try:
        yield _thread.steps
    finally:
        _thread.steps = before


def notify(*launched) -> None:
    """Shows a launch's arguments to the observers, see `observed`."""
    for observe in _observers:
        observe(*launched)


def observing() -> bool:
    """Whether there are observers of launches, see `observed`."""
    return bool(_observers)


@contextlib.contextmanager
def observed(observer):
    """A context that calls observer(kernel, grid, block, args, shared_bytes) before each launch."""
    _observers.append(observer)
    try:
        yield
    finally:
        _observers.remove(observer)


def _check_limits(kernel, grid, block):
    if not all(0 < n <= limit for n, limit in zip(grid, GRID_LIMITS)):
        raise ValueError(f"{kernel}: grid {tuple(grid)} is not within CUDA's limits, 1 to {GRID_LIMITS}")
    if not all(0 < n <= limit for n, limit in zip(block, BLOCK_LIMITS)) or math.prod(block) > MAX_THREADS:
        raise ValueError(
            f"{kernel}: block {tuple(block)} is not within CUDA's limits, 1 to {BLOCK_LIMITS}, {MAX_THREADS} threads"
        )
    bound = source.launch_bound(kernel)
    if bound and math.prod(block) > bound:
        raise ValueError(f"{kernel}: block {tuple(block)} has more threads than its __launch_bounds__({bound})")


def _refuse_kinds(kernel, pointers, args):
    kinds = {type(array) for array in _arrays(pointers, args)}
    received = ", ".join(sorted(f"{kind.__module__}.{kind.__qualname__}" for kind in kinds)) or "no array"
    raise TypeError(f"{kernel} takes arrays of one kind, CuPy's or NumPy's; received {received}")


def _refuse_device(kernel, current, pointers, args):
    devices = sorted({array.data.device_id for array in _arrays(pointers, args)})
    raise RuntimeError(f"{kernel} starts on the current device {current}; its arrays are on {devices}")


def _arrays(pointers, args):
    return [args[i] for i, _ in pointers if args[i] is not None]


def _refuse(kernel, parameter, array):
    if not array.flags.c_contiguous:
        raise ValueError(f"{kernel}: {parameter.name} is not contiguous (shape {array.shape}, strides {array.strides})")
    raise TypeError(f"{kernel}: {parameter.name} is {array.dtype}, the kernel takes {parameter.dtype}")
