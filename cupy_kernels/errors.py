"""Exceptions of this package, besides ValueError and TypeError."""


class KernelCompileError(RuntimeError):
    """A kernel's text does not compile. The message shows each error, and its source line once.

    log: what the compiler said, in full.
    """

    log: str = ""


class UnsupportedError(ValueError):
    """These kernels do not support a call, but others may. The message gives the reason."""


class EmulatorError(RuntimeError):
    """The emulator found undefined behaviour in a kernel."""


class BackendError(RuntimeError):
    """No kernel can run here.

    There is neither a GPU that CuPy can use nor a C++ compiler for the emulator, or a folder or a setting that they
    need cannot be used.
    """
