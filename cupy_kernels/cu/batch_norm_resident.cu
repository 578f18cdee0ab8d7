// Batch norm of a matrix [rows, channels] in one launch each way: batch_norm.cu says what is computed.
//
// All blocks run at once. Each block reads its chunk, adds it up, and waits for the other blocks. Then it combines the
// partial results of its channels and applies them to its chunk. The values that it read last are still in a ring
// buffer in shared memory, in which each thread has its own slots. The other values are read again, the last packs
// first, because those are still in the L2 cache.
//
// Macros: those of batch_norm_chunk.cuh, with PLANES 0 and packs of 16 bytes; RESIDENT_THREADS, of a block at most;
// AHEAD, batches that are on their way, of which the ring holds one more at least.
#include "async_copy.cuh"
#include "batch_norm_chunk.cuh"

static_assert(sizeof(Pack) == 16 && !PLANES, "cp.async takes 16 bytes");

// Shared memory for batches of P packs that each thread reads of a tensor: `slots` batches a thread. The packs of a
// warp's batch lie together, so their distances are known at compile time.
template <int P> struct Ring {
    Pack* first;
    int slots, stride, own;  // stride: packs of a slot; own: the thread's first one
    __device__ Ring(Pack* first, int slots) : first(first), slots(slots), stride(blockDim.x * P) {
        own = threadIdx.x / 32 * 32 * P + threadIdx.x % 32;
        make_opaque(own);  // else it is computed again for each pack
    }
    // Pack 0 of a thread's batch, of the tensor's own ring behind the rings of the tensors before it. Pack b lies 32 b
    // behind it.
    __device__ Pack* at(int tensor, int slot) const { return first + (own + (tensor * slots + slot) * stride); }
};

// A thread's batches of P packs of T tensors, of which some may be null. First they arrive one after another, AHEAD of
// them on their way into the ring. Turned, they come once more, the last one first: from the ring, and those that it
// does not have any more arrive again.
template <int T, int P> struct Batches {
    const scalar_t* tensors[T];
    Ring<P> ring;
    int packs, absent, direction = 1;  // packs: of all batches; absent: the batches before this one are not in the ring
    i64 step;                          // between packs
    struct Place {
        int batch, slot;
        i64 offset;   // of the first pack in the tensor
    } taken, issued;  // the next ones

    __device__ Batches(const scalar_t* const (&of)[T], const Ring<P>& ring, const Walk& walk)
        : ring(ring), packs(max(0, walk.packs)), step(walk.step) {
        #pragma unroll
        for (int t = 0; t < T; t++) tensors[t] = of[t];
        taken = issued = {0, 0, walk.offset};
        absent = count();
    }
    __device__ int count() const { return (packs + P - 1) / P; }
    __device__ void start() {
        for (int i = 0; i < AHEAD; i++) issue();
    }
    __device__ void turn() {
        int last = count() - 1;
        taken = {last, last % ring.slots, taken.offset + last * P * step};
        absent = max(0, count() - ring.slots), direction = -1;
        issued = taken;
        for (int i = 0; i < AHEAD; i++) move(issued);
    }
    __device__ void move(Place& place) const {
        place.batch += direction, place.slot += direction, place.offset += direction * P * step;
        if (place.slot == ring.slots) place.slot = 0;
        if (place.slot < 0) place.slot = ring.slots - 1;
    }
    __device__ int have(const Place& place) const { return min(P, packs - place.batch * P); }
    // Packs beyond the last one become zeros.
    __device__ void issue() {
        if (0 <= issued.batch && issued.batch < absent) {
            int valid = have(issued);
            #pragma unroll
            for (int t = 0; t < T; t++) {
                if (!tensors[t]) continue;
                Pack* to = ring.at(t, issued.slot);
                const scalar_t* from = tensors[t] + issued.offset;
                #pragma unroll
                for (int b = 0; b < P; b++, from += step) cp_async_16(to + 32 * b, from, b < valid);
            }
        }
        cp_async_commit();
        move(issued);
    }
    // Calls visit(b, offset, packs) for the next batch, with its packs of the T tensors. Returns how many there are;
    // those behind them are zeros. left: a walk whose packs are those that have not been taken.
    template <class F> __device__ int take(Walk& left, F visit) {
        cp_async_wait<AHEAD - 1>();
        const Pack* from[T];
        #pragma unroll
        for (int t = 0; t < T; t++) from[t] = ring.at(t, taken.slot);
        i64 offset = taken.offset;
        #pragma unroll
        for (int b = 0; b < P; b++, offset += step) visit(b, offset, from);
        int valid = have(taken);
        move(taken);
        issue();
        left.packs -= P;
        return valid;
    }
};

