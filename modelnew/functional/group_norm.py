"""group_norm, with the signature of torch.nn.functional.group_norm, and its layer."""

import functools
import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from cupy_kernels import common
from cupy_kernels.group_norm import (
    MAX_ROW_CHANNELS,
    group_norm_backward,
    group_norm_backward_workspace,
    group_norm_forward,
    group_norm_forward_workspace,
)

from .. import autocast
from ..calls import call, prepared
from ..cases import Case, sums_of
from ..formats import channels_last, dense_in, restored, stored
from ..interop import check_parameters, dense, integer, number, one_device
from ..untraced import untraced
from .affine import reset_affine, weight_and_bias
from .gradients import Function, NormGradient, apply, differentiable, will_need_grad

__all__ = ["GroupNorm", "group_norm"]


def _forward(new, x, weight, bias, num_groups, last, wide, *, eps):
    accumulator = common.accumulator_dtype(x)
    y, statistics = new(x.shape, accumulator if wide else x.dtype), new((2, x.shape[0] * num_groups), accumulator)
    workspace = _workspace(new, group_norm_forward_workspace(x, num_groups, last))
    group_norm_forward(x, num_groups, weight, bias, y, statistics[0], statistics[1], eps, workspace, last)
    return y, statistics


def _backward(new, dy, x, weight, bias, statistics, num_groups, needed, last):
    need_x, need_weight, need_bias = needed
    dx = new.like(x if need_x else None)
    dweight, dbias = new.like(weight if need_weight else None), new.like(bias if need_bias else None)
    workspace = _workspace(new, group_norm_backward_workspace(x, num_groups, need_weight or need_bias, last))
    mean, rstd = statistics[0], statistics[1]
    group_norm_backward(dy, x, num_groups, mean, rstd, weight, dx, dweight, dbias, workspace, last)
    return dx, dweight, dbias


def _workspace(new, elements):
    return new.scratch(elements, np.dtype(np.float64)) if elements else None


class _GroupNorm(Function):
    @staticmethod
    def forward(ctx, x, weight, bias, num_groups, last, wide, eps, check):
        y, statistics = _call(x, weight, bias, num_groups, last, wide, eps, check)
        ctx.num_groups, ctx.last, ctx.eps = num_groups, last, eps
        ctx.save_for_backward(x, weight, bias, statistics)
        return y

    @staticmethod
    def backward(ctx, dy):
        x, weight, bias, statistics = ctx.saved_tensors
        kernels = functools.partial(_gradients, statistics, ctx.num_groups, ctx.last, ctx.needs_input_grad[:3])
        definition = functools.partial(_definition, ctx.num_groups, ctx.eps)
        return *differentiable(NormGradient, kernels, definition, dy, x, weight, bias), *[None] * 5


def _call(x, weight, bias, num_groups, last, wide, eps, check):
    rows = last and _few_channels(x, num_groups)
    x = stored(x, rows) if rows else dense(x)
    y, statistics = call(_forward, x, weight, bias, num_groups, rows, wide, check=check, eps=eps)
    return dense_in(restored(y, rows), last), statistics


def _gradients(statistics, num_groups, last, needed, dy, x, weight, bias):
    rows = last and _few_channels(x, num_groups)
    dy, x = (stored(dense_in(t, rows), rows) for t in (dy, x))
    dx, *others = call(_backward, dy, x, weight, bias, statistics, num_groups, needed, rows)
    return None if dx is None else dense_in(restored(dx, rows), last), *others


def _few_channels(x, num_groups):
    """Whether the channels_last kernels support groups with this number of channels."""
    return x.shape[1] <= MAX_ROW_CHANNELS * num_groups


