"""What a book's ledger is made from: the recorded results of its suites, and the pages that load them."""

import re
from pathlib import Path

from localgpt_core.common.notebooks import book_pages, cells_of
from localgpt_core.corpus.corpus import load_corpus
from localgpt_core.experiments.suites import read_suite
from localgpt_core.records import load_records
from localgpt_core.report.results import SuiteResults, suite_results

__all__ = ["book_results", "pages_of", "short_name"]

LOADS = re.compile(r"""load_results\(\s*["']([\w-]+)["']""")
NUMBER = re.compile(r"(\d+)-")


def book_results(book: Path, records: Path | None = None) -> list[SuiteResults]:
    """Return the results of every suite in ``book/suites``, at its own preset, on its kind of device.

    They are read from the folder ``records``, ``book/records`` unless one is given.
    """
    found = load_records(records or book / "records")
    suites = [read_suite(path) for path in sorted((book / "suites").glob("*.toml"))]
    texts = {name: load_corpus(name) for name in {suite.corpus for suite in suites}}
    return [suite_results(suite, found, texts[suite.corpus]) for suite in suites]


def pages_of(book: Path) -> dict[str, list[Path]]:
    """Return the notebooks below ``book`` that load each suite by its name.

    Raises:
        ValueError, LookupError: For a file that is no notebook.
    """
    found: dict[str, list[Path]] = {}
    for path in book_pages(book):
        code = "\n".join("".join(cell["source"]) for cell in cells_of(path) if cell["cell_type"] == "code")
        for suite in dict.fromkeys(LOADS.findall(code)):
            found.setdefault(suite, []).append(path.relative_to(book))
    return found


def short_name(page: Path) -> str:
    """Return the number of a chapter, or the words of another page."""
    number = NUMBER.match(page.name)
    return number[1] if number else page.stem.replace("-", " ")
