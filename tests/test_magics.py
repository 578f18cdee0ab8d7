"""%%cu and %cu_reset in an IPython shell, and the checks behind them."""

import contextlib
import itertools
import math
import os
import re
import subprocess
import sys
import threading
import time
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("IPython")

from IPython.core.interactiveshell import InteractiveShell

import cupy_kernels
from cupy_kernels import compiler, emulator, source, tinker
from cupy_kernels.errors import BackendError, EmulatorError
from cupy_kernels.launch import observed
from modelnew import checks, functional, magics
from modelnew.functional import tanh
from modelnew.parity import Error, Row

FORWARD = source.packaged_kernels("tanh.cu")["tanh_forward"]
SLOWER = FORWARD.replace("if (start", "for (int i = 0; i < 3; i++) __syncwarp();\n    if (start", 1)
WRONG = FORWARD.replace("tanh_of(", "(acc_t)1.001 * tanh_of(")
BROKEN = FORWARD.replace("tanh_of(", "nothing(")


@pytest.fixture(scope="module")
def shell():
    shell = InteractiveShell.instance()
    shell.run_cell("%load_ext modelnew").raise_error()
    yield shell
    InteractiveShell.clear_instance()


@pytest.fixture(autouse=True)
def nothing_stays_edited():
    yield
    cupy_kernels.reset()


@pytest.fixture
def run(shell, capsys):
    """Runs a cell; returns (what it printed, the name of its error or None)."""

    def run(cell):
        result = shell.run_cell(cell)
        error = result.error_before_exec or result.error_in_exec
        captured = capsys.readouterr()
        return captured.out + captured.err, type(error).__name__ if error else None

    return run


def test_a_right_cell_stays_until_reset(run, device):
    text, error = run(f"%%cu tanh_forward --device {device} --images 2\n{SLOWER}")
    assert error is None, text
    assert "tanh, float32" in text
    assert "tanh_forward WIDTH=4" in text
    assert "tanh_forward WIDTH=1" in text
    assert text.count(" ms") == 4
    assert ("emulator" in text) == (device == "cpu")
    assert source.text("tanh_forward").strip() == SLOWER.strip()
    torch.testing.assert_close(tanh(torch.ones(9, device=device)), torch.ones(9, device=device).tanh())
    assert run("%cu_reset tanh_forward") == ("", None)
    assert not source.overridden()
    assert run(f"%%cu tanh.cu --device {device} --images 2\n{source.packaged('tanh.cu')}// mine")[1] is None
    assert source.overridden() == {"tanh.cu"}
    assert run("%cu_reset") == ("", None)
    assert not source.overridden()


def test_what_a_verdict_covers(run):
    text, error = run(f"%%cu tanh_forward --device cpu --all\n{SLOWER}")
    assert error is None, text
    assert all(f"tanh, {dtype}" in text for dtype in magics.DTYPES)
    assert "Not checked: large sizes." in " ".join(text.split())
    assert "Races, accesses out of bounds, barriers: looked for" in " ".join(text.split())
    assert "tanh_forward is now in force" in text
    assert cupy_kernels.edited() == ["tanh_forward"]
    text, _ = run(f"%%cu tanh_forward --device cpu --seconds 0\n{SLOWER}")
    left = "Not checked: large sizes; without --all also float32 odd, float64, float16, bfloat16, float32 empty,"
    assert left in " ".join(text.split())


@pytest.mark.parametrize(
    ("cell", "message"),
    [
        (FORWARD.replace("tanh_of(", "(sizeof(scalar_t) == 2 ? (acc_t)0.9 : (acc_t)1) * tanh_of("), "float16"),
        (FORWARD.replace("tanh_of(", "(size % 2 ? (acc_t)0.9 : (acc_t)1) * tanh_of("), "tanh: output"),
        (FORWARD.replace("{", "{ if (blockIdx.x == 0 && threadIdx.x < 2) y[0] = x[0];", 1), "race"),
        (FORWARD.replace("{", "{ if (to_acc(x[size]) == 3) return;", 1), "reads out of bounds: x["),
    ],
    ids=["float16", "odd", "race", "bounds"],
)
def test_what_float32_at_an_even_size_does_not_show(run, cell, message):
    text, error = run(f"%%cu tanh_forward --device cpu --seconds 600\n{cell}")
    assert error == "UsageError"
    assert message in text, text
    assert "Nothing was changed." in text
    assert not source.overridden()


