"""Locks that survive os.fork(). A fork copies all memory of a process, but only the thread that calls it."""

import os
import threading


def lock() -> threading.RLock:
    """A lock that a fork waits for. Else the child could find it locked by a thread that the child does not have."""
    made = threading.RLock()
    os.register_at_fork(before=made.acquire, after_in_parent=made.release, after_in_child=made.release)
    return made
