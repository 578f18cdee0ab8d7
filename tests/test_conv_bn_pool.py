"""The fused model: pooling in the convolution's epilogue, batch norm, tanh and group norm over the pooled sums."""

import copy
import itertools
import math
import pickle

import numpy as np
import pytest
import tolerance
import torch

from cupy_kernels import conv_bn_pool_backward as back
from cupy_kernels import source
from cupy_kernels.conv_transpose import Geometry
from cupy_kernels.errors import UnsupportedError
from cupy_kernels.fp16_tiles import packed_shape
from modelnew import Model, ModelNew, calls, explain, layers, numerics, parity
from modelnew.functional import conv_bn_tanh_max_pool_group_norm, conv_transpose2d
from modelnew.functional.conv_transpose_kernels import gradient_plans
from modelnew.model import OPERATORS, fused_model

# (in, out, kernel, padding, groups of group norm, batch, height, width)
CASES = {
    "even": (16, 16, 3, 1, 4, 2, 6, 8),
    "odd": (16, 32, 2, 0, 8, 2, 6, 6),
    "odd_width": (16, 16, 3, 1, 1, 3, 4, 7),
    "partial_chunk": (80, 144, 3, 1, 3, 1, 5, 9),
    "many_units": (16, 144, 3, 1, 2, 1, 18, 20),
}
CLASSES = ("tf32", "fp32")
# LeakyReLU(0) is ReLU: many values of a window are equal after it.
ACTIVATIONS = {"tanh": None, "leaky_relu": torch.nn.LeakyReLU(0.2), "relu": torch.nn.LeakyReLU(0)}
OTHERS = [c for n in range(5) for c in itertools.combinations(OPERATORS[1:], n)]


def models(case, cls, device, dtype=torch.float32, activation=None):
    """Model, ModelNew with its state, and a batch, the same on every device. activation: in place of tanh."""
    channels, out, kernel, padding, groups, batch, height, width = case
    arguments = (channels, out, kernel, 1, padding, 1, groups)
    model, ours = Model(*arguments, device=device), ModelNew(*arguments, numerics=cls, device=device)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn(p.shape).to(p) / 2)
        model.batch_norm.weight[0] = 0  # pooling then takes the first corner
        if activation:
            model.batch_norm.weight[1::3].neg_()  # and here the smallest
            model.tanh, ours.tanh = activation, layers.LeakyReLU(activation.negative_slope)
    model.to(dtype)
    ours.to(dtype).load_state_dict(model.state_dict())
    x = torch.randn(batch, channels, height, width).to(device, dtype)
    return model, ours, x


def well_separated(model, x, gap):
    """Where no other value in a pooling window comes near the largest, so that rounding cannot move a gradient."""
    double = copy.deepcopy(model).double()
    with torch.no_grad():
        y = double.tanh(double.batch_norm(double.conv_transpose(x.double())))
    windows = y.unfold(2, 2, 2).unfold(3, 2, 2).flatten(4).sort(-1).values
    return ((windows[..., 3] - windows[..., 2]) > gap) | (windows[..., 3] == windows[..., 0])


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("cls", CLASSES)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
@pytest.mark.parametrize("activation", ACTIVATIONS.values(), ids=ACTIVATIONS)
def test_output_gradients_and_buffers(device, case, cls, training, launched, activation):
    model, ours, x = models(case, cls, device, activation=activation)
    if not training:  # statistics that fit the data: where tanh is 1 but for rounding, so is its gradient nothing else
        model.batch_norm.momentum = None
        with torch.no_grad():
            model(x)
        ours.load_state_dict(model.state_dict())
    model.train(training), ours.train(training)
    assert explain(ours, x).startswith("fused")
    mask = well_separated(model, x, parity.NEAR_TIE[cls])
    dy = torch.randn(mask.shape, device=device, dtype=torch.float64) * mask
    double, found = copy.deepcopy(model).double(), {}
    theirs = model if cls == "fp32" else parity.tf32_rounding(model)
    for name, m in (("truth", double), ("torch", theirs), ("ours", ours)):
        leaf = x.to(next(m.parameters()).dtype, copy=True).requires_grad_()
        launched.clear()
        y = m(leaf)
        y.backward(dy.to(y.dtype))
        found[name] = {"output": y, "x": leaf.grad, **{k: p.grad for k, p in m.named_parameters()}}
        found[name].update((k, b) for k, b in m.named_buffers() if b.is_floating_point())
    assert {k.name for k in launched} >= {"conv_bn_pool", "pooled_forward", "pooled_backward"}
    assert (
        ("conv_bn_statistics" in {k.name for k in launched}) == training == ("conv_bn_statistics" in explain(ours, x))
    )
    for name, truth in found["truth"].items():
        actual = found["ours"][name]
        if training and name == "conv_transpose.bias":
            assert not actual.any()  # zero in mathematics
        else:
            tolerance.check(actual, truth, found["torch"][name], name)


