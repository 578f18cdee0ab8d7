"""Arguments of inline operators: shapes, types, numbers, changes in place; kernels in order; copies and pickles."""

import copy
import os
import pickle
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from test_inline import HEAD, INDEX, PRODUCT, largest, product
from torch.autograd import forward_ad, grad
from torch.testing._internal.two_tensor import TwoTensor

from cupy_kernels import nvrtc
from cupy_kernels.errors import BackendError, EmulatorError
from modelnew.inline import operator
from modelnew.inline_arguments import apart

ROOT = Path(__file__).resolve().parents[1]

ADD = f"""{HEAD}
extern "C" __global__ void add_(INOUT scalar_t* x, const scalar_t* b, acc_t scale, i64 size) {{
    {INDEX}
    x[i] = from_acc<scalar_t>(to_acc(x[i]) + scale * to_acc(b[size - 1 - i]));
}}
extern "C" __global__ void add_db(const scalar_t* dx, acc_t scale, scalar_t* db, i64 size) {{
    {INDEX}
    db[i] = from_acc<scalar_t>(scale * to_acc(dx[size - 1 - i]));
}}
extern "C" __global__ void add_dx(INOUT scalar_t* dx, i64 size) {{}}"""

TYPES = """#include "common.cuh"
extern "C" __global__ void types(const bool* b, const u8* u, const signed char* s, const unsigned* w,
    const unsigned long long* v, const long long* l, unsigned count, long long far, bool flag, bool* y,
    unsigned long long* sum, i64 size) {
    i64 i = (i64)blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= size) return;
    y[i] = b[i] != flag;
    sum[i] = u[i] + s[i] + w[i] + v[i] + l[i] + count + far;
}"""

# Rows are summed in pieces, then the pieces.
SUM = """#include "common.cuh"
extern "C" __global__ void pieces(const scalar_t* x, acc_t* partial, i64 columns) {
    acc_t sum = 0;
    for (i64 j = blockIdx.x; j < columns; j += gridDim.x) sum += to_acc(x[blockIdx.y * columns + j]);
    if (threadIdx.x == 0) partial[blockIdx.y * gridDim.x + blockIdx.x] = sum;
}
extern "C" __global__ void scale_pieces(INOUT acc_t* partial, acc_t scale, i64 size) {
    i64 i = (i64)blockIdx.x * blockDim.x + threadIdx.x;
    if (i < size) partial[i] *= scale;
}
extern "C" __global__ void row_sum(const acc_t* partial, scalar_t* y, i64 size) {
    i64 i = (i64)blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= size) return;
    acc_t sum = 0;
    for (int k = 0; k < PIECES; k++) sum += partial[i * PIECES + k];
    y[i] = from_acc<scalar_t>(sum);
}"""

RAMP = """#include "common.cuh"
extern "C" __global__ void ramp(i64 n, acc_t start, acc_t step, scalar_t* y, i64 size) {
    i64 i = (i64)blockIdx.x * blockDim.x + threadIdx.x;
    if (i < size) y[i] = from_acc<scalar_t>(start + step * i);
}"""


def reversed_add(**options):
    return operator(ADD, "add_", ("add_db", "add_dx"), defaults={"scale": 1.0}, **options)


def row_sum(**options):
    return operator(
        SUM,
        ("pieces", "scale_pieces", "row_sum"),
        workspace={"partial": lambda x, scale: (x.shape[0], 4)},
        output=lambda x, scale: x.shape[:1],
        sizes={"columns": lambda x, scale: x.shape[1]},
        grid={"pieces": lambda x, scale: (4, x.shape[0])},
        defines={"PIECES": 4},
        **options,
    )


def ramp():
    return operator(RAMP, "ramp", output=lambda n, start, step: (n,), defaults={"start": 0.0, "step": 1.0})


