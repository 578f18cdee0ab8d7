// Weight gradient of the transposed convolution as an implicit GEMM on tensor cores, for any hyper-parameters.
//
//     dw[ic, oc, kh, kw] = sum_{n, ih, iw} x[n, ic, ih, iw] * dy[n, oc, ih s - p + kh d, iw s - p + kw d]
//
// Rows m of the product are input channels, columns n are taps times output channels (octets * 8 a tap), the sum runs
// over the pixels of x. x and dy are packed (gather_gemm_pack.cu). A split of the sum takes `split_steps` steps and
// writes partial [split][group][ic][n]; wgrad_gemm_reduce adds the splits in ascending order, undoes the scales, and
// writes dw. The octets of a pixel that a tap takes outside of dy are zero; a pixel of x that is infinite makes NaN of
// them, as in cuDNN. Grid of wgrad_gemm: x = tiles of m (fastest) and n, y = splits, z = groups; of the reduction: x =
// blocks of output channels (fastest), taps, input channels, y = groups. Macros: scalar_t (of dw), MIN_BLOCKS, those of
// gather_gemm.cuh.
#include "gather_gemm.cuh"

struct Pixel { int dy, h, w; };  // of dy, in the whole batch and in its image, under a tap that shifts by 0

extern "C" __global__ void __launch_bounds__(THREADS, MIN_BLOCKS) wgrad_gemm(
    const operand_t* __restrict__ x, const operand_t* __restrict__ dy, float* __restrict__ partial, int images,
    int groups, int in_channels, int in_octets, int out_octets, int in_h, int in_w, int out_h, int out_w, int kernel_h,
    int kernel_w, int stride_h, int stride_w, int pad_h, int pad_w, int dilation_h, int dilation_w, int tiles_m,
    int split_steps) {
    wait_for_earlier_kernels();
    DYNAMIC_SHARED(u8, shared);
    Pixel* tables = (Pixel*)(shared + RING_BYTES);  // of two steps
    static_assert(RING_BYTES + 2 * STEP * sizeof(Pixel) == SHARED_BYTES, "the tables follow the ring");
    int pixels = images * in_h * in_w, columns = kernel_h * kernel_w * out_octets * 8, group = blockIdx.z;
    int first_m = blockIdx.x % tiles_m * TILE_M, first_n = blockIdx.x / tiles_m * TILE_N;
    int first_step = blockIdx.y * split_steps, steps = min(split_steps, (pixels + STEP - 1) / STEP - first_step);
    Divisor by_image(in_h * in_w), by_row(in_w), by_octets(out_octets), by_kernel_w(kernel_w);

    // Copies: a thread has one octet of a pixel, in each operand, for every so many pixels of a step.
    enum { OCTETS_M = TILE_M / 8 * SPLIT, OCTETS_N = TILE_N / 8 * SPLIT };
    static_assert(THREADS % OCTETS_M == 0 && THREADS % OCTETS_N == 0, "a thread has one octet of an operand");
    int octet_m = threadIdx.x % (OCTETS_M / SPLIT), part_m = threadIdx.x / (OCTETS_M / SPLIT) % SPLIT,
        row_m = threadIdx.x / OCTETS_M;
    int octet_n = threadIdx.x % (OCTETS_N / SPLIT), part_n = threadIdx.x / (OCTETS_N / SPLIT) % SPLIT,
        row_n = threadIdx.x / OCTETS_N;
    int from_m = first_m / 8 + octet_m;
    unsigned from_n, tap_w, tap = by_octets.divide(first_n / 8 + octet_n, from_n),
                            tap_h = by_kernel_w.divide(tap, tap_w);
    int shift_h = (int)tap_h * dilation_h - pad_h, shift_w = (int)tap_w * dilation_w - pad_w,
        shift = shift_h * out_w + shift_w;
    bool exists_m = from_m < in_octets, exists_n = tap_h < kernel_h;
    int x_pitch = SPLIT * groups * in_octets * 16, dy_pitch = SPLIT * groups * out_octets * 16;
    const u8* x_octet = (const u8*)x + ((i64)(part_m * groups + group) * in_octets + from_m) * 16;
    const u8* dy_octet = (const u8*)dy + ((i64)(part_n * groups + group) * out_octets + from_n) * 16;

    auto fill = [&](int step) {  // the table that the step's copies read after a barrier
        if (threadIdx.x >= STEP) return;
        unsigned within, w, at = (first_step + step) * STEP + threadIdx.x, image = by_image.divide(at, within),
                            h = by_row.divide(within, w);
        Pixel pixel = {0, -(1 << 30), 0};
        if (at < pixels) {
            pixel.h = h * stride_h, pixel.w = w * stride_w;
            pixel.dy = (image * out_h + pixel.h) * out_w + pixel.w;
        }
        tables[step % 2 * STEP + threadIdx.x] = pixel;
    };
    int first;
    const Pixel* table;
    auto begin = [&](int step) __attribute__((always_inline)) {
        first = (first_step + step) * STEP;
        table = tables + step % 2 * STEP;
        fill(step + 1);
    };
    auto copy = [&](Shared stage, int piece) __attribute__((always_inline)) {
        enum { ROWS_M = THREADS / OCTETS_M, ROWS_N = THREADS / OCTETS_N };
        Shared to_m = stage + octet_offset(TILE_M, row_m, octet_m, part_m),
               to_n = stage + A_BYTES + octet_offset(TILE_N, row_n, octet_n, part_n);
        #pragma unroll
        for (int i = piece; i < STEP / ROWS_M; i += SLICES) {
            int at = first + row_m + i * ROWS_M;
            Shared to = ROWS_M % 8 ? stage + octet_offset(TILE_M, row_m + i * ROWS_M, octet_m, part_m)
                                   : to_m + i * ROWS_M * LINE_BYTES;
            copy_octet<false>(to, x_octet + (i64)at * x_pitch, exists_m & (at < pixels));
        }
        #pragma unroll
        for (int i = piece; i < STEP / ROWS_N; i += SLICES) {
            const Pixel pixel = table[row_n + i * ROWS_N];
            bool inside = exists_n & ((unsigned)(pixel.h + shift_h) < (unsigned)out_h) &
                          ((unsigned)(pixel.w + shift_w) < (unsigned)out_w);
            Shared to = ROWS_N % 8 ? stage + A_BYTES + octet_offset(TILE_N, row_n + i * ROWS_N, octet_n, part_n)
                                   : to_n + i * ROWS_N * LINE_BYTES;
            copy_octet<true>(to, dy_octet + (i64)(pixel.dy + shift) * dy_pitch, inside);
        }
    };
    fill(0);
    Sums sums = {};
    sum_steps(sums, shared, steps, begin, copy);

    int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    float* to = partial + ((i64)blockIdx.y * groups + group) * in_channels * columns;
    #pragma unroll
    for (int i = 0; i < TILES_M; i++)
        #pragma unroll
        for (int j = 0; j < TILES_N; j++)
            #pragma unroll
            for (int half = 0; half < 2; half++) {
                int m = first_m + warp % WARPS_M * WARP_M + i * 16 + half * 8 + lane / 4;
                int n = first_n + warp / WARPS_M * WARP_N + j * 8 + lane % 4 * 2;
                if (m < in_channels && n < columns)
                    *(float2*)(to + (i64)m * columns + n) = make_float2(sums[i][j][half * 2], sums[i][j][half * 2 + 1]);
            }
}

