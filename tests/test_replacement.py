"""`modelnew.replace_layers`: the same network on our kernels, and back."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from tolerance import check
from torch import nn
from torch.nn.utils import parametrizations

import modelnew
from modelnew import layers


class Network(nn.Module):
    """A small U-Net with every layer that has a counterpart, a chain that fuses, and layers that stay.

    Convolutions have no bias, as batch norm makes its gradient 0, and nobody is close to what is left.
    """

    def __init__(self):
        super().__init__()
        self.down = nn.Sequential(
            nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.LeakyReLU(0.2), nn.MaxPool2d(2)
        )
        self.bottom = nn.Sequential(
            nn.ConvTranspose2d(16, 32, 3, padding=1, bias=False),
            nn.BatchNorm2d(32),
            nn.Tanh(),
            nn.MaxPool2d(2),
            nn.GroupNorm(4, 32),
            nn.Tanh(),
        )
        self.up = nn.ConvTranspose2d(32, 16, 2, stride=2, bias=False)
        self.last = nn.Sequential(nn.BatchNorm2d(32), nn.LeakyReLU(0.1, inplace=True))
        self.vector = nn.BatchNorm1d(32)
        self.volume = nn.BatchNorm3d(1)

    def forward(self, x):
        y = self.down(x)
        y = self.last(torch.cat([y, self.up(self.bottom(y))], 1))
        return self.volume(self.vector(y.flatten(2)).unflatten(2, y.shape[2:]).unsqueeze(1)).squeeze(1)


@pytest.fixture
def network(device):
    torch.manual_seed(0)
    return Network().to(device)


def images(device):
    return torch.randn(2, 3, 16, 20, generator=torch.Generator().manual_seed(1)).to(device)


def step(network, x):
    """The output and all gradients, for a random gradient of the output."""
    x = x.detach().requires_grad_()
    y = network(x)
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(2)).to(y)
    return y.detach(), *torch.autograd.grad(y, [x, *network.parameters()], dy)


@pytest.mark.parametrize("format", [torch.contiguous_format, torch.channels_last], ids=["contiguous", "channels_last"])
def test_same_results(device, network, format):
    network, x = network.to(memory_format=format), images(device).contiguous(memory_format=format)
    truth, theirs = step(copy.deepcopy(network).double(), x.double()), copy.deepcopy(network)
    reference = step(theirs, x)
    modelnew.replace_layers(network, numerics="fp32")
    results = step(network, x)
    for actual, exact, expected in zip(results, truth, reference, strict=True):
        check(actual, exact, expected)
    for actual, expected in zip(results[:2], reference):  # the output, and the gradient of x
        assert actual.stride() == expected.stride()
    for actual, expected in zip(network.buffers(), theirs.buffers(), strict=True):
        torch.testing.assert_close(actual, expected)


def test_objects_stay(network, device):
    before, keys = dict(network.named_modules()), list(network.state_dict())
    parameters = {name: id(p) for name, p in network.named_parameters()}
    optimizer, seen = torch.optim.SGD(network.parameters(), lr=0.1), []
    network.down[1].register_forward_hook(lambda *_: seen.append("hook"))
    network.eval()
    modelnew.replace_layers(network)
    assert {name: id(module) for name, module in network.named_modules()} == {n: id(m) for n, m in before.items()}
    assert {name: id(p) for name, p in network.named_parameters()} == parameters
    assert list(network.state_dict()) == keys
    assert not network.vector.training
    old = network.up.weight.detach().clone()
    network.train()(images(device)).square().sum().backward()
    optimizer.step()
    assert seen == ["hook"]
    assert not torch.equal(network.up.weight, old)


def test_what_is_replaced_and_what_is_kept(network):
    network.up = parametrizations.weight_norm(network.up)
    replaced = modelnew.replace_layers(network)
    assert {name: type(module) for name, module in replaced.layers.items()} == {
        "down.1": layers.BatchNorm2d,
        "down.2": layers.LeakyReLU,
        "down.3": layers.MaxPool2d,
        "bottom.0": layers.ConvTranspose2d,
        "bottom.1": layers.BatchNorm2d,
        "bottom.2": layers.Tanh,
        "bottom.3": layers.MaxPool2d,
        "bottom.4": layers.GroupNorm,
        "bottom.5": layers.Tanh,
        "last.0": layers.BatchNorm2d,
        "vector": layers.BatchNorm1d,
        "volume": layers.BatchNorm3d,
        "bottom": modelnew.Sequential,
    }
    assert str(replaced) == (
        "replaced: 3 BatchNorm2d, 1 LeakyReLU, 2 MaxPool2d, 1 ConvTranspose2d, 2 Tanh, 1 GroupNorm, 1 BatchNorm1d, "
        "1 BatchNorm3d\n"
        "fused where the kernels support it: a chain in bottom\n"
        "kept up: ParametrizedConvTranspose2d is derived from PyTorch's layer\n"
        "kept last.1: LeakyReLU(inplace=True) changes its input, ours do not: set inplace to False before"
    )
    again = modelnew.replace_layers(network)
    assert not again.layers
    assert str(again).startswith("replaced: nothing\nkinds of layers that can be replaced: BatchNorm1d, ")


def test_how_tools_recognise_layers(network):
    original = copy.deepcopy(network)
    modelnew.replace_layers(network)
    for theirs, ours in zip(original.modules(), network.modules(), strict=True):
        assert isinstance(ours, type(theirs))
        assert type(ours).__name__ == type(theirs).__name__
    assert str(network) == str(original)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda module: pickle.loads(pickle.dumps(module))])
def test_copies(network, device, copied):
    modelnew.replace_layers(network)
    other, x = copied(network), images(device)
    assert [type(m) for m in other.modules()] == [type(m) for m in network.modules()]
    assert torch.equal(other(x), network(x))


def test_the_chain_runs_fused(network, device, launched):
    network(images(device))
    assert not launched
    modelnew.replace_layers(network)
    network(images(device))
    assert "pooled_forward" in {kernel.name for kernel in launched}


def test_undo(network, device, launched):
    own = nn.Sequential(network, layers.Tanh())
    original = copy.deepcopy(own)
    replaced = modelnew.replace_layers(own, numerics="fp32")
    assert network.up.numerics == "fp32"
    replaced.undo()
    assert str(replaced).startswith("replaced: nothing\n")
    assert [type(m) for m in own.modules()] == [type(m) for m in original.modules()]
    assert [sorted(vars(m)) for m in own.modules()] == [sorted(vars(m)) for m in original.modules()]
    launched.clear()
    network(images(device))
    assert not launched


def test_undo_what_has_changed_since(device):
    """A synchronised layer stays synchronised; one with a parametrization stays ours, until that is removed."""
    network = nn.Sequential(nn.ConvTranspose2d(2, 4, 3), nn.BatchNorm2d(4)).to(device)
    replaced, x = modelnew.replace_layers(network), torch.randn(1, 2, 3, 3, device=device)
    modelnew.convert_sync_batchnorm(network)
    nn.utils.parametrizations.weight_norm(network[0])
    expected = network[0](x)
    replaced.undo()
    assert type(network[1]) is nn.SyncBatchNorm
    assert network[1].process_group is None
    assert "peers" not in vars(network[1])
    assert list(replaced.layers) == ["0"]
    assert torch.equal(network[0](x), expected)
    nn.utils.parametrize.remove_parametrizations(network[0], "weight")
    replaced.undo()
    assert type(network[0]) is nn.ConvTranspose2d
    assert not replaced.layers


def hooked(module):
    """Gives `module` another forward around the one that it has, as the hooks of accelerate and diffusers do."""
    module._old_forward = module.forward
    module.forward = lambda x: module._old_forward(x)


def unhooked(module):
    """Leaves the method of the class as an attribute of the module."""
    module.forward = module._old_forward
    del module._old_forward


def test_another_forward_given_before(network, device, launched):
    """It would go on calling PyTorch's."""
    for module in (network.down[1], network.bottom):
        hooked(module)
    replaced = modelnew.replace_layers(network)
    assert type(network.down[1]) is nn.BatchNorm2d
    assert type(network.bottom) is nn.Sequential
    assert type(network.bottom[1]) is layers.BatchNorm2d
    for name, kind in (("down.1", "BatchNorm2d"), ("bottom", "Sequential")):
        assert replaced.kept[name] == (
            f"{kind} was given another forward, as by accelerate's hooks: replace it before that"
        )
    network.down[:2](images(device))
    assert not launched
    for module in (network.down[1], network.bottom):
        unhooked(module)
    again = modelnew.replace_layers(network)
    assert again.layers == {"down.1": network.down[1], "bottom": network.bottom}
    network.down[:2](images(device))
    assert launched


