"""A torch operator with autograd from CUDA C text: in a second, without a compiler, and on the emulator too."""

import inspect
import numbers
import re
from collections.abc import Callable, Iterable, Sequence
from functools import partial

import torch

from cupy_kernels import source
from cupy_kernels.common import ceil_div, scalar_macros
from cupy_kernels.launch import MAX_THREADS, launch
from cupy_kernels.source import Kernel, signature

from .calls import run
from .inline_registration import registered
from .interop import FLOATS, TORCH, check_floating, dense
from .untraced import untraced


def operator(
    text: str,
    forward: str,
    backward: "str | Callable | Sequence[str | Callable]" = (),
    *,
    output: Callable | None = None,
    sizes: dict[str, Callable] | None = None,
    grid: Callable | dict[str, Callable] | None = None,
    block: int = 256,
    saved: str | Sequence[str] = (),
    defines: dict[str, str | int] | None = None,
) -> Callable:
    """A function on torch tensors that runs the kernels of `text`, with autograd.

    A kernel's parameters say what they are by their declaration and name. In `forward`:
        const scalar_t* x   an input: the function's argument x
        scalar_t* y         an output: allocated here, and returned (several: as a tuple); the kernel writes all of it
        float slope         a number: the function's argument slope
        i64 size            how many elements the kernel's first output has
    In a kernel of `backward`:
        const scalar_t* dy  the gradient of the output y
        const scalar_t* x   an input or output of `forward`; it is saved only if a kernel of `backward` takes it
        scalar_t* dx        the gradient of the input x
        float slope, i64 size   as above
    The function's arguments are the inputs and numbers of `forward`, in the order of their declaration.

    Types are float, double, half_t, bf16_t, u8, int, i64; or scalar_t, the dtype of the inputs so declared, with acc_t
    for the arithmetic (double for double, else float): one text serves float32, float64, float16 and bfloat16.
    `#include "common.cuh"` gives these types, to_acc(v) and from_acc<scalar_t>(v).

    text: CUDA C. Kernels are written `extern "C" __global__ void name(...)`. Nothing is compiled before the first call.
    forward: name of the forward kernel.
    backward: names of the kernels that compute gradients. A kernel runs if one of its gradients is asked for. In place
        of a kernel's name, an operator made by this function: its arguments and outputs are named as a kernel's
        parameters would be. Gradients by kernels cannot be differentiated again, which raises RuntimeError; those by an
        operator can, if it has a backward of its own.
    output: output(*arguments) gives the shape of all outputs, or {name: shape}. Default: that of the first input.
    sizes: {name: function}: numbers of the kernels that function(*arguments) gives, such as the length of a row.
    grid: grid(*arguments) gives the number of blocks, an int or up to three; or {kernel: function}. Default: one
        thread for each element of the kernel's first output.
    block: threads in a block.
    saved: outputs of `forward` for `backward` alone, which the function does not return.
    defines: further macros.

    Raises ValueError for a kernel that is not in `text`, and for a parameter that matches nothing; TypeError for an
    option of another kind. The function raises TypeError for arguments of another number, kind or dtype, and where
    grid or sizes do not give whole numbers; ValueError for a grid without blocks, RuntimeError for tensors on several
    devices and for a gradient that no kernel computes, and KernelCompileError, with the line of `text`, if that does
    not compile.
    """
    backward, saved = _names("backward", backward, _Operator), _names("saved", saved)
    _check_options(text, forward, output, sizes, grid, block, defines)
    return _Operator(text, forward, backward, output, sizes, grid, block, saved, defines)


def _names(option, names, *others):
    kinds = (str, *others)
    names = (names,) if isinstance(names, kinds) else names
    if not isinstance(names, Iterable) or not all(isinstance(name, kinds) for name in names):
        raise TypeError(f"{option}= is a name{' or an operator' if others else ''}, or several, received {names!r}")
    return tuple(names)


