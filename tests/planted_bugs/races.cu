//// a sum without an atomic
// error: planted\.cu:4: race: .* y\[\d\], which thread \d+ writes at planted\.cu:4
// x: 1024, y: 4
extern "C" __global__ void planted(const float* x, INOUT float* y, int n) {
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    @atomicAdd(&y[blockIdx.x], x[i])@y[blockIdx.x] += x[i]@;
}

//// no barrier after a write
// error: race|nobody has written
// x: 256, y: 256, grid: 1
extern "C" __global__ void planted(const float* x, float* y, int n) {
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    __shared__ float s[256];
    s[threadIdx.x] = x[i];
    @__syncthreads();@@
    y[i] = s[255 - threadIdx.x];
}

//// no barrier before a buffer is used again
// error: race
// x: 256, y: 256, grid: 1
extern "C" __global__ void planted(const float* x, float* y, int n) {
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    __shared__ float s[256];
    float sum = 0;
    for (int k = 0; k < 3; k++) {
        s[threadIdx.x] = x[i] * k;
        __syncthreads();
        sum += s[(threadIdx.x + 100) % 256];
        @__syncthreads();@@
    }
    y[i] = sum;
}

//// a reduction without barriers between its steps
// error: race
// x: 256, y: 256, grid: 1
extern "C" __global__ void planted(const float* x, float* y, int n) {
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    __shared__ float s[256];
    s[threadIdx.x] = x[i];
    __syncthreads();
    for (int half = 128; half > 0; half /= 2) {
        if (threadIdx.x < half) s[threadIdx.x] += s[threadIdx.x + half];
        @__syncthreads();@@
    }
    @@__syncthreads();@
    y[i] = s[0];
}

//// a reduction whose last steps trust the warp
// error: race
// x: 32, y: 32, grid: 1, block: 32
extern "C" __global__ void planted(const float* x, float* y, int n) {
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    __shared__ float s[32];
    s[threadIdx.x] = x[i];
    __syncwarp();
    for (int half = 16; half > 0; half /= 2) {
        float other = s[(threadIdx.x + half) % 32];
        @__syncwarp();@@
        s[threadIdx.x] += other;
        __syncwarp();
    }
    y[i] = s[threadIdx.x];
}

//// lanes that exchange without __syncwarp
// error: race|nobody has written
// x: 32, y: 32, grid: 1, block: 32
extern "C" __global__ void planted(const float* x, float* y, int n) {
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    __shared__ float s[32];
    s[threadIdx.x] = x[i];
    @__syncwarp();@@
    y[i] = s[31 - threadIdx.x];
}

//// __syncwarp between two warps
// error: race|nobody has written
// x: 64, y: 64, grid: 1, block: 64
extern "C" __global__ void planted(const float* x, float* y, int n) {
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    __shared__ float s[64];
    s[threadIdx.x] = x[i];
    @__syncthreads()@__syncwarp()@;
    y[i] = s[63 - threadIdx.x];
}

//// a histogram in shared memory without atomics
// error: race
// x: 256, y: 8, grid: 1
extern "C" __global__ void planted(const int* x, INOUT int* y, int n) {
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    __shared__ int bins[8];
    if (threadIdx.x < 8) bins[threadIdx.x] = 0;
    __syncthreads();
    @atomicAdd(&bins[x[i] & 7], 1)@bins[x[i] & 7]++@;
    __syncthreads();
    if (threadIdx.x < 8) y[threadIdx.x] += bins[threadIdx.x];
}

//// a histogram of several blocks without atomics
// error: race.*another block
// y: 1
extern "C" __global__ void planted(const int* x, INOUT int* y, int n) {
    int i = blockIdx.x * blockDim.x + threadIdx.x;

    if (threadIdx.x == 0) @atomicAdd(&y[0], 1)@y[0] += 1@;
}

//// an update in place that reads neighbours
// error: race
// x: 256, y: 256, grid: 1
extern "C" __global__ void planted(const float* x, INOUT float* y, int n) {
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    y[i] = x[i] + @y[i]@y[(i + 1) % n]@;
}

//// blocks that read what others write
// error: race.*another block
// x: 1024, y: 1024
extern "C" __global__ void planted(const float* x, INOUT float* y, int n) {
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    y[i] += @x[i]@y[(i + 256) % 1024]@;
}

