"""What the operators' backwards share: gradients that can be differentiated again.

A backward runs with grad mode on if its caller asked for `create_graph`. Then each gradient is an autograd Function of
its own, which starts the same kernels. Otherwise the kernels alone run, and nothing more is kept.
"""

import functools
from collections.abc import Callable

import torch

from .. import recorders, replays, shortcuts


class Function(torch.autograd.Function):
    """Its backward says what to do where it is given batches of gradients, as by `jacobian(vectorize=True)`."""

    def __init_subclass__(cls, **options):
        super().__init_subclass__(**options)
        cls.backward = staticmethod(_one_at_a_time(cls.backward))
        if cls.setup_context is torch.autograd.Function.setup_context:
            cls.forward = staticmethod(replays.noted(cls.forward, cls))


def _one_at_a_time(backward):
    @functools.wraps(backward)
    def call(ctx, *gradients):
        try:
            return backward(ctx, *gradients)
        except RuntimeError as error:
            instead = "torch.func.jacrev, torch.func.vmap around the forward, too, or vectorize=False"
            recorders.refuse_batches(backward.__qualname__, gradients, instead, error)
            raise

    return call


def will_need_grad(*tensors: torch.Tensor | None) -> bool:
    """Whether autograd must see a Function of these tensors. Where not, its forward alone is quicker."""
    if torch.is_grad_enabled():
        for tensor in tensors:
            if tensor is not None and tensor.requires_grad:
                return True
    return False


def apply(function: type[torch.autograd.Function], *args):
    """function.apply(*args), quicker."""
    return shortcuts.apply(function, *args)


def differentiable(gradient: type[torch.autograd.Function], *args):
    """What `gradient` computes of `args`; autograd can differentiate it if grad mode is on.

    `gradient` has `forward(*args)`, without a context, and `setup_context`.
    """
    return gradient.apply(*args) if torch.is_grad_enabled() else gradient.forward(*args)


def gradients_of(function: Callable, tensors, *output_gradients) -> list[torch.Tensor | None]:
    """Gradients of function(*tensors); None for tensors that require none, or that the results do not depend on.

    function: of operations that autograd can differentiate; one result, or a tuple of them, for each of
        `output_gradients`, of which None is left out. It is called with views, so that a tensor that stands in two
        places gets the gradient of each place.
    The gradients can be differentiated again if grad mode is on.
    """
    again = torch.is_grad_enabled()
    with torch.enable_grad():
        views = [t.view_as(t) if t is not None and t.requires_grad else t for t in tensors]
        results = function(*views)
        results = results if isinstance(results, tuple) else (results,)
    pairs = [(y, dy) for y, dy in zip(results, output_gradients) if dy is not None and y.requires_grad]
    if not pairs:
        return [None] * len(views)
    results, output_gradients = zip(*pairs)
    wanted = [t for t in views if t is not None and t.requires_grad]
    found = iter(torch.autograd.grad(results, wanted, output_gradients, create_graph=again, allow_unused=True))
    return [next(found) if t is not None and t.requires_grad else None for t in views]


class NormGradient(Function):
    """(dx, dweight, dbias) of a norm. Kernels compute them; what is differentiated is the norm's definition.

    kernels(dy, x, weight, bias) returns them, None for those that are not needed.
    definition(x, weight, bias): the norm as elementary operations of torch, which autograd differentiates as often as
        it is asked to. In float64: powers of 1 / std leave float32's range where std is far from 1.
    """

    @staticmethod
    def forward(kernels, definition, dy, x, weight, bias):
        return kernels(dy, x, weight, bias)

    @staticmethod
    def setup_context(ctx, inputs, output):
        _, ctx.definition, *tensors = inputs
        ctx.save_for_backward(*tensors)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx, *gradients):
        return None, None, *second_gradients(ctx.definition, ctx.saved_tensors, *gradients)


def second_gradients(definition, tensors, *gradients) -> list[torch.Tensor | None]:
    """Gradients of `tensors`, (dy, x, weight, bias), whose results in `NormGradient` have `gradients`."""

    def first(dy, *inputs):
        places = [place for place, tensor in enumerate(inputs) if tensor is not None]

        def defined(*given):
            all_inputs = [None] * len(inputs)
            for place, tensor in zip(places, given):
                all_inputs[place] = tensor
            return definition(*all_inputs)

        y, pull_back = torch.func.vjp(defined, *(inputs[place] for place in places))
        found = iter(pull_back(dy.to(y.dtype)))
        return tuple(None if tensor is None else next(found) for tensor in inputs)

    return gradients_of(first, tensors, *gradients)
