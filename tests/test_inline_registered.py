"""Inline operators under torch.compile, export and other recorders: one node of the graph, with gradients."""

import functools
import re
import subprocess
import sys

import pytest
import torch
from test_inline import PRODUCT, largest, product
from test_inline_arguments import ramp, reversed_add, reversed_rows, row_sum
from torch._dynamo import compiled_autograd
from torch.autograd import grad
from torch.fx.experimental.proxy_tensor import make_fx
from torch.library import opcheck

from modelnew.inline import operator
from modelnew.inline_registered import _facts, registered


@pytest.fixture(autouse=True)
def nothing_compiled():
    torch._dynamo.reset()


def whole(function, **options):
    """Compiled to one graph by the stages before Inductor."""
    return torch.compile(function, backend="aot_eager", fullgraph=True, **options)


def test_gradients(device):
    largest_of, multiply, add = largest(), product(), reversed_add()
    expanding = operator(PRODUCT, "product", ("product_da", "product_db"), shapes={"b": "broadcast"})

    rows = reversed_rows(shared=4 * 64)

    def in_dynamic_shared_memory(x, b):
        return rows(x[:, :1] * b[:1] * torch.arange(64, device=device))

    def several_outputs(x, b):
        y, where = largest_of(x, 2.0)
        return y + where

    def change_in_place(x, b):
        return add(x * 1, b.expand(x.shape) * 1, 3.0)

    def change_of_a_result(x, b):
        return add(multiply(x, x), x)

    x = torch.randn(5, 33, device=device, requires_grad=True)
    b = torch.randn(33, device=device, requires_grad=True)
    for function in (several_outputs, change_in_place, change_of_a_result, expanding, in_dynamic_shared_memory):
        results = []
        for call in (function, whole(function)):
            y = call(x, b)
            dy = torch.linspace(-1, 1, y.numel(), device=device).reshape(y.shape)
            results.append((y, *grad(y, (x, b), dy, allow_unused=True, materialize_grads=True)))
        assert all(map(torch.equal, *results)), function


def test_compiled_autograd(device):
    """The forward is eager, and the backward is traced."""
    multiply, x = product(), torch.randn(5, 33, device=device, requires_grad=True)
    with compiled_autograd._enable(torch.compile(backend="aot_eager")):
        multiply(x, x).sum().backward()
    assert torch.equal(x.grad, 2 * x)


def test_without_gradients_and_without_inputs(device):
    total, numbers = row_sum(), ramp()

    def function(x):
        return total(x, 2.0) + numbers(x.shape[0], dtype=torch.float32, device=x.device)

    x = torch.randn(6, 40, device=device)
    assert torch.equal(whole(function)(x), function(x))


@pytest.mark.parametrize("name", ["self", "key", "scalar", "tensors"])
def test_arguments_with_names_that_the_operator_uses(device, name):
    text = re.sub(r"\ba\b", name, re.sub(r"\bda\b", f"d{name}", PRODUCT))
    multiply, x = operator(text, "product", ("product_da", "product_db")), torch.randn(4, device=device)
    assert torch.equal(multiply(**{name: x}, b=x), x * x)
    assert torch.equal(whole(lambda x: multiply(**{name: x}, b=x))(x), x * x)


def test_a_change_of_an_argument(device):
    add, b = reversed_add(), torch.randn(8, device=device)
    x, expected = torch.zeros(8, device=device), 2 * b.flip(0)
    whole(lambda x, b: add(x, b, 2.0) + 1)(x, b)
    assert torch.equal(x, expected)


def test_shapes_and_numbers_that_vary(device):
    function = largest()

    def largest_of(x, scale):
        return function(x, scale)[0]

    compiled = whole(largest_of, dynamic=True)
    for rows, scale in ((3, 2.0), (4, 3.0), (7, 0.5)):
        x = torch.randn(rows, 8 + rows, device=device, requires_grad=True)
        y, expected = compiled(x, scale), function(x, scale)[0]
        assert torch.equal(y, expected)
        assert torch.equal(grad(y.sum(), x)[0], grad(expected.sum(), x)[0])


