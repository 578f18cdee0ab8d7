// How the rows of x come into the band of conv_wgmma.cuh, a part of which this is.
#pragma once

// Zeros left and right of the image. Rows outside of it are written as others are.
__device__ inline void clear_border(u8* shared) {
    for (int i = threadIdx.x; i < BAND_PIXELS; i += THREADS) {
        if (i >= GAP && (i - GAP) % PITCH < IN_W) continue;
        #pragma unroll
        for (int part = 0; part < PARTS_HELD; part++)
            *(uint4*)(shared + part * ALONG + i * 16) = make_uint4(0, 0, 0, 0);
    }
}

// What both kinds of bands share. Producers bring those rows of each pass that no earlier one needs, in the places of
// rows of the unit before that no later pass reads. A unit with fewer passes than others has empty ones.
struct BandBase {
    const Unit& unit;
    u8* shared;
    Barriers& barriers;
    i64 end;                                             // of the block's units
    int exponent = GUESS, round = 0, passes_before = 0;  // round: how many units, and attempts at them, are over
    int meetings = 0;

    // All threads of the block meet.
    __device__ void meet() {
        mbarrier_arrive(barriers.all);
        mbarrier_wait(barriers.all, meetings++ & 1);
    }
    __device__ bool last() const { return unit.of_all() + 1 == end; }
    __device__ Unit following() const { return Unit(unit.of_all() + 1); }
    // The last of `passes` passes that reads rows before `end_row`.
    __device__ static constexpr int last_reader(int end_row, int passes) {
        int pass = 0;
        while (pass < passes - 1 && rows_start(pass + 1) < end_row) pass++;
        return pass;
    }
    // Until those rows may be written that pass `pass` is the first to need: nobody reads any more what lies there.
    __device__ void wait_empty(int pass, int chunk) const {
        int reader = last_reader(rows_end(pass + 1, unit.passes), passes_before),
            before = chunk + (CHUNKS - 1 - chunk) / CHUNKS_HELD * CHUNKS_HELD;
        if (chunk >= CHUNKS_HELD) mbarrier_wait(barriers.done[pass][chunk - CHUNKS_HELD], round & 1);
        else if (round) mbarrier_wait(barriers.done[reader][before], (round - 1) & 1);
    }
    __device__ void end_round() {
        round++;
        passes_before = unit.passes;
    }
    __device__ void wait(int pass, int chunk) const { mbarrier_wait(barriers.ready[pass][chunk], round & 1); }
    __device__ void release(int pass, int chunk) const { mbarrier_arrive(barriers.done[pass][chunk]); }
};

template <bool> struct Band;

// x is packed, or halves in channels_last, which are operands as they are: copied asynchronously.
template <> struct Band<true> : BandBase {
    enum {
        PIXEL = AS_IT_IS ? IN_CHANNELS : LINE_BYTES / 2,  // from a pixel to the next, in halves
        CHUNK = AS_IT_IS ? CHUNK_CHANNELS : IN_H * IN_W * PIXEL,
        IMAGE = IN_H * IN_W * (AS_IT_IS ? IN_CHANNELS : CHUNKS * PIXEL),
        LEISURELY = MOST_PASSES > 3 || CHUNKS_HELD < CHUNKS  // rows are not needed soon
    };
    const half_t* x;
    const int* exponents;
    int exponent_count;

    __device__ Band(
        const half_t* x, const int* exponents, int exponent_count, const Unit& unit, i64 end, u8* shared,
        Barriers& barriers)
        : BandBase{unit, shared, barriers, end}, x(x), exponents(exponents), exponent_count(exponent_count) {}
    // Those rows of a chunk that pass `pass` is the first to need, by `threads` threads. Eight lanes take one part of
    // eight lines, which are neighbours in shared memory, where writes to eight places could take turns. Four times
    // eight lanes read half of each of these lines.
    __device__ __forceinline__ void copy(int pass, int chunk, int thread, int threads) const {
        int first_row = rows_end(pass, unit.passes), pixels = (rows_end(pass + 1, unit.passes) - first_row) * IN_W;
        const half_t* from = x + unit.image * IMAGE + chunk * CHUNK;
        for (int i = thread; i < (pixels + 7) / 8 * 64; i += threads) {
            int pixel = i / 64 * 8 + i % 8, part = i / 8 % 8, row = first_row + pixel / IN_W, column = pixel % IN_W;
            int group = chunk * GROUPS_CHUNK + part % GROUPS_CHUNK, ih = origin_of(unit) + row;
            bool exists = ih >= 0 && ih < IN_H && (!AS_IT_IS || group * 8 < IN_CHANNELS);
            if (pixel < pixels && group < GROUPS_K)
                cp_async_16(
                    shared + band_offset(row, column) + (chunk % CHUNKS_HELD * 8 + part) * ALONG,
                    from + (exists ? (ih * IN_W + column) * PIXEL + part * 8 : 0), exists);
            // Else weights would wait behind many rows.
            if (LEISURELY && threads == PRODUCERS) cp_async_commit(), cp_async_wait<2>();
        }
        cp_async_commit();
    }
    __device__ void produce(int thread) const {
        for (int pass = 0; pass < MOST_PASSES; pass++) {
            for (int chunk = 0; chunk < CHUNKS; chunk++) {
                wait_empty(pass, chunk);
                if (round + pass + chunk) copy(pass, chunk, thread, PRODUCERS);
                cp_async_wait<0>();
                fence_async_proxy();
                mbarrier_arrive(barriers.ready[pass][chunk]);
            }
        }
    }
    // The block's first rows are copied by all threads.
    template <bool> __device__ __forceinline__ void begin(unsigned* scratch) {
        if (round) return;
        copy(0, 0, threadIdx.x, THREADS);
        exponent = AS_IT_IS ? 0 : smallest_exponent(exponents, exponent_count, scratch, [&] { meet(); });
        cp_async_wait<0>();
        fence_async_proxy();
        meet();
    }
    __device__ bool fits(unsigned*) {
        end_round();
        return true;
    }
    __device__ void next() {}
};

