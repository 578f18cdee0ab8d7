"""The chain of `conv_bn_pool`, fused, with a batch norm over the batches of all processes of a group.

The processes exchange statistics between the convolution and what follows it. In the backward, they exchange batch
norm's sums before the gradient of the convolution's output is computed.
"""

import math

import torch

from cupy_kernels import conv_bn_pool as ops
from cupy_kernels import conv_bn_pool_backward as back
from cupy_kernels.conv_transpose import logical, output_shape
from cupy_kernels.plan import parts, room
from cupy_kernels.sync_batch_norm import sync_borders, sync_message, sync_parameter_gradients, sync_statistics

from ..calls import call
from ..formats import dense_in, restored, stored
from ..interop import dense
from ..recorders import not_compiled
from .gradients import apply, will_need_grad
from .resident_conv_bn_pool import convolution_gradients, geometry_of, new_output, plan_for
from .sync_batch_norm import gathered, refuse_second_derivatives


def _convolved(new, x, w, conv_bias, _mean, _var, _batches, weight, *_others, setting, keep, activation):
    """What is kept of the convolution, and the rank's message. Of the others the check of the call needs to know."""
    plan = plan_for(x, w, setting)
    tail = {"plan": plan, "groups": setting.groups, "activation": activation, "training": True}
    arrays = ops.kept_arrays(plan, x.shape, setting.groups, keep)
    memory, message = new((room(arrays),), "uint8"), new((2 * w.shape[1] + 1,), "float64")
    mean, invstd = (new.scratch(w.shape[1], "float32") for _ in range(2))
    partials = ops.pooled_sums(new.scratch, x, w, weight, parts(memory, arrays), plan=plan, training=True)
    ops.batch_statistics(partials, None, None, None, None, mean, invstd, 0, 0, **tail)
    sync_message(mean, invstd, conv_bias, message, _count(x, w, setting))
    return memory, message


def _output(
    new,
    x,
    w,
    conv_bias,
    running_mean,
    running_var,
    batches,
    weight,
    bias,
    group_weight,
    group_bias,
    memory,
    own,
    messages,
    *,
    setting,
    keep,
    momentum,
    eps,
    **options,
):
    plan = plan_for(x, w, setting)
    kept = parts(memory, ops.kept_arrays(plan, x.shape, setting.groups, keep))
    out = new_output(new, x, w, setting)
    distance, share = new((w.shape[1],), "float32"), new((1,), "float64")
    statistics, moments = (running_mean, running_var, batches), (kept["mean"], kept["invstd"])
    sync_statistics(messages, own, *statistics, conv_bias, *moments, distance, share, momentum, eps)
    given = (conv_bias, None, None, weight, bias, group_weight, group_bias, out, kept, eps)
    ops.pooled_output(*given, plan=plan, groups=setting.groups, training=True, **options)
    return out, distance, share


def _tail_gradients(new, dout, x, w, weight, bias, group_weight, group_bias, memory, *, setting, needed, **options):
    """g, partial sums and sums of the rank, and gradients of the parameters behind the convolution."""
    plan = plan_for(x, w, setting)
    kept = parts(memory, ops.kept_arrays(plan, x.shape, setting.groups, True))
    made = {name: new(*array) for name, array in back.gradient_arrays(plan, x.shape[0]).items()}
    parameters = (weight, bias, group_weight, group_bias)
    found = [new.like(t if needed else None) for t, needed in zip(parameters, needed)]
    affine = (weight, bias, group_weight)
    how = {"plan": plan, "groups": setting.groups, "training": True, **options}
    back.tail_gradients(dout, *affine, None, *found, kept, made, **how)
    return made["g"], made["partials"], made["sums"], *found


def _convolution_gradients(
    new, x, w, conv_bias, weight, memory, g, partials, distance, share, own, every, *, setting, needed, activation
):
    """(dx, dw, dconv_bias)"""
    *needed, need_bias = needed
    dconv_bias, rest = new.like(conv_bias if need_bias else None), new.scratch(w.shape[1], "float32")
    count = _count(x, w, setting)

    def before(plan, kept, made):
        statistics, sums = (kept["mean"], kept["invstd"], distance, share), (made["sums"], rest, made["dy_exponents"])
        sync_parameter_gradients(every, own, partials, *statistics, weight, *sums, dconv_bias, count)

    def after(kept, made):
        if "borders" in made:
            sync_borders(rest, kept["invstd"], weight, made["dy_exponents"], made["borders"])

    given, tensors = {"g": g, "partials": partials}, (x, w, weight, memory)
    how = {"setting": setting, "needed": needed, "training": True, "activation": activation}
    found = convolution_gradients(new, before, after, given, *tensors, **how)
    return *found, dconv_bias


def _count(x, w, setting):
    """Values of a channel of the convolution's output."""
    images, _, *size = output_shape(logical(x.shape, setting.last), w.shape, geometry_of(setting.padding))
    return images * math.prod(size)


def _call(x, w, conv_bias, weight, bias, group_weight, group_bias, running, check, group, keep, options):
    """(out, what is kept of the convolution, distance, share)"""
    last = options["setting"].last
    tensors = (stored(x, last), w, conv_bias, *running, weight, bias, group_weight, group_bias)
    before = {name: options[name] for name in ("setting", "activation")}
    after = {name: value for name, value in options.items() if name != "training"}
    memory, own = call(_convolved, *tensors, check=check, keep=keep, **before)
    out, *others = call(_output, *tensors, memory, own, gathered(own, group), keep=keep, **after)
    return restored(out, last), memory, *others


class _SyncFused(torch.autograd.Function):
    @staticmethod
    def forward(ctx, *args):
        *tensors, running, check, group, options = args
        out, *kept = _call(*tensors, running, check, group, True, options)
        ctx.save_for_backward(*tensors, *kept)
        ctx.group, ctx.options = group, options
        return out

    @staticmethod
    @not_compiled
    def backward(ctx, dout):
        refuse_second_derivatives()
        x, w, conv_bias, *affine, memory, distance, share = ctx.saved_tensors
        of_convolution, of_tail = ctx.needs_input_grad[:3], ctx.needs_input_grad[3:7]
        options = {name: ctx.options[name] for name in ("setting", "activation")}
        last, parameter = options["setting"].last, ctx.options["parameter"]
        x = stored(x, last)
        given = (stored(dense_in(dout, True), True) if last else dense(dout), x, w, *affine, memory)
        g, partials, sums, *found = call(_tail_gradients, *given, needed=of_tail, parameter=parameter, **options)
        gradients = (None,) * 3
        if any(of_convolution):
            own = sums.double()
            given = (x, w, conv_bias, affine[0], memory, g, partials, distance, share, own, gathered(own, ctx.group))
            dx, *others = call(_convolution_gradients, *given, needed=of_convolution, **options)
            gradients = restored(dx, last), *others
        return *gradients, *found, *[None] * 4


def run(group, tensors, running, check, options) -> torch.Tensor:
    """`conv_bn_activation_max_pool_group_norm` in training, with the statistics of all ranks of `group`."""
    if will_need_grad(*tensors):
        return apply(_SyncFused, *tensors, running, check, group, options)
    return _call(*tensors, running, check, group, False, options)[0]
