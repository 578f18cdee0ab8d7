// Transposed convolution on tensor cores (implicit_gemm.cuh), and what batch norm, an activation and 2x2 max pooling
// need of it. Grid: x = units of all images, y = tiles of TILE_M channels. A lane has whole windows, and pools in
// registers.
//
// Batch norm is monotone in each channel, and the activation never decreases (activation.cuh), so max pooling can come
// first: of each 2x2 window it takes the largest sum where gamma, batch norm's weight, is positive, the smallest where
// it is negative, and the first where it is zero.
//
// All values are without the convolution's bias, which batch norm's mean takes out again:
//     pooled [N, M, PLANE_STRIDE]             the chosen sums of all windows, in the order of pooled_planes.cuh;
//                                             windows that an odd edge cuts, and places of no window, get values of
//                                             no use. pooled_t half_t: under scales, as `saved` is with SPLIT 1
//     STATISTICS: partials [3][M][N * UNITS]  count, mean and sum of squared distances of each unit's sums; the last
//                                             one, where float cannot hold it, negative and times 2^-160
//     SAVE, for the backward:
//         argmax [N, M, PLANE_STRIDE / 4]     the chosen corners of four neighbours in pooled, two bits each, the first
//                                             in the lowest
//         saved [N, M, PLANE_STRIDE, 4]       all sums of the windows. SPLIT 1: half_t, times 2^-SAVED_SHIFT as the
//                                             tensor cores deliver them, so that a sum is
//                                             saved * 2^(SAVED_SHIFT - exponents[m] - unit_exponents[unit]);
//                                             SAVED_SHIFT bounds the sum of all products: nothing overflows. AS_IT_IS:
//                                             the sum itself, which overflows where PyTorch's does; unit_exponents are
//                                             SAVED_SHIFT
//                                             SPLIT 2: float
//     unit_exponents [N * UNITS]              if anything is under scales, or with SAVE
// Macros: those of implicit_gemm.cuh, pooled_t (float, or half_t with SPLIT 1), saved_t (half_t, float), STATISTICS,
// SAVE, SAVED_SHIFT.
#define ADJACENT (!WGMMA)
#include "batch_norm.cuh"
#include "implicit_gemm.cuh"
enum { ONE_PASS = UNIT_WINDOWS - (WINDOW_PITCH - WINDOWS_W) <= 4 * MOST_TILES * WARPS_N };
static_assert(
    (TILES % 4 == 0 || (ONE_PASS && WARPS_N == 1)) && (LAST_TILES % 4 == 0 || !WGMMA || WARPS_N == 1),
    "16 windows are kept together");
static_assert(
    EPILOGUE_OFFSET + (STATISTICS ? WARPS_N * TILE_M * sizeof(float2) : 0) == SHARED_BYTES,
    "the epilogue's moments come last");

// Chan's rule: how the moments of two sets of pixels combine.
struct Merge {
    float share, weight, count;  // of the second set: n2 / n, n1 n2 / n; n
    __device__ Merge(float first, float second) : count(first + second) {
        share = count > 0 ? second / count : 0;
        weight = first * share;
    }
    // x: mean, y: sum of squared distances from it
    __device__ float2 operator()(float2 a, float2 b) const {
        float distance = b.x - a.x;
        float mean = is_finite(distance) ? a.x + distance * share : a.x + b.x;
        return make_float2(mean, a.y + b.y + distance * (distance * weight));
    }
};

__device__ inline float quad_sum(float v) {
    v += __shfl_xor_sync(0xFFFFFFFFu, v, 1);
    return v + __shfl_xor_sync(0xFFFFFFFFu, v, 2);
}

enum { SHIFT = AS_IT_IS ? 0 : SAVED_SHIFT };    // what is kept as half_t is a sum times 2^-SHIFT
enum { ROWS = LANE_ROWS < 4 ? LANE_ROWS : 4 };  // channels handled together

