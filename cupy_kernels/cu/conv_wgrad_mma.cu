// Weight gradient of the transposed convolution with stride 1, dilation 1 and one group, on tensor cores (sm_80 and newer).
//
//     dw[ic, oc, kh, kw] = sum_{n, ih, iw} x[n, ic, ih, iw] * dy[n, oc, ih - PAD_H + kh, iw - PAD_W + kw]
//
// x, dy: fp16 cells (fp16_cells.cu). For each tap, a product of dy (rows oc) and x (columns ic), summed over the pixels of x. The
// 16 pixels of one mma lie below each other: one column of a band of 16 rows, rows counted through all images. So a tap one to the
// right pairs the same fragment of x with that of dy's next column: fragments of TAPS_W neighbouring columns of dy wait in registers
// (`window`), and each column of x and of dy is read from shared memory once for all taps.
//
// conv_wgrad_mma: a block owns one kh, TAPS_W taps in a row, TILE_OC output channels, one chunk of input channels, and a share
// of the bands (split-K); a warp owns 16 output channels. Columns come through a ring of STAGES cp.async stages of COLUMNS columns
// each: position 0 of a band is the first column of dy that a tap needs, and TAPS_W - 1 positions later x begins. Each block writes
// its sums, partial [split][tap][oc][ic]. Chains of additions are limited: after CHAIN_BANDS bands the sums go to `partial` and
// begin anew. conv_wgrad_reduce adds the splits in ascending order, undoes the scales, and writes dw [ic][oc][tap].
//
// x may be centred, less a constant c[ic] (fp16_cells.cuh). Then dw lacks c[ic] times the sum of dy over the pixels that have a partner in
// x, which conv_wgrad_borders and conv_wgrad_partnered find for a dy whose sum over all pixels is 0, as batch norm's backward makes it:
// what the others have, negative. So roundings of small values that most of dy has in common cancel, where x is far from 0 on average.
//
// Pixels that have no partner in the other tensor are zero in both or left out, because 0 * NaN is NaN.
// Grid: x = tiles (kh first, so that blocks that share columns run together) times splits. Macros: scalar_t (of dw), IN_CHANNELS,
// OUT_CHANNELS (multiples of 16), IN_H, IN_W, OUT_H, OUT_W, KERNEL_H, KERNEL_W, PAD_H, PAD_W, SPLIT, WARPS (4 or 8), TAPS_W, STAGES.
#include "common.cuh"
#include "async_copy.cuh"
#include "fp16_cells.cuh"
#include "mma.cuh"

#define THREADS (32 * WARPS)
#define TILE_OC (16 * WARPS)
#define TILE_CHUNKS (TILE_OC / CHUNK_CHANNELS)  // of dy
#define X_CHUNKS CHUNKS
#define DY_CHUNKS ((OUT_CHANNELS + CHUNK_CHANNELS - 1) / CHUNK_CHANNELS)
#define PAIRS ((IN_CHANNELS < CHUNK_CHANNELS ? IN_CHANNELS : CHUNK_CHANNELS) / 16)  // of n8-tiles of input channels
#define TAPS (KERNEL_H * KERNEL_W)
#define TAP_GROUPS ((KERNEL_W + TAPS_W - 1) / TAPS_W)
#define OC_TILES ((OUT_CHANNELS + TILE_OC - 1) / TILE_OC)
#define TILES (KERNEL_H * TAP_GROUPS * OC_TILES * X_CHUNKS)

#define BAND_ROWS 16
#define COLUMNS ((TAPS_W + 3) / TAPS_W * TAPS_W)  // at least 4 a stage, and a multiple of the window
#define COLUMN_BYTES (BAND_ROWS * CELL_BYTES)
#define SLOT_BYTES ((1 + TILE_CHUNKS) * COLUMNS * COLUMN_BYTES)  // x, then each chunk of dy
#define BAND_STAGES ((IN_W + TAPS_W - 1 + COLUMNS - 1) / COLUMNS)
#define BUFFERS (SPLIT == 1 ? 2 : 1)
#define CHAIN (SPLIT == 1 ? 2048 : 128)  // SPLIT 1: the tensor core's sums, which truncate, must stay below the operands' rounding
#define CHAIN_BANDS (CHAIN > IN_W ? CHAIN / IN_W : 1)

typedef float Sums[2 * PAIRS][4];  // of a tap: [8 input channels][fragment c of mma.cuh]

