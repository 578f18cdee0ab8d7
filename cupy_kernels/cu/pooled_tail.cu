// What follows conv_bn_pool: statistics of batch norm, then batch norm, tanh and group norm over the pooled sums, and the gradients.
//
//     z = (pooled - mean) invstd weight + bias,  p = tanh(z),  out = (p - group_mean) group_invstd group_weight + group_bias
//
// `pooled`, `mean` and all sums are without the convolution's bias. conv_bn_statistics: one block a channel. pooled_forward and
// pooled_backward: one block a group of one image, whose values stay in shared memory; a warp takes whole channels. Partial sums
// [2][channels][images] are added up over the images by batch_norm_backward_sums (batch_norm.cu). sums_gradient: one thread a 2x2
// window. Saved for the backward: pooled, taps, saved sums (conv_bn_pool.cu), mean, invstd, group_mean, group_invstd.
//
// Macros: scalar_t, acc_t (float), param_t (all weights and biases, running statistics), saved_t (half_t, float).
#include "batch_norm.cuh"
#include "fp16_scale.cuh"
#include "tanh.cuh"

// partials [3][channels][units]: count, mean and sum of squared distances of each unit. With training 0 the running statistics
// stand for the batch's, else they are updated where not null.
extern "C" __global__ void __launch_bounds__(256) conv_bn_statistics(
    const float* __restrict__ partials, const param_t* __restrict__ conv_bias, INOUT param_t* running_mean, INOUT param_t* running_var,
    float* __restrict__ mean, float* __restrict__ invstd, float momentum, float eps, int channels, i64 units, int training) {
    __shared__ float scratch[32];
    int c = blockIdx.x;
    float shift = bn_bias(conv_bias, c);
    if (!training) {
        if (threadIdx.x == 0) {
            mean[c] = to_acc(running_mean[c]) - shift;
            invstd[c] = 1 / sqrt(to_acc(running_var[c]) + eps);
        }
        return;
    }
    const float *counts = partials + c * units, *means = counts + channels * units, *squares = means + channels * units;
    float origin = means[0] - means[0] == 0 ? means[0] : 0;  // rounding errors of a large mean must not enter the variance
    float count = 0, sum = 0, m2 = 0;
    for (i64 i = threadIdx.x; i < units; i += blockDim.x) count += counts[i], sum += counts[i] * (means[i] - origin);
    count = block_sum(count, scratch);
    float total = block_sum(sum, scratch) / count;
    for (i64 i = threadIdx.x; i < units; i += blockDim.x) {
        float distance = means[i] - origin - total;
        m2 += squares[i] + counts[i] * distance * distance;
    }
    m2 = block_sum(m2, scratch);
    if (threadIdx.x) return;
    total += origin;
    mean[c] = total;
    invstd[c] = 1 / sqrt(m2 / count + eps);
    if (running_mean) {
        running_mean[c] = from_acc<param_t>((1 - momentum) * to_acc(running_mean[c]) + momentum * (total + shift));
        running_var[c] = from_acc<param_t>((1 - momentum) * to_acc(running_var[c]) + momentum * (m2 / (count - 1)));
    }
}

__device__ inline float warp_sum(float v) {
    for (int lanes = 16; lanes > 0; lanes >>= 1) v += __shfl_xor_sync(0xFFFFFFFFu, v, lanes);
    return v;
}

// Batch norm of one channel.
struct Norm {
    float mean, invstd, weight, bias;
    __device__ Norm(const float* means, const float* invstds, const param_t* weights, const param_t* biases, int c)
        : mean(means[c]), invstd(invstds[c]), weight(bn_weight(weights, c)), bias(bn_bias(biases, c)) {}
    __device__ float normalise(float v) const { return bn_normalise(v, mean, invstd); }
    __device__ float tanh(float v) const { return tanh_of(bn_affine(normalise(v), weight, bias)); }
};

extern "C" __global__ void __launch_bounds__(256) pooled_forward(
    const float* __restrict__ pooled, const float* __restrict__ mean, const float* __restrict__ invstd, const param_t* __restrict__ weight,
    const param_t* __restrict__ bias, const param_t* __restrict__ group_weight, const param_t* __restrict__ group_bias,
    scalar_t* __restrict__ out, float* __restrict__ group_mean, float* __restrict__ group_invstd, int channels, int groups, int plane,
    float eps) {
    DYNAMIC_SHARED(float, values);
    __shared__ float scratch[32];
    int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
    int members = channels / groups, first = blockIdx.x % groups * members, size = members * plane;
    const float* source = pooled + (i64)blockIdx.x * size;
    float sum = 0, squares = 0;
    for (int c = warp; c < members; c += warps) {
        Norm norm(mean, invstd, weight, bias, first + c);
        #pragma unroll 4
        for (int i = lane; i < plane; i += 32) sum += values[c * plane + i] = norm.tanh(source[c * plane + i]);
    }
    float m = block_sum(sum, scratch) / size;
    for (int i = threadIdx.x; i < size; i += blockDim.x) squares += (values[i] - m) * (values[i] - m);
    float s = 1 / sqrt(block_sum(squares, scratch) / size + eps);
    if (threadIdx.x == 0) group_mean[blockIdx.x] = m, group_invstd[blockIdx.x] = s;
    for (int c = warp; c < members; c += warps) {
        float w = bn_weight(group_weight, first + c), b = bn_bias(group_bias, first + c);
        scalar_t* to = out + (i64)blockIdx.x * size + c * plane;
        for (int i = lane; i < plane; i += 32) to[i] = from_acc<scalar_t>(bn_affine(bn_normalise(values[c * plane + i], m, s), w, b));
    }
}

