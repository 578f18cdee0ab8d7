"""What the tests of the fused model share: small models beside PyTorch's, and what a call of them gives and takes."""

import copy
import itertools
import math

import numpy as np
import torch

from modelnew import Model, ModelNew, layers

# (in, out, kernel, padding, groups of group norm, batch, height, width)
CASES = {
    "even": (16, 16, 3, 1, 4, 2, 6, 8),
    "odd": (16, 32, 2, 0, 8, 2, 6, 6),
    "odd_width": (16, 16, 3, 1, 1, 3, 4, 7),
    "partial_chunk": (80, 144, 3, 1, 3, 1, 5, 9),
    "many_units": (16, 144, 3, 1, 2, 1, 18, 20),
}
CLASSES = ("tf32", "fp32")


def models(case, cls, device, dtype=torch.float32, activation=None):
    """Model, ModelNew with its state, and a batch, the same on every device. activation: in place of tanh."""
    channels, out, kernel, padding, groups, batch, height, width = case
    arguments = (channels, out, kernel, 1, padding, 1, groups)
    model, ours = Model(*arguments, device=device), ModelNew(*arguments, numerics=cls, device=device)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn(p.shape).to(p) / 2)
        model.batch_norm.weight[0] = 0  # pooling then takes the first corner
        if activation:
            model.batch_norm.weight[1::3].neg_()  # and here the smallest
            model.tanh, ours.tanh = activation, layers.LeakyReLU(activation.negative_slope)
    model.to(dtype)
    ours.to(dtype).load_state_dict(model.state_dict())
    x = torch.randn(batch, channels, height, width).to(device, dtype)
    return model, ours, x


def well_separated(model, x, gap):
    """Where no other value in a pooling window comes near the largest, so that rounding cannot move a gradient."""
    double = copy.deepcopy(model).double()
    with torch.no_grad():
        y = double.tanh(double.batch_norm(double.conv_transpose(x.double())))
    windows = y.unfold(2, 2, 2).unfold(3, 2, 2).flatten(4).sort(-1).values
    return ((windows[..., 3] - windows[..., 2]) > gap) | (windows[..., 3] == windows[..., 0])


def step(model, x, dy):
    """Output and gradients of x and of all parameters."""
    x = x.detach().requires_grad_()
    y = model(x)
    return [y.detach(), *torch.autograd.grad(y, [x, *model.parameters()], dy)]


def sized(shape, dtype):
    return math.prod(shape) * np.dtype(dtype).itemsize


def peak(function, device):
    """Bytes that torch has allocated at a time while the function runs, at most."""
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        function()
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        function()
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    return max(itertools.accumulate(event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())))