// Four neighbouring output channels of a block of the reduction: the first one, tap, input channel.
struct Quad {
    int channel, tap, row;
    __device__ Quad(unsigned number, const Divisor& by_quads, const Divisor& by_taps) {
        unsigned quad, in_block;
        row = by_taps.divide(by_quads.divide(number, quad), in_block);
        channel = quad * 4, tap = in_block;
    }
};
enum { AT_ONCE = 4 };  // loads of a thread

// dw: element (group, ic, oc, tap) at the sum of its strides; group and ic have one stride. A block has
// `block_channels` output channels, a multiple of 4, of `block_taps` taps and `rows` input channels. It turns them in
// shared memory if neighbouring taps are neighbours in dw.
extern "C" __global__ void __launch_bounds__(256, 2) wgrad_gemm_reduce(
    const float* __restrict__ partial, const int* __restrict__ x_exponents, const int* __restrict__ dy_exponents,
    scalar_t* __restrict__ dw, int x_exponent_count, int dy_exponent_count, int in_channels, int out_channels,
    int out_octets, int taps, int splits, i64 in_stride, i64 out_stride, i64 tap_stride, int block_channels,
    int block_taps, int rows) {
    wait_for_earlier_kernels();
    DYNAMIC_SHARED(float, turned);  // [row][channel][tap], an odd number of floats a channel
    __shared__ unsigned scratch[32];
    int exponent = x_exponents ? smallest_exponent(x_exponents, x_exponent_count, scratch) +
                                     smallest_exponent(dy_exponents, dy_exponent_count, scratch)
                               : 0;
    ScaleBack scale_back(exponent);
    int all_channels = out_octets * 8, channel_blocks = (all_channels + block_channels - 1) / block_channels,
        tap_blocks = (taps + block_taps - 1) / block_taps, pitch = block_taps | 1, quads = block_channels / 4;
    int first_oc = blockIdx.x % channel_blocks * block_channels,
        first_tap = blockIdx.x / channel_blocks % tap_blocks * block_taps,
        first_ic = blockIdx.x / channel_blocks / tap_blocks * rows;
    i64 size = (i64)in_channels * taps * all_channels, split_stride = gridDim.y * size;
    partial += blockIdx.y * size;
    dw += blockIdx.y * (i64)in_channels * in_stride;
    bool turn = tap_stride == 1;
    Divisor by_quads(quads), by_taps(block_taps), by_channels(block_channels);
    int count = rows * block_taps * quads;
    for (int first = threadIdx.x; first < count; first += blockDim.x * AT_ONCE) {
        int offsets[AT_ONCE];  // of four neighbours in partial; negative if there are none
        float sums[AT_ONCE][4] = {};
        #pragma unroll
        for (int k = 0; k < AT_ONCE; k++) {
            Quad at(first + k * blockDim.x, by_quads, by_taps);
            int oc = first_oc + at.channel, tap = first_tap + at.tap, ic = first_ic + at.row;
            bool exists = at.row < rows && ic < in_channels && tap < taps && oc < all_channels;
            offsets[k] = exists ? (ic * taps + tap) * all_channels + oc : -1;
        }
        #pragma unroll 2
        for (int split = 0; split < splits; split++)
            #pragma unroll
            for (int k = 0; k < AT_ONCE; k++) {
                if (offsets[k] < 0) continue;
                Packed<float, 4> part = *(const Packed<float, 4>*)(partial + split * split_stride + offsets[k]);
                #pragma unroll
                for (int v = 0; v < 4; v++) sums[k][v] += part.v[v];
            }
        #pragma unroll
        for (int k = 0; k < AT_ONCE; k++) {
            Quad at(first + k * blockDim.x, by_quads, by_taps);
            #pragma unroll
            for (int v = 0; v < 4; v++) {
                int channel = at.channel + v;
                if (offsets[k] < 0 || first_oc + channel >= out_channels) continue;
                float value = x_exponents ? scale_back(sums[k][v]) : sums[k][v];
                if (turn) turned[(at.row * block_channels + channel) * pitch + at.tap] = value;
                else
                    dw[(first_ic + at.row) * in_stride + (first_oc + channel) * out_stride +
                        (first_tap + at.tap) * tap_stride] = from_acc<scalar_t>(value);
            }
        }
    }
    if (!turn) return;
    __syncthreads();
    for (int i = threadIdx.x; i < rows * block_taps * block_channels; i += blockDim.x) {
        unsigned in_block, channel, line = by_taps.divide(i, in_block), row = by_channels.divide(line, channel);
        int oc = first_oc + channel, tap = first_tap + in_block, ic = first_ic + row;
        if (ic < in_channels && tap < taps && oc < out_channels)
            dw[ic * in_stride + oc * out_stride + tap] = from_acc<scalar_t>(turned[line * pitch + in_block]);
    }
}
