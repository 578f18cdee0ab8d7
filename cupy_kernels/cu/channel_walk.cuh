// How the threads of a block walk over the values of channels, and what they sum up of them: the values' sums, and
// their moments.
//
// A chunk is what one block takes of a channel, or of neighbouring channels. Two walks:
//
// PLANES 1: x is [images, channels, plane]. Block chunk * channels + c takes a chunk of channel c's count = images *
//     plane values, in packs of WIDTH neighbours, which all lie in one plane.
// PLANES 0: x is a matrix of count / plane rows, and channels * plane columns: [rows, channels] (plane 1, channels_last
//     too), or images whose planes are too small to be read one by one. A pack is WIDTH neighbouring columns. A block
//     takes `tile` packs of each row of its chunk; its threads are a grid of `tile` times blockDim.x / tile, and those
//     left over idle. A tile begins and ends where channels do. Block chunk * tiles + t takes tile t.
//
// So neighbouring blocks read neighbouring memory. A thread's packs belong to SLOTS channels, always the same: value i
// of a pack belongs to slot i, or all to slot 0. `chunk` counts values of a channel, and is a multiple of plane where
// PLANES is 0.
//
// Macros: scalar_t, acc_t, PLANES, WIDTH (with PLANES a divisor of plane, else of the columns; pointers are aligned to
// a pack), KEPT.
#pragma once
#include "batch_norm.cuh"

typedef Packed<scalar_t, WIDTH> Pack;
enum { SLOTS = PLANES ? 1 : WIDTH, PER_SLOT = WIDTH / SLOTS };
enum { BATCH = sizeof(Pack) < 16 ? 8 : 4 };  // packs in flight per thread; half of it per tensor where several are read

#if PLANES
struct Walk {
    i64 chunk, offset;  // offset: of the current pack in the tensor
    int size, packs;    // values in the chunk; packs of the thread
    i64 jump, skip;
    int left, plane, jump_within, only;  // left: values to the end of the plane; only: the channel

    __device__ Walk(int block, i64 channels, i64 plane_size, i64 count, i64 chunk_size, int) {
        const int far = 1 << 30;  // a chunk is smaller, so distances beyond make no difference
        int stride = blockDim.x * WIDTH, start = threadIdx.x * WIDTH;
        make_opaque(block);  // else a second pass would hold registers during the first
        chunk = block / (unsigned)channels;
        only = block - chunk * channels;
        i64 first = chunk * chunk_size, index = first + start;
        size = (int)min(chunk_size, count - first);
        packs = max(0, (size - start + stride - 1) / stride);
        plane = (int)min(plane_size, (i64)far);
        int jump_images = stride / plane;
        jump_within = stride - jump_images * plane;
        skip = (channels - 1) * plane_size;
        jump = stride + jump_images * skip;
        i64 image = index / plane_size, within = index - image * plane_size;
        left = (int)min(plane_size - within, (i64)far);
        offset = (image * channels + only) * plane_size + within;
    }
    __device__ int entries() const { return 1; }
    __device__ int place(int) const { return 0; }
    __device__ void advance() {
        offset += jump;
        left -= jump_within;
        if (left <= 0) {
            left += plane;
            offset += skip;
        }
    }
};
#else
struct Walk {
    i64 chunk, offset, step;  // offset: of the current pack in the tensor
    int size, packs;          // values of each channel in the chunk; packs of the thread
    int rows, across;         // in the chunk; that the block's threads take together
    int turns, extra;         // rows of each row of threads; how many of these have one more
    int column, columns, plane, tile;
    int first, own, within,
        channels;  // the tile's first channel; of it that of the thread's first value; place in that

