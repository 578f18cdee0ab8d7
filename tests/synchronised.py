"""Modules in two processes, which have a part of each batch, beside the same in one process that has all of it."""

import copy
import functools
from contextlib import nullcontext

import torch
from faults import planted
from torch import nn

from modelnew import Model, ModelNew, Sequential, convert_sync_batchnorm, layers

FUSED = (16, 16, 3, 1, 1, 1, 4)


def run(module, batches, call=None):
    """Results of each step, in training and then in evaluation; with the last, parameters' gradients and buffers."""
    found = []
    module.train()
    for x, dy in batches:
        x = x.clone().requires_grad_()
        y = module(x) if call is None else call(x)
        y.backward(dy.to(y.dtype))
        found.append({"output": y.detach(), "dx": x.grad})
        if list(module.buffers()):  # without any, evaluation has the statistics of the rank's own batch
            with torch.no_grad():
                found[-1]["evaluation"] = module.eval()(x)
            module.train()
    parameters = {name: p.grad for name, p in module.named_parameters()}
    return found, parameters, {name: b.clone() for name, b in module.named_buffers()}


def run_part(rank, module, batches, wrap=None, fault=None):
    """`run` of the rank's part of each batch, with `module` synchronised. wrap(module): what is called instead."""
    module = convert_sync_batchnorm(module)
    with planted(*fault) if fault else nullcontext():
        return run(module, [(x[rank], dy[rank]) for x, dy in batches], wrap and wrap(module))


def in_both(ranks, module, batches, splits, **options):
    """What `run` gives, of both ranks together."""
    parts = [tuple(list(map(copied, t.split(split))) for t in batch) for batch, split in zip(batches, splits)]
    (steps, gradients, buffers), (others, other_gradients, other_buffers) = ranks.run(
        functools.partial(run_part, **options), module, parts
    )
    for name, buffer in buffers.items():
        assert torch.equal(buffer, other_buffers[name]), name
    steps = [{name: torch.cat((one[name], other[name])) for name in one} for one, other in zip(steps, others)]
    summed = {name: (g.double() + other_gradients[name].double()).to(g.dtype) for name, g in gradients.items()}
    return steps, summed, buffers


def copied(tensor):
    """A part of a tensor, which pickles no more than it is."""
    return tensor.clone(memory_format=torch.preserve_format)


def batches_of(shape, splits, dtype, module):
    """(x, dy) for each split. Means differ from image to image."""
    found = []
    for split in splits:
        images = sum(split)
        x = (torch.randn(images, *shape) * 2 + 3 * torch.randn(images, *[1] * len(shape))).to(dtype)
        with torch.no_grad():
            y = copy.deepcopy(module).to(dtype)(x)
        found.append((x, torch.randn(y.shape).to(dtype)))
    return found


def of_both(name, options):
    """Our layer and torch's, with the same random parameters."""
    ours, theirs = getattr(layers, name), getattr(nn, name)
    options, bias = dict(options), options.get("bias", True)
    options.pop("bias", None)
    module = theirs(options.pop("channels"), **options)
    with torch.no_grad():
        for p in module.parameters():
            p.copy_(torch.randn(p.shape))
    if not bias:
        module.register_parameter("bias", None)
    mine = ours(module.num_features, **options, bias=bias)
    mine.load_state_dict(module.state_dict())
    return mine, module


def models(cls="fp32", chain=False):
    """ModelNew, or a chain with LeakyReLU and other layers around, and torch's modules with the same state."""
    theirs, ours = Model(*FUSED, device="cpu"), ModelNew(*FUSED, numerics=cls, device="cpu")
    with torch.no_grad():
        for p in theirs.parameters():
            p.add_(torch.randn(p.shape) / 2)
    if chain:
        kinds = theirs.conv_transpose, theirs.batch_norm, nn.LeakyReLU(0.1), theirs.max_pool, theirs.group_norm
        theirs = nn.Sequential(nn.Conv2d(3, 16, 1, bias=False), nn.BatchNorm2d(16), *kinds, nn.Conv2d(16, 4, 1))
        chain = ours.conv_transpose, ours.batch_norm, layers.LeakyReLU(0.1), ours.max_pool, ours.group_norm
        ours = Sequential(nn.Conv2d(3, 16, 1, bias=False), layers.BatchNorm2d(16), *chain, nn.Conv2d(16, 4, 1))
    ours.load_state_dict(theirs.state_dict())
    return ours, theirs
