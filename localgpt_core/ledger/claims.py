"""Every claim of a book in one list, and whether the pages say of each what the records say.

A page states a claim by `Decision.stated` or `Decision.cells`, in an output. So wherever an output of a page
has the sentence of a claim, the verdict and the number of today's records must stand beside it.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from localgpt_core.common.notebooks import as_markdown, book_pages, cells_of, texts_of
from localgpt_core.ledger.sources import book_results, pages_of, short_name
from localgpt_core.ledger.verdicts import Decision, decisions, in_words, level_of

__all__ = ["BookClaim", "book_claims", "claims_page", "misstated"]


@dataclass(frozen=True)
class BookClaim:
    """A claim of a suite, what the records decide of it, and where it belongs.

    Attributes:
        suite: Name of its suite.
        name: Its name there.
        pages: The notebooks that load the suite, relative to the book.
        level: Level of its interval, such as 0.95.
        decision: The claim with its difference and its verdict.
    """

    suite: str
    name: str
    pages: tuple[Path, ...]
    level: float
    decision: Decision

    @property
    def id(self) -> str:
        """Suite and name."""
        return f"{self.suite}/{self.name}"

    def row(self) -> dict[str, Any]:
        """Return all of it as values for JSON; a difference is in nats per character, None without a pair."""
        claim, decided = self.decision.claim, self.decision
        mean, half = (value if value == value else None for value in (decided.mean, decided.half))  # NaN
        return {
            "id": self.id,
            "pages": [page.as_posix() for page in self.pages],
            "says": claim.says,
            "arm": claim.arm,
            "reference": claim.reference,
            "criterion": in_words(claim),
            "written": claim.written or None,
            "n": decided.n,
            "difference": mean,
            "half_width": half,
            "level": self.level,
            "verdict": decided.verdict,
        }


def book_claims(book: Path, records: Path | None = None) -> list[BookClaim]:
    """Return the claims of all suites in ``book/suites``, held against ``records`` (``book/records``).

    They come in the order of the pages that load their suites, chapters first.

    Raises:
        ValueError, LookupError: For a suite or a page that cannot be read.
    """
    pages, found = pages_of(book), []
    for results in book_results(book, records):
        suite = results.suite.name
        for name, decision in decisions(results).items():
            level = level_of(decision.claim, results)
            found.append(BookClaim(suite, name, (*pages.get(suite, ()),), level, decision))
    order = [page.relative_to(book) for page in book_pages(book)]
    return sorted(found, key=lambda claim: min(map(order.index, claim.pages), default=len(order)))


def misstated(book: Path, claims: Iterable[BookClaim]) -> list[str]:
    """Return, one line each, where an output of a page says of a claim what the records do not give."""
    claims, found = list(claims), []
    for path in book_pages(book):
        texts = [text for cell in cells_of(path) for text in texts_of(cell)]
        for claim in claims:
            says, stated = claim.decision.claim.says, claim.decision.stated
            others = (text.replace(stated, "").replace(claim.decision.cells, "") for text in texts)
            if any(says in text for text in others):
                page = path.relative_to(book)
                found.append(f"{page}: claim {claim.id}: the records say: {stated}")
    return found


def claims_page(claims: Iterable[BookClaim]) -> str:
    """Return one row per claim as a table in Markdown, its pages linked from a page that lies in the book."""
    titles = ("verdict", "d", "claim", "holds if", "level, percent", "written", "suite", "pages")
    lines = [f"| {' | '.join(titles)} |", "|---|--:|---|---|--:|---|---|---|"]
    for each in claims:
        claim = each.decision.claim
        pages = ", ".join(f"[{short_name(page)}]({page.as_posix()})" for page in each.pages) or "-"
        commit = f"`{claim.written[:7]}`" if claim.written else "-"
        criterion = as_markdown(in_words(claim))
        level = f"{100 * each.level:.1f}"
        lines.append(
            f"| {each.decision.cells} | {criterion} | {level} | {commit} | `{each.suite}` | {pages} |"
        )
    return "\n".join(lines)
