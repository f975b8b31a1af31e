"""What a notebook holds and shows: its cells, texts as they are, a bar for the person who runs a cell.

A page trusts its own words and no others. What a chapter writes is Markdown, mathematics and roles included;
a name, a device or a label comes from a record or a suite, which may be anybody's, and is a text: `as_html`
and `as_markdown` show it as it is, and nothing in it is markup. The border is where a sentence is made from
both: what it takes from a record goes through one of them.

A notebook is also run by programs: to write its outputs, or to compare them. Those want what the cell
computes and nothing else. What tells them from a person in front of the page is what they promise the kernel:
a frontend for people answers `input`, nbconvert and nbval do not. So the bar is shown where input is allowed,
and is emptied when the run is over.
"""

from __future__ import annotations

import ast
import inspect
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from html import escape
from pathlib import Path
from textwrap import dedent
from typing import Any

from localgpt_core.common.files import parse_json, read_regular
from localgpt_core.common.validation import printable

__all__ = [
    "HTMLTable",
    "as_html",
    "as_markdown",
    "book_pages",
    "cells_of",
    "say",
    "sentence",
    "source_of",
    "texts_of",
    "watched",
]

LARGEST_PAGE = 2**28  # bytes

# What begins or ends markup somewhere in a sentence: HTML, emphasis, code, links, roles, tables, mathematics,
# an address that is made a link by itself, and a sign that makes a list or a heading of a line.
MARKUP = re.compile(
    r"[<>&*`\[\]{}|\\$~^]|(?<![^\W_])_|_(?![^\W_])|:(?=//)|(?<=\bwww)\.|(?<=\w)@(?=\w)"
    r"|\A[^\w\s]|\A\d(?=\d*[.)]\s)"
)


def book_pages(book: Path) -> list[Path]:
    """Return the notebooks of the folder ``book``, chapters first."""
    return [*sorted(book.glob("chapters/*.ipynb")), *sorted(book.glob("*.ipynb"))]


def cells_of(page: Path) -> list[dict[str, Any]]:
    """Return the cells of a notebook, as its JSON has them.

    Raises:
        ValueError: For a file that is no JSON, or too large.
        LookupError: For one that has no cells.
    """
    return parse_json(read_regular(page, LARGEST_PAGE).decode("utf-8"))["cells"]


def texts_of(cell: dict[str, Any]) -> list[str]:
    """Return the texts that the outputs of a cell have, in every form that a frontend may choose from."""
    found = []
    for output in cell.get("outputs", []):
        forms = {"text": output.get("text", ""), **output.get("data", {})}
        found += ["".join(form) for kind, form in forms.items() if kind.startswith("text")]
    return found


def as_html(text: str) -> str:
    """Return the HTML, between two tags, that shows ``text`` as it is."""
    return escape(text, quote=False)


def as_markdown(text: str) -> str:
    """Return the Markdown, within a sentence, that shows ``text`` as it is, on one line."""
    return MARKUP.sub(lambda sign: f"&#{ord(sign[0])};", printable(text))


class HTMLTable:
    """A table that a notebook shows: readable aloud, with a caption and a heading for every column."""

    def __init__(self, html: str) -> None:
        self.html = html

    def _repr_html_(self) -> str:
        return self.html

    def __repr__(self) -> str:
        return "table"


class Said(str):
    """A text that a notebook shows as Markdown."""

    def _repr_markdown_(self) -> str:
        return str(self)

    def __repr__(self) -> str:
        return str(self)


def say(text: str) -> Said:
    """Return ``text``, sentences with results in them, for a notebook to show as Markdown.

    The words are the page's own, so they may be markup. Numbers, and the sentences of `SuiteResults`, go
    into them as they are, and a hyphen before one that stands by itself becomes a minus sign; a text from a
    record or a suite, such as a label, goes through `as_markdown`.
    """
    return Said(re.sub(r"(?<![\w`^{$-])-(?=\d)", "\N{MINUS SIGN}", text.strip()))


def sentence(text: str) -> str:
    """Return ``text`` as a sentence begins: with a capital letter."""
    return text[:1].upper() + text[1:]


def source_of(*functions: Callable, docstrings: bool = False) -> Said:
    """Return the source of ``functions``, for a notebook to show as Python.

    Without ``docstrings`` each goes from its name to its code.
    """
    shown = []
    for function in functions:
        source = dedent(inspect.getsource(function))
        definition = ast.parse(source).body[0]
        first = definition.body[0]
        if not docstrings and ast.get_docstring(definition) is not None:
            lines = source.splitlines(keepends=True)
            del lines[first.lineno - 1 : first.end_lineno]
            source = "".join(lines)
        shown.append(source.strip("\n"))
    return Said("```python\n" + "\n\n\n".join(shown) + "\n```")


@contextmanager
def watched(steps: int, title: str) -> Iterator[Callable[[dict[str, float]], None]]:
    """Yield what reports a run of ``steps`` steps: a bar if a person runs this cell, else nothing."""
    if not _a_person_is_there():
        yield lambda measured: None
        return
    from IPython.display import display

    shown = {"step": 0.0}
    bar = display(_bar(shown, steps, title), raw=True, display_id=True)

    def report(measured: dict[str, float]) -> None:
        shown.update(measured)
        bar.update(_bar(shown, steps, title), raw=True)

    try:
        yield report
    finally:
        bar.update({"text/plain": "", "text/html": ""}, raw=True)


def _a_person_is_there() -> bool:
    """Return whether this code runs in a notebook whose frontend can ask somebody."""
    if "IPython" not in sys.modules:
        return False
    kernel = getattr(sys.modules["IPython"].get_ipython(), "kernel", None)
    return bool(getattr(kernel, "_allow_stdin", False))


def _bar(shown: dict[str, float], steps: int, title: str) -> dict[str, str]:
    """Return the bar in the two forms that a frontend may choose from."""
    losses = [f"{key[:-5]} {value:.3f}" for key, value in sorted(shown.items()) if key.endswith("_loss")]
    text = ", ".join([f"{title}: step {shown['step']:.0f}/{steps}", *losses])
    html = f'<progress value="{shown["step"]:.0f}" max="{steps}"></progress> {as_html(text)}'
    return {"text/plain": text, "text/html": html}
