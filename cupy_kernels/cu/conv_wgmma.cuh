// The convolution of implicit_gemm.cuh by wgmma (sm_90a), which reads both operands from shared memory on its own.
//
// The band lies in shared memory as fp16, 8 channels after 8 channels (GROUPS_K groups, ALONG bytes apart; with SPLIT 2
// as many with the residuals of fp16_tiles.cuh follow), the even rows of x before the odd ones, rows outside the image
// as zeros. Between two rows lie PITCH - IN_W zeros, right border of one and left border of the next; rows of y fit in
// a pitch, too:
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
// A step of weights is 32 channels of a tap (with SPLIT 2 their values, then their residuals). What the tensor cores
// still read is never written: a stage is refilled two steps later, after a barrier that follows everybody's wait for
// it.
//
// With SPLIT 2 (fp16_tiles.cuh) the sums start from zero every STEPS_AT_ONCE steps: one warpgroup adds up while the
// tensor cores work for the other.
//
// Macros besides those of implicit_gemm.cuh, with ADJACENT 0: UNIT_ROWS (of windows), ALONG.
#pragma once
#include "wgmma.cuh"

#define STEPS_K ((IN_CHANNELS + 31) / 32)  // of 32 channels; those past IN_CHANNELS are zero
#define GROUPS_K (STEPS_K * 4)             // of 8 channels
#define HALF_STEP (TILE_M * 64)            // bytes of a stage's values, and of its residuals
#define CHUNKS_64 ((STEPS_K + 1) / 2)      // of 64 channels
#define STEP_BYTES (HALF_STEP * SPLIT)
#define PITCH (2 * WINDOW_PITCH)

// Rows of x, relative to twice the unit's first row of windows: which of them it needs, and how those of each parity
// are numbered.
enum { LOW = PAD_H - (KERNEL_H - 1), HIGH = 2 * UNIT_ROWS - 1 + PAD_H };
__device__ constexpr int first_of(int parity) { return (LOW - parity + 1) >> 1; }
__device__ constexpr int rows_of(int parity) { return ((HIGH - parity) >> 1) - first_of(parity) + 1; }
__device__ constexpr int band_row(int row) { return (row >> 1) - first_of(row & 1) + (row & 1) * rows_of(0); }
enum { BAND_ROWS = rows_of(0) + rows_of(1), BAND_PIXELS = GAP + BAND_ROWS * PITCH };
enum { RING_OFFSET = (GROUPS_K * SPLIT * ALONG + 127) / 128 * 128 };
enum { EPILOGUE_OFFSET = RING_OFFSET + STAGES * STEP_BYTES };  // in dynamic shared memory
static_assert(UNIT_WINDOWS == UNIT_ROWS * WINDOW_PITCH, "a unit is rows of windows");
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

// Zeros where no pixel is.
__device__ inline void clear_border(u8* shared, const Unit& unit) {
    for (int i = threadIdx.x; i < BAND_PIXELS; i += THREADS) {
        int row = (i - GAP + PITCH) / PITCH - 1, column = (i - GAP + PITCH) % PITCH, parity = row >= rows_of(0);
        int ih = 2 * (row - parity * rows_of(0) + first_of(parity)) + origin_of(unit) + parity;
        if (row >= 0 && column < IN_W && ih >= 0 && ih < IN_H) continue;
        #pragma unroll
        for (int group = 0; group < GROUPS_K * SPLIT; group++)
            *(uint4*)(shared + group * ALONG + i * 16) = make_uint4(0, 0, 0, 0);
    }
}

enum { PASSES = passes_of(WINDOWS_H * WINDOW_PITCH - (WINDOW_PITCH - WINDOWS_W)) };  // of a whole image

// The rows of the first pass come by begin(), those of each next pass by advance() between follow() and the end of the
// pass before it. next_chunk(pass, at): called at the first step of 64 channels, with that step's weights.
template <bool> struct Band;

