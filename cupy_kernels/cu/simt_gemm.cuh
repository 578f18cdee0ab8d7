// Register-tiled matrix product of one block, on ordinary FMA units: acc[m][n] += sum_k a[k][m] * b[k][n].
//
// Macros: acc_t, TILE_M, TILE_N (the block's tile), PER_THREAD (4 or 8: a thread owns PER_THREAD x PER_THREAD values, in
// groups of 4 neighbours so that shared memory is read 16 bytes at a time). TILE_K columns of a and b sit in shared memory,
// twice: while one copy is multiplied, the next is loaded through registers, with one barrier a step.
#pragma once

#define TILE_K 8
#define THREADS_N (TILE_N / PER_THREAD)
#define THREADS (TILE_M * TILE_N / (PER_THREAD * PER_THREAD))
// Blocks per SM that leave enough registers for the 8 x 8 values of a thread: before sm_90, ptxas spills at 128 of them.
#define MIN_BLOCKS (PER_THREAD == 4 ? 8 * 64 / THREADS : TILE_M == 64 ? 3 : __CUDA_ARCH__ >= 900 ? 2 : 1)
#define GROUPS_OF_4 (PER_THREAD / 4)
#define ROW_M (TILE_M + 4)  // padding keeps transposing stores (wgrad) free of bank conflicts
#define ROW_N (TILE_N + 4)
#define LOADS_M (TILE_M * TILE_K / THREADS)
#define LOADS_N (TILE_N * TILE_K / THREADS)

struct __align__(16) Quad { acc_t v[4]; };
struct Tiles { acc_t a[2][TILE_K * ROW_M], b[2][TILE_K * ROW_N]; };
typedef acc_t Accumulators[PER_THREAD][PER_THREAD];

// Row (or column) of the tile that this thread's i-th value belongs to; `thread` counts along that dimension.
__device__ inline int tile_row(int thread, int i) { return i / 4 * (TILE_M / GROUPS_OF_4) + thread * 4 + i % 4; }
__device__ inline int tile_column(int thread, int i) { return i / 4 * (TILE_N / GROUPS_OF_4) + thread * 4 + i % 4; }

__device__ inline void multiply_tiles(Accumulators& acc, const acc_t* a, const acc_t* b) {
    int thread_m = threadIdx.x / THREADS_N, thread_n = threadIdx.x % THREADS_N;
    #pragma unroll
    for (int k = 0; k < TILE_K; k++) {
        acc_t row[PER_THREAD], column[PER_THREAD];
        #pragma unroll
        for (int i = 0; i < PER_THREAD; i += 4) {
            *(Quad*)(row + i) = *(const Quad*)(a + k * ROW_M + tile_row(thread_m, i));
            *(Quad*)(column + i) = *(const Quad*)(b + k * ROW_N + tile_column(thread_n, i));
        }
        #pragma unroll
        for (int i = 0; i < PER_THREAD; i++)
            #pragma unroll
            for (int j = 0; j < PER_THREAD; j++) acc[i][j] += row[i] * column[j];
    }
}
