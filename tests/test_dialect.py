"""Lines of CUDA C that NVRTC and the emulator both take, with the values that they have, and lines that both refuse.

NVRTC compiles without a GPU. What one takes and the other does not is listed, too, with the reason.
"""

import math
import os
import re
import subprocess

import numpy as np
import pytest
import torch

from cupy_kernels import emulator, nvrtc, source
from cupy_kernels.errors import BackendError, KernelCompileError
from cupy_kernels.launch import launch
from cupy_kernels.source import Kernel, Variant
from modelnew.calls import run

F, D, INT, L = np.float32(0.75), -2.3, -5, -(2**40) - 3  # what lines call f, d, i, l
U, M = 0xF0F00F1E, 0xFEDCBA9876543210  # u, m
T = np.arange(32)  # t, the lane
HEAD = """#include "common.cuh"
"""
PARAMETERS = (
    "double* y, float f, double d, int i, i64 l, INOUT float* pf, INOUT int* pi, INOUT unsigned* pu, INOUT double* pd, "
    "INOUT unsigned long long* pm"
)
LOCALS = (
    "int t = threadIdx.x; unsigned u = 0xF0F00F1Eu + (i + 5); unsigned long long m = 0xFEDCBA9876543210ull + (i + 5); "
)


def to_zero(x):
    return np.nextafter(np.float32(x), np.float32(0)) if abs(float(np.float32(x))) > abs(x) else np.float32(x)


def up(x):
    return np.nextafter(np.float32(x), np.float32(np.inf)) if float(np.float32(x)) < x else np.float32(x)


def signed(bits, width=32):
    return bits - (1 << width) if bits >> (width - 1) else bits


def bits(x):
    return int(np.float32(x).view(np.uint32))


def bits64(x):
    return int(np.float64(x).view(np.int64))


def norm_cdf(x):
    return 0.5 * math.erfc(-x / math.sqrt(2))


