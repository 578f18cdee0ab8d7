"""What a user writes, for `mypy`, which is strict: every public name has a type. tests/test_types.py runs it."""

import torch
from torch import nn
from typing_extensions import assert_type

import cupy_kernels
import modelnew
from modelnew import Model, ModelNew, Sequential, functional, get_init_inputs, layers
from modelnew.functional import batch_norm, conv_transpose2d, group_norm, leaky_relu, tanh
from modelnew.inline import operator
from modelnew.layers import BatchNorm2d, ConvTranspose2d, GroupNorm, LeakyReLU, MaxPool2d, Tanh


def use_layers(x: torch.Tensor) -> torch.Tensor:
    chain = Sequential(ConvTranspose2d(4, 8, 3), BatchNorm2d(8), Tanh(), MaxPool2d(2), GroupNorm(2, 8))
    more: list[nn.Module] = [LeakyReLU(0.1), layers.BatchNorm1d(8), layers.BatchNorm3d(8)]
    y: torch.Tensor = nn.Sequential(chain, *more[:1])(x)
    return y


def use_functions(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    y = conv_transpose2d(x, w, stride=(2, 1), padding=1, numerics="fp32")
    assert_type(y, torch.Tensor)
    y = batch_norm(y, None, None, training=True, momentum=0.2)
    assert_type(functional.batch_norm_tanh(y, None, None, training=True), torch.Tensor)
    y = leaky_relu(tanh(y), negative_slope=0.2)
    assert_type(functional.max_pool2d(y, 2, ceil_mode=True), torch.Tensor)
    assert_type(functional.max_pool2d(y, 2, return_indices=True), tuple[torch.Tensor, torch.Tensor])
    assert_type(functional.tanh_max_pool2d(y, (2, 3)), torch.Tensor)
    return group_norm(y, 2)


def use_models(x: torch.Tensor) -> torch.Tensor:
    model = Model(*get_init_inputs())
    model_new = ModelNew(4, 8, 3, 1, 1, 1, 2, replace={"tanh"}, numerics="fp32", device="cpu")
    model_new.load_state_dict(model_new.state_dict())
    print(modelnew.explain(model_new, x), model)
    y: torch.Tensor = model_new(x)
    return y


def what_is_not_run(network: nn.Module, x: torch.Tensor) -> None:
    fused = functional.conv_bn_tanh_max_pool_group_norm(x, None, None, training=True, conv_weight=x, num_groups=2)
    assert_type(fused, torch.Tensor)
    replaced = modelnew.replace_layers(network)
    replaced(x)  # type: ignore[operator]
    replaced.eval()  # type: ignore[attr-defined]
    assert_type(replaced.before, int)


def use_own_kernels(x: torch.Tensor) -> None:
    cupy_kernels.show("tanh_forward")
    with cupy_kernels.override({"tanh_forward": "..."}):
        pass
    cupy_kernels.reset()
    twice = operator(
        'extern "C" __global__ void twice(const float* x, float* y, i64 size) { if (!blockIdx.x) y[0] = 2 * x[0]; }',
        "twice",
    )
    print(twice(x), list(cupy_kernels.kernels()))


if __name__ == "__main__":
    x = torch.randn(2, 4, 6, 6)
    use_layers(x)
    use_functions(x, torch.randn(4, 4, 3, 3))
    use_models(x)
