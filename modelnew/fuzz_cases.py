"""The cases of `modelnew.fuzz`: a random call of each function of `modelnew.functional`, and of PyTorch's function.

A case's structure (shapes, memory layouts, hyper-parameters, kinds of values) comes from a random.Random, its values
from a torch.Generator. So a structure can be judged on more values, and hypothesis can draw structures in tests. Each
new variant of a kernel takes time to compile. So shapes vary much, but what kernels are compiled for varies little.
"""

import functools
import math

import torch
import torch.nn.functional as F

from . import definitions, functional
from .fuzz_values import HALVES, FuzzCase, Values, any_dtype, input_of, layout_of, order_of, pair_of, shape_of, words
from .parity import NEAR_TIE, incoming_gradient


def _elementwise(name, draw, **options):
    dtype = any_dtype(draw)
    shape = tuple(draw.randint(0 if draw.random() < 0.1 else 1, 9) for _ in range(draw.randint(0, 5)))
    ours, theirs = getattr(functional, name), getattr(F, name)
    return FuzzCase(
        words(name, options),
        lambda x: ours(x, **options),
        lambda x: theirs(x, **options),
        {"x": input_of(draw, shape, dtype)},
        dtype,
        order=order_of(draw),
    )


def leaky_relu(draw):
    """A case of leaky_relu: any shape and slope."""
    return _elementwise("leaky_relu", draw, negative_slope=draw.choice((0.01, 0.0, 0.2, -0.5, 1.0, 3.0)))


def _window(draw) -> dict:
    """A pooling window, valid or not; often a common one."""
    if draw.random() < 0.4:
        size, stride, padding = draw.choice(((2, 2, 0), (3, 2, 1), (3, 1, 1), (2, None, 0), (5, 1, 2), (3, 2, 0)))
        return {"kernel_size": size, "stride": stride, "padding": padding, "ceil_mode": draw.random() < 0.2}
    size = pair_of(draw, 1, 6)
    most = (size if type(size) is int else min(size)) // 2
    return {
        "kernel_size": size,
        "stride": None if draw.random() < 0.2 else pair_of(draw, 1, 4),
        "padding": pair_of(draw, 0, most if draw.random() < 0.95 else most + 1),
        "dilation": pair_of(draw, 1, 3) if draw.random() < 0.4 else 1,
        "ceil_mode": draw.random() < 0.4,
    }


def _pairs(window) -> dict[str, tuple[int, int]]:
    """kernel_size, stride, padding and dilation as pairs."""
    found = {"dilation": 1, **window}
    found["stride"] = found["stride"] or found["kernel_size"]
    names = ("kernel_size", "stride", "padding", "dilation")
    return {name: (found[name],) * 2 if type(found[name]) is int else found[name] for name in names}


def _has_empty_windows(size, window) -> bool:
    """Whether some windows contain only padding. There, PyTorch's backward writes out of bounds on CPUs."""
    for n, k, s, p, d in zip(size, *_pairs(window).values()):
        starts = range(-p, n + p, s)
        if not all(any(0 <= start + i * d < n for i in range(k)) for start in starts):
            return True
    return False


def _torch_pool(x, **window):
    if not x.numel() or not _has_empty_windows(x.shape[-2:], window):
        return F.max_pool2d(x, **window)
    shape = F.max_pool2d(x.detach(), **window).shape
    height, width = _pairs(window)["padding"]
    padded = F.pad(x, (width, width, height, height), value=-math.inf)
    return F.max_pool2d(padded, **{**window, "padding": 0})[..., : shape[-2], : shape[-1]]


def max_pool2d(draw):
    """A case of max_pool2d: batches and single images, with and without indices."""
    dtype, window = any_dtype(draw), _window(draw)
    shape = shape_of(draw, 4)
    shape = shape[1:] if draw.random() < 0.15 else shape
    x, options = input_of(draw, shape, dtype), {**window, "return_indices": draw.random() < 0.3}
    if _has_empty_windows(shape[-2:], window):
        x = x._replace(special=tuple(value for value in x.special if value != -math.inf))  # as much as padding
        options["return_indices"] = False
    return FuzzCase(
        words("max_pool2d", options),
        lambda x: functional.max_pool2d(x, **options),
        lambda x: _torch_pool(x, **options),
        {"x": x},
        dtype,
        None,
        draw.choice(("contiguous", "channels_last", "reversed")) if len(shape) == 4 else "reversed",
        order=order_of(draw),
    )


def _affine(draw, channels, dtype, names=("weight", "bias"), wrong=0.0) -> dict[str, Values]:
    """Parameters of a norm: both, one or none; sometimes float32 for 16 bits. wrong: how often of a wrong size."""
    wide = torch.float32 if dtype in HALVES and draw.random() < 0.5 else None
    channels += draw.random() < wrong
    chosen = draw.choice((names, names, names[:1], names[1:], ()))
    return {name: Values((channels,), layout_of(draw, (channels,), dtype), 0.5, 1.0, dtype=wide) for name in chosen}


