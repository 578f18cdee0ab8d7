// Batch norm over x [images, channels, plane]: statistics per channel, y = (x - mean) invstd weight + bias or tanh of
// that, and the gradients.
//
// Thread mapping: channel_walk.cuh. If a block has all values of its channels, one kernel does everything:
// batch_norm_forward, batch_norm_backward. Otherwise there are three steps. Each block writes two partial results to
// partials [2][channels][chunks], double. Then one block for each channel combines them. Then another kernel applies
// the results; it takes chunks in reverse order, because the last ones are still in the L2 cache. The order and the
// chunks depend only on shape and dtype.
//
// Saved for the backward: mean and invstd = 1/sqrt(variance + eps), both acc_t [channels], x, and y with tanh.
// dx = weight invstd (g - sum(g)/count - xhat sum(g xhat)/count), where xhat = (x - mean) invstd, g = dy, or dy (1 -
// y^2) with tanh; with given (running) statistics dx = weight invstd g.
//
// Macros: those of channel_walk.cuh, param_t (weight, bias and their gradients; running statistics), THREADS (the most
// of a block of the kernels that have chunks), WHOLE_THREADS (of those that have whole channels). Whether there is a
// tanh is a run-time argument: its branch is uniform and the kernels wait for memory, so that it costs less than twice
// as many variants would.
#include "batch_norm_chunk.cuh"

enum { BLOCKS = 2 };  // of an SM, at least
#if __CUDA_ARCH__ >= 900
enum { PARTIALS_BLOCKS = sizeof(acc_t) == 8 ? 3 : 4 };
#else
enum { PARTIALS_BLOCKS = 3 };  // for older GPUs ptxas needs more registers
#endif

// partials: mean, and squares, of each chunk.
extern "C" __global__ void __launch_bounds__(THREADS, PARTIALS_BLOCKS) batch_norm_partials(
    const scalar_t* __restrict__ x, double* __restrict__ partials, i64 channels, i64 plane, i64 count, i64 chunk,
    i64 chunks, int tile) {
    wait_for_earlier_kernels();
    DYNAMIC_SHARED(acc_t, shared);
    Kept kept(shared, tile);
    with_units(kept.scratch(), [&](Open& open) {
        Walk walk(blockIdx.x, channels, plane, count, chunk, tile);
        Partials to = {partials, channels, chunks};
        moments_of_chunk(x, open.unit, walk, kept.scratch(), [&](int k, int, int channel, ChunkMoments moments) {
            double back = inverse_of(open.unit);
            if (open.keep(k, is_finite(moments.squares)))
                to.store(walk, channel, moments.mean * back, moments.squares * back * back);
        });
    });
}

// One block a channel: combines the chunks; updates the running statistics where they are not null, and so is
// `batches`, which counts calls.
extern "C" __global__ void __launch_bounds__(THREADS) batch_norm_statistics(
    const double* __restrict__ partials, const double* __restrict__ counts, INOUT param_t* running_mean,
    INOUT param_t* running_var, INOUT i64* batches, acc_t* __restrict__ mean, acc_t* __restrict__ invstd,
    acc_t momentum, acc_t eps, i64 channels, i64 count, i64 chunk, i64 chunks) {
    wait_for_earlier_kernels();
    __shared__ double scratch[32];
    i64 channel = blockIdx.x;
    if (batches && channel == 0 && threadIdx.x == 0) ++*batches;
    const double* means = partials + channel * chunks;
    const double* m2s = partials + (channels + channel) * chunks;
    if (count == 0) {  // nothing to learn from an empty batch, and nothing will be normalised
        if (threadIdx.x == 0) mean[channel] = invstd[channel] = 0;
        return;
    }
    Moments moments;
    acc_t unit = moments_of_channel(moments, means, m2s, {counts, count, chunk}, chunks, scratch);
    if (threadIdx.x) return;
    if (running_mean) running_mean += channel, running_var += channel;
    store_statistics(
        moments, unit, count, eps, mean + channel, invstd + channel, running_mean, running_var, momentum, 0);
}

