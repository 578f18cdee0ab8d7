//// sums are read before the wait
// error: planted\.cu:\d+: thread \d+ reads sums before the wait for their wgmma at planted\.cu:12
// x: 1152, y: 512, grid: 1, block: 128
#include "wgmma.cuh"
extern "C" __global__ void planted(const half_t* x, float* y, int n) {
    __shared__ __align__(128) u8 s[2304];
    int t = threadIdx.x;
    for (int i = t; i < n; i += 128) ((half_t*)s)[i] = x[i];
    WgmmaOperand a(s, 1024, 128), b(s + 2048, 128, 128);
    float d[1][4] = {};
    fence_async_proxy();
    __syncthreads();
    wgmma_fence();
    wgmma<1>(d, a, b);
    wgmma_commit();
    @wgmma_wait<0>();@@
    for (int c = 0; c < 4; c++) y[4 * t + c] = d[0][c];
}

//// a wait that leaves the group in flight
// error: reads sums before the wait
// x: 1152, y: 512, grid: 1, block: 128
#include "wgmma.cuh"
extern "C" __global__ void planted(const half_t* x, float* y, int n) {
    __shared__ __align__(128) u8 s[2304];
    int t = threadIdx.x;
    for (int i = t; i < n; i += 128) ((half_t*)s)[i] = x[i];
    WgmmaOperand a(s, 1024, 128), b(s + 2048, 128, 128);
    float d[1][4] = {};
    fence_async_proxy();
    __syncthreads();
    wgmma_fence();
    wgmma<1>(d, a, b);
    wgmma_commit();
    wgmma_wait<@0@1@>();
    for (int c = 0; c < 4; c++) y[4 * t + c] = d[0][c];
}

//// a wait without a commit
// error: reads sums before the wait
// x: 1152, y: 512, grid: 1, block: 128
#include "wgmma.cuh"
extern "C" __global__ void planted(const half_t* x, float* y, int n) {
    __shared__ __align__(128) u8 s[2304];
    int t = threadIdx.x;
    for (int i = t; i < n; i += 128) ((half_t*)s)[i] = x[i];
    WgmmaOperand a(s, 1024, 128), b(s + 2048, 128, 128);
    float d[1][4] = {};
    fence_async_proxy();
    __syncthreads();
    wgmma_fence();
    wgmma<1>(d, a, b);
    @wgmma_commit();@@
    wgmma_wait<0>();
    for (int c = 0; c < 4; c++) y[4 * t + c] = d[0][c];
}

//// sums are written before the wait
// error: writes sums before the wait
// x: 1152, y: 512, grid: 1, block: 128
#include "wgmma.cuh"
extern "C" __global__ void planted(const half_t* x, float* y, int n) {
    __shared__ __align__(128) u8 s[2304];
    int t = threadIdx.x;
    for (int i = t; i < n; i += 128) ((half_t*)s)[i] = x[i];
    WgmmaOperand a(s, 1024, 128), b(s + 2048, 128, 128);
    float d[1][4] = {};
    fence_async_proxy();
    __syncthreads();
    wgmma_fence();
    wgmma<1>(d, a, b);
    wgmma_commit();
    @@d[0][0] = 1;@
    wgmma_wait<0>();
    @d[0][0] = 1;@@
    for (int c = 0; c < 4; c++) y[4 * t + c] = d[0][c];
}

//// an operand is overwritten in flight
// error: s\[0\], which is written before the wait for that \(by thread \d at planted\.cu:16\); y\[0\] comes of it
// x: 1152, y: 512, grid: 1, block: 128
#include "wgmma.cuh"
extern "C" __global__ void planted(const half_t* x, float* y, int n) {
    __shared__ __align__(128) u8 s[2304];
    int t = threadIdx.x;
    for (int i = t; i < n; i += 128) ((half_t*)s)[i] = x[i];
    WgmmaOperand a(s, 1024, 128), b(s + 2048, 128, 128);
    float d[1][4] = {};
    fence_async_proxy();
    __syncthreads();
    wgmma_fence();
    wgmma<1>(d, a, b);
    wgmma_commit();
    @wgmma_wait<0>();@@
    __syncthreads();
    ((half_t*)s)[t] = half_t();
    @@wgmma_wait<0>();@
    for (int c = 0; c < 4; c++) y[4 * t + c] = d[0][c];
}

