"""Does a repeated run give the recorded one?"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from localgpt_core.common.validation import require
from localgpt_core.records import RunRecord
from localgpt_core.training.curves import as_the_last

__all__ = ["FREE", "Verdict", "check_tolerance", "diagnose_every", "judge"]

SAME_MACHINE = ("device", "cpu_capability", "threads", "torch", "python", "processes", "accumulate")
ONE_PART = {"processes": 1, "accumulate": 1}  # and not noted
SHOWN = 3  # differences that a verdict spells out

# Of the scale of a quantity of the diagnostics, on another machine: at step 0, where only rounding differs.
DIAGNOSTICS_AT_START, DIAGNOSTICS_LATER = 0.01, 0.2
OF_SCALE_1 = ("total_cosine", "cosine", "feedback", "radial", "vq_radial", "unused", "concentration")
FEW_TOKENS = 5  # a point of the training curve, or of ``eval_between``, rests on fewer than the last one
RATES = 1e-5  # relative: the schedule's cosine is another one in its last digits
FLOPS = 0.05  # relative: versions count what surrounds the steps differently, which a verdict says

FREE = {
    "suite": "says for whom the run was made; a suite's table finds its runs by their digest",
    "arm": "the name that the run was made under; a suite's table takes the suite's own",
    "preset": "where the spec started from; the spec is in the record in full",
    "wall_time_s": "measured, and another time another one; no less than the time of its steps",
    "tokens_per_s": "measured, and another time another one; not so low that its steps outlast the run",
    "peak_memory_mib": "measured, and depends on what the process did before",
    "error": "words of a failure",
    "provenance.command": "how the run was asked for",
    "provenance.git_commit": "the code is not in the record",
    "provenance.git_dirty": "the code is not in the record",
    "provenance.start": "a date",
    "provenance.end": "a date",
    "environment.numpy": "draws no number that changes with its version",
    "environment.cuda": "goes with torch's version",
    "environment.system": "goes with the device",
}
"""Fields of a record that neither reading nor `judge` can hold to anything, with the reason."""


@dataclass(frozen=True)
class Verdict:
    """Whether two records agree, and the sentence that says how that was judged."""

    agrees: bool
    text: str


@dataclass(frozen=True)
class _Gap:
    """A number that differs: its name, both values, and whether that is too much."""

    name: str
    recorded: Any
    now: Any
    size: float = math.inf
    allowed: float = 0.0

    def __str__(self) -> str:
        return f"{self.name} recorded {_short(self.recorded)}, now {_short(self.now)}"


def check_tolerance(tolerance: float) -> None:
    """Raise ``ValueError`` unless ``tolerance`` is a number of at least 0."""
    require(tolerance >= 0, "tolerance", tolerance, "must be a number of at least 0")


def diagnose_every(record: RunRecord) -> int:
    """Return the steps between the diagnostics of ``record``, 0 if it has none."""
    steps = record.diagnostics.get("step", [])
    last = record.run_spec.train.steps
    return math.gcd(*(step for step in steps if step != last)) or last if steps else 0


def judge(recorded: RunRecord, again: RunRecord, tolerance: float) -> Verdict:
    """Compare a record with its repetition, in everything that a page can show.

    These are the status, the final and the best loss, the curves, parameters, FLOPs per token, anchor steps,
    the diagnostics that are recorded, and the sample if there is one; `FREE` says what is not compared.

    On the same kind of machine, with the same threads and software, all of it must be equal to the last digit
    that a record keeps. Elsewhere, and where a record does not say what it was made on,

    - the evaluations must be at the same steps;
    - every validation loss may differ by ``tolerance`` nats per character; every training loss, and what
      ``eval_between`` measures on fewer tokens, by 5 times as much. A loss that is finite on one side only is
      a difference; where none is finite on either side, the runs broke down alike and agree;
    - diagnostics may differ by 1 % of their scale at step 0 and by 20 % later: the scale of cosines and
      shares is 1, of anything else its largest recorded value;
    - the sample is not compared.

    Parameters and anchor steps must be equal everywhere. FLOPs per token may differ by 5 %, as versions of
    this package have counted differently; the verdict names any difference.

    Raises:
        ValueError: If ``tolerance`` is no number of at least 0.
    """
    check_tolerance(tolerance)
    recorded, again = recorded.as_kept(), again.as_kept()
    if recorded.status != again.status:
        return Verdict(False, f"differs: recorded {recorded.status}, now {again.status}")
    here, there = (ONE_PART | side.environment for side in (again, recorded))
    unknown = [key for key in SAME_MACHINE if key not in here or key not in there]
    differing = [key for key in SAME_MACHINE if key not in unknown and here[key] != there[key]]
    kinds = [side.get("device_type") for side in (there, here)]
    if "device" not in unknown + differing and None not in kinds and kinds[0] != kinds[1]:
        return Verdict(False, f"differs: device_type recorded {kinds[0]}, now {kinds[1]}, of one device")
    if not differing and not unknown:
        gaps = [*_counts(recorded, again, same=True), *_everything(recorded, again)]
        rule = "same machine class, threads and software: everything must be equal"
        return _verdict(gaps, f" ({rule})")
    machine = [
        f"{word} {', '.join(keys)}" for word, keys in (("another", differing), ("unknown", unknown)) if keys
    ]
    rule = f"{'; '.join(machine)}: validation losses may differ by {tolerance} nats"
    problem = _evaluations(recorded.curves, again.curves)
    if problem:
        return Verdict(False, f"differs: {problem}")
    losses = [*_losses(recorded, again, tolerance)]
    gaps = [*_counts(recorded, again, same=False), *losses]
    gaps += [*_training(recorded, again, FEW_TOKENS * tolerance), *_diagnostics(recorded, again)]
    one_sided = sum(gap.size == math.inf for gap in losses if gap.name == "curves.val_loss")
    if one_sided:
        return Verdict(False, f"differs: {one_sided} validation losses are finite on one side only ({rule})")
    if not any(loss is not None for loss in recorded.curves["val_loss"]):
        return _verdict(gaps, f": no validation loss is finite, recorded or now ({rule})")
    largest = max((gap.size for gap in losses), default=0.0)
    return _verdict(gaps, f": by {largest:.4g} nats at most ({rule})")


def _verdict(gaps: list[_Gap], how: str) -> Verdict:
    """Return the verdict over all that differs, which names the first of what differs too much."""
    too_large = [gap for gap in gaps if gap.size > gap.allowed]
    if not too_large:
        counted = [str(gap) for gap in gaps if gap.name == "flops_per_token"]
        return Verdict(True, "; counted otherwise: ".join([f"agrees{how}", *counted]))
    more = f", and {len(too_large) - SHOWN} more" if len(too_large) > SHOWN else ""
    return Verdict(False, f"differs{how}: {'; '.join(map(str, too_large[:SHOWN]))}{more}")


def _counts(recorded: RunRecord, again: RunRecord, same: bool) -> Iterator[_Gap]:
    """Yield what differs in counts, which no machine changes."""
    pairs = {
        f"parameters.{key}": (recorded.parameters.get(key), again.parameters.get(key))
        for key in sorted({*recorded.parameters, *again.parameters})
    }
    if recorded.status == "finished" or same:  # elsewhere, two runs may diverge at different steps
        pairs["anchor_steps"] = (recorded.anchor_steps, again.anchor_steps)
    for name, (own, now) in pairs.items():
        if own != now:
            yield _Gap(name, own, now)
    own, now = recorded.flops_per_token, again.flops_per_token
    if own != now:
        yield _gap("flops_per_token", own, now, FLOPS * (now or 0))


def _everything(recorded: RunRecord, again: RunRecord) -> Iterator[_Gap]:
    """Yield what differs at all."""
    for name in ("final_val_loss", "best_val_loss"):
        if getattr(recorded, name) != getattr(again, name):
            yield _Gap(name, getattr(recorded, name), getattr(again, name))
    for key in sorted({*recorded.curves, *again.curves}):
        yield from _first(f"curves.{key}", recorded.curves.get(key, []), again.curves.get(key, []))
    for name, own, now in _places(recorded, again):
        yield from _first(f"diagnostics.{name}", own, now)
    if recorded.sample and recorded.sample != again.sample:
        yield _Gap("sample", recorded.sample, again.sample)


def _first(name: str, own: list[Any], now: list[Any]) -> Iterator[_Gap]:
    """Yield the first entry in which two lists differ, or that their lengths do."""
    if len(own) != len(now):
        yield _Gap(f"values of {name}:", len(own), len(now))
        return
    pairs = enumerate(zip(own, now, strict=True))
    yield from [_Gap(f"{name}[{i}]", a, b) for i, (a, b) in pairs if a != b][:1]


def _places(recorded: RunRecord, again: RunRecord) -> Iterator[tuple[str, list[Any], list[Any]]]:
    """Yield every recorded quantity of the diagnostics, by place, with both lists of values.

    What is measured now and was not then is left out.
    """
    for key, values in recorded.diagnostics.items():
        now = again.diagnostics.get(key)
        if not isinstance(values, dict):
            yield key, values, now if isinstance(now, list) else []
            continue
        now = now if isinstance(now, dict) else {}
        for place in sorted({*values, *now}):
            yield f"{key}.{place}", values.get(place, []), now.get(place, [])


def _evaluations(recorded: dict[str, list], again: dict[str, list]) -> str:
    """Return what is wrong with the steps of two validation curves, empty if nothing is."""
    (steps, losses), (steps_now, losses_now) = (
        (curves.get("val_step", []), curves.get("val_loss", [])) for curves in (recorded, again)
    )
    if len(losses) != len(losses_now) or not losses:
        return f"{len(losses)} evaluations recorded, now {len(losses_now)}"
    return "" if steps == steps_now else f"evaluated at steps {steps}, now {steps_now}"


def _losses(recorded: RunRecord, again: RunRecord, tolerance: float) -> Iterator[_Gap]:
    for name in ("final_val_loss", "best_val_loss"):
        yield _gap(name, getattr(recorded, name), getattr(again, name), tolerance)
    comparable = as_the_last(recorded.curves, recorded.run_spec.train)
    for name in ("val_loss", "val_accuracy"):
        curves = (recorded.curves["val_step"], recorded.curves.get(name, []), again.curves.get(name, []))
        for step, own, now in zip(*(curves if curves[1] else [[]] * 3), strict=True):
            yield _gap(f"curves.{name}", own, now, tolerance * (1 if step in comparable else FEW_TOKENS))


def _training(recorded: RunRecord, again: RunRecord, tolerance: float) -> Iterator[_Gap]:
    """Yield the differences in the rest of the curves; two runs that diverged may end at different points."""
    for key in ("step", "tokens", "lr", "train_loss"):
        own, now = recorded.curves.get(key, []), again.curves.get(key, [])
        if recorded.status == "finished" and len(own) != len(now):
            yield _Gap(f"values of curves.{key}:", len(own), len(now))
        for a, b in zip(own, now, strict=False):
            allowed = tolerance if key == "train_loss" else RATES * abs(a or 0)
            if recorded.status == "finished" or None not in (a, b):
                yield _gap(f"curves.{key}", a, b, allowed)


def _diagnostics(recorded: RunRecord, again: RunRecord) -> Iterator[_Gap]:
    for name, own, now in _places(recorded, again):
        if len(own) != len(now) and recorded.status == "finished":
            yield _Gap(f"values of diagnostics.{name}:", len(own), len(now))
        kind = name.partition(".")[0]
        if kind == "descends":  # the sign of the total cosine, which may be near 0
            continue
        sizes = [abs(value) for values in own for value in _listed(values) if value is not None]
        scale = 0.0 if kind == "step" else 1.0 if kind in OF_SCALE_1 else max(sizes, default=0.0)
        for i, (values, values_now) in enumerate(zip(own, now, strict=False)):
            share = DIAGNOSTICS_LATER if i else DIAGNOSTICS_AT_START
            for a, b in zip(_listed(values), _listed(values_now), strict=False):
                yield _gap(f"diagnostics.{name}[{i}]", a, b, share * scale)


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _gap(name: str, own: float | None, now: float | None, allowed: float) -> _Gap:
    size = 0.0 if own == now else math.inf if None in (own, now) else abs(own - now)
    return _Gap(name, own, now, size, allowed)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
