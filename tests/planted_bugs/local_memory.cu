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
// error: planted\.cu:2: thread \d+ writes out of bounds: v\[[4-7]\], which has 4 elements
// x: 256, y: 256, grid: 1
__device__ __noinline__ void put(float* p, int k, float v) { p[k] = v; }
extern "C" __global__ void planted(const float* x, float* y, int n) {
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    float v[4] = {};
    put(v, i % @4@8@, x[i]);
    y[i] = v[0];
}

//// before the start of a local array, by a pointer and a constant
// error: planted\.cu:5: thread \d+ reads out of bounds(: v\[-1\], which has 4 elements| of a local array)
// x: 256, y: 256, grid: 1
extern "C" __global__ void planted(const float* x, float* y, int n) {
    float v[4], *p = v;
    for (int k = 0; k < 4; k++) v[k] = x[threadIdx.x];
    y[threadIdx.x] = p[@0@-1@];
}

//// before the start of a local array, by an index that varies
// error: planted\.cu:4: thread \d+ writes out of bounds: v\[-1\], which has 4 elements
// x: 256, y: 256, grid: 1
extern "C" __global__ void planted(const float* x, float* y, int n) {
    float v[4] = {}, *p = v;
    p[int(threadIdx.x % 4)@@ - 1@] = x[threadIdx.x];
    y[threadIdx.x] = v[0] + v[1] + v[2] + v[3];
}

//// a loop that goes down past a local array's start
// error: reads out of bounds: v\[-1\]|index -1 is out of bounds of 'float\[4\]'
// x: 256, y: 256, grid: 1
extern "C" __global__ void planted(const float* x, float* y, int n) {
    float v[4], sum = 0;
    for (int k = 0; k < 4; k++) v[k] = x[threadIdx.x];
    for (float* p = v + 3; p >= v@@ - 1@; p--) sum += *p;
    y[threadIdx.x] = sum;
}

//// between two local arrays, in another function
// error: planted\.cu:2: thread \d+ reads out of bounds: w\[(-1|8)\], which has 8 elements
// x: 256, y: 256, grid: 1
__device__ __noinline__ float get(const float* p, int k) { return p[k]; }
extern "C" __global__ void planted(const float* x, float* y, int n) {
    float v[4], w[8];
    for (int k = 0; k < 4; k++) v[k] = w[k] = w[k + 4] = x[threadIdx.x];
    int k = threadIdx.x % 8;
    y[threadIdx.x] = get(v, k / 2) + get(w, k@@ + 1@) + get(w, k@@ - 1@);
}

//// a vector before the start of a local array
// error: reads out of bounds: v\[-4\], which has 8 elements
// x: 256, y: 256, grid: 1
extern "C" __global__ void planted(const float* x, float* y, int n) {
    __align__(16) float v[8];
    for (int k = 0; k < 8; k++) v[k] = x[threadIdx.x];
    const float4* p = (const float4*)v + 1;
    y[threadIdx.x] = p[-1 - int(threadIdx.x % @2@3@) / 2].x;
}

//// a single local variable as if it were an array
// error: writes out of bounds: v\[1\], which has 1 elements
// x: 256, y: 256, grid: 1
__device__ __noinline__ void put(float* p, int k, float value) { p[k] = value; }
extern "C" __global__ void planted(const float* x, float* y, int n) {
    float v;
    put(&v, threadIdx.x % @1@2@, x[threadIdx.x]);
    y[threadIdx.x] = v;
}

//// a local array of a block of code that has ended
// error: planted\.cu:9: thread \d+ reads v\[\d\] outside of the block of code that has it
// x: 256, y: 256, grid: 1
extern "C" __global__ void planted(const float* x, float* y, int n) {
    float w[4], *p = w;
    {
        float v[4];
        for (int k = 0; k < 4; k++) w[k] = v[k] = x[(threadIdx.x + k) % n];
        p = @w@v@;
    }
    y[threadIdx.x] = p[threadIdx.x % 4] + w[0];
}

//// a local array behind a grid barrier
// error: reads out of bounds: v\[4\], which has 4 elements
extern "C" __global__ void planted(const float* x, float* y, int n) {
    float v[4], *p = v;
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    for (int k = 0; k < 4; k++) v[k] = x[(i + k) % n];
    grid_barrier();
    if (i < n) y[i] = p[i % @4@5@];
}

//// a large local array of a block of code that has ended
// error: reads v\[\d+\] outside of the block of code that has it
// x: 256, y: 256, grid: 1
extern "C" __global__ void planted(const float* x, float* y, int n) {
    float w[301], *p = w;
    for (int i = 0; i < 2; i++) {
        float v[301];
        for (int k = 0; k < 301; k++) w[k] = v[k] = x[(threadIdx.x + k) % n];
        p = @w@v@;
    }
    y[threadIdx.x] = p[threadIdx.x] + w[300];
}

//// a large local array, one after the end
// error: planted\.cu:2: thread \d+ reads out of bounds: v\[301\], which has 301 elements
// x: 256, y: 256, grid: 1
__device__ __noinline__ float get(const float* p, int k) { return p[k]; }
extern "C" __global__ void planted(const float* x, float* y, int n) {
    y[threadIdx.x] = 0;
    for (int i = 0; i < 2; i++) {
        float v[301];
        for (int k = 0; k < 301; k++) v[k] = x[(threadIdx.x + k) % n];
        y[threadIdx.x] += get(v, @300@301@ - threadIdx.x % 2);
    }
}
