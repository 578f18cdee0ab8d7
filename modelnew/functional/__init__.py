"""The operators as functions, with torch's own signatures, run by the kernels of `cupy_kernels`."""

import inspect

from . import operators
from .operators import *

__all__ = sorted(name for name, value in vars(operators).items() if inspect.isfunction(value))
