"""The wrapper of every public operator. Tools that look at operators see those of torch.library instead of kernels."""

import functools
import inspect
import typing
from collections.abc import Callable

import torch
from torch.compiler import is_dynamo_compiling
from torch.overrides import handle_torch_function, has_torch_function

from cupy_kernels.errors import UnsupportedError

from . import onnx, recorders, replays
from .registration import traced

P = typing.ParamSpec("P")
R = typing.TypeVar("R")


def untraced(function: Callable[P, R]) -> Callable[P, R]:
    """`function` for all kinds of calls. Its body is not traced.

    torch.compile, and everything else that sees PyTorch's operators (make_fx, torch.export, fake and meta tensors,
    tensor subclasses, FlopCounterMode, torch.func), gets an operator of `registration` instead. The
    `__torch_function__` of subclasses is called first, as in PyTorch's own functions.
    """

    find = replays.finder(function)

    @functools.wraps(function)
    def call(*args, **options):
        if is_dynamo_compiling():
            if function.__name__ in traced and not _exchanges(options):
                return traced[function.__name__](*args, **options)
            return torch.compiler.disable(call)(*args, **options)  # a collective is in it: the graph breaks
        if recorders.present():
            return as_written(*args, **options)
        try:
            key, found, tensors = find(*args, **options)
        except (AttributeError, RuntimeError, TypeError, ValueError):
            pass  # as_written, outside of this handler, says what is wrong
        else:
            return replays.repeated(key, found, tensors, as_written, args, options)
        return as_written(*args, **options)

    def as_written(*args, **options):
        values = (*args, *options.values())
        if has_torch_function(values):  # its errors need no other reason
            return handle_torch_function(call, values, *args, **options)
        try:
            if function.__name__ in traced and (recorders.present() or dispatches(values)):
                return _of_library(function, args, options)
            return function(*args, **options)
        except UnsupportedError:
            raise
        except Exception:
            if function.__name__ not in traced or not all_meta(*args, *options.values()):
                _check_tensors(function, args, options)
                raise
        return _of_library(function, args, options)

    call.__prepare_scriptable__ = lambda: recorders.refuse_script(function.__name__)
    return call


def _of_library(function, args, options):
    """Calls the torch.library operator of a function."""
    if _exchanges(options):
        raise RuntimeError(
            f"{function.__name__} of a synchronised batch norm cannot be recorded or transformed in training: do it "
            "before modelnew.convert_sync_batchnorm, or use eval()"
        )
    if torch.onnx.is_in_onnx_export():
        return getattr(onnx, function.__name__)(*args, **options)
    recorders.refuse(function.__name__)
    return traced[function.__name__](*args, **options)


def _exchanges(options) -> bool:
    """Whether a call exchanges data with other processes, which no registered operator does."""
    return options.get("peers", options.get("process_group")) is not None


def dispatches(values) -> bool:
    """Whether one of the values is a tensor that handles operators itself."""
    kinds = [kind for kind in map(type, values) if issubclass(kind, torch.Tensor)]
    return any(kind.__torch_dispatch__ is not torch.Tensor.__torch_dispatch__ for kind in kinds)


def all_meta(*values) -> bool:
    """Whether all tensors are meta tensors."""
    tensors = [value for value in values if isinstance(value, torch.Tensor)]
    return bool(tensors) and all(tensor.is_meta for tensor in tensors)


def _check_tensors(function, args, options) -> None:
    """Raises a clearer error than a call's own if an argument is not a tensor, or one that kernels cannot read.

    Such calls fail before any launch. Looking for the reason only then costs other calls nothing.
    """
    parameters = inspect.signature(function).parameters
    given = {**dict(zip(parameters, args)), **options}
    for name, parameter in parameters.items():
        allowed = typing.get_args(parameter.annotation) or (parameter.annotation,)
        if torch.Tensor not in allowed or name not in given:
            continue
        value, what = given[name], f"{function.__qualname__}: {name} must be a dense tensor on a GPU or the CPU"
        if not isinstance(value, allowed):
            raise TypeError(f"{what}, received a {type(value).__module__}.{type(value).__qualname__}") from None
        if value is None:
            continue
        if value.is_nested:
            raise RuntimeError(f"{what}, received a nested tensor; use its parts, or .to_padded_tensor(0)") from None
        if value.layout is not torch.strided:
            raise RuntimeError(f"{what}, received layout {value.layout}; use .to_dense()") from None
