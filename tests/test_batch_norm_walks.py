"""Batch norm by each way in which blocks may share a tensor: chunks, whole channels, resident rows."""

import numpy as np
import pytest
import torch
from norms import PAIRS, check_pair, parameters, statistics

from cupy_kernels.backend import Room
from cupy_kernels.batch_norm_resident import resident, resident_macros
from cupy_kernels.plan import Slot


@pytest.mark.parametrize("pair", PAIRS)
@pytest.mark.parametrize("shape", [(9, 2, 32, 32), (1, 2, 95, 101), (1500, 1, 2, 3), (5, 2, 35, 54)], ids=str)
def test_several_chunks(device, pair, shape):
    x = (torch.randn(shape, device=device) + 1).requires_grad_()
    check_pair(pair, x, statistics(shape[1], device), *parameters(shape[1], device), training=True)


@pytest.mark.parametrize("shape", [(64, 5, 6, 33), (520, 12), (70, 17, 7, 7), (20, 40, 3, 3), (450, 300)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("whole", [False, True], ids=["chunks", "whole"])
def test_walks(device, monkeypatch, fresh_plans, launched, shape, dtype, last, whole):
    """Planes, rows, and rows of small planes; by blocks of a chunk, and of whole channels."""
    monkeypatch.setattr("cupy_kernels.batch_norm.resident", lambda *_: None)
    if not whole:
        monkeypatch.setattr("cupy_kernels.batch_norm._L2_BYTES", 0)
        monkeypatch.setattr("cupy_kernels.channel_walk._ROWS_CHUNK_BYTES", (2**12, 2**12))
        monkeypatch.setattr("cupy_kernels.channel_walk._PLANES_CHUNK_BYTES", 2**14)
    x = (torch.randn(shape, device=device) + 1).to(dtype)
    if last and len(shape) == 4:
        x = x.contiguous(memory_format=torch.channels_last)
    running, (weight, bias) = statistics(shape[1], device), parameters(shape[1], device)
    check_pair(PAIRS[1].values[0], x.requires_grad_(), running, weight, bias, training=True)
    names = {kernel.name for kernel in launched}
    if not (last and whole):  # where it depends on the shape
        assert ("batch_norm_forward" in names, "batch_norm_backward" in names) == (whole, whole)


# Of a chunk: a part of a batch; a part of the ring, and two tiles; more than the ring; a row that begins beyond it.
@pytest.mark.parametrize("shape", [(7, 8, 3, 3), (300, 72), (2, 32, 50, 80), (2900, 40)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("pair", PAIRS)
@pytest.mark.parametrize("dropped", [False, True], ids=["affine", "plain"])
def test_resident(device, monkeypatch, fresh_plans, launched, shape, dtype, pair, dropped):
    """Blocks that wait for each other, with rings of 4 to 5 batches of 64 threads."""
    room = Room(multiprocessors=3, shared_bytes=28 << 10)
    monkeypatch.setattr("cupy_kernels.emulator.backend.room", lambda _: room)
    monkeypatch.setattr("cupy_kernels.compiler.backend.room", lambda _: room)
    compiled = {name: resident_macros(name, "float") for name in ("float", "half_t")}
    monkeypatch.setattr("cupy_kernels.batch_norm_resident.resident_macros", lambda name, _: compiled[name])
    monkeypatch.setattr("cupy_kernels.batch_norm_resident._THREADS", 64)
    x = (torch.randn(shape, device=device) + 1).to(dtype)
    if len(shape) == 4:
        x = x.contiguous(memory_format=torch.channels_last)
    running, (weight, bias) = statistics(shape[1], device), parameters(shape[1], device)
    if dropped:
        running, weight, bias = (), None, None
    check_pair(pair, x.requires_grad_(), running, weight, bias, training=True)
    assert {kernel.name for kernel in launched} == {"batch_norm_resident_forward", "batch_norm_resident_backward"}


def test_what_is_resident(device):
    """What a GPU may keep, and what it may not."""
    room = Room(multiprocessors=132, shared_bytes=227 << 10)

    def found(rows, channels, dtype=np.float16, kept=1, room=room, alignment=0):
        return resident([Slot(0, (rows, channels), dtype, alignment)] * 3, kept, room, "float")

    for rows, channels, blocks in (
        (6272, 64, 64),  # few, as each reads the partial results of all
        (6272, 960, 120),
        (6272, 672, 132),
        (200704, 96, 132),
        (262144, 64, 132),
    ):
        walk = found(rows, channels).walk
        assert walk.across * walk.chunks == blocks <= room.multiprocessors
    small, large = found(6272, 64, kept=2), found(10**6, 64, kept=3)
    assert small.shared_bytes < large.shared_bytes <= room.shared_bytes
    assert not found(6272, 64, room=None)
    assert not found(6272, 64, np.float64)
    assert not found(6272, 60)  # packs of 8 bytes
    assert not found(6272, 64, alignment=8)
    assert not found(6272, 1 << 14)  # more tiles than multiprocessors
    assert not found(1 << 20, 64, room=Room(132, 99 << 10))
