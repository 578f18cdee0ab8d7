"""The fused chain on 16-bit tensors, in either memory format, and under autocast: without conversions of its own."""

import copy

import pytest
import tolerance
import torch
from fused_models import models, peak, sized, well_separated

from cupy_kernels import conv_bn_pool as ops
from modelnew import ModelNew, explain, numerics
from modelnew.functional import conv_bn_tanh_max_pool_group_norm
from modelnew.functional.resident_conv_bn_pool import fused_plan

DTYPES = (torch.float16, torch.bfloat16)
CONVERSIONS = {"pack_fp16", "scale_fp16", "largest_magnitude", "channel_sum"}
# (in, out, kernel, padding, groups of group norm, batch, height, width)
CASES = {
    "even": (16, 16, 3, 1, 4, 4, 12, 14),
    "odd_groups": (80, 48, 2, 0, 16, 2, 8, 10),
    "partial_chunk": (80, 144, 3, 1, 3, 2, 7, 9),
}


def results(model, x, dtype, autocast=None, mask=None):
    """Output and gradients. autocast: its dtype. mask: of the incoming gradient."""
    leaf = x.to(dtype, copy=True).requires_grad_()
    with torch.autocast(x.device.type, autocast, enabled=autocast is not None):
        y = model(leaf)
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(y.device) * mask
    y.backward(dy.to(autocast or x.dtype).to(y))
    found = {"output": y, "x": leaf.grad, **{name: p.grad for name, p in model.named_parameters()}}
    if dtype == x.dtype and isinstance(model, ModelNew):
        assert y.is_contiguous(memory_format=torch.channels_last) == x.is_contiguous(memory_format=torch.channels_last)
    return found


def compare(model, ours, x, autocast=None):
    """Checks output and gradients of windows whose winner is the same in PyTorch's 16 bits."""
    mask = well_separated(model, x, 16 * torch.finfo(autocast or x.dtype).eps)
    assert mask.double().mean() > 0.2
    truth = results(copy.deepcopy(model).double(), x, torch.float64, mask=mask)
    theirs, found = (results(m, x, x.dtype, autocast, mask) for m in (model, ours))
    for name, actual in found.items():
        if name == "conv_transpose.bias":
            assert not actual.any()  # zero in mathematics
        else:
            tolerance.check(actual, truth[name], theirs[name], name)
    return found


@pytest.mark.parametrize(
    ("case", "dtype"), [("even", torch.bfloat16), ("odd_groups", torch.float16), ("partial_chunk", torch.float16)]
)
def test_channels_last(device, case, dtype, wgmma, launched):
    model, ours, x = models(CASES[case], "auto", device, dtype)
    x = x.to(memory_format=torch.channels_last)
    assert explain(ours, x).startswith("fused")
    launched.clear()
    found = compare(model, ours, x)
    assert found["x"].stride() == x.stride()
    names = {kernel.name for kernel in launched}
    assert names & CONVERSIONS == ({"scale_fp16"} if dtype == torch.bfloat16 else set())
    assert names >= {"conv_bn_pool", "pooled_forward", "pooled_backward", "conv_transpose_mma", "conv_wgrad_mma"}


@pytest.mark.usefixtures("many_passes", "one_multiprocessor")
def test_a_block_takes_image_after_image(device, launched, wgmma):
    """Rows of the next image are copied into the place of rows that no later product of this one reads."""
    model, ours, x = models((16, 80, 3, 0, 4, 3, 52, 14), "auto", device, torch.float16)
    x = x.to(memory_format=torch.channels_last)
    with torch.no_grad():
        found, theirs, truth = ours(x), model(x), copy.deepcopy(model).double()(x.double())
    pool = next(kernel for kernel in launched if kernel.name == "conv_bn_pool")
    assert dict(pool.defines)["WGMMA"] == wgmma
    tolerance.check(found, truth, theirs, "output")


