"""Locks that survive os.fork(). A fork copies a process's memory, but only the calling thread."""

import os
import threading


def lock() -> threading.RLock:
    """A lock that a fork waits for. Otherwise the child could inherit it locked by a thread that it does not have."""
    made = threading.RLock()
    os.register_at_fork(before=made.acquire, after_in_parent=made.release, after_in_child=made.release)
    return made
