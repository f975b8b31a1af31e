"""Running what is not yet recorded of a suite: one after the other, or several processes side by side.

Every run writes its own record the moment it ends, atomically, so that nothing finished is ever lost.
Parallel runs are separate processes that need nothing of the one that started them: if that one is killed,
they finish and write their records.
"""

import math
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from localgpt_core.corpus.corpus import Corpus
from localgpt_core.experiments.execution import execute
from localgpt_core.experiments.records import RunRecord, load_records
from localgpt_core.experiments.suites import PlannedRun, Suite
from localgpt_core.training.settings import RunSettings

__all__ = ["SuiteRun", "missing_runs"]

POLL_S = 0.2

Say = Callable[[str], None]


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
        corpus_name: What the corpus was loaded by, for the processes of runs side by side; None: the suite's.
    """

    suite: Suite
    corpus: Corpus
    records: Path
    out: Path
    settings: RunSettings = RunSettings(threads=1)
    preset: str | None = None
    corpus_name: str | None = None

    def todo(self, say: Say) -> list[PlannedRun]:
        """Return the runs that are still to be made, naming every file that is refused."""
        missing = missing_runs(self.suite.plan(self.corpus, self.preset), load_records(self.records, say))
        return missing_runs(missing, load_records(self.out, say))

    def one(self, run: PlannedRun, say: Say) -> RunRecord | None:
        """Make one run here and write its record; None if it was interrupted or had no time."""
        record, result = execute(
            run.spec,
            self.corpus,
            replace(self.settings, diagnose_every=run.arm.diagnose_every),
            suite=self.suite.name,
            arm=run.arm.name,
            preset=self.preset or self.suite.preset,
        )
        if record is None:
            say(
                f"{_title(run)}: {result.status.replace('_', ' ')} after {result.steps_done} steps, no record"
            )
            return None
        record.write(self.out)
        loss = "no final loss" if record.final_val_loss is None else f"{record.final_val_loss:.4f} nats"
        say(f"{_title(run)}: {record.status}, {loss}, {record.wall_time_s:.0f} s{_because(record.error)}")
        return record

    def all(self, jobs: int, say: Say) -> bool:
        """Make all runs that are missing, ``jobs`` at a time; return whether none is left.

        A run that needed more time than is left, judged by its own speed, is given up, and so is what comes
        after it.
        """
        todo = self.todo(say)
        say(f"{self.suite.name}: {len(todo)} runs to make")
        if jobs > 1:
            self._side_by_side(todo, jobs, say)
        else:
            for run in todo:
                if self.one(run, say) is None:
                    break
        return not self.todo(lambda problem: None)

    def _side_by_side(self, todo: list[PlannedRun], jobs: int, say: Say) -> None:
        waiting, running = list(todo), []
        longest_s = 0.0
        try:
            while waiting or running:
                left_s = self.settings.deadline - time.monotonic()
                if waiting and left_s < longest_s:
                    say(f"{len(waiting)} runs not started: {left_s:.0f} s left, one takes {longest_s:.0f} s")
                    waiting.clear()
                while waiting and len(running) < jobs:
                    run = waiting.pop(0)
                    running.append((run, time.monotonic(), self._start(run)))
                time.sleep(POLL_S)
                for entry in list(running):
                    run, started, process = entry
                    if process.poll() is None:
                        continue
                    running.remove(entry)
                    written = (self.out / f"{run.spec.digest}.json").exists()
                    if process.returncode == 0 and written:
                        longest_s = max(longest_s, time.monotonic() - started)
                    else:
                        say(f"{_title(run)}: no record (exit status {process.returncode})")
        except KeyboardInterrupt:
            for _, _, process in running:
                process.wait()
            raise

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
