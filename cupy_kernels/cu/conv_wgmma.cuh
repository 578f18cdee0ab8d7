// The convolution of conv_mma.cuh for sm_90a: the same sums by wgmma, which reads both operands from shared memory on
// its own.
//
// A block owns one unit: TILE_M channels and UNIT_ROWS rows of 2x2 windows of one image. The rows of x that it needs
// (the band) lie in shared memory as fp16, 8 channels after 8 channels (GROUPS_K groups; with SPLIT 2 as many with the
// rests of fp16_tiles.cuh follow), the even rows of x before the odd ones, rows outside the image as zeros. Between two
// rows lie PITCH - IN_W zeros, right border of one and left border of the next; rows of y fit in a pitch, too. In this
// order a tap is a shift: the pixels of the upper (or lower) rows of neighbouring windows, row after row of them, read
// neighbouring lines, whatever the tap. So a pass takes 4 TILES neighbouring windows a warpgroup, some of which lie
// between two rows and are not valid: WINDOW_PITCH a row, of which WINDOWS_W are.
//
// Weights stream through a ring of STAGES cp.async stages, each 32 channels of a tap (with SPLIT 2 their values, then
// their rests). What the tensor cores still read is never written: a stage is refilled two steps later, after a barrier
// that follows everybody's wait for it.
//
// Tensor cores truncate when they add to an accumulator, which costs float32's last bits in a long sum. With SPLIT 2
// they start from zero every STEPS_AT_ONCE steps, with the small products first, and ordinary additions add up what
// comes out: one warpgroup adds while the tensor cores work for the other.
//
// x is a tensor of scalar_t, converted on the way to shared memory, or with X_PACKED 1 it is packed already
// (fp16_tiles.cu).
//
// Macros: those of pooled_planes.cuh and fp16_tiles.cuh, scalar_t, X_PACKED, input_t (scalar_t, half_t for lines),
// IN_CHANNELS, OUT_CHANNELS (multiples of 16), IN_H, IN_W, OUT_H, OUT_W, KERNEL_H, KERNEL_W, PAD_H, PAD_W,
// WARPGROUPS_M, WARPGROUPS_N, UNIT_ROWS, TILES and LAST_TILES (tiles of 8 pixels of a warpgroup in a pass, and in the
// last of a unit if that has no room in TILES, or needs no more), STAGES, GAP, ALONG (bytes from 8 channels to the next
// 8), TILE_M, THREADS, PARTS_N (warpgroups that have the same channels), PACKED_WIDTH (pack_weight_fp16.cu),
// SHARED_BYTES (with the epilogue's).
#pragma once
#include "common.cuh"
#include "async_copy.cuh"
#include "fp16_tiles.cuh"
#include "pooled_planes.cuh"
#include "wgmma.cuh"

#define TAPS (KERNEL_H * KERNEL_W)
#define STEPS_K ((IN_CHANNELS + 31) / 32)  // of 32 channels; those past IN_CHANNELS are zero
#define GROUPS_K (STEPS_K * 4)             // of 8 channels
#define HALF_STEP (TILE_M * 64)            // bytes of a stage's values, and of its rests
#define CHUNKS_64 ((STEPS_K + 1) / 2)      // of 64 channels
#define STEP_BYTES (HALF_STEP * SPLIT)
#define PITCH (2 * WINDOW_PITCH)
#define PASS_WINDOWS (4 * TILES * WARPGROUPS_N)

// Rows of x, relative to the unit's first row of windows: which of them it needs, and how those of each parity are
// numbered.
enum { LOW = PAD_H - (KERNEL_H - 1), HIGH = 2 * UNIT_ROWS - 1 + PAD_H };
__device__ constexpr int first_of(int parity) { return (LOW - parity + 1) >> 1; }
__device__ constexpr int rows_of(int parity) { return ((HIGH - parity) >> 1) - first_of(parity) + 1; }
__device__ constexpr int band_row(int row) { return (row >> 1) - first_of(row & 1) + (row & 1) * rows_of(0); }
enum { BAND_ROWS = rows_of(0) + rows_of(1), BAND_LINES = GAP + BAND_ROWS * PITCH };
enum {
    RING_OFFSET = (GROUPS_K * SPLIT * ALONG + 127) / 128 * 128,
    EPILOGUE_OFFSET = RING_OFFSET + STAGES * STEP_BYTES
};
static_assert(
    THREADS == 128 * WARPGROUPS_M * WARPGROUPS_N && TILE_M == 64 * WARPGROUPS_M && PARTS_N == WARPGROUPS_N,
    "a warpgroup has 64 channels");
