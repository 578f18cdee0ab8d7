"""ConvTranspose2d -> BatchNorm2d -> Tanh -> MaxPool2d -> GroupNorm as CUDA C kernels, drop-in for PyTorch's modules."""

from .fusions import Sequential
from .model import Model, ModelNew, explain, get_init_inputs, get_inputs

__all__ = ["Model", "ModelNew", "Sequential", "explain", "get_init_inputs", "get_inputs"]
