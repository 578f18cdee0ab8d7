"""Every operator, a line each: its layer and its functions, which `modelnew.layers` and `modelnew.functional` show.

An operator's file has all of its torch side: functions, their autograd Functions, the layer, and CASES, see
`modelnew.cases`.
"""

from .. import untraced as _untraced
from . import conv_bn_pool as _conv_bn_pool
from . import traced as _traced
from .batch_norm import BatchNorm1d, BatchNorm2d, BatchNorm3d, batch_norm, batch_norm_tanh
from .bn_tanh_max_pool import bn_tanh_max_pool2d, tanh_max_pool2d
from .conv_transpose import ConvTranspose2d, conv_transpose2d
from .group_norm import GroupNorm, group_norm
from .leaky_relu import LeakyReLU, leaky_relu
from .max_pool import MaxPool2d, max_pool2d
from .tanh import Tanh, tanh

conv_bn_activation_max_pool_group_norm = _untraced.untraced(_conv_bn_pool.conv_bn_activation_max_pool_group_norm)
conv_bn_tanh_max_pool_group_norm = _untraced.untraced(_conv_bn_pool.conv_bn_tanh_max_pool_group_norm)
