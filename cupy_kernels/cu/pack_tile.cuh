// The body of kernels that pack a tensor: see fp16_tiles.cu. Macros: THREADS, those of fp16_tiles.cuh.
#pragma once
#include "fp16_tiles.cuh"

// A tensor [N, channels, pixels], and its packed tiles. W: pixels in one access; it divides `pixels`.
template <class T, int W> struct ToPack {
    enum { GROUPS_OF_LINE = CHUNK_CHANNELS / 8, TILE_PIXELS = THREADS / GROUPS_OF_LINE * W };

    const T* source;
    const int* exponents;  // of the scale, see smallest_exponent
    const T* sums;         // see centre
    half_t* packed;
    int exponent_count, channels, pixels;

    // A block packs pixels [first, first + TILE_PIXELS) of all images in a row, but none from `end` on, of one chunk.
    // tile, scratch: shared memory.
    __device__ void pack(i64 first, int end, int chunk, uint4 (&tile)[TILE_PIXELS * 8], unsigned* scratch) const {
        typedef Packed<T, W> Pack;
        Divisor by_image(pixels);
        int group = threadIdx.x / (THREADS / GROUPS_OF_LINE), place = threadIdx.x % (THREADS / GROUPS_OF_LINE),
            first_channel = chunk * CHUNK_CHANNELS + group * 8,
            chunks = (channels + CHUNK_CHANNELS - 1) / CHUNK_CHANNELS;
        Pack in[8] = {};
        if (first + place * W < end && first_channel < channels) {
            unsigned pixel, image = by_image.divide((unsigned)(first + place * W), pixel);
            const T* from = source + ((i64)image * channels + first_channel) * pixels + pixel;
            #pragma unroll
            for (int j = 0; j < 8; j++) in[j] = *(const Pack*)(from + (i64)j * pixels);
        }
        float scale = power_of_two(centred_exponent(sums, smallest_exponent(exponents, exponent_count, scratch))),
              centres[8];
        #pragma unroll
        for (int j = 0; j < 8; j++) centres[j] = first_channel < channels ? centre(sums, first_channel + j, pixels) : 0;
        // The XOR makes eight neighbouring threads write to all banks.
        #pragma unroll
        for (int k = 0; k < W; k++) {
            float v[8];
            #pragma unroll
            for (int j = 0; j < 8; j++)
                v[j] = multiply_unflushed(add_unflushed(to_acc(in[j].v[k]), -centres[j]), scale);
            #pragma unroll
            for (int part = 0; part < SPLIT; part++)
                tile[(place * W + k) * 8 + ((part * GROUPS_OF_LINE + group) ^ (place & 7))] = take_halves(v, part);
        }
        __syncthreads();
        #pragma unroll
        for (int i = threadIdx.x; i < TILE_PIXELS * 8; i += THREADS) {
            int line = i / 8, part = i % 8;
            if (first + line >= end) break;
            unsigned pixel, image = by_image.divide((unsigned)(first + line), pixel);
            ((uint4*)packed)[(((i64)image * chunks + chunk) * pixels + pixel) * 8 + part] =
                tile[line * 8 + (part ^ (line / W & 7))];
        }
    }
};
