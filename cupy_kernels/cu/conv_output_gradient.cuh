// dy, the gradient of the convolution's output, of one window of a channel, and what it sums to at the image's borders:
// see pooled_tail_backward.cu, whose macros are used here.
#pragma once
#include "pooled_tail.cuh"

// dy of one channel, times 2^e: the part that all pixels have, and what the chosen corner of a window adds.
struct OutputGradient {
    float mean, invstd, slope, offset, scale, enlarge;
    int exponent;  // mean is times 2^-exponent, see Normaliser, and `restore` must be

    // Without statistics that depend on the batch (sums null) all pixels have 0.
    __device__ OutputGradient(
        const float* means, const float* invstds, const param_t* weights, const float* sums, int c)
        : slope(sums ? sums[OUT_CHANNELS + c] : 0), offset(sums ? sums[c] : 0), enlarge(1) {
        Normaliser normalise(sums ? means[c] : 0, invstds[c]);
        mean = normalise.mean, invstd = normalise.invstd, exponent = normalise.unit == 1 ? 0 : 32;
        scale = multiply_unflushed(bn_weight(weights, c), invstds[c]);
    }
    __device__ void finish(float count, int e) {
        enlarge = power_of_two(e);
        slope = -of_chosen(slope / count);
        offset = -of_chosen(offset / count);
    }
    // y = kept * restore
    __device__ float of(float kept, float restore) const { return (kept * restore - mean) * invstd * slope + offset; }
    // In this order, which neither loses nor overflows what fits in the end.
    __device__ float of_chosen(float g) const { return multiply_unflushed(multiply_unflushed(g, enlarge), scale); }
};

// A 2x2 window: its places in `argmax`, in `saved`, and in g, which for windows that an odd edge cuts is -1.
struct Window {
    int row, column, argmax, saved, pooled;

    __device__ explicit Window(int window) : row(window / WINDOWS_W), column(window % WINDOWS_W) {
        argmax = place_of_window<TOGETHER_POOLED>(row, column);
        saved = place_of_window<together_saved<saved_t>()>(row, column);
        pooled = row < OUT_H / 2 && column < POOLED_W ? row * POOLED_W + column : -1;
    }
};

// What conv_bn_pool saved of a window.
template <int> struct KeptOf { typedef uint2 type; };
template <> struct KeptOf<2> { typedef float4 type; };
typedef KeptOf<SPLIT>::type Kept;
__device__ inline void unpack(uint2 kept, float (&v)[4]) {
    #pragma unroll
    for (int i = 0; i < 4; i++) v[i] = to_acc(half_t{(unsigned short)((i < 2 ? kept.x : kept.y) >> i % 2 * 16)});
}
__device__ inline void unpack(float4 kept, float (&v)[4]) {
    v[0] = kept.x, v[1] = kept.y, v[2] = kept.z, v[3] = kept.w;
}
// The exponent of a window's scale, but for its channel's.
__device__ inline int kept_exponent(const int* unit_exponents, i64 image, const Window& window) {
    if (SPLIT == 2) return 0;
    return unit_exponents[image * UNITS + unit_of_window(window.row, window.column)] - SAVED_SHIFT;
}
// dy of the corners of one window in plane `plane`. Corners outside the image get anything.
__device__ inline void gradients_of(
    const OutputGradient& gradient, const float* g, const u8* argmax, const saved_t* saved, i64 plane,
    const Window& window, float restore, float (&dy)[4]) {
    float add = window.pooled < 0 ? 0 : gradient.of_chosen(g[plane * PLANE + window.pooled]);
    int tap = window.pooled < 0 ? -1 : argmax[plane * PLANE_STRIDE + window.argmax];
    unpack(saved ? ((const Kept*)saved)[plane * PLANE_STRIDE + window.saved] : Kept(), dy);
    #pragma unroll
    for (int corner = 0; corner < 4; corner++)
        dy[corner] = gradient.of(dy[corner], restore) + (corner == tap ? add : 0);
}

