// Gradients of what follows conv_bn_pool (pooled_tail.cu): from dout to that of the convolution's output, and of all parameters on the way.
//
//     phat = (p - group_mean) group_invstd,  p = tanh(z),  xhat = (pooled - mean) invstd
//     g = dz at the pooled values, dy = weight invstd (g at the chosen corner - mean(g) - xhat mean(g xhat)) at all pixels
//
// with the means over all pixels of a channel, or left out where the statistics were running ones. Four steps:
//     pooled_backward                 g, and partial sums [5][images][channels] of dout, dout phat, g, g xhat and, of those finite, the largest |g|
//     pooled_parameter_gradients      sums of all images, and the exponent of a scale under which dy fits fp16
//     conv_output_gradient_cells      dy as scaled fp16 cells [N][CHUNKS][OUT_H OUT_W][64 halves], for tensor cores
//     conv_output_gradient            dy as scalar_t [N, OUT_CHANNELS, OUT_H, OUT_W], for the general convolution kernels
//
// Cells are those of fp16_cells.cuh without its XOR: 64 channels as fp16, or with SPLIT 2 32 channels and then what rounding left of
// them; channels past OUT_CHANNELS are zero. All values of a tensor are times 2^e, e the least of dy_exponents [channels].
//
// Threads: pooled_backward as pooled_tail.cuh has them. Read besides dout: pooled, taps, saved and the exponents of conv_bn_pool.cu, mean,
// invstd, group_mean, group_invstd. Macros: those of pooled_tail.cuh, saved_t (half_t, float), SPLIT (1 with half_t, 2 with float).
#define IN_CHANNELS OUT_CHANNELS  // what the convolution wrote is what dgrad reads
#include "pooled_tail.cuh"
#include "fp16_cells.cuh"
#include "tanh.cuh"

#define WINDOWS_W ((OUT_W + 1) / 2)
#define WINDOWS ((OUT_H + 1) / 2 * WINDOWS_W)

enum { SUMS = 5, LARGEST = 4 };  // partial sums, and which of them is a maximum

extern "C" __global__ void __launch_bounds__(32 * WARPS) pooled_backward(
    const scalar_t* __restrict__ dout, const float* __restrict__ pooled, const float* __restrict__ mean, const float* __restrict__ invstd,
    const param_t* __restrict__ weight, const param_t* __restrict__ bias, const param_t* __restrict__ group_weight,
    const float* __restrict__ group_mean, const float* __restrict__ group_invstd, float* __restrict__ g, float* __restrict__ partials,
    i64 images) {
    __shared__ float totals[SUMS][JOBS], weights[JOBS];  // of each job; its channel's group_weight
    int lane = threadIdx.x % 32, channel = blockIdx.x % GROUPS * MEMBERS;
    i64 start = (i64)blockIdx.x * SIZE;
    float m = group_mean[blockIdx.x], s = group_invstd[blockIdx.x];
    float pools[UNROLLED][ITEMS], gradients[UNROLLED][ITEMS], tanhs[UNROLLED][ITEMS];
    auto load = [&](const Job& job, float (&v)[ITEMS], float (&d)[ITEMS]) {
        job.load(pooled + start, v);
        job.load(dout + start, d);
    };
    if (RESIDENT)
        #pragma unroll
        for (int round = 0; round < UNROLLED; round++) {
            Job job(round);
            if (job.exists()) load(job, pools[round], gradients[round]);
        }
    #pragma unroll UNROLLED
    for (int round = 0; round < ROUNDS; round++) {
        Job job(round);
        if (!job.exists()) continue;
        float(&v)[ITEMS] = pools[RESIDENT ? round : 0], (&d)[ITEMS] = gradients[RESIDENT ? round : 0], (&p)[ITEMS] = tanhs[RESIDENT ? round : 0];
        if (!RESIDENT) load(job, v, d);
        Norm norm(mean, invstd, weight, bias, channel + job.member);
        float sum = 0, dot = 0;
        #pragma unroll
        for (int i = 0; i < ITEMS; i++) {
            p[i] = norm.tanh(v[i]);
            sum += d[i];
            dot += d[i] * bn_normalise(p[i], m, s);
        }
        sum = warp_sum(sum);
        dot = warp_sum(dot);
        if (lane == 0) totals[0][job.number] = sum, totals[1][job.number] = dot, weights[job.number] = bn_weight(group_weight, channel + job.member);
    }
    __syncthreads();
    float mean_d = 0, mean_dot = 0;
    for (int j = lane; j < JOBS; j += 32) mean_d += weights[j] * totals[0][j], mean_dot += weights[j] * totals[1][j];
    mean_d = warp_sum(mean_d) / SIZE;
    mean_dot = warp_sum(mean_dot) / SIZE;
    #pragma unroll UNROLLED
    for (int round = 0; round < ROUNDS; round++) {
        Job job(round);
        if (!job.exists()) continue;
        float(&v)[ITEMS] = pools[RESIDENT ? round : 0], (&d)[ITEMS] = gradients[RESIDENT ? round : 0], (&p)[ITEMS] = tanhs[RESIDENT ? round : 0];
        Norm norm(mean, invstd, weight, bias, channel + job.member);
        if (!RESIDENT) {
            load(job, v, d);
            #pragma unroll
            for (int i = 0; i < ITEMS; i++) p[i] = norm.tanh(v[i]);
        }
        float sum = 0, dot = 0, largest = 0, w = weights[job.number];
        #pragma unroll
        for (int i = 0; i < ITEMS; i++) {
            if (!job.inside(i)) continue;
            float v_g = s * (w * d[i] - (mean_d + bn_normalise(p[i], m, s) * mean_dot)) * tanh_slope(p[i]);
            g[start + job.offset(i)] = v_g;
            sum += v_g;
            dot += v_g * norm.normalise(v[i]);
            largest = fmaxf(largest, fabsf(finite_or_zero(v_g)));
        }
        sum = warp_sum(sum);
        dot = warp_sum(dot);
        largest = warp_max(largest);
        if (lane == 0) totals[2][job.number] = sum, totals[3][job.number] = dot, totals[LARGEST][job.number] = largest;
    }
    __syncthreads();
    i64 image = blockIdx.x / GROUPS;
    for (int i = threadIdx.x; i < SUMS * MEMBERS; i += 32 * WARPS) {
        int what = i / MEMBERS, member = i % MEMBERS;
        float total = totals[what][member * PARTS];
        for (int part = 1; part < PARTS; part++) {
            float other = totals[what][member * PARTS + part];
            total = what == LARGEST ? fmaxf(total, other) : total + other;
        }
        partials[(what * images + image) * OUT_CHANNELS + channel + member] = total;
    }
}

