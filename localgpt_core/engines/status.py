"""How far the runs of a suite are, for whichever process wants to know.

Nothing is written for it. A run that is recorded is over; one that is not is running where a process holds
its lock, which the system takes from it however it ends; and its checkpoint, written at every evaluation, has
in its header the step, the losses and the seconds so far:

    steps a second = step / seconds
    seconds left = (steps - step) / (steps a second) - age of the checkpoint
"""

import threading
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any, TextIO

from localgpt_core.common.validation import Refusal
from localgpt_core.experiments.locks import is_held
from localgpt_core.experiments.making import RunMaker, Say, missing_runs, title_of
from localgpt_core.experiments.suites import PlannedRun
from localgpt_core.records import RunRecord, load_records
from localgpt_core.records.folder import keep
from localgpt_core.training.checkpoints import load_checkpoint

__all__ = ["EVERY_S", "WORDS", "RunStatus", "Watch", "screen", "summary", "table", "watching"]

EVERY_S = 2.0
WORDS = ("finished", "diverged", "running", "failed", "stopped", "left")
AT_WORK = WORDS[2:5]  # what a table that is drawn again and again has lines for


@dataclass(frozen=True)
class RunStatus:
    """How far a run is.

    Attributes:
        digest: Its digest.
        title: Its arm, seed and digest.
        word: ``"finished"`` or ``"diverged"``: recorded. ``"running"``: some process is making it.
            ``"failed"``: it broke down, and nobody tries again. ``"stopped"``: nobody goes on, and it has
            a checkpoint. ``"left"``: there is nothing of it.
        steps: How many steps it has.
        step: The one of its checkpoint or of its record, 0 without.
        loss: Nats per character, as it was measured last.
        steps_per_s: Up to its checkpoint.
        seconds_left: For a run that is running, from now on.
    """

    digest: str
    title: str
    word: str
    steps: int
    step: int = 0
    loss: float | None = None
    steps_per_s: float | None = None
    seconds_left: float | None = None

    def cells(self) -> tuple[str, str, str, str, str, str]:
        """Return title, word, step of steps, loss, speed and time left, as they are shown."""
        left = self.seconds_left
        return (
            self.title,
            self.word,
            f"step {self.step}/{self.steps}",
            "" if self.loss is None else f"loss {self.loss:.4f}",
            "" if self.steps_per_s is None else f"{self.steps_per_s:.3g} steps/s",
            "" if left is None else f"{timedelta(seconds=round(left))} left",
        )

    def __str__(self) -> str:
        title, *others = self.cells()
        return f"{title}: {', '.join(filter(None, others))}"


class Watch:
    """The runs of a suite; every `look` reads only what can have changed.

    Raises:
        ValueError: For a suite that its corpus does not allow.
    """

    def __init__(self, maker: RunMaker) -> None:
        self.maker, self.planned = maker, maker.planned()
        self._over: dict[str, RunStatus] = {}
        self._read: dict[str, tuple[int, dict[str, Any]]] = {}

    @property
    def is_over(self) -> bool:
        """Whether all runs were recorded at the last `look`."""
        return len(self._over) == len(self.planned)

    def look(self) -> list[RunStatus]:
        """Return how far every run of the suite is now, in its order."""
        left = {digest: run for digest, run in self.planned.items() if digest not in self._over}
        records: dict[str, RunRecord] = {}
        for folder in (self.maker.records, self.maker.out):
            for record in load_records(folder, lambda problem: None, left).values():
                keep(records, record)
        missing = {run.spec.digest for run in missing_runs([*left.values()], records)}
        self._over |= {digest: _recorded(left[digest], records[digest]) for digest in left.keys() - missing}
        now = {digest: self._unfinished(left[digest], records.get(digest)) for digest in missing}
        return [(self._over | now)[digest] for digest in self.planned]

    def _unfinished(self, run: PlannedRun, failed: RunRecord | None) -> RunStatus:
        digest, written_s, known = run.spec.digest, 0.0, {}
        with suppress(OSError, Refusal):  # no checkpoint yet, or one that is of no use
            known, written_s = self._from_checkpoint(digest)
        word = "failed" if failed else "stopped" if known else "left"
        status = RunStatus(digest, title_of(run), word, steps=run.spec.train.steps, **known)
        if not is_held(digest, self.maker.out, self.maker.records):
            return status
        left = None
        if status.steps_per_s:
            left = (status.steps - status.step) / status.steps_per_s - (time.time() - written_s)
        return replace(status, word="running", seconds_left=left and max(0.0, left))

    def _from_checkpoint(self, digest: str) -> tuple[dict[str, Any], float]:
        """Return the fields that the checkpoint of a run tells, and when it was written, by `time.time`."""
        file = self.maker.checkpoint(digest)
        written_ns = file.stat().st_mtime_ns
        if self._read.get(digest, (0, {}))[0] != written_ns:
            saved = load_checkpoint(file, tensors=False).progress
            step, seconds = saved["step"], saved["wall_time_s"]
            known = {"step": step, "loss": [None, *saved["curves"]["val_loss"]][-1]}
            known["steps_per_s"] = step / seconds if step and seconds > 0 else None
            self._read[digest] = written_ns, known
        return self._read[digest][1], written_ns / 1e9


