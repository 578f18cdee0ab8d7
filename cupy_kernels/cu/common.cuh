// Types, conversions and reductions that the kernels share. Includes nothing of a CUDA toolkit: pip wheels have no
// headers.
//
// scalar_t: type of the tensors in memory (float, double, half_t, bf16_t). acc_t: type of the arithmetic (float; double
// for double). A pointer parameter that is neither const nor INOUT is an output that the kernel writes in full.
#pragma once

typedef long long i64;
typedef unsigned char u8;
#define INOUT

struct half_t { unsigned short bits; };
struct bf16_t { unsigned short bits; };

// W neighbouring elements, read and written in one access.
template <class U, int W> struct __align__(W * sizeof(U)) Packed { U v[W]; };

#ifndef SHARED_ALIGNMENT
#define SHARED_ALIGNMENT 128
#endif
#ifndef CUPY_KERNELS_EMULATOR
#define UNCHECKED  // the emulator's checks of memory, left out of what stands for one instruction, or reads too much
#define DYNAMIC_SHARED(U, name) \
    extern __shared__ __align__(SHARED_ALIGNMENT) \
    char dynamic_shared_bytes[]; \
    U* name = (U*)dynamic_shared_bytes
#endif

__device__ inline float to_acc(float v) { return v; }
__device__ inline double to_acc(double v) { return v; }
__device__ inline float to_acc(bf16_t v) { return __uint_as_float((unsigned)v.bits << 16); }
#ifdef CUPY_KERNELS_EMULATOR
static inline float to_acc(half_t v) {
    unsigned magnitude = v.bits & 0x7FFF, sign = (unsigned)(v.bits & 0x8000) << 16;
    if (magnitude >= 0x7C00) return __uint_as_float(sign | 0x7F800000 | (magnitude & 0x3FF) << 13);
    float scaled = __uint_as_float(magnitude << 13) * 0x1p112f;  // exact, denormals too
    return __uint_as_float(sign | __float_as_uint(scaled));
}
#else
__device__ inline float to_acc(half_t v) {
    float f;
    asm("cvt.f32.f16 %0, %1;" : "=f"(f) : "h"(v.bits));
    return f;
}
#endif

template <class U> __device__ inline U from_acc(float v);
template <class U> __device__ inline U from_acc(double v);
template <> __device__ inline float from_acc<float>(float v) { return v; }
template <> __device__ inline float from_acc<float>(double v) { return (float)v; }
template <> __device__ inline double from_acc<double>(double v) { return v; }
// Round to nearest even; NaN stays NaN.
template <> __device__ inline bf16_t from_acc<bf16_t>(float v) {
    bf16_t r;
#if !defined(CUPY_KERNELS_EMULATOR) && __CUDA_ARCH__ >= 800
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(r.bits) : "f"(v));
#else
    unsigned u = __float_as_uint(v);
    r.bits = (u & 0x7FFFFFFF) > 0x7F800000 ? (u >> 16 & 0x8000) | 0x7FC0 : (u + 0x7FFF + (u >> 16 & 1)) >> 16;
#endif
    return r;
}
#ifdef CUPY_KERNELS_EMULATOR
template <> inline half_t from_acc<half_t>(float v) {
    unsigned u = __float_as_uint(v), sign = u >> 16 & 0x8000, magnitude = u & 0x7FFFFFFF;
    half_t r;
    if (magnitude > 0x7F800000) r.bits = sign | 0x7E00;
    else if (magnitude >= 0x477FF000) r.bits = sign | 0x7C00;  // 65520 and more round to infinity
    else if (magnitude < 0x38800000)                           // below 2^-14: the float addition rounds to 2^-24 steps
        r.bits = sign | (__float_as_uint(__uint_as_float(magnitude) + 0.5f) - 0x3F000000);
    else r.bits = sign | ((magnitude + 0xFFF + (magnitude >> 13 & 1)) >> 13) - (112 << 10);
    return r;
}
#else
template <> __device__ inline half_t from_acc<half_t>(float v) {
    half_t r;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(r.bits) : "f"(v));
    return r;
}
#endif

// CuPy compiles with -ftz=true, which flushes denormals in comparisons too; PTX's own comparison flushes nothing.
// greater is IEEE's a > b: false where either is NaN.
template <class A> __device__ inline bool is_nan(A v) { return v != v; }
template <class A> __device__ inline bool is_finite(A v) { return v - v == 0; }
#ifdef CUPY_KERNELS_EMULATOR
static inline bool greater(float a, float b) { return a > b; }
#else
__device__ inline bool greater(float a, float b) {
    int r;
    asm("{\n .reg .pred p;\n setp.gt.f32 p, %1, %2;\n selp.b32 %0, 1, 0, p;\n}" : "=r"(r) : "f"(a), "f"(b));
    return r;
}
#endif
__device__ inline bool greater(double a, double b) { return a > b; }

