"""Advice in error messages, for headers, names and types that kernels do not have."""

import re

_BY_PYTORCH = "sort and scan by PyTorch before or after the kernel, as in torch.sort and torch.cumsum"
_CONTAINERS = f"for a container take a local or __shared__ array, as in float s[8], or a tensor; {_BY_PYTORCH}"
_HALF = "half_t and bf16_t of common.cuh are converted by to_acc and from_acc<half_t>"
_HEADERS = {  # the first that matches counts
    r"math\.h cmath": "mathematics is there without a header",
    r"stdint\.h cstdint": "write int, unsigned, long long, or i64 and u8 of common.cuh",
    r"limits\.h climits float\.h cfloat limits": "write the number; common.cuh has is_nan and is_finite",
    r"(stdio|assert|string)\.h c(stdio|assert|string)": "printf, assert, memcpy and memset are there without a header",
    "iostream": "print by printf, which is there without a header",
    r"cuda_fp16\.h cuda_bf16\.h": _HALF,
    r"cooperative_groups\.h": "__syncthreads, __syncwarp, __shfl_sync and the like are there without a header",
    r"(cuda|cuda_runtime|device_\w+|vector_\w+)\.h": "leave it out: CUDA's functions and types are there without it",
    r"(torch|ATen|c10)/.*": "leave it out: a kernel takes pointers and numbers, which Python passes",
    r"curand.*": "take random numbers from a tensor, as torch.rand makes",
    r"(cub|thrust)/.*": f"warp_sum, warp_max and block_sum of common.cuh reduce; {_BY_PYTORCH}",
    r"[a-z_]+": f"NVRTC has no standard library. max, min, abs and sqrt are there without a header; {_CONTAINERS}",
    r".*": "NVRTC finds no such file. Write what you need of it into the text",
}
_NAMES = {
    "INFINITY HUGE_VAL HUGE_VALF": "write 1.0f / 0.0f",
    "NAN": 'write nanf(""); common.cuh has is_nan',
    r"(FLT|DBL|U?INT|U?LONG|U?LLONG)_(MAX|MIN|EPSILON)": "write the number; common.cuh has is_finite",
    r"M_\w+": "write the number",
    r"u?int(8|16|32|64)_t u?intptr_t": "write int, unsigned, long long, or i64 and u8 of common.cuh",
    r"(__)?half2? __half_raw __nv_bfloat16 __\w*2half\w* __half2\w+": _HALF,
    "cout cerr endl": "print by printf",
    "std": f"functions such as max, min, abs and sqrt are there without std::; {_CONTAINERS}",
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
_VECTOR = re.compile("(u?char|u?int|u?longlong|float|double)([1-4])")
_TYPES = {
    "size_t int64_t long(int)? longlong": "i64",
    "uint64_t unsignedlong(int)? ulonglong": "unsigned long long",
    "int32_t int16_t short(int)?": "int",
    "uint32_t uint16_t unsignedshort(int)? ushort uint": "unsigned",
    "int8_t char": "signed char",
    "uint8_t uchar": "u8",
    "(__)?half (__)?nv_bfloat16": "half_t or bf16_t",
}


def of_header(name: str) -> str:
    """What replaces a header, which NVRTC's wheels do not include."""
    return next(hint for headers, hint in _HEADERS.items() if _any(headers, name))


def of_type(kind: str, *, pointer: bool) -> str:
    """What replaces a parameter's type; "" for types that are not known here."""
    if vector := _VECTOR.fullmatch(kind):
        element, count = of_type(vector[1], pointer=pointer) or vector[1], vector[2]
        if not pointer:
            return f"{count} numbers of type {element}"
        return (
            f"{element}*, and cast in the kernel: reinterpret_cast<{kind}*>(y)[i], or <const {kind}*> where it is "
            f"const. There are size / {count} of these: pass lengths that are multiples of {count}, and no view, as "
            "in x[1:], which begins between two"
        )
    return next((hint for kinds, hint in _TYPES.items() if _any(kinds, kind.replace(" ", ""))), "")


def _any(patterns, name):
    return any(re.fullmatch(pattern, name) for pattern in patterns.split())


def of_message(message: str) -> str:
    """What replaces the names that a compiler's message quotes; "" for names that are not known here."""
    # Of a call without a place: the emulator's of the kernel.
    if re.search(r'has "C" linkage|declaration of C function|^error: (no .* )?call (of|to)', message, re.MULTILINE):
        return "the kernel has the name of a function of CUDA or of the emulator: give it another"
    if re.search(r"ambiguous|more than one instance of overloaded function", message):
        return (
            "a call is ambiguous: write 0.0f for 0 in max(x, 0) of a float x, and in from_acc<scalar_t>(0); and "
            "(float)i for an integer in sqrt(i)"
        )
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
            if _any(names, name):
                return f"{name}: {hint}"
    if half := re.search(r"(no (match|viable|suitable)|cannot convert|invalid operands).*\b(half_t|bf16_t)\b", message):
        return f"{half[3]} is a type of memory: compute with to_acc(v), and store from_acc<{half[3]}>(v)"
    return ""
