"""The border between torch and the kernels: DLPack views of tensors, on the tensors' device and torch's stream."""

import contextlib
import functools
import numbers
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
import torch
from torch.utils.dlpack import to_dlpack

from cupy_kernels import compiler, emulator
from cupy_kernels.backend import Backend
from cupy_kernels.source import Kernel

from .shortcuts import raw_stream

# What kernels compute with, and their name for it.
FLOATS = {torch.float32: "float", torch.float64: "double", torch.float16: "half_t", torch.bfloat16: "bf16_t"}


def view(tensor: torch.Tensor):
    """A CuPy (GPU) or NumPy (CPU) array that shares the tensor's memory. bfloat16 is viewed as int16.

    On a GPU, CuPy gets the bare DLPack capsule. The protocol `__dlpack__` would synchronise streams, which is not
    needed on the tensor's own stream, breaks the capture of a CUDA graph, and takes several times as long.

    Raises RuntimeError if the tensor's values are not what its memory holds.
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
    """The object from which NumPy makes an array. It keeps the tensor alive as long as the array.

    After `tensor.numpy()` the storage could not be resized any more, which FSDP does. NumPy's from_dlpack returns a
    read-only array.
    """

    def __init__(self, tensor: torch.Tensor):
        check_memory(tensor)
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
    torch.bool: np.dtype(np.bool_),
    torch.int8: np.dtype(np.int8),
    torch.uint8: np.dtype(np.uint8),
    torch.uint32: np.dtype(np.uint32),
    torch.uint64: np.dtype(np.uint64),
    torch.int32: np.dtype(np.int32),
    torch.int64: np.dtype(np.int64),
}
TORCH = {array: tensor for tensor, array in NUMPY.items()}


def one_device(args) -> torch.device:
    """The device of all tensors in `args`. Raises RuntimeError if they are on several devices."""
    tensors = [arg for arg in args if isinstance(arg, torch.Tensor)]
    device = tensors[0].device
    for tensor in tensors:
        if tensor.device != device:
            received = ", ".join(sorted({str(t.device) for t in tensors}))
            raise RuntimeError(f"tensors must be on one device, received {received}; use .to(...)")
    return device


def compile_together(kernels: Iterable[Kernel], device: torch.device) -> None:
    """Compiles the kernels that are not compiled yet, in parallel. Call it once, not before each launch."""
    with launching_on(device):
        backend(device).prepare(kernels)


def backend(device: torch.device) -> Backend:
    """The backend that runs kernels on the device. Raises RuntimeError if there is none."""
    if device.type not in ("cuda", "cpu"):
        raise RuntimeError(f"kernels run on CUDA GPUs, or on the CPU by emulation; received tensors on {device}")
    return (compiler if device.type == "cuda" else emulator).backend


_nothing = contextlib.nullcontext()


def launching_on(device: torch.device):
    """A context in which CuPy launches on `device`, if it is a GPU, in torch's current stream there."""
    if device.type == "cpu":
        return _nothing
    cuda = compiler.cupy().cuda
    index = torch.cuda.current_device() if device.index is None else device.index
    stream = raw_stream(index)
    if cuda.runtime.getDevice() == index and cuda.get_current_stream().ptr == stream:
        return _nothing
    return _switched(cuda, index, stream)


@contextlib.contextmanager
def _switched(cuda, device_index, stream):
    with cuda.Device(device_index), _stream(stream, device_index):
        yield


@functools.cache
def _stream(pointer, device_index):
    """CuPy's object for a torch stream. The device must be current."""
    stream = compiler.cupy().cuda.Stream
    if hasattr(stream, "from_external"):  # since CuPy 14
        return stream.from_external(_ExternalStream(pointer))
    return compiler.cupy().cuda.ExternalStream(pointer, device_index)


class _ExternalStream(NamedTuple):
    pointer: int

    def __cuda_stream__(self):
        return 0, self.pointer


def check_memory(tensor: torch.Tensor) -> None:
    """Raises RuntimeError for a tensor that has elements but no memory."""
    if tensor.numel() and not tensor.data_ptr():
        raise RuntimeError("received a tensor without memory: its storage was freed, or it is a fake tensor")


def dense(tensor: torch.Tensor | None) -> torch.Tensor | None:
    """The tensor as kernels read it: contiguous, without lazy negation. Copies only if necessary.

    Autograd records the copy. A Function that saves its input must get the result of `dense`.
    """
    if tensor is None or (tensor.is_contiguous() and not tensor.is_neg()):
        return tensor
    return tensor.resolve_neg().contiguous()


def aligned(tensor: torch.Tensor) -> torch.Tensor:
    """`dense`, at an address that is a multiple of 16, for kernels that read 16 bytes at a time."""
    tensor = dense(tensor)
    return tensor.clone() if tensor.data_ptr() % 16 else tensor


def check_floating(**tensors: torch.Tensor | None) -> None:
    """Raises TypeError unless every named tensor (None is allowed) has a dtype that kernels support."""
    for name, tensor in tensors.items():
        if tensor is not None and tensor.dtype not in FLOATS:
            raise TypeError(f"{name} must be float32, float64, float16 or bfloat16, received {tensor.dtype}")


def check_parameters(input: torch.Tensor, **parameters: torch.Tensor | None) -> None:
    """Raises TypeError unless the tensors (None is allowed) share input's dtype, or float32 if input has 16 bits."""
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


def number(value, name: str) -> float:
    """A number, or a tensor with one element, as a float.

    Raises TypeError for anything else, and ValueError for a number beyond all floats.
    """
    if type(value) is float:
        return value
    single = isinstance(value, torch.Tensor) and value.numel() == 1 and not value.is_complex()
    if not single and not isinstance(value, numbers.Real):
        raise TypeError(f"{name} must be a number, received {value!r}")
    try:
        return float(value)
    except OverflowError:
        raise ValueError(f"{name} must be a number that a float can hold, received one beyond 1.8e308") from None


def flag(value, name: str) -> bool:
    """A bool, also of NumPy, a symbol, or an int. Raises TypeError for anything else, as for "False", which is true."""
    if type(value) is bool:
        return value
    if not isinstance(value, int | np.bool_ | torch.SymBool):
        raise TypeError(f"{name} must be True or False, received {value!r}")
    return bool(value)


def integer(value, name: str) -> int:
    """A whole number, also of NumPy or in a tensor, as an int. Raises TypeError for anything else."""
    if type(value) is int:
        return value
    if not _is_whole(value):
        raise TypeError(f"{name} must be an int, received {value!r}")
    return int(value)


def pair(value, name: str) -> tuple[int, int]:
    """(value, value) for a whole number, (a, b) for a tuple or list of two. Raises ValueError for anything else."""
    if type(value) is int:
        return value, value
    if type(value) is tuple and len(value) == 2 and type(value[0]) is int and type(value[1]) is int:
        return value
    values = tuple(value) if isinstance(value, tuple | list) else (value,)
    if len(values) not in (1, 2) or not all(map(_is_whole, values)):
        raise ValueError(f"{name} must be an int or a pair of ints, received {value!r}")
    return int(values[0]), int(values[-1])


def _is_whole(value) -> bool:
    if isinstance(value, torch.Tensor):
        return value.dim() == 0 and not value.is_floating_point() and not value.is_complex()
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)
