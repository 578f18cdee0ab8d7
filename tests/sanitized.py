"""Forward and backward of every operator and of the fused model, small, on a device; or "fault" on a GPU.

It ends with the names of the kernels that it has not started. `test_sanitizer` runs it.
"""

import contextlib
import copy
import sys
from unittest import mock

import torch

import cupy_kernels
import modelnew
from cupy_kernels.launch import observed
from modelnew import checks, distributed, inline, layers
from modelnew.cases import first
from modelnew.functional import sync_batch_norm, sync_conv_bn_pool
from modelnew.parity import tf32

LAYERS = [
    (layers.ConvTranspose2d(64, 128, 5, padding=1), (3, 64, 12, 12)),  # resident bands
    (layers.ConvTranspose2d(48, 40, 4, stride=2, padding=1), (2, 48, 9, 10)),  # implicit GEMM
    (layers.ConvTranspose2d(24, 3, 4, stride=2, padding=1), (2, 24, 9, 10)),  # thin
    (layers.ConvTranspose2d(24, 24, 3, groups=24), (2, 24, 9, 10)),  # depthwise
    (layers.BatchNorm2d(40), (3, 40, 9, 10)),
    (layers.BatchNorm2d(40).eval(), (3, 40, 9, 10)),
    (layers.GroupNorm(8, 40), (3, 40, 9, 10)),
    (layers.GroupNorm(8, 64), (2, 64, 48, 48)),
    (layers.MaxPool2d(2), (3, 40, 9, 10)),
    (layers.MaxPool2d(5, 1, 2), (3, 40, 9, 10)),
    (layers.Tanh(), (3, 41, 9, 7)),
    (layers.LeakyReLU(), (3, 41, 9, 7)),
]


def step(module, x, *parameters):
    """One forward and backward."""
    y = first(module(x.requires_grad_()))
    torch.autograd.grad(y, [x, *parameters], torch.randn_like(y))


def check(case, device):
    """One forward and backward of a `modelnew.cases.Case`."""
    tensors = {name: t.to(device) for name, t in case.inputs(None).items()}
    x, *parameters = (t.requires_grad_() for name, t in tensors.items() if not name.startswith("_"))
    with case.within():
        step(lambda _: case.ours(**tensors), x, *parameters)


@contextlib.contextmanager
def one_process():
    """Batch norms synchronise the statistics of this process alone, without a library that exchanges messages."""
    with contextlib.ExitStack() as patches:
        counterpart = lambda _, operation: distributed._synchronised(operation, None)  # noqa: E731
        patches.enter_context(mock.patch.object(distributed.Peers, "counterpart", counterpart))
        for file in (sync_batch_norm, sync_conv_bn_pool):
            patches.enter_context(mock.patch.object(file, "gathered", lambda message, _: message.view(-1).clone()))
        yield


def main(device):
    for case in checks.CASES:
        check(case, device)
    for layer, shape in LAYERS:
        for dtype in (torch.float32, torch.float16):
            for layout in (torch.contiguous_format, torch.channels_last):
                x = torch.randn(shape, device=device, dtype=dtype).to(memory_format=layout)
                step(layer.to(device, dtype), x, *layer.parameters())
    model = modelnew.ModelNew(64, 128, 5, 1, 1, 8, 8).to(device)
    x = torch.randn(3, 64, 32, 32, device=device)
    for allowed in (True, False):
        with tf32(allowed):
            step(model, x, *model.parameters())
    with torch.autocast(device, torch.float16):
        step(model, x, *model.parameters())
    for module in (model, layers.BatchNorm2d(64).to(device)):
        synchronised = modelnew.convert_sync_batchnorm(copy.deepcopy(module))
        with one_process():
            step(synchronised, x, *synchronised.parameters())
    for dtype in (torch.float16, torch.bfloat16):
        step(model.to(dtype), x.to(dtype).to(memory_format=torch.channels_last), *model.parameters())


def fault():
    """Launches a kernel that writes behind its output."""
    text = """
#include "common.cuh"
extern "C" __global__ void behind(const float* x, float* y, i64 size) { y[size] = x[0]; }
"""
    inline.operator(text, "behind")(torch.ones(4, device="cuda"))
    torch.cuda.synchronize()


if __name__ == "__main__":
    torch.manual_seed(0)
    if sys.argv[1] == "fault":
        fault()
    else:
        left = {kernel.name for kernel in cupy_kernels.kernels()}
        with observed(lambda kernel, *_: left.discard(kernel.name)):
            main(sys.argv[1])
        if sys.argv[1] == "cuda":
            torch.cuda.synchronize()
        print("not started:", *sorted(left))
