import itertools
import threading

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from tolerance import check, check_gradients

from cupy_kernels.backend import Room
from cupy_kernels.batch_norm import batch_norm_apply, batch_norm_backward, batch_norm_statistics
from cupy_kernels.batch_norm_resident import resident, resident_macros
from cupy_kernels.plan import Slot
from modelnew.functional import batch_norm, batch_norm_tanh, tanh
from modelnew.parity import error

DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]
PARAMETER_DTYPES = [*zip(DTYPES, DTYPES), (torch.float16, torch.float32), (torch.bfloat16, torch.float32)]
LAYERS = {
    "BatchNorm1d": [({"num_features": 3}, (8, 3)), ({"num_features": 3, "momentum": None}, (4, 3, 5))],
    "BatchNorm2d": [
        ({"num_features": 3}, (4, 3, 2, 3)),
        ({"num_features": 3, "eps": 0.001, "momentum": None}, (4, 3, 2, 3)),
        ({"num_features": 3, "momentum": 0.7, "affine": False}, (4, 3, 2, 3)),
        ({"num_features": 3, "track_running_stats": False, "dtype": torch.float64}, (4, 3, 2, 3)),
    ],
    "BatchNorm3d": [({"num_features": 3}, (2, 3, 2, 3, 2))],
}
INF, NAN = float("inf"), float("nan")


def torch_batch_norm(x, running_mean, running_var, weight=None, bias=None, *args, **options):
    if weight is None and bias is not None:  # torch's own gradient fails there on a GPU
        weight = torch.ones_like(bias)
    return F.batch_norm(x, running_mean, running_var, weight, bias, *args, **options)


def torch_batch_norm_tanh(*args, **options):
    return torch.tanh(torch_batch_norm(*args, **options))


def new_plans(monkeypatch):
    """Calls plan anew."""
    plans = threading.local()
    monkeypatch.setattr("modelnew.calls._thread", lambda: plans)


PAIRS = [
    pytest.param((batch_norm, torch_batch_norm), id="plain"),
    pytest.param((batch_norm_tanh, torch_batch_norm_tanh), id="tanh"),
]


def statistics(channels, device, dtype=torch.float32):
    """Running mean and variance."""
    return torch.randn(channels, device=device).to(dtype), (torch.rand(channels, device=device) + 0.5).to(dtype)


def parameters(channels, device, dtype=torch.float32):
    """Weight and bias."""
    return [torch.randn(channels, device=device).to(dtype).requires_grad_() for _ in range(2)]


