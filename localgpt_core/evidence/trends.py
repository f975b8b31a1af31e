r"""How a quantity changes per doubling of a size: a straight line over the logarithm, by least squares.

    y_i = a + b log2(x_i) + e_i,     b +- t_{(1 + level) / 2, n - 2} sqrt(s^2 / sum_i (log2(x_i) - m)^2)

with m the mean of the log2(x_i) and s^2 the sum of the squared residuals over n - 2. The interval takes the
residuals for independent and equally spread, whatever the size.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.special import stdtrit

from localgpt_core.common.validation import require

__all__ = ["Trend", "trend"]


@dataclass(frozen=True)
class Trend:
    """A line y = start + slope log2(x).

    Attributes:
        start: y at x = 1.
        slope: Change of y per doubling of x; NaN where all x are equal.
        half: Half-width of the interval of the slope; NaN below three points too.
        n: Points.
    """

    start: float
    slope: float
    half: float
    n: int

    def at(self, x: float) -> float:
        """Return y on the line."""
        return self.start + self.slope * math.log2(x)

    @property
    def verdict(self) -> str:
        """``"grows"`` or ``"shrinks"`` if the interval of the slope excludes 0, else ``"open"``."""
        if math.isnan(self.half) or abs(self.slope) <= self.half:
            return "open"
        return "grows" if self.slope > 0 else "shrinks"


def trend(sizes: Sequence[float], values: Sequence[float], level: float = 0.95) -> Trend:
    """Return the line through ``values`` (n) over log2 of ``sizes`` (n), with an interval of that level.

    Raises:
        ValueError: For a size that is not positive, or other numbers of sizes and values.
    """
    n = len(sizes)
    require(len(values) == n, "values", values, f"must be {n}, as many as sizes")
    require(all(size > 0 for size in sizes), "sizes", sizes, "must be positive")
    x, y = np.log2(np.array(sizes, dtype=float)), np.array(values, dtype=float)
    spread = float(((x - x.mean()) ** 2).sum()) if n else 0.0
    if spread == 0.0:
        return Trend(math.nan, math.nan, math.nan, n)
    slope = float(((x - x.mean()) * y).sum() / spread)
    start = float(y.mean() - slope * x.mean())
    if n < 3:
        return Trend(start, slope, math.nan, n)
    left = float(((y - start - slope * x) ** 2).sum() / (n - 2))
    return Trend(start, slope, float(stdtrit(n - 2, (1 + level) / 2)) * math.sqrt(left / spread), n)
