// CUDA's functions of their arguments alone: intrinsics, and mathematics that C does not have. A part of cuda.h.

// --- Loads and stores with a hint for the caches

UNCHECKED static inline void emulator_unchanging(const void* p, size_t bytes) {
    emulator::unchanging(p, bytes, EMULATOR_CALLER);
}
#define EMULATOR_LOADS(T) \
    static inline T __ldg(const T* p) { return emulator_unchanging(p, sizeof(T)), *p; } \
    static inline T __ldca(const T* p) { return *p; } \
    static inline T __ldcg(const T* p) { return *p; } \
    static inline T __ldcs(const T* p) { return *p; } \
    static inline T __ldlu(const T* p) { return *p; } \
    static inline T __ldcv(const T* p) { return *p; } \
    static inline void __stwb(T* p, T v) { *p = v; } \
    static inline void __stcg(T* p, T v) { *p = v; } \
    static inline void __stcs(T* p, T v) { *p = v; } \
    static inline void __stwt(T* p, T v) { *p = v; }
EMULATOR_LOADS(char) EMULATOR_LOADS(signed char) EMULATOR_LOADS(short) EMULATOR_LOADS(int) EMULATOR_LOADS(long)
EMULATOR_LOADS(unsigned char) EMULATOR_LOADS(unsigned short) EMULATOR_LOADS(unsigned) EMULATOR_LOADS(unsigned long)
EMULATOR_LOADS(long long) EMULATOR_LOADS(unsigned long long) EMULATOR_LOADS(float) EMULATOR_LOADS(double)
EMULATOR_LOADS(char2) EMULATOR_LOADS(char4) EMULATOR_LOADS(uchar2) EMULATOR_LOADS(uchar4) EMULATOR_LOADS(short2)
EMULATOR_LOADS(short4) EMULATOR_LOADS(ushort2) EMULATOR_LOADS(ushort4) EMULATOR_LOADS(int2) EMULATOR_LOADS(int4)
EMULATOR_LOADS(uint2) EMULATOR_LOADS(uint4) EMULATOR_LOADS(longlong2) EMULATOR_LOADS(ulonglong2) EMULATOR_LOADS(float2)
EMULATOR_LOADS(float4) EMULATOR_LOADS(double2)

// --- Bits and integers

static inline int __float_as_int(float x) {
    int i;
    __builtin_memcpy(&i, &x, 4);
    return i;
}
static inline float __int_as_float(int i) {
    float x;
    __builtin_memcpy(&x, &i, 4);
    return x;
}
static inline unsigned __float_as_uint(float x) { return (unsigned)__float_as_int(x); }
static inline float __uint_as_float(unsigned i) { return __int_as_float((int)i); }
static inline long long __double_as_longlong(double x) {
    long long i;
    __builtin_memcpy(&i, &x, 8);
    return i;
}
static inline double __longlong_as_double(long long i) {
    double x;
    __builtin_memcpy(&x, &i, 8);
    return x;
}
static inline int __double2hiint(double x) { return (int)(__double_as_longlong(x) >> 32); }
static inline int __double2loint(double x) { return (int)__double_as_longlong(x); }
static inline double __hiloint2double(int high, int low) {
    return __longlong_as_double((long long)((unsigned long long)(unsigned)high << 32 | (unsigned)low));
}
static inline int __popc(unsigned x) { return __builtin_popcount(x); }
static inline int __popcll(unsigned long long x) { return __builtin_popcountll(x); }
static inline int __ffs(int x) { return __builtin_ffs(x); }
static inline int __ffsll(long long x) { return __builtin_ffsll(x); }
static inline int __clz(int x) { return x ? __builtin_clz(x) : 32; }
static inline int __clzll(long long x) { return x ? __builtin_clzll(x) : 64; }
static inline unsigned long long __brevll(unsigned long long x) {
    unsigned long long reversed = 0;
    for (int i = 0; i < 64; i++) reversed |= (x >> i & 1) << (63 - i);
    return reversed;
}
static inline unsigned __brev(unsigned x) { return __brevll(x) >> 32; }
static inline unsigned __byte_perm(unsigned x, unsigned y, unsigned selector) {
    unsigned long long bytes = (unsigned long long)y << 32 | x;
    unsigned result = 0;
    for (int i = 0; i < 4; i++) {
        unsigned choice = selector >> 4 * i & 7, byte = bytes >> choice * 8 & 0xFF;
        result |= byte << 8 * i;
    }
    return result;
}
#define EMULATOR_NAMED_MINMAX(prefix, T) \
    static inline T prefix##min(T a, T b) { return b < a ? b : a; } \
    static inline T prefix##max(T a, T b) { return a < b ? b : a; }
