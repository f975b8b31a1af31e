"""What is moved in the chapters: which scripts a page loads that asks for them, and no other page.

A page asks with a figure of class ``touch-NAME``, which stands there on paper and where no scripts run:

    ```{figure} ../_static/touch/figures/NAME.svg
    :figclass: touch-NAME
    :alt: what it shows
    The caption.
    ```

The scripts are in ``_static/touch/``; the figures are drawn by ``tools/touch_figures.py``. The numbers of
`RUNS` are written into the built book as a script, since a page opened from a disk may fetch no file.
"""

import json
from pathlib import Path

from docutils import nodes

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


def find_figures(app, doctree: nodes.document) -> None:
    """Note what a page asks for, where Sphinx keeps what it knows of a page."""
    classes = [name for figure in doctree.findall(nodes.figure) for name in figure["classes"]]
    asked = [name.removeprefix(PREFIX) for name in classes if name.startswith(PREFIX)]
    if asked:
        app.env.metadata[app.env.docname]["touch"] = asked


def add_scripts(app, pagename: str, templatename: str, context: dict, doctree) -> None:
    """Let a page load the scripts of what it asks for."""
    asked = app.env.metadata.get(pagename, {}).get("touch", [])
    if asked:
        app.add_css_file("touch/touch.css")
        app.add_js_file("controls.js", loading_method="defer")
        for file in dict.fromkeys(["touch", *(file for name in asked for file in SCRIPTS[name])]):
            app.add_js_file(f"touch/{file}.js", loading_method="defer")


def write_data(app, exception: Exception | None) -> None:
    """Write the recorded runs beside the scripts of the built book, if a page shows them."""
    asked = [name for found in app.env.metadata.values() for name in found.get("touch", [])]
    if exception is None and app.builder.format == "html" and "runs" in asked:
        data = json.dumps(recorded(Path(app.srcdir, "book")), separators=(",", ":"))
        Path(app.outdir, "_static", DATA).write_text(f'"use strict";\ntouch.recorded = {data};\n', "utf-8")


def setup(app) -> dict[str, bool]:
    """Register all three."""
    app.connect("doctree-read", find_figures)
    app.connect("html-page-context", add_scripts)
    app.connect("build-finished", write_data)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
