"""Private functions of torch that save time at every call, each with a public fallback that must agree with it.

The fallback is used if a version of torch lacks the private function.
"""

from collections.abc import Callable

import torch
from torch.nn.modules import module

try:
    from torch._C._dynamo import guards
except ImportError:
    guards = None


_KINDS_OF_HOOKS = ("forward", "forward_pre", "backward", "backward_pre")


class Public:
    """The functions of this module by torch's public functions."""

    @staticmethod
    def current_device() -> int:
        """Index of the current GPU."""
        return torch.cuda.current_device()

    @staticmethod
    def raw_stream(index: int) -> int:
        """Handle of the current stream of a GPU."""
        return torch.cuda.current_stream(index).cuda_stream

    @staticmethod
    def allows_tf32() -> bool:
        """Whether cuDNN's convolutions may use TF32."""
        if hasattr(torch.backends.cudnn, "conv"):  # since torch 2.9, where reading allow_tf32 may raise RuntimeError
            return torch.backends.cudnn.conv.fp32_precision == "tf32"
        return torch.backends.cudnn.allow_tf32

    @staticmethod
    def any_autocast() -> bool:
        """Whether autocast is on for some type of device."""
        return torch.is_autocast_enabled("cpu") or torch.is_autocast_enabled("cuda")

    @staticmethod
    def any_global_hook() -> bool:
        """Whether there are hooks for all modules."""
        return any(getattr(module, f"_global_{kind}_hooks") for kind in _KINDS_OF_HOOKS)

    @staticmethod
    def guard_of(tensors: list[torch.Tensor]) -> Callable | None:
        """guard(*others): whether tensors are of the same kinds as `tensors`. None if torch cannot tell.

        The kind is type, dtype, device, shape, strides, requires_grad, and the dispatch keys.
        """
        return None

    @staticmethod
    def allocator(device: torch.device) -> Callable:
        """allocate(shape, strides, dtype) on the device, which must be current when it is called."""
        return lambda shape, strides, dtype: torch.empty_strided(shape, strides, dtype=dtype, device=device)

    @staticmethod
    def apply(function: type[torch.autograd.Function], *args):
        """function.apply(*args), for a call outside the transforms of torch.func."""
        return function.apply(*args)


current_device = getattr(torch._C, "_cuda_getDevice", Public.current_device)
raw_stream = getattr(torch._C, "_cuda_getCurrentRawStream", Public.raw_stream)
any_autocast = getattr(torch._C, "_is_any_autocast_enabled", Public.any_autocast)
any_global_hook = getattr(module, "_has_any_global_hook", Public.any_global_hook)
_precision = getattr(torch._C, "_get_fp32_precision_getter", None)


def allows_tf32() -> bool:
    """See Public.allows_tf32."""
    return _precision("cuda", "conv") == "tf32" if _precision else Public.allows_tf32()


def apply(function: type[torch.autograd.Function], *args):
    """See Public.apply. The remaining code of `Function.apply` is for torch.func."""
    return super(torch.autograd.Function, function).apply(*args)


def guard_of(tensors: list[torch.Tensor]) -> Callable | None:
    """See Public.guard_of."""
    if not hasattr(guards, "TensorGuards"):
        return Public.guard_of(tensors)
    return guards.TensorGuards(*tensors, dynamic_dims_sizes=None, dynamic_dims_strides=None).check


def allocator(device: torch.device) -> Callable:
    """See Public.allocator. The private functions take half the time, and do not fill memory for debugging."""
    return getattr(guards, f"_empty_strided_{device.type}", None) or Public.allocator(device)
