import ctypes
import math
import re
import sys
import threading
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from cupy_kernels import compiler, driver, source
from cupy_kernels.launch import Varying, launch, word
from cupy_kernels.plan import Plan, Slot
from cupy_kernels.source import Kernel
from modelnew import inline
from modelnew.calls import run
from modelnew.interop import view

COPY = """#include "common.cuh"
extern "C" __global__ void copy(const float* x, float* y, int offset, i64 size) {
    i64 i = (i64)blockIdx.x * blockDim.x + threadIdx.x;
    if (i < size) y[i] = (x ? x[i] : 0) + offset;
}
extern "C" __global__ void scale(const float* x, float* y, float factor, i64 size) {
    i64 i = (i64)blockIdx.x * blockDim.x + threadIdx.x;
    if (i < size) y[i] = x[i] * factor;
}"""
SCALE = Kernel("copy.cu", "scale")


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
    with pytest.raises(ValueError, match=r"no kernel source 'paste\.cu'; .*names\(\) lists all"):
        launch(Kernel("paste.cu", "paste"), (1, 1, 1), (32, 1, 1), arguments)


def test_dtype(device):
    x, y = torch.arange(6.0, device=device, dtype=torch.float64), torch.zeros(6, device=device)
    with pytest.raises(TypeError, match="x is float64, the kernel takes float32"):
        run(start, x, y, 1, 6)
    assert not y.any()


def test_contiguity(device):
    x, y = torch.arange(12.0, device=device)[::2], torch.zeros(6, device=device)
    with pytest.raises(ValueError, match=r"x is not contiguous \(shape \(6,\), strides \(8,\)\)"):
        start(view(x), view(y), 1, 6)


@pytest.mark.parametrize("bound", ["128", "MOST"])
def test_launch_bounds(device, bound):
    text = f"""#include "common.cuh"
extern "C" __global__ void __launch_bounds__({bound}) bounded(const float* x, float* y, i64 size) {{
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i < size) y[i] = x[i];
}}
"""
    x = torch.randn(300, device=device)
    assert torch.equal(inline.operator(text, "bounded", block=128, defines={"MOST": 128})(x), x)
    with pytest.raises(ValueError, match=r"block \(160, 1, 1\) has more threads than its __launch_bounds__\(128\)"):
        inline.operator(text, "bounded", block=160, defines={"MOST": 128})(x)


@pytest.mark.parametrize("grid", [(2**31, 1, 1), (1, 65536, 1), (1, 1, 65536), (-1, 1, 1)], ids=str)
def test_grid_limits(arguments, grid):
    with pytest.raises(ValueError, match="not within CUDA's limits"):
        start(*arguments, grid=grid)


@pytest.mark.parametrize("block", [(1025, 1, 1), (32, 33, 1), (1, 1, 65), (0, 1, 1), (-1, -1, 1)], ids=str)
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


class Array(SimpleNamespace):
    """Stands in for one of CuPy's."""


Array.__module__ = "cupy"


@pytest.fixture
def stand_in(monkeypatch):
    """CuPy without a GPU, which notes what is compiled, and which arguments kernels are started with."""
    gpu = SimpleNamespace(device=0, context=True, compiled=[], started=[], ptx_version=90)

    def function(kernel, shared_bytes):
        wanted = gpu.device, kernel.defines, shared_bytes
        if wanted not in gpu.compiled:
            gpu.compiled.append(wanted)
        handle = SimpleNamespace(ptr=71 + gpu.compiled.index(wanted))
        return SimpleNamespace(kernel=handle, ptx_version=gpu.ptx_version)

    def start(*numbers):
        *numbers, parameters, extra = numbers
        values = [
            ctypes.cast(p, ctypes.POINTER(t))[0]
            for p, t in zip((ctypes.c_void_p * 4).from_address(parameters), C_TYPES)
        ]
        gpu.started.append((*numbers, *values, extra))

    cuda = SimpleNamespace(
        runtime=SimpleNamespace(getDevice=lambda: gpu.device, free=lambda pointer: setattr(gpu, "context", True)),
        driver=SimpleNamespace(ctxGetCurrent=lambda: int(gpu.context), launchKernel=start),
        get_current_stream=lambda: SimpleNamespace(ptr=99),
    )
    monkeypatch.setattr(compiler, "cupy", lambda: SimpleNamespace(cuda=cuda))
    monkeypatch.setattr(compiler.backend, "function", function)
    return gpu


