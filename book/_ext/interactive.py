"""What the interactive parts of pages share: a page that asks for one loads its scripts, and no other page.

What they show beyond the text of the page is written into the built book as scripts, since a page that is
opened from a disk may fetch no file.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from bs4 import BeautifulSoup, Tag
from docutils import nodes


def elements(doctree: nodes.document, kind: str) -> list[Tag]:
    """Return the elements ``<div class="kind">`` of a page."""
    html = "".join(node.astext() for node in doctree.findall(nodes.raw) if kind in node.astext())
    return BeautifulSoup(html, "html.parser").select(f"div.{kind}")


@dataclass(frozen=True)
class Interactive:
    """One of them, by its ``name``.

    ``asked`` returns what a page asks for: nothing, mostly. ``files`` returns the styles and scripts that it
    then loads, in order and by their places under ``_static``, from the page's name and what it asks for.
    ``written`` returns by their places the scripts to make, from the book's folder and what pages ask for.
    """

    name: str
    asked: Callable[[nodes.document], list[str]]
    files: Callable[[str, list[str]], list[str]]
    written: Callable[[Path, dict[str, list[str]]], dict[str, str]]

    def note(self, app, doctree: nodes.document) -> None:
        """Keep what a page asks for where Sphinx keeps what it knows of a page."""
        if asked := self.asked(doctree):
            app.env.metadata[app.env.docname][self.name] = asked

    def load(self, app, pagename: str, templatename: str, context: dict, doctree) -> None:
        """Let a page load what it asks for."""
        asked = app.env.metadata.get(pagename, {}).get(self.name)
        for file in self.files(pagename, asked) if asked else ():
            if file.endswith(".css"):
                app.add_css_file(file)
            else:
                app.add_js_file(file, loading_method="defer")

    def write(self, app, exception: Exception | None) -> None:
        """Write the scripts that are made into the built book, if a page asks for any."""
        pages = {page: found[self.name] for page, found in app.env.metadata.items() if self.name in found}
        if exception is not None or app.builder.format != "html" or not pages:
            return
        for file, text in self.written(Path(app.srcdir, "book"), pages).items():
            path = Path(app.outdir, "_static", file)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(f'"use strict";\n{text}\n', encoding="utf-8")

    def register(self, app) -> dict[str, bool]:
        """Register all three with Sphinx; what an extension's ``setup`` returns."""
        app.connect("doctree-read", self.note)
        app.connect("html-page-context", self.load)
        app.connect("build-finished", self.write)
        return {"parallel_read_safe": True, "parallel_write_safe": True}
