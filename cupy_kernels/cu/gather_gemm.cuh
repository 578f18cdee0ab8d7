// Main loop of the implicit GEMMs on tensor cores (sm_80 and newer, sm_75), C[m, n] = sum over k of A[m, k] B[n, k].
//
// A step of the sum brings STEP values of k to shared memory, by cp.async through a ring of STAGES stages; who includes
// this says from where. Memory is read in octets of 16 bytes: eight neighbouring channels. Operands are fp16 or bf16.
// SPLIT 1: a value. SPLIT 2: a value and its residual, three products, see fp16_tiles.cuh.
//
// Shared memory is made of lines of 8 octets (line_offset). Where k is contiguous in memory (K_MAJOR 1), a line holds
// the k of a step for one m or n: with SPLIT 2, of the values in octets 0 to 3, of the residuals in 4 to 7. Where m and
// n are (K_MAJOR 0), it holds 64 of them for one k, and fragments are loaded transposed: with SPLIT 2 all lines of
// residuals follow those of values.
//
// WGMMA 1 (sm_90a): a warpgroup multiplies 64 m by all n of the tile. The lines are in the order of wgmma's swizzle of
// 128 bytes.
//
// SM75 1: with the instructions of sm_75 alone (mma.cuh), and copies that do not run behind the arithmetic.
//
// Macros: operand_t (half_t, bf16_t), K_MAJOR, TILE_M, TILE_N, WARPS_M, WARPS_N, STAGES, THREADS, MIN_BLOCKS (of a
// multiprocessor), SHARED_BYTES, WGMMA, SM75, those of fp16_tiles.cuh.
#pragma once
#define SHARED_ALIGNMENT 1024  // wgmma's
#include "common.cuh"
#include "async_copy.cuh"
#include "fp16_tiles.cuh"
#include "mma.cuh"
#include "wgmma.cuh"

#define STEP (64 / SPLIT)
#define SLICES (STEP / 16)
#define LINE_OCTETS (8 / SPLIT)  // of different channels
#define WARP_M (TILE_M / WARPS_M)
#define WARP_N (TILE_N / WARPS_N)
#define TILES_M (WARP_M / 16)  // of a warp, of mma.sync
#define TILES_N (WARP_N / 8)
// Lines of an operand's tile: of a short one that is not k-major, a part of each line is unused.
#define OPERAND_LINES(tile) (K_MAJOR || (tile) > 64 ? (tile) : 64)
enum {
    A_BYTES = OPERAND_LINES(TILE_M) * LINE_BYTES,
    RING_STAGE_BYTES = A_BYTES + OPERAND_LINES(TILE_N) * LINE_BYTES,
    RING_BYTES = STAGES * RING_STAGE_BYTES
};
// Steps whose products are under way at a barrier, where no other block of the multiprocessor keeps the tensor cores
// busy; and those whose copies are.
enum { IN_FLIGHT = WGMMA && SPLIT == 1 && MIN_BLOCKS == 1, AHEAD = STAGES - 1 - IN_FLIGHT };
static_assert(THREADS == 32 * WARPS_M * WARPS_N && WARP_M % 16 == 0 && WARP_N % 16 == 0, "a warp has tiles of 16 x 16");
static_assert(AHEAD >= 1 && RING_BYTES <= SHARED_BYTES, "the ring is in the shared memory");
static_assert(!WGMMA || (TILES_M == 1 && WARPS_N == 1), "a warp of a warpgroup has 16 m, and all n");

