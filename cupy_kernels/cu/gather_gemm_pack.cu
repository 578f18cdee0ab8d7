// Operands of the implicit GEMMs (gather_gemm.cuh), and what is left to do with results. Operands: channels innermost,
// in octets, those past the last one zero.
//
//     pixels  [image, h, w][part][group][octets of channels], value * 2^e, e the smallest of `exponents`
//     taps    [group][channel tile][column][part][tap][octets of channels],
//             value * 2^weight_exponents[group][channel tile][column]
//
// part: 0 the value, with SPLIT 2 also 1 the residual. 16-bit tensors are not scaled: `exponents` is null.
// fp16_tiles.cu's largest_magnitude writes the exponents of a float tensor. pack_planes: from [N, C, H, W]; a thread
// has an octet of WIDTH pixels. They are turned in shared memory, so that neighbouring threads write neighbouring
// octets. pack_rows: from [N, H, W, C]; a thread has an octet. turn_rows: back from [N, H, W, C] to [N, C, H, W], where
// a product would store sectors of memory in parts, which costs many times as much. pack_taps, tap_exponents: column n
// of a channel tile is channel n % share of the tile, under phase n / share of the merged phases (gather_gemm.cu);
// share = TILE_N / phases. Its tap t is tap phase + base + t * merged of w, on each axis, 0 where w has none. Macros:
// scalar_t, operand_t, those of fp16_tiles.cuh, WIDTH.
#include "common.cuh"
#include "fp16_tiles.cuh"

// Eight values as an octet; with SPLIT 2 leaves the residuals in `v`.
struct Bf16Octets {};
struct Fp16Octets {};
template <class T> struct Octets { typedef Fp16Octets type; };
template <> struct Octets<bf16_t> { typedef Bf16Octets type; };
__device__ inline uint4 take_octet(float (&v)[8], int part, Fp16Octets) { return take_halves(v, part); }
__device__ inline uint4 take_octet(float (&v)[8], int, Bf16Octets) {
    auto pair = [&](int i) { return from_acc<bf16_t>(v[i]).bits | (unsigned)from_acc<bf16_t>(v[i + 1]).bits << 16; };
    return make_uint4(pair(0), pair(2), pair(4), pair(6));
}

__device__ inline float scale_of(const int* exponents, int count, unsigned* scratch) {
    return exponents ? power_of_two(smallest_exponent(exponents, count, scratch)) : 1;
}

__device__ inline void store_octet(float (&v)[8], float scale, operand_t* to, i64 part_stride) {
    typename Octets<operand_t>::type octets;
    #pragma unroll
    for (int j = 0; j < 8; j++) v[j] = multiply_unflushed(v[j], scale);
    #pragma unroll
    for (int part = 0; part < SPLIT; part++) *(uint4*)(to + part * part_stride) = take_octet(v, part, octets);
}

// Grid: x = blocks of `block_octets` octets of all groups (fastest) and as many pixels as 256 threads have. Dynamic
// shared memory: `block_octets` octets and one more for each pixel.
extern "C" __global__ void pack_planes(
    const scalar_t* __restrict__ source, const int* __restrict__ exponents, operand_t* __restrict__ packed,
    int exponent_count, int images, int groups, int channels, int octets, int pixels, int block_octets) {
    wait_for_earlier_kernels();
    DYNAMIC_SHARED(uint4, tile);
    __shared__ unsigned scratch[32];
    typedef Packed<scalar_t, WIDTH> Pack;
    int all = groups * octets, chunks = (all + block_octets - 1) / block_octets, each = blockDim.x / block_octets;
    int place = threadIdx.x % each, octet = threadIdx.x / each, at = blockIdx.x % chunks * block_octets + octet,
        block_pixels = each * WIDTH;
    i64 first = blockIdx.x / chunks * (i64)block_pixels, total = (i64)images * pixels;
    bool exists = octet < block_octets && at < all && first + place * WIDTH < total;
    Pack in[8] = {};
    if (exists) {
        int position = first + place * WIDTH, image = position / pixels, pixel = position % pixels,
            first_channel = at % octets * 8;
        const scalar_t* from =
            source + (((i64)image * groups + at / octets) * channels + first_channel) * pixels + pixel;
        #pragma unroll
        for (int j = 0; j < 8; j++)
            if (first_channel + j < channels) in[j] = *(const Pack*)(from + (i64)j * pixels);
    }
    float scale = scale_of(exponents, exponent_count, scratch);
    int row = block_octets * SPLIT, pitch = row | 1;  // an odd number of octets: neighbouring pixels in different banks
    if (exists)
        #pragma unroll
        for (int k = 0; k < WIDTH; k++) {
            float v[8];
            #pragma unroll
            for (int j = 0; j < 8; j++) v[j] = to_acc(in[j].v[k]);
            store_octet(v, scale, (operand_t*)(tile + (place * WIDTH + k) * pitch + octet), block_octets * 8);
        }
    __syncthreads();
    Divisor by_row(row), by_octets(block_octets);
    for (int i = threadIdx.x; i < block_pixels * row; i += blockDim.x) {
        unsigned in_row, in_part, pixel = by_row.divide(i, in_row), part = by_octets.divide(in_row, in_part);
        int to = blockIdx.x % chunks * block_octets + in_part;
        if (first + pixel < total && to < all)
            ((uint4*)packed)[((first + pixel) * SPLIT + part) * all + to] = tile[pixel * pitch + in_row];
    }
}

