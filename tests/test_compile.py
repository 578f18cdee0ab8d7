"""torch.compile with nothing left out of the graph: results equal eager's, bit for bit, and so do buffers."""

import contextlib
import copy

import pytest
import torch
from test_registration import FUSED, NETWORKS, step
from torch import nn
from torch._dynamo import compiled_autograd

from modelnew import ModelNew, functional, layers, numerics

pytestmark = pytest.mark.filterwarnings("ignore")

LAYERS = {
    "Tanh": layers.Tanh,
    "LeakyReLU": lambda: layers.LeakyReLU(0.2),
    "MaxPool2d": lambda: layers.MaxPool2d(3, 2, 1),
    "ConvTranspose2d": lambda: layers.ConvTranspose2d(16, 8, 3, 2),
    "BatchNorm2d": lambda: layers.BatchNorm2d(16),
    "BatchNorm2d, no statistics kept": lambda: layers.BatchNorm2d(16, affine=False, track_running_stats=False),
    "GroupNorm": lambda: layers.GroupNorm(4, 16),
    "partly replaced": lambda: ModelNew(*FUSED, replace=("batch_norm", "tanh", "max_pool"), device="cpu"),
}


@pytest.fixture(autouse=True)
def fresh_compiler(one_thread):
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def compiled(model, backend="aot_eager", **options):
    """A copy of the model, and the same compiled."""
    model = copy.deepcopy(model)
    return model, torch.compile(model, backend=backend, fullgraph=True, **options)


def same(model, other, call, x):
    """Whether a training step and an evaluation of both agree, with all buffers, to the last bit."""
    for training in (True, False):
        model.train(training), other.train(training)
        assert all(map(torch.equal, step(model, x), step(call, x)))
        with torch.no_grad():
            y, expected = call(x), model(x)
        assert torch.equal(y, expected)
        assert y.stride() == expected.stride()
        assert all(map(torch.equal, model.buffers(), other.buffers()))


@pytest.mark.parametrize("name", {**LAYERS, **NETWORKS})
def test_a_network_is_one_graph(name):
    """For batches of several sizes: from the second size on the number of images is a symbol."""
    model = {**LAYERS, **NETWORKS}[name]()
    other, call = compiled(model)
    for images in (2, 3):
        same(model, other, call, torch.randn(images, 16, 6, 6))


@pytest.mark.parametrize("name", ["layers", "ModelNew"])
def test_channels_last(name):
    model = NETWORKS[name]().to(memory_format=torch.channels_last)
    other, call = compiled(model)
    same(model, other, call, torch.randn(2, 16, 6, 6).contiguous(memory_format=torch.channels_last))


@pytest.mark.parametrize("name", ["layers", "ModelNew"])
def test_inductor(name, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))  # torch does not see that operators changed
    model = NETWORKS[name]()
    other, call = compiled(model, "inductor", dynamic=name == "ModelNew")
    same(model, other, call, torch.randn(3, 16, 6, 6))


@pytest.mark.parametrize("name", {**LAYERS, **NETWORKS})
def test_compiled_autograd(name):
    """It traces the backwards of eager calls, too. From the third call on they are replays."""
    model = {**LAYERS, **NETWORKS}[name]()
    other, x = copy.deepcopy(model), torch.randn(2, 16, 6, 6)
    for _ in range(4):
        with compiled_autograd._enable(torch.compile(backend="aot_eager")):
            found = step(model, x)
        assert all(map(torch.equal, found, step(other, x)))


def test_one_image():
    model = ModelNew(*FUSED, numerics="fp32", device="cpu")
    other, call = compiled(model)
    same(model, other, call, torch.randn(1, 16, 6, 6))


def test_autocast():
    model = ModelNew(*FUSED, device="cpu")
    other, call = compiled(model)
    with torch.autocast("cpu", torch.bfloat16):
        same(model, other, call, torch.randn(2, 16, 6, 6))
        assert call(torch.randn(2, 16, 6, 6)).dtype == torch.bfloat16


