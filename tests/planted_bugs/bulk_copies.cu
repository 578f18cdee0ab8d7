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
