"""Calls that are repeated: which are, and that a repeated call is the call."""

import math
import threading
import traceback

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._subclasses import FakeTensor, FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._device import DeviceContext
from torch.utils._mode_utils import no_dispatch
from torch.utils._pytree import tree_map
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from cupy_kernels import launch, source
from modelnew import calls, explain, layers, replays, shortcuts
from modelnew.functional import batch_norm, conv_transpose2d, group_norm, leaky_relu, max_pool2d, tanh

LAYERS = {
    "BatchNorm2d": lambda kind: kind.BatchNorm2d(3),
    "BatchNorm2d, eval": lambda kind: kind.BatchNorm2d(3).eval(),
    "Tanh": lambda kind: kind.Tanh(),
    "MaxPool2d": lambda kind: kind.MaxPool2d(2),
    "GroupNorm": lambda kind: kind.GroupNorm(1, 3),
    "ConvTranspose2d": lambda kind: kind.ConvTranspose2d(3, 2, 3, padding=1),
}
FORMATS = (torch.contiguous_format, torch.channels_last)
_CACHES = calls.caches
pytestmark = pytest.mark.usefixtures("fresh_plans")


@pytest.fixture
def written(monkeypatch):
    """The names of what ran as written: public functions, and backwards."""
    names = []
    repeated = replays.repeated

    def noting(key, known, tensors, as_written, *given):
        def run(*args, **options):
            names.append(key[0].__name__ if isinstance(key, tuple) else "backward")
            return as_written(*args, **options)

        return repeated(key, known, tensors, run, *given)

    monkeypatch.setattr(replays, "repeated", noting)
    return names


def batch(device="cpu", shape=(2, 3, 6, 4), dtype=torch.float32, memory_format=torch.contiguous_format):
    return torch.randn(shape, device=device, dtype=dtype).to(memory_format=memory_format)


def step(module, x, dy=None, clip=False):
    """y and all gradients. clip: y is changed in place."""
    x = x.clone(memory_format=torch.preserve_format).requires_grad_()
    y = module(x).relu_() if clip else module(x)
    dy = torch.ones_like(y) if dy is None else dy
    return y, *torch.autograd.grad(y, [x, *module.parameters()], dy)


