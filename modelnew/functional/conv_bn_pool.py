"""ConvTranspose2d, BatchNorm2d, an activation, MaxPool2d and GroupNorm, fused as one operator or as three.

The one operator, in `resident_conv_bn_pool`, supports convolutions of stride 1 on images that fit a block, and 2x2
windows. Three operators support any convolution: the convolution, `bn_pool` for batch norm, activation and pooling, and
the group norm.
"""

import inspect
from collections.abc import Callable
from typing import Any

import torch

from cupy_kernels.errors import UnsupportedError
from cupy_kernels.pool import Pool
from cupy_kernels.pooled_tail import struct_of

from .. import autocast
from ..interop import integer, number, one_device, pair
from ..numerics import check_numerics
from . import resident_conv_bn_pool as resident
from .bn_pool import bn_activation_max_pool2d, check_supported
from .conv_transpose import conv_transpose2d
from .group_norm import group_norm
from .max_pool import pool_of


def conv_bn_activation_max_pool_group_norm(
    input: torch.Tensor,
    running_mean: torch.Tensor | None,
    running_var: torch.Tensor | None,
    weight: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    *,
    conv_weight: torch.Tensor,
    conv_bias: torch.Tensor | None = None,
    stride: int | tuple[int, int] = 1,
    padding: int | tuple[int, int] = 0,
    output_padding: int | tuple[int, int] = 0,
    dilation: int | tuple[int, int] = 1,
    groups: int = 1,
    activation: str = "tanh",
    negative_slope: float = 0.01,
    pool_size: int | tuple[int, int] = 2,
    pool_stride: int | tuple[int, int] | None = None,
    pool_padding: int | tuple[int, int] = 0,
    num_groups: int,
    group_weight: torch.Tensor | None = None,
    group_bias: torch.Tensor | None = None,
    group_eps: float = 1e-5,
    num_batches_tracked: torch.Tensor | None = None,
    numerics: str = "auto",
    peers: Callable | None = None,
) -> torch.Tensor:
    """group_norm(max_pool2d(act(batch_norm(conv_transpose2d(input, ...))), pool_size, pool_stride, pool_padding)).

    input: [N, Cin, H, W]; float32, float16 or bfloat16.
    conv_weight: [Cin, Cout/groups, KH, KW].
    running_mean, running_var, weight, bias, training, momentum, eps: of the batch norm, see `batch_norm`.
    conv_bias, group_weight, group_bias: (Cout,), or None. All tensors have input's dtype.
    stride, padding, output_padding, dilation, groups: of the convolution.
    activation: "tanh" or "leaky_relu".
    negative_slope: of leaky_relu; finite and not negative.
    pool_size, pool_stride, pool_padding: windows of 2x2 without padding, or of 3x3 with padding 0 or 1; stride 2.
    num_groups, group_eps: of the group norm.
    num_batches_tracked: one int64, incremented by 1 in place in training; or None.
    numerics: of the convolution, see `modelnew.numerics`.
    peers: set by layers that `modelnew.convert_sync_batchnorm` has synchronised. It runs a call in training with the
        statistics of several processes.

    Returns [N, Cout, PH, PW] of input's dtype. It is channels_last if input is, except for a float32 input that runs as
    one operator (`modelnew.explain` tells); else it is contiguous.

    Under torch.autocast, all tensors but the input are float32. The products have the class "tf32", and values between
    the kernels have 16 bits. Errors are at most those of PyTorch's casts between the operators. The result has the
    dtype that autocast gives a group norm.

    Raises UnsupportedError (`cupy_kernels.errors`, a ValueError), with the reason, if no kernels support the call; and
    the errors of `conv_transpose2d`, `batch_norm` and `group_norm`. A refused call changes nothing.
    """
    check_numerics(numerics)
    arguments = (running_mean, running_var, weight, bias, training, momentum, eps, num_batches_tracked)
    act, group = (activation, negative_slope), (num_groups, group_weight, group_bias, group_eps)
    window = (pool_size, pool_stride, pool_padding)
    if is_plain(stride, output_padding, dilation, groups, *window):
        try:
            return resident.run(input, arguments, conv_weight, conv_bias, padding, *act, *group, numerics, peers)
        except UnsupportedError:
            if peers is not None:
                raise
    if peers is not None:
        raise UnsupportedError("a synchronised batch norm is fused with a convolution without a stride and 2x2 windows")
    pool, groups = window_of(*window), integer(groups, "groups")
    others = (conv_weight, conv_bias, *arguments[:4], group_weight, group_bias)
    check_three(input, pool, num_batches_tracked, others, *act)
    one_device((input, *others))  # what the last operator would refuse is refused before the second updates anything
    channels = conv_weight.shape[1] * groups if conv_weight.dim() == 4 else 0
    resident.check_group(channels, integer(num_groups, "num_groups"), conv_bias, group_weight, group_bias)
    shift = conv_bias if training else None
    added = conv_bias if shift is None else shift.detach()
    geometry = (stride, padding, output_padding, groups, dilation)
    y = conv_transpose2d(input, conv_weight, added, *geometry, numerics=numerics)
    y = bn_activation_max_pool2d(y, arguments, shift, *act, pool)
    return group_norm(y, *group)


