"""Helpers for the weight and bias of the norm layers."""

import torch
from torch import nn


def pair_of(module: nn.Module, known: dict, first: str, second: str) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Two tensors of a module. known: its parameters or its buffers. Plain getattr searches three dicts: slower."""
    if first in known and second in known:
        return known[first], known[second]
    return getattr(module, first), getattr(module, second)  # someone has put another tensor in its place


def weight_and_bias(module: nn.Module) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Both, of a convolution or a norm."""
    return pair_of(module, module._parameters, "weight", "bias")


def reset_affine(module: nn.Module) -> None:
    """Weight 1, bias 0."""
    if module.weight is not None:
        nn.init.ones_(module.weight)
    if module.bias is not None:
        nn.init.zeros_(module.bias)
