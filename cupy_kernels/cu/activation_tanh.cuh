// tanh, as an activation of the fused chain (activation.cuh).
#pragma once
#include "tanh.cuh"
#include "tanh_branchless.cuh"

struct Tanh {
    __device__ explicit Tanh(float) {}
    __device__ float of(float v) const { return tanh_branchless(v); }
    __device__ float slope(float y) const { return tanh_slope(y); }
};
