"""The border between torch and the kernels: DLPack views of tensors, on the tensors' device and torch's stream."""

import contextlib
import functools
import math
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
import torch
from torch.utils.dlpack import to_dlpack

from cupy_kernels import compiler, emulator
from cupy_kernels.launch import observing, recorded, repeat
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
        if not tensor.data_ptr() and tensor.numel():
            raise RuntimeError("received a tensor without memory: its storage was freed, or it is a fake tensor")
        dtype = np.dtype(str(tensor.dtype).removeprefix("torch."))
        self.tensor = tensor
        self.__array_interface__ = {
            "data": (tensor.data_ptr(), False),  # not read-only
            "shape": tuple(tensor.shape),
            "strides": tuple(step * dtype.itemsize for step in tensor.stride()),
            "typestr": dtype.str,
            "version": 3,
        }


_MOST_KNOWN = 1000


@until_overridden
def _known() -> dict:
    """{what a call of `run` was given: (index of the GPU, its launches)}"""
    return {}


def run(operation, *args, like=None, **options) -> None:
    """operation(*args, **options), with what `arrays` makes of `args`; the operation launches kernels and no more.

    like: something hashable from which options, shapes, dtypes and the device of all tensors, and layouts of workspaces
        follow, so that they need not be looked at to find out whether a call is like an earlier one. `args` are then
        tensors, workspaces and None.

    Kernels go to the tensors' device and to torch's current stream there, CPU tensors to the emulator. RuntimeError if
    the tensors are not on one device, or on one that is neither a CUDA GPU nor the CPU.

    What is launched follows from the operation, its options, and where tensors of which kind lie. torch's allocator
    gives a loop's tensors the same places over and over, so the launches of a call are kept, and a call like it
    starts them again, without views and checks: small tensors wait for the host.
    """
    if like is None:
        key = (operation, *map(_facts, args), *options, *map(_facts, options.values()))
    else:
        key = (operation, like, *[None if arg is None else arg.data_ptr() for arg in args])
    known = _known()
    found = known.get(key)
    if found is not None and not observing():
        index, launches = found
        with _nothing if index == torch.cuda.current_device() else torch.cuda.device(index):
            repeat(launches, _raw_stream(index))
        return
    device = one_device(args)
    with launching_on(device), recorded() as launches:
        operation(*arrays(*args), **options)
    if device.type == "cuda":
        remember(known, key, (device.index, launches))


def remember(known: dict, key, value) -> None:
    """known[key] = value, of which there are never more than _MOST_KNOWN: then all begins anew."""
    if len(known) == _MOST_KNOWN:
        known.clear()
    known[key] = value


def _facts(arg):
    if isinstance(arg, torch.Tensor):
        # Launches take contiguous tensors alone, whose strides follow from their shape.
        return arg.data_ptr(), arg.dtype, arg.device, arg.shape, arg.is_contiguous()
    if isinstance(arg, Workspace):
        return arg.data_ptr(), arg.memory.device, arg.layout
    return arg.hex() if isinstance(arg, float) else arg  # 0.0 equals -0.0


def arrays(*args) -> list:
    """`args` with an array in place of each tensor, and {name: array} in place of each `Workspace`.

    For operations inside `launching_on`. Arrays keep the memory that they show, as tensors do.
    """
    return [
        view(arg) if isinstance(arg, torch.Tensor) else _parts(arg) if isinstance(arg, Workspace) else arg
        for arg in args
    ]


def _parts(workspace):
    memory = view(workspace.memory)
    places = workspace.layout.places.items()
    if isinstance(memory, np.ndarray):
        return {name: np.ndarray(shape, dtype, memory, offset) for name, (offset, shape, dtype) in places}
    array, start = compiler.cupy().ndarray, memory.data
    return {name: array(shape, dtype, start + offset) for name, (offset, shape, dtype) in places}


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
    """The tensor as kernels read it: contiguous in its logical order, without lazy negation. Copies only if it must."""
    if tensor is None or (tensor.is_contiguous() and not tensor.is_neg()):
        return tensor
    return tensor.detach().resolve_neg().contiguous()


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
