from types import SimpleNamespace

import numpy as np
import pytest
import torch

from cupy_kernels import compiler, source
from cupy_kernels.launch import launch
from cupy_kernels.source import Kernel
from modelnew.interop import run, view

COPY = """#include "common.cuh"
extern "C" __global__ void copy(const float* x, float* y, int offset, i64 size) {
    i64 i = (i64)blockIdx.x * blockDim.x + threadIdx.x;
    if (i < size) y[i] = (x ? x[i] : 0) + offset;
}"""


@pytest.fixture(autouse=True)
def copy_kernel():
    with source.override({"copy.cu": COPY}):
        yield


@pytest.fixture
def arguments():
    return np.arange(6, dtype=np.float32), np.zeros(6, np.float32), 1, 6


def start(*args, grid=(1, 1, 1), block=(32, 1, 1), name="copy"):
    launch(Kernel("copy.cu", name), grid, block, args)


def test_launch(device):
    x, y = torch.arange(6.0, device=device), torch.empty(6, device=device)
    run(start, x, y, 3, 6)
    assert torch.equal(y, x + 3)
    run(start, None, y, True, 6)
    assert torch.equal(y, torch.ones_like(y))


def test_a_grid_of_no_blocks_starts_nothing(device):
    y = torch.full((6,), 7.0, device=device)
    run(start, None, y, 1, 6, grid=(0, 1, 1))
    assert torch.equal(y, torch.full_like(y, 7))


def test_number_of_arguments(arguments):
    with pytest.raises(ValueError, match=r"copy \[copy\.cu\] takes 4 arguments, received 3"):
        start(*arguments[:3])


def test_unknown_kernel(arguments):
    with pytest.raises(ValueError, match=r"copy\.cu has no kernel 'paste'; it has copy"):
        start(*arguments, name="paste")


def test_unknown_file(arguments):
    with pytest.raises(ValueError, match=r"no kernel source 'paste\.cu'; there are .*tanh\.cu"):
        launch(Kernel("paste.cu", "paste"), (1, 1, 1), (32, 1, 1), arguments)


def test_dtype(device):
    x, y = torch.arange(6.0, device=device, dtype=torch.float64), torch.zeros(6, device=device)
    with pytest.raises(TypeError, match="x is float64, the kernel takes float32"):
        run(start, x, y, 1, 6)
    assert not y.any()


def test_contiguity(device):
    x, y = torch.arange(12.0, device=device)[::2], torch.zeros(6, device=device)
    with pytest.raises(ValueError, match=r"x is not contiguous \(shape \(6,\), strides \(8,\)\)"):
        run(start, x, y, 1, 6)


@pytest.mark.parametrize("grid", [(2**31, 1, 1), (1, 65536, 1), (1, 1, 65536)], ids=str)
def test_grid_limits(arguments, grid):
    with pytest.raises(ValueError, match="exceeds CUDA's limits"):
        start(*arguments, grid=grid)


@pytest.mark.parametrize("block", [(1025, 1, 1), (32, 33, 1), (1, 1, 65), (0, 1, 1)], ids=str)
def test_block_limits(arguments, block):
    with pytest.raises(ValueError, match="1024 threads"):
        start(*arguments, block=block)


def test_kinds_of_arrays(arguments):
    x, y, offset, size = arguments
    with pytest.raises(TypeError, match=r"received numpy\.ndarray, torch\.Tensor"):
        start(torch.from_numpy(x), y, offset, size)
    with pytest.raises(TypeError, match=r"received builtins\.list"):
        start([1.0], [2.0], offset, size)
    with pytest.raises(TypeError, match="received no array"):
        start(None, None, offset, size)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_kinds_of_arrays_on_a_gpu(arguments):
    x, y, offset, size = arguments
    with pytest.raises(TypeError, match=r"received cupy\.ndarray, numpy\.ndarray"):
        start(view(torch.from_numpy(x).cuda()), y, offset, size)


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_arrays_on_another_gpu():
    import cupy

    x, y = (view(torch.zeros(6, device="cuda:1")) for _ in range(2))
    with cupy.cuda.Device(0), pytest.raises(RuntimeError, match=r"current device 0; its arrays are on \[1\]"):
        start(x, y, 1, 6)


def test_a_gpus_kernel_is_looked_up_once_and_again_when_it_changes(monkeypatch):
    """With stand-ins for CuPy and its arrays, so without a GPU."""

    class Array(SimpleNamespace):
        pass

    def array(device):
        return Array(flags=y.flags, dtype=y.dtype, data=SimpleNamespace(device_id=device))

    Array.__module__ = "cupy"
    y, current, compiled, started = np.zeros(6, np.float32), SimpleNamespace(device=0), [], []
    runtime = SimpleNamespace(getDevice=lambda: current.device)
    monkeypatch.setattr(compiler, "cupy", lambda: SimpleNamespace(cuda=SimpleNamespace(runtime=runtime)))

    def function(kernel, shared_bytes):
        compiled.append((current.device, kernel.defines, shared_bytes))
        return lambda grid, block, args, shared_mem: started.append((args, shared_mem))

    monkeypatch.setattr(compiler, "function", function)
    kernel = Kernel("copy.cu", "copy")
    for shared_bytes in (0, 0, 64):
        launch(kernel, (1, 1, 1), (32, 1, 1), (None, array(0), 1, 6), shared_bytes)
    assert compiled == [(0, (), 0), (0, (), 64)]
    assert [type(arg) for arg in started[0][0]] == [np.uint64, Array, np.int32, np.int64]
    with pytest.raises(RuntimeError, match=r"current device 0; its arrays are on \[0, 1\]"):
        start(array(0), array(1), 1, 6)
    with source.override({}, {"copy": {"WIDTH": 4}}):
        start(None, array(0), 1, 6)
    current.device = 1
    start(None, array(1), 1, 6)
    assert compiled[2:] == [(0, (("WIDTH", 4),), 0), (1, (), 0)]
    assert len(started) == 5


def test_numbers_that_do_not_fit(arguments):
    x, y, _, size = arguments
    with pytest.raises(ValueError, match="offset=2147483648 does not fit int32"):
        start(x, y, 2**31, size)
    start(x, y, -1, 2**40)
