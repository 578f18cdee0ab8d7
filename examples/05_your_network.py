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
# # Your network, faster
#
# You have a network in plain PyTorch. One line puts CUDA C kernels under its layers. This notebook does that to the
# generator of a DCGAN, checks the results, and looks at where the time goes. Then it changes one kernel, and takes
# everything back.
#
# On a GPU the shapes are real. Without one the same kernels run in a CPU emulator. It shows that they compute the right
# thing. Its times mean nothing, so there the shapes are tiny.

# %%
import copy
from collections import Counter
from itertools import pairwise

import matplotlib.pyplot as plt
import torch
from torch import nn

import cupy_kernels
import modelnew
from modelnew import environment, parity, timing

device = environment.device()  # the GPU if one is usable, else the CPU: the emulator
on_gpu = device.type == "cuda"
print(environment.backend()["why"])

# %% [markdown]
# ## A network
#
# The generator makes images from noise. Each stage doubles height and width with a transposed convolution. This is
# PyTorch, and nothing else.


# %%
def generator(noise, width):
    channels = [8 * width, 4 * width, 2 * width, width]
    stages = [nn.ConvTranspose2d(noise, channels[0], 4, bias=False)]
    for before, after in pairwise(channels):
        stages += [nn.BatchNorm2d(before), nn.LeakyReLU(0.2)]
        stages += [nn.ConvTranspose2d(before, after, 4, stride=2, padding=1, bias=False)]
    last = nn.ConvTranspose2d(width, 3, 4, stride=2, padding=1, bias=False)
    nn.init.normal_(last.weight, std=width**-0.5)  # images of strong contrast, at any width
    return nn.Sequential(*stages, nn.BatchNorm2d(width), nn.LeakyReLU(0.2), last, nn.Tanh())


torch.manual_seed(0)
images, noise, width = (256, 100, 64) if on_gpu else (2, 4, 2)
network = generator(noise, width).to(device)
z = torch.randn(images, noise, 1, 1, device=device)
print(f"noise {tuple(z.shape)} -> images {tuple(network(z).shape)}")

# %% [markdown]
# ## One line
#
# `replace_layers` changes the network in place. We keep a copy of the original to compare with.

# %%
original = copy.deepcopy(network)
replaced = modelnew.replace_layers(network)
print(replaced)

# %% [markdown]
# Each layer is the same object as before, with another `forward`. So an optimizer keeps its parameters, and a state
# dict still loads.

# %%
print(network)
assert network.state_dict().keys() == original.state_dict().keys()

# %% [markdown]
# ## Is it right?
#
# Two right results differ in the last bits, as they add in another order. So neither is the judge. The judge is the
# same network in float64: our error should be about as large as PyTorch's. We compare the images and every gradient.
# Both sides multiply in float32 here.
#
# A leaky ReLU has a kink at 0. In large batches rounding moves a few values across it, and each moves the gradients.
# That happens to PyTorch as often as to us, but in other places. So gradients may be off by two thousandths more.


# %%
def results(network, z, dy):
    z = z.detach().requires_grad_()
    y = network(z)
    return y.detach(), *torch.autograd.grad(y, [z, *network.parameters()], dy)


dy = torch.randn_like(network(z))
with parity.tf32(False):
    truth = results(copy.deepcopy(original).double(), z.double(), dy.double())
    theirs, ours = results(original, z, dy), results(network, z, dy)

print(f"{'error, relative to rms':24}{'ours':>10}{'PyTorch':>10}")
names = ["images", "gradient of z", *(f"gradient of {name}" for name, _ in network.named_parameters())]
for name, mine, other, exact in zip(names, ours, theirs, truth):
    mine, other = parity.error(mine, exact).rms, parity.error(other, exact).rms
    print(f"{name:24}{mine:10.1e}{other:10.1e}")
    assert mine < 2 * other + (1e-6 if name == "images" else 2e-3), name

# %% [markdown]
# ## Is it faster?
#
# `measure` calls a function a few times to warm up. Then it takes the median of some trials, by the GPU's own clock.
# A training step here is a forward and a backward. Both sides may use TF32 now, which is PyTorch's default on a GPU.

# %%
trials, unit = (20, "ms") if on_gpu else (1, "emulated ms")


def forward(network):
    with torch.no_grad():
        network(z)


def step(network):
    results(network, z, dy)


print(f"{unit:16}{'PyTorch':>10}{'ours':>10}")
for name, call in {"forward": forward, "training step": step}.items():
    before, after = (timing.measure(lambda n=n, call=call: call(n), device, trials).median for n in (original, network))
    print(f"{name:16}{before:10.2f}{after:10.2f}" + (f"{before / after:8.2f}x" if on_gpu else ""))
if not on_gpu:
    print("These are times of the emulator: they mean nothing.")

