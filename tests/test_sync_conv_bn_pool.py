"""The fused chains with batch norm over the batches of two processes, beside PyTorch's modules in one process."""

import copy
import functools
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from synchronised import batches_of, copied, in_both, models, of_both, run, run_part
from torch.fx.experimental.proxy_tensor import make_fx
from torch.optim import swa_utils
from torch.utils.checkpoint import checkpoint

from modelnew import Model, ModelNew, convert_sync_batchnorm, distributed, explain, layers
from modelnew.functional import sync_batch_norm, sync_conv_bn_pool
from modelnew.parity import error


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


@pytest.mark.parametrize("kind", ["layer", "channels_last", "tf32", "fp32", "frozen"])
def test_two_threads_as_ranks(device, kind, monkeypatch):
    """The kernels on one GPU, too, which two processes of NCCL cannot share."""
    layer = kind in ("layer", "channels_last")
    ours, theirs = of_both("BatchNorm2d", {"channels": 16}) if layer else models("tf32" if kind == "tf32" else "fp32")
    if kind == "frozen":
        for module in (ours, theirs):
            for part in (module.conv_transpose.weight, module.batch_norm.bias, module.group_norm.weight):
                part.requires_grad_(False)
    x, dy = batches_of((16, 6, 8), [(3, 2)], torch.float32, theirs)[0]
    x = x.contiguous(memory_format=torch.channels_last) if kind == "channels_last" else x
    ours, theirs, batches = ours.to(device), theirs.to(device), [(x.to(device), dy.to(device))]
    together, sent, thread = threading.Barrier(2, timeout=60), [None, None], threading.local()

    def exchange(message, group):
        sent[thread.rank] = message
        together.wait()
        found = torch.cat([message.view(-1) for message in sent])
        together.wait()
        return found

    for module in (sync_batch_norm, sync_conv_bn_pool):
        monkeypatch.setattr(module, "gathered", exchange)
    monkeypatch.setattr(distributed.Peers, "counterpart", lambda _, function: distributed._synchronised(function, None))

    def rank_of(rank):
        thread.rank = rank
        parts = [[t.split((3, 2))[rank] for t in batch] for batch in batches]
        with torch.autograd.set_multithreading_enabled(False):  # a backward for each thread
            return run(convert_sync_batchnorm(copy.deepcopy(ours)), parts)

    with ThreadPoolExecutor(2) as threads:
        (one, gradients, _), (other, other_gradients, _) = threads.map(rank_of, range(2))
    expected, expected_gradients, _ = run(theirs, batches)
    room = 5e-2 if kind == "tf32" else 1e-4
    for name in ("output", "dx", "evaluation"):
        both = torch.cat((one[0][name], other[0][name]))
        assert error(both, expected[0][name].double()).rms < room, name
    for name, gradient in expected_gradients.items():
        if gradient is None:
            assert gradients[name] is other_gradients[name] is None
        elif name != "conv_transpose.bias":  # zero in mathematics
            assert error(gradients[name] + other_gradients[name], gradient.double()).rms < room, name


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


@pytest.mark.parametrize(("wrap", "fused"), [(autocast, True), (compiled, True), (compiled, False)])
def test_around_the_model(ranks, wrap, fused):
    ours, theirs = models()
    if not fused:
        ours.max_pool.ceil_mode = theirs.max_pool.ceil_mode = True
    batches = batches_of((16, 6, 8), [(2, 1)], torch.float32, theirs)
    (steps, gradients, _), expected = in_both(ranks, ours, batches, [(2, 1)], wrap=wrap), run(ours, batches, wrap(ours))
    for name in ("output", "dx"):
        torch.testing.assert_close(steps[0][name], expected[0][0][name], rtol=1e-2, atol=1e-2)
    torch.testing.assert_close(
        gradients["conv_transpose.weight"], expected[1]["conv_transpose.weight"], rtol=1e-2, atol=1e-2
    )


def recorded(rank, module, x):
    convert_sync_batchnorm(module)
    for record in (torch.func.vjp, lambda module, x: make_fx(module)(x)):
        with pytest.raises(RuntimeError, match=r"synchronised batch norm cannot be recorded .* use eval\(\)"):
            record(module, x)
        record(module.eval(), x)
        module.train()


@pytest.mark.parametrize("fused", [True, False], ids=["fused", "layer"])
def test_what_records_or_transforms_is_refused_in_training(ranks, fused):
    module = models()[0] if fused else layers.BatchNorm2d(16)
    ranks.run(recorded, module, torch.randn(2, 16, 6, 6))


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


def two_runs(rank, module, x, dy):
    found = [run_part(rank, copy.deepcopy(module), [(x, dy)]) for _ in range(2)]
    return all(torch.equal(a, b) for a, b in zip(*(steps[0].values() for steps, *_ in found)))


def test_two_runs_are_bit_equal(ranks):
    ours, theirs = models()
    x, dy = batches_of((16, 6, 8), [(2, 2)], torch.float32, theirs)[0]
    assert all(ranks.run(two_runs, ours, list(map(copied, x.split(2))), list(map(copied, dy.split(2)))))
