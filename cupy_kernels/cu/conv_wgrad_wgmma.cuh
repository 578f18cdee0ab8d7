// The sums of conv_wgrad_mma.cu by wgmma (sm_90a): x in registers, dy read from shared memory by the tensor cores on
// their own. Input channels are the rows of the products; each of two warpgroups has half of the tile's output
// channels.
//
// Shared memory: positions, each a column of x and one of dy, as blocks of 16 lines of 64 channels; with SPLIT 2 such a
// line has the values of two (fp16_tiles.cuh), and the next block their residuals. A block begins at a multiple of 1024
// bytes, so that wgmma's swizzle is that of line_offset, and a tap is another block.
//
// A third warpgroup copies. It waits until a stage is empty, which each warp of the others says when no tensor core can
// still read it for that warp, and says which stages are full when their copies have come.
//
// With SPLIT 2 (fp16_tiles.cuh) the sums start from zero for each tap and stage: one warpgroup adds up while the tensor
// cores work for the other.
#pragma once
#include "wgmma.cuh"
#include "mbarrier.cuh"

#define TILES_N (TILE_OC / 16)           // of 8 output channels of a warpgroup
#define GROUPS_OC ((TILE_OC + 63) / 64)  // of 64 channels: of each warpgroup, or one of both
#define BLOCK_BYTES (BAND_ROWS * LINE_BYTES)
#define POSITION_BYTES ((1 + GROUPS_OC) * SPLIT * BLOCK_BYTES)
#define BACK ((TAPS_W - 1 + COLUMNS - 1) / COLUMNS)  // stages before a column's own in which its dy may lie
#define PRODUCERS 128
#define CONSUMERS 256
enum { IN_FLIGHT = 2 };  // stages whose copies are not waited for
// In shared memory, of 16 bytes; of the ring's barriers, `full` and `empty` of each stage.
enum { ZEROS_OFFSET = STAGES * COLUMNS * POSITION_BYTES, BARRIERS_OFFSET = ZEROS_OFFSET + 16 };
static_assert(
    THREADS == PRODUCERS + CONSUMERS && TILE_IC == 64, "two warpgroups, each with all input channels of the block");
static_assert(TILE_OC == 16 * TILES_N, "a warpgroup has half of the output channels");
static_assert(
    SPLIT == 1 ? COLUMNS % 2 == 0 : COLUMNS <= 2 && IN_W % COLUMNS == 0,
    "two columns of registers, and no stage ends beyond x");
static_assert(STAGES >= BACK + 3 + IN_FLIGHT, "stages that are multiplied, and those that are copied meanwhile");
template <int> struct Multiply {};  // picks the loop
static_assert(
    BARRIERS_OFFSET + 2 * STAGES * sizeof(MBarrier) == SHARED_BYTES,
    "the ring, the zeros and the barriers are all of the shared memory");

struct MainLoop {
    const half_t *x, *dy;
    float* partial;
    const Tile& tile;
    u8* ring;
    MBarrier *full, *empty;
    int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warpgroup = __shfl_sync(0xFFFFFFFFu, warp / 4, 0);
    int first_ic = tile.ic_tile * TILE_IC + warp % 4 * 16,
        first_oc = tile.oc_tile * TILE_OC + warpgroup * (TILE_OC / 2);
    bool active = OUT_CHANNELS % TILE_OC == 0 || first_oc < OUT_CHANNELS, first = true;
    // This lane's of ldmatrix.
    const u8* x_row = ring + line_offset(lane % 8 + lane / 16 * 8, warp % 4 * 2 + lane / 8 % 2);
    WgmmaLines dy_lines = {
        ring + (GROUPS_OC == 1 ? 1 : 1 + warpgroup) * SPLIT * BLOCK_BYTES, GROUPS_OC == 1 ? warpgroup * TILES_N : 0};
    float sums[TAPS_W][TILES_N][4] = {};

