"""Faults that tests plant in kernels, to see that they are found."""

from cupy_kernels import source


def planted(file: str, *edits: tuple[str, str]):
    """`source.override` of a kernel file, with each (old, new) replaced; fails if there is nothing to replace."""
    text = source.text(file)
    for old, new in edits:
        assert old in text, f"{file} has no {old!r} any more: the fault would not be planted"
        text = text.replace(old, new)
    return source.override({file: text})