// One thread a channel: mean and invstd from the running statistics.
extern "C" __global__ void __launch_bounds__(THREADS) batch_norm_eval_statistics(
    const param_t* __restrict__ running_mean, const param_t* __restrict__ running_var, acc_t* __restrict__ mean,
    acc_t* __restrict__ invstd, acc_t eps, i64 channels) {
    wait_for_earlier_kernels();
    i64 channel = (i64)blockIdx.x * blockDim.x + threadIdx.x;
    if (channel >= channels) return;
    mean[channel] = to_acc(running_mean[channel]);
    invstd[channel] = 1 / sqrt(to_acc(running_var[channel]) + eps);
}

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS) batch_norm_apply(
    const scalar_t* __restrict__ x, const acc_t* __restrict__ mean, const acc_t* __restrict__ invstd,
    const param_t* __restrict__ weight, const param_t* __restrict__ bias, scalar_t* __restrict__ y, int with_tanh,
    i64 channels, i64 plane, i64 count, i64 chunk, int tile) {
    wait_for_earlier_kernels();
    DYNAMIC_SHARED(acc_t, shared);
    Kept kept(shared, tile);
    Walk walk(gridDim.x - 1 - blockIdx.x, channels, plane, count, chunk, tile);
    for_channels(walk, [&](int place, int c) { keep_channel(kept, place, c, mean[c], invstd[c], weight, bias); });
    __syncthreads();
    apply(x, y, with_tanh, walk, kept);
}

// With the running statistics, which it writes to mean and invstd, too, as the backward needs them.
extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS) batch_norm_eval(
    const scalar_t* __restrict__ x, const param_t* __restrict__ running_mean, const param_t* __restrict__ running_var,
    const param_t* __restrict__ weight, const param_t* __restrict__ bias, scalar_t* __restrict__ y,
    acc_t* __restrict__ mean, acc_t* __restrict__ invstd, acc_t eps, int with_tanh, i64 channels, i64 plane, i64 count,
    i64 chunk, int tile) {
    wait_for_earlier_kernels();
    DYNAMIC_SHARED(acc_t, shared);
    Kept kept(shared, tile);
    Walk walk(blockIdx.x, channels, plane, count, chunk, tile);
    for_channels(walk, [&](int place, int c) {
        acc_t m = to_acc(running_mean[c]), i = 1 / sqrt(to_acc(running_var[c]) + eps);
        keep_channel(kept, place, c, m, i, weight, bias);
        if (walk.chunk == 0) mean[c] = m, invstd[c] = i;
    });
    __syncthreads();
    apply(x, y, with_tanh, walk, kept);
}

// Statistics, and where y is not null the result, of blocks that have whole channels.
extern "C" __global__ void __launch_bounds__(WHOLE_THREADS, 1) batch_norm_forward(
    const scalar_t* __restrict__ x, INOUT param_t* running_mean, INOUT param_t* running_var, INOUT i64* batches,
    const param_t* __restrict__ weight, const param_t* __restrict__ bias, scalar_t* __restrict__ y,
    acc_t* __restrict__ mean, acc_t* __restrict__ invstd, acc_t momentum, acc_t eps, int with_tanh, i64 channels,
    i64 plane, i64 count, i64 chunk, int tile) {
    wait_for_earlier_kernels();
    DYNAMIC_SHARED(acc_t, shared);
    Kept kept(shared, tile);
    if (batches && blockIdx.x == 0 && threadIdx.x == 0) ++*batches;
    for_channels(Walk(blockIdx.x, channels, plane, count, chunk, tile), [&](int, int c) {
        prefetch(running_mean, c), prefetch(running_var, c), prefetch(weight, c), prefetch(bias, c);
    });
    with_units(kept.scratch(), [&](Open& open) {
        Walk walk(blockIdx.x, channels, plane, count, chunk, tile);
        moments_of_chunk(x, open.unit, walk, kept.scratch(), [&](int k, int place, int c, ChunkMoments moments) {
            if (!open.keep(k, is_finite(moments.squares))) return;
            Moments found = {(acc_t)moments.mean, moments.squares};
            acc_t unit = without_unit(found, open.unit);
            param_t *to_mean = running_mean ? running_mean + c : running_mean,
                    *to_var = running_mean ? running_var + c : running_var;
            store_statistics(found, unit, count, eps, mean + c, invstd + c, to_mean, to_var, momentum, 0);
            acc_t batch_invstd = invstd_of(found.squares / count, unit, eps);
            keep_channel(kept, place, c, found.mean * inverse_of(unit), batch_invstd, weight, bias);
        });
    });
    if (y) apply(x, y, with_tanh, Walk(blockIdx.x, channels, plane, count, chunk, tile), kept);
}

