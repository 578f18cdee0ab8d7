"""What tests of the emulator share: kernels over NumPy arrays of THREADS elements."""

from cupy_kernels import source
from cupy_kernels.launch import launch
from cupy_kernels.source import Kernel

THREADS = 64


def run(text, *args, grid=1, block=THREADS, shared_bytes=0, defines=()):
    """Launches the one kernel of `text` over NumPy arrays."""
    with source.override({"planted.cu": text}):
        (name,) = source.kernel_names("planted.cu")
        launch(Kernel("planted.cu", name, defines), (grid, 1, 1), (block, 1, 1), args, shared_bytes)


REVERSE = """extern "C" __global__ void reverse(const float* x, float* y) {
    __shared__ float copied[64];
    copied[threadIdx.x] = x[threadIdx.x];
    BARRIER;
    y[threadIdx.x] = copied[63 - threadIdx.x];
}"""

COPY = 'extern "C" __global__ void copy(const float* x, float* y) { y[threadIdx.x] = x[threadIdx.x]; }'
