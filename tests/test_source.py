import threading
import types

import numpy as np
import pytest

from cupy_kernels import parsing, source
from cupy_kernels.source import DTYPES, Kernel, Parameter

DIAMOND = {
    "top.cu": '#include "left.cuh"\n#include "right.cuh"\nint top;\n',
    "left.cuh": '// left\n # include "base.cuh"  // what left needs\nint left;\n',
    "right.cuh": '#include "base.cuh"\nint right;\n',
    "base.cuh": "int base;\n",
}


@pytest.mark.parametrize("file", source.names())
def test_lines_have_at_most_120_columns(file):
    assert max(map(len, source.packaged(file).splitlines())) <= 120


def test_includes_are_expanded_once():
    with source.override(DIAMOND):
        lines = source.expanded("top.cu").splitlines()
    assert lines == [
        '#line 1 "top.cu"',
        '#line 1 "left.cuh"',
        "// left",
        '#line 1 "base.cuh"',
        "int base;",
        '#line 3 "left.cuh"',
        "int left;",
        '#line 2 "top.cu"',
        '#line 1 "right.cuh"',
        "",
        "int right;",
        '#line 3 "top.cu"',
        "int top;",
    ]


def test_a_missing_include_is_named():
    with (
        source.override({"a.cu": '#include "comon.cuh"\n'}),
        pytest.raises(ValueError, match=r"no kernel source 'comon\.cuh'; did you mean common\.cuh"),
    ):
        source.expanded("a.cu")


@pytest.mark.parametrize(
    ("header", "instead"),
    [
        ("math.h", "without a header"),
        ("cstdint", "i64 and u8"),
        ("cuda_fp16.h", "half_t"),
        ("vector", "NVRTC has no standard library.*for a container take a local"),
        ("algorithm", r"max, min, abs and sqrt are there.*torch\.sort"),
        ("iostream", "printf"),
        ("cub/cub.cuh", r"block_sum of common.*torch\.cumsum"),
        ("thrust/sort.h", r"torch\.sort"),
        ("cuda_runtime.h", "leave it out"),
        ("curand_kernel.h", r"torch\.rand"),
        ("torch/extension.h", "leave it out"),
        ("mine.h", "Write what you need of it"),
    ],
)
def test_headers(header, instead):
    """One answer on all backends."""
    with (
        source.override({"a.cu": f"int a;\n # include <{header}>\n"}),
        pytest.raises(ValueError, match=rf"a\.cu:2: kernels include no header, received <{header}>: .*{instead}"),
    ):
        source.expanded("a.cu")


@pytest.mark.parametrize("file", [f for f in source.names() if f.endswith(".cu")])
def test_every_file_is_self_contained(file):
    """CuPy's disk cache hashes the text, not what it would include; and no toolkit's header may be needed."""
    assert "#include" not in source.expanded(file)
    assert source.kernel_names(file)


def test_heads_by_macros_are_not_found():
    text = '#define KERNEL extern "C" __global__ void\nKERNEL twice(const float* x, float* y) {}'
    with (
        source.override({"head.cu": text}),
        pytest.raises(ValueError, match=r"'twice'; it has none\. .*: extern \"C\""),
    ):
        source.signature(Kernel("head.cu", "twice"))


def test_signature():
    text = """#include "common.cuh"
extern "C" __global__ void __launch_bounds__(256, 512 / 256) many(
    const scalar_t* __restrict__ x,  // input, of any type
    INOUT double *sums, Pair* pairs, u8* flags,
    float eps, i64 size
) {}"""
    with source.override({"many.cu": text}):
        parameters = source.signature(Kernel("many.cu", "many", (("scalar_t", "half_t"),)))
    assert parameters == (
        Parameter("x", DTYPES["half_t"], pointer=True, const=True, inout=False),
        Parameter("sums", DTYPES["double"], pointer=True, const=False, inout=True),
        Parameter("pairs", None, pointer=True, const=False, inout=False),
        Parameter("flags", np.dtype(np.uint8), pointer=True, const=False, inout=False),
        Parameter("eps", DTYPES["float"], pointer=False, const=False, inout=False),
        Parameter("size", DTYPES["i64"], pointer=False, const=False, inout=False),
    )


PLAIN = [("const float*", "x"), ("float*", "y"), ("int", "n")]
CONST = [*PLAIN[:2], ("const int", "n")]


@pytest.mark.parametrize(
    ("text", "parameters"),
    [
        ('extern "C" {\n__global__ void k(const float* x, float* y, int n) { { } }\n}', PLAIN),
        ('extern "C"\n__global__ void k(const float *x, float *y, int n)\n{ }', PLAIN),
        ('extern  "C" __global__\tvoid\nk ( const float*x,float*y,int n ) { }', PLAIN),
        ('extern "C" __launch_bounds__(256) __global__ void k(float const* x, float* y, const int n) {}', CONST),
        (
            'extern "C" __global__ __launch_bounds__((A + (1)) * 32, 2) void k(const float* x, float* y, int n) {}',
            PLAIN,
        ),
        ('extern "C" __global__ void __launch_bounds__(256) k(const float* x, float* y, int n) {}', PLAIN),
        ('extern "C" __attribute__((noinline)) __global__ void k(const float* x, float* y, int n) {}', PLAIN),
        (
            'extern "C" /* a (k) */ __global__ void k(const float* x /* in, ) */, // a, b)\n float* y, int n) {}',
            PLAIN,
        ),
        ('extern "C" __global__ void k(const float x[], float y[64], int n) {}', PLAIN),
        (
            'extern "C" __global__ void k(unsigned a, unsigned int b, long long c, const i64 d, unsigned char e) {}',
            [("unsigned", "a"), ("unsigned", "b"), ("i64", "c"), ("const i64", "d"), ("u8", "e")],
        ),
        ('extern "C" __global__ void k() {}', []),
        ('extern "C" __global__ void k(void) {}', []),
    ],
)
def test_declarations(text, parameters):
    """As CUDA takes them."""
    assert parsing.declarations(text) == {"k": parameters}
    start, end = parsing.span(text, "k")
    assert "__global__" in text[start:end]
    assert text[start:end].endswith("}")
    assert not parsing.unfinished(text)


