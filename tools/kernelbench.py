"""ConvTranspose2d -> BatchNorm2d -> Tanh -> MaxPool2d -> GroupNorm, KernelBench level 2 problem 11, on CUDA C kernels.

CuPy compiles the kernels (NVRTC: neither nvcc nor a C++ compiler is needed) and starts them on the memory of PyTorch's
tensors, in torch's current stream. All operators are fused, forward and backward. The convolution's precision is the
one that torch.backends.cudnn.allow_tf32 chooses. For contiguous float32 tensors on GPUs of compute capability 8.0 or
newer, and the shapes that tensor-core kernels take: stride 1, channels in multiples of 16 up to 512, kernels up to 7x7,
images up to 70x70, before and behind the convolution. Others are refused.

The first call of a kind records which kernels it starts on what (`call`). Later calls only allocate and start them.
"""

import functools
import math
import re
import tempfile
from typing import NamedTuple

import torch
from torch import nn

from cupy_kernels import driver
from cupy_kernels.launch import NULL, Batch, Step
from cupy_kernels.nvrtc import STANDARD, WGMMA_MAJOR, preload_wheels, ptx_architecture
from cupy_kernels.plan import ALIGNMENT, Slot
from cupy_kernels.source import Kernel, Variant, overlapping, signature
from modelnew.functional.resident_conv_bn_pool import Setting, _backward, _forward
from modelnew.interop import NUMPY, TORCH
from modelnew.numerics import Choice, required_plan

KERNELS: dict[str, str] = {}  # file name: text
IMAGE_SUMS = """
extern "C" __global__ void __launch_bounds__(32) image_sums(const float* x, float* sums, int pixels) {
    double sum = 0;
    for (int i = threadIdx.x; i < pixels; i += 32) sum += x[(size_t)blockIdx.x * pixels + i];
    for (int lanes = 16; lanes; lanes /= 2) sum += __shfl_down_sync(0xFFFFFFFFu, sum, lanes);
    if (threadIdx.x == 0) sums[blockIdx.x] = (float)sum;
}
"""


@functools.cache
def expanded(file: str) -> str:
    """Text of one of KERNELS with every `#include "..."` replaced by that file's text, each file once."""
    files, seen = {**KERNELS, "image_sums.cu": IMAGE_SUMS}, set()

    def included(name):
        known = name[1] in seen
        seen.add(name[1])
        return "" if known else re.sub(r'^#include "(.+)"$', included, files[name[1]], flags=re.MULTILINE)

    return included((None, file))


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
    """A compiled kernel on one device that may have this much shared memory, as CuPy's."""
    found = module(kernel.variant, device).get_function(kernel.name)
    if shared_bytes + found.shared_size_bytes > 48 * 1024:
        found.max_dynamic_shared_size_bytes = shared_bytes
    return found


class Backend:
    """Starts kernels on one GPU, for `Batch`."""

    def __init__(self, device: int | None):
        self.device, self.launch = device, cupy().cuda.driver.launchKernel

    def handle(self, kernel: Kernel, shared_bytes: int) -> int:
        """The compiled kernel."""
        return function(kernel, self.device, shared_bytes).kernel.ptr

    def config(self, step: Step):
        """What starts a kernel that may start while the one before it ends; None for a plain launch."""
        return driver.config(step, function(step.kernel, self.device, step.shared_bytes))

    def start(self, launches, stream: int) -> None:
        """Starts `Packed` launches in a stream."""
        for packed in launches:
            if packed.config is None:
                self.launch(*packed.numbers, stream, packed.parameters, 0)
                continue
            error = packed.config.start(packed.numbers[0], packed.parameters, stream)
            if error:
                raise cupy().cuda.driver.CUDADriverError(error)


def current_stream(device: torch.device) -> int:
    """torch's stream on a GPU. torch.cuda.current_stream takes many times as long."""
    return torch._C._cuda_getCurrentRawStream(device.index)


class Recorded(NamedTuple):
    """What a call of one kind does."""

    made: list[tuple]  # (shape, dtype) of the workspaces' common memory, then of results
    batch: Batch  # the launches
    returned: list[int | None]  # indexes of the results in `made`


