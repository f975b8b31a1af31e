"""What a record states twice, held together when it is read.

A number that stands in a table or a figure is refused here if the rest of the record says another one. What
a record states once is compared by `localgpt_core.experiments.verification`, with the run made again.
"""

import hashlib
import json
import math
import re
import types
from collections.abc import Iterator
from functools import cache
from typing import Any, get_args, get_origin, get_type_hints

from localgpt_core.common.validation import require, require_integer
from localgpt_core.config.schedule import anchors_in
from localgpt_core.corpus.corpus import SHA256
from localgpt_core.corpus.recall import HOPS
from localgpt_core.training.curves import ACCURACY, KEPT, as_the_last, check_curves, check_increasing

__all__ = ["STATUSES", "check_consistency", "check_fields", "check_name", "checksum"]

Record = Any  # a `RunRecord`, whose module imports this one

STATUSES = ("failed", "diverged", "finished")  # from the one that says least
LONGEST_NAME = 200  # characters
SUITE = r"|\w[\w .,+=()-]{0,99}"
RANGES = {
    "descends": (0, 1),
    "total_cosine": (-1, 1),
    "cosine": (-1, 1),
    "feedback": (-1, 1),
    "unused": (0, 1),
    "norm_ratio": (0, math.inf),
    "residual_rms": (0, math.inf),
    "rule_rms": (0, math.inf),
    "exact_rms": (0, math.inf),
}


def check_fields(record: Record) -> None:
    """Raise ``ValueError`` for a field of another type, or a name that cannot be a folder's or be printed."""
    require(record.status in STATUSES, "status", record.status, "unknown")
    for name, kinds in _kinds(type(record)).items():
        value = getattr(record, name)
        allowed = " or ".join(kind.__name__ for kind in kinds)
        require(isinstance(value, kinds), name, value, f"must be of type {allowed}")
    for name in ("suite", "arm", "preset"):
        check_name(name, getattr(record, name))


def check_name(field: str, value: str) -> None:
    """Raise ``ValueError`` for the name of a suite, an arm or a preset that no record may have."""
    if field == "suite":
        plain = re.fullmatch(SUITE, value)
        require(bool(plain), field, value, "must be a plain name: a folder has it")
    shown = value.isprintable() and len(value) <= LONGEST_NAME
    require(shown, field, value, f"must be printable, of at most {LONGEST_NAME} characters")


@cache
def _kinds(record: type) -> dict[str, tuple[type, ...]]:
    """Return the types that the annotation of each field allows; an integer is a number too."""
    found = {}
    for name, hint in get_type_hints(record).items():
        kinds = tuple(
            get_origin(kind) or kind
            for kind in (get_args(hint) if isinstance(hint, types.UnionType) else [hint])
        )
        found[name] = (*kinds, int) if float in kinds else kinds
    return found


