// Pooling windows: how threads walk over them, the largest element of one, and the windows that cover a pixel.
//
// Macros: scalar_t, acc_t, tap_t (u8, or int for a kernel of more than 254 taps).
// WINDOW_2X2: 1 fixes kernel 2, stride 2, padding 0, dilation 1, for even widths and arrays whose pairs of elements are
//     aligned, and moves two neighbours of a row as one. 0 takes the windows from the arguments.
// ITEMS: sites of a thread whose loads are in flight together.
// A tap is a position within a window, kh * kernel_w + kw. Limits: planes, and elements of a plane, below 2^31.
#pragma once
#include "common.cuh"

#if WINDOW_2X2
enum { SITE = 2 };  // a backward site is SITE x SITE pixels
#else
enum { SITE = 1 };
#endif
typedef Packed<scalar_t, SITE> Pixels;

struct Pool {
    int height, width, out_height, out_width;
    int kernel_h, kernel_w, stride_h, stride_w, padding_h, padding_w, dilation_h, dilation_w;
};

// Division of numbers below 2^31 by one that all threads share: the first quotient is right or one too small.
struct Divisor {
    unsigned d, reciprocal;
    __device__ explicit Divisor(unsigned d) : d(d), reciprocal(0xFFFFFFFFu / d) {}
    __device__ unsigned divide(unsigned n, unsigned& remainder) const {
        unsigned q = (unsigned long long)n * reciprocal >> 32;
        remainder = n - q * d;
        if (remainder >= d) remainder -= d, q++;
        return q;
    }
};

struct Site { unsigned plane, row, column; };

// Calls load(site), then finish(site, loaded), for every site of a rows x columns grid in each of `planes` planes.
// Block (i, j) takes the i-th planes_per_block planes, every gridDim.y-th of their batches of ITEMS * blockDim.x sites.
template <class Load, class Finish>
__device__ inline void for_sites(int planes, int planes_per_block, int rows, int columns, Load load, Finish finish) {
    Divisor by_plane(rows * columns), by_row(columns);
    unsigned first = blockIdx.x * planes_per_block;
    unsigned count = min(planes_per_block, planes - (int)first) * by_plane.d;
    unsigned batch = ITEMS * blockDim.x;
    for (unsigned start = blockIdx.y * batch + threadIdx.x; start < count; start += gridDim.y * batch) {
        Site sites[ITEMS];
        decltype(load(sites[0])) loaded[ITEMS];
        #pragma unroll
        for (int i = 0; i < ITEMS; i++) {
            unsigned in_plane;
            sites[i].plane = first + by_plane.divide(min(start + i * blockDim.x, count - 1), in_plane);
            sites[i].row = by_row.divide(in_plane, sites[i].column);
            loaded[i] = load(sites[i]);
        }
        #pragma unroll
        for (int i = 0; i < ITEMS; i++)
            if (start + i * blockDim.x < count) finish(sites[i], loaded[i]);
    }
}

// The largest element so far. A NaN beats everything, the last of several; of equals the first wins.
struct Largest {
    acc_t value;
    int tap;
    __device__ void take(acc_t v, int at) {
        if (greater(v, value) | is_nan(v)) value = v, tap = at;  // no short circuit: a select, not a branch
    }
};

