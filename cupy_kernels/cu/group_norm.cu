// Group norm over x [images, channels, plane]: y = (x - mean) rstd weight + bias, with mean and rstd = 1/sqrt(variance + eps) of
// each image's groups of group_channels channels, and its gradients.
//
// Thread mapping: one block a group, whose group_channels * plane values lie in a row and are read in packs of WIDTH. With CACHED
// the block keeps them in dynamic shared memory and reads global memory once: `packs` packs forward, twice as many backward.
//
// Saved for the backward: x, and mean and rstd, both acc_t [images * groups].
// dx = rstd (dy weight - (S1 + xhat S2)/size), S1 = sum(dy weight) and S2 = sum(dy weight xhat) over the group's `size` values,
// where xhat = (x - mean) rstd. The gradients of weight and bias are sums of dy xhat and dy over images and plane.
//
// Macros: scalar_t, acc_t, param_t (weight, bias and their gradients), WIDTH (a divisor of a group's size; pointers are aligned to
// a pack), CACHED (0 or 1), THREADS and COLUMNS (of group_norm_backward_parameters). Limit: fewer than 2^31 values in a group.
#include "batch_norm.cuh"  // one expression for all that normalises

typedef Packed<scalar_t, WIDTH> Pack;

extern "C" __global__ void __launch_bounds__(1024) group_norm_forward(
    const scalar_t* __restrict__ x, const param_t* __restrict__ weight, const param_t* __restrict__ bias, scalar_t* __restrict__ y,
    acc_t* __restrict__ mean, acc_t* __restrict__ rstd, acc_t eps, int groups, int group_channels, int plane) {
    DYNAMIC_SHARED(Pack, cache);
    __shared__ acc_t scratch[32];
    int size = group_channels * plane, packs = size / WIDTH;
    i64 base = (i64)blockIdx.x * size;
    const Pack* in = (const Pack*)(x + base);
    acc_t origin = finite_or_zero(to_acc(x[base]));  // the rounding error of a large mean must not enter the variance
    acc_t sum = 0, squares = 0;
    #pragma unroll 4
    for (int p = threadIdx.x; p < packs; p += blockDim.x) {
        Pack values = in[p];
        if (CACHED) cache[p] = values;
        #pragma unroll
        for (int i = 0; i < WIDTH; i++) sum += to_acc(values.v[i]) - origin;
    }
    acc_t distance = block_sum(sum, scratch) / size, group_mean = origin + distance;
    #pragma unroll 4
    for (int p = threadIdx.x; p < packs; p += blockDim.x) {
        Pack values = CACHED ? cache[p] : in[p];
        #pragma unroll
        for (int i = 0; i < WIDTH; i++) {
            acc_t d = to_acc(values.v[i]) - origin - distance;
            squares += d * d;
        }
    }
    acc_t group_rstd = 1 / sqrt(block_sum(squares, scratch) / size + eps);
    if (threadIdx.x == 0) {
        mean[blockIdx.x] = group_mean;
        rstd[blockIdx.x] = group_rstd;
    }
    Divisor by_plane(plane);
    int first_channel = blockIdx.x % groups * group_channels;
    for (int p = threadIdx.x; p < packs; p += blockDim.x) {
        Pack values = CACHED ? cache[p] : in[p];
        unsigned within, channel = first_channel + by_plane.divide(p * WIDTH, within);
        acc_t w = bn_weight(weight, channel), b = bn_bias(bias, channel);
        #pragma unroll
        for (int i = 0; i < WIDTH; i++) {
            values.v[i] = from_acc<scalar_t>(bn_affine(bn_normalise(to_acc(values.v[i]), group_mean, group_rstd), w, b));
            if (++within == plane && i + 1 < WIDTH) {
                within = 0, channel++;
                w = bn_weight(weight, channel), b = bn_bias(bias, channel);
            }
        }
        ((Pack*)(y + base))[p] = values;
    }
}