// An address in shared memory, in one register.
#ifdef CUPY_KERNELS_EMULATOR
typedef u8* Shared;
static inline Shared shared_address(void* p) { return (u8*)p; }
static inline Shared other_octets(Shared address, int octets) { return (u8*)((size_t)address ^ (size_t)(octets * 16)); }
static inline void load_matrices(unsigned (&r)[4], Shared row) {
    K_MAJOR ? ldmatrix_x4(r, (const void*)row) : ldmatrix_x4_transposed(r, row);
}
template <bool CACHED> static inline void copy_octet(Shared to, const void* from, bool valid) {
    if (SM75) *(uint4*)to = valid ? *(const uint4*)from : make_uint4(0, 0, 0, 0);
    else cp_async_16(to, from, valid);
}
#else
typedef unsigned Shared;
__device__ inline Shared shared_address(void* p) { return (unsigned)__cvta_generic_to_shared(p); }
__device__ inline Shared other_octets(Shared address, int octets) { return address ^ octets * 16; }
__device__ __forceinline__ void load_matrices(unsigned (&r)[4], Shared row) {
#if __CUDA_ARCH__ >= 750 && K_MAJOR
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
        : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
        : "r"(row)
        : "memory");
#elif __CUDA_ARCH__ >= 750
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
        : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
        : "r"(row)
        : "memory");
#endif
}
// Copies an octet, or writes zeros, behind the arithmetic: async_copy.cuh. CACHED: by way of the L1 cache, for what is
// soon read again.
template <bool CACHED> __device__ __forceinline__ void copy_octet(Shared to, const void* from, bool valid) {
#if SM75
    uint4 octet = valid ? *(const uint4*)from : make_uint4(0, 0, 0, 0);
    asm volatile(
        "st.shared.v4.u32 [%0], {%1, %2, %3, %4};" ::"r"(to), "r"(octet.x), "r"(octet.y), "r"(octet.z), "r"(octet.w)
        : "memory");
#elif __CUDA_ARCH__ >= 800
    if (CACHED)
        asm volatile("cp.async.ca.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(valid ? 16 : 0)
            : "memory");
    else
        asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(valid ? 16 : 0)
            : "memory");
#endif
}
#endif

typedef float Sums[TILES_M][TILES_N][4];  // fragment c of mma.cuh

// Where octet `octet` of m or n lies, for the k of `row`, in an operand of `tile` of them that is not k-major.
__device__ inline int octet_offset(int tile, int row, int octet, int part) {
    return line_offset((part * ((tile + 63) / 64) + octet / 8) * STEP + row, octet % 8, row & 7);
}

#if WGMMA
// An operand of wgmma: 64 m from `first` on, or all n, and the 16 k of a slice.
struct GemmOperand {
#ifdef CUPY_KERNELS_EMULATOR
    const u8* operand;
    int tile, first, slice, part;
    static constexpr bool ALONG_K = K_MAJOR;
    const u8* octet(int row, int k) const {
        return operand + (K_MAJOR ? line_offset(first + row, part * LINE_OCTETS + slice * 2 + k / 8)
                                  : octet_offset(tile, slice * 16 + k, (first + row) / 8, part));
    }
#else
    unsigned long long
        bits;  // PTX's matrix descriptor: swizzled by 128 bytes, 8 lines and 64 m or n (K_MAJOR 0) further
    __device__ GemmOperand(const u8* operand, int tile, int first, int slice, int part) {
        unsigned start = K_MAJOR ? first * LINE_BYTES + (part * LINE_OCTETS + slice * 2) * 16
                                 : octet_offset(tile, slice * 16, first / 8, part);
        unsigned low = ((unsigned)__cvta_generic_to_shared(operand) + start) / 16 | (STEP * LINE_BYTES / 16) << 16;
        bits = (unsigned long long)(1u << 30 | 1024 / 16) << 32 | low;
    }
#endif
};

