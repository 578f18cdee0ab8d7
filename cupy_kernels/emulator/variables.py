"""Elements of variables as the source has them, such as s[3][7], by DWARF 4: types are not in a library's symbols."""

import math
import re
import struct

from . import lines

_ARRAY, _OTHER_NAMES, _SUBRANGE, _VARIABLE = 0x01, (0x16, 0x26, 0x35), 0x21, 0x34  # tags; typedef, const, volatile
_BYTES, _LOCATION, _UPPER, _COUNT, _TYPE, _ORIGIN, _SPECIFICATION = 0x0B, 0x02, 0x2F, 0x37, 0x49, 0x31, 0x47
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
        if not address and not line and dynamic and name == "dynamic shared memory":
            name = dynamic
        item, shape = _type(library, address) if address else (0, ())
        known = item and item * math.prod(shape) == size
        if not known:
            item, shape = accessed, (size // accessed,)
            if size % accessed or offset % accessed:
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


def _type(library, address):
    """(bytes of an element, lengths of the dimensions) of the variable at a byte of the library; (0, ()) if unknown."""
    wanted = struct.pack("<BQ", _AT_ADDRESS, address)
    for unit in lines.units(library):
        entries = {place: (tag, entry) for place, tag, entry in unit}
        for tag, entry in entries.values():
            if tag == _VARIABLE and entry.get(_LOCATION) == wanted:
                while _TYPE not in entry:
                    origin = entry.get(_ORIGIN, entry.get(_SPECIFICATION))
                    if origin not in entries:
                        return 0, ()
                    _, entry = entries[origin]
                return _size(entries, entry[_TYPE])
    return 0, ()


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
