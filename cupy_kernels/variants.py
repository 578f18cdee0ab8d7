"""Every variant of the kernels that the host code may launch, so that all can be compiled ahead, without a GPU.

A module with host code declares its own by `variants()`, a generator of `source.Variant`; the tests fail on a launch
that is not declared.
"""

import importlib
import pkgutil
from collections.abc import Iterator

from .source import Variant


def variants() -> Iterator[Variant]:
    """All variants of all operators."""
    package = importlib.import_module(__package__)
    for found in pkgutil.iter_modules(package.__path__, f"{__package__}."):
        if found.name != __name__:
            declared = getattr(importlib.import_module(found.name), "variants", None)
            if declared:
                yield from declared()