//// a copy fills an operand in flight
// error: s\[2048\], which is written before the wait for that
// x: 1152, y: 512, grid: 1, block: 128
#include "wgmma.cuh"
#include "async_copy.cuh"
extern "C" __global__ void planted(const half_t* x, float* y, int n) {
    __shared__ __align__(128) u8 s[2304];
    int t = threadIdx.x;
    for (int i = t; i < n; i += 128) ((half_t*)s)[i] = x[i];
    WgmmaOperand a(s, 1024, 128), b(s + 2048, 128, 128);
    float d[1][4] = {};
    fence_async_proxy();
    __syncthreads();
    wgmma_fence();
    wgmma<1>(d, a, b);
    wgmma_commit();
    @wgmma_wait<0>();@@
    __syncthreads();
    if (t == 127) cp_async_16(s + 2048, x, true), cp_async_commit();
    @@wgmma_wait<0>();@
    cp_async_wait<0>();
    for (int c = 0; c < 4; c++) y[4 * t + c] = d[0][c];
}

//// no wgmma_fence before the first wgmma
// error: no wgmma_fence\(\) came after that
// x: 1152, y: 512, grid: 1, block: 128
#include "wgmma.cuh"
extern "C" __global__ void planted(const half_t* x, float* y, int n) {
    __shared__ __align__(128) u8 s[2304];
    int t = threadIdx.x;
    for (int i = t; i < n; i += 128) ((half_t*)s)[i] = x[i];
    WgmmaOperand a(s, 1024, 128), b(s + 2048, 128, 128);
    float d[1][4] = {};
    fence_async_proxy();
    __syncthreads();
    @wgmma_fence();@@
    wgmma<1>(d, a, b);
    wgmma_commit();
    wgmma_wait<0>();
    for (int c = 0; c < 4; c++) y[4 * t + c] = d[0][c];
}

//// no wgmma_fence after sums were used
// error: thread \d+ used the sums of this wgmma, and no wgmma_fence\(\) came after that
// x: 1152, y: 512, grid: 1, block: 128
#include "wgmma.cuh"
extern "C" __global__ void planted(const half_t* x, float* y, int n) {
    __shared__ __align__(128) u8 s[2304];
    int t = threadIdx.x;
    for (int i = t; i < n; i += 128) ((half_t*)s)[i] = x[i];
    WgmmaOperand a(s, 1024, 128), b(s + 2048, 128, 128);
    float d[1][4] = {};
    fence_async_proxy();
    __syncthreads();
    @@wgmma_fence();@for (int k = 0; k < 2; k++) {
        @wgmma_fence();@@
        wgmma<1>(d, a, b);
        wgmma_commit();
        wgmma_wait<0>();
        d[0][1] *= 2;
    }
    for (int c = 0; c < 4; c++) y[4 * t + c] = d[0][c];
}

//// no fence_async_proxy after a write
// error: which is written with no fence_async_proxy\(\) after that
// x: 1152, y: 512, grid: 1, block: 128
#include "wgmma.cuh"
extern "C" __global__ void planted(const half_t* x, float* y, int n) {
    __shared__ __align__(128) u8 s[2304];
    int t = threadIdx.x;
    for (int i = t; i < n; i += 128) ((half_t*)s)[i] = x[i];
    WgmmaOperand a(s, 1024, 128), b(s + 2048, 128, 128);
    float d[1][4] = {};
    @@fence_async_proxy();@
    ((half_t*)s)[t] = x[t + 1];
    @fence_async_proxy();@@
    __syncthreads();
    wgmma_fence();
    wgmma<1>(d, a, b);
    wgmma_commit();
    wgmma_wait<0>();
    for (int c = 0; c < 4; c++) y[4 * t + c] = d[0][c];
}

//// no barrier before wgmma
// error: which nobody has written|which is written with no barrier before that
// x: 1152, y: 512, grid: 1, block: 128
#include "wgmma.cuh"
extern "C" __global__ void planted(const half_t* x, float* y, int n) {
    __shared__ __align__(128) u8 s[2304];
    int t = threadIdx.x;
    for (int i = t; i < n; i += 128) ((half_t*)s)[i] = x[i];
    WgmmaOperand a(s, 1024, 128), b(s + 2048, 128, 128);
    float d[1][4] = {};
    fence_async_proxy();
    @__syncthreads();@@
    wgmma_fence();
    wgmma<1>(d, a, b);
    wgmma_commit();
    wgmma_wait<0>();
    for (int c = 0; c < 4; c++) y[4 * t + c] = d[0][c];
}

//// a warp leaves its warpgroup alone
// error: thread \d+ waits for a wgmma that not all warps of its warpgroup issue
// x: 1152, y: 512, grid: 1, block: 128
#include "wgmma.cuh"
extern "C" __global__ void planted(const half_t* x, float* y, int n) {
    __shared__ __align__(128) u8 s[2304];
    int t = threadIdx.x;
    for (int i = t; i < n; i += 128) ((half_t*)s)[i] = x[i];
    WgmmaOperand a(s, 1024, 128), b(s + 2048, 128, 128);
    float d[1][4] = {};
    fence_async_proxy();
    __syncthreads();
    wgmma_fence();
    if (t < @128@96@) wgmma<1>(d, a, b);
    wgmma_commit();
    wgmma_wait<0>();
    for (int c = 0; c < 4; c++) y[4 * t + c] = d[0][c];
}

