import itertools

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from norms import FORMATS, PARAMETER_DTYPES, parameters
from strided import IN_EVERY_LAYOUT
from tolerance import check_gradients

from cupy_kernels.group_norm import group_norm_backward, group_norm_forward
from modelnew.functional import group_norm

LAYERS = [
    ({"num_groups": 2, "num_channels": 6}, (2, 6, 3, 2)),
    ({"num_groups": 3, "num_channels": 6, "eps": 0.01, "affine": False}, (2, 6, 3, 2)),
    ({"num_groups": 2, "num_channels": 6}, (2, 6, 5)),
]


def check_against_torch(x, num_groups, weight, bias, **options):
    def torch_group_norm(x, num_groups, weight, bias, **options):
        wide = x if weight is None else x.to(weight.dtype)  # on a GPU torch takes no other dtype than the weight's
        return F.group_norm(wide, num_groups, weight, bias, **options).to(x.dtype)

    functions = (group_norm, torch_group_norm)
    ours, theirs = (lambda *args, f=f: f(args[0], num_groups, *args[1:], **options) for f in functions)
    check_gradients(ours, theirs, [x, weight, bias], terms=(0, 0, x[:, 0].numel(), x[:, 0].numel()))


@pytest.mark.parametrize(
    ("shape", "num_groups"),
    [
        ((3, 4, 5, 8), 2),
        ((2, 6, 7, 3), 3),
        ((2, 6, 7, 3), 2),
        ((2, 6, 7, 3), 1),
        ((3, 8), 2),
        ((3, 6, 1, 1), 2),
        ((2, 3, 1, 7), 3),
        ((2, 8, 5), 4),
        ((2, 4, 3, 2, 4), 2),
        ((2, 32, 17, 17), 2),
        ((37, 9, 2, 2), 3),
        ((1, 70, 3, 3), 1),
        ((2, 3, 40, 17), 1),
    ],
    ids=str,
)
def test_output_and_gradients(device, shape, num_groups):
    x = (2 * torch.randn(shape, device=device) + 1).requires_grad_()
    check_against_torch(x, num_groups, *parameters(shape[1], device))


@pytest.mark.parametrize("affine", ["weight", "bias", ""])
def test_without_weight_or_bias(device, affine):
    x = torch.randn(3, 4, 5, 4, device=device, requires_grad=True)
    weight, bias = (p if name in affine else None for name, p in zip(("weight", "bias"), parameters(4, device)))

    def reference(x, weight, bias):  # torch's backward fails where there is a bias and no weight
        weight = torch.ones_like(x[0, :, 0, 0]) if weight is None else weight
        return F.group_norm(x, 2, weight, bias, eps=0.1)

    check_gradients(lambda x, w, b: group_norm(x, 2, w, b, eps=0.1), reference, [x, weight, bias], terms=(0, 0, 60, 60))


@pytest.mark.parametrize(("dtype", "parameter_dtype"), PARAMETER_DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(3, 12, 4, 4), (3, 12, 3, 5)], ids=str)
def test_dtypes(device, dtype, parameter_dtype, shape):
    x = torch.randn(shape, device=device).to(dtype).requires_grad_()
    check_against_torch(x, 4, *parameters(12, device, parameter_dtype))


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [
        ((1, 4, 40, 41), torch.float32),  # forward keeps the group in shared memory, backward does not
        ((2, 2, 91, 99), torch.float32),
        ((1, 4, 64, 64), torch.float32),
        ((1, 4, 40, 41), torch.float64),
        ((1, 4, 96, 80), torch.float16),
        ((1, 2, 201, 151), torch.bfloat16),
    ],
    ids=str,
)
def test_groups_larger_than_shared_memory(device, shape, dtype):
    x = (torch.randn(shape, device=device) + 2).to(dtype).requires_grad_()
    check_against_torch(x, 1, *parameters(shape[1], device, dtype))


def test_one_value_per_group(device):
    x, (weight, bias) = torch.randn(3, 4, 1, 1, device=device, requires_grad=True), parameters(4, device)
    y = group_norm(x, 4, weight, bias)
    assert torch.equal(y, bias.view(4, 1, 1).expand_as(y))
    gradients = torch.autograd.grad(y, (x, weight, bias), torch.ones_like(y))
    for ours, expected in zip(gradients, (torch.zeros_like(x), torch.zeros(4), torch.full((4,), 3.0))):
        assert torch.equal(ours.cpu(), expected.cpu())


@pytest.mark.parametrize("shape", [(0, 4, 3, 5), (2, 4, 0, 5), (0, 4), (2, 0, 3)], ids=str)
def test_empty_input(device, shape):
    x, (weight, bias) = torch.randn(shape, device=device, requires_grad=True), parameters(shape[1], device)
    y = group_norm(x, 2, weight, bias)
    assert y.shape == shape
    dx, dweight, dbias = torch.autograd.grad(y.sum(), (x, weight, bias))
    assert dx.shape == shape
    assert torch.equal(dweight, torch.zeros_like(weight))
    assert torch.equal(dbias, torch.zeros_like(bias))


