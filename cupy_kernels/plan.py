"""A call as a plan: its launches, recorded once, and started with the arguments of every call of the same kind.

What a call launches follows from the operation, its options, and the shapes, dtypes and alignments of its arrays, not
from where these lie. So the operation runs once on stand-ins, `Slot`s. Where it passes one to a kernel, the plan
remembers which argument it was, and how many bytes into it.
"""

import math
from collections.abc import Callable
from types import SimpleNamespace

import numpy as np

from . import launch
from .backend import Backend
from .launch import NULL, Packed, Varying, recorded


class Slot:
    """Stands for a contiguous array that begins `offset` bytes into argument `index` of a call.

    alignment: the argument's address modulo 16, all that a launch may know of it.
    kind: what else the caller wants to know of the argument.
    """

    flags = SimpleNamespace(c_contiguous=True)

    def __init__(self, index: int, shape, dtype, alignment: int = 0, offset: int = 0, kind=None):
        self.kind, self.index, self.shape, self.dtype = kind, index, tuple(shape), np.dtype(dtype)
        self.alignment, self.offset = alignment, offset
        self.size, self.ndim, self.itemsize = math.prod(self.shape), len(self.shape), self.dtype.itemsize

    @property
    def address(self) -> int:
        """An address with the alignment of the array's own."""
        return self.alignment + self.offset

    def reshape(self, *shape: int) -> "Slot":
        """The same elements in another shape."""
        return Slot(self.index, shape, self.dtype, self.alignment, self.offset)

    def __getitem__(self, rows: int | slice) -> "Slot":
        """One row, or neighbouring ones."""
        row, picked = self.shape[1:], range(self.shape[0])[rows]
        first, shape = (picked, row) if isinstance(rows, int) else (picked.start, (len(picked), *row))
        offset = self.offset + first * math.prod(row) * self.itemsize
        return Slot(self.index, shape, self.dtype, self.alignment, offset)


class Plan:
    """The launches of operation(*args, **options), whose arrays are `Slot`s and whose floats are `Varying`.

    backend: what starts them. result: what the operation returned.
    A plan is for one thread: each start writes its arguments into the same words, which the kernels read.
    """

    def __init__(self, backend: Backend, operation: Callable, args, options: dict):
        self.backend, self.operation = backend, operation
        with recorded() as self.steps:
            self.result = operation(*args, **options)
        self._launches = None

    @property
    def kernels(self) -> list:
        """The kernels that it starts, in order."""
        return [step.kernel for step in self.steps]

    def start(self, pointers: list[int], values: list, stream: int | None) -> None:
        """Starts the launches, in a stream of the current GPU. pointers, values: of the arguments, by their index."""
        if self._launches is None:
            self.backend.prepare(self.kernels)
            self._launches = [_Packed(step, self.backend) for step in self.steps]
        for packed in self._launches:
            packed.fill(pointers, values)
        self.backend.start(self._launches, stream)

    def notify(self, array: Callable, values: list) -> None:
        """Shows the launches to those who observe launches. array(slot): the array that a Slot stands for."""
        for step in self.steps:
            launch.notify(step.requested, step.grid, step.block, _arguments(step, array, values), step.shared_bytes)


class _Packed(Packed):
    """A launch, and which of its words are filled at each start: addresses, and numbers that vary."""

    def __init__(self, step, backend):
        super().__init__(step, backend, [arg if isinstance(arg, np.generic) else NULL for arg in step.args])
        self.addresses, self.varying = [], []
        for i, (arg, parameter) in enumerate(zip(step.args, step.parameters)):
            if isinstance(arg, Slot):
                self.addresses.append((i, arg.index, arg.offset))
            elif type(arg) is Varying:
                self.varying.append((self.words[i : i + 1].view(parameter.dtype), arg.index))

    def fill(self, pointers, values):
        words = self.words
        for word, index, offset in self.addresses:
            words[word] = pointers[index] + offset
        for word, index in self.varying:
            word[0] = values[index]


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
