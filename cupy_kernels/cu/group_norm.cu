// Group norm over x [images, channels, plane]: y = (x - mean) rstd weight + bias, with mean and rstd = 1/sqrt(variance
// + eps) of each image's groups of group_channels channels, and its gradients.
//
// Thread mapping: one block a group, whose group_channels * plane values lie in a row and are read in packs of WIDTH.
// With CACHED the block keeps them in dynamic shared memory and reads global memory once: `packs` packs forward, twice
// as many backward.
//
// Saved for the backward: x, and mean and rstd, both acc_t [images * groups].
// dx = rstd (dy weight - (S1 + xhat S2)/size), S1 = sum(dy weight) and S2 = sum(dy weight xhat) over the group's `size`
// values, where xhat = (x - mean) rstd. The gradients of weight and bias are sums of dy xhat and dy over images and
// plane.
//
// Macros: scalar_t, acc_t, out_t (y and dy), param_t (weight, bias and their gradients), WIDTH (a divisor of a group's
// size; pointers are aligned to a pack), CACHED (0 or 1), THREADS and COLUMNS (of group_norm_backward_parameters).
// Limit: fewer than 2^31 values in a group.
#include "batch_norm.cuh"  // one expression for all that normalises

typedef Packed<scalar_t, WIDTH> Pack;
typedef Packed<out_t, WIDTH> OutPack;

// Of the block's group, whose values it brings into the cache.
__device__ inline Moments moments_of_group(
    const Pack* __restrict__ in, Pack* cache, acc_t unit, int packs, acc_t* scratch) {
    int size = packs * WIDTH;
    // The rounding error of a large mean must not enter the variance.
    acc_t origin = finite_or_zero(to_acc(in->v[0])) * unit;
    acc_t sum = 0, squares = 0;
    #pragma unroll 4
    for (int p = threadIdx.x; p < packs; p += blockDim.x) {
        Pack values = in[p];
        if (CACHED) cache[p] = values;
        #pragma unroll
        for (int i = 0; i < WIDTH; i++) sum += to_acc(values.v[i]) * unit - origin;
    }
    acc_t distance = block_sum(sum, scratch) / size;
    #pragma unroll 4
    for (int p = threadIdx.x; p < packs; p += blockDim.x) {
        Pack values = CACHED ? cache[p] : in[p];
        #pragma unroll
        for (int i = 0; i < WIDTH; i++) {
            acc_t d = to_acc(values.v[i]) * unit - origin - distance;
            squares += d * d;
        }
    }
    return {origin + distance, block_sum(squares, scratch)};
}

extern "C" __global__ void __launch_bounds__(1024) group_norm_forward(
    const scalar_t* __restrict__ x, const param_t* __restrict__ weight, const param_t* __restrict__ bias,
    out_t* __restrict__ y, acc_t* __restrict__ mean, acc_t* __restrict__ rstd, acc_t eps, int groups,
    int group_channels, int plane) {
    wait_for_earlier_kernels();
    DYNAMIC_SHARED(Pack, cache);
    __shared__ acc_t scratch[32];
    int size = group_channels * plane, packs = size / WIDTH;
    i64 base = (i64)blockIdx.x * size;
    const Pack* in = (const Pack*)(x + base);
    acc_t unit = 1;
    Moments moments;
    do moments = moments_of_group(in, cache, unit, packs, scratch);
    while (again(moments.squares, unit));
    acc_t group_mean = moments.mean * inverse_of(unit), group_rstd = invstd_of(moments.squares / size, unit, eps);
    if (threadIdx.x == 0) {
        mean[blockIdx.x] = group_mean;
        rstd[blockIdx.x] = group_rstd;
    }
    Normaliser normalise(group_mean, group_rstd);
    Divisor by_plane(plane);
    int first_channel = blockIdx.x % groups * group_channels;
    for (int p = threadIdx.x; p < packs; p += blockDim.x) {
        Pack values = CACHED ? cache[p] : in[p];
        OutPack out;
        unsigned within, channel = first_channel + by_plane.divide(p * WIDTH, within);
        acc_t w = bn_weight(weight, channel), b = bn_bias(bias, channel);
        #pragma unroll
        for (int i = 0; i < WIDTH; i++) {
            out.v[i] = from_acc<out_t>(bn_affine(normalise(to_acc(values.v[i])), w, b));
            if (++within == plane && i + 1 < WIDTH) {
                within = 0, channel++;
                w = bn_weight(weight, channel), b = bn_bias(bias, channel);
            }
        }
        ((OutPack*)(y + base))[p] = out;
    }
}

