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
