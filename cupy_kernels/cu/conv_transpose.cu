// Transposed convolution and its input gradient as one implicit GEMM on ordinary FMA units, for any hyper-parameters.
//
//     forward  y [n, oc, oh, ow] = bias[oc] + sum_{ic, kh, kw} x [n, ic, ih, iw] * w[ic, oc, kh, kw]
//     dgrad    dx[n, ic, ih, iw] =            sum_{oc, kh, kw} dy[n, oc, oh, ow] * w[ic, oc, kh, kw]
//     with oh = ih s - p + kh d, and ow likewise
//
// Both gather: out[m, pixel] = sum over taps and k of a[tap, k, m] * in[k, pixel's source for this tap]. Rows m are the
// output's channels of one group, columns are pixels, the sum runs over the input's channels, tap by tap. In the
// forward with stride s only every s-th tap meets a given pixel; pixels are ordered by their phase (oh mod s, ow mod
// s), so that a block has one phase and skips the other taps whole.
//
// pack_weight writes w as [group][tap][k][m] in acc_t, so that blocks read it coalesced. Grid of conv_gather: x =
// phases times pixel tiles, y = channel tiles, z = groups. Macros: scalar_t, acc_t, DGRAD (0, 1), those of
// simt_gemm.cuh. Pixels of the batch and offsets inside one image are 32-bit (the host checks), all other offsets
// 64-bit.
#include "common.cuh"
#include "simt_gemm.cuh"

extern "C" __global__ void pack_weight(
    const scalar_t* __restrict__ w, acc_t* __restrict__ packed, int groups, int in_channels, int out_channels,
    int taps) {
    wait_for_earlier_kernels();
    // in_channels, out_channels: of the convolution, per group
    i64 size = (i64)groups * taps * in_channels * out_channels;
    i64 i = (i64)blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= size) return;
    int ic = DGRAD ? i % in_channels : i / out_channels % in_channels,
        oc = DGRAD ? i / in_channels % out_channels : i % out_channels;
    i64 block = i / ((i64)in_channels * out_channels);
    int tap = block % taps, group = block / taps;
    packed[i] = to_acc(w[(((i64)group * in_channels + ic) * out_channels + oc) * taps + tap]);
}

struct Window {  // one spatial dimension
    int phase, pad, dilation, stride;

    // Whether tap k meets pixels of this phase.
    __device__ bool meets(int k) const { return DGRAD || (phase + pad - k * dilation) % stride == 0; }
    // Source of pixel r (counted within its phase) for tap k.
    __device__ int source(int r, int k) const {
        return DGRAD ? r * stride - pad + k * dilation : r + (phase + pad - k * dilation) / stride;
    }
};

extern "C" __global__ void __launch_bounds__(THREADS, MIN_BLOCKS) conv_gather(
    const scalar_t* __restrict__ in, const acc_t* __restrict__ packed, const scalar_t* __restrict__ bias,
    scalar_t* __restrict__ out, int images, int groups, int channels_in, int channels_out, int in_h, int in_w,
    int out_h, int out_w, int kernel_h, int kernel_w, int stride_h, int stride_w, int pad_h, int pad_w, int dilation_h,
    int dilation_w, int tiles_per_phase) {
    wait_for_earlier_kernels();
    __shared__ Tiles tiles;
    int phase = blockIdx.x / tiles_per_phase, group = blockIdx.z;
    int steps_w = DGRAD ? 1 : stride_w, steps_h = DGRAD ? 1 : stride_h;  // pixels of a phase are this far apart
    Window rows = {phase / steps_w, pad_h, dilation_h, stride_h},
           columns = {phase % steps_w, pad_w, dilation_w, stride_w};
    int phase_h = max(0, (out_h - rows.phase + steps_h - 1) / steps_h),
        phase_w = max(0, (out_w - columns.phase + steps_w - 1) / steps_w);
    int phase_pixels = phase_h * phase_w, in_pixels = in_h * in_w;
    int pixels = images * phase_pixels, tile_start = blockIdx.x % tiles_per_phase * TILE_N;
    if (tile_start >= pixels) return;
    int m_start = blockIdx.y * TILE_M;

    // The pixel whose inputs this thread loads.
    int load_pixel = tile_start + threadIdx.x % TILE_N;
    bool in_range = load_pixel < pixels;
    int image = in_range ? load_pixel / phase_pixels : 0, within = load_pixel % phase_pixels;
    int r = within / phase_w, c = within % phase_w;
    const scalar_t* source = in + ((i64)image * groups + group) * channels_in * in_pixels;
    const acc_t* weights = packed + (i64)group * kernel_h * kernel_w * channels_in * channels_out;

    Accumulators acc = {};
    int kh = 0, kw = -1, k = channels_in, offset = 0;  // "the end of the tap before the first"
    bool inside = false;
    sum_steps<false>(acc, tiles, [&](acc_t(&next_a)[LOADS_M], acc_t(&next_b)[LOADS_N]) {
        if (k >= channels_in) {  // next tap that meets this phase
            do {
                if (++kw == kernel_w) kw = 0, kh++;
            } while (kh < kernel_h && !(rows.meets(kh) && columns.meets(kw)));
            if (kh >= kernel_h) return false;
            k = 0;
            int h = rows.source(r, kh), w = columns.source(c, kw);
            inside = in_range && h >= 0 && h < in_h && w >= 0 && w < in_w;
            offset = h * in_w + w;
        }
        const acc_t* a = weights + ((i64)(kh * kernel_w + kw) * channels_in + k) * channels_out;
        #pragma unroll
        for (int i = 0; i < LOADS_M; i++) {
            int index = threadIdx.x + i * THREADS, row = index / TILE_M, m = m_start + index % TILE_M;
            next_a[i] = k + row < channels_in && m < channels_out ? a[row * channels_out + m] : 0;
        }
        #pragma unroll
        for (int i = 0; i < LOADS_N; i++) {
            int row = k + (threadIdx.x + i * THREADS) / TILE_N;
            next_b[i] = inside && row < channels_in ? to_acc(source[row * in_pixels + offset]) : 0;
        }
        k += TILE_K;
        return true;
    });

    int thread_m = threadIdx.x / THREADS_N, thread_n = threadIdx.x % THREADS_N;
    #pragma unroll
    for (int j = 0; j < PER_THREAD; j++) {
        int pixel = tile_start + tile_column(thread_n, j);
        if (pixel >= pixels) continue;
        int n = pixel / phase_pixels, position = pixel % phase_pixels;
        int h = position / phase_w * steps_h + rows.phase, w = position % phase_w * steps_w + columns.phase;
        scalar_t* to = out + ((i64)n * groups + group) * channels_out * out_h * out_w + h * out_w + w;
        #pragma unroll
        for (int i = 0; i < PER_THREAD; i++) {
            int m = m_start + tile_row(thread_m, i);
            if (m >= channels_out) continue;
            acc_t value = acc[i][j];
            if (bias) value += to_acc(bias[group * channels_out + m]);
            to[(i64)m * out_h * out_w] = from_acc<scalar_t>(value);
        }
    }
}
