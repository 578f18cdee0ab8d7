// The convolution of implicit_gemm.cuh by wgmma (sm_90a), which reads both operands from shared memory on its own.
//
// The band lies in shared memory as fp16, in parts of 8 channels, or of their residuals, ALONG bytes apart: the parts
// of a packed line (fp16_tiles.cuh), chunk after chunk. In a part, the even rows of x come before the odd ones, rows
// outside the image are zeros. Between two rows lie PITCH - IN_W zeros, right border of one and left border of the
// next; rows of y fit in a pitch, too:
//
//              GAP    IN_W       PITCH - IN_W
//             | 0 0 | x x x x x | 0 0 0 |       even rows of x; 16 bytes, 8 channels of a pixel, in each place
//                   | x x x x x | 0 0 0 |
//                   | x x x x x | 0 0 0 |       odd rows of x
//                   | x x x x x | 0 0 0 |
//
// In this order a tap is a shift: the upper (or lower) pixels of neighbouring windows, row after row of them, read
// neighbouring places, whatever the tap. So a pass takes neighbouring windows, some of which lie between two rows and
// do not exist.
//
// A third warpgroup, the producers, brings rows behind the products of the two others, the consumers: those of the
// passes and chunks that follow, and of the block's next unit, whose rows take the places of those that no later pass
// of this one reads. If a unit is one pass of a packed x, CHUNKS_HELD chunks are enough, which all others take the
// places of. Mbarriers tell consumers which rows have come, and producers which ones nobody reads any more (Barriers).
// Producers need few registers, so consumers get more.
//
// Weights are copied by the consumers: mbarriers between them and a warp of producers cost more than a barrier a step
// (benchmarks/history.md). A step of weights is 32 channels of a tap (with SPLIT 2 their values, then their residuals);
// steps come chunk by chunk, tap by tap.
// What the tensor cores still read is never written: a stage is refilled two steps later, after a barrier that follows
// everybody's wait for it.
//
// With SPLIT 2 (fp16_tiles.cuh) the sums start from zero every STEPS_AT_ONCE steps: one warpgroup adds up while the
// tensor cores work for the other. So that neither waits for the other, each copies the weights of its own channels.
//
// Macros besides those of implicit_gemm.cuh, with ADJACENT 0: UNIT_ROWS (of windows), ALONG, CHUNKS_HELD.
#pragma once
#include "wgmma.cuh"
#include "mbarrier.cuh"

#define STEPS_K ((IN_CHANNELS + 31) / 32)  // of 32 channels; those past IN_CHANNELS are zero
#define GROUPS_K (STEPS_K * 4)             // of 8 channels
#define CHUNK_STEPS (CHUNK_CHANNELS / 32)
#define GROUPS_CHUNK (CHUNK_STEPS * 4)
#define PARTS_HELD (GROUPS_K * SPLIT < CHUNKS_HELD * 8 ? GROUPS_K * SPLIT : CHUNKS_HELD * 8)
#define HALF_STEP (TILE_M * 64)  // bytes of a stage's values, and of its residuals
#define STEP_BYTES (HALF_STEP * SPLIT)
#define PITCH (2 * WINDOW_PITCH)
enum { OWN_PACE = SPLIT == 2 && WARPS_N == 1 };              // warpgroups meet only where a unit ends
enum { PRODUCER_REGISTERS = 72, CONSUMER_REGISTERS = 216 };  // of a thread, of 168 at first

// Rows of x, relative to twice the unit's first row of windows: which of them it needs, and how those of each parity
// are numbered.
enum { LOW = PAD_H - (KERNEL_H - 1), HIGH = 2 * UNIT_ROWS - 1 + PAD_H };
__device__ constexpr int first_of(int parity) { return (LOW - parity + 1) >> 1; }
__device__ constexpr int rows_of(int parity) { return ((HIGH - parity) >> 1) - first_of(parity) + 1; }
__device__ constexpr int band_row(int row) { return (row >> 1) - first_of(row & 1) + (row & 1) * rows_of(0); }
enum { BAND_ROWS = rows_of(0) + rows_of(1), BAND_PIXELS = GAP + BAND_ROWS * PITCH };
enum { RING_OFFSET = (PARTS_HELD * ALONG + 127) / 128 * 128 };
enum { EPILOGUE_OFFSET = RING_OFFSET + STAGES * STEP_BYTES };  // in dynamic shared memory
static_assert(UNIT_WINDOWS == UNIT_ROWS * WINDOW_PITCH, "a unit is rows of windows");
static_assert(!OWN_PACE || CONSUMERS == 2 * TILE_M, "a warpgroup copies two rows of 8 channels at a time");
static_assert(PITCH >= IN_W + GAP && PITCH >= OUT_W, "a pitch has room for rows of x and of y");
static_assert(
    ALONG >= BAND_PIXELS * 16 && ALONG % 128 == 16, "eight times 8 channels have the same pixel in different banks");
