"""The five operators as functions, with torch's own signatures, run by the kernels of `cupy_kernels`."""

import functools

import torch

from . import batch_norm as _batch_norm
from . import bn_tanh_max_pool as _bn_tanh_max_pool
from . import conv_bn_pool as _conv_bn_pool
from . import conv_transpose as _conv_transpose
from . import group_norm as _group_norm
from . import max_pool as _max_pool
from . import tanh as _tanh


def untraced(function):
    """`function`, where torch.compile breaks its graph: it cannot see into kernels, and calls them as they are.

    torch.compiler.disable is applied at the first compilation only, because it takes a second to import.
    """

    @functools.wraps(function)
    def call(*args, **options):
        if torch.compiler.is_compiling():
            return torch.compiler.disable(function)(*args, **options)
        return function(*args, **options)

    return call


batch_norm = untraced(_batch_norm.batch_norm)
batch_norm_tanh = untraced(_batch_norm.batch_norm_tanh)
bn_tanh_max_pool2d = untraced(_bn_tanh_max_pool.bn_tanh_max_pool2d)
conv_bn_tanh_max_pool_group_norm = untraced(_conv_bn_pool.conv_bn_tanh_max_pool_group_norm)
conv_transpose2d = untraced(_conv_transpose.conv_transpose2d)
group_norm = untraced(_group_norm.group_norm)
max_pool2d = untraced(_max_pool.max_pool2d)
tanh = untraced(_tanh.tanh)
tanh_max_pool2d = untraced(_bn_tanh_max_pool.tanh_max_pool2d)

__all__ = [
    "batch_norm",
    "batch_norm_tanh",
    "bn_tanh_max_pool2d",
    "conv_bn_tanh_max_pool_group_norm",
    "conv_transpose2d",
    "group_norm",
    "max_pool2d",
    "tanh",
    "tanh_max_pool2d",
]
