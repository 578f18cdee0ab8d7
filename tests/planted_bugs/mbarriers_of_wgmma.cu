//// no fence_async_proxy between cp.async and wgmma
// error: wgmma of thread \d+ reads s\[\d\]\[\d+\], which is written with no fence_async_proxy\(\) after that \(by thread \d+ at planted\.cu:25\)
// x: 5760, y: 1024, grid: 1, block: 384
#include "async_copy.cuh"
#include "mbarrier.cuh"
#include "wgmma.cuh"
extern "C" __global__ void planted(const half_t* x, float* y, int n) {
    __shared__ __align__(128) u8 s[2][2304];
    __shared__ MBarrier full[2], empty[2];
    int t = threadIdx.x;
    for (int i = 0; t == 0 && i < 2; i++) mbarrier_init(full[i], 5), mbarrier_init(empty[i], 8);
    fence_async_proxy();
    __syncthreads();
    float d[1][4] = {};
    for (int k = 0; k < n / 1152; k++) {
        int stage = k % 2, parity = k / 2 % 2;
        if (t < 256) {
            mbarrier_wait(full[stage], parity);
            wgmma_fence();
            wgmma<1>(d, WgmmaOperand(s[stage], 1024, 128), WgmmaOperand(s[stage] + 2048, 128, 128));
            wgmma_commit();
            wgmma_wait<0>();
            if (t % 32 == 0) mbarrier_arrive(empty[stage]);
        } else {
            const half_t* from = x + 1152 * k;
            mbarrier_wait(empty[stage], parity ^ 1);
            cp_async_16(s[stage] + 16 * (t - 256), from + 8 * (t - 256), true);
            cp_async_commit();
            cp_async_wait<0>();
            @fence_async_proxy();@@
            __syncwarp();
            if (t % 32 == 0) mbarrier_arrive(full[stage]);
            if (t == 256) mbarrier_arrive(full[stage], 256);
            if (t == 256) bulk_copy(s[stage] + 2048, from + 1024, 256, full[stage]);
        }
    }
    if (t < 256)
        for (int c = 0; c < 4; c++) y[4 * t + c] = d[0][c];
}

//// a fence_async_proxy after the arrival
// error: which is written with no fence_async_proxy\(\) after that
// x: 5760, y: 1024, grid: 1, block: 384
#include "async_copy.cuh"
#include "mbarrier.cuh"
#include "wgmma.cuh"
extern "C" __global__ void planted(const half_t* x, float* y, int n) {
    __shared__ __align__(128) u8 s[2][2304];
    __shared__ MBarrier full[2], empty[2];
    int t = threadIdx.x;
    for (int i = 0; t == 0 && i < 2; i++) mbarrier_init(full[i], 5), mbarrier_init(empty[i], 8);
    fence_async_proxy();
    __syncthreads();
    float d[1][4] = {};
    for (int k = 0; k < n / 1152; k++) {
        int stage = k % 2, parity = k / 2 % 2;
        if (t < 256) {
            mbarrier_wait(full[stage], parity);
            wgmma_fence();
            wgmma<1>(d, WgmmaOperand(s[stage], 1024, 128), WgmmaOperand(s[stage] + 2048, 128, 128));
            wgmma_commit();
            wgmma_wait<0>();
            if (t % 32 == 0) mbarrier_arrive(empty[stage]);
        } else {
            const half_t* from = x + 1152 * k;
            mbarrier_wait(empty[stage], parity ^ 1);
            cp_async_16(s[stage] + 16 * (t - 256), from + 8 * (t - 256), true);
            cp_async_commit();
            cp_async_wait<0>();
            @fence_async_proxy();@@
            __syncwarp();
            if (t % 32 == 0) mbarrier_arrive(full[stage]);
            @@fence_async_proxy();@
            if (t == 256) mbarrier_arrive(full[stage], 256);
            if (t == 256) bulk_copy(s[stage] + 2048, from + 1024, 256, full[stage]);
        }
    }
    if (t < 256)
        for (int c = 0; c < 4; c++) y[4 * t + c] = d[0][c];
}

