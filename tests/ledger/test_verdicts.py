import dataclasses
import math
import sys

import pandas as pd
import pytest
from scipy.stats import t
from toys import toy_corpus, toy_curves, toy_record

from localgpt_core import load_corpus
from localgpt_core.cli import commands
from localgpt_core.experiments.claims import CRITERIA, Claim
from localgpt_core.experiments.suites import read_suite, write_suite
from localgpt_core.ledger import claim_table, decide, decisions, stated
from localgpt_core.ledger.verdicts import in_words
from localgpt_core.records import folder, read_record
from localgpt_core.report.results import book_folder, load_results

SUITE = """
question = "which?"
preset = "tiny"
seeds = [1, 2, 3, 4]
train = {{ steps = 20 }}
[arms.bp]
label = "backprop"
[arms.fa]
model = {{ method = "fa" }}
[claims.first]
says = "Feedback alignment does something."
arm = "fa"
reference = "bp"
criterion = "{criterion}"
margin = {margin}
"""
BOOK = book_folder()
# Four seeds: mean 0.1, standard deviation 0.02.
DIFFERENCES = [0.1 + 0.01 * math.sqrt(3) * sign for sign in (1, 1, -1, -1)]


@pytest.fixture
def recorded(tmp_path):
    """Return a function of a suite's text, of differences, and of seeds that diverged: its results."""
    corpus = toy_corpus()

    def results(text, differences=DIFFERENCES, diverged=()):
        path = tmp_path / "toys.toml"
        path.write_text(text)
        records = tmp_path / "records"
        records.mkdir()
        for run in read_suite(path).plan(corpus):
            seed = run.spec.seed
            if run.arm.name == "fa" and seed > len(differences):
                continue
            loss = 2.0 + (differences[seed - 1] if run.arm.name == "fa" else 0.01 * seed)
            loss += 0.01 * seed if run.arm.name == "fa" else 0
            broke = run.arm.name == "fa" and seed in diverged
            curves = {**toy_curves(run.spec), "val_step": [0, 20], "val_loss": [4.0, None if broke else loss]}
            ends = {"status": "diverged", "best_val_loss": 4.0}
            ends = ends if broke else {"final_val_loss": loss, "best_val_loss": loss}
            record = toy_record(run.spec, curves=curves, **ends)
            record.write(records)
        return load_results(path, records=records, corpus=corpus)

    return results


def test_a_difference_has_the_interval_of_its_family(recorded):
    two = SUITE + SUITE[SUITE.index("[claims.first]") :].replace("first", "second")
    decision = decide(recorded(two.format(criterion="above", margin=0.0)), "first")
    assert decision.mean == pytest.approx(0.1) and decision.n == 4
    # The level of one of two claims is 1 - 0.05 / 2.
    assert decision.half == pytest.approx(t.ppf(1 - 0.05 / 4, 3) * 0.02 / 2, rel=1e-4)


def test_a_claim_that_stands_alone_has_a_level_of_its_own(recorded):
    first = SUITE[SUITE.index("[claims.first]") :]
    three = SUITE + "alone = true\n" + first.replace("first", "second") + first.replace("first", "third")
    results = recorded(three.format(criterion="above", margin=0.0))
    halves = {name: decision.half for name, decision in decisions(results).items()}
    # 1 - 0.05 alone, 1 - 0.05 / 2 each of the other two.
    assert halves["first"] == pytest.approx(t.ppf(1 - 0.05 / 2, 3) * 0.02 / 2, rel=1e-4)
    assert halves["second"] == halves["third"] == pytest.approx(t.ppf(1 - 0.05 / 4, 3) * 0.02 / 2, rel=1e-4)


# The interval of one claim is 0.1 +- 3.182 * 0.01 = 0.068 to 0.132.
@pytest.mark.parametrize(
    ("criterion", "margin", "verdict"),
    [
        ("above", 0.0, "holds"),
        ("above", 0.06, "holds"),
        ("above", 0.07, "open"),
        ("above", 0.14, "fails"),
        ("below", 0.0, "fails"),
        ("equal", 0.06, "fails"),
        ("equal", 0.1, "open"),
        ("equal", 0.14, "holds"),
        ("within", 0.06, "fails"),
        ("within", 0.13, "open"),
        ("within", 0.14, "holds"),
    ],
)
def test_a_claim_holds_fails_or_is_open(recorded, criterion, margin, verdict):
    assert decide(recorded(SUITE.format(criterion=criterion, margin=margin)), "first").verdict == verdict


