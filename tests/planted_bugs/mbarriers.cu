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

//// no wait for a bulk copy
// error: race|before the wait for the bulk copy of thread 64 at planted\.cu:2[12]|nobody has written
// x: 1024, y: 1024, grid: 1, block: 96
#include "mbarrier.cuh"
#include "wgmma.cuh"
extern "C" __global__ void planted(const float* x, float* y, int n) {
    __shared__ __align__(16) float s[2][256];
    __shared__ MBarrier full[2], empty[2];
    int t = threadIdx.x;
    for (int i = 0; t == 0 && i < 2; i++) mbarrier_init(full[i], 1), mbarrier_init(empty[i], 2);
    fence_async_proxy();
    __syncthreads();
    for (int k = 0; k < n / 256; k++) {
        int stage = k % 2, parity = k / 2 % 2;
        if (t < 64) {
            @mbarrier_wait(full[stage], parity);@@
            for (int j = t; j < 256; j += 64) y[256 * k + j] = s[stage][255 - j];
            __syncwarp();
            if (t % 32 == 0) mbarrier_arrive(empty[stage]);
        } else if (t == 64) {
            mbarrier_wait(empty[stage], parity ^ 1);
            mbarrier_arrive(full[stage], 1024);
            bulk_copy(s[stage], x + 256 * k, 512, full[stage]);
            bulk_copy(s[stage] + 128, x + 256 * k + 128, 512, full[stage]);
        }
    }
}

//// a barrier of the block is no wait for a bulk copy
// error: race|before the wait for the bulk copy of thread 64 at planted\.cu:14|nobody has written
// x: 1024, y: 1024, grid: 1, block: 96
#include "mbarrier.cuh"
#include "wgmma.cuh"
extern "C" __global__ void planted(const float* x, float* y, int n) {
    __shared__ __align__(16) float s[2][256];
    __shared__ MBarrier full[2], empty[2];
    int t = threadIdx.x;
    for (int i = 0; t == 0 && i < 2; i++) mbarrier_init(full[i], 1), mbarrier_init(empty[i], 2);
    fence_async_proxy();
    __syncthreads();
    __shared__ __align__(16) float first[64];
    __shared__ MBarrier begun;
    if (t == 64) mbarrier_init(begun, 1), fence_async_proxy(), mbarrier_arrive(begun, 256);
    if (t == 64) bulk_copy(first, x, 256, begun);
    __syncthreads();
    if (t < @64@32@) mbarrier_wait(begun, 0);
    for (int k = 0; k < n / 256; k++) {
        if (t < 64) y[256 * k + t] = first[t];
        int stage = k % 2, parity = k / 2 % 2;
        if (t < 64) {
            mbarrier_wait(full[stage], parity);
            for (int j = t; j < 256; j += 64) y[256 * k + j] = s[stage][255 - j];
            __syncwarp();
            if (t % 32 == 0) mbarrier_arrive(empty[stage]);
        } else if (t == 64) {
            mbarrier_wait(empty[stage], parity ^ 1);
            mbarrier_arrive(full[stage], 1024);
            bulk_copy(s[stage], x + 256 * k, 512, full[stage]);
            bulk_copy(s[stage] + 128, x + 256 * k + 128, 512, full[stage]);
        }
    }
}

//// one warp waits for both
// error: race|before the wait for the bulk copy of thread 64 at planted\.cu:2[12]|nobody has written
// x: 1024, y: 1024, grid: 1, block: 96
#include "mbarrier.cuh"
#include "wgmma.cuh"
extern "C" __global__ void planted(const float* x, float* y, int n) {
    __shared__ __align__(16) float s[2][256];
    __shared__ MBarrier full[2], empty[2];
    int t = threadIdx.x;
    for (int i = 0; t == 0 && i < 2; i++) mbarrier_init(full[i], 1), mbarrier_init(empty[i], 2);
    fence_async_proxy();
    __syncthreads();
    for (int k = 0; k < n / 256; k++) {
        int stage = k % 2, parity = k / 2 % 2;
        if (t < 64) {
            @@if (t < 32)@ mbarrier_wait(full[stage], parity);
            for (int j = t; j < 256; j += 64) y[256 * k + j] = s[stage][255 - j];
            __syncwarp();
            if (t % 32 == 0) mbarrier_arrive(empty[stage]);
        } else if (t == 64) {
            mbarrier_wait(empty[stage], parity ^ 1);
            mbarrier_arrive(full[stage], 1024);
            bulk_copy(s[stage], x + 256 * k, 512, full[stage]);
            bulk_copy(s[stage] + 128, x + 256 * k + 128, 512, full[stage]);
        }
    }
}

