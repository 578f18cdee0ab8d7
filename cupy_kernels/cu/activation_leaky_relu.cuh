// v where v > 0, else v negative_slope, as an activation of the fused chain (activation.cuh).
//
// negative_slope is finite and not negative. 0 is ReLU, but for infinite v: as in PyTorch's LeakyReLU, -inf * 0 is NaN.
// All v <= 0 of a window then tie at 0, and whichever wins gets the gradient 0.
#pragma once

struct LeakyReLU {
    float negative_slope;

    __device__ explicit LeakyReLU(float negative_slope) : negative_slope(negative_slope) {}
    __device__ float of(float v) const { return v > 0 ? v : v * negative_slope; }
    // A negative v with a product too small for float has y = 0, and so has v = 0: both slope down.
    __device__ float slope(float y) const { return y > 0 ? 1 : negative_slope; }
};