//// a stage is released before wgmma has read it
// error: which is written before the wait for that \(by thread \d+ at planted\.cu:\d+\)
// x: 5760, y: 1024, grid: 1, block: 384
#include "async_copy.cuh"
#include "mbarrier.cuh"
#include "wgmma.cuh"
extern "C" __global__ void planted(const half_t* x, float* y, int n) {
    __shared__ __align__(128) u8 s[2][2304];
    __shared__ MBarrier full[2], empty[2];
    int t = threadIdx.x;
    for (int i = 0; t == 0 && i < 2; i++) mbarrier_init(full[i], 5), mbarrier_init(empty[i], 8);
    fence_async_proxy();
    __syncthreads();
    float d[1][4] = {};
    for (int k = 0; k < n / 1152; k++) {
        int stage = k % 2, parity = k / 2 % 2;
        if (t < 256) {
            mbarrier_wait(full[stage], parity);
            wgmma_fence();
            wgmma<1>(d, WgmmaOperand(s[stage], 1024, 128), WgmmaOperand(s[stage] + 2048, 128, 128));
            wgmma_commit();
            @wgmma_wait<0>();@@
            if (t % 32 == 0) mbarrier_arrive(empty[stage]);
            @@wgmma_wait<0>();@
        } else {
            const half_t* from = x + 1152 * k;
            mbarrier_wait(empty[stage], parity ^ 1);
            cp_async_16(s[stage] + 16 * (t - 256), from + 8 * (t - 256), true);
            cp_async_commit();
            cp_async_wait<0>();
            fence_async_proxy();
            __syncwarp();
            if (t % 32 == 0) mbarrier_arrive(full[stage]);
            if (t == 256) mbarrier_arrive(full[stage], 256);
            if (t == 256) bulk_copy(s[stage] + 2048, from + 1024, 256, full[stage]);
        }
    }
    if (t < 256)
        for (int c = 0; c < 4; c++) y[4 * t + c] = d[0][c];
}

//// a stage is released while a group in flight reads it
// error: which is written before the wait for that \(by thread \d+ at planted\.cu:\d+\)
// x: 5760, y: 1024, grid: 1, block: 384
#include "async_copy.cuh"
#include "mbarrier.cuh"
#include "wgmma.cuh"
extern "C" __global__ void planted(const half_t* x, float* y, int n) {
    __shared__ __align__(128) u8 s[2][2304];
    __shared__ MBarrier full[2], empty[2];
    int t = threadIdx.x;
    for (int i = 0; t == 0 && i < 2; i++) mbarrier_init(full[i], 5), mbarrier_init(empty[i], 8);
    fence_async_proxy();
    __syncthreads();
    float d[1][4] = {};
    for (int k = 0; k < n / 1152; k++) {
        int stage = k % 2, parity = k / 2 % 2;
        if (t < 256) {
            mbarrier_wait(full[stage], parity);
            wgmma_fence();
            wgmma<1>(d, WgmmaOperand(s[stage], 1024, 128), WgmmaOperand(s[stage] + 2048, 128, 128));
            wgmma_commit();
            wgmma_wait<@0@1@>();
            if (t % 32 == 0) mbarrier_arrive(empty[stage]);
            if (k == n / 1152 - 1) wgmma_wait<0>();
        } else {
            const half_t* from = x + 1152 * k;
            mbarrier_wait(empty[stage], parity ^ 1);
            cp_async_16(s[stage] + 16 * (t - 256), from + 8 * (t - 256), true);
            cp_async_commit();
            cp_async_wait<0>();
            fence_async_proxy();
            __syncwarp();
            if (t % 32 == 0) mbarrier_arrive(full[stage]);
            if (t == 256) mbarrier_arrive(full[stage], 256);
            if (t == 256) bulk_copy(s[stage] + 2048, from + 1024, 256, full[stage]);
        }
    }
    if (t < 256)
        for (int c = 0; c < 4; c++) y[4 * t + c] = d[0][c];
}

