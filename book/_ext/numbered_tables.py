"""Tables that a notebook shows are numbered, as its figures are, and sentences can refer to them.

Such a table is HTML, whose caption Sphinx does not see. So each is put into a node that Sphinx counts, and
its number is written into the caption. Its name is the id that it has in the HTML, so that a link such as
`[Table 6.2](#T_ch06-transport)` leads to it here and in JupyterLab; a test of the built pages compares the
number in the link with the one in the caption.
"""

import re

from docutils import nodes
from sphinx.transforms import SphinxTransform

SHOWN = re.compile(r'<table id="(?P<name>T_[\w-]+)".*?<caption>(?P<caption>.*?)</caption>', re.DOTALL)


class ShownTable(nodes.General, nodes.Element):
    """Holds the HTML of a table until its number is known."""


def caption(node: ShownTable) -> str:
    """Return the caption of the table in ``node``."""
    return SHOWN.search(node.astext())["caption"]


class Wrap(SphinxTransform):
    """Put every table with a name and a caption into a node that is counted, and can be referred to."""

    default_priority = 500

    def apply(self, **kwargs) -> None:
        """Name the node as its table."""
        for raw in [*self.document.findall(nodes.raw)]:
            table = SHOWN.search(raw.astext()) if raw["format"] == "html" else None
            if table is None:
                continue
            node = ShownTable(ids=[table["name"]], names=[table["name"]])
            raw.replace_self(node)
            node += raw
            self.document.note_explicit_target(node)


def write_numbers(app, doctree: nodes.document, docname: str) -> None:
    """Write the number of every table into its caption, and take the nodes away that held the tables."""
    numbers = app.env.toc_fignumbers.get(docname, {}).get("table", {})
    for node in [*doctree.findall(ShownTable)]:
        number = ".".join(map(str, numbers[node["ids"][0]]))
        mark = f'<caption><span class="caption-number">{app.config.numfig_format["table"] % number} </span>'
        raw = node[0]
        node.replace_self(nodes.raw("", raw.astext().replace("<caption>", mark, 1), format="html"))


def setup(app) -> dict[str, bool]:
    """Count them as Sphinx counts its own tables."""
    app.add_enumerable_node(ShownTable, "table", caption)
    app.add_transform(Wrap)
    app.connect("doctree-resolved", write_numbers)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
