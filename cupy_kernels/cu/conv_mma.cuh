// The convolution of implicit_gemm.cuh by mma.sync (sm_80 and newer).
//
// The band lies in shared memory as lines of packed fp16 tiles [row][column][64 halves], every tap reads them shifted,
// by ldmatrix. A zero row comes first, which rows outside the image read; GAP zero lines between rows are the right
// border of one and the left border of the next:
//
//               GAP       IN_W
//     row -1    | 0 0 | 0 0 0 0 0 0 0 |    a line in each place: 64 halves of a pixel
//     row 0     | 0 0 | x x x x x x x |    PITCH = GAP + IN_W lines a row
//     row 1     | 0 0 | x x x x x x x |    with RESIDENT, CHUNKS such bands
//               | 0 0 |
//
// The order of a line's parts (band_key) is such that the eight rows of a matrix, the pixels of a tile, lie in
// different banks. A step of weights is one tap of one chunk.
//
// Macros besides those of implicit_gemm.cuh: UNIT_PASSES, BAND_ROWS (rows of x that a unit needs at most), RESIDENT (1:
// all chunks of the band stay in shared memory, 0: each pass loads one after the other). WINDOW_PITCH is WINDOWS_W.
#pragma once

#define PITCH (IN_W + GAP)
#define BAND_LINES (GAP + (BAND_ROWS + 1) * PITCH)
#define SLICES_AT_ONCE (THREADS == 256 ? 4 : 1)  // else ptxas hoists the loads of more until registers spill
// Of 16 channels; those past IN_CHANNELS are zero.
#define SLICES (CHUNKS > 1 || SPLIT == 2 ? CHUNK_CHANNELS / 16 : IN_CHANNELS / 16)
enum { RING_OFFSET = (RESIDENT ? CHUNKS : 1) * BAND_LINES * LINE_BYTES };
enum { EPILOGUE_OFFSET = RING_OFFSET + STAGES * STAGE_BYTES };  // in dynamic shared memory
static_assert(TILES == 4 && LAST_TILES <= TILES && UNIT_WINDOWS == UNIT_PASSES * PASS_WINDOWS, "a unit is its passes");
static_assert(PACKED_WIDTH == CHUNKS * LINE_BYTES / 2, "weights are packed in lines");

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

#ifdef CUPY_KERNELS_EMULATOR
typedef const u8* Row;
__device__ inline Row row_at(const u8* p) { return p; }
#else
typedef unsigned Row;  // of ldmatrix: an address in shared memory, in one register, of which SPLIT 2 has none to spare
__device__ inline Row row_at(const u8* p) { return (unsigned)__cvta_generic_to_shared(p); }
__device__ inline Row other_part(Row row, int parts) { return row ^ parts * 16; }
#endif

typedef float Sums[4][2 * TILES][4];  // [16 channels][8 pixels][fragment c of mma.cuh]
#define LANE_ROWS 8
#define LANE_WINDOWS TILES

__device__ __forceinline__ float sum_of(const Sums& sums, int row, int t, int corner) {
    return sums[row / 2][2 * t + corner / 2][row % 2 * 2 + corner % 2];
}

// Order of a band line's parts. Along the pixels of a row, and from a row of windows to the next, `place` runs without
// a gap.
__device__ inline int band_key(int row, int column) {
    unsigned place = row * WINDOWS_W + column;
    return ADJACENT ? place / (2 * TILES) % 4 * 2 + place % 2 : place % 8;
}

__device__ inline u8* band_of(u8* shared, int chunk) {
    return shared + (RESIDENT ? chunk : 0) * BAND_LINES * LINE_BYTES;
}

// Zeros in the lines that hold no pixel: the zero row, and the borders.
__device__ inline void clear_border(u8* lines) {
    enum { ZERO_ROW = PITCH + GAP, COUNT = (ZERO_ROW + BAND_ROWS * GAP) * 8, BORDER = GAP ? GAP : 1 };
    for (int i = threadIdx.x; i < COUNT; i += THREADS) {
        int at = i / 8, right = at - ZERO_ROW;
        int line = right < 0 ? at : (right / BORDER + 1) * PITCH + GAP + IN_W + right % BORDER;
        *(uint4*)(lines + line_offset(line, i % 8)) = make_uint4(0, 0, 0, 0);
    }
}

