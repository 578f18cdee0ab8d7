// Batch norm over x [images, channels, plane]: statistics per channel, y = (x - mean) invstd weight + bias or tanh of
// that, and the gradients.
//
// Thread mapping: a channel's images * plane values are cut into chunks of blockDim.x * ITEMS; block chunk * channels +
// c takes one chunk of channel c, in packs of WIDTH neighbours, so that neighbouring blocks read neighbouring planes.
// Reductions have two stages: each block writes two partial results to partials [2][channels][chunks], double; then one
// block a channel combines them. Order and chunks depend on the shape alone.
//
// Saved for the backward: mean and invstd = 1/sqrt(variance + eps), both acc_t [channels], x, and y with tanh.
// dx = weight invstd (g - sum(g)/count - xhat sum(g xhat)/count), where xhat = (x - mean) invstd, g = dy, or dy (1 -
// y^2) with tanh; with given (running) statistics dx = weight invstd g.
//
// Macros: scalar_t, acc_t, param_t (weight, bias and their gradients; running statistics), WIDTH (a divisor of plane;
// pointers are aligned to a pack), ITEMS (values per thread, a multiple of WIDTH), THREADS. Whether there is a tanh is
// a run-time argument: its branch is uniform and the kernels wait for memory, so that it costs less than twice as many
// variants would.
#include "batch_norm.cuh"
#include "tanh.cuh"

typedef Packed<scalar_t, WIDTH> Pack;
enum { PACKS = ITEMS / WIDTH };
static_assert(ITEMS % WIDTH == 0, "a thread's values are whole packs");
enum { BATCH = sizeof(Pack) <= 4 ? 8 : 4 };  // packs in flight per thread; half of it per tensor where several are read

// Walks over one thread's packs of the block's chunk, without a division per pack.
struct ChannelWalk {
    i64 channel, chunk;
    int size;    // values in the chunk
    i64 offset;  // of the current pack in the tensor
    i64 jump, skip;
    int left, plane, jump_within;  // left: values to the end of the plane

    __device__ ChannelWalk(i64 channels, i64 plane_size, i64 count) {
        const int far = 1 << 30;  // a chunk is smaller, so distances beyond make no difference
        unsigned stride = blockDim.x * WIDTH;
        int block = blockIdx.x;
        make_opaque(block);  // else a second pass would hold registers during the first
        chunk = block / (unsigned)channels;
        channel = block - chunk * channels;
        i64 first = chunk * blockDim.x * ITEMS, index = first + threadIdx.x * WIDTH;
        size = (int)min((i64)blockDim.x * ITEMS, count - first);
        plane = (int)min(plane_size, (i64)far);
        unsigned jump_images = stride / plane;
        jump_within = stride - jump_images * plane;
        skip = (channels - 1) * plane_size;
        jump = stride + jump_images * skip;
        i64 image = index / plane_size, within = index - image * plane_size;
        left = (int)min(plane_size - within, (i64)far);
        offset = (image * channels + channel) * plane_size + within;
    }
    __device__ bool inside(int pack) const { return (int)((pack * blockDim.x + threadIdx.x) * WIDTH) < size; }
    __device__ void advance() {
        offset += jump;
        left -= jump_within;
        if (left <= 0) {
            left += plane;
            offset += skip;
        }
    }
};

// Number of values in a chunk.
__device__ inline i64 chunk_count(i64 count, i64 chunk, i64 chunk_size) {
    return min(chunk_size, count - chunk * chunk_size);
}

__device__ inline void store_partials(double* partials, i64 channels, i64 chunks, double first, double second) {
    if (threadIdx.x) return;
    i64 chunk = blockIdx.x / (unsigned)channels, channel = blockIdx.x - chunk * channels;
    partials[channel * chunks + chunk] = first;
    partials[(channels + channel) * chunks + chunk] = second;
}

// Means are kept relative to the channel's first value: the rounding error of a large mean must not enter the variance.
__device__ inline acc_t origin_of(const scalar_t* x, i64 channel, i64 plane) {
    return finite_or_zero(to_acc(x[channel * plane]));
}