// x is a tensor: converted under a scale that is chosen from the first rows, those of the first pass and chunk, with
// room for larger values in later ones. Where that is not enough, all starts again.
template <> struct Band<false> : BandBase {
    // The first rows at most, in octets (eight channels of a pixel) a consumer, and how many of them, and of those of a
    // producer, are in flight at a time.
    enum {
        ROOM = 3,  // of the scale's exponent, for values of later rows
        NEEDED_ROWS = 2 * ((PASS_WINDOWS - 1) / WINDOW_PITCH) + 1 + KERNEL_H,
        GROUPS = GROUPS_K < GROUPS_CHUNK ? GROUPS_K : GROUPS_CHUNK,  // of a chunk
        FIRST_OCTETS = (NEEDED_ROWS * IN_W * GROUPS + CONSUMERS - 1) / CONSUMERS,
        FIRST_ROUNDS = (FIRST_OCTETS + 9) / 10,
        FIRST_BATCH = (FIRST_OCTETS + FIRST_ROUNDS - 1) / FIRST_ROUNDS,
        BATCH = SPLIT == 1 ? 4 : 2,
        // Whether there are products left when all have read what the next unit's first rows take the place of.
        EARLY = CHUNKS > 1 || last_reader(rows_end(1, MOST_PASSES), MOST_PASSES) < MOST_PASSES - 1
    };
    const scalar_t* x;
    bool fresh = true, come = false;     // no scale is chosen; producers have brought the first rows
    unsigned largest, largest_next = 0;  // finite magnitude, of the unit's rows and of the next one's first rows
    int right = 0;                       // the scale's exponent that fits first rows that have come

    __device__ Band(const scalar_t* x, const int*, int, const Unit& unit, i64 end, u8* shared, Barriers& barriers)
        : BandBase{unit, shared, barriers, end}, x(x) {}
    // The i-th octet of `count` pixels: neighbours in memory follow one another.
    struct Octet {
        int group, pixel;
        bool exists;
        __device__ Octet(int i, int count, int chunk)
            : group(chunk * GROUPS_CHUNK + (CHANNELS_LAST ? i % GROUPS : i / count)),
              pixel(CHANNELS_LAST ? i / GROUPS : i % count), exists(i < count * GROUPS && group < GROUPS_K) {}
    };
    // Of `pixel`, counted from `source`.
    __device__ static __forceinline__ void load(
        const scalar_t* source, int group, int pixel, bool real, float (&v)[8]) {
        if constexpr (CHANNELS_LAST) {
            typedef Packed<scalar_t, 8> Channels;
            Channels in = {};
            if (real && group * 8 < IN_CHANNELS) in = *(const Channels*)(source + pixel * IN_CHANNELS + group * 8);
            #pragma unroll
            for (int j = 0; j < 8; j++) v[j] = to_acc(in.v[j]);
            return;
        }
        #pragma unroll
        for (int j = 0; j < 8; j++)
            v[j] = real && group * 8 < IN_CHANNELS ? to_acc(source[(group * 8 + j) * IN_H * IN_W + pixel]) : 0;
    }
    // Those rows of a chunk of `of` that pass `pass` is the first to need, under the scale of 2^exponent, by `threads`
    // threads. Returns the largest finite magnitude.
    template <int AT_ONCE> __device__ __forceinline__ unsigned convert(
        const Unit& of, int pass, int chunk, int thread, int threads, int exponent) const {
        unsigned largest = 0;
        int start = rows_end(pass, of.passes), count = (rows_end(pass + 1, of.passes) - start) * IN_W;
        int before = (origin_of(of) + start) * IN_W;  // pixels of the image, which may be negative
        const scalar_t* source = x + of.image * (IN_CHANNELS * IN_H * IN_W);
        for (int at = thread; at < count * GROUPS; at += threads * AT_ONCE) {
            float v[AT_ONCE][8];
            #pragma unroll
            for (int b = 0; b < AT_ONCE; b++) {
                Octet octet(at + b * threads, count, chunk);
                int pixel = before + octet.pixel;
                load(source, octet.group, pixel, octet.exists && pixel >= 0 && pixel < IN_H * IN_W, v[b]);
            }
            #pragma unroll
            for (int b = 0; b < AT_ONCE; b++) {
                Octet octet(at + b * threads, count, chunk);
                if (!octet.exists) continue;
                #pragma unroll
                for (int j = 0; j < 8; j++) {
                    largest = max(largest, finite_magnitude(v[b][j]));
                    v[b][j] = multiply_unflushed(v[b][j], power_of_two(exponent));
                }
                int part = octet.group / GROUPS_CHUNK * 8 + octet.group % GROUPS_CHUNK;
                u8* to = shared + part * ALONG + band_offset(start + octet.pixel / IN_W, octet.pixel % IN_W);
                #pragma unroll
                for (int i = 0; i < SPLIT; i++) *(uint4*)(to + i * GROUPS_CHUNK * ALONG) = take_halves(v[b], i);
            }
        }
        fence_async_proxy();
        return largest;
    }
    template <bool PRODUCES> __device__ __forceinline__ void begin(unsigned* scratch) {
        bool later = CHUNKS > 1 || unit.passes > 1;
        if (fresh) exponent = GUESS;
        largest = come ? largest_next : 0;
        for (;; come = false) {
            if (!come) {
                if (!PRODUCES) largest = convert<FIRST_BATCH>(unit, 0, 0, threadIdx.x, CONSUMERS, exponent);
                right = scale_exponent(block_max(largest, scratch, [&] { meet(); }));
            }
            bool good = agreed(!fresh || (right >= GUESS + later && right <= GUESS + SLACK));
            fresh = false;
            if (good) return;
            exponent = right - later * ROOM;
        }
    }
    __device__ void produce(int thread) {
        enum { ALL = MOST_PASSES * CHUNKS };
        bool more = EARLY && !last();
        for (int i = 1; i < ALL + more; i++) {  // one convert() for all, which is long
            bool next = i == ALL;
            int pass = next ? 0 : i / CHUNKS, chunk = next ? 0 : i % CHUNKS;
            Unit of = next ? following() : unit;
            if (next) mbarrier_wait(barriers.done[last_reader(rows_end(1, of.passes), unit.passes)][0], round & 1);
            else wait_empty(pass, chunk);
            unsigned most = convert<BATCH>(of, pass, chunk, thread, PRODUCERS, next ? (int)GUESS : exponent);
            if (next) largest_next = most;
            else largest = max(largest, most), mbarrier_arrive(barriers.ready[pass][chunk]);
        }
    }
    __device__ void wait(int pass, int chunk) const {
        if (pass + chunk) BandBase::wait(pass, chunk);
    }
    __device__ bool fits(unsigned* scratch) {
        end_round();
        unsigned both[] = {largest, largest_next};
        block_max(both, scratch, [&] { meet(); });
        int of_unit = scale_exponent(both[0]);
        right = scale_exponent(both[1]);
        bool fit = agreed(exponent <= of_unit && of_unit <= exponent + SLACK);
        come = fit && EARLY;
        if (!fit) exponent = of_unit;
        return fit;
    }
    __device__ void next() { fresh = true; }
};

typedef Band<X_PACKED || AS_IT_IS> Rows;
