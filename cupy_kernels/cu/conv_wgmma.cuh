// The convolution of conv_mma.cuh for sm_90a: the same sums by wgmma, which reads both operands from shared memory on its own.
//
// A block owns one unit: TILE_M channels and UNIT_ROWS rows of 2x2 windows of one image. The rows of x that it needs (the band) lie in shared
// memory as fp16, 8 channels after 8 channels (GROUPS_K groups), the even rows of x before the odd ones, rows outside the image as zeros.
// Between two rows lie PITCH - IN_W zeros, right border of one and left border of the next. In this order a tap is a shift: the pixels of the
// upper (or lower) rows of neighbouring windows, row after row of them, read neighbouring cells, whatever the tap. So a pass takes
// 4 TILES neighbouring windows a warpgroup, some of which lie between two rows and are not valid: WINDOW_PITCH a row, of which WINDOWS_W are.
//
// Weights stream through a ring of STAGES cp.async stages, each 32 channels of a tap. What the tensor cores still read is never
// written: a stage is refilled two steps later, after a barrier that follows everybody's wait for it.
//
// Macros: those of pooled_planes.cuh, scalar_t, IN_CHANNELS, OUT_CHANNELS (multiples of 16), IN_H, IN_W, OUT_H, OUT_W, KERNEL_H, KERNEL_W, PAD_H, PAD_W, SPLIT (1),
// WARPGROUPS_M, WARPGROUPS_N, UNIT_ROWS, TILES and LAST_TILES (tiles of 8 pixels of a warpgroup in a pass, and in the last of an image), STAGES.
#pragma once
#include "common.cuh"
#include "async_copy.cuh"
#include "fp16_cells.cuh"
#include "wgmma.cuh"

#define TAPS (KERNEL_H * KERNEL_W)
#define THREADS (128 * WARPGROUPS_M * WARPGROUPS_N)
#define TILE_M (64 * WARPGROUPS_M)
#define STEPS_K ((IN_CHANNELS + 31) / 32)  // of 32 channels; those past IN_CHANNELS are zero
#define GROUPS_K (STEPS_K * 4)             // of 8 channels
#define STEP_BYTES (TILE_M * 64)
#define GAP (KERNEL_W - 1 > PAD_W ? KERNEL_W - 1 - PAD_W : 0)
#define PITCH ((IN_W + GAP + 1) / 2 * 2)
#define WINDOWS_W ((OUT_W + 1) / 2)
#define WINDOWS_H ((OUT_H + 1) / 2)
#define UNITS ((WINDOWS_H + UNIT_ROWS - 1) / UNIT_ROWS)
#define PASS_WINDOWS (4 * TILES * WARPGROUPS_N)

// Rows of x, relative to the unit's first row of windows: which of them it needs, and how those of each parity are numbered.
enum { LOW = PAD_H - (KERNEL_H - 1), HIGH = 2 * UNIT_ROWS - 1 + PAD_H };
__device__ constexpr int first_of(int parity) { return (LOW - parity + 1) >> 1; }
__device__ constexpr int rows_of(int parity) { return ((HIGH - parity) >> 1) - first_of(parity) + 1; }
__device__ constexpr int band_row(int row) { return (row >> 1) - first_of(row & 1) + (row & 1) * rows_of(0); }
enum { BAND_ROWS = rows_of(0) + rows_of(1), BAND_CELLS = GAP + BAND_ROWS * PITCH, ALONG = BAND_CELLS * 16 };
enum { RING_OFFSET = (GROUPS_K * ALONG + 127) / 128 * 128, EPILOGUE_OFFSET = RING_OFFSET + STAGES * STEP_BYTES };
enum { GUESS = 10, SLACK = 6, ROOM = 3 };  // see conv_mma.cuh; ROOM: for larger values than those seen

#define LANE_WINDOWS ((TILES + 3) / 4 * 4)  // those past TILES are zero, and do not exist
typedef float Sums[2][LANE_WINDOWS][4];  // [upper, lower pixels of windows][8 pixels of 4 windows][c of wgmma.cuh]

