// Weights of a transposed convolution as conv_mma.cuh reads them: fp16 under a power-of-two scale for each output
// channel m.
//
// signs: null, or values whose sign, - or not, each m's weights are multiplied by (conv_bn_pool.cu). copied_signs:
// null, or these values of all rows as float.
// w: [IN_CHANNELS, OUT_CHANNELS, TAPS], with FLIP (for dgrad) [OUT_CHANNELS, IN_CHANNELS, TAPS] and the taps in reverse
// order. packed: [m tile][chunk][tap][TILE_M rows of 64 halves, parts in line_offset's order], with WGMMA
// (conv_wgmma.cuh) [m tile][chunk][tap][32 of its channels][SPLIT parts][8 of those channels][TILE_M rows of 8 halves];
// exponents[m]: of m's scale. Rows past OUT_CHANNELS and channels past IN_CHANNELS are zero. One block per row of the
// padded matrix. Macros: scalar_t, OUT_CHANNELS, TAPS, TILE_M, PACKED_WIDTH (halves of a row and tap), FLIP, WGMMA,
// AS_IT_IS (1: under a scale of 1), and those of fp16_tiles.cuh.
#include "common.cuh"
#include "fp16_tiles.cuh"

extern "C" __global__ void pack_weight_fp16(
    const scalar_t* __restrict__ w, const scalar_t* __restrict__ signs, half_t* __restrict__ packed,
    int* __restrict__ exponents, float* __restrict__ copied_signs) {
    wait_for_earlier_kernels();
    __shared__ unsigned scratch[32];
    int m = blockIdx.x;
    unsigned largest = 0;
    if (m < OUT_CHANNELS && !AS_IT_IS)
        for (int i = threadIdx.x; i < IN_CHANNELS * TAPS; i += blockDim.x) {
            int k = i / TAPS, tap = i % TAPS;
            largest =
                max(largest, finite_magnitude(to_acc(
                                 w[FLIP ? (m * IN_CHANNELS + k) * TAPS + tap : (k * OUT_CHANNELS + m) * TAPS + tap])));
        }
    largest = block_max(largest, scratch);
    int exponent = AS_IT_IS ? 0 : scale_exponent(largest);
    float scale = power_of_two(exponent) * (signs && m < OUT_CHANNELS && to_acc(signs[m]) < 0 ? -1 : 1);
    if (threadIdx.x == 0) {
        exponents[m] = exponent;
        if (copied_signs) copied_signs[m] = m < OUT_CHANNELS ? to_acc(signs[m]) : 0;
    }
    enum { GROUPS_K = PACKED_WIDTH / SPLIT / 8 };  // of 8 channels
    static_assert(
        GROUPS_K * 8 * SPLIT == PACKED_WIDTH && GROUPS_K * 8 >= IN_CHANNELS &&
            GROUPS_K % (WGMMA ? 4 : CHUNK_CHANNELS / 8) == 0,
        "a packed row holds all channels");
    for (int i = threadIdx.x; i < GROUPS_K * TAPS; i += blockDim.x) {
        int group = i % GROUPS_K, tap = i / GROUPS_K;
        float v[8];
        #pragma unroll
        for (int j = 0; j < 8; j++) {
            int k = group * 8 + j;
            int from = FLIP ? (m * IN_CHANNELS + k) * TAPS + TAPS - 1 - tap : (k * OUT_CHANNELS + m) * TAPS + tap;
            v[j] = m < OUT_CHANNELS && k < IN_CHANNELS ? multiply_unflushed(to_acc(w[from]), scale) : 0;
        }
        enum { OCTETS = CHUNK_CHANNELS / 8 };
        int chunk = group / OCTETS;
        if (WGMMA) {
            int steps = min((int)OCTETS, GROUPS_K - chunk * OCTETS) / 4;
            i64 step = ((i64)(m / TILE_M) * GROUPS_K + chunk * OCTETS) / 4 * TAPS + tap * steps + group % OCTETS / 4;
            #pragma unroll
            for (int part = 0; part < SPLIT; part++)
                ((uint4*)packed)[((step * SPLIT + part) * 4 + group % 4) * TILE_M + m % TILE_M] = take_halves(v, part);
            continue;
        }
        u8* stage = (u8*)packed + (((i64)(m / TILE_M) * CHUNKS + chunk) * TAPS + tap) * STAGE_BYTES;
        store_line(stage, m % TILE_M, group % OCTETS, v, m & 7);
    }
}
