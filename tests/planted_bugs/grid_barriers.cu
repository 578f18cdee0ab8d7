//// blocks that do not wait for each other
// error: race: thread \d+ (reads|writes) y\[\d\], which thread \d+ of another block (reads|writes)
// y: 4
extern "C" __global__ void planted(const float* x, INOUT float* y, int n) {
    if (threadIdx.x == 0) y[blockIdx.x] = x[blockIdx.x];
    @grid_barrier@__syncthreads@();
    float total = 0;
    for (int b = 0; b < gridDim.x; b++) total += ((volatile float*)y)[b];
}

//// blocks that do not wait before they write again
// error: race: thread \d+ (reads|writes) y\[\d\], which thread \d+( of another block)? (reads|writes)
// y: 4
extern "C" __global__ void planted(const float* x, INOUT float* y, int n) {
    if (threadIdx.x == 0) y[blockIdx.x] = x[blockIdx.x];
    grid_barrier();
    float total = 0;
    for (int b = 0; b < gridDim.x; b++) total += ((volatile float*)y)[b];
    @grid_barrier();@@
    if (threadIdx.x == 0) y[blockIdx.x] = total;
}

//// a block that returns before the others have met it
// error: 3 of 4 blocks wait at a grid barrier, the others have returned
// y: 4
extern "C" __global__ void planted(const float* x, INOUT float* y, int n) {
    @@if (blockIdx.x == 2) return;@
    if (threadIdx.x == 0) y[blockIdx.x] = x[blockIdx.x];
    grid_barrier();
    float total = 0;
    for (int b = 0; b < gridDim.x; b++) total += ((volatile float*)y)[b];
}

//// half a block at the grid's barrier
// error: divergent barrier
// y: 4
extern "C" __global__ void planted(const float* x, INOUT float* y, int n) {
    if (threadIdx.x == 0) y[blockIdx.x] = x[blockIdx.x];
    if (threadIdx.x < @256@128@) grid_barrier(); else __syncthreads();
    float total = 0;
    for (int b = 0; b < gridDim.x; b++) total += ((volatile float*)y)[b];
}

//// shared memory that only another block has written
// error: s\[1\], which nobody has written
// y: 4
extern "C" __global__ void planted(const float* x, INOUT float* y, int n) {
    __shared__ float s[2];
    if (threadIdx.x == 0 && blockIdx.x @>= 0@== 1@) s[1] = 3;
    if (threadIdx.x == 0) y[blockIdx.x] = x[blockIdx.x];
    grid_barrier();
    float total = 0;
    for (int b = 0; b < gridDim.x; b++) total += ((volatile float*)y)[b];
    if (threadIdx.x == 7 && s[1] != 3) y[blockIdx.x] = total;
}

//// a barrier of all blocks that is not in the kernel itself
// error: calls grid_barrier\(\) in a launch that is not cooperative
__device__ void meet() { grid_barrier(); }
extern "C" __global__ void planted(const float* x, float* y, int n) {
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    @grid_barrier@meet@();
    if (i < n) y[i] = x[i];
}
