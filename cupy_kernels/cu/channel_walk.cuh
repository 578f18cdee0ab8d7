// How the threads of a block iterate over the values of channels, and where the block keeps what it knows of them.
// What it computes from the values: channel_values.cuh.
//
// A chunk is the part of a channel, or of several neighbouring channels, that one block processes. There are two ways
// to iterate:
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
    // The rows of `count` rows of threads.
    __device__ int rows_of(int row, int count = 1) const { return turns * count + min(max(extra - row, 0), count); }
    // Rows of threads that lie in one warp, if a warp's lanes are whole ones.
    __device__ int rows_of_warp() const { return 32 % tile ? 1 : 32 / tile; }
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

// Calls load(b, offset) `most` times, for the thread's next packs, and returns how many these are, at least one. In
// place of those that it does not have it loads the first one again: a load under a condition takes more instructions.
template <class F> __device__ inline int next_packs(Walk& walk, int most, F load) {
    int have = min(most, walk.packs);
    i64 first = walk.offset;
    #pragma unroll
    for (int b = 0; b < most; b++) {
        load(b, b < have ? walk.offset : first);
        walk.advance();
    }
    walk.packs -= most;
    return have;
}

// The next packs of a tensor, how many they are, and where they lie. There may be other readers than a pointer.
__device__ inline int next_batch(const scalar_t* __restrict__ x, Walk& walk, Pack (&in)[BATCH], i64 (&offsets)[BATCH]) {
    return next_packs(walk, BATCH, [&](int b, i64 offset) { in[b] = *(const Pack*)(x + (offsets[b] = offset)); });
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
