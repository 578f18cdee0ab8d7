"""Launches kernels in which each thread takes WIDTH neighbouring elements of contiguous arrays."""

from collections.abc import Iterator

from .common import FLOATS, THREADS, ceil_div, scalar_macros, type_macros, vector_width
from .launch import launch
from .source import DTYPES, Kernel, Variant


def launch_elementwise(file: str, name: str, arrays, *numbers) -> None:
    """Starts a kernel on arrays of one size and dtype. Its arguments are the arrays, the numbers, and the size."""
    size, width = arrays[0].size, vector_width(*arrays)
    kernel = Kernel(file, name, (*type_macros(arrays[0]), ("WIDTH", width)))
    launch(kernel, (ceil_div(size, width * THREADS), 1, 1), (THREADS, 1, 1), (*arrays, *numbers, size))


def elementwise_variants(file: str) -> Iterator[Variant]:
    """Every variant of a file that `launch_elementwise` launches."""
    for scalar in FLOATS:
        for width in (1, 16 // DTYPES[scalar].itemsize):
            yield Variant(file, (*scalar_macros(scalar), ("WIDTH", width)))
