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
#define __global__ __attribute__((noinline))  // a copy of a loop that does nothing would have no line
#define __device__
#define __host__
#define __forceinline__ inline
#define __noinline__ __attribute__((noinline))
#define __grid_constant__
#define __launch_bounds__(...)
#define __CUDACC__ 1
#define __CUDACC_RTC__ 1
#define __CUDACC_VER_MAJOR__ 11  // of the oldest NVRTC that is supported
#define __CUDACC_VER_MINOR__ 8
#define __CUDA_ARCH__ 700  // the oldest that kernels run on; what a text has for newer ones is often asm
#ifndef __clang__
#define __builtin_assume(condition) ((void)0)
#endif
#define __align__(n) __attribute__((aligned(n)))
#define __builtin_align__(n) __align__(n)
// Compilers refuse one section for all variables of a kind, for instance for const ones and others: see elf.py.
#define EMULATOR_NUMBERED(kind, number) kind(number)
#define EMULATOR_CONSTANT(number) __attribute__((section("cu_constant" #number)))
#define __constant__ EMULATOR_NUMBERED(EMULATOR_CONSTANT, __COUNTER__)
#ifdef __clang__
#define __shared__ static __attribute__((section("cu_shared"), aligned(16), used))  // used: clang would shrink it
#else  // g++ forgets a template's section
#define EMULATOR_SHARED(number) static __attribute__((section("cu_shared" #number), retain, aligned(16), used))
#define __shared__ EMULATOR_NUMBERED(EMULATOR_SHARED, __COUNTER__)
#endif

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
EMULATOR_VECTORS(short, short, 4, 8) EMULATOR_VECTORS(unsigned short, ushort, 4, 8)
EMULATOR_VECTORS(int, int, 8, 16) EMULATOR_VECTORS(unsigned, uint, 8, 16) EMULATOR_VECTORS(long, long, 16, 16)
EMULATOR_VECTORS(unsigned long, ulong, 16, 16) EMULATOR_VECTORS(long long, longlong, 16, 16)
EMULATOR_VECTORS(unsigned long long, ulonglong, 16, 16) EMULATOR_VECTORS(float, float, 8, 16)
EMULATOR_VECTORS(double, double, 16, 16)
struct dim3 {
    unsigned x, y, z;
    constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
    constexpr dim3(uint3 v) : x(v.x), y(v.y), z(v.z) {}
    operator uint3() const { return {x, y, z}; }
};
namespace emulator {
template <class T> struct Referred { typedef T type; };
template <class T> struct Referred<T&> { typedef T type; };
template <class T> struct Referred<T&&> { typedef T type; };
}  // namespace emulator
namespace std {  // all that NVRTC has of it
template <class T> constexpr typename emulator::Referred<T>::type&& move(T&& v) noexcept {
    return static_cast<typename emulator::Referred<T>::type&&>(v);
}
template <class T> constexpr T&& forward(typename emulator::Referred<T>::type& v) noexcept {
    return static_cast<T&&>(v);
}
template <class T> constexpr T&& forward(typename emulator::Referred<T>::type&& v) noexcept {
    return static_cast<T&&>(v);
}
}  // namespace std
#include "mathematics.h"

extern "C" int printf(const char*, ...);

#include "interface.h"
static inline void __nanosleep(unsigned) {}
static inline void __brkpt() {}
#include "intrinsics.h"
#include "atomics.h"
#include "warps.h"

// What the compilers do not check: copies that do not become one access, and functions of the host's library.
#ifndef EMULATOR_RUNTIME
static inline clock_t clock() { return emulator::ticks(); }
static inline long long clock64() { return clock(); }
#define EMULATOR_INSTEAD extern "C" inline __attribute__((gnu_inline, always_inline))
EMULATOR_INSTEAD void* memcpy(void* to, const void* from, size_t bytes) {
    emulator::reads(from, bytes), emulator::writes(to, bytes);
    return __builtin_memcpy(to, from, bytes);
}
EMULATOR_INSTEAD void* memset(void* to, int value, size_t bytes) {
    emulator::writes(to, bytes);
    return __builtin_memset(to, value, bytes);
}
#define EMULATOR_WITH_RESULT(T, R, name) \
    EMULATOR_INSTEAD T name(T x, R* result) { \
        emulator::writes(result, sizeof *result); \
        return __builtin_##name(x, result); \
    }
EMULATOR_WITH_RESULT(float, int, frexpf) EMULATOR_WITH_RESULT(double, int, frexp)
EMULATOR_WITH_RESULT(float, float, modff) EMULATOR_WITH_RESULT(double, double, modf)
EMULATOR_INSTEAD float remquof(float x, float y, int* quotient) {
    emulator::writes(quotient, sizeof *quotient);
    return __builtin_remquof(x, y, quotient);
}
EMULATOR_INSTEAD double remquo(double x, double y, int* quotient) {
    emulator::writes(quotient, sizeof *quotient);
    return __builtin_remquo(x, y, quotient);
}
#endif

#define EMULATOR_ENTRY(kernel, ...) \
    static __attribute__((no_sanitize("address"))) void kernel##_body() { \
        using emulator::arguments; \
        (kernel)(__VA_ARGS__); /* in parentheses: else a name such as run is looked for in emulator, too */ \
    } \
    extern "C" UNCHECKED __attribute__((visibility("default"))) const char* emulator_##kernel( \
        const emulator::Launch& launch) { \
        return emulator::run(kernel##_body, {__ehdr_start, _end}, launch); \
    }
#define DYNAMIC_SHARED(T, name) T* name = (T*)emulator::dynamic_shared
#define assert(condition) \
    ((condition) ? (void)0 : emulator::fail(emulator::Place::here(), "fails the assertion " #condition))
// What g++ calls where a local array has overflowed.
extern "C" UNCHECKED __attribute__((visibility("hidden"))) void __stack_chk_fail() {
    emulator::fail({0, EMULATOR_CALLER}, "has written outside of a local array");
    for (;;);
}
static inline void __trap(EMULATOR_HERE) { emulator::fail(place, "calls __trap()"); }
