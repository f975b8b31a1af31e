"""All records as a list of runs, for people and for code."""

import dataclasses
import math

import numpy as np
import pytest
from toys import toy_corpus, toy_record, toy_spec, toy_text, toy_train

from localgpt_core.corpus.corpus import load_corpus
from localgpt_core.corpus.ngrams import floors
from localgpt_core.report.runs import cheap_floors, run_frame, run_table, with_floors
from localgpt_core.report.tables import arm_frame, arm_table, interval


def own(seed=1, train=None, **model):
    """Return a record as `localgpt train` leaves it."""
    spec = toy_spec(seed, **model)
    if train:
        spec = dataclasses.replace(spec, train=toy_train(seed=seed, **train))
    return toy_record(spec, suite="", arm=spec.model.method, preset="cpu", final_val_loss=2.0 + seed / 10)


@pytest.fixture
def records():
    found = [own(1), own(2), own(1, {"lr": 3e-3}), own(1, {"lr": 3e-3}, method="fa")]
    found.append(own(2, {"lr": 3e-3}, method="fa"))
    return {record.digest: record for record in found}


def test_seeds_of_one_spec_are_one_row_with_the_fields_that_differ(records):
    frame = run_frame(records)
    assert frame["arm"].tolist() == ["bp", "bp", "fa"]
    assert frame["lr"].tolist() == [1e-3, 3e-3, 3e-3]
    assert frame["seeds"].tolist() == ["1 2", "1", "1 2"]
    assert frame["n"].tolist() == [2, 1, 2]
    assert frame["final_val_loss"].tolist() == pytest.approx([2.15, 2.1, 2.15])
    assert frame["half_width"][0] == pytest.approx(interval([2.1, 2.2])[1])
    assert math.isnan(frame["half_width"][1])
    assert frame["settings"].tolist() == ["lr=0.001", "lr=0.003", "lr=0.003"]
    # What all runs share, and what the name of the rule says already, is no column.
    assert not {"n_embd", "method", "steps", "seed"} & {*frame.columns}


def test_the_list_for_people_is_the_same_rounded(records):
    shown = run_table(run_frame(records))
    assert shown["run"].tolist() == ["bp", "bp", "fa"]
    assert shown["final loss"].tolist() == ["2.150", "2.100", "2.150"]
    assert shown["95 % ±"].tolist()[1] == "-"
    assert shown["settings"].tolist() == ["lr=0.001", "lr=0.003", "lr=0.003"]
    alone = run_table(run_frame({"a": own(1)}))
    assert "settings" not in alone and alone["seeds"].tolist() == ["1"]


def test_runs_of_suites_are_compared_with_their_namesakes(records):
    suite = [toy_record(toy_spec(1, method="dfa"), suite="s", arm="one")]
    suite.append(toy_record(toy_spec(1, method="dfa", n_embd=16), suite="s", arm="other"))
    frame = run_frame(records | {record.digest: record for record in suite})
    assert frame.query("suite == 's'")["settings"].tolist() == ["", ""]
    assert run_table(frame)["run"].tolist() == ["bp", "bp", "fa", "s/one", "s/other"]


def test_every_run_is_in_one_row(records):
    lost = toy_record(toy_spec(9), suite="", arm="bp", preset="cpu", status="diverged", best_val_loss=2.0)
    lost = dataclasses.replace(lost, curves={**lost.curves, "val_loss": [2.0] * 4 + [None]})
    frame = run_frame(records | {lost.digest: lost})
    assert frame["n"].sum() == 5 and frame["not_finished"].sum() == 1
    assert sum(len(seeds.split()) for seeds in frame["seeds"]) == 6


def test_floors_stand_beside_the_losses_of_texts_that_are_here(records, tmp_path, monkeypatch):
    monkeypatch.setenv("LOCALGPT_CACHE", str(tmp_path / "cache"))
    assert cheap_floors(records) == {}
    frame = with_floors(run_frame(records), {})
    assert not [name for name in frame if name.startswith("floor")]
    (tmp_path / "toy.txt").write_text(toy_text())
    load_corpus(str(tmp_path / "toy.txt"))
    by_text = cheap_floors(records)
    assert by_text == {toy_corpus().sha256: ("toy", floors(toy_corpus()))}
    frame = with_floors(run_frame(records), by_text)
    assert frame["floor_bigram"].tolist() == [floors(toy_corpus())["bigram"]] * 3
    other = with_floors(frame.assign(corpus_sha256="0" * 64), by_text)
    assert other["floor_bigram"].isna().all()


def test_a_frame_has_numbers_and_a_table_their_text():
    from localgpt_core.report.tables import all_runs

    record = toy_record()
    runs = all_runs({record.digest: record})
    frame = arm_frame(runs)
    assert frame.dtypes[["final_val_loss", "half_width", "best_val_loss", "tflops"]].eq(np.float64).all()
    assert frame.loc[0, "final_val_loss"] == 2.5 and math.isnan(frame.loc[0, "half_width"])
    assert arm_table(runs).loc[0, ["final loss", "95 % ±"]].tolist() == ["2.500", "-"]
    assert arm_frame(runs[:0]).empty and [*arm_frame(runs[:0])] == [*frame]