@pytest.mark.parametrize("cls", CLASSES)
def test_units_of_several_passes(device, cls, many_passes, launched):
    """90 windows an image: a pass of 64 (several of 32 in the fp32 class), and one that is trimmed to what is left."""
    with numerics.wgmma(False):
        test_output_gradients_and_buffers(device, (16, 80, 3, 1, 2, 2, 18, 20), cls, True, launched, None)
    pool = next(k for k in launched if k.name == "conv_bn_pool")
    assert dict(pool.defines)["UNIT_PASSES"] > 1


@pytest.mark.parametrize("wgmma", [True], indirect=True)
@pytest.mark.parametrize("cls", CLASSES)
@pytest.mark.parametrize("case", ["odd", "odd_width", "partial_chunk", "many_units", "64_channels", "two_rows"])
def test_wgmma(device, case, cls, wgmma, launched):
    sizes = {**CASES, "64_channels": (64, 32, 3, 1, 4, 1, 4, 7), "two_rows": (16, 32, 3, 1, 2, 8, 33, 5)}
    test_output_gradients_and_buffers(device, sizes[case], cls, True, launched, None)
    convolutions = [dict(k.defines) for k in launched if k.name in ("conv_bn_pool", "conv_transpose_mma")]
    assert [(m["WGMMA"], m["X_PACKED"]) for m in convolutions] == [(1, 0), (1, 1)]
    assert {m["UNIT_ROWS"] for m in convolutions} == {2 if case == "two_rows" else 1}
    assert {dict(k.defines)["WGMMA"] for k in launched if k.name == "conv_wgrad_mma"} == {1}


@pytest.mark.parametrize("wgmma", [True], indirect=True)
def test_wgmma_passes_of_two_sizes(device, wgmma, many_passes, launched):
    """98 windows an image from one unit to the next: one pass of some tiles and a last one of more."""
    test_output_gradients_and_buffers(device, (16, 80, 3, 1, 2, 2, 18, 20), "fp32", True, launched, None)
    pool = dict(next(k for k in launched if k.name == "conv_bn_pool").defines)
    assert pool["LAST_TILES"] > pool["TILES"]


@pytest.mark.parametrize("cls", CLASSES)
def test_without_a_backward_nothing_is_kept(device, cls, launched):
    model, ours, x = models(CASES["even"], cls, device)
    with torch.no_grad():
        y = ours(x)
    pool = next(k for k in launched if k.name == "conv_bn_pool")
    assert dict(pool.defines)["SAVE"] == 0
    ours.load_state_dict(model.state_dict())
    assert torch.equal(y, ours(x))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_16_bit_types(device, dtype):
    """Output and gradients, of windows whose winner is the same in PyTorch's 16 bits."""
    model, ours, x = models((16, 16, 3, 1, 4, 4, 12, 14), "auto", device, dtype)
    assert explain(ours, x).startswith("fused")
    mask = well_separated(model, x, 16 * torch.finfo(dtype).eps)
    assert mask.double().mean() > 0.2
    dy, found = (torch.randn(mask.shape, device=device) * mask).to(dtype), {}
    for name, m in (("truth", copy.deepcopy(model).double()), ("torch", model), ("ours", ours)):
        leaf = x.to(next(m.parameters()).dtype, copy=True).requires_grad_()
        y = m(leaf)
        y.backward(dy.to(y.dtype))
        found[name] = {"output": y, "x": leaf.grad, **{k: p.grad for k, p in m.named_parameters()}}
    assert not found["ours"].pop("conv_transpose.bias").any()  # zero in mathematics
    for name, actual in found["ours"].items():
        tolerance.check(actual, found["truth"][name], found["torch"][name], name)


