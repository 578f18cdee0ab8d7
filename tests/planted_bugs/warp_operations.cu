//// a shuffle in a branch
// error: waits in a warp operation for lanes that do not come
// x: 256, y: 256, grid: 1
extern "C" __global__ void planted(const float* x, float* y, int n) {
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    float v = x[i];
    @@if (threadIdx.x % 2) @v += __shfl_xor_sync(0xFFFFFFFFu, v, 2);
    y[i] = v;
}

//// a mask without the thread itself
// error: whose mask leaves it out
// x: 256, y: 256, grid: 1
extern "C" __global__ void planted(const float* x, float* y, int n) {
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    float v = x[i];
    if (threadIdx.x % 2) v += __shfl_xor_sync(@0xAAAAAAAAu@0x55555555u@, v, 2);
    y[i] = v;
}

//// a shuffle from outside the mask
// error: takes no part in the shuffle
// x: 256, y: 256, grid: 1
extern "C" __global__ void planted(const float* x, float* y, int n) {
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    float v = x[i];
    if (threadIdx.x % 32 < 16) v += __shfl_xor_sync(0xFFFFu, v, @8@16@);
    y[i] = v;
}

//// a ballot of lanes that have returned
// error: waits in a warp operation
extern "C" __global__ void planted(const float* x, float* y, int n) {
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    @@if (i >= n) return;@
    unsigned votes = __ballot_sync(0xFFFFFFFFu, i < n && x[i < n ? i : 0] > 0);
    if (i < n) y[i] = votes & 1;
}

//// lanes at different shuffles
// error: different warp operations
// x: 256, y: 256, grid: 1
extern "C" __global__ void planted(const float* x, float* y, int n) {
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    float v = x[i];
    @v += __shfl_xor_sync(0xFFFFFFFFu, v, 1);@if (threadIdx.x % 2) v += __shfl_xor_sync(0xFFFFFFFFu, v, 1);
    else v += __shfl_down_sync(0xFFFFFFFFu, v, 1);@
    y[i] = v;
}

//// a shuffle from a lane that the block does not have
// error: reads a lane that takes no part in the shuffle
// x: 24, y: 24, grid: 1, block: 24
extern "C" __global__ void planted(const float* x, float* y, int n) {
    y[threadIdx.x] = __shfl_xor_sync(0xFFFFFFFFu, x[threadIdx.x], @7@16@);
}

//// a mask of all lanes in the last warp's branch
// error: waits in a warp operation for lanes that do not come
// x: 100, y: 100, grid: 1, block: 128
extern "C" __global__ void planted(const float* x, float* y, int n) {
    int t = threadIdx.x;
    unsigned mask = @__ballot_sync(0xffffffffu, t < n)@0xffffffffu@;
    if (t < n) y[t] = __shfl_xor_sync(mask, x[t], 1);
}

//// half a warp shuffles beyond itself
// error: takes no part in the shuffle
// x: 32, y: 32, grid: 1, block: 32
extern "C" __global__ void planted(const float* x, float* y, int n) {
    int t = threadIdx.x;
    float v = 0;
    if (t < 16) v = __shfl_down_sync(0x0000ffffu, x[t], 8@, 16@@);
    y[t] = v;
}

//// a reduction whose mask lacks a lane
// error: whose mask leaves it out
// x: 32, y: 32, grid: 1, block: 32
extern "C" __global__ void planted(const int* x, int* y, int n) {
    y[threadIdx.x] = __reduce_add_sync(@0xffffffffu@0x7fffffffu@, x[threadIdx.x] & 7);
}

//// half a warp matches with a mask of all
// error: waits in a warp operation
// x: 32, y: 32, grid: 1, block: 32
extern "C" __global__ void planted(const int* x, int* y, int n) {
    int t = threadIdx.x;
    if (t < 16) y[t] = __match_any_sync(@0xffff@0xffffffff@u, x[t]);
    else y[t] = 0;
}

//// two halves of a warp shuffle apart
// error: takes no part in the shuffle
// x: 32, y: 32, grid: 1, block: 32
extern "C" __global__ void planted(const float* x, float* y, int n) {
    unsigned half = threadIdx.x < 16 ? 0xffffu : 0xffff0000u;
    y[threadIdx.x] = __shfl_xor_sync(half, x[threadIdx.x], @8@16@);
}

//// lanes that exchange with one of their group first
// error: whose mask leaves it out
// x: 32, y: 32, grid: 1, block: 32
extern "C" __global__ void planted(const float* x, float* y, int n) {
    int t = threadIdx.x;
    float v = x[t];
    if (t % 4 < 2) v += __shfl_xor_sync(3u << (t / 4 * 4), v, 1);
    y[t] = __shfl_xor_sync(0xfu << (t / @4@8@ * 4), v, 2);
}

//// each half of a warp waits for itself alone
// error: race|nobody has written
// x: 32, y: 32, grid: 1, block: 32
extern "C" __global__ void planted(const float* x, float* y, int n) {
    __shared__ float s[32];
    int t = threadIdx.x;
    s[t] = x[t];
    __syncwarp(@0xffffffff@t < 16 ? 0xffff : 0xffff0000@);
    y[t] = s[t ^ 16];
}

//// a shuffle in groups of three
// error: shuffles with a width that is not 1, 2, 4, 8, 16 or 32
// x: 256, y: 256, grid: 1
extern "C" __global__ void planted(const float* x, float* y, int n) {
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    y[i] = __shfl_xor_sync(0xFFFFFFFFu, x[i], 1, @2@3@);
}

