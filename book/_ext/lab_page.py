"""What the page "Train it here" loads, and no other page: the scripts of the lab and its part of the corpus.

The text is written into the built book as a script, since a page that is opened from a disk may fetch no
file. With it go the n-gram floors on that part, from the same counts as the floors of the chapters.
"""

import json
from pathlib import Path

import numpy as np

from localgpt_core import load_corpus
from localgpt_core.corpus.ngrams import witten_bell

PAGE = "book/train-it-here"
ENGINE = "kernel random tensors rules model optimizer batches writing run pair"
SCRIPTS = [
    "lab",
    *(f"engine/{name}" for name in ENGINE.split()),
    "corpus",
    *(f"page/{name}" for name in "worker settings charts controls results page".split()),
]
TRAIN, VALIDATION = 250_000, 8_193  # characters; the latter are whole windows, and the first one before them
FLOORS = ["unigram", "bigram", "3-gram", "4-gram"]


def corpus_script(n_train: int = TRAIN, n_validation: int = VALIDATION) -> str:
    """Return the script that defines the lab's module ``corpus``: the first characters of either split."""
    corpus = load_corpus()
    parts = {"train": corpus.train[:n_train], "validation": corpus.val[:n_validation]}
    ids = np.concatenate([*parts.values()])
    nats = -np.log(witten_bell(ids, n_train, corpus.vocab_size, len(FLOORS))).mean(axis=1)
    holds = {
        "vocabulary": corpus.vocabulary,
        **{name: corpus.decode(part) for name, part in parts.items()},
        "floors": dict(zip(FLOORS, nats[1:].tolist(), strict=True)),
    }
    return f'"use strict";\nlab.define("corpus", () => ({json.dumps(holds, ensure_ascii=True)}));\n'


def add_scripts(app, pagename: str, templatename: str, context: dict, doctree) -> None:
    """Let the lab's page, and it alone, load the lab."""
    if pagename == PAGE:
        app.add_css_file("lab/lab.css")
        app.add_js_file("controls.js", loading_method="defer")
        for name in SCRIPTS:
            app.add_js_file(f"lab/{name}.js", loading_method="defer")


def write_corpus(app, exception: Exception | None) -> None:
    """Write the corpus beside the scripts of the built book."""
    if exception is None and app.builder.format == "html":
        Path(app.outdir, "_static/lab/corpus.js").write_text(corpus_script(), encoding="utf-8")


def setup(app) -> dict[str, bool]:
    """Register both."""
    app.connect("html-page-context", add_scripts)
    app.connect("build-finished", write_corpus)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