class New:
    """Makes stand-ins for the memory of a call: `new(shape, dtype)` for a result, `new.scratch` for a workspace."""

    def __init__(self, first: int):
        self.first, self.scratch_bytes, self.slots = first, 0, []

    def __call__(self, shape, dtype) -> Slot:
        """A result."""
        self.slots.append(Slot(self.first + 1 + len(self.slots), shape, dtype))
        return self.slots[-1]

    def scratch(self, shape, dtype) -> Slot:
        """A part of the memory for workspaces. shape: ints, or one int."""
        slot = Slot(self.first, (shape,) if isinstance(shape, int) else shape, dtype, offset=self.scratch_bytes)
        self.scratch_bytes += -(-slot.nbytes // ALIGNMENT) * ALIGNMENT
        return slot

    def like(self, array: Slot | None) -> Slot | None:
        """A result of another array's shape and dtype; None for None."""
        return None if array is None else self(array.shape, array.dtype)


DTYPES = torch.float32, torch.int64, torch.uint8  # also of num_batches_tracked, and of what a forward keeps
recorded: dict[tuple, Recorded] = {}
launched = []  # in the call that is being recorded


def launch(kernel: Kernel, grid, block, args, shared_bytes: int = 0) -> None:
    """Records a launch. Numbers get the types that the kernel declares."""
    parameters = signature(kernel)
    pairs = zip(parameters, args, strict=True)
    cast = [NULL if arg is None else arg if p.pointer else p.dtype.type(arg) for p, arg in pairs]
    launched.append(Step(kernel, kernel, parameters, grid, block, cast, shared_bytes, False, overlapping(kernel)))


def call(operation, options: tuple, *tensors) -> list:
    """operation(new, *tensors, **dict(options)), with Slots for the tensors, and tensors for the Slots it returns."""
    device = tensors[0].device
    if device.type == "cuda" and device.index != torch._C._cuda_getDevice():
        with torch.cuda.device(device):
            return call(operation, options, *tensors)
    at = [0 if t is None else t.data_ptr() for t in tensors]
    kinds = [t if t is None else (t.shape, t.dtype, t.get_device(), t.is_contiguous()) for t in tensors]
    key = operation, options, *kinds, *[place % 16 for place in at]
    found = recorded.get(key)
    if found is None:
        found = recorded[key] = record(operation, options, tensors, at)
    new = [torch.empty(shape, dtype=dtype, device=device) for shape, dtype in found.made]
    at += [t.data_ptr() for t in new]
    found.batch.start(at, (), current_stream(device))
    return [None if index is None else new[index] for index in found.returned]


def record(operation, options, tensors, at) -> Recorded:
    """What a call does. at: addresses of the tensors. Raises ValueError for tensors that the kernels do not take."""
    device = tensors[0].device
    for tensor in filter(lambda t: t is not None, tensors):
        known = (torch.float32,) if tensor is tensors[0] else DTYPES
        if tensor.device != device or not tensor.is_contiguous() or tensor.dtype not in known:
            raise ValueError(
                f"input, parameters and buffers must be contiguous, float32 and on one device, {device}; received "
                f"{tensor.dtype} on {tensor.device} with shape {tuple(tensor.shape)} and strides {tensor.stride()}"
            )
    launched.clear()
    first, new = len(tensors), New(len(tensors))
    slots = [t if t is None else Slot(i, t.shape, NUMPY[t.dtype], at[i] % 16) for i, t in enumerate(tensors)]
    returned = [slot and slot.index - first for slot in operation(new, *slots, **dict(options))]
    made = [((new.scratch_bytes,), torch.uint8), *((slot.shape, TORCH[slot.dtype]) for slot in new.slots)]
    batch = Batch(Backend(device.index), [(step, step.args) for step in launched], first + len(made))
    return Recorded(made, batch, returned)


def gradients(*_):
    """Refuses shapes whose gradients need other kernels than this file has."""
    raise ValueError("this file has no kernels for the gradients of these shapes on this GPU: use the package")


@functools.cache
def choose(device: torch.device, tf32: bool) -> Choice:
    """How the convolutions of a call multiply. tf32: with TF32's precision, not float32's."""
    gpu = torch.cuda.get_device_properties(device)
    wgmma = (gpu.major, gpu.minor) == (9, 0) and cupy().cuda.nvrtc.getVersion()[0] >= WGMMA_MAJOR
    without = None if gpu.major >= 8 else f"the GPU is sm_{gpu.major}{gpu.minor}, the kernels in this file need sm_80"
    sizes = gpu.shared_memory_per_block_optin, gpu.multi_processor_count
    return Choice("tf32" if tf32 else "fp32", wgmma, *sizes, False, without)


def channel_sum_workspace_size(_) -> int:
    """Of what `channel_sum` needs besides its arguments."""
    return 0


def channel_sum(x: Slot, sums: Slot, _) -> None:
    """Sums of one image [1, C, H, W] over its pixels. The package's kernels for this take any batch."""
    pixels = x.shape[2] * x.shape[3]
    launch(Kernel("image_sums.cu", "image_sums"), (x.shape[1], 1, 1), (32, 1, 1), (x, sums, pixels))


def struct_of(activation: str) -> str:
    """The activation's struct in activation.cuh."""
    return {"tanh": "Tanh"}[activation]


def plan_or_reason(*convolution, **options):
    """(plan, None); raises an error that says why if tensor cores do not take this convolution."""
    return required_plan(*convolution, **options), None


class Fused(torch.autograd.Function):
    """The gradients of all five layers. options: of the forward.

    The forward keeps nothing for the backward, which runs it once more, as activation checkpointing does. So a forward
    launches the same kernels in grad mode as under no_grad. It launches them before autograd's work begins, which then
    takes no time of the GPU: `result` holds its output.
    """

    @staticmethod
    def forward(ctx, x, w, conv_bias, weight, bias, group_weight, group_bias, running, options, result):
        training = dict(options)["training"]  # then the statistics are the batch's, and counted once
        affine = weight, bias, group_weight, group_bias
        ctx.save_for_backward(x, w, conv_bias, *affine, *((None,) * 3 if training else running))
        ctx.options = options
        return result[0]

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dout):
        x, w, conv_bias, weight, bias, group_weight, group_bias, *running = ctx.saved_tensors
        affine = weight, bias, group_weight, group_bias
        _, memory = call(_forward, (*ctx.options, ("keep", True)), x, w, conv_bias, *running, *affine)
        options = [pair for pair in ctx.options if pair[0] in ("setting", "training", "activation", "parameter")]
        options += [("needed", ctx.needs_input_grad[:7])]
        return *call(_backward, tuple(options), dout.contiguous(), x, w, conv_bias, *affine, memory), None, None, None


