"""Times on a GPU: CUDA events, warm-up, and an L2 cache without the last trial's data."""

import statistics
from typing import NamedTuple

import torch

_FLUSH_BYTES = 256 * 2**20  # several times the largest L2 cache
_WARMUP = 5


class Times(NamedTuple):
    """Milliseconds per call."""

    median: float
    min: float
    max: float


def measure(function, device, trials: int = 20) -> Times:
    """Times of function() on `device`, a GPU, in torch's current stream."""
    with torch.cuda.device(device):
        flush = torch.empty(_FLUSH_BYTES, dtype=torch.uint8, device=device)
        events = []
        for _ in range(_WARMUP + trials):
            flush.zero_()
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            function()
            end.record()
            events.append((start, end))
        torch.cuda.synchronize()
    ms = [start.elapsed_time(end) for start, end in events[_WARMUP:]]
    return Times(statistics.median(ms), min(ms), max(ms))
