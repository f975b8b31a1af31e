"""What the records say about a suite: one object that tables, figures and prose are made from.

A suite of one's own is a TOML file anywhere:

    results = load_results("mine.toml", records="book/records")  # where localgpt run has put them
    print(results.table())  # for people; results.frame() has the numbers
    loss_curves(results, list(results.labels), results.floors()).savefig("curves.png")
"""

import math
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import pandas as pd

from localgpt_core.common.notebooks import as_markdown
from localgpt_core.common.validation import require, require_choice
from localgpt_core.config import DEVICES
from localgpt_core.corpus.corpus import Corpus, load_corpus
from localgpt_core.corpus.ngrams import FLOORS, floors
from localgpt_core.evidence.intervals import lies, share_closed
from localgpt_core.evidence.noise import Noise, ends, rounding_noise
from localgpt_core.experiments.suites import Suite, read_suite
from localgpt_core.records import RunRecord, load_records
from localgpt_core.report.tables import (
    TOO_FEW,
    arm_frame,
    arm_table,
    as_typed,
    book_folder,
    in_words,
    interval,
    measured_values,
    not_shown,
    paired_difference,
    require_alike,
    suite_runs,
)
from localgpt_core.training.curves import ACCURACY

__all__ = ["SuiteResults", "book_folder", "load_results", "suite_results"]

Records = dict[str, RunRecord]
MIN_PAIRS = 3  # below, a comparison has no verdict


