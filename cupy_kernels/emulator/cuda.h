// A CUDA block on one CPU core: what the .cu files of this package need of CUDA, for a host C++ compiler.
//
// Blocks run one after another. Every CUDA thread of a block is a fiber that runs until it waits at a barrier or ends;
// the order in which fibers run is a permutation drawn from a seed, so that a missing barrier changes the result.
// Checks: a barrier that some thread of the block or lane of the mask does not reach, or reaches at another source line;
// shared memory is poisoned before each block; the destination of a cp.async is poisoned until the wait that covers it;
// an access to memory that the process does not have ends the kernel with a message.
// Poison is 0xFF bytes: a NaN in every floating type. This shows logic errors; it shows nothing about memory ordering
// between warps, speed, or the last bit of CUDA's mathematical functions.
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

struct dim3 { unsigned x, y, z; };
struct __align__(16) float4 { float x, y, z, w; };
struct __align__(8) float2 { float x, y; };
struct __align__(16) double2 { double x, y; };
struct __align__(16) uint4 { unsigned x, y, z, w; };
struct __align__(8) uint2 { unsigned x, y; };
static inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
static inline float2 make_float2(float x, float y) { return {x, y}; }
static inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
static dim3 threadIdx, blockIdx, blockDim, gridDim;

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
static inline int __popc(unsigned x) { return __builtin_popcount(x); }
static inline int __ffs(int x) { return __builtin_ffs(x); }

