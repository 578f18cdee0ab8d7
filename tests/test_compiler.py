"""Compilation: errors that point at the kernel's line, one compilation per variant, and who is told of it."""

import contextlib
import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from threads import in_threads

from cupy_kernels import backend, cache, compiler, nvrtc, source
from cupy_kernels.compile_errors import compile_error
from cupy_kernels.errors import BackendError, KernelCompileError
from cupy_kernels.launch import launch, recorded
from cupy_kernels.parsing import definitions
from cupy_kernels.plan import Slot
from cupy_kernels.source import Kernel, Variant
from modelnew.calls import run

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


def needs_nvrtc(least_major=11):
    try:
        nvrtc.shared_library(least_major)
    except BackendError as error:
        pytest.skip(str(error))


def check_place(error):
    text = str(error.value)
    first, second, third = text.splitlines()[:3]
    assert first in ("wrong [wrong.cu] does not compile:", "wrong.cu does not compile:")
    assert second.startswith(("wrong.cuh:3", "wrong.cuh(3)"))
    assert "undefined_name" in second
    assert third == "    3 | __device__ inline float helper(float v) { return v * undefined_name; }"
    assert text.count("* undefined_name") == 1  # the source line, whatever both compilers say


def test_compile_error(device):
    with source.override(WRONG), pytest.raises(KernelCompileError) as error:
        start(Kernel("wrong.cu", "wrong"), torch.zeros(4, device=device))
    check_place(error)


def test_compile_error_of_nvrtc():
    needs_nvrtc()
    with source.override(WRONG), pytest.raises(KernelCompileError) as error:
        nvrtc.compile_variant(Kernel("wrong.cu", "wrong"), "sm_80")
    check_place(error)


SOURCE = "int a;\nint b = zap + zip;\nint c = zap;"
GCC = """a.cu: In function 'void f()':
a.cu: In instantiation of 'T g(T) [with T = float]':
a.cu:3:1: required from here
a.cu:2:9: error: 'zap' was not declared in this scope
    2 | int b = zap + zip;
      |         ^~~
a.cu:2:15: error: 'zip' was not declared in this scope
a.cu:3:9: error: 'zap' was not declared in this scope
compilation terminated.
zig: warning: argument unused during compilation: '-c' [-Wunused-command-line-argument]
"""
NVRTC = """a.cu(2): error: identifier "zap" is undefined
  int b = zap + zip;
          ^

a.cu(3): error: no instance of "zap" matches the argument list:
            argument types are: (float)

a.cu(1): error: expected a ";"

3 errors detected in the compilation of "/tmp/some where/0ab1.cubin.cu".
"""
PLACES = [
    "a.cu:2:9: error: 'zap' was not declared in this scope",
    "    2 | int b = zap + zip;",
    "a.cu: In instantiation of 'T g(T) [with T = float]':",
    "a.cu:3:1: required from here",
    "a.cu:2:15: error: 'zip' was not declared in this scope",
    "a.cu:3:9: error: 'zap' was not declared in this scope",
    "    3 | int c = zap;",
]


def lines_of_error(*logs):
    with source.override({"a.cu": SOURCE}):
        head, *lines = str(compile_error(Variant("a.cu"), *logs)).splitlines()
    assert head == "a.cu does not compile:"
    return lines


def test_compile_error_of_one_compiler_shows_each_line_of_the_text_once():
    assert lines_of_error(GCC) == PLACES
    assert lines_of_error(NVRTC) == [
        'a.cu(2): error: identifier "zap" is undefined',
        "    2 | int b = zap + zip;",
        'a.cu(3): error: no instance of "zap" matches the argument list:',
        "    3 | int c = zap;",
        "            argument types are: (float)",
        'a.cu(1): error: expected a ";"',
        "    1 | int a;",
    ]
    assert lines_of_error("of no line\n") == ["of no line"]


def test_compile_error_of_two_compilers_shows_each_line_of_the_text_once():
    both = lines_of_error(GCC, "NVRTC 1.2", NVRTC)
    assert both == [
        *PLACES[:2],
        'NVRTC 1.2: identifier "zap" is undefined',
        *PLACES[2:],
        'NVRTC 1.2: no instance of "zap" matches the argument list',
        "NVRTC 1.2:",
        'a.cu(1): error: expected a ";"',
        "    1 | int a;",
    ]
    assert lines_of_error(GCC, "NVRTC 1.2", "of no line\n") == [*PLACES, "NVRTC 1.2:", "of no line"]


