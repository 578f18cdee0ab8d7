import copy
import itertools
import pickle
import statistics
import sys

import pytest
import torch
from tolerance import check, keep
from torch.utils._python_dispatch import TorchDispatchMode

from modelnew import Model, ModelNew, Sequential, explain, functional, get_init_inputs, get_inputs, layers
from modelnew.model import OPERATORS
from modelnew.parity import RATIO, Error, Row, compare_models, tf32

SMALL = (4, 8, 3, 1, 1, 1, 2)
SUBSETS = [set(c) for n in range(1, 6) for c in itertools.combinations(OPERATORS, n)]
ATEN = {
    "conv_transpose": "convolution",
    "batch_norm": "batch_norm",
    "tanh": "tanh",
    "max_pool": "max_pool2d",
    "group_norm": "group_norm",
}


def names(subset):
    return "+".join(name for name in OPERATORS if name in subset)


def small_pair(device, **options):
    """Model, ModelNew with its state, and a batch. Parameters and statistics are random, and such that tanh saturates
    nowhere: where its results in a group are nearly one, group norm makes all of their rounding errors large together.
    """
    model, model_new = Model(*SMALL, device=device), ModelNew(*SMALL, device=device, **options)
    with torch.no_grad():
        for tensor in [*model.parameters(), model.batch_norm.running_mean, model.batch_norm.running_var]:
            tensor.copy_(0.5 + torch.rand(tensor.shape))
        model.conv_transpose.weight.sub_(1)
        model.batch_norm.weight.div_(2)
        model.batch_norm.bias.sub_(1)
    model_new.load_state_dict(model.state_dict(), strict=True)
    return model, model_new, torch.randn(8, 4, 10, 10, device=device)


def is_chance(row, model, model_new):
    """Whether the errors over ten more batches are, in the mean, at most 1.1 times PyTorch's: nothing for chance.

    The rounding of a channel's statistics is one draw for all of its elements, and there are few channels.
    """
    device, errors = model.conv_transpose.weight.device, []
    for seed in range(10):
        x = torch.randn(8, 4, 10, 10, generator=torch.Generator().manual_seed(seed)).to(device)
        found = next(other for other in compare_models(model, model_new, x) if other.what == row.what)
        errors.append((*found.ours, *found.torch))
    rms, largest, torch_rms, torch_largest = (sum(column) for column in zip(*errors))
    return rms <= 1.1 * torch_rms and largest <= 1.1 * torch_largest


@pytest.mark.parametrize("replace", SUBSETS, ids=names)
def test_every_subset(device, replace):
    """Output, gradients and running statistics in training, output in evaluation, state dict both ways."""
    model, model_new, x = small_pair(device, replace=replace)
    for row in compare_models(model, model_new, x):
        assert row.ok or is_chance(row, model, model_new), row
        if device == "cuda":
            keep(row)
    double = copy.deepcopy(model).double().eval()
    with torch.no_grad():
        check(model_new.eval()(x), double(x.double()), model.eval()(x), "output in evaluation")
    model.load_state_dict(model_new.state_dict(), strict=True)
    assert list(model.state_dict()) == list(model_new.state_dict())
    assert model.state_dict()._metadata == model_new.state_dict()._metadata


