"""CUDA C kernels as text, and what runs them on arrays: CuPy's on a GPU, NumPy's through a CPU emulator.

One module per operator: `conv_transpose`, `conv_transpose_mma`, `batch_norm`, `tanh`, `max_pool`, `group_norm`, and the
fusions `bn_tanh_max_pool` and `conv_bn_pool`. Their functions take outputs and workspaces as arguments and allocate
nothing. `modelnew` puts torch on top.

To look at the kernels and to change them: `kernels`, `show`, `override`, `edit`, `reset`, `attributes`, `ptx`, `sass`;
in IPython `%load_ext modelnew`, then `%%cu?`.
"""

from .tinker import attributes, edit, kernels, override, ptx, reset, sass, show

__all__ = ["attributes", "edit", "kernels", "override", "ptx", "reset", "sass", "show"]


def load_ipython_extension(ipython) -> None:
    """What `%load_ext cupy_kernels` calls: it does what `%load_ext modelnew` does."""
    try:
        ipython.extension_manager.load_extension("modelnew")
    except ImportError as error:
        raise ImportError(
            f"the magics compare kernels with PyTorch's operators, and need modelnew and torch: {error}. "
            "pip install modelnew; the functions of cupy_kernels (show, override, ...) work without"
        ) from error
