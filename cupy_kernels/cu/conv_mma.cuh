// Transposed convolution with stride 1, dilation 1 and one group on tensor cores (sm_80 and newer): loads and main
// loop.
//
//     sums[n, m, oh, ow] = sum_{k, kh, kw} x[n, k, oh + PAD_H - kh, ow + PAD_W - kw] * w[k, m, kh, kw]
//
// dgrad is the same sum over dy with PAD' = KERNEL - 1 - PAD and flipped, transposed weights (pack_weight_fp16.cu).
//
// Implicit GEMM: channels m are rows, pixels are columns, the sum runs over chunks of input channels and taps. A block
// owns one unit: TILE_M channels and UNIT_PASSES passes of TILE_N pixels of one image. The rows of x that it needs (the
// band) lie in shared memory as packed fp16 tiles [row][column][64 halves]; every tap reads them shifted, by ldmatrix. Weights
// stream through a ring of STAGES cp.async stages, one tap of one chunk each. Each warp owns 64 channels x 8 WARP_TILES
// pixels. An epilogue, the kernel's own, takes the sums of each pass.
//
// Pixels are ordered by 2x2 windows: the upper row of four windows is an n8-tile, their lower row the next one, so that
// a lane's accumulators are whole windows. ADJACENT 1: the windows of a lane are neighbours, for wide stores; 0: those
// of four lanes are.
//
// Lines: a zero row comes first, rows outside the image read it; GAP zero lines between rows serve as left and right
// border. The order of a line's parts (band_key) is such that the eight rows of a matrix, the pixels of a tile, lie in
// different banks.
//
// x is a tensor of scalar_t, converted on the way to shared memory, or with X_PACKED 1 it is packed already
// (fp16_tiles.cu).
//
// Macros: those of pooled_planes.cuh (WINDOW_PITCH is WINDOWS_W) and fp16_tiles.cuh, scalar_t (float, half_t, bf16_t),
// X_PACKED, input_t (scalar_t, half_t for lines), IN_CHANNELS, OUT_CHANNELS (multiples of 16), IN_H, IN_W, OUT_H, OUT_W,
// KERNEL_H, KERNEL_W, PAD_H, PAD_W, WARPS_M, WARPS_N, UNIT_PASSES, BAND_ROWS (rows of x that a unit needs at most),
// GAP, RESIDENT (1: all chunks of the band stay in shared memory, 0: each pass loads one after the other), STAGES,
// TILE_M, THREADS, PARTS_N (warps that have the same channels), PACKED_WIDTH (pack_weight_fp16.cu), SHARED_BYTES (with
// the epilogue's), ADJACENT.
#pragma once
#include "common.cuh"
#include "async_copy.cuh"
#include "pooled_planes.cuh"

#define TAPS (KERNEL_H * KERNEL_W)
#define WARP_TILES 8            // n8-tiles of a warp
#define PAIRS (WARP_TILES / 2)  // of tiles, the upper and lower rows of four windows
#define TILE_N (8 * WARP_TILES * WARPS_N)
#define PITCH (IN_W + GAP)
#define BAND_LINES (GAP + (BAND_ROWS + 1) * PITCH)
#define PASS_WINDOWS (TILE_N / 4)
// Pairs that an image's last windows need; SPLIT 1's units of one pass do not care.
#define LAST_PAIRS \
    (UNIT_PASSES == 1 && SPLIT == 1 ? PAIRS : ((WINDOWS - 1) % PASS_WINDOWS + WARPS_N * 4) / (WARPS_N * 4))

#include "fp16_tiles.cuh"
#include "mma.cuh"