// g = gradient at batch norm's output, of the pooled values. Partial sums over each image: of batch norm's g and g xhat, and of group
// norm's dout and dout phat, where xhat and phat are the normalised inputs.
extern "C" __global__ void __launch_bounds__(256) pooled_backward(
    const scalar_t* __restrict__ dout, const float* __restrict__ pooled, const float* __restrict__ mean, const float* __restrict__ invstd,
    const param_t* __restrict__ weight, const param_t* __restrict__ bias, const param_t* __restrict__ group_weight,
    const float* __restrict__ group_mean, const float* __restrict__ group_invstd, float* __restrict__ g, float* __restrict__ batch_partials,
    float* __restrict__ group_partials, int channels, int groups, int plane, i64 images) {
    DYNAMIC_SHARED(float, values);
    __shared__ float scratch[32];
    int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
    int members = channels / groups, first = blockIdx.x % groups * members, size = members * plane;
    i64 image = blockIdx.x / groups, start = (i64)blockIdx.x * size, part = channels * images;
    float m = group_mean[blockIdx.x], s = group_invstd[blockIdx.x], sum = 0, dot = 0;
    float* gradients = values + size;
    for (int c = warp; c < members; c += warps) {
        Norm norm(mean, invstd, weight, bias, first + c);
        float channel_sum = 0, channel_dot = 0, w = bn_weight(group_weight, first + c);
        #pragma unroll 4
        for (int i = lane; i < plane; i += 32) {
            float p = norm.tanh(pooled[start + c * plane + i]), d = to_acc(dout[start + c * plane + i]);
            values[c * plane + i] = p;
            gradients[c * plane + i] = d;
            channel_sum += d;
            channel_dot += d * bn_normalise(p, m, s);
        }
        channel_sum = warp_sum(channel_sum);
        channel_dot = warp_sum(channel_dot);
        if (lane) continue;
        group_partials[(first + c) * images + image] = channel_sum;
        group_partials[part + (first + c) * images + image] = channel_dot;
        sum += w * channel_sum;
        dot += w * channel_dot;
    }
    float mean_d = block_sum(sum, scratch) / size, mean_dot = block_sum(dot, scratch) / size;
    for (int c = warp; c < members; c += warps) {
        Norm norm(mean, invstd, weight, bias, first + c);
        float channel_sum = 0, channel_dot = 0, w = bn_weight(group_weight, first + c);
        #pragma unroll 4
        for (int i = lane; i < plane; i += 32) {
            float p = values[c * plane + i];
            float v = s * (w * gradients[c * plane + i] - (mean_d + bn_normalise(p, m, s) * mean_dot)) * tanh_slope(p);
            g[start + c * plane + i] = v;
            channel_sum += v;
            channel_dot += v * norm.normalise(pooled[start + c * plane + i]);
        }
        channel_sum = warp_sum(channel_sum);
        channel_dot = warp_sum(channel_dot);
        if (lane) continue;
        batch_partials[(first + c) * images + image] = channel_sum;
        batch_partials[part + (first + c) * images + image] = channel_dot;
    }
}

// dy = gradient of the convolution's output: weight invstd (g at the chosen corner - mean_g - xhat mean_dot), with mean_g and mean_dot the
// means of g and g xhat over all pixels (`sums` over `count`; null where the statistics do not depend on the sums).
extern "C" __global__ void __launch_bounds__(256) sums_gradient(
    const float* __restrict__ g, const u8* __restrict__ taps, const saved_t* __restrict__ saved, const int* __restrict__ exponents,
    const int* __restrict__ unit_exponents, const float* __restrict__ mean, const float* __restrict__ invstd,
    const param_t* __restrict__ weight, const float* __restrict__ sums, scalar_t* __restrict__ dy, i64 images, int channels, int height,
    int width, int unit_windows, int shift, float count) {
    int windows_w = (width + 1) / 2, windows = (height + 1) / 2 * windows_w, units = (windows + unit_windows - 1) / unit_windows;
    int window = blockIdx.y * blockDim.x + threadIdx.x, c = blockIdx.x % channels;
    i64 image = blockIdx.x / channels;
    if (window >= windows) return;
    int row = window / windows_w, column = window % windows_w, pooled_w = width / 2;
    float scale = bn_weight(weight, c) * invstd[c], mean_g = sums ? sums[c] / count : 0, mean_dot = sums ? sums[channels + c] / count : 0;
    float chosen = 0;
    int tap = -1;
    if (row < height / 2 && column < pooled_w) {
        i64 at = ((i64)blockIdx.x * (height / 2) + row) * pooled_w + column;
        chosen = g[at];
        tap = taps[at];
    }
    ScaleBack restore(sizeof(saved_t) == 4 ? 0 : exponents[c] + unit_exponents[image * units + window / unit_windows] - shift);
    Packed<saved_t, 4> kept = *(const Packed<saved_t, 4>*)(saved + ((i64)blockIdx.x * windows + window) * 4);
    #pragma unroll
    for (int corner = 0; corner < 4; corner++) {
        int h = row * 2 + corner / 2, w = column * 2 + corner % 2;
        if (h >= height || w >= width) continue;
        float xhat = bn_normalise(restore(to_acc(kept.v[corner])), mean[c], invstd[c]);
        float v = (corner == tap ? chosen : 0) - (sums ? mean_g + xhat * mean_dot : 0);
        dy[((i64)blockIdx.x * height + h) * width + w] = from_acc<scalar_t>(v * scale);
    }
}
