"""Kernel sources: text of .cu files with includes expanded, signatures of kernels, and a digest of all sources."""

import contextlib
import difflib
import functools
import hashlib
import re
import threading
from collections.abc import Iterable
from importlib import resources
from typing import NamedTuple

import numpy as np

from . import forks, hints
from .parsing import SYNONYMS, declarations, definitions, span

_FOLDER = resources.files(__package__) / "cu"
_INCLUDE = re.compile(r'^\s*#\s*include\s*"([^"]+)"')
_HEADER = re.compile(r"""^\s*#\s*include\s*(<[^>]+>|"[^"]+\.h")""")

# Scalar types of the kernels, and the NumPy dtype of an array that holds them. NumPy has no bfloat16: its arrays travel
# as int16.
DTYPES = {
    "float": np.dtype(np.float32),
    "double": np.dtype(np.float64),
    "half_t": np.dtype(np.float16),
    "bf16_t": np.dtype(np.int16),
    "u8": np.dtype(np.uint8),
    "int": np.dtype(np.int32),
    "i64": np.dtype(np.int64),
    "bool": np.dtype(np.bool_),
    "signed char": np.dtype(np.int8),
    "unsigned": np.dtype(np.uint32),
    "unsigned long long": np.dtype(np.uint64),
}
SCALARS = {dtype: name for name, dtype in DTYPES.items()}
# The first two are replaced by new dicts, never changed in place: other threads read them.
_overrides: dict[str, str] = {}
_constants: dict[str, dict[str, str | int]] = {}
_added: dict[str, str] = {}
_workspaces: dict[str, frozenset[str]] = {}
_until_overridden = []
_lock = forks.lock()  # whoever holds it sees the same sources all the time
_blocks = []  # the thread of each open block of `override`, the outermost first


def until_overridden(function):
    """A functools.cache that `set_overrides` empties, for results that depend on the current sources and constants.

    A result that is computed while another thread edits is not cached.
    """
    known = {}
    _until_overridden.append(known)

    @functools.wraps(function)
    def cached(*arguments):
        found = known.get(arguments)
        if found is None:
            with _lock:
                found = known[arguments] = function(*arguments)
        return found

    return cached


class Variant(NamedTuple):
    """A .cu file and the macros it is compiled with: one compilation, which gives all kernels of the file.

    architecture: the only one for which it compiles and on which it runs ("sm_90a"); None if there is no such limit.
    """

    file: str
    defines: tuple[tuple[str, str | int], ...] = ()
    architecture: str | None = None

    def __str__(self):
        return " ".join([self.file, *(f"-D{k}={v}" for k, v in self.defines)])

    def kernel(self, name: str) -> "Kernel":
        """One of its kernels."""
        return Kernel(self.file, name, self.defines, self.architecture)


class Kernel(NamedTuple):
    """One kernel of a `Variant`."""

    file: str
    name: str
    defines: tuple[tuple[str, str | int], ...] = ()
    architecture: str | None = None

    def __str__(self):
        return f"{self.name} [{self.variant}]"

    @property
    def variant(self) -> Variant:
        return Variant(self.file, self.defines, self.architecture)


class Parameter(NamedTuple):
    """One parameter of a kernel. `dtype` is None if the text does not determine it."""

    name: str
    dtype: np.dtype | None
    pointer: bool
    const: bool
    inout: bool


@contextlib.contextmanager
def override(texts: dict[str, str], constants: dict[str, dict[str, str | int]] | None = None):
    """A context in which `texts` replace packaged files or kernels, and `constants` replace their macros.

    texts: {name: text}. A name that ends in .cu or .cuh is a file, packaged or new. Any other name is a kernel; the
        text replaces its definition in its packaged file.
    constants: {kernel: {macro: value}}, replaces or adds -D macros of launches of that kernel.

    An edit is used on the GPU and in the emulator, in every thread of the process. An edited header counts for all
    kernels that include it. An edited kernel is compiled without the others of its file. Compiled kernels are cached by
    their text, so that entering and leaving compiles nothing twice. Blocks can be nested; while a thread is in one,
    edits of another thread raise RuntimeError.

    `names` and `digest` refer to the packaged files only.
    """
    with _lock:
        before = overrides()
        set_overrides(*merged(texts, constants or {}))
        _blocks.append(threading.get_ident())
    try:
        yield
    finally:
        with _lock:
            _put(*before)
            _blocks.pop()


