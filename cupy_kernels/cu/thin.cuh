// What the transposed convolutions to few output channels share (thin_forward.cu, thin_gradients.cu). Float32, one
// group, dilation 1, on ordinary FMA units. A pixel of x meets TAPS weights of each input channel: all that a thread
// needs of them, or of their gradients, it has in registers.
//
// Macros: CHANNELS_LAST (1: x, dx, y and dy are [N, H, W, C], else [N, C, H, W]), OUT_CHANNELS, KERNEL_H, KERNEL_W,
// STRIDE_H, STRIDE_W, PAD_H, PAD_W, THREADS. Images have less than 2^31 pixels in all. w_last: whether w, or dw, is
// [Cin, KH, KW, Cout], else [Cin, Cout, KH, KW].
#pragma once
#include "common.cuh"
#include "async_copy.cuh"

__device__ constexpr int round_up(int a, int b) { return (a + b - 1) / b * b; }

enum { TAPS = OUT_CHANNELS * KERNEL_H * KERNEL_W, WEIGHT_PITCH = round_up(TAPS, 4), WARPS = THREADS / 32 };
typedef Packed<float, 4> Quad;

__device__ inline i64 place(int image, int channel, int h, int w, int channels, int height, int width) {
    return CHANNELS_LAST ? (((i64)image * height + h) * width + w) * channels + channel
                         : (((i64)image * channels + channel) * height + h) * width + w;
}

// Where a channel's tap [oc, kh, kw] lies among those of w, or dw.
__device__ inline int tap_place(int tap, int w_last) {
    return w_last ? tap % (KERNEL_H * KERNEL_W) * OUT_CHANNELS + tap / (KERNEL_H * KERNEL_W) : tap;
}
