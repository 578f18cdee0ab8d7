"""Writes examples/kernelbench_submission.py: the package's fused path as one file, in KernelBench's form.

The file begins at `tools.kernelbench` and takes in what that uses, definition by definition, as its text stands.
Imports inside the package disappear, a name that two modules define gets a module's name in front, kernels become
strings.
"""

import ast
import functools
import importlib.util
import re
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import click

from cupy_kernels import source
from modelnew import commands

from .generated import EXAMPLES, check_option, settle

ENTRY = "tools.kernelbench"
PACKAGES = ("modelnew", "cupy_kernels")

# For these definitions, kernelbench.py has one of its own of the same name.
REPLACED = (
    "cupy_kernels.backend.Backend",
    "cupy_kernels.launch.launch",
    "cupy_kernels.compiler.cupy",
    "cupy_kernels.source.expanded",
    "cupy_kernels.channel_sum.channel_sum",
    "cupy_kernels.channel_sum.channel_sum_workspace_size",
    "cupy_kernels.pooled_tail.struct_of",
    "modelnew.functional.conv_transpose_kernels.gradients",
    "modelnew.numerics.plan_or_reason",
)
# Nobody edits a text there.
IMPORTED = {"cupy_kernels.source.until_overridden": "from functools import cache as until_overridden"}

# Not in docstrings and comments either, from which KernelBench's checker does not know code.
_FORBIDDEN = re.compile(r"\b(try|except|pass|nn\.functional)\b")

# Conditions of the preprocessor that hold, or do not, wherever the file's kernels are compiled.
_KNOWN = {
    "defined(CUPY_KERNELS_EMULATOR)": False,
    "SM75": False,
    "__CUDA_ARCH__ >= 750": True,
    "__CUDA_ARCH__ >= 800": True,
    "__CUDA_ARCH__ < 800": False,
}

# With its line, if nothing else is on it.
_COMMENT = re.compile(r"^ *//.*\n| *//.*$", re.MULTILINE)


class _Module:
    """A module of the package. nodes: {name: definition}; imports: {name: (module, name in it or None)}."""

    def __init__(self, name: str):
        spec = importlib.util.find_spec(name)
        self.name = name
        self.lines = Path(spec.origin).read_text(encoding="utf-8").splitlines()
        self.tree = ast.parse("\n".join(self.lines))
        self.nodes, self.imports = {}, {}
        for node in self.tree.body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                self.nodes[node.name] = node
            elif isinstance(node, ast.Assign | ast.AnnAssign):
                self.nodes.update((name, node) for name in _targets(node))
            elif isinstance(node, ast.Import):
                self.imports.update((a.asname or a.name.split(".")[0], (a.name, None)) for a in node.names)
            elif isinstance(node, ast.ImportFrom):
                base = importlib.util.resolve_name("." * node.level + (node.module or ""), spec.parent)
                self.imports.update((a.asname or a.name, (base, a.name)) for a in node.names)

    def neighbours(self) -> Iterator["_Module"]:
        """The modules of the package that this one imports."""
        for base, name in self.imports.values():
            if base.split(".")[0] in PACKAGES:
                yield _module(base) if name in _module(base).nodes else _module(f"{base}.{name}")

    def resolve(self, name: str):
        """What a name means here: (module, name) in the package, a _Module, the text of another import, or None."""
        if f"{self.name}.{name}" in IMPORTED:
            return IMPORTED[f"{self.name}.{name}"]
        if name in self.nodes:
            return (ENTRY if f"{self.name}.{name}" in REPLACED else self.name), name
        if name not in self.imports:
            return None
        base, inside = self.imports[name]
        if base.split(".")[0] in PACKAGES:
            return _module(base).resolve(inside) or _module(f"{base}.{inside}")
        renamed = "" if name in (inside, base.split(".")[0]) else f" as {name}"
        return f"import {base}{renamed}" if inside is None else f"from {base} import {inside}{renamed}"

    def references(self, node) -> Iterator[tuple[ast.AST, object, set[str]]]:
        """(use, what it means, names that are local there) of all that a definition uses from outside it."""
        parts = [node]
        if isinstance(node, ast.ClassDef):
            parts = [*node.bases, *node.decorator_list, *node.body]
        for part in parts:
            local = _bound(part) - _targets(node)
            for use in ast.walk(part):
                owner = use.value if isinstance(use, ast.Attribute) else use
                if isinstance(owner, ast.Name) and owner.id not in local:
                    meant = self.resolve(owner.id)
                    if isinstance(meant, _Module) and isinstance(use, ast.Attribute):
                        yield use, meant.resolve(use.attr), local
                    elif not isinstance(meant, _Module) and use is owner and meant:
                        yield use, meant, local


