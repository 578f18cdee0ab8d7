"""The workloads of `python -m modelnew bench`: their contenders, and the least time that each can take."""

from typing import NamedTuple

import torch

MODELS = {
    "forward_train": "forward, batch norm in training mode, under no_grad",
    "latency_forward_train": "forward_train from an idle GPU to the result, by the host's clock; at most 8 images",
    "forward_train_grad": "forward in training mode, keeping what backward needs",
    "forward_eval": "forward in eval mode, under no_grad",
    "step": "forward and backward, gradients of x and of all parameters",
    "step_no_input_grad": "forward and backward, gradients of all parameters",
}
OPERATORS = {
    "conv_forward": "conv_transpose2d alone, the whole call: weights packed, operands converted",
    "dgrad": "conv_transpose2d's gradient of x, the whole call",
    "wgrad": "conv_transpose2d's gradient of the weight, the whole call",
    "conv_forward_general": "conv_transpose2d on the general kernels, without tensor cores",
    "dgrad_general": "conv_transpose2d's gradient of x on the general kernels",
    "wgrad_general": "conv_transpose2d's gradient of the weight on the general kernels",
    "post_conv_forward": "batch norm, tanh, max pool and group norm, in training mode, under no_grad",
}
CHAINS = {
    "leaky_relu_forward_train": "forward_train with LeakyReLU in place of tanh",
    "leaky_relu_step": "step with LeakyReLU in place of tanh",
}
FLOAT16 = {
    "float16_forward_train": "forward_train without autocast: all in float16 and channels_last, input and output too",
    "float16_step": "step without autocast: all in float16 and channels_last",
}
COMPILED = {
    "compiled_forward_train": "forward_train of ModelNew, eager and under torch.compile; for at most 8 images also in "
    'the mode "reduce-overhead"',
    "compiled_step": "step of ModelNew, eager and under torch.compile, in the same modes",
}
KERNELS = {
    "conv_bn_pool_kernel": "of forward_train only the convolution's launch, with the pooling and statistics in its "
    "epilogue; untimed: packing the weights",
    "dgrad_kernel": "of step only the launch that computes the gradient of x; untimed: packing the weights, and the "
    "gradient of the convolution's output as fp16 tiles",
    "wgrad_kernel": "of step only the launches that compute the gradient of the convolution's weight and add up its "
    "parts; untimed: packing both operands as fp16 tiles, and sums at the borders",
}
WORKLOADS = MODELS | FLOAT16 | OPERATORS | CHAINS | KERNELS | COMPILED
GENERAL, LEAKY_RELU, OF_FLOAT16, OF_COMPILED = "_general", "leaky_relu_", "float16_", "compiled_"
LAYOUTS = {"nchw": torch.contiguous_format, "nhwc": torch.channels_last}
DTYPES = {"tf32": torch.float32, "fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
PEERS = {
    "none": (),
    "eager": ("eager",),
    "compile": ("eager", "compile"),
    "all": ("eager", "compile", "compile-max-autotune"),
}
# The mode of torch.compile.
MODES = {
    "compile": "default",
    "compile-max-autotune": "max-autotune",
    "compile-reduce-overhead": "reduce-overhead",
    "modelnew-compile": "default",
    "modelnew-compile-reduce-overhead": "reduce-overhead",
}
GRAPHED = ("modelnew-graph", "eager-graph")  # whose calls `bench` captures in a CUDA graph
# Who replays CUDA graphs: those, and compile in these modes.
GRAPHS = (*GRAPHED, *(who for who, mode in MODES.items() if mode != "default"))

FEW_IMAGES = 8  # with so many or fewer, a call takes the host longer than the GPU, except in a CUDA graph
# What one GPU can do, by a word of its name: bytes/s of a copy, and FLOP/s of fp16 with float32 accumulation, which is
# what cuBLAS reaches by wgmma (mma.sync: 640e12). The class fp32 takes three fp16 products for one.
_CEILINGS = {"H100": (3.03e12, 793e12)}


class Shape(NamedTuple):
    """The size of an image, and the convolution; heights equal widths."""

    in_channels: int
    out_channels: int
    kernel_size: int
    stride: int
    padding: int
    size: int

    @property
    def out_size(self) -> int:
        return (self.size - 1) * self.stride - 2 * self.padding + self.kernel_size


def contenders(what: str, n: int, peers: str, device: torch.device) -> list[tuple[str, str]]:
    """(who, layout) of all contenders, ours first.

    Parts and other chains are compared with eager PyTorch only, kernels with nothing, compiled models with themselves.
    Ours is channels_last if the workload is.
    """
    if n > FEW_IMAGES and what == "latency_forward_train":
        return []
    if what in KERNELS:
        return [("modelnew", "nchw")]
    if what in COMPILED:
        whos = [who for who in MODES if who.startswith("modelnew") and (n <= FEW_IMAGES or who not in GRAPHS)]
        return [(who, "nchw") for who in ("modelnew", *whos)] if "compile" in PEERS[peers] else []
    ours, theirs = ["modelnew"], [who for who in PEERS[peers] if what in MODELS | FLOAT16 or who == "eager"]
    if n <= FEW_IMAGES and what in MODELS:
        if device.type == "cuda":
            ours.append("modelnew-graph")
            theirs += ["eager-graph"] if "eager" in theirs else []
        theirs += ["compile-reduce-overhead"] if "compile" in theirs else []
    return [(who, layout_of(what)) for who in ours] + [(who, layout) for who in theirs for layout in LAYOUTS]


def layout_of(what: str) -> str:
    """The layout of our contender."""
    return "nhwc" if what in FLOAT16 else "nchw"


def ceilings(gpu: str | None) -> dict | None:
    """{"bytes_per_s", "flop_per_s": {class: ..}} of a GPU whose limits were measured, else None."""
    for word, (bandwidth, rate) in _CEILINGS.items():
        if gpu and word in gpu:
            return {"bytes_per_s": bandwidth, "flop_per_s": {c: rate / (3 if c == "fp32" else 1) for c in DTYPES}}
    return None


def work(what: str, cls: str, n: int, shape: Shape) -> list[tuple[float, float]]:
    """(FLOP, bytes) of each stage. A stage has to wait for the one before it.

    Bytes: each input is read once, each result written once. FLOP: of the convolution, by the dense count 2 N OH OW
        Cout Cin KH KW. A forward in training mode has two stages: the convolution, whose pooled values go to memory
        because normalisation needs the statistics of all of them, and the rest. The stages of the backward are the
        gradients of the pooled values, wgrad and dgrad.
    """
    itemsize = DTYPES[cls].itemsize if what in OPERATORS | FLOAT16 else 4
    packed = 0.5 if cls == "tf32" else 1  # bytes of packed fp16 tiles for one of float32; the fp32 class has two halves
    x = n * shape.in_channels * shape.size**2 * itemsize
    y = n * shape.out_channels * shape.out_size**2 * itemsize
    pooled = n * shape.out_channels * (shape.out_size // 2) ** 2 * itemsize
    weight = shape.in_channels * shape.out_channels * shape.kernel_size**2
    flop, weight = 2 * n * shape.out_size**2 * weight, weight * itemsize
    training = [(flop, x + weight + pooled), (0, 2 * pooled)]
    backward = [(0, 3 * pooled), (flop, x + pooled + weight)]
    stages = {
        "forward_eval": [(flop, x + weight + pooled)],
        "step": training + backward + [(flop, pooled + weight + x)],
        "step_no_input_grad": training + backward,
        "conv_forward": [(flop, x + weight + y)],
        "dgrad": [(flop, x + weight + y)],
        "wgrad": [(flop, x + weight + y)],
        "post_conv_forward": [(0, y + pooled)],
        "conv_bn_pool_kernel": [(flop, x + weight + pooled)],
        "dgrad_kernel": [(flop, x + weight + y * packed)],
        "wgrad_kernel": [(flop, x * packed + weight + y * packed)],
    }
    return stages.get(
        what.removesuffix(GENERAL).removeprefix(LEAKY_RELU).removeprefix(OF_FLOAT16).removeprefix(OF_COMPILED), training
    )


def floor_ms(what: str, cls: str, n: int, shape: Shape, limits: dict) -> float:
    """The least time in milliseconds on the GPU of `ceilings`.

    It is the sum over the stages of `work` of the slower of arithmetic and memory.
    """
    rate, bandwidth = limits["flop_per_s"][cls], limits["bytes_per_s"]
    return 1e3 * sum(max(flop / rate, size / bandwidth) for flop, size in work(what, cls, n, shape))