// What epilogues see of a pass: a lane has LANE_ROWS channels, 8 apart, of LANE_WINDOWS windows. PARTS_N warpgroups have the same channels.
#define LANE_ROWS 2
#define PARTS_N WARPGROUPS_N

__device__ __forceinline__ float sum_of(const Sums& sums, int row, int t, int corner) { return sums[corner / 2][t][row * 2 + corner % 2]; }

struct Unit {
    i64 image;
    int number, first_row, rows, windows, passes;  // rows of windows; `windows`: from the first to the last valid one
    __device__ explicit Unit(i64 block) {
        image = block / UNITS;
        number = block % UNITS;
        first_row = number * UNIT_ROWS;
        rows = min(UNIT_ROWS, WINDOWS_H - first_row);
        windows = (rows - 1) * WINDOW_PITCH + WINDOWS_W;
        passes = (windows + PASS_WINDOWS - 1) / PASS_WINDOWS;
    }
};

// Where the sums of a lane belong.
struct Place {
    i64 image;
    int channel, first, tiles, unit_window, unit_place, windows;  // the lane's first channel in the block; `first` counts from the unit's first window

    __device__ int in_unit(int t) const { return first + t * 4 + threadIdx.x % 4; }
    __device__ int window(int t) const { return unit_window + in_unit(t); }
    __device__ bool exists(int t) const { return t < tiles && in_unit(t) < windows && in_unit(t) % WINDOW_PITCH < WINDOWS_W; }
    // Whether a pixel of a window that exists does.
    __device__ bool inside(int t, int corner) const {
        int row = window(t) / WINDOW_PITCH * 2 + corner / 2, column = window(t) % WINDOW_PITCH * 2 + corner % 2;
        return (OUT_H % 2 == 0 || row < OUT_H) && (OUT_W % 2 == 0 || column < OUT_W);
    }
    __device__ bool full() const { return false; }
    // Where in memory the windows t to t + 3, t % 4 == 0, of four lanes begin (pooled_planes.cuh).
    __device__ int sixteen(int t) const { return unit_place + first + t * 4; }
};

// Zeros in the cells that hold no pixel.
__device__ inline void clear_border(u8* cells, const Unit& unit) {
    for (int cell = threadIdx.x; cell < BAND_CELLS; cell += THREADS) {
        int row = (cell - GAP + PITCH) / PITCH - 1, column = (cell - GAP + PITCH) % PITCH, parity = row >= rows_of(0);
        int ih = 2 * (row - parity * rows_of(0) + first_of(parity) + unit.first_row) + parity;
        if (row >= 0 && column < IN_W && ih >= 0 && ih < IN_H) continue;
        #pragma unroll
        for (int group = 0; group < GROUPS_K; group++) *(uint4*)(cells + group * ALONG + cell * 16) = make_uint4(0, 0, 0, 0);
    }
}

// One octet: eight channels, `group`, of a pixel of x, scaled, to its cell. `row` counts from the first that UNIT_ROWS windows of the unit may need.
__device__ inline void store_octet(u8* cells, int group, int row, int column, float (&v)[8], float scale, unsigned& largest) {
    #pragma unroll
    for (int j = 0; j < 8; j++) {
        largest = max(largest, finite_magnitude(v[j]));
        v[j] = multiply_unflushed(v[j], scale);
    }
    *(uint4*)(cells + group * ALONG + (GAP + band_row(row) * PITCH + column) * 16) = take_halves(v, 0);
}

__device__ inline void load_octet(const scalar_t* source, int group, int pixel, bool real, float (&v)[8]) {
    #pragma unroll
    for (int j = 0; j < 8; j++) v[j] = real && group * 8 < IN_CHANNELS ? to_acc(source[(group * 8 + j) * IN_H * IN_W + pixel]) : 0;
}

