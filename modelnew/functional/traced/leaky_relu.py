"""ops.leaky_relu."""

import torch

from ...formats import dense_like
from ...interop import number
from ...registration import in_place_of, ops, register
from .. import leaky_relu as eager
from .tanh import fake_elementwise


@in_place_of
def leaky_relu(input, negative_slope=0.01, inplace=False):
    if inplace:
        eager.refuse_inplace()
    return ops.leaky_relu(input, number(negative_slope, "negative_slope"))


register(
    "leaky_relu(Tensor input, float negative_slope) -> Tensor",
    eager.leaky_relu.__wrapped__,
    fake_elementwise,
    lambda args, y: args[:1],
    lambda ctx, dy: (ops.leaky_relu_backward(dy, *ctx.saved_tensors, ctx.args[1]),),
)


def _second(ctx, v):
    (x,) = ctx.saved_tensors
    return ops.leaky_relu_backward(v, x, ctx.args[2]), torch.zeros_like(x)


register(
    "leaky_relu_backward(Tensor dy, Tensor x, float negative_slope) -> Tensor",
    lambda dy, x, slope: eager._LeakyReLUGradient.forward(dy, dense_like(x), slope),
    lambda dy, x, slope: torch.empty_like(x),
    lambda args, dx: args[1:2],
    _second,
)
