"""Lines of CUDA C that NVRTC and the emulator both take, with the values that they have, and lines that both refuse.

NVRTC compiles without a GPU. The lines are in dialect/, and in dialect_values.py. What one takes and the other does not
is there, too, with the reason.
"""

import os
import re
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from dialect_values import INT, VALUES, D, F, L

from cupy_kernels import emulator, nvrtc, source
from cupy_kernels.errors import BackendError, KernelCompileError
from cupy_kernels.launch import launch
from cupy_kernels.source import Kernel, Variant
from modelnew.calls import run

FOLDER = Path(__file__).parent / "dialect"
HEAD = """#include "common.cuh"
"""
# What the emulator takes by g++ alone. clang looks into asm, its vector types have a member more, and [[likely]] and
# __COUNTER__ are extensions to it.
NOT_BY_CLANG = ("asm volatile", "asm(", "auto [a, b] = make_float2", "[[likely]]", "__COUNTER__")
PARAMETERS = (
    "double* y, float f, double d, int i, i64 l, INOUT float* pf, INOUT int* pi, INOUT unsigned* pu, INOUT double* pd, "
    "INOUT unsigned long long* pm"
)
LOCALS = (
    "int t = threadIdx.x; unsigned u = 0xF0F00F1Eu + (i + 5); unsigned long long m = 0xFEDCBA9876543210ull + (i + 5); "
)


def lines_of(file):
    """(what stands before the kernel, statements of the kernel) of each line of a file of dialect/."""
    lines = (FOLDER / f"{file}.cu").read_text(encoding="utf-8").splitlines()
    return [tuple(part.strip() for part in line.split(";;")) for line in lines if not line.startswith("//")]


def kernel(number, body):
    return f'extern "C" __global__ void line_{number}({PARAMETERS}) {{ {LOCALS}{body} }}'


def unit(lines):
    """The text that a compiler gets: each line in a "file" of its own, line_<number>."""
    text = [HEAD]
    for number, (head, body) in enumerate(lines):
        head = re.sub(r"\b(host|S|global)\b", rf"\1_{number}", head)
        body = re.sub(r"\b(host|S|global)\b", rf"\1_{number}", body)
        text.append(f'#line 1 "line_{number}"\n{head}\n{kernel(number, body)}')
    return "\n".join(text)


def blamed(log):
    """Numbers of the lines in which a compiler's log has an error."""
    return {int(number) for number in re.findall(r"^line_(\d+)[:(]\d+\)?:[^\n]*error", log, re.MULTILINE)}


def errors_of_emulator(lines, tmp_path):
    with source.override({"lines.cu": unit(lines)}):
        text = emulator._translation_unit(Kernel("lines.cu", "line_0"))
    (tmp_path / "lines.cpp").write_text(text)
    command = [*emulator.compiler(), *emulator.FLAGS, *emulator.CHECKS, str(tmp_path / "lines.cpp")]
    if emulator._is_clang():  # the ziglang wheel's wants to write something
        command += [*emulator.CLANG_CHECKS, "-ferror-limit=0", "-c", "-o", str(tmp_path / "lines.o")]
    else:
        command += ["-fsyntax-only"]
    done = subprocess.run(command, capture_output=True, env={**os.environ, "LC_ALL": "C"})
    log = done.stderr.decode(errors="replace")
    assert done.returncode == bool(blamed(log)), log
    return blamed(log)


def build(lines):
    """Builds and loads what the emulator runs."""
    with source.override({"lines.cu": unit(lines)}):
        emulator.backend.compiled(Kernel("lines.cu", "line_0"))


def errors_of_nvrtc(lines, least_major):
    wrong = set()
    for first in range(0, len(lines), 40):  # it gives up after 100 errors
        with source.override({"lines.cu": unit(lines[first : first + 40])}):
            try:
                nvrtc.compile_ptx(Variant("lines.cu"), "compute_80")
            except KernelCompileError as error:
                wrong |= {first + number for number in blamed(str(error))} or {-1}
    return wrong


@pytest.fixture(params=[11, nvrtc.WGMMA_MAJOR])
def least_major(request, monkeypatch):
    """NVRTC of CUDA 11, and a newer one."""
    try:
        library = nvrtc.shared_library(request.param)
    except BackendError as error:
        pytest.skip(str(error))
    monkeypatch.setattr(nvrtc, "shared_library", lambda least_major=11: library)
    return request.param


def taken():
    return [("", f"y[0] = {expression};") for expression, _ in VALUES] + lines_of("taken")