static_assert(PACKED_WIDTH == STEPS_K * 32 * SPLIT, "weights are packed in steps");

#define LANE_ROWS 2
#define LANE_WINDOWS ((MOST_TILES + 3) / 4 * 4)  // those past MOST_TILES are zero, and do not exist
typedef float Sums[2][LANE_WINDOWS][4];  // [upper, lower pixels of windows][8 pixels of 4 windows][c of wgmma.cuh]

__device__ __forceinline__ float sum_of(const Sums& sums, int row, int t, int corner) {
    return sums[corner / 2][t][row * 2 + corner % 2];
}

// Twice the unit's first row of windows.
__device__ inline int origin_of(const Unit& unit) { return unit.number * (2 * UNIT_ROWS); }
// Where a pixel of row `row`, counted from there, lies.
__device__ constexpr int band_offset(int row, int column) { return (GAP + band_row(row) * PITCH + column) * 16; }
// Counted from there: where the rows begin that passes from `pass` on need, and where those end that the first `count`
// of `passes` need. The last one gets all others, so that nothing is left from the unit before.
__device__ constexpr int rows_start(int pass) { return first_row_of(pass * PASS_WINDOWS); }
__device__ constexpr int rows_end(int count, int passes) {
    int end = count ? end_row_of(count * PASS_WINDOWS - 1) : LOW;
    return count < passes && end < HIGH + 1 ? end : HIGH + 1;
}

// Those that multiply meet.
__device__ inline void sync_consumers() { sync_warpgroups<CONSUMERS / 128>(0); }

enum { MOST_PASSES = passes_of(UNIT_WINDOWS - (WINDOW_PITCH - WINDOWS_W)) };  // of a unit
// A phase of each is a unit, or an attempt at one.
struct Barriers {
    // Of a pass and a chunk: its rows have come; it has read all of its rows.
    MBarrier ready[MOST_PASSES][CHUNKS], done[MOST_PASSES][CHUNKS];
    MBarrier all;  // threads of the block, which meet by different calls

    __device__ void init() {
        mbarrier_init(all, THREADS);
        for (int pass = 0; pass < MOST_PASSES; pass++)
            for (int chunk = 0; chunk < CHUNKS; chunk++) {
                mbarrier_init(ready[pass][chunk], PRODUCERS);
                mbarrier_init(done[pass][chunk], CONSUMERS);
            }
    }
};

static_assert(
    CHUNKS_HELD == CHUNKS || (CHUNKS_HELD < CHUNKS && MOST_PASSES == 1 && X_PACKED),
    "rows of one pass can be brought chunk by chunk");

#include "conv_wgmma_band.cuh"

// The tiles of sums from FROM on.
template <int FROM, int MOST> __device__ __forceinline__ float (&tiles_from(float (&d)[MOST][4]))
    [MOST - FROM][4] { return *(float (*)[MOST - FROM][4])(d + FROM); }

// add<COUNT, FROM, STEPS>(sums, a_stages, pixels, at, rows): COUNT tiles of sums, from FROM on, += the products of some
// steps. at: where each step's stage begins. rows: where the upper and the lower pixels of the first tile do. On return
// what the step before read may be overwritten.
template <int> struct Multiply;

template <> struct Multiply<1> {
    template <int COUNT, int FROM, int> __device__ __forceinline__ void add(
        Sums& sums, const WgmmaOperand& a_stages, const WgmmaOperand& pixels, const int (&at)[1],
        const int (&rows)[1][2]) {
        wgmma_fence();
        #pragma unroll
        for (int k = 0; k < 2; k++)
            #pragma unroll
            for (int lower = 0; lower < 2; lower++)
                wgmma<COUNT>(
                    tiles_from<FROM>(sums[lower]), a_stages.moved(at[0] + k * TILE_M * 32),
                    pixels.moved(rows[0][lower] + k * 2 * ALONG));
        wgmma_commit();
        wgmma_wait<1>();
    }
};

