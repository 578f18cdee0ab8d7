// What runs a kernel's threads, and what checks them. Compiled once; cuda.h is what kernels see of it.
//
// Blocks run one after another. Every CUDA thread of a block is a fiber that runs until it waits at a barrier or ends;
// the order in which fibers run is a permutation drawn from a seed.
//
// Kernels are compiled with -fsanitize=thread, for which the compiler calls __tsan_read4(address) and the like before
// each access to memory. These functions, in accesses.cpp, look the address up. Arrays are copied to places that lie 64
// GiB apart, so that an index that is wrong by anything leads to no other array. Each 4 bytes of an array, and of
// shared memory, have a `Word`: who wrote it last, and who read it. Two accesses of two threads to the same bytes, one
// of them a write, must have a barrier between them. It is found out for one order of threads, whatever order ran.
#define EMULATOR_RUNTIME
#include <fenv.h>
#include <pthread.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <ucontext.h>
#include <unistd.h>
#include "cuda.h"
#include <stdarg.h>

#define EXPORTED __attribute__((visibility("default")))
EXPORTED uint3 threadIdx, blockIdx;
EXPORTED dim3 blockDim, gridDim;
#define CALLER ((char*)__builtin_return_address(0))

namespace emulator {

typedef unsigned long long u64;

enum { MAX_COPIES = 256, MAX_PARAMETERS = 62, POISON = 0xFF };
enum : size_t {
    STACK_BYTES = 576 << 10,
    STACK_GAP = 16 << 20
};  // a gap wider than local arrays are, so that no access
// skips it
enum : size_t {
    STACK_SHIFT = 128
};  // not all stacks end at the same place of a page: they would share lines of the cache
enum State { READY, AT_BARRIER, AT_WARP, AT_WGMMA, DONE };

// What a thread did last to 4 bytes, in one number: number of the barrier before it, number of the __syncwarp, thread,
// whether it was atomic or is a copy in flight, which of the bytes were ever written, which it touched.
enum : u64 { TOUCHED = 15, EVER = 15 << 4, FLYING = 1 << 8, ATOMIC = 1 << 9 };
enum { EVER_SHIFT = 4, THREAD_SHIFT = 10, CLOCK_SHIFT = 20, EPOCH_SHIFT = 32, MOST_CLOCK = 4095 };
struct Word {
    u64 write, read, other_read;  // other_read: the one of another thread before it
    unsigned write_place, read_place;
};

struct Array {
    const char* name;
    char* start;
    size_t bytes;
    unsigned item;
    bool constant, initialised, shared;
    Word* words;
};

struct Copy {
    char* to;
    const char* from;
    int bytes;
};
struct Fiber {
    void* stack_pointer;
    State state;
    Place place;          // of the barrier it waits at
    unsigned warp_calls;  // parity picks the exchange buffer: a fast lane may be one call ahead
    bool vote, fenced;
    unsigned short clock,
        seen[32];             // __syncwarps; and of each lane, up to which one its accesses came before this thread's
    Copy copies[MAX_COPIES];  // cp.async issued and not yet waited for
    int copy_count, group_ends[MAX_COPIES], group_count;
    // wgmma.cpp: whether it has called wgmma_fence(), which sums it used since, which ones are in flight; and when it
    // called fence_async_proxy()
    bool registers_fenced;
    unsigned touched_sums, flying_sums;
    u64 proxy_fence;
};
struct Warp {
    unsigned arrived, mask;
    Place place;
};

EXPORTED int current, thread_count;
static int votes;
EXPORTED Exchange exchange[MAX_THREADS];
EXPORTED char* dynamic_shared;
EXPORTED void** arguments;
static Fiber fibers[MAX_THREADS];
static Warp warps[MAX_THREADS / 32];
static int order[MAX_THREADS];
static void* scheduler_stack_pointer;
static void (*thread_body)();
static char error[1024];
static char* stacks;
static char* stack_low;

static char *arena, *image_start, *image_end;
static int slot_bits = 36;
static Array arrays[MAX_PARAMETERS + 2], &dynamic = arrays[0],
                                         &fixed = arrays[MAX_PARAMETERS + 1];  // the latter: static shared memory
static unsigned array_count;
static u64 self;                           // the stamp of what the current thread does
static unsigned block_epoch, first_epoch;  // number of the last barrier, and of the block's start
static bool acquired, all_released;        // earlier blocks' accesses came before this block's: see atomic()
static u64 argument_words[MAX_PARAMETERS];
static void* argument_addresses[MAX_PARAMETERS];
static int sums_count;  // of wgmma, in local memory
static void touch_sums(const char* address, size_t bytes, bool writes, const char* place);

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

static void report(const char* format, ...) {
    if (error[0]) return;
    va_list values;
    va_start(values, format);
    vsnprintf(error, sizeof error, format, values);
    va_end(values);
}

// Ends the launch: the scheduler sees the error, and never comes back.
#define FAIL(...) (emulator::report(__VA_ARGS__), emulator::yield())
#define FAIL_AT(at, format, ...) FAIL("%s:%u: " format, (at).file, (at).line, __VA_ARGS__)

EXPORTED void fail(Place place, const char* what) {
    FAIL("%s:%d: thread %d %s", place.file, place.line, current, what);
}

}  // namespace emulator

