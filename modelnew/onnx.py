"""The public functions as PyTorch's own operators, for torch.onnx.export.

Others stand for themselves: they are torch.nn.functional's, with the same arguments.
"""

import torch.nn.functional as F

from cupy_kernels.pooled_tail import struct_of


def __getattr__(name):
    return getattr(F, name)


def conv_transpose2d(*args, numerics=None, **options):
    return F.conv_transpose2d(*args, **options)


def batch_norm(*args, num_batches_tracked=None, **options):
    if num_batches_tracked is not None:
        num_batches_tracked.add_(1)
    return F.batch_norm(*args, **options)


def batch_norm_tanh(*args, **options):
    return batch_norm(*args, **options).tanh()


def tanh_max_pool2d(input, *args, **options):
    return F.max_pool2d(input.tanh(), *args, **options)


def bn_tanh_max_pool2d(*args, kernel_size=2, stride=None, padding=0, dilation=1, ceil_mode=False, **options):
    args, window = args[:8], (*args[8:], *(kernel_size, stride, padding, dilation, ceil_mode)[len(args[8:]) :])
    return F.max_pool2d(batch_norm_tanh(*args, **options), *window)


def conv_bn_activation_max_pool_group_norm(
    input,
    *args,
    conv_weight,
    conv_bias=None,
    stride=1,
    padding=0,
    output_padding=0,
    dilation=1,
    groups=1,
    activation="tanh",
    negative_slope=0.01,
    pool_size=2,
    pool_stride=None,
    pool_padding=0,
    num_groups,
    group_weight=None,
    group_bias=None,
    group_eps=1e-5,
    numerics=None,
    peers=None,
    **options,
):
    struct_of(activation)
    geometry = stride, padding, output_padding, groups, dilation
    y = batch_norm(F.conv_transpose2d(input, conv_weight, conv_bias, *geometry), *args, **options)
    y = F.leaky_relu(y, negative_slope) if activation == "leaky_relu" else getattr(F, activation)(y)
    y = F.max_pool2d(y, pool_size, pool_stride, pool_padding)
    return F.group_norm(y, num_groups, group_weight, group_bias, group_eps)


conv_bn_tanh_max_pool_group_norm = conv_bn_activation_max_pool_group_norm