#define SLICES_AT_ONCE (THREADS == 256 ? 4 : 1)  // else ptxas hoists the loads of more until registers spill
// Of 16 channels; those past IN_CHANNELS are zero.
#define SLICES (CHUNKS > 1 || SPLIT == 2 ? CHUNK_CHANNELS / 16 : IN_CHANNELS / 16)
enum { RING_OFFSET = (RESIDENT ? CHUNKS : 1) * BAND_LINES * LINE_BYTES };
// Scales are powers of two, so any that neither overflows nor flushes gives the same products: values of usual size are
// loaded once, under a first guess of their scale's exponent; one that is up to SLACK larger would not be better.
enum { GUESS = 10, SLACK = 6 };
enum { EPILOGUE_OFFSET = RING_OFFSET + STAGES * STAGE_BYTES };  // in dynamic shared memory
static_assert(
    THREADS == 32 * WARPS_M * WARPS_N && TILE_M == 64 * WARPS_M && PARTS_N == WARPS_N, "a warp has 64 channels");
static_assert(UNIT_WINDOWS == UNIT_PASSES * PASS_WINDOWS, "a unit is its passes");
static_assert(GAP >= 0 && GAP >= KERNEL_W - 1 - PAD_W, "a tap left or right of the image reads the gap");
static_assert(PACKED_WIDTH == CHUNKS * LINE_BYTES / 2, "weights are packed in lines");

#if SPLIT == 2 && !defined(CUPY_KERNELS_EMULATOR)
typedef unsigned Row;  // of ldmatrix: an address in shared memory, in one register, of which SPLIT 2 has none to spare
__device__ inline Row row_at(const u8* p) { return (unsigned)__cvta_generic_to_shared(p); }
__device__ inline Row other_part(Row row, int parts) { return row ^ parts * 16; }
#else
typedef const u8* Row;
__device__ inline Row row_at(const u8* p) { return p; }
#endif

typedef float Sums[4][WARP_TILES][4];  // [16 channels][8 pixels][fragment c of mma.cuh]

// What epilogues see of a pass: a lane has LANE_ROWS channels, 8 apart, of LANE_WINDOWS windows.
#define LANE_ROWS 8
#define LANE_WINDOWS PAIRS

__device__ __forceinline__ float sum_of(const Sums& sums, int row, int t, int corner) {
    return sums[row / 2][2 * t + corner / 2][row % 2 * 2 + corner % 2];
}

// Which window of a warp's `pairs` times 4 the j-th one of lanes 4 n + quad is.
__device__ inline int lane_window(int quad, int j, int pairs) { return ADJACENT ? quad * pairs + j : j * 4 + quad; }

// The pixel of a corner of a 2x2 window. Windows past the last one, and the missing half of windows at an odd edge, are
// not valid.
struct Pixel {
    int oh, ow;
    __device__ Pixel(int window, int corner) {
        oh = window / WINDOWS_W * 2 + corner / 2;
        ow = window % WINDOWS_W * 2 + corner % 2;
    }
    // Of a window that exists.
    __device__ bool valid() const { return (OUT_H % 2 == 0 || oh < OUT_H) && (OUT_W % 2 == 0 || ow < OUT_W); }
};

// Where the sums of a lane belong.
struct Place {
    i64 image;
    int channel, first_window, pairs, end_window;  // the lane's first channel in the block; the warp's windows

    __device__ int window(int t) const { return first_window + lane_window(threadIdx.x % 4, t, pairs); }
    __device__ bool exists(int t) const { return t < pairs && window(t) < end_window; }
    // Whether a pixel of a window that exists does.
    __device__ bool inside(int t, int corner) const { return Pixel(window(t), corner).valid(); }
    // All pixels exist, which is the usual case and needs no masks.
    __device__ bool full() const {
        return OUT_H % 2 == 0 && OUT_W % 2 == 0 && pairs == PAIRS && first_window + PAIRS * 4 == end_window;
    }
    // The warp has `count` windows from `start` on, a number that begins with row `first_row` of windows.
    __device__ int start() const { return first_window; }
    __device__ int count() const { return min(pairs * 4, end_window - first_window); }
    __device__ int first_row() const { return 0; }
};

