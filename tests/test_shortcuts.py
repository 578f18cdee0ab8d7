"""Private functions of torch agree with the public ones that they stand for."""

import pytest
import torch
from torch import nn

from modelnew import shortcuts
from modelnew.shortcuts import Public


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_device_and_stream():
    for stream in (torch.cuda.default_stream(), torch.cuda.Stream()):
        with torch.cuda.stream(stream):
            index = shortcuts.current_device()
            assert index == Public.current_device()
            assert shortcuts.raw_stream(index) == Public.raw_stream(index) == stream.cuda_stream


@pytest.mark.parametrize("allowed", [False, True])
def test_tf32(monkeypatch, allowed):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", allowed)
    assert shortcuts.allows_tf32() == Public.allows_tf32() == allowed


@pytest.mark.skipif(not hasattr(torch.backends.cudnn, "conv"), reason="torch has allow_tf32 only")
@pytest.mark.parametrize("setting", ["ieee", "tf32"])
def test_tf32_by_the_newer_setting(monkeypatch, setting):
    """It may differ between convolutions and RNNs. Then torch raises an error where allow_tf32 is read."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", setting == "ieee")  # which sets all when it is set back
    torch.backends.cudnn.conv.fp32_precision = setting
    assert shortcuts.allows_tf32() == Public.allows_tf32() == (setting == "tf32")
    with pytest.raises(RuntimeError, match="allow_tf32"):
        torch.backends.cudnn.allow_tf32  # noqa: B018


def test_autocast():
    for device in ("cpu", "cuda"):
        with torch.autocast(device, torch.bfloat16):
            assert shortcuts.any_autocast() == Public.any_autocast() == torch.is_autocast_enabled(device)
    assert shortcuts.any_autocast() == Public.any_autocast() is False


def test_any_global_hook():
    register = torch.nn.modules.module
    for kind in ("forward_hook", "forward_pre_hook", "full_backward_hook", "full_backward_pre_hook"):
        hook = getattr(register, f"register_module_{kind}")(lambda *_: None)
        assert bool(shortcuts.any_global_hook()) is Public.any_global_hook() is True, kind
        hook.remove()
        assert bool(shortcuts.any_global_hook()) is Public.any_global_hook() is False, kind


def test_allocator(device):
    for allocator in (shortcuts.allocator, Public.allocator):
        found = allocator(torch.device(device))((2, 3), (1, 2), torch.float16)
        assert (found.shape, found.stride(), found.dtype, found.device.type) == ((2, 3), (1, 2), torch.float16, device)


def test_guard():
    """It tells what may change how a call runs; without torch's own, nothing can, and no call is repeated."""
    x = torch.randn(2, 4)
    guard = shortcuts.guard_of([x])
    assert Public.guard_of([x]) is None
    assert guard(torch.randn(2, 4))
    others = (x.double(), x.T, x[:1], x.clone().requires_grad_(), nn.Parameter(x), torch._neg_view(x), x.to("meta"))
    assert not any(map(guard, others))
    with torch.inference_mode():
        assert not guard(x)
    with torch.autocast("cpu"):
        assert not guard(x)


def test_apply():
    class Scale(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, factor):
            ctx.factor = factor
            return x * factor

        @staticmethod
        def backward(ctx, dy):
            return dy * ctx.factor, None

    for apply in (shortcuts.apply, Public.apply):
        x = torch.ones(3, requires_grad=True)
        y = apply(Scale, x, 4)
        y.sum().backward()
        assert y.tolist() == x.grad.tolist() == [4.0] * 3