// sums += a b over 16 pixels. With SPLIT 2 an ordinary addition adds the three products, as in conv_mma.cuh.
__device__ __forceinline__ void multiply(Sums& sums, const unsigned (&a)[SPLIT][4], const unsigned (&b)[SPLIT][PAIRS][4]) {
    if (SPLIT == 1) {
        #pragma unroll
        for (int n = 0; n < 2 * PAIRS; n++) mma_m16n8k16(sums[n], a[0], b[0][n / 2][n % 2 * 2], b[0][n / 2][n % 2 * 2 + 1]);
        return;
    }
    Sums partial = {};
    #pragma unroll
    for (int product = 0; product < 3; product++)  // rest * value, value * rest, value * value
        #pragma unroll
        for (int n = 0; n < 2 * PAIRS; n++) {
            const unsigned(&right)[4] = b[product == 1 ? SPLIT - 1 : 0][n / 2];
            mma_m16n8k16(partial[n], a[product == 0 ? SPLIT - 1 : 0], right[n % 2 * 2], right[n % 2 * 2 + 1]);
        }
    #pragma unroll
    for (int i = 0; i < 8 * PAIRS; i++) sums[i / 4][i % 4] += partial[i / 4][i % 4];
}

extern "C" __global__ void __launch_bounds__(THREADS)
conv_wgrad_mma(const half_t* __restrict__ x, const half_t* __restrict__ dy, float* __restrict__ partial, int images, int split_bands) {
    DYNAMIC_SHARED(u8, ring);
    int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    int tile = blockIdx.x % TILES, split = blockIdx.x / TILES;
    int kh = tile % KERNEL_H, tap_group = tile / KERNEL_H % TAP_GROUPS;
    int oc_tile = tile / (KERNEL_H * TAP_GROUPS) % OC_TILES, ic_chunk = tile / (KERNEL_H * TAP_GROUPS * OC_TILES);
    int kw = min(tap_group * TAPS_W, KERNEL_W - TAPS_W);  // the last group may repeat taps of the one before
    int first_oc = oc_tile * TILE_OC + warp * 16;
    bool active = OUT_CHANNELS % TILE_OC == 0 || first_oc < OUT_CHANNELS;
    int rows = images * IN_H, bands = (rows + BAND_ROWS - 1) / BAND_ROWS;
    int first_band = split * split_bands, stages = min(split_bands, bands - first_band) * BAND_STAGES;

    auto fetch = [&](int stage) {
        if (stage < stages) {
            int row = threadIdx.x / 8 % BAND_ROWS, part = threadIdx.x % 8, loader = threadIdx.x / 128;
            int row_of_all = (first_band + stage / BAND_STAGES) * BAND_ROWS + row;
            int image = row_of_all / IN_H, ih = row_of_all % IN_H, oh = ih - PAD_H + kh;
            bool valid = row_of_all < rows && oh >= 0 && oh < OUT_H;
            int position = stage % BAND_STAGES * COLUMNS, iw = position - (TAPS_W - 1), ow = position - PAD_W + kw;
            u8* to = ring + stage % STAGES * SLOT_BYTES + cell_offset(row, part);
            const u8* from = (const u8*)x + ((((i64)image * X_CHUNKS + ic_chunk) * IN_H + ih) * IN_W + iw) * CELL_BYTES + part * 16;
            #pragma unroll
            for (int i = 0; i < (COLUMNS + WARPS / 4 - 1) / (WARPS / 4); i++) {
                int c = i * (WARPS / 4) + loader;
                if (c < COLUMNS) cp_async_16(to + c * COLUMN_BYTES, from + c * CELL_BYTES, valid && iw + c >= 0 && iw + c < IN_W);
            }
            #pragma unroll 1  // at most two; unrolled, their addresses would take registers from the sums
            for (int i = 0; i < TILE_CHUNKS / (WARPS / 4); i++) {
                int q = i * (WARPS / 4) + loader, chunk = oc_tile * TILE_CHUNKS + q;
                const u8* from = (const u8*)dy + ((((i64)image * DY_CHUNKS + chunk) * OUT_H + oh) * OUT_W + ow) * CELL_BYTES + part * 16;
                #pragma unroll
                for (int c = 0; c < COLUMNS; c++)
                    cp_async_16(to + ((1 + q) * COLUMNS + c) * COLUMN_BYTES, from + c * CELL_BYTES,
                                valid && chunk < DY_CHUNKS && ow + c >= 0 && ow + c < OUT_W);
            }
        }
        cp_async_commit();
    };

    // Columns of x [inner_first, inner_end) have a partner for every tap.
    int inner_first = max(0, PAD_W - kw), inner_end = min(IN_W, OUT_W + PAD_W - kw - (TAPS_W - 1));
    // This lane's rows of ldmatrix. dy: pixel lane % 8 + lane / 16 * 8, channels + 8 for lane / 8 odd; x: the other way round.
    int oc_in_tile = warp * 16;
    int dy_row = (1 + oc_in_tile / CHUNK_CHANNELS) * COLUMNS * COLUMN_BYTES +
                 cell_offset(lane % 8 + lane / 16 * 8, oc_in_tile % CHUNK_CHANNELS / 8 + lane / 8 % 2);
    int x_row = cell_offset(lane % 8 + lane / 8 % 2 * 8, lane / 16);

    Sums sums[TAPS_W] = {};
    unsigned window[TAPS_W][SPLIT][4];

    auto multiply_stage = [&](int stage) __attribute__((always_inline)) {
        const u8* slot = ring + stage % STAGES * SLOT_BYTES;
        int first_column = stage % BAND_STAGES * COLUMNS - (TAPS_W - 1);
        unsigned b[BUFFERS][SPLIT][PAIRS][4];
        auto load = [&](int c) __attribute__((always_inline)) {
            #pragma unroll
            for (int part = 0; part < SPLIT; part++) {
                ldmatrix_x4_transposed(window[c % TAPS_W][part], other_part(slot + dy_row, part * 4) + c * COLUMN_BYTES);
                #pragma unroll
                for (int j = 0; j < PAIRS; j++)
                    ldmatrix_x4_transposed(b[c % BUFFERS][part][j], other_part(slot + x_row, part * 4 + j * 2) + c * COLUMN_BYTES);
            }
        };
        load(0);
        #pragma unroll
        for (int c = 0; c < COLUMNS; c++) {
            int column = first_column + c;
            auto multiply_column = [&](const bool inner) __attribute__((always_inline)) {
                #pragma unroll
                for (int t = 0; t < TAPS_W; t++) {
                    int ow = column - PAD_W + kw + t;
                    if (inner || (column >= 0 && column < IN_W && ow >= 0 && ow < OUT_W))
                        multiply(sums[t], window[(c + 1 + t) % TAPS_W], b[c % BUFFERS]);
                    // The first tap is the last to use the window's oldest column.
                    if (t == (BUFFERS == 2 ? 0 : TAPS_W - 1) && c + 1 < COLUMNS) load(c + 1);
                }
            };
            if (column >= inner_first && column < inner_end) multiply_column(true);
            else multiply_column(false);
            if (c == 0) fetch(stage + STAGES - 1);  // not right after the barrier, where no warp would keep the tensor core busy
        }
    };

    // Adds the sums to those of earlier chains.
    auto store_sums = [&](bool first) {
        #pragma unroll
        for (int t = 0; t < TAPS_W; t++) {
            if (!active || kw + t < tap_group * TAPS_W) continue;
            i64 row = ((i64)split * TAPS + kh * KERNEL_W + kw + t) * OUT_CHANNELS + first_oc + lane / 4;
            float* to = partial + row * IN_CHANNELS + ic_chunk * CHUNK_CHANNELS + lane % 4 * 2;
            auto place = [&](int i) { return (Packed<float, 2>*)(to + i % 2 * 8 * IN_CHANNELS + i / 2 * 8); };
            auto exists = [&](int i) { return ic_chunk * CHUNK_CHANNELS + i / 2 * 8 < IN_CHANNELS; };
            Packed<float, 2> totals[4 * PAIRS] = {};
            if (!first)
                #pragma unroll
                for (int i = 0; i < 4 * PAIRS; i++)
                    if (exists(i)) totals[i] = *place(i);
            #pragma unroll
            for (int i = 0; i < 4 * PAIRS; i++) {
                #pragma unroll
                for (int j = 0; j < 2; j++) {
                    float& sum = sums[t][i / 2][i % 2 * 2 + j];
                    totals[i].v[j] += sum;
                    sum = 0;
                }
                if (exists(i)) *place(i) = totals[i];
            }
        }
    };

    for (int stage = 0; stage < STAGES - 1; stage++) fetch(stage);
    bool first = true;
    for (int stage = 0; stage < stages; stage++) {
        cp_async_wait<STAGES - 2>();
        __syncthreads();
        if (active) multiply_stage(stage);
        else fetch(stage + STAGES - 1);
        if ((stage + 1) % (BAND_STAGES * CHAIN_BANDS) == 0 || stage + 1 == stages) store_sums(first), first = false;
    }
}

