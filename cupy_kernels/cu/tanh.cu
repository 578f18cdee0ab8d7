// Forward y = tanh(x); backward dx = dy (1 - y^2), from the saved y.
//
// One thread per WIDTH neighbouring elements of a contiguous array. Macros: scalar_t, acc_t, WIDTH (16 bytes of
// scalar_t where all pointers are aligned to 16 bytes, else 1).
#include "common.cuh"
#include "tanh.cuh"

struct __align__(WIDTH * sizeof(scalar_t)) Pack { scalar_t v[WIDTH]; };

extern "C" __global__ void tanh_forward(const scalar_t* __restrict__ x, scalar_t* __restrict__ y, i64 size) {
    wait_for_earlier_kernels();
    i64 start = ((i64)blockIdx.x * blockDim.x + threadIdx.x) * WIDTH;
    if (start + WIDTH <= size) {
        Pack in = *(const Pack*)(x + start), out;
        #pragma unroll
        for (int i = 0; i < WIDTH; i++) out.v[i] = from_acc<scalar_t>(tanh_of(to_acc(in.v[i])));
        *(Pack*)(y + start) = out;
    } else {
        for (; start < size; start++) y[start] = from_acc<scalar_t>(tanh_of(to_acc(x[start])));
    }
}

extern "C" __global__ void tanh_backward(
    const scalar_t* __restrict__ dy, const scalar_t* __restrict__ y, scalar_t* __restrict__ dx, i64 size) {
    wait_for_earlier_kernels();
    i64 start = ((i64)blockIdx.x * blockDim.x + threadIdx.x) * WIDTH;
    if (start + WIDTH <= size) {
        Pack gradient = *(const Pack*)(dy + start), saved = *(const Pack*)(y + start), out;
        #pragma unroll
        for (int i = 0; i < WIDTH; i++)
            out.v[i] = from_acc<scalar_t>(to_acc(gradient.v[i]) * tanh_slope(to_acc(saved.v[i])));
        *(Pack*)(dx + start) = out;
    } else {
        for (; start < size; start++) dx[start] = from_acc<scalar_t>(to_acc(dy[start]) * tanh_slope(to_acc(y[start])));
    }
}
