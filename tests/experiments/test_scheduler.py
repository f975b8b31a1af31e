import contextlib
import dataclasses
import errno
import os
import random
import re
import signal
import subprocess
import sys
import time
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
from filelock import FileLock
from toys import PATIENCE_S, short_suite, toy_record, toy_text

from localgpt_core.common import files
from localgpt_core.common.validation import Refusal
from localgpt_core.corpus.corpus import load_corpus
from localgpt_core.experiments import making, processes, scheduler
from localgpt_core.experiments.locks import claim
from localgpt_core.experiments.scheduler import SuiteRun
from localgpt_core.experiments.suites import read_suite
from localgpt_core.records import load_records
from localgpt_core.training.settings import RunSettings

BROKEN = """
[arms.broken]
model = { n_embd = 1048576 }
[arms.dfa]
model = { method = "dfa" }
"""


@pytest.fixture
def make(tmp_path):
    """Return a function that writes a suite and gives it back as a `SuiteRun`."""

    def write(steps=10, more="", seeds="[1]", **changes):
        (tmp_path / "toy.txt").write_text(toy_text())
        path = tmp_path / "suite.toml"
        path.write_text(short_suite(tmp_path / "toy.txt", seeds, steps, every=steps) + more)
        suite = read_suite(path)
        records = tmp_path / "records"
        own = {name: changes.pop(name) for name in ("preset",) if name in changes}
        settings = RunSettings(**{"threads": 1, **changes})
        return SuiteRun(suite, load_corpus(suite.corpus), records, records / suite.name, settings, **own)

    return write


@pytest.fixture
def start():
    """Return a function that starts `localgpt run` as a process group of its own; none outlives the test."""
    started = []

    def start(run, *more):
        command = [sys.executable, "-m", "localgpt_core", "run", str(run.suite.path)]
        process = subprocess.Popen(
            [*command, "--records", str(run.records), *more],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            start_new_session=True,
        )
        started.append(process)
        return process

    yield start
    for process in started:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


@pytest.fixture
def finish(start):
    """Return a function that runs `localgpt run` to its end."""

    def finish(run, *more):
        process = start(run, *more)
        out, err = process.communicate(timeout=PATIENCE_S)
        return process.returncode, out, err

    return finish


def planned(run):
    return {item.spec.digest: item for item in run.suite.plan(run.corpus)}


def results(run):
    """Return what every run came to, without the times; no file may be refused."""
    records = load_records(run.records, pytest.fail)
    same = (
        "digest",
        "suite",
        "arm",
        "preset",
        "spec",
        "seed",
        "status",
        "curves",
        "sample",
        "final_val_loss",
    )
    return {digest: {name: getattr(record, name) for name in same} for digest, record in records.items()}


def contents(run):
    # A folder may go while it is looked for: os.walk passes over it.
    found = (Path(at) / name for at, _, names in os.walk(run.records) for name in names)
    return {path: path.read_bytes() for path in found if path.suffix == ".json"}


def wait_for_records(run, count, seconds=PATIENCE_S):
    """Return as soon as there are ``count`` records."""
    end = time.monotonic() + seconds
    while len(contents(run)) < count:
        assert time.monotonic() < end, f"no {count} records after {seconds} s"
        time.sleep(0.01)


# Complete


def test_runs_one_after_the_other_go_seed_by_seed(make):
    run, said = make(steps=2, seeds="[3, 1]"), []
    assert run.all(1, said.append)
    assert said[0] == "suite: 4 runs to make"
    titles = [
        re.match(r"(.*) \[(.*)\]: finished, \d\.\d{4} nats, \d+ s$", line).groups() for line in said[1:]
    ]
    assert [title for title, _ in titles] == ["bp seed 3", "fa seed 3", "bp seed 1", "fa seed 1"]
    assert [digest for _, digest in titles] == [*planned(run)]
    assert results(run).keys() == planned(run).keys()