#define WGMMA_REGISTERS_19 WGMMA_REGISTERS_18 ", %74, %75, %76, %77"
#define WGMMA_REGISTERS_20 WGMMA_REGISTERS_19 ", %78, %79, %80, %81"
#define WGMMA_REGISTERS_21 WGMMA_REGISTERS_20 ", %82, %83, %84, %85"
#define WGMMA_REGISTERS_22 WGMMA_REGISTERS_21 ", %86, %87, %88, %89"
#define WGMMA_REGISTERS_23 WGMMA_REGISTERS_22 ", %90, %91, %92, %93"
#define WGMMA_REGISTERS_24 WGMMA_REGISTERS_23 ", %94, %95, %96, %97"
#define WGMMA_REGISTERS_25 WGMMA_REGISTERS_24 ", %98, %99, %100, %101"
#define WGMMA_REGISTERS_26 WGMMA_REGISTERS_25 ", %102, %103, %104, %105"
#define WGMMA_REGISTERS_27 WGMMA_REGISTERS_26 ", %106, %107, %108, %109"
#define WGMMA_REGISTERS_28 WGMMA_REGISTERS_27 ", %110, %111, %112, %113"
#define WGMMA_REGISTERS_29 WGMMA_REGISTERS_28 ", %114, %115, %116, %117"
#define WGMMA_REGISTERS_30 WGMMA_REGISTERS_29 ", %118, %119, %120, %121"
#define WGMMA_REGISTERS_31 WGMMA_REGISTERS_30 ", %122, %123, %124, %125"
#define WGMMA_REGISTERS_32 WGMMA_REGISTERS_31 ", %126, %127, %128, %129"
#define WGMMA_TILES_20(use) \
    WGMMA_TILES_16(use), WGMMA_TILE(use, 16), WGMMA_TILE(use, 17), WGMMA_TILE(use, 18), WGMMA_TILE(use, 19)
#define WGMMA_TILES_24(use) \
    WGMMA_TILES_20(use), WGMMA_TILE(use, 20), WGMMA_TILE(use, 21), WGMMA_TILE(use, 22), WGMMA_TILE(use, 23)
#define WGMMA_TILES_28(use) \
    WGMMA_TILES_24(use), WGMMA_TILE(use, 24), WGMMA_TILE(use, 25), WGMMA_TILE(use, 26), WGMMA_TILE(use, 27)
#define WGMMA_TILES_32(use) \
    WGMMA_TILES_28(use), WGMMA_TILE(use, 28), WGMMA_TILE(use, 29), WGMMA_TILE(use, 30), WGMMA_TILE(use, 31)
#define WGMMA_GEMM_ISSUE(tiles, n, flag, type, turned) \
    asm volatile("{.reg .pred accumulate; setp.ne.u32 accumulate, %" #flag ", 0; wgmma.mma_async.sync.aligned.m64n" #n \
                 "k16.f32." type "." type " {" WGMMA_REGISTERS_##tiles "}, %0, %1, accumulate, 1, 1, " turned \
                                                                       ", " turned ";}" \
        : "+l"(a.bits), "+l"(b.bits), WGMMA_TILES_##tiles("+f") \
        : "r"(accumulate));
#define WGMMA_GEMM_CASE(tiles, n, flag) \
    if constexpr (TILES_N == tiles && K_MAJOR && !IsBf16<T>::VALUE) WGMMA_GEMM_ISSUE(tiles, n, flag, "f16", "0") \
    if constexpr (TILES_N == tiles && K_MAJOR && IsBf16<T>::VALUE) WGMMA_GEMM_ISSUE(tiles, n, flag, "bf16", "0") \
    if constexpr (TILES_N == tiles && !K_MAJOR && !IsBf16<T>::VALUE) WGMMA_GEMM_ISSUE(tiles, n, flag, "f16", "1") \
    if constexpr (TILES_N == tiles && !K_MAJOR && IsBf16<T>::VALUE) WGMMA_GEMM_ISSUE(tiles, n, flag, "bf16", "1")

// d += a b, or without `accumulate` d = a b.
template <class T> UNCHECKED __device__ __forceinline__ void wgmma_gemm(
    float (&d)[TILES_N][4], GemmOperand a, GemmOperand b, int accumulate) {
#ifdef CUPY_KERNELS_EMULATOR
    emulator::multiply_async<T>(&d[0][0], TILES_N * 8, accumulate, &a, nullptr, b, EMULATOR_CALLER);
#elif defined(__CUDA_ARCH_FEAT_SM90_ALL)
    WGMMA_GEMM_CASE(16, 128, 66)
    WGMMA_GEMM_CASE(32, 256, 130)
#endif
}
#endif