struct Means { acc_t g, dot; };  // of dy weight, and of dy weight xhat, over a group

struct Group {
    const out_t* dy;
    const scalar_t* x;
    const param_t* weight;
    double* partials;
    int first_channel, channels, plane;
    Normaliser normalise;

    // Writes partials. Warps share the group's channels; where there are more warps than channels, several take parts
    // of one channel each.
    __device__ inline Means sum_up(acc_t unit, acc_t* part_sums, acc_t* part_dots, acc_t* scratch) const {
        acc_t weighted_sum = 0, weighted_dot = 0;
        i64 first_plane = (i64)blockIdx.x * channels, planes = (i64)gridDim.x * channels;
        auto finish_channel = [&](int channel, acc_t sum, acc_t dot) {
            acc_t w = bn_weight(weight, first_channel + channel);
            weighted_sum += w * sum;
            weighted_dot += w * dot;
            if (partials) {
                double back = inverse_of(unit);
                partials[first_plane + channel] = sum * back;
                partials[planes + first_plane + channel] = dot * back;
            }
        };
        int warps = blockDim.x / 32, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
        make_opaque(warp), make_opaque(warps);  // else a second pass would hold registers during the first
        int parts = max(1, warps / channels), teams = warps / parts;
        for (int channel = warp / parts; channel < channels; channel += teams) {
            acc_t sum = 0, dot = 0;
            auto add = [&](out_t gradient, scalar_t value) {
                acc_t g = to_acc(gradient) * unit;
                sum += g;
                dot += g * normalise(to_acc(value));
            };
            int first = channel * plane, start = warp % parts * 32 + lane, step = parts * 32;
            if (plane % WIDTH == 0) {
                const OutPack* gradients = (const OutPack*)(dy + first);
                const Pack* values = (const Pack*)(x + first);
                #pragma unroll 2
                for (int p = start; p < plane / WIDTH; p += step) {
                    OutPack g = gradients[p];
                    Pack v = values[p];
                    #pragma unroll
                    for (int i = 0; i < WIDTH; i++) add(g.v[i], v.v[i]);
                }
            } else {
                #pragma unroll 4
                for (int i = start; i < plane; i += step) add(dy[first + i], x[first + i]);
            }
            sum = warp_sum(sum);
            dot = warp_sum(dot);
            if (parts == 1) {
                if (lane == 0) finish_channel(channel, sum, dot);
            } else if (lane == 0) {
                part_sums[warp] = sum;
                part_dots[warp] = dot;
            }
        }
        if (parts > 1) {
            __syncthreads();
            if (threadIdx.x < channels) {
                acc_t sum = 0, dot = 0;
                for (int part = 0; part < parts; part++) {
                    sum += part_sums[threadIdx.x * parts + part];
                    dot += part_dots[threadIdx.x * parts + part];
                }
                finish_channel(threadIdx.x, sum, dot);
            }
        }
        int size = channels * plane;
        acc_t mean_g = block_sum(weighted_sum, scratch) / size;
        return {mean_g, block_sum(weighted_dot, scratch) / size};
    }
};