def _check_options(text, forward, output, sizes, grid, block, defines):
    for option, value, kind in (("text", text, str), ("forward", forward, str), ("block", block, int)):
        if not isinstance(value, kind):
            raise TypeError(f"{option} is of type {kind.__name__}, received {value!r}")
    for option, value in (("sizes", sizes), ("defines", defines)):
        if not isinstance(value, dict | None):
            raise TypeError(f"{option}= is a dict, received {value!r}")
    grids = list(grid.values()) if isinstance(grid, dict) else [grid] if grid is not None else []
    outputs = [output] if output is not None else []
    for option, functions in (("output", outputs), ("sizes", (sizes or {}).values()), ("grid", grids)):
        for function in functions:
            if not callable(function):
                raise TypeError(
                    f"{option}= takes functions of the operator's arguments, as in lambda x: ...; received {function!r}"
                )
    if not 0 < block <= MAX_THREADS:
        raise ValueError(f"block must be 1 to {MAX_THREADS} threads, received {block}")
    for name in defines or ():
        if not re.fullmatch(r"[A-Za-z_]\w*", str(name)):
            raise ValueError(f"defines= is {{macro: value}}, and {name!r} is no name of a macro")


def _check_number(what, dtype, value):
    if not isinstance(value, numbers.Real if dtype.kind == "f" else numbers.Integral):
        raise TypeError(f"{what} must be a number of kind {dtype}, received {value!r}")


def _blocks(name, value):
    blocks = tuple(value) if isinstance(value, Sequence) else (value,)
    if len(blocks) > 3 or not all(isinstance(n, numbers.Integral) for n in blocks):
        raise TypeError(f"grid= gave {value!r} for {name}: the number of blocks is an int, or up to three")
    return (*blocks, 1, 1)[:3]