def test_a_cell_to_begin_with(run, shell):
    assert run("%cu_text tanh_forward") == ("", None)
    (payload,) = [p for p in shell.payload_manager.read_payload() if p["source"] == "set_next_input"] or [None]
    assert (payload["text"] if payload else shell.rl_next_input) == f"%%cu tanh_forward\n{FORWARD}"
    shell.payload_manager.clear_payload()
    text, error = run("%cu_text tanh_forwrad")
    assert error == "UsageError"
    assert "did you mean tanh_forward" in text


EDITS = itertools.count()
# From edit to verdict; on a GPU at the model's size, in the emulator at small ones. The ten kernels of a file compile
# together, which takes longer where other tests run, too, and with NVRTC 11.
SECONDS = {"cpu": 5, "cuda": 1}
SECONDS_OF_A_FILE = 3


@pytest.mark.parametrize("name", ["tanh_forward", "pooled_forward", "max_pool_forward", "batch_norm.cu"])
def test_edit_to_verdict(run, device, name):
    if device == "cpu" and name in ("max_pool_forward", "batch_norm.cu"):
        pytest.skip("takes longer in the emulator")
    file, kernel = tinker.locate(name)
    text = source.packaged_kernels(file)[name] if kernel else source.packaged(file)
    limit = SECONDS[device]
    if not kernel and ("PYTEST_XDIST_WORKER" in os.environ or compiler.cupy().cuda.nvrtc.getVersion() < (12, 0)):
        limit = SECONDS_OF_A_FILE

    def seconds():
        """Of a cell that nobody has compiled."""
        start = time.perf_counter()
        output, error = run(f"%%cu {name} --device {device}\n// edit {next(EDITS)} at {start}\n{text}")
        assert error is None, output
        return time.perf_counter() - start

    seconds()  # the reference, and the package's own kernels, are computed and compiled once
    taken = []
    while not taken or (min(taken) >= limit and len(taken) < 6):  # others may be using the machine
        taken.append(seconds())
    assert min(taken) < limit, taken


@pytest.mark.parametrize("before", [None, SLOWER], ids=["original", "edited"])
@pytest.mark.parametrize(
    ("cell", "message"),
    [
        (BROKEN, r"does not compile"),
        (WRONG, r"tanh_forward is wrong: tanh: output"),
        (FORWARD.replace("start < size", "start < size - 1"), r"leaves 1 of"),
        (FORWARD[:-1], r"lacks the closing brace of tanh_forward"),
        ("int x;", r"lacks the kernel tanh_forward. It must define"),
        (FORWARD.replace(", i64 size", ""), r"declares 2 parameters, not 3"),
    ],
    ids=["compile", "wrong", "unwritten", "brace", "no_entry_point", "arguments"],
)
def test_a_bad_cell_leaves_what_was_there(run, before, cell, message):
    if before:
        cupy_kernels.edit({"tanh_forward": before})
    text, error = run(f"%%cu tanh_forward --device cpu\n{cell}")
    assert error == "UsageError"
    assert message in text
    there = "tanh_forward" if before else "no edit"
    assert f"Nothing was changed. In force from before: {there}." in text
    assert source.overrides()[0] == ({"tanh_forward": before} if before else {})
    torch.testing.assert_close(tanh(torch.ones(5)), torch.ones(5).tanh())


