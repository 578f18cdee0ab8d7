// The arithmetic of batch norm, which all its kernels share: y = (x - mean) invstd weight + bias, and the statistics.
//
// Squares of float values beyond 1.8e19 overflow, and sums can overflow too. So values are multiplied by `unit` before
// they are summed. The unit is 1. If the sum is not finite, the same values are summed again with the unit 2^-96. A
// power of two changes no bit of the result. Blocks exchange doubles, with the unit divided out.
#pragma once
#include "common.cuh"

__device__ constexpr acc_t OTHER_UNIT() { return 0x1p-96f; }
// Whether sums must be taken once more, then times another unit.
__device__ inline bool again(acc_t sum, acc_t other, acc_t& unit) {
    if (sizeof(acc_t) != 4 || unit != 1 || (is_finite(sum) && is_finite(other))) return false;
    unit = OTHER_UNIT();
    return true;
}
__device__ inline bool again(acc_t sum, acc_t& unit) { return again(sum, 0, unit); }
// What undoes it.
__device__ inline acc_t inverse_of(acc_t unit) { return unit == 1 ? 1 : 1 / OTHER_UNIT(); }

// Normalises the values of one channel or group. Where mean or standard deviation are beyond 2^64, a distance from the
// mean could overflow, and invstd be a denormal, which -ftz=true flushes: there all is taken times `unit`, a power of
// two, which changes no bit of what neither overflows nor vanishes.
struct Normaliser {
    acc_t unit, mean, invstd;
    __device__ static acc_t LARGE_UNIT() { return 0x1p-32f; }
    __device__ Normaliser(acc_t mean, acc_t invstd) {
        bool large = sizeof(acc_t) == 4 && (invstd < 0x1p-64f || fabs(mean) > 0x1p64f);
        unit = large ? LARGE_UNIT() : 1;
        this->mean = mean * unit;
        this->invstd = multiply_unflushed(invstd, (acc_t)(large ? 0x1p32f : 1));
    }
    __device__ acc_t operator()(acc_t x) const { return (x * unit - mean) * invstd; }
};
__device__ inline acc_t bn_affine(acc_t xhat, acc_t weight, acc_t bias) { return xhat * weight + bias; }

// Weight and bias of channel c; null pointers stand for 1 and 0.
template <class P> __device__ inline acc_t bn_weight(const P* weight, i64 c) {
    return weight ? (acc_t)to_acc(weight[c]) : (acc_t)1;
}
template <class P> __device__ inline acc_t bn_bias(const P* bias, i64 c) {
    return bias ? (acc_t)to_acc(bias[c]) : (acc_t)0;
}

// What sums are taken relative to, so that the rounding error of a large mean stays out of a small variance.
__device__ inline acc_t finite_or_zero(acc_t v) { return is_finite(v) ? v : (acc_t)0; }

// 1/sqrt(variance + eps), for a variance of values times `unit`. The result may be a denormal.
__device__ inline acc_t invstd_of(acc_t variance, acc_t unit, acc_t eps) {
    acc_t lift = unit == 1 ? 1 : 0x1p32f, fall = unit == 1 ? 1 : 0x1p-32f;
    return multiply_unflushed(lift * unit / sqrt(variance + eps * unit * unit), fall);
}

struct Moments { acc_t mean, squares; };  // squares: sum of squared distances from the mean

// Moments of values times `unit` become those of the values themselves, unless these overflow. Returns the unit that
// holds then.
__device__ inline acc_t without_unit(Moments& moments, acc_t unit) {
    acc_t back = inverse_of(unit);
    Moments plain = {moments.mean * back, moments.squares * back * back};
    if (!is_finite(plain.mean) || !is_finite(plain.squares)) return unit;
    moments = plain;
    return 1;
}

// Number of values in each chunk: `chunk`, or what is left in the last one; given ones where not null.
struct ChunkCounts {
    const double* given;
    i64 count, chunk;
    __device__ double operator()(i64 k) const { return given ? given[k] : (double)min(chunk, count - k * chunk); }
};

// Of a channel, from those of its chunks. In double they neither overflow nor cancel. Returns the unit of the moments.
__device__ inline acc_t moments_of_channel(
    Moments& moments, const double* __restrict__ means, const double* __restrict__ m2s, const ChunkCounts& counts,
    i64 chunks, double* scratch) {
    double sum = 0, m2 = 0;
    for (i64 k = threadIdx.x; k < chunks; k += blockDim.x) sum += counts(k) * means[k];
    double mean = block_sum(sum, scratch) / counts.count;
    for (i64 k = threadIdx.x; k < chunks; k += blockDim.x) {
        double distance = means[k] - mean;
        m2 += m2s[k] + counts(k) * distance * distance;
    }
    m2 = block_sum(m2, scratch);
    acc_t unit = sizeof(acc_t) == 8 || is_finite((acc_t)m2) ? (acc_t)1 : OTHER_UNIT();
    moments = {(acc_t)(mean * unit), (acc_t)(m2 * unit * unit)};
    return unit;
}

// From a channel's moments, of values times `unit`: what the batch is normalised by, and the running statistics, where
// not null. shift: what running_mean has besides the mean. Pointers are to the channel's values.
template <class N, class P> __device__ inline void store_statistics(
    Moments moments, acc_t unit, N count, acc_t eps, acc_t* mean, acc_t* invstd, P* running_mean, P* running_var,
    acc_t momentum, acc_t shift) {
    acc_t back = inverse_of(unit), batch_mean = moments.mean * back, batch_var = moments.squares / (count - 1) * back;
    *mean = batch_mean;
    *invstd = invstd_of(moments.squares / count, unit, eps);
    if (!running_mean) return;
    *running_mean = from_acc<P>((1 - momentum) * to_acc(*running_mean) + momentum * (batch_mean + shift));
    // The variance alone may overflow.
    *running_var = from_acc<P>((1 - momentum) * to_acc(*running_var) + momentum * back * batch_var);
}