@pytest.mark.parametrize("last", [False, True], ids=["nchw", "channels_last"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_float32_parameters_under_autocast(device, dtype, last, launched, wgmma):
    """The layer before gives 16 bits; the parameters stay as they are, and so do their gradients."""
    model, ours, x = models(CASES["even"], "auto", device)
    x = x.to(dtype, memory_format=torch.channels_last if last else torch.contiguous_format)
    launched.clear()
    found = compare(model, ours, x, dtype)
    assert (found["x"].dtype, found["conv_transpose.weight"].dtype) == (dtype, torch.float32)
    pool = next(kernel for kernel in launched if kernel.name == "conv_bn_pool")
    assert dict(pool.defines)["pooled_t"] == "half_t"
    with pytest.raises(RuntimeError, match=r"dtype|type"):  # as without autocast in PyTorch
        model(x)
    with pytest.raises(TypeError, match="one dtype"):
        ours(x)


def test_evaluation_without_a_backward(device, wgmma):
    model, ours, x = models(CASES["even"], "auto", device, torch.bfloat16)
    x = x.to(memory_format=torch.channels_last)
    with torch.no_grad():
        model(x), ours(x)
        truth = copy.deepcopy(model).double().eval()(x.double())
        tolerance.check(ours.eval()(x), truth, model.eval()(x), "output")


@pytest.mark.parametrize("kilobytes", [227, 80])
def test_several_passes_and_chunks_of_channels_last(device, many_passes, monkeypatch, kilobytes, launched):
    """A band of several chunks stays in shared memory, or does not fit, which mma.sync alone takes."""
    monkeypatch.setattr(numerics, "_EMULATED_SHARED_BYTES", kilobytes * 1024)
    model, ours, x = models((80, 16, 3, 1, 2, 2, 18, 20), "auto", device, torch.float16)
    with numerics.wgmma(kilobytes == 227 and (device == "cpu" or numerics.has_wgmma(0))):
        compare(model, ours, x.to(memory_format=torch.channels_last))
    pool = dict(next(kernel for kernel in launched if kernel.name == "conv_bn_pool").defines)
    if device == "cpu":
        assert (pool["WGMMA"], pool.get("RESIDENT")) == ((1, None) if kilobytes == 227 else (0, 0))


def test_extreme_values_of_bfloat16(device, wgmma):
    """Far beyond float16's range, in either direction: the scales follow."""
    model, ours, x = models(CASES["even"], "auto", device, torch.bfloat16)
    with torch.no_grad():
        for scale in (2.0**60, 2.0**-60):
            scaled = (x * scale).to(memory_format=torch.channels_last)
            model.conv_transpose.bias.zero_(), ours.conv_transpose.bias.zero_()
            model.batch_norm.eps = ours.batch_norm.eps = 1e-5 * scale**2 if scale < 1 else 1e-5
            truth = copy.deepcopy(model).double()(scaled.double())
            tolerance.check(ours(scaled), truth, model(scaled), f"output at {scale}")


def test_an_uncentred_input(device):
    """Values far from 0 on average, as those behind a ReLU: dy sums to 0, x does not."""
    model, ours, x = models(CASES["even"], "auto", device, torch.float16)
    compare(model, ours, (x.abs() + 3).to(memory_format=torch.channels_last))


def test_pooled_sums_have_16_bits_under_autocast(device):
    _, ours, x = models(CASES["even"], "fp32", device)
    conv = ours.conv_transpose

    def kept(keep):
        plan, _ = fused_plan(x, conv.weight, 1, 4, "fp32")
        return {name: sized(*array) for name, array in ops.kept_arrays(plan, x.shape, 4, keep).items()}

    assert kept(True)["saved"] == 4 * kept(True)["pooled"]  # float32 both
    with torch.autocast(device):
        found = kept(True)
        assert found["saved"] == 4 * found["pooled"] == 32 * found["argmax"]
        assert kept(False)["pooled"] == found["pooled"]
        ours(x.requires_grad_())
        if device == "cpu":
            assert sum(found.values()) < peak(lambda: ours(x), device)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradients_at_every_scale_of_a_loss(device, dtype):
    """Scales of GradScaler from 1 to 2^24 change no bit but the exponent's: nothing overflows or vanishes."""
    _, ours, x = models(CASES["even"], "auto", device)
    y = ours(x)
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(y) * 2.0**-10
    gradients = []
    for scale in (1.0, 2.0**8, 2.0**24):
        with torch.autocast(device, dtype):
            y = ours(x.clone().requires_grad_()).float()
        ours.zero_grad()
        y.backward(dy.to(torch.bfloat16).float() * scale)
        gradients.append([p.grad / scale for p in ours.parameters()])
    if device == "cpu" and dtype == torch.float16:  # where the result, and so its gradient, is float16
        gradients.pop()
    for other in gradients[1:]:
        for a, b in zip(gradients[0], other, strict=True):
            torch.testing.assert_close(a, b, rtol=2e-3, atol=2e-3 * a.abs().max().item())


def test_the_scaler_finds_what_is_not_finite(device):
    """A step that overflowed is left out, and the scale is halved, as with Model."""
    model, ours, x = models(CASES["even"], "auto", device)
    ends = []
    for module in (model, ours):
        scaler = torch.amp.GradScaler(device, init_scale=2.0**10)
        optimizer = torch.optim.SGD(module.parameters(), 0.1)
        scales = []
        for factor in (1.0, float("inf"), 1.0, float("nan"), 1.0):
            before = module.conv_transpose.weight.detach().clone()
            with torch.autocast(device, torch.bfloat16 if device == "cpu" else torch.float16):
                loss = module(x).float().square().mean() * factor
            optimizer.zero_grad()
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            scales.append((scaler.get_scale(), torch.equal(before, module.conv_transpose.weight)))
        ends.append(scales)
    assert ends[0] == ends[1] == [(1024, False), (512, True), (512, False), (256, True), (256, False)]


@pytest.mark.parametrize(
    ("x", "w", "message"),
    [
        (torch.float16, torch.float16, "under autocast parameters must be float32"),
        (torch.float64, torch.float32, "under autocast parameters must be float32"),
    ],
)
def test_mixtures_that_are_refused_under_autocast(x, w, message):
    arguments = [torch.randn(1, 16, 6, 6).to(x), None, None]
    with torch.autocast("cpu"), pytest.raises(ValueError, match=message):
        conv_bn_tanh_max_pool_group_norm(
            *arguments, training=True, conv_weight=torch.randn(16, 16, 3, 3).to(w), num_groups=4
        )
