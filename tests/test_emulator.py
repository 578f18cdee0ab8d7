"""What the emulator's threads do, and that its functions are CUDA's.

What it looks for in kernels is in planted_bugs/, what it takes and refuses in test_dialect.py.
"""

import ctypes
import re
from pathlib import Path

import numpy as np
import pytest
from emulated import COPY, THREADS, run

from cupy_kernels import emulator, nvrtc, source
from cupy_kernels.errors import BackendError, EmulatorError, KernelCompileError
from cupy_kernels.source import Kernel, Variant

pytestmark = pytest.mark.usefixtures("ascending_order")

SEEDS = range(4)


@pytest.mark.parametrize(("index", "place"), [("threadIdx.x + 1", 64), ("(int)threadIdx.x - 1", -1)])
def test_a_launch_that_fails_writes_nothing(x, y, index, place):
    text = f'extern "C" __global__ void copy(const float* x, float* y) {{ y[{index}] = x[threadIdx.x]; }}'
    with pytest.raises(EmulatorError, match=rf"planted\.cu:1: thread \d+ writes out of bounds: y\[{place}\]"):
        run(text, x, y)
    assert not y.any()


@pytest.mark.parametrize("statement", ["y[FAR] = x[threadIdx.x];", "y[threadIdx.x] = x[FAR];"])
def test_far_out_of_bounds(x, y, statement):
    """The process goes on."""
    text = f'extern "C" __global__ void copy(const float* x, float* y) {{ {statement} }}'
    for _ in range(2):
        with pytest.raises(EmulatorError, match=r"thread 0 (reads|writes) far out of bounds, at 0x\w+ \(block 0,0,0\)"):
            run(text, x, y, defines=(("FAR", "100000000000ll"),))
    assert not y.any()
    run(text, x, y, defines=(("FAR", "threadIdx.x"),))
    assert (x == y).all()


ASYNC = """#include "common.cuh"
#include "async_copy.cuh"
extern "C" __global__ void copy(const float* x, float* y, int valid) {
    __shared__ float copied[2][64];
    int t = threadIdx.x;
    for (int half = 0; half < 2; half++) {
        if (t < 16) cp_async_16(&copied[half][4 * t], x + 4 * t + OFFSET, t < valid);
        cp_async_commit();
    }
    WAIT;
    __syncthreads();
    y[t] = copied[HALF][t];
}"""


def asynchronous(wait, half=0, offset=0):
    return (("WAIT", wait), ("HALF", half), ("OFFSET", offset))


def test_async_copy(x, y):
    run(ASYNC, x, y, 10, defines=asynchronous("cp_async_wait<0>()", half=1))
    assert (y[:40] == x[:40]).all()
    assert not y[40:].any()  # not valid: zeros
    run(ASYNC, x, y, 16, defines=asynchronous("cp_async_wait<1>()", half=0))
    assert (y == x).all()


def test_shuffles(x, y):
    text = """extern "C" __global__ void shuffle(const float* x, float* y) {
        float v = x[threadIdx.x];
        float left = __shfl_sync(0xFFFFFFFFu, v, threadIdx.x + 31);
        float across = __shfl_xor_sync(0xFFFFFFFFu, v, 5);
        y[threadIdx.x] = left - across + 2 * __shfl_down_sync(0xFFFFFFFFu, v, 3);
    }"""
    run(text, x, y)
    warp, lane = np.arange(THREADS) // 32 * 32, np.arange(THREADS) % 32
    down = x[warp + np.where(lane + 3 < 32, lane + 3, lane)]
    np.testing.assert_allclose(y, x[warp + (lane + 31) % 32] - x[warp + (lane ^ 5)] + 2 * down, rtol=1e-6)


def test_block_sum(monkeypatch, x):
    text = """#include "common.cuh"
        extern "C" __global__ void sum(const float* x, float* y) {
            __shared__ float scratch[32];
            float first = block_sum(x[threadIdx.x], scratch);
            y[threadIdx.x] = block_sum(first / 64, scratch);
        }"""
    results = []
    for seed in SEEDS:
        monkeypatch.setenv("CUPY_KERNELS_SEED", str(seed))
        results.append(np.zeros(THREADS, np.float32))
        run(text, x, results[-1])
    np.testing.assert_allclose(results[0], np.full(THREADS, x.sum()), rtol=1e-5)
    assert all((r == results[0]).all() for r in results)


