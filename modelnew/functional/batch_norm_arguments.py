"""What a batch norm, alone or fused with other operators, is given besides its input."""

import math
from typing import NamedTuple

import torch

from ..interop import check_parameters, dense, flag, number, one_device


class Norm(NamedTuple):
    """The arguments of `batch_norm` behind its input, in their order."""

    running_mean: torch.Tensor | None
    running_var: torch.Tensor | None
    weight: torch.Tensor | None
    bias: torch.Tensor | None
    training: bool
    momentum: float
    eps: float
    batches: torch.Tensor | None  # num_batches_tracked

    @classmethod
    def checked(cls, running_mean, running_var, weight, bias, training, momentum, eps, batches) -> "Norm":
        """The same with floats. Refuses what torch.nn.functional.batch_norm refuses whatever its input is."""
        training, momentum, eps = flag(training, "training"), number(momentum, "momentum"), number(eps, "eps")
        if training and not eps > 0:
            raise ValueError(f"batch_norm eps must be positive during training, but got {eps}")
        if not eps >= 0:
            raise ValueError(f"batch_norm eps must be non-negative, but got {eps}")
        if running_mean is None or running_var is None:
            if running_mean is not running_var:
                raise ValueError("running_mean and running_var must either both be None or neither be None")
            if not training:
                raise RuntimeError("running_mean and running_var must be defined in evaluation mode")
        elif torch.is_grad_enabled() and (running_mean.requires_grad or running_var.requires_grad):
            name = "running_mean" if running_mean.requires_grad else "running_var"
            raise RuntimeError(f"batch_norm is not differentiable with respect to {name}, which requires grad")
        elif training and running_mean is running_var:
            raise ValueError("running_mean and running_var are one tensor, and training updates each: give it two")
        return cls(running_mean, running_var, weight, bias, training, momentum, eps, batches)

    def check(self, input: torch.Tensor, shape=None, alone: bool = True) -> None:
        """Refuses what torch.nn.functional.batch_norm refuses because of shapes, dtypes and devices.

        shape: what is normalised, if it is not input itself. alone: whether no other process has values, too.
        """
        shape = input.shape if shape is None else shape
        if self.training and alone and shape and math.prod((shape[0], *shape[2:])) == 1:
            raise ValueError(f"Expected more than 1 value per channel when training, got input size {shape}")
        if len(shape) < 2:
            raise RuntimeError(f"batch_norm takes input [N, C, *], received shape {tuple(shape)}")
        statistics = {"running_mean": self.running_mean, "running_var": self.running_var}
        affine = {"weight": self.weight, "bias": self.bias}
        for name, tensor in (statistics | affine).items():
            if tensor is not None and tensor.numel() != shape[1]:
                raise RuntimeError(f"{name} should contain {shape[1]} elements not {tensor.numel()}")
        one_device((input, *statistics.values(), *affine.values()))
        check_parameters(input, **statistics)
        check_parameters(input, **affine)

    def applied(self) -> tuple:
        """The running statistics if they are applied: a backward refuses those that were changed, as torch's does."""
        return (None, None) if self.training else (self.running_mean, self.running_var)

    def buffers(self) -> tuple:
        """(running_mean, running_var, batches) as kernels read, and in training update, them.

        None for a counter that they do not count in.
        """
        batches = self.batches
        counts = self.training and batches is not None and batches.dtype == torch.int64 and batches.numel() == 1
        return dense(self.running_mean), dense(self.running_var), batches if counts else None

    def note_update(self, updated) -> None:
        """Tells autograd what kernels changed in training. updated: `buffers`."""
        if not self.training:
            return
        written = []
        for buffer, new in zip((self.running_mean, self.running_var, self.batches), updated):
            if buffer is None:
                continue
            if new is buffer:
                written.append(buffer)
            elif new is None:
                buffer.add_(1)
            else:  # it is not contiguous: the kernel updated a copy
                buffer.copy_(new)
        torch.autograd.graph.increment_version(written)