def test_runs_side_by_side_give_the_records_of_runs_one_after_the_other(make, finish, tmp_path):
    run = make()
    assert run.all(1, lambda text: None)
    other = dataclasses.replace(run, records=tmp_path / "other", out=tmp_path / "other" / "suite")
    status, out, err = finish(other, "--jobs", "2")
    assert (status, out) == (0, "suite: complete\n"), err
    assert len(results(run)) == 2
    assert results(other) == results(run)
    before, said = contents(other), []
    assert other.all(2, said.append)
    assert said == ["suite: 0 runs to make"]
    assert contents(other) == before


def test_runs_side_by_side_take_a_corpus_given_by_hand(make, finish, tmp_path):
    run = make(steps=2)
    other = tmp_path / "own.txt"
    other.write_text(toy_text(1500))
    status, out, err = finish(run, "--jobs", "2", "--corpus", str(other))
    assert (status, out) == (0, "suite: complete\n"), err
    own = dataclasses.replace(run, corpus=load_corpus(str(other)))
    assert results(run).keys() == planned(own).keys()
    assert not results(run).keys() & planned(run).keys()


def test_a_run_that_another_suite_recorded_is_not_made_again(make):
    run = make(seeds="[1, 2]")
    first, second = [*planned(run).values()][:2]
    toy_record(first.spec, suite="other").write(run.records / "other")
    toy_record(second.spec, suite="other", status="failed", curves={}).write(run.records / "other")
    made = []
    assert run.all(1, made.append)
    assert made[0] == "suite: 3 runs to make"
    assert len(list(run.out.glob("*.json"))) == 3
    assert run.todo(pytest.fail) == []


def test_an_output_folder_elsewhere_is_looked_at_too(make, tmp_path):
    run = make(steps=2)
    elsewhere = dataclasses.replace(run, out=tmp_path / "elsewhere")
    assert elsewhere.all(1, lambda text: None)
    assert not run.records.exists() and len(list(elsewhere.out.iterdir())) == 2
    assert elsewhere.todo(pytest.fail) == []


# Killed


def test_a_killed_suite_loses_nothing_that_was_finished(make, start, finish):
    run, chance = make(steps=150, seeds="[1, 2]"), random.Random(1)
    for at_least in (1, 2, 3):
        process = start(run)
        wait_for_records(run, at_least)
        time.sleep(chance.uniform(0.0, 0.3))
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate(timeout=PATIENCE_S)
        finished = contents(run)
        assert len(finished) >= at_least
        assert results(run).keys() <= planned(run).keys()
        for leftover in (".0123456789abcdef.tmp", ".half.tmp"):
            (run.out / leftover).write_bytes(next(iter(finished.values()))[:-100])
    status, out, err = finish(run)
    assert (status, out) == (0, "suite: complete\n"), err
    assert "refused" not in err
    after = contents(run)
    assert {path: after[path] for path in finished} == finished
    assert results(run).keys() == planned(run).keys()


def running_below(run):
    """Return the processes whose command line names the suite."""
    return [p for p in psutil.process_iter(["cmdline"]) if str(run.suite.path) in (p.info["cmdline"] or ())]


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_no_run_goes_on_when_the_process_that_started_it_is_gone(make, start, finish, how):
    run = make(steps=2, more=LONG.replace("000 }", "000, eval_interval = 100 }"))
    (left,) = (digest for digest, item in planned(run).items() if item.arm.name == "long")
    process = start(run, "--jobs", "3")
    wait_for_records(run, 2)
    while left not in unfinished(run):
        time.sleep(0.01)
    finished = contents(run).keys()  # what they say may still grow: a sample follows the result
    process.send_signal(how)  # to the parent alone
    _, err = process.communicate(timeout=PATIENCE_S)  # until nobody holds the pipes any more
    assert process.returncode == (130 if how == signal.SIGINT else -how)
    assert f"long seed 1 [{left}]: interrupted after " in err and "Traceback" not in err
    psutil.wait_procs(running_below(run), timeout=PATIENCE_S)
    assert running_below(run) == [] and contents(run).keys() == finished
    _, _, err = finish(run, "--time-budget", "3")
    assert f"long seed 1 [{left}]: goes on from step " in err or f"[{left}]: evaluating" not in err


