"""What a compiled library says of itself: its sections, and its variables."""

import re
import struct
from typing import NamedTuple

SHARED, CONSTANT = "cu_shared", "cu_constant"  # the sections of __shared__ and __constant__ variables
GAP = 256  # bytes between variables that belong to none; the most that one is aligned to
_SHARED_BY_GCC = re.compile(rf'^\s+\.section\s+(?:{SHARED}\d+,|\S+,"aw\w*R").*', re.MULTILINE)  # R: retain of cuda.h
_NUMBERED_CONSTANT = re.compile(rf"^\s+\.section\s+{CONSTANT}\d+,.*", re.MULTILINE)
_OF_SHARED, _OF_CONSTANT = (f'\t.section {name},"aw",@progbits' for name in (SHARED, CONSTANT))
_SECTIONS = (SHARED, CONSTANT, ".data", ".bss", ".rodata")


class Variable(NamedTuple):
    """A variable outside of functions or a __shared__ one, and where it is in the library's memory."""

    name: str
    address: int
    bytes: int
    shared: bool
    constant: bool


def with_gaps(assembly: str) -> str:
    """The assembly with GAP bytes before each variable and behind the last __shared__ one, and these in one section."""
    assembly = _NUMBERED_CONSTANT.sub(_OF_CONSTANT, _SHARED_BY_GCC.sub(_OF_SHARED, assembly))
    section, found, at, gap = "", [], 0, f"\t.zero {GAP}\n"
    for match in re.finditer(r"^(?:\s+\.(?:section\s+([^\s,]+)|(text|data|bss)\b)|[\w.$]+:)", assembly, re.MULTILINE):
        if not match[0].endswith(":"):
            section = match[1] or match[2]
        elif section in _SECTIONS:
            found += [assembly[at : match.start()], gap]
            at = match.start()
    end = f"{_OF_SHARED}\n{gap}" if found else ""
    return "".join(found) + assembly[at:] + end


def lost(assembly: str) -> str:
    """A variable of a function that may be a template's __shared__ one, where g++ cannot retain; "" if none is."""
    found = re.search(r"^\s+\.(?:local\s+|section\s+\.bss\.)(_ZZ\w+)", assembly, re.MULTILINE)
    return demangled(found[1]) if found else ""


def variables(elf: bytes) -> list[Variable]:
    """The variables of the library's text."""
    names, table, texts = _headers(elf)[1], section(elf, ".symtab"), section(elf, ".strtab")
    found = []
    for name, info, _, index, address, size in struct.iter_unpack("<IBBHQQ", table):
        where, symbol = names[index] if index < len(names) else "", _text(texts, name)
        is_object = info & 15 == 1 and size and symbol != "completed.0"  # one of the linker's
        if is_object and where in _SECTIONS:
            found.append(Variable(demangled(symbol), address, size, where == SHARED, where in (CONSTANT, ".rodata")))
    return found


def computed(elf: bytes) -> str:
    """What has an initial value that code must compute, which kernels do not run; "" if nothing has."""
    texts = section(elf, ".strtab")
    for name, *_ in struct.iter_unpack("<IBBHQQ", section(elf, ".symtab")):
        symbol = _text(texts, name)
        if symbol.startswith("_ZGVZ"):  # whether it is set
            return f"the variable {demangled(symbol)!r} has a constructor, or an initial value that is computed"
        if symbol.startswith("_GLOBAL__sub_I_"):
            return "a variable outside of functions has a constructor, or an initial value that is computed"
    return ""


def section(elf: bytes, wanted: str) -> bytes:
    """What a section has in it; nothing if there is none."""
    headers, names = _headers(elf)
    for name, (_, kind, _, _, offset, length, *_) in zip(names, headers):
        if name == wanted and kind != 8:  # 8: it takes no place in the file
            return elf[offset : offset + length]
    return b""


def _headers(elf):
    (sections,) = struct.unpack_from("<Q", elf, 0x28)
    size, count, names = struct.unpack_from("<HHH", elf, 0x3A)
    headers = [struct.unpack_from("<IIQQQQIIQQ", elf, sections + i * size) for i in range(count)]
    texts = elf[headers[names][4] :]
    return headers, [_text(texts, header[0]) for header in headers]


def _text(texts, start):
    return texts[start : texts.index(b"\0", start)].decode(errors="replace")


def demangled(symbol: str) -> str:
    """The name alone: "s" of _ZZ6kernelE1s."""
    found = symbol
    for digits in re.finditer(r"\d+", symbol):
        end = digits.end() + int(digits[0])
        if end == len(symbol) or re.fullmatch(r"_\d+|\.\d+|[A-Z_].*", symbol[end:]):
            found = symbol[digits.end() : end] or found
    return found
