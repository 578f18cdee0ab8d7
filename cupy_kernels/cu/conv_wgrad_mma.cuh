// The sums of conv_wgrad_mma.cu by mma.sync: products of dy (rows oc) and x (columns ic). Fragments of TAPS_W
// neighbouring columns of dy wait in registers (`window`), and each column of x and of dy is read from shared memory
// once for all taps.
//
// A block owns TILE_OC output channels and one chunk of input channels, a warp 16 output channels. A stage of the ring
// has COLUMNS columns: position 0 of a band is the first column of dy that a tap needs, and TAPS_W - 1 positions later
// x begins.
#pragma once
#include "mma.cuh"

#define WARPS (THREADS / 32)  // 4 or 8
#define TILE_OC (16 * WARPS)
#define TILE_CHUNKS (TILE_OC / CHUNK_CHANNELS)                                      // of dy
#define PAIRS ((IN_CHANNELS < CHUNK_CHANNELS ? IN_CHANNELS : CHUNK_CHANNELS) / 16)  // of n8-tiles of input channels
#define OC_TILES ((OUT_CHANNELS + TILE_OC - 1) / TILE_OC)

#define COLUMN_BYTES (BAND_ROWS * LINE_BYTES)
#define SLOT_BYTES ((1 + TILE_CHUNKS) * COLUMNS * COLUMN_BYTES)  // x, then each chunk of dy
#define BAND_STAGES ((IN_W + TAPS_W - 1 + COLUMNS - 1) / COLUMNS)
#define BUFFERS (SPLIT == 1 ? 2 : 1)
static_assert(WARPS % 4 == 0 && TILES == KERNEL_H * TAP_GROUPS * OC_TILES * X_CHUNKS, "tiles make dw");
static_assert(COLUMNS % TAPS_W == 0, "a stage is a multiple of the window");
static_assert(STAGES >= 2 && STAGES * SLOT_BYTES == SHARED_BYTES, "the ring is all of the shared memory");

typedef float Sums[2 * PAIRS][4];  // of a tap: [8 input channels][fragment c of mma.cuh]

// sums += a b over 16 pixels. With SPLIT 2 an ordinary addition adds the three products, as in conv_mma.cuh.
__device__ __forceinline__ void multiply(
    Sums& sums, const unsigned (&a)[SPLIT][4], const unsigned (&b)[SPLIT][PAIRS][4]) {
    if (SPLIT == 1) {
        #pragma unroll
        for (int n = 0; n < 2 * PAIRS; n++)
            mma_m16n8k16(sums[n], a[0], b[0][n / 2][n % 2 * 2], b[0][n / 2][n % 2 * 2 + 1]);
        return;
    }
    Sums partial = {};
    #pragma unroll
    for (int product = 0; product < 3; product++)  // rest * value, value * rest, value * value
        #pragma unroll
        for (int n = 0; n < 2 * PAIRS; n++) {
            const unsigned (&right)[4] = b[product == 1 ? SPLIT - 1 : 0][n / 2];
            mma_m16n8k16(partial[n], a[product == 0 ? SPLIT - 1 : 0], right[n % 2 * 2], right[n % 2 * 2 + 1]);
        }
    #pragma unroll
    for (int i = 0; i < 8 * PAIRS; i++) sums[i / 4][i % 4] += partial[i / 4][i % 4];
}