    __device__ Walk(int block, i64 channels, i64 plane_size, i64 count, i64 chunk_size, int tile)
        : tile(tile), channels((int)channels) {
        make_opaque(block);  // else a second pass would hold registers during the first
        plane = (int)plane_size, columns = (int)(channels * plane_size);
        unsigned tiles = (columns / WIDTH + tile - 1) / tile, at = threadIdx.x % (unsigned)tile,
                 row = threadIdx.x / (unsigned)tile;
        across = blockDim.x / tile;
        chunk = block / tiles;
        int which = block - (int)chunk * tiles;
        column = (which * tile + at) * WIDTH;
        first = which * (plane == 1 ? tile * WIDTH : tile * WIDTH / plane);
        own = plane == 1 ? at * WIDTH : at * WIDTH / plane;
        within = at * WIDTH - own * plane;
        i64 all_rows = count, chunk_rows = chunk_size;
        if (plane > 1) all_rows /= plane, chunk_rows /= plane;
        i64 first_row = chunk * chunk_rows;
        rows = (int)min(chunk_rows, all_rows - first_row);
        size = rows * plane;
        turns = (unsigned)rows / (unsigned)across, extra = rows - turns * across;
        packs = column < columns && row < across ? rows_of(row) : 0;
        offset = (first_row + row) * columns + column;
        step = (i64)across * columns;
    }
    // The rows of a row of threads.
    __device__ int rows_of(int row) const { return turns + (row < extra); }
    // The channel of a slot, counted from the tile's first.
    __device__ int place(int slot) const {
        if (plane == 1) return own + slot;
        return own + (plane < WIDTH ? (within + slot) / plane : within + slot >= plane);
    }
    // Channels of the tile; the last tile has fewer, but room for as many.
    __device__ int entries() const { return plane == 1 ? tile * WIDTH : tile * WIDTH / plane; }
    __device__ void advance() { offset += step; }
};
#endif

// Calls load(b, offset) for the thread's next packs, at most `most`, and returns how many they are.
template <class F> __device__ inline int next_packs(Walk& walk, int most, F load) {
    int have = min(most, walk.packs);
    #pragma unroll
    for (int b = 0; b < most; b++) {
        if (b < have) load(b, walk.offset);
        walk.advance();
    }
    walk.packs -= most;
    return have;
}

#if !PLANES
// Values of a thread's slots lie side by side: 16 bytes at a time, or lanes would meet in the same banks.
enum { SLOTS_TOGETHER = WIDTH * sizeof(acc_t) % 16 ? 1 : 16 / sizeof(acc_t) };
typedef Packed<acc_t, SLOTS_TOGETHER> SlotPack;
#endif

// What a block knows of its channels lies in shared memory: KEPT arrays of an entry for each channel of the tile, or
// for each column where these differ in weight and bias; behind them the scratch memory of sums, 32 values, and without
// PLANES 3 WIDTH for each thread.
enum { MEAN, INVSTD, UNIT, WEIGHT, BIAS, OTHER, ARRAYS };
static_assert(KEPT == ARRAYS, "the launch has room for the arrays");
struct Kept {
    acc_t* first;
    int stride;  // of the arrays
    __device__ Kept(acc_t* shared, int tile) : first(shared), stride(PLANES ? 1 : tile * WIDTH) {}
    __device__ acc_t& at(int array, int place) const { return first[array * stride + place]; }
    __device__ acc_t* scratch() const { return first + KEPT * stride; }
    __device__ void normaliser(int place, acc_t mean, acc_t invstd) const {
        Normaliser one(mean, invstd);
        at(MEAN, place) = one.mean, at(INVSTD, place) = one.invstd, at(UNIT, place) = one.unit;
    }
    // Of channels beyond the last nothing is kept, and nobody uses what is read.
    UNCHECKED __device__ acc_t value(int array, int place) const { return at(array, place); }
    UNCHECKED __device__ void slots(int array, const Walk& walk, acc_t (&v)[SLOTS]) const {
#if !PLANES
        if (walk.plane == 1) {
            #pragma unroll
            for (int s = 0; s < SLOTS; s += SLOTS_TOGETHER)
                *(SlotPack*)(v + s) = *(const SlotPack*)&at(array, walk.own + s);
            return;
        }
#endif
        #pragma unroll
        for (int s = 0; s < SLOTS; s++) v[s] = at(array, walk.place(s));
    }
};

// Calls visit(place, channel) once for each channel of the block.
template <class F> __device__ inline void for_channels(const Walk& walk, F visit) {
#if PLANES
    if (threadIdx.x == 0) visit(0, walk.only);
#else
    for (int place = threadIdx.x; place < walk.entries() && walk.first + place < walk.channels; place += blockDim.x)
        visit(place, walk.first + place);
#endif
}