RACE = """#include "common.cuh"
extern "C" __global__ void sum(const float* x, INOUT float* y) { y[0] += x[threadIdx.x]; }"""


@pytest.mark.parametrize(
    "setting", [{}, {"CUPY_KERNELS_SEED": "3"}, {"CUPY_KERNELS_TIMEOUT": "60"}, {"PYTHONOPTIMIZE": "2", "NDEBUG": "1"}]
)
def test_every_launch_is_under_the_race_detector(monkeypatch, x, y, setting):
    """Nothing switches it off, neither for the suite nor for a cell of %%cu."""
    for name, value in setting.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(EmulatorError, match="race"):
        run(RACE, x, y)
    kernel = Kernel("tanh.cu", "tanh_forward", (("scalar_t", "float"), ("acc_t", "float"), ("WIDTH", 1)))
    assert b"__tsan_read4" in Path(emulator.backend.compiled(kernel)._name).read_bytes()
    assert "getenv" not in emulator._text("runtime.cpp")


TYPES = [sign + kind for kind in ("char", "short", "int", "long", "long long") for sign in ("", "unsigned ")]

TYPES += ["void", "bool", "signed char", "float", "double"]


def overloads():
    """Calls of every function of mathematics that cuda.h has, and of others that CUDA has for some types alone."""
    header = emulator._text("cuda.h")
    one = re.findall(r"EMULATOR_(?:OF_1|FLOAT|CLASS|FOR_FLOAT_1)\((?:[^()]*, )?(\w+)\)", header)
    two = re.findall(r"EMULATOR_(?:OF_2|WITH)\((?:[^()]*, )?(\w+)\)", header)
    assert {"sqrt", "lrint", "isnan"} < set(one)
    assert {"fmod", "ldexp"} < set(two)
    one, two = {*one, "abs", "labs", "llabs", "rsqrt", "rsqrtf"}, {*two, "min", "max", "fminf", "powf"}
    calls = [f"{name}(A())" for name in sorted(one - {"name"})]
    calls += [f"{name}(A(), B())" for name in sorted(two - {"name", "frexp", "modf"})]
    calls += [
        "fma(A(), B(), 1.0f)",
        "fma(1.0, A(), B())",
        "frexp(A(), (B*)0)",
        "modf(A(), (B*)0)",
        "__ldg((const A*)0)",
    ]
    calls += [f"__shfl_{kind}sync(1u, A(), 0)" for kind in ("", "xor_", "down_")]
    calls += [f"__{name}(A())" for name in ("popc", "ffs", "float_as_int", "uint_as_float", "double_as_longlong")]
    return calls


def probes():
    """(text that gives each call's result, for each of TYPES, a number; [(call and types, its constant)])"""
    text = ["template <class T> struct Code { static constexpr int value = -1; };"]
    text += [
        f"template <> struct Code<{name}> {{ static constexpr int value = {i}; }};" for i, name in enumerate(TYPES, 1)
    ]
    constants = []
    for i, call in enumerate(overloads()):
        text += [
            f"template <class A, class B> __device__ auto probe_{i}(int) -> Code<decltype({call})>;",
            f"template <class, class> __device__ Code<void> probe_{i}(...);",
        ]
        for a in TYPES:
            for b in TYPES if "B" in call else ["int"]:
                constants.append((f"{call}, A = {a}, B = {b}", f"decltype(probe_{i}<{a}, {b}>(0))::value"))
    return "\n".join(text), constants


@pytest.mark.parametrize("least_major", [11, nvrtc.WGMMA_MAJOR])
def test_functions_take_and_return_the_types_that_cudas_do(least_major):
    """Or are ambiguous, as there: max(x, 0) of a float x, sqrt of an int."""
    try:
        nvrtc.shared_library(least_major)
    except BackendError as error:
        pytest.skip(str(error))
    text, constants = probes()
    table = ",\n".join(constant for _, constant in constants)
    kernel = 'extern "C" __global__ void codes(int* y) { BODY }'
    codes = np.zeros(len(constants), np.int32)
    read = "static const int table[] = {" + table + "}; y[blockIdx.x] = table[blockIdx.x];"
    run(text + kernel.replace("BODY", read), codes, grid=len(codes), block=1)
    found = dict(zip((name for name, _ in constants), codes))
    assert found["max(A(), B()), A = float, B = float"] == 1 + TYPES.index("float")
    assert found["max(A(), B()), A = float, B = int"] == 1 + TYPES.index("void")
    checks = [f'static_assert({c} == {code}, "{name}");' for (name, c), code in zip(constants, codes)]
    with source.override({"planted.cu": "\n".join([text, *checks, kernel.replace("BODY", "y[0] = 0;")])}):
        nvrtc.compile_variant(Variant("planted.cu"), "sm_80", least_major)


