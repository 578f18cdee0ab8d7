// Max pooling before a batch norm and an activation that never decreases. The pooled value of a window is its largest
// value if gamma, batch norm's weight, is positive, its smallest if gamma is negative, and its first if gamma is 0. The
// forward reads x once, and computes the pooled values and the moments of x. The backward reads x once as well:
//
//     dx = gamma invstd (sum of g over the windows that the pixel wins - sum(g) / count - xhat sum(g xhat) / count)
//
// with xhat = (x - mean) invstd, and g = dy times the activation's slope. Between the two stand kernels of
// batch_norm.cu, over the pooled values alone.
//
// Windows of KERNEL x KERNEL pixels are two apart. So a plane is cut into cells of 2x2 pixels, and cell (r, c) lies in
// window (r, c), if there is one. Every pixel is in one cell, and counts once for the moments. A thread takes CELLS
// neighbours in a row, an item, of SLOTS channels:
//
// PLANES 1: x is [N, C, H, W], in accesses of WIDTH neighbouring pixels, 1 or 2 CELLS of them, a divisor of W then.
// PLANES 0: x is [N, H, W, C], in accesses of WIDTH channels, a divisor of C.
//
// Blocks and threads: a block takes `tile` packs of SLOTS channels (1 with PLANES), and a chunk of their items; its
// threads are a grid of `tile` times blockDim.x / tile, and those left over idle. Block chunk * tiles + t takes tile t.
//
// Macros: scalar_t, acc_t, PLANES, WIDTH, KEPT (channel_walk.cuh), KERNEL (2, or 3), PADDING (0, or 1 with KERNEL 3),
// THREADS. Limit: items of a channel below 2^31.
#include "channel_values.cuh"
#include "tanh.cuh"

enum { CELLS = PLANES && WIDTH > 1 ? WIDTH / 2 : 1, HALO = KERNEL - 2, ROWS = 2 + HALO, COLUMNS = 2 * CELLS + HALO };
enum { BESIDE = HALO ? 1 - PADDING : 0 };  // windows before a cell's own that reach it
static_assert(KERNEL == 2 ? PADDING == 0 : KERNEL == 3 && PADDING <= 1, "a window holds its cell");
typedef Packed<scalar_t, SLOTS> Channels;

struct Shape {
    int channels, height, width, out_height, out_width, items;  // items: of a channel, of all images

    __device__ int rows() const { return (height + 1) / 2; }  // of cells
    __device__ int strips() const { return (width + 2 * CELLS - 1) / (2 * CELLS); }
};

struct Item { int image, row, strip; };

// The items of a thread.
struct Items {
    Shape shape;
    Divisor by_row, by_image;
    int chunk, at, end, step;
    int row, rows, tile;  // of threads
    int channel;          // the first of the thread's
    bool exists;          // whether there are such channels

    __device__ Items(const Shape& shape, int chunk_items, int tile)
        : shape(shape), by_row(shape.strips()), by_image(shape.rows()), tile(tile) {
        unsigned tiles = (shape.channels / SLOTS + tile - 1) / tile, within;
        int number = blockIdx.x;
        make_opaque(number);  // else a second pass would hold registers during the first
        chunk = (unsigned)number / tiles, row = threadIdx.x / (unsigned)tile, rows = blockDim.x / tile;
        within = threadIdx.x - row * tile;
        channel = ((number - chunk * (int)tiles) * tile + (int)within) * SLOTS;
        exists = channel < shape.channels && row < rows;
        step = rows, end = (int)min((i64)shape.items, (chunk + (i64)1) * chunk_items);
        at = exists ? chunk * chunk_items + row : end;
    }
    __device__ bool next(Item& item) {
        if (at >= end) return false;
        unsigned row, strip, line = by_row.divide(at, strip);
        item.image = by_image.divide(line, row);
        item.row = row, item.strip = strip;
        at += step;
        return true;
    }
    // Where a pixel of the thread's first channel lies in an array with planes of height x width.
    __device__ i64 place(int image, int h, int w, int height, int width) const {
        return PLANES ? (((i64)image * shape.channels + channel) * height + h) * width + w
                      : (((i64)image * height + h) * width + w) * shape.channels + channel;
    }
    __device__ i64 pixel(int image, int h, int w) const { return place(image, h, w, shape.height, shape.width); }
    __device__ i64 window(int image, int oh, int ow) const {
        return place(image, oh, ow, shape.out_height, shape.out_width);
    }
};

