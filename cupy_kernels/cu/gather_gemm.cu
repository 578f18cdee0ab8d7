// Forward and dgrad of the transposed convolution as one implicit GEMM on tensor cores, for any hyper-parameters.
//
//     forward  y [n, oc, oh, ow] = bias[oc] + sum_{ic, kh, kw} x [n, ic, ih, iw] * w[ic, oc, kh, kw],
//              oh = ih s - p + kh d
//     dgrad    dx[n, ic, ih, iw] =            sum_{oc, kh, kw} dy[n, oc, oh, ow] * w[ic, oc, kh, kw]
//
// Rows m of the product are pixels of `out`, columns n its channels, the sum runs over taps and channels of `in`, tap
// by tap. Both are packed with channels innermost (gather_gemm_pack.cu). Which pixel of `in` a tap needs is index
// arithmetic (conv_axis.cuh). A block has one phase.
//
// A forward of dilation 1 may have all phases of a pixel r as columns: phases = 1, merged = stride, and out pixel = r *
// merged + phase of the column. Taps are then shifts of r, and weights are 0 where a shift does not meet a phase. Each
// pixel of `in` is read once for all phases.
//
// The columns of a channel tile: TILE_N / (merged phases) channels of the first phase, the same channels of the next,
// ... With more than one split, each takes `split_steps` steps of the sum and writes `partial`
// [split][group][tile][fragment][thread]; gather_gemm_reduce adds them in ascending order. Grid: x = channel tiles
// (fastest), phases, pixel tiles; y = groups; z = splits (1 for the reduction). Macros: scalar_t (of out and bias),
// MIN_BLOCKS, those of gather_gemm.cuh. The batch's pixels are below 2^31.
#include "gather_gemm.cuh"
#include "conv_axis.cuh"

struct Shapes {
    int images, groups, channels, octets;  // channels: of out, in a group; octets: of in, in a group
    int in_h, in_w, out_h, out_w, taps_h, taps_w;
    int phases_h, phases_w, offset_h, offset_w, step_h, step_w, in_step_h, in_step_w, merged_h, merged_w;
    int channel_tiles, channels_last;
};

// A row of the product: the pixel of `in` under shift 0, and that of `out`, in the whole batch.
struct Row { int pixel, h, w, out; };

// A block's part of the product.
struct Tile {
    int channel, pixel;  // number of its channel tile; its first pixel of the phase
    Axis rows, columns;

    __device__ Tile(const Shapes& s)
        : channel(blockIdx.x % s.channel_tiles),
          pixel(blockIdx.x / s.channel_tiles / (s.phases_h * s.phases_w) * TILE_M),
          rows(blockIdx.x / s.channel_tiles / s.phases_w % s.phases_h, s.phases_h, s.taps_h, s.offset_h, s.step_h),
          columns(blockIdx.x / s.channel_tiles % s.phases_w, s.phases_w, s.taps_w, s.offset_w, s.step_w) {}

    // Fills the table of rows; false if there is none.
    __device__ bool fill(Row* table, const Shapes& s) const {
        int every_h = s.phases_h * s.merged_h, every_w = s.phases_w * s.merged_w;
        int height = (s.out_h - rows.phase + every_h - 1) / every_h,
            width = (s.out_w - columns.phase + every_w - 1) / every_w;
        if (height <= 0 || width <= 0 || pixel >= s.images * height * width) return false;
        Divisor by_image(height * width), by_row(width);
        for (int m = threadIdx.x; m < TILE_M; m += THREADS) {
            unsigned within, w, image = by_image.divide(pixel + m, within), h = by_row.divide(within, w);
            Row row = {0, -(1 << 30), 0, -1};
            if (image < s.images) {
                row.h = h * s.in_step_h, row.w = w * s.in_step_w;
                row.pixel = (image * s.in_h + row.h) * s.in_w + row.w;
                row.out = (image * s.out_h + h * every_h + rows.phase) * s.out_w + w * every_w + columns.phase;
            }
            table[m] = row;
        }
        return true;
    }
};

