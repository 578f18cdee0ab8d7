// Forward y[plane, oh, ow] = the largest element of a window of x[plane], and where in the window it lies; backward
// dx[plane, h, w] = sum of dy over the windows whose largest element is that pixel, in a fixed order, no atomics. The
// backward of the backward, max_pool_select, reads the pixels instead: y[plane, oh, ow] = x[plane] at the window's tap.
//
// Threads: see for_places in pool.cuh; a place is an output in max_pool_forward and max_pool_select, SITE x SITE pixels
// of dx in max_pool_backward. Saved: argmax, the position within the window; indices, where not null, is the same as
// torch has it, h * width + w. argmax and indices may be null in the forward. Macros and limits: pool.cuh.
#include "pool.cuh"

extern "C" __global__ void __launch_bounds__(THREADS, 4) max_pool_forward(
    const scalar_t* __restrict__ x, scalar_t* __restrict__ y, argmax_t* __restrict__ argmax, i64* __restrict__ indices,
    int planes, int period, int planes_per_block, int height, int width, int out_height, int out_width, int kernel_h,
    int kernel_w, int stride_h, int stride_w, int padding_h, int padding_w, int dilation_h, int dilation_w) {
    wait_for_earlier_kernels();
    Pool p = fixed(
        {height, width, out_height, out_width, kernel_h, kernel_w, stride_h, stride_w, padding_h, padding_w, dilation_h,
            dilation_w});
    int first = blockIdx.x * planes_per_block;
    int own = min(planes_per_block, period - first);
    for_places(first, own, out_height, out_width, [&](int plane, int row, int column) {
        Window in[ITEMS];
        #pragma unroll
        for (int i = 0; i < ITEMS; i++)
            in[i] = window(p, x + item_plane(plane, i, period, planes) * (height * width), row, column);
        #pragma unroll
        for (int i = 0; i < ITEMS && plane + i * period < planes; i++) {
            i64 o = (plane + (i64)i * period) * (out_height * out_width) + row * out_width + column;
            Largest best = largest(p, in[i], [](scalar_t v) { return to_acc(v); });
            y[o] = from_acc<scalar_t>(best.value);
            if (argmax) argmax[o] = best.tap;
            if (indices) {
                Pixel pixel = pixel_under(p, row, column, best.tap);
                indices[o] = (i64)pixel.h * width + pixel.w;
            }
        }
    });
}

extern "C" __global__ void __launch_bounds__(THREADS, 4) max_pool_backward(
    const scalar_t* __restrict__ dy, const argmax_t* __restrict__ argmax, scalar_t* __restrict__ dx, int planes,
    int period, int planes_per_block, int height, int width, int out_height, int out_width, int kernel_h, int kernel_w,
    int stride_h, int stride_w, int padding_h, int padding_w, int dilation_h, int dilation_w) {
    wait_for_earlier_kernels();
    Pool p = fixed(
        {height, width, out_height, out_width, kernel_h, kernel_w, stride_h, stride_w, padding_h, padding_w, dilation_h,
            dilation_w});
    int first = blockIdx.x * planes_per_block, rows = (height + SITE - 1) / SITE, columns = width / SITE;
    int own = min(planes_per_block, period - first);
    for_places(first, own, rows, columns, [&](int plane, int row, int column) {
        Gathered gathered[ITEMS];
        #pragma unroll
        for (int i = 0; i < ITEMS; i++) {
            i64 outputs = item_plane(plane, i, period, planes) * (out_height * out_width);
            gathered[i] = gather(p, argmax + outputs, row, column, [&](int o) { return to_acc(dy[outputs + o]); });
        }
        #pragma unroll
        for (int i = 0; i < ITEMS && plane + i * period < planes; i++) {
            scalar_t* to = dx + (plane + (i64)i * period) * (height * width);
            store_site(p, to, row, column, [&](int r, int c) { return gathered[i].at(r, c); });
        }
    });
}

extern "C" __global__ void __launch_bounds__(THREADS) max_pool_select(
    const scalar_t* __restrict__ x, const argmax_t* __restrict__ argmax, scalar_t* __restrict__ y, int planes,
    int period, int planes_per_block, int height, int width, int out_height, int out_width, int kernel_h, int kernel_w,
    int stride_h, int stride_w, int padding_h, int padding_w, int dilation_h, int dilation_w) {
    wait_for_earlier_kernels();
    Pool p = fixed(
        {height, width, out_height, out_width, kernel_h, kernel_w, stride_h, stride_w, padding_h, padding_w, dilation_h,
            dilation_w});
    int first = blockIdx.x * planes_per_block;
    int own = min(planes_per_block, period - first);
    for_places(first, own, out_height, out_width, [&](int plane, int row, int column) {
        for (int i = 0; i < ITEMS && plane + i * period < planes; i++) {
            i64 at = plane + (i64)i * period, o = at * (out_height * out_width) + row * out_width + column;
            Pixel pixel = pixel_under(p, row, column, argmax[o]);
            bool inside = pixel.h < height && pixel.w < width;
            y[o] = inside ? x[at * (height * width) + pixel.h * width + pixel.w] : from_acc<scalar_t>((acc_t)0);
        }
    });
}