@pytest.mark.parametrize("cls", CLASSES)
def test_statistics_of_a_large_mean(device, cls):
    """|mean| 1e4 times the standard deviation, from one constant input channel; truth: statistics of the same sums."""
    _, ours, x = models(CASES["even"], cls, device)
    with torch.no_grad():
        x[:, 0] = 1
        ours.conv_transpose.weight[0] = 0
        ours.conv_transpose.weight[0, :, 1, 1] = 2**17
        ours.conv_transpose.bias.zero_()
        ours.batch_norm.momentum = 1.0
        y = conv_transpose2d(x, ours.conv_transpose.weight, padding=1, numerics=cls).double()
        ours(x)
    mean, var = y.mean((0, 2, 3)), y.var((0, 2, 3))
    ratio = (mean / var.sqrt()).min().item()
    assert ratio > 1e4
    unit = torch.finfo(torch.float32).eps
    assert parity.error(ours.batch_norm.running_mean, mean).max < 2 * unit
    # A float32 mean is half a unit off, and Welford's method as much as that in standard deviations; squares of values
    # would be off by unit * ratio^2.
    assert parity.error(ours.batch_norm.running_var, var).max < unit * ratio / 2


@pytest.mark.parametrize("wanted", ["conv_transpose.weight", "batch_norm.bias", "group_norm.weight"])
def test_only_the_gradients_asked_for(device, wanted, launched):
    _, ours, x = models(CASES["even"], "tf32", device)
    for name, p in ours.named_parameters():
        p.requires_grad_(name == wanted)
    y = ours(x)
    launched.clear()
    y.backward(torch.ones_like(y))
    assert ("conv_wgrad_mma" in {k.name for k in launched}) == wanted.startswith("conv")
    assert "conv_transpose_mma" not in {k.name for k in launched}
    assert [name for name, p in ours.named_parameters() if p.grad is not None] == [wanted]


@pytest.mark.parametrize("cls", CLASSES)
def test_the_backwards_stages_share_their_room(device, cls, monkeypatch):
    """The peak is one stage's: the pooled gradients are gone before wgrad, and the workspaces of wgrad before dgrad."""
    monkeypatch.setattr(calls, "_LARGE", 0)
    with source.override({}):  # plans are made anew
        case = (16, 16, 3, 1, 4, 4, 18, 20)
        _, ours, x = models(case, cls, device)
        w = ours.conv_transpose.weight
        y = ours(x.requires_grad_())
        y.backward(torch.ones_like(y))
        y = ours(x)
        ours.zero_grad()
        x.grad, dy = None, torch.ones_like(y)
        found = peak(lambda: y.backward(dy), device)

    choice, geometry = numerics.choose(cls, x.device), Geometry((1, 1), (1, 1), (0, 0), (1, 1), 1)
    options = (np.dtype(np.float32), x.shape, w.shape, geometry, choice, True, True)
    dgrad, wgrad = gradient_plans(*options)
    arrays = {name: sized(*a) for name, a in back.gradient_arrays(fused_model(ours, x)[0], 16, True, True).items()}
    passed_on = sum(arrays[name] for name in ("sums", "dy_exponents", "dy_packed", "borders"))
    of_wgrad = sized(packed_shape(x.shape, wgrad.split), np.float16) + sized((wgrad.partial_size,), np.float32)
    of_dgrad = sized((dgrad.packed_size,), np.float16)
    stage = max(arrays["g"] + arrays["partials"], w.nbytes + of_wgrad, w.nbytes + of_dgrad + x.nbytes)
    assert found <= passed_on + stage + 8192


def sized(shape, dtype):
    return math.prod(shape) * np.dtype(dtype).itemsize


