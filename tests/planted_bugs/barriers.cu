//// a barrier in a branch
// error: divergent barrier: thread 0 waits at planted\.cu:5, thread 100 at planted\.cu:6
// x: 256, y: 256, grid: 1
extern "C" __global__ void planted(const float* x, float* y, int n) {
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (threadIdx.x < 100) {
        @@__syncthreads();@
    } @@else __syncthreads();@
    @__syncthreads();@@
    y[i] = x[i];
}

//// a return before a barrier
// error: divergent barrier.*232 of 256
extern "C" __global__ void planted(const float* x, float* y, int n) {
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    __shared__ float s[256];
    @@if (i >= n) return;@
    s[threadIdx.x] = @i < n ? x[i] : 0@x[i]@;
    __syncthreads();
    if (i < n) y[i] = s[0];
}

//// a loop with as many barriers as the thread's number
// error: divergent barrier
// x: 256, y: 256, grid: 1
extern "C" __global__ void planted(const float* x, float* y, int n) {
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    for (int k = 0; k < @4@1 + threadIdx.x % 2@; k++)
    __syncthreads();
    y[i] = x[i];
}

//// threads that leave a loop with a barrier
// error: divergent barrier
// x: 256, y: 256, grid: 1
extern "C" __global__ void planted(const float* x, float* y, int n) {
    int t = threadIdx.x;
    float v = x[t];
    for (int k = 0; k < 4; k++) {
        @@if (v < 0) break;@
        __syncthreads();
        @if (v >= 0)@@ v -= 10;
    }
    y[t] = v;
}

//// a barrier behind &&
// error: divergent barrier
// x: 256, y: 256, grid: 1
extern "C" __global__ void planted(const float* x, float* y, int n) {
    int t = threadIdx.x;
    bool a = x[t] > 0;
    y[t] = @__syncthreads_or(a) && a@a && __syncthreads_or(a)@;
}
