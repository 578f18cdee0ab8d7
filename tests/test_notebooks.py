"""Every notebook in examples runs, on the GPU if there is one, and has the cells of the script beside it."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

import cupy_kernels
from cupy_kernels import source
from cupy_kernels.variants import variants
from modelnew import commands, environment
from tools import notebooks

ROOT = Path(__file__).resolve().parents[1]
EXAMPLES = ROOT / "examples"
NOTEBOOKS = sorted(EXAMPLES.glob("*.ipynb"))
SCRIPT = """# %% [markdown]
# # A title

# %%
print("line 1", flush=True)
{}
"""


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_runs(path, tmp_path):
    pytest.importorskip("nbmake")
    pytest.importorskip("matplotlib")
    shutil.copy(path, tmp_path)
    command = [sys.executable, "-m", "pytest", "-q", "--nbmake", "--nbmake-timeout=300", path.name]
    environ = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    done = subprocess.run(command, cwd=tmp_path, env=environ, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "1 passed" in done.stdout


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_is_what_the_script_says(path):
    """After `make notebooks` it is; outputs are stored, so that it reads well without being run."""
    jupytext = pytest.importorskip("jupytext")
    notebook, script = jupytext.read(path), jupytext.read(path.with_suffix(".py"))
    cells = [[(cell.cell_type, cell.source) for cell in n.cells] for n in (notebook, script)]
    assert cells[0] == cells[1]
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    assert not [output for cell in code for output in cell.outputs if output.output_type == "error"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_stored_outputs_read_well(path):
    """Every cell has one, but those that only check; nothing speaks of the machine that they come from."""
    cells = [cell for cell in json.loads(path.read_text(encoding="utf-8"))["cells"] if cell["cell_type"] == "code"]
    silent = ["".join(cell["source"]) for cell in cells if not cell["outputs"]]
    assert not [source for source in silent if "print" in source or "show" in source or source.startswith("%%cu")]
    assert len(silent) < len(cells) / 4
    text = "\n".join(texts(cells))
    assert not re.search(r"/(home|root|tmp|work|usr|opt|Users)/|site-packages|Warning|Traceback", text)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_stored_outputs_are_a_gpus(path):
    notebook = json.loads(path.read_text(encoding="utf-8"))
    text = "\n".join(texts(notebook["cells"]))
    assert notebook["metadata"]["modelnew"]["versions"]["gpu"].startswith("NVIDIA")
    # What notebooks and tables say without a GPU, and how `environment` begins then.
    assert not re.search(r"emulator|C\+\+ compiler|no CUDA support", text)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_stored_outputs_are_of_the_present_kernels(path):
    reasons = outdated(json.loads(path.read_text(encoding="utf-8")))
    assert not reasons, f"run `make notebooks` on a GPU: the outputs in {path.name} are outdated ({'; '.join(reasons)})"


TANH = "[tanh.cu -Dscalar_t=float -Dacc_t=float -DWIDTH={}]"


@pytest.mark.parametrize(
    ("digest", "output", "reasons"),
    [
        (None, "", ["they name no digest of kernels"]),
        ("0" * 64, "", [f"they are of kernels 000000000000, the present ones are {source.digest()[:12]}"]),
        (source.digest(), "forward: tanh_forward, old_forward\nbackward: no kernel of ours", ["old_forward is gone"]),
        (source.digest(), TANH.format(3), [f"{TANH.format(3)} is gone"]),
        (source.digest(), f"kernels {source.digest()[:12]}, kernels 0123456789ab", ["a text names 0123456789ab"]),
        (source.digest(), f"forward: tanh_forward\n{TANH.format(4)}\n[cube_270e0f67.cu -Dscalar_t=float]", []),
    ],
)
def test_outdated_outputs_are_found(digest, output, reasons):
    metadata = {"modelnew": {"digest": digest}} if digest else {}
    assert outdated({"metadata": metadata, "cells": [{"outputs": [{"text": [output]}]}]}) == reasons


def outdated(notebook):
    """Why stored outputs are not those of present code: another digest, or a kernel or variant that is gone.

    A digest knows the kernels' texts, but not which of them the host launches. Kernels are looked for where `explain`
    lists them, variants in brackets, as errors have them. A file of an operator from a string is none of the package.
    """
    digest, text = notebook["metadata"].get("modelnew", {}).get("digest"), "\n".join(texts(notebook["cells"]))
    named = set(re.findall(r"kernels `?([0-9a-f]{12})", text)) - {source.digest()[:12]}
    lists = re.findall(r"^(?:forward|backward): (\w+(?:, \w+)*)$", text, re.MULTILINE)
    shown = {name for names in lists for name in names.split(", ")}
    shown |= set(re.findall(r"\[(?!\w+_[0-9a-f]{8}\.cu)\w+\.cu -D[^\]]+\]", text))
    present = {kernel.name for kernel in cupy_kernels.kernels()} | {f"[{variant}]" for variant in variants()}
    reasons = [f"{name} is gone" for name in sorted(shown - present)] + [f"a text names {name}" for name in named]
    if not digest:
        reasons.append("they name no digest of kernels")
    elif digest != source.digest():
        reasons.append(f"they are of kernels {digest[:12]}, the present ones are {source.digest()[:12]}")
    return reasons


def texts(cells):
    """Of all outputs that are text."""
    for output in (output for cell in cells for output in cell.get("outputs", ())):
        for kind, lines in {"stream": output.get("text", ()), **output.get("data", {})}.items():
            if kind == "stream" or kind.startswith("text/"):
                yield "".join(lines)


def test_all_are_paired():
    assert {path.stem for path in NOTEBOOKS} == {path.stem for path in EXAMPLES.glob("[0-9]*.py")}


def test_command(tmp_path, monkeypatch):
    pytest.importorskip("ipykernel")
    nbformat = pytest.importorskip("nbformat")
    pytest.importorskip("jupytext")
    pytest.importorskip("nbclient")
    script, stored = tmp_path / "a.py", tmp_path / "a.ipynb"
    script.write_text(SCRIPT.format("print('line 2')"), encoding="utf-8")

    def invoke(*arguments):
        return CliRunner().invoke(notebooks.command, arguments)

    assert invoke("--emulator", str(script)).exit_code == 0
    notebook = nbformat.read(stored, as_version=4)
    head = commands.head(environment.device())
    assert notebook.metadata["modelnew"] == {"digest": source.digest(), "versions": head["versions"]}
    title, code = notebook.cells
    assert title.source == "# A title"
    assert [output.text for output in code.outputs] == ["line 1\nline 2\n"]
    assert "execution" not in code.metadata
    before = stored.read_bytes()
    script.write_text(SCRIPT.format("1 / 0"), encoding="utf-8")
    result = invoke("--emulator", str(script))
    assert result.exit_code == 1
    assert "ZeroDivisionError" in result.output
    assert stored.read_bytes() == before
    monkeypatch.setattr(environment, "backend", lambda: {"name": "emulator", "why": "torch finds no GPU"})
    result = invoke(str(script))
    assert result.exit_code == 1
    assert "torch finds no GPU; --emulator stores" in result.output
