"""Advice in error messages, for headers and names that kernels do not have."""

import re

_HEADERS = {
    "math.h cmath": "mathematics is there without a header",
    "stdint.h cstdint": "write int, unsigned, long long, or i64 and u8 of common.cuh",
    "limits.h climits float.h cfloat limits": "write the number; common.cuh has is_nan and is_finite",
    "stdio.h cstdio assert.h cassert string.h cstring": "printf, assert, memcpy and memset are there without a header",
    "cuda_fp16.h cuda_bf16.h": "half_t and bf16_t of common.cuh are converted by to_acc and from_acc<half_t>",
    "cooperative_groups.h": "__syncthreads, __syncwarp, __shfl_sync and the like are there without a header",
}
_NAMES = {
    "INFINITY HUGE_VAL HUGE_VALF": "write 1.0f / 0.0f",
    "NAN": 'write nanf(""); common.cuh has is_nan',
    r"(FLT|DBL|U?INT|U?LONG|U?LLONG)_(MAX|MIN|EPSILON)": "write the number; common.cuh has is_finite",
    r"M_\w+": "write the number",
    r"u?int(8|16|32|64)_t u?intptr_t": "write int, unsigned, long long, or i64 and u8 of common.cuh",
    r"(__)?half2? __half_raw __nv_bfloat16 __\w*2half\w* __half2\w+": _HEADERS["cuda_fp16.h cuda_bf16.h"],
    "std": "functions such as max, min, abs and sqrt are there without std::",
    "cooperative_groups": "__syncthreads, __syncwarp, __shfl_sync and the like are there instead",
    r"__shfl(_xor|_up|_down)? __ballot __any __all": "those of today have a mask, as __shfl_sync(0xFFFFFFFFu, ...)",
    "from_acc": "from_acc<T> gives float, double, half_t and bf16_t: cast to others, as in (int)v",
    "malloc new": "the emulator has no memory of kernels' own: use __shared__, a local array, or an argument",
    "asm": "the emulator has no PTX: write `#ifndef CUPY_KERNELS_EMULATOR` around it, and the same in C++ for it",
}
_ASSEMBLY = (  # what g++, clang and the assembler say of PTX
    "no such instruction|must specify a single register|invalid 'asm'|impossible constraint|inline assembly|"
    "constraint '.*' in asm|invalid instruction mnemonic|unknown directive|invalid register name"
)
_COMMON = "INOUT i64 u8 half_t bf16_t to_acc from_acc warp_sum warp_max block_sum is_nan is_finite"


def of_header(name: str) -> str:
    """What replaces a header, which NVRTC's wheels do not include."""
    return next((hint for headers, hint in _HEADERS.items() if name in headers.split()), "leave it out")


def of_message(message: str) -> str:
    """What replaces the names that a compiler's message quotes; "" for names that are not known here."""
    if re.search(r"ambiguous|more than one instance of overloaded function", message):
        return "a call is ambiguous: write 0.0f for 0 in max(x, 0) of a float x, and in from_acc<scalar_t>(0)"
    if re.search("Unresolved extern function '_Z[45]powi", message):
        return "NVRTC 11.8 has no pow with an int as exponent: write pow(x, 2.0f) or x * x"
    if product := re.search(r"Unresolved extern function '_Z\d+(__dp4a|__dp2a_lo|__dp2a_hi)", message):
        return (
            f"NVRTC 11.8 has no {product[1]}: write out the sum of products, or install the extra cuda12 or cuda13, "
            "whose NVRTC has it"
        )
    if re.search("execution space annotations|annotation on lambda|lambda closure class", message):
        return (
            "write __device__ in front of each function, operator() and constructor that is no kernel, also where it "
            "is constexpr. A lambda takes no __device__: write it inside a function, with types in place of auto"
        )
    if "without memory space annotations" in message:
        return "write __constant__ in front of a variable that stands outside of functions, or constexpr"
    if re.search(_ASSEMBLY, message):
        return f"asm: {_NAMES['asm']}"
    missing = re.search("not (been )?declared|undeclared|is undefined|unknown type|not name a type", message)
    for name in re.findall(r"['\"]([A-Za-z_]\w*)", message):
        if missing and name in _COMMON.split():
            return f'{name}: #include "common.cuh" declares it'
        for names, hint in _NAMES.items():
            if any(re.fullmatch(pattern, name) for pattern in names.split()):
                return f"{name}: {hint}"
    return ""
