"""What the emulator's threads do, how launches end, and how it finds and calls a C++ compiler.

What it looks for in kernels is in test_planted_bugs.py.
"""

import functools
import importlib.util
import os
import re
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from cupy_kernels import emulator, nvrtc, source
from cupy_kernels.errors import BackendError, EmulatorError, KernelCompileError
from cupy_kernels.launch import launch
from cupy_kernels.source import Kernel, Variant

THREADS = 64
SEEDS = range(4)


@pytest.fixture(autouse=True)
def ascending_order(monkeypatch):
    monkeypatch.setenv("CUPY_KERNELS_SEED", "0")


def run(text, *args, grid=1, block=THREADS, shared_bytes=0, defines=()):
    """Launches the one kernel of `text` over NumPy arrays."""
    with source.override({"planted.cu": text}):
        (name,) = source.kernel_names("planted.cu")
        launch(Kernel("planted.cu", name, defines), (grid, 1, 1), (block, 1, 1), args, shared_bytes)


@pytest.fixture
def x():
    return np.random.default_rng(0).standard_normal(THREADS).astype(np.float32)


@pytest.fixture
def y():
    return np.zeros(THREADS, np.float32)


@pytest.mark.parametrize(("index", "place"), [("threadIdx.x + 1", 64), ("(int)threadIdx.x - 1", -1)])
def test_a_launch_that_fails_writes_nothing(x, y, index, place):
    text = f'extern "C" __global__ void copy(const float* x, float* y) {{ y[{index}] = x[threadIdx.x]; }}'
    with pytest.raises(EmulatorError, match=rf"planted\.cu:1: thread \d+ writes out of bounds: y\[{place}\]"):
        run(text, x, y)
    assert not y.any()


@pytest.mark.parametrize("statement", ["y[FAR] = x[threadIdx.x];", "y[threadIdx.x] = x[FAR];"])
def test_far_out_of_bounds(x, y, statement):
    """The process goes on."""
    text = f'extern "C" __global__ void copy(const float* x, float* y) {{ {statement} }}'
    for _ in range(2):
        with pytest.raises(EmulatorError, match=r"thread 0 (reads|writes) far out of bounds, at 0x\w+ \(block 0,0,0\)"):
            run(text, x, y, defines=(("FAR", "100000000000ll"),))
    assert not y.any()
    run(text, x, y, defines=(("FAR", "threadIdx.x"),))
    assert (x == y).all()


def test_out_of_bounds_write_to_shared_memory(x, y):
    text = """#include "common.cuh"
        extern "C" __global__ void copy(const float* x, float* y) {
            DYNAMIC_SHARED(float, copied);
            copied[threadIdx.x] = x[threadIdx.x];
            y[threadIdx.x] = copied[threadIdx.x];
        }"""
    run(text, x, y, shared_bytes=4 * THREADS)
    assert (x == y).all()
    with pytest.raises(EmulatorError, match="dynamic shared memory, byte 252, which has 252 bytes"):
        run(text, x, y, shared_bytes=4 * THREADS - 4)


REVERSE = """extern "C" __global__ void reverse(const float* x, float* y) {
    __shared__ float copied[64];
    copied[threadIdx.x] = x[threadIdx.x];
    BARRIER;
    y[threadIdx.x] = copied[63 - threadIdx.x];
}"""


def test_missing_barrier(monkeypatch, x, y):
    for seed in SEEDS:
        monkeypatch.setenv("CUPY_KERNELS_SEED", str(seed))
        run(REVERSE, x, y, defines=(("BARRIER", "__syncthreads()"),))
        assert (y == x[::-1]).all()
        with pytest.raises(EmulatorError, match="nobody has written"):
            run(REVERSE, x, y, defines=(("BARRIER", ""),))