typedef Batches<1, BATCH> BatchesOfX;
__device__ inline int next_batch(BatchesOfX& x, Walk& left, Pack (&in)[BATCH], i64 (&offsets)[BATCH]) {
    return x.take(
        left, [&](int b, i64 offset, const Pack*(&from)[1]) { in[b] = from[0][32 * b], offsets[b] = offset; });
}

// The threads of a block share its channels: `lanes` of them have one.
struct Share {
    int lanes, place, lane, channel;
    bool any;  // else there is no channel for these threads
    __device__ Share(const Walk& walk) : lanes(32) {
        while (walk.entries() * lanes > blockDim.x) lanes /= 2;
        place = threadIdx.x / lanes, lane = threadIdx.x % lanes, channel = walk.first + place;
        any = place < walk.entries() && channel < walk.channels;
        if (!any) channel = 0;
    }
    // Calls visit(chunk) for each chunk, in turns.
    template <class F> __device__ void of_chunks(i64 chunks, F visit) const {
        #pragma unroll 4
        for (i64 k = lane; k < chunks; k += lanes) visit(k);
    }
    __device__ double sum(double v) const {
        for (int distance = lanes / 2; distance > 0; distance /= 2) v += __shfl_xor_sync(0xFFFFFFFFu, v, distance);
        return v;
    }
};

extern "C" __global__ void __launch_bounds__(RESIDENT_THREADS, 1) batch_norm_resident_forward(
    const scalar_t* __restrict__ x, INOUT param_t* running_mean, INOUT param_t* running_var, INOUT i64* batches,
    const param_t* __restrict__ weight, const param_t* __restrict__ bias, scalar_t* __restrict__ y,
    acc_t* __restrict__ mean, acc_t* __restrict__ invstd, double* partials, acc_t momentum, acc_t eps, int with_tanh,
    i64 channels, i64 plane, i64 count, i64 chunk, i64 chunks, int tile, int ring_at, int ring_batches) {
    DYNAMIC_SHARED(acc_t, shared);
    Kept kept(shared, tile);
    Ring<BATCH> ring((Pack*)((char*)shared + ring_at), ring_batches);
    Walk walk(blockIdx.x, channels, plane, count, chunk, tile);
    Share share(walk);
    i64 c = share.channel;
    acc_t own_weight = bn_weight(weight, c), own_bias = bn_bias(bias, c);
    param_t own_mean = {}, own_var = {};
    if (running_mean) own_mean = running_mean[c], own_var = running_var[c];
    if (batches && blockIdx.x == 0 && threadIdx.x == 0) ++*batches;
    Partials to = {partials, channels, chunks};
    with_units(kept.scratch(), [&](Open& open) {
        BatchesOfX arriving({x}, ring, walk);
        arriving.start();
        moments_of_chunk(arriving, open.unit, walk, kept.scratch(), [&](int k, int, int channel, ChunkMoments moments) {
            double back = inverse_of(open.unit);
            if (open.keep(k, is_finite(moments.squares)))
                to.store(walk, channel, moments.mean * back, moments.squares * back * back);
        });
        cp_async_wait<0>();
    });
    grid_barrier();
    // In double, relative to the first chunk's mean, moments neither overflow nor cancel.
    const volatile double *means = partials + c * chunks, *m2s = partials + (channels + c) * chunks;
    double reference = finite_or_zero(means[0]), sum = 0, m2 = 0;
    share.of_chunks(chunks, [&](i64 k) {
        double n = min(chunk, count - k * chunk), distance = means[k] - reference;
        sum += n * distance;
        m2 += m2s[k] + n * distance * distance;
    });
    sum = share.sum(sum), m2 = share.sum(m2);
    if (share.any && share.lane == 0) {
        double shift = sum / count;
        m2 -= shift * sum;
        if (m2 < 0) m2 = 0;
        acc_t unit = is_finite((acc_t)m2) ? (acc_t)1 : OTHER_UNIT();
        Moments found = {(acc_t)((reference + shift) * unit), (acc_t)(m2 * unit * unit)};
        acc_t batch_mean, batch_invstd;
        store_statistics(found, unit, count, eps, &batch_mean, &batch_invstd, &own_mean, &own_var, momentum, 0);
        kept.normaliser(share.place, batch_mean, batch_invstd);
        kept.at(WEIGHT, share.place) = own_weight, kept.at(BIAS, share.place) = own_bias;
        if (walk.chunk == 0) {
            mean[c] = batch_mean, invstd[c] = batch_invstd;
            if (running_mean) running_mean[c] = own_mean, running_var[c] = own_var;
        }
    }
    __syncthreads();
    BatchesOfX again({x}, ring, walk);
    again.turn();
    apply(again, y, with_tanh, walk, kept);
}

