import json
from collections import Counter
from pathlib import Path

from toys import toy_corpus, toy_curves, toy_record

from localgpt_core.experiments.suites import read_suite
from localgpt_core.ledger import broken_table, status_table
from localgpt_core.ledger.status import book_status, pages_of, status_of
from localgpt_core.report.results import book_folder, suite_results

SUITE = """
question = "which?"
preset = "tiny"
seeds = [1, 2]
train = { steps = 20 }
[arms.bp]
[arms."fa|x"]
model = { method = "fa" }
[arms.dfa]
model = { method = "dfa" }
seeds = [1]
"""


def some(tmp_path):
    """Return the results of a suite of five runs: two finished, one diverged, two are missing."""
    (tmp_path / "toys.toml").write_text(SUITE)
    suite, corpus = read_suite(tmp_path / "toys.toml"), toy_corpus()
    plan = {(run.arm.name, run.spec.seed): run.spec for run in suite.plan(corpus)}
    spec = plan["fa|x", 2]
    curves = {**toy_curves(spec), "val_step": [0, 20], "val_loss": [3.5, None]}
    records = [
        toy_record(plan["bp", 1], environment={"device": "one_a"}),
        toy_record(plan["dfa", 1], environment={"device": "other"}),
        toy_record(
            spec,
            arm="fa|x",
            status="diverged",
            curves=curves,
            best_val_loss=3.5,
            environment={"device": "one_a"},
        ),
    ]
    return suite_results(suite, {record.digest: record for record in records}, corpus)


def test_every_run_is_finished_broken_or_missing(tmp_path):
    status = status_of(some(tmp_path), [Path("chapters/05-x.ipynb"), Path("all-of-it.ipynb")])
    assert (status.planned, status.missing) == (5, 2)
    assert status.ended == Counter(finished=2, diverged=1)
    assert status.machines == Counter(one_a=2, other=1)
    assert status_table([status]).splitlines()[2:] == [
        "| `toys` | tiny | 5 | 2 | 1 | 2 | one_a, other "
        "| [05](chapters/05-x.ipynb), [all of it](all-of-it.ipynb) |"
    ]


def test_a_run_that_broke_down_stands_there_by_name(tmp_path):
    status = status_of(some(tmp_path))
    assert broken_table([status]).splitlines()[2:] == ["| `toys` | fa&#124;x | 2 | diverged | 3.500 |"]
    assert " - |" in status_table([status])


def test_without_one_there_is_no_table(tmp_path):
    (tmp_path / "toys.toml").write_text(SUITE)
    results = suite_results(read_suite(tmp_path / "toys.toml"), {}, toy_corpus())
    assert broken_table([status_of(results)]) == "" and status_of(results).missing == 5


def test_a_page_shows_the_suites_that_its_code_loads(tmp_path):
    (tmp_path / "chapters").mkdir()
    cells = [
        {
            "cell_type": "code",
            "source": ["a = load_results('one')\n", 'b = load_results(\n    "two", "gpu")'],
        },
        {"cell_type": "markdown", "source": 'load_results("three")'},
        {"cell_type": "code", "source": 'load_results(name), load_results("one")'},
    ]
    for name in ("chapters/02-b.ipynb", "a.ipynb"):
        (tmp_path / name).write_text(json.dumps({"cells": cells}))
    both = [Path("chapters/02-b.ipynb"), Path("a.ipynb")]
    assert pages_of(tmp_path) == {"one": both, "two": both}


def test_the_book_says_of_every_suite_what_is_recorded():
    found = {status.name: status for status in book_status(book_folder())}
    assert found.keys() == {path.stem for path in (book_folder() / "suites").glob("*.toml")}
    baseline, k_wta = found["baseline"], found["k-wta"]
    assert (baseline.planned, baseline.missing, baseline.preset) == (12, 0, "cpu")
    assert baseline.pages[0] == Path("chapters/01-a-gpt-made-of-local-layers.ipynb")
    assert Path("chapters/10-k-winners-take-all.ipynb") in k_wta.pages
    assert all(status.planned == status.ended.total() + status.missing for status in found.values())