EMULATOR_NAMED_MINMAX(u, unsigned) EMULATOR_NAMED_MINMAX(ll, long long) EMULATOR_NAMED_MINMAX(ull, unsigned long long)
static inline int __mulhi(int a, int b) { return (int)((long long)a * b >> 32); }
static inline unsigned __umulhi(unsigned a, unsigned b) { return (unsigned long long)a * b >> 32; }
__extension__ typedef __int128 EmulatorInt128;
__extension__ typedef unsigned __int128 EmulatorUint128;
static inline long long __mul64hi(long long a, long long b) { return (long long)((EmulatorInt128)a * b >> 64); }
static inline unsigned long long __umul64hi(unsigned long long a, unsigned long long b) {
    return (EmulatorUint128)a * b >> 64;
}
static inline int __mul24(int a, int b) {
    return (int)(unsigned)((long long)((int)((unsigned)a << 8) >> 8) * ((int)((unsigned)b << 8) >> 8));
}
static inline unsigned __umul24(unsigned a, unsigned b) { return (a & 0xFFFFFF) * (b & 0xFFFFFF); }
static inline unsigned __usad(unsigned a, unsigned b, unsigned c) { return (a > b ? a - b : b - a) + c; }
static inline unsigned __sad(int a, int b, unsigned c) {
    return (a > b ? (unsigned)a - (unsigned)b : (unsigned)b - (unsigned)a) + c;
}
static inline int __hadd(int a, int b) { return (int)(((long long)a + b) >> 1); }
static inline int __rhadd(int a, int b) { return (int)(((long long)a + b + 1) >> 1); }
static inline unsigned __uhadd(unsigned a, unsigned b) { return ((unsigned long long)a + b) >> 1; }
static inline unsigned __urhadd(unsigned a, unsigned b) { return ((unsigned long long)a + b + 1) >> 1; }
static inline unsigned __funnelshift_lc(unsigned low, unsigned high, unsigned shift) {
    shift = shift < 32 ? shift : 32;
    return (((unsigned long long)high << 32 | low) << shift) >> 32;
}
static inline unsigned __funnelshift_rc(unsigned low, unsigned high, unsigned shift) {
    return ((unsigned long long)high << 32 | low) >> (shift < 32 ? shift : 32);
}
static inline unsigned __funnelshift_l(unsigned low, unsigned high, unsigned shift) {
    return __funnelshift_lc(low, high, shift & 31);
}
static inline unsigned __funnelshift_r(unsigned low, unsigned high, unsigned shift) {
    return __funnelshift_rc(low, high, shift & 31);
}
static inline int __dp4a(int a, int b, int sum) {
    for (int i = 0; i < 4; i++)
        sum = (int)((unsigned)sum + (unsigned)((signed char)(a >> 8 * i) * (signed char)(b >> 8 * i)));
    return sum;
}
static inline unsigned __dp4a(unsigned a, unsigned b, unsigned sum) {
    for (int i = 0; i < 4; i++) sum += (a >> 8 * i & 0xFF) * (b >> 8 * i & 0xFF);
    return sum;
}
static inline unsigned __isShared(const void* p) { return emulator::is_shared(p); }
static inline unsigned __isGlobal(const void* p) { return emulator::is_global(p); }
static inline unsigned __isLocal(const void* p) { return !emulator::is_shared(p) && !emulator::is_global(p); }
#define EMULATOR_SPACE(name) \
    static inline size_t __cvta_generic_to_##name(const void* p) { return (size_t)p; } \
    static inline void* __cvta_##name##_to_generic(size_t address) { return (void*)address; }
