"""The arguments and results that an inline operator's text and options declare, and the errors if they do not match."""

import inspect
import keyword
import numbers
import re
from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch

from cupy_kernels import hints, parsing, source
from cupy_kernels.backend import MAX_SHARED_BYTES
from cupy_kernels.common import check_within, scalar_macros
from cupy_kernels.launch import MAX_THREADS
from cupy_kernels.source import Kernel, signature

from .interop import FLOATS, TORCH

BROADCAST = "broadcast"  # what shapes= says of an input that is expanded to the shape of the first


class Options(NamedTuple):
    """The options of `inline.operator`, each checked by itself."""

    text: str
    forward: tuple[str, ...]
    backward: tuple
    output: Callable | None
    shapes: dict
    sizes: dict[str, Callable]
    workspace: dict[str, Callable]
    defaults: dict
    grid: Callable | dict[str, Callable] | None
    block: int
    shared: int
    saved: tuple[str, ...]
    defines: dict[str, str | int]

    @classmethod
    def checked(cls, operator: type, text, forward, backward, **options) -> "Options":
        """Raises the TypeError and ValueError of `inline.operator`. operator: the type of operators in `backward`."""
        forward, saved = _names("forward", forward), _names("saved", options.pop("saved"))
        backward = _names("backward", backward, operator)
        for name in ("shapes", "sizes", "workspace", "defaults", "defines"):
            if not isinstance(options[name], dict | None):
                raise TypeError(f"{name}= is a dict, received {options[name]!r}")
            options[name] = options[name] or {}
        found = cls(text=text, forward=forward, backward=backward, saved=saved, **options)
        if not isinstance(text, str):
            raise TypeError(f"text is of type str, received {text!r}")
        if not forward:
            raise ValueError("forward= names no kernel")
        for option, function in found.functions():
            if not callable(function):
                raise TypeError(
                    f"{option}= takes functions of the operator's arguments, as in lambda x: ...; received {function!r}"
                )
        check_within("block", found.block, 1, MAX_THREADS, "threads")
        check_within("shared", found.shared, 0, MAX_SHARED_BYTES, "bytes")
        for name, value in found.defines.items():
            if not re.fullmatch(r"[A-Za-z_]\w*", str(name)):
                raise ValueError(f"defines= is {{macro: value}}, and {name!r} is no name of a macro")
            if not isinstance(value, str | numbers.Real) or isinstance(value, bool):
                raise TypeError(f"defines=: {name} must be a str or a number, received {value!r}")
        return found

    def functions(self) -> list[tuple[str, Callable]]:
        """(option, function) for every function among the options."""
        single = [("output", self.output)] if self.output is not None else []
        shapes = {name: shape for name, shape in self.shapes.items() if shape is not None and shape != BROADCAST}
        grid = self.grid if isinstance(self.grid, dict) else {} if self.grid is None else {"": self.grid}
        several = {"shapes": shapes, "sizes": self.sizes, "workspace": self.workspace, "grid": grid}
        return single + [(option, f) for option, functions in several.items() for f in functions.values()]


def _names(option, names, *others):
    kinds = (str, *others)
    names = (names,) if isinstance(names, kinds) else names
    if not isinstance(names, Iterable) or not all(isinstance(name, kinds) for name in names):
        raise TypeError(f"{option}= is a name{' or an operator' if others else ''}, or several, received {names!r}")
    return tuple(names)


