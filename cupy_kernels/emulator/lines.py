"""From a place in a library to lines of the source, by DWARF 4's tables: a user may have no tool for that."""

import functools
import struct

from . import elf

_INLINED, _FUNCTION = 0x1D, 0x2E  # tags of a function's copy inside of another, and of a function
_LOW, _HIGH, _LINES, _RANGES = 0x11, 0x12, 0x10, 0x55  # attributes
_ORIGIN, _CALL_COLUMN, _CALL_FILE, _CALL_LINE = 0x31, 0x57, 0x58, 0x59
_FIXED = {0x01: 8, 0x05: 2, 0x06: 4, 0x07: 8, 0x0B: 1, 0x0C: 1, 0x0E: 4, 0x10: 4, 0x11: 1}  # forms of so many bytes
_FIXED |= {0x12: 2, 0x13: 4, 0x14: 8, 0x17: 4, 0x19: 0, 0x20: 8}
_LENGTHS = {0x03: "<H", 0x04: "<I", 0x0A: "<B"}  # blocks: what their length is
_ADDRESS, _STRING, _SIGNED, _UNSIGNED = 0x01, 0x08, 0x0D, (0x0F, 0x15)


def places(library: bytes, address: int) -> list[str]:
    """ "file:line:column" of the instruction at or before a byte of the library, and of the calls that led there.

    The calls are those of functions that the compiler has copied into their caller: the innermost function comes first.
    """
    for rows, calls, _ in _tables(library):
        if found := [place for start, end, place in rows if start <= address < end][-1:]:
            inside = (place for place, ranges in calls if any(low <= address < high for low, high in ranges))
            return found + [*inside][::-1]
    return []


def functions(library: bytes, address: int) -> list[int]:
    """The functions that `places` is in, innermost first, as numbers. Each instance of a template is another one."""
    for rows, _, found in _tables(library):
        if any(start <= address < end for start, end, _ in rows):
            return [number for number, ranges in found if any(low <= address < high for low, high in ranges)][::-1]
    return []


@functools.lru_cache(8)  # it is asked for many addresses of a library
def _tables(library):
    """Of each part of the library: [(start, end, place)] of lines, [(place, [(start, end)])] of copies' calls, and
    [(number, [(start, end)])] of functions and their copies.
    """
    line, ranges = (elf.section(library, f".debug_{name}") for name in ("line", "ranges"))
    tables = []
    for entries in units(library):
        _, _, whole = next(entries)
        table = line[whole[_LINES] :]
        table = table[4 : 4 + struct.unpack_from("<I", table)[0]]
        files, _ = _files(table)
        calls, functions = [], []
        for number, tag, entry in entries:
            if tag not in (_INLINED, _FUNCTION):
                continue
            parts = [*_ranges(entry, ranges, whole.get(_LOW, 0))]
            functions.append((entry.get(_ORIGIN, number), parts))
            if tag == _INLINED and _CALL_FILE in entry:
                place = f"{files[entry[_CALL_FILE]]}:{entry[_CALL_LINE]}:{entry.get(_CALL_COLUMN, 0)}"
                calls.append((place, parts))
        tables.append(([*_rows(table)], calls, functions))
    return tables


def units(library: bytes):
    """Of each part of the library: (place, tag, {attribute: value}) of each entry, those inside of another behind it.

    Texts that are not in the entry itself are places in the section .debug_str.
    """
    info, abbreviations = (elf.section(library, f".debug_{name}") for name in ("info", "abbrev"))
    while info:
        length, version, start = struct.unpack_from("<IHI", info)
        unit, info = info[: 4 + length], info[4 + length :]
        if version == 4:
            yield _entries(unit, _kinds(abbreviations[start:]))


def _ranges(entry, ranges, base):
    """(start, end) of each part of an entry's instructions."""
    if _RANGES not in entry:
        if _LOW in entry:
            yield entry[_LOW], entry[_LOW] + entry[_HIGH]
        return
    at = entry[_RANGES]
    while True:
        low, high = struct.unpack_from("<QQ", ranges, at)
        at += 16
        if low == high == 0:
            return
        if low == 2**64 - 1:
            base = high
        else:
            yield base + low, base + high


def _kinds(table):
    """{number: (tag, [(attribute, form)])} of the kinds of entries that a unit has."""
    kinds, at = {}, 0
    while table[at]:
        number, at = _number(table, at)
        tag, at = _number(table, at)
        at += 1
        pairs = []
        while True:
            attribute, at = _number(table, at)
            form, at = _number(table, at)
            if not attribute:
                break
            pairs.append((attribute, form))
        kinds[number] = tag, pairs
    return kinds


def _entries(unit, kinds):
    at = 11
    while at < len(unit):
        place = at
        number, at = _number(unit, at)
        if not number:
            continue
        tag, pairs = kinds[number]
        entry = {}
        for attribute, form in pairs:
            value = None
            if form in _FIXED:
                size = _FIXED[form]
                value = int.from_bytes(unit[at : at + size], "little")
                at += size
            elif form == _STRING:
                value = unit[at : unit.index(b"\0", at)]
                at += len(value) + 1
            elif form == _SIGNED or form in _UNSIGNED:
                value, at = _number(unit, at, signed=form == _SIGNED)
            else:
                if form in _LENGTHS:
                    (length,) = struct.unpack_from(_LENGTHS[form], unit, at)
                    at += struct.calcsize(_LENGTHS[form])
                else:
                    length, at = _number(unit, at)
                value = unit[at : at + length]
                at += length
            entry[attribute] = value
        yield place, tag, entry


def _files(table):
    """(names of a line table's files, number of operands of its standard opcodes)"""
    opcode_base = table[11]
    lengths = table[12 : 11 + opcode_base]
    at = table.index(b"\0\0", 11 + opcode_base) + 2 if table[11 + opcode_base] else 12 + opcode_base
    files = [""]
    while table[at]:
        end = table.index(b"\0", at)
        files.append(table[at:end].decode(errors="replace"))
        at = end + 1
        for _ in range(3):
            _, at = _number(table, at)
    return files, lengths


def _rows(unit):
    """(address, next row's address, "file:line:column") of each row."""
    _, header = struct.unpack_from("<HI", unit)
    least, _, _, base, span, opcode_base = struct.unpack_from("<BBBbBB", unit, 6)
    files, lengths = _files(unit)
    at, before = header + 6, None
    address, file, number, column = 0, 1, 1, 0
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
                    yield before[0], address, before[1]
                address, file, number, column, before = 0, 1, 1, 0, None
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
        elif opcode == 5:
            column, at = _number(unit, at)
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
                yield before[0], address, before[1]
            before = address, f"{files[file]}:{number}:{column}"


def _number(data, at, signed=False):
    value = shift = 0
    while True:
        byte = data[at]
        at += 1
        value |= (byte & 127) << shift
        shift += 7
        if byte < 128:
            return value - (1 << shift if signed and byte & 64 else 0), at
