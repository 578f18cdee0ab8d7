// group_norm.cu's kernels for x [images, plane, channels], group_channels neighbouring channels a group.
//
// Thread mapping: channel_walk.cuh's walk over rows. Each image is a matrix of `plane` rows and `channels` columns, in
// which a group is what is called a channel there, and a group's channels are its plane. Block (image * chunks + k) *
// tiles + t takes the rows of chunk k of tile t. With one chunk, one kernel does all. Where images are few, there are
// more, and three kernels: the first writes what it knows of each chunk, in double; the second combines that, a block a
// group; the third applies it, and takes blocks in reverse, as the last ones are still in the L2 cache.
//
// Saved, and the gradients: group_norm.cu. Macros: those of channel_walk.cuh with PLANES 0, out_t and param_t as there,
// THREADS (the most of a block).
#include "channel_values.cuh"

enum { BLOCKS = 2 };  // of an SM, at least, where an image is in chunks

// How blocks share x; `chunk`: rows of an image in a chunk.
struct Rows { int tiles, chunks, channels, group_channels, plane, chunk, tile; };

// The block's walk over its chunk of its image, which begins `base` elements into the tensor.
struct ImageWalk : Walk {
    i64 image, base;
    int chunks;
    __device__ ImageWalk(Rows r, int block)
        : Walk(
              block % (r.tiles * r.chunks), r.channels / r.group_channels, r.group_channels,
              (i64)r.plane * r.group_channels, (i64)r.chunk * r.group_channels, r.tile),
          image(block / (r.tiles * r.chunks)), base(image * r.plane * r.channels), chunks(r.chunks) {}
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

__device__ inline void keep_affine(
    const Kept& kept, const ImageWalk& walk, const param_t* __restrict__ weight, const param_t* __restrict__ bias) {
    walk.for_columns(
        [&](int i, int c) { kept.at(WEIGHT, i) = bn_weight(weight, c), kept.at(BIAS, i) = bn_bias(bias, c); });
}
__device__ inline void apply(
    const scalar_t* __restrict__ x, out_t* __restrict__ y, const ImageWalk& walk, const Kept& kept) {
    acc_t w[SLOTS], b[SLOTS];
    columns_of_slots(kept, WEIGHT, walk, w), columns_of_slots(kept, BIAS, walk, b);
    normalise_chunk(x + walk.base, y + walk.base, walk, kept, w, b, [](acc_t(&)[WIDTH]) {});
}

extern "C" __global__ void __launch_bounds__(THREADS, 1) group_norm_forward_channels_last(
    const scalar_t* __restrict__ x, const param_t* __restrict__ weight, const param_t* __restrict__ bias,
    out_t* __restrict__ y, acc_t* __restrict__ mean, acc_t* __restrict__ rstd, acc_t eps, int tiles, int chunks,
    int channels, int group_channels, int plane, int chunk, int tile) {
    wait_for_earlier_kernels();
    DYNAMIC_SHARED(acc_t, shared);
    Kept kept(shared, tile);
    Rows rows = {tiles, chunks, channels, group_channels, plane, chunk, tile};
    with_units(kept.scratch(), [&](Open& open) {
        ImageWalk walk(rows, blockIdx.x);
        keep_affine(kept, walk, weight, bias);
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
    apply(x, y, ImageWalk(rows, blockIdx.x), kept);
}

// partials [2][images * groups][chunks]: mean, and squares, of each chunk.
extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS) group_norm_partials_channels_last(
    const scalar_t* __restrict__ x, double* __restrict__ partials, int tiles, int chunks, int channels,
    int group_channels, int plane, int chunk, int tile) {
    wait_for_earlier_kernels();
    DYNAMIC_SHARED(acc_t, shared);
    Kept kept(shared, tile);
    with_units(kept.scratch(), [&](Open& open) {
        ImageWalk walk({tiles, chunks, channels, group_channels, plane, chunk, tile}, blockIdx.x);
        moments_of_chunk(x + walk.base, open.unit, walk, kept.scratch(), [&](int k, int, int g, ChunkMoments moments) {
            if (!open.keep(k, is_finite(moments.squares))) return;
            i64 at = walk.group(g) * chunks + walk.chunk, all = (i64)gridDim.x / tiles * walk.channels;
            double back = inverse_of(open.unit);
            partials[at] = moments.mean * back;
            partials[all + at] = moments.squares * back * back;
        });
    });
}

// size: values of a group; chunk: of a chunk of it.
extern "C" __global__ void __launch_bounds__(THREADS) group_norm_statistics_channels_last(
    const double* __restrict__ partials, acc_t* __restrict__ mean, acc_t* __restrict__ rstd, acc_t eps, i64 size,
    i64 chunk, i64 chunks) {
    wait_for_earlier_kernels();
    __shared__ double scratch[32];
    const double *means = partials + blockIdx.x * chunks, *squares = means + gridDim.x * chunks;
    Moments moments;
    acc_t unit = moments_of_channel(moments, means, squares, {nullptr, size, chunk}, chunks, scratch);
    if (threadIdx.x) return;
    mean[blockIdx.x] = moments.mean * inverse_of(unit);
    rstd[blockIdx.x] = invstd_of(moments.squares / size, unit, eps);
}

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS) group_norm_apply_channels_last(
    const scalar_t* __restrict__ x, const acc_t* __restrict__ mean, const acc_t* __restrict__ rstd,
    const param_t* __restrict__ weight, const param_t* __restrict__ bias, out_t* __restrict__ y, int tiles, int chunks,
    int channels, int group_channels, int plane, int chunk, int tile) {
    wait_for_earlier_kernels();
    DYNAMIC_SHARED(acc_t, shared);
    Kept kept(shared, tile);
    ImageWalk walk({tiles, chunks, channels, group_channels, plane, chunk, tile}, gridDim.x - 1 - blockIdx.x);
    keep_affine(kept, walk, weight, bias);
    for_channels(walk, [&](int place, int g) { kept.normaliser(place, mean[walk.group(g)], rstd[walk.group(g)]); });
    __syncthreads();
    apply(x, y, walk, kept);
}

// What the backward has in flight.
struct Batch {
    enum { PACKS = BATCH / 2 };
    Packed<out_t, WIDTH> dy[PACKS];
    Pack x[PACKS];
    i64 offsets[PACKS];
    __device__ int next(Walk& walk, const out_t* __restrict__ from_dy, const scalar_t* __restrict__ from_x) {
        return next_packs(walk, PACKS, [&](int j, i64 offset) {
            offsets[j] = offset;
            dy[j] = *(const Packed<out_t, WIDTH>*)(from_dy + offset);
            x[j] = *(const Pack*)(from_x + offset);
        });
    }
};
enum { MEAN_G = BIAS, MEAN_DOT = OTHER };  // of dy weight, and of dy weight xhat, over a group

__device__ inline void keep_statistics(
    const Kept& kept, const ImageWalk& walk, const acc_t* __restrict__ mean, const acc_t* __restrict__ rstd,
    const param_t* __restrict__ weight) {
    for_channels(walk, [&](int place, int g) { kept.normaliser(place, mean[walk.group(g)], rstd[walk.group(g)]); });
    walk.for_columns([&](int i, int c) { kept.at(WEIGHT, i) = bn_weight(weight, c); });
    __syncthreads();
}

// Calls finish(k, place, sums), as sums_of_channels, with each group's sums of dy weight and dy weight xhat over the
// block's chunk. Writes partials [2][images][chunks][channels], where not null: those of dy, and of dy xhat.
template <class F> __device__ inline void sums_of_chunk(
    const out_t* __restrict__ dy, const scalar_t* __restrict__ x, double* __restrict__ partials, const Kept& kept,
    const Open& open, ImageWalk walk, int tiles, F finish) {
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
    double back = inverse_of(open.unit);
    i64 columns = walk.columns, all = gridDim.x / tiles * columns, row = walk.image * walk.chunks + walk.chunk;
    auto of_column = [&](int i, acc_t(&total)[2]) {
        int c = walk.first * walk.plane + i;
        #pragma unroll
        for (int which = 0; which < 2; which++) {
            // A later pass is for sums that were not finite. As one condition, this crashes NVRTC 11.8 (sm_90, WIDTH
            // 1).
            double* to = partials + which * all + row * columns + c;
            bool keep = partials && c < columns;
            if (keep && open.unit != 1) keep = !is_finite((acc_t)*to);
            if (keep) *to = total[which] * back;
            total[which] *= kept.value(WEIGHT, i);
        }
    };
    sums_of_channels(sums, walk, kept.scratch(), of_column, [&](int k, int place, int, const acc_t(&total)[2]) {
        finish(k, place, total);
    });
}

// dx of the block's chunk.
__device__ inline void gradient_of_chunk(
    const out_t* __restrict__ dy, const scalar_t* __restrict__ x, const acc_t* __restrict__ rstd,
    scalar_t* __restrict__ dx, const Kept& kept, ImageWalk walk) {
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

// dx and partials may be null.
extern "C" __global__ void __launch_bounds__(THREADS, 1) group_norm_backward_channels_last(
    const out_t* __restrict__ dy, const scalar_t* __restrict__ x, const acc_t* __restrict__ mean,
    const acc_t* __restrict__ rstd, const param_t* __restrict__ weight, scalar_t* __restrict__ dx,
    double* __restrict__ partials, int tiles, int chunks, int channels, int group_channels, int plane, int chunk,
    int tile) {
    wait_for_earlier_kernels();
    DYNAMIC_SHARED(acc_t, shared);
    Kept kept(shared, tile);
    Rows rows = {tiles, chunks, channels, group_channels, plane, chunk, tile};
    keep_statistics(kept, ImageWalk(rows, blockIdx.x), mean, rstd, weight);
    with_units(kept.scratch(), [&](Open& open) {
        ImageWalk walk(rows, blockIdx.x);
        sums_of_chunk(dy, x, partials, kept, open, walk, tiles, [&](int k, int place, const acc_t(&total)[2]) {
            acc_t back = inverse_of(open.unit), g = total[0] / walk.size, dot = total[1] / walk.size;
            if (!open.keep(k, is_finite(g) && is_finite(dot))) return;
            kept.at(MEAN_G, place) = g * back, kept.at(MEAN_DOT, place) = dot * back;
        });
    });
    if (dx) gradient_of_chunk(dy, x, rstd, dx, kept, ImageWalk(rows, blockIdx.x));
}

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS) group_norm_backward_partials_channels_last(
    const out_t* __restrict__ dy, const scalar_t* __restrict__ x, const acc_t* __restrict__ mean,
    const acc_t* __restrict__ rstd, const param_t* __restrict__ weight, double* __restrict__ partials, int tiles,
    int chunks, int channels, int group_channels, int plane, int chunk, int tile) {
    wait_for_earlier_kernels();
    DYNAMIC_SHARED(acc_t, shared);
    Kept kept(shared, tile);
    Rows rows = {tiles, chunks, channels, group_channels, plane, chunk, tile};
    keep_statistics(kept, ImageWalk(rows, blockIdx.x), mean, rstd, weight);
    with_units(kept.scratch(), [&](Open& open) {
        sums_of_chunk(
            dy, x, partials, kept, open, ImageWalk(rows, blockIdx.x), tiles,
            [&](int k, int, const acc_t(&total)[2]) { open.keep(k, is_finite(total[0]) && is_finite(total[1])); });
    });
}

// means [2][images * groups], of dy weight, and of dy weight xhat, over each group.
extern "C" __global__ void __launch_bounds__(THREADS) group_norm_backward_means_channels_last(
    const double* __restrict__ partials, const param_t* __restrict__ weight, double* __restrict__ means, int chunks,
    int channels, int group_channels, int plane) {
    wait_for_earlier_kernels();
    __shared__ double scratch[32];
    int groups = channels / group_channels, image = blockIdx.x / groups, first = blockIdx.x % groups * group_channels;
    const double* sums = partials + (i64)image * chunks * channels + first;
    const double* dots = sums + (i64)(gridDim.x / groups) * chunks * channels;
    Divisor by_channels(group_channels);
    double sum = 0, dot = 0;
    #pragma unroll 4
    for (int i = threadIdx.x; i < chunks * group_channels; i += blockDim.x) {
        unsigned c, k = by_channels.divide(i, c);
        double w = bn_weight(weight, first + (int)c);
        sum += w * sums[(i64)k * channels + c], dot += w * dots[(i64)k * channels + c];
    }
    double size = (double)group_channels * plane;
    sum = block_sum(sum, scratch) / size, dot = block_sum(dot, scratch) / size;
    if (threadIdx.x == 0) means[blockIdx.x] = sum, means[gridDim.x + blockIdx.x] = dot;
}

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS) group_norm_backward_apply_channels_last(
    const out_t* __restrict__ dy, const scalar_t* __restrict__ x, const acc_t* __restrict__ mean,
    const acc_t* __restrict__ rstd, const param_t* __restrict__ weight, const double* __restrict__ means,
    scalar_t* __restrict__ dx, int tiles, int chunks, int channels, int group_channels, int plane, int chunk,
    int tile) {
    wait_for_earlier_kernels();
    DYNAMIC_SHARED(acc_t, shared);
    Kept kept(shared, tile);
    ImageWalk walk({tiles, chunks, channels, group_channels, plane, chunk, tile}, gridDim.x - 1 - blockIdx.x);
    i64 groups = (i64)gridDim.x / (tiles * chunks) * walk.channels;
    for_channels(walk, [&](int place, int g) {
        kept.at(MEAN_G, place) = means[walk.group(g)], kept.at(MEAN_DOT, place) = means[groups + walk.group(g)];
    });
    keep_statistics(kept, walk, mean, rstd, weight);
    gradient_of_chunk(dy, x, rstd, dx, kept, walk);
}
