"""What the explorer of recorded runs is given at the build, and which pages it is given to."""

import json
import sys
from pathlib import Path

import pytest
from docutils import nodes
from matplotlib.colors import to_hex
from toys import toy_corpus, toy_curves, toy_record

from localgpt_core.experiments.suites import read_suite
from localgpt_core.report.results import suite_results
from localgpt_core.report.style import look
from localgpt_core.report.tables import interval

ROOT = Path(__file__).parents[2]
STATIC = ROOT / "book/_static"
sys.path.insert(0, str(ROOT / "book/_ext"))
import explorer  # noqa: E402  an extension of Sphinx, which is no package

SUITE = """
question = "which?"
preset = "tiny"
seeds = [1, 2]
train = { steps = 20 }
[arms."frozen body"]
train = { freeze_body = true }
[arms.bp]
label = "backprop"
[arms.fa]
model = { method = "fa" }
[arms.missing]
model = { method = "fa", feedback_std = 0.1 }
"""
LOSSES = {("bp", 1): 2.0, ("bp", 2): 2.2, ("fa", 1): 2.5, ("fa", 2): 2.61234, ("frozen body", 1): 3.0}


def measured(seed: int) -> dict:
    return {
        "step": [0, 20],
        "total_cosine": [0.1 * seed, None],
        "cosine": {"head.weight": [1.0, 0.9 + 0.01 * seed], "blocks.0.mlp.fc.weight": [0.0, -0.123456]},
        "feedback": {"blocks.0.mlp.fc": [0.0, 0.5]},
    }


@pytest.fixture
def data(tmp_path):
    """A suite of which one arm diverged with its second seed, one has diagnostics, and one is missing."""
    (tmp_path / "toys.toml").write_text(SUITE)
    suite, records = read_suite(tmp_path / "toys.toml"), {}
    for run in suite.plan(toy_corpus()):
        loss = LOSSES.get((run.arm.name, run.spec.seed))
        if run.arm.name == "missing":
            continue
        changes = {"final_val_loss": loss, "best_val_loss": loss or 4.0}
        curves = {**toy_curves(run.spec), "val_step": [0, 20], "val_loss": [4.0, loss]}
        if run.arm.name == "fa":
            changes |= {"diagnostics": measured(run.spec.seed)}
        record = toy_record(run.spec, status="finished" if loss else "diverged", curves=curves, **changes)
        records[record.digest] = record
    return explorer.suite_data(suite_results(suite, records, toy_corpus()))


def arm(data, name):
    return next(arm for arm in data["arms"] if arm["name"] == name)


def test_an_arm_has_its_numbers_and_the_difference_to_backpropagation(data):
    assert data["reference"] == "bp"  # not the frozen body, whose method is backpropagation too
    mean, half = interval([2.5, 2.61234])
    assert arm(data, "fa")["loss"] == [pytest.approx(mean, rel=1e-3), pytest.approx(half, rel=1e-3), 2]
    assert arm(data, "fa")["gap"] == [pytest.approx(0.4562, rel=1e-3), pytest.approx(0.5571, rel=1e-2), 2]
    assert arm(data, "bp")["gap"] == [None, None, 0]
    assert arm(data, "frozen body")["loss"] == [3.0, None, 1]
    assert arm(data, "missing")["runs"] == [] and arm(data, "missing")["loss"] == [None, None, 0]
    assert {"bigram", "3-gram"} <= data["floors"].keys()


def test_a_run_has_curves_and_what_a_step_takes_of_each_axis(data):
    first, second = arm(data, "fa")["runs"]
    assert (first["seed"], first["device"], first["status"]) == (1, "toy", "finished")
    assert second["loss"] == 2.612  # four digits
    list_of_steps, values = second["val_loss"]
    assert data["steps"][list_of_steps] == [0, 20] and values == [4.0, 2.612]
    assert data["steps"][first["train_loss"][0]] == [10, 20]
    tokens = first["per_step"]["tokens"]
    # 5000 FLOPs a token and 1000 tokens a second, see `toy_record`; twenty steps.
    assert first["per_step"]["tflops"] == pytest.approx(tokens * 5000 / 1e12)
    assert first["per_step"]["seconds"] == pytest.approx(tokens / 1000)
    assert arm(data, "fa")["tflops"] == pytest.approx(20 * tokens * 5000 / 1e12, rel=1e-3)
    assert arm(data, "fa")["seconds"] == pytest.approx(20 * tokens / 1000, rel=1e-3)


def test_what_is_not_a_number_is_null_and_a_run_that_diverged_is_kept(data):
    _, lost = arm(data, "frozen body")["runs"]
    assert (lost["status"], lost["loss"], lost["val_loss"][1][-1]) == ("diverged", None, None)
    assert "NaN" not in json.dumps(data) and "Infinity" not in json.dumps(data)


def test_diagnostics_are_by_seed_in_total_and_means_of_the_seeds_by_place(data):
    found = arm(data, "fa")["diagnostics"]
    assert {seed: values for seed, (_, values) in found["total"].items()} == {
        "1": [0.1, None],
        "2": [0.2, None],
    }
    assert found["cosine"]["head.weight"][1] == [1.0, 0.915]
    assert found["cosine"]["blocks.0.mlp.fc.weight"][1] == [0.0, -0.1235]
    assert found["feedback"]["blocks.0.mlp.fc"][1] == [0.0, 0.5]
    assert data["steps"][found["cosine"]["head.weight"][0]] == [0, 20]
    assert arm(data, "bp")["diagnostics"] == {}


def test_an_arm_looks_as_it_does_in_a_figure_of_the_suite(data):
    assert [a["colour"] for a in data["arms"]] == [to_hex(look(i)["color"]) for i in range(4)]
    assert [bool(a["dash"]) for a in data["arms"]] == [False, True, True, True]


# ------------------------------------------------------------------------------------------ in the build


def page_with(*html: str) -> nodes.document:
    return nodes.section("", *(nodes.raw("", text, format="html") for text in html))


def test_a_page_asks_for_suites_and_loads_its_own_data():
    element = '<div class="explorer" data-suites="{}"></div>'
    assert explorer.asked(page_with(element.format("rules gpu"), element.format("gpu"))) == ["rules", "gpu"]
    assert explorer.asked(page_with("<p>an explorer</p>")) == []
    loaded = explorer.files("book/page", ["rules"])
    made = "explorer/data/book-page.js"
    assert made in loaded and all((STATIC / file).is_file() for file in loaded if file != made)


def test_the_data_of_a_page_are_its_suites():
    scripts = explorer.written(ROOT / "book", {"book/page": ["baseline"], "other": ["gates"]})
    assert [*scripts] == ["explorer/data/book-page.js", "explorer/data/other.js"]
    assert scripts["explorer/data/book-page.js"].startswith('explorer.suites = {"baseline":{')


def test_every_script_of_the_explorer_is_loaded():
    files = {f"explorer/{path.name}" for path in (STATIC / "explorer").glob("*.js")}
    assert files <= {*explorer.files("page", ["rules"])}
