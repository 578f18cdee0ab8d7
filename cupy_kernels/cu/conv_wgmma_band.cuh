// How the rows of x come into the band of conv_wgmma.cuh, a part of which this is.
#pragma once

// Zeros where no pixel is.
__device__ inline void clear_border(u8* shared, const Unit& unit) {
    for (int i = threadIdx.x; i < BAND_PIXELS; i += THREADS) {
        int row = (i - GAP + PITCH) / PITCH - 1, column = (i - GAP + PITCH) % PITCH, parity = row >= rows_of(0);
        int ih = 2 * (row - parity * rows_of(0) + first_of(parity)) + origin_of(unit) + parity;
        if (row >= 0 && column < IN_W && ih >= 0 && ih < IN_H) continue;
        #pragma unroll
        for (int group = 0; group < GROUPS_K * SPLIT; group++)
            *(uint4*)(shared + group * ALONG + i * 16) = make_uint4(0, 0, 0, 0);
    }
}

enum { PASSES = passes_of(WINDOWS_H * WINDOW_PITCH - (WINDOW_PITCH - WINDOWS_W)) };  // of a whole image

// The rows of the first pass come by begin(), those of each next pass by advance() between follow() and the end of the
// pass before it. next_chunk(pass, at): called at the first step of 64 channels, with that step's weights.
template <bool> struct Band;

// x is packed, or halves in channels_last, which are operands as they are: copied asynchronously. All of it at first,
// or, if 64 channels' multiplications are long enough for it, the rows of the first pass, and the others behind its
// products. With PERSISTENT the next image's rows take the places of those that no later pass reads.
template <> struct Band<true> {
    enum {
        AHEAD = 2 * TAPS >= STAGES,
        PIXEL = AS_IT_IS ? IN_CHANNELS : LINE_BYTES / 2,  // from a pixel to the next, in halves
        CHUNK = AS_IT_IS ? CHUNK_CHANNELS : IN_H * IN_W * PIXEL,
        IMAGE = IN_H * IN_W * (AS_IT_IS ? IN_CHANNELS : CHUNKS * PIXEL)
    };
    const half_t* x;
    const Unit& unit;
    u8* shared;
    const int* exponents;
    int exponent_count, exponent = 0;
    i64 images;
    int copied_end = 0;  // where the rows end that the first pass finds
    // Rows that are copied an octet (eight channels of a pixel) at a time, with PERSISTENT.
    const half_t* from;
    int first_row, pixels = 0, octet = 0;

    __device__ Band(const half_t* x, const int* exponents, int exponent_count, const Unit& unit, i64 units, u8* shared)
        : x(x), unit(unit), shared(shared), exponents(exponents), exponent_count(exponent_count),
          images(units / UNITS) {
        clear_border(shared, unit);
        copied_end = AHEAD && unit.passes > 1 ? rows_end(PERSISTENT ? 2 : 1) : unit.end_row;
        for (int chunk = 0; chunk < (AHEAD ? min(CHUNKS, SPLIT) : CHUNKS); chunk++)
            copy(chunk, unit.first_row, copied_end);
        cp_async_commit();
    }
    // Where the rows end that the first `passes` passes need, and where those begin that passes from `pass` on need.
    __device__ int rows_end(int passes) const {
        return max(unit.first_row, min(unit.end_row, end_row_of(unit.first_window + passes * PASS_WINDOWS - 1)));
    }
    __device__ int rows_start(int pass) const { return max(0, first_row_of(unit.first_window + pass * PASS_WINDOWS)); }
    __device__ const half_t* source(i64 image, int row) const { return x + image * IMAGE + row * IN_W * PIXEL; }
    __device__ void copy(int chunk, int first_row, int end_row) const {
        int pixels = (end_row - first_row) * IN_W;
        for (int i = threadIdx.x; i < (pixels + 7) / 8 * 64; i += THREADS)
            copy_octet(source(unit.image, first_row) + chunk * CHUNK, chunk, first_row, pixels, i);
    }
    // Eight lanes take one part of eight lines, which are neighbours in shared memory, where writes to eight places
    // could take turns. Four times eight lanes read half of each of these lines.
    __device__ void copy_octet(const half_t* from, int chunk, int first_row, int pixels, int i) const {
        enum { GROUPS = CHUNK_CHANNELS / 8 };
        int pixel = i / 64 * 8 + i % 8, part = i / 8 % 8;
        int group = chunk * GROUPS + part % GROUPS, residual = part / GROUPS * GROUPS_K;
        bool exists = !AS_IT_IS || group * 8 < IN_CHANNELS;
        u8* to = shared + band_offset(first_row - origin_of(unit) + pixel / IN_W, pixel % IN_W);
        if (pixel < pixels && group < GROUPS_K)
            cp_async_16(to + (group + residual) * ALONG, from + (exists ? pixel * PIXEL + part * 8 : 0), exists);
    }
    __device__ void next_chunk(int pass, int at) const {
        if (!AHEAD || pass || PERSISTENT) return;
        for (int chunk = at ? (at + 1) * SPLIT : 0; chunk < min(CHUNKS, (at + 2) * SPLIT); chunk++)
            copy(chunk, chunk < SPLIT ? copied_end : unit.first_row, unit.end_row);
    }
    // With PERSISTENT, behind the products of each pass: of the first pass the rest of this image's rows, later the
    // next image's, in the places that no pass reads any more.
    __device__ void follow(int next_pass) {
        if (!PERSISTENT) return;
        int pass = next_pass - 1;
        i64 image = pass ? unit.image + gridDim.x : unit.image;
        int end_row = pass ? rows_start(pass) : unit.end_row;
        first_row = pass ? rows_start(pass - 1) : copied_end;
        if (!pass) copied_end = rows_start(unit.passes - 1);
        from = source(image, first_row);
        pixels = image < images ? (end_row - first_row) * IN_W : 0;
        octet = threadIdx.x;
    }
    __device__ bool pending() const { return PERSISTENT && octet < (pixels + 7) / 8 * 64; }
    __device__ void advance() {
        copy_octet(from, 0, first_row, pixels, octet);
        octet += THREADS;
    }
    __device__ void begin(unsigned* scratch) {
        if (!AS_IT_IS) exponent = smallest_exponent(exponents, exponent_count, scratch);
    }
    __device__ bool fits(unsigned*) { return true; }
};
// The next image's first pass finds rows that were copied in passes but for the last one, the second in all.
__device__ constexpr bool found_in_time(int passes) {
    int end = end_row_of(passes * PASS_WINDOWS - 1);
    return first_row_of((PASSES - 3 + passes) * PASS_WINDOWS) >= (IN_H < end ? IN_H : end);
}
static_assert(
    !PERSISTENT || (AS_IT_IS && UNITS == 1 && CHUNKS_64 == 1 && Band<true>::AHEAD && PASSES > 2 && found_in_time(1) &&
                       found_in_time(2)),
    "rows of the next image come in time");