//// a value of thread 0 without a barrier
// error: race|nobody has written
// x: 256, y: 256, grid: 1
extern "C" __global__ void planted(const float* x, float* y, int n) {
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    __shared__ float mean;
    if (threadIdx.x == 0) mean = x[0];
    @__syncthreads();@@
    y[i] = x[i] - mean;
}

//// the last block reads without a fence
// error: race.*another block
// y: 6
extern "C" __global__ void planted(const float* x, INOUT float* y, int n) {
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    __shared__ bool last;
    if (threadIdx.x == 0) {
        y[1 + blockIdx.x] = x[blockIdx.x];
        @__threadfence();@@
        last = atomicAdd((unsigned*)y, 1u) == gridDim.x - 1;
    }
    __syncthreads();
    if (last && threadIdx.x == 0) {
        float sum = 0;
        for (int b = 0; b < gridDim.x; b++) sum += y[1 + b];
        y[1 + gridDim.x] = sum;
    }
}

//// a plain read beside atomics
// error: race
// x: 256, y: 2, grid: 1
extern "C" __global__ void planted(const int* x, INOUT int* y, int n) {
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (threadIdx.x < 64) atomicAdd(&y[0], 1);
    @__syncthreads();@@
    if (threadIdx.x == 64) y[1] = y[0];
}

//// a sum of doubles by atomicCAS, which one thread reads without a barrier
// error: planted\.cu:15: race: thread \d+ reads s, which thread \d+ writes at planted\.cu:6
// x: 256, y: 1, grid: 1
__device__ double add(double* address, double value) {
    unsigned long long *bits = (unsigned long long*)address, old = *bits, assumed;
    do {
        assumed = old;
        old = atomicCAS(bits, assumed, __double_as_longlong(value + __longlong_as_double(assumed)));
    } while (assumed != old);
    return __longlong_as_double(old);
}
extern "C" __global__ void planted(const float* x, double* y, int n) {
    __shared__ double s;
    if (threadIdx.x == 0) s = 0;
    __syncthreads();
    add(&s, x[threadIdx.x]); @__syncthreads();@@
    if (threadIdx.x == n - 1) y[0] = s;
}

//// a sum of all blocks by atomicExch in place of atomicCAS
// error: planted\.cu:5: race: thread \d+ reads y\[0\], which thread \d+ writes at planted\.cu:8
// y: 1
extern "C" __global__ void planted(const float* x, INOUT double* y, int n) {
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= n) return;
    unsigned long long *bits = (unsigned long long*)y, old = *bits, assumed;
    do {
        assumed = old;
        old = @atomicCAS(bits, assumed, @atomicExch(bits, @__double_as_longlong(x[i] + __longlong_as_double(assumed)));
    } while (assumed != old);
}

//// a maximum by atomicCAS, which a thread may not need, and a plain one
// error: race: thread \d+ (reads|writes) y\[0\], which thread \d+
// y: 1
extern "C" __global__ void planted(const float* x, INOUT float* y, int n) {
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= n) return;
    int* bits = (int*)y;
    int old = *bits, assumed;
    while (x[i] > __int_as_float(old)) {
        assumed = old;
        old = @atomicCAS(bits, assumed, __float_as_int(x[i]))@(*y = x[i], assumed)@;
        if (old == assumed) break;
    }
}

//// a minimum whose loop reads again, and one that compares with something else
// error: race: thread \d+ (reads|writes) y\[0\], which thread \d+ (reads|writes) at planted\.cu:[67]
// y: 1
extern "C" __global__ void planted(const int* x, INOUT int* y, int n) {
    int i = blockIdx.x * blockDim.x + threadIdx.x, seen;
    if (i >= n) return;
    do {
        seen = *(volatile int*)y;
    } while (seen > x[i] && atomicCAS(y, seen@@ - 1@, x[i]) != seen@@ && n < 0@);
}

//// halves by atomicCAS of the word that they are in
// error: race: thread \d+ (reads|writes) y\[[01]\], which thread \d+
// y: 2
extern "C" __global__ void planted(const float* x, INOUT half_t* y, int n) {
    int i = blockIdx.x * blockDim.x + threadIdx.x, shift = i % 2 * 16;
    if (i >= n) return;
    unsigned *word = (unsigned*)y, old = *word, assumed;
    do {
        assumed = old;
        half_t sum = {(unsigned short)(assumed >> shift)};
        sum = from_acc<half_t>(to_acc(sum) + x[i] / 1000);
        @old = atomicCAS(word, assumed, (assumed & ~(0xFFFFu << shift)) | (unsigned)sum.bits << shift);@y[i % 2] = sum;@
    } while (assumed != old);
}

