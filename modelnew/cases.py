"""`Case`: an operator and its reference, for a check of kernels. Each operator's file lists its own in CASES."""

import contextlib
from collections.abc import Callable
from typing import NamedTuple

import torch


class Case(NamedTuple):
    """One operator, forward and backward.

    ours, theirs: functions of the tensors, which return a tensor, or a tuple whose first element gets a gradient.
    inputs: inputs(images) returns {name: float32 tensor}; small ones if images is None. Inputs whose name begins with _
        need no gradient.
    terms: terms(images) returns {result: number of terms that it sums} for long sums, see `parity.within_policy`.
        Results are named "output", "gradient of x", ..., "result 2", ...
    rounded: whether ours rounds float32 operands to TF32. PyTorch on the CPU does not, and cuDNN often does not. The
        allowed error is then that of such rounding in float64.
    gradient: gradient(dtype, **tensors in float64) returns the output's gradient. Default: random.
    within: a context in which ours runs.
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
    """Shape of the convolution's output; a small one if images is None."""
    return (images, 128, 34, 34) if images else (2, 8, 10, 12)


def odd_planes(images):
    """As `activations`, but the small shape has 27 planes: threads that take two or four each have fewer at the end."""
    return activations(images) if images else (3, 9, 10, 12)


def first(result):
    """A function's result, or the first of several results."""
    return result[0] if isinstance(result, tuple) else result


def sums_of(inputs):
    """`Case.terms` of a norm: the gradients of weight and bias sum over a channel."""

    def terms(images):
        with torch.device("meta"):
            x = inputs(images)["x"]
        return dict.fromkeys(("gradient of weight", "gradient of bias"), x.numel() // x.shape[1])

    return terms
