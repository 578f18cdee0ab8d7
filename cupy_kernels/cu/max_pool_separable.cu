// max_pool.cu's forward for large windows at stride 1 and dilation 1, of x [planes, height, width]: first the largest element of each row
// of a window, then that of its rows. 2 k steps for each output, not k * k.
//
// Thread mapping: block plane * tiles_h * tiles_w + t takes a tile of tile_h x tile_w outputs. Its threads share the tile's input, brought
// into shared memory, then the windows' rows, then the outputs.
//
// Macros: scalar_t, acc_t, tap_t (u8, or int for a kernel of more than 254 taps), THREADS. Limits: a plane has fewer than 2^31 elements;
// dynamic shared memory holds an input tile of acc_t, and tile_w results of acc_t and int for each of its rows.
#include "pool_window.cuh"

extern "C" __global__ void __launch_bounds__(THREADS) max_pool_forward_separable(
    const scalar_t* __restrict__ x, scalar_t* __restrict__ y, tap_t* __restrict__ taps, i64* __restrict__ indices,
    int height, int width, int out_height, int out_width, int kernel_h, int kernel_w, int padding_h, int padding_w,
    int tile_h, int tile_w) {
    DYNAMIC_SHARED(acc_t, input);
    int rows = tile_h + kernel_h - 1, columns = tile_w + kernel_w - 1;
    acc_t* values = input + rows * columns;        // the largest element of each window's row
    int* places = (int*)(values + rows * tile_w);  // its place in the row
    int tiles_h = (out_height + tile_h - 1) / tile_h, tiles_w = (out_width + tile_w - 1) / tile_w;
    int block = blockIdx.x, tile = block % (tiles_h * tiles_w);
    i64 plane = block / (tiles_h * tiles_w);
    int first_oh = tile / tiles_w * tile_h, first_ow = tile % tiles_w * tile_w;  // the tile's first output
    int first_h = first_oh - padding_h, first_w = first_ow - padding_w;  // and pixel, which may be in the padding
    x += plane * height * width;
    Divisor by_columns(columns), by_tile(tile_w);
    for (int i = threadIdx.x; i < rows * columns; i += blockDim.x) {
        unsigned column, row = by_columns.divide(i, column);
        int h = first_h + (int)row, w = first_w + (int)column;
        if (h >= 0 && h < height && w >= 0 && w < width) input[i] = to_acc(x[h * width + w]);
    }
    __syncthreads();
    for (int i = threadIdx.x; i < rows * tile_w; i += blockDim.x) {
        unsigned column, row = by_tile.divide(i, column);
        int h = first_h + (int)row;
        if (h < 0 || h >= height) continue;
        Span span(first_ow + column, width, kernel_w, 1, padding_w, 1);
        Largest best = {-(acc_t)__int_as_float(0x7F800000), span.first};
        for (int kw = span.first; kw < span.end; kw++) best.take(input[row * columns + column + kw], kw);
        values[i] = best.value;
        places[i] = best.tap;
    }
    __syncthreads();
    for (int i = threadIdx.x; i < tile_h * tile_w; i += blockDim.x) {
        unsigned column, row = by_tile.divide(i, column);
        int oh = first_oh + (int)row, ow = first_ow + (int)column;
        if (oh >= out_height || ow >= out_width) continue;
        Span span(oh, height, kernel_h, 1, padding_h, 1);
        Largest best = {-(acc_t)__int_as_float(0x7F800000), span.first};
        for (int kh = span.first; kh < span.end; kh++) best.take(values[i + kh * tile_w], kh);
        int place = places[i + best.tap * tile_w];
        i64 o = (plane * out_height + oh) * out_width + ow;
        y[o] = from_acc<scalar_t>(best.value);
        if (taps) taps[o] = best.tap * kernel_w + place;
        if (indices) indices[o] = (i64)(oh - padding_h + best.tap) * width + ow - padding_w + place;
    }
}
