"""leaky_relu, with the signature of torch.nn.functional.leaky_relu, and its layer."""

import torch
import torch.nn.functional as F
from torch import nn

from cupy_kernels.leaky_relu import leaky_relu_backward, leaky_relu_forward

from ..calls import call
from ..cases import Case, activations
from ..formats import dense_like, flat, unflat
from ..interop import check_floating, number
from ..registration import ops, register_elementwise
from ..untraced import untraced
from .gradients import Function, apply, differentiable, will_need_grad

__all__ = ["LeakyReLU", "leaky_relu"]


def _forward(new, x, slope):
    y = new.like(x)
    leaky_relu_forward(x, y, slope)
    return y


def _backward(new, dy, x, slope):
    dx = new.like(x)
    leaky_relu_backward(dy, x, dx, slope)
    return dx


class _LeakyReLU(Function):
    @staticmethod
    def forward(ctx, x, slope):
        ctx.save_for_backward(x)
        ctx.slope = slope
        return unflat(call(_forward, flat(x), slope), x)

    @staticmethod
    def backward(ctx, dy):
        return differentiable(_LeakyReLUGradient, dy, *ctx.saved_tensors, ctx.slope), None


class _LeakyReLUGradient(Function):
    """dx = dy where x > 0, else slope dy: linear in dy, and piecewise constant in x."""

    @staticmethod
    def forward(dy, x, slope):
        return unflat(call(_backward, flat(dense_like(dy, x)), flat(x), slope), x)

    @staticmethod
    def setup_context(ctx, inputs, output):
        _, x, ctx.slope = inputs
        ctx.save_for_backward(x)

    @staticmethod
    def backward(ctx, v):
        (x,) = ctx.saved_tensors
        need_dy, need_x, _ = ctx.needs_input_grad
        ddy = differentiable(_LeakyReLUGradient, v, x, ctx.slope) if need_dy else None
        return ddy, torch.zeros_like(x) if need_x else None, None


@untraced
def leaky_relu(input: torch.Tensor, negative_slope: float = 0.01, inplace: bool = False) -> torch.Tensor:
    """y = x where x > 0, else negative_slope * x, elementwise. See torch.nn.functional.leaky_relu.

    input: any shape; float32, float64, float16 or bfloat16.
    negative_slope: a number.
    inplace: must be False.

    Returns a new tensor with the shape, dtype and strides of PyTorch's result. Result and gradient equal PyTorch's bit
    for bit. The gradient at 0 is negative_slope * dy.

    Raises TypeError for another dtype or a negative_slope that is not a number, and ValueError for inplace=True.
    """
    _refuse(inplace)
    check_floating(input=input)
    x, slope = dense_like(input), number(negative_slope, "negative_slope")
    return apply(_LeakyReLU, x, slope) if will_need_grad(x) else unflat(call(_forward, flat(x), slope), x)


def _refuse(inplace):
    if inplace:
        raise ValueError("leaky_relu writes to new memory, received inplace=True; leave it out, or pass inplace=False")


def _stand_in(input, negative_slope=0.01, inplace=False):
    _refuse(inplace)
    return ops.leaky_relu(input, number(negative_slope, "negative_slope"))


register_elementwise(
    leaky_relu,
    _stand_in,
    lambda dy, x, slope: _LeakyReLUGradient.forward(dy, dense_like(x), slope),
    lambda v, dy, x: torch.zeros_like(x),
    numbers=", float negative_slope",
)


class LeakyReLU(nn.LeakyReLU):
    """See torch.nn.LeakyReLU and `modelnew.functional.leaky_relu`. Raises ValueError for inplace=True."""

    def __init__(self, negative_slope: float = 0.01, inplace: bool = False):
        _refuse(inplace)
        super().__init__(negative_slope, inplace)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return leaky_relu(input, self.negative_slope, self.inplace)


# An odd size has a rest that fills no pack, and the second starts where 16 bytes do not.
CASES = tuple(
    Case(
        what,
        ("leaky_relu.cu",),
        lambda input, part=part: leaky_relu(input.flatten()[part], 0.2),
        lambda input, part=part: F.leaky_relu(input.flatten()[part], 0.2),
        lambda images: {"input": torch.randn(activations(images))},
    )
    for what, part in (("leaky_relu", slice(None, -1)), ("leaky_relu, unaligned", slice(1, None)))
)
