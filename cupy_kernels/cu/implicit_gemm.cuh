// Transposed convolution with stride 1, dilation 1 and one group on tensor cores, as an implicit GEMM: what its two
// forms share. conv_mma.cuh multiplies by mma.sync (sm_80 and newer), conv_wgmma.cuh by wgmma (sm_90a).
//
//     sums[n, m, oh, ow] = sum_{k, kh, kw} x[n, k, oh + PAD_H - kh, ow + PAD_W - kw] * w[k, m, kh, kw]
//
// dgrad is the same sum over dy with PAD' = KERNEL - 1 - PAD and flipped, transposed weights (pack_weight_fp16.cu).
//
// Rows of the product are output channels m, columns are pixels, the sum runs over input channels and taps. Pixels are
// ordered by 2x2 windows, so that an epilogue can pool: four windows make a tile, their upper pixels one n8-tile of the
// tensor cores and their lower pixels another. Windows are numbered row by row, WINDOW_PITCH a row, of which the first
// WINDOWS_W exist. A block owns one unit at a time: TILE_M channels and UNIT_WINDOWS windows of one image, in passes of
// WARPS_N x TILES tiles. A warp (with WGMMA a warpgroup) has 64 of the channels and TILES tiles of a pass, in the last
// pass of a unit LAST_TILES.
//
// Load. The rows of x that a unit needs (the band) lie in shared memory as fp16, so that a tap is a shifted read. x is
// a tensor of scalar_t, converted on the way, or with X_PACKED 1 it is packed already (fp16_tiles.cu). struct
// Band<X_PACKED>, typedef Rows, with
//     begin(scratch)                             the first pass can run under the scale of `exponent`
// Weights stream through a ring (WeightRing), a step at a time. With WGMMA, PRODUCERS threads do nothing but bring
// rows, and a block has several units, one after another: see conv_wgmma.cuh. Without, it has one.
//
// Main loop. struct MainLoop(unit, band, packed, shared), with
//     pass<TILES>(sums, pass, first_window)      the sums of a warp's tiles; Sums are its registers
//     sum_of(sums, row, t, corner)               that of the lane's channel `row` of LANE_ROWS, 8 apart, and a corner
//                                                (upper left, right, lower left, right) of its window t of LANE_WINDOWS
//
// Epilogue. The kernel's own, a struct with
//     pass(sums, place, exponent)                takes the sums of a pass, times 2^(exponent + the channel's exponent)
//     restart()                                  forgets all passes: they come again, or those of another unit
//     finish(exponent, unit)                     after the last pass of a unit
//
// Macros: those of pooled_planes.cuh and fp16_tiles.cuh, scalar_t (float, half_t, bf16_t), X_PACKED, input_t (scalar_t,
// half_t for packed tiles), CHANNELS_LAST (1: x, if not packed, and y are [N, H, W, C]), IN_CHANNELS, OUT_CHANNELS
// (multiples of 16), IN_H, IN_W, OUT_H, OUT_W, KERNEL_H, KERNEL_W, PAD_H, PAD_W, TILE_M, WARPS_N, TILES, LAST_TILES,
// THREADS, STAGES, GAP (zeros between two rows of the band), PACKED_WIDTH (pack_weight_fp16.cu), SHARED_BYTES (with the
// epilogue's), ADJACENT (1: the windows of a lane are neighbours, for wide stores; 0: those of four lanes are), WGMMA,
// and those of the form. With WGMMA only: AS_IT_IS (1: x, in channels_last, and the weights are fp16 operands as they
// lie in memory, under scales of 1). Limits: those that check_supported in conv_transpose_mma.py checks.
#pragma once
#include "common.cuh"
#include "async_copy.cuh"
#include "fp16_tiles.cuh"
#include "mma.cuh"
#include "pooled_planes.cuh"

#define TAPS (KERNEL_H * KERNEL_W)
#define PRODUCERS (WGMMA ? 128 : 0)  // the threads behind those that multiply
#define CONSUMERS (THREADS - PRODUCERS)
#define WARPS_M (TILE_M / 64)
#define PASS_WINDOWS (4 * TILES * WARPS_N)
#define MOST_TILES (TILES > LAST_TILES ? TILES : LAST_TILES)
static_assert(
    TILE_M == 64 * WARPS_M && CONSUMERS == (WGMMA ? 128 : 32) * WARPS_M * WARPS_N,
    "a warp or warpgroup has 64 channels");