// x is a tensor: converted under a scale that is chosen from the rows of the first pass, with room for larger values in
// later ones. Where that is not enough, all starts again.
template <> struct Band<false> {
    // What the first pass needs at most, in octets (eight channels of a pixel) a thread, and how many of them are in
    // flight at a time. Whether rows come behind multiplications; with SPLIT 2 there are no registers for it.
    enum {
        ROOM = 3,  // of the scale's exponent, for values of later passes
        WINDOWS_OF_UNIT = (UNIT_ROWS - 1) * WINDOW_PITCH + WINDOWS_W,
        LATER = SPLIT == 1 && WINDOWS_OF_UNIT > PASS_WINDOWS,
        EARLY_WINDOWS = LATER ? PASS_WINDOWS : WINDOWS_OF_UNIT,
        NEEDED_ROWS = 2 * ((EARLY_WINDOWS - 1) / WINDOW_PITCH) + 1 + KERNEL_H,
        FIRST_ROWS = NEEDED_ROWS < IN_H ? NEEDED_ROWS : IN_H,
        FIRST_OCTETS = (FIRST_ROWS * IN_W * GROUPS_K + THREADS - 1) / THREADS,
        ROUNDS = (FIRST_OCTETS + 9) / 10,
        BATCH = (FIRST_OCTETS + ROUNDS - 1) / ROUNDS
    };
    const scalar_t* source;  // the image
    const Unit& unit;
    u8* shared;
    int exponent = GUESS, attempts = 0;
    unsigned largest;  // finite magnitude
    // Of the rows for the next pass; the thread's next octet of them, which is in v. With CHANNELS_LAST `pixel` counts
    // octets.
    int first_pixel, pixels, group, pixel;
    float v[8];

    __device__ Band(const scalar_t* x, const int*, int, const Unit& unit, i64, u8* shared)
        : source(x + unit.image * (IN_CHANNELS * IN_H * IN_W)), unit(unit), shared(shared) {
        clear_border(shared, unit);
    }
    // Where the rows end that the first `passes` passes need.
    __device__ int rows_end(int passes) const {
        if (!LATER || passes >= unit.passes) return max(0, unit.end_row);
        return max(0, min(IN_H, end_row_of(unit.first_window + passes * PASS_WINDOWS - 1)));
    }
    // The i-th octet of `count` pixels: neighbours in memory follow one another.
    struct Octet {
        int group, pixel;
        __device__ Octet(int i, int count)
            : group(CHANNELS_LAST ? i % GROUPS_K : i / count), pixel(CHANNELS_LAST ? i / GROUPS_K : i % count) {}
    };
    __device__ void load(int group, int pixel, bool real, float (&v)[8]) const {
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
    __device__ void store(int group, int pixel, float (&v)[8]) {
        #pragma unroll
        for (int j = 0; j < 8; j++) {
            largest = max(largest, finite_magnitude(v[j]));
            v[j] = multiply_unflushed(v[j], power_of_two(exponent));
        }
        u8* to = shared + group * ALONG + band_offset(pixel / IN_W - origin_of(unit), pixel % IN_W);
        #pragma unroll
        for (int part = 0; part < SPLIT; part++) *(uint4*)(to + part * GROUPS_K * ALONG) = take_halves(v, part);
    }
    __device__ void load_first_rows() {
        largest = 0;
        int start = unit.first_row * IN_W, count = max(0, rows_end(1) * IN_W - start);
        for (int at = threadIdx.x; at < count * GROUPS_K; at += THREADS * BATCH) {
            float v[BATCH][8];
            #pragma unroll
            for (int b = 0; b < BATCH; b++) {
                int i = at + b * THREADS;
                Octet octet(i, count);
                load(octet.group, start + octet.pixel, i < count * GROUPS_K, v[b]);
            }
            #pragma unroll
            for (int b = 0; b < BATCH; b++) {
                int i = at + b * THREADS;
                Octet octet(i, count);
                if (i < count * GROUPS_K) store(octet.group, start + octet.pixel, v[b]);
            }
        }
    }
    __device__ void next_chunk(int, int) const {}
    __device__ void begin(unsigned* scratch) {
        bool later = LATER && unit.passes > 1;
        load_first_rows();
        int right = scale_exponent(block_max(largest, scratch));
        if (attempts++ || (right >= GUESS + later && right <= GUESS + SLACK)) return;
        exponent = right - later * ROOM;
        load_first_rows();
    }
    // A thread loads an octet, and stores it by a later advance(), which loads the next one.
    __device__ void follow(int pass) {
        first_pixel = rows_end(pass) * IN_W;
        pixels = rows_end(pass + 1) * IN_W - first_pixel;
        group = pixels > 0 ? 0 : GROUPS_K;
        pixel = threadIdx.x;
        load_next();
    }
    __device__ bool pending() const { return LATER && (CHANNELS_LAST ? pixel < pixels * GROUPS_K : group < GROUPS_K); }
    __device__ void load_next() {
        if constexpr (CHANNELS_LAST) {
            Octet octet(pixel, pixels);
            if (pending()) load(octet.group, first_pixel + octet.pixel, true, v);
            return;
        }
        for (; pending() && pixel >= pixels; group++) pixel -= pixels;
        if (pending()) load(group, first_pixel + pixel, true, v);
    }
    __device__ void advance() {
        if constexpr (CHANNELS_LAST) {
            Octet octet(pixel, pixels);
            store(octet.group, first_pixel + octet.pixel, v);
        } else store(group, first_pixel + pixel, v);
        pixel += THREADS;
        load_next();
    }
    __device__ bool fits(unsigned* scratch) {
        int right = scale_exponent(block_max(largest, scratch));
        bool fit = exponent <= right && right <= exponent + SLACK;
        if (!fit) exponent = right;
        return fit;
    }
};

typedef Band<X_PACKED || AS_IT_IS> Rows;
