// Pooling windows: the pixels of one, the windows that cover a pixel, and the largest element.
//
// A tap is a position within a window, kh * kernel_w + kw.
#pragma once
#include "common.cuh"

// The taps of a window along one axis that lie in the plane: from `first`, to before `end`; none if that is not more.
struct Span {
    int start, first, end;  // start: where tap 0 lies, which may be in the padding
    __device__ Span() {}
    __device__ Span(int window, int size, int kernel, int stride, int padding, int dilation) {
        start = window * stride - padding;
        bool dense = dilation == 1;  // most are, and a division takes long
        first = start >= 0 ? 0 : dense ? -start : (dilation - 1 - start) / dilation;
        end = min(kernel, dense ? size - start : (size - start + dilation - 1) / dilation);
    }
    __device__ bool has(int tap) const { return tap >= first && tap < end; }
};

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

struct Pixel { int h, w; };

struct Pool {
    int height, width, out_height, out_width;
    int kernel_h, kernel_w, stride_h, stride_w, padding_h, padding_w, dilation_h, dilation_w;

    __device__ Span rows(int oh) const { return Span(oh, height, kernel_h, stride_h, padding_h, dilation_h); }
    __device__ Span columns(int ow) const { return Span(ow, width, kernel_w, stride_w, padding_w, dilation_w); }

    // The pixel under a tap of the window (oh, ow). It lies beyond the plane where a dilated window holds no pixel.
    __device__ Pixel pixel_under(int oh, int ow, int tap) const {
        return {oh * stride_h - padding_h + tap / kernel_w * dilation_h,
            ow * stride_w - padding_w + tap % kernel_w * dilation_w};
    }

    // Calls visit(window, tap) for the windows that cover the pixel (row, column), in ascending order; tap: the
    // pixel's.
    template <class F> __device__ void for_windows(int row, int column, F visit) const {
        int h = row + padding_h, w = column + padding_w;
        int oh = first_window(h, kernel_h, stride_h, dilation_h), oh_last = last_window(h, stride_h, out_height);
        int first = first_window(w, kernel_w, stride_w, dilation_w), last = last_window(w, stride_w, out_width);
        for (; oh <= oh_last; oh++) {
            int kh = tap_at(h - oh * stride_h, dilation_h);
            if (kh < 0) continue;
            for (int ow = first; ow <= last; ow++) {
                int kw = tap_at(w - ow * stride_w, dilation_w);
                if (kw >= 0) visit(oh * out_width + ow, kh * kernel_w + kw);
            }
        }
    }
};

// The largest element so far. A NaN beats everything, the last of several; of equals the first wins.
struct Largest {
    acc_t value;
    int tap;
    __device__ void take(acc_t v, int at) {
        if (greater(v, value) | is_nan(v)) value = v, tap = at;  // no short circuit: a select, not a branch
    }
};
