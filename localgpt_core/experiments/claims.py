"""Claims: what a suite is to decide, with the criterion, written down before its first run.

A claim is about d = final loss(arm) - final loss(reference), seed by seed, and says in what region d lies on
average. In the suite's file:

    [claims."kp grape equals bp"]
    says = "Kolen-Pollack with GrAPE ends where backpropagation ends."
    arm = "kp grape"
    reference = "bp"        # another arm, or an n-gram floor of the text, such as "3-gram"
    criterion = "equal"     # |d| < margin; below: d < -margin; above: d > margin; within: d < margin
    margin = 0.02           # nats per character; 0 where none is given
    alone = true            # where its interval has 95 % by itself; else all of a suite's have it together
    written = "322d2e7"     # the commit in which the criterion was first written down

`localgpt_core.ledger` holds it against the records.
"""

import math
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, fields
from typing import Any

from localgpt_core.common.validation import require, require_choice
from localgpt_core.corpus.ngrams import FLOORS

__all__ = ["CRITERIA", "Claim", "read_claims"]

# By criterion, the ends of the region that d lies in, in margins.
CRITERIA = {
    "below": (-math.inf, -1.0),
    "above": (1.0, math.inf),
    "equal": (-1.0, 1.0),
    "within": (-math.inf, 1.0),
}

REQUIRED = ("says", "arm", "reference", "criterion")


@dataclass(frozen=True)
class Claim:
    """A sentence and what decides it; ``margin`` is in nats per character, ``written`` a commit's name."""

    says: str
    arm: str
    reference: str
    criterion: str
    margin: float = 0.0
    alone: bool = False
    written: str = ""

    @property
    def region(self) -> tuple[float, float]:
        """The ends of the open interval that the difference lies in where the claim holds."""
        # Not 0 * inf, which is not a number.
        return tuple(end if math.isinf(end) else end * self.margin for end in CRITERIA[self.criterion])


def read_claims(where: str, found: Any, arms: Collection[str]) -> dict[str, Claim]:
    """Return the claims of a suite by name, from its table ``claims``.

    Raises:
        ValueError: Naming ``where`` and the claim, for a key that is missing or unknown, an arm that is not
            the suite's, a reference that is neither such an arm nor a floor, or a criterion or margin that
            decides nothing.
    """
    require(isinstance(found, Mapping), where, found, "must be a table of claims")
    keys = [item.name for item in fields(Claim)]
    commit = "the first 7 to 40 hexadecimal digits of a commit"
    claims = {}
    for name, table in found.items():
        own = f"{where}.{name}"
        require(isinstance(table, Mapping), own, table, "must be a table")
        for key in table:
            require(key in keys, f"{own}: key", key, "allowed are " + ", ".join(keys))
        for key in REQUIRED:
            require(key in table, f"{own}: key", key, "is missing")
        require(isinstance(table["says"], str) and table["says"], f"{own}: says", table["says"], "a sentence")
        require_choice(f"{own}: arm", table["arm"], arms)
        require_choice(f"{own}: reference", table["reference"], (*arms, *FLOORS))
        require(table["arm"] != table["reference"], f"{own}: reference", table["arm"], "must be another arm")
        require_choice(f"{own}: criterion", table["criterion"], CRITERIA)
        margin = table.get("margin", 0.0)
        number = isinstance(margin, int | float) and not isinstance(margin, bool) and 0 <= margin < math.inf
        needs = table["criterion"] != "equal" or margin != 0
        require(number and needs, f"{own}: margin", margin, "at least 0, and more for criterion 'equal'")
        alone, written = table.get("alone", False), table.get("written", "0000000")
        require(isinstance(alone, bool), f"{own}: alone", alone, "must be true or false")
        named = isinstance(written, str) and re.fullmatch("[0-9a-f]{7,40}", written) is not None
        require(named, f"{own}: written", written, commit)
        claims[name] = Claim(**{**table, "margin": float(margin)})
    return claims
