"""Names of a package, and classes by name, whose module is imported when the first one asks for it.

Torch takes seconds to import, and what only says something (``localgpt --help``) must not wait for it.
"""

import ast
import sys
from collections import UserDict
from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec
from typing import Any

__all__ = ["Registry", "lazy_names"]


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


class Registry(UserDict[str, type]):
    """Classes by name; one that is entered as ``"module.Class"`` is imported when it is first asked for."""

    def __getitem__(self, name: str) -> type:
        found = super().__getitem__(name)
        if isinstance(found, str):
            module, _, cls = found.rpartition(".")
            found = self.data[name] = getattr(import_module(module), cls)
        return found

    def summary(self, name: str) -> str:
        """Return what the module of a class says first: the class in a few words. Nothing is imported.

        A class that no file holds, from a notebook say, speaks for itself.
        """
        found = self.data[name]
        if isinstance(found, str):
            module = found.rpartition(".")[0]
            text = ast.get_docstring(ast.parse(find_spec(module).loader.get_source(module)))
        else:
            module = found if found.__module__ == "__main__" else sys.modules.get(found.__module__, found)
            text = module.__doc__ or found.__doc__
        return (text or name).partition("\n")[0].partition(", ``")[0].rstrip(".")
