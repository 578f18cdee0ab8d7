"""Faults of the machine: no memory, or a launch that fails, at each point of a call."""

import contextlib
import copy
import itertools
import math
import types

import pytest
import torch

from cupy_kernels import compiler, emulator
from cupy_kernels.driver import Config
from modelnew import ModelNew, calls, layers, replays, shortcuts

pytestmark = pytest.mark.usefixtures("one_thread", "fresh_plans")

MODULES = {
    "Tanh": (layers.Tanh, (2, 4, 6, 6)),
    "LeakyReLU": (layers.LeakyReLU, (2, 4, 6, 6)),
    "MaxPool2d": (lambda: layers.MaxPool2d(2), (2, 4, 6, 6)),
    "BatchNorm2d": (lambda: layers.BatchNorm2d(4), (2, 4, 6, 6)),
    "BatchNorm2d, momentum=None": (lambda: layers.BatchNorm2d(4, momentum=None), (2, 4, 6, 6)),
    "GroupNorm": (lambda: layers.GroupNorm(2, 4), (2, 4, 6, 6)),
    "ConvTranspose2d": (lambda: layers.ConvTranspose2d(4, 3, 3, stride=2), (2, 4, 6, 6)),
    "ModelNew": (lambda: ModelNew(4, 8, 3, 1, 1, 1, 2, device="cpu"), (2, 4, 6, 6)),
    "ModelNew, fused": (lambda: ModelNew(16, 32, 3, 1, 1, 4, 4, numerics="fp32", device="cpu"), (2, 16, 4, 4)),
}


def step(module, x, reached=None):
    """Output and all gradients. reached: a list, which grows when the forward is done."""
    module.zero_grad()
    x = x.clone().requires_grad_()
    y = module(x)
    if reached is not None:
        reached.append("backward")
    y.backward(torch.linspace(-1, 1, y.numel()).view(y.shape))
    return [y.detach(), x.grad, *(p.grad for p in module.parameters())]


def state(module):
    return [t.clone() for t in module.state_dict().values()]


def equal(found, expected):
    return all(map(torch.equal, found, expected))


class FaultError(RuntimeError):
    """What a launch raises here."""


@contextlib.contextmanager
def no_memory(number):
    """The allocation of this number fails."""
    allocate, count = torch.empty_strided, itertools.count()

    def fail(*args, **options):
        if next(count) == number:
            raise torch.OutOfMemoryError("out of memory")
        return allocate(*args, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "empty_strided", fail)
        yield torch.OutOfMemoryError


@contextlib.contextmanager
def no_launch(number):
    """The launches of this number's start, and those behind, fail."""
    start, count = emulator.backend.start, itertools.count()

    def fail(launches, stream):
        for launch in launches:
            if next(count) == number:
                raise FaultError
            start([launch], stream)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(emulator.backend, "start", fail)
        yield FaultError


@pytest.mark.parametrize("fault", [no_memory, no_launch], ids=lambda fault: fault.__name__)
@pytest.mark.parametrize("name", MODULES)
def test_a_call_that_fails_leaves_all_as_it_was_or_done(monkeypatch, name, fault):
    """And the next one is right. Every tensor here counts as large, so that it is allocated as late as may be."""
    monkeypatch.setattr(calls, "_LARGE", 1)
    make, shape = MODULES[name]
    module, x = make(), torch.randn(shape)
    done = copy.deepcopy(module)
    expected, before, after = step(done, x), state(module), state(done)
    for number in itertools.count():
        tried, reached = copy.deepcopy(module), []
        with fault(number) as error:
            try:
                step(tried, x, reached)
                break
            except error:
                pass
        found = state(tried)
        assert equal(found, before) or equal(found, after)
        if reached:
            assert equal(found, after)
        elif fault is no_memory and name != "ModelNew":  # of whose operators the first may be done
            assert equal(found, before)
        if equal(found, before):
            assert equal(step(tried, x), expected)
            assert equal(state(tried), after)
        else:
            tried.load_state_dict(module.state_dict())
            assert equal(step(tried, x), expected)
    assert number > 1


@pytest.mark.parametrize("name", MODULES)
def test_a_repeated_call_that_gets_no_memory_leaves_all_as_it_was_or_done(monkeypatch, name):
    """Replays allocate by a function of their own."""
    allocate, left = shortcuts.allocator(torch.device("cpu")), [math.inf]

    def limited(*layout):
        left[0] -= 1
        if left[0] < 0:
            raise torch.OutOfMemoryError("out of memory")
        return allocate(*layout)

    monkeypatch.setattr(replays, "allocator", lambda device: limited)
    make, shape = MODULES[name]
    module, x = make(), torch.randn(shape)
    done = copy.deepcopy(module)
    expected, before, after = step(done, x), state(module), state(done)
    for _ in range(3):
        step(copy.deepcopy(module), x)
    for number in itertools.count():
        tried, left[0] = copy.deepcopy(module), number
        with contextlib.suppress(torch.OutOfMemoryError):
            step(tried, x)
            break
        found, left[0] = state(tried), math.inf
        assert equal(found, before) or equal(found, after)
        tried.load_state_dict(module.state_dict())
        assert equal(step(tried, x), expected)
    assert number > 1


def test_what_cuda_says_of_a_launch_is_passed_on_with_the_kernel(monkeypatch):
    class CUDADriverError(RuntimeError):
        pass

    def refuse(*_):
        raise CUDADriverError("CUDA_ERROR_ILLEGAL_ADDRESS: an illegal memory access was encountered")

    driver = types.SimpleNamespace(launchKernel=refuse, CUDADriverError=CUDADriverError, ctxGetCurrent=lambda: 1)
    cupy = types.SimpleNamespace(cuda=types.SimpleNamespace(driver=driver))
    monkeypatch.setattr(compiler, "cupy", lambda: cupy)
    monkeypatch.setattr("cupy_kernels.driver.launcher", lambda: lambda *_: 700)
    step = types.SimpleNamespace(kernel="tanh_forward", cooperative=False)
    config = Config((1, 1, 1), (32, 1, 1), 0)
    for how, text in ((None, "CUDA_ERROR_ILLEGAL_ADDRESS"), (config, "700")):
        packed = types.SimpleNamespace(numbers=(71,), parameters=0, step=step, config=how)
        with pytest.raises(RuntimeError, match=rf"tanh_forward: {text}.*CUDA_LAUNCH_BLOCKING"):
            compiler.Gpu().start([packed], 0)