// One block a channel. sums [2][channels]: of g and g xhat. count: pixels of a channel. training: whether the batch's own statistics were
// applied. The gradients are null where not wanted.
//
// |xhat| is at most sqrt(count), since the sum of all xhat^2 is at most count; what `saved` keeps of a value is off by less than
// |value| <= |mean| + |xhat| / invstd, in all by less than a factor of 2, which 2^15 still lacks to fp16's largest.
extern "C" __global__ void __launch_bounds__(256) pooled_parameter_gradients(
    const float* __restrict__ partials, const float* __restrict__ mean, const float* __restrict__ invstd, const param_t* __restrict__ weight,
    float* __restrict__ sums, int* __restrict__ dy_exponents, param_t* __restrict__ dweight, param_t* __restrict__ dbias,
    param_t* __restrict__ dgroup_weight, param_t* __restrict__ dgroup_bias, param_t* __restrict__ dconv_bias, i64 images, float count,
    int training) {
    __shared__ float warps[SUMS][8];
    int c = blockIdx.x;
    float total[SUMS] = {};
    for (i64 image = threadIdx.x; image < images; image += 256)
        #pragma unroll
        for (int i = 0; i < SUMS; i++) {
            float v = partials[(i * images + image) * OUT_CHANNELS + c];
            total[i] = i == LARGEST ? fmaxf(total[i], v) : total[i] + v;
        }
    #pragma unroll
    for (int i = 0; i < SUMS; i++) {
        float v = i == LARGEST ? warp_max(total[i]) : warp_sum(total[i]);
        if (threadIdx.x % 32 == 0) warps[i][threadIdx.x / 32] = v;
    }
    __syncthreads();
    if (threadIdx.x) return;
    #pragma unroll
    for (int i = 0; i < SUMS; i++) {
        total[i] = 0;
        for (int w = 0; w < 8; w++) total[i] = i == LARGEST ? fmaxf(total[i], warps[i][w]) : total[i] + warps[i][w];
    }
    float scale = bn_weight(weight, c) * invstd[c];
    sums[c] = total[2], sums[OUT_CHANNELS + c] = total[3];
    if (dgroup_bias) dgroup_bias[c] = from_acc<param_t>(total[0]);
    if (dgroup_weight) dgroup_weight[c] = from_acc<param_t>(total[1]);
    if (dbias) dbias[c] = from_acc<param_t>(total[2]);
    if (dweight) dweight[c] = from_acc<param_t>(total[3]);
    // Batch norm takes the bias out of its own batch, so there it has no influence at all.
    if (dconv_bias) dconv_bias[c] = from_acc<param_t>(training ? 0 : scale * total[2]);

    float bound = total[LARGEST], means = 0;
    if (training) {
        means = fabsf(total[2] / count) + fabsf(total[3] / count) + fabsf(mean[c]);
        bound += fabsf(total[2] / count) + (sqrt(count) + fabsf(mean[c] * invstd[c])) * fabsf(total[3] / count);
    }
    // A channel of zeros, or without a finite dy, must not decide the scale of the others.
    int exponent = 126;
    if (scale != 0 && bound > 0 && scale - scale == 0 && means - means == 0) {
        const unsigned largest = 0x7F7FFFFF;
        unsigned v = finite_magnitude(bound), dy = finite_magnitude(multiply_unflushed(bound, fabsf(scale)));
        // The second keeps g in range between the multiplications by 2^e and by `scale`.
        exponent = min(scale_exponent(dy ? dy : largest), 112 + scale_exponent(v ? v : largest));
    }
    dy_exponents[c] = exponent;
}

