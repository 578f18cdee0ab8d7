// Runs the blocks of a launch, one after another. A part of runtime.cpp.
namespace emulator {

static void next_epoch() {
    for (int t = 0; t < thread_count; t++) {
        Fiber& f = fibers[t];
        if (!f.clock && !wide) continue;
        Known known = known_by(t);
        memset(f.seen + known.first, 0, known.count * sizeof *f.seen);
        f.clock = 0;
    }
    block_epoch++;
    begin_epoch_of_mbarriers();
}

static void begin_epochs() {
    if (released) {
        const int most = sizeof releases / sizeof *releases;
        bool follows = release_count && (releases[release_count - 1].last + 1 == first_epoch || release_count == most);
        if (!follows) releases[release_count++].first = first_epoch;
        releases[release_count - 1].last = block_epoch;
    }
    next_epoch();
    first_epoch = block_epoch;
    released = acquired = false;
}

static void start_block() {
    memset(dynamic.start, POISON, dynamic.bytes);
    for (unsigned i = 0; i < variable_count; i++)
        if (variables[i].shared) memset(variables[i].start, POISON, variables[i].bytes);
    memset(warps, 0, sizeof warps);
    memset(queues, 0, sizeof queues);
    begin_epochs();
    shared_since = block_epoch;
    mbarrier_count = bulk_copy_count = 0, wide = false;
    for (int t = 0; t < thread_count; t++) {
        Fiber& f = fibers[t];
        void** top = (void**)(end_of_stack(t) - t % 32 * STACK_SHIFT) - SAVED_WORDS - 4;
        memset(top, 0, SAVED_WORDS * sizeof(void*));
        top[RETURN_WORD] = (void*)fiber_main;
        f.stack_pointer = top;
        f.state = READY;
        f.at_grid = f.fenced = f.calls_atomics = f.compares = false;
        f.copy_count = f.group_count = f.call_count = 0;
        f.registers_fenced = false;
        f.touched_sums = f.flying_sums = 0;
    }
}

// Lanes that wait in __activemask() at the same place are active together. Whether there were some.
static bool release_masks() {
    bool found = false;
    for (int t = 0; t < thread_count; t++) {
        if (fibers[t].state != AT_MASK) continue;
        found = true;
        unsigned lanes = 0;
        for (int i = t; i < thread_count && i / 32 == t / 32; i++)
            if (fibers[i].state == AT_MASK && !differ(fibers[i], fibers[t], false)) lanes |= 1u << i % 32;
        for (int i = t; lanes >> i % 32 && i / 32 == t / 32; i++)
            if (lanes >> i % 32 & 1) fibers[i].state = READY, warps[t / 32].masks[i % 32] = lanes;
    }
    return found;
}

// Lanes that wait for a wgmma. Whether there were some.
static bool release_late() {
    bool found = false;
    for (int t = 0; mbarrier_count && t < thread_count; t++)
        if (fibers[t].state == LATE) fibers[t].state = READY, found = true;
    return found;
}

// A lane waits in a warp operation, and nobody can go on: where the first one is that it waits for.
static void report_missing_lane(int t) {
    const Fiber& f = fibers[t];
    const unsigned (&masks)[32] = warps[t / 32].masks;
    int missing = t / 32 * 32;  // one that waits, too, does so with another mask
    for (int i = 31; i >= 0; i--)
        if (masks[t % 32] >> i & 1 && (fibers[t / 32 * 32 + i].state != AT_WARP || masks[i] != masks[t % 32]))
            missing = t / 32 * 32 + i;
    const Fiber& other = fibers[missing];
    if (other.state == DONE)
        return report(
            "<%s>: thread %d waits in a warp operation for lanes that do not come: thread %d has returned",
            path_of(f).text, t, missing);
    report(
        "<%s>: thread %d waits in a warp operation for lanes that do not come: thread %d waits at <%s>",
        path_of(f).text, t, missing, path_of(other).text);
}

// Every fiber is DONE or waits at the block's barrier: release them; or the block ends, waits for the others or fails:
// false.
static bool release_barrier() {
    int done = 0, waiting = 0, first = -1;
    votes = 0;
    for (int t = 0; mbarrier_count && t < thread_count; t++)
        if (fibers[t].state == AT_MBARRIER) return report_missing_arrivals(t), false;
    for (int t = 0; t < thread_count; t++) {
        Fiber& f = fibers[t];
        done += f.state == DONE;
        if (f.state == AT_WARP) return report_missing_lane(t), false;
        if (f.state == AT_WARPGROUP)
            return report(
                       "thread %d waits for other threads of its warpgroup%s, which do not come", t,
                       f.warpgroups > 1 ? " and others" : ""),
                   false;
        if (f.state == AT_WGMMA)
            return report("thread %d waits for a wgmma that not all warps of its warpgroup issue", t), false;
        if (f.state != AT_BARRIER) continue;
        waiting++;
        votes += f.vote;
        if (first < 0) first = t;
        // Warpgroups of a kernel that uses wgmma or mbarriers may do different things, and meet at one barrier by
        // different calls.
        int other = (sums_count || mbarrier_count) && f.place.line == fibers[first].place.line
                        ? t / WARPGROUP * WARPGROUP
                        : first;
        if (differ(fibers[other], f, false) || f.at_grid != fibers[other].at_grid)
            return report(
                       "divergent barrier: thread %d waits at <%s>, thread %d at <%s>", other,
                       path_of(fibers[other]).text, t, path_of(f).text),
                   false;
    }
    if (done == thread_count) return report_bulk_copies(), false;
    if (done)
        return report(
                   "divergent barrier: %d of %d threads wait at <%s>, the others have returned", waiting, thread_count,
                   path_of(fibers[first]).text),
               false;
    if (fibers[first].at_grid) return false;
    for (int t = 0; t < thread_count; t++) fibers[t].state = READY;
    next_epoch();
    return true;
}

}  // namespace emulator

