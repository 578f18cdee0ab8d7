"""Kernels with one bug each, which the emulator catches, and their right twins, which it accuses of nothing.

A text has what is right and what is wrong side by side: @right@wrong@. This is the emulator's specification, and shows
what its messages look like.
"""

import re
from typing import NamedTuple

import numpy as np
import pytest

from cupy_kernels import source
from cupy_kernels.errors import EmulatorError
from cupy_kernels.launch import launch
from cupy_kernels.source import Kernel


class Bug(NamedTuple):
    """name, what the message says, and the kernel. Arrays are x and y, and n is the number of x's elements."""

    name: str
    message: str
    body: str
    x: int = 1000  # elements
    y: int = 1000
    grid: tuple[int, int] = (4, 4)  # blocks of the right launch, and of the wrong one
    block: tuple[int, int] = (256, 256)
    shared: tuple[int, int] = (0, 0)
    dtype: type = np.float32
    y_dtype: type = np.float32
    parameters: str = "const float* x, float* y, int n"
    head: str = ""


INDEX = "int i = blockIdx.x * blockDim.x + threadIdx.x;\n"
ONE_BLOCK = {"x": 256, "y": 256, "grid": (1, 1)}
INOUT = "const float* x, INOUT float* y, int n"
ASYNC = '#include "async_copy.cuh"\n'
DEPTH = """__device__ __attribute__((noinline)) int depth(int k, int n) {
    return k % 8 == 0 && n > 0 ? k : depth(k + 1, n) * 2 - k;
}
"""
COUNT = {"parameters": "const int* x, INOUT int* y, int n", "dtype": np.int32, "y_dtype": np.int32}

BLOCKS = {"parameters": INOUT, "y": 4}
# Each block has a value for the others.
OF_BLOCKS = """if (threadIdx.x == 0) y[blockIdx.x] = x[blockIdx.x];
    {}
    float total = 0;
    for (int b = 0; b < gridDim.x; b++) total += ((volatile float*)y)[b];
"""

