"""Chains of layers that run fused: their table, and the check whether the fused kernels support a call."""

import functools
import threading
from typing import NamedTuple

import torch
from torch import nn
from torch.compiler import is_dynamo_compiling

from cupy_kernels.errors import UnsupportedError

from . import functional, layers
from .functional.affine import weight_and_bias
from .functional.conv_bn_pool import check_three, is_plain
from .functional.max_pool import pool_of
from .functional.resident_conv_bn_pool import fused_plan
from .functional.traced.conv_bn_pool import conv_bn_activation_max_pool_group_norm_or_parts
from .shortcuts import any_global_hook


class Chain(NamedTuple):
    """Layers that `functional.conv_bn_activation_max_pool_group_norm` computes with this activation.

    options: attributes of the activation's layer that are arguments of this function.
    """

    kinds: tuple[type[nn.Module], ...]
    activation: str
    options: tuple[str, ...] = ()


_BEFORE, _AFTER = (layers.ConvTranspose2d, layers.BatchNorm2d), (layers.MaxPool2d, layers.GroupNorm)
CHAINS = (
    Chain((*_BEFORE, layers.Tanh, *_AFTER), "tanh"),
    Chain((*_BEFORE, layers.LeakyReLU, *_AFTER), "leaky_relu", ("negative_slope",)),
)
LENGTH = 5  # of a chain

_OF_KINDS = {chain.kinds: chain for chain in CHAINS}
noted: dict[int, list] = {}  # {thread: a list that gets (modules, x) of each chain that is called}, for `explain`
_FORWARDS, _CALL = {kind: kind.forward for kinds in _OF_KINDS for kind in kinds}, nn.Module.__call__  # nobody's own yet


class Sequential(nn.Sequential):
    """torch.nn.Sequential that fuses ConvTranspose2d, BatchNorm2d, Tanh or LeakyReLU, MaxPool2d and GroupNorm in a row.

    These layers must be those of `modelnew.layers`; any modules may come before and after them. Where the fused kernels
    do not support the call, and where ModelNew would call a child unfused, the layers are called one by one. Arguments,
    indexing and state dict are those of torch.nn.Sequential.
    """

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        children, at = list(self._modules.values()), 0
        while at < len(children):
            fused = run_fused(children[at : at + LENGTH], input)
            input, at = (children[at](input), at + 1) if fused is None else (fused, at + LENGTH)
        return input


def run_fused(children: list[nn.Module], x: torch.Tensor, parts: str = "apart") -> torch.Tensor | None:
    """The result of the modules, one after the other, by the fused operators; None if these do not support the call.

    In a graph of torch.compile or torch.export, one operator decides when it runs, because shapes may differ from call
    to call.
    parts: what that operator runs if the fused kernels do not support the call, see
        `conv_bn_activation_max_pool_group_norm_or_parts`.
    """
    chain = _OF_KINDS.get(tuple(map(type, children)))
    if chain is None:
        return None
    if noted and not is_dynamo_compiling() and threading.get_ident() in noted:
        noted[threading.get_ident()].append((children, x))
    if _unsupported_reason(chain, range(LENGTH), children, x):
        return None
    conv, norm, activation, pool, group = children
    conv_weight, conv_bias = weight_and_bias(conv)
    group_weight, group_bias = weight_and_bias(group)
    function = norm.operation(functional.conv_bn_activation_max_pool_group_norm)
    if norm.peers is None and (is_dynamo_compiling() or (nn.Module.__call__ is not _CALL and _in_graph())):
        function = functools.partial(conv_bn_activation_max_pool_group_norm_or_parts, parts=parts)
    options = _shape(conv, pool)
    for name in chain.options:
        options[name] = getattr(activation, name)
    if options:
        function = functools.partial(function, **options)
    running_mean, running_var, weight, bias, training, momentum, eps = norm.arguments(x)
    try:
        return function(  # without * and **, which take twice as long
            x,
            running_mean,
            running_var,
            weight,
            bias,
            training,
            momentum,
            eps,
            conv_weight=conv_weight,
            conv_bias=conv_bias,
            padding=conv.padding,
            activation=chain.activation,
            num_groups=group.num_groups,
            group_weight=group_weight,
            group_bias=group_bias,
            group_eps=group.eps,
            num_batches_tracked=norm.counter(),
            numerics=conv.numerics,
        )
    except UnsupportedError:
        return None