#include "cooperative.cpp"

namespace emulator {

static void run_block() {
    do {
        bool ran;
        do {
            ran = false;
            for (int i = 0; i < thread_count; i++) {
                if (error[0]) return;  // Ctrl-C, in between
                if (fibers[order[i]].state != READY) continue;
                set_thread(order[i]);
                do emulator_switch(&scheduler_stack_pointer, fibers[current].stack_pointer);
                while (answer());
                if (wrong_index.place) report("");
                ran = true;
            }
        } while (ran);
    } while (!error[0] && (release_masks() || release_late() || release_barrier()));
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
    released = acquired = false;
    release_count = 0;
    sums_count = 0, fault_count = 1, ticked = 0;
    if (wide) memset((void*)fibers, 0, sizeof fibers);  // what threads of the last launch have seen
    mbarrier_count = bulk_copy_count = 0, wide = false;
    racing_read_count = 0, wrong_index.place = nullptr;
    for (int t = 0; t < thread_count; t++) fibers[t].proxy_fence = 0;
    long long blocks = (long long)gridDim.x * gridDim.y * gridDim.z, waiting = 0;
    only_block = blocks == 1;
    asides = cooperative ? (Aside*)__builtin_calloc(blocks, sizeof(Aside)) : nullptr;
    do {
        long long waited = waiting;
        waiting = 0;
        grid_epoch = block_epoch + 1;
        for (long long i = 0; i < blocks && !error[0]; i++) {
            long long b = backwards ? blocks - 1 - i : i;
            blockIdx = {
                unsigned(b % gridDim.x), unsigned(b / gridDim.x % gridDim.y), unsigned(b / gridDim.x / gridDim.y)};
            if (waited) take_up(asides[b]);
            else start_block();
            run_block();
            if (error[0] || !fibers[0].at_grid) continue;
            waiting++;
            lay_aside(asides[b]);
        }
        if (waiting && waiting < blocks)
            report("%lld of %lld blocks wait at a grid barrier, the others have returned", waiting, blocks);
    } while (waiting && !error[0]);
    for (long long b = 0; asides && b < blocks; b++) __builtin_free(asides[b].bytes);
    __builtin_free(asides);
    if (error[0]) name_block(error, sizeof error);
    else check_racing_reads();
}

}  // namespace emulator
