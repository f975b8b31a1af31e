"""Alignment over training: measured between two steps, without changing the run."""

import math
from collections.abc import Iterator

from torch import Tensor

from localgpt_core.measure.alignment import alignment, feedback_cosines
from localgpt_core.measure.inside import (
    choices,
    code_radial_shares,
    concentration,
    entropy_bits,
    gates,
    radial_shares,
    unused_share,
)
from localgpt_core.model.gpt import LocalGPT

__all__ = ["Diagnostics", "measure_into", "measured_values"]

# Lists with one entry per measured step; for quantities with several places one list per name.
Diagnostics = dict[str, list | dict[str, list]]

DIGITS = 4


def measure_into(
    diagnostics: Diagnostics, model: LocalGPT, idx: Tensor, targets: Tensor, text: Tensor, step: int
) -> None:
    """Append what the rule of ``model`` does at ``step`` on one batch to ``diagnostics``.

    ``step``, ``total_cosine`` and ``descends`` (1 or 0) have one number per measured step; ``cosine`` and
    ``norm_ratio`` one list per trained matrix, ``feedback`` one per feedback matrix (the cosine to what it
    stands in for); ``residual_rms``, ``rule_rms`` and ``exact_rms`` one list per step, by block.

    What goes on inside the model (`localgpt_core.measure.inside`) has one list per place, each where there is
    such a place: ``radial`` and ``vq_radial`` on the batch; ``unused`` and ``entropy``, or ``concentration``,
    on the tokens ``text`` (B, T), of which there should be many; ``gates``.
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
        "radial": radial_shares(model, idx, targets),
        "gates": gates(model),
    }
    chosen = choices(model, text)
    by_name["unused"] = {place: unused_share(counts) for place, counts in chosen.items()}
    by_name["entropy"] = {place: entropy_bits(counts) for place, counts in chosen.items()}
    if model.config.vq_codes:
        by_name["vq_radial"] = code_radial_shares(model, idx, targets)
    if not model.config.mlp_topk:
        by_name["concentration"] = concentration(model, text)
    for key, values in by_name.items():
        table = diagnostics.setdefault(key, {})
        for name, value in values.items():
            table.setdefault(name, []).append(_short(value))


def _short(value: float) -> float | None:
    """Return ``value`` with few digits: a cosine has no more to say; None where it is not a number."""
    return float(f"{value:.{DIGITS}g}") if math.isfinite(value) else None


def measured_values(diagnostics: Diagnostics, quantity: str) -> Iterator[tuple[int, str, float | None]]:
    """Yield step, name and value of one quantity."""
    if quantity not in diagnostics:
        return
    steps, values = diagnostics["step"], diagnostics[quantity]
    if isinstance(values, dict):
        yield from ((step, name, v) for name, vs in values.items() for step, v in zip(steps, vs, strict=True))
        return
    for step, value in zip(steps, values, strict=True):
        by_block = value if isinstance(value, list) else None
        if by_block is None:
            yield step, "", value
        else:
            yield from ((step, f"blocks.{i}", v) for i, v in enumerate(by_block))
