// What a block makes of the values of its channels, which it walks over as channel_walk.cuh says: their sums, their
// moments, and normalised values.
#pragma once
#include "channel_walk.cuh"

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
    int together;             // rows of threads, those of a warp, which have one value a column
    int count, rows, across;  // columns; rows that have values, of all rows
    __device__ Columns(const Walk& walk, acc_t* scratch)
        : first(scratch), together(walk.rows_of_warp()), count(walk.tile * WIDTH),
          rows((min(walk.across, walk.rows) + together - 1) / together), across(walk.across / together) {}
    __device__ acc_t& at(int array, int row, int column) const {
        return first[(array * across + row) * count + column];
    }
    // Lanes between threads of a warp that have the same columns.
    __device__ int lanes() const { return 32 / together; }
    // A thread's values lie behind those of the thread before it. Of the rows of a warp the first one's are put.
    __device__ void put(int array, const acc_t (&v)[SLOTS]) const {
        int lane = threadIdx.x % 32, column = (threadIdx.x / 32 * lanes() + lane) * WIDTH;
        if (lane >= lanes() || column >= across * count) return;
        #pragma unroll
        for (int s = 0; s < SLOTS; s += SLOTS_TOGETHER)
            *(SlotPack*)&at(array, 0, column + s) = *(const SlotPack*)(v + s);
    }
    __device__ int rows_of(const Walk& walk, int row) const { return walk.rows_of(row * together, together); }
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
    for (int lanes = 16; lanes >= columns.lanes(); lanes /= 2) {
        #pragma unroll
        for (int i = 0; i < K; i++)
            #pragma unroll
            for (int s = 0; s < SLOTS; s++) v[i][s] += __shfl_down_sync(0xFFFFFFFFu, v[i][s], lanes);
    }
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
template <class X, class F>
__device__ inline void moments_of_chunk(X x, acc_t unit, Walk walk, acc_t* scratch, F finish) {
    acc_t n = 0, shift[SLOTS], sum[SLOTS], squares[SLOTS];
    #pragma unroll
    for (int s = 0; s < SLOTS; s++) shift[s] = sum[s] = squares[s] = 0;
    #pragma unroll 1
    while (walk.packs > 0) {
        Pack in[BATCH];
        i64 offsets[BATCH];
        int have = next_batch(x, walk, in, offsets);
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
    int row = threadIdx.x / (unsigned)walk.tile, rows = 1;
    for (int lanes = columns.lanes(); lanes < 32; lanes *= 2, rows *= 2) {
        int own = walk.rows_of(row, rows), others = walk.rows_of(row + rows, rows);
        acc_t share = others > 0 ? (acc_t)others / (own + others) : (acc_t)0;
        #pragma unroll
        for (int s = 0; s < SLOTS; s++) {
            acc_t other = __shfl_down_sync(0xFFFFFFFFu, shift[s], lanes) - shift[s];
            other += __shfl_down_sync(0xFFFFFFFFu, sum[s], lanes);
            acc_t rest = __shfl_down_sync(0xFFFFFFFFu, squares[s], lanes), distance = other - sum[s];
            if (others <= 0) continue;
            squares[s] += rest + distance * distance * share * own;
            sum[s] = sum[s] * (1 - share) + other * share;
        }
    }
    columns.put(SHIFT, shift), columns.put(DISTANCE, sum), columns.put(SQUARES, squares);
    __syncthreads();
    int k = 0;
    for (int column = threadIdx.x; column < columns.count; column += blockDim.x, k++) {
        acc_t reference = columns.at(SHIFT, 0, column), near = 0, rest = 0, m2 = 0;
        #pragma unroll 4
        for (int row = 0; row < columns.rows; row++)
            near += columns.rows_of(walk, row) *
                    (columns.at(SHIFT, row, column) - reference + columns.at(DISTANCE, row, column));
        near = reference + near / walk.rows;
        #pragma unroll 4
        for (int row = 0; row < columns.rows; row++) {
            acc_t distance = columns.at(SHIFT, row, column) - near + columns.at(DISTANCE, row, column);
            rest += columns.rows_of(walk, row) * distance;
            m2 += columns.at(SQUARES, row, column) + columns.rows_of(walk, row) * distance * distance;
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
template <class X, class Y, class F> __device__ inline void normalise_chunk(
    X x, Y* __restrict__ y, Walk walk, const Kept& kept, const acc_t (&w)[SLOTS], const acc_t (&b)[SLOTS], F after) {
    Normalisers normalise(kept, walk);
    #pragma unroll 1
    while (walk.packs > 0) {
        Pack in[BATCH];
        i64 offsets[BATCH];
        int have = next_batch(x, walk, in, offsets);
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
            store_at_once(y + offsets[j], out);
        }
    }
}
