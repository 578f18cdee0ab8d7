"""Tools of torch's that look for its layer classes treat ours alike; so do those that record operators."""

import copy
import pickle
import re

import numpy as np
import pytest
import torch
import torch.func
from test_model import small_pair
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils import fusion, parametrizations, prune, spectral_norm, weight_norm
from torch.optim import swa_utils
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts
from torch.utils.flop_counter import FlopCounterMode

from modelnew import ModelNew, convert_sync_batchnorm, functional, layers

FUSED = (16, 32, 3, 1, 1, 1, 4)  # a model that the fused kernels take


def conv(library, device):
    torch.manual_seed(4)
    return library.ConvTranspose2d(4, 6, 3, stride=2, padding=1, device=device)


def same_state(ours, theirs):
    ours, theirs = ours.state_dict(), theirs.state_dict()
    assert list(ours) == list(theirs)
    for key, value in theirs.items():
        torch.testing.assert_close(ours[key], value, msg=lambda text, key=key: f"{key}: {text}")


def singular_value(weight):
    """The largest one of a ConvTranspose2d's weight as a matrix, a row for each output channel."""
    return torch.linalg.matrix_norm(weight.detach().transpose(0, 1).flatten(1), 2)


REPARAMETRISED = {
    "spectral_norm": lambda module: spectral_norm(module, n_power_iterations=30),
    "parametrizations.spectral_norm": lambda module: parametrizations.spectral_norm(module, n_power_iterations=30),
    "weight_norm": weight_norm,
    "parametrizations.weight_norm": parametrizations.weight_norm,
    "orthogonal": parametrizations.orthogonal,
    "prune": lambda module: prune.ln_structured(module, "weight", amount=1, n=2, dim=1),
}


@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
@pytest.mark.parametrize("tool", REPARAMETRISED)
def test_reparametrised_weight(device, tool):
    ours, theirs = conv(layers, device).double(), conv(nn, device).double()
    model, model_new, batch = small_pair(device)
    model.double(), model_new.double()
    pairs = [(ours, theirs, ours, theirs, torch.randn(2, 4, 5, 4, device=device).double())]
    pairs.append((model_new, model, model_new.conv_transpose, model.conv_transpose, batch.double()))
    for new, reference, layer, expected, x in pairs:
        for module in (layer, expected):
            torch.manual_seed(5)
            REPARAMETRISED[tool](module)
        for _ in range(2):
            y, y_expected = new(x), reference(x)
        torch.testing.assert_close(y, y_expected, rtol=1e-4, atol=1e-5)
        same_state(new, reference)
        if "spectral" in tool:
            torch.testing.assert_close(singular_value(layer.weight).cpu().float(), torch.tensor(1.0), rtol=1e-2, atol=0)
        y.sum().backward(), y_expected.sum().backward()
        for (name, p), q in zip(layer.named_parameters(), expected.parameters()):
            torch.testing.assert_close(p.grad, q.grad, rtol=1e-3, atol=1e-3, msg=name)


def test_update_bn_and_averaged_model(device):
    model, model_new, _ = small_pair(device)
    batches = [2 * torch.randn(2, 4, 6, 6, device=device) + i for i in range(3)]
    averaged = []
    for module in (model_new, model):
        average = swa_utils.AveragedModel(module)
        average.update_parameters(module)
        with torch.no_grad():
            for p in module.parameters():
                p.mul_(1.5)
        average.update_parameters(module)
        swa_utils.update_bn(batches, average)
        averaged.append(average)
    same_state(*averaged)
    assert averaged[0].module.batch_norm.num_batches_tracked == 3
    torch.testing.assert_close(averaged[0].eval()(batches[0]), averaged[1].eval()(batches[0]))