C_TYPES = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int, ctypes.c_int64)


def gpu_array(device, address=1000):
    y = np.zeros(6, np.float32)
    return Array(flags=y.flags, dtype=y.dtype, data=SimpleNamespace(device_id=device, ptr=address))


def test_a_gpus_kernel_is_looked_up_again_when_it_changes(stand_in):
    kernel = Kernel("copy.cu", "copy")
    for shared_bytes in (0, 0, 64):
        launch(kernel, (5, 3, 2), (32, 4, 1), (None, gpu_array(0), -1, 6), shared_bytes)
    assert stand_in.compiled == [(0, (), 0), (0, (), 64)]
    begun = (5, 3, 2, 32, 4, 1)
    arguments = (None, 1000, -1, 6, 0)
    assert stand_in.started == [(handle, *begun, size, 99, *arguments) for handle, size in ((71, 0), (71, 0), (72, 64))]
    with pytest.raises(RuntimeError, match=r"current device 0; its arrays are on \[0, 1\]"):
        start(gpu_array(0), gpu_array(1), 1, 6)
    with source.override({}, {"copy": {"WIDTH": 4}}):
        start(None, gpu_array(0), 1, 6)
    stand_in.device = 1
    start(None, gpu_array(1), 1, 6)
    assert stand_in.compiled[2:] == [(0, (("WIDTH", 4),), 0), (1, (), 0)]
    assert len(stand_in.started) == 5


def test_a_plan_starts_with_the_arrays_and_numbers_of_each_call(stand_in, monkeypatch):
    prepared = []
    monkeypatch.setattr(compiler.backend, "prepare", prepared.extend)

    def operation(x, y, size, factor):
        launch(SCALE, (5, 3, 2), (32, 4, 1), (x, y, factor, size))
        launch(SCALE, (0, 1, 1), (32, 4, 1), (x, y, factor, size))
        other = threading.Thread(target=lambda: start(None, gpu_array(0), 1, 6))  # is no part of the plan
        other.start()
        other.join()
        launch(SCALE, (1, 1, 1), (32, 1, 1), (None, y.reshape((2, 3))[:1], 2.5, 2**40), 64)

    factor = Varying(1.5)
    factor.index = 3
    places = Slot(0, (6,), np.float32), Slot(1, (6,), np.float32, offset=256)
    plan = Plan(compiler.backend, operation, (*places, 6), {"factor": factor})
    assert [step.kernel for step in plan.steps] == [SCALE] * 2
    stand_in.started.clear()
    stand_in.context = False
    for pointers, value, stream in (((1000, 2000), 0.5, 7), ((3000, 4000), -0.0, 8)):
        plan.start(range(2), [*pointers, 0, 0], [None, None, 6, value], stream)
        bits = np.float32(value).view(np.int32)
        first, second = stand_in.started
        stand_in.started.clear()
        assert first == (71, 5, 3, 2, 32, 4, 1, 0, stream, pointers[0], pointers[1] + 256, bits, 6, 0)
        assert second == (72, *(1, 1, 1, 32, 1, 1), 64, stream, None, pointers[1] + 256, 0x40200000, 2**40, 0)
    assert stand_in.context
    assert prepared == [SCALE] * 2


def test_what_a_plan_refuses_it_refuses_before_anything_starts(stand_in):
    slot = Slot(0, (6,), np.float64)
    with pytest.raises(TypeError, match=r"x is float64, the kernel takes float32"):
        Plan(compiler.backend, lambda x: launch(SCALE, (1, 1, 1), (32, 1, 1), (x, None, 1.0, 6)), (slot,), {})
    slot = Slot(0, (6,), np.float32)
    with pytest.raises(TypeError, match="arrays of one kind"):
        Plan(
            compiler.backend,
            lambda x: launch(SCALE, (1, 1, 1), (32, 1, 1), (x, np.ones(6, np.float32), 1.0, 6)),
            (slot,),
            {},
        )
    assert not stand_in.started


