"""Times of calls on a GPU: warm-up, an L2 cache without the last trial's data, contenders in turns."""

import contextlib
import gc
import math
import statistics
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch

from cupy_kernels.errors import UnsupportedError
from cupy_kernels.launch import launch

from .graphs import no_garbage_collector
from .interop import launching_on

_FLUSH_BYTES = 256 * 2**20  # several times the largest L2 cache
_FLUSHES = 16  # while the GPU does them, the host gets as far ahead as the longest step needs
_WARMUP = 5
_ESTIMATE = 10  # calls that tell how many a trial needs
_LONG_MS = 20  # a launch in the emulator that takes longer is timed once, others a few times
_EMULATED_TRIALS = 3
_TRIALS, _FEWEST_TRIALS = 20, 5
_REASON_LENGTH = 200
_FREEING_SECONDS = 1e-3


class Times(NamedTuple):
    """Milliseconds per call."""

    median: float
    min: float
    max: float


class Clock:
    """Times calls on one device.

    A call on a GPU is timed by CUDA events in torch's current stream. The L2 cache is overwritten so often before it
    that the host runs ahead: the time is the GPU's. With few images, callers wait for the host instead, and its time
    varies from call to call. So several, one after another, are timed by the host's clock.
    """

    def __init__(self, device: torch.device, trial_ms: float | None = None, latency: bool = False):
        """trial_ms: how long a trial lasts at least that times calls by the host's clock. 0: one call, however short.
            None: a trial is one call, timed by events on a GPU.
        latency: each of these calls begins when the GPU has done the one before.
        """
        self.device, self.trial_ms, self.latency = device, trial_ms, latency
        self.gpu = device.type == "cuda"
        self.events = self.gpu and trial_ms is None
        self.flush = torch.empty(_FLUSH_BYTES, dtype=torch.uint8, device=device) if self.gpu else None
        self.warmup = _WARMUP if self.gpu else 1

    def calls(self, function: Callable) -> int:
        """How many calls of function() make a trial."""
        return math.ceil(self.trial_ms / self.time(function, _ESTIMATE)()) if self.trial_ms else 1

    def time(self, function: Callable, calls: int = 1) -> Callable[[], float]:
        """Calls function(), `calls` times. Returns a value from which `read` gets the milliseconds per call."""
        for _ in range(_FLUSHES if self.gpu else 0):
            self.flush.zero_()
        if self.events:
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            function()
            end.record()
            return lambda: start.elapsed_time(end)
        with no_garbage_collector():
            self.synchronize()
            start = time.perf_counter()
            for _ in range(calls):
                function()
                if self.latency:
                    self.synchronize()
            self.synchronize()
            ms = 1e3 * (time.perf_counter() - start) / calls
        return lambda: ms

    def synchronize(self) -> None:
        """Waits for the GPU."""
        if self.gpu:
            torch.cuda.synchronize()

    def settled(self) -> int:
        """Lets autograd's thread free the tensors of earlier calls. Returns the bytes of those left; 0 on the CPU."""
        if not self.gpu:
            return 0
        time.sleep(_FREEING_SECONDS)  # without the GIL, for which that thread waits
        return torch.cuda.memory_allocated()

    def read(self, pending: list[Callable[[], float]]) -> Times:
        """Times of the results of `time`."""
        self.synchronize()
        ms = [read() for read in pending]
        return Times(statistics.median(ms), min(ms), max(ms))


