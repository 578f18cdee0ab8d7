"""The five operators as functions, with torch's own signatures, run by the kernels of `cupy_kernels`."""

from .tanh import tanh

__all__ = ["tanh"]
