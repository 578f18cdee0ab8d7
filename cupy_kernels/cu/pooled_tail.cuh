// What forward and backward over the pooled sums share: which thread has which values, and batch norm of one channel.
//
// A block owns a group of group norm: MEMBERS neighbouring planes of one image. A plane is cut into PARTS parts, and a
// warp takes one part at a time (a job), ITEMS values a lane, 32 apart. Where a block's values fit its registers
// (RESIDENT), all are loaded before the first is used and stay there; else a warp loads a job's values again for each
// phase.
//
// Macros: scalar_t (of out and dout), acc_t (float), param_t (all weights and biases, running statistics), pooled_t
// (conv_bn_pool.cu), ACTIVATION (activation.cuh), OUT_CHANNELS, OUT_H, OUT_W, GROUPS, PARTS, WARPS, THREADS (of the
// kernels whose blocks are not groups), SAVED_SHIFT, AS_IT_IS (conv_bn_pool.cu), CHANNELS_LAST (1: out and dout are
// [N, PLANE, OUT_CHANNELS], and a block turns its part of them in shared memory where that has room), and those of
// pooled_planes.cuh.
#pragma once
#include "activation.cuh"
#include "batch_norm.cuh"
#include "fp16_scale.cuh"
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
// Of channels_last values in shared memory: so many lie between two of a plane, that 32 are in different banks.
#define TURN_PITCH (sizeof(scalar_t) == 2 ? ((MEMBERS + 1) / 2 | 1) * 2 : MEMBERS | 1)
#define TURNED (CHANNELS_LAST && RESIDENT && PLANE * TURN_PITCH * sizeof(scalar_t) <= 40 * 1024)
#define TURNED_TOGETHER (sizeof(scalar_t) == 2 && MEMBERS % 2 == 0 ? 2 : 1)  // values in shared memory for one access
#define STEP (TURNED ? TURN_PITCH : CHANNELS_LAST ? OUT_CHANNELS : 1)        // from a value of a plane to the next

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

    // The lane's values of the block's part of dout; 0 for those that do not exist.
    __device__ void load(const scalar_t* source, float (&v)[ITEMS]) const {
        source += TURNED ? at * TURN_PITCH + member : CHANNELS_LAST ? at * OUT_CHANNELS + member : first;
        #pragma unroll
        for (int i = 0; i < ITEMS; i++) v[i] = inside(i) ? to_acc(source[i * 32 * STEP]) : 0;
    }
    // The inverse, to out.
    __device__ void store(scalar_t* to, const float (&v)[ITEMS]) const {
        to += TURNED ? at * TURN_PITCH + member : CHANNELS_LAST ? at * OUT_CHANNELS + member : first;
        #pragma unroll
        for (int i = 0; i < ITEMS; i++)
            if (inside(i)) to[i * 32 * STEP] = from_acc<scalar_t>(v[i]);
    }
};

// Where the block's part of out and dout begins.
__device__ inline i64 start_of_block(int channel) {
    return CHANNELS_LAST ? (i64)(blockIdx.x / GROUPS) * PLANE * OUT_CHANNELS + channel : (i64)blockIdx.x * SIZE;
}

// visit(in `turned`, in the block's part of out or dout): where each thread's next AT_ONCE values lie.
template <int AT_ONCE, class F> __device__ inline void for_turned(F visit) {
    for (int i = threadIdx.x; i < SIZE / AT_ONCE; i += 32 * WARPS) {
        int p = i / (MEMBERS / AT_ONCE), member = i % (MEMBERS / AT_ONCE) * AT_ONCE;
        visit(p * TURN_PITCH + member, p * OUT_CHANNELS + member);
    }
}
typedef Packed<scalar_t, TURNED_TOGETHER> Together;

// What undoes the scale of what conv_bn_pool keeps. |y| below 2^-111 is not restored in full: batch norm then sees
// zeros.
__device__ inline float restoring(int exponent) { return power_of_two(max(-126, min(127, -exponent))); }

// The pooled sums of a block's planes, as conv_bn_pool writes them: of channels from `channel` on of one image.
struct Pooled {
    // Of a value of a plane, where it lies in `pooled`: looked up, where a block has room, as all planes have the same.
    typedef unsigned short Places[RESIDENT ? PLANE : 1];
    const pooled_t* source;
    const int *exponents, *unit_exponents;
    const Places& places;

    // All threads of the block come here, and write `places`.
    __device__ Pooled(
        const pooled_t* pooled, const int* exponents, const int* unit_exponents, int channel, Places& places)
        : source(pooled + (i64)blockIdx.x * MEMBERS * PLANE_STRIDE), exponents(exponents + channel),
          unit_exponents(unit_exponents + (i64)(blockIdx.x / GROUPS) * UNITS), places(places) {
        if (!RESIDENT) return;
        for (int p = threadIdx.x; p < PLANE; p += 32 * WARPS) places[p] = place_of(p);
        __syncthreads();
    }
    __device__ static int place_of(int p) { return place_of_window<TOGETHER_POOLED>(p / POOLED_W, p % POOLED_W); }
    __device__ void load(const Job& job, float (&v)[ITEMS]) const {
        enum { SCALED = sizeof(pooled_t) == 2 && !AS_IT_IS };
        const pooled_t* from = source + job.member * PLANE_STRIDE;
        int exponent = SCALED ? exponents[job.member] - SAVED_SHIFT : 0, at = job.at;
        if (SCALED && !RESIDENT) make_opaque(at);  // else what all rounds have in common takes too many registers
        #pragma unroll
        for (int i = 0; i < ITEMS; i++) {
            int p = at + i * 32;
            v[i] = job.inside(i) ? to_acc(from[RESIDENT ? places[p] : place_of(p)]) : 0;
            if (SCALED && job.inside(i))
                v[i] = multiply_unflushed(
                    v[i], restoring(exponent + unit_exponents[unit_of_window(p / POOLED_W, p % POOLED_W)]));
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