def peak(function, device):
    """Bytes that torch has allocated at a time while the function runs, at most."""
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        function()
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        function()
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    return max(itertools.accumulate(event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())))


def test_two_runs_are_bit_equal(device):
    model, ours, x = models(CASES["many_units"], "tf32", device)
    runs = []
    for _ in range(2):
        ours.load_state_dict(model.state_dict())
        ours.zero_grad()
        y = ours(x)
        y.square().sum().backward()
        runs.append([y, *(p.grad.clone() for p in ours.parameters())])
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_nan_and_inf(device):
    model, ours, x = models(CASES["even"], "tf32", device)
    model.eval(), ours.eval()
    for special in (float("nan"), float("inf")):
        x[0, 2, 3, 3] = special
        assert torch.equal(ours(x).isnan(), model(x).isnan())


def test_saved_tensor_hooks_and_checkpointing(device):
    _, ours, x = models(CASES["even"], "tf32", device)
    state = copy.deepcopy(ours.state_dict())

    def gradients(run):
        ours.load_state_dict(state)
        ours.zero_grad()
        run(x.clone().requires_grad_()).square().sum().backward()
        return [p.grad.clone() for p in ours.parameters()]

    def offloaded(x):
        with torch.autograd.graph.saved_tensors_hooks(lambda t: t.clone(), lambda t: t):
            return ours(x)

    plain = gradients(ours)
    checkpointed = gradients(lambda x: torch.utils.checkpoint.checkpoint(ours, x, use_reentrant=False))
    for other in (gradients(offloaded), checkpointed):
        assert all(torch.equal(a, b) for a, b in zip(plain, other, strict=True))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"conv_bias": torch.zeros(8)}, ValueError, "conv_bias must have shape"),
        ({"num_groups": 3}, ValueError, "num_groups must divide the 16 channels, received 3"),
        ({"conv_weight": torch.zeros(16, 16, 3, 3).half()}, ValueError, "different dtypes"),
        ({"numerics": "tf16"}, ValueError, "numerics must be one of"),
        ({"padding": 4}, ValueError, "output size"),
        ({"input": torch.zeros(1, 16, 1, 1), "padding": 1}, ValueError, "more than 1 value per channel"),
    ],
)
def test_errors_change_nothing(change, error, message):
    mean, var = torch.zeros(16), torch.ones(16)
    arguments = {
        "input": torch.randn(1, 16, 6, 6),
        "running_mean": mean,
        "running_var": var,
        "training": True,
        "conv_weight": torch.randn(16, 16, 3, 3),
        "conv_bias": torch.zeros(16),
        "num_groups": 4,
        **change,
    }
    with pytest.raises(error, match=message):
        conv_bn_tanh_max_pool_group_norm(**arguments)
    assert not mean.any()
    assert (var == 1).all()