@pytest.mark.parametrize(
    ("call", "expected"),
    [
        ("max(x, 0.5f)", 0.75),
        ("max(x, 0.5)", 0.75),
        ("min(x, 0.5f)", 0.5),
        ("max(nan, 0.5f)", 0.5),
        ("max(0.5f, nan)", 0.5),
        ("min(nan, 0.5)", 0.5),
        ("min(0.5, nan)", 0.5),
        ("max(-1, 1u)", 2**32),
        ("min(1ull, -1ll)", 1),
        ("max((char)3, (short)-4)", 3),
        ("max(1ll << 40, 2ll)", 2**40),
        ("abs(-x)", 0.75),
        ("abs(-(1ll << 40))", 2**40),
        ("rsqrt(x / 3)", 2),
        ("copysign(x, -1.0)", -0.75),
        ("pow(-2.0f, 3.0f)", -8),
        ("isnan(nan) + isinf(1 / (x - x)) + signbit(-x)", 3),
        ("ldexp(x, 2)", 3),
    ],
)
def test_values_of_overloads(call, expected):
    """NaN loses: max of floats is CUDA's fmaxf."""
    text = f"""extern "C" __global__ void compute(float* y, float x, float nan) {{ y[0] = {call}; }}"""
    y = np.zeros(1, np.float32)
    run(text, y, 0.75, float("nan"), block=1)
    assert y == expected


def test_a_float_beside_an_integer_is_ambiguous(x, y):
    text = """extern "C" __global__ void relu(const float* x, float* y) { y[threadIdx.x] = max(x[threadIdx.x], 0); }"""
    with pytest.raises(KernelCompileError, match=r"planted\.cu.*max.*ambiguous"):
        run(text, x, y)
    run(text.replace(", 0)", ", 0.0f)"), x, y)
    assert (y == np.maximum(x, 0)).all()


@pytest.mark.skipif(not emulator._fills_locals(), reason="gcc 12 and clang 16 can")
@pytest.mark.filterwarnings("ignore:.* may be read before it is set")
@pytest.mark.parametrize(
    ("unset", "set_", "body"),
    [
        ("float v;", "float v = 0;", "for (int i = 0; i < 4; i++) v += x[i];"),
        ("float v;", "float v = 0;", "if (x[t] > 0) v = x[t];"),
        ("float s[4], v;", "float s[4] = {}, v;", "s[t % 3] = x[t]; v = s[3];"),
        ("float2 s; float v;", "float2 s = {}; float v;", "s.x = x[t]; v = s.y;"),
        ("int s[4], v;", "int s[4] = {}, v;", "for (int i = 0; i < 8; i++) s[i % 4]++; v = s[t % 4];"),
        ("float v;", "float v = x[t];", "for (int i = t; i < 8; i++) v = fmaxf(v, x[i] - 9);"),
    ],
)
def test_a_local_variable_that_nobody_sets(x, y, unset, set_, body):
    """Is one number in one run and another one in the next; where the results differ, it is an error."""
    text = (
        'extern "C" __global__ void f(const float* x, float* y) { int t = threadIdx.x; DECLARED BODY y[t] = v; }'
    ).replace("BODY", body)
    x[0] = -1
    run(text.replace("DECLARED", set_), x, y)
    with pytest.raises(EmulatorError, match=r":1: a local variable that nobody has set goes into y\[\d+\]"):
        run(text.replace("DECLARED", unset), x, y)


@pytest.mark.parametrize("byte", [b"\xfe", b"\xaa", b"\xff"])
def test_numbers_that_are_like_local_variables_that_nobody_sets(x, byte):
    """Compilers fill these with such bytes."""
    y = np.zeros(THREADS, np.uint32)
    x[:] = np.frombuffer(byte * 4, np.float32)
    run(
        """extern "C" __global__ void f(const unsigned* x, unsigned* y) {
        unsigned v[2];
        v[threadIdx.x % 2] = x[threadIdx.x];
        y[threadIdx.x] = v[threadIdx.x % 2];
    }""",
        x.view(np.uint32),
        y,
    )
    assert (y == x.view(np.uint32)).all()


