"""What a ranking may say, and which learning rate a search gives."""

from dataclasses import replace
from pathlib import Path

import pytest
from toys import toy_corpus, toy_record

from localgpt_core.campaigns import Search, best_rate, read_ranking
from localgpt_core.corpus.corpus import load_corpus
from localgpt_core.experiments.suites import read_suite
from localgpt_core.records import load_records

BOOK = Path(__file__).parents[2] / "book"
HEAD = 'question = "Which?"\npreset = "tiny"\nseeds = [1, 2]\n'
MAIN = HEAD + '[arms.bp]\nmodel = { method = "bp" }\n[arms.fa]\nmodel = { method = "fa" }\n[arms.other]\n'
RATES = HEAD + "".join(
    f'[arms."{rule} {rate}"]\nmodel = {{ method = "{rule}" }}\ntrain = {{ lr = {rate} }}\n'
    for rule in ("bp", "fa")
    for rate in ("1e-3", "3e-3", "1e-2")
)


@pytest.fixture
def read(tmp_path):
    """Return a function that reads the stages of a ranking beside the suites main and rates."""
    (tmp_path / "suites").mkdir()
    (tmp_path / "suites" / "main.toml").write_text(MAIN)
    (tmp_path / "suites" / "rates.toml").write_text(RATES)

    def read(*stages):
        text = "".join(f"[[stages]]\n{stage}\n" for stage in stages)
        (tmp_path / "ranking.toml").write_text(text)
        return read_ranking(tmp_path / "ranking.toml")

    return read


def test_a_stage_is_the_part_of_a_suite_that_it_names(read):
    whole, part, timed = read(
        'suite = "main"',
        'suite = "main"\narms = ["fa", "bp"]\nseeds = [3]\ndiagnose_every = 7\nrates = "rates"',
        'suite = "main"\nbench = 4\nrates = "rates"\nrate_of = "bp"',
    )
    assert [arm.name for arm in whole.suite.arms] == ["bp", "fa", "other"]
    assert (whole.search, whole.rate_of, whole.bench) == (None, None, 0)
    assert [(arm.name, arm.seeds, arm.diagnose_every) for arm in part.suite.arms] == [
        ("fa", (3,), 7),
        ("bp", (3,), 7),
    ]
    assert part.search.suite.name == "rates" and part.rate_of is None
    assert (timed.bench, timed.rate_of, len(timed.suite.arms)) == (4, "bp", 3)


WRONG = {
    'suit = "main"': "stage 1: key='suit': allowed are arms, bench",
    'arms = ["bp"]': "stage 1: key='suite': is missing",
    "suite = 3": "stage 1: suite=3: must be the name of a suite",
    'suite = "gone"': "gone.toml cannot be read",
    'suite = "main"\narms = ["xx"]': "stage 1: arm='xx': allowed are bp, fa, other",
    'suite = "main"\narms = []': r"stage 1: arms=\[\]: must be a list",
    'suite = "main"\nseeds = [1, 1]': r"stage 1: seeds=\[1, 1\]: must not repeat",
    'suite = "main"\nbench = 0': "stage 1: bench=0",
    'suite = "main"\nrate_of = "bp"': "rate_of='bp': is of no use without rates",
    'suite = "main"\nrates = "rates"': "stage 1: rate_of='other': suite rates searches bp, fa",
    'suite = "main"\nrates = "rates"\nrate_of = "xx"': "rate_of='xx': suite rates searches bp, fa",
    'suite = "main"\nrates = "main"': "arm='bp': must end with its rate",
}


@pytest.mark.parametrize("stage", WRONG)
def test_a_wrong_stage_is_refused_by_its_number_and_value(read, stage):
    with pytest.raises(ValueError, match=WRONG[stage]):
        read(stage)


def test_a_namesake_with_other_fields_is_no_namesake(read, tmp_path):
    (tmp_path / "suites" / "main.toml").write_text(MAIN.replace('{ method = "fa" }', '{ method = "kp" }'))
    with pytest.raises(ValueError, match="arm='fa': has other fields in suite rates"):
        read('suite = "main"\narms = ["fa"]\nrates = "rates"')


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "key='stages': is missing"),
        ("stages = 3", "must be tables"),
        ("stages = []", "must be tables"),
        ("x = 1\n[[stages]]", "key='x': allowed are stages"),
    ],
)
def test_a_ranking_has_stages_and_nothing_else(tmp_path, text, message):
    (tmp_path / "ranking.toml").write_text(text)
    with pytest.raises(ValueError, match=message):
        read_ranking(tmp_path / "ranking.toml")