def overrides() -> tuple[dict[str, str], dict[str, dict[str, str | int]]]:
    """The current (texts, constants), as `override` takes them."""
    return dict(_overrides), {kernel: dict(macros) for kernel, macros in _constants.items()}


def overridden() -> frozenset[str]:
    """Names of the files and kernels that are overridden at present."""
    return frozenset((*_overrides, *_constants))


def overridden_texts() -> frozenset[str]:
    """Those of `overridden` that have another text, not only other constants."""
    return frozenset(_overrides)


def merged(texts, constants) -> tuple[dict, dict]:
    """What is in force, with `texts` and `constants` on top. A new text of a file ends the edits of its kernels."""
    known, known_constants = overrides()
    ended = {name for file in texts if is_file(file) and file in names() for name in packaged_kernels(file)}
    known = {name: text for name, text in known.items() if name not in ended}
    for kernel, macros in constants.items():
        known_constants[kernel] = {**known_constants.get(kernel, {}), **macros}
    return {**known, **texts}, known_constants


def set_overrides(texts: dict[str, str], constants: dict[str, dict[str, str | int]]) -> None:
    """Makes `texts` and `constants` the only overrides, until the next call. See `override`."""
    with _lock:
        if _blocks and _blocks[-1] != threading.get_ident():
            raise RuntimeError(
                "another thread is inside an override block: an edit holds for the whole process, and the end of that "
                "block would undo it. Edit when the block is over, or in its thread"
            )
        _put(dict(texts), dict(constants))


def texts(macros: dict[str, str | int | float]) -> dict[str, str | int]:
    """The macros in the form that distinguishes kernels: 2.0 and True are other texts than 2, though they are equal."""
    return {name: value if type(value) is int else str(value) for name, value in macros.items()}


def _put(overrides, constants):
    global _overrides, _constants
    _overrides, _constants = overrides, {name: texts(macros) for name, macros in constants.items()}
    for known in _until_overridden:
        known.clear()


def in_force(kernel: Kernel) -> Kernel:
    """`kernel` with the constants that `override` sets for it at present."""
    constants = _constants.get(kernel.name)
    return kernel._replace(defines=tuple({**dict(kernel.defines), **constants}.items())) if constants else kernel


def is_file(name: str) -> bool:
    """Whether a name is a file's, not a kernel's."""
    return name.endswith((".cu", ".cuh"))


def add(stem: str, text: str, workspaces: Iterable[str] = ()) -> str:
    """Adds `text` to the sources for the life of the process, and returns its file name: `stem` and a digest of `text`.

    Different texts never share a name. Adding a text again changes nothing. `names` and `digest` refer to the packaged
    files only.
    workspaces: names of pointers whose memory kernels need not write in full.
    """
    workspaces = frozenset(workspaces)
    digest = hashlib.sha256("\0".join([text, *sorted(workspaces)]).encode()).hexdigest()
    files = (f"{stem}_{digest[:digits]}.cu" for digits in range(8, len(digest) + 1, 8))
    known = (text, workspaces)
    file = next(f for f in files if (_added.get(f, text), _workspaces.get(f, workspaces)) == known)
    _added[file], _workspaces[file] = known
    return file


def workspaces(file: str) -> frozenset[str]:
    """The workspaces that `add` was told of."""
    return _workspaces.get(file, frozenset())


def names() -> list[str]:
    """File names of the packaged kernel sources, .cu and .cuh, sorted."""
    return sorted(f.name for f in _FOLDER.iterdir() if f.name.endswith((".cu", ".cuh")))