// The pixels of an item's windows. Others stand for those outside the plane: a load needs no branch.
struct Pixels {
    scalar_t v[ROWS][COLUMNS][SLOTS];
    int first_h, first_w, height, width;

    __device__ Pixels(const scalar_t* __restrict__ x, const Items& items, const Item& item)
        : first_h(2 * item.row - PADDING), first_w(2 * CELLS * item.strip - PADDING), height(items.shape.height),
          width(items.shape.width) {
        #pragma unroll
        for (int r = 0; r < ROWS; r++) {
            const scalar_t* line = x + items.pixel(item.image, row_inside(r) ? first_h + r : 0, 0);
            if (PLANES && WIDTH > 1) {
                Pack own = *(const Pack*)(line + first_w + PADDING);
                #pragma unroll
                for (int i = 0; i < WIDTH; i++) v[r][(PADDING + i) % COLUMNS][0] = own.v[i];
            }
            #pragma unroll
            for (int c = 0; c < COLUMNS; c++) {
                if (PLANES && WIDTH > 1 && c >= PADDING && c < PADDING + WIDTH) continue;
                int w = first_w + (inside(r, c) ? c : PADDING);
                Channels one = *(const Channels*)(line + (i64)w * (PLANES ? 1 : items.shape.channels));
                #pragma unroll
                for (int s = 0; s < SLOTS; s++) v[r][c][s] = one.v[s];
            }
        }
    }
    // Rows and columns before a cell's own lie in the padding, or do not; the first of its own are never outside.
    __device__ bool row_inside(int r) const {
        return r < PADDING ? first_h >= 0 : r == PADDING || first_h + r < height;
    }
    __device__ bool inside(int r, int c) const {
        bool owned = c == PADDING || (PLANES && WIDTH > 1 && c > PADDING && c < PADDING + WIDTH);
        return row_inside(r) && (c < PADDING ? first_w >= 0 : owned || first_w + c < width);
    }

    // Calls visit(value) for each pixel of the cells, of one slot.
    template <class F> __device__ void own(int s, F visit) const {
        #pragma unroll
        for (int r = PADDING; r < PADDING + 2; r++)
            #pragma unroll
            for (int c = PADDING; c < PADDING + 2 * CELLS; c++)
                if (inside(r, c)) visit(to_acc(v[r][c][s]));
    }
};

// a == b, of denormals, too.
__device__ inline bool equal(float a, float b) {
#ifdef CUPY_KERNELS_EMULATOR
    return a == b;
#else
    int r;
    asm("{\n .reg .pred p;\n setp.eq.f32 p, %1, %2;\n selp.b32 %0, 1, 0, p;\n}" : "=r"(r) : "f"(a), "f"(b));
    return r;
#endif
}

// The larger one, or NaN.
__device__ inline float max_or_nan(float a, float b) {
#if !defined(CUPY_KERNELS_EMULATOR) && __CUDA_ARCH__ >= 800
    float larger;
    asm("max.NaN.f32 %0, %1, %2;" : "=f"(larger) : "f"(a), "f"(b));
    return larger;
#else
    return greater(a, b) | is_nan(a) ? a : b;
#endif
}

// Of slot s in window j of an item: the value that is largest times `sign`, 1, -1 or 0, and its tap. Of equals the
// first wins. A NaN beats everything, the last of several.
struct Winner {
    acc_t value;
    int tap;