enum { PITCH_M = TILE_M + 4, PITCH_N = TILE_N + 8, VECTOR = 16 / sizeof(scalar_t) };
enum {
    TURNED_BYTES = 4 * (TILE_N * PITCH_M > TILE_M * PITCH_N ? TILE_N * PITCH_M : TILE_M * PITCH_N),
    TABLE_OFFSET = RING_BYTES > TURNED_BYTES ? RING_BYTES : TURNED_BYTES
};
enum { COLUMNS_OFFSET = TABLE_OFFSET + TILE_M * sizeof(Row) };
static_assert(
    COLUMNS_OFFSET + TILE_N * 8 == SHARED_BYTES, "the ring, then the sums, then the tables of rows and columns");
static_assert(THREADS % TILE_M == 0, "a thread stores one pixel of several channels");

// What makes values of `out` from the sums of a column: the bias, and the exponent of its weights' scale. Looked up
// before the sum, as one thread alone would wait for each.
struct __align__(8) Column {
    float shift;
    short exponent, rotated;  // rotated: see Columns
};

// The columns of a block.
struct Columns {
    int first, count, share;  // channels of the tile, and columns of a phase
    // Without channels_last a thread stores two neighbours at once, or neighbouring threads have neighbouring pixels of
    // a line, of all its phases: sectors of memory that are stored in parts cost many times as much. The columns of a
    // phase are then rotated in shared memory, so that the phases lie in different banks.
    bool together, by_lines;
    int rotation;

    __device__ Columns(const Tile& tile, const Shapes& s)
        : share(TILE_N / (s.merged_h * s.merged_w)), together(s.merged_w == 2 && s.out_w % 2 == 0),
          by_lines(!s.channels_last && s.merged_w > 1 && !together), rotation(by_lines ? max(1, 32 / s.merged_w) : 0) {
        first = tile.channel * share, count = min(share, s.channels - first);
    }
    // exponents: null if there are none.
    __device__ void fill(Column* table, const Shapes& s, const int* exponents, const scalar_t* bias) const {
        Divisor by_share(share), by_merged_w(s.merged_w);
        for (int n = threadIdx.x; n < TILE_N; n += THREADS) {
            unsigned channel, phase_w;
            by_merged_w.divide(by_share.divide(n, channel), phase_w);
            float shift = bias && (int)channel < count ? to_acc(bias[blockIdx.y * s.channels + first + channel]) : 0;
            table[n] = {shift, (short)(exponents ? exponents[n] : 0), (short)(phase_w * rotation)};
        }
    }
};

