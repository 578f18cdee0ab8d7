"""DistributedDataParallel, FSDP and fully_shard of ModelNew in two processes, beside Model in the same."""

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import Shard, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from modelnew import Model, ModelNew, convert_sync_batchnorm, functional, layers

FUSED = (16, 16, 3, 1, 1, 1, 4)
ROOM = {"rtol": 1e-3, "atol": 1e-4}


class Network(nn.Module):
    """ModelNew or Model, behind a convolution; and a branch that is not always used."""

    def __init__(self, kind, norm):
        super().__init__()
        self.stem, self.body = nn.Sequential(nn.Conv2d(3, 16, 1), norm(16)), kind(*FUSED)
        self.branch = norm(16)

    def forward(self, x, use_branch=True):
        y = self.body(self.stem(x))
        return self.branch(y) if use_branch else y


def pair(device="cpu"):
    """Ours and torch's, with one state, the same in every process."""
    theirs, ours = Network(Model, nn.BatchNorm2d), Network(ModelNew, layers.BatchNorm2d)
    ours.load_state_dict(theirs.state_dict())
    return ours.to(device), theirs.to(device)


def trained(model, batches, calls=None, accumulate=False):
    """Losses of two steps, or of one in which the first batch's gradients wait, and what the parameters are then."""
    optimizer, losses = torch.optim.SGD(model.parameters(), lr=0.1), []
    for step, x in enumerate(batches):
        use_branch = calls is None or calls[step]
        if accumulate and step == 0:
            with model.no_sync():
                loss = model(x, use_branch).square().mean() + model(x, use_branch)[:, ::2].mean()
                loss.backward()
            continue
        y = model(x, use_branch)
        loss = y.square().mean() + y[:, ::2].mean()
        loss.backward()
        losses.append(loss.detach())
        optimizer.step()
        optimizer.zero_grad()
    return losses


def images(rank, device="cpu"):
    """Two batches, others in each process."""
    generator = torch.Generator().manual_seed(rank)
    return [torch.randn(2 + rank, 3, 6, 6, generator=generator).to(device) for _ in range(2)]


def same(ours, theirs):
    """Whether two state dicts agree; else how."""
    for (name, actual), expected in zip(ours.items(), theirs.values(), strict=True):
        torch.testing.assert_close(actual, expected, **ROOM, msg=lambda text, name=name: f"{name}: {text}")


def in_ddp(rank, device, options, calls=None, accumulate=False):
    models, losses = pair(device), []
    for model in models:
        ddp = DistributedDataParallel(model, **options)
        losses.append(trained(ddp, images(rank, device), calls, accumulate))
    torch.testing.assert_close(*losses, **ROOM)
    same(*(model.state_dict() for model in models))
    return {name: t.cpu() for name, t in models[0].state_dict().items()}


@pytest.mark.parametrize(
    ("options", "calls", "accumulate"),
    [
        ({}, None, False),
        ({"gradient_as_bucket_view": True, "bucket_cap_mb": 0.001, "broadcast_buffers": False}, None, False),
        ({"find_unused_parameters": True}, (True, False), False),
        ({"static_graph": True}, None, False),
        ({}, None, True),
    ],
    ids=["plain", "small buckets", "find_unused_parameters", "static_graph", "no_sync"],
)
def test_ddp(ranks, options, calls, accumulate):
    one, two = ranks.run(in_ddp, "cpu", options, calls, accumulate)
    for name, tensor in one.items():
        assert torch.equal(tensor, two[name]) or "running" in name


def test_rank_0_has_the_same_buffers_without_a_broadcast(ranks):
    """So the README recommends to leave it out."""
    kept, sent = (ranks.run(in_ddp, "cpu", {"broadcast_buffers": sends})[0] for sends in (False, True))
    for name, tensor in kept.items():
        torch.testing.assert_close(tensor, sent[name], rtol=0, atol=0, msg=name)


def synchronised_in_ddp(rank, device):
    """A step of SGD with half of the batch, beside one of torch's modules with all of it."""
    ours, theirs = pair(device)
    halves = [images(r, device)[0][:2] for r in range(2)]
    ddp = DistributedDataParallel(convert_sync_batchnorm(ours))
    trained(ddp, [halves[rank]])
    trained(theirs, [torch.cat(halves)])
    same(ours.state_dict(), theirs.state_dict())
    return {name: t.cpu() for name, t in ours.state_dict().items()}


def test_ddp_with_synchronised_batch_norm(ranks):
    one, two = ranks.run(synchronised_in_ddp, "cpu")
    assert all(torch.equal(tensor, two[name]) for name, tensor in one.items())


def sharded(rank, device, synchronised):
    """fully_shard of the parts and the whole, beside DistributedDataParallel of torch's modules."""
    ours, theirs = pair(device)
    if synchronised:
        convert_sync_batchnorm(ours)
    mesh = init_device_mesh(torch.device(device).type, (2,))
    for part in (ours.body, ours):
        fully_shard(part, mesh=mesh)
    batches = images(0, device) if synchronised else images(rank, device)
    ddp = DistributedDataParallel(theirs, broadcast_buffers=False)  # as fully_shard leaves buffers alone
    torch.testing.assert_close(*(trained(model, batches) for model in (ours, ddp)), **ROOM)
    state = {name: t.full_tensor() if hasattr(t, "full_tensor") else t for name, t in ours.state_dict().items()}
    if synchronised:  # torch's modules have half of the values, so that unbiased variances differ
        state = {name: t for name, t in state.items() if "running" not in name}
        same(state, {name: t for name, t in theirs.state_dict().items() if name in state})
    else:
        same(state, theirs.state_dict())


@pytest.mark.parametrize("synchronised", [False, True], ids=["each for itself", "synchronised"])
def test_fully_shard(ranks, synchronised):
    ranks.run(sharded, "cpu", synchronised)


def fully_sharded(rank):
    ours, theirs = pair()
    fsdp = FullyShardedDataParallel(ours, device_id=torch.device("cpu"))
    torch.testing.assert_close(*(trained(m, images(rank)) for m in (fsdp, DistributedDataParallel(theirs))), **ROOM)


def _distributed_tensor(rank):
    x = distribute_tensor(torch.ones(2, 4), init_device_mesh("cpu", (2,)), [Shard(0)])
    with pytest.raises(NotImplementedError, match=r"modelnew\.tanh.*sharding strategy"):
        functional.tanh(x)
    assert functional.tanh(x.to_local()).shape == (1, 4)


def test_distributed_tensors_are_refused_by_torch(ranks):
    ranks.run(_distributed_tensor)


def test_fsdp1(ranks):
    ranks.run(fully_sharded)