enum { PACKS = Tensors::PACKS };
struct BatchesOfTensors : Tensors {
    Batches<3, PACKS> all;
    __device__ int next(Walk& left, Batch& batch) {
        return all.take(left, [&](int b, i64 offset, const Pack*(&from)[3]) {
            batch.offsets[b] = offset;
            batch.dy[b] = from[0][32 * b], batch.x[b] = from[1][32 * b];
            if (y) batch.y[b] = from[2][32 * b];
        });
    }
};

// Through the batch's statistics. dx, dweight and dbias may be null.
extern "C" __global__ void __launch_bounds__(RESIDENT_THREADS, 1) batch_norm_resident_backward(
    const scalar_t* __restrict__ dy, const scalar_t* __restrict__ x, const scalar_t* __restrict__ y,
    const acc_t* __restrict__ mean, const acc_t* __restrict__ invstd, const param_t* __restrict__ weight,
    scalar_t* __restrict__ dx, param_t* __restrict__ dweight, param_t* __restrict__ dbias, double* partials,
    i64 channels, i64 plane, i64 count, i64 chunk, i64 chunks, int tile, int ring_at, int ring_batches) {
    DYNAMIC_SHARED(acc_t, shared);
    Kept kept(shared, tile);
    Ring<PACKS> ring((Pack*)((char*)shared + ring_at), ring_batches);
    Tensors tensors = {dy, x, y};
    Walk walk(blockIdx.x, channels, plane, count, chunk, tile);
    Partials to = {partials, channels, chunks};
    with_units(kept.scratch(), [&](Open& open) {
        BatchesOfTensors arriving = {tensors, Batches<3, PACKS>({dy, x, y}, ring, walk)};
        arriving.all.start();
        if (open.unit == 1) {
            for_channels(walk, [&](int place, int c) { keep_scale(kept, place, c, mean, invstd, weight); });
            __syncthreads();
        }
        sums_of_chunk(arriving, nullptr, open.unit, walk, kept, [&](int k, int, int c, const acc_t(&sums)[2]) {
            double back = inverse_of(open.unit);
            if (open.keep(k, is_finite(sums[0]) && is_finite(sums[1])))
                to.store(walk, c, sums[0] * back, sums[1] * back);
        });
        cp_async_wait<0>();
    });
    grid_barrier();
    Share share(walk);
    i64 c = share.channel;
    const volatile double *sums = partials + c * chunks, *dots = partials + (channels + c) * chunks;
    double sum = 0, dot = 0;
    share.of_chunks(chunks, [&](i64 k) { sum += sums[k], dot += dots[k]; });
    sum = share.sum(sum), dot = share.sum(dot);
    if (share.any && share.lane == 0) {
        keep_means(kept, share.place, sum, dot, count);
        if (walk.chunk == 0) store_gradients(dweight, dbias, c, sum, dot);
    }
    if (!dx) return;
    __syncthreads();
    BatchesOfTensors again = {tensors, Batches<3, PACKS>({dy, x, y}, ring, walk)};
    again.all.turn();
    backward_apply(again, kept, dx, walk);
}
