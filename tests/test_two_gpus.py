"""Two GPUs: in one process, and in two processes with NCCL."""

import copy
import functools
import threading

import pytest
import torch
from ranks import Ranks
from test_distributed import in_ddp, pair, same, sharded, synchronised_in_ddp
from torch import nn

from modelnew import ModelNew, convert_sync_batchnorm, functional, layers

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs"),
]
FUSED = (16, 16, 3, 1, 1, 1, 4)


@pytest.fixture(scope="module")
def ranks():
    found = Ranks(2, "nccl")
    yield found
    found.stop()


def step(model, x):
    """The output and all gradients, on the CPU."""
    x = x.detach().clone().requires_grad_()
    y = model(x)
    found = torch.autograd.grad(y.square().mean() + y[:, ::2].mean(), [x, *model.parameters()])
    return [t.detach().cpu() for t in (y, *found)]


@pytest.mark.parametrize("current", [0, 1])
def test_the_second_gpu(current):
    """Bits are those of the first, whichever is the current one."""
    model, x = ModelNew(*FUSED, device="cuda:0"), torch.randn(3, 16, 6, 8, device="cuda:0")
    expected = step(copy.deepcopy(model), x)
    with torch.cuda.device(current):
        found = step(model.to("cuda:1"), x.to("cuda:1"))
        assert torch.cuda.current_device() == current
    assert all(map(torch.equal, found, expected))


def test_tensors_on_two_gpus_are_refused():
    with pytest.raises(RuntimeError, match="one device"):
        ModelNew(*FUSED, device="cuda:0")(torch.randn(3, 16, 6, 8, device="cuda:1"))


def test_data_parallel():
    """Each GPU has half of the batch, and statistics of its own."""
    ours, theirs = pair("cuda:0")
    x = torch.randn(6, 3, 6, 6, device="cuda:0")
    found, expected = (step(nn.DataParallel(model), x) for model in (ours, theirs))
    for actual, other in zip(found, expected):
        torch.testing.assert_close(actual, other, rtol=1e-3, atol=1e-4)
    same(ours.state_dict(), theirs.state_dict())


def test_a_thread_for_each_gpu():
    models = [ModelNew(*FUSED, device="cuda:0").to(f"cuda:{i}") for i in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    xs = [torch.randn(3, 16, 6, 8, device=f"cuda:{i}") for i in range(2)]
    expected = [step(copy.deepcopy(model), x) for model, x in zip(models, xs)]
    errors, together = [], threading.Barrier(2, timeout=60)

    def work(i):
        try:
            torch.cuda.set_device(i)
            model = copy.deepcopy(models[i])
            together.wait()
            for _ in range(20):
                assert all(map(torch.equal, step(model, xs[i]), expected[i]))
                assert torch.equal(functional.tanh(xs[i]), torch.tanh(xs[i]))
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors


@pytest.mark.parametrize("options", [{}, {"gradient_as_bucket_view": True, "broadcast_buffers": False}], ids=str)
def test_ddp(ranks, options):
    ranks.run(in_ddp, "cuda", options)


def test_ddp_with_synchronised_batch_norm(ranks):
    one, two = ranks.run(synchronised_in_ddp, "cuda")
    assert all(torch.equal(tensor, two[name]) for name, tensor in one.items())


@pytest.mark.parametrize("synchronised", [False, True], ids=["each for itself", "synchronised"])
def test_fully_shard(ranks, synchronised):
    ranks.run(sharded, "cuda", synchronised)


def beside_torchs(rank, shape, dtype, memory_format):
    """Our synchronised layer and torch.nn.SyncBatchNorm."""
    torch.manual_seed(rank)
    channels = shape[1]
    x = (torch.randn(shape[0] + rank, *shape[1:]) + rank).to("cuda", dtype).contiguous(memory_format=memory_format)
    dy, results = torch.randn(x.shape, device="cuda").to(dtype), []
    for module in (layers.BatchNorm2d(channels), nn.BatchNorm2d(channels)):
        module = convert_sync_batchnorm(module.to("cuda"))
        leaf = x.clone().requires_grad_()
        for _ in range(3):
            y = module(leaf)
        y.backward(dy)
        found = {"output": y, "dx": leaf.grad, "dweight": module.weight.grad, "dbias": module.bias.grad}
        results.append({**found, **module.state_dict()})
    room = 1e-4 if dtype == torch.float32 else 2e-2
    for (name, actual), expected in zip(results[0].items(), results[1].values()):
        atol = room * max(1.0, expected.abs().max().item())  # a small sum has the roundings of large ones
        said = functools.partial("{}: {}".format, name)
        torch.testing.assert_close(actual, expected, rtol=room, atol=atol, msg=said)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_beside_torchs_synchronised_batch_norm(ranks, dtype, memory_format):
    ranks.run(beside_torchs, (8, 32, 14, 14), dtype, memory_format)


def captured(rank):
    """A step with synchronised statistics in a CUDA graph: nothing in it waits for the host."""
    torch.manual_seed(0)
    model = convert_sync_batchnorm(ModelNew(*FUSED))
    x = torch.randn(3, 16, 6, 8, device="cuda")
    dy = torch.randn_like(model(x))

    def call():
        return torch.autograd.grad(model(x), list(model.parameters()), dy)

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = call()
    x.copy_(torch.randn_like(x) + rank)
    graph.replay()
    expected = call()
    assert all(map(torch.equal, results, expected))


def test_cuda_graph(ranks):
    ranks.run(captured)