// dx may be null. partials [2][images * channels]: sum of dy, and of dy xhat, over each plane; null where weight and bias need no
// gradient.
//
// Warps share the group's channels; where there are more warps than channels, several take parts of one channel each.
extern "C" __global__ void __launch_bounds__(1024, 1) group_norm_backward(
    const scalar_t* __restrict__ dy, const scalar_t* __restrict__ x, const acc_t* __restrict__ mean, const acc_t* __restrict__ rstd,
    const param_t* __restrict__ weight, scalar_t* __restrict__ dx, acc_t* __restrict__ partials, int groups, int group_channels,
    int plane) {
    DYNAMIC_SHARED(Pack, cache);
    __shared__ acc_t scratch[32], part_sums[32], part_dots[32];
    int size = group_channels * plane, packs = size / WIDTH;
    i64 base = (i64)blockIdx.x * size;
    const Pack *gradients = (const Pack*)(dy + base), *in = (const Pack*)(x + base);
    if (CACHED) {
        #pragma unroll 2
        for (int p = threadIdx.x; p < packs; p += blockDim.x) {
            Pack g = gradients[p], v = in[p];
            cache[p] = g;
            cache[packs + p] = v;
        }
        __syncthreads();
    }
    acc_t m = mean[blockIdx.x], r = rstd[blockIdx.x], weighted_sum = 0, weighted_dot = 0;
    int first_channel = blockIdx.x % groups * group_channels;
    i64 first_plane = (i64)blockIdx.x * group_channels, planes = (i64)gridDim.x * group_channels;
    auto finish_channel = [&](int channel, acc_t sum, acc_t dot) {
        acc_t w = bn_weight(weight, first_channel + channel);
        weighted_sum += w * sum;
        weighted_dot += w * dot;
        if (partials) {
            partials[first_plane + channel] = sum;
            partials[planes + first_plane + channel] = dot;
        }
    };
    int warps = blockDim.x / 32, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    int parts = max(1, warps / group_channels), teams = warps / parts;
    for (int channel = warp / parts; channel < group_channels; channel += teams) {
        acc_t sum = 0, dot = 0;
        #pragma unroll 4
        for (int i = channel * plane + warp % parts * 32 + lane; i < (channel + 1) * plane; i += parts * 32) {
            acc_t g = to_acc(CACHED ? ((const scalar_t*)cache)[i] : dy[base + i]);
            acc_t v = to_acc(CACHED ? ((const scalar_t*)(cache + packs))[i] : x[base + i]);
            sum += g;
            dot += g * bn_normalise(v, m, r);
        }
        for (int lanes = 16; lanes > 0; lanes >>= 1) {
            sum += __shfl_xor_sync(0xFFFFFFFFu, sum, lanes);
            dot += __shfl_xor_sync(0xFFFFFFFFu, dot, lanes);
        }
        if (parts == 1) {
            if (lane == 0) finish_channel(channel, sum, dot);
        } else if (lane == 0) {
            part_sums[warp] = sum;
            part_dots[warp] = dot;
        }
    }
    if (parts > 1) {
        __syncthreads();
        if (threadIdx.x < group_channels) {
            acc_t sum = 0, dot = 0;
            for (int part = 0; part < parts; part++) {
                sum += part_sums[threadIdx.x * parts + part];
                dot += part_dots[threadIdx.x * parts + part];
            }
            finish_channel(threadIdx.x, sum, dot);
        }
    }
    if (!dx) return;
    acc_t mean_g = block_sum(weighted_sum, scratch) / size, mean_dot = block_sum(weighted_dot, scratch) / size;
    Divisor by_plane(plane);
    for (int p = threadIdx.x; p < packs; p += blockDim.x) {
        Pack g = CACHED ? cache[p] : gradients[p], v = CACHED ? cache[packs + p] : in[p];
        unsigned within, channel = first_channel + by_plane.divide(p * WIDTH, within);
        acc_t w = bn_weight(weight, channel);
        #pragma unroll
        for (int i = 0; i < WIDTH; i++) {
            acc_t xhat = bn_normalise(to_acc(v.v[i]), m, r);
            g.v[i] = from_acc<scalar_t>((to_acc(g.v[i]) * w - (mean_g + xhat * mean_dot)) * r);
            if (++within == plane && i + 1 < WIDTH) {
                within = 0, channel++;
                w = bn_weight(weight, channel);
            }
        }
        ((Pack*)(dx + base))[p] = g;
    }
}

// dweight and dbias from partials, over the images in a fixed order. A block takes COLUMNS channels, whose neighbours are read
// together, and each of its threads every (blockDim.x / COLUMNS)-th image. Null outputs are left out.
extern "C" __global__ void __launch_bounds__(THREADS) group_norm_backward_parameters(
    const acc_t* __restrict__ partials, param_t* __restrict__ dweight, param_t* __restrict__ dbias, i64 images, i64 channels) {
    static_assert(THREADS % COLUMNS == 0 && (THREADS / COLUMNS & (THREADS / COLUMNS - 1)) == 0, "threads are halved down to COLUMNS");
    __shared__ acc_t sums[THREADS], dots[THREADS];
    i64 channel = (i64)blockIdx.x * COLUMNS + threadIdx.x % COLUMNS;
    acc_t sum = 0, dot = 0;
    if (channel < channels)
        #pragma unroll 4
        for (i64 n = threadIdx.x / COLUMNS; n < images; n += blockDim.x / COLUMNS) {
            sum += partials[n * channels + channel];
            dot += partials[(images + n) * channels + channel];
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
    if (dbias) dbias[channel] = from_acc<param_t>(sums[threadIdx.x]);
    if (dweight) dweight[channel] = from_acc<param_t>(dots[threadIdx.x]);
}
