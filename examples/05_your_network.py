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
# You have a network in plain PyTorch. One line puts CUDA C kernels under its layers. This notebook does that to a small
# U-Net, checks the results, and looks at where the time goes. Then it changes one kernel, and takes everything back.
#
# On a GPU the shapes are real. Without one the same kernels run in a CPU emulator. It shows that they compute the right
# thing. Its times mean nothing, so there the shapes are tiny.

# %%
import copy

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
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
# A U-Net makes an image from an image. On the way down each stage halves height and width, on the way up each stage
# doubles them, and gets the image of this size from the way down, too. This is PyTorch, and nothing else.
#
# Our layers include no `Conv2d`. But a transposed convolution of stride 1 is a convolution whose kernel is turned
# around, so it learns the same things. The stages on the way down begin with one. Then all their layers are among ours.


# %%
def down(before, after):
    return nn.Sequential(
        nn.ConvTranspose2d(before, after, 5, padding=2),
        nn.BatchNorm2d(after),
        nn.LeakyReLU(0.2),
        nn.MaxPool2d(2),
        nn.GroupNorm(8, after),
    )


def up(before, after):
    doubled = nn.ConvTranspose2d(before, after, 4, stride=2, padding=1, bias=False)
    return nn.Sequential(doubled, nn.BatchNorm2d(after), nn.LeakyReLU(0.2))


class UNet(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.first = nn.Conv2d(3, width, 3, padding=1)
        self.down1, self.down2 = down(width, 2 * width), down(2 * width, 4 * width)
        self.up2, self.up1 = up(4 * width, 2 * width), up(4 * width, width)
        self.last = nn.Sequential(nn.Conv2d(2 * width, 3, 1), nn.Tanh())

    def forward(self, x):
        large = self.first(x)
        middle = self.down1(large)
        small = self.down2(middle)
        y = torch.cat([self.up2(small), middle], 1)
        return self.last(torch.cat([self.up1(y), large], 1))


torch.manual_seed(0)
images, size, width = (256, 32, 64) if on_gpu else (2, 8, 16)
network = UNet(width).to(device)
x = torch.randn(images, 3, size, size, device=device)
print(f"images {tuple(x.shape)} -> images {tuple(network(x).shape)}")

# %% [markdown]
# ## One line
#
# `replace_layers` changes the network in place. We keep a copy of the original to compare with.

# %%
original = copy.deepcopy(network)
replaced = modelnew.replace_layers(network)
print(replaced)

# %% [markdown]
# Each layer is the same object as before, with another class. So an optimizer keeps its parameters, and a state
# dict still loads. The two `Conv2d` stay PyTorch's.
#
# The two `Sequential` are the stages on the way down. They are now `modelnew.Sequential`, which runs such a chain of
# five layers as one operator.

# %%
print({name: type(stage).__module__ for name, stage in network.named_children()})
assert network.state_dict().keys() == original.state_dict().keys()

# %% [markdown]
# ## Is it right?
#
# Two right results differ in the last bits, as they add in another order. So neither is the judge. The judge is the
# same network in float64: our error should be about as large as PyTorch's. We compare the images and every gradient.
# Both sides multiply in float32 here.
#
# Max pooling passes a gradient to the largest of four values. Where two of them are almost equal, rounding decides
# which one wins, and so where the gradient goes. That happens to PyTorch as often as to us, but in other places. The
# kink of a leaky ReLU at 0 has such an effect, too. So gradients may be off by 0.005 more.


# %%
def results(network, x, dy):
    x = x.detach().requires_grad_()
    y = network(x)
    return y.detach(), *torch.autograd.grad(y, [x, *network.parameters()], dy)


dy = torch.randn_like(x)
with parity.tf32(False):
    truth = results(copy.deepcopy(original).double(), x.double(), dy.double())
    theirs, ours = results(original, x, dy), results(network, x, dy)

print(f"{'error, relative to rms':28}{'ours':>10}{'PyTorch':>10}")
names = ["images", "gradient of x", *(f"gradient of {name}" for name, _ in network.named_parameters())]
for name, mine, other, exact in zip(names, ours, theirs, truth):
    if name in ("gradient of down1.0.bias", "gradient of down2.0.bias"):
        continue  # zero in mathematics: batch norm takes the bias out again
    mine, other = parity.error(mine, exact).rms, parity.error(other, exact).rms
    print(f"{name:28}{mine:10.1e}{other:10.1e}")
    assert mine < 2 * other + (1e-6 if name == "images" else 5e-3), name

# %% [markdown]
# ## Is it faster?
#
# `measure` calls a function a few times to warm up. Then it takes the median of some trials, by the GPU's own clock.
# A training step here is a forward and a backward. Both sides may use TF32 now, which is PyTorch's default on a GPU.

# %%
trials, unit = (20, "ms") if on_gpu else (1, "emulated ms")


def forward(network, x):
    with torch.no_grad():
        network(x)


def step(network, x):
    x = x.detach().requires_grad_()
    y = network(x)
    torch.autograd.grad(y, [x, *network.parameters()], torch.ones_like(y))


def measured(call, network, x):
    return timing.measure(lambda: call(network, x), device, trials).median


print(f"{unit:16}{'PyTorch':>10}{'ours':>10}")
for name, call in {"forward": forward, "training step": step}.items():
    before, after = (measured(call, n, x) for n in (original, network))
    print(f"{name:16}{before:10.2f}{after:10.2f}" + (f"{before / after:8.2f}x" if on_gpu else ""))
if not on_gpu:
    print("These are times of the emulator: they mean nothing.")

# %% [markdown]
# ## Where does the time go?
#
# We time a training step of each stage alone, on the input that it gets in the network. Hooks note these inputs. They
# sit in the original: a layer of ours that has a hook is not fused with others.

# %%
inputs = {}
hooks = [
    stage.register_forward_pre_hook(lambda _, args, name=name: inputs.update({name: args[0]}))
    for name, stage in original.named_children()
]
forward(original, x)
for hook in hooks:
    hook.remove()

stages = {}
print(f"{unit:16}{'PyTorch':>10}{'ours':>10}")
for name, stage_input in inputs.items():
    stages[name] = [measured(step, getattr(n, name), stage_input) for n in (original, network)]
    print(f"{name:16}" + "".join(f"{ms:10.3f}" for ms in stages[name]))

# %% [markdown]
# The same as a picture:

# %%
figure, axes = plt.subplots(figsize=(8, 2.2))
left = [0.0, 0.0]
for (name, times), colour in zip(stages.items(), plt.get_cmap("Set2").colors):
    axes.barh(["PyTorch", "ours"], times, left=left, color=colour, label=name)
    left = [a + b for a, b in zip(left, times)]
axes.invert_yaxis()
axes.set_xlabel(unit)
title = f"training step of {images} images, stage by stage" if on_gpu else "times of the emulator: they mean nothing"
axes.set_title(title, fontsize=10)
axes.legend(ncols=len(stages), fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.35), frameon=False)
plt.show()