__device__ inline float max_or_nan(float a, float b) {
#ifdef CUPY_KERNELS_EMULATOR
    return a > b || is_nan(a) ? a : b;
#elif __CUDA_ARCH__ >= 800
    float larger;
    asm("max.NaN.f32 %0, %1, %2;" : "=f"(larger) : "f"(a), "f"(b));
    return larger;
#endif
}

typedef unsigned Valid[4];  // bit t: whether the pixel of window t exists, by corner, if need be
__device__ inline bool is_valid(const Valid& valid, int t, int corner) {
    return valid[OUT_H % 2 || OUT_W % 2 ? corner : 0] >> t & 1;
}

// For ROWS channels of a lane, from row `first`: mean, and sum of squared distances from it, of the valid sums of four
// lanes. The channels take each step together, so that none waits for its own last step.
template <bool FULL>
__device__ __forceinline__ void moments_of(
    const Sums& sums, int first, const Valid& valid, float per_count, float (&mean)[ROWS], float (&squares)[ROWS]) {
    #pragma unroll
    for (int i = 0; i < ROWS; i++) mean[i] = squares[i] = 0;
    #pragma unroll
    for (int at = 0; at < LANE_WINDOWS * 4; at++)
        #pragma unroll
        for (int i = 0; i < ROWS; i++)
            if (FULL || is_valid(valid, at / 4, at % 4)) mean[i] += sum_of(sums, first + i, at / 4, at % 4);
    #pragma unroll
    for (int i = 0; i < ROWS; i++) mean[i] = quad_sum(mean[i]) * per_count;
    #pragma unroll
    for (int at = 0; at < LANE_WINDOWS * 4; at++)
        #pragma unroll
        for (int i = 0; i < ROWS; i++) {
            float distance = sum_of(sums, first + i, at / 4, at % 4) - mean[i];
            if (FULL || is_valid(valid, at / 4, at % 4)) squares[i] += distance * distance;
        }
    #pragma unroll
    for (int i = 0; i < ROWS; i++) squares[i] = quad_sum(squares[i]);
}

struct PoolEpilogue {
    pooled_t* pooled;
    float* partials;
    u8* argmax;
    saved_t* saved;
    int* unit_exponents;
    const int* exponents;  // in shared memory, of the block's channels, as `signs`
    const float* signs;    // of gamma, or 0; pack_weight_fp16 has multiplied the weights by -1 where it is negative
    // [WARPS_N][TILE_M] in shared memory: mean and squares of the `seen` pixels of each part, under the unit's scale.
    float2* moments;
    int* counts;  // [WARPS_N] in shared memory
    i64 units;
    int seen;

    __device__ __forceinline__ void pass(const Sums& sums, Place place, int exponent) {
        make_opaque(place.first_window);  // else addresses are computed before the loop, where registers are few
        if (place.full()) windows<true>(sums, place, exponent);
        else windows<false>(sums, place, exponent);
    }

