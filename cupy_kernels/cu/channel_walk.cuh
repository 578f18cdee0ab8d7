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
// So neighbouring blocks read neighbouring memory. A thread's packs belong to SLOTS channels, always the same: value i of
// a pack belongs to slot i, or all to slot 0. `chunk` counts values of a channel, and is a multiple of plane where PLANES
// is 0.
//
// Macros: scalar_t, acc_t, PLANES, WIDTH (with PLANES a divisor of plane, else of the columns; pointers are aligned to
// a pack).
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
    __device__ int channel(int) const { return only; }
    // Whether the thread is the one that writes what the block found for a slot's channel.
    __device__ bool writes(int) const { return threadIdx.x == 0; }
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
        packs = column < columns && row < across ? rows_of(row) : 0;
        offset = (first_row + row) * columns + column;
        step = (i64)across * columns;
    }
    // The rows of a row of threads.
    __device__ int rows_of(int row) const { return (rows - row + across - 1) / across; }
    // The channel of a slot, counted from the tile's first.
    __device__ int place(int slot) const {
        if (plane == 1) return own + slot;
        return own + (plane < WIDTH ? (within + slot) / plane : within + slot >= plane);
    }
    // The last channel stands for those beyond it, which no thread has values of.
    __device__ int channel(int slot) const { return min(first + place(slot), channels - 1); }
    // Whether the thread is the one that writes what the block found for a slot's channel.
    __device__ bool writes(int slot) const {
        return threadIdx.x < tile && column + slot < columns &&
               (plane == 1 || within + slot == (place(slot) - own) * plane);
    }
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

// K sums over all values that the block has of a slot's channel, in a fixed order; every thread gets those of its
// slots. `scratch` holds at least 32 values, and without PLANES 2 SLOTS per thread; it is free again afterwards.
#if PLANES
template <int K> __device__ inline void block_sums(acc_t (&v)[K][SLOTS], const Walk&, acc_t* scratch) {
    #pragma unroll
    for (int k = 0; k < K; k++) v[k][0] = block_sum(v[k][0], scratch);
}
#else
// The first half: sums over the block's rows; every thread gets those of its columns.
template <int K> __device__ inline void column_sums(acc_t (&v)[K][SLOTS], const Walk& walk, acc_t* scratch) {
    int threads = blockDim.x, thread = threadIdx.x;
    acc_t* values = &v[0][0];
    #pragma unroll
    for (int i = 0; i < K * SLOTS; i++) scratch[i * threads + thread] = values[i];
    for (int rows = walk.across; rows > 1;) {
        int half = (rows + 1) / 2;
        __syncthreads();
        if (thread < (rows - half) * walk.tile) {
            #pragma unroll
            for (int i = 0; i < K * SLOTS; i++)
                scratch[i * threads + thread] += scratch[i * threads + thread + half * walk.tile];
        }
        rows = half;
    }
    __syncthreads();
    #pragma unroll
    for (int i = 0; i < K * SLOTS; i++) values[i] = scratch[i * threads + thread % walk.tile];
    __syncthreads();
}
// The second half, a warp a channel: sums over a channel's columns, of what the threads of a column all have.
template <int K> __device__ inline void sums_of_columns(acc_t (&v)[K][SLOTS], const Walk& walk, acc_t* scratch) {
    int threads = blockDim.x, thread = threadIdx.x, plane = walk.plane;
    acc_t* values = &v[0][0];
    auto place = [&](int k, int column) { return (k * SLOTS + column % WIDTH) * threads + column / WIDTH; };
    #pragma unroll
    for (int i = 0; i < K * SLOTS; i++)
        if (thread < walk.tile) scratch[i * threads + thread] = values[i];
    __syncthreads();
    for (int first = thread / 32 * plane; first < walk.tile * WIDTH; first += threads / 32 * plane)
        for (int k = 0; k < K; k++) {
            acc_t sum = 0;
            for (int column = thread % 32; column < plane; column += 32) sum += scratch[place(k, first + column)];
            for (int lanes = 16; lanes > 0; lanes >>= 1) sum += __shfl_xor_sync(0xFFFFFFFFu, sum, lanes);
            if (thread % 32 == 0) scratch[place(k, first)] = sum;
        }
    __syncthreads();
    #pragma unroll
    for (int k = 0; k < K; k++)
        #pragma unroll
        for (int s = 0; s < SLOTS; s++) v[k][s] = scratch[place(k, walk.place(s) * plane)];
    __syncthreads();
}
template <int K> __device__ inline void block_sums(acc_t (&v)[K][SLOTS], const Walk& walk, acc_t* scratch) {
    column_sums(v, walk, scratch);
    if (walk.plane > 1) sums_of_columns(v, walk, scratch);
}
#endif

// Slots that have no result yet. Sums are of values times `unit`: 1, and where a slot's sums are not finite, once more
// another.
struct Open {
    unsigned slots = (1u << SLOTS) - 1;
    acc_t unit = 1;
    // Whether a slot's results are those to be kept. finite: whether its sums are.
    __device__ bool keep(int slot, bool finite) {
        bool kept = slots >> slot & 1 && (finite || sizeof(acc_t) != 4 || unit != 1);
        if (kept) slots &= ~(1u << slot);
        return kept;
    }
};

