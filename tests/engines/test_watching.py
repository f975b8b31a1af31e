import io
import os
import re
import signal
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest
from toys import TOY_SUITE, toy_record, toy_text

from localgpt_core.corpus.corpus import load_corpus
from localgpt_core.engines import status as module
from localgpt_core.engines.status import RunStatus, Watch, screen, summary, table, watching
from localgpt_core.experiments.making import RunMaker
from localgpt_core.experiments.suites import read_suite
from localgpt_core.training.checkpoints import load_checkpoint
from localgpt_core.training.settings import RunSettings

LONG = "[arms.long]\ntrain = { steps = 1000000, eval_interval = 50 }\n[arms.wild]\ntrain = { lr = 1e30 }\n"


@pytest.fixture
def maker(tmp_path):
    """Return a suite of four runs in an empty folder."""
    (tmp_path / "toy.txt").write_text(toy_text())
    path = tmp_path / "suite.toml"
    path.write_text(TOY_SUITE.replace("toy.txt", str(tmp_path / "toy.txt")) + LONG)
    suite, records = read_suite(path), tmp_path / "records"
    return RunMaker(suite, load_corpus(suite.corpus), records, records / "suite")


def words(watch):
    return {status.title.partition(" ")[0]: status.word for status in watch.look()}


def made(maker, run, steps):
    """Let ``run`` stop after so many steps, with a checkpoint."""

    def press(measured):
        if measured["step"] == steps:
            signal.raise_signal(signal.SIGINT)

    return replace(maker, settings=RunSettings(threads=1, report=press)).one(run, lambda text: None)


def test_a_run_goes_from_left_to_finished(maker, monkeypatch):
    watch, planned = Watch(maker), maker.planned()
    bp, frozen, long, wild = planned.values()
    assert words(watch) == dict.fromkeys(("bp", "frozen", "long", "wild"), "left") and not watch.is_over
    assert made(maker, long, 100) == "interrupted"
    assert maker.one(bp, lambda text: None) == "complete" and maker.one(wild, lambda text: None) == "complete"
    toy_record(frozen.spec, status="failed").write(maker.out)
    assert words(watch) == {"bp": "finished", "frozen": "failed", "long": "stopped", "wild": "diverged"}
    with maker.claim(frozen), maker.claim(long):
        at_work = {s.digest: s for s in watch.look() if s.word == "running"}
    assert [*at_work] == [frozen.spec.digest, long.spec.digest]
    status = at_work[long.spec.digest]
    saved = load_checkpoint(maker.checkpoint(long.spec.digest)).progress
    assert (status.step, status.steps, status.loss) == (100, 1000000, saved["curves"]["val_loss"][-1])
    assert status.steps_per_s == pytest.approx(100 / saved["wall_time_s"])
    monkeypatch.setattr(module, "load_checkpoint", pytest.fail)  # read once, as it has not changed
    age = time.time() - maker.checkpoint(long.spec.digest).stat().st_mtime
    with maker.claim(long):
        later = {s.digest: s for s in watch.look()}[long.spec.digest]
    assert later.seconds_left == pytest.approx((1000000 - 100) / status.steps_per_s - age, abs=5)
    assert summary(watch.look()) == "4 runs: 1 finished, 1 diverged, 1 failed, 1 stopped"
    for run in (frozen, long):
        toy_record(run.spec, tokens_per_s=1e9).write(maker.out)
    assert {s.word for s in watch.look()} == {"finished", "diverged"} and watch.is_over


def test_a_run_that_was_killed_is_not_shown_as_running(maker):
    command = [
        sys.executable,
        "-m",
        "localgpt_core",
        "run",
        str(maker.suite.path),
        "--records",
        maker.records,
    ]
    long = [*maker.planned().values()][2].spec.digest
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(
        [*map(str, command), "--only", long], env=environment, stderr=subprocess.DEVNULL
    ) as process:
        watch, end = Watch(maker), time.monotonic() + 300
        while (status := watch.look()[2]).word != "running" or status.step < 50:
            assert time.monotonic() < end and process.poll() is None
            time.sleep(0.05)
        assert status.seconds_left > 0 and status.loss < 5
        process.kill()
    assert watch.look()[2].word == "stopped"
    assert not [*Path(maker.out).rglob("*.lock")]  # what it left behind is gone too


def test_what_a_checkpoint_of_no_use_says_is_not_shown(maker):
    long = [*maker.planned().values()][2]
    assert made(maker, long, 50) == "interrupted"
    file = maker.checkpoint(long.spec.digest)
    file.write_bytes(file.read_bytes()[:100])
    assert Watch(maker).look()[2].word == "left"