LONG = "[arms.long]\ntrain = { steps = 1000000 }\n"


def test_ctrl_c_leaves_whole_records(make):
    starts, said = [], []

    def press_in_the_second_run(measured):
        if measured["step"] == 0:
            starts.append(measured)
            if len(starts) == 2:
                signal.raise_signal(signal.SIGINT)

    run = make(steps=2, seeds="[1, 2]", report=press_in_the_second_run)
    assert not run.all(1, said.append)
    assert len(starts) == 2
    assert re.match(r"fa seed 1 \[.*\]: interrupted after 0 steps, no record yet; the next", said[-1])
    assert [result["arm"] for result in results(run).values()] == ["bp"]


def test_ctrl_c_ends_runs_side_by_side(make, start):
    run = make(steps=2, more=LONG)
    process = start(run, "--jobs", "3")
    wait_for_records(run, 2)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does
    out, err = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 130, err
    assert {result["arm"] for result in results(run).values()} == {"bp", "fa"}


# Out of time


def test_a_suite_without_time_starts_nothing_more(make):
    run, said = make(deadline=time.monotonic() - 1), []
    assert not run.all(1, said.append)
    assert contents(run) == {}
    assert len(said) == 2 and "bp seed 1" in said[1] and "out of time after 1 steps, no record" in said[1]


def unfinished(run):
    return sorted(path.stem for path in (run.out / ".unfinished").glob("*.safetensors"))


def test_a_run_that_was_stopped_goes_on_bit_for_bit_and_leaves_nothing_behind(make, tmp_path):
    whole = make(steps=8, more=WILD)
    whole = dataclasses.replace(whole, records=tmp_path / "whole", out=tmp_path / "whole" / "suite")
    assert whole.all(1, lambda text: None)

    def press_in_the_third_step(measured):
        if measured["step"] == 3 and "train_loss" in measured:
            signal.raise_signal(signal.SIGINT)

    run, said = make(steps=8, more=WILD, report=press_in_the_third_step), []
    first, second, _ = planned(run)
    assert run.make(1, said.append) == "interrupted" and unfinished(run) == [first]
    run, said = make(steps=8, more=WILD, deadline=time.monotonic() - 1), []
    assert run.make(1, said.append) == "out_of_time" and unfinished(run) == [first]
    assert said[1].startswith(f"bp seed 1 [{first}]: out of time after 4 steps, no record yet; the next time")
    run, starts = make(steps=8, more=WILD), []
    run = dataclasses.replace(run, show=lambda *shown: starts.append(shown) or contextlib.nullcontext())
    assert run.all(1, lambda text: None)
    assert starts == [(8, f"bp seed 1 [{first}]", 4), *((8, s[1], 0) for s in starts[1:])]
    assert results(run) == results(whole) and len(results(run)) == 3
    assert not (run.out / ".unfinished").exists()


WILD = "[arms.wild]\ntrain = { lr = 1e30 }\n"


def test_runs_side_by_side_go_on_too(make, start, finish):
    run = make(steps=2, more=LONG.replace("000 }", "000, eval_interval = 100 }"))
    (left,) = (digest for digest, item in planned(run).items() if item.arm.name == "long")
    process, end = start(run, "--jobs", "3"), time.monotonic() + PATIENCE_S
    wait_for_records(run, 2)
    while left not in unfinished(run):
        assert time.monotonic() < end
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGINT)
    process.communicate(timeout=PATIENCE_S)
    status, out, err = finish(run, "--jobs", "2", "--time-budget", "3")
    assert (status, unfinished(run)) == (3, [left]), err
    assert len(re.findall(rf"long seed 1 \[{left}\]: goes on from step \d+/1000000\n", err)) == 1
    assert f"long seed 1 [{left}]: out of time after " in err