// Mean - origin, and squares, of the block's chunk.
//
// A thread takes a batch's mean first and its squares relative to that, both from registers, then joins batches as Chan
// et al. do: nothing cancels, whatever the mean is and wherever outliers are.
__device__ inline Moments moments_of_chunk(
    const scalar_t* __restrict__ x, acc_t unit, i64 channels, i64 plane, i64 count, acc_t* scratch) {
    ChannelWalk walk(channels, plane, count);
    acc_t origin = origin_of(x, walk.channel, plane) * unit;
    acc_t n = 0, sum = 0, m2 = 0;  // of the thread's values - origin
    #pragma unroll 1
    for (int first = 0; first < PACKS && walk.inside(first); first += BATCH) {
        Pack in[BATCH];
        bool inside[BATCH];
        #pragma unroll
        for (int b = 0; b < BATCH; b++) {
            inside[b] = walk.inside(first + b);
            if (inside[b]) in[b] = *(const Pack*)(x + walk.offset);
            walk.advance();
        }
        acc_t k = 0, total = 0, rest = 0, squares = 0;
        #pragma unroll
        for (int b = 0; b < BATCH; b++) {
            if (!inside[b]) continue;
            k += WIDTH;
            #pragma unroll
            for (int i = 0; i < WIDTH; i++) total += to_acc(in[b].v[i]) * unit;
        }
        acc_t inverse = 1 / k, shift = finite_or_zero(total * inverse);
        #pragma unroll
        for (int b = 0; b < BATCH; b++) {
            if (!inside[b]) continue;
            #pragma unroll
            for (int i = 0; i < WIDTH; i++) {
                acc_t d = to_acc(in[b].v[i]) * unit - shift;
                rest += d;
                squares += d * d;
            }
        }
        acc_t distance = shift - origin + rest * inverse, step = n > 0 ? distance - sum / n : (acc_t)0;
        m2 += squares - rest * rest * inverse + step * step * (n * k / (n + k));
        sum += k * distance;
        n += k;
    }
    acc_t mean = n > 0 ? sum / n : (acc_t)0;
    acc_t chunk_mean = block_sum(sum, scratch) / walk.size;
    acc_t distance = mean - chunk_mean;
    return {chunk_mean, block_sum(m2 + n * distance * distance, scratch)};
}

// partials: mean - origin, and squares, of each chunk.
extern "C" __global__ void __launch_bounds__(THREADS, 3) batch_norm_partials(
    const scalar_t* __restrict__ x, double* __restrict__ partials, i64 channels, i64 plane, i64 count, i64 chunks) {
    __shared__ acc_t scratch[32];
    acc_t unit = 1;
    Moments moments;
    do moments = moments_of_chunk(x, unit, channels, plane, count, scratch);
    while (again(moments.squares, unit));
    double back = inverse_of(unit);
    store_partials(partials, channels, chunks, moments.mean * back, moments.squares * back * back);
}

// Of a channel, from those of its chunks.
__device__ inline Moments moments_of_channel(
    const double* __restrict__ means, const double* __restrict__ m2s, acc_t unit, i64 count, i64 chunks,
    acc_t* scratch) {
    acc_t sum = 0, m2 = 0;
    double wide = unit;
    for (i64 k = threadIdx.x; k < chunks; k += blockDim.x)
        sum += chunk_count(count, k, (i64)blockDim.x * ITEMS) * (acc_t)(means[k] * wide);
    acc_t mean = block_sum(sum, scratch) / count;
    for (i64 k = threadIdx.x; k < chunks; k += blockDim.x) {
        acc_t distance = (acc_t)(means[k] * wide) - mean;
        m2 += (acc_t)(m2s[k] * wide * wide) + chunk_count(count, k, (i64)blockDim.x * ITEMS) * distance * distance;
    }
    return {mean, block_sum(m2, scratch)};
}

// One block a channel: combines the chunks; updates the running statistics where they are not null, and so is
// `batches`, which counts calls.
extern "C" __global__ void __launch_bounds__(THREADS) batch_norm_statistics(
    const scalar_t* __restrict__ x, const double* __restrict__ partials, INOUT param_t* running_mean,
    INOUT param_t* running_var, INOUT i64* batches, acc_t* __restrict__ mean, acc_t* __restrict__ invstd,
    acc_t momentum, acc_t eps, i64 channels, i64 plane, i64 count, i64 chunks) {
    __shared__ acc_t scratch[32];
    i64 channel = blockIdx.x;
    if (batches && channel == 0 && threadIdx.x == 0) ++*batches;
    const double* means = partials + channel * chunks;
    const double* m2s = partials + (channels + channel) * chunks;
    if (count == 0) {  // nothing to learn from an empty batch, and nothing will be normalised
        if (threadIdx.x == 0) mean[channel] = invstd[channel] = 0;
        return;
    }
    acc_t unit = 1;
    Moments moments;
    do moments = moments_of_channel(means, m2s, unit, count, chunks, scratch);
    while (again(moments.squares, unit));
    if (threadIdx.x) return;
    moments.mean += origin_of(x, channel, plane) * unit;
    if (running_mean) running_mean += channel, running_var += channel;
    store_statistics(
        moments, unit, count, eps, mean + channel, invstd + channel, running_mean, running_var, momentum, 0);
}

