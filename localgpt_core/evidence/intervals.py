"""Means of seeds and paired differences, each with its t interval."""

import math
from collections import Counter
from collections.abc import Iterable, Mapping

import numpy as np
import pandas as pd
from scipy.special import stdtrit  # scipy.stats takes most of a second to import

from localgpt_core.common.validation import require

__all__ = [
    "estimate",
    "interval",
    "lies",
    "paired_difference",
    "require_seeds_once",
    "share_closed",
    "signed",
]

MINUS = "\u2212"


def interval(values: list[float], level: float = 0.95) -> tuple[float, float]:
    """Return mean and half-width of the t interval of the mean; the half-width is NaN below n = 2."""
    n = len(values)
    if n == 0:
        return math.nan, math.nan
    numbers = np.array(values, dtype=float)
    half = stdtrit(n - 1, (1 + level) / 2) * numbers.std(ddof=1) / math.sqrt(n) if n > 1 else math.nan
    return float(numbers.mean()), float(half)


def lies(mean: float, half: float, region: tuple[float, float]) -> bool | None:
    """Return whether the interval lies in the open ``region``: all of it, none of it, or None for some."""
    first, last = region
    if first < mean - half and mean + half < last:
        return True
    return False if mean + half <= first or mean - half >= last else None


def paired_difference(
    runs: pd.DataFrame, arm: str, reference: str, level: float = 0.95
) -> tuple[float, float, int]:
    """Return mean, half-width of the interval and n of final loss(arm) - final loss(reference), seed by seed.

    Only seeds at which both arms finished count; without any, the numbers are NaN and n is 0.

    Raises:
        ValueError: If an arm has two runs of one seed.
    """
    losses = {}
    for name in (arm, reference):
        found = runs[(runs["arm"] == name) & (runs["status"] == "finished")]
        require_seeds_once(found, name)
        losses[name] = found.set_index("seed")["final_val_loss"]
    differences = (losses[arm] - losses[reference]).dropna().tolist()
    mean, half = interval(differences, level)
    return mean, half, len(differences)


def share_closed(runs: pd.DataFrame, arm: str, worst: str, best: str) -> tuple[float, float, int]:
    """Return how far ``arm`` gets from ``worst`` to ``best`` in percent: mean, half of its interval, n."""
    losses = runs.pivot(index="seed", columns="arm", values="final_val_loss")
    low, own, high = (losses.reindex(columns=[name])[name] for name in (worst, arm, best))
    shares = (100 * (low - own) / (low - high)).dropna().tolist()
    mean, half = interval(shares)
    return mean, half, len(shares)


def estimate(mean: float, half: float, n: int, sign: str = "") -> str:
    """Return ``"1.869 ± 0.037 (n = 3)"``; without a half-width only the mean. ``sign="+"`` shows the sign."""
    spread = "" if math.isnan(half) else f" ± {half:.3f}"
    return f"{mean:{sign}.3f}{spread} (n = {n})"


def signed(value: float, digits: int = 3) -> str:
    """Return a number with its sign, a real minus where it is negative."""
    return f"{value:+.{digits}f}".replace("-", MINUS)


def require_seeds_once(runs: Mapping[str, Iterable[int]], name: str, field: str = "arm") -> None:
    """Raise ``ValueError`` if ``runs``, those of ``name``, have two of one seed: they are not of one spec."""
    twice = ", ".join(str(seed) for seed, count in Counter(runs["seed"]).items() if count > 1)
    require(not twice, field, name, f"has several runs of seed {twice}, which have no mean")
