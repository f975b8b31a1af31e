"""Printing fails no run, and the exit status says whose an error is."""

import errno
import io
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from toys import TOY_SIZES, TOY_SUITE, interrupt_after, toy_text

from localgpt_core.cli import commands as cli_module
from localgpt_core.cli.streams import progress, say, tell
from localgpt_core.experiments import execution
from localgpt_core.records import load_records
from localgpt_core.training import state as run_state

TRAIN = ["train", "--corpus", "toy.txt", *TOY_SIZES, "--steps", "4", "--eval-interval", "2"]


@pytest.fixture
def letters(folder):
    """Write a text with letters that not every terminal has."""
    Path("letters.txt").write_text("ab\u2192\u03bb \n" * 300, encoding="utf-8")


@pytest.fixture
def cli(folder, letters, monkeypatch):
    """Return a function that runs `localgpt` with these streams and returns its exit status."""

    def run(*arguments, stdout=None, stderr=None):
        with monkeypatch.context() as patch:
            patch.setattr(sys, "argv", ["localgpt", *map(str, arguments)])
            patch.setattr(sys, "stdout", stdout)
            patch.setattr(sys, "stderr", stderr)
            with pytest.raises(SystemExit) as exit:
                cli_module.main()
            assert (sys.stdout, sys.stderr) == (stdout, stderr)
        return exit.value.code or 0

    return run


class Gone(io.StringIO):
    """A stream whose reader has gone away, or that was closed."""

    error = BrokenPipeError(errno.EPIPE, "Broken pipe")

    def write(self, text):
        raise self.error


class Closed(Gone):
    error = ValueError("I/O operation on closed file")


def a_closed_stream():
    stream = io.StringIO()
    stream.close()
    return stream


class Terminal(Gone):
    """A terminal that has hung up."""

    error = OSError(errno.EIO, "Input/output error")

    def isatty(self):
        return True


STREAMS = {"none": lambda: None, "gone": Gone, "closed": Closed, "shut": a_closed_stream, "hung up": Terminal}


@pytest.mark.parametrize("err", STREAMS)
@pytest.mark.parametrize("out", STREAMS)
def test_a_run_is_recorded_wherever_it_prints_to(cli, out, err):
    assert cli(*TRAIN, stdout=STREAMS[out](), stderr=STREAMS[err]()) == 0
    (record,) = load_records("runs").values()
    assert record.status == "finished" and len(list(Path("runs").iterdir())) == 2


@pytest.mark.filterwarnings("ignore:no diagnostics at step 4")
@pytest.mark.parametrize("name", STREAMS)
def test_a_run_whose_last_diagnostics_fail_is_recorded_without_them(cli, monkeypatch, name):
    usual = run_state.measure_into

    def measure(diagnostics, *others):
        usual(diagnostics, *others)
        if others[-1] == 4:
            raise RuntimeError("did not converge")

    monkeypatch.setattr(run_state, "measure_into", measure)
    assert cli(*TRAIN, "--diagnose-every", "2", stderr=STREAMS[name]()) == 0
    (record,) = load_records("runs").values()
    assert (record.status, record.diagnostics["step"]) == ("finished", [0, 2])


@pytest.mark.parametrize("name", STREAMS)
def test_a_suite_is_recorded_wherever_it_prints_to(cli, name):
    assert cli("run", "suite.toml", stdout=STREAMS[name](), stderr=STREAMS[name]()) == 0
    assert len(load_records("book/records")) == 2
    assert cli("export", "all.jsonl", stdout=STREAMS[name](), stderr=STREAMS[name]()) == 0
    assert cli("import", "all.jsonl", "--records", "new", stdout=STREAMS[name]()) == 0
    assert len(load_records("new")) == 2


@pytest.mark.needs("pandas")
@pytest.mark.parametrize("name", ["gone", "hung up"])
def test_a_table_that_nobody_gets_is_a_failure(cli, name):
    cli("run", "suite.toml")
    assert cli("table", stdout=STREAMS[name](), stderr=io.StringIO()) == 1


@pytest.mark.parametrize("encoding", ["ascii", "cp1252"])
def test_a_letter_that_the_terminal_lacks_is_a_question_mark(cli, encoding):
    out = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    arguments = ["letters.txt" if name == "toy.txt" else name for name in TRAIN]
    assert cli(*arguments, stdout=out) == 0 and out.errors == "strict"
    shown = out.buffer.getvalue().decode(encoding)
    (record,) = load_records("runs").values()
    assert {*record.sample} <= {*"ab\u2192\u03bb \n"} and record.sample != record.sample.replace(
        "\u03bb", "?"
    )
    assert shown.startswith(re.sub("[^ab \n]", "?", record.sample)) and "final validation loss" in shown