def test_an_edited_kernel_runs_and_the_packaged_one_returns(device):
    y = torch.zeros(3, device=device)
    kernel = Kernel("add.cu", "add", (("ADDEND", 1),))
    for text, expected in ((ADD, 1), (ADD.replace("+=", "+= 10 *"), 11), (ADD, 12)):
        with source.override({"add.cu": text}):
            start(kernel, y)
        assert y.tolist() == [expected] * 3


def test_one_compilation_for_a_file_and_its_macros(device, monkeypatch):
    seen = []
    monkeypatch.setattr(backend, "_listeners", [])
    backend.on_compile(seen.append)
    y = torch.zeros(3, device=device)
    with source.override({"add.cu": ADD + f"// {device}"}):
        for value, name in ((1, "add"), (1, "subtract"), (2, "add"), (1, "add"), (2, "subtract")):
            start(Kernel("add.cu", name, (("ADDEND", value),)), y)
    assert y.tolist() == [1] * 3
    assert [(k.name, dict(k.defines)["ADDEND"]) for k in seen] == [("add", 1), ("add", 2)]


class Refused(Exception):
    """As CuPy's CompileException, which comes while NVRTCError, with a status, is handled."""

    def __init__(self, message, status=nvrtc.ERROR_COMPILATION):
        super().__init__(message)
        self.__context__ = RuntimeError()
        self.__context__.status = status


class Function:
    """A kernel that keeps what it is told."""

    shared_size_bytes = 768

    def __init__(self, name):
        self.name = name
        self.told = []

    @property
    def max_dynamic_shared_size_bytes(self):
        return self.told[-1]

    @max_dynamic_shared_size_bytes.setter
    def max_dynamic_shared_size_bytes(self, size):
        time.sleep((60_000 - size) / 1e5)  # the least comes last
        self.told.append(size)


@pytest.fixture
def gpu(monkeypatch, tmp_path):
    """What compiler.py takes from CuPy, without a GPU. loaded: modules so far; compiling(module): a compilation."""
    fake = SimpleNamespace(loaded=[], compiling=lambda module: None, capability="90", architectures=(80, 90))
    thread = threading.local()

    class RawModule:
        def __init__(self, code=None, options=(), path=None):
            self.code, self.options, self.path = code, options, path
            fake.loaded.append(self)

        def compile(self):
            fake.compiling(self)

        def get_function(self, name):
            return Function(name)

    class Device(contextlib.nullcontext):
        @property
        def compute_capability(self):
            return fake.capability

    cuda = SimpleNamespace(
        runtime=SimpleNamespace(getDevice=lambda: getattr(thread, "device", 0)),
        Device=Device,
        compiler=SimpleNamespace(CompileException=Refused),
        nvrtc=SimpleNamespace(getSupportedArchs=lambda: fake.architectures),
    )
    monkeypatch.setattr(compiler, "cupy", lambda: SimpleNamespace(cuda=cuda, RawModule=RawModule))
    monkeypatch.setattr(compiler, "backend", compiler.Gpu())
    monkeypatch.setattr(backend, "_listeners", [])
    monkeypatch.setenv("CUPY_KERNELS_CACHE_DIR", str(tmp_path / "cache"))
    fake.thread = thread
    return fake


def test_kernels_of_a_call_are_compiled_at_the_same_time(gpu):
    together = threading.Barrier(2, timeout=10)  # a compilation ends only if two run at the same time

    def compiling(module):
        together.wait()
        if "wrong" in module.code:
            raise Refused("wrong.cu(1): error: no")

    gpu.compiling = compiling
    seen = []
    backend.on_compile(seen.append)
    kernels = [Kernel("add.cu", name, (("ADDEND", value),)) for name in ("add", "subtract") for value in (1, 2)]
    with source.override({"add.cu": ADD}):
        compiler.backend.prepare(kernels)
        assert {(k.name, dict(k.defines)["ADDEND"]) for k in seen} == {("subtract", 1), ("subtract", 2)}
        compiler.backend.prepare(kernels)
        assert [compiler.backend.function(k).name for k in kernels] == ["add", "add", "subtract", "subtract"]
    assert len(seen) == 2
    with source.override({"add.cu": ADD + "// wrong"}), pytest.raises(KernelCompileError, match="does not compile"):
        compiler.backend.prepare(kernels)