// Elements of the window (oh, ow) of the plane at x: loaded here with WINDOW_2X2, else when `largest` reads them.
#if WINDOW_2X2
struct Window {
    Pixels top, bottom;
    bool has_bottom;  // false where ceil_mode's last window hangs over the edge
};
__device__ inline Window window(const Pool& p, const scalar_t* x, int oh, int ow) {
    const Pixels* pixels = (const Pixels*)(x + 2 * oh * p.width + 2 * ow);
    bool has_bottom = 2 * oh + 1 < p.height;
    return {pixels[0], pixels[has_bottom ? p.width / 2 : 0], has_bottom};
}
template <class F> __device__ inline Largest largest(const Pool&, const Window& w, F f) {
    Largest best = {f(w.top.v[0]), 0};
    best.take(f(w.top.v[1]), 1);
    if (w.has_bottom) {
        best.take(f(w.bottom.v[0]), 2);
        best.take(f(w.bottom.v[1]), 3);
    }
    return best;
}
#else
struct Window {
    const scalar_t* x;
    int h, w;  // of tap 0; negative in the padding
};
__device__ inline Window window(const Pool& p, const scalar_t* x, int oh, int ow) {
    return {x, oh * p.stride_h - p.padding_h, ow * p.stride_w - p.padding_w};
}
__device__ inline int taps_in_padding(int start, int dilation) {
    return start < 0 ? (dilation - 1 - start) / dilation : 0;
}
template <class F> __device__ inline Largest largest(const Pool& p, const Window& w, F f) {
    int kh = taps_in_padding(w.h, p.dilation_h), first_kw = taps_in_padding(w.w, p.dilation_w);
    int h = w.h + kh * p.dilation_h, first_w = w.w + first_kw * p.dilation_w;
    Largest best = {-(acc_t)__int_as_float(0x7F800000), kh * p.kernel_w + first_kw};
    for (; kh < p.kernel_h && h < p.height; kh++, h += p.dilation_h)
        for (int kw = first_kw, iw = first_w; kw < p.kernel_w && iw < p.width; kw++, iw += p.dilation_w)
            best.take(f(w.x[h * p.width + iw]), kh * p.kernel_w + kw);
    return best;
}
#endif

// The pixel under a tap of the window (oh, ow). It lies beyond the plane where a dilated window holds no pixel at all.
struct Pixel { int h, w; };
__device__ inline Pixel pixel_under(const Pool& p, int oh, int ow, int tap) {
#if WINDOW_2X2
    return {2 * oh + (tap >> 1), 2 * ow + (tap & 1)};
#else
    return {oh * p.stride_h - p.padding_h + tap / p.kernel_w * p.dilation_h,
            ow * p.stride_w - p.padding_w + tap % p.kernel_w * p.dilation_w};
#endif
}

// What the windows give to the pixels of one backward site.
struct Gathered {
    acc_t g;
    int tap;
    __device__ acc_t at(int row, int column) const { return SITE == 1 || tap == row * SITE + column ? g : (acc_t)0; }
};

#if WINDOW_2X2
template <class F>
__device__ inline Gathered gather(const Pool& p, const tap_t* taps, int row, int column, F gradient) {
    if (row >= p.out_height) return {(acc_t)0, 0};
    int o = row * p.out_width + column;
    return {gradient(o), taps[o]};
}
#else
// (first, last) window along one axis that reaches the pixel at `position`, counted from the start of the padding.
__device__ inline int first_window(int position, int kernel, int stride, int dilation) {
    int before = position - (kernel - 1) * dilation;
    return before <= 0 ? 0 : (before + stride - 1) / stride;
}
__device__ inline int last_window(int position, int stride, int windows) { return min(position / stride, windows - 1); }

// The tap that lies `offset` pixels into a window, or -1 if none does.
__device__ inline int tap_at(int offset, int dilation) {
    if (dilation == 1) return offset;
    int tap = offset / dilation;
    return tap * dilation == offset ? tap : -1;
}

// Sums gradient(o) over the windows o of the plane whose tap is the pixel (row, column), in ascending order.
// `taps` points at the plane's taps.
template <class F>
__device__ inline Gathered gather(const Pool& p, const tap_t* taps, int row, int column, F gradient) {
    int h = row + p.padding_h, w = column + p.padding_w;
    int oh = first_window(h, p.kernel_h, p.stride_h, p.dilation_h), oh_last = last_window(h, p.stride_h, p.out_height);
    int first = first_window(w, p.kernel_w, p.stride_w, p.dilation_w), last = last_window(w, p.stride_w, p.out_width);
    acc_t sum = 0;
    for (; oh <= oh_last; oh++) {
        int kh = tap_at(h - oh * p.stride_h, p.dilation_h);
        if (kh < 0) continue;
        for (int ow = first; ow <= last; ow++) {
            int kw = tap_at(w - ow * p.stride_w, p.dilation_w), o = oh * p.out_width + ow;
            if (kw >= 0 && taps[o] == kh * p.kernel_w + kw) sum += gradient(o);
        }
    }
    return {sum, 0};
}
#endif
