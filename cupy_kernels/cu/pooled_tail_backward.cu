// Gradients of what follows conv_bn_pool (pooled_tail.cu): from dout to that of the convolution's output, and of all
// parameters on the way.
//
//     phat = (p - group_mean) group_invstd,  p = activation(z),  xhat = (pooled - mean) invstd
//     g = dz at the pooled values
//     dy = weight invstd (g at the chosen corner - mean(g) - xhat mean(g xhat)) at all pixels
//
// with the means over all pixels of a channel, or left out where the statistics were running ones. Four steps:
//     pooled_backward             g, and partial sums [5][images][channels] of dout, dout phat, g, g xhat and, of those
//                                 finite, the largest |g|
//     pooled_parameter_gradients  sums of all images, and the exponent of a scale under which dy fits fp16
//     conv_output_gradient_packed dy as scaled, packed fp16 tiles [N][CHUNKS][OUT_H OUT_W][64 halves], for tensor
//                                 cores; for the gradient of the convolution's weight also its x, and, where that is
//                                 centred, sums of dy at its borders
//     conv_output_gradient        dy as scalar_t [N, OUT_CHANNELS, OUT_H, OUT_W], for the general convolution kernels
//
// Packed tiles are those of fp16_tiles.cu; channels past OUT_CHANNELS are zero. All values of a tensor are times 2^e, e
// the least of dy_exponents [channels].
//
// Threads: pooled_backward as pooled_tail.cuh has them. Read besides dout: pooled, argmax, saved and the exponents of
// conv_bn_pool.cu, mean, invstd, group_mean, group_invstd. Macros: those of pooled_tail.cuh and fp16_tiles.cuh, saved_t
// (half_t with SPLIT 1, float with 2), KERNEL_H, KERNEL_W, PAD_H and PAD_W of the convolution; x_t, X_CHANNELS
// and X_WIDTH (pixels in an access) of its x; TILE and BORDER_BLOCKS of conv_output_gradient_packed.
#define IN_CHANNELS OUT_CHANNELS  // what the convolution wrote is what dgrad reads
#include "conv_output_gradient.cuh"
#include "gradient_bound.cuh"
#include "pack_tile.cuh"

// The least blocks of conv_output_gradient_packed an SM. More registers are needed where a chunk lacks channels.
#define PACKING_BLOCKS (OUT_CHANNELS % CHUNK_CHANNELS ? 1 : SPLIT == 1 ? 4 : 3)

enum { SUMS = 5, LARGEST = 4 };  // partial sums, and which of them is a maximum

