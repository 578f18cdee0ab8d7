"""torch.ops.modelnew: the operators as registered with PyTorch.

Tools that trace, record or transform operators see these, see `untraced`. Eager calls do not use them, because an
autograd Function is faster than the dispatcher.
"""

import inspect
import re
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch._functorch.utils import enable_single_level_autograd_function
from torch.autograd import forward_ad
from torch.autograd.forward_ad import _set_fwd_grad_enabled
from torch.utils.flop_counter import register_flop_formula

from . import recorders, replays, shortcuts
from .interop import check_floating

_library = torch.library.Library("modelnew", "FRAGMENT")
ops = torch.ops.modelnew
traced = {}  # {name of a public function: what runs in its place where something records}


def in_place_of(function: Callable) -> Callable:
    """Decorates a function that calls `ops` for a public function, whose name and arguments it gets."""
    traced[function.__name__] = function
    return function


def register(
    schema: str,
    run: Callable,
    fake: Callable,
    save: Callable | None = None,
    backward: Callable | None = None,
    *,
    outputs: int = 1,
    settle: Callable | None = None,
    flops: Callable | None = None,
) -> None:
    """Registers ops.<name>. All callables take the arguments in the order of the schema, which has no defaults.

    schema: as for torch.library. For arguments that are mutated there are two overloads: ops.<name>.updating mutates
        them, ops.<name>.default is for calls that mutate nothing. The last argument may be `bool keep=False`, whether a
        backward follows. Callers leave it out; it is set when the operator runs.
    run: computes the results, all new, from real tensors. Calls of the same kind are replayed, see `replays`.
    fake: makes results of the same shapes, dtypes and strides from tensors without values, whose sizes may be symbols.
    save: save(args, results) returns the tensors that the backward needs.
    backward: backward(ctx, *gradients) returns the gradients of the first arguments as a tuple. `gradients` are those
        of the first `outputs` results; other results have none. ctx: a `_Saved`. Without save and backward the
        operator has no derivative.
    settle: settle(*args) returns the arguments, with what depends on settings replaced by its current value.
    flops: flops(*args) returns the count for FlopCounterMode; it gets shapes in place of tensors.
    """
    for overload in _overloads(schema):
        _register(overload, run, fake, save, backward, outputs, settle)
    if flops is not None:
        register_flop_formula(getattr(ops, schema.split("(")[0]))(lambda *shapes, **_: flops(*shapes))


def register_elementwise(
    function: Callable,
    stand_in: Callable,
    gradient: Callable,
    second: Callable,
    *,
    numbers: str = "",
    saves_result: bool = False,
) -> None:
    """Registers ops.<name> and ops.<name>_backward for a public function of one tensor, computed for each element.

    stand_in: what runs in place of the function where something records, with its arguments. It calls ops.<name>.
    gradient: gradient(dy, saved, *numbers) returns dx. saved: the input, or with `saves_result` the result.
    second: second(v, dy, saved) returns the gradient of dx for `saved`, where v is that of dx.
    numbers: the operator's arguments after the input as in a schema, such as ", float negative_slope".
    """
    name, saved = function.__name__, "y" if saves_result else "x"

    def backward(*args):
        return getattr(ops, f"{name}_backward")(*args)

    traced[name] = stand_in
    register(
        f"{name}(Tensor input{numbers}) -> Tensor",
        inspect.unwrap(function),
        _fake_elementwise,
        lambda args, y: (y,) if saves_result else args[:1],
        lambda ctx, dy: (backward(dy, *ctx.saved_tensors, *ctx.args[1:]),),
    )
    register(
        f"{name}_backward(Tensor dy, Tensor {saved}{numbers}) -> Tensor",
        gradient,
        lambda dy, saved, *_: torch.empty_like(saved),
        lambda args, dx: args[:2],
        lambda ctx, v: (backward(v, ctx.saved_tensors[1], *ctx.args[2:]), second(v, *ctx.saved_tensors)),
    )


def _fake_elementwise(input, *_):
    check_floating(input=input)
    return torch.empty_like(input)


def composite(schema: str, function: Callable) -> None:
    """Registers ops.<name>, which `function` computes with other operators."""
    for overload in _overloads(schema):
        _library.define(overload)
        for key in ("CompositeImplicitAutograd", "FuncTorchBatchedDecomposition"):  # the latter is for torch.func.vmap
            _library.impl(overload.partition("(")[0], function, key)


def _overloads(schema):
    if "!" in schema:
        yield schema.replace("(", ".updating(", 1)
    yield re.sub(r"\(\w!\)", "", schema)


