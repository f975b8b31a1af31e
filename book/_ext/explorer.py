"""The explorer of recorded runs: what a page that asks for one loads, and no other page.

A page asks with an element that names suites, and in ``data-arms`` those arms that are drawn at first:

    <div class="explorer" data-suites="rules gpu" data-arms="bp, fa"> what stands there without scripts </div>

The runs are written into the built book as a script, since a page that is opened from a disk may fetch no
file: `suite_data` says what of them. The scripts are in ``_static/explorer/``.
"""

import json
import math
from collections.abc import Iterable
from pathlib import Path
from statistics import fmean

import pandas as pd
from bs4 import BeautifulSoup
from docutils import nodes
from matplotlib.colors import to_hex

from localgpt_core.corpus.corpus import load_corpus
from localgpt_core.experiments.suites import Arm, read_suite
from localgpt_core.records import RunRecord, load_records
from localgpt_core.report.results import SuiteResults, suite_results
from localgpt_core.report.style import look

DATA = "explorer/data/{page}.js"  # made here
SCRIPTS = ["controls.js", "explorer/explorer.js", "vendor/uplot/uPlot.iife.min.js", DATA]
SCRIPTS += [f"explorer/{name}.js" for name in "figure runs table detail page".split()]
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
    return f'"use strict";\nexplorer.suites = {json.dumps(found, separators=(",", ":"))};\n'


# ------------------------------------------------------------------------------------------ in the build


def find_suites(app, doctree: nodes.document) -> None:
    """Note which suites a page asks for, where Sphinx keeps what it knows of a page."""
    html = "".join(node.astext() for node in doctree.findall(nodes.raw) if "explorer" in node.astext())
    asked = [div["data-suites"].split() for div in BeautifulSoup(html, "html.parser").select("div.explorer")]
    if asked:
        app.env.metadata[app.env.docname]["explorer"] = [*dict.fromkeys(sum(asked, []))]


def as_name(page: str) -> str:
    """Return the path of a page as the name of one file."""
    return page.replace("/", "-")


def add_scripts(app, pagename: str, templatename: str, context: dict, doctree) -> None:
    """Let a page that asks for it load the explorer and its data."""
    if "explorer" in app.env.metadata.get(pagename, {}):
        for style in STYLES:
            app.add_css_file(style)
        for file in SCRIPTS:
            app.add_js_file(file.format(page=as_name(pagename)), loading_method="defer")


def write_data(app, exception: Exception | None) -> None:
    """Write the data of each page that asks for it beside the scripts of the built book."""
    asked = {page: found["explorer"] for page, found in app.env.metadata.items() if "explorer" in found}
    if exception is not None or app.builder.format != "html" or not asked:
        return
    book = Path(app.srcdir, "book")
    records = load_records(book / "records")
    for page, names in asked.items():
        suites = [read_suite(book / "suites" / f"{name}.toml") for name in names]
        found = [suite_results(suite, records, load_corpus(suite.corpus)) for suite in suites]
        file = Path(app.outdir, "_static", DATA.format(page=as_name(page)))
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(script(found), encoding="utf-8")


def setup(app) -> dict[str, bool]:
    """Register all three."""
    app.connect("doctree-read", find_suites)
    app.connect("html-page-context", add_scripts)
    app.connect("build-finished", write_data)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
