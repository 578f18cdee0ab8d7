// group_norm.cu's kernels for x [images, plane, channels], group_channels neighbouring channels a group.
//
// Thread mapping: channel_walk.cuh's walk over rows. Each image is a matrix of `plane` rows and `channels` columns, in
// which a group is what is called a channel there, and a group's channels are its plane. Block image * tiles + t takes
// all rows of tile t.
//
// Saved, and the gradients: group_norm.cu. Macros: those of channel_walk.cuh with PLANES 0, param_t, THREADS (the most
// of a block).
#include "channel_walk.cuh"

// The block's walk over its image, which begins `base` elements into the tensor, and that image's first channel and
// group.
struct ImageWalk : Walk {
    i64 image, base;
    __device__ ImageWalk(int tiles, int channels, int group_channels, int plane, int tile)
        : Walk(
              blockIdx.x % tiles, channels / group_channels, group_channels, (i64)plane * group_channels,
              (i64)plane * group_channels, tile),
          image(blockIdx.x / tiles), base(image * plane * channels) {}
    __device__ i64 group(int slot) const { return image * (columns / plane) + channel(slot); }
    // The last column stands for those beyond it.
    __device__ int own_channel(int slot) const { return min(column + slot, columns - 1); }
};

extern "C" __global__ void __launch_bounds__(THREADS) group_norm_forward_channels_last(
    const scalar_t* __restrict__ x, const param_t* __restrict__ weight, const param_t* __restrict__ bias,
    scalar_t* __restrict__ y, acc_t* __restrict__ mean, acc_t* __restrict__ rstd, acc_t eps, int tiles, int channels,
    int group_channels, int plane, int tile) {
    DYNAMIC_SHARED(acc_t, scratch);
    acc_t means[SLOTS], rstds[SLOTS];
    with_units(scratch, [&](Open& open) {
        ImageWalk walk(tiles, channels, group_channels, plane, tile);
        ChunkMoments moments[SLOTS];
        moments_of_chunk(x + walk.base, open.unit, walk, group_channels, scratch, moments);
        #pragma unroll
        for (int s = 0; s < SLOTS; s++) {
            if (!open.keep(s, is_finite(moments[s].squares))) continue;
            Moments found = {(acc_t)moments[s].mean, moments[s].squares};
            acc_t unit = without_unit(found, open.unit);
            means[s] = found.mean * inverse_of(unit);
            rstds[s] = invstd_of(found.squares / walk.size, unit, eps);
            if (walk.writes(s)) mean[walk.group(s)] = means[s], rstd[walk.group(s)] = rstds[s];
        }
    });
    ImageWalk walk(tiles, channels, group_channels, plane, tile);
    normalise_chunk(
        x + walk.base, y + walk.base, walk, [&](int s) { return means[s]; }, [&](int s) { return rstds[s]; },
        [&](int s) { return bn_weight(weight, walk.own_channel(s)); },
        [&](int s) { return bn_bias(bias, walk.own_channel(s)); }, [](acc_t v) { return v; });
}

// dx may be null. partials [2][images * channels]: sum of dy, and of dy xhat, over each plane; null where weight and
// bias need no gradient.
extern "C" __global__ void __launch_bounds__(THREADS) group_norm_backward_channels_last(
    const scalar_t* __restrict__ dy, const scalar_t* __restrict__ x, const acc_t* __restrict__ mean,
    const acc_t* __restrict__ rstd, const param_t* __restrict__ weight, scalar_t* __restrict__ dx,
    acc_t* __restrict__ partials, int tiles, int channels, int group_channels, int plane, int tile) {
    DYNAMIC_SHARED(acc_t, scratch);
    enum { PACKS = BATCH / 2 };
    Normalisers normalise;
    acc_t w[SLOTS], mean_g[SLOTS], mean_dot[SLOTS];
    {
        ImageWalk walk(tiles, channels, group_channels, plane, tile);
        #pragma unroll
        for (int s = 0; s < SLOTS; s++) {
            normalise.set(s, mean[walk.group(s)], rstd[walk.group(s)]);
            w[s] = bn_weight(weight, walk.own_channel(s));
        }
    }
    auto next = [&](ImageWalk& walk, Pack(&g)[PACKS], Pack(&v)[PACKS], i64(&offsets)[PACKS]) {
        return next_packs(walk, PACKS, [&](int j, i64 offset) {
            offsets[j] = walk.base + offset;
            g[j] = *(const Pack*)(dy + offsets[j]);
            v[j] = *(const Pack*)(x + offsets[j]);
        });
    };
    Pack g[PACKS], v[PACKS];
    i64 offsets[PACKS];
    with_units(scratch, [&](Open& open) {
        ImageWalk walk(tiles, channels, group_channels, plane, tile);
        acc_t sums[2][SLOTS], group_sums[2][SLOTS];
        #pragma unroll
        for (int s = 0; s < SLOTS; s++) sums[0][s] = sums[1][s] = 0;
        #pragma unroll 1
        while (walk.packs > 0) {
            int have = next(walk, g, v, offsets);
            #pragma unroll
            for (int j = 0; j < PACKS; j++) {
                if (j >= have) continue;
                acc_t xhat[WIDTH];
                normalise(v[j], xhat);
                #pragma unroll
                for (int s = 0; s < SLOTS; s++) {
                    acc_t gradient = to_acc(g[j].v[s]) * open.unit;
                    sums[0][s] += gradient;
                    sums[1][s] += gradient * xhat[s];
                }
            }
        }
        column_sums(sums, walk, scratch);
        #pragma unroll
        for (int s = 0; s < SLOTS; s++) group_sums[0][s] = w[s] * sums[0][s], group_sums[1][s] = w[s] * sums[1][s];
        if (group_channels > 1) sums_of_columns(group_sums, walk, scratch);
        acc_t back = inverse_of(open.unit);
        i64 own = walk.image * channels + walk.column, all = (i64)(gridDim.x / tiles) * channels;
        #pragma unroll
        for (int s = 0; s < SLOTS; s++) {
            acc_t g_mean = group_sums[0][s] / walk.size, dot_mean = group_sums[1][s] / walk.size;
            if (!open.keep(s, is_finite(g_mean) && is_finite(dot_mean))) continue;
            mean_g[s] = g_mean * back, mean_dot[s] = dot_mean * back;
            if (partials && threadIdx.x < tile && walk.column + s < channels) {
                partials[own + s] = sums[0][s] * back;
                partials[all + own + s] = sums[1][s] * back;
            }
        }
    });
    if (!dx) return;
    ImageWalk walk(tiles, channels, group_channels, plane, tile);
    acc_t r[SLOTS];
    #pragma unroll
    for (int s = 0; s < SLOTS; s++) r[s] = rstd[walk.group(s)];
    #pragma unroll 1
    while (walk.packs > 0) {
        int have = next(walk, g, v, offsets);
        #pragma unroll
        for (int j = 0; j < PACKS; j++) {
            if (j >= have) continue;
            Pack out;
            acc_t xhat[WIDTH];
            normalise(v[j], xhat);
            #pragma unroll
            for (int s = 0; s < SLOTS; s++) {
                acc_t dxhat = to_acc(g[j].v[s]) * w[s] - (mean_g[s] + xhat[s] * mean_dot[s]);
                out.v[s] = from_acc<scalar_t>(multiply_unflushed(dxhat, r[s]));
            }
            *(Pack*)(dx + offsets[j]) = out;
        }
    }
}
