// What pooled_tail_backward.cu needs besides, where the statistics are those of several processes, its ranks: see
// sync_batch_norm.cu.
//
// The sum of dy over all ranks is 0, but the sum over one rank is not. It is weight invstd times `rest`:
//     rest = sum(g) - count mean(g) - sum(xhat) mean(g xhat)
// The sums are those of the rank, the means are those of all ranks. This is the rank's gradient of the convolution's
// bias. The gradient of the convolution's weight needs it, too, if x is centred.
//
// Macros: scalar_t, acc_t (float), param_t (the batch norm's weight and the convolution's bias), THREADS.
#include "gradient_bound.cuh"

// One block a channel. gathered [ranks][2][channels]: sums of g and of g xhat; own: the rank's. largest
// [images][channels]: |g| at most. mean, invstd, distance, share: of sync_statistics. sums [2][channels]: of all ranks,
// times share. count: pixels of a channel of the rank. dconv_bias: null where not wanted.
extern "C" __global__ void __launch_bounds__(THREADS) sync_parameter_gradients(
    const double* __restrict__ gathered, const double* __restrict__ own, const float* __restrict__ largest,
    const float* __restrict__ mean, const float* __restrict__ invstd, const float* __restrict__ distance,
    const double* __restrict__ share, const param_t* __restrict__ weight, float* __restrict__ sums,
    float* __restrict__ rest, int* __restrict__ dy_exponents, param_t* __restrict__ dconv_bias, i64 channels, i64 ranks,
    i64 images, float count) {
    wait_for_earlier_kernels();
    __shared__ float warps[THREADS / 32];
    i64 c = blockIdx.x;
    float most = 0;
    for (i64 image = threadIdx.x; image < images; image += THREADS) most = fmaxf(most, largest[image * channels + c]);
    most = warp_max(most);
    if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = most;
    __syncthreads();
    if (threadIdx.x) return;
    for (int w = 0; w < THREADS / 32; w++) most = fmaxf(most, warps[w]);
    double sum = 0, dot = 0;
    for (i64 rank = 0; rank < ranks; rank++) {
        sum += gathered[rank * 2 * channels + c];
        dot += gathered[(rank * 2 + 1) * channels + c];
    }
    sum *= *share, dot *= *share;
    sums[c] = (float)sum, sums[channels + c] = (float)dot;
    float scale = multiply_unflushed(bn_weight(weight, c), invstd[c]);
    rest[c] = (float)(own[c] - (sum + distance[c] * dot));
    GradientBound bound(most, (float)sum / count, (float)dot / count, count / (float)*share, mean[c], invstd[c]);
    dy_exponents[c] = bound.exponent(scale);
    if (dconv_bias) dconv_bias[c] = from_acc<param_t>(multiply_unflushed(scale, rest[c]));
}

// borders [taps][channels], of the first images: those of conv_output_gradient_packed, less what all of dy, times 2^e,
// sums to. Then conv_wgrad_reduce adds that times what x was centred by.
extern "C" __global__ void __launch_bounds__(THREADS) sync_borders(
    const float* __restrict__ rest, const float* __restrict__ invstd, const param_t* __restrict__ weight,
    const int* __restrict__ dy_exponents, INOUT float* borders, int channels, int taps) {
    wait_for_earlier_kernels();
    __shared__ unsigned scratch[32];
    float enlarge = power_of_two(smallest_exponent(dy_exponents, channels, scratch));
    int i = blockIdx.x * blockDim.x + threadIdx.x, c = i % channels;
    if (i >= taps * channels) return;
    float scale = multiply_unflushed(bn_weight(weight, c), invstd[c]);
    borders[i] -= multiply_unflushed(multiply_unflushed(rest[c], enlarge), scale);
}
