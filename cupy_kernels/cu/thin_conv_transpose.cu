// Transposed convolution to few output channels, the last layer of a decoder, and its gradients; float32, [N, C, H, W],
// on ordinary FMA units. A pixel of x meets OUT_CHANNELS * KERNEL_H * KERNEL_W weights of each input channel: all that
// a thread needs of them, or of dy, it has in registers.
//
//     forward  y [n, oc, oh, ow] = bias[oc] + sum_{ic, kh, kw} x [n, ic, ih, iw] * w[ic, oc, kh, kw],  oh = ih s - p + kh
//     dgrad    dx[n, ic, ih, iw] =            sum_{oc, kh, kw} dy[n, oc, oh, ow] * w[ic, oc, kh, kw]
//     wgrad    dw[ic, oc, kh, kw] =           sum_{n, ih, iw}  x [n, ic, ih, iw] * dy[n, oc, oh, ow]
//
// thin_forward: a thread has PIXELS_FORWARD pixels r of a column of the grid oh = r s + phase, with all phases and output
// channels, and goes over the input channels. It adds 4 of these first: long sums have large errors. thin_dgrad: a thread has PIXELS_DGRAD pixels of a row of dx; what they
// need of dy stays in registers, it goes over the channels of dx. Both have all weights in shared memory, so the grid
// has x alone. thin_wgrad: a lane has LANE_CHANNELS channels of x; a block has 32 LANE_CHANNELS of them (grid: y) and
// every gridDim.x-th segment of SEGMENT pixels of a row; its warps take 4 pixels in turn, which lie in shared memory. It
// writes partial [block][ic][oc, kh, kw]; thin_wgrad_reduce adds the blocks in a fixed order.
//
// Macros: OUT_CHANNELS, KERNEL_H, KERNEL_W, STRIDE_H, STRIDE_W, PAD_H, PAD_W, PIXELS_FORWARD, PIXELS_DGRAD,
// LANE_CHANNELS, SEGMENT, PIECE (taps that warps add up at a time), THREADS, WGRAD_THREADS. Images have less than 2^31 pixels in all.
#include "common.cuh"

__device__ constexpr int floor_div(int a, int b) { return a >= 0 ? a / b : -((b - 1 - a) / b); }
__device__ constexpr int round_up(int a, int b) { return (a + b - 1) / b * b; }

enum { TAPS = OUT_CHANNELS * KERNEL_H * KERNEL_W, WEIGHT_PITCH = round_up(TAPS, 4) };  // of an input channel
// Shifts from a pixel r of the forward to those of x that some phase needs.
enum {
    FIRST_H = -floor_div(KERNEL_H - 1 - PAD_H, STRIDE_H),
    FIRST_W = -floor_div(KERNEL_W - 1 - PAD_W, STRIDE_W),
    SPAN_H = floor_div(STRIDE_H - 1 + PAD_H, STRIDE_H) - FIRST_H + PIXELS_FORWARD,
    SPAN_W = floor_div(STRIDE_W - 1 + PAD_W, STRIDE_W) - FIRST_W + 1
};
static_assert(SPAN_H <= 32 && SPAN_W <= 32, "a bit for each row and column");

typedef Packed<float, 4> Quad;

// All weights, a channel's at a multiple of 16 bytes.
__device__ inline void load_weights(const float* __restrict__ w, float* weights, int channels) {
    for (int i = threadIdx.x; i < channels * TAPS; i += THREADS) weights[i / TAPS * WEIGHT_PITCH + i % TAPS] = w[i];
    for (int i = threadIdx.x; i < channels * (WEIGHT_PITCH - TAPS); i += THREADS)
        weights[i / max(1, WEIGHT_PITCH - TAPS) * WEIGHT_PITCH + TAPS + i % max(1, WEIGHT_PITCH - TAPS)] = 0;
    __syncthreads();
}
__device__ __forceinline__ void weights_of(const float* weights, int channel, float (&v)[WEIGHT_PITCH]) {
    #pragma unroll
    for (int i = 0; i < WEIGHT_PITCH; i += 4) {
        Quad quad = *(const Quad*)(weights + channel * WEIGHT_PITCH + i);
        #pragma unroll
        for (int k = 0; k < 4; k++) v[i + k] = quad.v[k];
    }
}

