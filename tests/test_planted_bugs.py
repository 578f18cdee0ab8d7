"""Kernels with one bug each, which the emulator catches, and their right twins, which it accuses of nothing.

They are in planted_bugs/, a file a class of bugs, each behind a line `//// its name`. What is right and what is wrong
stand side by side: @right@wrong@. `error:` is what the message says, as a regular expression; the line below it says
how many elements x and y have, how many blocks and threads there are, and how many bytes of shared memory, where that
is not as in DEFAULT. n is the number of x's elements. This is the emulator's specification, and shows its messages.
"""

import importlib.util
import re
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest

from cupy_kernels import emulator, source
from cupy_kernels.errors import EmulatorError
from cupy_kernels.launch import launch
from cupy_kernels.source import Kernel

FOLDER = Path(__file__).parent / "planted_bugs"
CLASSES = """alignment async_copies barriers bounds bulk_copies grid_barriers launch_sizes local_memory mbarriers
    mbarriers_of_wgmma numbers outputs races shared_of_functions unset_variables unwritten_memory warp_operations
    wgmma"""
DEFAULT = {"x": "1000", "y": "1000", "grid": "4", "block": "256", "shared": "0"}


class Bug(NamedTuple):
    name: str
    message: str
    launch: dict[str, str]
    text: str


def bugs():
    for file in sorted(FOLDER.glob("*.cu")):
        for part in file.read_text(encoding="utf-8").split("//// ")[1:]:
            found = re.fullmatch(r"(.+)\n// error: (.+)\n(?:// (\w+: .+)\n)?((?:.|\n)+)", part)
            given = dict(entry.split(": ") for entry in (found[3] or "").split(", ") if entry)
            assert set(given) <= set(DEFAULT)
            yield Bug(f"{file.stem}: {found[1]}", found[2], {**DEFAULT, **given}, found[4])


BUGS = list(bugs())
BY_WORDS = "races: bit fields of a word"  # clang reads the whole word to write a part: see docs/guide/tinkering.md


def run(bug, wrong):
    def chosen(text):
        return re.sub("@([^@]*)@([^@]*)@", rf"\{1 + wrong}", text)

    sizes = {name: int(chosen(value)) for name, value in bug.launch.items()}
    kernel = Kernel("planted.cu", "planted")
    with source.override({"planted.cu": f'#include "common.cuh"\n{chosen(bug.text)}'}):
        x_is, y_is, *_ = source.signature(kernel)
        x = (100 * np.random.default_rng(0).standard_normal(sizes["x"])).astype(x_is.dtype)
        args = x, np.zeros(sizes["y"], y_is.dtype), x.size, None
        args = args[: len(source.signature(kernel))]
        launch(kernel, (sizes["grid"], 1, 1), (sizes["block"], 1, 1), args, sizes["shared"])


@pytest.fixture(autouse=True)
def not_by_words(request):
    if emulator._is_clang() and BY_WORDS in request.node.name:
        pytest.skip("clang writes bit fields by whole words")


@pytest.mark.parametrize("bug", BUGS, ids=lambda bug: bug.name)
def test_a_bug_is_caught(bug, order_of_threads):
    with pytest.raises(EmulatorError, match=bug.message):
        run(bug, wrong=True)


@pytest.mark.parametrize("bug", BUGS, ids=lambda bug: bug.name)
def test_its_twin_is_not_accused(bug, order_of_threads):
    run(bug, wrong=False)


@pytest.mark.skipif(not importlib.util.find_spec("ziglang"), reason="ziglang is not installed")
@pytest.mark.parametrize("name", CLASSES.split())
def test_by_ziglang(monkeypatch, name):
    """The compiler of a machine that has none, at the first bug of each class."""
    command = (sys.executable, "-m", "ziglang", "c++", *emulator.ZIG_FLAGS)
    monkeypatch.setattr(emulator, "compiler", lambda: command)
    monkeypatch.setattr(emulator, "backend", emulator.Emulator())
    bug = next(bug for bug in BUGS if bug.name.startswith(name))
    with pytest.raises(EmulatorError, match=bug.message):
        run(bug, wrong=True)
    run(bug, wrong=False)


def test_there_are_many():
    assert len({bug.name for bug in BUGS}) == len(BUGS) >= 40
    assert {bug.name.split(":")[0] for bug in BUGS} == set(CLASSES.split())
    assert all(len(re.findall("@[^@]*@[^@]*@", repr(bug.launch) + bug.text)) for bug in BUGS)