def test_a_compile_error_shows_the_line_of_the_cell(run):
    text, _ = run(f"%%cu tanh_forward --device cpu\n\n{BROKEN}")
    line = BROKEN.partition("nothing(")[0].count("\n") + 2
    assert f"tanh_forward:{line}:" in text
    assert f"    {line} |         for (int i = 0; i < WIDTH; i++) out.v[i] = from_acc<scalar_t>(nothing(" in text


def test_what_is_wrong_is_shown(run):
    text, _ = run(f"%%cu tanh_forward --device cpu\n{WRONG}")
    assert text.count("FAIL") >= 2
    assert "tanh: output in float32" in text
    assert all(header in text for header in ("check", "edited", "reference", "speedup", "results"))
    assert " ms" not in text


@pytest.mark.parametrize(
    ("cell", "message"),
    [
        (f"%%cu tanh_forwrad\n{FORWARD}", "did you mean tanh_forward"),
        (f"%%cu\n{FORWARD}", "required: kernel"),
        (f"%%cu tanh_forward --dtype int8\n{FORWARD}", "invalid choice: 'int8'"),
        (f"%%cu tanh_forward --device xpu\n{FORWARD}", "received xpu"),
        (f"%%cu tanh_forward --images 0\n{FORWARD}", "images must be 1 or more, received 0"),
        (f'%%cu "tanh_forward\n{FORWARD}', "No closing quotation"),
        ("%cu_reset tanh_forward", "tanh_forward is not edited; edited at present: nothing"),
        ("%cu_reset nonsense", "no kernel and no file of the package is called 'nonsense'"),
    ],
)
def test_bad_lines(run, cell, message):
    text, error = run(cell)
    assert error == "UsageError"
    assert message in text
    assert not source.overridden()


@pytest.mark.parametrize("cell", [f"%%cu tanh_forward\n{SLOWER}", "%cu_reset"])
def test_an_edit_while_another_thread_has_a_block(run, monkeypatch, cell):
    with monkeypatch.context() as patch:
        patch.setattr(source, "_blocks", [threading.get_ident() + 1])
        text, error = run(cell)
    assert error == "UsageError"
    assert "another thread is inside an override block" in text


def test_neither_gpu_nor_compiler(run, monkeypatch):
    def none():
        raise BackendError("no compiler here: pip install 'a[b]'")

    monkeypatch.setattr(emulator, "compiler", none)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    text, error = run(f"%%cu tanh_forward\n{SLOWER}")
    assert error == "UsageError"
    assert "pip install 'a[b]'" in text
    assert not source.overridden()


def test_the_other_spelling():
    script = """
import sys
from IPython.core.interactiveshell import InteractiveShell
import cupy_kernels
assert "modelnew" not in sys.modules
shell = InteractiveShell.instance()
shell.run_cell("%load_ext cupy_kernels").raise_error()
shell.run_cell("%cu_reset").raise_error()
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_without_torch():
    script = """
import sys
sys.modules["torch"] = None
from IPython.core.interactiveshell import InteractiveShell
import cupy_kernels
assert cupy_kernels.kernels("tanh")
InteractiveShell.instance().run_cell("%load_ext cupy_kernels")
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert "need modelnew and torch" in done.stdout + done.stderr
    assert "python3 -m pip install torch ipython" in done.stdout + done.stderr


SYNC = "sync_batch_norm.cu", "sync_pooled_tail.cu"  # which need several processes


def test_judge_refuses_what_no_check_launches(monkeypatch):
    checked = {f for case in checks.CASES for f in case.files}
    assert {f for f in source.names() if f.endswith(".cu")} <= checked | {*SYNC}
    with pytest.raises(ValueError, match="checked in float32, float64, float16, bfloat16; received int8"):
        magics.judge("tanh_forward", FORWARD, dtypes=("int8",))
    monkeypatch.setattr(checks, "CASES", [case for case in checks.CASES if "conv_transpose.cu" not in case.files])
    text = source.packaged_kernels("conv_transpose.cu")["conv_gather"]
    with pytest.raises(ValueError, match=r"no check launches conv_gather in float64, float32.*modelnew/cases\.py"):
        magics.judge("conv_gather", text, dtypes=("float64", "float32"), device="cpu")