// Order of a band line's parts. Along the pixels of a row, and from a row of windows to the next, `place` runs without
// a gap.
__device__ inline int band_key(int row, int column) {
    unsigned place = row * WINDOWS_W + column;
    return ADJACENT ? place / WARP_TILES % 4 * 2 + place % 2 : place % 8;
}

// Rows of x [first, end) that a window needs, as if x had rows beyond its own.
__device__ constexpr int first_row_of(int window) { return window / WINDOWS_W * 2 + PAD_H - (KERNEL_H - 1); }
__device__ constexpr int end_row_of(int window) { return window / WINDOWS_W * 2 + 1 + PAD_H + 1; }
__device__ constexpr bool bands_fit() {
    for (int first = 0; first < WINDOWS; first += UNIT_WINDOWS) {
        int last = first + UNIT_WINDOWS < WINDOWS ? first + UNIT_WINDOWS - 1 : WINDOWS - 1;
        int low = first_row_of(first) > 0 ? first_row_of(first) : 0,
            high = end_row_of(last) < IN_H ? end_row_of(last) : IN_H;
        if (high - low > BAND_ROWS) return false;
    }
    return true;
}
static_assert(bands_fit(), "a band has the rows of x that a unit needs");

// What a block works on.
struct Unit {
    i64 image;
    int first_window, passes, first_row, last_row;  // rows [first_row, last_row) of x

    __device__ explicit Unit(i64 block) {
        image = block / UNITS;
        first_window = block % UNITS * UNIT_WINDOWS;
        int last_window = min(first_window + UNIT_WINDOWS, WINDOWS) - 1;
        passes = (last_window - first_window) / PASS_WINDOWS + 1;
        first_row = max(0, first_row_of(first_window));
        last_row = min(IN_H, end_row_of(last_window));
    }
};

// Zeros in the lines that hold no pixel: the zero row, and the borders.
__device__ inline void clear_border(u8* lines) {
    enum { ZERO_ROW = PITCH + GAP, COUNT = (ZERO_ROW + BAND_ROWS * GAP) * 8, BORDER = GAP ? GAP : 1 };
    for (int i = threadIdx.x; i < COUNT; i += THREADS) {
        int at = i / 8, right = at - ZERO_ROW;
        int line = right < 0 ? at : (right / BORDER + 1) * PITCH + GAP + IN_W + right % BORDER;
        *(uint4*)(lines + line_offset(line, i % 8)) = make_uint4(0, 0, 0, 0);
    }
}

#if X_PACKED
// Copies chunk `chunk` of a unit's rows, asynchronously. `source`: row first_row of chunk 0.
__device__ inline void copy_band(const half_t* source, const Unit& unit, u8* lines, int chunk) {
    source += (i64)chunk * IN_H * IN_W * (LINE_BYTES / 2);
    for (int i = threadIdx.x; i < (unit.last_row - unit.first_row) * IN_W * 8; i += THREADS) {
        int row = i / 8 / IN_W, column = i / 8 % IN_W + GAP;
        cp_async_16(
            lines + line_offset((row + 1) * PITCH + column, i % 8, band_key(unit.first_row + row, column)),
            source + i * 8, true);
    }
    cp_async_commit();
}
#else
// Exponent of the scale for a unit's rows, all channels. `source`: channel 0 of row first_row.
__device__ inline int band_exponent(const scalar_t* source, const Unit& unit, unsigned* scratch) {
    enum { WIDTH = IN_W * sizeof(scalar_t) % 16 ? 1 : 16 / sizeof(scalar_t), BATCH = 16 };
    typedef Packed<scalar_t, WIDTH> Pack;
    int count = (unit.last_row - unit.first_row) * IN_W / WIDTH;
    unsigned largest = 0;
    for (int k = threadIdx.x / 32; k < IN_CHANNELS; k += THREADS / 32) {
        const Pack* row = (const Pack*)(source + k * IN_H * IN_W);
        for (int first = threadIdx.x % 32; first < count; first += 32 * BATCH) {
            Pack in[BATCH];
            #pragma unroll
            for (int i = 0; i < BATCH; i++) in[i] = row[min(first + i * 32, count - 1)];
            #pragma unroll
            for (int i = 0; i < BATCH * WIDTH; i++)
                largest = max(largest, finite_magnitude(to_acc(in[i / WIDTH].v[i % WIDTH])));
        }
    }
    return scale_exponent(block_max(largest, scratch));
}

