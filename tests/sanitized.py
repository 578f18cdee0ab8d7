"""Forward and backward of every operator and of the fused model, small; or "fault". `test_sanitizer` runs it."""

import sys

import torch

import modelnew
from modelnew import inline, layers
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


def step(module, x):
    """One forward and backward."""
    x = x.requires_grad_()
    y = module(x)
    torch.autograd.grad(y, [x, *module.parameters()], torch.randn_like(y))


def main():
    torch.manual_seed(0)
    for layer, shape in LAYERS:
        for dtype in (torch.float32, torch.float16):
            for layout in (torch.contiguous_format, torch.channels_last):
                step(layer.to("cuda", dtype), torch.randn(shape, device="cuda", dtype=dtype).to(memory_format=layout))
    model = modelnew.ModelNew(64, 128, 5, 1, 1, 8, 8).cuda()
    for allowed in (True, False):
        with tf32(allowed):
            step(model, torch.randn(3, 64, 32, 32, device="cuda"))
    with torch.autocast("cuda", torch.float16):
        step(model, torch.randn(3, 64, 32, 32, device="cuda"))
    model.half().to(memory_format=torch.channels_last)
    x = torch.randn(3, 64, 32, 32, device="cuda", dtype=torch.float16).to(memory_format=torch.channels_last)
    step(model, x)
    torch.cuda.synchronize()


def fault():
    """Launches a kernel that writes behind its output."""
    text = """
#include "common.cuh"
extern "C" __global__ void behind(const float* x, float* y, i64 size) { y[size] = x[0]; }
"""
    inline.operator(text, "behind")(torch.ones(4, device="cuda"))
    torch.cuda.synchronize()


if __name__ == "__main__":
    fault() if sys.argv[1:] == ["fault"] else main()
