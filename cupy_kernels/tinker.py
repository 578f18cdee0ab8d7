"""The functions of `cupy_kernels` that show and change kernels.

A name is a kernel's ("tanh_forward") or a file's ("tanh.cu", "tanh.cuh"; "tanh" means "tanh.cu").
"""

import contextlib
import re
import warnings
from typing import NamedTuple

from . import parsing, source
from .display import Rows, highlighted

_PIPED = 130  # columns of what is no terminal: the longest line of a kernel, and its number


class KernelInfo(NamedTuple):
    """A kernel, as `kernels` lists it.

    variants: number of sets of macros with which the host compiles the file. For kernels that are specialised for
        shapes, only samples of shapes are counted.
    macros: names of the macros.
    values: the values of each macro.
    edited: the edited name, of the kernel or its file; "" if it is not edited.
    """

    name: str
    file: str
    parameters: str
    variants: int
    macros: str
    values: tuple[str, ...]
    edited: str


def kernels(name: str | None = None) -> Rows:
    """A list of kernels: file, parameters, number of variants, and macros. It prints as a table.

    name: a kernel or file; for a header, the files that include it. Default: all kernels of the package.

    A table of several files does not show parameters and values of macros, but the items have them. `attributes` has a
    row for each variant. Raises ValueError for an unknown name.
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
    """The current source of a kernel or file, edits included. Raises ValueError for an unknown name."""
    return _text(name)[0]


def show(name: str) -> None:
    """Prints `text`, highlighted and with line numbers. Raises ValueError for an unknown name."""
    from rich.console import Console

    console = Console()
    if not (console.is_terminal or console.is_jupyter):
        console.width = max(console.width, _PIPED)
    console.print(highlighted(*_text(name)))


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
    """A context in which `edits` replace kernels, files or macros of the package.

    edits: {name: text} replaces a file, or one kernel's definition in its file. {kernel: {macro: value}} replaces -D
        macros of one kernel, or adds some.

    Every launch in the process uses the edits at once, those of ModelNew included. The end of the block restores what
    was in force before. A text that was compiled once is not compiled again.

    acc_t and macros of your own can be changed. A macro that the host sets, such as WIDTH, the elements of a thread,
    stays what it is for the host, which computes the grid: a UserWarning says so.

    Raises ValueError for an unknown name or macro, and for a text that does not define the original's kernels with the
    same parameters; TypeError for edits of another type; RuntimeError while another thread is inside such a block.
    Nothing is changed then. KernelCompileError is raised by the first launch, and names the line of the text.
    """
    checked = _checked(edits)
    _warn_of_the_hosts(checked[1], stacklevel=4)  # contextlib is in between
    with source.override(*checked):
        yield


def edit(edits: dict[str, str | dict]) -> None:
    """Like `override`, until `reset` or the end of an enclosing `override` block. Raises the same errors."""
    checked = _checked(edits)
    _warn_of_the_hosts(checked[1], stacklevel=3)
    source.set_overrides(*source.merged(*checked))


def reset(*names: str) -> None:
    """Undoes the edits of these names; without names, all edits. Raises ValueError for a name that is not edited."""
    texts, constants = source.overrides()
    for name in names:
        key = _key(name)
        if key not in source.overridden():
            raise ValueError(f"{name} is not edited; edited at present: {', '.join(edited()) or 'nothing'}")
        texts.pop(key, None)
        constants.pop(key, None)
    source.set_overrides(*((texts, constants) if names else ({}, {})))


def locate(name: str) -> tuple[str, str | None]:
    """(file, kernel) of a name; kernel is None for a file. Raises ValueError, with similar names, for others."""
    if not isinstance(name, str):
        raise TypeError(f"a kernel or file is named by a str, such as 'tanh_forward'; received {name!r}")
    files = source.names()
    known = {kernel: file for file in files for kernel in source.packaged_kernels(file)}
    if name in known:
        return known[name], name
    for file in (name, f"{name}.cu"):
        if file in files:
            return file, None
    hint = source.meant(name, [*known, *files]) or "the text of an inline operator is its attribute text; "
    raise ValueError(f"no kernel and no file of the package is called {name!r}; {hint}cupy_kernels.kernels() lists all")


def files_with(name: str) -> list[str]:
    """The .cu files whose compiled text depends on `name`: its own file, or all that include a header."""
    file, _ = locate(name)
    if file.endswith(".cu"):
        return [file]
    return [f for f in source.names() if f.endswith(".cu") and f'#line 1 "{file}"' in source.expanded(f)]


@contextlib.contextmanager
def unedited():
    """A context in which the package's own kernels run, whatever is edited."""
    with source.override({}):
        reset()
        yield


def _key(name):
    file, kernel = locate(name)
    return kernel or file


def _checked(edits):
    """(texts, constants) of edits. Raises ValueError or TypeError for invalid edits."""
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
        if not kernel and len(received) == 1 and expected.keys() >= received.keys():
            there += f", which is edited by its own name, {next(iter(received))!r}"
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
    known = _macros_of_host(file)
    words = set(re.findall(r"\w+", source.expanded(file)))
    for name, value in macros.items():
        if name not in known and name not in words:
            raise ValueError(
                f"{kernel} has no macro {name!r}: it has {', '.join(sorted(known))}, and those its text uses"
            )
        if not isinstance(value, (str, int)):
            raise TypeError(f"{kernel}: the macro {name} is a str or an int, received {value!r}")


def _macros_of_host(file):
    from .variants import variants

    return {macro for variant in variants() if variant.file == file for macro, _ in variant.defines}


def _warn_of_the_hosts(constants, stacklevel):
    for kernel, macros in constants.items():
        file = locate(kernel)[0]
        hosts = [macro for macro in macros if macro in _macros_of_host(file) and not macro.endswith("_t")]  # _t: a type
        if hosts:
            warnings.warn(
                f"{kernel}: the host computes the grid and the memory from its own {' and '.join(hosts)}. With another "
                "value in the kernel, elements may be left out or be done twice. Change the host's value in the "
                "operator's module in cupy_kernels",
                stacklevel=stacklevel,
            )


def _list(parameters):
    return ", ".join(" ".join(p) for p in parameters)
