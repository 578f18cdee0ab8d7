// Threads, and where they wait for each other: barriers of a block and of a warp. A part of runtime.cpp.
namespace emulator {

static void set_stamp() {
    self = (u64)block_epoch << EPOCH_SHIFT | (u64)fibers[current].clock << CLOCK_SHIFT | (u64)current << THREAD_SHIFT;
}

static void set_thread(int t) {
    current = t, reads_in_a_row = 0;
    threadIdx = {t % blockDim.x, t / blockDim.x % blockDim.y, t / (blockDim.x * blockDim.y)};
    stack_low = end_of_stack(t) - STACK_BYTES;
    set_stamp();
}

static void fiber_main() {
    thread_body();
    fibers[current].state = DONE;
    for (;;) yield();
}

// The current thread, which has come to an operation.
static Fiber& current_at(Place place) {
    Fiber& f = fibers[current];
    f.place = place, f.path = hash_of(f, place.at);
    return f;
}

int block_barrier(Place place, bool vote) {
    Fiber& f = current_at(place);
    f.state = AT_BARRIER, f.vote = vote;
    yield();
    return votes;
}

// Where a thread waits, and the calls that led there: bytes of the library, which stand as <byte,byte,...> in an error.
struct Path { char text[(MAX_CALLS + 1) * 9 + 1]; };
static Path path_of(const Fiber& f) {
    Path path;
    int used = snprintf(path.text, sizeof path.text, "%x,", place_of(f.place.at));
    for (unsigned i = calls_known(f); i-- > 0;)
        if (in_image(f.calls[i].caller))
            used += snprintf(path.text + used, sizeof path.text - used, "%x,", place_of(f.calls[i].caller));
    return path;
}

static bool (*same)(const char* path, const char* other);  // see Launch
static u64 known_same[1 << 14];                            // hashes of pairs
static struct {
    const Fiber *one, *other;  // one: null if there is no question
    bool same;
} question;

static bool answer() {
    if (!question.one) return false;
    question.same = same(path_of(*question.one).text, path_of(*question.other).text);
    question.one = nullptr;
    return true;
}

// Whether two threads wait at different operations. Two places of a line are one operation that the compiler has copied,
// as where it unrolls a loop, or are two in the line or by two calls of a function. Python knows from lines.py. It needs
// more stack than a thread has, so a thread lets the scheduler ask.
static bool differ(const Fiber& one, const Fiber& other, bool in_thread) {
    if (one.place.line != other.place.line) return true;
    if (one.path == other.path || only_locals) return false;
    u64 pair = one.path * HASH + other.path, &known = known_same[pair >> 50];
    if (known == pair) return false;
    question = {&one, &other};
    if (in_thread) yield();
    else answer();
    if (question.same) known = pair;
    return !question.same;
}

// The threads whose accesses may come before a thread's though no barrier of the block lies between them.
struct Known { int first, count; };
static Known known_by(int thread) {
    if (wide) return {0, thread_count};
    return {thread / WARPGROUP * WARPGROUP, WARPGROUP};
}

static void learn(unsigned short* seen, const unsigned short* more, Known known) {
    for (int i = known.first; i < known.first + known.count; i++) seen[i] = more[i] > seen[i] ? more[i] : seen[i];
}

// What thread t has done goes to `seen`; what it does from now on comes later.
static void pass_on(int t, unsigned short* seen) {
    Fiber& f = fibers[t];
    if (f.clock >= seen[t]) seen[t] = f.clock + 1;
    if (f.clock < MOST_CLOCK) f.clock++;
}

// What these threads, of the lanes in the mask, did before now comes before what each of them does from now on.
static void synchronise(int first, int end, unsigned mask) {
    Known known = known_by(first);
    static unsigned short seen[MAX_THREADS];
    memset(seen + known.first, 0, known.count * sizeof *seen);
    bool all = ~mask == 0 && known.count == end - first;  // so that nobody knows more than what these did
    for (int t = first; t < end && !all; t++)
        if (mask >> t % 32 & 1) learn(seen, fibers[t].seen, known);
    for (int t = first; t < end; t++)
        if (mask >> t % 32 & 1) pass_on(t, seen);
    for (int t = first; t < end; t++)
        if (mask >> t % 32 & 1) memcpy(fibers[t].seen + known.first, seen + known.first, known.count * sizeof *seen);
    set_stamp();
}

// What the lanes of a mask have deposited goes to a place that no other lane reads from.
static void hand_out(Warp& warp, unsigned mask) {
    unsigned used = 0;
    for (int i = 0; i < 32; i++)
        if (!(mask >> i & 1)) used |= 1u << warp.held[i];
    int free = __builtin_ctz(~used), first = current / 32 * 32;
    memcpy(exchanged[first + free], exchange + first, sizeof exchanged[0]);
    for (int i = 0; i < 32; i++)
        if (mask >> i & 1) warp.held[i] = free;
}

const Exchange* received() { return exchanged[current / 32 * 32 + warps[current / 32].held[current % 32]]; }

// Lanes whose masks differ wait apart. They wait in vain where each waits for the other.
bool warp_barrier(unsigned mask, Place place, bool synchronises) {
    Warp& warp = warps[current / 32];
    int own = current % 32;
    unsigned lanes = thread_count - current / 32 * 32, lane = 1u << current % 32;
    if (lanes < 32) mask &= (1u << lanes) - 1;
    if (!(mask & lane))
        return FAIL("<%x>: thread %d calls a warp operation whose mask leaves it out", place_of(place.at), current),
               false;
    Fiber& f = current_at(place);
    warp.waiting |= lane, warp.masks[own] = mask;
    bool complete = (warp.waiting & mask) == mask;
    for (int i = 0; complete && i < 32; i++) {
        if (!(mask >> i & 1)) continue;
        const Fiber& other = fibers[current / 32 * 32 + i];
        if (warp.masks[i] == mask && !differ(other, f, true)) continue;
        if (warp.masks[i] & lane)
            return FAIL(
                       "<%s> and <%s>: lanes of warp %d meet at different warp operations", path_of(other).text,
                       path_of(f).text, current / 32),
                   false;
        complete = false;
    }
    if (complete) {
        warp.waiting &= ~mask;
        for (int i = 0; i < 32; i++)
            if (mask >> i & 1) fibers[current / 32 * 32 + i].state = READY;
        if (synchronises) synchronise(current / 32 * 32, current / 32 * 32 + 32, mask);
        else hand_out(warp, mask);
        return true;
    }
    f.state = AT_WARP;
    yield();
    return false;
}

void warpgroup_barrier(int warpgroups) {
    int count = WARPGROUP * warpgroups, first = current / count * count, end = first + count;
    if (end > thread_count)
        return FAIL("thread %d: %d warpgroups have %d threads, the block %d", current, warpgroups, count, thread_count);
    if (warpgroups > 1) wide = true;
    fibers[current].state = AT_WARPGROUP, fibers[current].warpgroups = warpgroups;
    for (int t = first; t < end; t++)
        if (fibers[t].state != AT_WARPGROUP || fibers[t].warpgroups != warpgroups) return yield();
    for (int t = first; t < end; t++) fibers[t].state = READY;
    synchronise(first, end, 0xFFFFFFFFu);
}

bool is_shared(const void* address) {
    Array* array = find((const char*)address);
    return array && array->shared;
}
bool is_global(const void* address) {
    Array* array = find((const char*)address);
    return array ? !array->shared : in_image((const char*)address);
}

static long ticked;
long ticks() { return ticked += 100; }

void set_rounding(int mode) {
    static const int modes[] = {FE_TONEAREST, FE_TOWARDZERO, FE_UPWARD, FE_DOWNWARD};
    fesetround(modes[mode]);
}

// The lanes of the warp that come to the same place before any of them waits elsewhere.
unsigned active_lanes(Place place) {
    current_at(place).state = AT_MASK;
    yield();
    return warps[current / 32].masks[current % 32];
}

}  // namespace emulator
