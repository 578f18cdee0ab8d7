"""What the workloads of `bench` are: their shapes, and the least time that a GPU needs."""

import pytest
import torch

from modelnew import workloads
from modelnew.workloads import Shape


def test_floors():
    """The figures of the reference shape, from its arithmetic."""
    mission, gpu = Shape(64, 128, 5, 1, 1, 32), workloads.ceilings("NVIDIA H100 80GB HBM3")
    flop = 2 * 512 * 34 * 34 * 128 * 64 * 25
    assert flop == pytest.approx(242.4e9, rel=1e-3)
    (conv,) = workloads.work("conv_forward", "tf32", 512, mission)
    assert conv == (flop, 4 * (512 * 64 * 32 * 32 + 512 * 128 * 34 * 34 + 64 * 128 * 25))
    assert workloads.work("conv_forward", "fp16", 512, mission) == [(flop, conv[1] / 2)]

    def floor(what, cls="tf32"):
        return workloads.floor_ms(what, cls, 512, mission, gpu)

    assert floor("forward_eval") == pytest.approx(0.306, rel=1e-2)
    assert floor("forward_train") == floor("forward_train_grad") == pytest.approx(0.306 + 0.050, rel=1e-2)
    assert floor("dgrad_kernel") == floor("wgrad_kernel") == floor("conv_bn_pool_kernel") == floor("forward_eval")
    ((_, size),) = workloads.work("wgrad_kernel", "tf32", 512, mission)
    assert size == 2 * (512 * 64 * 32 * 32 + 512 * 128 * 34 * 34) + 4 * 64 * 128 * 25
    assert floor("conv_forward", "fp32") == pytest.approx(3 * floor("conv_forward"))
    assert floor("post_conv_forward") == pytest.approx((303 + 75.8) / 3030, rel=1e-2)
    assert floor("step") == pytest.approx(floor("step_no_input_grad") + 0.306, rel=1e-2)
    assert workloads.ceilings("another GPU") is workloads.ceilings(None) is None


def test_contenders():
    """With few images, PyTorch is in a CUDA graph where ModelNew is in one."""
    gpu, both = torch.device("cuda"), ("nchw", "nhwc")
    for what in workloads.MODELS:
        found = workloads.contenders(what, 8, "compile", gpu)
        assert found[:2] == [("modelnew", "nchw"), ("modelnew-graph", "nchw")]
        theirs = ("eager", "compile", "eager-graph", "compile-reduce-overhead")
        assert found[2:] == [(who, layout) for who in theirs for layout in both]
    graphs = {who for who, _ in workloads.contenders("step", 1, "eager", gpu)} & {*workloads.GRAPHS}
    assert graphs == {"modelnew-graph", "eager-graph"}
    assert workloads.contenders("step", 1, "none", gpu) == [("modelnew", "nchw"), ("modelnew-graph", "nchw")]
    for n, device in ((9, gpu), (1, torch.device("cpu"))):
        assert not {who for who, _ in workloads.contenders("step", n, "eager", device)} & {*workloads.GRAPHS}


def test_shape_follows_the_convolution():
    conv = torch.nn.ConvTranspose2d(3, 4, 5, stride=2, padding=1)
    assert conv(torch.zeros(1, 3, 7, 7)).shape[-1] == Shape(3, 4, 5, 2, 1, 7).out_size
