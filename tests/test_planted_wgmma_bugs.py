"""Kernels with one bug each around wgmma, and their right twins, as in test_planted_bugs.py."""

import numpy as np
import pytest
from test_planted_bugs import ASYNC, BUGS, Bug, run

from cupy_kernels.errors import EmulatorError

# Sums of 64 x 8 products of 16 terms: 16 halves of 64 rows of a, then of 8 columns of b.
WGMMA = {
    "x": 1152,
    "y": 512,
    "grid": (1, 1),
    "block": (128, 128),
    "dtype": np.float16,
    "parameters": "const half_t* x, float* y, int n",
    "head": '#include "wgmma.cuh"\n',
}
OPERANDS = """__shared__ __align__(128) u8 s[2304];
        int t = threadIdx.x;
        for (int i = t; i < n; i += 128) ((half_t*)s)[i] = x[i];
        WgmmaOperand a(s, 1024, 128), b(s + 2048, 128, 128);
        float d[1][4] = {};
        """
READY = "fence_async_proxy();\n__syncthreads();\nwgmma_fence();\n"
STORE = "\nfor (int c = 0; c < 4; c++) y[4 * t + c] = d[0][c];"

WGMMA_BUGS = [
    Bug(
        "sums are read before the wait",
        r"planted\.cu:\d+: thread \d+ reads sums before the wait for their wgmma at planted\.cu:12",
        OPERANDS + READY + "wgmma<1>(d, a, b);\nwgmma_commit();\n@wgmma_wait<0>();@@" + STORE,
        **WGMMA,
    ),
    Bug(
        "a wait that leaves the group in flight",
        "reads sums before the wait",
        OPERANDS + READY + "wgmma<1>(d, a, b);\nwgmma_commit();\nwgmma_wait<@0@1@>();" + STORE,
        **WGMMA,
    ),
    Bug(
        "a wait without a commit",
        "reads sums before the wait",
        OPERANDS + READY + "wgmma<1>(d, a, b);\n@wgmma_commit();@@\nwgmma_wait<0>();" + STORE,
        **WGMMA,
    ),
    Bug(
        "sums are written before the wait",
        "writes sums before the wait",
        OPERANDS
        + READY
        + "wgmma<1>(d, a, b);\nwgmma_commit();\n@@d[0][0] = 1;@\nwgmma_wait<0>();\n@d[0][0] = 1;@@"
        + STORE,
        **WGMMA,
    ),
    Bug(
        "an operand is overwritten in flight",
        r"byte 0, which is written before the wait for that \(by thread \d at planted\.cu:16\); y\[0\] comes of it",
        OPERANDS
        + READY
        + "wgmma<1>(d, a, b);\nwgmma_commit();\n@wgmma_wait<0>();@@\n__syncthreads();\n"
        + "((half_t*)s)[t] = half_t();\n@@wgmma_wait<0>();@"
        + STORE,
        **WGMMA,
    ),
    Bug(
        "a copy fills an operand in flight",
        "byte 2048, which is written before the wait for that",
        OPERANDS
        + READY
        + "wgmma<1>(d, a, b);\nwgmma_commit();\n@wgmma_wait<0>();@@\n__syncthreads();\n"
        + "if (t == 127) cp_async_16(s + 2048, x, true), cp_async_commit();\n@@wgmma_wait<0>();@\n"
        + "cp_async_wait<0>();"
        + STORE,
        **WGMMA | {"head": WGMMA["head"] + ASYNC},
    ),
    Bug(
        "no wgmma_fence before the first wgmma",
        r"no wgmma_fence\(\) came after that",
        OPERANDS
        + "fence_async_proxy();\n__syncthreads();\n@wgmma_fence();@@\n"
        + "wgmma<1>(d, a, b);\nwgmma_commit();\nwgmma_wait<0>();"
        + STORE,
        **WGMMA,
    ),
    Bug(
        "no wgmma_fence after sums were used",
        r"thread \d+ used the sums of this wgmma, and no wgmma_fence\(\) came after that",
        OPERANDS
        + "fence_async_proxy();\n__syncthreads();\n@@wgmma_fence();@"
        + """for (int k = 0; k < 2; k++) {
            @wgmma_fence();@@
            wgmma<1>(d, a, b);
            wgmma_commit();
            wgmma_wait<0>();
            d[0][1] *= 2;
        }"""
        + STORE,
        **WGMMA,
    ),
    Bug(
        "no fence_async_proxy after a write",
        r"which is written with no fence_async_proxy\(\) after that",
        OPERANDS
        + "@@fence_async_proxy();@\n((half_t*)s)[t] = x[t + 1];\n@fence_async_proxy();@@\n__syncthreads();\n"
        + "wgmma_fence();\nwgmma<1>(d, a, b);\nwgmma_commit();\nwgmma_wait<0>();"
        + STORE,
        **WGMMA,
    ),
    Bug(
        "no barrier before wgmma",
        "which nobody has written|which is written with no barrier before that",
        OPERANDS
        + "fence_async_proxy();\n@__syncthreads();@@\nwgmma_fence();\n"
        + "wgmma<1>(d, a, b);\nwgmma_commit();\nwgmma_wait<0>();"
        + STORE,
        **WGMMA,
    ),
    Bug(
        "a warp leaves its warpgroup alone",
        r"thread \d+ waits for a wgmma that not all warps of its warpgroup issue",
        OPERANDS + READY + "if (t < @128@96@) wgmma<1>(d, a, b);\nwgmma_commit();\nwgmma_wait<0>();" + STORE,
        **WGMMA,
    ),
    Bug(
        "lanes multiply different operands",
        "lanes of warp 0 issue different wgmma",
        OPERANDS + READY + "wgmma<1>(d, a, @b@t == 5 ? a : b@);\nwgmma_commit();\nwgmma_wait<0>();" + STORE,
        **WGMMA,
    ),
    Bug(
        "a's registers change before the wait",
        "changes the registers of a before the wait",
        """__shared__ __align__(1024) u8 s[2048];
        int t = threadIdx.x;
        for (int i = t; i < 1024; i += 128) ((half_t*)s)[i] = x[i];
        float d[1][4] = {};
        unsigned a[4] = {x[t].bits, x[t + 1].bits, x[t + 2].bits, x[t + 3].bits};
        """
        + READY
        + "wgmma<1>(d, a, WgmmaLines(s, 0));\nwgmma_commit();\n@@a[3] += n;@\nwgmma_wait<0>();"
        + STORE,
        **WGMMA,
    ),
]


@pytest.mark.parametrize("bug", WGMMA_BUGS, ids=lambda bug: bug.name)
def test_a_bug_is_caught(bug, order_of_threads):
    with pytest.raises(EmulatorError, match=bug.message):
        run(bug, True)


@pytest.mark.parametrize("bug", WGMMA_BUGS, ids=lambda bug: bug.name)
def test_its_twin_is_not_accused(bug, order_of_threads):
    run(bug, False)


def test_names():
    assert len({bug.name for bug in (*BUGS, *WGMMA_BUGS)}) == len(BUGS) + len(WGMMA_BUGS)
