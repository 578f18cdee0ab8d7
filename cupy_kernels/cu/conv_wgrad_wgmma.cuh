// The sums of conv_wgrad_mma.cu for sm_90a, by wgmma: x in registers, dy read from shared memory by the tensor cores on
// their own.
//
// A block owns 64 input channels, the rows of the products, and 16 TILES_N output channels, half of them each
// warpgroup's.
//
// Shared memory: a ring of STAGES stages of COLUMNS positions, each a column of x and one of dy, as blocks of 16 lines
// of 64 channels; with SPLIT 2 such a line has the values of two (fp16_tiles.cuh), and the next block their rests. A
// block begins at a multiple of 1024 bytes, so that wgmma's swizzle is that of line_offset, and a tap is another block.
// Position 0 of a band is the first column of dy that a tap needs, x begins LEAD positions later. A stage is refilled
// when no tensor core can still read it: after a barrier before which everybody has waited for all but the youngest
// multiplications.
//
// Tensor cores truncate when they add to an accumulator. With SPLIT 2 they start from zero for each tap and stage, with
// the small products first, and ordinary additions add up what comes out: one warpgroup adds while the tensor cores
// work for the other.
//
// Macros: TILE_IC (64), TILES_N (tiles of 8 output channels of a warpgroup).
#pragma once
#include "wgmma.cuh"

#define TILE_OC (16 * TILES_N)
#define GROUPS_OC ((TILE_OC + 63) / 64)  // of 64 channels: of each warpgroup, or one of both
#define OC_TILES ((OUT_CHANNELS + TILE_OC - 1) / TILE_OC)
#define LEAD ((TAPS_W - 1 + COLUMNS - 1) / COLUMNS * COLUMNS)  // positions before x begins
#define BLOCK_BYTES (BAND_ROWS * LINE_BYTES)
#define POSITION_BYTES ((1 + GROUPS_OC) * SPLIT * BLOCK_BYTES)
#define BAND_STAGES ((LEAD + IN_W + COLUMNS - 1) / COLUMNS)
#define AHEAD (STAGES - 1 - (TAPS_W + COLUMNS) / COLUMNS)   // stages that are on their way
enum { ZEROS_OFFSET = STAGES * COLUMNS * POSITION_BYTES };  // in shared memory, of 16 bytes
static_assert(THREADS == 256 && TILE_IC == 64, "two warpgroups, each with all input channels of the block");
static_assert(TILES == KERNEL_H * TAP_GROUPS * OC_TILES * ((IN_CHANNELS + TILE_IC - 1) / TILE_IC), "tiles make dw");
static_assert(
    SPLIT == 1 ? COLUMNS % 2 == 0 : COLUMNS <= 2 && IN_W % COLUMNS == 0,
    "two columns of registers, and no stage ends beyond x");
static_assert(AHEAD >= 1, "a stage is on its way while another one is multiplied");
static_assert(ZEROS_OFFSET + 16 == SHARED_BYTES, "the ring and the zeros are all of the shared memory");

