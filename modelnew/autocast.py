"""torch.autocast's rules, for operators that torch's dispatcher does not know."""

import torch


def lower(*tensors: torch.Tensor | None) -> tuple:
    """The tensors as autocast gives them to a convolution: in its dtype where it is on."""
    device = tensors[0].device.type
    return _cast(tensors, torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else tensors


def single(*tensors: torch.Tensor | None) -> tuple:
    """The tensors as autocast gives them to a group norm: in float32 where it is on, on a GPU."""
    device = tensors[0].device.type
    return _cast(tensors, torch.float32) if device == "cuda" and torch.is_autocast_enabled(device) else tensors


def _cast(tensors, dtype):
    return tuple(
        t.to(dtype) if t is not None and t.is_floating_point() and t.dtype != torch.float64 else t for t in tensors
    )