static_assert(GAP >= 0 && GAP >= KERNEL_W - 1 - PAD_W, "a tap left or right of the image reads the gap");

// Scales are powers of two, so any that neither overflows nor flushes gives the same products: values of usual size are
// loaded once, under a first guess of their scale's exponent; one that is up to SLACK larger would not be better.
enum { GUESS = 10, SLACK = 6 };

// Rows of x [first, end) that a window needs, as if x had rows beyond its own.
__device__ constexpr int first_row_of(int window) { return window / WINDOW_PITCH * 2 + PAD_H - (KERNEL_H - 1); }
__device__ constexpr int end_row_of(int window) { return window / WINDOW_PITCH * 2 + 1 + PAD_H + 1; }

__device__ constexpr int passes_of(int windows) {
    enum { LARGER = (MOST_TILES - TILES) * 4 * WARPS_N };  // what the last pass can take more
    return LARGER >= windows ? 1 : (windows - LARGER + PASS_WINDOWS - 1) / PASS_WINDOWS;
}

// Whether a pass with `left` windows is one of LAST_TILES. last: the last one of a unit.
__device__ constexpr bool has_last_tiles(int left, bool last) {
    return LAST_TILES < TILES ? left <= 4 * LAST_TILES * WARPS_N : LAST_TILES > TILES && last && left > PASS_WINDOWS;
}

// What a block works on: windows [first_window, end_window), whose last one exists, and rows [first_row, end_row) of x.
struct Unit {
    i64 image;
    int number, first_window, end_window, passes, first_row, end_row;

    __device__ explicit Unit(i64 block) {
        image = block / UNITS;
        number = block % UNITS;
        first_window = number * UNIT_WINDOWS;
        end_window = min(first_window + UNIT_WINDOWS, WINDOWS_H * WINDOW_PITCH) - (WINDOW_PITCH - WINDOWS_W);
        passes = passes_of(end_window - first_window);
        first_row = max(0, first_row_of(first_window));
        end_row = min(IN_H, end_row_of(end_window - 1));
    }
    // Its number among those of all images.
    __device__ i64 of_all() const { return image * UNITS + number; }
};

// Which window of a warp's `tiles` times 4 the t-th one of lanes 4 n + quad is.
__device__ inline int lane_window(int quad, int t, int tiles) { return ADJACENT ? quad * tiles + t : t * 4 + quad; }

// The pixel of a corner of a window.
struct Pixel {
    int oh, ow;
    __device__ Pixel(int window, int corner)
        : oh(window / WINDOW_PITCH * 2 + corner / 2), ow(window % WINDOW_PITCH * 2 + corner % 2) {}
    // Of a window that exists: whether the pixel does, which an odd edge cuts off.
    __device__ bool valid() const { return (OUT_H % 2 == 0 || oh < OUT_H) && (OUT_W % 2 == 0 || ow < OUT_W); }
};

// Where the sums of a lane belong. channel: the lane's first one in the block. first_window: the warp's; end_window:
// the unit's.
struct Place {
    i64 image;
    int channel, first_window, end_window, tiles, unit;

    __device__ int window(int t) const { return first_window + lane_window(threadIdx.x % 4, t, tiles); }
    __device__ bool exists(int t) const {
        return t < tiles && window(t) < end_window &&
               (WINDOW_PITCH == WINDOWS_W || window(t) % WINDOW_PITCH < WINDOWS_W);
    }
    // Whether a pixel of a window that exists does.
    __device__ bool inside(int t, int corner) const { return Pixel(window(t), corner).valid(); }
    // All pixels exist, which is the usual case and needs no masks.
    __device__ bool full() const {
        return !WGMMA && OUT_H % 2 == 0 && OUT_W % 2 == 0 && tiles == TILES && first_window + TILES * 4 <= end_window;
    }
    __device__ int count() const { return min(tiles * 4, end_window - first_window); }
};