// Brings chunk `chunk` of a unit's rows into lines, scaled; `largest` grows to their largest finite magnitude.
__device__ inline void load_band(
    const scalar_t* source, const Unit& unit, u8* lines, int chunk, float scale, unsigned& largest) {
    // Not resident, the sums hold the registers; SPLIT 2 has room where its fragments will be.
    enum { BATCH = RESIDENT ? 8 : SPLIT == 2 ? 4 : 1, COUNT = BAND_ROWS * IN_W * (CHUNK_CHANNELS / 8) };
    // Lanes take 32 pixels in such an order that eight at a time write to different banks.
    int lane = threadIdx.x % 32, spread = lane;
    if (ADJACENT) spread = lane % 2 + lane / 2 % 4 * WARP_TILES + lane / 8 % PAIRS * 2;
    for (int first = threadIdx.x - lane + spread; first < COUNT; first += THREADS * BATCH) {
        float v[BATCH][8];
        #pragma unroll
        for (int b = 0; b < BATCH; b++) {
            int i = first + b * THREADS, pixel = i % (BAND_ROWS * IN_W),
                k = chunk * CHUNK_CHANNELS + i / (BAND_ROWS * IN_W) * 8;
            bool inside = unit.first_row + pixel / IN_W < unit.last_row && k < IN_CHANNELS && i < COUNT;
            const scalar_t* from = source + k * IN_H * IN_W + pixel;
            #pragma unroll
            for (int j = 0; j < 8; j++) v[b][j] = inside ? to_acc(from[j * IN_H * IN_W]) : 0;
        }
        #pragma unroll
        for (int b = 0; b < BATCH; b++) {
            int i = first + b * THREADS, pixel = i % (BAND_ROWS * IN_W), row = pixel / IN_W,
                column = pixel % IN_W + GAP;
            #pragma unroll
            for (int j = 0; j < 8; j++) {
                largest = max(largest, finite_magnitude(v[b][j]));
                v[b][j] = multiply_unflushed(v[b][j], scale);
            }
            if (i < COUNT)
                store_line(
                    lines, (row + 1) * PITCH + column, i / (BAND_ROWS * IN_W), v[b],
                    band_key(unit.first_row + row, column));
        }
    }
}
#endif

// sums += what one tap of one chunk adds: the channels at `a_row` times the pixels at `b_row`, fragments as mma.cuh has
// them.
__device__ __forceinline__ void multiply(Sums& sums, Row a_row, const Row (&b_row)[PAIRS], int pairs) {
#if SPLIT == 1
    #pragma unroll SLICES_AT_ONCE
    for (int slice = 0; slice < SLICES; slice++) {
        unsigned a[4][4], b[4];
        #pragma unroll
        for (int i = 0; i < 4; i++) ldmatrix_x4(a[i], other_part(a_row + i * 16 * LINE_BYTES, slice * 2));
        #pragma unroll
        for (int j = 0; j < PAIRS; j++) {
            if (j >= pairs) continue;
            ldmatrix_x4(b, other_part(b_row[j], slice * 2));
            #pragma unroll
            for (int i = 0; i < 4; i++)
                #pragma unroll
                for (int n = 0; n < 2; n++) mma_m16n8k16(sums[i][2 * j + n], a[i], b[2 * n], b[2 * n + 1]);
        }
    }
#else
    // Tensor cores truncate when they add to an accumulator, which costs float32's last bits in a long sum: they add
    // the products of this tap only, the small ones first, and an ordinary addition adds those.
    typedef unsigned Parts[SLICES][SPLIT][4];
    auto load = [](Parts& parts, Row row) {
        #pragma unroll
        for (int slice = 0; slice < SLICES; slice++)
            #pragma unroll
            for (int part = 0; part < SPLIT; part++)
                ldmatrix_x4(parts[slice][part], other_part(row, part * (CHUNK_CHANNELS / 8) + slice * 2));
    };
    Parts a[4], b;
    #pragma unroll
    for (int i = 0; i < 4; i++) load(a[i], a_row + i * 16 * LINE_BYTES);
    #pragma unroll
    for (int j = 0; j < PAIRS; j++) {
        if (j >= pairs) continue;
        load(b, b_row[j]);
        #pragma unroll
        for (int i = 0; i < 4; i++) {
            float partial[2][4] = {};
            #pragma unroll
            for (int product = 0; product < 3; product++)  // rest * value, value * rest, value * value
                #pragma unroll
                for (int slice = 0; slice < SLICES; slice++)
                    #pragma unroll
                    for (int n = 0; n < 2; n++) {
                        const unsigned (&right)[4] = b[slice][product == 1];
                        mma_m16n8k16(partial[n], a[i][slice][product == 0], right[2 * n], right[2 * n + 1]);
                    }
            #pragma unroll
            for (int t = 0; t < 8; t++) sums[i][2 * j + t / 4][t % 4] += partial[t / 4][t % 4];
        }
    }
#endif
}