__device__ inline void sum_pixels(
    const half_t* x, const half_t* dy, float* partial, int images, int bands_per_split, u8* ring) {
    int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warpgroup = __shfl_sync(0xFFFFFFFFu, warp / 4, 0);
    int tile = blockIdx.x % TILES, split = blockIdx.x / TILES;
    int kh = tile % KERNEL_H, tap_group = tile / KERNEL_H % TAP_GROUPS;
    int oc_tile = tile / (KERNEL_H * TAP_GROUPS) % OC_TILES, ic_tile = tile / (KERNEL_H * TAP_GROUPS * OC_TILES);
    int kw = min(tap_group * TAPS_W, KERNEL_W - TAPS_W);  // the last group may repeat taps of the one before
    int first_oc = oc_tile * TILE_OC + warpgroup * (TILE_OC / 2);
    bool active = OUT_CHANNELS % TILE_OC == 0 || first_oc < OUT_CHANNELS;
    int rows = images * IN_H, bands = (rows + BAND_ROWS - 1) / BAND_ROWS;
    int first_band = split * bands_per_split, stages = min(bands_per_split, bands - first_band) * BAND_STAGES;

    // A thread takes a part of a row's lines in every other position. Eight lanes write whole lines: writes to eight
    // places would take turns.
    auto fetch = [&](int stage) {
        if (stage < stages) {
            int row = threadIdx.x / 8 % BAND_ROWS, part = threadIdx.x % 8, loader = threadIdx.x / 128;
            int row_of_all = (first_band + stage / BAND_STAGES) * BAND_ROWS + row;
            int image = row_of_all / IN_H, ih = row_of_all % IN_H, oh = ih - PAD_H + kh;
            bool valid = row_of_all < rows && oh >= 0 && oh < OUT_H;
            int position = stage % BAND_STAGES * COLUMNS + loader;
            u8* to = ring + (stage % STAGES * COLUMNS + loader) * POSITION_BYTES + line_offset(row, part);
            enum { PARTS = 8 / SPLIT };  // of values
            // 64 channels, those of the source's chunk `chunk` and following ones, of `chunks`.
            auto copy = [&](int block, const half_t* source, int chunk, int chunks, int height, int width, int h,
                            int column) {
                chunk += part / PARTS;
                const u8* from = (const u8*)source +
                                 ((((i64)image * chunks + chunk) * height + h) * width + column) * LINE_BYTES +
                                 part % PARTS * 16;
                #pragma unroll
                for (int i = 0; i < (COLUMNS + 1) / 2 * SPLIT; i++) {
                    int c = i / SPLIT * 2, rest = i % SPLIT;
                    if (COLUMNS == 1 && loader) break;
                    cp_async_16(
                        to + c * POSITION_BYTES + (block * SPLIT + rest) * BLOCK_BYTES,
                        from + c * LINE_BYTES + rest * PARTS * 16,
                        valid && chunk < chunks && column + c >= 0 && column + c < width);
                }
            };
            copy(0, x, ic_tile * SPLIT, X_CHUNKS, IN_H, IN_W, ih, position - LEAD);
            #pragma unroll 1  // unrolled, addresses would take more registers
            for (int group = 0; group < GROUPS_OC; group++)
                copy(
                    1 + group, dy, (oc_tile * GROUPS_OC + group) * SPLIT, DY_CHUNKS, OUT_H, OUT_W, oh,
                    position - LEAD + TAPS_W - 1 - PAD_W + kw);
        }
        cp_async_commit();
    };
    auto arrive = [&]() {
        cp_async_wait<AHEAD - 1>();
        fence_async_proxy();
        __syncthreads();
    };

    // Columns of x [inner_first, inner_end) have a partner for every tap.
    int inner_first = max(0, PAD_W - kw), inner_end = min(IN_W, OUT_W + PAD_W - kw - (TAPS_W - 1));
    auto has_partner = [&](int column, int t) {
        int ow = column - PAD_W + kw + t;
        return column >= 0 && column < IN_W && ow >= 0 && ow < OUT_W;
    };
    // This lane's of ldmatrix.
    const u8* x_row = ring + line_offset(lane % 8 + lane / 16 * 8, warp % 4 * 2 + lane / 8 % 2);
    WgmmaLines dy_packed(
        ring + (GROUPS_OC == 1 ? 1 : 1 + warpgroup) * SPLIT * BLOCK_BYTES, GROUPS_OC == 1 ? warpgroup * TILES_N : 0);
    // The column of dy `c` positions from where the stage in `slot` begins, a little before that or in it.
    auto dy_column = [&](int slot, int c) {
        int position = slot * COLUMNS + c;
        return dy_packed.moved((c < 0 && position < 0 ? position + STAGES * COLUMNS : position) * POSITION_BYTES);
    };
    float sums[TAPS_W][TILES_N][4] = {};

    auto store_sums = [&](bool first) {
        #pragma unroll
        for (int t = 0; t < TAPS_W; t++) {
            wgmma_arrived<TILES_N>(sums[t]);
            if (!active || kw + t < tap_group * TAPS_W) continue;
            i64 row = ((i64)split * TAPS + kh * KERNEL_W + kw + t) * IN_CHANNELS + ic_tile * TILE_IC + warp % 4 * 16 +
                      lane / 4;
            float* to = partial + row * OUT_CHANNELS + first_oc + lane % 4 * 2;
            auto place = [&](int i) { return (Packed<float, 2>*)(to + i % 2 * 8 * OUT_CHANNELS + i / 2 * 8); };
            auto exists = [&](int i) {
                return ic_tile * TILE_IC + warp % 4 * 16 < IN_CHANNELS && first_oc + i / 2 * 8 < OUT_CHANNELS;
            };
            store_chain(sums[t], first, place, exists);
        }
    };

    for (int stage = 0; stage < AHEAD; stage++) fetch(stage);
    bool first = true;
#if SPLIT == 1
    unsigned fragments[2][4];
    for (int stage = 0; stage < stages; stage++) {
        arrive();
        int slot = stage % STAGES, first_column = stage % BAND_STAGES * COLUMNS - LEAD;
        #pragma unroll
        for (int c = 0; c < COLUMNS; c++) {
            int column = first_column + c;
            unsigned (&a)[4] = fragments[c % 2];
            auto multiply_column = [&](const bool inner) __attribute__((always_inline)) {
                wgmma_fence();
                #pragma unroll
                for (int t = 0; t < TAPS_W; t++)
                    if (inner || has_partner(column, t))
                        wgmma<TILES_N>(sums[t], a, dy_column(slot, c + t - (TAPS_W - 1)));
                wgmma_commit();
            };
            if (active && column >= 0 && column < IN_W) {
                // Of the columns before this one, two may be under way at a barrier. The one before that had this one's
                // registers; where their number is odd, the next band's first column has the registers of this one's
                // last.
                if (IN_W % 2 && column == 0) wgmma_wait<0>();
                else wgmma_wait<1>();
                ldmatrix_x4_transposed(a, x_row + (slot * COLUMNS + c) * POSITION_BYTES);
                if (column >= inner_first && column < inner_end) multiply_column(true);
                else multiply_column(false);
            }
            if (c == 1) fetch(stage + AHEAD);  // not right after the barrier, when the tensor cores have least to do
        }
        if ((stage + 1) % (BAND_STAGES * CHAIN_BANDS) == 0 || stage + 1 == stages)
            wgmma_wait<0>(), store_sums(first), first = false;
    }
#else
    // A stage's columns of x for tap t. Where a column of dy does not exist it is zeros here, and for its tap so is
    // that of x: 0 * NaN is NaN.
    u8* zeros = ring + ZEROS_OFFSET;
    if (threadIdx.x == 0) *(uint4*)zeros = make_uint4(0, 0, 0, 0);
    unsigned fragments[COLUMNS][SPLIT][4];
    auto load = [&](int stage, int t) __attribute__((always_inline)) {
        #pragma unroll
        for (int c = 0; c < COLUMNS; c++) {
            bool has = has_partner(stage % BAND_STAGES * COLUMNS - LEAD + c, t);
            const u8* row = x_row + (stage % STAGES * COLUMNS + c) * POSITION_BYTES;
            #pragma unroll
            for (int part = 0; part < SPLIT; part++)
                ldmatrix_x4_transposed(fragments[c][part], has ? row + part * BLOCK_BYTES : zeros);
        }
    };
    float products[TILES_N][4] = {};
    arrive();
    load(0, 0);
    for (int stage = 0; stage < stages; stage++) {
        int slot = stage % STAGES, first_column = stage % BAND_STAGES * COLUMNS - LEAD;
        bool inner = first_column >= inner_first && first_column + COLUMNS <= inner_end;
        if (active && first_column >= 0) {
            #pragma unroll
            for (int t = 0; t < TAPS_W; t++) {
                wgmma_fence();
                #pragma unroll
                for (int product = 0; product < 3; product++)  // rest * value, value * rest, value * value
                    #pragma unroll
                    for (int c = 0; c < COLUMNS; c++) {
                        WgmmaLines right = dy_column(slot, c + t - (TAPS_W - 1)).moved(product == 1 ? BLOCK_BYTES : 0);
                        wgmma<TILES_N>(products, fragments[c][product == 0], right, product + c > 0);
                    }
                wgmma_commit();
                if (t == 0) fetch(stage + AHEAD);
                if (t == TAPS_W - 1) arrive();
                wgmma_wait<0>();
                wgmma_arrived<TILES_N>(products);
                if (t == TAPS_W - 1) load(stage + 1, 0);  // past the last stage this is nothing that anybody uses
                else if (!inner) {
                    bool changes = false;  // in which columns have a partner
                    #pragma unroll
                    for (int c = 0; c < COLUMNS; c++)
                        changes |= has_partner(first_column + c, t) != has_partner(first_column + c, t + 1);
                    if (changes) load(stage, t + 1);
                }
                #pragma unroll
                for (int i = 0; i < TILES_N * 4; i++) sums[t][i / 4][i % 4] += products[i / 4][i % 4];
                wgmma_arrived<TILES_N>(sums[t]);  // see conv_wgmma.cuh
            }
        } else {
            fetch(stage + AHEAD);
            arrive();
            load(stage + 1, 0);
        }
        if ((stage + 1) % (BAND_STAGES * CHAIN_BANDS) == 0 || stage + 1 == stages) store_sums(first), first = false;
    }
#endif
}