def test_a_call_that_passed_vouches_for_none_that_differs():
    arguments = {
        "input": torch.randn(2, 16, 4, 4),
        "running_mean": torch.zeros(16),
        "running_var": torch.ones(16),
        "training": True,
        "conv_weight": torch.randn(16, 16, 3, 3),
        "num_groups": 4,
    }
    conv_bn_tanh_max_pool_group_norm(**arguments)
    for change, error in (
        ({"eps": 0.0}, ValueError),
        ({"momentum": "0.1"}, TypeError),
        ({"running_var": None}, ValueError),
        ({"running_mean": torch.zeros(16, requires_grad=True)}, RuntimeError),
        ({"running_mean": torch.zeros(8)}, RuntimeError),
        ({"group_bias": torch.zeros(8)}, ValueError),
        ({"num_batches_tracked": torch.tensor(0.0)}, UnsupportedError),
        ({"weight": torch.ones(16).double()}, UnsupportedError),
        ({"input": torch.randn(2, 16, 4, 4, device="meta")}, RuntimeError),
        ({"num_groups": 0}, ValueError),
    ):
        with pytest.raises(error):
            conv_bn_tanh_max_pool_group_norm(**{**arguments, **change})
    conv_bn_tanh_max_pool_group_norm(**arguments)
    half = {name: value.half() for name, value in arguments.items() if isinstance(value, torch.Tensor)}
    conv_bn_tanh_max_pool_group_norm(**{**arguments, **half})
    with torch.autocast("cpu"), pytest.raises(ValueError, match="under autocast parameters must be float32"):
        conv_bn_tanh_max_pool_group_norm(**{**arguments, **half})


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_autocast(device, dtype, training, launched):
    """The dtypes are PyTorch's, the errors at most its errors, and a scaled loss neither overflows nor vanishes."""
    model, ours, x = models(CASES["even"], "fp32", device)
    truth = copy.deepcopy(model).double()
    found, errors = {}, {}
    for scale in (1.0, 2.0 ** (20 if device == "cuda" else 10)):  # on a CPU y, and with it dy, has 16 bits
        for name, module, data in (("truth", truth, x.double()), ("torch", model, x), ("ours", ours, x)):
            module.train(training)
            leaf = data.clone().requires_grad_()
            with torch.autocast(device, dtype, enabled=name != "truth"):
                y = module(leaf)
            dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(y)
            gradients = torch.autograd.grad(y, [leaf, *module.parameters()], dy * scale)
            found[name] = {"output": y, **dict(zip(["x", *dict(module.named_parameters())], gradients))}
        assert {k.name for k in launched} >= {"conv_bn_pool", "pooled_backward"}
        for what, result in found["ours"].items():
            assert result.dtype == found["torch"][what].dtype
            if not (training and what == "conv_transpose.bias"):  # which is 0
                exact = found["truth"][what]
                ours_, theirs = (parity.error(found[who][what], exact) for who in ("ours", "torch"))
                unscaled = errors.setdefault(what, (ours_, theirs))
                if math.isfinite(theirs.rms):
                    assert parity.within_policy(result, exact, ours_, theirs), (what, ours_, theirs)
                else:  # PyTorch's gradients overflow; ours are as exact as without the scale
                    assert ours_.rms <= 1.01 * unscaled[0].rms


def test_batches_are_counted(device):
    _, ours, x = models(CASES["even"], "fp32", device)
    counter = ours.batch_norm.num_batches_tracked
    for expected in (1, 2):
        version = counter._version
        ours(x)
        assert (counter, counter._version) == (expected, version + 1)
    with torch.no_grad():
        ours(x)
    ours.eval()(x)
    assert (counter, counter._version) == (3, version + 2)
    assert explain(ours, x).startswith("fused")


@pytest.mark.parametrize("counter", [torch.tensor(7, dtype=torch.int32), torch.full((2,), 7)], ids=["int32", "two"])
def test_other_counters_of_batches_are_counted_unfused(device, counter):
    model, ours, x = models(CASES["even"], "fp32", device)
    model.batch_norm.num_batches_tracked = ours.batch_norm.num_batches_tracked = counter.to(device, copy=True)
    assert "num_batches_tracked must be one torch.int64" in explain(ours, x)
    truth = copy.deepcopy(model).double()(x.double())
    tolerance.check(ours(x), truth, model(x), "output")
    assert ours.batch_norm.num_batches_tracked.tolist() == (counter + 2).tolist()  # the two models share it


def test_forward_mode_is_refused_where_nothing_requires_a_gradient():
    x = torch.randn(2, 16, 4, 4)
    with torch.no_grad(), torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, x)
        with pytest.raises((RuntimeError, NotImplementedError), match=r"jvp|forward"):
            conv_bn_tanh_max_pool_group_norm(
                dual, None, None, training=True, conv_weight=torch.randn(16, 16, 3, 3), num_groups=4
            )


@pytest.mark.parametrize("others", OTHERS, ids="+".join)
def test_every_subset_with_the_convolution_is_on_tensor_cores(device, others, launched):
    model, _, x = models((16, 16, 3, 1, 4, 2, 6, 8), "fp32", device)
    ours = ModelNew(16, 16, 3, 1, 1, 1, 4, replace={"conv_transpose", *others}, numerics="fp32", device=device)
    for row in parity.compare_models(model, ours, x):
        assert row.ok, row
    names = {k.name for k in launched}
    assert names >= {"conv_transpose_mma", "conv_wgrad_mma"}
    assert ("conv_bn_pool" in names) == (len(others) == 4)
    assert not names & {"conv_gather", "wgrad_partial"}


