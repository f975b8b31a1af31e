"""The rules in other people's modules.

Which linear layers of a module can be replaced, what takes their place, and how the output's error reaches
layers that know nothing of taps. A conversion keeps parameters and values, and can be undone. It needs
nothing of the GPT.
"""

from localgpt_core.convert.layers import (
    Converted,
    ConvertedLinear,
    choose,
    output_width,
    replacement,
    why_nothing,
)
from localgpt_core.convert.localize import localize
from localgpt_core.convert.localized import Localized
from localgpt_core.convert.taps import Taps

__all__ = [
    "Converted",
    "ConvertedLinear",
    "Localized",
    "Taps",
    "choose",
    "localize",
    "output_width",
    "replacement",
    "why_nothing",
]