template <> struct Multiply<2> {
    float partial[MOST_TILES][4];

    template <int COUNT, int FROM, int STEPS> __device__ __forceinline__ void add(
        Sums& sums, const WgmmaOperand& a_stages, const WgmmaOperand& pixels, const int (&at)[STEPS],
        const int (&rows)[STEPS][2]) {
        #pragma unroll
        for (int lower = 0; lower < 2; lower++) {
            wgmma_fence();
            #pragma unroll
            for (int product = 0; product < 3; product++)
                #pragma unroll
                for (int k = 0; k < STEPS * 2; k++) {
                    WgmmaOperand left = a_stages.moved(at[k / 2] + (product == 0) * HALF_STEP + k % 2 * TILE_M * 32);
                    WgmmaOperand right = pixels.moved(rows[k / 2][lower] + ((product == 1) * 4 + k % 2 * 2) * ALONG);
                    if (product + k == 0) wgmma<COUNT, false>(partial, left, right);
                    else wgmma<COUNT>(partial, left, right);
                }
            wgmma_commit();
            wgmma_wait<0>();
            wgmma_arrived<COUNT>(partial);
            #pragma unroll
            for (int i = 0; i < COUNT * 4; i++) sums[lower][FROM + i / 4][i % 4] += partial[i / 4][i % 4];
            // Else the additions may move behind the next multiplications, with copies of what they read.
            wgmma_arrived<COUNT>(tiles_from<FROM>(sums[lower]));
        }
    }
};

// What an image's first row of windows meets in the kernel's rows from TOP_KH on lies outside x, and what its last row
// meets in those before BOTTOM_KH. So two passes leave out these products in tiles that have nothing else: the image's
// first pass in its first TOP_TILES, its last one, of BOTTOM_COUNT tiles, in those after BOTTOM_TILES. 0: in none.
enum {
    SEVERAL = WARPS_N == 1 && MOST_PASSES > 1,  // passes of a unit
    TOP_KH = 2 + PAD_H,
    TOP_TILES = SEVERAL && SPLIT == 2 && TOP_KH < KERNEL_H && WINDOW_PITCH / 4 < TILES ? WINDOW_PITCH / 4 : 0,
    BOTTOM_KH = 2 * (WINDOWS_H - 1) + PAD_H - IN_H + 1,
    BOTTOM_ROWS = WINDOWS_H - (UNITS - 1) * UNIT_ROWS,  // of windows of the last unit
    BOTTOM_PASS = passes_of(BOTTOM_ROWS * WINDOW_PITCH - (WINDOW_PITCH - WINDOWS_W)) - 1,
    BOTTOM_WINDOWS = (BOTTOM_ROWS - 1) * WINDOW_PITCH - BOTTOM_PASS * PASS_WINDOWS,  // of the pass, before the last row
    BOTTOM_COUNT = has_last_tiles(BOTTOM_WINDOWS + WINDOWS_W, true) ? LAST_TILES : TILES,
    BOTTOM_FULL = BOTTOM_WINDOWS > 0 ? (BOTTOM_WINDOWS + 3) / 4 : 0,
    BOTTOM_TILES = SEVERAL && BOTTOM_KH > 0 && BOTTOM_FULL < BOTTOM_COUNT ? BOTTOM_FULL : 0
};

struct MainLoop {
    const Unit& unit;
    Rows& band;
    WeightRing<STEP_BYTES, TAPS * STEPS_K> weights;
    int stage = 0, to = 0, warpgroup = same_in_warp(threadIdx.x / 128);
    int warp_m = warpgroup % WARPS_M, warp_n = warpgroup / WARPS_M;
    WgmmaOperand pixels, a_stages;

    __device__ MainLoop(const Unit& unit, Rows& band, const half_t* packed, u8* shared)
        : unit(unit), band(band), weights(shared + RING_OFFSET, packed), pixels(shared, ALONG, 128),
          a_stages(shared + RING_OFFSET + warp_m * 1024, TILE_M * 16, 128) {
        for (int i = 0; i < STAGES - 2; i++) fetch();
    }
    // Where the 16 bytes of a step are that a thread copies first.
    __device__ static int first_weights() {
        if (!OWN_PACE) return threadIdx.x * 16;
        return threadIdx.x % 128 / 64 * (TILE_M * 16) + threadIdx.x / 128 * 1024 + threadIdx.x % 64 * 16;
    }
    __device__ void fetch() {
        weights.fetch(to, first_weights());
        to = weights.next(to);
    }
    // Threads meet, those of the warpgroup or all, and have what they copied but for the youngest steps.
    __device__ __forceinline__ void meet(bool all) {
        cp_async_wait<STAGES - 3>();
        fence_async_proxy();
        if (all) sync_consumers();
        else sync_warpgroups(warp_m);
    }
    // Where the weights of the next step are.
    __device__ __forceinline__ int next_step() {
        meet(!OWN_PACE);
        fetch();
        int at = stage;
        stage = weights.next(stage);
        return at;
    }
    __device__ int channel() const { return warp_m * 64 + threadIdx.x / 32 % 4 * 16 + threadIdx.x % 32 / 4; }

