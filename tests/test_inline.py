"""Operators from a user's text: parity, gradients, what is launched and saved, and refusals that say what to do."""

import inspect
import re
import runpy
import textwrap
from pathlib import Path

import pytest
import torch
from tolerance import check_gradients

from cupy_kernels import emulator, source
from cupy_kernels.errors import KernelCompileError
from modelnew.inline import operator

ROOT = Path(__file__).resolve().parents[1]
DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]
INDEX = "i64 i = (i64)blockIdx.x * blockDim.x + threadIdx.x; if (i >= size) return;"
HEAD = '#include "common.cuh"\n'

PRODUCT = f"""{HEAD}
extern "C" __global__ void product(const scalar_t* a, const scalar_t* b, scalar_t* y, i64 size) {{
    {INDEX}
    y[i] = from_acc<scalar_t>(to_acc(a[i]) * to_acc(b[i]));
}}
extern "C" __global__ void product_da(const scalar_t* dy, const scalar_t* b, scalar_t* da, i64 size) {{
    {INDEX}
    da[i] = from_acc<scalar_t>(to_acc(dy[i]) * to_acc(b[i]));
}}
extern "C" __global__ void product_db(const scalar_t* dy, const scalar_t* a, scalar_t* db, i64 size) {{
    {INDEX}
    db[i] = from_acc<scalar_t>(to_acc(dy[i]) * to_acc(a[i]));
}}"""

# One block for a row: the largest element of each, where it is, and for the backward alone the same in 32 bits.
LARGEST = f"""{HEAD}
extern "C" __global__ void largest(const scalar_t* x, float scale, scalar_t* y, i64* where, int* place, i64 columns) {{
    if (threadIdx.x) return;
    const scalar_t* row = x + blockIdx.x * columns;
    i64 best = 0;
    for (i64 j = 1; j < columns; j++) if (to_acc(row[j]) > to_acc(row[best])) best = j;
    y[blockIdx.x] = from_acc<scalar_t>(scale * to_acc(row[best]));
    where[blockIdx.x] = place[blockIdx.x] = best;
}}
extern "C" __global__ void largest_dx(const scalar_t* dy, const int* place, scalar_t* dx, float scale, i64 columns) {{
    for (i64 j = threadIdx.x; j < columns; j += blockDim.x)
        dx[blockIdx.x * columns + j] =
            from_acc<scalar_t>(j == place[blockIdx.x] ? scale * to_acc(dy[blockIdx.x]) : (acc_t)0);
}}"""

EMPTY = 'extern "C" __global__ void product() {}'


def product():
    return operator(PRODUCT, "product", ("product_da", "product_db"))


def largest(**options):
    return operator(
        LARGEST,
        "largest",
        "largest_dx",
        output=lambda x, scale: x.shape[:-1],
        sizes={"columns": lambda x, scale: x.shape[-1]},
        grid=lambda x, scale: x[..., 0].numel(),
        block=32,
        saved="place",
        **options,
    )


@pytest.fixture
def started(monkeypatch):
    """Names of the kernels that the emulator has run."""
    names, run = [], emulator._run
    monkeypatch.setattr(emulator, "_run", lambda packed: (names.append(packed.step.kernel.name), run(packed)))
    return names


def test_the_example_runs(capsys):
    runpy.run_path(str(ROOT / "examples" / "04_own_operator.py"), run_name="__main__")
    assert "gradcheck in float64: passed" in capsys.readouterr().out


def test_the_guide_s_operator_runs():
    page = (ROOT / "docs" / "guide" / "own_operators.md").read_text(encoding="utf-8")
    block, *_ = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    names = {}
    exec(block, names)
    x = torch.randn(7)
    torch.testing.assert_close(names["silu"](x), torch.nn.functional.silu(x))


