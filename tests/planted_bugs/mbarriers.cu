//// an arrival is missing
// error: planted\.cu:1[34]: thread \d+ waits for phase 0 of the mbarrier full\[0\], which does not end: 1 of 2 arrivals and 0 of 0 bytes are missing
// x: 2048, y: 2048, grid: 2, block: 128
#include "async_copy.cuh"
#include "mbarrier.cuh"
extern "C" __global__ void planted(const float* x, float* y, int n) {
    __shared__ __align__(16) float s[2][256];
    __shared__ MBarrier full[2], empty[2];
    int t = threadIdx.x;
    for (int i = 0; t == 0 && i < 2; i++) mbarrier_init(full[i], 2), mbarrier_init(empty[i], 2);
    __syncthreads();
    for (int k = 4 * blockIdx.x; k < 4 * (int)blockIdx.x + 4; k++) {
        int stage = k % 2, parity = k / 2 % 2, i = 4 * (t % 64);
        if (t < 64) {
            mbarrier_wait(full[stage], parity);
            for (int j = 0; j < 4; j++) y[256 * k + i + j] = s[stage][255 - i - j];
            __syncwarp();
            if (t % 32 == 0) mbarrier_arrive(empty[stage]);
        } else {
            mbarrier_wait(empty[stage], parity ^ 1);
            cp_async_16(s[stage] + i, x + 256 * k + i, true);
            cp_async_commit();
            cp_async_wait<0>();
            __syncwarp();
            if (t % @32@64@ == 0) mbarrier_arrive(full[stage]);
        }
    }
}

//// a stage is full when half of it is
// error: race|before the wait|nobody has written|ended phase
// x: 2048, y: 2048, grid: 2, block: 128
#include "async_copy.cuh"
#include "mbarrier.cuh"
extern "C" __global__ void planted(const float* x, float* y, int n) {
    __shared__ __align__(16) float s[2][256];
    __shared__ MBarrier full[2], empty[2];
    int t = threadIdx.x;
    for (int i = 0; t == 0 && i < 2; i++) mbarrier_init(full[i], @2@1@), mbarrier_init(empty[i], 2);
    __syncthreads();
    for (int k = 4 * blockIdx.x; k < 4 * (int)blockIdx.x + 4; k++) {
        int stage = k % 2, parity = k / 2 % 2, i = 4 * (t % 64);
        if (t < 64) {
            mbarrier_wait(full[stage], parity);
            for (int j = 0; j < 4; j++) y[256 * k + i + j] = s[stage][255 - i - j];
            __syncwarp();
            if (t % 32 == 0) mbarrier_arrive(empty[stage]);
        } else {
            mbarrier_wait(empty[stage], parity ^ 1);
            cp_async_16(s[stage] + i, x + 256 * k + i, true);
            cp_async_commit();
            cp_async_wait<0>();
            __syncwarp();
            if (t % 32 == 0) mbarrier_arrive(full[stage]);
        }
    }
}

//// every lane arrives
// error: race|before the wait|nobody has written|phase \d
// x: 2048, y: 2048, grid: 2, block: 128
#include "async_copy.cuh"
#include "mbarrier.cuh"
extern "C" __global__ void planted(const float* x, float* y, int n) {
    __shared__ __align__(16) float s[2][256];
    __shared__ MBarrier full[2], empty[2];
    int t = threadIdx.x;
    for (int i = 0; t == 0 && i < 2; i++) mbarrier_init(full[i], 2), mbarrier_init(empty[i], 2);
    __syncthreads();
    for (int k = 4 * blockIdx.x; k < 4 * (int)blockIdx.x + 4; k++) {
        int stage = k % 2, parity = k / 2 % 2, i = 4 * (t % 64);
        if (t < 64) {
            mbarrier_wait(full[stage], parity);
            for (int j = 0; j < 4; j++) y[256 * k + i + j] = s[stage][255 - i - j];
            __syncwarp();
            if (t % 32 == 0) mbarrier_arrive(empty[stage]);
        } else {
            mbarrier_wait(empty[stage], parity ^ 1);
            cp_async_16(s[stage] + i, x + 256 * k + i, true);
            cp_async_commit();
            cp_async_wait<0>();
            __syncwarp();
            if (@t % 32 == 0@t@) mbarrier_arrive(full[stage]);
        }
    }
}