def test_no_check_begins_that_would_end_too_late(monkeypatch):
    """Judged by the slowest before it."""
    clock, ends, real = [0.0], [], checks.compare

    def compare(*args):
        rows = real(*args) if not clock[0] else []
        clock[0] += 0.2
        ends.append(clock[0])
        return rows

    monkeypatch.setattr(magics, "time", SimpleNamespace(perf_counter=lambda: clock[0]))
    monkeypatch.setattr(checks, "compare", compare)
    verdict = magics.judge("tanh_forward", FORWARD, device="cpu", seconds=0.95)
    assert ends[-1] == pytest.approx(0.8)
    assert verdict.unchecked


@pytest.fixture
def clocked(monkeypatch):
    """Of `magics.judge` for a whole file on a GPU: checks and compilations take 0.1 s each, and compute nothing.

    Returns a function of the seconds allowed, which returns (checks that ran, the verdict, seconds taken).
    """
    clock, ran = [0.0], []
    names = {"a": "one two", "b": "one", "c": "two three", "d": "three"}
    cases = [checks.Case(what, ("tanh.cu",), None, None, None) for what in names]

    def compare(case, dtype, device, images, size=""):
        clock[0] += 0.1
        ran.append((case.what, str(dtype).removeprefix("torch."), size))
        for name in names[case.what].split():
            launched(source.Kernel("tanh.cu", name, (("FOR", case.what), ("scalar_t", str(dtype)))))
        return [Row(f"{case.what}: output", str(dtype), Error(0, 0), Error(0, 0), None, True)]

    def launched(kernel):
        for listener in listeners:
            listener(kernel)

    @contextlib.contextmanager
    def observe(listener):
        listeners.append(listener)
        yield
        listeners.remove(listener)

    def compile_together(kernels, device):
        clock[0] += 0.1 * len({kernel.variant for kernel in kernels})

    listeners = []
    monkeypatch.setattr(magics, "_known", {})
    monkeypatch.setattr(magics, "time", SimpleNamespace(perf_counter=lambda: clock[0]))
    monkeypatch.setattr(magics, "compile_together", compile_together)
    monkeypatch.setattr(magics, "observed", observe)
    monkeypatch.setattr(magics, "measure_launches", lambda calls, device: [SimpleNamespace(median=1.0)] * len(calls))
    monkeypatch.setattr(magics.environment, "device", lambda device: torch.device("cuda"))
    monkeypatch.setattr(checks, "images_for", lambda device: 1)
    monkeypatch.setattr(checks, "cases", lambda files: cases)
    monkeypatch.setattr(checks, "compare", compare)

    def judge(seconds):
        ran.clear()
        start = clock[0]
        verdict = magics.judge("tanh.cu", source.packaged("tanh.cu"), seconds=seconds)
        return list(ran), verdict, clock[0] - start

    return judge


def test_on_a_gpu_each_kernel_has_a_check_then_the_time_decides(clocked):
    ran, verdict, _ = clocked(0)
    assert ran == [(what, "float32", "") for what in "abcd"]  # which kernels they launch is not known yet
    ran, verdict, taken = clocked(0)
    assert ran == [("a", "float32", ""), ("c", "float32", "")]  # one, two; and three
    assert verdict.unchecked[0] == "float32 odd"
    assert "float32 (2 of 4 checks)" in verdict.unchecked
    assert taken == pytest.approx(0.6)  # with two compilations, and two of the package's text
    ran, verdict, _ = clocked(math.inf)
    assert len(ran) == len(set(ran)) == 4 * len(magics.DTYPES) * len(checks.SIZES)
    assert not verdict.unchecked


