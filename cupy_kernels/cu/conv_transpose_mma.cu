// Transposed convolution and its input gradient on tensor cores (conv_mma.cuh): y[n, m, oh, ow] = sums + bias[m].
#define ADJACENT (OUT_W % 8 == 0)  // a lane then stores whole sectors; else four lanes do
#include "conv_mma.cuh"

struct Store {
    const scalar_t* bias;
    scalar_t* y;
    const int* exponents;

    __device__ __forceinline__ void pass(const Sums& sums, const Place& place, int exponent) const {
        int lane = threadIdx.x % 32, pairs = place.pairs, first_window = place.first_window, end_window = place.end_window;
        #pragma unroll
        for (int i = 0; i < 8; i++) {
            int m = blockIdx.y * TILE_M + place.channel + i * 8;
            if (m >= OUT_CHANNELS) continue;
            float shift = bias ? to_acc(bias[m]) : 0;
            ScaleBack scale(exponent + exponents[m]);
            scalar_t* plane = y + (place.image * OUT_CHANNELS + m) * OUT_H * OUT_W;
            #pragma unroll
            for (int half = 0; half < 2; half++) {  // upper and lower rows of the windows
                Packed<scalar_t, PAIRS * 2> line;
                #pragma unroll
                for (int j = 0; j < PAIRS * 2; j++) line.v[j] = from_acc<scalar_t>(add_unflushed(scale(sums[i / 2][j / 2 * 2 + half][i % 2 * 2 + j % 2]), shift));
                int window = first_window + lane_window(lane % 4, 0, pairs);
                Pixel pixel(window, half * 2);
                if (ADJACENT && pairs == PAIRS) {  // all in one row
                    if (window < end_window && pixel.valid()) *(Packed<scalar_t, PAIRS * 2>*)(plane + pixel.oh * OUT_W + pixel.ow) = line;
                    continue;
                }
                #pragma unroll
                for (int j = 0; j < PAIRS; j++) {
                    window = first_window + lane_window(lane % 4, j, pairs);
                    pixel = Pixel(window, half * 2);
                    if (j >= pairs || window >= end_window || !pixel.valid()) continue;
                    scalar_t* to = plane + pixel.oh * OUT_W + pixel.ow;
                    if (OUT_W % 2 == 0) *(Packed<scalar_t, 2>*)to = *(Packed<scalar_t, 2>*)(line.v + j * 2);
                    else {
                        to[0] = line.v[j * 2];
                        if (pixel.ow + 1 < OUT_W) to[1] = line.v[j * 2 + 1];
                    }
                }
            }
        }
    }
    __device__ void finish(int) const {}
};

extern "C" __global__ void __launch_bounds__(THREADS, 1) conv_transpose_mma(
    const input_t* __restrict__ x, const int* __restrict__ x_exponents, const half_t* __restrict__ packed, const int* __restrict__ exponents,
    const scalar_t* __restrict__ bias, scalar_t* __restrict__ y, int x_exponent_count) {
    __shared__ unsigned scratch[32];
    DYNAMIC_SHARED(u8, shared);
    Store epilogue = {bias, y, exponents};
    convolve(x, x_exponents, x_exponent_count, packed, shared, scratch, epilogue);
}