def plan_of(children: dict[str, nn.Module], x: torch.Tensor):
    """(plan, reason): how the modules run on x, and why not as one operator.

    (plan, None): as one operator. ("three operators", reason): as three. (None, reason): not fused.
    """
    names, children = zip(*children.items())
    chain = max(CHAINS, key=lambda chain: sum(map(isinstance, children, chain.kinds)))  # what they are, or come next to
    reason = _unsupported_reason(chain, names, children, x)
    if reason:
        return None, reason
    conv, norm, activation, pool, group = children
    others = (conv.bias, norm.running_mean, norm.running_var, norm.weight, norm.bias, group.weight, group.bias)
    options = {name: getattr(activation, name) for name in chain.options}
    shape = _shape(conv, pool)
    if not shape:
        how = conv.numerics, norm.counter(), others
        plan, reason = fused_plan(x, conv.weight, conv.padding, group.num_groups, *how, **options)
        if plan:
            return plan, None
    else:
        reason = "the convolution has a stride, output padding, dilation or groups, or the windows are not 2x2"
    try:
        window = pool_of(pool.kernel_size, pool.stride, pool.padding, pool.dilation)
        check_three(x, window, norm.counter(), (conv.weight, *others), chain.activation, **options)
    except UnsupportedError as error:
        return None, str(error)
    return "three operators", reason


def _unsupported_reason(chain, names, children, x) -> str | None:
    """Why the modules, or the shape of x, do not allow the chain's operator; None if they do."""
    if any_global_hook():
        return "there are hooks for all modules"
    if isinstance(x, torch.fx.Proxy):
        return "torch.fx.symbolic_trace records the layers"
    if not all(map(unchanged, children, chain.kinds)):
        name = next(n for n, child, kind in zip(names, children, chain.kinds) if not unchanged(child, kind))
        return f"{name} is not replaced, has a hook, or was swapped, compiled or given another forward"
    if not isinstance(x, torch.Tensor):
        return f"the input is a {type(x).__name__}, and no tensor"
    conv, _, _, pool, _ = children
    if pool.return_indices:
        return "the pooling returns indices"
    if pool.ceil_mode:
        return "the pooling has ceil_mode"
    if pool.dilation not in (1, (1, 1)):
        return "the pooling has a dilation"
    if x.dim() != 4 or x.shape[1] != conv.in_channels:
        return f"the input, of shape {tuple(x.shape)}, is not [N, {conv.in_channels}, H, W]"
    return None


def _traced() -> bool:
    """Whether torch.fx has replaced nn.Module.__call__, as it does while make_fx or torch.export traces."""
    return getattr(nn.Module.__call__, "__globals__", {}).get("__name__") == torch.fx.Tracer.__module__


def _in_graph() -> bool:
    """Whether a graph with our operators is being traced, by `_traced`."""
    return _traced() and not torch.onnx.is_in_onnx_export()


def _shape(conv, pool) -> dict:
    """The arguments for a convolution and windows that the one operator does not support; else none."""
    given = conv.stride, conv.output_padding, conv.dilation, conv.groups, pool.kernel_size, pool.stride, pool.padding
    if is_plain(*given):
        return {}
    names = ("stride", "output_padding", "dilation", "groups", "pool_size", "pool_stride", "pool_padding")
    return dict(zip(names, given))


def unchanged(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether calling `module` does exactly what its class `kind` does, so that a fused kernel may replace it."""
    if type(module) is not kind or kind.forward is not _FORWARDS[kind]:
        return False
    if kind.__call__ is not _CALL and not _traced():
        return False
    own = module.__dict__  # its attributes take half as long from there
    return not (
        own["_forward_hooks"]
        or own["_forward_pre_hooks"]
        or own["_backward_hooks"]
        or own["_backward_pre_hooks"]
        or "forward" in own
        or "_call_impl" in own
        or own.get("_compiled_call_impl")
    )
