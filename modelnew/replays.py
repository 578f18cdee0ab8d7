"""Fast replays of repeated calls, without the checks and the Python code that the first calls ran.

The first two calls of a kind run normally. Suppose that all that the second one does is one `calls.call` on its
tensors' memory, perhaps inside one autograd Function. Then it leaves a replay: a function, generated for this kind,
that takes the tensors' addresses, allocates, starts the launches and returns. A later call uses it if its other
arguments and torch's settings are the same, and its tensors of the same kind according to torch's own guards. If a call
does more, such as copying an argument, calls of its kind always run normally.

A public function, and an operator of `registration`, may depend only on its arguments and on the settings in `finder`.
"""

import contextlib
import functools
import inspect
import marshal
import typing
from collections.abc import Callable, Collection

import torch
from torch import is_grad_enabled

from cupy_kernels.launch import word
from cupy_kernels.plan import written

from . import calls, numerics, recorders
from .shortcuts import allocator, any_autocast, apply, current_device, guard_of, raw_stream

_MOST_REPLAYS = 8  # of calls that differ in their tensors alone, and not in the shape of the first


class Missed(Exception):
    """A replay cannot run a call: a tensor has no memory, or is not aligned."""


class _Unrepeatable(Exception):
    """A call does something that a replay cannot do."""


class _Replay(typing.NamedTuple):
    guard: Callable  # guard(*tensors): whether they are of the kinds that it is for
    run: Callable | None  # run(*tensors) is the call; None if calls of this kind are not repeated


class _Applied(typing.NamedTuple):
    """What the forward of an autograd Function did."""

    function: type[torch.autograd.Function]
    args: tuple
    attributes: dict  # that its context has got
    saved: tuple
    result: torch.Tensor


def finder(function: Callable) -> Callable:
    """find(*args, **options) -> (key, replays, tensors) of a call of `function`, whose first argument is a tensor.

    key: the kind of the call, except for the kinds of its tensors. replays: those that are known for it.

    It is generated as code, because every call runs it. It raises AttributeError, RuntimeError, TypeError or ValueError
    for tensors that are none, and for other arguments than numbers, strings and the like.
    """
    parameters = inspect.signature(function).parameters.values()
    kinds = {p.name: p.annotation for p in parameters}
    tensors = [name for name, kind in kinds.items() if torch.Tensor in (kind, *typing.get_args(kind))]
    others = [name for name in kinds if name not in tensors] + [f"{name} is None" for name in tensors]
    given = f"({', '.join(tensors)},)"
    if any(kinds[name] is not torch.Tensor for name in tensors):
        given = f"[tensor for tensor in {given} if tensor is not None]"
    signature = inspect.Signature([p.replace(annotation=p.empty) for p in parameters])
    lines = (
        f"def find{signature}:",
        f"    others = dumps(({', '.join(others)},), 2)",
        f"    key = function, others, is_grad_enabled(), settings(), any_autocast() and dtypes(), {tensors[0]}.shape",
        f"    return key, calls.caches().replays.get(key, ()), {given}",
    )
    # 2 and 2.0, 0.0 and -0.0 are equal, and not the same, as bytes show; version 2 of marshal sees no identity.
    defined = {"function": function, "dumps": marshal.dumps, "is_grad_enabled": is_grad_enabled}
    defined |= {"settings": numerics.settings, "any_autocast": any_autocast, "dtypes": _autocast_dtypes, "calls": calls}
    exec("\n".join(lines), defined)
    return defined["find"]


def of_operator(op, run: Callable, args: tuple):
    """run(*args), or its replay, for an operator of `registration`. The first argument is a tensor."""
    if recorders.may_record():
        return run(*args)
    tensors = [arg for arg in args if isinstance(arg, torch.Tensor)]
    others = marshal.dumps([... if isinstance(arg, torch.Tensor) else arg for arg in args], 2)
    key = op, others, numerics.settings(), any_autocast() and _autocast_dtypes(), args[0].shape
    return repeated(key, calls.caches().replays.get(key, ()), tensors, run, args, {})


def _autocast_dtypes():
    return torch.get_autocast_dtype("cpu"), torch.get_autocast_dtype("cuda")


def repeated(key, replays: tuple, tensors: Collection, as_written: Callable, args: tuple, options: dict):
    """as_written(*args, **options), or its replay.

    replays: those that are known for `key`.
    tensors: all tensors of the call.
    """
    for guard, run in replays:
        if not guard(*tensors):
            continue
        if run is not None:
            try:
                return run(*tensors)
            except Missed:
                pass
        return as_written(*args, **options)
    return _recorded(key, replays, tensors, lambda: as_written(*args, **options))