//// a maximum by atomicMax, where it is larger than what a plain read gives
// error: race: thread \d+ (reads|writes) y\[0\], which thread \d+
// y: 1
extern "C" __global__ void planted(const int* x, INOUT int* y, int n) {
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i < n && x[i] > y[0]) @atomicMax(y, x[i])@atomicExch(y, x[i])@;
}

//// bits that are set by atomicOr, where a plain read has not found them
// error: race: thread \d+ (reads|writes) bits\[\d\]
// x: 256, y: 8, grid: 1
extern "C" __global__ void planted(const u8* x, unsigned* y, int n) {
    __shared__ unsigned bits[8];
    int t = threadIdx.x, word = x[t] / 32;
    unsigned bit = 1u << x[t] % 32;
    if (t < 8) bits[t] = 0;
    __syncthreads();
    if (!(bits[word] & bit)) @atomicOr(&bits[word], bit)@bits[word] |= bit@;
    __syncthreads();
    if (t < 8) y[t] = bits[t];
}

//// a lock that is looked at before it is taken
// error: race: thread 0 (reads|writes) lock
// y: 2
__device__ int lock;
extern "C" __global__ void planted(const float* x, INOUT float* y, int n) {
    if (threadIdx.x == 0) {
        while (*(volatile int*)&lock@ || atomicCAS(&lock, 0, 1)@@) {} @@atomicExch(&lock, 1);@
        __threadfence();
        y[0] += x[blockIdx.x];
        __threadfence();
        atomicExch(&lock, 0);
    }
}

//// a counter that a thread reads, and then counts itself
// error: race: thread \d+ (reads|writes) y\[0\], which thread \d+
// x: 256, y: 2, grid: 1
extern "C" __global__ void planted(const int* x, INOUT int* y, int n) {
    if (threadIdx.x == 0) y[1] = y[0];
    @__syncthreads();@@
    atomicAdd(&y[0], x[threadIdx.x]);
}

//// a counter that a thread reads before its warp counts, and another warp does
// error: race: thread \d+ (reads|writes) y\[0\], which thread \d+
// x: 64, y: 2, grid: 1, block: 64
extern "C" __global__ void planted(const int* x, INOUT int* y, int n) {
    if (threadIdx.x == 0) y[1] = y[0];
    @__syncthreads();@__syncwarp();@
    if (threadIdx.x % 32 == 5) atomicAdd(&y[0], x[threadIdx.x]);
}

//// a thread that waits for a counter
// error: race: thread 255 reads y\[0\], which thread \d+
// x: 256, y: 2, grid: 1
extern "C" __global__ void planted(const int* x, INOUT int* y, int n) {
    if (threadIdx.x < 255) atomicAdd(&y[0], 1);
    @__syncthreads();@__syncwarp();@
    if (threadIdx.x == 255) while (*(volatile int*)y < @255@256@) {}
}

//// a counter in a __device__ variable without an atomic
// error: planted\.cu:4: race: thread \d+ (reads|writes) count, which thread
// x: 256, y: 256, grid: 1
__device__ int count;
extern "C" __global__ void planted(const float* x, float* y, int n) {
    @atomicAdd(&count, 1)@count++@;
    y[threadIdx.x] = x[threadIdx.x];
}

//// a prefix sum without a barrier between reads and writes
// error: race
// x: 256, y: 256, grid: 1
extern "C" __global__ void planted(const float* x, float* y, int n) {
    __shared__ float s[256];
    int t = threadIdx.x;
    s[t] = x[t];
    __syncthreads();
    for (int o = 1; o < 256; o *= 2) {
        float v = t >= o ? s[t - o] : 0;
        @__syncthreads();@@
        s[t] += v;
        __syncthreads();
    }
    y[t] = s[t];
}

//// warps read each other's totals after __syncwarp
// error: race|nobody has written
// x: 256, y: 256, grid: 1
extern "C" __global__ void planted(const float* x, float* y, int n) {
    __shared__ float totals[8];
    int t = threadIdx.x, lane = t % 32, w = t / 32;
    float v = x[t];
    for (int o = 1; o < 32; o *= 2) {
        float u = __shfl_up_sync(0xffffffffu, v, o);
        if (lane >= o) v += u;
    }
    if (lane == 31) totals[w] = v;
    @__syncthreads();@__syncwarp();@
    for (int k = 0; k < w; k++) v += totals[k];
    y[t] = v;
}

