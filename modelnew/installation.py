"""Which install line is the best for this machine, and why."""

import re
import shlex
from importlib import metadata
from typing import NamedTuple

# The extras of setup.cfg. Their wheels by name work in a clone, and beside an installed package, alike.
WHEELS = {
    "cuda11": ("cupy-cuda11x==13.6.*", "nvidia-cuda-nvrtc-cu11", "nvidia-cuda-runtime-cu11"),
    "cuda12": ("cupy-cuda12x>=13.6", "nvidia-cuda-nvrtc-cu12", "nvidia-cuda-runtime-cu12"),
    "cuda13": ("cupy-cuda13x>=14", "nvidia-cuda-nvrtc>=13,<14", "nvidia-cuda-runtime>=13,<14"),
    "emulator": ("ziglang",),
}
_LEAST_DRIVER = {11: 450, 12: 525, 13: 580}
_TORCH = {11: "cu118", 12: "cu128", 13: "cu130"}  # PyTorch's name of its builds
_OLDEST, _OLDEST_OF_CUDA_13 = 70, 75
_PIP = "python3 -m pip"


class Machine(NamedTuple):
    """What the choice depends on."""

    gpu: str | None = None  # the name of the first GPU that torch sees
    capability: int = 0  # of that GPU; 90 for 9.0
    driver: str | None = None  # such as "580.159.04"
    torch_cuda: str | None = None  # such as "13.0"; None for a build of torch without CUDA
    cupy: tuple[str, ...] = ()  # names of the installed CuPy wheels
    nvrtc: str | None = None  # such as "11.8"
    wgmma: bool = False  # whether an installed NVRTC that is used compiles wgmma instructions
    compiler: bool = True  # whether there is a C++ compiler for the emulator


def cupy_wheels() -> tuple[str, ...]:
    """Names of the installed CuPy packages, of which one is right."""
    found = {dist.metadata["Name"] for dist in metadata.distributions()}
    return tuple(sorted(name for name in found if name == "cupy" or (name or "").startswith("cupy-cuda")))


def advice(machine: Machine) -> dict:
    """{"extra", "command", "why"}. extra: the best one of setup.cfg's, or None. command: None if nothing is missing."""
    driver = int(machine.driver.split(".")[0]) if machine.driver else None
    if machine.gpu:
        return _with_gpu(machine, driver)
    if driver is not None:
        return _unseen_gpu(machine, driver)
    command = None if machine.compiler else _install("emulator")
    why = "torch finds no GPU, and there is no NVIDIA driver. The kernels run on the CPU, in the emulator"
    return _found("emulator", command, why + ("." if machine.compiler else ", which needs a C++ compiler."))


