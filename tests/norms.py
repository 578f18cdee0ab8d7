"""What the tests of norms share: parameters, values near the largest, and batch norm beside torch's."""

import pytest
import torch
import torch.nn.functional as F
from tolerance import check_gradients

from modelnew.functional import batch_norm, batch_norm_tanh

DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]
PARAMETER_DTYPES = [*zip(DTYPES, DTYPES), (torch.float16, torch.float32), (torch.bfloat16, torch.float32)]
FORMATS = {4: torch.channels_last, 5: torch.channels_last_3d}
# Squares of float32 values overflow from 1.8e19 on, sums from 1.7e38 on, differences of opposite signs too.
LARGE = {
    "1e20": lambda shape: torch.randn(shape) * 1e20,
    "1e38": lambda shape: torch.randn(shape).clamp(-3, 3) * 1e38,
    "opposite": lambda shape: torch.randn(shape).sign() * 3e38,
    "outliers": lambda shape: torch.full(shape, -1e38).masked_fill(torch.rand(shape) < 0.05, 3.3e38),
    "far": lambda shape: 2e38 + torch.randn(shape) * 3e37,
}


def torch_batch_norm(x, running_mean, running_var, weight=None, bias=None, *args, **options):
    if weight is None and bias is not None:  # torch's own gradient fails there on a GPU
        weight = torch.ones_like(bias)
    return F.batch_norm(x, running_mean, running_var, weight, bias, *args, **options)


def torch_batch_norm_tanh(*args, **options):
    return torch.tanh(torch_batch_norm(*args, **options))


PAIRS = [
    pytest.param((batch_norm, torch_batch_norm), id="plain"),
    pytest.param((batch_norm_tanh, torch_batch_norm_tanh), id="tanh"),
]


def statistics(channels, device, dtype=torch.float32):
    """Running mean and variance."""
    return torch.randn(channels, device=device).to(dtype), (torch.rand(channels, device=device) + 0.5).to(dtype)


def parameters(channels, device, dtype=torch.float32):
    """Weight and bias."""
    return [torch.randn(channels, device=device).to(dtype).requires_grad_() for _ in range(2)]


def check_pair(pair, x, running, weight, bias, **options):
    """Output and gradients of ours and torch's, with copies of the running statistics."""

    def with_copies(function, x, weight, bias):
        copies = [r.to(torch.float64 if x.dtype == torch.float64 else r.dtype, copy=True) for r in running]
        return function(x, *(copies or (None, None)), weight, bias, **options)

    ours, theirs = ((lambda *args, f=f: with_copies(f, *args)) for f in pair)
    check_gradients(ours, theirs, [x, weight, bias], terms=(0, 0, *[x.numel() // max(1, x.shape[1])] * 2))