// load(chunk): brings one chunk of the unit's rows into lines.
template <bool> struct Band;

// x is packed: copied asynchronously.
template <> struct Band<true> {
    const half_t* source;  // row first_row of chunk 0
    const Unit& unit;
    u8* shared;
    const int* exponents;
    int exponent_count, exponent;

    __device__ Band(const half_t* x, const int* exponents, int exponent_count, const Unit& unit, u8* shared)
        : source(x + (unit.image * CHUNKS * IN_H + unit.first_row) * IN_W * (LINE_BYTES / 2)), unit(unit),
          shared(shared), exponents(exponents), exponent_count(exponent_count) {
        for (int chunk = 0; chunk < (RESIDENT ? CHUNKS : 1); chunk++) clear_border(band_of(shared, chunk));
        if (RESIDENT)
            for (int chunk = 0; chunk < CHUNKS; chunk++) load(chunk);
    }
    __device__ void load(int chunk) {
        u8* lines = band_of(shared, chunk);
        const half_t* from = source + (i64)chunk * IN_H * IN_W * (LINE_BYTES / 2);
        for (int i = threadIdx.x; i < (unit.end_row - unit.first_row) * IN_W * 8; i += THREADS) {
            int row = i / 8 / IN_W, column = i / 8 % IN_W + GAP;
            cp_async_16(
                lines + line_offset((row + 1) * PITCH + column, i % 8, band_key(unit.first_row + row, column)),
                from + i * 8, true);
        }
        cp_async_commit();
    }
    __device__ void begin(unsigned* scratch) { exponent = smallest_exponent(exponents, exponent_count, scratch); }
};

// x is a tensor: converted under a scale that is chosen from all rows of the unit.
template <> struct Band<false> {
    const scalar_t* source;  // channel 0 of row first_row
    const Unit& unit;
    u8* shared;
    int exponent = GUESS;
    unsigned largest = 0;  // finite magnitude

    __device__ Band(const scalar_t* x, const int*, int, const Unit& unit, u8* shared)
        : source(
              x + (CHANNELS_LAST ? (unit.image * IN_H + unit.first_row) * IN_W * IN_CHANNELS
                                 : (unit.image * IN_CHANNELS * IN_H + unit.first_row) * IN_W)),
          unit(unit), shared(shared) {
        for (int chunk = 0; chunk < (RESIDENT ? CHUNKS : 1); chunk++) clear_border(band_of(shared, chunk));
    }
    __device__ void begin(unsigned* scratch) {
        if (!RESIDENT) exponent = measured(scratch);
        for (bool again = RESIDENT; again;) {
            for (int chunk = 0; chunk < CHUNKS; chunk++) load(chunk);
            int right = scale_exponent(block_max(largest, scratch));
            again = exponent == GUESS && (right < GUESS || right > GUESS + SLACK);
            if (again) exponent = right;
        }
    }
    // Exponent of the scale for the unit's rows, all channels.
    __device__ int measured(unsigned* scratch) const {
        enum { WIDTH = !CHANNELS_LAST && IN_W * sizeof(scalar_t) % 16 ? 1 : 16 / sizeof(scalar_t) };
        typedef Packed<scalar_t, WIDTH> Pack;
        int count = (unit.end_row - unit.first_row) * IN_W / WIDTH;
        unsigned largest = 0;
        if constexpr (CHANNELS_LAST) {
            largest = largest_of<16>((const Pack*)source, (int)threadIdx.x, THREADS, count * IN_CHANNELS);
            return scale_exponent(block_max(largest, scratch));
        }
        for (int k = threadIdx.x / 32; k < IN_CHANNELS; k += THREADS / 32)
            largest =
                max(largest, largest_of<16>((const Pack*)(source + k * IN_H * IN_W), (int)threadIdx.x % 32, 32, count));
        return scale_exponent(block_max(largest, scratch));
    }

    // Of the i-th octet of channels: neighbours in memory follow one another.
    __device__ static int pixel_of(int i) { return CHANNELS_LAST ? i / (CHUNK_CHANNELS / 8) : i % (BAND_ROWS * IN_W); }
    __device__ static int octet_of(int i) { return CHANNELS_LAST ? i % (CHUNK_CHANNELS / 8) : i / (BAND_ROWS * IN_W); }

    __device__ void load(int chunk) {
        u8* lines = band_of(shared, chunk);
        float scale = power_of_two(exponent);
        // Not resident, the sums hold the registers; SPLIT 2 has room where its fragments will be.
        enum { BATCH = RESIDENT ? 8 : SPLIT == 2 ? 4 : 1, COUNT = BAND_ROWS * IN_W * (CHUNK_CHANNELS / 8) };
        // Lanes take 32 pixels in such an order that eight at a time write to different banks.
        int lane = threadIdx.x % 32, spread = lane;
        if (ADJACENT && !CHANNELS_LAST) spread = lane % 2 + lane / 2 % 4 * (2 * TILES) + lane / 8 % TILES * 2;
        for (int first = threadIdx.x - lane + spread; first < COUNT; first += THREADS * BATCH) {
            float v[BATCH][8];
            #pragma unroll
            for (int b = 0; b < BATCH; b++) {
                int i = first + b * THREADS, pixel = pixel_of(i);
                int k = chunk * CHUNK_CHANNELS + octet_of(i) * 8;
                bool inside = unit.first_row + pixel / IN_W < unit.end_row && k < IN_CHANNELS && i < COUNT;
                if constexpr (CHANNELS_LAST) {
                    typedef Packed<scalar_t, 8> Channels;
                    Channels in = {};
                    if (inside) in = *(const Channels*)(source + pixel * IN_CHANNELS + k);
                    #pragma unroll
                    for (int j = 0; j < 8; j++) v[b][j] = to_acc(in.v[j]);
                    continue;
                }
                const scalar_t* from = source + k * IN_H * IN_W + pixel;
                #pragma unroll
                for (int j = 0; j < 8; j++) v[b][j] = inside ? to_acc(from[j * IN_H * IN_W]) : 0;
            }
            #pragma unroll
            for (int b = 0; b < BATCH; b++) {
                int i = first + b * THREADS, pixel = pixel_of(i);
                int row = pixel / IN_W, column = pixel % IN_W + GAP;
                #pragma unroll
                for (int j = 0; j < 8; j++) {
                    largest = max(largest, finite_magnitude(v[b][j]));
                    v[b][j] = multiply_unflushed(v[b][j], scale);
                }
                int key = band_key(unit.first_row + row, column);
                if (i < COUNT) store_line(lines, (row + 1) * PITCH + column, octet_of(i), v[b], key);
            }
        }
    }
};

