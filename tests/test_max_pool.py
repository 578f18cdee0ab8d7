import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from strided import IN_EVERY_LAYOUT
from tolerance import check_gradients

from cupy_kernels.max_pool import max_pool_forward
from cupy_kernels.pool import Pool, pool_output_size
from modelnew.functional import max_pool2d

DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]
LAYERS = [
    ({"kernel_size": 2}, (2, 3, 7, 6)),
    ({"kernel_size": (3, 2), "stride": [2, 1], "padding": 1, "ceil_mode": True}, (2, 3, 7, 6)),
    ({"kernel_size": 2, "dilation": 2}, (2, 3, 7, 6)),
]
INF, NAN = float("inf"), float("nan")
WINDOWS = [
    {"kernel_size": 2},
    {"kernel_size": 2, "ceil_mode": True},
    {"kernel_size": 1},
    {"kernel_size": 3, "stride": 2, "padding": 1},
    {"kernel_size": 3, "stride": 1, "padding": 1},
    {"kernel_size": (2, 3), "stride": (3, 1), "padding": (1, 0), "ceil_mode": True},
    {"kernel_size": (3, 2), "stride": (1, 2), "padding": (1, 1), "dilation": (2, 3)},
    {"kernel_size": 2, "stride": 3, "dilation": 2, "ceil_mode": True},
    {"kernel_size": (4, 5), "stride": (), "padding": (2, 1), "ceil_mode": True},
]


def with_indices(x, **window):
    return max_pool2d(x, **window, return_indices=True), F.max_pool2d(x, **window, return_indices=True)


@pytest.mark.parametrize("window", WINDOWS, ids=str)
@pytest.mark.parametrize("shape", [(2, 3, 8, 10), (1, 2, 7, 6), (3, 9, 7)], ids=str)
def test_values_indices_and_gradient(device, window, shape):
    x = torch.randn(shape, device=device).round(decimals=1).requires_grad_()  # rounding makes ties
    (y, indices), (expected, expected_indices) = with_indices(x, **window)
    assert torch.equal(y, expected)
    assert torch.equal(indices, expected_indices)
    assert not indices.requires_grad
    check_gradients(lambda x: max_pool2d(x, **window), lambda x: F.max_pool2d(x, **window), [x])


@pytest.mark.parametrize("shape", [(1, 2, 1, 1), (2, 1, 1, 6), (1, 1, 5, 1)], ids=str)
@pytest.mark.parametrize("window", [{"kernel_size": 2, "ceil_mode": True}, {"kernel_size": (1, 1)}], ids=str)
def test_single_rows_and_columns(device, shape, window):
    x = torch.randn(shape, device=device, requires_grad=True)
    check_gradients(lambda x: max_pool2d(x, **window), lambda x: F.max_pool2d(x, **window), [x])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("window", [WINDOWS[0], WINDOWS[3]], ids=str)
@pytest.mark.parametrize("shape", [(2, 3, 6, 8), (0, 3, 6, 8), (1, 1, 2, 2)], ids=str)
def test_dtypes(device, dtype, window, shape):
    x = torch.randn(shape, device=device).to(dtype).requires_grad_()
    check_gradients(lambda x: max_pool2d(x, **window), lambda x: F.max_pool2d(x, **window), [x])


@pytest.mark.parametrize("kernel_size", [(2, 127), (3, 85), (16, 17)], ids=["254_taps", "255_taps", "272_taps"])
def test_large_windows(device, kernel_size):
    x = torch.randn(1, 2, 19, 200, device=device, requires_grad=True)
    window = {"kernel_size": kernel_size, "stride": (3, 5), "padding": (1, 8)}
    (_, indices), (_, expected_indices) = with_indices(x, **window)
    assert torch.equal(indices, expected_indices)
    check_gradients(lambda x: max_pool2d(x, **window), lambda x: F.max_pool2d(x, **window), [x])


@pytest.mark.parametrize("window", [{"kernel_size": 2}, {"kernel_size": 3, "stride": 2}], ids=str)
def test_more_outputs_than_a_block_has_threads(device, window):
    x = torch.randn(5, 3, 34, 34, device=device, requires_grad=True)
    check_gradients(lambda x: max_pool2d(x, **window), lambda x: F.max_pool2d(x, **window), [x])


@pytest.mark.parametrize("window", [{"kernel_size": 2}, {"kernel_size": 3, "stride": 2}], ids=str)
def test_blocks_of_several_rounds(device, monkeypatch, window):
    monkeypatch.setattr("cupy_kernels.pool._MANY_BLOCKS", 0)
    x = torch.randn(17, 2, 34, 34, device=device, requires_grad=True)
    check_gradients(lambda x: max_pool2d(x, **window), lambda x: F.max_pool2d(x, **window), [x])


