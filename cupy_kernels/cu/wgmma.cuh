// Tensor cores of sm_90a, asynchronous: wgmma m64nNk16, fp16 operands in shared memory (A in registers, too), float32
// accumulation.
//
// A warpgroup (four warps, 128 threads) issues multiplications together, closes a group of them by wgmma_commit(), and
// may touch the sums after a wgmma_wait<N>(), which leaves at most the N youngest groups in flight. wgmma_fence() comes
// before the first one that follows other use of the sums' registers, fence_async_proxy() between a thread's writes to
// shared memory and the barrier after which wgmma reads them.
//
// Sums, for warp w of the group and lane l: d[t][c] is row 16 w + l/4 + c/2 * 8, column 8 t + 2 (l%4) + c%2.
#pragma once

// An operand in shared memory: rows of 16 halves (rows of A, columns of B). 8 halves of a row, 16 bytes, lie together,
// and 8 rows of them one after the other; `along` bytes further lie the rows' next 8 halves, `across` bytes further the
// next 8 rows.
struct WgmmaOperand {
#ifdef CUPY_KERNELS_EMULATOR
    const u8* start;
    int along, across;
    __device__ WgmmaOperand(const u8* start, int along, int across) : start(start), along(along), across(across) {}
    static constexpr bool ALONG_K = true;
    const u8* octet(int row, int k) const { return start + row / 8 * across + k / 8 * along + row % 8 * 16; }
#else
    // The two words of PTX's matrix descriptor, lengths in units of 16 bytes, without a swizzle.
    unsigned start, stride;
    __device__ WgmmaOperand(const u8* from, int along, int across)
        : start((unsigned)__cvta_generic_to_shared(from) / 16 | along / 16 << 16), stride(across / 16) {}
    __device__ unsigned long long bits() const { return (unsigned long long)stride << 32 | start; }
#endif
    __device__ WgmmaOperand moved(int bytes) const {
        WgmmaOperand other = *this;
#ifdef CUPY_KERNELS_EMULATOR
        other.start += bytes;
#else
        other.start += bytes >> 4;
#endif
        return other;
    }
};

// The operand B, transposed, as swizzled lines (fp16_tiles.cuh) in shared memory: 16 of 128 bytes, at a multiple of
// 1024 bytes and with their parts in line_offset's order. A line has a half of each of 64 rows, of which `first_part`
// eights are left out.
struct WgmmaLines {
#ifdef CUPY_KERNELS_EMULATOR
    const u8* start;
    int first_part;
    __device__ WgmmaLines(const u8* start, int first_part) : start(start), first_part(first_part) {}
    static constexpr bool ALONG_K = false;
    const u8* octet(int row, int k) const { return start + k * 128 + ((first_part + row / 8) ^ (k & 7)) * 16; }
#else
    unsigned start;
    __device__ WgmmaLines(const u8* from, int first_part)
        : start((unsigned)__cvta_generic_to_shared(from) / 16 + first_part) {}
    // Swizzled by 128 bytes, 8 lines further: 1024.
    __device__ unsigned long long bits() const { return (1ull << 30 | 1024 / 16) << 32 | start; }
#endif
    __device__ WgmmaLines moved(int bytes) const {
        WgmmaLines other = *this;
#ifdef CUPY_KERNELS_EMULATOR
        other.start += bytes;
#else
        other.start += bytes >> 4;
#endif
        return other;
    }
};

