//// float4 at an odd element
// error: multiple of 16 bytes: x\[\d+\]
// x: 997, y: 996
extern "C" __global__ void planted(const float* x, float* y, int n) {
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i < 249) *(float4*)(y + 4 * i) = *(const float4*)(x + 4 * i@@ + 1@);
}

//// rows that are no multiple of float4
// error: multiple of 16 bytes: x\[\d+\]
// x: 1024, y: 256, grid: 1
extern "C" __global__ void planted(const float* x, float* y, int n) {
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    const float* row = x + i * @4@3@;
    float4 v = *(const float4*)row;
    y[i] = v.x + v.w;
}

//// a double at an odd float
// error: multiple of 8 bytes: y\[\d+\]
// x: 256, y: 256, grid: 1
extern "C" __global__ void planted(const float* x, INOUT float* y, int n) {
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i < 100) *(double*)(y + 2 * i@@ + 1@) = 1;
    if (i >= 200) y[i] = x[i];
}

//// a part of dynamic shared memory at an odd place
// error: multiple of
// x: 256, y: 256, grid: 1, shared: 4096
extern "C" __global__ void planted(const float* x, float* y, int n) {
    extern __shared__ __align__(16) char s[];
    u8* flags = (u8*)s;
    double* v = (double*)(s + @256@252@);
    int t = threadIdx.x;
    if (t < 252) flags[t] = 1;
    v[t] = x[t];
    y[t] = v[t];
}

//// an atomic function between two ints
// error: thread 0 calls an atomic function of 4 bytes at a place that is not a multiple of them: y\[0\]
// x: 256, y: 256, grid: 1
extern "C" __global__ void planted(const int* x, INOUT int* y, int n) {
    char* bytes = (char*)y;
    if (threadIdx.x == 0) atomicAdd((int*)(bytes + @4@2@), x[0]);
}

//// an atomic function of 64 bits between two of them, in shared memory
// error: thread 3 calls an atomic function of 8 bytes at a place that is not a multiple of them: counts\[7\]
// x: 256, y: 4, grid: 1
extern "C" __global__ void planted(const int* x, int* y, int n) {
    __shared__ alignas(8) unsigned counts[16];
    int t = threadIdx.x;
    if (t < 16) counts[t] = 0;
    __syncthreads();
    if (t == 3) atomicAdd((unsigned long long*)&counts[@6@7@], 1ull);
    __syncthreads();
    if (t < 4) y[t] = counts[t];
}