// Turns the sums in shared memory, so that neighbouring threads store neighbouring elements. exponent: of the scale of
// `in`, 0 if it has none.
__device__ __forceinline__ void store(
    const Sums& sums, float* shared, const Row* table, const Column* of_columns, const Columns& columns,
    const Shapes& s, int exponent, scalar_t* out) {
    int merged = s.merged_h * s.merged_w, share = columns.share, first = columns.first, count = columns.count,
        group = blockIdx.y, lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    #pragma unroll
    for (int j = 0; j < TILES_N; j++) {
        int n = warp / WARPS_M * WARP_N + j * 8 + lane % 4 * 2;
        const Column left = of_columns[n], right = of_columns[n + 1];
        ScaleBack scale[2] = {ScaleBack(exponent + left.exponent), ScaleBack(exponent + right.exponent)};
        #pragma unroll
        for (int i = 0; i < TILES_M; i++)
            #pragma unroll
            for (int half = 0; half < 2; half++) {
                int m = warp % WARPS_M * WARP_M + i * 16 + half * 8 + lane / 4;
                float low = sums[i][j][half * 2], high = sums[i][j][half * 2 + 1];
                low = scale[0](low, left.shift), high = scale[1](high, right.shift);
                if (s.channels_last) *(float2*)(shared + m * PITCH_N + n) = make_float2(low, high);
                else {
                    shared[n * PITCH_M + (m + left.rotated) % TILE_M] = low;
                    shared[(n + 1) * PITCH_M + (m + right.rotated) % TILE_M] = high;
                }
            }
    }
    __syncthreads();
    i64 all_channels = (i64)s.groups * s.channels, plane = s.out_h * s.out_w;
    const int last_h = s.out_h - 1, last_w = s.out_w - 1;
    if (s.channels_last) {
        bool wide = s.channels % VECTOR == 0 && share % VECTOR == 0;
        int each = wide ? VECTOR : 1, per_phase = count / each, per_pixel = per_phase * merged;
        int per_line = per_phase * s.merged_w;  // phases of a line of pixels
        Divisor by_row(TILE_M * per_line), by_pixel(per_line), by_phase(per_phase), by_out_w(s.out_w),
            by_out_h(s.out_h);
        for (int i = threadIdx.x; i < TILE_M * per_pixel; i += THREADS) {
            unsigned in_row, within, at, phase_h = by_row.divide(i, in_row), m = by_pixel.divide(in_row, within),
                                         phase_w = by_phase.divide(within, at);
            const Row row = table[m];
            if (row.out < 0) continue;
            if (merged > 1) {
                unsigned ow, oh, line = by_out_w.divide(row.out, ow);
                by_out_h.divide(line, oh);
                if ((int)(oh + phase_h) > last_h || (int)(ow + phase_w) > last_w) continue;
            }
            int channel = first + at * each, column = (phase_h * s.merged_w + phase_w) * share + at * each;
            scalar_t* to =
                out + (i64)(row.out + (int)(phase_h * s.out_w + phase_w)) * all_channels + group * s.channels + channel;
            const float* from = shared + m * PITCH_N + column;
            if (wide) {
                Packed<scalar_t, VECTOR> line;
                #pragma unroll
                for (int v = 0; v < VECTOR; v += 4) {
                    Packed<float, 4> four = *(const Packed<float, 4>*)(from + v);  // by one access: 8 meet one bank
                    #pragma unroll
                    for (int k = 0; k < 4; k++) line.v[v + k] = from_acc<scalar_t>(four.v[k]);
                }
                store_at_once(to, line);
            } else *to = from_acc<scalar_t>(*from);
        }
        return;
    }
    if (columns.by_lines) {
        Divisor by_merged_w(s.merged_w), by_merged_h(s.merged_h), by_out_w(s.out_w), by_out_h(s.out_h);
        for (int i = threadIdx.x; i < TILE_M * s.merged_w; i += THREADS) {
            unsigned phase_w, m = by_merged_w.divide(i, phase_w);
            const Row row = table[m];
            unsigned ow, oh, image = by_out_h.divide(by_out_w.divide(max(row.out, 0), ow), oh);
            ow += phase_w;
            if (row.out < 0 || (int)ow > last_w) continue;
            scalar_t* to =
                out + ((i64)image * all_channels + group * s.channels + first) * plane + (i64)oh * s.out_w + ow;
            const float* from = shared + phase_w * share * PITCH_M + (m + phase_w * columns.rotation) % TILE_M;
            #pragma unroll 4
            for (int line = 0; line < count * s.merged_h; line++) {
                unsigned phase_h, channel = by_merged_h.divide(line, phase_h);
                if ((int)(oh + phase_h) <= last_h)
                    to[channel * plane + phase_h * s.out_w] =
                        from_acc<scalar_t>(from[(phase_h * s.merged_w * share + channel) * PITCH_M]);
            }
        }
        return;
    }
    int m = threadIdx.x % TILE_M;
    const Row row = table[m];
    if (row.out < 0) return;
    int image = row.out / (s.out_h * s.out_w), within = row.out % (s.out_h * s.out_w);
    scalar_t* to = out + ((i64)image * all_channels + group * s.channels + first) * plane + within;
    int oh = within / s.out_w;
    Divisor by_merged_h(s.merged_h);
    #pragma unroll 4
    for (int i = threadIdx.x / TILE_M; i < count * s.merged_h; i += THREADS / TILE_M) {
        unsigned phase_h, channel = by_merged_h.divide(i, phase_h);
        if (oh + (int)phase_h > last_h) continue;
        const float* from = shared + (phase_h * s.merged_w * share + channel) * PITCH_M + m;
        scalar_t* line = to + channel * plane + phase_h * s.out_w;
        if (columns.together)
            store_at_once(
                line, Packed<scalar_t, 2>{{from_acc<scalar_t>(from[0]), from_acc<scalar_t>(from[share * PITCH_M])}});
        else *line = from_acc<scalar_t>(*from);
    }
}

