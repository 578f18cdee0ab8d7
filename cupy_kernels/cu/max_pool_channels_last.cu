// max_pool.cu's kernels for x [images, height, width, channels]; y, argmax and indices are [images, out_height,
// out_width, channels].
//
// Thread mapping: a thread takes WIDTH neighbouring channels of one place, an output or, in the backward, a pixel of
// dx; neighbouring threads take neighbouring channels, then places of a plane. Blocks image * segments + s share an
// image's places.
//
// Macros: scalar_t, acc_t, argmax_t (u8, or int for a kernel of more than 254 taps), WIDTH (a divisor of channels;
// pointers are aligned to a pack), THREADS. Limits: planes below 2^31 elements, all channels counted.
#include "pool_window.cuh"

typedef Packed<scalar_t, WIDTH> Pack;
typedef Packed<argmax_t, WIDTH> Taps;
typedef Packed<i64, WIDTH> Indices;
enum { IN_FLIGHT = 3 };  // taps of a row that are loaded together

// A thread's place and channels; none where `row` is beyond the plane.
struct Place {
    i64 image;
    int row, column, channel;
    __device__ Place(int rows, int columns, int channels) {
        unsigned packs = channels / WIDTH, places = rows * columns * packs,
                 segments = (places + blockDim.x - 1) / blockDim.x;
        unsigned block = blockIdx.x;
        image = block / segments;
        unsigned i = (block - (unsigned)image * segments) * blockDim.x + threadIdx.x, place = i / packs;
        channel = (i - place * packs) * WIDTH;
        row = place / columns;
        column = place - row * columns;
    }
};

extern "C" __global__ void __launch_bounds__(THREADS, 4) max_pool_forward_channels_last(
    const scalar_t* __restrict__ x, scalar_t* __restrict__ y, argmax_t* __restrict__ argmax, i64* __restrict__ indices,
    int channels, int height, int width, int out_height, int out_width, int kernel_h, int kernel_w, int stride_h,
    int stride_w, int padding_h, int padding_w, int dilation_h, int dilation_w) {
    wait_for_earlier_kernels();
    Pool p = {height, width, out_height, out_width, kernel_h, kernel_w, stride_h, stride_w, padding_h, padding_w,
        dilation_h, dilation_w};
    Place at(out_height, out_width, channels);
    if (at.row >= out_height) return;
    const scalar_t* plane = x + at.image * height * width * channels + at.channel;
    Span rows = p.rows(at.row), columns = p.columns(at.column);
    Largest best[WIDTH];
    #pragma unroll
    for (int i = 0; i < WIDTH; i++)
        best[i] = {-(acc_t)__int_as_float(0x7F800000), rows.first * kernel_w + columns.first};
    for (int kh = rows.first; kh < rows.end; kh++) {
        const scalar_t* row = plane + (i64)(rows.start + kh * dilation_h) * width * channels;
        for (int first = columns.first; first < columns.end; first += IN_FLIGHT) {
            Pack in[IN_FLIGHT];
            #pragma unroll
            for (int b = 0; b < IN_FLIGHT; b++)
                if (first + b < columns.end)
                    in[b] = *(const Pack*)(row + (columns.start + (first + b) * dilation_w) * channels);
            #pragma unroll
            for (int b = 0; b < IN_FLIGHT; b++) {
                if (first + b >= columns.end) continue;
                #pragma unroll
                for (int i = 0; i < WIDTH; i++) best[i].take(to_acc(in[b].v[i]), kh * kernel_w + first + b);
            }
        }
    }
    i64 o = ((at.image * out_height + at.row) * out_width + at.column) * channels + at.channel;
    Pack out;
    Taps found;
    #pragma unroll
    for (int i = 0; i < WIDTH; i++) out.v[i] = from_acc<scalar_t>(best[i].value), found.v[i] = best[i].tap;
    *(Pack*)(y + o) = out;
    if (argmax) *(Taps*)(argmax + o) = found;
    if (!indices) return;
    #pragma unroll
    for (int i = 0; i < WIDTH; i++) {
        Pixel pixel = p.pixel_under(at.row, at.column, best[i].tap);
        indices[o + i] = (i64)pixel.h * width + pixel.w;
    }
}

extern "C" __global__ void __launch_bounds__(THREADS, 4) max_pool_backward_channels_last(
    const scalar_t* __restrict__ dy, const argmax_t* __restrict__ argmax, scalar_t* __restrict__ dx, int channels,
    int height, int width, int out_height, int out_width, int kernel_h, int kernel_w, int stride_h, int stride_w,
    int padding_h, int padding_w, int dilation_h, int dilation_w) {
    wait_for_earlier_kernels();
    Pool p = {height, width, out_height, out_width, kernel_h, kernel_w, stride_h, stride_w, padding_h, padding_w,
        dilation_h, dilation_w};
    Place at(height, width, channels);
    if (at.row >= height) return;
    i64 outputs = at.image * out_height * out_width * channels + at.channel;
    acc_t sum[WIDTH];
    #pragma unroll
    for (int i = 0; i < WIDTH; i++) sum[i] = 0;
    p.for_windows(at.row, at.column, [&](int o, int tap) {
        i64 from = outputs + (i64)o * channels;
        Taps won = *(const Taps*)(argmax + from);
        Pack gradient = *(const Pack*)(dy + from);
        #pragma unroll
        for (int i = 0; i < WIDTH; i++)
            if (won.v[i] == tap) sum[i] += to_acc(gradient.v[i]);
    });
    Pack out;
    #pragma unroll
    for (int i = 0; i < WIDTH; i++) out.v[i] = from_acc<scalar_t>(sum[i]);
    *(Pack*)(dx + ((at.image * height + at.row) * width + at.column) * channels + at.channel) = out;
}

extern "C" __global__ void __launch_bounds__(THREADS, 4) max_pool_select_channels_last(
    const scalar_t* __restrict__ x, const argmax_t* __restrict__ argmax, scalar_t* __restrict__ y, int channels,
    int height, int width, int out_height, int out_width, int kernel_h, int kernel_w, int stride_h, int stride_w,
    int padding_h, int padding_w, int dilation_h, int dilation_w) {
    wait_for_earlier_kernels();
    Pool p = {height, width, out_height, out_width, kernel_h, kernel_w, stride_h, stride_w, padding_h, padding_w,
        dilation_h, dilation_w};
    Place at(out_height, out_width, channels);
    if (at.row >= out_height) return;
    i64 o = ((at.image * out_height + at.row) * out_width + at.column) * channels + at.channel;
    Pack out;
    #pragma unroll
    for (int i = 0; i < WIDTH; i++) {
        Pixel pixel = p.pixel_under(at.row, at.column, argmax[o + i]);
        i64 from = ((at.image * height + pixel.h) * width + pixel.w) * channels + at.channel + i;
        out.v[i] = pixel.h < height && pixel.w < width ? x[from] : from_acc<scalar_t>((acc_t)0);
    }
    *(Pack*)(y + o) = out;
}
