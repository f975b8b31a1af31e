"""The explorer of recorded runs: what a page that asks for one loads, and no other page.

A page asks with an element that names suites, and in ``data-arms`` those arms that are drawn at first:

    <div class="explorer" data-suites="rules gpu" data-arms="bp, fa"> what stands there without scripts </div>

`suite_data` says what of the runs a page is given. The scripts are in ``_static/explorer/``.
"""

import json
import math
from collections.abc import Iterable
from pathlib import Path
from statistics import fmean

import pandas as pd
from docutils import nodes
from interactive import Interactive, elements
from matplotlib.colors import to_hex

from localgpt_core.corpus.corpus import load_corpus
from localgpt_core.experiments.suites import Arm, read_suite
from localgpt_core.records import RunRecord, load_records
from localgpt_core.report.results import SuiteResults, suite_results
from localgpt_core.report.style import look

# Before the data, and after them.
SCRIPTS = (
    ["controls.js", "explorer/explorer.js", "vendor/uplot/uPlot.iife.min.js"],
    [f"explorer/{name}.js" for name in "figure runs table detail page".split()],
)
STYLES = ["vendor/uplot/uPlot.min.css", "explorer/explorer.css"]
DIGITS = 4
# Of the diagnostics by place; the explorer shows the first as a cosine and the second as an angle.
BY_PLACE = ("cosine", "feedback")
CURVES = {"train_loss": "step", "val_loss": "val_step"}  # of a record, each with its steps
# Of matplotlib's dashes those with a name, in pixels.
DASHES = {"-": [], "--": [7, 3], "-.": [8, 3, 2, 3], ":": [2, 3]}


def short(value: float | None) -> float | None:
    """Return ``value`` with `DIGITS` digits; None where it is not a number."""
    return float(f"{value:.{DIGITS}g}") if value is not None and math.isfinite(value) else None


def dash(linestyle: str | tuple[int, tuple[int, ...]]) -> list[int]:
    """Return a dash of a figure of the book, as `look` has it, in pixels."""
    return DASHES[linestyle] if isinstance(linestyle, str) else [2 * length for length in linestyle[1]]


class Steps:
    """Lists of steps, each kept once: most runs of a suite have points at the same ones."""

    def __init__(self) -> None:
        self.lists: list[list[int]] = []

    def curve(self, steps: Iterable[int], values: Iterable[float | None]) -> list:
        """Return a curve as the number of its list of steps, and its values."""
        steps = [int(step) for step in steps]
        if steps not in self.lists:
            self.lists.append(steps)
        return [self.lists.index(steps), [short(value) for value in values]]


def run_data(record: RunRecord, steps: Steps) -> dict:
    """Return what the explorer has of a run: its curves, and what a training step takes of each axis.

    ``seconds`` of a step are those of training, evaluation apart, on the machine that the run had.
    """
    train = record.run_spec.train
    tokens = train.batch_size * record.run_spec.model.block_size
    curves = {name: steps.curve(record.curves[of], record.curves[name]) for name, of in CURVES.items()}
    return {
        "seed": record.seed,
        "digest": record.digest,
        "status": record.status,
        "device": str(record.environment.get("device", "unknown")),
        "loss": short(record.final_val_loss),
        "taken": max(record.curves["step"], default=0),
        "per_step": {
            "tokens": tokens,
            "tflops": short(tokens * (record.flops_per_token or math.nan) / 1e12),
            "seconds": short(tokens / record.tokens_per_s if record.tokens_per_s else math.nan),
        },
        **curves,
    }


