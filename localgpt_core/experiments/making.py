"""What is missing of a suite, and making one run of it here."""

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

from localgpt_core.common.files import require_writable
from localgpt_core.common.validation import Refusal, require
from localgpt_core.corpus.corpus import Corpus
from localgpt_core.experiments.execution import execute
from localgpt_core.experiments.locks import UNFINISHED, claim, lock_of
from localgpt_core.experiments.suites import PlannedRun, Suite
from localgpt_core.records import RunRecord, load_records
from localgpt_core.training.checkpoints import load_checkpoint
from localgpt_core.training.settings import Report, RunSettings

__all__ = ["Begun", "RunMaker", "Say", "missing_runs", "title_of"]

Say = Callable[[str], None]
Show = Callable[[int, str, int], AbstractContextManager[Report]]


class Begun(Protocol):
    """A run that is being made elsewhere, as the scheduler sees it.

    Attributes:
        run: The run.
        seconds: How long it has taken.
        problem: What is to be said of one that did not end by itself, or nothing.
    """

    run: PlannedRun
    seconds: float
    problem: str

    def outcome(self) -> str | None:
        """Return one of the words of `SuiteRun.make` once the run has ended, None before."""

    def stop(self) -> None:
        """Let the run stop as after Ctrl-C."""

    def wait(self) -> None:
        """Return when the run has ended."""


def missing_runs(planned: list[PlannedRun], records: dict[str, RunRecord]) -> list[PlannedRun]:
    """Return the planned runs without a record that says what is asked.

    A run that broke down is tried again, and one that was recorded without the diagnostics that are now asked
    for is repeated with them.
    """

    def done(run: PlannedRun) -> bool:
        record = records.get(run.spec.digest)
        return record is not None and record.status != "failed" and not lacks_diagnostics(run, record)

    return [run for run in planned if not done(run)]


def lacks_diagnostics(run: PlannedRun, record: RunRecord) -> bool:
    """Return whether the suite asks for diagnostics at steps that ``record`` has none of."""
    every = run.arm.diagnose_every
    reached = run.spec.train.steps if record.status == "finished" else 1
    return every > 0 and not set(range(0, reached, every)) <= set(record.diagnostics.get("step", ()))


