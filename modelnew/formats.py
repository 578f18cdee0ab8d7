"""Memory formats of tensors, in the sense of PyTorch, and the arrays that kernels get."""

import torch

CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}  # by the number of dimensions


def channels_last(tensor: torch.Tensor) -> bool:
    """Whether PyTorch's results for `tensor` are channels_last, or channels_last_3d for 5 dimensions.

    As in PyTorch, strides decide: they do not decrease from the channels over the last dimension to the first one. The
    tensor may have gaps, such as a slice of the channels.
    """
    if tensor.dim() not in CHANNELS_LAST:
        return False
    least, strides = 0, tensor.stride()
    for d in (1, *range(tensor.dim() - 1, 1, -1)):
        if strides[d] < least:
            return False
        least = strides[d] * max(1, tensor.shape[d])
    return strides[0] >= least != strides[1] != 0 and tensor.numel() > 0


def dense_in(tensor: torch.Tensor, last: bool) -> torch.Tensor:
    """The tensor in one of the two formats, without lazy negation. Copies only if necessary."""
    memory_format = CHANNELS_LAST[tensor.dim()] if last else torch.contiguous_format
    return tensor.resolve_neg().contiguous(memory_format=memory_format)


def dense_like(tensor: torch.Tensor, like: torch.Tensor | None = None) -> torch.Tensor:
    """The tensor without gaps, in the strides of `like`, or of PyTorch's results. Copies only if necessary."""
    like = tensor if like is None else like
    if tensor.stride() == like.stride() and (tensor.is_contiguous() or _fills_memory(tensor)) and not tensor.is_neg():
        return tensor
    return torch.empty_like(like).copy_(tensor)


def flat(tensor: torch.Tensor) -> torch.Tensor:
    """The elements of a tensor without gaps, in memory order."""
    return tensor if tensor.is_contiguous() else tensor.as_strided((tensor.numel(),), (1,))


def unflat(tensor: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """A result of flat(like), with the shape and strides of `like`. It is no view, see `restored`."""
    return tensor if tensor.stride() == like.stride() else tensor.as_strided(like.shape, like.stride()).data


def _fills_memory(tensor):
    expected = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape)):
        if size != 1 and stride != expected:
            return False
        expected *= size
    return True


def stored(tensor: torch.Tensor | None, last: bool) -> torch.Tensor | None:
    """The contiguous tensor over the same memory: [N, *, C] if `last`."""
    return tensor.movedim(1, -1) if last and tensor is not None else tensor


def restored(tensor: torch.Tensor | None, last: bool) -> torch.Tensor | None:
    """The inverse of `stored`, for results. It is no view: autograd refuses to change a Function's views in place."""
    return tensor.movedim(-1, 1).data if last and tensor is not None else tensor


def empty_in(like: torch.Tensor, shape, last: bool) -> torch.Tensor:
    """Uninitialised memory of this shape in one of the two formats, with the dtype and device of `like`."""
    memory_format = CHANNELS_LAST[len(shape)] if last else torch.contiguous_format
    return torch.empty(shape, dtype=like.dtype, device=like.device, memory_format=memory_format)
