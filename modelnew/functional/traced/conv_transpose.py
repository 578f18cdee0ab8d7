"""ops.conv_transpose2d."""

import math

from cupy_kernels.conv_transpose import Geometry, output_shape

from ... import autocast
from ...formats import channels_last, empty_in
from ...interop import integer, pair
from ...numerics import check_numerics, settled, settled_choice, settled_in_graph
from ...registration import fake_gradients, gradients_of_op, in_place_of, ops, register, results_of
from .. import conv_transpose as eager

GEOMETRY = "int[2] stride, int[2] padding, int[2] output_padding, int[2] dilation, int groups"


@in_place_of
def conv_transpose2d(
    input, weight, bias=None, stride=1, padding=0, output_padding=0, groups=1, dilation=1, *, numerics="auto"
):
    check_numerics(numerics)
    numerics = settled_in_graph(numerics, input.device)
    return convolution(input, weight, bias, stride, padding, output_padding, groups, dilation, numerics)


def convolution(input, weight, bias, stride, padding, output_padding, groups, dilation, numerics):
    """The same. numerics: may be settled."""
    input, weight, bias = autocast.lower(input, weight, bias)
    geometry = (
        pair(stride, "stride"),
        pair(padding, "padding"),
        pair(output_padding, "output_padding"),
        pair(dilation, "dilation"),
        integer(groups, "groups"),
    )
    if input.dim() == 3:
        return ops.conv_transpose2d(input.unsqueeze(0), weight, bias, *geometry, numerics).squeeze(0)
    return ops.conv_transpose2d(input, weight, bias, *geometry, numerics)


def as_geometry(*arguments) -> Geometry:
    """The `Geometry` for the arguments named in GEOMETRY."""
    *pairs, groups = arguments
    return Geometry(*map(tuple, pairs), groups)


def fake_shape(x, weight, geometry) -> tuple:
    """Shape of the result. The number of images may be symbolic: it is checked when the kernels run."""
    return (x.shape[0], *output_shape.__wrapped__((1, *x.shape[1:]), weight.shape, geometry)[1:])


def flops(x_shape, w_shape) -> int:
    """The FLOP count of torch's own convolution, and of each of its gradients."""
    return 2 * math.prod(x_shape) * math.prod(w_shape[1:])


def _run(input, weight, bias, *options):
    *geometry, numerics = options
    geometry = as_geometry(*geometry)

    def check():
        eager._check(input, weight, bias, geometry)

    return eager.conv_transpose2d_as(input, weight, bias, geometry, settled_choice(numerics, input.device), check)


def _fake(input, weight, bias, *options):
    *geometry, _ = options
    shape = fake_shape(input, weight, as_geometry(*geometry))
    eager.check_tensors(input, weight, bias)
    return empty_in(input, shape, channels_last(input))


def _settle(input, *options):
    *others, numerics = options
    return input, *others, settled(numerics, input.device)


def _first(ctx, dy):
    needed = ctx.needs_input_grad[:3]
    return gradients_of_op(ops.conv_transpose2d_backward(dy, *ctx.saved_tensors, *ctx.args[3:9], needed), needed)


register(
    f"conv_transpose2d(Tensor input, Tensor weight, Tensor? bias, {GEOMETRY}, str numerics) -> Tensor",
    _run,
    _fake,
    lambda args, y: args[:2],
    _first,
    settle=_settle,
    flops=lambda x, w, *_: flops(x, w),
)


def _gradient(dy, x, weight, *options):
    *geometry, numerics, needed = options
    choice = settled_choice(numerics, x.device)
    dx, dw, dbias = eager.conv_gradients(
        x, weight, dy, x.shape, weight.shape, as_geometry(*geometry), choice, tuple(needed)
    )
    return results_of(dy, dx, dw, dbias)


def _fake_gradient(dy, x, weight, *options):
    *_, needed = options
    like = [empty_in(t, t.shape, channels_last(t)) for t in (x, weight)]
    return fake_gradients(dy, (*like, dy.new_empty(dy.shape[1])), needed)


def _second(ctx, vx, vw, vbias):
    """y = T(x, w) is linear in each argument, and so are dx = D(dy, w) and dw = W(x, dy)."""
    dy, x, weight = ctx.saved_tensors
    options = ctx.args[3:9]
    need_dy, need_x, need_w = ctx.needs_input_grad[:3]
    ddy = dx = dw = None
    if need_dy:
        convolution = lambda *args: ops.conv_transpose2d(*args, *options)  # noqa: E731
        ddy = eager.second_gradient_of_dy(dy, x, weight, vx, vw, vbias, convolution)
    if need_x and vw is not None:
        dx, _, _ = ops.conv_transpose2d_backward(dy, x, vw, *options, (True, False, False))
    if need_w and vx is not None:
        _, dw, _ = ops.conv_transpose2d_backward(dy, vx, weight, *options, (False, True, False))
    return ddy, dx, dw


register(
    f"conv_transpose2d_backward(Tensor dy, Tensor x, Tensor weight, {GEOMETRY}, str numerics, bool[3] needed)"
    " -> (Tensor, Tensor, Tensor)",
    _gradient,
    _fake_gradient,
    lambda args, results: args[:3],
    _second,
    outputs=3,
    flops=lambda dy, x, w, *options: flops(x, w) * sum(options[-1][:2]),
)
