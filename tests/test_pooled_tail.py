"""The fused backward up to the convolution, each step against float64."""

import copy
import itertools

import pytest
import tolerance
import torch
import torch.nn.functional as F

from cupy_kernels import conv_bn_pool as ops
from cupy_kernels import conv_bn_pool_backward as back
from cupy_kernels import fp16_tiles
from cupy_kernels.conv_transpose import Geometry
from cupy_kernels.conv_transpose_mma import plan as conv_plan
from modelnew import parity
from modelnew.calls import run
from modelnew.interop import FLOATS

# (channels, groups, images, height, width of the convolution's output)
SHAPES = {
    "even": (16, 4, 2, 6, 8),
    "odd_few_channels_a_chunk": (48, 1, 3, 5, 7),
    "plane_of_one": (80, 5, 2, 3, 2),
    "groups_of_one_channel": (16, 16, 2, 4, 7),
    "parts": (16, 8, 1, 39, 40),
    "not_resident": (80, 1, 1, 26, 26),
}
SPLITS = (1, 2)
# The reference of each activation, and the number that its kernels get: one that float32 and float64 both have.
ACTIVATIONS = {
    "tanh": (torch.tanh, 0),
    "leaky_relu": (lambda v: F.leaky_relu(v, 0.25), 0.25),
}


