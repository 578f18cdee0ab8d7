"""Exceptions of this package besides ValueError and TypeError."""


class KernelCompileError(RuntimeError):
    """A kernel's text does not compile; the message shows file, line and source line, then the compiler's log."""


class EmulatorError(RuntimeError):
    """The emulator caught a kernel at something that CUDA leaves undefined."""


class BackendError(RuntimeError):
    """Nothing here can run a kernel: no GPU that CuPy can use, no C++ compiler for the emulator, or a folder or setting
    that they need is of no use."""