@pytest.mark.parametrize("damage", ["cut", "other", "diagnostics"])
def test_a_checkpoint_of_no_use_is_named_and_its_run_starts_again(make, damage):
    run = make(steps=8)
    (first, item), (_, other) = planned(run).items()
    options = {"checkpoint": run.out / ".unfinished" / f"{first}.safetensors", "deadline": 0.0}
    spec = other.spec if damage == "other" else item.spec
    assert making.execute(spec, run.corpus, run.settings.__class__(**options))[1].steps_done == 1
    if damage == "cut":
        options["checkpoint"].write_bytes(options["checkpoint"].read_bytes()[:-10])
    if damage == "diagnostics":
        arms = tuple(dataclasses.replace(arm, diagnose_every=4) for arm in run.suite.arms)
        run = dataclasses.replace(run, suite=dataclasses.replace(run.suite, arms=arms))
    said = []
    assert run.all(1, said.append)
    assert str(options["checkpoint"]) in said[1] and said[1].endswith(f"bp seed 1 [{first}] starts again")
    assert run.todo(pytest.fail) == [] and not (run.out / ".unfinished").exists()


def test_a_run_that_broke_down_keeps_its_checkpoint(make, monkeypatch):
    def press(measured):
        signal.raise_signal(signal.SIGINT)

    run = make(report=press)
    (first, *_) = planned(run)
    assert run.make(1, lambda text: None) == "interrupted"
    with monkeypatch.context() as patch:
        patch.setattr("localgpt_core.training.state.training_step", lambda *args: 1 / 0)
        assert make().make(1, lambda text: None, [first]) == "failed"
    assert unfinished(run) == [first]
    assert make().all(1, lambda text: None) and not (run.out / ".unfinished").exists()


@pytest.fixture
def clock(monkeypatch):
    """Return a clock that only `tick` and waiting move."""
    clock = SimpleNamespace(now=500.0)

    def tick(seconds):
        clock.now += seconds

    clock.tick = tick
    fake = SimpleNamespace(monotonic=lambda: clock.now, sleep=tick, perf_counter=time.perf_counter)
    monkeypatch.setattr(scheduler, "time", fake)
    monkeypatch.setattr(processes, "time", fake)
    return clock


def test_side_by_side_nothing_starts_that_cannot_finish(make, monkeypatch, clock):
    run = make(deadline=clock.now + 25)
    started = []

    def fake_start(self, item):
        ends = clock.now + 10.0
        started.append((clock.now - 500.0, item.spec.digest))

        def outcome():
            if clock.now < ends:
                return None
            toy_record(item.spec).write(self.out)
            return "complete"

        return SimpleNamespace(run=item, outcome=outcome, seconds=10.0, problem="")

    monkeypatch.setattr(SuiteRun, "_start", fake_start)
    six = dataclasses.replace(run.suite, arms=(*run.suite.arms, *three_more(run.suite.arms[0])))
    run, said = dataclasses.replace(run, suite=six), []
    assert not run.all(2, said.append)
    # Two at 0 s, two at 10.2 s; the fifth would wait until 20.4 s, with less than 10.2 s left then.
    assert [round(at / 10) for at, _ in started] == [0, 0, 1, 1]
    assert len(contents(run)) == 4
    assert [line for line in said if "not started" in line] == [
        "1 runs not started: 10 s left, one takes 10 s"
    ]
    assert [digest for _, digest in started] == [*planned(run)][:4]


def three_more(arm):
    for width in (16, 24, 32):
        yield dataclasses.replace(arm, name=f"wide {width}", model={**arm.model, "n_embd": width})


