"""Every kernel under NVIDIA's compute-sanitizer, which comes with the CUDA toolkit, and with the extra [dev]."""

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
import torch

OF_WHEEL = Path(sysconfig.get_path("purelib"), "nvidia", "cu13", "bin", "compute-sanitizer")
SANITIZER = shutil.which("compute-sanitizer") or shutil.which(OF_WHEEL)
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not (SANITIZER and torch.cuda.is_available()), reason="needs a GPU and compute-sanitizer"),
]


def sanitized(tool: str, *arguments: str) -> subprocess.CompletedProcess:
    """tests/sanitized.py under a tool. Each tensor has an allocation of its own: an access beside it is seen.

    A fault would end all processes that share the GPU by MPS, so this one takes no part.
    """
    command = [SANITIZER, "--tool", tool, "--error-exitcode", "9", sys.executable, "-m", "tests.sanitized", *arguments]
    environment, root = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}, Path(__file__).parents[1]
    environment["CUDA_MPS_PIPE_DIRECTORY"] = str(root / "no MPS here")
    done = subprocess.run(command, env=environment, cwd=root, capture_output=True, text=True, timeout=600, check=False)
    if "Device not supported" in done.stdout:
        pytest.skip("compute-sanitizer does not support this machine")
    return done


@pytest.mark.parametrize("tool", ["memcheck", "racecheck", "synccheck", "initcheck"])
def test_nothing_is_found(tool):
    done = sanitized(tool, "cuda")
    assert done.returncode == 0, f"{done.stdout[:3000]}\n...\n{done.stdout[-1000:]}{done.stderr[-3000:]}"
    assert "not started:\n" in done.stdout


def test_a_fault_is_found():
    done = sanitized("memcheck", "fault")
    assert done.returncode == 9
    assert "Invalid __global__ write" in done.stdout
