// fp16 operands of tensor cores: packed tiles, in global memory [N][chunk][pixel][64 halves], in shared memory as it
// suits.
//
// The 64 halves of a pixel are a line, eight parts of 16 bytes. fp16, like TF32, keeps 10 mantissa bits, and
// fp16_scale.cuh brings values into its normal range. SPLIT 1 rounds 64 channels to fp16 (TF32's precision). SPLIT 2
// keeps what that leaves, the residual, as a second fp16 value (nearly float32's precision): a line has 32 channels,
// then their residuals. In shared memory the parts of lines are swizzled, so that the same part of neighbouring lines
// lies in different banks.
//
// Macros: SPLIT, CHUNK_CHANNELS (of a line), LINE_BYTES, IN_CHANNELS.
#pragma once
#include "fp16_scale.cuh"

#define CHUNKS ((IN_CHANNELS + CHUNK_CHANNELS - 1) / CHUNK_CHANNELS)
#define STAGE_BYTES (TILE_M * LINE_BYTES)
static_assert(
    LINE_BYTES == 8 * 16 && LINE_BYTES == SPLIT * CHUNK_CHANNELS * sizeof(half_t), "a line is eight parts of 16 bytes");

// Where part `part` (16 bytes, 0 to 7) of a line lies. Lines of different keys, 0 to 7, have the same part in different
// banks.
__device__ inline int line_offset(int line, int part, int key) { return line * LINE_BYTES + ((part ^ key) << 4); }
// With keys that differ in eight neighbouring lines.
__device__ inline int line_offset(int line, int part) { return line_offset(line, part, line & 7); }

// The part that lies `parts` parts on from the one at `row`, where `parts` sets only bits that are 0 in that one's
// number.
__device__ inline const u8* other_part(const u8* row, int parts) {
    return (const u8*)((size_t)row ^ (size_t)(parts * 16));
}

__device__ inline unsigned pack_halves(float low, float high) {
#if defined(CUPY_KERNELS_EMULATOR) || __CUDA_ARCH__ < 800
    return from_acc<half_t>(low).bits | (unsigned)from_acc<half_t>(high).bits << 16;
#else
    unsigned both;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(high), "f"(low));
    return both;
#endif
}

// What is taken from all values of channel c before they are packed: about their mean, from the channel's sum over
// `count` values. With `sums` null, or where it is not finite, nothing.
template <class V> __device__ inline float centre(const V* sums, int c, int count) {
    float mean = sums ? to_acc(sums[c]) / count : 0;
    return mean - mean == 0 ? mean : 0;
}
// A difference of two values can be twice the largest.
__device__ inline int centred_exponent(const void* sums, int exponent) { return sums ? exponent - 1 : exponent; }

// Eight values as the halves of a line's part `part`; leaves in `v` what is left for the next part. With SPLIT 2
// infinities and NaNs are all residual, the value is 0: residuals are multiplied by values only, not by residuals,
// whose sign would make NaN of an infinity.
__device__ inline uint4 take_halves(float (&v)[8], int part) {
    float residual[8];
    #pragma unroll
    for (int j = 0; j < 8; j++) {
        residual[j] = v[j];
        if (part + 1 < SPLIT && v[j] - v[j] != 0) v[j] = 0;
        residual[j] -= to_acc(from_acc<half_t>(v[j]));
    }
    uint4 halves =
        make_uint4(pack_halves(v[0], v[1]), pack_halves(v[2], v[3]), pack_halves(v[4], v[5]), pack_halves(v[6], v[7]));
    #pragma unroll
    for (int j = 0; j < 8; j++) v[j] = residual[j];
    return halves;
}

// Writes eight channels, `group` of its chunk, to a line: part `group`, and with SPLIT 2 what rounding left of them, 4
// parts on.
__device__ inline void store_line(u8* lines, int line, int group, float (&v)[8], int key) {
    #pragma unroll
    for (int part = 0; part < SPLIT; part++)
        *(uint4*)(lines + line_offset(line, part * (CHUNK_CHANNELS / 8) + group, key)) = take_halves(v, part);
}
