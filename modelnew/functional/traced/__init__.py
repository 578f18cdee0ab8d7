"""The operators that tracers see, see `modelnew.registration`: one file for each file of `modelnew.functional`."""

from . import (
    batch_norm,
    bn_pool,
    bn_tanh_max_pool,
    conv_bn_pool,
    conv_transpose,
    group_norm,
    leaky_relu,
    max_pool,
    tanh,
)
