"""Inline operators as registered with PyTorch, for tracers: torch.compile, torch.export, make_fx.

An operator is registered when it is first traced or called with meta tensors, as `modelnew_inline::<kernel>_<digest>`,
with the signature of its kernels. The registered operator is functional: it works on copies of the arguments that the
kernels change, and torch's copy_ writes them back. The backward's kernels are a second operator, `..._backward`. The
functions among its options get meta tensors, which have no values.
"""

import functools
import hashlib
import itertools
import types
from functools import partial

import torch
from torch.autograd import forward_ad

from .inline import Operator, operators
from .inline_arguments import checked
from .inline_autograd import refuse_second_derivatives
from .interop import FLOATS, dense

_SCALARS = {name: dtype for dtype, name in FLOATS.items()}
_KINDS = {"f": "float", "b": "bool"}  # in a schema, by the kind of a NumPy dtype; of all others SymInt
_names = set()


def has_tangent(value) -> bool:
    """Whether a value is a tensor with a tangent of forward-mode AD."""
    return isinstance(value, torch.Tensor) and forward_ad.unpack_dual(value).tangent is not None


@torch.compiler.allow_in_graph
def in_graph(key: str, /, *args, **options):
    """Calls an operator, by its key, as one node of torch.compile's graph."""
    return registered(operators[key])(*args, **options)


@functools.cache
def registered(op: Operator):
    """The operator as a function that tracers see."""
    return _Registered(op)


