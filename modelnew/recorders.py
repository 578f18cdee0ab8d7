"""Recorders build their result from the torch operators that they see. They do not see our kernels."""

from torch._C import DispatchKey, _dispatch_tls_is_dispatch_key_included, _get_tracing_state, _len_torch_dispatch_stack
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

_PRE_DISPATCH = DispatchKey.PreDispatch


def may_record() -> bool:
    """Whether `refuse` has something to look at. Quick, as each call asks."""
    return bool(
        _len_torch_dispatch_stack() or _get_tracing_state() or _dispatch_tls_is_dispatch_key_included(_PRE_DISPATCH)
    )


def refuse() -> None:
    """RuntimeError if a recorder is at work: torch.jit.trace, make_fx, torch.export, FakeTensorMode, FlopCounterMode.

    Other dispatch modes (logging, selective checkpointing) see what torch does, and no more. Selective checkpointing
    must compute kernels' results again: those that it saves have no values yet, which it notices and refuses.
    """
    found = [
        type(mode).__name__
        for mode in _get_current_dispatch_mode_stack()
        # torch's own kinds of mode, which replace or record operators, have a key
        if getattr(mode, "_mode_key", None) is not None or "FlopCounter" in type(mode).__name__
    ]
    if _get_tracing_state():
        found = ["torch.jit.trace (which torch.onnx.export(dynamo=False) uses)"]
    elif _dispatch_tls_is_dispatch_key_included(_PRE_DISPATCH):
        found = ["torch.export (or make_fx with pre_dispatch)"]
    if found:
        raise RuntimeError(
            f"{found[-1]} does not see the kernels that this call runs, so that its result would be wrong. "
            "Use PyTorch's operators there: torch.nn's layers, and ModelNew(..., replace=()), take the same state dict"
        )
