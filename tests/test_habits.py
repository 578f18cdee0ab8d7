"""What users of torch.nn do with modules: ours beside torch's. docs/works_with.md is the table of it all."""

import contextlib
import copy
import multiprocessing
import re
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from modelnew import Model, ModelNew, functional, layers

pytestmark = pytest.mark.usefixtures("one_thread")

FUSED = (16, 32, 3, 1, 1, 4, 4)
PAIRS = {
    "BatchNorm2d": (layers.BatchNorm2d, nn.BatchNorm2d, (16,)),
    "GroupNorm": (layers.GroupNorm, nn.GroupNorm, (4, 16)),
    "ConvTranspose2d": (layers.ConvTranspose2d, nn.ConvTranspose2d, (16, 8, 3)),
    "ModelNew": (ModelNew, Model, FUSED),
}
EVERY = pytest.mark.parametrize("name", PAIRS)


def batch(device="cpu"):
    return torch.randn(2, 16, 6, 6, device=device)


def pair(name, device, **options):
    """Ours and torch's, with one state."""
    ours, theirs, args = PAIRS[name]
    ours, theirs = ours(*args, device=device, **options), theirs(*args, device=device)
    ours.load_state_dict(theirs.state_dict())
    return ours, theirs


def close(ours, theirs):
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def same_step(ours, theirs, x):
    """Outputs, gradients and states of both agree."""
    x, z = x.clone().requires_grad_(), x.clone().requires_grad_()
    y, expected = ours(x), theirs(z)
    close(y, expected)
    dy = torch.randn_like(y) * (y.abs() > 0)
    y.backward(dy), expected.backward(dy)
    for a, b in zip(ours.state_dict().values(), theirs.state_dict().values(), strict=True):
        close(a, b)
    if not isinstance(theirs, Model):  # of which rounding decides some pooling windows
        close(x.grad, z.grad)


@EVERY
def test_saved_and_loaded(device, name, tmp_path):
    ours, theirs = pair(name, device)
    torch.save(theirs.state_dict(), tmp_path / "theirs.pt")
    torch.save(ours.state_dict(), tmp_path / "ours.pt")
    for module, file in ((ours, "theirs.pt"), (theirs, "ours.pt")):
        module.load_state_dict(torch.load(tmp_path / file, weights_only=True), assign=True)
    same_step(ours, theirs, batch(device))
    torch.save(ours, tmp_path / "whole.pt")
    same_step(torch.load(tmp_path / "whole.pt", weights_only=False), copy.deepcopy(ours), batch(device))


@EVERY
def test_built_on_meta_and_filled(device, name):
    _, theirs = pair(name, device)
    with torch.device("meta"):
        empty = PAIRS[name][0](*PAIRS[name][2])
    assert all(p.is_meta for p in empty.parameters())
    empty = empty.to_empty(device=device)
    empty.load_state_dict(theirs.state_dict())
    same_step(empty, theirs, batch(device))


@EVERY
def test_default_dtype(device, name):
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        ours, theirs = pair(name, device)
        assert {p.dtype for p in ours.parameters()} == {torch.float64}
        same_step(ours, theirs, batch(device))
    finally:
        torch.set_default_dtype(before)


@EVERY
def test_default_device(device, name):
    before = torch.get_default_device()
    torch.set_default_device(device)
    try:
        ours = PAIRS[name][0](*PAIRS[name][2])
        assert {p.device.type for p in ours.parameters()} == {device}
        ours(batch(device)).sum().backward()
    finally:
        torch.set_default_device(None if before.type == "cpu" else before)  # "cpu" would leave a mode behind


@EVERY
def test_activations_kept_elsewhere(device, name):
    """save_on_cpu, and hooks of one's own, which see what a backward keeps."""
    ours, _ = pair(name, device)
    twin, x, packed = copy.deepcopy(ours), batch(device), []
    gradients = []
    for module, context in (
        (ours, contextlib.nullcontext()),
        (twin, torch.autograd.graph.saved_tensors_hooks(lambda t: packed.append(t) or t.clone(), lambda t: t)),
        (copy.deepcopy(ours), torch.autograd.graph.save_on_cpu()),
    ):
        z = x.clone().requires_grad_()
        with context:
            y = module(z)
        y.backward(torch.linspace(-1, 1, y.numel(), device=device).view(y.shape))
        gradients.append([z.grad, *(p.grad for p in module.parameters())])
    assert packed
    for others in gradients[1:]:
        assert all(map(torch.equal, gradients[0], others))


def hooks(module, seen):
    """Every kind of hook that a module takes, each of which notes what it was called with."""

    def note(kind):
        return lambda *args: seen.append(
            (kind, [len(a) if isinstance(a, tuple) else a.shape for a in args[1:] if a is not None])
        )

    module.register_forward_pre_hook(note("before"))
    module.register_forward_hook(note("after"))
    module.register_full_backward_pre_hook(note("before backward"))
    module.register_full_backward_hook(note("after backward"))
    module.register_state_dict_post_hook(lambda *_: seen.append("state"))
    module.register_load_state_dict_pre_hook(lambda *_: seen.append("load"))
    module.register_load_state_dict_post_hook(lambda *_: seen.append("loaded"))


@EVERY
def test_hooks_of_every_kind(device, name):
    seen = [], []
    for module, notes in zip(pair(name, device), seen):
        hooks(module, notes)
        x = batch(device).requires_grad_()
        y = module(x)
        y.register_hook(lambda g, notes=notes: notes.append(("y", g.shape)))
        parameter = next(module.parameters())
        parameter.register_hook(lambda g, notes=notes: notes.append(("parameter", g.shape)))
        parameter.register_post_accumulate_grad_hook(lambda p, notes=notes: notes.append(("accumulated", p.shape)))
        y.sum().backward()
        module.load_state_dict(module.state_dict())
    assert sorted(map(str, seen[0])) == sorted(map(str, seen[1]))
    assert len(seen[0]) >= 10