@pytest.mark.parametrize("memory_format", FORMATS, ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("compiled", [False, True])
def test_repeated_calls_are_torchs(device, written, compiled, name, memory_format):
    """Compiled modules call the operators of torch.library."""
    ours, theirs = (LAYERS[name](kind).to(device) for kind in (layers, nn))
    theirs.load_state_dict(ours.state_dict())
    strides = []
    if compiled:
        torch._dynamo.reset()
        ours.compile(backend="eager", fullgraph=True)
    for _ in range(5):
        x = batch(device, memory_format=memory_format)
        with torch.no_grad():
            torch.testing.assert_close(ours(x), theirs(x), rtol=1e-4, atol=1e-5)
        dy = torch.randn_like(theirs(x)).contiguous(memory_format=memory_format)
        found, expected = step(ours, x, dy), step(theirs, x, dy)
        for one, other in zip(found, expected):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
        strides.append([tensor.stride() for tensor in found])
        theirs.load_state_dict(ours.state_dict())  # one more call than ours, for dy
    assert all(found == strides[0] for found in strides)
    if (name, memory_format) == ("ConvTranspose2d", torch.channels_last):
        return  # its kernels take a copy
    # Forward, forward with autograd, and backward: two calls each. Some registered forwards are the same for autograd.
    assert len(written) == 6 or (compiled and len(written) == 5)
    torch.testing.assert_close(list(ours.buffers()), list(theirs.buffers()))


@pytest.mark.parametrize("memory_format", FORMATS, ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("name", [name for name in LAYERS if name != "Tanh"])  # its gradient needs its result
def test_results_may_be_changed_in_place(device, name, memory_format):
    """As by ReLU(inplace=True): they are no views, which autograd would refuse, and detach_ and resize_, too."""
    ours, theirs = (LAYERS[name](kind).to(device) for kind in (layers, nn))
    theirs.load_state_dict(ours.state_dict())
    for grad in (True, True, True, False, False, False):
        x = batch(device, memory_format=memory_format)
        with torch.set_grad_enabled(grad):
            assert not ours(x)._is_view()
            theirs(x)
        if grad:
            found, expected = (step(module, x, clip=True) for module in (ours, theirs))
            for one, other in zip(found, expected):
                torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


def test_statistics_and_counter_are_updated(written):
    ours, theirs = layers.BatchNorm2d(3), nn.BatchNorm2d(3)
    for number in range(1, 4):
        x = batch()
        before = ours.running_mean._version
        ours(x), theirs(x)
        assert ours.running_mean._version == before + 1
        assert ours.num_batches_tracked == theirs.num_batches_tracked == number
    torch.testing.assert_close(ours.running_var, theirs.running_var)
    assert len(written) == 2


@pytest.mark.parametrize("dtype", [torch.int32, torch.float32])
def test_counters_that_kernels_do_not_count(written, dtype):
    ours = layers.BatchNorm2d(3)
    ours.num_batches_tracked = ours.num_batches_tracked.to(dtype)
    for _ in range(3):
        ours(batch())
    assert ours.num_batches_tracked == 3
    assert len(written) == 3


def test_numbers_that_differ_at_each_call(written):
    """As the momentum of an average over all batches does."""
    ours, theirs = (kind.BatchNorm2d(3, momentum=None) for kind in (layers, nn))
    ours(batch())
    theirs.load_state_dict(ours.state_dict())
    known = len(calls.caches().replays)
    for _ in range(5):
        x = batch()
        torch.testing.assert_close(ours(x), theirs(x), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(list(ours.buffers()), list(theirs.buffers()))
    assert len(calls.caches().replays) == known
    assert len(written) == 6


def test_numbers_that_are_equal_and_not_the_same():
    x = batch()
    w, low = torch.randn(3, 2, 3, 3), -x.abs()
    for _ in range(3):
        max_pool2d(x, 2), max_pool2d(x, (2, 2)), group_norm(x, 3), conv_transpose2d(x, w), leaky_relu(low, 0.0)
    for call in (
        lambda: max_pool2d(x, 2.0),
        lambda: max_pool2d(x, (2, 2.0)),
        lambda: group_norm(x, 3.0),
        lambda: conv_transpose2d(x, w, groups=True),
    ):
        with pytest.raises((TypeError, ValueError), match="int"):
            call()
    assert leaky_relu(low, -0.0).signbit().equal(F.leaky_relu(low, -0.0).signbit())
    for slope in (math.inf, -math.inf, math.nan):
        for _ in range(3):
            torch.testing.assert_close(leaky_relu(x, slope), F.leaky_relu(x, slope), equal_nan=True)


class Kept(torch.Tensor):
    """A subclass that has its own memory, and is the type of all results."""

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        with no_dispatch():
            args = tree_map(lambda a: a.as_subclass(torch.Tensor) if isinstance(a, cls) else a, args)
            results = function(*args, **(kwargs or {}))
            return tree_map(lambda a: a.as_subclass(cls) if isinstance(a, torch.Tensor) else a, results)


def test_subclasses_that_handle_operators():
    x = batch()
    for _ in range(4):
        assert type(tanh(x)) is torch.Tensor
        assert type(tanh(x.as_subclass(Kept))) is Kept


def test_what_is_known_is_bounded(monkeypatch):
    monkeypatch.setattr(calls, "_MOST_KNOWN", 4)
    monkeypatch.setattr(replays, "_MOST_REPLAYS", 2)
    for size in range(1, 7):
        for x in (torch.randn(size, 4), torch.randn(4, size).T, torch.randn(size, 8)[:, ::2]):
            for _ in range(3):
                torch.testing.assert_close(tanh(x), x.tanh(), rtol=1e-4, atol=1e-5)
    assert all(len(cache) <= 4 for cache in vars(calls.caches()).values())
    assert all(len(found) <= 2 for found in calls.caches().replays.values())


OTHERS = {
    "shape": lambda x: batch(shape=(2, 3, 4, 4)),
    "dtype": lambda x: x.double(),
    "strides": lambda x: x.transpose(2, 3),
    "an offset": lambda x: torch.randn(x.numel() + 1)[1:].view(x.shape),
    "negated": lambda x: torch._neg_view(x),
    "a batch of none": lambda x: x[:0],
    "expanded": lambda x: x[:1].expand_as(x),
    "a subclass": lambda x: nn.Parameter(x, requires_grad=False),
}


@pytest.mark.parametrize("what", OTHERS)
def test_other_tensors_are_not_taken_for_the_same(what):
    """As input of a forward, and as gradient of a backward."""
    for _ in range(3):
        tanh(batch())
    x = OTHERS[what](batch())
    for _ in range(2):
        torch.testing.assert_close(tanh(x), torch.tanh(x), rtol=1e-4, atol=1e-5)
    if what in ("strides", "an offset", "negated", "expanded"):
        module, y = layers.Tanh(), batch()
        for _ in range(3):
            step(module, y, batch())
        dy = OTHERS[what](batch()) if what != "strides" else batch(shape=(2, 3, 4, 6)).transpose(2, 3)
        for _ in range(2):
            torch.testing.assert_close(step(module, y, dy), step(nn.Tanh(), y, dy), rtol=1e-4, atol=1e-5)


def test_tensors_that_share_memory(written):
    x, affine = batch(), torch.rand(3)
    for _ in range(3):
        found = batch_norm(x, None, None, affine, affine, True)
        torch.testing.assert_close(found, F.batch_norm(x, None, None, affine, affine, True), rtol=1e-4, atol=1e-5)
    assert len(written) == 3


def test_settings_are_part_of_the_kind(written):
    x, w = batch(), torch.randn(3, 2, 3, 3)
    for dtype in (torch.bfloat16, torch.float16, torch.bfloat16):
        with torch.autocast("cpu", dtype):
            assert conv_transpose2d(x, w).dtype == conv_transpose2d(x.to(dtype), w.to(dtype)).dtype == dtype
    low = x.bfloat16(), w.bfloat16()  # no cast, so that the call is repeated
    for dtype in (*3 * [torch.bfloat16], torch.float16):
        with torch.autocast("cpu", dtype):
            assert conv_transpose2d(*low).dtype == dtype
    for arguments in ((2,), (3, 1), ([2, 2],), (2, 2, 1)):
        for _ in range(3):
            assert max_pool2d(x, *arguments).equal(F.max_pool2d(x, *arguments))
    x.requires_grad_()
    for _ in range(3):
        assert tanh(x).requires_grad
        with torch.no_grad():
            assert not tanh(x).requires_grad
        with torch.inference_mode():
            assert tanh(x).is_inference()


def test_what_records_or_transforms_operators_sees_them():
    x, v, module = batch(), batch(), layers.Tanh()
    for _ in range(3):
        tanh(x), step(module, x)
    torch.testing.assert_close(torch.func.grad(lambda t: tanh(t).sum())(x), 1 - x.tanh() ** 2, rtol=1e-3, atol=1e-4)
    assert torch.func.vmap(tanh)(x).equal(tanh(x))
    with pytest.raises(RuntimeError, match="forward-mode"):
        torch.func.jvp(tanh, (x,), (v,))
    with FlopCounterMode(display=False) as flops:
        conv_transpose2d(x, torch.randn(3, 2, 3, 3))
    assert flops.get_total_flops()
    assert "modelnew.tanh" in make_fx(tanh)(x).code
    with FakeTensorMode() as mode:
        assert isinstance(tanh(mode.from_tensor(x)), FakeTensor)
    assert tanh(x.to("meta")).is_meta
    leaf = x.clone().requires_grad_()
    y = tanh(leaf)
    for _ in range(3):
        torch.autograd.grad(y, leaf, v, retain_graph=True)
    with pytest.raises(RuntimeError, match="operators are recorded"):
        make_fx(lambda dy: torch.autograd.grad(y, leaf, dy, retain_graph=True))(v)
    with DeviceContext("cpu"):  # a mode for functions
        assert tanh(x).equal(tanh(x))


def test_second_derivatives_after_repeated_calls():
    x, v = batch(), batch()
    for memory_format in FORMATS:
        x = x.detach().to(memory_format=memory_format)
        for _ in range(3):
            step(layers.Tanh(), x)
        x.requires_grad_()
        for _ in range(3):
            y = tanh(x)
            (dx,) = torch.autograd.grad(y, x, torch.ones_like(y), create_graph=True)
            (second,) = torch.autograd.grad(dx, x, v)
            y = x.detach().tanh()
            torch.testing.assert_close(second, -2 * y * (1 - y * y) * v, rtol=1e-3, atol=1e-4)


def test_backward_twice_and_in_another_thread():
    module, x = layers.BatchNorm2d(3, track_running_stats=False), batch()
    expected, found = [step(module, x, x) for _ in range(4)][-1], []
    leaf = x.clone().requires_grad_()
    y = module(leaf)

    def backward():
        found.append(torch.autograd.grad(y, [leaf, *module.parameters()], x, retain_graph=True))

    for _ in range(2):
        thread = threading.Thread(target=backward)
        thread.start()
        thread.join()
    for _ in range(3):
        backward()
    assert len(found) == 5
    for gradients in found:
        torch.testing.assert_close(gradients, expected[1:], rtol=0, atol=0)


def test_saved_tensors_that_others_handle():
    module, x = layers.Tanh(), batch()
    plain = [step(module, x) for _ in range(4)][-1]
    graph = torch.autograd.graph
    for hooks in (graph.saved_tensors_hooks(lambda t: t.double(), lambda t: t.float()), graph.save_on_cpu()):
        with hooks:
            torch.testing.assert_close(step(module, x), plain)
    for reentrant in (True, False):
        for _ in range(3):
            leaf = x.clone().requires_grad_()
            (found,) = torch.autograd.grad(checkpoint(module, leaf, use_reentrant=False).sum(), leaf)
            torch.testing.assert_close(found, plain[1])
            checkpoint(module, leaf, use_reentrant=reentrant).sum().backward()
            torch.testing.assert_close(leaf.grad, plain[1])


def test_parameters_that_are_replaced():
    module, x = layers.GroupNorm(1, 3), batch()
    for _ in range(3):
        step(module, x)
    module.weight.data = torch.rand(6)[::2]
    module.bias.data = torch.rand(3)
    torch.testing.assert_close(module(x), F.group_norm(x, 1, module.weight, module.bias), rtol=1e-4, atol=1e-5)
    module.weight.requires_grad_(False)
    for _ in range(3):
        y = module(x)
        (gradient,) = torch.autograd.grad(y.sum(), module.bias)
        torch.testing.assert_close(gradient, torch.full((3,), 2.0 * 6 * 4))
        with pytest.raises(RuntimeError, match="does not require grad"):
            torch.autograd.grad(module(x).sum(), module.weight)
    module.double()
    assert module(x.double()).dtype == torch.float64
    x.untyped_storage().resize_(0)
    for _ in range(2):
        with pytest.raises(RuntimeError, match="without memory"):
            tanh(x)


def test_a_kernel_is_edited_between_two_calls(monkeypatch):
    monkeypatch.setattr(calls, "caches", _CACHES)  # an edit empties it
    x = batch().requires_grad_()
    for _ in range(3):
        y = tanh(x)
        y.sum().backward()
    edited = source.packaged_kernels("tanh.cu")["tanh_forward"].replace("tanh_of(", "-tanh_of(")
    with source.override({"tanh_forward": edited}):
        for _ in range(3):
            assert tanh(x).equal(-y)
    assert tanh(x).equal(y)


def test_explain_between_two_calls(written):
    module, x = layers.Tanh(), batch()
    for _ in range(3):
        step(module, x)
    assert "tanh_forward" in explain(module, x)
    assert "tanh_backward" in explain(module, x)
    torch.testing.assert_close(step(module, x), step(nn.Tanh(), x), rtol=1e-4, atol=1e-5)


def test_statistics_changed_before_the_backward():
    module = layers.BatchNorm2d(3).eval()
    for _ in range(3):
        y = module(batch().requires_grad_())
        module.running_mean.add_(1)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            y.sum().backward()


@pytest.mark.parametrize("memory_format", FORMATS, ids=["contiguous", "channels_last"])
def test_observers_see_every_launch(written, memory_format):
    x, seen = batch(memory_format=memory_format), []
    for _ in range(3):
        tanh(x)
    with launch.observed(lambda *launched: seen.append(launched)):
        for _ in range(2):
            tanh(x)
    assert [args[1].shape for _, _, _, args, _ in seen] == 2 * [args[0].shape for _, _, _, args, _ in seen[:1]]
    assert seen[0][3][0].size == x.numel()
    assert len(written) == 2


def test_threads_have_their_own():
    module, failed = layers.BatchNorm2d(3, track_running_stats=False), []

    def run():
        for _ in range(5):
            x = batch()
            try:
                torch.testing.assert_close(module(x), F.batch_norm(x, None, None, training=True), rtol=1e-3, atol=1e-4)
            except Exception as error:
                failed.append(error)

    threads = [threading.Thread(target=run) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed


def test_memory_by_torchs_shortcut(monkeypatch, written, device):
    monkeypatch.setattr(replays, "allocator", shortcuts.allocator)  # tests have the public one, which poisons memory
    ours, theirs = layers.BatchNorm2d(3).to(device), nn.BatchNorm2d(3).to(device)
    for _ in range(5):
        x = batch(device)
        torch.testing.assert_close(step(ours, x, x), step(theirs, x, x), rtol=1e-4, atol=1e-4)
    assert len(written) == 4


def test_without_torchs_guards(monkeypatch, written):
    monkeypatch.setattr(replays, "guard_of", shortcuts.Public.guard_of)
    x = batch()
    for _ in range(3):
        assert tanh(x).equal(tanh(x))
    assert len(written) == 6


def test_numpys_numbers_of_equal_bytes_are_not_equal():
    """marshal writes their bytes, and not their type."""
    x = torch.randn(2, 2, 6, 6)
    for small, large in ((np.int8(-1), np.uint8(255)), (np.float32(1), np.int32(0x3F800000))):
        for slope in (small, small, small, large, large, large):
            assert torch.equal(leaky_relu(x, slope), F.leaky_relu(x, float(slope)))
    for _ in range(3):
        assert torch.equal(max_pool2d(x, 3, 1, np.int64(1)), F.max_pool2d(x, 3, 1, 1))
    with pytest.raises(ValueError, match="padding must be an int or a pair of ints, received array"):
        max_pool2d(x, 3, 1, np.array([1, 0], np.int32))


def test_wrong_arguments_are_named_once():
    """The search for a replay takes the same arguments, and says nothing."""
    for call in (lambda: max_pool2d(torch.randn(1, 2, 4, 4)), lambda: max_pool2d(2), lambda: tanh(torch.arange(3))):
        with pytest.raises(TypeError) as caught:
            call()
        assert "find()" not in "".join(traceback.format_exception(caught.value))