class Tail:
    """Random arrays as the forward leaves them for the backward, and float64's results."""

    def __init__(
        self,
        shape,
        split,
        device,
        training=True,
        dtype=torch.float32,
        change=None,
        kernel=(2, 2),
        padding=(0, 0),
        activation="tanh",
        inputs=16,
    ):
        self.activation, (self.activate, self.parameter) = activation, ACTIVATIONS[activation]
        self.channels, self.groups, self.images, height, width = shape
        self.kernel, self.padding = kernel, padding
        size = tuple(n - k + 1 + 2 * p for n, k, p in zip((height, width), kernel, padding))
        geometry = Geometry((1, 1), padding, (0, 0), (1, 1), 1)
        self.x_shape, w_shape = (self.images, inputs, *size), (inputs, self.channels, *kernel)
        self.plan = conv_plan(self.x_shape, w_shape, geometry, split, False, FLOATS[dtype], 227 * 1024, wgmma=True)
        if dtype != torch.float32:
            self.plan = ops.typed(self.plan, FLOATS[dtype], half=True)
        self.split, self.training, self.device, self.dtype = split, training, device, dtype
        generator = torch.Generator().manual_seed(1)

        def normal(*sizes):
            return torch.randn(sizes, generator=generator, dtype=torch.float64)

        self.y = 3 * normal(self.images, self.channels, height, width) + normal(self.channels, 1, 1)
        self.weight, self.bias, self.group_weight, self.group_bias = (normal(self.channels) for _ in range(4))
        self.weight[1] = 0
        out = (self.images, self.channels, height // 2, width // 2)
        self.dout = normal(*out)
        if change:
            change(self)
        for name in ("weight", "bias", "group_weight", "group_bias", "dout"):
            setattr(self, name, getattr(self, name).to(dtype).double())
        self._save()
        self.given = None if training else (self.mean, self.invstd)

    def _save(self):
        """y as conv_bn_pool keeps it, and what follows from that."""
        exponents = torch.arange(self.channels) % 5
        units = torch.arange(self.images * self.plan.units) % 3 + 1
        windows = F.pad(self.y, (0, self.y.shape[3] % 2, 0, self.y.shape[2] % 2)).unfold(2, 2, 2).unfold(3, 2, 2)
        windows = windows.reshape(self.images, self.channels, -1, 4)
        if self.split == 1:
            macros = dict(back._backward_macros(self.plan, self.groups, self.activation))
            window, per_row = torch.arange(windows.shape[2]), (self.y.shape[3] + 1) // 2
            unit = (window // per_row * macros["WINDOW_PITCH"] + window % per_row) // macros["UNIT_WINDOWS"]
            exponent = exponents.view(1, -1, 1) + units.view(self.images, 1, -1)[:, :, unit] - macros["SAVED_SHIFT"]
            scale = torch.exp2(exponent.double()).unsqueeze(3)
            saved = (windows * scale).half()
            windows = saved.double() / scale
        else:
            saved = windows = windows.float()
        height, width = self.y.shape[2:]
        self.y = windows.double().view(self.images, self.channels, (height + 1) // 2, (width + 1) // 2, 2, 2)
        self.y = self.y.transpose(3, 4).reshape(self.images, self.channels, height + height % 2, width + width % 2)
        self.y = self.y[:, :, :height, :width].contiguous()
        self.mean = self.y.mean((0, 2, 3)).float().double()
        self.invstd = (self.y.var((0, 2, 3), correction=0) + 1e-5).rsqrt().float().double()
        sign = self.weight.sign().view(1, -1, 1, 1)
        pooled, index = F.max_pool2d(self.y * sign, 2, return_indices=True)
        row, column = index // width, index % width
        self.pooled = torch.where(sign == 0, self.y[:, :, : height // 2 * 2 : 2, : width // 2 * 2 : 2], pooled * sign)
        self.argmax = torch.where(sign == 0, 0, row % 2 * 2 + column % 2)
        kept = self.pooled.float()
        if self.dtype != torch.float32:  # under the scales of `saved`
            scale = scale.view(self.images, self.channels, (height + 1) // 2, (width + 1) // 2)
            kept = (self.pooled * scale[:, :, : height // 2, : width // 2]).half()
        self.arrays = {
            "dout": self.dout.to(self.dtype),
            "pooled": self.padded(kept, float("nan")),
            "argmax": self.padded(self.argmax, 3).unflatten(2, (-1, 4)).mul(torch.tensor([1, 4, 16, 64])).sum(3).byte(),
            "saved": self.padded(saved.unflatten(2, ((height + 1) // 2, -1)), float("nan")),
            "exponents": exponents.int(),
            "unit_exponents": units.int(),
            "mean": self.mean.float(),
            "invstd": self.invstd.float(),
            **{k: getattr(self, k).to(self.dtype) for k in ("weight", "bias", "group_weight", "group_bias")},
        }
        p = self.activate(self.normalised(self.pooled)).reshape(self.images, self.groups, -1)
        self.arrays["group_mean"] = p.mean(2).flatten().float()
        self.arrays["group_invstd"] = (p.var(2, correction=0) + 1e-5).rsqrt().flatten().float()
        self.arrays = {name: t.contiguous().to(self.device) for name, t in self.arrays.items()}

    def padded(self, planes, value):
        """Planes [N, C, rows of windows, windows, ...] in the room that the forward leaves for each."""
        room = ops.kept_arrays(self.plan, (self.images,), self.groups, True)["pooled"][0][2]
        padded = torch.full((*planes.shape[:2], room, *planes.shape[4:]), value, dtype=planes.dtype)
        macros = dict(self.plan.planes)
        row, column = (t.flatten() for t in torch.meshgrid(*map(torch.arange, planes.shape[2:4]), indexing="ij"))
        window = row * macros["WINDOW_PITCH"] + column
        unit, at = window // macros["UNIT_WINDOWS"], window % macros["UNIT_WINDOWS"]
        if macros["WGMMA"]:
            together = 4 if planes.dim() == 4 else 4 // planes.element_size()
            at = at // 16 * 16 + at // 4 % 4 // together * 4 * together + at % 4 * together + at // 4 % together
        padded[:, :, unit * macros["UNIT_STRIDE"] + at] = planes.flatten(2, 3)
        return padded

    def normalised(self, y):
        per_channel = (t.view(1, -1, 1, 1) for t in (self.mean, self.invstd, self.weight, self.bias))
        mean, invstd, weight, bias = per_channel
        return (y - mean) * invstd * weight + bias

    def in_float32(self):
        """`truth`, as PyTorch computes it in float32 from the same values, the same winners of the pooling included."""
        other = copy.copy(self)
        for name, value in vars(self).items():
            if isinstance(value, torch.Tensor) and value.dtype == torch.float64:
                setattr(other, name, value.float())
        return other.truth()

    def truth(self):
        """g, sums, dy and the parameters' gradients, in float64."""
        z = self.normalised(self.pooled).requires_grad_()
        group_weight, group_bias = (t.clone().requires_grad_() for t in (self.group_weight, self.group_bias))
        out = F.group_norm(self.activate(z), self.groups, group_weight, group_bias)
        g, dgroup_weight, dgroup_bias = torch.autograd.grad(out, (z, group_weight, group_bias), self.dout)
        xhat = (self.pooled - self.mean.view(1, -1, 1, 1)) * self.invstd.view(1, -1, 1, 1)
        sums = torch.stack((g.sum((0, 2, 3)), (g * xhat).sum((0, 2, 3))))
        scale = (self.weight * self.invstd).view(1, -1, 1, 1)
        dy = torch.zeros_like(self.y)
        for corner in range(4):
            at = (slice(None), slice(None), slice(corner // 2, g.shape[2] * 2, 2), slice(corner % 2, g.shape[3] * 2, 2))
            dy[at] = torch.where(self.argmax == corner, g, 0)
        if self.training:
            count = self.y.numel() / self.channels
            mean_g, mean_dot = (s.view(1, -1, 1, 1) / count for s in sums)
            dy = dy - mean_g - (self.y - self.mean.view(1, -1, 1, 1)) * self.invstd.view(1, -1, 1, 1) * mean_dot
        gradients = {"weight": sums[1], "bias": sums[0], "group_weight": dgroup_weight, "group_bias": dgroup_bias}
        gradients["conv_bias"] = torch.zeros_like(sums[0]) if self.training else sums[0] * self.weight * self.invstd
        return {"g": g, "sums": sums, "dy": dy * scale, **gradients}

    def compute(
        self, wanted=("weight", "bias", "group_weight", "group_bias", "conv_bias"), packed=True, x=None, x_sums=None
    ):
        """The same by the kernels; dy from packed tiles, or as the general kernels get it. Packs x, if given."""
        a = self.arrays
        options = {"plan": self.plan, "groups": self.groups, "activation": self.activation}
        sizes = back.gradient_arrays(self.plan, self.images, centred=self.training)
        made = {k: torch.empty(s, dtype=getattr(torch, d.__name__), device=self.device) for k, (s, d) in sizes.items()}
        names = ("dout", "pooled", "exponents", "unit_exponents", "mean", "invstd", "weight", "bias", "group_weight")
        names += ("group_mean", "group_invstd")
        given = (*(a[k] for k in names), made["g"], made["partials"])
        run(back.pooled_gradients, *given, **options, parameter=self.parameter)
        names = ("weight", "bias", "group_weight", "group_bias", "conv_bias")
        gradients = {k: torch.empty(self.channels, dtype=self.dtype, device=self.device) for k in wanted}
        given = (made["partials"], a["mean"], a["invstd"], a["weight"], made["sums"], made["dy_exponents"])
        run(back.parameter_gradients, *given, *map(gradients.get, names), **options, training=self.training)
        names = ("argmax", "saved", "exponents", "unit_exponents", "mean", "invstd", "weight")
        given = (made["g"], *(a[k] for k in names), made["sums"] if self.training else None)
        if packed:
            dy = torch.empty(back.packed_output_shape(self.plan, self.images), dtype=torch.float16, device=self.device)
            borders, tiles = made.get("borders"), None
            if x is not None:
                tiles = torch.empty(fp16_tiles.packed_shape(x.shape, self.split), dtype=torch.float16, device=x.device)
            given += made["dy_exponents"], dy, borders, x, x_sums, tiles
            run(back.conv_output_gradient_packed, *given, **options)
            self.x_packed = tiles
            self.packed, dy = dy, self.unpack(dy, made["dy_exponents"])
            if borders is not None:
                self.borders = borders.double() * torch.exp2(-made["dy_exponents"].min().double())
        else:
            dy = torch.empty(self.y.shape, dtype=self.dtype, device=self.device)
            run(back.conv_output_gradient, *given, dy, **options)
        return {"g": made["g"], "sums": made["sums"], "dy": dy, "dy_exponents": made["dy_exponents"], **gradients}

    def unpack(self, packed, exponents):
        """dy in float64 from packed; fails unless the channels that fill the last chunk are zero."""
        images, chunks, pixels, _ = packed.shape
        values = packed.double().view(images, chunks, pixels, self.split, 64 // self.split).sum(3)
        values = values.transpose(2, 3).reshape(images, -1, *self.y.shape[2:])
        assert not values[:, self.channels :].any()
        return values[:, : self.channels] * torch.exp2(-exponents.min().double())


def check(found, tail, *names, packed=True):
    """Results, where they are finite, beside PyTorch's in float32, rounded to their dtype if that has 16 bits."""
    truth, theirs = tail.truth(), tail.in_float32()
    for name in names:
        rounds = packed and name == "dy" and tail.split == 1  # what TF32 does to an operand of dgrad and wgrad
        reference = parity.tf32_rounded(theirs[name]) if rounds else theirs[name]
        actual = found[name].cpu()
        actual = actual.float() if actual.dtype == torch.float64 else actual
        finite = truth[name].isfinite()
        assert torch.equal(actual.isfinite(), finite), name
        results = (actual, truth[name], reference.to(actual.dtype))
        tolerance.check(*(t[finite] for t in results), f"{name}, packed {packed}")


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_every_step_against_float64(device, shape, split, training, activation):
    tail = Tail(shape, split, device, training, activation=activation)
    names = [name for name in tail.truth() if name != "conv_bias" or not training]
    for packed in (True, False):
        found = tail.compute(packed=packed)
        assert found["conv_bias"].any() != training
        check(found, tail, *names, packed=packed)


# A kernel's size and padding: edges at all sides, two of both kinds of windows, none, more than half of the image.
BORDERS = {
    "reference": ((5, 5), (1, 1)),
    "three_and_six": ((3, 6), (2, 1)),
    "no_edges": ((3, 1), (2, 0)),
    "all_edges": ((6, 5), (0, 0)),
}


@pytest.mark.parametrize("conv", BORDERS.values(), ids=BORDERS)
@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize(
    ("shape", "shares"),
    [((16, 4, 2, 6, 8), 1), ((16, 16, 20, 13, 12), 3), ((16, 8, 520, 7, 8), 58), ((16, 8, 1, 39, 40), 1)],
    ids=str,
)
def test_borders(device, split, shape, shares, conv):
    """Sums of dy over the pixels that no tap of the convolution, or not all, brings together with a pixel of x."""
    kernel, padding = conv
    tail = Tail(shape, split, device, kernel=kernel, padding=padding)
    dy = tail.truth()["dy"]
    tail.compute()
    alone = torch.zeros(tail.channels, *kernel, dtype=torch.float64)
    inside = [n - k + 1 + 2 * p for n, k, p in zip(dy.shape[2:], kernel, padding)]
    for kh, kw in itertools.product(*map(range, kernel)):
        partnered = torch.zeros(dy.shape[2:], dtype=torch.bool)
        top, left = kh - padding[0], kw - padding[1]
        partnered[max(0, top) : top + inside[0], max(0, left) : left + inside[1]] = True
        alone[:, kh, kw] = dy[:, :, ~partnered].sum((0, 2))
    assert tail.borders.shape[0] == shares
    found = tail.borders.sum(0).T.reshape(alone.shape).cpu()
    tolerance.check(found.float(), alone, alone.float(), "borders", terms=dy[:, 0].numel())
    assert (alone == 0).all() == (conv == BORDERS["no_edges"])


# Channels of the output and of x: fewer and more blocks pack x than compute dy. The last image of a share is missing.
@pytest.mark.parametrize("centred", [True, False], ids=["centred", "as_it_is"])
@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("size", [(9, 8), (5, 7), (4, 7)], ids=str)
@pytest.mark.parametrize("channels", [(80, 16), (16, 272)], ids=str)
def test_packs_x_as_pack_fp16_does(device, channels, size, split, centred):
    tail = Tail((channels[0], 8, 19, *size), split, device, kernel=(2, 1), inputs=channels[1])
    alone = tail.compute()["dy"]
    x = 0.01 * torch.randn(tail.x_shape)
    x_sums = x[0].sum((1, 2)).to(device) if centred else None
    x, exponents = x.to(device), tail.arrays["unit_exponents"]
    expected = torch.empty(fp16_tiles.packed_shape(x.shape, split), dtype=torch.float16, device=device)
    run(fp16_tiles.pack_fp16, x, exponents, x_sums, expected, split)
    borders, found = tail.borders, tail.compute(x=x, x_sums=x_sums)["dy"]
    assert torch.equal(tail.x_packed, expected)
    assert torch.equal(found, alone)
    assert torch.equal(tail.borders, borders)


def test_packs_an_x_that_starts_anywhere(device):
    tail = Tail((16, 8, 2, 9, 8), 1, device, kernel=(2, 1))
    x = torch.randn(tail.x_shape).to(device)
    tail.compute(x=x)
    expected = tail.x_packed
    shifted = torch.empty(x.numel() + 1, device=device)[1:].view(x.shape).copy_(x)
    tail.compute(x=shifted)
    assert torch.equal(tail.x_packed, expected)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_16_bit_types(device, dtype, activation):
    tail = Tail(SHAPES["odd_few_channels_a_chunk"], 1, device, dtype=dtype, activation=activation)
    found, parameters = tail.compute(), ("weight", "bias", "group_weight", "group_bias")
    assert {found[name].dtype for name in parameters} == {dtype}
    check(found, tail, "g", "sums", "dy", *parameters)


@pytest.mark.parametrize("factor", [1e-30, 1e-20, 1e20])
@pytest.mark.parametrize("split", SPLITS)
def test_scaled_incoming_gradients_neither_vanish_nor_overflow(device, split, factor):
    def scaled(tail):
        tail.dout *= factor

    def scaled_channel(tail):
        tail.dout *= factor
        tail.dout[:, 3:] *= 1e-3  # channels of one scale: small ones lose bits only against the largest
        tail.weight[3] *= 1e-3

    for change in (scaled, scaled_channel):
        tail = Tail(SHAPES["even"], split, device, change=change)
        found = tail.compute()
        assert tail.packed.abs().max() > 8  # nor is half of fp16's range left unused: the bound is that close
        check(found, tail, "g", "sums", "dy", "weight", "group_weight")


@pytest.mark.parametrize("split", SPLITS)
def test_scaled_values_and_an_outlier_image(device, split):
    """Values of 1e20 (invstd 1e-20) or 1e-20 (all variance is eps), and one image 1e6 times the others."""
    for factor in (1e18, 1e-20):

        def scaled(tail, factor=factor):
            tail.y *= factor

        tail = Tail(SHAPES["even"], split, device, change=scaled)
        check(tail.compute(), tail, "g", "dy")

    def outlier(tail):
        tail.y[1] *= 1e6

    tail = Tail(SHAPES["odd_few_channels_a_chunk"], split, device, change=outlier)
    check(tail.compute(), tail, "dy")


def test_one_value_with_all_of_the_variance_does_not_overflow(device):
    """|xhat| as large as it can be, sqrt(count), where the gradient's means are largest."""

    def spike(tail):
        tail.y *= 1e-6
        tail.y[0, :, 0, 0] = 1e3
        tail.weight.abs_()
        tail.bias.zero_()
        tail.dout = tail.dout.abs()

    for training in (True, False):
        tail = Tail((16, 16, 3, 8, 8), 1, device, training, change=spike)
        check(tail.compute(), tail, "g", "dy")


def test_channels_of_zeros_do_not_decide_the_scale(device):
    def silent(tail):
        tail.dout *= 1e-25
        tail.weight[:5] = 0
        tail.dout[:, 8:12] = 0

    tail = Tail((16, 16, 2, 6, 8), 1, device, change=silent)
    found = tail.compute()
    check(found, tail, "dy")
    assert (found["dy_exponents"][:5] == 126).all()
    tail = Tail((16, 4, 2, 6, 8), 1, device, change=lambda t: t.dout.zero_())
    assert not tail.compute()["dy"].any()


@pytest.mark.parametrize("special", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("split", SPLITS)
def test_nan_and_inf_stay_in_their_channel(device, split, special):
    """In training all of a channel depends on each of its gradients; without, only the image's group of channels."""

    def planted(tail):
        tail.dout[1, 2, 1, 1] = special
        tail.dout *= 1e-10

    for training in (True, False):
        tail = Tail((16, 16, 2, 6, 8), split, device, training, change=planted)
        check(tail.compute(), tail, "g", "dy")


def test_only_wanted_gradients_are_written(device):
    tail = Tail(SHAPES["even"], 1, device)
    everything = tail.compute()
    for name in ("weight", "bias", "group_weight", "group_bias", "conv_bias"):
        assert torch.equal(tail.compute(wanted=(name,))[name], everything[name])


@pytest.mark.parametrize("split", SPLITS)
def test_two_runs_are_bit_equal(device, split):
    tail = Tail(SHAPES["not_resident"], split, device)
    first, packed = tail.compute(), tail.packed
    second = tail.compute()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert torch.equal(packed, tail.packed)