// Rows and columns at each edge of dy that have no partner for some tap.
#define EDGE_H (KERNEL_H - 1 > PAD_H ? KERNEL_H - 1 - PAD_H : 0)
#define EDGE_W (KERNEL_W - 1 > PAD_W ? KERNEL_W - 1 - PAD_W : 0)

// sums [pixel][DY_CHUNKS * CHUNK_CHANNELS]: of dy's cells over the images; 0 for pixels that have a partner for every tap. A block takes
// a pixel of a chunk.
extern "C" __global__ void __launch_bounds__(256) conv_wgrad_borders(const half_t* __restrict__ dy, float* __restrict__ sums, int images) {
    __shared__ float shares[32][64];
    int pixel = blockIdx.x / DY_CHUNKS, chunk = blockIdx.x % DY_CHUNKS, h = pixel / OUT_W, w = pixel % OUT_W;
    bool edge = h < EDGE_H || h >= OUT_H - EDGE_H || w < EDGE_W || w >= OUT_W - EDGE_W;
    float sum[8] = {};
    for (i64 image = threadIdx.x / 8; edge && image < images; image += 32) {
        const half_t* cell = dy + ((image * DY_CHUNKS + chunk) * (OUT_H * OUT_W) + pixel) * 64;
        Packed<half_t, 8> part = ((const Packed<half_t, 8>*)cell)[threadIdx.x % 8];
        #pragma unroll
        for (int j = 0; j < 8; j++) sum[j] += to_acc(part.v[j]);
    }
    #pragma unroll
    for (int j = 0; j < 8; j++) shares[threadIdx.x / 8][threadIdx.x % 8 * 8 + j] = sum[j];
    __syncthreads();
    if (threadIdx.x >= CHUNK_CHANNELS) return;
    float total = 0;
    for (int part = 0; part < SPLIT; part++)
        for (int i = 0; i < 32; i++) total += shares[i][part * CHUNK_CHANNELS + threadIdx.x];
    sums[blockIdx.x * CHUNK_CHANNELS + threadIdx.x] = total;
}

