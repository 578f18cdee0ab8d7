"""Calls of kernels on tensors. A call is a plan: what it checks, allocates and launches is worked out once.

It is worked out once for each kind of call. The kind is the operation, its options, and the shape, dtype, device,
layout and alignment of each tensor. Where tensors lie does not matter, nor do the values of floats.
"""

import contextlib
import threading
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch

from cupy_kernels import compiler
from cupy_kernels.launch import Varying, observing
from cupy_kernels.plan import Plan, Slot
from cupy_kernels.source import until_overridden

from . import recorders
from .interop import NUMPY, TORCH, Layout, Workspace, check_memory, dense, one_device, raw_stream, view

_MOST_KNOWN = 4096  # plans of a thread
_MEMORY = (torch.Tensor, Workspace)
_nothing = contextlib.nullcontext()


class Kind(NamedTuple):
    """What a plan may know of a tensor."""

    shape: torch.Size
    dtype: torch.dtype
    device: torch.device

    @property
    def is_cuda(self) -> bool:
        return self.device.type == "cuda"


class New:
    """Makes the stand-ins of what a call allocates: `new(shape, dtype)` for a result, `new.scratch` for a workspace."""

    def __init__(self, first: int):
        self.first, self.results, self.scratches = first, [], {}

    def __call__(self, shape, dtype) -> Slot:
        """A tensor that the call returns. dtype: NumPy's, int16 for bfloat16."""
        slot = Slot(self.first + 1 + len(self.results), shape, dtype)
        self.results.append(slot)
        return slot

    def like(self, array: Slot | None) -> Slot | None:
        """A result of another array's shape and dtype; None for None."""
        return None if array is None else self(array.shape, array.dtype)

    def scratch(self, shape, dtype) -> Slot:
        """Memory that is given back when the call returns."""
        shape = (shape,) if isinstance(shape, int) else shape
        self.scratches[len(self.scratches)] = (shape, dtype)
        offset = Layout(self.scratches).places[len(self.scratches) - 1][0]
        return Slot(self.first, shape, dtype, offset=offset)


class _Known(NamedTuple):
    plan: Plan
    gpu: int | None  # its index
    device: torch.device
    scratch: int | None  # bytes of workspaces; None if there are none
    results: list[tuple[tuple[int, ...], torch.dtype]]  # what to allocate
    returned: tuple[int | None, ...] | int | None  # places in `results`


@until_overridden
def _thread():
    """Its __dict__ is each thread's own {key of a call: _Known}, since a plan is for one thread."""
    return threading.local()


def call(operation: Callable, *args, check: Callable | None = None, **options):
    """What operation(new, *args, **options) returns: stand-ins made by `new`, or None, alone or in a tuple.

    The operation runs once for each kind of call, on stand-ins of the tensors: `plan.Slot`s that have a `Kind`. It
    launches kernels and asks `new`, a `New`, for memory. Floats may differ from call to call: it passes them on to
    kernels as they are.
    check: called before, once for each kind of call, for errors that follow from the kind.
    """
    if recorders.may_record():
        recorders.refuse(operation)
    values = [*args, *options.values()]
    key, pointers = _kind(operation, options, values)
    known = _thread().__dict__
    found = known.get(key)
    if found is None:
        if check is not None:
            check()
        found = _make(operation, values, options, new=New(len(values)))
        remember(known, key, found)
    scratch = None
    if found.scratch is not None:
        scratch = torch.empty(found.scratch, dtype=torch.uint8, device=found.device)
    results = [torch.empty(shape, dtype=dtype, device=found.device) for shape, dtype in found.results]
    made = (scratch, *results)
    pointers += [0 if tensor is None else tensor.data_ptr() for tensor in made]
    _start(found, (*values, *made), pointers)
    if isinstance(found.returned, tuple):
        return tuple(None if place is None else results[place] for place in found.returned)
    return None if found.returned is None else results[found.returned]


def dense_after(check: Callable, *tensors: torch.Tensor | None) -> list[torch.Tensor | None]:
    """`dense` of each tensor. If one must be copied, check() runs first, so that a refused call copies nothing."""
    if not all(t is None or t.is_contiguous() for t in tensors):
        check()
    return [dense(t) for t in tensors]


