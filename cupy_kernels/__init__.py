"""CUDA C kernels as text, and what runs them on arrays: CuPy's on a GPU, NumPy's through a CPU emulator.

One module per operator or fusion, of the name of its `.cu` file. Their functions take outputs and workspaces as
arguments and allocate nothing. `modelnew` puts torch on top.

To look at the kernels and to change them: `kernels`, `show`, `text`, `override`, `edit`, `edited`, `reset`,
`attributes`, `ptx`, `sass`; in IPython `%load_ext modelnew`, then `%%cu?`.
"""

from .inspection import attributes, ptx, sass
from .tinker import edit, edited, kernels, override, reset, show, text

__all__ = ["attributes", "edit", "edited", "kernels", "override", "ptx", "reset", "sass", "show", "text"]


def load_ipython_extension(ipython) -> None:
    """What `%load_ext cupy_kernels` calls: it does what `%load_ext modelnew` does."""
    try:
        ipython.extension_manager.load_extension("modelnew")
    except ImportError as error:
        raise ImportError(
            f"the magics compare kernels with PyTorch's operators, and need modelnew and torch: {error}. "
            "pip install modelnew; the functions of cupy_kernels (show, override, ...) work without"
        ) from error