def check_pair(pair, x, running, weight, bias, **options):
    """Output and gradients of ours and torch's, with copies of the running statistics."""

    def with_copies(function, x, weight, bias):
        copies = [r.to(torch.float64 if x.dtype == torch.float64 else r.dtype, copy=True) for r in running]
        return function(x, *(copies or (None, None)), weight, bias, **options)

    ours, theirs = ((lambda *args, f=f: with_copies(f, *args)) for f in pair)
    check_gradients(ours, theirs, [x, weight, bias], terms=(0, 0, *[x.numel() // max(1, x.shape[1])] * 2))


@pytest.mark.parametrize("pair", PAIRS)
@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
@pytest.mark.parametrize(
    "shape",
    [(5, 3, 4, 6), (3, 4, 7, 5), (5, 8, 1, 1), (1, 8, 3, 1), (7, 3), (4, 2, 5), (2, 2, 3, 2, 4), (300, 1, 1, 7)],
    ids=str,
)
def test_output_and_gradients(device, pair, training, shape):
    x = (2 * torch.randn(shape, device=device) + 1).requires_grad_()
    check_pair(pair, x, statistics(shape[1], device), *parameters(shape[1], device), training=training)


@pytest.mark.parametrize("pair", PAIRS)
@pytest.mark.parametrize(("training", "tracked"), [(True, True), (True, False), (False, True)])
@pytest.mark.parametrize("affine", ["weight", "bias", ""])
def test_without_weight_bias_or_statistics(device, pair, training, tracked, affine):
    x = torch.randn(3, 4, 5, 4, device=device, requires_grad=True)
    weight, bias = (p if name in affine else None for name, p in zip(("weight", "bias"), parameters(4, device)))
    check_pair(pair, x, statistics(4, device) if tracked else (), weight, bias, training=training, eps=0.1)


@pytest.mark.parametrize(("dtype", "parameter_dtype"), PARAMETER_DTYPES, ids=str)
@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
@pytest.mark.parametrize("shape", [(3, 12, 4, 4), (3, 12, 6, 2), (3, 12, 3, 5)], ids=str)
def test_dtypes(device, dtype, parameter_dtype, training, shape):
    x = torch.randn(shape, device=device).to(dtype).requires_grad_()
    running = statistics(12, device, parameter_dtype)
    check_pair((batch_norm, F.batch_norm), x, running, *parameters(12, device, parameter_dtype), training=training)


@pytest.mark.parametrize(("dtype", "parameter_dtype"), PARAMETER_DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(3, 12, 4, 4), (3, 12, 3, 5)], ids=str)
def test_dtypes_with_tanh(device, dtype, parameter_dtype, shape):
    x = torch.randn(shape, device=device).to(dtype).requires_grad_()
    check_pair(PAIRS[1].values[0], x, (), *parameters(12, device, parameter_dtype), training=True)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_weight_and_statistics_of_different_dtypes(device, dtype):
    x = torch.randn(3, 2, 4, 4, device=device).to(dtype)
    mean, var = statistics(2, device)
    weight, bias = parameters(2, device, dtype)
    y = batch_norm(x, mean, var, weight, bias)
    expected = F.batch_norm(*(t.double() for t in (x, mean, var, weight, bias)))
    check(y, expected, expected.to(dtype))


@pytest.mark.parametrize("pair", PAIRS)
@pytest.mark.parametrize("shape", [(9, 2, 32, 32), (1, 2, 95, 101), (1500, 1, 2, 3), (5, 2, 35, 54)], ids=str)
def test_several_chunks(device, pair, shape):
    x = (torch.randn(shape, device=device) + 1).requires_grad_()
    check_pair(pair, x, statistics(shape[1], device), *parameters(shape[1], device), training=True)


@pytest.mark.parametrize("momentum", [0.1, 0.0, 1.0, 0.37, 1])
@pytest.mark.parametrize(("dtype", "buffer_dtype"), PARAMETER_DTYPES, ids=str)
def test_running_statistics(device, momentum, dtype, buffer_dtype):
    x = (3 * torch.randn(4, 3, 5, 4, device=device) - 2).to(dtype)
    before = statistics(3, device, buffer_dtype)
    ours, theirs = ([r.clone() for r in before] for _ in range(2))
    truth = [r.double() for r in before]
    for function, x_, running in ((batch_norm, x, ours), (F.batch_norm, x, theirs), (F.batch_norm, x.double(), truth)):
        function(x_, *running, training=True, momentum=momentum)
    for name, a, b, t in zip(("mean", "variance"), ours, theirs, truth):
        check(a, t, b, name, terms=80)  # PyTorch on a CPU sums in float64


def test_running_statistics_of_any_layout(device):
    x = torch.randn(3, 4, 5, 2, device=device)
    mean, var = statistics(8, device)
    strided, dense = (mean[::2], var[::2]), (mean[::2].clone(), var[::2].clone())
    others = mean[1::2].clone(), var[1::2].clone()
    versions = [t._version for t in (*strided, *dense)]
    batch_norm(x, *strided, training=True)
    batch_norm(x, *dense, training=True)
    for a, b in zip((*strided, mean[1::2], var[1::2]), (*dense, *others)):
        assert torch.equal(a, b)
    assert all(t._version > v for t, v in zip((*strided, *dense), versions))


def test_eval_leaves_the_running_statistics(device):
    running = statistics(3, device)
    before = [r.clone() for r in running]
    batch_norm(torch.randn(2, 3, 4, 4, device=device), *running)
    assert all(map(torch.equal, running, before))


@pytest.mark.parametrize("outlier", [0.0, 1e3], ids=["none", "first_value"])
@pytest.mark.parametrize("shape", [(4, 2, 5, 8), (9, 2, 32, 32)], ids=str)
def test_large_mean_and_small_variance(device, outlier, shape):
    x = 1e4 + torch.randn(shape, device=device)
    x[0, :, 0, 0] += outlier
    mean, var = torch.zeros(2, device=device), torch.zeros(2, device=device)
    y = batch_norm(x, mean, var, training=True, momentum=1.0)
    columns = x.double().transpose(0, 1).flatten(1)
    for statistic, truth in ((var, columns.var(1)), (mean, columns.mean(1))):
        check(statistic, truth, truth.float())
    expected = F.batch_norm(x.double(), None, None, training=True)
    # In float32 the mean alone is half a unit of 1e4 off.
    rounded = F.batch_norm(x.double(), columns.mean(1) + torch.finfo(x.dtype).eps * 2**13 / 2, columns.var(1, False))
    check(y, expected, rounded.float())


@pytest.mark.parametrize("value", [1e4 / 3, -3e38, 3.4e38])
def test_constant_channel(device, value):
    x = torch.full((3, 2, 4, 5), value, device=device, requires_grad=True)
    weight, bias = parameters(2, device)
    y = batch_norm(x, None, None, weight, bias, training=True)
    assert torch.equal(y, bias.view(2, 1, 1).expand(3, 2, 4, 5))
    if value == 1e4 / 3:  # 120 times the others is not a float64 times 120: PyTorch finds a variance there
        check_pair(PAIRS[0].values[0], x, (), weight, bias, training=True)


@pytest.mark.parametrize("values", [[NAN], [INF], [-INF], [INF, INF], [INF, -INF], [NAN, INF]], ids=str)
@pytest.mark.parametrize("place", [0, 7, 38])
@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
def test_nan_and_inf(device, values, place, training):
    channels = torch.randn(3, 40)
    channels[1, place : place + len(values)] = torch.tensor(values)
    x, running = channels.view(3, 2, 4, 5).transpose(0, 1).contiguous(), statistics(3, "cpu")
    ours = [r.to(device, copy=True) for r in running]
    y = batch_norm(x.to(device), *ours, training=training)
    expected = F.batch_norm(
        x, *running, training=training
    )  # on the CPU: a mean with an infinity in it is infinite there
    for a, b in zip((y, *ours), (expected, *running)):
        torch.testing.assert_close(a.cpu(), b, equal_nan=True)


@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
def test_nan_in_the_gradient(device, training):
    x, dy = torch.randn(2, 3, 4, 5, device=device, requires_grad=True), torch.randn(2, 3, 4, 5, device=device)
    dy[1, 2, 3, 1] = NAN
    running, weight = statistics(3, device), torch.randn(3, device=device, requires_grad=True)
    ours, theirs = (
        torch.autograd.grad(f(x, *(r.clone() for r in running), weight, training=training), (x, weight), dy)
        for f in (batch_norm, F.batch_norm)
    )
    for a, b in zip(ours, theirs):
        torch.testing.assert_close(a, b, equal_nan=True)


# Squares of float32 values overflow from 1.8e19 on, sums from 1.7e38 on, differences of opposite signs too.
LARGE = {
    "1e20": lambda shape: torch.randn(shape) * 1e20,
    "1e38": lambda shape: torch.randn(shape).clamp(-3, 3) * 1e38,
    "opposite": lambda shape: torch.randn(shape).sign() * 3e38,
    "one_chunk": lambda shape: (
        torch.randn(shape).clamp(-3, 3) * torch.tensor([1e38] + [1.0] * (shape[0] - 1)).view(-1, 1, 1, 1)
    ),
    "outliers": lambda shape: torch.full(shape, -1e38).masked_fill(torch.rand(shape) < 0.05, 3.3e38),
    "far": lambda shape: 2e38 + torch.randn(shape) * 3e37,
}


def results(function, cast, x, weight, bias, dy, training=True):
    """Output, gradients and running statistics."""
    leaves = [cast(t.detach()).requires_grad_() for t in (x, weight, bias)]
    running = cast(torch.zeros_like(weight)), cast(torch.ones_like(weight))
    y = function(leaves[0], *running, *leaves[1:], training=training)
    return [y, *torch.autograd.grad(y, leaves, cast(dy)), *running]


@pytest.mark.parametrize("pair", PAIRS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(5, 3, 4, 5), (9, 2, 32, 32)], ids=str)
@pytest.mark.parametrize("name", LARGE)
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
def test_large_values_are_as_right_as_small_ones(device, name, shape, dtype, pair, memory_format):
    """PyTorch's own results are zeros and NaN there."""
    x, dy = (t.to(device, dtype, memory_format=memory_format) for t in (LARGE[name](shape), torch.randn(shape)))
    weight, bias = parameters(shape[1], device, dtype)
    ours = results(pair[0], torch.Tensor.clone, x, weight, bias, dy)
    truth = results(pair[1], torch.Tensor.double, x, weight, bias, dy)
    for actual, expected in zip(ours, truth):
        scale = x.abs().max().item() if expected is truth[4] else None  # of running_mean: rounding is that of values
        assert error(actual, expected.to(dtype), scale).rms < 16 * torch.finfo(dtype).eps


def test_large_values_outside_training(device):
    """Sums overflow in both directions on the way to gradients that are infinite, too."""
    x, dy = LARGE["1e38"]((4, 3, 8, 8)).to(device), torch.randn(4, 3, 8, 8, device=device)
    weight, bias = parameters(3, device)
    ours = results(batch_norm, torch.Tensor.clone, x, weight, bias, dy, training=False)
    truth = results(F.batch_norm, torch.Tensor.double, x, weight, bias, dy, training=False)
    for actual, expected in zip(ours, truth):
        assert error(actual, expected.float()).rms < 1e-6


@pytest.mark.parametrize("shape", [(5, 3, 4, 5), (9, 2, 32, 32)], ids=str)
def test_large_incoming_gradients(device, shape):
    """Their sums overflow, and so do the gradients of weight and bias, but not that of x."""
    x, dy = 1e20 * torch.randn(shape, device=device), 1e37 * (torch.rand(shape, device=device) + 0.5)
    weight, bias = parameters(shape[1], device)
    ours = results(batch_norm, torch.Tensor.clone, x, weight, bias, dy)
    truth = results(F.batch_norm, torch.Tensor.double, x, weight, bias, dy)
    assert truth[3].float().isinf().all()
    for actual, expected in zip(ours[:4], truth[:4]):
        scale = dy.double().sum().item() if expected is truth[2] else None  # of weight's gradient, a sum that cancels
        assert error(actual, expected.float(), scale).rms < 1e-6


def test_denormals(device):
    x = torch.randn(2, 3, 4, 5, device=device) * 1e-39
    running = torch.full((3,), 1e-39, device=device), torch.full((3,), 1e-39, device=device)
    for training in (True, False):
        y, expected = (f(x, *(r.clone() for r in running), training=training) for f in (batch_norm, F.batch_norm))
        torch.testing.assert_close(y, expected, rtol=0, atol=4e-36)  # -ftz=true flushes below 1.2e-38, times 316


@pytest.mark.parametrize(
    "shape", [(0, 3, 4, 5), (2, 3, 0, 5), (0, 3), (2, 0, 4, 5), (2, 0), (1, 0, 0), (0, 0), (0,)], ids=str
)
@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
@pytest.mark.parametrize("function", [batch_norm, batch_norm_tanh])
def test_empty_input(device, shape, training, function):
    x = torch.randn(shape, device=device, requires_grad=True)
    channels = shape[1] if len(shape) > 1 else 3
    running, (weight, bias) = statistics(channels, device), parameters(channels, device)
    before = [r.clone() for r in running]
    y = function(x, *running, weight, bias, training=training)
    assert y.shape == shape
    assert all(map(torch.equal, running, before))
    dx, dweight, dbias = torch.autograd.grad(y.sum(), (x, weight, bias))
    assert dx.shape == shape
    assert torch.equal(dweight, torch.zeros_like(weight))
    assert torch.equal(dbias, torch.zeros_like(bias))


@pytest.mark.parametrize(
    "make",
    [
        lambda x: x.transpose(2, 3),
        lambda x: x.to(memory_format=torch.channels_last),
        lambda x: x[1:, :, 1:, 2:],
        lambda x: torch.complex(x, x).conj().imag,
        lambda x: x.flatten()[1 : 1 + 2 * 4 * 6 * 8].view(2, 4, 6, 8),
    ],
    ids=["transposed", "channels_last", "offset", "negative_bit", "unaligned"],
)
@pytest.mark.parametrize("pair", PAIRS)
def test_layouts(device, make, pair):
    x = make(torch.randn(3, 4, 6, 8, device=device)).requires_grad_()
    weight, bias = (make(p.view(1, 4, 1, 1).expand(3, 4, 6, 8))[0, :, 0, 0] for p in parameters(4, device))
    y, expected = (f(x, None, None, weight, bias, training=True) for f in pair)
    torch.testing.assert_close(y, expected)
    assert y.stride() == expected.stride()
    dy = torch.randn(y.shape[::-1], device=device).permute(3, 2, 1, 0)
    torch.testing.assert_close(torch.autograd.grad(y, x, dy)[0], torch.autograd.grad(expected, x, dy)[0])


FORMATS = {4: torch.channels_last, 5: torch.channels_last_3d}


@pytest.mark.parametrize("pair", PAIRS)
@pytest.mark.parametrize(("dtype", "parameter_dtype"), PARAMETER_DTYPES, ids=str)
@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
@pytest.mark.parametrize(
    "shape", [(3, 16, 5, 7), (2, 3, 4, 5), (2, 12, 3, 2, 4), (5, 8, 1, 1), (3, 2, 4, 5), (1, 264, 5, 5)], ids=str
)
def test_channels_last(device, pair, dtype, parameter_dtype, training, shape):
    x = torch.randn(shape, device=device).to(dtype).contiguous(memory_format=FORMATS[len(shape)]).requires_grad_()
    running = statistics(shape[1], device, parameter_dtype)
    weight, bias = parameters(shape[1], device, parameter_dtype)
    check_pair(pair, x, running, weight, bias, training=training)
    y, expected = (f(x, *(r.clone() for r in running), weight, bias, training) for f in pair)
    dy = torch.randn_like(expected)
    ours, theirs = (torch.autograd.grad(result, x, dy)[0] for result in (y, expected))
    assert y.stride() == ours.stride() == x.stride()
    if device == "cpu":  # on a GPU torch's results in evaluation are contiguous
        assert (y.stride(), ours.stride()) == (expected.stride(), theirs.stride())


@pytest.mark.parametrize("shape", [(64, 5, 6, 33), (520, 12), (70, 17, 7, 7), (20, 40, 3, 3), (450, 300)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("whole", [False, True], ids=["chunks", "whole"])
def test_walks(device, monkeypatch, launched, shape, dtype, last, whole):
    """Planes, rows, and rows of small planes; by blocks of a chunk, and of whole channels."""
    monkeypatch.setattr("cupy_kernels.batch_norm.resident", lambda *_: None)
    if not whole:
        monkeypatch.setattr("cupy_kernels.batch_norm._L2_BYTES", 0)
        monkeypatch.setattr("cupy_kernels.channel_walk._ROWS_CHUNK_BYTES", (2**12, 2**12))
        monkeypatch.setattr("cupy_kernels.channel_walk._PLANES_CHUNK_BYTES", 2**14)
    new_plans(monkeypatch)
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
def test_resident(device, monkeypatch, launched, shape, dtype, pair, dropped):
    """Blocks that wait for each other, with rings of 4 to 5 batches of 64 threads."""
    room = Room(multiprocessors=3, shared_bytes=28 << 10)
    monkeypatch.setattr("cupy_kernels.emulator.backend.room", lambda _: room)
    monkeypatch.setattr("cupy_kernels.compiler.backend.room", lambda _: room)
    compiled = {name: resident_macros(name, "float") for name in ("float", "half_t")}
    monkeypatch.setattr("cupy_kernels.batch_norm_resident.resident_macros", lambda name, _: compiled[name])
    monkeypatch.setattr("cupy_kernels.batch_norm_resident._THREADS", 64)
    new_plans(monkeypatch)
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

    for rows, channels, blocks in ((6272, 960, 120), (6272, 672, 132), (200704, 96, 132), (262144, 64, 132)):
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


@pytest.mark.parametrize("function", [batch_norm, batch_norm_tanh])
@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
@pytest.mark.parametrize("affine", [True, False], ids=["affine", "plain"])
def test_gradcheck(device, function, training, affine):
    x = torch.randn(3, 2, 2, 3, dtype=torch.float64, device=device, requires_grad=True)
    weight, bias = parameters(2, device, torch.float64) if affine else (None, None)
    running = statistics(2, device, torch.float64)

    def run(x, weight, bias):
        return function(x, *(r.clone() for r in running), weight, bias, training)

    assert torch.autograd.gradcheck(run, (x, weight, bias))


@pytest.mark.parametrize("function", [batch_norm, batch_norm_tanh])
@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
def test_no_work_for_gradients_that_nobody_wants(device, function, training, launched):
    x, dy = (torch.randn(3, 2, 4, 5, device=device) for _ in range(2))
    weight, bias = (p.detach() for p in parameters(2, device))
    running = statistics(2, device)

    def gradients(wanted):
        leaves = [t.clone().requires_grad_(w) for t, w in zip((x, weight, bias), wanted)]
        y = function(leaves[0], *(r.clone() for r in running), *leaves[1:], training)
        launched.clear()
        found = iter(torch.autograd.grad(y, [leaf for leaf in leaves if leaf.requires_grad], dy))
        return [next(found) if w else None for w in wanted], {k.name for k in launched}

    everything, _ = gradients((True, True, True))
    for wanted in itertools.product((True, False), repeat=3):
        if not any(wanted):
            continue
        found, kernels = gradients(wanted)
        assert all(torch.equal(a, b) for a, b in zip(found, everything) if a is not None)
        if training:
            assert kernels == {"batch_norm_backward"}
        elif any(wanted[1:]):
            assert kernels == {"batch_norm_backward_partials", "batch_norm_backward_sums"}
        else:
            assert kernels == {"batch_norm_backward_apply"}


def test_nothing_is_saved_that_the_gradients_do_not_need(device):
    x = torch.randn(3, 2, 4, 5, device=device, requires_grad=True)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.shape) or t, lambda t: t):
        batch_norm(x, *statistics(2, device))
    assert x.shape not in saved


def test_fused_tanh_is_tanh_of_batch_norm(device):
    x, (weight, bias) = torch.randn(3, 2, 4, 5, device=device), parameters(2, device)
    fused, separate = batch_norm_tanh(x, None, None, weight, bias, True), batch_norm(x, None, None, weight, bias, True)
    assert torch.equal(fused, tanh(separate))


def test_two_runs_are_equal_bit_for_bit(device):
    x, dy = torch.randn(9, 2, 32, 32, device=device, requires_grad=True), torch.randn(9, 2, 32, 32, device=device)
    weight, bias = parameters(2, device)
    runs = []
    for _ in range(2):
        running = torch.zeros(2, device=device), torch.ones(2, device=device)
        y = batch_norm_tanh(x, *running, weight, bias, training=True)
        runs.append((y, *running, *torch.autograd.grad(y, (x, weight, bias), dy)))
    assert all(map(torch.equal, *runs))


X = (3, 2, 4, 5)


@pytest.mark.parametrize(
    ("arguments", "exception", "message"),
    [
        ({"input": torch.ones(1, 2, 1, 1)}, ValueError, "Expected more than 1 value per channel when training"),
        ({"input": torch.ones(1, 2)}, ValueError, "Expected more than 1 value per channel when training"),
        ({"input": torch.ones(2)}, RuntimeError, r"\[N, C, \*\], received shape \(2,\)"),
        ({"input": torch.ones(X, dtype=torch.int64)}, TypeError, "input must be .*received torch.int64"),
        (
            {"input": torch.ones(X, dtype=torch.float64)},
            TypeError,
            "running_mean.*float64.*received running_mean torch.float32",
        ),
        ({"input": torch.ones(X, dtype=torch.float64), "running_mean": None, "running_var": None}, TypeError, "weight"),
        ({"running_mean": torch.zeros(3)}, RuntimeError, "running_mean should contain 2 elements not 3"),
        ({"running_var": torch.zeros(1)}, RuntimeError, "running_var should contain 2 elements not 1"),
        ({"weight": torch.zeros(3)}, RuntimeError, "weight should contain 2 elements not 3"),
        ({"bias": torch.zeros(0)}, RuntimeError, "bias should contain 2 elements not 0"),
        (
            {"running_mean": torch.zeros(2, dtype=torch.float16)},
            TypeError,
            "running_mean torch.float16, running_var torch.float32",
        ),
        ({"bias": torch.zeros(2, dtype=torch.float64)}, TypeError, "received weight torch.float32, bias torch.float64"),
        ({"weight": torch.ones(2, dtype=torch.float16), "bias": None}, TypeError, "received weight torch.float16"),
        ({"running_mean": None}, ValueError, "either both be None or neither"),
        ({"running_var": None}, ValueError, "either both be None or neither"),
        (
            {"running_mean": None, "running_var": None, "training": False},
            RuntimeError,
            "must be defined in evaluation mode",
        ),
        (
            {"running_mean": torch.zeros(2, requires_grad=True)},
            RuntimeError,
            "not differentiable with respect to running_mean",
        ),
        ({"momentum": None}, TypeError, "momentum must be a number, received None"),
        ({"eps": 0.0}, ValueError, "eps must be positive during training, but got 0.0"),
        ({"eps": -1.0, "training": False}, ValueError, "eps must be non-negative, but got -1.0"),
        ({"eps": NAN}, ValueError, "eps must be positive during training, but got nan"),
        ({"weight": torch.ones(2, device="meta")}, RuntimeError, "one device"),
    ],
)
@pytest.mark.parametrize("function", [batch_norm, batch_norm_tanh])
def test_refused_calls_change_nothing(device, function, arguments, exception, message):
    valid = {
        "input": torch.ones(X),
        "running_mean": torch.zeros(2),
        "running_var": torch.ones(2),
        "weight": torch.ones(2),
        "bias": torch.zeros(2),
        "training": True,
    }
    call = {
        k: v.to(device) if isinstance(v, torch.Tensor) and not v.is_meta else v
        for k, v in {**valid, **arguments}.items()
    }
    call = {
        k: v.detach().requires_grad_(v.requires_grad) if isinstance(v, torch.Tensor) else v for k, v in call.items()
    }
    before = {k: v.detach().clone() for k, v in call.items() if k.startswith("running") and v is not None}
    with pytest.raises(exception, match=message):
        function(**call)
    assert all(torch.equal(v, call[k].detach()) for k, v in before.items())


@pytest.mark.parametrize(
    "shape",
    [
        (1, 2, 1, 1),
        (1, 2),
        (1, 2, 1),
        (2, 2),
        (1, 2, 2),
        (1, 2, 1, 2),
        (0, 2, 1, 1),
        (0,),
        (1,),
        (1, 0),
        (1, 0, 1),
        (2, 0),
    ],
    ids=str,
)
def test_one_value_per_channel_is_refused_when_torch_refuses_it(device, shape):
    def refused(function):
        try:
            function(torch.randn(shape, device=device), None, None, training=True)
        except ValueError as refusal:
            return str(refusal)

    assert refused(batch_norm) == refused(F.batch_norm)


def test_one_value_per_channel_outside_training(device):
    x, running = torch.randn(1, 3, 1, 1, device=device), statistics(3, device)
    torch.testing.assert_close(batch_norm(x, *running), F.batch_norm(x, *running))


def test_host_functions_refuse_arrays_that_do_not_fit():
    x, c = np.zeros((2, 3, 4, 4), np.float32), np.zeros(3, np.float32)
    with pytest.raises(ValueError, match=r"workspace for shape .* must have 12 elements, received 5"):
        batch_norm_statistics(x, None, None, None, c, c, np.zeros(5, np.float32), 0.1, 1e-5)
    with pytest.raises(ValueError, match="weight should contain 3 elements"):
        batch_norm_apply(x, c, c, np.zeros(2, np.float32), None, x.copy())
    with pytest.raises(ValueError, match="one shape"):
        batch_norm_apply(x, c, c, None, None, x[:1].copy())
    with pytest.raises(ValueError, match=r"\[N, C, \*\]"):
        batch_norm_apply(c, c, c, None, None, c.copy())
    with pytest.raises(ValueError, match="need x"):
        batch_norm_backward(x, None, c, c, None, x.copy(), None, None, np.zeros(12), True)
    with pytest.raises(ValueError, match=r"workspace for shape .* must have 12 elements, received 6"):
        batch_norm_backward(x, x, c, c, None, None, c.copy(), None, np.zeros(6), False)