@IN_EVERY_LAYOUT
def test_layouts(device, make):
    x = make(torch.randn(3, 4, 6, 8, device=device)).requires_grad_()
    weight, bias = (make(p.view(1, 4, 1, 1).expand(3, 4, 6, 8))[0, :, 0, 0] for p in parameters(4, device))
    y, expected = (f(x, 2, weight, bias) for f in (group_norm, F.group_norm))
    torch.testing.assert_close(y, expected)
    assert x.is_cuda or y.stride() == expected.stride()
    dy = torch.randn(y.shape[::-1], device=device).permute(3, 2, 1, 0)
    torch.testing.assert_close(torch.autograd.grad(y, x, dy)[0], torch.autograd.grad(expected, x, dy)[0])


@pytest.mark.parametrize(("dtype", "parameter_dtype"), PARAMETER_DTYPES, ids=str)
@pytest.mark.parametrize(
    ("shape", "num_groups"),
    [
        ((3, 16, 5, 7), 4),
        ((2, 12, 4, 5), 12),
        ((2, 30, 3, 2, 4), 3),
        ((140, 40, 3, 3), 4),
        ((2, 600, 3, 2), 1),
        ((2, 7, 30, 20), 1),
        ((2, 12, 47, 50), 3),  # an image in chunks, from here on
        ((1, 64, 31, 30), 64),
        ((1, 130, 10, 13), 2),
        ((1, 1, 9, 60, 61), 1),
    ],
    ids=str,
)
def test_channels_last(device, dtype, parameter_dtype, shape, num_groups):
    x = torch.randn(shape, device=device).to(dtype).contiguous(memory_format=FORMATS[len(shape)]).requires_grad_()
    weight, bias = parameters(shape[1], device, parameter_dtype)
    check_against_torch(x, num_groups, weight, bias)
    y = group_norm(x, num_groups, weight, bias)
    (dx,) = torch.autograd.grad(y, x, torch.randn(shape, device=device, dtype=dtype))
    assert (y.stride(), dx.stride()) == (x.stride(), x.stride())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize(
    ("shape", "num_groups"),
    [((3, 12, 4, 5), 4), ((2, 12, 3, 3), 3), ((2, 12, 50, 40), 6), ((1, 2, 90, 91), 1)],
    ids=str,
)
def test_result_in_float32_of_16_bits(device, monkeypatch, dtype, memory_format, shape, num_groups):
    """As under autocast on a GPU; on a CPU autocast leaves a group norm alone."""
    monkeypatch.setattr("modelnew.autocast.norm_in_float32", lambda tensor: True)
    x = torch.randn(shape, device=device).to(dtype).contiguous(memory_format=memory_format).requires_grad_()
    weight, bias = parameters(shape[1], device, dtype)
    terms = (0, 0, x[:, 0].numel(), x[:, 0].numel())
    check_gradients(
        lambda *args: group_norm(args[0], num_groups, *args[1:]),
        lambda *args: (
            F.group_norm(args[0].float(), num_groups, *(p.float() for p in args[1:]))
            if args[0].dtype == dtype
            else F.group_norm(args[0], num_groups, *args[1:])
        ),
        [x, weight, bias],
        terms=terms,
    )
    assert group_norm(x, num_groups, weight, bias).dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_autocast_casts_no_input(device, launched, dtype):
    x = torch.randn(2, 12, 5, 4, device=device).to(dtype).requires_grad_()
    if not x.is_cuda:
        pytest.skip("on a CPU autocast leaves a group norm alone")
    weight, bias = parameters(12, device)
    with torch.autocast(x.device.type, dtype):
        ours, theirs = (f(x, 4, weight, bias) for f in (group_norm, F.group_norm))
    assert ours.dtype == theirs.dtype == torch.float32
    torch.testing.assert_close(ours, theirs)
    assert [kernel.name for kernel in launched] == ["group_norm_forward"]
    dy = torch.randn_like(ours)
    for a, b in zip(*(torch.autograd.grad(y, (x, weight, bias), dy) for y in (ours, theirs))):
        assert a.dtype == b.dtype
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("affine", [True, False], ids=["affine", "plain"])
@pytest.mark.parametrize("num_groups", [1, 2, 4])
def test_gradcheck(device, affine, num_groups):
    x = torch.randn(2, 4, 1, 3, dtype=torch.float64, device=device, requires_grad=True)
    weight, bias = parameters(4, device, torch.float64) if affine else (None, None)
    assert torch.autograd.gradcheck(lambda x, w, b: group_norm(x, num_groups, w, b), (x, weight, bias))


