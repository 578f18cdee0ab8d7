"""The layers beside torch.nn's: construction, state, representation, refusals. The arithmetic has its own tests."""

import copy
import importlib
import inspect
import pickle

import pytest
import torch
import torch.utils.checkpoint
from tolerance import check, check_gradients

from modelnew import layers


def of(name):
    """LAYERS, [(arguments, shape of an input)], of the test with the name of the layer's file; or its LAYERS[name]."""
    file = getattr(layers, name).__module__.rpartition(".")[2]
    found = importlib.import_module(f"test_{file}").LAYERS
    return found[name] if isinstance(found, dict) else found


ALL = [(name, *layer) for name in layers.__all__ for layer in of(name)]
IDS = [f"{name}-{i}" for i, (name, _, _) in enumerate(ALL)]
CONV, NORM, POOL = ([options for options, _ in of(name)] for name in ("ConvTranspose2d", "BatchNorm2d", "MaxPool2d"))


def pair_of(name, options, device="cpu"):
    """Our layer and torch's, built from the same seed."""
    modules = []
    for library in (layers, torch.nn):
        torch.manual_seed(3)
        takes_device = "device" in inspect.signature(getattr(torch.nn, name)).parameters
        modules.append(getattr(library, name)(**options, **({"device": device} if takes_device else {})))
    return modules


@pytest.mark.parametrize(("name", "options", "shape"), ALL, ids=IDS)
def test_same_as_torch(device, name, options, shape):
    """Representation, state, and in both modes the output and every gradient."""
    ours, theirs = pair_of(name, options, device)
    assert isinstance(ours, type(theirs))
    assert repr(ours) == repr(theirs)
    states = ours.state_dict(), theirs.state_dict()
    assert list(states[0]) == list(states[1])
    assert states[0]._metadata == states[1]._metadata
    for key in states[0]:
        assert torch.equal(states[0][key], states[1][key]), key
    assert [n for n, _ in ours.named_parameters()] == [n for n, _ in theirs.named_parameters()]

    names, parameters = [n for n, _ in ours.named_parameters()], list(ours.parameters())

    def call(module, x, *parameters):
        module = copy.deepcopy(module).to(x.dtype)  # the truth runs in float64
        return torch.func.functional_call(module, dict(zip(names, parameters)), (x,))

    for training in (True, False):
        ours.train(training), theirs.train(training)
        x = torch.randn(shape, device=device, dtype=options.get("dtype", torch.float32)).requires_grad_()
        check_gradients(lambda *a: call(ours, *a), lambda *a: call(theirs, *a), [x, *parameters])


@pytest.mark.parametrize(("name", "options", "shape"), ALL, ids=IDS)
def test_state_dict_round_trip_copy_and_pickle(name, options, shape):
    ours, theirs = pair_of(name, options)
    for tensor in [*ours.parameters(), *ours.buffers()]:
        tensor.data = (3 * torch.rand(tensor.shape)).to(tensor.dtype)
    theirs.load_state_dict(ours.state_dict(), strict=True)
    back, _ = pair_of(name, options)
    back.load_state_dict(theirs.state_dict(), strict=True)
    for other in (theirs, back, copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        for key, value in ours.state_dict().items():
            assert torch.equal(value, other.state_dict()[key]), key


@pytest.mark.parametrize("options", NORM, ids=str)
def test_running_statistics(device, options):
    ours, theirs = pair_of("BatchNorm2d", options, device)
    for shape in ((4, 3, 2, 3), (1, 3, 5, 1), (2, 3, 1, 1)):
        x = 2 + torch.randn(shape, device=device, dtype=options.get("dtype", torch.float32))
        ours(x), theirs(x)
    for key, value in theirs.state_dict().items():
        torch.testing.assert_close(ours.state_dict()[key], value)
    ours.eval(), theirs.eval()
    torch.testing.assert_close(ours(x), theirs(x))
    ours.reset_running_stats(), theirs.reset_running_stats()
    for key, value in theirs.state_dict().items():
        torch.testing.assert_close(ours.state_dict()[key], value)


def test_state_dict_from_before_num_batches_tracked():
    ours, theirs = pair_of("BatchNorm2d", NORM[0])
    old = theirs.state_dict()
    del old["num_batches_tracked"]
    with pytest.raises(RuntimeError, match="num_batches_tracked"):
        ours.load_state_dict(old)
    for version in ({"version": 1}, {}):
        state = old.copy()
        state._metadata = {"": version}
        ours.num_batches_tracked.fill_(5)
        ours.load_state_dict(state, strict=True)
        assert ours.num_batches_tracked == 5


@pytest.mark.parametrize("shape", [(3, 4, 4), (2, 3, 4), (2, 5, 4, 4), (1, 3, 1, 1)], ids=str)
def test_refused_batch_leaves_the_buffers(device, shape):
    norm = layers.BatchNorm2d(3, device=device)
    before = copy.deepcopy(norm.state_dict())
    with pytest.raises((ValueError, RuntimeError), match=r"expected 4D|elements|more than 1 value"):
        norm(torch.randn(shape, device=device))
    with pytest.raises(TypeError):
        norm(torch.ones(2, 3, 4, 4, device=device, dtype=torch.int32))
    for key, value in norm.state_dict().items():
        assert torch.equal(value, before[key])


def test_unbatched_input(device):
    x = torch.randn(4, 6, 5, device=device)
    for name, options in (
        ("ConvTranspose2d", CONV[1]),
        ("MaxPool2d", POOL[1]),
    ):
        ours, theirs = pair_of(name, options, device)
        torch.testing.assert_close(ours(x), theirs(x))


def test_output_size(device):
    ours, theirs = pair_of(
        "ConvTranspose2d", {"in_channels": 2, "out_channels": 3, "kernel_size": 3, "stride": 2, "padding": 1}, device
    )
    for x in (torch.randn(2, 2, 4, 3, device=device), torch.randn(2, 4, 3, device=device)):
        for size in ((7, 5), [8, 6], (8, 5), (*x.shape[:-2], 7, 6), torch.Size((8, 6))):
            torch.testing.assert_close(ours(x, output_size=size), theirs(x, output_size=size))
        for size in ((9, 6), (8, 4), (8,), (1, 1, 1, 8, 6)):
            for module in (ours, theirs):
                with pytest.raises(ValueError, match="size"):
                    module(x, output_size=size)


def test_pool_with_indices(device):
    ours, theirs = pair_of("MaxPool2d", {"kernel_size": 2, "return_indices": True})
    x = torch.randn(2, 3, 5, 4, device=device)
    for a, b in zip(ours(x), theirs(x), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("ConvTranspose2d", dict(CONV[0], groups=0)),
        ("ConvTranspose2d", dict(CONV[0], groups=3)),
        ("ConvTranspose2d", dict(CONV[0], groups=4)),
        ("ConvTranspose2d", dict(CONV[0], padding_mode="reflect")),
        ("GroupNorm", {"num_groups": 4, "num_channels": 6}),
    ],
    ids=str,
)
def test_bad_arguments_raise_what_torch_raises(name, options):
    for library in (layers, torch.nn):
        with pytest.raises(ValueError, match=r"groups|padding"):
            getattr(library, name)(**options)