def test_loops_over_classes():
    """As written for freezing, for groups of weight decay, and for initialisation."""
    model, model_new, _ = small_pair("cpu")
    found = []
    for m in (model_new, model):
        frozen = [name for name, child in m.named_modules() if isinstance(child, _BatchNorm)]
        norms = [name for name, child in m.named_modules() if isinstance(child, (nn.BatchNorm2d, nn.GroupNorm))]
        drawn = [name for name, child in m.named_modules() if isinstance(child, nn.ConvTranspose2d)]
        found.append((frozen, norms, drawn))
    assert found[0] == found[1] == (["batch_norm"], ["batch_norm", "group_norm"], ["conv_transpose"])
    for name in layers.__all__:
        assert issubclass(getattr(layers, name), getattr(nn, name))


def test_construction_without_initialisation():
    layer = nn.utils.skip_init(layers.ConvTranspose2d, 4, 6, 3, bias=False)
    assert type(layer) is layers.ConvTranspose2d
    assert layer.weight.shape == (4, 6, 3, 3)
    assert layer.numerics == "auto"


def test_batch_norm_for_functional_transforms(device):
    model, model_new, x = small_pair(device)
    for m in (model, model_new):
        torch.func.replace_all_batch_norm_modules_(m)
        assert not list(m.buffers())
    torch.testing.assert_close(model_new(x), model(x))
    torch.testing.assert_close(model_new.eval()(x), model.eval()(x))


def test_weights_in_channels_last(device):
    layer = conv(layers, device)
    x = torch.randn(2, 4, 5, 4, device=device)
    y = layer(x)
    layer = nn.utils.convert_conv2d_weight_memory_format(layer, torch.channels_last)
    assert layer.weight.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(layer(x), y)


def test_folding_batch_norm_into_the_convolution(device):
    model, model_new, x = small_pair(device)
    model.eval(), model_new.eval()
    folded = fusion.fuse_conv_bn_eval(model_new.conv_transpose, model_new.batch_norm, transpose=True)
    assert type(folded) is layers.ConvTranspose2d
    torch.testing.assert_close(folded(x), model.batch_norm(model.conv_transpose(x)), rtol=1e-4, atol=1e-5)


def test_quantization_refuses():
    """By the exact class; torch has no fused quantized layer of these in either case."""
    _, model_new, _ = small_pair("cpu")
    with pytest.raises((AssertionError, NotImplementedError), match=r"modelnew\..*ConvTranspose2d"):
        torch.ao.quantization.fuse_modules(model_new.eval(), [["conv_transpose", "batch_norm"]])


@pytest.mark.parametrize("fused", [False, True])
def test_torchs_sync_batch_norm_conversion_is_refused(fused):
    """Nothing of ours has changed then, and our converter takes the network, however far torch's came."""
    ours = ModelNew(*FUSED) if fused else nn.Sequential(layers.BatchNorm2d(3), layers.BatchNorm1d(3))
    norms = [m for m in ours.modules() if isinstance(m, _BatchNorm)]
    network = nn.Sequential(nn.BatchNorm2d(3), ours)
    with pytest.raises(RuntimeError, match=r"received a BatchNorm2d of .* call modelnew\.convert_sync_batchnorm\("):
        nn.SyncBatchNorm.convert_sync_batchnorm(network)
    assert [m for m in ours.modules() if isinstance(m, _BatchNorm)] == norms
    convert_sync_batchnorm(network)
    assert [m for m in ours.modules() if isinstance(m, _BatchNorm)] == norms
    assert all(norm.peers for norm in norms)
    assert type(network[0]) is nn.SyncBatchNorm
    with pytest.raises(RuntimeError, match=r"of modelnew\.layers"):  # a synchronised layer too
        nn.SyncBatchNorm.convert_sync_batchnorm(norms[0])


def test_qconfig_is_an_ordinary_attribute():
    """Though torch's converter is told apart by it."""
    for norm in (layers.BatchNorm2d(3), nn.BatchNorm2d(3)):
        assert not hasattr(norm, "qconfig")
        assert not hasattr(type(norm), "qconfig")
        with pytest.raises(AttributeError, match="'BatchNorm2d' object has no attribute 'qconfig'"):
            norm.qconfig  # noqa: B018
        norm.qconfig = "planned"
        assert copy.deepcopy(norm).qconfig == pickle.loads(pickle.dumps(norm)).qconfig == "planned"
        del norm.qconfig
        with pytest.raises(AttributeError):
            del norm.qconfig


