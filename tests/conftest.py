"""Every test that takes `device` runs on the emulator (CPU tensors), and on the GPU where there is one (marker gpu)."""

import pytest
import torch

from cupy_kernels import compiler, emulator


def pytest_generate_tests(metafunc):
    if "device" in metafunc.fixturenames:
        gpu = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")]
        metafunc.parametrize("device", ["cpu", pytest.param("cuda", marks=gpu)], ids=["emulator", "cuda"])


@pytest.fixture(autouse=True)
def poisoned_memory():
    """Fills what torch.empty returns, so every output and workspace of the package, with NaN."""
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def launched(monkeypatch):
    """List of the kernels that the test has started so far, in order."""
    kernels = []
    for module, name in ((emulator, "run"), (compiler, "function")):

        def spy(kernel, *args, start=getattr(module, name), **options):
            kernels.append(kernel)
            return start(kernel, *args, **options)

        monkeypatch.setattr(module, name, spy)
    return kernels