//// lanes multiply different operands
// error: lanes of warp 0 issue different wgmma
// x: 1152, y: 512, grid: 1, block: 128
#include "wgmma.cuh"
extern "C" __global__ void planted(const half_t* x, float* y, int n) {
    __shared__ __align__(128) u8 s[2304];
    int t = threadIdx.x;
    for (int i = t; i < n; i += 128) ((half_t*)s)[i] = x[i];
    WgmmaOperand a(s, 1024, 128), b(s + 2048, 128, 128);
    float d[1][4] = {};
    fence_async_proxy();
    __syncthreads();
    wgmma_fence();
    wgmma<1>(d, a, @b@t == 5 ? a : b@);
    wgmma_commit();
    wgmma_wait<0>();
    for (int c = 0; c < 4; c++) y[4 * t + c] = d[0][c];
}

//// a's registers change before the wait
// error: changes the registers of a before the wait
// x: 1152, y: 512, grid: 1, block: 128
#include "wgmma.cuh"
extern "C" __global__ void planted(const half_t* x, float* y, int n) {
    __shared__ __align__(1024) u8 s[2048];
    int t = threadIdx.x;
    for (int i = t; i < 1024; i += 128) ((half_t*)s)[i] = x[i];
    float d[1][4] = {};
    unsigned a[4] = {x[t].bits, x[t + 1].bits, x[t + 2].bits, x[t + 3].bits};
    fence_async_proxy();
    __syncthreads();
    wgmma_fence();
    wgmma<1>(d, a, WgmmaLines(s, 0));
    wgmma_commit();
    @@a[3] += n;@
    wgmma_wait<0>();
    for (int c = 0; c < 4; c++) y[4 * t + c] = d[0][c];
}

//// no barrier of the warpgroup
// error: race
// x: 256, y: 256, grid: 1
#include "wgmma.cuh"
extern "C" __global__ void planted(const float* x, float* y, int n) {
    __shared__ float s[256];
    int t = threadIdx.x;
    float sum = 0;
    for (int k = 0; k < 3; k++) {
        s[t] = x[t] * k;
        sync_warpgroups(t / 128);
        sum += s[t ^ 127];
        @sync_warpgroups(t / 128);@@
    }
    y[t] = sum;
}

//// a barrier of two of four warpgroups
// error: race|nobody has written
// x: 512, y: 512, grid: 1, block: 512
#include "wgmma.cuh"
extern "C" __global__ void planted(const float* x, float* y, int n) {
    __shared__ float s[512];
    int t = threadIdx.x;
    s[t] = x[t];
    sync_warpgroups<2>(t / 256 * 2);
    y[t] = s[t ^ @255@511@];
}

//// a barrier of the warpgroup for what another one writes
// error: race|nobody has written
// x: 256, y: 256, grid: 1
#include "wgmma.cuh"
extern "C" __global__ void planted(const float* x, float* y, int n) {
    __shared__ float s[256];
    int t = threadIdx.x;
    s[t] = x[t];
    sync_warpgroups(t / 128);
    @__syncthreads();@@
    y[t] = s[255 - t];
}

//// a warp leaves its warpgroup alone at a barrier
// error: thread \d+ waits for other threads of its warpgroup, which do not come
// x: 128, y: 128, grid: 1, block: 128
#include "wgmma.cuh"
extern "C" __global__ void planted(const float* x, float* y, int n) {
    int t = threadIdx.x;
    if (t < @128@96@) sync_warpgroups(0);
    y[t] = x[t];
}

//// halves of a warpgroup meet by different calls
// error: divergent barrier: thread 0 waits at planted\.cu:5 called at planted\.cu:18, thread 64 at .*planted\.cu:19
// x: 1152, y: 1024, grid: 1, block: 256
#include "wgmma.cuh"
__device__ void meet(half_t* s, int at) {
    s[at] = half_t();
    __syncthreads();
}
extern "C" __global__ void planted(const half_t* x, float* y, int n) {
    __shared__ __align__(128) u8 s[2304 + 512];
    int t = threadIdx.x;
    for (int i = t; i < n; i += 256) ((half_t*)s)[i] = x[i];
    WgmmaOperand a(s, 1024, 128), b(s + 2048, 128, 128);
    float d[1][4] = {};
    fence_async_proxy();
    __syncthreads();
    wgmma_fence();
    wgmma<1>(d, a, b);
    wgmma_commit();
    if (t < @128@64@) meet((half_t*)s, 1152 + t);
    else meet((half_t*)s, 1152 + t);
    wgmma_wait<0>();
    for (int c = 0; c < 4; c++) y[4 * t + c] = d[0][c];
}
