//// no bounds check
// error: planted\.cu:4: thread \d+ reads out of bounds: x\[10\d\d\], which has 1000 elements \(block 3,0,0\)
extern "C" __global__ void planted(const float* x, float* y, int n) {
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    @if (i < n)@@ y[i] = tanhf(x[i]);
}

//// the bounds check lets one more pass
// error: x\[1000\]
extern "C" __global__ void planted(const float* x, float* y, int n) {
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i @<@<=@ n) y[i] = x[i];
}

//// a neighbour after the end
// error: thread 231 reads out of bounds: x\[1000\]
extern "C" __global__ void planted(const float* x, float* y, int n) {
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i < n) y[i] = x[i] + @(i + 1 < n ? x[i + 1] : 0)@x[i + 1]@;
}

//// a neighbour before the start
// error: thread 0 reads out of bounds: x\[-1\]
extern "C" __global__ void planted(const float* x, float* y, int n) {
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i < n) y[i] = x[@max(i - 1, 0)@i - 1@];
}

//// a write over 4 KB after the end
// error: writes out of bounds: y\[3\d\d\d\]
extern "C" __global__ void planted(const float* x, float* y, int n) {
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i < n) y[i + @0@3000@] = x[i];
}

//// an index that lands in another array
// error: out of bounds
extern "C" __global__ void planted(const float* x, float* y, int n) {
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i < n) y[@i@i * 1000003LL@] = x[i];
}

//// a null pointer
// error: reads through a null pointer
extern "C" __global__ void planted(const float* x, float* y, int n, const float* bias) {
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i < n) y[i] = x[i] + @(bias ? bias[i] : 0)@bias[i]@;
}

//// static shared memory, one after the end
// error: out of bounds
// x: 256, y: 256, grid: 1
extern "C" __global__ void planted(const float* x, float* y, int n) {
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    __shared__ float s[256];
    s[threadIdx.x@@ + 1@] = x[i];
    __syncthreads();
    y[i] = s[threadIdx.x];
}

//// a local array, one after the end
// error: index 4 is out of bounds of 'float ?\[4\]'
// x: 256, y: 256, grid: 1
extern "C" __global__ void planted(const float* x, float* y, int n) {
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    float v[4];
    for (int k = 0; k @<@<=@ 4; k++) v[k] = x[(i + k) % n];
    y[i] = v[i % 4];
}

//// const is cast away
// error: writes x\[\d+\], which is const
// x: 256, y: 256, grid: 1
extern "C" __global__ void planted(const float* x, float* y, int n) {
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    y[i] = x[i]; @@((float*)x)[i] = 0;@
}

//// pointers that are swapped
// error: writes x\[\d+\], which is const
// x: 256, y: 256, grid: 1
extern "C" __global__ void planted(const float* x, float* y, int n) {
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    @y@((float*)x)@[i] = 1;
}

//// rows of another width
// error: out of bounds: x\[
// y: 100, grid: 1
extern "C" __global__ void planted(const float* x, float* y, int n) {
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i < n / 10) y[i] = x[i * @10@11@ + 9];
}

//// scratch of a reduction that is too small
// error: planted\.cu:5: thread \d+ writes out of bounds: scratch, byte \d+, which has 16 bytes
// x: 256, y: 256, grid: 1
extern "C" __global__ void planted(const float* x, float* y, int n) {
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    __shared__ float scratch[@32@4@], other[32];
    float sum = block_sum(x[i], scratch);
    if (i < 32) other[i] = 0;
    y[i] = sum;
}

//// shared memory before the first array
// error: planted\.cu:4: thread 0 writes out of bounds: s, byte -4, which has 1024 bytes
// x: 256, y: 256, grid: 1
extern "C" __global__ void planted(const float* x, float* y, int n) {
    __shared__ float s[256];
    for (float* p = s + threadIdx.x; p == s + threadIdx.x; p++) *(p@@ - 1@) = 1;
    __syncthreads();
    y[threadIdx.x] = x[threadIdx.x] + s[threadIdx.x@@ - (threadIdx.x == 255)@];
}
