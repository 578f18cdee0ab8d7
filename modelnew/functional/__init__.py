"""The operators as functions with PyTorch's signatures, computed by the kernels of `cupy_kernels`."""

import inspect

from . import operators
from .operators import *

__all__ = sorted(name for name, value in vars(operators).items() if inspect.isfunction(value))
