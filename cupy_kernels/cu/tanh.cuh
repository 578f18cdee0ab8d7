// tanh and its derivative, as every kernel that applies it computes them.
#pragma once
#include "tanh_branchless.cuh"

// tanhf under -ftz=true flushes denormals; there tanh(v) = v to the last bit, and a select moves the bits unharmed.
// Kernels of 16-bit tensors move twice as many values in the same time, of which tanhf would take most.
__device__ inline acc_t tanh_of(acc_t v) {
    acc_t t = sizeof(scalar_t) == 2 ? (acc_t)tanh_branchless((float)v) : tanh(v);
    return fabs(v) < (acc_t)1.17549435e-38f ? v : t;
}

// d tanh(v) / dv, from y = tanh(v).
__device__ inline acc_t tanh_slope(acc_t y) { return (acc_t)1 - y * y; }
