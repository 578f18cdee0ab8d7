// Transposed convolution and its input gradient on tensor cores: y[n, m, oh, ow] = sums + bias[m].
//
// Four lanes have neighbouring windows of a channel, the next four of it, and so on. Two of them swap windows, so that each has pairs of
// neighbours, four pixels of a row for one store; four lanes then store eight windows.
// Macros: WGMMA (1: conv_wgmma.cuh, 0: conv_mma.cuh) and those of that file.
#include "common.cuh"
#include "async_copy.cuh"
#include "fp16_cells.cuh"
#if WGMMA
#include "conv_wgmma.cuh"
#else
#define ADJACENT 0
#include "conv_mma.cuh"
#endif

struct Store {
    const scalar_t* bias;
    scalar_t* y;
    const int* exponents;

    __device__ __forceinline__ void pass(const Sums& sums, const Place& place, int exponent) const {
        #pragma unroll
        for (int lower = 0; lower < 2; lower++) {
            // Where four pixels are aligned, a pair begins: at an even window, but in lower rows of 4 n + 2 pixels at an odd one.
            const int odd = lower && OUT_W % 4 == 2;
            int quad = threadIdx.x % 4, turned = (quad - odd) & 3, later = turned % 2;
            #pragma unroll
            for (int row = 0; row < LANE_ROWS; row++) {
                int m = blockIdx.y * TILE_M + place.channel + row * 8;
                if (OUT_CHANNELS % TILE_M && m >= OUT_CHANNELS) continue;  // the same in all lanes
                float shift = bias ? to_acc(bias[m]) : 0;
                ScaleBack scale(exponent + exponents[m]);
                scalar_t* plane = y + (place.image * OUT_CHANNELS + m) * (OUT_H * OUT_W);
                auto ready = [&](float v) { return from_acc<scalar_t>(add_unflushed(scale(v), shift)); };
                auto pixel = [&](int t, int right) { return t < LANE_WINDOWS ? sum_of(sums, row, t, lower * 2 + right) : 0; };
                #pragma unroll
                for (int t = 0; t < LANE_WINDOWS; t += 2) {
                    Packed<scalar_t, 4> line;
                    #pragma unroll
                    for (int right = 0; right < 2; right++) {
                        float v = pixel(t, right), next = pixel(t + 1, right), after = pixel(t + 2, right);
                        if (odd && quad == 0) v = next, next = after;
                        float other = __shfl_xor_sync(0xFFFFFFFFu, later ? v : next, odd ? 3 : 1);
                        line.v[right] = ready(later ? other : v);
                        line.v[2 + right] = ready(later ? next : other);
                    }
                    int first = (t + later) * 4 + turned / 2 * 2 + odd;
                    store(plane, pixel_of(place, first, lower), pixel_of(place, first + 1, lower), line);
                }
                if (odd && quad == 0) store(plane, pixel_of(place, 0, lower), -1, {{ready(pixel(0, 0)), ready(pixel(0, 1))}});
            }
        }
    }

    // The left pixel of the upper or lower row of the warp's i-th window, in the plane, -1 if it does not exist.
    __device__ static int pixel_of(const Place& place, int i, int lower) {
        int oh = place.nth(i) / WINDOW_PITCH * 2 + lower, ow = place.nth(i) % WINDOW_PITCH * 2;
        return place.has(i) && oh < OUT_H ? oh * OUT_W + ow : -1;
    }

    // Two windows' pixels, of which -1 does not exist.
    __device__ __forceinline__ static void store(scalar_t* plane, int first, int second, const Packed<scalar_t, 4>& line) {
        if (OUT_W % 2 == 0 && OUT_H * OUT_W % 4 == 0 && first >= 0 && first % 4 == 0 && second == first + 2) {
            *(Packed<scalar_t, 4>*)(plane + first) = line;
            return;
        }
        #pragma unroll
        for (int j = 0; j < 4; j += 2) {
            int at = j ? second : first;
            if (at < 0) continue;
            if (OUT_W % 2 == 0) *(Packed<scalar_t, 2>*)(plane + at) = {{line.v[j], line.v[j + 1]}};
            else {
                plane[at] = line.v[j];
                if (at % OUT_W + 1 < OUT_W) plane[at + 1] = line.v[j + 1];
            }
        }
    }

    __device__ void restart() const {}
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
