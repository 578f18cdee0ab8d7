// What follows conv_bn_pool in the forward: statistics of the batch, then batch norm, activation and group norm over
// the pooled sums.
//
//     z = (pooled - mean) invstd weight + bias,  p = activation(z),
//     out = (p - group_mean) group_invstd group_weight + group_bias
//
// `pooled`, `mean` and all sums are without the convolution's bias. conv_bn_statistics: one block a channel.
// pooled_forward: one block a group of one image, threads and macros as in pooled_tail.cuh. Saved for the backward:
// mean, invstd, group_mean, group_invstd.
//
// Macro: STATISTICS (1: the batch's, of conv_bn_statistics; 0: the running ones, from which pooled_forward makes mean
// and invstd).
#include "pooled_tail.cuh"

// partials [3][channels][units]: count, mean and sum of squared distances of each unit, as conv_bn_pool writes them.
// The running statistics are updated where not null, and so is `batches`, which counts calls.
extern "C" __global__ void __launch_bounds__(THREADS) conv_bn_statistics(
    const float* __restrict__ partials, const param_t* __restrict__ conv_bias, INOUT param_t* running_mean,
    INOUT param_t* running_var, INOUT i64* batches, float* __restrict__ mean, float* __restrict__ invstd,
    float momentum, float eps, int channels, i64 units) {
    wait_for_earlier_kernels();
    __shared__ float scratch[32];
    int c = blockIdx.x;
    const float *counts = partials + c * units, *means = counts + channels * units, *squares = means + channels * units;
    float unit = 1, origin, count, total, m2;
    do {
        origin = finite_or_zero(means[0]) * unit;  // rounding errors of a large mean must not enter the variance
        count = total = m2 = 0;
        for (i64 i = threadIdx.x; i < units; i += blockDim.x)
            count += counts[i], total += counts[i] * (means[i] * unit - origin);
        count = block_sum(count, scratch);
        total = block_sum(total, scratch) / count;
        for (i64 i = threadIdx.x; i < units; i += blockDim.x) {
            float distance = means[i] * unit - origin - total;
            double square = squares[i] < 0 ? squares[i] * -0x1p160 : squares[i];
            m2 += (float)(square * unit * unit) + counts[i] * distance * distance;
        }
        m2 = block_sum(m2, scratch);
    } while (again(m2, unit));
    if (threadIdx.x) return;
    if (batches && c == 0) ++*batches;
    if (running_mean) running_mean += c, running_var += c;
    store_statistics(
        {total + origin, m2}, unit, count, eps, mean + c, invstd + c, running_mean, running_var, momentum,
        bn_bias(conv_bias, c));
}