EMULATOR_SPACE(global) EMULATOR_SPACE(shared) EMULATOR_SPACE(local) EMULATOR_SPACE(constant)

// --- The 2 or 4 parts of a word

namespace emulator {
template <class T, class F> static inline unsigned of_parts(unsigned x, unsigned y, F compute) {
    const int bits = 8 * sizeof(T), count = 1 << bits;
    unsigned result = 0;
    for (int i = 0; i < 32; i += bits) result |= ((unsigned)compute((T)(x >> i), (T)(y >> i), count) & (count - 1)) << i;
    return result;
}
}  // namespace emulator
#define EMULATOR_PARTS(name, sign, expression) \
    static inline unsigned __v##name##2(unsigned x, unsigned y) { \
        return emulator::of_parts<sign short>(x, y, [](int a, int b, int count) { return (void)count, expression; }); \
    } \
    static inline unsigned __v##name##4(unsigned x, unsigned y) { \
        return emulator::of_parts<sign char>(x, y, [](int a, int b, int count) { return (void)count, expression; }); \
    }
EMULATOR_PARTS(add, unsigned, a + b) EMULATOR_PARTS(addus, unsigned, min(a + b, count - 1))
EMULATOR_PARTS(addss, signed, max(min(a + b, count / 2 - 1), -count / 2))
EMULATOR_PARTS(sub, unsigned, a - b) EMULATOR_PARTS(subus, unsigned, max(a - b, 0))
EMULATOR_PARTS(subss, signed, max(min(a - b, count / 2 - 1), -count / 2))
EMULATOR_PARTS(maxs, signed, max(a, b)) EMULATOR_PARTS(maxu, unsigned, max(a, b))
EMULATOR_PARTS(mins, signed, min(a, b)) EMULATOR_PARTS(minu, unsigned, min(a, b))
EMULATOR_PARTS(absdiffs, signed, abs(a - b)) EMULATOR_PARTS(absdiffu, unsigned, abs(a - b))
#define EMULATOR_COMPARED_PARTS(name, sign, operator) \
    EMULATOR_PARTS(cmp##name, sign, -(a operator b)) EMULATOR_PARTS(set##name, sign, a operator b)
EMULATOR_COMPARED_PARTS(eq, unsigned, ==) EMULATOR_COMPARED_PARTS(ne, unsigned, !=)
EMULATOR_COMPARED_PARTS(ges, signed, >=) EMULATOR_COMPARED_PARTS(geu, unsigned, >=)
EMULATOR_COMPARED_PARTS(gts, signed, >) EMULATOR_COMPARED_PARTS(gtu, unsigned, >)
EMULATOR_COMPARED_PARTS(les, signed, <=) EMULATOR_COMPARED_PARTS(leu, unsigned, <=)
EMULATOR_COMPARED_PARTS(lts, signed, <) EMULATOR_COMPARED_PARTS(ltu, unsigned, <)

// --- Rounding: rn to nearest, rz to zero, ru up, rd down

namespace emulator {
template <class T, class F> static inline T rounded(int mode, F compute) {
    set_rounding(mode);
    volatile T result = compute();
    set_rounding(0);
    return result;
}
}  // namespace emulator

// What is computed is read from volatile variables: compilers know nothing of the mode.
#define EMULATOR_ROUNDED_1(name, suffix, mode, T, A, expression) \
    static inline T name##suffix(A x) { \
        volatile A a = x; \
        return emulator::rounded<T>(mode, [&]() -> T { return expression; }); \
    }
#define EMULATOR_ROUNDED_2(name, suffix, mode, T, A, expression) \
    static inline T name##suffix(A x, A y) { \
        volatile A a = x, b = y; \
        return emulator::rounded<T>(mode, [&]() -> T { return expression; }); \
    }
