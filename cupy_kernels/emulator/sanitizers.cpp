// What compiled kernels call, by -fsanitize: before each access to memory, and where a value is wrong. A part of
// runtime.cpp.

#define ACCESS(kind, WRITE, bytes) \
    extern "C" EXPORTED void __tsan_##kind##bytes(void* address) { emulator::access<WRITE>(address, bytes, CALLER); }
#define ACCESSES(bytes) \
    ACCESS(read, false, bytes) \
    ACCESS(write, true, bytes) ACCESS(unaligned_read, false, bytes) ACCESS(unaligned_write, true, bytes)
ACCESSES(1)
ACCESSES(2)
ACCESSES(4)
ACCESSES(8)
ACCESSES(16)
#define VOLATILE(kind, WRITE, bytes) \
    extern "C" EXPORTED void __tsan_##kind##bytes(void* address) { \
        emulator::may_wait_for(address); \
        emulator::access<WRITE>(address, bytes, CALLER); \
    }
#define VOLATILES(bytes) \
    VOLATILE(volatile_read, false, bytes) \
    VOLATILE(volatile_write, true, bytes) \
    VOLATILE(unaligned_volatile_read, false, bytes) VOLATILE(unaligned_volatile_write, true, bytes)
VOLATILES(1)
VOLATILES(2)
VOLATILES(4)
VOLATILES(8)
VOLATILES(16)
extern "C" EXPORTED void __tsan_read_range(void* address, size_t bytes) {
    emulator::access<false>(address, bytes, CALLER);
}
extern "C" EXPORTED void __tsan_write_range(void* address, size_t bytes) {
    emulator::access<true>(address, bytes, CALLER);
}
extern "C" EXPORTED void* __tsan_memcpy(void* to, const void* from, size_t bytes) {
    emulator::access<false>(from, bytes, CALLER);
    emulator::access<true>(to, bytes, CALLER);
    return memcpy(to, from, bytes);
}
extern "C" EXPORTED void* __tsan_memmove(void* to, const void* from, size_t bytes) {
    emulator::access<false>(from, bytes, CALLER);
    emulator::access<true>(to, bytes, CALLER);
    return memmove(to, from, bytes);
}
extern "C" EXPORTED void* __tsan_memset(void* to, int value, size_t bytes) {
    emulator::access<true>(to, bytes, CALLER);
    return memset(to, value, bytes);
}
// g++'s, of an object's pointer to its virtual functions, which its constructor sets.
extern "C" EXPORTED void __tsan_vptr_update(void* address, void*) {
    emulator::access<true>(address, sizeof(void*), CALLER);
}
extern "C" EXPORTED void __tsan_vptr_read(void* address) { emulator::access<false>(address, sizeof(void*), CALLER); }
extern "C" EXPORTED void __tsan_init() {}
extern "C" EXPORTED void __tsan_func_entry(void* caller) {
    emulator::Fiber& f = emulator::fibers[emulator::current];
    if (f.call_count < emulator::MAX_CALLS) f.calls[f.call_count] = {(char*)caller, emulator::hash_of(f, caller)};
    f.call_count++;
}
extern "C" EXPORTED void __tsan_func_exit() { emulator::fibers[emulator::current].call_count--; }

// The compiler's other checks. What they get begins with the line; CALLER says more, see lines.py.
struct SourceLocation {
    const char* file;
    unsigned line, column;
};
struct Type {
    unsigned short kind, info;
    char name[1];

    // An integer of this type, as it is passed.
    long long value(size_t passed) const {
        if (info >> 1 > 5) return (long long)passed;
        return info & 1 ? (long long)(int)passed : (long long)(unsigned)passed;
    }
};
struct Mismatch {
    SourceLocation at;
    Type* type;
    unsigned char log_alignment, kind;
};
struct Overflow {
    SourceLocation at;
    Type* type;
};
struct Pair {
    SourceLocation at;
    Type *first, *second;
};
#define WRONG(format, ...) \
    FAIL("<%x>: thread %d" format, emulator::place_of(CALLER), emulator::current __VA_OPT__(, ) __VA_ARGS__)

extern "C" EXPORTED void __ubsan_handle_type_mismatch_v1(Mismatch* what, void* address) {
    size_t alignment = size_t(1) << what->log_alignment;
    if ((size_t)address % alignment == 0) {  // an object that is too small
        const char* does = what->kind == 1 ? "writes" : "reads";
        if (emulator::wrong_index.place) emulator::name_wrong_index((char*)address, alignment, does);
        if (emulator::Array* array = emulator::find((char*)address))
            return emulator::out_of_bounds(*array, (char*)address, does, CALLER);
        WRONG(" %s out of bounds of a local array", does);
        return;
    }
    if (alignment > 16) alignment = 16;  // no access of a GPU has more bytes
    if ((size_t)address % alignment == 0) return;
    WRONG(
        " accesses %zu aligned bytes, %s, at a place that is not a multiple of %zu bytes: %s", alignment,
        what->type->name, alignment, emulator::place_in((char*)address).text);
}
extern "C" EXPORTED void __ubsan_handle_out_of_bounds(Pair* what, size_t index) {
    if (!emulator::wrong_index.place) emulator::wrong_index = {CALLER, what->first->name, what->second->value(index)};
}
#define WAY_OUT "; i64 holds more, unsigned wraps around"
#define OVERFLOW(which, sign) \
    extern "C" EXPORTED void __ubsan_handle_##which##_overflow(Overflow* what, size_t a, size_t b) { \
        WRONG( \
            ": %lld " sign " %lld overflows %s" WAY_OUT, what->type->value(a), what->type->value(b), \
            what->type->name); \
    }
OVERFLOW(add, "+")
OVERFLOW(sub, "-")
OVERFLOW(mul, "*")
extern "C" EXPORTED void __ubsan_handle_negate_overflow(Overflow* what, size_t) {
    WRONG(": a negation overflows %s" WAY_OUT, what->type->name);
}
extern "C" EXPORTED void __ubsan_handle_divrem_overflow(Overflow* what, size_t a, size_t b) {
    if (!what->type->value(b)) WRONG(" divides an integer by zero");
    else WRONG(": %lld / %lld overflows %s", what->type->value(a), what->type->value(b), what->type->name);
}
extern "C" EXPORTED void __ubsan_handle_shift_out_of_bounds(Pair* what, size_t, size_t by) {
    WRONG(": a shift of %s by %lld", what->first->name, what->second->value(by));
}
// A GPU saturates; this processor does not.
extern "C" EXPORTED void __ubsan_handle_float_cast_overflow(Pair* what, size_t bits) {
    float narrow;
    double wide;
    memcpy(&narrow, &bits, sizeof narrow), memcpy(&wide, &bits, sizeof wide);
    WRONG(
        ": %g overflows %s; __float2int_rz and the like saturate", what->first->info == 32 ? narrow : wide,
        what->second->name);
}
extern "C" EXPORTED void __ubsan_handle_missing_return(SourceLocation*) {
    WRONG(" comes to the end of a function that returns a value, and returns none");
}
extern "C" EXPORTED void __ubsan_handle_builtin_unreachable(SourceLocation*) {
    WRONG(" comes to __builtin_unreachable()");
}