// dy of one channel, but for the factor `scale`.
struct OutputGradient {
    float mean, invstd, mean_g, mean_dot, scale;
    bool training;

    __device__ OutputGradient(const float* means, const float* invstds, const param_t* weights, const float* sums, float count, int c)
        : mean(means[c]), invstd(invstds[c]), mean_g(sums ? sums[c] / count : 0), mean_dot(sums ? sums[OUT_CHANNELS + c] / count : 0),
          scale(bn_weight(weights, c) * invstd), training(sums) {}
    __device__ float operator()(float y, float chosen) const {
        return training ? chosen - (mean_g + bn_normalise(y, mean, invstd) * mean_dot) : chosen;
    }
};

// A 2x2 window: its place among the pooled values, or -1 at an odd edge, and the exponent of the scale of its saved values.
struct Window {
    int row, column, pooled, exponent;

    __device__ Window(int window, i64 image, const int* unit_exponents, int unit_windows, int shift)
        : row(window / WINDOWS_W), column(window % WINDOWS_W) {
        pooled = row < OUT_H / 2 && column < POOLED_W ? row * POOLED_W + column : -1;
        exponent = SPLIT == 1 ? unit_exponents[image * ((WINDOWS + unit_windows - 1) / unit_windows) + window / unit_windows] - shift : 0;
    }
};

