"""Running what is not yet recorded of a suite: one after the other, or several processes side by side.

Every run writes its own record the moment it ends, atomically, so that nothing finished is ever lost. One
that is stopped, or killed, leaves its last checkpoint in a hidden folder below that of the new records, and
goes on from there the next time, bit for bit. Several processes may work on the same records: a run that one
of them makes, the others leave alone, and wait for at the end.

The loop is smaller than one on `concurrent.futures`, whose pool breaks as a whole when one of its processes
dies, and knows nothing of runs that others are making.
"""

import math
import time
from collections.abc import Sequence

from localgpt_core.common.files import sweep
from localgpt_core.common.validation import Refusal
from localgpt_core.experiments.locks import UNFINISHED
from localgpt_core.experiments.making import Begun, RunMaker, Say, missing_runs, title_of
from localgpt_core.experiments.processes import RunProcess
from localgpt_core.experiments.suites import PlannedRun
from localgpt_core.training.before import check_corpus

__all__ = ["SuiteRun", "missing_runs"]

POLL_S = 0.2


class SuiteRun(RunMaker):
    """A suite that is run here: `RunMaker` with all that is missing."""

    def all(self, jobs: int, say: Say) -> bool:
        """Make all runs that are missing, ``jobs`` at a time; return whether none is left.

        Where the time ends, a run is left unfinished, and what comes after it is not started.
        """
        return self.make(jobs, say) == "complete"

    def make(self, jobs: int, say: Say, only: Sequence[str] = ()) -> str:
        """Make all runs that are missing, or those of them that have the digests ``only``.

        A run that another process is making is waited for, and made here if that one gives it up; but one
        that was asked for by its digest is left to it.

        Returns:
            ``"complete"``, or why something is left: ``"interrupted"``, ``"failed"``, ``"out_of_time"`` or
            ``"elsewhere"``.

        Raises:
            ValueError: For a digest that the suite does not have, a run that its corpus does not allow, or a
                folder that cannot be written; before the first run.
            OSError: As soon as a record cannot be written; what runs side by side is stopped.
        """
        todo = self.ready(say, only)
        sweep(self.out)
        sweep(self.out / UNFINISHED)
        if not only:
            say(f"{self.suite.name}: {len(todo)} runs to make")
        outcomes = self._work(todo, jobs, say, waits=not only)
        missing = {run.spec.digest for run in self.todo(lambda problem: None, only)}
        for digest in {*(only or self.planned())} - missing:
            self.forget(digest)
        if "interrupted" not in outcomes and not missing:
            return "complete"
        reasons = ("interrupted", "failed", "out_of_time", "elsewhere")
        return next((word for word in reasons if word in outcomes), "failed")

    def ready(self, say: Say, only: Sequence[str] = ()) -> list[PlannedRun]:
        """Return the runs that are missing, each of which can be made; raises what `make` does before it."""
        todo = self.todo(say, only)
        for run in todo:
            try:
                check_corpus(run.spec.model, run.spec.train, run.corpus)
            except Refusal as error:
                raise Refusal(f"suite {self.suite.path}, arm {run.arm.name!r}: {error}") from None
            self.require_writable(run)
        return todo

    def _work(self, waiting: list[PlannedRun], jobs: int, say: Say, waits: bool) -> list[str]:
        """Make the runs ``waiting``, ``jobs`` at a time, and return what became of them."""
        running: list[Begun] = []
        outcomes, longest_s, told = [], 0.0, False
        try:
            while waiting or running:
                left_s = self.settings.deadline - time.monotonic()
                if self.fits is not None:
                    late = [run for run in waiting if not self.fits(run, left_s)]
                    why = f"{left_s:.0f} s left are too few"
                else:
                    late = waiting if left_s < longest_s and (jobs > 1 or told) else []
                    why = f"{left_s:.0f} s left, one takes {longest_s:.0f} s"
                if late:
                    say(f"{len(late)} runs not started: {why}")
                    waiting[:] = [run for run in waiting if run not in late]
                    outcomes.append("out_of_time")
                while len(running) < jobs and (run := self._take(waiting)):
                    running.append(self._begun(run, jobs, say))
                if waiting and not running and not waits:
                    return [*outcomes, "elsewhere"]
                if waiting and not running and not told:
                    say(f"waiting for {len(waiting)} runs that other processes are making")
                    told = True
                ended = [process for process in running if process.outcome()]
                if not ended:
                    time.sleep(POLL_S)
                for process in ended:
                    running.remove(process)
                    outcomes.append(self._ended(process, say))
                    if self.ended is not None:
                        self.ended(process.run, outcomes[-1])
                    if outcomes[-1] == "complete":
                        longest_s = max(longest_s, process.seconds)
                    elif outcomes[-1] == "elsewhere":
                        waiting.append(process.run)
                    elif outcomes[-1] == "failed":
                        self.require_writable(process.run)  # nothing that could be kept is started
                    else:
                        waiting.clear()
        except BaseException:
            for process in running:
                process.stop()
            for process in running:
                process.wait()
            raise
        return outcomes

    def _take(self, waiting: list[PlannedRun]) -> PlannedRun | None:
        """Take the first of the runs ``waiting`` that nobody is making, leaving out what is recorded now."""
        for run in [*waiting]:
            with self.claim(run) as mine:
                if mine:
                    waiting.remove(run)
                    if self.missing([run]):
                        return run
        return None

    def _begun(self, run: PlannedRun, jobs: int, say: Say) -> Begun:
        if self.begin is not None:
            return self.begin(run, say)
        return self._start(run) if jobs > 1 else RunHere(self, run, say)

    def _ended(self, process: Begun, say: Say) -> str:
        """Return what became of a run whose process has ended."""
        outcome, problem = process.outcome(), process.problem
        if outcome == "complete" and self.missing([process.run]):
            outcome, problem = "failed", "its file is gone"
        if problem:
            say(f"{title_of(process.run)}: no record ({problem})")
        return outcome

    def _start(self, run: PlannedRun) -> RunProcess:
        options = self.options()
        if math.isfinite(self.settings.deadline):
            options += ["--time-budget", f"{max(0.0, self.settings.deadline - time.monotonic()):.1f}"]
        return RunProcess(run, str(self.suite.path), *options, hear=self.hear)

    def options(self, device: str = "") -> list[str]:
        """Return the options of `localgpt run` by which a process makes runs as this one does.

        ``device`` is that of a machine which has another one than this.
        """
        options = ["--out", self.out, "--records", self.records]
        options += ["--corpus", self.corpus_name or self.suite.corpus]
        options += ["--device", device or self.settings.device, "--threads", self.settings.threads or 1]
        options += ["--accumulate", self.settings.accumulate]
        if self.settings.tracker is not None:
            options += ["--track", self.settings.tracker]
        return [*map(str, options), *(["--preset", self.preset] if self.preset else [])]


class RunHere:
    """A run that is made in this process, at once; otherwise as a `RunProcess`."""

    seconds, problem = 0.0, ""

    def __init__(self, suite: SuiteRun, run: PlannedRun, say: Say) -> None:
        self.run, self._outcome = run, suite.one(run, say)

    def outcome(self) -> str:
        """Return what became of the run, one of the words of `SuiteRun.make`."""
        return self._outcome
