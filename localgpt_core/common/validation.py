"""One way to refuse a value: name the field, the value and what is allowed.

A configuration declares at each field what it allows (`option`), and `check_values` and `check_needs` hold it
to that.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import Field, field, fields
from typing import Any

__all__ = [
    "Refusal",
    "check_needs",
    "check_values",
    "option",
    "printable",
    "require",
    "require_choice",
    "require_integer",
]

# Intervals by what a person calls them; others are said as they are.
INTERVALS = {
    "(0, inf)": "must be positive and finite",
    "[0, inf)": "must be finite and not negative",
    "(-inf, inf)": "must be finite",
}

Needs = tuple[str, Callable[[Any], bool]]

LARGEST = 2**64 - 1  # an integer of a field that has no bound of its own: what a seed may be
LONGEST_VALUE = 1000  # characters of a value in a refusal


class Refusal(ValueError):
    """What a user asked for and cannot have; its message names the cause.

    Any other ``ValueError`` is a fault of the program or of a library, and the command line says so by its
    exit status.
    """


def require(ok: bool, field: str, value: Any, allowed: str) -> None:
    """Raise ``ValueError("field=value: allowed")`` unless ``ok``."""
    if not ok:
        raise Refusal(f"{field}={_shown(value)}: {allowed}")


def _shown(value: Any) -> str:
    """Return the repr of a value, the beginning of one that is long: nobody reads a million digits."""
    try:
        text = repr(value)
    except (RecursionError, ValueError):  # too deep, or an integer of more digits than Python writes
        return f"a {type(value).__name__} that is too large to be shown"
    return text if len(text) <= LONGEST_VALUE else f"{text[:LONGEST_VALUE]}... ({len(text)} characters)"


def printable(text: str) -> str:
    r"""Return ``text`` on one line: a line break or another sign that is no letter is written as ``\n``.

    So a name from a file of somebody's cannot steer a terminal, nor break a line that is read as one.
    """
    if text.isprintable():
        return text
    return "".join(sign if sign.isprintable() else repr(sign)[1:-1] for sign in text)


def require_choice(field: str, value: Any, choices: Iterable[str]) -> None:
    """Raise ``ValueError`` unless ``value`` is one of ``choices``."""
    choices = list(choices)
    require(value in choices, field, value, "allowed are " + ", ".join(repr(choice) for choice in choices))


def require_integer(field: str, value: Any, minimum: int, maximum: int | None = None) -> None:
    """Raise ``ValueError`` unless ``value`` is an ``int`` in ``[minimum, maximum]``."""
    is_integer = isinstance(value, int) and not isinstance(value, bool)
    upper = "" if maximum is None else f" and at most {maximum}"
    require(
        is_integer and value >= minimum and (maximum is None or value <= maximum),
        field,
        value,
        f"must be an integer of at least {minimum}{upper}",
    )


def option(
    default: Any,
    help: str,
    *,
    choices: Iterable[str] | None = None,
    minimum: int | None = None,
    maximum: Callable[[Any], int] | int = LARGEST,
    within: str | None = None,
    needs: Needs | tuple[Needs, ...] = (),
) -> Any:
    """Return a dataclass field that says what it does and what it allows, once for all who ask.

    Args:
        default: Its default, whose type is that of every value.
        help: Its effect, for ``--help`` and for the documentation.
        choices: The names that a string may be.
        minimum: The least value of an integer.
        maximum: Its greatest one, or a function of the configuration that returns it. What a size may be is
            far above what a machine holds, and keeps a slip from being tried for hours.
        within: An interval for a number, such as ``"(0, 2]"``.
        needs: What must hold of the configuration where the value is not the default, else it would have no
            effect: the words of the refusal, and the condition.
    """
    needs = (needs,) if needs and isinstance(needs[0], str) else needs
    allowed = {"choices": choices, "minimum": minimum, "maximum": maximum, "within": within, "needs": needs}
    return field(default=default, metadata={"help": help, **allowed})


def check_values(config: Any) -> None:
    """Raise ``ValueError`` unless each field of a configuration is of the kind and in the range it declares.

    An ``int`` is a number too.
    """
    for item in fields(config):
        _check_value(config, item, getattr(config, item.name))


def check_needs(config: Any) -> None:
    """Raise ``ValueError`` where a field is not at its default and what it needs beside it is missing."""
    for item in fields(config):
        value = getattr(config, item.name)
        for words, holds in item.metadata["needs"] if value != item.default else ():
            require(holds(config), item.name, value, words)


def _check_value(config: Any, item: Field, value: Any) -> None:
    """Raise ``ValueError`` unless ``value`` has the type of the field's default and lies in its range."""
    name, allowed = item.name, item.metadata
    if allowed["minimum"] is not None:
        maximum = allowed["maximum"](config) if callable(allowed["maximum"]) else allowed["maximum"]
        if value is not None or item.default is not None:
            require_integer(name, value, allowed["minimum"], maximum)
    elif isinstance(item.default, bool):
        require(isinstance(value, bool), name, value, "must be true or false")
    elif isinstance(item.default, float):
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        require(is_number, name, value, "must be a number")
        interval = allowed["within"]
        require(_lies_in(value, interval), name, value, INTERVALS.get(interval, f"must be in {interval}"))
    else:
        require(isinstance(value, str), name, value, "must be a string")
        if allowed["choices"] is not None:
            require_choice(name, value, allowed["choices"])


def _lies_in(value: float, interval: str) -> bool:
    """Return whether ``value`` lies in an interval such as ``"[0, 1)"``."""
    low, high = (float(end) for end in interval[1:-1].split(","))
    above = value >= low if interval[0] == "[" else value > low
    below = value <= high if interval[-1] == "]" else value < high
    return above and below and math.isfinite(value)
