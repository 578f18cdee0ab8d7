"""The five operators as drop-in torch.nn modules: same arguments, parameters, buffers, state dicts and initialisation.

They derive from torch.nn.Module itself, so what torch does for its own layer classes passes them over: above all
torch.nn.SyncBatchNorm.convert_sync_batchnorm, which leaves this BatchNorm2d as it is, synchronising nothing.
"""

import math

import torch
from torch import nn

from . import functional
from .interop import pair
from .numerics import check_numerics


class ConvTranspose2d(nn.Module):
    """See torch.nn.ConvTranspose2d and `modelnew.functional.conv_transpose2d`. numerics: see `modelnew.numerics`."""

    extra_repr = nn.ConvTranspose2d.extra_repr

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
        super().__init__()
        check_numerics(numerics)
        if padding_mode != "zeros":
            raise ValueError(f"ConvTranspose2d pads with zeros only, received padding_mode={padding_mode!r}")
        if groups <= 0 or in_channels % groups or out_channels % groups:
            raise ValueError(
                f"groups must be positive and divide in_channels and out_channels, received groups={groups}, "
                f"in_channels={in_channels}, out_channels={out_channels}"
            )
        self.in_channels = in_channels
        self.out_channels = out_channels
        self.kernel_size = pair(kernel_size, "kernel_size")
        self.stride = pair(stride, "stride")
        self.padding = pair(padding, "padding")
        self.dilation = pair(dilation, "dilation")
        self.output_padding = pair(output_padding, "output_padding")
        self.groups = groups
        self.padding_mode = padding_mode
        self.numerics = numerics
        shape = (in_channels, out_channels // groups, *self.kernel_size)
        self.weight = nn.Parameter(torch.empty(shape, device=device, dtype=dtype))
        if bias:
            self.bias = nn.Parameter(torch.empty(out_channels, device=device, dtype=dtype))
        else:
            self.register_parameter("bias", None)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draws weight, then bias, from torch's distributions, in torch's order."""
        nn.init.kaiming_uniform_(self.weight, a=math.sqrt(5))
        fan_in = math.prod(self.weight.shape[1:])
        if self.bias is not None:
            bound = 1 / math.sqrt(fan_in) if fan_in else 0
            nn.init.uniform_(self.bias, -bound, bound)

    def forward(self, input: torch.Tensor, output_size=None) -> torch.Tensor:
        """output_size: [.., OH, OW] picks among the sizes that stride leaves open, instead of `output_padding`."""
        extra = self.output_padding if output_size is None else self._output_padding(input, list(output_size))
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

    def _output_padding(self, input, output_size):
        if len(output_size) == input.dim():
            output_size = output_size[-2:]
        if len(output_size) != 2:
            raise ValueError(
                f"output_size must have 2 or {input.dim()} elements for a {input.dim()}D input, received {output_size}"
            )
        smallest = [
            (n - 1) * s - 2 * p + d * (k - 1) + 1
            for n, s, p, d, k in zip(input.shape[-2:], self.stride, self.padding, self.dilation, self.kernel_size)
        ]
        largest = [least + s - 1 for least, s in zip(smallest, self.stride)]
        if any(not a <= size <= b for a, size, b in zip(smallest, output_size, largest)):
            raise ValueError(f"output_size must lie between {smallest} and {largest}, received {output_size}")
        return tuple(size - least for size, least in zip(output_size, smallest))


class BatchNorm2d(nn.Module):
    """See torch.nn.BatchNorm2d and `modelnew.functional.batch_norm`. A refused call leaves the buffers as they were."""

    _version = 2  # of the state dict: 2 has num_batches_tracked
    extra_repr = nn.BatchNorm2d.extra_repr

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
        super().__init__()
        self.num_features = num_features
        self.eps = eps
        self.momentum = momentum
        self.affine = affine
        self.track_running_stats = track_running_stats
        _register_affine(self, num_features, affine, bias, device, dtype)
        mean = var = count = None
        if track_running_stats:
            mean = torch.empty(num_features, device=device, dtype=dtype)
            var = torch.empty(num_features, device=device, dtype=dtype)
            count = torch.tensor(0, device=device, dtype=torch.long)
        self.register_buffer("running_mean", mean)
        self.register_buffer("running_var", var)
        self.register_buffer("num_batches_tracked", count)
        self.reset_parameters()

    def reset_running_stats(self) -> None:
        """Forgets what training has seen: mean 0, variance 1, no batches."""
        if self.track_running_stats:
            self.running_mean.zero_()
            self.running_var.fill_(1)
            self.num_batches_tracked.zero_()

    def reset_parameters(self) -> None:
        """Weight 1, bias 0, and `reset_running_stats`."""
        self.reset_running_stats()
        _reset_affine(self)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return self.apply_with(functional.batch_norm, input)

    def apply_with(self, operation, input: torch.Tensor, **options) -> torch.Tensor:
        """operation(input, *self.arguments(input), **options), for operations that fuse a batch norm with others."""
        output = operation(input, *self.arguments(input), **options)
        self.count_batch()  # once the operation has succeeded
        return output

    def arguments(self, input: torch.Tensor) -> tuple:
        """(running_mean, running_var, weight, bias, training, momentum, eps) of `functional.batch_norm` for a batch."""
        if input.dim() != 4:
            raise ValueError(f"expected 4D input (got {input.dim()}D input of shape {tuple(input.shape)})")
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

    def count_batch(self) -> None:
        """Notes that the running statistics were updated, if this batch was one to do so."""
        counter = self.counter()
        if counter is not None:
            counter.add_(1)

    def counter(self) -> torch.Tensor | None:
        """num_batches_tracked, if a batch now would be counted."""
        return tensor_of(self, "num_batches_tracked") if self.training and self.track_running_stats else None

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, *args):
        key = prefix + "num_batches_tracked"
        if (local_metadata.get("version") or 1) < 2 and self.track_running_stats and key not in state_dict:
            on_meta = self.num_batches_tracked is None or self.num_batches_tracked.is_meta
            state_dict[key] = torch.tensor(0) if on_meta else self.num_batches_tracked
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *args)


class Tanh(nn.Module):
    """See torch.nn.Tanh and `modelnew.functional.tanh`."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return functional.tanh(input)


class MaxPool2d(nn.Module):
    """See torch.nn.MaxPool2d and `modelnew.functional.max_pool2d`."""

    extra_repr = nn.MaxPool2d.extra_repr

    def __init__(
        self,
        kernel_size: int | tuple[int, int],
        stride: int | tuple[int, int] | None = None,
        padding: int | tuple[int, int] = 0,
        dilation: int | tuple[int, int] = 1,
        return_indices: bool = False,
        ceil_mode: bool = False,
    ):
        super().__init__()
        self.kernel_size = kernel_size
        self.stride = kernel_size if stride is None else stride
        self.padding = padding
        self.dilation = dilation
        self.return_indices = return_indices
        self.ceil_mode = ceil_mode

    @property
    def window(self) -> dict:
        """kernel_size, stride, padding, dilation and ceil_mode, as the functions of a pooling window take them."""
        names = ("kernel_size", "stride", "padding", "dilation", "ceil_mode")
        return {name: getattr(self, name) for name in names}

    def forward(self, input: torch.Tensor):
        return functional.max_pool2d(input, **self.window, return_indices=self.return_indices)


class GroupNorm(nn.Module):
    """See torch.nn.GroupNorm and `modelnew.functional.group_norm`."""

    extra_repr = nn.GroupNorm.extra_repr

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
        super().__init__()
        if num_groups <= 0 or num_channels % num_groups:
            raise ValueError(
                f"num_groups must be positive and divide num_channels, received {num_groups} and {num_channels}"
            )
        self.num_groups = num_groups
        self.num_channels = num_channels
        self.eps = eps
        self.affine = affine
        _register_affine(self, num_channels, affine, bias, device, dtype)
        self.reset_parameters()

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


def _register_affine(module, channels, affine, bias, device, dtype):
    for name, wanted in (("weight", affine), ("bias", affine and bias)):
        parameter = nn.Parameter(torch.empty(channels, device=device, dtype=dtype)) if wanted else None
        module.register_parameter(name, parameter)


def _reset_affine(module):
    if module.weight is not None:
        nn.init.ones_(module.weight)
    if module.bias is not None:
        nn.init.zeros_(module.bias)