// Grid: x = octets of all pixels.
extern "C" __global__ void pack_rows(
    const scalar_t* __restrict__ source, const int* __restrict__ exponents, operand_t* __restrict__ packed,
    int exponent_count, int images, int groups, int channels, int octets, int pixels) {
    wait_for_earlier_kernels();
    __shared__ unsigned scratch[32];
    i64 all_octets = (i64)groups * octets, i = (i64)blockIdx.x * blockDim.x + threadIdx.x, pixel = i / all_octets;
    int octet = i % all_octets, group = octet / octets, first = octet % octets * 8;
    bool exists = pixel < (i64)images * pixels;
    float v[8] = {};
    if (exists) {
        const scalar_t* from = source + (pixel * groups + group) * channels + first;
        enum { VECTOR = 16 / sizeof(scalar_t) };
        if (channels % 8 == 0) {
            #pragma unroll
            for (int j = 0; j < 8; j += VECTOR) {
                Packed<scalar_t, VECTOR> in = *(const Packed<scalar_t, VECTOR>*)(from + j);
                #pragma unroll
                for (int k = 0; k < VECTOR; k++) v[j + k] = to_acc(in.v[k]);
            }
        } else
            #pragma unroll
            for (int j = 0; j < 8; j++)
                if (first + j < channels) v[j] = to_acc(from[j]);
    }
    float scale = scale_of(exponents, exponent_count, scratch);
    if (exists) store_octet(v, scale, packed + pixel * SPLIT * all_octets * 8 + octet * 8, all_octets * 8);
}

// target [N, C, H, W] of source [N, H, W, C]. A block turns 64 pixels and 32 channels of an image in shared memory.
// Grid: x = blocks of channels (fastest), of pixels, images.
extern "C" __global__ void __launch_bounds__(256)
    turn_rows(const scalar_t* __restrict__ source, scalar_t* __restrict__ target, int channels, int pixels) {
    wait_for_earlier_kernels();
    enum { PIXELS = 64, CHANNELS = 32, VECTOR = 16 / sizeof(scalar_t) };
    __shared__ scalar_t tile[CHANNELS][PIXELS + 4 / sizeof(scalar_t)];
    int channel_blocks = (channels + CHANNELS - 1) / CHANNELS, pixel_blocks = (pixels + PIXELS - 1) / PIXELS;
    int first_channel = blockIdx.x % channel_blocks * CHANNELS,
        first_pixel = blockIdx.x / channel_blocks % pixel_blocks * PIXELS;
    i64 image = blockIdx.x / channel_blocks / pixel_blocks;
    source += (image * pixels + first_pixel) * channels + first_channel;
    int count = min(CHANNELS, channels - first_channel), rows = min(PIXELS, pixels - first_pixel);
    if (channels % VECTOR == 0) {
        for (int i = threadIdx.x; i < rows * (CHANNELS / VECTOR); i += 256) {
            int pixel = i / (CHANNELS / VECTOR), channel = i % (CHANNELS / VECTOR) * VECTOR;
            if (channel >= count) continue;
            Packed<scalar_t, VECTOR> line =
                *(const Packed<scalar_t, VECTOR>*)(source + (i64)pixel * channels + channel);
            #pragma unroll
            for (int v = 0; v < VECTOR; v++) tile[channel + v][pixel] = line.v[v];
        }
    } else
        for (int i = threadIdx.x; i < rows * CHANNELS; i += 256)
            if (i % CHANNELS < count)
                tile[i % CHANNELS][i / CHANNELS] = source[(i64)(i / CHANNELS) * channels + i % CHANNELS];
    __syncthreads();
    target += (image * channels + first_channel) * pixels + first_pixel;
    for (int i = threadIdx.x; i < count * PIXELS; i += 256)
        if (i % PIXELS < rows) target[(i64)(i / PIXELS) * pixels + i % PIXELS] = tile[i / PIXELS][i % PIXELS];
}

