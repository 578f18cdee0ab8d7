"""A torch operator with autograd from CUDA C text: in a second, without a compiler, and on the emulator too."""

import itertools
import weakref
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch.compiler import is_dynamo_compiling
from torch.overrides import handle_torch_function, has_torch_function

from cupy_kernels import inspection
from cupy_kernels.common import ceil_div
from cupy_kernels.display import Rows
from cupy_kernels.launch import launch

from . import recorders
from .calls import run
from .functional.gradients import will_need_grad
from .inline_arguments import apart, blocks, check_changeable, check_number, checked, shape
from .inline_autograd import Once, Recorded
from .inline_declaration import Declaration, Options
from .interop import FLOATS, TORCH, dense
from .untraced import all_meta, dispatches


def operator(
    text: str,
    forward: str | Sequence[str],
    backward: "str | Callable | Sequence[str | Callable]" = (),
    *,
    output: Callable | None = None,
    shapes: dict[str, Callable | str | None] | None = None,
    sizes: dict[str, Callable] | None = None,
    workspace: dict[str, Callable] | None = None,
    defaults: dict[str, float] | None = None,
    grid: Callable | dict[str, Callable] | None = None,
    block: int = 256,
    saved: str | Sequence[str] = (),
    defines: dict[str, str | int] | None = None,
) -> "Operator":
    """A function on torch tensors that runs the kernels of `text`, with autograd.

        scale = operator(\"""
        #include "common.cuh"
        extern "C" __global__ void scale(const scalar_t* x, acc_t factor, scalar_t* y, i64 size) {
            i64 i = (i64)blockIdx.x * blockDim.x + threadIdx.x;
            if (i < size) y[i] = from_acc<scalar_t>(to_acc(x[i]) * factor);
        }
        extern "C" __global__ void scale_backward(const scalar_t* dy, acc_t factor, scalar_t* dx, i64 size) {
            i64 i = (i64)blockIdx.x * blockDim.x + threadIdx.x;
            if (i < size) dx[i] = from_acc<scalar_t>(to_acc(dy[i]) * factor);
        }\""", "scale", "scale_backward", defaults={"factor": 2.0})
        y = scale(x)

    A kernel's parameters say what they are by their declaration and name. In `forward`:
        const scalar_t* x   an input: the function's argument x
        scalar_t* y         an output: allocated here, and returned (several: as a tuple); the kernel writes all of it
        INOUT scalar_t* x   an argument that the kernel changes in place; it is returned, too
        acc_t slope         a number: the function's argument slope (a float would round it where x is float64)
        i64 size            how many elements the first tensor has that the kernel writes
    In a kernel of `backward`:
        const scalar_t* dy  the gradient of the output y
        const scalar_t* x   an input or output of `forward`; it is saved only if a kernel of `backward` takes it. Of an
                            argument that was changed, what it is afterwards
        scalar_t* dx        the gradient of the input x
        INOUT scalar_t* dx  for x changed in place: the gradient of the result, which becomes that of the argument
        acc_t slope, i64 size   as above
    The function's arguments are the tensors and numbers of `forward`, in the order of their declaration. A function
    without tensors has the keyword device= (default: torch's), and needs output=. Where an output is scalar_t or acc_t
    and no input says which type that is, there is dtype= (default: torch's).

    Types are float, double, half_t, bf16_t, bool, u8, signed char, int, unsigned, i64 (long long), unsigned long long;
    or scalar_t, the dtype of the inputs so declared, with acc_t for the arithmetic (double for double, else float): one
    text serves float32, float64, float16 and bfloat16. `#include "common.cuh"` gives these types, to_acc(v) and
    from_acc<scalar_t>(v), warp_sum, warp_max and block_sum.

    text: CUDA C. Kernels are written `extern "C" __global__ void name(...)`. Nothing is compiled before the first call.
    forward: name of the forward kernel; or several, which run in order. A later one reads, const or INOUT, what an
        earlier one wrote under that name. The function has the last one's name.
    backward: names of the kernels that compute gradients, in order. A kernel runs if one of its gradients is asked for.
        In place of a kernel's name, an operator made by this function: its arguments and outputs are named as a
        kernel's parameters would be. Gradients by kernels cannot be differentiated again, which raises RuntimeError;
        those by an operator can, if it has a backward of its own.
    output: output(*arguments) gives the shape of all outputs, or {name: shape}. Default: that of the first tensor.
    shapes: {input: function}: the shape that shape(*arguments) gives is what the input must have; None in it is any
        length. None in place of the function allows any shape; "broadcast" expands the input to the first tensor's
        shape. An input that is not named must have the shape of the first, as a kernel checks no bounds.
    sizes: {name: function}: numbers of the kernels that function(*arguments) gives, such as the length of a row.
    workspace: {name: function}: pointers to memory for the call alone, in the shape that function(*arguments) gives. A
        kernel writes it, and later ones read it; forward and backward have each their own.
    defaults: {number: value} of arguments that may be left out.
    grid: grid(*arguments) gives the number of blocks, an int or up to three; or {kernel: function}. Default: one
        thread for each element of the first tensor that the kernel writes.
    block: threads in a block.
    saved: outputs of `forward` for `backward` alone, which the function does not return.
    defines: further macros.

    Under torch.compile, torch.export and other recorders the operator is one node of the graph, see
    `inline_registered`. It can be pickled if the functions among its options can, which lambdas cannot.

    Raises ValueError for a kernel that is not in `text`, and for a parameter that matches nothing; TypeError for an
    option of another kind. The function raises TypeError for arguments of another number, kind or dtype, and where
    grid or sizes do not give whole numbers; ValueError for another shape and a grid without blocks; RuntimeError for
    tensors on several devices, for a gradient that no kernel computes, for a change of a leaf that requires grad, and
    under vmap and other transforms of torch.func; and KernelCompileError, with the line of `text`, if that does not
    compile.
    """
    return Operator(
        Options.checked(
            Operator,
            text,
            forward,
            backward,
            output=output,
            shapes=shapes,
            sizes=sizes,
            workspace=workspace,
            defaults=defaults,
            grid=grid,
            block=block,
            saved=saved,
            defines=defines,
        )
    )