    // A thread takes a part of a row's lines. Eight lanes write whole lines: writes to eight places would take turns.
    __device__ __forceinline__ void fetch(int stage) const {
        Copies copies(tile, stage);
        enum { PARTS = 8 / SPLIT };  // of values
        int iw = tile.column_of(stage), ow = tile.partner(iw, TAPS_W - 1);
        int first_chunk = copies.part / PARTS, offset = copies.part % PARTS * 16;
        u8* to = ring + stage % STAGES * COLUMNS * POSITION_BYTES + line_offset(copies.row, copies.part);
        // 64 channels of `width` columns, of which `from` is `column`.
        auto copy = [&](int block, const u8* from, bool valid, int width, int column, int step) {
            #pragma unroll
            for (int i = 0; i < COLUMNS * SPLIT; i++) {
                int c = i / SPLIT, residual = i % SPLIT;
                cp_async_16(
                    to + c * POSITION_BYTES + (block * SPLIT + residual) * BLOCK_BYTES,
                    from + offset + c * step + residual * PARTS * 16, valid && column + c >= 0 && column + c < width);
            }
        };
        int chunk = tile.ic_tile * SPLIT + first_chunk;
        bool real = copies.valid && chunk < X_CHUNKS && copies.has_channels(chunk);
        copy(0, copies.x(x, chunk, iw), real, IN_W, iw, X_STEP);
        #pragma unroll 1  // unrolled, addresses would take more registers
        for (int group = 0; group < GROUPS_OC; group++) {
            int chunk = (tile.oc_tile * GROUPS_OC + group) * SPLIT + first_chunk;
            copy(1 + group, copies.dy(dy, chunk, ow), copies.valid && chunk < DY_CHUNKS, OUT_W, ow, LINE_BYTES);
        }
    }
    // How often a stage's place in the ring was used before, of which barriers tell odd from even.
    __device__ static int lap(int stage) { return stage / STAGES & 1; }
    __device__ __forceinline__ void produce() const {
        for (int stage = 0; stage < tile.stages + IN_FLIGHT; stage++) {
            if (stage < tile.stages) {
                mbarrier_wait(empty[stage % STAGES], lap(stage) ^ 1);
                fetch(stage);
            }
            cp_async_commit();
            if (stage < IN_FLIGHT) continue;
            cp_async_wait<IN_FLIGHT>();
            fence_async_proxy();
            mbarrier_arrive(full[(stage - IN_FLIGHT) % STAGES]);
        }
    }
    __device__ __forceinline__ void wait(int stage) const { mbarrier_wait(full[stage % STAGES], lap(stage)); }
    // No multiplication of this warp reads `stage` any more.
    __device__ __forceinline__ void release(int stage) const {
        if (stage >= 0) mbarrier_arrive(empty[stage % STAGES]);
    }
    // The column of dy `c` positions from where the stage in `slot` begins, a little before that or in it.
    __device__ __forceinline__ WgmmaLines dy_column(int slot, int c) const {
        int position = slot * COLUMNS + c;
        return dy_lines.moved((c < 0 && position < 0 ? position + STAGES * COLUMNS : position) * POSITION_BYTES);
    }
    __device__ __forceinline__ void store_sums() {
        #pragma unroll
        for (int t = 0; t < TAPS_W; t++) {
            wgmma_arrived<TILES_N>(sums[t]);
            if (!active || t < tile.first_tap) continue;
            float* to =
                partial + (tile.tap(t) * IN_CHANNELS + first_ic + lane / 4) * OUT_CHANNELS + first_oc + lane % 4 * 2;
            auto place = [&](int i) { return (Packed<float, 2>*)(to + i % 2 * 8 * OUT_CHANNELS + i / 2 * 8); };
            auto exists = [&](int i) { return first_ic < IN_CHANNELS && first_oc + i / 2 * 8 < OUT_CHANNELS; };
            store_chain(sums[t], first, place, exists);
        }
        first = false;
    }

    __device__ __forceinline__ void run(Multiply<1>) {
        unsigned fragments[2][4];
        for (int stage = 0; stage < tile.stages; stage++) {
            wait(stage);
            int slot = stage % STAGES;
            #pragma unroll
            for (int c = 0; c < COLUMNS; c++) {
                int column = tile.column_of(stage) + c;
                unsigned (&a)[4] = fragments[c % 2];
                auto multiply_column = [&](const bool inner) __attribute__((always_inline)) {
                    wgmma_fence();
                    #pragma unroll
                    for (int t = 0; t < TAPS_W; t++)
                        if (inner || tile.has_partner(column, t))
                            wgmma<TILES_N>(sums[t], a, dy_column(slot, c + t - (TAPS_W - 1)));
                    wgmma_commit();
                };
                if (active && column >= 0 && column < IN_W) {
                    // Of the columns before this one, two may be under way at a barrier. The one before that had this
                    // one's registers; where their number is odd, the next band's first column has the registers of
                    // this one's last.
                    if (IN_W % 2 && column == 0) wgmma_wait<0>();
                    else wgmma_wait<1>();
                    ldmatrix_x4_transposed(a, x_row + (slot * COLUMNS + c) * POSITION_BYTES);
                    if (tile.inner(column)) multiply_column(true);
                    else multiply_column(false);
                }
                // Two columns of the stage before may still be under way, if this stage lies before x.
                if (c == 1) release(stage - BACK - 2);
            }
            // Where a stage ends beyond x, the two columns that are under way may begin a stage earlier.
            if (IN_W % COLUMNS && tile.column_of(stage) + COLUMNS > IN_W) wgmma_wait<0>();
            if (tile.ends_chain(stage)) wgmma_wait<0>(), store_sums();
        }
    }

