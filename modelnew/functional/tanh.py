"""tanh, with the signature of torch.tanh, and its layer."""

import torch
from torch import nn

from cupy_kernels.tanh import tanh_backward, tanh_forward

from ..calls import call
from ..cases import Case, activations
from ..formats import dense_like, flat, unflat
from ..interop import check_floating
from ..registration import ops, register_elementwise
from ..untraced import untraced
from .gradients import Function, apply, differentiable, will_need_grad

__all__ = ["Tanh", "tanh"]


def _forward(new, x):
    y = new.like(x)
    tanh_forward(x, y)
    return y


def _backward(new, dy, y):
    dx = new.like(y)
    tanh_backward(dy, y, dx)
    return dx


class _Tanh(Function):
    @staticmethod
    def forward(ctx, x):
        y = unflat(call(_forward, flat(x)), x)
        ctx.save_for_backward(y)
        return y

    @staticmethod
    def backward(ctx, dy):
        return tanh_gradient(dy, *ctx.saved_tensors)


class _TanhGradient(Function):
    """dx = dy (1 - y^2)."""

    @staticmethod
    def forward(dy, y):
        return unflat(call(_backward, flat(dense_like(dy, y)), flat(y)), y)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx, v):
        dy, y = ctx.saved_tensors
        return tanh_gradient(v, y), gradient_of_y(v, dy, y)


def gradient_of_y(v: torch.Tensor, dy: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """-2 v dy y, the gradient of dx = dy (1 - y^2) for y, rounded only once, which matters in 16 bits."""
    wide = torch.promote_types(y.dtype, torch.float32)
    return (-2 * v.to(wide) * dy.to(wide) * y.to(wide)).to(y.dtype)


def tanh_gradient(dy: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """dx = dy (1 - y^2), for y = tanh(x)."""
    return differentiable(_TanhGradient, dy, y)


@untraced
def tanh(input: torch.Tensor) -> torch.Tensor:
    """y = tanh(x), elementwise. See torch.tanh.

    input: any shape; float32, float64, float16 or bfloat16.

    Returns a new tensor with the shape, dtype and strides of PyTorch's result. Raises TypeError for another dtype.
    """
    check_floating(input=input)
    x = dense_like(input)
    return apply(_Tanh, x) if will_need_grad(x) else unflat(call(_forward, flat(x)), x)


register_elementwise(tanh, lambda input: ops.tanh(input), tanh_gradient, gradient_of_y, saves_result=True)


class Tanh(nn.Tanh):
    """See torch.nn.Tanh and `modelnew.functional.tanh`."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return tanh(input)


# An odd size has a rest that fills no pack, the second starts where 16 bytes do not, and where values are small a
# formula that cancels is far off.
CASES = tuple(
    Case(
        what,
        ("tanh.cu",),
        lambda input, part=part: tanh(input.flatten()[part]),
        lambda input, part=part: torch.tanh(input.flatten()[part]),
        lambda images, scale=scale: {"input": scale * torch.randn(activations(images))},
    )
    for what, part, scale in (
        ("tanh", slice(None, -1), 1),
        ("tanh, unaligned", slice(1, None), 1),
        ("tanh, small values", slice(None, -1), 1e-3),
    )
)
