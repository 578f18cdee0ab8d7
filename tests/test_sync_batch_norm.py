"""Batch norm over the batches of two processes, beside PyTorch's modules in one process that has all of the batch."""

import copy
import functools
import pickle
from contextlib import nullcontext

import pytest
import torch
import torch.distributed as dist
from faults import planted
from ranks import Ranks
from tolerance import check
from torch import nn
from torch.optim import swa_utils
from torch.utils.checkpoint import checkpoint

from modelnew import Model, ModelNew, Sequential, convert_sync_batchnorm, explain, layers
from modelnew.parity import error

FUSED = (16, 16, 3, 1, 1, 1, 4)


@pytest.fixture(scope="module")
def ranks():
    found = Ranks(2, "gloo")
    yield found
    found.stop()


def run(module, batches, call=None):
    """Results of each step, in training and then in evaluation; with the last, parameters' gradients and buffers."""
    found = []
    module.train()
    for x, dy in batches:
        x = x.clone().requires_grad_()
        y = module(x) if call is None else call(x)
        y.backward(dy.to(y.dtype))
        found.append({"output": y.detach(), "dx": x.grad})
        if list(module.buffers()):  # without any, evaluation has the statistics of the rank's own batch
            with torch.no_grad():
                found[-1]["evaluation"] = module.eval()(x)
            module.train()
    parameters = {name: p.grad for name, p in module.named_parameters()}
    return found, parameters, {name: b.clone() for name, b in module.named_buffers()}


def run_part(rank, module, batches, wrap=None, fault=None):
    """`run` of the rank's part of each batch, with `module` synchronised. wrap(module): what is called instead."""
    module = convert_sync_batchnorm(module)
    with planted(*fault) if fault else nullcontext():
        return run(module, [(x[rank], dy[rank]) for x, dy in batches], wrap and wrap(module))


def in_both(ranks, module, batches, splits, **options):
    """What `run` gives, of both ranks together."""
    parts = [tuple(list(map(copied, t.split(split))) for t in batch) for batch, split in zip(batches, splits)]
    (steps, gradients, buffers), (others, other_gradients, other_buffers) = ranks.run(
        functools.partial(run_part, **options), module, parts
    )
    for name, buffer in buffers.items():
        assert torch.equal(buffer, other_buffers[name]), name
    steps = [{name: torch.cat((one[name], other[name])) for name in one} for one, other in zip(steps, others)]
    summed = {name: (g.double() + other_gradients[name].double()).to(g.dtype) for name, g in gradients.items()}
    return steps, summed, buffers


def copied(tensor):
    """A part of a tensor, which pickles no more than it is."""
    return tensor.clone(memory_format=torch.preserve_format)


def batches_of(shape, splits, dtype, module):
    """(x, dy) for each split. Means differ from image to image."""
    found = []
    for split in splits:
        images = sum(split)
        x = (torch.randn(images, *shape) * 2 + 3 * torch.randn(images, *[1] * len(shape))).to(dtype)
        with torch.no_grad():
            y = copy.deepcopy(module).to(dtype)(x)
        found.append((x, torch.randn(y.shape).to(dtype)))
    return found


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


def of_both(name, options):
    """Our layer and torch's, with the same random parameters."""
    ours, theirs = getattr(layers, name), getattr(nn, name)
    options, bias = dict(options), options.get("bias", True)
    options.pop("bias", None)
    module = theirs(options.pop("channels"), **options)
    with torch.no_grad():
        for p in module.parameters():
            p.copy_(torch.randn(p.shape))
    if not bias:
        module.register_parameter("bias", None)
    mine = ours(module.num_features, **options, bias=bias)
    mine.load_state_dict(module.state_dict())
    return mine, module


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


def models(cls="fp32", chain=False):
    """ModelNew, or a chain with LeakyReLU and other layers around, and torch's modules with the same state."""
    theirs, ours = Model(*FUSED), ModelNew(*FUSED, numerics=cls)
    with torch.no_grad():
        for p in theirs.parameters():
            p.add_(torch.randn(p.shape) / 2)
    if chain:
        kinds = theirs.conv_transpose, theirs.batch_norm, nn.LeakyReLU(0.1), theirs.max_pool, theirs.group_norm
        theirs = nn.Sequential(nn.Conv2d(3, 16, 1, bias=False), nn.BatchNorm2d(16), *kinds, nn.Conv2d(16, 4, 1))
        chain = ours.conv_transpose, ours.batch_norm, layers.LeakyReLU(0.1), ours.max_pool, ours.group_norm
        ours = Sequential(nn.Conv2d(3, 16, 1, bias=False), layers.BatchNorm2d(16), *chain, nn.Conv2d(16, 4, 1))
    ours.load_state_dict(theirs.state_dict())
    return ours, theirs


