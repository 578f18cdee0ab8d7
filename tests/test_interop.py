"""The border to torch: shared memory, no memory of CuPy's, torch's stream and device, and refusals."""

import contextlib
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

from cupy_kernels import common, compiler, source
from cupy_kernels import launch as launch_module
from cupy_kernels.errors import BackendError
from cupy_kernels.launch import launch
from cupy_kernels.source import Kernel
from modelnew import functional, interop

DTYPES = [*interop.FLOATS, torch.uint8, torch.int32, torch.int64]
SPIN = """#include "common.cuh"
extern "C" __global__ void spin(float* y, i64 cycles) {
    i64 start = clock64();
    while (clock64() - start < cycles) {}
    y[threadIdx.x] = 1;
}"""


def gpu_only(function):
    return pytest.mark.gpu(pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")(function))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_memory_is_shared(device, dtype):
    tensor = torch.arange(12, device=device).to(dtype).reshape(3, 4)
    part = tensor[1:]
    address = []

    def write(array):
        address.append(array.ctypes.data if isinstance(array, np.ndarray) else array.data.ptr)
        assert array.shape == (2, 4)
        assert array.dtype.itemsize == dtype.itemsize
        array[0, 1] = 7 if dtype != torch.bfloat16 else 0x40E0  # the bits of 7

    if device == "cpu":
        interop.run(write, part)
    else:
        write(interop.view(part).get())  # indexing a CuPy array is a kernel of CuPy's: shape and dtype alone
        address = [interop.view(part).data.ptr]
        part[0, 1] = 7
    assert address == [part.data_ptr()]
    assert tensor.double().flatten().tolist() == [0, 1, 2, 3, 4, 7, 6, 7, 8, 9, 10, 11]


def test_a_kernel_writes_into_the_tensor(device):
    text = """extern "C" __global__ void write(float* y) { y[threadIdx.x] = threadIdx.x; }"""
    y = torch.empty(8, device=device)
    with source.override({"write.cu": text}):
        interop.run(lambda a: launch(Kernel("write.cu", "write"), (1, 1, 1), (8, 1, 1), (a,)), y)
    assert y.tolist() == list(range(8))


def test_what_was_compiled_together_is_ready(device, monkeypatch):
    text = 'extern "C" __global__ void write(float* y) { y[threadIdx.x] = VALUE; }'
    seen = []
    monkeypatch.setattr(compiler, "_listeners", [seen.append])
    kernels = [Kernel("write.cu", "write", (("VALUE", value),)) for value in (1, 2, 3)]
    y = torch.empty(3, device=device)
    with source.override({"write.cu": text}):
        interop.compile_together(kernels, torch.device(device))
        assert sorted(seen) == kernels
        for value, kernel in enumerate(kernels, 1):
            with interop.launching_on(y.device):
                launch(kernel, (1, 1, 1), (3, 1, 1), (interop.view(y),))
            assert y.tolist() == [value] * 3
    assert len(seen) == 3


def test_views_of_tensors_that_require_grad_and_of_empty_ones(device):
    shapes = []
    leaf, empty = torch.ones(2, device=device, requires_grad=True), torch.empty(0, 3, device=device)
    interop.run(lambda *arrays: shapes.extend(a.shape for a in arrays), leaf, empty)
    assert shapes == [(2,), (0, 3)]


def test_arrays_in_a_workspace(device):
    layout = interop.Layout({"a": ((3, 5), np.float32), "none": ((0, 2), np.int32), "b": ((7,), np.uint8)})
    workspace = interop.Workspace.empty(layout, torch.device(device))
    received = []
    interop.run(lambda *args: received.extend(args), workspace, 3)
    arrays, _ = received
    assert {name: (a.shape, a.dtype) for name, a in arrays.items()} == {
        name: (shape, np.dtype(dtype)) for name, (_, shape, dtype) in layout.places.items()
    }
    end = workspace.memory.data_ptr()
    for array in (arrays["a"], arrays["b"]):
        assert common.address(array) >= end
        assert common.address(array) % 16 == 0
        end = common.address(array) + array.nbytes
    assert end <= workspace.memory.data_ptr() + workspace.memory.nbytes


def test_what_is_no_tensor_passes_unchanged(device):
    received = []
    interop.run(
        lambda *args, **options: received.extend([args[1:], options]), torch.ones(1, device=device), None, 2, a=3
    )
    assert received == [(None, 2), {"a": 3}]


def test_dense():
    x = torch.randn(3, 4)
    assert interop.dense(None) is None
    assert interop.dense(x).data_ptr() == x.data_ptr()
    assert interop.dense(x.T).is_contiguous()
    negative = torch.complex(x, x).conj().imag
    assert negative.is_neg()
    assert torch.equal(interop.dense(negative), -x)


def test_a_tensor_on_no_device_that_runs_kernels():
    with pytest.raises(RuntimeError, match=r"kernels run on CUDA GPUs.*received tensors on meta"):
        interop.one_device([torch.ones(3, device="meta")])


def test_tensors_on_two_devices():
    with pytest.raises(RuntimeError, match=r"one device, received cpu, meta; use \.to"):
        interop.run(pytest.fail, torch.ones(1), torch.ones(1, device="meta"))


@gpu_only
def test_tensors_on_cpu_and_gpu():
    with pytest.raises(RuntimeError, match="one device, received cpu, cuda:0"):
        functional.group_norm(torch.ones(1, 4, device="cuda"), 2, torch.ones(4), torch.ones(4))


@gpu_only
def test_a_gpu_without_cupy(monkeypatch):
    monkeypatch.setattr(compiler, "cupy", compiler.cupy.__wrapped__)
    monkeypatch.setitem(sys.modules, "cupy", None)
    with pytest.raises(BackendError, match="CuPy is not installed"):
        functional.tanh(torch.ones(3, device="cuda"))


OPERATORS = {
    "tanh": lambda x, w, c: functional.tanh(x),
    "max_pool2d": lambda x, w, c: functional.max_pool2d(x, 2),
    "conv_transpose2d": lambda x, w, c: functional.conv_transpose2d(x, w, c),
    "batch_norm": lambda x, w, c: functional.batch_norm(x, None, None, c, c, training=True),
    "group_norm": lambda x, w, c: functional.group_norm(x, 2, c, c),
}


def operands(device):
    make = torch.Generator().manual_seed(3)
    shapes = [(2, 4, 6, 6), (4, 4, 3, 3), (4,)]
    return [torch.randn(s, generator=make).to(device).requires_grad_() for s in shapes]


def test_a_call_like_an_earlier_one_starts_its_launches_again(monkeypatch):
    """With stand-ins for a GPU: what counts as alike."""
    launches, repeated, called = ["launches"], [], []
    monkeypatch.setattr(interop, "one_device", lambda args: torch.device("cuda", 0))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(interop, "_raw_stream", lambda device_index: 7)
    monkeypatch.setattr(interop, "launching_on", contextlib.nullcontext)
    monkeypatch.setattr(interop, "recorded", lambda: contextlib.nullcontext(launches))
    monkeypatch.setattr(interop, "repeat", lambda *args: repeated.append(args))
    monkeypatch.setattr(interop, "observing", lambda: False)

    def operation(*args, **options):
        called.append(args)
        if options.get("fails"):
            raise ValueError("fails")

    layout = interop.Layout({"a": ((2,), np.float32)})
    x, memory = torch.zeros(4, 4), torch.empty(layout.size, dtype=torch.uint8)
    workspace = interop.Workspace(memory, layout)
    with source.override({}):
        interop.run(operation, x, workspace, 2, eps=1.0)
        interop.run(operation, x.detach(), interop.Workspace(memory[:], layout), 2, eps=1.0)
        assert (len(called), repeated) == (1, [(launches, 7)])
        for other in (
            lambda: interop.run(operation, x.clone(), workspace, 2, eps=1.0),
            lambda: interop.run(operation, x[:2], workspace, 2, eps=1.0),
            lambda: interop.run(operation, x.view(2, 8), workspace, 2, eps=1.0),
            lambda: interop.run(operation, x.T, workspace, 2, eps=1.0),
            lambda: interop.run(operation, x.view(torch.int32), workspace, 2, eps=1.0),
            lambda: interop.run(operation, x, interop.Workspace(memory, interop.Layout({})), 2, eps=1.0),
            lambda: interop.run(operation, x, interop.Workspace(memory.clone(), layout), 2, eps=1.0),
            lambda: interop.run(operation, x, workspace, None, eps=1.0),
            lambda: interop.run(operation, x, workspace, 2, eps=2.0),
            lambda: interop.run(operation, x, workspace, 2, eps=0.0),
            lambda: interop.run(operation, x, workspace, 2, eps=-0.0),
            lambda: interop.run(operation, x, workspace, 2, momentum=1.0),
            lambda: interop.run(lambda *args, **options: called.append(args), x, workspace, 2, eps=1.0),
        ):
            before = len(called)
            other()
            assert len(called) == before + 1
        repeats = len(repeated)
        interop.run(operation, x, workspace, None, like="these", eps=1.0)
        before = len(called)
        interop.run(operation, x.detach(), interop.Workspace(memory[:], layout), None, like="these", eps=1.0)
        assert (len(called), len(repeated)) == (before, repeats + 1)
        for other in (
            lambda: interop.run(operation, x, workspace, None, like="others", eps=1.0),
            lambda: interop.run(operation, x.clone(), workspace, None, like="these", eps=1.0),
            lambda: interop.run(operation, x, workspace, memory, like="these", eps=1.0),
        ):
            before = len(called)
            other()
            assert len(called) == before + 1
        for _ in range(2):
            with pytest.raises(ValueError, match="fails"):
                interop.run(operation, x, fails=True)
        with source.override({}):  # other kernels may be in force
            before = len(called)
            interop.run(operation, x, workspace, 2, eps=1.0)
            assert len(called) == before + 1
    assert repeated == [(launches, 7)] * 2


@gpu_only
@pytest.mark.parametrize("name", OPERATORS)
def test_repeated_launches(name, monkeypatch):
    """Loops whose tensors lie at the same addresses: with new values, on many streams, in new threads."""
    monkeypatch.setattr(launch_module, "_observers", [])
    repeats = []
    monkeypatch.setattr(interop, "repeat", lambda *args: repeats.append(args) or launch_module.repeat(*args))
    tensors = operands("cuda")

    def call():
        y = OPERATORS[name](*tensors)
        return [y, *(g for g in torch.autograd.grad(y.sum(), tensors, allow_unused=True) if g is not None)]

    def values(seed):
        for tensor in tensors:
            new = torch.randn(tensor.shape, generator=torch.Generator().manual_seed(seed))
            tensor.detach().copy_(new)
        with torch.cuda.stream(torch.cuda.Stream() if seed % 2 else torch.cuda.default_stream()):
            torch.cuda.current_stream().wait_stream(torch.cuda.default_stream())
            results = [result.tolist() for result in call()]
        return results

    with source.override({}):
        first = [values(seed) for seed in range(6)]
        assert repeats
        assert first[0] != first[2]
    for seed in range(6):
        with source.override({}), ThreadPoolExecutor(1) as worker:  # what was launched is forgotten
            assert worker.submit(values, seed).result() == first[seed]


@gpu_only
@pytest.mark.parametrize("name", OPERATORS)
def test_nothing_is_taken_from_cupys_pool(name):
    """Besides this test, `no_memory_from_cupy` of conftest.py holds in all of them."""
    import cupy

    pool = cupy.get_default_memory_pool()
    before = pool.used_bytes(), pool.total_bytes()
    OPERATORS[name](*operands("cuda")).sum().backward()
    torch.cuda.synchronize()
    assert (pool.used_bytes(), pool.total_bytes()) == before


@gpu_only
@pytest.mark.parametrize("name", OPERATORS)
def test_current_stream(name):
    """The kernels wait for what the current stream does before: here, to write their input, 0.3 s late."""
    tensors = operands("cuda")
    expected = OPERATORS[name](*tensors)
    stream = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        OPERATORS[name](*tensors)  # compiles, and allocates what it takes
    late = [torch.full_like(t, float("nan")).detach().requires_grad_() for t in tensors]
    torch.cuda.synchronize()
    with torch.cuda.stream(stream), source.override({"spin.cu": SPIN}):
        interop.run(
            lambda y: launch(Kernel("spin.cu", "spin"), (1, 1, 1), (1, 1, 1), (y, 5 * 10**8)),
            torch.empty(1, device="cuda"),
        )
        for old, new in zip(late, tensors):
            old.detach().copy_(new)
        result = OPERATORS[name](*late)
        assert not stream.query()  # nothing above waited
    stream.synchronize()
    assert torch.equal(result, expected)


@gpu_only
@pytest.mark.parametrize("name", OPERATORS)
def test_cuda_graph(name):
    tensors = operands("cuda")
    warm = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(warm):
        grads = torch.autograd.grad(OPERATORS[name](*tensors).sum(), tensors, allow_unused=True)
    warm.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = OPERATORS[name](*tensors)
        grads = torch.autograd.grad(result.sum(), tensors, allow_unused=True)
    for seed in (1, 2):
        new = torch.randn(tensors[0].shape, generator=torch.Generator().manual_seed(seed)).cuda()
        with torch.no_grad():
            tensors[0].copy_(new)
        graph.replay()
        expected = OPERATORS[name](*tensors)
        assert torch.equal(result, expected)
        for grad, other in zip(grads, torch.autograd.grad(expected.sum(), tensors, allow_unused=True)):
            assert other is grad is None or torch.equal(grad, other)


@gpu_only
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_the_tensors_device_and_not_the_current_one():
    x = torch.randn(100, device="cuda:1", requires_grad=True)
    with torch.cuda.device(0):
        y = functional.tanh(x)
        y.sum().backward()
        assert torch.cuda.current_device() == 0
    assert y.device == x.grad.device == x.device
    torch.testing.assert_close(y, torch.tanh(x))
