// group_norm.cu's kernels for x [images, plane, channels], group_channels neighbouring channels a group.
//
// Thread mapping: channel_walk.cuh's walk over rows. Each image is a matrix of `plane` rows and `channels` columns, in
// which a group is what is called a channel there, and a group's channels are its plane. Block image * tiles + t takes
// all rows of tile t.
//
// Saved, and the gradients: group_norm.cu. Macros: those of channel_walk.cuh with PLANES 0, param_t, THREADS (the most
// of a block).
#include "channel_walk.cuh"

// The block's walk over its image, which begins `base` elements into the tensor.
struct ImageWalk : Walk {
    i64 image, base;
    __device__ ImageWalk(int tiles, int channels, int group_channels, int plane, int tile)
        : Walk(
              blockIdx.x % tiles, channels / group_channels, group_channels, (i64)plane * group_channels,
              (i64)plane * group_channels, tile),
          image(blockIdx.x / tiles), base(image * plane * channels) {}
    __device__ i64 group(int channel) const { return image * channels + channel; }
    __device__ int column_of_tile() const { return threadIdx.x % (unsigned)tile * WIDTH; }
    // Calls visit(column of the tile, channel) for each of the block.
    template <class F> __device__ void for_columns(F visit) const {
        int first = this->first * Walk::plane;
        for (int i = threadIdx.x; i < tile * WIDTH && first + i < columns; i += blockDim.x) visit(i, first + i);
    }
};
// Weights lie by column, and so do biases. Of columns beyond the last nothing is kept, and nobody uses what is read.
UNCHECKED __device__ inline void columns_of_slots(
    const Kept& kept, int array, const ImageWalk& walk, acc_t (&v)[SLOTS]) {
    #pragma unroll
    for (int s = 0; s < SLOTS; s++) v[s] = kept.at(array, walk.column_of_tile() + s);
}

extern "C" __global__ void __launch_bounds__(THREADS, 1) group_norm_forward_channels_last(
    const scalar_t* __restrict__ x, const param_t* __restrict__ weight, const param_t* __restrict__ bias,
    scalar_t* __restrict__ y, acc_t* __restrict__ mean, acc_t* __restrict__ rstd, acc_t eps, int tiles, int channels,
    int group_channels, int plane, int tile) {
    DYNAMIC_SHARED(acc_t, shared);
    Kept kept(shared, tile);
    with_units(kept.scratch(), [&](Open& open) {
        ImageWalk walk(tiles, channels, group_channels, plane, tile);
        walk.for_columns(
            [&](int i, int c) { kept.at(WEIGHT, i) = bn_weight(weight, c), kept.at(BIAS, i) = bn_bias(bias, c); });
        moments_of_chunk(
            x + walk.base, open.unit, walk, kept.scratch(), [&](int k, int place, int g, ChunkMoments moments) {
                if (!open.keep(k, is_finite(moments.squares))) return;
                Moments found = {(acc_t)moments.mean, moments.squares};
                acc_t unit = without_unit(found, open.unit), group_mean = found.mean * inverse_of(unit);
                acc_t group_rstd = invstd_of(found.squares / walk.size, unit, eps);
                mean[walk.group(g)] = group_mean, rstd[walk.group(g)] = group_rstd;
                kept.normaliser(place, group_mean, group_rstd);
            });
    });
    ImageWalk walk(tiles, channels, group_channels, plane, tile);
    acc_t w[SLOTS], b[SLOTS];
    columns_of_slots(kept, WEIGHT, walk, w), columns_of_slots(kept, BIAS, walk, b);
    normalise_chunk(x + walk.base, y + walk.base, walk, kept, w, b, [](acc_t(&)[WIDTH]) {});
}

// What the backward has in flight.
struct Batch {
    enum { PACKS = BATCH / 2 };
    Pack dy[PACKS], x[PACKS];
    i64 offsets[PACKS];
    __device__ int next(Walk& walk, const scalar_t* __restrict__ from_dy, const scalar_t* __restrict__ from_x) {
        return next_packs(walk, PACKS, [&](int j, i64 offset) {
            offsets[j] = offset;
            dy[j] = *(const Pack*)(from_dy + offset);
            x[j] = *(const Pack*)(from_x + offset);
        });
    }
};

