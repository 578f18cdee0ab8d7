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
// error: planted\.cu:5: thread \d+ writes out of bounds: v\[4\], which has 4 elements
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
// error: planted\.cu:5: thread \d+ writes out of bounds: scratch\[\d\], which has 4 elements
// x: 256, y: 256, grid: 1
extern "C" __global__ void planted(const float* x, float* y, int n) {
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    __shared__ float scratch[@32@4@], other[32];
    float sum = block_sum(x[i], scratch);
    if (i < 32) other[i] = 0;
    y[i] = sum;
}

//// shared memory before the first array
// error: planted\.cu:4: thread 0 writes out of bounds: s\[-1\], which has 256 elements
// x: 256, y: 256, grid: 1
extern "C" __global__ void planted(const float* x, float* y, int n) {
    __shared__ float s[256];
    for (float* p = s + threadIdx.x; p == s + threadIdx.x; p++) *(p@@ - 1@) = 1;
    __syncthreads();
    y[threadIdx.x] = x[threadIdx.x] + s[threadIdx.x@@ - (threadIdx.x == 255)@];
}

//// a constant table, one after the end by a pointer
// error: reads out of bounds: table\[4\], which has 4 elements
// x: 256, y: 256, grid: 1
__constant__ float table[4] = {1, 2, 3, 4};
extern "C" __global__ void planted(const float* x, float* y, int n) {
    const float* p = table;
    y[threadIdx.x] = p[threadIdx.x % @4@5@];
}

//// a __device__ array, one after the end by a pointer
// error: writes out of bounds: counts\[256\]
// x: 256, y: 256, grid: 1
__device__ float counts[256];
extern "C" __global__ void planted(const float* x, float* y, int n) {
    float* p = counts;
    p[threadIdx.x@@ + 1@] = x[threadIdx.x];
    y[threadIdx.x] = x[threadIdx.x];
}

//// an unsigned index before the start
// error: out of bounds: x\[4294967295\]
// x: 256, y: 256, grid: 1
extern "C" __global__ void planted(const float* x, float* y, int n) {
    unsigned t = threadIdx.x;
    y[t] = x[@t > 0 ? t - 1 : 0@t - 1@];
}

//// an array in a struct, one after the end
// error: index 4 is out of bounds of 'float ?\[4\]'
// x: 256, y: 256, grid: 1
struct Tile { float a[4]; float b[4]; };
extern "C" __global__ void planted(const float* x, float* y, int n) {
    Tile v;
    for (int k = 0; k < 4; k++) v.a[k] = v.b[k] = x[threadIdx.x];
    y[threadIdx.x] = v.a[(n - 256) + @3@4@];
}

//// a column after the last one of shared memory
// error: planted\.cu:8: thread \d+ reads out of bounds: s\[\d+\]\[16\], which has 16 x 16 elements
// x: 256, y: 256, grid: 1
extern "C" __global__ void planted(const float* x, float* y, int n) {
    __shared__ float s[16][16];
    int t = threadIdx.x;
    s[t / 16][t % 16] = x[t];
    __syncthreads();
    int c = t % 16 + 1;
    y[t] = @c < 16 ? s[t / 16][c] : 0@s[t / 16][c]@;
}

//// a row in the middle of shared memory with three dimensions
// error: planted\.cu:7: thread \d+ reads out of bounds: s\[\d\]\[4\]\[\d+\], which has 4 x 4 x 16 elements
// x: 256, y: 256, grid: 1
extern "C" __global__ void planted(const float* x, float* y, int n) {
    __shared__ float s[4][4][16];
    int t = threadIdx.x, a = t / 64, b = t / 16 % 4, c = t % 16;
    s[a][b][c] = x[t];
    __syncthreads();
    y[t] = s[a][b@@ + 1@][c];
}

//// a column before the first one of dynamic shared memory
// error: planted\.cu:5: thread \d+ writes out of bounds: s\[\d+\]\[-1\], which has 16 x 16 elements
// x: 256, y: 256, grid: 1, shared: 1024
extern "C" __global__ void planted(const float* x, float* y, int n) {
    extern __shared__ float s[][16];
    int t = threadIdx.x;
    s[t / 16][t % 16@@ - 1@] = x[t];
    __syncthreads();
    y[t] = s[t / 16][t % 16];
}

//// a column after the last one of a local array
// error: planted\.cu:5: thread \d+( reads out of bounds: v\[(\d\]\[4|3\]\[0)\], which has 3 x 4|: index 4 is .* 'float\[4\]')
// x: 256, y: 256, grid: 1
extern "C" __global__ void planted(const float* x, float* y, int n) {
    float v[3][4];
    for (int k = 0; k < 12; k++) v[k / 4][k % 4] = x[(threadIdx.x + k) % n];
    y[threadIdx.x] = v[threadIdx.x % 3][threadIdx.x % 4@@ + 1@];
}

