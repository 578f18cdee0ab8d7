"""Calls of the fused model: layouts, what is kept for a backward, graphs, copies, and what is refused."""

import copy
import pickle

import numpy as np
import pytest
import torch
from fused_models import CASES, CLASSES, models, peak, sized, step
from strided import IN_EVERY_LAYOUT

from cupy_kernels import conv_bn_pool_backward as back
from cupy_kernels import source
from cupy_kernels.conv_transpose import Geometry
from cupy_kernels.errors import UnsupportedError
from modelnew import ModelNew, calls, explain, numerics
from modelnew.functional import conv_bn_tanh_max_pool_group_norm
from modelnew.functional.conv_transpose_kernels import gradient_plans
from modelnew.model import fused_model


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
    """The peak is one stage's: the pooled gradients are gone before wgrad, packed x and wgrad's parts before dgrad."""
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
    of_backward = back.gradient_arrays(fused_model(ours, x)[0], 16, True, x.shape, True)
    arrays = {name: sized(*array) for name, array in of_backward.items()}
    passed_on = sum(arrays[name] for name in ("sums", "dy_exponents", "dy_packed", "borders"))
    of_wgrad = arrays["x_packed"] + sized((wgrad.partial_size,), np.float32)
    of_dgrad = sized((dgrad.packed_size,), np.float16)
    stage = max(
        arrays["g"] + arrays["partials"] + arrays["x_packed"], w.nbytes + of_wgrad, w.nbytes + of_dgrad + x.nbytes
    )
    assert found <= passed_on + stage + 8192


@pytest.mark.parametrize("cls", CLASSES)
def test_repeated_steps_give_memory_back_early(device, cls, monkeypatch):
    """Launches are observed, as in every test: those of a stage that others precede, too."""
    monkeypatch.setattr(calls, "_LARGE", 0)
    with source.override({}):
        theirs, ours, x = models((16, 16, 3, 1, 4, 4, 18, 20), cls, device)
        dy = torch.ones_like(theirs(x))
        ours(x)
        for _ in range(4):
            torch.testing.assert_close(step(ours, x, dy), step(theirs, x, dy), rtol=2e-2, atol=2e-2)


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


def test_forward_mode_is_refused_where_nothing_requires_a_gradient():
    x = torch.randn(2, 16, 4, 4)
    with torch.no_grad(), torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, x)
        with pytest.raises((RuntimeError, NotImplementedError), match=r"jvp|forward"):
            conv_bn_tanh_max_pool_group_norm(
                dual, None, None, training=True, conv_weight=torch.randn(16, 16, 3, 3), num_groups=4
            )


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


@IN_EVERY_LAYOUT
def test_layouts(device, make):
    """Of input, incoming gradient and weights; results are those of contiguous tensors, bit for bit."""
    _, ours, x = models(CASES["even"], "tf32", device)
    dy = torch.randn(2, 16, 3, 4, device=device)
    expected = step(ours, x, dy)
    ours.conv_transpose.weight.data = make(ours.conv_transpose.weight.data)
    for result, right in zip(step(ours, make(x), make(dy)), expected, strict=True):
        assert torch.equal(result, right)


def test_an_expanded_incoming_gradient(device):
    _, ours, x = models(CASES["even"], "tf32", device)
    expanded = torch.randn(1, device=device).expand(2, 16, 3, 4)
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
    sums, two bits for each winner and statistics, besides x and parameters.
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
        < places * y[:, :, 0, 0].numel() * (4 * 2 + 4 + 1 / 4) * 1.02
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
