// A CUDA block on one CPU core: what NVRTC knows without a header, for a host C++ compiler, and nothing else:
// tests/test_dialect.py compiles some hundred lines with both. So it includes nothing of the host's.
//
// runtime.cpp runs the threads and says what is checked. Shared memory is poisoned before each block, the destination
// of a cp.async until the wait that covers it; poison is 0xFF bytes, a NaN in every floating type. This shows logic
// errors; it shows nothing about speed, or the last bit of CUDA's mathematical functions.

#ifndef EMULATOR_RUNTIME
typedef decltype(sizeof 0) size_t;
typedef decltype((char*)0 - (char*)0) ptrdiff_t;
typedef long clock_t;
#define NULL __null
extern "C" void* memcpy(void*, const void*, size_t);
extern "C" void* memset(void*, int, size_t);
#endif

#define CUPY_KERNELS_EMULATOR 1
#define __global__
#define __device__
#define __host__
#define __constant__
#define __forceinline__ inline
#define __noinline__ __attribute__((noinline))
#define __grid_constant__
#define __launch_bounds__(...)
#define __CUDACC__ 1
#define __CUDACC_RTC__ 1
#ifndef __clang__
#define __builtin_assume(condition) ((void)0)
#endif
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
    struct __align__(two) name##2 { \
        T x, y; \
        EMULATOR_COPIED \
    }; \
    struct name##3 { T x, y, z; }; \
    struct __align__(four) name##4 { \
        T x, y, z, w; \
        EMULATOR_COPIED \
    }; \
    static inline name##1 make_##name##1(T x) { return {x}; } \
    static inline name##2 make_##name##2(T x, T y) { return {x, y}; } \
    static inline name##3 make_##name##3(T x, T y, T z) { return {x, y, z}; } \
    static inline name##4 make_##name##4(T x, T y, T z, T w) { return {x, y, z, w}; }
EMULATOR_VECTORS(signed char, char, 2, 4) EMULATOR_VECTORS(unsigned char, uchar, 2, 4)
EMULATOR_VECTORS(short, short, 4, 8) EMULATOR_VECTORS(unsigned short, ushort, 4, 8) EMULATOR_VECTORS(int, int, 8, 16)
EMULATOR_VECTORS(unsigned, uint, 8, 16) EMULATOR_VECTORS(long, long, 16, 16)
EMULATOR_VECTORS(unsigned long, ulong, 16, 16) EMULATOR_VECTORS(long long, longlong, 16, 16)
EMULATOR_VECTORS(unsigned long long, ulonglong, 16, 16) EMULATOR_VECTORS(float, float, 8, 16)
EMULATOR_VECTORS(double, double, 16, 16)
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
EMULATOR_OF_1(erfc) EMULATOR_OF_1(exp) EMULATOR_OF_1(exp10) EMULATOR_OF_1(exp2) EMULATOR_OF_1(expm1) EMULATOR_OF_1(fabs)
EMULATOR_OF_1(floor) EMULATOR_OF_1(j0) EMULATOR_OF_1(j1) EMULATOR_OF_1(lgamma) EMULATOR_OF_1(log) EMULATOR_OF_1(log10)
EMULATOR_OF_1(log1p) EMULATOR_OF_1(log2) EMULATOR_OF_1(logb) EMULATOR_OF_1(nearbyint) EMULATOR_OF_1(rint)
EMULATOR_OF_1(round) EMULATOR_OF_1(sin) EMULATOR_OF_1(sinh) EMULATOR_OF_1(sqrt) EMULATOR_OF_1(tan) EMULATOR_OF_1(tanh)
EMULATOR_OF_1(tgamma) EMULATOR_OF_1(trunc) EMULATOR_OF_1(y0) EMULATOR_OF_1(y1) EMULATOR_OF_2(atan2)
EMULATOR_OF_2(copysign) EMULATOR_OF_2(fdim) EMULATOR_OF_2(fmax) EMULATOR_OF_2(fmin) EMULATOR_OF_2(fmod)
EMULATOR_OF_2(hypot) EMULATOR_OF_2(nextafter) EMULATOR_OF_2(pow) EMULATOR_OF_2(remainder)
EMULATOR_FLOAT(int, int, ilogb) EMULATOR_FLOAT(long, long, lrint) EMULATOR_FLOAT(long, long, lround)
EMULATOR_FLOAT(long long, long long, llrint) EMULATOR_FLOAT(long long, long long, llround)
EMULATOR_WITH(int*, int*, frexp) EMULATOR_WITH(int, int, ldexp) EMULATOR_WITH(double*, float*, modf)
EMULATOR_WITH(long, long, scalbln) EMULATOR_WITH(int, int, scalbn)
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
    EMULATOR_MINMAX_INTEGERS(int) EMULATOR_MINMAX_INTEGERS(long)
        EMULATOR_MINMAX_INTEGERS(long long) static inline float min(float a, float b) {
    return fminf(a, b);
}
static inline float max(float a, float b) { return fmaxf(a, b); }
#define EMULATOR_MINMAX_DOUBLE(A, B) \
    static inline double min(A a, B b) { return fmin((double)a, (double)b); } \
    static inline double max(A a, B b) { return fmax((double)a, (double)b); }
