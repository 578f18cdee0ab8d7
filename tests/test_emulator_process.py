"""The process that the emulator runs in: forks, Ctrl-C, time limits and crashes."""

import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from emulated import COPY, REVERSE, THREADS, run

from cupy_kernels import emulator, source
from cupy_kernels.errors import BackendError, EmulatorError
from cupy_kernels.launch import launch
from cupy_kernels.source import Kernel

pytestmark = pytest.mark.usefixtures("ascending_order")

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
        # Ctrl-C may come between two threads, or in the emulator's own code, where the line is not known.
        line = r"(endless\.cu:2|the kernel): " if body.startswith("y") else ""
        with pytest.raises(KeyboardInterrupt, match=line + "interrupted.*CUPY_KERNELS_TIMEOUT=5"):
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


@pytest.mark.skipif(not emulator._fills_locals(), reason="gcc 12 and clang 16 can")
@pytest.mark.filterwarnings("ignore:.* may be read before it is set")
def test_ctrl_c_between_the_runs_of_a_launch_leaves_nothing(x, y):
    """With which the next launch would be compared. This one runs with zeros in `v`, and then with another number."""
    text = """extern "C" __global__ void add(const float* x, float* y) {
        float v;
        if (x[threadIdx.x] > -9) v = x[threadIdx.x] + 1;
        y[threadIdx.x] = v;
    }"""
    run(COPY, x, y)
    with source.override({"planted.cu": text}):
        whole = emulator.backend.handle(Kernel("planted.cu", "add"), 0)
        before, last = whole.runs, whole.runs[-1]
        assert before[-2].kind == "zeros"

        def interrupted(_):
            raise KeyboardInterrupt

        interrupted.variables, interrupted.same, interrupted.kind = last.variables, last.same, last.kind
        whole.runs = (*before[:-1], interrupted)
        with pytest.raises(KeyboardInterrupt):
            run(text, x, y)
        whole.runs = before
    assert (y == x).all()
    run(COPY, x, y)
    run(text, x, y)
    assert (y == x + 1).all()


def test_a_time_limit_ends_with_its_launch(monkeypatch, x, y):
    """Also if something else ends that one, such as a signal handler that raises."""
    monkeypatch.setenv("CUPY_KERNELS_TIMEOUT", "1")
    with pytest.raises(ZeroDivisionError), emulator._time_limit(0.01):
        raise ZeroDivisionError
    assert not any(thread.name.endswith("(watch)") for thread in threading.enumerate())
    run(COPY, x, y)


def test_a_time_limit(monkeypatch, x, y):
    monkeypatch.setenv("CUPY_KERNELS_TIMEOUT", "1")
    in_the_runtime = "{ if (*(volatile const float*)x > 1e9f) break; }"  # most of the time
    for body in (in_the_runtime, "{}", "while (1)"):
        with pytest.raises(EmulatorError, match=r"\.cu:\d+: takes longer than CUPY_KERNELS_TIMEOUT allows"):
            run(ENDLESS.replace("BODY", body), x, y)
    monkeypatch.setenv("CUPY_KERNELS_TIMEOUT", "1e-9")  # over before it begins
    for _ in range(5):
        with pytest.raises(EmulatorError, match="takes longer than CUPY_KERNELS_TIMEOUT allows"):
            run(ENDLESS.replace("BODY", "{}"), x, y)
    monkeypatch.setenv("CUPY_KERNELS_TIMEOUT", "600")
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