    __device__ Winner(const Pixels& in, int j, int s, acc_t sign) {
        acc_t largest = -(acc_t)__int_as_float(0x7F800000);
        visit(in, j, s, [&](int, acc_t v) { largest = max_or_nan(largest, multiply_unflushed(v, sign)); });
        visit(in, j, s, [&](int at, acc_t v) { tap = equal(multiply_unflushed(v, sign), largest) ? at : tap; });
        value = multiply_unflushed(largest, sign);
        if (sign == 0) visit(in, j, s, [&](int, acc_t v) { value = v; });
        if (is_nan(largest)) {
            value = largest, tap = -1;
            visit(in, j, s, [&](int at, acc_t v) { tap = tap < 0 && is_nan(multiply_unflushed(v, sign)) ? at : tap; });
        }
    }
    // The window's values, the last first. Without padding a window has all of them.
    template <class F> __device__ static void visit(const Pixels& in, int j, int s, F f) {
        #pragma unroll
        for (int tap = KERNEL * KERNEL - 1; tap >= 0; tap--) {
            int r = tap / KERNEL, c = 2 * j + tap % KERNEL;
            if (!PADDING || in.inside(r, c)) f(tap, to_acc(in.v[r][c][s]));
        }
    }
};

// Chan's rule: of two sets of values, the moments of both.
struct Share {
    acc_t count, mean, squares;
    __device__ void add(const Share& other) {
        acc_t both = count + other.count, part = both > 0 ? other.count / both : (acc_t)0, distance = other.mean - mean;
        mean += distance * part;
        squares += other.squares + distance * (distance * (count * part));
        count = both;
    }
};

// Sums of an item's values, of each slot, times a unit, and relative to the mean of the thread's first item.
struct Sums {
    acc_t count, shift[SLOTS], sum[SLOTS], squares[SLOTS];
    __device__ Sums() : count(0) {
        #pragma unroll
        for (int s = 0; s < SLOTS; s++) shift[s] = sum[s] = squares[s] = 0;
    }
    __device__ void add(const Pixels& in, acc_t unit) {
        acc_t more = 0;
        in.own(0, [&](acc_t) { more += 1; });
        #pragma unroll
        for (int s = 0; s < SLOTS; s++) {
            if (count == 0) {
                acc_t total = 0;
                in.own(s, [&](acc_t v) { total += v * unit; });
                shift[s] = finite_or_zero(total / more);
            }
            in.own(s, [&](acc_t v) {
                acc_t d = v * unit - shift[s];
                sum[s] += d;
                squares[s] += d * d;
            });
        }
        count += more;
    }
    // Of slot s; the mean relative to `reference`.
    __device__ Share share(int s, acc_t reference) const {
        acc_t mean = count > 0 ? sum[s] / count : (acc_t)0, rest = squares[s] - count * mean * mean;
        return {count, count > 0 ? shift[s] - reference + mean : (acc_t)0, rest < 0 ? (acc_t)0 : rest};
    }
};