// dx may be null. partials [2][images * channels]: sum of dy, and of dy xhat, over each plane; null where weight and
// bias need no gradient.
extern "C" __global__ void __launch_bounds__(THREADS, 1) group_norm_backward_channels_last(
    const scalar_t* __restrict__ dy, const scalar_t* __restrict__ x, const acc_t* __restrict__ mean,
    const acc_t* __restrict__ rstd, const param_t* __restrict__ weight, scalar_t* __restrict__ dx,
    acc_t* __restrict__ partials, int tiles, int channels, int group_channels, int plane, int tile) {
    DYNAMIC_SHARED(acc_t, shared);
    enum { MEAN_G = BIAS, MEAN_DOT = OTHER };
    Kept kept(shared, tile);
    {
        ImageWalk walk(tiles, channels, group_channels, plane, tile);
        for_channels(walk, [&](int place, int g) { kept.normaliser(place, mean[walk.group(g)], rstd[walk.group(g)]); });
        walk.for_columns([&](int i, int c) { kept.at(WEIGHT, i) = bn_weight(weight, c); });
        __syncthreads();
    }
    with_units(kept.scratch(), [&](Open& open) {
        ImageWalk walk(tiles, channels, group_channels, plane, tile);
        Normalisers normalise(kept, walk);
        acc_t sums[2][SLOTS];
        #pragma unroll
        for (int s = 0; s < SLOTS; s++) sums[0][s] = sums[1][s] = 0;
        #pragma unroll 1
        while (walk.packs > 0) {
            Batch batch;
            int have = batch.next(walk, dy + walk.base, x + walk.base);
            #pragma unroll
            for (int j = 0; j < Batch::PACKS; j++) {
                if (j >= have) continue;
                acc_t xhat[WIDTH];
                normalise(batch.x[j], xhat);
                #pragma unroll
                for (int s = 0; s < SLOTS; s++) {
                    acc_t gradient = to_acc(batch.dy[j].v[s]) * open.unit;
                    sums[0][s] += gradient;
                    sums[1][s] += gradient * xhat[s];
                }
            }
        }
        acc_t back = inverse_of(open.unit);
        i64 all = (i64)(gridDim.x / tiles) * channels;
        auto of_column = [&](int i, acc_t(&total)[2]) {
            int c = walk.first * group_channels + i;
            #pragma unroll
            for (int which = 0; which < 2; which++) {
                // A later pass is for sums that were not finite.
                acc_t* to = partials + which * all + walk.image * channels + c;
                if (partials && c < channels && (open.unit == 1 || !is_finite(*to))) *to = total[which] * back;
                total[which] *= kept.value(WEIGHT, i);
            }
        };
        sums_of_channels(sums, walk, kept.scratch(), of_column, [&](int k, int place, int, const acc_t(&total)[2]) {
            acc_t group_g = total[0] / walk.size, group_dot = total[1] / walk.size;
            if (!open.keep(k, is_finite(group_g) && is_finite(group_dot))) return;
            kept.at(MEAN_G, place) = group_g * back, kept.at(MEAN_DOT, place) = group_dot * back;
        });
    });
    if (!dx) return;
    ImageWalk walk(tiles, channels, group_channels, plane, tile);
    Normalisers normalise(kept, walk);
    acc_t w[SLOTS], r[SLOTS], mean_g[SLOTS], mean_dot[SLOTS];
    columns_of_slots(kept, WEIGHT, walk, w);
    kept.slots(MEAN_G, walk, mean_g), kept.slots(MEAN_DOT, walk, mean_dot);
    #pragma unroll
    for (int s = 0; s < SLOTS; s++) r[s] = rstd[walk.group(min(walk.first + walk.place(s), walk.channels - 1))];
    #pragma unroll 1
    while (walk.packs > 0) {
        Batch batch;
        int have = batch.next(walk, dy + walk.base, x + walk.base);
        #pragma unroll
        for (int j = 0; j < Batch::PACKS; j++) {
            if (j >= have) continue;
            Pack out;
            acc_t xhat[WIDTH];
            normalise(batch.x[j], xhat);
            #pragma unroll
            for (int s = 0; s < SLOTS; s++) {
                acc_t dxhat = to_acc(batch.dy[j].v[s]) * w[s] - (mean_g[s] + xhat[s] * mean_dot[s]);
                out.v[s] = from_acc<scalar_t>(multiply_unflushed(dxhat, r[s]));
            }
            *(Pack*)(dx + walk.base + batch.offsets[j]) = out;
        }
    }
}
