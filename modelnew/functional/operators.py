"""The list of operators, one line each. `modelnew.layers` and `modelnew.functional` export what it imports.

An operator's file contains its functions, their autograd Functions, the layer and CASES (see `modelnew.cases`). Its
__all__ names what is exported.
"""

from .. import untraced as _untraced
from . import conv_bn_pool as _conv_bn_pool
from . import traced as _traced
from .batch_norm import *
from .bn_tanh_max_pool import *
from .conv_transpose import *
from .group_norm import *
from .leaky_relu import *
from .max_pool import *
from .tanh import *

conv_bn_activation_max_pool_group_norm = _untraced.untraced(_conv_bn_pool.conv_bn_activation_max_pool_group_norm)
conv_bn_tanh_max_pool_group_norm = _untraced.untraced(_conv_bn_pool.conv_bn_tanh_max_pool_group_norm)