__device__ inline i64 partial_tile(int split) {
    return (((i64)split * gridDim.y + blockIdx.y) * gridDim.x + blockIdx.x) * (TILE_M * TILE_N) + threadIdx.x;
}

extern "C" __global__ void __launch_bounds__(THREADS, MIN_BLOCKS) gather_gemm(
    const operand_t* __restrict__ in, const int* __restrict__ in_exponents, const operand_t* __restrict__ weights,
    const int* __restrict__ weight_exponents, const scalar_t* __restrict__ bias, scalar_t* __restrict__ out,
    INOUT float* __restrict__ partial, int in_exponent_count, int images, int groups, int channels, int octets,
    int in_h, int in_w, int out_h, int out_w, int taps_h, int taps_w, int phases_h, int phases_w, int offset_h,
    int offset_w, int step_h, int step_w, int in_step_h, int in_step_w, int merged_h, int merged_w, int channel_tiles,
    int channels_last, int split_steps) {
    wait_for_earlier_kernels();
    DYNAMIC_SHARED(u8, shared);
    Row* table = (Row*)(shared + TABLE_OFFSET);
    Shapes s = {images, groups, channels, octets, in_h, in_w, out_h, out_w, taps_h, taps_w, phases_h, phases_w,
        offset_h, offset_w, step_h, step_w, in_step_h, in_step_w, merged_h, merged_w, channel_tiles, channels_last};
    Tile tile(s);
    if (!tile.fill(table, s)) return;
    Column* of_columns = (Column*)(shared + COLUMNS_OFFSET);
    Columns columns(tile, s);
    columns.fill(
        of_columns, s,
        in_exponents ? weight_exponents + ((i64)blockIdx.y * channel_tiles + tile.channel) * TILE_N : nullptr, bias);
    __syncthreads();

    // Copies: a thread has one octet of a step, for the rows m and the columns n that begin with its own.
    enum { ROWS_AT_ONCE = THREADS / 8 };
    static_assert(TILE_M % ROWS_AT_ONCE == 0 && TILE_N % ROWS_AT_ONCE == 0, "a copy of the block has whole rows");
    int place = threadIdx.x % 8, line = threadIdx.x / 8, part = place / LINE_OCTETS;
    int all_taps = tile.rows.count * tile.columns.count, first_step = blockIdx.z * split_steps;
    int steps = (all_taps * octets + LINE_OCTETS - 1) / LINE_OCTETS;
    steps = max(0, min(steps - first_step, split_steps));
    // In this order: chunks of channels, taps, channels of a chunk. Taps that follow each other read neighbouring
    // pixels, which the L1 cache has.
    int chunk = octets % LINE_OCTETS ? octets : LINE_OCTETS;
    Divisor by_chunk(chunk), by_taps(max(1, all_taps)), by_columns(max(1, tile.columns.count));
    int in_pitch = SPLIT * groups * octets * 16, weight_pitch = SPLIT * taps_h * taps_w * octets * 16;
    const u8* in_group = (const u8*)in + (i64)(part * groups + blockIdx.y) * octets * 16;
    const u8* weight_rows = (const u8*)weights +
                            ((i64)(blockIdx.y * channel_tiles + tile.channel) * TILE_N + line) * weight_pitch +
                            (i64)part * taps_h * taps_w * octets * 16;
    // A thread's rows, in registers where these are not what limits the blocks of a multiprocessor.
    enum { KEPT = WGMMA && MIN_BLOCKS == 1 ? TILE_M / ROWS_AT_ONCE : 0 };
    Row kept[KEPT + 1];
    #pragma unroll
    for (int i = 0; i < KEPT; i++) kept[i] = table[line + i * ROWS_AT_ONCE];
    const u8 *from, *weight;
    int shift_h, shift_w, shift;
    bool exists;
    auto begin = [&](int step) __attribute__((always_inline)) {
        unsigned octet, tap, tap_w,
            chunk_taps = by_chunk.divide((first_step + step) * LINE_OCTETS + place % LINE_OCTETS, octet);
        octet += by_taps.divide(chunk_taps, tap) * chunk;
        unsigned tap_h = by_columns.divide(tap, tap_w);
        exists = octet < octets && all_taps;
        shift_h = tile.rows.shift + (int)tap_h * tile.rows.shift_step,
        shift_w = tile.columns.shift + (int)tap_w * tile.columns.shift_step;
        shift = shift_h * in_w + shift_w;
        from = in_group + octet * 16;
        int weight_tap =
            (tile.rows.first + tap_h * tile.rows.every) * taps_w + tile.columns.first + tap_w * tile.columns.every;
        weight = weight_rows + ((i64)weight_tap * octets + octet) * 16;
    };
    auto copy = [&](Shared stage, int piece) __attribute__((always_inline)) {
        Shared to = stage + line_offset(line, place);
        #pragma unroll
        for (int i = piece; i < TILE_M / ROWS_AT_ONCE; i += SLICES) {
            const Row row = KEPT ? kept[i] : table[line + i * ROWS_AT_ONCE];
            bool inside = exists & ((unsigned)(row.h + shift_h) < (unsigned)in_h) &
                          ((unsigned)(row.w + shift_w) < (unsigned)in_w);
            copy_octet<true>(to + i * ROWS_AT_ONCE * LINE_BYTES, from + (i64)(row.pixel + shift) * in_pitch, inside);
        }
        #pragma unroll
        for (int i = piece; i < TILE_N / ROWS_AT_ONCE; i += SLICES)
            copy_octet<false>(
                to + A_BYTES + i * ROWS_AT_ONCE * LINE_BYTES, weight + (i64)(i * ROWS_AT_ONCE) * weight_pitch, exists);
    };
    Sums sums = {};
    sum_steps(sums, shared, steps, begin, copy);
    if (partial) {
        float* to = partial + partial_tile(blockIdx.z);
        #pragma unroll
        for (int i = 0; i < TILES_M * TILES_N * 4; i++) to[i * THREADS] = sums[i / 4 / TILES_N][i / 4 % TILES_N][i % 4];
        return;
    }
    int exponent = in_exponents ? smallest_exponent(in_exponents, in_exponent_count, (unsigned*)shared) : 0;
    store(sums, (float*)shared, table, of_columns, columns, s, exponent, out);
}

