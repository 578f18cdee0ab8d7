// Weight gradient of the transposed convolution, an implicit GEMM on ordinary FMA units, for any hyper-parameters.
//
//     dw[ic, oc, kh, kw] = sum_{n, ih, iw} x[n, ic, ih, iw] * dy[n, oc, ih s - p + kh d, iw s - p + kw d]
//
// wgrad_partial: rows are ic, columns oc, the sum runs over the pixels of x, for one tap. It is split over blocks
// (split-K): each writes its own partial sums [split][group][tap][ic][oc] in acc_t. wgrad_reduce adds the splits in
// ascending order, so the result depends on shapes alone. Grid of wgrad_partial: x = taps times channel tiles, y =
// splits, z = groups. Macros: scalar_t, acc_t, those of simt_gemm.cuh. Pixels of the batch and offsets inside one image
// are 32-bit (the host checks).
#include "common.cuh"
#include "simt_gemm.cuh"

extern "C" __global__ void __launch_bounds__(THREADS, MIN_BLOCKS) wgrad_partial(
    const scalar_t* __restrict__ x, const scalar_t* __restrict__ dy, acc_t* __restrict__ partial, int images,
    int groups, int in_channels, int out_channels,  // per group
    int in_h, int in_w, int out_h, int out_w, int kernel_h, int kernel_w, int stride_h, int stride_w, int pad_h,
    int pad_w, int dilation_h, int dilation_w, int split_pixels) {
    wait_for_earlier_kernels();
    __shared__ Tiles tiles;
    int tiles_n = (out_channels + TILE_N - 1) / TILE_N, tiles_m = (in_channels + TILE_M - 1) / TILE_M;
    int tap = blockIdx.x / (tiles_m * tiles_n), tile = blockIdx.x % (tiles_m * tiles_n);
    int m_start = tile / tiles_n * TILE_M, n_start = tile % tiles_n * TILE_N, group = blockIdx.z;
    int in_pixels = in_h * in_w, out_pixels = out_h * out_w;
    int shift_h = tap / kernel_w * dilation_h - pad_h, shift_w = tap % kernel_w * dilation_w - pad_w;

    // This thread loads pixel threadIdx.x % TILE_K of every step, for several channels.
    int pixel = blockIdx.y * split_pixels + threadIdx.x % TILE_K;
    int steps_end = min((i64)(blockIdx.y + 1) * split_pixels, (i64)images * in_pixels);
    int image = pixel / in_pixels, h = pixel % in_pixels / in_w, w = pixel % in_pixels % in_w;

    Accumulators acc = {};
    int start = blockIdx.y * split_pixels;
    sum_steps<true>(acc, tiles, [&](acc_t(&next_a)[LOADS_M], acc_t(&next_b)[LOADS_N]) {
        if (start >= steps_end) return false;
        int oh = h * stride_h + shift_h, ow = w * stride_w + shift_w;
        bool inside = pixel < steps_end && oh >= 0 && oh < out_h && ow >= 0 && ow < out_w;
        i64 place = (i64)image * groups + group;
        const scalar_t* a = x + place * in_channels * in_pixels + h * in_w + w;
        const scalar_t* b = dy + place * out_channels * out_pixels + oh * out_w + ow;
        #pragma unroll
        for (int i = 0; i < LOADS_M; i++) {
            int m = m_start + (threadIdx.x + i * THREADS) / TILE_K;
            next_a[i] = inside && m < in_channels ? to_acc(a[m * in_pixels]) : 0;
        }
        #pragma unroll
        for (int i = 0; i < LOADS_N; i++) {
            int n = n_start + (threadIdx.x + i * THREADS) / TILE_K;
            next_b[i] = inside && n < out_channels ? to_acc(b[n * out_pixels]) : 0;
        }
        start += TILE_K, pixel += TILE_K;
        for (w += TILE_K; w >= in_w; w -= in_w) h++;
        for (; h >= in_h; h -= in_h) image++;
        return true;
    });

    int thread_m = threadIdx.x / THREADS_N, thread_n = threadIdx.x % THREADS_N;
    i64 matrix = ((i64)blockIdx.y * groups + group) * kernel_h * kernel_w + tap;
    acc_t* to = partial + matrix * in_channels * out_channels;
    #pragma unroll
    for (int i = 0; i < PER_THREAD; i++) {
        int m = m_start + tile_row(thread_m, i);
        #pragma unroll
        for (int j = 0; j < PER_THREAD; j++) {
            int n = n_start + tile_column(thread_n, j);
            if (m < in_channels && n < out_channels) to[(i64)m * out_channels + n] = acc[i][j];
        }
    }
}

extern "C" __global__ void wgrad_reduce(
    const acc_t* __restrict__ partial, scalar_t* __restrict__ dw, int groups, int taps, int in_channels,
    int out_channels, int splits) {
    wait_for_earlier_kernels();
    i64 size = (i64)groups * taps * in_channels * out_channels;
    i64 i = (i64)blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= size) return;
    acc_t sum = 0;
    for (int s = 0; s < splits; s++) sum += partial[s * size + i];
    int oc = i % out_channels, ic = i / out_channels % in_channels;
    i64 block = i / ((i64)in_channels * out_channels);
    int tap = block % taps, group = block / taps;
    dw[(((i64)group * in_channels + ic) * out_channels + oc) * taps + tap] = from_acc<scalar_t>(sum);
}
