"""batch_norm, with the signature of torch.nn.functional.batch_norm, and batch_norm_tanh, which applies tanh as well."""

import functools
import math

import torch

from cupy_kernels.batch_norm import (
    batch_norm_apply,
    batch_norm_backward_apply,
    batch_norm_backward_reduce,
    batch_norm_eval_statistics,
    batch_norm_statistics,
    batch_norm_workspace,
)

from ..interop import accumulator_dtype, check_parameters, dense, one_device, run
from .gradients import NormGradient
from .tanh import tanh_gradient


class _BatchNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, mean, invstd, running, training, eps, tanh):
        y = torch.empty_like(x)
        run(batch_norm_apply, x, mean, invstd, weight, bias, y, tanh)
        ctx.training, ctx.eps = training, eps
        x_needed = training or any(ctx.needs_input_grad[1:3])
        ctx.save_for_backward(x if x_needed else None, weight, bias, mean, invstd, y if tanh else None, *running)
        return y

    @staticmethod
    def backward(ctx, dy):
        *saved, _, _ = ctx.saved_tensors
        needed = ctx.needs_input_grad[:3]
        return *batch_norm_gradients(dy, *saved, needed, ctx.training, ctx.eps), *[None] * 6


def batch_norm_gradients(dy, x, weight, bias, mean, invstd, y, needed, training, eps):
    """(dx, dweight, dbias) of a batch norm with these statistics, None for those that are not needed.

    x: may be None outside training where dx alone is needed. y: None, or tanh of the batch norm, whose gradient dy is.
    """
    kernels = functools.partial(_gradients, mean, invstd, needed, training)
    if not torch.is_grad_enabled():
        return kernels(dy, x, weight, bias, y)
    if y is not None:
        dy = tanh_gradient(dy, y)
    if x is None:
        x = torch.zeros_like(dy)  # dx does not depend on it
    return NormGradient.apply(kernels, functools.partial(_definition, mean, invstd, training, eps), dy, x, weight, bias)


def _gradients(mean, invstd, needed, training, dy, x, weight, bias, y=None):
    need_x, need_weight, need_bias = needed
    dy = dense(dy)
    dx = torch.empty_like(dy) if need_x else None
    dweight = torch.empty_like(weight) if need_weight else None
    dbias = torch.empty_like(bias) if need_bias else None
    sums = None
    if need_weight or need_bias or training:
        sums = mean.new_empty((2, *mean.shape), dtype=torch.float64)
        workspace = sums.new_empty(batch_norm_workspace(dy.shape))
        run(batch_norm_backward_reduce, dy, x, mean, invstd, sums, dweight, dbias, workspace, y)
    if need_x:
        run(batch_norm_backward_apply, dy, x, mean, invstd, weight, sums if training else None, dx, y)
    return dx, dweight, dbias


def _definition(mean, invstd, training, eps, x, weight, bias):
    channels = (-1, *[1] * (x.dim() - 2))
    x, mean, invstd = x.to(mean.dtype), mean.view(channels), invstd.view(channels)
    if training:
        values = (0, *range(2, x.dim()))
        mean = x.mean(values, keepdim=True)
        invstd = ((x - mean).square().mean(values, keepdim=True) + eps).rsqrt()
    y = (x - mean) * invstd
    y = y if weight is None else y * weight.view(channels)
    return y if bias is None else y + bias.view(channels)


def batch_norm_mean_invstd(x, running_mean, running_var, training, momentum, eps, batches=None):
    """(mean, invstd) per channel: x's own in training, which updates the running statistics, else the running ones.

    batches: num_batches_tracked, which grows by 1, or None.
    """
    mean, invstd = (torch.empty(x.shape[1], dtype=accumulator_dtype(x), device=x.device) for _ in range(2))

    if training:
        workspace = mean.new_empty(batch_norm_workspace(x.shape), dtype=torch.float64)
        updated = dense(running_mean), dense(running_var)
        run(batch_norm_statistics, x, *updated, mean, invstd, workspace, momentum, eps)
        note_update(running_mean, running_var, *updated)
        if batches is not None:
            batches.add_(1)
    else:
        run(batch_norm_eval_statistics, dense(running_mean), dense(running_var), mean, invstd, eps)
    return mean, invstd


def applied_statistics(running_mean, running_var, training):
    """The running statistics if they are applied, which a backward refuses if they were changed, as torch's does."""
    return (None, None) if training else (running_mean, running_var)


def note_update(running_mean, running_var, new_mean, new_var) -> None:
    """Tells autograd that kernels changed the statistics; new_mean, new_var: what they wrote to, `dense` of these."""
    for buffer, new in ((running_mean, new_mean), (running_var, new_var)):
        if new is not buffer:  # it is not contiguous: the kernel updated a copy
            buffer.copy_(new)
        elif buffer is not None:
            torch.autograd.graph.increment_version(buffer)


