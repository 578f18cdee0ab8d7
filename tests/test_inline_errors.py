"""Errors as a user of inline operators reads them: the line of the text, and nothing of the emulator's own files."""

import re

import pytest
import torch

from cupy_kernels import nvrtc
from cupy_kernels.emulator import messages
from cupy_kernels.errors import BackendError, EmulatorError, KernelCompileError
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


def test_a_grid_that_follows_another_tensor():
    """The first tensor that the kernel writes is a flag."""
    text = TEXT.replace("scalar_t* y", "INOUT int* flag, scalar_t* y").replace("STATEMENT", "y[i] = x[i];")
    x, flag = torch.ones(1000), torch.zeros(1, dtype=torch.int32)
    options = {"shapes": {"flag": None}, "sizes": {"size": lambda x, flag: x.numel()}}
    message = r"744 of 1000 .* y unwritten.*\. 1 block of 256 threads ran: size is that of flag; grid= sets another$"
    with pytest.raises(EmulatorError, match=message):
        operator(text, "f", **options)(x, flag)
    assert (operator(text, "f", **options, grid=lambda x, flag: 4)(x, flag)[1] == 1).all()
    with pytest.raises(EmulatorError, match=r"flat index 512$"):
        operator(text, "f", **options, grid=lambda x, flag: 2)(x, flag)


def test_a_launch_that_fails():
    function = operator(TEXT.replace("STATEMENT", "atomicAdd((float*)&y[i], 1.0f);"), "f")
    with pytest.raises(EmulatorError, match=r"reads y\[\d\], which nobody has written.* declare it INOUT") as error:
        function(torch.ones(3))
    assert not re.search(INTERNAL, str(error.value))


@pytest.mark.parametrize(
    ("statement", "message"),
    [
        ("cp_async_16(shared, x + 1, true);", "a cp.async of 16 bytes is not aligned"),
        (
            "y[i] = from_acc<scalar_t>(block_sum(to_acc(x[i]), shared));",
            r"out of bounds: shared\[\d\], which has 4 elements",
        ),
        ("if (i < 32) y[i] = from_acc<scalar_t>(block_sum(to_acc(x[i]), shared + 2));", "divergent barrier"),
        ("if (i < 16) y[i] = from_acc<scalar_t>(warp_sum(to_acc(x[i])));", "waits in a warp operation"),
        ("y[i] = __ldg(x + i + 1);", r"reads out of bounds: x\[\d+\]"),
        ("sincosf(1, &shared[0], &shared[1]);", "race"),
        ("atomicAdd(shared + i % 8, 1.0f);", "out of bounds: shared|nobody has written"),
        ("y[i] = __shfl_sync(0xFFFFu, x[i], 20);", "leaves it out|takes no part"),
        ("y[i] = x[1 / (int)(i - i)];", "divides an integer by zero"),
        ("y[i] = ((int*)x)[i] % ((int)i - 3);", "divides an integer by zero"),
        ("*(float4*)(y + i) = make_float4(1, 2, 3, 4);", "multiple of 16 bytes"),
    ],
)
def test_a_launch_that_fails_names_the_line_of_the_user(statement, message):
    """Not that of the function of ours, or of CUDA, that is called there."""
    head = '#include "common.cuh"\n#include "async_copy.cuh"'
    text = TEXT.replace('#include "common.cuh"', head).replace("if (i >= size) return;", "__shared__ float shared[4];")
    function = operator(text.replace("STATEMENT", statement), "f")
    with pytest.raises(
        EmulatorError, match=rf"(: |waits? at ){function.declared.file}:6\b.*({message})|({message}).*:6\b"
    ):
        function(torch.ones(256))


@pytest.mark.parametrize(
    ("statement", "hint"),
    [
        ("y[i] = INFINITY;", r"INFINITY: write 1\.0f / 0\.0f"),
        ("int64_t n = i;", "int64_t: write int, unsigned, long long, or i64"),
        ("y[i] = FLT_MAX;", "FLT_MAX: write the number"),
        ('asm("membar.gl;"); y[i] = 1;', "asm: the emulator has no PTX"),
        ("half h;", "half: half_t and bf16_t of common.cuh"),
        ("y[i] = std::max(x[i], x[i]);", "std: functions such as max, .* without std::"),
        ("y[i] = max(to_acc(x[i]), 0);", "a call is ambiguous: write 0.0f"),
        ("y[i] = sqrt(i);", r"a call is ambiguous: .*\(float\)i for an integer in sqrt\(i\)"),
        ('std::cout << "x";', "cout: print by printf"),
        ("std::vector<float> v;", r"std: .* for a container take a local .*\[8\]"),
        (
            "half_t h = {}; y[i] = h * 2;",
            r"half_t is a type of memory: compute with to_acc\(v\), and store from_acc<half_t>",
        ),
        ("bf16_t h = {}; float v = h;", "bf16_t is a type of memory"),
        ("y[i] = __shfl_xor(x[i], 1);", "__shfl_xor: those of today have a mask"),
        ("y[i] = from_acc<int>(to_acc(x[i]));", r"'from_acc' is declared.*\nfrom_acc: from_acc<T> gives float, double"),
        ("float* p = new float[4];", "'new' is not there in kernels"),
        ("__shared__ float s[20000]; y[i] = s[i] = x[i];", "have 80000 bytes; a GPU takes 49152 bytes at most"),
    ],
)
def test_the_way_out_is_in_the_message(statement, hint):
    with pytest.raises(KernelCompileError, match=hint) as error:
        operator(TEXT.replace("STATEMENT", statement), "f")(torch.ones(3))
    assert "did you forget to" not in str(error.value)