    __device__ __forceinline__ void run(Multiply<2>) {
        // A stage's columns of x for tap t. Where a column of dy does not exist it is zeros here, and for its tap so is
        // that of x: 0 * NaN is NaN.
        u8* zeros = ring + ZEROS_OFFSET;
        unsigned fragments[COLUMNS][2][4];
        auto load = [&](int stage, int t) __attribute__((always_inline)) {
            #pragma unroll
            for (int c = 0; c < COLUMNS; c++) {
                bool has = tile.has_partner(tile.column_of(stage) + c, t);
                const u8* row = x_row + (stage % STAGES * COLUMNS + c) * POSITION_BYTES;
                #pragma unroll
                for (int part = 0; part < 2; part++)
                    ldmatrix_x4_transposed(fragments[c][part], has ? row + part * BLOCK_BYTES : zeros);
            }
        };
        float products[TILES_N][4] = {};
        wait(0);
        load(0, 0);
        for (int stage = 0; stage < tile.stages; stage++) {
            int slot = stage % STAGES, column = tile.column_of(stage);
            bool inner = tile.inner(column, COLUMNS);
            if (active && column >= 0) {
                #pragma unroll
                for (int t = 0; t < TAPS_W; t++) {
                    wgmma_fence();
                    #pragma unroll
                    for (int product = 0; product < 3; product++)
                        #pragma unroll
                        for (int c = 0; c < COLUMNS; c++) {
                            WgmmaLines right =
                                dy_column(slot, c + t - (TAPS_W - 1)).moved(product == 1 ? BLOCK_BYTES : 0);
                            wgmma<TILES_N>(products, fragments[c][product == 0], right, product + c > 0);
                        }
                    wgmma_commit();
                    if (t == TAPS_W - 1 && stage + 1 < tile.stages) wait(stage + 1);
                    wgmma_wait<0>();
                    wgmma_arrived<TILES_N>(products);
                    if (t == TAPS_W - 1) load(stage + 1, 0);  // past the last stage this is nothing that anybody uses
                    else if (!inner) {
                        bool changes = false;  // in which columns have a partner
                        #pragma unroll
                        for (int c = 0; c < COLUMNS; c++)
                            changes |= tile.has_partner(column + c, t) != tile.has_partner(column + c, t + 1);
                        if (changes) load(stage, t + 1);
                    }
                    #pragma unroll
                    for (int i = 0; i < TILES_N * 4; i++) sums[t][i / 4][i % 4] += products[i / 4][i % 4];
                    wgmma_arrived<TILES_N>(sums[t]);  // see conv_wgmma.cuh
                }
            } else {
                if (stage + 1 < tile.stages) wait(stage + 1);
                load(stage + 1, 0);
            }
            release(stage - BACK);
            if (tile.ends_chain(stage)) store_sums();
        }
    }
};

__device__ inline void sum_pixels(const half_t* x, const half_t* dy, float* partial, const Tile& tile, u8* ring) {
    MBarrier *full = (MBarrier*)(ring + BARRIERS_OFFSET), *empty = full + STAGES;
    if (threadIdx.x == 0) {
        for (int i = 0; i < STAGES; i++) mbarrier_init(full[i], PRODUCERS), mbarrier_init(empty[i], CONSUMERS);
        *(uint4*)(ring + ZEROS_OFFSET) = make_uint4(0, 0, 0, 0);  // see run(Multiply<2>)
    }
    fence_async_proxy();
    __syncthreads();
    MainLoop loop = {x, dy, partial, tile, ring, full, empty};
    if (loop.warpgroup == CONSUMERS / 128) {
        fewer_registers<40>();
        loop.produce();
    } else {
        more_registers<232>();
        loop.run(Multiply<SPLIT>());
    }
}
