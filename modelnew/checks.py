"""Checks of kernel files: the operators that launch their kernels, compared with PyTorch's against a float64 truth.

The magic `%%cu` runs these on an edited kernel. They are quick; the tests check far more.
"""

import functools
import importlib
import pkgutil
from typing import NamedTuple

import torch
import torch.nn.functional as F

from cupy_kernels.errors import UnsupportedError

from . import functional, parity
from .cases import Case, first
from .functional.batch_norm import per_channel
from .functional.conv_transpose import conv_inputs, torch_conv
from .parity import tf32_rounded

IMAGES = 512  # on a GPU with this much memory; a sixteenth on others
_MEMORY = 30e9


def cases(files) -> list[Case]:
    """All cases that launch a kernel of these files."""
    return [case for case in CASES if set(case.files).intersection(files)]


def images_for(device: torch.device) -> int | None:
    """The number of images of the model's size in a check on `device`; None (small ones) on the emulator."""
    if device.type == "cpu":
        return None
    # What torch keeps, the references among it, must not make the next check a smaller one.
    free = torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)
    return IMAGES if free > _MEMORY else IMAGES // 16


# What becomes of a case's first tensor, {size: function}: as it is, of odd height and width, and without elements.
SIZES = {
    "": lambda tensor: tensor,
    "odd": lambda tensor: tensor[..., : (tensor.shape[-2] - 1) | 1, : (tensor.shape[-1] - 1) | 1].contiguous(),
    "empty": lambda tensor: tensor[:0],
}


def compare(
    case: Case, dtype: torch.dtype, device: torch.device, images: int | None, size: str = ""
) -> list[parity.Row]:
    """Rows for output and gradients: our error, PyTorch's error, and whether ours is within the policy of `parity`.

    size: one of SIZES. There are no rows if PyTorch, or the fused operator, refuses the case at that size.
    """
    reference = (_large_reference if images else _reference)(case, dtype, device, images, size)
    if reference is None:
        return []
    try:
        with case.within():
            found = _results(case.ours, reference.tensors, reference.dy)
    except UnsupportedError:
        if size:
            return []
        raise
    rows = []
    terms = case.terms(images)
    if unknown := terms.keys() - reference.truth.keys():
        raise ValueError(f"{case.what}: terms of {', '.join(unknown)}; results are {', '.join(reference.truth)}")
    for name, truth in reference.truth.items():
        ours, theirs = parity.error(found[name], truth), reference.errors[name]
        ok = found[name].dtype == reference.dtypes[name]
        ok = ok and parity.within_policy(found[name], truth, ours, theirs, terms.get(name, 0))
        what = f"{case.what}: {name}{size and f', {size} size'}"
        rows.append(parity.Row(what, str(dtype).removeprefix("torch."), ours, theirs, None, ok))
    return rows


class _Reference(NamedTuple):
    tensors: dict
    dy: torch.Tensor
    truth: dict
    errors: dict
    dtypes: dict


@functools.lru_cache(maxsize=256)
def _reference(case, dtype, device, images, size) -> _Reference | None:
    """Inputs and expected results. They are cached, because an edited kernel is checked again and again."""
    torch.manual_seed(0)
    with torch.device(device):
        tensors = {name: t.to(dtype) for name, t in case.inputs(images).items()}
    resized = next(iter(tensors))
    tensors[resized] = SIZES[size](tensors[resized])
    double = {name: t.double() for name, t in tensors.items()}
    try:
        with torch.no_grad():
            shape = first(case.theirs(**double)).shape
        own = case.gradient(dtype, **double) if case.gradient and tensors[resized].numel() else None
    except (RuntimeError, ValueError):
        if size:
            return None
        raise
    dy = (torch.randn(shape, device=device) if own is None else own).to(dtype)
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


# At most 15 GB of a GPU; most headers are in fewer checks.
_large_reference = functools.lru_cache(maxsize=12)(_reference.__wrapped__)


def _results(function, tensors, dy) -> dict[str, torch.Tensor]:
    leaves = {name: t.detach().clone().requires_grad_(not name.startswith("_")) for name, t in tensors.items()}
    result = function(**leaves)
    y, rest = first(result), result[1:] if isinstance(result, tuple) else ()
    wanted = {f"gradient of {name}": t for name, t in leaves.items() if t.requires_grad}
    gradients = torch.autograd.grad(y, list(wanted.values()), dy)
    others = {f"result {i}": t.detach() for i, t in enumerate(rest, 2)}
    return {"output": y.detach(), **dict(zip(wanted, gradients)), **others}


def _fused_inputs(images):
    inputs = conv_inputs(images)
    m = inputs["w"].shape[1]
    conv_bias = inputs.pop("bias")
    group = {"group_weight": torch.rand(m) + 0.5, "group_bias": torch.randn(m)}
    return {**inputs, "_conv_bias": conv_bias, **per_channel(m), **group}


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
    y = F.batch_norm(torch_conv(x, w, conv_bias), mean, var, weight, bias, training)
    return getattr(F, activation)(y), mean, var


def _fused_gradient(near_tie, training, activation):
    def gradient(dtype, x, w, _conv_bias, weight, bias, _mean, _var, group_weight, group_bias):
        with torch.no_grad():
            y = _before_pooling(x, w, _conv_bias, weight, bias, _mean, _var, training, activation)[0]
            options = (_num_groups(w), group_weight, near_tie, 0, activation != "tanh")
            return parity.incoming_gradient(y, F.max_pool2d(y, 2), *options)

    return gradient


def _tall_inputs(_images):
    """Inputs of a convolution whose output is too high for dgrad on tensor cores.

    There are many images: a group's statistics are one common error of all gradients that sum over it, and with few of
    them chance decides.
    """
    inputs = _fused_inputs(None)
    return {**inputs, "x": torch.randn(8, 16, 70, 4), "w": torch.randn(16, 16, 5, 5) / 40}


def _fused_terms(images):
    """The sums over all pixels: of the convolution, and after pooling."""
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


def _found():
    """The CASES of all operators' files."""
    for file in pkgutil.iter_modules(functional.__path__, f"{functional.__name__}."):
        yield from getattr(importlib.import_module(file.name), "CASES", ())


CASES = (
    *_found(),
    # Both modes and both classes in two compilations. Few values are summed, so that one bad rounding counts.
    _fused_case("tf32", True, 3e-2, rounded=True),
    _fused_case("fp32", False, 1e-3),
    _fused_case("fp32", False, 1e-3, tall=True),
    _fused_case("tf32", True, 3e-2, activation="leaky_relu", rounded=True),
)