extern "C" __global__ void __launch_bounds__(THREADS) thin_forward(
    const float* __restrict__ x, const float* __restrict__ w, const float* __restrict__ bias, float* __restrict__ y,
    int images, int channels, int in_h, int in_w, int out_h, int out_w) {
    DYNAMIC_SHARED(float, weights);
    load_weights(w, weights, channels);
    int rows = (out_h + STRIDE_H - 1) / STRIDE_H, columns = (out_w + STRIDE_W - 1) / STRIDE_W;
    Divisor by_columns(columns), by_rows((rows + PIXELS_FORWARD - 1) / PIXELS_FORWARD);
    unsigned column, at, image = by_rows.divide(by_columns.divide(blockIdx.x * THREADS + threadIdx.x, column), at);
    if ((int)image >= images) return;
    int row = at * PIXELS_FORWARD, first_h = row + FIRST_H, first_w = (int)column + FIRST_W;
    unsigned inside_h = 0, inside_w = 0;
    #pragma unroll
    for (int i = 0; i < SPAN_H; i++) inside_h |= (unsigned)((unsigned)(first_h + i) < (unsigned)in_h) << i;
    #pragma unroll
    for (int i = 0; i < SPAN_W; i++) inside_w |= (unsigned)((unsigned)(first_w + i) < (unsigned)in_w) << i;

    enum { ROWS = PIXELS_FORWARD * STRIDE_H, SUMS = ROWS * STRIDE_W };  // of an output channel
    float sums[OUT_CHANNELS * SUMS], of_few[OUT_CHANNELS * SUMS] = {};
    #pragma unroll
    for (int i = 0; i < OUT_CHANNELS * SUMS; i++) sums[i] = bias ? bias[i / SUMS] : 0;
    i64 plane = (i64)in_h * in_w;
    const float* lines[SPAN_H];
    #pragma unroll
    for (int a = 0; a < SPAN_H; a++) lines[a] = x + image * channels * plane + (i64)(first_h + a) * in_w + first_w;
    float next[SPAN_H][SPAN_W];  // is on its way while the channel before it is multiplied
    auto load_next = [&]() {
        #pragma unroll
        for (int a = 0; a < SPAN_H; a++) {
            #pragma unroll
            for (int b = 0; b < SPAN_W; b++) next[a][b] = inside_h >> a & inside_w >> b & 1 ? lines[a][b] : 0;
            lines[a] += plane;
        }
    };
    load_next();
    #pragma unroll 1
    for (int channel = 0; channel < channels; channel++) {
        float v[SPAN_H][SPAN_W], weight[WEIGHT_PITCH];
        #pragma unroll
        for (int i = 0; i < SPAN_H * SPAN_W; i++) v[i / SPAN_W][i % SPAN_W] = next[i / SPAN_W][i % SPAN_W];
        if (channel + 1 < channels) load_next();
        weights_of(weights, channel, weight);
        #pragma unroll
        for (int a = 0; a < SPAN_H - PIXELS_FORWARD + 1; a++)
            #pragma unroll
            for (int phase_h = 0; phase_h < STRIDE_H; phase_h++) {
                const int kh = phase_h + PAD_H - (FIRST_H + a) * STRIDE_H;
                if (kh < 0 || kh >= KERNEL_H) continue;
                #pragma unroll
                for (int b = 0; b < SPAN_W; b++)
                    #pragma unroll
                    for (int phase_w = 0; phase_w < STRIDE_W; phase_w++) {
                        const int kw = phase_w + PAD_W - (FIRST_W + b) * STRIDE_W;
                        if (kw < 0 || kw >= KERNEL_W) continue;
                        #pragma unroll
                        for (int oc = 0; oc < OUT_CHANNELS; oc++)
                            #pragma unroll
                            for (int p = 0; p < PIXELS_FORWARD; p++)
                                of_few[oc * SUMS + (p * STRIDE_H + phase_h) * STRIDE_W + phase_w] +=
                                    v[a + p][b] * weight[(oc * KERNEL_H + kh) * KERNEL_W + kw];
                    }
            }
        if (channel % 4 != 3 && channel != channels - 1) continue;
        #pragma unroll
        for (int i = 0; i < OUT_CHANNELS * SUMS; i++) sums[i] += of_few[i], of_few[i] = 0;
    }
    enum { TOGETHER = STRIDE_W == 3 ? 1 : STRIDE_W };
    int ow = column * STRIDE_W;
    #pragma unroll
    for (int i = 0; i < OUT_CHANNELS * ROWS; i++) {
        int oh = row * STRIDE_H + i % ROWS;
        if (oh >= out_h) continue;
        float* to = y + (((i64)image * OUT_CHANNELS + i / ROWS) * out_h + oh) * out_w + ow;
        const float* line = sums + i * STRIDE_W;
        if (out_w % TOGETHER == 0 && TOGETHER > 1)
            *(Packed<float, TOGETHER>*)to = *(const Packed<float, TOGETHER>*)line;
        else
            #pragma unroll
            for (int j = 0; j < STRIDE_W; j++)
                if (ow + j < out_w) to[j] = line[j];
    }
}

