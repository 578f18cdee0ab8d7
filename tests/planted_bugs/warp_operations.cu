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