// A block turns a tile of 32 SPLIT windows and one chunk of channels into cells. A thread computes eight channels of a window, whose
// 16 bytes of four cells meet those of the other threads in shared memory.
extern "C" __global__ void __launch_bounds__(256) conv_output_gradient_cells(
    const float* __restrict__ g, const u8* __restrict__ taps, const saved_t* __restrict__ saved, const int* __restrict__ exponents,
    const int* __restrict__ unit_exponents, const float* __restrict__ mean, const float* __restrict__ invstd,
    const param_t* __restrict__ weight, const float* __restrict__ sums, const int* __restrict__ dy_exponents, half_t* __restrict__ cells,
    int unit_windows, int shift, float count) {
    enum { TILE = 32 * SPLIT, TILES = (WINDOWS + TILE - 1) / TILE, PARTS_OF_8 = CHUNK_CHANNELS / 8 };
    struct __align__(16) Channel { OutputGradient gradient; int exponent; };
    __shared__ __align__(16) u8 shared[TILE * 4 * CELL_BYTES];  // cell corner * TILE + window: neighbouring lanes write to different banks
    __shared__ __align__(16) u8 channels[CHUNK_CHANNELS * sizeof(Channel)];
    int tile = blockIdx.x % TILES, chunk = blockIdx.x / TILES % CHUNKS, lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    i64 image = blockIdx.x / (TILES * CHUNKS);
    int place = warp / PARTS_OF_8 * 32 + lane, part = warp % PARTS_OF_8, c = chunk * CHUNK_CHANNELS + part * 8;
    bool real = tile * TILE + place < WINDOWS && (OUT_CHANNELS % CHUNK_CHANNELS == 0 || c < OUT_CHANNELS);
    Window window(min(tile * TILE + place, WINDOWS - 1), image, unit_exponents, unit_windows, shift);

    Packed<saved_t, 4> kept[8];
    float chosen[8];
    int tap[8];
    i64 plane = image * OUT_CHANNELS + c;
    #pragma unroll
    for (int j = 0; j < 8; j++) {
        kept[j] = Packed<saved_t, 4>();
        chosen[j] = 0;
        tap[j] = -1;
        if (real && sums) kept[j] = ((const Packed<saved_t, 4>*)saved)[(plane + j) * WINDOWS + tile * TILE + place];
        if (real && window.pooled >= 0) {
            chosen[j] = g[(plane + j) * PLANE + window.pooled];
            tap[j] = taps[(plane + j) * PLANE + window.pooled];
        }
    }
    int least = 126;
    for (int i = lane; i < OUT_CHANNELS; i += 32) least = min(least, dy_exponents[i]);
    for (int lanes = 16; lanes > 0; lanes >>= 1) least = min(least, __shfl_xor_sync(0xFFFFFFFFu, least, lanes));
    float enlarge = power_of_two(least);
    if (threadIdx.x < CHUNK_CHANNELS && chunk * CHUNK_CHANNELS + threadIdx.x < OUT_CHANNELS) {
        int own = chunk * CHUNK_CHANNELS + threadIdx.x;
        ((Channel*)channels)[threadIdx.x] = {OutputGradient(mean, invstd, weight, sums, count, own), SPLIT == 1 ? exponents[own] : 0};
    }
    __syncthreads();

    float v[4][8] = {};
    if (real)
        #pragma unroll
        for (int j = 0; j < 8; j++) {
            Channel channel = ((const Channel*)channels)[part * 8 + j];
            ScaleBack restore(channel.exponent + window.exponent);
            #pragma unroll
            for (int corner = 0; corner < 4; corner++) {
                float y = SPLIT == 1 ? restore(to_acc(kept[j].v[corner])) : to_acc(kept[j].v[corner]);
                v[corner][j] = multiply_unflushed(channel.gradient(y, corner == tap[j] ? chosen[j] : 0), enlarge) * channel.gradient.scale;
            }
        }
    #pragma unroll
    for (int corner = 0; corner < 4; corner++) store_cell(shared, corner * TILE + place, part, v[corner]);
    __syncthreads();

    uint4* to = (uint4*)cells + (image * CHUNKS + chunk) * (OUT_H * OUT_W * 8);
    #pragma unroll
    for (int i = threadIdx.x; i < TILE * 4 * 8; i += 256) {
        int w = i / 16 % TILE, corner = i / (TILE * 16) * 2 + i / 8 % 2, at = tile * TILE + w;
        int h = at / WINDOWS_W * 2 + corner / 2, column = at % WINDOWS_W * 2 + corner % 2;
        if (at < WINDOWS && h < OUT_H && column < OUT_W)
            to[(h * OUT_W + column) * 8 + i % 8] = *(const uint4*)(shared + cell_offset(corner * TILE + w, i % 8));
    }
}

// A thread computes one window.
extern "C" __global__ void __launch_bounds__(256) conv_output_gradient(
    const float* __restrict__ g, const u8* __restrict__ taps, const saved_t* __restrict__ saved, const int* __restrict__ exponents,
    const int* __restrict__ unit_exponents, const float* __restrict__ mean, const float* __restrict__ invstd,
    const param_t* __restrict__ weight, const float* __restrict__ sums, scalar_t* __restrict__ dy, int unit_windows, int shift,
    float count) {
    int at = blockIdx.y * blockDim.x + threadIdx.x, c = blockIdx.x % OUT_CHANNELS;
    i64 plane = blockIdx.x;
    if (at >= WINDOWS) return;
    Window window(at, plane / OUT_CHANNELS, unit_exponents, unit_windows, shift);
    OutputGradient gradient(mean, invstd, weight, sums, count, c);
    ScaleBack restore(SPLIT == 1 ? exponents[c] + window.exponent : 0);
    float chosen = window.pooled < 0 ? 0 : g[plane * PLANE + window.pooled];
    int tap = window.pooled < 0 ? -1 : taps[plane * PLANE + window.pooled];
    Packed<saved_t, 4> kept = {};
    if (sums) kept = ((const Packed<saved_t, 4>*)saved)[plane * WINDOWS + at];
    #pragma unroll
    for (int corner = 0; corner < 4; corner++) {
        int h = window.row * 2 + corner / 2, w = window.column * 2 + corner % 2;
        if (h >= OUT_H || w >= OUT_W) continue;
        float v = gradient(restore(to_acc(kept.v[corner])), corner == tap ? chosen : 0) * gradient.scale;
        dy[(plane * OUT_H + h) * OUT_W + w] = from_acc<scalar_t>(v);
    }
}
