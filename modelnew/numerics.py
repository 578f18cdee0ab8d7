"""The precision of the transposed convolution: numeric classes, and the rule for using tensor cores.

"tf32": operands with 10 mantissa bits, summed in float32. "fp32": float32's precision. "auto": what PyTorch does, which
is torch.backends.cudnn.allow_tf32 on a GPU, and "fp32" on the CPU. 16-bit operands are exact in both classes.
"""

import ast
import contextlib
import functools
import math
from typing import NamedTuple

import numpy as np
import torch
from torch.compiler import is_dynamo_compiling, is_exporting

from cupy_kernels import compiler, conv_transpose_mma, conv_wgrad_mma, nvrtc
from cupy_kernels.common import MULTIPROCESSORS
from cupy_kernels.conv_transpose import Geometry
from cupy_kernels.errors import UnsupportedError
from cupy_kernels.gather_gemm_plan import Gpu
from cupy_kernels.source import SCALARS

from .shortcuts import allows_tf32

NUMERICS = ("auto", "tf32", "fp32")
_switched_off = []
_wgmma_chosen = []
_as_sm75 = []
# What implicit GEMMs leave to the general kernels: what the GPU computes faster than the host starts more kernels, and
# groups of which most of an octet of channels would be padding.
SMALL, FEW_CHANNELS = 2**24, 4
_EMULATED_SHARED_BYTES, _EMULATED_MULTIPROCESSORS = 227 * 1024, MULTIPROCESSORS  # an H100's


def check_numerics(numerics: str) -> None:
    """Raises ValueError unless `numerics` is one of NUMERICS."""
    if numerics not in NUMERICS:
        raise ValueError(f"numerics must be one of {', '.join(NUMERICS)}, received {numerics!r}")


def resolve(numerics: str, device: torch.device) -> str:
    """The class of a convolution on the device, "tf32" or "fp32"."""
    if numerics != "auto":
        return numerics
    return "tf32" if device.type == "cuda" and allows_tf32() and _capability(device.index) >= (8, 0) else "fp32"


class Choice(NamedTuple):
    """How the convolutions of a call multiply. A backward uses its forward's choice, even if settings changed since."""

    cls: str  # "tf32" or "fp32"
    wgmma: bool
    shared_bytes: int  # that a block may use
    multiprocessors: int
    sm75: bool  # whether the tensor-core kernels are those of sm_75
    without: str | None  # why there are no tensor cores

    @property
    def gpu(self) -> Gpu:
        """What implicit GEMMs are planned for."""
        return Gpu(self.wgmma, self.sm75, self.multiprocessors)


def settings():
    """The settings on which `choose` depends."""
    if _switched_off or _wgmma_chosen or _as_sm75:
        return allows_tf32(), bool(_switched_off), bool(_as_sm75), *_wgmma_chosen[-1:]
    return allows_tf32()


def choose(numerics: str, device: torch.device) -> Choice:
    """The choice for a convolution on a tensor's device under the current settings."""
    without = "tensor cores are switched off" if _switched_off else None
    sizes, sm75 = (_EMULATED_SHARED_BYTES, _EMULATED_MULTIPROCESSORS), bool(_as_sm75)
    if device.type == "cuda":
        index = device.index
        sizes, without = (_shared_bytes(index), _multiprocessors(index)), without or _too_old(index)
        sm75 = sm75 or _capability(index) == (7, 5)
    return Choice(resolve(numerics, device), uses_wgmma(device), *sizes, sm75, without)


@torch.compiler.assume_constant_result
def settled(numerics: str, device: torch.device) -> str:
    """`choose` as a string, for operators that take a string. It fixes the choice before the operator runs."""
    return numerics if numerics not in NUMERICS else repr(tuple(choose(numerics, device)))


def settled_in_graph(numerics: str, device: torch.device) -> str:
    """`settled` for a graph of torch.compile, whose caches see what is in the graph, but not our settings.

    An exported program keeps `numerics`, as it may run on another GPU.
    """
    return _settled_unless_exported(numerics, device) if is_dynamo_compiling() else numerics


@torch.compiler.assume_constant_result  # so that is_exporting() runs: torch 2.11 takes it for True in every graph
def _settled_unless_exported(numerics: str, device: torch.device) -> str:
    return numerics if is_exporting() else settled(numerics, device)


def settled_choice(numerics: str, device: torch.device) -> Choice:
    """The choice in a string of `settled`, or for one of NUMERICS the choice under the current settings."""
    return choose(numerics, device) if numerics in NUMERICS else _settled(numerics)


@functools.lru_cache(maxsize=1024)
def _settled(numerics: str) -> Choice:
    return Choice(*ast.literal_eval(numerics))


@contextlib.contextmanager
def without_tensor_cores():
    """A context in which convolutions run on the general kernels, as on a GPU before sm_75."""
    _switched_off.append(True)
    try:
        yield
    finally:
        _switched_off.pop()