// Where a lane's row of ldmatrix begins in an operand, for the first slice and the warp's m or n from `first` on. A's
// matrices lie (m, k), (m + 8, k), (m, k + 8), (m + 8, k + 8); B's (n, k), (n, k + 8), (n + 8, k), (n + 8, k + 8).
template <bool IS_A> __device__ inline int lane_offset(int tile, int first) {
    int lane = threadIdx.x % 32, low = IS_A ? lane / 8 % 2 : lane / 16,
        high = IS_A ? lane / 16 : lane / 8 % 2;  // + 8 in m or n; in k
    return K_MAJOR ? line_offset(first + low * 8 + lane % 8, high)
                   : octet_offset(tile, high * 8 + lane % 8, first / 8 + low, 0);
}

// Fragments of the warp's i-th 16 m, or n, and 16 k.
template <int TILE> __device__ __forceinline__ void load_fragments(
    unsigned (&r)[4], Shared row, int i, int slice, int part) {
    if (K_MAJOR) load_matrices(r, other_octets(row, part * LINE_OCTETS + slice * 2) + i * 16 * LINE_BYTES);
    else load_matrices(r, other_octets(row, i * 2) + (part * ((TILE + 63) / 64) * STEP + slice * 16) * LINE_BYTES);
}

// sums += the products of the step in `stage`. copy(piece) issues a piece, one of SLICES, of the next copies.
#if WGMMA
template <class Copy> __device__ __forceinline__ void multiply(Sums& sums, u8* stage, Copy copy) {
    int first_m = __shfl_sync(0xFFFFFFFFu, threadIdx.x / 128, 0) * 64;
    auto a = [&](int slice, int part) { return GemmOperand{stage, TILE_M, first_m, slice, part}; };
    auto b = [&](int slice, int part) { return GemmOperand{stage + A_BYTES, TILE_N, 0, slice, part}; };
    wgmma_fence();
#if SPLIT == 1
    Sums& products = sums;
    #pragma unroll
    for (int slice = 0; slice < SLICES; slice++) wgmma_gemm<operand_t>(products[0], a(slice, 0), b(slice, 0), 1);
#else
    Sums products;  // see below
    #pragma unroll
    for (int product = 0; product < 3; product++)
        #pragma unroll
        for (int slice = 0; slice < SLICES; slice++)
            wgmma_gemm<operand_t>(products[0], a(slice, product == 0), b(slice, product == 1), product + slice > 0);
#endif
    wgmma_commit();
    #pragma unroll
    for (int piece = 0; piece < SLICES; piece++) copy(piece);
    wgmma_wait<IN_FLIGHT>();
    if (!IN_FLIGHT) wgmma_arrived<TILES_N>(products[0]);
#if SPLIT == 2
    #pragma unroll
    for (int i = 0; i < TILES_N * 4; i++) sums[0][i / 4][i % 4] += products[0][i / 4][i % 4];
#endif
}
#else
template <class Copy> __device__ __forceinline__ void multiply(Sums& sums, u8* stage, Copy copy) {
    int warp = threadIdx.x / 32;
    Shared a_row = shared_address(stage) + lane_offset<true>(TILE_M, warp % WARPS_M * WARP_M);
    Shared b_row = shared_address(stage) + A_BYTES + lane_offset<false>(TILE_N, warp / WARPS_M * WARP_N);
#if SPLIT == 1
    #pragma unroll
    for (int slice = 0; slice < SLICES; slice++) {
        unsigned a[TILES_M][4], b[4];
        #pragma unroll
        for (int i = 0; i < TILES_M; i++) load_fragments<TILE_M>(a[i], a_row, i, slice, 0);
        #pragma unroll
        for (int j = 0; j < TILES_N / 2; j++) {
            load_fragments<TILE_N>(b, b_row, j, slice, 0);
            if (j == 0) copy(slice);
            #pragma unroll
            for (int i = 0; i < TILES_M; i++)
                #pragma unroll
                for (int n = 0; n < 2; n++) mma_m16n8k16<operand_t>(sums[i][2 * j + n], a[i], b[2 * n], b[2 * n + 1]);
        }
    }
#else
    // Tensor cores truncate when they add to an accumulator, which costs float32's last bits in a long sum: they add
    // the products of this step only, the small ones first, and an ordinary addition adds those.
    unsigned a[TILES_M][SLICES][SPLIT][4], b[SLICES][SPLIT][4];
    #pragma unroll
    for (int i = 0; i < TILES_M; i++)
        #pragma unroll
        for (int k = 0; k < SLICES * SPLIT; k++)
            load_fragments<TILE_M>(a[i][k / SPLIT][k % SPLIT], a_row, i, k / SPLIT, k % SPLIT);
    #pragma unroll
    for (int j = 0; j < TILES_N / 2; j++) {
        #pragma unroll
        for (int k = 0; k < SLICES * SPLIT; k++)
            load_fragments<TILE_N>(b[k / SPLIT][k % SPLIT], b_row, j, k / SPLIT, k % SPLIT);
        if (TILES_N == 2) copy(0), copy(1);
        else if (j < SLICES) copy(j);
        #pragma unroll
        for (int i = 0; i < TILES_M; i++) {
            float partial[2][4] = {};
            #pragma unroll
            for (int product = 0; product < 3; product++)  // rest * value, value * rest, value * value
                #pragma unroll
                for (int slice = 0; slice < SLICES; slice++)
                    #pragma unroll
                    for (int n = 0; n < 2; n++) {
                        const unsigned (&right)[4] = b[slice][product == 1];
                        mma_m16n8k16<operand_t>(partial[n], a[i][slice][product == 0], right[2 * n], right[2 * n + 1]);
                    }
            #pragma unroll
            for (int t = 0; t < 8; t++) sums[i][2 * j + t / 4][t % 4] += partial[t / 4][t % 4];
        }
    }
#endif
}
#endif

