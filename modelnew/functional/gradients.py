"""Shared code of the operators' backwards: gradients that can be differentiated again.

With `create_graph`, a backward runs with grad mode on. Then each gradient is an autograd Function of its own, which
launches the same kernels. Otherwise only the kernels run, and nothing more is saved.
"""

import functools
from collections.abc import Callable

import torch

from .. import recorders, replays, shortcuts


class Function(torch.autograd.Function):
    """An autograd Function. Its backward explains the error for a batch of gradients, as `vectorize=True` gives it."""

    def __init_subclass__(cls, **options):
        super().__init_subclass__(**options)
        cls.backward = staticmethod(_one_at_a_time(cls.backward))
        if cls.setup_context is torch.autograd.Function.setup_context:
            cls.forward = staticmethod(replays.noted(cls.forward, cls))


def _one_at_a_time(backward):
    @recorders.not_compiled
    @functools.wraps(backward)
    def call(ctx, *gradients):
        try:
            return backward(ctx, *gradients)
        except RuntimeError as error:
            instead = "torch.func.jacrev, torch.func.vmap around the forward, too, or vectorize=False"
            name = backward.__qualname__.partition(".")[0].strip("_")
            recorders.refuse_batches(f"the backward of {name}", gradients, instead, error)
            raise

    return call


def will_need_grad(*tensors: torch.Tensor | None) -> bool:
    """Whether autograd must record a Function of these tensors. If not, calling its forward directly is faster."""
    if torch.is_grad_enabled():
        for tensor in tensors:
            if tensor is not None and tensor.requires_grad:
                return True
    return False


def apply(function: type[torch.autograd.Function], *args):
    """function.apply(*args), but faster."""
    return shortcuts.apply(function, *args)


def differentiable(gradient: type[torch.autograd.Function], *args):
    """gradient.forward(*args), which autograd can differentiate if grad mode is on.

    `gradient` has a `forward` without a context, and `setup_context`.
    """
    return gradient.apply(*args) if torch.is_grad_enabled() else gradient.forward(*args)


def gradients_of(function: Callable, tensors, needed, *output_gradients) -> list[torch.Tensor | None]:
    """Gradients of function(*tensors); None for tensors that do not need one, or do not affect the results.

    function: uses operations that autograd can differentiate, and returns one result or a tuple, one for each of
        output_gradients. A None among these is left out.
    needed: a bool for each tensor. A tensor that is given twice gets a gradient for each place.

    The gradients can be differentiated again if grad mode is on.
    """
    places = [place for place, need in enumerate(needed) if need]
    kept = [place for place, gradient in enumerate(output_gradients) if gradient is not None]

    def chosen(*wanted):
        given = list(tensors)
        for place, tensor in zip(places, wanted):
            given[place] = tensor
        results = function(*given)
        results = results if isinstance(results, tuple) else (results,)
        return tuple(results[place] for place in kept)

    gradients = dict.fromkeys(range(len(tensors)))
    if places and kept:
        wanted, incoming = [tensors[place] for place in places], tuple(output_gradients[place] for place in kept)
        again = will_need_grad(*tensors, *incoming)
        gradients |= zip(places, _pulled_back(chosen, wanted, incoming, again))
    return list(gradients.values())


def _pulled_back(function, tensors, output_gradients, again):
    """The gradients of all `tensors`, of which function(*tensors) is a tuple.

    again: whether they will be differentiated.
    """
    if recorders.transforms():  # autograd alone sees one level of them
        return torch.func.vjp(function, *tensors)[1](output_gradients)
    with torch.enable_grad():
        views = [t.view_as(t) if t.requires_grad else t.detach().requires_grad_() for t in tensors]
        results = function(*views)
    pairs = [(y, dy) for y, dy in zip(results, output_gradients) if y.requires_grad]
    if not pairs:
        return [None] * len(views)
    results, output_gradients = zip(*pairs)
    return torch.autograd.grad(results, views, output_gradients, create_graph=again, allow_unused=True)


class NormGradient(Function):
    """(dx, dweight, dbias) of a norm, computed by kernels. Its own gradient differentiates the norm's definition.

    kernels: kernels(dy, x, weight, bias) returns them, None for those that are not needed.
    definition: definition(x, weight, bias) is the norm in elementary operations of torch, which autograd can
        differentiate any number of times. It runs in float64, because powers of 1 / std leave float32's range if std is
        far from 1.
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
        needed = ctx.needs_input_grad[2:]
        return None, None, *second_gradients(ctx.definition, ctx.saved_tensors, needed, *gradients)


def second_gradients(definition, tensors, needed, *gradients) -> list[torch.Tensor | None]:
    """Gradients of `tensors`, (dy, x, weight, bias), for the incoming `gradients` of `NormGradient`'s results.

    needed: a bool for each tensor.
    """
    wanted = [gradient is not None for gradient in gradients]

    def first(dy, *inputs):
        return tuple(gradients_of(definition, inputs, wanted, dy.double()))

    return gradients_of(first, tensors, needed, *gradients)