class Contender:
    """A contender that does a piece of work in one layout, with its times, or the reason why there are none."""

    def __init__(
        self,
        who: str,
        layout: str,
        build: Callable[[], Callable],
        check: Callable[[], str | None] | None = None,
    ):
        """build: build() makes the function that is timed.
        check: check() returns what is wrong with its result, or None.
        """
        self.who, self.layout, self.build, self.check = who, layout, build, check
        self.call = self.times = self.peak_mb = self.reason = None
        self.failed, self.calls = False, 1
        self.pending = []

    def warm_up(self, clock: Clock) -> None:
        """Checks, builds and calls the function, which compiles, measures its peak memory, and sizes its trials."""

        def run():
            if self.check and (wrong := self.check()):
                self.refuse(wrong, failed=True)
                return
            self.call = self.build()
            gc.collect()  # what goes during the calls would count as room
            before = clock.settled()
            self.call()
            clock.settled()
            if clock.gpu:
                # Only now: compiling and tuning may take memory of their own. The next call records a CUDA graph.
                torch.cuda.reset_peak_memory_stats()
            for _ in range(clock.warmup - 1):
                self.call()
                clock.settled()
            if clock.gpu:
                self.peak_mb = round((torch.cuda.max_memory_allocated() - before) / 1e6, 1)
            self.calls = clock.calls(self.call)

        self._attempt(run)

    def trial(self, clock: Clock) -> None:
        """One trial."""
        self._attempt(lambda: self.pending.append(clock.time(self.call, self.calls)))

    def refuse(self, reason: str, failed: bool = False) -> None:
        """Excludes the contender from now on."""
        self.reason, self.failed = reason[:_REASON_LENGTH], failed
        self.call, self.pending = None, []

    def row(self, **what) -> dict:
        """The entry of a record: times, and how many calls a trial makes; or a reason, and if that is our failure."""
        ms = [None] * 3 if self.reason else map(rounded, self.times)
        row = {**what, "who": self.who, "layout": self.layout, **dict(zip(("ms", "ms_min", "ms_max"), ms))}
        row["peak_mb"] = None if self.reason else self.peak_mb
        if self.reason:
            return {**row, "reason": self.reason, "failed": self.failed}
        return {**row, "calls": self.calls} if self.calls > 1 else row

    def _attempt(self, function):
        try:
            function()
            return
        except torch.OutOfMemoryError:
            reason, failed = "out of memory", False
        except UnsupportedError as error:
            reason, failed = str(error), False
        except Exception as error:  # torch.compile raises anything, and a row with a reason is better than no record
            reason = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
            failed = self.who.startswith("modelnew")
        self.refuse(reason, failed)
        free()


def measure(function: Callable, device: torch.device, trials: int = _TRIALS) -> Times:
    """Times of function() on `device`."""
    with current(device):
        clock = Clock(device)
        for _ in range(clock.warmup):
            function()
        return clock.read([clock.time(function) for _ in range(trials)])


def measure_launches(launches: Sequence[tuple], device: torch.device) -> list[Times]:
    """Times of each launch alone. launches: arguments of `cupy_kernels.launch.launch`, as its `observed` gives them.

    The more launches, the fewer trials. In the emulator, a slow launch is called only once, without warm-up.
    """
    trials = max(_FEWEST_TRIALS, _TRIALS // max(1, len(launches)))

    def time_of(arguments):
        def start():
            launch(*arguments)

        if device.type == "cpu":
            clock = Clock(device)
            once = clock.read([clock.time(start)])
            if once.median > _LONG_MS:
                return once
            return measure(start, device, _EMULATED_TRIALS)
        return measure(start, device, trials)

    with launching_on(device):
        return list(map(time_of, launches))


def measure_together(
    entrants: list[Contender],
    clock: Clock,
    trials: int,
    refused: Callable[[Contender], str | None],
    describe: Callable[[str], None],
) -> None:
    """Warms up all entrants, one by one, and times them in turns. An entrant that fails is excluded, with a reason.

    refused: refused(entrant) returns why it may not begin, or None.
    describe: describe(text) is called with who is being warmed up.
    """
    for entrant in entrants:
        if reason := refused(entrant):
            entrant.refuse(reason)
            continue
        describe(f"{entrant.who} {entrant.layout}")
        entrant.warm_up(clock)
    # A round more on a GPU, not counted: torch's allocator finds room for all that take turns.
    for _ in range(trials + clock.gpu):
        for entrant in entrants:
            if not entrant.reason:
                entrant.trial(clock)
    for entrant in entrants:
        if not entrant.reason:
            entrant.times = clock.read(entrant.pending[-trials:])


def rounded(ms: float) -> float:
    """Five digits, as in a record."""
    return float(f"{ms:.5g}")


def current(device: torch.device):
    """A context in which the device is the current one."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


def free() -> None:
    """Frees unused memory."""
    gc.collect()
    torch.cuda.empty_cache()