@pytest.mark.parametrize(
    "text",
    [
        '// extern "C" __global__ void k(float* y) {}',
        '/* extern "C" __global__ void k(float* y) {} */',
        "__global__ void k(float* y) {}",
        'extern "C" { int a; }\n__global__ void k(float* y) {}',
        'extern "C" __global__ void k(float* y);',
        'const char* text = "extern __global__ void k(float* y) {}";',
    ],
)
def test_no_kernel(text):
    """A comment, a declaration, and what cannot be called by its name."""
    assert parsing.declarations(text) == {}


@pytest.mark.parametrize(
    "parameter", ["float** x", "float* x[4]", "float& x", "float", "void (*f)(int)", "Pair<int> p"]
)
def test_a_parameter_that_cannot_be_passed(parameter):
    with pytest.raises(ValueError, match=r"an array, as in const float\* x, or a number.*received '"):
        parsing.declarations(f'extern "C" __global__ void k({parameter}) {{}}')


def test_unsigned_numbers():
    text = 'extern "C" __global__ void k(const unsigned* x, unsigned n) {}'
    with source.override({"k.cu": text}):
        x, n = source.signature(Kernel("k.cu", "k"))
    assert x.dtype == np.uint32
    assert n.dtype == np.uint32


def test_a_scalar_of_unknown_type_is_refused():
    with (
        source.override({"a.cu": 'extern "C" __global__ void a(float* x, size_t n) {}'}),
        pytest.raises(ValueError, match="n is a size_t; scalar parameters are float"),
    ):
        source.signature(Kernel("a.cu", "a"))


def test_override_is_for_the_block_alone_and_nests():
    before = source.expanded("tanh.cu")
    with source.override({"tanh.cuh": "// mine"}):
        assert "// mine" in source.expanded("tanh.cu")
        with source.override({"tanh.cu": "// all mine", "extra.cu": "// new"}):
            assert source.text("extra.cu") == "// new"
            assert source.text("tanh.cuh") == "// mine"
            assert source.expanded("tanh.cu") == '#line 1 "tanh.cu"\n// all mine'
            assert source.overridden() == {"tanh.cu", "tanh.cuh", "extra.cu"}
        assert "// mine" in source.expanded("tanh.cu")
        with pytest.raises(ValueError, match=r"no kernel source 'extra\.cu'"):
            source.text("extra.cu")
    assert source.expanded("tanh.cu") == before
    assert not source.overridden()


def test_override_ends_with_an_error():
    with pytest.raises(KeyError), source.override({"tanh.cu": "// mine"}):
        raise KeyError
    assert "// mine" not in source.text("tanh.cu")


def test_override_holds_in_other_threads():
    seen = []
    with source.override({"tanh.cu": "// mine"}):
        thread = threading.Thread(target=lambda: seen.append(source.text("tanh.cu")))
        thread.start()
        thread.join()
    assert seen == ["// mine"]


def test_digest_is_of_the_packaged_files(monkeypatch, tmp_path):
    digest = source.digest()
    assert len(digest) == 64
    with source.override({"tanh.cu": "// mine"}):
        source.digest.cache_clear()
        assert source.digest() == digest

    for file in source.names():
        (tmp_path / file).write_text(source.text(file))

    def digest_of_copy():
        source.digest.cache_clear()
        return source.digest()

    monkeypatch.setattr(source, "_FOLDER", tmp_path)
    others = []
    try:
        assert digest_of_copy() == digest
        text = source.text("tanh.cu")
        for same in (text + "\n", text.replace("\n", "  // more\n\n\t/* and\nmore */\n"), text.replace(" ", " /* */ ")):
            (tmp_path / "tanh.cu").write_text(same)
            assert digest_of_copy() == digest
        for other in (text.replace("threadIdx.x", "threadIdx.y"), text + 'asm("// a");', text + 'asm("// b");'):
            (tmp_path / "tanh.cu").write_text(other)
            assert digest_of_copy() not in (digest, *others)
            others.append(digest_of_copy())
        (tmp_path / "tanh.cu").write_text(text)
        assert digest_of_copy() == digest
        (tmp_path / "tanh.cuh").rename(tmp_path / "other.cuh")
        assert digest_of_copy() != digest
    finally:
        source.digest.cache_clear()


def test_texts_whose_digests_begin_alike(monkeypatch):
    monkeypatch.setattr(
        source.hashlib, "sha256", lambda text: types.SimpleNamespace(hexdigest=lambda: "0" * 8 + text.hex())
    )
    files = [source.add("alike", text) for text in ("int one;", "int two;", "int one;")]
    assert files[0] == files[2] != files[1]
    assert [source.text(file) for file in files] == ["int one;", "int two;", "int one;"]