//// a bulk copy to a stage that is read
// error: race|before the wait
// x: 1024, y: 1024, grid: 1, block: 96
#include "mbarrier.cuh"
#include "wgmma.cuh"
extern "C" __global__ void planted(const float* x, float* y, int n) {
    __shared__ __align__(16) float s[2][256];
    __shared__ MBarrier full[2], empty[2];
    int t = threadIdx.x;
    for (int i = 0; t == 0 && i < 2; i++) mbarrier_init(full[i], 1), mbarrier_init(empty[i], 2);
    fence_async_proxy();
    __syncthreads();
    for (int k = 0; k < n / 256; k++) {
        int stage = k % 2, parity = k / 2 % 2;
        if (t < 64) {
            mbarrier_wait(full[stage], parity);
            for (int j = t; j < 256; j += 64) y[256 * k + j] = s[stage][255 - j];
            __syncwarp();
            if (t % 32 == 0) mbarrier_arrive(empty[stage]);
        } else if (t == 64) {
            mbarrier_wait(empty[@stage@0@], parity ^ 1);
            mbarrier_arrive(full[stage], 1024);
            bulk_copy(s[stage], x + 256 * k, 512, full[stage]);
            bulk_copy(s[stage] + 128, x + 256 * k + 128, 512, full[stage]);
        }
    }
}

//// a bulk copy from an odd address
// error: thread 64: a bulk copy is of a multiple of 16 bytes, between multiples of 16: of 512 bytes, x\[1\]
// x: 1024, y: 1024, grid: 1, block: 96
#include "mbarrier.cuh"
#include "wgmma.cuh"
extern "C" __global__ void planted(const float* x, float* y, int n) {
    __shared__ __align__(16) float s[2][256];
    __shared__ MBarrier full[2], empty[2];
    int t = threadIdx.x;
    for (int i = 0; t == 0 && i < 2; i++) mbarrier_init(full[i], 1), mbarrier_init(empty[i], 2);
    fence_async_proxy();
    __syncthreads();
    for (int k = 0; k < n / 256; k++) {
        int stage = k % 2, parity = k / 2 % 2;
        if (t < 64) {
            mbarrier_wait(full[stage], parity);
            for (int j = t; j < 256; j += 64) y[256 * k + j] = s[stage][255 - j];
            __syncwarp();
            if (t % 32 == 0) mbarrier_arrive(empty[stage]);
        } else if (t == 64) {
            mbarrier_wait(empty[stage], parity ^ 1);
            mbarrier_arrive(full[stage], 1024);
            bulk_copy(s[stage], x + 256 * k@@ + 1@, 512, full[stage]);
            bulk_copy(s[stage] + 128, x + 256 * k + 128, 512, full[stage]);
        }
    }
}

//// a bulk copy to an odd address
// error: between multiples of 16: of 512 bytes, s\[0\]\[2\]
// x: 1024, y: 1024, grid: 1, block: 96
#include "mbarrier.cuh"
#include "wgmma.cuh"
extern "C" __global__ void planted(const float* x, float* y, int n) {
    __shared__ __align__(16) float s[2][256];
    __shared__ MBarrier full[2], empty[2];
    int t = threadIdx.x;
    for (int i = 0; t == 0 && i < 2; i++) mbarrier_init(full[i], 1), mbarrier_init(empty[i], 2);
    fence_async_proxy();
    __syncthreads();
    for (int k = 0; k < n / 256; k++) {
        int stage = k % 2, parity = k / 2 % 2;
        if (t < 64) {
            mbarrier_wait(full[stage], parity);
            for (int j = t; j < 256; j += 64) y[256 * k + j] = s[stage][255 - j];
            __syncwarp();
            if (t % 32 == 0) mbarrier_arrive(empty[stage]);
        } else if (t == 64) {
            mbarrier_wait(empty[stage], parity ^ 1);
            mbarrier_arrive(full[stage], 1024);
            bulk_copy(s[stage]@@ + 2@, x + 256 * k, 512, full[stage]);
            bulk_copy(s[stage] + 128, x + 256 * k + 128, 512, full[stage]);
        }
    }
}

