"""The operators of torch.library: what tools that trace, record or export see."""

import copy
import inspect
import io

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.library import opcheck
from torch.utils.flop_counter import FlopCounterMode

from modelnew import Model, ModelNew, Sequential, functional, inline, layers
from modelnew.registration import ops, traced
from modelnew.untraced import untraced

FUSED = (16, 32, 3, 1, 1, 1, 4)  # a model that the fused kernels take
WINDOW = ((2, 2), (2, 2), (0, 0), (1, 1))
OVERLAPPING = ((3, 3), (2, 2), (1, 1), (1, 1))
GEOMETRY = ((2, 2), (1, 1), (1, 1), (1, 1), 1)


def last(x):
    return x.contiguous(memory_format=torch.channels_last)


LAYOUTS = {
    "contiguous": lambda x: x,
    "channels_last": last,
    "transposed": lambda x: x.transpose(2, 3).contiguous().transpose(2, 3),
    "with gaps": lambda x: torch.stack([x, x], -1)[..., 0],
    "channels_last, a slice of its channels": lambda x: last(torch.cat([x, x], 1))[:, : x.shape[1]],
    "expanded": lambda x: x[:1].expand_as(x),
}


def leaf(*shape):
    return torch.randn(shape).requires_grad_()


def channels(count=16):
    """running_mean, running_var, weight, bias"""
    return torch.randn(count), torch.rand(count) + 0.5, leaf(count), leaf(count)


def batch_norm(training=True):
    return *channels(), training, 0.1, 1e-5, torch.tensor(3)


def chain(padding, numerics):
    conv = leaf(16, 32, 3, 3), leaf(32), padding, "leaky_relu", 0.2
    norm = *channels(32), True, 0.1, 1e-5, torch.tensor(0)
    return *norm, *conv, 4, leaf(32), leaf(32), 1e-5, numerics


# Functions of one tensor and nothing else.
ELEMENTWISE = [
    name for name in functional.__all__ if hasattr(ops, name) and len(getattr(ops, name).default._schema.arguments) == 1
]
# Arguments after x: what makes them, as calls change buffers.
OPERATORS = {
    **{f"{name}.default": tuple for name in ELEMENTWISE},
    "leaky_relu.default": lambda: (0.1,),
    "max_pool2d.default": lambda: (*OVERLAPPING, True, True),
    "tanh_max_pool2d.default": lambda: (*OVERLAPPING, False),
    "group_norm.default": lambda: (4, leaf(16), leaf(16), 1e-5),
    "batch_norm.default": lambda: (*channels(), False, 0.1, 1e-5, None, True),
    "batch_norm.updating": lambda: (*batch_norm(), False),
    "bn_tanh_max_pool2d.default": lambda: (None, None, None, leaf(16), True, 0.1, 1e-5, None, *WINDOW, False),
    "bn_tanh_max_pool2d.updating": lambda: (*batch_norm(), *WINDOW, False),
    "conv_transpose2d.default": lambda: (leaf(16, 8, 3, 3), leaf(8), *GEOMETRY, "auto"),
    "conv_bn_activation_max_pool_group_norm.updating": lambda: chain((1, 1), "fp32"),
}


def operator(name):
    packet, overload = name.split(".")
    return getattr(getattr(ops, packet), overload)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", OPERATORS)
def test_opcheck(name, one_thread):
    """Schema, fakes, autograd and compilation with sizes that are symbols: torch's own check, the backward included."""
    for layout in ("contiguous", "channels_last"):
        x = LAYOUTS[layout](torch.randn(2, 16, 6, 6)).requires_grad_()
        opcheck(operator(name), (x, *OPERATORS[name]()))


