"""Tables and highlighted text, for notebooks and terminals."""


class Rows(list):
    """A list of named tuples that prints as a table, without the fields in `hidden`.

    A field that is a tuple is shown as lines.
    """

    def __init__(self, rows, caption: str = "", hidden: tuple[str, ...] = ()):
        super().__init__(rows)
        self.caption, self.hidden = caption, hidden

    def __rich__(self):
        from rich import box
        from rich.table import Table

        table = Table(box=box.SIMPLE_HEAD, caption=self.caption or None, caption_justify="left")
        fields = [name for name in self[0]._fields if name not in self.hidden] if self else []
        for name in fields:
            numeric = all(isinstance(getattr(row, name), (int, float, type(None))) for row in self)
            how = {"justify": "right" if numeric else "left", "overflow": "fold", "no_wrap": name == "name"}
            table.add_column(name.replace("_", " "), **how)
        for row in self:
            table.add_row(*(_cell(getattr(row, name)) for name in fields))
        return table

    def __repr__(self):
        from rich.console import Console

        console = Console(width=120, color_system=None, force_jupyter=False)
        with console.capture() as captured:
            console.print(self)
        return captured.get().rstrip()

    def _repr_mimebundle_(self, include=(), exclude=(), **_):
        return self.__rich__()._repr_mimebundle_(include, exclude)


def _cell(value):
    if value is None:
        return "-"
    if isinstance(value, tuple):
        return "\n".join(value)
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def highlighted(text: str, first_line: int = 1):
    """`text`, CUDA C, as rich shows it: coloured, with line numbers."""
    from rich.syntax import Syntax

    return Syntax(text, "cuda", line_numbers=True, start_line=first_line, theme="ansi_light", word_wrap=True)
