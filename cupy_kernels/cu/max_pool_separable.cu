// max_pool.cu's forward and backward for large windows at stride 1 and dilation 1, of x [planes, height, width]: first
// along the rows of the windows, then across them. 2 k steps for each output or pixel, not k * k.
//
// Thread mapping: block plane * tiles_h * tiles_w + t computes a tile of tile_h x tile_w outputs, or pixels of dx. Its
// threads first load the values that the tile depends on into shared memory. They then compute the results of the first
// direction there, and then the tile.
//
// Macros: scalar_t, acc_t, argmax_t (u8, or int for a kernel of more than 254 taps), THREADS. Limits: a plane has fewer
// than 2^31 elements; dynamic shared memory holds, for rows = tile_h + kernel_h - 1 and columns = tile_w +
// kernel_w - 1, in the forward rows * columns of acc_t and rows * tile_w pairs of acc_t and int, in the backward
// (rows + tile_h) * columns such pairs.
#include "pool_window.cuh"

// A block's tile of the planes' rows x columns places, and its loops.
struct Tile {
    i64 plane;
    int first_row, first_column;
    __device__ Tile(int rows, int columns, int tile_h, int tile_w) {
        int tiles_h = (rows + tile_h - 1) / tile_h, tiles_w = (columns + tile_w - 1) / tile_w;
        int block = blockIdx.x, tile = block % (tiles_h * tiles_w);
        plane = block / (tiles_h * tiles_w);
        first_row = tile / tiles_w * tile_h;
        first_column = tile % tiles_w * tile_w;
    }
};
// Calls visit(i, row, column) for the i-th place of rows x columns, shared among the block's threads.
template <class F> __device__ inline void for_shared(int rows, int columns, F visit) {
    Divisor by_row(columns);
    for (int i = threadIdx.x; i < rows * columns; i += blockDim.x) {
        unsigned column, row = by_row.divide(i, column);
        visit(i, (int)row, (int)column);
    }
}

extern "C" __global__ void __launch_bounds__(THREADS) max_pool_forward_separable(
    const scalar_t* __restrict__ x, scalar_t* __restrict__ y, argmax_t* __restrict__ argmax, i64* __restrict__ indices,
    int height, int width, int out_height, int out_width, int kernel_h, int kernel_w, int padding_h, int padding_w,
    int tile_h, int tile_w) {
    wait_for_earlier_kernels();
    DYNAMIC_SHARED(acc_t, input);
    int rows = tile_h + kernel_h - 1, columns = tile_w + kernel_w - 1;
    acc_t* values = input + rows * columns;        // the largest element of each window's row
    int* places = (int*)(values + rows * tile_w);  // its place in the row
    Tile tile(out_height, out_width, tile_h, tile_w);
    int first_h = tile.first_row - padding_h, first_w = tile.first_column - padding_w;  // may be in the padding
    x += tile.plane * height * width;
    for_shared(rows, columns, [&](int i, int row, int column) {
        int h = first_h + row, w = first_w + column;
        if (h >= 0 && h < height && w >= 0 && w < width) input[i] = to_acc(x[h * width + w]);
    });
    __syncthreads();
    for_shared(rows, tile_w, [&](int i, int row, int column) {
        int h = first_h + row;
        if (h < 0 || h >= height) return;
        Span span(tile.first_column + column, width, kernel_w, 1, padding_w, 1);
        Largest best = {-(acc_t)__int_as_float(0x7F800000), span.first};
        for (int kw = span.first; kw < span.end; kw++) best.take(input[row * columns + column + kw], kw);
        values[i] = best.value;
        places[i] = best.tap;
    });
    __syncthreads();
    for_shared(tile_h, tile_w, [&](int i, int row, int column) {
        int oh = tile.first_row + row, ow = tile.first_column + column;
        if (oh >= out_height || ow >= out_width) return;
        Span span(oh, height, kernel_h, 1, padding_h, 1);
        Largest best = {-(acc_t)__int_as_float(0x7F800000), span.first};
        for (int kh = span.first; kh < span.end; kh++) best.take(values[i + kh * tile_w], kh);
        int place = places[i + best.tap * tile_w];
        i64 o = (tile.plane * out_height + oh) * out_width + ow;
        y[o] = from_acc<scalar_t>(best.value);
        if (argmax) argmax[o] = best.tap * kernel_w + place;
        if (indices) indices[o] = (i64)(oh - padding_h + best.tap) * width + ow - padding_w + place;
    });
}

// A row of a window has one largest element: what the windows give to rows is summed up first, then what rows give to
// pixels.
extern "C" __global__ void __launch_bounds__(THREADS) max_pool_backward_separable(
    const scalar_t* __restrict__ dy, const argmax_t* __restrict__ argmax, scalar_t* __restrict__ dx, int height,
    int width, int out_height, int out_width, int kernel_h, int kernel_w, int padding_h, int padding_w, int tile_h,
    int tile_w) {
    wait_for_earlier_kernels();
    DYNAMIC_SHARED(acc_t, gradients);
    int rows = tile_h + kernel_h - 1, columns = tile_w + kernel_w - 1;  // of windows that cover a pixel of the tile
    acc_t* sums = gradients + rows * columns;                           // [tile_h, columns]: of a row of windows
    // [rows, columns]: taps, -1 where there is no window.
    int* won = (int*)(sums + tile_h * columns);
    // [tile_h, columns]: where in the row the sum goes.
    int* places = won + rows * columns;
    Tile tile(height, width, tile_h, tile_w);
    int first_oh = tile.first_row + padding_h - kernel_h + 1, first_ow = tile.first_column + padding_w - kernel_w + 1;
    i64 outputs = tile.plane * out_height * out_width;
    for_shared(rows, columns, [&](int i, int row, int column) {
        int oh = first_oh + row, ow = first_ow + column;
        bool inside = oh >= 0 && oh < out_height && ow >= 0 && ow < out_width;
        i64 o = outputs + oh * out_width + ow;
        won[i] = inside ? (int)argmax[o] : -1;
        gradients[i] = inside ? to_acc(dy[o]) : (acc_t)0;
    });
    __syncthreads();
    for_shared(tile_h, columns, [&](int i, int row, int column) {
        acc_t sum = 0;
        int place = -1;
        for (int k = 0; k < kernel_h; k++) {  // the window whose first row lies kernel_h - 1 - k above the pixels' row
            int at = (row + k) * columns + column, within = won[at] - (kernel_h - 1 - k) * kernel_w;
            if (won[at] < 0 || within < 0 || within >= kernel_w) continue;
            sum += gradients[at];
            place = within;
        }
        sums[i] = sum;
        places[i] = place;
    });
    __syncthreads();
    for_shared(tile_h, tile_w, [&](int i, int row, int column) {
        int h = tile.first_row + row, w = tile.first_column + column;
        if (h >= height || w >= width) return;
        acc_t sum = 0;
        for (int k = 0; k < kernel_w; k++) {
            int at = row * columns + column + k;
            if (places[at] == kernel_w - 1 - k) sum += sums[at];
        }
        dx[(tile.plane * height + h) * width + w] = from_acc<scalar_t>(sum);
    });
}
