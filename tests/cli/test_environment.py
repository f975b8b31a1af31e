"""Machines that lack something: a package, a home, a name for the user, a place for what is printed."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from toys import TOY_SIZES, toy_record, toy_spec

TRAIN = ["train", "--corpus", "toy.txt", *TOY_SIZES, "--steps", "2", "--eval-interval", "1", "--out", "runs"]
EXTRA = {"pandas": "figures", "matplotlib": "figures", "seaborn": "figures", "scipy": "figures"}
EXTRA |= {"plotext": "figures", "pooch": "corpus", "IPython": None}

# Plays commands in a process that lacks some packages, as one without the extra does, and says how they end.
PLAY = """
import contextlib, io, json, sys
lacking, *plays = json.loads(sys.argv[1])
for name in lacking:
    sys.modules[name] = None
from localgpt_core.cli import commands
for arguments in plays:
    sys.argv = ["localgpt", *arguments]
    err = io.StringIO()
    with contextlib.redirect_stderr(err), contextlib.redirect_stdout(io.StringIO()) as out:
        try:
            commands.main()
        except SystemExit as end:
            status = end.code or 0
    print(json.dumps([status, out.getvalue(), err.getvalue()]))
"""
WITHOUT_A_NAME = """
import pwd
def unknown(uid):
    raise KeyError(f"getpwuid(): uid not found: {uid}")
pwd.getpwuid = unknown
"""


def played(lacking, *plays, before="", env=None):
    """Return status, stdout and stderr of each of ``plays``."""
    words = json.dumps([lacking, *plays])
    command = [sys.executable, "-c", before + PLAY, words]
    done = subprocess.run(command, capture_output=True, text=True, env=env, check=True)
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_what_trains_needs_no_extra_and_what_shows_names_it(folder):
    plays = [["--version"], ["--help"], ["corpus", "toy.txt"], TRAIN, ["run", "suite.toml"]]
    plays += [["export", "all.jsonl"], ["import", "all.jsonl", "--records", "new"]]
    needy = [["table"], ["plot"], ["plot", "--out", "x.png"], ["figure"], ["corpus", "tinyshakespeare"]]
    ends = played([*EXTRA], *plays, *needy)
    for arguments, (status, _, err) in zip(plays, ends, strict=False):
        assert status == 0 and "error" not in err, (arguments, err)
    for arguments, (status, out, err) in zip(needy, ends[len(plays) :], strict=True):
        extra = "corpus" if arguments[0] == "corpus" else "figures"
        assert (status, out) == (2, "") and err.startswith("error: ") and len(err.splitlines()) == 1, err
        assert f'pip install "localgpt[{extra}]"' in err, (arguments, err)
    (checkpoint,) = Path("runs").glob("*.safetensors")
    (digest, _) = sorted(path.stem for path in Path("book/records/suite").glob("*.json"))
    for status, _, err in played(
        [*EXTRA],
        ["sample", str(checkpoint), "--characters", "3"],
        ["verify", digest],
        ["bench", "suite.toml", "--preset", "tiny", "--pairs", "1"],
    ):
        assert status == 0, err


@pytest.mark.needs("plotext")
@pytest.mark.parametrize("package", [name for name, extra in EXTRA.items() if extra == "figures"])
def test_a_single_package_that_is_missing_is_named(folder, package):
    toy_record(toy_spec(), suite="").write("book/records")
    plays = [["table"], ["plot", "--out", "x.png"], ["plot"]]
    ends = played([package], *plays)
    failed = [err for status, _, err in ends if status]
    assert failed and {status for status, *_ in ends} <= {0, 2}
    for err in failed:
        assert package in err and 'pip install "localgpt[figures]"' in err and len(err.splitlines()) == 1


@pytest.mark.needs("pandas")
def test_who_has_neither_a_home_nor_a_name_can_work(folder):
    env = {"PYTHONPATH": os.pathsep.join(sys.path), "PATH": os.defpath, "OMP_NUM_THREADS": "1"}
    env |= {"TMPDIR": str(folder / "tmp"), "MPLCONFIGDIR": str(folder / "tmp")}
    (folder / "tmp").mkdir()
    plays = [["--version"], ["corpus", "toy.txt"], TRAIN, ["table", "--records", "runs"]]
    plays += [["plot", "--records", "runs"], ["plot", "--records", "runs", "--out", "x.png"]]
    for (status, out, err), arguments in zip(
        played([], *plays, before=WITHOUT_A_NAME, env=env), plays, strict=True
    ):
        assert status == 0 and "error" not in err and out, (arguments, err)
    assert [*(folder / "tmp" / "localgpt" / "texts").iterdir()]


PRINTING = [["--version"], ["--help"], ["corpus", "toy.txt"], ["table"], ["plot"]]


@pytest.mark.needs("plotext")
@pytest.mark.parametrize("arguments", PRINTING, ids=" ".join)
def test_what_nobody_gets_is_a_failure_in_a_real_process_too(folder, arguments):
    if arguments[0] in ("table", "plot"):
        toy_record(toy_spec(), suite="").write("book/records")
    command = [sys.executable, "-m", "localgpt_core", *arguments]
    reader, writer = os.pipe()
    os.close(reader)
    full = [os.open("/dev/full", os.O_WRONLY)] if Path("/dev/full").exists() else []
    for stdout in (writer, *full):
        done = subprocess.run(command, stdout=stdout, stderr=subprocess.PIPE, text=True)
        os.close(stdout)
        assert done.returncode == 1, done.stderr
        assert "Traceback" not in done.stderr and "Exception ignored" not in done.stderr
    ascii_only = os.environ | {"PYTHONIOENCODING": "ascii"}
    done = subprocess.run(command, capture_output=True, env=ascii_only)
    assert done.returncode == 0 and done.stdout.decode("ascii")