// Brings the weights' steps, STEPS times STEP_BYTES, one after the other into a ring of STAGES stages. Past the last
// step it begins again, for the next pass; what the last one does not need nobody reads, which is cheaper than to ask.
// A thread copies the 16 bytes at `first` of a step, and those that lie some CONSUMERS * 16 further on.
template <int STEP_BYTES, int STEPS> struct WeightRing {
    u8* ring;
    const u8* weights;
    int from = 0;

    __device__ WeightRing(u8* ring, const half_t* packed)
        : ring(ring), weights((const u8*)packed + (i64)blockIdx.y * STEPS * STEP_BYTES) {}
    // Stages are told apart by where they begin.
    __device__ static int next(int stage) { return stage + STEP_BYTES == STAGES * STEP_BYTES ? 0 : stage + STEP_BYTES; }
    __device__ static int previous(int stage) { return stage ? stage - STEP_BYTES : (STAGES - 1) * STEP_BYTES; }

    __device__ __forceinline__ void fetch(int stage, int first = threadIdx.x * 16) {
        u8* to = ring + stage + first;
        const u8* mine = weights + (from + first);
        #pragma unroll
        for (int at = 0; at < STEP_BYTES; at += CONSUMERS * 16)
            if (STEP_BYTES % (CONSUMERS * 16) == 0 || at + first < STEP_BYTES) cp_async_16(to + at, mine + at, true);
        from = from + STEP_BYTES == STEPS * STEP_BYTES ? 0 : from + STEP_BYTES;
        cp_async_commit();
    }
};

// A condition, or a number, that all lanes of the warp share. Compilers know it then, and keep operands of wgmma in
// uniform registers.
__device__ inline bool agreed(bool condition) { return __all_sync(0xFFFFFFFFu, condition); }
__device__ inline int same_in_warp(int v) { return __shfl_sync(0xFFFFFFFFu, v, 0); }

#if WGMMA
#include "conv_wgmma.cuh"
#else
#include "conv_mma.cuh"
struct Barriers {};
__device__ inline void sync_consumers() { __syncthreads(); }
#endif

// In a block's shared memory, besides the dynamic one.
struct Scratch {
    unsigned warps[32];  // of block_max
    Barriers barriers;
};

// The products of a unit.
template <class Epilogue>
__device__ __forceinline__ void multiply_passes(const Unit& unit, MainLoop& loop, int exponent, Epilogue& epilogue) {
    for (int pass = 0; agreed(pass < unit.passes); pass++) {
        int start = unit.first_window + pass * PASS_WINDOWS, left = unit.end_window - start;
        bool last = has_last_tiles(left, pass == unit.passes - 1);
        int tiles = last ? LAST_TILES : TILES, first_window = start + loop.warp_n * (tiles * 4);
        Sums sums = {};
        if (last) loop.pass<LAST_TILES>(sums, pass, first_window);
        else loop.pass<TILES>(sums, pass, first_window);
        Place place = {unit.image, loop.channel(), first_window, unit.end_window, tiles, unit.number};
        epilogue.pass(sums, place, exponent);
    }
}

// The convolution of the block's units, of `units` in all. x_exponents: of a packed x, `x_exponent_count` of them.
template <class Epilogue>
__device__ inline void convolve(
    const input_t* x, const int* x_exponents, int x_exponent_count, const half_t* packed, i64 units, u8* shared,
    Scratch& scratch, Epilogue& epilogue) {
#if WGMMA
    clear_border(shared);
    if (threadIdx.x == 0) scratch.barriers.init();
    fence_async_proxy();
    __syncthreads();
    Unit unit(units * blockIdx.x / gridDim.x);
    Rows band(x, x_exponents, x_exponent_count, unit, units * (blockIdx.x + 1) / gridDim.x, shared, scratch.barriers);
    if (threadIdx.x >= CONSUMERS) {
        fewer_registers<PRODUCER_REGISTERS>();
        return run<true>(unit, band, band, scratch.warps, epilogue);
    }
    more_registers<CONSUMER_REGISTERS>();
    MainLoop loop(unit, band, packed, shared);
    run<false>(unit, band, loop, scratch.warps, epilogue);
#else
    Unit unit(blockIdx.x);
    Rows band(x, x_exponents, x_exponent_count, unit, shared);
    MainLoop loop(unit, band, packed, shared);
    band.begin(scratch.warps);
    multiply_passes(unit, loop, band.exponent, epilogue);
    epilogue.finish(band.exponent, blockIdx.x);
#endif
}