def test_the_docstring_s_example_runs(device):
    block = inspect.getdoc(operator).split("\n\n")[1]
    names = {"operator": operator, "x": torch.randn(7, device=device, requires_grad=True)}
    exec(textwrap.dedent(block), names)
    assert torch.equal(names["y"], 2 * names["x"])
    assert torch.autograd.grad(names["y"].sum(), names["x"])[0].tolist() == [2] * 7


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(), (3, 171), (0, 4)], ids=str)
def test_elementwise(device, dtype, shape):
    a, b = (torch.randn(shape, device=device).to(dtype).requires_grad_() for _ in range(2))
    check_gradients(product(), torch.mul, [a, b])


def test_layouts(device):
    a, b = torch.randn(5, 4, device=device).t(), torch.complex(torch.ones(4, 5), torch.ones(4, 5)).conj().imag
    assert torch.equal(product()(a, b.to(device)), -a)


@pytest.mark.parametrize("wanted", [(True, False), (False, True), (True, True), (False, False)], ids=str)
def test_only_gradients_that_are_asked_for(wanted, started):
    a, b = (torch.randn(3).requires_grad_(w) for w in wanted)
    y = product()(a, b)
    if any(wanted):
        y.sum().backward()
    assert started == ["product", *["product_da"] * wanted[0], *["product_db"] * wanted[1]]
    assert (a.grad is not None, b.grad is not None) == wanted


def test_rows_numbers_indices_and_what_is_saved(device):
    x = torch.randn(2, 3, 70, device=device, requires_grad=True)
    for y, where in (largest()(x, 2), largest()(scale=2.0, x=x)):
        expected, index = x.max(-1)
        assert torch.equal(y, 2 * expected)
        assert torch.equal(where, index)
        assert where.dtype == torch.int64
        assert not where.requires_grad
        assert [t.dtype for t in y.grad_fn.saved_tensors] == [torch.int32]
    dy = torch.randn_like(y)
    (dx,) = torch.autograd.grad(y, x, dy)
    assert torch.equal(dx, torch.autograd.grad(2 * expected, x, dy)[0])


def test_gradcheck(device):
    a, b = (torch.randn(2, 3, dtype=torch.float64, device=device, requires_grad=True) for _ in range(2))
    assert torch.autograd.gradcheck(product(), (a, b))
    assert torch.autograd.gradcheck(lambda x: largest()(x, 0.5)[0], a)


def test_macros_and_shapes_by_name(device):
    text = HEAD + 'extern "C" __global__ void fill(const scalar_t* x, u8* n, acc_t* m, i64 size) {'
    text += INDEX + "if (i < 4) n[i] = N; if (i == 0) m[0] = (acc_t)1 / N; }"
    fill = operator(text, "fill", output=lambda x: {"n": (2, 2), "m": ()}, defines={"N": 4})
    for dtype, accumulator in ((torch.float16, torch.float32), (torch.float64, torch.float64)):
        n, m = fill(torch.zeros(1, dtype=dtype, device=device))
        assert n.tolist() == [[4, 4], [4, 4]]
        assert m.dtype == accumulator
        assert m == 0.25


def test_under_torch_compile():
    multiply = product()
    compiled = torch.compile(lambda a, b: multiply(a + 1, b) - 1, backend="eager")
    a, b = torch.randn(3), torch.randn(3)
    assert torch.equal(compiled(a, b), (a + 1) * b - 1)


def test_help_shows_the_arguments():
    assert str(inspect.signature(largest())) == "(x, scale)"
    assert repr(product()) == "product(a, b)"
    assert "-> y, where" in largest().__doc__


def test_texts_of_the_same_names_do_not_meet(device):
    x = torch.ones(3, device=device)
    twice = operator(PRODUCT.replace("to_acc(a[i]) *", "2 * to_acc(a[i]) *"), "product")
    once = product()
    assert (twice(x, x) == 2).all()
    assert (once(x, x) == 1).all()
    assert not {once.declared.file, twice.declared.file} & set(source.names())