# Rates


@pytest.mark.parametrize(
    ("losses", "best", "words"),
    [
        ({1e-3: 2.0, 3e-3: 1.5, 1e-2: 1.7}, 3e-3, "0.001 2.0000, 0.003 1.5000, 0.01 1.7000: best 0.003"),
        ({1e-3: 2.0, 3e-3: 1.5}, 3e-3, "0.001 2.0000, 0.003 1.5000: best 0.003, at the edge of the grid"),
        ({1e-3: 2.0, 3e-3: 1.5, 1e-2: None}, 3e-3, "..., 0.01 -: best 0.003, 1 without a loss"),
        ({1e-3: None, 3e-3: 1.5, 1e-2: 1.5, 3e-2: 9.0}, 3e-3, "...: best 0.003, a tie, 1 without a loss"),
        ({1e-3: None, 3e-3: None}, None, "0.001 -, 0.003 -: none has a loss"),
    ],
)
def test_the_best_rate_has_the_lowest_loss(losses, best, words):
    found, said = best_rate(losses)
    assert found == best and said.endswith(words.removeprefix("..."))


@pytest.fixture
def searched(read):
    """Return the search, and a record of each of its runs whose final loss says rule, rate and seed."""
    (stage,) = read('suite = "main"\narms = ["bp", "fa"]\nrates = "rates"')
    start, records = {"bp": 2.0, "fa": 2.1}, {}
    for run in stage.search.suite.plan(toy_corpus()):
        loss = start[run.spec.model.method] + 10 * run.spec.train.lr + 0.25 * run.spec.seed
        record = toy_record(run.spec, final_val_loss=loss)
        records[record.digest] = replace(record, environment={**record.environment, "device_type": "cpu"})
    return stage.search, records


def losses(search, records, device="cpu"):
    return search.losses("fa", records, toy_corpus(), None, device)


def test_a_loss_is_the_mean_over_the_seeds_of_one_rule(searched):
    search, records = searched
    expected = {1e-3: 2.1 + 0.01 + 0.375, 3e-3: 2.1 + 0.03 + 0.375, 1e-2: 2.1 + 0.1 + 0.375}
    assert losses(search, records) == pytest.approx(expected)
    assert losses(search, {}) == dict.fromkeys(expected)


@pytest.mark.parametrize("change", ["diverged", "missing", "another device"])
def test_a_rate_of_which_one_run_did_not_finish_here_has_no_loss(searched, change):
    search, records = searched
    digest = next(d for d, r in records.items() if (r.arm, r.run_spec.train.lr, r.seed) == ("fa", 3e-3, 2))
    if change == "missing":
        del records[digest]
    elif change == "diverged":
        records[digest] = replace(records[digest], status="diverged", final_val_loss=None)
    else:
        records[digest] = replace(records[digest], environment={"device_type": "cuda"})
    assert losses(search, records)[3e-3] is None
    assert None not in (losses(search, records)[1e-3], losses(search, records)[1e-2])
    assert set(losses(search, records, "cuda").values()) == {None}


# The book's


def test_the_books_ranking_names_what_there_is_and_its_search_brackets_every_suites_rate():
    stages = read_ranking(BOOK / "campaign.toml")
    assert stages[0].suite.name == "gpu-rates"
    assert (stages[1].suite.name, stages[1].suite.arms[0].name) == ("gpu", "bp softmax")  # for chapter 01
    for stage in stages:
        if stage.search and stage.rate_of is None:
            for arm in stage.suite.arms:
                assert arm.train["lr"] in stage.search.arms[arm.name]
    assert any(stage.bench for stage in stages)


def test_every_record_of_the_suite_gpu_is_one_that_it_asks_for():
    suite = read_suite(BOOK / "suites" / "gpu.toml")
    planned = {run.spec.digest for run in suite.plan(load_corpus(suite.corpus))}
    records = load_records(BOOK / "records" / "gpu")
    assert len(records) >= 13 and records.keys() <= planned


def test_a_search_needs_the_rate_in_every_name(read, tmp_path):
    with pytest.raises(ValueError, match="arm='bp 1e-3': must end with its rate, here lr=0.002"):
        (tmp_path / "suites" / "rates.toml").write_text(RATES.replace("lr = 1e-3", "lr = 2e-3"))
        Search.of(read_suite(tmp_path / "suites" / "rates.toml"))
