"""How the transposed convolution multiplies: numeric classes, and the one rule that picks tensor cores or not.

"tf32": operands of 10 mantissa bits, summed in float32. "fp32": float32's precision. "auto": as PyTorch would, which is
torch.backends.cudnn.allow_tf32 on a GPU and float32 on the CPU. 16-bit tensors are exact in either.
"""

import contextlib
import functools
from typing import NamedTuple

import torch

from cupy_kernels import conv_transpose_mma, conv_wgrad_mma, nvrtc
from cupy_kernels.conv_transpose import Geometry

from .interop import FLOATS

NUMERICS = ("auto", "tf32", "fp32")
_switched_off = []
_wgmma_chosen = []
_EMULATED_SHARED_BYTES = 227 * 1024  # an H100's


def check_numerics(numerics: str) -> None:
    """ValueError unless `numerics` is one of NUMERICS."""
    if numerics not in NUMERICS:
        raise ValueError(f"numerics must be one of {', '.join(NUMERICS)}, received {numerics!r}")


def resolve(numerics: str, x: torch.Tensor) -> str:
    """Either "tf32" or "fp32", for a convolution of x."""
    if numerics != "auto":
        return numerics
    # torch.backends.cudnn.allow_tf32 is this function's value, and takes five times as long.
    return "tf32" if x.is_cuda and torch._C._get_cudnn_allow_tf32() else "fp32"


class Choice(NamedTuple):
    """How one call's convolutions multiply. A backward takes its forward's, whatever was switched in between."""

    cls: str  # "tf32" or "fp32"
    tensor_cores: bool
    wgmma: bool


def choose(numerics: str, x: torch.Tensor) -> Choice:
    """What holds now for a convolution of x."""
    return Choice(resolve(numerics, x), not _switched_off, uses_wgmma(x))


@contextlib.contextmanager
def without_tensor_cores():
    """Within the block, convolutions run on the general kernels, as on a GPU before sm_80."""
    _switched_off.append(True)
    try:
        yield
    finally:
        _switched_off.pop()


@contextlib.contextmanager
def wgmma(use: bool):
    """Within the block, plans use sm_90a's wgmma instructions where it is possible and faster, or (False) nowhere.

    By default: on GPUs that have them, if NVRTC is version 12 or newer; nowhere on the emulator.
    """
    _wgmma_chosen.append(use)
    try:
        yield
    finally:
        _wgmma_chosen.pop()


def tensor_core_plan(x: torch.Tensor, w_shape, geometry: Geometry, choice: Choice, dgrad: bool = False):
    """(plan, None) if the tensor-core kernels take the convolution of x, else (None, the reason).

    dgrad: x is the incoming gradient, and the convolution its input gradient.
    """
    return plan_or_reason(conv_transpose_mma.plan, x, w_shape, geometry, choice, dgrad=dgrad)


def wgrad_plan(x: torch.Tensor, w_shape, geometry: Geometry, choice: Choice):
    """(plan, None) if the tensor-core kernels take the weight gradient of the convolution of x, else (None, reason)."""
    return plan_or_reason(conv_wgrad_mma.plan, x, w_shape, geometry, choice)


def plan_or_reason(make, x, w_shape, geometry, choice, **options):
    """(`required_plan`, None), or (None, the reason why there is none)."""
    if not choice.tensor_cores:
        return None, "tensor cores are switched off"
    try:
        return required_plan(make, x, w_shape, geometry, choice, **options), None
    except conv_transpose_mma.UnsupportedError as error:
        return None, str(error)


def required_plan(make, x, w_shape, geometry, choice, **options):
    """What `make`, such as conv_transpose_mma.plan, plans for x on its device. UnsupportedError if there is no plan."""
    if x.is_cuda and _capability(x.device.index) < (8, 0):
        major, minor = _capability(x.device.index)
        raise conv_transpose_mma.UnsupportedError(f"the GPU is sm_{major}{minor}, tensor-core kernels need sm_80")
    if not x.shape[0]:
        raise conv_transpose_mma.UnsupportedError("the batch is empty")
    split = 2 if x.dtype == torch.float32 and choice.cls == "fp32" else 1
    options["dtype"], options["wgmma"] = FLOATS[x.dtype], choice.wgmma
    options["shared_limit"] = _shared_bytes(x.device.index) if x.is_cuda else _EMULATED_SHARED_BYTES
    return make(tuple(x.shape), tuple(w_shape), geometry, split, **options)


def uses_wgmma(x: torch.Tensor) -> bool:
    """Whether plans for x may use wgmma."""
    if x.is_cuda:
        return _wgmma_chosen[-1:] != [False] and has_wgmma(x.device.index)
    return _wgmma_chosen[-1:] == [True]


@functools.cache
def has_wgmma(device_index: int) -> bool:
    """Whether the GPU has wgmma instructions, and NVRTC knows them."""
    return _capability(device_index) == (9, 0) and nvrtc.knows_wgmma()


@functools.cache
def _capability(device_index: int) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device_index)


@functools.cache
def _shared_bytes(device_index: int) -> int:
    return torch.cuda.get_device_properties(device_index).shared_memory_per_block_optin