@pytest.mark.parametrize("file", [None, "tanh.cu", "tanh.cuh", "common.cuh"])
def test_kernels_of_an_edited_file_are_compiled_alone(gpu, file):
    """By NVRTC, at the same time. The emulator's compiler would take longer."""
    macros = (("scalar_t", "float"), ("acc_t", "float"), ("WIDTH", 4))
    kernels = [Kernel("tanh.cu", name, macros) for name in ("tanh_forward", "tanh_backward")]
    edits = {file: source.packaged(file) + "// edited"} if file else {}
    with source.override(edits):
        compiler.backend.prepare(kernels)
        codes = [module.code for module in gpu.loaded]
        assert len({source.unit_of_file(kernel) for kernel in kernels}) == 1
        for kernel in kernels:
            code = source.unit(kernel)
            assert code in codes
            assert set(definitions(code)) == ({kernel.name} if file else {k.name for k in kernels})
            assert code.count("\n") == source.unit_of_file(kernel).count("\n")
            nvrtc.compile_ptx(kernel, "compute_80")
    assert len(codes) == (2 if file else 1)


def test_threads_compile_a_variant_once_for_a_gpu(gpu):
    kernel, seen = Kernel("add.cu", "add", (("ADDEND", 1),)), []
    gpu.compiling = lambda module: time.sleep(0.05)
    backend.on_compile(seen.append)

    def of_device(i):
        gpu.thread.device = i % 2
        return compiler.backend.function(kernel)

    with source.override({"add.cu": ADD}):
        found = in_threads(of_device)
    assert len(set(found[::2])) == len(set(found[1::2])) == 1
    assert found[0] is not found[1]
    assert len(seen) == len(gpu.loaded) == 2


def test_of_threads_the_one_that_needs_most_shared_memory_counts(gpu):
    sizes = [compiler.DEFAULT_SHARED_BYTES + 1024 * (8 - i) for i in range(8)]
    kernel = Kernel("add.cu", "add", (("ADDEND", 1),))
    with source.override({"add.cu": ADD}):
        found = in_threads(lambda i: compiler.backend.function(kernel, sizes[i]))
    assert found[0].max_dynamic_shared_size_bytes == max(sizes)


@pytest.mark.parametrize(("over", "told"), [(0, []), (16, [compiler.DEFAULT_SHARED_BYTES - 768 + 16])])
def test_the_texts_own_arrays_count_as_shared_memory(gpu, over, told):
    kernel = Kernel("add.cu", "add", (("ADDEND", 1),))
    with source.override({"add.cu": ADD}):
        found = compiler.backend.function(kernel, compiler.DEFAULT_SHARED_BYTES - 768 + over)
    assert found.told == told


BOTH_KINDS_OF_SHARED = """extern "C" __global__ void both(float* y) {
    extern __shared__ float large[];
    __shared__ float small[192];
    small[threadIdx.x] = threadIdx.x, large[threadIdx.x] = 1;
    __syncthreads();
    y[threadIdx.x] = small[31 - threadIdx.x] + large[31 - threadIdx.x];
}"""


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_both_kinds_of_shared_memory_together_over_48_kib():
    y = torch.zeros(32, device="cuda")
    with source.override({"both.cu": BOTH_KINDS_OF_SHARED}):
        run(lambda y: launch(Kernel("both.cu", "both"), (1, 1, 1), (32, 1, 1), (y,), 48 * 1024 - 512), y)
    assert y.tolist() == [32 - i for i in range(32)]


WGMMA = Kernel("add.cu", "add", (("ADDEND", 1),), "sm_90a")


@pytest.mark.parametrize("real", [False, True], ids=["fake", "real"])
def test_threads_make_a_cubin_once(gpu, monkeypatch, tmp_path, real):
    """One for two GPUs."""
    if real:
        needs_nvrtc(nvrtc.WGMMA_MAJOR)
    calls, compile_it = [], nvrtc.cubin if real else lambda kernel: time.sleep(0.05) or b"code"
    monkeypatch.setattr(nvrtc, "version", lambda least_major=11: "12")
    monkeypatch.setattr(nvrtc, "cubin", lambda kernel: calls.append(kernel) or compile_it(kernel))

    def of_device(i):
        gpu.thread.device = i % 2
        return compiler.backend.function(WGMMA)

    with source.override({"add.cu": ADD}):
        in_threads(of_device)
    (kept,) = (tmp_path / "cache").iterdir()
    assert [module.path for module in gpu.loaded] == [str(kept)] * 2
    assert len(calls) == 1
    assert cache.read(kept).startswith(b"\x7fELF" if real else b"code")


def test_a_short_cubin_is_not_handed_on(gpu, monkeypatch, tmp_path):
    monkeypatch.setattr(nvrtc, "version", lambda least_major: "12")
    monkeypatch.setattr(nvrtc, "cubin", lambda kernel: b"code" * 100)
    with source.override({"add.cu": ADD}):
        compiler.backend.function(WGMMA)
        (kept,) = (tmp_path / "cache").iterdir()
        whole = kept.read_bytes()
        kept.write_bytes(whole[:200])
        compiler.backend.forget()
        compiler.backend.function(WGMMA)
    assert kept.read_bytes() == whole


