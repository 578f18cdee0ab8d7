"""How far a result is from the truth: the float64 run of the reference."""

from typing import NamedTuple

import torch


class Error(NamedTuple):
    """Error of a result against the truth, relative to the root mean square of the truth."""

    rms: float
    max: float


def error(actual: torch.Tensor, truth: torch.Tensor) -> Error:
    """rms and max of |actual - truth| over the rms of the truth (over 1 where the truth is all zero).

    NaN must stand where the truth has NaN and infinities must equal the truth's; anything else is an infinite error.
    """
    actual, truth = actual.detach().double(), truth.detach().double()
    if actual.shape != truth.shape:
        raise ValueError(f"result has shape {tuple(actual.shape)}, truth {tuple(truth.shape)}")
    finite = truth.isfinite()
    special = torch.where(finite, 0.0, truth)
    if not torch.equal(actual.isfinite(), finite) or not torch.allclose(
        torch.where(finite, 0.0, actual), special, rtol=0, atol=0, equal_nan=True
    ):
        return Error(float("inf"), float("inf"))
    actual, truth = actual[finite], truth[finite]
    if not truth.numel():
        return Error(0.0, 0.0)
    scale = truth.square().mean().sqrt().item() or 1.0
    difference = (actual - truth).abs()
    return Error(difference.square().mean().sqrt().item() / scale, difference.max().item() / scale)