_PLAIN = {((1, 1), (0, 0), (1, 1), 1, 2, 2, 0), (1, 0, 1, 1, 2, None, 0)}  # as layers and as the function have it


def is_plain(stride, output_padding, dilation, groups, pool_size, pool_stride, pool_padding) -> bool:
    """Whether the one operator may support the convolution and the windows, as far as these options tell.

    Raises TypeError or ValueError for options that are no ints or pairs.
    """
    try:
        if (stride, output_padding, dilation, groups, pool_size, pool_stride, pool_padding) in _PLAIN:
            return True
    except TypeError:  # lists and arrays have no hash
        pass
    pairs = pair(stride, "stride"), pair(output_padding, "output_padding"), pair(dilation, "dilation")
    pool = window_of(pool_size, pool_stride, pool_padding)
    return (*pairs, integer(groups, "groups")) == ((1, 1), (0, 0), (1, 1), 1) and pool == window_of(2, None, 0)


def window_of(pool_size, pool_stride, pool_padding) -> Pool:
    """The `Pool` for these arguments."""
    return pool_of(pool_size, pool_stride, pool_padding, 1, ("pool_size", "pool_stride", "pool_padding", "dilation"))


def check_three(input, pool: Pool, batches, others, activation, negative_slope=0) -> None:
    """Raises UnsupportedError for what the three operators do not support.

    others: the parameters.
    batches: num_batches_tracked.
    """
    struct_of(activation)
    resident.check_slope(number(negative_slope, "negative_slope"))
    resident.check_mixture(autocast.enabled(input), input, batches, *others)
    check_supported(input, activation, pool)


def tanh_of(function: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """conv_bn_tanh_max_pool_group_norm, by a function that takes any activation."""

    def conv_bn_tanh_max_pool_group_norm(*args: Any, **options: Any) -> torch.Tensor:
        """`conv_bn_activation_max_pool_group_norm` with activation="tanh"."""
        return function(*args, activation="tanh", negative_slope=0.0, **options)

    signature = inspect.signature(function)
    parameters = [p for name, p in signature.parameters.items() if name not in ("activation", "negative_slope")]
    conv_bn_tanh_max_pool_group_norm.__signature__ = signature.replace(parameters=parameters)
    conv_bn_tanh_max_pool_group_norm.__qualname__ = conv_bn_tanh_max_pool_group_norm.__name__  # which errors show
    return conv_bn_tanh_max_pool_group_norm


conv_bn_tanh_max_pool_group_norm = tanh_of(conv_bn_activation_max_pool_group_norm)