//// a tile transposed without a barrier
// error: race|nobody has written
// x: 1024, y: 1024, grid: 1, block: 1024
extern "C" __global__ void planted(const float* x, float* y, int n) {
    __shared__ float tile[32][33];
    int c = threadIdx.x % 32, r = threadIdx.x / 32;
    tile[r][c] = x[r * 32 + c];
    @__syncthreads();@@
    y[r * 32 + c] = tile[c][r];
}

//// rows that overlap in shared memory
// error: race
// x: 1024, y: 1024, grid: 1, block: 1024
extern "C" __global__ void planted(const float* x, float* y, int n) {
    __shared__ float tile[32 * 33];
    int c = threadIdx.x % 32, r = threadIdx.x / 32;
    tile[r * @33@31@ + c] = x[r * 32 + c];
    __syncthreads();
    y[r * 32 + c] = tile[c * 33 + r];
}

//// bins that are counted before they are cleared
// error: race|nobody has written
// x: 256, y: 256, grid: 1
extern "C" __global__ void planted(const u8* x, float* y, int n) {
    __shared__ int h[256];
    int t = threadIdx.x;
    h[t] = 0;
    @__syncthreads();@@
    atomicAdd(&h[x[t]], 1);
    __syncthreads();
    y[t] = h[t];
}

//// bins that are read before all are counted
// error: race
// x: 256, y: 256, grid: 1
extern "C" __global__ void planted(const u8* x, float* y, int n) {
    __shared__ int h[256];
    int t = threadIdx.x;
    h[t] = 0;
    __syncthreads();
    atomicAdd(&h[x[t]], 1);
    @__syncthreads();@@
    y[t] = h[t];
}

//// two buffers, of which the wrong one is filled
// error: race
// x: 256, y: 256, grid: 1
extern "C" __global__ void planted(const float* x, float* y, int n) {
    __shared__ float s[2][256];
    int t = threadIdx.x, b = 0;
    s[0][t] = x[t];
    __syncthreads();
    for (int k = 0; k < 4; k++) {
        s[b@ ^ 1@@][t] = s[b][(t + 40) % 256];
        __syncthreads();
        b ^= 1;
        @@s[b][t] = s[b ^ 1][(t + 40) % 256];@
        @@__syncthreads();@
    }
    y[t] = s[b][t];
}

//// a thread replaces what others still read
// error: race
// x: 256, y: 256, grid: 1
extern "C" __global__ void planted(const float* x, float* y, int n) {
    __shared__ float mean;
    int t = threadIdx.x;
    if (t == 0) mean = x[0];
    __syncthreads();
    float a = x[t] - mean;
    @__syncthreads();@@
    if (t == 0) mean = 2;
    __syncthreads();
    y[t] = a * mean;
}

//// bits of a byte
// error: race
// x: 256, y: 32, grid: 1
extern "C" __global__ void planted(const float* x, u8* y, int n) {
    __shared__ u8 s[32];
    int t = threadIdx.x;
    if (t < 32) s[t] = 0;
    __syncthreads();
    @if (t % 8 == 0) { u8 v = 0; for (int k = 0; k < 8; k++) v |= (x[t + k] > 0) << k; s[t / 8] = v; }@s[t / 8] |= (x[t] > 0) << t % 8;@
    __syncthreads();
    if (t < 32) y[t] = s[t];
}

//// bit fields of a word
// error: race
// x: 64, y: 32, grid: 1, block: 64
struct Two { unsigned a : 16, b : 16; };
extern "C" __global__ void planted(const float* x, float* y, int n) {
    __shared__ Two s[32];
    int t = threadIdx.x;
    @if (t < 32) s[t].a = t, s[t].b = 1;@if (t < 32) s[t].a = t; else s[t - 32].b = 1;@
    __syncthreads();
    if (t < 32) y[t] = s[t].a + s[t].b;
}

//// a loop over the grid with the stride of a block
// error: race.*another block
// x: 1024, y: 1024
extern "C" __global__ void planted(const float* x, float* y, int n) {
    for (int i = blockIdx.x * blockDim.x + threadIdx.x; i < n; i += blockDim.x@ * gridDim.x@@) y[i] = x[i];
}