def test_nvrtc_takes_what_is_taken(least_major):
    lines = taken()
    assert not [lines[number] for number in errors_of_nvrtc(lines, least_major)]


def by_this_compiler(lines):
    """Those lines that the emulator's compiler takes, of such that g++ takes."""
    return [line for line in lines if not (emulator._is_clang() and any(part in line[-1] for part in NOT_BY_CLANG))]


def test_the_emulator_takes_what_is_taken(tmp_path):
    lines = by_this_compiler(taken())
    assert not [lines[number] for number in errors_of_emulator(lines, tmp_path)]
    build(by_this_compiler(lines_of("taken")))


@pytest.mark.parametrize("file", ["refused", "emulator_alone"])
def test_nvrtc_refuses(least_major, file):
    lines = lines_of(file)
    wrong = errors_of_nvrtc(lines, least_major)
    assert not [line for number, line in enumerate(lines) if number not in wrong]


@pytest.mark.parametrize("file", ["refused", "nvrtc_alone"])
def test_the_emulator_refuses(tmp_path, file):
    """And blames the line, no file of the emulator."""
    lines = [line for line in lines_of(file) if "asm" not in line[-1]]
    wrong = errors_of_emulator(lines, tmp_path)
    assert not [line for number, line in enumerate(lines) if number not in wrong]


@pytest.mark.parametrize("line", [line for line in lines_of("nvrtc_alone") if "asm" in line[-1]])
def test_ptx(line):
    with pytest.raises(KernelCompileError, match="asm: the emulator has no PTX"):
        build([line])


def test_what_one_alone_takes(least_major, tmp_path):
    assert not errors_of_nvrtc(lines_of("nvrtc_alone"), least_major)
    assert not errors_of_emulator(by_this_compiler(lines_of("emulator_alone")), tmp_path)


def test_pow_of_an_int_needs_nvrtc_12(least_major, monkeypatch):
    with source.override({"pow.cu": f"{HEAD}{kernel(0, 'y[0] = pow(f, i);')}\n{kernel(1, 'y[0] = pow(d, 2);')}"}):
        if least_major == 11:
            with pytest.raises(KernelCompileError, match=r"no pow with an int as exponent: write pow\(x, 2.0f\)"):
                nvrtc.check(Kernel("pow.cu", "line_0"))
        else:
            assert nvrtc.check(Kernel("pow.cu", "line_0"))


@pytest.mark.parametrize("call", ["__dp4a(i, i, i)", "__dp4a(u, u, u)", "__dp2a_lo(i, i, i)", "__dp2a_hi(i, i, i)"])
def test_dot_products_of_parts_need_nvrtc_12(least_major, call):
    with source.override({"dot.cu": f"{HEAD}{kernel(0, f'y[0] = {call};')}"}):
        if least_major == 11:
            message = rf"NVRTC 11.8 has no {call.partition('(')[0]}: write out .* cuda12 or cuda13"
            with pytest.raises(KernelCompileError, match=message):
                nvrtc.check(Kernel("dot.cu", "line_0"))
        else:
            assert nvrtc.check(Kernel("dot.cu", "line_0"))


def test_values(device):
    values = VALUES if device == "cuda" else [pair for pair in VALUES if by_this_compiler([pair[:1]])]
    cases = "\n".join(f"case {n}: y[{n} * 32 + t] = {expression}; break;" for n, (expression, _) in enumerate(values))
    text = (
        f'{HEAD}extern "C" __global__ void values({PARAMETERS}) {{\n{LOCALS}\nswitch (blockIdx.x) {{\n{cases}\n}}\n}}'
    )
    y = torch.empty(len(values), 32, dtype=torch.float64, device=device)
    kinds = torch.float32, torch.int32, torch.uint32, torch.float64, torch.uint64
    pointers = [torch.zeros(64, dtype=kind, device=device) for kind in kinds]
    with source.override({"values.cu": text}):
        run(
            lambda y, *p: launch(Kernel("values.cu", "values"), (len(values), 1, 1), (32, 1, 1), (y, F, D, INT, L, *p)),
            y,
            *pointers,
        )
    expected = np.array([np.broadcast_to(np.asarray(value, np.float64), 32) for _, value in values])
    near = np.isclose(y.cpu().numpy(), expected, rtol=1e-5, atol=1e-6)
    assert not [(*values[n], y[n].tolist()) for n in np.flatnonzero(~near.all(1))]
