"""`Model`, the reference of KernelBench level 2 problem 11; `ModelNew`, the same on our kernels; and their inputs."""

from collections.abc import Iterable

import torch
from torch import nn
from torch.nn.modules.module import _has_any_global_hook

from . import functional, layers
from .functional.conv_bn_pool import fused_plan
from .interop import pair
from .numerics import check_numerics

OPERATORS = ("conv_transpose", "batch_norm", "tanh", "max_pool", "group_norm")

_KINDS = (layers.ConvTranspose2d, layers.BatchNorm2d, layers.Tanh, layers.MaxPool2d, layers.GroupNorm)
_FORWARDS, _CALL = {kind: kind.forward for kind in _KINDS}, nn.Module.__call__  # before anyone replaces them
_WINDOW = (2, 2, 0, 1)  # kernel_size, stride, padding, dilation
BATCH, CHANNELS, HEIGHT, WIDTH = 512, 64, 32, 32


def default_device() -> torch.device:
    """Where models and inputs go unless told otherwise: the current GPU, or the CPU where there is none."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def get_init_inputs() -> list[int]:
    """Arguments of Model and ModelNew: in_channels, out_channels, kernel_size, stride, padding, groups, num_groups."""
    return [CHANNELS, 128, 5, 1, 1, 8, 8]


def get_inputs(batch: int = BATCH, *, seed: int = 0, device=None) -> list[torch.Tensor]:
    """[x], x [batch, 64, 32, 32] float32, uniform in [0, 1): the same values at each call, on every device."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.rand(batch, CHANNELS, HEIGHT, WIDTH, generator=generator, device="cpu", dtype=torch.float32)
    return [x.to(default_device() if device is None else device)]


class Model(nn.Module):
    """The reference, in PyTorch's own modules. Only `device` is added, see ModelNew."""

    def __init__(self, in_channels, out_channels, kernel_size, stride, padding, groups, num_groups, *, device=None):
        super().__init__()
        self.conv_transpose = nn.ConvTranspose2d(in_channels, out_channels, kernel_size, stride=stride, padding=padding)
        self.batch_norm = nn.BatchNorm2d(out_channels)
        self.tanh = nn.Tanh()
        self.max_pool = nn.MaxPool2d(kernel_size=2, stride=2)
        self.group_norm = nn.GroupNorm(num_groups=num_groups, num_channels=out_channels)
        _place(self, device)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.conv_transpose(x)
        x = self.batch_norm(x)
        x = self.tanh(x)
        x = self.max_pool(x)
        return self.group_norm(x)


