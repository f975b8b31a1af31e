"""Recorded models that write in a page: what a page loads that asks for them, and no other page.

A page asks with `<div class="sampler" data-models="NAME NAME ...">`, in which stands what is read where no
scripts run. The models are in ``_static/sampler/models/``, made by ``tools/sampler_models.py``; each is
loaded when a reader asks for it. What is shown of them before is written into the built book.
"""

import json
import re
from pathlib import Path

from bs4 import BeautifulSoup
from docutils import nodes

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


def find_samplers(app, doctree: nodes.document) -> None:
    """Note whether a page asks for models, and refuse those that there are none of."""
    html = "".join(node.astext() for node in doctree.findall(nodes.raw) if "sampler" in node.astext())
    found = BeautifulSoup(html, "html.parser").select("div.sampler")
    asked = {name for div in found for name in div["data-models"].split()}
    if unknown := asked - {path.stem for path in MODELS.glob("*.js")}:
        raise ValueError(f"{app.env.docname}: there are no models {sorted(unknown)} in {MODELS}")
    if asked:
        app.env.metadata[app.env.docname]["sampler"] = True


def add_scripts(app, pagename: str, templatename: str, context: dict, doctree) -> None:
    """Let a page that asks for models load what runs them."""
    if app.env.metadata.get(pagename, {}).get("sampler"):
        app.add_css_file("sampler/sampler.css")
        for name in SCRIPTS:
            app.add_js_file(f"{name}.js", loading_method="defer")


def write_index(app, exception: Exception | None) -> None:
    """Write what is shown of the models beside the scripts of the built book."""
    if exception is None and app.builder.format == "html":
        text = f'"use strict";\nlab.define("models", () => ({json.dumps(index())}));\n'
        Path(app.outdir, "_static", INDEX).write_text(text, encoding="utf-8")


def setup(app) -> dict[str, bool]:
    """Register all three."""
    app.connect("doctree-read", find_samplers)
    app.connect("html-page-context", add_scripts)
    app.connect("build-finished", write_index)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
