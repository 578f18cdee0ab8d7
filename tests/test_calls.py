"""Calls as plans: which share one, and torch's stream, device and memory in each."""

import gc
import weakref
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from test_interop import OPERATORS, call, gpu_only, operands, result_and_gradients

from cupy_kernels import launch as launch_module
from cupy_kernels import source
from cupy_kernels.errors import UnsupportedError
from cupy_kernels.launch import launch
from cupy_kernels.source import Kernel
from modelnew import calls, functional

SPIN = """#include "common.cuh"
extern "C" __global__ void spin(float* y, i64 cycles) {
    i64 start = clock64();
    while (clock64() - start < cycles) {}
    y[threadIdx.x] = 1;
}"""


def test_which_calls_share_a_plan(device):
    recorded = []

    def operation(x, number, **options):
        recorded.append((x, number, options))

    x = torch.zeros(4, 4, device=device)
    odd = torch.zeros(17, device=device)[1:].view(4, 4)

    def made(*args, called=operation, **options):
        recorded.clear()
        calls.run(called, *args, **options)
        return len(recorded)

    with source.override({}):
        assert made(x, 2, eps=1.0)
        assert not made(x.clone(), 2, eps=-0.0)
        assert made(x[:2], 2, eps=1.0)
        assert made(x.view(2, 8), 2, eps=1.0)
        assert made(x.view(torch.int32), 2, eps=1.0)
        assert made(odd, 2, eps=1.0)
        assert made(x, None, eps=1.0)
        assert made(x, 2, eps=None)
        assert made(x, 2, momentum=1.0)
        assert made(x, 2, called=lambda *args, **options: operation(*args, **options), eps=1.0)
        with pytest.raises(ValueError, match=r"contiguous tensors, received shape \(4, 4\) with strides \(1, 4\)"):
            made(x.T, 2, eps=1.0)
        with source.override({}):  # other kernels may be in force
            assert made(x, 2, eps=1.0)
        with ThreadPoolExecutor(1) as other:  # whose kernels' arguments are its own
            assert other.submit(made, x, 2, eps=1.0).result()


def test_a_refusal_is_remembered(device):
    asked = []

    def operation(new, x):
        asked.append(x)
        raise UnsupportedError("not this")

    with source.override({}):
        for _ in range(2):
            x = torch.zeros(4, device=device)
            with pytest.raises(UnsupportedError, match="not this"):
                calls.call(operation, x)
            alive = weakref.ref(x)
            del x
            gc.collect()
            assert alive() is None
    assert len(asked) == 1


def test_what_failed_is_tried_again(device):
    def fails(x):
        raise ValueError("fails")

    for _ in range(2):
        with pytest.raises(ValueError, match="fails"):
            calls.run(fails, torch.zeros(4, device=device))


def test_plans_are_bounded(monkeypatch):
    monkeypatch.setattr(calls, "_MOST_KNOWN", 3)
    made = []

    def operation(x, number):
        made.append(number)

    with source.override({}):
        for number in (1, 2, 3, 1, 4, 2, 1):
            calls.run(operation, torch.zeros(1), number)
            assert len(calls.caches().plans) <= 3
    assert made == [1, 2, 3, 4, 1]


@gpu_only
@pytest.mark.parametrize("name", OPERATORS)
def test_repeated_launches(name, monkeypatch):
    """Plans that are started again: with new values, on many streams, in new threads."""
    monkeypatch.setattr(launch_module, "_observers", [])
    tensors = operands(name, "cuda")

    def values(seed):
        for key, new in operands(name, "cpu", seed).items():
            tensors[key].detach().copy_(new)
        with torch.cuda.stream(torch.cuda.Stream() if seed % 2 else torch.cuda.default_stream()):
            torch.cuda.current_stream().wait_stream(torch.cuda.default_stream())
            return [result.tolist() for result in result_and_gradients(name, tensors)]

    with source.override({}):
        expected = [values(seed) for seed in range(6)]
        assert expected[0] != expected[2]
    for seed in range(6):
        with source.override({}), ThreadPoolExecutor(1) as worker:  # what was launched is forgotten
            assert worker.submit(values, seed).result() == expected[seed]


@gpu_only
@pytest.mark.parametrize("name", OPERATORS)
def test_nothing_is_taken_from_cupys_pool(name):
    """Besides this test, `no_memory_from_cupy` of conftest.py holds in all of them."""
    import cupy

    pool = cupy.get_default_memory_pool()
    before = pool.used_bytes(), pool.total_bytes()
    call(name, operands(name, "cuda")).sum().backward()
    torch.cuda.synchronize()
    assert (pool.used_bytes(), pool.total_bytes()) == before


@gpu_only
@pytest.mark.parametrize("name", OPERATORS)
def test_current_stream(name):
    """The kernels wait for what the current stream does before: here, to write their input, 0.3 s late."""
    tensors = operands(name, "cuda")
    expected = call(name, tensors)
    stream = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        call(name, tensors)  # compiles, and allocates what it takes
    late = operands(name, "cuda")
    for tensor in late.values():
        tensor.detach().fill_(float("nan"))
    torch.cuda.synchronize()
    with torch.cuda.stream(stream), source.override({"spin.cu": SPIN}):
        calls.run(
            lambda y: launch(Kernel("spin.cu", "spin"), (1, 1, 1), (1, 1, 1), (y, 5 * 10**8)),
            torch.empty(1, device="cuda"),
        )
        for key, new in tensors.items():
            late[key].detach().copy_(new)
        result = call(name, late)
        assert not stream.query()  # nothing above waited
    stream.synchronize()
    assert torch.equal(result, expected)


@gpu_only
@pytest.mark.parametrize("name", OPERATORS)
def test_cuda_graph(name):
    tensors = operands(name, "cuda")
    warm = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(warm):
        result_and_gradients(name, tensors)
    warm.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = result_and_gradients(name, tensors)
    for seed in (1, 2):
        for key, new in operands(name, "cuda", seed).items():
            tensors[key].detach().copy_(new)
        graph.replay()
        assert all(map(torch.equal, results, result_and_gradients(name, tensors)))


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