EMULATOR_MINMAX_DOUBLE(double, double) EMULATOR_MINMAX_DOUBLE(float, double) EMULATOR_MINMAX_DOUBLE(double, float)

extern "C" int printf(const char*, ...);
extern "C" long clock(void);
static inline long long clock64() { return clock(); }
static inline void __nanosleep(unsigned) {}
static inline void __brkpt() {}

// What runs the threads, see runtime.cpp. To a kernel, what changes with the thread is constant.
#ifdef EMULATOR_RUNTIME
#define EMULATOR_VARIABLE extern __attribute__((visibility("default")))
#else
#define EMULATOR_VARIABLE extern const
#endif
EMULATOR_VARIABLE uint3 threadIdx, blockIdx;
EMULATOR_VARIABLE dim3 blockDim, gridDim;
static const int warpSize = 32;
#define UNCHECKED __attribute__((noinline, no_sanitize("thread", "undefined")))
extern "C" char __ehdr_start[] __attribute__((visibility("hidden")));
extern "C" char _end[] __attribute__((visibility("hidden")));

#pragma GCC visibility push(default)
namespace emulator {

// A line of the source. As a default argument it is the line of the call.
struct Place {
    const char* file;
    int line;
    static constexpr Place here(const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
        return {file, line};
    }
    bool operator!=(const Place& other) const { return file != other.file || line != other.line; }
};
#define EMULATOR_HERE emulator::Place place = emulator::Place::here()

enum { MAX_THREADS = 1024 };
struct Exchange { alignas(16) char bytes[2][64]; };
enum Kind { SCALAR, INPUT, INOUT_, OUTPUT };
struct Parameter {
    const char* name;
    unsigned long long bytes;
    unsigned item;
    int kind;
};
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
void fail(Place place, const char* what);
int block_barrier(Place place, bool vote);
// Returns when every lane of the mask has called it; to the one that was last, true.
bool warp_barrier(unsigned mask, Place place, bool synchronises);
unsigned active_lanes();
bool is_shared(const void* address);
bool is_global(const void* address);
void set_rounding(int mode);  // 0 to nearest, 1 to zero, 2 up, 3 down
void read_any(const void* address, size_t bytes);
void atomic(void* address, size_t bytes);
void fence();
void copy_async(void* to, const void* from, int bytes, bool copied);
void copy_commit();
void copy_wait(int pending_groups);
unsigned warp_call();  // how many warp operations the thread has called before

// An operand of wgmma, where it lies: 8 halves each, neighbours in k of a row, or in rows of a k.
struct Operand {
    int count;
    bool along_k;
    const void* octets[512];
};
// A warp's part of a wgmma: 16 rows of a, or none (fragments), and all columns of b.
struct Multiplication {
    const void* operand;
    int columns;
    bool accumulates;
    Operand a, b;
    float (*value)(unsigned short bits);
};
// To the last lane of the warp that calls it, what it has to fill before it calls issued(); to others null.
Multiplication* issue(float* sums, int columns, const unsigned* fragment, const void* operand, const char* place);
void issued();
void commit_multiplications();
void wait_for_multiplications(int pending_groups);
void fence_registers();
void fence_proxy();

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
template <class V> UNCHECKED static Deposits<V> exchange_in_warp(unsigned mask, const V& mine, EMULATOR_HERE) {
    static_assert(sizeof(V) <= sizeof(exchange[0].bytes[0]), "a lane can exchange 64 bytes");
    Deposits<V> all = {(unsigned)current / 32, warp_call() & 1};
    memcpy(exchange[current].bytes[all.parity], &mine, sizeof(V));
    warp_barrier(mask, place, false);
    return all;
}

// What lane `source` deposits: it must exist and be in the mask.
template <class V> UNCHECKED static V shuffle(unsigned mask, V mine, int source, Place place) {
    Deposits<V> all = exchange_in_warp(mask, mine, place);
    if (source < 0 || source > 31 || !(mask >> source & 1) || current / 32 * 32 + source >= thread_count)
        fail(place, "reads a lane that takes no part in the shuffle");
    return all[source];
}

// The lane that a shuffle reads, in groups of `width` lanes.
static inline int lane_at(int lane, int width = 32) { return current % 32 / width * width + lane % width; }
static inline int lane_xor(int lanes, int width = 32) {
    int lane = current % 32, other = lane ^ lanes;
    return other / width <= lane / width ? other : lane;
}
static inline int lane_up(int lanes, int width = 32) { return current % 32 - (current % width >= lanes ? lanes : 0); }
static inline int lane_down(int lanes, int width = 32) {
    return current % 32 + (current % width + lanes < width ? lanes : 0);
}

template <class T> UNCHECKED static float value_of(unsigned short bits) { return to_acc(T{bits}); }

template <class At> UNCHECKED static void lay_out(Operand& operand, const At* at, int first, int rows) {
    operand.count = 0;
    if (!at) return;
    operand.along_k = At::ALONG_K;
    for (int row = first; row < first + rows; row += At::ALONG_K ? 1 : 8)
        for (int k = 0; k < 16; k += At::ALONG_K ? 8 : 1) operand.octets[operand.count++] = at->octet(row, k);
}

// sums (+)= a b, with a in shared memory, or a null pointer and a fragment. An operand's octet(row, k) is where the 8
// halves with that one begin, which are neighbours in k if it is ALONG_K, else in rows.
template <class T, class A, class B> UNCHECKED static void multiply_async(
    float* sums, int columns, bool accumulates, const A* a, const unsigned* fragment, const B& b, const char* place) {
    Multiplication* m = issue(sums, columns, fragment, b.octet(0, 0), place);
    if (!m) return;
    m->columns = columns;
    m->accumulates = accumulates;
    m->value = value_of<T>;
    lay_out(m->a, a, current / 32 % 4 * 16, 16);
    lay_out(m->b, &b, 0, columns);
    issued();
}

// Lanes of the mask whose value has the bits of this one's.
template <class V> UNCHECKED static unsigned matches(unsigned mask, V mine, Place place) {
    Deposits<V> all = exchange_in_warp(mask, mine, place);
    unsigned found = 0;
    for (int i = 0; i < 32; i++)
        if (mask >> i & 1 && current / 32 * 32 + i < thread_count && !__builtin_memcmp(&all[i], &mine, sizeof mine))
            found |= 1u << i;
    return found;
}

template <class V, class F> UNCHECKED static V reduce(unsigned mask, V mine, Place place, F combine) {
    Deposits<V> all = exchange_in_warp(mask, mine, place);
    bool first = true;
    V result = mine;
    for (int i = 0; i < 32; i++)
        if (mask >> i & 1 && current / 32 * 32 + i < thread_count)
            result = first ? all[i] : combine(result, all[i]), first = false;
    return result;
}

UNCHECKED static unsigned ballot(unsigned mask, bool vote, Place place) {
    Deposits<bool> all = exchange_in_warp(mask, vote, place);
    unsigned votes = 0;
    for (int i = 0; i < 32; i++)
        if (mask >> i & 1 && current / 32 * 32 + i < thread_count && all[i]) votes |= 1u << i;
    return votes;
}

}  // namespace emulator
#pragma GCC visibility pop

