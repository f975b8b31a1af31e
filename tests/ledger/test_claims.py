"""The ledger of a book: a record decides a claim, its page's number and the command's exit status."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest
from toys import toy_corpus, toy_curves, toy_record

from localgpt_core.cli import commands
from localgpt_core.evidence import Noise
from localgpt_core.experiments.suites import read_suite
from localgpt_core.ledger import book_claims, claims_page, decide, misstated, sources
from localgpt_core.records import load_records
from localgpt_core.report.results import book_folder

SUITE = """
question = "which?"
preset = "tiny"
seeds = [1, 2, 3]
train = { steps = 20 }
[arms.bp]
[arms.fa]
model = { method = "fa" }
[arms.kp]
model = { method = "kp" }
[claims.above]
says = "Feedback alignment ends above."
arm = "fa"
reference = "bp"
criterion = "above"
alone = true
written = "0123abc"
[claims.equal]
says = "Kolen-Pollack ends there."
arm = "kp"
reference = "bp"
criterion = "equal"
margin = 0.5
"""
ENDS = {"bp": [2.0, 2.1, 2.2], "fa": [2.19, 2.3, 2.41], "kp": [2.0, 2.1]}
STATED = "Feedback alignment ends above. **holds** +0.200 ± 0.025 (n = 3)"  # 4.303 * 0.01 / sqrt(3) = 0.0248
BOOK = book_folder()


def page(*outputs):
    """Return a notebook that loads the toy suite in a cell and has these outputs."""
    cell = {"cell_type": "code", "source": ['results = load_results("toys")'], "outputs": [*outputs]}
    return json.dumps({"cells": [{"cell_type": "markdown", "source": ["Some words."]}, cell]})


def shown(text, kind="text/markdown"):
    return {"output_type": "display_data", "data": {kind: text.splitlines(keepends=True)}}


@pytest.fixture
def book(tmp_path, monkeypatch):
    """Return a book of one suite, its records, and a page that states what they say."""
    monkeypatch.setattr(sources, "load_corpus", lambda name: toy_corpus())
    for folder in ("suites", "records", "chapters"):
        (tmp_path / folder).mkdir()
    (tmp_path / "suites/toys.toml").write_text(SUITE)
    for run in read_suite(tmp_path / "suites/toys.toml").plan(toy_corpus()):
        losses = ENDS[run.arm.name]
        if run.spec.seed <= len(losses):
            record_of(run.spec, losses[run.spec.seed - 1]).write(tmp_path / "records")
    (tmp_path / "chapters/03-toys.ipynb").write_text(page(shown(f"- {STATED}.\n- More.")))
    return tmp_path


def record_of(spec, loss):
    curves = {**toy_curves(spec), "val_step": [0, 20], "val_loss": [4.0, loss]}
    return toy_record(spec, curves=curves, final_val_loss=loss, best_val_loss=loss)


def change_one(book):
    """Let FA with seed 2 end half a nat lower: the differences are 0.19, -0.3 and 0.21 then."""
    records = load_records(book / "records").values()
    (record,) = (r for r in records if (r.run_spec.model.method, r.seed) == ("fa", 2))
    (book / "records" / f"{record.digest}.json").unlink()
    record_of(record.run_spec, record.final_val_loss - 0.5).write(book / "records")


def command(*words, monkeypatch, capsys):
    """Return exit status, stdout and stderr of `localgpt claims`."""
    monkeypatch.setattr(sys, "argv", ["localgpt", "claims", *map(str, words)])
    with pytest.raises(SystemExit) as ended:
        commands.main()
    return ended.value.code or 0, *capsys.readouterr()


def test_every_claim_stands_there_with_its_page_and_what_decides_it(book):
    first, second = book_claims(book)
    assert (first.id, second.id) == ("toys/above", "toys/equal")
    assert first.pages == second.pages == (Path("chapters/03-toys.ipynb"),)
    assert (first.decision.stated, first.level) == (STATED, 0.95)
    # Of the claims that do not stand alone it is the only one.
    assert second.level == 0.95 and second.decision.verdict == "not enough runs"


def test_a_page_that_says_what_the_records_say_is_right(book):
    assert misstated(book, book_claims(book)) == []


@pytest.mark.parametrize(
    "said",
    [
        STATED.replace("holds", "fails"),
        STATED.replace("0.200", "0.201"),
        STATED.replace("0.025", "0.024"),
        STATED.replace("n = 3", "n = 2"),
        "Feedback alignment ends above. Yes.",
        f"{STATED} Again: Feedback alignment ends above.",
    ],
)
@pytest.mark.parametrize("form", [shown, lambda text: {"output_type": "stream", "text": [text]}])
def test_a_page_that_says_it_otherwise_is_named(book, said, form):
    (book / "chapters/03-toys.ipynb").write_text(page(shown("Nothing."), form(said)))
    (line,) = misstated(book, book_claims(book))
    assert line == f"chapters/03-toys.ipynb: claim toys/above: the records say: {STATED}"


def test_a_table_may_state_a_claim_verdict_first(book):
    rows = claims_page(book_claims(book))
    (book / "chapters/03-toys.ipynb").write_text(page(shown(rows)))
    assert misstated(book, book_claims(book)) == []
    change_one(book)
    assert len(misstated(book, book_claims(book))) == 1


def test_a_record_changes_claim_number_and_exit_status(book, monkeypatch, capsys):
    both = {"monkeypatch": monkeypatch, "capsys": capsys}
    status, out, said = command(book, **both)
    assert (status, said) == (0, "")
    assert out.splitlines()[0] == "toys/above: Feedback alignment ends above. holds +0.200 ± 0.025 (n = 3)"
    change_one(book)
    status, out, said = command(book, **both)
    now = "Feedback alignment ends above. {}open{} +0.033 ± 0.718 (n = 3)"
    assert status == 1 and out.splitlines()[0] == f"toys/above: {now.format('', '')}"
    assert said == (f"chapters/03-toys.ipynb: claim toys/above: the records say: {now.format('**', '**')}\n")


def test_the_command_prints_rows_for_programs(book, monkeypatch, capsys):
    status, out, _ = command(book, "--json", monkeypatch=monkeypatch, capsys=capsys)
    first, second = json.loads(out)
    assert status == 0 and first.pop("difference") == pytest.approx(0.2)
    assert first.pop("half_width") == pytest.approx(4.302653 * 0.01 / 3**0.5)
    assert first == {
        "id": "toys/above",
        "pages": ["chapters/03-toys.ipynb"],
        "says": "Feedback alignment ends above.",
        "arm": "fa",
        "reference": "bp",
        "criterion": "d > 0",
        "written": "0123abc",
        "n": 3,
        "level": 0.95,
        "verdict": "holds",
    }
    assert (second["n"], second["written"]) == (2, None)


def test_a_claim_without_runs_has_no_numbers(book, monkeypatch, capsys):
    for path in (book / "records").glob("*.json"):
        path.unlink()
    _, out, _ = command(book, "--json", monkeypatch=monkeypatch, capsys=capsys)
    assert [(row["n"], row["difference"], row["half_width"]) for row in json.loads(out)] == [
        (0, None, None)
    ] * 2


def test_other_records_and_a_folder_that_is_no_book(book, monkeypatch, capsys):
    (book / "empty").mkdir()
    both = {"monkeypatch": monkeypatch, "capsys": capsys}
    status, out, _ = command(book, "--records", book / "empty", **both)
    assert status == 1 and "ends above. not enough runs (n = 0)" in out
    status, _, said = command(book / "empty", **both)
    assert status == 2 and "has no folder suites" in said


def test_the_page_has_a_row_for_every_claim(book):
    rows = claims_page(book_claims(book)).splitlines()
    assert len(rows) == 4
    link = "[03](chapters/03-toys.ipynb)"
    stated = "| **holds** | +0.200\u00a0±\u00a00.025 (n = 3) | Feedback alignment ends above. |"
    assert rows[2] == f"{stated} d &#62; 0 | 95.0 | `0123abc` | `toys` | {link} |"


@pytest.mark.parametrize(("floor", "verdict"), [(0.19, "holds"), (0.21, "open")])
def test_a_difference_inside_what_rounding_does_is_open(book, floor, verdict):
    (results,) = sources.book_results(book)
    noise = Noise(spread=floor * 3**0.5 / 1.959964, pairs=10**9)  # floor(3) is floor
    assert decide(dataclasses.replace(results, noise=noise), "above").verdict == verdict


def test_the_pages_of_the_book_state_what_its_records_say():
    claims = book_claims(BOOK)
    assert len(claims) > 40 and misstated(BOOK, claims) == []
    assert len({claim.decision.claim.says for claim in claims}) == len(claims)


def test_each_claim_of_the_book_names_a_commit_that_is_older_than_now():
    commits = {claim.decision.claim.written for claim in book_claims(BOOK)}
    git = ["git", "-C", str(BOOK), "rev-parse", "--is-shallow-repository"]
    asked = subprocess.run(git, capture_output=True, text=True, check=False)
    if asked.stdout.strip() != "false":
        pytest.skip("the history of the repository is not here")
    for commit in commits:
        known = ["git", "-C", str(BOOK), "merge-base", "--is-ancestor", commit, "HEAD"]
        assert subprocess.run(known, check=False).returncode == 0, commit
