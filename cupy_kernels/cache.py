"""Where compiled kernels are kept from one process to the next, but for those that CuPy keeps itself."""

import os
from pathlib import Path

from .errors import BackendError


def folder() -> Path:
    """Where compiled kernels are kept; made if it does not exist."""
    default = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache"), "cupy_kernels")
    found = Path(os.environ.get("CUPY_KERNELS_CACHE_DIR", default)).expanduser()
    try:
        found.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise BackendError(
            f"cannot keep compiled kernels in {found}, set by CUPY_KERNELS_CACHE_DIR: {error}"
        ) from error
    return found


def write(path: Path, content: bytes) -> None:
    """Writes the file in one step: other processes see all of it or nothing."""
    half_written = path.with_suffix(f".{os.getpid()}")
    half_written.write_bytes(content)
    half_written.replace(path)
