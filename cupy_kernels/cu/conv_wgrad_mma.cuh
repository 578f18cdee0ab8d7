// The sums of conv_wgrad_mma.cu by mma.sync: products of dy (rows oc) and x (columns ic). Fragments of TAPS_W
// neighbouring columns of dy wait in registers (`window`), and each column of x and of dy is read from shared memory
// once for all taps. A warp has 16 output channels of the tile, and all its input channels, one chunk.
#pragma once

#define WARPS (THREADS / 32)                                                        // 4 or 8
#define TILE_CHUNKS (TILE_OC / CHUNK_CHANNELS)                                      // of dy
#define PAIRS ((IN_CHANNELS < CHUNK_CHANNELS ? IN_CHANNELS : CHUNK_CHANNELS) / 16)  // of n8-tiles of input channels
#define COLUMN_BYTES (BAND_ROWS * LINE_BYTES)
#define SLOT_BYTES ((1 + TILE_CHUNKS) * COLUMNS * COLUMN_BYTES)  // x, then each chunk of dy
#define BUFFERS (SPLIT == 1 ? 2 : 1)
static_assert(WARPS % 4 == 0 && TILE_OC == 16 * WARPS && TILE_IC == CHUNK_CHANNELS, "a warp has 16 output channels");
static_assert(COLUMNS % TAPS_W == 0, "a stage is a multiple of the window");
static_assert(STAGES >= 2 && STAGES * SLOT_BYTES == SHARED_BYTES, "the ring is all of the shared memory");

typedef float Sums[2 * PAIRS][4];  // of a tap: [8 input channels][fragment c of mma.cuh]

// add(sums, a, b): sums += a b over 16 pixels.
template <int> struct Multiply;

template <> struct Multiply<1> {
    __device__ static __forceinline__ void add(
        Sums& sums, const unsigned (&a)[1][4], const unsigned (&b)[1][PAIRS][4]) {
        #pragma unroll
        for (int n = 0; n < 2 * PAIRS; n++)
            mma_m16n8k16(sums[n], a[0], b[0][n / 2][n % 2 * 2], b[0][n / 2][n % 2 * 2 + 1]);
    }
};

// From zero, see fp16_tiles.cuh.
template <> struct Multiply<2> {
    __device__ static __forceinline__ void add(
        Sums& sums, const unsigned (&a)[2][4], const unsigned (&b)[2][PAIRS][4]) {
        Sums partial = {};
        #pragma unroll
        for (int product = 0; product < 3; product++)
            #pragma unroll
            for (int n = 0; n < 2 * PAIRS; n++) {
                const unsigned (&right)[4] = b[product == 1][n / 2];
                mma_m16n8k16(partial[n], a[product == 0], right[n % 2 * 2], right[n % 2 * 2 + 1]);
            }
        #pragma unroll
        for (int i = 0; i < 8 * PAIRS; i++) sums[i / 4][i % 4] += partial[i / 4][i % 4];
    }
};