@contextlib.contextmanager
def wgmma(use: bool):
    """A context that allows (True) or forbids (False) the wgmma instructions of sm_90a.

    True: wgmma is used where it is possible and faster. The default is True on GPUs with these instructions if an
        NVRTC 12 or newer is installed, CuPy's or another's, and False on the emulator.
    """
    _wgmma_chosen.append(use)
    try:
        yield
    finally:
        _wgmma_chosen.pop()


@contextlib.contextmanager
def as_sm75():
    """A context in which tensor-core kernels are those for compute capability 7.5, such as the T4's, on any GPU."""
    _as_sm75.append(True)
    try:
        yield
    finally:
        _as_sm75.pop()


def tensor_core_plan(x_shape, dtype, w_shape, geometry: Geometry, choice: Choice, dgrad: bool = False, **options):
    """(plan, None) if the tensor-core kernels support the convolution of x, else (None, the reason).

    dtype: of x, NumPy's.
    dgrad: x is the incoming gradient, and the result is the gradient of the input.
    options: `channels_last` and `packed` of `conv_transpose_mma.plan`.
    """
    return plan_or_reason(conv_transpose_mma.plan, x_shape, dtype, w_shape, geometry, choice, dgrad=dgrad, **options)


def wgrad_plan(x_shape, dtype, w_shape, geometry: Geometry, choice: Choice, **options):
    """(plan, None) if the tensor-core kernels support the weight gradient of the convolution of x, else (None, reason).

    dtype: of w, NumPy's.
    options: `channels_last` of `conv_wgrad_mma.plan`.
    """
    return plan_or_reason(conv_wgrad_mma.plan, x_shape, dtype, w_shape, geometry, choice, **options)


def plan_or_reason(*convolution, **options):
    """(`required_plan`, None), or (None, the reason why there is no plan)."""
    try:
        return required_plan(*convolution, **options), None
    except UnsupportedError as error:
        return None, str(error)


def required_plan(make, x_shape, dtype, w_shape, geometry, choice, **options):
    """The plan that `make` returns, for instance conv_transpose_mma.plan. Raises UnsupportedError if there is none."""
    if choice.without:
        raise UnsupportedError(choice.without)
    if choice.sm75:
        raise UnsupportedError("on sm_75 a block has too little shared memory")
    if not x_shape[0]:
        raise UnsupportedError("the batch is empty")
    options.update(dtype=SCALARS[dtype], wgmma=choice.wgmma, shared_limit=choice.shared_bytes)
    options.update(multiprocessors=choice.multiprocessors)
    return make(tuple(x_shape), tuple(w_shape), geometry, _split(dtype, choice), **options)


@functools.lru_cache(maxsize=1024)
def gather_gemm_split(dtype, x_shape, w_shape, geometry: Geometry, choice: Choice):
    """(split, None) if `cupy_kernels.gather_gemm` supports the convolution of x, else (None, the reason).

    dtype: of x, NumPy's.
    """
    products = math.prod(x_shape) * math.prod(w_shape[1:])
    group = min(w_shape[0] // max(1, geometry.groups), w_shape[1])
    reason = choice.without
    if dtype == np.float64:
        reason = reason or "the dtype is float64"
    if choice.sm75 and SCALARS[dtype] == "bf16_t":
        reason = reason or "sm_75 does not multiply bfloat16"
    if products < SMALL:
        reason = reason or f"{products} products are fewer than {SMALL}"
    if geometry.groups > 1 and group < FEW_CHANNELS:
        reason = reason or f"its groups have {group} channels, fewer than {FEW_CHANNELS}"
    return (None, reason) if reason else (_split(dtype, choice), None)


def _split(dtype, choice) -> int:
    return 2 if dtype == np.float32 and choice.cls == "fp32" else 1


def uses_wgmma(device: torch.device) -> bool:
    """Whether plans for tensors on the device may use wgmma."""
    if device.type == "cuda":
        return _wgmma_chosen[-1:] != [False] and has_wgmma(device.index)
    return _wgmma_chosen[-1:] == [True]


@functools.cache
def has_wgmma(device_index: int) -> bool:
    """Whether the GPU has wgmma instructions, and an NVRTC compiles them for this driver."""
    compiles = nvrtc.of_wgmma() if _capability(device_index) == (9, 0) else None
    return compiles is not None and int(compiles.split(".")[0]) <= _drivers_cuda()


@functools.cache
def _drivers_cuda() -> int:
    """The newest major version of CUDA whose code the driver loads."""
    return compiler.cupy().cuda.runtime.driverGetVersion() // 1000


@functools.cache
def _capability(device_index: int) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device_index)


@functools.cache
def _too_old(device_index: int) -> str | None:
    """Why the GPU has no tensor cores that the kernels can use; None if it has."""
    major, minor = _capability(device_index)
    return f"the GPU is sm_{major}{minor}, tensor-core kernels need sm_75" if (major, minor) < (7, 5) else None


@functools.cache
def _shared_bytes(device_index: int) -> int:
    return torch.cuda.get_device_properties(device_index).shared_memory_per_block_optin


@functools.cache
def _multiprocessors(device_index: int) -> int:
    return torch.cuda.get_device_properties(device_index).multi_processor_count