class _Operator:
    def __init__(self, text, forward, backward, output, sizes, grid, block, saved, defines):
        self.forward = forward
        self.backward = tuple(entry for entry in backward if isinstance(entry, str))
        self.operators = tuple(entry for entry in backward if not isinstance(entry, str))
        self.output, self.sizes, self.block = output, sizes or {}, block
        self.defines = source.texts(defines or {})
        self.grid = grid if isinstance(grid, dict) else dict.fromkeys((forward, *self.backward), grid) if grid else {}
        self.file = source.add(forward, text)
        for name in (forward, *self.backward, *self.grid):
            if name not in source.kernel_names(self.file):
                there = ", ".join(source.kernel_names(self.file)) or "none"
                raise ValueError(
                    f"the text has no kernel {name!r}; it has {there}. "
                    'Kernels are written: extern "C" __global__ void name(...)'
                )
        self.parameters = {
            (name, scalar): signature(self._kernel(name, scalar))
            for name in (forward, *self.backward)
            for scalar in FLOATS.values()
        }
        parameters = self.parameters[forward, "float"]
        self.inputs = [p.name for p in parameters if p.pointer and p.const]
        self.outputs = [p.name for p in parameters if p.pointer and not p.const]
        self.numbers = [p.name for p in parameters if not p.pointer and p.name not in ("size", *self.sizes)]
        self.arguments = [p.name for p in parameters if p.name in (*self.inputs, *self.numbers)]
        self.returned = [name for name in self.outputs if name not in saved]
        self.generic = [name for name in self.inputs if name in self._generic(forward)]
        self._check_forward(saved)
        for name in self.backward:
            parameters = self.parameters[name, "float"]
            self._check_types(name)
            constants = [p.name for p in parameters if p.pointer and p.const]
            results = [p.name for p in parameters if p.pointer and not p.const]
            numbers = [p.name for p in parameters if not p.pointer]
            self._check_backward(name, constants, results, numbers, (*self.inputs, *self.outputs))
        for entry in self.operators:  # autograd does not see outputs that are not returned
            self._check_backward(entry, entry.inputs, entry.returned, entry.numbers, (*self.inputs, *self.returned))
        used = {p.name for name in self.backward for p in self.parameters[name, "float"] if p.pointer}
        used.update(name for entry in self.operators for name in entry.inputs)
        self.kept = [name for name in (*self.inputs, *self.outputs) if name in used]
        self.__name__ = forward
        self.__signature__ = inspect.Signature(
            [inspect.Parameter(name, inspect.Parameter.POSITIONAL_OR_KEYWORD) for name in self.arguments]
        )
        self.registered = registered(self, _Function)
        self.__doc__ = f"{self} -> {', '.join(self.returned)}; see modelnew.inline.operator."

    def __repr__(self):
        return f"{self.forward}{self.__signature__}"

    def _kernel(self, name, scalar):
        return Kernel(self.file, name, tuple({**dict(scalar_macros(scalar)), **self.defines}.items()))

    def _generic(self, name):
        """Names of the parameters of type scalar_t."""
        pair = zip(self.parameters[name, "half_t"], self.parameters[name, "bf16_t"])
        return [p.name for p, q in pair if p.dtype != q.dtype]

    def _check_types(self, name):
        """ValueError for a parameter that nothing can be passed to."""
        for p in self.parameters[name, "float"]:
            if p.inout or p.dtype is None:
                raise ValueError(
                    f"{name}: {p.name} must be const (an input) or an output, of a type among scalar_t, acc_t, "
                    f"{', '.join(source.DTYPES)}"
                )
            if not p.pointer and (p.name in self._generic(name) or TORCH.get(p.dtype) == torch.bfloat16):
                raise ValueError(f"{name}: {p.name} is a number of type scalar_t or bf16_t; declare it acc_t")

    def _check_forward(self, saved):
        self._check_types(self.forward)
        if not self.inputs or not self.returned:
            raise ValueError(
                f"{self.forward} needs an input (a const pointer) and an output (a pointer) that it returns; its "
                f"inputs: {', '.join(self.inputs) or 'none'}, outputs: {', '.join(self.returned) or 'none'}"
            )
        unknown = [name for name in saved if name not in self.outputs]
        if unknown:
            raise ValueError(f"saved={unknown}: the outputs of {self.forward} are {', '.join(self.outputs)}")
        declared = {p.name for parameters in self.parameters.values() for p in parameters if not p.pointer}
        unknown = [name for name in self.sizes if name not in declared]
        if unknown:
            raise ValueError(f"sizes={unknown}: the numbers that the kernels take are {', '.join(sorted(declared))}")

    def _check_backward(self, name, constants, results, numbers, known):
        gradients = [f"d{input}" for input in self.inputs]
        for kind, names, allowed in (
            ("const pointer", constants, (*known, *(f"d{output}" for output in self.returned))),
            ("pointer", results, gradients),
            ("number", numbers, ("size", *self.numbers, *self.sizes)),
        ):
            for parameter in names:
                if parameter not in allowed:
                    raise ValueError(
                        f"{name}: the {kind} {parameter} matches nothing of {self.forward}; "
                        f"a {kind} is one of {', '.join(allowed)}"
                    )
        if not results:
            raise ValueError(f"{name} computes no gradient: none of {', '.join(gradients)} is its output")

    @untraced
    def __call__(self, *args, **options):
        try:
            values = self.__signature__.bind(*args, **options).arguments
        except TypeError as error:
            raise TypeError(f"{self}: {error}") from None
        scalar = self._check(values)
        # A float is a plan's to vary; numbers of other types would be told apart by ==, which 0.0 and -0.0 are not.
        kinds = {p.name: float if p.dtype.kind == "f" else int for p in self.parameters[self.forward, scalar]}
        numbers = {name: kinds[name](values[name]) for name in self.numbers}
        results = _Function.apply(self, scalar, numbers, *(dense(values[name]) for name in self.inputs))
        return results[0] if len(results) == 1 else results

    def _check(self, values):
        """TypeError unless the arguments are what the kernel declares. Returns what scalar_t is for them."""
        for name in self.inputs:
            if not isinstance(values[name], torch.Tensor):
                raise TypeError(f"{self.forward}: {name} must be a tensor, received {type(values[name]).__name__}")
        generic = {name: values[name] for name in self.generic}
        check_floating(**generic)
        scalar = next((FLOATS[tensor.dtype] for tensor in generic.values()), "float")
        for p in self.parameters[self.forward, scalar]:
            value = values.get(p.name)
            if p.name in self.inputs and value.dtype != TORCH[p.dtype]:
                raise TypeError(f"{self.forward}: {p.name} must be {TORCH[p.dtype]}, received {value.dtype}")
            if p.name in self.numbers:
                _check_number(f"{self.forward}: {p.name}", p.dtype, value)
        return scalar

    def shapes(self, arguments):
        """{output: shape}"""
        shape = self.output(*arguments) if self.output else arguments[self.arguments.index(self.inputs[0])].shape
        shapes = shape if isinstance(shape, dict) else dict.fromkeys(self.outputs, shape)
        if set(shapes) != set(self.outputs):
            raise ValueError(f"output= gave shapes of {', '.join(shapes)}; outputs are {', '.join(self.outputs)}")
        return shapes

    def settled(self, arguments, numbers):
        """(numbers, those of sizes= among them; {kernel: its blocks, where grid= says})"""
        numbers = {**numbers, **{name: size(*arguments) for name, size in self.sizes.items()}}
        return numbers, {name: _blocks(name, grid(*arguments)) for name, grid in self.grid.items()}

    def run(self, name, scalar, tensors, numbers, grid):
        """Starts one kernel; `tensors` and `numbers` by name."""
        parameters = self.parameters[name, scalar]
        size = next(tensors[p.name].numel() for p in parameters if p.pointer and not p.const)
        numbers = {"size": size, **numbers}
        args = [tensors[p.name] if p.pointer else numbers[p.name] for p in parameters]
        for p in parameters:
            if p.name in self.sizes:
                _check_number(f"{name}: {p.name}, which sizes= gives,", p.dtype, numbers[p.name])
        grid = (ceil_div(size, self.block), 1, 1) if grid is None else grid
        if 0 in grid and size:
            raise ValueError(f"grid= gave {grid} blocks for {name}, whose output has {size} elements: none would run")
        run(_launch, self._kernel(name, scalar), grid, self.block, *args)