@pytest.mark.parametrize(
    ("shape", "memory_format"),
    [
        ((3, 4, 4, 5), torch.contiguous_format),
        ((3, 4, 4, 5), torch.channels_last),
        ((1, 4, 50, 50), torch.channels_last),  # in chunks
    ],
    ids=str,
)
def test_no_work_for_gradients_that_nobody_wants(device, launched, shape, memory_format):
    x, dy = (torch.randn(shape, device=device).contiguous(memory_format=memory_format) for _ in range(2))
    weight, bias = (p.detach() for p in parameters(4, device))

    def gradients(wanted):
        leaves = [t.clone().requires_grad_(w) for t, w in zip((x, weight, bias), wanted)]
        y = group_norm(leaves[0], 2, *leaves[1:])
        launched.clear()
        found = iter(torch.autograd.grad(y, [leaf for leaf in leaves if leaf.requires_grad], dy))
        return [next(found) if w else None for w in wanted], {k.name for k in launched}

    everything, _ = gradients((True, True, True))
    for wanted in itertools.product((True, False), repeat=3):
        if not any(wanted):
            continue
        found, kernels = gradients(wanted)
        assert all(torch.equal(a, b) for a, b in zip(found, everything) if a is not None)
        assert ("group_norm_backward_parameters" in kernels) == any(wanted[1:])


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("shape", [(70, 6, 5, 4), (1, 4, 60, 60)], ids=str)
def test_two_runs_are_equal_bit_for_bit(device, shape, memory_format):
    x, dy = (torch.randn(shape, device=device).contiguous(memory_format=memory_format) for _ in range(2))
    x.requires_grad_()
    weight, bias = parameters(shape[1], device)
    runs = []
    for _ in range(2):
        y = group_norm(x, 2, weight, bias)
        runs.append((y, *torch.autograd.grad(y, (x, weight, bias), dy)))
    assert all(map(torch.equal, *runs))


X = torch.ones(3, 4, 2, 5)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"input": torch.ones(4)}, RuntimeError, r"\[N, C, \*\], received shape \(4,\)"),
        ({"num_groups": 3}, RuntimeError, "divide the number of channels, received num_groups=3"),
        ({"num_groups": 0}, RuntimeError, "must be positive"),
        ({"num_groups": -2}, RuntimeError, "must be positive"),
        ({"num_groups": 2.0}, TypeError, "num_groups must be an int, received 2.0"),
        ({"num_groups": True}, TypeError, "num_groups must be an int, received True"),
        ({"input": torch.ones(1, 4, 1, 1), "num_groups": 4}, ValueError, "Expected more than 1 value per group"),
        ({"weight": torch.ones(3)}, RuntimeError, r"weight must have shape \(4,\), received \(3,\)"),
        ({"weight": torch.ones(4, 1)}, RuntimeError, r"weight must have shape \(4,\), received \(4, 1\)"),
        ({"bias": torch.ones(8)}, RuntimeError, r"bias must have shape \(4,\), received \(8,\)"),
        ({"input": X.long()}, TypeError, "input must be .*received torch.int64"),
        ({"input": X.double()}, TypeError, "with input torch.float64, weight and bias must be all torch.float64"),
        ({"weight": torch.ones(4, dtype=torch.float16)}, TypeError, "weight torch.float16, bias torch.float32"),
        (
            {"input": X.half(), "weight": None, "bias": torch.ones(4).bfloat16()},
            TypeError,
            "received bias torch.bfloat16",
        ),
        ({"bias": torch.ones(4, device="meta")}, RuntimeError, "one device"),
    ],
)
def test_refused_calls(device, arguments, error, message):
    call = {"input": X, "num_groups": 2, "weight": torch.ones(4), "bias": torch.ones(4), **arguments}
    call = {k: v.to(device) if isinstance(v, torch.Tensor) and not v.is_meta else v for k, v in call.items()}
    with pytest.raises(error, match=message):
        group_norm(**call)


def test_host_functions_refuse_arrays_that_do_not_fit():
    x, c, s = np.zeros((2, 4, 3, 3), np.float32), np.zeros(4, np.float32), np.zeros(4, np.float32)
    with pytest.raises(ValueError, match="mean and rstd must have 4 elements, received 3 and 4"):
        group_norm_forward(x, 2, None, None, x.copy(), s[:3], s, 1e-5)
    with pytest.raises(ValueError, match="bias should contain 4 elements"):
        group_norm_forward(x, 2, c, c[:3], x.copy(), s, s, 1e-5)
    with pytest.raises(ValueError, match="num_groups must divide the 4 channels, received 3"):
        group_norm_forward(x, 3, c, c, x.copy(), s, s, 1e-5)
    with pytest.raises(ValueError, match="one shape"):
        group_norm_forward(x, 2, c, c, x[:1].copy(), s, s, 1e-5)
    with pytest.raises(ValueError, match=r"\[N, C, \*\]"):
        group_norm_forward(c, 2, None, None, c.copy(), s, s, 1e-5)
    with pytest.raises(ValueError, match=r"workspace .* must have 16 elements, received None"):
        group_norm_backward(x, x, 2, s, s, c, x.copy(), c.copy(), None, None)
    huge = np.lib.stride_tricks.as_strided(np.zeros(1, np.float32), (1, 2, 2**30), (0, 0, 0))
    with pytest.raises(ValueError, match=r"fewer than 2\^31 values"):
        group_norm_forward(huge, 1, None, None, huge, s[:1], s[:1], 1e-5)