//// a wait for the other parity
// error: race|before the wait|nobody has written
// x: 2048, y: 2048, grid: 2, block: 128
#include "async_copy.cuh"
#include "mbarrier.cuh"
extern "C" __global__ void planted(const float* x, float* y, int n) {
    __shared__ __align__(16) float s[2][256];
    __shared__ MBarrier full[2], empty[2];
    int t = threadIdx.x;
    for (int i = 0; t == 0 && i < 2; i++) mbarrier_init(full[i], 2), mbarrier_init(empty[i], 2);
    __syncthreads();
    for (int k = 4 * blockIdx.x; k < 4 * (int)blockIdx.x + 4; k++) {
        int stage = k % 2, parity = k / 2 % 2, i = 4 * (t % 64);
        if (t < 64) {
            mbarrier_wait(full[stage], parity@@ ^ 1@);
            for (int j = 0; j < 4; j++) y[256 * k + i + j] = s[stage][255 - i - j];
            __syncwarp();
            if (t % 32 == 0) mbarrier_arrive(empty[stage]);
        } else {
            mbarrier_wait(empty[stage], parity ^ 1);
            cp_async_16(s[stage] + i, x + 256 * k + i, true);
            cp_async_commit();
            cp_async_wait<0>();
            __syncwarp();
            if (t % 32 == 0) mbarrier_arrive(full[stage]);
        }
    }
}

//// a wait for phases that do not come
// error: planted\.cu:18: thread \d+ waits for phase 0 of the mbarrier empty\[0\]|planted\.cu:13: thread \d+ waits for phase 0 of the mbarrier full\[0\]
// x: 2048, y: 2048, grid: 2, block: 128
#include "async_copy.cuh"
#include "mbarrier.cuh"
extern "C" __global__ void planted(const float* x, float* y, int n) {
    __shared__ __align__(16) float s[2][256];
    __shared__ MBarrier full[2], empty[2];
    int t = threadIdx.x;
    for (int i = 0; t == 0 && i < 2; i++) mbarrier_init(full[i], 2), mbarrier_init(empty[i], 2);
    __syncthreads();
    for (int k = 4 * blockIdx.x; k < 4 * (int)blockIdx.x + 4; k++) {
        int stage = k % 2, parity = k / 2 % 2, i = 4 * (t % 64);
        if (t < 64) {
            mbarrier_wait(full[stage], parity);
            for (int j = 0; j < 4; j++) y[256 * k + i + j] = s[stage][255 - i - j];
            __syncwarp();
            if (t % 32 == 0) mbarrier_arrive(empty[stage]);
        } else {
            mbarrier_wait(empty[stage], parity@ ^ 1@@);
            cp_async_16(s[stage] + i, x + 256 * k + i, true);
            cp_async_commit();
            cp_async_wait<0>();
            __syncwarp();
            if (t % 32 == 0) mbarrier_arrive(full[stage]);
        }
    }
}

//// no wait for a full stage
// error: race|before the wait|nobody has written
// x: 2048, y: 2048, grid: 2, block: 128
#include "async_copy.cuh"
#include "mbarrier.cuh"
extern "C" __global__ void planted(const float* x, float* y, int n) {
    __shared__ __align__(16) float s[2][256];
    __shared__ MBarrier full[2], empty[2];
    int t = threadIdx.x;
    for (int i = 0; t == 0 && i < 2; i++) mbarrier_init(full[i], 2), mbarrier_init(empty[i], 2);
    __syncthreads();
    for (int k = 4 * blockIdx.x; k < 4 * (int)blockIdx.x + 4; k++) {
        int stage = k % 2, parity = k / 2 % 2, i = 4 * (t % 64);
        if (t < 64) {
            @mbarrier_wait(full[stage], parity);@@
            for (int j = 0; j < 4; j++) y[256 * k + i + j] = s[stage][255 - i - j];
            __syncwarp();
            if (t % 32 == 0) mbarrier_arrive(empty[stage]);
        } else {
            mbarrier_wait(empty[stage], parity ^ 1);
            cp_async_16(s[stage] + i, x + 256 * k + i, true);
            cp_async_commit();
            cp_async_wait<0>();
            __syncwarp();
            if (t % 32 == 0) mbarrier_arrive(full[stage]);
        }
    }
}

