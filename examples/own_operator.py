"""Your own operator: SiLU, y = x * sigmoid(x), with its gradient, from CUDA C text.

Runs on a GPU where there is one, else on the emulator: python3 examples/own_operator.py
"""

import torch

from modelnew.inline import operator

SILU = """
#include "common.cuh"

extern "C" __global__ void silu(const scalar_t* x, scalar_t* y, i64 size) {
    i64 i = (i64)blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= size) return;
    acc_t v = to_acc(x[i]);
    y[i] = from_acc<scalar_t>(v / (1 + exp(-v)));
}

extern "C" __global__ void silu_backward(const scalar_t* dy, const scalar_t* x, scalar_t* dx, i64 size) {
    i64 i = (i64)blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= size) return;
    acc_t v = to_acc(x[i]), s = 1 / (1 + exp(-v));
    dx[i] = from_acc<scalar_t>(to_acc(dy[i]) * s * (1 + v * (1 - s)));
}
"""

# Matched by name: x is the argument, y the result, dy and dx are their gradients, size is the number of elements.
silu = operator(SILU, "silu", "silu_backward")


def main():
    device = "cuda" if torch.cuda.is_available() else "cpu"
    print(f"on {torch.cuda.get_device_name() if device == 'cuda' else 'the emulator'}")

    x = torch.randn(4, 5, dtype=torch.float64, device=device, requires_grad=True)
    assert torch.autograd.gradcheck(silu, x)
    print("gradcheck in float64: passed")

    # The same text serves every float type. Tolerances are torch's own for the dtype.
    for dtype in (torch.float32, torch.float64, torch.float16, torch.bfloat16):
        x = torch.randn(1000, device=device).to(dtype).requires_grad_()
        dy = torch.randn_like(x)
        y, expected = silu(x), torch.nn.functional.silu(x)
        (dx,), (expected_dx,) = torch.autograd.grad(y, x, dy), torch.autograd.grad(expected, x, dy)
        torch.testing.assert_close(y, expected)
        torch.testing.assert_close(dx, expected_dx)
        print(f"{dtype}: like torch.nn.functional.silu, largest difference {(y - expected).abs().max():.1e}")


if __name__ == "__main__":
    main()