//// no wait before wgmma
// error: which nobody has written|a bulk copy without a wait|a cp\.async without a wait|is written (with no barrier|before the wait)|writes s.* before the wait for the bulk copy
// x: 5760, y: 1024, grid: 1, block: 384
#include "async_copy.cuh"
#include "mbarrier.cuh"
#include "wgmma.cuh"
extern "C" __global__ void planted(const half_t* x, float* y, int n) {
    __shared__ __align__(128) u8 s[2][2304];
    __shared__ MBarrier full[2], empty[2];
    int t = threadIdx.x;
    for (int i = 0; t == 0 && i < 2; i++) mbarrier_init(full[i], 5), mbarrier_init(empty[i], 8);
    fence_async_proxy();
    __syncthreads();
    float d[1][4] = {};
    for (int k = 0; k < n / 1152; k++) {
        int stage = k % 2, parity = k / 2 % 2;
        if (t < 256) {
            @mbarrier_wait(full[stage], parity);@@
            wgmma_fence();
            wgmma<1>(d, WgmmaOperand(s[stage], 1024, 128), WgmmaOperand(s[stage] + 2048, 128, 128));
            wgmma_commit();
            wgmma_wait<0>();
            if (t % 32 == 0) mbarrier_arrive(empty[stage]);
        } else {
            const half_t* from = x + 1152 * k;
            mbarrier_wait(empty[stage], parity ^ 1);
            cp_async_16(s[stage] + 16 * (t - 256), from + 8 * (t - 256), true);
            cp_async_commit();
            cp_async_wait<0>();
            fence_async_proxy();
            __syncwarp();
            if (t % 32 == 0) mbarrier_arrive(full[stage]);
            if (t == 256) mbarrier_arrive(full[stage], 256);
            if (t == 256) bulk_copy(s[stage] + 2048, from + 1024, 256, full[stage]);
        }
    }
    if (t < 256)
        for (int c = 0; c < 4; c++) y[4 * t + c] = d[0][c];
}

//// a wait behind wgmma
// error: wgmma of thread \d+ reads s.*, which (nobody has written|a bulk copy without a wait for it writes|a cp\.async without a wait for it writes|is written with no barrier before that|is written before the wait for that)
// x: 5760, y: 1024, grid: 1, block: 384
#include "async_copy.cuh"
#include "mbarrier.cuh"
#include "wgmma.cuh"
extern "C" __global__ void planted(const half_t* x, float* y, int n) {
    __shared__ __align__(128) u8 s[2][2304];
    __shared__ MBarrier full[2], empty[2];
    int t = threadIdx.x;
    for (int i = 0; t == 0 && i < 2; i++) mbarrier_init(full[i], 5), mbarrier_init(empty[i], 8);
    fence_async_proxy();
    __syncthreads();
    float d[1][4] = {};
    for (int k = 0; k < n / 1152; k++) {
        int stage = k % 2, parity = k / 2 % 2;
        if (t < 256) {
            @mbarrier_wait(full[stage], parity);@@
            wgmma_fence();
            wgmma<1>(d, WgmmaOperand(s[stage], 1024, 128), WgmmaOperand(s[stage] + 2048, 128, 128));
            wgmma_commit();
            wgmma_wait<0>();
            @@mbarrier_wait(full[stage], parity);@
            if (t % 32 == 0) mbarrier_arrive(empty[stage]);
        } else {
            const half_t* from = x + 1152 * k;
            mbarrier_wait(empty[stage], parity ^ 1);
            cp_async_16(s[stage] + 16 * (t - 256), from + 8 * (t - 256), true);
            cp_async_commit();
            cp_async_wait<0>();
            fence_async_proxy();
            __syncwarp();
            if (t % 32 == 0) mbarrier_arrive(full[stage]);
            if (t == 256) mbarrier_arrive(full[stage], 256);
            if (t == 256) bulk_copy(s[stage] + 2048, from + 1024, 256, full[stage]);
        }
    }
    if (t < 256)
        for (int c = 0; c < 4; c++) y[4 * t + c] = d[0][c];
}