@pytest.mark.parametrize(
    ("criterion", "margin", "verdict"),
    [("below", 0.06, "holds"), ("below", 0.07, "open"), ("within", 0, "holds")],
)
def test_a_claim_about_an_arm_that_ends_below(recorded, criterion, margin, verdict):
    text = SUITE.format(criterion=criterion, margin=margin)
    assert decide(recorded(text, [-d for d in DIFFERENCES]), "first").verdict == verdict


def test_a_claim_may_be_about_a_floor_of_the_text(recorded):
    text = SUITE.format(criterion="below", margin=0).replace('reference = "bp"', 'reference = "bigram"')
    results = recorded(text)
    bigram = results.floors()["bigram"]
    decision = decide(results, "first")
    losses = [2.0 + difference + 0.01 * seed for seed, difference in enumerate(DIFFERENCES, 1)]
    assert decision.n == 4 and decision.mean == pytest.approx(sum(losses) / 4 - bigram, abs=1e-5)
    spread = pd.Series(losses).std() / 2
    assert decision.half == pytest.approx(t.ppf(0.975, 3) * spread, abs=1e-5)
    assert decision.verdict == {True: "holds", False: "fails"}[decision.mean < 0]
    answers = dataclasses.replace(results, corpus=load_corpus("recall-1"))
    with pytest.raises(ValueError, match="reference='bigram': allowed are 'guess'"):
        answers.difference("fa", "bigram")


def test_what_was_found_is_a_list_of_sentences(recorded):
    results = recorded(SUITE.format(criterion="below", margin=0.06), [-d for d in DIFFERENCES])
    said = "- Feedback alignment does something. **holds** \u22120.100 ± 0.032 (n = 4)"
    assert stated(results, "first") == said and stated(results, "first", "first") == f"{said}\n{said}"
    with pytest.raises(KeyError):
        stated(results, "second")


def test_a_record_changes_the_verdict(recorded, tmp_path):
    results = recorded(SUITE.format(criterion="equal", margin=0.14))
    assert decide(results, "first").verdict == "holds"
    digest = results.runs[results.runs["arm"] == "fa"]["digest"].iloc[0]
    results.runs.loc[results.runs["digest"] == digest, "final_val_loss"] += 1.0
    assert decide(results, "first").verdict == "open"


def test_there_is_no_verdict_before_every_pair_is_there_nor_after_a_divergence(recorded):
    some = decide(recorded(SUITE.format(criterion="above", margin=0.0), DIFFERENCES[:3]), "first")
    assert some.verdict == "not enough runs" and some.n == 3
    assert some.stated == "Feedback alignment does something. **not enough runs** (n = 3)"
    assert some.cells == "\u2013 | (n = 3) | Feedback alignment does something."


def test_a_run_that_diverged_decides_nothing(recorded):
    text = SUITE.format(criterion="above", margin=0.0)
    assert decide(recorded(text, diverged=[2]), "first").verdict == "diverged (1 of its runs)"


def test_the_table_is_for_people(recorded):
    results = recorded(SUITE.format(criterion="equal", margin=0.14))
    table = claim_table(results)
    assert decisions(results).keys() == {"first"}
    expected = {
        "verdict": ["holds"],
        "difference": ["+0.100 ± 0.032 (n = 4)"],
        "criterion": ["|d| < 0.14"],
        "claim": ["Feedback alignment does something."],
    }
    pd.testing.assert_frame_equal(table, pd.DataFrame(expected))


@pytest.fixture
def table(tmp_path, monkeypatch, capsys):
    """Return a function that runs `localgpt table` and returns its lines on stdout and on stderr."""
    monkeypatch.setattr("localgpt_core.corpus.corpus.load_corpus", lambda name: toy_corpus())

    def lines():
        words = ["localgpt", "table", str(tmp_path / "toys.toml"), "--records", str(tmp_path / "records")]
        monkeypatch.setattr(sys, "argv", words)
        with pytest.raises(SystemExit) as ended:
            commands.main()
        assert not ended.value.code
        return [text.splitlines() for text in capsys.readouterr()]

    return lines


