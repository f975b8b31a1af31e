"""Does a repeated run give the recorded one?"""

import math
from dataclasses import dataclass

from localgpt_core.records import RunRecord

__all__ = ["Verdict", "compare"]

SAME_MACHINE = ("device", "threads", "torch", "python")


@dataclass(frozen=True)
class Verdict:
    """Whether two records agree, and the sentence that says how that was judged."""

    agrees: bool
    text: str


def compare(recorded: RunRecord, again: RunRecord, tolerance: float) -> Verdict:
    """Compare a record with its repetition.

    On the same kind of machine, with the same threads and software, the curves must be equal to the last
    digit that a record keeps. Elsewhere every validation loss may differ by ``tolerance`` nats per character.
    """
    again = RunRecord.from_json(again.to_json())
    if recorded.status != again.status:
        return Verdict(False, f"differs: recorded {recorded.status}, now {again.status}")
    differing = [key for key in SAME_MACHINE if recorded.environment[key] != again.environment[key]]
    if not differing:
        equal = recorded.curves == again.curves
        rule = "same machine class, threads and software: the curves must be equal"
        return Verdict(equal, f"{'agrees' if equal else 'differs'} ({rule})")
    counts = len(recorded.curves["val_loss"]), len(again.curves["val_loss"])
    if counts[0] != counts[1]:
        return Verdict(False, f"differs: {counts[0]} evaluations recorded, now {counts[1]}")
    pairs = zip(recorded.curves["val_loss"], again.curves["val_loss"], strict=True)
    largest = max((abs(a - b) for a, b in pairs if a is not None and b is not None), default=math.nan)
    agrees = largest <= tolerance
    rule = f"another {', '.join(differing)}: validation losses may differ by {tolerance} nats"
    return Verdict(agrees, f"{'agrees' if agrees else 'differs'}: by {largest:.4g} nats at most ({rule})")