//// a block reads another one's output
// error: race.*another block
// x: 1024, y: 1024
extern "C" __global__ void planted(const float* x, INOUT float* y, int n) {
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    @float h = i + 256 < n ? x[i + 256] : 0;@float h = i + 256 < n ? y[i + 256] : 0;@
    y[i] = x[i] + h;
}

//// halves that are written twice
// error: race: thread \d+ writes y\[\d+\], which thread \d+ writes
// x: 256, y: 256, grid: 1
extern "C" __global__ void planted(const float* x, half_t* y, int n) {
    int t = threadIdx.x;
    y[t@@ % 128@] = from_acc<half_t>(x[t]);
    @@if (t < 128) y[t + 128] = from_acc<half_t>(x[t]);@
}

//// bytes that are written twice
// error: race
// x: 256, y: 256, grid: 1
extern "C" __global__ void planted(const float* x, u8* y, int n) {
    int t = threadIdx.x;
    y[t@@ % 64@] = x[t] > 0;
    @@if (t < 64) for (int k = 1; k < 4; k++) y[t + 64 * k] = 0;@
}

//// a half of shared memory that another lane replaces
// error: race
// x: 64, y: 64, grid: 1, block: 64
extern "C" __global__ void planted(const float* x, float* y, int n) {
    __shared__ half_t s[2];
    int t = threadIdx.x;
    if (t == 0) s[0] = from_acc<half_t>(x[0]);
    __syncthreads();
    if (t == 5) s[@1@0@] = from_acc<half_t>(x[5]);
    if (t == 6) s[@0@1@] = from_acc<half_t>(x[6]);
    @__syncthreads();@@
    y[t] = @to_acc(s[0])@t == 40 ? to_acc(s[0]) : 0@;
}

//// a pair of halves over a neighbour's half
// error: race
// x: 256, y: 257, grid: 1
extern "C" __global__ void planted(const float* x, half_t* y, int n) {
    int t = threadIdx.x;
    y[t] = from_acc<half_t>(x[t]);
    @if (t == n - 1)@@ y[t + 1] = from_acc<half_t>(0.f);
}

//// the last block replaces what all have read
// error: race.*another block
// y: 4
extern "C" __global__ void planted(const float* x, INOUT float* y, int n) {
    float old = @x@y@[0];
    __syncthreads();
    if (threadIdx.x == 0 && blockIdx.x @== 0@== 3@) y[0] = old + 1;
}

//// a thread counts itself, and reads the sum of all
// error: race
// x: 256, y: 2, grid: 1
extern "C" __global__ void planted(const int* x, INOUT int* y, int n) {
    int t = threadIdx.x;
    atomicAdd(&y[0], 1);
    @__syncthreads();@@
    if (t == 255) y[1] = y[0];
}

//// a warp reads, another one has read before, and the first writes
// error: race
// x: 64, y: 64, grid: 1, block: 64
extern "C" __global__ void planted(const float* x, float* y, int n) {
    __shared__ float s;
    int t = threadIdx.x;
    if (t == 0) s = x[0];
    __syncthreads();
    float v = s;
    @__syncthreads();@__syncwarp();@
    if (t == 63) s = 3;
    y[t] = v;
}

//// all blocks add, and the last one reads after its own barrier
// error: race.*another block
// y: 5
extern "C" __global__ void planted(const float* x, INOUT float* y, int n) {
    int t = threadIdx.x;
    if (t == 0) atomicAdd(&y[@1 + blockIdx.x@0@], x[blockIdx.x]);
    __syncthreads();
    if (blockIdx.x == 3 && t == 1) y[@0@1@] = y[@4@0@];
}

//// a lock without fences
// error: race.*another block.*a lock takes a __threadfence
// y: 2
__device__ int lock;
extern "C" __global__ void planted(const float* x, INOUT float* y, int n) {
    if (threadIdx.x == 0) {
        while (atomicCAS(&lock, 0, 1)) {}
        @__threadfence();@@
        y[0] += x[blockIdx.x];
        @__threadfence();@@
        atomicExch(&lock, 0);
    }
}

//// a lock between threads
// error: race.*no barrier between threads of one block
// y: 2
__device__ int lock;
extern "C" __global__ void planted(const float* x, INOUT float* y, int n) {
    if (threadIdx.x @== 0@< 2@) {
        while (atomicCAS(&lock, 0, 1)) {}
        __threadfence();
        y[0] += x[blockIdx.x];
        __threadfence();
        atomicExch(&lock, 0);
    }
}