def test_a_run_that_is_given_up_ends_a_suite_one_by_one(make, monkeypatch):
    run, asked = make(deadline=time.monotonic() + 1000), []

    def fake_execute(spec, corpus, settings, **options):
        asked.append((spec.digest, settings.deadline))
        if len(asked) == 2:
            return None, SimpleNamespace(status="out_of_time", steps_done=25)
        return toy_record(spec, suite=options["suite"]), None

    monkeypatch.setattr(making, "execute", fake_execute)
    said = []
    assert not run.all(1, said.append)
    assert asked == [(digest, run.settings.deadline) for digest in [*planned(run)][:2]]
    assert len(contents(run)) == 1
    assert said[-1].endswith("out of time after 25 steps, no record yet; the next time it goes on from there")


def test_the_time_left_goes_to_the_runs_side_by_side(make, monkeypatch, clock):
    commands = []
    monkeypatch.setattr(processes.subprocess, "Popen", lambda command, **how: commands.append(command))
    item = next(iter(planned(make()).values()))
    make(deadline=clock.now + 12.5, preset="cpu", device="cpu", threads=3)._start(item)
    make()._start(item)
    text = " ".join(commands[0])
    assert f"--only {item.spec.digest}" in text
    assert "--preset cpu" in text and "--threads 3" in text and "--time-budget 12.5" in text
    assert "--time-budget" not in commands[1] and "--preset" not in commands[1]


# Broken


@pytest.mark.parametrize("jobs", [1, 2])
def test_a_run_that_breaks_down_does_not_stop_the_others(make, capfd, jobs):
    run = make(steps=2, more=BROKEN)
    assert not run.all(jobs, lambda text: print(text, file=sys.stderr))
    err = capfd.readouterr().err
    assert "Traceback" not in err
    arms = {result["arm"]: result["status"] for result in results(run).values()}
    assert arms == {"bp": "finished", "fa": "finished", "broken": "failed", "dfa": "finished"}
    assert [item.arm.name for item in run.todo(pytest.fail)] == ["broken"]
    assert len(re.findall(r"broken seed 1 .*: failed, no final loss.*\(.*Error", err)) == 1


def test_a_diverged_run_is_a_result_and_is_not_made_again(make):
    run = make(steps=8, more="[arms.wild]\ntrain = { lr = 1e30 }\n", seeds="[1, 2]")
    said = []
    assert run.all(1, said.append)
    records = load_records(run.records, pytest.fail)
    assert sorted(r.arm for r in records.values() if r.status == "diverged") == ["wild", "wild"]
    assert run.todo(pytest.fail) == []
    assert any(re.search(r"wild seed 1 .*: diverged, no final loss", line) for line in said)


def test_a_process_that_dies_does_not_stop_the_others(make, monkeypatch):
    run = make(steps=2)
    usual, dead = SuiteRun._start, next(iter(planned(run)))

    def start_or_die(self, item):
        process = usual(self, item)
        if item.spec.digest == dead:
            process.process.kill()
        return process

    monkeypatch.setattr(SuiteRun, "_start", start_or_die)
    said = []
    assert not run.all(2, said.append)
    assert results(run).keys() == planned(run).keys() - {dead}
    assert f"bp seed 1 [{dead}]: no record (exit status -9)" in said


def test_a_damaged_record_is_named_and_made_again(make):
    run = make(steps=2)
    assert run.all(1, lambda text: None)
    good = contents(run)
    path = sorted(good)[0]
    path.write_bytes(good[path][:300])
    said = []
    assert [item.spec.digest for item in run.todo(said.append)] == [path.stem]
    assert said and all(str(path) in line and "is refused" in line for line in said)
    assert run.all(1, lambda text: None)
    assert results(run).keys() == planned(run).keys()


# What is refused, and what is asked for by name


