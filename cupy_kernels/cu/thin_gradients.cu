// Gradients of the transposed convolution to few output channels (thin.cuh).
//
//     dgrad  dx[n, ic, ih, iw] =           sum_{oc, kh, kw} dy[n, oc, oh, ow] * w[ic, oc, kh, kw],  oh = ih s - p + kh
//     wgrad  dw[ic, oc, kh, kw] =          sum_{n, ih, iw}  x [n, ic, ih, iw] * dy[n, oc, oh, ow]
//
// A lane has LANE_CHANNELS channels of x. A block has 32 LANE_CHANNELS of them (grid: y) and every gridDim.x-th segment
// of SEGMENT pixels of a row; its warps take 4 pixels in turn. What these need of dy lies in shared memory, and is read
// by all lanes at once. The next segment is copied behind the arithmetic. wgrad writes partial [block][ic][oc, kh, kw];
// thin_wgrad_reduce adds the blocks in a fixed order. Macros: LANE_CHANNELS, MIN_BLOCKS (of a multiprocessor), SEGMENT,
// PIECE (taps that warps add up at a time), DGRAD_BYTES and WGRAD_BYTES (of shared memory), those of thin.cuh.
#include "thin.cuh"

enum {
    BLOCK_CHANNELS = 32 * LANE_CHANNELS,
    // A tile of x or dx is [pixel][channel] with CHANNELS_LAST, else [channel][pixel], where lanes that read 16 bytes
    // of different channels meet different banks.
    X_LINE = CHANNELS_LAST ? BLOCK_CHANNELS : SEGMENT,
    X_PITCH = CHANNELS_LAST ? BLOCK_CHANNELS : SEGMENT + 4,
    X_FLOATS = BLOCK_CHANNELS * SEGMENT / X_LINE * X_PITCH,
    WINDOW = round_up(KERNEL_W + 3 * STRIDE_W, 4),  // of a row of dy that 4 pixels need
    DY_PITCH = (SEGMENT - 4) * STRIDE_W + WINDOW,
    DY_FLOATS = OUT_CHANNELS * KERNEL_H * DY_PITCH,
    DGRAD_STAGES = 2 * DY_FLOATS + X_FLOATS,
    DGRAD_WEIGHTS = BLOCK_CHANNELS * (TAPS | 1),
    WGRAD_STAGES = 2 * (DY_FLOATS + X_FLOATS),
    WGRAD_SUMS = WARPS * BLOCK_CHANNELS * PIECE
};
static_assert(SEGMENT % (4 * WARPS) == 0, "warps take as many pixels");
static_assert((SEGMENT + 4) / 4 % 2 == 1, "an odd number of 16 bytes");
static_assert(DY_PITCH % 4 == 0, "windows begin at multiples of 16 bytes");
static_assert(4 * (DGRAD_STAGES > DGRAD_WEIGHTS ? DGRAD_STAGES : DGRAD_WEIGHTS) == DGRAD_BYTES, "later, and before");
static_assert(4 * (WGRAD_STAGES > WGRAD_SUMS ? WGRAD_STAGES : WGRAD_SUMS) == WGRAD_BYTES, "before, and later");

// The segments of all images.
struct Segments {
    int channels, in_h, in_w, out_h, out_w, count;
    Divisor by_row, by_image;

    __device__ Segments(int images, int channels, int in_h, int in_w, int out_h, int out_w)
        : channels(channels), in_h(in_h), in_w(in_w), out_h(out_h), out_w(out_w),
          count(images * in_h * ((in_w + SEGMENT - 1) / SEGMENT)), by_row((in_w + SEGMENT - 1) / SEGMENT),
          by_image(in_h) {}

