"""The border to torch: shared memory, no memory of CuPy's, torch's stream and device, and refusals."""

import gc
import sys
import weakref

import numpy as np
import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx

from cupy_kernels import backend, common, compiler, source
from cupy_kernels.errors import BackendError
from cupy_kernels.launch import launch
from cupy_kernels.plan import Slot, parts, room
from cupy_kernels.source import Kernel
from modelnew import calls, checks, functional, interop
from modelnew.cases import first

DTYPES = [*interop.FLOATS, torch.uint8, torch.int32, torch.int64]
COPY_TEXT = """#include "common.cuh"
extern "C" __global__ void copy(const float* x, float* y, int size) {
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i < size) y[i] = x[i];
}"""
COPY = Kernel("copy.cu", "copy")


def gpu_only(function):
    return pytest.mark.gpu(pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")(function))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_memory_is_shared(device, dtype):
    tensor = torch.arange(12, device=device).to(dtype).reshape(3, 4)
    part = tensor[1:]
    array = interop.view(part)
    assert common.address(array) == part.data_ptr()
    assert (array.shape, array.dtype) == ((2, 4), interop.NUMPY[dtype])
    part[0, 1] = 7
    array = array if device == "cpu" else array.get()
    assert array[0, 1] == (7 if dtype != torch.bfloat16 else 0x40E0)  # the bits of 7


def test_a_kernel_writes_into_the_tensor(device):
    text = """extern "C" __global__ void write(float* y) { y[threadIdx.x] = threadIdx.x; }"""
    y = torch.empty(8, device=device)
    with source.override({"write.cu": text}):
        calls.run(lambda a: launch(Kernel("write.cu", "write"), (1, 1, 1), (8, 1, 1), (a,)), y)
    assert y.tolist() == list(range(8))


def test_what_was_compiled_together_is_ready(device, monkeypatch):
    text = 'extern "C" __global__ void write(float* y) { y[threadIdx.x] = VALUE; }'
    seen = []
    monkeypatch.setattr(backend, "_listeners", [seen.append])
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
    calls.run(lambda *arrays: shapes.extend(a.shape for a in arrays), leaf, empty)
    assert shapes == [(2,), (0, 3)]


def test_arrays_that_share_memory():
    arrays = {"a": ((3, 5), np.float32), "none": ((0, 2), np.int32), "b": ((7,), np.uint8)}
    memory = np.zeros(room(arrays), np.uint8)
    for whole in (memory, Slot(0, memory.shape, np.uint8)):
        found, end = parts(whole, arrays), common.address(whole)
        for name, (shape, dtype) in arrays.items():
            array = found[name]
            assert (array.shape, array.dtype) == (shape, np.dtype(dtype))
            assert common.address(array) == end or not array.size
            end += -(-array.size * array.itemsize // 256) * 256
        assert end == common.address(whole) + memory.size


def test_memory_of_a_call(device, monkeypatch):
    """Results and workspaces hold what kernels write; a large workspace is given back when no kernel needs it."""
    monkeypatch.setattr(calls, "_LARGE", 3 * 4096)
    alive = []

    def operation(new, x, size):
        small = new.scratch(10, np.float32)
        first, second = new.scratch((64, 64), np.float32), new.scratch(4096, np.float32)
        y = new((4096,), np.float32)
        for read, written in ((x, first), (first, small), (x, second), (second, y)):
            launch(COPY, (32, 1, 1), (128, 1, 1), (read, written, written.size))
        return y

    empty = torch.empty_strided

    def watched(*args, **options):
        alive.append(weakref.ref(tensor := empty(*args, **options)))
        order.append(sum(ref() is not None for ref in alive))
        return tensor

    x = torch.randn(4096, device=device)
    with source.override({"copy.cu": COPY_TEXT}):
        for _ in range(2):
            order = []
            monkeypatch.setattr(torch, "empty_strided", watched)
            y = calls.call(operation, x, 4096)
            monkeypatch.undo()
            monkeypatch.setattr(calls, "_LARGE", 3 * 4096)
            assert torch.equal(y, x)
            assert order == [1, 2, 2, 3], order  # first, small; then second and the result
            del y
            alive.clear()


def test_what_is_no_tensor_passes_unchanged(device):
    received = []
    calls.run(lambda *args, **options: received.extend([args[1:], options]), torch.ones(1, device=device), None, 2, a=3)
    assert received == [(None, 2), {"a": 3}]


def views():
    """Tensors of every layout, and what shows the same."""
    x = torch.randn(4, 6)
    yield from (x, x.T, x[1:], x[::2, 1::3], x[:, :1].expand(4, 5), x[0, 0], x[:0], torch.empty(3, 0, 2))
    yield from (x.double(), x.half(), torch.arange(5, dtype=torch.uint8)[2:], torch.arange(3), torch.tensor([True]))


@pytest.mark.parametrize("tensor", list(views()), ids=lambda t: f"{list(t.shape)}{t.dtype}")
def test_views_of_every_layout(tensor):
    array = interop.view(tensor)
    assert array.shape == tuple(tensor.shape)
    assert array.tolist() == tensor.tolist()
    assert array.flags.writeable
    if tensor.numel():
        assert array.ctypes.data == tensor.data_ptr()
        assert array.strides == tuple(s * tensor.element_size() for s in tensor.stride())


def test_an_array_keeps_its_memory_and_no_more():
    tensor = torch.arange(1000)
    held, array = weakref.ref(tensor), interop.view(tensor)
    del tensor
    gc.collect()
    assert held() is not None
    assert array.tolist() == list(range(1000))
    del array
    assert held() is None


def test_views_that_no_memory_holds():
    x = torch.complex(torch.ones(2), torch.ones(2))
    for tensor in (x.conj(), x.conj().imag):
        with pytest.raises(RuntimeError, match=r"negated or conjugated view.*resolve_neg"):
            interop.view(tensor)
    freed = torch.ones(2)
    freed.untyped_storage().resize_(0)
    with pytest.raises(RuntimeError, match=r"without memory: its storage was freed"):
        interop.view(freed)


def test_dense():
    x = torch.randn(3, 4)
    assert interop.dense(None) is None
    assert interop.dense(x).data_ptr() == x.data_ptr()
    assert interop.dense(x.T).is_contiguous()
    negative = torch.complex(x, x).conj().imag
    assert negative.is_neg()
    assert torch.equal(interop.dense(negative), -x)


@pytest.mark.parametrize("size", [0, 3])
def test_a_tensor_on_no_device_that_runs_kernels(size):
    with pytest.raises(RuntimeError, match=r"kernels run on CUDA GPUs.*received tensors on meta"):
        calls.run(pytest.fail, torch.ones(size, device="meta"))


def test_tensors_on_two_devices():
    with pytest.raises(RuntimeError, match=r"one device, received cpu, meta; use \.to"):
        calls.run(pytest.fail, torch.ones(1), torch.ones(1, device="meta"))


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


@pytest.mark.parametrize(
    ("convert", "accepted", "refused", "error", "allowed"),
    [
        (
            interop.number,
            [(3, 3.0), (np.float32(0.5), 0.5), (torch.tensor([2]), 2.0)],
            ["1", 1j, torch.ones(2), torch.tensor(1j), np.ones(1)],
            TypeError,
            "a number",
        ),
        (interop.number, [], [10**400, -(10**400)], ValueError, "a number that a float can hold"),
        (
            interop.pair,
            [(2, (2, 2)), ([3], (3, 3)), (torch.Size([1, 2]), (1, 2)), ((torch.tensor(1), np.int64(2)), (1, 2))],
            [
                torch.ones(2).int(),
                np.array(2),
                np.array([2, 2]),
                {2: 3},
                {2, 3},
                b"22",
                range(2),
                "2",
                True,
                (),
                (1, 2, 3),
            ],
            ValueError,
            "an int or a pair of ints",
        ),
        (
            interop.flag,
            [(True, True), (0, False), (np.bool_(True), True)],
            ["False", None, torch.tensor(True), 1.0],
            TypeError,
            "True or False",
        ),
    ],
)
def test_arguments(convert, accepted, refused, error, allowed):
    for value, expected in accepted:
        assert repr(convert(value, "what")) == repr(expected)
    for value in refused:
        with pytest.raises(error, match=f"what must be {allowed}, received "):
            convert(value, "what")


def test_a_flag_that_is_a_symbol():
    def pooled(x):
        return functional.max_pool2d(x, 2, ceil_mode=x.shape[0] > 1)

    graph = make_fx(pooled, tracing_mode="symbolic")(torch.ones(2, 3, 5, 5))
    assert graph(torch.ones(3, 3, 5, 5)).shape == (3, 3, 3, 3)


OPERATORS = {case.what: case for case in checks.CASES}


def operands(name, device, seed=3):
    torch.manual_seed(seed)
    tensors = {key: tensor.to(device) for key, tensor in OPERATORS[name].inputs(None).items()}
    return {key: tensor.requires_grad_(not key.startswith("_")) for key, tensor in tensors.items()}


def call(name, tensors):
    with OPERATORS[name].within():
        return first(OPERATORS[name].ours(**tensors))


def result_and_gradients(name, tensors):
    y = call(name, tensors)
    return [y, *torch.autograd.grad(y.sum(), [tensor for tensor in tensors.values() if tensor.requires_grad])]


@pytest.mark.parametrize("name", OPERATORS)
def test_storages_can_be_resized(device, name):
    """As FSDP does, to free what it has gathered. After `tensor.numpy()` a storage never can."""
    tensors = operands(name, device)
    before = [tensor.detach().clone() for tensor in tensors.values()]
    results = result_and_gradients(name, tensors)
    expected = results[0].tolist()
    for tensor in (*tensors.values(), *results):
        tensor.untyped_storage().resize_(0)
    for tensor, values in zip(tensors.values(), before):
        tensor.untyped_storage().resize_(values.nbytes)
        tensor.detach().copy_(values)
    assert call(name, tensors).tolist() == expected


class Tanhs(torch.utils.data.Dataset):
    def __len__(self):
        return 16

    def __getitem__(self, index):
        return functional.tanh(torch.full((500,), float(index)))


def test_workers_of_a_data_loader_that_are_forked():
    expected = functional.tanh(torch.arange(16.0))[:, None].expand(16, 500)
    for _ in range(8):
        batches = []
        for batch in torch.utils.data.DataLoader(Tanhs(), 4, num_workers=2, multiprocessing_context="fork", timeout=60):
            functional.tanh(torch.ones(5000))
            batches.append(batch)
        assert torch.equal(torch.cat(batches), expected)