SPECIAL = {
    "nan": [1.0, NAN, 3.0, 2.0],
    "negative_nan": [1.0, -NAN, 3.0, INF],
    "last_of_several_nan": [NAN, 1.0, NAN, 2.0],
    "nan_and_inf": [INF, NAN, -INF, INF],
    "all_negative_inf": [-INF, -INF, -INF, -INF],
    "inf_ties": [1.0, INF, INF, -INF],
    "ties": [2.0, 5.0, 5.0, 5.0],
    "signed_zeros": [-0.0, 0.0, -0.0, 0.0],
    "denormals": [1e-40, 2e-40, -1e-40, 3e-40],
    "negative_denormals": [-3e-40, -1e-40, -2e-40, -1.5e-38],
    "denormal_and_zero": [0.0, -1e-45, 1e-45, 0.0],
}


@pytest.mark.parametrize("values", SPECIAL.values(), ids=SPECIAL.keys())
@pytest.mark.parametrize(
    "window", [{"kernel_size": 2}, {"kernel_size": 2, "stride": 1, "padding": 1}], ids=["2x2", "padded"]
)
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
def test_special_values(device, values, window, memory_format):
    x = torch.tensor(values, device=device).reshape(1, 1, 2, 2).expand(1, 4, 2, 2)
    x = x.contiguous(memory_format=memory_format).requires_grad_()
    y, indices = max_pool2d(x, **window, return_indices=True)
    # torch's kernel for channels_last on a GPU takes other elements where none is the largest.
    expected, expected_indices = F.max_pool2d(x.contiguous(), **window, return_indices=True)
    assert torch.equal(y.nan_to_num(99), expected.nan_to_num(99))
    assert torch.equal(torch.signbit(y) & ~y.isnan(), torch.signbit(expected) & ~y.isnan())
    assert torch.equal(indices, expected_indices)
    dy = torch.randn(y.shape, device=device)
    assert torch.equal(torch.autograd.grad(y, x, dy)[0], torch.autograd.grad(expected, x, dy)[0])


@pytest.mark.parametrize("window", [{"kernel_size": 2}, {"kernel_size": 3, "stride": 2, "padding": 1}], ids=str)
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
def test_nan_in_windows_that_reach_over_the_edge(device, window, memory_format):
    """A row or column that the plane does not have wins nothing, whatever a kernel reads in its place."""
    x = torch.randn(3, 8, 5, 6, device=device)
    x[:, :, -1] = torch.where(torch.rand_like(x[:, :, -1]) < 0.5, NAN, x[:, :, -1])
    x[:, :, :, -1] = torch.where(torch.rand_like(x[:, :, :, -1]) < 0.5, NAN, x[:, :, :, -1])
    x = x.contiguous(memory_format=memory_format).requires_grad_()
    y, indices = max_pool2d(x, **window, ceil_mode=True, return_indices=True)
    # torch's kernel for channels_last on a GPU takes other elements where none is the largest.
    expected, expected_indices = F.max_pool2d(x.contiguous(), **window, ceil_mode=True, return_indices=True)
    torch.testing.assert_close(y, expected, rtol=0, atol=0, equal_nan=True)
    assert torch.equal(indices, expected_indices)
    dy = torch.randn(y.shape, device=device)
    dx, expected = (torch.autograd.grad(result, x, dy)[0] for result in (y, expected))
    torch.testing.assert_close(dx, expected, rtol=1e-6, atol=1e-6)


def test_dilated_window_without_any_element(device):
    x = torch.ones(1, 1, 1, 1, device=device, requires_grad=True)
    y = max_pool2d(x, 2, 1, 1, 2)
    assert torch.equal(y, F.max_pool2d(x, 2, 1, 1, 2))
    (dx,) = torch.autograd.grad(y.sum(), x)
    assert dx.item() == 0


@IN_EVERY_LAYOUT
def test_layouts(device, make):
    x = make(torch.randn(3, 4, 6, 8, device=device)).requires_grad_()
    y, expected = max_pool2d(x, 2), F.max_pool2d(x, 2)
    assert torch.equal(y, expected)
    assert y.stride() == expected.stride()
    dy = torch.randn(y.shape[::-1], device=device).permute(3, 2, 1, 0)
    assert torch.equal(torch.autograd.grad(y, x, dy)[0], torch.autograd.grad(expected, x, dy)[0])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("window", WINDOWS, ids=str)