//// a bulk copy of an odd size
// error: between multiples of 16: of 500 bytes, s\[0\]\[0\]
// x: 1024, y: 1024, grid: 1, block: 96
#include "mbarrier.cuh"
#include "wgmma.cuh"
extern "C" __global__ void planted(const float* x, float* y, int n) {
    __shared__ __align__(16) float s[2][256];
    __shared__ MBarrier full[2], empty[2];
    int t = threadIdx.x;
    for (int i = 0; t == 0 && i < 2; i++) mbarrier_init(full[i], 1), mbarrier_init(empty[i], 2);
    fence_async_proxy();
    __syncthreads();
    for (int k = 0; k < n / 256; k++) {
        int stage = k % 2, parity = k / 2 % 2;
        if (t < 64) {
            mbarrier_wait(full[stage], parity);
            for (int j = t; j < 256; j += 64) y[256 * k + j] = s[stage][255 - j];
            __syncwarp();
            if (t % 32 == 0) mbarrier_arrive(empty[stage]);
        } else if (t == 64) {
            mbarrier_wait(empty[stage], parity ^ 1);
            mbarrier_arrive(full[stage], 1024);
            bulk_copy(s[stage], x + 256 * k, @512@500@, full[stage]);
            bulk_copy(s[stage] + 128, x + 256 * k + 128, 512, full[stage]);
        }
    }
}

//// a bulk copy from after the end
// error: thread 64 reads out of bounds: x\[1024\], which has 1024 elements
// x: 1024, y: 1024, grid: 1, block: 96
#include "mbarrier.cuh"
#include "wgmma.cuh"
extern "C" __global__ void planted(const float* x, float* y, int n) {
    __shared__ __align__(16) float s[2][256];
    __shared__ MBarrier full[2], empty[2];
    int t = threadIdx.x;
    for (int i = 0; t == 0 && i < 2; i++) mbarrier_init(full[i], 1), mbarrier_init(empty[i], 2);
    fence_async_proxy();
    __syncthreads();
    for (int k = 0; k < n / 256; k++) {
        int stage = k % 2, parity = k / 2 % 2;
        if (t < 64) {
            mbarrier_wait(full[stage], parity);
            for (int j = t; j < 256; j += 64) y[256 * k + j] = s[stage][255 - j];
            __syncwarp();
            if (t % 32 == 0) mbarrier_arrive(empty[stage]);
        } else if (t == 64) {
            mbarrier_wait(empty[stage], parity ^ 1);
            mbarrier_arrive(full[stage], 1024);
            bulk_copy(s[stage], x + 256 * k, 512, full[stage]);
            bulk_copy(s[stage] + 128, x + 256 * k + @128@160@, 512, full[stage]);
        }
    }
}

//// a bulk copy to after the end
// error: thread 64 writes out of bounds: s\[2\]\[0\], which has 2 x 256 elements
// x: 1024, y: 1024, grid: 1, block: 96
#include "mbarrier.cuh"
#include "wgmma.cuh"
extern "C" __global__ void planted(const float* x, float* y, int n) {
    __shared__ __align__(16) float s[2][256];
    __shared__ MBarrier full[2], empty[2];
    int t = threadIdx.x;
    for (int i = 0; t == 0 && i < 2; i++) mbarrier_init(full[i], 1), mbarrier_init(empty[i], 2);
    fence_async_proxy();
    __syncthreads();
    for (int k = 0; k < n / 256; k++) {
        int stage = k % 2, parity = k / 2 % 2;
        if (t < 64) {
            mbarrier_wait(full[stage], parity);
            for (int j = t; j < 256; j += 64) y[256 * k + j] = s[stage][255 - j];
            __syncwarp();
            if (t % 32 == 0) mbarrier_arrive(empty[stage]);
        } else if (t == 64) {
            mbarrier_wait(empty[stage], parity ^ 1);
            mbarrier_arrive(full[stage], 1024);
            bulk_copy(s[stage], x + 256 * k, 512, full[stage]);
            bulk_copy(s[@stage@1@] + @128@160@, x + 256 * k + 128, 512, full[stage]);
        }
    }
}

