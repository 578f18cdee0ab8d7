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

//// a sum of the block in two branches
// error: waits at planted\.cu:6 called at planted\.cu:15, thread 64 at planted\.cu:6 called at planted\.cu:16 \(
// x: 256, y: 256, grid: 1
__device__ float block_sum(float v, float* s) {
    int t = threadIdx.x;
    s[t] = v;
    for (int half = 128; half; half /= 2) {
        __syncthreads();
        if (t < half) s[t] += s[t + half];
    }
    __syncthreads();
    return s[0];
}
extern "C" __global__ void planted(const float* x, float* y, int n) {
    __shared__ float s[256];
    float v = x[threadIdx.x];
    if (@n == 256@threadIdx.x < 64@) v -= block_sum(v, s);
    else v += block_sum(v, s);
    y[threadIdx.x] = v;
}

//// a sum of the block that is not copied into two branches
// error: waits at planted\.cu:4 called at planted\.cu:11, thread 100 at planted\.cu:4 called at planted\.cu:12 \(
// x: 256, y: 256, grid: 1
__noinline__ __device__ float first_of_block(float v, float* s) {
    s[threadIdx.x] = v;
    __syncthreads();
    return s[0];
}
extern "C" __global__ void planted(const float* x, float* y, int n) {
    __shared__ float s[256];
    int t = threadIdx.x;
    float v = x[t];
    if (@x[0] < 1000@t < 100@) v = first_of_block(v, s);
    else v = first_of_block(v, s);
    y[t] = v;
}

//// a barrier in two branches of a line
// error: waits at planted\.cu:5:\d+, thread 100 at planted\.cu:5:\d+ \(
// x: 256, y: 256, grid: 1
extern "C" __global__ void planted(const float* x, float* y, int n) {
    int t = threadIdx.x;
    bool chosen = @n == 256@t < 100@;
    if (chosen) __syncthreads(); else __syncthreads();
    y[t] = x[t];
}

//// barriers of a recursion that are not as deep
// error: divergent barrier: thread 0 waits at planted\.cu:3 called at .*planted\.cu:10, thread 1 at planted\.cu:3 called at planted\.cu:9 \(
// x: 256, y: 256, grid: 1
__noinline__ __device__ int steps(int count, int depth) {
    __syncthreads();
    if (!depth) return count;
    return steps(count + 1, depth - 1) + 1;
}
extern "C" __global__ void planted(const float* x, float* y, int n) {
    int t = threadIdx.x, count = 0;
    @count = steps(0, 3)@if (t % 2) for (int i = 0; i < 4; i++) count += steps(0, 0);
    else count = steps(0, 3)@;
    y[t] = x[t] + count;
}

//// a sum twice, and by some threads once more
// error: divergent barrier: thread 0 waits at planted\.cu:3 called at planted\.cu:13, thread 1 at planted\.cu:3 called at planted\.cu:12 \(
// x: 256, y: 256, grid: 1
__device__ float any_of_block(float v) {
    bool found = __syncthreads_or(v > 0);
    return found ? v : 0;
}
extern "C" __global__ void planted(const float* x, float* y, int n) {
    int t = threadIdx.x;
    float v = x[t];
#pragma unroll
    for (int i = 0; i < 4; i++) v = any_of_block(v + i);
    v = any_of_block(v);
    @@if (t % 2)@ v = any_of_block(v);
    v = any_of_block(v);
    y[t] = v;
}