def _recorded(key, replays, tensors, as_written):
    """as_written(). If this is the second call of its kind, it leaves a replay, or a note that there is none."""
    seen = calls.caches().seen
    if key not in seen:
        calls.remember(seen, key, None)
        return as_written()
    plain = all(type(tensor) in (torch.Tensor, torch.nn.Parameter) for tensor in tensors)
    backward = type(key) is not tuple
    known = plain and len(replays) < _MOST_REPLAYS and not calls.planning()
    known = known and (backward or not _has_bytes(marshal.loads(key[1])))
    guard = guard_of(tensors) if known else None
    if guard is None:
        return as_written()
    run, made, outer = None, [], calls.recording.made
    calls.recording.made = made
    try:
        result = as_written()
        with contextlib.suppress(_Unrepeatable):
            run = _written(tensors, made, result, all_used=not backward)
        return result
    finally:
        calls.recording.made = outer
        if outer is not None:
            outer.append(None)  # it did more than its own calls
        calls.remember(calls.caches().replays, key, (*replays, _Replay(guard, run)))


def _has_bytes(values) -> bool:
    """Whether there were NumPy's numbers, of which marshal writes the bytes and not the type: a key stands for many."""
    return any(isinstance(v, bytes) or (isinstance(v, tuple | list) and _has_bytes(v)) for v in values)


def noted(forward: Callable, function: type[torch.autograd.Function]) -> Callable:
    """The forward of an autograd Function, which reports to a call that is being recorded."""

    @functools.wraps(forward)
    def call(ctx, *args):
        result = forward(ctx, *args)
        made = calls.recording.made
        if made is not None:
            made.append(_Applied(function, args, {**vars(ctx)}, ctx.to_save or (), result))
            if ctx.non_differentiable or ctx.dirty_tensors:
                made.append(None)
        return result

    return call


def _written(tensors, made, result, all_used) -> Callable:
    """run(*tensors), generated from everything that a call with this `result` did."""
    applied = made.pop() if made and isinstance(made[-1], _Applied) else None
    if len(made) != 1 or made[0] is None:
        raise _Unrepeatable
    code = _Code(tensors, *made[0])
    if all_used and len(code.sources) < len(tensors):
        raise _Unrepeatable  # what became of the others is not known
    if applied is None:
        results = result if isinstance(result, tuple) else (result,)
        if any(tensor is not None and tensor.requires_grad for tensor in results):
            raise _Unrepeatable
        return code.function(code.expression(result))
    if result is not applied.result or not _constant(applied.attributes):
        raise _Unrepeatable
    kernels = code.function(code.expression((result, tuple(applied.saved))))
    arguments = [code.given(arg) if isinstance(arg, torch.Tensor) else "None" for arg in applied.args]
    how = kernels, {**applied.attributes, "key": object()}
    defined = {"apply": apply, "function": _repeating(applied.function), "how": how}
    line = f"def run({code.names}): return apply(function, {', '.join(arguments)}, (*how, ({code.names},)))"
    exec(line, defined)
    return defined["run"]


def _constant(value) -> bool:
    """Whether a value is the same at every call."""
    if isinstance(value, dict):
        value = tuple(value.values())
    return all(map(_constant, value)) if isinstance(value, tuple) else isinstance(value, _CONSTANT)


_CONSTANT = (type(None), bool, int, float, str)


@functools.cache
def _repeating(function: type[torch.autograd.Function]) -> type[torch.autograd.Function]:
    """`function` for replays. It takes one more argument, the last one, which describes the work."""

    def forward(ctx, *args):
        kernels, attributes, tensors = args[-1]
        result, saved = kernels(*tensors)
        vars(ctx).update(attributes)
        ctx.save_for_backward(*saved)
        return result

    @recorders.not_compiled
    def backward(ctx, *gradients):
        saved = ctx.saved_tensors  # once: torch.utils.checkpoint insists on it

        if is_grad_enabled() or recorders.may_record():
            return as_written(ctx, saved, gradients)
        tensors = [tensor for tensor in (*gradients, *saved) if tensor is not None]
        known = calls.caches().replays.get(ctx.key, ())
        return repeated(ctx.key, known, tensors, as_written, (ctx, saved, gradients), {})

    def as_written(ctx, saved, gradients):
        found = function.backward(_Unpacked(ctx, saved), *gradients)
        return (*found, None) if isinstance(found, tuple) else (found, None)

    methods = {"forward": staticmethod(forward), "backward": staticmethod(backward)}
    return type(function)(function.__name__, (torch.autograd.Function,), methods)


class _Unpacked:
    """A backward's context, whose saved tensors are unpacked already."""

    def __init__(self, ctx, saved):
        self._ctx, self.saved_tensors = ctx, saved

    def __getattr__(self, name):
        return getattr(self._ctx, name)