//// a bulk copy to global memory
// error: a bulk copy reads global and writes shared memory alone
// x: 1024, y: 1024, grid: 1, block: 96
#include "mbarrier.cuh"
#include "wgmma.cuh"
extern "C" __global__ void planted(const float* x, float* y, int n) {
    __shared__ __align__(16) float s[2][256];
    __shared__ MBarrier full[2], empty[2];
    int t = threadIdx.x;
    for (int i = 0; t == 0 && i < 2; i++) mbarrier_init(full[i], 1), mbarrier_init(empty[i], 2);
    fence_async_proxy();
    __syncthreads();
    for (int k = 0; k < n / 256; k++) {
        int stage = k % 2, parity = k / 2 % 2;
        if (t < 64) {
            mbarrier_wait(full[stage], parity);
            for (int j = t; j < 256; j += 64) y[256 * k + j] = s[stage][255 - j];
            __syncwarp();
            if (t % 32 == 0) mbarrier_arrive(empty[stage]);
        } else if (t == 64) {
            mbarrier_wait(empty[stage], parity ^ 1);
            mbarrier_arrive(full[stage], 1024);
            bulk_copy(@s[stage]@y@, x + 256 * k, 512, full[stage]);
            bulk_copy(s[stage] + 128, x + 256 * k + 128, 512, full[stage]);
        }
    }
}

//// more bytes are announced than copied
// error: thread \d+ waits for phase 0 of the mbarrier full\[0\], which does not end: 0 of 1 arrivals and 64 of 1088 bytes are missing
// x: 1024, y: 1024, grid: 1, block: 96
#include "mbarrier.cuh"
#include "wgmma.cuh"
extern "C" __global__ void planted(const float* x, float* y, int n) {
    __shared__ __align__(16) float s[2][256];
    __shared__ MBarrier full[2], empty[2];
    int t = threadIdx.x;
    for (int i = 0; t == 0 && i < 2; i++) mbarrier_init(full[i], 1), mbarrier_init(empty[i], 2);
    fence_async_proxy();
    __syncthreads();
    for (int k = 0; k < n / 256; k++) {
        int stage = k % 2, parity = k / 2 % 2;
        if (t < 64) {
            mbarrier_wait(full[stage], parity);
            for (int j = t; j < 256; j += 64) y[256 * k + j] = s[stage][255 - j];
            __syncwarp();
            if (t % 32 == 0) mbarrier_arrive(empty[stage]);
        } else if (t == 64) {
            mbarrier_wait(empty[stage], parity ^ 1);
            mbarrier_arrive(full[stage], @1024@1088@);
            bulk_copy(s[stage], x + 256 * k, 512, full[stage]);
            bulk_copy(s[stage] + 128, x + 256 * k + 128, 512, full[stage]);
        }
    }
}

