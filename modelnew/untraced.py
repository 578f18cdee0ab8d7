"""What stands around every public operator: what cannot see kernels is kept away from them."""

import functools
import inspect
import typing
from collections.abc import Callable

import torch
from torch.compiler import is_dynamo_compiling
from torch.overrides import handle_torch_function, has_torch_function

from cupy_kernels.errors import UnsupportedError

from . import recorders

# Types of arguments that need no further look. All others join that are neither tensors nor stand for them.
_plain = {torch.Tensor, torch.nn.Parameter, type(None), bool, int, float, str, tuple, list}


P = typing.ParamSpec("P")
R = typing.TypeVar("R")


def untraced(function: Callable[P, R]) -> Callable[P, R]:
    """`function`, for calls of all kinds. What records torch's operators does not see kernels, so it is kept away.

    torch.compile breaks its graph here, and calls the function as it is. torch.compiler.disable is applied at the first
    compilation only, because it takes a second to import.
    Recorders of operators get an error instead of a wrong result, see `calls.call`. Tensors that are something else
    than memory with strides are refused, and subclasses with a `__torch_function__` are asked first, as by torch's own
    functions.
    """

    @functools.wraps(function)
    def call(*args, **options):
        if is_dynamo_compiling():
            return torch.compiler.disable(call)(*args, **options)
        try:
            if not _plain.issuperset(map(type, args)) or not _plain.issuperset(map(type, options.values())):
                values = (*args, *options.values())
                if has_torch_function(values):
                    return handle_torch_function(call, values, *args, **options)
                recorders.refuse()
                _check_types(function, values)
            return function(*args, **options)
        except UnsupportedError:
            raise
        except Exception as error:
            _check_tensors(function, args, options, error)
            raise

    return call


def _check_types(function, values) -> None:
    """TypeError for tensor subclasses that kernels cannot read."""
    for kind in set(map(type, values)):
        if issubclass(kind, torch.Tensor):
            if kind.__torch_dispatch__ is not torch.Tensor.__torch_dispatch__:
                raise TypeError(
                    f"{function.__qualname__} takes tensors whose memory kernels can read, received "
                    f"{kind.__module__}.{kind.__qualname__}; pass the plain torch.Tensor inside it"
                )
        elif not hasattr(kind, "__torch_function__"):
            _plain.add(kind)


def _check_tensors(function, args, options, error) -> None:
    """A clearer error in place of `error`, if an argument is no tensor where one is due, or none that kernels read.

    Such calls fail before anything is launched; to look for the reason only then costs the others nothing.
    """
    parameters = inspect.signature(function).parameters
    given, tensors = {**dict(zip(parameters, args)), **options}, []
    for name, parameter in parameters.items():
        allowed = typing.get_args(parameter.annotation) or (parameter.annotation,)
        if torch.Tensor not in allowed or name not in given:
            continue
        value, what = given[name], f"{function.__qualname__}: {name} must be a dense tensor on a GPU or the CPU"
        if not isinstance(value, allowed):
            raise TypeError(f"{what}, received a {type(value).__module__}.{type(value).__qualname__}") from error
        if value is None:
            continue
        if value.is_nested:
            raise RuntimeError(f"{what}, received a nested tensor; use its parts, or .to_padded_tensor(0)") from error
        if value.layout is not torch.strided:
            raise RuntimeError(f"{what}, received layout {value.layout}; use .to_dense()") from error
        tensors.append(value)
    if tensors and all(tensor.is_meta for tensor in tensors):
        raise RuntimeError(
            f"{function.__qualname__} needs values, received meta tensors; for shapes alone use torch.nn's layers"
        ) from error