#include "accesses.cpp"

namespace emulator {

// --- Threads

static void set_stamp() {
    self = (u64)block_epoch << EPOCH_SHIFT | (u64)fibers[current].clock << CLOCK_SHIFT | (u64)current << THREAD_SHIFT;
}

static void set_thread(int t) {
    current = t;
    threadIdx = {t % blockDim.x, t / blockDim.x % blockDim.y, t / (blockDim.x * blockDim.y)};
    stack_low = stacks + t * (STACK_BYTES + STACK_GAP) + STACK_GAP;
    set_stamp();
}

static void fiber_main() {
    thread_body();
    fibers[current].state = DONE;
    for (;;) yield();
}

int block_barrier(Place place, bool vote) {
    Fiber& f = fibers[current];
    f.state = AT_BARRIER, f.place = place, f.vote = vote;
    yield();
    return votes;
}

// What the lanes of a mask did before now comes before what each of them does from now on.
static void synchronise(unsigned mask) {
    Fiber* lanes = fibers + current / 32 * 32;
    unsigned short seen[32] = {};
    for (int i = 0; i < 32; i++) {
        if (!(mask >> i & 1)) continue;
        for (int j = 0; j < 32; j++)
            if (lanes[i].seen[j] > seen[j]) seen[j] = lanes[i].seen[j];
        if (lanes[i].clock >= seen[i]) seen[i] = lanes[i].clock + 1;
        if (lanes[i].clock < MOST_CLOCK) lanes[i].clock++;
    }
    for (int i = 0; i < 32; i++)
        if (mask >> i & 1) memcpy(lanes[i].seen, seen, sizeof seen);
}

bool warp_barrier(unsigned mask, Place place, bool synchronises) {
    Warp& warp = warps[current / 32];
    unsigned lanes = thread_count - current / 32 * 32, lane = 1u << current % 32;
    if (lanes < 32) mask &= (1u << lanes) - 1;
    if (!(mask & lane))
        return FAIL(
                   "%s:%d: thread %d calls a warp operation whose mask leaves it out", place.file, place.line, current),
               false;
    if (!warp.arrived) warp.mask = mask, warp.place = place;
    if (warp.mask != mask || warp.place != place)
        return FAIL(
                   "%s:%d and %s:%d: lanes of warp %d meet at different warp operations", warp.place.file,
                   warp.place.line, place.file, place.line, current / 32),
               false;
    warp.arrived |= lane;
    if (warp.arrived == mask) {
        warp.arrived = 0;
        for (int i = 0; i < 32; i++)
            if (mask >> i & 1) fibers[current / 32 * 32 + i].state = READY;
        if (synchronises) synchronise(mask), set_stamp();
        return true;
    }
    fibers[current].state = AT_WARP;
    fibers[current].place = place;
    yield();
    return false;
}

bool is_shared(const void* address) {
    Array* array = find((const char*)address);
    return array && array->shared;
}
bool is_global(const void* address) {
    Array* array = find((const char*)address);
    return array ? !array->shared : size_t((const char*)address - image_start) < size_t(image_end - image_start);
}

void set_rounding(int mode) {
    static const int modes[] = {FE_TONEAREST, FE_TOWARDZERO, FE_UPWARD, FE_DOWNWARD};
    fesetround(modes[mode]);
}

unsigned active_lanes() {
    unsigned lanes = 0;
    for (int i = 0; i < 32; i++) {
        int t = current / 32 * 32 + i;
        if (t < thread_count && fibers[t].state != DONE) lanes |= 1u << i;
    }
    return lanes;
}

void copy_async(void* to, const void* from, int bytes, bool copied) {
    Fiber& f = fibers[current];
    if (((uintptr_t)to | (copied ? (uintptr_t)from : 0)) % bytes)
        return FAIL("<%x>: thread %d: a cp.async of %d bytes is not aligned to them", place_of(CALLER), current, bytes);
    if (f.copy_count == MAX_COPIES) return FAIL("thread %d has more than %d cp.async in flight", current, MAX_COPIES);
    if (copied) access<false>(from, bytes, CALLER);
    Array* array = find((char*)to);
    if (!array || !array->shared)
        return FAIL("<%x>: thread %d: a cp.async writes to shared memory alone", place_of(CALLER), current);
    touch<true>(*array, (char*)to, bytes, CALLER, FLYING);
    memset(to, POISON, bytes);
    f.copies[f.copy_count++] = {(char*)to, copied ? (const char*)from : nullptr, bytes};
}

void copy_commit() {
    Fiber& f = fibers[current];
    if (f.group_count == MAX_COPIES)
        return FAIL("thread %d has more than %d cp.async groups in flight", current, MAX_COPIES);
    f.group_ends[f.group_count++] = f.copy_count;
}

void copy_wait(int pending_groups) {
    Fiber& f = fibers[current];
    int groups = f.group_count - pending_groups;
    if (groups <= 0) return;
    int done = f.group_ends[groups - 1];
    for (int i = 0; i < done; i++) {
        Copy& c = f.copies[i];
        Array* array = find(c.to);
        for (size_t offset = c.to - array->start, end = offset + c.bytes; offset < end; offset += 4) {
            Word& word = array->words[offset / 4];
            word.write = self | TOUCHED | EVER;  // others see it after the next barrier
        }
        if (c.from) memcpy(c.to, c.from, c.bytes);
        else memset(c.to, 0, c.bytes);
    }
    for (int i = done; i < f.copy_count; i++) f.copies[i - done] = f.copies[i];
    for (int i = groups; i < f.group_count; i++) f.group_ends[i - groups] = f.group_ends[i] - done;
    f.copy_count -= done;
    f.group_count -= groups;
}

}  // namespace emulator

