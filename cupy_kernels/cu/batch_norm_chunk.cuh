// What batch norm's kernels do with the chunk of a block: see batch_norm.cu.
#pragma once
#include "channel_values.cuh"
#include "tanh.cuh"

struct Partials {
    double* first;
    i64 channels, chunks;
    __device__ void store(const Walk& walk, int channel, double one, double other) const {
        i64 at = channel * chunks + walk.chunk;
        first[at] = one;
        first[channels * chunks + at] = other;
    }
};

// y of a chunk, with what is kept of the channels.
template <class X> __device__ inline void apply(
    X x, scalar_t* __restrict__ y, bool with_tanh, const Walk& walk, const Kept& kept) {
    acc_t w[SLOTS], b[SLOTS];
    kept.slots(WEIGHT, walk, w), kept.slots(BIAS, walk, b);
    normalise_chunk(x, y, walk, kept, w, b, [=](acc_t(&v)[WIDTH]) {
        if (!with_tanh) return;
        #pragma unroll
        for (int i = 0; i < WIDTH; i++) v[i] = tanh_of(v[i]);
    });
}
// Brings a channel's value into the caches, for a read that follows. The pointer may be null.
template <class P> __device__ inline void prefetch(const P* values, int channel) {
#ifndef CUPY_KERNELS_EMULATOR
    if (values) asm volatile("prefetch.global.L1 [%0];" ::"l"(values + channel));
#endif
}
__device__ inline void keep_channel(
    const Kept& kept, int place, int channel, acc_t mean, acc_t invstd, const param_t* weight, const param_t* bias) {
    kept.normaliser(place, mean, invstd);
    kept.at(WEIGHT, place) = bn_weight(weight, channel), kept.at(BIAS, place) = bn_bias(bias, channel);
}

// What the backward knows of the channels: SCALE, of a gradient at batch norm's output, and the means of g and of g
// xhat.
enum { SCALE = WEIGHT, MEAN_G = BIAS, MEAN_DOT = OTHER };
__device__ inline void keep_scale(
    const Kept& kept, int place, int c, const acc_t* mean, const acc_t* invstd, const param_t* weight) {
    kept.normaliser(place, mean[c], invstd[c]);
    kept.at(SCALE, place) = multiply_unflushed(bn_weight(weight, c), invstd[c]);
}

// What the backward reads. x is null where nobody needs it, y without tanh.
struct Tensors {
    const scalar_t *dy, *x, *y;
    enum { PACKS = BATCH / 2 };
    struct Batch {
        Pack dy[PACKS], x[PACKS], y[PACKS];
        i64 offsets[PACKS];
    };
    __device__ int next(Walk& walk, Batch& batch) {
        return next_packs(walk, PACKS, [&](int j, i64 offset) {
            batch.offsets[j] = offset;
            batch.dy[j] = *(const Pack*)(dy + offset);
            if (x) batch.x[j] = *(const Pack*)(x + offset);
            if (y) batch.y[j] = *(const Pack*)(y + offset);
        });
    }
    // Value i of pack j of the gradient at batch norm's output.
    __device__ acc_t gradient(const Batch& batch, int j, int i, acc_t unit = 1) const {
        acc_t g = to_acc(batch.dy[j].v[i]) * unit;
        return y ? g * tanh_slope(to_acc(batch.y[j].v[i])) : g;
    }
};

// Calls finish(k, place, channel, {sum of g, sum of g xhat}), as sums_of_channels; and writes dx, where not null, of
// statistics that do not depend on x.
template <class T, class F> __device__ inline void sums_of_chunk(
    T tensors, scalar_t* __restrict__ dx, acc_t unit, Walk walk, const Kept& kept, F finish) {
    Normalisers normalise(kept, walk);
    acc_t sums[2][SLOTS];
    #pragma unroll
    for (int s = 0; s < SLOTS; s++) sums[0][s] = sums[1][s] = 0;
    #pragma unroll 1
    while (walk.packs > 0) {
        Tensors::Batch batch;
        int have = tensors.next(walk, batch);
        #pragma unroll
        for (int j = 0; j < Tensors::PACKS; j++) {
            if (j >= have) continue;
            acc_t xhat[WIDTH];
            normalise(batch.x[j], xhat);
            #pragma unroll
            for (int i = 0; i < WIDTH; i++) {
                acc_t g = tensors.gradient(batch, j, i, unit);
                sums[0][i / PER_SLOT] += g;
                sums[1][i / PER_SLOT] += g * xhat[i];
            }
            if (!dx) continue;
            Pack result;
            #pragma unroll
            for (int i = 0; i < WIDTH; i++) {
                acc_t scale = kept.at(SCALE, walk.place(i / PER_SLOT));
                result.v[i] = from_acc<scalar_t>(multiply_unflushed(tensors.gradient(batch, j, i), scale));
            }
            store_at_once(dx + batch.offsets[j], result);
        }
    }
    sums_of_channels(sums, walk, kept.scratch(), [](int, acc_t(&)[2]) {}, finish);
}

// A channel's sums of g, and of g xhat, are the gradients of bias and weight, where not null.
__device__ inline void store_gradients(param_t* dweight, param_t* dbias, i64 channel, double sum, double dot) {
    if (dbias) dbias[channel] = from_acc<param_t>((acc_t)sum);
    if (dweight) dweight[channel] = from_acc<param_t>((acc_t)dot);
}

// sum / count: the sum may be beyond float, the quotient is not.
__device__ inline acc_t mean_of(double sum, i64 count) {
    acc_t mean = (acc_t)sum / count;
    return is_finite(mean) ? mean : (acc_t)(sum * 0x1p-96) / count * 0x1p96f;
}

// dx of a chunk, with what is kept of the channels.
template <class T> __device__ inline void backward_apply(
    T tensors, const Kept& kept, scalar_t* __restrict__ dx, Walk walk) {
    Normalisers normalise(kept, walk);
    acc_t scale[SLOTS], mean_g[SLOTS], mean_dot[SLOTS];
    kept.slots(SCALE, walk, scale), kept.slots(MEAN_G, walk, mean_g), kept.slots(MEAN_DOT, walk, mean_dot);
    #pragma unroll 1
    while (walk.packs > 0) {
        Tensors::Batch batch;
        int have = tensors.next(walk, batch);
        #pragma unroll
        for (int j = 0; j < Tensors::PACKS; j++) {
            if (j >= have) continue;
            Pack result;
            acc_t xhat[WIDTH];
            if (tensors.x) normalise(batch.x[j], xhat);
            #pragma unroll
            for (int i = 0; i < WIDTH; i++) {
                int s = i / PER_SLOT;
                acc_t g = tensors.gradient(batch, j, i);
                if (tensors.x) g -= mean_g[s] + xhat[i] * mean_dot[s];
                result.v[i] = from_acc<scalar_t>(multiply_unflushed(g, scale[s]));
            }
            store_at_once(dx + batch.offsets[j], result);
        }
    }
}
__device__ inline void keep_means(const Kept& kept, int place, double sum, double dot, i64 count) {
    kept.at(MEAN_G, place) = mean_of(sum, count), kept.at(MEAN_DOT, place) = mean_of(dot, count);
}