static_assert(UNIT_WINDOWS == UNIT_ROWS * WINDOW_PITCH, "a unit is rows of windows");
static_assert(
    GAP >= 0 && GAP >= KERNEL_W - 1 - PAD_W && PITCH >= IN_W + GAP && PITCH >= OUT_W,
    "a tap left or right of the image reads the gap");
static_assert(
    ALONG >= BAND_LINES * 16 && ALONG % 128 == 16, "eight times 8 channels have the same line in different banks");
static_assert(PACKED_WIDTH == STEPS_K * 32 * SPLIT, "weights are packed in steps");
enum { GUESS = 10, SLACK = 6, ROOM = 3 };  // see conv_mma.cuh; ROOM: for larger values than those seen

#define MOST_TILES (TILES > LAST_TILES ? TILES : LAST_TILES)
#define LANE_WINDOWS ((MOST_TILES + 3) / 4 * 4)  // those past MOST_TILES are zero, and do not exist
typedef float Sums[2][LANE_WINDOWS][4];  // [upper, lower pixels of windows][8 pixels of 4 windows][c of wgmma.cuh]

// What epilogues see of a pass: a lane has LANE_ROWS channels, 8 apart, of LANE_WINDOWS windows.
#define LANE_ROWS 2

__device__ __forceinline__ float sum_of(const Sums& sums, int row, int t, int corner) {
    return sums[corner / 2][t][row * 2 + corner % 2];
}

struct Unit {
    i64 image;
    int number, first_row, rows, windows, passes;  // rows of windows; `windows`: from the first to the last valid one
    __device__ explicit Unit(i64 block) {
        image = block / UNITS;
        number = block % UNITS;
        first_row = number * UNIT_ROWS;
        rows = min(UNIT_ROWS, WINDOWS_H - first_row);
        windows = (rows - 1) * WINDOW_PITCH + WINDOWS_W;
        enum { LARGER = MOST_TILES * 4 * WARPGROUPS_N - PASS_WINDOWS };  // what the last pass can take more
        passes = max(1, (windows - LARGER + PASS_WINDOWS - 1) / PASS_WINDOWS);
    }
};

// Where the sums of a lane belong.
struct Place {
    i64 image;
    // The lane's first channel in the block; `first` counts from the unit's first window.
    int channel, first, tiles, unit_window, unit_place, windows;

    __device__ int in_unit(int t) const { return first + t * 4 + threadIdx.x % 4; }
    __device__ int window(int t) const { return unit_window + in_unit(t); }
    __device__ bool exists(int t) const {
        return t < tiles && in_unit(t) < windows && in_unit(t) % WINDOW_PITCH < WINDOWS_W;
    }
    // Whether a pixel of a window that exists does.
    __device__ bool inside(int t, int corner) const {
        int row = window(t) / WINDOW_PITCH * 2 + corner / 2, column = window(t) % WINDOW_PITCH * 2 + corner % 2;
        return (OUT_H % 2 == 0 || row < OUT_H) && (OUT_W % 2 == 0 || column < OUT_W);
    }
    __device__ bool full() const { return false; }
    // The warp has `count` windows from `start` on, a number that begins with row `first_row` of windows.
    __device__ int start() const { return first; }
    __device__ int count() const { return min(tiles * 4, windows - first); }
    __device__ int first_row() const { return unit_window / WINDOW_PITCH; }
    // Where in memory the windows t to t + 3, t % 4 == 0, of four lanes begin (pooled_planes.cuh).
    __device__ int sixteen(int t) const { return unit_place + first + t * 4; }
};