@dataclass(frozen=True)
class SuiteResults:
    """A suite with what is recorded of it.

    Attributes:
        suite: The suite.
        preset: The preset it was run with.
        runs: One row per recorded run, see `localgpt_core.report.tables.suite_runs`.
        records: The records by digest.
        planned: Number of runs the suite asks for.
        corpus: Its text, for `floors`; None where these results were put together by hand.
        device: The kind of device that its runs were made on.
        elsewhere: Number of runs that are recorded, but were made on another kind, and are not shown.
        noise: What rounding alone does to runs of the preset and the corpus; None where it is not recorded.

    Raises:
        ValueError: If the runs of an arm differ in more than their seed, such as the kind of their device.
    """

    suite: Suite
    preset: str
    runs: pd.DataFrame
    records: Records
    planned: int
    corpus: Corpus | None = None
    device: str = "cpu"
    elsewhere: int = 0
    noise: Noise | None = None

    def __post_init__(self) -> None:
        for arm, digests in self.runs.groupby("arm", sort=False)["digest"]:
            allowed = f"runs on several kinds of device have no mean; allowed are {', '.join(self.labels)}"
            require(arm in self.labels, "arm", arm, allowed)
            require_alike(arm, [self.records[digest] for digest in digests])

    @property
    def labels(self) -> dict[str, str]:
        """The label of each arm, in the suite's order."""
        return {arm.name: arm.label for arm in self.suite.arms}

    def label(self, arm: str) -> str:
        """Return the label of an arm; ``ValueError`` if the suite has no such arm."""
        require(arm in self.labels, "arm", arm, f"allowed are {', '.join(self.labels)}")
        return self.labels[arm]

    def of_arm(self, arm: str) -> Iterator[RunRecord]:
        """Yield the records of an arm, by seed; ``ValueError`` if the suite has no such arm."""
        self.label(arm)
        return (self.records[digest] for digest in self.runs[self.runs["arm"] == arm]["digest"])

    def final_loss(self, arm: str, level: float = 0.95) -> tuple[float, float, int]:
        """Return the mean final validation loss of finished runs, the half-width of its interval, and n."""
        losses = [r.final_val_loss for r in self.of_arm(arm) if r.status == "finished"]
        return *interval(losses, level), len(losses)

    def difference(self, arm: str, reference: str, level: float = 0.95) -> tuple[float, float, int]:
        """Return mean and half-width of the paired difference in final loss, and n; raises as `of_arm`.

        ``reference`` is an arm, or an n-gram floor of the text, the same for every seed.
        """
        if reference in FLOORS and reference not in self.labels:
            mean, half, n = self.final_loss(arm, level)
            require_choice("reference", reference, there := self.floors())
            return mean - there[reference], half, n
        self.label(arm), self.label(reference)
        return paired_difference(self.runs, arm, reference, level)

    def curves(self) -> pd.DataFrame:
        """Return the validation curves, tidy: arm, label, seed, step, tflops, val_loss, val_accuracy.

        The loss is in nats per character, ``tflops`` the matmul work so far in 10^12 operations, the accuracy
        the share of the answers that are right: NaN without answers. Runs that broke down have no curves.
        """
        rows = []
        for arm, label in self.labels.items():
            for run in (record for record in self.of_arm(arm) if record.curves):
                sizes = run.run_spec.train.batch_size * run.run_spec.model.block_size
                right = run.curves.get(ACCURACY, [math.nan] * len(run.curves["val_step"]))
                for step, *shown in zip(run.curves["val_step"], run.curves["val_loss"], right, strict=True):
                    work = step * (sizes * run.flops_per_token / 1e12)
                    rows.append((arm, label, run.seed, step, work, *shown))
        return pd.DataFrame(rows, columns=["arm", "label", "seed", "step", "tflops", "val_loss", ACCURACY])

    def diagnostics(self, quantity: str) -> pd.DataFrame:
        """Return what was measured over training, tidy: arm, label, seed, step, name, value.

        ``quantity`` is a key of `localgpt_core.measure.Diagnostics`. ``name`` is the parameter, the place
        of the feedback or the block, and empty where there is one number per step. Runs without diagnostics
        are left out; a value that says nothing is NaN.
        """
        rows = []
        for arm, label in self.labels.items():
            for record in self.of_arm(arm):
                for step, name, value in measured_values(record.diagnostics, quantity):
                    rows.append((arm, label, record.seed, step, name, math.nan if value is None else value))
        return pd.DataFrame(rows, columns=["arm", "label", "seed", "step", "name", "value"])

    def verdict(self, arm: str, reference: str) -> str:
        """Return how ``arm`` ends against ``reference``, by the criterion of every comparison in the book.

        That is `localgpt_core.evidence.noise.ends` of the paired difference, or why there is no verdict:
        ``"diverged"`` or ``"reference diverged"``, with the number of such runs, ``"not enough runs"``.
        """
        mean, half, n = self.difference(arm, reference)
        return self.undecided(arm, reference, n) or ends(mean, half, self.floor(n))

    def floor(self, n: int) -> float:
        """Return what rounding alone does to the mean of ``n`` pairs; 0 where that is not recorded."""
        return self.noise.floor(n) if self.noise else 0.0

    def undecided(self, arm: str, reference: str, n: int, needed: int = MIN_PAIRS) -> str:
        """Return why ``arm`` and ``reference`` with ``n`` pairs have no verdict; empty if they have one."""
        # The seeds that are left after a divergence are not a fair sample, however many they are.
        diverged = self.runs[self.runs["status"] == "diverged"]["arm"].value_counts()
        for name, words in ((arm, "diverged"), (reference, "reference diverged")):
            if name in diverged:
                return f"{words} ({diverged[name]} of its runs)"
        return TOO_FEW if n < needed else ""

    def compare(self, arm: str, reference: str) -> str:
        """Return the verdict as half a sentence in Markdown: the paired difference, its interval and n."""
        mean, half, n = self.difference(arm, reference)
        own, other = (as_markdown(self.label(name)) for name in (arm, reference))
        if undecided := self.undecided(arm, reference, n):
            return f"{own} against {other}: {undecided} (n = {n})"
        pairs = f"(n = {n}; rounding: {self.floor(n):.3f})" if self.noise else f"(n = {n})"
        return f"{in_words(own, other, self.verdict(arm, reference), mean, half)} {pairs}"

    def within(self, arm: str, reference: str, margin: float) -> str:
        """Return whether ``arm`` ends at most ``margin`` nats above ``reference``, by the same interval.

        ``"yes"`` if all of it lies below ``margin``, ``"no"`` if all of it lies above, else ``"open"``; or
        why there is no verdict.
        """
        mean, half, n = self.difference(arm, reference)
        answers = {True: "yes", False: "no", None: "open"}
        return self.undecided(arm, reference, n) or answers[lies(mean, half, (-math.inf, margin))]

    def gap_closed(self, arm: str, worst: str = "frozen body", best: str = "bp") -> tuple[float, float, int]:
        """Return `share_closed` of these arms; a suite of one's own names its own. Raises as `of_arm`."""
        self.label(arm), self.label(worst), self.label(best)
        return share_closed(self.runs, arm, worst, best)

    def with_fields(self, *names: str) -> pd.DataFrame:
        """Return ``runs`` with a column for each of these fields of a configuration, or ``ValueError``."""
        runs = self.runs.copy()
        for name in names:
            # Through the spec as an object: a record may be older than a field, which then had its default.
            specs = [self.records[digest].run_spec for digest in runs["digest"]]
            values = [{**asdict(spec.model), **asdict(spec.train)} for spec in specs]
            require(all(name in value for value in values), "field", name, "must be one of a configuration")
            runs[name] = [value[name] for value in values]
        return runs

    def table(self) -> pd.DataFrame:
        """Return one row per arm for people; see `localgpt_core.report.tables.arm_table`."""
        return arm_table(self.runs)

    def frame(self) -> pd.DataFrame:
        """Return one row per arm as numbers, for code; see `localgpt_core.report.tables.arm_frame`."""
        return arm_frame(self.runs)

    def floors(self) -> dict[str, float]:
        """Return the n-gram floors of the suite's text; ``ValueError`` if these results have none."""
        require(self.corpus is not None, "corpus", self.corpus, "these results were made without a text")
        return floors(self.corpus)

    def origin(self) -> str:
        """Return, in Markdown, what made these results: runs, seeds, device, the command to make them."""
        more = f" ({not_shown(self.elsewhere, self.device)})" if self.elsewhere else ""
        if self.runs.empty:
            name = as_markdown(self.suite.name)
            return f"No run of suite {name} is recorded with preset {self.preset}{more}."
        environments = [self.records[digest].environment for digest in self.runs["digest"]]
        devices = {as_markdown(str(about.get("device", "unknown"))) for about in environments}
        seeds = ", ".join(map(str, sorted({*self.runs["seed"]})))
        made = f"{len(self.runs)} of {self.planned} runs recorded, preset {self.preset}, seeds {seeds}, on "
        made += f"{' and '.join(sorted(devices))}{more}; "
        return f"{made}localgpt run {as_markdown(as_typed(self.suite.path))}"