def text(file: str, kernels: Iterable[str] | None = None) -> str:
    """The current text of a source file, or of an overridden kernel. Raises ValueError if there is none.

    An #include replaces the definition of each overridden kernel of the file.
    kernels: those whose overrides count; all by default.
    """
    edited = _overrides
    if not is_file(file) and file in edited:
        return edited[file]
    if file in _added:
        return _added[file]
    found = edited[file] if file in edited else packaged(file)
    for name in edited:
        counts = not is_file(name) and (kernels is None or name in kernels)
        place = span(found, name) if counts else None
        if place:
            # As many lines as before, so that messages about the rest of the file keep their line numbers.
            lines = "\n" * max(1, found.count("\n", *place))
            found = f'{found[: place[0]]}#include "{name}"{lines}{found[place[1] :]}'
    return found


def meant(name: str, known: Iterable[str]) -> str:
    """A sentence for an error, with the known names that are similar to an unknown one; empty if there are none."""
    close = difflib.get_close_matches(name, known, n=4, cutoff=0.5)
    return f"did you mean {', '.join(close)}? " if close else ""


def packaged(file: str) -> str:
    """Text of a packaged file, without overrides. Raises ValueError if there is no such file."""
    if file not in names():
        raise ValueError(f"no kernel source {file!r}; {meant(file, names())}cupy_kernels.source.names() lists all")
    return (_FOLDER / file).read_text(encoding="utf-8")


@functools.cache
def packaged_kernels(file: str) -> dict[str, str]:
    """{name: definition} of the kernels of a packaged file, without overrides."""
    text = packaged(file)
    return {name: text[slice(*span(text, name))] for name in definitions(text)}


@until_overridden
def expanded(file: str) -> str:
    """Text of `file` with every `#include "..."` replaced by the included text, each file once.

    CuPy's disk cache hashes only this text, and NVRTC needs no include path. `#line` directives keep compiler messages
    pointing at the original file and line.
    """
    return _expand(file, set(), text)


def _expand(file: str, seen: set[str], read) -> str:
    seen.add(file)
    lines = [f'#line 1 "{file}"']
    for number, line in enumerate(read(file).splitlines(), 1):
        if header := _HEADER.match(line):
            way = hints.of_header(header[1][1:-1])
            raise ValueError(f"{file}:{number}: kernels include no header, received {header[1]}: {way}")
        include = _INCLUDE.match(line)
        if not include:
            lines.append(line)
        elif include[1] not in seen:
            lines += [_expand(include[1], seen, read), f'#line {number + 1} "{file}"']
        else:
            lines.append("")
    return "\n".join(lines)


def unit(what: Kernel | Variant) -> str:
    """The text that is compiled for a kernel, or for all kernels of a variant: that of its file, expanded.

    While nothing in it is edited, all kernels of a file share this text. An edited kernel is compiled alone, and the
    others are compiled as if it were not edited, so that an edit compiles only the edited kernel. If the file or a
    header is edited, each kernel is compiled alone: NVRTC compiles them at the same time.
    """
    return _unit(what.file, what.name, True) if isinstance(what, Kernel) else expanded(what.file)


def unit_of_file(kernel: Kernel) -> str:
    """The same for a compiler that is slow for many texts: kernels of an edited file share one, too."""
    return _unit(kernel.file, kernel.name, False)


@until_overridden
def _unit(file, kernel, apart):
    edited, files = overridden().intersection(kernel_names(file)), any(map(is_file, overridden()))
    each = files and apart and _is_edited(file)
    if not edited and not each:
        return expanded(file)
    alone = {kernel} & edited
    found = _expand(file, set(), lambda name: text(name, alone))
    left_out = definitions(found).keys() - ({kernel} if each else alone)
    if not alone and not each:
        # The packaged text of an edited kernel need not fit an edited header.
        left_out = left_out & edited if files else ()
    for start, end in sorted((span(found, name) for name in left_out), reverse=True):
        # Empty lines: messages about the rest keep their line numbers.
        found = found[:start] + "\n" * found.count("\n", start, end) + found[end:]
    return found


@until_overridden
def _is_edited(file) -> bool:
    """Whether the file, or a header that it includes, is edited as a whole."""
    return file in names() and _expand(file, set(), lambda name: text(name, ())) != _as_packaged(file)