def test_explain_says_why_not():
    _, ours, x = models(CASES["even"], "tf32", "cpu")
    assert "stride" in explain(ModelNew(16, 16, 3, 2, 1, 1, 4, device="cpu"), x)
    assert "multiples of 16" in explain(ModelNew(8, 16, 3, 1, 1, 1, 4, device="cpu"), x[:, :8])
    partly = explain(ModelNew(16, 16, 3, 1, 1, 1, 4, device="cpu", replace={"conv_transpose", "tanh"}), x)
    assert "batch_norm is not replaced" in partly
    assert "conv_transpose: tensor cores, fp32 class" in partly
    assert "forward: pack_weight_fp16, conv_transpose_mma, tanh_forward\nbackward: tanh_backward, " in partly
    ours.tanh.register_forward_hook(lambda *_: None)
    assert "tanh is not replaced, has a hook" in explain(ours, x)


def step(model, x, dy):
    """Output and gradients of x and of all parameters."""
    x = x.detach().requires_grad_()
    y = model(x)
    return [y.detach(), *torch.autograd.grad(y, [x, *model.parameters()], dy)]


@pytest.mark.parametrize(
    "make",
    [
        lambda t: t.to(memory_format=torch.channels_last),
        lambda t: torch.cat([t.flatten()[:1], t.flatten()])[1:].view(t.shape),
        lambda t: torch.complex(-t, -t).conj().imag,
        lambda t: t.transpose(2, 3).contiguous().transpose(2, 3),
    ],
    ids=["channels_last", "unaligned", "negative_bit", "transposed"],
)
def test_layouts(device, make):
    """Of input, incoming gradient and weights; results are those of contiguous tensors, bit for bit."""
    _, ours, x = models(CASES["even"], "tf32", device)
    dy = torch.randn(2, 16, 3, 4, device=device)
    expected = step(ours, x, dy)
    ours.conv_transpose.weight.data = make(ours.conv_transpose.weight.data)
    for result, right in zip(step(ours, make(x), make(dy)), expected, strict=True):
        assert torch.equal(result, right)
    expanded = dy[:1, :1, :1, :1].expand(dy.shape)
    for result, right in zip(step(ours, x, expanded), step(ours, x, expanded.contiguous()), strict=True):
        assert torch.equal(result, right)


def test_a_graph_used_twice(device):
    """Again with retain_graph, and never without: what the forward kept is the backward's to read only."""
    _, ours, x = models(CASES["even"], "tf32", device)
    y = ours(x.requires_grad_())
    leaves, dy = [x, *ours.parameters()], torch.randn_like(y)
    first = torch.autograd.grad(y, leaves, dy, retain_graph=True)
    torch.autograd.grad(y, leaves, 3 * dy, retain_graph=True)
    assert all(map(torch.equal, first, torch.autograd.grad(y, leaves, dy)))
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(y, leaves, dy)


@pytest.mark.parametrize("changed", ["x", "conv_transpose.weight", "batch_norm.weight", "group_norm.weight"])
def test_what_changes_before_the_backward_is_noticed(device, changed):
    _, ours, x = models(CASES["even"], "tf32", device)
    y = ours(x)
    with torch.no_grad():
        {"x": x, **dict(ours.named_parameters())}[changed].add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_what_is_kept_for_the_backward(device):
    """All of it by save_for_backward, and in the tf32 class no more than the convolution's output as fp16, the pooled
    sums, a byte for each winner and statistics, besides x and parameters.
    """
    _, ours, x = models((16, 32, 3, 1, 4, 8, 24, 24), "tf32", device)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or len(kept) - 1, lambda i: kept[i]):
        y = ours(x)
        assert not any(isinstance(v, torch.Tensor) for v in vars(y.grad_fn).values())
    sizes = [t.numel() * t.element_size() for t in kept]
    given = [x, *ours.parameters()]
    packed = 64 * 64 * 9 * 2  # weights, that the forward packed in the same workspace
    assert any(t.data_ptr() == x.data_ptr() for t in kept)
    places = dict(fused_model(ours, x)[0].planes)["PLANE_STRIDE"]  # which a plane of windows takes
    assert (
        sum(sizes) - 4 * sum(t.numel() for t in given) - packed
        < places * y[:, :, 0, 0].numel() * (4 * 2 + 4 + 1) * 1.02
    )
    y.sum().backward()