BUGS = [
    # Bounds
    Bug(
        "no bounds check",
        r"planted\.cu:4: thread \d+ reads out of bounds: x\[10\d\d\], which has 1000 elements \(block 3,0,0\)",
        INDEX + "@if (i < n)@@ y[i] = tanhf(x[i]);",
    ),
    Bug("the bounds check lets one more pass", r"x\[1000\]", INDEX + "if (i @<@<=@ n) y[i] = x[i];"),
    Bug(
        "a neighbour after the end",
        r"thread 231 reads out of bounds: x\[1000\]",
        INDEX + "if (i < n) y[i] = x[i] + @(i + 1 < n ? x[i + 1] : 0)@x[i + 1]@;",
    ),
    Bug(
        "a neighbour before the start",
        r"thread 0 reads out of bounds: x\[-1\]",
        INDEX + "if (i < n) y[i] = x[@max(i - 1, 0)@i - 1@];",
    ),
    Bug(
        "a write over 4 KB after the end",
        r"writes out of bounds: y\[3\d\d\d\]",
        INDEX + "if (i < n) y[i + @0@3000@] = x[i];",
    ),
    Bug("an index that lands in another array", "out of bounds", INDEX + "if (i < n) y[@i@i * 1000003LL@] = x[i];"),
    Bug(
        "a null pointer",
        "reads through a null pointer",
        INDEX + "if (i < n) y[i] = x[i] + @(bias ? bias[i] : 0)@bias[i]@;",
        parameters="const float* x, float* y, int n, const float* bias",
    ),
    Bug(
        "static shared memory, one after the end",
        "out of bounds",
        INDEX
        + """__shared__ float s[256];
        s[threadIdx.x@@ + 1@] = x[i];
        __syncthreads();
        y[i] = s[threadIdx.x];""",
        **ONE_BLOCK,
    ),
    Bug(
        "a local array, one after the end",
        r"index 4 is out of bounds of 'float ?\[4\]'",
        INDEX
        + """float v[4];
        for (int k = 0; k @<@<=@ 4; k++) v[k] = x[(i + k) % n];
        y[i] = v[i % 4];""",
        **ONE_BLOCK,
    ),
    Bug(
        "const is cast away",
        r"writes x\[\d+\], which is const",
        INDEX + "y[i] = x[i]; @@((float*)x)[i] = 0;@",
        **ONE_BLOCK,
    ),
    Bug(
        "pointers that are swapped", r"writes x\[\d+\], which is const", INDEX + "@y@((float*)x)@[i] = 1;", **ONE_BLOCK
    ),
    Bug(
        "rows of another width",
        r"out of bounds: x\[",
        INDEX + "if (i < n / 10) y[i] = x[i * @10@11@ + 9];",
        x=1000,
        y=100,
        grid=(1, 1),
    ),
    # Alignment
    Bug(
        "float4 at an odd element",
        r"multiple of 16 bytes: x\[\d+\]",
        INDEX + "if (i < 249) *(float4*)(y + 4 * i) = *(const float4*)(x + 4 * i@@ + 1@);",
        x=997,
        y=996,
    ),
    Bug(
        "rows that are no multiple of float4",
        r"multiple of 16 bytes: x\[\d+\]",
        INDEX
        + """const float* row = x + i * @4@3@;
        float4 v = *(const float4*)row;
        y[i] = v.x + v.w;""",
        **ONE_BLOCK | {"x": 1024},
    ),
    Bug(
        "a double at an odd float",
        r"multiple of 8 bytes: y\[\d+\]",
        INDEX
        + """if (i < 100) *(double*)(y + 2 * i@@ + 1@) = 1;
        if (i >= 200) y[i] = x[i];""",
        parameters="const float* x, INOUT float* y, int n",
        **ONE_BLOCK,
    ),
    # Races
    Bug(
        "a sum without an atomic",
        r"planted\.cu:4: race: .* y\[\d\], which thread \d+ writes at planted\.cu:4",
        INDEX + "@atomicAdd(&y[blockIdx.x], x[i])@y[blockIdx.x] += x[i]@;",
        x=1024,
        y=4,
        parameters=INOUT,
    ),
    Bug(
        "no barrier after a write",
        "race|nobody has written",
        INDEX
        + """__shared__ float s[256];
        s[threadIdx.x] = x[i];
        @__syncthreads();@@
        y[i] = s[255 - threadIdx.x];""",
        **ONE_BLOCK,
    ),
    Bug(
        "no barrier before a buffer is used again",
        "race",
        INDEX
        + """__shared__ float s[256];
        float sum = 0;
        for (int k = 0; k < 3; k++) {
            s[threadIdx.x] = x[i] * k;
            __syncthreads();
            sum += s[(threadIdx.x + 100) % 256];
            @__syncthreads();@@
        }
        y[i] = sum;""",
        **ONE_BLOCK,
    ),
    Bug(
        "a reduction without barriers between its steps",
        "race",
        INDEX
        + """__shared__ float s[256];
        s[threadIdx.x] = x[i];
        __syncthreads();
        for (int half = 128; half > 0; half /= 2) {
            if (threadIdx.x < half) s[threadIdx.x] += s[threadIdx.x + half];
            @__syncthreads();@@
        }
        @@__syncthreads();@
        y[i] = s[0];""",
        **ONE_BLOCK,
    ),
    Bug(
        "a reduction whose last steps trust the warp",
        "race",
        INDEX
        + """__shared__ float s[32];
        s[threadIdx.x] = x[i];
        __syncwarp();
        for (int half = 16; half > 0; half /= 2) {
            float other = s[(threadIdx.x + half) % 32];
            @__syncwarp();@@
            s[threadIdx.x] += other;
            __syncwarp();
        }
        y[i] = s[threadIdx.x];""",
        x=32,
        y=32,
        grid=(1, 1),
        block=(32, 32),
    ),
    Bug(
        "lanes that exchange without __syncwarp",
        "race|nobody has written",
        INDEX
        + """__shared__ float s[32];
        s[threadIdx.x] = x[i];
        @__syncwarp();@@
        y[i] = s[31 - threadIdx.x];""",
        x=32,
        y=32,
        grid=(1, 1),
        block=(32, 32),
    ),
    Bug(
        "__syncwarp between two warps",
        "race|nobody has written",
        INDEX
        + """__shared__ float s[64];
        s[threadIdx.x] = x[i];
        @__syncthreads()@__syncwarp()@;
        y[i] = s[63 - threadIdx.x];""",
        x=64,
        y=64,
        grid=(1, 1),
        block=(64, 64),
    ),
    Bug(
        "a histogram in shared memory without atomics",
        "race",
        INDEX
        + """__shared__ int bins[8];
        if (threadIdx.x < 8) bins[threadIdx.x] = 0;
        __syncthreads();
        @atomicAdd(&bins[x[i] & 7], 1)@bins[x[i] & 7]++@;
        __syncthreads();
        if (threadIdx.x < 8) y[threadIdx.x] += bins[threadIdx.x];""",
        **COUNT | {"x": 256, "y": 8, "grid": (1, 1)},
    ),
    Bug(
        "a histogram of several blocks without atomics",
        "race.*another block",
        INDEX
        + """
        if (threadIdx.x == 0) @atomicAdd(&y[0], 1)@y[0] += 1@;""",
        **COUNT | {"y": 1},
    ),
    Bug(
        "an update in place that reads neighbours",
        "race",
        INDEX + "y[i] = x[i] + @y[i]@y[(i + 1) % n]@;",
        **ONE_BLOCK | {"parameters": INOUT},
    ),
    Bug(
        "blocks that read what others write",
        "race.*another block",
        INDEX + "y[i] += @x[i]@y[(i + 256) % 1024]@;",
        x=1024,
        y=1024,
        parameters=INOUT,
    ),
    Bug(
        "a value of thread 0 without a barrier",
        "race|nobody has written",
        INDEX
        + """__shared__ float mean;
        if (threadIdx.x == 0) mean = x[0];
        @__syncthreads();@@
        y[i] = x[i] - mean;""",
        **ONE_BLOCK,
    ),
    Bug(
        "the last block reads without a fence",
        "race.*another block",
        INDEX
        + """__shared__ bool last;
        if (threadIdx.x == 0) {
            y[1 + blockIdx.x] = x[blockIdx.x];
            @__threadfence();@@
            last = atomicAdd((unsigned*)y, 1u) == gridDim.x - 1;
        }
        __syncthreads();
        if (last && threadIdx.x == 0) {
            float sum = 0;
            for (int b = 0; b < gridDim.x; b++) sum += y[1 + b];
            y[1 + gridDim.x] = sum;
        }""",
        y=6,
        parameters=INOUT,
    ),
    Bug(
        "a plain read beside atomics",
        "race",
        INDEX
        + """if (threadIdx.x < 64) atomicAdd(&y[0], 1);
        @__syncthreads();@@
        if (threadIdx.x == 64) y[1] = y[0];""",
        **COUNT | ONE_BLOCK | {"y": 2},
    ),
    # Barriers
    Bug(
        "a barrier in a branch",
        "divergent barrier",
        INDEX
        + """if (threadIdx.x < 100) {
            @@__syncthreads();@
        }
        @__syncthreads();@@
        y[i] = x[i];""",
        **ONE_BLOCK,
    ),
    Bug(
        "a return before a barrier",
        "divergent barrier.*232 of 256",
        INDEX
        + """__shared__ float s[256];
        @@if (i >= n) return;@
        s[threadIdx.x] = @i < n ? x[i] : 0@x[i]@;
        __syncthreads();
        if (i < n) y[i] = s[0];""",
    ),
    Bug(
        "a loop with as many barriers as the thread's number",
        "divergent barrier",
        INDEX
        + """for (int k = 0; k < @4@1 + threadIdx.x % 2@; k++)
            __syncthreads();
        y[i] = x[i];""",
        **ONE_BLOCK,
    ),
    # Warp operations
    Bug(
        "a shuffle in a branch",
        "waits in a warp operation for lanes that do not come",
        INDEX
        + """float v = x[i];
        @@if (threadIdx.x % 2) @v += __shfl_xor_sync(0xFFFFFFFFu, v, 2);
        y[i] = v;""",
        **ONE_BLOCK,
    ),
    Bug(
        "a mask without the thread itself",
        "whose mask leaves it out",
        INDEX
        + """float v = x[i];
        if (threadIdx.x % 2) v += __shfl_xor_sync(@0xAAAAAAAAu@0x55555555u@, v, 2);
        y[i] = v;""",
        **ONE_BLOCK,
    ),
    Bug(
        "a shuffle from outside the mask",
        "takes no part in the shuffle",
        INDEX
        + """float v = x[i];
        if (threadIdx.x % 32 < 16) v += __shfl_xor_sync(0xFFFFu, v, @8@16@);
        y[i] = v;""",
        **ONE_BLOCK,
    ),
    Bug(
        "a ballot of lanes that have returned",
        "waits in a warp operation",
        INDEX
        + """@@if (i >= n) return;@
        unsigned votes = __ballot_sync(0xFFFFFFFFu, i < n && x[i < n ? i : 0] > 0);
        if (i < n) y[i] = votes & 1;""",
    ),
    Bug(
        "lanes at different shuffles",
        "different warp operations",
        INDEX
        + """float v = x[i];
        @v += __shfl_xor_sync(0xFFFFFFFFu, v, 1);@if (threadIdx.x % 2) v += __shfl_xor_sync(0xFFFFFFFFu, v, 1);
        else v += __shfl_down_sync(0xFFFFFFFFu, v, 1);@
        y[i] = v;""",
        **ONE_BLOCK,
    ),
    # Outputs
    Bug(
        "an element that nobody writes",
        r"leaves 1 of 256 elements of its output y unwritten.*flat index 7",
        INDEX + "@@if (i != 7) @y[i] = x[i];",
        **ONE_BLOCK,
    ),
    Bug(
        "every second element",
        "leaves 128 of 256 elements of its output y unwritten",
        INDEX + "if (i @< n@% 2@) y[i] = x[i];",
        **ONE_BLOCK,
    ),
    Bug(
        "two blocks write the same elements",
        r"race: thread \d+ writes y\[\d+\]",
        "int i = blockIdx.x * @256@255@ + threadIdx.x;\ny[i] = x[i];\n"
        "@@if (i == 1019) for (int k = 1020; k < n; k++) y[k] = 0;@",
        x=1024,
        y=1024,
    ),
    Bug(
        "two threads write an element",
        r"race: thread \d+ writes y\[0\], which thread \d+ writes",
        INDEX + "y[i] = x[i]; @@if (i == 100) y[0] = 1;@",
        **ONE_BLOCK,
    ),
    # Launch sizes
    Bug("a block too few", "leaves 232 of 1000 elements", INDEX + "if (i < n) y[i] = x[i];", grid=(4, 3)),
    Bug("a block too many", "out of bounds", INDEX + "y[i] = x[i];", x=1024, y=1024, grid=(4, 5)),
    Bug(
        "more threads than shared memory was made for",
        "out of bounds",
        """__shared__ float s[128];
        s[threadIdx.x] = x[threadIdx.x];
        __syncthreads();
        for (int k = threadIdx.x; k < n; k += blockDim.x) y[k] = s[k % blockDim.x];""",
        **ONE_BLOCK | {"block": (128, 256)},
    ),
    Bug(
        "too little dynamic shared memory",
        "dynamic shared memory, byte 1020, which has 1020 bytes",
        """extern __shared__ float s[];
        int i = threadIdx.x;
        s[i] = x[i];
        __syncthreads();
        y[i] = s[255 - i];""",
        **ONE_BLOCK | {"shared": (1024, 1020)},
    ),
    Bug(
        "no dynamic shared memory",
        "out of bounds|null",
        """DYNAMIC_SHARED(float, s);
        int i = threadIdx.x;
        s[i] = x[i];
        __syncthreads();
        y[i] = s[255 - i];""",
        **ONE_BLOCK | {"shared": (1024, 0)},
    ),
    # Asynchronous copies
    Bug(
        "no wait for a copy",
        "before the wait for the cp.async",
        INDEX
        + """__shared__ __align__(16) float s[256];
        if (i < 64) cp_async_16(s + 4 * i, x + 4 * i, true);
        cp_async_commit();
        @cp_async_wait<0>();@@
        __syncthreads();
        y[i] = s[i];""",
        head=ASYNC,
        **ONE_BLOCK,
    ),
    Bug(
        "a wait for all but the group that is read",
        "before the wait for the cp.async",
        INDEX
        + """__shared__ __align__(16) float s[2][256];
        for (int k = 0; k < 2; k++) {
            if (i < 64) cp_async_16(s[k] + 4 * i, x + 4 * i, true);
            cp_async_commit();
        }
        cp_async_wait<@0@1@>();
        __syncthreads();
        y[i] = s[1][i];""",
        head=ASYNC,
        **ONE_BLOCK,
    ),
    Bug(
        "a wait, and no barrier before others read",
        "race|before the wait|nobody has written",
        INDEX
        + """__shared__ __align__(16) float s[256];
        if (i < 64) cp_async_16(s + 4 * i, x + 4 * i, true);
        cp_async_commit();
        cp_async_wait<0>();
        @__syncthreads();@@
        y[i] = s[i];""",
        head=ASYNC,
        **ONE_BLOCK,
    ),
    Bug(
        "a buffer that is still read is filled again",
        "race",
        INDEX
        + """__shared__ __align__(16) float s[256];
        float sum = 0;
        for (int k = 0; k < 2; k++) {
            if (i < 64) cp_async_16(s + 4 * i, x + 4 * i, true);
            cp_async_commit();
            cp_async_wait<0>();
            __syncthreads();
            sum += s[255 - i];
            @__syncthreads();@@
        }
        y[i] = sum;""",
        head=ASYNC,
        **ONE_BLOCK,
    ),
    Bug(
        "a copy from an odd address",
        "cp.async of 16 bytes is not aligned",
        INDEX
        + """__shared__ __align__(16) float s[256];
        if (i < 63) cp_async_16(s + 4 * i, x + 4 * i@@ + 1@, true);
        if (i >= 252) s[i] = 0;
        cp_async_commit();
        cp_async_wait<0>();
        __syncthreads();
        y[i] = s[i];""",
        head=ASYNC,
        **ONE_BLOCK,
    ),
    # Numbers
    Bug(
        "an index that int does not hold",
        r"overflows 'int'",
        INDEX
        + """int rows = 100000;
        @i64@int@ at = (@i64@int@)rows * (rows + (int)blockIdx.x);
        y[i] = x[i] + (at > 0);""",
        **ONE_BLOCK,
    ),
    Bug(
        "a sum that int does not hold",
        r"overflows 'int'",
        INDEX
        + """int sum = 0;
        for (int k = 0; k < 4; k++) sum += @100000000@1000000000@;
        y[i] = x[i] + sum;""",
        **ONE_BLOCK,
    ),
    Bug(
        "a division by zero",
        "divides an integer by zero|/ 0 overflows",
        INDEX + "y[i] = x[n / (i + @1@0@) % n];",
        **ONE_BLOCK,
    ),
    # Memory that nobody wrote
    Bug(
        "a sum in shared memory that does not start at 0",
        "which nobody has written",
        INDEX
        + """__shared__ int sum;
        @if (threadIdx.x == 0) sum = 0;@@
        __syncthreads();
        atomicAdd(&sum, 1);
        __syncthreads();
        y[i] = x[i] + sum;""",
        **ONE_BLOCK,
    ),
    Bug(
        "an output that is read first",
        r"reads y\[\d+\], which nobody has written",
        INDEX + "y[i] @=@+=@ x[i];",
        **ONE_BLOCK,
    ),
    Bug(
        "a part of shared memory that nobody fills",
        "which nobody has written",
        INDEX
        + """__shared__ float s[256];
        if (threadIdx.x < @256@255@) s[threadIdx.x] = x[i];
        __syncthreads();
        y[i] = s[(threadIdx.x + 1) % 256];""",
        **ONE_BLOCK,
    ),
    Bug(
        "shared memory of the block before",
        "which nobody has written",
        INDEX
        + """__shared__ float s[256];
        if (@true@blockIdx.x == 0@) s[threadIdx.x] = x[i];
        __syncthreads();
        y[i] = s[255 - threadIdx.x];""",
        x=1024,
        y=1024,
    ),
    # Barriers of all blocks
    Bug(
        "blocks that do not wait for each other",
        r"race: thread \d+ (reads|writes) y\[\d\], which thread \d+ of another block (reads|writes)",
        OF_BLOCKS.format("@grid_barrier@__syncthreads@();"),
        **BLOCKS,
    ),
    Bug(
        "blocks that do not wait before they write again",
        r"race: thread \d+ (reads|writes) y\[\d\], which thread \d+( of another block)? (reads|writes)",
        OF_BLOCKS.format("grid_barrier();") + "@grid_barrier();@@ if (threadIdx.x == 0) y[blockIdx.x] = total;",
        **BLOCKS,
    ),
    Bug(
        "a block that returns before the others have met it",
        "3 of 4 blocks wait at a grid barrier, the others have returned",
        "@@if (blockIdx.x == 2) return;@" + OF_BLOCKS.format("grid_barrier();"),
        **BLOCKS,
    ),
    Bug(
        "half a block at the grid's barrier",
        "divergent barrier",
        OF_BLOCKS.format("if (threadIdx.x < @256@128@) grid_barrier(); else __syncthreads();"),
        **BLOCKS,
    ),
    Bug(
        "shared memory that only another block has written",
        "dynamic shared memory, byte 4, which nobody has written",
        "DYNAMIC_SHARED(float, s); if (threadIdx.x == 0 && blockIdx.x @>= 0@== 1@) s[1] = 3;"
        + OF_BLOCKS.format("grid_barrier();")
        + "if (threadIdx.x == 7 && s[1] != 3) y[blockIdx.x] = total;",
        **{**BLOCKS, "shared": (8, 8)},
    ),
    Bug(
        "a barrier of all blocks in a launch that does not start them together",
        "calls grid_barrier\\(\\) in a launch that is not cooperative",
        "@grid_barrier@meet@();" + INDEX + "if (i < n) y[i] = x[i];",
        head="__device__ void meet() { grid_barrier(); }\n",
    ),
    # Local memory
    Bug(
        "a recursion without end",
        "needs more than 576 KiB of local memory",
        INDEX + "y[i] = x[i] + depth(1, @n@-n@);",
        **ONE_BLOCK,
        head=DEPTH,
    ),
    Bug(
        "a large local array",
        "KiB of local memory",
        INDEX
        + """volatile float v[@64@300000@];
        v[i % 64] = x[i];
        y[i] = v[i % 64];""",
        **ONE_BLOCK,
    ),
    Bug("an assertion", "fails the assertion i < 255", INDEX + "assert(i < @256@255@); y[i] = x[i];", **ONE_BLOCK),
    Bug(
        "local memory of another thread",
        "local memory of another thread",
        INDEX
        + """__shared__ float* p;
        float v = x[i];
        if (threadIdx.x == 0) p = &v;
        __syncthreads();
        y[i] = @v + (p == nullptr)@*p@;
        __syncthreads();""",
        **ONE_BLOCK,
    ),
]


def run(bug, wrong):
    body = re.sub("@([^@]*)@([^@]*)@", rf"\{1 + wrong}", bug.body)
    text = f'#include "common.cuh"\n{bug.head}extern "C" __global__ void planted({bug.parameters}) {{\n{body}\n}}\n'
    random = np.random.default_rng(0)
    x = (100 * random.standard_normal(bug.x)).astype(bug.dtype)
    y = np.zeros(bug.y, bug.y_dtype)
    args = [x, y, bug.x, None][: bug.parameters.count(",") + 1]
    with source.override({"planted.cu": text}):
        launch(
            Kernel("planted.cu", "planted"), (bug.grid[wrong], 1, 1), (bug.block[wrong], 1, 1), args, bug.shared[wrong]
        )


@pytest.mark.parametrize("bug", BUGS, ids=lambda bug: bug.name)
def test_a_bug_is_caught(bug, order_of_threads):
    with pytest.raises(EmulatorError, match=bug.message):
        run(bug, True)


@pytest.mark.parametrize("bug", BUGS, ids=lambda bug: bug.name)
def test_its_twin_is_not_accused(bug, order_of_threads):
    run(bug, False)


def test_there_are_many():
    assert len({bug.name for bug in BUGS}) == len(BUGS) >= 40
