"""Which install line `python -m modelnew env` names, on machines that are made up."""

import configparser
import re
import types
from pathlib import Path

import pytest

from cupy_kernels import compiler, nvrtc
from modelnew import environment, installation, numerics
from modelnew.installation import WHEELS, Machine, advice

T4 = Machine("Tesla T4", 75, torch_cuda="11.8", driver="470.57.02")
V100 = Machine("Tesla V100", 70, torch_cuda="13.0", driver="580.65.06")
A100 = Machine("NVIDIA A100", 80, torch_cuda="12.6", driver="580.65.06")
H100 = Machine("NVIDIA H100", 90, torch_cuda="13.0", driver="580.65.06")
B200 = Machine("NVIDIA B200", 100, torch_cuda="12.8", driver="570.86.10")
OF_11 = {"cupy": ("cupy-cuda11x",), "nvrtc": "11.8"}
OF_12 = {"cupy": ("cupy-cuda12x",), "nvrtc": "12.6"}
OF_13 = {"cupy": ("cupy-cuda13x",), "nvrtc": "13.0"}


def test_wheels_are_those_of_the_extras():
    root = Path(__file__).resolve().parents[1]
    parser = configparser.ConfigParser()
    parser.read(root / "setup.cfg")
    extras = parser["options.extras_require"]
    for extra, wheels in WHEELS.items():
        assert tuple(extras[extra].split()) == wheels


@pytest.mark.parametrize(
    ("machine", "extra", "reason"),
    [
        (T4, "cuda11", "driver 470.57.02 allows up to CUDA 11"),
        (V100, "cuda12", "allows up to CUDA 12"),  # CUDA 13 has no Volta
        (A100, "cuda12", "both use the same NVRTC"),
        (A100._replace(torch_cuda="11.8"), "cuda11", "both use the same NVRTC"),
        (H100, "cuda13", "wgmma instructions, which NVRTC 12"),
        (H100._replace(**OF_11), "cuda13", "cupy-cuda11x is installed with NVRTC 11.8"),
        (H100._replace(torch_cuda="11.8"), "cuda13", "wgmma"),
        (H100._replace(driver="535.10.01", torch_cuda="11.8"), "cuda12", "allows up to CUDA 12"),
        (B200, "cuda12", "NVRTC 12.8 and newer"),
        (A100._replace(torch_cuda=None), "cuda13", "torch is built without CUDA."),
        (B200._replace(torch_cuda="12.6", driver="580.65.06"), "cuda13", "NVRTC 12.8 and newer"),
        (B200._replace(**OF_12), "cuda12", "cupy-cuda12x is installed with NVRTC 12.6"),
        (A100._replace(cupy=("cupy-cuda11x", "cupy-cuda12x"), nvrtc="12.6"), "cuda12", "break each other"),
        (A100._replace(driver="535.10.01", **OF_13), "cuda12", "cupy-cuda13x is installed"),
        (Machine(compiler=False), "emulator", "needs a C++ compiler"),
    ],
)
def test_what_to_install(machine, extra, reason):
    found = advice(machine)
    assert found["extra"] == extra
    assert reason in found["why"]
    for wheel in WHEELS[extra]:
        assert wheel in found["command"]
    assert ("--upgrade" in found["command"]) == (len(machine.cupy) == 1 and WHEELS[extra][0].startswith(machine.cupy))
    uninstalled = re.search(r"uninstall -y ([\w -]+?) &&", found["command"])
    right = len(machine.cupy) < 2 and WHEELS[extra][0].startswith(machine.cupy or "")
    assert (uninstalled[1].split() if uninstalled else []) == ([] if right else [*machine.cupy])


@pytest.mark.parametrize(
    ("machine", "extra", "reason"),
    [
        (Machine(), "emulator", "torch finds no GPU, and there is no NVIDIA driver"),
        (T4._replace(**OF_11), "cuda11", "are installed, and fit"),
        (A100._replace(**OF_11), "cuda11", "are installed, and fit"),
        (H100._replace(**OF_12), "cuda12", "are installed, and fit"),
        (H100._replace(wgmma=True, **OF_11), "cuda11", "wgmma come from a newer NVRTC"),
        (H100._replace(driver="470.57.02", **OF_11), "cuda11", "a driver of 525 or newer would allow more"),
        (B200._replace(driver="580.65.06", **OF_13), "cuda13", "are installed, and fit"),
        (T4._replace(driver="440.1"), None, "update it to 450"),
        (Machine(driver="440.1", torch_cuda="11.8"), None, "update it to 450"),
        (Machine("Tesla P100", 60, driver="580.65.06", torch_cuda="12.6"), "emulator", "6.0) is too old"),
        (Machine(driver="580.65.06", torch_cuda="13.0"), None, "CUDA_VISIBLE_DEVICES"),
    ],
)
def test_nothing_to_install(machine, extra, reason):
    found = advice(machine)
    assert (found["extra"], found["command"]) == (extra, None)
    assert reason in found["why"]