def test_a_gradient_that_no_kernel_computes():
    a, b = torch.ones(2, requires_grad=True), torch.ones(2, requires_grad=True)
    with pytest.raises(RuntimeError, match=r"product has no gradient da, db: no kernel of backward=\(\) writes it"):
        operator(PRODUCT, "product")(a, b).sum().backward()
    y = operator(PRODUCT, "product", "product_da")(a, b)
    with pytest.raises(RuntimeError, match="product has no gradient db"):
        y.sum().backward()


def test_compile_error_names_the_line_of_the_text(device):
    wrong = operator(PRODUCT.replace("to_acc(a[i]) * to_acc(b[i])", "undefined_name"), "product")
    line = next(n for n, line in enumerate(PRODUCT.splitlines(), 1) if "to_acc(a[i]) * to_acc(b[i])" in line)
    with pytest.raises(KernelCompileError) as error:
        wrong(torch.ones(1, device=device), torch.ones(1, device=device))
    second, third = str(error.value).splitlines()[1:3]
    assert second.startswith((f"{wrong.declared.file}:{line}", f"{wrong.declared.file}({line})"))
    assert third == f"    {line} |     y[i] = from_acc<scalar_t>(undefined_name);"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"forward": "multiply"}, r"no kernel 'multiply'; it has product, product_da, product_db"),
        ({"backward": "product_dc"}, r"no kernel 'product_dc'"),
        ({"grid": {"produkt": len}}, r"no kernel 'produkt'"),
        ({"defines": {"A B": 1}}, r"'A B' is no name of a macro"),
        (
            {"text": PRODUCT.replace("scalar_t* y,", "long int* y,")},
            r"y is declared long int\*; types .* Take i64$",
        ),
        ({"text": PRODUCT.replace("scalar_t* y,", "scalar_t** y,")}, r"is an array, .* received .scalar_t\*\* y."),
        (
            {"text": PRODUCT.replace("y, i64", "y, short int c, i64")},
            r"c is declared short int; types are scalar_t",
        ),
        ({"text": "__global__ void product() {}"}, r"it has none\. Kernels are written: extern"),
        ({"text": EMPTY, "backward": ()}, r"needs an output .* inputs: none, outputs: none"),
        ({"saved": "y"}, r"an output \(a pointer\) that it returns, or .* outputs: y$"),
        ({"saved": "mean"}, r"saved=\['mean'\]: the outputs of product are y"),
        ({"sizes": {"rows": len}}, r"sizes=\['rows'\]: the numbers that the kernels take are size"),
        ({"block": 2048}, r"block must be 1 to 1024 threads, received 2048"),
        ({"text": PRODUCT.replace("a, const", "x, const")}, r"product_da: the pointer da matches nothing .* dx, db"),
        ({"text": PRODUCT.replace("* dy, ", "* grad, ")}, r"product_da: the const pointer grad .* a, b, y, dy"),
        ({"text": PRODUCT.replace("da, i64 size", "da, i64 count")}, r"product_da: the number count .* size"),
        ({"text": PRODUCT.replace("scalar_t* da,", "const scalar_t* b2,")}, r"product_da: the const pointer b2 "),
        (
            {"text": PRODUCT.replace("scalar_t* y,", "short* y,")},
            r"product: y is declared short\*; types are scal",
        ),
        ({"text": PRODUCT.replace("scalar_t* a", "scalar_t* in")}, r"product: in is a word of Python.* as in in_"),
        ({"text": PRODUCT.replace("y, i64", "y, scalar_t c, i64")}, r"product: c is a number of type scalar_t.* acc_t"),
        (
            {"text": PRODUCT.replace("y, i64", "y, short c, i64")},
            r"c is declared short; types are scalar_t, acc_t, f",
        ),
        ({"text": '#include "nowhere.cuh"\n' + PRODUCT}, r"no kernel source 'nowhere\.cuh'"),
    ],
)
def test_definitions_that_are_refused(change, message):
    arguments = {"text": PRODUCT, "forward": "product", "backward": ("product_da", "product_db"), **change}
    with pytest.raises(ValueError, match=message):
        operator(**arguments)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"text": 3}, "text is of type str, received 3"),
        ({"forward": len}, "forward= is a name, or several, received <built-in"),
        ({"backward": 3}, "backward= is a name or an operator, or several, received 3"),
        ({"saved": [3]}, "saved= is a name, or several"),
        ({"block": 33.5}, "block must be an int, received 33.5"),
        ({"block": True}, "block must be an int, received True"),
        ({"shared": "4"}, "shared must be an int, received '4'"),
        ({"output": (3,)}, r"output= takes functions of the operator's arguments, .* received \(3,\)"),
        ({"sizes": {"rows": 2}}, "sizes= takes functions .* received 2"),
        ({"grid": 4}, "grid= takes functions .* received 4"),
        ({"grid": {"product": None}}, "grid= takes functions .* received None"),
        ({"sizes": len}, "sizes= is a dict"),
        ({"defines": ["A"]}, r"defines= is a dict, received \['A'\]"),
        ({"defines": {"A": [1]}}, r"defines=: A must be a str or a number, received \[1\]"),
        ({"defines": {"A": torch.tensor(1)}}, r"defines=: A must be a str or a number, received tensor\(1\)"),
        ({"defines": {"A": True}}, "defines=: A must be a str or a number, received True"),
    ],
)
def test_options_that_are_refused(change, message):
    with pytest.raises(TypeError, match=message):
        operator(**{"text": PRODUCT, "forward": "product", **change})