// partnered [oc][tap]: the sum of dy over the pixels that have a partner in x. One block an output channel.
extern "C" __global__ void __launch_bounds__(256) conv_wgrad_partnered(
    const float* __restrict__ sums, const int* __restrict__ dy_exponents, float* __restrict__ partnered, int dy_count) {
    __shared__ unsigned scratch[32];
    ScaleBack scale(smallest_exponent(dy_exponents, dy_count, scratch));
    for (int tap = threadIdx.x / 32; tap < TAPS; tap += 8) {
        int kh = tap / KERNEL_W, kw = tap % KERNEL_W;
        float alone = 0;
        for (int pixel = threadIdx.x % 32; pixel < OUT_H * OUT_W; pixel += 32) {
            int ih = pixel / OUT_W + PAD_H - kh, iw = pixel % OUT_W + PAD_W - kw;
            if (ih < 0 || ih >= IN_H || iw < 0 || iw >= IN_W) alone += sums[pixel * (DY_CHUNKS * CHUNK_CHANNELS) + blockIdx.x];
        }
        for (int lanes = 16; lanes > 0; lanes >>= 1) alone += __shfl_xor_sync(0xFFFFFFFFu, alone, lanes);
        if (threadIdx.x % 32 == 0) partnered[blockIdx.x * TAPS + tap] = -scale(alone);
    }
}

// x_sums, partnered: null, or for an x that is centred.
extern "C" __global__ void conv_wgrad_reduce(
    const float* __restrict__ partial, const int* __restrict__ x_exponents, const int* __restrict__ dy_exponents,
    const scalar_t* __restrict__ x_sums, const float* __restrict__ partnered, scalar_t* __restrict__ dw, int x_count, int dy_count,
    int splits) {
    __shared__ unsigned scratch[32];
    enum { SIZE = TAPS * OUT_CHANNELS * IN_CHANNELS };
    int exponent = centred_exponent(x_sums, smallest_exponent(x_exponents, x_count, scratch));
    ScaleBack scale(exponent + smallest_exponent(dy_exponents, dy_count, scratch));
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= SIZE) return;
    float sum = 0;
    #pragma unroll 8
    for (int s = 0; s < splits; s++) sum += partial[(i64)s * SIZE + i];
    int ic = i % IN_CHANNELS, oc = i / IN_CHANNELS % OUT_CHANNELS, tap = i / (IN_CHANNELS * OUT_CHANNELS);
    float total = scale(sum);
    if (x_sums) total = add_unflushed(total, centre(x_sums, ic, IN_H * IN_W) * partnered[oc * TAPS + tap]);
    dw[((i64)ic * OUT_CHANNELS + oc) * TAPS + tap] = from_acc<scalar_t>(total);
}