//// an index far out of bounds
// error: planted\.cu:4: thread \d+: index \d+ is out of bounds of 'float ?\[4\]'
// x: 256, y: 256, grid: 1
extern "C" __global__ void planted(const float* x, float* y, int n) {
    __shared__ float s[4];
    if (threadIdx.x < 4) s[threadIdx.x@@ * 100000 + 100000@] = x[threadIdx.x];
    __syncthreads();
    y[threadIdx.x] = s[threadIdx.x % 4];
}

//// a table, one after the end
// error: planted\.cu:5: thread \d+(: index 4 is out of bounds of|.*: table\[4\], which has 4)
// x: 256, y: 256, grid: 1
extern "C" __global__ void planted(const float* x, float* y, int n) {
    static constexpr float table[4] = {1, 2, 3, 4};
    __shared__ float s[4];
    if (threadIdx.x < 4) s[threadIdx.x] = table[threadIdx.x@@ + 1@];
    __syncthreads();
    y[threadIdx.x] = x[threadIdx.x] + s[threadIdx.x % 4];
}

//// a remainder of a negative number as an index
// error: planted\.cu:7: thread \d+(: index -\d+ is out of bounds of| writes out of bounds: h\[-\d+\], which has 512 elements)
// x: 256, y: 256, grid: 1
extern "C" __global__ void planted(const int* x, float* y, int n) {
    __shared__ int h[512];
    int t = threadIdx.x;
    h[t] = h[t + 256] = 0;
    __syncthreads();
    atomicAdd(&h[@x[t] & 511@x[t] % 512@], 1);
    __syncthreads();
    y[t] = h[t] + h[t + 256];
}

//// memcpy after the end
// error: out of bounds: x\[250\]
// x: 250, y: 256, grid: 1, block: 64
extern "C" __global__ void planted(const float* x, INOUT float* y, int n) {
    int t = threadIdx.x;
    @if (4 * t + 4 <= n)@@ memcpy(y + 4 * t, x + 4 * t, 16);
}

//// a local array read after its end by a pointer
// error: planted\.cu:7: thread \d+ reads out of bounds: v\[4\], which has 4 elements
// x: 256, y: 256, grid: 1
extern "C" __global__ void planted(const float* x, float* y, int n) {
    int t = threadIdx.x;
    float v[4];
    for (int k = 0; k < 4; k++) v[k] = x[t];
    const float* p = v;
    y[t] = p[t % @4@5@];
}

//// memcpy of a number of bytes that varies
// error: planted\.cu:4: thread 240 reads out of bounds: x\[256\], which has 256 elements
// x: 256, y: 260, grid: 1
extern "C" __global__ void planted(const float* x, float* y, int n) {
    int t = threadIdx.x;
    if (t % 20 == 0) memcpy(y + t, x + t, 4 * (t == 240 ? @16@20@ : 20));
    if (t == 0) memset(y + 256, 0, 16);
}

//// memset of a number of bytes that varies, one float too far
// error: planted\.cu:4: thread \d+ writes out of bounds: v\[4\], which has 4 elements
// x: 256, y: 256, grid: 1
extern "C" __global__ void planted(const float* x, float* y, int n) {
    float v[4];
    memset(v, 0, n / @16@12@);
    y[threadIdx.x] = v[threadIdx.x % 4] + x[threadIdx.x];
}

//// memcpy of a row of shared memory that is too long
// error: planted\.cu:9: thread 1 reads out of bounds: s\[2\]\[0\], which has 2 x 8 elements
// x: 256, y: 256, grid: 1
extern "C" __global__ void planted(const float* x, float* y, int n) {
    __shared__ float s[2][8];
    int t = threadIdx.x;
    if (t < 16) s[t / 8][t % 8] = x[t];
    __syncthreads();
    y[t] = 0;
    __syncthreads();
    if (t < 2) memcpy(y + 16 * t, s[t], n / 8 + @0@4@);
}

//// static shared memory, an index after the end
// error: planted\.cu:4: thread \d+ writes out of bounds: s\[\d+\], which has 4 elements
// x: 256, y: 256, grid: 1
extern "C" __global__ void planted(const float* x, float* y, int n) {
    __shared__ float s[4];
    if (threadIdx.x < @4@5@) s[threadIdx.x] = x[threadIdx.x];
    __syncthreads();
    y[threadIdx.x] = s[threadIdx.x % 4];
}

//// a result that frexp writes after the end
// error: planted\.cu:3: thread \d+ writes out of bounds: y\[256\], which has 256 elements
// x: 256, y: 256, grid: 1
extern "C" __global__ void planted(const float* x, int* y, int n) {
    frexpf(x[threadIdx.x], y + threadIdx.x@@ + 1@);
}