// One thread a channel: mean and invstd from the running statistics.
extern "C" __global__ void __launch_bounds__(THREADS) batch_norm_eval_statistics(
    const param_t* __restrict__ running_mean, const param_t* __restrict__ running_var, acc_t* __restrict__ mean,
    acc_t* __restrict__ invstd, acc_t eps, i64 channels) {
    i64 channel = (i64)blockIdx.x * blockDim.x + threadIdx.x;
    if (channel >= channels) return;
    mean[channel] = to_acc(running_mean[channel]);
    invstd[channel] = 1 / sqrt(to_acc(running_var[channel]) + eps);
}

extern "C" __global__ void __launch_bounds__(THREADS) batch_norm_apply(
    const scalar_t* __restrict__ x, const acc_t* __restrict__ mean, const acc_t* __restrict__ invstd,
    const param_t* __restrict__ weight, const param_t* __restrict__ bias, scalar_t* __restrict__ y, int with_tanh,
    i64 channels, i64 plane, i64 count) {
    ChannelWalk walk(channels, plane, count);
    i64 channel = walk.channel;
    Normaliser normalise(mean[channel], invstd[channel]);
    acc_t w = bn_weight(weight, channel), b = bn_bias(bias, channel);
    #pragma unroll 1
    for (int first = 0; first < PACKS; first += BATCH) {
        Pack in[BATCH];
        i64 offsets[BATCH];
        #pragma unroll
        for (int j = 0; j < BATCH; j++) {
            offsets[j] = walk.inside(first + j) ? walk.offset : -1;
            if (offsets[j] >= 0) in[j] = *(const Pack*)(x + offsets[j]);
            walk.advance();
        }
        #pragma unroll
        for (int j = 0; j < BATCH; j++) {
            if (offsets[j] < 0) continue;
            Pack out;
            #pragma unroll
            for (int i = 0; i < WIDTH; i++) {
                acc_t v = bn_affine(normalise(to_acc(in[j].v[i])), w, b);
                out.v[i] = from_acc<scalar_t>(with_tanh ? tanh_of(v) : v);
            }
            *(Pack*)(y + offsets[j]) = out;
        }
    }
}

// Gradient at batch norm's output.
__device__ inline acc_t gradient_of(acc_t dy, scalar_t y, bool with_tanh) {
    return with_tanh ? dy * tanh_slope(to_acc(y)) : dy;
}

struct Sums { acc_t sum, dot; };  // of g, and of g xhat

__device__ inline Sums sums_of_chunk(
    const scalar_t* __restrict__ dy, const scalar_t* __restrict__ x, const scalar_t* __restrict__ y,
    const acc_t* __restrict__ mean, const acc_t* __restrict__ invstd, acc_t unit, i64 channels, i64 plane, i64 count,
    acc_t* scratch) {
    ChannelWalk walk(channels, plane, count);
    Normaliser normalise(mean[walk.channel], invstd[walk.channel]);
    acc_t sum = 0, dot = 0;
    #pragma unroll 1
    for (int first = 0; first < PACKS; first += BATCH / 2) {
        Pack gradient[BATCH / 2], in[BATCH / 2], out[BATCH / 2];
        bool inside[BATCH / 2];
        #pragma unroll
        for (int j = 0; j < BATCH / 2; j++) {
            inside[j] = walk.inside(first + j);
            if (inside[j]) {
                gradient[j] = *(const Pack*)(dy + walk.offset);
                in[j] = *(const Pack*)(x + walk.offset);
                if (y) out[j] = *(const Pack*)(y + walk.offset);
            }
            walk.advance();
        }
        #pragma unroll
        for (int j = 0; j < BATCH / 2; j++) {
            if (!inside[j]) continue;
            #pragma unroll
            for (int i = 0; i < WIDTH; i++) {
                acc_t g = gradient_of(to_acc(gradient[j].v[i]) * unit, out[j].v[i], y);
                sum += g;
                dot += g * normalise(to_acc(in[j].v[i]));
            }
        }
    }
    sum = block_sum(sum, scratch);
    return {sum, block_sum(dot, scratch)};
}