operators = weakref.WeakValueDictionary()  # {key: operator}: graphs name an operator by its key
_keys = itertools.count()


class Facts(NamedTuple):
    """What a call's kernels need besides tensors: numbers, and by kernel the grid, by name the shape of a workspace."""

    numbers: dict
    grids: dict
    workspace: dict


class Operator:
    """What `operator` returns: a function, and what its kernels are compiled to."""

    def __init__(self, options: Options):
        self.options, self.declared = options, Declaration(options)
        self.key = f"{options.forward[-1]} {next(_keys)}"  # a text, as torch.compile lets numbers vary
        operators[self.key] = self
        for name, default in options.defaults.items():
            check_number(f"defaults=: {name}", self.declared.numbers[name], default)
        self.__name__, self.__signature__ = self.declared.name, self.declared.signature
        self.__doc__ = f"{self} -> {', '.join(self.declared.returned)}; see modelnew.inline.operator."

    def __repr__(self):
        return repr(self.declared)

    def __copy__(self):
        return self

    def __deepcopy__(self, memo):
        return self

    def __reduce__(self):
        for option, function in self.options.functions():
            if getattr(function, "__name__", "") == "<lambda>":
                raise TypeError(
                    f"{self} cannot be pickled: {option}= has a lambda, which pickle does not take. Use a function "
                    "that a module defines by def"
                )
        return Operator, (self.options,)

    @property
    def text(self) -> str:
        """The CUDA C that it was made from."""
        return self.options.text

    def attributes(self, arch: str | None = None, *, shared_bytes: int = 0) -> Rows:
        """Registers, memory and occupancy of its kernels for each type of scalar_t, see cupy_kernels.attributes."""
        declared = self.declared
        kernels = [declared.kernel[name, scalar] for name in self._kernels() for scalar in FLOATS.values()]
        kernels = kernels if self._varies() else kernels[:: len(FLOATS)]
        return inspection.rows(kernels, arch, self.options.block, shared_bytes)

    def ptx(self, kernel: str | None = None, dtype: torch.dtype = torch.float32, arch: str | None = None) -> str:
        """PTX of one of its kernels, by default the last of the forward, for scalar_t of a dtype; by NVRTC."""
        return inspection.kernel_ptx(self._kernel(kernel, dtype), arch)

    def sass(self, kernel: str | None = None, dtype: torch.dtype = torch.float32, arch: str | None = None) -> str:
        """Machine code of what `ptx` shows. BackendError if there is no nvdisasm on this machine."""
        return inspection.kernel_sass(self._kernel(kernel, dtype), arch)

    def _kernels(self):
        return dict.fromkeys((*self.options.forward, *self.declared.kernels))

    def _varies(self):
        """Whether scalar_t or acc_t is among the types, so that each dtype has a kernel of its own."""
        return any(
            self.declared.parameters[name, "float"] != self.declared.parameters[name, scalar]
            for name in self._kernels()
            for scalar in FLOATS.values()
        )

    def _kernel(self, name, dtype):
        name = self.declared.name if name is None else name
        if name not in self._kernels():
            raise ValueError(f"{self} runs the kernels {', '.join(self._kernels())}; received {name!r}")
        if dtype not in FLOATS:
            raise TypeError(f"dtype is what scalar_t stands for, one of {', '.join(map(str, FLOATS))}; {dtype} is not")
        return self.declared.kernel[name, FLOATS[dtype]]

    def __call__(self, *args, **options):
        if is_dynamo_compiling():
            from .inline_registered import in_graph  # a second to import

            return in_graph(self.key, *args, **options)
        values = (*args, *options.values())
        if has_torch_function(values):
            return handle_torch_function(self, values, *args, **options)
        if recorders.present() or dispatches(values) or all_meta(*values):
            recorders.refuse(str(self))
            from .inline_registered import registered

            return registered(self)(*args, **options)
        scalar, device, values = checked(self.declared, args, options)
        declared = self.declared
        if declared.inplace:
            return self._changing(scalar, device, values)
        tensors = [dense(values[name]) for name in declared.tensors]
        if will_need_grad(*tensors):
            results = Recorded.apply(self, scalar, device, values, *tensors)
        else:
            found = {**values, **dict(zip(declared.tensors, tensors))}
            self.forward(scalar, device, found)
            results = tuple(found[name] for name in declared.returned)
        return results[0] if len(results) == 1 else results

    def _changing(self, scalar, device, values):
        """A call that changes arguments in place.

        Where autograd records it, the kernels work on a copy, which torch's own copy_ brings back: that knows views and
        versions, and refuses what cannot be changed before it changes anything.
        """
        declared = self.declared
        tensors = {name: dense(values[name]) for name in declared.tensors}
        recorded = will_need_grad(*tensors.values())
        check_changeable(declared, values, recorded)
        if recorded:
            results = dict(zip(declared.returned, Recorded.apply(self, scalar, device, values, *tensors.values())))
        else:
            results = {**values, **apart(declared, tensors)}
            self.forward(scalar, device, results)
        return self.changed(values, results)

    def changed(self, values: dict, results: dict):
        """What a call returns; what kernels made of an argument in other memory is copied into it."""
        for name in self.declared.inplace:
            if results[name] is not values[name]:
                values[name].copy_(results[name])
            elif not values[name].is_inference():  # those have no version
                torch.autograd.graph.increment_version(values[name])
            results[name] = values[name]
        found = tuple(results[name] for name in self.declared.returned)
        return found[0] if len(found) == 1 else found

    def facts(self, values: dict) -> Facts:
        """What follows from the arguments alone."""
        options, declared = self.options, self.declared
        arguments = [values[name] for name in declared.arguments]
        numbers = {name: values[name] for name in declared.numbers}
        numbers.update((name, size(*arguments)) for name, size in options.sizes.items())
        grids = {name: blocks(name, grid(*arguments)) for name, grid in declared.grid.items()}
        shapes = {name: shape(f"workspace= of {name}", f(*arguments)) for name, f in options.workspace.items()}
        return Facts(numbers, grids, shapes)

    def shapes(self, values: dict) -> dict[str, tuple]:
        """{output: shape}"""
        declared = self.declared
        if self.options.output is None:
            return dict.fromkeys(declared.outputs, values[declared.tensors[0]].shape)
        given = self.options.output(*(values[name] for name in declared.arguments))
        shapes = given if isinstance(given, dict) else dict.fromkeys(declared.outputs, given)
        if set(shapes) != set(declared.outputs):
            raise ValueError(f"output= gave shapes of {', '.join(shapes)}; outputs are {', '.join(declared.outputs)}")
        return {name: shape(f"output= of {name}", given) for name, given in shapes.items()}

    def forward(self, scalar: str, device: torch.device, values: dict) -> Facts:
        """Runs the forward's kernels on dense tensors. Outputs join `values`; INOUT arguments are changed."""
        declared, shapes, facts = self.declared, self.shapes(values), self.facts(values)
        for name, given in {**shapes, **facts.workspace}.items():
            if (name, scalar) in declared.dtypes:  # else it is the backward's
                values[name] = torch.empty(given, dtype=declared.dtypes[name, scalar], device=device)
        for kernel in self.options.forward:
            self._start(kernel, scalar, values, facts)
        return facts

    def gradients(self, scalar: str, facts: Facts, tensors: dict, empty: dict, wanted) -> dict[str, torch.Tensor]:
        """Runs those kernels of the backward that `wanted` needs. {gradient: tensor} of all that they compute.

        tensors: gradients of results, and what was kept. empty: {gradient: function that allocates it}.
        """
        declared, results, scratch, read = self.declared, {}, {}, {}
        for kernel in self.needed(wanted):
            written = declared.written_by(kernel)
            for p in declared.parameters[kernel, scalar]:
                if p.name not in written or p.name in results or p.name in scratch:
                    continue
                if p.name in facts.workspace:
                    shape, device = facts.workspace[p.name], next(iter(tensors.values())).device
                    scratch[p.name] = torch.empty(shape, dtype=TORCH[p.dtype], device=device)
                else:
                    results[p.name] = tensors[p.name].clone() if p.inout else empty[p.name]()
            given = {**tensors, **scratch, **{name: results[name] for name in written if name in results}}
            self._start(kernel, scalar, given, facts)
            sources = {n for name in declared.read_by(kernel) for n in read.get(name, {name})} & tensors.keys()
            read.update((name, read.get(name, set()) | sources) for name in written)
        if torch.is_grad_enabled():
            for name, result in results.items():
                results[name] = Once.apply(self.__name__, result, *(tensors[source] for source in sorted(read[name])))
        return results

    def needed(self, wanted):
        """Kernels of the backward that compute something wanted, and those that write what these read."""
        wanted, found = set(wanted), []
        for kernel in reversed(self.declared.kernels):
            if wanted.intersection(self.declared.written_by(kernel)):
                found.insert(0, kernel)
                wanted.update(set(self.declared.read_by(kernel)).intersection(self.options.workspace))
        return found

    def all_gradients(self, wanted, values, kernels) -> list[torch.Tensor | None]:
        """Of each tensor argument, None if not wanted. kernels(wanted): `gradients`. values: tensors and numbers."""
        declared = self.declared
        results = kernels(wanted) if self.needed(wanted) else {}
        for entry in (entry for entry in self.options.backward if isinstance(entry, Operator)):
            if set(entry.declared.returned).intersection(wanted):
                made = entry(**{name: values[name] for name in entry.declared.arguments})
                results.update(zip(entry.declared.returned, made if isinstance(made, tuple) else (made,)))
        missing = [gradient for gradient in wanted if gradient not in results]
        if missing:
            raise RuntimeError(
                f"{self.__name__} has no gradient {', '.join(missing)}: no kernel of backward={declared.kernels} "
                "writes it. Write one, or pass the argument without requires_grad (x.detach())"
            )
        return [results[f"d{name}"] if f"d{name}" in wanted else None for name in declared.tensors]

    def _start(self, name, scalar, values, facts):
        """Starts one kernel."""
        parameters = self.declared.parameters[name, scalar]
        size = next(values[p.name].numel() for p in parameters if p.pointer and not p.const)
        numbers = {"size": size, **facts.numbers}
        args = [values[p.name] if p.pointer else numbers[p.name] for p in parameters]
        for p in parameters:
            if p.name in self.options.sizes:
                check_number(f"{name}: {p.name}, which sizes= gives,", p.dtype, numbers[p.name])
        block = self.options.block
        grid = facts.grids.get(name) or (ceil_div(size, block), 1, 1)
        if 0 in grid and size:
            raise ValueError(f"grid= gave {grid} blocks for {name}, whose output has {size} elements: none would run")
        run(_launch, self.declared.kernel[name, scalar], grid, block, *args)


def _launch(kernel, grid, block, *args):
    launch(kernel, grid, (block, 1, 1), args)
