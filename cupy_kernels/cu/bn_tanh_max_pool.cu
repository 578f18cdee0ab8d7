// y = max pooling of t, t = tanh(v), v = batch norm of x with given mean and invstd (HAS_BN 1) or x itself (HAS_BN 0):
// one pass over x, equal bit for bit to max pooling after tanh, or after batch norm with tanh. The largest t is looked
// for, not the largest v: tanh rounds neighbours to one value, and the first of these gets the gradient.
//
// Backward: g = dy (1 - y^2) belongs to the pixel under the tap of its window, and dx = scatter(g) without batch norm.
// With it, dx = weight invstd (scatter(g) - sum(g)/count - xhat sum(g xhat)/count), xhat = (x - mean) invstd, where
// both sums run over pooled values alone; with given (running) statistics, dx = weight invstd scatter(g).
//
// Threads: see for_places in pool.cuh; a place is a window in the forward and the sums, SITE x SITE pixels in the
// backward. Saved: y, argmax, and with batch norm x, mean, invstd. Macros: HAS_BN, and those of pool.cuh. Planes are
// numbered image * channels + channel, and period is a multiple of channels.
#include "batch_norm.cuh"
#include "pool.cuh"
#include "tanh.cuh"

enum { IS_DOUBLE = sizeof(acc_t) == 8 };  // in launch bounds: without them ptxas aims at more blocks, and spills

__device__ inline acc_t gradient_of(acc_t dy, scalar_t y) { return dy * tanh_slope(to_acc(y)); }

// argmax may be null.
extern "C" __global__ void __launch_bounds__(THREADS, IS_DOUBLE ? 2 : 5) bn_tanh_max_pool_forward(
    const scalar_t* __restrict__ x, const acc_t* __restrict__ mean, const acc_t* __restrict__ invstd,
    const acc_t* __restrict__ weight, const acc_t* __restrict__ bias, scalar_t* __restrict__ y,
    argmax_t* __restrict__ argmax, int channels, int planes, int period, int planes_per_block, int height, int width,
    int out_height, int out_width, int kernel_h, int kernel_w, int stride_h, int stride_w, int padding_h, int padding_w,
    int dilation_h, int dilation_w) {
    wait_for_earlier_kernels();
    Pool p = {height, width, out_height, out_width, kernel_h, kernel_w, stride_h, stride_w, padding_h, padding_w,
        dilation_h, dilation_w};
    Divisor by_channel(channels);
    int first = blockIdx.x * planes_per_block;
    int own = min(planes_per_block, period - first);
    for_places(first, own, out_height, out_width, [&](int plane, int row, int column) {
        Window in[ITEMS];
        #pragma unroll
        for (int i = 0; i < ITEMS; i++)
            in[i] = window(p, x + item_plane(plane, i, period, planes) * (height * width), row, column);
        unsigned c;
        by_channel.divide(plane, c);
        Normaliser normalise = HAS_BN ? Normaliser(mean[c], invstd[c]) : Normaliser(0, 1);
        acc_t w = HAS_BN ? bn_weight(weight, c) : (acc_t)1, b = HAS_BN ? bn_bias(bias, c) : (acc_t)0;
        #pragma unroll
        for (int i = 0; i < ITEMS && plane + i * period < planes; i++) {
            i64 o = (plane + (i64)i * period) * (out_height * out_width) + row * out_width + column;
            Largest best = largest(p, in[i], [&](scalar_t element) {
                acc_t v = to_acc(element);
                if (HAS_BN) v = bn_affine(normalise(v), w, b);
                return to_acc(from_acc<scalar_t>(tanh_of(v)));
            });
            y[o] = from_acc<scalar_t>(best.value);
            if (argmax) argmax[o] = best.tap;
        }
    });
}

