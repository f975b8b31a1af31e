"""`localgpt run` on other engines, and `localgpt status`; Ray itself is in tests/engines."""

import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import localgpt_core
from localgpt_core.cli import commands
from localgpt_core.experiments.locks import claim
from localgpt_core.records import load_records

ROOT = Path(localgpt_core.__file__).parents[1]
SLURM = ["run", "suite.toml", "--engine", "slurm", "--records", "records"]


@pytest.fixture
def bash(folder):
    """Return a function that gives a script to bash, with variables of SLURM's, and returns what it did."""
    shell = shutil.which("bash")
    assert shell

    def play(script, *options, **variables):
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), **variables}
        return subprocess.run(
            [shell, *options, "-s"], input=script, env=environment, cwd="/", capture_output=True, text=True
        )

    return play


def options_of(script):
    return dict(re.findall(r"(?m)^#SBATCH --([\w-]+)(?:=(.*))?$", script))


def test_the_script_of_an_array_makes_a_run_by_its_index(cli, bash):
    status, script, err = cli(*SLURM, "--dry-run")
    assert (status, err) == (0, "")
    assert bash(script, "-n").returncode == 0
    assert not Path("records").exists()
    given = options_of(script)
    assert given["array"] == "0-1" and given["cpus-per-task"] == "1" and given["job-name"] == "localgpt-suite"
    assert not {"time", "signal", "gres", "partition"} & given.keys()
    titles = re.findall(r"(?m)^ {4}(\w{16})  # (.*) \[\1\]$", script)
    assert [title for _, title in titles] == ["bp seed 1", "frozen seed 1"]
    done = bash(script, SLURM_ARRAY_TASK_ID="1")
    assert done.returncode == 0, done.stderr
    assert [*load_records("records")] == [titles[1][0]]
    _, script, _ = cli(*SLURM, "--dry-run")
    assert options_of(script)["array"] == "0-0" and titles[1][0] not in script and titles[0][0] in script
    assert bash(script, SLURM_ARRAY_TASK_ID="0").returncode == 0
    assert cli(*SLURM, "--dry-run") == (0, "suite: complete\n", "suite: 0 runs to make\n")


def test_the_head_of_the_script_is_the_site_s(cli, bash):
    Path("with space").mkdir()
    shutil.move("suite.toml", "with space/suite.toml")
    asked = ["--device", "cuda", "--threads", "3", "--jobs", "5", "--time-budget", "601", "--preset", "tiny"]
    site = ["--sbatch=--partition=gpu,long", "--sbatch", "--account=it's mine"]
    status, script, err = cli("run", "with space/suite.toml", *SLURM[2:], "--dry-run", *asked, *site)
    assert (status, err) == (0, "") and bash(script, "-n").returncode == 0
    head, _, body = script.partition("\nset -eu\n")
    assert options_of(head) == options_of(script) and head.startswith("#!/bin/bash\n#SBATCH ")
    assert options_of(head) == {
        "job-name": "localgpt-suite",
        "array": "0-1%5",
        "ntasks": "1",
        "cpus-per-task": "3",
        "gres": "gpu:1",
        "time": "11",  # minutes
        "signal": "B:INT@60",
        "requeue": "",
        "open-mode": "append",
        "partition": "gpu,long",
        "account": "it's mine",
    }
    words = shlex.split(body.splitlines()[-1])
    assert words[words.index("run") + 1] == "with space/suite.toml"
    for name, value in (("--device", "cuda"), ("--threads", "3"), ("--preset", "tiny")):
        assert words[words.index(name) + 1] == value
    assert "--time-budget" not in words and "--engine" not in words


def test_a_script_is_handed_to_sbatch_where_there_is_one(cli, monkeypatch, folder):
    monkeypatch.setenv("PATH", str(folder / "bin"))
    status, out, err = cli(*SLURM)
    assert (status, out) == (2, "") and len(err.splitlines()) == 1
    assert "engine='slurm': needs sbatch, which is not here; --dry-run prints the script" in err
    (folder / "bin").mkdir()
    sbatch = folder / "bin" / "sbatch"
    sbatch.write_text('#!/bin/sh\n/bin/cat > "$0.got"\necho Submitted batch job 7\n')
    sbatch.chmod(0o755)
    assert cli(*SLURM) == (0, "Submitted batch job 7\n", "")
    assert (folder / "bin" / "sbatch.got").read_text() == cli(*SLURM, "--dry-run")[1]
    sbatch.write_text("#!/bin/sh\necho sbatch: error: no such partition >&2\nexit 1\n")
    status, out, err = cli(*SLURM)
    assert (status, out) == (2, "") and "refuses the script: sbatch: error: no such partition" in err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--engine", "moon"], "engine='moon': allowed are 'local', 'ray', 'slurm'"),
        (["--dry-run"], "dry_run=True: is for --engine slurm"),
        (["--retries", "0"], "retries=0: is for --engine ray"),
        (["--address", "auto"], "address='auto': is for --engine ray"),
        (["--gpu-share", "0.5"], "gpu_share=0.5: is for --engine ray"),
        ([*SLURM[2:4], "--sbatch", "gpu"], "sbatch='gpu': must be an option of sbatch"),
        ([*SLURM[2:4], "--sbatch", "--x\nrm -r ."], "must be an option of sbatch"),
        ([*SLURM[2:4], "--time-budget", "60"], "time_budget=60.0: must be more than 60 seconds"),
        ([*SLURM[2:4], "--device", "cuda:1"], "device='cuda:1': allowed are 'cpu', 'cuda'"),
        ([*SLURM[2:4], "--jobs", "0"], "jobs=0: "),
    ],
)
def test_what_no_engine_can_do_is_refused(cli, options, message):
    status, out, err = cli("run", "suite.toml", *options)
    assert (status, out) == (2, "") and message in err and len(err.splitlines()) == 1


def test_without_ray_one_line_names_the_extra(cli, monkeypatch):
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    needed = [f'{line}; extra == "{extra}"' for extra, lines in extras.items() for line in lines]
    monkeypatch.setattr(commands, "requires", lambda name: needed)
    monkeypatch.setitem(sys.modules, "ray", None)
    status, out, err = cli("run", "suite.toml", "--engine", "ray", "--records", "records")
    expected = 'error: this needs ray, which is not installed: pip install "localgpt[cluster]"\n'
    assert (status, out, err) == (2, "", expected) and not Path("records").exists()


def test_status_says_how_far_every_run_is(cli):
    status, out, err = cli("status", "suite.toml", "--records", "records")
    assert (status, err) == (0, "")
    *rows, last = out.splitlines()
    assert last == "2 runs: 2 left" and not Path("records").exists()
    digests = [re.fullmatch(r"(?:bp|frozen) seed 1 \[(\w+)\] +left  step 0/4", row)[1] for row in rows]
    with claim(digests[1], Path("records/suite"), Path("records")) as mine:
        assert mine
        _, out, _ = cli("status", "suite.toml", "--records", "records")
        assert out.splitlines()[1].endswith("running  step 0/4")
        assert out.splitlines()[2] == "2 runs: 1 running, 1 left"
    assert cli("run", "suite.toml", "--records", "records")[0] == 0
    _, out, _ = cli("status", "suite.toml", "--records", "records", "--watch")
    record = load_records("records")[digests[0]]
    *rows, last = out.splitlines()
    assert last == "2 runs: 2 finished"
    assert re.sub(" +", " ", rows[0]).endswith(f"finished step 4/4 loss {record.final_val_loss:.4f}")
