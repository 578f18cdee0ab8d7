"""Helpers for the weight and bias of the norm layers."""

import torch
from torch import nn


def tensors_of(module: nn.Module, *names: str) -> list[torch.Tensor | None]:
    """Parameters and buffers of a module, by name. Plain getattr searches three dicts and takes three times as long."""
    known = {**module._parameters, **module._buffers}
    # Someone may have put another tensor in its place.
    return [known[name] if name in known else getattr(module, name) for name in names]


def reset_affine(module: nn.Module) -> None:
    """Weight 1, bias 0."""
    if module.weight is not None:
        nn.init.ones_(module.weight)
    if module.bias is not None:
        nn.init.zeros_(module.bias)