// partials [2][channels][chunks], double: sum of g, and of g xhat. Block (group * channels + c, j) takes of channel c a
// group of images_per_block images out of the first `period`, and the images that are a multiple of period behind
// these.
extern "C" __global__ void __launch_bounds__(THREADS, IS_DOUBLE ? 2 : 4) bn_tanh_max_pool_backward_partials(
    const scalar_t* __restrict__ dy, const scalar_t* __restrict__ y, const argmax_t* __restrict__ argmax,
    const scalar_t* __restrict__ x, const acc_t* __restrict__ mean, const acc_t* __restrict__ invstd,
    double* __restrict__ partials, int channels, int images, int period, int images_per_block, int height, int width,
    int out_height, int out_width, int kernel_h, int kernel_w, int stride_h, int stride_w, int padding_h, int padding_w,
    int dilation_h, int dilation_w) {
    wait_for_earlier_kernels();
    __shared__ acc_t scratch[32];
    Pool p = {height, width, out_height, out_width, kernel_h, kernel_w, stride_h, stride_w, padding_h, padding_w,
        dilation_h, dilation_w};
    int channel = blockIdx.x % channels, group = blockIdx.x / channels, first = group * images_per_block;
    Normaliser normalise(mean[channel], invstd[channel]);
    int own = max(0, min(images_per_block, period - first));  // the last groups may be empty
    acc_t unit = 1, sum, dot;
    auto add_up = [&] {
        sum = dot = 0;
        make_opaque(first);  // else a second pass would hold registers during the first
        for_places(first, own, out_height, out_width, [&](int image, int row, int column) {
            acc_t g[ITEMS], xhat[ITEMS];
            #pragma unroll
            for (int i = 0; i < ITEMS; i++) {
                i64 plane = item_plane(image, i, period, images) * channels + channel;
                i64 o = plane * (out_height * out_width) + row * out_width + column;
                Pixel pixel = pixel_under(p, row, column, argmax[o]);
                bool inside = pixel.h < height && pixel.w < width;
                i64 at = plane * (height * width) + (inside ? pixel.h * width + pixel.w : 0);
                g[i] = inside ? gradient_of(to_acc(dy[o]) * unit, y[o]) : (acc_t)0;
                xhat[i] = normalise(to_acc(x[at]));
            }
            #pragma unroll
            for (int i = 0; i < ITEMS && image + i * period < images; i++) sum += g[i], dot += g[i] * xhat[i];
        });
        sum = block_sum(sum, scratch);
        dot = block_sum(dot, scratch);
    };
    do add_up();
    while (again(sum, dot, unit));
    if (threadIdx.x == 0) {
        double back = inverse_of(unit);
        i64 chunk = (i64)group * gridDim.y + blockIdx.y, chunks = (i64)(gridDim.x / channels) * gridDim.y;
        partials[channel * chunks + chunk] = sum * back;
        partials[(channels + channel) * chunks + chunk] = dot * back;
    }
}

// sum * inverse_count: the sum may be beyond float, the product is not.
__device__ inline acc_t mean_of(double sum, acc_t inverse_count) {
    acc_t mean = (acc_t)sum * inverse_count;
    return is_finite(mean) ? mean : (acc_t)(sum * 0x1p-96) * inverse_count * 0x1p96f;
}

// sums [2][channels]: of g and of g xhat over the batch, where its own statistics were applied; null where given ones
// were, or without batch norm: then x is not read.
extern "C" __global__ void __launch_bounds__(THREADS, IS_DOUBLE ? 2 : 4) bn_tanh_max_pool_backward(
    const scalar_t* __restrict__ dy, const scalar_t* __restrict__ y, const argmax_t* __restrict__ argmax,
    const scalar_t* __restrict__ x, const acc_t* __restrict__ mean, const acc_t* __restrict__ invstd,
    const acc_t* __restrict__ weight, const double* __restrict__ sums, scalar_t* __restrict__ dx, acc_t inverse_count,
    int channels, int planes, int period, int planes_per_block, int height, int width, int out_height, int out_width,
    int kernel_h, int kernel_w, int stride_h, int stride_w, int padding_h, int padding_w, int dilation_h,
    int dilation_w) {
    wait_for_earlier_kernels();
    Pool p = {height, width, out_height, out_width, kernel_h, kernel_w, stride_h, stride_w, padding_h, padding_w,
        dilation_h, dilation_w};
    Divisor by_channel(channels);
    int first = blockIdx.x * planes_per_block, rows = (height + SITE - 1) / SITE, columns = width / SITE;
    int own = min(planes_per_block, period - first);
    for_places(first, own, rows, columns, [&](int plane, int row, int column) {
        Gathered gathered[ITEMS];
        Pixels in[ITEMS][SITE];
        #pragma unroll
        for (int i = 0; i < ITEMS; i++) {
            i64 from = item_plane(plane, i, period, planes), outputs = from * (out_height * out_width);
            gathered[i] = gather(p, argmax + outputs, row, column, [&](int o) {
                return gradient_of(to_acc(dy[outputs + o]), y[outputs + o]);
            });
            #pragma unroll
            for (int r = 0; r < SITE; r++)
                if (HAS_BN && sums) in[i][r] = load_pixels(p, x + from * (height * width), row, column, r);
        }
        unsigned c;
        by_channel.divide(plane, c);
        Normaliser normalise = HAS_BN ? Normaliser(mean[c], invstd[c]) : Normaliser(0, 1);
        acc_t scale = 1, mean_g = 0, mean_dot = 0;
        if (HAS_BN) {
            scale = multiply_unflushed(bn_weight(weight, c), invstd[c]);
            if (sums) mean_g = mean_of(sums[c], inverse_count), mean_dot = mean_of(sums[channels + c], inverse_count);
        }
        #pragma unroll
        for (int i = 0; i < ITEMS && plane + i * period < planes; i++) {
            scalar_t* to = dx + (plane + (i64)i * period) * (height * width);
            store_site(p, to, row, column, [&](int r, int c) {
                acc_t g = gathered[i].at(r, c);
                if (HAS_BN && sums) g -= mean_g + normalise(to_acc(in[i][r].v[c])) * mean_dot;
                return HAS_BN ? multiply_unflushed(g, scale) : g;
            });
        }
    });
}
