"""The ground that all stand on.

How a value is refused by name, how random numbers are drawn from keys, files that are whole or not there,
what something is measured on, states of a model that end with their block, derivatives that are refused by
name, and names that are imported when asked for. Nothing here knows of a rule or a text, and nothing of the
package is imported.
"""

from localgpt_core.common.environment import code_version, environment, wait_for
from localgpt_core.common.files import atomic_write, require_writable
from localgpt_core.common.lazy import lazy_names
from localgpt_core.common.validation import (
    Refusal,
    check_needs,
    check_values,
    option,
    require,
    require_choice,
    require_integer,
)

WITH_TORCH = {
    "LocalFunction": "functions",
    "MaybeExact": "modes",
    "evaluation_mode": "modes",
    "exact_derivatives": "modes",
    "generator": "seeds",
    "in_float32": "modes",
    "normal_like": "seeds",
    "seed_from": "seeds",
    "set_for_a_while": "modes",
    "watch": "modes",
    "wide": "modes",
    "without_autocast": "modes",
}
__getattr__ = lazy_names(__name__, WITH_TORCH)

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
    "lazy_names",
    "normal_like",
    "option",
    "require",
    "require_choice",
    "require_integer",
    "require_writable",
    "seed_from",
    "set_for_a_while",
    "wait_for",
    "watch",
    "wide",
    "without_autocast",
]