// The sums of `steps` steps. begin(step) looks up what copy(stage, piece), for all pieces 0 to SLICES - 1, brings; the
// block has passed a barrier between two steps. A step past the last one is begun, too: it may bring anything.
template <class Begin, class Copy> __device__ __forceinline__ void sum_steps(
    Sums& sums, u8* ring, int steps, Begin begin, Copy copy) {
    for (int step = 0; step < AHEAD; step++) {
        if (!K_MAJOR) __syncthreads();
        begin(step);
        Shared stage = shared_address(ring + step * RING_STAGE_BYTES);
        #pragma unroll
        for (int piece = 0; piece < SLICES; piece++) copy(stage, piece);
        cp_async_commit();
    }
    int read = 0, write = AHEAD * RING_STAGE_BYTES;
    #pragma unroll 1
    for (int step = 0; step < steps; step++) {
        cp_async_wait<AHEAD - 1>();
        if (WGMMA) fence_async_proxy();
        __syncthreads();
        begin(step + AHEAD);
        Shared stage = shared_address(ring) + write;
        multiply(sums, ring + read, [&](int piece) __attribute__((always_inline)) { copy(stage, piece); });
        cp_async_commit();
        read = read + RING_STAGE_BYTES == RING_BYTES ? 0 : read + RING_STAGE_BYTES;
        write = write + RING_STAGE_BYTES == RING_BYTES ? 0 : write + RING_STAGE_BYTES;
    }
#if WGMMA
    wgmma_wait<0>();
    wgmma_arrived<TILES_N>(sums[0]);
#endif
    cp_async_wait<0>();
    __syncthreads();
}
