"""Work in several threads at once."""

import threading
from concurrent.futures import ThreadPoolExecutor


def in_threads(work, count: int = 8) -> list:
    """Results of work(i), which all begin at the same time."""
    together = threading.Barrier(count, timeout=60)

    def started(i):
        together.wait()
        return work(i)

    with ThreadPoolExecutor(count) as threads:
        return list(threads.map(started, range(count)))