    template <bool FULL> __device__ __forceinline__ void windows(const Sums& sums, const Place& place, int exponent) {
        int lane = threadIdx.x % 32, part = threadIdx.x / (CONSUMERS / WARPS_N);
        i64 plane = (place.image * OUT_CHANNELS + blockIdx.y * TILE_M + place.channel) * PLANE_STRIDE;
        Valid valid = {};
        #pragma unroll
        for (int t = 0; t < LANE_WINDOWS; t++)
            #pragma unroll
            for (int corner = 0; corner < 4; corner++)
                valid[corner] |= (unsigned)(place.exists(t) && place.inside(t, corner)) << t;
        float count =
            FULL ? LANE_WINDOWS * 16
                 : quad_sum((float)(__popc(valid[0]) + __popc(valid[1]) + __popc(valid[2]) + __popc(valid[3])));
        float per_count = count > 0 ? 1 / count : 0;
        Merge merge(seen, count);
        #pragma unroll
        for (int first = 0; first < LANE_ROWS; first += ROWS) {
            float mean[ROWS], squares[ROWS];
            if (STATISTICS) moments_of<FULL>(sums, first, valid, per_count, mean, squares);
            #pragma unroll
            for (int i = 0; i < ROWS; i++) {
                int channel = place.channel + (first + i) * 8;
                bool any = signs[channel] != 0;
                float sign = any ? signs[channel] : 1;
                if (STATISTICS && lane % 4 == 0) {
                    float2* at = moments + part * TILE_M + channel;
                    *at = merge(seen ? *at : make_float2(0, 0), make_float2(mean[i] * sign, squares[i]));
                }
                ScaleBack scale(exponent + exponents[channel]);
                // The same in all lanes.
                if (OUT_CHANNELS % TILE_M && blockIdx.y * TILE_M + channel >= OUT_CHANNELS) continue;
                i64 row = plane + (first + i) * 8 * PLANE_STRIDE;
                #pragma unroll
                for (int t = 0; t < LANE_WINDOWS; t += 4) {
                    Packed<pooled_t, 4> best;
                    u8 taps = 0;
                    Packed<saved_t, 16> all;
                    #pragma unroll
                    for (int j = 0; j < 4; j++) {
                        float v[4], largest;
                        #pragma unroll
                        for (int corner = 0; corner < 4; corner++) v[corner] = sum_of(sums, first + i, t + j, corner);
                        largest = max_or_nan(max_or_nan(v[0], v[1]), max_or_nan(v[2], v[3]));
                        best.v[j] = kept<pooled_t>(any ? largest : v[0], sign, scale);
                        taps |= (!any || v[0] == largest ? 0 : v[1] == largest ? 1 : v[2] == largest ? 2 : 3) << j * 2;
                        // Corners outside the image are read by nobody.
                        #pragma unroll
                        for (int corner = 0; SAVE && corner < 4; corner++)
                            all.v[j * 4 + corner] = kept<saved_t>(v[corner], sign, scale);
                    }
                    store<FULL>(place, row, t, best, taps, all);
                }
            }
        }
        seen += (int)count;
    }

    // The values of the windows t to t + 3, to the plane at `row`.
    template <bool FULL> __device__ __forceinline__ void store(
        const Place& place, i64 row, int t, const Packed<pooled_t, 4>& best, u8 taps, const Packed<saved_t, 16>& all) {
        if constexpr (WGMMA) {
            int sixteen = place.first_window + t * 4 + place.unit * (UNIT_STRIDE - UNIT_WINDOWS);  // pooled_planes.cuh
            if (t >= place.tiles || sixteen >= min((place.unit + 1) * UNIT_STRIDE, PLANE_STRIDE)) return;
            i64 at = row + sixteen + threadIdx.x % 4 * TOGETHER_POOLED;
            store_at_once(pooled + at, best);
            if (SAVE) argmax[(row >> 2) + (at - row >> 2)] = taps;  // with at / 4 more would go to local memory
            enum { TOGETHER = together_saved<saved_t>() };
            #pragma unroll
            for (int j = 0; SAVE && j < 4; j += TOGETHER) {
                i64 window = row + sixteen + j * 4 + threadIdx.x % 4 * TOGETHER;
                store_at_once(saved + window * 4, *(const Packed<saved_t, TOGETHER * 4>*)(all.v + j * 4));
            }
            return;
        }
        i64 at = row + place.window(0);
        if (SAVE) {  // with fewer than four tiles, a byte has windows of several lanes
            int lane = threadIdx.x % 4;
            unsigned four = taps;
            if (!FULL) {
                four = (taps & ((1 << place.tiles * 2) - 1)) << lane * place.tiles * 2;
                four |= __shfl_xor_sync(0xFFFFFFFFu, four, 1);
                four |= __shfl_xor_sync(0xFFFFFFFFu, four, 2);
                four >>= lane * 8;
            }
            if (FULL || (lane < place.tiles && place.first_window + lane * 4 < place.end_window))
                argmax[(row >> 2) + (place.first_window >> 2) + lane] = four;
        }
        if (FULL) {
            store_at_once(pooled + at, best);
            if (SAVE) store_at_once(saved + at * 4, all);
        }
        #pragma unroll
        for (int j = 0; j < 4; j++) {
            if (FULL || !place.exists(j)) continue;
            pooled[at + j] = best.v[j];
            if (SAVE) store_at_once(saved + (at + j) * 4, *(const Packed<saved_t, 4>*)(all.v + j * 4));
        }
    }