def test_missing_barrier_whatever_the_order_of_threads(monkeypatch, x, y):
    text = """extern "C" __global__ void take_left(const float* x, float* y) {
        __shared__ float copied[64];
        copied[threadIdx.x] = x[threadIdx.x];
        BARRIER;
        y[threadIdx.x] = copied[threadIdx.x ? threadIdx.x - 1 : 0];
    }"""
    for seed in SEEDS:
        monkeypatch.setenv("CUPY_KERNELS_SEED", str(seed))
        run(text, x, y, defines=(("BARRIER", "__syncthreads()"),))
        assert (y[1:] == x[:-1]).all()
        with pytest.raises(EmulatorError, match=r"race|nobody has written"):
            run(text, x, y, defines=(("BARRIER", ""),))


def test_blocks_that_rely_on_their_order(monkeypatch):
    text = """#include "common.cuh"
        extern "C" __global__ void running_sum(const float* x, INOUT float* sums) {
            sums[blockIdx.x] = x[blockIdx.x] + (blockIdx.x ? sums[blockIdx.x - 1] : 0);
        }"""
    for seed in SEEDS:
        monkeypatch.setenv("CUPY_KERNELS_SEED", str(seed))
        with pytest.raises(EmulatorError, match=r"race: thread 0 .* sums\[\d\], which thread 0 of another block"):
            run(text, np.ones(5, np.float32), np.zeros(5, np.float32), grid=5, block=1)


def test_barrier_that_some_threads_never_reach(x, y):
    text = """extern "C" __global__ void copy(const float* x, float* y) {
    y[threadIdx.x] = x[threadIdx.x];
    if (threadIdx.x >= 48) return;
    __syncthreads();
}"""
    with pytest.raises(EmulatorError, match=r"48 of 64 threads wait at planted\.cu:4, the others have returned"):
        run(text, x, y)


def test_barriers_at_two_lines(x, y):
    text = """extern "C" __global__ void copy(const float* x, float* y) {
    y[threadIdx.x] = x[threadIdx.x];
    if (threadIdx.x < 5)
        __syncthreads();
    else
        __syncthreads();
}"""
    with pytest.raises(EmulatorError, match=r"thread 0 waits at planted\.cu:4, thread 5 at planted\.cu:6"):
        run(text, x, y)


def test_unwritten_output(x, y):
    text = """extern "C" __global__ void copy(const float* x, float* y) {
        if (threadIdx.x != 7) y[threadIdx.x] = x[threadIdx.x];
    }"""
    with pytest.raises(EmulatorError, match=r"leaves 1 of 64 elements of its output y unwritten.*flat index 7"):
        run(text, x, y)
    assert not y.any()


ASYNC = """#include "common.cuh"
#include "async_copy.cuh"
extern "C" __global__ void copy(const float* x, float* y, int valid) {
    __shared__ float copied[2][64];
    int t = threadIdx.x;
    for (int half = 0; half < 2; half++) {
        if (t < 16) cp_async_16(&copied[half][4 * t], x + 4 * t + OFFSET, t < valid);
        cp_async_commit();
    }
    WAIT;
    __syncthreads();
    y[t] = copied[HALF][t];
}"""


def asynchronous(wait, half=0, offset=0):
    return (("WAIT", wait), ("HALF", half), ("OFFSET", offset))


def test_async_copy(x, y):
    run(ASYNC, x, y, 10, defines=asynchronous("cp_async_wait<0>()", half=1))
    assert (y[:40] == x[:40]).all()
    assert not y[40:].any()  # not valid: zeros
    run(ASYNC, x, y, 16, defines=asynchronous("cp_async_wait<1>()", half=0))
    assert (y == x).all()


@pytest.mark.parametrize(("wait", "half"), [("", 0), ("cp_async_wait<1>()", 1)], ids=["no wait", "youngest group"])
def test_read_before_the_wait_for_an_async_copy(x, y, wait, half):
    with pytest.raises(EmulatorError, match=r"before the wait for the cp\.async"):
        run(ASYNC, x, y, 16, defines=asynchronous(wait, half))


