// Transposed convolution and its input gradient on tensor cores (implicit_gemm.cuh), with nothing after it:
//
//     y[n, m, oh, ow] = sums + bias[m]
//
// Grid: x = units of all images, y = tiles of TILE_M channels. y is written in whole, bias may be null. Epilogue: four
// lanes have neighbouring windows of a channel, the next four of it, and so on. Two of them swap windows, so that each
// has pairs of neighbours, four pixels of a row for one store; four lanes then store eight windows. With CHANNELS_LAST,
// of 16-bit types, a warp turns 8 channels of 8 pixels, and four lanes store 16 channels of a pixel. Macros and limits:
// implicit_gemm.cuh.
#define ADJACENT 0
#include "implicit_gemm.cuh"
static_assert(EPILOGUE_OFFSET == SHARED_BYTES, "the epilogue needs none of the shared memory");

// Two neighbouring windows' left pixels in a row.
struct Spot {
    scalar_t* to[2];
    // last_column: the window has but one pixel; together: four pixels in a row, aligned.
    bool exists[2], last_column[2], together;

    // The upper or lower row of windows `first` and first + 1 of the warp, in the plane.
    __device__ __forceinline__ Spot(const Place& place, int first, int lower, scalar_t* plane) {
        int row = (place.first_window + first) / WINDOW_PITCH, column = (place.first_window + first) % WINDOW_PITCH,
            at[2];
        #pragma unroll
        for (int j = 0; j < 2; j++) {
            int oh = row * 2 + lower;
            exists[j] =
                first + j >= 0 && first + j < place.count() && column < WINDOWS_W && (OUT_H % 2 == 0 || oh < OUT_H);
            last_column[j] = OUT_W % 2 && column == WINDOWS_W - 1;
            at[j] = oh * OUT_W + column * 2;
            to[j] = plane + at[j];
            if (++column == WINDOW_PITCH) row++, column = 0;
        }
        together =
            OUT_W % 2 == 0 && OUT_H * OUT_W % 4 == 0 && exists[0] && exists[1] && at[0] % 4 == 0 && at[1] == at[0] + 2;
    }

    __device__ __forceinline__ void store(int planes_on, const Packed<scalar_t, 4>& line) const {
        if (together) return store_at_once(to[0] + planes_on * (OUT_H * OUT_W), line);
        #pragma unroll
        for (int j = 0; j < 2; j++) {
            scalar_t* at = to[j] + planes_on * (OUT_H * OUT_W);
            if (!exists[j]) continue;
            if (OUT_W % 2 == 0) store_at_once(at, Packed<scalar_t, 2>{{line.v[j * 2], line.v[j * 2 + 1]}});
            else {
                at[0] = line.v[j * 2];
                if (!last_column[j]) at[1] = line.v[j * 2 + 1];
            }
        }
    }
};

// From sums to values of one channel.
struct Finish {
    ScaleBack scale = ScaleBack(0);
    float shift = 0;
    __device__ scalar_t operator()(float sum) const { return from_acc<scalar_t>(scale(sum, shift)); }
};

