"""The rules of torch.autocast, for operators that PyTorch's dispatcher does not know."""

import torch


def enabled(tensor: torch.Tensor) -> bool:
    """Whether autocast is on for the tensor's device."""
    return torch.is_autocast_enabled("cuda" if tensor.is_cuda else "cpu")


def lower(*tensors: torch.Tensor | None) -> tuple:
    """The tensors in autocast's dtype where autocast is on, as it casts a convolution's arguments."""
    first = tensors[0]
    return _cast(tensors, torch.get_autocast_dtype(first.device.type)) if enabled(first) else tensors


def norm_in_float32(tensor: torch.Tensor) -> bool:
    """Whether autocast computes a group norm of the tensor in float32, as it does on a GPU."""
    return tensor.is_cuda and tensor.dtype != torch.float64 and enabled(tensor)


def single(*tensors: torch.Tensor | None) -> tuple:
    """The tensors in float32."""
    return _cast(tensors, torch.float32)


def result_of_norm(result: torch.Tensor) -> torch.Tensor:
    """A chain's float32 result in the dtype that autocast gives a group norm: on a CPU, autocast's own."""
    return result if result.is_cuda or not enabled(result) else lower(result)[0]


def _cast(tensors, dtype):
    return tuple(
        t.to(dtype) if t is not None and t.is_floating_point() and t.dtype != torch.float64 else t for t in tensors
    )