#define WGMMA_REGISTERS_1 "%2, %3, %4, %5"
#define WGMMA_REGISTERS_2 WGMMA_REGISTERS_1 ", %6, %7, %8, %9"
#define WGMMA_REGISTERS_3 WGMMA_REGISTERS_2 ", %10, %11, %12, %13"
#define WGMMA_REGISTERS_4 WGMMA_REGISTERS_3 ", %14, %15, %16, %17"
#define WGMMA_REGISTERS_5 WGMMA_REGISTERS_4 ", %18, %19, %20, %21"
#define WGMMA_REGISTERS_6 WGMMA_REGISTERS_5 ", %22, %23, %24, %25"
#define WGMMA_REGISTERS_7 WGMMA_REGISTERS_6 ", %26, %27, %28, %29"
#define WGMMA_REGISTERS_8 WGMMA_REGISTERS_7 ", %30, %31, %32, %33"
#define WGMMA_REGISTERS_9 WGMMA_REGISTERS_8 ", %34, %35, %36, %37"
#define WGMMA_REGISTERS_10 WGMMA_REGISTERS_9 ", %38, %39, %40, %41"
#define WGMMA_REGISTERS_11 WGMMA_REGISTERS_10 ", %42, %43, %44, %45"
#define WGMMA_REGISTERS_12 WGMMA_REGISTERS_11 ", %46, %47, %48, %49"
#define WGMMA_REGISTERS_13 WGMMA_REGISTERS_12 ", %50, %51, %52, %53"
#define WGMMA_REGISTERS_14 WGMMA_REGISTERS_13 ", %54, %55, %56, %57"
#define WGMMA_REGISTERS_15 WGMMA_REGISTERS_14 ", %58, %59, %60, %61"
#define WGMMA_REGISTERS_16 WGMMA_REGISTERS_15 ", %62, %63, %64, %65"
#define WGMMA_REGISTERS_17 WGMMA_REGISTERS_16 ", %66, %67, %68, %69"
#define WGMMA_REGISTERS_18 WGMMA_REGISTERS_17 ", %70, %71, %72, %73"
#define WGMMA_TILE(use, i) use(d[i][0]), use(d[i][1]), use(d[i][2]), use(d[i][3])
#define WGMMA_TILES_1(use) WGMMA_TILE(use, 0)
#define WGMMA_TILES_2(use) WGMMA_TILES_1(use), WGMMA_TILE(use, 1)
#define WGMMA_TILES_3(use) WGMMA_TILES_2(use), WGMMA_TILE(use, 2)
#define WGMMA_TILES_4(use) WGMMA_TILES_3(use), WGMMA_TILE(use, 3)
#define WGMMA_TILES_5(use) WGMMA_TILES_4(use), WGMMA_TILE(use, 4)
#define WGMMA_TILES_6(use) WGMMA_TILES_5(use), WGMMA_TILE(use, 5)
#define WGMMA_TILES_7(use) WGMMA_TILES_6(use), WGMMA_TILE(use, 6)
#define WGMMA_TILES_8(use) WGMMA_TILES_7(use), WGMMA_TILE(use, 7)
#define WGMMA_TILES_9(use) WGMMA_TILES_8(use), WGMMA_TILE(use, 8)
#define WGMMA_TILES_10(use) WGMMA_TILES_9(use), WGMMA_TILE(use, 9)
#define WGMMA_TILES_11(use) WGMMA_TILES_10(use), WGMMA_TILE(use, 10)
#define WGMMA_TILES_12(use) WGMMA_TILES_11(use), WGMMA_TILE(use, 11)
#define WGMMA_TILES_13(use) WGMMA_TILES_12(use), WGMMA_TILE(use, 12)
#define WGMMA_TILES_14(use) WGMMA_TILES_13(use), WGMMA_TILE(use, 13)
#define WGMMA_TILES_15(use) WGMMA_TILES_14(use), WGMMA_TILE(use, 14)
#define WGMMA_TILES_16(use) WGMMA_TILES_15(use), WGMMA_TILE(use, 15)
#define WGMMA_TILES_17(use) WGMMA_TILES_16(use), WGMMA_TILE(use, 16)
#define WGMMA_TILES_18(use) WGMMA_TILES_17(use), WGMMA_TILE(use, 17)
#define WGMMA_ISSUE(tiles, n, equal, use) \
    asm volatile("{.reg .pred accumulate; setp." equal ".u32 accumulate, 0, 0; wgmma.mma_async.sync.aligned.m64n" #n \
                 "k16.f32.f16.f16 {" WGMMA_REGISTERS_##tiles "}, %0, %1, accumulate, 1, 1, 0, 0;}" \
        : "+l"(a_bits), "+l"(b_bits), WGMMA_TILES_##tiles(use));
#define WGMMA_CASE(tiles, n) \
    if constexpr (COUNT == tiles && ACCUMULATE) WGMMA_ISSUE(tiles, n, "eq", "+f") \
    if constexpr (COUNT == tiles && !ACCUMULATE) WGMMA_ISSUE(tiles, n, "ne", "=f")

// The first COUNT tiles of 8 columns of d += a b, or without ACCUMULATE d = a b.
template <int COUNT, bool ACCUMULATE = true, int MOST> UNCHECKED __device__ __forceinline__ void wgmma(
    float (&d)[MOST][4], const WgmmaOperand& a, const WgmmaOperand& b) {
#ifdef CUPY_KERNELS_EMULATOR
    emulator::multiply_async<half_t>(&d[0][0], COUNT * 8, ACCUMULATE, &a, nullptr, b, EMULATOR_CALLER);
#elif defined(__CUDA_ARCH_FEAT_SM90_ALL)
    unsigned long long a_bits = a.bits(), b_bits = b.bits();
    WGMMA_CASE(1, 8)
    WGMMA_CASE(2, 16)
    WGMMA_CASE(3, 24)
    WGMMA_CASE(4, 32)
    WGMMA_CASE(5, 40)
    WGMMA_CASE(6, 48)
    WGMMA_CASE(7, 56)
    WGMMA_CASE(8, 64)
    WGMMA_CASE(9, 72)
    WGMMA_CASE(10, 80)
    WGMMA_CASE(11, 88)
    WGMMA_CASE(12, 96)
    WGMMA_CASE(13, 104)
    WGMMA_CASE(14, 112)
    WGMMA_CASE(15, 120)
    WGMMA_CASE(16, 128)
    WGMMA_CASE(17, 136)
    WGMMA_CASE(18, 144)
#endif
}

#define WGMMA_ISSUE_FRAGMENT(tiles, n, a0, a1, a2, a3, use) \
    asm volatile("{.reg .pred accumulate; setp.ne.u32 accumulate, %1, 0; wgmma.mma_async.sync.aligned.m64n" #n \
                 "k16.f32.f16.f16 {" WGMMA_REGISTERS_##tiles "}, {%" #a0 ", %" #a1 ", %" #a2 ", %" #a3 \
                                                             "}, %0, accumulate, 1, 1, 1;}" \
        : "+l"(b_bits), "+r"(accumulate), WGMMA_TILES_##tiles(use) \
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]));
#define WGMMA_CASE_FRAGMENT(tiles, n, a0, a1, a2, a3) \
    if constexpr (COUNT == tiles) WGMMA_ISSUE_FRAGMENT(tiles, n, a0, a1, a2, a3, "+f")