def test_unaligned_async_copy(x, y):
    with pytest.raises(EmulatorError, match="16 bytes is not aligned"):
        run(ASYNC, x, y, 15, defines=asynchronous("cp_async_wait<0>()", offset=1))


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("if (t % 2) v += __shfl_xor_sync(0xFFFFFFFFu, v, 2)", "waits in a warp operation for lanes that do not come"),
        ("if (t % 2) v += __shfl_xor_sync(0x55555555u, v, 2)", "whose mask leaves it out"),
        ("if (t < 16) v += __shfl_xor_sync(0xFFFFu, v, 16)", "a lane that takes no part in the shuffle"),
        ("if (t == 0) return; __syncwarp()", "waits in a warp operation for lanes that do not come"),
        (
            "if (t % 2)\n v += __shfl_xor_sync(0xFFFFFFFFu, v, 1);\n else\n v += __shfl_xor_sync(0xFFFFFFFFu, v, 1)",
            "lanes of warp 0 meet at different warp operations",
        ),
    ],
    ids=["lanes missing", "own lane missing", "lane outside the mask", "returned", "different lines"],
)
def test_divergent_warp_operation(x, y, body, message):
    text = f"""extern "C" __global__ void shuffle(const float* x, float* y) {{
        int t = threadIdx.x;
        float v = x[t];
        {body};
        y[t] = v;
    }}"""
    with pytest.raises(EmulatorError, match=message):
        run(text, x, y)


def test_shuffle_from_a_thread_that_the_block_does_not_have(x, y):
    text = """extern "C" __global__ void shuffle(const float* x, float* y) {
        y[threadIdx.x] = __shfl_xor_sync(0xFFFFFFFFu, x[threadIdx.x], 16);
    }"""
    with pytest.raises(EmulatorError, match="reads a lane that takes no part"):
        run(text, x, y, block=24)


def test_shuffles(x, y):
    text = """extern "C" __global__ void shuffle(const float* x, float* y) {
        float v = x[threadIdx.x];
        float left = __shfl_sync(0xFFFFFFFFu, v, threadIdx.x + 31);
        float across = __shfl_xor_sync(0xFFFFFFFFu, v, 5);
        y[threadIdx.x] = left - across + 2 * __shfl_down_sync(0xFFFFFFFFu, v, 3);
    }"""
    run(text, x, y)
    warp, lane = np.arange(THREADS) // 32 * 32, np.arange(THREADS) % 32
    down = x[warp + np.where(lane + 3 < 32, lane + 3, lane)]
    np.testing.assert_allclose(y, x[warp + (lane + 31) % 32] - x[warp + (lane ^ 5)] + 2 * down, rtol=1e-6)


def test_block_sum(monkeypatch, x):
    text = """#include "common.cuh"
        extern "C" __global__ void sum(const float* x, float* y) {
            __shared__ float scratch[32];
            float first = block_sum(x[threadIdx.x], scratch);
            y[threadIdx.x] = block_sum(first / 64, scratch);
        }"""
    results = []
    for seed in SEEDS:
        monkeypatch.setenv("CUPY_KERNELS_SEED", str(seed))
        results.append(np.zeros(THREADS, np.float32))
        run(text, x, results[-1])
    np.testing.assert_allclose(results[0], np.full(THREADS, x.sum()), rtol=1e-5)
    assert all((r == results[0]).all() for r in results)


TYPES = [sign + kind for kind in ("char", "short", "int", "long", "long long") for sign in ("", "unsigned ")]
TYPES += ["void", "bool", "signed char", "float", "double"]


def overloads():
    """Calls of every function of mathematics that cuda.h has, and of others that CUDA has for some types alone."""
    header = emulator._text("cuda.h")
    one = re.findall(r"EMULATOR_(?:OF_1|FLOAT|CLASS|FOR_FLOAT_1)\((?:[^()]*, )?(\w+)\)", header)
    two = re.findall(r"EMULATOR_(?:OF_2|WITH)\((?:[^()]*, )?(\w+)\)", header)
    assert {"sqrt", "lrint", "isnan"} < set(one)
    assert {"fmod", "ldexp"} < set(two)
    one, two = {*one, "abs", "labs", "llabs", "rsqrt", "rsqrtf"}, {*two, "min", "max", "fminf", "powf"}
    calls = [f"{name}(A())" for name in sorted(one - {"name"})]
    calls += [f"{name}(A(), B())" for name in sorted(two - {"name", "frexp", "modf"})]
    calls += [
        "fma(A(), B(), 1.0f)",
        "fma(1.0, A(), B())",
        "frexp(A(), (B*)0)",
        "modf(A(), (B*)0)",
        "__ldg((const A*)0)",
    ]
    calls += [f"__shfl_{kind}sync(1u, A(), 0)" for kind in ("", "xor_", "down_")]
    calls += [f"__{name}(A())" for name in ("popc", "ffs", "float_as_int", "uint_as_float", "double_as_longlong")]
    return calls