extern "C" __global__ void __launch_bounds__(32 * WARPS) pooled_forward(
    const pooled_t* __restrict__ pooled, const int* __restrict__ exponents, const int* __restrict__ unit_exponents,
    INOUT float* __restrict__ mean, INOUT float* __restrict__ invstd, const param_t* __restrict__ conv_bias,
    const param_t* __restrict__ running_mean, const param_t* __restrict__ running_var,
    const param_t* __restrict__ weight, const param_t* __restrict__ bias, const param_t* __restrict__ group_weight,
    const param_t* __restrict__ group_bias, scalar_t* __restrict__ out, float* __restrict__ group_mean,
    float* __restrict__ group_invstd, float eps, float group_eps, float parameter) {
    wait_for_earlier_kernels();
    __shared__ float means[JOBS], squares[JOBS];  // mean, and sum of squared distances from it, of each job's values
    __shared__ float running[2][STATISTICS ? 1 : MEMBERS];
    __shared__ __align__(16) scalar_t turned[TURNED ? PLANE * TURN_PITCH : 1];
    Activation activation(parameter);
    int lane = threadIdx.x % 32, channel = blockIdx.x % GROUPS * MEMBERS;
    scalar_t* to = out + start_of_block(channel);
    __shared__ Pooled::Places places;
    Pooled source(pooled, exponents, unit_exponents, channel, places);
    float values[UNROLLED][ITEMS];
    const float *channel_mean = STATISTICS ? mean + channel : running[0],
                *channel_invstd = STATISTICS ? invstd + channel : running[1];
    if (RESIDENT)
        #pragma unroll
        for (int round = 0; round < UNROLLED; round++) {
            Job job(round);
            if (job.exists()) source.load(job, values[round]);
        }
    if (!STATISTICS) {
        for (int m = threadIdx.x; m < MEMBERS; m += blockDim.x) {
            int c = channel + m;
            running[0][m] = to_acc(running_mean[c]) - bn_bias(conv_bias, c);
            running[1][m] = 1 / sqrt(to_acc(running_var[c]) + eps);
            // One image does, for a backward.
            if (blockIdx.x < GROUPS) mean[c] = running[0][m], invstd[c] = running[1][m];
        }
        __syncthreads();
    }
    auto activate = [&](const Job& job, float (&v)[ITEMS]) {
        Norm norm(channel_mean[job.member], channel_invstd[job.member], weight, bias, channel + job.member);
        if (!RESIDENT) source.load(job, v);
        #pragma unroll
        for (int i = 0; i < ITEMS; i++) v[i] = activation.of(norm(v[i]));
    };
    #pragma unroll UNROLLED
    for (int round = 0; round < ROUNDS; round++) {
        Job job(round);
        if (!job.exists()) continue;
        float (&v)[ITEMS] = values[RESIDENT ? round : 0];
        activate(job, v);
        float m = 0, s = 0;
        #pragma unroll
        for (int i = 0; i < ITEMS; i++) m += job.inside(i) ? v[i] : 0;
        m = warp_sum(m) / values_in(job.number);
        #pragma unroll
        for (int i = 0; i < ITEMS; i++) s += job.inside(i) ? (v[i] - m) * (v[i] - m) : 0;
        s = warp_sum(s);
        if (lane == 0) means[job.number] = m, squares[job.number] = s;
    }
    __syncthreads();
    float m = 0, s = 0;
    for (int j = lane; j < JOBS; j += 32) m += means[j] * values_in(j);
    m = warp_sum(m) / SIZE;
    for (int j = lane; j < JOBS; j += 32) s += squares[j] + (means[j] - m) * (means[j] - m) * values_in(j);
    s = 1 / sqrt(warp_sum(s) / SIZE + group_eps);
    if (threadIdx.x == 0) group_mean[blockIdx.x] = m, group_invstd[blockIdx.x] = s;
    #pragma unroll UNROLLED
    for (int round = 0; round < ROUNDS; round++) {
        Job job(round);
        if (!job.exists()) continue;
        float (&v)[ITEMS] = values[RESIDENT ? round : 0];
        if (!RESIDENT) activate(job, v);
        float w = bn_weight(group_weight, channel + job.member), b = bn_bias(group_bias, channel + job.member);
        #pragma unroll
        for (int i = 0; i < ITEMS; i++) v[i] = bn_affine((v[i] - m) * s, w, b);
        job.store(TURNED ? turned : to, v);
    }
    if (TURNED) {
        __syncthreads();
        enum { AT_ONCE = TURNED_TOGETHER == 2 && MEMBERS % 8 == 0 && OUT_CHANNELS % 8 == 0 ? 8 : TURNED_TOGETHER };
        for_turned<AT_ONCE>([&](int at, int outside) {
            Packed<Together, AT_ONCE / TURNED_TOGETHER> together;
            #pragma unroll
            for (int i = 0; i < AT_ONCE / TURNED_TOGETHER; i++)
                together.v[i] = *(const Together*)(turned + at + i * TURNED_TOGETHER);
            store_at_once(to + outside, *(const Packed<scalar_t, AT_ONCE>*)&together);
        });
    }
}
