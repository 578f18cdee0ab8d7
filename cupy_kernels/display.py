"""Tables and highlighted text, in a notebook and in a terminal."""


class Rows(list):
    """A list of named tuples that shows itself as a table."""

    def __init__(self, rows, title: str = "", caption: str = ""):
        super().__init__(rows)
        self.title, self.caption = title, caption

    def __rich__(self):
        from rich import box
        from rich.table import Table

        table = Table(
            box=box.SIMPLE_HEAD,
            title=self.title or None,
            title_justify="left",
            caption=self.caption or None,
            caption_justify="left",
        )
        for name in self[0]._fields if self else ():
            numeric = all(isinstance(getattr(row, name), (int, float, type(None))) for row in self)
            table.add_column(name.replace("_", " "), justify="right" if numeric else "left", overflow="fold")
        for row in self:
            table.add_row(*map(_cell, row))
        return table

    def __repr__(self):
        from rich.console import Console

        console = Console(width=120, color_system=None)
        with console.capture() as captured:
            console.print(self)
        return captured.get().rstrip()

    def _repr_mimebundle_(self, include=(), exclude=(), **_):
        return self.__rich__()._repr_mimebundle_(include, exclude)


def _cell(value):
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.3g}"
    return str(value)


def highlighted(text: str, first_line: int = 1):
    """`text`, CUDA C, as rich shows it: coloured, with line numbers."""
    from rich.syntax import Syntax

    return Syntax(text, "cuda", line_numbers=True, start_line=first_line, theme="ansi_light", word_wrap=True)
