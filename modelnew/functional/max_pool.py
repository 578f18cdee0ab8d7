"""max_pool2d, with the signature of torch.nn.functional.max_pool2d, and its layer."""

import functools
import typing

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from cupy_kernels.max_pool import max_pool_backward, max_pool_forward, max_pool_select
from cupy_kernels.pool import Pool, pool_output_size

from ..calls import call
from ..cases import Case, activations, odd_planes
from ..formats import channels_last, dense_in, restored, stored
from ..interop import check_floating, flag, pair
from ..untraced import untraced
from .gradients import Function, apply, differentiable, will_need_grad

__all__ = ["MaxPool2d", "max_pool2d"]


def _forward(new, x, pool, ceil_mode, return_indices, keep, last=False):
    y = new(pooled_shape(x.shape, pool, ceil_mode, last), x.dtype)
    indices = new(y.shape, np.int64) if return_indices else None
    argmax = new_argmax(new, y, pool) if keep else None
    max_pool_forward(x, y, argmax, indices, pool, last)
    return y, indices, argmax


def _backward(new, dy, argmax, pool, shape, last):
    dx = new(shape, dy.dtype)
    max_pool_backward(dy, argmax, dx, pool, last)
    return dx


def _select(new, x, argmax, pool, last):
    y = new(argmax.shape, x.dtype)
    max_pool_select(x, argmax, y, pool, last)
    return y


class _MaxPool2d(Function):
    @staticmethod
    def forward(ctx, x, pool, ceil_mode, return_indices, last):
        x = stored(x, last)
        y, indices, argmax = call(_forward, x, pool, ceil_mode, return_indices, True, last)
        ctx.save_for_backward(argmax)
        ctx.pool, ctx.shape, ctx.last = pool, x.shape, last
        y, indices = restored(y, last), restored(indices, last)
        if not return_indices:
            return y
        ctx.mark_non_differentiable(indices)
        return y, indices

    @staticmethod
    def backward(ctx, dy, *_):
        return max_pool_gradient(dy, *ctx.saved_tensors, ctx.pool, ctx.shape, ctx.last), *[None] * 4


class _MaxPoolGradient(Function):
    """dx = the sum of dy over the windows whose maximum is at the pixel."""

    @staticmethod
    def forward(dy, argmax, pool, shape, last):
        dy = stored(dense_in(dy, last), last)
        return restored(call(_backward, dy, argmax, pool, shape, last), last)

    @staticmethod
    def setup_context(ctx, inputs, output):
        _, argmax, ctx.pool, ctx.shape, ctx.last = inputs
        ctx.save_for_backward(argmax)

    @staticmethod
    def backward(ctx, v):
        return differentiable(_Select, v, *ctx.saved_tensors, ctx.pool, ctx.last), *[None] * 4


class _Select(Function):
    """y = x at the position of each window's maximum: the transpose of _MaxPoolGradient."""

    @staticmethod
    def forward(x, argmax, pool, last):
        return restored(call(_select, stored(dense_in(x, last), last), argmax, pool, last), last)

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, argmax, ctx.pool, ctx.last = inputs
        ctx.shape = stored(x, ctx.last).shape
        ctx.save_for_backward(argmax)

    @staticmethod
    def backward(ctx, v):
        return max_pool_gradient(v, *ctx.saved_tensors, ctx.pool, ctx.shape, ctx.last), *[None] * 3


def max_pool_gradient(dy: torch.Tensor, argmax: torch.Tensor, pool: Pool, shape, last: bool = False) -> torch.Tensor:
    """dx of a max pooling whose maxima are at `argmax`. last: argmax and `shape`, dx's, are [N, H, W, C]."""
    return differentiable(_MaxPoolGradient, dy, argmax, pool, shape, last)


def pooled_shape(shape, pool: Pool, ceil_mode: bool, last: bool = False) -> tuple[int, ...]:
    """Shape of the output for an input of `shape`: [N, C, H, W] or [C, H, W], or [N, H, W, C] if `last`.

    Raises RuntimeError where PyTorch does.
    """
    if last:
        images, *sizes, channels = shape
        output = pooled_shape((images, channels, *sizes), pool, ceil_mode)
        return images, *output[2:], channels
    if len(shape) not in (3, 4) or 0 in shape[-3:]:
        raise RuntimeError(
            f"pooling takes input [N, C, H, W] or [C, H, W], where only N may be 0; received shape {tuple(shape)}"
        )
    return (*shape[:-2], *pool_output_size(shape[-2:], pool, ceil_mode))


def pool_of(kernel_size, stride, padding, dilation, names=Pool._fields) -> Pool:
    """The `Pool` for PyTorch's arguments, ints or pairs. A stride of None, or an empty tuple, means kernel_size.

    names: the arguments' names in errors.
    """
    kernel_size = pair(kernel_size, names[0])
    if stride is None or (isinstance(stride, tuple | list) and not stride):
        stride = kernel_size
    return Pool(kernel_size, *map(pair, (stride, padding, dilation), names[1:]))


def new_argmax(new, y, pool: Pool):
    """Memory for the position of each maximum within its window. new: a `calls.New`."""
    return new(y.shape, np.int32 if pool.wide_argmax else np.uint8)


_Window: typing.TypeAlias = int | tuple[int, int]


