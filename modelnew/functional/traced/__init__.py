"""The operators that tracers see, see `modelnew.registration`: those of the files of `modelnew.functional`.

Elementwise operators are registered in their own files.
"""

import importlib
import pkgutil

for _file in pkgutil.iter_modules(__path__):
    importlib.import_module(f".{_file.name}", __name__)