class Affine(nn.Module):
    """Weight and bias of a norm."""

    def __init__(self, channels: int):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(channels)), nn.Parameter(torch.zeros(channels))


class BatchNorm(Affine):
    """The state of the batch norm."""

    def __init__(self, channels: int):
        super().__init__(channels)
        self.register_buffer("running_mean", torch.zeros(channels))
        self.register_buffer("running_var", torch.ones(channels))
        self.register_buffer("num_batches_tracked", torch.tensor(0))


class ConvTranspose(nn.Module):
    """Weight and bias of the convolution, drawn as the reference draws them."""

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(in_channels, out_channels, kernel_size, kernel_size))
        nn.init.kaiming_uniform_(self.weight, a=math.sqrt(5))
        bound = 1 / math.sqrt(out_channels * kernel_size**2)
        self.bias = nn.Parameter(torch.empty(out_channels).uniform_(-bound, bound))


class ModelNew(nn.Module):
    """The reference's arguments, parameters and buffers, drawn and named as there. `groups` is unused, as there."""

    def __init__(self, in_channels, out_channels, kernel_size, stride, padding, groups, num_groups):
        super().__init__()
        if stride != 1:
            raise ValueError(f"the kernels in this file take stride 1, received {stride}")
        if out_channels % num_groups:
            raise ValueError(f"num_groups must divide the {out_channels} channels, received {num_groups}")
        self.padding, self.num_groups = (padding, padding), num_groups
        self.conv_transpose = ConvTranspose(in_channels, out_channels, kernel_size)
        self.batch_norm = BatchNorm(out_channels)
        self.group_norm = Affine(out_channels)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        # As dicts, because nn.Module takes five times as long to look up an attribute.
        conv, norm, group = self._modules.values()
        w, conv_bias, *affine = *conv._parameters.values(), *norm._parameters.values(), *group._parameters.values()
        x, running = x.contiguous(), tuple(norm._buffers.values())
        choice = choose(x.device, torch.backends.cudnn.allow_tf32)
        options = options_of(self.training, Setting(self.padding, self.num_groups, choice, False, False))
        result = call(_forward, (*options, ("keep", False)), x, w, conv_bias, *running, *affine)
        out = result[0]
        if torch.is_grad_enabled() and any(t.requires_grad for t in (x, w, conv_bias, *affine)):
            out = Fused.apply(x, w, conv_bias, *affine, running, options, result)
        if self.training:
            torch.autograd.graph.increment_version(running)
        return out


@functools.cache
def options_of(training: bool, setting: Setting) -> tuple:
    """Options of `_forward`."""
    return tuple(
        {
            "training": training,
            "setting": setting,
            "momentum": 0.1,
            "eps": 1e-5,
            "group_eps": 1e-5,
            "activation": "tanh",
            "parameter": 0.0,
        }.items()
    )


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
