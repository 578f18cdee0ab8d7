// Weight gradient of the transposed convolution with stride 1, dilation 1 and one group, on tensor cores (sm_80 and
// newer).
//
//     dw[ic, oc, kh, kw] = sum_{n, ih, iw} x[n, ic, ih, iw] * dy[n, oc, ih - PAD_H + kh, iw - PAD_W + kw]
//
// x, dy: packed fp16 tiles (fp16_tiles.cu); with CHANNELS_LAST and SPLIT 1 x is half_t [N, IN_H, IN_W, IN_CHANNELS].
// For each tap, a product of x and dy, summed over the pixels of x. The 16
// pixels that one instruction multiplies lie below each other: one column of a band of 16 rows, rows counted through
// all images. So a tap one to the right pairs the same column of x with dy's next column, images of any width and
// height leave nothing empty, and a column without a partner is left out.
//
// conv_wgrad_mma: a block owns one kh, TAPS_W taps in a row, TILE_OC channels of dy, TILE_IC of x, and a share of the
// bands (split-K). Columns come through a ring of STAGES cp.async stages, COLUMNS in each. Position 0 of a band is the
// first column of dy that a tap needs, LEAD positions later x begins. Each block writes its sums, partial
// [split][tap][oc][ic], with WGMMA [split][tap][ic][oc]. Chains of additions are limited: after CHAIN_BANDS bands the
// sums go to `partial` and begin anew. conv_wgrad_reduce adds the splits in ascending order, undoes the scales, and
// writes dw [ic][oc][tap].
//
// The sums come from sum_pixels(x, dy, partial, tile, ring): conv_wgrad_mma.cuh multiplies by mma.sync,
// conv_wgrad_wgmma.cuh by wgmma (sm_90a). What they share, Tile and store_chain, is here.
//
// x may be centred: a constant c[ic] is subtracted (fp16_tiles.cuh). Then dw lacks c[ic] times the sum of dy over the
// pixels that have a partner in x. Batch norm's backward gives a dy that sums to 0 over all pixels, so this sum is
// minus the sum over the pixels without a partner (`borders` of pooled_tail_backward.cu), and is added back. Centring
// helps if the mean of x is far from 0: rounding errors that most values of dy share then cancel.
//
// Pixels that have no partner in the other tensor are zero in both or left out, because 0 * NaN is NaN.
// Grid: x = tiles (kh first, so that blocks that share columns run together) times splits. Macros: scalar_t (of dw),
// IN_CHANNELS, OUT_CHANNELS (multiples of 16), IN_H, IN_W, OUT_H, OUT_W, KERNEL_H, KERNEL_W, PAD_H, PAD_W, TAPS_W,
// CHANNELS_LAST, TILE_OC, TILE_IC, BAND_ROWS, TILES, COLUMNS, STAGES, THREADS, SHARED_BYTES, WGMMA, those of
// fp16_tiles.cuh.
#define SHARED_ALIGNMENT 1024  // wgmma.cuh
#include "common.cuh"
#include "async_copy.cuh"
#include "fp16_tiles.cuh"
#include "mma.cuh"

#define X_CHUNKS CHUNKS
#define DY_CHUNKS ((OUT_CHANNELS + CHUNK_CHANNELS - 1) / CHUNK_CHANNELS)
#define X_STEP (CHANNELS_LAST ? IN_CHANNELS * sizeof(half_t) : LINE_BYTES)  // from a pixel to the next
#define TAPS (KERNEL_H * KERNEL_W)
#define TAP_GROUPS ((KERNEL_W + TAPS_W - 1) / TAPS_W)
#define OC_TILES ((OUT_CHANNELS + TILE_OC - 1) / TILE_OC)
#define IC_TILES ((IN_CHANNELS + TILE_IC - 1) / TILE_IC)
// Where x begins; by wgmma at the start of a stage.
#define LEAD (WGMMA ? (TAPS_W - 1 + COLUMNS - 1) / COLUMNS * COLUMNS : TAPS_W - 1)
#define BAND_STAGES ((LEAD + IN_W + COLUMNS - 1) / COLUMNS)
// Columns whose sums are added up before they go to memory. SPLIT 1: the tensor core's sums, which truncate, must stay
// below the operands' rounding. SPLIT 2: by wgmma, an addition is for two columns.
#define CHAIN (SPLIT == 1 ? 2048 : WGMMA ? 256 : 128)
#define CHAIN_BANDS (CHAIN > IN_W ? CHAIN / IN_W : 1)
static_assert(BAND_ROWS == 16, "one instruction multiplies a column of a band");
static_assert(TILES == KERNEL_H * TAP_GROUPS * OC_TILES * IC_TILES, "tiles make dw");

