"""What a compiled library says of itself: its sections, and its variables."""

import re
import struct
from typing import NamedTuple

SHARED = "cu_shared"  # the section of __shared__ variables
GAP = 256  # bytes between them that belong to none; the most that a variable is aligned to


class Variable(NamedTuple):
    """A __shared__ or __device__ variable, and where it is in the library's memory."""

    name: str
    address: int
    bytes: int
    shared: bool


def with_gaps(assembly: str) -> str:
    """The assembly with GAP bytes before each __shared__ variable, and behind the last."""
    section, found = "", []
    for line in assembly.splitlines():
        words = line.replace(",", " ").split()
        if words and words[0] in (".section", ".text", ".data", ".bss"):
            section = words[-1 if len(words) == 1 else 1]
        elif section == SHARED and re.match(r"[\w.$]+:", line):
            found.append(f"\t.zero {GAP}")
        found.append(line)
    end = f'\t.section {SHARED},"aw",@progbits\n\t.zero {GAP}\n'
    return "\n".join(found) + "\n" + (end if f"\t.zero {GAP}" in found else "")


def variables(elf: bytes) -> list[Variable]:
    """The variables of the library's text that can be written."""
    names, table, texts = _headers(elf)[1], section(elf, ".symtab"), section(elf, ".strtab")
    found = []
    for name, info, _, index, address, size in struct.iter_unpack("<IBBHQQ", table):
        where, symbol = names[index] if index < len(names) else "", _text(texts, name)
        is_object = info & 15 == 1 and size and symbol != "completed.0"  # one of the linker's
        if is_object and where in (SHARED, ".data", ".bss"):
            found.append(Variable(_demangled(symbol), address, size, where == SHARED))
    return found


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


def _demangled(symbol):
    """The name alone: "s" of _ZZ6kernelE1s."""
    found = symbol
    for digits in re.finditer(r"\d+", symbol):
        end = digits.end() + int(digits[0])
        if end == len(symbol) or re.fullmatch(r"_\d+|\.\d+|[A-Z_].*", symbol[end:]):
            found = symbol[digits.end() : end] or found
    return found
