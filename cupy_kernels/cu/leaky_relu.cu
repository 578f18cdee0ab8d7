// Forward y = x where x > 0, else slope x; backward dx = dy where x > 0, else slope dy.
//
// One thread per WIDTH neighbouring elements of a contiguous array. Macros: scalar_t, acc_t, WIDTH (16 bytes of
// scalar_t where all pointers are aligned to 16 bytes, else 1).
#include "common.cuh"

typedef Packed<scalar_t, WIDTH> Pack;

// v where x > 0, else slope v; denormals count. A NaN is not greater than 0.
__device__ inline scalar_t leaky(scalar_t v, scalar_t x, acc_t slope) {
    acc_t a = to_acc(v);
    return from_acc<scalar_t>(greater(to_acc(x), (acc_t)0) ? a : multiply_unflushed(a, slope));
}

extern "C" __global__ void leaky_relu_forward(
    const scalar_t* __restrict__ x, scalar_t* __restrict__ y, acc_t slope, i64 size) {
    wait_for_earlier_kernels();
    i64 start = ((i64)blockIdx.x * blockDim.x + threadIdx.x) * WIDTH;
    if (start + WIDTH <= size) {
        Pack in = *(const Pack*)(x + start), out;
        #pragma unroll
        for (int i = 0; i < WIDTH; i++) out.v[i] = leaky(in.v[i], in.v[i], slope);
        *(Pack*)(y + start) = out;
    } else {
        for (; start < size; start++) y[start] = leaky(x[start], x[start], slope);
    }
}

extern "C" __global__ void leaky_relu_backward(
    const scalar_t* __restrict__ dy, const scalar_t* __restrict__ x, scalar_t* __restrict__ dx, acc_t slope, i64 size) {
    wait_for_earlier_kernels();
    i64 start = ((i64)blockIdx.x * blockDim.x + threadIdx.x) * WIDTH;
    if (start + WIDTH <= size) {
        Pack gradient = *(const Pack*)(dy + start), in = *(const Pack*)(x + start), out;
        #pragma unroll
        for (int i = 0; i < WIDTH; i++) out.v[i] = leaky(gradient.v[i], in.v[i], slope);
        *(Pack*)(dx + start) = out;
    } else {
        for (; start < size; start++) dx[start] = leaky(dy[start], x[start], slope);
    }
}
