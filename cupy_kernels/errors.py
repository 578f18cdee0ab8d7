"""Exceptions of this package besides ValueError and TypeError."""


class KernelCompileError(RuntimeError):
    """A kernel's text does not compile; the message shows file, line and source line, then the compiler's log."""


class UnsupportedError(ValueError):
    """Some kernels do not take a call, and others may; the message says why."""


class EmulatorError(RuntimeError):
    """The emulator found that a kernel does something that CUDA leaves undefined."""


class BackendError(RuntimeError):
    """No kernel can run here: there is no GPU that CuPy can use and no C++ compiler for the emulator, or a folder or
    setting that they need cannot be used."""
