// Batch norm whose statistics are those of the batches of several processes (ranks).
//
// Each rank has mean and invstd of its own batch (batch_norm.cu, pooled_tail.cu; with eps 0, so that invstd alone says
// what the variance is). It sends a message, double [2 channels + 1]: means, variances, and how many values of a
// channel it has, which may be none. All ranks get all messages and combine them in the same order, by Chan's formula,
// in double. In the backward each rank sends its sums of g and of g xhat, double [2][channels].
//
// `share`, one double, is the rank's part of all values. Sums of all ranks times `share` are what the kernels of one
// process divide by their own count.
//
// Threads: one a channel. Macros: scalar_t, acc_t, param_t (running statistics, bias), THREADS.
#include "batch_norm.cuh"

// The variance of which invstd is the inverse root; invstd may be a denormal.
__device__ inline double variance_of(acc_t invstd) {
    acc_t lift = sizeof(acc_t) == 4 && invstd < 1 ? (acc_t)0x1p64f : (acc_t)1;
    double inverse = (double)multiply_unflushed(invstd, lift) / lift;
    return 1 / (inverse * inverse);
}

// v, which may be a denormal of acc_t.
__device__ inline acc_t narrowed(double v) {
    if (sizeof(acc_t) == 8) return (acc_t)v;
    return v < 1 ? multiply_unflushed((acc_t)(v * 0x1p64), (acc_t)0x1p-64f) : (acc_t)v;
}

// shift: what the values have that mean has not, the convolution's bias; may be null.
extern "C" __global__ void __launch_bounds__(THREADS) sync_message(
    const acc_t* __restrict__ mean, const acc_t* __restrict__ invstd, const param_t* __restrict__ shift,
    double* __restrict__ message, i64 channels, i64 count) {
    wait_for_earlier_kernels();
    i64 c = (i64)blockIdx.x * blockDim.x + threadIdx.x;
    if (c == 0) message[2 * channels] = count;
    if (c >= channels) return;
    message[c] = count ? (double)mean[c] + (double)bn_bias(shift, c) : 0;
    message[channels + c] = count ? variance_of(invstd[c]) : 0;
}

// messages [ranks][2 channels + 1], of which `own` is the rank's. Writes what the batch is normalised by, mean without
// `shift`; share; and distance, the mean of the rank's own xhat. The running statistics are updated where not null, and
// so is `batches`, which counts calls. Without any values nothing is learnt, and nothing will be normalised.
extern "C" __global__ void __launch_bounds__(THREADS) sync_statistics(
    const double* __restrict__ messages, const double* __restrict__ own, INOUT param_t* running_mean,
    INOUT param_t* running_var, INOUT i64* batches, const param_t* __restrict__ shift, acc_t* __restrict__ mean,
    acc_t* __restrict__ invstd, acc_t* __restrict__ distance, double* __restrict__ share, acc_t momentum, acc_t eps,
    i64 channels, i64 ranks) {
    wait_for_earlier_kernels();
    i64 c = (i64)blockIdx.x * blockDim.x + threadIdx.x, length = 2 * channels + 1;
    if (c >= channels) return;
    double count = 0, m = 0, m2 = 0;
    for (i64 rank = 0; rank < ranks; rank++) {
        const double* message = messages + rank * length;
        double n = message[2 * channels];
        if (n == 0) continue;
        double step = message[c] - m, before = count;
        count += n;
        m += step * (n / count);
        m2 += message[channels + c] * n + step * step * (n * before / count);
    }
    if (c == 0) *share = count ? own[2 * channels] / count : 0;
    if (batches && c == 0) ++*batches;
    if (count == 0) {
        mean[c] = invstd[c] = distance[c] = 0;
        return;
    }
    double inverse = 1 / sqrt(m2 / count + eps);
    mean[c] = (acc_t)(m - bn_bias(shift, c));
    invstd[c] = narrowed(inverse);
    distance[c] = own[2 * channels] ? (acc_t)((own[c] - m) * inverse) : 0;
    if (!running_mean) return;
    double keep = 1 - (double)momentum, learn = momentum;
    running_mean[c] = from_acc<param_t>((acc_t)(keep * to_acc(running_mean[c]) + learn * m));
    running_var[c] = from_acc<param_t>((acc_t)(keep * to_acc(running_var[c]) + learn * (m2 / (count - 1))));
}

// gathered [ranks][2][channels]: sums of g and of g xhat. sums [2][channels]: those of all ranks, times share.
extern "C" __global__ void __launch_bounds__(THREADS) sync_sums(
    const double* __restrict__ gathered, const double* __restrict__ share, double* __restrict__ sums, i64 channels,
    i64 ranks) {
    wait_for_earlier_kernels();
    i64 i = (i64)blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= 2 * channels) return;
    double sum = 0;
    for (i64 rank = 0; rank < ranks; rank++) sum += gathered[rank * 2 * channels + i];
    sums[i] = sum * *share;
}