extern "C" __global__ void __launch_bounds__(32 * WARPS) pooled_backward(
    const scalar_t* __restrict__ dout, const pooled_t* __restrict__ pooled, const int* __restrict__ exponents,
    const int* __restrict__ unit_exponents, const float* __restrict__ mean, const float* __restrict__ invstd,
    const param_t* __restrict__ weight, const param_t* __restrict__ bias, const param_t* __restrict__ group_weight,
    const float* __restrict__ group_mean, const float* __restrict__ group_invstd, float* __restrict__ g,
    float* __restrict__ partials, i64 images, float parameter) {
    wait_for_earlier_kernels();
    __shared__ float totals[SUMS][JOBS], weights[JOBS];  // of each job; its channel's group_weight
    __shared__ __align__(16) scalar_t turned[TURNED ? PLANE * TURN_PITCH : 1];
    Activation activation(parameter);
    int lane = threadIdx.x % 32, channel = blockIdx.x % GROUPS * MEMBERS;
    i64 start = (i64)blockIdx.x * SIZE;
    dout += start_of_block(channel);
    if (TURNED) {
        for_turned<TURNED_TOGETHER>(
            [&](int at, int outside) { *(Together*)(turned + at) = *(const Together*)(dout + outside); });
        __syncthreads();
    }
    float m = group_mean[blockIdx.x], s = group_invstd[blockIdx.x];
    float pools[UNROLLED][ITEMS], gradients[UNROLLED][ITEMS], activated[UNROLLED][ITEMS];
    __shared__ Pooled::Places places;
    Pooled source(pooled, exponents, unit_exponents, channel, places);
    auto load = [&](const Job& job, float (&v)[ITEMS], float (&d)[ITEMS]) {
        source.load(job, v);
        job.load(TURNED ? turned : dout, d);
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
        float (&v)[ITEMS] = pools[RESIDENT ? round : 0], (&d)[ITEMS] = gradients[RESIDENT ? round : 0];
        float (&p)[ITEMS] = activated[RESIDENT ? round : 0];
        if (!RESIDENT) load(job, v, d);
        int c = channel + job.member;
        Norm norm(mean[c], invstd[c], weight, bias, c);
        float sum = 0, dot = 0, w = bn_weight(group_weight, c);
        #pragma unroll
        for (int i = 0; i < ITEMS; i++) {
            p[i] = activation.of(norm(v[i]));
            sum += d[i];
            dot += d[i] * ((p[i] - m) * s);
        }
        sum = warp_sums(sum, dot);
        if (lane % 16 == 0) totals[lane / 16][job.number] = sum;
        if (lane == 0) weights[job.number] = w;
    }
    __syncthreads();
    float mean_d = 0, mean_dot = 0;
    for (int j = lane; j < JOBS; j += 32) mean_d += weights[j] * totals[0][j], mean_dot += weights[j] * totals[1][j];
    float both = warp_sums(mean_d, mean_dot) / SIZE;
    mean_d = __shfl_sync(0xFFFFFFFFu, both, 0);
    mean_dot = __shfl_sync(0xFFFFFFFFu, both, 16);
    #pragma unroll UNROLLED
    for (int round = 0; round < ROUNDS; round++) {
        Job job(round);
        if (!job.exists()) continue;
        float (&v)[ITEMS] = pools[RESIDENT ? round : 0], (&d)[ITEMS] = gradients[RESIDENT ? round : 0];
        float (&p)[ITEMS] = activated[RESIDENT ? round : 0];
        int c = channel + job.member;
        Norm norm(mean[c], invstd[c], weight, bias, c);
        if (!RESIDENT) {
            load(job, v, d);
            #pragma unroll
            for (int i = 0; i < ITEMS; i++) p[i] = activation.of(norm(v[i]));
        }
        float sum = 0, dot = 0, largest = 0, w = weights[job.number], *to = g + start + job.first;
        #pragma unroll
        for (int i = 0; i < ITEMS; i++) {
            if (!job.inside(i)) continue;
            d[i] = s * (w * d[i] - (mean_d + (p[i] - m) * s * mean_dot)) * activation.slope(p[i]);
            to[i * 32] = d[i];
            sum += d[i];
            dot += d[i] * norm.normalise(v[i]);
            largest = fmaxf(largest, fabsf(d[i]));  // passes over NaN
        }
        sum = warp_sums(sum, dot);
        largest = warp_max(largest);
        if (largest - largest != 0) {
            largest = 0;
            #pragma unroll
            for (int i = 0; i < ITEMS; i++) largest = fmaxf(largest, job.inside(i) ? fabsf(finite_or_zero(d[i])) : 0);
            largest = warp_max(largest);
        }
        if (lane % 16 == 0) totals[2 + lane / 16][job.number] = sum;
        if (lane == 0) totals[LARGEST][job.number] = largest;
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

// One block a channel. sums [2][channels]: of g and g xhat. count: pixels of a channel. training: whether the batch's
// own statistics were applied. The gradients are null where not wanted.
extern "C" __global__ void __launch_bounds__(THREADS) pooled_parameter_gradients(
    const float* __restrict__ partials, const float* __restrict__ mean, const float* __restrict__ invstd,
    const param_t* __restrict__ weight, float* __restrict__ sums, int* __restrict__ dy_exponents,
    param_t* __restrict__ dweight, param_t* __restrict__ dbias, param_t* __restrict__ dgroup_weight,
    param_t* __restrict__ dgroup_bias, param_t* __restrict__ dconv_bias, i64 images, float count, int training) {
    wait_for_earlier_kernels();
    __shared__ float warps[SUMS][THREADS / 32];
    int c = blockIdx.x;
    float total[SUMS] = {};
    for (i64 image = threadIdx.x; image < images; image += THREADS)
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
    float scale = multiply_unflushed(bn_weight(weight, c), invstd[c]);
    sums[c] = total[2], sums[OUT_CHANNELS + c] = total[3];
    if (dgroup_bias) dgroup_bias[c] = from_acc<param_t>(total[0]);
    if (dgroup_weight) dgroup_weight[c] = from_acc<param_t>(total[1]);
    if (dbias) dbias[c] = from_acc<param_t>(total[2]);
    if (dweight) dweight[c] = from_acc<param_t>(total[3]);
    GradientBound bound(total[LARGEST]);
    if (training) bound = {total[LARGEST], total[2] / count, total[3] / count, count, mean[c], invstd[c]};
    // Batch norm takes the bias out of its own batch, so there it has no influence at all: 0, or NaN.
    if (dconv_bias)
        dconv_bias[c] = from_acc<param_t>(training ? bound.means - bound.means : multiply_unflushed(scale, total[2]));
    dy_exponents[c] = bound.exponent(scale);
}

// A block turns TILE windows and one chunk of channels into lines of packed tiles. A thread computes eight channels of
// a window, whose 16 bytes of four lines meet those of the other threads in shared memory. The windows of `together`
// images are numbered one image after the other. Before the blocks of these images come BORDER_BLOCKS that sum up the
// borders of them, two channels each: what they read is then in the L2 cache. They are slow, so they do not come last.
// borders [.][taps][channels] may be null.
//
// Other blocks pack x, the convolution's input, if it is not null, as pack_fp16 does. Each comes before one of those
// above, from the first on: so those at the borders, which hardly use the memory, have blocks beside them that do.
extern "C" __global__ void __launch_bounds__(THREADS, PACKING_BLOCKS) conv_output_gradient_packed(
    const float* __restrict__ g, const u8* __restrict__ argmax, const saved_t* __restrict__ saved,
    const int* __restrict__ exponents, const int* __restrict__ unit_exponents, const float* __restrict__ mean,
    const float* __restrict__ invstd, const param_t* __restrict__ weight, const float* __restrict__ sums,
    const int* __restrict__ dy_exponents, half_t* __restrict__ packed, float* __restrict__ borders,
    const x_t* __restrict__ x, const x_t* __restrict__ x_sums, half_t* __restrict__ x_packed, int x_exponent_count,
    float count, i64 images, int together) {
    wait_for_earlier_kernels();
    typedef ToPack<x_t, X_WIDTH> X;
    enum { OCTETS = CHUNK_CHANNELS / 8, X_PIXELS = IN_H * IN_W };
    static_assert(TILE * OCTETS == THREADS, "a thread computes eight channels of a window");
    static_assert(BORDER_BLOCKS * (THREADS / 128) == OUT_CHANNELS, "128 threads sum up a channel's borders");
    struct __align__(16) Channel {
        OutputGradient gradient;
        int exponent;
    };
    __shared__ __align__(16) u8 corners[4][TILE * LINE_BYTES];  // lines of the tile's windows
    __shared__ __align__(16) u8 channels[CHUNK_CHANNELS * sizeof(Channel)];
    static_assert(sizeof(corners) >= THREADS / 128 * sizeof(BorderSums), "each block needs only one of them");
    static_assert(sizeof(corners) >= sizeof(uint4[X::TILE_PIXELS * 8]), "each block needs only one of them");
    int tiles = (together * WINDOWS + TILE - 1) / TILE, of_borders = borders ? BORDER_BLOCKS : 0,
        of_dy = of_borders + tiles * CHUNKS, x_tiles = (together * X_PIXELS + X::TILE_PIXELS - 1) / X::TILE_PIXELS,
        of_x = x ? x_tiles * ((X_CHANNELS + CHUNK_CHANNELS - 1) / CHUNK_CHANNELS) : 0,
        share = blockIdx.x / (of_x + of_dy), block = blockIdx.x % (of_x + of_dy), pairs = min(of_x, of_dy),
        lane = threadIdx.x % 32;
    i64 first = (i64)share * together, end = min(first + together, images);
    bool packs = block < 2 * pairs ? block % 2 == 0 : of_x > of_dy;
    block = block < 2 * pairs ? block / 2 : block - pairs;
    if (packs) {
        X to_pack = {x, unit_exponents, x_sums, x_packed, x_exponent_count, X_CHANNELS, X_PIXELS};
        i64 from = first * X_PIXELS + block % x_tiles * X::TILE_PIXELS;
        auto& tile = *(uint4(*)[X::TILE_PIXELS * 8]) corners;
        to_pack.pack(from, (int)end * X_PIXELS, block / x_tiles, tile, (unsigned*)channels);
        return;
    }
    block -= of_borders;
    // Of all channels. A warp reads them, and later than what takes longer.
    auto least_exponent = [&] {
        int least = 126;
        #pragma unroll
        for (int i = 0; i < OUT_CHANNELS; i += 32) least = min(least, dy_exponents[min(i + lane, OUT_CHANNELS - 1)]);
        return -warp_max(-least);
    };
    if (block < 0) {
        int c = (block + of_borders) * 2 + threadIdx.x / 128;
        OutputGradient gradient(mean, invstd, weight, sums, c);
        gradient.finish(count, least_exponent());
        BorderSums& sums_of_borders = ((BorderSums*)corners)[threadIdx.x / 128];
        float* to = borders + (i64)share * TAPS * OUT_CHANNELS;
        sum_borders(g, argmax, saved, exponents, unit_exponents, gradient, c, first, end, sums_of_borders, to);
        return;
    }
    int start = block % tiles * TILE, windows = (int)(end - first) * WINDOWS, chunk = block / tiles;
    if (start >= windows) return;
    int warp = threadIdx.x / 32, place = warp / OCTETS * 32 + lane, octet = warp % OCTETS,
        c = chunk * CHUNK_CHANNELS + octet * 8;
    int at = min(start + place, windows - 1);  // lines past the last window are written to shared memory alone
    i64 image = first + at / WINDOWS;
    bool real = OUT_CHANNELS % CHUNK_CHANNELS == 0 || c < OUT_CHANNELS;

    Kept kept[8] = {};
    float chosen[8] = {};
    Window window(at % WINDOWS);
    int taps[8], exponent = kept_exponent(unit_exponents, image, window);
    if (real) {
        i64 plane = image * OUT_CHANNELS + c;
        const Kept* from = (const Kept*)saved + plane * PLANE_STRIDE + window.saved;
        if (sums)
            #pragma unroll
            for (int j = 0; j < 8; j++) kept[j] = from[j * PLANE_STRIDE];
        const float* g_from = g + plane * PLANE + window.pooled;
        const u8* argmax_from = argmax + (plane * PLANE_STRIDE + window.argmax) / 4;
        if (window.pooled >= 0)
            #pragma unroll
            for (int j = 0; j < 8; j++) chosen[j] = g_from[j * PLANE];
        #pragma unroll
        for (int j = 0; j < 8; j++) taps[j] = argmax_from[j * (PLANE_STRIDE / 4)];
    }
    int own = min(chunk * CHUNK_CHANNELS + (int)threadIdx.x % CHUNK_CHANNELS, OUT_CHANNELS - 1);
    Channel channel = {OutputGradient(mean, invstd, weight, sums, own), SPLIT == 1 ? exponents[own] : 0};
    channel.exponent += channel.gradient.exponent;
    int least = least_exponent();
    if (threadIdx.x < CHUNK_CHANNELS) {
        channel.gradient.finish(count, least);
        ((Channel*)channels)[threadIdx.x] = channel;
    }
    __syncthreads();

    float v[4][8] = {};
    if (real)
        #pragma unroll
        for (int j = 0; j < 8; j++) {
            channel = ((const Channel*)channels)[octet * 8 + j];
            float restore = restoring(channel.exponent + exponent), add = channel.gradient.of_chosen(chosen[j]), y[4];
            unpack(kept[j], y);
            #pragma unroll
            for (int corner = 0; corner < 4; corner++)
                v[corner][j] = channel.gradient.of(y[corner], restore) + (corner == window.chosen(taps[j]) ? add : 0);
        }
    #pragma unroll
    for (int corner = 0; corner < 4; corner++) store_line(corners[corner], place, octet, v[corner], place & 7);
    __syncthreads();

    int right = threadIdx.x / 8 % 2;
    #pragma unroll
    for (int i = 0; i < TILE; i += 16) {
        int w = i + threadIdx.x / 16, at = start + w;
        Window window(at % WINDOWS);
        int column = window.column * 2 + right;
        uint4* to = (uint4*)packed + ((first + at / WINDOWS) * CHUNKS + chunk) * (OUT_H * OUT_W * 8) + threadIdx.x % 8;
        #pragma unroll
        for (int lower = 0; lower < 2; lower++) {
            int h = window.row * 2 + lower;
            if (at < windows && h < OUT_H && column < OUT_W)
                to[(h * OUT_W + column) * 8] =
                    *(const uint4*)(corners[lower * 2 + right] + line_offset(w, threadIdx.x % 8));
        }
    }
}

// A thread computes one window.
extern "C" __global__ void __launch_bounds__(THREADS) conv_output_gradient(
    const float* __restrict__ g, const u8* __restrict__ argmax, const saved_t* __restrict__ saved,
    const int* __restrict__ exponents, const int* __restrict__ unit_exponents, const float* __restrict__ mean,
    const float* __restrict__ invstd, const param_t* __restrict__ weight, const float* __restrict__ sums,
    scalar_t* __restrict__ dy, float count) {
    wait_for_earlier_kernels();
    int at = blockIdx.y * blockDim.x + threadIdx.x, c = blockIdx.x % OUT_CHANNELS;
    i64 plane = blockIdx.x;
    if (at >= WINDOWS) return;
    Window window(at);
    OutputGradient gradient(mean, invstd, weight, sums, c);
    gradient.finish(count, 0);
    float restore = restoring(
              gradient.exponent + (SPLIT == 1 ? exponents[c] : 0) +
              kept_exponent(unit_exponents, plane / OUT_CHANNELS, window)),
          v[4];
    gradients_of(gradient, g, argmax, sums ? saved : 0, plane, window, restore, v);
    #pragma unroll
    for (int corner = 0; corner < 4; corner++) {
        int h = window.row * 2 + corner / 2, w = window.column * 2 + corner % 2;
        if (h < OUT_H && w < OUT_W) dy[(plane * OUT_H + h) * OUT_W + w] = from_acc<scalar_t>(v[corner]);
    }
}
