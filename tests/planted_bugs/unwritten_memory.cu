//// a sum in shared memory that does not start at 0
// error: which nobody has written
// x: 256, y: 256, grid: 1
extern "C" __global__ void planted(const float* x, float* y, int n) {
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    __shared__ int sum;
    @if (threadIdx.x == 0) sum = 0;@@
    __syncthreads();
    atomicAdd(&sum, 1);
    __syncthreads();
    y[i] = x[i] + sum;
}

//// an output that is read first
// error: reads y\[\d+\], which nobody has written
// x: 256, y: 256, grid: 1
extern "C" __global__ void planted(const float* x, float* y, int n) {
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    y[i] @=@+=@ x[i];
}

//// a part of shared memory that nobody fills
// error: which nobody has written
// x: 256, y: 256, grid: 1
extern "C" __global__ void planted(const float* x, float* y, int n) {
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    __shared__ float s[256];
    if (threadIdx.x < @256@255@) s[threadIdx.x] = x[i];
    __syncthreads();
    y[i] = s[(threadIdx.x + 1) % 256];
}

//// shared memory of the block before
// error: which nobody has written
// x: 1024, y: 1024
extern "C" __global__ void planted(const float* x, float* y, int n) {
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    __shared__ float s[256];
    if (@true@blockIdx.x == 0@) s[threadIdx.x] = x[i];
    __syncthreads();
    y[i] = s[255 - threadIdx.x];
}
