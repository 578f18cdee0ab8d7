// The activations between batch norm and max pooling in the fused chain. The macro ACTIVATION names one's struct, pooled_t
// the type of what it is applied to:
//
//     Activation(float parameter)    the launch's; only some activations have one
//     float of(float v)              the activation of v; no v is a denormal, which -ftz=true makes 0
//     float slope(float y)           its derivative where its value is y
//
// It must never decrease: then it can follow max pooling. Pooling here takes the first of the largest v, PyTorch the
// first of the largest activations. These are two places only where different v have one activation: in the flat parts,
// where the slope, and with it what the place would get, is 0; or where rounding makes neighbours equal.
//
// A struct is named as its layer, which is the function's name without underscores in any case: LeakyReLU, leaky_relu.
#pragma once
#include "tanh.cuh"
#include "tanh_branchless.cuh"

struct Tanh {
    __device__ explicit Tanh(float) {}
    __device__ float of(float v) const { return sizeof(pooled_t) == 2 ? tanh_coarse(v) : tanh_branchless(v); }
    __device__ float slope(float y) const { return tanh_slope(y); }
};

// v where v > 0, else v negative_slope, which is finite and not negative. 0 is ReLU, but for infinite v: as in
// PyTorch's LeakyReLU, -inf * 0 is NaN. All v <= 0 of a window then tie at 0, and whichever wins gets the gradient 0.
struct LeakyReLU {
    float negative_slope;

    __device__ explicit LeakyReLU(float negative_slope) : negative_slope(negative_slope) {}
    __device__ float of(float v) const { return v > 0 ? v : v * negative_slope; }
    // A negative v with a product too small for float has y = 0, and so has v = 0: both slope down.
    __device__ float slope(float y) const { return y > 0 ? 1 : negative_slope; }
};

typedef ACTIVATION Activation;