@pytest.mark.parametrize(
    ("parameters", "name"), [("const float* x, float* y, i64 n", "i64"), ("float* y, INOUT float* x, int n", "INOUT")]
)
def test_what_common_cuh_declares(parameters, name):
    function = operator(f'extern "C" __global__ void f({parameters}) {{ }}', "f", sizes={"n": len})
    with pytest.raises(KernelCompileError, match=f'\n{name}: #include "common.cuh" declares it'):
        function(torch.ones(3))


@pytest.mark.parametrize("header", ["<cuda_fp16.h>", '"cuda_fp16.h"', "<cmath>", '"cooperative_groups.h"', "<thrust>"])
def test_headers(header):
    with pytest.raises(ValueError, match=r"f_\w+\.cu:1: kernels include no header, received \S+: \w+"):
        operator(f"#include {header}\n{TEXT}".replace("STATEMENT", ""), "f")


@pytest.mark.parametrize(
    ("kind", "hint"),
    [
        ("size_t", "i64"),
        ("unsigned long*", "unsigned long long"),
        ("int16_t*", "int"),
        ("char*", "signed char"),
        ("__half*", "half_t or bf16_t"),
        ("int2", "2 numbers of type int"),
        ("ulonglong2", "2 numbers of type unsigned long long"),
    ],
)
def test_a_type_that_no_argument_has(kind, hint):
    text = f'extern "C" __global__ void f(const float* x, float* y, const {kind} z) {{}}'
    declared = re.escape(f"f: z is declared const {kind}; types are scalar_t, ")
    with pytest.raises(ValueError, match=rf"^{declared}.*, unsigned long long\. Take {hint}$"):
        operator(text, "f")
    with pytest.raises(ValueError, match=r"z is declared const Pair; .* unsigned long long$"):
        operator(text.replace(kind, "Pair"), "f")


@pytest.mark.parametrize(
    ("vector", "kind", "dtype"),
    [
        ("float4", "float", torch.float32),
        ("float3", "float", torch.float32),
        ("double2", "double", torch.float64),
        ("int4", "int", torch.int32),
        ("uint2", "unsigned", torch.uint32),
        ("uchar4", "u8", torch.uint8),
        ("char2", "signed char", torch.int8),
        ("longlong2", "i64", torch.int64),
    ],
)
def test_an_array_of_vectors(vector, kind, dtype):
    """What the hint says works: in the emulator, and with NVRTC, which checks the text there."""
    text = """#include "common.cuh"
    extern "C" __global__ void f(const TYPE* x, TYPE* y, i64 size) {
        i64 i = (i64)blockIdx.x * blockDim.x + threadIdx.x;
        if (i < size / COUNT) BODY;
    }""".replace("COUNT", vector[-1])
    with pytest.raises(
        ValueError, match=rf"x is declared const {vector}\*; types .*\. Take {kind}\*, and cast"
    ) as error:
        operator(text.replace("TYPE", vector).replace("BODY", "y[i] = x[i]"), "f")
    assert f"There are size / {vector[-1]} of these: pass lengths that are multiples of {vector[-1]}" in str(
        error.value
    )
    cast = f"reinterpret_cast<{vector}*>(y)[i]"
    assert cast in str(error.value)
    body = f"{cast} = reinterpret_cast<const {vector}*>(x)[i]"
    assert f"<const {vector}*>" in str(error.value)
    x = torch.arange(24, dtype=torch.int32).to(dtype)
    assert operator(text.replace("TYPE", kind).replace("BODY", body), "f")(x).tolist() == x.tolist()


