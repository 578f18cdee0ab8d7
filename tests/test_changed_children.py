"""ModelNew fuses its children only as long as they are what they were: hooks, other classes, new forwards."""

import pytest
import torch
from test_model import FUSED, SMALL, small_pair
from torch.nn.utils import parametrize, prune

from modelnew import Model, ModelNew, explain
from modelnew.model import OPERATORS


@pytest.mark.parametrize("child", ["batch_norm", "tanh", "max_pool"])
def test_a_hook_or_a_swapped_child_is_honoured(device, child):
    model, model_new, x = small_pair(device)
    seen = []
    for m in (model, model_new):
        getattr(m, child).register_forward_hook(lambda module, inputs, output: seen.append(output) or output / 2)
    torch.testing.assert_close(model_new(x), model(x))
    torch.testing.assert_close(*seen)
    for m in (model, model_new):
        setattr(m, child, torch.nn.Softsign())
    torch.testing.assert_close(model_new(x), model(x))


def halved(forward):
    return lambda *args: forward(*args) / 2


def replace_forward(monkeypatch, child):
    monkeypatch.setattr(child, "forward", halved(child.forward))


def replace_forward_of_the_class(monkeypatch, child):
    monkeypatch.setattr(type(child), "forward", halved(type(child).forward))


def replace_call_of_the_class(monkeypatch, child):
    monkeypatch.setattr(type(child), "__call__", halved(type(child).__call__))


def compile_halved(monkeypatch, child):
    child._compiled_call_impl = halved(child._call_impl)  # where child.compile() puts what a backend made of it


def parametrise(monkeypatch, child):
    class Halved(torch.nn.Module):
        def forward(self, parameter):
            return parameter / 2

    for name in ("weight", "bias"):
        parametrize.register_parametrization(child, name, Halved())


def hook_of_the_output(monkeypatch, child):
    child.register_forward_hook(lambda module, inputs, output: output / 2)


def hook_with_keywords_always_called(monkeypatch, child):
    child.register_forward_hook(lambda module, inputs, options, y: y / 2, with_kwargs=True, always_call=True)


def hook_of_the_input(monkeypatch, child):
    child.register_forward_pre_hook(lambda module, inputs: (inputs[0] / 2,))


def hook_of_the_gradient(monkeypatch, child):
    child.register_full_backward_hook(lambda module, grad_input, grad_output: (grad_input[0] / 2,))


def hook_of_the_output_gradient(monkeypatch, child):
    child.register_full_backward_pre_hook(lambda module, grad_output: (grad_output[0] / 2,))


CHANGES = [
    replace_forward,
    replace_forward_of_the_class,
    replace_call_of_the_class,
    compile_halved,
    hook_of_the_output,
    hook_with_keywords_always_called,
    hook_of_the_input,
    hook_of_the_gradient,
    hook_of_the_output_gradient,
]


def expect_changed(monkeypatch, init, device, name, change):
    """The change of a child shows in ModelNew's output and gradients as it does in Model's."""
    model, model_new = Model(*init, device=device), ModelNew(*init, numerics="fp32", device=device)
    model_new.load_state_dict(model.state_dict())
    x, results = torch.randn(2, init[0], 6, 6, device=device), []
    for m in (model_new, model):  # so that ours does not inherit what is done to torch's classes
        change(monkeypatch, getattr(m, name))
        leaf = x.clone().requires_grad_()
        y = m(leaf)
        gradients = torch.autograd.grad(y.square().sum(), [leaf, *m.parameters()])
        results.append([y, *gradients[:1], *gradients[-2:]])
    assert not explain(model_new, x).startswith("fused")
    for actual, expected in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("init", [SMALL, FUSED], ids=["parts", "whole"])
@pytest.mark.parametrize("name", OPERATORS)
@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_a_changed_child_is_not_fused(monkeypatch, device, change, name, init):
    assert explain(ModelNew(*FUSED, device=device), torch.randn(2, 16, 6, 6, device=device)).startswith("fused")
    expect_changed(monkeypatch, init, device, name, change)


@pytest.mark.parametrize("init", [SMALL, FUSED], ids=["parts", "whole"])
@pytest.mark.parametrize("name", ["conv_transpose", "batch_norm", "group_norm"])
def test_a_parametrised_child_is_not_fused(monkeypatch, device, name, init):
    expect_changed(monkeypatch, init, device, name, parametrise)


@pytest.mark.parametrize("init", [SMALL, FUSED], ids=["parts", "whole"])
@pytest.mark.parametrize("kind", ["forward_pre_hook", "forward_hook", "full_backward_hook", "full_backward_pre_hook"])
def test_hooks_for_all_modules_see_each_child(device, kind, init):
    model_new = ModelNew(*init, device=device)
    x, seen = torch.randn(2, init[0], 6, 6, device=device, requires_grad=True), []
    register = getattr(torch.nn.modules.module, f"register_module_{kind}")
    handle = register(lambda module, *_: seen.append(module))
    try:
        model_new(x).sum().backward()
        assert "there are hooks for all modules" in explain(model_new, x)
    finally:
        handle.remove()
    assert set(model_new.children()) <= set(seen)
    assert "hooks for all modules" not in explain(model_new, x)


def test_pruning_a_fused_child(device):
    model, model_new, x = small_pair(device)
    for m in (model, model_new):
        prune.l1_unstructured(m.batch_norm, "weight", amount=3)
    torch.testing.assert_close(model_new(x), model(x))
