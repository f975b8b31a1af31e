"""What recorded runs show, and how surely.

Means of seeds and paired differences with their intervals; what rounding alone does to a run, below which a
difference says nothing; the learning rates that were tried of one setting; how a gap changes with a size.
"""

from localgpt_core.evidence.intervals import estimate, interval, paired_difference
from localgpt_core.evidence.noise import Noise, ends, rounding_noise
from localgpt_core.evidence.rates import RatesTried, rates_by_setting, setting_of
from localgpt_core.evidence.trends import Trend, trend

__all__ = [
    "Noise",
    "RatesTried",
    "Trend",
    "ends",
    "estimate",
    "interval",
    "paired_difference",
    "rounding_noise",
    "rates_by_setting",
    "setting_of",
    "trend",
]
