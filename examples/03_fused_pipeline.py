# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # How the fused pipeline works
#
# With all five operators replaced, `ModelNew` runs three main kernels forward. The first is the transposed convolution,
# which also pools. The second computes the statistics of batch norm. The third does everything else. This notebook
# takes them a stage at a time, and then the way back. The layouts are computed from the package's own plan. Each claim
# about numbers is checked where it is made.
#
# On a GPU it runs the real shape, 512 images of 64x32x32. Without one the same kernels run in the CPU emulator, on
# small images. The pictures of layouts are of the real shape in either case.

# %%
import math
from copy import deepcopy

import matplotlib.pyplot as plt
import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.patches import Rectangle

import modelnew
from cupy_kernels import conv_transpose_mma
from cupy_kernels.conv_transpose import Geometry
from cupy_kernels.launch import observed
from modelnew import Model, ModelNew, environment, parity, timing, workloads

RED, GRAY = "#c0392b", "#95a5a6"  # ModelNew, PyTorch
device = environment.device()
on_gpu = device.type == "cuda"
MISSION = workloads.Shape(64, 128, 5, 1, 1, 32)  # of one image and the convolution
init = modelnew.get_init_inputs() if on_gpu else [16, 32, 5, 1, 1, 8, 8]
shape = (512, 64, 32, 32) if on_gpu else (2, 16, 10, 10)
torch.manual_seed(0)
model = Model(*init, device=device)
model_new = ModelNew(*init, device=device)
model_new.load_state_dict(model.state_dict())
x = torch.rand(shape, generator=torch.Generator().manual_seed(1)).to(device)
print(modelnew.explain(model_new, x))

# %% [markdown]
# ## What has to move
#
# When operators run one by one, each result goes to memory and comes back. For 512 images of 64x32x32, in float32:

# %%
images, pixels, pooled_pixels = 512, MISSION.out_size**2, (MISSION.out_size // 2) ** 2
big = images * MISSION.out_channels * pixels * 4 / 1e6
small = images * MISSION.out_channels * pooled_pixels * 4 / 1e6
inputs = images * MISSION.in_channels * MISSION.size**2 * 4 / 1e6
traffic = {
    "one by one": [inputs + big, 3 * big, 2 * big, big + small, 3 * small],
    "fused": [inputs + small, 0, 0, 0, 2 * small],
}
figure, axes = plt.subplots(figsize=(9, 2))
left = np.zeros(2)
for i, name in enumerate(modelnew.model.OPERATORS):
    width = np.array([megabytes[i] for megabytes in traffic.values()])
    axes.barh(list(traffic), width, left=left, label=name)
    left += width
axes.bar_label(axes.containers[-1], [f"{value:.0f} MB" for value in left], padding=3)
axes.set_xlim(right=left.max() * 1.15)
axes.set_xlabel("MB read and written by a forward in training mode, without gradients")
axes.legend(ncols=5, fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.35), frameon=False)
axes.invert_yaxis()
plt.show()

# %% [markdown]
# The convolution itself needs 242 GFLOP, and the rest next to nothing. So the plan is: give the convolution to tensor
# cores, and do everything else while its sums are still in registers, or on the quarter of the values that pooling
# leaves.

# %% [markdown]
# ## Stage 1: the convolution, an implicit matrix product
#
# $$y_{n,m,oh,ow} = \sum_{k,\,kh,\,kw} x_{n,\,k,\,oh+p-kh,\,ow+p-kw}\; w_{k,m,kh,kw}$$
#
# Rows of the product are output channels $m$, columns are output pixels, and the sum runs over input channels and the
# 25 taps. A block of threads owns a *unit*: 128 channels, and some passes over 256 pixels of one image. In a pass, each
# of its 8 warps has 64 channels and 64 pixels. The plan for a batch of 512:

# %%
plan = conv_transpose_mma.plan(
    (512, 64, 32, 32), (64, 128, 5, 5), Geometry((1, 1), (1, 1), (0, 0), (1, 1), 1), 1, False, "float", 227 * 1024
)
macros = dict(plan.macros)
passes, warps_n = macros["UNIT_PASSES"], macros["WARPS_N"]
WARP_WINDOWS, LANES = 16, 4  # windows of a warp, and how many lanes share them (the other eight groups: channels)
pass_windows = warps_n * WARP_WINDOWS
print(f"{plan.units} unit(s) an image, {passes} passes a unit, {pass_windows} windows of 2x2 pixels a pass")
print(f"{plan.threads} threads, {plan.shared_bytes / 1024:.0f} KiB of shared memory: {macros['BAND_ROWS']} rows of x")