@pytest.mark.needs("pandas")
def test_a_real_process_prints_in_ascii_and_survives_closed_streams(folder, letters):
    def run(*arguments, redirect="", **environment):
        command = f'"{sys.executable}" -m localgpt_core {" ".join(map(str, arguments))} {redirect}'
        done = subprocess.run(command, shell=True, capture_output=True, env=os.environ | environment)
        assert b"Traceback" not in done.stderr and b"Exception ignored" not in done.stderr
        return done.returncode, done.stdout, done.stderr

    assert run(*TRAIN, redirect=">&- 2>&-")[0] == 0
    status, out, _ = run("table --records runs", PYTHONIOENCODING="ascii")
    assert status == 0 and "95 % ?" in out.decode("ascii")
    if Path("/dev/full").exists():
        assert run(*TRAIN, "--out full", redirect=">/dev/full")[0] == 0
        assert len(load_records("full")) == 1
        status, _, err = run("table --records runs", redirect=">/dev/full")
        assert status == 1 and err.splitlines()[-1].startswith(
            b"error: [Errno 28] No space left on device (LOCALGPT_TRACEBACK=1"
        )


def test_news_without_a_stderr_goes_nowhere(monkeypatch, capsys):
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stderr", None)
        say("news")
        with progress(3, "run") as report:
            report({"step": 3, "val_loss": 1.0})
    assert capsys.readouterr() == ("", "")
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", Gone())
        tell("result")
        tell("more")


def test_a_model_of_a_text_without_a_line_break_is_trained_and_sampled(cli):
    Path("toy.txt").write_text("ACGTTGCA" * 300)
    assert cli(*TRAIN) == 0
    (path,) = Path("runs").glob("*.safetensors")
    out = io.StringIO()
    assert cli("sample", path, "--characters", "9", stdout=out) == 0
    assert re.fullmatch("A[ACGT]{9}\n", out.getvalue())


# Whose error it is


def failing(error):
    def fail(*args, **options):
        raise error

    return fail


@pytest.mark.parametrize(
    ("error", "status", "said"),
    [
        (ValueError("of a library"), 1, "error: ValueError: of a library (LOCALGPT_TRACEBACK=1 shows where)"),
        (OSError(errno.ENOSPC, "No space left", "x"), 1, "error: [Errno 28] No space left: 'x' (LOCALGPT"),
        (MemoryError(), 1, "error: MemoryError: "),
        (RuntimeError("one\ntwo"), 1, "error: RuntimeError: one (LOCALGPT"),
        (RecursionError("deep"), 1, "error: RecursionError: deep (LOCALGPT"),
        (KeyError("x"), 1, "error: KeyError: 'x' (LOCALGPT"),
        (KeyboardInterrupt(), 130, ""),
    ],
    ids=repr,
)
def test_an_error_that_is_not_the_users_has_another_status(cli, monkeypatch, error, status, said):
    monkeypatch.setattr("localgpt_core.corpus.corpus.load_corpus", failing(error))
    err = io.StringIO()
    assert cli("corpus", "toy.txt", stdout=io.StringIO(), stderr=err) == status
    assert err.getvalue().strip().startswith(said) and len(err.getvalue().strip().splitlines()) <= 1


def test_a_traceback_is_shown_to_whoever_asks(cli, monkeypatch):
    monkeypatch.setattr("localgpt_core.corpus.corpus.load_corpus", failing(KeyError("x")))
    monkeypatch.setenv("LOCALGPT_TRACEBACK", "1")
    err = io.StringIO()
    assert cli("corpus", "toy.txt", stderr=err) == 1
    assert "Traceback" in err.getvalue() and "in fail" in err.getvalue()


@pytest.mark.parametrize("name", STREAMS)
def test_an_error_that_nobody_can_read_keeps_its_status(cli, monkeypatch, name):
    monkeypatch.setenv("LOCALGPT_TRACEBACK", "1")
    assert cli("corpus", "no.txt", stderr=STREAMS[name]()) == 2
    assert cli(stdout=STREAMS[name](), stderr=STREAMS[name]()) in (1, 2)
    assert cli("--help", stdout=STREAMS[name](), stderr=STREAMS[name]()) in (0, 1)


def test_a_full_disk_at_the_start_is_not_the_users_error(cli, monkeypatch):
    monkeypatch.setattr(
        "localgpt_core.common.files.os.fsync", failing(OSError(errno.ENOSPC, "No space left"))
    )
    monkeypatch.setattr(run_state, "training_step", failing(AssertionError))
    err = io.StringIO()
    assert cli(*TRAIN, stderr=err) == 1 and "No space left: 'runs/" in err.getvalue()


