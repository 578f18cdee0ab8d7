// Depthwise transposed convolution and its gradients: as many groups as channels. Bound by memory, on ordinary FMA
// units.
//
//     forward  y [n, c, oh, ow] = bias[c] + sum_{kh, kw} x [n, c, ih, iw] * w[c, kh, kw],  oh = ih s - p + kh d
//     dgrad    dx[n, c, ih, iw] =           sum_{kh, kw} dy[n, c, oh, ow] * w[c, kh, kw]
//     wgrad    dw[c, kh, kw]    =           sum_{n, ih, iw} x[n, c, ih, iw] * dy[n, c, oh, ow]
//
// depthwise_gather, forward and dgrad (conv_axis.cuh): a thread has WIDTH channels of a pixel with CHANNELS_LAST, else
// one, of neighbouring pixels' threads. Grid: x = `blocks` of an image, times images. depthwise_wgrad: a block has
// CHANNELS channels, TAPS taps, and a share of the images and rows; 256 / CHANNELS threads have a channel. It writes
// partial [split][channel][tap]; depthwise_wgrad_reduce adds the splits in ascending order. Grid: x = channel blocks, y
// = tap blocks, z = splits. Macros: scalar_t, acc_t, CHANNELS_LAST, WIDTH (1 without CHANNELS_LAST).
#include "common.cuh"
#include "conv_axis.cuh"

#define MOST_PHASES 64  // of an axis
#define TAPS 16
#define CHANNELS (CHANNELS_LAST ? 32 : 1)
typedef Packed<scalar_t, WIDTH> Pack;

extern "C" __global__ void __launch_bounds__(256) depthwise_gather(
    const scalar_t* __restrict__ in, const scalar_t* __restrict__ w, const scalar_t* __restrict__ bias,
    scalar_t* __restrict__ out, int channels, int in_h, int in_w, int out_h, int out_w, int taps_h, int taps_w,
    int phases_h, int phases_w, int offset_h, int offset_w, int step_h, int step_w, int in_step_h, int in_step_w,
    int blocks) {
    wait_for_earlier_kernels();
    __shared__ int axes[2][MOST_PHASES][3];  // first, count, shift
    if (threadIdx.x < 2 * MOST_PHASES) {
        bool columns = threadIdx.x / MOST_PHASES;
        int phase = threadIdx.x % MOST_PHASES, phases = columns ? phases_w : phases_h;
        if (phase < phases) {
            Axis axis(
                phase, phases, columns ? taps_w : taps_h, columns ? offset_w : offset_h, columns ? step_w : step_h);
            int* to = axes[columns][phase];
            to[0] = axis.first, to[1] = axis.count, to[2] = axis.shift;
        }
    }
    Axis rows(0, phases_h, taps_h, offset_h, step_h),
        columns(0, phases_w, taps_w, offset_w, step_w);  // what all phases share
    __syncthreads();
    int all = channels / WIDTH * out_h * out_w, i = blockIdx.x % blocks * 256 + threadIdx.x;
    if (i >= all) return;
    i64 image = blockIdx.x / blocks;
    Divisor by_width(out_w), by_height(out_h), by_channels(channels / WIDTH), by_phases_h(phases_h),
        by_phases_w(phases_w);
    unsigned channel, oh, ow, phase_h, phase_w;
#if CHANNELS_LAST
    unsigned pixel = by_channels.divide(i, channel);
    by_height.divide(by_width.divide(pixel, ow), oh);
    channel *= WIDTH;
    in += image * in_h * in_w * channels + channel;
    const int in_stride = channels;
#else
    channel = by_height.divide(by_width.divide(i, ow), oh);
    in += (image * channels + channel) * in_h * in_w;
    const int in_stride = 1;
#endif
    int row = by_phases_h.divide(oh, phase_h) * in_step_h, column = by_phases_w.divide(ow, phase_w) * in_step_w;
    const int *axis_h = axes[0][phase_h], *axis_w = axes[1][phase_w];
    int ih = row + axis_h[2], first_iw = column + axis_w[2];
    const scalar_t* weights = w + channel * taps_h * taps_w + axis_h[0] * taps_w + axis_w[0];
    acc_t sums[WIDTH];
    #pragma unroll
    for (int v = 0; v < WIDTH; v++) sums[v] = bias ? to_acc(bias[channel + v]) : 0;
    for (int a = 0; a < axis_h[1]; a++, ih += rows.shift_step) {
        if (ih < 0 || ih >= in_h) continue;
        int iw = first_iw;
        for (int b = 0; b < axis_w[1]; b++, iw += columns.shift_step) {
            if (iw < 0 || iw >= in_w) continue;
            const scalar_t* weight = weights + a * rows.every * taps_w + b * columns.every;
            Pack values = *(const Pack*)(in + (i64)(ih * in_w + iw) * in_stride);
            #pragma unroll
            for (int v = 0; v < WIDTH; v++) sums[v] += to_acc(values.v[v]) * to_acc(weight[v * taps_h * taps_w]);
        }
    }
    Pack results;
    #pragma unroll
    for (int v = 0; v < WIDTH; v++) results.v[v] = from_acc<scalar_t>(sums[v]);
    ((Pack*)(out + image * channels * out_h * out_w))[i] = results;
}

