"""How the emulator finds and calls compilers, and what it keeps of what they made."""

import functools
import importlib.util
import subprocess
import sys

import numpy as np
import pytest
from emulated import COPY, REVERSE, run

from cupy_kernels import emulator, nvrtc, source
from cupy_kernels.errors import BackendError, KernelCompileError
from cupy_kernels.source import Kernel

pytestmark = pytest.mark.usefixtures("ascending_order")


def nvrtc_version():
    try:
        return nvrtc.version()
    except BackendError as error:
        pytest.skip(str(error))


def test_nvrtc_is_asked_about_an_edited_text(x, y):
    """Compilers for the host do not tell functions of the host from those of the device."""
    version = nvrtc_version()
    text = "float twice(float v) { return 2 * v; }\n" + COPY.replace("x[threadIdx.x]", "twice(x[threadIdx.x])")
    with pytest.raises(KernelCompileError, match=rf"NVRTC {version}, which compiles .*\nplanted\.cu\(1\): error.*host"):
        run(text, x, y)
    assert not y.any()
    run("__device__ " + text, x, y)
    assert (y == 2 * x).all()


def test_nvrtc_is_asked_about_what_the_emulator_refuses(x, y):
    version = nvrtc_version()
    with pytest.raises(KernelCompileError, match=rf"__isnan(.|\n)*NVRTC {version} takes this text"):
        run(COPY.replace("x[threadIdx.x]", "__isnan(1.0f)"), x, y)
    with pytest.raises(KernelCompileError, match=rf"planted\.cu:1:\d+: error.*\n.*\nNVRTC {version}: id.*undefined$"):
        run(COPY.replace("x[threadIdx.x]", "unknown"), x, y)


@pytest.mark.parametrize("inside", ["", "__shared__ S s;", "static float s = x[0];"])
def test_values_that_code_must_compute(inside, x, y):
    """The code of a variable outside of functions would run as its library is loaded, and end Python."""
    text = COPY.replace("{ ", f"{{ {inside} ", 1) if inside else f"__device__ S outside; {COPY}"
    with pytest.raises(KernelCompileError, match=r"computed: a GPU does not run that\. Set it in the kernel") as error:
        run("struct S { float v; __device__ S() : v(threadIdx.x) {} };\n" + text, x, y)
    assert "can run on a GPU" not in str(error.value)  # NVRTC takes __shared__ S s, and leaves the constructor out


def test_a_kernel_named_like_a_function(x, y):
    text = COPY.replace("float* y", "float* y, int n")
    run(text.replace("void copy(", "void run("), x, y, np.int32(0))  # the emulator's own does not matter
    assert (y == x).all()
    with pytest.raises(KernelCompileError, match=r"the name of a function of CUDA or of the emulator: give it another"):
        run(text.replace("void copy(", "void round("), x, y, np.int32(0))


def test_shared_variables_of_templates_where_gcc_cannot_retain(monkeypatch, fresh, x, y):
    if emulator._is_clang():
        pytest.skip("clang keeps the section of a template's variables")
    call = emulator._call
    monkeypatch.setattr(emulator, "_call", lambda command: call(command) + "warning: 'retain' attribute ignored")
    helper = "__device__ inline float kept(float v) { __shared__ float s[64]; return s[threadIdx.x] = v; }\n"
    text = helper + COPY.replace("x[threadIdx.x]", "kept(x[threadIdx.x])")
    run(text, x, y)
    assert (y == x).all()
    with pytest.raises(KernelCompileError, match=r"'s': this g\+\+ cannot tell .* or use g\+\+ 12 or clang"):
        run("template <class T> " + text.replace("float v", "T v"), x, y)


def test_nvrtc_is_asked_once(monkeypatch, fresh, x, y):
    nvrtc_version()
    run(COPY, x, y)
    emulator.backend.forget()
    monkeypatch.setattr(nvrtc, "_compile", lambda *arguments, **options: pytest.fail("compiled again"))
    run(COPY, x, y)


def test_no_nvrtc(monkeypatch, fresh, x, y):
    def missing(least_major=11):
        raise BackendError("no NVRTC")

    monkeypatch.setattr(nvrtc, "shared_library", missing)
    run(COPY, x, y)
    assert (y == x).all()


