"""Batch norm over the batches of two processes, beside PyTorch's modules in one process that has all of the batch."""

import copy
import pickle
from contextlib import nullcontext

import pytest
import torch
import torch.distributed as dist
from synchronised import FUSED, batches_of, copied, in_both, of_both, run, run_part
from tolerance import check
from torch import nn

from cupy_kernels import sync_batch_norm as ops
from modelnew import ModelNew, calls, convert_sync_batchnorm, layers
from modelnew.parity import error


def compare(found, truth, theirs, terms):
    """`found` beside `theirs`, both against `truth`: what `run` gives. terms: values of a channel."""
    for step, (ours, expected, others) in enumerate(zip(found[0], truth[0], theirs[0])):
        for name, actual in ours.items():
            check(actual, expected[name], others[name], f"{name} of step {step}")
    for name, actual in found[1].items():
        check(actual, truth[1][name], theirs[1][name], f"gradient of {name}", terms)
    for name, actual in found[2].items():
        if actual.is_floating_point():
            check(actual, truth[2][name].double(), theirs[2][name], name, terms)
        else:
            assert torch.equal(actual, truth[2][name])


LAYERS = {
    "BatchNorm2d": ("BatchNorm2d", {}, (3, 4, 5), [(3, 2), (1, 4)]),
    "BatchNorm1d": ("BatchNorm1d", {"momentum": None}, (5,), [(4, 7), (1, 1), (3, 3)]),
    "BatchNorm1d, [N, C, L]": ("BatchNorm1d", {"affine": False}, (2, 6), [(2, 3)]),
    "BatchNorm3d": ("BatchNorm3d", {"eps": 0.1, "momentum": 0.7}, (3, 2, 3, 2), [(2, 1)]),
    "untracked": ("BatchNorm2d", {"track_running_stats": False}, (4, 3, 3), [(2, 2)]),
    "no bias": ("BatchNorm2d", {"bias": False}, (4, 3, 3), [(2, 2)]),
    "an empty batch": ("BatchNorm2d", {}, (4, 3, 3), [(0, 3), (3, 0), (2, 2)]),
    "rows": ("BatchNorm1d", {}, (64,), [(40, 33)]),
    "large planes": ("BatchNorm2d", {}, (2, 95, 90), [(1, 2)]),
}


@pytest.mark.parametrize("case", LAYERS)
def test_layer(ranks, case):
    name, options, shape, splits = LAYERS[case]
    ours, theirs = of_both(name, {**options, "channels": shape[0]})
    batches = batches_of(shape, splits, torch.float32, theirs)
    check_layer(ranks, ours, theirs, batches, splits)