def test_another_forward_given_since(network, device):
    """It goes on calling ours, so the layer stays ours."""
    replaced, x = modelnew.replace_layers(network), images(device)
    network.eval()
    expected = network(x)
    hooked(network.up)
    replaced.undo()
    assert list(replaced.layers) == ["up"]
    torch.testing.assert_close(network(x), expected)
    unhooked(network.up)
    replaced.undo()
    assert type(network.up) is nn.ConvTranspose2d
    assert "forward" not in vars(network.up)
    assert not replaced.layers


def test_a_record_is_no_network(network):
    replaced = modelnew.replace_layers(network)
    for use in (lambda: replaced(1), lambda: replaced.parameters()):
        with pytest.raises(
            (TypeError, AttributeError), match="in place, and returns a record of the changes: go on with"
        ):
            use()


def test_many_layers_kept_for_one_reason():
    network = nn.Sequential(*(nn.LeakyReLU(inplace=True) for _ in range(5)))
    for count, names in ((3, "0, 1, 2"), (5, "0, 1 and 3 more")):
        assert f"\nkept {names}: LeakyReLU(inplace=True) changes" in str(modelnew.replace_layers(network[:count]))


def test_containers_are_no_layers(network):
    modelnew.replace_layers(network)
    count = sum(type(m).__module__.startswith("modelnew.functional") for m in network.modules())
    again = modelnew.replace_layers(network, numerics="fp32")
    assert again.before == count
    assert network.up.numerics == "auto"


