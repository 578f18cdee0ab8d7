// Where arrays, shared memory, stacks and the words about them lie. A part of runtime.cpp.
namespace emulator {

static char* reserve(size_t bytes, int protection) {
    void* found = mmap(nullptr, bytes, protection, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    return found == MAP_FAILED ? nullptr : (char*)found;
}

static bool reserve_all() {
    if (arena) return true;
    signal_stack = reserve(SIGNAL_STACK_BYTES, PROT_READ | PROT_WRITE);
    stacks = reserve(MAX_THREADS * (STACK_BYTES + STACK_GAP), PROT_NONE);
    if (!stacks || !signal_stack) return false;
    for (int t = 0; t < MAX_THREADS; t++) mprotect(end_of_stack(t) - STACK_BYTES, STACK_BYTES, PROT_READ | PROT_WRITE);
    for (; slot_bits >= 30 && !arena; slot_bits -= 2)
        arena = reserve((size_t)(MAX_PARAMETERS + 1) << slot_bits, PROT_NONE);
    slot_bits += 2;
    return arena;
}

static Word* words;  // of all arrays
static size_t words_bytes;

// Gives an array its words, of 4 bytes, from `next` on.
static void give_words(Array& array, char*& next) {
    array.shift = WHOLE;
    array.words[WHOLE] = (Word*)next, next += array.words_bytes(WHOLE);
}

static void take_smaller_words(Array& array) {
    for (int shift = 0; shift < WHOLE; shift++)
        if (array.words[shift]) munmap(array.words[shift], array.words_bytes(shift)), array.words[shift] = nullptr;
}

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
    arrays[slot] = {name, middle + alignment, bytes, item, false, true, false};
    return bytes < (size_t)1 << (slot_bits - 1) && !mprotect(middle, alignment + bytes + 1, PROT_READ | PROT_WRITE);
}

static void release(unsigned slot) {
    Array& a = arrays[slot];
    char* first = (char*)((size_t)a.start & ~(size_t)4095);
    take_smaller_words(a);
    if (a.bytes > 1 << 16) madvise(first, a.start + a.bytes - first, MADV_DONTNEED);
    mprotect(first, a.start + a.bytes + 1 - first, PROT_NONE);
}

// Makes an array's words smaller.
static bool split(Array& array, int shift) {
    Word*& words = array.words[shift];
    if (words) madvise(words, array.words_bytes(shift), MADV_DONTNEED);  // zeros
    else words = (Word*)reserve(array.words_bytes(shift), PROT_READ | PROT_WRITE);
    if (!words) return FAIL("the emulator finds no memory for the array %s", array.name), false;
    unsigned parts = 1 << (array.shift - shift), bytes = 1 << shift;
    u64 mask = (1 << bytes) - 1;
    mask |= mask << EVER_SHIFT;
    auto part = [&](u64 stamp, unsigned i) { return (stamp & ~(TOUCHED | EVER)) | (stamp >> i * bytes & mask); };
    for (size_t i = 0; i < array.bytes >> shift; i++) {
        const Word& word = array.words[array.shift][i / parts];
        if (!(word.write | word.read | word.other)) continue;
        words[i] = word;
        words[i].write = part(word.write, i % parts), words[i].read = part(word.read, i % parts);
        words[i].other = part(word.other, i % parts);
    }
    array.shift = shift;
    return true;
}

// A copy of what a launch may change besides its arrays; or gives it back: a launch that fails changes nothing.
static char* keep_variables(const char* kept) {
    size_t bytes = 0;
    auto each = [&](auto visit) {
        for (unsigned i = 0; i < variable_count; i++)
            if (!variables[i].shared && !variables[i].constant) visit(variables[i]);
    };
    if (kept) {
        each([&](const Array& a) { memcpy(a.start, kept, a.bytes), kept += a.bytes; });
        return nullptr;
    }
    each([&](const Array& a) { bytes += a.bytes; });
    char *copy = (char*)__builtin_malloc(bytes + 1), *to = copy;
    each([&](const Array& a) { memcpy(to, a.start, a.bytes), to += a.bytes; });
    return copy;
}

static void check_written(const Array& array) {
    size_t missing = 0, first = 0, count = array.bytes / array.item;
    for (size_t i = count; i-- > 0;) {
        bool whole = true;
        for (size_t byte = i * array.item; byte < (i + 1) * array.item; byte++)
            whole &= array.word(array.start + byte).write >> (EVER_SHIFT + byte % (1 << array.shift)) & 1;
        if (!whole) missing++, first = i;
    }
    if (missing)
        report(
            "leaves %zu of %zu elements of its output %s unwritten; the first at flat index %zu", missing, count,
            array.name, first);
}

// Each array as the launch's run before has left it, in which local variables that nobody sets were 0; or null.
static char* with_zeros[MAX_PARAMETERS + 1];

// Called before the runs of a launch: Ctrl-C may have come between two runs of the launch before.
extern "C" EXPORTED void emulator_begin() {
    for (char*& kept : with_zeros) __builtin_free(kept), kept = nullptr;
}

static bool are_nans(u64 a, u64 b, unsigned bytes) {
    auto both = [&](u64 infinity) { return (a & ~(u64)0 >> 1) > infinity && (b & ~(u64)0 >> 1) > infinity; };
    a <<= 64 - 8 * bytes, b <<= 64 - 8 * bytes;
    return bytes == 8 ? both(0x7FFull << 52) : bytes == 4 ? both(0xFFull << 55) : bytes == 2 && both(0x1Full << 58);
}

// In this run local variables that nobody sets are no zeros. Whatever comes of them differs. Which NaN it is that comes
// of two, compilers may choose.
static void check_set(const Array& array, const char* other) {
    for (size_t at = 0; other && at < array.bytes; at += array.item) {
        u64 here = 0, there = 0;
        memcpy(&here, array.start + at, array.item), memcpy(&there, other + at, array.item);
        if (here == there || are_nans(here, there, array.item)) continue;
        return report(
            "<%x>: a local variable that nobody has set goes into %s",
            (unsigned)array.word(array.start + at).write_place, element(array, array.start + at).text);
    }
}

}  // namespace emulator