class Declaration:
    """The arguments and results of an operator, by name.

    tensors: arguments that are tensors. `inplace` are those of them that are changed.
    numbers: {argument that is a number: its NumPy dtype}.
    arguments: all arguments, in the order of the text.
    outputs: what is allocated.
    returned: the outputs and changed arguments that the function returns.
    generic: those of `tensors` that have the type scalar_t.
    typed: whether an output is scalar_t or acc_t and no argument determines the type; the function then takes dtype=.
    kept: the forward's tensors that the backward reads.
    kernel, parameters: {(kernel's name, type of scalar_t): a kernel, or its parameters}.
    """

    def __init__(self, options: Options):
        self.options, self.name = options, options.forward[-1]
        self.kernels = tuple(entry for entry in options.backward if isinstance(entry, str))  # those of the backward
        self.operators = tuple(entry.declared for entry in options.backward if not isinstance(entry, str))
        defines = source.texts(options.defines)
        if unfinished := parsing.unfinished(options.text):
            raise ValueError(f"the text lacks the closing brace of {', '.join(unfinished)}")
        self.file = source.add(self.name, options.text, options.workspace)
        grid, mine = options.grid, (*options.forward, *self.kernels)
        self.grid = grid if isinstance(grid, dict) else dict.fromkeys(mine, grid) if grid else {}
        for name in (*mine, *self.grid):
            if name not in source.kernel_names(self.file):
                raise self._no_kernel(name)
        self._check_types(mine, defines)
        dynamic = parsing.dynamic_shared(options.text, mine)
        if dynamic and not options.shared:
            raise ValueError(
                f"the text declares dynamic shared memory ({', '.join(sorted(dynamic))}), of which a block has 0 "
                "bytes: give shared=, as in shared=4 * 256 for 256 floats"
            )
        self.kernel: dict[tuple[str, str], Kernel] = {
            (name, scalar): Kernel(self.file, name, tuple({**dict(scalar_macros(scalar)), **defines}.items()))
            for name in mine
            for scalar in FLOATS.values()
        }
        self.parameters = {key: signature(kernel) for key, kernel in self.kernel.items()}
        self.dtypes: dict[tuple[str, str], torch.dtype] = {}  # {(name, scalar): dtype} of what forward points to
        self.tensors, self.inplace, self.outputs, self.arguments = [], [], [], []
        self.numbers = {}
        written = set()
        for name in options.forward:
            self._check_numbers(name)
            written.update([p.name for p in self._declared(name) if self._forward_parameter(name, p, written)])
        self.returned = [name for name in self.dtypes_of("float") if name in (*self.inplace, *self.outputs)]
        self.returned = [name for name in self.returned if name not in options.saved]
        dtypes = {name: [self.dtypes[name, scalar] for scalar in FLOATS.values()] for name in self.dtypes_of("float")}
        self.generic = [name for name in self.tensors if len(set(dtypes[name])) == len(FLOATS)]
        self.typed = not self.generic and any(len(set(dtypes[name])) > 1 for name in self.outputs)
        self._check_options()
        known = (*self.tensors, *self.outputs)
        made = set()
        for name in self.kernels:
            self._check_numbers(name)
            self._check_backward_kernel(name, known, made)
        for entry in self.operators:  # autograd does not see outputs that are not returned
            visible = (*self.tensors, *self.returned)
            self._check_backward(entry.name, entry.tensors, entry.returned, entry.numbers, visible, ())
        used = {p.name for name in self.kernels for p in self._declared(name) if p.pointer}
        used.update(name for entry in self.operators for name in entry.tensors)
        self.kept = [name for name in known if name in used]
        self.signature = self._signature()

    def __repr__(self):
        return f"{self.name}{self.signature}"

    def dtypes_of(self, scalar: str) -> dict[str, torch.dtype]:
        """{name: dtype} of all pointers of the forward's kernels."""
        return {name: dtype for (name, known), dtype in self.dtypes.items() if known == scalar}

    def written_by(self, kernel: str) -> list[str]:
        """Names that a kernel writes or changes."""
        return [p.name for p in self._declared(kernel) if p.pointer and not p.const]

    def read_by(self, kernel: str) -> list[str]:
        """Names that a kernel reads or changes."""
        return [p.name for p in self._declared(kernel) if p.pointer and (p.const or p.inout)]

    def _declared(self, kernel):
        return self.parameters[kernel, "float"]

    def _forward_parameter(self, kernel, p, written) -> bool:
        """Classifies a parameter. Returns whether the kernel writes it. written: names that earlier kernels write."""
        name, options = p.name, self.options
        if keyword.iskeyword(name):
            raise ValueError(f"{kernel}: {name} is a word of Python, which names no argument; rename it, as in {name}_")
        if not p.pointer:
            if name not in ("size", *options.sizes, *self.arguments):
                self.numbers[name] = p.dtype
                self.arguments.append(name)
            return False
        for scalar in FLOATS.values():
            same = next(q for q in self.parameters[kernel, scalar] if q.name == name)
            self.dtypes.setdefault((name, scalar), TORCH[same.dtype])
        if name in options.workspace:
            if (p.const or p.inout) and name not in written:
                advice = ": leave out INOUT, a kernel need not write all of it" if p.inout else ""
                raise ValueError(f"{kernel} reads the workspace {name}, which no kernel before it has written{advice}")
        elif (p.const or p.inout) and name not in written:
            if name not in self.tensors:
                self.tensors.append(name)
                self.arguments.append(name)
            if p.inout and name not in self.inplace:
                self.inplace.append(name)
        elif not (p.const or p.inout):
            if name in self.tensors:
                raise ValueError(f"{kernel} writes {name}, an argument: a kernel that changes it declares it INOUT")
            if name not in self.outputs:
                self.outputs.append(name)
        return not p.const

    def _no_kernel(self, name) -> ValueError:
        """The error for a kernel that the text lacks, with the line of the text that was meant to declare it."""
        found = source.kernel_names(self.file)
        error = source.no_kernel("the text", name, found)
        lines = self.options.text.splitlines()
        meant = [line for line in lines if re.search(rf"\b{re.escape(name)}\s*\(", line)]
        received = next(filter(str.strip, (*meant, *lines)), "an empty text").strip()
        return error if found and not meant else ValueError(f"{error}; received: {received}")

    def _check_types(self, kernels, defines):
        """Raises ValueError for a parameter of a type that no argument has."""
        macros, declared = {**dict(scalar_macros("float")), **defines}, parsing.declarations(source.expanded(self.file))
        for kernel in kernels:
            for kind, name in declared[kernel]:
                base = kind.removeprefix("INOUT ").removeprefix("const ").rstrip("*")
                resolved = str(macros.get(base, base))
                if parsing.SYNONYMS.get(resolved, resolved) not in source.DTYPES:
                    hint = hints.of_type(base, pointer=kind.endswith("*"))
                    raise ValueError(
                        f"{kernel}: {name} is declared {kind}; types are scalar_t, acc_t, {', '.join(source.DTYPES)}"
                        + f". Take {hint}" * bool(hint)
                    )

    def _check_numbers(self, name):
        """Raises ValueError for a number of a type that follows that of the tensors, or that no Python number has."""
        half, bf16 = self.parameters[name, "half_t"], self.parameters[name, "bf16_t"]
        for p, h, b in zip(self._declared(name), half, bf16):
            if not p.pointer and (h.dtype != b.dtype or TORCH[p.dtype] == torch.bfloat16):
                raise ValueError(f"{name}: {p.name} is a number of type scalar_t or bf16_t; declare it acc_t")

    def _check_options(self):
        """Raises ValueError for options that name something that the kernels do not have."""
        options, name = self.options, self.name
        if not self.returned:
            raise ValueError(
                f"{name} needs an output (a pointer) that it returns, or an argument that it changes (INOUT); its "
                f"inputs: {', '.join(self.tensors) or 'none'}, outputs: {', '.join(self.outputs) or 'none'}"
            )
        if not self.tensors and options.output is None:
            raise ValueError(
                f"{name} has no input whose shape its output could have: give output=. Its pointers without const are "
                f"outputs: {', '.join(self.outputs)}. An input has const in front, as in const float* x"
            )
        numbers = {p.name for parameters in self.parameters.values() for p in parameters if not p.pointer}
        pointers = {p.name for parameters in self.parameters.values() for p in parameters if p.pointer}
        for option, names, allowed, what in (
            ("saved", options.saved, self.outputs, f"the outputs of {name} are"),
            ("sizes", options.sizes, sorted(numbers), "the numbers that the kernels take are"),
            ("shapes", options.shapes, self.tensors, f"the inputs of {name} are"),
            ("defaults", options.defaults, self.numbers, f"the numbers that {name} takes as arguments are"),
            ("workspace", options.workspace, sorted(pointers), "the pointers that the kernels take are"),
        ):
            unknown = [name for name in names if name not in allowed]
            if unknown:
                raise ValueError(f"{option}={unknown}: {what} {', '.join(allowed) or 'none'}")
        for tensor in self.inplace + self.tensors[:1]:
            if options.shapes.get(tensor) == BROADCAST:
                reason = "is changed" if tensor in self.inplace else "is the first, whose shape the others get"
                raise ValueError(f"shapes=: {tensor} {reason}, so it cannot be {BROADCAST!r}")
        reserved = {"dtype", "device"} & set(self.arguments)
        if reserved and (self.typed or not self.tensors):
            raise ValueError(
                f"{name} takes dtype= and device= itself: give its number {', '.join(reserved)} a new name"
            )

    def _check_backward_kernel(self, kernel, known, made):
        """made: names that earlier backward kernels wrote; names that this one writes are added."""
        parameters = self._declared(kernel)
        gradients = [f"d{name}" for name in self.tensors]
        changed = [p.name for p in parameters if p.inout]
        allowed = (*made, *(f"d{name}" for name in self.inplace))
        for name in changed:
            if name not in allowed:
                raise ValueError(
                    f"{kernel}: {name} is INOUT, and no kernel before it has written it; INOUT can be "
                    f"{', '.join(sorted(allowed)) or 'nothing here'}"
                )
        constants = [p.name for p in parameters if p.pointer and p.const]
        results = self.written_by(kernel)
        numbers = [p.name for p in parameters if not p.pointer]
        workspace = [name for name in self.options.workspace if name in made]
        self._check_backward(kernel, constants, results, numbers, (*known, *workspace), self.options.workspace)
        made.update(name for name in results if name in (*gradients, *self.options.workspace))

    def _check_backward(self, kernel, constants, results, numbers, known, workspace):
        gradients = [f"d{name}" for name in self.tensors]
        for kind, names, allowed in (
            ("const pointer", constants, (*known, *(f"d{output}" for output in self.returned))),
            ("pointer", results, (*gradients, *workspace)),
            ("number", numbers, ("size", *self.numbers, *self.options.sizes)),
        ):
            for parameter in names:
                if parameter not in allowed:
                    raise ValueError(
                        f"{kernel}: the {kind} {parameter} matches nothing of {self.name}; "
                        f"a {kind} is one of {', '.join(allowed)}"
                    )
        if not results:
            raise ValueError(f"{kernel} computes no gradient: none of {', '.join(gradients)} is its output")

    def _signature(self):
        kind, parameters, last = inspect.Parameter.POSITIONAL_OR_KEYWORD, [], None
        for name in self.arguments:
            default = self.options.defaults.get(name, inspect.Parameter.empty)
            if default is inspect.Parameter.empty and last:
                raise ValueError(
                    f"defaults=: {name} has none and stands behind {last}, which has one: declare {name} before {last}"
                )
            last = last if default is inspect.Parameter.empty else name
            parameters.append(inspect.Parameter(name, kind, default=default))
        if self.typed:
            parameters.append(inspect.Parameter("dtype", inspect.Parameter.KEYWORD_ONLY, default=None))
        if not self.tensors:
            parameters.append(inspect.Parameter("device", inspect.Parameter.KEYWORD_ONLY, default=None))
        return inspect.Signature(parameters)