def test_shapes_of_inputs(device):
    a, b = torch.randn(4, 5, device=device), torch.randn(5, device=device)
    with pytest.raises(ValueError, match=r"b must have shape \(4, 5\), as a has .*shapes=.*; received \(5,\)"):
        product()(a, b)
    broadcast = operator(PRODUCT, "product", ("product_da", "product_db"), shapes={"b": "broadcast"})
    a.requires_grad_()
    b.requires_grad_()
    assert torch.equal(broadcast(a, b), a * b)
    for found, expected in zip(grad(broadcast(a, b).sum(), (a, b)), grad((a * b).sum(), (a, b))):
        torch.testing.assert_close(found, expected)
    with pytest.raises(ValueError, match=r"b of shape \(4,\) cannot be broadcast to a, of shape \(4, 5\)"):
        broadcast(a, a[:, 0])
    declared = operator(PRODUCT, "product", shapes={"a": lambda a, b: (None, 5), "b": lambda a, b: a.shape})
    assert declared(a, a).shape == a.shape
    with pytest.raises(ValueError, match=r"a must have shape \(any, 5\); received \(5, 4\)"):
        declared(a.t(), a.t())
    with pytest.raises(ValueError, match=r"b must have shape \(4, 5\); received \(4, 1\)"):
        declared(a, a[:, :1])
    assert operator(PRODUCT, "product", shapes={"b": None})(a, torch.ones(20, device=device)).shape == a.shape
    with pytest.raises(TypeError, match=r"shapes= of b gave 5: a shape is a tuple of ints from 0 on"):
        operator(PRODUCT, "product", shapes={"b": lambda a, b: 5})(a, b)
    for wrong in (3, (1.5,), (-3,), (None,), ""):
        with pytest.raises(TypeError, match=rf"output= of y gave {re.escape(repr(wrong))}: a shape is"):
            operator(PRODUCT, "product", output=lambda a, b, wrong=wrong: wrong)(a, a)


def test_types(device):
    types = operator(TYPES, "types")
    generator = torch.Generator().manual_seed(0)
    draw = [torch.randint(0, 100, (33,), generator=generator) for _ in range(6)]
    kinds = [torch.bool, torch.uint8, torch.int8, torch.uint32, torch.uint64, torch.int64]
    tensors = [(d % 2 if kind == torch.bool else d).to(kind).to(device) for d, kind in zip(draw, kinds)]
    y, total = types(*tensors, 2**32 - 1, 2**40, True)
    assert y.dtype == torch.bool
    assert torch.equal(y, ~tensors[0])
    assert total.dtype == torch.uint64
    assert torch.equal(total.to(torch.int64).cpu(), sum(draw[1:]) + 2**32 - 1 + 2**40)
    with pytest.raises(ValueError, match="count=-1 does not fit uint32"):
        types(*tensors, -1, 0, True)
    with pytest.raises(TypeError, match="flag must be a number of kind bool, received 1"):
        types(*tensors, 1, 0, 1)
    with pytest.raises(TypeError, match=r"u must be torch.uint8, received torch.bool; use \.to\(torch\.uint8\)"):
        types(tensors[0], *tensors[:1], *tensors[2:], 1, 0, True)


def test_a_change_in_place(device):
    add = reversed_add()
    x, b = torch.randn(50, device=device), torch.randn(50, device=device)
    expected, version, address = x + 2 * b.flip(0), x._version, x.data_ptr()
    assert add(x, b, 2) is x
    torch.testing.assert_close(x, expected)
    assert (x._version, x.data_ptr()) == (version + 1, address)
    strided = torch.randn(50, 2, device=device)
    before = strided.clone()
    add(strided[:, 0], b)
    torch.testing.assert_close(strided, torch.stack([before[:, 0] + b.flip(0), before[:, 1]], 1))
    x, before = x.clone(), x.clone()  # b lies in the memory that changes
    torch.testing.assert_close(add(x, x), before + before.flip(0))
    given = {"x": x[:30], "b": x[10:40]}  # which the emulator would not notice, as it copies arrays
    found = apart(add.declared, given)
    assert found["x"] is given["x"]
    assert torch.equal(found["b"], given["b"])
    assert found["b"].data_ptr() != given["b"].data_ptr()
    assert apart(add.declared, {"x": x[:20], "b": x[20:40]})["b"].data_ptr() == x[20:].data_ptr()


def test_gradients_of_a_change_in_place(device):
    add = reversed_add()
    a, b = (torch.randn(40, dtype=torch.float64, device=device, requires_grad=True) for _ in range(2))
    dy = torch.randn(40, dtype=torch.float64, device=device)

    def ours(a, b):
        x = a * a
        add(x, b, 3)
        return x * x

    def theirs(a, b):
        return (a * a + 3 * b.flip(0)) ** 2

    assert torch.autograd.gradcheck(ours, (a, b))
    for found, expected in zip(grad(ours(a, b), (a, b), dy), grad(theirs(a, b), (a, b), dy)):
        torch.testing.assert_close(found, expected)
    x = a * a
    y = x.exp()  # keeps y, not x
    z = x.sin()
    add(x, b)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        grad(z.sum(), a)
    assert grad(y.sum(), a)[0].shape == a.shape


