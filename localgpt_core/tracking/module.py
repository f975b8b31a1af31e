"""Any module that is called as Weights & Biases is: ``init``, ``log`` and ``finish``."""

from collections.abc import Callable
from importlib import import_module
from inspect import Parameter, signature
from typing import Any

from localgpt_core.common.validation import require
from localgpt_core.tracking.tracker import TrackedRun

__all__ = ["ModuleTracker"]

CALLS = ("init", "log", "finish")


class ModuleTracker:
    """Hands everything on to the module ``name``, such as ``wandb`` or ``trackio``, as runs of ``project``.

    A run that goes on is resumed by its digest where ``init`` takes an ``id``, else by its name. Keywords
    that a module does not take are left out.

    Raises:
        ImportError: Without that module.
        ValueError: If it lacks one of the three functions.
    """

    def __init__(self, name: str, project: str) -> None:
        self.name, self.project, self.module = name, project, import_module(name)
        missing = [call for call in CALLS if not callable(getattr(self.module, call, None))]
        require(
            not missing, "track", name, f"has no {' and no '.join(missing)}, which such a module must have"
        )

    def start(self, run: TrackedRun) -> None:
        """Call ``init``."""
        given = {"project": self.project, "name": run.name, "id": run.digest, "config": run.config}
        _call(self.module.init, given if run.step is None else given | {"resume": "allow"})

    def log(self, step: int, values: dict[str, float]) -> None:
        """Call ``log``."""
        self.module.log(values, step=step)

    def finish(self, status: str) -> None:
        """Call ``finish``, where it is known with exit status 1 for a run that failed or diverged."""
        _call(self.module.finish, {"exit_code": int(status in ("failed", "diverged"))})

    def __str__(self) -> str:
        return f"{self.name}:{self.project}"


def _call(function: Callable[..., Any], given: dict[str, Any]) -> None:
    """Call ``function`` with those of the keywords ``given`` that it takes."""
    known = signature(function).parameters
    takes_all = any(parameter.kind is Parameter.VAR_KEYWORD for parameter in known.values())
    function(**{key: value for key, value in given.items() if takes_all or key in known})
