"""What a tracker is told of a run, and that a run goes on when it fails."""

import warnings
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Protocol

__all__ = ["Guarded", "TrackedRun", "Tracker"]


@dataclass(frozen=True)
class TrackedRun:
    """A run that starts, or goes on.

    Attributes:
        name: Its arm or rule, seed and digest: the same whenever it goes on.
        digest: The digest of its `RunSpec`.
        config: Every field of model and run, and what the run is made for, by name: strings, numbers, truth
            values and None.
        step: The step from which it goes on; None for a run that starts.
    """

    name: str
    digest: str
    config: dict[str, Any]
    step: int | None = None


class Tracker(Protocol):
    """Whoever is told of runs, one after the other. Of several processes that make a run, the first tells."""

    def start(self, run: TrackedRun) -> None:
        """Take note that ``run`` starts, or goes on: what was logged after its step is made again."""

    def log(self, step: int, values: dict[str, float]) -> None:
        """Take what was measured at ``step``, by name; steps do not decrease within a run."""

    def finish(self, status: str) -> None:
        """Take note that the run has ended, by the status of its `TrainResult` or ``"failed"``."""


class Guarded:
    """A tracker that costs no run: after the first failure it warns, and is told no more of this run.

    The next run that starts is tried again.
    """

    def __init__(self, tracker: Tracker) -> None:
        self.tracker, self.lost = tracker, False

    @classmethod
    def of(cls, tracker: Tracker) -> "Guarded":
        """Return ``tracker``, guarded if it is not."""
        return tracker if isinstance(tracker, cls) else cls(tracker)

    def start(self, run: TrackedRun) -> None:
        """Start ``run``."""
        self.lost = False
        self._tell("start", run)

    def log(self, step: int, values: dict[str, float]) -> None:
        """Log ``values``."""
        self._tell("log", step, values)

    def finish(self, status: str) -> None:
        """End the run."""
        self._tell("finish", status)

    def _tell(self, call: str, *words: Any) -> None:
        if self.lost:
            return
        try:
            getattr(self.tracker, call)(*words)
        except Exception as error:
            self.lost = True
            problem = f"{type(error).__name__}: {error}"
            warnings.warn(f"{self} is told no more of this run: {problem}", stacklevel=3)
            with suppress(Exception):  # else it stays open, and the next run is added to it
                self.tracker.finish("failed")

    def __str__(self) -> str:
        return str(self.tracker)