@typing.overload
def max_pool2d(
    input: torch.Tensor,
    kernel_size: _Window,
    stride: _Window | None = None,
    padding: _Window = 0,
    dilation: _Window = 1,
    ceil_mode: bool = False,
    return_indices: typing.Literal[False] = False,
) -> torch.Tensor: ...


@typing.overload
def max_pool2d(
    input: torch.Tensor,
    kernel_size: _Window,
    stride: _Window | None = None,
    padding: _Window = 0,
    dilation: _Window = 1,
    ceil_mode: bool = False,
    *,
    return_indices: typing.Literal[True],
) -> tuple[torch.Tensor, torch.Tensor]: ...


@typing.overload
def max_pool2d(
    input: torch.Tensor,
    kernel_size: _Window,
    stride: _Window | None = None,
    padding: _Window = 0,
    dilation: _Window = 1,
    ceil_mode: bool = False,
    return_indices: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]: ...


@untraced
def max_pool2d(
    input: torch.Tensor,
    kernel_size: _Window,
    stride: _Window | None = None,
    padding: _Window = 0,
    dilation: _Window = 1,
    ceil_mode: bool = False,
    return_indices: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """y[n, c, oh, ow] = max over kh, kw of x[n, c, oh s - p + kh d, ow s - p + kw d].

    Here s is the stride, p the padding and d the dilation. See torch.nn.functional.max_pool2d.

    input: [N, C, H, W] or [C, H, W]; float32, float64, float16 or bfloat16.
    kernel_size, stride, padding, dilation: ints, or pairs (H, W). The default stride is kernel_size. The padding is at
        most half of kernel_size.
    ceil_mode: round the output's size up, if the last window then starts inside the input or its left padding.
    return_indices: also return the position h * W + w of each maximum, int64, in the shape of the output.

    Returns [N, C, OH, OW] or [C, OH, OW] of input's dtype: channels_last if input is, else contiguous. If several
    elements of a window are equal, the first one is the maximum. If a window contains NaN, its last NaN is the maximum.
    The gradient goes to that element only.

    Raises TypeError for another dtype and for flags that are no bools, ValueError for hyper-parameters that are neither
    ints nor pairs, and RuntimeError, as PyTorch does, for shapes and windows that do not fit.
    """
    check_floating(input=input)
    pool = pool_of(kernel_size, stride, padding, dilation)
    last = channels_last(input)
    x, options = dense_in(input, last), (pool, flag(ceil_mode, "ceil_mode"), flag(return_indices, "return_indices"))
    if will_need_grad(x):
        return apply(_MaxPool2d, x, *options, last)
    y, indices, _ = call(_forward, stored(x, last), *options, False, last)
    return (restored(y, last), restored(indices, last)) if return_indices else restored(y, last)


class MaxPool2d(nn.MaxPool2d):
    """See torch.nn.MaxPool2d and `modelnew.functional.max_pool2d`."""

    @property
    def window(self) -> dict:
        """kernel_size, stride, padding, dilation and ceil_mode, as keyword arguments."""
        names = ("kernel_size", "stride", "padding", "dilation", "ceil_mode")
        return {name: getattr(self, name) for name in names}

    def forward(self, input: torch.Tensor):
        window = (self.kernel_size, self.stride, self.padding, self.dilation)
        return max_pool2d(input, *window, self.ceil_mode, self.return_indices)


def _gradient_of(pool, _x, dy):
    """dx as a function of dy. Its own gradient uses a different kernel."""
    x = _x.detach().requires_grad_()
    with torch.enable_grad():
        return torch.autograd.grad(pool(x, 2), x, dy, create_graph=True)[0]


def _gradient_inputs(images, shape=activations):
    *shape, height, width = shape(images)
    return {"_x": torch.randn(*shape, height, width), "dy": torch.randn(*shape, height // 2, width // 2)}


def _last(inputs):
    """The same inputs in channels_last."""
    return lambda images: {k: t.contiguous(memory_format=torch.channels_last) for k, t in inputs(images).items()}


def _inputs(images, shape=activations):
    return {"input": torch.randn(shape(images))}


def _odd(inputs):
    return functools.partial(inputs, shape=odd_planes)


OVERLAPPING = {"kernel_size": 3, "stride": 2, "padding": 1}
_LARGE = {"kernel_size": 5, "stride": 1, "padding": 2}
CASES = (
    *(
        Case(
            f"max_pool2d {window['kernel_size']}x{window['kernel_size']}{what}",
            (file,),
            functools.partial(max_pool2d, **window),
            functools.partial(F.max_pool2d, **window),
            inputs,
        )
        for window, what, file, inputs in (
            ({"kernel_size": 2}, "", "max_pool.cu", _odd(_inputs)),
            (OVERLAPPING, "", "max_pool.cu", _odd(_inputs)),
            (OVERLAPPING, ", channels_last", "max_pool_channels_last.cu", _last(_inputs)),
            (_LARGE, "", "max_pool_separable.cu", _inputs),
        )
    ),
    *(
        Case(
            f"gradient of max_pool2d, and its gradient{what}",
            (file,),
            functools.partial(_gradient_of, max_pool2d),
            functools.partial(_gradient_of, F.max_pool2d),
            inputs,
        )
        for what, file, inputs in (
            ("", "max_pool.cu", _odd(_gradient_inputs)),
            (", channels_last", "max_pool_channels_last.cu", _last(_gradient_inputs)),
        )
    ),
)
