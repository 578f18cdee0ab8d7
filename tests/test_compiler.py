"""Compilation: errors that point at the kernel's line, one compilation per variant, and who is told of it."""

import contextlib
import os
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from cupy_kernels import compiler, nvrtc, source
from cupy_kernels.errors import BackendError, KernelCompileError
from cupy_kernels.launch import launch
from cupy_kernels.source import Kernel
from modelnew.interop import run

WRONG = {
    "wrong.cu": """#include "wrong.cuh"
extern "C" __global__ void wrong(float* y) {
    y[threadIdx.x] = helper(2);
}""",
    "wrong.cuh": """// A header.

__device__ inline float helper(float v) { return v * undefined_name; }
""",
}
ADD = """#include "common.cuh"
extern "C" __global__ void add(INOUT float* y) {
    y[threadIdx.x] += ADDEND;
}
extern "C" __global__ void subtract(INOUT float* y) {
    y[threadIdx.x] -= ADDEND;
}"""


def start(kernel, tensor):
    run(lambda y: launch(kernel, (1, 1, 1), (y.size, 1, 1), (y,)), tensor)


def needs_nvrtc():
    try:
        nvrtc.shared_library()
    except BackendError as error:
        pytest.skip(str(error))


def check_place(error):
    text = str(error.value)
    first, second, third = text.splitlines()[:3]
    assert first in ("wrong [wrong.cu] does not compile:", "wrong.cu does not compile:")
    assert second.startswith(("wrong.cuh:3", "wrong.cuh(3)"))
    assert "undefined_name" in second
    assert third == "    3 | __device__ inline float helper(float v) { return v * undefined_name; }"
    assert "Compiler log:" in text


def test_compile_error(device):
    with source.override(WRONG), pytest.raises(KernelCompileError) as error:
        start(Kernel("wrong.cu", "wrong"), torch.zeros(4, device=device))
    check_place(error)


def test_compile_error_of_nvrtc():
    needs_nvrtc()
    with source.override(WRONG), pytest.raises(KernelCompileError) as error:
        nvrtc.compile_cubin(Kernel("wrong.cu", "wrong"), "sm_80")
    check_place(error)


def test_compile_error_leaves_out_the_folder_of_the_compilation():
    end = '1 error detected in the compilation of "{}0ab1.cubin.cu".'
    for folder in ("/some/where/", "C:\\some where\\", ""):
        error = source.compile_error(Kernel("tanh.cu", "tanh_forward"), "tanh.cu(1): error\n" + end.format(folder))
        assert str(error).endswith(end.format(""))


def test_an_edited_kernel_runs_and_the_packaged_one_returns(device):
    y = torch.zeros(3, device=device)
    kernel = Kernel("add.cu", "add", (("ADDEND", 1),))
    for text, expected in ((ADD, 1), (ADD.replace("+=", "+= 10 *"), 11), (ADD, 12)):
        with source.override({"add.cu": text}):
            start(kernel, y)
        assert y.tolist() == [expected] * 3


def test_one_compilation_for_a_file_and_its_macros(device, monkeypatch):
    seen = []
    monkeypatch.setattr(compiler, "_listeners", [])
    compiler.on_compile(seen.append)
    y = torch.zeros(3, device=device)
    with source.override({"add.cu": ADD + f"// {device}"}):
        for value, name in ((1, "add"), (1, "subtract"), (2, "add"), (1, "add"), (2, "subtract")):
            start(Kernel("add.cu", name, (("ADDEND", value),)), y)
    assert y.tolist() == [1] * 3
    assert [(k.name, dict(k.defines)["ADDEND"]) for k in seen] == [("add", 1), ("add", 2)]


class Refused(Exception):
    pass


@pytest.fixture
def backend(monkeypatch):
    """What compiler.py takes from CuPy, without a GPU. Its modules compile only if two of them do at the same time."""
    together = threading.Barrier(2, timeout=10)

    class RawModule:
        def __init__(self, code, options):
            self.code = code

        def compile(self):
            together.wait()
            if "wrong" in self.code:
                raise Refused("wrong.cu(1): error: no")

        def get_function(self, name):
            return name

    cuda = SimpleNamespace(
        runtime=SimpleNamespace(getDevice=lambda: 0),
        Device=contextlib.nullcontext,
        compiler=SimpleNamespace(CompileException=Refused),
    )
    monkeypatch.setattr(compiler, "cupy", lambda: SimpleNamespace(cuda=cuda, RawModule=RawModule))
    for name in ("_modules", "_functions"):
        monkeypatch.setattr(compiler, name, {})
    monkeypatch.setattr(compiler, "_listeners", [])


def test_kernels_of_a_call_are_compiled_at_the_same_time(backend):
    seen = []
    compiler.on_compile(seen.append)
    kernels = [Kernel("add.cu", name, (("ADDEND", value),)) for name in ("add", "subtract") for value in (1, 2)]
    with source.override({"add.cu": ADD}):
        compiler.prepare(kernels)
        assert {(k.name, dict(k.defines)["ADDEND"]) for k in seen} == {("subtract", 1), ("subtract", 2)}
        compiler.prepare(kernels)
        assert [compiler.function(k) for k in kernels] == ["add", "add", "subtract", "subtract"]
    assert len(seen) == 2
    with source.override({"add.cu": ADD + "// wrong"}), pytest.raises(KernelCompileError, match="does not compile"):
        compiler.prepare(kernels)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_the_next_process_reads_the_disk_cache(tmp_path):
    script = """
import torch
from modelnew.functional import tanh
x = torch.randn(5, device="cuda")
assert torch.allclose(tanh(x), torch.tanh(x))
"""
    environment = {
        **os.environ,
        "CUPY_CACHE_DIR": str(tmp_path),
        "PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")]),
    }

    def cached():
        subprocess.run([sys.executable, "-c", script], env=environment, check=True)
        return {(file.name, file.stat().st_ino, file.stat().st_mtime_ns) for file in tmp_path.iterdir()}

    first = cached()
    assert first
    assert cached() == first  # a compilation would have written the file again


def test_no_cupy(monkeypatch):
    monkeypatch.setitem(sys.modules, "cupy", None)
    with pytest.raises(BackendError, match=r"CuPy is not installed.*pip install 'modelnew\[cuda11\]'"):
        compiler.cupy.__wrapped__()