// Zeros in the lines that hold no pixel.
__device__ inline void clear_border(u8* lines, const Unit& unit) {
    for (int line = threadIdx.x; line < BAND_LINES; line += THREADS) {
        int row = (line - GAP + PITCH) / PITCH - 1, column = (line - GAP + PITCH) % PITCH, parity = row >= rows_of(0);
        int ih = 2 * (row - parity * rows_of(0) + first_of(parity) + unit.first_row) + parity;
        if (row >= 0 && column < IN_W && ih >= 0 && ih < IN_H) continue;
        #pragma unroll
        for (int group = 0; group < GROUPS_K * SPLIT; group++)
            *(uint4*)(lines + group * ALONG + line * 16) = make_uint4(0, 0, 0, 0);
    }
}

// The rows of x that a unit needs, brought into lines: those of the first pass by begin(), those of each next pass by
// advance() between follow() and the end of the pass before it. `exponent` is that of their scale.
#if X_PACKED
// x is packed: copied asynchronously, all of them or, if 64 channels' multiplications are long enough for it, the next
// ones behind those.
struct Band {
    enum { AHEAD = 2 * TAPS >= STAGES };
    const half_t* source;
    u8* lines;
    const int* exponents;
    int exponent_count, first, end, row, exponent;

    __device__ Band(const half_t* x, const int* exponents, int exponent_count, const Unit& unit, u8* lines)
        : source(x + unit.image * (CHUNKS * IN_H * IN_W * (LINE_BYTES / 2))), lines(lines), exponents(exponents),
          exponent_count(exponent_count), first(max(0, 2 * unit.first_row + LOW)),
          end(min(IN_H, 2 * unit.first_row + HIGH + 1)), row(2 * unit.first_row), exponent(0) {
        for (int chunk = 0; chunk < (AHEAD ? min(CHUNKS, SPLIT) : CHUNKS); chunk++) copy(chunk);
        cp_async_commit();
    }
    // Eight lanes take one part of eight lines, which are neighbours in shared memory, where writes to eight places
    // could take turns. Four times eight lanes read half of each of these lines.
    __device__ void copy(int chunk) const {
        enum { GROUPS = CHUNK_CHANNELS / 8 };
        const half_t* from = source + (chunk * IN_H + first) * IN_W * (LINE_BYTES / 2);
        int pixels = (end - first) * IN_W;
        for (int i = threadIdx.x; i < (pixels + 7) / 8 * 64; i += THREADS) {
            int pixel = i / 64 * 8 + i % 8, part = i / 8 % 8, group = chunk * GROUPS + part % GROUPS,
                rest = part / GROUPS * GROUPS_K;
            u8* line = lines + (GAP + band_row(first + pixel / IN_W - row) * PITCH + pixel % IN_W) * 16;
            if (pixel < pixels && group < GROUPS_K)
                cp_async_16(line + (group + rest) * ALONG, from + pixel * (LINE_BYTES / 2) + part * 8, true);
        }
    }
    // At the first step of 64 channels, with that step's weights: brings the next ones.
    __device__ void next_chunk(int pass, int at) const {
        for (int chunk = (at + 1) * SPLIT; AHEAD && pass == 0 && chunk < min(CHUNKS, (at + 2) * SPLIT); chunk++)
            copy(chunk);
    }
    __device__ void begin(unsigned* scratch) { exponent = smallest_exponent(exponents, exponent_count, scratch); }
    __device__ void follow(int) {}
    __device__ bool pending() const { return false; }
    __device__ void advance() {}
    __device__ bool fits(unsigned*) { return true; }
};
#else
// x is a tensor: converted under a scale that is chosen from the rows of the first pass, with room for larger values in
// later ones. Where that is not enough, all starts again.
struct Band {
    // What the first pass needs at most, in octets (eight channels of a pixel) a thread, and how many of them are in
    // flight at a time. Whether rows come behind multiplications; with SPLIT 2 there are no registers for it.
    enum {
        UNIT = (UNIT_ROWS - 1) * WINDOW_PITCH + WINDOWS_W,
        LATER = SPLIT == 1 && UNIT > PASS_WINDOWS,
        EARLY_WINDOWS = LATER ? PASS_WINDOWS : UNIT
    };
    enum {
        NEEDED_ROWS = 2 * ((EARLY_WINDOWS - 1) / WINDOW_PITCH) + 1 + KERNEL_H,
        FIRST_ROWS = NEEDED_ROWS < IN_H ? NEEDED_ROWS : IN_H
    };
    enum {
        FIRST_OCTETS = (FIRST_ROWS * IN_W * GROUPS_K + THREADS - 1) / THREADS,
        ROUNDS = (FIRST_OCTETS + 9) / 10,
        BATCH = (FIRST_OCTETS + ROUNDS - 1) / ROUNDS
    };
    const scalar_t* source;  // the image
    const Unit& unit;
    u8* lines;
    int exponent, attempts;
    unsigned largest;  // finite magnitude
    // Of the rows for the next pass; the thread's next octet of them, which is in v.
    int first_pixel, pixels, group, pixel;
    float v[8];