class _Registered:
    def __init__(self, op: Operator):
        self.op, self.declared = op, op.declared
        self.made = [*self.declared.inplace, *self.declared.outputs]
        self.read = list(dict.fromkeys((*(f"d{name}" for name in self.declared.returned), *self.declared.kept)))
        kinds = {name: _KINDS.get(dtype.kind, "SymInt") for name, dtype in self.declared.numbers.items()}
        arguments = ", ".join(f"{kinds.get(name, 'Tensor')} {name}" for name in self.declared.arguments)
        more = ", ".join(["Tensor[] tensors", *(f"{kind} {name}" for name, kind in kinds.items())])
        more += "".join(f", SymInt[] {name}_shape" for name in self.declared.tensors)
        name, results = _name(op), ", ".join("Tensor" for _ in self.made)
        self.forward = torch.library.custom_op(
            f"modelnew_inline::{name}",
            self._forward,
            mutates_args=(),
            schema=f"({arguments}{', ' * bool(arguments)}ScalarType scalar, Device device) -> ({results})",
        )
        self.forward.register_fake(self._fake)
        self.backward = torch.library.custom_op(
            f"modelnew_inline::{name}_backward",
            self._backward,
            mutates_args=(),
            schema=f"({more}, ScalarType scalar, str wanted) -> Tensor[]",
        )
        self.backward.register_fake(self._fake_backward)
        self.backward.register_autograd(lambda *_: refuse_second_derivatives(op.__name__))
        self.forward.register_autograd(self._gradients, setup_context=self._setup_context)

    def __call__(self, /, *args, **options):
        if torch._C._are_functorch_transforms_active() or any(map(has_tangent, (*args, *options.values()))):
            raise RuntimeError(
                f"{self.op}: kernels have no rule for vmap and other transforms of torch.func, nor for forward-mode "
                "derivatives. Call it on the whole batch, or on its parts: torch.stack([f(x) for x in batch]); for "
                "gradients use torch.autograd.grad"
            )
        scalar, device, values = checked(self.declared, args, options)
        results = self.forward(*values.values(), _SCALARS[scalar], device)
        results = (results,) if len(self.made) == 1 else results
        return self.op.changed(values, dict(zip(self.made, results)))

    def _forward(self, *given):
        *given, scalar, device = given
        values = dict(zip(self.declared.arguments, given))
        values.update((name, dense(values[name])) for name in self.declared.tensors)
        values.update((name, values[name].clone()) for name in self.declared.inplace)
        self.op.forward(FLOATS[scalar], device, values)
        return self._results([values[name] for name in self.made])

    def _fake(self, *given):
        *given, scalar, device = given
        values = dict(zip(self.declared.arguments, given))
        shapes = {**self.op.shapes(values), **{name: values[name].shape for name in self.declared.inplace}}
        dtypes = self.declared.dtypes_of(FLOATS[scalar])
        return self._results([torch.empty(shapes[name], dtype=dtypes[name], device=device) for name in self.made])

    def _results(self, results):
        return results[0] if len(results) == 1 else tuple(results)

    def _setup_context(self, ctx, inputs, output):
        *given, ctx.scalar, _ = inputs
        values = dict(zip(self.declared.arguments, given))
        ctx.shapes = [values[name].shape for name in self.declared.tensors]
        ctx.numbers = {name: values[name] for name in self.declared.numbers}
        values.update(zip(self.made, output if isinstance(output, tuple) else (output,)))
        ctx.save_for_backward(*(values[name] for name in self.declared.kept))

    def _gradients(self, ctx, *gradients):
        declared = self.declared
        needed = dict(zip(declared.arguments, ctx.needs_input_grad))
        wanted = [f"d{name}" for name in declared.tensors if needed[name]]
        tensors = {f"d{name}": g for name, g in zip(self.made, gradients) if name in declared.returned}
        tensors.update(zip(declared.kept, ctx.saved_tensors))

        def kernels(wanted):
            given = [tensors[name] for name in self.read]
            found = self.backward(given, *ctx.numbers.values(), *ctx.shapes, ctx.scalar, ",".join(wanted))
            return dict(zip(self._computed(wanted), found))

        results = dict(zip(declared.tensors, self.op.all_gradients(wanted, {**tensors, **ctx.numbers}, kernels)))
        return *(results.get(name) for name in declared.arguments), None, None

    def _computed(self, wanted):
        """The gradients that the kernels compute if these are wanted."""
        written = itertools.chain.from_iterable(map(self.declared.written_by, self.op.needed(wanted)))
        return [name for name in dict.fromkeys(written) if name not in self.op.options.workspace]

    def _backward(self, tensors, *given):
        *given, scalar, wanted = given
        numbers, shapes = self._split(given)
        dtypes = self.declared.dtypes_of(FLOATS[scalar])
        values = {name: torch.empty(shape, dtype=dtypes[name], device="meta") for name, shape in shapes.items()}
        empty = {
            f"d{name}": partial(torch.empty, shape, dtype=dtypes[name], device=tensors[0].device)
            for name, shape in shapes.items()
        }
        with torch.no_grad():
            read = dict(zip(self.read, map(dense, tensors)))
            facts = self.op.facts({**values, **numbers})
            found = self.op.gradients(FLOATS[scalar], facts, read, empty, wanted.split(","))
        return [found[name] for name in self._computed(wanted.split(","))]

    def _fake_backward(self, tensors, *given):
        *given, scalar, wanted = given
        shapes, dtypes = self._split(given)[1], self.declared.dtypes_of(FLOATS[scalar])
        computed = [name[1:] for name in self._computed(wanted.split(","))]
        return [torch.empty(shapes[name], dtype=dtypes[name], device=tensors[0].device) for name in computed]

    def _split(self, given):
        count = len(self.declared.numbers)
        return dict(zip(self.declared.numbers, given)), dict(zip(self.declared.tensors, given[count:]))


def _facts(code):
    """What a function does. Addresses of functions inside it, and the order of sets, differ between processes."""
    constants = [c for c in code.co_consts if not (isinstance(c, str) and "<locals>" in c)]  # Python 3.10: where it is
    constants = [sorted(map(repr, c)) if isinstance(c, frozenset) else c for c in constants]
    return code.co_code, code.co_names, [_facts(c) if isinstance(c, types.CodeType) else c for c in constants]


def _name(op):
    """The kernel's name and a digest of the operator's definition. Caches of compiled graphs use it as a key."""
    codes = [(option, getattr(f, "__code__", None)) for option, f in op.options.functions()]
    codes = [(option, code and _facts(code)) for option, code in codes]
    made_from = repr((op.text, op.options._replace(output=None, shapes={}, sizes={}, workspace={}, grid=None), codes))
    first = f"{op.declared.name}_{hashlib.sha256(made_from.encode()).hexdigest()[:8]}"
    names = itertools.chain([first], (f"{first}_{number}" for number in itertools.count(2)))
    name = next(name for name in names if name not in _names)
    _names.add(name)
    return name