//// no wait for an empty stage
// error: race|ended phase
// x: 2048, y: 2048, grid: 2, block: 128
#include "async_copy.cuh"
#include "mbarrier.cuh"
extern "C" __global__ void planted(const float* x, float* y, int n) {
    __shared__ __align__(16) float s[2][256];
    __shared__ MBarrier full[2], empty[2];
    int t = threadIdx.x;
    for (int i = 0; t == 0 && i < 2; i++) mbarrier_init(full[i], 2), mbarrier_init(empty[i], 2);
    __syncthreads();
    for (int k = 4 * blockIdx.x; k < 4 * (int)blockIdx.x + 4; k++) {
        int stage = k % 2, parity = k / 2 % 2, i = 4 * (t % 64);
        if (t < 64) {
            mbarrier_wait(full[stage], parity);
            for (int j = 0; j < 4; j++) y[256 * k + i + j] = s[stage][255 - i - j];
            __syncwarp();
            if (t % 32 == 0) mbarrier_arrive(empty[stage]);
        } else {
            @mbarrier_wait(empty[stage], parity ^ 1);@@
            cp_async_16(s[stage] + i, x + 256 * k + i, true);
            cp_async_commit();
            cp_async_wait<0>();
            __syncwarp();
            if (t % 32 == 0) mbarrier_arrive(full[stage]);
        }
    }
}

//// a stage is released before it is read
// error: race|before the wait
// x: 2048, y: 2048, grid: 2, block: 128
#include "async_copy.cuh"
#include "mbarrier.cuh"
extern "C" __global__ void planted(const float* x, float* y, int n) {
    __shared__ __align__(16) float s[2][256];
    __shared__ MBarrier full[2], empty[2];
    int t = threadIdx.x;
    for (int i = 0; t == 0 && i < 2; i++) mbarrier_init(full[i], 2), mbarrier_init(empty[i], 2);
    __syncthreads();
    for (int k = 4 * blockIdx.x; k < 4 * (int)blockIdx.x + 4; k++) {
        int stage = k % 2, parity = k / 2 % 2, i = 4 * (t % 64);
        if (t < 64) {
            mbarrier_wait(full[stage], parity);
            @@if (t % 32 == 0) mbarrier_arrive(empty[stage]);@
            for (int j = 0; j < 4; j++) y[256 * k + i + j] = s[stage][255 - i - j];
            __syncwarp();
            @if (t % 32 == 0) mbarrier_arrive(empty[stage]);@@
        } else {
            mbarrier_wait(empty[stage], parity ^ 1);
            cp_async_16(s[stage] + i, x + 256 * k + i, true);
            cp_async_commit();
            cp_async_wait<0>();
            __syncwarp();
            if (t % 32 == 0) mbarrier_arrive(full[stage]);
        }
    }
}

//// a lane arrives for others without a barrier
// error: race|before the wait|nobody has written
// x: 2048, y: 2048, grid: 2, block: 128
#include "async_copy.cuh"
#include "mbarrier.cuh"
extern "C" __global__ void planted(const float* x, float* y, int n) {
    __shared__ __align__(16) float s[2][256];
    __shared__ MBarrier full[2], empty[2];
    int t = threadIdx.x;
    for (int i = 0; t == 0 && i < 2; i++) mbarrier_init(full[i], @64@2@), mbarrier_init(empty[i], 2);
    __syncthreads();
    for (int k = 4 * blockIdx.x; k < 4 * (int)blockIdx.x + 4; k++) {
        int stage = k % 2, parity = k / 2 % 2, i = 4 * (t % 64);
        if (t < 64) {
            mbarrier_wait(full[stage], parity);
            for (int j = 0; j < 4; j++) y[256 * k + i + j] = s[stage][255 - i - j];
            __syncwarp();
            if (t % 32 == 0) mbarrier_arrive(empty[stage]);
        } else {
            mbarrier_wait(empty[stage], parity ^ 1);
            cp_async_16(s[stage] + i, x + 256 * k + i, true);
            cp_async_commit();
            cp_async_wait<0>();
            if (@t@t % 32 == 0@) mbarrier_arrive(full[stage]);
        }
    }
}