_module = functools.cache(_Module)


def _bound(node) -> set[str]:
    """Names that are assigned or parameters anywhere inside."""
    inside = list(ast.walk(node))
    stored = {n.id for n in inside if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}
    return stored | {n.arg for n in inside if isinstance(n, ast.arg)}


def _targets(node) -> set[str]:
    """Names that an assignment defines."""
    targets = getattr(node, "targets", None) or [getattr(node, "target", ast.Tuple([]))]
    return set().union(*map(_bound, targets))


def generate() -> str:
    """The file's text. ValueError if there is anything in it that KernelBench's form forbids."""
    kept, imports, hidden = _reachable()
    order = [m for m in _in_order(_module(ENTRY)) if any(module == m.name for module, _ in kept)]
    names = _final_names(kept, order, hidden)
    kernels, sections = set(), []
    for module in order:
        nodes = dict.fromkeys(node for name, node in module.nodes.items() if (module.name, name) in kept)
        strings = {n.value for node in nodes for n in ast.walk(node) if isinstance(n, ast.Constant)}
        kernels.update(strings.intersection(source.names()))
        about = ["", ast.get_docstring(module.tree).splitlines()[0]] if module.name != ENTRY else []
        lines = ["-" * 118, module.name.replace(".", "/") + ".py", *about]
        section, before = "\n".join(f"# {line}".rstrip() for line in lines) + "\n", None
        for node in nodes:
            constants = before and all(isinstance(n, ast.Assign | ast.AnnAssign) for n in (before, node))
            section += ("\n" if constants else "\n\n\n" if before else "\n") + _text(module, node, names)
            before = node
        sections.append(section)
    body = "\n\n\n".join(sections).replace(
        "KERNELS: dict[str, str] = {}", f"KERNELS: dict[str, str] = {_dict(kernels)}"
    )
    about = ast.get_docstring(_module(ENTRY).tree)
    head = f'"""{about}\n\nWritten by `python3 -m tools.submission`: change the package, not this file.\n"""'
    later = "from __future__ import annotations\n"  # they may name what comes further down
    text = "\n".join([head, "", later, *_sorted_imports(imports), "", body, ""])
    if not any(isinstance(node, ast.Pass) for node in ast.walk(ast.parse(text))):
        text = re.sub(r"\bpass\b", "turn", text)  # a name in the kernels, and a word of comments
    text = re.sub(r"\btorch\.nn\.(functional\.)?(?=\w)", "PyTorch's ", text)  # in docstrings
    for line in text.splitlines():
        if found := _FORBIDDEN.search(line):
            raise ValueError(f"KernelBench's form has no {found[0]!r}; rewrite in the package: {line.strip()}")
    return text


def _reachable():
    """((module, name) of all definitions that the entry uses, other imports, definitions that locals would hide)."""
    kept, imports, hidden = {}, set(), set()
    todo = [(ENTRY, name) for name in reversed(_module(ENTRY).nodes)]
    while todo:
        found = todo.pop()
        if found in kept:
            continue
        kept[found] = None
        module = _module(found[0])
        for _, meant, local in module.references(module.nodes[found[1]]):
            if isinstance(meant, str):
                imports.add(meant)
            else:
                todo.append(meant)
                if meant[1] in local:
                    hidden.add(meant)
    return kept, imports, hidden


def _in_order(module, seen=None) -> Iterator[_Module]:
    """The module after all that it imports."""
    seen = set() if seen is None else seen
    if module.name not in seen:
        seen.add(module.name)
        for neighbour in module.neighbours():
            yield from _in_order(neighbour, seen)
        yield module


def _final_names(kept, order, hidden) -> dict:
    """{(module, name): name in the file}; the entry keeps its names."""
    final = {key: key[1] for key in kept if key[0] == ENTRY}
    for module in order:
        stem = module.name.rpartition(".")[2]
        for key in ((module.name, name) for name in module.nodes):
            if key not in kept or key in final:
                continue
            name = key[1]
            if name in final.values() or key in hidden:
                name = f"{stem}_{name.lstrip('_')}"
            while name in final.values():
                name += "_"
            final[key] = name
    return final