extern "C" __global__ void __launch_bounds__(THREADS) thin_dgrad(
    const float* __restrict__ dy, const float* __restrict__ w, float* __restrict__ dx, int images, int channels,
    int in_h, int in_w, int out_h, int out_w) {
    DYNAMIC_SHARED(float, weights);
    load_weights(w, weights, channels);
    Divisor by_columns((in_w + PIXELS_DGRAD - 1) / PIXELS_DGRAD), by_rows(in_h);
    unsigned at, ih, image = by_rows.divide(by_columns.divide(blockIdx.x * THREADS + threadIdx.x, at), ih);
    if ((int)image >= images) return;
    int iw = at * PIXELS_DGRAD;
    enum { COLUMNS = KERNEL_W + (PIXELS_DGRAD - 1) * STRIDE_W };
    float v[OUT_CHANNELS][KERNEL_H][COLUMNS];
    #pragma unroll
    for (int oc = 0; oc < OUT_CHANNELS; oc++)
        #pragma unroll
        for (int kh = 0; kh < KERNEL_H; kh++) {
            int oh = (int)ih * STRIDE_H - PAD_H + kh, first = iw * STRIDE_W - PAD_W;
            const float* from = dy + (((i64)image * OUT_CHANNELS + oc) * out_h + oh) * out_w;
            #pragma unroll
            for (int i = 0; i < COLUMNS; i++)
                v[oc][kh][i] =
                    (unsigned)oh < (unsigned)out_h && (unsigned)(first + i) < (unsigned)out_w ? from[first + i] : 0;
        }
    i64 plane = (i64)in_h * in_w;
    float* to = dx + (i64)image * channels * plane + (i64)ih * in_w + iw;
    bool wide = PIXELS_DGRAD == 2 && in_w % 2 == 0;
    #pragma unroll 2
    for (int channel = 0; channel < channels; channel++, to += plane) {
        float weight[WEIGHT_PITCH], sums[PIXELS_DGRAD] = {};
        weights_of(weights, channel, weight);
        #pragma unroll
        for (int i = 0; i < TAPS; i++)
            #pragma unroll
            for (int p = 0; p < PIXELS_DGRAD; p++)
                sums[p] +=
                    v[i / (KERNEL_H * KERNEL_W)][i / KERNEL_W % KERNEL_H][i % KERNEL_W + p * STRIDE_W] * weight[i];
        if (wide) *(Packed<float, 2>*)to = {{sums[0], sums[PIXELS_DGRAD - 1]}};
        else
            #pragma unroll
            for (int p = 0; p < PIXELS_DGRAD; p++)
                if (iw + p < in_w) to[p] = sums[p];
    }
}

enum {
    BLOCK_CHANNELS = 32 * LANE_CHANNELS,
    X_PITCH = SEGMENT + 4,  // lanes that read 16 bytes of different channels meet different banks
    WINDOW = round_up(KERNEL_W + 3 * STRIDE_W, 4),  // of a row of dy that 4 pixels need
    DY_PITCH = (SEGMENT - 4) * STRIDE_W + WINDOW,
    WARPS = WGRAD_THREADS / 32,
    X_FLOATS = BLOCK_CHANNELS * X_PITCH,
    DY_FLOATS = OUT_CHANNELS * KERNEL_H * DY_PITCH,
    X_LOADS = BLOCK_CHANNELS * SEGMENT / WGRAD_THREADS,  // of a thread
    DY_LOADS = (DY_FLOATS + WGRAD_THREADS - 1) / WGRAD_THREADS
};
static_assert(BLOCK_CHANNELS * SEGMENT % WGRAD_THREADS == 0, "threads load equal shares");
static_assert(X_PITCH / 4 % 2 == 1, "an odd number of 16 bytes");
static_assert(DY_PITCH % 4 == 0, "windows begin at multiples of 16 bytes");

