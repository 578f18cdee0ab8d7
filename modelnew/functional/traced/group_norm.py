"""ops.group_norm."""

import functools

from ... import autocast
from ...calls import prepared
from ...formats import channels_last, dense_in, empty_in
from ...interop import accumulator_dtype, dense, integer, number
from ...registration import fake_gradients, gradients_of_op, in_place_of, ops, register, results_of
from .. import group_norm as eager
from ..gradients import second_gradients


@in_place_of
def group_norm(input, num_groups, weight=None, bias=None, eps=1e-5):
    num_groups, eps = integer(num_groups, "num_groups"), number(eps, "eps")
    if autocast.norm_in_float32(input):
        input, weight, bias = autocast.single(input, weight, bias)
    return ops.group_norm(input, num_groups, weight, bias, eps)[0]


def _run(input, num_groups, weight, bias, eps):
    def check():
        eager._check(input, num_groups, weight, bias)

    last = channels_last(input)
    tensors = prepared(check, last, input, weight, bias)
    return eager._call(*tensors, num_groups, last, False, eps, check)


def _fake(input, num_groups, weight, bias, eps):
    eager._check(input, num_groups, weight, bias)
    statistics = input.new_empty((2, input.shape[0] * num_groups), dtype=accumulator_dtype(input))
    return empty_in(input, input.shape, channels_last(input)), statistics


def _save(args, results):
    input, _, weight, bias, *_ = args
    return input, weight, bias, results[1]


def _first(ctx, dy):
    x, weight, bias, statistics = ctx.saved_tensors
    need_x, _, *need = ctx.needs_input_grad[:4]
    needed = need_x, *need
    found = ops.group_norm_backward(dy, x, weight, bias, statistics, ctx.args[1], ctx.args[4], needed)
    dx, dweight, dbias = gradients_of_op(found, needed)
    return dx, None, dweight, dbias


register(
    "group_norm(Tensor input, int num_groups, Tensor? weight, Tensor? bias, float eps) -> (Tensor, Tensor)",
    _run,
    _fake,
    _save,
    _first,
)


def _gradient(dy, x, weight, bias, statistics, num_groups, eps, needed):
    last = channels_last(x)
    tensors = dy, dense_in(x, last), dense(weight), dense(bias)
    found = eager._gradients(statistics, num_groups, last, tuple(needed), *tensors)
    return results_of(dy, *found)


def _fake_gradient(dy, x, weight, bias, statistics, num_groups, eps, needed):
    like = (empty_in(x, x.shape, channels_last(x)), weight, bias)
    return fake_gradients(dy, like, needed)


def _second(ctx, *gradients):
    *tensors, _ = ctx.saved_tensors
    definition = functools.partial(eager._definition, *ctx.args[5:7])
    return second_gradients(definition, tensors, ctx.needs_input_grad[:4], *gradients)


register(
    "group_norm_backward(Tensor dy, Tensor x, Tensor? weight, Tensor? bias, Tensor statistics, int num_groups, "
    "float eps, bool[3] needed) -> (Tensor, Tensor, Tensor)",
    _gradient,
    _fake_gradient,
    lambda args, results: args[:5],
    _second,
    outputs=3,
)