// The convolution's input; rows and columns at each edge of its output that have no partner in it for some tap.
#define IN_H (OUT_H - KERNEL_H + 1 + 2 * PAD_H)
#define IN_W (OUT_W - KERNEL_W + 1 + 2 * PAD_W)
#define TAPS (KERNEL_H * KERNEL_W)
#define EDGE_H (KERNEL_H - 1 > PAD_H ? KERNEL_H - 1 - PAD_H : 0)
#define EDGE_W (KERNEL_W - 1 > PAD_W ? KERNEL_W - 1 - PAD_W : 0)
// Rows of windows from the top, and from which on to the bottom, that such rows meet, and columns likewise.
enum {
    TOP = EDGE_H + 1 < OUT_H ? (EDGE_H + 1) / 2 : WINDOWS_H,
    BOTTOM = OUT_H - EDGE_H < TOP * 2 ? TOP : (OUT_H - EDGE_H) / 2
};
enum {
    LEFT = EDGE_W + 1 < OUT_W ? (EDGE_W + 1) / 2 : WINDOWS_W,
    RIGHT = OUT_W - EDGE_W < LEFT * 2 ? LEFT : (OUT_W - EDGE_W) / 2
};
enum { FULL_ROWS = TOP + WINDOWS_H - BOTTOM, SIDES = LEFT + WINDOWS_W - RIGHT };
enum { EDGE_WINDOWS = FULL_ROWS * WINDOWS_W + (BOTTOM - TOP) * SIDES };

// The number of the i-th window that meets an edge: of whole rows of windows first.
__device__ inline int edge_window(int i) {
    if (i < FULL_ROWS * WINDOWS_W) return i < TOP * WINDOWS_W ? i : i + (BOTTOM - TOP) * WINDOWS_W;
    i -= FULL_ROWS * WINDOWS_W;
    int side = i % (SIDES ? SIDES : 1);
    return (TOP + i / (SIDES ? SIDES : 1)) * WINDOWS_W + (side < LEFT ? side : side + RIGHT - LEFT);
}

// borders [taps][channels]: for each tap, of images [first, end), the sum of dy times 2^e over the pixels that have no
// partner in the convolution's input. Not from the packed tiles: conv_wgrad_reduce multiplies these sums by what x was
// centred by, and their rounding with it. 128 threads, four warps, take channel c. totals: in shared memory, of the
// block's warps.
__device__ inline void sum_borders(
    const float* g, const u8* argmax, const saved_t* saved, const int* exponents, const int* unit_exponents,
    OutputGradient gradient, int c, i64 first, i64 end, float (&totals)[THREADS / 32][TAPS], float* borders) {
    int lane = threadIdx.x % 32, warp = threadIdx.x / 32,
        exponent = gradient.exponent + (SPLIT == 1 ? exponents[c] : 0);
    if (lane == 0)
        for (int tap = 0; tap < TAPS; tap++) totals[warp][tap] = 0;
    for (int start = threadIdx.x % 128; start - lane < EDGE_WINDOWS; start += 128) {
        bool exists = start < EDGE_WINDOWS;
        Window window(edge_window(exists ? start : 0));
        float sum[4] = {};
        #pragma unroll 4
        for (i64 image = first; image < end; image++) {
            float restore = restoring(exponent + kept_exponent(unit_exponents, image, window)), v[4];
            gradients_of(gradient, g, argmax, saved, image * OUT_CHANNELS + c, window, restore, v);
            #pragma unroll
            for (int corner = 0; corner < 4; corner++) sum[corner] += v[corner];
        }
        #pragma unroll 1
        for (int tap = 0; tap < TAPS; tap++) {
            float alone = 0;
            #pragma unroll
            for (int corner = 0; corner < 4; corner++) {
                int h = window.row * 2 + corner / 2, w = window.column * 2 + corner % 2;
                int ih = h + PAD_H - tap / KERNEL_W, iw = w + PAD_W - tap % KERNEL_W;
                bool partnered = ih >= 0 && ih < IN_H && iw >= 0 && iw < IN_W;
                if (exists && h < OUT_H && w < OUT_W && !partnered) alone += sum[corner];
            }
            alone = warp_sum(alone);
            if (lane == 0) totals[warp][tap] += alone;
        }
    }
    __syncthreads();
    warp = warp / 4 * 4;
    for (int tap = threadIdx.x % 128; tap < TAPS; tap += 128)
        borders[tap * OUT_CHANNELS + c] =
            totals[warp][tap] + totals[warp + 1][tap] + (totals[warp + 2][tap] + totals[warp + 3][tap]);
}