#include "intrinsics.h"

#define EMULATOR_ATOMIC_OF(name, T, value) \
    UNCHECKED static inline T name(T* p, T v) { \
        emulator::atomic(p, sizeof(T)); \
        T old = *p; \
        *p = value; \
        return old; \
    }
#define EMULATOR_CAS_OF(name, T) \
    UNCHECKED static inline T name(T* p, T compare, T v) { \
        emulator::atomic(p, sizeof(T)); \
        T old = *p; \
        if (old == compare) *p = v; \
        return old; \
    }
#define EMULATOR_ATOMIC(name, T, value) \
    EMULATOR_ATOMIC_OF(name, T, value) \
    EMULATOR_ATOMIC_OF(name##_block, T, value) EMULATOR_ATOMIC_OF(name##_system, T, value)
#define EMULATOR_CAS(T) \
    EMULATOR_CAS_OF(atomicCAS, T) EMULATOR_CAS_OF(atomicCAS_block, T) EMULATOR_CAS_OF(atomicCAS_system, T)
#define EMULATOR_ORDERED_ATOMICS(T) \
    EMULATOR_ATOMIC(atomicMin, T, v < old ? v : old) \
    EMULATOR_ATOMIC(atomicMax, T, v > old ? v : old) \
    EMULATOR_ATOMIC(atomicAnd, T, old& v) EMULATOR_ATOMIC(atomicOr, T, old | v) EMULATOR_ATOMIC(atomicXor, T, old ^ v)
#define EMULATOR_INTEGER_ATOMICS(T) \
    EMULATOR_ORDERED_ATOMICS(T) EMULATOR_ATOMIC(atomicAdd, T, old + v) EMULATOR_ATOMIC(atomicExch, T, v) EMULATOR_CAS(T)
EMULATOR_INTEGER_ATOMICS(int) EMULATOR_INTEGER_ATOMICS(unsigned) EMULATOR_INTEGER_ATOMICS(unsigned long long)
EMULATOR_ORDERED_ATOMICS(long long) EMULATOR_CAS_OF(atomicCAS, unsigned short)
EMULATOR_ATOMIC(atomicAdd, float, old + v) EMULATOR_ATOMIC(atomicExch, float, v)
EMULATOR_ATOMIC(atomicAdd, double, old + v) EMULATOR_ATOMIC(atomicSub, int, old - v)
EMULATOR_ATOMIC(atomicSub, unsigned, old - v) EMULATOR_ATOMIC(atomicInc, unsigned, old >= v ? 0 : old + 1)
EMULATOR_ATOMIC(atomicDec, unsigned, old == 0 || old > v ? v : old - 1)

                        extern "C" char __start_cu_shared[] __attribute__((weak, visibility("hidden")));
extern "C" char __stop_cu_shared[] __attribute__((weak, visibility("hidden")));
#define EMULATOR_ENTRY(kernel, ...) \
    static void kernel##_body() { \
        using emulator::arguments; \
        kernel(__VA_ARGS__); \
    } \
    extern "C" UNCHECKED __attribute__((visibility("default"))) const char* emulator_##kernel( \
        const emulator::Launch& launch) { \
        return emulator::run(kernel##_body, {__ehdr_start, _end, __start_cu_shared, __stop_cu_shared}, launch); \
    }
#define EMULATOR_CALLER ((const char*)__builtin_return_address(0))  // in an UNCHECKED function
#define DYNAMIC_SHARED(T, name) T* name = (T*)emulator::dynamic_shared
#define assert(condition) \
    ((condition) ? (void)0 : emulator::fail(emulator::Place::here(), "fails the assertion " #condition))
static inline void __trap(EMULATOR_HERE) { emulator::fail(place, "calls __trap()"); }

static inline void __syncthreads(EMULATOR_HERE) { emulator::block_barrier(place, false); }
static inline int __syncthreads_count(int vote, EMULATOR_HERE) { return emulator::block_barrier(place, vote != 0); }
static inline int __syncthreads_and(int vote, EMULATOR_HERE) {
    return emulator::block_barrier(place, vote != 0) == emulator::thread_count;
}
static inline int __syncthreads_or(int vote, EMULATOR_HERE) { return emulator::block_barrier(place, vote != 0) != 0; }
static inline void __syncwarp(unsigned mask = 0xFFFFFFFFu, EMULATOR_HERE) { emulator::warp_barrier(mask, place, true); }
static inline void __threadfence() { emulator::fence(); }
static inline void __threadfence_block() { emulator::fence(); }
static inline void __threadfence_system() { emulator::fence(); }
static inline unsigned __activemask() { return emulator::active_lanes(); }

#define EMULATOR_SHUFFLES(T) \
    static inline T __shfl_sync(unsigned mask, T value, int lane, int width = 32, EMULATOR_HERE) { \
        return emulator::shuffle(mask, value, emulator::lane_at(lane, width), place); \
    } \
    static inline T __shfl_xor_sync(unsigned mask, T value, int lanes, int width = 32, EMULATOR_HERE) { \
        return emulator::shuffle(mask, value, emulator::lane_xor(lanes, width), place); \
    } \
    static inline T __shfl_up_sync(unsigned mask, T value, unsigned lanes, int width = 32, EMULATOR_HERE) { \
        return emulator::shuffle(mask, value, emulator::lane_up(lanes, width), place); \
    } \
    static inline T __shfl_down_sync(unsigned mask, T value, unsigned lanes, int width = 32, EMULATOR_HERE) { \
        return emulator::shuffle(mask, value, emulator::lane_down(lanes, width), place); \
    }
EMULATOR_SHUFFLES(int) EMULATOR_SHUFFLES(long) EMULATOR_SHUFFLES(long long) EMULATOR_SHUFFLES(float)
EMULATOR_SHUFFLES(unsigned) EMULATOR_SHUFFLES(unsigned long) EMULATOR_SHUFFLES(unsigned long long)
EMULATOR_SHUFFLES(double)

        static inline unsigned __ballot_sync(unsigned mask, int vote, EMULATOR_HERE) {
    return emulator::ballot(mask, vote != 0, place);
}
static inline int __any_sync(unsigned mask, int vote, EMULATOR_HERE) {
    return emulator::ballot(mask, vote != 0, place) != 0;
}
static inline int __all_sync(unsigned mask, int vote, EMULATOR_HERE) {
    return emulator::ballot(mask, vote == 0, place) == 0;
}

#define EMULATOR_MATCH(T) \
    static inline unsigned __match_any_sync(unsigned mask, T value, EMULATOR_HERE) { \
        return emulator::matches(mask, value, place); \
    } \
    static inline unsigned __match_all_sync(unsigned mask, T value, int* all, EMULATOR_HERE) { \
        *all = emulator::matches(mask, value, place) == mask; \
        return *all ? mask : 0; \
    }
EMULATOR_MATCH(int) EMULATOR_MATCH(long) EMULATOR_MATCH(long long) EMULATOR_MATCH(float) EMULATOR_MATCH(unsigned)
EMULATOR_MATCH(unsigned long) EMULATOR_MATCH(unsigned long long) EMULATOR_MATCH(double)
#define EMULATOR_REDUCE(name, T, value) \
    static inline T __reduce_##name##_sync(unsigned mask, T mine, EMULATOR_HERE) { \
        return emulator::reduce(mask, mine, place, [](T a, T b) -> T { return value; }); \
    }
        EMULATOR_REDUCE(add, unsigned, a + b) EMULATOR_REDUCE(min, unsigned, b < a ? b : a)
            EMULATOR_REDUCE(max, unsigned, a < b ? b : a) EMULATOR_REDUCE(add, int, (int)((unsigned)a + (unsigned)b))
                EMULATOR_REDUCE(min, int, b < a ? b : a) EMULATOR_REDUCE(max, int, a < b ? b : a)
                    EMULATOR_REDUCE(and, unsigned, a& b) EMULATOR_REDUCE(or, unsigned, a | b)
                        EMULATOR_REDUCE(xor, unsigned, a ^ b)