@pytest.mark.parametrize(
    ("function", "statement", "hint"),
    [
        ("float g(float v) { return v; }", "y[i] = g(1);", "write __device__ in front of each function"),
        ("struct S { float a; constexpr S(float v) : a(v) {} };", "y[i] = S(1).a;", "constructor.*also where it is"),
        ("", "auto g = [](auto v) { return v; }; y[i] = g(1.0f);", "with types in place of auto"),
        ("", "auto g = [] __device__ (float v) { return v; }; y[i] = g(1);", "A lambda takes no __device__"),
        ("constexpr auto g = [](float v) { return v; };", "y[i] = g(1);", "write it inside a function"),
        ("float k = 1;", "y[i] = k;", "write __constant__ in front of a variable"),
    ],
)
def test_a_function_for_the_host(function, statement, hint):
    try:
        nvrtc.shared_library()
    except BackendError:
        pytest.skip("no NVRTC")
    text = TEXT.replace("scalar_t", "float").replace('extern "C"', f'{function}\nextern "C"')
    with pytest.raises(KernelCompileError, match=rf"error: .*\n +\d+ \| .*\n.*{hint}"):
        operator(text.replace("STATEMENT", statement), "f")(torch.ones(3))


@pytest.mark.parametrize(
    ("function", "statement"),
    [
        ("__device__ float g(float v) { return v; }", "y[i] = g(1);"),
        ("struct S { float a; __device__ constexpr S(float v) : a(v) {} };", "y[i] = S(1).a;"),
        ("struct G { template <class T> __device__ T operator()(T v) { return v; } };", "G g; y[i] = g(1.0f);"),
        ("", "auto g = [&](float v) { return v; }; y[i] = g(1);"),
        ("__constant__ float k = 1;", "y[i] = k;"),
        ("constexpr float k = 1;", "y[i] = k;"),
        ("", "float s[8]; s[i] = max(abs(-1.0f), sqrt(1.0f)); y[i] = s[i];"),
        ("", "__shared__ float s[8]; s[i] = 1; y[i] = s[i];"),
    ],
)
def test_what_these_hints_say_works(function, statement):
    text = TEXT.replace("scalar_t", "float").replace('extern "C"', f'{function}\nextern "C"')
    assert operator(text.replace("STATEMENT", statement), "f")(torch.ones(3)).tolist() == [1, 1, 1]


def test_an_access_of_four_floats_from_a_view():
    text = TEXT.replace("scalar_t", "float")
    copy = "if (i % 4 == 0) *(float4*)(y + i) = *(const float4*)(x + i + OFFSET);".replace
    x = torch.arange(13.0)
    with pytest.raises(EmulatorError, match=r"not a multiple of 16 bytes: x\[\d+\] .*x itself begins at such a place"):
        operator(text.replace("STATEMENT", copy("OFFSET", "0")), "f")(x[1:])
    with pytest.raises(
        EmulatorError, match=r"not a multiple of 16 bytes: x\[\d+\] \(block 0,0,0\)\n    5 \|     if \(i % 4"
    ):
        operator(text.replace("STATEMENT", copy("OFFSET", "1")), "f")(x[:12])
    aligned = operator(text.replace("STATEMENT", copy("OFFSET", "0")), "f")
    assert torch.equal(aligned(x[1:].clone()), x[1:])


def test_an_input_without_const():
    text = TEXT.replace("const scalar_t* x, scalar_t* y", "float* x, float* y").replace("STATEMENT", "y[i] = x[i];")
    with pytest.raises(ValueError, match=r"without const are outputs: x, y\. An input has const .* const float\* x"):
        operator(text, "f")


@pytest.mark.parametrize(
    ("text", "received"),
    [
        ("__global__ void f(float* y) {}", r"__global__ void f\(float\* y\) {}"),
        ('extern "C" __global__ void g(float* y) { }\n__device__ void f(float* y) {}', r"__device__ void f\(.*"),
        ("\nkernel.cu", r"kernel\.cu"),
        ("", "an empty text"),
    ],
)
def test_a_text_without_the_kernel(text, received):
    with pytest.raises(ValueError, match=rf"no kernel 'f'; .* void name\(\.\.\.\); received: {received}$"):
        operator(text, "f")


def test_a_text_without_its_last_brace():
    with pytest.raises(ValueError, match="the text lacks the closing brace of f"):
        operator(TEXT.replace("STATEMENT", "if (1) {"), "f")


def test_const_behind_the_star_is_the_pointers():
    text = TEXT.replace("const scalar_t* x, scalar_t* y", "const scalar_t* __restrict__ const x, scalar_t* const y")
    function = operator(text.replace("STATEMENT", "y[i] = x[i];"), "f")
    assert function(torch.arange(3.0)).tolist() == [0, 1, 2]


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
