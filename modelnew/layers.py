"""The operators as drop-in torch.nn modules on our kernels. Each is defined in `modelnew.functional`.

Each layer is a subclass of PyTorch's layer, because tools look for PyTorch's classes: spectral_norm, update_bn, loops
that freeze or initialise. Arguments, parameters, buffers, state dicts and initialisation are PyTorch's. Only `forward`
differs. `modelnew.convert_sync_batchnorm` synchronises batch norms; PyTorch's converter raises an error.
"""

import inspect

from . import recorders
from .functional import operators
from .functional.operators import *

__all__ = sorted(name for name, value in vars(operators).items() if inspect.isclass(value))

for _name in __all__:
    globals()[_name].__prepare_scriptable__ = lambda layer: recorders.refuse_script(type(layer).__name__)