class ModelNew(nn.Module):
    """`Model` on our kernels: the same arguments, attributes and state dict; the same parameters from the same seed.

    in_channels, out_channels, kernel_size, stride, padding, num_groups: as in Model; `groups` is unused, as there.
    replace: "all", one name, or any names of `OPERATORS`. The named operators never call PyTorch's version, the others
        are PyTorch's own modules; with none named this is `Model`. {"tanh", "max_pool"} equals `Model` bit for bit on
        a GPU.
    numerics: how the transposed convolution multiplies. "tf32": operands of 10 mantissa bits, summed in float32;
        "fp32": float32 throughout; "auto": what PyTorch would do, so as torch.backends.cudnn.allow_tf32 says.
        `modelnew.explain(model, x)` tells which kernels run.
    device: where the parameters go; by default to the GPU where there is one, unless torch.set_default_device or a
        `with torch.device(...)` block chose another device than the CPU. They are drawn on the CPU, as those of a
        reference model that is built there and then moved.

    Replaced neighbours of batch_norm, tanh and max_pool run as one kernel, from the children's hyper-parameters at the
    time of the call. A child is called as a module, unfused, if it has a hook (pruning and weight norm are hooks, too),
    a `forward` of its own, was compiled, or was swapped for another module, as by
    torch.nn.SyncBatchNorm.convert_sync_batchnorm; so are all while hooks for all modules are registered.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        stride: int,
        padding: int,
        groups: int,
        num_groups: int,
        *,
        replace: str | Iterable[str] = "all",
        numerics: str = "auto",
        device=None,
    ):
        super().__init__()
        self.replace = _operators(replace)
        check_numerics(numerics)
        self.numerics = numerics
        conv, norm, tanh, pool, group = (layers if name in self.replace else nn for name in OPERATORS)
        own = {"numerics": numerics} if conv is layers else {}
        self.conv_transpose = conv.ConvTranspose2d(
            in_channels, out_channels, kernel_size, stride=stride, padding=padding, **own
        )
        self.batch_norm = norm.BatchNorm2d(out_channels)
        self.tanh = tanh.Tanh()
        self.max_pool = pool.MaxPool2d(kernel_size=2, stride=2)
        self.group_norm = group.GroupNorm(num_groups=num_groups, num_channels=out_channels)
        _place(self, device)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        fused = _fused(self, x)
        if fused is not None:
            return fused
        norm, tanh, pool = self.batch_norm, self.tanh, self.max_pool
        hooked = _has_any_global_hook()
        fuse_norm = not hooked and _fusible(norm, layers.BatchNorm2d)
        fuse_tanh = not hooked and _fusible(tanh, layers.Tanh)
        fuse_pool = not hooked and _fusible(pool, layers.MaxPool2d) and not pool.return_indices

        x = self.conv_transpose(x)
        if fuse_norm and fuse_tanh and fuse_pool:
            x = norm.apply_with(functional.bn_tanh_max_pool2d, x, **pool.window)
        elif fuse_tanh and fuse_pool:
            x = functional.tanh_max_pool2d(norm(x), **pool.window)
        elif fuse_norm and fuse_tanh:
            x = pool(norm.apply_with(functional.batch_norm_tanh, x))
        else:
            x = pool(tanh(norm(x)))
        return self.group_norm(x)

    def extra_repr(self) -> str:
        return f"replace={self.replace}, numerics={self.numerics!r}"


def fused_model(model: ModelNew, x: torch.Tensor):
    """(plan, None) if model(x) runs as one fused operator, else (None, the reason)."""
    children = _children(model)
    reason = _obstacle(children, x)
    if reason:
        return None, reason
    conv, norm, _, _, group = children
    others = (conv.bias, norm.running_mean, norm.running_var, norm.weight, norm.bias, group.weight, group.bias)
    return fused_plan(x, conv.weight, conv.padding, group.num_groups, conv.numerics, norm.counter(), others)


def _obstacle(children, x) -> str | None:
    """What in the modules, or in x's shape, keeps the model from being one fused operator."""
    if _has_any_global_hook():
        return "there are hooks for all modules"
    for name, child, kind in zip(OPERATORS, children, _KINDS):
        if not _fusible(child, kind):
            return f"{name} is not replaced, has a hook, or was swapped, compiled or given another forward"
    conv, _, _, pool, _ = children
    stride = pool.kernel_size if pool.stride is None else pool.stride
    window = (pool.kernel_size, stride, pool.padding, pool.dilation)
    if pool.return_indices or (window != _WINDOW and not all(map(_is, window, _WINDOW))):
        return "the pooling is not over 2x2 windows"
    if pool.ceil_mode:
        return "the pooling has ceil_mode"
    if (conv.stride, conv.output_padding, conv.dilation, conv.groups) != ((1, 1), (0, 0), (1, 1), 1):
        return "the convolution has a stride, output padding, dilation or groups"
    if x.dim() != 4 or x.shape[1] != conv.in_channels:
        return f"the input, of shape {tuple(x.shape)}, is not [N, {conv.in_channels}, H, W]"
    return None


def _is(size, value) -> bool:
    return size == value or pair(size, "the pooling's window") == (value, value)


def _fused(model, x):
    """model(x) by the fused operator; None if that does not take it."""
    children = _children(model)
    if _obstacle(children, x):
        return None
    conv, norm, _, _, group = children
    return functional.conv_bn_tanh_max_pool_group_norm(
        x,
        *norm.arguments(x),
        conv_weight=layers.tensor_of(conv, "weight"),
        conv_bias=layers.tensor_of(conv, "bias"),
        padding=conv.padding,
        num_groups=group.num_groups,
        group_weight=layers.tensor_of(group, "weight"),
        group_bias=layers.tensor_of(group, "bias"),
        group_eps=group.eps,
        num_batches_tracked=norm.counter(),
        numerics=conv.numerics,
        required=False,
    )


def _children(model):
    """The operators' modules; getattr, which looks in three places, takes ten times as long."""
    return [model._modules.get(name) for name in OPERATORS]


def _operators(replace) -> tuple[str, ...]:
    names = OPERATORS if replace == "all" else (replace,) if isinstance(replace, str) else tuple(replace)
    unknown = [name for name in names if name not in OPERATORS]
    if unknown:
        raise ValueError(f'replace takes "all" or names out of {", ".join(OPERATORS)}; received {unknown}')
    return tuple(name for name in OPERATORS if name in names)


def _fusible(module, kind) -> bool:
    """Whether calling `module` does what its class says and nothing else, so that a fused kernel may stand for it."""
    if type(module) is not kind or kind.forward is not _FORWARDS[kind] or kind.__call__ is not _CALL:
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


def _place(model, device) -> None:
    if device is None and torch.get_default_device().type == "cpu":
        device = default_device()
    if device is not None:
        model.to(device)
