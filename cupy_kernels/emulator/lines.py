"""From a place in a library to a line of the source, by DWARF's line table: a user may have no tool for that."""

import struct
from pathlib import Path


def line(library: Path, address: int) -> str | None:
    """ "file:line" of the instruction at or before `address`, a library's byte; None if the table does not say."""
    data = library.read_bytes()
    table = _section(data, b".debug_line")
    best = None
    while table:
        (length,) = struct.unpack_from("<I", table)
        unit, table = table[4 : 4 + length], table[4 + length :]
        for start, end, name, number in _rows(unit):
            if start <= address < end:
                best = f"{name}:{number}"
    return best


def _section(elf, wanted):
    (sections,) = struct.unpack_from("<Q", elf, 0x28)
    size, count, names = struct.unpack_from("<HHH", elf, 0x3A)
    headers = [struct.unpack_from("<IIQQQQ", elf, sections + i * size) for i in range(count)]
    strings = headers[names][4]
    for name, _, _, _, offset, length in headers:
        if elf[strings + name : elf.index(b"\0", strings + name)] == wanted:
            return elf[offset : offset + length]
    return b""


def _rows(unit):
    """(address, next row's address, file, line) of each row."""
    version, header = struct.unpack_from("<HI", unit)
    if version != 4:
        return
    least, _, _, base, span, opcode_base = struct.unpack_from("<BBBbBB", unit, 6)
    lengths = unit[12 : 11 + opcode_base]
    at = unit.index(b"\0\0", 11 + opcode_base) + 2 if unit[11 + opcode_base] else 12 + opcode_base
    files = [""]
    while unit[at]:
        end = unit.index(b"\0", at)
        files.append(unit[at:end].decode(errors="replace"))
        at = end + 1
        for _ in range(3):
            _, at = _number(unit, at)
    at, before = header + 6, None
    address, file, number = 0, 1, 1
    while at < len(unit):
        opcode, at, row = unit[at], at + 1, False
        if opcode >= opcode_base:
            address += (opcode - opcode_base) // span * least
            number += base + (opcode - opcode_base) % span
            row = True
        elif opcode == 0:
            size, at = _number(unit, at)
            kind, end = unit[at], at + size
            if kind == 1:
                if before:
                    yield (before[0], address, *before[1:])
                address, file, number, before = 0, 1, 1, None
            elif kind == 2:
                (address,) = struct.unpack_from("<Q", unit, at + 1)
            at = end
        elif opcode == 1:
            row = True
        elif opcode == 2:
            step, at = _number(unit, at)
            address += step * least
        elif opcode == 3:
            step, at = _number(unit, at, signed=True)
            number += step
        elif opcode == 4:
            file, at = _number(unit, at)
        elif opcode == 8:
            address += (255 - opcode_base) // span * least
        elif opcode == 9:
            address += struct.unpack_from("<H", unit, at)[0]
            at += 2
        else:
            for _ in range(lengths[opcode - 1]):
                _, at = _number(unit, at)
        if row:
            if before:
                yield (before[0], address, *before[1:])
            before = address, files[file], number


def _number(data, at, signed=False):
    value = shift = 0
    while True:
        byte = data[at]
        at += 1
        value |= (byte & 127) << shift
        shift += 7
        if byte < 128:
            return value - (1 << shift if signed and byte & 64 else 0), at