    __device__ Band(const scalar_t* x, const int*, int, const Unit& unit, u8* lines)
        : source(x + unit.image * (IN_CHANNELS * IN_H * IN_W)), unit(unit), lines(lines), exponent(GUESS), attempts(0) {
    }

    // Where the rows end that the first `passes` passes need.
    __device__ int rows_end(int passes) const {
        int window = (LATER && passes < unit.passes ? passes * PASS_WINDOWS : unit.windows) - 1;
        return max(0, min(IN_H, 2 * (unit.first_row + window / WINDOW_PITCH + 1) + PAD_H));
    }
    __device__ void load(int group, int pixel, bool real, float (&v)[8]) const {
        #pragma unroll
        for (int j = 0; j < 8; j++)
            v[j] = real && group * 8 < IN_CHANNELS ? to_acc(source[(group * 8 + j) * IN_H * IN_W + pixel]) : 0;
    }
    __device__ void store(int group, int pixel, float (&v)[8]) {
        #pragma unroll
        for (int j = 0; j < 8; j++) {
            largest = max(largest, finite_magnitude(v[j]));
            v[j] = multiply_unflushed(v[j], power_of_two(exponent));
        }
        u8* line =
            lines + group * ALONG + (GAP + band_row(pixel / IN_W - 2 * unit.first_row) * PITCH + pixel % IN_W) * 16;
        #pragma unroll
        for (int part = 0; part < SPLIT; part++) *(uint4*)(line + part * GROUPS_K * ALONG) = take_halves(v, part);
    }
    __device__ void load_first_rows() {
        largest = 0;
        int start = max(0, 2 * unit.first_row + LOW) * IN_W, count = max(0, rows_end(1) * IN_W - start);
        for (int at = threadIdx.x; at < count * GROUPS_K; at += THREADS * BATCH) {
            float v[BATCH][8];
            #pragma unroll
            for (int b = 0; b < BATCH; b++) {
                int i = at + b * THREADS;
                load(i / count, start + i % count, i < count * GROUPS_K, v[b]);
            }
            #pragma unroll
            for (int b = 0; b < BATCH; b++) {
                int i = at + b * THREADS;
                if (i < count * GROUPS_K) store(i / count, start + i % count, v[b]);
            }
        }
    }
    __device__ void next_chunk(int, int) const {}
    __device__ void begin(unsigned* scratch) {
        bool later = LATER && unit.passes > 1;
        load_first_rows();
        int right = scale_exponent(block_max(largest, scratch));
        if (attempts++ || (right >= GUESS + later && right <= GUESS + SLACK)) return;
        exponent = right - later * ROOM;
        load_first_rows();
    }
    // A thread loads an octet, and stores it by a later advance(), which loads the next one.
    __device__ void follow(int pass) {
        first_pixel = rows_end(pass) * IN_W;
        pixels = rows_end(pass + 1) * IN_W - first_pixel;
        group = pixels > 0 ? 0 : GROUPS_K;
        pixel = threadIdx.x;
        load_next();
    }
    __device__ bool pending() const { return LATER && group < GROUPS_K; }
    __device__ void load_next() {
        for (; pending() && pixel >= pixels; group++) pixel -= pixels;
        if (pending()) load(group, first_pixel + pixel, true, v);
    }
    __device__ void advance() {
        store(group, first_pixel + pixel, v);
        pixel += THREADS;
        load_next();
    }
    __device__ bool fits(unsigned* scratch) {
        int right = scale_exponent(block_max(largest, scratch));
        bool fit = exponent <= right && right <= exponent + SLACK;
        if (!fit) exponent = right;
        return fit;
    }
};
#endif