@pytest.mark.parametrize("replace", SUBSETS, ids=names)
def test_replaced_operators_never_call_pytorch(device, replace):
    class Calls(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            called.add(str(function))
            return function(*args, **kwargs or {})

    called = set()
    _, model_new, x = small_pair(device, replace=replace)
    with Calls():
        model_new(x.requires_grad_()).sum().backward()
    for name in OPERATORS:
        calls = [c for c in called if c.startswith("aten.") and ATEN[name] in c]
        assert bool(calls) == (name not in replace), (name, calls)
        assert (type(getattr(model_new, name)) in (getattr(layers, kind) for kind in layers.__all__)) == (
            name in replace
        )


@pytest.mark.parametrize("replace", SUBSETS, ids=names)
def test_fusions(monkeypatch, replace):
    calls = []

    def spied(name, function):
        return lambda *args, **options: calls.append(name) or function(*args, **options)

    for name in functional.__all__:
        function = getattr(functional, name)
        for caller in (functional, sys.modules[function.__module__]):  # the model's, the layers'
            monkeypatch.setattr(caller, name, spied(name, function))
    _, model_new, x = small_pair("cpu", replace=replace)
    model_new(x)
    middle = {
        "": [],
        "batch_norm": ["batch_norm"],
        "tanh": ["tanh"],
        "max_pool": ["max_pool2d"],
        "batch_norm+tanh": ["batch_norm_tanh"],
        "batch_norm+max_pool": ["batch_norm", "max_pool2d"],
        "tanh+max_pool": ["tanh_max_pool2d"],
        "batch_norm+tanh+max_pool": ["bn_tanh_max_pool2d"],
    }[names(replace - {"conv_transpose", "group_norm"})]
    first = ["conv_transpose2d"] if "conv_transpose" in replace else []
    last = ["group_norm"] if "group_norm" in replace else []
    fused = ["conv_bn_activation_max_pool_group_norm"] if len(replace) == 5 else first + middle + last
    assert calls == fused


FUSED = (16, 32, 3, 1, 1, 1, 4)


def test_changed_attributes_are_honoured(device):
    model, model_new, x = small_pair(device)
    for m in (model, model_new):
        m.batch_norm.eps, m.batch_norm.momentum, m.group_norm.eps = 0.5, None, 0.3
        m.max_pool.kernel_size, m.max_pool.padding, m.conv_transpose.stride = 3, 1, (2, 1)
    torch.testing.assert_close(model_new(x), model(x))
    for key, value in model.state_dict().items():
        torch.testing.assert_close(model_new.state_dict()[key], value)


def test_frozen_parameters_get_no_gradient(device):
    model, model_new, x = small_pair(device)
    double = copy.deepcopy(model).double()
    for m in (model, model_new, double):
        for p in [m.conv_transpose.weight, m.batch_norm.bias, m.group_norm.weight]:
            p.requires_grad_(False)
        m(x.to(next(m.parameters()).dtype)).square().sum().backward()
        assert [n for n, p in m.named_parameters() if p.grad is not None] == [
            "conv_transpose.bias",
            "batch_norm.weight",
            "group_norm.bias",
        ]
    check(*(m.group_norm.bias.grad for m in (model_new, double, model)), "gradient of group_norm.bias")


def test_two_runs_are_equal(device):
    _, model_new, x = small_pair(device)
    runs = []
    for _ in range(2):
        model_new.zero_grad()
        y = model_new(x)
        y.square().sum().backward()
        runs.append([y.detach(), *(p.grad for p in model_new.parameters())])
    for a, b in zip(*runs):
        assert torch.equal(a, b)


def test_refused_input_leaves_the_buffers(device):
    _, model_new, x = small_pair(device)
    before = copy.deepcopy(model_new.state_dict())
    with pytest.raises(ValueError, match="expected 4D"):
        model_new(x[0])
    with pytest.raises(TypeError):
        model_new(x.long())
    for key, value in model_new.state_dict().items():
        assert torch.equal(value, before[key])


def test_gradcheck(device):
    model = ModelNew(2, 4, 2, 1, 0, 1, 2, device=device).double()
    x = torch.randn(2, 2, 3, 3, dtype=torch.float64, device=device, requires_grad=True)
    keys, parameters = zip(*model.named_parameters())

    def call(x, *parameters):
        return torch.func.functional_call(model, dict(zip(keys, parameters)), (x,))

    assert torch.autograd.gradcheck(call, (x, *parameters))


@pytest.mark.parametrize("replace", ["all", ("conv_transpose", "group_norm"), ("tanh", "max_pool")], ids=str)
def test_torch_compile(device, replace):
    _, model_new, x = small_pair(device, replace=replace)
    compiled = torch.compile(copy.deepcopy(model_new), backend="eager")
    for training in (True, False):
        results = []
        for m in (model_new.train(training), compiled.train(training)):
            y = m(x)
            y.square().sum().backward()
            results.append([y, *(p.grad for p in m.parameters()), *m.buffers()])
        for a, b in zip(*results, strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_low_precision(device, dtype):
    model, model_new, x = small_pair(device)
    x = x.to(dtype)
    with torch.no_grad():
        truth = copy.deepcopy(model).double()(x.double())
        with torch.autocast(device, dtype=dtype):
            check(model_new(x.float()), truth, model(x.float()), "autocast")
        model, model_new = model.to(dtype), model_new.to(dtype)
        truth = copy.deepcopy(model).double()(x.double())
        check(model_new(x), truth, model(x), "parameters in low precision")


def test_same_seed_same_parameters():
    states = []
    for build in (Model, ModelNew):
        torch.manual_seed(11)
        states.append(build(*SMALL).state_dict())
    torch.manual_seed(11)
    reference = torch.nn.ConvTranspose2d(*SMALL[:5])
    assert torch.equal(states[0]["conv_transpose.weight"].cpu(), reference.weight)
    for key, value in states[0].items():
        assert torch.equal(value, states[1][key])


def test_device():
    expected = "cuda" if torch.cuda.is_available() else "cpu"
    for build in (Model, ModelNew):
        assert {p.device.type for p in build(*SMALL).parameters()} == {expected}
        assert {p.device.type for p in build(*SMALL, device="cpu").parameters()} == {"cpu"}
        with torch.device("meta"):
            assert {p.device.type for p in build(*SMALL).parameters()} == {"meta"}
    assert get_inputs(1)[0].device.type == expected


def test_inputs_are_the_same_at_each_call():
    a, b = get_inputs(2), get_inputs(2)
    assert torch.equal(*a, *b)
    assert a[0].shape == (2, 64, 32, 32)
    assert a[0].dtype == torch.float32
    assert 0 <= a[0].min() < a[0].max() < 1
    assert not torch.equal(*a, *get_inputs(2, seed=1))
    assert get_init_inputs() == [64, 128, 5, 1, 1, 8, 8]


def test_replace_and_numerics():
    assert ModelNew(*SMALL).replace == OPERATORS
    assert ModelNew(*SMALL, replace=("max_pool", "tanh")).replace == ("tanh", "max_pool")
    assert ModelNew(*SMALL, replace="tanh").replace == ("tanh",)
    assert "replace=('tanh',), numerics='fp32'" in repr(ModelNew(*SMALL, replace="tanh", numerics="fp32"))
    unreplaced = ModelNew(*SMALL, replace=())
    assert {type(m).__module__.split(".")[0] for m in unreplaced.children()} == {"torch"}
    with pytest.raises(ValueError, match=r"conv_transpose.*received \['conv'\]"):
        ModelNew(*SMALL, replace=["conv", "tanh"])
    with pytest.raises(TypeError, match=r'replace takes "all" or names out of conv_transpose.*; received None'):
        ModelNew(*SMALL, replace=None)
    with pytest.raises(ValueError, match="auto, tf32, fp32, received 'fp16'"):
        ModelNew(*SMALL, numerics="fp16")


def test_copy_and_pickle(device):
    _, model_new, x = small_pair(device, replace={"tanh", "max_pool", "group_norm"})
    y = model_new(x)
    for other in (copy.deepcopy(model_new), pickle.loads(pickle.dumps(model_new))):
        assert torch.equal(other(x), y)
        assert other.replace == model_new.replace


def test_acceptance(device):
    """What ModelNew promises, on a small batch where there is no GPU."""
    batch = () if device == "cuda" else (1,)
    with tf32(True):  # PyTorch's default
        model = Model(*get_init_inputs(), device=device)
        model_new = ModelNew(*get_init_inputs(), replace={"tanh", "max_pool"}, device=device)
        model_new.load_state_dict(model.state_dict())
        y, y_new = model(*get_inputs(*batch, device=device)), model_new(*get_inputs(*batch, device=device))
    if device == "cuda":
        assert torch.allclose(y, y_new)
        assert torch.equal(y, y_new)
    torch.testing.assert_close(y_new, y)  # PyTorch's tanh on a CPU is not the C library's


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("cls", ["fp32", "tf32"])
def test_full_size(cls):
    model, model_new = Model(*get_init_inputs()), ModelNew(*get_init_inputs(), numerics=cls)
    rows = compare_models(model, model_new, *get_inputs(), cls)
    for row in rows:
        keep(row)
    assert all(row.ok for row in rows), "\n".join(map(str, rows))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("cls", ["fp32", "tf32"])
def test_full_size_over_seeds(cls):
    """Errors in the mean of five models and batches: at most 1.1 times PyTorch's, with nothing allowed for chance."""
    runs = []
    for seed in range(5):
        torch.manual_seed(seed)
        models = Model(*get_init_inputs()), ModelNew(*get_init_inputs(), numerics=cls)
        runs.append(compare_models(*models, *get_inputs(seed=seed), cls, seed))
    means = []
    for rows in zip(*runs):
        pairs = zip(*((row.ours, row.torch) for row in rows))
        ours, theirs = (Error(*map(statistics.mean, zip(*errors))) for errors in pairs)
        ok = ours.rms <= RATIO * theirs.rms and ours.max <= RATIO * theirs.max
        means.append(Row(rows[0].what, cls, ours, theirs, None, ok))
        keep(means[-1])
    assert all(row.ok for row in means), "\n".join(map(str, means))


def test_explain_any_module(device, launched):
    """Names are those of the launches that follow; nothing starts, and nothing changes."""
    net = torch.nn.Sequential(
        torch.nn.Conv2d(3, 4, 3),
        layers.BatchNorm2d(4),
        torch.nn.ReLU(),
        layers.MaxPool2d(2),
        layers.ConvTranspose2d(4, 2, 3),
    ).to(device)
    equal = torch.nn.Sequential(layers.Tanh(), layers.Tanh(), *(layers.BatchNorm2d(3) for _ in range(2))).to(device)
    for module in (net, net.eval(), equal, ModelNew(*FUSED, device=device)):
        x = (
            torch.randn(2, 16, 6, 6, device=device)
            if type(module) is ModelNew
            else torch.randn(2, 3, 8, 8, device=device)
        )
        before = {name: (t.clone(), t._version) for name, t in module.state_dict().items()}
        launched.clear()
        text = explain(module, x)
        assert not launched
        for name, t in module.state_dict().items():
            assert torch.equal(t, before[name][0]), name
            assert t._version == before[name][1], name
        y = module(x.requires_grad_())
        forward = [kernel.name for kernel in launched]
        launched.clear()
        torch.autograd.grad(y, [x, *module.parameters()], torch.ones_like(y))
        backward = [kernel.name for kernel in launched]
        assert text.splitlines()[-2:] == [f"forward: {', '.join(forward)}", f"backward: {', '.join(backward)}"]
    assert explain(torch.nn.ReLU(), x).endswith("backward: no kernel of ours")
    theirs = torch.nn.Sequential(torch.nn.Tanh(), torch.nn.ReLU(), type("Own", (torch.nn.Tanh,), {})(), layers.Tanh())
    assert explain(theirs, x).endswith("\nPyTorch's, which modelnew.replace_layers can replace: 1 Tanh")


def test_explain_chains(device):
    """How each chain in a network runs, and why, whatever comes before it."""

    def chain(channels, outputs, activation, pool, **options):
        parts = layers.ConvTranspose2d(channels, outputs, 3, **options), layers.BatchNorm2d(outputs), activation()
        return *parts, pool, layers.GroupNorm(4, outputs)

    net = torch.nn.Sequential(
        Sequential(torch.nn.Conv2d(3, 16, 1), *chain(16, 32, layers.Tanh, layers.MaxPool2d(2))),
        Sequential(
            *chain(32, 16, layers.Tanh, layers.MaxPool2d(2), stride=2),
            *chain(16, 16, layers.LeakyReLU, layers.MaxPool2d(3, 3)),
        ),
    ).to(device)
    lines = explain(net, torch.randn(2, 3, 12, 12, device=device)).splitlines()
    assert lines[0] == "0.1 to 0.5: fused into one operator, tensor cores, fp32 class"
    assert lines[1].startswith("1.0 to 1.4: fused into three operators, not one: the convolution has a stride")
    assert lines[2].startswith("1.0 to 1.4: conv_transpose: general kernels")
    assert lines[3].startswith("1.5 to 1.9: not fused: the pooling is not over 2x2 windows, or 3x3")
    assert lines[4].startswith("1.5 to 1.9: conv_transpose: ")
    assert [line.partition(":")[0] for line in lines[5:]] == ["forward", "backward"]


class _Several(torch.nn.Module):
    """A module that explain must leave as it is: it changes its input, draws numbers and returns a dict."""

    def __init__(self):
        super().__init__()
        self.norm, self.drop = layers.BatchNorm2d(4), torch.nn.Dropout()
        self.table = torch.nn.Embedding(3, 4)

    def forward(self, x):
        with torch.no_grad():
            x.mul_(2)
        y = self.drop(self.norm(torch.nn.functional.relu_(x)))
        return {"y": (y, y.detach()), "found": self.table(y[0, 0].long())}


def test_explain_a_convolution_as_it_is_called(device, launched):
    """Without a batch dimension, and under autocast."""
    conv = layers.ConvTranspose2d(16, 32, 5, device=device)
    x = torch.randn(16, 8, 8, device=device)
    assert explain(conv, x).splitlines()[0] == explain(conv, x[None]).splitlines()[0]
    thin = layers.ConvTranspose2d(4, 4, 2, device=device)
    x = torch.randn(64, 4, 128, 128, device=device)
    with torch.no_grad(), torch.autocast(device, torch.bfloat16):
        text = explain(thin, x)
    assert "gather_gemm" in text
    assert "thin" not in text


def test_explain_changes_nothing(device):
    module, x = _Several().to(device), torch.randn(2, 4, 3, 3, device=device)
    with torch.inference_mode():
        made_there = x.clone()
    expected = "forward: batch_norm_forward\nbackward: batch_norm_backward"
    before, state = x.clone(), torch.random.get_rng_state()
    assert explain(module, x) == explain(module, made_there) == expected
    assert torch.equal(x, before)
    assert torch.equal(torch.random.get_rng_state(), state)
    cannot_be_trained = torch.nn.Sequential(layers.Tanh(), torch.nn.ReLU(inplace=True))
    with torch.no_grad():
        assert explain(cannot_be_trained, x).startswith("forward: tanh_forward\nbackward: no kernel of ours")
    with pytest.raises(RuntimeError, match="inplace operation"):
        explain(cannot_be_trained, x)


def test_explain_modules_of_several_inputs(device, launched):
    class Module(torch.nn.Module):
        def forward(self, image, step, *, features):
            return functional.tanh(image + step), functional.leaky_relu(features["last"].mul_(step))

    x = torch.randn(2, 3, 4, 4, device=device)
    text = explain(Module(), x, torch.tensor(3, device=device), features={"last": x})
    first, second = "tanh_forward, leaky_relu_forward", "leaky_relu_backward, tanh_backward"
    assert text.splitlines() == [f"forward: {first}", f"backward: {second}"]

    class Attention(torch.nn.Module):
        def forward(self, query, *, key):
            return functional.tanh(query) if key is query else query

    assert explain(Attention(), x, key=x) == "forward: tanh_forward\nbackward: tanh_backward"
    assert explain(layers.Tanh(), input=x).startswith("forward: tanh_forward")
    assert not launched


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("x", torch.ones(1)), "module must be a torch.nn.Module, received a str"),
        (
            (torch.nn.Tanh(), [1.0]),
            r"explain\(module, x\) takes what module\(x\) takes, and received no tensor",
        ),
    ],
)
def test_explain_refuses(arguments, message):
    with pytest.raises(TypeError, match=message):
        explain(*arguments)