def _launch(kernel, grid, block, *args):
    launch(kernel, grid, (block, 1, 1), args)


class _Function(torch.autograd.Function):
    @staticmethod
    def forward(ctx, op, scalar, numbers, *inputs):
        tensors = dict(zip(op.inputs, inputs))
        arguments = [numbers[name] if name in numbers else tensors[name] for name in op.arguments]
        shapes = op.shapes(arguments)
        numbers, grids = op.settled(arguments, numbers)
        for p in op.parameters[op.forward, scalar]:
            if p.name in op.outputs:
                tensors[p.name] = torch.empty(shapes[p.name], dtype=TORCH[p.dtype], device=inputs[0].device)
        op.run(op.forward, scalar, tensors, numbers, grids.get(op.forward))
        ctx.op, ctx.scalar, ctx.numbers, ctx.grids = op, scalar, numbers, grids
        ctx.empty = [partial(torch.empty, x.shape, dtype=x.dtype, device=x.device) for x in inputs]
        ctx.save_for_backward(*(tensors[name] for name in op.kept))
        results = tuple(tensors[name] for name in op.returned)
        ctx.mark_non_differentiable(*(y for y in results if not y.is_floating_point()))
        return results

    @staticmethod
    def backward(ctx, *gradients):
        op = ctx.op
        wanted = [f"d{name}" for name, needed in zip(op.inputs, ctx.needs_input_grad[3:]) if needed]
        empty = {f"d{name}": make for name, make in zip(op.inputs, ctx.empty)}
        # Names of saved tensors go last: an input may be called dy.
        tensors = {f"d{name}": dense(g) for name, g in zip(op.returned, gradients)}
        tensors.update(zip(op.kept, ctx.saved_tensors))
        results = {}
        for name in op.backward:
            written = [p.name for p in op.parameters[name, ctx.scalar] if p.pointer and not p.const]
            if set(written).intersection(wanted):
                made = {gradient: empty[gradient]() for gradient in written}
                op.run(name, ctx.scalar, {**tensors, **made}, ctx.numbers, ctx.grids.get(name))
                if torch.is_grad_enabled():
                    read = [tensors[p.name] for p in op.parameters[name, ctx.scalar] if p.pointer and p.const]
                    made = dict(zip(made, _Once.apply(op.forward, len(made), *made.values(), *read)))
                results.update(made)
        for entry in op.operators:
            if set(entry.returned).intersection(wanted):
                made = entry(**{name: {**tensors, **ctx.numbers}[name] for name in entry.arguments})
                results.update(zip(entry.returned, made if isinstance(made, tuple) else (made,)))
        missing = [gradient for gradient in wanted if gradient not in results]
        if missing:
            raise RuntimeError(
                f"{op.forward} has no gradient {', '.join(missing)}: no kernel of backward={op.backward} writes it. "
                "Write one, or pass the argument without requires_grad (x.detach())"
            )
        return None, None, None, *(results[f"d{x}"] if f"d{x}" in wanted else None for x in op.inputs)


class _Once(torch.autograd.Function):
    """Gradients that kernels computed of `read`, the last arguments. Differentiating them again raises."""

    @staticmethod
    def forward(ctx, name, count, *tensors):
        ctx.name = name
        return tensors[:count]

    @staticmethod
    def backward(ctx, *_):
        raise RuntimeError(
            f"the gradient of {ctx.name} is computed by a kernel, which cannot be differentiated: for second "
            "derivatives give an operator with a backward of its own in backward=, see modelnew.inline.operator"
        )