def run(operation: Callable, *args, key=None, **options) -> None:
    """`call` of an operation that allocates nothing and returns nothing: operation(*args, **options).

    args: may be workspaces, which the operation gets as {name: array}.
    key: hashable, something from which options, shapes, dtypes and the device of all tensors, and layouts of workspaces
        follow, so that these need not be looked at. Floats may differ under the same key.

    Kernels run on the tensors' device, in torch's current stream there; for CPU tensors, on the emulator.
    RuntimeError if the tensors are not on one device, or on one that is neither a CUDA GPU nor the CPU.
    """
    if recorders.may_record():
        recorders.refuse(operation)
    values = [*args, *options.values()]
    if key is None:
        key, pointers = _kind(operation, options, values)
    else:
        pointers = [value.data_ptr() if isinstance(value, _MEMORY) else 0 for value in values]
        key = (operation, key, *map(_alignment, pointers))
    known = _thread().__dict__
    found = known.get(key)
    if found is None:
        found = _make(operation, values, options)
        remember(known, key, found)
    _start(found, values, pointers)


def _make(operation, values, options, new=None) -> _Known:
    device = one_device(values)
    stand_ins = [_stand_in(index, value) for index, value in enumerate(values)]
    count = len(values) - len(options)
    args = stand_ins[:count] if new is None else [new, *stand_ins[:count]]
    plan = Plan(operation, args, dict(zip(options, stand_ins[count:])))
    gpu = device.index if device.type == "cuda" else None
    if new is None:
        return _Known(plan, gpu, device, None, [], None)
    results = [(slot.shape, TORCH[slot.dtype]) for slot in new.results]
    places = {id(slot): place for place, slot in enumerate(new.results)}
    returned = plan.result
    if isinstance(returned, tuple):  # KeyError for what `new` has not made: a call returns no argument of its own
        returned = tuple(None if slot is None else places[id(slot)] for slot in returned)
    elif returned is not None:
        returned = places[id(returned)]
    scratch = Layout(new.scratches).size if new.scratches else None
    return _Known(plan, gpu, device, scratch, results, returned)


@contextlib.contextmanager
def planned():
    """Within the block, this thread's calls are planned, not started; gives the plans. Results hold nothing."""
    before, _planned.plans = getattr(_planned, "plans", None), []
    try:
        yield _planned.plans
    finally:
        _planned.plans = before


_planned = threading.local()


def _start(found, values, pointers):
    plan, index = found.plan, found.gpu
    if getattr(_planned, "plans", None) is not None:
        _planned.plans.append(plan)
        return
    if observing():
        plan.notify(lambda slot: _array(slot, values[slot.index]), values)
    if index is None:
        plan.emulate(lambda slot: _array(slot, values[slot.index]), values)
    else:
        with _nothing if index == torch.cuda.current_device() else torch.cuda.device(index):
            plan.start(pointers, values, raw_stream(index))


def remember(known: dict, key, value) -> None:
    """known[key] = value. Beyond _MOST_KNOWN the oldest goes: making it anew costs little."""
    if len(known) >= _MOST_KNOWN:
        known.pop(next(iter(known)), None)
    known[key] = value


def _kind(operation, options, values):
    """(key of the plan, addresses of the values)"""
    key, pointers = [operation, *options], []
    for value in values:
        pointer = 0
        if isinstance(value, torch.Tensor):
            pointer = value.data_ptr()
            key += value.shape, value.dtype, value.get_device(), _alignment(pointer), value.is_contiguous()
        elif isinstance(value, float):
            key.append(float)
        elif isinstance(value, Workspace):
            pointer = value.data_ptr()
            key += value.layout, value.memory.get_device()
        else:
            key.append(value)
        pointers.append(pointer)
    return tuple(key), pointers


def _alignment(pointer):
    return pointer & 15 if pointer else None


def _stand_in(index, value):
    if isinstance(value, torch.Tensor):
        kind, alignment = Kind(value.shape, value.dtype, value.device), value.data_ptr() & 15
        check_memory(value)
        if not value.is_contiguous():
            raise ValueError(
                f"kernels take contiguous tensors, received shape {tuple(value.shape)} with strides {value.stride()}"
            )
        return Slot(index, kind.shape, NUMPY[kind.dtype], alignment, kind=kind)
    if isinstance(value, Workspace):
        places = value.layout.places.items()
        return {name: Slot(index, shape, dtype, offset=offset) for name, (offset, shape, dtype) in places}
    if isinstance(value, float):
        value = Varying(value)
        value.index = index
    return value


def _array(slot, value):
    """The array that a Slot of this tensor or workspace stands for."""
    memory = view(value.memory if isinstance(value, Workspace) else value)
    if isinstance(memory, np.ndarray):
        return np.ndarray(slot.shape, slot.dtype, memory if memory.size else None, slot.offset)
    return compiler.cupy().ndarray(slot.shape, slot.dtype, memory.data + slot.offset)