def test_on_a_gpu_each_dtype_has_a_check_before_more_of_the_first(clocked):
    clocked(math.inf)
    ran, verdict, _ = clocked(1.45)
    firsts = [("a", ""), ("c", ""), ("a", "odd"), ("c", "odd")]
    assert ran[:4] == [(what, "float32", size) for what, size in firsts]
    assert ran[4:] == [(what, dtype, "") for dtype in ("float64", "float16") for what in "ac"]
    assert "bfloat16" in verdict.unchecked
    assert "float64 (2 of 4 checks)" in verdict.unchecked


def test_what_torch_keeps_does_not_make_a_check_smaller(monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (20e9, 40e9))
    for reserved, images in ((15e9, 512), (0, 32)):
        monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device, reserved=reserved: reserved)
        assert checks.images_for(torch.device("cuda")) == images
    assert checks.images_for(torch.device("cpu")) is None


def test_every_function_has_a_case():
    named = {re.match(r"\w+", case.what)[0] for case in checks.CASES}
    fused = {f"conv_bn_{activation}_max_pool_group_norm" for activation in ("activation", "tanh")}
    assert set(functional.__all__) - named == fused  # whose cases are called "fused model"


@pytest.mark.parametrize("case", checks.CASES, ids=lambda case: case.what)
def test_every_check_passes(device, case):
    for dtype in (torch.float32, torch.float16):
        rows = checks.compare(case, dtype, torch.device(device), 8 if device == "cuda" else None)
        assert rows
        assert all(row.ok for row in rows), [row for row in rows if not row.ok]


IN_BOUNDS = "plane + i * period < planes"


@pytest.mark.parametrize(
    ("name", "right", "wrong", "message"),
    [
        ("max_pool_forward", IN_BOUNDS, "true", r"writes out of bounds: y\["),
        ("max_pool_backward", IN_BOUNDS, "true", r"writes out of bounds: dx\["),
        ("max_pool_select", IN_BOUNDS, "true", r"reads out of bounds: argmax\["),
        ("depthwise_wgrad", "__syncthreads();", "", "race: .* scratch"),
        ("thin_forward", "__syncthreads();", "", "is a barrier missing"),
        ("conv_gather", "k + row < channels_in", "true", r"reads out of bounds: packed\["),
        ("bn_pool_backward", "2 * item.row + 1 < height", "true", r"reads out of bounds: x\["),
    ],
)
def test_what_the_checks_of_a_kernel_find(name, right, wrong, message):
    """Planes, channels and rows that fill no thread, no tile and no window; and channels_last."""
    text = cupy_kernels.text(name)
    assert right in text
    with pytest.raises(EmulatorError, match=message):
        magics.judge(name, text.replace(right, wrong, 1), device="cpu", seconds=math.inf)


def test_a_race_of_reads_that_are_unchecked(monkeypatch):
    """In ascending order, threads find what is right."""
    monkeypatch.delenv("CUPY_KERNELS_SEED", raising=False)
    monkeypatch.setattr(checks, "CASES", [case for case in checks.CASES if "large planes" in case.what])
    text = cupy_kernels.text("batch_norm_apply").replace("__syncthreads();", "", 1)
    rows = magics.judge("batch_norm_apply", text, device="cpu", seconds=math.inf).rows
    assert {"odd size" in row.what for row in rows if not row.ok} == {True}


@pytest.mark.parametrize("file", [f for f in source.names() if f.endswith(".cu") and f not in SYNC])
def test_the_checks_of_a_file_launch_all_its_kernels(file):
    launched = set()
    with observed(lambda kernel, *_: launched.add((kernel.file, kernel.name))):
        for case in checks.cases([file]):
            checks.compare(case, torch.float32, torch.device("cpu"), None)
    of_16_bits = {"scale_fp16", "turn_taps"}  # alone
    assert {name for f, name in launched if f == file} == set(source.packaged_kernels(file)) - of_16_bits
