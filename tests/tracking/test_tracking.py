"""What trackers are told of a run, that the run is the same, and that it goes on without them."""

import os
import re
import subprocess
import sys
import time
import types
from dataclasses import replace

import numpy as np
import pytest
from toys import TOY_SIZES, TOY_SUITE, interrupt_after, toy_corpus, toy_model, toy_spec, toy_text, toy_train

from localgpt_core.cli import commands
from localgpt_core.corpus.corpus import Corpus
from localgpt_core.corpus.sequences import Sequences
from localgpt_core.experiments.execution import execute
from localgpt_core.records import load_records
from localgpt_core.tracking import Guarded, TrackedRun, tracker_of
from localgpt_core.training.loop import train
from localgpt_core.training.settings import RunSettings

TOY = ["--corpus", "toy.txt", *TOY_SIZES, "--steps", "6", "--eval-interval", "3"]


class Notes:
    """A tracker that keeps what it is told, and fails at the calls named in ``fails``."""

    def __init__(self, *fails):
        self.fails, self.told = fails, []

    def _note(self, call, *words):
        self.told.append((call, *words))
        if call in self.fails:
            raise ConnectionError("no network")

    def start(self, run):
        self._note("start", run)

    def log(self, step, values):
        self._note("log", step, values)

    def finish(self, status):
        self._note("finish", status)

    def calls(self):
        return [call for call, *_ in self.told]

    def curve(self, name):
        """Return steps and values of everything that was logged under a name."""
        logged = [words for call, *words in self.told if call == "log"]
        return [(step, values[name]) for step, values in logged if name in values]


def curve(curves, name):
    return list(zip(curves["val_step" if name.startswith("val") else "step"], curves[name], strict=True))


def made(spec=None, tracker=None, **fields):
    return execute(spec or toy_spec(), toy_corpus(), tracker=tracker, **fields)


# What is told


def test_a_tracker_is_told_what_the_record_has():
    notes = Notes()
    record, result = made(tracker=notes, diagnose_every=10, suite="toys", arm="one", preset="tiny")
    (_, run), *_, (_, status) = notes.told
    assert notes.calls() == ["start", *["log"] * (len(notes.told) - 2), "finish"] and status == "finished"
    for name in ("train_loss", "lr", "val_loss"):
        assert notes.curve(name) == curve(result.curves, name)
    assert notes.curve("total_cosine") == list(
        zip(result.diagnostics["step"], result.diagnostics["total_cosine"], strict=True)
    )
    cosine = result.diagnostics["cosine"]["head.weight"]
    assert [value for _, value in notes.curve("cosine/head.weight")] == cosine
    rms = result.diagnostics["rule_rms"]
    assert [value for _, value in notes.curve("rule_rms/blocks.0")] == [values[0] for values in rms]
    rates = [rate for _, rate in notes.curve("tokens_per_s")]
    steps = np.diff([0, *result.curves["step"]])
    # The mean rate of the whole run, of the rates between the points.
    seconds = sum(step * 3 * 7 / rate for step, rate in zip(steps, rates, strict=True))
    assert result.tokens_per_s == pytest.approx(20 * 3 * 7 / seconds)
    assert run == TrackedRun(f"one seed 1 {record.digest}", record.digest, run.config)
    assert (run.config["method"], run.config["steps"], run.config["seed"]) == ("bp", 20, 1)
    assert (run.config["suite"], run.config["arm"], run.config["preset"]) == ("toys", "one", "tiny")
    assert run.config["digest"] == record.digest


def test_of_answers_the_accuracy_is_told():
    corpus = Corpus("twos", "abaacbab" * 40, "abc", Sequences(period=4, answers=(3,), chance=0.5, guess=0.7))
    notes = Notes()
    model = toy_model(vocab_size=3, block_size=3)
    result = train(model, toy_train(steps=2, eval_interval=2), corpus, tracker=notes)
    assert notes.curve("val_accuracy") == curve(result.curves, "val_accuracy")


@pytest.mark.parametrize("options", [{}, {"method": "dfa", "fa_grape": True, "dropout": 0.1}], ids=str)
def test_a_run_is_the_same_with_and_without(options, tmp_path):
    spec = toy_spec(**options)
    (alone, _), (told, _) = made(spec), made(spec, Notes())
    assert told.digest == alone.digest and told.curves == alone.curves and told.sample == alone.sample
    measured = ("wall_time_s", "tokens_per_s", "peak_memory_mib", "provenance")
    same = {name: getattr(alone, name) for name in measured}
    assert replace(told, **same).to_json() == alone.to_json()


