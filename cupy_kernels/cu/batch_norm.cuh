// Batch norm's arithmetic on one value, as every kernel that applies it computes it: y = (x - mean) invstd weight + bias.
#pragma once
#include "common.cuh"

__device__ inline acc_t bn_normalise(acc_t x, acc_t mean, acc_t invstd) { return (x - mean) * invstd; }
__device__ inline acc_t bn_affine(acc_t xhat, acc_t weight, acc_t bias) { return xhat * weight + bias; }

// Weight and bias of channel c; null pointers stand for 1 and 0.
template <class P> __device__ inline acc_t bn_weight(const P* weight, i64 c) { return weight ? (acc_t)to_acc(weight[c]) : (acc_t)1; }
template <class P> __device__ inline acc_t bn_bias(const P* bias, i64 c) { return bias ? (acc_t)to_acc(bias[c]) : (acc_t)0; }

// What sums are taken relative to, so that the rounding error of a large mean stays out of a small variance.
__device__ inline acc_t finite_or_zero(acc_t v) { return v - v == 0 ? v : (acc_t)0; }