struct StoreEpilogue {
    const scalar_t* bias;
    scalar_t* y;
    const int* exponents;

#if CHANNELS_LAST
    __device__ __forceinline__ void pass(const Sums& sums, const Place& place, int exponent) const {
        int first_m = blockIdx.y * TILE_M + place.channel, lane = threadIdx.x % 32, odd = lane % 2;
        Finish finish[LANE_ROWS];
        #pragma unroll
        for (int row = 0; row < LANE_ROWS; row++) {
            int m = first_m + row * 8;
            if (m < OUT_CHANNELS) finish[row] = {ScaleBack(exponent + exponents[m]), bias ? to_acc(bias[m]) : 0};
        }
        // Of what the lane has when channels and pixels are turned.
        int first_turned = first_m - lane / 4 + odd * 8 + lane / 2 % 2 * 4;
        #pragma unroll
        for (int t = 0; t < MOST_TILES; t++) {
            int window = place.first_window + t * 4 + lane / 8;
            bool exists = t * 4 + lane / 8 < place.count() && window % WINDOW_PITCH < WINDOWS_W;
            #pragma unroll
            for (int lower = 0; lower < 2; lower++) {
                Pixel pixel(window, lower * 2 + lane / 4 % 2);
                scalar_t* to = y + ((place.image * OUT_H + pixel.oh) * OUT_W + pixel.ow) * OUT_CHANNELS + first_turned;
                #pragma unroll
                for (int row = 0; row < LANE_ROWS; row += 2) {
                    unsigned turned[2];
                    #pragma unroll
                    for (int i = 0; i < 2; i++) {
                        scalar_t left = finish[row + i](sum_of(sums, row + i, t, lower * 2)),
                                 right = finish[row + i](sum_of(sums, row + i, t, lower * 2 + 1));
                        turned[i] = movmatrix(left.bits | (unsigned)right.bits << 16);
                    }
                    // The lane keeps two channels of its eight, and swaps the others for two of these.
                    unsigned other = __shfl_xor_sync(0xFFFFFFFFu, odd ? turned[0] : turned[1], 1);
                    uint2 four = make_uint2(odd ? other : turned[0], odd ? turned[1] : other);
                    if (exists && pixel.valid() && first_turned + row * 8 < OUT_CHANNELS)
                        store_at_once(to + row * 8, *(const Packed<scalar_t, 4>*)&four);
                }
            }
        }
    }
#else
    __device__ __forceinline__ void pass(const Sums& sums, const Place& place, int exponent) const {
        int first_m = blockIdx.y * TILE_M + place.channel;
        scalar_t* plane = y + (place.image * OUT_CHANNELS + first_m) * (OUT_H * OUT_W);
        Finish finish[LANE_ROWS];
        #pragma unroll
        for (int row = 0; row < LANE_ROWS; row++) {
            int m = first_m + row * 8;
            if (m < OUT_CHANNELS) finish[row] = {ScaleBack(exponent + exponents[m]), bias ? to_acc(bias[m]) : 0};
        }
        #pragma unroll
        for (int lower = 0; lower < 2; lower++) {
            // Where four pixels are aligned, a pair begins: at an even window, but in lower rows of 4 n + 2 pixels at
            // an odd one.
            const int odd = lower && OUT_W % 4 == 2;
            int quad = threadIdx.x % 4, turned = (quad - odd) & 3, later = turned % 2,
                first = later * 4 + turned / 2 * 2 + odd;
            #pragma unroll
            for (int t = 0; t < LANE_WINDOWS; t += 4) {
                Spot spots[2] = {
                    Spot(place, t * 4 + first, lower, plane), Spot(place, t * 4 + 8 + first, lower, plane)};
                #pragma unroll
                for (int row = 0; row < LANE_ROWS; row++) {
                    if (OUT_CHANNELS % TILE_M && first_m + row * 8 >= OUT_CHANNELS) continue;  // the same in all lanes
                    auto pixel = [&](int t, int right) {
                        return t < LANE_WINDOWS ? sum_of(sums, row, t, lower * 2 + right) : 0;
                    };
                    Packed<scalar_t, 4> lines[2];
                    #pragma unroll
                    for (int i = 0; i < 4; i++) {
                        int at = t + i / 2 * 2, right = i % 2;
                        float v = pixel(at, right), next = pixel(at + 1, right), after = pixel(at + 2, right);
                        if (odd && quad == 0) v = next, next = after;
                        float other = __shfl_xor_sync(0xFFFFFFFFu, later ? v : next, odd ? 3 : 1);
                        lines[i / 2].v[right] = finish[row](later ? other : v);
                        lines[i / 2].v[2 + right] = finish[row](later ? next : other);
                    }
                    #pragma unroll
                    for (int i = 0; i < 2; i++)
                        if (t + 2 * i < MOST_TILES) spots[i].store(row * 8, lines[i]);
                    if (odd && t == 0 && quad == 0)
                        Spot(place, -1, lower, plane)
                            .store(
                                row * 8,
                                {{scalar_t(), scalar_t(), finish[row](pixel(0, 0)), finish[row](pixel(0, 1))}});
                }
            }
        }
    }

#endif

    __device__ void restart() const {}
    __device__ void finish(int, i64) const {}
};

extern "C" __global__ void __launch_bounds__(THREADS, 1) conv_transpose_mma(
    const input_t* __restrict__ x, const int* __restrict__ x_exponents, const half_t* __restrict__ packed,
    const int* __restrict__ exponents, const scalar_t* __restrict__ bias, scalar_t* __restrict__ y,
    int x_exponent_count, i64 units) {
    wait_for_earlier_kernels();
    __shared__ Scratch scratch;
    DYNAMIC_SHARED(u8, shared);
    StoreEpilogue epilogue = {bias, y, exponents};
    convolve(x, x_exponents, x_exponent_count, packed, units, shared, scratch, epilogue);
}
