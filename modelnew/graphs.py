"""`graphed`: a module as CUDA graphs, which launch all its kernels at once. That saves host time for small batches."""

import contextlib
import gc
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

_WARM_UP = 3  # calls before a graph is captured, as torch.cuda.make_graphed_callables has it
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def graphed(module: nn.Module, *example: torch.Tensor) -> Callable[..., Any]:
    """A function that computes module(*inputs) by CUDA graphs, for inputs like `example`.

    module: a module whose kernels depend on shapes only, see torch.cuda.make_graphed_callables.
    example: CUDA tensors with the shapes, dtypes, memory formats and requires_grad of the later inputs. Their values,
        and the module's buffers and gradients, are not changed.

    If grad mode is on and the example or a parameter requires a gradient, the backward is a graph too: the result can
    be differentiated once. Otherwise there is a forward only.

    Each call copies its inputs. It reads the module's parameters and buffers at their addresses: optimizers and
    load_state_dict may change the values, but `.to` and assign=True must not replace the tensors. In training mode,
    each call updates the running statistics. The next call overwrites a result; clone it to keep it.

    Raises RuntimeError if module and example are not on one GPU, TypeError for what is no module or no tensor, and
    ValueError for hooks, which a graph would skip, and for a batch norm in training with momentum=None, which needs the
    host. The returned function raises ValueError for inputs unlike the example, and RuntimeError if training mode has
    changed or gradients are needed but have no graph: call graphed again.
    """
    _check(module, example)
    return _Graphed(module, example)


def _check(module, example):
    if not isinstance(module, nn.Module):
        raise TypeError(f"graphed takes a torch.nn.Module, received {type(module).__name__}: write one that calls it")
    if not example:
        raise TypeError("graphed needs the tensors that the module is called with, received none")
    for tensor in example:
        if not isinstance(tensor, torch.Tensor):
            raise TypeError(f"graphed takes tensors as an example, received {type(tensor).__name__}")
    devices = {t.device for t in (*example, *module.parameters(), *module.buffers())}
    if len(devices) > 1 or next(iter(devices)).type != "cuda":
        raise RuntimeError(
            f"graphed takes a module and tensors on one CUDA GPU, received {', '.join(sorted(map(str, devices)))}; "
            "use .to('cuda'), or on a CPU the module itself"
        )
    for name, child in module.named_modules():
        if any(getattr(child, hooks) for hooks in _HOOKS):
            raise ValueError(f"{name or 'the module'} has hooks, which a graph leaves out: remove them before")
        if isinstance(child, _BatchNorm) and child.training and child.track_running_stats and child.momentum is None:
            raise ValueError(f"{name or 'the module'} has momentum=None, which the host computes: give it a number")


class _Graphed:
    def __init__(self, module, example):
        self.module = module
        self.example = [t.detach().clone().requires_grad_(t.requires_grad) for t in example]
        self.differentiable = self._wants_gradients()
        self.training = self._training()
        before = [buffer.clone() for buffer in module.buffers()]
        try:
            gc.collect()
            with no_garbage_collector():  # if it unloaded an edited kernel, it would end a capture
                if self.differentiable:
                    self.run = torch.cuda.make_graphed_callables(_Held(module), tuple(self.example), _WARM_UP)
                else:
                    self.run = _forward_graph(module, self.example)
        finally:
            with torch.no_grad():
                for buffer, value in zip(module.buffers(), before):
                    buffer.copy_(value)

    def _wants_gradients(self):
        return torch.is_grad_enabled() and any(t.requires_grad for t in (*self.example, *self.module.parameters()))

    def _training(self):
        return [child.training for child in self.module.modules()]

    def __call__(self, *inputs: torch.Tensor):
        self._check(inputs)
        return self.run(*inputs)

    def _check(self, inputs):
        if len(inputs) != len(self.example):
            raise ValueError(f"it was made for {len(self.example)} tensors, received {len(inputs)}")
        for given, expected in zip(inputs, self.example):
            if (given.shape, given.dtype, given.device) != (expected.shape, expected.dtype, expected.device):
                raise ValueError(
                    f"it was made for {expected.dtype} of shape {tuple(expected.shape)} on {expected.device}, received "
                    f"{given.dtype} of shape {tuple(given.shape)} on {given.device}"
                )
            if given.requires_grad and not expected.requires_grad and torch.is_grad_enabled():
                raise ValueError("it was made for an input that requires no gradient: use .detach(), or make one anew")
        if self.training != self._training():
            raise RuntimeError("the module is in another mode (train or eval) than when this was made: make one anew")
        if not self.differentiable and self._wants_gradients():
            raise RuntimeError("it was made without gradients: call it under torch.no_grad(), or make one anew")


@contextlib.contextmanager
def no_garbage_collector():
    """Turns the garbage collector off."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


class _Held(nn.Module):
    """A wrapper of a module, so that make_graphed_callables does not replace the module's own `forward`."""

    def __init__(self, module):
        super().__init__()
        self.module = module
        self.training = module.training

    def forward(self, *inputs):
        return self.module(*inputs)


def _forward_graph(module, static):
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    with torch.no_grad():
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(_WARM_UP):
                module(*static)
        torch.cuda.current_stream().wait_stream(stream)
        with torch.cuda.graph(graph):
            result = module(*static)

    def run(*inputs):
        with torch.no_grad():
            for memory, given in zip(static, inputs):
                memory.copy_(given)
            graph.replay()
        return result

    return run
