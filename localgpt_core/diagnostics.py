"""Alignment over training: measured between two steps, without changing the run."""

import math

from torch import Tensor

from localgpt_core.alignment import alignment, feedback_cosines
from localgpt_core.model import LocalGPT

__all__ = ["Diagnostics", "measure_into"]

# Lists with one entry per measured step; below "cosine", "norm_ratio" and "feedback" one list per name.
Diagnostics = dict[str, list | dict[str, list]]

DIGITS = 4


def measure_into(diagnostics: Diagnostics, model: LocalGPT, idx: Tensor, targets: Tensor, step: int) -> None:
    """Append what the rule of ``model`` does at ``step`` on one batch to ``diagnostics``.

    ``step``, ``total_cosine`` and ``descends`` (1 or 0) have one number per measured step; ``cosine`` and
    ``norm_ratio`` one list per trained matrix, ``feedback`` one per feedback matrix (the cosine to what it
    stands in for); ``residual_rms``, ``rule_rms`` and ``exact_rms`` one list per step, by block.
    """
    measured = alignment(model, idx, targets, seed=step)
    matrices = {name for name, p in model.named_parameters() if p.ndim >= 2}
    diagnostics.setdefault("step", []).append(step)
    for name in ("total_cosine", "descends"):
        diagnostics.setdefault(name, []).append(_short(float(getattr(measured, name))))
    for name in ("residual_rms", "rule_rms", "exact_rms"):
        diagnostics.setdefault(name, []).append([_short(value) for value in getattr(measured, name)])
    by_name = {
        "cosine": {name: value for name, value in measured.cosine.items() if name in matrices},
        "norm_ratio": {name: value for name, value in measured.norm_ratio.items() if name in matrices},
        "feedback": feedback_cosines(model, idx, seed=step),
    }
    for key, values in by_name.items():
        table = diagnostics.setdefault(key, {})
        for name, value in values.items():
            table.setdefault(name, []).append(_short(value))


def _short(value: float) -> float | None:
    """Return ``value`` with few digits: a cosine has no more to say; None where it is not a number."""
    return float(f"{value:.{DIGITS}g}") if math.isfinite(value) else None
