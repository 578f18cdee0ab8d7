"""Compiled kernels on disk, for the next process. CuPy has a cache of its own for those that it compiles.

A process runs these files as code. So the folder must belong to the user, and nobody else may be able to write to it.
Each entry ends in a seal, a line with the hash of its name and content. An entry without the right seal is made again.
In PTX this line is a comment, and loaders of ELF files do not read that far.
"""

import contextlib
import hashlib
import os
import stat
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path

from .errors import BackendError

VARIABLE = "CUPY_KERNELS_CACHE_DIR"
SEAL_BYTES = len("\n// sha256 \n") + 64

_locks = {}
os.register_at_fork(after_in_child=_locks.clear)  # a forked child lacks the threads that would release them


def once(known: dict, key, make: Callable):
    """known[key]. If it is missing, one thread calls make(), and other threads that need the same key wait."""
    if key not in known:
        with _lock(id(known), key):
            if key not in known:
                known[key] = make()
    return known[key]


def _lock(*key) -> threading.Lock:
    return _locks.setdefault(key, threading.Lock())


def folder() -> Path:
    """The cache's folder, created if necessary. Raises BackendError if it cannot be created or is not safe."""
    chosen = os.environ.get(VARIABLE)
    of_system = os.environ.get("XDG_CACHE_HOME", "")
    default = Path(of_system if os.path.isabs(of_system) else "~/.cache", "cupy_kernels")
    try:
        found = Path(default if chosen is None else chosen).expanduser()
    except RuntimeError:
        raise unusable(default if chosen is None else chosen, "no home directory is known") from None
    if not found.is_absolute():
        raise unusable(repr(chosen), "this is not an absolute path")
    with _errors_of(found):
        found.mkdir(mode=0o700, parents=True, exist_ok=True)
        status = found.stat()
    if status.st_uid != os.geteuid():
        raise unusable(
            found,
            f"it belongs to the user {status.st_uid}, this process runs as {os.geteuid()}, and code that others can "
            "write is not loaded",
        )
    if _others_write(status):
        raise unusable(
            found,
            f"its mode is {stat.filemode(status.st_mode)}, and code that others can write is not loaded. "
            f"Say `chmod go-w {found}`, or choose another",
        )
    return found


def entry(name: str, make: Callable[[], bytes]) -> Path:
    """The path of entry `name`. If `read` cannot read it, it is written: the bytes of make(), and a seal."""
    path = folder() / name
    with _lock(path):
        if read(path) is None:
            _write(path, make())
    return path


def read(path: Path) -> bytes | None:
    """The content of an entry, without its seal. None if there is no entry of the user's own with the right seal."""
    with _errors_of(path.parent):
        try:
            with open(path, "rb") as file:
                status, whole = os.fstat(file.fileno()), file.read()
        except FileNotFoundError:
            return None
    content, seal = whole[:-SEAL_BYTES], whole[-SEAL_BYTES:]
    own = status.st_uid == os.geteuid() and not _others_write(status)
    return content if own and seal == _seal(path.name, content) else None


def unusable(found: Path | str, why) -> BackendError:
    """The BackendError for a folder that compiled kernels cannot be written to or loaded from."""
    origin = f"set by {VARIABLE}" if VARIABLE in os.environ else "the default"
    return BackendError(
        f"cannot keep compiled kernels in {found}, {origin}: {why}. {VARIABLE} chooses the folder: the absolute path "
        "of one of your own, with some MB free, not mounted read-only or noexec"
    )


def _write(path, content):
    """Writes atomically: other processes see all of the file or nothing."""
    with _errors_of(path.parent):
        descriptor, half_written = tempfile.mkstemp(dir=path.parent)
        try:
            with open(descriptor, "wb") as file:
                file.write(content + _seal(path.name, content))
            os.replace(half_written, path)
        except BaseException:
            os.unlink(half_written)
            raise


def _seal(name, content) -> bytes:
    return f"\n// sha256 {hashlib.sha256(name.encode() + content).hexdigest()}\n".encode()


def _others_write(status) -> bool:
    return bool(status.st_mode & (stat.S_IWGRP | stat.S_IWOTH))


@contextlib.contextmanager
def _errors_of(found):
    try:
        yield
    except OSError as error:
        raise unusable(found, error) from None
