// How the threads of a block walk over the values of channels, and what they sum up of them: the values' sums, and their moments.
//
// A chunk is what one block takes of a channel, or of neighbouring channels. Two walks:
//
// PLANES 1: x is [images, channels, plane]. Block chunk * channels + c takes a chunk of channel c's count = images * plane values, in
//     packs of WIDTH neighbours, which all lie in one plane.
// PLANES 0: x is a matrix of count / plane rows, and channels * plane columns: [rows, channels] (plane 1, channels_last too), or images
//     whose planes are too small to be read one by one. A pack is WIDTH neighbouring columns. A block takes `tile` packs of each row
//     of its chunk; its threads are a grid of `tile` times blockDim.x / tile, and those left over idle. A tile begins and ends where
//     channels do. Block chunk * tiles + t takes tile t.
//
// So neighbouring blocks read neighbouring memory. A thread's packs belong to SLOTS channels, always the same: value i of a pack belongs
// to slot i, or all to slot 0. `chunk` counts values of a channel, and is a multiple of plane where PLANES is 0.
//
// Macros: scalar_t, acc_t, PLANES, WIDTH (with PLANES a divisor of plane, else of the columns; pointers are aligned to a pack).
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
        settle(block);  // else a second pass would hold registers during the first
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
    int column, columns, plane, tile;

    __device__ Walk(int block, i64 channels, i64 plane_size, i64 count, i64 chunk_size, int tile) : tile(tile) {
        settle(block);  // else a second pass would hold registers during the first
        plane = (int)plane_size, columns = (int)(channels * plane_size);
        unsigned tiles = (columns / WIDTH + tile - 1) / tile, at = threadIdx.x % (unsigned)tile,
                 row = threadIdx.x / (unsigned)tile;
        int across = blockDim.x / tile;
        chunk = block / tiles;
        column = ((block - (int)chunk * tiles) * tile + at) * WIDTH;
        i64 rows = count, chunk_rows = chunk_size;
        if (plane > 1) rows /= plane, chunk_rows /= plane;
        i64 first = chunk * chunk_rows;
        int own = (int)min(chunk_rows, rows - first);
        size = own * plane;
        packs = column < columns && row < across ? (own - (int)row + across - 1) / across : 0;
        offset = (first + row) * columns + column;
        step = (i64)across * columns;
    }
    // The last channel stands for those beyond it, which no thread has values of.
    __device__ int channel(int slot) const {
        int own = min(column + slot, columns - 1);
        return plane == 1 ? own : own / plane;
    }
    // Whether the thread is the one that writes what the block found for a slot's channel.
    __device__ bool writes(int slot) const {
        return threadIdx.x < tile && column + slot < columns && (plane == 1 || (column + slot) % plane == 0);
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

// Sums over all values that the block has of a slot's channel, in a fixed order; every thread gets those of its slots. `scratch` holds
// at least 32 values, and without PLANES SLOTS per thread; it is free again afterwards.
#if PLANES
__device__ inline void block_sums(acc_t (&v)[SLOTS], const Walk&, acc_t* scratch) { v[0] = block_sum(v[0], scratch); }
#else
// The first half: sums over the block's rows; every thread gets those of its columns.
__device__ inline void column_sums(acc_t (&v)[SLOTS], const Walk& walk, acc_t* scratch) {
    int threads = blockDim.x, thread = threadIdx.x;
    #pragma unroll
    for (int s = 0; s < SLOTS; s++) scratch[s * threads + thread] = v[s];
    for (int rows = threads / walk.tile; rows > 1;) {
        int half = (rows + 1) / 2;
        __syncthreads();
        if (thread < (rows - half) * walk.tile) {
            #pragma unroll
            for (int s = 0; s < SLOTS; s++)
                scratch[s * threads + thread] += scratch[s * threads + thread + half * walk.tile];
        }
        rows = half;
    }
    __syncthreads();
    #pragma unroll
    for (int s = 0; s < SLOTS; s++) v[s] = scratch[s * threads + thread % walk.tile];
    __syncthreads();
}
// The second half, a warp a channel: sums over a channel's columns, of what the threads of a column all have.
__device__ inline void sums_of_columns(acc_t (&v)[SLOTS], const Walk& walk, acc_t* scratch) {
    int threads = blockDim.x, thread = threadIdx.x, plane = walk.plane;
    auto place = [&](int column) { return column % WIDTH * threads + column / WIDTH; };
    #pragma unroll
    for (int s = 0; s < SLOTS; s++)
        if (thread < walk.tile) scratch[s * threads + thread] = v[s];
    __syncthreads();
    for (int first = thread / 32 * plane; first < walk.tile * WIDTH; first += threads / 32 * plane) {
        acc_t sum = 0;
        for (int column = thread % 32; column < plane; column += 32) sum += scratch[place(first + column)];
        for (int lanes = 16; lanes > 0; lanes >>= 1) sum += __shfl_xor_sync(0xFFFFFFFFu, sum, lanes);
        if (thread % 32 == 0) scratch[place(first)] = sum;
    }
    __syncthreads();
    #pragma unroll
    for (int s = 0; s < SLOTS; s++) v[s] = scratch[place((thread % walk.tile * WIDTH + s) / plane * plane)];
    __syncthreads();
}
__device__ inline void block_sums(acc_t (&v)[SLOTS], const Walk& walk, acc_t* scratch) {
    column_sums(v, walk, scratch);
    if (walk.plane > 1) sums_of_columns(v, walk, scratch);
}
#endif

// Slots that have no result yet. Sums are of values times `unit`: 1, and where a slot's sums are not finite, once more another.
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

// Means are kept relative to the channel's first value: the rounding error of a large mean must not enter the variance.
__device__ inline acc_t origin_of(const scalar_t* x, i64 channel, i64 plane) {
    return finite_or_zero(to_acc(x[channel * plane]));
}

// Mean - origin, and squares, of what the block has of each slot's channel.
//
// A thread takes a batch's mean first and its squares relative to that, both from registers, then joins batches as Chan
// et al. do: nothing cancels, whatever the mean is and wherever outliers are. The threads' means are summed up twice, the
// second time relative to the first result, whose rounding errors that makes up for.
__device__ inline void moments_of_chunk(
    const scalar_t* __restrict__ x, acc_t unit, Walk walk, i64 plane, acc_t* scratch, Moments (&moments)[SLOTS]) {
    acc_t n = 0, origin[SLOTS], mean[SLOTS], m2[SLOTS];  // of the thread's values - origin
    #pragma unroll
    for (int s = 0; s < SLOTS; s++) {
        origin[s] = origin_of(x, walk.channel(s), plane) * unit;
        mean[s] = m2[s] = 0;
    }
    #pragma unroll 1
    while (walk.packs > 0) {
        Pack in[BATCH];
        int have = next_packs(walk, BATCH, [&](int b, i64 offset) { in[b] = *(const Pack*)(x + offset); });
        acc_t k = have * PER_SLOT, inverse = 1 / k, share = k / (n + k), weight = n * share;
        #pragma unroll
        for (int s = 0; s < SLOTS; s++) {
            acc_t total = 0, rest = 0, squares = 0;
            #pragma unroll
            for (int b = 0; b < BATCH; b++) {
                if (b >= have) continue;
                #pragma unroll
                for (int i = 0; i < PER_SLOT; i++) total += to_acc(in[b].v[s + i]) * unit;
            }
            acc_t shift = finite_or_zero(total * inverse);
            #pragma unroll
            for (int b = 0; b < BATCH; b++) {
                if (b >= have) continue;
                #pragma unroll
                for (int i = 0; i < PER_SLOT; i++) {
                    acc_t d = to_acc(in[b].v[s + i]) * unit - shift;
                    rest += d;
                    squares += d * d;
                }
            }
            acc_t distance = shift - origin[s] + rest * inverse, step = distance - mean[s];
            m2[s] += squares - rest * rest * inverse + step * step * weight;
            mean[s] += is_finite(step) ? step * share : distance;  // infinite stays infinite
        }
        n += k;
    }
    acc_t total[SLOTS], rest[SLOTS];
    #pragma unroll
    for (int s = 0; s < SLOTS; s++) total[s] = n * mean[s];
    block_sums(total, walk, scratch);
    #pragma unroll
    for (int s = 0; s < SLOTS; s++) {
        total[s] /= walk.size;
        acc_t distance = mean[s] - total[s];
        rest[s] = n * distance;
        m2[s] = n > 0 ? m2[s] + n * distance * distance : (acc_t)0;
    }
    block_sums(rest, walk, scratch);
    block_sums(m2, walk, scratch);
    #pragma unroll
    for (int s = 0; s < SLOTS; s++) moments[s] = {total[s] + finite_or_zero(rest[s] / walk.size), m2[s]};
}

// y = after(xhat weight + bias) of a chunk, where mean(s), invstd(s), weight(s) and bias(s) are those of a slot.
template <class M, class I, class W, class B, class F> __device__ inline void normalise_chunk(
    const scalar_t* __restrict__ x, scalar_t* __restrict__ y, Walk walk, M mean, I invstd, W weight, B bias, F after) {
    Normaliser normalise[SLOTS];
    acc_t w[SLOTS], b[SLOTS];
    #pragma unroll
    for (int s = 0; s < SLOTS; s++) normalise[s] = Normaliser(mean(s), invstd(s)), w[s] = weight(s), b[s] = bias(s);
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
            #pragma unroll
            for (int i = 0; i < WIDTH; i++) {
                int s = i / PER_SLOT;
                out.v[i] = from_acc<scalar_t>(after(bn_affine(normalise[s](to_acc(in[j].v[i])), w[s], b[s])));
            }
            *(Pack*)(y + offsets[j]) = out;
        }
    }
}
