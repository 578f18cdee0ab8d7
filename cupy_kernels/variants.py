"""Every variant of the kernels that the host code may launch, so that all can be compiled ahead without a GPU.

Each module with host code declares its variants in `variants()`, a generator of `source.Variant`. The tests fail on a
launch that is not declared. Macros that depend on shapes, whose values cannot all be listed, are named in the module's
`SHAPE_MACROS`.
"""

import functools
import importlib
import pkgutil
from collections.abc import Iterator

from .source import Variant


def variants() -> Iterator[Variant]:
    """All variants of all operators."""
    for declared in _declared("variants"):
        yield from declared()


@functools.cache
def shape_macros() -> frozenset[str]:
    """The macros that specialise a variant for a shape."""
    return frozenset().union(*_declared("SHAPE_MACROS"))


def _declared(name):
    package = importlib.import_module(__package__)
    for found in pkgutil.iter_modules(package.__path__, f"{__package__}."):
        module = importlib.import_module(found.name)
        if found.name != __name__ and hasattr(module, name):
            yield getattr(module, name)