#include "wgmma.cpp"

namespace emulator {

static void next_epoch() {
    block_epoch++;
    for (int t = 0; t < thread_count; t++)
        if (fibers[t].clock) {
            fibers[t].clock = 0;
            memset(fibers[t].seen, 0, sizeof fibers[t].seen);
        }
}

static void start_block() {
    memset(dynamic.start, POISON, dynamic.bytes);
    memset(fixed.start, POISON, fixed.bytes);
    memset(warps, 0, sizeof warps);
    memset(queues, 0, sizeof queues);
    next_epoch();
    first_epoch = block_epoch;
    all_released &= acquired;
    acquired = false;
    for (int t = 0; t < thread_count; t++) {
        Fiber& f = fibers[t];
        void** top = (void**)(stacks + (t + 1) * (STACK_BYTES + STACK_GAP) - t % 32 * STACK_SHIFT) - SAVED_WORDS - 4;
        memset(top, 0, SAVED_WORDS * sizeof(void*));
        top[RETURN_WORD] = (void*)fiber_main;
        f.stack_pointer = top;
        f.state = READY;
        f.warp_calls = 0;
        f.fenced = false;
        f.copy_count = f.group_count = 0;
        f.registers_fenced = false;
        f.touched_sums = f.flying_sums = 0;
    }
}

// Every fiber is DONE or waits at the block's barrier: release them, report the end (false), or fail.
static bool release_barrier() {
    int done = 0, waiting = 0, first = -1;
    votes = 0;
    for (int t = 0; t < thread_count; t++) {
        Fiber& f = fibers[t];
        done += f.state == DONE;
        if (f.state == AT_WARP)
            return report(
                       "%s:%d: thread %d waits in a warp operation for lanes that do not come", f.place.file,
                       f.place.line, t),
                   false;
        if (f.state == AT_WGMMA)
            return report("thread %d waits for a wgmma that not all warps of its warpgroup issue", t), false;
        if (f.state != AT_BARRIER) continue;
        waiting++;
        votes += f.vote;
        if (first < 0) first = t;
        if (f.place != fibers[first].place)
            return report(
                       "divergent barrier: thread %d waits at %s:%d, thread %d at %s:%d", first,
                       fibers[first].place.file, fibers[first].place.line, t, f.place.file, f.place.line),
                   false;
    }
    if (done == thread_count) return false;
    if (done)
        return report(
                   "divergent barrier: %d of %d threads wait at %s:%d, the others have returned", waiting, thread_count,
                   fibers[first].place.file, fibers[first].place.line),
               false;
    for (int t = 0; t < thread_count; t++) fibers[t].state = READY;
    next_epoch();
    return true;
}

static void run_block() {
    start_block();
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
}

// --- Faults, and interruptions

static const int signals[] = {SIGSEGV, SIGBUS, SIGFPE, SIGINT, SIGURG};
enum { SIGNALS = 5 };
static struct sigaction before[SIGNALS];  // what the process does about them
static thread_local bool runs_here;
static pthread_t runner;
static const char* volatile stopped;  // why the launch must end

static bool in_a_fiber(void* context) {
#if defined(__x86_64__)
    char* stack_pointer = (char*)((ucontext_t*)context)->uc_mcontext.gregs[REG_RSP];
#else
    char* stack_pointer = (char*)((ucontext_t*)context)->uc_mcontext.sp;
#endif
    return size_t(stack_pointer - stacks) < MAX_THREADS * (STACK_BYTES + STACK_GAP);
}

// What goes wrong in a kernel ends the kernel, not the process: a notebook goes on.
static void on_signal(int number, siginfo_t* info, void* context) {
    if (number == SIGINT) stopped = "interrupted";
    if (number == SIGINT || number == SIGURG) {
        if (!stopped) return;
        if (!runs_here) pthread_kill(runner, SIGURG);
        else if (in_a_fiber(context)) FAIL("%s", stopped);
        else report("%s", stopped);
        return;
    }
    if (!runs_here || error[0] || !in_a_fiber(context)) {  // not a fault of the kernel: it comes again, to the process
        for (int i = 0; i < SIGNALS; i++)
            if (signals[i] == number) sigaction(number, &before[i], nullptr);
        return;
    }
    char* address = (char*)info->si_addr;
    if (number == SIGFPE) FAIL("thread %d divides an integer by zero", current);
    else if (size_t(address - stacks) < MAX_THREADS * (STACK_BYTES + STACK_GAP))
        FAIL(
            "thread %d needs more than %d KiB of local memory: a large array, or a recursion without end", current,
            int(STACK_BYTES >> 10));
    else FAIL("thread %d reads or writes far out of bounds, at %p", current, address);
}

// --- Launches

static char* reserve(size_t bytes, int protection) {
    void* found = mmap(nullptr, bytes, protection, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    return found == MAP_FAILED ? nullptr : (char*)found;
}

enum { SIGNAL_STACK_BYTES = 1 << 16 };
static char* signal_stack;

static bool reserve_all() {
    if (arena) return true;
    signal_stack = reserve(SIGNAL_STACK_BYTES, PROT_READ | PROT_WRITE);
    stacks = reserve(MAX_THREADS * (STACK_BYTES + STACK_GAP), PROT_NONE);
    if (!stacks || !signal_stack) return false;
    for (int t = 0; t < MAX_THREADS; t++)
        mprotect(stacks + t * (STACK_BYTES + STACK_GAP) + STACK_GAP, STACK_BYTES, PROT_READ | PROT_WRITE);
    for (; slot_bits >= 30 && !arena; slot_bits -= 2)
        arena = reserve((size_t)(MAX_PARAMETERS + 1) << slot_bits, PROT_NONE);
    slot_bits += 2;
    return arena;
}

static Word* words;  // of all arrays
static size_t words_bytes;

// Memory full of zeros.
static bool clear_words(size_t bytes) {
    if (bytes > words_bytes) {
        if (words) munmap(words, words_bytes);
        words = (Word*)reserve(words_bytes = bytes, PROT_READ | PROT_WRITE);
        return words;
    }
    if (bytes < 1 << 20) memset((void*)words, 0, bytes);
    else madvise(words, bytes, MADV_DONTNEED);
    return true;
}

// Where an array is copied to: in the middle of slot `slot`, as far from a multiple of 256 as it is now.
static bool place(unsigned slot, const char* name, size_t alignment, size_t bytes, unsigned item) {
    char* middle = arena + ((size_t)slot << slot_bits) + ((size_t)1 << (slot_bits - 1));
    arrays[slot] = {name, middle + alignment, bytes, item, false, true, false, nullptr};
    return bytes < (size_t)1 << (slot_bits - 1) && !mprotect(middle, alignment + bytes + 1, PROT_READ | PROT_WRITE);
}

static void release(unsigned slot) {
    Array& a = arrays[slot];
    char* first = (char*)((size_t)a.start & ~(size_t)4095);
    if (a.bytes > 1 << 16) madvise(first, a.start + a.bytes - first, MADV_DONTNEED);
    mprotect(first, a.start + a.bytes + 1 - first, PROT_NONE);
}

static void check_written(const Array& array) {
    size_t missing = 0, first = 0, count = array.bytes / array.item;
    for (size_t i = count; i-- > 0;) {
        bool whole = true;
        for (size_t byte = i * array.item; byte < (i + 1) * array.item; byte++)
            whole &= array.words[byte / 4].write >> (EVER_SHIFT + byte % 4) & 1;
        if (!whole) missing++, first = i;
    }
    if (missing)
        report(
            "leaves %zu of %zu elements of its output %s unwritten; the first at flat index %zu", missing, count,
            array.name, first);
}

static void run_blocks(unsigned long long seed) {
    bool backwards = seed & 1;  // seed 0: blocks and threads in ascending order
    for (int t = 0; t < thread_count; t++) order[t] = t;
    if (seed)
        for (int t = thread_count - 1; t > 0; t--) {
            seed = seed * 6364136223846793005ull + 1442695040888963407ull;
            int other = (seed >> 33) % (t + 1), swap = order[t];
            order[t] = order[other], order[other] = swap;
        }
    block_epoch = 0;
    acquired = all_released = true;
    sums_count = 0, fault_count = 1;
    for (int t = 0; t < thread_count; t++) fibers[t].proxy_fence = 0;
    long long blocks = (long long)gridDim.x * gridDim.y * gridDim.z;
    for (long long i = 0; i < blocks && !error[0]; i++) {
        long long b = backwards ? blocks - 1 - i : i;
        blockIdx = {unsigned(b % gridDim.x), unsigned(b / gridDim.x % gridDim.y), unsigned(b / gridDim.x / gridDim.y)};
        run_block();
    }
    if (!error[0]) return;
    size_t used = strlen(error);
    snprintf(error + used, sizeof error - used, " (block %u,%u,%u)", blockIdx.x, blockIdx.y, blockIdx.z);
}

const char* run(void (*body)(), const Image& image, const Launch& launch) {
    gridDim = {launch.grid[0], launch.grid[1], launch.grid[2]};
    blockDim = {launch.block[0], launch.block[1], launch.block[2]};
    thread_count = blockDim.x * blockDim.y * blockDim.z;
    thread_body = body;
    image_start = image.start, image_end = image.end;
    error[0] = 0;
    stopped = nullptr;
    if (launch.count > MAX_PARAMETERS) return "more than 62 parameters";
    if (!reserve_all()) return "the emulator finds no address space for 1024 stacks";
    size_t fixed_bytes = image.shared_end - image.shared_start;
    bool placed = place(0, "dynamic shared memory", 0, launch.shared_bytes, 1);
    for (unsigned i = 0; i < launch.count; i++) {
        const Parameter& p = launch.parameters[i];
        argument_words[i] = launch.words[i];
        argument_addresses[i] = &argument_words[i];
        bool is_array = p.kind != SCALAR && launch.words[i];
        placed &= place(i + 1, p.name, is_array ? launch.words[i] % 256 : 0, is_array ? p.bytes : 0, p.item);
        if (!is_array) continue;
        Array& a = arrays[i + 1];
        a.constant = p.kind == INPUT, a.initialised = p.kind != OUTPUT;
        if (a.initialised) memcpy(a.start, (void*)launch.words[i], a.bytes);
        else memset(a.start, POISON, a.bytes);
        argument_words[i] = (u64)a.start;
    }
    array_count = launch.count + 1;
    fixed = {"static shared memory", image.shared_start, fixed_bytes, 1, false, false, true, nullptr};
    dynamic.shared = true, dynamic.initialised = false;
    dynamic_shared = dynamic.start;
    arguments = argument_addresses;
    size_t count = fixed_bytes / 4 + 1;
    for (unsigned i = 0; i < array_count; i++) count += arrays[i].bytes / 4 + 1;
    if (!placed || !clear_words(count * sizeof(Word))) return "the emulator finds no memory for the arrays";
    fixed.words = words;
    Word* next = words + fixed_bytes / 4 + 1;
    for (unsigned i = 0; i < array_count; i++) arrays[i].words = next, next += arrays[i].bytes / 4 + 1;

    stack_t ours = {}, theirs;
    ours.ss_sp = signal_stack, ours.ss_size = SIGNAL_STACK_BYTES;
    sigaltstack(&ours, &theirs);
    runner = pthread_self();
    runs_here = true;
    struct sigaction action = {};
    action.sa_sigaction = on_signal,
    action.sa_flags = SA_SIGINFO | SA_NODEFER | SA_ONSTACK;  // the handler may not return
    for (int i = 0; i < SIGNALS; i++) {
        sigaction(signals[i], nullptr, &before[i]);
        if (signals[i] != SIGINT || before[i].sa_handler != SIG_IGN) sigaction(signals[i], &action, nullptr);
    }
    run_blocks(launch.seed);
    for (int i = 0; i < SIGNALS; i++) sigaction(signals[i], &before[i], nullptr);
    runs_here = false;
    sigaltstack(&theirs, nullptr);

    for (unsigned i = 1; i < array_count && !error[0]; i++)
        if (arrays[i].bytes && !arrays[i].initialised) check_written(arrays[i]), check_faults(arrays[i]);
    for (unsigned i = 0; i < array_count; i++) {
        if (i && arrays[i].bytes && !arrays[i].constant && !error[0])
            memcpy((void*)launch.words[i - 1], arrays[i].start, arrays[i].bytes);
        release(i);
    }
    return error[0] ? error : nullptr;
}

extern "C" EXPORTED void emulator_stop() {
    stopped = "takes longer than CUPY_KERNELS_TIMEOUT allows";
    pthread_kill(runner, SIGURG);
}

}  // namespace emulator
