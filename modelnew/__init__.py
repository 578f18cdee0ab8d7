"""ConvTranspose2d -> BatchNorm2d -> Tanh -> MaxPool2d -> GroupNorm on CUDA C kernels, as drop-in PyTorch modules.

In IPython, `%load_ext modelnew` loads the magics `%%cu`, `%cu_text` and `%cu_reset`.
"""

__version__ = "0.1.0"

from .distributed import convert_sync_batchnorm
from .explanation import explain
from .fusions import Sequential
from .graphs import graphed
from .model import Model, ModelNew, get_init_inputs, get_inputs
from .replacement import replace_layers

__all__ = [
    "Model",
    "ModelNew",
    "Sequential",
    "convert_sync_batchnorm",
    "explain",
    "get_init_inputs",
    "get_inputs",
    "graphed",
    "replace_layers",
]


def load_ipython_extension(ipython) -> None:
    """Called by `%load_ext modelnew`."""
    from .magics import KernelMagics  # needs IPython

    ipython.register_magics(KernelMagics)