@pytest.mark.parametrize(("lr", "status"), [(1e30, "diverged"), (1e-3, "finished")])
def test_the_status_is_told(lr, status):
    notes = Notes()
    spec = toy_spec()
    made(replace(spec, train=replace(spec.train, lr=lr)), notes)
    assert notes.told[-1] == ("finish", status)


def test_a_run_that_breaks_down_has_failed(monkeypatch):
    from localgpt_core.training import state

    def broken(*words):
        raise MemoryError("none left")

    monkeypatch.setattr(state, "training_step", broken)
    notes = Notes()
    assert made(tracker=notes)[0].status == "failed" and notes.told[-1] == ("finish", "failed")


def test_a_run_that_goes_on_says_from_where(tmp_path, monkeypatch):
    notes, path = Notes(), tmp_path / "c"
    with monkeypatch.context() as patch:
        interrupt_after(patch, 7)
        assert made(tracker=notes, checkpoint=path, resume=True)[0] is None
    made(tracker=notes, checkpoint=path, resume=True)
    starts = [words[0] for call, *words in notes.told if call == "start"]
    assert [run.step for run in starts] == [None, 7] and starts[0] == replace(starts[1], step=None)
    assert [words[0] for call, *words in notes.told if call == "finish"] == ["interrupted", "finished"]
    assert notes.curve("val_loss") == curve(made()[1].curves, "val_loss")


# A tracker that fails


@pytest.mark.parametrize("fails", ["start", "log", "finish"])
def test_a_tracker_that_fails_costs_no_run_and_is_told_no_more(fails):
    notes = Notes(fails)
    expected = made()[0].curves
    with pytest.warns(UserWarning, match="is told no more of this run: ConnectionError: no network") as said:
        record, _ = made(tracker=notes)
    assert record.status == "finished" and record.curves == expected and len(said) == 1
    # What has failed is closed as well as it can be.
    assert notes.calls()[notes.calls().index(fails) + 1 :] == ["finish"]


def test_the_next_run_is_tried_again():
    notes = Notes()
    guarded = Guarded(notes)
    assert Guarded.of(guarded) is guarded
    notes.fails = ("start",)
    with pytest.warns(UserWarning, match="told no more"):
        guarded.start("one")
    guarded.log(1, {})
    notes.fails = ()
    guarded.start("two")
    guarded.log(2, {})
    assert [words for words in notes.told if words[0] != "finish"] == [
        ("start", "one"),
        ("start", "two"),
        ("log", 2, {}),
    ]


# Who may be told


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("tensorboard:", "must be tensorboard"),
        ("", "must be tensorboard"),
        (":x", "must be tensorboard"),
        ("a b", "must be tensorboard"),
        ("no_such_module", "needs no_such_module, which is not installed: pip install no_such_module"),
        ("no_such.module:x", "needs no_such, which is not installed"),
        ("math", "has no init and no finish, which such a module must have"),
    ],
)
def test_what_no_tracker_is_called_is_refused(words, message):
    with pytest.raises(ValueError, match=f"^track='{words}': {message}"):
        tracker_of(words)


def test_without_its_package_one_line_names_the_extra(tmp_path):
    """In a process of its own, in which a package that is there cannot be imported."""
    (tmp_path / "toy.txt").write_text(toy_text())
    code = "import sys; sys.modules['tensorboard'] = None; from localgpt_core.cli import main; main()"
    command = [sys.executable, "-c", code, "train", *TOY, "--track", "tensorboard"]
    done = subprocess.run(command, cwd=tmp_path, env=here(), capture_output=True, text=True)
    said = (
        "track='tensorboard': needs tensorboard, which is not installed: pip install \"localgpt[tracking]\""
    )
    assert (done.returncode, done.stdout, done.stderr) == (2, "", f"error: {said}\n")
    assert [path.name for path in tmp_path.iterdir()] == ["toy.txt"]


def here():
    return {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}


def test_without_a_tracker_none_of_it_is_imported(tmp_path):
    (tmp_path / "toy.txt").write_text(toy_text())
    code = f"""if True:
        import sys
        from localgpt_core.cli import main
        sys.argv[1:] = {["train", *TOY]!r}
        try:
            main()
        except SystemExit as stop:
            assert not stop.code
        found = [name for name in sys.modules if "tensorboard" in name or "localgpt_core.tracking" in name]
        assert not found, found"""
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=here(), check=True, capture_output=True)


# A module that is called as Weights & Biases is


def module(monkeypatch, init):
    """Register a module "likewandb" whose calls are returned, with the function ``init``."""
    calls = []
    made = types.ModuleType("likewandb")
    made.init = lambda **given: calls.append(("init", given))
    if init:
        made.init = init(calls)
    made.log = lambda values, step=None: calls.append(("log", step, values))
    made.finish = lambda exit_code=None: calls.append(("finish", exit_code))
    monkeypatch.setitem(sys.modules, "likewandb", made)
    return calls