extern "C" __global__ void __launch_bounds__(THREADS) gather_gemm_reduce(
    const float* __restrict__ partial, const int* __restrict__ in_exponents, const int* __restrict__ weight_exponents,
    const scalar_t* __restrict__ bias, scalar_t* __restrict__ out, int in_exponent_count, int images, int groups,
    int channels, int octets, int in_h, int in_w, int out_h, int out_w, int taps_h, int taps_w, int phases_h,
    int phases_w, int offset_h, int offset_w, int step_h, int step_w, int in_step_h, int in_step_w, int merged_h,
    int merged_w, int channel_tiles, int channels_last, int splits) {
    wait_for_earlier_kernels();
    DYNAMIC_SHARED(u8, shared);
    Row* table = (Row*)(shared + TABLE_OFFSET);
    Shapes s = {images, groups, channels, octets, in_h, in_w, out_h, out_w, taps_h, taps_w, phases_h, phases_w,
        offset_h, offset_w, step_h, step_w, in_step_h, in_step_w, merged_h, merged_w, channel_tiles, channels_last};
    Tile tile(s);
    if (!tile.fill(table, s)) return;
    Column* of_columns = (Column*)(shared + COLUMNS_OFFSET);
    Columns columns(tile, s);
    columns.fill(
        of_columns, s,
        in_exponents ? weight_exponents + ((i64)blockIdx.y * channel_tiles + tile.channel) * TILE_N : nullptr, bias);
    Sums sums = {};
    for (int split = 0; split < splits; split++) {
        const float* from = partial + partial_tile(split);
        #pragma unroll
        for (int i = 0; i < TILES_M * TILES_N * 4; i++)
            sums[i / 4 / TILES_N][i / 4 % TILES_N][i % 4] += from[i * THREADS];
    }
    __syncthreads();
    int exponent = in_exponents ? smallest_exponent(in_exponents, in_exponent_count, (unsigned*)shared) : 0;
    store(sums, (float*)shared, table, of_columns, columns, s, exponent, out);
}
