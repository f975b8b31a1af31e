"""Give every notebook of the book the cell that Colab needs, or take it away: `python tools/colab.py`.

Colab opens a notebook alone. So a notebook needs a cell that fetches the package with the records, from the
address of the repository. It stands in `_config.yml` alone, and is written from there: without an address the
notebooks have no such cell.
"""

from pathlib import Path

import nbformat
import yaml
from nbformat import NotebookNode

from localgpt_core.common.files import atomic_write
from localgpt_core.common.notebooks import book_pages

ROOT = Path(__file__).parents[1]
ID = "colab"
SOURCE = """\
# Where the package is missing, as on Colab: fetch it with the records.
import importlib.util
import os
import sys

if importlib.util.find_spec("localgpt_core") is None:
    !git clone --quiet --depth 1 {address} localgpt
    %pip install --quiet --editable "./localgpt[corpus,figures]"
    os.chdir("localgpt")
    sys.path.insert(0, os.getcwd())"""


def address() -> str:
    """Return the address of the repository, empty if there is none."""
    return yaml.safe_load((ROOT / "_config.yml").read_text(encoding="utf-8"))["repository"]["url"]


def prepare(notebook: NotebookNode, address: str) -> None:
    """Let the cell for ``address`` stand behind the first one, or none if it is empty."""
    notebook.cells = [cell for cell in notebook.cells if cell["id"] != ID]
    if address:
        cell = nbformat.v4.new_code_cell(SOURCE.format(address=address), id=ID)
        cell.metadata["tags"] = ["remove-cell"]
        notebook.cells.insert(1, cell)


def main() -> None:
    """Write the notebooks that are not as they should be."""
    for page in book_pages(ROOT / "book"):
        before = page.read_text(encoding="utf-8")
        notebook = nbformat.reads(before, as_version=4)
        prepare(notebook, address())
        after = nbformat.writes(notebook) + "\n"
        if after != before:
            atomic_write(page, after)


if __name__ == "__main__":
    main()
