"""Hyperbolic tangent, elementwise."""

from .common import FLOATS, THREADS, ceil_div, same_shape, scalar_macros, type_macros, vector_width
from .launch import launch
from .source import DTYPES, Kernel, Variant


def tanh_forward(x, y) -> None:
    """y = tanh(x). Contiguous arrays of one shape and dtype; y is written."""
    same_shape(x=x, y=y)
    _launch("tanh_forward", x, y)


def tanh_backward(dy, y, dx) -> None:
    """dx = dy * (1 - y^2), where y is the output of the forward. dx is written."""
    same_shape(dy=dy, y=y, dx=dx)
    _launch("tanh_backward", dy, y, dx)


def variants():
    """Every variant that this module launches."""
    for scalar in FLOATS:
        for width in (1, 16 // DTYPES[scalar].itemsize):
            yield Variant("tanh.cu", (*scalar_macros(scalar), ("WIDTH", width)))


def _launch(name, *arrays):
    width = vector_width(*arrays)
    kernel = Kernel("tanh.cu", name, (*type_macros(arrays[0]), ("WIDTH", width)))
    grid = (ceil_div(arrays[0].size, width * THREADS), 1, 1)
    launch(kernel, grid, (THREADS, 1, 1), (*arrays, arrays[0].size))
