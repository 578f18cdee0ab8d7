// Tensor-core building blocks of sm_80 and newer: ldmatrix and mma.sync m16n8k16, fp16 operands, float32 accumulation.
// With SM75 1, those of sm_75: m16n8k8 twice, fp16 alone.
//
// Fragments as PTX defines them, for lane l of a warp (two halves in one unsigned, the lower column first):
//     a[4]: rows l/4, l/4+8, columns 2(l%4)+{0,1} | the same rows, columns + 8
//     b[2]: rows 2(l%4)+{0,1} | rows + 8, column l/4
//     c[4]: row l/4, columns 2(l%4)+{0,1} | row l/4+8, the same columns
#pragma once

#ifndef CUPY_KERNELS_EMULATOR
// ldmatrix_x4 of rows at addresses in shared memory.
__device__ inline void ldmatrix_x4(unsigned (&r)[4], unsigned address) {
#if __CUDA_ARCH__ >= 750
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
        : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
        : "r"(address)
        : "memory");
#endif
}
#endif

// Four 8x8 matrices of halves: lane l passes the address of row l%8 (16 bytes) of matrix l/8, and gets in r[i] the
// values of matrix i at row l/4, columns 2(l%4)+{0,1}.
UNCHECKED __device__ inline void ldmatrix_x4(unsigned (&r)[4], const void* row) {
#ifdef CUPY_KERNELS_EMULATOR
    emulator::read_any(row, 16);
    auto rows = emulator::exchange_in_warp(0xFFFFFFFFu, row);
    int lane = emulator::current % 32;
    for (int i = 0; i < 4; i++) r[i] = ((const unsigned*)rows[8 * i + lane / 4])[lane % 4];
#elif __CUDA_ARCH__ >= 750
    ldmatrix_x4(r, (unsigned)__cvta_generic_to_shared(row));
#endif
}

// As ldmatrix_x4, of the transposed matrices: r[i] holds rows 2(l%4)+{0,1} at column l/4 of what lies in memory.
UNCHECKED __device__ inline void ldmatrix_x4_transposed(unsigned (&r)[4], const void* row) {
#ifdef CUPY_KERNELS_EMULATOR
    emulator::read_any(row, 16);
    auto rows = emulator::exchange_in_warp(0xFFFFFFFFu, row);
    int lane = emulator::current % 32, first = lane % 4 * 2, column = lane / 4;
    for (int i = 0; i < 4; i++) {
        const unsigned short* const two[] = {
            (const unsigned short*)rows[8 * i + first], (const unsigned short*)rows[8 * i + first + 1]};
        r[i] = two[0][column] | (unsigned)two[1][column] << 16;
    }
#elif __CUDA_ARCH__ >= 750
    unsigned address = (unsigned)__cvta_generic_to_shared(row);
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
        : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
        : "r"(address)
        : "memory");
#endif
}

// The transposed 8x8 matrix of 16-bit values: lane l has row l/4, columns 2(l%4)+{0,1}, before and after.
UNCHECKED __device__ inline unsigned movmatrix(unsigned row) {
    unsigned column = 0;
#ifdef CUPY_KERNELS_EMULATOR
    auto rows = emulator::exchange_in_warp(0xFFFFFFFFu, row);
    int lane = emulator::current % 32;
    for (int i = 0; i < 2; i++)
        column |= (rows[(lane % 4 * 2 + i) * 4 + lane / 8] >> lane / 4 % 2 * 16 & 0xFFFF) << i * 16;
#elif __CUDA_ARCH__ >= 750
    asm("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(column) : "r"(row));
#endif
    return column;
}

// c += a b, of two halves a register, or with T bf16_t of two bf16.
template <class T> struct IsBf16 {
    enum { VALUE = 0 };
};
template <> struct IsBf16<bf16_t> {
    enum { VALUE = 1 };
};
#define MMA_M16N8K16(type) \
    asm("mma.sync.aligned.m16n8k16.row.col.f32." type "." type \
        ".f32 " \
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};" \
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3]) \
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1))
#if SM75
// c += a b, of the first or last 8 columns of a and rows of b.
UNCHECKED __device__ __forceinline__ void mma_m16n8k8(
    float (&c)[4], const unsigned a0, const unsigned a1, const unsigned b) {
#ifdef CUPY_KERNELS_EMULATOR
    struct Fragments { unsigned a[2], b; } mine = {{a0, a1}, b};
    auto all = emulator::exchange_in_warp(0xFFFFFFFFu, mine);
    int lane = emulator::current % 32;
    auto half = [](unsigned two, int which) { return to_acc(half_t{(unsigned short)(two >> which * 16)}); };
    for (int i = 0; i < 4; i++)
        for (int k = 0; k < 8; k++)
            c[i] += half(all[lane / 4 * 4 + k / 2].a[i / 2], k % 2) *
                    half(all[(lane % 4 * 2 + i % 2) * 4 + k / 2].b, k % 2);
#elif __CUDA_ARCH__ >= 750
    asm("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a0), "r"(a1), "r"(b));
#endif
}
#endif
template <class T = half_t> UNCHECKED __device__ __forceinline__ void mma_m16n8k16(
    float (&c)[4], const unsigned (&a)[4], const unsigned b0, const unsigned b1) {
#if SM75
    static_assert(!IsBf16<T>::VALUE, "sm_75 multiplies fp16 alone");
    mma_m16n8k8(c, a[0], a[1], b0);
    mma_m16n8k8(c, a[2], a[3], b1);
#elif defined(CUPY_KERNELS_EMULATOR)
    struct Fragments { float a[8], b[4]; } mine;
    for (int i = 0; i < 8; i++) mine.a[i] = to_acc(T{(unsigned short)(a[i / 2] >> i % 2 * 16)});
    for (int i = 0; i < 4; i++) mine.b[i] = to_acc(T{(unsigned short)((i < 2 ? b0 : b1) >> i % 2 * 16)});
    auto all = emulator::exchange_in_warp(0xFFFFFFFFu, mine);
    int lane = emulator::current % 32;
    for (int i = 0; i < 4; i++)
        for (int k = 0; k < 16; k++) {
            const Fragments &left = all[lane / 4 * 4 + k % 8 / 2], &right = all[(lane % 4 * 2 + i % 2) * 4 + k % 8 / 2];
            c[i] += left.a[k / 8 * 4 + i / 2 * 2 + k % 2] * right.b[k / 8 * 2 + k % 2];
        }
#elif __CUDA_ARCH__ >= 800
    if constexpr (IsBf16<T>::VALUE) MMA_M16N8K16("bf16");
    else MMA_M16N8K16("f16");
#endif
}