// dx may be null. partials [2][images * channels]: sum of dy, and of dy xhat, over each plane; null where weight and
// bias need no gradient.
extern "C" __global__ void __launch_bounds__(1024, 1) group_norm_backward(
    const out_t* __restrict__ dy, const scalar_t* __restrict__ x, const acc_t* __restrict__ mean,
    const acc_t* __restrict__ rstd, const param_t* __restrict__ weight, scalar_t* __restrict__ dx,
    double* __restrict__ partials, int groups, int group_channels, int plane) {
    wait_for_earlier_kernels();
    DYNAMIC_SHARED(OutPack, dy_cache);
    __shared__ acc_t scratch[32], part_sums[32], part_dots[32];
    int size = group_channels * plane, packs = size / WIDTH;
    i64 base = (i64)blockIdx.x * size;
    const OutPack* gradients = (const OutPack*)(dy + base);
    const Pack* in = (const Pack*)(x + base);
    Pack* x_cache = (Pack*)(dy_cache + packs);
    if (CACHED) {
        #pragma unroll 2
        for (int p = threadIdx.x; p < packs; p += blockDim.x) {
            OutPack g = gradients[p];
            Pack v = in[p];
            dy_cache[p] = g;
            x_cache[p] = v;
        }
        __syncthreads();
    }
    acc_t r = rstd[blockIdx.x];
    Normaliser normalise(mean[blockIdx.x], r);
    int first_channel = blockIdx.x % groups * group_channels;
    Group group = {CACHED ? (const out_t*)dy_cache : dy + base, CACHED ? (const scalar_t*)x_cache : x + base, weight,
        partials, first_channel, group_channels, plane, normalise};
    acc_t unit = 1;
    Means means;
    do means = group.sum_up(unit, part_sums, part_dots, scratch);
    while (again(means.g, means.dot, unit));
    if (!dx) return;
    acc_t mean_g = means.g * inverse_of(unit), mean_dot = means.dot * inverse_of(unit);
    Divisor by_plane(plane);
    for (int p = threadIdx.x; p < packs; p += blockDim.x) {
        OutPack g = CACHED ? dy_cache[p] : gradients[p];
        Pack v = CACHED ? x_cache[p] : in[p];
        unsigned within, channel = first_channel + by_plane.divide(p * WIDTH, within);
        acc_t w = bn_weight(weight, channel);
        #pragma unroll
        for (int i = 0; i < WIDTH; i++) {
            acc_t dxhat = to_acc(g.v[i]) * w - (mean_g + normalise(to_acc(v.v[i])) * mean_dot);
            v.v[i] = from_acc<scalar_t>(multiply_unflushed(dxhat, r));
            if (++within == plane && i + 1 < WIDTH) {
                within = 0, channel++;
                w = bn_weight(weight, channel);
            }
        }
        ((Pack*)(dx + base))[p] = v;
    }
}

// dweight and dbias from partials [2][rows][channels], over the rows in a fixed order. A block takes COLUMNS channels,
// whose neighbours are read together, and each of its threads every (blockDim.x / COLUMNS)-th row. Null outputs are
// left out.
extern "C" __global__ void __launch_bounds__(THREADS) group_norm_backward_parameters(
    const double* __restrict__ partials, param_t* __restrict__ dweight, param_t* __restrict__ dbias, i64 rows,
    i64 channels) {
    wait_for_earlier_kernels();
    static_assert(
        THREADS % COLUMNS == 0 && (THREADS / COLUMNS & (THREADS / COLUMNS - 1)) == 0,
        "threads are halved down to COLUMNS");
    __shared__ double sums[THREADS], dots[THREADS];
    i64 channel = (i64)blockIdx.x * COLUMNS + threadIdx.x % COLUMNS;
    double sum = 0, dot = 0;
    if (channel < channels)
        #pragma unroll 4
        for (i64 n = threadIdx.x / COLUMNS; n < rows; n += blockDim.x / COLUMNS) {
            sum += partials[n * channels + channel];
            dot += partials[(rows + n) * channels + channel];
        }
    sums[threadIdx.x] = sum;
    dots[threadIdx.x] = dot;
    for (int half = blockDim.x / 2; half >= COLUMNS; half /= 2) {
        __syncthreads();
        if (threadIdx.x < half) {
            sums[threadIdx.x] += sums[threadIdx.x + half];
            dots[threadIdx.x] += dots[threadIdx.x + half];
        }
    }
    if (threadIdx.x >= COLUMNS || channel >= channels) return;
    if (dbias) dbias[channel] = from_acc<param_t>((acc_t)sums[threadIdx.x]);
    if (dweight) dweight[channel] = from_acc<param_t>((acc_t)dots[threadIdx.x]);
}
