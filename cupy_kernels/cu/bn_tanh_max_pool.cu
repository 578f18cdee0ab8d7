// y = max pooling of t, t = tanh(v), v = batch norm of x with given mean and invstd (HAS_BN 1) or x itself (HAS_BN 0):
// one pass over x, equal bit for bit to max pooling after tanh, or after batch norm with tanh. The largest t is looked
// for, not the largest v: tanh rounds neighbours to one value, and the first of these gets the gradient.
//
// Backward: g = dy (1 - y^2) belongs to the pixel under the tap of its window, and dx = scatter(g) without batch norm.
// With it, dx = weight invstd (scatter(g) - sum(g)/count - xhat sum(g xhat)/count), xhat = (x - mean) invstd, where
// both sums run over pooled values alone; with given (running) statistics, dx = weight invstd scatter(g).
//
// Threads: see for_places in pool.cuh; a place is a window in the forward and the sums, SITE x SITE pixels in the
// backward. Saved: y, taps, and with batch norm x, mean, invstd. Macros: HAS_BN, and those of pool.cuh. Planes are
// numbered image * channels + channel, and period is a multiple of channels.
#include "batch_norm.cuh"
#include "pool.cuh"
#include "tanh.cuh"

enum { IS_DOUBLE = sizeof(acc_t) == 8 };  // in launch bounds: without them ptxas aims at more blocks, and spills

__device__ inline acc_t gradient_of(scalar_t dy, scalar_t y) { return to_acc(dy) * tanh_slope(to_acc(y)); }

// taps may be null.
extern "C" __global__ void __launch_bounds__(THREADS, IS_DOUBLE ? 2 : 5) bn_tanh_max_pool_forward(
    const scalar_t* __restrict__ x, const acc_t* __restrict__ mean, const acc_t* __restrict__ invstd,
    const acc_t* __restrict__ weight, const acc_t* __restrict__ bias, scalar_t* __restrict__ y,
    tap_t* __restrict__ taps, int channels, int planes, int period, int planes_per_block, int height, int width,
    int out_height, int out_width, int kernel_h, int kernel_w, int stride_h, int stride_w, int padding_h, int padding_w,
    int dilation_h, int dilation_w) {
    Pool p = {height, width, out_height, out_width, kernel_h, kernel_w,
              stride_h, stride_w, padding_h, padding_w, dilation_h, dilation_w};
    Divisor by_channel(channels);
    int first = blockIdx.x * planes_per_block;
    int own = min(planes_per_block, period - first);
    for_places(first, own, out_height, out_width, [&](int plane, int row, int column) {
        Window in[ITEMS];
        #pragma unroll
        for (int i = 0; i < ITEMS; i++)
            in[i] = window(p, x + item_plane(plane, i, period, planes) * (height * width), row, column);
        acc_t m = 0, s = 1, w = 1, b = 0;
        if (HAS_BN) {
            unsigned c;
            by_channel.divide(plane, c);
            m = mean[c], s = invstd[c], w = bn_weight(weight, c), b = bn_bias(bias, c);
        }
        #pragma unroll
        for (int i = 0; i < ITEMS && plane + i * period < planes; i++) {
            i64 o = (plane + (i64)i * period) * (out_height * out_width) + row * out_width + column;
            Largest best = largest(p, in[i], [&](scalar_t element) {
                acc_t v = to_acc(element);
                if (HAS_BN) v = bn_affine(bn_normalise(v, m, s), w, b);
                return to_acc(from_acc<scalar_t>(tanh_of(v)));
            });
            y[o] = from_acc<scalar_t>(best.value);
            if (taps) taps[o] = best.tap;
        }
    });
}