def test_a_module_gets_the_calls_of_wandb(monkeypatch, tmp_path):
    calls = module(monkeypatch, None)
    tracker = tracker_of("likewandb:mine")
    assert str(tracker) == "likewandb:mine" and str(tracker_of("likewandb")) == "likewandb:localgpt"
    record, result = made(tracker=tracker)
    (_, given), *logs, (_, code) = calls
    digest = record.digest
    assert given == {
        "project": "mine",
        "name": f"bp seed 1 {digest}",
        "id": digest,
        "config": given["config"],
    }
    assert given["config"]["n_embd"] == 8 and code == 0
    losses = [(step, values["val_loss"]) for _, step, values in logs if "val_loss" in values]
    assert losses == curve(result.curves, "val_loss")


@pytest.mark.parametrize(("status", "code"), [("failed", 1), ("diverged", 1), ("interrupted", 0)])
def test_a_module_is_told_how_a_run_ended_and_resumes_it(monkeypatch, status, code):
    calls = module(monkeypatch, None)
    tracker = tracker_of("likewandb")
    tracker.start(TrackedRun("name", "digest", {}, 7))
    tracker.finish(status)
    (_, given), end = calls
    assert given["resume"] == "allow" and end == ("finish", code)


def test_a_module_gets_no_keyword_that_it_does_not_take(monkeypatch):
    def of(calls):
        def init(project, name=None, config=None, resume="never"):
            calls.append(("init", project, name, config, resume))

        return init

    calls = module(monkeypatch, of)
    tracker = tracker_of("likewandb")
    tracker.start(TrackedRun("name", "digest", {"lr": 1.0}))
    tracker.start(TrackedRun("name", "digest", {"lr": 1.0}, 7))
    assert calls == [("init", "localgpt", "name", {"lr": 1.0}, resume) for resume in ("never", "allow")]


# TensorBoard's files


