"""What runs kernels: `compiler.backend` on a GPU, by CuPy, `emulator.backend` on the CPU."""

from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

from . import cache
from .source import Kernel, in_force, unit

_listeners = []


class Room(NamedTuple):
    """What a launch whose blocks wait for each other has: they must all run at once."""

    multiprocessors: int
    shared_bytes: int  # of each of them, for one block


class Backend:
    """Compiles kernels, keeps what it compiled, and starts launches.

    Kernels of one file with the same macros are compiled together, edited ones alone. What that gives is kept by text,
    macros and `_place`.
    """

    def __init__(self):
        self._compiled = {}

    def prepare(self, kernels: Iterable[Kernel]) -> None:
        """Compiles those of `kernels` that are not compiled yet, at the same time. Errors are raised once all are done.

        For a caller that knows what it will launch: the launches would compile one after the other. NVRTC of CUDA 12
        and newer compiles in several threads at once, that of 11.8 in one at a time.
        """
        place = self._place()
        wanted = {_key(kernel, place): kernel for kernel in map(in_force, kernels)}
        missing = [kernel for key, kernel in wanted.items() if key not in self._compiled]
        with ThreadPoolExecutor() as threads:
            for compiled in [threads.submit(self._once, kernel, place) for kernel in missing]:
                compiled.result()

    def room(self, device: int | None) -> Room | None:
        """Of a device, by its index; None if it has no such launches."""
        raise NotImplementedError

    def handle(self, kernel: Kernel, shared_bytes: int):
        """The compiled kernel as `start` takes it. shared_bytes: dynamic shared memory of a launch."""
        raise NotImplementedError

    def start(self, launches: list, stream: int | None) -> None:
        """Starts `launch.Packed`s of `handle`s in order, in a stream of the current device; checks no argument."""
        raise NotImplementedError

    def compiled(self, kernel: Kernel):
        """What `kernel` is in, compiled at the first call of a process."""
        return self._once(kernel, self._place())

    def forget(self) -> None:
        """Compiles anew, or loads from disk, what is asked for from now on."""
        self._compiled.clear()

    def _once(self, kernel, place):
        def compile_it():
            for listener in _listeners:
                listener(kernel)
            return self._compile(kernel, place)

        return cache.once(self._compiled, _key(kernel, place), compile_it)

    def _place(self):
        """What compiled kernels depend on besides text and macros."""

    def _compile(self, kernel, place):
        raise NotImplementedError


def _key(kernel, place):
    return unit(kernel), kernel.variant, place


def on_compile(listener):
    """Calls listener(kernel) before each variant that this process compiles or loads from a disk cache, on any backend.

    The listener gets the first kernel of the variant that is launched. It is called in the thread that compiles.
    Returns a function that removes the listener.
    """
    _listeners.append(listener)
    return lambda: _listeners.remove(listener)