def flops(call, x):
    with FlopCounterMode(display=False) as counter:
        call(x)
    return counter.get_total_flops()


def under_fake_tensors(call, x):
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        return call(mode.from_tensor(x))


class AsModule(nn.Module):
    def __init__(self, call):
        super().__init__()
        self.call = call

    def forward(self, x):
        return self.call(x)


RECORDERS = {
    "jit.trace": lambda call, x: torch.jit.trace(call, x, check_trace=False),
    "make_fx": lambda call, x: make_fx(call)(x),
    "make_fx, fake": lambda call, x: make_fx(call, tracing_mode="fake", _allow_non_fake_inputs=True)(x),
    "make_fx, before dispatch": lambda call, x: make_fx(call, pre_dispatch=True)(x),
    "export": lambda call, x: torch.export.export(AsModule(call), (x,), strict=False),
    "flops": flops,
    "fake tensors": under_fake_tensors,
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("recorder", RECORDERS)
def test_recorders_take_the_model_with_nothing_replaced(recorder):
    model, x = ModelNew(*FUSED, replace=(), device="cpu").eval(), torch.randn(2, 16, 6, 6)
    result = RECORDERS[recorder](model, x)
    if recorder == "flops":
        assert result == 2 * 2 * 6 * 6 * 16 * 32 * 9
    elif recorder == "fake tensors":
        assert result.shape == (2, 32, 3, 3)
    else:
        result = result.module() if recorder == "export" else result
        torch.testing.assert_close(result(x), model(x))


@pytest.mark.parametrize("kept", [True, False], ids=["all_kept", "none_kept"])
def test_selective_checkpointing(device, kept):
    """Its modes may see part of the operators: what they do not see is computed again."""

    def policy(context, function, *args, **options):
        change = function._schema.is_mutable  # what is changed in place later cannot be kept, in torch's layers either
        return CheckpointPolicy.MUST_SAVE if kept and not change else CheckpointPolicy.PREFER_RECOMPUTE

    _, model_new, x = small_pair(device)
    gradients = []
    for options in ({}, {"context_fn": lambda: create_selective_checkpoint_contexts(policy)}):
        leaf = x.clone().requires_grad_()
        y = checkpoint(model_new, leaf, use_reentrant=False, **options) if options else model_new(leaf)
        gradients.append(torch.autograd.grad(y.square().sum(), [leaf, *model_new.parameters()]))
    assert all(map(torch.equal, *gradients))


class Wrapped(torch.Tensor):
    """A tensor without memory of its own. Operators are given to its class, ours as torch's."""

    @staticmethod
    def __new__(cls, x):
        return torch.Tensor._make_wrapper_subclass(cls, x.shape, dtype=x.dtype, device=x.device)

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        raise AssertionError(f"{function} was called")


class Plain(torch.Tensor):
    """A subclass that changes nothing."""


class Asked(torch.Tensor):
    """A subclass with its own idea of functions."""

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        return function.__name__


UNFIT = {
    "numpy array": (lambda x: x.numpy(), TypeError, r"received a numpy\.ndarray"),
    "list": (lambda x: x.tolist(), TypeError, r"received a builtins\.list"),
    "None": (lambda x: None, TypeError, r"received a builtins\.NoneType"),
    "wrapper": (Wrapped, AssertionError, "was called"),
    "masked": (lambda x: torch.masked.masked_tensor(x, x > 0), TypeError, r"[\s\S]*MaskedTensor"),
    "sparse": (lambda x: x.to_sparse(), RuntimeError, r"sparse_coo; use \.to_dense"),
    "mkldnn": (lambda x: x.to_mkldnn(), RuntimeError, r"_mkldnn; use \.to_dense"),
    "nested": (lambda x: torch.nested.nested_tensor(list(x)), RuntimeError, "nested"),
}
WEIGHT = torch.ones(4, 2, 3, 3)
FUNCTIONS = {
    "tanh": functional.tanh,
    "max_pool2d": lambda x: functional.max_pool2d(x, 2),
    "conv_transpose2d": lambda x: functional.conv_transpose2d(x, WEIGHT),
    "batch_norm": lambda x: functional.batch_norm(x, None, None, training=True),
    "group_norm": lambda x: functional.group_norm(input=x, num_groups=2),
    "tanh_max_pool2d": lambda x: functional.tanh_max_pool2d(x, 2),
    "bn_tanh_max_pool2d": lambda x: functional.bn_tanh_max_pool2d(x, None, None, training=True),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("kind", UNFIT)
def test_what_is_no_dense_tensor_is_named(name, kind, launched):
    make, error, message = UNFIT[kind]
    with pytest.raises(error, match=f"{name}.*{message}"):
        FUNCTIONS[name](make(torch.randn(2, 4, 6, 6)))
    assert not launched


DTYPES = {
    **{str(dtype): lambda x, dtype=dtype: x.to(dtype) for dtype in (torch.int64, torch.complex64, torch.float8_e5m2)},
    "torch.quint8": lambda x: torch.quantize_per_tensor(x, 0.1, 0, torch.quint8),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_other_dtypes_are_refused(name, dtype, launched):
    with pytest.raises(TypeError, match=rf"input must be float32, .* received {re.escape(dtype)}"):
        FUNCTIONS[name](DTYPES[dtype](torch.randn(2, 4, 6, 6)))
    assert not launched


def test_other_arguments_are_named_too(launched):
    x, ones = torch.randn(2, 4, 6, 6), torch.ones(4)
    with pytest.raises(RuntimeError, match=r"batch_norm: weight .*sparse_coo"):
        functional.batch_norm(x, ones, ones.clone(), weight=ones.to_sparse(), bias=ones, training=True)
    with pytest.raises(TypeError, match=r"conv_transpose2d: bias .*ndarray"):
        functional.conv_transpose2d(x, torch.randn(4, 2, 3, 3), bias=np.ones(2, np.float32))
    assert not launched


@pytest.mark.parametrize("name", FUNCTIONS)
def test_subclasses_without_behaviour_are_kept(name):
    x = torch.randn(2, 4, 6, 6)
    expected = FUNCTIONS[name](x)
    assert type(FUNCTIONS[name](nn.Parameter(x, requires_grad=False))) is torch.Tensor
    result = FUNCTIONS[name](x.as_subclass(Plain))
    assert type(result) is Plain
    assert torch.equal(result.as_subclass(torch.Tensor), expected)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_torch_function_is_asked_first(name, launched):
    assert FUNCTIONS[name](torch.randn(2, 4, 6, 6).as_subclass(Asked)) == name
    assert not launched


class Refusing(torch.Tensor):
    """A subclass that handles no function and no attribute, as the weights of torch's per-sample gradients."""

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        raise RuntimeError(f"cannot handle {function.__name__}")


@pytest.mark.parametrize("name", FUNCTIONS)
def test_what_torch_function_refuses_keeps_its_reason(name):
    with pytest.raises(RuntimeError, match=f"cannot handle {name}"):
        FUNCTIONS[name](torch.randn(2, 4, 6, 6).as_subclass(Refusing))


def test_symbolic_trace_has_the_function_as_a_node(device):
    x = torch.randn(2, 3, 4, 4, device=device)
    for layer, function in ((layers.Tanh(), functional.tanh), (layers.MaxPool2d(2), functional.max_pool2d)):
        graph = torch.fx.symbolic_trace(layer)
        assert function in [node.target for node in graph.graph.nodes]
        assert torch.equal(graph(x), layer(x))
