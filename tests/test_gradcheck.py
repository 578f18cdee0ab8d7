"""Both derivatives in float64, of every function, with random hyper-parameters and in both memory formats."""

import random

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck

from modelnew import functional

pytestmark = pytest.mark.usefixtures("one_thread")


class Draw(random.Random):
    """Random arguments of functions."""

    def tensor(self, *shape):
        return torch.randn(shape, dtype=torch.float64)

    def apart(self, *shape):
        """Values that no small step makes change their order, or their sign."""
        size = torch.Size(shape).numel()
        return ((torch.randperm(size).double() + 0.3) / size * 3 - 1.5).view(shape)

    def affine(self, channels):
        """A weight and a bias, or no bias, or neither."""
        return [self.tensor(channels) for _ in range(self.randint(0, 2))]

    def planes(self):
        return self.apart(self.randint(1, 2), self.choice([2, 4]), self.randint(5, 6), self.randint(5, 6))

    def window(self):
        kernel = self.randint(2, 3), self.randint(1, 3)
        window = {"kernel_size": kernel, "stride": (self.randint(1, 3), self.randint(1, 3))}
        window |= {"padding": tuple(self.randint(0, k // 2) for k in kernel), "dilation": self.randint(1, 2)}
        return self.choice([{"kernel_size": 2}, window]) | {"ceil_mode": self.random() < 0.5}


def leaky_relu(draw):
    slope = draw.uniform(-1, 2)
    return lambda x: functional.leaky_relu(x, slope), draw.planes()


def max_pool2d(draw):
    window = draw.window()
    return lambda x: functional.max_pool2d(x, **window), draw.planes()


def tanh_max_pool2d(draw):
    window = draw.window()
    return lambda x: functional.tanh_max_pool2d(x, **window), draw.planes()


def group_norm(draw):
    groups, eps = draw.randint(1, 2), 10 ** draw.uniform(-5, -1)
    x = draw.tensor(2, 2 * groups, *draw.choice([(), (3,), (3, 2), (2, 2, 2)]))
    return lambda x, *affine: functional.group_norm(x, groups, *affine, eps=eps), x, *draw.affine(x.shape[1])


def norm(name, planes=False):
    def build(draw):
        x = draw.planes() if planes else draw.apart(3, 4, *draw.choice([(), (3,), (3, 2), (2, 2, 2)]))
        training, mean = draw.random() < 0.5, draw.tensor(x.shape[1])
        running = () if training else (mean, mean.square() + 0.5)
        more = (draw.window() if planes else {}) | {"training": training, "eps": 10 ** draw.uniform(-5, -1)}
        function = getattr(functional, name)

        def call(x, *affine):
            statistics = [t.to(x.device) for t in running] or (None, None)
            return function(x, *statistics, *affine, **more)

        return call, x, *draw.affine(x.shape[1])

    return build


def conv_transpose2d(draw):
    groups, stride, dilation = draw.randint(1, 2), draw.randint(1, 3), draw.randint(1, 2)
    conv = {"stride": stride, "padding": draw.randint(0, 1), "groups": groups, "dilation": (1, dilation)}
    conv["output_padding"] = draw.randint(0, stride - 1)
    size, kernel = (draw.randint(2, 3), draw.randint(2, 3)), (draw.randint(1, 3), draw.randint(2, 3))
    channels, outputs = groups * draw.randint(1, 2), draw.randint(1, 2)
    tensors = draw.tensor(2, channels, *size), draw.tensor(channels, outputs, *kernel)
    bias = [draw.tensor(groups * outputs)] * draw.randint(0, 1)
    return lambda *tensors: functional.conv_transpose2d(*tensors, **conv), *tensors, *bias


BUILDERS = {  # of functions that take more than one tensor, or have hyper-parameters
    "leaky_relu": leaky_relu,
    "max_pool2d": max_pool2d,
    "tanh_max_pool2d": tanh_max_pool2d,
    "group_norm": group_norm,
    "batch_norm": norm("batch_norm"),
    "batch_norm_tanh": norm("batch_norm_tanh"),
    "bn_tanh_max_pool2d": norm("bn_tanh_max_pool2d", planes=True),
    "conv_transpose2d": conv_transpose2d,
}


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("name", [name for name in functional.__all__ if not name.startswith("conv_bn_")])  # float32
def test_derivatives(device, name, last, seed):
    torch.manual_seed(seed)
    build = BUILDERS.get(name, lambda draw: (getattr(functional, name), draw.planes()))
    function, *tensors = build(Draw(f"{name} {seed}"))
    if last:
        formats = {4: torch.channels_last, 5: torch.channels_last_3d}
        tensors = [t.contiguous(memory_format=formats.get(t.dim(), torch.contiguous_format)) for t in tensors]
    tensors = [t.to(device).requires_grad_() for t in tensors]
    assert gradcheck(function, tensors, fast_mode=True)
    assert gradgradcheck(function, tensors, fast_mode=True)
