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
_WRONG_INDEX = re.compile(rf"\{{@(reads|writes) (-?\d+) ([^{{}}]*){_MARK.pattern}\}}")


def named(message: str, library: bytes, dynamic: str | None) -> str:
    """The message with elements in place of what accesses.cpp knows of them.

    dynamic: the name of dynamic shared memory, if it has one. Where the type is not known, elements have as many bytes
    as the access.
    """

    def variable(name, address, size, accessed):
        """Its name, bytes of an element, lengths of its dimensions, and whether these are known."""
        name, _, line = name.partition(":")
        name = name.partition(".")[0]  # clang names a copy of v in another function v.i
        if name == DYNAMIC:
            return dynamic or name, accessed, (size // accessed,), False
        found = {v for v in _types(library, address, name, int(line or 0)) if v[0] * math.prod(v[1]) == size}
        return (name, *found.pop(), True) if len(found) == 1 else (name, accessed, (size // accessed,), False)

    def element(match):
        what, name, *numbers = match.groups()
        address, offset, size, accessed = map(int, numbers)
        name, item, shape, known = variable(name, address, size, accessed)
        if (offset % item and not (known and shape)) or item * math.prod(shape) != size:
            return f"{size} bytes" if what == "#" else f"{name}, byte {offset}"
        if what == "#":
            return " x ".join(map(str, shape or (1,))) + " elements" + ("" if known else f" of {item} bytes")
        flat = offset // item
        return name + _indices(flat, shape or (1,)) if shape or flat else name

    def wrong_index(match):
        """Where the access behind it can be the one by this index of this type: which element."""
        did, index, of, _, name, *numbers = match.groups()
        address, offset, size, accessed = map(int, numbers)
        name, item, shape, known = variable(name, address, size, accessed)
        lengths = tuple(map(int, re.findall(r"\[(\d+)\]", of)))
        step, depth = math.prod(lengths[1:]), len(lengths)
        if not known:
            shape = (size // item // math.prod(lengths), *lengths)
        outer, inner = divmod(offset // item - int(index) * step, math.prod(lengths))
        if shape[-depth:] != lengths or inner >= step or not 0 <= outer < math.prod(shape[:-depth]):
            return f": index {index} is out of bounds of {of}"
        where = f"{name}{_indices(outer, shape[:-depth])}[{index}]{_indices(inner, lengths[1:])}"
        return f" {did} out of bounds: {where}, which has {' x '.join(map(str, shape))} elements"

    return _MARK.sub(element, _WRONG_INDEX.sub(wrong_index, message))


def _indices(flat, shape):
    """As "[1][2]"."""
    if not shape:
        return ""
    outer, last = divmod(flat, shape[-1]) if shape[1:] else (0, flat)
    return f"{_indices(outer, shape[:-1])}[{last}]"


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
