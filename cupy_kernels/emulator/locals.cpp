// Local variables and what lies around them, in a run of its own: Launch::only_locals. A part of runtime.cpp.
//
// A second library of an edited kernel is compiled with -fsanitize=kernel-address: its functions leave gaps around
// local variables, and write down in `shadow` which bytes are gaps. It says less of other memory than
// -fsanitize=thread, with which no compiler combines it. So other errors are left to the first library.
namespace emulator {

// The compiler knows the offset: see __init__.py. A byte is about 8 bytes of a stack: 0, all of them are a variable's
// or nobody's; 1 to 7, so many are, and a gap follows; OUT_OF_SCOPE; more, all are of a gap.
enum { LEFT_GAP = 0xF1, OUT_OF_SCOPE = 0xF8 };
static const size_t SHADOW_OFFSET = 3ull << 35;
static bool stale_shadow;  // of threads that have not ended
static unsigned char* shadow_of(const char* address) {
    return (unsigned char*)(((size_t)address >> 3) + SHADOW_OFFSET);
}

static bool reserve_shadow() {
    static bool reserved;
    char* wanted = (char*)((size_t)shadow_of(stacks) & ~size_t(4095));
    size_t bytes = (MAX_THREADS * (STACK_BYTES + STACK_GAP) >> 3) + 8192;
    // An older kernel takes the address as a wish.
    enum { NO_REPLACE = 0x100000 };
    int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | NO_REPLACE;
    if (!reserved) reserved = mmap(wanted, bytes, PROT_READ | PROT_WRITE, flags, -1, 0) == wanted;
    if (reserved && stale_shadow) madvise(wanted, bytes, MADV_DONTNEED);  // zeros
    stale_shadow = false;
    return reserved;
}

// The local variable next to an address, as the function that has it has written at the start of its gaps: a number,
// the address of "count, then of each: offset, bytes, length of the name, name:line".
static Array local_variable(const char* address, char (&name)[64]) {
    Array nearest = {"a local variable", (char*)address, 0, 0, false, true, false};
    const char* start = (char*)((size_t)address & ~size_t(7));
    while (start > stack_low && *shadow_of(start) != LEFT_GAP) start -= 8;
    while (start > stack_low && *shadow_of(start - 8) == LEFT_GAP) start -= 8;
    if (*(u64*)start != 0x41B58AB3) return nearest;
    const char* next = strchr(*(char**)(start + 8), ' ');
    size_t least = ~size_t(0), offset, bytes, length;
    int used;
    while (next && sscanf(next, " %zu %zu %zu %n", &offset, &bytes, &length, &used) == 3) {
        const char *first = start + offset, *said = next + used;
        next = said + length;
        size_t away = address < first ? first - address : address - first < bytes ? 0 : address - first - bytes;
        if (away >= least) continue;
        least = away;
        nearest.start = (char*)first, nearest.bytes = bytes, nearest.name = name;
        snprintf(name, sizeof name, "%.*s", int(length), said);
    }
    return nearest;
}

template <bool WRITE> static void check_local(const char* address, size_t bytes, const char* place) {
    for (const char *at = address, *end = address + bytes; at < end; at = (char*)((size_t)at | 7) + 1) {
        size_t usable = *shadow_of(at), last = (size_t)at | 7;
        if (last >= (size_t)end) last = (size_t)end - 1;
        if (!usable || (usable < 8 && last % 8 < usable)) continue;
        char name[64];
        Array array = local_variable(at, name);
        accessed_bytes = bytes;
        if (usable < 8) at = (char*)((size_t)at & ~size_t(7)) + (usable > (size_t)at % 8 ? usable : (size_t)at % 8);
        found_in_locals = true;
        if (usable == OUT_OF_SCOPE)
            return FAIL(
                "<%x>: thread %d %s %s outside of the block of code that has it", place_of(place), current,
                WRITE ? "writes" : "reads", element(array, at).text);
        return out_of_bounds(array, at, WRITE ? "writes" : "reads", place);
    }
}

// The access behind a wrong index says which array it may be of, an argument of the kernel being none; variables.py
// finds out whether it is.
static void name_wrong_index(const char* address, size_t bytes, const char* did) {
    accessed_bytes = bytes;
    char name[64];
    Array local, *array = find(address);
    if (only_locals && size_t(address - stack_low) < STACK_BYTES) local = local_variable(address, name), array = &local;
    if (array && array->item) return;
    if (!array) return FAIL("");
    auto [place, type, index] = wrong_index;
    wrong_index.place = nullptr;
    found_in_locals = true;
    FAIL(
        "<%x>: thread %d{@%s %lld %s%s}", place_of(place), current, did, index, type,
        unknown_element(*array, address, '=').text);
}

}  // namespace emulator

extern "C" EXPORTED int emulator_printed_already(const char*, ...) { return 0; }  // by the kernel's other run

// What the compiler calls.
extern "C" EXPORTED void __asan_handle_no_return() {}
// A large variable's block of code begins or ends.
extern "C" EXPORTED void __asan_unpoison_stack_memory(const char* start, size_t bytes) {
    memset(emulator::shadow_of(start), 0, bytes / 8);
    if (bytes % 8) *emulator::shadow_of(start + bytes) = bytes % 8;
}
extern "C" EXPORTED void __asan_poison_stack_memory(const char* start, size_t bytes) {
    memset(emulator::shadow_of(start), emulator::OUT_OF_SCOPE, (bytes + 7) / 8);
}
#define SET_SHADOW(value) \
    extern "C" EXPORTED void __asan_set_shadow_##value(void* at, size_t bytes) { memset(at, 0x##value, bytes); }
SET_SHADOW(00)
SET_SHADOW(f1)
SET_SHADOW(f2)
SET_SHADOW(f3)
SET_SHADOW(f5)
SET_SHADOW(f8)
#define LOCAL_ACCESS(kind, WRITE, bytes) \
    extern "C" EXPORTED void __asan_##kind##bytes##_noabort(void* address) { \
        emulator::access<WRITE>(address, bytes, CALLER); \
    }
#define LOCAL_ACCESSES(bytes) LOCAL_ACCESS(load, false, bytes) LOCAL_ACCESS(store, true, bytes)
LOCAL_ACCESSES(1)
LOCAL_ACCESSES(2)
LOCAL_ACCESSES(4)
LOCAL_ACCESSES(8)
LOCAL_ACCESSES(16)
extern "C" EXPORTED void __asan_loadN_noabort(void* address, size_t bytes) {
    emulator::access<false>(address, bytes, CALLER);
}
extern "C" EXPORTED void __asan_storeN_noabort(void* address, size_t bytes) {
    emulator::access<true>(address, bytes, CALLER);
}
