"""Calls of kernels on tensors. A call becomes a plan: its checks, allocations and launches are determined once.

A plan is made once for each kind of call. The kind is the operation, its options, and the shape, dtype, device, layout
and alignment of each tensor. It does not depend on the tensors' addresses or on the values of floats.
"""

import contextlib
import functools
import itertools
import math
import threading
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch

from cupy_kernels import compiler
from cupy_kernels.errors import UnsupportedError
from cupy_kernels.launch import Varying, observing
from cupy_kernels.plan import ALIGNMENT, Plan, Slot, written
from cupy_kernels.source import until_overridden

from . import recorders
from .formats import dense_in
from .interop import NUMPY, TORCH, backend, check_memory, dense, one_device, view
from .shortcuts import current_device, raw_stream

_MOST_KNOWN = 4096  # plans of a thread, and replays
_LARGE = 1 << 20  # bytes from which a workspace is made late and given back early
_planning = {}  # {thread: plans of its calls}, see `planned`


class _Recording(threading.local):
    made = None  # a list that this thread's calls join: (what is known of a call, its values and what it made)


recording = _Recording()


class New:
    """Makes stand-ins for the memory of a call: `new(shape, dtype)` for a result, `new.scratch` for a workspace.

    room: a `backend.Room` for launches whose blocks wait for each other, or None.
    """

    room = None

    def __init__(self, first: int):
        self.first = first  # index of the memory that small workspaces share
        self.small_bytes = 0
        self.slots = []  # those with memory of their own

    def __call__(self, shape, dtype) -> Slot:
        """A tensor that the call returns. dtype: NumPy's, int16 for bfloat16."""
        self.slots.append(Slot(self.first + 1 + len(self.slots), shape, dtype))
        return self.slots[-1]

    def like(self, array: Slot | None) -> Slot | None:
        """A result with another array's shape and dtype; None for None."""
        return None if array is None else self(array.shape, array.dtype)

    def scratch(self, shape, dtype) -> Slot:
        """A workspace. It is freed when the call returns, or earlier if it is large."""
        slot = Slot(self.first, (shape,) if isinstance(shape, int) else shape, dtype, offset=self.small_bytes)
        if slot.nbytes >= _LARGE:
            return self(slot.shape, dtype)
        self.small_bytes += -(-slot.nbytes // ALIGNMENT) * ALIGNMENT
        return slot


class _Stage(NamedTuple):
    """Consecutive launches, what is allocated before them, and what is freed after them."""

    made: list[tuple]  # (index, shape, strides, dtype)
    steps: range
    dropped: list[int]


class _Known(NamedTuple):
    plan: Plan
    gpu: int | None  # its index
    device: torch.device
    stages: list[_Stage]
    slots: int  # tensors to make
    returned: tuple[int | None, ...] | int | None  # their indexes


class Caches(threading.local):
    """What a thread knows of its calls, by their kinds. A plan belongs to one thread."""

    def __init__(self):
        self.plans, self.seen, self.replays = {}, {}, {}  # for the last two, see `replays`


@until_overridden
def caches() -> Caches:
    """The caches, which are new after an edit of a kernel."""
    return Caches()


def remember(known: dict, key, value) -> None:
    """Sets known[key] = value. If the cache is full, the oldest entry is dropped.

    Not the one that was used least recently: to move an entry at each call would cost every call.
    """
    if len(known) >= _MOST_KNOWN:
        known.pop(next(iter(known)), None)
    known[key] = value


def call(operation: Callable, *args, check: Callable | None = None, **options):
    """The result of operation(new, *args, **options), as tensors: one, a tuple, or None.

    operation: runs once for each kind of call, with a `plan.Slot` in place of each tensor. It launches kernels, gets
        memory from `new`, a `New`, and returns stand-ins that `new` made. It must hand floats on to kernels unchanged,
        because their values may differ from call to call.
    check: raises the errors of a kind of call. It is called once for each kind, before the operation.

    Kernels run on the tensors' device, in torch's current stream there; for CPU tensors, on the emulator. Raises
    RuntimeError if the tensors are on several devices, or on one that is neither a CUDA GPU nor the CPU.
    """
    if recorders.may_record():
        recorders.refuse_kernels()
    values = [*args, *options.values()]
    kinds = (*map(type, values),)
    facts, pointers = _reader(kinds)(*values)
    key = operation, kinds, *options, facts
    found = caches().plans.get(key)
    if found is None:
        found = _make(key, operation, values, options, check)
    if type(found) is str:
        raise UnsupportedError(found)
    values += found.slots * [None]
    pointers += found.slots * [0]
    if found.gpu is None or found.gpu == current_device():
        _run(found, values, pointers)
    else:
        with torch.cuda.device(found.gpu):
            _run(found, values, pointers)
    if recording.made is not None:
        recording.made.append((found, values))
    returned = found.returned
    if type(returned) is tuple:
        return tuple([None if index is None else values[index] for index in returned])
    return None if returned is None else values[returned]


@functools.lru_cache(maxsize=1024)
def _reader(kinds: tuple[type, ...]) -> Callable:
    """read(*values) -> (what a plan may depend on, for values of these types; their addresses).

    It is generated as code for the types, because a loop over the values takes half as long again.
    """
    names = [f"v{i}" for i in range(len(kinds))]
    tensors = [name for name, kind in zip(names, kinds) if issubclass(kind, torch.Tensor)]
    facts = "{0}.shape, {0}.dtype, {0}.get_device(), {0}.is_contiguous(), {0}_at and {0}_at & 15 | 16 or {0}.is_meta"
    known = list(map(facts.format, tensors))
    known += [v for v, kind in zip(names, kinds) if not issubclass(kind, torch.Tensor | float)]
    lines = [f"def read({', '.join(names)}):", *(f"    {v}_at = {v}.data_ptr()" for v in tensors)]
    pointers = ", ".join(f"{v}_at" if v in tensors else "0" for v in names)
    lines.append(f"    return ({', '.join(known)},), [{pointers}]" if known else f"    return (), [{pointers}]")
    defined = {}
    exec("\n".join(lines), defined)
    return defined["read"]


def run(operation: Callable, *args, **options) -> None:
    """`call` for an operation that allocates nothing and returns nothing: operation(*args, **options)."""
    call(_run_alone, operation, *args, **options)


def _run_alone(new, operation, *args, **options):
    operation(*args, **options)


def _run(found, values, pointers):
    plan, gpu, device, stages, *_ = found
    observed = watched()
    for made, steps, dropped in stages:
        for index, shape, strides, dtype in made:
            values[index] = torch.empty_strided(shape, strides, dtype=dtype, device=device)
            pointers[index] = values[index].data_ptr()
        if not observed or show(plan, values, steps):
            plan.start(steps, pointers, values, None if gpu is None else raw_stream(gpu))
        for index in dropped:
            values[index] = None


def watched() -> bool:
    """Whether launches are observed, or calls are planned but not started, in some thread."""
    return bool(_planning or observing())


def show(plan, values, steps) -> bool:
    """Shows launches to their observers. Returns whether they are to start. If not, what they make is set to zero."""
    plans = _planning.get(threading.get_ident())
    if plans is None:
        plan.notify(steps, lambda slot: _array(slot, values[slot.index]), values)
        return True
    if steps.start == 0:  # a call may have several stages
        plans.append(plan)
    for index in {index for step in plan.steps[steps.start : steps.stop] for index in written(step)}:
        if index >= plan.given:
            values[index].zero_()
    return False


def dense_after(check: Callable, *tensors: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
    """`dense` of each tensor. If one must be copied, check() runs first, so that a refused call copies nothing."""
    for tensor in tensors:
        if tensor is not None and (not tensor.is_contiguous() or tensor.is_neg()):
            check()
            return tuple(map(dense, tensors))
    return tensors


def prepared(check: Callable, last: bool, x: torch.Tensor, *others: torch.Tensor | None) -> tuple:
    """`dense_after` of the tensors, but of x in channels_last, if `last`."""
    if not last:
        return dense_after(check, x, *others)
    others = dense_after(check, *others)
    return dense_in(x, last), *others


def _make(key, operation, values, options, check) -> _Known | str:
    """Plans a call. Returns the reason if it is refused, which is cached as well: a fallback happens at every call."""
    try:
        if check is not None:
            check()
        found = _planned_call(operation, values, options)
    except UnsupportedError as error:
        found = str(error)  # the error itself would keep the call's tensors alive
    remember(caches().plans, key, found)
    return found


def _planned_call(operation, values, options) -> _Known:
    device, new = one_device(values), New(len(values))
    machine = backend(device)
    new.room = machine.room(device.index)
    stand_ins = [_stand_in(index, value) for index, value in enumerate(values)]
    count = len(values) - len(options)
    plan = Plan(machine, operation, [new, *stand_ins[:count]], dict(zip(options, stand_ins[count:])), given=len(values))
    indexes = {id(slot): slot.index for slot in new.slots}
    returned = plan.result
    if isinstance(returned, tuple):  # KeyError for what `new` has not made: a call returns no argument of its own
        returned = tuple(None if slot is None else indexes[id(slot)] for slot in returned)
    elif returned is not None:
        returned = indexes[id(returned)]
    gpu = device.index if device.type == "cuda" else None
    return _Known(plan, gpu, device, _stages(plan, new, returned), 1 + len(new.slots), returned)


def _stages(plan, new, returned) -> list[_Stage]:
    """A new stage begins where a large allocation is needed and another one is not needed any more.

    All memory from the first step on that updates an argument, such as running statistics, is allocated before that
    step, so that a call that runs out of memory has changed nothing.
    """
    count, returned = len(plan.steps), returned if isinstance(returned, tuple) else (returned,)
    first, last = {}, {}
    updates = [number for number, step in enumerate(plan.steps) if any(i < new.first for i in written(step))]
    update = min(updates, default=count)
    for number, step in enumerate(plan.steps):
        for index in {arg.index for arg in step.args if isinstance(arg, Slot)}:
            first.setdefault(index, min(number, update))
            last[index] = number
    large = {slot.index for slot in new.slots if slot.nbytes >= _LARGE}
    dropped = {index: last.get(index, 0) for index in large.difference(returned)}
    starts = [0]
    for number in sorted({first.get(index, 0) for index in large}):
        if any(starts[-1] <= end < number for end in dropped.values()):
            starts.append(number)
    slots, stages = [*new.slots], []
    if new.first in first:
        slots.append(Slot(new.first, (new.small_bytes,), np.uint8))
    for start, end in itertools.pairwise([*starts, max(count, 1)]):
        made = [s for s in slots if start <= (first.get(s.index, 0) if s.index in large else 0) < end]
        stages.append(
            _Stage(
                [(s.index, s.shape, _strides(s.shape), TORCH[s.dtype]) for s in made],
                range(start, min(end, count)),
                [index for index, number in dropped.items() if start <= number < end],
            )
        )
    return stages


def _strides(shape):
    """Strides of a contiguous tensor. Asking torch for them would show one more operator to whoever watches."""
    return tuple(math.prod(max(n, 1) for n in shape[axis + 1 :]) for axis in range(len(shape)))


@contextlib.contextmanager
def planned():
    """A context in which this thread's calls are planned, not started. Yields the plans. Results are zeros."""
    thread = threading.get_ident()
    before, _planning[thread] = _planning.get(thread), []
    try:
        with torch.autograd.set_multithreading_enabled(False):  # a GPU's backward would run, and launch, in another
            yield _planning[thread]
    finally:
        del _planning[thread]
        if before is not None:
            _planning[thread] = before


def planning() -> bool:
    """Whether this thread's calls are planned, not started."""
    return threading.get_ident() in _planning


def _stand_in(index, value):
    if isinstance(value, torch.Tensor):
        check_memory(value)
        if not value.is_contiguous():
            raise ValueError(
                f"kernels take contiguous tensors, received shape {tuple(value.shape)} with strides {value.stride()}"
            )
        return Slot(index, value.shape, NUMPY[value.dtype], value.data_ptr() & 15)
    if isinstance(value, float):
        value = Varying(value)
        value.index = index
    return value


def _array(slot, tensor):
    """The array that a Slot of this tensor stands for."""
    memory = view(tensor)
    if isinstance(memory, np.ndarray):
        return np.ndarray(slot.shape, slot.dtype, memory if memory.size else None, slot.offset)
    return compiler.cupy().ndarray(slot.shape, slot.dtype, memory.data + slot.offset)