def test_changes_in_place_that_are_refused(device):
    add = reversed_add()
    leaf, b = torch.randn(6, device=device, requires_grad=True), torch.randn(6, device=device)
    with torch.inference_mode():
        inference = torch.zeros(6, device=device)
        add(inference, b)
    with torch.no_grad():
        view = leaf[:]
    for x, message in (
        (leaf, r"changes x in place, which is a leaf that requires grad: pass x.clone\(\)"),
        (inference, r"made under torch.inference_mode\(\)"),
        (torch.zeros(1, device=device).expand(6), "single memory location"),
        (view, "no_grad"),
        (leaf.clone().unbind()[0].expand(6), "single memory location|multiple views"),
    ):
        before = x.detach().clone()
        with pytest.raises(RuntimeError, match=message):
            add(x, b)
        assert torch.equal(x.detach(), before)
    with torch.no_grad():
        assert add(leaf, b) is leaf
    two = ADD.replace("const scalar_t* b,", "INOUT scalar_t* b,")
    with pytest.raises(ValueError, match=r"changes .* and .*, which share memory"):
        operator(two, "add_")(b, b, 1.0)
    with pytest.raises(ValueError, match="next writes x, an argument: a kernel that changes it declares it INOUT"):
        operator(ADD + ADD.replace("add_(INOUT", "next(").replace(HEAD, ""), ("add_", "next"))
    with pytest.raises(ValueError, match=r"x is the first|x is changed"):
        reversed_add(shapes={"x": "broadcast"})


# One block for a row of as many elements as it has threads, in dynamic shared memory; a backward under another name.
REVERSED = f"""{HEAD}
extern "C" __global__ void reversed(const scalar_t* x, scalar_t* y) {{
    extern __shared__ scalar_t s[];
    s[threadIdx.x] = x[blockIdx.x * blockDim.x + threadIdx.x];
    __syncthreads();
    y[blockIdx.x * blockDim.x + threadIdx.x] = s[blockDim.x - 1 - threadIdx.x];
}}
extern "C" __global__ void reversed_dx(const scalar_t* dy, scalar_t* dx) {{
    DYNAMIC_SHARED(scalar_t, t);
    t[threadIdx.x] = dy[blockIdx.x * blockDim.x + threadIdx.x];
    __syncthreads();
    dx[blockIdx.x * blockDim.x + threadIdx.x] = t[blockDim.x - 1 - threadIdx.x];
}}"""


def reversed_rows(**options):
    return operator(REVERSED, "reversed", "reversed_dx", grid=len, block=64, **options)


def test_without_inputs(device):
    function = ramp()
    assert str(function) == "ramp(n, start=0.0, step=1.0, *, dtype=None, device=None)"
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        y = function(100, step=0.5, dtype=dtype, device=device)
        assert torch.equal(y, torch.arange(0, 50, 0.5, dtype=dtype, device=device))
    with torch.device(device):
        assert function(3).tolist() == [0, 1, 2]
    with pytest.raises(TypeError, match=r"dtype must be float32, float64, float16 or bfloat16, received torch\.int32"):
        function(3, dtype=torch.int32)
    with pytest.raises(ValueError, match="ramp has no input whose shape its output could have: give output="):
        operator(RAMP, "ramp")
    with pytest.raises(RuntimeError, match="kernels run on CUDA GPUs"):
        function(3, device="meta")


def test_defaults(device):
    x = torch.ones(4, device=device)
    assert reversed_add()(x.clone(), x).tolist() == [2] * 4
    for change, error, message in (
        ({"size": 1}, ValueError, r"defaults=\['size'\]: the numbers that add_ takes as arguments are scale"),
        ({"scale": "1"}, TypeError, r"defaults=: scale must be a number of kind float32, received '1'"),
        ({"scale": 10**400}, ValueError, "defaults=: scale must be a number that a float can hold"),
        (3, TypeError, "defaults= is a dict, received 3"),
    ):
        with pytest.raises(error, match=message):
            operator(ADD, "add_", defaults=change)
    text = RAMP.replace("i64 n, acc_t start", "acc_t start, i64 n")
    with pytest.raises(ValueError, match="n has none and stands behind start, which has one: declare n before start"):
        operator(text, "ramp", output=lambda start, n, step: (n,), defaults={"start": 0.0})


def test_kernels_in_order(device):
    x = torch.randn(5, 37, device=device)
    for dtype in (torch.float32, torch.float64, torch.float16):
        torch.testing.assert_close(row_sum()(x.to(dtype), 2.0), 2 * x.to(dtype).sum(1), rtol=2e-3, atol=2e-3)
    with pytest.raises(ValueError, match="row_sum reads the workspace partial, which no kernel before it has written"):
        operator(SUM, "row_sum", workspace={"partial": len})
    with pytest.raises(ValueError, match=r"workspace=\['rest'\]: the pointers that the kernels take are partial"):
        operator(SUM, ("pieces", "row_sum"), workspace={"partial": len, "rest": len})
    with pytest.raises(ValueError, match="forward= names no kernel"):
        operator(SUM, ())


