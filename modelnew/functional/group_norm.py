"""group_norm, with the signature of torch.nn.functional.group_norm."""

import functools

import torch

from cupy_kernels.group_norm import group_norm_backward, group_norm_forward, group_norm_workspace

from .. import autocast
from ..interop import accumulator_dtype, check_parameters, dense, one_device, run
from .gradients import NormGradient, differentiable


class _GroupNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, num_groups, eps):
        statistics = torch.empty((2, x.shape[0] * num_groups), dtype=accumulator_dtype(x), device=x.device)
        mean, rstd = statistics
        y = torch.empty_like(x)
        run(group_norm_forward, x, num_groups, weight, bias, y, mean, rstd, eps)
        ctx.num_groups, ctx.eps = num_groups, eps
        ctx.save_for_backward(x, weight, bias, mean, rstd)
        return y

    @staticmethod
    def backward(ctx, dy):
        x, weight, bias, mean, rstd = ctx.saved_tensors
        kernels = functools.partial(_gradients, mean, rstd, ctx.num_groups, ctx.needs_input_grad[:3])
        definition = functools.partial(_definition, ctx.num_groups, ctx.eps)
        return *differentiable(NormGradient, kernels, definition, dy, x, weight, bias), None, None


def _gradients(mean, rstd, num_groups, needed, dy, x, weight, bias):
    need_x, need_weight, need_bias = needed
    dx = torch.empty_like(x) if need_x else None
    dweight = torch.empty_like(weight) if need_weight else None
    dbias = torch.empty_like(bias) if need_bias else None
    workspace = mean.new_empty(group_norm_workspace(x.shape)) if need_weight or need_bias else None
    run(group_norm_backward, dense(dy), x, num_groups, mean, rstd, weight, dx, dweight, dbias, workspace)
    return dx, dweight, dbias


def _definition(num_groups, eps, x, weight, bias):
    grouped = x.to(accumulator_dtype(x)).reshape(x.shape[0], num_groups, -1)
    grouped = grouped - grouped.mean(2, keepdim=True)
    grouped = grouped * (grouped.square().mean(2, keepdim=True) + eps).rsqrt()
    channels = (-1, *[1] * (x.dim() - 2))
    y = grouped.reshape(x.shape)
    y = y if weight is None else y * weight.view(channels)
    return y if bias is None else y + bias.view(channels)


def group_norm(
    input: torch.Tensor,
    num_groups: int,
    weight: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    eps: float = 1e-5,
) -> torch.Tensor:
    """y = (x - mean) / sqrt(var + eps) * weight + bias per image and group. See torch.nn.functional.group_norm.

    input: [N, C, *], any number of dimensions from 2 on; float32, float64, float16 or bfloat16.
    num_groups: a divisor of C; mean and biased variance are those of each image's C / num_groups neighbouring channels.
    weight, bias: (C,), or None for 1 and 0. Both may be float32 where input is float16 or bfloat16; otherwise they have
        its dtype. Under torch.autocast on a GPU all three are cast to float32.

    The result is contiguous and has input's dtype; the arithmetic is float32, or float64 for float64. An empty input
    gives an empty result, and gradients of 0 for weight and bias.
    Raises RuntimeError for a wrong number of dimensions, groups or elements; ValueError for one value per group in a
    batch of one, and for groups of 2^31 values and more; TypeError for dtypes.
    """
    if input.dim() < 2:
        raise RuntimeError(f"group_norm takes input [N, C, *], received shape {tuple(input.shape)}")
    if isinstance(num_groups, bool) or not isinstance(num_groups, int):
        raise TypeError(f"num_groups must be an int, received {num_groups!r}")
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
    input, weight, bias = autocast.single(input, weight, bias)
    check_parameters(input, weight=weight, bias=bias)
    return _GroupNorm.apply(dense(input), dense(weight), dense(bias), num_groups, eps)
