"""Types of the public surface. `make lint` has mypy and pyright; here the script that mypy checks is run."""

import inspect
import runpy
from pathlib import Path

import pytest

from modelnew import functional


def test_what_mypy_checks_runs(capsys):
    runpy.run_path(str(Path(__file__).with_name("typed") / "user.py"), run_name="__main__")
    assert "tanh_forward" in capsys.readouterr().out


@pytest.mark.parametrize("name", functional.__all__)
def test_functions_are_annotated(name):
    signature = inspect.signature(getattr(functional, name))
    assert signature.return_annotation is not signature.empty
    assert all(p.annotation is not p.empty for p in signature.parameters.values())
