"""For every kernel file the operators that launch its kernels, compared with PyTorch's against a float64 truth.

What the magic `%%cu` runs on an edited kernel: quick, one dtype; the tests look at far more.
"""

import contextlib
import functools
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F

from . import functional, parity
from .numerics import without_tensor_cores
from .parity import tf32_rounded

IMAGES = 512  # on a GPU with this much memory; a sixteenth on others
_MEMORY = 30e9


class Case(NamedTuple):
    """One operator, forward and backward.

    ours, theirs: functions of the tensors, which return a tensor, or a tuple whose first element gets a gradient.
    inputs: inputs(images) gives {name: float32 tensor}, small ones where images is None. Those whose name begins with _
        need no gradient.
    terms: terms(images) gives {result: how many terms it sums}, of long sums, for `parity.within_policy`. Results are
        "output", "gradient of x", ..., "result 2", ...
    rounded: in float32, whether ours rounds operands to TF32. PyTorch on the CPU, and often cuDNN, does not: the error
        that this causes in float64 is then what ours may have.
    gradient: gradient(dtype, **tensors in float64) gives the output's gradient. Default: random.
    within: a context that ours runs in.
    """

    what: str
    files: tuple[str, ...]
    ours: Callable
    theirs: Callable
    inputs: Callable
    terms: Callable = lambda images: {}
    rounded: bool = False
    gradient: Callable | None = None
    within: Callable = contextlib.nullcontext


def cases(files) -> list[Case]:
    """All that launch a kernel of these files."""
    return [case for case in CASES if set(case.files).intersection(files)]


def images_for(device: torch.device) -> int | None:
    """How many images of the model's size a check takes on `device`; None, small ones, on the emulator."""
    if device.type == "cpu":
        return None
    # What torch keeps, the references among it, must not make the next check a smaller one.
    free = torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)
    return IMAGES if free > _MEMORY else IMAGES // 16


def compare(case: Case, dtype: torch.dtype, device: torch.device, images: int | None) -> list[parity.Row]:
    """Output and every gradient: their error, PyTorch's, and whether ours is within the policy of `parity`."""
    reference = _reference(case, dtype, device, images)
    with case.within():
        found = _results(case.ours, reference.tensors, reference.dy)
    rows = []
    terms = case.terms(images)
    if unknown := terms.keys() - reference.truth.keys():
        raise ValueError(f"{case.what}: terms of {', '.join(unknown)}; results are {', '.join(reference.truth)}")
    for name, truth in reference.truth.items():
        ours, theirs = parity.error(found[name], truth), reference.errors[name]
        ok = found[name].dtype == reference.dtypes[name]
        ok = ok and parity.within_policy(found[name], truth, ours, theirs, terms.get(name, 0))
        rows.append(parity.Row(f"{case.what}: {name}", str(dtype).removeprefix("torch."), ours, theirs, None, ok))
    return rows


class _Reference(NamedTuple):
    tensors: dict
    dy: torch.Tensor
    truth: dict
    errors: dict
    dtypes: dict


@functools.lru_cache(maxsize=12)  # at most 15 GB of a GPU; most headers are in fewer checks
def _reference(case, dtype, device, images) -> _Reference:
    """Inputs and what the results should be; kept, as whoever edits a kernel runs its checks again and again."""
    torch.manual_seed(0)
    with torch.device(device):
        tensors = {name: t.to(dtype) for name, t in case.inputs(images).items()}
    double = {name: t.double() for name, t in tensors.items()}
    with torch.no_grad():
        shape = _first(case.theirs(**double)).shape
    if case.gradient:
        dy = case.gradient(dtype, **double).to(dtype)
    else:
        dy = torch.randn(shape, device=device).to(dtype)
    truth = _results(case.theirs, double, dy.double())
    with parity.tf32(False):
        theirs = _results(case.theirs, tensors, dy)
    errors = {name: parity.error(theirs[name], truth[name]) for name in truth}
    if case.rounded and dtype == torch.float32:
        operands = {name: tf32_rounded(t).double() if t.dim() > 1 else t.double() for name, t in tensors.items()}
        rounded = _results(case.theirs, operands, tf32_rounded(dy).double())
        for name, e in errors.items():
            errors[name] = parity.Error(*map(max, e, parity.error(rounded[name], truth[name])))
    dtypes = {name: t.dtype for name, t in theirs.items()}
    return _Reference(tensors, dy, truth, errors, dtypes)


