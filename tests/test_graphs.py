"""modelnew.graphed: a module by CUDA graphs."""

import copy

import pytest
import torch
from test_registration import FUSED, NETWORKS
from torch import nn

import modelnew
from modelnew import ModelNew, graphs, layers


def on_gpu(test):
    return pytest.mark.gpu(pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")(test))


def gradients(model, call, x):
    leaf = x.clone().requires_grad_()
    y = call(leaf)
    return y.detach().clone(), *torch.autograd.grad(y.square().sum(), [leaf, *model.parameters()])


@on_gpu
@pytest.mark.parametrize("captured", [False, True])
def test_kernels_wait_for_other_streams(captured):
    """A kernel that may start while the one before it ends comes behind two streams, of which the other is slower."""
    slow, x = torch.rand(2048, 2048, device="cuda") / 1024, torch.randn(2, 16, 64, 64, device="cuda")
    tanh, side, y = layers.Tanh(), torch.cuda.Stream(), torch.zeros_like(x)

    def work():
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            product = slow
            for _ in range(20):
                product = product @ slow
            y.copy_(x + product[0, 0])
        first = tanh(x)
        torch.cuda.current_stream().wait_stream(side)
        return first, tanh(y), product

    work()
    y.zero_()
    torch.cuda.synchronize()
    if captured:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            first, second, product = work()
        graph.replay()
    else:
        first, second, product = work()
    torch.testing.assert_close(first, x.tanh())
    torch.testing.assert_close(second, (x + product[0, 0]).tanh())


@on_gpu
@pytest.mark.parametrize("name", NETWORKS)
def test_training(name):
    """Steps, bit for bit as without a graph; making the graph changes no buffer and no gradient."""
    model = NETWORKS[name]().to("cuda")
    expected, example = copy.deepcopy(model), torch.randn(2, 16, 6, 6, device="cuda", requires_grad=True)
    before = example.detach().clone()
    call = modelnew.graphed(model, example)
    assert all(map(torch.equal, model.buffers(), expected.buffers()))
    assert all(p.grad is None for p in model.parameters())
    optimizers = [torch.optim.SGD(m.parameters(), 0.1) for m in (model, expected)]
    for _ in range(3):
        x = torch.randn(2, 16, 6, 6, device="cuda")
        found, wanted = gradients(model, call, x), gradients(expected, expected, x)
        assert all(map(torch.equal, found, wanted))
        assert all(map(torch.equal, model.buffers(), expected.buffers()))
        for m, (_, _, *of_parameters), optimizer in zip((model, expected), (found, wanted), optimizers):
            for p, gradient in zip(m.parameters(), of_parameters):
                p.grad = gradient.clone()
            optimizer.step()
    assert torch.equal(example, before)


@on_gpu
@pytest.mark.parametrize("training", [False, True], ids=["eval", "training"])
@pytest.mark.parametrize("name", NETWORKS)
def test_inference(name, training):
    model = NETWORKS[name]().to("cuda").train(training)
    expected = copy.deepcopy(model)
    with torch.no_grad():
        call = modelnew.graphed(model, torch.randn(2, 16, 6, 6, device="cuda"))
        assert all(map(torch.equal, model.buffers(), expected.buffers()))
        for _ in range(3):
            x = torch.randn(2, 16, 6, 6, device="cuda")
            assert torch.equal(call(x), expected(x))
            assert all(map(torch.equal, model.buffers(), expected.buffers()))
    with pytest.raises(RuntimeError, match=r"made without gradients.*no_grad"):
        call(x)


@on_gpu
def test_other_calls_are_refused():
    model = ModelNew(*FUSED, device="cuda")
    x = torch.randn(2, 16, 6, 6, device="cuda")
    call = modelnew.graphed(model, x)
    with pytest.raises(ValueError, match=r"made for torch\.float32 of shape \(2, 16, 6, 6\).*\(1, 16, 6, 6\)"):
        call(x[:1])
    with pytest.raises(ValueError, match="requires no gradient"):
        call(x.clone().requires_grad_())
    with pytest.raises(ValueError, match="made for 1 tensors, received 2"):
        call(x, x)
    model.eval()
    with pytest.raises(RuntimeError, match=r"another mode \(train or eval\)"):
        call(x)


@on_gpu
def test_torchs_own_function():
    model = ModelNew(*FUSED, device="cuda")
    expected = copy.deepcopy(model)
    x = torch.randn(2, 16, 6, 6, device="cuda")
    call = torch.cuda.make_graphed_callables(model, (x.clone(),))
    expected.load_state_dict(model.state_dict())  # its warm-up changes the statistics
    assert torch.equal(call(x), expected(x))
    assert all(map(torch.equal, model.buffers(), expected.buffers()))


def test_a_cpu_is_refused():
    model = ModelNew(*FUSED, device="cpu")
    with pytest.raises(RuntimeError, match=r"on one CUDA GPU, received cpu; use \.to\('cuda'\)"):
        modelnew.graphed(model, torch.randn(2, 16, 6, 6))
    with pytest.raises(TypeError, match="takes tensors as an example, received list"):
        modelnew.graphed(model, [1.0])
    with pytest.raises(TypeError, match="received none"):
        modelnew.graphed(model)
    with pytest.raises(TypeError, match=r"takes a torch\.nn\.Module, received builtin_function_or_method"):
        modelnew.graphed(torch.tanh, torch.randn(2))


@on_gpu
def test_what_a_graph_would_leave_out_is_refused():
    x = torch.randn(2, 16, 6, 6, device="cuda")
    hooked = nn.Sequential(layers.Tanh())
    hooked[0].register_forward_hook(lambda *args: None)
    with pytest.raises(ValueError, match="0 has hooks"):
        modelnew.graphed(hooked, x)
    averaging = nn.Sequential(layers.BatchNorm2d(16, momentum=None)).to("cuda")
    with pytest.raises(ValueError, match="0 has momentum=None"):
        modelnew.graphed(averaging, x)
    modelnew.graphed(averaging.eval(), x)


@pytest.mark.parametrize("differentiable", [False, True])
def test_state_is_put_back(monkeypatch, differentiable):
    """On a CPU, with functions of torch's that capture nothing: a warm-up, then a plain call."""

    def pretend(module, example, *_):
        for _ in range(3):
            module(*example)
        return module

    monkeypatch.setattr(graphs, "_check", lambda *args: None)
    monkeypatch.setattr(torch.cuda, "make_graphed_callables", pretend)
    monkeypatch.setattr(graphs, "_forward_graph", pretend)
    model = ModelNew(*FUSED, numerics="fp32", device="cpu")
    expected, x = copy.deepcopy(model), torch.randn(2, 16, 6, 6)
    with torch.set_grad_enabled(differentiable):
        call = modelnew.graphed(model, x)
        assert all(map(torch.equal, model.buffers(), expected.buffers()))
        assert torch.equal(call(x), expected(x))
        assert all(map(torch.equal, model.buffers(), expected.buffers()))
        with pytest.raises(ValueError, match="made for"):
            call(x[:1])
        model.batch_norm.eval()
        with pytest.raises(RuntimeError, match="another mode"):
            call(x)
