"""What is missing of a ranking, made in its order into one folder, again and again until all of it is there.

What a stage makes is a suite, written as a file and run as any other: a run of it has the digest that the
ranking's suite gives it with the same learning rate.
"""

import os
import time
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from localgpt_core.campaigns.pace import measured_pace, read_pace, steppers
from localgpt_core.campaigns.ranking import Stage, best_rate, read_ranking
from localgpt_core.campaigns.timing import time_arms
from localgpt_core.common.environment import COMMIT_VARIABLE, code_version, environment
from localgpt_core.common.files import atomic_write, require_writable
from localgpt_core.common.validation import Refusal, require_choice
from localgpt_core.config import PRESETS
from localgpt_core.corpus.corpus import Corpus, load_corpus
from localgpt_core.experiments.execution import steps_done
from localgpt_core.experiments.locks import UNFINISHED
from localgpt_core.experiments.making import Say, Show, title_of
from localgpt_core.experiments.scheduler import SuiteRun
from localgpt_core.experiments.suites import PlannedRun, Suite, as_toml, write_suite
from localgpt_core.records import export_bundle, import_bundle, load_records
from localgpt_core.records.folder import keep
from localgpt_core.training.settings import RunSettings

__all__ = ["Campaign"]

MOST_JOBS = 3  # that are tried
START_S = {"cpu": 0.0, "cuda": 30.0}  # until a model is compiled, where that was not measured
MARGIN = 1.5  # most rules cost more than the run that the pace is measured with


