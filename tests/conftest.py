"""What all tests share.

Every test that takes `device` runs on the emulator (CPU tensors), and on the GPU where there is one (marker gpu).
`--record` writes down what the GPU's tests found.
"""

import contextlib
import json
import os
import shlex
from pathlib import Path

import numpy as np
import pytest
import tolerance
import torch
from emulated import THREADS
from ranks import Ranks

from cupy_kernels import compiler, conv_transpose_mma, source
from cupy_kernels.errors import BackendError
from cupy_kernels.launch import observed
from cupy_kernels.variants import shape_macros, variants
from modelnew import bench, calls, entrants, environment, numerics, parity
from modelnew.shortcuts import Public

os.environ.setdefault("CUPY_KERNELS_SEED", "1")  # threads and blocks in an order that kernels must not rely on

_started = []


def family(variant):
    """The variant without the macros that specialise it for a shape."""
    return variant._replace(defines=tuple((k, v) for k, v in variant.defines if k not in shape_macros()))


_declared = frozenset(map(family, variants()))


def pytest_generate_tests(metafunc):
    if "device" in metafunc.fixturenames:
        gpu = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")]
        metafunc.parametrize("device", ["cpu", pytest.param("cuda", marks=gpu)], ids=["emulator", "cuda"])


@pytest.fixture(autouse=True)
def poisoned_memory(monkeypatch):
    """Fills what torch.empty returns, so every output and workspace of the package, with NaN."""
    monkeypatch.setattr("modelnew.replays.allocator", Public.allocator)
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def float32_convolutions():
    """PyTorch's references multiply in float32: TF32, its default on a GPU, is another class."""
    with parity.tf32(False):
        yield


@pytest.fixture(autouse=True, scope="session")
def no_memory_from_cupy():
    """All memory is torch's: whatever takes some from CuPy's pool fails."""

    def refuse(size):
        raise AssertionError(f"{size} bytes taken from CuPy's allocator")

    if torch.cuda.is_available():
        with contextlib.suppress(BackendError):
            compiler.cupy().cuda.set_allocator(refuse)


def _note(kernel, grid, *_):
    if 0 not in grid and not source.overridden() and kernel.file in source.names():
        _started.append(kernel)


@pytest.fixture(autouse=True)
def declared_variants():
    """Fails a test that starts a variant which no `variants()` declares: test_nvrtc.py compiles the declared ones."""
    _started.clear()
    with observed(_note):
        yield
    undeclared = {str(kernel.variant) for kernel in _started if family(kernel.variant) not in _declared}
    assert not undeclared, f"not in variants(): {sorted(map(str, undeclared))}"


@pytest.fixture
def launched(declared_variants):
    """List of the kernels that the test has started so far, in order."""
    return _started


@pytest.fixture
def ascending_order(monkeypatch):
    """Threads and blocks run in ascending order."""
    monkeypatch.setenv("CUPY_KERNELS_SEED", "0")


@pytest.fixture
def x():
    """What kernels of `emulated` read."""
    return np.random.default_rng(0).standard_normal(THREADS).astype(np.float32)


@pytest.fixture
def y():
    """What kernels of `emulated` write."""
    return np.zeros(THREADS, np.float32)


@pytest.fixture
def one_thread():
    """The tensors are small, and threads that wait for each other take most of the time on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def ranks():
    """Two processes on the CPU, see `ranks.Ranks`."""
    found = Ranks(2, "gloo")
    yield found
    found.stop()


@pytest.fixture(params=[False, True], ids=["mma", "wgmma"])
def wgmma(request, device):
    """Both main loops of the tensor-core convolution; True: the one of sm_90a."""
    if device == "cuda" and request.param and not numerics.has_wgmma(torch.cuda.current_device()):
        pytest.skip("needs an sm_90 GPU and NVRTC 12")
    with numerics.wgmma(request.param):
        yield request.param


@pytest.fixture
def fresh_plans(monkeypatch):
    """What a test plans is forgotten after it, and it finds nothing planned."""
    plans = calls.Caches()
    monkeypatch.setattr("modelnew.calls.caches", lambda: plans)


@pytest.fixture
def many_passes(monkeypatch, fresh_plans):
    """Units of several passes, as large batches have them, without the large batch."""
    monkeypatch.setattr(conv_transpose_mma, "MANY_IMAGES", 1)
    conv_transpose_mma.plan.cache_clear()
    yield
    conv_transpose_mma.plan.cache_clear()


@pytest.fixture
def multiprocessors(monkeypatch):
    """multiprocessors(count): from now on tensor-core plans are those of a GPU with so many."""

    def have(count):
        monkeypatch.setattr(numerics, "_EMULATED_MULTIPROCESSORS", count)
        monkeypatch.setattr(numerics, "_multiprocessors", lambda _: count)

    return have


@pytest.fixture
def one_multiprocessor(multiprocessors):
    """Sums are not split."""
    multiprocessors(1)


def pytest_addoption(parser):
    parser.addoption(
        "--record",
        metavar="FOLDER",
        help="write FOLDER/parity_<gpu>_<toolchain>.json: versions, counts, and the errors of results on the GPU",
    )

    parser.addoption(
        "--no-wgmma",
        action="store_true",
        help="on the GPU, run what its wgmma instructions do by others, as without NVRTC 12 or newer",
    )


def pytest_configure(config):
    if config.getoption("--no-wgmma"):
        numerics.has_wgmma = lambda _: False
    if config.getoption("--record") and not torch.cuda.is_available():
        raise pytest.UsageError("--record writes down what a GPU computes, and torch finds none here")


def pytest_sessionfinish(session):
    """What a process of pytest-xdist has kept for the record goes to the one that writes it."""
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["errors"] = tolerance.kept()


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node):
    tolerance.keep_records(getattr(node, "workeroutput", {}).get("errors", []))


def pytest_terminal_summary(terminalreporter, config):
    folder = config.getoption("--record")
    if not folder:
        return
    versions = environment.versions()
    counts = {
        outcome: len([r for r in terminalreporter.stats.get(outcome, []) if r.when == "call" or outcome != "passed"])
        for outcome in ("passed", "failed", "skipped", "error")
    }
    record = {
        "command": shlex.join(["python3", "-m", "pytest", *config.invocation_params.args]),
        "versions": versions,
        "digest": source.digest(),
        "gpu": versions["gpu"],
        "passed": counts["passed"],
        "failed": counts["failed"] + counts["error"],
        "skipped": counts["skipped"],
        "errors": tolerance.kept(),
    }
    path = Path(folder, f"parity_{environment.slug()}_nvrtc{versions['nvrtc']}.json")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    terminalreporter.write_line(f"recorded in {path}")


@pytest.fixture(params=[0, 1, 2], ids=lambda seed: f"seed{seed}")
def order_of_threads(request, monkeypatch):
    """Threads in ascending order, and in two others: what is wrong does not depend on it."""
    monkeypatch.setenv("CUPY_KERNELS_SEED", str(request.param))


@pytest.fixture
def small(monkeypatch):
    """`bench` measures a model of few channels, which the fused kernels do not take."""
    _measured(monkeypatch, [4, 8, 3, 1, 1, 1, 2])


@pytest.fixture
def fusible(monkeypatch):
    """`bench` measures a small model that the fused kernels take."""
    _measured(monkeypatch, [16, 16, 3, 1, 1, 1, 4])


def _measured(monkeypatch, init):
    for module in (bench, entrants):
        monkeypatch.setattr(module, "get_init_inputs", lambda: list(init))