// The same for at most 8 tiles with A in registers, a warp's 16 rows as the fragment `a` of mma.cuh. Until a wait for
// it, the registers of `a` must not change.
template <int COUNT, int MOST>
UNCHECKED __device__ __forceinline__ void wgmma(
    float (&d)[MOST][4], const unsigned (&a)[4], const WgmmaLines& b, int accumulate = 1) {
#ifdef CUPY_KERNELS_EMULATOR
    emulator::multiply_async<half_t>(
        &d[0][0], COUNT * 8, accumulate, (const WgmmaOperand*)nullptr, a, b, EMULATOR_CALLER);
#elif defined(__CUDA_ARCH_FEAT_SM90_ALL)
    unsigned long long b_bits = b.bits();
    WGMMA_CASE_FRAGMENT(1, 8, 6, 7, 8, 9)
    WGMMA_CASE_FRAGMENT(2, 16, 10, 11, 12, 13)
    WGMMA_CASE_FRAGMENT(3, 24, 14, 15, 16, 17)
    WGMMA_CASE_FRAGMENT(4, 32, 18, 19, 20, 21)
    WGMMA_CASE_FRAGMENT(5, 40, 22, 23, 24, 25)
    WGMMA_CASE_FRAGMENT(6, 48, 26, 27, 28, 29)
    WGMMA_CASE_FRAGMENT(7, 56, 30, 31, 32, 33)
    WGMMA_CASE_FRAGMENT(8, 64, 34, 35, 36, 37)
#endif
}

__device__ inline void wgmma_fence() {
#ifdef CUPY_KERNELS_EMULATOR
    emulator::fence_registers();
#elif defined(__CUDA_ARCH_FEAT_SM90_ALL)
    asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#endif
}

__device__ inline void wgmma_commit() {
#ifdef CUPY_KERNELS_EMULATOR
    emulator::commit_multiplications();
#elif defined(__CUDA_ARCH_FEAT_SM90_ALL)
    asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
#endif
}

template <int PENDING_GROUPS> __device__ inline void wgmma_wait() {
#ifdef CUPY_KERNELS_EMULATOR
    emulator::wait_for_multiplications(PENDING_GROUPS);
#elif defined(__CUDA_ARCH_FEAT_SM90_ALL)
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(PENDING_GROUPS) : "memory");
#endif
}

// Between a wait and what reads the sums: compilers know nothing of the wait.
template <int COUNT, int MOST> __device__ __forceinline__ void wgmma_arrived(float (&d)[MOST][4]) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
    #pragma unroll
    for (int t = 0; t < COUNT; t++) asm volatile("" : WGMMA_TILE("+f", t)::"memory");
#endif
}

// All threads of COUNT warpgroups of the block meet, from the one with number `first` on, a multiple of COUNT, as a
// block's do at __syncthreads().
template <int COUNT = 1> __device__ inline void sync_warpgroups(int first) {
#ifdef CUPY_KERNELS_EMULATOR
    emulator::warpgroup_barrier(COUNT);
#elif defined(__CUDA_ARCH_FEAT_SM90_ALL)
    // A block has 16 barriers and at most 8 warpgroups. COUNT is 1 or 2.
    asm volatile("barrier.sync %0, %1;" ::"r"(COUNT == 1 ? 1 + first : 9 + first / 2), "n"(128 * COUNT) : "memory");
#endif
}

__device__ inline void fence_async_proxy() {
#ifdef CUPY_KERNELS_EMULATOR
    emulator::fence_proxy();
#elif defined(__CUDA_ARCH_FEAT_SM90_ALL)
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
#endif
}