    // A sum as memory has it: float, or half_t under scales.
    template <class T> __device__ static T kept(float v, float sign, const ScaleBack& scale) {
        return from_acc<T>(sizeof(T) == 2 ? v * (power_of_two(-SHIFT) * sign) : scale(v * sign));
    }

    __device__ void restart() { seen = 0; }

    // Adds up what the warps of a block have seen of each channel, in their order.
    __device__ void finish(int exponent, i64 unit) {
        // Read here, once: conv_mma.cuh spills it.
        int of_channel = exponent + (STATISTICS && threadIdx.x < TILE_M ? exponents[threadIdx.x] : 0);
        enum { SCALED = SAVE || sizeof(pooled_t) == 2 };
        if (SCALED && threadIdx.x == 0 && blockIdx.y == 0) unit_exponents[unit] = exponent + SAVED_SHIFT - SHIFT;
        if (!STATISTICS) return;
        if (threadIdx.x % (CONSUMERS / WARPS_N) == 0) counts[threadIdx.x / (CONSUMERS / WARPS_N)] = seen;
        sync_consumers();
        int m = blockIdx.y * TILE_M + threadIdx.x;
        if (threadIdx.x >= TILE_M || m >= OUT_CHANNELS) return;
        float2 all = moments[threadIdx.x];
        float count = counts[0];
        for (int part = 1; part < WARPS_N; part++) {
            Merge merge(count, counts[part]);
            all = merge(all, moments[part * TILE_M + threadIdx.x]);
            count = merge.count;
        }
        float* to = partials + m * units + unit;
        i64 kind = OUT_CHANNELS * units;
        ScaleBack scale(of_channel);
        float squares = scale(scale(all.y));
        if (!is_finite(squares)) squares = -scale(scale(all.y * 0x1p-80f) * 0x1p-80f);
        to[0] = count, to[kind] = scale(all.x), to[2 * kind] = squares;
    }
};

extern "C" __global__ void __launch_bounds__(THREADS, 1) conv_bn_pool(
    const scalar_t* __restrict__ x, const half_t* __restrict__ packed, const int* __restrict__ exponents,
    const float* __restrict__ gamma, INOUT pooled_t* __restrict__ pooled, float* __restrict__ partials,
    INOUT u8* __restrict__ argmax, INOUT saved_t* __restrict__ saved, int* __restrict__ unit_exponents, i64 units) {
    wait_for_earlier_kernels();
    __shared__ Scratch scratch;
    __shared__ int counts[WARPS_N], channel_exponents[TILE_M];
    __shared__ float signs[TILE_M];
    for (int i = threadIdx.x; i < TILE_M; i += THREADS) {
        int m = blockIdx.y * TILE_M + i;
        float weight = m < OUT_CHANNELS ? bn_weight(gamma, m) : 0;
        signs[i] = weight > 0 ? 1 : weight < 0 ? -1 : 0;
        channel_exponents[i] = m < OUT_CHANNELS ? exponents[m] : 0;
    }
    DYNAMIC_SHARED(u8, shared);
    PoolEpilogue epilogue = {pooled, partials, argmax, saved, unit_exponents, channel_exponents, signs,
        (float2*)(shared + EPILOGUE_OFFSET), counts, units, 0};
    convolve(x, (const int*)0, 0, packed, units, shared, scratch, epilogue);
}
