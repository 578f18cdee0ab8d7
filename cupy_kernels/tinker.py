"""Look at the kernels, and change them: the functions that `cupy_kernels` itself offers.

A name is a kernel's ("tanh_forward"), or a file's ("tanh.cu", "tanh.cuh"; "tanh" is "tanh.cu").
"""

import contextlib
import difflib
import re
from typing import NamedTuple

from . import parsing, source
from .display import Rows, highlighted


class KernelInfo(NamedTuple):
    """A kernel, as `kernels` lists it.

    variants: how many sets of macros the host compiles the file with; for kernels that are specialised for a shape,
    only some shapes count. macros: names of the macros. values: the values of each macro. edited: what is edited at
    present, the kernel or its file, else "".
    """

    name: str
    file: str
    parameters: str
    variants: int
    macros: str
    values: tuple[str, ...]
    edited: str


def kernels(name: str | None = None) -> Rows:
    """All kernels of the package, or those of `name` (of a header: of the files that include it): file, parameters, and
    how many variants with which macros.

    A table of several files does not show parameters and values of macros; the items have them. `attributes` has a row
    for each variant.
    """
    from .variants import shape_macros, variants  # imports every operator

    declared = {}
    for variant in variants():
        declared.setdefault(variant.file, []).append(variant)
    wanted = name and locate(name)[1]
    files = [f for f in source.names() if f.endswith(".cu")] if name is None else files_with(name)
    found = []
    for file in files:
        macros = {}
        for macro, value in (define for variant in declared.get(file, ()) for define in variant.defines):
            macros.setdefault(macro, {})[str(value)] = None
        names = [macro for macro in macros if macro not in shape_macros()]
        others = len(macros) - len(names)
        names = [*names, f"and {others} of the shape"] if others > 1 else list(macros)
        values = tuple(f"{macro}: {', '.join(values)}" for macro, values in macros.items())
        for kernel, parameters in parsing.declarations(source.packaged(file)).items():
            if wanted in (None, kernel):
                edits = " ".join(sorted(source.overridden().intersection((kernel, file))))
                row = (kernel, file, _list(parameters), len(declared.get(file, ())), " ".join(names), values, edits)
                found.append(KernelInfo(*row))
    hidden = ("macros",) if len(files) == 1 else ("parameters", "values")
    return Rows(found, hidden=hidden if source.overridden() else (*hidden, "edited"))


def edited() -> list[str]:
    """Names of the kernels and files that are edited at present, sorted."""
    return sorted(source.overridden())


def text(name: str) -> str:
    """The source of a kernel or file as it stands, edits included: what `override` takes, to begin an edit with."""
    return _text(name)[0]


def show(name: str) -> None:
    """Prints `text`: highlighted, with line numbers."""
    from rich.console import Console

    Console().print(highlighted(*_text(name)))


def _text(name):
    """(text, number of its first line in the file)"""
    file, kernel = locate(name)
    if kernel is None or kernel in source.overridden_texts():
        return source.text(kernel or file), 1
    found = source.text(file)
    start, end = parsing.span(found, kernel)
    return found[start:end], found.count("\n", 0, start) + 1


@contextlib.contextmanager
def override(edits: dict[str, str | dict]):
    """Within the block, `edits` ({name: text, or {macro: value}}) replace what the package has.

    A text replaces a file, or one kernel's definition in its file; {macro: value} replaces -D macros of one kernel, or
    adds some. Everything that launches the kernel uses it at once, ModelNew too, and the package's own is back at the
    end of the block; a text that was compiled once is not compiled again.

    The host goes on computing grids from its own value of a macro: one that says how many elements a thread takes
    (WIDTH, ITEMS, tiles) cannot be changed here alone. acc_t, and macros of your own, can.

    Raises ValueError, and changes nothing, for an unknown name or macro, and for a text whose kernels are not those of
    the original, with the same parameters; TypeError for edits of another kind; RuntimeError while another thread is
    inside such a block, whose end would undo them. KernelCompileError comes with the first launch; it names the line of
    the text.
    """
    with source.override(*_checked(edits)):
        yield


def edit(edits: dict[str, str | dict]) -> None:
    """`override` that lasts until `reset`, or to the end of an `override` block around it; the same errors."""
    source.set_overrides(*source.merged(*_checked(edits)))


