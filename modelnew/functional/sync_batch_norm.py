"""batch_norm over the batches of all processes of a group, which exchange data in the forward and in the backward."""

import functools

import torch
import torch.distributed as dist

from cupy_kernels import sync_batch_norm as ops
from cupy_kernels.batch_norm import (
    batch_norm_apply,
    batch_norm_backward_apply,
    batch_norm_backward_sums,
    batch_norm_statistics,
    batch_norm_workspace,
)
from cupy_kernels.common import accumulator_dtype

from ..calls import call, planning, prepared
from ..formats import channels_last, dense_in, restored, stored
from ..recorders import not_compiled
from ..untraced import untraced
from .batch_norm import batch_norm as batch_norm_alone
from .batch_norm import batch_norm_tanh as batch_norm_tanh_alone
from .batch_norm import rows
from .batch_norm_arguments import Norm
from .gradients import apply, will_need_grad
from .max_pool import max_pool2d


def gathered(message: torch.Tensor, group) -> torch.Tensor:
    """The messages of all processes of the group, in the order of their ranks.

    They are gathered, not reduced, so that all processes add in the same order and get the same bits.
    """
    found = message.new_empty(dist.get_world_size(group) * message.numel())
    if not planning():
        # The newer name of the same function comes first.
        all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
        all_gather(found, message.view(-1), group=group)
    return found


def refuse_second_derivatives() -> None:
    """Raises RuntimeError in a backward with create_graph=True."""
    if torch.is_grad_enabled():
        raise RuntimeError("synchronised batch norm has no second derivatives: create_graph=True is not possible here")


def _message(new, x, weight, bias, running_mean, running_var, batches, *, last):
    """The rank's message, from x. The other arguments are there for the check of the call."""
    x = rows(x, last)
    channels, message = x.shape[1], new((2 * x.shape[1] + 1,), "float64")
    moments = new.scratch((2, channels), accumulator_dtype(x))
    if x.size:
        workspace = new.scratch(batch_norm_workspace(x), "float64")
        batch_norm_statistics(x, None, None, None, moments[0], moments[1], workspace, 0, 0)
    ops.sync_message(moments[0], moments[1], None, message, x.size // max(1, channels))
    return message


def _forward(new, x, weight, bias, running_mean, running_var, batches, own, messages, *, momentum, eps, tanh, last):
    y = new.like(x)
    x, out = rows(x, last), rows(y, last)
    moments, share = new((3, x.shape[1]), accumulator_dtype(x)), new((1,), "float64")
    mean, invstd, distance = moments[0], moments[1], moments[2]
    running = (running_mean, running_var, batches)
    ops.sync_statistics(messages, own, *running, None, mean, invstd, distance, share, momentum, eps)
    batch_norm_apply(x, mean, invstd, weight, bias, out, tanh)
    return y, moments, share


def _sums(new, dy, x, weight, bias, moments, y, *, needed, last):
    _, need_weight, need_bias = needed
    sums = new((2, moments.shape[1]), "float64")
    dweight, dbias = new.like(weight if need_weight else None), new.like(bias if need_bias else None)
    dy, x, y = (rows(t, last) for t in (dy, x, y))
    workspace = new.scratch(batch_norm_workspace(dy), "float64")
    batch_norm_backward_sums(dy, x, moments[0], moments[1], weight, sums, dweight, dbias, workspace, y)
    return sums, dweight, dbias


def _backward(new, dy, x, weight, moments, share, y, every, *, last):
    dx, sums = new.like(dy), new.scratch((2, moments.shape[1]), "float64")
    ops.sync_sums(every, share, sums)
    dy, x, y, out = (rows(t, last) for t in (dy, x, y, dx))
    batch_norm_backward_apply(dy, x, moments[0], moments[1], weight, sums, out, y)
    return dx


def _call(x, weight, bias, running, check, group, tanh, last, momentum, eps):
    """(y, moments, share)"""
    x = stored(x, last)
    own = call(_message, x, weight, bias, *running, check=check, last=last)
    options = {"momentum": momentum, "eps": eps, "tanh": tanh, "last": last}
    y, *kept = call(_forward, x, weight, bias, *running, own, gathered(own, group), **options)
    return restored(y, last), *kept


class _SyncBatchNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, running, check, group, tanh, last, *numbers):
        y, moments, share = _call(x, weight, bias, running, check, group, tanh, last, *numbers)
        ctx.group, ctx.last = group, last
        ctx.save_for_backward(x, weight, bias, moments, share, y if tanh else None)
        return y

    @staticmethod
    @not_compiled
    def backward(ctx, dy):
        refuse_second_derivatives()
        x, weight, bias, moments, share, y = ctx.saved_tensors
        needed, last = ctx.needs_input_grad[:3], ctx.last
        dy, x, y = stored(dense_in(dy, last), last), stored(x, last), stored(y, last)
        sums, dweight, dbias = call(_sums, dy, x, weight, bias, moments, y, needed=needed, last=last)
        dx = None
        if needed[0]:
            dx = call(_backward, dy, x, weight, moments, share, y, gathered(sums, ctx.group), last=last)
        return restored(dx, last), dweight, dbias, *[None] * 7


def _sync_batch_norm(
    input,
    running_mean,
    running_var,
    weight,
    bias,
    training,
    momentum,
    eps,
    *,
    process_group,
    tanh,
    num_batches_tracked=None,
):
    norm = Norm.checked(running_mean, running_var, weight, bias, training, momentum, eps, num_batches_tracked)

    def check():  # one value is enough: other processes may have more
        norm.check(input, alone=False)

    last = channels_last(input)
    x, weight, bias = prepared(check, last, input, weight, bias)
    running = norm.buffers()
    args = (x, weight, bias, running, check, process_group, tanh, last, norm.momentum, norm.eps)
    y = apply(_SyncBatchNorm, *args) if will_need_grad(x, weight, bias) else _call(*args)[0]
    norm.note_update(running)
    return y


@untraced
@functools.wraps(batch_norm_alone, assigned=())  # for its signature
def batch_norm(*args, **options) -> torch.Tensor:
    """`modelnew.functional.batch_norm` in training, with the statistics of the batches of all ranks of `process_group`.

    Every process of the group must call it. A batch may be empty, or have one value per channel.
    """
    return _sync_batch_norm(*args, tanh=False, **options)


@untraced
@functools.wraps(batch_norm_tanh_alone, assigned=())
def batch_norm_tanh(*args, **options) -> torch.Tensor:
    """tanh(batch_norm(...))."""
    return _sync_batch_norm(*args, tanh=True, **options)


def bn_tanh_max_pool2d(*args, kernel_size, stride, padding, dilation, ceil_mode, **options) -> torch.Tensor:
    """max_pool2d(batch_norm_tanh(...), ...)."""
    return max_pool2d(batch_norm_tanh(*args, **options), kernel_size, stride, padding, dilation, ceil_mode)
