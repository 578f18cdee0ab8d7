// Transposed convolution and its input gradient on tensor cores (conv_mma.cuh): y[n, m, oh, ow] = sums + bias[m].
#include "conv_mma.cuh"

struct Store {
    const scalar_t* bias;
    scalar_t* y;
    const int* exponents;

    __device__ void pass(const Sums& sums, i64 image, int first_m, int first_window, int end_window, int exponent) const {
        struct __align__(2 * sizeof(scalar_t)) Pair { scalar_t v[2]; };
        int lane = threadIdx.x % 32;
        #pragma unroll
        for (int i = 0; i < 8; i++) {
            int m = first_m + i * 8;
            if (m >= OUT_CHANNELS) continue;
            float shift = bias ? to_acc(bias[m]) : 0;
            ScaleBack scale(exponent + exponents[m]);
            scalar_t* plane = y + (image * OUT_CHANNELS + m) * OUT_H * OUT_W;
            #pragma unroll
            for (int n = 0; n < WARP_TILES; n++) {
                int window = first_window + n * 2 + lane % 4 / 2;
                Pixel pixel(window, lane % 2 * 2);
                if (window >= end_window || !pixel.valid()) continue;
                Pair pair;
                #pragma unroll
                for (int j = 0; j < 2; j++) pair.v[j] = from_acc<scalar_t>(scale(sums[i / 2][n][i % 2 * 2 + j]) + shift);
                scalar_t* to = plane + pixel.oh * OUT_W + pixel.ow;
                if (OUT_W % 2 == 0) *(Pair*)to = pair;
                else {
                    to[0] = pair.v[0];
                    if (pixel.ow + 1 < OUT_W) to[1] = pair.v[1];
                }
            }
        }
    }
    __device__ void finish(int) const {}
};

extern "C" __global__ void __launch_bounds__(THREADS, 1) conv_transpose_mma(
    const scalar_t* __restrict__ x, const half_t* __restrict__ packed, const int* __restrict__ exponents,
    const scalar_t* __restrict__ bias, scalar_t* __restrict__ y, int ahead) {
    __shared__ unsigned scratch[32];
    DYNAMIC_SHARED(u8, shared);
    Store epilogue = {bias, y, exponents};
    convolve(x, packed, ahead, shared, scratch, epilogue);
}
