"""What the emulator says of a kernel, in terms of the kernel's own text. The emulator's stands before it."""

import re
from collections.abc import Container

INTERNAL = ("kernel.cpp", "cuda.h", "intrinsics.h", "emulator_entries")  # files that a user has not written

_MESSAGE = re.compile(r"^(?P<place>\S+?:\d+(?::\d+)?): (?P<kind>(?:fatal )?error|note|warning): (?P<what>.*)$")
_CONTEXT = re.compile(r"^(?P<place>\S+?:\d+(?::\d+)?):\s+required from ")
_SNIPPET = re.compile(r"^\s*\d* \|")
_ELSEWHERE = re.compile(r"note: '.*' is defined in header|inlined from .* at (?:\S*/)?emulator_entries:")
_POISONED = re.compile(r"attempt to use (?:a poisoned identifier|poisoned \"(\w+)\")")
_UNSET = re.compile(r"^(\S+?:\d+):\d+: warning: (?:variable )?'(\w+)' .*uninitialized", re.MULTILINE)
_DECLARED = re.compile(r"^(\S+?:\d+):\d+: note: '\w+' was declared here", re.MULTILINE)


def unset(log: str) -> list[str]:
    """What a host compiler's log says of local variables that may be read before they are set: "file:line:what"."""
    said = []
    for found in _UNSET.finditer(log):
        place, declared = found[1], _DECLARED.search(log, found.end())
        if is_internal(place) and declared:  # a function of CUDA's reads it
            place = declared[1]
        said.append(f"{place}:{found[2]} may be read before it is set")
    return [what for what in dict.fromkeys(said) if not is_internal(what)]


def of_view(message: str, addresses: dict[str, int]) -> str:
    """What to add to a message of a misaligned access if the array itself begins there. addresses: of arrays."""
    found = re.search(r"not a multiple of (\d+) bytes: (\w+)", message)
    if not found or addresses.get(found[2], 0) % int(found[1]) == 0:
        return ""
    return f". {found[2]} itself begins at such a place, as a view x[1:] does: pass a copy of it"


def of_output(message: str, outputs: Container[str]) -> str:
    """What to add to a message of a read of an output before it is written. outputs: names of the kernel's."""
    found = re.search(r"reads (\w+)\[.*, which nobody has written", message)
    if not found or found[1] not in outputs:
        return ""
    return f". {found[1]} is an output, and holds nothing at first: declare it INOUT, to change what an argument holds"


def is_internal(place: str) -> bool:
    """Whether a file, or a place in it, is the emulator's own."""
    return place.partition(":")[0].rpartition("/")[2] in INTERNAL


def of_text(log: str) -> str:
    """A host compiler's log without what it says of INTERNAL. An error there gets the place in the text that led to it.

    gcc says that place in a line before ("required from here") or behind ("in expansion of macro"), clang in the error.
    """
    kept, led, error, skipping = [], None, None, False  # error: where in `kept` one without a place stands
    for said in (said for said in log.splitlines() if not _ELSEWHERE.search(said)):
        line = _POISONED.sub(lambda match: f"'{match[1] or 'this word'}' is not there in kernels", said)
        message, context = _MESSAGE.match(line), _CONTEXT.match(line)
        if context and not is_internal(context["place"]):
            led = context["place"]
        if message and not is_internal(message["place"]):
            skipping = False
            if error is not None and message["kind"] == "note" and "macro" in message["what"]:
                kept[error] = f"{message['place']}: {kept[error]}"
                error = None
                continue
            kept.append(line)
        elif message:
            skipping = True
            if "error" in message["kind"]:
                place = f"{led}: " if led else ""
                error = None if led else len(kept)
                kept.append(f"{place}{message['kind']}: {message['what']}")
        elif not (skipping and _SNIPPET.match(line)) and not is_internal(
            line.strip().removeprefix("In file included from ")
        ):
            kept.append(line)
        led = None if message else led
    return "\n".join(kept) + "\n"
