"""The error for a text that does not compile, from the logs of one or two compilers."""

import contextlib
import re

from . import hints
from .errors import KernelCompileError
from .source import Kernel, Variant, text

MACROS = "macros"  # the file's name in messages of the emulator's compiler about a macro

_ERROR = re.compile(r"([\w.]+)[(:](\d+)(?::\d+|\))?: (?:\w+ )?[Ee]rror\b[^:]*(?:: *)?(.*)")
# What compilers say of no use here: excerpts of the text, of which ours takes the place, headings and counts.
_NOISE = re.compile(
    r"[\s^~]*|\s*\d* \|.*|\S+: (In [\w ]*function\b|At ).*|compilation terminated\.|"
    r"[\w+]+: warning: argument unused .*|\d+ errors? (generated|detected in the compilation of ).*"
)


def compile_error(what: Kernel | Variant, log: str, second: str = "", second_log: str = "") -> KernelCompileError:
    """The error for a compiler's log. It starts with the first message that names a line of a kernel source.

    second: a second compiler that refuses the text. Of second_log only the errors are shown: of the lines that the
        first one refuses below its message.
    """
    places = {_refused(what, line)[0] for line in log.splitlines()}
    beside, others = {}, []
    for line in second_log.splitlines():
        place, message = _refused(what, line)
        if place and place in places:
            beside.setdefault(place, []).append(f"{second}: {message.rstrip(':')}")
        elif place:
            others.append(line)
    told = _told(what, log, beside)
    if second_log and (others or not beside):
        told += [f"{second}:", *_told(what, "\n".join(others) or second_log, {})]
    error = KernelCompileError("\n".join([f"{what} does not compile:", *told]))
    error.log = log
    return error


def _told(what, log, beside) -> list[str]:
    """The lines of a log, the first error in front. Each line of the text stands once, with hints and `beside`."""
    lines = [line for line in log.splitlines() if not _NOISE.fullmatch(line)]
    first = next((line for line in lines if _refused(what, line)[0]), None)
    if not first:
        return [*lines, *filter(None, [hints.of_message(log)])]
    lines.remove(first)
    told, shown = [], set()
    for line in [first, *lines]:
        place, _ = _refused(what, line)
        if line.strip() in shown:  # NVRTC 12's excerpt
            continue
        told.append(line)
        if place and place not in shown:
            excerpt, more = place[1], beside.get(place, [])
            shown |= {place, excerpt.partition(" | ")[2].strip()}
            advice = (hints.of_message(said) for said in (line, *more))
            told += [excerpt, *(hint for hint in dict.fromkeys(advice) if hint and hint not in told), *more]
    return told


def _refused(what, line) -> tuple[tuple[str, str] | None, str]:
    """The (file, excerpt) that a line of a log calls an error, None if it does not, and its message."""
    match = _ERROR.fullmatch(line)
    if not match:
        return None, ""
    file, number = match[1], int(match[2])
    found = excerpt(number, [f"-D{k}={v}" for k, v in what.defines] if file == MACROS else lines_of(file))
    return (file, found) if found else None, match[3]


def lines_of(file: str) -> list[str]:
    """The lines of a kernel source or an edited kernel; none of another file, as of the compiler's own."""
    with contextlib.suppress(ValueError):
        return text(file).splitlines()
    return []


def excerpt(number: int, lines: list[str]) -> str:
    """A line, counted from 1, as errors show it; empty if there is none."""
    return f"    {number} | {lines[number - 1]}" if number <= len(lines) else ""