@pytest.fixture
def fresh(monkeypatch, tmp_path):
    """Forgets the compiler that was found and all libraries; new ones go to an empty folder, which is returned."""
    emulator._runtime()
    monkeypatch.setattr(emulator, "compiler", functools.cache(emulator.compiler.__wrapped__))
    monkeypatch.setattr(emulator, "backend", emulator.Emulator())
    monkeypatch.setenv("CUPY_KERNELS_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.delenv("CUPY_KERNELS_CXX", raising=False)
    return tmp_path / "cache"


def test_no_compiler(monkeypatch, fresh, x, y):
    monkeypatch.setattr(emulator.shutil, "which", lambda name: None)
    monkeypatch.setattr(emulator.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(BackendError, match=r"found none.*python3 -m pip install ziglang"):
        run(COPY, x, y)


def test_chosen_compiler_that_does_not_exist(monkeypatch, fresh, x, y):
    monkeypatch.setenv("CUPY_KERNELS_CXX", "no-such-compiler -O3")
    with pytest.raises(BackendError, match="CUPY_KERNELS_CXX='no-such-compiler -O3' is not a command"):
        run(COPY, x, y)


@pytest.mark.skipif(not importlib.util.find_spec("ziglang"), reason="ziglang is not installed")
@pytest.mark.parametrize("chosen", [None, f"{sys.executable} -m ziglang c++"], ids=["found", "chosen"])
def test_ziglang(monkeypatch, fresh, x, y, chosen):
    if chosen:
        monkeypatch.setenv("CUPY_KERNELS_CXX", chosen)
    else:
        monkeypatch.setattr(emulator.shutil, "which", lambda name: None)
    assert "ziglang" in emulator.compiler()
    run(REVERSE, x, y, defines=(("BARRIER", "__syncthreads()"),))
    assert (y == x[::-1]).all()


def libraries(folder):
    """Those in it. Beside them are others that look at local variables, and marks of texts that NVRTC takes."""
    kinds = [path.suffix for path in folder.iterdir()]
    assert set(kinds) <= {".so", ".locals", ".zeros", ".checked"}
    return [path for path in folder.iterdir() if path.suffix == ".so"]


def test_compiled_kernels_are_kept_on_disk(monkeypatch, fresh, x, y):
    run(COPY, x, y)
    (library,) = libraries(fresh)
    emulator.backend.forget()
    monkeypatch.setattr(subprocess, "run", lambda *args, **options: pytest.fail("compiled again"))
    run(COPY, x, y)
    assert [library] == libraries(fresh)


def test_a_folder_that_cannot_be_made(monkeypatch, fresh, tmp_path, x, y):
    (tmp_path / "file").touch()
    monkeypatch.setenv("CUPY_KERNELS_CACHE_DIR", str(tmp_path / "file" / "cache"))
    with pytest.raises(BackendError, match=r"file/cache, set by CUPY_KERNELS_CACHE_DIR"):
        run(COPY, x, y)


def test_an_interrupted_compilation_leaves_nothing(monkeypatch, fresh, x, y):
    def interrupted(command, **options):
        with open(command[command.index("-o") + 1], "wb") as half:
            half.write(b"\x7fELF")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(emulator.subprocess, "run", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run(COPY, x, y)
    assert list(fresh.iterdir()) == []
    run(COPY, x, y)
    assert (y == x).all()


def test_a_new_text_is_a_new_library(fresh, x, y):
    run(COPY, x, y)
    run(COPY.replace("= x[threadIdx.x]", "= 2 * x[threadIdx.x]"), x, y)
    assert (y == 2 * x).all()
    run(COPY, x, y)
    assert (y == x).all()
    assert len(libraries(fresh)) == 2


def test_only_local_memory_takes_a_second_run(x, y):
    for first, expected in (("", 1), ("__syncthreads(); __syncwarp();", 1), ("float v[4]; v[threadIdx.x % 4] = 0;", 2)):
        with source.override({"planted.cu": COPY.replace("{ ", f"{{ {first} ", 1)}):
            assert len(emulator.backend.handle(Kernel("planted.cu", "copy"), 0).runs) == expected