//// an arrival before the wait for a copy
// error: before the wait for the cp\.async of thread \d+ at planted\.cu:19|race
// x: 2048, y: 2048, grid: 2, block: 128
#include "async_copy.cuh"
#include "mbarrier.cuh"
extern "C" __global__ void planted(const float* x, float* y, int n) {
    __shared__ __align__(16) float s[2][256];
    __shared__ MBarrier full[2], empty[2];
    int t = threadIdx.x;
    for (int i = 0; t == 0 && i < 2; i++) mbarrier_init(full[i], 2), mbarrier_init(empty[i], 2);
    __syncthreads();
    for (int k = 4 * blockIdx.x; k < 4 * (int)blockIdx.x + 4; k++) {
        int stage = k % 2, parity = k / 2 % 2, i = 4 * (t % 64);
        if (t < 64) {
            mbarrier_wait(full[stage], parity);
            for (int j = 0; j < 4; j++) y[256 * k + i + j] = s[stage][255 - i - j];
            __syncwarp();
            if (t % 32 == 0) mbarrier_arrive(empty[stage]);
        } else {
            mbarrier_wait(empty[stage], parity ^ 1);
            cp_async_16(s[stage] + i, x + 256 * k + i, true);
            cp_async_commit();
            cp_async_wait<@0@1@>();
            __syncwarp();
            if (t % 32 == 0) mbarrier_arrive(full[stage]);
        }
    }
}

//// no barrier behind the initialisation
// error: which is no mbarrier: nobody has called|race: thread \d+ (arrives|waits) at the mbarrier
// x: 2048, y: 2048, grid: 2, block: 128
#include "async_copy.cuh"
#include "mbarrier.cuh"
extern "C" __global__ void planted(const float* x, float* y, int n) {
    __shared__ __align__(16) float s[2][256];
    __shared__ MBarrier full[2], empty[2];
    int t = threadIdx.x;
    for (int i = 0; t == 0 && i < 2; i++) mbarrier_init(full[i], 2), mbarrier_init(empty[i], 2);
    @__syncthreads();@@
    for (int k = 4 * blockIdx.x; k < 4 * (int)blockIdx.x + 4; k++) {
        int stage = k % 2, parity = k / 2 % 2, i = 4 * (t % 64);
        if (t < 64) {
            mbarrier_wait(full[stage], parity);
            for (int j = 0; j < 4; j++) y[256 * k + i + j] = s[stage][255 - i - j];
            __syncwarp();
            if (t % 32 == 0) mbarrier_arrive(empty[stage]);
        } else {
            mbarrier_wait(empty[stage], parity ^ 1);
            cp_async_16(s[stage] + i, x + 256 * k + i, true);
            cp_async_commit();
            cp_async_wait<0>();
            __syncwarp();
            if (t % 32 == 0) mbarrier_arrive(full[stage]);
        }
    }
}

//// an mbarrier that is not initialised
// error: planted\.cu:\d+: thread \d+ (waits|arrives) at empty\[1\], which is no mbarrier: nobody has called mbarrier_init\(\) for it
// x: 2048, y: 2048, grid: 2, block: 128
#include "async_copy.cuh"
#include "mbarrier.cuh"
extern "C" __global__ void planted(const float* x, float* y, int n) {
    __shared__ __align__(16) float s[2][256];
    __shared__ MBarrier full[2], empty[2];
    int t = threadIdx.x;
    for (int i = 0; t == 0 && i < 2; i++) mbarrier_init(full[i], 2), @mbarrier_init(empty[i], 2)@i ? void() : mbarrier_init(empty[i], 2)@;
    __syncthreads();
    for (int k = 4 * blockIdx.x; k < 4 * (int)blockIdx.x + 4; k++) {
        int stage = k % 2, parity = k / 2 % 2, i = 4 * (t % 64);
        if (t < 64) {
            mbarrier_wait(full[stage], parity);
            for (int j = 0; j < 4; j++) y[256 * k + i + j] = s[stage][255 - i - j];
            __syncwarp();
            if (t % 32 == 0) mbarrier_arrive(empty[stage]);
        } else {
            mbarrier_wait(empty[stage], parity ^ 1);
            cp_async_16(s[stage] + i, x + 256 * k + i, true);
            cp_async_commit();
            cp_async_wait<0>();
            __syncwarp();
            if (t % 32 == 0) mbarrier_arrive(full[stage]);
        }
    }
}