def _text(module, node, names) -> str:
    """Text of a definition and of the comment on top of it, with final names."""
    lines = [line.encode() for line in module.lines]  # columns count bytes
    edits = [(use, names[meant]) for use, meant, _ in module.references(node) if isinstance(meant, tuple)]
    for use, name in sorted(edits, key=lambda edit: (edit[0].lineno, edit[0].col_offset), reverse=True):
        line = lines[use.lineno - 1]
        lines[use.lineno - 1] = line[: use.col_offset] + name.encode() + line[use.end_col_offset :]
    first = min([node.lineno, *(d.lineno for d in getattr(node, "decorator_list", ()))]) - 1
    for name in {n for n in module.nodes if module.nodes[n] is node}:
        final = names.get((module.name, name), name)
        pattern = rb"\b%s\b" % name.encode()
        lines[node.lineno - 1] = re.sub(pattern, final.encode(), lines[node.lineno - 1], count=1)
    while first and module.lines[first - 1].startswith("#"):
        first -= 1
    return b"\n".join(lines[first : node.end_lineno]).decode()


def _dict(files) -> str:
    """The files and what they include, without comments, as the text of a dict."""
    todo, texts = sorted(files), {}
    while todo:
        file = todo.pop(0)
        if file not in texts:
            texts[file] = _pruned(_COMMENT.sub("", source.text(file))).lstrip("\n")
            todo += re.findall(r'^#include "(.+)"', texts[file], re.MULTILINE)
    items = (f'    "{file}": r"""{text}""",\n' for file, text in sorted(texts.items()))
    return "{\n" + "".join(items) + "}"


def _pruned(text: str) -> str:
    """A kernel file without the branches of the preprocessor that `_KNOWN` decides."""
    kept, branches = [], []
    for line in text.splitlines(keepends=True):
        directive = re.match(r"#(if|ifdef|ifndef|elif|else|endif)\b *(.*)", line)
        if not directive:
            if all(branch.alive for branch in branches):
                kept.append(line)
            continue
        word, condition = directive.groups()
        if word.startswith("if"):
            inside = all(branch.alive for branch in branches)
            # Whether the lines that follow are kept, whether the #if itself is, and whether no other branch is.
            branches.append(SimpleNamespace(alive=inside, written=False, decided=not inside))
            condition = {"ifdef": f"defined({condition})", "ifndef": f"!defined({condition})"}.get(word, condition)
        branch = branches[-1]
        if word == "endif":
            branches.pop()
            if branch.written:
                kept.append(line)
            continue
        if branch.decided:
            branch.alive = False
            continue
        holds = _known(condition) if word != "else" else True
        branch.alive, branch.decided = holds is not False, holds is True
        if holds is True and branch.written:
            kept.append("#else\n")
        elif branch.alive and holds is not True:
            kept.append(f"#{'elif' if branch.written else 'if'} {holds}\n")
            branch.written = True
    return "".join(kept)


def _known(condition: str) -> bool | str:
    """Whether a condition holds, or what is left of it to ask."""
    left = []
    for term in re.split(r" (&&|\|\|) ", condition):
        value = _KNOWN.get(term.removeprefix("!"))
        left.append(term if value is None else str(int(value != term.startswith("!"))))
    condition = " ".join(left)
    condition = re.sub(r"\b1 && | && 1\b|\b0 \|\| | \|\| 0\b", "", condition)
    if "0 &&" in condition or condition == "0":
        return False
    return condition == "1" or condition


def _sorted_imports(imports) -> list[str]:
    ours = ("torch", "numpy", "cupy")
    names = {}
    for text in sorted(imports):
        module, _, name = text.partition(" import ")
        names.setdefault(module, []).extend([name] if name else [])
    imports = [f"{module} import {', '.join(found)}" if found else module for module, found in names.items()]
    imports.sort(key=lambda text: (text.startswith("from"), text))
    groups = [[i for i in imports if (i.split()[1].split(".")[0] in ours) == other] for other in (False, True)]
    return [*groups[0], "", *groups[1]]


@commands.command()
@click.option(
    "--output",
    type=click.Path(dir_okay=False, path_type=Path),
    default=EXAMPLES / "kernelbench_submission.py",
    show_default="examples/kernelbench_submission.py",
    help="File to write.",
)
@check_option
def command(output, check):
    """Write the fused path of ModelNew as one file in KernelBench's form, which needs torch, NumPy and CuPy alone."""
    settle(output, generate(), check)


if __name__ == "__main__":
    command()