@pytest.mark.parametrize(
    ("layer", "error"),
    [
        (lambda: layers.ConvTranspose2d(4, 6, (1, 2, 3)), ValueError),
        (lambda: layers.ConvTranspose2d(4, 6, 3, padding="same"), ValueError),
        (lambda: layers.ConvTranspose2d(4, 6, 3, numerics="fp16"), ValueError),
        (lambda: layers.MaxPool2d((2, 2, 2)), ValueError),
        (lambda: layers.GroupNorm(-2, 4), RuntimeError),
    ],
)
def test_bad_arguments(layer, error):
    """Some are known at the first call only, as in torch."""
    with pytest.raises(error, match=r"weight|padding|numerics|kernel_size|groups"):
        layer()(torch.randn(2, 4, 5, 5))


@pytest.mark.parametrize(
    ("name", "options", "shape"),
    [
        ("BatchNorm2d", {"num_features": 4}, (2, 4, 3, 3)),
        ("GroupNorm", {"num_groups": 2, "num_channels": 4}, (2, 4, 3)),
    ],
)
def test_norm_without_bias(device, name, options, shape):
    layer, reference = getattr(layers, name)(**options, bias=False, device=device), getattr(torch.nn, name)(**options)
    layer.reset_parameters()
    assert layer.bias is None
    assert [n for n, _ in layer.named_parameters()] == ["weight"]
    x = torch.randn(shape, device=device)
    torch.testing.assert_close(layer(x), reference.to(device)(x))  # whose bias is 0


@pytest.mark.parametrize("momentum", [0.1, None])
def test_checkpoint_counts_and_updates_as_torch(device, momentum):
    """Its second forward stops within the operation, once it has the tensors that backward needs."""
    states = []
    for module in pair_of("BatchNorm2d", {"num_features": 3, "momentum": momentum}, device):
        x = (3 + torch.arange(24.0, device=device)).reshape(2, 3, 2, 2).requires_grad_()
        torch.utils.checkpoint.checkpoint(module, x, use_reentrant=False).sum().backward()
        states.append(module.state_dict())
    for key, value in states[1].items():
        torch.testing.assert_close(states[0][key], value)
    assert states[0]["num_batches_tracked"] == 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", layers.__all__)
def test_autocast(device, name, dtype):
    """The result's dtype is torch's, and gradients come back in the leaves' own dtypes."""
    options, shape = of(name)[0]
    ours, theirs = pair_of(name, options, device)
    x = torch.randn(shape, device=device).to(dtype).requires_grad_()
    truth = copy.deepcopy(theirs).double()(x.double())
    with torch.autocast(device, dtype=torch.bfloat16):
        y, expected = ours(x), theirs(x)
    check(y, truth, expected)
    for leaf, grad in zip([x, *ours.parameters()], torch.autograd.grad(y.sum(), [x, *ours.parameters()])):
        assert grad.dtype == leaf.dtype
