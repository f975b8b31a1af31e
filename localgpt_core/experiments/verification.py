"""Does a repeated run give the recorded one?"""

from dataclasses import dataclass

from localgpt_core.common.validation import require
from localgpt_core.experiments.records import RunRecord

__all__ = ["Verdict", "check_tolerance", "judge"]

Curves = dict[str, list[float | None]]

SAME_MACHINE = ("device", "threads", "torch", "python")


@dataclass(frozen=True)
class Verdict:
    """Whether two records agree, and the sentence that says how that was judged."""

    agrees: bool
    text: str


def check_tolerance(tolerance: float) -> None:
    """Raise ``ValueError`` unless ``tolerance`` is a number of at least 0."""
    require(tolerance >= 0, "tolerance", tolerance, "must be a number of at least 0")


def judge(recorded: RunRecord, again: RunRecord, tolerance: float) -> Verdict:
    """Compare a record with its repetition.

    On the same kind of machine, with the same threads and software, the curves must be equal to the last
    digit that a record keeps. Elsewhere, and where a record does not say what it was made on, the evaluations
    must be at the same steps, and every validation loss may differ by ``tolerance`` nats per character. A
    loss that is finite on one side only is a difference; where none is finite on either side, the runs broke
    down alike and agree.

    Raises:
        ValueError: If ``tolerance`` is no number of at least 0.
    """
    check_tolerance(tolerance)
    recorded, again = (RunRecord.from_json(record.to_json()) for record in (recorded, again))
    if recorded.status != again.status:
        return Verdict(False, f"differs: recorded {recorded.status}, now {again.status}")
    here, there = again.environment, recorded.environment
    unknown = [key for key in SAME_MACHINE if key not in here or key not in there]
    differing = [key for key in SAME_MACHINE if key not in unknown and here[key] != there[key]]
    if not differing and not unknown:
        equal = recorded.curves == again.curves
        rule = "same machine class, threads and software: the curves must be equal"
        return Verdict(equal, f"{'agrees' if equal else 'differs'} ({rule})")
    machine = [
        f"{word} {', '.join(keys)}" for word, keys in (("another", differing), ("unknown", unknown)) if keys
    ]
    rule = f"{'; '.join(machine)}: validation losses may differ by {tolerance} nats"
    return _within(recorded.curves, again.curves, tolerance, rule)


def _within(recorded: Curves, again: Curves, tolerance: float, rule: str) -> Verdict:
    """Compare two validation curves that may differ by ``tolerance``."""
    (steps, losses), (steps_now, losses_now) = (
        (curves.get("val_step", []), curves.get("val_loss", [])) for curves in (recorded, again)
    )
    if len(losses) != len(losses_now) or not losses:
        return Verdict(False, f"differs: {len(losses)} evaluations recorded, now {len(losses_now)}")
    if steps != steps_now:
        return Verdict(False, f"differs: evaluated at steps {steps}, now {steps_now}")
    pairs = list(zip(losses, losses_now, strict=True))
    one_sided = sum((a is None) != (b is None) for a, b in pairs)
    if one_sided:
        return Verdict(False, f"differs: {one_sided} validation losses are finite on one side only ({rule})")
    gaps = [abs(a - b) for a, b in pairs if a is not None]
    if not gaps:
        return Verdict(True, f"agrees: no validation loss is finite, recorded or now ({rule})")
    agrees = max(gaps) <= tolerance
    return Verdict(agrees, f"{'agrees' if agrees else 'differs'}: by {max(gaps):.4g} nats at most ({rule})")