@pytest.mark.parametrize("jobs", [1, 2])
def test_a_run_that_its_text_does_not_allow_is_refused_before_the_first_run(make, monkeypatch, jobs):
    monkeypatch.setattr(SuiteRun, "one", lambda *args: pytest.fail("made"))
    monkeypatch.setattr(SuiteRun, "_start", lambda *args: pytest.fail("made"))
    run = make(more="[arms.long]\nmodel = { block_size = 300 }\n")
    with pytest.raises(ValueError, match="suite.toml, arm 'long': block_size=300: a window of 301"):
        run.all(jobs, lambda text: None)
    run = make()
    blocked = dataclasses.replace(run, out=run.suite.path / "below")
    with pytest.raises(ValueError, match="^out='.*': cannot be written"):
        blocked.all(jobs, lambda text: None)


@pytest.mark.parametrize("jobs", [1, 2])
def test_runs_asked_for_by_digest_are_made_side_by_side_too(make, jobs):
    run, said = make(steps=2, seeds="[1, 2]"), []
    first, second, *others = planned(run)
    assert run.make(jobs, said.append, [second, first, second]) == "complete"
    assert results(run).keys() == {first, second}
    before = contents(run)
    assert run.make(jobs, said.append, [first]) == "complete"  # again: nothing is made twice
    assert contents(run) == before
    with pytest.raises(ValueError, match="only='abc': suite suite has "):
        run.make(jobs, said.append, [first, "abc"])


def test_runs_asked_for_by_digest_start_as_many_at_a_time_as_asked(make, monkeypatch):
    run, most, going = make(steps=2, seeds="[1, 2]"), [], []

    def fake_start(self, item):
        going.append(item)
        most.append(len(going))

        def outcome():
            if item in going and len(most) < 4 and len(going) < 2:
                return None
            if item in going:
                toy_record(item.spec).write(self.out)
                going.remove(item)
            return "complete"

        return SimpleNamespace(run=item, outcome=outcome, seconds=1.0, problem="")

    monkeypatch.setattr(SuiteRun, "_start", fake_start)
    monkeypatch.setattr(scheduler, "POLL_S", 0)
    assert run.make(2, lambda text: None, [*planned(run)]) == "complete"
    assert max(most) == 2 and len(most) == 4


@pytest.mark.parametrize("jobs", [1, 2])
def test_what_is_left_of_a_suite_has_a_reason(make, jobs):
    said = []
    assert make(steps=2, more=BROKEN).make(jobs, said.append) == "failed"
    assert make(steps=50, deadline=time.monotonic() - 1, seeds="[3]").make(jobs, said.append) == "out_of_time"


def test_ctrl_c_after_the_last_step_keeps_the_record_and_stops_the_suite(make):
    def press_at_the_end(measured):
        if measured["step"] == 2 and "val_loss" in measured:
            signal.raise_signal(signal.SIGINT)

    run = make(steps=2, report=press_at_the_end)
    assert run.make(1, lambda text: None) == "interrupted"
    assert [result["arm"] for result in results(run).values()] == ["bp"]


# Several at once


def test_a_run_has_one_maker_and_its_lock_dies_with_it(tmp_path):
    out, records = tmp_path / "records" / "suite", tmp_path / "records"
    lock = out / ".unfinished" / "0123.lock"
    code = f"""if True:
        import os, pathlib, sys
        from localgpt_core.experiments.locks import claim
        with claim("0123", pathlib.Path({str(out)!r}), pathlib.Path({str(records)!r})) as mine:
            print(mine, flush=True)
            sys.stdin.read()
            os.kill(os.getpid(), 9)"""
    with subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout.readline() == "True\n"
        for mine in ((out, records), (out, tmp_path / "other"), (records / "another suite", records)):
            with claim("0123", *mine) as held:
                assert not held
        with claim("4567", out, records) as held:
            assert held
        with claim("0123", tmp_path / "other", tmp_path / "not there") as held:
            assert held
        process.stdin.close()
        assert process.wait(PATIENCE_S) == -9
    assert lock.exists()  # it locks nothing any more
    with claim("0123", out, records) as held, claim("0123", out, records) as again:
        assert held and not again
    assert not any(path.is_file() for path in tmp_path.rglob("*"))


