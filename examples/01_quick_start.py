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
# # Quick start: is it right, and how fast is it?
#
# `Model` is the reference: five of PyTorch's modules, ConvTranspose2d → BatchNorm2d → Tanh → MaxPool2d → GroupNorm.
# `ModelNew` takes the same arguments, has the same parameters, and runs CUDA C kernels instead. This notebook compares
# the two. On a GPU it uses the real shapes. Without one the same kernels run in a CPU emulator. It shows that they
# compute the right thing, and says nothing about speed. So there the shapes are small.

# %%
import matplotlib.pyplot as plt
import torch

import modelnew
from modelnew import Model, ModelNew, environment, explain, parity, timing

device = environment.device()  # the GPU if one is usable, else the CPU: the emulator
on_gpu = device.type == "cuda"
init = modelnew.get_init_inputs() if on_gpu else [16, 32, 5, 1, 1, 8, 8]
shape = (512, 64, 32, 32) if on_gpu else (2, 16, 10, 10)
print("backend:", environment.backend()["name"])
print("why:    ", environment.backend()["why"])
print({name: version for name, version in environment.versions().items() if version})

# %% [markdown]
# ## The same parameters
#
# Parameters are created in the reference's order, and drawn from the same distributions. So the same seed gives the
# same model. A state dict of one loads into the other.

# %%
torch.manual_seed(0)
model = Model(*init, device=device)
torch.manual_seed(0)
model_new = ModelNew(*init, device=device)
print(model_new)
assert all(torch.equal(a, b) for a, b in zip(model.parameters(), model_new.parameters()))
model_new.load_state_dict(model.state_dict())

# %% [markdown]
# ## Equal bits, where that is possible
#
# `replace` names the operators that run our kernels. Tanh and max pooling have no sum whose order could differ. So on a
# GPU the outputs are equal bit for bit. (In the emulator, tanh is the C library's. It differs from PyTorch's in the
# last bit.)

# %%
x = torch.rand(shape, generator=torch.Generator().manual_seed(1)).to(device)
exact = ModelNew(*init, replace={"tanh", "max_pool"}, device=device)
exact.load_state_dict(model.state_dict())
with torch.no_grad():
    y, y_exact = model(x), exact(x)
print("torch.equal:   ", torch.equal(y, y_exact))
print("torch.allclose:", torch.allclose(y, y_exact))
torch.testing.assert_close(y_exact, y)

# %% [markdown]
# ## As close to the truth as PyTorch
#
# Sums in another order give other last bits. So with all five operators replaced, two right results differ. The judge
# is the same model in float64: our error against it should be no larger than PyTorch's own. `compare_models` does that
# for the output, for every gradient and for the running statistics. In some pooling windows rounding decides which
# value is the largest. There the incoming gradient is zero: one winner in another place would change every gradient
# more than all rounding does.

# %%
classes = ["fp32", "tf32"] if on_gpu else ["fp32"]
for cls in classes:
    rows = parity.compare_models(model, model_new, x, cls)
    print(f"class {cls}: error against float64, relative to its rms")
    print(f"{'':28}{'ours':>10}{'PyTorch':>10}")
    for row in rows:
        print(f"{row.what:28}{row.ours.rms:10.1e}{row.torch.rms:10.1e}  {'ok' if row.ok else 'FAIL'}")
    assert all(row.ok for row in rows)

# %% [markdown]
# The gradient of the convolution's bias is zero in mathematics, as batch norm takes the bias out again. What is left is
# rounding noise. It is measured relative to the weight's gradient.

# %% [markdown]
# ## Which kernels ran, and why
#
# `explain` tells, without running anything.

# %%
print(explain(model_new, x))
print()
print(explain(exact, x))
print()
odd = ModelNew(3, 8, 3, 2, 1, 1, 4, device=device)
print(explain(odd, torch.rand(2, 3, 9, 9, device=device)))

# %% [markdown]
# ## Numeric classes
#
# `numerics` says how the convolution multiplies. `"fp32"` has float32's precision. `"tf32"` rounds operands to 10
# mantissa bits, as PyTorch's default on a GPU does. `"auto"`, the default, does what
# `torch.backends.cudnn.allow_tf32` says.

# %%
with torch.no_grad(), parity.tf32(False):
    truth = Model(*init, device=device).double()
    truth.load_state_dict(model.state_dict())
    truth = truth(x.double())
    errors = {"PyTorch, TF32 off": parity.error(model(x), truth).rms}
    if on_gpu:
        with parity.tf32(True):
            errors["PyTorch, TF32 on"] = parity.error(model(x), truth).rms
    for numerics in ("fp32", "tf32"):
        candidate = ModelNew(*init, numerics=numerics, device=device)
        candidate.load_state_dict(model.state_dict())
        errors[f'ModelNew, "{numerics}"'] = parity.error(candidate(x), truth).rms

figure, axes = plt.subplots(figsize=(7, 2))
colours = ["#95a5a6" if name.startswith("PyTorch") else "#c0392b" for name in errors]
bars = axes.barh(list(errors), list(errors.values()), color=colours)
axes.bar_label(bars, [f"{value:.1e}" for value in errors.values()], padding=3)
axes.set_xscale("log")
axes.set_xlim(right=max(errors.values()) * 5)
axes.set_xlabel("rms error of the output against float64, relative to the output's rms")
axes.invert_yaxis()
plt.show()

# %% [markdown]
# ## Speed
#
# `measure` times with CUDA events after a warm-up, with the L2 cache flushed between trials. Both models follow
# `allow_tf32`. `python3 -m modelnew bench` compares with torch.compile and channels_last, too, and measures memory.

# %%
trials = 20 if on_gpu else 1
x = x.requires_grad_()
dy = torch.ones_like(y)


def forward(m):
    with torch.no_grad():
        m(x)


def step(m):
    torch.autograd.grad(m(x), [x, *m.parameters()], dy)


print(f"{'ms':28}{'PyTorch':>10}{'ModelNew':>10}")
for cls in classes:
    for name, call in {"forward": forward, "forward and backward": step}.items():
        with parity.tf32(cls == "tf32"):
            theirs, ours = (
                timing.measure(lambda m=m, call=call: call(m), device, trials).median for m in (model, model_new)
            )
        print(f"{f'{name}, {cls}':28}{theirs:10.2f}{ours:10.2f}" + (f"{theirs / ours:9.2f}x" if on_gpu else ""))
if not on_gpu:
    print("These are times of the emulator: they say nothing about speed.")

# %% [markdown]
# ## Training with it
#
# `ModelNew` is a module like any other. Here are a few steps of SGD on both models, from the same state.
# `examples/train.py` is a whole training run.

# %%
losses = {}
target = torch.randn(y.shape, generator=torch.Generator().manual_seed(2)).to(device)
for name, m in {"PyTorch": model, "ModelNew": model_new}.items():
    optimizer = torch.optim.SGD(m.parameters(), lr=0.1)
    losses[name] = []
    for _ in range(3):
        optimizer.zero_grad()
        loss = torch.nn.functional.mse_loss(m(x.detach()), target)
        loss.backward()
        optimizer.step()
        losses[name].append(loss.item())
    print(f"{name:9}", *(f"{loss:.6f}" for loss in losses[name]))