@dataclass(frozen=True)
class RunMaker:
    """A suite, where its runs are kept, and how they go.

    Attributes:
        suite: The suite.
        corpus: Its corpus, for the arms that name none.
        records: Folder with all records; a run that any suite has recorded there is not made again.
        out: Folder for the new records.
        settings: Where and how its runs go; the deadline is that of all together.
        preset: Preset instead of the suite's own, or None.
        show: What shows a run that is made here: a function of its steps, its title and the step it goes on
            from, whose ``with`` block yields a `Report`; None leaves that to ``settings``.
        corpus_name: What the corpus was loaded by, for the processes of runs side by side; None: the suite's.
        ended: Called with a run and its outcome, one of the words of `make`, as soon as the run has ended.
        begin: What begins a run, and hands on its words; None: a process of this machine.
        hear: Called with each line that the process of a run says; None: it says them itself.
        fits: Whether a run may begin with so many seconds left; None: if the longest one so far would end.
    """

    suite: Suite
    corpus: Corpus
    records: Path
    out: Path
    settings: RunSettings = RunSettings(threads=1)
    preset: str | None = None
    corpus_name: str | None = None
    show: Show | None = None
    ended: Callable[[PlannedRun, str], None] | None = None
    begin: Callable[[PlannedRun, Say], Begun] | None = None
    hear: Say | None = None
    fits: Callable[[PlannedRun, float], bool] | None = None

    def planned(self) -> dict[str, PlannedRun]:
        """Return the runs of the suite by digest; one that two arms ask for has the diagnostics of both."""
        found: dict[str, PlannedRun] = {}
        for run in self.suite.plan(self.corpus, self.preset):
            known = found.setdefault(run.spec.digest, run)
            every = math.gcd(known.arm.diagnose_every, run.arm.diagnose_every)
            found[run.spec.digest] = replace(known, arm=replace(known.arm, diagnose_every=every))
        return found

    def todo(self, say: Say, only: Sequence[str] = ()) -> list[PlannedRun]:
        """Return the runs that are still to be made, or those of them that have the digests ``only``.

        A file of theirs that is refused is named.

        Raises:
            ValueError: For a digest that the suite does not have.
        """
        planned = self.planned()
        for digest in only:
            require(digest in planned, "only", digest, f"suite {self.suite.name} has " + ", ".join(planned))
        return self.missing([planned[digest] for digest in dict.fromkeys(only or planned)], say)

    def missing(self, runs: list[PlannedRun], say: Say = lambda problem: None) -> list[PlannedRun]:
        """Return those of ``runs`` that are not recorded now, see `missing_runs`."""
        for folder in (self.records, self.out):
            runs = missing_runs(runs, load_records(folder, say, {run.spec.digest for run in runs}))
        return runs

    def one(self, run: PlannedRun, say: Say) -> str:
        """Make one run here, or the rest of it, write its record, and return one of the words of `make`.

        Nothing is made where the run is recorded by now, or another process is making it.
        """
        with self.claim(run) as mine:
            if not mine:
                return "elsewhere"
            if not self.missing([run]):
                return "complete"
            try:
                return self._make(run, say)
            except Refusal as error:
                say(f"{title_of(run)}: {error}")
                return "failed"

    def _make(self, run: PlannedRun, say: Say) -> str:
        checkpoint, done = self.checkpoint(run.spec.digest), self._goes_on_from(run, say)
        more = {"diagnose_every": run.arm.diagnose_every, "checkpoint": checkpoint}
        more["resume"] = done is not None
        show = self.show(run.spec.train.steps, title_of(run), done or 0) if self.show else nullcontext()
        with show as report:
            record, result = execute(
                run.spec,
                run.corpus,
                replace(self.settings, report=report or self.settings.report, **more),
                suite=self.suite.name,
                arm=run.arm.name,
                preset=self.preset or self.suite.preset,
                out=self.out,
            )
        if record is None:
            stopped = f"{result.status.replace('_', ' ')} after {result.steps_done} steps, no record yet"
            say(f"{title_of(run)}: {stopped}; the next time it goes on from there")
            return result.status
        record.write(self.out)
        if record.status != "failed":
            self._drop_checkpoint(run.spec.digest)
        loss = "no final loss" if record.final_val_loss is None else f"{record.final_val_loss:.4f} nats"
        right = record.final_val_accuracy
        loss += "" if right is None else f", {right:.1%} of the answers"
        say(f"{title_of(run)}: {record.status}, {loss}, {record.wall_time_s:.0f} s{_because(record.error)}")
        if result is not None and result.interrupted:
            return "interrupted"
        return "failed" if record.status == "failed" else "complete"

    def require_writable(self, run: PlannedRun) -> None:
        """Raise ValueError, or OSError, unless the record of ``run`` can be written now."""
        require_writable("out", self.out / f"{run.spec.digest}.json")

    def checkpoint(self, digest: str) -> Path:
        """Return the file that an unfinished run leaves its state in, at every evaluation."""
        return self.out / UNFINISHED / f"{digest}.safetensors"

    def forget(self, digest: str) -> None:
        """Remove what a process that was killed has left of a run that is recorded now."""
        locks = [lock_of(digest, folder) for folder in (self.out, self.records)]
        if any(path.exists() for path in (self.checkpoint(digest), *locks)):
            with claim(digest, self.out, self.records) as mine:
                if mine:
                    self._drop_checkpoint(digest)

    def _drop_checkpoint(self, digest: str) -> None:
        with suppress(OSError):
            self.checkpoint(digest).unlink(missing_ok=True)

    def _goes_on_from(self, run: PlannedRun, say: Say) -> int | None:
        """Return the step of the checkpoint of ``run``, None without one; one that is of no use is named."""
        path = self.checkpoint(run.spec.digest)
        if not path.exists():
            return None
        try:
            saved = load_checkpoint(path)
            saved.require_same_run(run.spec.model, run.spec.train, run.spec.corpus_sha256)
        except Refusal as error:
            say(f"{error}; {title_of(run)} starts again")
            return None
        step, every = saved.progress["step"], run.arm.diagnose_every
        measured = saved.progress["diagnostics"].get("step", ())
        if every and not set(range(0, step, every)) <= set(measured):
            say(f"checkpoint {path} lacks diagnostics that are now asked for; {title_of(run)} starts again")
            return None
        return step

    def claim(self, run: PlannedRun) -> AbstractContextManager[bool]:
        """Return what keeps other processes off ``run``, see `localgpt_core.experiments.locks`."""
        return claim(run.spec.digest, self.out, self.records)


def title_of(run: PlannedRun) -> str:
    """Return how news names a run."""
    return f"{run.arm.name} seed {run.spec.seed} [{run.spec.digest}]"


def _because(error: str) -> str:
    return f" ({error.splitlines()[0]})" if error else ""