STATUSES = [
    RunStatus("a", "bp seed 1 [a]", "running", 600, 120, 2.51239, 12.345, 3661.4),
    RunStatus("b", "frozen [red] seed 1 [b]", "left", 600),
    RunStatus("c", "fa seed 1 [c]", "finished", 600, 600, 1.5),
]


def test_a_status_is_shown_in_columns_and_on_one_line():
    assert table(STATUSES).splitlines() == [
        "bp seed 1 [a]            running   step 120/600  loss 2.5124  12.3 steps/s  1:01:01 left",
        "frozen [red] seed 1 [b]  left      step 0/600",
        "fa seed 1 [c]            finished  step 600/600  loss 1.5000",
    ]
    first = "bp seed 1 [a]: running, step 120/600, loss 2.5124, 12.3 steps/s, 1:01:01 left"
    assert str(STATUSES[0]) == first
    assert table([]) == "" and summary(STATUSES) == "3 runs: 1 finished, 1 running, 1 left"


def test_away_from_a_terminal_each_change_is_a_line():
    said = []
    with screen(io.StringIO(), said.append, ("running", "finished")) as show:
        show(STATUSES)
        show(STATUSES)
        show([replace(STATUSES[0], step=240), replace(STATUSES[1], word="finished"), STATUSES[2]])
    assert [line.split(", ")[:2] for line in said] == [
        ["bp seed 1 [a]: running", "step 120/600"],
        ["fa seed 1 [c]: finished", "step 600/600"],
        ["bp seed 1 [a]: running", "step 240/600"],
        ["frozen [red] seed 1 [b]: finished", "step 0/600"],
    ]


def test_on_a_terminal_the_table_of_what_is_at_work_is_drawn_again(monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    terminal = Terminal()
    monkeypatch.setenv("COLUMNS", "80")
    with screen(terminal, pytest.fail) as show:
        show(STATUSES)
        show([replace(STATUSES[0], step=240)])
    drawn = re.sub(r"\x1b\[[\d;?]*\w", "", terminal.getvalue())
    row = "bp seed 1  running  step {}/600  loss 2.5124  12.3 steps/s  1:01:01 left"
    assert row.format(120) in drawn and row.format(240) in drawn
    assert (
        "3 runs: 1 finished, 1 running, 1 left" in drawn and "[red]" not in drawn and "fa seed" not in drawn
    )
    assert "\x1b[2K" in terminal.getvalue()  # wiped in the end


@pytest.mark.skipif(os.name != "posix", reason="needs a pseudo-terminal")
def test_runs_side_by_side_are_a_live_table_on_a_terminal(maker):
    import pty
    import termios

    terminal, end = pty.openpty()
    termios.tcsetwinsize(end, (24, 160))
    command = [sys.executable, "-m", "localgpt_core", "run", maker.suite.path, "--records", maker.records]
    process = subprocess.Popen(
        [*map(str, command), "--jobs", "2"],
        stdout=subprocess.PIPE,
        stderr=end,
        env={**os.environ, "OMP_NUM_THREADS": "1", "TERM": "xterm", "COLUMNS": "160", "LINES": "24"},
        start_new_session=True,
    )
    os.close(end)
    row = r"long seed 1  running +step \d+/1000000  loss \d\.\d+  \S+ steps/s  .* left"
    all_but_one = "\n4 runs: 2 finished, 1 diverged, 1 running"
    stopped, shown = False, ""
    try:
        with suppress(OSError):  # the other end is closed
            while data := os.read(terminal, 4096):
                shown += re.sub(r"\x1b\[[\d;?]*\w", "", data.decode()).replace("\r", "\n")
                drawn = len(re.findall(row, shown)) > 1 and all_but_one in shown
                if drawn and not stopped:
                    process.send_signal(signal.SIGINT)
                    stopped = True
    finally:
        os.close(terminal)
        if not stopped:
            os.killpg(process.pid, signal.SIGKILL)
    assert process.communicate()[0] == b"" and process.returncode == 130
    for title, word in (("bp", "finished"), ("wild", "diverged"), ("long", "interrupted")):
        assert len(re.findall(rf"(?m)^{title} seed 1 \[\w+\]: {word}", shown)) == 1


def test_what_goes_wrong_with_showing_is_said_once_and_harms_nothing(maker, monkeypatch):
    monkeypatch.setattr(module, "EVERY_S", 0.01)
    monkeypatch.setattr(Watch, "look", lambda watch: 1 / 0)
    said = []
    with watching(maker, io.StringIO(), said.append):
        time.sleep(0.2)
    assert said == ["how far the runs are cannot be shown: ZeroDivisionError: division by zero"]