// What the first pass needs at most, in octets a thread, and how many of them are in flight at a time.
enum { FIRST_ROWS = 2 * ((PASS_WINDOWS - 1) / WINDOW_PITCH) + 2 + KERNEL_H - 1 < IN_H ? 2 * ((PASS_WINDOWS - 1) / WINDOW_PITCH) + 2 + KERNEL_H - 1 : IN_H,
       FIRST_OCTETS = (FIRST_ROWS * IN_W * GROUPS_K + THREADS - 1) / THREADS, ROUNDS = (FIRST_OCTETS + 9) / 10, BATCH = (FIRST_OCTETS + ROUNDS - 1) / ROUNDS };

// Brings rows [first, end) of x into cells, scaled; `largest` grows to their largest finite magnitude. `source`: channel 0 of the image.
__device__ inline void load_rows(const scalar_t* source, const Unit& unit, int first, int end, u8* cells, float scale, unsigned& largest) {
    int pixels = (end - first) * IN_W, count = pixels * GROUPS_K;
    for (int at = threadIdx.x; at < count; at += THREADS * BATCH) {
        float v[BATCH][8];
        #pragma unroll
        for (int b = 0; b < BATCH; b++) {
            int i = at + b * THREADS;
            load_octet(source, i / pixels, first * IN_W + i % pixels, i < count, v[b]);
        }
        #pragma unroll
        for (int b = 0; b < BATCH; b++) {
            int i = at + b * THREADS, pixel = first * IN_W + i % pixels;
            if (i < count) store_octet(cells, i / pixels, pixel / IN_W - 2 * unit.first_row, pixel % IN_W, v[b], scale, largest);
        }
    }
}

// The same behind the multiplications of a pass, for the next one: a thread loads an octet by load(), and stores it by a later turn(), which
// loads the next one.
struct NextRows {
    const scalar_t* source;
    int first_pixel, pixels, group, pixel;
    float v[8];

    __device__ NextRows(const scalar_t* source, int first, int end)
        : source(source), first_pixel(first * IN_W), pixels((end - first) * IN_W), group(end > first ? 0 : GROUPS_K), pixel(threadIdx.x) {
        settle();
    }
    __device__ bool pending() const { return group < GROUPS_K; }
    __device__ void settle() {
        for (; pending() && pixel >= pixels; group++) pixel -= pixels;
        if (pending()) load_octet(source, group, first_pixel + pixel, true, v);
    }
    __device__ void turn(const Unit& unit, u8* cells, float scale, unsigned& largest) {
        int at = first_pixel + pixel;
        store_octet(cells, group, at / IN_W - 2 * unit.first_row, at % IN_W, v, scale, largest);
        pixel += THREADS;
        settle();
    }
};