// add<TILES>(sums, a_row, b_row): sums += what one tap of one chunk adds, the channels at `a_row` times the pixels at
// `b_row`, fragments as mma.cuh has them. taps(tap): calls tap(kw) for a row of taps.
template <int> struct Multiply;

template <> struct Multiply<1> {
    template <class Tap> __device__ static __forceinline__ void taps(Tap tap) {
        for (int kw = 0; kw < KERNEL_W; kw++) tap(kw);
    }
    template <int COUNT> __device__ static __forceinline__ void add(Sums& sums, Row a_row, const Row (&b_row)[COUNT]) {
        #pragma unroll SLICES_AT_ONCE
        for (int slice = 0; slice < SLICES; slice++) {
            unsigned a[4][4], b[4];
            #pragma unroll
            for (int i = 0; i < 4; i++) ldmatrix_x4(a[i], other_part(a_row + i * 16 * LINE_BYTES, slice * 2));
            #pragma unroll
            for (int t = 0; t < COUNT; t++) {
                ldmatrix_x4(b, other_part(b_row[t], slice * 2));
                #pragma unroll
                for (int i = 0; i < 4; i++)
                    #pragma unroll
                    for (int n = 0; n < 2; n++) mma_m16n8k16(sums[i][2 * t + n], a[i], b[2 * n], b[2 * n + 1]);
            }
        }
    }
};

