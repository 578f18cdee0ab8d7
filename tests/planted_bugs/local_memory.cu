//// a recursion without end
// error: needs more than 576 KiB of local memory
// x: 256, y: 256, grid: 1
__device__ __attribute__((noinline)) int depth(int k, int n) {
    return k % 8 == 0 && n > 0 ? k : depth(k + 1, n) * 2 - k;
}
extern "C" __global__ void planted(const float* x, float* y, int n) {
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    y[i] = x[i] + depth(1, @n@-n@);
}

//// a large local array
// error: KiB of local memory
// x: 256, y: 256, grid: 1
extern "C" __global__ void planted(const float* x, float* y, int n) {
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    volatile float v[@64@300000@];
    v[i % 64] = x[i];
    y[i] = v[i % 64];
}

//// an assertion
// error: fails the assertion i < 255
// x: 256, y: 256, grid: 1
extern "C" __global__ void planted(const float* x, float* y, int n) {
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    assert(i < @256@255@); y[i] = x[i];
}

//// local memory of another thread
// error: local memory of another thread
// x: 256, y: 256, grid: 1
extern "C" __global__ void planted(const float* x, float* y, int n) {
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    __shared__ float* p;
    float v = x[i];
    if (threadIdx.x == 0) p = &v;
    __syncthreads();
    y[i] = @v + (p == nullptr)@*p@;
    __syncthreads();
}

//// an array larger than all that a thread has
// error: KiB of local memory
// x: 256, y: 256, grid: 1
extern "C" __global__ void planted(const float* x, float* y, int n) {
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    volatile float v[@64@30000000@];
    v[i % 64] = x[i];
    y[i] = v[i % 64];
}

//// a local array that overflows by a pointer
// error: has written outside of a local array
// x: 256, y: 256, grid: 1
__device__ __noinline__ void put(float* p, int k, float v) { p[k] = v; }
extern "C" __global__ void planted(const float* x, float* y, int n) {
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    float v[4] = {};
    put(v, i % @4@8@, x[i]);
    y[i] = v[0];
}