def test_the_command_shows_each_claim_below_its_arms(recorded, table):
    recorded(SUITE.format(criterion="equal", margin=0.14))
    lines, said = table()
    assert len(lines) == 1 + 2 + 1 and not [line for line in said if line.startswith("claims")]
    assert lines[-1] == "holds  +0.100 ± 0.032 (n = 4)  |d| < 0.14  Feedback alignment does something."


def test_the_command_reads_a_record_once(recorded, table, tmp_path, monkeypatch):
    recorded(SUITE.format(criterion="equal", margin=0.14))
    (tmp_path / "records" / "damaged.json").write_text("{")
    read = []
    monkeypatch.setattr(folder, "read_record", lambda path: read.append(path) or read_record(path))
    _, said = table()
    assert sorted(read) == sorted((tmp_path / "records").glob("*.json")) and len(read) == 2 * 4 + 1
    assert len([line for line in said if "damaged.json" in line]) == 1


def test_the_command_says_which_runs_its_claims_leave_out(recorded, table, tmp_path):
    results = recorded(SUITE.format(criterion="equal", margin=0.14))
    record = next(results.of_arm("fa"))
    elsewhere = {**record.environment, "device_type": "cuda"}
    dataclasses.replace(record, environment=elsewhere).write(tmp_path / "records")
    lines, said = table()
    assert lines[-1].startswith("not enough runs")
    assert "claims: 1 runs made on another kind of device than cpu do not count" in said


def test_criteria_in_words(recorded):
    words = [in_words(Claim("", "a", "b", criterion, 0.02)) for criterion in CRITERIA]
    assert words == ["d < -0.02", "d > 0.02", "|d| < 0.02", "d < 0.02"]
    assert in_words(Claim("", "a", "b", "below")) == "d < 0"


GOOD = SUITE.format(criterion="equal", margin=0.1)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('"equal"', '"same"', "criterion='same'"),
        ("margin = 0.1", "margin = 0", "margin=0: .*criterion 'equal'"),
        ("margin = 0.1", "margin = -1", "margin=-1"),
        ("margin = 0.1", "margin = nan", "margin=nan"),
        ("margin = 0.1", "margin = true", "margin=True"),
        ('arm = "fa"', 'arm = "kp"', "arm='kp'.*bp"),
        ('reference = "bp"', 'reference = "fa"', "reference='fa': must be another arm"),
        ('reference = "bp"', 'reference = "2-gram"', "reference='2-gram'.*bigram"),
        ('says = "Feedback alignment does something."', 'says = ""', "says=''"),
        ('says = "Feedback alignment does something."', "", "key='says': is missing"),
        ("margin = 0.1", "margins = 0.1", "key='margins': allowed"),
        ("margin = 0.1", "margin = 0.1\nalone = 1", "alone=1: must be true or false"),
        ("margin = 0.1", 'margin = 0.1\nwritten = "0123ab"', "written='0123ab': the first 7 to 40"),
        ("margin = 0.1", 'margin = 0.1\nwritten = "0123abg"', "written='0123abg'"),
        ("margin = 0.1", "margin = 0.1\nwritten = 1234567", "written=1234567"),
        ("[claims.first]", "[claims]", "claims.says=.*must be a table"),
    ],
)
def test_a_claim_that_decides_nothing_is_refused(tmp_path, old, new, message):
    path = tmp_path / "toys.toml"
    path.write_text(GOOD.replace(old, new))
    with pytest.raises(ValueError, match=message):
        read_suite(path)


def test_a_suite_without_claims_has_none_and_a_written_one_leaves_them_out(tmp_path):
    path = tmp_path / "toys.toml"
    path.write_text(GOOD)
    assert read_suite(path).claims.keys() == {"first"}
    assert write_suite(read_suite(path), tmp_path / "again.toml").claims == {}


def test_every_claim_of_the_book_names_what_a_reader_can_check():
    suites = [read_suite(path) for path in sorted(BOOK.glob("suites/*.toml"))]
    for suite in suites:
        for claim in suite.claims.values():
            assert claim.says.endswith(".") and claim.margin <= 0.1
