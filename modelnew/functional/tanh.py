"""tanh, with the signature of torch.tanh."""

import torch
from torch.autograd.function import once_differentiable

from cupy_kernels.tanh import tanh_backward, tanh_forward

from ..interop import check_floating, dense, run


class _Tanh(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        x = dense(x)
        y = torch.empty_like(x)
        run(tanh_forward, x, y)
        ctx.save_for_backward(y)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        (y,) = ctx.saved_tensors
        dx = torch.empty_like(y)
        run(tanh_backward, dense(dy), y, dx)
        return dx


def tanh(input: torch.Tensor) -> torch.Tensor:
    """y = tanh(x), elementwise, for any shape; float32, float64, float16 or bfloat16. See torch.tanh.

    The result is contiguous. Raises TypeError for another dtype.
    """
    check_floating(input=input)
    return _Tanh.apply(input)
