// cp.async: what is copied appears at the wait that covers it. A part of runtime.cpp.
namespace emulator {

void copy_async(void* to, const void* from, int bytes, bool copied) {
    Fiber& f = fibers[current];
    const char* ends[] = {(const char*)to, copied ? (const char*)from : nullptr};
    for (const char* end : ends)
        if ((uintptr_t)end % bytes)
            return FAIL(
                "<%x>: thread %d: a cp.async of %d bytes is not aligned to them: %s", place_of(CALLER), current, bytes,
                place_in(end).text);
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

// What a copy brings is there, and `stamp` says by whom and when it was written.
static void arrive(char* to, const char* from, int bytes, u64 stamp) {
    Array* array = find(to);
    Word* word = array->words[array->shift] + ((to - array->start) >> array->shift);
    for (int k = 0; k < bytes >> array->shift; k++) word[k].write = stamp | TOUCHED | EVER;
    if (from) memcpy(to, from, bytes);
    else memset(to, 0, bytes);
}

void copy_wait(int pending_groups) {
    Fiber& f = fibers[current];
    int groups = f.group_count - pending_groups;
    if (groups <= 0) return;
    int done = f.group_ends[groups - 1];
    for (int i = 0; i < done; i++) {
        Copy& c = f.copies[i];
        arrive(c.to, c.from, c.bytes, self);  // others see it after the next barrier
    }
    for (int i = done; i < f.copy_count; i++) f.copies[i - done] = f.copies[i];
    for (int i = groups; i < f.group_count; i++) f.group_ends[i - groups] = f.group_ends[i] - done;
    f.copy_count -= done;
    f.group_count -= groups;
}

}  // namespace emulator