@until_overridden
def _as_packaged(file) -> str:
    """`expanded` without overrides."""
    return _expand(file, set(), packaged)


def is_packaged(kernel: Kernel) -> bool:
    """Whether `kernel` is compiled from the package's own text."""
    return kernel.file in names() and unit(kernel) == _as_packaged(kernel.file)


@until_overridden
def kernel_names(file: str) -> tuple[str, ...]:
    """Names of the kernels that `file` defines."""
    return tuple(definitions(expanded(file)))


def no_kernel(where: str, name: str, found: Iterable[str]) -> ValueError:
    """The error for a text that lacks a kernel, and has those that were found."""
    return ValueError(
        f"{where} has no kernel {name!r}; it has {', '.join(found) or 'none'}. "
        'Kernels are written: extern "C" __global__ void name(...)'
    )


@until_overridden
def signature(kernel: Kernel) -> tuple[Parameter, ...]:
    """Parameters of `kernel` as its text declares them.

    Raises ValueError if the file has no such kernel, or if a scalar parameter has a type that is not in DTYPES.
    """
    found = declarations(expanded(kernel.file))
    if kernel.name not in found:
        raise no_kernel(kernel.file, kernel.name, found)
    return tuple(_parameter(kernel, *p) for p in found[kernel.name])


@until_overridden
def launch_bound(kernel: Kernel) -> int | None:
    """The number of threads in the kernel's __launch_bounds__, if it is a number, or a macro that is one."""
    declared = definitions(expanded(kernel.file)).get(kernel.name)
    found = declared and re.search(r"__launch_bounds__\s*\(\s*(\w+)\s*[,)]", declared[0])
    bound = str(dict(kernel.defines).get(found[1], found[1])) if found else ""
    return int(bound) if bound.isdigit() else None


@until_overridden
def cooperative(kernel: Kernel) -> bool:
    """Whether the kernel's text calls grid_barrier(), so that all its blocks must start at once."""
    return re.search(r"\bgrid_barrier\s*\(", _code(kernel)) is not None


@until_overridden
def overlapping(kernel: Kernel) -> bool:
    """Whether the kernel's first statement is wait_for_earlier_kernels(), so that it may start while those end."""
    return re.match(r"[^{]*{\s*wait_for_earlier_kernels\s*\(\s*\)\s*;", _code(kernel)) is not None


def _code(kernel):
    """The kernel's text without comments."""
    text = expanded(kernel.file)
    return re.sub(r"//[^\n]*|/\*.*?\*/", "", text[slice(*span(text, kernel.name))], flags=re.DOTALL)


def _parameter(kernel: Kernel, kind: str, name: str) -> Parameter:
    marks = [word for word in kind.split() if word in ("INOUT", "const")]
    base = " ".join(kind.split()[len(marks) :])  # "unsigned int" is not "int"
    base, stars = base.rstrip("*"), base.count("*")
    kind = str(dict(kernel.defines).get(base, base))
    dtype = None if stars > 1 else DTYPES.get(SYNONYMS.get(kind, kind))
    if dtype is None and not stars:
        raise ValueError(
            f"{kernel}: {name} is a {base}; scalar parameters are {', '.join(DTYPES)}, or a macro of these"
        )
    return Parameter(name, dtype, stars > 0, "const" in marks, "INOUT" in marks)


_SPACE = re.compile(r'"(?:[^"\\\n]|\\.)*"|(?:\s|//[^\n]*|/\*.*?\*/)+', re.DOTALL)  # or a string, which may hold "//"


@functools.cache
def digest() -> str:
    """SHA-256 of names and texts of all packaged kernel sources. A record stores it to identify the kernels.

    Comments and spaces do not count: kernels that differ in nothing else are the same.
    """
    sha = hashlib.sha256()
    for file in names():
        sha.update(f"{file}\0{_SPACE.sub(_squeezed, packaged(file)).strip()}\0".encode())
    return sha.hexdigest()


def _squeezed(match) -> str:
    return match[0] if match[0].startswith('"') else "\n" if "\n" in match[0] else " "