COMPACT = """#include "common.cuh"
extern "C" __global__ void positive(const float* x, float* found, int* count, i64 n) {
    if (threadIdx.x) return;
    int c = 0;
    for (i64 i = 0; i < n; i++)
        if (x[i] > 0) found[c++] = x[i];
    count[0] = c;
}
extern "C" __global__ void at_front(const float* found, const int* count, float* y, i64 size) {
    i64 i = (i64)blockIdx.x * blockDim.x + threadIdx.x;
    if (i < size) y[i] = READ ? found[i] : 0;
}"""


def compact(text):
    return operator(
        text,
        ("positive", "at_front"),
        workspace={"found": lambda x: x.shape, "count": lambda x: (1,)},
        sizes={"n": len},
        grid={"positive": lambda x: 1},
    )


def test_a_workspace_that_is_filled_in_part(device):
    x = torch.randn(100, device=device)
    positive = x[x > 0]
    y = compact(COMPACT.replace("READ", "i < count[0]"))(x)
    torch.testing.assert_close(y, torch.nn.functional.pad(positive, (0, len(x) - len(positive))))
    if device == "cpu":
        y = compact(COMPACT.replace("READ", "true"))(x)
        assert y[len(positive) :].isnan().all()
    message = "positive reads the workspace found, which no kernel before it has written: leave out INOUT"
    with pytest.raises(ValueError, match=message):
        compact(COMPACT.replace("float* found", "INOUT float* found", 1))


def test_dynamic_shared_memory(device):
    rows = torch.randn(5, 64, device=device)
    for bytes_each, dtype in ((4, torch.float32), (8, torch.float64), (800, torch.float32)):  # the last: 50 KiB
        x = rows.to(dtype).clone().requires_grad_()
        y = reversed_rows(shared=64 * bytes_each)(x)
        assert torch.equal(y, x.flip(1))
        assert torch.equal(grad(y, x, rows.to(dtype))[0], rows.to(dtype).flip(1))
    with pytest.raises(ValueError, match=r"dynamic shared memory \(s, t\), of which a block has 0 bytes: give shared="):
        reversed_rows()
    for wrong, error, message in (
        (-1, ValueError, "shared must be 0 to 232448 bytes, received -1"),
        (227 * 1024 + 1, ValueError, "shared must be 0 to 232448 bytes, received 232449"),
        (1e3, TypeError, r"shared must be an int, received 1000\.0"),
        (lambda x: 4, TypeError, "shared must be an int, received <function"),
    ):
        with pytest.raises(error, match=message):
            reversed_rows(shared=wrong)


def test_what_needs_no_dynamic_shared_memory():
    """A kernel that is not run may declare some, and a comment."""
    text = REVERSED.replace("DYNAMIC_SHARED", "// extern __shared__ float s[];\n    __shared__ scalar_t t[64]; //")
    assert operator(text, "reversed_dx", output=lambda dy: dy.shape, grid=len, block=64)
    with pytest.raises(ValueError, match=r"dynamic shared memory \(s\), of which"):
        operator(text, "reversed", grid=len, block=64)
    outside = text.replace('extern "C"', 'extern __shared__ __align__(16) float all[];\nextern "C"', 1)
    with pytest.raises(ValueError, match=r"dynamic shared memory \(all\), of which"):
        operator(outside, "reversed_dx", output=lambda dy: dy.shape, grid=len, block=64)


def test_too_little_dynamic_shared_memory():
    with pytest.raises(EmulatorError, match=r"out of bounds: s\[\d+\], which has 32 elements"):
        reversed_rows(shared=4 * 32)(torch.randn(5, 64))