// Channels that have no result yet. Sums are of values times `unit`: 1, and where sums are not finite, once more
// another.
struct Open {
    acc_t unit = 1;
    unsigned done = 0;  // of the thread's channels
    bool again = false;
    // Whether the sums of the thread's k-th channel are those to be kept. finite: whether they are.
    __device__ bool keep(int k, bool finite) {
        if (done >> k & 1) return false;
        bool kept = finite || sizeof(acc_t) != 4 || unit != 1;
        if (kept) done |= 1u << k;
        else again = true;
        return kept;
    }
};

// Calls pass(open) until all channels of the block have results, which all threads see then.
template <class F> __device__ inline void with_units(acc_t* scratch, F pass) {
    Open open;
    #pragma unroll 1
    for (;;) {
        open.again = false;
        pass(open);
        __syncthreads();
        if (block_sum(open.again ? (acc_t)1 : (acc_t)0, scratch) == 0) return;
        open.unit = OTHER_UNIT();
    }
}

#if !PLANES
// Shared memory for values of each column, by row of threads.
struct Columns {
    acc_t* first;
    int count, rows, across;  // columns; rows of threads that have values, of all rows
    __device__ Columns(const Walk& walk, acc_t* scratch)
        : first(scratch), count(walk.tile * WIDTH), rows(min(walk.across, walk.rows)), across(walk.across) {}
    __device__ acc_t& at(int array, int row, int column) const {
        return first[(array * across + row) * count + column];
    }
    // A thread's values lie behind those of the thread before it.
    __device__ void put(int array, const acc_t (&v)[SLOTS]) const {
        if (threadIdx.x * WIDTH >= across * count) return;
        #pragma unroll
        for (int s = 0; s < SLOTS; s += SLOTS_TOGETHER)
            *(SlotPack*)&at(array, 0, threadIdx.x * WIDTH + s) = *(const SlotPack*)(v + s);
    }
};

// Calls visit(k, place, lane, lanes) with `lanes` threads, 1 or a warp, for each channel of the block: the k-th of
// these threads.
template <class F> __device__ inline void for_columns_of_channels(const Walk& walk, F visit) {
    int lanes = walk.plane < 32 ? 1 : 32, k = 0;
    for (int place = threadIdx.x / lanes; place < walk.entries() && walk.first + place < walk.channels;
        place += blockDim.x / lanes)
        visit(k++, place, (int)threadIdx.x % lanes, lanes);
}
__device__ inline acc_t sum_of_lanes(acc_t v, int lanes) {
    for (lanes /= 2; lanes > 0; lanes /= 2) v += __shfl_xor_sync(0xFFFFFFFFu, v, lanes);
    return v;
}
#endif

// Calls finish(k, place, channel, sums), in one thread, for each channel of the block, the k-th of that thread: with K
// sums of what all threads have for it, in a fixed order. Before, calls of_column(column of the tile, sums), which may
// change them.
template <int K, class C, class F>
__device__ inline void sums_of_channels(acc_t (&v)[K][SLOTS], const Walk& walk, acc_t* scratch, C of_column, F finish) {
    acc_t total[K];
#if PLANES
    #pragma unroll
    for (int i = 0; i < K; i++) total[i] = block_sum(v[i][0], scratch);
    if (threadIdx.x == 0) finish(0, 0, walk.only, total);
#else
    Columns columns(walk, scratch);
    #pragma unroll
    for (int i = 0; i < K; i++) columns.put(i, v[i]);
    __syncthreads();
    int k = 0;
    for (int column = threadIdx.x; column < columns.count; column += blockDim.x, k++) {
        #pragma unroll
        for (int i = 0; i < K; i++) {
            total[i] = 0;
            #pragma unroll 4
            for (int row = 0; row < columns.rows; row++) total[i] += columns.at(i, row, column);
        }
        of_column(column, total);
        #pragma unroll
        for (int i = 0; i < K; i++) columns.at(i, 0, column) = total[i];
        if (walk.plane == 1 && walk.first + column < walk.channels) finish(k, column, walk.first + column, total);
    }
    if (walk.plane > 1) {
        __syncthreads();
        for_columns_of_channels(walk, [&](int k, int place, int lane, int lanes) {
            #pragma unroll
            for (int i = 0; i < K; i++) {
                total[i] = 0;
                for (int column = lane; column < walk.plane; column += lanes)
                    total[i] += columns.at(i, 0, place * walk.plane + column);
                total[i] = sum_of_lanes(total[i], lanes);
            }
            if (lane == 0) finish(k, place, walk.first + place, total);
        });
    }
#endif
}

