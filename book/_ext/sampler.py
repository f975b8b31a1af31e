"""Recorded models that write in a page.

A page asks with `<div class="sampler" data-models="NAME NAME ...">`, in which stands what is read where no
scripts run. The models are in ``_static/sampler/models/``, made by ``tools/sampler_models.py``; each is
loaded when a reader asks for it.
"""

import json
import re
from pathlib import Path

from docutils import nodes
from interactive import Interactive, elements

MODELS = Path(__file__).parents[1] / "_static/sampler/models"
INDEX = "sampler/models.js"  # made here
SCRIPTS = [
    "controls",
    "lab/lab",
    *(f"lab/engine/{name}" for name in "kernel random tensors rules model writing".split()),
    *(f"sampler/{name}" for name in "models held worker sampler".split()),
]
SHOWN = ("label", "digest", "seed", "loss", "vocabulary")


def held(script: str) -> dict:
    """Return what a model's script hands to the page."""
    return json.loads(re.search(r"=> \((.*)\)\);$", script, re.MULTILINE)[1])


def index() -> dict[str, dict]:
    """Return, by name, what is shown of every model before it is loaded, with the bytes of its script."""
    shown = {}
    for path in sorted(MODELS.glob("*.js")):
        script = path.read_text(encoding="utf-8")
        model = held(script)
        shown[path.stem] = {key: model[key] for key in SHOWN} | {"bytes": len(script)}
    return shown


def asked(doctree: nodes.document) -> list[str]:
    """Return the models that a page asks for, and refuse those that there are none of."""
    found = {name for div in elements(doctree, "sampler") for name in div["data-models"].split()}
    if unknown := found - {path.stem for path in MODELS.glob("*.js")}:
        raise ValueError(f"{doctree['source']}: there are no models {sorted(unknown)} in {MODELS}")
    return sorted(found)


def files(page: str, models: list[str]) -> list[str]:
    """Return what a page loads before a reader asks for a model."""
    return ["sampler/sampler.css", *(f"{name}.js" for name in SCRIPTS)]


def written(book: Path, pages: dict[str, list[str]]) -> dict[str, str]:
    """Return what is shown of the models before they are loaded."""
    return {INDEX: f'lab.define("models", () => ({json.dumps(index())}));'}


def setup(app) -> dict[str, bool]:
    """Register the sampler."""
    return Interactive("sampler", asked, files, written).register(app)