def reset(*names: str) -> None:
    """Takes back the edits of these names; without any, all. ValueError for a name that has none."""
    texts, constants = source.overrides()
    for name in names:
        key = _key(name)
        if key not in source.overridden():
            raise ValueError(f"{name} is not edited; edited at present: {', '.join(edited()) or 'nothing'}")
        texts.pop(key, None)
        constants.pop(key, None)
    source.set_overrides(*((texts, constants) if names else ({}, {})))


def locate(name: str) -> tuple[str, str | None]:
    """(file, kernel) of a name, the kernel None if it is a file's. ValueError, with close matches, if it is neither."""
    if not isinstance(name, str):
        raise TypeError(f"a kernel or file is named by a str, such as 'tanh_forward'; received {name!r}")
    files = source.names()
    known = {kernel: file for file in files for kernel in source.packaged_kernels(file)}
    if name in known:
        return known[name], name
    for file in (name, f"{name}.cu"):
        if file in files:
            return file, None
    close = difflib.get_close_matches(name, [*known, *files], n=4, cutoff=0.5)
    hint = f"did you mean {', '.join(close)}? " if close else ""
    raise ValueError(f"no kernel and no file is called {name!r}; {hint}cupy_kernels.kernels() lists all")


def files_with(name: str) -> list[str]:
    """The .cu files whose compiled text a change of `name` changes: its own, or all that include a header."""
    file, _ = locate(name)
    if file.endswith(".cu"):
        return [file]
    return [f for f in source.names() if f.endswith(".cu") and f'#line 1 "{file}"' in source.expanded(f)]


@contextlib.contextmanager
def unedited():
    """Within the block the package's own kernels run, whatever is edited."""
    with source.override({}):
        reset()
        yield


def _key(name):
    file, kernel = locate(name)
    return kernel or file


def _checked(edits):
    """(texts, constants) of edits. ValueError for what cannot be meant."""
    if not isinstance(edits, dict):
        raise TypeError(f"edits are {{name: text}} or {{kernel: {{macro: value}}}}, received {type(edits).__name__}")
    texts, constants = {}, {}
    for name, value in edits.items():
        file, kernel = locate(name)
        if isinstance(value, str):
            _check_entry_points(file, kernel, value)
            texts[kernel or file] = value
        elif isinstance(value, dict):
            if kernel is None:
                raise ValueError(f"macros are changed for a kernel, one of {', '.join(source.packaged_kernels(file))}")
            _check_macros(file, kernel, value)
            constants[kernel] = value
        else:
            raise TypeError(f"{name}: an edit is a text or {{macro: value}}, received {type(value).__name__}")
    return texts, constants


def _check_entry_points(file, kernel, text):
    original = parsing.declarations(source.packaged(file))
    expected = {kernel: original[kernel]} if kernel else original
    received = parsing.declarations(text)
    missing = [name for name in expected if name not in received]
    if missing:
        there = f"; it has {', '.join(received)}" if received else ""
        raise ValueError(
            f"the text for {kernel or file} lacks the kernel {', '.join(missing)}{there}. It must define\n"
            + "\n".join(f'    extern "C" __global__ void {n}({_list(p)})' for n, p in expected.items())
        )
    if unfinished := parsing.unfinished(text):
        raise ValueError(f"the text for {kernel or file} lacks the closing brace of {', '.join(unfinished)}")
    others = [name for name in received if kernel and name != kernel and name in original]
    if others:
        raise ValueError(f"the text for the kernel {kernel} also defines {', '.join(others)}: edit {file} for several")
    for name, parameters in expected.items():
        problem = _difference(parameters, received[name])
        if problem:
            raise ValueError(
                f"{name}: {problem}. The host passes what the original takes:\n"
                f'    extern "C" __global__ void {name}({_list(parameters)})'
            )


def _difference(expected, received):
    if len(expected) != len(received):
        return f"the text declares {len(received)} parameters, not {len(expected)}"
    for i, (wanted, found) in enumerate(zip(expected, received), 1):
        if wanted[0] != found[0]:
            return f"parameter {i} is {' '.join(found)}, not {' '.join(wanted)}"
    return None


def _check_macros(file, kernel, macros):
    from .variants import variants

    known = {k for v in variants() if v.file == file for k, _ in v.defines}
    words = set(re.findall(r"\w+", source.expanded(file)))
    for name, value in macros.items():
        if name not in known and name not in words:
            raise ValueError(
                f"{kernel} has no macro {name!r}: it has {', '.join(sorted(known))}, and those its text uses"
            )
        if not isinstance(value, (str, int)):
            raise TypeError(f"{kernel}: the macro {name} is a str or an int, received {value!r}")


def _list(parameters):
    return ", ".join(" ".join(p) for p in parameters)