def test_float64():
    model = ModelNew(*FUSED, device="cpu").double()
    other, call = compiled(model)
    same(model, other, call, torch.randn(2, 16, 6, 6, dtype=torch.float64))


def test_nothing_is_compiled_again_for_equal_shapes():
    model = ModelNew(*FUSED, numerics="fp32", device="cpu")
    graphs = []

    def backend(graph, example_inputs):
        graphs.append(graph)
        return graph

    call = torch.compile(model, backend=backend, fullgraph=True)
    for _ in range(4):
        step(call, torch.randn(2, 16, 6, 6))
    (graph,) = graphs
    assert ["modelnew" in str(node.target) for node in graph.graph.nodes if node.op == "call_function"] == [True]
    assert model.batch_norm.num_batches_tracked == 4


def test_a_hook_is_called_and_its_layer_not_fused():
    model, shapes = ModelNew(*FUSED, numerics="fp32", device="cpu"), []
    other, call = compiled(model)
    for m in (model, other):
        m.tanh.register_forward_hook(lambda module, inputs, output: output * 0.5)
        shapes.append(m)
    same(model, other, call, torch.randn(2, 16, 6, 6))


def test_functions():
    def network(x, weight, mean, var):
        y = functional.batch_norm_tanh(functional.conv_transpose2d(x, weight, stride=2), mean, var, training=True)
        y, indices = functional.max_pool2d(y, 2, return_indices=True)
        return functional.group_norm(functional.leaky_relu(y), 2), indices

    x, weight = torch.randn(2, 4, 5, 5), torch.randn(4, 6, 3, 3)
    results = []
    for call in (network, torch.compile(network, backend="aot_eager", fullgraph=True)):
        buffers = torch.zeros(6), torch.ones(6)
        results.append((*call(x, weight, *buffers), *buffers))
    assert all(map(torch.equal, *results))


def test_a_refused_call_says_why():
    call = torch.compile(functional.max_pool2d, backend="aot_eager", fullgraph=True)
    with pytest.raises(Exception, match="padding must be at least 0 and at most half of kernel_size"):
        call(torch.randn(1, 4, 5, 5), 2, padding=2)
    fused = torch.compile(functional.conv_bn_tanh_max_pool_group_norm, backend="aot_eager", fullgraph=True)
    x, weight = torch.randn(1, 4, 5, 5).double(), torch.randn(4, 6, 3, 3).double()
    with pytest.raises(Exception, match="the input is float64"):
        fused(x, None, None, training=True, conv_weight=weight, num_groups=2)


def test_compiled_in_part():
    """A graph may end before an operator of ours and go on behind it."""

    class Network(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.tanh = layers.BatchNorm2d(16), layers.Tanh()

        def forward(self, x):
            x = self.norm(x)
            torch._dynamo.graph_break()
            return self.tanh(x)

    model = Network()
    other = copy.deepcopy(model)
    same(model, other, torch.compile(other, backend="aot_eager"), torch.randn(2, 16, 6, 6))


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("name", NETWORKS)
def test_the_graph_contains_the_numerics(name, autocast, device):
    """torch's caches must not take a graph with other numerics, also under autocast."""
    model, graphs = NETWORKS[name]().to(device), []

    def backend(graph, example_inputs):
        graphs.append(str(graph.graph))
        return graph

    other = not numerics.uses_wgmma(torch.device(device))
    settings = [contextlib.nullcontext, numerics.without_tensor_cores, numerics.as_sm75]
    with numerics.wgmma(other):
        if numerics.uses_wgmma(torch.device(device)) == other:  # not so on a GPU that has none
            settings.append(lambda: numerics.wgmma(other))
    with torch.no_grad(), torch.autocast(device, torch.bfloat16, enabled=autocast):
        for setting in settings:
            torch._dynamo.reset()
            with setting():
                torch.compile(model, backend=backend, fullgraph=True)(torch.randn(2, 16, 6, 6, device=device))
    assert len(set(graphs)) == len(settings)