// From zero for each tap, see fp16_tiles.cuh.
template <> struct Multiply<2> {
    template <class Tap> __device__ static __forceinline__ void taps(Tap tap) {
        #pragma unroll 1
        for (int kw = 0; kw < KERNEL_W; kw++) tap(kw);
    }
    typedef unsigned Parts[SLICES][2][4];

    __device__ static __forceinline__ void load(Parts& parts, Row row) {
        #pragma unroll
        for (int slice = 0; slice < SLICES; slice++)
            #pragma unroll
            for (int part = 0; part < 2; part++)
                ldmatrix_x4(parts[slice][part], other_part(row, part * (CHUNK_CHANNELS / 8) + slice * 2));
    }
    template <int COUNT> __device__ static __forceinline__ void add(Sums& sums, Row a_row, const Row (&b_row)[COUNT]) {
        Parts a[4], b;
        #pragma unroll
        for (int i = 0; i < 4; i++) load(a[i], a_row + i * 16 * LINE_BYTES);
        #pragma unroll
        for (int t = 0; t < COUNT; t++) {
            load(b, b_row[t]);
            #pragma unroll
            for (int i = 0; i < 4; i++) {
                float partial[2][4] = {};
                #pragma unroll
                for (int product = 0; product < 3; product++)
                    #pragma unroll
                    for (int slice = 0; slice < SLICES; slice++)
                        #pragma unroll
                        for (int n = 0; n < 2; n++) {
                            const unsigned (&right)[4] = b[slice][product == 1];
                            mma_m16n8k16(partial[n], a[i][slice][product == 0], right[2 * n], right[2 * n + 1]);
                        }
                #pragma unroll
                for (int j = 0; j < 8; j++) sums[i][2 * t + j / 4][j % 4] += partial[j / 4][j % 4];
            }
        }
    }
};

typedef Band<X_PACKED> Rows;

struct MainLoop {
    const Unit& unit;
    Rows& band;
    u8* shared;
    WeightRing<STAGE_BYTES, CHUNKS * TAPS> weights;
    int stage = 0, lane = threadIdx.x % 32, warp_m = threadIdx.x / 32 % WARPS_M, warp_n = threadIdx.x / 32 / WARPS_M;

    __device__ MainLoop(const Unit& unit, Rows& band, const half_t* packed, u8* shared)
        : unit(unit), band(band), shared(shared), weights(shared + RING_OFFSET, packed) {
        for (int i = 0; i < STAGES - 1; i++) weights.fetch(i * STAGE_BYTES);
    }
    __device__ int channel() const { return warp_m * 64 + lane / 4; }

    template <int COUNT> __device__ __forceinline__ void pass(Sums& sums, int, int first_window) {
        // This lane's rows of ldmatrix: pixel lane % 8 of the upper or lower row of tile t; lanes 8 to 15 and 24 to 31
        // pass channels + 8.
        int row_of[COUNT], column_of[COUNT];
        #pragma unroll
        for (int t = 0; t < COUNT; t++) {
            Pixel pixel(first_window + lane_window(lane % 8 / 2, t, COUNT), lane / 16 * 2 + lane % 2);
            row_of[t] = pixel.oh + PAD_H;
            column_of[t] = GAP + min(pixel.ow, OUT_W - 1) + PAD_W;
        }
        for (int chunk = 0; chunk < CHUNKS; chunk++) {
            if (!RESIDENT) {
                __syncthreads();
                band.load(chunk);
                if (X_PACKED) cp_async_wait<0>();
                __syncthreads();
            }
            Row chunk_lines = row_at(band_of(shared, chunk)), a_row, b_row[COUNT];
            // Called when the last tap's fragments are loaded: its stage is free once all warps are here.
            auto turn_to = [&](int kh, int kw) __attribute__((always_inline)) {
                cp_async_wait<STAGES - 2>();
                __syncthreads();
                weights.fetch(weights.previous(stage));
                a_row = row_at(weights.ring) + stage + line_offset(warp_m * 64 + lane % 16, lane / 16);
                stage = weights.next(stage);
                #pragma unroll
                for (int t = 0; t < COUNT; t++) {
                    int ih = row_of[t] - kh, column = column_of[t] - kw;
                    int row_line = ih >= 0 && ih < unit.end_row ? (ih - unit.first_row + 1) * PITCH : 0;
                    b_row[t] = chunk_lines + line_offset(row_line + column, lane / 8 % 2, band_key(ih, column));
                }
            };
            for (int kh = 0; kh < KERNEL_H; kh++)
                Multiply<SPLIT>::taps([&](int kw) __attribute__((always_inline)) {
                    turn_to(kh, kw);
                    Multiply<SPLIT>::add(sums, a_row, b_row);
                });
        }
    }
};