def _definition(num_groups, eps, x, weight, bias):
    grouped = x.double().reshape(x.shape[0], num_groups, math.prod(x.shape[1:]) // num_groups)
    grouped = grouped - grouped.mean(2, keepdim=True)
    grouped = grouped * (grouped.square().mean(2, keepdim=True) + eps).rsqrt()
    channels = (-1, *[1] * (x.dim() - 2))
    y = grouped.reshape(x.shape)
    y = y if weight is None else y * weight.view(channels)
    return y if bias is None else y + bias.view(channels)


@untraced
def group_norm(
    input: torch.Tensor,
    num_groups: int,
    weight: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    eps: float = 1e-5,
) -> torch.Tensor:
    """y = (x - mean) / sqrt(var + eps) * weight + bias per image and group. See torch.nn.functional.group_norm.

    input: [N, C, *], any number of dimensions from 2 on; float32, float64, float16 or bfloat16.
    num_groups: a divisor of C; mean and biased variance are taken over C / num_groups neighbouring channels of an
        image.
    weight, bias: (C,), or None for 1 and 0. They have input's dtype, or both are float32 if input is float16 or
        bfloat16. Under torch.autocast on a GPU they are cast to float32.

    Returns a tensor of input's shape. It is channels_last (or channels_last_3d) if input is, as PyTorch's result is on
    a CPU, else contiguous. It has input's dtype, or float32 under autocast on a GPU; the input itself is not cast. The
    arithmetic is in float32, for float64 in float64. An empty input gives an empty result, and zero gradients for
    weight and bias.

    Raises RuntimeError for a wrong number of dimensions, groups or elements, and for tensors on several devices;
    ValueError for one value per group in a batch of one, and for groups of 2^31 values or more; TypeError for other or
    mixed dtypes.
    """
    num_groups, eps = integer(num_groups, "num_groups"), number(eps, "eps")
    wide = autocast.norm_in_float32(input)
    if wide:
        weight, bias = autocast.single(weight, bias)

    def check():
        _check(input, num_groups, weight, bias)

    last = channels_last(input)
    x, weight, bias = prepared(check, last, input, weight, bias)
    if will_need_grad(x, weight, bias):
        return apply(_GroupNorm, x, weight, bias, num_groups, last, wide, eps, check)
    return _call(x, weight, bias, num_groups, last, wide, eps, check)[0]


def _check(input, num_groups, weight, bias):
    if input.dim() < 2:
        raise RuntimeError(f"group_norm takes input [N, C, *], received shape {tuple(input.shape)}")
    channels = input.shape[1]
    if num_groups < 1 or channels % num_groups:
        raise RuntimeError(
            f"num_groups must be positive and divide the number of channels, received num_groups={num_groups} "
            f"and input of shape {tuple(input.shape)}"
        )
    if input.numel() == num_groups:
        raise ValueError(f"Expected more than 1 value per group in a batch of 1, got input size {tuple(input.shape)}")
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor is not None and tensor.shape != (channels,):
            raise RuntimeError(f"{name} must have shape ({channels},), received {tuple(tensor.shape)}")
    one_device((input, weight, bias))
    check_parameters(input, weight=weight, bias=bias)


class GroupNorm(nn.GroupNorm):
    """See torch.nn.GroupNorm and `modelnew.functional.group_norm`."""

    def __init__(
        self,
        num_groups: int,
        num_channels: int,
        eps: float = 1e-5,
        affine: bool = True,
        device=None,
        dtype=None,
        *,
        bias: bool = True,
    ):
        super().__init__(num_groups, num_channels, eps, affine, device, dtype)
        if not bias:  # not every version of torch knows it
            self.register_parameter("bias", None)

    def reset_parameters(self) -> None:
        """Sets weight to 1 and bias to 0."""
        reset_affine(self)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return group_norm(input, self.num_groups, *weight_and_bias(self), self.eps)


def _inputs(images):
    shape = (images, 128, 17, 17) if images else (2, 32, 5, 6)
    return {"x": torch.randn(shape), "weight": torch.rand(shape[1]) + 0.5, "bias": torch.randn(shape[1])}


def _channels_last(images):
    inputs = _inputs(images)
    return {**inputs, "x": inputs["x"].contiguous(memory_format=torch.channels_last)}


def _one_image(images):
    """An image whose rows many blocks share."""
    x = torch.randn((1, 128, 128, 128) if images else (1, 8, 48, 50)).contiguous(memory_format=torch.channels_last)
    return {"x": x, "weight": torch.rand(x.shape[1]) + 0.5, "bias": torch.randn(x.shape[1])}


def _few_large_groups(images):
    """Groups with more values than a block keeps."""
    return {"x": torch.randn(2, 2, 90, 80), "weight": torch.rand(2) + 0.5, "bias": torch.randn(2)}


CASES = tuple(
    Case(
        f"group_norm{what}",
        (file,),
        lambda x, weight, bias, size=size: group_norm(x, x.shape[1] // size, weight, bias),
        lambda x, weight, bias, size=size: F.group_norm(x, x.shape[1] // size, weight, bias),
        inputs,
        sums_of(inputs),
    )
    for what, file, size, inputs in (
        ("", "group_norm.cu", 16, _inputs),
        (", channels_last", "group_norm_channels_last.cu", 16, _channels_last),
        (", one image, channels_last", "group_norm_channels_last.cu", 4, _one_image),
        (", large groups", "group_norm.cu", 2, _few_large_groups),
    )
)