// Calls pass(open) until all slots of the block have results. `scratch`: as in block_sums.
template <class F> __device__ inline void with_units(acc_t* scratch, F pass) {
    Open open;
    #pragma unroll 1
    for (;;) {
        pass(open);
        if (PLANES ? !open.slots : block_sum(open.slots ? (acc_t)1 : (acc_t)0, scratch) == 0) return;
        open.unit = 0x1p-96f;
    }
}

// What means are summed up relative to: the rounding error of a large mean must not enter the variance.
__device__ inline acc_t origin_of(const scalar_t* x, i64 channel, i64 plane) {
    return finite_or_zero(to_acc(x[channel * plane]));
}

// Of values times a unit. The mean has more digits than acc_t, of which large means with small variances need some.
struct ChunkMoments {
    double mean;
    acc_t squares;
};

// Moments of what the block has of each slot's channel.
//
// A thread sums up distances from the mean of its first batch, and their squares. That mean is off by no more than the
// batch's own standard deviation, so what cancels at the end is no more than batches times what is left. The block's mean
// is summed up twice, the second time relative to the first result, whose rounding errors that makes up for.
__device__ inline void moments_of_chunk(
    const scalar_t* __restrict__ x, acc_t unit, Walk walk, i64 plane, acc_t* scratch, ChunkMoments (&moments)[SLOTS]) {
    acc_t n = 0, shift[SLOTS], sum[SLOTS], squares[SLOTS];
    #pragma unroll
    for (int s = 0; s < SLOTS; s++) shift[s] = sum[s] = squares[s] = 0;
    #pragma unroll 1
    while (walk.packs > 0) {
        Pack in[BATCH];
        int have = next_packs(walk, BATCH, [&](int b, i64 offset) { in[b] = *(const Pack*)(x + offset); });
        if (n == 0) {
            #pragma unroll
            for (int s = 0; s < SLOTS; s++) {
                acc_t total = 0;
                #pragma unroll
                for (int b = 0; b < BATCH; b++) {
                    if (b >= have) continue;
                    #pragma unroll
                    for (int i = 0; i < PER_SLOT; i++) total += to_acc(in[b].v[s + i]) * unit;
                }
                shift[s] = finite_or_zero(total / (have * PER_SLOT));
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
    acc_t origin[SLOTS];
    #pragma unroll
    for (int s = 0; s < SLOTS; s++) origin[s] = origin_of(x, walk.channel(s), plane) * unit;
    acc_t near[1][SLOTS], sums[2][SLOTS], inverse = n > 0 ? 1 / n : (acc_t)0;
    #pragma unroll
    for (int s = 0; s < SLOTS; s++) near[0][s] = n * (shift[s] - origin[s]) + sum[s];
    block_sums(near, walk, scratch);
    #pragma unroll
    for (int s = 0; s < SLOTS; s++) {
        near[0][s] = origin[s] + near[0][s] / walk.size;
        acc_t mean = sum[s] * inverse, rest = squares[s] - mean * sum[s], distance = shift[s] - near[0][s] + mean;
        sums[0][s] = n > 0 ? n * distance : (acc_t)0;
        sums[1][s] = n > 0 ? (rest < 0 ? (acc_t)0 : rest) + n * distance * distance : (acc_t)0;
    }
    block_sums(sums, walk, scratch);
    #pragma unroll
    for (int s = 0; s < SLOTS; s++)
        moments[s] = {(double)near[0][s] + finite_or_zero(sums[0][s] / walk.size), sums[1][s]};
}

// What a thread needs to normalise values of its slots, see Normaliser.
struct Normalisers {
    acc_t mean[SLOTS], invstd[SLOTS];
    unsigned large = 0;  // slots whose values are taken times a power of two
    __device__ void set(int slot, acc_t own_mean, acc_t own_invstd) {
        Normaliser one(own_mean, own_invstd);
        mean[slot] = one.mean, invstd[slot] = one.invstd;
        if (one.unit != 1) large |= 1u << slot;
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

// y = after(xhat weight + bias) of a chunk, where mean(s), invstd(s), weight(s) and bias(s) are those of a slot.
template <class M, class I, class W, class B, class F> __device__ inline void normalise_chunk(
    const scalar_t* __restrict__ x, scalar_t* __restrict__ y, Walk walk, M mean, I invstd, W weight, B bias, F after) {
    Normalisers normalise;
    acc_t w[SLOTS], b[SLOTS];
    #pragma unroll
    for (int s = 0; s < SLOTS; s++) normalise.set(s, mean(s), invstd(s)), w[s] = weight(s), b[s] = bias(s);
    #pragma unroll 1
    while (walk.packs > 0) {
        Pack in[BATCH];
        i64 offsets[BATCH];
        int have =
            next_packs(walk, BATCH, [&](int j, i64 offset) { in[j] = *(const Pack*)(x + (offsets[j] = offset)); });
        #pragma unroll
        for (int j = 0; j < BATCH; j++) {
            if (j >= have) continue;
            Pack out;
            acc_t xhat[WIDTH];
            normalise(in[j], xhat);
            #pragma unroll
            for (int i = 0; i < WIDTH; i++)
                out.v[i] = from_acc<scalar_t>(after(bn_affine(xhat[i], w[i / PER_SLOT], b[i / PER_SLOT])));
            *(Pack*)(y + offsets[j]) = out;
        }
    }
}
