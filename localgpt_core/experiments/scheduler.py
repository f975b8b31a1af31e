"""Running what is not yet recorded of a suite: one after the other, or several processes side by side.

Every run writes its own record the moment it ends, atomically, so that nothing finished is ever lost. One
that is stopped, or killed, leaves its last checkpoint in a hidden folder below that of the new records, and
goes on from there the next time, bit for bit.
Parallel runs are separate processes that need nothing of the one that started them: if that one is killed,
they finish and write their records.
"""

import math
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass, replace
from pathlib import Path

from localgpt_core.common.files import require_writable
from localgpt_core.common.validation import Refusal, require
from localgpt_core.corpus.corpus import Corpus
from localgpt_core.experiments.execution import execute
from localgpt_core.experiments.suites import PlannedRun, Suite
from localgpt_core.records import RunRecord, load_records
from localgpt_core.training.before import check_corpus
from localgpt_core.training.checkpoints import load_checkpoint
from localgpt_core.training.settings import Report, RunSettings

__all__ = ["STATUSES", "SuiteRun", "missing_runs"]

POLL_S = 0.2
UNFINISHED = ".unfinished"  # hidden: no record, see `load_records`

# What the process of one run says by its exit status, see `localgpt_core.cli`; any other one is a failure.
STATUSES = {"complete": 0, "failed": 1, "out_of_time": 3, "interrupted": 130}
OUTCOMES = {status: word for word, status in STATUSES.items()}