def test_copies(device):
    _, ours, x = models(CASES["even"], "tf32", device)
    ours(x)  # plans and kernels are at hand
    copies = [copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))]
    copies.append(torch.nn.DataParallel(copy.deepcopy(ours), device_ids=[0]))  # it calls the module
    dy = torch.randn(2, 16, 3, 4, device=device)
    expected = step(ours, x, dy)
    for other in copies:
        assert all(map(torch.equal, step(other, x, dy), expected))
    assert all(map(torch.equal, copies[0].state_dict().values(), ours.state_dict().values()))


def test_torch_compile(device):
    """The graph breaks at the model, which is called as it is."""
    _, ours, x = models(CASES["even"], "tf32", device)
    other = copy.deepcopy(ours)
    # Not aot_eager: it imports files of torch's that are not ASCII, and reads them as the locale says.
    compiled = torch.compile(lambda x: other(x * 2) + 1, backend="eager")
    for batch in (x, x[:1], torch.cat([x, x])):  # plans are of one shape
        leaves = [batch.clone().requires_grad_() for _ in range(2)]
        results = [ours(leaves[0] * 2) + 1, compiled(leaves[1])]
        assert torch.equal(*results)
        for result in results:
            result.square().sum().backward()
        assert torch.equal(*(leaf.grad for leaf in leaves))
    for mine, theirs in zip(ours.parameters(), other.parameters(), strict=True):
        assert torch.equal(mine.grad, theirs.grad)
    assert all(map(torch.equal, ours.buffers(), other.buffers()))


def test_running_statistics_of_any_kind(device):
    """momentum None is the average of all batches; without running statistics those of the batch serve evaluation."""
    for change in ({"momentum": None}, {"momentum": 0.3, "eps": 0.5}, {"running_mean": None, "running_var": None}):
        model, ours, x = models(CASES["even"], "fp32", device)
        double = copy.deepcopy(model).double()
        for m in (model, ours, double):
            for name, value in change.items():
                setattr(m.batch_norm, name, value)
            m.batch_norm.track_running_stats = m.batch_norm.running_mean is not None
        for batch in (x, 2 * x):
            model(batch), ours(batch), double(batch.double())
        for m in (model, ours, double):
            m.eval()
        assert explain(ours, x).startswith("fused")
        tolerance.check(ours(x).detach(), double(x.double()).detach(), model(x).detach(), f"output, {change}")
        for name, buffer in double.batch_norm.named_buffers():
            if buffer.is_floating_point():
                found = (dict(m.batch_norm.named_buffers())[name] for m in (ours, model))
                actual, theirs = found
                tolerance.check(actual, buffer, theirs, f"{name}, {change}")
            else:
                assert buffer == dict(ours.batch_norm.named_buffers())[name]


def test_inference_mode_and_an_empty_batch(device):
    _, ours, x = models(CASES["even"], "tf32", device)
    ours.eval()
    expected = ours(x).detach()
    with torch.inference_mode():
        assert torch.equal(ours(x.clone()), expected)
        assert ours(x[:0]).shape == (0, *expected.shape[1:])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("cls", CLASSES)
def test_cuda_graph(cls):
    _, ours, x = models(CASES["even"], cls, "cuda")
    state = copy.deepcopy(ours.state_dict())
    dy = torch.randn(2, 16, 3, 4, device="cuda")
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step(ours, x, dy)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = step(ours, x, dy)
    for scale in (1, 1e-20):
        x.copy_(scale * torch.randn_like(x))
        ours.load_state_dict(state)
        graph.replay()
        found = [t.clone() for t in (*results, *ours.buffers())]
        ours.load_state_dict(state)
        assert all(map(torch.equal, found, (*step(ours, x, dy), *ours.buffers())))