__device__ inline void sum_pixels(
    const half_t* x, const half_t* dy, float* partial, int images, int bands_per_split, u8* ring) {
    int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    int tile = blockIdx.x % TILES, split = blockIdx.x / TILES;
    int kh = tile % KERNEL_H, tap_group = tile / KERNEL_H % TAP_GROUPS;
    int oc_tile = tile / (KERNEL_H * TAP_GROUPS) % OC_TILES, ic_chunk = tile / (KERNEL_H * TAP_GROUPS * OC_TILES);
    int kw = min(tap_group * TAPS_W, KERNEL_W - TAPS_W);  // the last group may repeat taps of the one before
    int first_oc = oc_tile * TILE_OC + warp * 16;
    bool active = OUT_CHANNELS % TILE_OC == 0 || first_oc < OUT_CHANNELS;
    int rows = images * IN_H, bands = (rows + BAND_ROWS - 1) / BAND_ROWS;
    int first_band = split * bands_per_split, stages = min(bands_per_split, bands - first_band) * BAND_STAGES;

    auto fetch = [&](int stage) {
        if (stage < stages) {
            int row = threadIdx.x / 8 % BAND_ROWS, part = threadIdx.x % 8, loader = threadIdx.x / 128;
            int row_of_all = (first_band + stage / BAND_STAGES) * BAND_ROWS + row;
            int image = row_of_all / IN_H, ih = row_of_all % IN_H, oh = ih - PAD_H + kh;
            bool valid = row_of_all < rows && oh >= 0 && oh < OUT_H;
            int position = stage % BAND_STAGES * COLUMNS, iw = position - (TAPS_W - 1), ow = position - PAD_W + kw;
            u8* to = ring + stage % STAGES * SLOT_BYTES + line_offset(row, part);
            const u8* from =
                (const u8*)x + ((((i64)image * X_CHUNKS + ic_chunk) * IN_H + ih) * IN_W + iw) * LINE_BYTES + part * 16;
            #pragma unroll
            for (int i = 0; i < (COLUMNS + WARPS / 4 - 1) / (WARPS / 4); i++) {
                int c = i * (WARPS / 4) + loader;
                if (c < COLUMNS)
                    cp_async_16(to + c * COLUMN_BYTES, from + c * LINE_BYTES, valid && iw + c >= 0 && iw + c < IN_W);
            }
            #pragma unroll 1  // at most two; unrolled, their addresses would take registers from the sums
            for (int i = 0; i < TILE_CHUNKS / (WARPS / 4); i++) {
                int q = i * (WARPS / 4) + loader, chunk = oc_tile * TILE_CHUNKS + q;
                const u8* from = (const u8*)dy +
                                 ((((i64)image * DY_CHUNKS + chunk) * OUT_H + oh) * OUT_W + ow) * LINE_BYTES +
                                 part * 16;
                #pragma unroll
                for (int c = 0; c < COLUMNS; c++)
                    cp_async_16(
                        to + ((1 + q) * COLUMNS + c) * COLUMN_BYTES, from + c * LINE_BYTES,
                        valid && chunk < DY_CHUNKS && ow + c >= 0 && ow + c < OUT_W);
            }
        }
        cp_async_commit();
    };

    // Columns of x [inner_first, inner_end) have a partner for every tap.
    int inner_first = max(0, PAD_W - kw), inner_end = min(IN_W, OUT_W + PAD_W - kw - (TAPS_W - 1));
    // This lane's rows of ldmatrix. dy: pixel lane % 8 + lane / 16 * 8, channels + 8 for lane / 8 odd; x: the other way
    // round.
    int oc_in_tile = warp * 16;
    int dy_row = (1 + oc_in_tile / CHUNK_CHANNELS) * COLUMNS * COLUMN_BYTES +
                 line_offset(lane % 8 + lane / 16 * 8, oc_in_tile % CHUNK_CHANNELS / 8 + lane / 8 % 2);
    int x_row = line_offset(lane % 8 + lane / 8 % 2 * 8, lane / 16);

    Sums sums[TAPS_W] = {};
    unsigned window[TAPS_W][SPLIT][4];

    auto multiply_stage = [&](int stage) __attribute__((always_inline)) {
        const u8* slot = ring + stage % STAGES * SLOT_BYTES;
        int first_column = stage % BAND_STAGES * COLUMNS - (TAPS_W - 1);
        unsigned b[BUFFERS][SPLIT][PAIRS][4];
        auto load = [&](int c) __attribute__((always_inline)) {
            #pragma unroll
            for (int part = 0; part < SPLIT; part++) {
                ldmatrix_x4_transposed(
                    window[c % TAPS_W][part], other_part(slot + dy_row, part * 4) + c * COLUMN_BYTES);
                #pragma unroll
                for (int j = 0; j < PAIRS; j++)
                    ldmatrix_x4_transposed(
                        b[c % BUFFERS][part][j], other_part(slot + x_row, part * 4 + j * 2) + c * COLUMN_BYTES);
            }
        };
        load(0);
        #pragma unroll
        for (int c = 0; c < COLUMNS; c++) {
            int column = first_column + c;
            auto multiply_column = [&](const bool inner) __attribute__((always_inline)) {
                #pragma unroll
                for (int t = 0; t < TAPS_W; t++) {
                    int ow = column - PAD_W + kw + t;
                    if (inner || (column >= 0 && column < IN_W && ow >= 0 && ow < OUT_W))
                        multiply(sums[t], window[(c + 1 + t) % TAPS_W], b[c % BUFFERS]);
                    // The first tap is the last to use the window's oldest column.
                    if (t == (BUFFERS == 2 ? 0 : TAPS_W - 1) && c + 1 < COLUMNS) load(c + 1);
                }
            };
            if (column >= inner_first && column < inner_end) multiply_column(true);
            else multiply_column(false);
            // Not right after the barrier, where no warp would keep the tensor core busy.
            if (c == 0) fetch(stage + STAGES - 1);
        }
    };

    auto store_sums = [&](bool first) {
        #pragma unroll
        for (int t = 0; t < TAPS_W; t++) {
            if (!active || kw + t < tap_group * TAPS_W) continue;
            i64 row = ((i64)split * TAPS + kh * KERNEL_W + kw + t) * OUT_CHANNELS + first_oc + lane / 4;
            float* to = partial + row * IN_CHANNELS + ic_chunk * CHUNK_CHANNELS + lane % 4 * 2;
            auto place = [&](int i) { return (Packed<float, 2>*)(to + i % 2 * 8 * IN_CHANNELS + i / 2 * 8); };
            auto exists = [&](int i) { return ic_chunk * CHUNK_CHANNELS + i / 2 * 8 < IN_CHANNELS; };
            store_chain(sums[t], first, place, exists);
        }
    };

    for (int stage = 0; stage < STAGES - 1; stage++) fetch(stage);
    bool first = true;
    for (int stage = 0; stage < stages; stage++) {
        cp_async_wait<STAGES - 2>();
        __syncthreads();
        if (active) multiply_stage(stage);
        else fetch(stage + STAGES - 1);
        if ((stage + 1) % (BAND_STAGES * CHAIN_BANDS) == 0 || stage + 1 == stages) store_sums(first), first = false;
    }
}
