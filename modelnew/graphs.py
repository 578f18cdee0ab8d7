"""CUDA graphs of a module: its kernels are started together, so that small batches do not wait for the host."""

import contextlib
import gc
from collections.abc import Callable

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

_WARM_UP = 3  # calls before a graph is captured, as torch.cuda.make_graphed_callables has it
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def graphed(module: nn.Module, *example: torch.Tensor) -> Callable:
    """A function that computes module(*inputs), for inputs like `example`, by CUDA graphs.

    Where gradients may be asked for, the backward is a graph, too: the function's result is differentiated as the
    module's is, once. It is made for that if grad mode is on, and the example or a parameter requires a gradient;
    otherwise it is a forward alone. Any module will do whose kernels depend on shapes only; see
    torch.cuda.make_graphed_callables.

    example: CUDA tensors of the shapes, dtypes, memory formats and requires_grad that inputs will have. Its values, and
        the module's buffers and gradients, stay as they are.

    The function copies its inputs and reads the module's parameters and buffers where they lie: optimizers and
    load_state_dict may change them, `.to` and assign=True may not put others in their places. Training mode updates
    running statistics at each call. A result is overwritten by the next call: clone what is to stay.

    Raises RuntimeError if the module or the example is not on one GPU, TypeError for an example that is no tensor, and
    ValueError for hooks, which a graph would leave out, and for a batch norm in training with momentum=None, which
    needs the host. The function raises ValueError for other inputs, and RuntimeError in another mode of training or
    gradients than it was made in: make one for each.
    """
    _check(module, example)
    return _Graphed(module, example)


def _check(module, example):
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
            with _no_garbage():
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
def _no_garbage():
    """The garbage collector rests: a kernel that it unloads, of a text that was edited, would end a capture."""
    gc.collect()
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


class _Held(nn.Module):
    """Stands for a module whose `forward` make_graphed_callables is not to replace."""

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
