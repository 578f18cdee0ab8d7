// Pooling windows: how threads walk over them, the largest element of one, and the windows that cover a pixel.
//
// Macros: scalar_t, acc_t, tap_t (u8, or int for a kernel of more than 254 taps).
// WINDOW_2X2: 1 fixes kernel 2, stride 2, padding 0, dilation 1, for even widths and arrays whose pairs of elements are
//     aligned, and moves two neighbours of a row as one. 0 takes the windows from the arguments.
// SITE: pixels along each side of what a thread of a backward has, 2 with WINDOW_2X2, else 1. THREADS: of a block.
// ITEMS: planes in which a thread does the same, `period` planes apart: their loads are in flight together, and what
//     index arithmetic and the channel's parameters cost is paid once.
// A tap is a position within a window, kh * kernel_w + kw. Limits: planes, and elements of a plane, below 2^30.
#pragma once
#include "common.cuh"

static_assert(SITE == (WINDOW_2X2 ? 2 : 1), "a site is what one window covers, or a pixel");
typedef Packed<scalar_t, SITE> Pixels;

struct Pool {
    int height, width, out_height, out_width;
    int kernel_h, kernel_w, stride_h, stride_w, padding_h, padding_w, dilation_h, dilation_w;
};

// Calls visit(plane, row, column) for every place of a rows x columns grid in each of `planes` planes from `first`.
// Blocks that differ in blockIdx.y alone share these planes: each takes every gridDim.y-th batch of blockDim.x places.
template <class F> __device__ inline void for_places(int first, int planes, int rows, int columns, F visit) {
    Divisor by_plane(rows * columns), by_row(columns);
    unsigned count = planes * by_plane.d;
    for (unsigned i = blockIdx.y * blockDim.x + threadIdx.x; i < count; i += gridDim.y * blockDim.x) {
        unsigned in_plane, column, plane = first + by_plane.divide(i, in_plane), row = by_row.divide(in_plane, column);
        visit((int)plane, (int)row, (int)column);
    }
}

// The plane of a thread's i-th item; the first where there is none, so that loads need no branch.
__device__ inline i64 item_plane(int plane, int i, int period, int planes) {
    return plane + (plane + i * period < planes ? (i64)i * period : 0);
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
    int taps;  // mask: where ceil_mode's last window hangs over the edge, bottom is top again
};
__device__ inline Window window(const Pool& p, const scalar_t* x, int oh, int ow) {
    const Pixels* pixels = (const Pixels*)(x + 2 * oh * p.width + 2 * ow);
    bool both = 2 * oh + 1 < p.height;
    return {pixels[0], pixels[both ? p.width / 2 : 0], both ? 3 : 1};
}
template <class F> __device__ inline Largest largest(const Pool&, const Window& w, F f) {
    Largest best = {f(w.top.v[0]), 0};
    best.take(f(w.top.v[1]), 1);
    best.take(f(w.bottom.v[0]), 2);
    best.take(f(w.bottom.v[1]), 3);
    best.tap &= w.taps;
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

// Row r of one backward site of the plane at x; the last row of the plane stands for one beyond it.
__device__ inline Pixels load_pixels(const Pool& p, const scalar_t* x, int row, int column, int r) {
    return *(const Pixels*)(x + min(row * SITE + r, p.height - 1) * p.width + column * SITE);
}

// Writes value(r, c) to the pixels of one backward site of the plane at dx.
template <class F> __device__ inline void store_site(const Pool& p, scalar_t* dx, int row, int column, F value) {
    #pragma unroll
    for (int r = 0; r < SITE && row * SITE + r < p.height; r++) {
        Pixels out;
        #pragma unroll
        for (int c = 0; c < SITE; c++) out.v[c] = from_acc<scalar_t>(value(r, c));
        *(Pixels*)(dx + (row * SITE + r) * p.width + column * SITE) = out;
    }
}

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
