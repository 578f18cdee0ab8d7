//// no wait for a copy
// error: before the wait for the cp.async
// x: 256, y: 256, grid: 1
#include "async_copy.cuh"
extern "C" __global__ void planted(const float* x, float* y, int n) {
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    __shared__ __align__(16) float s[256];
    if (i < 64) cp_async_16(s + 4 * i, x + 4 * i, true);
    cp_async_commit();
    @cp_async_wait<0>();@@
    __syncthreads();
    y[i] = s[i];
}

//// a wait for all but the group that is read
// error: before the wait for the cp.async
// x: 256, y: 256, grid: 1
#include "async_copy.cuh"
extern "C" __global__ void planted(const float* x, float* y, int n) {
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    __shared__ __align__(16) float s[2][256];
    for (int k = 0; k < 2; k++) {
        if (i < 64) cp_async_16(s[k] + 4 * i, x + 4 * i, true);
        cp_async_commit();
    }
    cp_async_wait<@0@1@>();
    __syncthreads();
    y[i] = s[1][i];
}

//// a wait, and no barrier before others read
// error: race|before the wait|nobody has written
// x: 256, y: 256, grid: 1
#include "async_copy.cuh"
extern "C" __global__ void planted(const float* x, float* y, int n) {
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    __shared__ __align__(16) float s[256];
    if (i < 64) cp_async_16(s + 4 * i, x + 4 * i, true);
    cp_async_commit();
    cp_async_wait<0>();
    @__syncthreads();@@
    y[i] = s[i];
}

//// a buffer that is still read is filled again
// error: race
// x: 256, y: 256, grid: 1
#include "async_copy.cuh"
extern "C" __global__ void planted(const float* x, float* y, int n) {
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    __shared__ __align__(16) float s[256];
    float sum = 0;
    for (int k = 0; k < 2; k++) {
        if (i < 64) cp_async_16(s + 4 * i, x + 4 * i, true);
        cp_async_commit();
        cp_async_wait<0>();
        __syncthreads();
        sum += s[255 - i];
        @__syncthreads();@@
    }
    y[i] = sum;
}

//// a copy from an odd address
// error: cp.async of 16 bytes is not aligned
// x: 256, y: 256, grid: 1
#include "async_copy.cuh"
extern "C" __global__ void planted(const float* x, float* y, int n) {
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    __shared__ __align__(16) float s[256];
    if (i < 63) cp_async_16(s + 4 * i, x + 4 * i@@ + 1@, true);
    if (i >= 252) s[i] = 0;
    cp_async_commit();
    cp_async_wait<0>();
    __syncthreads();
    y[i] = s[i];
}

//// the stage that is read is filled again
// error: race|before the wait|nobody has written
// x: 512, y: 64, grid: 1, block: 64
#include "async_copy.cuh"
extern "C" __global__ void planted(const float* x, float* y, int n) {
    __shared__ __align__(16) float s[2][256];
    int t = threadIdx.x;
    float sum = 0;
    cp_async_16(s[0] + 4 * t, x + 4 * t, true);
    cp_async_commit();
    for (int k = 0; k < 2; k++) {
        if (k == 0) cp_async_16(s[@1@0@] + 4 * t, x + 256 + 4 * t, true);
        cp_async_commit();
        cp_async_wait<1>();
        __syncthreads();
        sum += s[k][(t * 4 + 7) % 256];
        __syncthreads();
    }
    y[t] = sum;
}

//// a copy from after the end
// error: out of bounds
// x: 250, y: 64, grid: 1, block: 64
#include "async_copy.cuh"
extern "C" __global__ void planted(const float* x, float* y, int n) {
    __shared__ __align__(16) float s[256];
    int t = threadIdx.x;
    cp_async_16(s + 4 * t, @4 * t + 4 <= n ? x + 4 * t : x@x + 4 * t@, @4 * t + 4 <= n@true@);
    cp_async_commit();
    cp_async_wait<0>();
    y[t] = s[4 * t + 3];
}

//// copies that nobody commits
// error: before the wait
// x: 256, y: 256, grid: 1
#include "async_copy.cuh"
extern "C" __global__ void planted(const float* x, float* y, int n) {
    __shared__ __align__(16) float s[256];
    int t = threadIdx.x;
    if (t < 64) cp_async_16(s + 4 * t, x + 4 * t, true);
    @cp_async_commit();@@
    cp_async_wait<0>();
    __syncthreads();
    y[t] = s[t];
}

//// the source of a copy changes in flight
// error: race
// x: 256, y: 256, grid: 1
#include "async_copy.cuh"
extern "C" __global__ void planted(const float* x, INOUT float* y, int n) {
    __shared__ __align__(16) float s[256];
    int t = threadIdx.x;
    if (t < 64) cp_async_16(s + 4 * t, y + 4 * t, true);
    cp_async_commit();
    @cp_async_wait<0>();
    __syncthreads();@@
    if (t >= 64) y[t] = x[t];
    cp_async_wait<0>();
    __syncthreads();
    if (t < 64) y[t] = s[t];
}
