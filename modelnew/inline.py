"""`operator`: a torch operator with autograd from a string of CUDA C, on a GPU or in the emulator."""

import itertools
import re
import weakref
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch.compiler import is_dynamo_compiling
from torch.overrides import handle_torch_function, has_torch_function

from cupy_kernels import inspection
from cupy_kernels.common import ceil_div
from cupy_kernels.display import Rows
from cupy_kernels.errors import EmulatorError
from cupy_kernels.launch import launch

from . import recorders
from .calls import run
from .functional.gradients import will_need_grad
from .inline_arguments import apart, blocks, check_changeable, checked, converted, shape
from .inline_autograd import Once, Recorded
from .inline_declaration import Declaration, Options
from .interop import FLOATS, TORCH, dense

_INSTEAD = "use torch.export, or PyTorch's operators, of which torch.onnx.export can make a graph, too"


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
    shared: int = 0,
    saved: str | Sequence[str] = (),
    defines: dict[str, str | int] | None = None,
) -> "Operator":
    """Makes a function on torch tensors that runs the kernels of `text`, with autograd.

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

    A parameter's declaration and name tell what it is. In a kernel of `forward`:
        const scalar_t* x   an input: the function's argument x
        scalar_t* y         an output. It is allocated and returned (several as a tuple). The kernel writes all of it
        INOUT scalar_t* x   an argument that the kernel changes in place. It is returned as well
        acc_t slope         a number: the function's argument slope (float would round it where x is float64)
        i64 size            the number of elements of the first tensor that the kernel writes
    In a kernel of `backward`:
        const scalar_t* dy  the gradient of the output y
        const scalar_t* x   an input or output of `forward`, saved only if a kernel of `backward` has it. It has its
                            new values if it was changed in place
        scalar_t* dx        the gradient of the input x
        INOUT scalar_t* dx  for an x changed in place: the result's gradient, to be changed to the argument's gradient
        acc_t slope, i64 size   as above

    The function's arguments are the tensors and numbers of `forward`, in the order of their declaration. A function
    without tensor arguments needs output=, and has the keyword device= (default: torch's). If an output is scalar_t or
    acc_t and no input determines the type, the function has the keyword dtype= (default: torch's).

    Types are float, double, half_t, bf16_t, bool, u8, signed char, int, unsigned, i64 (long long) and unsigned long
    long. scalar_t is the dtype of the inputs that are declared so, and acc_t is the type for its arithmetic: double for
    double, else float. One text with these serves float32, float64, float16 and bfloat16. `#include "common.cuh"`
    declares these types, INOUT, to_acc(v), from_acc<scalar_t>(v), warp_sum(v), warp_max(v), and block_sum(v, scratch)
    with `__shared__ acc_t scratch[32]`. A kernel whose first statement is wait_for_earlier_kernels(); may start while
    the kernel before it ends, on GPUs of compute capability 9.0 and newer with a driver of CUDA 12.3 or newer.

    text: CUDA C. Kernels are declared `extern "C" __global__ void name(...)`. Compilation happens at the first call.
    forward: name of the forward kernel, or several, which run in order. A later kernel can read what an earlier one
        wrote, by declaring it under the same name as const or INOUT. The function is named after the last kernel.
    backward: names of the kernels that compute gradients, in order. A kernel runs only if one of its gradients is
        needed. Instead of a kernel's name, this can be an operator, whose arguments and outputs are named like a
        kernel's parameters. Differentiating a kernel's gradient again raises RuntimeError. An operator's gradient can
        be differentiated again if that operator has a backward itself.
    output: output(*arguments) returns the shape of all outputs, or {name: shape}. Default: the shape of the first
        tensor.
    shapes: {input: function}. shape(*arguments) returns the shape that the input must have; None in it allows any
        length. None instead of the function allows any shape. "broadcast" expands the input to the shape of the first
        tensor. Every other input must have the shape of the first, because kernels check no bounds.
    sizes: {name: function}. function(*arguments) returns the value of this number, such as the length of a row.
    workspace: {name: function}. A pointer to memory that lives for one call, in the shape that function(*arguments)
        returns. One kernel writes it, or a part of it, and later ones read what it wrote: to the emulator, the rest is
        NaN, or -1. Forward and backward do not share workspaces.
    defaults: {number: value}, for arguments that may be left out.
    grid: grid(*arguments) returns the number of blocks, an int or up to three; or {kernel: function}. Default: one
        thread for each element of the first tensor that the kernel writes.
    block: threads per block.
    shared: bytes of dynamic shared memory per block, which `extern __shared__ float s[];` declares: one number for all
        kernels. More than 48 KiB need a GPU whose blocks may have as much; on an H100 these are 227 KiB.
    saved: outputs of `forward` that are saved for `backward` and not returned.
    defines: {macro: value}, further macros.

    Under torch.compile, torch.export and other tracers, the operator is one node of the graph (see
    `inline_registered`). Before torch.export.load in another process, define the operators of the program as they were,
    in the same order, and call each once with meta tensors, which registers it. Functions in options must be compiled
    by the same version of Python. An operator can be pickled if the functions in its options can be; lambdas cannot.

    Raises ValueError for a kernel that is not in `text` and for a parameter that matches nothing, and TypeError for an
    option of a wrong type. The function raises TypeError for a wrong number of arguments, a wrong type or dtype, and if
    grid or sizes do not return whole numbers; ValueError for a wrong shape and a grid without blocks; RuntimeError for
    tensors on several devices, a gradient that no kernel computes, a change in place of a leaf that requires grad, and
    under vmap and other transforms of torch.func; and KernelCompileError, with the line of `text`, if the text does not
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
            shared=shared,
            saved=saved,
            defines=defines,
        )
    )


operators = weakref.WeakValueDictionary()  # {key: operator}: graphs name an operator by its key
_keys = itertools.count()


class Facts(NamedTuple):
    """What the kernels of a call need besides tensors: numbers, {kernel: grid}, and {workspace: shape}."""

    numbers: dict
    grids: dict
    workspace: dict


class Operator:
    """The result of `operator`: a function, with methods that show what its kernels compile to."""

    def __init__(self, options: Options):
        self.options, self.declared = options, Declaration(options)
        self.key = f"{options.forward[-1]} {next(_keys)}"  # a text, as torch.compile lets numbers vary
        operators[self.key] = self
        for name, default in options.defaults.items():
            converted(f"defaults=: {name}", self.declared.numbers[name], default)
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
        """The CUDA C that the operator was made from."""
        return self.options.text

    def attributes(self, arch: str | None = None, *, shared_bytes: int | None = None) -> Rows:
        """Registers, memory and occupancy of its kernels, for each type of scalar_t. See cupy_kernels.attributes.

        shared_bytes: by default shared= of the operator.
        """
        shared_bytes = self.options.shared if shared_bytes is None else shared_bytes
        declared = self.declared
        kernels = [declared.kernel[name, scalar] for name in self._kernels() for scalar in FLOATS.values()]
        kernels = kernels if self._varies() else kernels[:: len(FLOATS)]
        return inspection.rows(kernels, arch, self.options.block, shared_bytes)

    def ptx(self, kernel: str | None = None, dtype: torch.dtype = torch.float32, arch: str | None = None) -> str:
        """PTX of one kernel, compiled by NVRTC.

        kernel: by default the last one of the forward.
        dtype: of scalar_t.
        arch: as in cupy_kernels.ptx.

        Raises ValueError for an unknown kernel or arch, and BackendError if there is no NVRTC.
        """
        return inspection.kernel_ptx(self._kernel(kernel, dtype), arch)

    def sass(self, kernel: str | None = None, dtype: torch.dtype = torch.float32, arch: str | None = None) -> str:
        """Machine code (SASS) of one kernel; see `ptx` for the arguments. Raises BackendError without nvdisasm."""
        return inspection.kernel_sass(self._kernel(kernel, dtype), arch)

    def _kernels(self):
        return dict.fromkeys((*self.options.forward, *self.declared.kernels))

    def _varies(self):
        """Whether scalar_t or acc_t is among the types, so that there is a kernel for each dtype."""
        return any(
            self.declared.parameters[name, "float"] != self.declared.parameters[name, scalar]
            for name in self._kernels()
            for scalar in FLOATS.values()
        )

    def _kernel(self, name, dtype):
        name = self.declared.name if name is None else name
        if name not in [*self._kernels()]:
            raise ValueError(f"{self} runs the kernels {', '.join(self._kernels())}; received {name!r}")
        if dtype not in [*FLOATS]:
            raise TypeError(f"dtype is what scalar_t stands for, one of {', '.join(map(str, FLOATS))}; {dtype} is not")
        return self.declared.kernel[name, FLOATS[dtype]]

    def __prepare_scriptable__(self):
        recorders.refuse_script(str(self), _INSTEAD)

    def __call__(self, /, *args: Any, **options: Any) -> Any:
        if is_dynamo_compiling():
            from .inline_registered import in_graph  # a second to import

            return in_graph(self.key, *args, **options)
        values = (*args, *options.values())
        if has_torch_function(values):
            return handle_torch_function(self, values, *args, **options)
        if recorders.present() or _without_memory(values):
            recorders.refuse(str(self), _INSTEAD)
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

        If autograd records it, the kernels work on a copy, and torch's copy_ writes the result back. copy_ handles
        views and versions, and refuses tensors that must not be changed before it changes anything.
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
        """The results of a call. Copies an argument's new values into it if kernels computed them in other memory."""
        for name in self.declared.inplace:
            if results[name] is not values[name]:
                values[name].copy_(results[name])
            elif not values[name].is_inference():  # those have no version
                torch.autograd.graph.increment_version(values[name])
            results[name] = values[name]
        found = tuple(results[name] for name in self.declared.returned)
        return found[0] if len(found) == 1 else found

    def facts(self, values: dict) -> Facts:
        """The `Facts` that follow from the arguments alone."""
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
        """Runs the forward kernels on dense tensors. Outputs are added to `values`; INOUT arguments are changed."""
        declared, shapes, facts = self.declared, self.shapes(values), self.facts(values)
        for name, given in {**shapes, **facts.workspace}.items():
            if (name, scalar) in declared.dtypes:  # else it is the backward's
                make = _workspace if name in facts.workspace else torch.empty
                values[name] = make(given, dtype=declared.dtypes[name, scalar], device=device)
        for kernel in self.options.forward:
            self._start(kernel, scalar, values, facts)
        return facts

    def gradients(self, scalar: str, facts: Facts, tensors: dict, empty: dict, wanted) -> dict[str, torch.Tensor]:
        """Runs the backward kernels that `wanted` needs. Returns {gradient: tensor} of all that they compute.

        tensors: gradients of results, and saved tensors.
        empty: {gradient: function that allocates it}.
        """
        declared, results, scratch, read = self.declared, {}, {}, {}
        for kernel in self.needed(wanted):
            written = declared.written_by(kernel)
            for p in declared.parameters[kernel, scalar]:
                if p.name not in written or p.name in results or p.name in scratch:
                    continue
                if p.name in facts.workspace:
                    shape, device = facts.workspace[p.name], next(iter(tensors.values())).device
                    scratch[p.name] = _workspace(shape, dtype=TORCH[p.dtype], device=device)
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
        """The backward kernels that compute something wanted, and those that write what these read."""
        wanted, found = set(wanted), []
        for kernel in reversed(self.declared.kernels):
            if wanted.intersection(self.declared.written_by(kernel)):
                found.insert(0, kernel)
                wanted.update(set(self.declared.read_by(kernel)).intersection(self.options.workspace))
        return found

    def all_gradients(self, wanted, values, kernels) -> list[torch.Tensor | None]:
        """The gradient of each tensor argument, None if not wanted.

        kernels: kernels(wanted) is `gradients`.
        values: tensors and numbers.
        """
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
        """Launches one kernel."""
        parameters = self.declared.parameters[name, scalar]
        first = next(p.name for p in parameters if p.pointer and not p.const)
        size = values[first].numel()
        numbers = {"size": size, **facts.numbers}
        args = [values[p.name] if p.pointer else numbers[p.name] for p in parameters]
        for p in parameters:
            if p.name in self.options.sizes:
                converted(f"{name}: {p.name}, which sizes= gives,", p.dtype, numbers[p.name])
        block = self.options.block
        grid = facts.grids.get(name) or (ceil_div(size, block), 1, 1)
        if 0 in grid and size:
            raise ValueError(f"grid= gave {grid} blocks for {name}, whose output has {size} elements: none would run")
        try:
            run(_launch, self.declared.kernel[name, scalar], grid, block, self.options.shared, *args)
        except EmulatorError as error:
            unwritten = re.search(r"elements of its output (\w+) unwritten", str(error))
            if name in facts.grids or not unwritten or unwritten[1] == first:
                raise
            ran = f"{grid[0]} block{'s' * (grid[0] > 1)} of {block} threads ran: size is that of {first}"
            raise EmulatorError(f"{error}. {ran}; grid= sets another") from None


def _workspace(shape, dtype, device):
    """Memory for one call. To the emulator, what no kernel writes is a NaN, or -1."""
    made = torch.empty(shape, dtype=dtype, device=device)
    if device.type == "cpu":
        made.untyped_storage().fill_(0xFF)
    return made


def _without_memory(values):
    """Whether kernels cannot read the values: a tensor handles operators itself, or all are meta tensors."""
    tensors = [value for value in values if isinstance(value, torch.Tensor)]
    handled = any(type(tensor).__torch_dispatch__ is not torch.Tensor.__torch_dispatch__ for tensor in tensors)
    return handled or (bool(tensors) and all(tensor.is_meta for tensor in tensors))


def _launch(kernel, grid, block, shared, *args):
    launch(kernel, grid, (block, 1, 1), args, shared)
