"""What is recorded of the suites of a book: how many runs, what became of them, where, for which pages."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from localgpt_core.common.notebooks import as_markdown
from localgpt_core.ledger.sources import book_results, pages_of, short_name
from localgpt_core.records import RunRecord
from localgpt_core.report.results import SuiteResults

__all__ = ["SuiteStatus", "book_status", "broken_table", "status_of", "status_table"]


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


def book_status(book: Path) -> list[SuiteStatus]:
    """Return the state of every suite in ``book/suites``, at its own preset, on its kind of device."""
    pages = pages_of(book)
    return [status_of(results, pages.get(results.suite.name, ())) for results in book_results(book)]


def status_table(suites: Iterable[SuiteStatus]) -> str:
    """Return one row per suite as a table in Markdown, its pages linked from a page that lies in the book."""
    lines = ["| suite | preset | planned | finished | broke down | missing | made on | pages |"]
    lines.append("|---|---|--:|--:|--:|--:|---|---|")
    for suite in suites:
        machines = ", ".join(as_markdown(name) for name, _ in suite.machines.most_common()) or "-"
        pages = ", ".join(f"[{short_name(page)}]({page.as_posix()})" for page in suite.pages) or "-"
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
