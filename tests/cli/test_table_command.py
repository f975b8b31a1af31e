"""What `localgpt table` prints, and how `localgpt verify` finds a run's own text."""

import csv
import io
import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
from toys import TOY_SIZES, TOY_SUITE, toy_record, toy_spec

from localgpt_core.records import load_records, read_record

pytestmark = pytest.mark.needs("pandas")

ONE_ARM = TOY_SUITE.partition("[arms.frozen]")[0]
FLOORS = r"floors of toy: uniform \d\.\d{3}, unigram \d\.\d{3}, bigram \d\.\d{3}, 3-gram .*\n"


def train(cli, *options):
    sizes = [*TOY_SIZES, "--steps", "2", "--eval-interval", "2"]
    assert cli("train", "--corpus", "toy.txt", *sizes, *options)[0] == 0


def test_own_runs_are_a_list_with_what_differs_and_the_floors(cli):
    for options in (["--seed", "1"], ["--seed", "2"], ["--method", "fa", "--lr", "0.01"]):
        train(cli, *options)
    status, out, err = cli("table", "--records", "runs")
    lines = out.splitlines()
    assert status == 0 and len(lines) == 3 and lines[0].split()[:2] == ["run", "n"]
    assert lines[1].split()[0] == "bp" and "1 2" in lines[1] and "lr=0.001" in lines[1]
    assert lines[2].split()[0] == "fa" and "lr=0.01" in lines[2]
    assert re.fullmatch(FLOORS, err)


def test_numbers_are_csv_or_json_for_other_programs(cli):
    train(cli, "--seed", "1")
    (record,) = load_records("runs").values()
    status, out, _ = cli("table", "--records", "runs", "--json")
    (row,) = json.loads(out)
    assert status == 0 and row["final_val_loss"] == record.final_val_loss and row["half_width"] is None
    assert row["seeds"] == "1" and row["floor_bigram"] > 1
    (same,) = csv.DictReader(io.StringIO(cli("table", "--records", "runs", "--csv")[1]))
    assert same.keys() == row.keys() and float(same["final_val_loss"]) == record.final_val_loss
    status, out, err = cli("table", "--records", "runs", "--csv", "--json")
    assert (status, out) == (2, "") and "csv=True: or json, not both" in err


def test_runs_that_another_suite_recorded_count_and_are_said(cli):
    Path("suite.toml").write_text(ONE_ARM)
    Path("other.toml").write_text(ONE_ARM + '[arms.fa]\nmodel = { method = "fa" }\n')
    assert cli("run", "suite.toml")[0] == 0 and cli("run", "other.toml")[0] == 0
    status, out, err = cli("table", "other.toml")
    assert status == 0 and re.fullmatch("1 of 2 runs were recorded by suite\n" + FLOORS, err)
    assert [line.split()[:2] for line in out.splitlines()[1:3]] == [["bp", "1"], ["fa", "1"]]
    rows = json.loads(cli("table", "other.toml", "--json")[1])
    assert [(row["arm"], row["n"]) for row in rows] == [("bp", 1), ("fa", 1)]
    assert re.fullmatch(FLOORS, cli("table", "suite.toml")[2])


def test_every_row_names_the_kind_of_its_device_and_what_is_missing_is_said(cli):
    assert cli("run", "suite.toml")[0] == 0
    (path,) = (path for path in Path("book/records").rglob("*.json") if read_record(path).arm == "bp")
    own = read_record(path)
    replace(own, environment={**own.environment, "device_type": "cuda"}).write(path.parent)
    text = Path("suite.toml").read_text()
    Path("suite.toml").write_text(text.replace("seeds = [1]", "seeds = [1, 2]"))
    status, out, err = cli("table", "suite.toml")
    assert status == 0 and [line.split()[-1] for line in out.splitlines()] == ["device", "cuda", "cpu"]
    assert err.startswith("2 runs are not recorded: bp seed 2, frozen seed 2\n")
    rows = json.loads(cli("table", "suite.toml", "--json")[1])
    assert [(row["arm"], row["device"]) for row in rows] == [("bp", "cuda"), ("frozen", "cpu")]
    rows = json.loads(cli("table", "--json")[1])
    assert {row["arm"]: row["device"] for row in rows} == {"bp": "cuda", "frozen": "cpu"}


def test_a_text_that_is_not_here_costs_the_floors_only(cli):
    toy_record(toy_spec(), suite="").write("runs")
    status, out, err = cli("table", "--records", "runs")
    assert (status, err, len(out.splitlines())) == (0, "", 2)


def test_verify_finds_the_text_of_a_run_by_its_digest(cli, tmp_path, monkeypatch):
    train(cli)
    (digest,) = load_records("runs")
    records = ["--records", tmp_path / "runs"]
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    status, out, err = cli("verify", digest, *records)
    assert status == 0 and out.startswith("agrees (same machine"), err
    (tmp_path / "toy.txt").rename(tmp_path / "gone.txt")
    status, out, err = cli("verify", digest, *records)
    assert status == 2 and "corpus='toy': the text of this run was not loaded here before" in err
    assert "--corpus FILE" in err and len(err.splitlines()) == 1
    assert cli("verify", digest, *records, "--corpus", tmp_path / "gone.txt")[0] == 0


def test_verify_repeats_the_diagnostics(cli):
    train(cli, "--diagnose-every", "1", "--method", "fa")
    (path,) = Path("runs").glob("*.json")
    assert cli("verify", path.stem, "--records", "runs")[0] == 0
    values = json.loads(path.read_text())
    values["diagnostics"]["total_cosine"][1] *= 0.99
    del values["sha256"]
    path.write_text(json.dumps(values))
    status, out, _ = cli("verify", path.stem, "--records", "runs")
    assert status == 1 and "diagnostics.total_cosine[1] recorded" in out


def test_a_number_that_is_changed_by_hand_is_in_no_table(cli):
    train(cli)
    (path,) = Path("runs").glob("*.json")
    values = json.loads(path.read_text())
    path.write_text(json.dumps(values | {"final_val_loss": values["final_val_loss"] - 0.5}))
    status, out, err = cli("table", "--records", "runs")
    assert (status, out) == (2, "")
    assert f"record {path} is refused: final_val_loss=" in err and "the last of its curve is" in err