def _register(schema, run, fake, save, backward, outputs, settle):
    name = schema.partition("(")[0]
    _library.define(schema)
    packet, _, overload = name.partition(".")
    op = getattr(getattr(ops, packet), overload or "default")
    keeps = op._schema.arguments[-1].name == "keep"

    count = len(op._schema.arguments) - keeps

    def compute(*args):
        with torch.no_grad():
            return replays.of_operator(op, run, all_of(args))

    def imagine(*args):
        return fake(*all_of(args))

    def all_of(args):
        return (*args, False) if keeps and len(args) == count else args  # the dispatcher leaves defaults out

    for device in ("CPU", "CUDA"):
        _library.impl(name, compute, device)
    torch.library.register_fake(f"modelnew::{name}", imagine, lib=_library)
    torch.library.register_vmap(f"modelnew::{name}", _one_by_one(op), lib=_library)

    def autograd(*args):
        needed = torch.is_grad_enabled() and any(isinstance(a, torch.Tensor) and a.requires_grad for a in args)
        keep = (needed or args[count:] == (True,),) if keeps else ()
        args = args[:count] if settle is None else settle(*args[:count])
        args = *args, *keep
        if not needed and forward_ad._current_level < 0:
            with torch._C._AutoDispatchBelowAutograd():
                return op(*args)
        if not torch._C._are_functorch_transforms_active():
            return shortcuts.apply(differentiable, *args)
        with enable_single_level_autograd_function():
            return shortcuts.apply(differentiable, *args)

    differentiable = _function(op, save, backward, outputs)
    _library.impl(name, autograd, "Autograd")


class _Saved(NamedTuple):
    """What a backward knows of its forward."""

    saved_tensors: list[torch.Tensor | None]
    args: list  # with None in place of tensors
    needs_input_grad: tuple[bool, ...]


def _function(op, save, backward, outputs):
    """The autograd Function of an operator."""

    class Registered(torch.autograd.Function):
        @staticmethod
        def forward(ctx, *args):
            # What autograd switches off here is for this level of torch.func's transforms, not for those around it.
            outer = torch._C._are_functorch_transforms_active()
            with torch._C._AutoDispatchBelowAutograd(), torch.set_grad_enabled(outer), _set_fwd_grad_enabled(outer):
                results = op(*args)
            if isinstance(results, tuple) and backward is not None:
                integers = [result for result in results[:outputs] if not result.is_floating_point()]
                ctx.mark_non_differentiable(*integers, *results[outputs:])
            ctx.set_materialize_grads(False)
            if backward is not None:
                ctx.save_for_backward(*save(args, results))
            ctx.args = [None if isinstance(a, torch.Tensor) else a for a in args]
            return results

        @staticmethod
        def backward(ctx, *gradients):
            if backward is None:
                raise RuntimeError(
                    f"{op} has no derivative of its own: outside of torch.func's transforms and torch.compile, "
                    "torch.autograd.grad(..., create_graph=True) says more"
                )
            missing = len(ctx.args)
            if not any(dy is not None for dy in gradients):
                return (None,) * missing
            saved = _Saved([*map(recorders.alive, ctx.saved_tensors)], ctx.args, ctx.needs_input_grad)
            found = backward(saved, *gradients[:outputs])
            return *found, *(None,) * (missing - len(found))

        @staticmethod
        def jvp(ctx, *tangents):
            raise RuntimeError(
                f"{op} has no forward-mode derivative (jvp, jacfwd, hessian, forward_ad): use reverse mode, as in "
                "torch.func.vjp, jacrev or autograd.functional.hvp, or torch.nn's layers"
            )

    return Registered


def _one_by_one(op):
    """The rule of torch.func.vmap for an operator: it runs once for each element."""

    def rule(info, in_dims, *args):
        for declared, value, dim in zip(op._schema.arguments, args, in_dims):
            if dim is None and isinstance(value, torch.Tensor) and declared.is_write:
                raise RuntimeError(
                    f"vmap: each element of the batch would write to the same {declared.name} of {op}; "
                    "use torch.func.replace_all_batch_norm_modules_, or evaluation mode"
                )
        size = info.batch_size
        if not size:  # an element of zeros tells what the results are like
            args = [a.new_zeros(_with_one(a.shape, d)) if type(d) is int else a for a, d in zip(args, in_dims)]
        found = []
        for index in range(max(1, size)):
            found.append(op(*(a.select(d, index) if type(d) is int else a for a, d in zip(args, in_dims))))
        if isinstance(found[0], tuple):
            return tuple(torch.stack(results)[:size] for results in zip(*found)), (0,) * len(found[0])
        return torch.stack(found)[:size], 0

    return rule


def _with_one(shape, dim):
    return *shape[:dim], 1, *shape[dim + 1 :]


def results_of(like: torch.Tensor, *results: torch.Tensor | None) -> tuple[torch.Tensor, ...]:
    """An operator's results, with an empty tensor in place of each None."""
    return tuple(like.new_empty(0) if result is None else result for result in results)


def gradients_of_op(results, needed) -> tuple[torch.Tensor | None, ...]:
    """The inverse of `results_of` for gradients: None for those that are not needed."""
    return tuple(result if need else None for result, need in zip(results, needed))


def fake_gradients(dy: torch.Tensor, tensors, needed) -> tuple[torch.Tensor, ...]:
    """Fake gradients of `tensors`: contiguous, or with the strides of a tensor that has no gaps."""
    return results_of(dy, *(torch.empty_like(t) if need else None for t, need in zip(tensors, needed)))
