"""Norms by their definitions, with the signatures of torch.nn.functional: an exact enough truth for float64.

PyTorch's float64 norms lose digits if a mean is large compared with the standard deviation.
"""

import math

import torch


def batch_norm(x, mean, var, weight=None, bias=None, training=False, momentum=0.1, eps=1e-5):
    """See torch.nn.functional.batch_norm."""
    if not training:
        channels = (-1, *[1] * (x.dim() - 2))
        return _affine((x - mean.view(channels)) * (var + eps).rsqrt().view(channels), weight, bias)
    y, batch_mean, batch_var = _standardised(x, (0, *range(2, x.dim())), eps)
    if mean is not None and x.numel():
        values = x.numel() // x.shape[1]
        mean.mul_(1 - momentum).add_(batch_mean.detach().flatten(), alpha=momentum)
        var.mul_(1 - momentum).add_(batch_var.detach().flatten() * values / (values - 1), alpha=momentum)
    return _affine(y, weight, bias)


def group_norm(x, num_groups, weight=None, bias=None, eps=1e-5):
    """See torch.nn.functional.group_norm."""
    grouped = x.reshape(x.shape[0], num_groups, math.prod(x.shape[1:]) // num_groups)
    return _affine(_standardised(grouped, (2,), eps)[0].reshape(x.shape), weight, bias)


def _standardised(x, over, eps):
    """(y, mean, biased variance) over some dimensions. Subtracts a first value, so that constants become exactly 0."""
    pivot = x.detach()[tuple(slice(0, 1) if d in over else slice(None) for d in range(x.dim()))]
    pivot = torch.where(pivot.isfinite(), pivot, 0)
    x = x - pivot
    mean = x.mean(over, keepdim=True)
    x = x - mean
    variance = x.square().mean(over, keepdim=True)
    return x * (variance + eps).rsqrt(), mean + pivot, variance


def _affine(y, weight, bias):
    channels = (-1, *[1] * (y.dim() - 2))
    y = y if weight is None else y * weight.view(channels)
    return y if bias is None else y + bias.view(channels)