// a * b without -ftz=true, which CuPy compiles with: scales lift denormals into range, and results may be denormal.
__device__ inline float multiply_unflushed(float a, float b) {
#ifdef CUPY_KERNELS_EMULATOR
    return a * b;
#else
    float product;
    asm("mul.rn.f32 %0, %1, %2;" : "=f"(product) : "f"(a), "f"(b));
    return product;
#endif
}
__device__ inline double multiply_unflushed(double a, double b) { return a * b; }

// a + b likewise. Adding 0 by an ordinary addition would flush, too.
__device__ inline float add_unflushed(float a, float b) {
#ifdef CUPY_KERNELS_EMULATOR
    return a + b;
#else
    float sum;
    asm("add.rn.f32 %0, %1, %2;" : "=f"(sum) : "f"(a), "f"(b));
    return sum;
#endif
}

// Division of numbers below 2^31 by one that all threads share: the first quotient is right or one too small.
struct Divisor {
    unsigned d, reciprocal;
    __device__ explicit Divisor(unsigned d) : d(d), reciprocal(0xFFFFFFFFu / d) {}
    __device__ unsigned divide(unsigned n, unsigned& remainder) const {
        unsigned q = (unsigned long long)n * reciprocal >> 32;
        remainder = n - q * d;
        if (remainder >= d) remainder -= d, q++;
        return q;
    }
};

// Over a warp, in a fixed order; every lane gets it.
template <class A> __device__ inline A warp_sum(A v) {
    for (int lanes = 16; lanes > 0; lanes >>= 1) v += __shfl_xor_sync(0xFFFFFFFFu, v, lanes);
    return v;
}
template <class A> __device__ inline A warp_max(A v) {
    for (int lanes = 16; lanes > 0; lanes >>= 1) v = max(v, __shfl_xor_sync(0xFFFFFFFFu, v, lanes));
    return v;
}

// Sum over a block of a multiple of 32 threads in a fixed order; every thread gets it. `scratch` holds 32 values and is
// free again after the next __syncthreads().
template <class A> __device__ inline A block_sum(A v, A* scratch) {
    v = warp_sum(v);
    if (threadIdx.x % 32 == 0) scratch[threadIdx.x / 32] = v;
    __syncthreads();
    A total = 0;
    for (unsigned w = 0; w < blockDim.x / 32; w++) total += scratch[w];
    __syncthreads();
    return total;
}

// Waits for all threads of all blocks, and sees what they did before. For cooperative launches, which start all blocks
// at once: the driver gives each of them a counter, behind 4 bytes of its own. Block 0 adds what makes the sum of all
// blocks 2^31, whose bit so turns once, and the others 1.
#ifdef CUPY_KERNELS_EMULATOR
using emulator::grid_barrier;
#else
__device__ inline void grid_barrier() {
    __syncthreads();
    if (threadIdx.x == 0) {
        unsigned* counter;
        asm("mov.b64 %0, {%%envreg2, %%envreg1};" : "=l"(counter));
        counter++;
        __threadfence();
        unsigned before = atomicAdd(counter, blockIdx.x == 0 ? 0x80000000u - (gridDim.x - 1) : 1u);
        while (!((before ^ *(volatile unsigned*)counter) >> 31)) {}
        __threadfence();
    }
    __syncthreads();
}
#endif

// Waits for the kernels before this one in its stream, and sees what they did. It must be the first statement of a
// kernel: by this text (source.overlapping) the host knows that the kernel's blocks may start as soon as those of the
// kernel before it have ended (programmatic dependent launch, compute capability 9.0 and newer).
__device__ inline void wait_for_earlier_kernels() {
#if !defined(CUPY_KERNELS_EMULATOR) && __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// Hides v's origin from the compiler: what is computed from v is computed after this point.
__device__ inline void make_opaque(int& v) {
#ifndef CUPY_KERNELS_EMULATOR
    asm volatile("" : "+r"(v));
#endif
}

// Up to 32 bytes, aligned to at most 16 of them. Of a plain store of several NVRTC may make one for each element.
template <class T, int W> __device__ inline void store_at_once(T* to, const Packed<T, W>& v) {
#ifdef CUPY_KERNELS_EMULATOR
    *(Packed<T, W>*)to = v;
#else
    if constexpr (sizeof(v) > 16) {
        store_at_once(to, *(const Packed<T, W / 2>*)&v);
        store_at_once(to + W / 2, *(const Packed<T, W / 2>*)(v.v + W / 2));
    } else if constexpr (sizeof(v) == 16) {
        uint4 bits = *(const uint4*)&v;
        asm volatile(
            "st.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(to), "r"(bits.x), "r"(bits.y), "r"(bits.z), "r"(bits.w));
    } else if constexpr (sizeof(v) == 8) {
        uint2 bits = *(const uint2*)&v;
        asm volatile("st.global.v2.b32 [%0], {%1, %2};" ::"l"(to), "r"(bits.x), "r"(bits.y));
    } else if constexpr (sizeof(v) == 4) *(unsigned*)to = *(const unsigned*)&v;
    else *(Packed<T, W>*)to = v;
#endif
}
