"""The verdict on a claim, from the paired differences of the recorded runs.

With m claims in a suite that do not stand alone, each interval has the level 1 - 0.05 / m (Bonferroni), so
that all m of them cover what they estimate together with at least 95 %. The interval of a claim that stands
alone has 95 % by itself: among twenty of these, one misses what it estimates. A claim

- holds if the whole interval lies in the region that it names,
- fails if the whole interval lies outside,
- is open otherwise: the runs do not say. So is one without a margin whose difference is not larger than
  what rounding alone makes of that many pairs, where that is measured.
"""

from dataclasses import dataclass

import pandas as pd

from localgpt_core.evidence.intervals import MINUS, estimate, lies
from localgpt_core.experiments.claims import Claim
from localgpt_core.report.results import SuiteResults
from localgpt_core.report.tables import DASH, TOO_FEW

__all__ = ["Decision", "claim_table", "decide", "decisions", "stated"]

FAMILY_ERROR = 0.05
VERDICTS = {True: "holds", False: "fails", None: "open"}


@dataclass(frozen=True)
class Decision:
    """A claim with what the records say of it.

    Attributes:
        claim: The claim.
        mean: Mean paired difference in final loss, in nats per character; NaN without a pair.
        half: Half-width of its interval.
        n: Number of pairs.
        verdict: ``"holds"``, ``"fails"`` or ``"open"``; or why there is none: ``"not enough runs"`` before
            every planned pair is recorded, or that a run diverged.
    """

    claim: Claim
    mean: float
    half: float
    n: int
    verdict: str

    @property
    def number(self) -> str:
        """The difference with its interval and n once the claim is decided, before that n alone."""
        decided = self.verdict in VERDICTS.values()
        number = estimate(self.mean, self.half, self.n, "+") if decided else f"(n = {self.n})"
        return number.replace("-", MINUS)

    @property
    def stated(self) -> str:
        """The claim, its verdict and `number`, in Markdown."""
        return f"{self.claim.says} **{self.verdict}** {self.number}"

    @property
    def cells(self) -> str:
        """The same as cells of a row of a table in Markdown, the interval on one line, no verdict a dash."""
        number = self.number.replace(" ± ", "\u00a0±\u00a0")
        verdict = DASH if self.verdict == TOO_FEW else f"**{self.verdict}**"
        return f"{verdict} | {number} | {self.claim.says}"


def level_of(claim: Claim, results: SuiteResults) -> float:
    """Return the level of a claim's interval, 1 - 0.05 / m among m claims that do not stand alone."""
    together = sum(not other.alone for other in results.suite.claims.values())
    return 1 - FAMILY_ERROR / (1 if claim.alone else together)


def decide(results: SuiteResults, name: str) -> Decision:
    """Return what the records say of a claim of the suite; ``KeyError`` if it has none of that name."""
    claim = results.suite.claims[name]
    mean, half, n = results.difference(claim.arm, claim.reference, level_of(claim, results))
    planned = {arm.name: {*arm.seeds} for arm in results.suite.arms}
    seeds = planned[claim.arm]
    pairs = len(seeds & planned.get(claim.reference, seeds))  # a floor has no seeds
    undecided = results.undecided(claim.arm, claim.reference, n, pairs)
    rounding = claim.margin == 0 and abs(mean) <= results.floor(n)
    decided = None if rounding else lies(mean, half, claim.region)
    return Decision(claim, mean, half, n, undecided or VERDICTS[decided])


def stated(results: SuiteResults, *names: str) -> str:
    """Return what the records say of these claims of a suite, one after the other, as a list in Markdown."""
    return "\n".join(f"- {decide(results, name).stated}" for name in names)


def decisions(results: SuiteResults) -> dict[str, Decision]:
    """Return what the records say of every claim of a suite, by name."""
    return {name: decide(results, name) for name in results.suite.claims}


def claim_table(results: SuiteResults) -> pd.DataFrame:
    """Return one row per claim for people: verdict, difference d with its interval, criterion, sentence."""
    rows = []
    for decision in decisions(results).values():
        claim = decision.claim
        rows.append(
            {
                "verdict": decision.verdict,
                "difference": estimate(decision.mean, decision.half, decision.n, "+") if decision.n else "-",
                "criterion": in_words(claim),
                "claim": claim.says,
            }
        )
    return pd.DataFrame(rows, columns=["verdict", "difference", "criterion", "claim"])


def in_words(claim: Claim) -> str:
    """Return the criterion as a formula in d, such as ``"|d| < 0.02"``."""
    return {
        "below": f"d < {-claim.margin or 0:g}",
        "above": f"d > {claim.margin:g}",
        "equal": f"|d| < {claim.margin:g}",
        "within": f"d < {claim.margin:g}",
    }[claim.criterion]