// Steps that SPLIT 2 multiplies before it adds: with all small products first, 64 channels lose less than more
// additions would.
#define STEPS_AT_ONCE (SPLIT == 1 || STEPS_K % 2 ? 1 : 2)

#if SPLIT == 2
// partial = the products of some steps for one of two sets of pixels: rest * value, value * rest, value * value. at:
// where each step's stage begins; b: of the first step.
template <int COUNT> __device__ __forceinline__ void multiply(
    float (&partial)[MOST_TILES][4], const WgmmaOperand& a_stages, const int (&at)[STEPS_AT_ONCE],
    const WgmmaOperand& b) {
    wgmma_fence();
    #pragma unroll
    for (int product = 0; product < 3; product++)
        #pragma unroll
        for (int k = 0; k < STEPS_AT_ONCE * 2; k++) {
            WgmmaOperand left = a_stages.moved(at[k / 2] + (product == 0) * HALF_STEP + k % 2 * TILE_M * 32);
            WgmmaOperand right = b.moved(((product == 1) * GROUPS_K + k * 2) * ALONG);
            if (product + k == 0) wgmma<COUNT, false>(partial, left, right);
            else wgmma<COUNT>(partial, left, right);
        }
    wgmma_commit();
}

template <int COUNT> __device__ __forceinline__ void add_partial(
    float (&sums)[LANE_WINDOWS][4], float (&partial)[MOST_TILES][4]) {
    wgmma_wait<0>();
    wgmma_arrived<COUNT>(partial);
    #pragma unroll
    for (int i = 0; i < COUNT * 4; i++) sums[i / 4][i % 4] += partial[i / 4][i % 4];
    // Else the additions may move behind the next multiplications, with copies of what they read.
    wgmma_arrived<COUNT>(sums);
}
#endif