@pytest.mark.parametrize(
    ("cls", "chain", "splits"),
    [
        ("tf32", False, [(3, 2), (1, 4)]),
        ("fp32", False, [(0, 3), (2, 2)]),
        ("fp32", True, [(3, 2)]),
    ],
    ids=["ModelNew, tf32", "ModelNew, fp32, an empty batch", "Sequential"],
)
def test_fused(ranks, cls, chain, splits):
    ours, theirs = models(cls, chain)
    batches = batches_of((3 if chain else 16, 6, 8), splits, torch.float32, theirs)
    found = in_both(ranks, ours, batches, splits)
    check_model(found, ours, theirs, batches, "2.bias" if chain else "conv_transpose.bias")


def check_model(found, ours, theirs, batches, conv_bias):
    """`found` is as near to a float64 run as the fused model in one process is, and that is another test's."""
    truth = run(theirs.double(), [(x.double(), dy.double()) for x, dy in batches])
    one = run(ours, batches)
    for step, of_step in enumerate(found[0]):
        for name, actual in of_step.items():
            as_near(actual, truth[0][step][name], one[0][step][name], f"{name} of step {step}")
    for name, actual in found[1].items():
        if name == conv_bias:  # zero in mathematics: the ranks' own parts cancel
            assert actual.abs().max() < 1e-4 * max(g.abs().max() for g in found[1].values())
        else:
            as_near(actual, truth[1][name], one[1][name], name)
    for name, actual in found[2].items():
        if actual.is_floating_point():
            as_near(actual, truth[2][name], one[2][name], name)
        else:
            assert torch.equal(actual, truth[2][name])


def as_near(actual, truth, other, what):
    ours, theirs = error(actual, truth), error(other, truth)
    allowed = 1.3 * theirs.rms + 4 * torch.finfo(actual.dtype).eps
    assert ours.rms <= allowed, f"{what}: {ours}, in one process {theirs}"


def updated(rank, module, batches):
    module = convert_sync_batchnorm(module)
    swa_utils.update_bn([x[rank] for x in batches], module)
    return {name: b.clone() for name, b in module.named_buffers()}


def test_update_bn(ranks):
    ours, theirs = models()
    batches = [x for x, _ in batches_of((16, 6, 8), [(2, 1), (1, 1)], torch.float32, theirs)]
    parts = [list(map(copied, x.split(split))) for x, split in zip(batches, [(2, 1), (1, 1)])]
    swa_utils.update_bn(batches, theirs)
    for buffers in ranks.run(updated, ours, parts):
        for name, buffer in theirs.named_buffers():
            torch.testing.assert_close(buffers[name], buffer, rtol=1e-4, atol=1e-5)


def gradient_of_bias(rank, module, x, dy):
    module = convert_sync_batchnorm(module)
    module(x[rank]).backward(dy[rank])
    return module.conv_transpose.bias.grad, explain(module, x[rank]) if rank == 0 else None


def test_what_a_rank_does_alone(ranks):
    """`explain`, which exchanges nothing; and its part of the gradient of the convolution's bias, which is not 0."""
    ours, theirs = models()
    x, dy = batches_of((16, 6, 8), [(2, 2)], torch.float32, theirs)[0]
    theirs = theirs.double()
    y = theirs.conv_transpose(x.double())
    out = theirs.group_norm(theirs.max_pool(theirs.tanh(theirs.batch_norm(y))))
    (of_y,) = torch.autograd.grad(out, y, dy.double())
    found = ranks.run(gradient_of_bias, ours, list(map(copied, x.split(2))), list(map(copied, dy.split(2))))
    for (actual, _), expected in zip(found, of_y.split(2)):
        torch.testing.assert_close(actual, expected.sum((0, 2, 3)).float(), rtol=1e-3, atol=1e-4)
    told = found[0][1]
    assert told.startswith("fused")
    assert "conv_bn_pool, conv_bn_statistics, sync_message, sync_statistics, pooled_forward" in told
    assert "sync_parameter_gradients" in told


def test_a_planted_fault_in_the_weights_gradient(ranks):
    ours, theirs = models()
    batches = batches_of((16, 6, 8), [(2, 2)], torch.float32, theirs)
    fault = ("sync_pooled_tail.cu", ("borders[i] -=", "borders[i] -= 0 *"))
    found = in_both(ranks, ours, batches, [(2, 2)], fault=fault)
    with pytest.raises(AssertionError, match=r"conv_transpose\.weight"):
        check_model(found, ours, theirs, batches, "conv_transpose.bias")


def run_hooked(rank, module, parts):
    if rank == 0:
        module.tanh.register_forward_hook(lambda *_: None)
    assert explain(module, parts[0][0][rank]).startswith("fused" if rank else "not fused")
    return run_part(rank, module, parts)


