// sums[c] = sum over n and s of x[n, c, s]: the bias gradient of a convolution.
//
// Thread mapping: channel_walk.cuh. channel_sum_partials: each block adds a chunk, and writes to partial
// [channels][chunks], double; channel_sum_combine: one block a channel adds the chunks. Macros: those of
// channel_walk.cuh, THREADS.
#include "channel_values.cuh"

extern "C" __global__ void __launch_bounds__(THREADS) channel_sum_partials(
    const scalar_t* __restrict__ x, double* __restrict__ partial, i64 channels, i64 plane, i64 count, i64 chunk,
    i64 chunks, int tile) {
    wait_for_earlier_kernels();
    DYNAMIC_SHARED(acc_t, shared);
    Kept kept(shared, tile);
    Walk walk(blockIdx.x, channels, plane, count, chunk, tile);
    acc_t sums[1][SLOTS] = {};
    #pragma unroll 1
    while (walk.packs > 0) {
        Pack in[BATCH];
        int have = next_packs(walk, BATCH, [&](int b, i64 offset) { in[b] = *(const Pack*)(x + offset); });
        acc_t batch[SLOTS] = {};  // first by itself: short sums have small errors
        #pragma unroll
        for (int b = 0; b < BATCH; b++) {
            if (b >= have) continue;
            #pragma unroll
            for (int i = 0; i < WIDTH; i++) batch[i / PER_SLOT] += to_acc(in[b].v[i]);
        }
        #pragma unroll
        for (int s = 0; s < SLOTS; s++) sums[0][s] += batch[s];
    }
    auto store = [&](int, int, int channel, acc_t(&total)[1]) { partial[channel * chunks + walk.chunk] = total[0]; };
    sums_of_channels(sums, walk, kept.scratch(), [](int, acc_t(&)[1]) {}, store);
}

extern "C" __global__ void __launch_bounds__(THREADS)
    channel_sum_combine(const double* __restrict__ partial, scalar_t* __restrict__ sums, i64 channels, i64 chunks) {
    wait_for_earlier_kernels();
    __shared__ double scratch[32];
    double sum = 0;
    for (i64 k = threadIdx.x; k < chunks; k += blockDim.x) sum += partial[blockIdx.x * chunks + k];
    sum = block_sum(sum, scratch);
    if (threadIdx.x == 0) sums[blockIdx.x] = from_acc<scalar_t>((acc_t)sum);
}