# %% [markdown]
# ## Which kernels run?
#
# `explain` tells for any layer or stage, without launching them. Here is a stage on the way down:

# %%
print(modelnew.explain(network.down1, inputs["down1"]))

# %% [markdown]
# That is the whole stage. `conv_bn_pool` pools what the convolution has just summed, so only a quarter goes to memory.
# `pooled_forward` does batch norm, leaky ReLU and group norm in one go. `03_fused_pipeline` explains how.
#
# On the way up each layer runs its own kernels:

# %%
print(modelnew.explain(network.up1, inputs["up1"]))

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

tanh = network.last[1]
values = torch.linspace(-2, 2, 1001, device=device, requires_grad=True)
with torch.no_grad():
    soft = network(x)
with cupy_kernels.override(HARD):
    print("edited:", ", ".join(cupy_kernels.edited()))
    y = tanh(values)
    (slope,) = torch.autograd.grad(y.sum(), values)
    with torch.no_grad():
        hard = network(x)
print("edited:", ", ".join(cupy_kernels.edited()) or "nothing")

# %% [markdown]
# Inside the block the new text was in force, in the whole process. After it the old one is back. (The magic `%%cu`
# would refuse this text: it checks against PyTorch, and a hard tanh is no tanh.)
#
# The layer did what PyTorch's hard tanh does, bit for bit, and so did its gradient. In the network some pixels are now
# at an end of the range:

# %%
expected = F.hardtanh(values)
assert torch.equal(y, expected)
assert torch.equal(slope, torch.autograd.grad(expected.sum(), values)[0])
for name, pixels in {"tanh": soft, "hard tanh": hard}.items():
    print(f"{name:10} {(pixels.abs() == 1).float().mean():6.1%} of all pixels are -1 or 1")
assert (hard.abs() == 1).any()

# %% [markdown]
# ## And back
#
# `undo` makes all layers PyTorch's again. What the network has learnt meanwhile stays.

# %%
replaced.undo()
print(type(network.down1), type(network.down1[0]))
assert list(map(type, network.modules())) == list(map(type, original.modules()))

# %% [markdown]
# `02_tinker_with_tanh` goes on with kernels: it makes one fast, step by step. `04_own_operator` writes a new one.