def test_hook_that_replaces_a_result(device):
    ours, theirs = pair("GroupNorm", device)
    for module in (ours, theirs):
        module.register_forward_pre_hook(lambda _, args: (args[0] * 2,))
        module.register_forward_hook(lambda _, args, y: y + args[0])
        module.register_full_backward_hook(lambda _, dx, dy: (dx[0] * 3,))
    same_step(ours, theirs, batch(device))


@pytest.mark.parametrize(
    "momentum", [np.float32(0.3), np.float64(0.3), torch.tensor(0.3)], ids=lambda m: type(m).__name__
)
def test_momentum_of_any_kind(device, momentum):
    ours, theirs = layers.BatchNorm2d(16, momentum=momentum).to(device), nn.BatchNorm2d(16, momentum=0.3).to(device)
    same_step(ours, theirs, batch(device))


def test_arrays_are_refused_by_name():
    with pytest.raises(TypeError, match=r"tanh: input must be a dense tensor.*received a numpy\.ndarray") as error:
        functional.tanh(np.ones(3, np.float32))
    assert error.value.__suppress_context__  # what the call itself met says less
    with pytest.raises(TypeError, match=r"group_norm: weight .*received a numpy\.ndarray"):
        functional.group_norm(batch(), 4, np.ones(16, np.float32))
    with pytest.raises(TypeError, match=r"conv_transpose2d: input .*received a numpy\.ndarray"):
        ModelNew(4, 8, 3, 1, 1, 1, 2)(np.ones((1, 4, 6, 6), np.float32))


def test_deterministic_algorithms(device):
    """As an error, not a warning: ours has no other."""
    torch.use_deterministic_algorithms(True)
    x = batch(device).requires_grad_()
    ModelNew(*FUSED, device=device)(x).sum().backward()
    layers.MaxPool2d(3, 2)(x).sum().backward()


@pytest.mark.parametrize("name", ["BatchNorm2d", "ModelNew"])
def test_scaled_gradients(device, name):
    """GradScaler: an infinite gradient skips the step, a finite one is unscaled."""
    ours, theirs = pair(name, device)
    for infinite in (False, True):
        for module in (ours, theirs):
            optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
            scaler = torch.amp.GradScaler(device, init_scale=256.0)
            torch.manual_seed(2)
            y = module(batch(device))
            loss = (y * torch.linspace(-1, 1, y.numel(), device=device).view(y.shape)).sum()
            scaler.scale(loss * (float("inf") if infinite else 1)).backward()
            before = [p.clone() for p in module.parameters()]
            scaler.step(optimizer)
            scaler.update()
            assert all(map(torch.equal, before, module.parameters())) == infinite
            assert scaler.get_scale() == (128 if infinite else 256)
    for a, b in zip(ours.parameters(), theirs.parameters()):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)


def test_threads(device):
    """One module, called by several threads at once."""
    module, x = pair("GroupNorm", device)[0], [batch(device) for _ in range(4)]
    expected, found = [module(t) for t in x], [None] * 4

    def work(i):
        found[i] = [module(x[i]) for _ in range(5)]

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(y, expected[i]) for i in range(4) for y in found[i])


def _spawned(pipe, module, x):
    pipe.send(module(x).detach().numpy())


def test_a_spawned_process():
    """Module and tensors travel by pickle, and the child's results are the parent's."""
    module, x = pair("BatchNorm2d", "cpu")[0].eval(), batch()
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=_spawned, args=(there, module, x))
    process.start()
    found = here.recv() if here.poll(60) else None
    process.join()
    assert np.array_equal(found, module(x).detach().numpy())


def test_the_table_names_tests_that_exist():
    root = Path(__file__).parents[1]
    named = set(re.findall(r"`(tests/\w+\.py)`", (root / "docs" / "works_with.md").read_text(encoding="utf-8")))
    assert len(named) > 5
    assert all((root / name).is_file() for name in named)


@pytest.mark.parametrize("number", [np.int64, np.uint8, torch.tensor], ids=lambda n: n.__name__)
def test_whole_numbers_of_other_libraries(number, device):
    x, two = batch(device), number(2)
    assert torch.equal(functional.max_pool2d(x, two, (two, 1)), functional.max_pool2d(x, 2, (2, 1)))
    assert torch.equal(functional.group_norm(x, two), functional.group_norm(x, 2))
    weight = torch.randn(16, 4, 3, 3, device=device)
    given, expected = (functional.conv_transpose2d(x, weight, None, n, (n, 1), groups=n) for n in (two, 2))
    assert torch.equal(given, expected)


def test_bools_are_no_sizes(device):
    for size in (True, (2, True)):
        with pytest.raises(ValueError, match=rf"kernel_size must be an int.*received {re.escape(str(size))}"):
            functional.max_pool2d(batch(device), size)


@EVERY
def test_parameters_changed_before_the_backward(name, device):
    """An error for all that a backward reads, and for biases of norms, which it could do without."""
    ours, _ = pair(name, device)
    for parameter in ours.parameters():
        y = ours(batch(device))
        with torch.no_grad():
            parameter.add_(1)
        if name == "ConvTranspose2d" and parameter is ours.bias:
            y.sum().backward()
            continue
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            y.sum().backward()
