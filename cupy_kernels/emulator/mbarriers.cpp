// Barriers in shared memory, and bulk copies that arrive at them, of sm_90. A part of runtime.cpp.
//
// A side table has their state. Their 8 bytes count as written by a copy in flight, so that any other access to them is
// an error.
namespace emulator {

static MBarrier* mbarrier_at(const void* address, const char* did, const char* place) {
    accessed_bytes = 8;
    for (unsigned i = 0; i < mbarrier_count; i++) {
        MBarrier& b = mbarriers[i];
        if (b.address != address) continue;
        if (ordered(b.initialised)) return &b;
        FAIL(
            "<%x>: race: thread %d %s the mbarrier %s, which thread %d initialises at <%x>, with no barrier between "
            "them",
            place_of(place), current, did, place_in(b.address).text, thread_of(b.initialised), b.initialised_place);
    }
    FAIL(
        "<%x>: thread %d %s %s, which is no mbarrier: nobody has called mbarrier_init() for it", place_of(place),
        current, did, place_in((const char*)address).text);
    return nullptr;
}

void mbarrier_init(void* address, int arrivals) {
    accessed_bytes = 8;
    Array* array = find((char*)address);
    if (!array || !array->shared || (uintptr_t)address % 8)
        return FAIL(
            "<%x>: thread %d: an mbarrier is 8 bytes of shared memory, at a multiple of 8: %s", place_of(CALLER),
            current, place_in((char*)address).text);
    if (arrivals < 1 || arrivals >= 1 << 20)
        return FAIL(
            "<%x>: thread %d: an mbarrier takes from 1 to %d arrivals, not %d", place_of(CALLER), current,
            (1 << 20) - 1, arrivals);
    if (mbarrier_count == MAX_MBARRIERS)
        return FAIL("<%x>: a block has at most %d mbarriers", place_of(CALLER), MAX_MBARRIERS);
    touch<true>(*array, (char*)address, 8, CALLER, FLYING | BULK);
    MBarrier& b = mbarriers[mbarrier_count++];
    wide = true;
    memset(&b, 0, sizeof b);
    b.address = (char*)address, b.initialised = self, b.initialised_place = place_of(CALLER);
    b.arrivals = b.missing = arrivals;
}

static void end_phase_if_complete(MBarrier& b) {
    if (b.missing || b.uncopied) return;
    b.phase++, b.missing = b.arrivals, b.bytes = 0;
    memcpy(b.ended, b.arriving, sizeof b.ended);
    for (int t = 0; t < thread_count; t++)
        if (fibers[t].state == AT_MBARRIER && fibers[t].mbarrier == &b - mbarriers) fibers[t].state = READY;
}

void mbarrier_arrive(void* address, int bytes) {
    MBarrier* b = mbarrier_at(address, "arrives at", CALLER);
    if (!b) return;
    if (bytes < 0 || bytes >= (1 << 20) - b->bytes)
        return FAIL(
            "<%x>: thread %d announces %d bytes at the mbarrier %s, and %d are already: a phase takes from 0 to %d",
            place_of(CALLER), current, bytes, place_in(b->address).text, b->bytes, (1 << 20) - 1);
    if (!b->missing)
        return FAIL(
            "<%x>: thread %d arrives at the mbarrier %s, in whose phase %u all %d have arrived: %d of its %d bytes are "
            "missing",
            place_of(CALLER), current, place_in(b->address).text, b->phase, b->arrivals, b->uncopied, b->bytes);
    learn(b->arriving, fibers[current].seen, known_by(current));
    pass_on(current, b->arriving);
    set_stamp();
    b->missing--, b->bytes += bytes, b->uncopied += bytes;
    end_phase_if_complete(*b);
}

void bulk_copy(void* to, const void* from, int bytes, void* address) {
    MBarrier* b = mbarrier_at(address, "copies to", CALLER);
    if (!b) return;
    if (!fenced(b->initialised))
        return FAIL(
            "<%x>: thread %d: a bulk copy arrives at the mbarrier %s, which thread %d initialises at <%x> with no "
            "fence_async_proxy() after that",
            place_of(CALLER), current, place_in(b->address).text, thread_of(b->initialised), b->initialised_place);
    const char* ends[] = {(const char*)to, (const char*)from};
    for (const char* end : ends)
        if (bytes <= 0 || bytes % 16 || (uintptr_t)end % 16)
            return FAIL(
                "<%x>: thread %d: a bulk copy is of a multiple of 16 bytes, between multiples of 16: of %d bytes, %s",
                place_of(CALLER), current, bytes, place_in(end).text);
    if (bytes > b->uncopied)
        return FAIL(
            "<%x>: thread %d: a bulk copy of %d bytes, and %d of the %d that mbarrier_arrive() has announced at %s in "
            "phase %u are still to come",
            place_of(CALLER), current, bytes, b->uncopied, b->bytes, place_in(b->address).text, b->phase);
    if (bulk_copy_count == MAX_BULK_COPIES)
        return FAIL("<%x>: more than %d bulk copies in flight", place_of(CALLER), MAX_BULK_COPIES);
    Array *target = find((char*)to), *source = find((const char*)from);
    if (!target || !target->shared || !source || source->shared)
        return FAIL(
            "<%x>: thread %d: a bulk copy reads global and writes shared memory alone", place_of(CALLER), current);
    access<false>(from, bytes, CALLER);
    touch<true>(*target, (char*)to, bytes, CALLER, FLYING | BULK);
    memset(to, POISON, bytes);
    bulk_copies[bulk_copy_count++] = {
        (char*)to, (const char*)from, bytes, place_of(CALLER), unsigned(b - mbarriers), b->phase, self};
    // Those that wait for the phase know the copy, and what this thread did before it, if not what others did.
    Fiber& f = fibers[current];
    b->arriving[current] = f.clock + 1;
    if (f.clock < MOST_CLOCK) f.clock++;
    set_stamp();
    b->uncopied -= bytes;
    end_phase_if_complete(*b);
}

void mbarrier_wait(void* address, int parity) {
    MBarrier* b = mbarrier_at(address, "waits at", CALLER);
    if (!b) return;
    if (parity != 0 && parity != 1)
        return FAIL(
            "<%x>: thread %d waits at the mbarrier %s for parity %d: it is 0 or 1", place_of(CALLER), current,
            place_in(b->address).text, parity);
    Fiber& f = current_at({0, CALLER});
    if (b->phase % 2 == (unsigned)parity) {
        f.state = AT_MBARRIER, f.mbarrier = b - mbarriers, f.phase = b->phase;
        yield();
        if (b->phase != f.phase + 1)
            return FAIL(
                "<%s>: thread %d waits for phase %u of the mbarrier %s, and others have already ended phase %u",
                path_of(f).text, current, f.phase, place_in(b->address).text, f.phase + 1);
    }
    unsigned kept = 0;
    for (unsigned i = 0; i < bulk_copy_count; i++) {
        BulkCopy& c = bulk_copies[i];
        if (c.mbarrier == b - mbarriers && c.phase != b->phase) arrive(c.to, c.from, c.bytes, c.stamp | BULK);
        else bulk_copies[kept++] = c;
    }
    bulk_copy_count = kept;
    learn(f.seen, b->ended, known_by(current));
}

// A barrier of the block. Copies in flight count as issued behind it, so that who does not wait for them does not know
// them.
static void begin_epoch_of_mbarriers() {
    for (unsigned i = 0; i < mbarrier_count; i++) {
        memset(mbarriers[i].arriving, 0, sizeof mbarriers[i].arriving);
        memset(mbarriers[i].ended, 0, sizeof mbarriers[i].ended);
    }
    for (unsigned i = 0; i < bulk_copy_count; i++) {
        BulkCopy& c = bulk_copies[i];
        MBarrier& b = mbarriers[c.mbarrier];
        int t = thread_of(c.stamp);
        c.stamp = (u64)block_epoch << EPOCH_SHIFT | (u64)t << THREAD_SHIFT;
        b.arriving[t] = b.ended[t] = fibers[t].clock = 1;
    }
}

// A thread waits at an mbarrier, and nobody can go on.
static void report_missing_arrivals(int t) {
    const Fiber& f = fibers[t];
    const MBarrier& b = mbarriers[f.mbarrier];
    accessed_bytes = 8;
    report(
        "<%s>: thread %d waits for phase %u of the mbarrier %s, which does not end: %d of %d arrivals and %d of %d "
        "bytes are missing",
        path_of(f).text, t, f.phase, place_in(b.address).text, b.missing, b.arrivals, b.uncopied, b.bytes);
}

// The block ends.
static void report_bulk_copies() {
    if (bulk_copy_count)
        report(
            "<%x>: the block ends before anybody waits for the bulk copy of thread %d", bulk_copies[0].place,
            thread_of(bulk_copies[0].stamp));
}

}  // namespace emulator