// partials: sums of each chunk. y is null without tanh.
extern "C" __global__ void __launch_bounds__(THREADS, 3) batch_norm_backward_partials(
    const scalar_t* __restrict__ dy, const scalar_t* __restrict__ x, const scalar_t* __restrict__ y,
    const acc_t* __restrict__ mean, const acc_t* __restrict__ invstd, double* __restrict__ partials, i64 channels,
    i64 plane, i64 count, i64 chunks) {
    __shared__ acc_t scratch[32];
    acc_t unit = 1;
    Sums sums;
    do sums = sums_of_chunk(dy, x, y, mean, invstd, unit, channels, plane, count, scratch);
    while (again(sums.sum, sums.dot, unit));
    double back = inverse_of(unit);
    store_partials(partials, channels, chunks, sums.sum * back, sums.dot * back);
}

// One block a channel: sums [2][channels] over the chunks, which are also the gradients of bias and weight, where not
// null.
extern "C" __global__ void __launch_bounds__(THREADS) batch_norm_backward_sums(
    const double* __restrict__ partials, double* __restrict__ sums, param_t* __restrict__ dweight,
    param_t* __restrict__ dbias, i64 channels, i64 chunks) {
    __shared__ acc_t scratch[32];
    i64 channel = blockIdx.x;
    acc_t unit = 1, sum, dot;
    do {
        double wide = unit;
        sum = dot = 0;
        for (i64 k = threadIdx.x; k < chunks; k += blockDim.x) {
            sum += (acc_t)(partials[channel * chunks + k] * wide);
            dot += (acc_t)(partials[(channels + channel) * chunks + k] * wide);
        }
        sum = block_sum(sum, scratch);
        dot = block_sum(dot, scratch);
    } while (again(sum, dot, unit));
    if (threadIdx.x) return;
    double back = inverse_of(unit);
    sums[channel] = sum * back;
    sums[channels + channel] = dot * back;
    if (dbias) dbias[channel] = from_acc<param_t>((acc_t)(sum * back));
    if (dweight) dweight[channel] = from_acc<param_t>((acc_t)(dot * back));
}

// sum / count: the sum may be beyond float, the quotient is not.
__device__ inline acc_t mean_of(double sum, i64 count) {
    acc_t mean = (acc_t)sum / count;
    return is_finite(mean) ? mean : (acc_t)(sum * 0x1p-96) / count * 0x1p96f;
}

// sums: of the batch where its own statistics were applied, null where given ones were: then x is not read.
extern "C" __global__ void __launch_bounds__(THREADS) batch_norm_backward_apply(
    const scalar_t* __restrict__ dy, const scalar_t* __restrict__ x, const scalar_t* __restrict__ y,
    const acc_t* __restrict__ mean, const acc_t* __restrict__ invstd, const param_t* __restrict__ weight,
    const double* __restrict__ sums, scalar_t* __restrict__ dx, i64 channels, i64 plane, i64 count) {
    ChannelWalk walk(channels, plane, count);
    i64 channel = walk.channel;
    Normaliser normalise(mean[channel], invstd[channel]);
    acc_t scale = multiply_unflushed(bn_weight(weight, channel), invstd[channel]);
    acc_t mean_g = sums ? mean_of(sums[channel], count) : (acc_t)0,
          mean_dot = sums ? mean_of(sums[channels + channel], count) : (acc_t)0;
    #pragma unroll 1
    for (int first = 0; first < PACKS; first += BATCH / 2) {
        Pack gradient[BATCH / 2], in[BATCH / 2], out[BATCH / 2];
        i64 offsets[BATCH / 2];
        #pragma unroll
        for (int j = 0; j < BATCH / 2; j++) {
            offsets[j] = walk.inside(first + j) ? walk.offset : -1;
            if (offsets[j] >= 0) {
                gradient[j] = *(const Pack*)(dy + offsets[j]);
                if (sums) in[j] = *(const Pack*)(x + offsets[j]);
                if (y) out[j] = *(const Pack*)(y + offsets[j]);
            }
            walk.advance();
        }
        #pragma unroll
        for (int j = 0; j < BATCH / 2; j++) {
            if (offsets[j] < 0) continue;
            Pack result;
            #pragma unroll
            for (int i = 0; i < WIDTH; i++) {
                acc_t g = gradient_of(to_acc(gradient[j].v[i]), out[j].v[i], y);
                if (sums) g -= mean_g + normalise(to_acc(in[j].v[i])) * mean_dot;
                result.v[i] = from_acc<scalar_t>(multiply_unflushed(g, scale));
            }
            *(Pack*)(dx + offsets[j]) = result;
        }
    }
}
