// Weight gradient of the transposed convolution with stride 1, dilation 1 and one group, on tensor cores (sm_80 and
// newer).
//
//     dw[ic, oc, kh, kw] = sum_{n, ih, iw} x[n, ic, ih, iw] * dy[n, oc, ih - PAD_H + kh, iw - PAD_W + kw]
//
// x, dy: packed fp16 tiles (fp16_tiles.cu). For each tap, a product of x and dy, summed over the pixels of x. The 16 pixels
// that one instruction multiplies lie below each other: one column of a band of 16 rows, rows counted through all
// images. So a tap one to the right pairs the same column of x with dy's next column, images of any width and height
// leave nothing empty, and a column without a partner is left out.
//
// conv_wgrad_mma: a block owns one kh, TAPS_W taps in a row, some channels of each, and a share of the bands (split-K).
// Columns come through a ring of cp.async stages. Each block writes its sums, partial [split][tap][oc][ic], with WGMMA
// [split][tap][ic][oc]. Chains of additions are limited: after CHAIN_BANDS bands the sums go to `partial` and begin
// anew. conv_wgrad_reduce adds the splits in ascending order, undoes the scales, and writes dw [ic][oc][tap].
//
// x may be centred, less a constant c[ic] (fp16_tiles.cuh). Then dw lacks c[ic] times the sum of dy over the pixels
// that have a partner in x: for a dy whose sum over all pixels is 0, as batch norm's backward makes it, what those
// without one have (`borders` of pooled_tail_backward.cu), negative. So roundings of small values that most of dy has
// in common cancel, where x is far from 0 on average.
//
// Pixels that have no partner in the other tensor are zero in both or left out, because 0 * NaN is NaN.
// Grid: x = tiles (kh first, so that blocks that share columns run together) times splits. Macros: scalar_t (of dw),
// IN_CHANNELS, OUT_CHANNELS (multiples of 16), IN_H, IN_W, OUT_H, OUT_W, KERNEL_H, KERNEL_W, PAD_H, PAD_W, TAPS_W,
// BAND_ROWS, TILES, COLUMNS (of a stage), STAGES, THREADS, SHARED_BYTES, those of fp16_tiles.cuh, WGMMA (1:
// conv_wgrad_wgmma.cuh, 0: conv_wgrad_mma.cuh) and those of that file.
#define SHARED_ALIGNMENT 1024  // wgmma.cuh
#include "common.cuh"
#include "async_copy.cuh"
#include "fp16_tiles.cuh"
#include "mma.cuh"

#define X_CHUNKS CHUNKS
#define DY_CHUNKS ((OUT_CHANNELS + CHUNK_CHANNELS - 1) / CHUNK_CHANNELS)
#define TAPS (KERNEL_H * KERNEL_W)
#define TAP_GROUPS ((KERNEL_W + TAPS_W - 1) / TAPS_W)
static_assert(BAND_ROWS == 16, "one instruction multiplies a column of a band");
// Columns whose sums are added up before they go to memory. SPLIT 1: the tensor core's sums, which truncate, must stay
// below the operands' rounding. SPLIT 2: by wgmma, an addition is for two columns.
#define CHAIN (SPLIT == 1 ? 2048 : WGMMA ? 256 : 128)
#define CHAIN_BANDS (CHAIN > IN_W ? CHAIN / IN_W : 1)

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

extern "C" __global__ void __launch_bounds__(THREADS) conv_wgrad_mma(
    const half_t* __restrict__ x, const half_t* __restrict__ dy, float* __restrict__ partial, int images,
    int bands_per_split) {
    DYNAMIC_SHARED(u8, shared);
    sum_pixels(x, dy, partial, images, bands_per_split, shared);
}

// x_sums, and borders [border_parts][tap][oc]: null, or for an x that is centred.
extern "C" __global__ void conv_wgrad_reduce(
    const float* __restrict__ partial, const int* __restrict__ x_exponents, const int* __restrict__ dy_exponents,
    const scalar_t* __restrict__ x_sums, const float* __restrict__ borders, scalar_t* __restrict__ dw, int x_count,
    int dy_count, int splits, int border_parts) {
    __shared__ unsigned scratch[32];
    enum { SIZE = TAPS * OUT_CHANNELS * IN_CHANNELS };
    int x_exponent = centred_exponent(x_sums, smallest_exponent(x_exponents, x_count, scratch));
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