// What a block sums up.
struct Tile {
    int split, kh, kw, first_tap, oc_tile, ic_tile, rows, first_band, stages, inner_first, inner_end;

    __device__ Tile(int images, int bands_per_split) {
        int tile = blockIdx.x % TILES, group = tile / KERNEL_H % TAP_GROUPS;
        split = blockIdx.x / TILES;
        kh = tile % KERNEL_H;
        kw = min(group * TAPS_W, KERNEL_W - TAPS_W);
        first_tap = group * TAPS_W - kw;  // the last group may begin with taps of the one before
        oc_tile = tile / (KERNEL_H * TAP_GROUPS) % OC_TILES;
        ic_tile = tile / (KERNEL_H * TAP_GROUPS * OC_TILES);
        rows = images * IN_H;
        first_band = split * bands_per_split;
        stages = min(bands_per_split, (rows + BAND_ROWS - 1) / BAND_ROWS - first_band) * BAND_STAGES;
        // Columns of x [inner_first, inner_end) have a partner for every tap.
        inner_first = max(0, PAD_W - kw);
        inner_end = min(IN_W, OUT_W + PAD_W - kw - (TAPS_W - 1));
    }
    // The first column of x in a stage; it may lie before x.
    __device__ static int column_of(int stage) { return stage % BAND_STAGES * COLUMNS - LEAD; }
    // The column of dy that goes with one of x.
    __device__ int partner(int column, int t) const { return column - PAD_W + kw + t; }
    __device__ bool has_partner(int column, int t) const {
        int ow = partner(column, t);
        return column >= 0 && column < IN_W && ow >= 0 && ow < OUT_W;
    }
    __device__ bool inner(int column, int count = 1) const {
        return column >= inner_first && column + count <= inner_end;
    }
    __device__ bool ends_chain(int stage) const {
        return (stage + 1) % (BAND_STAGES * CHAIN_BANDS) == 0 || stage + 1 == stages;
    }
    // Of tap t, in `partial`, in units of its innermost two dimensions.
    __device__ i64 tap(int t) const { return (i64)split * TAPS + kh * KERNEL_W + kw + t; }
};

// What a thread copies of a stage: 16 bytes, `part`, of a line in row `row` of the band.
struct Copies {
    int row = threadIdx.x / 8 % BAND_ROWS, part = threadIdx.x % 8, loader = threadIdx.x / 128;
    int image, ih, oh;
    bool valid;

    __device__ Copies(const Tile& tile, int stage) {
        int of_all = (tile.first_band + stage / BAND_STAGES) * BAND_ROWS + row;
        image = of_all / IN_H, ih = of_all % IN_H, oh = ih - PAD_H + tile.kh;
        valid = of_all < tile.rows && oh >= 0 && oh < OUT_H;
    }
    __device__ const u8* x(const half_t* packed, int chunk, int column) const {
        if (CHANNELS_LAST)
            return (const u8*)packed + (((i64)image * IN_H + ih) * IN_W + column) * X_STEP + chunk * LINE_BYTES;
        return (const u8*)packed + ((((i64)image * X_CHUNKS + chunk) * IN_H + ih) * IN_W + column) * LINE_BYTES;
    }
    // Whether the thread's part of a line of x has channels.
    __device__ bool has_channels(int chunk) const {
        return !CHANNELS_LAST || chunk * CHUNK_CHANNELS + part * 8 < IN_CHANNELS;
    }
    __device__ const u8* dy(const half_t* packed, int chunk, int column) const {
        return (const u8*)packed + ((((i64)image * DY_CHUNKS + chunk) * OUT_H + oh) * OUT_W + column) * LINE_BYTES;
    }
};

