// Cooperative launches: all blocks begin, and wait for each other at grid_barrier(). A part of runtime.cpp.
//
// Blocks still run one after another. One that waits is laid aside: its fibers, what lies on their stacks, its shared
// memory, and the words about that. When all blocks wait, each of them goes on from there.
namespace emulator {

struct Aside { char* bytes; };
static Aside* asides;  // of each block
static bool cooperative;

void grid_barrier(Place place) {
    if (!cooperative) return fail(place, "calls grid_barrier() in a launch that is not cooperative");
    fibers[current].at_grid = true;
    block_barrier(place, false);
}

// Calls part(address, bytes) for all that belongs to the block that runs.
template <class F> static void for_parts_of_block(F part) {
    part(&shared_since, sizeof shared_since);
    part(fibers, thread_count * sizeof(Fiber));
    part(&wide, sizeof wide);
    part(&mbarrier_count, sizeof mbarrier_count);
    part(mbarriers, mbarrier_count * sizeof *mbarriers);
    part(&bulk_copy_count, sizeof bulk_copy_count);
    part(bulk_copies, bulk_copy_count * sizeof *bulk_copies);
    for (int t = 0; t < thread_count; t++) {
        char* used = (char*)fibers[t].stack_pointer;
        part(used, end_of_stack(t) - used);
        if (only_locals) part(shadow_of(used), shadow_of(end_of_stack(t)) - shadow_of(used));
    }
    auto part_of = [&](Array& array) {
        part(array.start, array.bytes);
        part(&array.shift, sizeof array.shift);
        part(array.words[array.shift], array.words_bytes(array.shift));
    };
    part_of(dynamic);
    for (unsigned i = 0; i < variable_count; i++)
        if (variables[i].shared) part_of(variables[i]);
}

static void lay_aside(Aside& aside) {
    size_t bytes = 0;
    for_parts_of_block([&](void*, size_t part_bytes) { bytes += part_bytes; });
    char* to = aside.bytes = (char*)__builtin_realloc(aside.bytes, bytes);
    for_parts_of_block([&](void* part, size_t part_bytes) {
        memcpy(to, part, part_bytes);
        to += part_bytes;
    });
    for (int t = 0; only_locals && t < thread_count; t++) {
        unsigned char* used = shadow_of((char*)fibers[t].stack_pointer);
        memset(used, 0, shadow_of(end_of_stack(t)) - used);
    }
}

static void take_up(const Aside& aside) {
    const char* from = aside.bytes;
    for_parts_of_block([&](void* part, size_t part_bytes) {
        memcpy(part, from, part_bytes);
        from += part_bytes;
    });
    begin_epochs();
    for (int t = 0; t < thread_count; t++) fibers[t].state = READY, fibers[t].at_grid = false;
}

}  // namespace emulator