def test_each_run_of_a_launch_measures_the_same_time(x, y):
    run(
        COPY.replace("{ ", "{ float s[4]; long long t = clock64(); s[t % 4] = 1; ").replace(
            "= x", "= clock64() - t + x"
        ),
        x,
        y,
    )
    assert (y > x).all()


@pytest.mark.skipif(not emulator._fills_locals(), reason="gcc 12 and clang 16 can")
@pytest.mark.filterwarnings("ignore:.* may be read before it is set")
@pytest.mark.parametrize("kind", ["half_t", "bf16_t"])
def test_a_half_that_nobody_sets(x, kind):
    text = f"""#include "common.cuh"
        extern "C" __global__ void f(const float* x, {kind}* y) {{
            {kind} v;
            if (x[threadIdx.x] > 0) v = from_acc<{kind}>(x[threadIdx.x]);
            y[threadIdx.x] = v;
        }}"""
    y = np.zeros(THREADS, np.float16 if kind == "half_t" else np.int16)
    run(text, abs(x) + 1, y)
    x[3] = -1
    with pytest.raises(EmulatorError, match=r":5: a local variable that nobody has set goes into y\[\d+\]"):
        run(text, x, y)


def test_a_launch_that_fails_leaves_device_variables_as_they_were(x, y):
    """A lock that it holds would hold for ever."""
    text = """__device__ int count = 5;
        extern "C" __global__ void f(const float* x, float* y, int wrong) {
            if (threadIdx.x == 0) count++;
            __syncthreads();
            y[threadIdx.x + wrong] = count;
        }"""
    with pytest.raises(EmulatorError, match="out of bounds"):
        run(text, x, y, 1)
    run(text, x, y, 0)
    assert (y == 6).all()


@pytest.mark.parametrize(
    "body",
    [
        "float best;\nfor (int k = 0; k < 3; k++) if (x[k] > best) best = x[k];\ny[threadIdx.x] = best;",
        "float best;\ny[threadIdx.x] = x[threadIdx.x] > best;",
        "int best;\ny[threadIdx.x] = best > 3;",
        "float best;\nfor (int k = threadIdx.x; k < 64; k++) best = fmaxf(best, x[k]); y[threadIdx.x] = best;",
        "\nfloat best; for (int k = threadIdx.x; k < 64; k++) best = fmaxf(best, x[k]); "
        "y[threadIdx.x] = __shfl_sync(~0u, best, 0);",
    ],
)
def test_a_warning_of_a_local_variable_that_nobody_sets(body, tmp_path, monkeypatch):
    """With the line of the text; also when the library comes from the cache."""
    monkeypatch.setenv("CUPY_KERNELS_CACHE_DIR", str(tmp_path))
    with source.override({"unset.cu": f'extern "C" __global__ void f(const float* x, float* y) {{ {body} }}'}):
        for _ in range(2):
            with pytest.warns(UserWarning, match="^best may be read before it is set$") as found:
                emulator.Emulator().compiled(Kernel("unset.cu", "f"))
            assert [(said.filename, said.lineno) for said in found] == [("unset.cu", 2)]


def test_a_text_with_local_arrays_runs_twice_and_prints_once(capfd, x, y):
    run(
        'extern "C" __global__ void k(const float* x, float* y) { float v[4]; for (int i = 0; i < 4; i++) v[i] = x[i];'
        ' if (threadIdx.x == 7) printf("thread %d", threadIdx.x); y[threadIdx.x] = v[threadIdx.x % 4]; }',
        x,
        y,
    )
    ctypes.CDLL(None).fflush(None)
    assert capfd.readouterr().out == "thread 7"


def test_global_variables_live_on_beside_local_arrays(x, y):
    text = """__device__ int launches;
    extern "C" __global__ void k(const float* x, float* y) {
        float v[4];
        for (int i = 0; i < 4; i++) v[i] = i;
        if (threadIdx.x == 0) launches++;
        __syncthreads();
        y[threadIdx.x] = v[launches - BEHIND];
    }"""
    for k in range(3):
        run(text, x, y, defines=(("BEHIND", "0"),))
        assert (y == k + 1).all()
    with pytest.raises(EmulatorError, match=r"reads out of bounds: v\[4\]"):
        run(text, x, y, defines=(("BEHIND", "0"),))