// partials: sums of each chunk. y is null without tanh; dx is null where the statistics depend on x, or nobody needs
// it.
extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS) batch_norm_backward_partials(
    const scalar_t* __restrict__ dy, const scalar_t* __restrict__ x, const scalar_t* __restrict__ y,
    const acc_t* __restrict__ mean, const acc_t* __restrict__ invstd, const param_t* __restrict__ weight,
    double* __restrict__ partials, scalar_t* __restrict__ dx, i64 channels, i64 plane, i64 count, i64 chunk, i64 chunks,
    int tile) {
    wait_for_earlier_kernels();
    DYNAMIC_SHARED(acc_t, shared);
    Kept kept(shared, tile);
    for_channels(Walk(blockIdx.x, channels, plane, count, chunk, tile), [&](int place, int c) {
        keep_scale(kept, place, c, mean, invstd, weight);
    });
    __syncthreads();
    with_units(kept.scratch(), [&](Open& open) {
        Walk walk(blockIdx.x, channels, plane, count, chunk, tile);
        Partials to = {partials, channels, chunks};
        sums_of_chunk(Tensors{dy, x, y}, dx, open.unit, walk, kept, [&](int k, int, int c, const acc_t(&sums)[2]) {
            double back = inverse_of(open.unit);
            if (open.keep(k, is_finite(sums[0]) && is_finite(sums[1])))
                to.store(walk, c, sums[0] * back, sums[1] * back);
        });
    });
}

// One block a channel: sums [2][channels] over the chunks.
extern "C" __global__ void __launch_bounds__(THREADS) batch_norm_backward_sums(
    const double* __restrict__ partials, double* __restrict__ sums, param_t* __restrict__ dweight,
    param_t* __restrict__ dbias, i64 channels, i64 chunks) {
    wait_for_earlier_kernels();
    __shared__ double scratch[32];
    i64 channel = blockIdx.x;
    double sum = 0, dot = 0;
    for (i64 k = threadIdx.x; k < chunks; k += blockDim.x) {
        sum += partials[channel * chunks + k];
        dot += partials[(channels + channel) * chunks + k];
    }
    sum = block_sum(sum, scratch);
    dot = block_sum(dot, scratch);
    if (threadIdx.x) return;
    sums[channel] = sum;
    sums[channels + channel] = dot;
    store_gradients(dweight, dbias, channel, sum, dot);
}

// sums: of the batch where its own statistics were applied, null where given ones were: then x is not read.
extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS) batch_norm_backward_apply(
    const scalar_t* __restrict__ dy, const scalar_t* __restrict__ x, const scalar_t* __restrict__ y,
    const acc_t* __restrict__ mean, const acc_t* __restrict__ invstd, const param_t* __restrict__ weight,
    const double* __restrict__ sums, scalar_t* __restrict__ dx, i64 channels, i64 plane, i64 count, i64 chunk,
    int tile) {
    wait_for_earlier_kernels();
    DYNAMIC_SHARED(acc_t, shared);
    Kept kept(shared, tile);
    Walk walk(gridDim.x - 1 - blockIdx.x, channels, plane, count, chunk, tile);
    for_channels(walk, [&](int place, int c) {
        keep_scale(kept, place, c, mean, invstd, weight);
        keep_means(kept, place, sums ? sums[c] : 0, sums ? sums[channels + c] : 0, count);
    });
    __syncthreads();
    backward_apply(Tensors{dy, sums ? x : nullptr, y}, kept, dx, walk);
}

// All gradients, of blocks that have whole channels, through the batch's statistics. dx, dweight and dbias may be null.
extern "C" __global__ void __launch_bounds__(WHOLE_THREADS, 1) batch_norm_backward(
    const scalar_t* __restrict__ dy, const scalar_t* __restrict__ x, const scalar_t* __restrict__ y,
    const acc_t* __restrict__ mean, const acc_t* __restrict__ invstd, const param_t* __restrict__ weight,
    scalar_t* __restrict__ dx, param_t* __restrict__ dweight, param_t* __restrict__ dbias, i64 channels, i64 plane,
    i64 count, i64 chunk, int tile) {
    wait_for_earlier_kernels();
    DYNAMIC_SHARED(acc_t, shared);
    Kept kept(shared, tile);
    Tensors tensors = {dy, x, y};
    for_channels(Walk(blockIdx.x, channels, plane, count, chunk, tile), [&](int place, int c) {
        keep_scale(kept, place, c, mean, invstd, weight);
    });
    __syncthreads();
    with_units(kept.scratch(), [&](Open& open) {
        Walk walk(blockIdx.x, channels, plane, count, chunk, tile);
        sums_of_chunk(tensors, nullptr, open.unit, walk, kept, [&](int k, int place, int c, const acc_t(&sums)[2]) {
            if (!open.keep(k, is_finite(sums[0]) && is_finite(sums[1]))) return;
            double back = inverse_of(open.unit), sum = sums[0] * back, dot = sums[1] * back;
            keep_means(kept, place, sum, dot, count);
            store_gradients(dweight, dbias, c, sum, dot);
        });
    });
    if (dx) backward_apply(tensors, kept, dx, Walk(blockIdx.x, channels, plane, count, chunk, tile));
}