def events(folder):
    """Return what TensorBoard reads in a folder of a run: steps and values by name, and hyperparameters."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

    found = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    found.Reload()
    scalars = {tag: [(e.step, e.value) for e in found.Scalars(tag)] for tag in found.Tags()["scalars"]}
    (start,) = (
        HParamsPluginData.FromString(content).session_start_info
        for content in found.PluginTagToContent("hparams").values()
        if HParamsPluginData.FromString(content).HasField("session_start_info")
    )
    hyperparameters = {
        name: getattr(value, value.WhichOneof("kind")) for name, value in start.hparams.items()
    }
    text = found.Tensors("status/text_summary")[-1].tensor_proto.string_val[0].decode()
    return scalars, hyperparameters, text


def a_file_of_another_second():
    """Wait: TensorBoard reads the files of a folder in the order of their names, which begin with seconds."""
    time.sleep(1.01)


def in_float32(points):
    return [(step, float(np.float32(value))) for step, value in points]


@pytest.mark.needs("tensorboard")
def test_tensorboard_reads_the_curves_of_the_record(tmp_path):
    tracker = tracker_of(f"tensorboard:{tmp_path}/tb")
    assert str(tracker) == f"tensorboard:{tmp_path}/tb"
    record, result = made(tracker=tracker, diagnose_every=10, arm="a/b: c")
    (folder,) = (tmp_path / "tb").iterdir()
    assert folder.name == f"a-b-c-seed-1-{record.digest}"
    scalars, hyperparameters, status = events(folder)
    for name in ("train_loss", "lr", "val_loss"):
        assert scalars[name] == in_float32(curve(result.curves, name))
    assert [step for step, _ in scalars["tokens_per_s"]] == result.curves["step"]
    cosines = result.diagnostics["cosine"]["head.weight"]
    assert scalars["cosine/head.weight"] == in_float32(zip([0, 10, 20], cosines, strict=True))
    assert (hyperparameters["method"], hyperparameters["lr"], hyperparameters["bias"]) == ("bp", 1e-3, False)
    assert (hyperparameters["digest"], hyperparameters["n_embd"], status) == (record.digest, 8, "finished")


@pytest.mark.needs("tensorboard")
def test_a_run_that_goes_on_is_one_curve_in_tensorboard(tmp_path, monkeypatch):
    tracker, path = tracker_of(f"tensorboard:{tmp_path}/tb"), tmp_path / "c"
    with monkeypatch.context() as patch:
        interrupt_after(patch, 13)
        made(tracker=tracker, checkpoint=path, resume=True)
    (folder,) = (tmp_path / "tb").iterdir()
    # As after a kill: what is later than the checkpoint is in the files, and is made again.
    a_file_of_another_second()
    late = tracker_of(f"tensorboard:{tmp_path}/tb")
    record = made()[0]
    late.start(TrackedRun(f"bp seed 1 {record.digest}", record.digest, {}, 13))
    for step in (14, 15):
        late.log(step, {"train_loss": 99.0, "val_loss": 99.0})
    late.finish("failed")
    a_file_of_another_second()
    _, result = made(tracker=tracker, checkpoint=path, resume=True)
    scalars, _, status = events(folder)
    assert len([*folder.iterdir()]) == 3 and status == "finished"
    for name in ("train_loss", "val_loss"):
        assert scalars[name] == in_float32(curve(result.curves, name))


@pytest.mark.needs("tensorboard")
def test_a_run_that_starts_again_takes_the_place_of_the_one_before(tmp_path):
    tracker = tracker_of(f"tensorboard:{tmp_path}/tb")
    for _ in range(2):
        a_file_of_another_second()
        _, result = made(tracker=tracker)
    (folder,) = (tmp_path / "tb").iterdir()
    assert events(folder)[0]["val_loss"] == in_float32(curve(result.curves, "val_loss"))


@pytest.mark.needs("tensorboard")
def test_a_folder_that_cannot_be_written_is_refused(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(ValueError, match=f"^track='{tmp_path}/file/tb/events': "):
        tracker_of(f"tensorboard:{tmp_path}/file/tb")


# On the command line


@pytest.fixture
def cli(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "toy.txt").write_text(toy_text())
    (tmp_path / "suite.toml").write_text(TOY_SUITE)

    def run(*words):
        monkeypatch.setattr(sys, "argv", ["localgpt", *map(str, words)])
        with pytest.raises(SystemExit) as stop:
            commands.main()
        return stop.value.code or 0, *capfd.readouterr()

    return run


def names(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.needs("tensorboard")
def test_train_tracks_every_seed_and_says_no_folder(cli, tmp_path):
    status, _, err = cli("train", *TOY, "--seeds", "1,2", "--track", f"tensorboard:{tmp_path}/tb")
    assert status == 0, err
    records = load_records("runs")
    assert names(tmp_path / "tb") == [
        f"bp-seed-{r.seed}-{d}" for d, r in sorted(records.items(), key=by_seed)
    ]
    for record in records.values():
        assert str(tmp_path) not in record.to_json()
        assert record.provenance["command"].endswith("--track tensorboard:tb")


def by_seed(item):
    return item[1].seed


@pytest.mark.needs("tensorboard")
@pytest.mark.parametrize("jobs", [1, 2])
def test_a_suite_tracks_its_runs_also_side_by_side(cli, tmp_path, jobs):
    status, _, err = cli("run", "suite.toml", "--records", "r", "--jobs", jobs, "--track", "tensorboard:tb")
    assert status == 0, err
    records = load_records("r")
    assert names(tmp_path / "tb") == sorted(f"{r.arm}-seed-1-{d}" for d, r in records.items())
    for folder in (tmp_path / "tb").iterdir():
        record = records[folder.name.rpartition("-")[2]]
        expected = [pytest.approx(value, rel=1e-5) for value in record.curves["val_loss"]]
        assert [value for _, value in events(folder)[0]["val_loss"]] == expected


def test_a_tracker_that_fails_is_one_line(tmp_path):
    (tmp_path / "toy.txt").write_text(toy_text())
    code = "def init(project):\n    raise ConnectionError('no network')\nlog = finish = print\n"
    (tmp_path / "likewandb.py").write_text(code)
    command = [sys.executable, "-m", "localgpt_core", "train", *TOY, "--track", "likewandb"]
    done = subprocess.run(command, cwd=tmp_path, env=here(), capture_output=True, text=True)
    assert done.returncode == 0 and "final validation loss" in done.stdout
    said = [line for line in done.stderr.splitlines() if "likewandb" in line]
    expected = "warning: likewandb:localgpt is told no more of this run: ConnectionError: no network"
    assert said == [expected]


@pytest.mark.needs("tensorboard")
def test_under_torchrun_one_process_writes(cli, tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "localgpt_core"]
    command += ["train", *TOY, "--track", "tensorboard:tb"]
    done = subprocess.run(command, cwd=tmp_path, env=here(), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    (folder,) = (tmp_path / "tb").iterdir()
    assert len([*folder.iterdir()]) == 1
    (record,) = load_records("runs").values()
    assert [step for step, _ in events(folder)[0]["val_loss"]] == record.curves["val_step"]
    assert re.fullmatch(rf"bp-seed-1-{record.digest}", folder.name)


def test_settings_guard_their_tracker_once():
    settings = RunSettings(tracker=Notes())
    assert isinstance(settings.tracker, Guarded)
    assert replace(settings, threads=1).tracker is settings.tracker