// The convolution of one unit.
template <class Epilogue>
__device__ inline void convolve(const scalar_t* x, const half_t* packed, u8* shared, unsigned* scratch, Epilogue& epilogue) {
    u8* ring = shared + RING_OFFSET;
    int warpgroup = __shfl_sync(0xFFFFFFFFu, (int)threadIdx.x / 128, 0), warpgroup_m = warpgroup % WARPGROUPS_M, warpgroup_n = warpgroup / WARPGROUPS_M;
    Unit unit(blockIdx.x);
    clear_border(shared, unit);
    const u8* weights = (const u8*)packed + (i64)blockIdx.y * TAPS * STEPS_K * STEP_BYTES;

    // Past the last step it fetches the first ones again, which only the next pass reads.
    int from = 0, to = 0, stage = 0;
    auto next = [](int offset) { return offset + STEP_BYTES == STAGES * STEP_BYTES ? 0 : offset + STEP_BYTES; };
    auto fetch = [&]() {
        #pragma unroll
        for (int i = 0; i < STEP_BYTES / 16; i += THREADS) {
            int at = (i + threadIdx.x) * 16;
            if (STEP_BYTES / 16 % THREADS == 0 || at < STEP_BYTES) cp_async_16(ring + to + at, weights + from + at, true);
        }
        from = from + STEP_BYTES == TAPS * STEPS_K * STEP_BYTES ? 0 : from + STEP_BYTES;
        to = next(to);
        cp_async_commit();
    };
    for (int i = 0; i < STAGES - 2; i++) fetch();

    const scalar_t* source = x + unit.image * (IN_CHANNELS * IN_H * IN_W);
    int exponent = GUESS;

    WgmmaOperand cells(shared, ALONG, 128), a_stages(ring + warpgroup_m * 1024, TILE_M * 16, 128);
    // A pass over windows from `first` on. `tiles` is a constant at each call, so that a copy is made for it.
    auto run_pass = [&](Sums& sums, const int tiles, int first, NextRows& next_rows, unsigned& largest) __attribute__((always_inline)) {
        bool turn = false;
        for (int kh = 0; kh < KERNEL_H; kh++) {
            WgmmaOperand rows[2] = {cells, cells};
            #pragma unroll
            for (int lower = 0; lower < 2; lower++)
                rows[lower] = cells.moved((GAP + band_row(lower + PAD_H - kh) * PITCH + 2 * first + PAD_W) * 16);
            for (int kw = 0; kw < KERNEL_W; kw++)
                for (int step = 0; step < STEPS_K; step++) {
                    cp_async_wait<STAGES - 3>();
                    fence_async_proxy();
                    __syncthreads();
                    fetch();
                    wgmma_fence();
                    #pragma unroll
                    for (int k = 0; k < 2; k++)
                        #pragma unroll
                        for (int lower = 0; lower < 2; lower++) {
                            WgmmaOperand a = a_stages.moved(stage + k * TILE_M * 32), b = rows[lower].moved((step * 4 + k * 2) * ALONG - kw * 16);
                            if (tiles == TILES) wgmma<TILES>(sums[lower], a, b);
                            else wgmma<LAST_TILES>(sums[lower], a, b);
                        }
                    wgmma_commit();
                    // What a step has loaded arrives during the next one.
                    if (turn && next_rows.pending()) next_rows.turn(unit, shared, power_of_two(exponent), largest);
                    turn = !turn;
                    wgmma_wait<1>();
                    stage = next(stage);
                }
        }
        while (next_rows.pending()) next_rows.turn(unit, shared, power_of_two(exponent), largest);
        wgmma_wait<0>();
    };
    int first_row = max(0, 2 * unit.first_row + LOW);
    // Where the rows of x end that the first `passes` passes need.
    auto rows_end = [&](int passes) {
        int window = min(passes * PASS_WINDOWS, unit.windows) - 1;
        return max(first_row, min(IN_H, 2 * (unit.first_row + window / WINDOW_PITCH) + 2 + PAD_H));
    };
    // The scale is chosen from the rows of the first pass, with room for larger values in later ones. If that is too little, all starts again.
    for (bool again = false;; again = true) {
        bool later = unit.passes > 1;
        unsigned largest = 0;
        load_rows(source, unit, first_row, rows_end(1), shared, power_of_two(exponent), largest);
        int right = scale_exponent(block_max(largest, scratch));
        if (!again && (right < GUESS + later || right > GUESS + SLACK)) {
            exponent = right - later * ROOM;
            load_rows(source, unit, first_row, rows_end(1), shared, power_of_two(exponent), largest);
        }
        for (int pass = 0; pass < unit.passes; pass++) {
            bool trimmed = LAST_TILES < TILES && unit.windows - pass * PASS_WINDOWS <= 4 * LAST_TILES * WARPGROUPS_N;
            int tiles = trimmed ? LAST_TILES : TILES, first = pass * PASS_WINDOWS + warpgroup_n * (tiles * 4);
            NextRows next_rows(source, rows_end(pass + 1), rows_end(pass + 2));
            Sums sums = {};
            if (trimmed) run_pass(sums, LAST_TILES, first, next_rows, largest);
            else run_pass(sums, TILES, first, next_rows, largest);
            int channel = warpgroup_m * 64 + threadIdx.x / 32 % 4 * 16 + threadIdx.x % 32 / 4;
            epilogue.pass(sums, Place{unit.image, channel, first, tiles, unit.first_row * WINDOW_PITCH, unit.number * UNIT_STRIDE, unit.windows}, exponent);
        }
        right = scale_exponent(block_max(largest, scratch));
        if (exponent <= right && right <= exponent + SLACK) break;
        exponent = right;
        epilogue.restart();
    }
    epilogue.finish(exponent);
}
