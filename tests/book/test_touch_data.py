"""What the chapters' interactives are given at the build, which pages load them, and their figures."""

import json
import re
import sys
from pathlib import Path
from xml.etree import ElementTree

import nbformat
import pytest
from docutils import nodes

from localgpt_core.report.results import load_results

ROOT = Path(__file__).parents[2]
STATIC = ROOT / "book/_static"
sys.path[:0] = [str(ROOT / "book/_ext"), str(ROOT / "tools")]
import touch  # noqa: E402  an extension of Sphinx, which is no package
import touch_figures  # noqa: E402  a script


@pytest.fixture(scope="module")
def recorded():
    return touch.recorded(ROOT / "book")


def test_the_numbers_are_those_of_the_records(recorded):
    for (suite, arm), run in zip(touch.RUNS, recorded["runs"], strict=True):
        runs = load_results(suite).runs
        (digest,) = runs[runs["arm"] == arm]["digest"]
        file, *_ = (ROOT / "book/records").glob(f"*/{digest}.json")
        record = json.loads(file.read_text())
        diagnostics, curves = record["diagnostics"], record["curves"]
        expected = {
            "cosine": (diagnostics["step"], diagnostics["total_cosine"]),
            "stream": (diagnostics["step"], [blocks[-1] for blocks in diagnostics["residual_rms"]]),
            "gradient": (diagnostics["step"], [blocks[-1] for blocks in diagnostics["exact_rms"]]),
            "loss": (curves["val_step"], curves["val_loss"]),
        }
        for name, (steps, values) in expected.items():
            assert [step for step, _ in run[name]] == steps
            assert [value for _, value in run[name]] == pytest.approx(values, rel=1e-3)
        assert recorded["steps"] == diagnostics["step"]


def test_the_cosine_misleads_as_the_chapter_says(recorded):
    a, b, c = ({name: dict(run[name]) for name in ("cosine", "stream", "loss")} for run in recorded["runs"])
    trained = recorded["steps"][1:]
    assert all(a["cosine"][step] > max(b["cosine"][step], c["cosine"][step]) for step in trained)
    assert any(b["cosine"][step] > c["cosine"][step] for step in trained)
    last = trained[-1]
    assert c["loss"][last] < a["loss"][last] < b["loss"][last]
    assert c["stream"][last] < a["stream"][last] < b["stream"][last]


def test_a_page_asks_by_the_class_of_a_figure():
    figure = nodes.figure("", nodes.image(uri="a.svg"), classes=["touch-norm", "other"])
    assert touch.asked(nodes.container("", nodes.paragraph(), figure)) == ["norm"]
    assert touch.asked(nodes.container("", nodes.figure(classes=["other"]))) == []
    scripts = ["touch.js", "math/norm.js", "plane.js", "norm.js"]
    assert touch.files("page", ["norm"]) == [
        "touch/touch.css",
        "controls.js",
        *(f"touch/{name}" for name in scripts),
    ]


def test_the_runs_are_written_for_a_page_that_shows_them(recorded):
    assert touch.written(ROOT / "book", {"page": ["norm"]}) == {}
    script = touch.written(ROOT / "book", {"page": ["norm"], "other": ["runs"]})[touch.DATA]
    assert json.loads(re.search(r"touch\.recorded = (.*);", script)[1]) == recorded
    assert len(script) < 4000


def test_every_script_is_there_and_used():
    used = {"touch", *(file for files in touch.SCRIPTS.values() for file in files)}
    folder = STATIC / "touch"
    there = {str(file.relative_to(folder).with_suffix("")) for file in folder.rglob("*.js")}
    assert used - there == {"recorded"} and there <= used


def test_every_interactive_stands_in_one_chapter_with_a_figure():
    cells = [
        cell.source
        for path in sorted((ROOT / "book/chapters").glob("*.ipynb"))
        for cell in nbformat.read(path, as_version=4).cells
        if ":figclass: touch-" in cell.source
    ]
    assert sorted(re.findall(r":figclass: touch-(\w+)", "".join(cells))) == sorted(touch.SCRIPTS)
    for source in cells:
        (name,) = re.findall(r":figclass: touch-(\w+)", source)
        assert f"../_static/touch/figures/{name}.svg" in source
        assert len(re.search(r":alt: (.*)", source)[1]) > 60


def test_the_figures_are_drawn_anew(tmp_path, monkeypatch):
    monkeypatch.setenv("MPLBACKEND", "Agg")
    touch_figures.main(tmp_path)
    drawn = {path.name for path in tmp_path.iterdir()}
    assert drawn == {path.name for path in touch_figures.FIGURES.iterdir()}
    assert drawn == {f"{name}.svg" for name in touch.SCRIPTS}
    for name in drawn:
        ours, kept = (
            ElementTree.parse(folder / name).getroot() for folder in (tmp_path, touch_figures.FIGURES)
        )
        assert (ours.get("width"), ours.get("height")) == (kept.get("width"), kept.get("height"))