extern "C" __global__ void __launch_bounds__(WGRAD_THREADS, 2) thin_wgrad(
    const float* __restrict__ x, const float* __restrict__ dy, float* __restrict__ partial, int images, int channels,
    int in_h, int in_w, int out_h, int out_w) {
    DYNAMIC_SHARED(float, shared);
    float *x_tile = shared, *dy_tile = shared + X_FLOATS;
    int lane = threadIdx.x % 32, warp = threadIdx.x / 32, first_channel = blockIdx.y * BLOCK_CHANNELS;
    int row_segments = (in_w + SEGMENT - 1) / SEGMENT;
    Divisor by_segments(row_segments), by_rows(in_h);
    float sums[LANE_CHANNELS][TAPS] = {};
    for (unsigned at = blockIdx.x; at < (unsigned)images * in_h * row_segments; at += gridDim.x) {
        unsigned segment, ih, image = by_rows.divide(by_segments.divide(at, segment), ih);
        int iw = segment * SEGMENT;
        float x_values[X_LOADS], dy_values[DY_LOADS];  // all loads are under way before the first is waited for
        #pragma unroll
        for (int k = 0; k < X_LOADS; k++) {
            int i = threadIdx.x + k * WGRAD_THREADS, channel = first_channel + i / SEGMENT, pixel = iw + i % SEGMENT;
            bool inside = channel < channels && pixel < in_w;
            x_values[k] = inside ? x[((image * (i64)channels + channel) * in_h + ih) * in_w + pixel] : 0;
        }
        #pragma unroll
        for (int k = 0; k < DY_LOADS; k++) {
            int i = threadIdx.x + k * WGRAD_THREADS, line = i / DY_PITCH, ow = iw * STRIDE_W - PAD_W + i % DY_PITCH,
                oh = (int)ih * STRIDE_H - PAD_H + line % KERNEL_H;
            bool inside = i < DY_FLOATS && (unsigned)oh < (unsigned)out_h && (unsigned)ow < (unsigned)out_w;
            dy_values[k] = inside ? dy[((image * (i64)OUT_CHANNELS + line / KERNEL_H) * out_h + oh) * out_w + ow] : 0;
        }
        __syncthreads();
        #pragma unroll
        for (int k = 0; k < X_LOADS; k++) {
            int i = threadIdx.x + k * WGRAD_THREADS;
            x_tile[i / SEGMENT * X_PITCH + i % SEGMENT] = x_values[k];
        }
        #pragma unroll
        for (int k = 0; k < DY_LOADS; k++)
            if (threadIdx.x + k * WGRAD_THREADS < DY_FLOATS) dy_tile[threadIdx.x + k * WGRAD_THREADS] = dy_values[k];
        __syncthreads();
        #pragma unroll 1
        for (int pixel = warp * 4; pixel < SEGMENT; pixel += WARPS * 4) {
            Quad of_x[LANE_CHANNELS];
            #pragma unroll
            for (int c = 0; c < LANE_CHANNELS; c++)
                of_x[c] = *(const Quad*)(x_tile + (c * 32 + lane) * X_PITCH + pixel);
            #pragma unroll
            for (int line = 0; line < OUT_CHANNELS * KERNEL_H; line++) {
                float window[WINDOW];
                #pragma unroll
                for (int i = 0; i < WINDOW; i += 4) {
                    Quad quad = *(const Quad*)(dy_tile + line * DY_PITCH + pixel * STRIDE_W + i);
                    #pragma unroll
                    for (int k = 0; k < 4; k++) window[i + k] = quad.v[k];
                }
                #pragma unroll
                for (int kw = 0; kw < KERNEL_W; kw++)
                    #pragma unroll
                    for (int p = 0; p < 4; p++)
                        #pragma unroll
                        for (int c = 0; c < LANE_CHANNELS; c++)
                            sums[c][line * KERNEL_W + kw] += of_x[c].v[p] * window[p * STRIDE_W + kw];
            }
        }
    }
    #pragma unroll
    for (int first = 0; first < TAPS; first += PIECE) {
        __syncthreads();
        #pragma unroll
        for (int c = 0; c < LANE_CHANNELS; c++)
            #pragma unroll
            for (int i = 0; i < PIECE; i++)
                if (first + i < TAPS) shared[((warp * LANE_CHANNELS + c) * PIECE + i) * 32 + lane] = sums[c][first + i];
        __syncthreads();
        for (int i = threadIdx.x; i < BLOCK_CHANNELS * PIECE; i += WGRAD_THREADS) {
            int tap = first + i % PIECE, within = i / PIECE, channel = first_channel + within;
            if (tap >= TAPS || channel >= channels) continue;
            float sum = 0;
            #pragma unroll
            for (int w = 0; w < WARPS; w++)
                sum += shared[((w * LANE_CHANNELS + within / 32) * PIECE + i % PIECE) * 32 + within % 32];
            partial[((i64)blockIdx.x * channels + channel) * TAPS + tap] = sum;
        }
    }
}

// Grid: x = 32 elements of dw each; 8 warps share the parts.
extern "C" __global__ void __launch_bounds__(256)
    thin_wgrad_reduce(const float* __restrict__ partial, float* __restrict__ dw, int size, int parts) {
    __shared__ float scratch[8][32];
    int lane = threadIdx.x % 32, warp = threadIdx.x / 32, i = blockIdx.x * 32 + lane;
    float sum = 0;
    if (i < size)
        #pragma unroll 8
        for (int part = warp; part < parts; part += 8) sum += partial[(i64)part * size + i];
    scratch[warp][lane] = sum;
    __syncthreads();
    if (warp || i >= size) return;
    for (int w = 1; w < 8; w++) sum += scratch[w][lane];
    dw[i] = sum;
}
