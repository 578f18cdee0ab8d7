"""What is installed here, which backend runs the kernels and why, and which committed results belong to this code."""

import ctypes
import json
import platform
import re
from importlib import metadata
from pathlib import Path

import torch

from cupy_kernels import compiler, emulator, nvrtc, source
from cupy_kernels.errors import BackendError


def describe() -> dict:
    """Everything that `python -m modelnew env` prints, as values that JSON can hold."""
    return {
        "modelnew": _installed("modelnew"),  # None in a clone that is not installed
        "versions": versions(),
        "gpus": gpus(),
        "backend": backend(),
        "emulator": _emulator(),
        "digest": source.digest(),
        "records": records(),
    }


def versions() -> dict:
    """Versions of what a result depends on; None for what is absent."""
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torch_cuda": torch.version.cuda,
        "numpy": _installed("numpy"),
        "cupy": _cupy(),
        "nvrtc": _nvrtc(),
        "driver": _driver(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }


def gpus() -> list[dict]:
    """The GPUs that torch sees."""
    found = []
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        found.append(
            {
                "name": properties.name,
                "arch": f"sm_{properties.major}{properties.minor}",
                "memory_gb": round(properties.total_memory / 1e9, 1),
                "multiprocessors": properties.multi_processor_count,
            }
        )
    return found


def backend() -> dict:
    """{"name", "why"}: "cuda" (on the GPU), "emulator" (the same kernels on the CPU), or None (nothing runs)."""
    if not torch.cuda.is_available():
        why = "torch finds no GPU" if torch.version.cuda else "this build of torch has no CUDA support"
    else:
        try:
            cupy = compiler.cupy()
            return {"name": "cuda", "why": f"torch and CuPy {cupy.__version__} see {torch.cuda.get_device_name()}"}
        except BackendError as error:
            why = f"torch sees {torch.cuda.get_device_name()}, but {error}"
    try:
        return {"name": "emulator", "why": f"{why}; C++ compiler: {' '.join(emulator.compiler())}"}
    except BackendError as error:
        return {"name": None, "why": f"{why}; {error}"}


def device(name: str | None = None) -> torch.device:
    """The device called `name`, by default the one that `backend` runs on.

    ValueError if it is neither one of the NVIDIA GPUs here nor the CPU; BackendError if no kernel can run there.
    """
    found = backend()
    try:
        wanted = torch.device(name or ("cuda" if found["name"] == "cuda" else "cpu"))
    except RuntimeError:  # torch lists names that are no use here
        wanted = None
    if wanted is None or wanted.type not in ("cuda", "cpu"):
        raise ValueError(f"kernels run on cuda, cuda:1, ..., or on cpu by emulation; received {name}")
    if wanted.type == "cuda" and found["name"] != "cuda":
        raise BackendError(f"no kernel can run on {wanted}: {found['why']}")
    if wanted.type == "cuda" and (wanted.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"torch counts its {torch.cuda.device_count()} GPUs from cuda:0; received {wanted}")
    if wanted.type == "cpu":
        emulator.compiler()
    return wanted


def slug() -> str:
    """The GPU's name as names of files have it, such as "h100-80gb-hbm3"; "cpu" without one."""
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    return re.sub(r"[^a-z0-9]+", "-", name.lower().removeprefix("nvidia ")).strip("-")


def results() -> Path | None:
    """The folder of committed results, if the current directory is the repository's root."""
    return Path("benchmarks", "results") if Path("cupy_kernels", "cu").is_dir() else None


def records() -> list[dict]:
    """{"file", "digest", "matches"} for each committed result: `matches` says whether today's kernel sources made it.

    Empty where the current directory is not the repository's root.
    """
    found, folder = [], results()
    for path in sorted(folder.glob("*.json")) if folder else ():
        content = json.loads(path.read_text(encoding="utf-8"))
        digest = content.get("digest") if isinstance(content, dict) else None
        found.append({"file": path.name, "digest": digest, "matches": digest == source.digest()})
    return found


def _installed(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _cupy() -> str | None:
    nvrtc.preload_wheels()
    try:
        import cupy
    except ImportError:
        return None
    return cupy.__version__


def _nvrtc() -> str | None:
    """CuPy's NVRTC; where CuPy finds no driver, the one that `cupy_kernels.nvrtc` finds."""
    try:
        from cupy.cuda import nvrtc as of_cupy

        return ".".join(map(str, of_cupy.getVersion()))
    except (ImportError, RuntimeError):
        pass
    try:
        return nvrtc.version()
    except BackendError:
        return None


def _emulator() -> str | None:
    try:
        return " ".join(emulator.compiler())
    except BackendError:
        return None


def _driver() -> str | None:
    try:
        nvml = ctypes.CDLL("libnvidia-ml.so.1")
    except OSError:
        return None
    text = ctypes.create_string_buffer(96)
    if nvml.nvmlInit_v2() or nvml.nvmlSystemGetDriverVersion(text, len(text)):
        return None
    return text.value.decode()
