"""Elements of variables as the source has them, such as s[3][7], by DWARF 4: types are not in a library's symbols."""

import math
import re
import struct

from . import elf, lines

DYNAMIC = "dynamic shared memory"  # its name in runtime.cpp
_ARRAY, _SUBRANGE, _VARIABLES, _OTHER_NAMES = 0x01, 0x21, (0x34, 0x05), (0x16, 0x26, 0x35)  # tags; typedef, const, ...
_NAME, _LINE, _LOCATION, _TYPE, _BYTES = 0x03, 0x3B, 0x02, 0x49, 0x0B  # attributes
_UPPER, _COUNT, _ORIGIN, _SPECIFICATION = 0x2F, 0x37, 0x31, 0x47
_AT_ADDRESS = 3  # the expression of a location that is an address
_MARK = re.compile(r"\{([=#])([^|}]*)\|(-?\d+)\|(-?\d+)\|(\d+)\|(\d+)\}")


def named(message: str, library: bytes, dynamic: str | None) -> str:
    """The message with elements in place of what accesses.cpp knows of them.

    dynamic: the name of dynamic shared memory, if it has one. Where the type is not known, elements have as many bytes
    as the access.
    """

    def element(match):
        what, name, *numbers = match.groups()
        address, offset, size, accessed = map(int, numbers)
        name, _, line = name.partition(":")
        name = name.partition(".")[0]  # clang names a copy of v in another function v.i
        if name == DYNAMIC:
            name, types = dynamic or name, ()
        else:
            types = _types(library, address, name, int(line or 0))
        found = {(item, shape) for item, shape in types if item * math.prod(shape) == size}
        known = len(found) == 1
        item, shape = found.pop() if known else (accessed, (size // accessed,))
        if (offset % item and not (known and shape)) or item * math.prod(shape) != size:
            return f"{size} bytes" if what == "#" else f"{name}, byte {offset}"
        if what == "#":
            return " x ".join(map(str, shape or (1,))) + " elements" + ("" if known else f" of {item} bytes")
        index, flat = [], offset // item
        for length in shape[:0:-1]:
            index.append(flat % length)
            flat //= length
        if not shape and not flat:
            return name
        return name + "".join(f"[{i}]" for i in (flat, *index[::-1]))

    return _MARK.sub(element, message)


def _types(library, address, name, line):
    """(bytes of an element, lengths of the dimensions) of the variable at a byte of the library.

    Local ones have no such byte: all of that name, and on that line if it is known.
    """
    at_address, texts = struct.pack("<BQ", _AT_ADDRESS, address), elf.section(library, ".debug_str")

    def is_wanted(entry):
        if address:
            return entry.get(_LOCATION) == at_address
        found = entry.get(_NAME, b"")
        if isinstance(found, int):
            found = texts[found : texts.index(b"\0", found)]
        return found == name.encode() and entry.get(_LINE) == (line or entry.get(_LINE))

    for unit in lines.units(library):
        entries = {place: (tag, entry) for place, tag, entry in unit}
        for tag, entry in entries.values():
            if tag in _VARIABLES and is_wanted(entry):
                while _TYPE not in entry and (origin := entry.get(_ORIGIN, entry.get(_SPECIFICATION))) in entries:
                    _, entry = entries[origin]
                if _TYPE in entry:
                    yield _size(entries, entry[_TYPE])


def _size(entries, place):
    tag, entry = entries[place]
    if tag in _OTHER_NAMES:
        return _size(entries, entry[_TYPE])
    if tag != _ARRAY:
        return entry.get(_BYTES, 0), ()
    item, inner = _size(entries, entry[_TYPE])
    places = sorted(entries)
    shape = []
    for next_place in places[places.index(place) + 1 :]:
        tag, length = entries[next_place]
        if tag != _SUBRANGE:
            break
        shape.append(length[_COUNT] if _COUNT in length else length.get(_UPPER, -1) + 1)
    return item, (*shape, *inner)
