"""A call as a plan: its launches, recorded once, and started with the arguments of every call of the same kind.

What a call launches follows from the operation, its options, and the shapes, dtypes and alignments of its arrays, not
from where these lie. So the operation runs once on stand-ins, `Slot`s. Where it passes one to a kernel, the plan
remembers which argument it was, and how many bytes into it.
"""

import math
import struct
from collections.abc import Callable
from types import SimpleNamespace

import numpy as np

from . import compiler, emulator, launch
from .launch import NULL, Varying, recorded

ALIGNMENT = 256  # bytes, of arrays that share memory


class Slot:
    """Stands for a contiguous array that begins `offset` bytes into argument `index` of a call.

    alignment: the argument's address modulo 16, all that a launch may know of it.
    """

    flags = SimpleNamespace(c_contiguous=True)

    def __init__(self, index: int, shape, dtype, alignment: int = 0, offset: int = 0):
        self.index, self.shape, self.dtype = index, tuple(shape), np.dtype(dtype)
        self.alignment, self.offset = alignment, offset
        self.size, self.ndim, self.itemsize = math.prod(self.shape), len(self.shape), self.dtype.itemsize
        self.nbytes = self.size * self.itemsize

    @property
    def address(self) -> int:
        """An address with the alignment of the array's own."""
        return self.alignment + self.offset

    def reshape(self, shape) -> "Slot":
        """The same elements in another shape."""
        return Slot(self.index, shape, self.dtype, self.alignment, self.offset)

    def view(self, dtype) -> "Slot":
        """The same bytes, of one dimension, as another type."""
        return Slot(self.index, (self.nbytes // np.dtype(dtype).itemsize,), dtype, self.alignment, self.offset)

    def __getitem__(self, rows: int | slice) -> "Slot":
        """One row, or neighbouring ones."""
        row, picked = self.shape[1:], range(self.shape[0])[rows]
        first, shape = (picked, row) if isinstance(rows, int) else (picked.start, (len(picked), *row))
        offset = self.offset + first * math.prod(row) * self.itemsize
        return Slot(self.index, shape, self.dtype, self.alignment, offset)


def room(arrays: dict[str, tuple[tuple[int, ...], type]]) -> int:
    """Bytes that `parts` needs."""
    return sum(map(_rounded, arrays.values()))


def parts(memory, arrays: dict[str, tuple[tuple[int, ...], type]]) -> dict:
    """{name: array} of arrays, {name: (shape, dtype)}, that share `memory`, an array of `room(arrays)` bytes."""
    found, start = {}, 0
    for name, (shape, dtype) in arrays.items():
        end = start + math.prod(shape) * np.dtype(dtype).itemsize
        found[name] = memory[start:end].view(dtype).reshape(shape)
        start += _rounded((shape, dtype))
    return found


def _rounded(array):
    shape, dtype = array
    return -(-math.prod(shape) * np.dtype(dtype).itemsize // ALIGNMENT) * ALIGNMENT


class Plan:
    """The launches of operation(*args, **options), whose arrays are `Slot`s and whose floats are `Varying`.

    result: what the operation returned.
    A plan is for one thread: each start writes its arguments into the same words, which the kernels read.
    """

    def __init__(self, operation: Callable, args, options: dict):
        with recorded() as self.steps:
            self.result = operation(*args, **options)
        self._prepared = {}

    @property
    def kernels(self) -> list:
        """The kernels that it starts, in order."""
        return [step.kernel for step in self.steps]

    def start(self, pointers: list[int], values: list, stream: int, steps: range) -> None:
        """Starts some of its launches on the current GPU. pointers, values: of the arguments, by their index."""
        prepared = self._prepared.get(steps.start)
        if prepared is None:
            compiler.prepare(self.kernels)
            prepared = self._prepared[steps.start] = _Packed(self.steps[steps.start : steps.stop], len(pointers))
        prepared.start(pointers, values, stream)

    def emulate(self, array: Callable, values: list, steps: range) -> None:
        """Runs some of its launches on the emulator. array(slot): the array that a Slot stands for."""
        emulator.prepare(self.kernels)
        for step in self.steps[steps.start : steps.stop]:
            args = _arguments(step, array, values)
            emulator.run(step.kernel, step.parameters, step.grid, step.block, args, step.shared_bytes)

    def notify(self, array: Callable, values: list, steps: range) -> None:
        """Shows some of its launches to those who observe launches."""
        for step in self.steps[steps.start : steps.stop]:
            launch.notify(step.requested, step.grid, step.block, _arguments(step, array, values), step.shared_bytes)


class _Packed:
    """Launches as the driver takes them. All their arguments lie in one piece of memory, 8 bytes each.

    First the addresses of the call's arguments, then addresses inside of arguments, both written at each start; then
    numbers, of which the varying ones are written at each start; then, for each launch, where its arguments lie.
    """

    def __init__(self, steps, count):
        addresses = {(index, 0): index for index in range(count)}
        for arg in (arg for step in steps for arg in step.args if isinstance(arg, Slot)):
            addresses.setdefault((arg.index, arg.offset), len(addresses))
        self._inside = list(addresses)[count:]
        self._pack = struct.Struct(f"={len(addresses)}Q").pack_into
        self._words = words = np.zeros(len(addresses) + 2 * sum(len(step.args) for step in steps), np.uint64)
        self._varying, self._launches, end = [], [], len(addresses)
        for step in steps:
            pointers = []
            for arg, parameter in zip(step.args, step.parameters):
                place = addresses.get((arg.index, arg.offset)) if isinstance(arg, Slot) else end
                pointers.append(words.ctypes.data + 8 * place)
                if place == end:
                    word, end = words[end : end + 1], end + 1
                    if type(arg) is Varying:
                        self._varying.append((word.view(parameter.dtype), arg.index))
                    else:
                        word.view(np.uint8)[: arg.itemsize] = np.frombuffer(arg.tobytes(), np.uint8)
            words[end : end + len(pointers)] = pointers
            handle = compiler.function(step.kernel, step.shared_bytes).kernel.ptr
            numbers = (handle, *step.grid, *step.block, step.shared_bytes)
            self._launches.append((numbers, words.ctypes.data + 8 * end))
            end += len(pointers)
        cuda = compiler.cupy().cuda
        if not cuda.driver.ctxGetCurrent():  # a thread that has not used the GPU
            cuda.runtime.free(0)
        self._launch = cuda.driver.launchKernel

    def start(self, pointers, values, stream):
        self._pack(self._words, 0, *pointers, *[pointers[index] + offset for index, offset in self._inside])
        for word, index in self._varying:
            word[0] = values[index]
        for numbers, arguments in self._launches:
            self._launch(*numbers, stream, arguments, 0)


def _arguments(step, array, values):
    """The step's arguments for one call, as `launch.launch` takes them."""
    found = []
    for arg, parameter in zip(step.args, step.parameters):
        if isinstance(arg, Slot):
            arg = array(arg)
        elif type(arg) is Varying:
            arg = parameter.dtype.type(values[arg.index])
        found.append(None if arg is NULL else arg)
    return found