//// a shuffle in groups of more than a warp
// error: shuffles with a width that is not 1, 2, 4, 8, 16 or 32
// x: 256, y: 256, grid: 1
extern "C" __global__ void planted(const float* x, float* y, int n) {
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    y[i] = __shfl_up_sync(0xFFFFFFFFu, x[i], 1, @32@64@);
}

//// lanes that are active together count by their first one
// error: waits in a warp operation for lanes that do not come
// x: 32, y: 33, grid: 1, block: 32
extern "C" __global__ void planted(const int* x, INOUT int* y, int n) {
    int t = threadIdx.x, place = 0;
    if (t % 4 == 1) {
        unsigned mask = @__activemask()@0xFFFFFFFFu@;
        int first = __ffs(mask) - 1;
        if (t == first) place = atomicAdd(&y[32], __popc(mask));
        place = __shfl_sync(mask, place, first) + __popc(mask & ((1u << t) - 1));
    }
    y[t] = place;
}

//// a sum of the warp in two branches
// error: planted\.cu:3 called at planted\.cu:(9 and planted\.cu:3 called at planted\.cu:10|10 and .*:9): lanes of warp 0 meet
// x: 32, y: 32, grid: 1, block: 32
__device__ float warp_sum(float v) {
    for (int lanes = 16; lanes; lanes /= 2) v += __shfl_xor_sync(0xffffffffu, v, lanes);
    return v;
}
extern "C" __global__ void planted(const float* x, float* y, int n) {
    int t = threadIdx.x;
    float v = x[t];
    if (@n == 32@t < 16@) v = warp_sum(v);
    else v = warp_sum(2 * v);
    y[t] = v;
}

//// a sum of the warp in both branches of a line
// error: planted\.cu:3:\d+ called at planted\.cu:9:\d+ and planted\.cu:3:\d+ called at planted\.cu:9:\d+: lanes
// x: 32, y: 32, grid: 1, block: 32
__device__ float warp_sum(float v) {
    for (int lanes = 16; lanes; lanes /= 2) v += __shfl_xor_sync(0xffffffffu, v, lanes);
    return v;
}
extern "C" __global__ void planted(const float* x, float* y, int n) {
    int t = threadIdx.x;
    bool chosen = @n == 32@t < 16@;
    y[t] = chosen ? warp_sum(x[t]) : warp_sum(2 * x[t]);
}

//// two shuffles in a line
// error: planted\.cu:5:\d+ and planted\.cu:5:\d+: lanes
// x: 32, y: 32, grid: 1, block: 32
extern "C" __global__ void planted(const float* x, float* y, int n) {
    int t = threadIdx.x;
    bool chosen = @n == 32@t < 16@;
    y[t] = chosen ? __shfl_sync(0xffffffffu, x[t], 0) : __shfl_sync(0xffffffffu, x[t], 1);
}

//// two instances of a template
// error: planted\.cu:2 called at planted\.cu:(6 and planted\.cu:2 called at planted\.cu:7|7 and .*:6): lanes
// x: 32, y: 32, grid: 1, block: 32
template <int N> __noinline__ __device__ float from(float v) { return __shfl_sync(0xffffffffu, v, 3); }
extern "C" __global__ void planted(const float* x, float* y, int n) {
    int t = threadIdx.x;
    float v = x[t];
    if (@n == 32@t < 16@) v = from<1>(v);
    else v = from<2>(v);
    y[t] = v;
}

//// lanes that count in one of two branches
// error: whose mask leaves it out
// x: 32, y: 32, grid: 1, block: 32
__device__ int count_active() { return __popc(__activemask()); }
extern "C" __global__ void planted(const float* x, float* y, int n) {
    int t = threadIdx.x, together = 32;
    if (t < 16) together = count_active();
    else together = count_active();
    y[t] = __shfl_sync(@__activemask()@together == 32 ? 0xffffffffu : t < 16 ? 0xffff0000u : 0xffffu@, x[t], t);
}

//// a barrier of a warp of which the compiler makes two
// error: waits in a warp operation for lanes that do not come
// x: 24, y: 24, grid: 1, block: 32
extern "C" __global__ void planted(const float* x, float* y, int n) {
    int t = threadIdx.x;
    __shared__ float s[32];
    @@if (t >= n) return;@
    s[t] = t < n ? x[t] : 0;
    __syncwarp();
    if (t < n) y[t] = s[t ^ 1];
}

//// lanes meet in two instances of a template
// error: planted\.cu:3 called at planted\.cu:8 and planted\.cu:3 called at planted\.cu:8 in another instance of a template: lanes of warp 0 meet at different
// x: 32, y: 32, grid: 1, block: 32
template <int N> __device__ __noinline__ float neighbour(float v, unsigned mask) {
    return v + __shfl_xor_sync(mask, v, 1 << N);
}
extern "C" __global__ void planted(const float* x, float* y, int n) {
    float (*functions[])(float, unsigned) = {neighbour<0>, neighbour<1>};
    unsigned mask = threadIdx.x < 16 ? 0xFFFF : 0xFFFF0000;
    y[threadIdx.x] = functions[threadIdx.x / 16](x[threadIdx.x], @mask@0xFFFFFFFF@);
}

//// three lanes wait for each other in a circle
// error: thread 0 waits in a warp operation for lanes that do not come: thread 1 waits at planted\.cu:
// x: 32, y: 32, grid: 1, block: 32
extern "C" __global__ void planted(const float* x, float* y, int n) {
    int t = threadIdx.x;
    if (t < 3) __syncwarp(@7@t == 0 ? 3 : t == 1 ? 6 : 5@);
    y[t] = x[t];
}
