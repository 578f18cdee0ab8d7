// Forward of the transposed convolution to few output channels (thin.cuh).
//
//     y[n, oc, oh, ow] = bias[oc] + sum_{ic, kh, kw} x[n, ic, ih, iw] * w[ic, oc, kh, kw],  oh = ih s - p + kh
//
// A thread has PIXELS pixels r of a column of the grid oh = r s + phase, with all phases and output channels, and goes
// over the input channels. It adds 4 of these first: long sums have large errors. A block has a tile of the grid,
// TILE_COLUMNS wide, and brings what it needs of x and w to shared memory, CHUNK channels at a time, the next ones
// behind the arithmetic. Grid: x = columns of tiles (fastest), rows, images. Macros: PIXELS, TILE_COLUMNS, CHUNK,
// SHARED_BYTES, those of thin.cuh.
#include "thin.cuh"

__device__ constexpr int floor_div(int a, int b) { return a >= 0 ? a / b : -((b - 1 - a) / b); }

// Shifts from a pixel r to those of x that some phase needs.
enum {
    FIRST_H = -floor_div(KERNEL_H - 1 - PAD_H, STRIDE_H),
    FIRST_W = -floor_div(KERNEL_W - 1 - PAD_W, STRIDE_W),
    SHIFTS_H = floor_div(STRIDE_H - 1 + PAD_H, STRIDE_H) - FIRST_H + 1,
    SHIFTS_W = floor_div(STRIDE_W - 1 + PAD_W, STRIDE_W) - FIRST_W + 1
};
enum {
    TILE_ROWS = THREADS / TILE_COLUMNS * PIXELS,
    BAND_COLUMNS = TILE_COLUMNS + SHIFTS_W - 1,
    BAND = (TILE_ROWS + SHIFTS_H - 1) * BAND_COLUMNS,  // pixels of x that a tile needs
    BAND_PITCH = round_up(BAND - 4, 32) + 4,           // neighbouring channels of 4 pixels lie in different banks
    STAGE = CHUNK * (BAND_PITCH + WEIGHT_PITCH),
    COPIED_CHANNELS = CHANNELS_LAST ? CHUNK : 1  // of a pixel, by neighbouring threads
};
static_assert(4 * (2 * STAGE + BAND) == SHARED_BYTES, "two stages, then a table");
static_assert(CHUNK % 4 == 0 && THREADS % CHUNK == 0, "a thread copies one channel, and adds 4 at a time");

