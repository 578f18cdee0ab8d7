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

//// a __shared__ variable that only another block has written
// error: reads s\[1\], which nobody has written
// y: 4
extern "C" __global__ void planted(const float* x, INOUT float* y, int n) {
    __shared__ float s[2];
    if (threadIdx.x == 0 && blockIdx.x @>= 0@== 1@) s[1] = 3 + blockIdx.x;
    if (threadIdx.x == 0) y[blockIdx.x] = x[blockIdx.x];
    grid_barrier();
    float total = 0;
    for (int b = 0; b < gridDim.x; b++) total += ((volatile float*)y)[b];
    if (threadIdx.x == 7 && s[1] != 3 + blockIdx.x) y[blockIdx.x] = total;
}

//// an element of a struct in shared memory that nobody fills
// error: reads s\[2\]\[3\], which nobody has written
// x: 256, y: 256, grid: 1
struct Pair { float a, b; };
extern "C" __global__ void planted(const float* x, float* y, int n) {
    __shared__ Pair s[4][8];
    int t = threadIdx.x;
    if (t < 32@@ && t != 19@) s[t / 8][t % 8] = {x[t], x[t]};
    __syncthreads();
    y[t] = s[t % 32 / 8][t % 8].b;
}

//// __ldg of what the launch has written
// error: reads y\[\d+\] by __ldg, which thread \d+ writes at planted\.cu:\d+: __ldg is for memory that the launch does not
// x: 256, y: 256, grid: 1
extern "C" __global__ void planted(const float* x, float* y, int n) {
    int t = threadIdx.x;
    y[t] = __ldg(&x[t]);
    __syncthreads();
    float other = @y[255 - t]@__ldg(&y[255 - t])@;
    __syncthreads();
    y[t] += other;
}

//// __ldg of shared memory
// error: reads s\[\d+\] by __ldg, which takes global memory
// x: 256, y: 256, grid: 1
extern "C" __global__ void planted(const float* x, float* y, int n) {
    __shared__ float s[256];
    s[threadIdx.x] = x[threadIdx.x];
    __syncthreads();
    y[threadIdx.x] = @s[255 - threadIdx.x]@__ldg(s + 255 - threadIdx.x)@;
}