def load_results(
    name: str | os.PathLike[str],
    preset: str | None = None,
    device: str | None = None,
    *,
    records: str | os.PathLike[str] | None = None,
    corpus: str | Corpus | None = None,
) -> SuiteResults:
    """Return the recorded results of a suite.

    Args:
        name: The path of a TOML file, which ends in ``.toml``; or the name of a suite of the book,
            ``book/suites/<name>.toml``, from anywhere inside the checkout.
        preset: Asks for the runs that were made with another preset than the suite's own.
        device: ``"cpu"`` or ``"cuda"``: runs that were made on the other are not shown, only counted, so that
            nothing mixes them. Default: what the preset is for, ``"cuda"`` for gpu. A record that does not
            say is the CPU's.
        records: Folder with the records; default: the book's, and for a path ``book/records`` below the
            working directory, where ``localgpt run`` writes them.
        corpus: The text, or a name or path for `load_corpus`, instead of the suite's own.

    Raises:
        ValueError: For a suite, a preset, a device, a text or a folder of records that is not there.
    """
    if isinstance(name, os.PathLike) or name.endswith(".toml"):
        path, folder = Path(name), Path(records or "book/records")
    else:
        book = book_folder()
        path, folder = book / "suites" / f"{name}.toml", Path(records or book / "records")
    suite = read_suite(path)
    allowed = "no such folder; records= says where localgpt run has written"
    require(folder.is_dir(), "records", str(folder), allowed)
    text = corpus if isinstance(corpus, Corpus) else load_corpus(corpus or suite.corpus)
    return suite_results(suite, load_records(folder), text, preset, device)


def suite_results(
    suite: Suite, records: Records, corpus: Corpus, preset: str | None = None, device: str | None = None
) -> SuiteResults:
    """Return what ``records``, by digest, say of ``suite`` on the text ``corpus``, as `load_results` does."""
    preset = preset or suite.preset
    device = device or DEVICES[preset]
    require_choice("device", device, ("cpu", "cuda"))
    planned = [run.spec.digest for run in suite.plan(corpus, preset)]
    found = {digest: record for digest, record in records.items() if record.device_type == device}
    elsewhere = len({*planned} & (records.keys() - found.keys()))
    runs = suite_runs(suite, found, corpus, preset)
    noise = rounding_noise(
        r for r in found.values() if (r.preset, r.corpus_sha256) == (preset, corpus.sha256)
    )
    return SuiteResults(suite, preset, runs, found, len(planned), corpus, device, elsewhere, noise)
