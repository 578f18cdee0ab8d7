"""The interface of what runs kernels: `compiler.backend` on a GPU, by CuPy; `emulator.backend` on the CPU."""

from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

from . import cache
from .source import Kernel, in_force, unit

MAX_SHARED_BYTES = 227 << 10  # of a block, on the GPUs that have most
_listeners = []


class Room(NamedTuple):
    """The resources of a launch whose blocks wait for each other, so that all must run at once."""

    multiprocessors: int
    shared_bytes: int  # of each of them, for one block


class Backend:
    """Compiles kernels, caches the results, and starts launches.

    The kernels of a file with the same macros are compiled together; edited kernels are compiled alone. The cache's
    keys are text (`unit`), macros and `_place`.
    """

    unit = staticmethod(unit)

    def __init__(self):
        self._compiled = {}

    def prepare(self, kernels: Iterable[Kernel]) -> None:
        """Compiles the kernels that are not compiled yet, in parallel. Errors are raised after all have been compiled.

        Launches alone would compile one kernel after the other. NVRTC 12 and newer compiles in several threads at once,
        NVRTC 11.8 in one at a time.
        """
        place = self._place()
        wanted = {self._key(kernel, place): kernel for kernel in map(in_force, kernels)}
        missing = [kernel for key, kernel in wanted.items() if key not in self._compiled]
        with ThreadPoolExecutor() as threads:
            for compiled in [threads.submit(self._once, kernel, place) for kernel in missing]:
                compiled.result()

    def room(self, device: int | None) -> Room | None:
        """The `Room` of a device, given by its index; None if it does not support such launches."""
        raise NotImplementedError

    def handle(self, kernel: Kernel, shared_bytes: int):
        """The compiled kernel, as `start` takes it. shared_bytes: dynamic shared memory of a launch."""
        raise NotImplementedError

    def config(self, step):
        """What `start` needs to know of a `launch.Step` besides its handle and its numbers. None: nothing."""

    def start(self, launches: list, stream: int | None) -> None:
        """Starts `launch.Packed`s in order, in a stream of the current device. Does not check arguments."""
        raise NotImplementedError

    def compiled(self, kernel: Kernel):
        """The compiled code that contains `kernel`. A process compiles it at the first call."""
        return self._once(kernel, self._place())

    def forget(self) -> None:
        """Empties the cache in memory, so that later calls compile, or load from disk, again."""
        self._compiled.clear()

    def _once(self, kernel, place):
        def compile_it():
            compiled = [listener(kernel) for listener in _listeners]
            try:
                return self._compile(kernel, place)
            finally:
                for end in filter(None, compiled):
                    end()

        return cache.once(self._compiled, self._key(kernel, place), compile_it)

    def _key(self, kernel, place):
        return self.unit(kernel), kernel.variant, place

    def _place(self):
        """What compiled kernels depend on, besides text and macros."""

    def _compile(self, kernel, place):
        raise NotImplementedError


def on_compile(listener):
    """Calls listener(kernel) before each variant that this process compiles or loads from disk, on any backend.

    The listener gets the first kernel of the variant that is launched. It is called in the thread that compiles. It may
    return a function, which is called when that is done.
    Returns a function that removes the listener.
    """
    _listeners.append(listener)
    return lambda: _listeners.remove(listener)