namespace emulator {

extern "C" void* aligned_alloc(size_t alignment, size_t bytes);  // <stdlib.h> of C++ brings mathematics of its own
extern "C" void free(void*);

enum { MAX_THREADS = 1024, STACK_BYTES = 128 << 10, MAX_COPIES = 256, GUARD_BYTES = 4096 };
enum State { READY, AT_BARRIER, AT_WARP, DONE };

struct Copy { char* to; const char* from; int bytes; };
struct Fiber {
    void* stack_pointer;
    State state;
    const char* place;        // file and line of the barrier it waits at
    unsigned warp_calls;      // parity picks the exchange buffer: a fast lane may be one call ahead
    Copy copies[MAX_COPIES];  // cp.async issued and not yet waited for
    int copy_count, group_ends[MAX_COPIES], group_count;
};
struct Warp { unsigned arrived, mask; const char* place; };
struct Exchange { alignas(16) char bytes[2][64]; };

static Fiber fibers[MAX_THREADS];
static Warp warps[MAX_THREADS / 32];
static Exchange exchange[MAX_THREADS];
static int thread_count, current, order[MAX_THREADS];
static void* scheduler_stack_pointer;
static char* stacks;
static void** arguments;
static void (*thread_body)();
static char error[512];
static char* dynamic_shared;

struct Argument {
    void* address;
    template <class V> operator V() const { return *(V*)address; }
};

extern "C" void emulator_switch(void** save, void* load);
#if defined(__x86_64__)
asm(R"(
.text
.type emulator_switch,@function
emulator_switch:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    ret
)");
enum { SAVED_WORDS = 6, RETURN_WORD = 6 };
#elif defined(__aarch64__)
asm(R"(
.text
.type emulator_switch,%function
emulator_switch:
    sub sp, sp, #160
    stp x19, x20, [sp, #0]
    stp x21, x22, [sp, #16]
    stp x23, x24, [sp, #32]
    stp x25, x26, [sp, #48]
    stp x27, x28, [sp, #64]
    stp x29, x30, [sp, #80]
    stp d8, d9, [sp, #96]
    stp d10, d11, [sp, #112]
    stp d12, d13, [sp, #128]
    stp d14, d15, [sp, #144]
    mov x9, sp
    str x9, [x0]
    mov sp, x1
    ldp x19, x20, [sp, #0]
    ldp x21, x22, [sp, #16]
    ldp x23, x24, [sp, #32]
    ldp x25, x26, [sp, #48]
    ldp x27, x28, [sp, #64]
    ldp x29, x30, [sp, #80]
    ldp d8, d9, [sp, #96]
    ldp d10, d11, [sp, #112]
    ldp d12, d13, [sp, #128]
    ldp d14, d15, [sp, #144]
    add sp, sp, #160
    ret
)");
enum { SAVED_WORDS = 20, RETURN_WORD = 11 };
#else
#error "the emulator switches fibers on x86-64 and aarch64 only"
#endif

static void yield() { emulator_switch(&fibers[current].stack_pointer, scheduler_stack_pointer); }

#define EMULATOR_REPORT(...) snprintf(emulator::error, sizeof emulator::error, __VA_ARGS__)
#define EMULATOR_FAIL(...) (EMULATOR_REPORT(__VA_ARGS__), yield())  // the scheduler sees the error and never comes back

// Linux's signals, declared here: <signal.h> brings names that a kernel may have, such as write.
struct SignalInfo { int number, error, code; void* address; };
struct SignalAction {
    void (*handler)(int, SignalInfo*, void*);
    unsigned long mask[16];
    int flags;
    void (*restorer)();
};
extern "C" int emulator_sigaction(int number, const SignalAction* action, SignalAction* before) __asm__("sigaction");
enum { BUS_ERROR = 7, ARITHMETIC_ERROR = 8, SEGMENTATION_FAULT = 11, WITH_INFO = 4, STAY_UNBLOCKED = 0x40000000 };

static const int faults[] = {SEGMENTATION_FAULT, BUS_ERROR, ARITHMETIC_ERROR};
static SignalAction before[3];  // what the process does about them
static thread_local bool runs_here;

// An access far outside of all arrays ends the kernel, not the process: a notebook goes on.
static void on_fault(int number, SignalInfo* info, void*) {
    if (!runs_here || error[0]) {  // not a fault of the kernel: it comes again, to the process
        for (int i = 0; i < 3; i++)
            if (faults[i] == number) emulator_sigaction(number, &before[i], nullptr);
        return;
    }
    if (number == ARITHMETIC_ERROR) EMULATOR_FAIL("thread %d divides an integer by zero", current);
    else EMULATOR_FAIL("thread %d reads or writes far out of bounds, at %p", current, info->address);
}

static void fiber_main() {
    thread_body();
    fibers[current].state = DONE;
    for (;;) yield();
}

static void set_thread(int t) {
    current = t;
    threadIdx = {t % blockDim.x, t / blockDim.x % blockDim.y, t / (blockDim.x * blockDim.y)};
}

static void block_barrier(const char* place) {
    fibers[current].state = AT_BARRIER;
    fibers[current].place = place;
    yield();
}

// Returns when every lane of the mask has called it from the same source line.
static void warp_barrier(unsigned mask, const char* place) {
    Warp& warp = warps[current / 32];
    unsigned lanes = thread_count - current / 32 * 32, lane = 1u << current % 32;
    if (lanes < 32) mask &= (1u << lanes) - 1;
    if (!(mask & lane)) return EMULATOR_FAIL("%s: thread %d calls a warp operation whose mask leaves it out", place, current);
    if (!warp.arrived) warp.mask = mask, warp.place = place;
    if (warp.mask != mask || warp.place != place)
        return EMULATOR_FAIL("%s and %s: lanes of warp %d meet at different warp operations", warp.place, place, current / 32);
    warp.arrived |= lane;
    if (warp.arrived == mask) {
        warp.arrived = 0;
        for (int i = 0; i < 32; i++)
            if (mask >> i & 1) fibers[current / 32 * 32 + i].state = READY;
        return;
    }
    fibers[current].state = AT_WARP;
    fibers[current].place = place;
    yield();
}

// What the lanes of a warp deposited in one call; to be read before the lane's next warp operation.
template <class V> struct Deposits {
    unsigned warp, parity;
    const V& operator[](int lane) const { return *(const V*)exchange[warp * 32 + lane].bytes[parity]; }
};

// Deposits `mine`, meets the lanes of the mask, and gives access to what each of them deposited in this call.
template <class V> static Deposits<V> exchange_in_warp(unsigned mask, const V& mine, const char* place) {
    static_assert(sizeof(V) <= sizeof(exchange[0].bytes[0]), "a lane can exchange 64 bytes");
    Deposits<V> all = {(unsigned)current / 32, fibers[current].warp_calls++ & 1};
    memcpy(exchange[current].bytes[all.parity], &mine, sizeof(V));
    warp_barrier(mask, place);
    return all;
}

// What lane `source` deposits: it must exist and be in the mask.
template <class V> static V shuffle_any(unsigned mask, V mine, int source, const char* place) {
    Deposits<V> all = exchange_in_warp(mask, mine, place);
    if (source < 0 || source > 31 || !(mask >> source & 1) || current / 32 * 32 + source >= thread_count)
        EMULATOR_FAIL("%s: thread %d reads lane %d, which takes no part in the shuffle", place, current, source);
    return all[source];
}
#define EMULATOR_SHUFFLE(T) \
    static inline T shuffle(unsigned mask, T mine, int source, const char* place) { return shuffle_any(mask, mine, source, place); }
EMULATOR_SHUFFLE(int) EMULATOR_SHUFFLE(long) EMULATOR_SHUFFLE(long long) EMULATOR_SHUFFLE(float)
EMULATOR_SHUFFLE(unsigned) EMULATOR_SHUFFLE(unsigned long) EMULATOR_SHUFFLE(unsigned long long) EMULATOR_SHUFFLE(double)

static void copy_async(void* to, const void* from, int bytes, bool copied) {
    Fiber& f = fibers[current];
    if (((uintptr_t)to | (copied ? (uintptr_t)from : 0)) % bytes)
        return EMULATOR_FAIL("thread %d: a cp.async of %d bytes is not aligned to them", current, bytes);
    if (f.copy_count == MAX_COPIES) return EMULATOR_FAIL("thread %d has more than %d cp.async in flight", current, MAX_COPIES);
    memset(to, 0xFF, bytes);
    f.copies[f.copy_count++] = {(char*)to, copied ? (const char*)from : nullptr, bytes};
}

static void copy_commit() {
    Fiber& f = fibers[current];
    if (f.group_count == MAX_COPIES) return EMULATOR_FAIL("thread %d has more than %d cp.async groups in flight", current, MAX_COPIES);
    f.group_ends[f.group_count++] = f.copy_count;
}

static void copy_wait(int pending_groups) {
    Fiber& f = fibers[current];
    int groups = f.group_count - pending_groups;
    if (groups <= 0) return;
    int done = f.group_ends[groups - 1];
    for (int i = 0; i < done; i++)
        if (f.copies[i].from) memcpy(f.copies[i].to, f.copies[i].from, f.copies[i].bytes);
        else memset(f.copies[i].to, 0, f.copies[i].bytes);
    for (int i = done; i < f.copy_count; i++) f.copies[i - done] = f.copies[i];
    for (int i = groups; i < f.group_count; i++) f.group_ends[i - groups] = f.group_ends[i] - done;
    f.copy_count -= done;
    f.group_count -= groups;
}

extern "C" char __start_cu_shared[] __attribute__((weak, visibility("hidden")));
extern "C" char __stop_cu_shared[] __attribute__((weak, visibility("hidden")));

static void start_block(size_t dynamic_shared_bytes) {
    if (__start_cu_shared) memset(__start_cu_shared, 0xFF, __stop_cu_shared - __start_cu_shared);
    memset(dynamic_shared, 0xFF, dynamic_shared_bytes + GUARD_BYTES);
    memset(warps, 0, sizeof warps);
    for (int t = 0; t < thread_count; t++) {
        Fiber& f = fibers[t];
        void** top = (void**)(stacks + (size_t)(t + 1) * STACK_BYTES) - SAVED_WORDS - 4;
        memset(top, 0, SAVED_WORDS * sizeof(void*));
        top[RETURN_WORD] = (void*)fiber_main;
        f.stack_pointer = top;
        f.state = READY;
        f.warp_calls = 0;
        f.copy_count = f.group_count = 0;
    }
}

// Every fiber is DONE or waits at the block's barrier: release them, report the end (false), or fail.
static bool release_barrier() {
    int done = 0, waiting = 0, first = -1;
    for (int t = 0; t < thread_count; t++) {
        Fiber& f = fibers[t];
        done += f.state == DONE;
        if (f.state == AT_WARP)
            return EMULATOR_REPORT("%s: thread %d waits in a warp operation for lanes that do not come", f.place, t), false;
        if (f.state != AT_BARRIER) continue;
        waiting++;
        if (first < 0) first = t;
        if (f.place != fibers[first].place)
            return EMULATOR_REPORT("divergent barrier: thread %d waits at %s, thread %d at %s", first, fibers[first].place, t, f.place), false;
    }
    if (done == thread_count) return false;
    if (done)
        return EMULATOR_REPORT("divergent barrier: %d of %d threads wait at %s, the others have returned", waiting, thread_count, fibers[first].place), false;
    for (int t = 0; t < thread_count; t++) fibers[t].state = READY;
    return true;
}

static void run_block(size_t dynamic_shared_bytes) {
    start_block(dynamic_shared_bytes);
    do {
        bool ran;
        do {
            ran = false;
            for (int i = 0; i < thread_count; i++) {
                if (fibers[order[i]].state != READY) continue;
                set_thread(order[i]);
                emulator_switch(&scheduler_stack_pointer, fibers[current].stack_pointer);
                if (error[0]) return;
                ran = true;
            }
        } while (ran);
    } while (release_barrier());
    for (int i = 0; i < GUARD_BYTES; i++)
        if (dynamic_shared[dynamic_shared_bytes + i] != (char)0xFF && !error[0])
            EMULATOR_REPORT("a write out of bounds, after the block's dynamic shared memory");
}

// Runs body() once for each thread of each block; null, or what went wrong.
static const char* run(void (*body)(), void** args, const unsigned* grid, const unsigned* block, size_t shared_bytes, unsigned long long seed, char* stack_memory) {
    gridDim = {grid[0], grid[1], grid[2]};
    blockDim = {block[0], block[1], block[2]};
    thread_count = block[0] * block[1] * block[2];
    thread_body = body;
    arguments = args;
    stacks = stack_memory;
    error[0] = 0;
    bool backwards = seed & 1;  // seed 0: blocks and threads in ascending order
    for (int t = 0; t < thread_count; t++) order[t] = t;
    if (seed)
        for (int t = thread_count - 1; t > 0; t--) {
            seed = seed * 6364136223846793005ull + 1442695040888963407ull;
            int other = (seed >> 33) % (t + 1), swap = order[t];
            order[t] = order[other], order[other] = swap;
        }
    SignalAction ours = {on_fault, {}, WITH_INFO | STAY_UNBLOCKED};  // the handler does not return
    for (int i = 0; i < 3; i++) emulator_sigaction(faults[i], &ours, &before[i]);
    runs_here = true;
    dynamic_shared = (char*)aligned_alloc(128, (shared_bytes + 127) / 128 * 128 + GUARD_BYTES);
    long long blocks = (long long)gridDim.x * gridDim.y * gridDim.z;
    for (long long i = 0; i < blocks && !error[0]; i++) {
        long long b = backwards ? blocks - 1 - i : i;
        blockIdx = {unsigned(b % gridDim.x), unsigned(b / gridDim.x % gridDim.y), unsigned(b / gridDim.x / gridDim.y)};
        run_block(shared_bytes);
    }
    free(dynamic_shared);
    runs_here = false;
    for (int i = 0; i < 3; i++) emulator_sigaction(faults[i], &before[i], nullptr);
    if (!error[0]) return nullptr;
    size_t used = strlen(error);
    snprintf(error + used, sizeof error - used, " (block %u,%u,%u)", blockIdx.x, blockIdx.y, blockIdx.z);
    return error;
}

}  // namespace emulator

#define EMULATOR_ENTRY(kernel, ...) \
    static void kernel##_body() { using emulator::arguments; kernel(__VA_ARGS__); } \
    extern "C" __attribute__((visibility("default"))) const char* emulator_##kernel( \
        void** args, const unsigned* grid, const unsigned* block, size_t shared_bytes, unsigned long long seed, char* stacks) { \
        return emulator::run(kernel##_body, args, grid, block, shared_bytes, seed, stacks); \
    }
#define EMULATOR_TEXT_(x) #x
#define EMULATOR_TEXT(x) EMULATOR_TEXT_(x)
#define EMULATOR_PLACE (__FILE__ ":" EMULATOR_TEXT(__LINE__))

#define DYNAMIC_SHARED(T, name) T* name = (T*)emulator::dynamic_shared
#define __syncthreads() emulator::block_barrier(EMULATOR_PLACE)
#define __syncwarp(...) emulator::warp_barrier(0xFFFFFFFFu, EMULATOR_PLACE)
#define __shfl_sync(mask, value, lane) emulator::shuffle(mask, value, (lane) & 31, EMULATOR_PLACE)
#define __shfl_xor_sync(mask, value, lanes) emulator::shuffle(mask, value, emulator::current % 32 ^ (lanes), EMULATOR_PLACE)
#define __shfl_down_sync(mask, value, delta) \
    emulator::shuffle(mask, value, emulator::current % 32 + (emulator::current % 32 + (delta) < 32 ? (delta) : 0), EMULATOR_PLACE)
