"""What is recorded of the suites of a book: how many runs, what became of them, where, for which pages."""

import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from localgpt_core.common.notebooks import as_markdown, book_pages, cells_of
from localgpt_core.corpus.corpus import load_corpus
from localgpt_core.experiments.suites import read_suite
from localgpt_core.records import RunRecord, load_records
from localgpt_core.report.results import SuiteResults, suite_results

__all__ = ["SuiteStatus", "book_status", "broken_table", "pages_of", "status_of", "status_table"]

LOADS = re.compile(r"""load_results\(\s*["']([\w-]+)["']""")
NUMBER = re.compile(r"(\d+)-")


@dataclass(frozen=True)
class SuiteStatus:
    """A suite at its own preset, and what has become of its runs.

    Attributes:
        name: Its name.
        preset: Its preset.
        planned: Number of runs that it asks for.
        ended: Number of recorded runs by status: ``"finished"``, ``"diverged"``, ``"failed"``.
        machines: The processors or GPUs that made them, by number of runs.
        pages: The notebooks that load it, relative to the book.
        broken: The records of those that did not finish.
    """

    name: str
    preset: str
    planned: int
    ended: Counter[str]
    machines: Counter[str]
    pages: tuple[Path, ...]
    broken: tuple[RunRecord, ...]

    @property
    def missing(self) -> int:
        """Number of runs without a record."""
        return self.planned - self.ended.total()


def status_of(results: SuiteResults, pages: Iterable[Path] = ()) -> SuiteStatus:
    """Return what has become of the runs of a suite that ``pages`` load."""
    own = [results.records[digest] for digest in results.runs["digest"]]
    machines = Counter(str(record.environment.get("device", "unknown")) for record in own)
    broken = tuple(record for record in own if record.status != "finished")
    ended = Counter(record.status for record in own)
    return SuiteStatus(
        results.suite.name, results.preset, results.planned, ended, machines, (*pages,), broken
    )


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


def book_status(book: Path) -> list[SuiteStatus]:
    """Return the state of every suite in ``book/suites``, at its own preset, on its kind of device."""
    pages, records = pages_of(book), load_records(book / "records")
    suites = [read_suite(path) for path in sorted((book / "suites").glob("*.toml"))]
    texts = {name: load_corpus(name) for name in {suite.corpus for suite in suites}}
    found = [suite_results(suite, records, texts[suite.corpus]) for suite in suites]
    return [status_of(results, pages.get(results.suite.name, ())) for results in found]


def status_table(suites: Iterable[SuiteStatus]) -> str:
    """Return one row per suite as a table in Markdown, its pages linked from a page that lies in the book."""
    lines = ["| suite | preset | planned | finished | broke down | missing | made on | pages |"]
    lines.append("|---|---|--:|--:|--:|--:|---|---|")
    for suite in suites:
        machines = ", ".join(as_markdown(name) for name, _ in suite.machines.most_common()) or "-"
        pages = ", ".join(f"[{_short(page)}]({page.as_posix()})" for page in suite.pages) or "-"
        counts = (suite.planned, suite.ended["finished"], len(suite.broken), suite.missing)
        numbers = " | ".join(map(str, counts))
        lines.append(f"| `{suite.name}` | {suite.preset} | {numbers} | {machines} | {pages} |")
    return "\n".join(lines)


def broken_table(suites: Iterable[SuiteStatus]) -> str:
    """Return one row per run that did not finish as a table in Markdown; empty if all did."""
    lines = ["| suite | arm | seed | ended | lowest loss |", "|---|---|--:|---|--:|"]
    for suite in suites:
        for record in suite.broken:
            best = "-" if record.best_val_loss is None else f"{record.best_val_loss:.3f}"
            arm = as_markdown(record.arm)
            lines.append(f"| `{suite.name}` | {arm} | {record.seed} | {record.status} | {best} |")
    return "\n".join(lines) if len(lines) > 2 else ""


def _short(page: Path) -> str:
    """Return the number of a chapter, or the words of another page."""
    number = NUMBER.match(page.name)
    return number[1] if number else page.stem.replace("-", " ")
