"""batch_norm, with the signature of torch.nn.functional.batch_norm, batch_norm_tanh, and the layers."""

import functools
import math
import sys

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from cupy_kernels.batch_norm import (
    batch_norm_backward,
    batch_norm_eval,
    batch_norm_eval_statistics,
    batch_norm_forward,
    batch_norm_statistics,
    batch_norm_workspace,
)
from cupy_kernels.common import accumulator_dtype

from .. import recorders
from ..calls import call, prepared
from ..cases import Case, activations, sums_of
from ..formats import channels_last, dense_in, restored, stored
from ..untraced import untraced
from .affine import pair_of, reset_affine, weight_and_bias
from .batch_norm_arguments import Norm
from .gradients import Function, NormGradient, apply, will_need_grad
from .tanh import tanh_gradient

__all__ = ["BatchNorm1d", "BatchNorm2d", "BatchNorm3d", "batch_norm", "batch_norm_tanh"]


def _forward(new, x, weight, bias, running_mean, running_var, batches, *, training, momentum, eps, tanh, last, keep):
    y = new.like(x)
    x, out = rows(x, last), rows(y, last)
    moments = (new if keep else new.scratch)((2, x.shape[1]), accumulator_dtype(x))
    mean, invstd = moments[0], moments[1]
    if training:
        workspace = new.scratch(batch_norm_workspace(x, new.room), np.float64)
        running = (running_mean, running_var, batches)
        batch_norm_forward(x, *running, weight, bias, out, mean, invstd, workspace, momentum, eps, tanh, new.room)
    else:
        batch_norm_eval(x, running_mean, running_var, weight, bias, out, mean, invstd, eps, tanh)
    return y, moments if keep else None


def rows(x, last):
    """x as rows of channels if it is [N, *, C] (`last`), else unchanged."""
    if x is None or not last:
        return x
    return x.reshape((math.prod(x.shape[:-1]), x.shape[-1]))


def statistics(new, x, running_mean, running_var, batches, training, momentum, eps):
    """(2, C): mean and 1/sqrt(var + eps) per channel, of x in training, else of the running statistics.

    Training updates the running statistics.
    new: a `calls.New`.
    batches: num_batches_tracked, incremented by 1; or None.
    """
    moments = new((2, x.shape[1]), accumulator_dtype(x))
    if training:
        workspace = new.scratch(batch_norm_workspace(x), np.float64)
        batch_norm_statistics(x, running_mean, running_var, batches, moments[0], moments[1], workspace, momentum, eps)
    else:
        batch_norm_eval_statistics(running_mean, running_var, moments[0], moments[1], eps)
    return moments


def _backward(new, dy, x, weight, bias, moments, y, *, training, needed, last):
    need_x, need_weight, need_bias = needed
    mean, invstd = moments[0], moments[1]
    dx = new.like(dy if need_x else None)
    dweight, dbias = new.like(weight if need_weight else None), new.like(bias if need_bias else None)
    dy, x, y, out = (rows(t, last) for t in (dy, x, y, dx))
    workspace = None
    if need_weight or need_bias or training:
        workspace = new.scratch(batch_norm_workspace(dy, new.room), np.float64)
    batch_norm_backward(dy, x, mean, invstd, weight, out, dweight, dbias, workspace, training, y, new.room)
    return dx, dweight, dbias


class _BatchNorm(Function):
    @staticmethod
    def forward(ctx, x, weight, bias, norm, running, check, options):
        y, moments = _call(x, weight, bias, running, check, options, keep=True)
        ctx.training, ctx.eps, ctx.last = options["training"], options["eps"], options["last"]
        x_needed = ctx.training or any(ctx.needs_input_grad[1:3])
        saved = (x if x_needed else None, weight, bias, moments, y if options["tanh"] else None)
        ctx.save_for_backward(*saved, *norm.applied())
        return y

    @staticmethod
    def backward(ctx, dy):
        *saved, _, _ = ctx.saved_tensors
        needed = ctx.needs_input_grad[:3]
        return *batch_norm_gradients(dy, *saved, needed, ctx.training, ctx.eps, ctx.last), *[None] * 4


def _call(x, weight, bias, running, check, options, keep):
    last = options["last"]
    y, moments = call(_forward, stored(x, last), weight, bias, *running, check=check, keep=keep, **options)
    return restored(y, last), moments


def batch_norm_gradients(dy, x, weight, bias, moments, y, needed, training, eps, last=False):
    """(dx, dweight, dbias) of a batch norm with these statistics; None for those that are not needed.

    x: may be None outside training if only dx is needed. y: None, or the tanh of the batch norm, whose gradient is dy.
    """
    kernels = functools.partial(_gradients, moments, needed, training, last)
    if not torch.is_grad_enabled():
        return kernels(dy, x, weight, bias, y)
    if y is not None:
        dy = tanh_gradient(dy, y)
    if x is None:
        x = dense_in(torch.zeros_like(dy), last)  # dx does not depend on it
    return NormGradient.apply(kernels, functools.partial(_definition, moments, training, eps), dy, x, weight, bias)