// pooled, argmax: of each window the winner, and its tap, kh * KERNEL + kw. partials [2][channels][chunks]: mean and
// sum of squared distances from it of the chunk's values, of which there are counts[chunk]; both null, or none.
extern "C" __global__ void __launch_bounds__(THREADS, 2) bn_pool_forward(
    const scalar_t* __restrict__ x, const acc_t* __restrict__ gamma, scalar_t* __restrict__ pooled,
    u8* __restrict__ argmax, double* __restrict__ partials, double* __restrict__ counts, int channels, int height,
    int width, int out_height, int out_width, int all_items, int chunk_items, i64 chunks, int tile) {
    wait_for_earlier_kernels();
    __shared__ acc_t scratch[32], shared[3][SLOTS][THREADS];
    Shape shape = {channels, height, width, out_height, out_width, all_items};
    with_units(scratch, [&](Open& open) {
        Items items(shape, chunk_items, tile);
        acc_t signs[SLOTS];
        #pragma unroll
        for (int s = 0; s < SLOTS; s++) {
            acc_t weight = items.exists ? bn_weight(gamma, items.channel + s) : (acc_t)0;
            signs[s] = weight > 0 ? 1 : weight < 0 ? -1 : 0;
        }
        Sums moments;
        Item item;
        while (items.next(item)) {
            Pixels in(x, items, item);
            if (partials) moments.add(in, open.unit);
            #pragma unroll
            for (int j = 0; j < CELLS; j++) {
                int ow = item.strip * CELLS + j;
                if (item.row >= out_height || ow >= out_width) continue;
                Channels values;
                Packed<u8, SLOTS> taps;
                #pragma unroll
                for (int s = 0; s < SLOTS; s++) {
                    Winner best(in, j, s, signs[s]);
                    values.v[s] = from_acc<scalar_t>(best.value);
                    taps.v[s] = best.tap;
                }
                i64 to = items.window(item.image, item.row, ow);
                *(Channels*)(pooled + to) = values;
                if (argmax) *(Packed<u8, SLOTS>*)(argmax + to) = taps;
            }
        }
        if (!partials) return;
        acc_t reference[SLOTS];  // of the first row of threads, which has values if any has
        #pragma unroll
        for (int s = 0; s < SLOTS; s++) shared[0][s][threadIdx.x] = moments.shift[s];
        __syncthreads();
        int first = threadIdx.x - items.row * tile;
        #pragma unroll
        for (int s = 0; s < SLOTS; s++) reference[s] = shared[0][s][first];
        __syncthreads();
        auto put = [&](int s, const Share& share) {
            shared[0][s][threadIdx.x] = share.count, shared[1][s][threadIdx.x] = share.mean;
            shared[2][s][threadIdx.x] = share.squares;
        };
        auto get = [&](int s, int thread) -> Share {
            return {shared[0][s][thread], shared[1][s][thread], shared[2][s][thread]};
        };
        #pragma unroll
        for (int s = 0; s < SLOTS; s++) put(s, moments.share(s, reference[s]));
        for (int left = items.rows; left > 1;) {  // half of the rows take over from the other half
            int half = (left + 1) / 2;
            __syncthreads();
            if (items.row + half < left)
                #pragma unroll
                for (int s = 0; s < SLOTS; s++) {
                    Share share = get(s, threadIdx.x);
                    share.add(get(s, threadIdx.x + half * tile));
                    put(s, share);
                }
            left = half;
        }
        if (items.row > 0 || !items.exists) return;
        double back = inverse_of(open.unit);
        #pragma unroll
        for (int s = 0; s < SLOTS; s++) {
            Share share = get(s, threadIdx.x);
            if (!open.keep(s, is_finite(share.squares))) continue;
            i64 to = (i64)(items.channel + s) * chunks + items.chunk;
            partials[to] = ((double)reference[s] + share.mean) * back;
            partials[channels * chunks + to] = share.squares * back * back;
            if (items.channel + s == 0) counts[items.chunk] = share.count;
        }
    });
}

