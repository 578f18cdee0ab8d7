// sums[c] = sum over n and s of x[n, c, s]: the bias gradient of a convolution.
//
// channel_sum_partial: block (c, chunk) adds a chunk of the images, in acc_t; channel_sum_reduce: one thread per
// channel adds the chunks in ascending order. Macros: scalar_t, acc_t.
#include "common.cuh"

extern "C" __global__ void channel_sum_partial(
    const scalar_t* __restrict__ x, acc_t* __restrict__ partial, i64 images, int channels, i64 plane,
    i64 chunk_images) {
    __shared__ acc_t scratch[32];
    acc_t sum = 0;
    i64 first = blockIdx.y * chunk_images, last = min(first + chunk_images, images);
    for (i64 n = first; n < last; n++) {
        const scalar_t* row = x + (n * channels + blockIdx.x) * plane;
        for (i64 i = threadIdx.x; i < plane; i += blockDim.x) sum += to_acc(row[i]);
    }
    sum = block_sum(sum, scratch);
    if (threadIdx.x == 0) partial[(i64)blockIdx.x * gridDim.y + blockIdx.y] = sum;
}

extern "C" __global__ void channel_sum_reduce(
    const acc_t* __restrict__ partial, scalar_t* __restrict__ sums, int channels, int chunks) {
    int c = blockIdx.x * blockDim.x + threadIdx.x;
    if (c >= channels) return;
    acc_t sum = 0;
    for (int i = 0; i < chunks; i++) sum += partial[(i64)c * chunks + i];
    sums[c] = from_acc<scalar_t>(sum);
}
