//// sums in a local array that do not start at 0
// error: a local variable that nobody has set goes into y\[\d+\]
extern "C" __global__ void planted(const float* x, float* y, int n) {
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    float sums[4]@ = {}@@;
    for (int k = 0; k < 4; k++)
        for (int j = 0; j < 4; j++) sums[j] = fmaf(x[k], x[(k + j) % n], sums[j]);
    if (i < n) y[i] = sums[i % 4];
}

//// counts in a local array that do not start at 0
// error: a local variable that nobody has set goes into y\[\d+\]
extern "C" __global__ void planted(const float* x, int* y, int n) {
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    int counts[4]@ = {}@@;
    for (int k = 0; k < 8; k++) counts[k % 4]++;
    if (i < n) y[i] = counts[i % 4];
}

//// a local array of which only a part is set
// error: a local variable that nobody has set goes into y\[\d+\]
extern "C" __global__ void planted(const float* x, float* y, int n) {
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    float powers[8];
    for (int k = 0; k < @8@7@; k++) powers[k] = k ? powers[k - 1] * x[0] : 1;
    if (i < n) y[i] = powers[i % 8];
}

//// a least number that does not start at one of x
// error: a local variable that nobody has set goes into y\[\d+\]
extern "C" __global__ void planted(const float* x, float* y, int n) {
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    float least@ = x[threadIdx.x]@@;
    for (int k = threadIdx.x % 32; k < n; k += 32) least = least < x[k] * x[k] ? least : x[k] * x[k];
    if (i < n) y[i] = least;
}

//// a greatest number below 0 that does not start at one of x
// error: a local variable that nobody has set goes into y\[\d+\]
extern "C" __global__ void planted(const float* x, float* y, int n) {
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    float greatest@ = -1.0f / 0.0f@@;
    for (int k = threadIdx.x % 32; k < n; k += 32) greatest = fmaxf(greatest, -fabsf(x[k]));
    greatest = warp_max(greatest);
    if (i < n) y[i] = greatest;
}

//// a half of which only one branch sets a value
// error: a local variable that nobody has set goes into y\[\d+\]
extern "C" __global__ void planted(const float* x, half_t* y, int n) {
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= n) return;
    half_t v@ = from_acc<half_t>(0.0f)@@;
    if (x[i] > 0) v = from_acc<half_t>(x[i]);
    y[i] = v;
}

//// an index that is not set, where it leads into the same array
// error: a local variable that nobody has set goes into y\[\d+\]
extern "C" __global__ void planted(const float* x, float* y, int n) {
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    unsigned next[2];
    next[0] = i;
    @next[1] = n - 1;@@
    if (i < n) y[i] = x[next[i % 2] % n];
}

//// a private copy that goes into what atomics add up
// error: a local variable that nobody has set goes into y\[\d+\]
// y: 4
extern "C" __global__ void planted(const float* x, INOUT float* y, int n) {
    float v[4]@ = {}@@;
    for (int k = threadIdx.x; k < n; k += blockDim.x) v[k % 4] += x[k];
    for (int k = 0; k < 4; k++) atomicAdd(&y[k], v[k]);
}