@pytest.mark.parametrize("shape", [(2, 16, 8, 10), (1, 3, 7, 6), (3, 24, 5, 9)], ids=str)
def test_channels_last(device, dtype, window, shape):
    x = (
        torch.randn(shape, device=device)
        .round(decimals=1)
        .to(dtype, memory_format=torch.channels_last)
        .requires_grad_()
    )
    (y, indices), (expected, expected_indices) = with_indices(x, **window)
    for ours, theirs in ((y, expected), (indices, expected_indices)):
        assert torch.equal(ours, theirs)
        assert ours.stride() == theirs.stride()
    check_gradients(lambda x: max_pool2d(x, **window), lambda x: F.max_pool2d(x, **window), [x])
    dy = torch.randn(y.shape, device=device, dtype=dtype)
    ours, theirs = (torch.autograd.grad(result, x, dy)[0] for result in (y, expected))
    assert ours.stride() == theirs.stride()


def test_gradient_of_an_expanded_tensor(device):
    x = torch.randn(1, 2, 5, 6, device=device, requires_grad=True)
    (dx,) = torch.autograd.grad(max_pool2d(x, 3, 1).sum(), x)
    (expected,) = torch.autograd.grad(F.max_pool2d(x, 3, 1).sum(), x)
    assert torch.equal(dx, expected)


@pytest.mark.parametrize("window", [WINDOWS[0], WINDOWS[3], WINDOWS[6]], ids=str)
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
def test_gradcheck(device, window, memory_format):
    x = torch.randperm(2 * 6 * 8, dtype=torch.float64, device=device).view(1, 2, 6, 8)
    x = x.contiguous(memory_format=memory_format).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: max_pool2d(x, **window), x)
    assert torch.autograd.gradgradcheck(lambda x: max_pool2d(x, **window), x)


def test_two_runs_are_bit_equal(device):
    x = torch.randn(2, 3, 9, 10, device=device, requires_grad=True)
    dy = torch.randn(2, 3, 7, 8, device=device)
    first, second = (torch.autograd.grad(max_pool2d(x, 3, 1), x, dy)[0] for _ in range(2))
    assert torch.equal(first, second)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("shape", "window"),
    [
        ((2, 3, 13, 13), {"kernel_size": 5, "padding": 2}),
        ((2, 2, 10, 12), {"kernel_size": (13, 9), "padding": (6, 4)}),
        ((1, 2, 40, 37), {"kernel_size": (3, 9), "padding": (0, 3)}),
        ((1, 1, 34, 70), {"kernel_size": 17, "padding": 8}),
        ((3, 20, 9), {"kernel_size": (1, 25), "padding": (0, 12)}),
        ((2, 3, 1, 11), {"kernel_size": 5, "padding": 2}),  # the forward takes more shared memory than the backward
        ((1, 2, 13, 1), {"kernel_size": 13, "padding": 6}),
    ],
    ids=str,
)
def test_large_windows_at_stride_1(device, dtype, shape, window, launched):
    x = torch.randn(shape, device=device).round(decimals=1)
    x[torch.rand_like(x) < 0.02] = NAN
    x[torch.rand_like(x) < 0.5] = -INF
    x = x.to(dtype)
    (y, indices), (expected, expected_indices) = with_indices(x, stride=1, **window)
    assert torch.equal(y.nan_to_num(99), expected.nan_to_num(99))
    assert torch.equal(indices, expected_indices)
    x = torch.randn(shape, device=device).to(dtype).requires_grad_()
    check_gradients(lambda x: max_pool2d(x, stride=1, **window), lambda x: F.max_pool2d(x, stride=1, **window), [x])
    assert {kernel.name for kernel in launched} == {"max_pool_forward_separable", "max_pool_backward_separable"}


def test_which_path_runs(device, launched):
    def fast(shape, offset=0, **window):
        x = torch.randn(offset + math.prod(shape), device=device)[offset:].view(shape).requires_grad_()
        launched.clear()
        max_pool2d(x, **window).sum().backward()
        return [dict(kernel.defines)["WINDOW_2X2"] for kernel in launched]

    assert fast((1, 2, 6, 8), kernel_size=2) == [1, 1]
    assert fast((1, 2, 7, 8), kernel_size=2, ceil_mode=True) == [1, 1]
    assert fast((1, 2, 6, 8), offset=1, kernel_size=2) == [0, 1]  # dx is aligned
    assert fast((1, 2, 6, 7), kernel_size=2) == [0, 0]
    assert fast((1, 2, 6, 8), kernel_size=2, stride=1) == [0, 0]