def diagnostics_data(measured: dict[str, pd.DataFrame], arm: str, steps: Steps) -> dict:
    """Return the diagnostics of an arm: the total cosine by seed, `BY_PLACE` as means of the seeds."""
    found = {}
    own = {name: table[table["arm"] == arm] for name, table in measured.items()}
    for seed, curve in own["total_cosine"].groupby("seed"):
        found.setdefault("total", {})[str(seed)] = steps.curve(curve["step"], curve["value"])
    for quantity in BY_PLACE:
        means = own[quantity].groupby(["name", "step"], sort=False)["value"].mean()
        for name, curve in means.groupby("name", sort=False):
            places = found.setdefault(quantity, {})
            places[name] = steps.curve(curve.index.get_level_values("step"), curve)
    return found


def reference_of(arms: Iterable[Arm]) -> str | None:
    """Return the first arm whose whole model backpropagation trains; None if there is none."""
    for arm in arms:
        if arm.model.get("method", "bp") == "bp" and not arm.train.get("freeze_body"):
            return arm.name
    return None


def suite_data(results: SuiteResults) -> dict:
    """Return a suite as its page shows it, by arm in the suite's order, losses in nats per character.

    ``loss`` of an arm is mean, half-width of the 95 % interval and number of finished runs; ``gap`` the same
    of the paired difference to the reference arm. ``tflops`` and ``seconds`` are means over whole runs. A
    curve is the number of a list in ``steps``, and the values at these.
    """
    steps, reference = Steps(), reference_of(results.suite.arms)
    measured = {name: results.diagnostics(name) for name in ("total_cosine", *BY_PLACE)}
    arms = []
    for number, (name, label) in enumerate(results.labels.items()):
        line = look(number)
        mean, half, n = results.final_loss(name)
        runs = [run_data(record, steps) for record in results.of_arm(name) if record.curves]
        compared = reference not in (None, name)
        gap = results.difference(name, reference) if compared else (math.nan, math.nan, 0)
        costs = {}
        for axis in ("tflops", "seconds"):
            whole = [run["taken"] * run["per_step"][axis] for run in runs if run["per_step"][axis]]
            costs[axis] = short(fmean(whole)) if whole else None
        arms.append(
            {
                "name": name,
                "label": label,
                "colour": to_hex(line["color"]),
                "dash": dash(line["linestyle"]),
                "loss": [short(mean), short(half), n],
                "gap": [*map(short, gap[:2]), gap[2]],
                **costs,
                "runs": runs,
                "diagnostics": diagnostics_data(measured, name, steps),
            }
        )
    return {
        "name": results.suite.name,
        "preset": results.preset,
        "reference": reference,
        "floors": {name: short(loss) for name, loss in results.floors().items()},
        "arms": arms,
        "steps": steps.lists,
    }


def script(suites: Iterable[SuiteResults]) -> str:
    """Return the script that hands these suites to the explorer."""
    found = {results.suite.name: suite_data(results) for results in suites}
    return f"explorer.suites = {json.dumps(found, separators=(',', ':'))};"


# ------------------------------------------------------------------------------------------ in the build


def asked(doctree: nodes.document) -> list[str]:
    """Return the suites that a page asks for."""
    found = [div["data-suites"].split() for div in elements(doctree, "explorer")]
    return [*dict.fromkeys(sum(found, []))]


def data_file(page: str) -> str:
    """Return where the data of a page are, which are made here."""
    return f"explorer/data/{page.replace('/', '-')}.js"


def files(page: str, suites: list[str]) -> list[str]:
    """Return what a page loads."""
    before, after = SCRIPTS
    return [*STYLES, *before, data_file(page), *after]


def written(book: Path, pages: dict[str, list[str]]) -> dict[str, str]:
    """Return the data of each page."""
    records = load_records(book / "records")
    scripts = {}
    for page, names in pages.items():
        suites = [read_suite(book / "suites" / f"{name}.toml") for name in names]
        found = [suite_results(suite, records, load_corpus(suite.corpus)) for suite in suites]
        scripts[data_file(page)] = script(found)
    return scripts


def setup(app) -> dict[str, bool]:
    """Register the explorer."""
    return Interactive("explorer", asked, files, written).register(app)