    __device__ int first_pixel(int number, int& image, int& h) const {
        unsigned segment, ih;
        image = by_image.divide(by_row.divide(number, segment), ih);
        h = ih;
        return segment * SEGMENT;
    }
    // Begins to copy what a segment needs of dy. A warp has every WARPS-th line.
    __device__ void copy_dy(float* tile, const float* dy, int number) const {
        int image, h, first = first_pixel(number, image, h) * STRIDE_W - PAD_W;
        #pragma unroll 1
        for (int line = threadIdx.x / 32; line < OUT_CHANNELS * KERNEL_H; line += WARPS) {
            int oh = h * STRIDE_H - PAD_H + line % KERNEL_H;
            const float* from = dy + place(image, line / KERNEL_H, oh, first, OUT_CHANNELS, out_h, out_w);
            bool inside = (unsigned)oh < (unsigned)out_h;
            #pragma unroll
            for (int i = threadIdx.x % 32; i < DY_PITCH; i += 32)
                cp_async_4(
                    tile + line * DY_PITCH + i, from + i * (CHANNELS_LAST ? OUT_CHANNELS : 1),
                    inside && (unsigned)(first + i) < (unsigned)out_w);
        }
    }
    // use(place in a tile, place in x, whether it exists) for all of a segment's elements of x, WIDTH neighbours each.
    template <int WIDTH, class Use> __device__ void walk_by(int number, int first_channel, Use use) const {
        enum { LINES = THREADS * WIDTH / X_LINE };  // at a time
        static_assert(THREADS * WIDTH % X_LINE == 0 && X_FLOATS / X_PITCH % LINES == 0, "a thread keeps its column");
        int image, h, w = first_pixel(number, image, h), line = threadIdx.x * WIDTH / X_LINE,
                      at = threadIdx.x * WIDTH % X_LINE;
        int pixel = w + (CHANNELS_LAST ? line : at), channel = first_channel + (CHANNELS_LAST ? at : line);
        i64 in_x = place(image, channel, h, pixel, channels, in_h, in_w),
            stride = LINES * (CHANNELS_LAST ? channels : (i64)in_h * in_w);
        #pragma unroll 2
        for (int i = 0; i < X_FLOATS / X_PITCH; i += LINES) {
            use((line + i) * X_PITCH + at, in_x,
                (CHANNELS_LAST ? channel : channel + i) < channels && (CHANNELS_LAST ? pixel + i : pixel) < in_w);
            in_x += stride;
        }
    }
    __device__ bool wide() const { return (CHANNELS_LAST ? channels : in_w) % 4 == 0; }
};

// What 4 pixels need of a line of dy.
__device__ __forceinline__ void load_window(const float* dy_line, int pixel, float (&window)[WINDOW]) {
    #pragma unroll
    for (int i = 0; i < WINDOW; i += 4) {
        Quad quad = *(const Quad*)(dy_line + pixel * STRIDE_W + i);
        #pragma unroll
        for (int k = 0; k < 4; k++) window[i + k] = quad.v[k];
    }
}

extern "C" __global__ void __launch_bounds__(THREADS, MIN_BLOCKS) thin_dgrad(
    const float* __restrict__ dy, const float* __restrict__ w, float* __restrict__ dx, int images, int channels,
    int in_h, int in_w, int out_h, int out_w, int w_last) {
    wait_for_earlier_kernels();
    DYNAMIC_SHARED(float, shared);
    int lane = threadIdx.x % 32, warp = threadIdx.x / 32, first_channel = blockIdx.y * BLOCK_CHANNELS;
    Segments segments(images, channels, in_h, in_w, out_h, out_w);
    for (int i = threadIdx.x; i < BLOCK_CHANNELS * TAPS; i += THREADS) {
        int channel = i / TAPS, tap = i % TAPS;
        shared[channel * (TAPS | 1) + tap] =
            first_channel + channel < channels ? w[(i64)(first_channel + channel) * TAPS + tap_place(tap, w_last)] : 0;
    }
    __syncthreads();
    float weight[LANE_CHANNELS][TAPS];
    #pragma unroll
    for (int i = 0; i < LANE_CHANNELS * TAPS; i++)
        weight[i / TAPS][i % TAPS] = shared[(i / TAPS * 32 + lane) * (TAPS | 1) + i % TAPS];
    __syncthreads();
    float *tile = shared, *next = shared + DY_FLOATS, *turned = shared + 2 * DY_FLOATS;
    segments.copy_dy(tile, dy, blockIdx.x);
    cp_async_commit();
    #pragma unroll 1
    for (int at = blockIdx.x; at < segments.count; at += gridDim.x) {
        if (at + (int)gridDim.x < segments.count) segments.copy_dy(next, dy, at + gridDim.x);
        cp_async_commit();
        cp_async_wait<1>();
        __syncthreads();
        int image, h, iw = segments.first_pixel(at, image, h);
        #pragma unroll 1
        for (int pixel = warp * 4; pixel < SEGMENT; pixel += WARPS * 4) {
            float sums[LANE_CHANNELS][4] = {};
            #pragma unroll
            for (int line = 0; line < OUT_CHANNELS * KERNEL_H; line++) {
                float window[WINDOW];
                load_window(tile + line * DY_PITCH, pixel, window);
                #pragma unroll
                for (int kw = 0; kw < KERNEL_W; kw++)
                    #pragma unroll
                    for (int p = 0; p < 4; p++)
                        #pragma unroll
                        for (int c = 0; c < LANE_CHANNELS; c++)
                            sums[c][p] += weight[c][line * KERNEL_W + kw] * window[p * STRIDE_W + kw];
            }
            #pragma unroll
            for (int c = 0; c < LANE_CHANNELS; c++) {
                int channel = c * 32 + lane;
                if (!CHANNELS_LAST)
                    *(Quad*)(turned + channel * X_PITCH + pixel) = {{sums[c][0], sums[c][1], sums[c][2], sums[c][3]}};
                else if (first_channel + channel < channels)
                    #pragma unroll
                    for (int p = 0; p < 4; p++)
                        if (iw + pixel + p < in_w)
                            dx[place(image, first_channel + channel, h, iw + pixel + p, channels, in_h, in_w)] =
                                sums[c][p];
            }
        }
        __syncthreads();
        if (!CHANNELS_LAST) {
            if (segments.wide())
                segments.walk_by<4>(at, first_channel, [&](int from, i64 to, bool exists) {
                    if (exists) *(Quad*)(dx + to) = *(const Quad*)(turned + from);
                });
            else
                segments.walk_by<1>(at, first_channel, [&](int from, i64 to, bool exists) {
                    if (exists) dx[to] = turned[from];
                });
        }
        float* read = tile;
        tile = next, next = read;
    }
    cp_async_wait<0>();
}

