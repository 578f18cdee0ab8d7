// Register-tiled matrix product of one block, on ordinary FMA units: acc[m][n] += sum_k a[k][m] * b[k][n].
//
// Macros: acc_t, TILE_M, TILE_N (the block's tile), PER_THREAD (4 or 8: a thread owns PER_THREAD x PER_THREAD values,
// in groups of 4 neighbours so that shared memory is read 16 bytes at a time), TILE_K, THREADS. TILE_K columns of a and
// b sit in shared memory, twice: while one copy is multiplied, the next is loaded through registers, with one barrier a
// step.
//
// Float sums have two levels: after every STEPS_PER_SUM steps a thread adds its values to running totals of its own in
// shared memory. A chain of n additions loses about sqrt(n) units; 64 terms and then the partial sums lose as much as
// cuDNN's kernels do, a single chain of thousands several times more.
#pragma once

#define THREADS_N (TILE_N / PER_THREAD)
static_assert(THREADS * PER_THREAD * PER_THREAD == TILE_M * TILE_N, "the threads own the tile");
static_assert(TILE_M * TILE_K % THREADS == 0 && TILE_N * TILE_K % THREADS == 0, "all threads load as much");
#define STEPS_PER_SUM 8
#define MIN_BLOCKS (PER_THREAD == 8 ? 3 : 512 / THREADS)  // per SM: leaves the registers that a thread's values need
#define GROUPS_OF_4 (PER_THREAD / 4)
#define ROW_M (TILE_M + 4)  // padding keeps transposing stores (wgrad) free of bank conflicts
#define ROW_N (TILE_N + 4)
#define LOADS_M (TILE_M * TILE_K / THREADS)
#define LOADS_N (TILE_N * TILE_K / THREADS)

struct __align__(16) Quad { acc_t v[4]; };
#define TOTALS (sizeof(acc_t) == 4 ? PER_THREAD * GROUPS_OF_4 : 1)  // double needs no second level
struct Tiles {
    acc_t a[2][TILE_K * ROW_M], b[2][TILE_K * ROW_N];
    Quad totals[TOTALS][THREADS];
};
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

// Moves what a thread has summed into its totals (`first`: sets them). finish_sum brings the totals back.
__device__ inline void store_sum(Accumulators& acc, Tiles& tiles, bool first) {
    if (sizeof(acc_t) != 4) return;
    #pragma unroll
    for (int i = 0; i < TOTALS; i++) {
        Quad total = {}, *place = &tiles.totals[i][threadIdx.x];
        if (!first) total = *place;
        #pragma unroll
        for (int j = 0; j < 4; j++) {
            acc_t& value = acc[i / GROUPS_OF_4][i % GROUPS_OF_4 * 4 + j];
            total.v[j] += value;
            value = 0;
        }
        *place = total;
    }
}

__device__ inline void finish_sum(Accumulators& acc, const Tiles& tiles, bool any) {
    if (sizeof(acc_t) != 4 || !any) return;
    #pragma unroll
    for (int i = 0; i < TOTALS; i++)
        #pragma unroll
        for (int j = 0; j < 4; j++) acc[i / GROUPS_OF_4][i % GROUPS_OF_4 * 4 + j] += tiles.totals[i][threadIdx.x].v[j];
}

// acc = the sum of all steps. next(a, b): loads the thread's values of the next step, and returns whether there is one.
// The value i of a, counted threadIdx.x + i THREADS in the block, is of row value % TILE_M in the step's k value /
// TILE_M; TRANSPOSED: of row value / TILE_K in k value % TILE_K. Those of b likewise.
template <bool TRANSPOSED, class Next>
__device__ __forceinline__ void sum_steps(Accumulators& acc, Tiles& tiles, Next next) {
    acc_t a[LOADS_M], b[LOADS_N];
    for (int step = 0, buffer = 0;; step++) {
        bool more = next(a, b);
        if (step) {
            multiply_tiles(acc, tiles.a[buffer], tiles.b[buffer]);
            if (step % STEPS_PER_SUM == 0) store_sum(acc, tiles, step == STEPS_PER_SUM);
        }
        if (!more) return finish_sum(acc, tiles, step >= STEPS_PER_SUM);
        buffer ^= 1;
        #pragma unroll
        for (int i = 0; i < LOADS_M; i++) {
            int value = threadIdx.x + i * THREADS;
            int k = TRANSPOSED ? value % TILE_K : value / TILE_M, row = TRANSPOSED ? value / TILE_K : value % TILE_M;
            tiles.a[buffer][k * ROW_M + row] = a[i];
        }
        #pragma unroll
        for (int i = 0; i < LOADS_N; i++) {
            int value = threadIdx.x + i * THREADS;
            int k = TRANSPOSED ? value % TILE_K : value / TILE_N, row = TRANSPOSED ? value / TILE_K : value % TILE_N;
            tiles.b[buffer][k * ROW_N + row] = b[i];
        }
        __syncthreads();
    }
}