//// an mbarrier is initialised twice
// error: thread 0 writes full\[0\].*, where thread 0 has initialised an mbarrier at planted\.cu:8
// x: 2048, y: 2048, grid: 2, block: 128
#include "async_copy.cuh"
#include "mbarrier.cuh"
extern "C" __global__ void planted(const float* x, float* y, int n) {
    __shared__ __align__(16) float s[2][256];
    __shared__ MBarrier full[2], empty[2];
    int t = threadIdx.x;
    for (int i = 0; t == 0 && i < 2; i++) mbarrier_init(full[@i@0@], 2), mbarrier_init(empty[i], 2);
    __syncthreads();
    for (int k = 4 * blockIdx.x; k < 4 * (int)blockIdx.x + 4; k++) {
        int stage = k % 2, parity = k / 2 % 2, i = 4 * (t % 64);
        if (t < 64) {
            mbarrier_wait(full[stage], parity);
            for (int j = 0; j < 4; j++) y[256 * k + i + j] = s[stage][255 - i - j];
            __syncwarp();
            if (t % 32 == 0) mbarrier_arrive(empty[stage]);
        } else {
            mbarrier_wait(empty[stage], parity ^ 1);
            cp_async_16(s[stage] + i, x + 256 * k + i, true);
            cp_async_commit();
            cp_async_wait<0>();
            __syncwarp();
            if (t % 32 == 0) mbarrier_arrive(full[stage]);
        }
    }
}

//// an mbarrier is overwritten
// error: planted\.cu:\d+: thread 127 writes full\[0\].*, where thread 0 has initialised an mbarrier at planted\.cu:8
// x: 2048, y: 2048, grid: 2, block: 128
#include "async_copy.cuh"
#include "mbarrier.cuh"
extern "C" __global__ void planted(const float* x, float* y, int n) {
    __shared__ __align__(16) float s[2][256];
    __shared__ MBarrier full[2], empty[2];
    int t = threadIdx.x;
    for (int i = 0; t == 0 && i < 2; i++) mbarrier_init(full[i], 2), mbarrier_init(empty[i], 2);
    __syncthreads();
    @@if (t == 127) *(int*)full = 0;@
    for (int k = 4 * blockIdx.x; k < 4 * (int)blockIdx.x + 4; k++) {
        int stage = k % 2, parity = k / 2 % 2, i = 4 * (t % 64);
        if (t < 64) {
            mbarrier_wait(full[stage], parity);
            for (int j = 0; j < 4; j++) y[256 * k + i + j] = s[stage][255 - i - j];
            __syncwarp();
            if (t % 32 == 0) mbarrier_arrive(empty[stage]);
        } else {
            mbarrier_wait(empty[stage], parity ^ 1);
            cp_async_16(s[stage] + i, x + 256 * k + i, true);
            cp_async_commit();
            cp_async_wait<0>();
            __syncwarp();
            if (t % 32 == 0) mbarrier_arrive(full[stage]);
        }
    }
}

//// a parity that is counted on
// error: thread \d+ waits at the mbarrier full\[0\] for parity \d: it is 0 or 1
// x: 2048, y: 2048, grid: 2, block: 128
#include "async_copy.cuh"
#include "mbarrier.cuh"
extern "C" __global__ void planted(const float* x, float* y, int n) {
    __shared__ __align__(16) float s[2][256];
    __shared__ MBarrier full[2], empty[2];
    int t = threadIdx.x;
    for (int i = 0; t == 0 && i < 2; i++) mbarrier_init(full[i], 2), mbarrier_init(empty[i], 2);
    __syncthreads();
    for (int k = 4 * blockIdx.x; k < 4 * (int)blockIdx.x + 4; k++) {
        int stage = k % 2, parity = k / 2 % 2, i = 4 * (t % 64);
        if (t < 64) {
            mbarrier_wait(full[stage], @parity@k / 2 + k / 2@);
            for (int j = 0; j < 4; j++) y[256 * k + i + j] = s[stage][255 - i - j];
            __syncwarp();
            if (t % 32 == 0) mbarrier_arrive(empty[stage]);
        } else {
            mbarrier_wait(empty[stage], parity ^ 1);
            cp_async_16(s[stage] + i, x + 256 * k + i, true);
            cp_async_commit();
            cp_async_wait<0>();
            __syncwarp();
            if (t % 32 == 0) mbarrier_arrive(full[stage]);
        }
    }
}

