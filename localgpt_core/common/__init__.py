"""The ground that all stand on.

How a value is refused by name, how random numbers are drawn from keys, files that are whole or not there,
what something was measured on, states of a model that end with their block, and derivatives that are refused
by name. Nothing here knows of a rule or a text, and nothing of the package is imported.
"""

from localgpt_core.common.environment import code_version, environment
from localgpt_core.common.files import atomic_write, require_writable
from localgpt_core.common.functions import LocalFunction
from localgpt_core.common.modes import (
    MaybeExact,
    evaluation_mode,
    exact_derivatives,
    in_float32,
    set_for_a_while,
    watch,
    wide,
    without_autocast,
)
from localgpt_core.common.seeds import generator, normal_like, seed_from
from localgpt_core.common.validation import (
    Refusal,
    check_needs,
    check_values,
    option,
    require,
    require_choice,
    require_integer,
)

__all__ = [
    "LocalFunction",
    "MaybeExact",
    "Refusal",
    "atomic_write",
    "check_needs",
    "check_values",
    "code_version",
    "environment",
    "evaluation_mode",
    "exact_derivatives",
    "generator",
    "in_float32",
    "normal_like",
    "option",
    "require",
    "require_choice",
    "require_integer",
    "require_writable",
    "seed_from",
    "set_for_a_while",
    "watch",
    "wide",
    "without_autocast",
]
