"""CUDA C kernels as text, and the code that runs them: on CuPy arrays on a GPU, on NumPy arrays in a CPU emulator.

There is one module for each operator or fusion, named after its `.cu` file. Its functions get outputs and workspaces as
arguments and allocate nothing. `modelnew` adds PyTorch.

To look at kernels and change them: `kernels`, `show`, `text`, `override`, `edit`, `edited`, `reset`, `attributes`,
`ptx`, `sass`. In IPython: `%load_ext modelnew`, then `%%cu?`.
"""

from .inspection import attributes, ptx, sass
from .tinker import edit, edited, kernels, override, reset, show, text

__all__ = ["attributes", "edit", "edited", "kernels", "override", "ptx", "reset", "sass", "show", "text"]


def load_ipython_extension(ipython) -> None:
    """Called by `%load_ext cupy_kernels`, which does the same as `%load_ext modelnew`."""
    try:
        ipython.extension_manager.load_extension("modelnew")
    except ImportError as error:
        raise ImportError(
            f"the magics compare kernels with PyTorch's operators, and need modelnew and torch: {error}. "
            "python3 -m pip install torch ipython; the functions of cupy_kernels (show, override, ...) work without"
        ) from error