def test_errors_are_those_of_a_call(device):
    x, multiply, alone = torch.ones(3, 4, device=device), product(), operator(PRODUCT, "product")
    with pytest.raises(Exception, match=r"b must have shape \(3, 4\), as a has"):
        whole(lambda x: multiply(x, x[0]))(x)
    x.requires_grad_()
    with pytest.raises(RuntimeError, match="product has no gradient da, db"):
        whole(alone)(x, x * 1).sum().backward()
    (g,) = grad(registered(multiply)(x, x * 1).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="the gradient of product is computed by a kernel"):
        grad(g.sum(), x)


@pytest.mark.filterwarnings("ignore:.*torch.jit.script.*deprecated")
def test_a_call_in_a_scripted_forward_stays_pythons(device, tmp_path):
    function, x = product(), torch.randn(3, 4, device=device)

    class Network(torch.nn.Module):
        def forward(self, a, b):
            return function(a, b)

    scripted = torch.jit.script(Network())
    assert torch.equal(scripted(x, 2 * x), x * 2 * x)
    with pytest.raises(RuntimeError, match="Python function"):
        scripted.save(tmp_path / "network.pt")


def test_recorders(device):
    function, x = product(), torch.randn(3, 4, device=device)
    graph = make_fx(lambda a, b: function(a + 1, b), tracing_mode="fake")(x, 2 * x)
    assert re.search(r"torch\.ops\.modelnew_inline\.product_[0-9a-f]{8}", graph.code)
    assert torch.equal(graph(2 * x, x), (2 * x + 1) * x)

    class Network(torch.nn.Module):
        def forward(self, a, b):
            return function(a, b) * 2

    exported = torch.export.export(Network(), (x, 2 * x))
    assert torch.equal(exported.module()(x + 1, x), (x + 1) * x * 2)
    with pytest.raises(
        RuntimeError, match=r"product\(a, b\) cannot be recorded by torch\.jit\.trace.*PyTorch's operators"
    ):
        torch.jit.trace(function, (x, x))


def test_as_torch_checks_operators(device):
    x = torch.randn(4, 6, device=device, requires_grad=True)
    b = torch.randn(4, 6, device=device, requires_grad=True)
    opcheck(registered(product()).forward, (x, b, torch.float32, x.device))
    opcheck(registered(largest()).forward, (x, 2.0, torch.float32, x.device))
    opcheck(registered(reversed_add()).forward, (x, b, 2.0, torch.float32, x.device))


TWICE = """
extern "C" __global__ void twice(const float* x, float* y, int size) {
    if (!threadIdx.x && blockIdx.x < size) y[blockIdx.x] = 2 * x[blockIdx.x];
}"""
LOADED = """
import sys, torch
from modelnew.inline import operator
twice = operator(open(sys.argv[1]).read(), "twice", grid=lambda x: max(
    1, *(n for n in x.shape if x.device.type in {"cpu", "cuda", "meta", "mps", "xpu"})
))
twice(torch.empty(1, device="meta"))
assert torch.export.load(sys.argv[2]).module()(torch.ones(3)).tolist() == [2, 2, 2]
"""


def test_a_saved_program_in_another_process(tmp_path):
    """The functions of options are the same there, too, though code has other addresses, and sets another order."""
    (tmp_path / "twice.cu").write_text(TWICE)
    twice = operator(
        TWICE,
        "twice",
        grid=lambda x: max(1, *(n for n in x.shape if x.device.type in {"cpu", "cuda", "meta", "mps", "xpu"})),
    )

    class Network(torch.nn.Module):
        def forward(self, x):
            return twice(x)

    program = torch.export.export(Network(), (torch.zeros(3),))
    torch.export.save(program, tmp_path / "program.pt2")
    files = [str(tmp_path / name) for name in ("twice.cu", "program.pt2")]
    subprocess.run([sys.executable, "-c", LOADED, *files], check=True)


def test_facts_do_not_tell_where_a_function_is():
    """As Python 3.10's constants do."""
    code = (lambda x: [2 * n for n in x]).__code__
    constants = (*code.co_consts, "test.<locals>.<lambda>.<locals>.<listcomp>")
    assert _facts(code.replace(co_consts=constants)) == _facts(code)


def test_names():
    texts = [product(), operator(PRODUCT, "product", grid=functools.partial(max, 1)), product()]
    names = [registered(op).forward._qualname for op in texts]
    assert len(set(names)) == 3
    assert all(re.fullmatch(r"modelnew_inline::product_[0-9a-f]{8}(_\d+)?", name) for name in names)
    assert registered(texts[0]) is registered(texts[0])