# %% [markdown]
# ## Where does the time go?
#
# We time each layer of the forward alone, on the input that it gets in the network.


# %%
def profile(network):
    """The input of each layer, and its milliseconds."""
    inputs, times, x = [], [], z
    with torch.no_grad():
        for layer in network:
            inputs.append(x)
            times.append(timing.measure(lambda layer=layer, x=x: layer(x), device, trials).median)
            x = layer(x)
    return inputs, times


_, before = profile(original)
inputs, after = profile(network)
print(f"{unit:24}{'PyTorch':>10}{'ours':>10}")
for i, (layer, *times) in enumerate(zip(network, before, after)):
    print(f"{f'{i} {type(layer).__name__}':24}" + "".join(f"{ms:10.3f}" for ms in times))

# %% [markdown]
# The same as a picture, a colour for each kind of layer:

# %%
figure, axes = plt.subplots(figsize=(8, 2.2))
totals = {"PyTorch": Counter(), "ours": Counter()}
for layer, *times in zip(network, before, after):
    for total, ms in zip(totals.values(), times):
        total[type(layer).__name__] += ms
left = [0.0, 0.0]
for kind, colour in zip(totals["ours"], ["#c0392b", "#2980b9", "#f39c12", "#95a5a6"]):
    widths = [total[kind] for total in totals.values()]
    axes.barh(list(totals), widths, left=left, color=colour, label=kind)
    left = [a + b for a, b in zip(left, widths)]
axes.invert_yaxis()
axes.set_xlabel(unit)
axes.set_title(f"forward of {images} images" if on_gpu else "times of the emulator: they mean nothing", fontsize=10)
axes.legend(ncols=4, fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.35), frameon=False)
plt.show()

# %% [markdown]
# ## Which kernels run?
#
# `explain` tells for any layer and input, without launching them. Here is a convolution in the middle.

# %%
print(modelnew.explain(network[3], inputs[3]))

# %% [markdown]
# ## Change a kernel
#
# The last layer is a tanh. This is the text of its kernel:

# %%
cupy_kernels.show("tanh_forward")

# %% [markdown]
# Each thread takes `WIDTH` neighbouring numbers. Let us make it a *hard* tanh: a straight line, cut off at -1 and 1.
# Its slope is 1 inside and 0 outside, so the backward's kernel changes, too. The path for whole packs of numbers is
# only there for speed. We leave it out.

# %%
HARD = {
    "tanh_forward": """
extern "C" __global__ void tanh_forward(const scalar_t* x, scalar_t* y, i64 size) {
    i64 start = ((i64)blockIdx.x * blockDim.x + threadIdx.x) * WIDTH;
    for (i64 i = start; i < start + WIDTH && i < size; i++) {
        acc_t v = to_acc(x[i]);
        y[i] = from_acc<scalar_t>(v < -1 ? -1 : v > 1 ? 1 : v);
    }
}""",
    "tanh_backward": """
extern "C" __global__ void tanh_backward(const scalar_t* dy, const scalar_t* y, scalar_t* dx, i64 size) {
    i64 start = ((i64)blockIdx.x * blockDim.x + threadIdx.x) * WIDTH;
    for (i64 i = start; i < start + WIDTH && i < size; i++) {
        acc_t v = to_acc(y[i]);
        dx[i] = from_acc<scalar_t>(v > -1 && v < 1 ? to_acc(dy[i]) : 0);
    }
}""",
}

with cupy_kernels.override(HARD):
    print("edited:", ", ".join(cupy_kernels.edited()))
    hard = results(network, z, dy)
print("edited:", ", ".join(cupy_kernels.edited()) or "nothing")

# %% [markdown]
# Inside the block the new text was in force, in the whole process. After it the old one is back. (The magic `%%cu`
# would refuse this text: it checks against PyTorch, and a hard tanh is no tanh.)
#
# The effect in the network is that of another last layer, `nn.Hardtanh`: the same images and the same gradients, bit
# for bit. Many pixels are now at an end of the range:

# %%
with_hardtanh = nn.Sequential(*network[:-1], nn.Hardtanh())
assert all(map(torch.equal, hard, results(with_hardtanh, z, dy)))
for name, y in {"tanh": network(z), "hard tanh": hard[0]}.items():
    print(f"{name:10} {(y.abs() == 1).float().mean():6.1%} of all pixels are -1 or 1")

# %% [markdown]
# ## And back
#
# `undo` makes all layers PyTorch's again. What the network has learnt meanwhile stays.

# %%
replaced.undo()
print(type(network[0]), type(network[-1]))
assert list(map(type, network)) == list(map(type, original))
with torch.no_grad(), parity.tf32(False):
    torch.testing.assert_close(network(z), original(z))

# %% [markdown]
# `02_tinker_with_tanh` goes on with kernels: it makes one fast, step by step. `04_own_operator` writes a new one.
