"""What the help says, how a run shows itself, and how the command line starts."""

import ast
import dataclasses
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import typer

import localgpt_core
from localgpt_core.cli import app, streams
from localgpt_core.cli import main as light_main
from localgpt_core.cli.streams import progress
from localgpt_core.config import PRESETS, LocalGPTConfig, TrainConfig
from localgpt_core.rules import RULES

ROOT = Path(localgpt_core.__file__).parents[1]
COMMANDS = (
    "train run status campaign table claims figure verify export import plot sample corpus bench".split()
)


@pytest.fixture
def cli(monkeypatch, capsys):
    def run(*arguments):
        monkeypatch.setenv("COLUMNS", "200")
        monkeypatch.setattr(sys.modules["__main__"], "__package__", "")  # else: python -m pytest.localgpt
        monkeypatch.setattr(sys, "argv", ["localgpt", *arguments])
        with pytest.raises(SystemExit) as exit:
            light_main()
        return exit.value.code or 0, *capsys.readouterr()

    usual = signal.getsignal(signal.SIGINT)
    yield run
    signal.signal(signal.SIGINT, usual)


def texts():
    """Return every line of help of every command, by command and option."""
    group = typer.main.get_command(app)
    found = {("", ""): group.help}
    for name, command in group.commands.items():
        found[name, ""] = command.help
        found |= {(name, option.name): option for option in command.params}
    return found


def test_h_is_help_everywhere(cli):
    assert [*typer.main.get_command(app).commands] == COMMANDS
    for words in ([], *([command] for command in COMMANDS)):
        assert cli(*words, "-h") == cli(*words, "--help")
        status, out, err = cli(*words, "-h")
        assert status == 0 and "Usage: localgpt" in out and err == ""


def test_version_names_package_torch_and_commit(cli, monkeypatch):
    status, out, err = cli("--version")
    assert status == 0 and err == "" and len(out.splitlines()) == 1
    assert re.match(r"localgpt (\d+\.\d+\.\d+|not installed) \(torch \d+\.\d+\.\d+", out)
    monkeypatch.setattr(
        "localgpt_core.cli.commands.code_version", lambda file: {"git_commit": "c" * 40, "git_dirty": True}
    )
    assert cli("--version")[1].endswith(f", commit {'c' * 40} with changes)\n")
    monkeypatch.setattr(
        "localgpt_core.cli.commands.code_version", lambda file: {"git_commit": None, "git_dirty": None}
    )
    assert "commit" not in cli("--version")[1]


def test_completion_is_offered_and_completes(cli):
    assert "--install-completion" in cli("--help")[1]
    environment = {"_LOCALGPT_COMPLETE": "complete_bash", "COMP_WORDS": "localgpt tr", "COMP_CWORD": "1"}
    command = [sys.executable, "-c", "import sys; from localgpt_core.cli import main; main()"]
    code = command[2].replace("main()", "sys.argv[0] = 'localgpt'; main()")
    done = subprocess.run([*command[:2], code], env=os.environ | environment, capture_output=True, text=True)
    assert done.stdout.split() == ["train"], done.stderr


def test_options_of_train_are_in_groups(cli):
    status, out, err = cli("train", "--help")
    parts = dict(re.findall(r"(?s)\u256d\u2500 (\w+) \u2500+\u256e\n(.*?)\u2570", out))
    assert [*parts] == ["Options", "Run", "Rule", "Model", "Training"]
    for option, group in {
        "seeds": "Run",
        "resume": "Run",
        "method": "Rule",
        "dfa-inside": "Rule",
        "n-layer": "Model",
        "lr": "Training",
    }.items():
        assert [name for name, text in parts.items() if re.search(rf"--{option}\b", text)] == [group]


def test_every_rule_has_a_line_of_its_own_and_every_preset_its_default(cli):
    out = cli("train", "--help")[1]
    for name in RULES:
        summary = RULES.summary(name)
        assert re.search(rf"\s{name}: {re.escape(summary)}\s", out)
        assert len(summary.split()) > 4 and "``" not in summary
        assert summary in " ".join(sys.modules[RULES[name].__module__].__doc__.split())
    assert "[default: (tiny 2, cpu 4, gpu 6)]" in out and "[default: (tiny off, cpu off, gpu on)]" in out
    for number, defaults in enumerate(({**m, **t} for m, t in PRESETS.values())):
        assert f"{[*PRESETS][number]} {defaults['steps']}" in out


def test_every_option_has_a_text_and_a_default():
    for (command, name), option in texts().items():
        if name and name != "help":
            assert option.help, (command, name)
            shown = option.show_default if isinstance(option.show_default, str) else option.default
            switch = option.is_flag if hasattr(option, "is_flag") else False
            assert shown is not None or switch or option.required, (command, name)