def probes():
    """(text that gives each call's result, for each of TYPES, a number; [(call and types, its constant)])"""
    text = ["template <class T> struct Code { static constexpr int value = -1; };"]
    text += [
        f"template <> struct Code<{name}> {{ static constexpr int value = {i}; }};" for i, name in enumerate(TYPES, 1)
    ]
    constants = []
    for i, call in enumerate(overloads()):
        text += [
            f"template <class A, class B> __device__ auto probe_{i}(int) -> Code<decltype({call})>;",
            f"template <class, class> __device__ Code<void> probe_{i}(...);",
        ]
        for a in TYPES:
            for b in TYPES if "B" in call else ["int"]:
                constants.append((f"{call}, A = {a}, B = {b}", f"decltype(probe_{i}<{a}, {b}>(0))::value"))
    return "\n".join(text), constants


@pytest.mark.parametrize("least_major", [11, nvrtc.WGMMA_MAJOR])
def test_functions_take_and_return_the_types_that_cudas_do(least_major):
    """Or are ambiguous, as there: max(x, 0) of a float x, sqrt of an int."""
    try:
        nvrtc.shared_library(least_major)
    except BackendError as error:
        pytest.skip(str(error))
    text, constants = probes()
    table = ",\n".join(constant for _, constant in constants)
    kernel = 'extern "C" __global__ void codes(int* y) { BODY }'
    codes = np.zeros(len(constants), np.int32)
    read = "static const int table[] = {" + table + "}; y[blockIdx.x] = table[blockIdx.x];"
    run(text + kernel.replace("BODY", read), codes, grid=len(codes), block=1)
    found = dict(zip((name for name, _ in constants), codes))
    assert found["max(A(), B()), A = float, B = float"] == 1 + TYPES.index("float")
    assert found["max(A(), B()), A = float, B = int"] == 1 + TYPES.index("void")
    checks = [f'static_assert({c} == {code}, "{name}");' for (name, c), code in zip(constants, codes)]
    with source.override({"planted.cu": "\n".join([text, *checks, kernel.replace("BODY", "y[0] = 0;")])}):
        nvrtc.compile_variant(Variant("planted.cu"), "sm_80", least_major)


@pytest.mark.parametrize(
    ("call", "expected"),
    [
        ("max(x, 0.5f)", 0.75),
        ("max(x, 0.5)", 0.75),
        ("min(x, 0.5f)", 0.5),
        ("max(nan, 0.5f)", 0.5),
        ("max(0.5f, nan)", 0.5),
        ("min(nan, 0.5)", 0.5),
        ("min(0.5, nan)", 0.5),
        ("max(-1, 1u)", 2**32),
        ("min(1ull, -1ll)", 1),
        ("max((char)3, (short)-4)", 3),
        ("max(1ll << 40, 2ll)", 2**40),
        ("abs(-x)", 0.75),
        ("abs(-(1ll << 40))", 2**40),
        ("rsqrt(x / 3)", 2),
        ("copysign(x, -1.0)", -0.75),
        ("pow(-2.0f, 3)", -8),
        ("isnan(nan) + isinf(1 / (x - x)) + signbit(-x)", 3),
        ("ldexp(x, 2)", 3),
    ],
)
def test_values_of_overloads(call, expected):
    """NaN loses: max of floats is CUDA's fmaxf."""
    text = f"""extern "C" __global__ void compute(float* y, float x, float nan) {{ y[0] = {call}; }}"""
    y = np.zeros(1, np.float32)
    run(text, y, 0.75, float("nan"), block=1)
    assert y == expected