def check_layer(ranks, ours, theirs, batches, splits, **options):
    double = run(copy.deepcopy(theirs).double(), [(x.double(), dy.double()) for x, dy in batches])
    found = in_both(ranks, ours, batches, splits, **options)
    compare(found, double, run(theirs, batches), batches[0][0].numel() // batches[0][0].shape[1])


@pytest.mark.parametrize(
    ("dtype", "of_parameters"),
    [
        (torch.float64, torch.float64),
        (torch.float16, torch.float16),
        (torch.bfloat16, torch.bfloat16),
        (torch.bfloat16, torch.float32),
    ],
    ids=str,
)
def test_dtypes(ranks, dtype, of_parameters):
    ours, theirs = of_both("BatchNorm2d", {"channels": 3})
    batches = batches_of((3, 4, 5), [(3, 2)], torch.float32, nn.Identity())
    batches = [(x.to(dtype), dy.to(dtype)) for x, dy in batches]
    check_layer(ranks, ours.to(of_parameters), theirs.to(of_parameters), batches, [(3, 2)])


@pytest.mark.parametrize("dim", [4, 5])
def test_channels_last(ranks, dim):
    ours, theirs = of_both(f"BatchNorm{dim - 2}d", {"channels": 8})
    memory_format = {4: torch.channels_last, 5: torch.channels_last_3d}[dim]
    batches = batches_of((8, 3, 2, 2)[: dim - 1], [(3, 2)], torch.float32, theirs)
    batches = [(x.contiguous(memory_format=memory_format), dy) for x, dy in batches]
    check_layer(ranks, ours, theirs, batches, [(3, 2)])
    parts = [tuple(list(map(copied, t.split((3, 2)))) for t in batches[0])]
    for steps, *_ in ranks.run(run_part, ours, parts):
        assert steps[0]["output"].is_contiguous(memory_format=memory_format)
        assert steps[0]["dx"].is_contiguous(memory_format=memory_format)


@pytest.mark.parametrize("fault", [None, " + step * step * (n * before / count)"], ids=["right", "planted"])
def test_means_far_apart(ranks, fault):
    """A variance that the distance between the ranks' means makes, and one that is small beside the means."""
    ours, theirs = of_both("BatchNorm2d", {"channels": 2})
    x = torch.randn(4, 2, 5, 5)
    x[:2, 0] += 1000
    x[:, 1] += 3000
    batches = [(x, torch.randn_like(x))]
    planted_fault = ("sync_batch_norm.cu", (fault, "")) if fault else None
    with pytest.raises(AssertionError, match="output of step 0") if fault else nullcontext():
        check_layer(ranks, ours, theirs, batches, [(2, 2)], fault=planted_fault)


def test_large_values(ranks):
    """Squares beyond float32's range."""
    x = torch.randn(4, 2, 3, 3) * 1e30
    ours, theirs = of_both("BatchNorm2d", {"channels": 2})
    (steps, *_), double = (
        in_both(ranks, ours, [(x, torch.randn_like(x))], [(2, 2)]),
        copy.deepcopy(theirs).double()(x.double()),
    )
    assert error(steps[0]["output"], double.detach()).rms < 1e-6


@pytest.mark.parametrize("scale", [1, 1e30])
def test_many_ranks(scale):
    """The kernels alone, with messages of five ranks, one of them without any values."""
    counts, channels = (7, 1, 0, 300, 2), 3
    parts = [scale * (torch.randn(n, channels) + 10 * torch.randn(channels)) for n in counts]
    messages = torch.zeros(len(counts), 2 * channels + 1, dtype=torch.float64)
    for part, message in zip(parts, messages):
        mean, invstd = part.mean(0), 1 / part.double().std(0, unbiased=False).float()
        calls.run(ops.sync_message, mean, invstd, None, message, count=len(part))
    running = torch.zeros(channels), torch.ones(channels)
    mean, invstd, distance = (torch.empty(channels) for _ in range(3))
    share = torch.empty(1, dtype=torch.float64)
    results = (mean, invstd, distance, share)
    calls.run(ops.sync_statistics, messages, messages[3], *running, None, None, *results, momentum=0.5, eps=1e-5)
    whole = torch.cat(parts).double()
    assert error(mean, whole.mean(0)).max < 1e-6
    assert error(invstd, 1 / (whole.var(0, unbiased=False) + 1e-5).sqrt()).max < 1e-6
    assert error(distance, (parts[3].double().mean(0) - whole.mean(0)) / whole.std(0, unbiased=False)).max < 1e-5
    assert error(running[0], whole.mean(0) / 2).max < 1e-6
    if scale == 1:  # float32 has no variance of 1e60
        assert error(running[1], (1 + whole.var(0)) / 2).max < 1e-6
    assert share.item() == 300 / sum(counts)
    gathered = torch.randn(len(counts), 2, channels, dtype=torch.float64)
    sums = torch.empty(2, channels, dtype=torch.float64)
    calls.run(ops.sync_sums, gathered, share, sums)
    torch.testing.assert_close(sums, gathered.sum(0) * share)


def refused(rank, module, x):
    convert_sync_batchnorm(module)
    before, messages = copy.deepcopy(module.state_dict()), []
    x = x.clone().requires_grad_()
    y = module(x)
    try:
        torch.autograd.grad(y.sum(), x, create_graph=True)
    except RuntimeError as error:
        messages.append(str(error))
    module.load_state_dict(before)
    try:
        module(torch.cat((x, x), 1))  # without a word to the other rank
    except (RuntimeError, ValueError) as error:
        messages.append(str(error))
    unchanged = all(map(torch.equal, before.values(), module.state_dict().values()))
    return messages, unchanged


@pytest.mark.parametrize("fused", [False, True], ids=["layer", "fused"])
def test_refused_calls(ranks, fused):
    module = ModelNew(*FUSED) if fused else layers.BatchNorm2d(16)
    for messages, unchanged in ranks.run(refused, module, torch.randn(2, 16, 6, 6)):
        assert "no second derivatives" in messages[0]
        assert len(messages) == 2
        assert unchanged


def grouped(rank, module, x):
    groups = [dist.new_group([0]), dist.new_group([1]), dist.new_group([0, 1])]
    expected = copy.deepcopy(module)(x[rank])
    alone = convert_sync_batchnorm(copy.deepcopy(module), groups[rank])(x[rank])
    together = copy.deepcopy(convert_sync_batchnorm(module, groups[2]))(x[rank])
    try:
        convert_sync_batchnorm(module, groups[1 - rank])(x[rank])
    except RuntimeError as error:
        return torch.equal(alone, expected), together, str(error)


def test_groups(ranks):
    """Of one process, of both, and one that the process is not in."""
    x = torch.randn(4, 3, 2, 2)
    found = ranks.run(grouped, layers.BatchNorm2d(3), list(map(copied, x.split(2))))
    for rank, (alone, _, message) in enumerate(found):
        assert alone
        assert f"that rank {rank} is not in" in message
    together = torch.cat([t.detach() for _, t, _ in found])
    torch.testing.assert_close(together, nn.BatchNorm2d(3)(x).detach())


def test_conversion():
    """In place, of what is ours; torch's own become torch's; and what was pickled is synchronised."""
    network = nn.Sequential(layers.BatchNorm1d(3), nn.Sequential(nn.BatchNorm2d(4), ModelNew(*FUSED)))
    state, ours = network.state_dict(), (network[0], network[1][1].batch_norm)
    assert convert_sync_batchnorm(network) is network
    assert (network[0], network[1][1].batch_norm) == ours
    assert all("synchronised" in repr(layer) for layer in ours)
    assert type(network[1][0]) is nn.SyncBatchNorm
    assert all(map(torch.equal, state.values(), network.state_dict().values()))
    for again in (copy.deepcopy(network), pickle.loads(pickle.dumps(network))):
        assert "synchronised" in repr(again[0])
    norm = nn.BatchNorm1d(3)
    twice = convert_sync_batchnorm(nn.Sequential(norm, norm))
    assert all(type(child) is nn.SyncBatchNorm for child in twice)
    norm = layers.BatchNorm2d(3)
    assert convert_sync_batchnorm(norm) is norm
    assert type(convert_sync_batchnorm(nn.BatchNorm2d(3))) is nn.SyncBatchNorm


@pytest.mark.parametrize("norm", [nn.BatchNorm2d(3), layers.BatchNorm2d(3)])
def test_what_cannot_be_converted(norm):
    with pytest.raises(TypeError, match=r"module must be a torch\.nn\.Module, received a list"):
        convert_sync_batchnorm([norm])
    network = nn.Sequential(norm)
    with pytest.raises(TypeError, match=r"process_group must be None or a group .*, received \[0, 1\]"):
        convert_sync_batchnorm(network, [0, 1])
    assert network[0] is norm
    assert "synchronised" not in repr(norm)


def test_without_a_process_group_it_is_an_ordinary_batch_norm():
    for module, x in ((layers.BatchNorm2d(3), torch.randn(2, 3, 4, 4)), (ModelNew(*FUSED), torch.randn(2, 16, 4, 4))):
        converted = convert_sync_batchnorm(copy.deepcopy(module))
        for _ in range(2):
            assert torch.equal(converted(x), module(x))
        assert torch.equal(converted.eval()(x), module.eval()(x))
        with pytest.raises((ValueError, RuntimeError)):
            converted.train()(x[:, :1])


def sparse(rank, module):
    try:
        convert_sync_batchnorm(module)(torch.ones(2, 3).to_sparse())
    except RuntimeError as error:
        return str(error)


def test_what_is_no_dense_tensor_is_named(ranks):
    assert all("input must be a dense tensor" in message for message in ranks.run(sparse, layers.BatchNorm1d(3)))
