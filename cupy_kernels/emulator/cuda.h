// A CUDA block on one CPU core: what the .cu files of this package need of CUDA, for a host C++ compiler.
//
// runtime.cpp runs the threads and says what is checked. Shared memory is poisoned before each block, the destination of a
// cp.async until the wait that covers it; poison is 0xFF bytes, a NaN in every floating type. This shows logic errors; it
// shows nothing about speed, or the last bit of CUDA's mathematical functions.
#pragma once
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>

#define CUPY_KERNELS_EMULATOR 1
#define __global__
#define __device__
#define __host__
#define __constant__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __align__(n) __attribute__((aligned(n)))
#define __shared__ static __attribute__((section("cu_shared"), aligned(16)))

// clang checks the alignment of what a constructor copies, and not of what is copied as a whole.
#ifdef __clang__
struct EmulatorCopied {
    EmulatorCopied() = default;
    EmulatorCopied(const EmulatorCopied&) {}
    EmulatorCopied& operator=(const EmulatorCopied&) { return *this; }
};
#define EMULATOR_COPIED [[no_unique_address]] EmulatorCopied copied;
#else
#define EMULATOR_COPIED
#endif
#define EMULATOR_VECTORS(T, name, two, four) \
    struct name##1 { T x; }; \
    struct __align__(two) name##2 { T x, y; EMULATOR_COPIED }; \
    struct name##3 { T x, y, z; }; \
    struct __align__(four) name##4 { T x, y, z, w; EMULATOR_COPIED }; \
    static inline name##1 make_##name##1(T x) { return {x}; } \
    static inline name##2 make_##name##2(T x, T y) { return {x, y}; } \
    static inline name##3 make_##name##3(T x, T y, T z) { return {x, y, z}; } \
    static inline name##4 make_##name##4(T x, T y, T z, T w) { return {x, y, z, w}; }
EMULATOR_VECTORS(signed char, char, 2, 4) EMULATOR_VECTORS(unsigned char, uchar, 2, 4)
EMULATOR_VECTORS(short, short, 4, 8) EMULATOR_VECTORS(unsigned short, ushort, 4, 8)
EMULATOR_VECTORS(int, int, 8, 16) EMULATOR_VECTORS(unsigned, uint, 8, 16)
EMULATOR_VECTORS(long long, longlong, 16, 16) EMULATOR_VECTORS(unsigned long long, ulonglong, 16, 16)
EMULATOR_VECTORS(float, float, 8, 16) EMULATOR_VECTORS(double, double, 16, 16)
struct dim3 {
    unsigned x, y, z;
    constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
    constexpr dim3(uint3 v) : x(v.x), y(v.y), z(v.z) {}
    operator uint3() const { return {x, y, z}; }
};

