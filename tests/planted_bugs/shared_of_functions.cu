//// a template's sums, an instance in place of another one
// error: race: thread \d+ writes warps\[\d\], which thread \d+ reads
// x: 1024, y: 1024
template <class T> __device__ T block_sum(T v) {
    __shared__ float warps[8];
    for (int step = 16; step; step /= 2) v += __shfl_xor_sync(~0u, v, step);
    if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = v;
    __syncthreads();
    T sum = 0;
    for (int i = 0; i < 8; i++) sum += warps[i];
    return sum;
}
extern "C" __global__ void planted(const float* x, float* y, int n) {
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    y[i] = block_sum<float>(x[i]) + block_sum<@int@float@>(1);
}

//// an inline function without its barrier
// error: race|nobody has written
// x: 1024, y: 1024
__device__ inline float block_sum(float v) {
    __shared__ float warps[8], sum;
    for (int step = 16; step; step /= 2) v += __shfl_xor_sync(~0u, v, step);
    if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = v;
    __syncthreads();
    v = 0;
    for (int i = 0; i < 8; i++) v += warps[i];
    if (threadIdx.x == 255) sum = v;
    @__syncthreads();@@
    return sum;
}
extern "C" __global__ void planted(const float* x, float* y, int n) {
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    __shared__ float largest;
    if (threadIdx.x == 0) largest = x[i];
    y[i] = block_sum(x[i]);
    y[i] += largest;
}

//// a member function's array, which only another block has written
// error: planted\.cu:8: thread \d+ reads kept\[\d+\], which nobody has written
// x: 1024, y: 1024
struct Rows {
    int row;
    __device__ float reversed(float v) {
        __shared__ float kept[256];
        if (row @>= 0@== 0@) kept[threadIdx.x] = v;
        __syncthreads();
        return kept[255 - threadIdx.x];
    }
};
extern "C" __global__ void planted(const float* x, float* y, int n) {
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    __shared__ Rows rows;
    if (threadIdx.x == 0) rows.row = blockIdx.x;
    __syncthreads();
    y[i] = rows.reversed(x[i]);
}

//// behind an array of a template's member function
// error: thread 255 writes out of bounds: kept\[255\], which has 255 elements
// x: 1024, y: 1024
template <class T, int N> struct Rows {
    static __device__ T reversed(T v) {
        __shared__ __align__(16) T kept[N];
        kept[threadIdx.x] = v;
        __syncthreads();
        return kept[255 - threadIdx.x];
    }
};
extern "C" __global__ void planted(const float* x, float* y, int n) {
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    y[i] = Rows<float, @256@255@>::reversed(x[i]) + Rows<int, 300>::reversed(i);
}

//// a template's mbarrier
// error: waits for phase 0 of the mbarrier full, which does not end: 1 of 32 arrivals
// x: 1024, y: 1024
#include "mbarrier.cuh"
template <int arrivals> static __device__ void barrier() {
    __shared__ MBarrier full;
    if (threadIdx.x == 0) mbarrier_init(full, arrivals);
    __syncthreads();
    if (threadIdx.x < arrivals@@ - 1@) mbarrier_arrive(full);
    mbarrier_wait(full, 0);
}
extern "C" __global__ void planted(const float* x, float* y, int n) {
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    __shared__ float s[256];
    s[threadIdx.x] = x[i];
    barrier<32>();
    barrier<256>();
    y[i] = s[255 - threadIdx.x];
}