    template <int COUNT> __device__ __forceinline__ void pass(Sums& sums, int pass, int first_window) {
        if constexpr (TOP_TILES && COUNT == TILES)
            if (agreed(unit.number == 0 && pass == 0))
                return pass_of<COUNT, 0, COUNT - TOP_TILES, TOP_TILES>(sums, pass, first_window, TOP_KH);
        if constexpr (BOTTOM_TILES && COUNT == BOTTOM_COUNT)
            if (agreed(unit.number == UNITS - 1 && pass == BOTTOM_PASS))
                return pass_of<BOTTOM_TILES, 0, COUNT, 0>(sums, pass, first_window, BOTTOM_KH);
        pass_of<0, 0, COUNT, 0>(sums, pass, first_window, 0);
    }
    // The kernel's rows before `kh` meet COUNT tiles from FROM on, those from there on others.
    template <int COUNT, int FROM, int OTHER_COUNT, int OTHER_FROM>
    __device__ __forceinline__ void pass_of(Sums& sums, int pass, int first_window, int kh) {
        Multiply<SPLIT> multiply;
        int column = 2 * (first_window - unit.first_window) + PAD_W;
        for (int chunk = 0; chunk < CHUNKS; chunk++) {
            band.wait(pass, chunk);
            if constexpr (COUNT > 0) taps<COUNT, FROM>(multiply, sums, column, chunk, 0, kh);
            taps<OTHER_COUNT, OTHER_FROM>(multiply, sums, column, chunk, kh, KERNEL_H);
            band.release(pass, chunk);
        }
    }

    // A chunk and rows [first_kh, end_kh) of the kernel. SPLIT 2 multiplies two steps before it adds: with all small
    // products first, that loses less than more additions would.
    template <int COUNT, int FROM> __device__ __forceinline__ void taps(
        Multiply<SPLIT>& multiply, Sums& sums, int column, int chunk, int first_kh, int end_kh) {
        int steps = min((int)CHUNK_STEPS, STEPS_K - chunk * CHUNK_STEPS), first_part = chunk % CHUNKS_HELD * 8;
        column += FROM * 8;
        if constexpr (SPLIT == 2) {
            int tap = first_kh * KERNEL_W, end = end_kh * KERNEL_W;
            #pragma unroll 1
            for (; tap + 1 < end; tap += 2) multiply_taps<COUNT, FROM, 2>(multiply, sums, column, first_part, tap);
            if (tap < end) multiply_taps<COUNT, FROM, 1>(multiply, sums, column, first_part, tap);
        } else
            for (int kh = first_kh; kh < end_kh; kh++) {
                int upper = band_offset(PAD_H - kh, column), lower = band_offset(1 + PAD_H - kh, column);
                #pragma unroll 1
                for (int kw = 0; kw < KERNEL_W; kw++)
                    for (int step = 0; step < steps; step++) {
                        int shift = (first_part + step * 4) * ALONG - kw * 16;
                        multiply.template add<COUNT, FROM, 1>(
                            sums, a_stages, pixels, {next_step()}, {{upper + shift, lower + shift}});
                    }
            }
        wgmma_wait<0>();
    }
    // STEPS neighbouring taps of a chunk of one step.
    template <int COUNT, int FROM, int STEPS> __device__ __forceinline__ void multiply_taps(
        Multiply<SPLIT>& multiply, Sums& sums, int column, int first_part, int first_tap) {
        int at[STEPS], rows[STEPS][2];
        #pragma unroll
        for (int i = 0; i < STEPS; i++) {
            int tap = same_in_warp(first_tap + i), kh = tap / KERNEL_W, kw = tap % KERNEL_W;
            at[i] = next_step();
            #pragma unroll
            for (int lower = 0; lower < 2; lower++)
                rows[i][lower] = first_part * ALONG + band_offset(lower + PAD_H - kh, column - kw);
        }
        multiply.template add<COUNT, FROM, STEPS>(sums, a_stages, pixels, at, rows);
    }
};

// What the block's consumers do, or with PRODUCES its producers, for one unit after another. fits(): whether the scale
// of the rows was right; if not, all passes run again.
template <bool PRODUCES, class Loop, class Epilogue> __device__ __forceinline__ void run(
    Unit& unit, Rows& band, Loop& loop, unsigned* scratch, Epilogue& epilogue) {
    for (;;) {
        for (bool again = true; again;) {
            band.begin<PRODUCES>(scratch);
            if constexpr (PRODUCES) band.produce(threadIdx.x - CONSUMERS);
            else {
                multiply_passes(unit, loop, band.exponent, epilogue);
                for (int pass = unit.passes; pass < MOST_PASSES; pass++)
                    for (int chunk = 0; chunk < CHUNKS; chunk++) band.release(pass, chunk);
            }
            again = !band.fits(scratch);
            if (again && !PRODUCES) epilogue.restart();
        }
        if (!PRODUCES) epilogue.finish(band.exponent, unit.of_all());
        if (band.last()) return;
        unit = band.following();
        band.next();
        if (!PRODUCES) sync_consumers(), epilogue.restart();  // all have read what the unit has left in shared memory
    }
}