# %% [markdown]
# Pixels are numbered by pooling windows, not by rows. A tensor-core instruction multiplies 16 channels by 8 pixels, a
# *tile*, and leaves two neighbouring columns of the result in each lane. So the upper row of four windows is one tile,
# their lower row is the next, and all four corners of a window end up in one lane: pooling compares a lane's own
# registers. Which four windows share a tile is free to choose. With every fourth of a warp's 16, the four that a lane
# collects over its tiles are neighbours, and go to memory in one store of 16 bytes.

# %%
windows_w = math.ceil(MISSION.out_size / 2)
row, column = np.mgrid[: MISSION.out_size, : MISSION.out_size]
window = row // 2 * windows_w + column // 2
figure, axes = plt.subplots(figsize=(5, 4.4))
axes.imshow(window // pass_windows, cmap="Pastel1")
for p in range(passes):
    at = np.argwhere(window // pass_windows == p).mean(0)
    axes.text(at[1], at[0], f"pass {p}", ha="center", va="center")
axes.set_title(f"output pixels of an image: {passes} passes of {pass_windows} windows", fontsize=10)
axes.set_xlabel("ow")
axes.set_ylabel("oh")

figure, axes = plt.subplots(figsize=(12, 1.7))
first = np.arange(2 * WARP_WINDOWS) // 2
per_lane = WARP_WINDOWS // LANES
lane, tile = first // per_lane, 2 * (first % per_lane)
axes.imshow(np.stack([lane, lane]), cmap="Pastel2", vmax=7, aspect="auto")
for (i, j), _ in np.ndenumerate(np.empty((2, 2 * WARP_WINDOWS))):
    axes.text(j, i, f"{tile[j] + i}", ha="center", va="center", fontsize=9)
for j in range(WARP_WINDOWS):
    axes.add_patch(Rectangle((2 * j - 0.5, -0.5), 2, 2, fill=False, lw=0.8))
axes.set_title("the first warp's 16 windows: a colour for each lane, and the tile that each pixel is in", fontsize=10)
axes.set_xlabel("ow")
axes.set_ylabel("oh")
axes.set_yticks([0, 1])
plt.show()

# %% [markdown]
# The image lies in shared memory as *lines*: one pixel, 64 channels, 128 bytes of fp16. Every tap reads the same lines,
# shifted by $(kh, kw)$. Nothing is copied into columns. What a shift reads outside the image must be zero. One row of
# zeros serves for all rows outside. A gap of zero lines between two rows is the right border of one and the left border
# of the next.

# %%
gap = max(0, macros["KERNEL_W"] - 1 - macros["PAD_W"])
pitch = macros["IN_W"] + gap
rows = 7
figure, axes = plt.subplots(figsize=(11, 3.4))
lines = np.zeros((rows, gap + pitch))
lines[1:, gap : gap + macros["IN_W"]] = 1
axes.imshow(lines, cmap="Blues", vmin=0, vmax=2.5, aspect="auto")
axes.text(pitch / 2, 0, "zero row", ha="center", va="center", color="gray")
axes.text(gap + macros["IN_W"] / 2 + 6, 4, "lines of x", ha="center", va="center")
axes.text(pitch + gap / 2 - 0.5, 3, "the next row's gap", rotation=90, ha="center", va="center", color="gray")
for tap, colour in (((0, 0), "tab:red"), ((2, 2), "tab:green"), ((4, 4), "tab:purple")):
    # Output pixels (2..3, 0..7): rows oh + pad - kh of x, which start one below the zero row.
    top, start = 3 + macros["PAD_H"] - tap[0], gap + macros["PAD_W"] - tap[1]
    axes.add_patch(Rectangle((start - 0.45, top - 0.45), 7.9, 1.9, fill=False, ec=colour, lw=2.5))
    middle, box = (start + 3.5, top + 0.5), {"fc": "white", "ec": "none", "pad": 2}
    axes.text(*middle, f"tap {tap}", ha="center", va="center", color=colour, weight="bold", bbox=box)
axes.set_title(
    f"what three taps read for output pixels (2..3, 0..7): {gap} zero lines a row, pitch {pitch}", fontsize=10
)
axes.set_xlabel("line")
axes.set_ylabel("row of lines")
plt.show()

# %% [markdown]
# Shared memory has 32 banks of 4 bytes. So a line spans all of them once, and the same part (16 bytes) of every line
# would lie in the same four banks. `ldmatrix`, the tensor cores' load, fetches one part of eight pixels at a time. Here
# these are the upper rows of four windows that lie 8 pixels apart. Eight accesses to the same banks would have to take
# turns. So parts are swapped: the part's number is XORed with a key of the line. The keys of these eight lines differ:


# %%
def key(ih, line_column):
    place = ih * windows_w + line_column
    return place // 8 % 4 * 2 + place % 2


# Of every warp, every pair of tiles and every tap: the eight pixels of one load.
start = np.arange(0, pixels // 4 - WARP_WINDOWS + 1, WARP_WINDOWS)[:, None, None]
windows = start + np.arange(per_lane)[:, None] + np.repeat(np.arange(LANES), 2) * per_lane
for kh in range(MISSION.kernel_size):
    for kw in range(MISSION.kernel_size):
        ih = 2 * (windows // windows_w) + macros["PAD_H"] - kh
        line_column = gap + 2 * (windows % windows_w) + np.tile([0, 1], LANES) + macros["PAD_W"] - kw
        keys = np.sort(key(ih + 8, line_column))  # 8 rows more: the same keys, and no negative number
        assert (keys == np.arange(8)).all()

pixel = np.repeat(np.arange(LANES), 2) * 2 * per_lane + np.tile([0, 1], LANES)
figure, panels = plt.subplots(1, 2, figsize=(10, 3.6), sharey=True)
for panel, keys, title in zip(panels, (np.zeros(8, int), key(0, gap + pixel)), ("as it comes", "swapped by key")):
    place = np.arange(8)
    parts = place ^ keys[:, None]
    panel.imshow(parts == 2, cmap="Reds", vmax=2, aspect="auto")
    for (i, j), part in np.ndenumerate(parts):
        panel.text(j, i, part, ha="center", va="center", weight="bold" if part == 2 else "normal")
    panel.set_xticks(place, [f"{4 * p}-{4 * p + 3}" for p in place], fontsize=8)
    panel.set_yticks(place, [f"ow={p}" for p in pixel], fontsize=8)
    panel.set_xlabel("banks")
    panel.set_title(f"parts of eight lines, {title}", fontsize=10)
plt.show()

# %% [markdown]
# The weights of a tap (128 channels x 64) take 16 KB. A ring in shared memory holds those of a few taps. `cp.async`
# copies the next ones while the tensor cores work on the taps before.
#
# This is the main loop for `mma.sync`, which every GPU from compute capability 8.0 on has (`conv_mma.cuh`). H100 and
# H200, with NVRTC 12 or newer, run another one (`conv_wgmma.cuh`), and times of them below are that one's. `wgmma`
# instructions read both operands from shared memory on their own. So there is no `ldmatrix`, and no key. Eight channels
# of all pixels lie together, the even rows of $x$ before the odd ones. So neighbouring windows read neighbouring lines
# whatever the tap. All four corners of a window end up in one lane there, too, and what follows is the same.

# %% [markdown]
# ## Numeric classes: fp16 under scales
#
# TF32, PyTorch's default for convolutions on a GPU, rounds operands to 10 mantissa bits. fp16 keeps 10, too. It runs at
# twice the rate, and has a smaller range. So values are multiplied by a power of two, measured from the data, such that
# the largest stays below $2^{15}$. Powers of two change no digit, and nothing overflows. Values far below the largest
# become fp16 denormals and lose digits. But those are digits that a sum with the largest does not see. The class
# `"fp32"` keeps what rounding left over as a second fp16 value, and multiplies three times:
# $(a + a')(b + b') \approx ab + ab' + a'b$.


# %%
def tf32(t):
    return parity.tf32_rounded(t)


def scaled_half(t):
    scale = 2.0 ** (14 - math.floor(math.log2(t.abs().max().item())))
    return (t * scale).half().float() / scale


def two_halves(t):
    return scaled_half(t) + scaled_half(t - scaled_half(t))


values = torch.randn(200_000, generator=torch.Generator().manual_seed(3))
figure, axes = plt.subplots(figsize=(9, 3))
methods = {"bfloat16": lambda t: t.bfloat16().float(), "TF32": tf32, "fp16, scaled": scaled_half}
methods["two fp16, scaled"] = two_halves
for name, method in methods.items():
    relative = ((method(values) - values) / values).abs().numpy()
    exact = (relative == 0).mean()
    bins = np.arange(-26, -6, 0.25)
    axes.hist(
        np.log2(relative[relative > 0]),
        bins,
        histtype="step",
        lw=5 if name == "TF32" else 1.5,
        alpha=0.5 if name == "TF32" else 1,
        label=name + (f" ({exact:.0%} exact)" if exact > 0.05 else ""),
    )
axes.set_xticks(range(-26, -6, 2), [f"$2^{{{e}}}$" for e in range(-26, -6, 2)])
axes.set_xlabel("relative rounding error of an operand")
axes.set_yticks([])
axes.set_ylabel("how many")
axes.legend(loc="upper left")
plt.show()

# %% [markdown]
# TF32 and scaled fp16 are the same curve. What that means for the results is measured further down.

# %% [markdown]
# ## Stage 2: pooling before batch norm
#
# Max pooling comes after batch norm and tanh, and batch norm's statistics need all of the convolution's output. So it
# seems that the output must go to memory. But in each channel batch norm is a straight line, and tanh increases. So
# $\tanh(\gamma\hat y + \beta)$ is monotone in the convolution's sum $y$:
#
# - where $\gamma > 0$, the window's largest $y$ gives its largest value;
# - where $\gamma < 0$, the smallest does;
# - where $\gamma = 0$ all four values are equal, and the first index wins, as in PyTorch.
#
# The sign of $\gamma$ is known before the convolution begins. The statistics are not, and are not needed.

# %%
four = np.array([-1.1, 0.4, 1.3, -0.2])
figure, panels = plt.subplots(1, 3, figsize=(12, 3.2), sharey=True)
along = np.linspace(-2, 2, 200)
for panel, gamma in zip(panels, (1.2, -0.8, 0.0)):
    result = np.tanh(gamma * four + 0.1)
    winner = int(result.argmax())
    panel.plot(along, np.tanh(gamma * along + 0.1), color=GRAY)
    panel.plot(four, result, "o", color="tab:blue")
    panel.plot(four[winner], result[winner], "o", color=RED, markersize=11)
    panel.axhline(result[winner], color=RED, lw=0.8, ls=":")
    for corner, at in enumerate(zip(four, result)):
        panel.annotate(f"$y_{corner}$", at, (6, -12), textcoords="offset points")
    panel.set_title(rf"$\gamma$ = {gamma}: the {'largest' if gamma > 0 else 'smallest' if gamma else 'first'} sum wins")
    panel.set_xlabel("sum of the convolution")
panels[0].set_ylabel("tanh(batch norm)")
plt.show()

# %% [markdown]
# So the epilogue keeps one value of four, before any statistics are known. In numbers, with weights of all signs:

# %%
sums = torch.randn(8, 6, 12, 12, dtype=torch.float64)
gamma = torch.tensor([1.0, -2.0, 0.0, 0.3, -0.1, 1.5], dtype=torch.float64)
beta = torch.randn(6, dtype=torch.float64)
late = F.max_pool2d(torch.tanh(F.batch_norm(sums, None, None, gamma, beta, training=True)), 2)

sign = gamma.sign().view(-1, 1, 1)
first = sums[:, :, ::2, ::2]
pooled = torch.where(sign == 0, first, F.max_pool2d(sums * sign, 2) * sign)
mean, variance = sums.mean((0, 2, 3)), sums.var((0, 2, 3), unbiased=False)
scale = gamma / (variance + 1e-5).sqrt()
early = torch.tanh((pooled - mean.view(-1, 1, 1)) * scale.view(-1, 1, 1) + beta.view(-1, 1, 1))
print(f"largest difference: {(late - early).abs().max().item():.1e}")
assert torch.allclose(late, early, rtol=0, atol=1e-12)

# %% [markdown]
# What is stored for a 512-image batch is 76 MB instead of 303 MB. A training forward keeps more for its backward: all
# sums, as fp16 (or float32, in the class of that name), and which corner of each window won.

# %% [markdown]
# ## Stage 3: statistics from registers
#
# Mean and variance are over the whole batch. Each unit writes the count, the mean and the sum of squared distances from
# the mean, of what it has in registers. A small kernel combines them in a fixed order (Chan's rule). The squares of the
# values are never summed: where the mean is large, $E[x^2] - E[x]^2$ subtracts two large numbers, and little is left.

# %%
shifts = 10.0 ** np.arange(0, 6)
wrong = {"E[x²] - E[x]²": [], "combined moments": []}
noise = torch.randn(64, 4624, generator=torch.Generator().manual_seed(4))
for shift in shifts:
    data = noise + shift
    truth = data.double().var(unbiased=False).item()
    naive = (data.square().mean() - data.mean().square()).item()
    means, squares = data.mean(1), (data - data.mean(1, keepdim=True)).square().sum(1)
    combined = (squares.sum() + 4624 * (means - means.mean()).square().sum()).item() / data.numel()
    for name, value in zip(wrong, (naive, combined)):
        wrong[name].append(max(abs(value - truth) / truth, 1e-9))
figure, axes = plt.subplots(figsize=(7, 3))
for (name, errors), colour in zip(wrong.items(), (GRAY, RED)):
    axes.loglog(shifts, errors, "o-", label=name, color=colour)
axes.axhline(1, color="black", lw=0.8, ls=":")
axes.annotate("nothing is right any more", (shifts[0], 1.5), fontsize=8)
axes.set_xlabel("mean, in standard deviations")
axes.set_ylabel("relative error of the variance")
axes.set_title("variance of float32 values, computed in float32", fontsize=10)
axes.legend()
plt.show()

# %% [markdown]
# ## Stage 4: the tail
#
# One block takes a group of one image: for the real shape 16 channels of 17x17 pooled values, 18 KB, a warp for each
# channel. They are read once. They stay in registers through batch norm, tanh, the group's mean and variance, and its
# normalisation. The result is written once. The whole forward against PyTorch, in float32:

# %%
with torch.no_grad(), parity.tf32(False):
    expected, actual = deepcopy(model)(x), deepcopy(model_new)(x)
print("output", tuple(actual.shape), f"largest difference: {(actual - expected).abs().max().item():.1e}")
torch.testing.assert_close(actual, expected)

# %% [markdown]
# ## Backward
#
# The gradient at batch norm's output is zero except at the winners of the windows. Batch norm's backward needs the sum
# of the gradient $g$, and that of $g$ times the normalised value. So both come from the pooled values alone. The
# gradient of the convolution's output is built in one go:
#
# $$\frac{\partial L}{\partial y} = a\cdot\mathrm{scatter}(g) - b - c\,y$$
#
# with three numbers per channel.

# %%
h = torch.randn(1, 1, 10, 10, dtype=torch.float64, generator=torch.Generator().manual_seed(5)).requires_grad_()
normed = F.batch_norm(h, None, None, training=True)
normed.retain_grad()
incoming = torch.randn(1, 1, 5, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(6))
F.max_pool2d(torch.tanh(normed), 2).backward(incoming)

g, xhat, a = normed.grad, normed.detach(), 1 / (h.detach().var(unbiased=False) + 1e-5).sqrt()
rebuilt = a * (g - g.sum() / 100 - xhat * (g * xhat).sum() / 100)
assert (g != 0).sum() == 25
assert torch.allclose(rebuilt, h.grad)

figure, panels = plt.subplots(1, 3, figsize=(12, 3.6))
pictures = {
    "$a$ scatter($g$)": a * g,
    "gradient of the convolution's output": h.grad,
    "the rest, $-b - c\\,y$": h.grad - a * g,
}
for panel, (title, gradient) in zip(panels, pictures.items()):
    limit = gradient.abs().max().item()
    picture = panel.imshow(gradient[0, 0], cmap="RdBu", vmin=-limit, vmax=limit)
    figure.colorbar(picture, ax=panel, shrink=0.8)
    panel.set_title(title, fontsize=10)
    panel.set_xticks([])
    panel.set_yticks([])
    for i in range(5):
        for j in range(5):
            panel.add_patch(Rectangle((2 * j - 0.5, 2 * i - 0.5), 2, 2, fill=False, lw=0.5))
plt.show()

# %% [markdown]
# That gradient, $dy$, is written once, as packed fp16 tiles, and two convolutions read it. The gradient of $x$ is the
# first convolution with flipped weights, so it is the same kernel. The gradient of the weight is, for each tap, a
# product of $x$ and $dy$ summed over all pixels. There, the 16 pixels that one tensor-core instruction sums over lie
# below each other. The next tap to the right then needs the same column of $x$, and the next column of $dy$. So a warp
# keeps five columns of $dy$ in registers. Each column is read from shared memory once for all five taps.

# %%
figure, panels = plt.subplots(1, 2, figsize=(11, 3.2))
colours = ["tab:red", "tab:orange", "tab:green", "tab:blue", "tab:purple"]
for panel, name in zip(panels, ("x", "dy")):
    panel.imshow(np.zeros((18, 22)), cmap="Blues", vmin=0, vmax=2)
    panel.axhspan(0.5, 16.5, color="tab:blue", alpha=0.12)
    panel.set_title(f"{name}: a band of 16 rows", fontsize=10)
    panel.set_xlabel("column")
    panel.set_yticks([])
here = 9
panels[0].add_patch(Rectangle((here - 0.5, 0.5), 1, 16, color="black"))
for kw, colour in enumerate(colours):
    panels[1].add_patch(Rectangle((here - 1 + kw - 0.5, 0.5), 1, 16, color=colour, label=f"kw = {kw}"))
panels[1].legend(loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)
plt.show()

# %% [markdown]
# ## The stages, timed
#
# Each launch of one training step is timed alone, by CUDA events. The L2 cache is flushed before it. Names are those of
# `cupy_kernels.kernels()`.

# %%
launches = []
candidate = deepcopy(model_new)
leaf = x.detach().requires_grad_()
with parity.tf32(on_gpu), observed(lambda *launch: launches.append(launch)):
    y = candidate(leaf)
    torch.autograd.grad(y, [leaf, *candidate.parameters()], torch.ones_like(y))
names = [kernel.name for kernel, *_ in launches]
if on_gpu:
    ms = [times.median for times in timing.measure_launches(launches, device)]
    forward = names.index("pooled_forward") + 1
    figure, axes = plt.subplots(figsize=(9, 0.3 * len(names) + 0.8))
    bars = axes.barh(range(len(names)), ms, color=["#2980b9"] * forward + ["#16a085"] * (len(names) - forward))
    axes.bar_label(bars, [f"{value:.3f}" for value in ms], padding=3, fontsize=8)
    axes.set_yticks(range(len(names)), names, fontsize=8)
    axes.set_xlim(right=max(ms) * 1.1)
    axes.invert_yaxis()
    axes.set_xlabel("ms")
    axes.set_title(f"forward (blue) and backward (green), class tf32: {sum(ms):.2f} ms in all", fontsize=10)
    plt.show()
else:
    print(", ".join(names))
    print("In the emulator their times would say nothing.")

# %% [markdown]
# ## Errors by numeric class
#
# The judge is the float64 run of the reference. Our error should be about as large as PyTorch's in the same class.

# %%
classes = ("fp32", "tf32") if on_gpu else ("fp32",)
found = {cls: parity.compare_models(model, model_new, x, cls) for cls in classes}
figure, panels = plt.subplots(1, len(classes), figsize=(7 * len(classes), 3.6), squeeze=False, sharey=True)
for panel, (cls, rows) in zip(panels[0], found.items()):
    assert all(row.ok for row in rows)
    rows = [row for row in rows if row.what != "grad conv_transpose.bias"]  # zero in mathematics
    place = np.arange(len(rows))
    panel.barh(place - 0.2, [row.torch.rms for row in rows], 0.4, label="PyTorch", color=GRAY)
    panel.barh(place + 0.2, [row.ours.rms for row in rows], 0.4, label="ModelNew", color=RED)
    panel.set_yticks(place, [row.what for row in rows])
    panel.set_xscale("log")
    panel.set_xlim(left=1e-8)
    panel.grid(axis="x", lw=0.3)
    panel.set_axisbelow(True)
    panel.set_xlabel("rms error against float64, relative")
    panel.set_title(f"class {cls}")
panels[0][0].invert_yaxis()
panels[0][-1].legend(loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)
plt.show()