// Adds a thread's sums of a tap to those of earlier chains, and sets them to 0. place(i): of the i-th neighbouring two
// of them in `partial`.
template <int TILES_OF_8, class Place, class Exists>
__device__ inline void store_chain(float (&sums)[TILES_OF_8][4], bool first, Place place, Exists exists) {
    Packed<float, 2> totals[2 * TILES_OF_8] = {};
    if (!first)
        #pragma unroll
        for (int i = 0; i < 2 * TILES_OF_8; i++)
            if (exists(i)) totals[i] = *place(i);
    #pragma unroll
    for (int i = 0; i < 2 * TILES_OF_8; i++) {
        #pragma unroll
        for (int j = 0; j < 2; j++) {
            float& sum = sums[i / 2][i % 2 * 2 + j];
            totals[i].v[j] += sum;
            sum = 0;
        }
        if (exists(i)) *place(i) = totals[i];
    }
}

#if WGMMA
#include "conv_wgrad_wgmma.cuh"
#else
#include "conv_wgrad_mma.cuh"
#endif

extern "C" __global__ void __launch_bounds__(THREADS, 1) conv_wgrad_mma(
    const half_t* __restrict__ x, const half_t* __restrict__ dy, float* __restrict__ partial, int images,
    int bands_per_split) {
    wait_for_earlier_kernels();
    DYNAMIC_SHARED(u8, shared);
    sum_pixels(x, dy, partial, Tile(images, bands_per_split), shared);
}

// x_exponents: null for an x without a scale. x_sums, and borders [border_parts][tap][oc]: null, or for an x that is
// centred.
extern "C" __global__ void conv_wgrad_reduce(
    const float* __restrict__ partial, const int* __restrict__ x_exponents, const int* __restrict__ dy_exponents,
    const scalar_t* __restrict__ x_sums, const float* __restrict__ borders, scalar_t* __restrict__ dw, int x_count,
    int dy_count, int splits, int border_parts) {
    wait_for_earlier_kernels();
    __shared__ unsigned scratch[32];
    enum { SIZE = TAPS * OUT_CHANNELS * IN_CHANNELS };
    int x_exponent = x_exponents ? centred_exponent(x_sums, smallest_exponent(x_exponents, x_count, scratch)) : 0;
    int dy_exponent = smallest_exponent(dy_exponents, dy_count, scratch);
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= SIZE) return;
    float sum = 0;
    #pragma unroll 8
    for (int s = 0; s < splits; s++) sum += partial[(i64)s * SIZE + i];
    int tap = i / (IN_CHANNELS * OUT_CHANNELS);
    int ic = WGMMA ? i / OUT_CHANNELS % IN_CHANNELS : i % IN_CHANNELS,
        oc = WGMMA ? i % OUT_CHANNELS : i / IN_CHANNELS % OUT_CHANNELS;
    float total = ScaleBack(x_exponent + dy_exponent)(sum);
    if (x_sums) {
        float alone = 0;
        #pragma unroll 8
        for (int part = 0; part < border_parts; part++) alone += borders[(part * TAPS + tap) * OUT_CHANNELS + oc];
        total = add_unflushed(total, centre(x_sums, ic, IN_H * IN_W) * -ScaleBack(dy_exponent)(alone));
    }
    dw[((i64)ic * OUT_CHANNELS + oc) * TAPS + tap] = from_acc<scalar_t>(total);
}
