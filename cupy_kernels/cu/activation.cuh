// The activations between batch norm and max pooling in the fused chain. The macro ACTIVATION is the name of a struct.
// pooled_t is the type of the values that the activation is applied to. A struct has:
//
//     Activation(float parameter)    the parameter of the launch, which only some activations use
//     float of(float v)              the activation of v; v is never a denormal, because -ftz=true makes those 0
//     float slope(float y)           the derivative at the point where the activation's value is y
//
// An activation must never decrease, so that it can follow max pooling. Pooling here takes the first of the largest v;
// PyTorch takes the first of the largest activations. The two differ only if different v have the same activation. That
// happens in flat parts, where the slope is 0 and no gradient flows, or if rounding makes neighbouring values equal.
//
// A struct has the name of its layer. The function has the same name, in any case and with underscores: LeakyReLU,
// leaky_relu.
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