// x is packed, or halves in channels_last, which are operands as they are: copied asynchronously. All of it at first, or,
// if 64 channels' multiplications are long enough for it, the rows of the first pass, and the others behind its products.
// With PERSISTENT the next image's rows take the places of those that no later pass reads.
template <> struct Band<true> {
    enum {
        AHEAD = 2 * TAPS >= STAGES,
        PIXEL = AS_IT_IS ? IN_CHANNELS : LINE_BYTES / 2,  // from a pixel to the next, in halves
        CHUNK = AS_IT_IS ? CHUNK_CHANNELS : IN_H * IN_W * PIXEL,
        IMAGE = IN_H * IN_W * (AS_IT_IS ? IN_CHANNELS : CHUNKS * PIXEL)
    };
    const half_t* x;
    const Unit& unit;
    u8* shared;
    const int* exponents;
    int exponent_count, exponent = 0;
    i64 images;
    int copied_end = 0;  // where the rows end that the first pass finds
    // Rows that are copied an octet (eight channels of a pixel) at a time, with PERSISTENT.
    const half_t* from;
    int first_row, pixels = 0, octet = 0;

    __device__ Band(
        const half_t* x, const int* exponents, int exponent_count, const Unit& unit, i64 units, u8* shared)
        : x(x), unit(unit), shared(shared), exponents(exponents), exponent_count(exponent_count),
          images(units / UNITS) {
        clear_border(shared, unit);
        copied_end = AHEAD && unit.passes > 1 ? rows_end(PERSISTENT ? 2 : 1) : unit.end_row;
        for (int chunk = 0; chunk < (AHEAD ? min(CHUNKS, SPLIT) : CHUNKS); chunk++)
            copy(chunk, unit.first_row, copied_end);
        cp_async_commit();
    }
    // Where the rows end that the first `passes` passes need, and where those begin that the pass `pass` and later ones do.
    __device__ int rows_end(int passes) const {
        return max(unit.first_row, min(unit.end_row, end_row_of(unit.first_window + passes * PASS_WINDOWS - 1)));
    }
    __device__ int rows_start(int pass) const { return max(0, first_row_of(unit.first_window + pass * PASS_WINDOWS)); }
    __device__ const half_t* source(i64 image, int row) const { return x + image * IMAGE + row * IN_W * PIXEL; }
    __device__ void copy(int chunk, int first_row, int end_row) const {
        int pixels = (end_row - first_row) * IN_W;
        for (int i = threadIdx.x; i < (pixels + 7) / 8 * 64; i += THREADS)
            copy_octet(source(unit.image, first_row) + chunk * CHUNK, chunk, first_row, pixels, i);
    }
    // Eight lanes take one part of eight lines, which are neighbours in shared memory, where writes to eight places
    // could take turns. Four times eight lanes read half of each of these lines.
    __device__ void copy_octet(const half_t* from, int chunk, int first_row, int pixels, int i) const {
        enum { GROUPS = CHUNK_CHANNELS / 8 };
        int pixel = i / 64 * 8 + i % 8, part = i / 8 % 8;
        int group = chunk * GROUPS + part % GROUPS, residual = part / GROUPS * GROUPS_K;
        bool exists = !AS_IT_IS || group * 8 < IN_CHANNELS;
        u8* to = shared + band_offset(first_row - origin_of(unit) + pixel / IN_W, pixel % IN_W);
        if (pixel < pixels && group < GROUPS_K)
            cp_async_16(to + (group + residual) * ALONG, from + (exists ? pixel * PIXEL + part * 8 : 0), exists);
    }
    __device__ void next_chunk(int pass, int at) const {
        if (!AHEAD || pass) return;
        for (int chunk = at ? (at + 1) * SPLIT : 0; chunk < min(CHUNKS, (at + 2) * SPLIT); chunk++)
            copy(chunk, chunk < SPLIT ? copied_end : unit.first_row, unit.end_row);
    }
    // In the first pass the rest of this image's rows, later the next image's, in the places that no pass reads any more:
    // copied by the warpgroup that is behind, between its products.
    __device__ void follow(int pass) {
        if (!PERSISTENT || threadIdx.x < 128) return;
        i64 image = pass ? unit.image + gridDim.x : unit.image;
        int end_row = pass ? rows_start(pass) : unit.end_row;
        first_row = pass ? rows_start(pass - 1) : copied_end;
        if (!pass) copied_end = rows_start(unit.passes - 1);
        from = source(image, first_row);
        pixels = image < images ? (end_row - first_row) * IN_W : 0;
        octet = threadIdx.x - 128;
    }
    __device__ bool pending() const { return PERSISTENT && octet < (pixels + 7) / 8 * 64; }
    __device__ void advance() {
        copy_octet(from, 0, first_row, pixels, octet);
        octet += 128;
    }
    __device__ void begin(unsigned* scratch) {
        if (!AS_IT_IS) exponent = smallest_exponent(exponents, exponent_count, scratch);
    }
    __device__ bool fits(unsigned*) { return true; }
};
// One warpgroup is half a pass ahead of the other, which copies: its first two passes find their rows of the next image
// copied in passes but for the last one, and in all.
__device__ constexpr bool found_in_time(int passes) {
    int end = end_row_of(passes * PASS_WINDOWS - 1);
    return first_row_of((PASSES - 3 + passes) * PASS_WINDOWS) >= (IN_H < end ? IN_H : end);
}
static_assert(
    !PERSISTENT || (AS_IT_IS && UNITS == 1 && WARPS_M == 2 && WARPS_N == 1 && CHUNKS_64 == 1 && PASSES > 2 &&
                    TAPS * STEPS_K >= 4 * STAGES && found_in_time(1) && found_in_time(2)),
    "rows of the next image come in time");

