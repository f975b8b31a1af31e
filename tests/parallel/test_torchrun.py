"""The command line under torchrun: one run, one record, one set of lines, and one Ctrl-C."""

import os
import re
import signal
import subprocess
import sys

import pytest
from toys import TOY_SIZES, TOY_SUITE, toy_text

from localgpt_core.records import load_records

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "localgpt_core"]
ALONE = [sys.executable, "-m", "localgpt_core"]
PIPES = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "toy.txt").write_text(toy_text())
    (tmp_path / "suite.toml").write_text(TOY_SUITE)
    return tmp_path


def played(folder, *words):
    """Return what a command prints in ``folder``, stdout and stderr."""
    done = subprocess.run(words, cwd=folder, capture_output=True, text=True, timeout=300, env=here())
    assert done.returncode == 0, done.stderr
    return done.stdout, done.stderr


def here():
    return {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}


def test_a_suite_is_made_once_and_as_one_process_makes_it(folder):
    for command, out in ((TORCHRUN, "two"), (ALONE, "one")):
        printed, said = played(folder, *command, "run", "suite.toml", "--records", out)
        assert printed == "suite: complete\n"
        assert (said.count("suite: 2 runs to make"), said.count("]: step 4/4,")) == (1, 2)
    two, one = (load_records(folder / out) for out in ("two", "one"))
    assert two.keys() == one.keys() and len(two) == 2
    assert not [*(folder / "two").rglob(".unfinished")]
    for digest, record in two.items():
        assert record.environment["processes"] == 2 and "processes" not in one[digest].environment
        assert record.curves["val_loss"] == pytest.approx(one[digest].curves["val_loss"], rel=1e-5)


def test_ctrl_c_saves_once_and_one_process_goes_on(folder):
    words = ["train", *TOY_SIZES, "--corpus", "toy.txt", "--eval-interval", "5", "--steps", "100000"]
    process = subprocess.Popen(
        [*TORCHRUN, *words], cwd=folder, env=here(), text=True, start_new_session=True, **PIPES
    )
    for line in process.stderr:
        if "step 10/" in line:
            break
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does; torchrun hands it on once more
    printed, _ = process.communicate(timeout=300)
    (step,) = re.findall(r"interrupted after step (\d+); checkpoint: ", printed)
    assert int(step) >= 10 and printed.count("goes on") == 1
    (checkpoint,) = (folder / "runs").glob("*.safetensors")
    assert [path.name for path in (folder / "runs").iterdir()] == [checkpoint.name]

    process = subprocess.Popen(
        [*ALONE, *words, "--resume"], cwd=folder, env=here(), text=True, start_new_session=True, **PIPES
    )
    said = next(line for line in process.stderr if "goes on" in line)
    assert f"goes on from step {step}/100000" in said
    process.kill()
    process.communicate()


def test_what_is_refused_is_said_once(folder):
    words = ["train", *TOY_SIZES, "--corpus", "toy.txt", "--batch-size", "3"]
    done = subprocess.run([*TORCHRUN, *words], cwd=folder, capture_output=True, text=True, env=here())
    assert done.returncode == 1 and done.stdout == ""
    assert re.findall("error: .*", done.stderr) == [
        "error: batch_size=3: must be a multiple of 2, for 2 processes with accumulate=1"
    ]
