"""Errors as a user of inline operators reads them: the line of the text, and nothing of the emulator's own files."""

import re

import pytest
import torch

from cupy_kernels.emulator import messages
from cupy_kernels.errors import EmulatorError, KernelCompileError
from modelnew.inline import operator

TEXT = """#include "common.cuh"
extern "C" __global__ void f(const scalar_t* x, scalar_t* y, i64 size) {
    i64 i = (i64)blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= size) return;
    STATEMENT
}"""
INTERNAL = r"(kernel\.cpp|cuda\.h|intrinsics\.h|emulator_entries|EMULATOR_)"


@pytest.mark.parametrize(
    "statement",
    [
        "y[i] = from_acc<scalar_t>(__shfl_down_sync(x, 1));",
        "y[i] = from_acc<scalar_t>(int4(3));",
        "y[i] = from_acc<scalar_t>(warp_sum(x));",
        "y[i] = from_acc<scalar_t>(std::max(to_acc(x[i]), 0.f));",
        "y[i] = atomicAdd(y, x);",
        "y[i] = nothing(x[i]);",
        "y[i] = from_acc<scalar_t>(fmaxf(to_acc(x[i])));",
    ],
)
def test_a_text_that_does_not_compile(statement):
    function = operator(TEXT.replace("STATEMENT", statement), "f")
    with pytest.raises(KernelCompileError) as error:
        function(torch.ones(3))
    first, second, third = str(error.value).splitlines()[:3]
    assert first.endswith("does not compile:")
    assert re.match(rf"{re.escape(function.declared.file)}:5:\d+: error: ", second)
    assert third == f"    5 |     {statement}"
    assert not re.search(INTERNAL, str(error.value))


def test_a_launch_that_fails():
    function = operator(TEXT.replace("STATEMENT", "atomicAdd((float*)&y[i], 1.0f);"), "f")
    with pytest.raises(EmulatorError, match=r"reads y\[\d\], which nobody has written") as error:
        function(torch.ones(3))
    assert not re.search(INTERNAL, str(error.value))


def test_the_log_of_clang_and_of_gcc():
    """Both kinds of macro notes; what stands in the text stays."""
    gcc = """a.cu: In function 'void f()':
/tmp/x/kernel.cpp:336:94: error: too few arguments
  336 | #define __shfl_down_sync(mask)
      |                           ~~~~
a.cu:5:28: note: in expansion of macro '__shfl_down_sync'
/tmp/x/kernel.cpp:271:19: note: declared here
  271 | static inline int lane_down()
      |                   ^~~~~~~~~
a.cu:7:1: error: expected ';'
"""
    assert messages.of_text(gcc).splitlines() == [
        "a.cu: In function 'void f()':",
        "a.cu:5:28: error: too few arguments",
        "a.cu:7:1: error: expected ';'",
    ]
    clang = """a.cu:5:28: error: no matching function for call to 'shuffle'
/tmp/x/cuda.h:334:60: note: expanded from macro '__shfl_xor_sync'
  334 | #define __shfl_xor_sync(mask)
      |                           ^~~~
1 error generated.
"""
    assert messages.of_text(clang).splitlines() == [
        "a.cu:5:28: error: no matching function for call to 'shuffle'",
        "1 error generated.",
    ]
