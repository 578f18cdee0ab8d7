"""Detects what records PyTorch's operators, and refuses what cannot be supported."""

import functools
from collections.abc import Callable

import torch
from torch._C import (
    DispatchKey,
    _are_functorch_transforms_active,
    _dispatch_tls_is_dispatch_key_included,
    _functorch,
    _get_tracing_state,
    _len_torch_dispatch_stack,
    _len_torch_function_stack,
)
from torch.autograd import forward_ad
from torch.compiler import is_dynamo_compiling
from torch.fx import Proxy


def not_compiled(function: Callable) -> Callable:
    """Decorates the backward of an autograd Function, at which the graph of compiled autograd breaks."""

    @functools.wraps(function)
    def call(*args):
        if is_dynamo_compiling():
            return torch.compiler.disable(function)(*args)
        return function(*args)

    return call


def may_record() -> bool:
    """Whether something records operators: a dispatch mode, torch.jit.trace, torch.export. Every call asks this."""
    return bool(_len_torch_dispatch_stack() or _get_tracing_state() or (_len_torch_function_stack() and _early()))


def present() -> bool:
    """Whether something records operators, or transforms them as torch.func and forward-mode AD do."""
    return bool(
        _len_torch_dispatch_stack()
        or _are_functorch_transforms_active()
        or forward_ad._current_level >= 0
        or _get_tracing_state()
        or (_len_torch_function_stack() and _early())
    )


def transforms() -> bool:
    """Whether a transform of torch.func is running."""
    return _are_functorch_transforms_active()


def alive(tensor: torch.Tensor | None) -> torch.Tensor | None:
    """The tensor itself in place of the wrappers of transforms of torch.func that have ended.

    torch.func.vjp returns a function that runs a backward after the transform. The tensors that the forward saved
    require gradients then, but autograd does not record what is computed from them.
    """
    while tensor is not None and _functorch.is_dead_tensor_wrapper(tensor):
        tensor = _functorch.unwrap_if_dead(tensor)
    return tensor


def _early() -> bool:
    """Whether operators are recorded before torch dispatches them. A function mode is always on then, too."""
    return _dispatch_tls_is_dispatch_key_included(DispatchKey.PreDispatch)


_INSTEAD = (
    "use torch.export, or PyTorch's layers, which ModelNew(..., replace=()) has, and the undo() of replace_layers "
    "brings back"
)


def refuse(name: str, instead: str = _INSTEAD) -> None:
    """Raises RuntimeError in torch.jit.trace, which cannot record our operators' gradients. name: of the operator."""
    if _get_tracing_state():
        raise RuntimeError(f"{name} cannot be recorded by torch.jit.trace: {instead}")


def refuse_script(name: str, instead: str = _INSTEAD) -> None:
    """Raises RuntimeError in torch.jit.script, which calls `__prepare_scriptable__` of each module and function."""
    raise RuntimeError(f"{name} is no TorchScript: {instead}")


def refuse_kernels() -> None:
    """Raises RuntimeError: kernels were called where something records operators."""
    raise RuntimeError(
        "kernels run where operators are recorded, which does not see them, so that its result would be wrong. "
        "Record the forward, too: its backward is made of registered operators then"
    )


def is_leaf(module, x) -> bool:
    """Whether a module must call `leaf`, because torch.fx.symbolic_trace records it as a part of a network."""
    return isinstance(x, Proxy) and x.tracer.root is not module


def leaf(module, x: Proxy) -> Proxy:
    """Records module(x) as one node with the module's name, as torch.fx records the layers of torch.nn."""
    return x.tracer.create_proxy("call_module", x.tracer.path_of_module(module), (x,), {})


def refuse_batches(name: str, gradients, instead: str, error: RuntimeError) -> None:
    """RuntimeError in place of `error`, if a backward failed as it was given batches of gradients.

    name: what the backward is of. instead: what to use.
    """
    tensors = [gradient for gradient in gradients if gradient is not None]
    if any(map(_functorch.is_batchedtensor, tensors)) or any(map(_functorch.is_legacy_batchedtensor, tensors)):
        raise RuntimeError(
            f"{name} takes one gradient, not a batch of them as from is_grads_batched, vectorize=True, or a vmap "
            f"around the backward alone: use {instead}"
        ) from error
