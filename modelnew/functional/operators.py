"""Every operator, a line each: its layer and its functions, which `modelnew.layers` and `modelnew.functional` show.

An operator's file has all of its torch side: functions, their autograd Functions, the layer, CASES, see
`modelnew.cases`, and in __all__ the names that are shown.
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