def _gradients(moments, needed, training, last, dy, x, weight, bias, y=None):
    dy, x, y = stored(dense_in(dy, last), last), stored(x, last), stored(y, last)
    dx, *others = call(_backward, dy, x, weight, bias, moments, y, training=training, needed=needed, last=last)
    return restored(dx, last), *others


def _definition(moments, training, eps, x, weight, bias):
    channels = (-1, *[1] * (x.dim() - 2))
    x, (mean, invstd) = x.double(), moments.double().view(2, *channels)
    if training:
        values = (0, *range(2, x.dim()))
        mean = x.mean(values, keepdim=True)
        invstd = ((x - mean).square().mean(values, keepdim=True) + eps).rsqrt()
    y = (x - mean) * invstd
    y = y if weight is None else y * weight.view(channels)
    return y if bias is None else y + bias.view(channels)


@untraced
def batch_norm(
    input: torch.Tensor,
    running_mean: torch.Tensor | None,
    running_var: torch.Tensor | None,
    weight: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    *,
    num_batches_tracked: torch.Tensor | None = None,
) -> torch.Tensor:
    """y = (x - mean) / sqrt(var + eps) * weight + bias per channel. See torch.nn.functional.batch_norm.

    input: [N, C, *], any number of dimensions from 2 on, or an empty [N]; float32, float64, float16 or bfloat16.
    running_mean, running_var: (C,), or both None.
    weight, bias: (C,), or None for 1 and 0.
    training: if True, normalise with the batch's mean and biased variance, and update in place running = (1 - momentum)
        * running + momentum * batch, with the unbiased variance. An empty batch leaves them unchanged. If False,
        normalise with the running statistics.
    num_batches_tracked: one integer, incremented by 1 in place in training; or None.

    The running statistics share a dtype, and so do weight and bias: input's, or float32 if input is float16 or
    bfloat16.

    Returns a tensor of input's shape and dtype. It is channels_last (or channels_last_3d) if input is, else contiguous.
    The arithmetic is in float32, for float64 in float64.

    Raises ValueError for one value per channel in training, for one running statistic without the other, for one tensor
    as both in training, and for eps out of range; RuntimeError for a wrong number of dimensions or elements, for
    missing running statistics outside training, and for tensors on several devices; TypeError for other or mixed
    dtypes, and for arguments of a wrong type. A refused call changes nothing.
    Outside training, a backward raises RuntimeError if the running statistics were changed since the forward.
    """
    arguments = (running_mean, running_var, weight, bias, training, momentum, eps, num_batches_tracked)
    return _batch_norm(input, arguments, tanh=False)


@untraced
def batch_norm_tanh(
    input: torch.Tensor,
    running_mean: torch.Tensor | None,
    running_var: torch.Tensor | None,
    weight: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    *,
    num_batches_tracked: torch.Tensor | None = None,
) -> torch.Tensor:
    """tanh(batch_norm(...)), with tanh fused into the kernels of batch_norm, whose arguments and errors it has."""
    arguments = (running_mean, running_var, weight, bias, training, momentum, eps, num_batches_tracked)
    return _batch_norm(input, arguments, tanh=True)


def _batch_norm(input, arguments, tanh, keep=False):
    """The result. With `keep`, for calls without autograd, also the statistics that were applied."""
    if arguments[0] is None and not input.numel():  # there is nothing to normalise, and torch asks for no statistics
        arguments = (*arguments[:4], True, *arguments[5:])
    norm = Norm.checked(*arguments)
    x = input
    if input.shape == (0,):  # an empty batch of as many channels as the others have
        x = input.view(0, next((t.numel() for t in (norm.running_mean, norm.weight, norm.bias) if t is not None), 0))
    last, check = channels_last(x), functools.partial(norm.check, x)
    x, weight, bias = prepared(check, last, x, norm.weight, norm.bias)
    running = norm.buffers()
    options = {"training": norm.training, "momentum": norm.momentum, "eps": norm.eps, "tanh": tanh, "last": last}
    if not keep and will_need_grad(x, weight, bias):
        y = apply(_BatchNorm, x, weight, bias, norm, running, check, options)
    else:
        y, moments = _call(x, weight, bias, running, check, options, keep=keep)
    norm.note_update(running)
    y = y if y.shape == input.shape else y.view(input.shape)
    return (y, moments) if keep else y


class _RefusesConverter:
    """The missing attribute `qconfig`. torch's converter of batch norms asks for it, and would then drop our layer.

    Without `__set__`, a qconfig that quantization sets on the layer hides this; torch's converter takes the layer then.
    """

    def __get__(self, layer, kind):
        if sys._getframe(1).f_code is nn.SyncBatchNorm.convert_sync_batchnorm.__code__:
            raise RuntimeError(
                f"torch.nn.SyncBatchNorm.convert_sync_batchnorm received a {kind.__name__} of modelnew.layers, and "
                "would replace it by PyTorch's layer; call modelnew.convert_sync_batchnorm(network, process_group), "
                "which converts PyTorch's batch norms too"
            )
        raise AttributeError