@pytest.mark.parametrize(
    ("machine", "extra", "build", "reason"),
    [
        (Machine(driver="470.57.02", torch_cuda="13.0"), "cuda11", "cu118", "CUDA 13.0, which needs driver 580"),
        (Machine(driver="580.65.06", torch_cuda="14.0"), "cuda13", "cu130", "CUDA 14.0, which needs a newer driver."),
        (Machine(driver="580.65.06"), "cuda13", "cu130", "torch is built without CUDA"),
        (Machine(driver="550.54.14", **OF_11), "cuda12", "cu128", "torch is built without CUDA"),
    ],
)
def test_a_torch_that_cannot_use_the_driver(machine, extra, build, reason):
    found = advice(machine)
    assert found["extra"] == extra
    assert f"download.pytorch.org/whl/{build} && " in found["command"]
    assert ("uninstall -y cupy-cuda11x" in found["command"]) == bool(machine.cupy)
    assert reason in found["why"]


def test_this_machine_is_described(monkeypatch):
    """What `environment` finds reaches the advice."""
    versions = {"driver": "580.65.06", "torch_cuda": "13.0", "nvrtc": "11.8"}
    monkeypatch.setattr(environment, "versions", lambda: versions)
    monkeypatch.setattr(environment, "gpus", lambda: [{"name": "NVIDIA H100", "arch": "sm_90"}])
    monkeypatch.setattr(installation, "cupy_wheels", lambda: ("cupy-cuda11x",))
    monkeypatch.setattr(environment.nvrtc, "of_wgmma", lambda: None)
    assert environment.install() == advice(H100._replace(**OF_11))
    monkeypatch.setattr(environment.nvrtc, "of_wgmma", lambda: "12.9")
    assert environment.install()["command"] is None


def test_installed_wheels():
    assert all(name.startswith("cupy") for name in installation.cupy_wheels())


@pytest.mark.parametrize(
    ("capability", "compiles", "driver", "expected"),
    [
        ((9, 0), "13.0", 13000, True),
        ((9, 0), "12.9", 13000, True),
        ((9, 0), "13.0", 12080, False),  # the driver would refuse its code
        ((9, 0), None, 13000, False),
        ((8, 0), "13.0", 13000, False),
        ((12, 0), "13.0", 13000, False),
    ],
)
def test_where_wgmma_is_used(monkeypatch, capability, compiles, driver, expected):
    cuda = types.SimpleNamespace(runtime=types.SimpleNamespace(driverGetVersion=lambda: driver))
    monkeypatch.setattr(compiler, "cupy", lambda: types.SimpleNamespace(cuda=cuda))
    monkeypatch.setattr(numerics, "_capability", lambda _: capability)
    monkeypatch.setattr(numerics.nvrtc, "of_wgmma", lambda: compiles)
    numerics._drivers_cuda.cache_clear()
    try:
        assert numerics.has_wgmma.__wrapped__(0) == expected
    finally:
        numerics._drivers_cuda.cache_clear()


def test_another_nvrtc_compiles_wgmma(monkeypatch):
    """CuPy's NVRTC, if it is new enough, else any other one."""
    libraries = {"libnvrtc.so.11.2": (11, 8), "libnvrtc.so.12": (12, 9), "libnvrtc.so.13": (13, 0)}

    def load(name):
        if name not in libraries:
            raise OSError(name)
        return libraries[name]

    monkeypatch.setattr(nvrtc, "preload_wheels", lambda: ())
    monkeypatch.setattr(nvrtc, "_wheel_libraries", lambda *_: [])
    monkeypatch.setattr(nvrtc.ctypes, "CDLL", load)
    monkeypatch.setattr(nvrtc, "_version", lambda library: library)
    for major, expected in ((11, "12.9"), (12, "12.9"), (13, "13.0")):
        monkeypatch.setattr(nvrtc, "_cupy_major", lambda major=major: major)
        nvrtc.shared_library.cache_clear()
        assert nvrtc.of_wgmma() == expected
    del libraries["libnvrtc.so.12"], libraries["libnvrtc.so.13"]
    nvrtc.shared_library.cache_clear()
    assert nvrtc.of_wgmma() is None
    nvrtc.shared_library.cache_clear()
