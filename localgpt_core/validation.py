"""One way to refuse a value: name the field, the value and what is allowed."""

from collections.abc import Iterable
from dataclasses import fields
from typing import Any

__all__ = ["require", "require_choice", "require_integer", "require_types"]


def require(ok: bool, field: str, value: Any, allowed: str) -> None:
    """Raise ``ValueError("field=value: allowed")`` unless ``ok``."""
    if not ok:
        raise ValueError(f"{field}={value!r}: {allowed}")


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


def require_types(config: Any) -> None:
    """Raise ``ValueError`` unless each field of a dataclass has the type of its default.

    An ``int`` is a number too. Integer fields have a range to check as well; `require_integer` does both.
    """
    kinds = ((bool, bool, "true or false"), (float, int | float, "a number"), (str, str, "a string"))
    for item in fields(config):
        value = getattr(config, item.name)
        for default, allowed, name in kinds:
            if isinstance(item.default, default):
                ok = isinstance(value, allowed) and (default is bool or not isinstance(value, bool))
                require(ok, item.name, value, f"must be {name}")
