// What the runtime knows: arrays, who touched which bytes, fibers and warps of the block. A part of runtime.cpp.
#define EXPORTED __attribute__((visibility("default")))
#define CALLER ((char*)__builtin_return_address(0))

EXPORTED uint3 threadIdx, blockIdx;
EXPORTED dim3 blockDim, gridDim;
EXPORTED int warpSize = 32;  // to a kernel no constant expression, as in CUDA

namespace emulator {

typedef unsigned long long u64;

enum { MAX_COPIES = 256, MAX_PARAMETERS = 62, MAX_VARIABLES = 256, MAX_CALLS = 32, POISON = 0xFF, GAP = 256 };
enum { WARPGROUP = 128 };
enum { SIGNAL_STACK_BYTES = 1 << 16 };
// The gap is wider than local arrays are, so that no access skips it. Not all stacks end at the same place of a page:
// they would share lines of the cache.
enum : size_t { STACK_BYTES = 576 << 10, STACK_GAP = 16 << 20, STACK_SHIFT = 128 };
// LATE: at a wgmma_wait(), until nobody else can go on.
enum State { READY, AT_BARRIER, AT_WARP, AT_WARPGROUP, AT_WGMMA, AT_MASK, AT_MBARRIER, LATE, DONE };

// What a thread did last to a word, in one number: number of the barrier before it, its clock (see Fiber), thread,
// whether it was atomic, a bulk copy, or is a copy in flight, which of the bytes were ever written, which it touched.
enum : u64 { TOUCHED = 15, EVER = 15 << 4, FLYING = 1 << 8, ATOMIC = 1 << 9, WROTE = 1 << 10, BULK = 1 << 11 };
enum { EVER_SHIFT = 4, THREAD_SHIFT = 12, CLOCK_SHIFT = 22, EPOCH_SHIFT = 35, MOST_CLOCK = 8191 };
struct Word {
    // other: what came before the last read or atomic write, of which fewest threads know: a read; with WROTE, a write.
    u64 write, read, other;
    u64 write_place : 21, read_place : 21, other_place : 21;
};
enum { WHOLE = 2 };  // a word has 1 << shift bytes: 4 at first, fewer where threads share one

struct Array {
    const char* name;
    char* start;
    size_t bytes;
    unsigned item;  // bytes of an element; 0: variables.py finds it out
    bool constant, initialised, shared;
    int shift;
    Word* words[WHOLE + 1];  // by shift