#define EMULATOR_ROUNDED_3(name, suffix, mode, T, A, expression) \
    static inline T name##suffix(A x, A y, A z) { \
        volatile A a = x, b = y, c = z; \
        return emulator::rounded<T>(mode, [&]() -> T { return expression; }); \
    }
#define EMULATOR_ROUNDED(arguments, name, T, A, expression) \
    EMULATOR_ROUNDED_##arguments(name, _rn, 0, T, A, expression) \
    EMULATOR_ROUNDED_##arguments(name, _rz, 1, T, A, expression) \
    EMULATOR_ROUNDED_##arguments(name, _ru, 2, T, A, expression) \
    EMULATOR_ROUNDED_##arguments(name, _rd, 3, T, A, expression)
EMULATOR_ROUNDED(2, __fadd, float, float, a + b) EMULATOR_ROUNDED(2, __dadd, double, double, a + b)
EMULATOR_ROUNDED(2, __fsub, float, float, a - b) EMULATOR_ROUNDED(2, __dsub, double, double, a - b)
EMULATOR_ROUNDED(2, __fmul, float, float, a * b) EMULATOR_ROUNDED(2, __dmul, double, double, a * b)
EMULATOR_ROUNDED(2, __fdiv, float, float, a / b) EMULATOR_ROUNDED(2, __ddiv, double, double, a / b)
EMULATOR_ROUNDED(3, __fmaf, float, float, fmaf(a, b, c))
EMULATOR_ROUNDED(3, __fmaf_ieee, float, float, fmaf(a, b, c)) EMULATOR_ROUNDED(3, __fma, double, double, fma(a, b, c))
EMULATOR_ROUNDED(1, __frcp, float, float, 1 / a) EMULATOR_ROUNDED(1, __drcp, double, double, 1 / a)
EMULATOR_ROUNDED(1, __fsqrt, float, float, sqrtf(a)) EMULATOR_ROUNDED(1, __dsqrt, double, double, sqrt(a))
EMULATOR_ROUNDED(1, __double2float, float, double, (float)a) EMULATOR_ROUNDED(1, __int2float, float, int, (float)a)
EMULATOR_ROUNDED(1, __uint2float, float, unsigned, (float)a) EMULATOR_ROUNDED(1, __ll2float, float, long long, (float)a)
EMULATOR_ROUNDED(1, __ull2float, float, unsigned long long, (float)a)
EMULATOR_ROUNDED(1, __ll2double, double, long long, (double)a)
EMULATOR_ROUNDED(1, __ull2double, double, unsigned long long, (double)a)
static inline double __int2double_rn(int x) { return x; }
static inline double __uint2double_rn(unsigned x) { return x; }
static inline float __frsqrt_rn(float x) { return (float)(1 / sqrt((double)x)); }

// To an integer: to the nearest there is. NaN gives 0 from float to 32 bits, else the highest bit alone.
#define EMULATOR_TO_INTEGER_BY(name, suffix, round, A, T, lowest, end, of_nan) \
    static inline T name##suffix(A x) { \
        A whole = round(x); \
        return x != x                ? (T)(of_nan) \
               : whole < (A)(lowest) ? (T)(lowest) \
               : whole >= (A)(end)   ? (T) ~(T)(lowest) \
                                     : (T)whole; \
    }
#define EMULATOR_TO_INTEGER(name, A, T, lowest, end, of_nan) \
    EMULATOR_TO_INTEGER_BY(name, _rn, rint, A, T, lowest, end, of_nan) \
    EMULATOR_TO_INTEGER_BY(name, _rz, trunc, A, T, lowest, end, of_nan) \
    EMULATOR_TO_INTEGER_BY(name, _ru, ceil, A, T, lowest, end, of_nan) \
    EMULATOR_TO_INTEGER_BY(name, _rd, floor, A, T, lowest, end, of_nan)
