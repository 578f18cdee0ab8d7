// Mathematics: CUDA's overloads, no more and no fewer. A call means here what it means there, or is ambiguous in both.
// A C++ compiler's <math.h> has others. It is not included; the functions for double are those of C.
#define EMULATOR_FLOAT(T, U, name) \
    extern "C" T name(double); \
    extern "C" U name##f(float); \
    static inline U name(float x) { return name##f(x); }
#define EMULATOR_OF_1(name) EMULATOR_FLOAT(double, float, name)
#define EMULATOR_WITH(T, U, name) \
    extern "C" double name(double, T); \
    extern "C" float name##f(float, U); \
    static inline float name(float x, U y) { return name##f(x, y); }
#define EMULATOR_OF_2(name) EMULATOR_WITH(double, float, name)
EMULATOR_OF_1(acos) EMULATOR_OF_1(acosh) EMULATOR_OF_1(asin) EMULATOR_OF_1(asinh) EMULATOR_OF_1(atan)
EMULATOR_OF_1(atanh) EMULATOR_OF_1(cbrt) EMULATOR_OF_1(ceil) EMULATOR_OF_1(cos) EMULATOR_OF_1(cosh) EMULATOR_OF_1(erf)
EMULATOR_OF_1(erfc) EMULATOR_OF_1(exp) EMULATOR_OF_1(exp10) EMULATOR_OF_1(exp2) EMULATOR_OF_1(expm1) EMULATOR_OF_1(fabs)
EMULATOR_OF_1(floor) EMULATOR_OF_1(j0) EMULATOR_OF_1(j1) EMULATOR_OF_1(lgamma) EMULATOR_OF_1(log) EMULATOR_OF_1(log10)
EMULATOR_OF_1(log1p) EMULATOR_OF_1(log2) EMULATOR_OF_1(logb) EMULATOR_OF_1(nearbyint) EMULATOR_OF_1(rint)
EMULATOR_OF_1(round) EMULATOR_OF_1(sin) EMULATOR_OF_1(sinh) EMULATOR_OF_1(sqrt) EMULATOR_OF_1(tan) EMULATOR_OF_1(tanh)
EMULATOR_OF_1(tgamma) EMULATOR_OF_1(trunc) EMULATOR_OF_1(y0) EMULATOR_OF_1(y1) EMULATOR_OF_2(atan2)
EMULATOR_OF_2(copysign) EMULATOR_OF_2(fdim) EMULATOR_OF_2(fmax) EMULATOR_OF_2(fmin) EMULATOR_OF_2(fmod)
EMULATOR_OF_2(hypot) EMULATOR_OF_2(nextafter) EMULATOR_OF_2(pow) EMULATOR_OF_2(remainder)
EMULATOR_FLOAT(int, int, ilogb) EMULATOR_FLOAT(long, long, lrint) EMULATOR_FLOAT(long, long, lround)
EMULATOR_FLOAT(long long, long long, llrint) EMULATOR_FLOAT(long long, long long, llround)
EMULATOR_WITH(int*, int*, frexp) EMULATOR_WITH(int, int, ldexp) EMULATOR_WITH(double*, float*, modf)
EMULATOR_WITH(long, long, scalbln) EMULATOR_WITH(int, int, scalbn)
extern "C" double fma(double, double, double);
extern "C" float fmaf(float, float, float);
extern "C" int abs(int);
extern "C" long labs(long);
extern "C" long long llabs(long long);
static inline float fma(float x, float y, float z) { return fmaf(x, y, z); }
static inline float pow(float x, int y) { return powf(x, y); }
static inline double pow(double x, int y) { return pow(x, (double)y); }
static inline double copysign(float x, double y) { return copysign((double)x, y); }
static inline double copysign(double x, float y) { return copysign(x, (double)y); }
static inline float rsqrtf(float x) { return 1.0f / sqrtf(x); }
static inline float rsqrt(float x) { return rsqrtf(x); }
static inline double rsqrt(double x) { return 1.0 / sqrt(x); }
static inline long abs(long x) { return labs(x); }
static inline long long abs(long long x) { return llabs(x); }
static inline float abs(float x) { return fabsf(x); }
static inline double abs(double x) { return fabs(x); }
#define EMULATOR_CLASS(name) \
    static inline int name(float x) { return __builtin_##name(x) != 0; } \
    static inline int name(double x) { return __builtin_##name(x) != 0; }
EMULATOR_CLASS(isfinite) EMULATOR_CLASS(isinf) EMULATOR_CLASS(isnan) EMULATOR_CLASS(signbit)
// As templates without a choice, these give way to a function of the text with the same parameters, as in NVRTC.
namespace emulator { enum None { NONE }; }
#define EMULATOR_UNLESS_GIVEN template <emulator::None = emulator::NONE> static inline
#define EMULATOR_MINMAX(T, A, B) \
    EMULATOR_UNLESS_GIVEN T min(A a, B b) { return (T)b < (T)a ? b : a; } \
    EMULATOR_UNLESS_GIVEN T max(A a, B b) { return (T)a < (T)b ? b : a; }
#define EMULATOR_MINMAX_INTEGERS(T) \
    EMULATOR_MINMAX(T, T, T) \
    EMULATOR_MINMAX(unsigned T, unsigned T, unsigned T) \
    EMULATOR_MINMAX(unsigned T, T, unsigned T) \
    EMULATOR_MINMAX(unsigned T, unsigned T, T)
EMULATOR_MINMAX_INTEGERS(int) EMULATOR_MINMAX_INTEGERS(long) EMULATOR_MINMAX_INTEGERS(long long)
EMULATOR_UNLESS_GIVEN float min(float a, float b) { return fminf(a, b); }
EMULATOR_UNLESS_GIVEN float max(float a, float b) { return fmaxf(a, b); }
#define EMULATOR_MINMAX_DOUBLE(A, B) \
    EMULATOR_UNLESS_GIVEN double min(A a, B b) { return fmin((double)a, (double)b); } \
    EMULATOR_UNLESS_GIVEN double max(A a, B b) { return fmax((double)a, (double)b); }
EMULATOR_MINMAX_DOUBLE(double, double) EMULATOR_MINMAX_DOUBLE(float, double) EMULATOR_MINMAX_DOUBLE(double, float)