def test_a_fused_rank_beside_one_that_is_not(ranks):
    ours, theirs = models()
    batches = batches_of((16, 6, 8), [(3, 2)], torch.float32, theirs)
    parts = [tuple(list(map(copied, t.split((3, 2)))) for t in batches[0])]
    both = ranks.run(run_hooked, ours, parts)
    output = torch.cat([steps[0]["output"] for steps, *_ in both])
    torch.testing.assert_close(output, run(theirs, batches)[0][0]["output"], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("count", [1, 2, 3])
def test_unfused(ranks, count):
    """What ModelNew fuses of a batch norm without the convolution."""
    subset = ("batch_norm", "tanh", "max_pool")[:count]
    theirs, ours = Model(4, 8, 3, 1, 1, 1, 2), ModelNew(4, 8, 3, 1, 1, 1, 2, replace=subset)
    ours.load_state_dict(theirs.state_dict())
    batches = batches_of((4, 5, 5), [(1, 2)], torch.float32, theirs)
    found = in_both(ranks, ours, batches, [(1, 2)])
    for (name, actual), expected in zip(found[0][0].items(), run(theirs, batches)[0][0].values()):
        torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-4, msg=name)


def checkpointed(reentrant, module):
    return lambda x: checkpoint(module, x, use_reentrant=reentrant)


def autocast(module):
    def call(x):
        with torch.autocast("cpu", torch.bfloat16):
            return module(x)

    return call


def compiled(module):
    return torch.compile(module, backend="eager")


@pytest.mark.parametrize("wrap", [autocast, compiled])
def test_around_the_fused_model(ranks, wrap):
    ours, theirs = models()
    batches = batches_of((16, 6, 8), [(2, 1)], torch.float32, theirs)
    (steps, gradients, _), expected = in_both(ranks, ours, batches, [(2, 1)], wrap=wrap), run(ours, batches, wrap(ours))
    for name in ("output", "dx"):
        torch.testing.assert_close(steps[0][name], expected[0][0][name], rtol=1e-2, atol=1e-2)
    torch.testing.assert_close(
        gradients["conv_transpose.weight"], expected[1]["conv_transpose.weight"], rtol=1e-2, atol=1e-2
    )


def offloaded(module):
    def call(x):
        with torch.autograd.graph.save_on_cpu():
            return module(x)

    return call


@pytest.mark.parametrize(
    "wrap", [functools.partial(checkpointed, True), functools.partial(checkpointed, False), offloaded],
    ids=["reentrant", "not reentrant", "save_on_cpu"],
)  # fmt: skip
@pytest.mark.parametrize("fused", [False, True], ids=["layer", "fused"])
def test_checkpoint(ranks, wrap, fused):
    ours, theirs = models() if fused else of_both("BatchNorm2d", {"channels": 3})
    batches = batches_of((16 if fused else 3, 6, 8), [(2, 1)], torch.float32, theirs)
    expected, found = (in_both(ranks, ours, batches, [(2, 1)], wrap=w) for w in (None, wrap))
    assert torch.equal(found[0][0]["dx"], expected[0][0]["dx"])
    assert all(torch.equal(found[1][name], g) for name, g in expected[1].items())


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


def two_runs(rank, module, x, dy):
    found = [run_part(rank, copy.deepcopy(module), [(x, dy)]) for _ in range(2)]
    return all(torch.equal(a, b) for a, b in zip(*(steps[0].values() for steps, *_ in found)))


def test_two_runs_are_bit_equal(ranks):
    ours, theirs = models()
    x, dy = batches_of((16, 6, 8), [(2, 2)], torch.float32, theirs)[0]
    assert all(ranks.run(two_runs, ours, list(map(copied, x.split(2))), list(map(copied, dy.split(2)))))


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
    norm = layers.BatchNorm2d(3)
    assert convert_sync_batchnorm(norm) is norm
    assert type(convert_sync_batchnorm(nn.BatchNorm2d(3))) is nn.SyncBatchNorm


def test_without_a_process_group_it_is_an_ordinary_batch_norm():
    for module, x in ((layers.BatchNorm2d(3), torch.randn(2, 3, 4, 4)), (ModelNew(*FUSED), torch.randn(2, 16, 4, 4))):
        converted = convert_sync_batchnorm(copy.deepcopy(module))
        for _ in range(2):
            assert torch.equal(converted(x), module(x))
        assert torch.equal(converted.eval()(x), module.eval()(x))
        with pytest.raises((ValueError, RuntimeError)):
            converted.train()(x[:, :1])


def test_torchs_converter_takes_a_synchronised_layer():
    converted = nn.SyncBatchNorm.convert_sync_batchnorm(convert_sync_batchnorm(layers.BatchNorm2d(3)))
    assert type(converted) is nn.SyncBatchNorm