// The convolution of one unit. x_exponents: of lines, `x_exponent_count` of them.
template <class Epilogue>
__device__ inline void convolve(
    const input_t* x, const int* x_exponents, int x_exponent_count, const half_t* packed, u8* shared, unsigned* scratch,
    Epilogue& epilogue) {
    u8* ring = shared + RING_OFFSET;
    auto band_of = [&](int chunk) { return shared + (RESIDENT ? chunk : 0) * BAND_LINES * LINE_BYTES; };
    for (int chunk = 0; chunk < (RESIDENT ? CHUNKS : 1); chunk++) clear_border(band_of(chunk));
    int lane = threadIdx.x % 32, warp_m = threadIdx.x / 32 % WARPS_M, warp_n = threadIdx.x / 32 / WARPS_M;
    Unit unit(blockIdx.x);
#if X_PACKED
    const input_t* source = x + (unit.image * CHUNKS * IN_H + unit.first_row) * IN_W * (LINE_BYTES / 2);
    auto bring_band = [&](int chunk) { copy_band(source, unit, band_of(chunk), chunk); };
    if (RESIDENT)
        for (int chunk = 0; chunk < CHUNKS; chunk++) bring_band(chunk);
#else
    const input_t* source = x + (unit.image * IN_CHANNELS * IN_H + unit.first_row) * IN_W;
    int exponent = GUESS;
    unsigned largest = 0;
    auto bring_band = [&](int chunk) {
        load_band(source, unit, band_of(chunk), chunk, power_of_two(exponent), largest);
    };
#endif
    const u8* weights = (const u8*)packed + (i64)blockIdx.y * CHUNKS * TAPS * STAGE_BYTES;

    // Past the last step it fetches the first ones again, which nobody reads: cheaper than to ask each time.
    int from = 0, stage = 0;
    auto fetch = [&](int to) {
#if SPLIT == 2  // addresses that differ by constants: one for all copies
        u8* target = ring + to + threadIdx.x * 16;
        const u8* mine = weights + (from + (int)threadIdx.x * 16);
        #pragma unroll
        for (int i = 0; i < STAGE_BYTES / 16 / THREADS; i++)
            cp_async_16(target + i * THREADS * 16, mine + i * THREADS * 16, true);
#else
        #pragma unroll
        for (int i = 0; i < STAGE_BYTES / 16 / THREADS; i++) {
            int at = (i * THREADS + threadIdx.x) * 16;
            cp_async_16(ring + to + at, weights + from + at, true);
        }
#endif
        from = from + STAGE_BYTES == CHUNKS * TAPS * STAGE_BYTES ? 0 : from + STAGE_BYTES;
        cp_async_commit();
    };
    for (int i = 0; i < STAGES - 1; i++) fetch(i * STAGE_BYTES);

#if X_PACKED
    int exponent = smallest_exponent(x_exponents, x_exponent_count, scratch);
#else
    if (!RESIDENT) exponent = band_exponent(source, unit, scratch);
    for (bool again = RESIDENT; again;) {
        for (int chunk = 0; chunk < CHUNKS; chunk++) bring_band(chunk);
        int right = scale_exponent(block_max(largest, scratch));
        again = exponent == GUESS && (right < GUESS || right > GUESS + SLACK);
        if (again) exponent = right;
    }
#endif

    // A pass over windows of which the warp's first is `first_window`. `pairs` is a constant at each call, so that a
    // copy is made for it.
    auto run_pass = [&](Sums& sums, const int pairs, int first_window) __attribute__((always_inline)) {
        // This lane's rows of ldmatrix: pixel lane % 8 of the upper or lower row of pair j; lanes 8 to 15 and 24 to 31
        // pass channels + 8.
        int row_of[PAIRS], column_of[PAIRS];
        #pragma unroll
        for (int j = 0; j < PAIRS; j++) {
            Pixel pixel(first_window + lane_window(lane % 8 / 2, j, pairs), lane / 16 * 2 + lane % 2);
            row_of[j] = pixel.oh + PAD_H;
            column_of[j] = GAP + min(pixel.ow, OUT_W - 1) + PAD_W;
        }
        for (int chunk = 0; chunk < CHUNKS; chunk++) {
            if (!RESIDENT) {
                __syncthreads();
                bring_band(chunk);
                if (X_PACKED) cp_async_wait<0>();
                __syncthreads();
            }
            Row chunk_lines = row_at(band_of(chunk)), a_row, b_row[PAIRS];
            // Called when the last tap's fragments are loaded: its stage is free once all warps are here.
            auto turn_to = [&](int kh, int kw) __attribute__((always_inline)) {
                cp_async_wait<STAGES - 2>();
                __syncthreads();
                fetch(stage ? stage - STAGE_BYTES : (STAGES - 1) * STAGE_BYTES);
                a_row = row_at(ring) + stage + line_offset(warp_m * 64 + lane % 16, lane / 16);
                stage = stage + STAGE_BYTES == STAGES * STAGE_BYTES ? 0 : stage + STAGE_BYTES;
                #pragma unroll
                for (int j = 0; j < PAIRS; j++) {
                    int ih = row_of[j] - kh, column = column_of[j] - kw;
                    int row_line = ih >= 0 && ih < unit.last_row ? (ih - unit.first_row + 1) * PITCH : 0;
                    b_row[j] = chunk_lines + line_offset(row_line + column, lane / 8 % 2, band_key(ih, column));
                }
            };
            for (int kh = 0; kh < KERNEL_H; kh++) {
#if SPLIT == 2
                #pragma unroll 1
#endif
                for (int kw = 0; kw < KERNEL_W; kw++) {
                    turn_to(kh, kw);
                    multiply(sums, a_row, b_row, pairs);
                }
            }
        }
    };
    for (int pass = 0; pass < unit.passes; pass++) {
        bool trimmed = LAST_PAIRS < PAIRS && unit.first_window + (pass + 1) * PASS_WINDOWS >= WINDOWS;
        int pairs = trimmed ? LAST_PAIRS : PAIRS,
            first_window = unit.first_window + pass * PASS_WINDOWS + warp_n * (pairs * 4);
        Sums sums = {};
        if (trimmed) run_pass(sums, LAST_PAIRS, first_window);
        else run_pass(sums, PAIRS, first_window);
        int end_window = min(first_window + pairs * 4, WINDOWS);
        epilogue.pass(sums, Place{unit.image, warp_m * 64 + lane / 4, first_window, pairs, end_window}, exponent);
    }
    epilogue.finish(exponent);
}
