// Barriers and fences, shuffles, votes and reductions of a warp. A part of cuda.h.

static inline void __syncthreads(EMULATOR_HERE) { emulator::block_barrier(place, false); }
static inline int __syncthreads_count(int vote, EMULATOR_HERE) { return emulator::block_barrier(place, vote != 0); }
static inline int __syncthreads_and(int vote, EMULATOR_HERE) {
    return emulator::block_barrier(place, vote != 0) == emulator::thread_count;
}
static inline int __syncthreads_or(int vote, EMULATOR_HERE) { return emulator::block_barrier(place, vote != 0) != 0; }
static inline void __syncwarp(unsigned mask = 0xFFFFFFFFu, EMULATOR_HERE) { emulator::warp_barrier(mask, place, true); }
static inline void __threadfence() { emulator::fence(); }
static inline void __threadfence_block() { emulator::fence(); }
static inline void __threadfence_system() { emulator::fence(); }
static inline unsigned __activemask(EMULATOR_HERE) { return emulator::active_lanes(place); }

#define EMULATOR_SHUFFLES(T) \
    static inline T __shfl_sync(unsigned mask, T value, int lane, int width = 32, EMULATOR_HERE) { \
        return emulator::shuffle(mask, value, emulator::lane_at(lane, width), width, place); \
    } \
    static inline T __shfl_xor_sync(unsigned mask, T value, int lanes, int width = 32, EMULATOR_HERE) { \
        return emulator::shuffle(mask, value, emulator::lane_xor(lanes, width), width, place); \
    } \
    static inline T __shfl_up_sync(unsigned mask, T value, unsigned lanes, int width = 32, EMULATOR_HERE) { \
        return emulator::shuffle(mask, value, emulator::lane_up(lanes, width), width, place); \
    } \
    static inline T __shfl_down_sync(unsigned mask, T value, unsigned lanes, int width = 32, EMULATOR_HERE) { \
        return emulator::shuffle(mask, value, emulator::lane_down(lanes, width), width, place); \
    }
EMULATOR_SHUFFLES(int) EMULATOR_SHUFFLES(long) EMULATOR_SHUFFLES(long long) EMULATOR_SHUFFLES(float)
EMULATOR_SHUFFLES(unsigned) EMULATOR_SHUFFLES(unsigned long) EMULATOR_SHUFFLES(unsigned long long)
EMULATOR_SHUFFLES(double)

static inline unsigned __ballot_sync(unsigned mask, int vote, EMULATOR_HERE) {
    return emulator::ballot(mask, vote != 0, place);
}
static inline int __any_sync(unsigned mask, int vote, EMULATOR_HERE) {
    return emulator::ballot(mask, vote != 0, place) != 0;
}
static inline int __all_sync(unsigned mask, int vote, EMULATOR_HERE) {
    return emulator::ballot(mask, vote == 0, place) == 0;
}
static inline int __uni_sync(unsigned mask, int vote, EMULATOR_HERE) {
    return emulator::ballot(mask, vote != 0, place) == 0 || emulator::ballot(mask, vote == 0, place) == 0;
}

#define EMULATOR_MATCH(T) \
    static inline unsigned __match_any_sync(unsigned mask, T value, EMULATOR_HERE) { \
        return emulator::matches(mask, value, place); \
    } \
    static inline unsigned __match_all_sync(unsigned mask, T value, int* all, EMULATOR_HERE) { \
        *all = emulator::matches(mask, value, place) == mask; \
        return *all ? mask : 0; \
    }
EMULATOR_MATCH(int) EMULATOR_MATCH(long) EMULATOR_MATCH(long long) EMULATOR_MATCH(float) EMULATOR_MATCH(unsigned)
EMULATOR_MATCH(unsigned long) EMULATOR_MATCH(unsigned long long) EMULATOR_MATCH(double)
#define EMULATOR_REDUCE(name, T, value) \
    static inline T __reduce_##name##_sync(unsigned mask, T mine, EMULATOR_HERE) { \
        return emulator::reduce(mask, mine, place, [](T a, T b) -> T { return value; }); \
    }
EMULATOR_REDUCE(add, unsigned, a + b) EMULATOR_REDUCE(add, int, (int)((unsigned)a + (unsigned)b))
EMULATOR_REDUCE(min, unsigned, b < a ? b : a) EMULATOR_REDUCE(min, int, b < a ? b : a)
EMULATOR_REDUCE(max, unsigned, a < b ? b : a) EMULATOR_REDUCE(max, int, a < b ? b : a)
EMULATOR_REDUCE(and, unsigned, a & b) EMULATOR_REDUCE(or, unsigned, a | b) EMULATOR_REDUCE(xor, unsigned, a ^ b)
