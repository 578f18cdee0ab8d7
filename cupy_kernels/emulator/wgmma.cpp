// Tensor cores of sm_90a: a wgmma takes effect at the wait for it. A part of runtime.cpp.
//
// The lanes of a warp meet at each wgmma, commit and wait, and the last one does the warp's part. Until the wait nobody
// may touch the sums, which lie in local memory. A wait waits until all four warps have issued what it waits for.
//
// Rows and columns of a tile that nobody uses may hold anything, and change at any time. So what is wrong with operands
// is no error by itself. It becomes a NaN whose payload is the number of a `Fault`, and an error if an output has that
// which the kernel writes in full.
namespace emulator {

enum { MAX_MULTIPLICATIONS = 64, MAX_SUMS = 32 };

struct InFlight : Multiplication {
    const char* place;
    bool read;  // a warp of the warpgroup has waited for it, so operands may change
    unsigned char a_copy[32][16], b_copy[512][16];
    unsigned char a_faults[16], b_faults[256];  // of rows of a, columns of b: number of a fault, or 0
    float* sums[32];
    unsigned char sums_number[32];
    const unsigned* fragments[32];
    unsigned fragment_copies[32][4];
};
// Of a warp: how many it has issued and not waited for, and of these how many end with each committed group.
struct Queue { int issued, count, group_count, group_ends[MAX_MULTIPLICATIONS]; };
static InFlight in_flight[MAX_THREADS / 32][MAX_MULTIPLICATIONS];
static Queue queues[MAX_THREADS / 32];

// A warp's wgmma, counted from the start of the block.
static InFlight& multiplication(int warp, int number) { return in_flight[warp][number % MAX_MULTIPLICATIONS]; }

enum { MAX_FAULTS = 64, PAYLOAD = 0x7FDA5000 };
// What is wrong with an operand's word; `is` as in "reads <word>, which ...".
static struct Fault {
    const char *place, *is, *address;
    Array* array;
    int reader, writer;
    unsigned writer_place;
} faults[MAX_FAULTS];
static int fault_count;

// Sums of the launch's threads, as places in a thread's stack: what one thread tells of them holds for all.
static struct Sums {
    size_t offset, bytes;
    const char* place;
} known_sums[MAX_SUMS];

static size_t offset_of(const void* local) { return (const char*)local - stack_low + current % 32 * STACK_SHIFT; }

// An access to local memory, of which a part holds sums.
static void touch_sums(const char* address, size_t bytes, bool writes, const char* place) {
    size_t offset = offset_of(address);
    for (int i = 0; i < sums_count; i++) {
        Sums& s = known_sums[i];
        if (offset >= s.offset + s.bytes || offset + bytes <= s.offset) continue;
        if (fibers[current].flying_sums >> i & 1)
            return FAIL(
                "<%x>: thread %d %s sums before the wait for their wgmma at <%x>", place_of(place), current,
                writes ? "writes" : "reads", place_of(s.place));
        fibers[current].touched_sums |= 1u << i;
    }
}

static int number_of_sums(const float* sums, size_t bytes, const char* place) {
    size_t offset = offset_of(sums);
    if (offset >= STACK_BYTES + 32 * STACK_SHIFT)
        return FAIL("<%x>: thread %d: sums of a wgmma are a local array", place_of(place), current), 0;
    int i = 0;
    while (i < sums_count && known_sums[i].offset != offset) i++;
    if (i == MAX_SUMS) return FAIL("<%x>: a kernel has at most %d sums of wgmma", place_of(place), MAX_SUMS), 0;
    if (i == sums_count) known_sums[sums_count++] = {offset, 0, place};
    if (known_sums[i].bytes < bytes) known_sums[i].bytes = bytes;
    return i;
}

Multiplication* issue(float* sums, int columns, const unsigned* fragment, const void* operand, const char* place) {
    Fiber& f = fibers[current];
    Queue& queue = queues[current / 32];
    if (current / 128 * 128 + 128 > thread_count)
        return FAIL("<%x>: thread %d: wgmma takes warpgroups of 128 threads", place_of(place), current), nullptr;
    if (queue.count == MAX_MULTIPLICATIONS)
        return FAIL("<%x>: more than %d wgmma in flight", place_of(place), MAX_MULTIPLICATIONS), nullptr;
    int number = number_of_sums(sums, columns / 8 * sizeof(float[4]), place);
    if (!f.registers_fenced || f.touched_sums >> number & 1)
        return FAIL(
                   "<%x>: thread %d used the sums of this wgmma, and no wgmma_fence() came after that", place_of(place),
                   current),
               nullptr;
    InFlight& m = multiplication(current / 32, queue.issued);
    Warp& warp = warps[current / 32];
    if (warp.waiting && (m.place != place || m.operand != operand))
        return FAIL(
                   "<%x> and <%x>: lanes of warp %d issue different wgmma", place_of(m.place), place_of(place),
                   current / 32),
               nullptr;
    m.place = place, m.operand = operand;
    m.sums[current % 32] = sums;
    m.sums_number[current % 32] = number;
    m.fragments[current % 32] = fragment;
    if (fragment) memcpy(m.fragment_copies[current % 32], fragment, 16);
    f.flying_sums |= 1u << number;
    known_sums[number].place = place;
    return warp_barrier(0xFFFFFFFFu, Place::here("wgmma", 0, nullptr), false) ? &m : nullptr;
}

// Whether a write to shared memory is ordered before what tensor cores read now: the thread that wrote has called
// fence_async_proxy() since, before the barrier behind which this one is; or this one has after a later barrier.
static bool fenced(u64 write) {
    const Fiber& writer = fibers[thread_of(write)];
    if (write & BULK) return true;
    if (!mbarrier_count || write >> EPOCH_SHIFT != block_epoch)
        return write >> CLOCK_SHIFT <= writer.proxy_fence >> CLOCK_SHIFT ||
               write >> EPOCH_SHIFT < fibers[current].proxy_fence >> EPOCH_SHIFT;
    int end = &writer == &fibers[current] ? MOST_CLOCK + 1 : fibers[current].seen[thread_of(write)];
    if (writer.proxy_fence >> EPOCH_SHIFT != block_epoch) return false;
    for (int clock = write >> CLOCK_SHIFT & MOST_CLOCK; clock < end; clock++)
        if (writer.proxy_fences[clock / 64] >> clock % 64 & 1) return true;
    return false;
}

// What is wrong with an operand's word, as it is read now: null, or a text for what `write` did.
static const char* fault_of(const Word& word) {
    u64 write = word.write;
    if (!(write & TOUCHED) || write >> EPOCH_SHIFT < first_epoch) return "nobody has written";
    if (write & FLYING)
        return write & BULK ? "a bulk copy without a wait for it writes" : "a cp.async without a wait for it writes";
    if (!ordered(write)) return "is written with no barrier before that";
    return fenced(write) ? nullptr : "is written with no fence_async_proxy() after that";
}

static unsigned char number_of_fault(const char* place, const char* is, Array* array, const char* address) {
    const Word& word = array->word(address);
    for (int i = 1; i < fault_count; i++)
        if (faults[i].place == place && faults[i].is == is && faults[i].writer_place == word.write_place) return i;
    if (fault_count == MAX_FAULTS) return MAX_FAULTS - 1;
    faults[fault_count] = {place, is, address, array, current, (int)thread_of(word.write), (unsigned)word.write_place};
    return fault_count++;
}

// Notes what is wrong with an operand: at its issue, or at the wait, where it must be what it was.
static void check_operand(
    const Operand& operand, unsigned char (*copy)[16], bool waited, unsigned char* bad, const char* place,
    bool by_own_warp = false) {
    for (int i = 0; i < operand.count; i++) {
        const char* at = (const char*)operand.octets[i];
        Array* array = find(at);
        if (!array || !array->shared)
            return FAIL("<%x>: thread %d: an operand of wgmma is not in shared memory", place_of(place), current);
        if (size_t(at - array->start) + 16 > array->bytes) return out_of_bounds(*array, at, "reads", place);
        for (int byte = 0, bytes = 1 << array->shift; byte < 16; byte += bytes) {
            const char* address = at + byte;
            const char* is =
                waited ? memcmp(address, copy[i] + byte, bytes) ? "is written before the wait for that" : nullptr
                       : fault_of(array->word(address));
            if (!is) continue;
            u64 write = array->word(address).write;
            if (by_own_warp && thread_of(write) / 32 != (unsigned)current / 32) continue;
            unsigned char number = number_of_fault(place, is, array, address);
            if (operand.along_k) bad[i / 2] = number;
            else memset(bad + i / 16 * 8 + byte / 2, number, (bytes + 1) / 2);
        }
        if (!waited) memcpy(copy[i], at, 16);
    }
}

// The last lane of a warp, when it has said where the operands lie.
void issued() {
    Queue& queue = queues[current / 32];
    InFlight& m = multiplication(current / 32, queue.issued);
    queue.count++, queue.issued++;
    m.read = false;
    memset(m.a_faults, 0, sizeof m.a_faults);
    memset(m.b_faults, 0, sizeof m.b_faults);
    check_operand(m.a, m.a_copy, false, m.a_faults, m.place);
    check_operand(m.b, m.b_copy, false, m.b_faults, m.place);
    for (int t = current / 128 * 128; t < current / 128 * 128 + 128; t++)
        if (fibers[t].state == AT_WGMMA) fibers[t].state = READY;
}

void commit_multiplications() {
    if (!warp_barrier(0xFFFFFFFFu, Place::here("wgmma_commit()", 0, nullptr), false)) return;
    Queue& queue = queues[current / 32];
    if (queue.group_count == MAX_MULTIPLICATIONS)
        return FAIL("more than %d groups of wgmma in flight", MAX_MULTIPLICATIONS);
    queue.group_ends[queue.group_count++] = queue.count;
}

static void values(
    const Operand& operand, const unsigned char (*copy)[16], float (*value)(unsigned short), float (*result)[16]) {
    for (int i = 0; i < operand.count; i++)
        for (int j = 0; j < 8; j++) {
            unsigned short bits;
            memcpy(&bits, copy[i] + 2 * j, 2);
            (operand.along_k ? result[i / 2][i % 2 * 8 + j] : result[i / 16 * 8 + j][i % 16]) = value(bits);
        }
}

// At the first wait of the warpgroup's warps for it, and at its own: who has not waited may not write.
static void check_unchanged(InFlight& m, bool own) {
    if (m.read && !own) return;
    check_operand(m.a, m.a_copy, true, m.a_faults, m.place, m.read);
    check_operand(m.b, m.b_copy, true, m.b_faults, m.place, m.read);
    m.read = true;
}

static void take_effect(InFlight& m) {
    static float a[16][16], b[256][16];
    values(m.a, m.a_copy, m.value, a);
    values(m.b, m.b_copy, m.value, b);
    for (int lane = 0; lane < 32 && m.fragments[lane]; lane++) {
        if (memcmp(m.fragments[lane], m.fragment_copies[lane], 16))
            return FAIL(
                "<%x>: thread %d changes the registers of a before the wait for their wgmma", place_of(m.place),
                current / 32 * 32 + lane);
        for (int i = 0; i < 8; i++)
            a[i / 2 % 2 * 8 + lane / 4][i / 4 * 8 + lane % 4 * 2 + i % 2] =
                m.value(m.fragment_copies[lane][i / 2] >> i % 2 * 16);
    }
    for (int lane = 0; lane < 32; lane++)
        for (int i = 0; i < m.columns / 2; i++) {
            int row = lane / 4 + i % 4 / 2 * 8, column = i / 4 * 8 + lane % 4 * 2 + i % 2;
            float sum = m.accumulates ? m.sums[lane][i] : 0;
            for (int k = 0; k < 16; k++) sum += a[row][k] * b[column][k];
            unsigned bits = PAYLOAD | (m.a_faults[row] ? m.a_faults[row] : m.b_faults[column]);
            memcpy(&m.sums[lane][i], bits == PAYLOAD ? (void*)&sum : (void*)&bits, sizeof sum);
        }
}

static bool all_issued(int number) {
    for (int warp = current / 128 * 4; warp < current / 128 * 4 + 4; warp++)
        if (queues[warp].issued < number) return false;
    return true;
}

void wait_for_multiplications(int pending_groups) {
    Queue& queue = queues[current / 32];
    int groups = queue.group_count - pending_groups, done = groups > 0 ? queue.group_ends[groups - 1] : 0;
    int first = queue.issued - queue.count, end = first + done;
    while (!all_issued(end)) fibers[current].state = AT_WGMMA, yield();
    // As late as it can be: who fills a stage again that was released too early does so before.
    if (done && mbarrier_count) fibers[current].state = LATE, yield();
    if (!warp_barrier(0xFFFFFFFFu, Place::here("wgmma_wait()", 0, nullptr), false) || !done) return;
    for (int warp = current / 128 * 4; warp < current / 128 * 4 + 4; warp++)
        for (int number = queues[warp].issued - queues[warp].count; number < end; number++)
            check_unchanged(multiplication(warp, number), warp == current / 32);
    for (int number = first; number < end; number++) take_effect(multiplication(current / 32, number));
    for (int i = groups; i < queue.group_count; i++) queue.group_ends[i - groups] = queue.group_ends[i] - done;
    queue.count -= done;
    queue.group_count -= groups;
    for (int lane = 0; lane < 32; lane++) {
        unsigned& flying = fibers[current / 32 * 32 + lane].flying_sums;
        flying = 0;
        for (int number = end; number < queue.issued; number++)
            flying |= 1u << multiplication(current / 32, number).sums_number[lane];
    }
}

// An output that comes of a faulty operand.
static void check_faults(const Array& array) {
    for (size_t i = 0; fault_count > 1 && array.item == 4 && i < array.bytes / 4; i++) {
        unsigned bits, number;
        memcpy(&bits, array.start + 4 * i, 4);
        number = (bits & 0x7FFFFFFF) - PAYLOAD;
        if (number == 0 || number >= (unsigned)fault_count) continue;
        const Fault& f = faults[number];
        accessed_bytes = 2;  // operands are halves
        return report(
            "<%x>: wgmma of thread %d reads %s, which %s (by thread %d at <%x>); %s[%zu] comes of it",
            place_of(f.place), f.reader, element(*f.array, f.address).text, f.is, f.writer, f.writer_place, array.name,
            i);
    }
}

void fence_registers() { fibers[current].registers_fenced = true, fibers[current].touched_sums = 0; }

void fence_proxy() {
    Fiber& f = fibers[current];
    if (f.proxy_fence >> EPOCH_SHIFT != block_epoch) memset(f.proxy_fences, 0, sizeof f.proxy_fences);
    f.proxy_fence = self;
    f.proxy_fences[f.clock / 64] |= 1ull << f.clock % 64;
    if (f.clock < MOST_CLOCK) f.clock++;  // what it writes from now on comes later
    set_stamp();
}

}  // namespace emulator
