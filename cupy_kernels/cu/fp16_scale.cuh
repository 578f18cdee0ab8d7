// Power-of-two scales, measured from the data, that bring float32 values into fp16's normal range without loss.
#pragma once
#include "common.cuh"

// Bits of |v| if v is finite, else 0: their order as integers is the order of the values, denormals included.
__device__ inline unsigned finite_magnitude(float v) {
    unsigned bits = __float_as_uint(v) & 0x7FFFFFFF;
    return bits < 0x7F800000 ? bits : 0;
}

// The largest of the values first, first + step, ... of `count` packs, AT_ONCE of which are in flight together.
template <int AT_ONCE, class T, int W, class I>
__device__ inline unsigned largest_of(const Packed<T, W>* from, I first, I step, I count) {
    unsigned largest = 0;
    for (; first < count; first += step * AT_ONCE) {
        Packed<T, W> in[AT_ONCE];
        #pragma unroll
        for (int i = 0; i < AT_ONCE; i++) in[i] = from[min(first + i * step, count - 1)];
        #pragma unroll
        for (int i = 0; i < AT_ONCE * W; i++) largest = max(largest, finite_magnitude(to_acc(in[i / W].v[i % W])));
    }
    return largest;
}

// Exponent e such that the largest magnitude times 2^e lies in [2^14, 2^15): nothing finite overflows fp16. At most
// 126, which zeros get too, so that a part of a tensor that is all zero leaves the smallest exponent of the parts as it
// is.
__device__ inline int scale_exponent(unsigned largest_magnitude) {
    return min(126, 14 + 127 - (int)(largest_magnitude >> 23));
}

// 2^e for -126 <= e <= 127.
__device__ inline float power_of_two(int e) { return __uint_as_float((unsigned)(e + 127) << 23); }

// v -> v * 2^-e for |e| <= 252; two factors keep every intermediate value in range where the result is.
struct ScaleBack {
    float first, second;
    __device__ explicit ScaleBack(int e) : first(power_of_two(-e / 2)), second(power_of_two(-e - -e / 2)) {}
    __device__ float operator()(float v) const { return multiply_unflushed(multiply_unflushed(v, first), second); }
    // The same, plus `shift`.
    __device__ float operator()(float v, float shift) const {
        v = multiply_unflushed(v, first);
#ifdef CUPY_KERNELS_EMULATOR
        return fmaf(v, second, shift);
#else
        float sum;
        asm("fma.rn.f32 %0, %1, %2, %3;" : "=f"(sum) : "f"(v), "f"(second), "f"(shift));
        return sum;
#endif
    }
};

// Of each of COUNT values, the block's largest. meet: a barrier of the block. scratch: COUNT numbers a warp.
template <int COUNT, class Meet>
__device__ inline void block_max(unsigned (&v)[COUNT], unsigned* scratch, Meet meet) {
    #pragma unroll
    for (int i = 0; i < COUNT; i++) {
        v[i] = warp_max(v[i]);
        if (threadIdx.x % 32 == 0) scratch[threadIdx.x / 32 * COUNT + i] = v[i];
    }
    meet();
    for (unsigned w = 0; w < blockDim.x / 32; w++)
        #pragma unroll
        for (int i = 0; i < COUNT; i++) v[i] = max(v[i], scratch[w * COUNT + i]);
    meet();
}
template <class Meet> __device__ inline unsigned block_max(unsigned v, unsigned* scratch, Meet meet) {
    unsigned alone[1] = {v};
    block_max(alone, scratch, meet);
    return alone[0];
}
struct SyncThreads {
    __device__ void operator()() const { __syncthreads(); }
};
__device__ inline unsigned block_max(unsigned v, unsigned* scratch) { return block_max(v, scratch, SyncThreads()); }

// The smallest of `count` exponents: what a tensor takes whose parts would take these.
template <class Meet = SyncThreads>
__device__ inline int smallest_exponent(const int* exponents, int count, unsigned* scratch, Meet meet = Meet()) {
    unsigned largest = 0;
    for (int i = threadIdx.x; i < count; i += blockDim.x) largest = max(largest, (unsigned)(126 - exponents[i]));
    return 126 - (int)block_max(largest, scratch, meet);
}
