"""Hyperbolic tangent, elementwise."""

from .common import same_shape
from .elementwise import elementwise_variants, launch_elementwise


def tanh_forward(x, y) -> None:
    """Writes y = tanh(x). Arrays are contiguous and have one shape and dtype."""
    same_shape(x=x, y=y)
    launch_elementwise("tanh.cu", "tanh_forward", (x, y))


def tanh_backward(dy, y, dx) -> None:
    """Writes dx = dy (1 - y^2), where y is the output of the forward."""
    same_shape(dy=dy, y=y, dx=dx)
    launch_elementwise("tanh.cu", "tanh_backward", (dy, y, dx))


def variants():
    """Every variant that this module launches."""
    return elementwise_variants("tanh.cu")