EMULATOR_TO_INTEGER(__float2int, float, int, -0x7FFFFFFF - 1, 0x1p31f, 0)
EMULATOR_TO_INTEGER(__float2uint, float, unsigned, 0, 0x1p32f, 0)
EMULATOR_TO_INTEGER(__float2ll, float, long long, -0x7FFFFFFFFFFFFFFF - 1, 0x1p63f, 1ull << 63)
EMULATOR_TO_INTEGER(__float2ull, float, unsigned long long, 0, 0x1p64f, 1ull << 63)
EMULATOR_TO_INTEGER(__double2int, double, int, -0x7FFFFFFF - 1, 0x1p31, 1u << 31)
EMULATOR_TO_INTEGER(__double2uint, double, unsigned, 0, 0x1p32, 1u << 31)
EMULATOR_TO_INTEGER(__double2ll, double, long long, -0x7FFFFFFFFFFFFFFF - 1, 0x1p63, 1ull << 63)
EMULATOR_TO_INTEGER(__double2ull, double, unsigned long long, 0, 0x1p64, 1ull << 63)

// --- Fast mathematics: here it is not fast, and more exact than on a GPU

#define EMULATOR_FAST(name) \
    static inline float __##name##f(float x) { return name##f(x); }
EMULATOR_FAST(exp) EMULATOR_FAST(exp10) EMULATOR_FAST(log) EMULATOR_FAST(log2) EMULATOR_FAST(log10) EMULATOR_FAST(sin)
EMULATOR_FAST(cos) EMULATOR_FAST(tan)
static inline float __powf(float x, float y) {
    return powf(x, y);
}
static inline float __fdividef(float a, float b) { return a / b; }
static inline float fdividef(float a, float b) { return a / b; }
static inline double fdivide(double a, double b) { return a / b; }
static inline float fdivide(float a, float b) { return a / b; }
static inline float __saturatef(float x) { return x > 0 ? x < 1 ? x : 1.0f : 0.0f; }

// --- Mathematics that C does not have, computed in double