// x is a tensor: converted under a scale that is chosen from the rows of the first pass, with room for larger values in
// later ones. Where that is not enough, all starts again.
template <> struct Band<false> {
    // What the first pass needs at most, in octets (eight channels of a pixel) a thread, and how many of them are in
    // flight at a time. Whether rows come behind multiplications; with SPLIT 2 there are no registers for it.
    enum {
        ROOM = 3,  // of the scale's exponent, for values of later passes
        WINDOWS_OF_UNIT = (UNIT_ROWS - 1) * WINDOW_PITCH + WINDOWS_W,
        LATER = SPLIT == 1 && WINDOWS_OF_UNIT > PASS_WINDOWS,
        EARLY_WINDOWS = LATER ? PASS_WINDOWS : WINDOWS_OF_UNIT,
        NEEDED_ROWS = 2 * ((EARLY_WINDOWS - 1) / WINDOW_PITCH) + 1 + KERNEL_H,
        FIRST_ROWS = NEEDED_ROWS < IN_H ? NEEDED_ROWS : IN_H,
        FIRST_OCTETS = (FIRST_ROWS * IN_W * GROUPS_K + THREADS - 1) / THREADS,
        ROUNDS = (FIRST_OCTETS + 9) / 10,
        BATCH = (FIRST_OCTETS + ROUNDS - 1) / ROUNDS
    };
    const scalar_t* source;  // the image
    const Unit& unit;
    u8* shared;
    int exponent = GUESS, attempts = 0;
    unsigned largest;  // finite magnitude
    // Of the rows for the next pass; the thread's next octet of them, which is in v. With CHANNELS_LAST `pixel` counts
    // octets.
    int first_pixel, pixels, group, pixel;
    float v[8];

    __device__ Band(const scalar_t* x, const int*, int, const Unit& unit, i64, u8* shared)
        : source(x + unit.image * (IN_CHANNELS * IN_H * IN_W)), unit(unit), shared(shared) {
        clear_border(shared, unit);
    }
    // Where the rows end that the first `passes` passes need.
    __device__ int rows_end(int passes) const {
        if (!LATER || passes >= unit.passes) return max(0, unit.end_row);
        return max(0, min(IN_H, end_row_of(unit.first_window + passes * PASS_WINDOWS - 1)));
    }
    // The i-th octet of `count` pixels: neighbours in memory follow one another.
    struct Octet {
        int group, pixel;
        __device__ Octet(int i, int count)
            : group(CHANNELS_LAST ? i % GROUPS_K : i / count), pixel(CHANNELS_LAST ? i / GROUPS_K : i % count) {}
    };
    __device__ void load(int group, int pixel, bool real, float (&v)[8]) const {
        if constexpr (CHANNELS_LAST) {
            typedef Packed<scalar_t, 8> Channels;
            Channels in = {};
            if (real && group * 8 < IN_CHANNELS) in = *(const Channels*)(source + pixel * IN_CHANNELS + group * 8);
            #pragma unroll
            for (int j = 0; j < 8; j++) v[j] = to_acc(in.v[j]);
            return;
        }
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
        u8* to = shared + group * ALONG + band_offset(pixel / IN_W - origin_of(unit), pixel % IN_W);
        #pragma unroll
        for (int part = 0; part < SPLIT; part++) *(uint4*)(to + part * GROUPS_K * ALONG) = take_halves(v, part);
    }
    __device__ void load_first_rows() {
        largest = 0;
        int start = unit.first_row * IN_W, count = max(0, rows_end(1) * IN_W - start);
        for (int at = threadIdx.x; at < count * GROUPS_K; at += THREADS * BATCH) {
            float v[BATCH][8];
            #pragma unroll
            for (int b = 0; b < BATCH; b++) {
                int i = at + b * THREADS;
                Octet octet(i, count);
                load(octet.group, start + octet.pixel, i < count * GROUPS_K, v[b]);
            }
            #pragma unroll
            for (int b = 0; b < BATCH; b++) {
                int i = at + b * THREADS;
                Octet octet(i, count);
                if (i < count * GROUPS_K) store(octet.group, start + octet.pixel, v[b]);
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
    __device__ bool pending() const { return LATER && (CHANNELS_LAST ? pixel < pixels * GROUPS_K : group < GROUPS_K); }
    __device__ void load_next() {
        if constexpr (CHANNELS_LAST) {
            Octet octet(pixel, pixels);
            if (pending()) load(octet.group, first_pixel + octet.pixel, true, v);
            return;
        }
        for (; pending() && pixel >= pixels; group++) pixel -= pixels;
        if (pending()) load(group, first_pixel + pixel, true, v);
    }
    __device__ void advance() {
        if constexpr (CHANNELS_LAST) {
            Octet octet(pixel, pixels);
            store(octet.group, first_pixel + octet.pixel, v);
        } else store(group, first_pixel + pixel, v);
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

typedef Band<X_PACKED || AS_IT_IS> Rows;

// Steps that SPLIT 2 multiplies before it adds: with all small products first, 64 channels lose less than more
// additions would.
#define STEPS_AT_ONCE (SPLIT == 1 || STEPS_K % 2 ? 1 : 2)

// add<TILES>(sums, a_stages, at, rows, band): sums += the products of STEPS_AT_ONCE steps. at: where each step's stage
// begins. rows: the upper and lower pixels of the first step. On return what the step before read may be overwritten.
template <int> struct Multiply;

template <> struct Multiply<1> {
    bool second = false;

    template <int COUNT> __device__ __forceinline__ void add(
        Sums& sums, const WgmmaOperand& a_stages, const int (&at)[STEPS_AT_ONCE], const WgmmaOperand (&rows)[2],
        Rows& band) {
        wgmma_fence();
        #pragma unroll
        for (int k = 0; k < 2; k++)
            #pragma unroll
            for (int lower = 0; lower < 2; lower++)
                wgmma<COUNT>(sums[lower], a_stages.moved(at[0] + k * TILE_M * 32), rows[lower].moved(k * 2 * ALONG));
        wgmma_commit();
        // What a step has loaded arrives during the next one.
        if (second && band.pending()) band.advance();
        second = !second;
        wgmma_wait<1>();
    }
};

template <> struct Multiply<2> {
    float partial[MOST_TILES][4];

    template <int COUNT> __device__ __forceinline__ void add(
        Sums& sums, const WgmmaOperand& a_stages, const int (&at)[STEPS_AT_ONCE], const WgmmaOperand (&rows)[2],
        Rows&) {
        #pragma unroll
        for (int lower = 0; lower < 2; lower++) {
            wgmma_fence();
            #pragma unroll
            for (int product = 0; product < 3; product++)
                #pragma unroll
                for (int k = 0; k < STEPS_AT_ONCE * 2; k++) {
                    WgmmaOperand left = a_stages.moved(at[k / 2] + (product == 0) * HALF_STEP + k % 2 * TILE_M * 32);
                    WgmmaOperand right = rows[lower].moved(((product == 1) * GROUPS_K + k * 2) * ALONG);
                    if (product + k == 0) wgmma<COUNT, false>(partial, left, right);
                    else wgmma<COUNT>(partial, left, right);
                }
            wgmma_commit();
            wgmma_wait<0>();
            wgmma_arrived<COUNT>(partial);
            #pragma unroll
            for (int i = 0; i < COUNT * 4; i++) sums[lower][i / 4][i % 4] += partial[i / 4][i % 4];
            // Else the additions may move behind the next multiplications, with copies of what they read.
            wgmma_arrived<COUNT>(sums[lower]);
        }
    }
};

// In an image's last row of windows, what the kernel's rows before OUTSIDE_KH meet lies outside x. So the last pass leaves
// out these products in tiles that have nothing else, those after UPPER_TILES.
enum {
    OUTSIDE_KH = 2 * (WINDOWS_H - 1) + PAD_H - IN_H + 1,
    UPPER_WINDOWS = (WINDOWS_H - 1) * WINDOW_PITCH - (PASSES - 1) * PASS_WINDOWS,
    UPPER = UPPER_WINDOWS > 0 ? (UPPER_WINDOWS + 3) / 4 : 0,
    UPPER_TILES = UNITS == 1 && WARPS_N == 1 && SPLIT == 1 && OUTSIDE_KH > 0 && UPPER < LAST_TILES ? UPPER : 0
};

struct MainLoop {
    enum { STEPS = TAPS * STEPS_K };
    const Unit& unit;
    Rows& band;
    WeightRing<STEP_BYTES, STEPS> weights;
    int stage = 0, to = 0, position = -1;  // position: of the last step, in the order of the weights
    int warpgroup = __shfl_sync(0xFFFFFFFFu, (int)threadIdx.x / 128, 0);
    int warp_m = warpgroup % WARPS_M, warp_n = warpgroup / WARPS_M;
    WgmmaOperand pixels, a_stages;

    __device__ MainLoop(const Unit& unit, Rows& band, const half_t* packed, u8* shared)
        : unit(unit), band(band), weights(shared + RING_OFFSET, packed), pixels(shared, ALONG, 128),
          a_stages(shared + RING_OFFSET + warp_m * 1024, TILE_M * 16, 128) {
        for (int i = 0; i < STAGES - 2; i++) fetch();
        if (PERSISTENT && warpgroup) rest();
    }
    __device__ void fetch() {
        weights.fetch(to);
        to = weights.next(to);
    }
    // All threads meet for the weights of the next step. Returns where they are.
    __device__ __forceinline__ int next_step() {
        cp_async_wait<STAGES - 3>();
        fence_async_proxy();
        __syncthreads();
        fetch();
        int at = stage;
        stage = weights.next(stage);
        position = position + 1 == STEPS ? 0 : position + 1;
        return at;
    }
    __device__ int channel() const { return warp_m * 64 + threadIdx.x / 32 % 4 * 16 + threadIdx.x % 32 / 4; }

    // With PERSISTENT one warpgroup is half a pass behind the other, so that each multiplies while the other is at its
    // epilogue, and goes through steps there, too. So a pass begins with any step, and goes round.
    __device__ void rest() {
        for (int i = 0; i < STEPS / 2 + 3; i++) next_step();
    }
    __device__ void finish() {
        if (PERSISTENT && !warpgroup) rest();
    }

    template <int COUNT> __device__ __forceinline__ void pass(Sums& sums, int pass, int first_window) {
        if constexpr (PERSISTENT) pass_round<COUNT>(sums, pass, first_window);
        else if (COUNT == LAST_TILES && UPPER_TILES && pass == PASSES - 1)
            pass_of<COUNT, UPPER_TILES>(sums, pass, first_window);
        else pass_of<COUNT, 0>(sums, pass, first_window);
    }
    template <int COUNT> __device__ __forceinline__ void pass_round(Sums& sums, int pass, int first_window) {
        Multiply<SPLIT> multiply;
        band.follow(pass);
        #pragma unroll 1
        for (int i = 0; i < STEPS; i++) {
            int at[] = {next_step()}, tap = position / STEPS_K;
            WgmmaOperand rows[2] = {pixels, pixels};
            #pragma unroll
            for (int lower = 0; lower < 2; lower++)
                rows[lower] = pixels.moved(
                    band_offset(lower + PAD_H - tap / KERNEL_W, 2 * first_window + PAD_W - tap % KERNEL_W) +
                    position % STEPS_K * 4 * ALONG);
            multiply.add<COUNT>(sums, a_stages, at, rows, band);
        }
        while (band.pending()) band.advance();
        wgmma_wait<0>();
    }
    // FEW: the tiles that meet all rows of the kernel; 0: all COUNT do.
    template <int COUNT, int FEW>
    __device__ __forceinline__ void pass_of(Sums& sums, int pass, int first_window) {
        Multiply<SPLIT> multiply;
        band.follow(pass + 1);
        for (int chunk = 0; chunk < CHUNKS_64; chunk++) {
            if constexpr (FEW > 0) taps<FEW>(multiply, sums, pass, first_window, chunk, 0, OUTSIDE_KH);
            taps<COUNT>(multiply, sums, pass, first_window, chunk, FEW ? OUTSIDE_KH : 0, KERNEL_H);
        }
        while (band.pending()) band.advance();
    }

    // 64 channels and rows [first_kh, end_kh) of the kernel.
    template <int COUNT> __device__ __forceinline__ void taps(
        Multiply<SPLIT>& multiply, Sums& sums, int pass, int first_window, int chunk, int first_kh, int end_kh) {
        for (int kh = first_kh; kh < end_kh; kh++) {
            WgmmaOperand rows[2] = {pixels, pixels};
            #pragma unroll
            for (int lower = 0; lower < 2; lower++)
                rows[lower] =
                    pixels.moved(band_offset(lower + PAD_H - kh, 2 * (first_window - unit.first_window) + PAD_W));
            #pragma unroll 1
            for (int kw = 0; kw < KERNEL_W; kw++)
                for (int step = chunk * 2; step < min(STEPS_K, chunk * 2 + 2); step += STEPS_AT_ONCE) {
                    int at[STEPS_AT_ONCE];
                    #pragma unroll
                    for (int i = 0; i < STEPS_AT_ONCE; i++) {
                        at[i] = next_step();
                        if (i + kh + kw == 0 && step == chunk * 2) band.next_chunk(pass, chunk);
                    }
                    int shift = step * 4 * ALONG - kw * 16;
                    WgmmaOperand shifted[2] = {rows[0].moved(shift), rows[1].moved(shift)};
                    multiply.template add<COUNT>(sums, a_stages, at, shifted, band);
                }
        }
        wgmma_wait<0>();
    }
};
