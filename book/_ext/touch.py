"""What is moved in the chapters: figures that a reader drags.

A page asks with a figure of class ``touch-NAME``, which stands there on paper and where no scripts run:

    ```{figure} ../_static/touch/figures/NAME.svg
    :figclass: touch-NAME
    :alt: what it shows
    The caption.
    ```

The scripts are in ``_static/touch/``; the figures are drawn by ``tools/touch_figures.py``.
"""

import json
from pathlib import Path

from docutils import nodes
from interactive import Interactive

from localgpt_core.corpus.corpus import load_corpus
from localgpt_core.experiments.suites import read_suite
from localgpt_core.records import RunRecord, load_records
from localgpt_core.report.results import suite_results

PREFIX = "touch-"
DATA = "touch/recorded.js"  # made here
# By name the scripts after touch.js, in order.
SCRIPTS = {
    "feedback": ["math/feedback", "chart", "feedback"],
    "norm": ["math/norm", "plane", "norm"],
    "codes": ["math/codes", "plane", "codes"],
    "runs": ["recorded", "chart", "runs"],
}
# Three runs of which the cosine tells another order than the loss: suite and arm.
RUNS = [
    ("learning-rates", "grape 3e-3"),
    ("wider-rates", "dfa sublayer 3e-3"),
    ("learning-rates", "dfa grape block 3e-3"),
]


def short(value: float) -> float:
    """Return ``value`` with four digits."""
    return float(f"{value:.4g}")


def run_data(record: RunRecord, label: str) -> dict:
    """Return what is shown of a run: [step, value] of cosine, stream, exact gradient and validation loss.

    The cosine is that of all parameters to the exact gradient; the two sizes are RMS behind the last block.
    """
    found = record.diagnostics
    curves = {
        "cosine": (found["step"], found["total_cosine"]),
        "stream": (found["step"], [blocks[-1] for blocks in found["residual_rms"]]),
        "gradient": (found["step"], [blocks[-1] for blocks in found["exact_rms"]]),
        "loss": (record.curves["val_step"], record.curves["val_loss"]),
    }
    pairs = {name: [[s, short(v)] for s, v in zip(*curve, strict=True)] for name, curve in curves.items()}
    return {"label": label, **pairs}


def recorded(book: Path) -> dict:
    """Return the steps and the data of `RUNS`, of the first seed of each."""
    records, found = load_records(book / "records"), []
    for name, arm in RUNS:
        suite = read_suite(book / "suites" / f"{name}.toml")
        results = suite_results(suite, records, load_corpus(suite.corpus))
        found.append(run_data(next(results.of_arm(arm)), results.label(arm)))
    return {"steps": [step for step, _ in found[0]["cosine"]], "runs": found}


# ------------------------------------------------------------------------------------------ in the build


def asked(doctree: nodes.document) -> list[str]:
    """Return what is moved in a page."""
    classes = [name for figure in doctree.findall(nodes.figure) for name in figure["classes"]]
    return [name.removeprefix(PREFIX) for name in classes if name.startswith(PREFIX)]


def files(page: str, names: list[str]) -> list[str]:
    """Return what a page loads."""
    own = dict.fromkeys(["touch", *(file for name in names for file in SCRIPTS[name])])
    return ["touch/touch.css", "controls.js", *(f"touch/{file}.js" for file in own)]


def written(book: Path, pages: dict[str, list[str]]) -> dict[str, str]:
    """Return the recorded runs, if a page shows them."""
    if not any("runs" in names for names in pages.values()):
        return {}
    return {DATA: f"touch.recorded = {json.dumps(recorded(book), separators=(',', ':'))};"}


def setup(app) -> dict[str, bool]:
    """Register what is moved."""
    return Interactive("touch", asked, files, written).register(app)
