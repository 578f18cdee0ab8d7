"""What survives os.fork(), which copies the memory of a process but only the thread that calls it."""

import os
import threading


def lock() -> threading.RLock:
    """A lock that a fork waits for: the child must not get it locked by a thread that the child does not have."""
    made = threading.RLock()
    os.register_at_fork(before=made.acquire, after_in_parent=made.release, after_in_child=made.release)
    return made