class _Code:
    """A call's work as generated code, from what `calls.call` did once: t0, t1 ... are tensors, v<index> new values."""

    def __init__(self, tensors, found, values):
        self.tensors, self.found, self.values = tensors, found, values
        self.names = ", ".join(f"t{i}" for i in range(len(tensors)))
        places = {tensor.data_ptr(): i for i, tensor in enumerate(tensors)}
        if len(places) != len(tensors) or any(place % 16 or not place for place in places):
            raise _Unrepeatable  # tensors share memory, have none, or are not aligned
        count = len(values) - found.slots
        arguments = {i: value.data_ptr() for i, value in enumerate(values[:count]) if isinstance(value, torch.Tensor)}
        if len(set(arguments.values())) != len(arguments) or not places.keys() >= set(arguments.values()):
            raise _Unrepeatable  # kernels read a copy, or a tensor twice
        self.sources = {index: places[place] for index, place in arguments.items()}
        returned = found.returned if isinstance(found.returned, tuple) else (found.returned,)
        self.layouts = {}  # {index: shape and strides that a result has for the caller}
        self.results = {values[index].data_ptr(): index for index in returned if index is not None}
        self.defined = {"empty": allocator(found.device)}

    def given(self, tensor) -> str:
        """The expression for a tensor that the call was given."""
        for i, given in enumerate(self.tensors):
            if given is tensor:
                return f"t{i}"
        raise _Unrepeatable

    def expression(self, value) -> str:
        """The expression for a tensor that the call was given or made, None, or a tuple of these."""
        if value is None:
            return "None"
        if isinstance(value, tuple):
            return f"({''.join(f'{self.expression(one)}, ' for one in value)})"
        index = self.results.get(value.data_ptr())
        if index is None and value.shape == (0,) and all(value is not tensor for tensor in self.tensors):
            if self.defined.setdefault("dtype", value.dtype) != value.dtype:
                raise _Unrepeatable
            return "empty((0,), (1,), dtype)"  # see `registration.results_of`
        if index is None:
            return self.given(value)
        made = self.values[index]
        if value.dtype != made.dtype or value.numel() != made.numel():
            raise _Unrepeatable
        layout = tuple(value.shape), value.stride()
        if self.layouts.setdefault(index, layout) != layout:
            raise _Unrepeatable
        return f"v{index}"

    def _argument(self, index) -> str:
        """The expression for a value that the call had before it made any."""
        value = self.values[index]
        if index in self.sources:
            return f"t{self.sources[index]}.as_strided({tuple(value.shape)}, {value.stride()})"
        return f"numbers[{index}]" if isinstance(value, float) else "None"

    def function(self, result: str) -> Callable:
        """run(*tensors), which returns the expression `result`."""
        plan, gpu, _, stages, *_ = self.found
        every = range(len(self.tensors))
        lines = [f"a{i} = t{i}.data_ptr()" for i in every]
        aligned = f"({' | '.join(f'a{i}' for i in every)}) & 15"
        lines += [f"if {aligned} or not ({' and '.join(f'a{i}' for i in every)}):", "    raise Missed"]
        defined, stream = {**self.defined, "watched": calls.watched, "show": calls.show, "plan": plan}, None
        defined["Missed"] = Missed
        defined["numbers"] = {index: value for index, value in enumerate(self.values) if isinstance(value, float)}
        if gpu is not None:
            stream = f"raw_stream({gpu})"
            lines += [f"if current_device() != {gpu}:", f"    with on({gpu}):", f"        return run({self.names})"]
            defined.update(current_device=current_device, on=torch.cuda.device, raw_stream=raw_stream)
        pointers = [f"a{self.sources[i]}" if i in self.sources else "0" for i in range(len(self.values))]
        values = [self._argument(index) for index in range(len(self.values))]
        for number, (made, steps, dropped) in enumerate(stages):
            for index, shape, strides, dtype in made:
                layout = shape, strides
                shape, strides = self.layouts.get(index, layout)
                defined[f"dtype{index}"], pointers[index] = dtype, f"b{index}"
                values[index] = f"v{index}.as_strided{layout}"  # as kernels see it
                lines.append(f"v{index} = empty({shape}, {strides}, dtype{index})")
                lines.append(f"b{index} = v{index}.data_ptr()")
            if steps:
                batch = plan.batch(steps)
                words = [*pointers, *(f"{pointers[index]} + {offset}" for index, offset in batch.inside)]
                words += [str(word(self.values[index], parameter)) for index, parameter in batch.varying]
                defined.update({f"pack{number}": batch.pack, f"words{number}": batch.words})
                lines.append(f"pack{number}(words{number}, 0, {', '.join(words)})")
                defined.update({f"backend{number}": batch.backend, f"launches{number}": batch.launches})
                lines.append(f"if not watched() or show(plan, [{', '.join(values)}], {steps}):")
                lines.append(f"    backend{number}.start(launches{number}, {stream})")
            for index in dropped:
                values[index] = "None"
                lines.append(f"v{index} = None")
        updated = {f"t{self.sources[i]}": None for step in plan.steps for i in written(step) if i in self.sources}
        if updated:
            defined["increment_version"] = torch.autograd.graph.increment_version
            lines.append(f"increment_version([{', '.join(updated)}])")
        exec("\n    ".join([f"def run({self.names}):", *lines, f"return {result}"]), defined)
        return defined["run"]
