"""The operators as drop-in torch.nn modules, on our kernels. Each stands beside its function, in `modelnew/functional`.

Each is a subclass of torch's own layer, for the sake of the many tools that look for torch's classes: SyncBatchNorm's
conversion (to torch's layer; `modelnew.convert_sync_batchnorm` keeps ours), spectral_norm, update_bn, loops that freeze
or initialise. Arguments, parameters, buffers, state dicts and initialisation are torch's. `forward` is ours and calls
none of torch's kernels.
"""

import inspect

from . import recorders
from .functional import operators
from .functional.affine import tensors_of
from .functional.operators import *

__all__ = sorted(name for name, value in vars(operators).items() if inspect.isclass(value))

for _name in __all__:
    globals()[_name].__prepare_scriptable__ = recorders.refuse_script