class _Layer(nn.modules.batchnorm._BatchNorm):
    peers = None  # a `distributed.Peers`, see `modelnew.convert_sync_batchnorm`
    qconfig = _RefusesConverter()

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        device=None,
        dtype=None,
        *,
        bias: bool = True,
    ):
        super().__init__(num_features, eps, momentum, affine, track_running_stats, device, dtype)
        if not bias:  # not every version of torch knows it
            self.register_parameter("bias", None)

    def reset_parameters(self) -> None:
        """Sets weight to 1 and bias to 0, and calls `reset_running_stats`."""
        self.reset_running_stats()
        reset_affine(self)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        if recorders.is_leaf(self, input):  # a function's node would keep the mode, train or eval
            return recorders.leaf(self, input)
        return self.apply_with(batch_norm, input)

    def apply_with(self, operation, input: torch.Tensor, **options) -> torch.Tensor:
        """operation(input, *self.arguments(input), **options), for an operation that fuses a batch norm with others."""
        operation = self.operation(operation)
        return operation(input, *self.arguments(input), num_batches_tracked=self.counter(), **options)

    def operation(self, operation):
        """`operation`, or its counterpart for several processes if the layer is synchronised."""
        return operation if self.peers is None or not self.training else self.peers.counterpart(operation)

    def extra_repr(self) -> str:
        return super().extra_repr() + (", synchronised" if self.peers else "")

    def arguments(self, input: torch.Tensor) -> tuple:
        """(running_mean, running_var, weight, bias, training, momentum, eps) of `batch_norm` for this input."""
        self._check_input_dim(input)
        running_mean, running_var = pair_of(self, self._buffers, "running_mean", "running_var")
        training = self.training or (running_mean is None and running_var is None)
        if self.training and not self.track_running_stats:
            running_mean = running_var = None
        momentum = self.momentum
        if momentum is None:  # the average over all batches
            counter = self.counter()
            momentum = 0.0 if counter is None else 1 / (float(counter) + 1)
        return running_mean, running_var, *weight_and_bias(self), training, momentum, self.eps

    def counter(self) -> torch.Tensor | None:
        """num_batches_tracked, if the next batch is counted, else None."""
        if not (self.training and self.track_running_stats):
            return None
        name, known = "num_batches_tracked", self._buffers
        return known[name] if name in known else getattr(self, name)


class BatchNorm1d(_Layer, nn.BatchNorm1d):
    """See torch.nn.BatchNorm1d and `modelnew.functional.batch_norm`. A refused call leaves the buffers unchanged."""


class BatchNorm2d(_Layer, nn.BatchNorm2d):
    """See torch.nn.BatchNorm2d and `modelnew.functional.batch_norm`. A refused call leaves the buffers unchanged."""


class BatchNorm3d(_Layer, nn.BatchNorm3d):
    """See torch.nn.BatchNorm3d and `modelnew.functional.batch_norm`. A refused call leaves the buffers unchanged."""


def per_channel(c):
    """weight, bias, running mean and variance. One weight is negative, and none small."""
    weight = torch.rand(c) / 2 + 0.5
    weight[c // 2] *= -1
    return {"weight": weight, "bias": torch.rand(c) - 0.5, "_mean": torch.rand(c) / 5, "_var": torch.rand(c) + 0.5}


def norm_inputs(images, shape=activations):
    """x and `per_channel`."""
    x = torch.randn(shape(images))
    return {"x": x, **per_channel(x.shape[1])}


def _large_planes(images):
    """More values per channel than one block takes."""
    return {"x": torch.randn(2, 2, 190, 200), **per_channel(2)}


def _channels_last(images):
    """So few rows that each block takes whole channels."""
    x = torch.randn(16, 64, 7, 7) if images else torch.randn(3, 16, 5, 4)
    return {"x": x.contiguous(memory_format=torch.channels_last), **per_channel(x.shape[1])}


def of_tensors(function, training):
    """`function`, which has batch_norm's arguments, as a function of tensors.

    In training it also returns the running statistics.
    """

    def call(x, weight, bias, _mean, _var):
        mean, var = _mean.clone(), _var.clone()
        y = function(x, mean, var, weight, bias, training)
        return (y, mean, var) if training else y

    return call


def torch_norm(after, training):
    """after(batch_norm) by PyTorch, in the form of `of_tensors`."""
    return of_tensors(lambda *args: after(F.batch_norm(*args)), training)


CASES = (
    *(
        Case(
            f"batch_norm, training{what}",
            files,
            of_tensors(batch_norm, True),
            torch_norm(lambda y: y, True),
            inputs,
            sums_of(inputs),
        )
        for what, files, inputs in (
            ("", ("batch_norm.cu",), norm_inputs),
            (", large planes", ("batch_norm.cu",), _large_planes),
            (", channels_last", ("batch_norm.cu", "batch_norm_resident.cu"), _channels_last),
        )
    ),
    Case(
        "batch_norm_tanh, eval",
        ("batch_norm.cu",),
        of_tensors(batch_norm_tanh, False),
        torch_norm(torch.tanh, False),
        norm_inputs,
        sums_of(norm_inputs),
    ),
)
