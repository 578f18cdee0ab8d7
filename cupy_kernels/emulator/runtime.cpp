// What runs a kernel's threads, and what checks them. Compiled once; cuda.h is what kernels see of it.
//
// Blocks run one after another. Every CUDA thread of a block is a fiber that runs until it waits at a barrier or ends;
// the order in which fibers run is a permutation drawn from a seed.
//
// Kernels are compiled with -fsanitize=thread, for which the compiler calls __tsan_read4(address) and the like before
// each access to memory. These functions, in sanitizers.cpp, look the address up. Arrays are copied to places that lie
// 64 GiB apart, so that an index that is wrong by anything leads to no other array. Each 4 bytes of an array, and of
// shared memory, have a `Word`: who wrote it last, and who read it. Where threads share a word, the array gets smaller
// ones. Two accesses of two threads to the same bytes, one of them a write, must have a barrier between them. It is
// found out for one order of threads, whatever order ran.
//
// state.h has the words and what else is known; then a file a topic: accesses.cpp and locals.cpp check, sanitizers.cpp
// is what the compiler calls, threads.cpp waits, copies.cpp, wgmma.cpp and mbarriers.cpp work later, blocks.cpp runs,
// faults.cpp ends, memory.cpp says where things lie.
#define EMULATOR_RUNTIME
#include <fenv.h>
#include <pthread.h>
#include <signal.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <ucontext.h>
#include <unistd.h>
#include "cuda.h"
#include "switch.h"
#include "state.h"
#include "accesses.cpp"
#include "locals.cpp"
#include "sanitizers.cpp"
#include "threads.cpp"
#include "copies.cpp"
#include "wgmma.cpp"
#include "mbarriers.cpp"
#include "blocks.cpp"
#include "faults.cpp"
#include "memory.cpp"

namespace emulator {

const char* run(void (*body)(), const Image& image, const Launch& launch) {
    gridDim = {launch.grid[0], launch.grid[1], launch.grid[2]};
    blockDim = {launch.block[0], launch.block[1], launch.block[2]};
    thread_count = blockDim.x * blockDim.y * blockDim.z;
    thread_body = body;
    image_start = image.start, image_end = image.end + GAP;
    cooperative = launch.cooperative, only_locals = launch.only_locals, found_in_locals = false;
    same = launch.same, question.one = nullptr;
    error[0] = 0;
    stopped = nullptr;
    if (launch.count > MAX_PARAMETERS) return "more than 62 parameters";
    if (launch.variable_count > MAX_VARIABLES) return "more than 256 __shared__ and __device__ variables in its file";
    if (!reserve_all()) return "the emulator finds no address space for 1024 stacks";
    if (only_locals && !reserve_shadow()) return "the emulator finds no address space for what it knows of 1024 stacks";
    Signals signals_end_it;
    bool placed = place(0, "dynamic shared memory", 0, launch.shared_bytes, 0);
    for (unsigned i = 0; i < launch.count; i++) {
        const Parameter& p = launch.parameters[i];
        argument_words[i] = launch.words[i];
        argument_addresses[i] = &argument_words[i];
        bool is_array = p.kind != SCALAR && launch.words[i];
        placed &= place(i + 1, p.name, is_array ? launch.words[i] % 256 : 0, is_array ? p.bytes : 0, p.item);
        if (!is_array) continue;
        Array& a = arrays[i + 1];
        a.constant = p.kind == INPUT, a.initialised = p.kind < OUTPUT;
        if (p.kind == OUTPUT) memset(a.start, POISON, a.bytes);
        else memcpy(a.start, (void*)launch.words[i], a.bytes);
        argument_words[i] = (u64)a.start;
    }
    array_count = launch.count + 1;
    variable_count = launch.variable_count;
    for (unsigned i = 0; i < variable_count; i++) {
        const Variable& v = launch.variables[i];
        variables[i] = {v.name, image.start + v.address, v.bytes, 0, (bool)v.constant, !v.shared, (bool)v.shared};
    }
    dynamic.shared = true, dynamic.initialised = false;
    dynamic_shared = dynamic.start;
    arguments = argument_addresses;
    size_t count = 0;
    for (unsigned i = 0; i < array_count; i++) count += arrays[i].words_bytes(WHOLE);
    for (unsigned i = 0; i < variable_count; i++) count += variables[i].words_bytes(WHOLE);
    if (!placed || !clear_words(count)) return "the emulator finds no memory for the arrays";
    char* next = (char*)words;
    for (unsigned i = 0; i < array_count; i++) give_words(arrays[i], next);
    for (unsigned i = 0; i < variable_count; i++) give_words(variables[i], next);

    char* kept = keep_variables(nullptr);
    run_blocks(launch.seed);
    auto ended = [] { return error[0] || only_locals; };
    for (unsigned i = 1; i < array_count && !ended(); i++)
        if (arrays[i].bytes && !arrays[i].initialised) {
            if (launch.parameters[i - 1].kind == OUTPUT) check_written(arrays[i]);
            check_faults(arrays[i]);
        }
    for (unsigned i = 1; i < array_count && !ended(); i++)
        if (!arrays[i].constant && !launch.zeros) check_set(arrays[i], with_zeros[i]);
    for (unsigned i = 0; i < array_count; i++) {
        __builtin_free(with_zeros[i]), with_zeros[i] = nullptr;
        if (i && arrays[i].bytes && !arrays[i].constant && !ended()) {
            if (launch.zeros) with_zeros[i] = (char*)__builtin_malloc(arrays[i].bytes);
            memcpy(launch.zeros ? with_zeros[i] : (char*)launch.words[i - 1], arrays[i].start, arrays[i].bytes);
        }
        release(i);
    }
    for (unsigned i = 0; i < variable_count; i++) take_smaller_words(variables[i]);
    if (error[0]) keep_variables(kept);
    __builtin_free(kept);
    stale_shadow |= only_locals && error[0];
    if (only_locals && !found_in_locals && !stopped) return nullptr;  // other errors are for the run behind this one
    return error[0] ? error : nullptr;
}

}  // namespace emulator