Say = Callable[[str], None]
Show = Callable[[int, str, int], AbstractContextManager[Report]]


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
class SuiteRun:
    """How a suite is run here.

    Attributes:
        suite: The suite.
        corpus: Its corpus.
        records: Folder with all records; a run that any suite has recorded there is not made again.
        out: Folder for the new records.
        settings: Where and how its runs go; the deadline is that of all together.
        preset: Preset instead of the suite's own, or None.
        show: What shows a run that is made here: a function of its steps, its title and the step it goes on
            from, whose ``with`` block yields a `Report`; None leaves that to ``settings``.
        corpus_name: What the corpus was loaded by, for the processes of runs side by side; None: the suite's.
    """

    suite: Suite
    corpus: Corpus
    records: Path
    out: Path
    settings: RunSettings = RunSettings(threads=1)
    preset: str | None = None
    corpus_name: str | None = None
    show: Show | None = None

    def todo(self, say: Say) -> list[PlannedRun]:
        """Return the runs that are still to be made, naming every file that is refused."""
        missing = missing_runs(self.suite.plan(self.corpus, self.preset), load_records(self.records, say))
        return missing_runs(missing, load_records(self.out, say))

    def one(self, run: PlannedRun, say: Say) -> RunRecord | None:
        """Make one run here, or the rest of it, and write its record; None if it was stopped."""
        return self._one(run, say)[0]

    def _one(self, run: PlannedRun, say: Say) -> tuple[RunRecord | None, str]:
        """Return the record of one run, and one of the words of `make`."""
        checkpoint, done = self._checkpoint(run), self._goes_on_from(run, say)
        more = {"diagnose_every": run.arm.diagnose_every, "checkpoint": checkpoint}
        more["resume"] = done is not None
        show = self.show(run.spec.train.steps, _title(run), done or 0) if self.show else nullcontext()
        with show as report:
            record, result = execute(
                run.spec,
                self.corpus,
                replace(self.settings, report=report or self.settings.report, **more),
                suite=self.suite.name,
                arm=run.arm.name,
                preset=self.preset or self.suite.preset,
                out=self.out,
            )
        if record is None:
            stopped = f"{result.status.replace('_', ' ')} after {result.steps_done} steps, no record yet"
            say(f"{_title(run)}: {stopped}; the next time it goes on from there")
            return None, result.status
        record.write(self.out)
        if record.status != "failed":
            self._forget(run)
        loss = "no final loss" if record.final_val_loss is None else f"{record.final_val_loss:.4f} nats"
        say(f"{_title(run)}: {record.status}, {loss}, {record.wall_time_s:.0f} s{_because(record.error)}")
        if result is not None and result.interrupted:
            return record, "interrupted"
        return record, "failed" if record.status == "failed" else "complete"

    def _checkpoint(self, run: PlannedRun) -> Path:
        return self.out / UNFINISHED / f"{run.spec.digest}.safetensors"

    def _forget(self, run: PlannedRun) -> None:
        """Remove the checkpoint of a run that is recorded, and the folder of the last one."""
        with suppress(OSError):
            self._checkpoint(run).unlink(missing_ok=True)
            self._checkpoint(run).parent.rmdir()

    def _goes_on_from(self, run: PlannedRun, say: Say) -> int | None:
        """Return the step of the checkpoint of ``run``, None without one; one that is of no use is named."""
        path = self._checkpoint(run)
        if not path.exists():
            return None
        try:
            saved = load_checkpoint(path)
            saved.require_same_run(run.spec.model, run.spec.train, self.corpus)
        except Refusal as error:
            say(f"{error}; {_title(run)} starts again")
            return None
        step, every = saved.progress["step"], run.arm.diagnose_every
        measured = saved.progress["diagnostics"].get("step", ())
        if every and not set(range(0, step, every)) <= set(measured):
            say(f"checkpoint {path} lacks diagnostics that are now asked for; {_title(run)} starts again")
            return None
        return step

    def all(self, jobs: int, say: Say) -> bool:
        """Make all runs that are missing, ``jobs`` at a time; return whether none is left.

        Where the time ends, a run is left unfinished, and what comes after it is not started.
        """
        return self.make(jobs, say) == "complete"

    def make(self, jobs: int, say: Say, only: Sequence[str] = ()) -> str:
        """Make all runs that are missing, or those with the digests ``only``, recorded or not.

        Returns:
            ``"complete"``, or why something is left: ``"interrupted"``, ``"failed"`` or ``"out_of_time"``.

        Raises:
            ValueError: For a digest that the suite does not have, a run that its corpus does not allow, or a
                folder that cannot be written; before the first run.
        """
        planned = {item.spec.digest: item for item in self.suite.plan(self.corpus, self.preset)}
        for digest in only:
            require(digest in planned, "only", digest, f"suite {self.suite.name} has " + ", ".join(planned))
        todo = [planned[digest] for digest in dict.fromkeys(only)] if only else self.todo(say)
        for run in todo:
            try:
                check_corpus(run.spec.model, run.spec.train, self.corpus)
            except Refusal as error:
                raise Refusal(f"suite {self.suite.path}, arm {run.arm.name!r}: {error}") from None
            require_writable("out", self.out / f"{run.spec.digest}.json")
        if not only:
            say(f"{self.suite.name}: {len(todo)} runs to make")
        outcomes = self._side_by_side(todo, jobs, say) if jobs > 1 else self._one_by_one(todo, say)
        if only:
            left = not set(outcomes) <= {"complete"}
        else:
            missing = {run.spec.digest for run in self.todo(lambda problem: None)}
            left = bool(missing)
            for run in planned.values():  # one that was stopped right after its record still has a checkpoint
                if run.spec.digest not in missing:
                    self._forget(run)
        if "interrupted" in outcomes:
            return "interrupted"
        return "complete" if not left else "failed" if "failed" in outcomes else "out_of_time"

    def _one_by_one(self, todo: list[PlannedRun], say: Say) -> list[str]:
        outcomes = []
        for run in todo:
            outcomes.append(self._one(run, say)[1])
            if outcomes[-1] in ("interrupted", "out_of_time"):
                break
        return outcomes

    def _side_by_side(self, todo: list[PlannedRun], jobs: int, say: Say) -> list[str]:
        waiting, running, outcomes = list(todo), [], []
        longest_s = 0.0
        try:
            while waiting or running:
                left_s = self.settings.deadline - time.monotonic()
                if waiting and left_s < longest_s:
                    say(f"{len(waiting)} runs not started: {left_s:.0f} s left, one takes {longest_s:.0f} s")
                    waiting.clear()
                    outcomes.append("out_of_time")
                while waiting and len(running) < jobs:
                    run = waiting.pop(0)
                    running.append((run, self._stamp(run), time.monotonic(), self._start(run)))
                time.sleep(POLL_S)
                for entry in list(running):
                    run, stamp, started, process = entry
                    if process.poll() is None:
                        continue
                    running.remove(entry)
                    outcome = OUTCOMES.get(process.returncode, "failed")
                    written = self._stamp(run) != stamp
                    outcomes.append("failed" if outcome == "complete" and not written else outcome)
                    if written:
                        longest_s = max(longest_s, time.monotonic() - started)
                    else:
                        say(f"{_title(run)}: no record (exit status {process.returncode})")
        except KeyboardInterrupt:
            for *_, process in running:
                process.wait()
            raise
        return outcomes

    def _stamp(self, run: PlannedRun) -> tuple[int, int] | None:
        """Return what tells the file of a run's record from an older one; None where there is none."""
        try:
            found = (self.out / f"{run.spec.digest}.json").stat()
        except OSError:
            return None
        return found.st_ino, found.st_mtime_ns

    def _start(self, run: PlannedRun) -> subprocess.Popen:
        command = [sys.executable, "-m", "localgpt_core", "run", str(self.suite.path)]
        command += ["--only", run.spec.digest, "--out", str(self.out), "--records", str(self.records)]
        command += ["--device", str(self.settings.device), "--threads", str(self.settings.threads or 1)]
        command += ["--corpus", self.corpus_name or self.suite.corpus]
        if self.preset:
            command += ["--preset", self.preset]
        if math.isfinite(self.settings.deadline):
            command += ["--time-budget", f"{max(0.0, self.settings.deadline - time.monotonic()):.1f}"]
        return subprocess.Popen(command)


def _title(run: PlannedRun) -> str:
    return f"{run.arm.name} seed {run.spec.seed} [{run.spec.digest}]"


def _because(error: str) -> str:
    return f" ({error.splitlines()[0]})" if error else ""
