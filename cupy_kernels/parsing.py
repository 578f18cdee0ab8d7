"""Parses kernel sources: where kernels are in the text, and their parameters."""

import functools
import re
from collections.abc import Container

# Comments and strings are tokens of their own, so that braces in them do not count.
_BRACES = re.compile(r'//[^\n]*|/\*.*?\*/|"(?:\\.|[^"\\])*"|[{}]', re.DOTALL)
_PARENTHESES = r"\((?:[^()]|\((?:[^()]|\([^()]*\))*\))*\)"
_ATTRIBUTES = rf"(?:(?:static|inline|__(?:launch_bounds|maxnreg|attribute|cluster_dims)__\s*{_PARENTHESES})\s*)*"
_KERNEL = re.compile(  # it begins where blanks begin, not at each of them
    rf'(?<![ \t])[ \t]*(extern\s+"C"\s+)?{_ATTRIBUTES}__global__\s+{_ATTRIBUTES}void\s+{_ATTRIBUTES}'
    rf"(\w+)\s*({_PARENTHESES})\s*(?=\{{)"
)
_NO_TYPE = ("*", "const", "volatile", "INOUT", "__restrict__", "__restrict", "__grid_constant__", "struct")
_ALIGNED = r"(?:(?:__align__|alignas|__attribute__)\s*\([^;]*?\)+\s*)?"
EXTERN_SHARED = re.compile(
    rf"\b(?:extern\s+{_ALIGNED}((?:volatile\s+)?)__shared__|__shared__\s+extern)\s+{_ALIGNED}"
    rf"([\w:<>, ]+?)\s*\b(?P<name>\w+)\s*\[\s*\]((?:\s*\[[^]]*\])*)\s*{_ALIGNED};"
)
_DYNAMIC_SHARED = re.compile(r"(?<!define )\bDYNAMIC_SHARED\([^;]*?(?P<name>\w+)\)\s*;")  # the macro of common.cuh
_C_BLOCK = re.compile(r'\bextern\s+"C"\s*\{')
SYNONYMS = {
    "long long": "i64",
    "long long int": "i64",
    "signed": "int",
    "unsigned int": "unsigned",
    "unsigned char": "u8",
}


def span(text, name) -> tuple[int, int] | None:
    """(start, end) of the definition of the kernel `name` in `text`; None if it is not there."""
    match = definitions(text).get(name)
    return match and (match.start(), _end(text, match) or len(text))


def unfinished(text) -> list[str]:
    """Kernels of `text` whose body does not end."""
    return [name for name, match in definitions(text).items() if not _end(text, match)]


@functools.lru_cache(64)
def definitions(text: str) -> dict[str, re.Match]:
    """{name: match of the declaration} of the kernels that `text` defines, extern "C" or inside such a block."""
    code = _without_comments(text)
    blocks = [range(block.end(), _end(code, block, 1) or len(code)) for block in _C_BLOCK.finditer(code)]
    found = [m for m in _KERNEL.finditer(code) if m[1] or any(m.start(2) in block for block in blocks)]
    return {match[2]: match for match in found}


def _without_comments(text):
    return _BRACES.sub(lambda token: re.sub(r"[^\n]", " ", token[0]) if token[0][0] == "/" else token[0], text)


def dynamic_shared(text: str, kernels: Container[str]) -> set[str]:
    """Names of the dynamic shared memory that `text` declares in these kernels and outside of kernels."""
    code = _without_comments(text)
    found = [*EXTERN_SHARED.finditer(code), *_DYNAMIC_SHARED.finditer(code)]
    others = [range(*span(text, name)) for name in definitions(text) if name not in kernels]
    return {match["name"] for match in found if not any(match.start() in other for other in others)}


def _end(text, declaration, depth=0) -> int | None:
    for token in _BRACES.finditer(text, declaration.end()):
        depth += {"{": 1, "}": -1}.get(token[0], 0)
        if token[0] == "}" and depth == 0:
            return token.end()
    return None


def declarations(text: str) -> dict[str, list[tuple[str, str]]]:
    """{kernel: [(type, name) of each parameter]} of the kernels in `text`; types as "const scalar_t*"."""
    return {
        name: [_split(p) for p in match[3][1:-1].split(",") if p.strip() not in ("", "void")]
        for name, match in definitions(text).items()
    }


def bounds(text: str) -> dict[str, str]:
    """{kernel: the number of threads in its __launch_bounds__, as `text` has it}"""
    found = {name: re.search(rf"__launch_bounds__\s*({_PARENTHESES})", m[0]) for name, m in definitions(text).items()}
    return {name: match[1][1:-1].split(",")[0] for name, match in found.items() if match}


def _split(declaration: str) -> tuple[str, str]:
    found = re.fullmatch(r"(.*?)(\w+)\s*((?:\[[^]]*\])?)", declaration.strip(), re.DOTALL)
    if (
        not found
        or not found[1]
        or re.search(r"[^\w\s*]", found[1])
        or (found[1] + found[3]).count("*") + bool(found[3]) > 1
    ):
        raise ValueError(
            f"a kernel's parameter is an array, as in const float* x, or a number, as in int size; received "
            f"{declaration.strip()!r}. Pass several arrays one by one, and what belongs together as numbers"
        )
    words = found[1].replace("*", " * ").split()
    kind = " ".join(w for w in words if w not in _NO_TYPE)
    pointee = words[: words.index("*")] if "*" in words else words  # behind it, const is the pointer's
    marks = [w for w in ("INOUT", "const") if w in pointee]
    pointer = "*" if found[3] or "*" in words else ""
    return " ".join([*marks, SYNONYMS.get(kind, kind)]) + pointer, found[2]
