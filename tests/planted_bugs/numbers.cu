//// an index that int does not hold
// error: overflows 'int'; i64 holds more, unsigned wraps around
// x: 256, y: 256, grid: 1
extern "C" __global__ void planted(const float* x, float* y, int n) {
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    int rows = 100000;
    @i64@int@ at = (@i64@int@)rows * (rows + (int)blockIdx.x);
    y[i] = x[i] + (at > 0);
}

//// a sum that int does not hold
// error: overflows 'int'
// x: 256, y: 256, grid: 1
extern "C" __global__ void planted(const float* x, float* y, int n) {
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    int sum = 0;
    for (int k = 0; k < 4; k++) sum += @100000000@1000000000@;
    y[i] = x[i] + sum;
}

//// a division by zero
// error: divides an integer by zero|/ 0 overflows
// x: 256, y: 256, grid: 1
extern "C" __global__ void planted(const float* x, float* y, int n) {
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    y[i] = x[n / (i + @1@0@) % n];
}

//// a shift by more than there are bits
// error: a shift of 'int' by 32
// x: 256, y: 256, grid: 1
extern "C" __global__ void planted(const float* x, float* y, int n) {
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    y[i] = x[i] + (@1u@1@ << (i % @32@33@));
}

//// a function that does not always return
// error: planted\.cu:2: thread \d+ comes to the end of a function that returns a value
// x: 256, y: 256, grid: 1
__device__ float positive(float v) { if (v > 0) return v; @return 0;@@ }
extern "C" __global__ void planted(const float* x, float* y, int n) {
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    y[i] = positive(x[i]);
}

//// a float that int does not hold
// error: overflows 'int'
// x: 256, y: 256, grid: 1
extern "C" __global__ void planted(const float* x, int* y, int n) {
    y[threadIdx.x] = (int)(x[threadIdx.x] * @1@1e12f@);
}

//// a shift by less than nothing
// error: a shift of 'int' by
// x: 256, y: 256, grid: 1
extern "C" __global__ void planted(const int* x, int* y, int n) {
    int t = threadIdx.x;
    y[t] = 1 << (@t % 31@t - 1@);
}

//// a negation of the least integer
// error: overflows|negation
// x: 256, y: 256, grid: 1
extern "C" __global__ void planted(const int* x, int* y, int n) {
    int t = threadIdx.x, v = (int)(0x80000000u + (unsigned)(t * 0));
    y[t] = v == 0 ? 1 : -(@v + 1@v@);
}