extern "C" __global__ void __launch_bounds__(THREADS, MIN_BLOCKS) thin_wgrad(
    const float* __restrict__ x, const float* __restrict__ dy, float* __restrict__ partial, int images, int channels,
    int in_h, int in_w, int out_h, int out_w) {
    wait_for_earlier_kernels();
    DYNAMIC_SHARED(float, shared);
    int lane = threadIdx.x % 32, warp = threadIdx.x / 32, first_channel = blockIdx.y * BLOCK_CHANNELS;
    Segments segments(images, channels, in_h, in_w, out_h, out_w);
    auto copy = [&](float* stage, int number) {
        if (segments.wide())
            segments.walk_by<4>(number, first_channel, [&](int to, i64 from, bool exists) {
                cp_async_16(stage + to, x + from, exists);
            });
        else
            segments.walk_by<1>(number, first_channel, [&](int to, i64 from, bool exists) {
                cp_async_4(stage + to, x + from, exists);
            });
        segments.copy_dy(stage + X_FLOATS, dy, number);
    };
    float sums[LANE_CHANNELS][TAPS] = {}, *stage = shared, *next = shared + X_FLOATS + DY_FLOATS;
    copy(stage, blockIdx.x);
    cp_async_commit();
    #pragma unroll 1
    for (int at = blockIdx.x; at < segments.count; at += gridDim.x) {
        if (at + (int)gridDim.x < segments.count) copy(next, at + gridDim.x);
        cp_async_commit();
        cp_async_wait<1>();
        __syncthreads();
        #pragma unroll 1
        for (int pixel = warp * 4; pixel < SEGMENT; pixel += WARPS * 4) {
            Quad of_x[LANE_CHANNELS];
            #pragma unroll
            for (int c = 0; c < LANE_CHANNELS; c++) {
                int channel = c * 32 + lane;
                if (!CHANNELS_LAST) of_x[c] = *(const Quad*)(stage + channel * X_PITCH + pixel);
                else
                    #pragma unroll
                    for (int p = 0; p < 4; p++) of_x[c].v[p] = stage[(pixel + p) * X_PITCH + channel];
            }
            #pragma unroll
            for (int line = 0; line < OUT_CHANNELS * KERNEL_H; line++) {
                float window[WINDOW];
                load_window(stage + X_FLOATS + line * DY_PITCH, pixel, window);
                #pragma unroll
                for (int kw = 0; kw < KERNEL_W; kw++)
                    #pragma unroll
                    for (int p = 0; p < 4; p++)
                        #pragma unroll
                        for (int c = 0; c < LANE_CHANNELS; c++)
                            sums[c][line * KERNEL_W + kw] += of_x[c].v[p] * window[p * STRIDE_W + kw];
            }
        }
        __syncthreads();
        float* read = stage;
        stage = next, next = read;
    }
    cp_async_wait<0>();
    #pragma unroll
    for (int first = 0; first < TAPS; first += PIECE) {
        __syncthreads();
        #pragma unroll
        for (int c = 0; c < LANE_CHANNELS; c++)
            #pragma unroll
            for (int i = 0; i < PIECE; i++)
                if (first + i < TAPS) shared[((warp * LANE_CHANNELS + c) * PIECE + i) * 32 + lane] = sums[c][first + i];
        __syncthreads();
        for (int i = threadIdx.x; i < BLOCK_CHANNELS * PIECE; i += THREADS) {
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
    thin_wgrad_reduce(const float* __restrict__ partial, float* __restrict__ dw, int size, int parts, int w_last) {
    wait_for_earlier_kernels();
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
    dw[i / TAPS * TAPS + tap_place(i % TAPS, w_last)] = sum;
}
