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
# With all five operators replaced, `ModelNew` runs three main kernels forward: the transposed convolution, which pools
# in its epilogue; the statistics of batch norm; and everything else. This notebook takes them a stage at a time. What
# is said of layouts is computed from the package's own plan, and each claim about numbers is checked where it is made.
# On a GPU it uses the real shapes; without one the kernels run in the CPU emulator, on small ones.

# %%
import json
import math

import matplotlib.pyplot as plt
import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.patches import Rectangle

import modelnew
from cupy_kernels import conv_transpose_mma
from cupy_kernels.conv_transpose import Geometry
from modelnew import Model, ModelNew, environment, parity, plots, workloads

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
# One operator after the other, each result goes to memory and comes back. For 512 images of 64x32x32, in float32:

# %%
images, pixels, pooled_pixels = 512, MISSION.out_size**2, (MISSION.out_size // 2) ** 2
big = images * MISSION.out_channels * pixels * 4 / 1e6
small = images * MISSION.out_channels * pooled_pixels * 4 / 1e6
inputs = images * MISSION.in_channels * MISSION.size**2 * 4 / 1e6
traffic = {
    "one by one": [inputs + big, 3 * big, 2 * big, big + small, 3 * small],
    "fused": [inputs + small, 0, 0, 0, 2 * small],
}
figure, axes = plt.subplots(figsize=(8, 1.7))
left = np.zeros(2)
for i, name in enumerate(modelnew.model.OPERATORS):
    width = np.array([megabytes[i] for megabytes in traffic.values()])
    axes.barh(list(traffic), width, left=left, label=name)
    left += width
axes.bar_label(axes.containers[-1], [f"{value:.0f} MB" for value in left], padding=3)
axes.set_xlim(right=left.max() * 1.15)
axes.legend(ncols=3, fontsize=7, loc="lower right")
axes.invert_yaxis()
axes.set_title("memory read and written by a forward in training mode, no gradient")
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
# 25 taps. A block of threads owns a *unit*: 128 channels, and some passes over 256 pixels of one image. The plan:

# %%
plan = conv_transpose_mma.plan(
    (512, 64, 32, 32), (64, 128, 5, 5), Geometry((1, 1), (1, 1), (0, 0), (1, 1), 1), 1, False, "float", 227 * 1024
)
macros = dict(plan.macros)
passes, warps_n = macros["UNIT_PASSES"], macros["WARPS_N"]
pass_windows = warps_n * 16 // macros["SPLIT"]
print(f"{plan.units} unit(s) an image, {passes} passes a unit, {pass_windows} windows of 2x2 pixels a pass")
print(f"{plan.threads} threads, {plan.shared_bytes / 1024:.0f} KiB of shared memory: {macros['BAND_ROWS']} rows of x")

# %% [markdown]
# Pixels are numbered by pooling windows, not by rows: four neighbouring columns of the matrix product are the four
# corners of a 2x2 window. A tensor-core instruction leaves two neighbouring columns in one thread, so a window ends up
# in two threads that sit side by side, and pooling costs a shuffle.

# %%
windows_w = math.ceil(MISSION.out_size / 2)
row, column = np.mgrid[: MISSION.out_size, : MISSION.out_size]
window = row // 2 * windows_w + column // 2
figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.6))
left.imshow(window // pass_windows, cmap="Pastel1")
left.set_title(f"output pixels, coloured by pass: {passes} passes of {pass_windows} windows")
left.set_xlabel("ow")
left.set_ylabel("oh")
corner = 4 * window[:6, :8] + row[:6, :8] % 2 * 2 + column[:6, :8] % 2
right.imshow(window[:6, :8] % 2, cmap="Pastel2", vmin=0, vmax=2)
for (i, j), number in np.ndenumerate(corner):
    right.text(j, i, number, ha="center", va="center", fontsize=9)
for i in range(3):
    for j in range(4):
        right.add_patch(Rectangle((2 * j - 0.5, 2 * i - 0.5), 2, 2, fill=False))
right.set_title("top left: column of the matrix product of each pixel")
plt.show()

# %% [markdown]
# The image lies in shared memory as *cells*: one pixel, 64 channels, 128 bytes of fp16. Every tap reads the same cells,
# shifted by $(kh, kw)$; nothing is copied into columns. What a shift reads outside the image must be zero: one row of
# zeros serves for rows outside, and a gap of zero cells between two rows serves as the right border of one and the left
# border of the next.

# %%
gap = max(0, macros["KERNEL_W"] - 1 - macros["PAD_W"])
pitch = (macros["IN_W"] + gap + 3) // 8 * 8 + 4
rows = 7
figure, axes = plt.subplots(figsize=(11, 3.6))
cells = np.zeros((rows, gap + pitch))
cells[1:, gap : gap + macros["IN_W"]] = 1
axes.imshow(cells, cmap="Blues", vmin=0, vmax=2, aspect="auto")
for tap, colour in (((0, 0), "tab:red"), ((2, 2), "tab:green"), ((4, 4), "tab:purple")):
    # output pixels (2..3, 0..7), four windows: rows oh + pad - kh of x, which start one below the zero row
    top, first = 3 + macros["PAD_H"] - tap[0], gap + macros["PAD_W"] - tap[1]
    box = Rectangle((first - 0.5, top - 0.5), 8, 2, fill=False, ec=colour, lw=2, label=f"tap {tap}")
    axes.add_patch(box)
axes.set_title(f"cells of the first rows: zero row on top, {gap} zero cells on the left, pitch {pitch}")
axes.set_xlabel("cell")
axes.set_ylabel("row of cells")
axes.legend(loc="lower right")
plt.show()

# %% [markdown]
# The pitch is 4 more than a multiple of 8, so that the cells of a window's two rows fall into different banks of shared
# memory; and the 16-byte parts within a cell are swapped by an XOR with the cell's number, so that eight neighbouring
# cells put the same part into different banks. A tensor-core load (`ldmatrix`) then takes no conflict:

# %%
part = np.arange(8)
cell = np.arange(8)[:, None]
figure, axes = plt.subplots(figsize=(4, 3.4))
axes.imshow(part ^ (cell & 7), cmap="tab10", vmax=9)
for i in range(8):
    for j in range(8):
        axes.text(j, i, j ^ i, ha="center", va="center", color="white")
axes.set_xlabel("place: 16 bytes, four banks each")
axes.set_ylabel("cell")
axes.set_title("which part of a cell lies where")
plt.show()

# %% [markdown]
# ## Numeric classes: fp16 under scales
#
# TF32, PyTorch's default for convolutions on a GPU, rounds operands to 10 mantissa bits. fp16 keeps 10, too, runs at
# twice the rate, and has a smaller range. So values are multiplied by a power of two, measured from the data, that
# brings the largest magnitude to $[2^{14}, 2^{15})$: powers of two change no digit, and nothing overflows. Values far
# below the largest become fp16 denormals and lose digits, but those are digits that a sum with the largest does not
# see. The class `"fp32"` keeps what rounding left over as a second fp16 value and multiplies three times:
# $(a + a')(b + b') \approx ab + ab' + a'b$.


# %%
def tf32(t):
    return workloads.tf32_rounded(t)


def scaled_half(t):
    scale = 2.0 ** (14 - math.floor(math.log2(t.abs().max().item())))
    return (t * scale).half().float() / scale


def two_halves(t):
    return scaled_half(t) + scaled_half(t - scaled_half(t))


values = torch.randn(200_000, generator=torch.Generator().manual_seed(3))
figure, axes = plt.subplots(figsize=(8, 3))
methods = {"TF32": tf32, "fp16, scaled": scaled_half, "bfloat16": lambda t: t.bfloat16().float()}
methods["two fp16, scaled"] = two_halves
for name, method in methods.items():
    relative = ((method(values) - values) / values).abs().numpy()
    exact = (relative == 0).mean()
    width = 4 if name == "TF32" else 1.5
    bins = np.arange(-26, -6, 0.25)
    axes.hist(np.log2(relative[relative > 0]), bins, histtype="step", lw=width, label=f"{name} ({exact:.0%} exact)")
axes.set_xlabel("relative rounding error of an operand, power of two")
axes.set_yticks([])
axes.legend(loc="upper left")
plt.show()

# %% [markdown]
# TF32 and scaled fp16 are the same curve. What that means for the result is measured at the end.

# %% [markdown]
# ## Stage 2: pooling before batch norm
#
# Max pooling comes after batch norm and tanh, and batch norm's statistics need all of the convolution's output: it
# seems that the output must go to memory. But in each channel batch norm is a straight line and tanh increases, so
# together they are monotone. The largest of four results is the result of the largest value if batch norm's weight
# $\gamma$ is positive, of the smallest if it is negative; if it is zero all are equal, and the first wins.

# %%
four = np.array([-1.1, 0.4, 1.3, -0.2])
figure, panels = plt.subplots(1, 3, figsize=(11, 3), sharey=True)
along = np.linspace(-2, 2, 200)
for panel, gamma in zip(panels, (1.2, -0.8, 0.0)):
    result = np.tanh(gamma * four + 0.1)
    panel.plot(along, np.tanh(gamma * along + 0.1), color="tab:gray")
    panel.plot(four, result, "o", color="tab:blue")
    winner = int(result.argmax())
    panel.plot(four[winner], result[winner], "o", color="tab:red", markersize=10)
    panel.set_title(rf"$\gamma$ = {gamma}: {'largest' if gamma > 0 else 'smallest' if gamma else 'first'} value wins")
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
print("largest difference:", (late - early).abs().max().item())
assert torch.allclose(late, early, rtol=0, atol=1e-12)

# %% [markdown]
# What is stored for a 512-image batch is 76 MB instead of 303 MB. A training forward keeps more for its backward: all
# sums as fp16 (or float32), and which corner of each window won.

# %% [markdown]
# ## Stage 3: statistics from registers
#
# Mean and variance are over the whole batch; each unit writes count, mean and sum of squared distances of what it has
# in registers, and a small kernel combines them in a fixed order (Chan's rule). Squares are never summed: where the
# mean is large, $E[x^2] - E[x]^2$ subtracts two large numbers, and little is left.

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
figure, axes = plt.subplots(figsize=(6, 2.8))
for name, errors in wrong.items():
    axes.loglog(shifts, errors, "o-", label=name)
axes.set_xlabel("mean, in standard deviations")
axes.set_ylabel("relative error of the variance")
axes.legend()
plt.show()

# %% [markdown]
# ## Stage 4: the tail
#
# One block takes a group of one image: 16 channels of 17x17 pooled values, 18 KB, which stay in shared memory. Batch
# norm, tanh, the group's mean and variance, and its normalisation: one read, one write. The whole forward, kernel by
# kernel, against PyTorch's, operator by operator:

# %%
with torch.no_grad(), parity.tf32(False):
    h = model.conv_transpose(x)
    normed = F.batch_norm(h, None, None, model.batch_norm.weight, model.batch_norm.bias, training=True)
    expected = model.group_norm(F.max_pool2d(torch.tanh(normed), 2))
    actual = model_new(x)
print("output", tuple(actual.shape), "largest difference:", (actual - expected).abs().max().item())
torch.testing.assert_close(actual, expected)

# %% [markdown]
# ## Backward
#
# The gradient at batch norm's output is zero but at the winners of the windows. So the two sums that batch norm's
# backward needs (of the gradient, and of gradient times normalised value) come from the pooled values alone, and the
# gradient of the convolution's output is built in one go:
#
# $$\frac{\partial L}{\partial y} = a\cdot\mathrm{scatter}(g) - b - c\,y$$
#
# with three numbers per channel.

# %%
h = torch.randn(1, 1, 10, 10, dtype=torch.float64, requires_grad=True)
normed = F.batch_norm(h, None, None, training=True)
normed.retain_grad()
F.max_pool2d(torch.tanh(normed), 2).backward(torch.randn(1, 1, 5, 5, dtype=torch.float64))
figure, panels = plt.subplots(1, 2, figsize=(8, 3.4))
titles = ("gradient at batch norm's output", "gradient of the convolution's output")
for panel, gradient, title in zip(panels, (normed.grad, h.grad), titles):
    limit = gradient.abs().max().item()
    panel.imshow(gradient[0, 0], cmap="RdBu", vmin=-limit, vmax=limit)
    panel.set_title(title, fontsize=10)
    for i in range(5):
        for j in range(5):
            panel.add_patch(Rectangle((2 * j - 0.5, 2 * i - 0.5), 2, 2, fill=False, lw=0.5))
winners = normed.grad != 0
g, xhat = normed.grad, normed.detach()
rebuilt = (g - g.sum() / 100 - xhat * (g * xhat).sum() / 100) / (h.var(unbiased=False) + 1e-5).sqrt()
assert winners.sum() == 25
assert torch.allclose(rebuilt, h.grad)
plt.show()

# %% [markdown]
# The gradient of x is a transposed convolution's gradient: the same kernel with flipped weights. The gradient of the
# weight is a product of its own, over all pixels of the batch.

# %% [markdown]
# ## Errors by numeric class
#
# The judge is the float64 run of the reference; PyTorch's own error is the yardstick.

# %%
classes = ("fp32", "tf32") if on_gpu else ("fp32",)
found = {cls: parity.compare_models(model, model_new, x, cls) for cls in classes}
figure, panels = plt.subplots(1, len(classes), figsize=(6 * len(classes), 3.4), squeeze=False, sharey=True)
for panel, (cls, rows) in zip(panels[0], found.items()):
    assert all(row.ok for row in rows)
    rows = [row for row in rows if row.what != "grad conv_transpose.bias"]  # zero in mathematics
    place = np.arange(len(rows))
    panel.barh(place - 0.2, [row.torch.rms for row in rows], 0.4, label="PyTorch", color="#95a5a6")
    panel.barh(place + 0.2, [row.ours.rms for row in rows], 0.4, label="ModelNew", color="#c0392b")
    panel.set_yticks(place, [row.what for row in rows])
    panel.set_xscale("log")
    panel.set_xlim(left=1e-8)
    panel.set_xlabel("rms error against float64, relative")
    panel.set_title(f"class {cls}")
    panel.legend()
panels[0][0].invert_yaxis()
plt.show()

# %% [markdown]
# ## Roofline
#
# The last question is how much of the machine this uses. From a committed record of `python3 -m modelnew bench`, if
# there is one; else the roof alone: what an H100 allows each workload, by the bytes that it must move.

# %%
committed = sorted(environment.RESULTS.glob("bench_*.json"))
figure, axes = plt.subplots(figsize=(10, 5))
if committed:
    record = json.loads(committed[0].read_text())
    plots.roofline(axes, record)
    print(f"{committed[0].name}: {record['versions']['gpu']}, kernels {record['digest'][:12]}")
else:
    limits = workloads.ceilings("H100")
    bandwidth = limits["bytes_per_s"]
    for cls, rate in [(cls, limits["flop_per_s"][cls]) for cls in ("tf32", "fp32")]:
        along = np.geomspace(10, 5000, 200)
        axes.loglog(along, np.minimum(along * bandwidth, rate) / 1e12, label=f"{cls}: {rate / 1e12:.0f} TFLOP/s")
    for what in ("forward_train", "wgrad"):
        flop, size = map(sum, zip(*workloads.work(what, "tf32", 512, MISSION)))
        axes.axvline(flop / size, color="gray", ls=":")
        axes.annotate(f"{what} ", (flop / size, 40), rotation=90, ha="right")
    axes.set_xlabel("FLOP per byte")
    axes.set_ylabel("TFLOP/s")
    axes.legend()
plt.show()
