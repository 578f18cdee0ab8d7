// A bound of the gradient of the convolution's output, and the scale under which it fits fp16.
#pragma once
#include "batch_norm.cuh"
#include "fp16_scale.cuh"

// Of one channel of dy = scale (g - mean(g) - xhat mean(g xhat)), or scale g with running statistics.
//
// |xhat| is at most sqrt(count), since the sum of all xhat^2 is at most count; what `saved` keeps of a value is off by
// less than |value| <= |mean| + |xhat| / invstd, in all by less than a factor of 2, which 2^15 still lacks to fp16's
// largest.
struct GradientBound {
    float bound, means;  // |dy / scale| at most; not finite where a mean is not

    __device__ explicit GradientBound(float largest) : bound(largest), means(0) {}
    __device__ GradientBound(float largest, float mean_g, float mean_dot, float count, float mean, float invstd)
        : GradientBound(largest) {
        Normaliser normalise(mean, invstd);
        means = fabsf(mean_g) + fabsf(mean_dot) + fabsf(normalise.mean);
        bound += fabsf(mean_g) + (sqrtf(count) + fabsf(normalise.mean * normalise.invstd)) * fabsf(mean_dot);
    }
    // e, such that dy times 2^e fits. A channel of zeros, or without a finite dy, must not decide the scale of the
    // others.
    __device__ int exponent(float scale) const {
        if (!(bound > 0) || !is_finite(scale) || !is_finite(means)) return 126;
        const unsigned largest = 0x7F7FFFFF;
        unsigned v = finite_magnitude(bound), dy = finite_magnitude(multiply_unflushed(bound, fabsf(scale)));
        // Keeps g in range between the multiplications by 2^e and by `scale`.
        int e = min(126, 112 + scale_exponent(v ? v : largest));
        return scale != 0 ? min(e, scale_exponent(dy ? dy : largest)) : e;
    }
};