def test_argmax_is_written_only_for_a_backward(device, monkeypatch):
    written = []

    def spy(x, y, argmax, *args):
        written.append(argmax is not None)
        max_pool_forward(x, y, argmax, *args)

    monkeypatch.setattr("modelnew.functional.max_pool.max_pool_forward", spy)
    x = torch.randn(1, 1, 4, 4, device=device, requires_grad=True)
    max_pool2d(x, 2)
    max_pool2d(x.detach(), 2)
    with torch.no_grad():
        max_pool2d(x, 2, return_indices=True)
    assert written == [True, False, False]


@pytest.mark.parametrize("ceil_mode", [False, True])
@pytest.mark.parametrize("kernel", [1, 2, 3, 5])
def test_output_sizes_are_torchs(kernel, ceil_mode):
    for n, s, p, d in itertools.product(range(1, 12), (1, 2, 3, 7), range(kernel // 2 + 1), (1, 3)):
        try:
            expected = F.max_pool2d(torch.zeros(1, 1, n, n), kernel, s, p, d, ceil_mode).shape[2:]
        except RuntimeError:
            expected = None
        pool = Pool((kernel, kernel), (s, s), (p, p), (d, d))
        if expected is None:
            with pytest.raises(RuntimeError):
                pool_output_size((n, n), pool, ceil_mode)
        else:
            assert pool_output_size((n, n), pool, ceil_mode) == expected


@pytest.mark.parametrize(
    ("shape", "args", "message"),
    [
        ((1, 2, 4, 4), (0,), "must be positive.*kernel_size=\\(0, 0\\)"),
        ((1, 2, 4, 4), (2, 0), "must be positive.*stride=\\(0, 0\\)"),
        ((1, 2, 4, 4), (2, 2, 0, -1), "must be positive.*dilation=\\(-1, -1\\)"),
        ((1, 2, 4, 4), (3, 1, 2), "at most half of kernel_size.*padding=\\(2, 2\\)"),
        ((1, 2, 4, 4), (3, 1, -1), "padding must be at least 0"),
        ((1, 2, 4, 4), (5,), "larger than the padded planes: H, W = \\(4, 4\\)"),
        ((4, 4), (2,), "received shape \\(4, 4\\)"),
        ((1, 1, 1, 4, 4), (2,), "received shape"),
        ((1, 0, 4, 4), (2,), "only N may be 0"),
        ((0, 4, 4), (2,), "only N may be 0"),
        ((1, 1, 0, 4), (2, 1, 1), "only N may be 0"),
    ],
)
def test_shapes_that_torch_refuses(device, shape, args, message):
    x = torch.zeros(shape, device=device)
    with pytest.raises(RuntimeError):
        F.max_pool2d(x, *args)
    with pytest.raises(RuntimeError, match=message):
        max_pool2d(x, *args)


def test_five_dimensions_in_channels_last_are_refused(device):
    x = torch.randn(2, 4, 3, 6, 6, device=device).contiguous(memory_format=torch.channels_last_3d)
    with pytest.raises(RuntimeError, match=r"pooling takes input \[N, C, H, W\].*received shape \(2, 4, 3, 6, 6\)"):
        max_pool2d(x, 2)


def test_other_refusals(device):
    x = torch.zeros(1, 1, 4, 4, device=device)
    with pytest.raises(TypeError, match=r"float32.*received torch\.int64"):
        max_pool2d(x.long(), 2)
    with pytest.raises(ValueError, match="kernel_size must be an int or a pair"):
        max_pool2d(x, (2, 2, 2))
    for name in ("ceil_mode", "return_indices"):
        with pytest.raises(TypeError, match=f"{name} must be True or False, received 'False'"):
            max_pool2d(x, 2, **{name: "False"})


def test_planes_beyond_32_bit_indices_are_refused():
    with pytest.raises(RuntimeError, match="below 2\\^31 elements"):
        pool_output_size((2**16, 2**15), Pool((2, 2), (2, 2), (0, 0), (1, 1)))


def test_host_function_refuses_arrays_that_do_not_fit():
    x, y = torch.zeros(1, 2, 4, 4).numpy(), torch.zeros(1, 2, 2, 2).numpy()
    window = ((2, 2), (2, 2), (0, 0), (1, 1))
    with pytest.raises(ValueError, match="received \\(1, 2, 4, 4\\)"):
        max_pool_forward(x, x, None, None, Pool(*window))
    with pytest.raises(ValueError, match="one shape"):
        max_pool_forward(x, y, torch.zeros(1, 2, 2, 1, dtype=torch.uint8).numpy(), None, Pool(*window))
    with pytest.raises(TypeError, match="argmax is int32, the kernel takes uint8"):
        max_pool_forward(x, y, torch.zeros(1, 2, 2, 2, dtype=torch.int32).numpy(), None, Pool(*window))