def test_a_float_beside_an_integer_is_ambiguous(x, y):
    text = """extern "C" __global__ void relu(const float* x, float* y) { y[threadIdx.x] = max(x[threadIdx.x], 0); }"""
    with pytest.raises(KernelCompileError, match=r"planted\.cu.*max.*ambiguous"):
        run(text, x, y)
    run(text.replace(", 0)", ", 0.0f)"), x, y)
    assert (y == np.maximum(x, 0)).all()


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
    with pytest.raises(KernelCompileError, match=rf"__vadd4(.|\n)*NVRTC {version} takes this text"):
        run(COPY.replace("x[threadIdx.x]", "__vadd4(1, 2)"), x, y)
    with pytest.raises(
        KernelCompileError, match=rf"planted\.cu:1:\d+: error(.|\n)*NVRTC {version}, which .*\nplanted\.cu\(1\)"
    ):
        run(COPY.replace("x[threadIdx.x]", "unknown"), x, y)


def test_nvrtc_is_asked_once(monkeypatch, fresh, x, y):
    nvrtc_version()
    run(COPY, x, y)
    emulator.backend.forget()
    monkeypatch.setattr(nvrtc, "compile_ptx", lambda *arguments: pytest.fail("compiled again"))
    run(COPY, x, y)


def test_no_nvrtc(monkeypatch, fresh, x, y):
    def missing(least_major=11):
        raise BackendError("no NVRTC")

    monkeypatch.setattr(nvrtc, "shared_library", missing)
    run(COPY, x, y)
    assert (y == x).all()


SLOW = """extern "C" __global__ void slow(const float* x, float* y) {
    float v = x[threadIdx.x];
    for (int i = 0; i < STEPS; i++) v = v * v;
    y[threadIdx.x] = v;
}"""


def in_a_child(work):
    """What becomes of work() in a forked process: 0, 1 after an exception, or minus the signal that ended it."""
    child = os.fork()
    if not child:
        status = 1
        try:
            signal.alarm(20)
            work()
            status = 0
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def test_forks_while_another_thread_runs_kernels(x, y):
    """The child can run kernels and look at the sources: no lock stays with a thread that it does not have."""
    slow = Kernel("slow.cu", "slow", (("STEPS", 10000),))
    over = threading.Event()

    def reverse():
        run(REVERSE, x, y, defines=(("BARRIER", "__syncthreads()"),))
        assert (y == x[::-1]).all()

    def work():
        while not over.is_set():
            launch(slow, (1, 1, 1), (THREADS, 1, 1), (x, np.zeros_like(x)))

    reverse()
    with source.override({"slow.cu": SLOW}):
        thread = threading.Thread(target=work)
        thread.start()
        try:
            for _ in range(10):
                assert in_a_child(reverse) == 0
        finally:
            over.set()
            thread.join()


@pytest.mark.parametrize("lock", [emulator._one_at_a_time, source._lock], ids=["emulator", "sources"])
def test_a_child_gets_no_lock_that_another_thread_holds(lock):
    held = threading.Event()

    def hold():
        with lock:
            held.set()
            time.sleep(0.3)

    thread = threading.Thread(target=hold)
    thread.start()
    held.wait()
    assert in_a_child(lock.acquire) == 0
    thread.join()


def test_parent_and_children_run_kernels_at_the_same_time(x):
    kernel = Kernel("planted.cu", "reverse", (("BARRIER", "__syncthreads()"),))

    def work():
        for _ in range(500):
            y = np.zeros_like(x)
            launch(kernel, (1, 1, 1), (THREADS, 1, 1), (x, y))
            assert (y == x[::-1]).all()

    with source.override({"planted.cu": REVERSE}), ThreadPoolExecutor(2) as threads:
        work()
        children = [threads.submit(in_a_child, work) for _ in range(2)]
        work()
        assert [child.result() for child in children] == [0, 0]


ENDLESS = """extern "C" __global__ void endless(const float* x, float* y) {
    for (int i = 0;; i++) BODY;
}"""


