"""torch.autocast's rules, for operators that torch's dispatcher does not know."""

import torch


def enabled(tensor: torch.Tensor) -> bool:
    """Whether autocast is on for the tensor's device."""
    return torch.is_autocast_enabled("cuda" if tensor.is_cuda else "cpu")


def lower(*tensors: torch.Tensor | None) -> tuple:
    """The tensors as autocast gives them to a convolution: in its dtype where it is on."""
    first = tensors[0]
    return _cast(tensors, torch.get_autocast_dtype(first.device.type)) if enabled(first) else tensors


def norm_in_float32(tensor: torch.Tensor) -> bool:
    """Whether autocast has a group norm of the tensor, and its parameters and result, in float32: on a GPU."""
    return tensor.is_cuda and tensor.dtype != torch.float64 and enabled(tensor)


def single(*tensors: torch.Tensor | None) -> tuple:
    """The tensors in float32."""
    return _cast(tensors, torch.float32)


def result_of_norm(result: torch.Tensor) -> torch.Tensor:
    """A float32 result of a chain that ends in a group norm, as autocast has it: on a CPU in its dtype."""
    return result if result.is_cuda or not enabled(result) else lower(result)[0]


def _cast(tensors, dtype):
    return tuple(
        t.to(dtype) if t is not None and t.is_floating_point() and t.dtype != torch.float64 else t for t in tensors
    )