// Mathematics: CUDA's overloads, no more and no fewer. A call means here what it means there, or is ambiguous in both.
// A C++ compiler's <math.h> has others. It is not included; the functions for double are those of C.
#define EMULATOR_FLOAT(T, U, name) \
    extern "C" T name(double); \
    extern "C" U name##f(float); \
    static inline U name(float x) { return name##f(x); }
#define EMULATOR_OF_1(name) EMULATOR_FLOAT(double, float, name)
#define EMULATOR_WITH(T, U, name) \
    extern "C" double name(double, T); \
    extern "C" float name##f(float, U); \
    static inline float name(float x, U y) { return name##f(x, y); }
#define EMULATOR_OF_2(name) EMULATOR_WITH(double, float, name)
EMULATOR_OF_1(acos) EMULATOR_OF_1(acosh) EMULATOR_OF_1(asin) EMULATOR_OF_1(asinh) EMULATOR_OF_1(atan)
EMULATOR_OF_1(atanh) EMULATOR_OF_1(cbrt) EMULATOR_OF_1(ceil) EMULATOR_OF_1(cos) EMULATOR_OF_1(cosh) EMULATOR_OF_1(erf)
EMULATOR_OF_1(erfc) EMULATOR_OF_1(exp) EMULATOR_OF_1(exp10) EMULATOR_OF_1(exp2) EMULATOR_OF_1(expm1)
EMULATOR_OF_1(fabs) EMULATOR_OF_1(floor) EMULATOR_OF_1(j0) EMULATOR_OF_1(j1) EMULATOR_OF_1(lgamma) EMULATOR_OF_1(log)
EMULATOR_OF_1(log10) EMULATOR_OF_1(log1p) EMULATOR_OF_1(log2) EMULATOR_OF_1(logb) EMULATOR_OF_1(nearbyint)
EMULATOR_OF_1(rint) EMULATOR_OF_1(round) EMULATOR_OF_1(sin) EMULATOR_OF_1(sinh) EMULATOR_OF_1(sqrt) EMULATOR_OF_1(tan)
EMULATOR_OF_1(tanh) EMULATOR_OF_1(tgamma) EMULATOR_OF_1(trunc) EMULATOR_OF_1(y0) EMULATOR_OF_1(y1)
EMULATOR_OF_2(atan2) EMULATOR_OF_2(copysign) EMULATOR_OF_2(fdim) EMULATOR_OF_2(fmax) EMULATOR_OF_2(fmin)
EMULATOR_OF_2(fmod) EMULATOR_OF_2(hypot) EMULATOR_OF_2(nextafter) EMULATOR_OF_2(pow) EMULATOR_OF_2(remainder)
EMULATOR_FLOAT(int, int, ilogb)
EMULATOR_FLOAT(long, long, lrint)
EMULATOR_FLOAT(long, long, lround)
EMULATOR_FLOAT(long long, long long, llrint)
EMULATOR_FLOAT(long long, long long, llround)
EMULATOR_WITH(int*, int*, frexp)
EMULATOR_WITH(int, int, ldexp)
EMULATOR_WITH(double*, float*, modf)
EMULATOR_WITH(long, long, scalbln)
EMULATOR_WITH(int, int, scalbn)
extern "C" double fma(double, double, double);
extern "C" float fmaf(float, float, float);
extern "C" int abs(int);
extern "C" long labs(long);
extern "C" long long llabs(long long);
static inline float fma(float x, float y, float z) { return fmaf(x, y, z); }
static inline float pow(float x, int y) { return powf(x, y); }
static inline double pow(double x, int y) { return pow(x, (double)y); }
static inline double copysign(float x, double y) { return copysign((double)x, y); }
static inline double copysign(double x, float y) { return copysign(x, (double)y); }
static inline float rsqrtf(float x) { return 1.0f / sqrtf(x); }
static inline float rsqrt(float x) { return rsqrtf(x); }
static inline double rsqrt(double x) { return 1.0 / sqrt(x); }
static inline long abs(long x) { return labs(x); }
static inline long long abs(long long x) { return llabs(x); }
static inline float abs(float x) { return fabsf(x); }
static inline double abs(double x) { return fabs(x); }
#define EMULATOR_CLASS(name) \
    static inline int name(float x) { return __builtin_##name(x) != 0; } \
    static inline int name(double x) { return __builtin_##name(x) != 0; }
EMULATOR_CLASS(isfinite) EMULATOR_CLASS(isinf) EMULATOR_CLASS(isnan) EMULATOR_CLASS(signbit)

#define EMULATOR_MINMAX(T, A, B) \
    static inline T min(A a, B b) { return (T)b < (T)a ? b : a; } \
    static inline T max(A a, B b) { return (T)a < (T)b ? b : a; }
#define EMULATOR_MINMAX_INTEGERS(T) \
    EMULATOR_MINMAX(T, T, T) \
    EMULATOR_MINMAX(unsigned T, unsigned T, unsigned T) \
    EMULATOR_MINMAX(unsigned T, T, unsigned T) \
    EMULATOR_MINMAX(unsigned T, unsigned T, T)
EMULATOR_MINMAX_INTEGERS(int)
EMULATOR_MINMAX_INTEGERS(long)
EMULATOR_MINMAX_INTEGERS(long long)
static inline float min(float a, float b) { return fminf(a, b); }
static inline float max(float a, float b) { return fmaxf(a, b); }
#define EMULATOR_MINMAX_DOUBLE(A, B) \
    static inline double min(A a, B b) { return fmin((double)a, (double)b); } \
    static inline double max(A a, B b) { return fmax((double)a, (double)b); }
EMULATOR_MINMAX_DOUBLE(double, double)
EMULATOR_MINMAX_DOUBLE(float, double)
EMULATOR_MINMAX_DOUBLE(double, float)


#define EMULATOR_LDG(T) static inline T __ldg(const T* p) { return *p; }
EMULATOR_LDG(char) EMULATOR_LDG(signed char) EMULATOR_LDG(short) EMULATOR_LDG(int) EMULATOR_LDG(long)
EMULATOR_LDG(unsigned char) EMULATOR_LDG(unsigned short) EMULATOR_LDG(unsigned) EMULATOR_LDG(unsigned long)
EMULATOR_LDG(long long) EMULATOR_LDG(unsigned long long) EMULATOR_LDG(float) EMULATOR_LDG(double)
EMULATOR_LDG(float2) EMULATOR_LDG(float4) EMULATOR_LDG(double2) EMULATOR_LDG(uint2) EMULATOR_LDG(uint4)
static inline int __float_as_int(float x) { int i; memcpy(&i, &x, 4); return i; }
static inline float __int_as_float(int i) { float x; memcpy(&x, &i, 4); return x; }
static inline unsigned __float_as_uint(float x) { return (unsigned)__float_as_int(x); }
static inline float __uint_as_float(unsigned i) { return __int_as_float((int)i); }
static inline long long __double_as_longlong(double x) { long long i; memcpy(&i, &x, 8); return i; }
static inline double __longlong_as_double(long long i) { double x; memcpy(&x, &i, 8); return x; }
static inline int __popc(unsigned x) { return __builtin_popcount(x); }
static inline int __popcll(unsigned long long x) { return __builtin_popcountll(x); }
static inline int __ffs(int x) { return __builtin_ffs(x); }
static inline int __ffsll(long long x) { return __builtin_ffsll(x); }
static inline int __clz(int x) { return x ? __builtin_clz(x) : 32; }
static inline int __clzll(long long x) { return x ? __builtin_clzll(x) : 64; }
static inline unsigned __brev(unsigned x) {
    unsigned reversed = 0;
    for (int i = 0; i < 32; i++) reversed |= (x >> i & 1) << (31 - i);
    return reversed;
}
static inline int __mulhi(int a, int b) { return (long long)a * b >> 32; }
static inline unsigned __umulhi(unsigned a, unsigned b) { return (unsigned long long)a * b >> 32; }
// Conversions go to the nearest number there is, NaN to 0, as on a GPU.
#define EMULATOR_TO_INTEGER(name, T, lowest, highest) \
    static inline T __float2##name##_rn(float x) { return x != x ? 0 : rintf(x) <= lowest ? (T)lowest : rintf(x) >= highest ? (T)(highest - 1) : (T)rintf(x); } \
    static inline T __float2##name##_rz(float x) { return __float2##name##_rn(truncf(x)); } \
    static inline T __float2##name##_ru(float x) { return __float2##name##_rn(ceilf(x)); } \
    static inline T __float2##name##_rd(float x) { return __float2##name##_rn(floorf(x)); }
EMULATOR_TO_INTEGER(int, int, -2147483648.0, 2147483648.0)
EMULATOR_TO_INTEGER(uint, unsigned, 0.0, 4294967296.0)
static inline float __int2float_rn(int x) { return x; }
static inline float __uint2float_rn(unsigned x) { return x; }
static inline float __double2float_rn(double x) { return x; }
static inline float __fadd_rn(float a, float b) { return a + b; }
static inline float __fmul_rn(float a, float b) { return a * b; }
static inline float __fmaf_rn(float a, float b, float c) { return fmaf(a, b, c); }
static inline float __fdiv_rn(float a, float b) { return a / b; }
static inline float __fdividef(float a, float b) { return a / b; }
static inline float __frcp_rn(float x) { return 1 / x; }
static inline float __fsqrt_rn(float x) { return sqrtf(x); }
static inline float __saturatef(float x) { return x > 0 ? x < 1 ? x : 1.0f : 0.0f; }
#define EMULATOR_FAST(name) static inline float __##name##f(float x) { return name##f(x); }
EMULATOR_FAST(exp) EMULATOR_FAST(exp10) EMULATOR_FAST(log) EMULATOR_FAST(log2) EMULATOR_FAST(log10) EMULATOR_FAST(sin)
EMULATOR_FAST(cos) EMULATOR_FAST(tan)
static inline float __powf(float x, float y) { return powf(x, y); }
extern "C" int printf(const char*, ...);
extern "C" long clock(void);
static inline long long clock64() { return clock(); }

// What runs the threads, see runtime.cpp. To a kernel, what changes with the thread is constant.
#ifdef EMULATOR_RUNTIME
#define EMULATOR_VARIABLE extern __attribute__((visibility("default")))
#else
#define EMULATOR_VARIABLE extern const
#endif
EMULATOR_VARIABLE uint3 threadIdx, blockIdx;
EMULATOR_VARIABLE dim3 blockDim, gridDim;
static const int warpSize = 32;
#define UNCHECKED __attribute__((no_sanitize("thread", "undefined")))
extern "C" char __ehdr_start[] __attribute__((visibility("hidden")));
extern "C" char _end[] __attribute__((visibility("hidden")));

#pragma GCC visibility push(default)
namespace emulator {

enum { MAX_THREADS = 1024 };
struct Exchange { alignas(16) char bytes[2][64]; };
enum Kind { SCALAR, INPUT, INOUT_, OUTPUT };
struct Parameter { const char* name; unsigned long long bytes; unsigned item; int kind; };
struct Launch {
    const Parameter* parameters;
    const unsigned long long* words;
    unsigned count, grid[3], block[3];
    unsigned long long shared_bytes, seed;
};
struct Image { char *start, *end, *shared_start, *shared_end; };  // a library's memory

EMULATOR_VARIABLE int current, thread_count;
extern Exchange exchange[MAX_THREADS];
extern char* dynamic_shared;
extern void** arguments;

const char* run(void (*body)(), const Image& image, const Launch& launch);
void fail(const char* place, const char* what);
int block_barrier(const char* place, bool vote);
void warp_barrier(unsigned mask, const char* place, bool synchronises);  // returns when every lane of the mask has called it
unsigned active_lanes();
void read_any(const void* address, size_t bytes);
void atomic(void* address, size_t bytes);
void fence();
void copy_async(void* to, const void* from, int bytes, bool copied);
void copy_commit();
void copy_wait(int pending_groups);
unsigned warp_call();  // how many warp operations the thread has called before

// extern __shared__ T name[], in a function or outside.
template <class T> struct Dynamic {
    template <class U> operator U*() const { return (U*)dynamic_shared; }
    template <class I> T& operator[](I i) const { return ((T*)dynamic_shared)[i]; }
};

struct Argument {
    void* address;
    template <class V> operator V() const { return *(V*)address; }
};

// What the lanes of a warp deposited in one call; to be read before the lane's next warp operation.
template <class V> struct Deposits {
    unsigned warp, parity;
    UNCHECKED const V& operator[](int lane) const { return *(const V*)exchange[warp * 32 + lane].bytes[parity]; }
};

// Deposits `mine`, meets the lanes of the mask, and gives access to what each of them deposited in this call.
template <class V> UNCHECKED static Deposits<V> exchange_in_warp(unsigned mask, const V& mine, const char* place) {
    static_assert(sizeof(V) <= sizeof(exchange[0].bytes[0]), "a lane can exchange 64 bytes");
    Deposits<V> all = {(unsigned)current / 32, warp_call() & 1};
    memcpy(exchange[current].bytes[all.parity], &mine, sizeof(V));
    warp_barrier(mask, place, false);
    return all;
}

// What lane `source` deposits: it must exist and be in the mask.
template <class V> UNCHECKED static V shuffle_any(unsigned mask, V mine, int source, const char* place) {
    Deposits<V> all = exchange_in_warp(mask, mine, place);
    if (source < 0 || source > 31 || !(mask >> source & 1) || current / 32 * 32 + source >= thread_count)
        fail(place, "reads a lane that takes no part in the shuffle");
    return all[source];
}
#define EMULATOR_SHUFFLE(T) \
    static inline T shuffle(unsigned mask, T mine, int source, const char* place) { return shuffle_any(mask, mine, source, place); }
EMULATOR_SHUFFLE(int) EMULATOR_SHUFFLE(long) EMULATOR_SHUFFLE(long long) EMULATOR_SHUFFLE(float)
EMULATOR_SHUFFLE(unsigned) EMULATOR_SHUFFLE(unsigned long) EMULATOR_SHUFFLE(unsigned long long) EMULATOR_SHUFFLE(double)


// The lane that a shuffle reads, in groups of `width` lanes.
static inline int lane_at(int lane, int width = 32) { return current % 32 / width * width + lane % width; }
static inline int lane_xor(int lanes, int width = 32) {
    int lane = current % 32, other = lane ^ lanes;
    return other / width <= lane / width ? other : lane;
}
static inline int lane_up(int lanes, int width = 32) { return current % 32 - (current % width >= lanes ? lanes : 0); }
static inline int lane_down(int lanes, int width = 32) { return current % 32 + (current % width + lanes < width ? lanes : 0); }

UNCHECKED static unsigned ballot(unsigned mask, bool vote, const char* place) {
    Deposits<bool> all = exchange_in_warp(mask, vote, place);
    unsigned votes = 0;
    for (int i = 0; i < 32; i++)
        if (mask >> i & 1 && current / 32 * 32 + i < thread_count && all[i]) votes |= 1u << i;
    return votes;
}

struct SyncWarp {
    const char* place;
    void operator()(unsigned mask = 0xFFFFFFFFu) const { warp_barrier(mask, place, true); }
};

#define EMULATOR_ATOMIC(name, T, value) \
    UNCHECKED static inline T name(T* p, T v) { \
        emulator::atomic(p, sizeof(T)); \
        T old = *p; \
        *p = value; \
        return old; \
    }
#define EMULATOR_ATOMICS(T) \
    EMULATOR_ATOMIC(atomicAdd, T, old + v) EMULATOR_ATOMIC(atomicExch, T, v)
#define EMULATOR_INTEGER_ATOMICS(T) \
    EMULATOR_ATOMICS(T) \
    EMULATOR_ATOMIC(atomicMin, T, v < old ? v : old) EMULATOR_ATOMIC(atomicMax, T, v > old ? v : old) \
    EMULATOR_ATOMIC(atomicAnd, T, old & v) EMULATOR_ATOMIC(atomicOr, T, old | v) EMULATOR_ATOMIC(atomicXor, T, old ^ v) \
    UNCHECKED static inline T atomicCAS(T* p, T compare, T v) { \
        emulator::atomic(p, sizeof(T)); \
        T old = *p; \
        if (old == compare) *p = v; \
        return old; \
    }
}  // namespace emulator
#pragma GCC visibility pop
EMULATOR_INTEGER_ATOMICS(int) EMULATOR_INTEGER_ATOMICS(unsigned) EMULATOR_INTEGER_ATOMICS(unsigned long long)
EMULATOR_ATOMICS(float) EMULATOR_ATOMIC(atomicAdd, double, old + v)
EMULATOR_ATOMIC(atomicMin, long long, v < old ? v : old) EMULATOR_ATOMIC(atomicMax, long long, v > old ? v : old)
EMULATOR_ATOMIC(atomicSub, int, old - v) EMULATOR_ATOMIC(atomicSub, unsigned, old - v)
EMULATOR_ATOMIC(atomicInc, unsigned, old >= v ? 0 : old + 1) EMULATOR_ATOMIC(atomicDec, unsigned, old == 0 || old > v ? v : old - 1)

extern "C" char __start_cu_shared[] __attribute__((weak, visibility("hidden")));
extern "C" char __stop_cu_shared[] __attribute__((weak, visibility("hidden")));
#define EMULATOR_ENTRY(kernel, ...) \
    static void kernel##_body() { using emulator::arguments; kernel(__VA_ARGS__); } \
    extern "C" UNCHECKED __attribute__((visibility("default"))) const char* emulator_##kernel(const emulator::Launch& launch) { \
        return emulator::run(kernel##_body, {__ehdr_start, _end, __start_cu_shared, __stop_cu_shared}, launch); \
    }
#define EMULATOR_TEXT_(x) #x
#define EMULATOR_TEXT(x) EMULATOR_TEXT_(x)
#define EMULATOR_PLACE (__FILE__ ":" EMULATOR_TEXT(__LINE__))

#define DYNAMIC_SHARED(T, name) T* name = (T*)emulator::dynamic_shared
#define __syncthreads() ((void)emulator::block_barrier(EMULATOR_PLACE, false))
#define __syncthreads_count(vote) emulator::block_barrier(EMULATOR_PLACE, (vote) != 0)
#define __syncthreads_and(vote) (__syncthreads_count(vote) == emulator::thread_count)
#define __syncthreads_or(vote) (__syncthreads_count(vote) != 0)
#define __syncwarp(...) emulator::SyncWarp{EMULATOR_PLACE}(__VA_ARGS__)
#define __threadfence() emulator::fence()
#define __threadfence_block() emulator::fence()
#define __threadfence_system() emulator::fence()
#define __shfl_sync(mask, value, ...) emulator::shuffle(mask, value, emulator::lane_at(__VA_ARGS__), EMULATOR_PLACE)
#define __shfl_xor_sync(mask, value, ...) emulator::shuffle(mask, value, emulator::lane_xor(__VA_ARGS__), EMULATOR_PLACE)
#define __shfl_up_sync(mask, value, ...) emulator::shuffle(mask, value, emulator::lane_up(__VA_ARGS__), EMULATOR_PLACE)
#define __shfl_down_sync(mask, value, ...) emulator::shuffle(mask, value, emulator::lane_down(__VA_ARGS__), EMULATOR_PLACE)
#define __ballot_sync(mask, vote) emulator::ballot(mask, (vote) != 0, EMULATOR_PLACE)
#define __any_sync(mask, vote) (__ballot_sync(mask, vote) != 0)
#define __all_sync(mask, vote) (__ballot_sync(mask, !(vote)) == 0)
#define __activemask() emulator::active_lanes()
#define __trap() emulator::fail(EMULATOR_PLACE, "calls __trap()")
#define assert(condition) ((condition) ? (void)0 : emulator::fail(EMULATOR_PLACE, "fails the assertion " #condition))
