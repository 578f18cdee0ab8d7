// Forward y[plane, oh, ow] = the largest element of a window of x[plane], and where in the window it lies; backward
// dx[plane, h, w] = sum of dy over the windows whose largest element is that pixel, in a fixed order, no atomics.
//
// Threads: see for_sites in pool.cuh; a site is an output in the forward, and SITE x SITE pixels of dx in the backward.
// Saved: taps, the position within the window; indices, where not null, is the same as torch has it, h * width + w.
// taps and indices may be null in the forward. Macros and limits: pool.cuh.
#include "pool.cuh"

extern "C" __global__ void __launch_bounds__(256) max_pool_forward(
    const scalar_t* __restrict__ x, scalar_t* __restrict__ y, tap_t* __restrict__ taps, i64* __restrict__ indices,
    int planes, int planes_per_block, int height, int width, int out_height, int out_width, int kernel_h, int kernel_w,
    int stride_h, int stride_w, int padding_h, int padding_w, int dilation_h, int dilation_w) {
    Pool p = {height, width, out_height, out_width, kernel_h, kernel_w,
              stride_h, stride_w, padding_h, padding_w, dilation_h, dilation_w};
    for_sites(
        planes, planes_per_block, out_height, out_width,
        [&](Site s) { return window(p, x + (i64)s.plane * (height * width), s.row, s.column); },
        [&](Site s, const Window& elements) {
            i64 o = (i64)s.plane * (out_height * out_width) + s.row * out_width + s.column;
            Largest best = largest(p, elements, [](scalar_t v) { return to_acc(v); });
            y[o] = from_acc<scalar_t>(best.value);
            if (taps) taps[o] = best.tap;
            if (indices) {
                Pixel pixel = pixel_under(p, s.row, s.column, best.tap);
                indices[o] = (i64)pixel.h * width + pixel.w;
            }
        });
}

extern "C" __global__ void __launch_bounds__(256) max_pool_backward(
    const scalar_t* __restrict__ dy, const tap_t* __restrict__ taps, scalar_t* __restrict__ dx,
    int planes, int planes_per_block, int height, int width, int out_height, int out_width, int kernel_h, int kernel_w,
    int stride_h, int stride_w, int padding_h, int padding_w, int dilation_h, int dilation_w) {
    Pool p = {height, width, out_height, out_width, kernel_h, kernel_w,
              stride_h, stride_w, padding_h, padding_w, dilation_h, dilation_w};
    for_sites(
        planes, planes_per_block, (height + SITE - 1) / SITE, width / SITE,
        [&](Site s) {
            i64 outputs = (i64)s.plane * (out_height * out_width);
            return gather(p, taps + outputs, s.row, s.column, [&](int o) { return to_acc(dy[outputs + o]); });
        },
        [&](Site s, const Gathered& gathered) {
            for (int r = 0; r < SITE && s.row * SITE + r < height; r++) {
                Pixels out;
                for (int c = 0; c < SITE; c++) out.v[c] = from_acc<scalar_t>(gathered.at(r, c));
                *(Pixels*)(dx + (i64)s.plane * (height * width) + (s.row * SITE + r) * width + s.column * SITE) = out;
            }
        });
}