extern "C" __global__ void __launch_bounds__(THREADS, 4) thin_forward(
    const float* __restrict__ x, const float* __restrict__ w, const float* __restrict__ bias, float* __restrict__ y,
    int images, int channels, int in_h, int in_w, int out_h, int out_w, int w_last) {
    wait_for_earlier_kernels();
    DYNAMIC_SHARED(float, shared);
    int rows = (out_h + STRIDE_H - 1) / STRIDE_H, columns = (out_w + STRIDE_W - 1) / STRIDE_W;
    int tiles_h = (rows + TILE_ROWS - 1) / TILE_ROWS, tiles_w = (columns + TILE_COLUMNS - 1) / TILE_COLUMNS;
    int tile_h = blockIdx.x / tiles_w % tiles_h * TILE_ROWS, tile_w = blockIdx.x % tiles_w * TILE_COLUMNS,
        image = blockIdx.x / tiles_w / tiles_h;
    i64 channel_stride = CHANNELS_LAST ? 1 : (i64)in_h * in_w;
    const float* from = x + (i64)image * channels * in_h * in_w;
    int* offsets = (int*)(shared + 2 * STAGE);  // of the band's pixels in the image; negative outside of it
    for (int pixel = threadIdx.x; pixel < BAND; pixel += THREADS) {
        int h = tile_h + FIRST_H + pixel / BAND_COLUMNS, w = tile_w + FIRST_W + pixel % BAND_COLUMNS;
        bool inside = (unsigned)h < (unsigned)in_h && (unsigned)w < (unsigned)in_w;
        offsets[pixel] = inside ? (h * in_w + w) * (CHANNELS_LAST ? channels : 1) : -1;
    }
    __syncthreads();
    auto copy = [&](float* stage, int first) {
        #pragma unroll
        for (int i = threadIdx.x; i < BAND * COPIED_CHANNELS; i += THREADS) {
            int pixel = i / COPIED_CHANNELS, offset = offsets[pixel];
            #pragma unroll
            for (int c = 0; c < CHUNK / COPIED_CHANNELS; c++) {
                int channel = c + i % COPIED_CHANNELS;
                cp_async_4(
                    stage + channel * BAND_PITCH + pixel, from + offset + (first + channel) * channel_stride,
                    offset >= 0 && first + channel < channels);
            }
        }
        #pragma unroll
        for (int i = threadIdx.x; i < CHUNK * WEIGHT_PITCH; i += THREADS) {
            int channel = first + i / WEIGHT_PITCH, tap = i % WEIGHT_PITCH;
            cp_async_4(
                stage + CHUNK * BAND_PITCH + i, w + (i64)channel * TAPS + tap_place(tap, w_last),
                channel < channels && tap < TAPS);
        }
        cp_async_commit();
    };

    enum { ROWS = PIXELS * STRIDE_H, SUMS = ROWS * STRIDE_W };  // of an output channel
    float sums[OUT_CHANNELS * SUMS], of_few[OUT_CHANNELS * SUMS] = {};
    #pragma unroll
    for (int i = 0; i < OUT_CHANNELS * SUMS; i++) sums[i] = bias ? bias[i / SUMS] : 0;
    int column = threadIdx.x % TILE_COLUMNS, row = threadIdx.x / TILE_COLUMNS * PIXELS;
    copy(shared, 0);
    float *stage = shared, *next = shared + STAGE;
    for (int first = 0; first < channels; first += CHUNK) {
        copy(next, first + CHUNK);
        cp_async_wait<1>();
        __syncthreads();
        #pragma unroll 1
        for (int channel = 0; channel < CHUNK; channel++) {
            const float* band = stage + channel * BAND_PITCH + row * BAND_COLUMNS + column;
            float weight[WEIGHT_PITCH];
            #pragma unroll
            for (int i = 0; i < WEIGHT_PITCH; i += 4) {
                Quad quad = *(const Quad*)(stage + CHUNK * BAND_PITCH + channel * WEIGHT_PITCH + i);
                #pragma unroll
                for (int k = 0; k < 4; k++) weight[i + k] = quad.v[k];
            }
            #pragma unroll
            for (int line = 0; line < PIXELS + SHIFTS_H - 1; line++)
                #pragma unroll
                for (int b = 0; b < SHIFTS_W; b++) {
                    float v = band[line * BAND_COLUMNS + b];
                    #pragma unroll
                    for (int p = 0; p < PIXELS; p++) {
                        const int a = line - p;
                        if (a < 0 || a >= SHIFTS_H) continue;
                        #pragma unroll
                        for (int phase = 0; phase < STRIDE_H * STRIDE_W; phase++) {
                            const int kh = phase / STRIDE_W + PAD_H - (FIRST_H + a) * STRIDE_H,
                                      kw = phase % STRIDE_W + PAD_W - (FIRST_W + b) * STRIDE_W;
                            if (kh < 0 || kh >= KERNEL_H || kw < 0 || kw >= KERNEL_W) continue;
                            #pragma unroll
                            for (int oc = 0; oc < OUT_CHANNELS; oc++)
                                of_few[oc * SUMS + p * STRIDE_H * STRIDE_W + phase] +=
                                    v * weight[(oc * KERNEL_H + kh) * KERNEL_W + kw];
                        }
                    }
                }
            if (channel % 4 != 3) continue;
            #pragma unroll
            for (int i = 0; i < OUT_CHANNELS * SUMS; i++) sums[i] += of_few[i], of_few[i] = 0;
        }
        __syncthreads();
        float* read = stage;
        stage = next, next = read;
    }
    cp_async_wait<0>();

    int ow = (tile_w + column) * STRIDE_W;
    enum { TURNED = CHANNELS_LAST ? OUT_CHANNELS : 1, LINE = STRIDE_W * TURNED };  // neighbours in memory
    enum { WIDTH = LINE % 4 == 0 ? 4 : LINE % 2 == 0 ? 2 : 1 };
    bool wide = out_w * TURNED % WIDTH == 0 && ow + STRIDE_W <= out_w;
    #pragma unroll
    for (int i = 0; i < OUT_CHANNELS / TURNED * ROWS; i++) {
        int oh = (tile_h + row) * STRIDE_H + i % ROWS;
        if (oh >= out_h) continue;
        float line[LINE];
        #pragma unroll
        for (int j = 0; j < LINE; j++)
            line[j] = sums[(i / ROWS + j % TURNED) * SUMS + i % ROWS * STRIDE_W + j / TURNED];
        float* to = y + place(image, i / ROWS, oh, ow, OUT_CHANNELS, out_h, out_w);
        #pragma unroll
        for (int j = 0; j < LINE; j += WIDTH)
            if (wide) *(Packed<float, WIDTH>*)(to + j) = *(const Packed<float, WIDTH>*)(line + j);
            else
                #pragma unroll
                for (int k = j; k < j + WIDTH; k++)
                    if (ow + k / TURNED < out_w) to[k] = line[k];
    }
}
