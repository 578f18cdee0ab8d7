"""The wheel holds all that a run needs, kernels and emulator header too: a copy of it runs away from the repository."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from cupy_kernels import source

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = """
import torch, modelnew, cupy_kernels
from cupy_kernels import source
from modelnew import environment
from modelnew.functional import tanh
x = torch.randn(50)
torch.testing.assert_close(tanh(x), torch.tanh(x))
assert environment.records() == []
print(modelnew.__file__, cupy_kernels.__file__, source.digest(), sep="\\n")
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Path of the wheel, built from a copy of what git would commit, so that nothing is written to the repository."""
    pytest.importorskip("setuptools", minversion="77")
    pytest.importorskip("pip")
    folder = tmp_path_factory.mktemp("wheel")
    for name in ("cupy_kernels", "modelnew", "tools", "tests"):
        shutil.copytree(ROOT / name, folder / "source" / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("setup.cfg", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder / "source")
    # By setuptools of this environment: pip's own isolated environment would need a package index.
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", "..", "."]
    subprocess.run(command, cwd=folder / "source", check=True, capture_output=True)
    (built,) = folder.glob("*.whl")
    return built


def test_contents(wheel):
    """The two packages whole, and nothing of the repository's other folders."""
    files = set(zipfile.ZipFile(wheel).namelist())
    tracked = [p for name in ("cupy_kernels", "modelnew") for p in (ROOT / name).rglob("*") if p.is_file()]
    expected = {str(p.relative_to(ROOT)) for p in tracked if "__pycache__" not in p.parts}
    assert {f for f in files if ".dist-info/" not in f} == expected


def test_the_wheel_runs_elsewhere(wheel, tmp_path):
    site = tmp_path / "site"
    zipfile.ZipFile(wheel).extractall(site)
    environment = {**os.environ, "PYTHONPATH": str(site)}
    command = [sys.executable, "-c", SCRIPT]
    done = subprocess.run(command, cwd=tmp_path, env=environment, check=True, capture_output=True, text=True)
    first, second, digest = done.stdout.split()
    assert Path(first).is_relative_to(site)
    assert Path(second).is_relative_to(site)
    assert digest == source.digest()