@pytest.mark.parametrize("config", [LocalGPTConfig, TrainConfig])
def test_numbers_say_what_they_count(config):
    words = (
        "steps|number|numbers|characters|units|blocks|heads|codes|rank|seed|probes|inputs|probability|rate|ratio|"
        "RMS|weight|share|batches|step|start|decay|norm|sequences|non-zeros|learning"
    )
    for item in dataclasses.fields(config):
        if not isinstance(item.default, bool | str):
            assert re.search(rf"\b({words})\b", item.metadata["help"]), item.name


def test_a_lower_temperature_is_more_cautious(cli):
    said = " ".join(cli("sample", "-h")[1].split())
    assert "below 1 keeps to likelier characters (more cautious)" in said
    assert "all K are computed anew for each character; halves" in said and "repeatable" in said


def test_no_help_and_no_docstring_names_a_file_that_is_not_there():
    named = []
    for text in texts().values():
        named += re.findall(r"\bbook/[\w./-]+|\blocalgpt_core/[\w./-]+", getattr(text, "help", text) or "")
    for path in Path(localgpt_core.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
                text = ast.get_docstring(node) or ""
                named += re.findall(r"\b(?:book|localgpt_core|tests)/[\w./-]+", text)
    assert "book/suites/baseline.toml" in named
    assert [name for name in named if not (ROOT / name.rstrip(".")).exists()] == []


# How a run shows itself


class Screen:
    """A terminal of a given width that keeps what is written to it."""

    def __init__(self):
        self.text = ""

    def write(self, text):
        self.text += text

    def flush(self):
        pass

    def isatty(self):
        return True

    def frames(self):
        return [frame.rstrip() for frame in re.split(r"[\r\n]", self.text) if frame.strip()]


def screen(monkeypatch, columns):
    shown = Screen()
    monkeypatch.setattr(sys, "stderr", shown)
    monkeypatch.setattr("tqdm.std._screen_shape_wrapper", lambda: lambda stream: (columns, 24))
    return shown


@pytest.mark.parametrize("columns", [50, 79, 120])
def test_losses_stay_visible_on_a_narrow_terminal(monkeypatch, columns):
    shown = screen(monkeypatch, columns)
    title = "feedback-alignment seed 1 [0123456789abcdef]"
    with progress(2000, title) as report:
        report({"step": 0, "val_loss": 4.1234})
        report({"step": 20, "train_loss": 3.4567})
    frames = shown.frames()
    assert "evaluating" in frames[0] or "evaluating" in frames[1]
    assert "val=4.123, train=3.457" in frames[-1] and "20/2000" in frames[-1]
    assert all(len(frame) <= columns for frame in frames)


def test_on_resume_the_speed_is_that_of_the_new_steps(monkeypatch):
    shown = screen(monkeypatch, 120)
    now = [1000.0]
    monkeypatch.setattr("tqdm.std.time", lambda: now[0])
    with progress(2000, "bp seed 1", 1000) as report:
        now[0] += 10.0
        report({"step": 1100, "train_loss": 3.0})
    last = shown.frames()[-1]
    assert "1100/2000" in last and "10.00step/s" in last and "55%|" in last


# Ctrl-C at the start


@pytest.mark.skipif(os.name != "posix", reason="sends a signal")
@pytest.mark.parametrize("start", [["-m", "localgpt_core"], [str(Path(sys.executable).parent / "localgpt")]])
@pytest.mark.parametrize("module", ["torch", "typer", "uuid"])  # uuid: the package itself wants it
def test_ctrl_c_while_a_command_starts_is_silent(tmp_path, module, start):
    check_silence(tmp_path, module, [sys.executable, *start, "train"])


@pytest.mark.skipif(os.name != "posix", reason="sends a signal")
@pytest.mark.parametrize("module", ["torch", "numpy", "typer", "safetensors"])
def test_ctrl_c_while_modules_are_imported_is_silent(tmp_path, module):
    code = "from localgpt_core.cli import main; main()"
    check_silence(tmp_path, module, [sys.executable, "-c", code, "train"])


def check_silence(tmp_path, module, command):
    (tmp_path / f"{module}.py").write_text("print('importing', flush=True)\nimport time\ntime.sleep(60)\n")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)])}
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment, cwd=ROOT
    )
    assert process.stdout.readline() == "importing\n"
    time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=600)
    assert (process.returncode, out, err) == (130, "", "")


def test_ctrl_c_is_as_usual_after_the_start():
    usual = signal.getsignal(signal.SIGINT)
    with streams.starting():
        assert signal.getsignal(signal.SIGINT) is not usual
    assert signal.getsignal(signal.SIGINT) is usual
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with streams.starting():
            assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, usual)
