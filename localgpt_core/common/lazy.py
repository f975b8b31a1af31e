"""Names of a package whose module is imported when the first one asks for it.

Torch takes seconds to import, and what only says something (``localgpt --help``) must not wait for it.
"""

import sys
from collections.abc import Callable
from importlib import import_module
from typing import Any

__all__ = ["lazy_names"]


def lazy_names(package: str, names: dict[str, str]) -> Callable[[str], Any]:
    """Return the ``__getattr__`` of ``package`` (PEP 562).

    ``names`` gives for each public name the module below ``package`` that defines it. A module of the package
    is found as well, as it would be had the package imported it.
    """

    def look_up(name: str) -> Any:
        if name in names:
            value = getattr(import_module(f"{package}.{names[name]}"), name)
            return vars(sys.modules[package]).setdefault(name, value)
        if not name.startswith("_"):
            try:
                return import_module(f"{package}.{name}")
            except ModuleNotFoundError as error:
                if error.name != f"{package}.{name}":
                    raise
        raise AttributeError(f"module {package!r} has no attribute {name!r}")

    return look_up