@pytest.fixture
def interrupts():
    """Ctrl-C raises KeyboardInterrupt, also where the tests run in the background of a shell, which ignores it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interrupts")
@pytest.mark.parametrize("body", ["{}", "y[threadIdx.x] = x[i % 64]", "__syncthreads()", "__syncwarp()"])
@pytest.mark.parametrize("thread", ["main", "other"])
def test_a_loop_without_end_is_interrupted(x, y, body, thread):
    """By Ctrl-C, within a second."""
    kernel = Kernel("endless.cu", "endless", (("BODY", body),))

    def endless():
        with pytest.raises(KeyboardInterrupt):
            launch(kernel, (1, 1, 1), (THREADS, 1, 1), (x, y))

    with source.override({"endless.cu": ENDLESS}):
        emulator.backend.prepare([kernel])
        began = time.monotonic()
        threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGINT)).start()
        if thread == "main":
            endless()
        else:
            other = threading.Thread(target=endless)
            other.start()
            with pytest.raises(KeyboardInterrupt):
                other.join()
            other.join()
        assert time.monotonic() - began < 3  # a busy machine
    run(COPY, x, y)
    assert (y == x).all()


def test_a_time_limit(monkeypatch, x, y):
    monkeypatch.setenv("CUPY_KERNELS_TIMEOUT", "0.3")
    with pytest.raises(EmulatorError, match="takes longer than CUPY_KERNELS_TIMEOUT allows"):
        run(ENDLESS.replace("BODY", "{}"), x, y)
    run(COPY, x, y)
    assert (y == x).all()
    for wrong in ("soon", "-1", "nan"):
        monkeypatch.setenv("CUPY_KERNELS_TIMEOUT", wrong)
        with pytest.raises(BackendError, match=f"CUPY_KERNELS_TIMEOUT='{wrong}' is not a positive number"):
            run(COPY, x, y)


CRASH = """
import ctypes, faulthandler, sys, threading, time
import numpy as np
from cupy_kernels import emulator, source
from cupy_kernels.launch import launch
from cupy_kernels.source import Kernel, Variant

faulthandler.enable()
slow = Kernel("slow.cu", "slow", (("STEPS", 2**30),))
with source.override({"slow.cu": sys.argv[1]}):
    emulator.backend.prepare([slow])
    arrays = np.ones(1, np.float32), np.ones(1, np.float32)
    threading.Thread(target=launch, args=(slow, (1, 1, 1), (1, 1, 1), arrays), daemon=True).start()
    while emulator._one_at_a_time.acquire(False):
        emulator._one_at_a_time.release()
        time.sleep(0.01)
    time.sleep(0.1)
    ctypes.string_at(0)
"""


def test_a_crash_of_another_thread_is_not_the_kernels():
    """It goes where it would go without a kernel: here, to faulthandler."""
    done = subprocess.run([sys.executable, "-c", CRASH, SLOW], capture_output=True, text=True)
    assert done.returncode == -signal.SIGSEGV
    assert "Fatal Python error: Segmentation fault" in done.stderr


@pytest.fixture
def fresh(monkeypatch, tmp_path):
    """Forgets the compiler that was found and all libraries; new ones go to an empty folder, which is returned."""
    emulator._runtime()
    monkeypatch.setattr(emulator, "compiler", functools.cache(emulator.compiler.__wrapped__))
    monkeypatch.setattr(emulator, "backend", emulator.Emulator())
    monkeypatch.setenv("CUPY_KERNELS_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.delenv("CUPY_KERNELS_CXX", raising=False)
    return tmp_path / "cache"


COPY = 'extern "C" __global__ void copy(const float* x, float* y) { y[threadIdx.x] = x[threadIdx.x]; }'


def test_no_compiler(monkeypatch, fresh, x, y):
    monkeypatch.setattr(emulator.shutil, "which", lambda name: None)
    monkeypatch.setattr(emulator.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(BackendError, match=r"found none.*pip install 'modelnew\[emulator\]'"):
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
    """Those in it; beside them are marks of texts that NVRTC takes, and nothing half-written."""
    kinds = [path.suffix for path in folder.iterdir()]
    assert set(kinds) <= {".so", ".checked"}
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