def test_a_lock_of_somebody_who_may_not_write_the_records_is_in_the_new_folder(tmp_path, monkeypatch):
    usual = FileLock.acquire

    def acquire(self, *args, **more):
        if str(tmp_path / "read-only") in self.lock_file:
            raise PermissionError(errno.EACCES, "Permission denied", self.lock_file)
        return usual(self, *args, **more)

    monkeypatch.setattr(FileLock, "acquire", acquire)
    (tmp_path / "read-only").mkdir()
    with claim("0123", tmp_path / "out", tmp_path / "read-only") as held:
        assert held
        with claim("0123", tmp_path / "out", tmp_path / "read-only") as again:
            assert not again


def test_what_killed_processes_leave_of_recorded_runs_is_removed(make):
    run = make(steps=2)
    assert run.all(1, lambda text: None)
    first, second = planned(run)
    for folder in (run.out, run.records):
        (folder / ".unfinished").mkdir()
        (folder / ".unfinished" / f"{first}.lock").touch()
    (run.out / ".unfinished" / f"{second}.safetensors").touch()
    dead = subprocess.run(
        [sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, text=True
    )
    halves = [
        folder / f".{'0' * 32}.{dead.stdout.strip()}@{files.HOST}.tmp"
        for folder in (run.out, run.out / ".unfinished")
    ]
    for half in halves:
        half.touch()
    with run.claim(planned(run)[second]):
        assert run.all(1, lambda text: None)
        assert unfinished(run) == [second]  # somebody else's
        assert not any(path.exists() for path in (run.records / ".unfinished" / f"{first}.lock", *halves))
    assert run.all(1, lambda text: None)
    assert not (run.records / ".unfinished").exists() and not (run.out / ".unfinished").exists()


@pytest.mark.parametrize("jobs", ["1", "2"])
def test_two_suites_at_once_make_each_run_once(make, start, jobs):
    run = make(steps=40, seeds="[1, 2, 3]")
    errors = [start(run, "--jobs", jobs), start(run, "--jobs", jobs)]
    errors = [process.communicate(timeout=PATIENCE_S)[1] for process in errors]
    assert results(run).keys() == planned(run).keys()
    made = [re.findall(r"\[(\w+)\]: finished", err) for err in errors]
    assert sorted(made[0] + made[1]) == sorted(planned(run)), errors
    assert not (run.records / ".unfinished").exists() and not (run.out / ".unfinished").exists()


def test_what_another_process_makes_is_waited_for_and_made_if_that_one_gives_up(make, monkeypatch):
    run, said, waits = make(steps=2, seeds="[1, 2]"), [], []
    kept, given_up, *_ = planned(run).values()
    theirs = ExitStack()
    for item in (kept, given_up):
        assert theirs.enter_context(run.claim(item))

    def wait(seconds):
        waits.append(seconds)
        if len(waits) == 3:
            toy_record(kept.spec).write(run.out)
            theirs.close()

    monkeypatch.setattr(scheduler.time, "sleep", wait)
    assert run.make(1, said.append, [kept.spec.digest]) == "elsewhere" and said == [] and waits == []
    assert run.make(1, said.append) == "complete" and len(waits) == 3
    waiting = "waiting for 2 runs that other processes are making"
    assert [re.sub(r" \[.*", "", line) for line in said] == [
        *("suite: 4 runs to make", "bp seed 2", "fa seed 2", waiting, "fa seed 1")
    ]
    assert results(run)[kept.spec.digest]["curves"] == toy_record(kept.spec).curves


def test_waiting_ends_with_the_time(make, monkeypatch):
    run, said = make(steps=2, deadline=time.monotonic() + 0.3), []
    first, second = planned(run).values()
    with run.claim(first), run.claim(second):
        assert run.make(1, said.append) == "out_of_time"
    assert said[1] == "waiting for 2 runs that other processes are making" and len(said) == 3


def test_a_run_recorded_since_the_suite_was_read_is_not_made(make, monkeypatch):
    run, said = make(steps=2), []
    first, second = planned(run).values()
    usual = making.execute

    def execute(spec, *args, **more):
        toy_record(second.spec).write(run.records / "elsewhere")
        return usual(spec, *args, **more)

    monkeypatch.setattr(making, "execute", execute)
    assert run.all(1, said.append)
    assert [line for line in said if "fa seed 1" in line] == []


def test_two_arms_of_one_spec_are_one_run_with_the_diagnostics_of_both(make):
    more = "[arms.again]\ndiagnose_every = 6\n[arms.third]\ndiagnose_every = 4\n"
    run, said = make(steps=12, more=more), []
    assert len(planned(run)) == 2 and run.all(1, said.append)
    assert said[0] == "suite: 2 runs to make" and len(said) == 3
    (record,) = (r for r in load_records(run.records).values() if r.run_spec.model.method == "bp")
    assert record.arm == "bp" and record.diagnostics["step"] == [*range(0, 13, 2)]
    assert run.todo(pytest.fail) == []


# Nothing more can be kept


@pytest.mark.parametrize("jobs", [1, 2])
def test_the_first_record_that_cannot_be_written_stops_the_rest(make, monkeypatch, jobs):
    run, started = make(steps=2, seeds="[1, 2, 3]"), []

    class Full:
        seconds, problem = 1.0, ""

        def __init__(self, item):
            started.append(self)
            self.run, self.stopped, self.waited = item, False, False
            (run.out).mkdir(parents=True, exist_ok=True)

        def outcome(self):
            return "failed" if self is started[0] else None

        def stop(self):
            self.stopped = True

        def wait(self):
            self.waited = True

    full = OSError(errno.ENOSPC, "No space left on device")

    def write(path, data):
        raise full

    if jobs == 1:
        monkeypatch.setattr("localgpt_core.records.record.atomic_write", write)
        usual = making.execute
        monkeypatch.setattr(making, "execute", lambda *a, **k: started.append(a) or usual(*a, **k))
    else:
        monkeypatch.setattr(SuiteRun, "_start", lambda self, item: Full(item))
        checks = []

        def check(field, path):
            checks.append(path)
            if len(checks) > 6:
                raise full

        monkeypatch.setattr(making, "require_writable", check)
    with pytest.raises(OSError, match="No space left"):
        run.make(jobs, lambda text: None)
    assert len(started) == jobs
    if jobs == 2:
        assert [(each.stopped, each.waited) for each in started[1:]] == [(True, True)]


def test_a_refusal_of_one_run_does_not_stop_the_others(make, monkeypatch):
    run, said = make(steps=2), []
    first, second = planned(run).values()
    usual = making.execute

    def execute(spec, *args, **more):
        if spec == first.spec:
            raise Refusal("x=1: is refused")
        return usual(spec, *args, **more)

    monkeypatch.setattr(making, "execute", execute)
    assert run.make(1, said.append) == "failed"
    assert said[1] == f"bp seed 1 [{first.spec.digest}]: x=1: is refused"
    assert results(run).keys() == {second.spec.digest}


OWN = """
[arms.recall]
corpus = "recall-1"
model = { block_size = 13 }
train = { eval_iters = 1 }
"""


@pytest.mark.parametrize("jobs", [1, 2])
def test_an_arm_is_made_with_the_corpus_that_it_names(make, jobs):
    run = make(steps=2, more=OWN)
    assert run.all(jobs, print)
    corpora = {record.arm: record.corpus for record in load_records(run.records, pytest.fail).values()}
    assert corpora == {"bp": "toy", "fa": "toy", "recall": "recall-1"}
    assert run.missing([*run.planned().values()]) == []
