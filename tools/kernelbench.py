"""ConvTranspose2d -> BatchNorm2d -> Tanh -> MaxPool2d -> GroupNorm, KernelBench level 2 problem 11, on CUDA C kernels.

CuPy compiles the kernels (NVRTC: neither nvcc nor a C++ compiler is needed) and calls them on PyTorch's tensors, by
DLPack views, in torch's current stream. All operators are fused, forward and backward. The convolution's precision is
the one that torch.backends.cudnn.allow_tf32 chooses. For GPUs of compute capability 8.0 or newer, and the shapes that
tensor-core kernels take: stride 1, channels in multiples of 16 up to 512, kernels up to 7x7, images up to 64x64. Others
are refused.
"""

import functools
import tempfile

import numpy as np
import torch
from torch import nn

from cupy_kernels.nvrtc import STANDARD, WGMMA_MAJOR, preload_wheels, ptx_architecture
from cupy_kernels.source import Kernel, Variant, expanded, signature
from modelnew.functional.batch_norm import BatchNorm2d
from modelnew.functional.conv_transpose import ConvTranspose2d
from modelnew.functional.group_norm import GroupNorm
from modelnew.functional.resident_conv_bn_pool import run
from modelnew.interop import TORCH, launching_on, one_device, view
from modelnew.numerics import required_plan

KERNELS: dict[str, str] = {}  # file name: text


def text(file: str) -> str:
    """Text of one of KERNELS."""
    return KERNELS[file]


@functools.cache
def cupy():
    """CuPy, with CUDA 11's libraries loaded first where they are installed as wheels."""
    preload_wheels()
    import cupy

    return cupy


@functools.cache
def module(variant: Variant, device: int):
    """The compiled text of a file, kept on disk by CuPy, unless it is for what CuPy does not compile for."""
    options, nvrtc = (STANDARD, *(f"-D{name}={value}" for name, value in variant.defines)), cupy().cuda.nvrtc
    text = expanded(variant.file)
    capability = cupy().cuda.Device(device).compute_capability
    architecture = variant.architecture or ptx_architecture(capability, nvrtc.getSupportedArchs())
    if not architecture:
        return cupy().RawModule(code=text, options=options)
    program = nvrtc.createProgram(text, variant.file, (), ())
    nvrtc.compileProgram(program, (*options, "-ftz=true", f"-arch={architecture}"))
    with tempfile.NamedTemporaryFile() as code:
        code.write(nvrtc.getPTX(program) if architecture.startswith("compute_") else nvrtc.getCUBIN(program))
        code.flush()
        found = cupy().RawModule(path=code.name)
        found.compile()
    return found


@functools.cache
def function(kernel: Kernel, device: int, shared_bytes: int):
    """A compiled kernel on one device that may have this much shared memory."""
    found = module(kernel.variant, device).get_function(kernel.name)
    if shared_bytes > 48 * 1024:
        found.max_dynamic_shared_size_bytes = shared_bytes
    return found


def launch(kernel: Kernel, grid, block, args, shared_bytes: int = 0) -> None:
    """Starts a kernel on the current device, in CuPy's current stream. Numbers get the types that it declares."""
    pairs = zip(signature(kernel), args, strict=True)
    cast = [np.uint64(0) if arg is None else arg if p.pointer else p.dtype.type(arg) for p, arg in pairs]
    function(kernel, cupy().cuda.runtime.getDevice(), shared_bytes)(grid, block, cast, shared_mem=shared_bytes)


def _differentiable_gradients(*_):
    """Refuses create_graph: this file has the fused kernels alone."""
    raise RuntimeError("the kernels in this file compute first derivatives: call backward without create_graph")


def gradients(new, x, w, dy, x_shape, w_shape, *_):
    """Refuses shapes whose gradients need other kernels than this file has."""
    raise ValueError(
        f"this file has no kernels for gradients of an input {tuple(x_shape)} and a weight {tuple(w_shape)} on this "
        "GPU: use the package"
    )


class New:
    """Makes the arrays of a call, in torch's memory."""

    def __init__(self, device):
        self.device, self.tensors = device, {}

    def __call__(self, shape, dtype):
        """An array of which `call` returns the tensor."""
        tensor = torch.empty(shape, dtype=TORCH[np.dtype(dtype)], device=self.device)
        array = view(tensor)
        self.tensors[id(array)] = array, tensor
        return array

    scratch = __call__

    def like(self, array):
        """An array of another's shape and dtype; None for None."""
        return None if array is None else self(array.shape, array.dtype)


def call(operation, *args, check=None, **options):
    """operation(new, *args, **options) with arrays in place of tensors, and tensors in place of what it returns."""
    if check is not None:
        check()
    device = one_device(args)
    new = New(device)
    with launching_on(device):
        results = operation(new, *[view(a) if isinstance(a, torch.Tensor) else a for a in args], **options)
    return tuple(None if array is None else new.tensors[id(array)][1] for array in results)


@functools.cache
def has_wgmma(device: int) -> bool:
    """Whether the GPU and NVRTC have sm_90a's wgmma instructions."""
    return torch.cuda.get_device_capability(device) == (9, 0) and cupy().cuda.nvrtc.getVersion()[0] >= WGMMA_MAJOR


def uses_wgmma(device: torch.device) -> bool:
    """Whether plans for tensors on the device may use them."""
    return device.type == "cuda" and has_wgmma(device.index)


def plan_or_reason(*convolution, **options):
    """(plan, None); raises an error that says why if tensor cores do not take this convolution."""
    return required_plan(*convolution, **options), None


class ModelNew(nn.Module):
    """The reference's arguments, parameters and buffers, drawn and named as there. `groups` is unused, as there."""

    def __init__(self, in_channels, out_channels, kernel_size, stride, padding, groups, num_groups):
        super().__init__()
        if stride != 1:
            raise ValueError(f"the kernels in this file take stride 1, received {stride}")
        self.conv_transpose = ConvTranspose2d(in_channels, out_channels, kernel_size, stride, padding)
        self.batch_norm = BatchNorm2d(out_channels)
        self.group_norm = GroupNorm(num_groups, out_channels)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        conv, norm, group = self.conv_transpose, self.batch_norm, self.group_norm
        convolution = conv.weight, conv.bias, conv.padding
        after = "tanh", 0.0, group.num_groups, group.weight, group.bias, group.eps, "auto", None
        return run(x, (*norm.arguments(x), norm.counter()), *convolution, *after)


batch_size = 512
in_channels = 64
out_channels = 128
height = width = 32
kernel_size = 5
stride = 1
padding = 1
groups = 8
num_groups = 8


def get_inputs():
    """[x] of the reference's shape, uniform in [0, 1)."""
    return [torch.rand(batch_size, in_channels, height, width)]


def get_init_inputs():
    """Arguments of ModelNew."""
    return [in_channels, out_channels, kernel_size, stride, padding, groups, num_groups]