//// an mbarrier for nobody
// error: an mbarrier takes from 1 to 1048575 arrivals, not 0
// x: 2048, y: 2048, grid: 2, block: 128
#include "async_copy.cuh"
#include "mbarrier.cuh"
extern "C" __global__ void planted(const float* x, float* y, int n) {
    __shared__ __align__(16) float s[2][256];
    __shared__ MBarrier full[2], empty[2];
    int t = threadIdx.x;
    for (int i = 0; t == 0 && i < 2; i++) mbarrier_init(full[i], @2@0@), mbarrier_init(empty[i], 2);
    __syncthreads();
    for (int k = 4 * blockIdx.x; k < 4 * (int)blockIdx.x + 4; k++) {
        int stage = k % 2, parity = k / 2 % 2, i = 4 * (t % 64);
        if (t < 64) {
            mbarrier_wait(full[stage], parity);
            for (int j = 0; j < 4; j++) y[256 * k + i + j] = s[stage][255 - i - j];
            __syncwarp();
            if (t % 32 == 0) mbarrier_arrive(empty[stage]);
        } else {
            mbarrier_wait(empty[stage], parity ^ 1);
            cp_async_16(s[stage] + i, x + 256 * k + i, true);
            cp_async_commit();
            cp_async_wait<0>();
            __syncwarp();
            if (t % 32 == 0) mbarrier_arrive(full[stage]);
        }
    }
}

//// halves of a warpgroup without wgmma meet by different calls
// error: divergent barrier: thread 128 waits at planted\.cu:3 called at planted\.cu:11, thread 192 at .*planted\.cu:12
// x: 256, y: 256, grid: 1
#include "mbarrier.cuh"
__device__ void meet() { __syncthreads(); }
extern "C" __global__ void planted(const float* x, float* y, int n) {
    __shared__ MBarrier ready;
    int t = threadIdx.x;
    if (t == 0) mbarrier_init(ready, 1);
    __syncthreads();
    if (t < 128) mbarrier_wait(ready, 0), meet();
    else if (t == 128) mbarrier_arrive(ready);
    if (t >= 128 && t < @256@192@) meet();
    else if (t >= 128) meet();
    y[t] = x[t];
}

//// a wait for a phase that has ended before
// error: race|nobody has written
// x: 256, y: 256, grid: 1
#include "mbarrier.cuh"
extern "C" __global__ void planted(const float* x, float* y, int n) {
    __shared__ MBarrier full;
    __shared__ float s[128];
    int t = threadIdx.x;
    if (t == 0) mbarrier_init(full, 128);
    __syncthreads();
    if (t < 128) mbarrier_arrive(full);
    mbarrier_wait(full, 0);
    __syncthreads();
    if (t < 128) {
        s[t] = y[t] = x[t];
        @mbarrier_arrive(full);@@
    } else {
        mbarrier_wait(full, @1@0@);
        y[t] = s[255 - t];
    }
}

//// a lane waits for half a warp
// error: race|nobody has written
// x: 32, y: 32, grid: 1, block: 32
#include "mbarrier.cuh"
extern "C" __global__ void planted(const float* x, float* y, int n) {
    __shared__ MBarrier full;
    __shared__ float s[16];
    int t = threadIdx.x;
    if (t == 0) mbarrier_init(full, 1);
    __syncwarp();
    if (t < 16) {
        s[t] = y[t] = x[t];
        __syncwarp(0xFFFF);
        if (t == 0) mbarrier_arrive(full);
    } else {
        if (t == 16) mbarrier_wait(full, 0);
        @__syncwarp(0xFFFF0000);@@
        y[t] = s[31 - t];
    }
}