// y, dy: the activation's values, and the gradient there. with_tanh: whether it is tanh, else y > 0 has slope 1, other
// y negative_slope. sums [2][channels]: of g and of g xhat; null for given statistics: then x is not read. count:
// values of a channel.
extern "C" __global__ void __launch_bounds__(THREADS, 2) bn_pool_backward(
    const scalar_t* __restrict__ dy, const scalar_t* __restrict__ y, const u8* __restrict__ argmax,
    const scalar_t* __restrict__ x, const acc_t* __restrict__ mean, const acc_t* __restrict__ invstd,
    const acc_t* __restrict__ gamma, const double* __restrict__ sums, scalar_t* __restrict__ dx, int with_tanh,
    acc_t negative_slope, double count, int channels, int height, int width, int out_height, int out_width,
    int all_items, int chunk_items, int tile) {
    wait_for_earlier_kernels();
    Shape shape = {channels, height, width, out_height, out_width, all_items};
    Items items(shape, chunk_items, tile);
    acc_t scale[SLOTS], centre[SLOTS], unit[SLOTS], factor[SLOTS], mean_g[SLOTS], mean_dot[SLOTS];
    #pragma unroll
    for (int s = 0; s < SLOTS && items.exists; s++) {
        int c = items.channel + s;
        Normaliser normalise(mean[c], invstd[c]);
        scale[s] = multiply_unflushed(bn_weight(gamma, c), invstd[c]);
        centre[s] = normalise.mean, unit[s] = normalise.unit, factor[s] = normalise.invstd;
        mean_g[s] = sums ? (acc_t)(sums[c] / count) : 0, mean_dot[s] = sums ? (acc_t)(sums[channels + c] / count) : 0;
    }
    Item item;
    enum { DOWN = 1 + HALO, ACROSS = CELLS + HALO, NONE = 255 };
    while (items.next(item)) {
        Channels in[2][2 * CELLS];
        bool below = 2 * item.row + 1 < height;
        int left = 2 * CELLS * item.strip;
        auto exists = [&](int r, int c) { return (r == 0 || below) && left + c < width; };
        #pragma unroll
        for (int r = 0; r < 2 && sums; r++) {
            const scalar_t* line = x + items.pixel(item.image, 2 * item.row + (r && below), left);
            if (PLANES && WIDTH > 1) {
                Pack own = *(const Pack*)line;
                #pragma unroll
                for (int i = 0; i < WIDTH; i++) in[r][i % (2 * CELLS)].v[0] = own.v[i];
                continue;
            }
            #pragma unroll
            for (int c = 0; c < 2 * CELLS; c++)
                in[r][c] = *(const Channels*)(line + (i64)(exists(r, c) ? c : 0) * (PLANES ? 1 : channels));
        }
        acc_t g[DOWN][ACROSS][SLOTS];
        int won[DOWN][ACROSS][SLOTS];
        #pragma unroll
        for (int i = 0; i < DOWN; i++)
            #pragma unroll
            for (int j = 0; j < ACROSS; j++) {
                int oh = item.row - BESIDE + i, ow = item.strip * CELLS - BESIDE + j;
                bool is_there = oh >= 0 && oh < out_height && ow >= 0 && ow < out_width;
                i64 from = is_there ? items.window(item.image, oh, ow) : items.window(item.image, 0, 0);
                Channels gradients = *(const Channels*)(dy + from), values = *(const Channels*)(y + from);
                Packed<u8, SLOTS> taps = *(const Packed<u8, SLOTS>*)(argmax + from);
                #pragma unroll
                for (int s = 0; s < SLOTS; s++) {
                    acc_t value = to_acc(values.v[s]);
                    acc_t slope = with_tanh ? tanh_slope(value) : value > 0 ? (acc_t)1 : negative_slope;
                    g[i][j][s] = to_acc(gradients.v[s]) * slope;
                    won[i][j][s] = is_there ? (int)taps.v[s] : NONE;
                }
            }
        #pragma unroll
        for (int r = 0; r < 2; r++) {
            scalar_t* line = dx + items.pixel(item.image, 2 * item.row + r, left);
            Pack together;
            #pragma unroll
            for (int c = 0; c < 2 * CELLS; c++) {
                if (!exists(r, c)) continue;
                Channels out;
                #pragma unroll
                for (int s = 0; s < SLOTS; s++) {
                    acc_t total = 0;
                    #pragma unroll
                    for (int i = 0; i < DOWN; i++)
                        #pragma unroll
                        for (int j = 0; j < ACROSS; j++) {
                            int kh = r + PADDING + 2 * (BESIDE - i), kw = c + PADDING + 2 * (BESIDE - j);
                            if (kh < 0 || kh >= KERNEL || kw < 0 || kw >= KERNEL) continue;
                            if (won[i][j][s] == kh * KERNEL + kw) total += g[i][j][s];
                        }
                    if (sums) {
                        acc_t xhat = (to_acc(in[r][c].v[s]) * unit[s] - centre[s]) * factor[s];
                        total -= mean_g[s] + xhat * mean_dot[s];
                    }
                    out.v[s] = from_acc<scalar_t>(multiply_unflushed(total, scale[s]));
                }
                if (PLANES && WIDTH > 1) together.v[c % WIDTH] = out.v[0];
                else *(Channels*)(line + (i64)c * (PLANES ? 1 : channels)) = out;
            }
            if (PLANES && WIDTH > 1 && exists(r, 0)) *(Pack*)line = together;
        }
    }
}
