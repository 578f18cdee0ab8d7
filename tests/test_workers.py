"""Threads and worker processes, each of which calls the operators."""

import copy

import pytest
import torch
from threads import in_threads
from torch.utils.data import DataLoader, Dataset

from modelnew import ModelNew, layers

FUSED = (16, 16, 3, 1, 1, 1, 4)
THREADS = 8


def step(model, x):
    """The output, all gradients and the buffers."""
    x = x.clone().requires_grad_()
    y = model(x)
    found = torch.autograd.grad(y.square().mean() + y[:, ::2].mean(), [x, *model.parameters()])
    return [y.detach(), *found, *(b.clone() for b in model.buffers())]


@pytest.mark.parametrize("of_thread", [FUSED, (4, 8, 3, 1, 1, 1, 2)], ids=["fused", "unfused"])
def test_threads(device, of_thread):
    """Each with a model of its own, in training; all the same kinds of call at the same time, the first one too."""
    model, xs = ModelNew(*of_thread, device=device), torch.randn(THREADS, 2, of_thread[0], 6, 6, device=device)
    copies = [copy.deepcopy(model) for _ in range(THREADS)]
    found = in_threads(lambda i: [step(copies[i], xs[i]) for _ in range(2)], THREADS)
    for i, results in enumerate(found):
        own = copy.deepcopy(model)
        for result in results:
            assert all(map(torch.equal, result, step(own, xs[i])))


class Computed(Dataset):
    """What a worker makes of numbers with a fused model, and with layers in training."""

    def __init__(self):
        torch.manual_seed(0)
        self.model, self.norm = ModelNew(*FUSED, device="cpu").eval(), layers.BatchNorm2d(16)

    def __len__(self):
        return 8

    def __getitem__(self, index):
        x = torch.randn(2, 16, 4, 4, generator=torch.Generator().manual_seed(index))
        with torch.no_grad():
            return self.model(x), copy.deepcopy(self.norm)(x)


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_workers_of_a_data_loader(method):
    """After calls of the same kinds in the parent, and beside them."""
    data = Computed()
    expected = [torch.stack(parts) for parts in zip(*(data[i] for i in range(len(data))))]
    found = []
    for batch in DataLoader(data, 2, num_workers=2, multiprocessing_context=method, timeout=120):
        data[0]
        found.append(batch)
    assert all(torch.equal(torch.cat(parts), whole) for parts, whole in zip(zip(*found), expected))
