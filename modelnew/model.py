"""`Model`, the reference of KernelBench level 2 problem 11; `ModelNew`, the same on our kernels; and their inputs."""

from collections.abc import Iterable

import torch
from torch import nn

from . import functional, layers
from .fusions import plan_of, run_fused, unchanged
from .numerics import check_numerics
from .shortcuts import any_global_hook

OPERATORS = ("conv_transpose", "batch_norm", "tanh", "max_pool", "group_norm")

BATCH, CHANNELS, HEIGHT, WIDTH = 512, 64, 32, 32


def default_device() -> torch.device:
    """The default device of models and inputs: the current GPU, or the CPU if there is none."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def get_init_inputs() -> list[int]:
    """Arguments of Model and ModelNew: in_channels, out_channels, kernel_size, stride, padding, groups, num_groups."""
    return [CHANNELS, 128, 5, 1, 1, 8, 8]


def get_inputs(
    batch: int = BATCH, *, seed: int = 0, device: torch.device | str | int | None = None
) -> list[torch.Tensor]:
    """[x] with x [batch, 64, 32, 32], float32, uniform in [0, 1). The values depend only on batch and seed.

    device: by default the current GPU, or the CPU if there is none.
    """
    generator = torch.Generator().manual_seed(seed)
    x = torch.rand(batch, CHANNELS, HEIGHT, WIDTH, generator=generator, device="cpu", dtype=torch.float32)
    return [x.to(default_device() if device is None else device)]


class Model(nn.Module):
    """The reference model, made of PyTorch's modules: x [N, in_channels, H, W] -> [N, out_channels, PH, PW].

    in_channels, out_channels, kernel_size, stride, padding: of the convolution.
    groups: unused, as in KernelBench.
    num_groups: of the group norm.
    device: see ModelNew.
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
        device: torch.device | str | int | None = None,
    ):
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
    """`Model` on our kernels. Arguments, attributes, state dict, and parameters for a given seed are the same.

    Takes x [N, in_channels, H, W]; float32, float64, float16 or bfloat16, the dtype of the parameters. Returns [N,
    out_channels, PH, PW].

    in_channels, out_channels, kernel_size, stride, padding, num_groups: as in Model. `groups` is unused, as there.
    replace: "all", one name, or several names of `OPERATORS`. These operators run our kernels only; the others are
        PyTorch's modules. With {"tanh", "max_pool"}, results equal those of `Model` bit for bit on a GPU.
    numerics: precision of the convolution. "tf32": operands with 10 mantissa bits, summed in float32. "fp32": float32's
        precision. "auto": what torch.backends.cudnn.allow_tf32 says on a GPU, "fp32" on a CPU.
    device: of the parameters. By default this is the GPU if there is one, unless torch.set_default_device or a `with
        torch.device(...)` block chose another device. Parameters are initialised on the CPU, so that they equal those
        of a model that was built there and then moved.

    The model runs fused where the kernels support it; `modelnew.explain(model, x)` tells which kernels run. A child is
    called as a module, unfused, if it has a hook (pruning and weight norm add hooks), if its `forward` was replaced, or
    if it was compiled or swapped for another module. All children are called so while global module hooks are
    registered. After `modelnew.convert_sync_batchnorm` the model stays fused.

    Raises ValueError for an unknown name in replace or numerics, and TypeError if replace is neither a name nor several
    ones. A call raises the errors of the functions in `modelnew.functional`.
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
        device: torch.device | str | int | None = None,
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
        fused = run_fused(_children(self), x, parts="together")
        if fused is not None:
            return fused
        norm, tanh, pool = self.batch_norm, self.tanh, self.max_pool
        hooked = any_global_hook() or isinstance(x, torch.fx.Proxy)
        fuse_norm = not hooked and unchanged(norm, layers.BatchNorm2d)
        fuse_tanh = not hooked and unchanged(tanh, layers.Tanh)
        fuse_pool = not hooked and unchanged(pool, layers.MaxPool2d) and not pool.return_indices

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
    """How model(x) runs, and why not as one fused operator: see `fusions.plan_of`."""
    return plan_of(dict(zip(OPERATORS, _children(model))), x)


def _children(model):
    """The operators' modules. getattr searches three dicts and takes ten times as long."""
    return [*map(model._modules.get, OPERATORS)]


def _operators(replace) -> tuple[str, ...]:
    if not isinstance(replace, Iterable):
        raise TypeError(f'replace takes "all" or names out of {", ".join(OPERATORS)}; received {replace!r}')
    names = OPERATORS if replace == "all" else (replace,) if isinstance(replace, str) else tuple(replace)
    unknown = [name for name in names if name not in OPERATORS]
    if unknown:
        raise ValueError(f'replace takes "all" or names out of {", ".join(OPERATORS)}; received {unknown}')
    return tuple(name for name in OPERATORS if name in names)


def _place(model, device) -> None:
    if device is None and torch.get_default_device().type == "cpu":
        device = default_device()
    if device is not None:
        model.to(device)