extern "C" __global__ void __launch_bounds__(256) depthwise_wgrad(
    const scalar_t* __restrict__ x, const scalar_t* __restrict__ dy, acc_t* __restrict__ partial, int images,
    int channels, int in_h, int in_w, int out_h, int out_w, int taps_h, int taps_w, int stride_h, int stride_w,
    int pad_h, int pad_w, int dilation_h, int dilation_w, int split_pixels) {
    wait_for_earlier_kernels();
    __shared__ acc_t scratch[256];
    int channel = blockIdx.x * CHANNELS + threadIdx.x % CHANNELS, first_tap = blockIdx.y * TAPS, taps = taps_h * taps_w;
    i64 pixels = (i64)images * in_h * in_w, first = (i64)blockIdx.z * split_pixels,
        end = min(first + split_pixels, pixels);
    acc_t sums[TAPS] = {};
    if (channel < channels)
        for (i64 at = first + threadIdx.x / CHANNELS; at < end; at += 256 / CHANNELS) {
            int image = at / (in_h * in_w), within = at % (in_h * in_w), ih = within / in_w, iw = within % in_w;
#if CHANNELS_LAST
            acc_t value = to_acc(x[at * channels + channel]);
            const scalar_t* from = dy + (i64)image * out_h * out_w * channels + channel;
            const int stride = channels;
#else
            acc_t value = to_acc(x[((i64)image * channels + channel) * in_h * in_w + within]);
            const scalar_t* from = dy + ((i64)image * channels + channel) * out_h * out_w;
            const int stride = 1;
#endif
            int kh = first_tap / taps_w, kw = first_tap % taps_w;
            #pragma unroll
            for (int t = 0; t < TAPS; t++) {
                int oh = ih * stride_h - pad_h + kh * dilation_h, ow = iw * stride_w - pad_w + kw * dilation_w;
                if (kh < taps_h && oh >= 0 && oh < out_h && ow >= 0 && ow < out_w)
                    sums[t] += value * to_acc(from[(i64)(oh * out_w + ow) * stride]);
                if (++kw == taps_w) kw = 0, kh++;
            }
        }
    #pragma unroll
    for (int t = 0; t < TAPS; t++) {
        acc_t sum = sums[t];
        if (CHANNELS == 1) sum = block_sum(sum, scratch);
        else {
            __syncthreads();
            scratch[threadIdx.x] = sum;
            __syncthreads();
            sum = 0;
            if (threadIdx.x < CHANNELS)
                for (int i = 0; i < 256; i += CHANNELS) sum += scratch[threadIdx.x + i];
        }
        if (threadIdx.x < CHANNELS && channel < channels && first_tap + t < taps)
            partial[((i64)blockIdx.z * channels + channel) * taps + first_tap + t] = sum;
    }
}

extern "C" __global__ void depthwise_wgrad_reduce(
    const acc_t* __restrict__ partial, scalar_t* __restrict__ dw, int size, int splits) {
    wait_for_earlier_kernels();
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= size) return;
    acc_t sum = 0;
    for (int split = 0; split < splits; split++) sum += partial[(i64)split * size + i];
    dw[i] = from_acc<scalar_t>(sum);
}
