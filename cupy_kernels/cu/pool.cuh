// Pooling of planes: how threads walk over them, the largest element of a window, and the windows that cover a pixel.
//
// Macros: scalar_t, acc_t, argmax_t (u8, or int for a kernel of more than 254 taps).
// WINDOW_2X2: 1 fixes kernel 2, stride 2, padding 0, dilation 1, for even widths and arrays whose pairs of elements are
//     aligned, and moves two neighbours of a row as one. 0 takes the windows from the arguments.
// WINDOW_3X3: 1 or 2 fixes kernel 3, dilation 1 and this stride, so that what a place needs is loaded at once. 0 does
// not. SITE: pixels along each side of what a thread of a backward has, 2 with WINDOW_2X2, else 1. THREADS: of a block.
// ITEMS: planes that a thread processes together, `period` planes apart. Their loads overlap, and they share the index
//     arithmetic and the channel's parameters.
// Limits: planes, and elements of a plane, below 2^30.
#pragma once
#include "pool_window.cuh"

static_assert(SITE == (WINDOW_2X2 ? 2 : 1), "a site is what one window covers, or a pixel");
typedef Packed<scalar_t, SITE> Pixels;

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

// What the compiler may know of the windows.
__device__ inline Pool fixed(Pool p) {
    if (WINDOW_3X3) {
        p.kernel_h = p.kernel_w = 3, p.stride_h = p.stride_w = WINDOW_3X3, p.dilation_h = p.dilation_w = 1;
    }
    return p;
}

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
    Span rows, columns;
};
__device__ inline Window window(const Pool& p, const scalar_t* x, int oh, int ow) {
    return {x, p.rows(oh), p.columns(ow)};
}
template <class F> __device__ inline Largest largest(const Pool& p, const Window& w, F f) {
    Largest best = {-(acc_t)__int_as_float(0x7F800000), w.rows.first * p.kernel_w + w.columns.first};
#if WINDOW_3X3
    const scalar_t* corner = w.x + w.rows.start * p.width + w.columns.start;
    auto inside = [&](int tap) { return w.rows.has(tap / 3) && w.columns.has(tap % 3); };
    scalar_t in[9];
    #pragma unroll
    for (int tap = 0; tap < 9; tap++)
        if (inside(tap)) in[tap] = corner[tap / 3 * p.width + tap % 3];
    #pragma unroll
    for (int tap = 0; tap < 9; tap++)
        if (inside(tap)) best.take(f(in[tap]), tap);
    return best;
#endif
    for (int kh = w.rows.first; kh < w.rows.end; kh++) {
        const scalar_t* row = w.x + (w.rows.start + kh * p.dilation_h) * p.width + w.columns.start;
        for (int kw = w.columns.first; kw < w.columns.end; kw++)
            best.take(f(row[kw * p.dilation_w]), kh * p.kernel_w + kw);
    }
    return best;
}
#endif

// The pixel under a tap of the window (oh, ow), see `Pool::pixel_under`.
__device__ inline Pixel pixel_under(const Pool& p, int oh, int ow, int tap) {
#if WINDOW_2X2
    return {2 * oh + (tap >> 1), 2 * ow + (tap & 1)};
#else
    return p.pixel_under(oh, ow, tap);
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
__device__ inline Gathered gather(const Pool& p, const argmax_t* argmax, int row, int column, F gradient) {
    if (row >= p.out_height) return {(acc_t)0, 0};
    int o = row * p.out_width + column;
    return {gradient(o), argmax[o]};
}
#else
// Sums gradient(o) over the windows o of the plane whose tap is the pixel (row, column), in ascending order.
// `argmax` points at the plane's.
template <class F>
__device__ inline Gathered gather(const Pool& p, const argmax_t* argmax, int row, int column, F gradient) {
    acc_t sum = 0;
#if WINDOW_3X3
    enum { MOST = WINDOW_3X3 == 1 ? 3 : 2, NONE = -100 };  // windows along each axis that cover a pixel; no tap
    int h = row + p.padding_h, w = column + p.padding_w;
    int oh = first_window(h, 3, WINDOW_3X3, 1), rows = last_window(h, WINDOW_3X3, p.out_height) - oh + 1;
    int ow = first_window(w, 3, WINDOW_3X3, 1), columns = last_window(w, WINDOW_3X3, p.out_width) - ow + 1;
    int won[MOST * MOST], first = oh * p.out_width + ow;
    int own = (h - oh * WINDOW_3X3) * 3 + w - ow * WINDOW_3X3;  // the pixel's tap in the first window
    #pragma unroll
    for (int i = 0; i < MOST * MOST; i++) {
        bool covers = i / MOST < rows && i % MOST < columns;
        won[i] = covers ? (int)argmax[first + i / MOST * p.out_width + i % MOST] : NONE;
    }
    #pragma unroll
    for (int i = 0; i < MOST * MOST; i++)
        if (won[i] == own - (i / MOST * 3 + i % MOST) * WINDOW_3X3)
            sum += gradient(first + i / MOST * p.out_width + i % MOST);
    return {sum, 0};
#endif
    p.for_windows(row, column, [&](int o, int tap) {
        if (argmax[o] == tap) sum += gradient(o);
    });
    return {sum, 0};
}
#endif
