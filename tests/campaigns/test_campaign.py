"""`localgpt campaign` from an empty folder to the end: with its time over, killed, refused, carried away."""

import json
import math
import os
import signal
import subprocess
import sys
import time
import tomllib
from dataclasses import replace

import pytest
from toys import PATIENCE_S, toy_text

from localgpt_core.bench import read_rows
from localgpt_core.campaigns import Campaign, making, timing
from localgpt_core.campaigns.pace import Pace
from localgpt_core.common.validation import Refusal
from localgpt_core.corpus.corpus import load_corpus
from localgpt_core.experiments import making as runs
from localgpt_core.experiments.suites import read_suite
from localgpt_core.records import import_bundle, load_records
from localgpt_core.training import loop
from localgpt_core.training.settings import RunSettings

MADE = "made/work/records"

HEAD = """
question = "Which?"
preset = "tiny"
seeds = [1]
corpus = "CORPUS"
model = { n_layer = 1, n_head = 1, n_embd = 8, block_size = 8 }
train = { steps = STEPS, batch_size = 2, warmup = 2, eval_interval = 10 }
"""
RATES = HEAD.replace("STEPS", "10") + "".join(
    f'[arms."bp {rate}"]\nmodel = {{ method = "bp" }}\ntrain = {{ lr = {rate} }}\n'
    for rate in ("1e-3", "1e-1")
)
MAIN = HEAD + '[arms.bp]\nmodel = { method = "bp" }\n[arms.fa]\nmodel = { method = "fa" }\n'
RANKING = """
[[stages]]
suite = "rates"
[[stages]]
suite = "main"
rates = "rates"
rate_of = "bp"
[[stages]]
suite = "main"
bench = 1
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    (tmp_path / "suites").mkdir()
    (tmp_path / "toy.txt").write_text(toy_text())
    for name, text in (("rates", RATES), ("main", MAIN.replace("STEPS", "30"))):
        text = text.replace("CORPUS", str(tmp_path / "toy.txt"))
        (tmp_path / "suites" / f"{name}.toml").write_text(text)
    (tmp_path / "ranking.toml").write_text(RANKING)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def campaign(folder):
    """Return a function that gives a `Campaign` into the folder made."""

    def make(out="made", **options):
        options = dict(options)
        settings = RunSettings(threads=1, deadline=options.pop("deadline", math.inf))
        return Campaign(folder / "ranking.toml", folder / out, folder / "book", settings, **options)

    return make


def play(folder, *more, out="made"):
    command = [sys.executable, "-m", "localgpt_core", "campaign", "ranking.toml", "--out", out]
    return subprocess.Popen(
        [*command, "--records", "book", *more],
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def bundle(folder, out="made"):
    path = folder / out / "campaign.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def quiet(text):
    pass


def same(records):
    """Return what is the same however often the runs were cut."""
    return {digest: (r.arm, r.status, r.curves, r.final_val_loss) for digest, r in records.items()}


# The whole command


def test_a_campaign_out_of_time_and_killed_loses_nothing_and_ends_complete(folder):
    process = play(folder, "--time-budget", "0.001")
    out, _ = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 3 and out == "campaign: not complete; start it again to go on\n"
    assert bundle(folder) == []

    process = play(folder)
    end = time.monotonic() + PATIENCE_S
    while not bundle(folder) and process.poll() is None:
        assert time.monotonic() < end
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    kept = bundle(folder)
    assert kept

    process = play(folder, "--jobs", "2", "--time-budget", "500")
    out, err = process.communicate(timeout=PATIENCE_S)
    assert (process.returncode, out) == (0, "campaign: complete\n"), err
    found = bundle(folder)
    assert len(found) == 4 and all(record in found for record in kept)
    rows, measured_on = read_rows(folder / "made" / "bench-tiny.json")
    assert [*rows] == ["bp", "fa"] and measured_on["device_type"] == "cpu"
    assert {path.name for path in (folder / "made").iterdir() if path.is_file()} == {
        "campaign.jsonl",
        "bench-tiny.json",
        "rates.toml",
    }
    import_bundle(folder / "made" / "campaign.jsonl", folder / "elsewhere")
    assert load_records(folder / "elsewhere") == load_records(folder / MADE, pytest.fail)
    assert sorted(path.name for path in (folder / "elsewhere").iterdir()) == ["main", "rates"]

    process = play(folder, "--records", "elsewhere", out="again")
    out, err = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 0 and "0 runs to make" in err and bundle(folder, "again") == []


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--jobs", "two"], "jobs='two': must be a number or auto"),
        (["--jobs", "0"], "jobs=0"),
        (["--time-budget", "-1"], "time_budget=-1.0: must be positive"),
        (["--preset", "huge"], "preset='huge'"),
        (["--device", "tpu"], "device='tpu'"),
    ],
)
def test_a_wrong_option_is_refused_before_anything_is_made(folder, options, words):
    process = play(folder, *options)
    out, err = process.communicate(timeout=PATIENCE_S)
    assert (process.returncode, out) == (2, "") and words in err and len(err.splitlines()) == 1
    assert not (folder / "made").exists()


# Rates


def test_a_later_stage_has_the_best_rate_of_the_search_and_the_lines_are_written_down(campaign, folder):
    said = []
    assert campaign().make(1, said.append) == "complete"
    search = {
        r.run_spec.train.lr: r.final_val_loss for r in load_records(MADE).values() if r.suite == "rates"
    }
    best = min(search, key=search.get)
    main = [record for record in load_records(MADE).values() if record.suite == "main"]
    assert {record.run_spec.train.lr for record in main} == {best} and best != 1e-3
    lines = tomllib.loads((folder / "made" / "rates.toml").read_text())
    assert {arm: lines["arms"][arm]["train"]["lr"] for arm in lines["arms"]} == {"bp": best, "fa": best}
    assert f"fa: lr {best:g}; rates, bp: 0.001 {search[1e-3]:.4f}" in "\n".join(said)
    # Copied into the suite, the lines ask for the runs that were made.
    suite = read_suite(folder / "suites" / "main.toml")
    copied = replace(suite, arms=tuple(replace(arm, **lines["arms"][arm.name]) for arm in suite.arms))
    planned = {run.spec.digest for run in copied.plan(load_corpus(suite.corpus))}
    assert planned == {record.digest for record in main}


def test_without_a_record_of_the_search_an_arm_keeps_its_own_rate(campaign, folder):
    (folder / "ranking.toml").write_text('[[stages]]\nsuite = "main"\nrates = "rates"\nrate_of = "bp"\n')
    assert campaign().make(1, quiet) == "complete"
    assert {record.run_spec.train.lr for record in load_records(MADE).values()} == {1e-3}
    assert "none has a loss" in (folder / "made" / "rates.toml").read_text()
    assert "arms" not in tomllib.loads((folder / "made" / "rates.toml").read_text())


# Time


def test_a_run_that_is_cut_goes_on_where_it_stopped(campaign, folder, monkeypatch):
    assert campaign("whole").make(1, quiet) == "complete"
    monkeypatch.setattr(making.Campaign, "_fits", lambda self, run, left_s: True)
    past = campaign(deadline=time.monotonic() - 1)
    assert past.make(1, quiet) == "out_of_time"
    assert [path.suffix for path in (folder / "made/work/records/.unfinished").iterdir()] == [".safetensors"]
    assert bundle(folder) == [] and not (folder / "made/bench-tiny.json").exists()
    said = []
    assert campaign().make(1, said.append) == "complete"
    assert same(load_records(MADE, pytest.fail)) == same(load_records("whole/work/records"))


@pytest.mark.parametrize(
    ("whole", "left_s", "fits"),
    [(False, 7.5, True), (False, 6.5, False), (True, 30.0, True), (True, 13.0, True), (True, 12.0, False)],
)
def test_a_run_fits_if_it_can_begin_or_be_whole(campaign, whole, left_s, fits):
    """A start of 7 s, and 30 steps at 2 / 16 s each by the measured pace of two: 12.6 s with the margin."""
    one = campaign(whole=whole)
    one.jobs, one.pace = 2, Pace("toy", "tiny", (10.0, 16.0), 7.0)
    (run, _) = one.stages[1].suite.plan(load_corpus("toy.txt"))
    assert making.MARGIN * 30 * 2 / 16 == 5.625
    assert one._fits(run, left_s) == fits


def test_what_does_not_fit_is_left_out_and_shorter_runs_are_made(campaign, folder, monkeypatch):
    monkeypatch.setattr(making.Campaign, "_fits", lambda self, run, left_s: run.arm.name != "bp")
    said, one = [], campaign(whole=True)
    one.pace = Pace("toy", "tiny", (10.0,), 1.0)
    assert one.make(1, said.append) == "out_of_time"
    assert sorted(record["arm"] for record in bundle(folder)) == ["bp 1e-1", "bp 1e-3", "fa"]
    assert any("1 runs not started" in line for line in said)


# Side by side


def test_the_number_of_runs_is_measured_once_and_kept(campaign, folder, monkeypatch):
    asked = []

    class Fake:
        def __init__(self, most, spec, corpus, device, threads):
            asked.append((most, spec.train.steps, device, threads))

        def __enter__(self):
            return lambda number: [10.0, 15.0, 5.0][number - 1]

        def __exit__(self, *error):
            pass

    monkeypatch.setattr(making, "steppers", Fake)
    monkeypatch.setattr(making.SuiteRun, "make", lambda self, jobs, say: asked.append(jobs) or "complete")
    monkeypatch.setattr(making, "time_arms", lambda *ignored: "complete")
    said = []
    assert campaign().make(None, said.append) == "complete"
    assert asked == [(3, 10, "cpu", 1), 2, 2]
    assert "10.0 with 1, 15.0 with 2, 5.0 with 3 processes; 2 at a time" in said[0]
    assert campaign().make(None, quiet) == "complete" and asked[3:] == [2, 2]
    assert campaign().make(3, quiet) == "complete" and asked[5:] == [3, 3]


def test_where_nothing_is_missing_nothing_is_measured(campaign, monkeypatch):
    assert campaign().make(1, quiet) == "complete"
    monkeypatch.setattr(making, "steppers", None)
    assert campaign().make(None, quiet) == "complete"


# What fails


def test_a_run_that_is_refused_is_named_and_the_others_are_made(campaign, folder, monkeypatch):
    original = loop.check_corpus

    def refusing(model, train, corpus):
        if (model.method, train.steps) == ("bp", 30):
            raise Refusal("compile=True: gives another gradient")
        original(model, train, corpus)

    monkeypatch.setattr(loop, "check_corpus", refusing)
    said = []
    assert campaign().make(1, said.append) == "failed"
    assert sorted(record["arm"] for record in bundle(folder)) == ["bp 1e-1", "bp 1e-3", "fa"]
    assert said[-1].startswith("refused or broken down: bp seed 1 [")
    assert [*read_rows(folder / "made/bench-tiny.json")[0]] == ["bp", "fa"]


def test_arms_that_are_too_large_for_another_preset_are_left_out(campaign, folder):
    text = (folder / "suites/main.toml").read_text().replace("n_embd = 8, ", "")
    text += '[arms.wide]\nmodel = { method = "bp", resid_topk = 100 }\n'
    (folder / "suites/main.toml").write_text(text.replace('preset = "tiny"', 'preset = "cpu"'))
    said = []
    assert campaign(preset="tiny").make(1, said.append) == "complete"
    assert any("left out at preset tiny: suite" in line and "resid_topk=100" in line for line in said)
    assert {record["arm"] for record in bundle(folder) if record["suite"] == "main"} == {"bp", "fa"}
    with pytest.raises(ValueError, match="arm 'wide': .*resid_topk=100"):
        (folder / "suites/main.toml").write_text(text)
        campaign("other").make(1, quiet)
    assert not (folder / "other").exists()


def test_a_bundle_alone_is_enough_to_go_on(campaign, folder):
    assert campaign().make(1, quiet) == "complete"
    (folder / "other").mkdir()
    lines = (folder / "made/campaign.jsonl").read_text().splitlines(keepends=True)
    (folder / "other/campaign.jsonl").write_text("".join(lines[:3]))
    said = []
    assert campaign("other").make(1, said.append) == "complete"
    assert sum(": finished, " in line for line in said) == 1 and len(bundle(folder, "other")) == 4


def test_the_bundle_is_written_after_every_run(campaign, folder, monkeypatch):
    counts = []
    original = making.Campaign.write_bundle

    def counted(self):
        original(self)
        counts.append(len(bundle(folder)))

    monkeypatch.setattr(making.Campaign, "write_bundle", counted)
    campaign().make(1, quiet)
    assert counts == [0, 1, 2, 3, 4, 4]


def test_ctrl_c_ends_a_campaign_with_its_bundle(campaign, folder, monkeypatch):
    monkeypatch.setattr(runs.RunMaker, "one", lambda self, run, say: "interrupted")
    assert campaign().make(1, quiet) == "interrupted" and not (folder / "made/bench-tiny.json").exists()


# Steps


def test_arms_that_are_timed_are_kept_one_by_one(folder, monkeypatch):
    suite, path = read_suite(folder / "suites/main.toml"), folder / "rows.json"
    measured, original = [], timing.measure

    def one(preset, device, pairs, say, part):
        measured.append([arm.name for arm in part.arms])
        return original(preset, device, pairs, say, part)

    def again(deadline=math.inf, least_s=0.0, said=quiet):
        return timing.time_arms(suite, "tiny", "cpu", 1, path, deadline, said, least_s)

    monkeypatch.setattr(timing, "measure", one)
    assert again(time.monotonic() + 1000, 2000) == "out_of_time" and measured == [] and not path.exists()
    assert again() == "complete" and measured == [["bp"], ["fa"]] and [*read_rows(path)[0]] == ["bp", "fa"]
    assert again() == "complete" and len(measured) == 2
    path.write_text(path.read_text().replace('"device": "', '"device": "another '))
    said = []
    assert again(said=said.append) == "failed" and "was measured on another" in said[0]


def test_an_arm_that_cannot_be_timed_is_named_and_the_rest_goes_on(folder, monkeypatch):
    suite, path, original = read_suite(folder / "suites/main.toml"), folder / "rows.json", timing.measure

    def failing(preset, device, pairs, say, part):
        if part.arms[0].name == "bp":
            raise RuntimeError("out of memory\nand more")
        return original(preset, device, pairs, say, part)

    monkeypatch.setattr(timing, "measure", failing)
    said = []
    assert timing.time_arms(suite, "tiny", "cpu", 1, path, math.inf, said.append) == "failed"
    assert said[0] == "bp: not measured (RuntimeError: out of memory)" and [*read_rows(path)[0]] == ["fa"]
