"""Checks the arguments of a call of an inline operator, and sorts them by name. See `inline.operator`."""

import numbers

import torch

from .inline_declaration import BROADCAST, Declaration
from .interop import FLOATS, check_floating, number


def checked(declared: Declaration, args, options) -> tuple[str, torch.device, dict]:
    """(the type of scalar_t, the device, {argument: value}) of a call. Raises what `inline.operator` lists."""
    if not options and len(args) == len(declared.arguments):
        values = dict(zip(declared.arguments, args))
    else:
        try:
            bound = declared.signature.bind(*args, **options)
        except TypeError as error:
            raise TypeError(f"{declared}: {error}{_advice(declared, args, options)}") from None
        bound.apply_defaults()
        values = bound.arguments
    for name in declared.tensors:
        value = values[name]
        if not isinstance(value, torch.Tensor):
            raise TypeError(
                f"{declared.name}: {name} must be a tensor, received {type(value).__name__}; torch.as_tensor makes one "
                "of an array or a list"
            )
        if value.layout is not torch.strided or value.is_nested:
            kind = "a nested tensor; use its parts" if value.is_nested else f"layout {value.layout}; use .to_dense()"
            raise TypeError(f"{declared.name}: {name} must be a dense tensor, received {kind}")
    scalar = _scalar(declared, values)
    for name in declared.tensors:
        if values[name].dtype != declared.dtypes[name, scalar]:
            wanted = declared.dtypes[name, scalar]
            raise TypeError(
                f"{declared.name}: {name} must be {wanted}, received {values[name].dtype}; use .to({wanted})"
            )
    for name, dtype in declared.numbers.items():
        values[name] = converted(f"{declared.name}: {name}", dtype, values[name])
    device = _device(values.pop("device", None)) if not declared.tensors else values[declared.tensors[0]].device
    _check_shapes(declared, values)
    return scalar, device, values


def _advice(declared, args, options) -> str:
    """How an int that a call lacks can be computed instead, as the number of elements often is meant to be."""
    given = {*declared.arguments[: len(args)], *options, *declared.options.defaults}
    lacking = [name for name, dtype in declared.numbers.items() if dtype.kind in "iu" and name not in given]
    if not lacking:
        return ""
    return (
        f". {' and '.join(lacking)} must be given in the call. If it is to be the number of the output's elements, "
        f"call it size in the kernel. sizes={{{lacking[0]!r}: a function of the arguments}} computes another number"
    )


def converted(what: str, dtype, value):
    """The value as a number that a kernel parameter of this NumPy dtype can take. Raises TypeError if it is none."""
    allowed = {"f": numbers.Real | torch.SymFloat | torch.SymInt, "b": bool}
    if not isinstance(value, allowed.get(dtype.kind, numbers.Integral | torch.SymInt)):
        tensor = ", not a tensor" * isinstance(value, torch.Tensor)
        raise TypeError(f"{what} must be a number of kind {dtype}{tensor}, received {value!r}")
    if isinstance(value, torch.SymInt | torch.SymFloat):
        return value
    # A float is a plan's to vary; numbers of other types would be told apart by ==, which 0.0 and -0.0 are not.
    return number(value, what) if dtype.kind == "f" else bool(value) if dtype.kind == "b" else int(value)


def _scalar(declared, values):
    if declared.typed:
        dtype = values.pop("dtype", None) or torch.get_default_dtype()
        if dtype not in FLOATS:
            raise TypeError(f"{declared.name}: dtype must be float32, float64, float16 or bfloat16, received {dtype!r}")
        return FLOATS[dtype]
    check_floating(**{name: values[name] for name in declared.generic})
    return FLOATS[values[declared.generic[0]].dtype] if declared.generic else "float"


def _device(device):
    device = torch.get_default_device() if device is None else torch.device(device)
    if device.type == "cuda" and device.index is None:
        return torch.device("cuda", torch.cuda.current_device())
    return device


def _check_shapes(declared, values):
    """Raises ValueError for an input with another shape than declared. Does not check inputs that are broadcast."""
    rules = declared.options.shapes
    if len(declared.tensors) < 2 and not rules:
        return
    first = values[declared.tensors[0]].shape
    for name in declared.tensors:
        tensor, rule = values[name], rules.get(name, first)
        if rule == BROADCAST:
            try:
                values[name] = tensor.expand(first)
            except RuntimeError:
                raise ValueError(
                    f"{declared}: {name} of shape {tuple(tensor.shape)} cannot be broadcast to {declared.tensors[0]}, "
                    f"of shape {tuple(first)}"
                ) from None
        elif rule is not None:
            wanted = rule
            if callable(rule):
                wanted = rule(*(values[name] for name in declared.arguments))
                wanted = shape(f"shapes= of {name}", wanted, _LENGTH | None)
            if len(wanted) != tensor.dim() or not all(n in (None, m) for n, m in zip(wanted, tensor.shape)):
                hint = "" if name in rules else f", as {declared.tensors[0]} has (shapes={{{name!r}: None}} allows any)"
                expected = ", ".join("any" if n is None else str(n) for n in wanted) + "," * (len(wanted) == 1)
                raise ValueError(
                    f"{declared}: {name} must have shape ({expected}){hint}; received {tuple(tensor.shape)}"
                )


_LENGTH = numbers.Integral | torch.SymInt


def shape(what: str, value, length=_LENGTH) -> tuple:
    """The result of an option's function as a shape. TypeError if it is not one. length: the types of its items."""
    lengths = isinstance(value, tuple | list) and all(isinstance(n, length) for n in value)
    if not lengths or any(isinstance(n, int) and n < 0 for n in value):
        raise TypeError(f"{what} gave {value!r}: a shape is a tuple of ints from 0 on, as in x.shape or (3,)")
    return tuple(value)


def blocks(kernel: str, value) -> tuple[int, int, int]:
    """The result of grid= for a kernel as three numbers of blocks. Raises TypeError if it is not one to three ints."""
    found = tuple(value) if isinstance(value, tuple | list) else (value,)
    if not 0 < len(found) <= 3 or not all(isinstance(n, _LENGTH) for n in found):
        raise TypeError(f"grid= gave {value!r} for {kernel}: the number of blocks is an int, or up to three")
    return (*found, 1, 1)[:3]


def check_changeable(declared: Declaration, values: dict, recorded: bool) -> None:
    """Raises RuntimeError for arguments that must not be changed in place. recorded: autograd records the call."""
    for name in declared.inplace:
        tensor = values[name]
        if recorded and tensor.requires_grad and tensor.is_leaf:
            raise RuntimeError(
                f"{declared} changes {name} in place, which is a leaf that requires grad: pass {name}.clone(), or call "
                "it under torch.no_grad()"
            )
        if tensor.is_inference() and not torch.is_inference_mode_enabled():
            raise RuntimeError(
                f"{declared} changes {name} in place, a tensor made under torch.inference_mode(): pass {name}.clone()"
            )


def apart(declared: Declaration, tensors: dict) -> dict:
    """Dense tensors for the kernels: a copy of each tensor that shares memory with a tensor that a kernel changes.

    Raises ValueError if two arguments that are changed share memory.
    """
    found = dict(tensors)
    for name, tensor in tensors.items():
        for changed in declared.inplace:
            if changed != name and _overlap(tensor, tensors[changed]):
                if name in declared.inplace:
                    raise ValueError(f"{declared} changes {changed} and {name}, which share memory; pass a clone")
                found[name] = tensor.clone()
    return found


def _overlap(a, b):
    return a.data_ptr() < b.data_ptr() + b.nbytes and b.data_ptr() < a.data_ptr() + a.nbytes
