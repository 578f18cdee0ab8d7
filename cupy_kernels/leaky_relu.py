"""Leaky ReLU, elementwise."""

from .common import same_shape
from .elementwise import elementwise_variants, launch_elementwise


def leaky_relu_forward(x, y, slope) -> None:
    """Writes y = x where x > 0, else slope x. Arrays are contiguous and have one shape and dtype."""
    same_shape(x=x, y=y)
    launch_elementwise("leaky_relu.cu", "leaky_relu_forward", (x, y), slope)


def leaky_relu_backward(dy, x, dx, slope) -> None:
    """Writes dx = dy where x > 0, else slope dy."""
    same_shape(dy=dy, x=x, dx=dx)
    launch_elementwise("leaky_relu.cu", "leaky_relu_backward", (dy, x, dx), slope)


def variants():
    """Every variant that this module launches."""
    return elementwise_variants("leaky_relu.cu")
