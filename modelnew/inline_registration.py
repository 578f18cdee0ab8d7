"""Operators of `inline` as torch.library knows them: ops.inline_<forward>, with a number where the name is taken."""

import functools
import itertools
from types import SimpleNamespace

import torch

from .interop import FLOATS, TORCH, check_floating, dense
from .registration import gradients_of_op, ops, register, results_of, traced


def registered(op, function: type[torch.autograd.Function]):
    """The packet of an `inline._Operator` that is complete. function: its autograd Function.

    It takes the operator's arguments in their order, and returns what that returns, then what only its backward needs.
    """
    suffixes = itertools.chain([""], map("_{}".format, itertools.count(2)))
    name = next(name for suffix in suffixes if not hasattr(ops, name := f"inline_{op.forward}{suffix}"))
    hidden = [name for name in op.outputs if name in op.kept and name not in op.returned]
    results = [*op.returned, *hidden]
    kinds = {p.name: "float" if p.dtype.kind == "f" else "int" for p in op.parameters[op.forward, "float"]}
    declared = ["Tensor" if name in op.inputs else kinds[name] for name in op.arguments]
    count = len(op.arguments)

    def split(args):
        values = dict(zip(op.arguments, args))
        generic = {name: values[name] for name in op.generic}
        check_floating(**generic)
        scalar = next((FLOATS[tensor.dtype] for tensor in generic.values()), "float")
        return scalar, {n: values[n] for n in op.numbers}, [dense(values[n]) for n in op.inputs]

    def run(*args):
        scalar, numbers, inputs = split(args)
        ctx = _Context()
        found = function.forward(ctx, op, scalar, numbers, *inputs)
        kept = dict(zip(op.kept, ctx.saved_tensors))
        return _single((*found, *(kept[name] for name in hidden)))

    def fake(*args):
        scalar, _, inputs = split(args)
        shapes, dtypes = op.shapes(args), {p.name: TORCH[p.dtype] for p in op.parameters[op.forward, scalar]}
        return _single(tuple(inputs[0].new_empty(shapes[name], dtype=dtypes[name]) for name in results))

    def save(args, found):
        return *(a for a in args if isinstance(a, torch.Tensor)), *_several(found)

    def backward(ctx, *gradients):
        inputs, found = ctx.saved_tensors[: len(op.inputs)], ctx.saved_tensors[len(op.inputs) :]
        values = iter(inputs)
        args = [next(values) if name in op.inputs else ctx.args[place] for place, name in enumerate(op.arguments)]
        dys = [torch.zeros_like(y) if dy is None else dy for dy, y in zip(gradients, found)]
        needed = [ctx.needs_input_grad[op.arguments.index(name)] for name in op.inputs]
        packet = getattr(ops, f"{name}_backward")
        gradients = iter(gradients_of_op(_several(packet(*args, *found, *dys, needed)), needed))
        return tuple(next(gradients) if name in op.inputs else None for name in op.arguments)

    def run_backward(*args):
        *tensors, needed = args[count:]
        found, dys = tensors[: len(results)], tensors[len(results) :]
        scalar, numbers, inputs = split(args[:count])
        numbers, grids = op.settled(args[:count], numbers)
        empty = [functools.partial(x.new_empty, x.shape) for x in inputs]
        kept = {**dict(zip(op.inputs, inputs)), **dict(zip(results, found))}
        ctx = _Context(op=op, scalar=scalar, numbers=numbers, grids=grids, empty=empty)
        ctx.save_for_backward(*(kept[name] for name in op.kept))
        ctx.needs_input_grad = (False, False, False, *needed)
        gradients = function.backward(ctx, *dys)[3:]
        return _single(results_of(inputs[0], *gradients))

    def fake_backward(*args):
        inputs, needed = [a for a in args[:count] if isinstance(a, torch.Tensor)], args[-1]
        return _single(results_of(inputs[0], *(x.new_empty(x.shape) if n else None for x, n in zip(inputs, needed))))

    _register(name, declared, len(results), run, fake, save, backward, outputs=len(op.returned))
    given = declared + ["Tensor"] * (len(results) + len(op.returned)) + ["bool[]"]
    _register(f"{name}_backward", given, len(op.inputs), run_backward, fake_backward)
    return getattr(ops, name)


def _single(results):
    return results if len(results) > 1 else results[0]


def _several(results):
    return results if isinstance(results, tuple) else (results,)


def _register(name, kinds, results, *callables, **options):
    arguments = ", ".join(f"{kind} argument{place}" for place, kind in enumerate(kinds))
    register(f"{name}({arguments}) -> ({', '.join(['Tensor'] * results)})", *callables, **options)


class _Context(SimpleNamespace):
    """What an autograd Function is given as its context."""

    def save_for_backward(self, *tensors):
        self.saved_tensors = tensors

    def mark_non_differentiable(self, *tensors):
        pass


def _call(op, *args, **options):
    """In place of an operator's `__call__`."""
    values = {**dict(zip(op.arguments, args)), **options}
    return _single(_several(op.registered(*(values[name] for name in op.arguments)))[: len(op.returned)])


traced["__call__"] = _call
