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

// A 2x2 window: its places in `argmax` (of its two bits), in `saved`, and in g, which for windows that an odd edge cuts
// is -1.
struct Window {
    int row, column, argmax, saved, pooled;

    __device__ explicit Window(int window) : row(window / WINDOWS_W), column(window % WINDOWS_W) {
        argmax = place_of_window<TOGETHER_POOLED>(row, column);
        saved = place_of_window<together_saved<saved_t>()>(row, column);
        pooled = row < OUT_H / 2 && column < POOLED_W ? row * POOLED_W + column : -1;
    }
    // From the byte of `argmax` that has it.
    __device__ int chosen(int four) const { return four >> argmax % 4 * 2 & 3; }
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
    int tap = window.chosen(argmax[(plane * PLANE_STRIDE + window.argmax) / 4]);
    unpack(saved ? ((const Kept*)saved)[plane * PLANE_STRIDE + window.saved] : Kept(), dy);
    #pragma unroll
    for (int corner = 0; corner < 4; corner++)
        dy[corner] = gradient.of(dy[corner], restore) + (corner == tap ? add : 0);
}

// The convolution's input, and the rows and columns of its output that have no partner in it for some tap: the first
// and the last MOST of LENGTH. They are numbered without those between them, of which there are INSIDE.
#define IN_H (OUT_H - KERNEL_H + 1 + 2 * PAD_H)
#define IN_W (OUT_W - KERNEL_W + 1 + 2 * PAD_W)
#define TAPS (KERNEL_H * KERNEL_W)
template <int LENGTH, int MOST> struct Edges {
    enum { FIRST = MOST < 0 ? 0 : MOST < LENGTH ? MOST : LENGTH, LAST = LENGTH - MOST > FIRST ? LENGTH - MOST : FIRST };
    enum { INSIDE = LAST - FIRST, COUNT = LENGTH - INSIDE };
    // The same in windows: before FIRST_WINDOWS, and from LAST_WINDOW on.
    enum { FIRST_WINDOWS = (FIRST + 1) / 2, LAST_WINDOW = LAST / 2 < FIRST_WINDOWS ? FIRST_WINDOWS : LAST / 2 };
    __device__ static bool has(int place) { return place < FIRST || place >= LAST; }
    __device__ static int number(int place) { return place < FIRST ? place : place - INSIDE; }
    __device__ static int place(int number) { return number < FIRST ? number : number + INSIDE; }
};
typedef Edges<OUT_H, KERNEL_H - 1 - PAD_H> EdgeRows;
typedef Edges<OUT_W, KERNEL_W - 1 - PAD_W> EdgeColumns;
enum {
    INNER_ROWS = EdgeRows::LAST_WINDOW - EdgeRows::FIRST_WINDOWS,  // of windows
    FULL_ROWS = WINDOWS_H - INNER_ROWS,
    SIDES = WINDOWS_W - (EdgeColumns::LAST_WINDOW - EdgeColumns::FIRST_WINDOWS),
    EDGE_WINDOWS = FULL_ROWS * WINDOWS_W + INNER_ROWS * SIDES
};

// The number of the i-th window that meets an edge: of whole rows of windows first.
__device__ inline int edge_window(int i) {
    enum { TOP = EdgeRows::FIRST_WINDOWS, LEFT = EdgeColumns::FIRST_WINDOWS };
    if (i < FULL_ROWS * WINDOWS_W) return i < TOP * WINDOWS_W ? i : i + INNER_ROWS * WINDOWS_W;
    i -= FULL_ROWS * WINDOWS_W;
    int side = i % (SIDES ? SIDES : 1);
    return (TOP + i / (SIDES ? SIDES : 1)) * WINDOWS_W + (side < LEFT ? side : side + WINDOWS_W - SIDES);
}

// Sums of dy at the edges of a channel: of each pixel, then of each line.
struct BorderSums {
    float rows[EdgeRows::COUNT + 1][OUT_W];                       // [edge row]; one more, as there may be none
    float columns[EdgeColumns::COUNT + 1][EdgeRows::INSIDE + 1];  // [edge column][row that is no edge]
    float of_rows[EdgeRows::COUNT + 1], of_columns[EdgeColumns::COUNT + 1];
};

// borders [taps][channels]: for each tap, of images [first, end), the sum of dy times 2^e over the pixels that have no
// partner in the convolution's input. Not from the packed tiles: conv_wgrad_reduce multiplies these sums by what x was
// centred by, and their rounding with it. 128 threads, four warps, take channel c.
__device__ inline void sum_borders(
    const float* g, const u8* argmax, const saved_t* saved, const int* exponents, const int* unit_exponents,
    OutputGradient gradient, int c, i64 first, i64 end, BorderSums& sums, float* borders) {
    int lane = threadIdx.x % 32, exponent = gradient.exponent + (SPLIT == 1 ? exponents[c] : 0);
    for (int i = threadIdx.x % 128; i < EDGE_WINDOWS; i += 128) {
        Window window(edge_window(i));
        float sum[4] = {};
        #pragma unroll 4
        for (i64 image = first; image < end; image++) {
            float restore = restoring(exponent + kept_exponent(unit_exponents, image, window)), v[4];
            gradients_of(gradient, g, argmax, saved, image * OUT_CHANNELS + c, window, restore, v);
            #pragma unroll
            for (int corner = 0; corner < 4; corner++) sum[corner] += v[corner];
        }
        #pragma unroll
        for (int corner = 0; corner < 4; corner++) {
            int h = window.row * 2 + corner / 2, w = window.column * 2 + corner % 2;
            if (h >= OUT_H || w >= OUT_W) continue;
            if (EdgeRows::has(h)) sums.rows[EdgeRows::number(h)][w] = sum[corner];
            else if (EdgeColumns::has(w)) sums.columns[EdgeColumns::number(w)][h - EdgeRows::FIRST] = sum[corner];
        }
    }
    __syncthreads();
    for (int line = threadIdx.x % 128 / 32; line < EdgeRows::COUNT + EdgeColumns::COUNT; line += 4) {
        bool is_row = line < EdgeRows::COUNT;
        int column = is_row ? 0 : line - EdgeRows::COUNT, length = is_row ? OUT_W : EdgeRows::INSIDE;
        const float* from = is_row ? sums.rows[line] : sums.columns[column];
        float sum = 0;
        for (int i = lane; i < length; i += 32) sum += from[i];
        sum = warp_sum(sum);
        if (lane == 0) (is_row ? sums.of_rows[line] : sums.of_columns[column]) = sum;
    }
    __syncthreads();
    for (int tap = threadIdx.x % 128; tap < TAPS; tap += 128) {
        auto row_alone = [&](int h) { return (unsigned)(h + PAD_H - tap / KERNEL_W) >= IN_H; };
        auto column_alone = [&](int w) { return (unsigned)(w + PAD_W - tap % KERNEL_W) >= IN_W; };
        float sum = 0;
        for (int row = 0; row < EdgeRows::COUNT; row++) {
            if (row_alone(EdgeRows::place(row))) sum += sums.of_rows[row];
            else
                for (int column = 0; column < EdgeColumns::COUNT; column++) {
                    int w = EdgeColumns::place(column);
                    if (column_alone(w)) sum += sums.rows[row][w];
                }
        }
        for (int column = 0; column < EdgeColumns::COUNT; column++)
            if (column_alone(EdgeColumns::place(column))) sum += sums.of_columns[column];
        borders[tap * OUT_CHANNELS + c] = sum;
    }
}