//// fewer bytes are announced than copied
// error: planted\.cu:22: thread 64: a bulk copy of 512 bytes, and 448 of the 960 that mbarrier_arrive\(\) has announced at full\[0\] in phase 0 are still to come
// x: 1024, y: 1024, grid: 1, block: 96
#include "mbarrier.cuh"
#include "wgmma.cuh"
extern "C" __global__ void planted(const float* x, float* y, int n) {
    __shared__ __align__(16) float s[2][256];
    __shared__ MBarrier full[2], empty[2];
    int t = threadIdx.x;
    for (int i = 0; t == 0 && i < 2; i++) mbarrier_init(full[i], 1), mbarrier_init(empty[i], 2);
    fence_async_proxy();
    __syncthreads();
    for (int k = 0; k < n / 256; k++) {
        int stage = k % 2, parity = k / 2 % 2;
        if (t < 64) {
            mbarrier_wait(full[stage], parity);
            for (int j = t; j < 256; j += 64) y[256 * k + j] = s[stage][255 - j];
            __syncwarp();
            if (t % 32 == 0) mbarrier_arrive(empty[stage]);
        } else if (t == 64) {
            mbarrier_wait(empty[stage], parity ^ 1);
            mbarrier_arrive(full[stage], @1024@960@);
            bulk_copy(s[stage], x + 256 * k, 512, full[stage]);
            bulk_copy(s[stage] + 128, x + 256 * k + 128, 512, full[stage]);
        }
    }
}

//// bytes are copied before they are announced
// error: a bulk copy of 512 bytes, and 0 of the 0 that
// x: 1024, y: 1024, grid: 1, block: 96
#include "mbarrier.cuh"
#include "wgmma.cuh"
extern "C" __global__ void planted(const float* x, float* y, int n) {
    __shared__ __align__(16) float s[2][256];
    __shared__ MBarrier full[2], empty[2];
    int t = threadIdx.x;
    for (int i = 0; t == 0 && i < 2; i++) mbarrier_init(full[i], 1), mbarrier_init(empty[i], 2);
    fence_async_proxy();
    __syncthreads();
    for (int k = 0; k < n / 256; k++) {
        int stage = k % 2, parity = k / 2 % 2;
        if (t < 64) {
            mbarrier_wait(full[stage], parity);
            for (int j = t; j < 256; j += 64) y[256 * k + j] = s[stage][255 - j];
            __syncwarp();
            if (t % 32 == 0) mbarrier_arrive(empty[stage]);
        } else if (t == 64) {
            mbarrier_wait(empty[stage], parity ^ 1);
            @mbarrier_arrive(full[stage], 1024);@@
            bulk_copy(s[stage], x + 256 * k, 512, full[stage]);
            @@mbarrier_arrive(full[stage], 1024);@
            bulk_copy(s[stage] + 128, x + 256 * k + 128, 512, full[stage]);
        }
    }
}

//// one more arrives than may
// error: planted\.cu:21: thread 64 arrives at the mbarrier full\[0\], in whose phase 0 all 1 have arrived: 1024 of its 1024 bytes are missing
// x: 1024, y: 1024, grid: 1, block: 96
#include "mbarrier.cuh"
#include "wgmma.cuh"
extern "C" __global__ void planted(const float* x, float* y, int n) {
    __shared__ __align__(16) float s[2][256];
    __shared__ MBarrier full[2], empty[2];
    int t = threadIdx.x;
    for (int i = 0; t == 0 && i < 2; i++) mbarrier_init(full[i], 1), mbarrier_init(empty[i], 2);
    fence_async_proxy();
    __syncthreads();
    for (int k = 0; k < n / 256; k++) {
        int stage = k % 2, parity = k / 2 % 2;
        if (t < 64) {
            mbarrier_wait(full[stage], parity);
            for (int j = t; j < 256; j += 64) y[256 * k + j] = s[stage][255 - j];
            __syncwarp();
            if (t % 32 == 0) mbarrier_arrive(empty[stage]);
        } else if (t == 64) {
            mbarrier_wait(empty[stage], parity ^ 1);
            mbarrier_arrive(full[stage], 1024);
            @@mbarrier_arrive(full[stage]);@
            bulk_copy(s[stage], x + 256 * k, 512, full[stage]);
            bulk_copy(s[stage] + 128, x + 256 * k + 128, 512, full[stage]);
        }
    }
}

