"""Chapters have the number that their file begins with, and so have their figures, equations and exercises.

Sphinx numbers the pages of a list as they come. Between the chapters stand pages without a number, and a
chapter may be missing, so each says its own: `06-grape` is chapter 6, its third figure Figure 6.3.
"""

import re

from docutils import nodes
from sphinx.environment.collectors.toctree import TocTreeCollector


def chapter_number(docname: str) -> int | None:
    """Return the number of a page, None for one that is no chapter."""
    found = re.fullmatch(r".*chapters/(\d+)-[^/]*", docname)
    return int(found[1]) if found else None


def number_chapters(app, env) -> list[str]:
    """Give every chapter its number, and what is counted in it the same; return the pages that changed."""
    for docname, toc in env.tocs.items():
        number = chapter_number(docname)
        if number is None:
            continue
        title, *sections = toc.findall(nodes.reference)
        env.toc_secnumbers[docname] = {section["anchorname"]: () for section in sections} | {"": (number,)}
        title["secnumber"] = env.titles[docname]["secnumber"] = (number,)
    return TocTreeCollector().assign_figure_numbers(env)


def setup(app) -> dict[str, bool]:
    """Number after Sphinx has."""
    app.connect("env-get-updated", number_chapters, priority=900)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
