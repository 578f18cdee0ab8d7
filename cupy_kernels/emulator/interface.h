// What runs the threads, as a kernel sees it: see runtime.cpp. A part of cuda.h.

// To a kernel, what changes with the thread is constant.
#ifdef EMULATOR_RUNTIME
#define EMULATOR_VARIABLE extern __attribute__((visibility("default")))
#else
#define EMULATOR_VARIABLE extern const
#endif
EMULATOR_VARIABLE uint3 threadIdx, blockIdx;
EMULATOR_VARIABLE dim3 blockDim, gridDim;
EMULATOR_VARIABLE int warpSize;
#define UNCHECKED __attribute__((noinline, EMULATOR_UNSEEN no_sanitize("thread", "undefined", "address")))
#ifdef __clang__
#define EMULATOR_UNSEEN disable_sanitizer_instrumentation,  // else it calls __tsan_func_entry()
#else
#define EMULATOR_UNSEEN
#endif
#define EMULATOR_CALLER ((const char*)__builtin_return_address(0))  // in an UNCHECKED function
extern "C" char __ehdr_start[] __attribute__((visibility("hidden")));
extern "C" char _end[] __attribute__((visibility("hidden")));

#pragma GCC visibility push(default)
namespace emulator {

#ifdef __clang__
__attribute__((nomerge))  // those of two branches would have no line
#endif
const char* address();  // of the instruction behind the call

// A line of the source with its file, and a place in the library. As a default argument it is the line of the call.
// What is at two places of a line may be one operation or two: see differ() of threads.cpp.
// Two words, which go in registers: with more, a kernel that has a barrier would have local memory, see locals.cpp.
struct Place {
    unsigned long long line;
    const char* at;
    static Place here(
        const char* file = __builtin_FILE(), int line = __builtin_LINE(), const char* at = emulator::address()) {
        return {(unsigned long long)line << 48 ^ (unsigned long long)file, at};
    }
};
#define EMULATOR_HERE emulator::Place place = emulator::Place::here()

enum { MAX_THREADS = 1024 };
struct Exchange { alignas(16) char bytes[64]; };
enum Kind { SCALAR, INPUT, INOUT_, OUTPUT, WORKSPACE };  // WORKSPACE: an OUTPUT of which a part is written
struct Parameter {
    const char* name;
    unsigned long long bytes;
    unsigned item;
    int kind;
};
// Of the kernel's library, its addresses counted from the library's start.
struct Variable {
    const char* name;
    unsigned long long address, bytes;
    int shared, constant;
};
struct Launch {
    const Parameter* parameters;
    const unsigned long long* words;
    unsigned count, grid[3], block[3];
    unsigned long long shared_bytes, seed;
    const Variable* variables;
    unsigned variable_count;
    bool cooperative;
    bool only_locals;  // see locals.cpp
    bool zeros;  // its local variables that nobody sets are 0: see check_set() of memory.cpp
    bool (*same)(const char* path, const char* other);  // whether two paths are of one operation: see threads.cpp
};
struct Image { char *start, *end; };  // a library's memory

EMULATOR_VARIABLE int current, thread_count;
extern Exchange exchange[MAX_THREADS];
extern char* dynamic_shared;
extern void** arguments;

const char* run(void (*body)(), const Image& image, const Launch& launch);
void fail(Place place, const char* what);
int block_barrier(Place place, bool vote);
void grid_barrier(EMULATOR_HERE);
// Returns when every lane of the mask has called it; to the one that was last, true.
bool warp_barrier(unsigned mask, Place place, bool synchronises);
unsigned active_lanes(Place place);
bool is_shared(const void* address);
bool is_global(const void* address);
long ticks();  // a clock that goes as fast in each run of a launch
void set_rounding(int mode);  // 0 to nearest, 1 to zero, 2 up, 3 down
void read_any(const void* address, size_t bytes);
void reads(const void* address, size_t bytes);
void writes(void* address, size_t bytes);
void unchanging(const void* address, size_t bytes, const char* place);
void atomic(void* address, size_t bytes, const char* place, const void* compared = nullptr);
void fence();
void copy_async(void* to, const void* from, int bytes, bool copied);
void copy_commit();
void copy_wait(int pending_groups);
void mbarrier_init(void* barrier, int arrivals);
void mbarrier_arrive(void* barrier, int bytes);
void mbarrier_wait(void* barrier, int parity);
void bulk_copy(void* to, const void* from, int bytes, void* barrier);
const Exchange* received();  // what the lanes deposited before the warp barrier that the thread met last

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
void warpgroup_barrier(int warpgroups);

template <class T> using Dynamic = T* const&;  // extern __shared__ T name[], in a function or outside

struct Argument {
    void* address;
    template <class V> operator V() const { return *(V*)address; }
};

// What the lanes of a warp deposited in one call; to be read before the lane's next warp operation.
template <class V> struct Deposits {
    const Exchange* lanes;
    UNCHECKED const V& operator[](int lane) const { return *(const V*)lanes[lane].bytes; }
};

// Deposits `mine`, meets the lanes of the mask, and gives access to what each of them deposited in this call.
template <class V> UNCHECKED static Deposits<V> exchange_in_warp(unsigned mask, const V& mine, EMULATOR_HERE) {
    static_assert(sizeof(V) <= sizeof(exchange[0].bytes), "a lane can exchange 64 bytes");
    __builtin_memcpy(exchange[current].bytes, &mine, sizeof(V));
    warp_barrier(mask, place, false);
    return {received()};
}

// What lane `source` deposits: it must exist and be in the mask. Lanes are counted in groups of `width`.
template <class V> UNCHECKED static V shuffle(unsigned mask, V mine, int source, int width, Place place) {
    if (width < 1 || width > 32 || width & (width - 1))
        fail(place, "shuffles with a width that is not 1, 2, 4, 8, 16 or 32");
    Deposits<V> all = exchange_in_warp(mask, mine, place);
    if (source < 0 || source > 31 || !(mask >> source & 1) || current / 32 * 32 + source >= thread_count)
        fail(place, "reads a lane that takes no part in the shuffle");
    return all[source];
}

// The lane that a shuffle reads.
static inline int lane_at(int lane, int width) { return (current % 32 & -width) | (lane & (width - 1)); }
static inline int lane_xor(int lanes, int width) {
    int lane = current % 32, other = lane ^ lanes;
    return (other & -width) <= lane ? other : lane;
}
static inline int lane_up(int lanes, int width) {
    return current % 32 - ((current & (width - 1)) >= lanes ? lanes : 0);
}
static inline int lane_down(int lanes, int width) {
    return current % 32 + ((current & (width - 1)) + lanes < width ? lanes : 0);
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
