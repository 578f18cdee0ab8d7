"""`explain`: which kernels a call launches."""

import threading
from collections import Counter
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves, tree_map_only

from cupy_kernels.conv_transpose import Geometry

from . import autocast, fusions, layers
from .calls import planned
from .formats import channels_last
from .functional.conv_transpose_kernels import kernels_of
from .fusions import plan_of
from .interop import NUMPY
from .model import ModelNew, fused_model
from .numerics import choose, resolve
from .replacement import can_be_replaced


def explain(module: nn.Module, /, *args: Any, **options: Any) -> str:
    """Describes which of our kernels module(*args, **options) launches, forward and backward. Returns the text.

    module: a module that contains layers of ours. For ModelNew, ConvTranspose2d, and chains of layers in a
        `modelnew.Sequential`, the text also says why these kernels run. For other modules, it names layers that
        `replace_layers` can replace.
    args, options: its inputs, such as x. For the backward, all outputs of the module get a gradient; under
        torch.no_grad() there is none.

    None of our kernels is launched; their results are zeros, on which the module's other operators run. Buffers, inputs
    and random states are not changed, nor are parameters, unless the module's forward changes them.

    Hooks run, those of parameters too, with gradients of zeros. Raises TypeError for what is no module, and for inputs
    without a tensor, what the module raises, and what torch.func.functional_call raises for it, as for DataParallel.
    """
    if not isinstance(module, nn.Module):
        raise TypeError(f"module must be a torch.nn.Module, received a {type(module).__name__}")
    x = next((value for value in tree_leaves((args, options)) if isinstance(value, torch.Tensor)), None)
    if x is None:
        raise TypeError("explain(module, x) takes what module(x) takes, and received no tensor")
    lines, chains = [], []
    fusions.noted[threading.get_ident()] = chains
    try:
        planned = planned_kernels(module, *args, **options)
    finally:
        fusions.noted.pop(threading.get_ident(), None)
    if isinstance(module, ModelNew):
        lines += _chain(*fused_model(module, x), module.conv_transpose, x)
    elif isinstance(module, layers.ConvTranspose2d):
        lines.append(_convolution(module, x))
    else:
        names = {child: name for name, child in module.named_modules()}
        for children, given in chains:
            of_chain = [names.get(child, type(child).__name__) for child in children]
            found = plan_of(dict(zip(of_chain, children)), given)
            lines += [f"{of_chain[0]} to {of_chain[-1]}: {line}" for line in _chain(*found, children[0], given)]
    for direction, kernels in zip(("forward", "backward"), planned):
        lines.append(f"{direction}: {', '.join(kernel.name for kernel in kernels) or 'no kernel of ours'}")
    theirs = Counter(type(layer).__name__ for layer in module.modules() if can_be_replaced(layer))
    if theirs and not isinstance(module, ModelNew):  # which has its own `replace`
        names = ", ".join(f"{count} {name}" for name, count in theirs.items())
        lines.append(f"PyTorch's, which modelnew.replace_layers can replace: {names}")
    return "\n".join(dict.fromkeys(lines))


def _chain(found, reason, conv, x) -> list[str]:
    """How a chain of layers runs on x, and why not as one operator. found, reason: of `fusions.plan_of`."""
    if reason is None:
        return [f"fused into one operator, tensor cores, {resolve(conv.numerics, x.device)} class"]
    lines = [f"fused into {found}, not one: {reason}" if found else f"not fused: {reason}"]
    if isinstance(conv, layers.ConvTranspose2d):
        lines.append(f"conv_transpose: {_convolution(conv, x)}")
    return lines


def planned_kernels(module: nn.Module, /, *args: Any, **options: Any) -> tuple[list, list]:
    """Our kernels that module(*args, **options) launches, forward and backward, in order. See `explain`."""
    buffers = {name: buffer.clone() for name, buffer in module.named_buffers()}
    tensors = [value for value in tree_leaves((args, options)) if isinstance(value, torch.Tensor)]
    gpus, recorded = {tensor.device for tensor in tensors if tensor.is_cuda}, torch.is_grad_enabled()
    with (
        torch.inference_mode(False),
        torch.set_grad_enabled(recorded),
        torch.random.fork_rng(gpus),
    ):
        leaves = {tensor: (tensor.clone() if tensor.is_inference() else tensor).detach() for tensor in tensors}
        for leaf in leaves.values():
            leaf.requires_grad_(leaf.is_floating_point())
        copies = {tensor: leaf.clone() for tensor, leaf in leaves.items()}  # which the module may change in place
        inputs, named = tree_map_only(torch.Tensor, copies.__getitem__, (args, options))
        with planned() as forward:
            results = torch.func.functional_call(module, buffers, inputs, named)
        with planned() as backward:
            results = [y for y in tree_leaves(results) if isinstance(y, torch.Tensor) and y.requires_grad]
            if results:
                wanted = [t for t in (*leaves.values(), *module.parameters()) if t.requires_grad]
                torch.autograd.grad(results, wanted, list(map(torch.ones_like, results)), allow_unused=True)
    forward, backward = ([kernel for plan in plans for kernel in plan.kernels] for plans in (forward, backward))
    return forward, backward


def _convolution(conv, x) -> str:
    """Which kernels the convolution runs, and why."""
    x, weight = autocast.lower(x if x.dim() == 4 else x.unsqueeze(0), conv.weight)
    geometry = Geometry(conv.stride, conv.padding, conv.output_padding, conv.dilation, conv.groups)
    choice, formats = choose(conv.numerics, x.device), (channels_last(x), channels_last(weight))
    kernels, detail = kernels_of(NUMPY[x.dtype], x.shape, weight.shape, geometry, choice, formats)
    if kernels in ("depthwise", "thin"):
        return f"{kernels} kernels, in float32's precision"
    if kernels == "general":
        return f"general kernels, in float32's precision, because {detail}"
    return f"tensor cores, {choice.cls} class, by {kernels}"