def test_a_layer_alone(device):
    layer = nn.GroupNorm(2, 4, device=device)
    replaced = modelnew.replace_layers(layer)
    assert type(layer) is layers.GroupNorm
    assert replaced.layers == {"": layer}
    kept = nn.LeakyReLU(inplace=True)
    assert str(modelnew.replace_layers(kept)).endswith(
        "kept the module: LeakyReLU(inplace=True) changes its input, ours do not: set inplace to False before"
    )


def test_a_layer_with_two_names(device):
    shared = nn.BatchNorm2d(4, device=device)
    replaced = modelnew.replace_layers(nn.Sequential(shared, nn.Identity(), shared))
    assert list(replaced.layers) == ["0"]
    assert type(shared) is layers.BatchNorm2d


def test_refused_numerics_change_nothing(network):
    with pytest.raises(ValueError, match="numerics must be one of auto, tf32, fp32, received 'fp16'"):
        modelnew.replace_layers(network, numerics="fp16")
    assert type(network.up) is nn.ConvTranspose2d


def test_what_is_no_module():
    with pytest.raises(TypeError, match=r"module must be a torch\.nn\.Module, received a str"):
        modelnew.replace_layers("network")


def test_lazy_layers_are_kept_until_their_shape_is_known(device):
    network = nn.Sequential(nn.LazyBatchNorm2d(device=device), nn.Tanh(), nn.LazyInstanceNorm2d(device=device))
    replaced = modelnew.replace_layers(network)
    assert list(replaced.layers) == ["1"]
    assert replaced.kept == {"0": "LazyBatchNorm2d has no shape yet: call replace_layers again after a forward"}
    network(torch.randn(2, 3, 4, 4, device=device))
    assert modelnew.replace_layers(network).layers == {"0": network[0]}


def test_batch_norms_that_pytorch_has_synchronised_are_kept():
    network = nn.SyncBatchNorm.convert_sync_batchnorm(nn.Sequential(nn.BatchNorm2d(3), nn.Tanh()))
    replaced = modelnew.replace_layers(network)
    assert list(replaced.layers) == ["1"]
    assert "replace_layers first, and modelnew.convert_sync_batchnorm" in replaced.kept["0"]


def test_functions_in_a_forward_stay(device, launched):
    class Module(nn.Module):
        def forward(self, x):
            return F.max_pool2d(x, 2).tanh()

    module = Module()
    assert not modelnew.replace_layers(module).layers
    module(torch.randn(1, 2, 4, 4, device=device))
    assert not launched