@pytest.mark.parametrize("place", ["toy.txt/x", "x" * 300, "/dev/null/x", "/proc/x"])
@pytest.mark.parametrize(
    "command",
    [
        *([*TRAIN, "--out"], ["run", "suite.toml", "--out"], ["export"]),
        *(["bench", "--out"], ["bench", "--profile", "--trace"]),
    ],
    ids=lambda words: words[0],
)
def test_an_output_that_cannot_be_written_is_refused_at_once(cli, monkeypatch, command, place):
    monkeypatch.setattr(run_state, "training_step", failing(AssertionError))
    monkeypatch.setattr("localgpt_core.bench.measuring._row", failing(AssertionError))
    monkeypatch.setattr("localgpt_core.bench.profile._profile", failing(AssertionError))
    err = io.StringIO()
    assert cli(*command, place, stderr=err) == 2
    assert re.fullmatch(rf"error: (out|bundle|trace)='{place}.*': cannot be written \(.*\)\n", err.getvalue())


def test_a_device_is_no_place_for_an_export(cli):
    err = io.StringIO()
    assert cli("export", "/dev/null", stderr=err) == 2 and "is no regular file" in err.getvalue()
    assert not Path("/dev/null").is_file()


@pytest.mark.parametrize("tolerance", ["nan", "-1"])
def test_a_tolerance_that_is_none_is_refused_before_the_run(cli, monkeypatch, tolerance):
    cli("run", "suite.toml")
    (digest, _) = load_records("book/records")
    monkeypatch.setattr(run_state, "training_step", failing(AssertionError))
    err = io.StringIO()
    assert cli("verify", digest, "--corpus", "toy.txt", "--tolerance", tolerance, stderr=err) == 2
    assert "tolerance=" in err.getvalue()


def test_ctrl_c_is_130_in_a_suite_and_in_a_sample(cli, monkeypatch):
    with monkeypatch.context() as patch:
        interrupt_after(patch, 2)
        assert cli("run", "suite.toml") == 130 and load_records("book/records") == {}
        assert cli("run", "suite.toml", "--only", "abc", stderr=io.StringIO()) == 2
    monkeypatch.setattr(execution, "sample_text", failing(KeyboardInterrupt()))
    assert cli(*TRAIN) == 130
    (record,) = load_records("runs").values()
    assert record.status == "finished"


def test_a_run_that_breaks_down_is_a_failure_of_its_suite(cli, monkeypatch):
    monkeypatch.setattr(run_state, "training_step", failing(MemoryError("none left")))
    out = io.StringIO()
    assert cli("run", "suite.toml", stdout=out) == 1 and out.getvalue().startswith("suite: not complete")
    (first, _) = load_records("book/records")
    assert cli("run", "suite.toml", "--only", first) == 1


def test_the_help_says_what_an_exit_status_means(cli):
    out = io.StringIO()
    assert cli("--help", stdout=out) == 0
    text = " ".join(out.getvalue().split())
    assert (
        "Exit status: 0 done; 1 a failure" in text and "130 Ctrl-C" in text and "LOCALGPT_TRACEBACK=1" in text
    )


# Texts and suites as they are in the world


def test_what_people_do_not_see_in_a_text_is_said(cli):
    Path("toy.txt").write_bytes(b"\xef\xbb\xbf" + toy_text().replace("\n", "\r\n").encode())
    out, err = io.StringIO(), io.StringIO()
    assert cli("corpus", "toy.txt", "--no-floors", stdout=out, stderr=err) == 0
    assert (
        "vocabulary  22 symbols" in out.getvalue()
        and "\\r" in out.getvalue()
        and "feff" not in out.getvalue()
    )
    assert err.getvalue() == (
        "corpus 'toy': the byte order mark at its start is left out\n"
        "corpus 'toy': its lines end in \\r\\n, and \\r is one of its symbols\n"
    )


@pytest.mark.needs("pandas")
def test_a_table_of_all_records_has_a_row_for_each_spec(cli):
    for options in ([], ["--seed", "2"], ["--lr", "0.01"]):
        assert cli(*TRAIN, *options) == 0
    out = io.StringIO()
    assert cli("table", "--records", "runs", stdout=out) == 0
    rows = [line.split() for line in out.getvalue().splitlines()[1:]]
    assert sorted((row[0], row[1], row[-1]) for row in rows) == [
        ("bp", "1", "lr=0.01"),
        ("bp", "2", "lr=0.001"),
    ]


@pytest.mark.needs("pandas")
def test_records_of_a_spec_that_a_suite_no_longer_has_are_named(cli):
    cli("run", "suite.toml")
    Path("suite.toml").write_text(TOY_SUITE.replace("freeze_body = true", "freeze_body = true, lr = 0.5"))
    out, err = io.StringIO(), io.StringIO()
    assert cli("table", "suite.toml", stdout=out, stderr=err) == 0
    assert err.getvalue().startswith("not shown: 1 records of suite with a spec or a text")
    assert len(out.getvalue().splitlines()) == 2  # a heading and an arm
