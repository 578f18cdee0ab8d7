"""The border between torch and the kernels: DLPack views of tensors, on the tensors' device and torch's stream."""

import contextlib
import functools
import math
import threading
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
import torch
from torch.utils.dlpack import to_dlpack

from cupy_kernels import compiler, emulator
from cupy_kernels.launch import Varying, observing
from cupy_kernels.plan import Plan, Slot
from cupy_kernels.source import Kernel, until_overridden

# What kernels compute with, and their name for it.
FLOATS = {torch.float32: "float", torch.float64: "double", torch.float16: "half_t", torch.bfloat16: "bf16_t"}


class Layout:
    """Where arrays, {name: (shape, NumPy type)}, lie in one piece of memory."""

    def __init__(self, arrays: dict[str, tuple[tuple[int, ...], type]]):
        self.places, self.size = {}, 0
        for name, (shape, dtype) in arrays.items():
            self.places[name] = (self.size, shape, dtype)
            self.size += -(-math.prod(shape) * np.dtype(dtype).itemsize // 256) * 256


class Workspace(NamedTuple):
    """Many arrays in one tensor: one allocation, one DLPack view and one saved tensor for all of them."""

    memory: torch.Tensor
    layout: Layout

    @classmethod
    def empty(cls, layout: Layout, device: torch.device) -> "Workspace":
        return cls(torch.empty(layout.size, dtype=torch.uint8, device=device), layout)

    def data_ptr(self) -> int:
        """The address where the arrays begin."""
        return self.memory.data_ptr()


def view(tensor: torch.Tensor):
    """A CuPy (GPU) or NumPy (CPU) array that shares the tensor's memory. bfloat16 travels as int16.

    On a GPU CuPy gets the bare DLPack capsule. The protocol around it, `__dlpack__`, would make streams wait for each
    other; but the view is used on the stream that the tensor belongs to, waiting breaks the capture of a CUDA graph,
    and the protocol costs several times the view itself.
    RuntimeError if the tensor's values are not what its memory holds.
    """
    if tensor.is_neg() or tensor.is_conj():
        raise RuntimeError("received a negated or conjugated view of other memory: use resolve_neg(), resolve_conj()")
    if tensor.requires_grad:
        tensor = tensor.detach()
    if tensor.dtype == torch.bfloat16:
        tensor = tensor.view(torch.int16)
    if tensor.is_cuda:
        return compiler.cupy().from_dlpack(to_dlpack(tensor))
    return np.asarray(_Memory(tensor))


class _Memory:
    """What NumPy makes an array from; it keeps the tensor's memory while there is such an array.

    After `tensor.numpy()` the storage could never be resized again, which FSDP does. NumPy's from_dlpack returns a
    read-only array.
    """

    def __init__(self, tensor: torch.Tensor):
        dtype = np.dtype(str(tensor.dtype).removeprefix("torch."))
        self.tensor = tensor
        self.__array_interface__ = {
            "data": (tensor.data_ptr(), False),  # not read-only
            "shape": tuple(tensor.shape),
            "strides": tuple(step * dtype.itemsize for step in tensor.stride()),
            "typestr": dtype.str,
            "version": 3,
        }


# What the kernels' host code takes for a tensor's dtype. bfloat16 travels as int16.
NUMPY = {
    torch.float32: np.dtype(np.float32),
    torch.float64: np.dtype(np.float64),
    torch.float16: np.dtype(np.float16),
    torch.bfloat16: np.dtype(np.int16),
    torch.uint8: np.dtype(np.uint8),
    torch.int32: np.dtype(np.int32),
    torch.int64: np.dtype(np.int64),
}

_MOST_KNOWN = 4096


@until_overridden
def _thread():
    """Whose __dict__ is each thread's {key of a call: (its plan, the index of the GPU, or None)}."""
    return threading.local()


def run(operation, *args, like=None, **options) -> None:
    """operation(*args, **options), with stand-ins for the tensors and workspaces; it launches kernels and no more.

    What it launches is recorded once for each kind of call, as a `plan.Plan`, and started with the tensors of this one.
    Floats may differ from call to call: the operation passes them on to kernels as they are.

    like: something hashable from which options, shapes, dtypes and the device of all tensors, and layouts of workspaces
        follow, so that they need not be looked at. Floats are told apart from it.

    Kernels go to the tensors' device and to torch's current stream there, CPU tensors to the emulator. RuntimeError if
    the tensors are not on one device, or on one that is neither a CUDA GPU nor the CPU.
    """
    values = (*args, *options.values())
    pointers = [value.data_ptr() if isinstance(value, _MEMORY) else 0 for value in values]
    if like is None:
        key = (operation, *options, *map(_facts, values, pointers))
    else:
        key = (operation, like, *map(_alignment, pointers))
    known = _thread().__dict__
    found = known.get(key)
    if found is None:
        device = one_device(values)
        stand_ins = [_stand_in(index, value) for index, value in enumerate(values)]
        plan = Plan(operation, stand_ins[: len(args)], dict(zip(options, stand_ins[len(args) :])))
        found = plan, device.index if device.type == "cuda" else None
        remember(known, key, found)
    plan, index = found
    if observing():
        plan.notify(lambda slot: _array(slot, values[slot.index]), values)
    if index is None:
        plan.emulate(lambda slot: _array(slot, values[slot.index]), values)
    else:
        with _nothing if index == torch.cuda.current_device() else torch.cuda.device(index):
            plan.start(pointers, values, _raw_stream(index))


def remember(known: dict, key, value) -> None:
    """known[key] = value. Of _MOST_KNOWN the oldest goes: to make it anew costs little."""
    if len(known) >= _MOST_KNOWN:
        known.pop(next(iter(known)), None)
    known[key] = value


_MEMORY = (torch.Tensor, Workspace)


def _facts(value, pointer):
    if isinstance(value, torch.Tensor):
        return value.shape, value.dtype, value.device, _alignment(pointer), value.is_contiguous()
    if isinstance(value, Workspace):
        return value.layout, value.memory.device
    return float if isinstance(value, float) else value


def _alignment(pointer):
    return pointer & 15 if pointer else None


def _stand_in(index, value):
    if isinstance(value, torch.Tensor):
        if value.numel() and not value.data_ptr():
            raise RuntimeError("received a tensor without memory: its storage was freed, or it is a fake tensor")
        if not value.is_contiguous():
            raise ValueError(
                f"kernels take contiguous tensors, received shape {tuple(value.shape)} with strides {value.stride()}"
            )
        return Slot(index, value.shape, NUMPY[value.dtype], value.data_ptr() & 15)
    if isinstance(value, Workspace):
        places = value.layout.places.items()
        return {
            name: Slot(index, shape, dtype, value.data_ptr() & 15, offset) for name, (offset, shape, dtype) in places
        }
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


def one_device(args) -> torch.device:
    """The device of all tensors in `args`; RuntimeError if they are on several, or on one that no kernel runs on."""
    tensors = [arg.memory if isinstance(arg, Workspace) else arg for arg in args]
    tensors = [tensor for tensor in tensors if isinstance(tensor, torch.Tensor)]
    device = tensors[0].device
    for tensor in tensors:
        if tensor.device != device:
            received = ", ".join(sorted({str(t.device) for t in tensors}))
            raise RuntimeError(f"tensors must be on one device, received {received}; use .to(...)")
    if device.type not in ("cuda", "cpu"):
        raise RuntimeError(f"kernels run on CUDA GPUs, or on the CPU by emulation; received tensors on {device}")
    return device


def compile_together(kernels: Iterable[Kernel], device: torch.device) -> None:
    """Compiles those of `kernels` that are not compiled yet, at the same time. To be called once, not at each call."""
    prepare = compiler.prepare if device.type == "cuda" else emulator.prepare
    with launching_on(device):
        prepare(kernels)


_nothing = contextlib.nullcontext()


def launching_on(device: torch.device):
    """A context in which CuPy launches on `device`, if that is a GPU, and on torch's current stream there."""
    if device.type == "cpu":
        return _nothing
    cuda = compiler.cupy().cuda
    index = torch.cuda.current_device() if device.index is None else device.index
    stream = _raw_stream(index)
    if cuda.runtime.getDevice() == index and cuda.get_current_stream().ptr == stream:
        return _nothing
    return _switched(cuda, index, stream)


def _raw_stream(device_index):
    return torch._C._cuda_getCurrentRawStream(device_index)  # the current stream, without the object around it


@contextlib.contextmanager
def _switched(cuda, device_index, stream):
    with cuda.Device(device_index), _stream(stream, device_index):
        yield


@functools.cache
def _stream(pointer, device_index):
    """CuPy's object for a stream of torch's. Call it with the device current."""
    stream = compiler.cupy().cuda.Stream
    if hasattr(stream, "from_external"):  # since CuPy 14
        return stream.from_external(_ExternalStream(pointer))
    return compiler.cupy().cuda.ExternalStream(pointer, device_index)


class _ExternalStream(NamedTuple):
    pointer: int

    def __cuda_stream__(self):
        return 0, self.pointer


def dense(tensor: torch.Tensor | None) -> torch.Tensor | None:
    """The tensor as kernels read it: contiguous in its logical order, without lazy negation. Copies only if it must.

    Autograd sees the copy: a Function that keeps its input for a backward is given the result of this.
    """
    if tensor is None or (tensor.is_contiguous() and not tensor.is_neg()):
        return tensor
    return tensor.resolve_neg().contiguous()


def aligned(tensor: torch.Tensor) -> torch.Tensor:
    """`dense`, at an address that is a multiple of 16, which kernels that read 16 bytes at a time insist on."""
    tensor = dense(tensor)
    return tensor.clone() if tensor.data_ptr() % 16 else tensor


def check_floating(**tensors: torch.Tensor | None) -> None:
    """TypeError unless every named tensor (None left out) has a dtype that kernels compute with."""
    for name, tensor in tensors.items():
        if tensor is not None and tensor.dtype not in FLOATS:
            raise TypeError(f"{name} must be float32, float64, float16 or bfloat16, received {tensor.dtype}")


def check_parameters(input: torch.Tensor, **parameters: torch.Tensor | None) -> None:
    """TypeError unless the tensors (None left out) share one dtype: input's, or float32 where that has 16 bits."""
    check_floating(input=input, **parameters)
    allowed = {input.dtype, accumulator_dtype(input)}
    dtypes = {name: tensor.dtype for name, tensor in parameters.items() if tensor is not None}
    if len(set(dtypes.values())) > 1 or not allowed.issuperset(dtypes.values()):
        received = ", ".join(f"{name} {dtype}" for name, dtype in dtypes.items())
        choice = " or all ".join(sorted(map(str, allowed)))
        raise TypeError(f"with input {input.dtype}, {' and '.join(dtypes)} must be all {choice}; received {received}")


def accumulator_dtype(tensor: torch.Tensor) -> torch.dtype:
    """dtype of statistics, partial sums and workspaces for a tensor: float64 for float64, else float32."""
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def pair(value, name: str) -> tuple[int, int]:
    """(value, value) for an int, (a, b) for two of them. TypeError or ValueError for anything else."""
    if isinstance(value, int):
        return value, value
    values = tuple(value)
    if len(values) == 1:
        values *= 2
    if len(values) != 2 or not (isinstance(values[0], int) and isinstance(values[1], int)):
        raise ValueError(f"{name} must be an int or a pair of ints, received {value!r}")
    return values