def check_batch_norm(input, running_mean, running_var, weight, bias, training, momentum, eps) -> torch.Tensor:
    """The input as [N, C, *]. Refuses what torch.nn.functional.batch_norm refuses, before anything is written."""
    if training and input.dim() and math.prod((input.shape[0], *input.shape[2:])) == 1:
        raise ValueError(f"Expected more than 1 value per channel when training, got input size {input.shape}")
    parameters = {"running_mean": running_mean, "running_var": running_var, "weight": weight, "bias": bias}
    if input.shape == (0,):  # an empty batch of as many channels as the others have
        input = input.view(0, next((t.numel() for t in parameters.values() if t is not None), 0))
    if input.dim() < 2:
        raise RuntimeError(f"batch_norm takes input [N, C, *], received shape {tuple(input.shape)}")
    channels = input.shape[1]
    check_batch_norm_call(running_mean, running_var, training, momentum, eps)
    for name, tensor in parameters.items():
        if tensor is not None and tensor.numel() != channels:
            raise RuntimeError(f"{name} should contain {channels} elements not {tensor.numel()}")
    one_device((input, *parameters.values()))
    check_parameters(input, running_mean=running_mean, running_var=running_var)
    check_parameters(input, weight=weight, bias=bias)
    return input


def check_batch_norm_call(running_mean, running_var, training, momentum, eps) -> None:
    """The part of `check_batch_norm` that does not follow from shapes, dtypes and devices."""
    if training and not eps > 0:
        raise ValueError(f"batch_norm eps must be positive during training, but got {eps}")
    if not eps >= 0:
        raise ValueError(f"batch_norm eps must be non-negative, but got {eps}")
    if not isinstance(momentum, (int, float)):
        raise TypeError(f"batch_norm momentum must be a number, received {momentum!r}")
    if (running_mean is None) != (running_var is None):
        raise ValueError("running_mean and running_var must either both be None or neither be None")
    if running_mean is None and not training:
        raise RuntimeError("running_mean and running_var must be defined in evaluation mode")
    for name, tensor in (("running_mean", running_mean), ("running_var", running_var)):
        if tensor is not None and tensor.requires_grad and torch.is_grad_enabled():
            raise RuntimeError(f"batch_norm is not differentiable with respect to {name}, which requires grad")


def batch_norm(
    input: torch.Tensor,
    running_mean: torch.Tensor | None,
    running_var: torch.Tensor | None,
    weight: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    *,
    num_batches_tracked: torch.Tensor | None = None,
) -> torch.Tensor:
    """y = (x - mean) / sqrt(var + eps) * weight + bias per channel. See torch.nn.functional.batch_norm.

    input: [N, C, *], any number of dimensions from 2 on, or an empty [N]; float32, float64, float16 or bfloat16.
    running_mean, running_var: (C,), both or neither. In training, mean and biased variance of the batch are applied,
        and running = (1 - momentum) running + momentum batch, in place, with the unbiased variance; an empty batch
        leaves them as they are. Otherwise they are applied.
    weight, bias: (C,), or None for 1 and 0.
    num_batches_tracked: one integer, which grows by 1 in training, in place; or None.
    Both pairs may be float32 where input is float16 or bfloat16; otherwise they have its dtype.

    The result is contiguous and has input's dtype; the arithmetic is float32, or float64 for float64.
    Raises ValueError for one value per channel in training, one running statistic without the other, or eps out of
    range; RuntimeError for a wrong number of dimensions or elements, or no running statistics outside training;
    TypeError for dtypes. A refused call changes nothing. A backward outside training raises RuntimeError if the running
    statistics were changed since the forward.
    """
    arguments = (running_mean, running_var, weight, bias, bool(training), momentum, eps, num_batches_tracked)
    return _batch_norm(input, *arguments, tanh=False)


def batch_norm_tanh(
    input: torch.Tensor,
    running_mean: torch.Tensor | None,
    running_var: torch.Tensor | None,
    weight: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    *,
    num_batches_tracked: torch.Tensor | None = None,
) -> torch.Tensor:
    """tanh(batch_norm(...)) in one pass over memory each way; the arguments and errors of `batch_norm`."""
    arguments = (running_mean, running_var, weight, bias, bool(training), momentum, eps, num_batches_tracked)
    return _batch_norm(input, *arguments, tanh=True)


def _batch_norm(input, running_mean, running_var, weight, bias, training, momentum, eps, batches, tanh):
    x = check_batch_norm(input, running_mean, running_var, weight, bias, training, momentum, eps)
    x, weight, bias = dense(x), dense(weight), dense(bias)
    moments = batch_norm_mean_invstd(x, running_mean, running_var, training, momentum, eps, batches)
    running = applied_statistics(running_mean, running_var, training)
    y = _BatchNorm.apply(x, weight, bias, *moments, running, training, eps, tanh)
    return y if y.shape == input.shape else y.view(input.shape)
