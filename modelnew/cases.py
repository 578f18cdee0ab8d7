"""What a check of kernels compares: a `Case` for an operator. Each operator's file has its own, in CASES."""

import contextlib
from collections.abc import Callable
from typing import NamedTuple

import torch


class Case(NamedTuple):
    """One operator, forward and backward.

    ours, theirs: functions of the tensors, which return a tensor, or a tuple whose first element gets a gradient.
    inputs: inputs(images) gives {name: float32 tensor}, small ones where images is None. Those whose name begins with _
        need no gradient.
    terms: terms(images) gives {result: how many terms it sums}, of long sums, for `parity.within_policy`. Results are
        "output", "gradient of x", ..., "result 2", ...
    rounded: in float32, whether ours rounds operands to TF32. PyTorch on the CPU, and often cuDNN, does not: the error
        that this causes in float64 is then what ours may have.
    gradient: gradient(dtype, **tensors in float64) gives the output's gradient. Default: random.
    within: a context that ours runs in.
    """

    what: str
    files: tuple[str, ...]
    ours: Callable
    theirs: Callable
    inputs: Callable
    terms: Callable = lambda images: {}
    rounded: bool = False
    gradient: Callable | None = None
    within: Callable = contextlib.nullcontext


def activations(images):
    """Shape of the convolution's output; images: None for a small one."""
    return (images, 128, 34, 34) if images else (2, 8, 10, 12)


def first(result):
    """A function's result, or the first of several."""
    return result[0] if isinstance(result, tuple) else result


def sums_of(inputs):
    """`Case.terms` of a norm: the gradients of weight and bias sum over a channel."""

    def terms(images):
        with torch.device("meta"):
            x = inputs(images)["x"]
        return dict.fromkeys(("gradient of weight", "gradient of bias"), x.numel() // x.shape[1])

    return terms
