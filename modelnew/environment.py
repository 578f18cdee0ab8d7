"""Installed versions, the backend and why it is used, and which committed records belong to the current kernels."""

import ctypes
import json
import platform
import re
from importlib import metadata
from pathlib import Path

import torch

from cupy_kernels import cache, compiler, emulator, nvrtc, source
from cupy_kernels.errors import BackendError

from . import __version__, installation


def describe() -> dict:
    """Everything that `python -m modelnew env` prints, as values for JSON."""
    return {
        "modelnew": __version__,
        "versions": versions(),
        "gpus": gpus(),
        "backend": backend(),
        "emulator": _emulator(),
        "digest": source.digest(),
        "install": install(),
        "records": records(),
    }


def versions() -> dict:
    """Versions of everything that results depend on; None for what is not installed."""
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torch_cuda": torch.version.cuda,
        "numpy": _installed("numpy"),
        "cupy": _cupy(),
        "nvrtc": _nvrtc(),
        "nvrtc_wgmma": nvrtc.of_wgmma(),  # that compiles wgmma instructions; it may be another one
        "driver": _driver(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }


def gpus() -> list[dict]:
    """The GPUs that torch finds."""
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
    """{"name", "why"}. name: "cuda" (kernels run on the GPU), "emulator" (on the CPU), or None (they cannot run)."""
    if (why := why_no_gpu()) is None:
        return {"name": "cuda", "why": f"torch and CuPy {_cupy()} see {torch.cuda.get_device_name()}"}
    try:
        return {"name": "emulator", "why": f"{why}; C++ compiler: {' '.join(emulator.compiler())}"}
    except BackendError as error:
        return {"name": None, "why": f"{why}; {error}"}


def why_no_gpu() -> str | None:
    """Why kernels cannot run on a GPU; None if they can."""
    if not torch.cuda.is_available():
        return "torch finds no GPU" if torch.version.cuda else "this build of torch has no CUDA support"
    try:
        compiler.cupy()
    except BackendError as error:
        return f"torch sees {torch.cuda.get_device_name()}, but {error}"
    return None


def install() -> dict:
    """`installation.advice` for this machine."""
    found, known = versions(), gpus()
    return installation.advice(
        installation.Machine(
            gpu=known[0]["name"] if known else None,
            capability=int(known[0]["arch"].removeprefix("sm_")) if known else 0,
            driver=found["driver"],
            torch_cuda=found["torch_cuda"],
            cupy=installation.cupy_wheels(),
            nvrtc=found["nvrtc"],
            wgmma=nvrtc.of_wgmma() is not None,
            compiler=_emulator() is not None,
        )
    )


def device(name: str | None = None) -> torch.device:
    """The device called `name`; by default the device of `backend`.

    Raises ValueError if it is neither an NVIDIA GPU of this machine nor the CPU, and BackendError if no kernel can run
    there.
    """
    found = backend()
    try:
        wanted = torch.device(name or ("cuda" if found["name"] == "cuda" else "cpu"))
    except RuntimeError:  # torch lists names that are no use here
        wanted = None
    if wanted is None or wanted.type not in ("cuda", "cpu"):
        raise ValueError(f"kernels run on cuda, cuda:1, ..., or on cpu by emulation; received {name}")
    if wanted.type == "cuda" and found["name"] != "cuda":
        raise BackendError(
            f"no kernel can run on {wanted}: {why_no_gpu()}. With --device cpu they run in the emulator; "
            "`python3 -m modelnew env` says what a GPU needs"
        )
    if wanted.type == "cuda" and (wanted.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"torch counts its {torch.cuda.device_count()} GPUs from cuda:0; received {wanted}")
    if wanted.type == "cpu":
        emulator.compiler()
    cache.folder()
    return wanted


def slug() -> str:
    """The GPU's name in file names, such as "h100-80gb-hbm3"; "cpu" without a GPU."""
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    return re.sub(r"[^a-z0-9]+", "-", name.lower().removeprefix("nvidia ")).strip("-")


def results() -> Path | None:
    """The folder of committed records, if the current directory is the repository's root; else None."""
    return Path("benchmarks", "results") if Path("cupy_kernels", "cu").is_dir() else None


def records() -> list[dict]:
    """{"file", "digest", "matches"} of each committed record. matches: whether the current kernel sources produced it.

    Empty if the current directory is not the repository's root.
    """
    found, folder = [], results()
    for path in sorted(folder.glob("*.json")) if folder else ():
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except ValueError:
            content = None
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
    """Version of CuPy's NVRTC, or if CuPy finds no driver, of the one that `cupy_kernels.nvrtc` finds."""
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