def test_numbers_that_do_not_fit(arguments):
    x, y, _, size = arguments
    message = r"offset=2147483648 does not fit int32, which holds -2147483648 to 2147483647"
    with pytest.raises(ValueError, match=message) as error:
        start(x, y, 2**31, size)
    assert error.value.__suppress_context__
    start(x, y, -1, 2**40, block=(6, 1, 1))


@pytest.mark.parametrize(
    ("dtype", "rounded", "refused"),
    [(np.float16, 65519.0, 65520.0), (np.float32, 3.4028235e38, 2.0**128 - 2.0**103), (np.float64, 1.7e308, None)],
)
def test_numbers_that_are_infinite_in_a_smaller_type(dtype, rounded, refused):
    parameter = source.Parameter("p", np.dtype(dtype), False, False, False)
    for number in (rounded, -rounded, math.inf, -math.inf, -0.0, math.nan):
        assert word(number, parameter).to_bytes(8, sys.byteorder)[: dtype().itemsize] == dtype(number).tobytes()
    for number in (refused, -refused) if refused else ():
        with pytest.raises(ValueError, match=f"p={re.escape(str(number))} does not fit {np.dtype(dtype)}, which holds"):
            word(number, parameter)


KINDS = """#include "common.cuh"
extern "C" __global__ void together(const float* x, float* y, int a, i64 n) { grid_barrier(); }
extern "C" __global__ void early(const float* x, float* y, int a, i64 n) {
    // the first statement
    wait_for_earlier_kernels();
    y[0] = a;
}
extern "C" __global__ void late(const float* x, float* y, int a, i64 n) { y[0] = a; wait_for_earlier_kernels(); }
extern "C" __global__ void plain(const float* x, float* y, int a, i64 n) {
    /* no grid_barrier(); wait_for_earlier_kernels(); */
}
"""


def test_a_kernel_is_launched_as_it_asks(stand_in, monkeypatch):
    """Overlapping only if the driver knows that, and if the kernel's code waits: what is compiled for 8.6 does not."""
    begun, together = [], []

    def begin(address, handle, parameters, extra):
        config = driver.Config.from_address(address)
        attribute = config.attributes[0]
        sizes = (*config.grid, *config.block, config.shared_bytes, config.stream, config.count)
        begun.append((handle, *sizes, attribute.id, *attribute.value[:2]))
        return 0

    compiler.cupy().cuda.driver.launchCooperativeKernel = lambda *numbers: together.append(numbers[:-1])
    monkeypatch.setattr(driver, "launcher", lambda: begin)
    with source.override({"kinds.cu": KINDS}):
        for overlaps, stand_in.ptx_version in ((True, 90), (True, 86), (False, 90)):
            monkeypatch.setattr(driver, "overlaps", lambda overlaps=overlaps: overlaps)
            for name in ("together", "early", "late", "plain"):
                launch(Kernel("kinds.cu", name), (5, 1, 1), (32, 1, 1), (None, gpu_array(0), -1, 6))
    launched = 71, 5, 1, 1, 32, 1, 1, 0, 99
    assert begun == [(*launched, 1, 6, 1, 0)]
    assert together == [launched] * 3
    assert len(stand_in.started) == 2 + 3 + 3


def test_an_overlapping_launch_goes_to_the_stream_of_its_start(monkeypatch):
    streams = []
    begin = lambda address, *_: streams.append(driver.Config.from_address(address).stream) or 0  # noqa: E731
    monkeypatch.setattr(driver, "launcher", lambda: begin)
    context = SimpleNamespace(ctxGetCurrent=lambda: 1, launchKernel=None, CUDADriverError=RuntimeError)
    monkeypatch.setattr(compiler, "cupy", lambda: SimpleNamespace(cuda=SimpleNamespace(driver=context)))
    packed = SimpleNamespace(config=driver.Config((1, 1, 1), (32, 1, 1), 0), numbers=(71,), parameters=0, step=None)
    for stream in (99, 7, 7, 0):
        compiler.Gpu().start([packed], stream)
    assert streams == [99, 7, 7, 0]


def test_packaged_kernels_may_overlap():
    """Each but those that CUDA starts cooperatively, which have another attribute."""
    kernels = [
        Kernel(file, name) for file in source.names() if file.endswith(".cu") for name in source.kernel_names(file)
    ]
    assert len(kernels) > 80
    for kernel in kernels:
        assert source.overlapping(kernel) != source.cooperative(kernel), kernel