// partials [2][channels][chunks]: sum of g, and of g xhat. Block (group * channels + c, j) takes of channel c a group
// of images_per_block images out of the first `period`, and the images that are a multiple of period behind these.
extern "C" __global__ void __launch_bounds__(THREADS, IS_DOUBLE ? 2 : 4) bn_tanh_max_pool_backward_partials(
    const scalar_t* __restrict__ dy, const scalar_t* __restrict__ y, const tap_t* __restrict__ taps,
    const scalar_t* __restrict__ x, const acc_t* __restrict__ mean, const acc_t* __restrict__ invstd,
    acc_t* __restrict__ partials, int channels, int images, int period, int images_per_block, int height, int width,
    int out_height, int out_width, int kernel_h, int kernel_w, int stride_h, int stride_w, int padding_h, int padding_w,
    int dilation_h, int dilation_w) {
    __shared__ acc_t scratch[32];
    Pool p = {height, width, out_height, out_width, kernel_h, kernel_w,
              stride_h, stride_w, padding_h, padding_w, dilation_h, dilation_w};
    int channel = blockIdx.x % channels, group = blockIdx.x / channels, first = group * images_per_block;
    acc_t m = mean[channel], s = invstd[channel], sum = 0, dot = 0;
    int own = max(0, min(images_per_block, period - first));  // the last groups may be empty
    for_places(first, own, out_height, out_width, [&](int image, int row, int column) {
        acc_t g[ITEMS], xhat[ITEMS];
        #pragma unroll
        for (int i = 0; i < ITEMS; i++) {
            i64 plane = item_plane(image, i, period, images) * channels + channel;
            i64 o = plane * (out_height * out_width) + row * out_width + column;
            Pixel pixel = pixel_under(p, row, column, taps[o]);
            bool inside = pixel.h < height && pixel.w < width;
            i64 at = plane * (height * width) + (inside ? pixel.h * width + pixel.w : 0);
            g[i] = inside ? gradient_of(dy[o], y[o]) : (acc_t)0;
            xhat[i] = bn_normalise(to_acc(x[at]), m, s);
        }
        #pragma unroll
        for (int i = 0; i < ITEMS && image + i * period < images; i++) sum += g[i], dot += g[i] * xhat[i];
    });
    sum = block_sum(sum, scratch);
    dot = block_sum(dot, scratch);
    if (threadIdx.x == 0) {
        i64 chunk = (i64)group * gridDim.y + blockIdx.y, chunks = (i64)(gridDim.x / channels) * gridDim.y;
        partials[channel * chunks + chunk] = sum;
        partials[(channels + channel) * chunks + chunk] = dot;
    }
}

// sums [2][channels]: of g and of g xhat over the batch, where its own statistics were applied; null where given ones
// were, or without batch norm: then x is not read.
extern "C" __global__ void __launch_bounds__(THREADS, IS_DOUBLE ? 2 : 4) bn_tanh_max_pool_backward(
    const scalar_t* __restrict__ dy, const scalar_t* __restrict__ y, const tap_t* __restrict__ taps,
    const scalar_t* __restrict__ x, const acc_t* __restrict__ mean, const acc_t* __restrict__ invstd,
    const acc_t* __restrict__ weight, const acc_t* __restrict__ sums, scalar_t* __restrict__ dx, acc_t inverse_count,
    int channels, int planes, int period, int planes_per_block, int height, int width, int out_height, int out_width,
    int kernel_h, int kernel_w, int stride_h, int stride_w, int padding_h, int padding_w, int dilation_h,
    int dilation_w) {
    Pool p = {height, width, out_height, out_width, kernel_h, kernel_w,
              stride_h, stride_w, padding_h, padding_w, dilation_h, dilation_w};
    Divisor by_channel(channels);
    int first = blockIdx.x * planes_per_block, rows = (height + SITE - 1) / SITE, columns = width / SITE;
    int own = min(planes_per_block, period - first);
    for_places(first, own, rows, columns, [&](int plane, int row, int column) {
        Gathered gathered[ITEMS];
        Pixels in[ITEMS][SITE];
        #pragma unroll
        for (int i = 0; i < ITEMS; i++) {
            i64 from = item_plane(plane, i, period, planes), outputs = from * (out_height * out_width);
            gathered[i] = gather(p, taps + outputs, row, column,
                                 [&](int o) { return gradient_of(dy[outputs + o], y[outputs + o]); });
            #pragma unroll
            for (int r = 0; r < SITE; r++)
                if (HAS_BN && sums) in[i][r] = load_pixels(p, x + from * (height * width), row, column, r);
        }
        acc_t m = 0, s = 1, scale = 1, mean_g = 0, mean_dot = 0;
        if (HAS_BN) {
            unsigned c;
            by_channel.divide(plane, c);
            m = mean[c], s = invstd[c], scale = bn_weight(weight, c) * s;
            if (sums) mean_g = sums[c] * inverse_count, mean_dot = sums[channels + c] * inverse_count;
        }
        #pragma unroll
        for (int i = 0; i < ITEMS && plane + i * period < planes; i++) {
            scalar_t* to = dx + (plane + (i64)i * period) * (height * width);
            store_site(p, to, row, column, [&](int r, int c) {
                acc_t g = gathered[i].at(r, c);
                if (HAS_BN && sums) g -= mean_g + bn_normalise(to_acc(in[i][r].v[c]), m, s) * mean_dot;
                return HAS_BN ? g * scale : g;
            });
        }
    });
}