//// a bulk copy at an mbarrier that is not fenced
// error: thread 64: a bulk copy arrives at the mbarrier full\[0\], which thread 0 initialises at planted\.cu:8 with no fence_async_proxy\(\) after that
// x: 1024, y: 1024, grid: 1, block: 96
#include "mbarrier.cuh"
#include "wgmma.cuh"
extern "C" __global__ void planted(const float* x, float* y, int n) {
    __shared__ __align__(16) float s[2][256];
    __shared__ MBarrier full[2], empty[2];
    int t = threadIdx.x;
    for (int i = 0; t == 0 && i < 2; i++) mbarrier_init(full[i], 1), mbarrier_init(empty[i], 2);
    @fence_async_proxy();@@
    __syncthreads();
    for (int k = 0; k < n / 256; k++) {
        int stage = k % 2, parity = k / 2 % 2;
        if (t < 64) {
            mbarrier_wait(full[stage], parity);
            for (int j = t; j < 256; j += 64) y[256 * k + j] = s[stage][255 - j];
            __syncwarp();
            if (t % 32 == 0) mbarrier_arrive(empty[stage]);
        } else if (t == 64) {
            mbarrier_wait(empty[stage], parity ^ 1);
            mbarrier_arrive(full[stage], 1024);
            bulk_copy(s[stage], x + 256 * k, 512, full[stage]);
            bulk_copy(s[stage] + 128, x + 256 * k + 128, 512, full[stage]);
        }
    }
}

//// nobody waits for the last bulk copy
// error: planted\.cu:\d+: the block ends before anybody waits for the bulk copy of thread 64
// x: 1024, y: 1024, grid: 1, block: 96
#include "mbarrier.cuh"
#include "wgmma.cuh"
extern "C" __global__ void planted(const float* x, float* y, int n) {
    __shared__ __align__(16) float s[2][256];
    __shared__ MBarrier full[2], empty[2];
    int t = threadIdx.x;
    for (int i = 0; t == 0 && i < 2; i++) mbarrier_init(full[i], 1), mbarrier_init(empty[i], 2);
    fence_async_proxy();
    __syncthreads();
    for (int k = 0; k < n / 256; k++) {
        int stage = k % 2, parity = k / 2 % 2;
        if (t < 64) {
            mbarrier_wait(full[stage], parity);
            for (int j = t; j < 256; j += 64) y[256 * k + j] = s[stage][255 - j];
            __syncwarp();
            if (t % 32 == 0) mbarrier_arrive(empty[stage]);
        } else if (t == 64) {
            mbarrier_wait(empty[stage], parity ^ 1);
            mbarrier_arrive(full[stage], 1024);
            bulk_copy(s[stage], x + 256 * k, 512, full[stage]);
            bulk_copy(s[stage] + 128, x + 256 * k + 128, 512, full[stage]);
        }
    }
    __shared__ __align__(16) float more[4];
    if (t == 64) {
        mbarrier_arrive(full[0], 16);
        bulk_copy(more, x, 16, full[0]);
        @mbarrier_wait(full[0], 0);@@
    }
}

//// a producer is two phases ahead
// error: thread \d+ waits for phase 0 of the mbarrier full\[0\], and others have already ended phase 1|race|before the wait
// x: 1024, y: 1024, grid: 1, block: 96
#include "mbarrier.cuh"
#include "wgmma.cuh"
extern "C" __global__ void planted(const float* x, float* y, int n) {
    __shared__ __align__(16) float s[2][256];
    __shared__ MBarrier full[2], empty[2];
    int t = threadIdx.x;
    for (int i = 0; t == 0 && i < 2; i++) mbarrier_init(full[i], 1), mbarrier_init(empty[i], 2);
    fence_async_proxy();
    __syncthreads();
    for (int k = 0; k < n / 256; k++) {
        int stage = k % 2, parity = k / 2 % 2;
        if (t < 64) {
            mbarrier_wait(full[stage], parity);
            for (int j = t; j < 256; j += 64) y[256 * k + j] = s[stage][255 - j];
            __syncwarp();
            if (t % 32 == 0) mbarrier_arrive(empty[stage]);
        } else if (t == 64) {
            mbarrier_wait(empty[stage], @parity ^ 1@1@);
            mbarrier_arrive(full[stage], 1024);
            bulk_copy(s[stage], x + 256 * k, 512, full[stage]);
            bulk_copy(s[stage] + 128, x + 256 * k + 128, 512, full[stage]);
        }
    }
}

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
