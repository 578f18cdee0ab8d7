"""The guide of `make docs`: the README and the pages of the repository as one page of pdoc."""

import os
import re
from pathlib import Path

_DOCS = Path(__file__).resolve().parent
_GUIDE = ("install", "use", "numerics", "formats", "distributed", "tinkering", "own_operators", "inside")
_PAGES = [
    _DOCS.parent / "README.md",
    *(_DOCS / "guide" / f"{name}.md" for name in _GUIDE),
    _DOCS / "works_with.md",
    _DOCS / "limits.md",
    _DOCS.parent / "CONTRIBUTING.md",
]
_TEXTS = {page: re.sub("<!-- .* -->\n", "", page.read_text(encoding="utf-8")) for page in _PAGES}


def _link(page: Path, link: re.Match) -> str:
    """The link in this page: to the other page's title, or to a picture. Of a link to another file, its text."""
    text, target = link["text"], page.parent / link["target"]
    if link["picture"]:
        return f"![{text}]({os.path.relpath(target, _DOCS)})"
    title = _TEXTS.get(target.resolve(), "").partition("\n")[0].removeprefix("# ")
    return f"[{text}](#{title.lower().replace(' ', '-')})" if title else text


def _page(page: Path) -> str:
    link = re.compile(r"(?P<picture>!?)\[(?P<text>[^]]*)\]\((?!https:|#)(?P<target>[^)]+)\)")
    return link.sub(lambda found: _link(page, found), _TEXTS[page])


__doc__ = "\n\n".join(map(_page, _PAGES))