#define EMULATOR_FOR_FLOAT_1(name) \
    static inline float name##f(float x) { return (float)name((double)x); } \
    static inline float name(float x) { return name##f(x); }
static inline double rcbrt(double x) { return 1 / cbrt(x); }
static inline double sinpi(double x) {
    double rest = remainder(x, 2);  // -1 to 1
    return rest == trunc(rest) ? copysign(0.0, x) : sin(3.14159265358979323846 * rest);
}
static inline double cospi(double x) {
    double rest = fabs(remainder(x, 2));
    return rest == 0.5 ? 0 : cos(3.14159265358979323846 * rest);
}
static inline double erfcx(double x) {
    if (x < 25) return exp(x * x) * erfc(x);
    double square = 1 / (2 * x * x);
    return 0.56418958354775628695 / x * (1 - square * (1 - 3 * square * (1 - 5 * square)));
}
static inline double normcdf(double x) { return 0.5 * erfc(-0.70710678118654752440 * x); }
// By Newton's method: the logarithm of erfc is nearly a parabola.
static inline double erfcinv(double y) {
    if (!(y > 0 && y < 2)) return y == 0 ? __builtin_inf() : y == 2 ? -__builtin_inf() : __builtin_nan("");
    double tail = y < 1 ? y : 2 - y, x = sqrt(-log(tail) > 0.5 ? -log(tail) - 0.5 * log(1 - 2 * log(tail)) : 0);
    for (int i = 0; i < 60; i++) x += erfcx(x) * 0.88622692545275801365 * (log(erfc(x)) - log(tail));
    return y < 1 ? x : -x;
}
static inline double erfinv(double y) {
    if (fabs(y) > 0.5) return y > 0 ? erfcinv(1 - y) : -erfcinv(1 + y);
    double x = y;
    for (int i = 0; i < 30; i++) x -= (erf(x) - y) * 0.88622692545275801365 * exp(x * x);
    return x;
}
static inline double normcdfinv(double y) { return -1.41421356237309504880 * erfcinv(2 * y); }
static inline double rhypot(double x, double y) { return 1 / hypot(x, y); }
static inline float rhypotf(float x, float y) { return (float)rhypot(x, y); }
EMULATOR_FOR_FLOAT_1(rcbrt) EMULATOR_FOR_FLOAT_1(sinpi) EMULATOR_FOR_FLOAT_1(cospi) EMULATOR_FOR_FLOAT_1(erfcx)
EMULATOR_FOR_FLOAT_1(normcdf) EMULATOR_FOR_FLOAT_1(erfcinv) EMULATOR_FOR_FLOAT_1(erfinv)
EMULATOR_FOR_FLOAT_1(normcdfinv)
    // Modified Bessel functions of the first kind, by their series.
    static inline double cyl_bessel_i0(double x) {
    double term = 1, sum = 1;
    for (int k = 1; term > 1e-17 * sum && k < 1000; k++) sum += term *= x * x / (4.0 * k * k);
    return sum;
}
static inline double cyl_bessel_i1(double x) {
    double term = 1, sum = 1;
    for (int k = 1; term > 1e-17 * sum && k < 1000; k++) sum += term *= x * x / (4.0 * k * (k + 1));
    return x / 2 * sum;
}
EMULATOR_FOR_FLOAT_1(cyl_bessel_i0) EMULATOR_FOR_FLOAT_1(cyl_bessel_i1)
extern "C" double jn(int, double);
extern "C" double yn(int, double);
extern "C" float jnf(int, float);
extern "C" float ynf(int, float);
static inline float jn(int n, float x) { return jnf(n, x); }
static inline float yn(int n, float x) { return ynf(n, x); }

static inline double norm(int n, const double* v) {
    double length = 0;
    for (int i = 0; i < n; i++) length = hypot(length, v[i]);
    return length;
}
static inline float normf(int n, const float* v) {
    double length = 0;
    for (int i = 0; i < n; i++) length = hypot(length, (double)v[i]);
    return (float)length;
}
static inline float norm(int n, const float* v) { return normf(n, v); }
static inline double rnorm(int n, const double* v) { return 1 / norm(n, v); }
static inline float rnormf(int n, const float* v) { return 1 / normf(n, v); }
static inline float rnorm(int n, const float* v) { return rnormf(n, v); }
static inline double norm3d(double x, double y, double z) { return hypot(hypot(x, y), z); }
static inline double norm4d(double x, double y, double z, double w) { return hypot(norm3d(x, y, z), w); }
static inline double rnorm3d(double x, double y, double z) { return 1 / norm3d(x, y, z); }
static inline double rnorm4d(double x, double y, double z, double w) { return 1 / norm4d(x, y, z, w); }
#define EMULATOR_NORM(name) \
    static inline float name##3df(float x, float y, float z) { return (float)name##3d(x, y, z); } \
    static inline float name##3d(float x, float y, float z) { return name##3df(x, y, z); } \
    static inline float name##4df(float x, float y, float z, float w) { return (float)name##4d(x, y, z, w); } \
    static inline float name##4d(float x, float y, float z, float w) { return name##4df(x, y, z, w); }
EMULATOR_NORM(norm) EMULATOR_NORM(rnorm)
#define EMULATOR_SINCOS(name, sine, cosine) \
    static inline void name(double x, double* s, double* c) { *s = sine(x), *c = cosine(x); } \
    static inline void name##f(float x, float* s, float* c) { *s = sine##f(x), *c = cosine##f(x); } \
    static inline void name(float x, float* s, float* c) { name##f(x, s, c); }
EMULATOR_SINCOS(sincos, sin, cos) EMULATOR_SINCOS(sincospi, sinpi, cospi)
static inline void __sincosf(float x, float* s, float* c) { sincosf(x, s, c); }

extern "C" double remquo(double, double, int*);
extern "C" float remquof(float, float, int*);
static inline float remquo(float x, float y, int* quotient) { return remquof(x, y, quotient); }
extern "C" double nan(const char*);
extern "C" float nanf(const char*);
static inline int __isnanf(float x) { return isnan(x); }
static inline int __isinff(float x) { return isinf(x); }
static inline int __finitef(float x) { return isfinite(x); }