def _recorded(run: PlannedRun, record: RunRecord) -> RunStatus:
    last = max([*record.curves["step"], *record.curves["val_step"]])
    known = title_of(run), record.status, run.spec.train.steps, int(last)
    return RunStatus(run.spec.digest, *known, record.final_val_loss)


def table(states: Collection[RunStatus]) -> str:
    """Return a line for each run, its parts below each other."""
    rows = [state.cells() for state in states]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)


def summary(states: Collection[RunStatus]) -> str:
    """Return how many runs are in which state."""
    counts = Counter(state.word for state in states)
    return f"{len(states)} runs: " + ", ".join(f"{counts[word]} {word}" for word in WORDS if counts[word])


@contextmanager
def screen(
    stream: TextIO, say: Say, shown: Collection[str] = WORDS
) -> Iterator[Callable[[list[RunStatus]], None]]:
    """Yield what shows the states of a suite again and again.

    On a terminal that is a table of the runs that are not over, drawn anew each time, and gone in the end.
    Elsewhere it is a line for each run that has come to another word or step, if that word is in ``shown``.
    """
    if not stream.isatty():
        before: dict[str, tuple[str, int]] = {}

        def lines(states: list[RunStatus]) -> None:
            for state in states:
                now = state.word, state.step
                if before.get(state.digest) != now and state.word in shown:
                    say(str(state))
                before[state.digest] = now

        yield lines
        return
    from rich.console import Console
    from rich.live import Live
    from rich.text import Text

    def drawn(states: list[RunStatus]) -> Text:
        # Without the digests, so that the time left has room in 80 columns.
        short = [
            replace(s, title=s.title.removesuffix(f" [{s.digest}]")) for s in states if s.word in AT_WORK
        ]
        at_work = sorted(short, key=lambda s: AT_WORK.index(s.word))
        return Text(f"{table(at_work)}\n{summary(states)}".lstrip(), no_wrap=True, overflow="ellipsis")

    shown_on = {"console": Console(file=stream), "redirect_stdout": False}
    with Live(**shown_on, auto_refresh=False, transient=True) as live:
        yield lambda states: live.update(drawn(states), refresh=True)


@contextmanager
def watching(maker: RunMaker, stream: TextIO, say: Say) -> Iterator[None]:
    """Show how far the runs of a suite are while the ``with`` block makes them, see `screen`.

    Nothing that goes wrong with that is a reason for the block to fail.
    """
    over = threading.Event()

    def look(show: Callable[[list[RunStatus]], None]) -> None:
        try:
            watch = Watch(maker)
            while not over.wait(EVERY_S):
                show(watch.look())
        except Exception as error:
            say(f"how far the runs are cannot be shown: {type(error).__name__}: {error}")

    with screen(stream, say, ("running",)) as show:
        thread = threading.Thread(target=look, args=(show,), daemon=True)
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()
