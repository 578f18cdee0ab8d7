"""The border between torch and the kernels: DLPack views of tensors, on the tensors' device and torch's stream."""

import contextlib

import torch
from torch.utils.dlpack import to_dlpack

from cupy_kernels import compiler

# What kernels compute with, and their name for it.
FLOATS = {torch.float32: "float", torch.float64: "double", torch.float16: "half_t", torch.bfloat16: "bf16_t"}


class _Capsule:
    """A tensor as DLPack's protocol wants it, without the stream synchronisation of torch's own `__dlpack__`.

    The view is used on the stream that the tensor belongs to, so there is nothing to wait for; and waiting would break
    the capture of a CUDA graph and costs 14 us a tensor.
    """

    def __init__(self, tensor):
        self.tensor = tensor

    def __dlpack__(self, **_):
        return to_dlpack(self.tensor)

    def __dlpack_device__(self):
        return (2, self.tensor.device.index)  # kDLCUDA


def view(tensor: torch.Tensor):
    """A CuPy (GPU) or NumPy (CPU) array that shares the tensor's memory. bfloat16 travels as int16."""
    tensor = tensor.detach()
    if tensor.dtype == torch.bfloat16:
        tensor = tensor.view(torch.int16)
    if tensor.is_cuda:
        return compiler.cupy().from_dlpack(_Capsule(tensor))
    return tensor.numpy()  # NumPy's from_dlpack returns a read-only array


def run(operation, *args, **options):
    """operation(*args, **options) with every tensor among `args` replaced by its view.

    Kernels go to the tensors' device and to torch's current stream there, CPU tensors to the emulator. RuntimeError if
    the tensors are not on one device, or on one that is neither a CUDA GPU nor the CPU.
    """
    with _launching_on(one_device(args)):
        return operation(*(view(a) if isinstance(a, torch.Tensor) else a for a in args), **options)


def one_device(args) -> torch.device:
    """The device of all tensors in `args`; RuntimeError if they are on several, or on one that no kernel runs on."""
    devices = {a.device for a in args if isinstance(a, torch.Tensor)}
    if len(devices) > 1:
        raise RuntimeError(
            f"tensors must be on one device, received {', '.join(sorted(map(str, devices)))}; use .to(...)"
        )
    (device,) = devices
    if device.type not in ("cuda", "cpu"):
        raise RuntimeError(f"kernels run on CUDA GPUs, or on the CPU by emulation; received tensors on {device}")
    return device


@contextlib.contextmanager
def _launching_on(device):
    if device.type == "cpu":
        yield
        return
    cuda = compiler.cupy().cuda
    with cuda.Device(device.index), cuda.ExternalStream(torch.cuda.current_stream(device).cuda_stream, device.index):
        yield


def dense(tensor: torch.Tensor | None) -> torch.Tensor | None:
    """The tensor as kernels read it: contiguous in its logical order, without lazy negation. Copies only if it must."""
    return None if tensor is None else tensor.detach().resolve_neg().contiguous()


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
    values = (value, value) if isinstance(value, int) else tuple(value)
    if len(values) == 1:
        values *= 2
    if len(values) != 2 or not all(isinstance(v, int) for v in values):
        raise ValueError(f"{name} must be an int or a pair of ints, received {value!r}")
    return values
