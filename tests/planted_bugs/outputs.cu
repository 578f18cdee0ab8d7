//// an element that nobody writes
// error: leaves 1 of 256 elements of its output y unwritten.*flat index 7
// x: 256, y: 256, grid: 1
extern "C" __global__ void planted(const float* x, float* y, int n) {
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    @@if (i != 7) @y[i] = x[i];
}

//// every second element
// error: leaves 128 of 256 elements of its output y unwritten
// x: 256, y: 256, grid: 1
extern "C" __global__ void planted(const float* x, float* y, int n) {
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i @< n@% 2@) y[i] = x[i];
}

//// two blocks write the same elements
// error: race: thread \d+ writes y\[\d+\]
// x: 1024, y: 1024
extern "C" __global__ void planted(const float* x, float* y, int n) {
    int i = blockIdx.x * @256@255@ + threadIdx.x;
    y[i] = x[i];
    @@if (i == 1019) for (int k = 1020; k < n; k++) y[k] = 0;@
}

//// two threads write an element
// error: race: thread \d+ writes y\[0\], which thread \d+ writes
// x: 256, y: 256, grid: 1
extern "C" __global__ void planted(const float* x, float* y, int n) {
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    y[i] = x[i]; @@if (i == 100) y[0] = 1;@
}

//// the elements behind the last four
// error: leaves 1 of 1001 elements
// x: 1001, y: 1001, grid: 1
extern "C" __global__ void planted(const float* x, float* y, int n) {
    int i = 4 * threadIdx.x;
    if (i + 3 < n) for (int k = 0; k < 4; k++) y[i + k] = x[i + k];
    @else for (; i < n; i++) y[i] = x[i];@@
}

//// block and thread change places
// error: leaves 984 of 1000 elements
// x: 1000, y: 1000
extern "C" __global__ void planted(const float* x, float* y, int n) {
    int i = @blockIdx.x * blockDim.x + threadIdx.x@blockIdx.x + blockDim.x * threadIdx.x@;
    if (i < n) y[i] = x[i];
}

//// constant memory that a kernel writes
// error: thread \d+ writes table\[1\], which is const
// x: 256, y: 256, grid: 1
__constant__ float table[2] = {1, 2};
extern "C" __global__ void planted(const float* x, float* y, int n) {
    float factor = table[1];
    @factor@table[1]@ += 1;
    y[threadIdx.x] = x[threadIdx.x] * factor;
}
