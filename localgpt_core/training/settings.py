"""Where and how a run goes: everything about it that does not change what it computes."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from localgpt_core.common.validation import Refusal, require, require_integer
from localgpt_core.parallel.parts import Split
from localgpt_core.parallel.processes import ALONE, Processes
from localgpt_core.rules.base import LARGEST_SIZE

if TYPE_CHECKING:
    from localgpt_core.tracking import Tracker

__all__ = ["Report", "RunSettings", "select_device"]

MOST_THREADS = 4096  # far above, torch fails by an overflow

Report = Callable[[dict[str, float]], None]


def select_device(name: str) -> torch.device:
    """Return the device of that name.

    Raises:
        ValueError: If it is unknown or not there.
    """
    try:
        device = torch.device(name)
    except RuntimeError:
        raise Refusal(f"device={name!r}: allowed are 'cpu', 'cuda' or 'cuda:N'") from None
    require(device.type in ("cpu", "cuda"), "device", name, "allowed are 'cpu', 'cuda' or 'cuda:N'")
    if device.type == "cuda":
        count = torch.cuda.device_count()
        require((device.index or 0) < count, "device", name, f"this machine has {count} CUDA devices")
    return device


@dataclass(frozen=True, kw_only=True)
class RunSettings:
    """Where and how a run goes, from the command line down to the training loop.

    Attributes:
        device: ``"cpu"``, ``"cuda"`` or ``"cuda:N"``.
        threads: CPU threads of this process from here on; None leaves them as they are.
        checkpoint: File to write at every evaluation, at the end, when interrupted and when the time is over;
            None writes none.
        resume: Go on from ``checkpoint`` if it exists.
        deadline: Value of ``time.monotonic()`` by which the run must be over. Without a checkpoint it is
            stopped as soon as its own speed shows that it cannot be; with one it goes on until then.
        report: Called with ``step`` and whatever was measured there: ``train_loss``, ``val_loss``. None shows
            a bar to a person who runs a notebook, and nothing elsewhere.
        diagnose_every: Steps between comparisons of the rule with the exact gradient; 0 makes none. The run
            itself is the same to the last bit.
        accumulate: Parts that a process cuts its share of each batch into, to take one after the other: a
            batch that no memory holds gives the same run, up to rounding. Like threads and processes this is
            no part of what is asked of a run: its digest is the same, its checkpoint goes on with any number.
        processes: Those that make the run, see `localgpt_core.parallel`. This one leads; the others `follow`.
        tracker: Who else is told what is measured, see `localgpt_core.tracking`; it is guarded here, so that
            its failure costs no run. `train` logs to it; `localgpt_core.experiments.execution.execute`, which
            knows the run's name, also starts and finishes it.

    Raises:
        ValueError: For a device that is not there, or a number out of its range.
    """

    device: str | torch.device = "cpu"
    threads: int | None = None
    checkpoint: str | Path | None = None
    resume: bool = False
    deadline: float = math.inf
    report: Report | None = None
    diagnose_every: int = 0
    accumulate: int = 1
    processes: Processes = ALONE
    tracker: "Tracker | None" = None

    def __post_init__(self) -> None:
        select_device(str(self.device))
        require_integer("diagnose_every", self.diagnose_every, 0)
        require_integer("accumulate", self.accumulate, 1, LARGEST_SIZE)
        if self.threads is not None:
            require_integer("threads", self.threads, 1, MOST_THREADS)
        if self.tracker is not None:
            from localgpt_core.tracking.tracker import Guarded

            object.__setattr__(self, "tracker", Guarded.of(self.tracker))

    @classmethod
    def given(cls, settings: "RunSettings | None", fields: dict[str, object]) -> "RunSettings":
        """Return ``settings``, or those of ``fields`` by name.

        Raises:
            ValueError: If both are given, or a value is refused.
            TypeError: For an unknown field.
        """
        require(settings is None or not fields, "settings", settings, "or their fields by name, not both")
        return settings or cls(**fields)

    @property
    def split(self) -> Split:
        """How each batch is cut."""
        return Split(self.processes, self.accumulate)

    def prepare(self) -> torch.device:
        """Set the threads of this process and return its device."""
        if self.threads is not None:
            torch.set_num_threads(self.threads)
        return self.processes.device(torch.device(self.device))