    Word& word(const char* address) const { return words[shift][(address - start) >> shift]; }
    size_t words_bytes(int of) const { return ((bytes >> of) + 1) * sizeof(Word); }
};

struct Copy {
    char* to;
    const char* from;
    int bytes;
};
struct Call {
    const char* caller;
    u64 hash;  // of this call and of those that led to it
};
struct Fiber {
    void* stack_pointer;
    State state;
    Place place;  // of the barrier or the warp operation it waits at
    u64 path;     // hash of that and of the calls that led there
    unsigned call_count;
    bool vote, at_grid, fenced, calls_atomics, compares;
    // Barriers of its warp or warpgroup, mbarriers and fences since the block's last barrier; and of each thread, up to
    // which clock its accesses came before this thread's. See known_by().
    unsigned short clock, seen[MAX_THREADS];
    Copy copies[MAX_COPIES];  // cp.async issued and not yet waited for
    int copy_count, group_ends[MAX_COPIES], group_count;
    Call calls[MAX_CALLS];  // of functions that it is in and that the compiler has not copied into their callers
    // wgmma.cpp: whether it has called wgmma_fence(), which sums it used since, which ones are in flight; and when it
    // called fence_async_proxy() last, and at which clocks of that epoch
    bool registers_fenced;
    unsigned touched_sums, flying_sums;
    u64 proxy_fence, proxy_fences[MOST_CLOCK / 64 + 1];
    unsigned mbarrier, phase;  // that it waits for
    int warpgroups;            // that meet where it waits for them
};
// What is in the side table about one: its 8 bytes are not used.
struct MBarrier {
    const char* address;
    u64 initialised;  // when and by whom
    unsigned initialised_place, phase;  // phase: how many have ended
    // arrivals of a phase, and those that this one misses; bytes announced in it, and those of which no copy is issued
    int arrivals, missing, bytes, uncopied;
    // As Fiber::seen, what came before the arrivals so far, and before the end of the last phase.
    unsigned short arriving[MAX_THREADS], ended[MAX_THREADS];
};
struct BulkCopy {
    char* to;
    const char* from;
    int bytes;
    unsigned place, mbarrier, phase;
    u64 stamp;  // of its issue
};
struct Warp {
    unsigned waiting, masks[32];  // lanes in a warp operation, and the mask of each
    unsigned char held[32];  // of each lane, what it reads of `exchanged`
};

EXPORTED int current, thread_count;
static int votes;
EXPORTED Exchange exchange[MAX_THREADS];           // what each thread has deposited last
static Exchange exchanged[MAX_THREADS][32];       // 32 a warp: what its lanes had deposited in an operation
EXPORTED char* dynamic_shared;
EXPORTED void** arguments;
static Fiber fibers[MAX_THREADS];
static Warp warps[MAX_THREADS / 32];
static int order[MAX_THREADS];
enum { MAX_MBARRIERS = 64, MAX_BULK_COPIES = 1024 };
static MBarrier mbarriers[MAX_MBARRIERS];  // of the block
static BulkCopy bulk_copies[MAX_BULK_COPIES];  // issued, and nobody has waited for them yet
static unsigned mbarrier_count, bulk_copy_count;
static bool wide;  // threads of the whole block may know each other's clocks, not those of a warpgroup alone
static void* scheduler_stack_pointer;
static void (*thread_body)();
static char error[1024];
static char *stacks, *signal_stack;
static char* stack_low;

static char *arena, *image_start, *image_end;
static int slot_bits = 36;
static Array arrays[MAX_PARAMETERS + 1], &dynamic = arrays[0];  // dynamic shared memory
static Array variables[MAX_VARIABLES];                          // __shared__ and __device__ ones
static unsigned array_count, variable_count;
static size_t accessed_bytes = 1;  // by the last access
static u64 self;                           // the stamp of what the current thread does
// Number of the last barrier; of the block's start, or when it went on behind the last grid barrier; of that one; and
// of the start of the block's shared memory.
static unsigned block_epoch, first_epoch, grid_epoch, shared_since;
static bool released, acquired;  // by this block, and by it what earlier ones have released: see atomic()
static struct { unsigned first, last; } releases[4096];  // epochs of the blocks that have released, in their order
static int release_count;
static int reads_in_a_row;  // volatile or atomic ones of the current thread, since it has gone on
static u64 argument_words[MAX_PARAMETERS];
static void* argument_addresses[MAX_PARAMETERS];
static int sums_count;  // of wgmma, in local memory
static void touch_sums(const char* address, size_t bytes, bool writes, const char* place);
static bool only_block;  // of its launch
static bool only_locals, found_in_locals;  // see locals.cpp
// An index that is too large for its array, which the compiler has found before the access to it.
static struct {
    const char *place, *type;  // place: null if there is none
    long long index;
} wrong_index;
template <bool WRITE> static void check_local(const char* address, size_t bytes, const char* place);
static void name_wrong_index(const char* address, size_t bytes, const char* did);

static char* end_of_stack(int thread) { return stacks + (thread + 1) * (STACK_BYTES + STACK_GAP); }
static bool in_a_stack(const char* address) {
    return size_t(address - stacks) < MAX_THREADS * (STACK_BYTES + STACK_GAP);
}
static bool in_image(const char* address) { return size_t(address - image_start) < size_t(image_end - image_start); }

static const u64 HASH = 0x9E3779B97F4A7C15;
static unsigned calls_known(const Fiber& f) { return f.call_count < MAX_CALLS ? f.call_count : MAX_CALLS; }
// Of an address and the calls that led to it.
static u64 hash_of(const Fiber& f, const void* address) {
    unsigned known = calls_known(f);
    return ((known ? f.calls[known - 1].hash : 0) ^ (u64)address) * HASH;
}

static void yield() { emulator_switch(&fibers[current].stack_pointer, scheduler_stack_pointer); }

// A place as Python finds the source line for: the library's byte. It stands as <byte> in an error.
static unsigned place_of(const char* caller) { return unsigned(caller - image_start); }

static void report(const char* format, ...) {
    if (error[0]) return;
    if (wrong_index.place) {
        snprintf(
            error, sizeof error, "<%x>: thread %d: index %lld is out of bounds of %s", place_of(wrong_index.place),
            current, wrong_index.index, wrong_index.type);
        return;
    }
    va_list values;
    va_start(values, format);
    vsnprintf(error, sizeof error, format, values);
    va_end(values);
}

static void name_block(char* text, size_t size) {
    size_t used = strlen(text);
    snprintf(text + used, size - used, " (block %u,%u,%u)", blockIdx.x, blockIdx.y, blockIdx.z);
}

// Ends the launch: the scheduler sees the error, and never comes back.
#define FAIL(...) (emulator::report(__VA_ARGS__), emulator::yield())

EXPORTED void fail(Place place, const char* what) { FAIL("<%x>: thread %d %s", place_of(place.at), current, what); }

EXPORTED const char* address() { return CALLER; }

}  // namespace emulator
