"""What the records say about a suite: one object that tables, figures and prose are made from."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from localgpt_core.corpus import load_corpus
from localgpt_core.records import RunRecord, load_records
from localgpt_core.suites import Suite, read_suite
from localgpt_core.tables import arm_table, interval, paired_difference, suite_runs
from localgpt_core.validation import require

__all__ = ["SuiteResults", "book_folder", "load_results"]


def book_folder() -> Path:
    """Return the nearest folder ``book`` with suites, from the working directory upwards.

    Raises:
        ValueError: If there is none.
    """
    here = Path.cwd()
    for folder in (here, *here.parents):
        for candidate in (folder, folder / "book"):
            if (candidate / "suites").is_dir():
                return candidate
    raise ValueError(f"working directory {here.name!r}: must be inside the checkout, for book/suites")


@dataclass(frozen=True)
class SuiteResults:
    """A suite with what is recorded of it.

    Attributes:
        suite: The suite.
        preset: The preset it was run with.
        runs: One row per recorded run, see `localgpt_core.tables.suite_runs`.
        records: The records by digest.
        planned: Number of runs the suite asks for.
    """

    suite: Suite
    preset: str
    runs: pd.DataFrame
    records: dict[str, RunRecord]
    planned: int

    @property
    def labels(self) -> dict[str, str]:
        """The label of each arm, in the suite's order."""
        return {arm.name: arm.label for arm in self.suite.arms}

    def of_arm(self, arm: str) -> Iterator[RunRecord]:
        """Yield the records of an arm, by seed.

        Raises:
            ValueError: If the suite has no such arm.
        """
        require(arm in self.labels, "arm", arm, "allowed are " + ", ".join(self.labels))
        return (self.records[digest] for digest in self.runs[self.runs["arm"] == arm]["digest"])

    def final_loss(self, arm: str) -> tuple[float, float, int]:
        """Return mean final validation loss, its 95 % half-width and n, over the finished runs of an arm."""
        losses = [r.final_val_loss for r in self.of_arm(arm) if r.status == "finished"]
        return *interval(losses), len(losses)

    def difference(self, arm: str, reference: str) -> tuple[float, float, int]:
        """Return the paired difference in final loss, its 95 % half-width and n."""
        return paired_difference(self.runs, arm, reference)

    def curves(self) -> pd.DataFrame:
        """Return the validation curves, tidy: arm, label, seed, step, val_loss (nats per character)."""
        rows = [
            {"arm": arm, "label": label, "seed": record.seed, "step": step, "val_loss": loss}
            for arm, label in self.labels.items()
            for record in self.of_arm(arm)
            for step, loss in zip(record.curves["val_step"], record.curves["val_loss"], strict=True)
        ]
        return pd.DataFrame(rows, columns=["arm", "label", "seed", "step", "val_loss"])

    def with_fields(self, *names: str) -> pd.DataFrame:
        """Return ``runs`` with one more column for each named field of the model or training configuration.

        Raises:
            ValueError: If there is no such field.
        """
        runs = self.runs.copy()
        for name in names:
            specs = [self.records[digest].spec for digest in runs["digest"]]
            values = [{**spec["model"], **spec["train"]} for spec in specs]
            require(all(name in value for value in values), "field", name, "must be one of a configuration")
            runs[name] = [value[name] for value in values]
        return runs

    def table(self) -> pd.DataFrame:
        """Return one row per arm; see `localgpt_core.tables.arm_table`."""
        return arm_table(self.runs)

    def origin(self) -> str:
        """Return what made these results: runs, seeds, device and the command to make them again."""
        if self.runs.empty:
            return f"No run of suite {self.suite.name} is recorded with preset {self.preset}."
        records = [self.records[digest] for digest in self.runs["digest"]]
        devices = sorted({str(record.environment["device"]) for record in records})
        seeds = sorted({record.seed for record in records})
        return (
            f"{len(self.runs)} of {self.planned} runs recorded, preset {self.preset}, seeds "
            f"{', '.join(map(str, seeds))}, on {' and '.join(devices)}; "
            f"localgpt run book/suites/{self.suite.path.name}"
        )


def load_results(name: str, preset: str | None = None) -> SuiteResults:
    """Return the recorded results of ``book/suites/<name>.toml``, from anywhere inside the checkout.

    ``preset`` asks for the runs that were made with another preset than the suite's own.
    """
    folder = book_folder()
    suite = read_suite(folder / "suites" / f"{name}.toml")
    corpus = load_corpus(suite.corpus)
    records = load_records(folder / "records")
    runs = suite_runs(suite, records, corpus, preset)
    planned = len(suite.plan(corpus, preset))
    return SuiteResults(suite, preset or suite.preset, runs, records, planned)
