"""Every kind of bug that the emulator looks for, planted and caught; and how it finds and calls a C++ compiler."""

import functools
import importlib.util
import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from cupy_kernels import emulator, source
from cupy_kernels.errors import BackendError, EmulatorError
from cupy_kernels.launch import launch
from cupy_kernels.source import Kernel

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


@pytest.mark.parametrize(("index", "side"), [("threadIdx.x + 1", "after"), ("(int)threadIdx.x - 1", "before")])
def test_out_of_bounds_write(x, y, index, side):
    text = f'extern "C" __global__ void copy(const float* x, float* y) {{ y[{index}] = x[threadIdx.x]; }}'
    with pytest.raises(EmulatorError, match=f"out of bounds, {side} the array y"):
        run(text, x, y)
    assert not y.any()


@pytest.mark.parametrize("statement", ["y[FAR] = x[threadIdx.x];", "y[threadIdx.x] = x[FAR];"])
def test_far_out_of_bounds(x, y, statement):
    """The process goes on."""
    text = f'extern "C" __global__ void copy(const float* x, float* y) {{ {statement} }}'
    for _ in range(2):
        with pytest.raises(
            EmulatorError, match=r"thread 0 reads or writes far out of bounds, at 0x\w+ \(block 0,0,0\)"
        ):
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
    with pytest.raises(EmulatorError, match="after the block's dynamic shared memory"):
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
        with pytest.raises(EmulatorError, match="copies memory there that nobody wrote"):
            run(REVERSE, x, y, defines=(("BARRIER", ""),))


def test_missing_barrier_that_only_the_order_of_threads_shows(monkeypatch, x, y):
    text = """extern "C" __global__ void take_left(const float* x, float* y) {
        __shared__ float copied[64];
        copied[threadIdx.x] = x[threadIdx.x];
        BARRIER;
        y[threadIdx.x] = copied[threadIdx.x ? threadIdx.x - 1 : 0];
    }"""
    caught = 0
    for seed in SEEDS:
        monkeypatch.setenv("CUPY_KERNELS_SEED", str(seed))
        run(text, x, y, defines=(("BARRIER", "__syncthreads()"),))
        assert (y[1:] == x[:-1]).all()
        try:
            run(text, x, y, defines=(("BARRIER", ""),))
        except EmulatorError:
            caught += 1
    assert caught == len(SEEDS) - 1  # ascending order, seed 0, happens to be right


def test_blocks_that_rely_on_their_order(monkeypatch):
    text = """#include "common.cuh"
        extern "C" __global__ void running_sum(const float* x, INOUT float* sums) {
            sums[blockIdx.x] = x[blockIdx.x] + (blockIdx.x ? sums[blockIdx.x - 1] : 0);
        }"""
    x, results = np.arange(1, 6, dtype=np.float32), []
    for seed in SEEDS:
        monkeypatch.setenv("CUPY_KERNELS_SEED", str(seed))
        sums = np.zeros(5, np.float32)
        run(text, x, sums, grid=5, block=1)
        results.append(sums)
    assert (results[0] == np.cumsum(x)).all()
    assert any((sums != results[0]).any() for sums in results)


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
    with pytest.raises(EmulatorError, match="copies memory there that nobody wrote"):
        run(ASYNC, x, y, 16, defines=asynchronous(wait, half))


def test_unaligned_async_copy(x, y):
    with pytest.raises(EmulatorError, match="16 bytes is not aligned"):
        run(ASYNC, x, y, 15, defines=asynchronous("cp_async_wait<0>()", offset=1))


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("if (t % 2) v += __shfl_xor_sync(0xFFFFFFFFu, v, 2)", "waits in a warp operation for lanes that do not come"),
        ("if (t % 2) v += __shfl_xor_sync(0x55555555u, v, 2)", "whose mask leaves it out"),
        ("if (t < 16) v += __shfl_xor_sync(0xFFFFu, v, 16)", "which takes no part in the shuffle"),
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
    with pytest.raises(EmulatorError, match="reads lane 24"):
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
        for _ in range(20):
            y = np.zeros_like(x)
            launch(kernel, (500, 1, 1), (THREADS, 1, 1), (x, y))
            assert (y == x[::-1]).all()

    with source.override({"planted.cu": REVERSE}), ThreadPoolExecutor(2) as threads:
        work()
        children = [threads.submit(in_a_child, work) for _ in range(2)]
        work()
        assert [child.result() for child in children] == [0, 0]


CRASH = """
import ctypes, faulthandler, sys, threading, time
import numpy as np
from cupy_kernels import emulator, source
from cupy_kernels.launch import launch
from cupy_kernels.source import Kernel

faulthandler.enable()
slow = Kernel("slow.cu", "slow", (("STEPS", 2**30),))
with source.override({"slow.cu": sys.argv[1]}):
    emulator.prepare([slow])
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
    monkeypatch.setattr(emulator, "compiler", functools.cache(emulator.compiler.__wrapped__))
    monkeypatch.setattr(emulator, "_libraries", {})
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


def test_compiled_kernels_are_kept_on_disk(monkeypatch, fresh, x, y):
    run(COPY, x, y)
    (library,) = fresh.iterdir()  # nothing half-written lies beside it
    emulator._libraries.clear()
    monkeypatch.setattr(subprocess, "run", lambda *args, **options: pytest.fail("compiled again"))
    run(COPY, x, y)
    assert [library] == list(fresh.iterdir())


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
    assert len(list(fresh.iterdir())) == 2
