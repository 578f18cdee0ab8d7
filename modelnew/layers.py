"""The five operators as drop-in torch.nn modules, on our kernels.

Each is a subclass of torch's own layer, for the sake of the many tools that look for torch's classes: SyncBatchNorm's
conversion, spectral_norm, update_bn, loops that freeze or initialise. Arguments, parameters, buffers, state dicts and
initialisation are torch's. `forward` is ours and calls none of torch's kernels.
"""

import torch
from torch import nn

from . import functional
from .numerics import check_numerics


class ConvTranspose2d(nn.ConvTranspose2d):
    """See torch.nn.ConvTranspose2d and `modelnew.functional.conv_transpose2d`. numerics: see `modelnew.numerics`."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        stride: int | tuple[int, int] = 1,
        padding: int | tuple[int, int] = 0,
        output_padding: int | tuple[int, int] = 0,
        groups: int = 1,
        bias: bool = True,
        dilation: int | tuple[int, int] = 1,
        padding_mode: str = "zeros",
        device=None,
        dtype=None,
        *,
        numerics: str = "auto",
    ):
        check_numerics(numerics)
        window = (kernel_size, stride, padding, output_padding)
        super().__init__(in_channels, out_channels, *window, groups, bias, dilation, padding_mode, device, dtype)
        self.numerics = numerics

    def forward(self, input: torch.Tensor, output_size=None) -> torch.Tensor:
        """output_size: [.., OH, OW] picks among the sizes that stride leaves open, instead of `output_padding`."""
        extra = self.output_padding
        if output_size is not None:
            window = (self.stride, self.padding, self.kernel_size)
            extra = self._output_padding(input, list(output_size), *window, 2, self.dilation)
        return functional.conv_transpose2d(
            input,
            self.weight,
            self.bias,
            self.stride,
            self.padding,
            extra,
            self.groups,
            self.dilation,
            numerics=self.numerics,
        )


class BatchNorm2d(nn.BatchNorm2d):
    """See torch.nn.BatchNorm2d and `modelnew.functional.batch_norm`. A refused call leaves the buffers as they were."""

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        device=None,
        dtype=None,
        *,
        bias: bool = True,
    ):
        super().__init__(num_features, eps, momentum, affine, track_running_stats, device, dtype)
        if not bias:  # not every version of torch knows it
            self.register_parameter("bias", None)

    def reset_parameters(self) -> None:
        """Weight 1, bias 0, and `reset_running_stats`."""
        self.reset_running_stats()
        _reset_affine(self)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return self.apply_with(functional.batch_norm, input)

    def apply_with(self, operation, input: torch.Tensor, **options) -> torch.Tensor:
        """operation(input, *self.arguments(input), **options), for operations that fuse a batch norm with others."""
        return operation(input, *self.arguments(input), num_batches_tracked=self.counter(), **options)

    def arguments(self, input: torch.Tensor) -> tuple:
        """(running_mean, running_var, weight, bias, training, momentum, eps) of `functional.batch_norm` for a batch."""
        self._check_input_dim(input)
        running_mean, running_var = tensor_of(self, "running_mean"), tensor_of(self, "running_var")
        training = self.training or (running_mean is None and running_var is None)
        if self.training and not self.track_running_stats:
            running_mean = running_var = None
        momentum = self.momentum
        if momentum is None:  # the average over all batches
            counter = self.counter()
            momentum = 0.0 if counter is None else 1 / (float(counter) + 1)
        affine = (tensor_of(self, "weight"), tensor_of(self, "bias"))
        return running_mean, running_var, *affine, training, momentum, self.eps

    def counter(self) -> torch.Tensor | None:
        """num_batches_tracked, if a batch now would be counted."""
        return tensor_of(self, "num_batches_tracked") if self.training and self.track_running_stats else None


class Tanh(nn.Tanh):
    """See torch.nn.Tanh and `modelnew.functional.tanh`."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return functional.tanh(input)


class MaxPool2d(nn.MaxPool2d):
    """See torch.nn.MaxPool2d and `modelnew.functional.max_pool2d`."""

    @property
    def window(self) -> dict:
        """kernel_size, stride, padding, dilation and ceil_mode, as the functions of a pooling window take them."""
        names = ("kernel_size", "stride", "padding", "dilation", "ceil_mode")
        return {name: getattr(self, name) for name in names}

    def forward(self, input: torch.Tensor):
        return functional.max_pool2d(input, **self.window, return_indices=self.return_indices)


class GroupNorm(nn.GroupNorm):
    """See torch.nn.GroupNorm and `modelnew.functional.group_norm`."""

    def __init__(
        self,
        num_groups: int,
        num_channels: int,
        eps: float = 1e-5,
        affine: bool = True,
        device=None,
        dtype=None,
        *,
        bias: bool = True,
    ):
        super().__init__(num_groups, num_channels, eps, affine, device, dtype)
        if not bias:  # not every version of torch knows it
            self.register_parameter("bias", None)

    def reset_parameters(self) -> None:
        """Weight 1, bias 0."""
        _reset_affine(self)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return functional.group_norm(input, self.num_groups, self.weight, self.bias, self.eps)


def tensor_of(module: nn.Module, name: str) -> torch.Tensor | None:
    """module.name, a parameter or buffer: getattr, which searches for it, takes three times as long."""
    for known in (module._parameters, module._buffers):
        if name in known:
            return known[name]
    return getattr(module, name)  # someone put another tensor in its place


def _reset_affine(module):
    if module.weight is not None:
        nn.init.ones_(module.weight)
    if module.bias is not None:
        nn.init.zeros_(module.bias)