// Weights: the element of (group, channel of a column, channel of the sum, tap) is at the sum of its strides.
struct Weights {
    int tile_n, channels, sum_channels, octets, kernel_h, kernel_w, taps_h, taps_w, merged_h, merged_w, base_h, base_w;
    i64 group_stride, channel_stride, sum_stride;
    int tap_stride;

    // The value of a column for channel c of the sum under a tap; 0 where there is none.
    __device__ float value(const scalar_t* w, int group, int column, int c, int tap) const {
        int share = tile_n / (merged_h * merged_w), phase = column % tile_n / share,
            channel = column / tile_n * share + column % tile_n % share;
        int kh = phase / merged_w + base_h + tap / taps_w * merged_h,
            kw = phase % merged_w + base_w + tap % taps_w * merged_w;
        bool inside = channel < channels && phase < merged_h * merged_w && c < sum_channels && kh >= 0 &&
                      kh < kernel_h && kw >= 0 && kw < kernel_w;
        return inside ? to_acc(
                            w[group * group_stride + channel * channel_stride + c * sum_stride +
                                (kh * kernel_w + kw) * tap_stride])
                      : 0;
    }
};

// exponents[group][column]: of the channel's weights, the same for all phases. A block has a channel, or 32 of them if
// they are neighbours in memory. Grid: x = channels of a group with those that fill the last tile, y = groups.
extern "C" __global__ void tap_exponents(
    const scalar_t* __restrict__ w, int* __restrict__ exponents, int tile_n, int channels, int sum_channels, int octets,
    int kernel_h, int kernel_w, int taps_h, int taps_w, int merged_h, int merged_w, int base_h, int base_w,
    i64 group_stride, i64 channel_stride, i64 sum_stride, int tap_stride, int columns) {
    wait_for_earlier_kernels();
    __shared__ unsigned scratch[32][32];
    int lanes = channel_stride == 1 ? 32 : 1, lane = threadIdx.x % lanes, channel = blockIdx.x * lanes + lane;
    int taps = kernel_h * kernel_w, inner = tap_stride <= sum_stride ? taps : sum_channels;
    i64 inner_stride = tap_stride <= sum_stride ? tap_stride : sum_stride,
        outer_stride = tap_stride <= sum_stride ? sum_stride : tap_stride;
    const scalar_t* from = w + blockIdx.y * group_stride + channel * channel_stride;
    enum { VECTOR = 16 / sizeof(scalar_t) };
    bool wide = inner_stride == 1 && inner % VECTOR == 0 && outer_stride % VECTOR == 0 &&
                channel_stride % VECTOR == 0 && group_stride % VECTOR == 0 && (size_t)w % 16 == 0;
    unsigned largest = 0;
    if (wide && channel < channels) {
        Divisor by_inner(inner / VECTOR);
        #pragma unroll 4
        for (int i = threadIdx.x; i < sum_channels * taps / VECTOR; i += blockDim.x) {
            unsigned at, outer = by_inner.divide(i, at);
            Packed<scalar_t, VECTOR> in = *(const Packed<scalar_t, VECTOR>*)(from + outer * outer_stride + at * VECTOR);
            #pragma unroll
            for (int v = 0; v < VECTOR; v++) largest = max(largest, finite_magnitude(to_acc(in.v[v])));
        }
    } else if (channel < channels) {
        Divisor by_inner(inner);
        #pragma unroll 4
        for (int i = threadIdx.x / lanes; i < sum_channels * taps; i += blockDim.x / lanes) {
            unsigned at, outer = by_inner.divide(i, at);
            largest = max(largest, finite_magnitude(to_acc(from[outer * outer_stride + at * inner_stride])));
        }
    }
    if (lanes == 1) largest = block_max(largest, scratch[0]);
    else {
        scratch[threadIdx.x / 32][lane] = largest;
        __syncthreads();
        for (unsigned warp = 0; warp < blockDim.x / 32; warp++) largest = max(largest, scratch[warp][lane]);
    }
    // Columns that are left over in a tile have the exponents of some channel.
    int share = tile_n / (merged_h * merged_w), column = channel / share * tile_n, within = channel % share;
    for (within += (int)threadIdx.x / lanes * share; within < tile_n; within += blockDim.x / lanes * share)
        if (column < columns) exponents[blockIdx.y * columns + column + within] = scale_exponent(largest);
}