def _norm(name, draw, shape, after=lambda y: y, options=None, gradient=None):
    """A case of a batch norm and of what follows it."""
    dtype, options = any_dtype(draw), options or {}
    training, channels = draw.random() < 0.6, shape[1]
    statistics = {"training": training, "momentum": draw.choice((0.1, 0.0, 1.0, 0.37)), "eps": draw.choice((1e-5, 0.1))}
    order = order_of(draw)
    x = _norm_input(draw, shape, dtype, order, largest=training and name == "batch_norm")
    tensors = {"x": x, **_affine(draw, channels, dtype, wrong=0.02)}
    if training:  # 0 times a variance that float32 does not hold is NaN
        statistics["momentum"] = statistics["momentum"] or 0.5 * (torch.finfo(dtype).max in x.special)
    if not training or draw.random() < 0.7:
        wide = torch.float32 if dtype in HALVES and draw.random() < 0.7 else None
        tensors["_mean"] = Values((channels,), layout_of(draw, (channels,), dtype), dtype=wide)
        tensors["_var"] = Values((channels,), scale=0.1, mean=1.0, dtype=wide)

    def call(function, x, weight=None, bias=None, _mean=None, _var=None):
        mean, var = (None if t is None else t.clone() for t in (_mean, _var))
        y = function(x, mean, var, weight, bias, **statistics)
        return (y, mean, var) if training and mean is not None else y

    values = math.prod((shape[0], *shape[2:]))
    return FuzzCase(
        words(name, {**statistics, **options}),
        functools.partial(call, functools.partial(getattr(functional, name), **options)),
        functools.partial(call, lambda *args, **more: after(_torch_batch_norm(*args, **more))),
        tensors,
        dtype,
        functools.partial(call, lambda *args, **more: after(definitions.batch_norm(*args, **more))),
        draw.choice(("contiguous", "reversed")),
        dict.fromkeys(("output", "result 2", "result 3", *(f"gradient of {name}" for name in tensors)), values),
        gradient=gradient and functools.partial(gradient, call, statistics),
        order=order,
        differentiated=not (gradient and x.special),  # as in `tanh_max_pool2d`
    )


def _torch_batch_norm(x, mean, var, weight, bias, **options):
    return F.batch_norm(x, mean, var, _one(weight, bias), bias, **options)


def _norm_input(draw, shape, dtype, order, largest=True) -> Values:
    """Values whose squares, in float64, and second derivatives do not overflow."""
    found = input_of(draw, shape, dtype, largest=largest and dtype != torch.float64 and order == 1)
    return found._replace(scale=max(found.scale, 1.0)) if order == 2 and dtype == torch.float16 else found


def _one(weight, bias):
    """weight, or ones if there is a bias alone, for which PyTorch's gradients fail."""
    return torch.ones_like(bias) if weight is None and bias is not None else weight


def batch_norm(draw):
    """A case of batch_norm: two to five dimensions."""
    return _norm("batch_norm", draw, shape_of(draw, draw.choice((2, 3, 4, 4, 4, 5))))


def batch_norm_tanh(draw):
    """A case of batch_norm_tanh: two to five dimensions."""
    return _norm("batch_norm_tanh", draw, shape_of(draw, draw.choice((2, 3, 4, 4, 5))), torch.tanh)


