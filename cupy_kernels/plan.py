"""A call as a plan: its launches are recorded once, and started with the arguments of every call of the same kind.

The launches of a call depend on the operation, its options, and the shapes, dtypes and alignments of its arrays, but
not on addresses. So the operation runs once on stand-ins, `Slot`s. For each Slot that is an argument of a kernel, the
plan records which argument of the call it stands for, and the offset in bytes.
"""

import math
from collections.abc import Callable
from types import SimpleNamespace

import numpy as np

from . import launch
from .backend import Backend
from .launch import NULL, Batch, Step, Varying, recorded

ALIGNMENT = 256  # bytes, of arrays that share memory


class Slot:
    """Stands for a contiguous array that begins `offset` bytes into argument `index` of a call.

    alignment: the argument's address modulo 16. A launch may depend on this, but not on the address itself.
    """

    flags = SimpleNamespace(c_contiguous=True)

    def __init__(self, index: int, shape, dtype, alignment: int = 0, offset: int = 0):
        self.index, self.shape, self.dtype = index, tuple(shape), np.dtype(dtype)
        self.alignment, self.offset = alignment, offset
        self.size, self.ndim, self.itemsize = math.prod(self.shape), len(self.shape), self.dtype.itemsize
        self.nbytes = self.size * self.itemsize

    @property
    def address(self) -> int:
        """An address with the alignment of the array."""
        return self.alignment + self.offset

    def reshape(self, shape) -> "Slot":
        """The same elements in another shape."""
        return Slot(self.index, shape, self.dtype, self.alignment, self.offset)

    def view(self, dtype) -> "Slot":
        """The same bytes as a one-dimensional array of another type."""
        return Slot(self.index, (self.nbytes // np.dtype(dtype).itemsize,), dtype, self.alignment, self.offset)

    def __getitem__(self, rows: int | slice) -> "Slot":
        """One row, or consecutive rows."""
        row, picked = self.shape[1:], range(self.shape[0])[rows]
        first, shape = (picked, row) if isinstance(rows, int) else (picked.start, (len(picked), *row))
        offset = self.offset + first * math.prod(row) * self.itemsize
        return Slot(self.index, shape, self.dtype, self.alignment, offset)


def room(arrays: dict[str, tuple[tuple[int, ...], type]]) -> int:
    """Size in bytes of the memory for `parts`."""
    return sum(map(_rounded, arrays.values()))


def parts(memory, arrays: dict[str, tuple[tuple[int, ...], type]]) -> dict:
    """{name: array}, cut out of `memory`, an array of `room(arrays)` bytes. arrays: {name: (shape, dtype)}."""
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

    backend: starts the launches.
    given: how many arguments the call gets. Slots with a greater index stand for what it makes.
    result: what the operation returned.

    A plan belongs to one thread, because each start writes its arguments into the same memory, which the kernels read.
    """

    def __init__(self, backend: Backend, operation: Callable, args, options: dict, given: int = 0):
        self._backend, self._batches, self.given = backend, {}, given
        with recorded() as self.steps:
            self.result = operation(*args, **options)

    @property
    def kernels(self) -> list:
        """The kernels that the plan starts, in order."""
        return [step.kernel for step in self.steps]

    def start(self, steps: range, pointers: list[int], values: list, stream: int | None) -> None:
        """Starts some of the launches. The other arguments are those of `launch.Batch.start`."""
        batch = self._batches.get(steps.start)
        if batch is None:
            self._backend.prepare(self.kernels)  # of all steps at once
            launches = [(step, step.args) for step in self.steps[steps.start : steps.stop]]
            batch = self._batches[steps.start] = Batch(self._backend, launches, len(pointers))
        batch.start(pointers, values, stream)

    def batch(self, steps: range) -> Batch:
        """These launches as a `Batch`, made at the first start."""
        return self._batches[steps.start]

    def notify(self, steps: range, array: Callable, values: list) -> None:
        """Shows some of the launches to the observers of launches. array(slot): the array that a Slot stands for."""
        for step in self.steps[steps.start : steps.stop]:
            launch.notify(step.requested, step.grid, step.block, _arguments(step, array, values), step.shared_bytes)


def written(step: Step) -> set[int]:
    """Indexes of the arguments that a step writes."""
    pairs = zip(step.args, step.parameters)
    return {arg.index for arg, parameter in pairs if isinstance(arg, Slot) and not parameter.const}


def _arguments(step, array, values):
    """The step's arguments in one call, as `launch.launch` takes them."""
    found = []
    for arg, parameter in zip(step.args, step.parameters):
        if isinstance(arg, Slot):
            arg = array(arg)
        elif type(arg) is Varying:
            arg = parameter.dtype.type(launch.held(values[arg.index], parameter))
        found.append(None if arg is NULL else arg)
    return found
