"""Random tensors of any layout and kind of values, from which `modelnew.fuzz` makes its cases; and the case itself."""

import math
import random
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import NamedTuple

import torch

from .interop import FLOATS

HALVES = (torch.float16, torch.bfloat16)
SPECIAL = (math.nan, math.inf, -math.inf, 0.0, -0.0)


class Values(NamedTuple):
    """A tensor to be drawn. layout: one of `_VIEWS`. special: values at a few random places."""

    shape: tuple[int, ...]
    layout: tuple = ("contiguous",)
    scale: float = 1.0
    mean: float = 0.0
    whole: bool = False  # few different values, so that there are ties
    special: tuple[float, ...] = ()
    dtype: torch.dtype | None = None  # the case's

    def base(self, generator: torch.Generator) -> torch.Tensor:
        """The float64 memory from which `view` makes the tensor."""
        shape = _VIEWS[self.layout[0]][0](self.shape, *self.layout[1:])
        if self.whole:
            # Each draw has other ones: what five values cost is chance.
            unit = 0.75 + 0.5 * torch.rand((), generator=generator, dtype=torch.float64)
            found = torch.randint(-2, 3, shape, generator=generator) * unit
        else:
            found = torch.randn(shape, generator=generator, dtype=torch.float64)
        found = found * self.scale + self.mean
        for value in self.special if found.numel() else ():
            places = torch.randint(found.numel(), (1 + found.numel() // 64,), generator=generator)
            found.view(-1)[places] = value
        return found

    def view(self, base: torch.Tensor) -> torch.Tensor:
        """The tensor, in its layout."""
        return _VIEWS[self.layout[0]][1](base, self.shape, *self.layout[1:])


class FuzzCase(NamedTuple):
    """One call.

    ours, theirs: functions of the tensors, which return a tensor, or several of which the first has a gradient.
    tensors: those whose name begins with _ get no gradient.
    truth: replaces `theirs` in float64 if PyTorch's formula is not exact enough.
    terms, rounded: as in `cases.Case`.
    gradient: gradient(dtype, dy, **tensors in float64) returns the output's gradient, which replaces the random dy.
    order: 2 for second derivatives.
    differentiated: whether gradients are compared.
    """

    text: str
    ours: Callable
    theirs: Callable
    tensors: dict[str, Values]
    dtype: torch.dtype
    truth: Callable | None = None
    dy_layout: str = "contiguous"
    terms: Mapping[str, int] = MappingProxyType({})
    rounded: bool = False
    gradient: Callable | None = None
    order: int = 1
    differentiated: bool = True


def _same(shape, *_):
    return shape


# {layout: (shape of the memory, the tensor as a view of it)}, both also of the layout's own numbers.
_VIEWS = {
    "contiguous": (_same, lambda base, shape: base),
    "channels_last": (
        lambda shape: (shape[0], *shape[2:], shape[1]),
        lambda base, shape: base.movedim(-1, 1),
    ),
    "permuted": (
        lambda shape, order: tuple(shape[d] for d in order),
        lambda base, shape, order: base.permute([order.index(d) for d in range(len(shape))]),
    ),
    "sliced": (
        lambda shape: (*shape[:-1], 2 * shape[-1] + 1),
        lambda base, shape: base[..., 1::2],
    ),
    "channels": (
        lambda shape: (shape[0], *shape[2:], shape[1] + 1),
        lambda base, shape: base.movedim(-1, 1)[:, :-1],
    ),
    "offset": (lambda shape: (math.prod(shape) + 1,), lambda base, shape: base[1:].view(shape)),
    "expanded": (
        lambda shape, d: (*shape[:d], min(1, shape[d]), *shape[d + 1 :]),
        lambda base, shape, d: base.expand(shape),
    ),
    "overlapping": (
        lambda shape: (sum(shape) + 1,),
        lambda base, shape: base.as_strided(shape, [1] * len(shape)),
    ),
    "negated": (lambda shape: (*shape, 2), lambda base, shape: torch.view_as_complex(base.neg()).conj().imag),
}


def layout_of(draw: random.Random, shape, dtype) -> tuple:
    """A layout. Half of all tensors are contiguous, or channels_last if they have 4 or 5 dimensions."""
    dense = ["contiguous", "channels_last"] if len(shape) in (4, 5) else ["contiguous"]
    others = ["offset"] + ["channels"] * (len(shape) in (4, 5))
    if shape:
        others += ["permuted", "sliced", "expanded", "overlapping"]
    if dtype in (torch.float32, torch.float64):
        others.append("negated")
    name = draw.choice(dense if draw.random() < 0.5 else others)
    if name == "permuted":
        return name, tuple(draw.sample(range(len(shape)), len(shape)))
    return (name, draw.randrange(len(shape))) if name == "expanded" else (name,)


def input_of(draw: random.Random, shape, dtype, largest=True) -> Values:
    """Mostly values of common size; sometimes large, small, far from 0, with ties, or with special values."""
    kind = draw.random()
    found = Values(shape, layout_of(draw, shape, dtype))
    if kind < 0.15:
        return found._replace(whole=True)
    if kind < 0.25:
        return found._replace(scale=draw.choice((1e-3, 30.0)))
    if kind < 0.35:
        # In float64 the truth is not good enough further out, where digits cancel in a norm, and in tanh's gradient.
        return found._replace(mean=draw.choice((-3.0, 2.0 if dtype == torch.float64 else 10.0)))
    if kind < 0.6:
        # float32's denormals, which bfloat16's are in arithmetic, too, may count as 0.
        small = torch.finfo(dtype).tiny * (0.25 if dtype in (torch.float16, torch.float64) else 1024)
        values = *SPECIAL, small, torch.finfo(dtype).max if largest else 1.0
        # NaN has rules of its own everywhere: it is in more than half of these.
        first = math.nan if draw.random() < 0.5 else draw.choice(values)
        return found._replace(special=(first, *draw.choices(values, k=draw.randint(0, 2))))
    return found


def any_dtype(draw) -> torch.dtype:
    return draw.choice(tuple(FLOATS))


def shape_of(draw, dimensions, channels=None) -> tuple[int, ...]:
    """[N, C, *]: few elements, sometimes one large size, sometimes an empty batch."""
    sizes = [draw.choice((1, 2, 3, 4, 0)[: 4 if draw.random() < 0.8 else 5]), channels or draw.randint(1, 9)]
    for _ in range(dimensions - 2):
        sizes.append(draw.randint(1, 11))
    if dimensions > 2 and draw.random() < 0.05:
        sizes[draw.randrange(2, dimensions)] = draw.randint(30, 70)
    return tuple(sizes)


def words(function, options) -> str:
    return ", ".join([function, *(f"{name}={value!r}" for name, value in options.items())])


def order_of(draw) -> int:
    return 2 if draw.random() < 0.2 else 1


def pair_of(draw, low, high):
    """An int or a pair of them."""
    return draw.randint(low, high) if draw.random() < 0.5 else (draw.randint(low, high), draw.randint(low, high))