def test_ptx_for_a_gpu_that_is_newer_than_nvrtc(gpu, tmp_path):
    needs_nvrtc()
    kernel = Kernel("add.cu", "add", (("ADDEND", 1),))
    with source.override({"add.cu": ADD}):
        compiler.backend.function(kernel)
        gpu.capability = "120"
        compiler.backend.forget()
        compiler.backend.function(kernel)
    of_cupy, own = gpu.loaded
    assert of_cupy.path is None
    assert of_cupy.code
    (kept,) = (tmp_path / "cache").iterdir()
    assert own.path == str(kept)
    assert own.code is None
    text = kept.read_text()  # with its seal
    assert ".target sm_90" in text
    assert ".entry add(" in text
    assert text.splitlines()[-1].startswith("// ")


@pytest.mark.parametrize(
    ("capability", "known", "expected"),
    [
        ("80", (70, 80, 90), None),
        ("90", (70, 80, 90), None),
        ("120", (70, 80, 90), "compute_90"),
        ("103", (90, 100, 101, 120), "compute_101"),
        ("120", (90, 100, 120, 121), None),
        ("52", (75, 80), None),  # older than all: CuPy's to refuse
    ],
)
def test_architecture_of_the_ptx(capability, known, expected):
    assert nvrtc.ptx_architecture(capability, known) == expected


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_the_driver_compiles_ptx(monkeypatch):
    """As on a GPU that NVRTC does not know. Code for GPUs before 9.0 does not wait for the kernels before it."""
    capability = compiler.cupy().cuda.Device(torch.cuda.current_device()).compute_capability
    known = compiler.cupy().cuda.nvrtc.getSupportedArchs()
    assert nvrtc.ptx_architecture(capability, known) is None
    older = max(number for number in known if number < int(capability))
    monkeypatch.setattr(nvrtc, "ptx_architecture", lambda capability, known: f"compute_{older}")
    y, kernel = torch.zeros(3, device="cuda"), Kernel("add.cu", "add", (("ADDEND", 1),))
    waiting = ADD.replace("{", "{ wait_for_earlier_kernels();")
    with source.override({"add.cu": waiting}), recorded() as steps:
        launch(kernel, (1, 1, 1), (3, 1, 1), (Slot(0, (3,), "float32"),))
    assert steps[0].overlapping
    with source.override({"add.cu": waiting}):
        start(kernel, y)
        found, config = compiler.backend.function(kernel), compiler.backend.config(steps[0])
    assert y.tolist() == [1] * 3
    assert (found.ptx_version, found.binary_version) == (older, int(capability))
    assert (config is None) == (older < 90)


def test_the_text_is_blamed_for_its_own_errors_alone(gpu):
    needs_nvrtc()
    kernel, shared = Kernel("wrong.cu", "wrong"), "__shared__ float s[1 << 20]; s[threadIdx.x] = 1; y[0] = s[1 - y[0]]"
    for body in ("undefined_name", shared, 'asm volatile("no.such.instruction;")'):  # the compiler, and ptxas
        text = f'extern "C" __global__ void wrong(float* y) {{ {body}; }}'
        with source.override({"wrong.cu": text}), pytest.raises(KernelCompileError, match="does not compile"):
            nvrtc.compile_variant(kernel, "sm_80")

    def invalid_option(module):
        raise Refused("nvrtc: error: invalid value for --gpu-architecture (-arch)", status=5)

    gpu.compiling = invalid_option
    with source.override({"add.cu": ADD}):
        kernel = Kernel("add.cu", "add", (("ADDEND", 1),))
        for compile_it in (compiler.backend.function, lambda kernel: nvrtc.compile_variant(kernel, "sm_999")):
            with pytest.raises(BackendError, match=r"status 5.*gpu-architecture") as error:
                compile_it(kernel)
            assert "does not compile" not in str(error.value)


def test_the_folder_of_cupy(gpu):
    def full(module):
        raise OSError(28, "No space left on device", "/cache/1.cubin")

    gpu.compiling = full
    with source.override({"add.cu": ADD}), pytest.raises(BackendError, match=r"/cache/1\.cubin.*CUPY_CACHE_DIR"):
        compiler.backend.function(Kernel("add.cu", "add", (("ADDEND", 1),)))


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
    with pytest.raises(BackendError, match=r"CuPy is not installed.*python3 -m modelnew env"):
        compiler.cupy.__wrapped__()