def test_grids_and_sizes_that_cannot_be(device):
    x = torch.ones(3, 4, device=device)
    for options, error, message in (
        ({"grid": lambda a, b: 0}, ValueError, r"gave \(0, 1, 1\) blocks for product, whose output has 12 elements"),
        ({"grid": lambda a, b: 1.5}, TypeError, "grid= gave 1.5 for product: the number of blocks is an int"),
        ({"grid": lambda a, b: (1, 1, 1, 1)}, TypeError, r"grid= gave \(1, 1, 1, 1\)"),
        ({"grid": lambda a, b: ()}, TypeError, r"grid= gave \(\) for product"),
        ({"sizes": {"size": lambda a, b: 1.5}}, TypeError, "size, which sizes= gives, must be a number of kind int64"),
    ):
        with pytest.raises(error, match=message):
            operator(PRODUCT, "product", **options)(x, x)
    empty = x[:0]
    assert operator(PRODUCT, "product", grid=lambda a, b: len(a))(empty, empty).shape == (0, 4)


def test_a_number_of_elements_that_is_not_called_size(device):
    x = torch.ones(3, 4, device=device)
    with pytest.raises(
        TypeError, match=r"required argument: 'n'\. n must be given in the call\. If it is to be the number of"
    ):
        operator(re.sub(r"\bsize\b", "n", PRODUCT), "product")(x, x)


def test_calls_that_are_refused(device):
    x = torch.ones(3, 4, device=device)
    for args, error, message in (
        ((x,), TypeError, r"product\(a, b\): missing a required argument: 'b'$"),
        ((x, x, x), TypeError, r"product\(a, b\): too many positional arguments"),
        ((x, 2.0), TypeError, r"product: b must be a tensor, received float"),
        ((x, x.half()), TypeError, r"product: b must be torch.float32, received torch.float16"),
        ((x.long(), x.long()), TypeError, r"a must be float32.*received torch.int64"),
        ((x, x.to("meta")), RuntimeError, r"tensors must be on one device"),
    ):
        with pytest.raises(error, match=message):
            product()(*args)
    with pytest.raises(TypeError, match=r"largest: scale must be a number of kind float32, received 'two'"):
        largest()(x, "two")
    with pytest.raises(ValueError, match="largest: scale must be a number that a float can hold"):
        largest()(x, 10**400)
    wrong = operator(LARGEST, "largest", output=lambda *_: {"y": (3,)}, sizes={"columns": lambda *_: 4})
    with pytest.raises(ValueError, match="output= gave shapes of y; outputs are y, where, place"):
        wrong(x, 1)