// Of values times a unit. The mean has more digits than acc_t, of which large means with small variances need some.
struct ChunkMoments {
    double mean;
    acc_t squares;
};

// Calls finish(k, place, channel, moments), as sums_of_channels, with the moments of what the block has of each
// channel.
//
// A thread sums up distances from the mean of its first batch, and their squares. That mean is off by no more than the
// batch's own standard deviation, so what cancels at the end is no more than batches times what is left. Means of
// several threads, or columns, are summed up twice, the second time relative to the first result, whose rounding errors
// that makes up for.
template <class F>
__device__ inline void moments_of_chunk(
    const scalar_t* __restrict__ x, acc_t unit, Walk walk, acc_t* scratch, F finish) {
    acc_t n = 0, shift[SLOTS], sum[SLOTS], squares[SLOTS];
    #pragma unroll
    for (int s = 0; s < SLOTS; s++) shift[s] = sum[s] = squares[s] = 0;
    #pragma unroll 1
    while (walk.packs > 0) {
        Pack in[BATCH];
        int have = next_packs(walk, BATCH, [&](int b, i64 offset) { in[b] = *(const Pack*)(x + offset); });
        if (n == 0) {
            acc_t inverse = (acc_t)1 / (have * PER_SLOT);
            #pragma unroll
            for (int s = 0; s < SLOTS; s++) {
                acc_t total = 0;
                #pragma unroll
                for (int b = 0; b < BATCH; b++) {
                    if (b >= have) continue;
                    #pragma unroll
                    for (int i = 0; i < PER_SLOT; i++) total += to_acc(in[b].v[s + i]) * unit;
                }
                shift[s] = finite_or_zero(total * inverse);
            }
        }
        #pragma unroll
        for (int b = 0; b < BATCH; b++) {
            if (b >= have) continue;
            #pragma unroll
            for (int i = 0; i < WIDTH; i++) {
                int s = i / PER_SLOT;
                acc_t d = to_acc(in[b].v[i]) * unit - shift[s];
                sum[s] += d;
                squares[s] += d * d;
            }
        }
        n += have * PER_SLOT;
    }
    acc_t inverse = n > 0 ? 1 / n : (acc_t)0;
    #pragma unroll
    for (int s = 0; s < SLOTS; s++) {
        sum[s] *= inverse;  // the mean, relative to shift
        acc_t rest = squares[s] - n * sum[s] * sum[s];
        squares[s] = rest < 0 ? (acc_t)0 : rest;
    }
#if PLANES
    if (threadIdx.x == 0) scratch[0] = shift[0];
    __syncthreads();
    acc_t reference = scratch[0];
    __syncthreads();
    acc_t near = reference + block_sum(n * (shift[0] - reference + sum[0]), scratch) / walk.size;
    acc_t distance = n > 0 ? shift[0] - near + sum[0] : (acc_t)0;
    acc_t rest = block_sum(n * distance, scratch) / walk.size;
    acc_t m2 = block_sum(squares[0] + n * distance * distance, scratch);
    if (threadIdx.x == 0) finish(0, 0, walk.only, ChunkMoments{(double)near + finite_or_zero(rest), m2});
#else
    enum { SHIFT, DISTANCE, SQUARES };  // of a thread; then in row 0 of a column: two parts of the mean, and squares
    Columns columns(walk, scratch);
    columns.put(SHIFT, shift), columns.put(DISTANCE, sum), columns.put(SQUARES, squares);
    __syncthreads();
    int k = 0;
    for (int column = threadIdx.x; column < columns.count; column += blockDim.x, k++) {
        acc_t reference = columns.at(SHIFT, 0, column), near = 0, rest = 0, m2 = 0;
        #pragma unroll 4
        for (int row = 0; row < columns.rows; row++)
            near +=
                walk.rows_of(row) * (columns.at(SHIFT, row, column) - reference + columns.at(DISTANCE, row, column));
        near = reference + near / walk.rows;
        #pragma unroll 4
        for (int row = 0; row < columns.rows; row++) {
            acc_t distance = columns.at(SHIFT, row, column) - near + columns.at(DISTANCE, row, column);
            rest += walk.rows_of(row) * distance;
            m2 += columns.at(SQUARES, row, column) + walk.rows_of(row) * distance * distance;
        }
        rest = finite_or_zero(rest / walk.rows);
        columns.at(SHIFT, 0, column) = near, columns.at(DISTANCE, 0, column) = rest,
                             columns.at(SQUARES, 0, column) = m2;
        if (walk.plane == 1 && walk.first + column < walk.channels)
            finish(k, column, walk.first + column, ChunkMoments{(double)near + rest, m2});
    }
    if (walk.plane > 1) {
        __syncthreads();
        for_columns_of_channels(walk, [&](int k, int place, int lane, int lanes) {
            int first = place * walk.plane;
            acc_t reference = columns.at(SHIFT, 0, first), sum = 0, m2 = 0;
            auto distance_of = [&](int column) {
                return columns.at(SHIFT, 0, column) - reference + columns.at(DISTANCE, 0, column);
            };
            for (int i = lane; i < walk.plane; i += lanes) sum += distance_of(first + i);
            acc_t near = sum_of_lanes(sum, lanes) / walk.plane, rest = 0;
            for (int i = lane; i < walk.plane; i += lanes) {
                acc_t distance = distance_of(first + i) - near;
                rest += distance;
                m2 += columns.at(SQUARES, 0, first + i) + walk.rows * distance * distance;
            }
            double mean = (double)reference + near + finite_or_zero(sum_of_lanes(rest, lanes) / walk.plane);
            m2 = sum_of_lanes(m2, lanes);
            if (lane == 0) finish(k, place, walk.first + place, ChunkMoments{mean, m2});
        });
    }
#endif
}

