//// a block too few
// error: leaves 232 of 1000 elements
// grid: @4@3@
extern "C" __global__ void planted(const float* x, float* y, int n) {
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i < n) y[i] = x[i];
}

//// a block too many
// error: out of bounds
// x: 1024, y: 1024, grid: @4@5@
extern "C" __global__ void planted(const float* x, float* y, int n) {
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    y[i] = x[i];
}

//// more threads than shared memory was made for
// error: out of bounds
// x: 256, y: 256, grid: 1, block: @128@256@
extern "C" __global__ void planted(const float* x, float* y, int n) {
    __shared__ float s[128];
    s[threadIdx.x] = x[threadIdx.x];
    __syncthreads();
    for (int k = threadIdx.x; k < n; k += blockDim.x) y[k] = s[k % blockDim.x];
}

//// too little dynamic shared memory
// error: s\[255\], which has 255 elements of 4 bytes
// x: 256, y: 256, grid: 1, shared: @1024@1020@
extern "C" __global__ void planted(const float* x, float* y, int n) {
    extern __shared__ float s[];
    int i = threadIdx.x;
    s[i] = x[i];
    __syncthreads();
    y[i] = s[255 - i];
}

//// no dynamic shared memory
// error: out of bounds|null
// x: 256, y: 256, grid: 1, shared: @1024@0@
extern "C" __global__ void planted(const float* x, float* y, int n) {
    DYNAMIC_SHARED(float, s);
    int i = threadIdx.x;
    s[i] = x[i];
    __syncthreads();
    y[i] = s[255 - i];
}

//// twice as many blocks
// error: race.*another block
// x: 1024, y: 1024, grid: @4@8@
extern "C" __global__ void planted(const float* x, float* y, int n) {
    int i = (blockIdx.x % 4) * blockDim.x + threadIdx.x;
    y[i] = x[i];
}

//// more threads than a bound of the text's own
// error: block \(256, 1, 1\) has more threads than its __launch_bounds__\(128\)
#define WARPS @8@4@
constexpr int LANES = 32;
extern "C" __global__ void __launch_bounds__(WARPS * LANES, 2) planted(const float* x, float* y, int n) {
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i < n) y[i] = x[i];
}

//// static and dynamic shared memory that are too large together
// error: __shared__ variables of 40000 bytes and 200000 bytes of dynamic shared memory are more than the 232448
// x: 256, y: 256, grid: 1, shared: @190000@200000@
extern "C" __global__ void planted(const float* x, float* y, int n) {
    extern __shared__ float s[];
    __shared__ float r[10000];
    s[threadIdx.x] = r[threadIdx.x] = x[threadIdx.x];
    y[threadIdx.x] = s[threadIdx.x] + r[threadIdx.x];
}