// A thread has an octet, two neighbours two octets of a tap. The pairs read neighbouring memory: by_columns says
// whether columns lie closer than channels of the sum. exponents: null for 16-bit weights. Grid: x = octets of a group,
// y = groups.
extern "C" __global__ void pack_taps(
    const scalar_t* __restrict__ w, const int* __restrict__ exponents, operand_t* __restrict__ packed, int tile_n,
    int channels, int sum_channels, int octets, int kernel_h, int kernel_w, int taps_h, int taps_w, int merged_h,
    int merged_w, int base_h, int base_w, i64 group_stride, i64 channel_stride, i64 sum_stride, int tap_stride,
    int columns, int by_columns) {
    wait_for_earlier_kernels();
    Weights weights = {tile_n, channels, sum_channels, octets, kernel_h, kernel_w, taps_h, taps_w, merged_h, merged_w,
        base_h, base_w, group_stride, channel_stride, sum_stride, tap_stride};
    int taps = taps_h * taps_w, i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= columns * taps * octets) return;
    int together = octets % 2 ? 1 : 2, near = by_columns ? columns : octets / together, pair = i / together;
    int within = pair % (near * taps), far = pair / (near * taps);
    int tap = tap_stride == 1 ? within % taps : within / near, place = tap_stride == 1 ? within / taps : within % near;
    int column = by_columns ? place : far, octet = (by_columns ? far : place) * together + i % together;
    i64 row = (i64)blockIdx.y * columns + column, part_stride = (i64)taps * octets * 8;
    float v[8];
    #pragma unroll
    for (int j = 0; j < 8; j++) v[j] = weights.value(w, blockIdx.y, column, octet * 8 + j, tap);
    store_octet(
        v, exponents ? power_of_two(exponents[row]) : 1,
        packed + row * SPLIT * part_stride + ((i64)tap * octets + octet) * 8, part_stride);
}

// The same of 16-bit weights without merged phases, by 16 bytes: `taps` neighbours in memory, and where columns are
// neighbours, too, all of them. A thread has an octet of 8 neighbours. Eight threads have neighbouring octets. Grid:
// x = blocks of 8 octets (fastest), of 32 times 8 neighbours; y = groups.
extern "C" __global__ void __launch_bounds__(256) turn_taps(
    const operand_t* __restrict__ w, operand_t* __restrict__ packed, int channels, int sum_channels, int octets,
    int taps, i64 group_stride, i64 channel_stride, i64 sum_stride, int columns) {
    wait_for_earlier_kernels();
    int octet_blocks = (octets + 7) / 8, octet = blockIdx.x % octet_blocks * 8 + threadIdx.x % 8,
        first = (blockIdx.x / octet_blocks * 32 + threadIdx.x / 8) * 8;
    if (octet >= octets || first >= columns * taps) return;
    Divisor by_taps(taps);
    unsigned tap, column = by_taps.divide(first, tap);
    const operand_t* from = w + blockIdx.y * group_stride + column * channel_stride + tap + octet * 8 * sum_stride;
    typedef Packed<operand_t, 8> Eight;
    Eight rows[8] = {};
    #pragma unroll
    for (int j = 0; j < 8; j++)
        if (first < channels * taps && octet * 8 + j < sum_channels) rows[j] = *(const Eight*)(from + j * sum_stride);
    operand_t* to = packed + ((i64)blockIdx.y * columns * taps * octets + octet) * 8;
    #pragma unroll
    for (int i = 0; i < 8; i++) {
        Eight line;
        #pragma unroll
        for (int j = 0; j < 8; j++) line.v[j] = rows[j].v[i];
        store_at_once(to + (i64)(first + i) * octets * 8, line);
    }
}