//// a sum that block 0 clears while others add
// error: race
// y: 1
extern "C" __global__ void planted(const float* x, INOUT float* y, int n) {
    @@if (blockIdx.x == 0 && threadIdx.x == 0) y[0] = 0;
    __syncthreads();@
    atomicAdd(y, x[0]);
}

//// a counter that one block sets back too early
// error: race
// y: 1
extern "C" __global__ void planted(const float* x, INOUT float* y, int n) {
    if (threadIdx.x == 0) {
        atomicAdd(y, 1.0f);
        @@if (blockIdx.x == 3) y[0] = 0;@
    }
}

//// atomicExch that sets what others add to
// error: race|nobody
// x: 64, y: 64, grid: 1, block: 64
extern "C" __global__ void planted(const int* x, int* y, int n) {
    __shared__ int sum;
    int t = threadIdx.x;
    if (t == 0) sum = 0;
    @__syncthreads();@@
    atomicAdd(&sum, x[t] & 7);
    __syncthreads();
    y[t] = sum;
}

//// a column of a tile that is written while it is read
// error: planted\.cu:6: race: thread \d+ (reads|writes) tile\[\d+\]\[\d+\], which thread \d+ (reads|writes) at planted\.cu:6
// x: 256, y: 256, grid: 1
extern "C" __global__ void planted(const float* x, float* y, int n) {
    __shared__ float tile[16][17];
    int r = threadIdx.x / 16, c = threadIdx.x % 16;
    tile[r][c] = 0; __syncthreads();
    tile[r][c] = x[threadIdx.x]; @__syncthreads();@@ y[threadIdx.x] = tile[c][r];
}

//// vectors of dynamic shared memory that overlap
// error: race: thread \d+ writes pairs\[\d+\], which thread \d+ writes
// x: 256, y: 256, grid: 1, shared: 4096
extern "C" __global__ void planted(const float* x, float* y, int n) {
    extern __shared__ float2 pairs[];
    int t = threadIdx.x;
    pairs[t] = {x[t], 0};
    @__syncthreads();@@
    pairs[255 - t] = {x[t], 1};
    __syncthreads();
    y[t] = pairs[t].x;
}

//// blocks that find a flag, without a fence
// error: race: thread 0 reads y\[0\], which thread 0 of another block writes
// x: 4, y: 7
extern "C" __global__ void planted(const float* x, INOUT float* y, int n) {
    if (threadIdx.x) return;
    unsigned *taken = (unsigned*)&y[5], *flag = (unsigned*)&y[6];
    if (atomicExch(taken, 1u) == 0) {
        y[0] = x[0];
        __threadfence();
        atomicExch(flag, 1u);
    } else if (atomicAdd(flag, 0u) == 1) {
        @__threadfence();@@
        y[1 + blockIdx.x] = y[0];
    }
}

//// structs that a function takes by value
// error: race: thread 0 reads all\[1\]
// x: 128, y: 1, grid: 1, block: 128
struct Moments {
    float mean, squares;
    int count;
};
__device__ Moments merged(Moments a, Moments b) {
    int count = a.count + b.count;
    if (count == 0) return a;
    float d = b.mean - a.mean;
    return {a.mean + d * b.count / count, a.squares + b.squares + d * d * a.count * b.count / count, count};
}
extern "C" __global__ void planted(const float* x, float* y, int n) {
    __shared__ Moments all[4];
    if (threadIdx.x % 32 == 0) all[threadIdx.x / 32] = {x[threadIdx.x], 0, 1};
    @__syncthreads@__syncwarp@();
    if (threadIdx.x > 0) return;
    Moments total = all[0];
    for (int k = 1; k < 4; k++) total = merged(total, all[k]);
    y[0] = total.squares;
}

//// a warp that waits for a flag of another one
// error: race: thread \d+ (reads|writes) ready, which thread \d+ (reads|writes) at planted\.cu:\d+
// x: 64, y: 64, grid: 1, block: 64
extern "C" __global__ void planted(const float* x, float* y, int n) {
    __shared__ volatile int ready;
    __shared__ float sum;
    int t = threadIdx.x;
    if (t == 0) ready = 0;
    __syncthreads();
    if (t == 32) { sum = x[0] + x[32]; ready = 1; }
    @__syncthreads();@while (t < 32 && !ready) {}@
    y[t] = t < 32 ? sum : 0;
}