X, Y = torch.randn(2, 16, 6, 6), torch.randn(2, 16, 3, 3)
ARGMAX, MOMENTS, ALL = torch.zeros(Y.shape, dtype=torch.uint8), torch.rand(2, 16), (True, True, True)
WEIGHT, STRIDED = torch.randn(16, 16, 4, 4), ((2, 2), (1, 1), (0, 0), (1, 1), 1)
GRADIENTS = {
    **{f"{name}_backward": (X, X) for name in ELEMENTWISE},
    "leaky_relu_backward": (X, X, 0.1),
    "max_pool2d_backward": (Y, ARGMAX, *WINDOW, X.shape, False),
    "max_pool2d_select": (X, ARGMAX, *WINDOW, False),
    "tanh_max_pool2d_backward": (Y, Y, ARGMAX, *WINDOW, X.shape),
    "group_norm_backward": (X, X, *MOMENTS, torch.rand(2, 8), 4, 1e-5, ALL),
    "batch_norm_backward": (X, X, *MOMENTS, MOMENTS, None, True, 1e-5, ALL),
    "bn_tanh_max_pool2d_backward": (Y, X, *MOMENTS, MOMENTS, Y, ARGMAX, True, *WINDOW, ALL),
    "conv_transpose2d_backward": (X, Y, WEIGHT, *STRIDED, "auto", ALL),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", GRADIENTS)
def test_opcheck_of_gradients(name, one_thread):
    opcheck(getattr(ops, name).default, GRADIENTS[name])


def test_every_function_is_registered():
    """In place of each stands one that takes the same arguments."""
    wrappers = {getattr(functional, name).__code__ for name in functional.__all__}
    assert wrappers == {untraced(functional.tanh.__wrapped__).__code__}
    assert sorted(traced) == functional.__all__
    for name, function in traced.items():
        parameters = inspect.signature(function).parameters.values()
        if any(p.kind is p.VAR_KEYWORD for p in parameters):
            continue  # it passes all on
        expected = inspect.signature(getattr(functional, name)).parameters.values()
        assert [(p.name, p.kind, p.default) for p in parameters] == [(p.name, p.kind, p.default) for p in expected]


CONV = torch.randn(16, 6, 3, 3)
RESULTS = {
    **{name: getattr(functional, name) for name in ELEMENTWISE},
    "leaky_relu": functional.leaky_relu,
    "max_pool2d": lambda x: functional.max_pool2d(x, 3, 2, 1, return_indices=True),
    "batch_norm": lambda x: functional.batch_norm(x, None, None, training=True),
    "batch_norm_tanh": lambda x: functional.batch_norm_tanh(x, None, None, training=True),
    "group_norm": lambda x: functional.group_norm(x, 4),
    "tanh_max_pool2d": lambda x: functional.tanh_max_pool2d(x, 2),
    "bn_tanh_max_pool2d": lambda x: functional.bn_tanh_max_pool2d(x, None, None, training=True),
    "conv_transpose2d": lambda x: functional.conv_transpose2d(x, CONV.to(x.device, x.dtype), stride=2),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", RESULTS)
def test_fake_and_meta_results_are_laid_out_as_real_ones(name, layout):
    x, call = LAYOUTS[layout](torch.randn(2, 16, 6, 5, dtype=torch.float64)), RESULTS[name]
    expected = call(x)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fake = call(mode.from_tensor(x))
    meta = call(torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="meta"))
    outside = call(FakeTensorMode(allow_non_fake_inputs=True).from_tensor(x))
    for found in (fake, meta, outside):
        pairs = zip(*((y,) if isinstance(y, torch.Tensor) else y for y in (found, expected)))
        for y, real in pairs:
            assert (y.shape, y.stride(), y.dtype) == (real.shape, real.stride(), real.dtype)


@pytest.mark.parametrize("shape", [(2, 16, 1, 1), (4, 1, 6, 5)], ids=str)
def test_convolution_of_one_channel_or_pixel_in_channels_last(shape):
    """Such a tensor is contiguous, too. Strides tell that it is channels_last, and PyTorch's result follows."""
    x = torch.randn(shape[0], *shape[2:], shape[1]).movedim(-1, 1)
    w = torch.randn(shape[1], 8, 4, 4)
    y = functional.conv_transpose2d(x, w)
    assert y.stride() == torch.nn.functional.conv_transpose2d(x, w).stride()
    assert y.is_contiguous(memory_format=torch.channels_last)
    with FakeTensorMode() as mode:
        fake = functional.conv_transpose2d(mode.from_tensor(x), mode.from_tensor(w))
    assert (fake.shape, fake.stride()) == (y.shape, y.stride())


def test_models_on_meta_tensors():
    for module in (ModelNew(*FUSED, device="meta"), ModelNew(16, 6, 3, 1, 1, 1, 2, device="meta")):
        y = module(torch.empty(5, 16, 6, 6, device="meta"))
        assert y.is_meta
        assert y.shape == (5, module.group_norm.num_channels, 3, 3)
    assert functional.tanh(torch.empty(0, device="meta")).is_meta
    assert functional.tanh(torch.empty(0)).device.type == "cpu"
    with pytest.raises(TypeError, match=r"input must be float32.*received torch\.int64"):
        functional.tanh(torch.zeros(3, dtype=torch.int64, device="meta"))


def flops(module, x):
    with FlopCounterMode(display=False) as counter:
        y = module(x)
        forward = counter.get_total_flops()
        y.square().sum().backward()
    return forward, counter.get_total_flops()


@pytest.mark.parametrize("init", [FUSED, (16, 6, 3, 1, 1, 1, 2), (4, 8, 3, 2, 1, 1, 2)], ids=str)
def test_flops_are_counted_as_torch_counts_its_own(init):
    x = torch.randn(2, init[0], 6, 6)
    for leaf in (x, x.clone().requires_grad_()):
        assert flops(ModelNew(*init, device="cpu"), leaf) == flops(Model(*init, device="cpu"), leaf)


def step(model, x):
    """The output, and all gradients."""
    x = x.detach().requires_grad_()
    parameters = [p for p in model.parameters() if p.requires_grad]
    y = model(x)
    return y.detach(), *torch.autograd.grad(y.square().sum(), [x, *parameters])


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("how", ["real", "fake", "symbolic", "before dispatch"])
def test_make_fx(how):
    options = {"pre_dispatch": True} if how == "before dispatch" else {"tracing_mode": how}
    model = ModelNew(*FUSED, numerics="fp32", device="cpu").eval()
    if how == "symbolic":
        model = layers.ConvTranspose2d(16, 6, 3)
    inference = how == "before dispatch"
    call = model if inference else lambda x: step(model, x)
    x, other = torch.randn(2, 16, 6, 6), torch.randn(2, 16, 6, 6)
    graph = make_fx(call, _allow_non_fake_inputs=True, **options)(x)
    expected = call(other)
    found = graph(other)
    assert all(map(torch.equal, [found] if inference else found, [expected] if inference else expected))
    assert any("modelnew" in str(node.target) for node in graph.graph.nodes)


def test_kernels_are_not_left_out_of_a_recorded_backward():
    """Its forward was not recorded: no operator stands for it."""
    x = torch.randn(5, requires_grad=True)
    y = functional.tanh(x)
    with pytest.raises(RuntimeError, match="Record the forward, too"):
        make_fx(lambda dy: torch.autograd.grad(y, x, dy))(torch.ones(5))


NETWORKS = {
    "layers": lambda: nn.Sequential(
        layers.ConvTranspose2d(16, 8, 4, 2, 1),
        layers.BatchNorm2d(8),
        layers.LeakyReLU(0.1),
        layers.MaxPool2d(3, 2, 1),
        layers.GroupNorm(2, 8),
        layers.Tanh(),
    ),
    "ModelNew": lambda: ModelNew(*FUSED, numerics="fp32", device="cpu"),
    "ModelNew, unfused": lambda: ModelNew(16, 6, 3, 1, 1, 1, 2, device="cpu"),
    "chain": lambda: Sequential(
        layers.ConvTranspose2d(16, 32, 3, padding=1, numerics="fp32"),
        layers.BatchNorm2d(32),
        layers.LeakyReLU(0.3),
        layers.MaxPool2d(2),
        layers.GroupNorm(2, 32),
        nn.Tanh(),
    ),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("training", [False, True], ids=["eval", "training"])
@pytest.mark.parametrize("name", NETWORKS)
def test_export_for_images_of_any_size(name, training, one_thread):
    """H may be less than W, though the example's is not. The sizes have no upper bound."""
    model = NETWORKS[name]().train(training)
    sizes = {axis: torch.export.Dim(axis_name, min=6) for axis, axis_name in ((2, "height"), (3, "width"))}
    exported = torch.export.export(model, (torch.randn(2, 16, 8, 7),), dynamic_shapes=(sizes,), strict=False).module()
    for shape in ((2, 16, 6, 9), (2, 16, 10, 8)):
        x = torch.randn(shape)
        assert torch.equal(exported(x), model(x))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("training", [False, True], ids=["eval", "training"])
@pytest.mark.parametrize("name", NETWORKS)
def test_export(name, training, one_thread):
    """Saved and loaded again, for any number of images, and trained."""
    model, file = NETWORKS[name]().train(training), io.BytesIO()
    batch = {"dynamic_shapes": ({0: torch.export.Dim("images", min=2)},)}
    exported = torch.export.export(model, (torch.randn(2, 16, 6, 6),), strict=False, **batch)
    torch.export.save(exported, file)
    file.seek(0)
    loaded = torch.export.load(file).module()
    names = [name for name, _ in model.named_parameters()]
    for images in (3, 5):
        x = torch.randn(images, 16, 6, 6)
        y, y_loaded = model(x), loaded(x)
        assert torch.equal(y, y_loaded)
        given = [dict(m.named_parameters()) for m in (model, loaded)]
        gradients = [
            torch.autograd.grad(y.square().sum(), [parameters[name] for name in names])
            for y, parameters in zip((y, y_loaded), given)
        ]
        assert all(map(torch.equal, *gradients))
    buffers = dict(loaded.named_buffers())
    assert all(torch.equal(buffer, buffers[name]) for name, buffer in model.named_buffers() if name in buffers)


@pytest.mark.filterwarnings("ignore")
def test_what_is_exported_decomposes():
    model = ModelNew(*FUSED, numerics="fp32", device="cpu")
    x = torch.randn(2, 16, 6, 6)
    graph = torch.export.export(model, (x,), strict=False).run_decompositions().module()
    assert torch.equal(graph(x), model(x))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["tanh", "batch_norm", "conv_transpose2d"])
def test_jit_trace_gets_an_error(name, launched):
    with pytest.raises(RuntimeError, match=rf"{name} cannot be recorded by torch\.jit\.trace.*use torch\.export"):
        torch.jit.trace(RESULTS[name], torch.randn(2, 16, 6, 6), check_trace=False)
    assert not launched


@pytest.mark.filterwarnings("ignore")
def test_jit_script_gets_an_error():
    class Calls(nn.Module):
        def forward(self, x):
            return functional.tanh(x)

    silu = inline.operator('extern "C" __global__ void silu(const float* x, float* y, i64 size) {}', "silu")
    for called in (layers.Tanh(), ModelNew(*FUSED, device="cpu"), functional.max_pool2d, Calls(), silu):
        with pytest.raises(RuntimeError, match=r"is no TorchScript: use torch\.export"):
            torch.jit.script(called)


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("traced_in_training", [True, False])
def test_symbolic_trace(name, traced_in_training):
    """Batch norms stay modules, as torch's do, so that the mode can change after the trace."""
    model, x = NETWORKS[name](), torch.randn(2, 16, 6, 6)
    traced = torch.fx.symbolic_trace(copy.deepcopy(model).train(traced_in_training))
    for training in (True, False):
        y, expected = traced.train(training)(x), model.train(training)(x)
        torch.testing.assert_close(y, expected, rtol=1e-3, atol=1e-3)
    for (key, buffer), expected in zip(traced.named_buffers(), model.buffers()):
        torch.testing.assert_close(buffer, expected, msg=lambda text, key=key: f"{key}: {text}")