def _with_gpu(machine, driver):
    name = f"{machine.gpu} (compute capability {machine.capability // 10}.{machine.capability % 10})"
    if machine.capability < _OLDEST:
        return _found("emulator", None, f"{name} is too old: the kernels need 7.0 or newer.")
    allowed = [
        cuda
        for cuda, least in _LEAST_DRIVER.items()
        if (driver is None or driver >= least) and (cuda < 13 or machine.capability >= _OLDEST_OF_CUDA_13)
    ]
    if not allowed:
        return _found(None, None, f"driver {machine.driver} is too old: update it to {_LEAST_DRIVER[11]} or newer.")
    least, reason = _least_nvrtc(machine.capability)
    of_torch = _numbers(machine.torch_cuda)
    same = of_torch[:1] and of_torch[0] in allowed and of_torch >= least
    best = of_torch[0] if same else allowed[-1]
    extra = f"cuda{best}"
    parts = [f"{name} {reason}" if reason else name]
    who = f"driver {machine.driver}"
    if machine.capability < _OLDEST_OF_CUDA_13 and driver and driver >= _LEAST_DRIVER[13]:
        who = "the GPU"
    parts.append(f"{who} allows up to CUDA {allowed[-1]}" if driver else "the driver is unknown")
    built = f"for CUDA {machine.torch_cuda}" if of_torch else "without CUDA"
    parts.append(f"torch is built {built}" + (", so both use the same NVRTC" if same else ""))
    if len(machine.cupy) == 1:
        nvrtc = _numbers(machine.nvrtc)
        cuda = next((n for n in _LEAST_DRIVER if machine.cupy[0] == f"cupy-cuda{n}x"), (*nvrtc, 0)[0])
        enough = nvrtc >= least or (machine.wgmma and machine.capability == 90) or allowed[-1] < least[0]
        if cuda in allowed and enough:
            found = f"{machine.cupy[0]} and NVRTC {machine.nvrtc} are installed, and fit"
            if nvrtc < least:
                found += ": the kernels with wgmma come from a newer NVRTC that is installed" * machine.wgmma
                found += f"; a driver of {_LEAST_DRIVER[least[0]]} or newer would allow more" * (not machine.wgmma)
            return _found(f"cuda{cuda}", None, f"{parts[0]}; {parts[1]}; {found}.")
        parts.append(f"{machine.cupy[0]} is installed with NVRTC {machine.nvrtc}")
    elif machine.cupy:
        parts.append(f"{', '.join(machine.cupy)} are installed and break each other")
    return _found(extra, _install(extra, machine.cupy), "; ".join(parts) + ".")


def _unseen_gpu(machine, driver):
    """There is a driver, but torch finds no GPU."""
    allowed = [cuda for cuda, least in _LEAST_DRIVER.items() if driver >= least]
    if not allowed:
        return _found(None, None, f"driver {machine.driver} is too old: update it to {_LEAST_DRIVER[11]} or newer.")
    of_torch = _numbers(machine.torch_cuda)
    if of_torch[:1] and of_torch[0] <= allowed[-1]:
        why = f"driver {machine.driver} and torch for CUDA {machine.torch_cuda} fit, but torch finds no GPU."
        return _found(None, None, f"{why} See what nvidia-smi lists, and what CUDA_VISIBLE_DEVICES is.")
    why = f"driver {machine.driver} allows up to CUDA {allowed[-1]}, but torch is built " + (
        f"for CUDA {machine.torch_cuda}, which needs {_driver_of(of_torch[0])}. "
        "Update the driver, or install an older build of torch."
        if of_torch
        else "without CUDA."
    )
    extra, index = f"cuda{allowed[-1]}", f"https://download.pytorch.org/whl/{_TORCH[allowed[-1]]}"
    torch = f"{_PIP} install --force-reinstall torch --index-url {index}"
    return _found(extra, f"{torch} && {_install(extra, machine.cupy)}", why)


def _least_nvrtc(capability):
    """(the first version of NVRTC that is best for a GPU, why)"""
    if capability >= 100:
        return (12, 8), "is known to NVRTC 12.8 and newer; from an older one, the driver must compile each kernel again"
    if capability == 90:
        return (12, 0), "is fastest with wgmma instructions, which NVRTC 12 and newer compile"
    return (11, 0), ""


def _install(extra, installed=()):
    """The command. installed: CuPy's wheels. Their files overlap: beside another one, even the right one is broken."""
    right = installed == (re.match(r"[\w-]+", WHEELS[extra][0])[0],)
    first = f"{_PIP} uninstall -y {shlex.join(installed)} && " if installed and not right else ""
    # Beside the right CuPy, NVRTC is too old; else what torch brings stays, because torch wants that version.
    return f"{first}{_PIP} install {'--upgrade ' * right}{shlex.join(WHEELS[extra])}"


def _driver_of(cuda):
    return f"driver {_LEAST_DRIVER[cuda]} or newer" if cuda in _LEAST_DRIVER else "a newer driver"


def _numbers(version):
    """(12, 8) for "12.8"; () for None."""
    return tuple(map(int, version.split(".")[:2])) if version else ()


def _found(extra, command, why):
    return {"extra": extra, "command": command, "why": why}