def _results(function, tensors, dy) -> dict[str, torch.Tensor]:
    leaves = {name: t.detach().clone().requires_grad_(not name.startswith("_")) for name, t in tensors.items()}
    result = function(**leaves)
    y, rest = _first(result), result[1:] if isinstance(result, tuple) else ()
    wanted = {f"gradient of {name}": t for name, t in leaves.items() if t.requires_grad}
    gradients = torch.autograd.grad(y, list(wanted.values()), dy)
    others = {f"result {i}": t.detach() for i, t in enumerate(rest, 2)}
    return {"output": y.detach(), **dict(zip(wanted, gradients)), **others}


def _first(result):
    return result[0] if isinstance(result, tuple) else result


def _activations(images):
    """Shape of the convolution's output."""
    return (images, 128, 34, 34) if images else (2, 8, 10, 12)


def _x(images):
    return {"x": torch.randn(_activations(images))}


def _pool_gradient(max_pool2d, _x, dy):
    """dx, a function of dy whose gradient takes a kernel of its own."""
    x = _x.detach().requires_grad_()
    with torch.enable_grad():
        return torch.autograd.grad(max_pool2d(x, 2), x, dy, create_graph=True)[0]


def _pool_gradient_inputs(images):
    *shape, height, width = _activations(images)
    return {"_x": torch.randn(*shape, height, width), "dy": torch.randn(*shape, height // 2, width // 2)}


def _clear_winners(before_pooling, kernel_size=2, stride=2, padding=0):
    """A gradient that is 0 where rounding may decide which element of a window is the largest."""

    def gradient(dtype, **tensors):
        with torch.no_grad():
            y = F.pad(_first(before_pooling(*tensors.values())), [padding] * 4, value=-float("inf"))
        first, second = (
            y.unfold(2, kernel_size, stride).unfold(3, kernel_size, stride).flatten(4).topk(2).values.unbind(-1)
        )
        return torch.randn_like(first) * (first - second > min(64 * torch.finfo(dtype).eps, 0.1))

    return gradient


def _channels(c):
    """weight, bias, running mean and variance. One weight is negative, and none small."""
    weight = torch.rand(c) / 2 + 0.5
    weight[c // 2] *= -1
    return {"weight": weight, "bias": torch.rand(c) - 0.5, "_mean": torch.rand(c) / 5, "_var": torch.rand(c) + 0.5}


def _norm_inputs(images):
    return {**_x(images), **_channels(_activations(images)[1])}


def _sums_of(inputs):
    """`Case.terms` of a norm: the gradients of weight and bias sum over a channel."""

    def terms(images):
        with torch.device("meta"):
            x = inputs(images)["x"]
        return dict.fromkeys(("gradient of weight", "gradient of bias"), x.numel() // x.shape[1])

    return terms


def _norm(function, training):
    """`function`, with batch_norm's arguments, of tensors; in training it also returns the running statistics."""

    def call(x, weight, bias, _mean, _var):
        mean, var = _mean.clone(), _var.clone()
        y = function(x, mean, var, weight, bias, training)
        return (y, mean, var) if training else y

    return call


def _torch_norm(after, training):
    return _norm(lambda *args: after(F.batch_norm(*args)), training)


def _group_inputs(images):
    shape = (images, 128, 17, 17) if images else (2, 32, 5, 6)
    return {"x": torch.randn(shape), "weight": torch.rand(shape[1]) + 0.5, "bias": torch.randn(shape[1])}


def _few_large_groups(images):
    """More values in a group than a block keeps."""
    return {"x": torch.randn(2, 2, 90, 80), "weight": torch.rand(2) + 0.5, "bias": torch.randn(2)}


def _conv_inputs(images):
    # The small one is such that forward and dgrad are one variant on tensor cores: that takes seconds to compile.
    shapes = ((images, 64, 32, 32), (64, 128, 5, 5)) if images else ((2, 16, 9, 11), (16, 16, 3, 3))
    return {"x": torch.rand(shapes[0]), "w": torch.randn(shapes[1]) / 40, "bias": torch.randn(shapes[1][1])}


def _conv_terms(images):
    n, k, m, taps, pixels = (images, 64, 128, 25, 34 * 34) if images else (2, 16, 16, 9, 99)
    sums = {"gradient of w": n * pixels, "gradient of bias": n * pixels}
    return {"output": k * taps, "gradient of x": m * taps, **sums}


def _conv(numerics):
    return lambda x, w, bias: functional.conv_transpose2d(x, w, bias, padding=1, numerics=numerics)


def _torch_conv(x, w, bias):
    return F.conv_transpose2d(x, w, bias, padding=1)


def _fused_inputs(images):
    inputs = _conv_inputs(images)
    m = inputs["w"].shape[1]
    conv_bias = inputs.pop("bias")
    group = {"group_weight": torch.rand(m) + 0.5, "group_bias": torch.randn(m)}
    return {**inputs, "_conv_bias": conv_bias, **_channels(m), **group}


def _fused(numerics, training, activation):
    def call(x, w, _conv_bias, weight, bias, _mean, _var, group_weight, group_bias):
        mean, var = _mean.clone(), _var.clone()
        y = functional.conv_bn_activation_max_pool_group_norm(
            *(x, mean, var, weight, bias, training),
            activation=activation,
            conv_weight=w,
            conv_bias=_conv_bias,
            padding=1,
            num_groups=_num_groups(w),
            group_weight=group_weight,
            group_bias=group_bias,
            numerics=numerics,
        )
        return (y, mean, var) if training else y

    return call


def _num_groups(w):
    return 8 if w.shape[1] == 128 else 2


def _unfused(training, activation):
    def call(x, w, _conv_bias, weight, bias, _mean, _var, group_weight, group_bias):
        y, mean, var = _before_pooling(x, w, _conv_bias, weight, bias, _mean, _var, training, activation)
        y = F.group_norm(F.max_pool2d(y, 2), _num_groups(w), group_weight, group_bias)
        return (y, mean, var) if training else y

    return call


def _before_pooling(x, w, conv_bias, weight, bias, mean, var, training, activation):
    mean, var = mean.clone(), var.clone()
    y = F.batch_norm(_torch_conv(x, w, conv_bias), mean, var, weight, bias, training)
    return getattr(F, activation)(y), mean, var


def _fused_gradient(near_tie, training, activation):
    def gradient(dtype, x, w, _conv_bias, weight, bias, _mean, _var, group_weight, group_bias):
        with torch.no_grad():
            y = _before_pooling(x, w, _conv_bias, weight, bias, _mean, _var, training, activation)[0]
            return parity.incoming_gradient(y, F.max_pool2d(y, 2), _num_groups(w), group_weight, near_tie, seed=0)

    return gradient


def _tall_inputs(_images):
    """Of a convolution whose output is too high for dgrad on tensor cores. Many images, as a group's statistics are one
    error for all of the gradients that sum over it, and chance decides much of a few.
    """
    inputs = _fused_inputs(None)
    return {**inputs, "x": torch.randn(8, 16, 70, 4), "w": torch.randn(16, 16, 5, 5) / 40}


def _fused_terms(images):
    """The sums over all pixels, of the convolution and after pooling."""
    n, pooled, pixels = (images, 17 * 17, 34 * 34) if images else (2, 20, 99)
    names = ("weight", "bias", "group_weight", "group_bias")
    return {"gradient of w": n * pixels, **dict.fromkeys((f"gradient of {name}" for name in names), n * pooled)}


def _tall_terms(_images):
    return dict.fromkeys(_fused_terms(None), 8 * 36 * 3)


def _fused_case(numerics, training, near_tie, tall=False, activation="tanh", **options):
    files = ("conv_bn_pool.cu", "pooled_tail.cu", "pooled_tail_backward.cu", "conv_wgrad_mma.cu")
    name = "fused model" if activation == "tanh" else f"fused chain with {activation}"
    return Case(
        f"{name}, {numerics}, {'training' if training else 'eval'}{', tall images' if tall else ''}",
        files[2:3] if tall else files if activation == "tanh" else files[1:3],
        _fused(numerics, training, activation),
        _unfused(training, activation),
        _tall_inputs if tall else _fused_inputs,
        _tall_terms if tall else _fused_terms,
        gradient=_fused_gradient(near_tie, training, activation),
        **options,
    )


_OVERLAPPING = {"kernel_size": 3, "stride": 2, "padding": 1}
_MMA = ("conv_transpose_mma.cu", "pack_weight_fp16.cu", "conv_wgrad_mma.cu", "fp16_cells.cu")
_GENERAL = ("conv_transpose.cu", "conv_transpose_wgrad.cu", "channel_sum.cu")
_POOLED = "bn_tanh_max_pool.cu"

CASES = (
    # An odd size has a rest that fills no pack, the second starts where 16 bytes do not, and where values are small a
    # formula that cancels is far off.
    *(
        Case(
            what,
            ("tanh.cu",),
            lambda input, part=part: functional.tanh(input.flatten()[part]),
            lambda input, part=part: torch.tanh(input.flatten()[part]),
            lambda images, scale=scale: {"input": scale * torch.randn(_activations(images))},
        )
        for what, part, scale in (
            ("tanh", slice(None, -1), 1),
            ("tanh, unaligned", slice(1, None), 1),
            ("tanh, small values", slice(None, -1), 1e-3),
        )
    ),
    *(
        Case(
            f"max_pool2d {window['kernel_size']}x{window['kernel_size']}",
            ("max_pool.cu",),
            functools.partial(functional.max_pool2d, **window),
            functools.partial(F.max_pool2d, **window),
            lambda images: {"input": torch.randn(_activations(images))},
        )
        for window in ({"kernel_size": 2}, _OVERLAPPING)
    ),
    Case(
        "gradient of max_pool2d, and its gradient",
        ("max_pool.cu",),
        functools.partial(_pool_gradient, functional.max_pool2d),
        functools.partial(_pool_gradient, F.max_pool2d),
        _pool_gradient_inputs,
    ),
    Case(
        "batch_norm, training",
        ("batch_norm.cu",),
        _norm(functional.batch_norm, True),
        _torch_norm(lambda y: y, True),
        _norm_inputs,
        _sums_of(_norm_inputs),
    ),
    Case(
        "batch_norm_tanh, eval",
        ("batch_norm.cu",),
        _norm(functional.batch_norm_tanh, False),
        _torch_norm(torch.tanh, False),
        _norm_inputs,
        _sums_of(_norm_inputs),
    ),
    Case(
        "group_norm",
        ("group_norm.cu",),
        lambda x, weight, bias: functional.group_norm(x, x.shape[1] // 16, weight, bias),
        lambda x, weight, bias: F.group_norm(x, x.shape[1] // 16, weight, bias),
        _group_inputs,
        _sums_of(_group_inputs),
    ),
    Case(
        "group_norm, large groups",
        ("group_norm.cu",),
        lambda x, weight, bias: functional.group_norm(x, 1, weight, bias),
        lambda x, weight, bias: F.group_norm(x, 1, weight, bias),
        _few_large_groups,
        _sums_of(_few_large_groups),
    ),
    Case(
        "bn_tanh_max_pool2d, training",
        (_POOLED,),
        _norm(functional.bn_tanh_max_pool2d, True),
        _torch_norm(lambda y: F.max_pool2d(y.tanh(), 2), True),
        _norm_inputs,
        _sums_of(_norm_inputs),
        gradient=_clear_winners(_torch_norm(torch.tanh, True)),
    ),
    Case(
        "tanh_max_pool2d",
        (_POOLED,),
        lambda x: functional.tanh_max_pool2d(x, 2),
        lambda x: F.max_pool2d(x.tanh(), 2),
        _x,
        gradient=_clear_winners(torch.tanh),
    ),
    Case(
        "tanh_max_pool2d, overlapping",
        (_POOLED,),
        lambda x: functional.tanh_max_pool2d(x, **_OVERLAPPING),
        lambda x: F.max_pool2d(x.tanh(), **_OVERLAPPING),
        _x,
        gradient=_clear_winners(torch.tanh, **_OVERLAPPING),
    ),
    Case(
        "conv_transpose2d, general",
        _GENERAL,
        _conv("fp32"),
        _torch_conv,
        _conv_inputs,
        _conv_terms,
        within=without_tensor_cores,
    ),
    Case("conv_transpose2d, tf32", _MMA, _conv("tf32"), _torch_conv, _conv_inputs, _conv_terms, rounded=True),
    Case("conv_transpose2d, fp32", _MMA, _conv("fp32"), _torch_conv, _conv_inputs, _conv_terms),
    # Both modes and both classes in two compilations. Few values are summed, so that one bad rounding counts.
    _fused_case("tf32", True, 3e-2, rounded=True),
    _fused_case("fp32", False, 1e-3),
    _fused_case("fp32", False, 1e-3, tall=True),
    _fused_case("tf32", True, 3e-2, activation="leaky_relu", rounded=True),
)
