"""The lab of the page "Train it here": its scripts, and its part of the corpus.

With the text go the n-gram floors on that part, from the same counts as the floors of the chapters. A page
asks with an element `<div class="lab">`.
"""

import json
from pathlib import Path

import numpy as np
from docutils import nodes
from interactive import Interactive, elements

from localgpt_core import load_corpus
from localgpt_core.corpus.ngrams import witten_bell

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
    return f'lab.define("corpus", () => ({json.dumps(holds, ensure_ascii=True)}));'


def asked(doctree: nodes.document) -> list[str]:
    """Return one word for each lab on a page."""
    return ["lab" for _ in elements(doctree, "lab")]


def files(page: str, labs: list[str]) -> list[str]:
    """Return what a page with a lab loads."""
    return ["lab/lab.css", "controls.js", *(f"lab/{name}.js" for name in SCRIPTS)]


def written(book: Path, pages: dict[str, list[str]]) -> dict[str, str]:
    """Return the part of the corpus."""
    return {"lab/corpus.js": corpus_script()}


def setup(app) -> dict[str, bool]:
    """Register the lab."""
    return Interactive("lab", asked, files, written).register(app)
