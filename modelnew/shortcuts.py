"""Private functions of torch that save time at every call. Each has a public one beside it, which it must agree with.

Where a version of torch lacks the private one, the public one takes its place.
"""

import torch


class Public:
    """What the functions of this module do, by torch's public functions."""

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
        """Whether cuDNN's convolutions may multiply in TF32."""
        return torch.backends.cudnn.allow_tf32

    @staticmethod
    def apply(function: type[torch.autograd.Function], *args):
        """function.apply(*args), for a call that is not inside a transform of torch.func."""
        return function.apply(*args)


current_device = getattr(torch._C, "_cuda_getDevice", Public.current_device)
raw_stream = getattr(torch._C, "_cuda_getCurrentRawStream", Public.raw_stream)
allows_tf32 = getattr(torch._C, "_get_cudnn_allow_tf32", Public.allows_tf32)


def apply(function: type[torch.autograd.Function], *args):
    """See Public.apply. The rest of `Function.apply` serves torch.func."""
    return super(torch.autograd.Function, function).apply(*args)