// What a thread needs to normalise values of its slots, see Normaliser.
struct Normalisers {
    acc_t mean[SLOTS], invstd[SLOTS];
    unsigned large = 0;  // slots whose values are taken times a power of two
    UNCHECKED __device__ Normalisers(const Kept& kept, const Walk& walk) {
        kept.slots(MEAN, walk, mean), kept.slots(INVSTD, walk, invstd);
        #pragma unroll
        for (int s = 0; s < SLOTS; s++)
            if (kept.at(UNIT, walk.place(s)) != 1) large |= 1u << s;
    }
    __device__ void operator()(const Pack& in, acc_t (&xhat)[WIDTH]) const {
        #pragma unroll
        for (int i = 0; i < WIDTH; i++) xhat[i] = to_acc(in.v[i]);
        if (large) {
            #pragma unroll
            for (int i = 0; i < WIDTH; i++)
                if (large >> i / PER_SLOT & 1) xhat[i] *= Normaliser::LARGE_UNIT();
        }
        #pragma unroll
        for (int i = 0; i < WIDTH; i++) xhat[i] = (xhat[i] - mean[i / PER_SLOT]) * invstd[i / PER_SLOT];
    }
};

// y = xhat weight + bias of a chunk, which after(values of a pack) may change, with the weights and biases of the
// slots, and the block's means.
template <class Y, class F> __device__ inline void normalise_chunk(
    const scalar_t* __restrict__ x, Y* __restrict__ y, Walk walk, const Kept& kept, const acc_t (&w)[SLOTS],
    const acc_t (&b)[SLOTS], F after) {
    Normalisers normalise(kept, walk);
    #pragma unroll 1
    while (walk.packs > 0) {
        Pack in[BATCH];
        i64 offsets[BATCH];
        int have =
            next_packs(walk, BATCH, [&](int j, i64 offset) { in[j] = *(const Pack*)(x + (offsets[j] = offset)); });
        #pragma unroll
        for (int j = 0; j < BATCH; j++) {
            if (j >= have) continue;
            Packed<Y, WIDTH> out;
            acc_t xhat[WIDTH];
            normalise(in[j], xhat);
            #pragma unroll
            for (int i = 0; i < WIDTH; i++) xhat[i] = bn_affine(xhat[i], w[i / PER_SLOT], b[i / PER_SLOT]);
            after(xhat);
            #pragma unroll
            for (int i = 0; i < WIDTH; i++) out.v[i] = from_acc<Y>(xhat[i]);
            *(Packed<Y, WIDTH>*)(y + offsets[j]) = out;
        }
    }
}