class Campaign:
    """The stages of a ranking, and the folder that they are made into.

    At its top, the folder has what is to be carried away: ``campaign.jsonl``, a bundle of all records made
    here, written anew whenever a run ends; ``rates.toml``, the learning rates that searches have found, as
    the lines of a suite; ``bench-PRESET.json``; and ``pace.json``. Below ``work`` are the records one by one
    with the checkpoints of unfinished runs, and every stage's suite. The bundle alone is enough to go on
    after the last run that ended.

    Args:
        ranking: The TOML file.
        folder: The folder.
        records: Folder with the records that there are already; what is recorded there is not made again.
        settings: Where and how the runs go; the deadline is that of all together.
        preset: Preset instead of the suites' own. Arms that do not fit its sizes are named and left out.
        corpus: What to load instead of the suites' corpora.
        whole: Whether to begin only what is likely to end in time, by the device's pace; otherwise a run that
            is cut goes on the next time.
        show: What shows a run that is made in this process, see `RunMaker`.

    Raises:
        ValueError: If the ranking, one of its suites or a corpus is refused.
    """

    def __init__(
        self,
        ranking: str | os.PathLike[str],
        folder: Path,
        records: Path,
        settings: RunSettings,
        *,
        preset: str | None = None,
        corpus: str | None = None,
        whole: bool = False,
        show: Show | None = None,
    ) -> None:
        if preset is not None:
            require_choice("preset", preset, PRESETS)
        self.stages, self.folder, self.records = read_ranking(ranking), folder, records
        self.settings, self.preset, self.corpus, self.whole = settings, preset, corpus, whole
        self.show, self.kept, self.bundle = show, folder / "work" / "records", folder / "campaign.jsonl"
        self.device_type = str(settings.device).partition(":")[0]
        suites = [s for stage in self.stages for s in (stage.suite, stage.search and stage.search.suite) if s]
        names = dict.fromkeys(corpus or suite.corpus for suite in suites)
        self.texts: dict[str, Corpus] = {name: load_corpus(name) for name in names}
        self.jobs, self.pace = None, None
        self.rates: dict[tuple[str, str], str] = {}
        self.failed: list[str] = []

    def make(self, jobs: int | None, say: Say) -> str:
        """Make all that is missing and fits, ``jobs`` runs at a time, and return a word of `SuiteRun.make`.

        With ``jobs`` None as many go side by side as are measured to be fastest. A run or an arm that is
        refused, or breaks down, is named, and the others go on.

        Raises:
            ValueError: For an arm that its suite's own preset refuses, or a folder that cannot be written,
                before the first run.
            OSError: As soon as a record cannot be written.
        """
        stages = [replace(stage, suite=self._fitting(stage.suite, say)) for stage in self.stages]
        require_writable("out", self.bundle)
        if self.bundle.exists():
            import_bundle(self.bundle, self.kept, say)
        self.write_bundle()
        if code_version(Path(__file__))["git_commit"] is None:
            say(f"the records will name no commit: {COMMIT_VARIABLE} is not set")
        self.jobs, outcomes = jobs, []
        try:
            for number, stage in enumerate(stages, start=1):
                outcomes.append(self._stage(number, stage, say))
                if outcomes[-1] == "interrupted" or outcomes[-1] == "out_of_time" and not self.whole:
                    break
        finally:
            self.write_bundle()
        if self.failed:
            say(f"refused or broken down: {', '.join(dict.fromkeys(self.failed))}")
        reasons = ("interrupted", "failed", "out_of_time")
        return next((word for word in reasons if word in outcomes), "complete")

    def write_bundle(self) -> None:
        """Write all records that were made here as one file, unless there are none."""
        records = load_records(self.kept, lambda problem: None)
        if records:
            export_bundle(records.values(), self.bundle)

    def _stage(self, number: int, stage: Stage, say: Say) -> str:
        if not stage.suite.arms:
            return "complete"
        if stage.bench:
            name = self.preset or stage.suite.preset
            file, least_s = self.folder / f"bench-{name}.json", 2 * self._start_s
            deadline, device = self.settings.deadline, str(self.settings.device)
            return time_arms(stage.suite, name, device, stage.bench, file, deadline, say, least_s)
        run = self._suite_run(number, self._at_best_rates(stage, say))
        planned = [*run.planned().values()]
        if missing := run.missing(planned):
            self._choose_jobs(missing[0], run.suite.preset, say)
        jobs = self.jobs or 1
        outcome = replace(run, show=self.show if jobs == 1 else None).make(jobs, say)
        made = len(planned) - len(run.missing(planned))
        say(f"stage {number}, {stage.suite.name}: {made} of {len(planned)} recorded")
        return outcome

    def _suite_run(self, number: int, suite: Suite) -> SuiteRun:
        """Return the suite of a stage, written as a file that the process of a run reads."""
        written = write_suite(suite, self.folder / "work" / "stages" / f"{number:02}" / f"{suite.name}.toml")

        def ended(run: PlannedRun, outcome: str) -> None:
            if outcome == "failed":
                self.failed.append(title_of(run))
            self.write_bundle()

        return SuiteRun(
            written,
            self._text(suite),
            self.records,
            self.kept,
            self.settings,
            self.preset,
            self.corpus or suite.corpus,
            ended=ended,
            fits=self._fits,
        )

    def _text(self, suite: Suite) -> Corpus:
        return self.texts[self.corpus or suite.corpus]

    def _fitting(self, suite: Suite, say: Say) -> Suite:
        """Return ``suite`` without the arms that are too large, say, for the preset that replaces its own."""
        arms = []
        for arm in suite.arms:
            try:
                replace(suite, arms=(arm,)).plan(self._text(suite), self.preset)
            except Refusal as error:
                if self.preset is None:
                    raise
                say(f"left out at preset {self.preset}: {error}")
            else:
                arms.append(arm)
        return replace(suite, arms=tuple(arms))

    def _at_best_rates(self, stage: Stage, say: Say) -> Suite:
        """Return the stage's suite with the rates that its search has found so far, and write these down."""
        if stage.search is None:
            return stage.suite
        known = load_records(self.records, say)
        for record in load_records(self.kept, say).values():
            keep(known, record)
        arms, search, text = [], stage.search, self._text(stage.search.suite)
        for arm in stage.suite.arms:
            name = stage.rate_of or arm.name
            lr, words = best_rate(search.losses(name, known, text, self.preset, self.device_type))
            arms.append(arm if lr is None else replace(arm, train={**arm.train, "lr": lr}))
            taken = "its own rate" if lr is None else f"lr {lr:g}"
            say(f"{arm.name}: {taken}; {search.suite.name}, {name}: {words}")
            table = f"[arms.{as_toml(arm.name)}]\ntrain = {as_toml(arms[-1].train)}"
            self.rates[stage.suite.name, arm.name] = f"# {name}: {words}\n{table if lr else ''}"
        lines = ["# The best rates found, as the lines of a suite: a person copies them there, or does not."]
        for suite in dict.fromkeys(suite for suite, _ in self.rates):
            lines += [f"\n# suite {suite}, on {self.device_type}"]
            lines += [own for (name, _), own in self.rates.items() if name == suite]
        atomic_write(self.folder / "rates.toml", "\n".join([*lines, ""]))
        return replace(stage.suite, arms=tuple(arms))

    def _choose_jobs(self, run: PlannedRun, preset: str, say: Say) -> None:
        """Take the number of runs side by side from the device's pace, if that is asked for or needed."""
        if self.pace is not None or self.jobs is not None and not self.whole:
            return
        device, preset = str(self.settings.device), self.preset or preset
        file, name, most = (
            self.folder / "pace.json",
            str(environment(device)["device"]),
            self.jobs or MOST_JOBS,
        )
        self.pace = read_pace(file, name, preset)
        if self.pace is None or len(self.pace.steps_per_s) < (self.jobs or 1):
            start, threads = time.monotonic(), self.settings.threads or 1
            with steppers(most, run.spec, run.corpus, device, threads) as steps:
                self.pace = measured_pace(name, preset, most, steps, time.monotonic() - start)
            self.pace.write(file)
        self.jobs = self.jobs or self.pace.jobs
        paces = ", ".join(f"{pace:.1f} with {number}" for number, pace in enumerate(self.pace.steps_per_s, 1))
        say(f"steps/s on {name}, preset {preset}: {paces} processes; {self.jobs} at a time")

    @property
    def _start_s(self) -> float:
        return self.pace.start_s if self.pace else START_S[self.device_type]

    def _fits(self, run: PlannedRun, left_s: float) -> bool:
        """Return whether ``left_s`` seconds are enough for a step of ``run``, or for the rest of it."""
        needed_s = self._start_s
        if self.whole and self.pace is not None:
            done = 0
            with suppress(Refusal):
                done = steps_done(self.kept / UNFINISHED / f"{run.spec.digest}.safetensors")
            needed_s += MARGIN * (run.spec.train.steps - done) * self.pace.seconds_per_step(self.jobs or 1)
        return left_s > needed_s