// The convolution of one unit. x_exponents: of lines, `x_exponent_count` of them.
template <class Epilogue>
__device__ inline void convolve(
    const input_t* x, const int* x_exponents, int x_exponent_count, const half_t* packed, u8* shared, unsigned* scratch,
    Epilogue& epilogue) {
    u8* ring = shared + RING_OFFSET;
    int warpgroup = __shfl_sync(0xFFFFFFFFu, (int)threadIdx.x / 128, 0), warpgroup_m = warpgroup % WARPGROUPS_M,
        warpgroup_n = warpgroup / WARPGROUPS_M;
    Unit unit(blockIdx.x);
    clear_border(shared, unit);
    Band band(x, x_exponents, x_exponent_count, unit, shared);
    const u8* weights = (const u8*)packed + (i64)blockIdx.y * TAPS * STEPS_K * STEP_BYTES;

    // Past the last step it fetches the first ones again, which only the next pass reads.
    int from = 0, to = 0, stage = 0;
    auto next = [](int offset) { return offset + STEP_BYTES == STAGES * STEP_BYTES ? 0 : offset + STEP_BYTES; };
    auto fetch = [&]() {
        #pragma unroll
        for (int i = 0; i < STEP_BYTES / 16; i += THREADS) {
            int at = (i + threadIdx.x) * 16;
            if (STEP_BYTES / 16 % THREADS == 0 || at < STEP_BYTES)
                cp_async_16(ring + to + at, weights + from + at, true);
        }
        from = from + STEP_BYTES == TAPS * STEPS_K * STEP_BYTES ? 0 : from + STEP_BYTES;
        to = next(to);
        cp_async_commit();
    };
    for (int i = 0; i < STAGES - 2; i++) fetch();

    WgmmaOperand lines(shared, ALONG, 128), a_stages(ring + warpgroup_m * 1024, TILE_M * 16, 128);
    // `pass` over windows from `first` on. `tiles` is a constant at each call, so that a copy is made for it.
    auto run_pass = [&](Sums& sums, const int tiles, int pass, int first) __attribute__((always_inline)) {
        bool second = false;
#if SPLIT == 2
        float partial[MOST_TILES][4];
#endif
        for (int chunk = 0; chunk < CHUNKS_64; chunk++)
            for (int kh = 0; kh < KERNEL_H; kh++) {
                WgmmaOperand rows[2] = {lines, lines};
                #pragma unroll
                for (int lower = 0; lower < 2; lower++)
                    rows[lower] = lines.moved((GAP + band_row(lower + PAD_H - kh) * PITCH + 2 * first + PAD_W) * 16);
                #pragma unroll 1
                for (int kw = 0; kw < KERNEL_W; kw++)
                    for (int step = chunk * 2; step < min(STEPS_K, chunk * 2 + 2); step += STEPS_AT_ONCE) {
                        int at[STEPS_AT_ONCE];  // where their stages begin
                        #pragma unroll
                        for (int i = 0; i < STEPS_AT_ONCE; i++) {
                            cp_async_wait<STAGES - 3>();
                            fence_async_proxy();
                            __syncthreads();
                            if (i + kh + kw == 0 && step == chunk * 2) band.next_chunk(pass, chunk);
                            fetch();
                            at[i] = stage;
                            stage = next(stage);
                        }
                        auto b = [&](int lower) { return rows[lower].moved(step * 4 * ALONG - kw * 16); };
#if SPLIT == 1
                        wgmma_fence();
                        #pragma unroll
                        for (int k = 0; k < 2; k++)
                            #pragma unroll
                            for (int lower = 0; lower < 2; lower++) {
                                WgmmaOperand left = a_stages.moved(at[0] + k * TILE_M * 32),
                                             right = b(lower).moved(k * 2 * ALONG);
                                if (tiles == TILES) wgmma<TILES>(sums[lower], left, right);
                                else wgmma<LAST_TILES>(sums[lower], left, right);
                            }
                        wgmma_commit();
                        // What a step has loaded arrives during the next one.
                        if (second && band.pending()) band.advance();
                        second = !second;
                        wgmma_wait<1>();
#else
                        #pragma unroll
                        for (int lower = 0; lower < 2; lower++) {
                            if (tiles == TILES)
                                multiply<TILES>(partial, a_stages, at, b(lower)),
                                    add_partial<TILES>(sums[lower], partial);
                            else
                                multiply<LAST_TILES>(partial, a_stages, at, b(lower)),
                                    add_partial<LAST_TILES>(sums[lower], partial);
                        }
#endif
                    }
            }
        while (band.pending()) band.advance();
        wgmma_wait<0>();
    };
    for (bool again = true; again;) {
        band.begin(scratch);
        for (int pass = 0; pass < unit.passes; pass++) {
            int rest = unit.windows - pass * PASS_WINDOWS;
            bool last = LAST_TILES < TILES ? rest <= 4 * LAST_TILES * WARPGROUPS_N
                                           : LAST_TILES > TILES && pass == unit.passes - 1 && rest > PASS_WINDOWS;
            int tiles = last ? LAST_TILES : TILES, first = pass * PASS_WINDOWS + warpgroup_n * (tiles * 4);
            Sums sums = {};
            band.follow(pass + 1);
            if (last) run_pass(sums, LAST_TILES, pass, first);
            else run_pass(sums, TILES, pass, first);
            int channel = warpgroup_m * 64 + threadIdx.x / 32 % 4 * 16 + threadIdx.x % 32 / 4;
            settle(first);  // else addresses of the epilogue are computed before the loop, where registers are few
            Place place = {unit.image, channel, first, tiles, unit.first_row * WINDOW_PITCH, unit.number * UNIT_STRIDE,
                unit.windows};
            epilogue.pass(sums, place, band.exponent);
        }
        again = !band.fits(scratch);
        if (again) epilogue.restart();
    }
    epilogue.finish(band.exponent);
}
