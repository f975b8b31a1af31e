"""A suite on SLURM: one array of jobs, an index for each run that is missing.

The script is whole in itself: it lists the digests, and the job with index i makes the i-th run by
`localgpt run SUITE --only DIGEST`. A job that SLURM requeues goes on from the checkpoint of its run. With a
limit of time, SLURM presses Ctrl-C a minute before it, and the run leaves a checkpoint for the next array.
"""

import math
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from localgpt_core.common.validation import printable, require
from localgpt_core.experiments.making import title_of
from localgpt_core.experiments.scheduler import SuiteRun
from localgpt_core.experiments.suites import PlannedRun

__all__ = ["array_script", "submit"]

SAVING_S = 60  # before the end of a job, for the step of that moment and the checkpoint


def array_script(
    suite: SuiteRun,
    runs: Sequence[PlannedRun],
    *,
    jobs: int | None = None,
    limit_s: float | None = None,
    device: str = "cpu",
    site: Sequence[str] = (),
) -> str:
    """Return the script of an array that makes ``runs``, for `sbatch` in the folder of this process.

    Args:
        suite: The suite, with the folders and the settings of its runs.
        runs: The runs, one for each index, in this order.
        jobs: How many go at a time; None leaves that to SLURM.
        limit_s: Seconds after which SLURM ends a job, of which it counts whole minutes; None: the site's own.
        device: ``"cuda"`` asks for a GPU for each run.
        site: Options of `sbatch` for the head of the script, such as ``"--partition=gpu"``.

    Raises:
        ValueError: For an option of the site that is none, or a limit that leaves no time for steps.
    """
    for option in site:
        require(
            option.startswith("-") and option.isprintable(), "sbatch", option, "must be an option of sbatch"
        )
    allowed = f"must be more than {SAVING_S} seconds, in which a run is saved"
    require(limit_s is None or limit_s > SAVING_S, "time_budget", limit_s, allowed)
    threads = suite.settings.threads or 1
    options = [
        f"--job-name=localgpt-{suite.suite.name}",
        f"--array=0-{len(runs) - 1}{f'%{jobs}' if jobs else ''}",
        "--ntasks=1",
        f"--cpus-per-task={threads}",
        *["--gres=gpu:1"] * (device == "cuda"),
        *([] if limit_s is None else [f"--time={math.ceil(limit_s / 60)}", f"--signal=B:INT@{SAVING_S}"]),
        "--requeue",
        "--open-mode=append",
        *site,
    ]
    command = [sys.executable, "-m", "localgpt_core", "run", str(suite.suite.path), *suite.options(device)]
    return "\n".join(
        [
            "#!/bin/bash",
            *[f"#SBATCH {option}" for option in options],
            "# Options of the site: further lines here, or SBATCH_PARTITION, SBATCH_ACCOUNT, ... for sbatch.",
            "set -eu",
            "runs=(",
            *[f"    {run.spec.digest}  # {printable(title_of(run))}" for run in runs],
            ")",
            f"cd {shlex.quote(str(Path.cwd()))}",
            f"export OMP_NUM_THREADS={threads}",
            "# In the place of this shell, so that SLURM's signals reach the run.",
            f'exec {shlex.join(command)} --only "${{runs[$SLURM_ARRAY_TASK_ID]}}"',
            "",
        ]
    )


def submit(script: str) -> str:
    """Hand ``script`` to `sbatch` and return what that answers.

    Raises:
        ValueError: Where there is no `sbatch`, or it refuses the script.
    """
    found = shutil.which("sbatch")
    require(
        found is not None, "engine", "slurm", "needs sbatch, which is not here; --dry-run prints the script"
    )
    done = subprocess.run([found], input=script, capture_output=True, text=True)
    said = " ".join(f"{done.stdout} {done.stderr}".split())
    require(done.returncode == 0, "engine", "slurm", f"sbatch refuses the script: {said}")
    return said