# (expression, value): of each thread, or of all
VALUES = [
    # Minima, maxima, absolute values
    ("max(f, 0.5f)", 0.75),
    ("max(d, f)", 0.75),
    ("max(i, 3)", 3),
    ("max(i, u)", 2**32 - 5),
    ("min(l, 3ll)", L),
    ("max(l, m)", max(M, 2**64 + L)),
    ("fmaxf(f, 1)", 1),
    ("fmin(d, 1)", D),
    ("umin(u, 3u)", 3),
    ("umax(u, 3u)", U),
    ("llmax(l, 3ll)", 3),
    ("llmin(l, 3ll)", L),
    ("ullmin(m, 3ull)", 3),
    ("ullmax(m, 3ull)", M),
    ("abs(i) + abs(l) + fabsf(-f)", 5 - L + 0.75),
    # Bits and integers
    ("__clz(i) + __clz(u >> 4)", 4),
    ("__clzll(m >> 9)", 9),
    ("__popc(u)", bin(U).count("1")),
    ("__popcll(m)", bin(M).count("1")),
    ("__ffs(i - 3) + __ffs(0)", 4),
    ("__ffsll(1ll << 40)", 41),
    ("__brev(u)", int(f"{U:032b}"[::-1], 2)),
    ("__brevll(m)", int(f"{M:064b}"[::-1], 2)),
    ("__byte_perm(u, 0x01020384u, 0x4173)", 0x840F04F0 & 0 | 0x840F01F0),
    ("__byte_perm(u, 0x01020384u, 0x5C90)", 0x03FF001E),
    ("__mulhi(i, 1 << 30)", -2),
    ("__umulhi(u, u)", U * U >> 32),
    ("__mul64hi(l, 1ll << 50)", (L << 50) >> 64),
    ("__umul64hi(m, m)", M * M >> 64),
    ("__mul24(i, 3 + (1 << 24))", -15),
    ("__umul24(u, 5u)", (U & 0xFFFFFF) * 5),
    ("__sad(i, 7, 100u)", 112),
    ("__usad(3u, u, 1u)", U - 2),
    ("__hadd(i, -2) + __rhadd(i, -2)", -7),
    ("__uhadd(u, u + 1) + (double)__urhadd(u, u + 1)", 2 * U + 1),
    ("__funnelshift_l(u, 0x12345678u, 36u)", (0x12345678 << 4 | U >> 28) & 0xFFFFFFFF),
    ("__funnelshift_r(u, 0x12345678u, 36u)", 0x8 << 28 | U >> 4),
    ("__funnelshift_lc(u, 0x12345678u, 36u)", U),
    ("__funnelshift_rc(u, 0x12345678u, 36u)", 0x12345678),
    ("__float_as_int(f)", bits(F)),
    ("__float_as_uint(-f)", bits(-F)),
    ("__int_as_float(0x3F000000)", 0.5),
    ("__uint_as_float(0x3F000000u)", 0.5),
    ("__double_as_longlong(d)", bits64(D)),
    ("__longlong_as_double(0x3FE0000000000000ll)", 0.5),
    ("__double2hiint(d)", bits64(D) >> 32),
    ("__double2loint(d)", signed(bits64(D) & 0xFFFFFFFF)),
    ("__hiloint2double(0x3FE00000, 0)", 0.5),
    ("~u ^ u", 2**32 - 1),
    ("i >> 1", -3),
    ("i % 3", -2),
    ("i / 2", -2),
    ("(unsigned char)300", 44),
    ("0b101 + 1'000 + 0x1p3", 1013),
    # Conversions and rounding
    ("__float2int_rn(2.5f * f / f)", 2),
    ("__float2int_rz(-f)", 0),
    ("__float2int_ru(f)", 1),
    ("__float2int_rd(-f)", -1),
    ("__float2int_rn(1e20f * f)", 2**31 - 1),
    ("__float2int_rz(-1e20f * f)", -(2**31)),
    ("__float2int_rz(0 * f / (f - f))", 0),
    ("__float2uint_rn(-f)", 0),
    ("__float2uint_rz(3e9f + f)", 3e9),
    ("__float2uint_rn(1e20f * f)", 2**32 - 1),
    ("__float2ll_rn(f * 1e15f)", int(F * np.float32(1e15))),
    ("__float2ll_rz(1e30f * f)", 2**63 - 1),
    ("__float2ull_rd(-f)", 0),
    ("__double2int_rn(d)", -2),
    ("__double2int_ru(-d)", 3),
    ("__double2uint_rz(-d)", 2),
    ("__double2ll_rd(d)", -3),
    ("__double2ull_rn(-d)", 2),
    ("__double2float_rn(d)", np.float32(D)),
    ("__double2float_rz(d)", to_zero(D)),
    ("__double2float_ru(d)", up(D)),
    ("__double2float_rd(d)", -up(-D)),
    ("__int2float_rn(123456789 + t)", np.float32(123456789 + T)),
    ("__int2float_rz(123456789)", to_zero(123456789)),
    ("__int2float_ru(123456789)", up(123456789)),
    ("__uint2float_rd(u)", -up(-U)),
    ("__ll2float_rn(l)", np.float32(L)),
    ("__ull2float_rz(m)", to_zero(M)),
    ("__int2double_rn(i) + __uint2double_rn(u) + __ll2double_rn(l)", -5.0 + U + L),
    ("__ull2double_rn(m)", float(M)),
    ("__fadd_rn(f, 1e-9f)", 0.75),
    ("__fadd_rz(f, -1e-9f)", np.nextafter(F, np.float32(0))),
    ("__fadd_ru(f, 1e-9f)", np.nextafter(F, np.float32(1))),
    ("__fadd_rd(f, 1e-9f)", 0.75),
    ("__fsub_rn(f, 0.25f)", 0.5),
    ("__fmul_rz(f / 3, f / 3)", to_zero(0.0625)),
    ("__fmul_ru(1.1f, 1.3f * f / f)", up(float(np.float32(1.1)) * float(np.float32(1.3)))),
    ("__fmaf_rn(f, f, 0.5f)", 1.0625),
    ("__fmaf_ru(f, 1e-9f, f)", np.nextafter(F, np.float32(1))),
    ("__fdiv_rn(f, 3)", np.float32(0.25)),
    ("__fdiv_rz(1, 3 * f / f)", to_zero(1 / 3)),
    ("__frcp_rn(f)", np.float32(1) / F),
    ("__frcp_ru(3 * f / f)", up(1 / 3)),
    ("__fsqrt_rn(f)", np.sqrt(F)),
    ("__fsqrt_rz(2 * f / f)", to_zero(math.sqrt(2))),
    ("__frsqrt_rn(f)", np.float32(1 / math.sqrt(0.75))),
    ("__dadd_rn(d, 1) + __dsub_rn(d, 1) + __dmul_rn(d, 2)", D + 1 + (D - 1) + 2 * D),
    ("__fma_rn(d, d, 1.0)", D * D + 1),
    ("__ddiv_rn(d, 2) + __drcp_rn(d) + __dsqrt_rn(-d)", D / 2 + 1 / D + math.sqrt(-D)),
    ("__dadd_ru(1, 1e-30) > 1", 1),
    ("__saturatef(f) + __saturatef(2 + f) + __saturatef(-f) + __saturatef((f - f) / (f - f))", 1.75),
    # Mathematics, fast and slow
    ("__expf(f)", math.exp(0.75)),
    ("__exp10f(f)", 10**0.75),
    ("__logf(f)", math.log(0.75)),
    ("__log2f(f)", math.log2(0.75)),
    ("__log10f(f)", math.log10(0.75)),
    ("__sinf(f)", math.sin(0.75)),
    ("__cosf(f)", math.cos(0.75)),
    ("__tanf(f)", math.tan(0.75)),
    ("__powf(f, 3)", 0.75**3),
    ("__fdividef(f, 3)", 0.25),
    ("fdividef(f, 3)", 0.25),
    ("fdivide(d, 2)", D / 2),
    ("rsqrtf(f) + rsqrt(-d)", 0.75**-0.5 + (-D) ** -0.5),
    ("cbrtf(f) + cbrt(d)", 0.75 ** (1 / 3) - (-D) ** (1 / 3)),
    ("rcbrtf(f) + rcbrt(d)", 0.75 ** (-1 / 3) - (-D) ** (-1 / 3)),
    ("erff(f) + erfc(d)", math.erf(0.75) + math.erfc(D)),
    ("erfinv(erf(0.9) + 0 * d)", 0.9),
    ("erfinvf(f) - (float)erfinv(0.75)", 0),
    ("erfcinv(erfc(-d))", -D),
    ("erfcinv(1e-200 + 0 * d) - sqrt(-log(erfcx(21.3)) + 0 * d) > 0", 1),
    ("erfcx(30.0 + 0 * d)", 0.018795888861416751),
    ("erfcxf(f)", math.exp(0.5625) * math.erfc(0.75)),
    ("normcdff(f) + normcdf(d)", norm_cdf(0.75) + norm_cdf(D)),
    ("normcdfinv(normcdf(d))", D),
    ("normcdfinvf(f)", 0.6744897501960817),
    ("exp10f(f) + exp2f(f) + expm1f(f)", 10**0.75 + 2**0.75 + math.expm1(0.75)),
    ("log1pf(f) + log2f(f) + logbf(f) + ilogbf(f)", math.log1p(0.75) + math.log2(0.75) - 2),
    ("sinpif(f) + cospi(d)", math.sin(math.pi * 0.75) + math.cos(math.pi * D)),
    ("sinpi(1e15 + 1 + 0 * d)", 0),
    ("tgammaf(f) + lgamma(-d)", math.gamma(0.75) + math.lgamma(-D)),
    ("j0f(f) + jn(2, d) + ynf(2, f)", 0.8642423 + 0.41391459 - 2.6297460),
    ("cyl_bessel_i0f(f) + cyl_bessel_i1(d)", 1.1456467780440014 - 2.0978000),
    ("hypotf(f, 1) + rhypotf(f, 1)", 1.25 + 0.8),
    ("norm3df(f, 1, 0) + rnorm4df(f, 1, 0, 0)", 1.25 + 0.8),
    ("powf(f, 2) + pow(f, 2) + pow(d, 2)", 2 * 0.5625 + D * D),
    ("fmodf(2, f) + remainderf(2, f) + fdimf(f, 1)", 0.5 - 0.25),
    ("copysignf(f, d) + nextafterf(f, 1)", np.nextafter(F, np.float32(1)) - F),
    ("ldexpf(f, 2) + scalbnf(f, 1)", 4.5),
    ("floorf(f) + ceilf(f) + truncf(-f) + roundf(f) + rintf(f) + nearbyintf(f)", 4),
    ("lrintf(f) + llroundf(2 * f)", 3),
    ("isnan(f) + isinf(1 / (f - f)) + isfinite(f) + signbit(-f) + __isnanf(f) + __finitef(f)", 4),
    ('isnan(nanf("")) + isnan(nan(""))', 2),
    ("fma(f, f, f)", 0.5625 + 0.75),
    ("[&] { float s, c; sincosf(f, &s, &c); return s + 2 * c; }()", math.sin(0.75) + 2 * math.cos(0.75)),
    ("[&] { float s, c; __sincosf(f, &s, &c); return s + 2 * c; }()", math.sin(0.75) + 2 * math.cos(0.75)),
    (
        "[&] { double s, c; sincospi(d, &s, &c); return s + 2 * c; }()",
        math.sin(math.pi * D) + 2 * math.cos(math.pi * D),
    ),
    ("[&] { int q; float r = remquof(5, f, &q); return r + q; }()", 7 - 0.25),
    ("[&] { int e; float r = frexpf(3, &e); return r + e; }()", 2.75),
    ("[&] { float w; return modff(3.5f * f / f, &w) + w; }()", 3.5),
    # Warps and blocks
    ("__shfl_sync(0xFFFFFFFFu, t * 1.5f, 3)", 4.5),
    ("__shfl_sync(0xFFFFFFFFu, t, 5, 8)", T // 8 * 8 + 5),
    ("__shfl_xor_sync(0xFFFFFFFFu, (long long)t << 40, 1)", (T ^ 1) * 2.0**40),
    ("__shfl_up_sync(0xFFFFFFFFu, (double)t, 2)", np.where(T >= 2, T - 2, T)),
    ("__shfl_up_sync(0xFFFFFFFFu, t, 1, 16)", np.where(T % 16 >= 1, T - 1, T)),
    ("__shfl_down_sync(0xFFFFFFFFu, (unsigned)t, 3)", np.where(T < 29, T + 3, T)),
    ("__shfl_sync(0xFFFFFFFFu, (short)t, 7)", 7),
    ("__ballot_sync(0xFFFFFFFFu, t % 3 == 0)", sum(1 << k for k in range(0, 32, 3))),
    ("__any_sync(0xFFFFFFFFu, t == 9) + 2 * __all_sync(0xFFFFFFFFu, t < 9)", 1),
    ("__activemask() >> t & 1", 1),
    ("__match_any_sync(0xFFFFFFFFu, t % 4)", [sum(1 << k for k in range(r % 4, 32, 4)) for r in range(32)]),
    ("__match_any_sync(0xFFFFFFFFu, t < 16 ? 1.5 : 2.5)", np.where(T < 16, 0xFFFF, 0xFFFF0000)),
    ("[&] { int all; unsigned who = __match_all_sync(0xFFFFFFFFu, i, &all); return who + (double)all; }()", 2.0**32),
    ("[&] { int all; unsigned who = __match_all_sync(0xFFFFFFFFu, t, &all); return who + (double)all; }()", 0),
    ("__reduce_add_sync(0xFFFFFFFFu, t - 1)", 464),
    ("__reduce_min_sync(0xFFFFFFFFu, t - 7) + __reduce_max_sync(0xFFFFFFFFu, (unsigned)t)", 24),
    (
        "__reduce_and_sync(0xFFFFFFFFu, u | t) + (double)__reduce_or_sync(0xFFFFFFFFu, (unsigned)t)",
        U - 30 + 16 * 0 + 31,
    ),
    ("__reduce_xor_sync(0xFFFFFFFFu, (unsigned)(t == 3 ? 5 : 0))", 5),
    ("__syncthreads_count(t < 5)", 5),
    ("__syncthreads_and(t < 32) + 2 * (__syncthreads_or(t == 40) != 0)", 1),
    ("warp_sum((float)t)", 496),
    ("warpSize + threadIdx.y + blockIdx.y + blockDim.x + gridDim.y", 65),
    ("(int)threadIdx.x - 1", T - 1),
    ("__isShared(pf) + 2 * __isGlobal(pf)", 2),
    # Atomics: old values
    ("atomicAdd(pi + 1, 0) + atomicSub(pi + 2, 0) + atomicAnd(pi + 3, 0) + atomicOr(pu + 1, 0u)", 0),
    ("atomicAdd(pf + 1, 0.0f) + atomicAdd(pd + 1, 0.0) + atomicAdd(pm + 1, 0ull)", 0),
    ("atomicMin((long long*)pm + 2, 0ll) + atomicOr((long long*)pm + 3, 0ll)", 0),
    ("atomicCAS(pi + 5, 1, 2) + atomicCAS((unsigned short*)(pi + 6), (unsigned short)1, (unsigned short)2)", 0),
    ("atomicExch_block(pi + 7, 0) + atomicMax_system(pu + 8, 0u) + atomicInc(pu + 9, 0u)", 0),
    # Vectors and types
    ("make_float4(1, 2, 3, f).w + make_int2(3, i).y + make_uchar4(1, 2, 3, 4).z", 0.75 - 5 + 3),
    ("make_long4(1, 2, 3, 4).w + make_ulonglong2(1, 2).y + make_double3(1, 2, d).z", 6 + D),
    (
        "sizeof(float4) + alignof(float4) + sizeof(float3) + sizeof(double3) + sizeof(long4) + alignof(char4)",
        16 * 2 + 12 + 24 + 32 + 4,
    ),
    ("dim3(2, 3).z + dim3(make_uint3(1, 2, 3)).y", 3),
    ("sizeof(size_t) + sizeof(long) + sizeof(ptrdiff_t)", 24),
    ("[=](float v) { return v * f; }(2)", 1.5),
    ("[&] { auto [a, b] = make_float2(1, f); return a + b; }()", 1.75),
    ("__ldg(pf) + __ldcs(pf) + __ldcg((const float4*)pf).x + __ldg((const uchar4*)pi).y", 0),
    ("NULL == pf || nullptr == pf", 0),
    ("to_acc(from_acc<half_t>(f)) + to_acc(from_acc<bf16_t>(f))", 1.5),
    ("clock64() >= 0 && clock() != -1", 1),
]

# Lines before the kernel, ";;", and statements: only compiled.
TAKEN = r"""
;; assert(i > 0);
;; static_assert(sizeof(float) == 4, "size");
;; static_assert(sizeof(float) == 4);
;; printf("%d %f\n", i, f);
;; __syncthreads(); __syncwarp(); __syncwarp(0xFFFFFFFFu);
;; __threadfence(); __threadfence_block(); __threadfence_system();
;; __nanosleep(10); __trap(); __brkpt();
;; __builtin_assume(i > 0);
;; __stcs(pf, f); __stcg(pi, i); __stwb(pd, d); __stwt((float4*)pf, make_float4(1, 2, 3, 4));
;; clock_t now = clock(); y[0] = now;
;; uint3 b = threadIdx; dim3 g = gridDim; dim3 c = {1, 2, 3}; y[0] = b.x + g.y + c.z;
;; float4 v = *(float4*)pf; v.x += 1; *(float4*)pf = v;
;; y[0] = norm(3, pd) + rnormf(3, pf) + normf(3, pf);
;; y[0] = __shfl_sync(-1, i, 0) + __shfl_sync(~0u, (long)l, 0);
;; switch (i) { case 1: y[0] = 1; break; case 2: y[0] = 2; default: y[0] = 3; }
;; goto done; done: y[0] = 1;
;; int v[] = {1, 2, 3}; for (int k : v) y[0] += k;
;; if (int k = i; k > 0) y[0] = k;
;; if constexpr (sizeof(int) == 4) y[0] = 1;
;; float v[4]; memset(v, 0, sizeof v); memcpy(v, pf, sizeof v); y[0] = v[0];
;; float* __restrict__ p = pf; const volatile float* q = pf; y[0] = p[0] + q[0];
;; __shared__ float s[32], r[4]; s[0] = r[0] = 1; y[0] = s[0];
;; __shared__ __align__(16) char s[32]; s[0] = 1; y[0] = s[0];
;; __shared__ alignas(16) char s[32]; s[0] = 1; y[0] = s[0];
;; static __shared__ float s[2]; s[0] = 1; y[0] = s[0];
;; volatile __shared__ float s[2][4]; s[0][1] = 1; y[0] = s[0][1];
;; extern __shared__ __align__(16) unsigned char bytes[]; float* s = (float*)bytes; s[0] = 1; y[0] = s[0];
extern __shared__ float dynamic_floats[]; ;; dynamic_floats[0] = 1; y[0] = dynamic_floats[0];
__shared__ float outer[4]; ;; outer[0] = 1; y[0] = outer[0];
__constant__ float table[4] = {1, 2, 3, 4}; ;; y[0] = table[i & 3];
__device__ float counts[4]; ;; counts[0] = 1; y[0] = counts[0];
static __device__ int counter = 5; ;; y[0] = counter;
const int five = 5; ;; y[0] = five;
static constexpr int two[2] = {1, 2}; ;; y[0] = two[1];
template <class T> __device__ T twice(T v) { return 2 * v; } ;; y[0] = twice(f);
template <int N> struct Few { int v[N]; __device__ int& operator[](int k) { return v[k]; } }; ;; Few<3> a; a[0] = 1;
template <class... A> __device__ float add_all(A... a) { return (a + ...); } ;; y[0] = add_all(f, f, 1);
template <class G> __device__ float apply(G g) { return g(1); } ;; y[0] = apply([=](float v) { return v * f; });
__device__ constexpr int square(int v) { return v * v; } ;; int v[square(2)]; v[0] = 1; y[0] = v[0];
__host__ __device__ int both(int v) { return v; } ;; y[0] = both(2);
static __device__ __noinline__ int apart(int v) { return v; } ;; y[0] = apart(2);
__forceinline__ __device__ int inside(int v) { return v; } ;; y[0] = inside(2);
__device__ int factorial(int v) { return v ? v * factorial(v - 1) : 1; } ;; y[0] = factorial(4);
__device__ float2 operator-(float2 a) { return make_float2(-a.x, -a.y); } ;; y[0] = (-make_float2(f, f)).x;
enum class Kind : unsigned char { A, B }; ;; y[0] = (int)Kind::B;
namespace inner { __device__ int fn(int v) { return v; } } ;; y[0] = inner::fn(2);
struct Pair { float a; int b; __device__ Pair(float a) : a(a), b(1) {} }; ;; y[0] = Pair(f).a;
struct __align__(16) Quad { float v[4]; }; ;; y[0] = alignof(Quad);
union Word { float f; int i; }; ;; Word v; v.f = f; y[0] = v.i;
extern "C" __global__ void taken_grid(const __grid_constant__ int v, float* q) { q[0] = v; } ;; y[0] = 1;
__launch_bounds__(32) __global__ void taken_bounds(float* q) { q[0] = 1; } ;; y[0] = 1;
"""

REFUSED = r"""
;; y[0] = max(f, 0);
;; y[0] = max(i, 1.0);
;; y[0] = max(l, i);
;; y[0] = std::max(f, 1.0f);
;; y[0] = std::abs(i);
;; y[0] = sqrt(i);
;; y[0] = pow(i, i);
;; y[0] = isnan(i);
;; y[0] = atomicAdd((long long*)pm, 1ll);
;; y[0] = atomicAdd((short*)pi, 1);
;; y[0] = atomicSub(pf, 1.0f);
;; y[0] = atomicMin(pf, 1.0f);
;; y[0] = atomicAnd(pf, 1.0f);
;; y[0] = atomicCAS(pf, 1.0f, 2.0f);
;; y[0] = atomicCAS_block((unsigned short*)pu, (unsigned short)1, (unsigned short)2);
;; y[0] = __shfl_sync(0xFFFFFFFFu, make_float2(f, f), 0).x;
;; y[0] = __shfl_sync(0xFFFFFFFFu, pf, 0) == nullptr;
;; y[0] = __shfl_sync(f, 0);
;; y[0] = __shfl(f, 0);
;; y[0] = __shfl_xor(f, 1);
;; y[0] = __reduce_add_sync(0xFFFFFFFFu, f);
;; __syncthreads(1);
;; threadIdx.x = 1;
;; y[0] = threadIdx.w;
;; float2 v = make_float2(1, 2) - make_float2(1, 2);
;; half2 v;
;; __half v;
;; y[0] = __float2half_rn(f);
;; static_assert(sizeof(float) == 8, "size");
;; y[0] = INFINITY;
;; y[0] = NAN;
;; y[0] = FLT_MAX;
;; y[0] = INT_MAX;
;; y[0] = M_PI;
;; std::size_t n = 1;
;; int64_t n = 1;
;; uint8_t n = 1;
;; uintptr_t n = 1;
;; uint n = 1;
;; __int128 n = 1;
;; _Float16 n = 1;
;; int v[i]; v[0] = 1;
;; float v[0];
;; struct P { int a, b; }; P p = {.a = 1, .b = 2};
;; y[0] = ({ int k = i; k; });
;; y[0] = i ?: 1;
;; switch (i) { case 1 ... 3: y[0] = 1; }
;; void* p = pf; p = p + 1;
;; __typeof__(f) v = f;
;; y[0] = memcmp(pf, pf, 4);
;; memmove(pf, pf, 4);
;; y[0] = strlen("abc");
;; std::cout << i;
;; register int v = i;
;; thread_local int v = i;
;; __shared__ float s[i];
;; float* restrict p = pf;
;; y[0] = f % 3;
;; y[0] = undefined_name;
;; y[0] = undefined_function(i);
;; return 1;
;; y[0] = 1
;; const int c = 1; c = 2;
;; float* p = pd;
;; half_t h; y[0] = h + h;
;; y[0] = __tanf(f, f);
;; y[0] = __sqrtf(f);
;; y[0] = __fmaxf(f, f);
"""

# The emulator alone takes it: a C++ compiler for the host does not tell functions of the host from those of the device.
# So a text that is not the package's is compiled by NVRTC, too, where there is one.
EMULATOR_ALONE = r"""
int host(int v) { return v * v; } ;; y[0] = host(2);
constexpr int host(int v) { return v * v; } ;; y[0] = host(2);
struct S { float a; S(float a) : a(a) {} }; ;; y[0] = S(f).a;
int global = 5; ;; y[0] = global;
;; auto g = [](auto v) { return v + 1; }; y[0] = g(1);
;; __shared__ float s[2] = {1, 2}; y[0] = s[0];
;; y[0] = __GNUC__;
"""

# NVRTC alone takes it: memory of its own (malloc), instructions on parts of words, and what only asm needs.
NVRTC_ALONE = r"""
;; float* p = (float*)malloc(16); free(p);
;; y[0] = __vadd4(u, u);
;; y[0] = __cvta_generic_to_shared(pf);
;; cudaError_t e = cudaSuccess;
;; y[0] = __CUDA_ARCH__;
__managed__ float managed; ;; y[0] = managed;
"""


def lines_of(text):
    return [tuple(part.strip() for part in line.split(";;")) for line in text.strip().splitlines()]


def kernel(number, body):
    return f'extern "C" __global__ void line_{number}({PARAMETERS}) {{ {LOCALS}{body} }}'


def unit(lines):
    """The text that a compiler gets: each line in a "file" of its own, line_<number>."""
    text = [HEAD]
    for number, (head, body) in enumerate(lines):
        head = re.sub(r"\b(host|S|global)\b", rf"\1_{number}", head)
        body = re.sub(r"\b(host|S|global)\b", rf"\1_{number}", body)
        text.append(f'#line 1 "line_{number}"\n{head}\n{kernel(number, body)}')
    return "\n".join(text)


def blamed(log):
    """Numbers of the lines in which a compiler's log has an error."""
    return {int(number) for number in re.findall(r"^line_(\d+)[:(]\d+\)?:[^\n]*error", log, re.MULTILINE)}


def errors_of_emulator(lines, tmp_path):
    with source.override({"lines.cu": unit(lines)}):
        text = emulator._translation_unit(Kernel("lines.cu", "line_0"))
    (tmp_path / "lines.cpp").write_text(text)
    command = [*emulator.compiler(), *emulator.FLAGS, *emulator.CHECKS, "-fsyntax-only", str(tmp_path / "lines.cpp")]
    command += ["-ferror-limit=0"] if emulator._is_clang() else []
    done = subprocess.run(command, capture_output=True, env={**os.environ, "LC_ALL": "C"})
    log = done.stderr.decode(errors="replace")
    assert done.returncode == bool(blamed(log)), log
    return blamed(log)


def errors_of_nvrtc(lines, least_major):
    wrong = set()
    for first in range(0, len(lines), 40):  # it gives up after 100 errors
        with source.override({"lines.cu": unit(lines[first : first + 40])}):
            try:
                nvrtc.compile_ptx(Variant("lines.cu"), "compute_80")
            except KernelCompileError as error:
                wrong |= {first + number for number in blamed(str(error))} or {-1}
    return wrong


@pytest.fixture(params=[11, nvrtc.WGMMA_MAJOR])
def least_major(request, monkeypatch):
    """NVRTC of CUDA 11, and a newer one."""
    try:
        library = nvrtc.shared_library(request.param)
    except BackendError as error:
        pytest.skip(str(error))
    monkeypatch.setattr(nvrtc, "shared_library", lambda least_major=11: library)
    return request.param


def taken():
    return [("", f"y[0] = {expression};") for expression, _ in VALUES] + lines_of(TAKEN)


def test_nvrtc_takes_what_is_taken(least_major):
    lines = taken()
    assert not [lines[number] for number in errors_of_nvrtc(lines, least_major)]


def test_the_emulator_takes_what_is_taken(tmp_path):
    lines = taken()
    assert not [lines[number] for number in errors_of_emulator(lines, tmp_path)]


@pytest.mark.parametrize("text", [REFUSED, EMULATOR_ALONE], ids=["both", "NVRTC alone"])
def test_nvrtc_refuses(least_major, text):
    lines = lines_of(text)
    wrong = errors_of_nvrtc(lines, least_major)
    assert not [line for number, line in enumerate(lines) if number not in wrong]


@pytest.mark.parametrize("text", [REFUSED, NVRTC_ALONE], ids=["both", "emulator alone"])
def test_the_emulator_refuses(tmp_path, text):
    """And blames the line, no file of the emulator."""
    lines = lines_of(text)
    wrong = errors_of_emulator(lines, tmp_path)
    assert not [line for number, line in enumerate(lines) if number not in wrong]


def test_what_one_alone_takes(least_major, tmp_path):
    assert not errors_of_nvrtc(lines_of(NVRTC_ALONE), least_major)
    assert not errors_of_emulator(lines_of(EMULATOR_ALONE), tmp_path)


def test_values(device):
    cases = "\n".join(f"case {n}: y[{n} * 32 + t] = {expression}; break;" for n, (expression, _) in enumerate(VALUES))
    text = (
        f'{HEAD}extern "C" __global__ void values({PARAMETERS}) {{\n{LOCALS}\nswitch (blockIdx.x) {{\n{cases}\n}}\n}}'
    )
    y = torch.empty(len(VALUES), 32, dtype=torch.float64, device=device)
    kinds = torch.float32, torch.int32, torch.uint32, torch.float64, torch.uint64
    pointers = [torch.zeros(64, dtype=kind, device=device) for kind in kinds]
    with source.override({"values.cu": text}):
        run(
            lambda y, *p: launch(Kernel("values.cu", "values"), (len(VALUES), 1, 1), (32, 1, 1), (y, F, D, INT, L, *p)),
            y,
            *pointers,
        )
    expected = np.array([np.broadcast_to(np.asarray(value, np.float64), 32) for _, value in VALUES])
    near = np.isclose(y.cpu().numpy(), expected, rtol=1e-5, atol=1e-6)
    assert not [(*VALUES[n], y[n].tolist()) for n in np.flatnonzero(~near.all(1))]