def _clear_winners(before, window, dtype, dy, **tensors):
    """dy, but 0 where rounding may decide which element of a window is the maximum."""
    with torch.no_grad():
        y = before(**tensors)
    y = y[0] if isinstance(y, tuple) else y
    size, stride, padding, dilation = _pairs(window).values()
    if not y.numel():
        return dy
    planes = y.flatten(0, 1).unsqueeze(1)
    (top, left), (below, right) = padding, (p + s for p, s in zip(padding, stride))
    padded = F.pad(planes, (left, right, top, below), value=-math.inf)
    windows = F.unfold(padded, size, dilation, 0, stride)
    rows, columns = ((n - d * (k - 1) - 1) // s + 1 for n, k, d, s in zip(padded.shape[-2:], size, dilation, stride))
    windows = windows.view(len(planes), -1, rows, columns)[:, :, : dy.shape[-2], : dy.shape[-1]]
    if windows.shape[1] == 1:
        return dy
    first, second = windows.topk(2, dim=1).values.unbind(1)
    clear = first - second > min(64 * torch.finfo(dtype).eps, 0.1)
    return dy * clear.view(dy.shape)


def _tanh_winners(window, dtype, dy, x):
    return _clear_winners(torch.tanh, window, dtype, dy, input=x)


def tanh_max_pool2d(draw):
    """A case of tanh_max_pool2d: any window."""
    dtype, window = any_dtype(draw), _window(draw)
    x = input_of(draw, shape_of(draw, 4), dtype)
    return FuzzCase(
        words("tanh_max_pool2d", window),
        lambda x: functional.tanh_max_pool2d(x, **window),
        lambda x: _torch_pool(x.tanh(), **window),
        {"x": x},
        dtype,
        gradient=functools.partial(_tanh_winners, window),
        order=order_of(draw),
        differentiated=not x.special,  # PyTorch's gradient is NaN at every NaN, ours where a window keeps it
    )


def bn_tanh_max_pool2d(draw):
    """A case of bn_tanh_max_pool2d: any window and batch norm."""
    window = _window(draw)

    def gradient(call, statistics, dtype, dy, **tensors):
        def before(**tensors):
            return call(lambda *args, **more: _torch_batch_norm(*args, **more).tanh(), **tensors)

        return _clear_winners(before, window, dtype, dy, **tensors)

    def after(y):
        return _torch_pool(y.tanh(), **window)

    return _norm("bn_tanh_max_pool2d", draw, shape_of(draw, 4), after, window, gradient)


def group_norm(draw):
    """A case of group_norm: two to five dimensions."""
    dtype, groups = any_dtype(draw), draw.choice((1, 1, 2, 3, 4))
    channels = groups * draw.choice((1, 2, 3, 8)) + (draw.random() < 0.03)  # of which a few are refused
    shape, eps = shape_of(draw, draw.choice((2, 3, 4, 4, 4, 5)), channels), draw.choice((1e-5, 0.1))
    values, order = math.prod((shape[0], *shape[2:])), order_of(draw)
    x = _norm_input(draw, shape, dtype, order)
    return FuzzCase(
        words("group_norm", {"num_groups": groups, "eps": eps}),
        lambda x, weight=None, bias=None: functional.group_norm(x, groups, weight, bias, eps),
        lambda x, weight=None, bias=None: F.group_norm(x, groups, _one(weight, bias), bias, eps),
        {"x": x, **_affine(draw, channels, dtype, wrong=0.02)},
        dtype,
        lambda x, weight=None, bias=None: definitions.group_norm(x, groups, weight, bias, eps),
        draw.choice(("contiguous", "reversed")),
        {"gradient of weight": values, "gradient of bias": values},
        order=order,
    )


_BANDS = ((16, 32, 3, 1), (16, 16, 5, 2))  # in and out channels, kernel, padding: of tensor cores, a variant each


def conv_transpose2d(draw):
    """A case of conv_transpose2d: all hyper-parameters on the general kernels; a few shapes on tensor cores."""
    dtype, numerics = any_dtype(draw), draw.choice(("auto", "tf32", "fp32"))
    options = {"numerics": numerics}
    if draw.random() < 0.15 and dtype != torch.float64:
        channels, output, size, padding = draw.choice(_BANDS)
        kernel, options["padding"] = (size, size), padding
        groups, shape, rounded = 1, (draw.randint(1, 3), channels, 8, 8), dtype == torch.float32 and numerics == "tf32"
    else:
        groups = draw.choice((1, 1, 1, 2, 3))
        channels, output = groups * draw.randint(1, 4), draw.randint(1, 5)
        kernel, shape, rounded = (draw.randint(1, 4), draw.randint(1, 4)), shape_of(draw, 4, channels), False
        options |= {"stride": pair_of(draw, 1, 3), "padding": pair_of(draw, 0, 2), "dilation": pair_of(draw, 1, 2)}
        options |= {"output_padding": pair_of(draw, 0, 2) if draw.random() < 0.3 else 0, "groups": groups}
        shape = shape[1:] if draw.random() < 0.1 else shape
    weight = Values((channels, output, *kernel), scale=0.5)
    weight = weight._replace(layout=layout_of(draw, weight.shape, dtype))
    # Sums beyond the largest value are infinite or NaN, by their order.
    tensors = {"x": input_of(draw, shape, dtype, largest=False), "weight": weight}
    if draw.random() < 0.6:
        tensors["bias"] = Values((output * groups,), layout_of(draw, (output * groups,), dtype))
    theirs = {name: value for name, value in options.items() if name != "numerics"}
    taps, pixels = math.prod(kernel), math.prod(shape[-2:])
    images = shape[0] if len(shape) == 4 else 1
    return FuzzCase(
        words("conv_transpose2d", options),
        lambda x, weight, bias=None: functional.conv_transpose2d(x, weight, bias, **options),
        lambda x, weight, bias=None: F.conv_transpose2d(x, weight, bias, **theirs),
        tensors,
        dtype,
        None,
        draw.choice(("contiguous", "channels_last", "reversed")) if len(shape) == 4 else "reversed",
        {
            "output": taps * channels // groups,
            "gradient of x": taps * output,
            "gradient of weight": images * pixels,
            "gradient of bias": 9 * images * pixels,
        },
        rounded,
        order=order_of(draw),
        differentiated=not tensors["x"].special,
    )


def _chain(activation, draw):
    """A case of the fused chain on tensor cores: a few shapes."""
    dtype, numerics = draw.choice((torch.float32, torch.float32, *HALVES)), draw.choice(("tf32", "fp32"))
    channels, output, size, padding = draw.choice(_BANDS)
    training, groups, eps = draw.random() < 0.6, draw.choice((2, 4)), draw.choice((1e-5, 1e-3))
    slope, momentum = draw.choice((0.01, 0.0, 0.3)), draw.choice((0.1, 1.0))
    shape = draw.randint(2, 4), channels, 8, 8
    special = draw.choice(((math.nan,), (math.inf,), (-math.inf,))) if draw.random() < 0.2 else ()
    tensors = {
        "x": Values(shape, layout_of(draw, shape, dtype), special=special),
        "w": Values((channels, output, size, size), scale=(2 / channels) ** 0.5 / size),
        "_mean": Values((output,), scale=0.1),
        "_var": Values((output,), scale=0.05, mean=1.0),
        **_affine(draw, output, dtype),
        **_affine(draw, output, dtype, ("group_weight", "group_bias")),
    }
    tensors = {name: value._replace(dtype=None) for name, value in tensors.items()}
    if draw.random() < 0.5:
        tensors["_conv_bias"] = Values((output,))
    if "group_weight" in tensors:  # which `incoming_gradient` divides by
        tensors["group_weight"] = tensors["group_weight"]._replace(scale=0.1)
    act = torch.tanh if activation == "tanh" else functools.partial(F.leaky_relu, negative_slope=slope)
    options = {"training": training, "momentum": momentum, "eps": eps}

    def ours(x, w, _mean, _var, weight=None, bias=None, group_weight=None, group_bias=None, _conv_bias=None):
        mean, var = _mean.clone(), _var.clone()
        more = {"conv_weight": w, "conv_bias": _conv_bias, "padding": padding, "group_weight": group_weight}
        more |= {"num_groups": groups, "group_bias": group_bias, "group_eps": eps, "numerics": numerics}
        if activation != "tanh":
            more |= {"activation": activation, "negative_slope": slope}
        function = getattr(
            functional, f"conv_bn_{'tanh' if activation == 'tanh' else 'activation'}_max_pool_group_norm"
        )
        y = function(x, mean, var, weight, bias, **options, **more)
        return (y, mean, var) if training else y

    def before(x, w, _mean, _var, weight=None, bias=None, _conv_bias=None, **_):
        mean, var = _mean.clone(), _var.clone()
        y = F.conv_transpose2d(x, w, _conv_bias, padding=padding)
        return act(_torch_batch_norm(y, mean, var, weight, bias, **options)), mean, var

    def theirs(group_weight=None, group_bias=None, **tensors):
        y, mean, var = before(**tensors)
        y = F.group_norm(F.max_pool2d(y, 2), groups, _one(group_weight, group_bias), group_bias, eps)
        return (y, mean, var) if training else y

    def gradient(dtype, dy, group_weight=None, **tensors):
        with torch.no_grad():
            y = before(**tensors)[0]
        near = max(3 * NEAR_TIE[numerics], 64 * torch.finfo(dtype).eps if dtype in HALVES else 0)
        weight = y.new_ones(output) if group_weight is None else group_weight
        return incoming_gradient(y, F.max_pool2d(y, 2), groups, weight, near, 0, activation != "tanh")

    pixels = math.prod(n - 2 * padding + size - 1 for n in shape[2:])
    sums = dict.fromkeys((f"gradient of {name}" for name in tensors), shape[0] * pixels // 4)
    return FuzzCase(
        words(f"conv_bn_{activation}_max_pool_group_norm", {**options, "groups": groups, "numerics": numerics}),
        ours,
        theirs,
        tensors,
        dtype,
        terms={**sums, "gradient of w": shape[0] * pixels},
        rounded=numerics == "tf32" and dtype == torch.float32,
        gradient=gradient,
        differentiated=not special,
    )


_BUILDERS = {
    build.__name__: build
    for build in (
        leaky_relu,
        max_pool2d,
        batch_norm,
        batch_norm_tanh,
        group_norm,
        tanh_max_pool2d,
        bn_tanh_max_pool2d,
        conv_transpose2d,
    )
} | {
    "conv_bn_tanh_max_pool_group_norm": functools.partial(_chain, "tanh"),
    "conv_bn_activation_max_pool_group_norm": functools.partial(_chain, "leaky_relu"),
}
# Functions without a builder take one tensor, of any shape.
OPERATORS = {name: _BUILDERS.get(name, functools.partial(_elementwise, name)) for name in functional.__all__}
