"""Private functions of torch agree with the public ones that they stand for."""

import pytest
import torch

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