def checksum(values: dict[str, Any]) -> str:
    """Return the SHA-256 of the canonical JSON of a record's fields."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def check_consistency(record: Record) -> None:
    """Raise ``ValueError`` where a record contradicts itself, naming the field.

    With s_i the steps of the curves, B the batch size and T the context, of a run of n steps:

    - tokens_i = s_i B T, lr_i is the schedule's, evaluations are at every ``eval_interval`` steps and at n;
    - a finished run reaches n with finite losses and ends with ``final_val_loss``; a diverged one has none,
      and its last loss alone is not finite; a failed one has measured nothing;
    - accuracies are shares, one for each evaluation, and of a corpus with a name are there if it has answers;
    - ``best_val_loss`` is the lowest of the curve, or with ``eval_between`` its last one, and
      ``anchor_steps`` what the spec makes of the steps taken;
    - tokens / ``tokens_per_s``, the time of the steps, is at most ``wall_time_s``;
    - diagnostics have one value per measured step, in the range of their kind.
    """
    for name in ("wall_time_s", "peak_memory_mib"):
        value = getattr(record, name)
        require(0 <= value < math.inf, name, value, "must be finite and not negative")
    _check_environment(record.environment)
    if record.status == "failed":
        for name in ("final_val_loss", "best_val_loss", "tokens_per_s", "flops_per_token", "anchor_steps"):
            require(not getattr(record, name), name, getattr(record, name), "a failed run has none")
        for name in ("parameters", "curves", "diagnostics", "sample"):
            require(not getattr(record, name), name, getattr(record, name), "a failed run has none")
        return
    spec = record.run_spec
    check_curves(record.curves, spec.model.block_size, spec.train, spec.train.steps)
    if SHA256.get(spec.corpus) == spec.corpus_sha256:
        names, answers = sorted(record.curves), spec.corpus in HOPS
        allowed = f"corpus {spec.corpus!r} has {'' if answers else 'no '}answers"
        require((ACCURACY in names) == answers, "curves", names, allowed)
    evaluated = record.curves["val_step"]
    require(len(evaluated) > 0, "curves.val_step", evaluated, "the untrained model is measured")
    done = max([*record.curves["step"], *record.curves["val_step"]], default=0)
    _check_status(record, spec.train.steps, done)
    finite = [loss for loss in as_the_last(record.curves, spec.train).values() if loss is not None]
    what = "the last of its curve" if spec.train.eval_between else "the lowest of its curve"
    _require_same("best_val_loss", record.best_val_loss, min(finite, default=None), what)
    _require_same("anchor_steps", record.anchor_steps, anchors_in(done, spec.train), "what its spec makes")
    _check_speed(record, done * spec.train.batch_size * spec.model.block_size)
    counts = record.parameters
    require(set(counts) == {"total", "trained"}, "parameters", counts, "must be total and trained")
    require_integer("parameters.total", counts["total"], 1)
    require_integer("parameters.trained", counts["trained"], 1, counts["total"])
    flops = record.flops_per_token
    require(flops is not None and 0 < flops < math.inf, "flops_per_token", flops, "must be positive")
    require(not (record.error and record.sample), "error", record.error, "says why there is no sample")
    _check_diagnostics(record.diagnostics, done)


def _require_same(name: str, value: Any, other: Any, what: str) -> None:
    require(value == other, name, value, f"{what} is {other!r}")


def _check_environment(environment: dict[str, Any]) -> None:
    kind, threads = environment.get("device_type", "cpu"), environment.get("threads", 1)
    require(kind in ("cpu", "cuda"), "environment.device_type", kind, "allowed are 'cpu', 'cuda'")
    require_integer("environment.threads", threads, 1)


def _check_status(record: Record, steps: int, done: int) -> None:
    """Check that the losses are those of a run that ended like this one."""
    curves = record.curves
    losses = [("train_loss", *point) for point in zip(curves["step"], curves["train_loss"], strict=True)]
    losses += [("val_loss", *point) for point in zip(curves["val_step"], curves["val_loss"], strict=True)]
    lost = [(name, step) for name, step, loss in losses if loss is None]
    if record.status == "diverged":
        _require_same("final_val_loss", record.final_val_loss, None, "that of a diverged run")
        ends = len(lost) == 1 and lost[0][1] == done
        require(ends, "status", record.status, f"the last loss alone is not finite; here are {lost}")
        return
    require(not lost, "status", record.status, f"but not finite are {lost}")
    last = [*curves["step"][-1:], curves["val_step"][-1]]
    require(last == [steps, steps], "status", record.status, f"has {steps} steps; its curves end at {last}")
    _require_same("final_val_loss", record.final_val_loss, curves["val_loss"][-1], "the last of its curve")


def _check_speed(record: Record, tokens: int) -> None:
    speed, wall = record.tokens_per_s, record.wall_time_s
    if not tokens:
        _require_same("tokens_per_s", speed, None, "that of no step")
        return
    require(speed is not None and 0 < speed < math.inf, "tokens_per_s", speed, "must be positive")
    needed = tokens / speed
    within = needed <= wall * (1 + KEPT)
    require(within, "tokens_per_s", speed, f"{tokens} tokens then take {needed:.6g} s of {wall:.6g} s")


def _check_diagnostics(diagnostics: dict[str, Any], done: int) -> None:
    if not diagnostics:
        return
    steps = diagnostics.get("step")
    require(isinstance(steps, list), "diagnostics.step", steps, "must be a list of steps")
    check_increasing("diagnostics.step", steps, 0, done)
    for name, values in _series(diagnostics):
        field, (low, high) = f"diagnostics.{name}", RANGES.get(name.partition(".")[0], (-math.inf, math.inf))
        require(len(values) == len(steps), field, values, f"{len(values)} values for {len(steps)} steps")
        allowed = f"must be in [{low}, {high}]"
        for value in (v for entry in values for v in (entry if isinstance(entry, list) else [entry])):
            require(isinstance(value, int | float | None), field, value, "must be a number")
            inside = value is None or low <= value <= high
            require(inside, field, value, allowed)
    signs, cosines = (diagnostics.get(name, ()) for name in ("descends", "total_cosine"))
    for descends, cosine in zip(signs, cosines, strict=False):
        if descends is not None and cosine:  # one of 0 may be rounded, or the quotient of an overflow
            allowed = f"a total cosine of {cosine} says {int(cosine > 0)}"
            require(bool(descends) == (cosine > 0), "diagnostics.descends", descends, allowed)


def _series(diagnostics: dict[str, Any]) -> Iterator[tuple[str, list[Any]]]:
    """Yield every quantity of the diagnostics, or each of its places, with its values by step."""
    for name, values in diagnostics.items():
        places = {f"{name}.{place}": own for place, own in values.items()} if isinstance(values, dict) else {}
        for field, own in (places or {name: values}).items() if values != {} else ():
            require(isinstance(own, list), f"diagnostics.{field}", own, "must be a list")
            yield field, own
