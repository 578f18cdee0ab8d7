// What forward and backward over the pooled sums share: which thread has which values, and batch norm of one channel.
//
// A block owns a group of group norm: MEMBERS neighbouring planes of one image. A plane is cut into PARTS parts, and a
// warp takes one part at a time (a job), ITEMS values a lane, 32 apart. Where a block's values fit its registers
// (RESIDENT), all are loaded before the first is used and stay there; else a warp loads a job's values again for each
// phase.
//
// Macros: scalar_t, acc_t (float), param_t (all weights and biases, running statistics), ACTIVATION (activation.cuh),
// OUT_CHANNELS, OUT_H, OUT_W, GROUPS, PARTS, WARPS, THREADS (of the kernels whose blocks are not groups), and those of
// pooled_planes.cuh.
#pragma once
#include "activation.cuh"
#include "batch_norm.cuh"
#include "pooled_planes.cuh"

#define POOLED_W (OUT_W / 2)
#define PLANE (OUT_H / 2 * POOLED_W)
#define MEMBERS (OUT_CHANNELS / GROUPS)
#define ITEMS ((PLANE + PARTS * 32 - 1) / (PARTS * 32))
static_assert(ITEMS <= 10, "a lane has registers for 10 values of each tensor");
#define JOBS (MEMBERS * PARTS)
#define ROUNDS ((JOBS + WARPS - 1) / WARPS)
#define RESIDENT (ROUNDS * ITEMS <= 24)
#define UNROLLED (RESIDENT ? ROUNDS : 1)
#define SIZE (MEMBERS * PLANE)  // of a group

struct Job {
    int number, member, at, first;  // the plane among the block's; the lane's first value in it, and among the block's

    __device__ explicit Job(int round) {
        number = round * WARPS + threadIdx.x / 32;
        member = number / PARTS;
        at = number % PARTS * (ITEMS * 32) + threadIdx.x % 32;
        first = member * PLANE + at;
    }
    __device__ bool exists() const { return JOBS % WARPS == 0 || number < JOBS; }
    __device__ bool inside(int i) const { return (PARTS == 1 && (i + 1) * 32 <= PLANE) || at + i * 32 < PLANE; }

    // The lane's values; 0 for those that do not exist. `source`: of the block, without gaps.
    template <class U> __device__ void load(const U* source, float (&v)[ITEMS]) const {
        source += first;
        #pragma unroll
        for (int i = 0; i < ITEMS; i++) v[i] = inside(i) ? to_acc(source[i * 32]) : 0;
    }
    // The same from the first of the block's planes that conv_bn_pool wrote.
    __device__ void load_pooled(const float* source, float (&v)[ITEMS]) const {
        source += member * PLANE_STRIDE;
        #pragma unroll
        for (int i = 0; i < ITEMS; i++) {
            int p = at + i * 32;
            v[i] = inside(i) ? source[place_of_window<TOGETHER_POOLED>(p / POOLED_W, p % POOLED_W)] : 0;
        }
    }
};

__device__ inline int values_in(int job) { return min(ITEMS * 32, PLANE - job % PARTS * (ITEMS * 32)); }

// The sum of `a` in lanes 0 to 15, of `b` in the others: for the price of one.
__device__ inline float warp_sums(float a, float b) {
    bool upper = threadIdx.x & 16;
    float v = (upper ? b : a) + __shfl_xor_sync(0xFFFFFFFFu, upper ? a : b, 16);
    for (int lanes = 8; lanes > 0; lanes >>= 1) v += __shfl_xor_sync(0xFFFFFFFFu, v, lanes);
    return v;
}

struct Norm {
    Normaliser normalise;
    float weight, bias;
    __device__ Norm(float mean, float invstd, const param_t* weights, const param_t* biases, int c)
        : normalise(mean, invstd), weight(bn_weight(weights, c)), bias(bn_bias(biases, c)) {}
    __device__ float operator()(float v) const { return bn_affine(normalise(v), weight, bias); }
};
