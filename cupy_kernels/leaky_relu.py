"""Leaky ReLU, elementwise."""

from .common import same_shape
from .elementwise import elementwise_variants, launch_elementwise


def leaky_relu_forward(x, y, slope) -> None:
    """y = x where x > 0, else slope x. Contiguous arrays of one shape and dtype; y is written."""
    same_shape(x=x, y=y)
    launch_elementwise("leaky_relu.cu", "leaky_relu_forward", (x, y), slope)


def leaky_relu_backward(dy, x, dx, slope) -> None:
    """dx = dy where x > 0, else slope dy. dx is written."""
    same_shape(dy=dy, x=x, dx=dx)
    launch_elementwise("leaky_relu.cu", "leaky_relu_backward", (dy, x, dx), slope)


def variants():
    """Every variant that this module launches."""
    return elementwise_variants("leaky_relu.cu")
