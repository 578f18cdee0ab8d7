"""The autograd Functions of an inline operator."""

from functools import partial

import torch

from .interop import dense
from .recorders import not_compiled, refuse_batches


class Recorded(torch.autograd.Function):
    """One call of the operator. Its kernels work on copies of the arguments that they change."""

    @staticmethod
    def forward(ctx, op, scalar, device, values, *inputs):
        declared = op.declared
        values = {**values, **dict(zip(declared.tensors, inputs))}
        for name in declared.inplace:
            values[name] = values[name].clone()
        ctx.op, ctx.scalar, ctx.facts = op, scalar, op.forward(scalar, device, values)
        ctx.numbers = {name: values[name] for name in declared.numbers}
        ctx.empty = {
            f"d{name}": partial(torch.empty, x.shape, dtype=x.dtype, device=x.device)
            for name, x in zip(declared.tensors, inputs)
        }
        ctx.save_for_backward(*(values[name] for name in declared.kept))
        results = tuple(values[name] for name in declared.returned)
        ctx.mark_non_differentiable(*(y for y in results if not y.is_floating_point()))
        return results

    @staticmethod
    @not_compiled
    def backward(ctx, *gradients):
        op, declared = ctx.op, ctx.op.declared
        wanted = [f"d{name}" for name, needed in zip(declared.tensors, ctx.needs_input_grad[4:]) if needed]
        # Names of saved tensors go last: an input may be called dy.
        tensors = {f"d{name}": dense(g) for name, g in zip(declared.returned, gradients)}
        tensors.update(zip(declared.kept, ctx.saved_tensors))
        kernels = partial(op.gradients, ctx.scalar, ctx.facts, tensors, ctx.empty)
        try:
            return None, None, None, None, *op.all_gradients(wanted, {**tensors, **ctx.numbers}, kernels)
        except RuntimeError as error:
            refuse_batches(f"the backward of {op}", gradients, "vectorize=False", error)
            raise


class Once(torch.autograd.Function):
    """A gradient computed by kernels from `read`. Differentiating it again raises RuntimeError."""

    @staticmethod
    def forward(ctx, name, gradient, *read):
        ctx.name = name
        return gradient.view_as(gradient)

    @staticmethod
    def backward(ctx, _):
        refuse_second_derivatives(ctx.name)


def refuse_second_derivatives(name: str):
    """Raises RuntimeError: a kernel's gradient cannot be differentiated."""
    raise RuntimeError(
        f"the gradient of {name} is computed by a kernel, which cannot be differentiated: for second derivatives give "
        "an operator with a backward of its own in backward=, see modelnew.inline.operator"
    )
