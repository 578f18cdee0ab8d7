// Packs a tensor [N, channels, pixels] as fp16 tiles (fp16_tiles.cuh), for kernels that bring lines to shared memory by
// cp.async.
//
//     packed [N][chunk][pixel][64 halves], (value - centre) * 2^e, the parts of a line in ascending order
//
// scale_fp16: the same of channels_last values, as half_t in their own order.
// largest_magnitude: exponents[block], of the scale that the block's share would take; e is the smallest of them.
// pack_fp16: a block takes TILE_PIXELS pixels (of all images in a row) of one chunk; a thread reads 8 channels of WIDTH
// pixels, and writes whole lines after a turn through shared memory. Channels past the last one are zero. sums: null,
// or of each channel over one image (fp16_tiles.cuh, centre). Macros: scalar_t (float, half_t, bf16_t), those of
// fp16_tiles.cuh, WIDTH (pixels in one access; it divides the pixels of an image), THREADS, BATCH
// (accesses under way in a thread of largest_magnitude). Limits: channels a multiple of 8, N * pixels below 2^31.
#include "common.cuh"
#include "pack_tile.cuh"

typedef Packed<scalar_t, WIDTH> Pack;

extern "C" __global__ void __launch_bounds__(THREADS)
    largest_magnitude(const scalar_t* __restrict__ source, int* __restrict__ exponents, i64 size) {
    wait_for_earlier_kernels();
    __shared__ unsigned scratch[32];
    i64 packs = size / WIDTH, step = (i64)gridDim.x * THREADS;
    i64 first = (i64)blockIdx.x * THREADS + threadIdx.x;
    unsigned largest = block_max(largest_of<BATCH>((const Pack*)source, first, step, packs), scratch);
    if (threadIdx.x == 0) exponents[blockIdx.x] = scale_exponent(largest);
}

extern "C" __global__ void __launch_bounds__(THREADS) pack_fp16(
    const scalar_t* __restrict__ source, const int* __restrict__ exponents, const scalar_t* __restrict__ sums,
    half_t* __restrict__ packed, int exponent_count, int images, int channels, int pixels) {
    wait_for_earlier_kernels();
    typedef ToPack<scalar_t, WIDTH> Tensor;
    __shared__ uint4 tile[Tensor::TILE_PIXELS * 8];
    __shared__ unsigned scratch[32];
    Tensor tensor = {source, exponents, sums, packed, exponent_count, channels, pixels};
    tensor.pack((i64)blockIdx.x * Tensor::TILE_PIXELS, images * pixels, blockIdx.y, tile, scratch);
}

extern "C" __global__ void __launch_bounds__(THREADS) scale_fp16(
    const scalar_t* __restrict__ source, const int* __restrict__ exponents, half_t* __restrict__ scaled,
    int exponent_count, i64 size) {
    wait_for_earlier_kernels();
    __shared__ unsigned scratch[32];
    float scale = power_of_two(smallest_exponent(exponents, exponent_count, scratch));
    i64 i = (i64)blockIdx.x * THREADS + threadIdx.x;
    if (i >= size / WIDTH) return;
    Pack in = ((const Pack*)source)[i];
    Packed<half_t, WIDTH> out;
    #pragma unroll
    for (int j = 0; j < WIDTH; j++) out.v[j] = from_acc<half_t>(multiply_unflushed(to_acc(in.v[j]), scale));
    ((Packed<half_t, WIDTH>*)scaled)[i] = out;
}