__device__ inline void sum_pixels(const half_t* x, const half_t* dy, float* partial, const Tile& tile, u8* ring) {
    int lane = threadIdx.x % 32, oc_in_tile = threadIdx.x / 32 * 16, first_oc = tile.oc_tile * TILE_OC + oc_in_tile;
    bool active = OUT_CHANNELS % TILE_OC == 0 || first_oc < OUT_CHANNELS;

    auto fetch = [&](int stage) {
        if (stage < tile.stages) {
            Copies copies(tile, stage);
            int iw = tile.column_of(stage), ow = tile.partner(iw, TAPS_W - 1);
            u8* to = ring + stage % STAGES * SLOT_BYTES + line_offset(copies.row, copies.part);
            const u8* from = copies.x(x, tile.ic_tile, iw) + copies.part * 16;
            #pragma unroll
            for (int i = 0; i < (COLUMNS + WARPS / 4 - 1) / (WARPS / 4); i++) {
                int c = i * (WARPS / 4) + copies.loader;
                bool valid = copies.valid && copies.has_channels(tile.ic_tile) && iw + c >= 0 && iw + c < IN_W;
                if (c < COLUMNS) cp_async_16(to + c * COLUMN_BYTES, from + c * (int)X_STEP, valid);
            }
            #pragma unroll 1  // at most two; unrolled, their addresses would take registers from the sums
            for (int i = 0; i < TILE_CHUNKS / (WARPS / 4); i++) {
                int q = i * (WARPS / 4) + copies.loader, chunk = tile.oc_tile * TILE_CHUNKS + q;
                const u8* from = copies.dy(dy, chunk, ow) + copies.part * 16;
                #pragma unroll
                for (int c = 0; c < COLUMNS; c++) {
                    bool valid = copies.valid && chunk < DY_CHUNKS && ow + c >= 0 && ow + c < OUT_W;
                    cp_async_16(to + ((1 + q) * COLUMNS + c) * COLUMN_BYTES, from + c * LINE_BYTES, valid);
                }
            }
        }
        cp_async_commit();
    };

    // This lane's rows of ldmatrix. dy: pixel lane % 8 + lane / 16 * 8, channels + 8 for lane / 8 odd; x: the other way
    // round.
    int dy_row = (1 + oc_in_tile / CHUNK_CHANNELS) * COLUMNS * COLUMN_BYTES +
                 line_offset(lane % 8 + lane / 16 * 8, oc_in_tile % CHUNK_CHANNELS / 8 + lane / 8 % 2);
    int x_row = line_offset(lane % 8 + lane / 8 % 2 * 8, lane / 16);

    Sums sums[TAPS_W] = {};
    unsigned window[TAPS_W][SPLIT][4];

    auto multiply_stage = [&](int stage) __attribute__((always_inline)) {
        const u8* slot = ring + stage % STAGES * SLOT_BYTES;
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
            int column = tile.column_of(stage) + c;
            auto multiply_column = [&](const bool inner) __attribute__((always_inline)) {
                #pragma unroll
                for (int t = 0; t < TAPS_W; t++) {
                    if (inner || tile.has_partner(column, t))
                        Multiply<SPLIT>::add(sums[t], window[(c + 1 + t) % TAPS_W], b[c % BUFFERS]);
                    // The first tap is the last to use the window's oldest column.
                    if (t == (BUFFERS == 2 ? 0 : TAPS_W - 1) && c + 1 < COLUMNS) load(c + 1);
                }
            };
            if (tile.inner(column)) multiply_column(true);
            else multiply_column(false);
            // Not right after the barrier, where no warp would keep the tensor core busy.
            if (c == 0) fetch(stage + STAGES - 1);
        }
    };

    auto store_sums = [&](bool first) {
        #pragma unroll
        for (int t = 0; t < TAPS_W; t++) {
            if (!active || t < tile.first_tap) continue;
            i64 row = tile.tap(t) * OUT_CHANNELS + first_oc + lane / 4;
            float* to = partial + row * IN_CHANNELS + tile.ic_tile * TILE_IC + lane % 4 * 2;
            auto place = [&](int i) { return (Packed<float, 2>*)(to + i % 2 * 8 * IN_CHANNELS + i / 2 * 8); };
            auto exists = [&](int i) { return tile.ic_tile * TILE_IC + i / 2 * 8 < IN_CHANNELS; };
            store_chain(sums[t], first, place, exists);
        }
    };

    for (int stage = 0; stage < STAGES - 1; stage++) fetch(stage);
    bool first = true;
    for (int stage = 0; stage < tile.stages; stage++) {
        cp_async_wait<STAGES - 2>();
        __syncthreads();
        if (active) multiply_stage(stage);
        else fetch(stage + STAGES - 1);
        if (tile.ends_chain(stage)) store_sums(first), first = false;
    }
}