def test_what_it_is_compiled_to():
    try:
        nvrtc.shared_library()
    except BackendError:
        pytest.skip("no NVRTC")
    function = largest()
    assert "void largest(" in function.text
    rows = function.attributes("sm_80")
    assert [(row.kernel, "scalar_t=float" in row.macros) for row in rows][:2] == [("largest", True), ("largest", False)]
    assert len(rows) == 2 * 4
    assert ".entry largest(" in function.ptx(arch="sm_80")
    half = function.ptx("largest_dx", torch.float16, "sm_80")
    assert ".entry largest_dx(" in half
    assert "cvt.f32.f16" in half
    with pytest.raises(ValueError, match=r"runs the kernels largest, largest_dx; received 'nothing'"):
        function.ptx("nothing")
    with pytest.raises(ValueError, match=r"runs the kernels largest, largest_dx; received \['largest'\]"):
        function.sass(["largest"])
    with pytest.raises(TypeError, match=r"dtype is what scalar_t stands for.*torch.int32 is not"):
        function.ptx(dtype=torch.int32)
    assert len(operator(TYPES, "types").attributes("sm_80")) == 1
    assert {row.shared_bytes for row in reversed_rows(shared=768).attributes("sm_80")} == {768}
    assert {row.shared_bytes for row in reversed_rows(shared=768).attributes("sm_80", shared_bytes=0)} == {0}


def test_copies_and_pickles():
    function = product()
    assert copy.deepcopy(function) is function
    x = torch.randn(4)
    assert torch.equal(pickle.loads(pickle.dumps(function))(x, x), x * x)
    with pytest.raises(TypeError, match=r"largest\(x, scale\) cannot be pickled: output= has a lambda"):
        pickle.dumps(largest())
    y = reversed_rows(shared=4 * 64)(x.expand(2, 16, 4).reshape(2, 64))
    assert torch.equal(pickle.loads(pickle.dumps(reversed_rows(shared=4 * 64)))(y), y.flip(1))


def test_another_process(tmp_path):
    script = """
import multiprocessing, torch
from test_inline import product
def work(f, x, results): results.put(f(x, x).tolist())
if __name__ == "__main__":
    context = multiprocessing.get_context("spawn")
    results = context.SimpleQueue()
    process = context.Process(target=work, args=(product(), torch.arange(3.0), results))
    process.start()
    assert results.get() == [0, 1, 4]
    process.join()
"""
    (tmp_path / "spawned.py").write_text(script, encoding="utf-8")
    environ = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")])}
    done = subprocess.run([sys.executable, "spawned.py"], cwd=tmp_path, env=environ, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def of_a_dual_tensor(x):
    with forward_ad.dual_level():
        product()(forward_ad.make_dual(x, x), x)


@pytest.mark.parametrize(
    "transform",
    [
        lambda x: torch.func.vmap(product())(x, x),
        lambda x: torch.func.grad(lambda x: product()(x, x).sum())(x),
        lambda x: torch.func.jvp(product(), (x, x), (x, x)),
        of_a_dual_tensor,
        lambda x: torch.compile(torch.func.grad(lambda x: product()(x, x).sum()), backend="eager")(x),
    ],
    ids=["vmap", "grad", "jvp", "forward_ad", "compiled grad"],
)
def test_transforms_are_refused(device, transform):
    """None drops a derivative without a word."""
    with pytest.raises(RuntimeError, match=r"product\(a, b\): kernels have no rule for vmap and other transforms"):
        transform(torch.randn(3, 4, device=device))


def test_batches_of_gradients_are_refused(device):
    x = torch.randn(2, 3, device=device)
    with pytest.raises(RuntimeError, match=r"backward of product\(a, b\) takes one gradient.*use vectorize=False"):
        torch.autograd.functional.jacobian(lambda x: product()(x, x), x, vectorize=True)


def test_what_stands_for_tensors(device):
    """Meta tensors, subclasses, and torch.fx's proxies are asked or served, as by PyTorch's functions."""

    class Module(torch.nn.Module):
        def forward(self, a, b):
            return product()(a, b) * 2

    class Subclass(torch.Tensor):
        pass

    x = torch.randn(3, 4, device=device)
    assert torch.equal(torch.fx.symbolic_trace(Module())(x, x), 2 * x * x)
    assert type(product()(x.as_subclass(Subclass), x)) is Subclass
    assert product()(x.to("meta"), x.to("meta")).shape == x.shape
    pair = product()(TwoTensor(x, 3 * x), TwoTensor(x, x))
    assert torch.equal(pair.a, x * x)
    assert torch.equal(pair.b, 3 * x * x)


@pytest.mark.parametrize(
    ("tensor", "message"),
    [
        (lambda x: x.to_sparse(), r"a must be a dense tensor, received layout torch.sparse_coo; use .to_dense\(\)"),
        (lambda x: torch.nested.nested_tensor([x]), "a must be a dense tensor, received a nested tensor"),
        (lambda x: x.numpy(), "a must be a tensor, received ndarray; torch.as_tensor makes one"),
    ],
)
def test_what_is_no_dense_tensor(tensor, message):
    x = torch.ones(2, 2)
    with pytest.raises(TypeError, match=message):
        product()(tensor(x), x)
