// Checks each access of a kernel to memory, and the compiler's other checks. A part of runtime.cpp, which says how.
namespace emulator {

static unsigned thread_of(u64 stamp) { return stamp >> THREAD_SHIFT & 1023; }

// Whether the block that had this epoch has released what it did, see atomic().
static bool was_released(unsigned epoch) {
    int low = 0, high = release_count;
    while (low < high) {
        int middle = (low + high) / 2;
        if (releases[middle].last < epoch) low = middle + 1;
        else high = middle;
    }
    return low < release_count && releases[low].first <= epoch;
}

// Whether what `then` says came before what the current thread does now.
static inline bool ordered(u64 then) {
    unsigned epoch = then >> EPOCH_SHIFT, thread = thread_of(then);
    if (epoch != block_epoch) return epoch >= first_epoch || epoch < grid_epoch || (acquired && was_released(epoch));
    return thread == (unsigned)current || fibers[current].seen[thread] > (then >> CLOCK_SHIFT & MOST_CLOCK);
}

// How far from the current thread `then` was done, if nothing orders it: in its warp, its block, or another block.
static inline int distance(u64 then, unsigned oldest) {
    unsigned epoch = then >> EPOCH_SHIFT;
    if (epoch < oldest || ordered(then)) return 0;
    return epoch != block_epoch ? 3 : (thread_of(then) ^ current) / 32 ? 2 : 1;
}

struct Where { char text[160]; };

// What variables.py needs to name an element, or to tell how many elements there are (`what` is '#').
static Where unknown_element(const Array& array, const char* address, char what) {
    Where where;
    long long offset = address - array.start, place = in_image(array.start) ? array.start - image_start : 0;
    snprintf(
        where.text, sizeof where.text, "{%c%s|%lld|%lld|%zu|%zu}", what, array.name, place, offset, array.bytes,
        accessed_bytes);
    return where;
}

// An element as the source has it, such as y[7].
static Where element(const Array& array, const char* address) {
    if (!array.item) return unknown_element(array, address, '=');
    Where where;
    long long offset = address - array.start, index = offset / array.item - (offset % (int)array.item < 0);
    snprintf(where.text, sizeof where.text, "%s[%lld]", array.name, index);
    return where;
}

static Where block_of(unsigned epoch) {
    Where where;
    if (epoch >= first_epoch) return where.text[0] = 0, where;
    snprintf(where.text, sizeof where.text, " of another block");
    return where;
}

// What a race lacks where a thread has called atomicCAS, as for a lock.
static const char* advice(u64 then) {
    const Fiber& f = fibers[current];
    if (then & ATOMIC) return "";
    if (!f.compares)
        return f.calls_atomics && f.fenced && then >> EPOCH_SHIFT >= first_epoch
                   ? ": to the emulator a flag is no barrier between threads of one block"
                   : "";
    return then >> EPOCH_SHIFT < first_epoch
               ? ": a lock takes a __threadfence() after it is acquired, and one before it is released"
               : ": to the emulator a lock is no barrier between threads of one block";
}

// A plain read may race with atomic functions where a loop around atomicCAS begins: atomicCAS compares with what was
// read, and the loop turns again if that is old. Or it says whether atomicMin, atomicMax, atomicAnd or atomicOr would
// change anything. Some threads then call no atomic function. So what counts is the place of the read: whether any has
// come from it to one of these functions is known at the end of the launch.
struct RacingRead {
    unsigned place, times;
    bool compared;
    char race[512];  // the first one, if there is one
};
enum { MAX_RACING_READS = 64, MOST_TIMES = 1 << 16 };  // a thread may wait in a loop without end for what it reads
static RacingRead racing_reads[MAX_RACING_READS];
static unsigned racing_read_count;

// Null if there are too many.
static RacingRead* racing_read(unsigned place) {
    for (unsigned i = 0; i < racing_read_count; i++)
        if (racing_reads[i].place == place) return &racing_reads[i];
    if (racing_read_count == MAX_RACING_READS) return nullptr;
    RacingRead& added = racing_reads[racing_read_count++];
    added.place = place, added.times = 0, added.compared = false, added.race[0] = 0;
    return &added;
}

// An atomic function that may make use of what its thread has read: an atomicCAS that compares with it.
static void note_comparison(Array& array, const char* address, size_t bytes, const void* compared) {
    size_t offset = address - array.start;
    if (offset >= array.bytes || bytes > array.bytes - offset || memcmp(address, compared, bytes)) return;
    for (size_t at = 0; at < bytes; at += 1 << array.shift) {
        Word& word = array.word(address + at);
        if (word.read >> EPOCH_SHIFT < first_epoch || thread_of(word.read) != (unsigned)current) continue;
        if (RacingRead* found = racing_read(word.read_place)) found->compared = true, word.read = 0;
    }
}

// Ends the launch; or returns if it may be no error: plain_read is the place of a read that races with an atomic
// function, or 0.
static void race(
    const Array& array, const char* address, const char* did, const char* place, u64 then, const char* had,
    unsigned then_place, unsigned plain_read) {
    RacingRead* found = plain_read ? racing_read(plain_read) : nullptr;
    if (found && (found->compared || (found->race[0] && ++found->times < MOST_TIMES))) return;
    char text[sizeof found->race];
    snprintf(
        text, sizeof text, "<%x>: race: thread %d %s %s, which thread %d%s %s at <%x>, with no barrier between them%s",
        place_of(place), current, did, element(array, address).text, thread_of(then),
        block_of(then >> EPOCH_SHIFT).text, had, then_place, plain_read ? "" : advice(then));
    if (!found || found->race[0]) return FAIL("%s", text);
    name_block(text, sizeof text);
    memcpy(found->race, text, sizeof text);
}

static void check_racing_reads() {
    for (unsigned i = 0; i < racing_read_count; i++)
        if (!racing_reads[i].compared && racing_reads[i].race[0]) report("%s", racing_reads[i].race);
}

static void before_the_wait(
    const Array& array, const char* address, const char* did, const char* place, const Word& word) {
    for (unsigned i = 0; i < mbarrier_count; i++)
        if (size_t(address - mbarriers[i].address) < 8)
            return FAIL(
                "<%x>: thread %d %s %s, where thread %d has initialised an mbarrier at <%x>", place_of(place), current,
                did, element(array, address).text, thread_of(word.write), (unsigned)word.write_place);
    FAIL(
        "<%x>: thread %d %s %s before the wait for the %s of thread %d at <%x>", place_of(place), current, did,
        element(array, address).text, word.write & BULK ? "bulk copy" : "cp.async", thread_of(word.write),
        (unsigned)word.write_place);
}

static void unwritten(const Array& array, const char* address, const char* place) {
    FAIL(
        "<%x>: thread %d reads %s, which nobody has written%s", place_of(place), current, element(array, address).text,
        array.shared && thread_count > 1 ? " yet: is a barrier missing?" : "");
}

static void out_of_bounds(const Array& array, const char* address, const char* did, const char* place) {
    if (!array.item)
        return FAIL(
            "<%x>: thread %d %s out of bounds: %s, which has %s", place_of(place), current, did,
            element(array, address).text, unknown_element(array, address, '#').text);
    FAIL(
        "<%x>: thread %d %s out of bounds: %s, which has %zu elements", place_of(place), current, did,
        element(array, address).text, array.bytes / array.item);
}

static bool split(Array& array, int shift);
template <bool WRITE> static void touch_words_of(Array& array, size_t offset, size_t bytes, const char* place, u64 how);

template <bool WRITE, int SHIFT> static inline void touch_words(
    Array& array, size_t offset, size_t bytes, const char* place, u64 how) {
    const size_t unit = 1 << SHIFT;
    unsigned oldest = array.shared ? shared_since : 1;
    for (size_t end = offset + bytes; offset < end;) {
        size_t first = offset % unit, last = end - (offset - first) < unit ? end - (offset - first) : unit;
        u64 mask = (1 << last) - (1 << first), now = self | how | mask;
        Word& word = array.words[SHIFT][offset >> SHIFT];
        char* at = array.start + offset;
        if (!WRITE && word.read == now) {
            offset += last - first;
            continue;
        }
        auto forgets = [&](u64 then) {
            return then & TOUCHED & ~mask && (then ^ now) >> THREAD_SHIFT && then >> EPOCH_SHIFT >= oldest;
        };
        if (SHIFT && last - first < unit &&
            (forgets(word.read) || (WRITE && (forgets(word.write) || forgets(word.other))))) {
            if (split(array, (offset | end) % 2 ? 0 : 1))
                touch_words_of<WRITE>(array, offset, end - offset, place, how);
            return;
        }
        offset += last - first;
        u64 write = word.write, read = word.read, other = word.other;
        bool written = write >> EPOCH_SHIFT >= oldest;
        if (!(other & mask) || other >> EPOCH_SHIFT < oldest) other = 0;
        if (!WRITE) {
            auto races_with = [&](u64 then, unsigned then_place) {
                race(
                    array, at, "reads", place, then, "writes", then_place, then & ATOMIC && !how ? place_of(place) : 0);
                now |= FLYING;  // so that the next read comes here, too
            };
            if (written && write & mask) {
                if (write & FLYING) return before_the_wait(array, at, "reads", place, word);
                if (!ordered(write)) races_with(write, word.write_place);
            }
            if (other & WROTE && !ordered(other)) races_with(other, word.other_place);
            if (!how && !array.initialised && (mask & ~(written ? write >> EVER_SHIFT : 0) & TOUCHED))
                return unwritten(array, at, place);
            if (!((word.read ^ now) >> THREAD_SHIFT)) now |= word.read & TOUCHED;
            else if (!word.other || distance(word.read, oldest) >= distance(word.other, oldest))
                word.other = word.read, word.other_place = word.read_place;
            word.read = now;
            word.read_place = place_of(place);
        } else {
            if (written && write & mask) {
                if (write & FLYING && (!(how & FLYING) || (write | how) & BULK))
                    return before_the_wait(array, at, "writes", place, word);
                if (!(write & now & ATOMIC) && !ordered(write))
                    race(array, at, "writes", place, write, "writes", word.write_place, 0);
            }
            if (now & ATOMIC && !array.initialised && mask & ~(written ? write >> EVER_SHIFT : 0) & TOUCHED)
                return unwritten(array, at, place);
            auto races_with = [&](u64& then, const char* had, unsigned then_place) {
                bool plain_read = now & ATOMIC && !(then & (ATOMIC | WROTE));
                race(array, at, "writes", place, then, had, then_place, plain_read ? then_place : 0);
                then = 0;
            };
            if (!(read & mask && read >> EPOCH_SHIFT >= oldest)) read = 0;
            if (read && !ordered(read)) races_with(read, "reads", word.read_place);
            if (other && !(other & WROTE && now & other & ATOMIC) && !ordered(other))
                races_with(other, other & WROTE ? "writes" : "reads", word.other_place);
            if (!(now & ATOMIC)) other = 0;
            // Blocks that come later know least of a plain access, which atomic ones must not replace unseen.
            auto unknown = [&](u64 then) {
                return then && !(then & ATOMIC) && !array.shared && !only_block ? 4 : distance(then, oldest);
            };
            auto keep = [&](u64 then, unsigned then_place) {
                if (unknown(then) >= unknown(other)) other = then, word.other_place = then_place;
            };
            if (now & ATOMIC && written) keep(write | WROTE, word.write_place);
            if (now & ATOMIC && read && !(read & ATOMIC)) keep(read, word.read_place);
            if (!((write ^ now) >> THREAD_SHIFT || (write ^ now) & (ATOMIC | FLYING))) now |= write & TOUCHED;
            word.write = now | mask << EVER_SHIFT | (written ? write & EVER : 0);
            word.write_place = place_of(place);
            word.read = 0, word.other = other;
        }
    }
}

// Checks and notes an access of the current thread to the bytes of an array.
template <bool WRITE> static void touch(
    Array& array, const char* address, size_t bytes, const char* place, u64 how = 0) {
    accessed_bytes = bytes;
    size_t offset = address - array.start;
    if (offset >= array.bytes || bytes > array.bytes - offset) {
        const char* first = offset < array.bytes ? array.start + array.bytes : address;
        return out_of_bounds(array, first, WRITE ? "writes" : "reads", place);
    }
    if (only_locals) return;
    if (array.constant) {
        if (WRITE)
            FAIL("<%x>: thread %d writes %s, which is const", place_of(place), current, element(array, address).text);
        return;
    }
    touch_words_of<WRITE>(array, offset, bytes, place, how);
}

template <bool WRITE> static inline void touch_words_of(
    Array& array, size_t offset, size_t bytes, const char* place, u64 how) {
    if (array.shift == WHOLE) touch_words<WRITE, WHOLE>(array, offset, bytes, place, how);
    else if (array.shift == 1) touch_words<WRITE, 1>(array, offset, bytes, place, how);
    else touch_words<WRITE, 0>(array, offset, bytes, place, how);
}

// The variable at an address of the library, or around it; null if there is none.
static Array* variable(const char* address) {
    for (unsigned i = 0; i < variable_count; i++)
        if (size_t(address - variables[i].start) < variables[i].bytes) return &variables[i];
    for (unsigned i = 0; i < variable_count; i++)
        if (size_t(address - variables[i].start + GAP) < variables[i].bytes + 2 * GAP) return &variables[i];
    return nullptr;
}

// The array at or around an address, shared memory too; null if there is none.
static inline Array* find(const char* address) {
    size_t slot = size_t(address - arena) >> slot_bits;
    if (slot < array_count) return &arrays[slot];
    return in_image(address) ? variable(address) : nullptr;
}

// Local memory, and what a kernel only reads: its constants, and the runtime's memory.
static inline bool own(const char* address, bool written) {
    return size_t(address - stack_low) < STACK_BYTES ||
           (!written && (in_image(address) || size_t(address - __ehdr_start) < size_t(_end - __ehdr_start)));
}

template <bool WRITE> static void stray(const char* address, const char* place) {
    const char* did = WRITE ? "writes" : "reads";
    if (size_t(address) < 1 << 16)
        return FAIL("<%x>: thread %d %s through a null pointer", place_of(place), current, did);
    if (in_a_stack(address))
        return FAIL(
            "<%x>: thread %d %s local memory of another thread, or more of its own than %d KiB", place_of(place),
            current, did, int(STACK_BYTES >> 10));
    FAIL("<%x>: thread %d %s far out of bounds, at %p", place_of(place), current, did, address);
}

template <bool WRITE> static inline void access(const void* pointer, size_t bytes, const char* place) {
    const char* address = (const char*)pointer;
    if (wrong_index.place) name_wrong_index(address, bytes, WRITE ? "writes" : "reads");
    size_t slot = size_t(address - arena) >> slot_bits;
    if (slot < array_count) return touch<WRITE>(arrays[slot], address, bytes, place);
    if (size_t(address - stack_low) < STACK_BYTES) {
        if (only_locals) check_local<WRITE>(address, bytes, place);
        else if (sums_count) touch_sums(address, bytes, WRITE, place);
        return;
    }
    if (in_image(address))
        if (Array* array = variable(address)) return touch<WRITE>(*array, address, bytes, place);
    if (!own(address, WRITE)) stray<WRITE>(address, place);
}

// An address as an error names it.
static Where place_in(const char* address) {
    if (Array* array = find(address)) return element(*array, address);
    Where where;
    if (in_a_stack(address)) snprintf(where.text, sizeof where.text, "local memory");
    else snprintf(where.text, sizeof where.text, "%p", address);
    return where;
}

// For instructions that read whole rows, of which not all elements need to be there.
void read_any(const void* address, size_t bytes) {
    Array* array = find((const char*)address);
    if (array) touch<false>(*array, (const char*)address, bytes, CALLER, ATOMIC);
    else access<false>(address, bytes, CALLER);
}

void reads(const void* address, size_t bytes) {
    if (bytes) access<false>(address, bytes, CALLER);
}
void writes(void* address, size_t bytes) {
    if (bytes) access<true>(address, bytes, CALLER);
}

// For __ldg: the cache that it reads through does not see what the launch writes.
void unchanging(const void* pointer, size_t bytes, const char* place) {
    const char* address = (const char*)pointer;
    Array* array = find(address);
    if (array ? array->shared : in_a_stack(address))
        return FAIL(
            "<%x>: thread %d reads %s by __ldg, which takes global memory", place_of(place), current,
            place_in(address).text);
    if (!array || array->constant || size_t(address - array->start) >= array->bytes) return;
    for (const char* at = address; at < address + bytes && at < array->start + array->bytes; at++) {
        const Word& word = array->word(at);
        size_t byte = (at - array->start) % (size_t(1) << array->shift);
        if (word.write >> EPOCH_SHIFT && word.write >> EVER_SHIFT >> byte & 1)
            return FAIL(
                "<%x>: thread %d reads %s by __ldg, which thread %d%s writes at <%x>: __ldg is for memory that the "
                "launch does not write",
                place_of(place), current, element(*array, at).text, thread_of(word.write),
                block_of(word.write >> EPOCH_SHIFT).text, (unsigned)word.write_place);
    }
}

// The current thread may wait until another one changes what it reads.
static inline void may_wait_for(const void* address) {
    if (size_t((const char*)address - stack_low) < STACK_BYTES || ++reads_in_a_row <= 1000) return;
    reads_in_a_row = 0;
    yield();
}

// A thread that calls __threadfence() and then an atomic function tells what its block did before to threads that call
// one later, and a fence before it or behind it. Blocks run one after another, so what such blocks did came before.
void atomic(void* address, size_t bytes, const char* place, const void* compared) {
    may_wait_for(address);
    if (wrong_index.place) name_wrong_index((const char*)address, bytes, "writes");
    if (size_t(address) % bytes)
        FAIL(
            "<%x>: thread %d calls an atomic function of %zu bytes at a place that is not a multiple of them: %s",
            place_of(place), current, bytes, place_in((const char*)address).text);
    Array* array = find((const char*)address);
    if (array && compared) note_comparison(*array, (const char*)address, bytes, compared);
    if (array) touch<true>(*array, (const char*)address, bytes, place, ATOMIC);
    else access<true>(address, bytes, place);
    Fiber& f = fibers[current];
    f.calls_atomics = true;
    f.compares |= compared && compared != address;
    if (f.fenced) released = acquired = true;
}

void fence() {
    fibers[current].fenced = true;
    if (fibers[current].calls_atomics) acquired = true;
}

}  // namespace emulator
